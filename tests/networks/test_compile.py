"""A routed network under torch.compile (one graph, any batch size) and in an explanation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute import use_backend
from fastroute.networks import MLP, Initialization, Loss, NegLossReward, Selection
from tests.helpers import seeds
from tests.helpers.backends import HERE, each_backend
from tests.helpers.networks import LEARNING, F, decision
from tests.helpers.opcheck import assert_same

F64 = torch.float64
MODULES: dict[str, Any] = {
    "linear": lambda: nn.Linear(F, F),
    "deep": lambda: nn.Sequential(nn.Linear(F, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, F)),
    "mlp": lambda: MLP(F, F, (5,)),
}


class Routed(nn.Module):
    """One layer (compiling takes seconds), with ``forced`` actions, so that both runs take the same way."""

    def __init__(self, algo: str, module: str, **options: Any) -> None:
        super().__init__()
        seeds.manual_seed(0)
        self.decisions = nn.ModuleList(decision(algo, 3, 2, **options) for _ in range(1))
        self.selections = nn.ModuleList(Selection(*[MODULES[module]() for _ in range(3)]) for _ in range(1))
        self.loss = Loss(nn.MSELoss(), NegLossReward())

    def forward(self, x: Tensor, agents: Tensor, forced: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        x, meta, _ = Initialization()(x)
        for t, (decide, select) in enumerate(zip(self.decisions, self.selections, strict=True)):
            x, meta, actions = decide(x, meta, agents, forced_actions=forced[t])
            x, meta, _ = select(x, meta, actions)
        return (x,) if y is None else (x, *self.loss(x, meta, y))


def inputs(B: int, step: bool) -> tuple[Tensor, ...]:
    generator = seeds.generator(B)
    x, y = (torch.randn(B, F, generator=generator, dtype=F64) for _ in range(2))
    made = x, torch.randint(2, (B,), generator=generator), torch.randint(3, (2, B), generator=generator)
    return (*made, y) if step else made


def compare(net: nn.Module, sizes: tuple[int, ...], step: bool) -> None:
    """One graph for all sizes, the eager numbers and gradients. (Unused modules: zeros, for counting would wait.)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    weights, compiled_once = list(net.parameters()), 0
    for k, B in enumerate(sizes):
        found = []
        for run in (compiled, net):
            made = run(*inputs(B, step))
            total = made[0].square().sum() + sum(t for t in made[1:])
            grads = torch.autograd.grad(total, weights, allow_unused=True)
            found.append(
                [
                    *(t.detach() for t in made),
                    *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)),
                ]
            )
        for got, expected in zip(*found, strict=True):
            assert_same(got, expected)
        # dynamic=True begins with numbers as variables and may start over once, before the first result
        compiled_once = counter.frame_count if k == 0 else compiled_once
        assert counter.frame_count == compiled_once, f"compiled again for batch {k}"


@pytest.mark.long
def test_a_routed_forward() -> None:
    compare(Routed("REINFORCE", "linear").double(), (8, 5, 12), False)


@pytest.mark.long
@each_backend
@pytest.mark.parametrize("module", MODULES)
def test_stacks(module: str, backend: str) -> None:
    with use_backend(backend):
        compare(Routed("REINFORCE", module).double(), (8, 5), False)


@pytest.mark.parametrize("algo", [
    pytest.param(algo, marks=() if algo == "WPL" else pytest.mark.long) for algo in LEARNING if algo != "RELAX"
])  # fmt: skip
def test_a_training_step(algo: str) -> None:
    net = Routed(algo, "linear").double()
    for layer in net.decisions:
        layer._uniform = lambda *s, like: torch.full(s, 0.3, dtype=like.dtype)  # type: ignore[assignment,method-assign]
    compare(net, (8, 5), True)


@pytest.mark.xfail(raises=torch._dynamo.exc.UserError, reason="RELAX's twice differentiable networks read the counts")
def test_relax_with_agents() -> None:
    compare(Routed("RELAX", "linear").double(), (8,), True)


def test_draws() -> None:
    """Sampling is part of the graph."""
    torch._dynamo.reset()
    layer = decision("REINFORCE", 3)

    def call(x: Tensor) -> Tensor:
        actions: Tensor = layer(x, Initialization()(x)[1])[2]
        return actions

    seeds.manual_seed(0)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = torch.zeros(3000, F)
    made = [compiled(x) for _ in range(2)]
    assert not torch.equal(*made)
    with torch.no_grad():
        p = layer._policy[0](x[:1])[0].softmax(0)
    for actions in made:
        frequency = torch.bincount(actions, minlength=3) / 3000
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 3000).sqrt()).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_without_gradients(grad: bool, K: int, bias: bool) -> None:
    """Frozen or under no_grad: Dynamo then calls a function's forward itself, and miscounts if K parameters are 2."""
    torch._dynamo.reset()
    select = Selection(*(nn.Linear(4, 2, bias=bias, dtype=F64) for _ in range(K))).requires_grad_(not grad)
    x, actions = torch.randn(6, 4, dtype=F64), torch.arange(6) % K
    expected = torch.stack([select._submodules[k](v) for k, v in zip(actions.tolist(), x, strict=True)])

    def run(x: Tensor) -> Tensor:
        x, meta, _ = Initialization()(x)
        return select(x, meta, actions)[0]

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.parametrize("algo", [a for a in LEARNING if a != "RELAX"])
def test_explain(algo: str) -> None:
    """On fake tensors, where reading a number would raise: a step with its loss reads none."""
    x, agents, forced, y = inputs(8, True)
    for storage in ("approx", "tabular"):
        net = Routed(algo, "deep", policy_storage_type=storage)
        for backend in HERE:
            with use_backend(backend):
                made = fastroute.explain(net, x.float(), agents, forced, y.float())
            assert {d.backend for d in made} == {backend}
            learnt = {"agent_policy", "trajectory_loss"} if algo != "GumbelSoftmax" else set()
            assert {d.case.op for d in made} == {"dispatch", "grouped_linear"} | learnt
