"""Small layers of every family in float64, with what they are called with: what PyTorch promises of a module is tried
on each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute import models, multitask, networks, tasks
from fastroute.compat.heinsen_routing_2019 import Routing as Routing2019

from . import seeds

F64 = torch.float64
F, K, B, T = 6, 3, 5, 3
#: Decisions that have no row of their own.
OTHERS = (
    "REINFORCEBl1", "REINFORCEBl2", "EGreedyREINFORCE", "SARSA", "AdvantageLearning", "BootstrapAdvantageLearning",
    "SurpriseLearning", "ActorCritic", "BootstrapAAC", "EGreedyAAC",
)  # fmt: skip


class LayerCase:
    """A layer and what it is called with: floating-point inputs, which have derivatives, and the rest.

    ``draws``: it draws random numbers, in training. ``long``: make test has a row of its kind, and leaves this one out.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *inputs: Tensor,
        rest: Any = (),
        draws: bool = False,
        long: bool = False,
        **options: Any,
    ) -> None:
        self.build, self.inputs, self.rest, self.draws, self.options = build, inputs, rest, draws, options
        self.long = long

    def layer(self) -> nn.Module:
        seeds.manual_seed(0)
        return self.build().to(F64)

    def function(self, layer: nn.Module) -> Callable[..., Tensor]:
        """f(parameters, *inputs): all outputs that have derivatives, in one row."""

        def f(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            seeds.manual_seed(1)
            made = functional_call(layer, parameters, (*inputs, *self.rest), self.options)
            return torch.cat([t.reshape(-1) for t in tree_leaves(made) if isinstance(t, Tensor) and t.dtype == F64])

        return f


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed), dtype=F64)


def linears(**options: Any) -> networks.Selection:
    modules = (nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, F)) for _ in range(K))
    return networks.Selection(*modules, **options)


def unlike() -> networks.Selection:
    """Modules that cannot run together, and one that is a function of nothing."""
    layers = (nn.Linear(F, F), nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, F)), nn.Identity())
    return networks.Selection(*layers, dropped="identity")


class Selected(nn.Module):
    def __init__(self, select: networks.Selection | None = None, **options: Any) -> None:
        super().__init__()
        self.select = linears(**options) if select is None else select

    def forward(self, x: Tensor, actions: Tensor) -> Tensor:
        made: Tensor = self.select(x, networks.Initialization()(x)[1], actions)[0]
        return made


class Mixture(nn.Module):
    """Selection with k modules for each sample, which a gating chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.select = networks.TopKGating(K, F, k=2, z_loss=0.1), linears(unused_grad="zeros")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, meta, actions = self.gate(x, networks.Initialization()(x)[1])
        return self.select(x, meta, actions)[0], meta.aux_losses()


class Routed(nn.Module):
    """A routed network that learns: its output, the modules' losses and the decisions'."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = networks.Sequential(networks.PerTaskAssignment(), *layers)
        self.loss = networks.Loss(nn.CrossEntropyLoss(), networks.CorrectClassifiedReward())

    def forward(self, x: Tensor, task: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        made, meta = self.net(x, task)
        return made, *self.loss(made, meta, y, reduce=False)


class Outputs(nn.Module):
    """A network's batch without its trajectory."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
        made: Tensor = self.net(x, tasks)[0]
        return made


class Step(nn.Module):
    """A recurrent cell's, from a state."""

    def __init__(self, cell: type[Any] = networks.RoutingLSTMCell) -> None:
        super().__init__()
        self.cell = cell(F, 4, K, 2, networks.REINFORCE, route_i2h=True, detach=False)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        *before, actions = state
        state, meta = self.cell(x, tuple(before) if len(before) > 1 else before[0], forced_actions=actions.mT)
        return *(state if isinstance(state, tuple) else (state,)), *(record.columns[0].full for record in meta.records)


class Learns(nn.Module):
    """A multi-task model and its losses as one."""

    def __init__(self, weighting: str) -> None:
        super().__init__()
        heads = [
            {"name": f"head{t}", "layers": nn.Linear(8, 2), "anchor_layer": "trunk", "loss": nn.MSELoss()}
            for t in range(T)
        ]
        trunk = {"name": "trunk", "layers": nn.Sequential(nn.Linear(F, 8), nn.Tanh())}
        self.model = multitask.MTLModel([trunk, *heads], [head["name"] for head in heads], weighting=weighting)  # type: ignore[misc]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = self.model.loss(self.model(x), [y] * T)[0]
        return total


class Wrapped(nn.Module):
    """Every node of a multi-task graph that is no layer of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        nodes: list[dict[str, Any]] = [
            {"name": "trunk", "layers": nn.Linear(F, F)},
            {"name": "cell", "layers": multitask.Unpack(nn.GRUCell(F, F)), "anchor_layer": ["root", "trunk"]},
            {"name": "parts", "layers": multitask.Split(2, 1), "anchor_layer": "trunk"},
            {"name": "left", "layers": multitask.SimpleSelect(0), "anchor_layer": "parts"},
            {"name": "right", "layers": multitask.SliceSelect(slice(1, 2)), "anchor_layer": "parts"},
            {"name": "right one", "layers": multitask.SimpleSelect(0), "anchor_layer": "right"},
            {"name": "sum", "layers": multitask.Add(), "anchor_layer": ["left", "right one"]},
            {"name": "product", "layers": multitask.Multiply(), "anchor_layer": ["left", "sum"]},
            {"name": "pair", "layers": multitask.Stack(1), "anchor_layer": ["sum", "product"]},
            {"name": "mean", "layers": multitask.Lambda(torch.mean, dim=1), "anchor_layer": "pair"},
            {"name": "both", "layers": multitask.Concat(1), "anchor_layer": ["mean", "cell"]},
            {"name": "tasks", "layers": multitask.EachTask(T), "anchor_layer": "both"},
            {"name": "rows", "layers": multitask.SimpleSelect(0), "anchor_layer": "tasks"},
            {"name": "of tasks", "layers": multitask.ToTasks(T), "anchor_layer": "rows"},
            *({"name": f"task {t}", "layers": multitask.SimpleSelect(t), "anchor_layer": "of tasks"} for t in range(T)),
            {"name": "one", "layers": multitask.OfTask(), "anchor_layer": [*(f"task {t}" for t in range(T)), "which"]},
            {"name": "which", "layers": _whose, "anchor_layer": "root"},
        ]
        self.model = multitask.MTLModel(nodes, ["cell", "one"])

    def forward(self, x: Tensor) -> list[Tensor]:
        made: list[Tensor] = self.model(x)[0]
        return made


def _whose(x: Tensor) -> Tensor:
    return torch.zeros_like(x[:, 0], dtype=torch.int64)


class Weighted(nn.Module):
    """Three losses, and every weighting's total of them."""

    def __init__(self) -> None:
        super().__init__()
        self.predict, makers = nn.Linear(F, T), multitask.weighting.WEIGHTINGS
        self.ways = nn.ModuleList([*(makers[name](T) for name in makers), multitask.FixedWeights([0.1, 0.2, 0.3])])

    def forward(self, x: Tensor) -> list[Tensor]:
        losses = list(self.predict(x).square().mean(0).unbind())
        return [way(losses) for way in self.ways]


class BetweenRouters(nn.Module):
    """RoutedConv2d and RoutedLinear in a model that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        masks = seeds.generator(0)
        self.first, self.second = (tasks.TaskRouter(n, T, 0.5, generator=masks) for n in (8, 6))
        self.conv = tasks.RoutedConv2d(2, 8, 3, output_router=self.first)
        self.linear = tasks.RoutedLinear(8, 6, input_router=self.first, output_router=self.second)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made: Tensor = self.linear(self.conv(x, task).tanh().mean((2, 3)), task)
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


def live_convolutions() -> nn.Module:
    masks = seeds.generator(0)
    layers = [
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), tasks.TaskRouter(8, T, 0.5, generator=masks), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(8, 4),
    ]  # fmt: skip
    return tasks.live(nn.Sequential(*layers))


def vgg() -> nn.Module:
    return tasks.VGG(
        tasks.vgg.make_layers([4, "M", 6, "M"], T, 0.5, generator=seeds.generator(0)), T, bottleneck_spatial=[1, 1]
    )


def routed(algorithm: str, **options: Any) -> nn.Module:
    decide = getattr(networks, algorithm)(K, F, num_agents=T, detach=False, **options)
    return Routed(scattered(decide), linears(unused_grad="zeros"))


def scattered(layer: nn.Module) -> nn.Module:
    """Tables are alike for all choices at first, and signals small."""
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(rand(*p.shape, seed=i))
    return layer


def decisions(*algorithms: str, rewards: Any = (None,)) -> nn.Module:
    """One behind the other."""
    layers: list[nn.Module] = [networks.PassThrough()]
    for algorithm, reward in zip(algorithms, itertools.cycle(rewards), strict=False):
        decide = getattr(networks, algorithm)(K, F, num_agents=K, detach=False, additional_reward_func=reward)
        layers += [decide, networks.Selection(*(nn.Linear(F, F) for _ in range(K)), unused_grad="zeros")]
    net = Routed(*layers)
    net.loss = networks.Loss(nn.CrossEntropyLoss(), networks.NegLossReward(), clear=True)
    return net


def collaborating() -> nn.Module:
    rewards = (networks.CollaborationReward(0.1), networks.RunningAverageCollaborationReward(0.1))
    return decisions("AAC", "WPL", rewards=rewards)


def two_routed() -> nn.Module:
    decisions = [
        networks.REINFORCE(K, F, num_agents=agents, approx_hidden_dims=(4,), detach=False) for agents in (T, K)
    ]
    return Routed(decisions[0], linears(), nn.Tanh(), decisions[1], linears())


ACTIONS = torch.tensor([0, 2, -1, 1, 0])
TASK = torch.tensor([0, 2, 1, 1, 0])
LABELS = torch.tensor([3, 0, 1, 5, 2])
evr = fastroute.EfficientVectorRouting
concatenate, residual = fastroute.capsules.Concatenate, fastroute.capsules.Residual
LAYERS: dict[str, LayerCase] = {
    "EfficientVectorRouting": LayerCase(lambda: evr(4, 3, F, 5), rand(2, 4, F)),
    "EfficientVectorRouting, any length": LayerCase(
        lambda: evr(-1, 3, F, 5), rand(2, 4, F), lengths=torch.tensor([4, 2])
    ),
    "EfficientVectorRouting, masked": LayerCase(
        lambda: evr(4, 3, F, 5, n_iters=3), rand(2, 4, F), mask=rand(2, 4, 3, seed=2) > 0.7
    ),
    "capsules.Residual, Add, Concatenate": LayerCase(
        lambda: nn.Sequential(
            residual(evr(4, 4, F, F)),
            fastroute.capsules.Add(concatenate(evr(4, 2, F, 5), evr(-1, 3, F, 5)), evr(4, 5, F, 5)),
        ),
        rand(2, 4, F),
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
    "GenerativeMatrixRouting, any number": LayerCase(
        lambda: fastroute.GenerativeMatrixRouting(-1, 3, 2, 2, 2, p_model="skm"),
        *(rand(2, 4), rand(2, 4, 2, 2, seed=2)),
        lengths=torch.tensor([4, 2]),
    ),
    "compat.heinsen_routing_2019": LayerCase(
        lambda: Routing2019(2, 2, 2, n_inp=4, n_out=3), rand(2, 4), rand(2, 4, 2, 2, seed=2)
    ),
    "SlotAttention": LayerCase(lambda: fastroute.SlotAttention(3, F, F), rand(2, 4, F), slots=rand(2, 3, F, seed=3)),
    "SlotAttention, masked": LayerCase(
        lambda: fastroute.SlotAttention(3, F, 5, d_hidden=4),
        rand(2, 4, F),
        slots=rand(2, 3, 5, seed=3),
        mask=rand(2, 4, 3, seed=2) > 0.7,
        long=True,
    ),
    "Selection": LayerCase(Selected, rand(B, F), rest=(ACTIONS,)),
    "Selection, stacked": LayerCase(lambda: Selected(stacked=True), rand(B, F), rest=(ACTIONS,)),
    "Selection, zeros": LayerCase(lambda: Selected(unused_grad="zeros"), rand(B, F), rest=(ACTIONS,)),
    "Selection, unlike modules": LayerCase(lambda: Selected(unlike()), rand(B, F), rest=(ACTIONS,)),
    "Selection, convolutions": LayerCase(
        lambda: Selected(networks.Selection(*(nn.Conv2d(2, 3, 3, padding=1) for _ in range(K)))),
        *(rand(B, 2, 4, 4),),
        rest=(ACTIONS,),
    ),
    "TopKGating, Selection": LayerCase(Mixture, rand(B, F)),
    "MoE": LayerCase(lambda: networks.MoE(F, 4, K, 2, shared_experts=1), rand(B, F)),
    "MoE, balanced by bias": LayerCase(
        lambda: networks.MoE(F, 4, K, 2, scores="sigmoid", bias_balancing=0.1, capacity=1.0, bias=True), rand(B, F)
    ),
    "REINFORCE, twice": LayerCase(two_routed, rand(B, F), rest=(TASK, LABELS), draws=True),
    "QLearning, tabular": LayerCase(
        lambda: routed("QLearning", policy_storage_type="tabular"), rand(B, F), rest=(TASK, LABELS), draws=True
    ),
    "GumbelSoftmax": LayerCase(lambda: routed("GumbelSoftmax"), rand(B, F), rest=(TASK, LABELS), draws=True),
    "RoutingLSTMCell": LayerCase(
        Step,
        rand(B, F),
        rand(B, 4, seed=2),
        rand(B, 4, seed=3),
        rest=(torch.randint(K, (B, 4), generator=seeds.generator(4)),),
    ),
    "AAC, WPL that collaborate": LayerCase(collaborating, rand(B, F), rest=(TASK, LABELS), draws=True, long=True),
    "the other decisions": LayerCase(
        lambda: decisions(*OTHERS, rewards=(None, networks.ManualReward([0.1, 0.2, 0.3]))),
        rand(B, F),
        rest=(TASK, LABELS),
        draws=True,
        long=True,
    ),
    "RELAX": LayerCase(lambda: decisions("RELAX"), rand(B, F), rest=(TASK, LABELS), draws=True, long=True),
    "RoutingGRUCell": LayerCase(
        lambda: Step(networks.RoutingGRUCell),
        rand(B, F),
        rand(B, 4, seed=2),
        rest=(torch.randint(K, (B, 4), generator=seeds.generator(4)),),
        long=True,
    ),
    "TaskRouter": LayerCase(Masked, rand(B, F), rest=(TASK,)),
    "RoutedConv2d, RoutedLinear": LayerCase(BetweenRouters, rand(B, 2, 4, 4), rest=(TASK,)),
    "live": LayerCase(live_net, rand(B, F), rest=(TASK,)),
    "live, convolutions and BatchNorm": LayerCase(live_convolutions, rand(B, 2, 4, 4), rest=(TASK,)),
    "VGG": LayerCase(vgg, rand(B, 3, 4, 4), rest=(TASK,)),
    "MMoE": LayerCase(lambda: multitask.MMoE(F, K, T, hidden_features=4, out_features=F), rand(B, F)),
    "PLE": LayerCase(lambda: multitask.PLE(F, 1, 2, T, hidden_features=4, out_features=F), rand(B, F)),
    "CrossStitch": LayerCase(lambda: multitask.CrossStitch(2), rand(B, F), rand(B, F, seed=2)),
    "CrossStitch, by channel": LayerCase(lambda: multitask.CrossStitch(2, channels=F), rand(B, F), rand(B, F, seed=2)),
    "MultiHead": LayerCase(lambda: multitask.MultiHead(F, 4, 2, T), rand(B, F)),
    "MTLModel": LayerCase(lambda: Learns("uncertainty"), rand(B, F), rand(B, 2, seed=2)),
    "MTLModel, wrapping layers": LayerCase(Wrapped, rand(B, F), long=True),
    "every weighting": LayerCase(Weighted, rand(B, F), draws=True, long=True),
    "models.RoutedCNN": LayerCase(
        lambda: scattered(
            Outputs(models.RoutedCNN(T, 3, 1, 4, blocks=1, channels=2, width=4, layers=2, modules=2)).eval()
        ),
        rand(B, 1, 4, 4),
        rest=(TASK,),
        long=True,
    ),
    "models.CapsuleHead": LayerCase(lambda: models.CapsuleHead(3, F, 2, parts=2), rand(2, 4, 2, F), long=True),
}
