"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: two for each multiplication and addition of the
products in their definitions, as for PyTorch's own. Without formulas it counts nothing, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _compiled_dispatch as _compiled_dispatch  # these define the ops
from . import _compiled_policy as _compiled_policy
from .efficient_routing import efficient_routing as _efficient_routing  # noqa: F401
from .expert_ffn import expert_ffn as _expert_ffn  # noqa: F401
from .matrix_routing import matrix_routing as _matrix_routing  # noqa: F401
from .soft_assignment import soft_assignment as _soft_assignment  # noqa: F401
from .vector_routing import vector_routing as _vector_routing  # noqa: F401

Shape = Sequence[int]


def _counts(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For ops of these names."""
    decorate: Callable[..., Any] = register_flop_formula([getattr(torch.ops.fastroute, name) for name in names])
    return decorate


def _compiled(name: str) -> tuple[str, str]:
    return name.format("native"), name.format("triton")


def _efficient(x: Shape, shapes: Sequence[Any], n_iters: int) -> int:
    """Scores after the first iteration, sums over inputs in each, betas that are linear; then outputs, predictions."""
    (B, n, d), m, h, linear = x, int(shapes[2][0]), int(shapes[3][1]), shapes[12] is not None
    return 2 * B * m * d * (n * (2 * n_iters - 1 + 2 * linear) + h * (2 * n_iters - 1))


@_counts("efficient_routing")
def _(x: Shape, *rest: Any, **_: Any) -> int:
    return _efficient(x, rest, rest[17])


@_counts("efficient_routing_backward")
def _(x: Shape, *rest: Any, **_: Any) -> int:
    return 2 * _efficient(x, rest, rest[17])


def _vector(x: Shape, pred: Shape | None, use: Shape, use_bias: Shape | None) -> int:
    B, n, d = x
    m = use[0] if use_bias is not None else use[1]
    return 2 * B * n * m * d * (1 + (pred is not None) + 2 * (use_bias is not None))


@_counts("vector_routing")
def _(x: Shape, gate: Shape, pred: Shape | None, *rest: Any, **_: Any) -> int:
    return _vector(x, pred, rest[2], rest[4])


@_counts("vector_routing_backward")
def _(x: Shape, gate: Shape, pred: Shape | None, *rest: Any, **_: Any) -> int:
    return 2 * _vector(x, pred, rest[2], rest[4])


def _matrix(mu_inp: Shape, W: Shape) -> int:
    (B, n, c, d), (_, m, _, h) = mu_inp, W
    return 2 * B * n * m * c * d * h


@_counts("matrix_routing")
def _(a_inp: Shape, mu_inp: Shape, W: Shape, *_: Any, **__: Any) -> int:
    return _matrix(mu_inp, W)


@_counts("matrix_routing_backward")
def _(a_inp: Shape, mu_inp: Shape, W: Shape, *_: Any, **__: Any) -> int:
    return 2 * _matrix(mu_inp, W)


def _assignment(votes: Shape, scores: Shape | None, gate: Shape | None, prior: Shape | None) -> int:
    B, n = (scores or gate or ())[:2]
    m = scores[2] if scores is not None else (prior or (0,))[0]
    return 2 * B * n * m * votes[3]


@_counts("soft_assignment")
def _(
    votes: Shape, scores: Shape | None, gate: Shape | None, use: Any, ign: Any, prior: Any, *_: Any, **__: Any
) -> int:
    return _assignment(votes, scores, gate, prior)


@_counts("soft_assignment_backward")
def _(
    votes: Shape, scores: Shape | None, gate: Shape | None, use: Any, ign: Any, prior: Any, *_: Any, **__: Any
) -> int:
    return 2 * _assignment(votes, scores, gate, prior)


def _ffn(order: Shape, w_in: Shape, w_out: Shape) -> tuple[int, int]:
    """Of the two products."""
    return 2 * order[0] * w_in[1] * w_in[2], 2 * order[0] * w_out[1] * w_out[2]


@_counts("expert_ffn")
def _(x: Shape, order: Shape, offsets: Shape, weights: Any, w_in: Shape, w_out: Shape, *_: Any, **__: Any) -> int:
    return sum(_ffn(order, w_in, w_out))


@_counts("expert_ffn_backward")
def _(x: Shape, order: Shape, offsets: Shape, weights: Any, w_in: Shape, w_out: Shape, *_: Any, **__: Any) -> int:
    inside, outside = _ffn(order, w_in, w_out)
    return 3 * inside + 2 * outside  # the hidden layer is made a second time


def _linear(rows: int, weights: Sequence[Shape]) -> int:
    return 2 * rows * weights[0][-1] * weights[0][-2] if weights else 0


@_counts(*_compiled("_grouped_linear_{}"))
def _(x: Shape, take: Shape | None, put: Any, offsets: Any, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _linear((x if take is None else take)[0], weights)


@_counts(*_compiled("_grouped_linear_{}_backward"))
def _(
    grad: Shape, x: Any, take: Any, spread: Any, put: Any, offsets: Any, weights: Sequence[Shape], modules: int,
    want_x: bool, want_weights: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _linear(grad[0], weights) * (want_x + want_weights)


@_counts(*_compiled("_agent_policy_{}"))
def _(x: Shape | None, order: Any, offsets: Any, weights: Any, biases: Any, critics: Any, *_: Any, **__: Any) -> int:
    return 0 if x is None else _linear(x[0], weights) + _linear(x[0], critics)


@_counts(*_compiled("_agent_policy_{}_backward"))
def _(*args: Any, **_: Any) -> int:
    x, weights, critics, want_x, wants = args[6], args[9], args[10], args[15], args[16:20]
    if x is None:
        return 0
    made: int = _linear(x[0], weights) * (want_x + wants[0]) + _linear(x[0], critics) * (want_x + wants[2])
    return made
