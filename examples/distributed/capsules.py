"""Train a routing whose input vectors, and the parameters that belong to them, are spread over processes.

The task: vectors at known places carry a class, the others are noise. With n_inp fixed every place has parameters of
its own, so the layer learns where to look. A run saves checkpoints; started again on the same folder, on any number of
processes, it goes on from the last one.

    torchrun --nproc-per-node 2 examples/distributed/capsules.py
    torchrun --nproc-per-node 4 --max-restarts 3 examples/distributed/capsules.py --data 2 --checkpoints /tmp/run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _ranks import leaving, progress, say, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from fastroute import EfficientVectorRouting
from fastroute.distributed import Checkpoints, RowShardedCapsules

CLASSES, WIDTH = 4, 16


class Model(nn.Module):
    def __init__(self, vectors: int) -> None:
        super().__init__()
        self.routing = EfficientVectorRouting(vectors, CLASSES, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [B, classes] of x [B, this rank's vectors, width]."""
        return self.routing(x)[..., 0]


def samples(step: int, group: int, batch: int, vectors: int) -> tuple[Tensor, Tensor]:
    """(x [B, vectors, width], classes [B]), the same in every process of a data-parallel group."""
    draw = torch.Generator().manual_seed(1000 * step + group)
    classes = torch.randint(CLASSES, (batch,), generator=draw)
    x = torch.randn(batch, vectors, WIDTH, generator=draw)
    x[:, ::10, :CLASSES] += 3 * F.one_hot(classes, CLASSES)[:, None]
    return x, classes


@leaving
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, of all processes together")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data", type=int, default=1, help="data-parallel groups; the others share a sample's vectors")
    parser.add_argument("--checkpoints", type=Path, help="a folder to save to, and to go on from")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    args = parser.parse_args(argv)
    device = start()
    ranks = dist.get_world_size()
    if ranks % args.data or args.batch % args.data:
        parser.error(f"--data: expected a divisor of {ranks} processes and of --batch {args.batch}, got {args.data}")
    mesh = init_device_mesh(device.type, (args.data, ranks // args.data), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(0)
    model = Model(args.vectors).to(device)
    parallelize_module(model, mesh["sequence"], {"routing": RowShardedCapsules()})
    if args.data > 1:
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    checkpoints = Checkpoints(args.checkpoints, model, optimizer) if args.checkpoints else None
    done = (checkpoints.load() or 0) if checkpoints else 0
    group, place = mesh["data"].get_local_rank(), mesh["sequence"].get_local_rank()
    of_rank = -(-args.vectors // mesh["sequence"].size())
    say(f"{ranks} processes on {device.type}, {of_rank} of {args.vectors} vectors on rank 0, from step {done}")
    hits = torch.zeros((), device=device)
    with progress() as bar:
        task = bar.add_task("training", total=args.steps, completed=done)
        for step in range(done, args.steps):
            x, classes = samples(step, group, args.batch // args.data, args.vectors)
            parts = x.chunk(mesh["sequence"].size(), 1)
            own = parts[place] if place < len(parts) else x[:, :0]
            scores = model(own.to(device))
            loss = F.cross_entropy(scores, classes.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits = 0.9 * hits + 0.1 * (scores.argmax(-1) == classes.to(device)).float().mean()
            if checkpoints and (step + 1) % args.every == 0:
                checkpoints.save(step + 1, asynchronous=True)
            bar.update(task, advance=1, description=f"loss {loss.item():.3f}")
    if checkpoints:
        checkpoints.wait()
    if args.steps > done:
        say(f"loss {loss.item():.3f}, running accuracy {hits.item():.2f} (chance: {1 / CLASSES:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
