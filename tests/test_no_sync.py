"""On a device that holds no values, a training step looks at none, and copies nothing there from the host.

What runs on "meta" is what runs on a GPU but for the kernels: a branch that reads a value is taken on the CPU alone. So
this shows without a GPU that a step does not wait for one, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute import multitask, networks, tasks
from fastroute.multitask.weighting import WEIGHTINGS
from tests.helpers import seeds
from tests.helpers.networks import FORMULAS, LEARNING, F, decision
from tests.multitask.test_routing_nodes import MODELS as ROUTED_MODELS
from tests.multitask.test_routing_nodes import TASKS

META = "meta"
K, A, B, T = 6, 3, 40, 3
Step = Callable[[], Tensor]


class Watch(TorchDispatchMode):
    """Counts what is copied from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for t in tree_leaves(made):
            if isinstance(t, Tensor) and any(g.device != t.device and g.dim() for g in given):
                self.copies.append(f"{func}: {[(str(g.device), *g.shape) for g in given]} to {t.device}")
        return made


def watched(step: Step) -> list[str]:
    """What is copied in a second step; the first may put things in their place."""
    step().backward()
    with Watch() as watch:
        step().backward()
    return watch.copies


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    seeds.manual_seed(0)
    return build().to(META).train()


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, device=META)


def below(limit: int, *shape: int) -> Tensor:
    return torch.randint(limit, shape, device=META)


def calls(build: Callable[[], nn.Module], *inputs: Tensor, **options: Any) -> Callable[[], Step]:
    """A layer, of whose outputs the sum is the loss."""

    def case() -> Step:
        layer = on_meta(build)

        def step() -> Tensor:
            made = [t for t in tree_leaves(layer(*inputs, **options)) if isinstance(t, Tensor) and t.requires_grad]
            assert made
            return sum((t.sum() for t in made), rand())

        return step

    return case


class Routed(nn.Module):
    """Two decisions and their selections, by several agents."""

    def __init__(self, reward: networks.BaseReward, algo: str, **options: Any) -> None:
        super().__init__()
        agents = 1 if algo == "RELAX" else A
        self.decisions = nn.ModuleList(decision(algo, K, agents, **options) for _ in range(2))
        self.selections = nn.ModuleList(
            networks.Selection(*(nn.Sequential(nn.Linear(F, F), nn.ReLU()) for _ in range(K))) for _ in range(2)
        )
        self.loss = networks.Loss(nn.CrossEntropyLoss(), reward)

    def forward(self, x: Tensor, agents: Tensor, y: Tensor) -> Tensor:
        meta = networks.Initialization()(x)[1]
        for decide, select in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decide(x, meta, agents)
            x, meta, _ = select(x, meta, actions)
        module_loss, routing_loss = self.loss(x, meta, y)
        return module_loss + routing_loss


def routed(algo: str, reward: type[networks.BaseReward] = networks.NegLossReward, **options: Any) -> Callable[[], Step]:
    return calls(lambda: Routed(reward(), algo, **options), rand(B, F), below(A, B), below(F, B))


def task_losses(kind: str) -> Callable[[], Step]:
    """Heads of a shared trunk, their losses weighted."""

    def case() -> Step:
        heads = on_meta(lambda: multitask.MultiHead(F, 8, 2, T))
        weighting = on_meta(lambda: WEIGHTINGS[kind](TASKS))
        x, y = rand(B, F), below(2, B)

        def step() -> Tensor:
            made = {task: nn.functional.cross_entropy(out, y) for task, out in zip(TASKS, heads(x), strict=True)}
            total = weighting(made)
            return total if isinstance(total, Tensor) else total[0]

        return step

    return case


def of_graph(name: str) -> Callable[[], Step]:
    given = {"x": rand(B, F), "task": below(T, B)}
    return calls(ROUTED_MODELS[name], given)


def masked_net() -> nn.Module:
    layers = [nn.Linear(F, 8), tasks.TaskRouter(8, T, 0.5), nn.ReLU(), nn.Linear(8, 8), tasks.TaskRouter(8, T, 0.5)]
    return _ByTask(layers)


class _ByTask(nn.Module):
    """Every sample with the mask of its own task."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, task) if isinstance(layer, tasks.TaskRouter) else layer(x)
        return x


class _Scores(nn.Module):
    def forward(self, x: Tensor, pred: Tensor) -> Tensor:
        return x @ pred.mT


def lengths() -> Tensor:
    return below(20, 3)


CASES: dict[str, Callable[[], Step]] = {
    "EfficientVectorRouting": calls(lambda: fastroute.EfficientVectorRouting(20, 5, 8, 6), rand(3, 20, 8)),
    "EfficientVectorRouting, any length": calls(
        lambda: fastroute.EfficientVectorRouting(-1, 5, 8, 6), rand(3, 20, 8), lengths=lengths()
    ),
    "EfficientVectorRouting, masked": calls(
        lambda: fastroute.EfficientVectorRouting(20, 5, 8, 6, n_iters=3), rand(3, 20, 8), mask=rand(3, 20, 5) < 0.5
    ),
    "DefinableVectorRouting": calls(
        lambda: fastroute.DefinableVectorRouting(
            nn.Linear(8, 1), nn.Linear(8, 30), nn.Linear(6, 8), _Scores(), n_inp=20, n_out=5
        ),
        rand(3, 20, 8),
    ),
    "GenerativeMatrixRouting": calls(
        lambda: fastroute.GenerativeMatrixRouting(20, 5, 4, 4, 4), rand(3, 20), rand(3, 20, 4, 4)
    ),
    "GenerativeMatrixRouting, any length": calls(
        lambda: fastroute.GenerativeMatrixRouting(-1, 5, 4, 4, 4), rand(3, 20), rand(3, 20, 4, 4)
    ),
    "SlotAttention": calls(lambda: fastroute.SlotAttention(5, 8, 8), rand(3, 20, 8)),
    "MoE": calls(lambda: networks.MoE(F, 8, K, 2, shared_experts=1), rand(B, F)),
    "MoE, balanced": calls(
        lambda: networks.MoE(F, 8, K, 2, capacity=1.0, jitter=0.1, z_loss=0.1), rand(B, F), return_aux=True
    ),
    "TaskRouter": calls(masked_net, rand(B, F), below(T, B)),
    **{
        f"{algo}, {storage}, {formula}": routed(algo, policy_storage_type=storage, formula=formula)
        for k, algo in enumerate(LEARNING)  # every pair of an algorithm, a storage and a formula
        for storage, formula in zip(("approx", "tabular"), FORMULAS[:: 1 - 2 * (k % 2)], strict=True)
    },
    "CorrectClassifiedReward": routed("REINFORCE", networks.CorrectClassifiedReward),
    **{
        reward: routed("WPL", additional_reward_class=getattr(networks, reward))
        for reward in ("CollaborationReward", "RunningAverageCollaborationReward")
    },
    # a live network reads its masks once, where there are any to read
    **{f"graph of {name}": of_graph(name) for name in ROUTED_MODELS if name != "live"},
    **{f"weighting {kind}": task_losses(kind) for kind in WEIGHTINGS},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_neither_looks_nor_copies(name: str) -> None:
    assert not watched(CASES[name]())


def test_a_look_and_a_copy_are_seen() -> None:
    """What the test above would say of a step that does either."""
    x = rand(3).requires_grad_()

    def copies() -> Tensor:
        return (x * torch.tensor([1.0, 2.0, 3.0]).to(META)).sum()

    def looks() -> Tensor:
        return x.sum() if x[0] > 0 else x.prod()

    assert watched(copies)
    with pytest.raises((RuntimeError, NotImplementedError)):
        watched(looks)
