"""``trajectory_loss``: what all decisions of a batch learn from its rewards, as one op and one gradient.

Axes: B samples, T decisions, C differentiable columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import apply, asked_again, keep_for_again, kept_for_again, own, through, transformed
from ..backends import Case, note, offer, taken, triton_refuses
from ..checks import at_least_one, flags, floating, share, shown
from . import plain
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements some of them
from .contract import AIDED as AIDED
from .contract import ALGORITHMS as ALGORITHMS
from .contract import BOOTSTRAPPING as BOOTSTRAPPING
from .contract import CRITICS as CRITICS
from .contract import FIELDS, Rows
from .contract import SILENT as SILENT
from .contract import Entry as Entry
from .reference import ByAction as ByAction
from .reference import Final as Final
from .reference import critics_target as critics_target
from .reference import loss_of as loss_of
from .reference import squared as squared

OP = "trajectory_loss"
_NUMBERS = {kind: number for number, kind in enumerate(ALGORITHMS)}


def _native_refuses(case: Case) -> str | None:
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return None if case.dtype in known else f"the C++ takes float32, float64, bfloat16 and float16, not {case.dtype}"


offer(OP, "schema", native=_native_refuses, triton=triton_refuses)


#: backend, how many columns and others, the result's dtype, layout, gamma, normalize
_Call = tuple[str, int, int, torch.dtype, Sequence[int], float, bool]


def _forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    if backend == "native":
        made: tuple[Tensor, Tensor] = torch.ops.fastroute._trajectory_loss_native(*args)
    elif backend == "triton":
        made = torch.ops.fastroute._trajectory_loss_triton(*args)
    else:
        made = plain.forward(*args)
    return made


class _TrajectoryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, call: _Call, *tensors: Tensor) -> Tensor:
        # the constants are one argument, for autograd looks at each
        backend, columns, others, dtype, layout, gamma, normalize = call
        learning, rest = tensors[:columns], tensors[columns:]
        made, slopes = _forward(backend, f, learning, rest[:others], rest[others:], layout, gamma, normalize, True)
        ctx.save_for_backward(slopes)
        ctx.native, ctx.dtypes, ctx.rest = backend == "native", [t.dtype for t in learning], len(rest)
        keep_for_again(ctx, tensors, lambda: (f, rest, layout), call)
        return own(made if made.dtype == dtype else made.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        if asked_again(grad):
            return _again(ctx, grad)
        grad = grad if grad.dtype == slopes.dtype else grad.to(slopes.dtype)
        if ctx.native:
            made = torch.ops.fastroute._trajectory_loss_native_backward(grad, slopes)
        else:
            made = plain.backward(grad, slopes)
        back = [g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        return (None, None, *back, *[None] * ctx.rest)


def _again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors, given, (_, columns, _, _, _, gamma, normalize) = kept_for_again(ctx, "trajectory_loss: a column")
    f, rest, layout = given()
    others = len(rest) - len([i for i in layout[FIELDS - 1 :: FIELDS] if i >= 0])

    def definition(*learning: Tensor) -> list[Tensor]:
        return [plain.forward(f, learning, rest[:others], rest[others:], layout, gamma, normalize, False)[0]]

    needs = ctx.needs_input_grad[2 : 2 + columns]
    return (None, None, *through(definition, tensors[:columns], needs, [grad]), *[None] * (len(tensors) - columns))


class _RewardedLoss(torch.autograd.Function):
    """(loss, f): ``_TrajectoryLoss`` that makes f and rewards of actions."""

    @staticmethod
    def forward(ctx: Any, rewards: _Rewards, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        _, columns, others, _, layout, gamma, normalize = call
        learning, rest = tensors[:columns], tensors[columns:]
        made, slopes, f = rewards.forward(learning, rest[:others], rest[others:], layout, gamma, normalize, True)
        ctx.save_for_backward(slopes)
        ctx.native, ctx.dtypes, ctx.rest = False, [t.dtype for t in learning], len(rest)
        keep_for_again(ctx, tensors, rewards.spelled_out, call)
        ctx.mark_non_differentiable(f)
        return made, f

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return _TrajectoryLoss.backward(ctx, grad)


@explained
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
    at the last one r_t, t' the sample's next decision (SurpriseLearning's y_t: gamma look_{t'} - r_t, and f at the last
    one). docs/networks.md has the formulas.

    Args:
        kinds: T names of ``ALGORITHMS``.
        s0: T tensors [B], at the action taken: log p_a, q_a or A_a. Differentiable.
        s1: T tensors [B], what the critic says: V_a, Q_a or V; read where the kind is in ``CRITICS``. Differentiable.
        aux: T tensors [B], read where the kind is in ``AIDED``: the baseline sum_k p_k V_k of REINFORCEBl1 and 2,
            w = p_a / mu_a of EGreedy*, the mean value sum_k p_k Q_k of WPL.
        own: T tensors [B] or None: the decision's own reward, as it was given.
        look: T tensors [B] or None (0): what the sample's preceding decision is to expect of this one.
        active: T tensors [B] bool or None (all): the samples that the decision was made for.
        f: [B], the final rewards.
        gamma: the discount, from 0 to 1.
        choices: K of each decision, 1 or more; REINFORCEBl2 reads it.

    What is not said to be differentiable is a constant to the loss: aux, own, look and f have no gradient.
    Everything is computed in float32, or in float64 where one of the tensors is.

    Returns:
        [B], in the dtype that f, s0, s1, aux and own promote to.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> log_p = [torch.randn(4, requires_grad=True) for _ in range(2)]  # two decisions for each of four samples
        >>> none = [None, None]
        >>> loss = fastroute.functional.trajectory_loss(
        ...     ["REINFORCE", "REINFORCE"], log_p, none, none, none, none, none, f=torch.randn(4)
        ... )
        >>> loss.shape
        torch.Size([4])
    """
    floating("f", f)
    if f.dim() != 1:
        raise ValueError(f"f: expected the final rewards [B], got {shown(f)}")
    flags(normalize=normalize)
    if not 0 <= gamma <= 1:
        share("gamma", gamma)
    T = len(kinds)
    lists = (s0, s1, aux, own, look, active, kinds if choices is None else choices)
    for name, made in zip(("s0", "s1", "aux", "own", "look", "active", "choices"), lists, strict=True):
        if len(made) != T:
            raise ValueError(f"{name}: expected one entry per decision, {T}, got {len(made)}")
    for t, K in enumerate(() if choices is None else choices):
        if type(K) is not int or K < 1:
            at_least_one(f"choices[{t}]", K)
    f = f.detach() if f.requires_grad else f
    columns, others, masks, layout = laid_out(kinds, s0, s1, aux, own, look, active, f, choices)
    widest = _promoted(f, *columns, *others)
    # bootstrapped values may have any dtype and do not influence the result's dtype
    dtype = widest if widest == f.dtype else _promoted(f, *columns, *(others[i] for i in _wide(layout)))
    if transformed():  # a forward mode's tangent sets no requires_grad
        f, others = f.detach(), [t.detach() for t in others]
        loss, _ = plain.forward(f, columns, others, masks, layout, float(gamma), bool(normalize), False)
        return loss if loss.dtype == dtype else loss.to(dtype)
    note(OP, f, B=f.shape[0], T=T)
    backend = taken(OP, f.device.type, widest)
    if torch.is_grad_enabled() and any(t.requires_grad for t in columns):
        call = backend, len(columns), len(others), dtype, layout, float(gamma), bool(normalize)
        return apply(_TrajectoryLoss, f, call, *columns, *others, *masks)
    loss, _ = _forward(backend, f, columns, others, masks, layout, float(gamma), bool(normalize), False)
    return loss if loss.dtype == dtype else loss.to(dtype)


class _Rewards:
    """What rewards are made of, as the kernel takes it: one table, of one kind, and who takes what of it."""

    def __init__(self, final: Final, own: Rows, by: Sequence[ByAction | None]) -> None:
        self.final, self._own, self._by = final, own, by
        kind = next(((b.table.dtype, b.ratio) for b in by if b is not None), None)
        inside = [b if b is not None and (b.table.dtype, b.ratio) == kind else None for b in by]
        self.ratio = None if kind is None else kind[1]
        #: the rows of own rewards that are left
        self.own = [_sum(row, b if i is None else None, final) for row, b, i in zip(own, by, inside, strict=True)]
        tables: dict[int, tuple[Tensor, int]] = {}
        #: of each decision its row of actions (-1: it has none), where its table begins and how many choices that has
        self.places: list[int] = []
        actions: list[Tensor] = []
        length = 0
        for b in inside:
            if b is None:
                self.places += (-1, 0, 0)
                continue
            if id(b.table) not in tables:
                tables[id(b.table)] = b.table, length
                length += b.table.shape[0]
            self.places += (len(actions), tables[id(b.table)][1], b.table.shape[0] - (b.ratio is not None))
            actions.append(b.actions)
        parts = [table for table, _ in tables.values()]
        self.table = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
        self.actions = None if not actions else actions[0][None] if len(actions) == 1 else torch.stack(actions)

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = *self.final, self.table, self.actions, self.places, self.ratio
        return torch.ops.fastroute._trajectory_loss_rewarded_triton(*given, *args)

    spelled_out: Callable[[], tuple[Tensor, list[Tensor], list[int]]]  #: f, others and masks, layout: without formulas

    def all_own(self) -> list[Tensor | None]:
        return [_sum(row, b, self.final) for row, b in zip(self._own, self._by, strict=True)]


def _sum(row: Tensor | None, by: ByAction | None, final: Final) -> Tensor | None:
    made = None if by is None else by.made(final.losses.dtype)
    return row if made is None else made if row is None else made + row


def makes_rewards(losses: Tensor) -> bool:
    """Whether ``rewarded_loss`` may make rewards of such losses in its kernel: a compiler has them in its own."""
    if losses.dtype != torch.float32 or torch.compiler.is_compiling() or transformed():
        return False
    if taken(OP, losses.device.type, losses.dtype) != "triton":
        return False
    from ...kernels.trajectory_loss import makes_rewards

    return makes_rewards()


def rewarded_loss(
    kinds: Sequence[str], s0: Rows, s1: Rows, aux: Rows, own: Rows, by: Sequence[ByAction | None], look: Rows,
    active: Rows, final: Final, gamma: float = 1.0, normalize: bool = True, *, choices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(``trajectory_loss``, f [B]) of rewards by their formulas: f is ``final``, ``by`` is added to ``own``."""
    losses = final.losses
    rewards = _Rewards(final, own, by)
    columns, others, masks, layout = laid_out(kinds, s0, s1, aux, rewards.own, look, active, losses, choices)
    widest = _promoted(losses, *columns, *others)
    options = float(gamma), bool(normalize)
    if taken(OP, losses.device.type, widest) != "triton":
        f = final.made()
        return trajectory_loss(kinds, s0, s1, aux, rewards.all_own(), look, active, f, *options, choices=choices), f
    note(OP, losses, B=losses.shape[0], T=len(kinds))
    if torch.is_grad_enabled() and any(t.requires_grad for t in columns):

        def spelled_out() -> tuple[Tensor, list[Tensor], list[int]]:
            _, others, masks, layout = laid_out(kinds, s0, s1, aux, rewards.all_own(), look, active, losses, choices)
            return final.made(), others + masks, layout

        rewards.spelled_out = spelled_out
        call = "triton", len(columns), len(others), losses.dtype, layout, *options
        return apply(_RewardedLoss, rewards, call, *columns, *others, *masks)
    loss, _, f = rewards.forward(columns, others, masks, layout, *options, False)
    return loss, f


def laid_out(
    kinds: Sequence[str], s0: Rows, s1: Rows, aux: Rows, own: Rows, look: Rows, active: Rows, f: Tensor,
    choices: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:  # fmt: skip
    """(columns, others, masks, layout): the tensors that are read, and where each decision's are; checked."""
    columns: list[Tensor] = []
    others: list[Tensor] = []
    masks: list[Tensor] = []
    layout: list[int] = []
    shape, device = f.shape, f.device

    def place(name: str, t: int, x: Tensor | None, into: list[Tensor], needed: bool = False) -> int:
        if x is None:
            if needed:
                raise ValueError(f"{name}[{t}]: {kinds[t]} needs it, got None")
            return -1
        if x.shape != shape:
            raise ValueError(f"{name}[{t}]: expected shape {list(shape)} (B), got {shown(x)}")
        if x.device != device:
            raise ValueError(f"{name}[{t}]: expected a tensor on {device} like f, got one on {x.device}")
        if name == "active":
            if x.dtype != torch.bool:
                raise TypeError(f"{name}[{t}]: expected bool, got {x.dtype}")
        elif not x.is_floating_point():
            if name != "own":
                floating(f"{name}[{t}]", x)
            x = x.to(f.dtype)
        into.append(x.detach() if x.requires_grad and name not in ("s0", "s1") else x)
        return len(into) - 1

    for t, kind in enumerate(kinds):
        number = _NUMBERS.get(kind)
        if number is None:
            raise ValueError(f"kinds: expected names among {', '.join(ALGORITHMS)}, got {kind!r}")
        if choices is None and kind == "REINFORCEBl2":
            raise ValueError("choices: REINFORCEBl2 needs K, the number of choices, got None")
        layout += (
            number,
            0 if choices is None else choices[t],
            place("s0", t, s0[t], columns, True) if kind != SILENT else -1,
            place("s1", t, s1[t], columns, True) if kind in CRITICS else -1,
            place("aux", t, aux[t], others, True) if kind in AIDED else -1,
            -1 if own[t] is None else place("own", t, own[t], others),
            -1 if look[t] is None or not t else place("look", t, look[t], others),  # nobody is before the first
            -1 if active[t] is None else place("active", t, active[t], masks),
        )
    return columns, others, masks, layout


def _wide(layout: Sequence[int]) -> list[int]:
    """Which of the others count for the result's dtype: aux and own."""
    return [i for i in (*layout[4::FIELDS], *layout[5::FIELDS]) if i >= 0]


def _promoted(*tensors: Tensor) -> torch.dtype:
    first, *others = {t.dtype for t in tensors}
    return functools.reduce(torch.promote_types, others, first)
