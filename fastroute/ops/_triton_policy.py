"""``policy``'s and ``agent_policy``'s ``triton`` backend: the kernels under the names that the dispatcher knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import library
from .vector_routing import precision_of

Tensors = Sequence[Tensor]


def _policy(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import policy

    made: tuple[Tensor, Tensor, Tensor] = policy.forward(*args)
    return made


def _policy_backward(*args: Any) -> Tensor:
    from ..kernels import policy

    made: Tensor = policy.backward(*args)
    return made


def _only(tensors: Tensors) -> Tensor | None:
    """What is there of all agents, dense."""
    return tensors[0].contiguous() if tensors else None


def _agent_policy(
    x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors, biases: Tensors,
    critic_weights: Tensors, critic_biases: Tensors, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    from ..kernels import agent_policy

    nets = map(_only, (weights, biases, critic_weights, critic_biases))
    like = (*weights, *biases)[0]
    made: list[Tensor] = agent_policy.forward(x, order, offsets, *nets, *rest, precision_of(like, ""))
    return made


def _agent_policy_backward(
    grad_value: Tensor | None, grad_scores: Tensor | None, grad_critic: Tensor | None, grad_critic_at: Tensor | None,
    scores: Tensor, actions: Tensor, x: Tensor | None, order: Tensor | None, offsets: Tensor | None, weights: Tensors,
    critic_weights: Tensors, agents: int, critic_width: int, kind: int, temperature: float, want_x: bool,
    want_weights: bool, want_biases: bool, want_critic_weights: bool, want_critic_biases: bool, stacked: bool,
    critic_stacked: bool, keep_empty: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    from ..kernels import agent_policy

    wants = want_weights, want_biases, want_critic_weights, want_critic_biases
    dx, made = agent_policy.backward(
        grad_value, grad_scores, grad_critic, grad_critic_at, scores, actions, x, order, offsets, _only(weights),
        _only(critic_weights), agents, critic_width, kind, temperature, want_x, wants, precision_of(scores, ""),
    )  # fmt: skip
    dw, db, critic_dw, critic_db = ([] if t is None else [t] for t in made)
    return scores.new_empty(0) if dx is None else dx, dw, db, critic_dw, critic_db


for _name, _call in (
    ("_policy_triton", _policy),
    ("_policy_triton_backward", _policy_backward),
    ("_agent_policy_triton", _agent_policy),
    ("_agent_policy_triton_backward", _agent_policy_backward),
):
    library.impl(_name, torch.no_grad()(_call), "CompositeExplicitAutograd")
