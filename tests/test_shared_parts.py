"""A module that stands in two places of a container is called in both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastroute import EfficientVectorRouting, capsules, networks
from fastroute.networks import Initialization
from tests.helpers.layers import F, K, rand


def test_in_a_sequential() -> None:
    decide = networks.QLearning(K, F).eval()
    select = networks.Selection(*(nn.Linear(F, F) for _ in range(K)))
    net = networks.Sequential(decide, select, decide, select)
    x = rand(5, F).float()
    y, meta, _ = Initialization()(x)
    for part in (decide, select, decide, select):
        y, meta, _ = part(y, meta, None if part is decide else meta.records[-1].actions)
    made, trajectory = net(x)
    assert torch.equal(made, y) and len(trajectory.records) == 2 and len(net) == 5 and net[3] is decide


def test_credit() -> None:
    route = EfficientVectorRouting(4, 4, F, F).double()
    x = rand(2, 4, F)

    def of(module: nn.Module, x: Tensor) -> Tensor:
        return capsules.trace(module, x)[1].dense()

    expected = capsules.credit_assignment([of(route, x), of(route, route(x))], normalize=False)
    torch.testing.assert_close(of(nn.Sequential(route, route), x), expected)
