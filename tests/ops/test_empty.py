"""Of no rows any strides are good: ``contiguous()`` leaves an empty tensor's as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import functional, use_backend
from fastroute.ops import dispatch
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.cases import Case
from tests.helpers.routing_cases import Size

from .calls import CALLS

D, K = 5, 3


def strided(t: Tensor) -> Tensor:
    """The numbers of an empty tensor [0, ..., D] with gaps between those of its last axis."""
    return t.new_empty(6, *t.shape[1:-1], 2 * t.shape[-1])[:0, ..., ::2]


def _agents(x: Tensor) -> Any:
    plan = dispatch.plan(torch.zeros(0, dtype=torch.int64), K)
    made = functional.agent_policy(x, plan, torch.randn(K, 4, D), critic_weights=torch.randn(K, 4, D))
    return made.value, made.scores, made.critic


def _routed(decision: nn.Module, x: Tensor) -> Any:
    h, meta, agents = fastroute.Initialization()(x)
    h, meta, actions = decision(h, meta, agents)
    return fastroute.Selection(*(nn.Linear(D, 4) for _ in range(K)))(h, meta, actions)[0]


def _linear(x: Tensor, activation: str = "none") -> Tensor:
    plan = dispatch.plan(torch.zeros(0, dtype=torch.int64), K)
    return functional.grouped_linear(x, plan, torch.randn(K, 4, D), activation=activation)


def _ffn(x: Tensor) -> Tensor:
    plan = dispatch.plan(torch.zeros(0, 2, dtype=torch.int64), K)
    return functional.expert_ffn(x, plan, torch.zeros(0, 2), torch.randn(K, 8, D), torch.randn(K, D, 4))


#: Whatever takes rows [B, D].
ROWS: dict[str, Callable[[Tensor], Any]] = {
    "grouped_linear": _linear,
    "grouped_linear, silu": lambda x: _linear(x, "silu"),
    "expert_ffn": _ffn,
    "agent_policy": _agents,
    "policy": lambda x: functional.policy(x).value,
    "task_mask": lambda x: functional.task_mask(x, torch.ones(2, D), 1, relu=True),
    "batch_norm_mask_relu": lambda x: functional.batch_norm_mask_relu(
        x, torch.ones(2, D), 1, torch.zeros(D), torch.ones(D), None, None, False, 0.1, 1e-5
    ),
    "combine": lambda x: functional.combine(x, torch.zeros(0, D)),
    "MoE": fastroute.MoE(D, 8, K, 2),
    "REINFORCE": lambda x: _routed(fastroute.REINFORCE(K, D), x),
    "AAC": lambda x: _routed(fastroute.AAC(K, D), x),
}


@each_backend
@pytest.mark.parametrize("name", ROWS)
def test_no_rows(backend: str, name: str) -> None:
    seeds.manual_seed(0)
    x = torch.randn(6, 2 * D)[:0, ::2].requires_grad_()
    assert x.stride(-1) == 2
    with use_backend(backend):
        made = ROWS[name](x)
        made = [t for t in (made if isinstance(made, tuple) else [made]) if t is not None]
        assert all(0 in t.shape for t in made)
        torch.autograd.grad([t.sum() for t in made if t.requires_grad], x, allow_unused=True)


#: Ops that take batches of more axes.
_BATCHES = (
    "vector_routing",
    "efficient_routing",
    "matrix_routing",
    "soft_assignment, routing",
    "soft_assignment, mean",
)


@each_backend
@pytest.mark.parametrize("name", _BATCHES)
def test_no_samples(backend: str, name: str) -> None:
    call = CALLS[name]
    case: Case = call.case(Size(1, 4, 3, 5, 4), torch.float32)
    of_samples = ("x", "gate", "pred", "a_inp", "mu_inp", "scores", "votes")
    inputs = {k: strided(t) if t is not None and k in of_samples else t for k, t in case.inputs.items()}
    leaves = {k: t.requires_grad_() for k, t in inputs.items() if t is not None and k in of_samples}
    with use_backend(backend):
        made = call.fn(**{k: t for k, t in {**inputs, **leaves}.items() if k in case.inputs})
        outputs = [t for t in made.values() if t is not None and t.requires_grad]
        assert all(t.shape[0] == 0 for t in outputs)
        torch.autograd.grad([t.sum() for t in outputs], list(leaves.values()), allow_unused=True)
