"""``trajectory_loss``: what all decisions of a batch learn from its rewards, as one op and one gradient.

Axes: B samples, T decisions, C differentiable columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import trajectory_loss as reference
from ..reference.trajectory_loss import AIDED as AIDED
from ..reference.trajectory_loss import BOOTSTRAPPING as BOOTSTRAPPING
from ..reference.trajectory_loss import CRITICS as CRITICS
from ..reference.trajectory_loss import KINDS as KINDS
from ..reference.trajectory_loss import SILENT as SILENT
from ..reference.trajectory_loss import Decisions, Rows, laid_out
from . import _native_trajectory_loss as _native_trajectory_loss  # defines the native and the triton ops
from ._backends import BackendName, Case, decide, interpreting, note, offer, requested
from ._checks import floating, shape, shown, together

OP = "trajectory_loss"
MAX_DECISIONS = 32  #: of the Triton kernel, which is written out for each of them


def _native_refuses(case: Case) -> str | None:
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return None if case.dtype in known else f"the C++ takes float32, float64, bfloat16 and float16, not {case.dtype}"


def _triton_refuses(case: Case) -> str | None:
    if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the triton kernel takes float32, bfloat16 and float16, not {str(case.dtype).removeprefix('torch.')}"
    if (T := dict(case.sizes).get("T", 1)) > MAX_DECISIONS:
        return f"the triton kernel is written out for each decision: at most {MAX_DECISIONS}, not {T}"
    return None


offer(OP, "native", "fastroute.ops._native_trajectory_loss", _native_refuses)
offer(OP, "reference", "fastroute.reference.trajectory_loss", lambda case: None)
offer(OP, "triton", "fastroute.kernels.trajectory_loss", _triton_refuses)


@functools.cache
def _decided(device: str, dtype: torch.dtype, T: int, request: str, interpreted: bool) -> BackendName:
    return decide(Case(OP, device, dtype, (("T", T),)), request).backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend(device: str, dtype: torch.dtype, T: int) -> BackendName:
    return _decided(device, dtype, T, requested(), interpreting())


def _forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    if backend == "native":
        made: tuple[Tensor, Tensor] = torch.ops.fastroute._trajectory_loss_native(*args)
    elif backend == "triton":
        made = torch.ops.fastroute._trajectory_loss_triton(*args)
    else:
        made = reference.forward(*args)
    return made


class _TrajectoryLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, f: Tensor, layout: Sequence[int], gamma: float, normalize: bool, backend: str, dtype: torch.dtype,
        columns: int, others: int, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        learning, rest = tensors[:columns], tensors[columns:]
        made, slopes = _forward(backend, f, learning, rest[:others], rest[others:], layout, gamma, normalize, True)
        ctx.save_for_backward(slopes)
        ctx.native, ctx.dtypes, ctx.rest = backend == "native", [t.dtype for t in learning], len(rest)
        return made if made.dtype == dtype else made.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        grad = grad if grad.dtype == slopes.dtype else grad.to(slopes.dtype)
        if ctx.native:
            made = torch.ops.fastroute._trajectory_loss_native_backward(grad, slopes)
        else:
            made = reference.backward(grad, slopes)
        back = [g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        return (*[None] * 8, *back, *[None] * ctx.rest)


def trajectory_loss(
    kinds: Sequence[str],
    s0: Rows,
    s1: Rows,
    aux: Rows,
    own: Rows,
    look: Rows,
    active: Rows,
    f: Tensor,
    gamma: float = 1.0,
    normalize: bool = True,
    *,
    choices: Sequence[int] | None = None,
) -> Tensor:
    """The routing loss of every sample: the sum, over its decisions, of what their classes define.

    A decision's reward is r_t = own_t / T_b (times \\|f\\| if ``normalize``), the sample's last one's that plus f, T_b
    being how many of the decisions were made for the sample; R_t = r_t + gamma R_{t'}, y_t = r_t + gamma look_{t'} and
    at the last one r_t, t' the sample's next decision. docs/networks.md has the formulas.

    Args:
        kinds: T names of ``KINDS``.
        s0: T tensors [B], at the action taken: log p_a, q_a or A_a. Differentiable.
        s1: T tensors [B], what the critic says: V_a, Q_a or V; read where the kind is in ``CRITICS``. Differentiable.
        aux: T tensors [B], read where the kind is in ``AIDED``: the baseline sum_k p_k V_k of REINFORCEBl1 and 2,
            w = p_a / mu_a of EGreedy*, the mean value sum_k p_k Q_k of WPL.
        own: T tensors [B] or None: the decision's own reward, as it was given.
        look: T tensors [B] or None (0): what the sample's preceding decision is to expect of this one.
        active: T tensors [B] bool or None (all): the samples that the decision was made for.
        f: [B], the final rewards.
        gamma: the discount.
        choices: K of each decision; REINFORCEBl2 reads it.

    Everything is computed in float32, or in float64 where one of the tensors is.

    Returns:
        [B], in the dtype that f, s0, s1, aux and own promote to.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    floating("f", f)
    if f.dim() != 1:
        raise ValueError(f"f: expected the final rewards [B], got {shown(f)}")
    T, B, f = len(kinds), f.shape[0], f.detach() if f.requires_grad else f
    lists = {"s0": s0, "s1": s1, "aux": aux, "own": own, "look": look, "active": active}
    for name, made in (*lists.items(), *(() if choices is None else (("choices", choices),))):
        if len(made) != T:
            raise ValueError(f"{name}: expected one entry per decision, {T}, got {len(made)}")
    rows: list[list[Tensor | None]] = [list(made) for made in lists.values()]
    for t, kind in enumerate(kinds):
        if kind not in KINDS:
            raise ValueError(f"kinds: expected names among {', '.join(KINDS)}, got {kind!r}")
        read = (kind != SILENT, kind in CRITICS, kind in AIDED, True, t > 0, True)
        for name, row, wanted in zip(lists, rows, read, strict=True):
            row[t] = _checked(f"{name}[{t}]", row[t], wanted, f, B, kind if name in ("s0", "s1", "aux") else "")
        if kind == "REINFORCEBl2" and choices is None:
            raise ValueError("choices: REINFORCEBl2 needs K, the number of choices, got None")
    columns, others, masks, layout = laid_out(Decisions(kinds, choices or [0] * T, *rows))
    dtype = _promoted(f, *columns, *(t for row in rows[2:4] for t in row if t is not None))
    widest = _promoted(f, *columns, *others)
    note(OP, f, B=B, T=T)
    backend = _backend(f.device.type, widest, T)
    gamma, normalize = float(gamma), bool(normalize)
    if torch.is_grad_enabled() and any(t.requires_grad for t in columns):
        made_: Tensor = _TrajectoryLoss.apply(
            f, layout, gamma, normalize, backend, dtype, len(columns), len(others), *columns, *others, *masks
        )
        return made_
    loss, _ = _forward(backend, f, columns, others, masks, layout, gamma, normalize, False)
    return loss if loss.dtype == dtype else loss.to(dtype)


def _promoted(*tensors: Tensor) -> torch.dtype:
    first, *others = {t.dtype for t in tensors}
    return functools.reduce(torch.promote_types, others, first)


def _checked(name: str, t: Tensor | None, wanted: bool, f: Tensor, B: int, needed_by: str) -> Tensor | None:
    """The tensor if it is read, without gradient unless it is a column; needed ones must be there."""
    if not wanted:
        return None
    if t is None:
        if needed_by:
            raise ValueError(f"{name}: {needed_by} needs it, got None")
        return None
    shape(name, t, (B,), "B")
    together(("f", f), {name: t})
    if name.startswith("active"):
        if t.dtype != torch.bool:
            raise TypeError(f"{name}: expected bool, got {t.dtype}")
        return t
    if not t.is_floating_point():
        if not name.startswith("own"):
            floating(name, t)
        t = t.to(f.dtype)
    return t.detach() if t.requires_grad and name[:2] not in ("s0", "s1") else t
