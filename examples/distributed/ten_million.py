"""Route ten million vectors with four processes, each of which never holds more than a chunk of its own.

Every process makes its vectors chunk by chunk, as one would read them from a file of its own, and streams them through
its part of the layer. Between two passes the processes add up [outputs, width + 1] numbers. The result is that of one
process to rounding, whatever the number of processes. Prints how much memory each of them took.

    torchrun --nproc-per-node 4 examples/distributed/ten_million.py
    torchrun --nproc-per-node 2 examples/distributed/ten_million.py --vectors 200000 --gradients
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from _ranks import leaving, progress, say, start
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fastroute import EfficientVectorRouting
from fastroute.distributed import RowShardedCapsules

CHUNK = 1 << 15


def chunk(number: int, vectors: int, buffer: Tensor) -> Tensor:
    """Vectors from number * CHUNK on, the same in every process; good until the next one is made in the buffer."""
    own = buffer[: min(CHUNK, vectors - number * CHUNK)]
    return own.normal_(generator=torch.Generator(buffer.device).manual_seed(number))


def megabytes() -> float:
    """The largest resident size so far (Linux), or of the GPU's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


@leaving
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--outputs", type=int, default=16)
    parser.add_argument("--gradients", action="store_true", help="of all parameters, too")
    args = parser.parse_args(argv)
    device = start()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("sequence",))
    torch.manual_seed(0)
    layer = EfficientVectorRouting(-1, args.outputs, args.width, args.width, device=device)
    parallelize_module(layer, mesh, RowShardedCapsules())
    numbers = torch.arange(-(-args.vectors // CHUNK)).tensor_split(ranks)[rank].tolist()
    own = sum(min(CHUNK, args.vectors - number * CHUNK) for number in numbers)
    buffer = torch.randn(CHUNK, args.width, device=device)
    with torch.set_grad_enabled(args.gradients):
        y = layer.stream(buffer)
        if args.gradients:
            y.sum().backward()
            layer.zero_grad()
    before = megabytes()
    passes = layer.n_iters * (2 if args.gradients else 1)
    with progress() as bar:
        task = bar.add_task("routing on rank 0", total=passes * own)

        def chunks() -> Iterator[Tensor]:
            for number in numbers:
                x = chunk(number, args.vectors, buffer)
                yield x
                bar.advance(task, len(x))

        began = time.perf_counter()
        with torch.set_grad_enabled(args.gradients):
            y = layer.stream(chunks if numbers else buffer[:0], n=own or None)
            if args.gradients:
                y.square().mean().backward()
        seconds = time.perf_counter() - began
    found = torch.tensor([own, megabytes() - before], dtype=torch.float64)
    every = [torch.empty_like(found) for _ in range(ranks)]
    dist.all_gather(every, found)
    whole = 4e-6 * args.width * max(count for count, _ in torch.stack(every).tolist())
    for number, (count, grown) in enumerate(torch.stack(every).tolist()):
        say(f"rank {number}: {count:,.0f} vectors, {grown:.0f} MB more than after the first chunk")
    say(
        f"{args.vectors:,} x {args.width} to {args.outputs} x {args.width} in {seconds:.1f} s, {passes} passes; one "
        f"rank's vectors together would take {whole:.0f} MB. First output: {y[0, :3].tolist()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
