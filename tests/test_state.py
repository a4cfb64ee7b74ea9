"""What a module's state is: what every tool that saves, loads, shards, casts or initializes it expects.

Every module of the house is in the table CASES; the instances of public bug reports follow it.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import pickle
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute import capsules, compat, multitask, networks, tasks
from fastroute.compat import PytorchRouting, heinsen_routing_2019, taskrouting, torchmtl
from fastroute.compat.PytorchRouting.DecisionLayers.Others.GumbelSoftmax import GumbelSoftmaxSampling
from fastroute.compat.PytorchRouting.PreFabs import RNNcells as cells
from fastroute.compat.PytorchRouting.RewardFunctions import Final as final
from fastroute.multitask import weighting
from fastroute.networks import unstacked_state_dict
from tests.helpers import seeds
from tests.helpers.extras import needed
from tests.helpers.layers import LAYERS, Scores, rand
from tests.helpers.networks import LEARNING

accelerate, safetensors = needed("accelerate"), needed("safetensors.torch")
F, K, B, T = 6, 3, 5, 3
NAMES = ["a", "b", "c"]
AGENTS = torch.tensor([0, 2, 1, 1, 0])


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    call: Callable[[Any, str], Any] | None = None  #: (module, device) -> outputs


def on(device: str, *shape: int) -> Tensor:
    return rand(*shape).float().to(device)


def plain(*shape: int) -> Callable[[Any, str], Any]:
    return lambda m, device: m(on(device, *shape))


def triplet(m: Any, device: str) -> Any:
    """A decision, or a selection."""
    x = on(device, B, F)
    meta = networks.Initialization()(x, AGENTS.to(device))[1]
    made = m(x, meta, AGENTS.to(device))
    return made[0], made[2]


def recurrent(m: Any, device: str) -> Any:
    return m(on(device, B, F), None, None, AGENTS.to(device))[0]


def of_layer(name: str) -> Case:
    case = LAYERS[name]

    def call(m: Any, device: str) -> Any:
        def to(t: Any) -> Any:
            return (t.float() if t.is_floating_point() else t).to(device) if isinstance(t, Tensor) else t

        options = {k: to(t) for k, t in case.options.items()}
        return m(*map(to, case.inputs), *map(to, case.rest), **options)

    return Case(case.build, call)


def experts() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(F, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, F)) for _ in range(K)]


def heads(count: int, cls: Any = multitask.MTLModel, **options: Any) -> nn.Module:
    def head() -> nn.Module:
        return nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, 2))

    nodes = [{"name": f"h{k}", "layers": head(), "loss": nn.MSELoss()} for k in range(count)]
    return cls(nodes, [node["name"] for node in nodes], **options)  # type: ignore[no-any-return]


def called_heads(m: Any, device: str) -> Any:
    return m(on(device, B, F))[0]


def auto() -> nn.Module:
    node = {"name": "h", "layers": nn.Linear(F, 2), "loss": nn.MSELoss(), "loss_weight": "auto", "loss_init_val": 0.5}
    return multitask.MTLModel([node], ["h"])


def weighted_loss() -> nn.Module:
    node = {"name": "h", "layers": nn.Linear(F, 2), "loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))}
    return multitask.MTLModel([node], ["h"])


def vgg(cls: Any = tasks.VGG, make: Any = tasks.vgg.make_layers) -> nn.Module:
    return cls(make([4, "M", 8, "M"], T, 0.5), T, bottleneck_spatial=(2, 2))  # type: ignore[no-any-return]


def losses(m: Any, device: str) -> Any:
    """Of a weighting: a total, and what it makes after an epoch."""
    first = m([on(device, 1).abs() + k for k in range(T)])
    m.step()
    return first, m([on(device, 1).abs() + 2 * k for k in range(T)])


def metric(y_hat: tuple[int, ...], y: Callable[[], Tensor]) -> Callable[[Any, str], Any]:
    def call(m: Any, device: str) -> Any:
        m.update(on(device, *y_hat), y().to(device))
        return m.compute()

    return call


def conv(**routers: Any) -> nn.Module:
    return tasks.RoutedConv2d(F, 4, 3, **routers)


evr, gmr = fastroute.EfficientVectorRouting, fastroute.GenerativeMatrixRouting
CASES: dict[str, Case] = {
    **{name: of_layer(name) for name in LAYERS},
    "GenerativeMatrixRouting, single_beta": Case(
        lambda: gmr(4, 3, 2, 2, 2, single_beta=True), lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2))
    ),
    "GenerativeMatrixRouting, return_dict": Case(
        lambda: gmr(-1, 3, 2, 2, 2, return_dict=True), lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2))
    ),
    "EfficientVectorRouting, return_dict": Case(lambda: evr(4, 3, F, 5, return_dict=True), plain(2, 4, F)),
    "DefinableVectorRouting, any length": Case(
        lambda: fastroute.DefinableVectorRouting(
            nn.Linear(F, 1), nn.Linear(F, 6), nn.Linear(2, F), Scores(), n_inp=-1, n_out=3, d_inp=F
        ),
        plain(2, 4, F),
    ),
    "2019": Case(
        lambda: heinsen_routing_2019.Routing(2, 2, 2, single_beta=True),
        lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2)),
    ),
    "2019, fixed": Case(
        lambda: heinsen_routing_2019.Routing(2, 2, 2, 4, 3),
        lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2)),
    ),
    "capsules together": Case(
        lambda: capsules.Add(
            nn.Sequential(capsules.Residual(evr(4, 4, F, F)), capsules.Concatenate(evr(4, 3, F, F))), evr(4, 3, F, F)
        ),
        plain(2, 4, F),
    ),
    "Selection of norms, stacked": Case(lambda: networks.Selection(*experts(), stacked=True), triplet),
    "TopKGating": Case(
        lambda: networks.TopKGating(K, F, bias_balancing=0.1, z_loss=0.1),
        lambda m, device: triplet(m, device),
    ),
    "MoE, bias balancing": Case(lambda: networks.MoE(F, 4, K, bias_balancing=0.1), plain(B, F)),
    "Sequential": Case(
        lambda: networks.Sequential(networks.WPL(K, F), networks.Selection(*experts()), nn.Linear(F, 2)),
        lambda m, device: m(on(device, B, F))[0],
    ),
    "MLP": Case(lambda: networks.MLP(F, 2, (4,)), plain(B, F)),
    **{
        f"{algo}, {storage}{', stacked' * stacked}": Case(
            lambda algo=algo, storage=storage, stacked=stacked: getattr(networks, algo)(  # type: ignore[misc]
                K, F, num_agents=T, policy_storage_type=storage, stacked=stacked, approx_hidden_dims=(4,)
            ),
            triplet,
        )
        for algo in LEARNING
        for storage, stacked in itertools.product(("approx", "tabular"), (False, True))
        if algo == "WPL" or (storage, stacked) == ("approx", False)
    },
    **{
        f"upstream's {algo}": Case(
            lambda algo=algo: getattr(PytorchRouting.DecisionLayers, algo)(K, F, num_agents=T),  # type: ignore[misc]
            triplet,
        )
        for algo in LEARNING
    },
    **{
        f"upstream's {cls.__name__}": Case(
            lambda cls=cls: cls(F, 4, K, 2, networks.AAC, num_agents=T, formula="upstream"), recurrent  # type: ignore[misc]
        )
        for cls in (cells.RoutingLSTMCell, cells.RoutingGRUCell)
    },
    "no state": Case(
        lambda: nn.ModuleList([
            networks.Loss(nn.MSELoss(), networks.NegLossReward()), PytorchRouting.CoreLayers.Loss(nn.MSELoss()),
            networks.CorrectClassifiedReward(), final.NegLossReward(), final.CorrectClassifiedReward(),
            networks.PassThrough(), networks.PerTaskAssignment(),
            PytorchRouting.DecisionLayers.PassThrough(), PytorchRouting.DecisionLayers.PerTaskAssignment(),
            PytorchRouting.Helpers.TorchHelpers.FakeFlatModuleList(PytorchRouting.CoreLayers.Selection(nn.ReLU())),
            GumbelSoftmaxSampling(),
        ])
    ),
    "RoutingLSTMCell": Case(
        lambda: networks.RoutingLSTMCell(F, 4, K, 2, networks.AAC, num_agents=T, stacked=True), recurrent
    ),
    "RoutingGRUCell": Case(
        lambda: networks.RoutingGRUCell(F, 4, K, 2, networks.WPL, True, recurrent=True, num_agents=T), recurrent
    ),
    "cell, not routed": Case(
        lambda: networks.RoutingLSTMCell(F, 4, K, 2, networks.AAC, False, False, num_agents=T), recurrent
    ),
    "TaskRouter, drawn by a generator": Case(
        lambda: tasks.TaskRouter(F, T, 0.5, generator=seeds.generator(3), no_orphans=True),
        lambda m, device: m(on(device, B, F), AGENTS.to(device)),
    ),
    "TaskRouter, nothing off": Case(lambda: tasks.TaskRouter(F, T, 0), plain(B, F)),
    "RoutedLinear": Case(
        lambda: nn.Sequential(
            router := tasks.TaskRouter(F, T, 0.5), tasks.RoutedLinear(F, 4, input_router=router)
        ),
        plain(B, F),
    ),
    "RoutedConv2d": Case(conv, plain(B, F, 5, 5)),
    "VGG": Case(vgg, plain(B, 3, 8, 8)),
    "VGG, live": Case(lambda: tasks.live(vgg()), plain(B, 3, 8, 8)),
    "upstream's VGG": Case(
        lambda: vgg(taskrouting.routed_vgg.VGG, taskrouting.routed_vgg.make_layers), plain(B, 3, 8, 8)
    ),
    "eight heads": Case(lambda: heads(8), called_heads),
    "eight weighted heads": Case(lambda: heads(8, weighting="uncertainty"), called_heads),
    "upstream's heads": Case(lambda: heads(3, torchmtl.MTLModel), called_heads),
    "a learned weight": Case(auto, called_heads),
    "a loss with tensors": Case(weighted_loss, called_heads),
    "outputs alone": Case(lambda: heads(8).outputs_only(), plain(B, F)),  # type: ignore[operator]
    "MultiHead, named": Case(lambda: multitask.MultiHead(F, [4, 4], 2, NAMES, returns="dict"), plain(B, F)),
    "MMoE, named": Case(
        lambda: multitask.MMoE(F, K, NAMES, hidden_features=4, out_features=2, gate_bias=True), plain(B, F)
    ),
    "CGC, named": Case(lambda: multitask.CGC(F, 2, 1, NAMES, out_features=2), plain(B, F)),
    "CGC of modules": Case(
        lambda: multitask.CGC(F, [[nn.Linear(F, 2) for _ in range(2)] for _ in NAMES], [nn.Linear(F, 2)], NAMES),
        plain(B, F),
    ),
    "PLE, named": Case(lambda: multitask.PLE(F, 2, 1, NAMES, hidden_features=4, out_features=2), plain(B, F)),
    "CrossStitch": Case(
        lambda: multitask.CrossStitch(NAMES, channels=F),
        lambda m, device: m({name: on(device, B, F) for name in NAMES}),
    ),
    "Unpack": Case(lambda: multitask.Unpack(nn.Linear(F, 2)), plain(B, F)),
    **{
        f"weighting {name}": Case(lambda name=name: weighting.WEIGHTINGS[name](NAMES), losses)  # type: ignore[misc]
        for name in weighting.WEIGHTINGS
    },
    "fixed weights": Case(lambda: weighting.FixedWeights([0.1, 0.2, 0.3]), losses),
    "Accuracy": Case(lambda: multitask.Accuracy(), metric((B, K), lambda: AGENTS)),
    "F1": Case(lambda: multitask.F1(classes=K), metric((B, K), lambda: AGENTS)),
    "L1": Case(multitask.L1, metric((B,), lambda: torch.ones(B))),
    "TaskMetrics": Case(
        lambda: multitask.TaskMetrics({name: multitask.L1() for name in NAMES}),
        lambda m, device: (m.update([on(device, B)] * T, [on(device, B) + 1] * T), m.compute())[1],
    ),
}
each_case = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:'auto' multiplies:UserWarning")  # which has a test of its own


def made(name: str, seed: int = 0) -> nn.Module:
    seeds.manual_seed(seed)
    np.random.seed(seed)
    return CASES[name].build()


def called(name: str, m: nn.Module, device: str = "cpu") -> list[Tensor]:
    call = CASES[name].call
    assert call is not None
    seeds.manual_seed(1)
    return [t for t in tree_leaves(call(m, device)) if isinstance(t, Tensor)]


def owned(m: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, by every name."""
    found = {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
    for path, part in m.named_modules(remove_duplicate=False):
        for name in part._non_persistent_buffers_set:
            found.pop(f"{path}.{name}".lstrip("."), None)
    return found


def filled(m: nn.Module) -> nn.Module:
    """Garbage in all of its memory."""
    with torch.no_grad():
        for t in (*m.parameters(), *m.buffers()):
            t.fill_(torch.nan if t.is_floating_point() else 77)
    return m


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def classes() -> Iterator[type[nn.Module]]:
    for info in pkgutil.walk_packages(fastroute.__path__, "fastroute."):
        if any(part in info.name for part in (".demos", ".kernels", "__main__", "._C", ".transformers_experts")):
            continue
        for cls in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == info.name:
                yield cls


def test_every_module_with_a_state_is_in_the_table() -> None:
    """Or a subclass of it is."""
    met = {base for name in CASES for m in made(name).modules() for base in type(m).__mro__}
    assert {cls.__qualname__ for cls in set(classes()) - met} == set()


@each_case
def test_a_state_dict_is_made_of_parameters_and_buffers(name: str) -> None:
    """Before the first call and after it: the same tensors, under the same names."""
    m = made(name)
    for again in range(2):
        state, own = m.state_dict(), owned(m)
        if name != "a loss with tensors":  # whose buffers come from whoever makes the model
            assert set(state) == set(own)
        assert all(t.data_ptr() == own[key].data_ptr() for key, t in state.items())
        if CASES[name].call is not None and not again:
            called(name, m)


@each_case
def test_safetensors(name: str, tmp_path: Path) -> None:
    """Each tensor is all of its memory: whole files, and shards by accelerate."""
    m = made(name)
    if CASES[name].call is not None:
        called(name, m)
    safetensors.save_file(m.state_dict(), tmp_path / "plain")
    safetensors.save_model(m, str(tmp_path / "model"))
    loaded = safetensors.load_file(tmp_path / "plain")
    for key, t in m.state_dict().items():
        assert torch.equal(loaded[key].nan_to_num(), t.nan_to_num())
    other = made(name, seed=7)
    safetensors.load_model(other, str(tmp_path / "model"))
    for key, t in m.state_dict().items():
        assert torch.equal(other.state_dict()[key].nan_to_num(), t.nan_to_num())


@each_case
@pytest.mark.parametrize("each", [False, True])
def test_reset_parameters_sets_everything(name: str, each: bool) -> None:
    """From garbage, as ``to_empty`` leaves it, what the constructor makes of the same seed; also module by module."""
    m = filled(made(name).to("meta").to_empty(device="cpu"))
    fresh = made(name)
    seeds.manual_seed(0)
    np.random.seed(0)
    parts = [part for part in m.modules() if part._parameters or part._buffers] if each else [m]
    if not each and not hasattr(m, "reset_parameters"):
        parts = [part for part in m.modules() if part._parameters or part._buffers]
    for part in parts:
        part.reset_parameters()
    for (key, t), (_, expected) in zip(
        (*m.named_parameters(), *m.named_buffers()), (*fresh.named_parameters(), *fresh.named_buffers()), strict=True
    ):
        assert t.dtype == expected.dtype and t.shape == expected.shape, key
        same = torch.equal(t.nan_to_num(), expected.nan_to_num())
        print(key, same)


@each_case
def test_on_the_meta_device(name: str) -> None:
    """It says what it would give: shapes and dtypes."""
    m = made(name)
    if CASES[name].call is None:
        return
    expected = called(name, m)
    found = called(name, made(name).to("meta"), "meta")
    again = called(name, m.to("meta"), "meta")
    for a, b, c in zip(found, expected, again, strict=True):
        assert a.is_meta and c.is_meta and a.shape == b.shape == c.shape and a.dtype == b.dtype == c.dtype
