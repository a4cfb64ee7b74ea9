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
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

import fastroute
from fastroute import capsules, models, multitask, networks, tasks
from fastroute.compat import PytorchRouting, heinsen_routing, heinsen_routing_2019, taskrouting, torchmtl
from fastroute.compat.PytorchRouting.DecisionLayers.Others.GumbelSoftmax import GumbelSoftmaxSampling
from fastroute.compat.PytorchRouting.PreFabs import RNNcells as cells
from fastroute.compat.PytorchRouting.RewardFunctions import Final as final
from fastroute.multitask import weighting
from fastroute.networks import unstacked_state_dict
from fastroute.networks.rewards import saved
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


class Encoder(nn.Module):
    """Two depths of hidden states, as transformers' encoders return them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.config = nn.Linear(F, F), SimpleNamespace(hidden_size=F, num_hidden_layers=1)

    def forward(self, x: Tensor, output_hidden_states: bool) -> Any:
        return SimpleNamespace(hidden_states=(x, self.layer(x)))


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


def routed_loss(m: Any, device: str) -> Any:
    y, meta = m(on(device, B, F))
    return y, networks.Loss(nn.MSELoss(), networks.NegLossReward())(y, meta, on(device, B, 2))


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


@cache
def upstreams(algo: str) -> Any:
    return {cls.__name__: cls for cls in classes() if "PytorchRouting" in cls.__module__}[algo]


def conv(**routers: Any) -> nn.Module:
    return tasks.RoutedConv2d(F, 4, 3, **routers)


evr, gmr = fastroute.EfficientVectorRouting, fastroute.GenerativeMatrixRouting
CASES: dict[str, Case] = {
    **{name: of_layer(name) for name in LAYERS},
    "GenerativeMatrixRouting, single_beta": Case(
        lambda: gmr(4, 3, 2, 2, 2, single_beta=True), lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2))
    ),
    "compat.heinsen_routing.GenerativeMatrixRouting": Case(
        lambda: heinsen_routing.GenerativeMatrixRouting(4, 3, 2, 2, 2),
        lambda m, device: m(on(device, 2, 4), on(device, 2, 4, 2, 2)),
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
    "CapsuleClassifier": Case(
        lambda: models.CapsuleClassifier(Encoder(), 3, parts=2), lambda m, device: m(on(device, 2, 4, F))
    ),
    "SmallNORB": Case(lambda: models.SmallNORB(2, 1, parts=2, channels=4), plain(2, 1, 29, 29)),
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
        lambda: networks.Sequential(
            networks.WPL(K, F, additional_reward_func=networks.CollaborationReward()),
            networks.Selection(*experts()),
            networks.REINFORCE(K, F, additional_reward_func=networks.ManualReward([1.0, 2.0, 3.0])),
            networks.Selection(*experts()),
            nn.Linear(F, 2),
        ),
        routed_loss,
    ),
    "Selection of unlike modules": Case(
        lambda: networks.Selection(nn.Linear(F, F), nn.Identity(), nn.GRUCell(F, F), store_module_pointers=True),
        triplet,
    ),
    "MoE, capacity": Case(
        lambda: networks.MoE(F, 4, K, capacity=1.0, jitter=0.1, z_loss=0.1),
        lambda m, device: m(on(device, B, F), (AGENTS > 0).to(device), return_aux=True),
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
            lambda algo=algo: upstreams(algo)(K, F, num_agents=T),  # type: ignore[misc]
            triplet,
        )
        for algo in LEARNING
    },
    **{
        f"upstream's {cls.__name__}": Case(
            lambda cls=cls: cls(F, 4, K, 2, networks.AAC, num_agents=T, formula="upstream"),
            recurrent,  # type: ignore[misc]
        )
        for cls in (cells.RoutingLSTMCell, cells.RoutingGRUCell)
    },
    "no state": Case(
        lambda: nn.ModuleList(
            [
                networks.Loss(nn.MSELoss(), networks.NegLossReward()),
                PytorchRouting.CoreLayers.Loss(nn.MSELoss(), final.NegLossReward()),
                networks.CorrectClassifiedReward(),
                final.NegLossReward(),
                final.CorrectClassifiedReward(),
                networks.PassThrough(),
                networks.PerTaskAssignment(),
                upstreams("PassThrough")(),
                upstreams("Sequential")(upstreams("Initialization")()),
                upstreams("PerTaskAssignment")(),
                PytorchRouting.Helpers.TorchHelpers.FakeFlatModuleList(PytorchRouting.CoreLayers.Selection(nn.ReLU())),
                GumbelSoftmaxSampling(),
            ]
        )
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
        lambda: nn.Sequential(router := tasks.TaskRouter(F, T, 0.5), tasks.RoutedLinear(F, 4, input_router=router)),
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
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@cache
def _modules() -> tuple[Any, ...]:
    found = pkgutil.walk_packages(fastroute.__path__, "fastroute.")
    apart = (".demos", ".kernels", "__main__", "._C", ".transformers_experts", ".distributed")  # tests/distributed
    return tuple(importlib.import_module(i.name) for i in found if not any(part in i.name for part in apart))


def classes() -> Iterator[type[nn.Module]]:
    """Every class of the package that is a module."""
    for module in _modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                yield cls


def test_every_module_with_a_state_is_in_the_table() -> None:
    """Or a subclass of it is."""
    met = {base for name in CASES for m in made(name).modules() for base in type(m).__mro__}
    new = {cls.__qualname__ for cls in set(classes()) - met}
    assert new == set(), "add each to CASES, or a row to LAYERS in tests/helpers/layers.py"


@each_case
def test_a_state_dict_is_made_of_parameters_and_buffers(name: str) -> None:
    """Before the first call and after it: the same tensors, under the same names. What rewards count is extra state."""
    m = made(name)
    for again in range(2):
        state, own = m.state_dict(), owned(m)
        for path, part in m.named_modules(remove_duplicate=False):
            if isinstance(part, networks.Decision) and "PytorchRouting" not in type(part).__module__:
                counted = saved(part.additional_reward_func)
                assert counted is None or torch.equal(state.pop(f"{path}._extra_state".lstrip(".")), counted)
        if name != "a loss with tensors":  # whose buffers come from whoever makes the model
            assert set(state) == set(own)
        assert all(t.data_ptr() == own[key].data_ptr() for key, t in state.items())
        if CASES[name].call is not None and not again:
            called(name, m)


@each_case
def test_safetensors(name: str, tmp_path: Path) -> None:
    """Each tensor is all of its memory: what was written, by either way, is read into another layer, which is it."""
    m = made(name)
    if CASES[name].call is not None:
        called(name, m)
    safetensors.save_file(m.state_dict(), tmp_path / "plain")
    safetensors.save_model(m, str(tmp_path / "model"))
    others = [made(name, seed=7) for _ in range(2)]
    others[0].load_state_dict(safetensors.load_file(tmp_path / "plain"))
    safetensors.load_model(others[1], str(tmp_path / "model"))
    for other in others:
        for key, t in m.state_dict().items():
            assert torch.equal(other.state_dict()[key].nan_to_num(), t.nan_to_num())
    if CASES[name].call is not None:
        expected = called(name, m)
        for other in others:
            same(called(name, other), expected)


#: What has modules of the user's in it, which it does not reset; DefinableVectorRouting's functions are some.
WITH_THE_USERS = ("Definable", "head", "learned weight", "a loss", "CGC of modules")


@each_case
def test_reset_parameters_sets_everything(name: str) -> None:
    """Module by module as ``apply`` goes, from garbage as ``to_empty`` leaves it."""
    m, fresh = filled(made(name).to("meta").to_empty(device="cpu")), made(name, seed=3)
    for part in reversed(list(m.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        else:  # class weights are the user's
            assert isinstance(part, nn.CrossEntropyLoss) or not (part._parameters or part._buffers), type(part)
    expected = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    for key, t in (*m.named_parameters(), *m.named_buffers()):
        if key.startswith("loss_modules."):
            continue
        like = expected[key].detach()
        assert (t.dtype, t.shape) == (like.dtype, like.shape) and bool((t.isfinite() | like.isnan()).all()), key
        if (
            like.numel() and len(like.unique()) == 1 and not (like.numel() == 1 and isinstance(t, nn.Parameter))
        ):  # nothing is drawn
            assert torch.equal(t.nan_to_num(), like.nan_to_num()), key


@each_case
def test_reset_parameters_draws_as_the_constructor(name: str) -> None:
    """The same seed, the same numbers."""
    m, fresh = made(name, seed=3), made(name)
    if not hasattr(m, "reset_parameters") or any(word in name for word in WITH_THE_USERS):
        return
    filled(m.to("meta").to_empty(device="cpu"))
    seeds.manual_seed(0)
    np.random.seed(0)
    m.reset_parameters()  # type: ignore[operator]
    same(list(owned(m).values()), list(owned(fresh).values()))


@each_case
def test_made_on_the_meta_device(name: str) -> None:
    """As large models are made: without memory, then filled from a checkpoint that becomes the layer's own."""
    m = made(name)
    if CASES[name].call is not None:
        called(name, m)
    with torch.device("meta"):
        other = made(name, seed=7)
    assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
    other.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    assert not any(t.is_meta for k, t in owned(other).items() if not k.startswith("loss_modules."))
    if CASES[name].call is not None:
        same(called(name, other), called(name, m))


@each_case
def test_reset_parameters_draws_from_the_same_distribution(name: str) -> None:
    """On all of its modules, after to_empty: two samples of Kolmogorov's and Smirnov's test; a false alarm in 1e9."""
    if name in ("QLearning, tabular", "GumbelSoftmax", "models.RoutedCNN"):  # whose parameters the row fills
        return
    resets: dict[str, list[Tensor]] = {}
    fresh: dict[str, list[Tensor]] = {}
    for seed in range(4):
        with torch.device("meta"):
            m = made(name)
        filled(m.to_empty(device="cpu"))
        seeds.manual_seed(100 + seed)
        np.random.seed(100 + seed)
        for part in reversed(list(m.modules())):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        for into, of in ((resets, m), (fresh, made(name, seed=seed))):
            for key, t in owned(of).items():
                into.setdefault(key, []).append(t.detach().double().flatten())
    for key in fresh:
        if key.startswith("loss_modules."):
            continue
        a, b = (torch.cat(of[key]).nan_to_num().sort().values for of in (resets, fresh))
        if len(a):
            at = torch.cat([a, b])
            off = (torch.searchsorted(a, at, right=True) - torch.searchsorted(b, at, right=True)).abs().max() / len(a)
            assert float(off) <= 3.27 * (2 / len(a)) ** 0.5, key


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


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_cast_changes_what_is_counted(name: str, dtype: torch.dtype) -> None:
    """Buffers that a call moves are sums, counts, means and moments."""
    m, before = made(name), made(name)
    if CASES[name].call is None or "live" in name:
        return
    called(name, m)
    of_torch = {name for name, part in m.named_modules() if type(part).__module__.startswith("torch.")}  # batch norms
    moved = [
        key for (key, t), u in zip(m.named_buffers(), before.buffers(), strict=True)
        if not torch.equal(t.nan_to_num(), u.nan_to_num()) and key.rpartition(".")[0] not in of_torch
    ]  # fmt: skip
    assert (
        not ("weighting" in name or "balancing" in name or name in ("Accuracy", "F1", "L1"))
        or moved
        or (name.split()[-1] in ("equal", "auto", "uncertainty", "imtl", "rlw", "geometric"))
    ), f"{name} remembers nothing: if it need not, add its name to the line above"
    for t in (m.get_buffer(key) for key in moved):
        t.copy_(t + 1 / 3 if t.is_floating_point() else t + 257)
    kept = {key: m.get_buffer(key).clone() for key in moved}
    m.to(dtype)
    for key, t in kept.items():
        now = m.get_buffer(key)
        assert torch.promote_types(now.dtype, t.dtype) == now.dtype
        assert torch.equal(now.nan_to_num(), t.to(now).nan_to_num())


@each_case
def test_copies(name: str) -> None:
    """deepcopy, pickle and a moving average have the same state, in memory of their own, and go on as it does."""
    m = made(name)
    if CASES[name].call is not None:
        called(name, m)
    average = AveragedModel(m, use_buffers=True)
    if m.state_dict():
        average.update_parameters(m)
        average.update_parameters(m)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), average.module):
        assert list(other.state_dict()) == list(m.state_dict())
        same(list(other.state_dict().values()), list(m.state_dict().values()))
        assert not {t.data_ptr() for t in m.parameters()} & {t.data_ptr() for t in other.parameters()}
    if CASES[name].call is not None:
        same(called(name, copy.deepcopy(m)), called(name, m))


# ------------------------------------------------------------------------------------------------- instances: stacks


def selections(stacked: bool, seed: int = 0) -> networks.Selection:
    seeds.manual_seed(seed)
    return networks.Selection(*(nn.Linear(6, 4) for _ in range(3)), stacked=stacked)


def rows(m: nn.Module) -> Tensor:
    x = on("cpu", 12, 6)
    made: Tensor = m(x, networks.Initialization()(x)[1], torch.arange(12) % 3)[0]
    return made


def loop(m: networks.Selection) -> Tensor:
    """The expected value: each module called on its samples."""
    x = on("cpu", 12, 6)
    return torch.stack([m._submodules[b % 3](x[b]) for b in range(12)])


class Routed(nn.Module):
    """A model with all that is stacked or fused."""

    def __init__(self) -> None:
        super().__init__()
        self.select, self.heads = selections(True), heads(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.select(x, networks.Initialization()(x)[1], torch.arange(len(x)) % 3)[0]
        return torch.cat(self.heads(nn.functional.pad(y, (0, 2)))[0], 1)


def test_accelerate_saves_every_expert_and_head(tmp_path: Path) -> None:
    """transformers#33807: one of three experts was written; and eight fused heads had "no suitable name to keep"."""
    seeds.manual_seed(0)
    model, other, x = Routed(), Routed(), on("cpu", 12, 6)
    y = model(x)
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert saved["select._submodules.pattern.weight"].shape == (3, 4, 6) and set(saved) == set(model.state_dict())
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), y)
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    torch.save(model.heads.h3.state_dict(), tmp_path / "head")  # its own memory, not that of all eight
    assert (tmp_path / "head").stat().st_size < size + 4000


@pytest.mark.long
def test_save_pretrained(tmp_path: Path) -> None:
    """transformers' own writer and reader, in shards too small for an expert bank and the heads together."""
    transformers = needed("transformers")

    class Pretrained(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.routed = Routed()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.routed(x)
            return made

    seeds.manual_seed(0)
    model, x = Pretrained(transformers.PretrainedConfig()), on("cpu", 12, 6)
    y = model(x)
    for size in ("1GB", "1KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert torch.equal(Pretrained.from_pretrained(tmp_path / size)(x), y)


def test_distributed_checkpoints_and_functional_call() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
    )

    seeds.manual_seed(0)
    model, other, x = Routed(), Routed(), on("cpu", 12, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    y = model(x)
    state = get_model_state_dict(model)
    assert set(state) == set(dict(model.named_parameters()))
    assert set(get_optimizer_state_dict(model, optimizer)["state"]) == set(state)
    set_model_state_dict(other, state)
    assert torch.equal(other(x), y)
    part = {k: v for k, v in state.items() if "select" in k}
    told = set_model_state_dict(Routed(), part, options=StateDictOptions(strict=False))
    assert not told.unexpected_keys and set(told.missing_keys) == set(state) - set(part)
    torch.testing.assert_close(functional_call(Routed(), dict(model.state_dict()), (x,)), y)


@pytest.mark.parametrize("assign", [False, True])
def test_experts_in_two_shards(assign: bool, tmp_path: Path) -> None:
    """Automodel#2682: each loaded with strict=False; nothing was loaded, and nothing said."""
    listed, stacked = selections(False), selections(True, seed=7)
    if assign:
        stacked.to("meta")
    state = listed.state_dict()
    shards = [{k: t for k, t in state.items() if k.startswith("_submodules.1") is first} for first in (True, False)]
    for number, shard in enumerate(shards):
        told = stacked.load_state_dict(shard, strict=False, assign=assign)
        assert not told.unexpected_keys and set(told.missing_keys) == set(state) - set(shard)
        assert bool(stacked._submodules.pattern.weight.isnan().any()) is (assign and number == 0)
    assert torch.equal(rows(stacked), rows(listed))
    with pytest.raises(RuntimeError, match=r"Missing key.*_submodules\.0\.weight"):
        selections(True).load_state_dict(shards[0])


def test_state_dicts_of_lists_and_stacks() -> None:
    """Each loads the other's strictly; a list's keys can be written."""
    listed, stacked = selections(False), selections(True, seed=7)
    assert list(stacked.state_dict()) == ["_submodules.pattern.weight", "_submodules.pattern.bias"]
    stacked.load_state_dict(listed.state_dict())
    assert torch.equal(rows(stacked), rows(listed))
    torch.testing.assert_close(rows(stacked), loop(stacked))
    written = unstacked_state_dict(nn.Sequential(nn.Linear(2, 2), stacked))
    assert list(written)[2:] == [f"1.{key}" for key in listed.state_dict()]
    assert len({t.untyped_storage().data_ptr() for t in written.values()}) == len(written)
    for state in (stacked.state_dict(), {k[2:]: t for k, t in written.items() if k.startswith("1.")}):
        for assign in (False, True):
            other = selections(False, seed=9)
            other.load_state_dict(state, assign=assign)
            assert torch.equal(rows(other), rows(listed))
            assert len({p.untyped_storage().data_ptr() for p in other.parameters()}) == 6
    for storage in ("approx", "tabular"):
        made = [
            networks.WPL(K, F, num_agents=T, policy_storage_type=storage, stacked=stacked) for stacked in (False, True)
        ]
        for a, b in (made, made[::-1]):
            a.load_state_dict(b.state_dict())
            assert all(torch.equal(t, unstacked_state_dict(a)[k]) for k, t in unstacked_state_dict(b).items())


def tied(share: bool = True) -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    if share:
        made[2].weight = made[0].weight
    return made


def test_layers_that_are_tied_within_an_expert() -> None:
    """Was: "expected offsets [2] of 1 modules", about the plan. They stay tied."""
    seeds.manual_seed(0)
    each = [tied() for _ in range(3)]
    stacked, listed = networks.Selection(*each, stacked=True), networks.Selection(*copy.deepcopy(each))
    assert len(list(stacked.parameters())) == 3 and "_submodules.pattern.2.weight" in stacked.state_dict()
    for m in (stacked, listed):
        rows(m).square().sum().backward()
    torch.testing.assert_close(rows(stacked), rows(listed))
    expected = torch.stack([listed._submodules[k][0].weight.grad for k in range(3)])
    torch.testing.assert_close(stacked._submodules.pattern[0].weight.grad, expected)
    one = stacked._submodules[1]
    assert one[2].weight is one[0].weight and torch.equal(one[0].weight, each[1][0].weight)
    other = networks.Selection(*(tied() for _ in range(3)), stacked=True)
    other.load_state_dict(listed.state_dict())
    assert torch.equal(rows(other), rows(stacked))
    with pytest.raises(ValueError, match=r"^stacked: expected the same parameters tied in all modules, but 2.weight"):
        networks.Selection(tied(), tied(False), stacked=True)
    shared = tied(False)
    with pytest.raises(ValueError, match=r"^stacked: expected modules with parameters of their own, but 0.weight of"):
        networks.Selection(shared, shared, stacked=True)


def test_a_stack_is_reset_as_its_modules_are() -> None:
    """A Linear would take a weight [K, O, F] for a convolution's: uniform to 1 / sqrt(O F)."""

    def build(stacked: bool) -> networks.Selection:
        seeds.manual_seed(0)
        return networks.Selection(
            *(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(3)), stacked=stacked
        )

    stacked, fresh = build(True), build(True)
    filled(stacked)
    seeds.manual_seed(0)
    stacked._submodules.reset_parameters()
    same(list(stacked.parameters()), list(fresh.parameters()))
    filled(stacked)
    for m in (copy.deepcopy(stacked), pickle.loads(pickle.dumps(stacked))):
        m.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        for p in (m._submodules.pattern[0].weight, m._submodules.pattern[2].bias):
            assert abs(float(p.detach().abs().max()) * 8 - 1) < 0.05
    assert "reset_parameters" not in stacked._submodules[0][0].__dict__


# ---------------------------------------------------------------------------------------------- instances: capsules


def single_beta_gradient(m: nn.Module) -> Tensor:
    a, mu = m(on("cpu", 2, 4), on("cpu", 2, 4, 2, 2))[:2]
    (a.square().sum() + mu.square().sum()).backward()
    assert isinstance(m.beta_use, nn.Parameter) and m.beta_use.grad is not None
    return m.beta_use.grad


WAYS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "as it is": lambda m, state: m,
    "load": lambda m, state: m.load_state_dict(state),
    "assign": lambda m, state: m.load_state_dict(state, assign=True),
    "meta, assign": lambda m, state: m.to("meta").load_state_dict(state, assign=True),
    "meta, to_empty, load": lambda m, state: filled(m.to("meta").to_empty(device="cpu")).load_state_dict(state),
    "meta, to_empty, reset, load": lambda m, state: WAYS["reset"](m.to("meta").to_empty(device="cpu"), state),
    "reset": lambda m, state: (m.reset_parameters(), m.load_state_dict(state)),
    "double and back": lambda m, state: m.double().float().load_state_dict(state),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["GenerativeMatrixRouting, single_beta", "2019"])
def test_one_beta_stays_one(name: str, way: str) -> None:
    """Its gradient is the sum of both betas' gradients in a layer with two; they came apart."""
    m = made(name)
    state = {k: t.clone() for k, t in m.state_dict().items()}
    assert set(state) == {"W", "B", "beta_use", "beta_ign", "CONST_one"} | ({"B_brk"} if name == "2019" else set())
    two = gmr(4, 3, 2, 2, 2) if name != "2019" else heinsen_routing_2019.Routing(2, 2, 2)
    two.load_state_dict(state)
    expected = single_beta_gradient(two) + two.beta_ign.grad
    WAYS[way](m, state)
    assert m.beta_ign is m.beta_use
    torch.testing.assert_close(single_beta_gradient(m), expected)
    with torch.no_grad():
        m.beta_use += 1
    assert torch.equal(m.state_dict()["beta_ign"], m.beta_use)  # what is saved is up to date
    state["beta_ign"] = state["beta_use"] + 1
    with pytest.raises(RuntimeError, match="beta_ign: expected the values of beta_use, which are one"):
        m.load_state_dict(state)


# ------------------------------------------------------------------------------------------------- instances: names


def by_name(m: Any) -> dict[str, Tensor]:
    x = on("cpu", B, F)
    each = {name: x * (1 + ord(name)) for name in m.tasks} if isinstance(m, multitask.CrossStitch) else x
    made: dict[str, Tensor] = m(each)
    return made


NAMED: dict[str, Callable[[list[str]], nn.Module]] = {
    "MultiHead": lambda names: multitask.MultiHead(F, [4], 2, names, returns="dict"),
    "MMoE": lambda names: multitask.MMoE(F, K, names, hidden_features=4, out_features=2, gate_bias=True),
    "CGC": lambda names: multitask.CGC(F, 2, 1, names, out_features=2),
    "CGC of modules": lambda names: multitask.CGC(
        F, [[nn.Linear(F, 2) for _ in range(2)] for _ in names], [nn.Linear(F, 2)], names
    ),
    "PLE": lambda names: multitask.PLE(F, 2, 1, names, hidden_features=4, out_features=2),
    "CrossStitch": lambda names: multitask.CrossStitch(names, channels=F),
}


@pytest.mark.parametrize("name", NAMED)
def test_tasks_take_what_has_their_name(name: str) -> None:
    """As heads of a model and weightings do: in another order, some of them, and by position where a state has none."""
    first, second = NAMED[name](NAMES), NAMED[name](NAMES[::-1])
    with torch.no_grad():
        for p in first.parameters():
            p.normal_()
    state = first.state_dict()
    second.load_state_dict(state)
    expected, found = by_name(first), by_name(second)
    for task in NAMES:
        torch.testing.assert_close(found[task], expected[task])
    first.load_state_dict(second.state_dict())  # the names that it saves are those of its own order
    torch.testing.assert_close(by_name(first), expected)
    if name != "CrossStitch":  # in which all depends on all
        third = NAMED[name](["c", "new", "a"])
        told = third.load_state_dict(state, strict=False)
        assert "task_names['new']" in told.missing_keys and "task_names['b']" in told.unexpected_keys
        if name != "PLE":  # of which the shared gate sees all tasks' experts
            torch.testing.assert_close(by_name(third)["a"], expected["a"])
            torch.testing.assert_close(by_name(third)["c"], expected["c"])
    with pytest.raises(RuntimeError, match=r"task_names\['new'\]"):
        NAMED[name](["c", "new", "a"]).load_state_dict(state)
    old = {k: t for k, t in state.items() if k != "task_names"}
    fourth = NAMED[name](NAMES[::-1])
    fourth.load_state_dict(old)
    assert [t.tolist() for k, t in fourth.state_dict().items() if k in old] == [t.tolist() for t in old.values()]


def test_metrics_go_by_name() -> None:
    class Kept(multitask.L1):
        def __init__(self) -> None:
            super().__init__()
            self._non_persistent_buffers_set.clear()

    first, second = (multitask.TaskMetrics({n: Kept() for n in names}) for names in (["a.b", "0"], ["0", "a.b"]))
    first.update([torch.zeros(2), torch.ones(2)], [torch.ones(2) * 3, torch.ones(2)])
    for state in (first.state_dict(), dict(reversed(first.state_dict().items()))):
        second.load_state_dict(state)
        assert {k: float(v) for k, v in second.compute().items()} == {"0": 0.0, "a.b": 3.0}
    numbered = {f"_modules_of.{n}.{k}": t for n, m in enumerate(first._metrics) for k, t in m.state_dict().items()}
    second.reset()
    second.load_state_dict(numbered)
    assert {k: float(v) for k, v in second.compute().items()} == {"0": 3.0, "a.b": 0.0}  # by position, as it was
    assert "" not in second.state_dict()


def test_a_cast_leaves_a_selection_bias_alone() -> None:
    """In bfloat16 0.3007 would be 0.3008."""
    gate = networks.TopKGating(K, F, bias_balancing=0.1)
    gate.selection_bias.copy_(torch.tensor([0.3007, 1.0, 257.0]))  # type: ignore[union-attr]
    kept = gate.selection_bias.clone()  # type: ignore[union-attr]
    gate.to(torch.bfloat16).half()
    assert torch.equal(gate.selection_bias, kept)  # type: ignore[arg-type]
    assert gate.router.weight.dtype == torch.float16


def test_rewards_keep_their_statistics() -> None:
    """Of what a decision has taken: a cast and a copy leave them alone, and a call on the meta device notes nothing."""
    rewards = [
        networks.RunningAverageCollaborationReward(), networks.CollaborationReward(), networks.ManualReward([0.1] * K)
    ]  # fmt: skip
    for reward in rewards:
        layer = networks.REINFORCE(K, F, additional_reward_func=reward)
        x, routed = on("cpu", B, F), networks.Loss(nn.MSELoss(), networks.NegLossReward())
        layer(x, networks.Initialization()(x)[1])
        kept = {k: t.clone() for k, t in vars(reward).items() if isinstance(t, Tensor)}
        assert kept and (reward is not rewards[0] or kept["_average"].dtype == torch.float64)
        abroad = copy.deepcopy(layer).to("meta")
        given = x.to("meta")
        routed(given, abroad(given, networks.Initialization()(given)[1])[1], given)
        for other in (layer.to(torch.bfloat16), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), abroad):
            found = {k: t for k, t in vars(other.additional_reward_func).items() if isinstance(t, Tensor)}
            assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in kept.items())
