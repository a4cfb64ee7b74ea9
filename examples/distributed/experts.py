"""Train a mixture of experts whose experts are spread over processes, each with samples of its own.

The task: sixteen kinds of vectors, each with a map of its own to be learned; the gating has to find out which expert
takes which kind. Beside the expert dimension there may be a data dimension, over which experts are replicated.

    torchrun --nproc-per-node 2 examples/distributed/experts.py
    torchrun --nproc-per-node 4 examples/distributed/experts.py --data 2 --checkpoint /tmp/experts.pt

One process would load the file as it is: ``model.load_state_dict(torch.load(file, weights_only=True))``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from _ranks import progress, say, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fastroute import MoE
from fastroute.distributed import ExpertParallel, ddp, prepare, whole_state_dict

KINDS, WIDTH = 16, 32


class Model(nn.Module):
    """A residual mixture between two linear layers."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(WIDTH, hidden, experts, 2, shared_experts=1, balance_loss=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(y [B, width], the gating's loss, tokens by expert) of x [B, width]."""
        h = self.into(x)
        y, aux = self.moe(h, return_aux=True)
        return self.out(h + y), aux.loss, aux.counts


class Maps:
    """Vectors around sixteen centres, and what each kind's map makes of them."""

    def __init__(self, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.centres = 3 * torch.randn(KINDS, WIDTH, generator=draw)
        self.maps = torch.randn(KINDS, WIDTH, WIDTH, generator=draw) / WIDTH**0.5
        self.device = device

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """x and y [count, width]."""
        draw = torch.Generator().manual_seed(seed)
        kinds = torch.randint(KINDS, (count,), generator=draw)
        noise = torch.randn(count, WIDTH, generator=draw)
        y = torch.einsum("bd,bde->be", noise, self.maps[kinds])
        return (self.centres[kinds] + noise).to(self.device), y.to(self.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1024, help="samples of a step, of all processes together")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--data", type=int, default=1, help="how often the experts are there")
    parser.add_argument("--checkpoint", type=Path, help="a file for the trained weights, as one process has them")
    args = parser.parse_args(argv)
    device = start()
    ranks = dist.get_world_size()
    if args.data < 1 or ranks % args.data or args.batch % ranks:
        parser.error(f"--data, --batch: expected a divisor and a multiple of {ranks} processes")
    train(args, device)
    dist.destroy_process_group()  # after DDP has gone: see docs/distributed_experts.md
    return 0


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Make the model, train and save it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (args.data, ranks // args.data), mesh_dim_names=("data", "expert"))
    torch.manual_seed(0)
    model = Model(args.hidden, args.experts).to(device)
    parallelize_module(model, mesh["expert"], {"moe": ExpertParallel(replicas=mesh["data"])})
    wrapped = ddp(prepare(model))
    optimizer, maps = torch.optim.Adam(model.parameters(), lr=0.01), Maps(device)
    own = len(model.moe.w_down.to_local())  # type: ignore[operator]
    say(f"{ranks} processes on {device.type}, {own} of {args.experts} experts on rank 0")
    with progress() as bar:
        task = bar.add_task("training", total=args.steps)
        for step in range(args.steps):
            x, y = maps.draw(args.batch // ranks, step * ranks + rank)
            made, aux, counts = wrapped(x)
            error = (made - y).square().mean()
            optimizer.zero_grad()
            (error + aux).backward()
            optimizer.step()
            bar.update(task, advance=1, description=f"loss {error.item():.3f}")
    load = ", ".join(f"{100 * share:.0f}" for share in (counts / counts.sum()).tolist())
    say(f"loss {error.item():.3f} (predicting 0: {y.square().mean().item():.3f}); tokens by expert, %: {load}")
    if args.checkpoint is not None:
        state = whole_state_dict(model)
        if rank == 0:
            torch.save(state, args.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
