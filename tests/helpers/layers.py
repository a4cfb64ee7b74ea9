"""Small layers of every family in float64, with what they are called with: what PyTorch promises of a module is tried
on each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute import multitask, networks, tasks

from . import seeds

F64 = torch.float64
F, K, B, T = 6, 3, 5, 3


class LayerCase:
    """A layer and what it is called with: floating-point inputs, which have derivatives, and the rest."""

    def __init__(self, build: Callable[[], nn.Module], *inputs: Tensor, rest: Any = (), **options: Any) -> None:
        self.build, self.inputs, self.rest, self.options = build, inputs, rest, options

    def layer(self) -> nn.Module:
        seeds.manual_seed(0)
        return self.build().to(F64)

    def function(self, layer: nn.Module) -> Callable[..., Tensor]:
        """f(parameters, *inputs): all outputs that have derivatives, in one row."""

        def f(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            made = functional_call(layer, parameters, (*inputs, *self.rest), self.options)
            return torch.cat([t.reshape(-1) for t in tree_leaves(made) if isinstance(t, Tensor) and t.dtype == F64])

        return f


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed), dtype=F64)


def linears(**options: Any) -> networks.Selection:
    modules = (nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, F)) for _ in range(K))
    return networks.Selection(*modules, **options)


class Selected(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.select = linears(**options)

    def forward(self, x: Tensor, actions: Tensor) -> Tensor:
        made: Tensor = self.select(x, networks.Initialization()(x)[1], actions)[0]
        return made


class Scores(nn.Module):
    def forward(self, x: Tensor, pred: Tensor) -> Tensor:
        return x @ pred.mT


class Masked(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.router, self.last = (
            nn.Linear(F, 8),
            tasks.TaskRouter(8, T, 0.5, generator=seeds.generator(0)),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made: Tensor = self.last(self.router(self.first(x), task).tanh())
        return made


def live_net() -> nn.Module:
    masks = seeds.generator(0)
    layers = [nn.Linear(F, 8), tasks.TaskRouter(8, T, 0.5, generator=masks), nn.ReLU(), nn.Linear(8, 4)]
    return tasks.live(nn.Sequential(*layers))


ACTIONS = torch.tensor([0, 2, -1, 1, 0])
TASK = torch.tensor([0, 2, 1, 1, 0])
evr = fastroute.EfficientVectorRouting
LAYERS: dict[str, LayerCase] = {
    "EfficientVectorRouting": LayerCase(lambda: evr(4, 3, F, 5), rand(2, 4, F)),
    "EfficientVectorRouting, any length": LayerCase(
        lambda: evr(-1, 3, F, 5), rand(2, 4, F), lengths=torch.tensor([4, 2])
    ),
    "EfficientVectorRouting, masked": LayerCase(
        lambda: evr(4, 3, F, 5, n_iters=3), rand(2, 4, F), mask=rand(2, 4, 3, seed=2) > 0.7
    ),
    "DefinableVectorRouting": LayerCase(
        lambda: fastroute.DefinableVectorRouting(
            nn.Linear(F, 1), nn.Linear(F, 6), nn.Linear(2, F), Scores(), n_inp=4, n_out=3
        ),
        rand(2, 4, F),
    ),
    "GenerativeMatrixRouting": LayerCase(
        lambda: fastroute.GenerativeMatrixRouting(4, 3, 2, 2, 2), rand(2, 4), rand(2, 4, 2, 2, seed=2)
    ),
    "SlotAttention": LayerCase(lambda: fastroute.SlotAttention(3, F, F), rand(2, 4, F), slots=rand(2, 3, F, seed=3)),
    "Selection": LayerCase(Selected, rand(B, F), rest=(ACTIONS,)),
    "Selection, stacked": LayerCase(lambda: Selected(stacked=True), rand(B, F), rest=(ACTIONS,)),
    "Selection, zeros": LayerCase(lambda: Selected(unused_grad="zeros"), rand(B, F), rest=(ACTIONS,)),
    "MoE": LayerCase(lambda: networks.MoE(F, 4, K, 2, shared_experts=1), rand(B, F)),
    "TaskRouter": LayerCase(Masked, rand(B, F), rest=(TASK,)),
    "live": LayerCase(live_net, rand(B, F), rest=(TASK,)),
    "MMoE": LayerCase(lambda: multitask.MMoE(F, K, T, hidden_features=4, out_features=F), rand(B, F)),
    "PLE": LayerCase(lambda: multitask.PLE(F, 1, 2, T, hidden_features=4, out_features=F), rand(B, F)),
    "MultiHead": LayerCase(lambda: multitask.MultiHead(F, 4, 2, T), rand(B, F)),
}
