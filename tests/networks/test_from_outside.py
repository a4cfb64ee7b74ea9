"""Networks as other people's code finds and changes them: traced, pickled, wrapped, overridden, looked at."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastroute
from fastroute import networks

x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
actions = torch.arange(12) % 3
SELECTIONS: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(6, 6) for _ in range(3)],
    "norm": lambda: [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3)],
    "unlike": lambda: [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Identity()],
}


def select(layer: networks.Selection, x: Tensor, actions: Tensor) -> Tensor:
    made: Tensor = layer(x, networks.Trajectory(12), actions)[0]
    return made


def loop(layer: networks.Selection, x: Tensor, actions: Tensor) -> Tensor:
    return torch.cat([layer._submodules[int(a)](x[i : i + 1]) for i, a in enumerate(actions)])  # type: ignore[operator, index]


@pytest.mark.parametrize("trace", ["jit", "make_fx", "pre_dispatch"])
@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_trace_keeps_no_counts(kind: str, trace: str) -> None:
    layer = networks.Selection(*SELECTIONS[kind]()).double().eval().requires_grad_(False)

    def f(x: Tensor, actions: Tensor) -> Tensor:
        return select(layer, x, actions)

    if trace == "jit":
        traced = torch.jit.trace(f, (x, actions), check_trace=False)
    else:
        traced = make_fx(f, pre_dispatch=trace == "pre_dispatch")(x, actions)
    others = torch.tensor([2, 2, 0, 1] * 3)
    torch.testing.assert_close(traced(2 * x, others), loop(layer, 2 * x, others))


def test_a_trace_in_training_names_what_it_cannot() -> None:
    layer = networks.Selection(*SELECTIONS["unlike"]()).double()
    with pytest.raises(ValueError, match=r"^modules: expected eval mode to export or trace"):
        make_fx(lambda x, a: select(layer, x, a))(x, actions)


@pytest.mark.parametrize("gated", [True, False])
def test_a_traced_mixture(gated: bool) -> None:
    layer = networks.MoE(6, 8, 4, gated=gated).double()
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(3 * x), layer(3 * x))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return 2 * made if func is F.linear else made


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_function_mode_sees_what_modules_call(kind: str) -> None:
    layer = networks.Selection(*SELECTIONS[kind]()).double()
    before = select(layer, x, actions)
    with Doubling():
        torch.testing.assert_close(select(layer, x, actions), loop(layer, x, actions))
    assert torch.equal(select(layer, x, actions), before)


DECISIONS = [
    name for name in networks.decisions.__all__ if hasattr(getattr(networks.decisions, name), "algorithm")
    and name not in ("Decision", "RELAX", "GumbelSoftmax")
]  # fmt: skip


@pytest.mark.parametrize("how", ["assigned", "replaced", "in place"])
@pytest.mark.parametrize("name", DECISIONS)
def test_columns_are_read_at_the_actions_that_a_subclass_takes(name: str, how: str) -> None:
    class Other(getattr(networks.decisions, name)):  # type: ignore[misc]
        def decide(self, x: Tensor, plan: Any, forced: Any) -> Any:
            made = super().decide(x, plan, forced)
            if how == "assigned":
                made.actions = (made.actions + 1) % 3
            elif how == "replaced":
                made = replace(made, actions=(made.actions + 1) % 3)
            else:
                made.actions.add_(1).remainder_(3)
            return made

    meta = networks.Trajectory(12)
    taken = Other(3, 6, num_agents=2).double()(x, meta, actions % 2)[2]
    for column in meta.records[0].columns:
        assert torch.equal(
            column.at(taken), column.full.expand(12, -1).gather(1, taken[:, None] % column.full.shape[1])[:, 0]
        )


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_a_routed_sequential_knows_its_members_in_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = networks.Sequential(networks.QLearning(3, 6), networks.Selection(*SELECTIONS["linear"]())).double().eval()
    right, meta = net(x)
    with torch.compiler.set_stance("force_eager"):
        made, of = networks.Sequential(*(wrap(m) for m in list(net.children())[1:]))(x)
    assert torch.equal(made, right)
    assert torch.equal(of.actions, meta.actions)


def test_a_trajectory_can_be_pickled_and_copied() -> None:
    net = networks.Sequential(networks.EGreedyAAC(3, 6), networks.Selection(*SELECTIONS["linear"]())).double()
    with torch.no_grad():
        made, meta = net(x)
    loss = networks.Loss(nn.MSELoss(), networks.NegLossReward())
    right = loss(made, meta, x)
    for again in (pickle.loads(pickle.dumps(meta)), copy.deepcopy(meta)):
        assert torch.equal(torch.stack(loss(made, again, x)), torch.stack(right))
        assert torch.equal(again.exploratory, meta.exploratory)


@pytest.mark.parametrize("tasks", [[1.5] * 12, torch.full((12,), 0.5), torch.zeros(12) * 1j, [float("nan")] * 12])
def test_labels_that_choose_are_whole_numbers(tasks: Any) -> None:
    with pytest.raises(TypeError, match=r"^tasks: expected integers"):
        networks.Trajectory(12, tasks).task_indices(x.device)


@pytest.mark.parametrize("key", [torch.tensor([True, False]), [True], [0.5], torch.tensor([1.0])])
def test_samples_are_picked_by_indices_or_a_flag_for_each(key: Any) -> None:
    with pytest.raises(IndexError, match=r"^meta: expected indices, or a bool for each of 12 samples"):
        networks.Trajectory(12)[key]


# ------------------------------------------------------------------------------------------------------------- losses


def _losses(loss: networks.Loss, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of every sample the modules' loss, and its reward, by that of a decision for one thing."""
    torch.manual_seed(0)
    meta = networks.Trajectory(12)
    decide = networks.REINFORCE(3, 6).double()
    decide(x, meta)
    made, routing = loss(x, meta, truth, reduce=False)
    return made, routing / -meta.records[0].columns[0].at(meta.actions[0])


def test_a_loss_function_is_called_as_it_is_now() -> None:
    inner = nn.CrossEntropyLoss()
    loss, truth = networks.Loss(inner, networks.NegLossReward()), torch.arange(12) % 6
    inner.label_smoothing = 0.3
    right = F.cross_entropy(x, truth, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(_losses(loss, truth)[0], right)
    inner.weight = torch.rand(6, dtype=torch.float64)
    right = F.cross_entropy(x, truth, inner.weight, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(_losses(loss, truth)[0], right)
    assert list(loss.state_dict()) == ["pytorch_loss_func.weight"]
    loss.load_state_dict({"pytorch_loss_func.weight": inner.weight, "_per_sample.weight": inner.weight})
    inner.forward = lambda a, b: (a.sum(1) - b) ** 2  # type: ignore[method-assign, misc]
    torch.testing.assert_close(_losses(loss, truth)[0], (x.sum(1) - truth) ** 2)
    loss.pytorch_loss_func = nn.L1Loss()
    torch.testing.assert_close(_losses(loss, x + 2)[0], torch.full((12,), 12.0, dtype=torch.float64))
    assert inner.reduction == "mean"


def test_a_loss_function_without_a_module_can_be_replaced() -> None:
    loss = networks.Loss(F.mse_loss, networks.NegLossReward())
    loss.pytorch_loss_func = lambda a, b: (a - b).abs().sum(1)
    torch.testing.assert_close(_losses(loss, x + 2)[0], torch.full((12,), 12.0, dtype=torch.float64))


def test_a_reward_function_that_remembers_is_called_sample_by_sample() -> None:
    class Relative:
        """The reward beside its running mean."""

        def __init__(self) -> None:
            self.mean: Any = 0.0

        def __call__(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
            made = -loss - self.mean
            self.mean = 0.9 * self.mean - 0.1 * loss
            return made

    seen: list[float] = []

    def noted(loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        seen.append(float(loss))
        return -loss

    losses, got = _losses(networks.Loss(nn.MSELoss(), Relative()), x + x.flip(0))
    mean, right = 0.0, []
    for loss in losses.tolist():
        right.append(-loss - mean)
        mean = 0.9 * mean - 0.1 * loss
    torch.testing.assert_close(got, torch.tensor(right, dtype=torch.float64))
    _losses(networks.Loss(nn.MSELoss(), noted), x + x.flip(0))
    assert seen == losses.tolist()


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("layout", ["coo", "csr", "jagged"])
def test_only_dense_tensors_are_taken(layout: str) -> None:
    given = {
        "coo": lambda: x.to_sparse(),
        "csr": lambda: x.to_sparse_csr(),
        "jagged": lambda: torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged),
    }[layout]()
    layer = networks.Selection(*SELECTIONS["linear"]()).double()
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("batch", lambda: layer(given, networks.Trajectory(given.shape[0]), actions)),
        ("x", lambda: networks.MoE(6, 8, 4).double()(given)),
        ("x_inp", lambda: fastroute.EfficientVectorRouting(12, 4, 6, 5).double()(given)),
        ("x_inp", lambda: fastroute.SlotAttention(3, 6, 5).double()(given)),
        ("x", lambda: networks.RoutingGRUCell(6, 5, 3, 1, networks.REINFORCE).double()(given)),
    ]  # fmt: skip
    for name, call in calls:
        with pytest.raises(TypeError, match=rf"^{name}: expected .*dense, got"):
            call()


def test_functions_name_what_is_not_dense() -> None:
    with pytest.raises(TypeError, match=r"^scores: expected .*dense, got"):
        fastroute.functional.policy(x.to_sparse())


@pytest.mark.parametrize("stacked", [False, True])
def test_a_network_that_is_made_in_inference_mode(stacked: bool) -> None:
    """Its parameters have no versions."""

    def results() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        start, decide = networks.Initialization(), networks.WPL(3, 8, num_agents=2, stacked=stacked)
        select = networks.Selection(*(nn.Linear(8, 3) for _ in range(3)), stacked=stacked)
        y, meta, _ = start(torch.randn(6, 8))
        y, meta, actions = select(*decide(y, meta, torch.arange(6) % 2))
        loss = networks.Loss(nn.CrossEntropyLoss(), networks.NegLossReward())
        return y, actions, *loss(y, meta, torch.arange(6) % 3)

    with torch.no_grad():
        expected = results()
    with torch.inference_mode():
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert a.is_inference() and torch.equal(a, b)


@pytest.mark.parametrize(
    "make, shape", [(lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)), (lambda: nn.Linear(6, 3), (7, 6))], ids=["conv", "linear"]
)
def test_an_error_is_not_said_of_the_plan(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """The layer's own plan has several rows for each sample: it is no fault of these when something else fails."""
    with torch.inference_mode():
        select = networks.Selection(*(make() for _ in range(3)))
    y, meta, _ = networks.Initialization()(torch.randn(5, *shape))
    with pytest.raises(RuntimeError, match=r"expected no tensor of torch\.inference_mode"):
        select(y, meta, torch.tensor([0, 2, -1, 1, 0]))
