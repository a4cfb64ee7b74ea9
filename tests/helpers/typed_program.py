"""A user's program, with types: `mypy --strict` accepts it beside the installed package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastroute
from fastroute import (
    WPL,
    EfficientVectorRouting,
    Initialization,
    Loss,
    MoE,
    MTLModel,
    NegLossReward,
    PerTaskAssignment,
    Selection,
    TaskRouter,
    credit_assignment,
)
from fastroute.functional import combine


class Classifier(nn.Module):
    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.route = EfficientVectorRouting(-1, n_classes, 16, 1)
        self.mask = TaskRouter(16, 3, 0.5)
        self.experts = MoE(16, 32, num_experts=4, k=2)

    def forward(self, x: Tensor, lengths: list[int], task: int) -> Tensor:
        masked: Tensor = self.mask(x.transpose(1, 2), task=task)
        logits: Tensor = self.route(self.experts(masked.transpose(1, 2)), lengths=lengths)
        return logits.squeeze(-1)


def credits(phis: list[Tensor]) -> Tensor:
    return credit_assignment(phis, normalize=True)


def learn(x: Tensor, tasks: Tensor, y: Tensor) -> float:
    decide = WPL(4, 16, num_agents=3)
    select = Selection(*(nn.Linear(16, 5) for _ in range(4)))
    h, meta, agents = PerTaskAssignment()(*Initialization()(x, tasks=tasks))
    h, meta, actions = decide(h, meta, agents)
    h, meta, actions = select(h, meta, actions)
    module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(h, meta, y)
    total = module_loss + routing_loss
    return float(total)


def multitask(x: Tensor, y: dict[str, Tensor]) -> Tensor:
    model = MTLModel(
        [
            {"name": "trunk", "layers": nn.Linear(16, 8)},
            {"name": "digit", "layers": nn.Linear(8, 10), "anchor_layer": "trunk", "loss": nn.CrossEntropyLoss()},
        ],
        ["digit"],
    )
    total, _each = model.loss(model(x), y)
    return total


with fastroute.use_backend("reference"):
    print(fastroute.explain(Classifier(3), torch.zeros(2, 5, 16), [5, 3], 1))
print(combine(torch.rand(2, 3), torch.rand(2, 3)), fastroute.__version__)
