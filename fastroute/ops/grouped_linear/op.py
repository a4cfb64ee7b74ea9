"""``grouped_linear``: linear modules over a plan's entries, one for each module, with an activation after them.

Axes: B samples, k modules that each takes, N = B k entries, K modules, F features in, O features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import eq
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, NUMBERS, TOLD_BY_VALUE
from ..arguments import explained
from ..autograd import (
    apply,
    asked_again,
    is_hooked,
    is_observed,
    keep_for_again,
    kept_for_again,
    own,
    through,
    transformed,
    without_gradient,
)
from ..backends import is_explaining, note, offer, taken
from ..checks import flags, floating, on_one_device, shown
from ..dispatch.contract import Plan, check_plan
from ..dispatch.op import finished
from ..host import on_host, read
from ..precision import autocast_dtype, autocast_off
from . import plain
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements them

OP = "grouped_linear"

_OPS = torch.ops.fastroute

offer(OP, "schema")


def _indices(
    order: Tensor, samples: Tensor | None, takes: bool, puts: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where sorted rows read x, write its gradient, and write y (see the reference): some of it may be one tensor."""
    return (order if samples is None else samples) if takes else None, order if takes else None, order if puts else None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, order: Tensor, samples: Tensor | None, offsets: Tensor, takes: bool, puts: bool,
        K: int, n_weights: int, activation: str, backend: str, bounds: list[int] | None, wants_gradients: bool,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        weights, biases = parameters[:n_weights], parameters[n_weights:]
        take, _, put = _indices(order, samples, takes or x is None, puts)
        stacked = reference.is_stacked(weights, 3) or (n_weights == 0 and len(biases) == 1 < K)
        keep = wants_gradients and activation not in TOLD_BY_VALUE
        ctx.options = takes, puts, K, n_weights, activation, backend, bounds, stacked, len(biases) > 0
        source = offsets if x is None else x  # tables are only told the rows
        if backend == "reference":
            y, kept = plain.forward(source, take, put, offsets, weights, biases, activation, keep)
        else:
            op = getattr(_OPS, f"_grouped_linear_{backend}")
            y, kept = op(source, take, put, offsets, weights, biases, NUMBERS[activation], keep)
        before = None if activation == "none" or not wants_gradients else kept if keep else y
        ctx.save_for_backward(x, order, samples, offsets, before, *weights)
        keep_for_again(ctx, biases)
        return own(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        takes, puts, K, n_weights, activation, backend, bounds, stacked, has_biases = ctx.options
        x, order, samples, offsets, kept, *weights = ctx.saved_tensors
        if asked_again(grad):
            return _again(ctx, x, order, samples, offsets, weights, grad)
        take, spread, put = _indices(order, samples, takes or x is None, puts)
        source = offsets if x is None else x
        needs = ctx.needs_input_grad
        first = 12
        wants = (
            needs[0] and n_weights > 0,
            any(needs[first : first + n_weights]),
            has_biases and any(needs[first + n_weights :]),
        )
        if backend == "reference":
            made = plain.backward(
                grad, source, take, spread, put, offsets, weights, K, wants, activation, kept, stacked
            )
        else:
            made = getattr(_OPS, f"_grouped_linear_{backend}_backward")(
                grad.contiguous(), source, take, spread, put, offsets, weights, K, *wants, NUMBERS[activation], kept,
                stacked, stacked or bounds is None,
            )  # fmt: skip
        dx, dw, db = made
        if backend == "triton" and not stacked:  # all modules' in one tensor: theirs are views of it
            dw, db = [g for t in dw for g in t], [g for t in db for g in (t if n_weights else t[:, None])]
        if wants[0] and takes and samples is not None and source.shape[0]:  # of no rows there is no sum to make
            dx = dx.view(*source.shape[:1], -1, *source.shape[1:]).sum(1)
        nothing: list[Any] = [None] * (1 if stacked else K)
        per_module = [dw if wants[1] else nothing] * (n_weights > 0) + [db if wants[2] else nothing] * has_biases
        if not stacked and bounds is not None and any(a == b for a, b in pairwise(bounds)):
            per_module = [
                [None if bounds[k] == bounds[k + 1] else g for k, g in enumerate(grads)] for grads in per_module
            ]
        return (dx if wants[0] else None, *[None] * (first - 1), *(g for grads in per_module for g in grads))


class _PlannedLinear(_GroupedLinear):
    """The same with actions in place of the order: the plan is made along, and put into ``plan``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, actions: Tensor, samples: None, plan: list[Plan], takes: bool, puts: bool, K: int,
        n_weights: int, activation: str, name: str, keep_empty: bool, wants_gradients: bool, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        weights, biases = parameters[:n_weights], parameters[n_weights:]
        keep = wants_gradients and activation not in TOLD_BY_VALUE
        op = _OPS._grouped_linear_native_planned
        y, kept, order, offsets, beyond = op(x, actions, weights, biases, NUMBERS[activation], keep)
        plan.append(finished(order, offsets, beyond, K, name, bounds=read(offsets)))
        before = None if activation == "none" or not wants_gradients else kept if keep else y
        bounds, stacked = None if keep_empty else plan[0].bounds, reference.is_stacked(weights, 3)
        ctx.options = True, True, K, n_weights, activation, "native", bounds, stacked, len(biases) > 0
        ctx.save_for_backward(x, order, None, offsets, before, *weights)
        keep_for_again(ctx, biases)
        return y


def _again(
    ctx: Any, x: Tensor | None, order: Tensor, samples: Tensor | None, offsets: Tensor, weights: Sequence[Tensor],
    grad: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    takes, puts, _, n_weights, activation, _, bounds, _, _ = ctx.options
    (biases,) = kept_for_again(ctx, "grouped_linear: a bias")

    def plain(x: Tensor | None, *parameters: Tensor) -> list[Tensor]:
        w, b = parameters[:n_weights], parameters[n_weights:]
        return [reference.of_sorted(x, order, samples, offsets, bounds, w, b, activation, takes, puts)]

    needs = ctx.needs_input_grad
    with autocast_off(grad.device.type):
        dx, *rest = through(plain, (x, *weights, *biases), (needs[0], *needs[12:]), [grad])
    return (dx, *[None] * 11, *rest)


def _rows(x: Tensor, plan: Plan, width: int, is_sorted: bool, keep_sorted: bool) -> Tensor:
    """x, if it is what the modules take, with dense rows."""
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x: expected [N, {width}], as the modules take, got {shown(x)}")
    N = plan.order.shape[0]
    expected = N if is_sorted else N // plan.per_sample
    if not (is_sorted and keep_sorted) and x.shape[0] != expected:  # sorted rows may be many for each of the plan's
        raise ValueError(f"x: expected the plan's {expected} rows, got {shown(x)}")
    return x.contiguous() if x.shape[1] > 1 and x.stride(1) != 1 else x


def _resolved(given: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    """A list of tensors whose memory holds their numbers: the dispatcher looks at no tensor in a list."""
    given = (given,) if isinstance(given, Tensor) else given
    if torch.compiler.is_compiling() or not any(map(Tensor.is_neg, given)):
        return given
    return [t.resolve_neg() for t in given]


def parameters_of(
    weights: Sequence[Tensor] | Tensor, biases: Sequence[Tensor] | Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor], int, int, int]:
    """(weights, biases, K, O, F), a stacked tensor as a list of one."""
    weights, biases = _resolved(weights), _resolved(biases)
    if not weights and not biases:
        raise ValueError("weights: expected one of each module (or biases alone), got neither")
    if not weights:
        return weights, biases, biases[0].shape[0] if len(biases) == 1 else len(biases), biases[0].shape[-1], 0
    first = weights[0]
    stacked = reference.is_stacked(weights, 3)
    if first.dim() != 2 and not stacked:
        raise ValueError(f"weights: expected K tensors [O, F] or one [K, O, F], got {shown(first)}")
    K, (O, F) = first.shape[0] if stacked else len(weights), first.shape[-2:]
    if biases and stacked and (len(biases) != 1 or biases[0].shape != (K, O)):
        raise ValueError(f"biases: expected one tensor [{K}, {O}], as weights are stacked, got {shown(biases[0])}")
    if biases and not stacked and (len(biases) != K or biases[0].shape != (O,)):
        raise ValueError(
            f"biases: expected {K} tensors [{O}], one for each weight, got {len(biases)} {shown(biases[0])}"
        )
    return weights, biases, K, O, F


def _is_a_plan(
    x: Tensor | None, plan: Plan, *_: Any, is_sorted: bool = False, keep_sorted: bool = False, **__: Any
) -> None:
    rows = plan.order.shape[0] if x is None or not is_sorted else x.shape[0]
    check_plan(None if is_sorted and keep_sorted else plan.order, plan.offsets, rows)
    of = [] if x is None or is_sorted or plan.samples is None else on_host(plan.samples)
    if x is not None and of and (min(of) < 0 or max(of) >= x.shape[0]):
        raise ValueError(f"plan: expected samples from 0 to {x.shape[0] - 1}, got {min(of)} to {max(of)}")


@explained(also=_is_a_plan)
def grouped_linear(
    x: Tensor | None,
    plan: Plan,
    weights: Sequence[Tensor] | Tensor,
    biases: Sequence[Tensor] | Tensor = (),
    *,
    activation: str = "none",
    is_sorted: bool = False,
    keep_sorted: bool = False,
    keep_empty: bool = False,
) -> Tensor:
    """One linear module per entry: y_n = act(W_k x_b + b_k), k the module that the plan gives entry n, b its sample.

    Entries that the plan drops are zero, and so is their gradient. With no ``weights``, y_n = b_k: a row of a table.

    Args:
        x: [B, F] float32, float64, bfloat16 (or, on the reference backend, any floating dtype), any row stride. Not
            looked at without weights, and may be None then.
        plan: from :func:`dispatch.plan`.
        weights: K tensors [O, F] in x's dtype, each a parameter of its own; or all of them in one, [K, O, F]; or none.
        biases: K tensors [O], or none; one tensor [K, O] with stacked weights; without weights K tensors [1, O], or one
            [K, O].
        activation: "none", "relu", "tanh", "sigmoid", "silu", "gelu" or "gelu_tanh".
        is_sorted: x [N, F] has a row per entry already, in the plan's order.
        keep_sorted: leave y in the plan's order; otherwise rows are those of the actions, sample by sample.
        keep_empty: give modules without an entry zeros as gradients, not None. (On a GPU and under torch.compile, where
            counts are not read, and with stacked weights they always get zeros.)

    Returns:
        y [N, O], contiguous. Sums are accumulated in float32 for half precision. A second derivative and torch.func go
        through plain PyTorch.

    Raises:
        ValueError, TypeError: naming the argument: x is not of the plan's rows, or not of the modules' width or dtype;
            a plan made by hand is none (on a GPU its rows are zero then).

    Examples:
        >>> x, actions = torch.randn(5, 8), torch.tensor([0, 2, 2, -1, 0])  # nobody takes module 1, sample 3 takes none
        >>> plan = fastroute.ops.dispatch.plan(actions, 3)
        >>> weights = [torch.randn(4, 8) for _ in range(3)]
        >>> y = fastroute.functional.grouped_linear(x, plan, weights)
        >>> torch.allclose(y[1], weights[2] @ x[1], atol=1e-5), y[3].tolist()
        (True, [0.0, 0.0, 0.0, 0.0])
    """
    flags(is_sorted=is_sorted, keep_sorted=keep_sorted, keep_empty=keep_empty)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    weights, biases, K, _, F = parameters_of(weights, biases)
    like = (*weights, *biases)[0]
    if weights:
        floating("weights", like)
    casts = x is not None and x.dtype != torch.float64 and autocast_dtype(like.device.type) is not None
    for p in () if casts and weights else (*weights, *biases):
        if p.dtype != like.dtype:
            raise TypeError(f"weights, biases: expected one dtype, got {like.dtype} and {p.dtype}")
    if not weights:
        if activation != "none":
            raise ValueError(f"activation: a table is read as it is, got {activation!r}")
    elif x is None:
        raise ValueError("x: expected a tensor [N, F] to multiply, got None")
    return of_alike(x if weights else None, plan, weights, biases, K, F, activation, is_sorted, keep_sorted, keep_empty)


#: With more parameters a call's fixed cost is not what counts: 1.15x at 8, 1.05x at 64, 0.5 to 1.0x at 400
#: (``bench/calibrate_thresholds.py``, AMD EPYC).
MOST_PLANNED = 64


def planned(
    x: Tensor, actions: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], K: int, activation: str,
    keep_empty: bool, name: str = "actions",
) -> tuple[Tensor, Plan] | None:  # fmt: skip
    """:func:`of_alike` of rows whose modules are named by actions [N] int64, and the plan of these: one call of C++.

    None where it takes more: another backend, a cast, a trace, gradients of hooked parameters.
    """
    like, parameters = weights[0], (*weights, *biases)
    simple = (
        x.is_cpu
        and x.dim() == 2
        and x.dtype == like.dtype == parameters[-1].dtype
        and x.shape == (actions.shape[0], like.shape[-1])
        and (x.shape[1] < 2 or x.stride(1) == 1)
        and len(parameters) <= MOST_PLANNED
        and not is_observed(x, actions)
        and not is_explaining()
        and autocast_dtype("cpu") is None
    )
    if not simple or taken(OP, "cpu", x.dtype) != "native":
        return None
    if not torch.is_grad_enabled():
        op = _OPS._grouped_linear_native_planned
        y, _, order, offsets, beyond = op(x, actions, weights, biases, NUMBERS[activation], False)
        return y, finished(order, offsets, beyond, K, name, bounds=read(offsets))
    if any(map(is_hooked, parameters)):
        return None
    plan: list[Plan] = []
    options = K, len(weights), activation, name, keep_empty, True
    y = apply(_PlannedLinear, x, actions, None, plan, True, True, *options, *parameters)
    return y, plan[0]


#: Modules, and such without an entry, from which on it is worth while to leave these out: an idle leaf of a graph costs
#: 2 us in a backward pass.
_MANY, _MANY_IDLE = 32, 8


def _of_chosen(
    x: Tensor | None, plan: Plan, bounds: list[int], weights: Sequence[Tensor], biases: Sequence[Tensor], K: int
) -> tuple[Plan, Sequence[Tensor], Sequence[Tensor], int]:
    """The same of the modules that have entries, where many have none; their parameters' gradients are None either way.

    All stay in the graph where the result would have no gradient without them, and in distributed training, where
    DistributedDataParallel waits for each parameter's node.
    """
    each_its_own = len(weights) in (0, K) and len(biases) in (0, K)
    if not each_its_own or not _MANY_IDLE <= sum(map(eq, bounds, bounds[1:])) < K:
        return plan, weights, biases, K
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return plan, weights, biases, K
    chosen = [k for k in range(K) if bounds[k] < bounds[k + 1]]
    kept_weights, kept_biases = ([given[k] for k in chosen] if given else given for given in (weights, biases))
    if torch.is_grad_enabled() and not (x is not None and x.requires_grad):
        learns = [any(p.requires_grad for p in some) for some in ((*kept_weights, *kept_biases), (*weights, *biases))]
        if learns[0] != learns[1]:
            return plan, weights, biases, K
    kept_bounds = [*(bounds[k] for k in chosen), bounds[K]]
    offsets = torch.tensor(kept_bounds, dtype=plan.offsets.dtype, device=plan.offsets.device)
    return plan._replace(offsets=offsets, bounds=kept_bounds), kept_weights, kept_biases, len(chosen)


def of_alike(
    x: Tensor | None, plan: Plan, weights: Sequence[Tensor], biases: Sequence[Tensor], K: int, F: int, activation: str,
    is_sorted: bool, keep_sorted: bool, keep_empty: bool,
) -> Tensor:  # fmt: skip
    """:func:`grouped_linear` with parameters that are known to fit together; x is None if these are tables."""
    if plan.offsets.shape[0] != K + 1:
        raise ValueError(f"plan: expected one of {K} modules, got one of {plan.offsets.shape[0] - 1}")
    if not keep_empty and plan.bounds is not None and K >= _MANY and not is_explaining():
        plan, weights, biases, K = _of_chosen(x, plan, plan.bounds, weights, biases, K)
    parameters = (*weights, *biases)
    like = parameters[0]
    if x is not None:
        x = _rows(x, plan, F, is_sorted, keep_sorted)
        autocast = autocast_dtype(x.device.type)
        if autocast is not None and x.dtype != torch.float64:
            x, parameters = x.to(autocast), tuple(p.to(autocast) for p in parameters)
            like = parameters[0]
        for p in (like, parameters[-1]):
            if p.dtype != x.dtype:
                raise TypeError(f"x: expected the modules' dtype {p.dtype}, got {x.dtype}")
            on_one_device(x, p)
    if transformed():
        w, b = parameters[: len(weights)], parameters[len(weights) :]
        rest = activation, not is_sorted, not keep_sorted
        with autocast_off(like.device.type):
            return reference.of_sorted(x, plan.order, plan.samples, plan.offsets, plan.bounds, w, b, *rest)
    note(OP, like, N=plan.order.shape[0] if x is None else x.shape[0], K=K, F=F, O=like.shape[-2 if weights else -1])
    backend = taken(OP, like.device.type, like.dtype)
    if not keep_empty and len(parameters) >= K:  # each its own
        parameters = without_gradient(parameters, plan.bounds)
    made: Tensor = apply(
        _GroupedLinear,
        x,
        plan.order,
        plan.samples,
        plan.offsets,
        not is_sorted,
        not keep_sorted,
        K,
        len(weights),
        activation,
        backend,
        None if keep_empty else plan.bounds,
        torch.is_grad_enabled(),
        *parameters,
    )
    return made
