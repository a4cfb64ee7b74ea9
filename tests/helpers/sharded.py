"""Two processes that train every layer together: ``python -m tests.helpers.sharded RANK FILE``, FILE for both to meet.

Prints what went wrong, as JSON: {column: {layer: error}}. Each process has samples of its own; expected are the weights
of one process that takes the mean of both losses.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.layers import LAYERS, LayerCase, rand
from tests.helpers.matrix import tried
from tests.test_works_with import outputs

SIZE = 2


def of_rank(case: LayerCase, rank: int) -> LayerCase:
    inputs = [t + 0.1 * rand(*t.shape, seed=50 + rank) for t in case.inputs]
    return LayerCase(case.build, *inputs, rest=case.rest, **case.options)


def train(layer: nn.Module, parts: Sequence[LayerCase]) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        for part in parts:
            loss = sum(t.square().mean() for t in outputs(layer, part))
            (loss / len(parts)).backward()  # type: ignore[union-attr]
        optimizer.step()


def ddp(layer: nn.Module) -> nn.Module:
    return DistributedDataParallel(layer, find_unused_parameters=True)


def fsdp(layer: nn.Module) -> nn.Module:
    return fully_shard(layer, mesh=init_device_mesh("cpu", (SIZE,)))  # type: ignore[return-value]


def whole(p: Tensor) -> Tensor:
    made: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p  # type: ignore[operator]
    return made.detach()


def agrees(case: LayerCase, rank: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    alone = case.layer()
    train(alone, [of_rank(case, r) for r in range(SIZE)])
    layer = case.layer()
    train(wrap(layer), [of_rank(case, rank)])
    for (name, p), q in zip(alone.named_parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(
            whole(q), p.detach(), rtol=1e-10, atol=1e-12, msg=lambda said, name=name: name + said
        )


def main(rank: int, file: str) -> None:
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=SIZE)
    failed: dict[str, Any] = {"DDP": {}, "FSDP2": {}}
    for column, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        for name in tried(column):
            try:
                agrees(LAYERS[name], rank, wrap)
            except Exception as error:  # of both processes alike, or the other one waits until its time is over
                failed[column][name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
