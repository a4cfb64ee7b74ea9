"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops: two for each multiplication and addition of the
products in their definitions, as for PyTorch's own. Without formulas it counts nothing, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..importing import when_imported
from . import agent_policy as agent_policy
from . import efficient_routing as efficient_routing
from . import expert_ffn as expert_ffn
from . import grouped_linear as grouped_linear
from . import matrix_routing as matrix_routing
from . import soft_assignment as soft_assignment
from . import vector_routing as vector_routing

Shape = Sequence[int]


#: By op.
_formulas: dict[str, Callable[..., int]] = {}


def _counts(name: str, backward: bool = True) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For an op of this name; its backward pass has two products for each one."""

    def register(count: Callable[..., int]) -> Callable[..., int]:
        def twice(*args: Any, **options: Any) -> int:
            return 2 * count(*args, **options)

        _formulas[name] = count
        if backward:
            _formulas[f"{name}_backward"] = twice
        return count

    return register


def _compiled(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For the ops of both compiled backends."""

    def register(count: Callable[..., int]) -> Callable[..., int]:
        _formulas.update({name.format(backend): count for backend in ("native", "triton")})
        return count

    return register


@_counts("efficient_routing")
@_counts("_efficient_routing_native")
def _(x: Shape, *rest: Any, **_: Any) -> int:
    """Scores after the first iteration, sums over inputs in each, betas that are linear; then outputs, predictions."""
    (B, n, d), m, h, linear, n_iters = x, int(rest[2][0]), int(rest[3][1]), rest[12] is not None, int(rest[17])
    return 2 * B * m * d * (n * (2 * n_iters - 1 + 2 * linear) + h * (2 * n_iters - 1))


@_counts("vector_routing")
def _(x: Shape, gate: Shape, pred: Shape | None, *rest: Any, **_: Any) -> int:
    (B, n, d), use, linear = x, rest[2], rest[4] is not None
    return 2 * B * n * int(use[0] if linear else use[1]) * d * (1 + (pred is not None) + 2 * linear)


@_counts("matrix_routing")
def _(a_inp: Shape, mu_inp: Shape, W: Shape, *_: Any, **__: Any) -> int:
    (B, n, c, d), (_n, m, _d, h) = mu_inp, W
    return 2 * B * n * m * c * d * h


@_counts("soft_assignment")
def _(
    votes: Shape, scores: Shape | None, gate: Shape | None, use: Any, ign: Any, prior: Any, *_: Any, **__: Any
) -> int:
    B, n = (scores or gate or ())[:2]
    return 2 * B * n * int(scores[2] if scores is not None else prior[0]) * votes[3]


def _ffn(order: Shape, w_in: Shape, w_out: Shape) -> tuple[int, int]:
    """Of the two products."""
    return 2 * order[0] * w_in[1] * w_in[2], 2 * order[0] * w_out[1] * w_out[2]


@_counts("expert_ffn", backward=False)
def _(x: Shape, order: Shape, offsets: Shape, weights: Any, w_in: Shape, w_out: Shape, *_: Any, **__: Any) -> int:
    return sum(_ffn(order, w_in, w_out))


@_counts("expert_ffn_backward", backward=False)
def _(x: Shape, order: Shape, offsets: Shape, weights: Any, w_in: Shape, w_out: Shape, *_: Any, **__: Any) -> int:
    inside, outside = _ffn(order, w_in, w_out)
    return 3 * inside + 2 * outside  # the hidden layer is made a second time


def _linear(rows: int, weights: Sequence[Shape]) -> int:
    return 2 * rows * weights[0][-1] * weights[0][-2] if weights else 0


@_compiled("_grouped_linear_{}")
def _(x: Shape, take: Shape | None, put: Any, offsets: Any, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _linear((x if take is None else take)[0], weights)


@_compiled("_grouped_linear_{}_backward")
def _(*args: Any, **_: Any) -> int:
    c: Any = grouped_linear.contract.BackwardCall(*args)
    return _linear(c.grad[0], c.weights) * (c.want_x + c.want_weights)


@_compiled("_agent_policy_{}")
def _(x: Shape | None, order: Any, offsets: Any, weights: Any, biases: Any, critics: Any, *_: Any, **__: Any) -> int:
    return 0 if x is None else _linear(x[0], weights) + _linear(x[0], critics)


@_compiled("_agent_policy_{}_backward")
def _(*args: Any, **_: Any) -> int:
    c: Any = agent_policy.contract.BackwardCall(*args)
    if c.x is None:
        return 0
    policy, critic = c.want_x + c.want_weights, c.want_x + c.want_critic_weights
    return _linear(c.x[0], c.weights) * policy + _linear(c.x[0], c.critic_weights) * critic


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, count in _formulas.items():
        register_flop_formula(getattr(torch.ops.fastroute, name))(count)


when_imported("torch.utils.flop_counter", _register)
