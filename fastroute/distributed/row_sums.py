"""Sums over input vectors that several processes have, with gradients; which of them a process has.

Axes: n input vectors in all, k of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..ops.backends import is_strict


def all_reduce(t: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """The sum over ranks, without a gradient."""
    try:
        made: Tensor = funcol.wait_tensor(funcol.all_reduce(t.contiguous(), "sum", group))
    except RuntimeError as error:
        if torch.compiler.is_compiling():
            raise
        raise RuntimeError(
            f"RowShardedCapsules: the all-reduce of {what} over ranks {dist.get_process_group_ranks(group)} failed; "
            f"has one of them ended? {error}"
        ) from error
    return made


class Sum(torch.autograd.Function):
    """The sum over ranks of what each has; its gradient is the same on all ranks, and each rank's own."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return all_reduce(t, group, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Shared.apply(grad, ctx.group, ctx.what), None, None


class Shared(torch.autograd.Function):
    """What is the same on all ranks, where each begins to compute from it what is its own: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.group, ctx.what = group, what
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return Sum.apply(grad, ctx.group, ctx.what), None, None


def shared(t: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """See :class:`Shared`; sums are in at least float32."""
    acc = torch.promote_types(t.dtype, torch.float32)
    made: Tensor = Shared.apply(t.to(acc), group, what)
    return made.to(t.dtype)


def total(
    *parts: Tensor, group: dist.ProcessGroup, what: str = "the moments M and p", trains: bool = False
) -> tuple[Tensor, ...]:
    """The sums over ranks, in one all-reduce. ``trains``: a gradient comes back on all ranks, wherever it goes to."""
    flat = torch.cat([t.flatten() for t in parts]) if len(parts) > 1 else parts[0].flatten()
    if trains and not flat.requires_grad and not torch.compiler.is_compiling():
        flat = flat.detach().requires_grad_()
    summed = Sum.apply(flat, group, what)
    return tuple(s.view(t.shape) for s, t in zip(summed.split([t.numel() for t in parts]), parts, strict=True))


def shared_by_rows(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Parameters of one dtype that all input vectors share: their gradients are summed in one all-reduce."""
    flat = shared(
        torch.cat([t.flatten() for t in parameters]), group, "the gradients of parameters that all input vectors share"
    )
    return [s.view(t.shape) for s, t in zip(flat.split([t.numel() for t in parameters]), parameters, strict=True)]


def local(t: Any) -> Any:
    """A DTensor's own part; anything else as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


class Rows(NamedTuple):
    """Which input vectors a rank has."""

    mesh: DeviceMesh
    input_layout: Placement
    output_layout: Placement
    use_local_output: bool

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    def of(self, n: int) -> tuple[int, int]:
        """(start, count) among n, as ``torch.chunk`` and DTensor's ``Shard`` cut them: the last ranks may have none."""
        size = -(-n // self.ranks)
        start = min(self.mesh.get_local_rank() * size, n)
        return start, min(size, n - start)

    def places(self, n: int | None, k: int, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
        """(how many vectors there are in all, how many are before this rank's k); n None: the ranks ask each other."""
        if n is not None:
            return n, self.of(n)[0]
        own = torch.full((1,), k, dtype=torch.int64, device=device)
        gather = torch.ops._c10d_functional.all_gather_into_tensor  # whose wrapper has two names in torch 2.11 to 2.13
        counts = funcol.wait_tensor(gather(own, self.ranks, self.group.group_name))
        return counts.sum(), counts[: self.mesh.get_local_rank()].sum()


def told(layer: nn.Module, rows: Rows, given: Mapping[str, Tensor]) -> dict[str, object]:
    """What else ranks compare: frozen parameters; under ``strict`` inputs that are said to be the same everywhere."""
    frozen = [name for name, p in layer.named_parameters() if not p.requires_grad]
    same = isinstance(rows.input_layout, Replicate) and is_strict()
    return {"frozen": frozen, **{k: t for k, t in given.items() if same and not isinstance(t, DTensor)}}


def along(layout: Placement, dims: int, axis: int | None = None) -> Placement:
    """A layout of a tensor with so many axes; ``axis``: where a ``Shard`` of outputs is, whatever the tensor."""
    if isinstance(layout, Shard) and layout.dim not in (-2, dims - 2 if axis is None else -2):
        raise ValueError(f"output_layouts: expected Shard(-2), the axis of outputs, or Replicate(), got {layout}")
    return Shard((layout.dim if axis is None else axis) % dims) if isinstance(layout, Shard) else layout


def own_mask(mask: Tensor) -> Tensor:
    """A DTensor's local part if it has some vectors of each sample, else all of it."""
    if not isinstance(mask, DTensor):
        return mask
    return mask.to_local() if mask.placements == (Shard(mask.dim() - 2),) else mask.full_tensor()
