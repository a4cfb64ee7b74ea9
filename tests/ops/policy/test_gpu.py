"""``policy`` and ``agent_policy`` on a GPU: no synchronisation, and CUDA graphs whose replays draw afresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

N, A, F, K = 512, 8, 64, 20


def layers(outputs: int) -> tuple[list[Tensor], list[Tensor]]:
    weights = [torch.randn(outputs, F, device="cuda", requires_grad=True) for _ in range(A)]
    return weights, [torch.randn(outputs, device="cuda", requires_grad=True) for _ in range(A)]


class Step:
    """A draw and its gradients, in memory that stays."""

    def __init__(self) -> None:
        self.x, self.agents = torch.randn(N, F, device="cuda"), torch.randint(0, A, (N,), device="cuda")
        (self.weights, self.biases), (self.critic_weights, self.critic_biases) = layers(K), layers(1)
        self.plan = dispatch.plan(self.agents, A)

    def __call__(self) -> Any:
        made = functional.agent_policy(
            self.x, self.plan, self.weights, self.biases, critic_weights=self.critic_weights,
            critic_biases=self.critic_biases, uniform=torch.rand(N, K, device="cuda"),
        )  # fmt: skip
        assert made.critic_at is not None
        wanted = [*self.weights, *self.biases, *self.critic_weights, *self.critic_biases]
        return made.actions, torch.autograd.grad(made.value.sum() + made.critic_at.sum(), wanted)


def test_waits_for_nothing() -> None:
    with use_backend("triton"):
        with use_backend("auto"):
            step = Step()
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_draws_afresh() -> None:
    step = Step()
    with use_backend("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actions, grads = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(actions.clone())
    assert not torch.equal(*seen) and all(g.isfinite().all() for g in grads)
    with use_backend("triton"):
        forced = functional.agent_policy(step.x, step.plan, step.weights, step.biases, forced=seen[1])
        (again,) = torch.autograd.grad(forced.value.sum(), step.weights[:1])
    assert torch.equal(again, grads[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    scores = torch.randn(64, 5, device="cuda:1")
    with torch.cuda.device(0), use_backend("triton"):
        assert torch.equal(functional.policy(scores).actions, scores.argmax(1))
