"""Routed networks on a GPU: the CPU's numbers, no synchronisation, a training step in a CUDA graph with fresh draws."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute.networks import Initialization, Loss, NegLossReward, Selection
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.networks import LEARNING, F, decision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = "cuda"
K, A, B, T = 6, 3, 200, 3
#: RELAX's twice differentiable networks read the counts where there are several agents.
ALGORITHMS = [(algo, storage) for algo in LEARNING for storage in ("approx", "tabular")]
each_algorithm = pytest.mark.parametrize(("algo", "storage"), ALGORITHMS)


class Routed(nn.Module):
    def __init__(self, algo: str, storage: str) -> None:
        super().__init__()
        seeds.manual_seed(0)
        agents = 1 if algo == "RELAX" else A
        self.decisions = nn.ModuleList(decision(algo, K, agents, policy_storage_type=storage) for _ in range(T))
        self.selections = nn.ModuleList(
            Selection(*(nn.Sequential(nn.Linear(F, F), nn.ReLU()) for _ in range(K))) for _ in range(T)
        )
        self.loss = Loss(nn.CrossEntropyLoss(), NegLossReward())
        with torch.no_grad():  # tables start out alike
            for p in self.decisions.parameters():
                p.add_(torch.rand_like(p))

    def forward(self, x: Tensor, agents: Tensor, y: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        meta = Initialization()(x)[1]
        for t, (decide, select) in enumerate(zip(self.decisions, self.selections, strict=True)):
            x, meta, actions = decide(x, meta, agents, forced_actions=None if forced is None else forced[t])
            x, meta, _ = select(x, meta, actions)
        return (*self.loss(x, meta, y), meta)


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeds.generator(1)
    x = torch.randn(B, F, generator=generator, dtype=torch.float64)
    agents, y = (torch.randint(n, (B,), generator=generator) for n in (A, F))
    return x.to(device, dtype), agents.to(device), y.to(device)


def results(net: Routed, forced: Tensor) -> dict[str, Tensor]:
    p = next(net.parameters())
    seeds.manual_seed(2)
    for layer in net.decisions:  # Gumbel's and RELAX's noise, the same everywhere
        layer._uniform = lambda *shape, like: torch.full(shape, 0.3, dtype=like.dtype, device=like.device)  # type: ignore[assignment]
    module_loss, routing_loss, _ = net(*inputs(str(p.device), p.dtype), forced.to(p.device))
    (module_loss + routing_loss).backward()
    found = {"module": module_loss, "routing": routing_loss}
    found |= {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()}
    return {k: t.detach().cpu() for k, t in found.items()}


@each_algorithm
def test_agrees_with_float64(algo: str, storage: str) -> None:
    net = Routed(algo, storage)
    forced = torch.randint(K, (T, B), generator=seeds.generator(3))
    found = results(copy.deepcopy(net).to(GPU), forced)
    assert_within_budget(found, lambda: results(copy.deepcopy(net).double(), forced), torch.float32)


@each_algorithm
def test_waits_for_nothing(algo: str, storage: str) -> None:
    net = Routed(algo, storage).to(GPU)
    given = inputs(GPU)

    def step() -> None:
        module_loss, routing_loss, _ = net(*given)
        (module_loss + routing_loss).backward()

    step()  # compiles, which synchronises
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_algorithm
def test_trains_in_a_cuda_graph(algo: str, storage: str) -> None:
    """Each replay draws anew, on what is in the inputs then."""
    net = Routed(algo, storage).to(GPU)
    given = inputs(GPU)

    def step() -> tuple[Tensor, Tensor]:
        module_loss, routing_loss, meta = net(*given)
        (module_loss + routing_loss).backward()
        return module_loss.detach(), meta.actions

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            net.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, actions = step()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append((loss.clone(), actions.clone(), [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    exploring = algo not in (
        "QLearning",
        "SARSA",
        "AdvantageLearning",
        "BootstrapAdvantageLearning",
        "SurpriseLearning",
    )
    if exploring:
        assert not torch.equal(seen[0][1], seen[1][1])
    forced = seen[2][1]
    if algo not in ("GumbelSoftmax", "RELAX"):  # their noise is more than the actions
        net.zero_grad(set_to_none=True)
        expected, routing, _ = net(*given, forced)
        (expected + routing).backward()
        assert torch.equal(expected.detach(), seen[2][0])
        made = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(made, seen[2][2], strict=True))


def test_actions_out_of_range_are_dropped() -> None:
    select = Selection(*(nn.Linear(F, F) for _ in range(3))).to(GPU)
    x = torch.randn(5, F, device=GPU)
    actions = torch.tensor([0, 3, -1, 2, 10**12], device=GPU)
    y, _, _ = select(x, Initialization()(x)[1], actions)
    assert not y[[1, 2, 4]].any() and y[[0, 3]].any(1).all()
    with fastroute.strict(True), pytest.raises(IndexError, match="below 3, got 2 of 5 out of range"):
        select(x, Initialization()(x)[1], actions)
