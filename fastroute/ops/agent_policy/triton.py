"""The Triton backend of ``agent_policy`` as implementations of its compiled ops.

Importing this module registers the implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..precision import precision_of
from ..registry import Kernels, implement
from .contract import BackwardCall

Tensors = Sequence[Tensor]


_kernels = Kernels("agent_policy")


def _only(tensors: Tensors) -> Tensor | None:
    """What is there of all agents, dense."""
    return tensors[0].contiguous() if tensors else None


def _agent_policy(x: Tensor | None, order: Tensor | None, offsets: Tensor | None, *args: Any) -> list[Tensor]:
    weights, biases, critic_weights, critic_biases, *rest = args
    nets = map(_only, (weights, biases, critic_weights, critic_biases))
    return _kernels.forward(x, order, offsets, *nets, *rest, precision_of((*weights, *biases)[0], ""))


def _agent_policy_backward(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    c = BackwardCall(*args)
    wants = c.want_weights, c.want_biases, c.want_critic_weights, c.want_critic_biases
    nets = _only(c.weights), _only(c.critic_weights)
    dx, made = _kernels.backward(*c[:9], *nets, *c[11:16], wants, precision_of(c.scores, ""))
    dw, db, critic_dw, critic_db = ([] if t is None else [t] for t in made)
    return c.scores.new_empty(0) if dx is None else dx, dw, db, critic_dw, critic_db


implement("_agent_policy_triton", _agent_policy, anywhere=True)
implement("_agent_policy_triton_backward", _agent_policy_backward, anywhere=True)
