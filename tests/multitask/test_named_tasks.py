"""State by the names of tasks, where a tensor is made of others, averaged, or of tasks that are counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fastroute as fr
from tests.helpers import seeds

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")  # the old style is what is tested
x = torch.randn(6, 4, generator=seeds.generator(1))
TASKS = ["a", "b"]


class Tanh(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.clamp(-0.9, 0.9).atanh()


class Running(nn.Module):
    """Of all tasks together, entry by entry: no order of the one is that of the other."""

    def forward(self, w: Tensor) -> Tensor:
        return w.cumsum(0)


def ple(tasks: Any) -> nn.Module:
    return fr.PLE(4, 1, 1, tasks, hidden_features=5, out_features=4)


LAYERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], tuple[nn.Module, str]]]] = {
    "MMoE gate": (lambda t: fr.MMoE(4, 3, t, hidden_features=5, out_features=2), lambda m: (m.gate, "weight")),
    "CGC gate": (lambda t: fr.CGC(4, 1, 2, t, out_features=3, gate_bias=True), lambda m: (m.gate, "weight")),
    "CGC experts": (lambda t: fr.CGC(4, 2, 1, t, out_features=3), lambda m: (m.task_experts, "w_in")),
    "PLE shared gate": (ple, lambda m: (m.levels[0].shared_gate, "weight")),
    "PLE experts": (ple, lambda m: (m.levels[1].task_experts, "w_out")),
    "MultiHead weight": (lambda t: fr.MultiHead(4, 3, 2, t, returns="dict"), lambda m: (m.weights, "1")),
    "MultiHead bias": (lambda t: fr.MultiHead(4, None, 3, t, returns="dict"), lambda m: (m.biases, "0")),
    "CrossStitch": (lambda t: fr.CrossStitch(t), lambda m: (m, "alpha")),
    "Uncertainty": (lambda t: fr.Uncertainty(t), lambda m: (m, "log_variance")),
}
#: What is done to a tensor, and whether it can only be refused.
WRAPS: dict[str, Callable[[nn.Module, str], Any]] = {
    "parametrized": lambda m, name: parametrize.register_parametrization(m, name, Tanh()),
    "twice": lambda m, name: [parametrize.register_parametrization(m, name, Tanh()) for _ in range(2)],
    "running": lambda m, name: parametrize.register_parametrization(m, name, Running()),
    "weight_norm": lambda m, name: parametrizations.weight_norm(m, name, dim=0),
    "weight_norm, dim 1": lambda m, name: parametrizations.weight_norm(m, name, dim=1),
    "weight_norm of all": lambda m, name: parametrizations.weight_norm(m, name, dim=None),
    "spectral_norm": lambda m, name: parametrizations.spectral_norm(m, name),
    "spectral_norm, dim 1": lambda m, name: parametrizations.spectral_norm(m, name, dim=1),
    "orthogonal": lambda m, name: parametrizations.orthogonal(m, name),
    "pruned": lambda m, name: prune.random_unstructured(m, name, amount=1),
    "old weight_norm": lambda m, name: weight_norm(m, name, dim=0),
    "old weight_norm, dim 1": lambda m, name: weight_norm(m, name, dim=1),
    "old weight_norm of all": lambda m, name: weight_norm(m, name, dim=None),
    "old spectral_norm": lambda m, name: spectral_norm(m, name),
    "old spectral_norm, dim 1": lambda m, name: spectral_norm(m, name, dim=1),
}
#: With these no order of tasks is refused.
TOLD = ("parametrized", "twice", "weight_norm", "pruned", "old weight_norm")


def output(m: Any) -> dict[str, Tensor]:
    if isinstance(m, fr.Weighting):
        m(torch.ones(2))  # hooks of the old style run in a call
        return dict(zip(m.tasks, m.log_variance.detach(), strict=True))
    return m(dict(zip(TASKS, (x, x.flip(0)), strict=True))) if isinstance(m, fr.CrossStitch) else m(x)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_tensor_made_of_others_goes_by_name_or_is_refused(layer: str, wrap: str) -> None:
    make, of = LAYERS[layer]
    seeds.manual_seed(0)
    first, second, same = (make(order) for order in (TASKS, TASKS[::-1], TASKS))
    for p in first.parameters():
        nn.init.normal_(p)
    try:
        for m in (first, second, same):
            WRAPS[wrap](*of(m))
    except Exception as error:  # PyTorch has nothing of the kind for such a tensor
        assert wrap not in ("parametrized", "pruned"), error
        return
    for m in (first, second, same):
        m.eval()
    with torch.no_grad():
        output(first)
        state = first.state_dict()
        same.load_state_dict(state)  # no other order, nothing to refuse
        try:
            second.load_state_dict(state)
        except RuntimeError as error:
            assert wrap not in TOLD and "made of does not tell" in str(error)
            return
        assert wrap != "running" or layer == "PLE shared gate"  # whose tasks are on another axis
        expected, made = output(first), output(second)
    for task in TASKS:
        torch.testing.assert_close(made[task], expected[task], rtol=1e-4, atol=1e-5)


def test_norms_whose_singular_vectors_tell() -> None:
    """``spectral_norm`` of [T, E, D]: u has the tasks, v has not; its default, not square."""
    for wrap in ("spectral_norm", "old spectral_norm"):
        first, second = (fr.MMoE(4, 3, t, hidden_features=5, out_features=2) for t in (TASKS, TASKS[::-1]))
        for m in (first, second):
            WRAPS[wrap](m.gate, "weight")
            m(x)
        second.load_state_dict(first.state_dict())
        names = [name for name in first.state_dict() if name.endswith(("_u", ".0._u"))]
        assert len(names) == 1
        assert torch.equal(second.state_dict()[names[0]], first.state_dict()[names[0]].flip(0))


def test_what_is_put_around_experts() -> None:
    """Their names may have more parts; where they have others, an order cannot be told."""

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.hidden_features = inner, None

    first, second = (fr.CGC(4, 2, 1, t, out_features=3) for t in (TASKS, TASKS[::-1]))
    for m in (first, second):
        m.task_experts = torch.compile(m.task_experts, backend="eager")
    second.load_state_dict(first.state_dict())
    for task in TASKS:
        torch.testing.assert_close(second(x)[task], first(x)[task])
    for m in (first, second):
        m.task_experts = Around(m.task_experts)
    with pytest.raises(RuntimeError, match=r"task_experts.w_in: expected a tensor with entries for each task"):
        second.load_state_dict(first.state_dict())


# ------------------------------------------------------------------------------------------------------------ averages


def average(kept: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for a, b in zip(kept.values(), new.values(), strict=True):
        a.copy_(a * 0.9999 + b * (1 - 0.9999))


@pytest.mark.parametrize("layer", LAYERS)
def test_an_average_of_all_of_a_state_dict(layer: str) -> None:
    """In place, names among it: as timm's ModelEmaV2."""
    tasks = ["price", "kind"]
    make, _ = LAYERS[layer]
    model = make(tasks)
    mean = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(3):
            average(mean.state_dict(), model.state_dict())
    assert bytes(mean.state_dict()["task_names"].tolist()) == b'["price", "kind"]'
    second = make(tasks[::-1])
    second.load_state_dict(mean.state_dict())
    make(tasks).load_state_dict(second.state_dict())


def test_a_state_of_what_was_made_in_inference() -> None:
    with torch.inference_mode():
        layer = fr.Uncertainty(TASKS)
    assert bytes(layer.state_dict()["task_names"].tolist()) == b'["a", "b"]'


# ------------------------------------------------------------------------------------------------------------ numbers

COUNTING: dict[str, Callable[[Any], Any]] = {
    "Uncertainty": fr.Uncertainty,
    "DWA": fr.DWA,
    "MultiHead": lambda n: fr.MultiHead(4, None, 2, n),
    "MMoE": lambda n: fr.MMoE(4, 3, n, hidden_features=5, out_features=2),
    "PLE": ple,
    "CrossStitch": fr.CrossStitch,
    "EachTask": fr.EachTask,
    "ToTasks": fr.ToTasks,
}


@pytest.mark.parametrize("count", [3, np.int64(3), np.uint8(3), torch.tensor(3)], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("name", COUNTING)
def test_whatever_is_an_index_counts_tasks(name: str, count: Any) -> None:
    layer, plain = COUNTING[name](count), COUNTING[name](3)
    assert repr(layer) == repr(plain)
    if isinstance(layer, nn.Module):
        assert getattr(layer, "tasks", None) == getattr(plain, "tasks", None)
        assert list(layer.state_dict()) == list(plain.state_dict())  # numbers are no names


@pytest.mark.parametrize("count", [True, np.bool_(True), 3.0, np.float64(3), torch.tensor(3.0), "abc"], ids=repr)
@pytest.mark.parametrize("name", COUNTING)
def test_nothing_else_does(name: str, count: Any) -> None:
    with pytest.raises(TypeError, match="tasks: expected"):
        COUNTING[name](count)
