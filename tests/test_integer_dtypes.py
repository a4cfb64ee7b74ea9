"""Indices in any integer dtype are what they are in int64, masked and with more choices than the dtype has numbers.

PyTorch takes a number that a comparison, ``where`` or ``clamp`` has beside a tensor modulo the tensor's range.

Axes: B samples, K choices (modules, agents, tasks, classes).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import networks, tasks
from fastroute.multitask import F1, L1, Accuracy
from fastroute.multitask.metrics import Metric
from tests.helpers import seeds
from tests.helpers.layers import rand

B, K = 6, 300
X = rand(B, 4).float()
MASK = torch.tensor([True, False, True, True, False, True])
REWARDS: dict[str, Callable[[], networks.PerActionBaseReward]] = {
    "CollaborationReward": lambda: networks.CollaborationReward(0.5, num_actions=K, history_len=16),
    "RunningAverageCollaborationReward": lambda: networks.RunningAverageCollaborationReward(0.5, num_actions=K),
    "ManualReward": lambda: networks.ManualReward(torch.arange(K)),
}


@functools.cache
def modules() -> networks.Selection:
    return networks.Selection(*(nn.Linear(4, 2) for _ in range(K)), stacked=True)


def selected(indices: Tensor, mask: Tensor | None, k: int = 1) -> Tensor:
    actions = indices if k == 1 else torch.stack([indices, indices.flip(0)], 1)
    y: Tensor = modules()(X, networks.Initialization()(X)[1], actions, mask)[0]
    return y


def decided(agents: Tensor | None, forced: Tensor | None) -> Tensor:
    tables = networks.WPL(K, 4, num_agents=1 if agents is None else K, policy_storage_type="tabular", stacked=True)
    _, meta, actions = tables(X, networks.Initialization()(X)[1], agents, MASK, forced_actions=forced)
    return torch.cat([actions, meta.summary().layers[0].counts.flatten()])


def by_task(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda indices: layer(X, indices)


def counted(indices: Tensor) -> Tensor:
    router = tasks.TaskRouter(4, K, 0.5, generator=seeds.generator(0))
    monitor = fastroute.RoutingMonitor(router)
    router(X, indices)
    return torch.tensor(list(monitor.numbers().values()))


def measured(metric: Metric, scores: Tensor) -> Callable[[Tensor], Tensor]:
    def run(indices: Tensor) -> Tensor:
        metric.reset()
        metric.update(scores, indices if isinstance(metric, L1) or scores.dim() == 2 else indices % 2)
        return metric.compute()

    return run


def rewarded(name: str, active: Tensor | None) -> Callable[[Tensor], Tensor]:
    def run(indices: Tensor) -> Tensor:
        reward = REWARDS[name]()
        for _ in range(2):
            reward.register_all(lambda: torch.zeros(B, K, 5), indices, active)
        made = reward.rewards(lambda: X, indices, X)
        assert made is not None
        return torch.cat([made, reward.get_reward(torch.zeros(K), indices[0])])

    return run


def routed() -> nn.Module:
    masks = seeds.generator(0)
    return tasks.live(nn.Sequential(nn.Linear(4, 8), tasks.TaskRouter(8, K, 0.5, generator=masks), nn.Linear(8, 2)))


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "Selection": lambda i: selected(i, None),
    "Selection, masked": lambda i: selected(i, MASK),
    "Selection, of two": lambda i: selected(i, MASK, 2),
    "agents": lambda i: decided(i, torch.zeros(B, dtype=torch.int64)),
    "forced actions": lambda i: decided(None, i),
    "TopKGating": lambda i: networks.TopKGating(K, 4)(
        X, networks.Initialization()(X)[1], mask=MASK, forced_actions=torch.stack([i, i.flip(0)], 1)
    )[2],
    "TaskRouter": lambda i: by_task(tasks.TaskRouter(4, K, 0.5, generator=seeds.generator(0)))(i),
    "live": lambda i: by_task(routed())(i),
    "MultiHead": lambda i: by_task(fastroute.MultiHead(4, 3, 2, K))(i),
    "OfTask": lambda i: fastroute.OfTask()(*rand(K, B), i),
    "RoutingMonitor": counted,
    "lengths": lambda i: fastroute.EfficientVectorRouting(-1, 2, 4, 3)(rand(B, K, 4).float(), lengths=i.clamp(min=1)),
    "Accuracy": measured(Accuracy(), torch.eye(K)[[255, 1, 2, 3, 4, 127]]),
    "F1": measured(F1(K), torch.eye(K)[[255, 1, 2, 3, 4, 127]]),
    "Accuracy, 0 and 1": measured(Accuracy(), X[:, 0]),
    "F1, 0 and 1": measured(F1(), X[:, 0]),
    "L1": measured(L1(), X[:, 0]),
    **{name: rewarded(name, None) for name in REWARDS},
    **{f"{name}, of some": rewarded(name, MASK) for name in REWARDS},
}


@pytest.mark.parametrize("name", ROWS)
def test_as_in_int64(name: str) -> None:
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        most = min(torch.iinfo(dtype).max, K - 2)
        indices = torch.tensor([most, 1, 0, 3, most, 127])
        made = []
        for given in (indices, indices.to(dtype)):
            seeds.manual_seed(0)
            made.append(ROWS[name](given))
        torch.testing.assert_close(made[1].double(), made[0].double(), rtol=0, atol=0)
