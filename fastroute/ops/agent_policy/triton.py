"""The Triton backend of ``agent_policy`` as implementations of its compiled ops.

Triton is imported by the first call. Importing this module registers the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from ..precision import precision_of
from ..registry import implement

Tensors = Sequence[Tensor]


@cache
def _kernels() -> Any:
    from ...kernels import agent_policy

    return agent_policy


def _only(tensors: Tensors) -> Tensor | None:
    """What is there of all agents, dense."""
    return tensors[0].contiguous() if tensors else None


def _agent_policy(
    x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors, biases: Tensors,
    critic_weights: Tensors, critic_biases: Tensors, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    nets = map(_only, (weights, biases, critic_weights, critic_biases))
    like = (*weights, *biases)[0]
    return _kernels().forward(x, order, offsets, *nets, *rest, precision_of(like, ""))


def _agent_policy_backward(
    grad_value: Tensor | None, grad_scores: Tensor | None, grad_critic: Tensor | None, grad_critic_at: Tensor | None,
    scores: Tensor, actions: Tensor, x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors,
    critic_weights: Tensors, agents: int, critic_width: int, kind: int, temperature: float, want_x: bool,
    want_weights: bool, want_biases: bool, want_critic_weights: bool, want_critic_biases: bool, stacked: bool,
    critic_stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    wants = want_weights, want_biases, want_critic_weights, want_critic_biases
    dx, made = _kernels().backward(
        grad_value, grad_scores, grad_critic, grad_critic_at, scores, actions, x, order, offsets, _only(weights),
        _only(critic_weights), agents, critic_width, kind, temperature, want_x, wants, precision_of(scores, ""),
    )  # fmt: skip
    dw, db, critic_dw, critic_db = ([] if t is None else [t] for t in made)
    return scores.new_empty(0) if dx is None else dx, dw, db, critic_dw, critic_db


implement("_agent_policy_triton", _agent_policy, anywhere=True)
implement("_agent_policy_triton_backward", _agent_policy_backward, anywhere=True)
