"""What people do with a module, tried on every layer: docs/works_with.md is written from helpers/matrix.py.

``python -m tests.test_works_with`` rewrites the page. A cell says that it works, or what is said instead; other test
modules try some of the columns.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map_only

import fastroute
from tests.helpers import seeds
from tests.helpers.layers import LAYERS, LayerCase, rand
from tests.helpers.matrix import COLUMNS, LIMITS, REFUSED, TITLES, WITHOUT_ROW, cell, page, tried
from tests.helpers.threads import in_threads

PAGE = Path(__file__).resolve().parents[1] / "docs" / "works_with.md"
F64 = torch.float64


def outputs(layer: nn.Module, case: LayerCase, dtype: torch.dtype = F64) -> list[Tensor]:
    """All floating-point outputs; random draws are the same at every call."""
    seeds.manual_seed(1)
    inputs = [t.to(dtype) for t in case.inputs]
    options = {
        k: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in case.options.items()
    }
    made = tree_leaves(layer(*inputs, *case.rest, **options))
    return [t for t in made if isinstance(t, Tensor) and t.is_floating_point()]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def other(case: LayerCase) -> nn.Module:
    """The same layer with other parameters."""
    layer = case.layer()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    return layer


def deepcopied(case: LayerCase) -> None:
    layer = case.layer()
    made = copy.deepcopy(layer)
    same(outputs(made, case), outputs(layer, case))
    assert not {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in made.parameters()}


def pickled(case: LayerCase) -> None:
    layer = case.layer()
    same(outputs(pickle.loads(pickle.dumps(layer)), case), outputs(layer, case))


def saved(case: LayerCase) -> None:
    """torch.save of the state dict, torch.load with weights_only=True, strictly into another layer."""
    layer, file = case.layer(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    made = other(case)
    made.load_state_dict(torch.load(file, weights_only=True))
    same(outputs(made, case), outputs(layer, case))


def compiled(case: LayerCase, dynamic: bool = False) -> None:
    """As one graph; values and gradients are those of the layer."""
    torch._dynamo.reset()
    found = []
    for layer in (case.layer(), case.layer()):
        step: Callable[..., list[Tensor]] = outputs
        if found:
            graph = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            made = outputs(graph, case)  # type: ignore[arg-type]
        else:
            made = step(layer, case)
        sum((t.square().sum() for t in made), torch.zeros((), dtype=F64)).backward()
        found.append([*made, *(p.grad for p in layer.parameters() if p.grad is not None and p.grad.any())])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def exported(case: LayerCase) -> None:
    layer = case.layer().eval()
    program = torch.export.export(layer, (*case.inputs, *case.rest), case.options)
    for a, b in zip(outputs(program.module(), case), outputs(layer, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def near(made: list[Tensor], exact: list[Tensor], case: LayerCase) -> None:
    """Finite, and where no draw may have become another one, within a tenth of the largest."""
    size = torch.inf if case.draws else max(float(t.detach().abs().max()) for t in exact)
    for a, b in zip(made, exact, strict=True):
        assert a.isfinite().all() and float((a.to(F64) - b).abs().max()) < 0.1 * size


def by_differences(case: LayerCase) -> None:
    """The gradients along a direction of all parameters and inputs, against differences of fourth order."""
    layer = case.layer()
    f, inputs = case.function(layer), [t.clone().requires_grad_() for t in case.inputs]
    own = dict(layer.named_parameters())
    leaves = [*own.values(), *inputs]
    direction = [rand(*t.shape, seed=3 + i) for i, t in enumerate(leaves)]

    def at(k: float) -> Tensor:
        moved = [t.detach() + k * 1e-4 * v for t, v in zip(leaves, direction, strict=True)]
        made: Tensor = f(dict(zip(own, moved, strict=False)), *moved[len(own) :])
        return made.detach()

    y = f(own, *inputs)
    w = rand(*y.shape, seed=9)
    grads = torch.autograd.grad(y, leaves, w, allow_unused=True)
    slope = sum((float((g * v).sum()) for g, v in zip(grads, direction, strict=True) if g is not None), 0.0)
    expected = float(w @ (8 * (at(1) - at(-1)) - (at(2) - at(-2)))) / 12e-4
    assert abs(slope - expected) <= 1e-7 * max(1, abs(expected)) and abs(slope) > 1e-3


def in_dtype(dtype: torch.dtype) -> Callable[[LayerCase], None]:
    def run(case: LayerCase) -> None:
        """Near float64, and gradients of every parameter that has one there."""
        layer = case.layer().to(dtype)
        made = outputs(layer, case, dtype)
        exact = outputs(case.layer().to(dtype).to(F64), case)
        near(made, exact, case)
        sum((t.float().sum() for t in made), torch.zeros(())).backward()
        assert any(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())

    return run


def under_autocast(case: LayerCase) -> None:
    layer = case.layer().float()
    exact = outputs(layer, case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made = outputs(layer, case, torch.float32)
    near(made, exact, case)


def in_inference_mode(case: LayerCase) -> None:
    layer = case.layer()
    expected = [t.detach() for t in outputs(layer, case)]
    with torch.inference_mode():
        same(outputs(layer, case), expected)
    outputs(layer, case)[0].sum().backward()  # nothing of it is left behind


def averaged(case: LayerCase) -> None:
    layer = case.layer()
    mean = AveragedModel(layer)
    mean.update_parameters(layer)
    mean.update_parameters(other(case))
    made = other(case)
    with torch.no_grad():
        for p, q in zip(made.parameters(), layer.parameters(), strict=True):
            p.copy_((p + q) / 2)
    for a, b in zip(outputs(mean.module, case), outputs(made, case), strict=True):
        torch.testing.assert_close(a, b)


def on_threads(case: LayerCase) -> None:
    """Four at once, on a layer that no one has called before. In eval where threads would share the draws."""
    expected = [t.detach() for t in outputs(case.layer().eval() if case.draws else case.layer(), case)]
    layer = case.layer().eval() if case.draws else case.layer()

    def run(_: int) -> list[Tensor]:
        made = tree_leaves(layer(*case.inputs, *case.rest, **case.options))
        return [t.detach() for t in made if isinstance(t, Tensor) and t.is_floating_point()]

    for made in in_threads(run):
        same(made, expected)


def on_fake_tensors(case: LayerCase) -> None:
    """Of which reading a number is an error."""
    expected = outputs(case.layer(), case)
    with FakeTensorMode():
        layer = case.build().train()  # of float32
        given = tree_map_only(
            Tensor,
            lambda t: torch.empty(t.shape, dtype=torch.float32 if t.is_floating_point() else t.dtype),
            (case.inputs, case.rest, case.options),
        )
        made = [t for t in tree_leaves(layer(*given[0], *given[1], **given[2])) if isinstance(t, Tensor)]
        made = [t for t in made if t.is_floating_point()]
        assert [t.shape for t in made] == [t.shape for t in expected]
        torch.cat([t.reshape(-1) for t in made]).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in layer.parameters())


TRIED: dict[str, Callable[[LayerCase], None]] = {
    "deepcopy": deepcopied,
    "pickle": pickled,
    "weights_only": saved,
    "compile": compiled,
    "dynamic": lambda case: compiled(case, dynamic=True),
    "export": exported,
    "autocast": under_autocast,
    "fp64": by_differences,
    "bf16": in_dtype(torch.bfloat16),
    "fp16": in_dtype(torch.float16),
    "inference": in_inference_mode,
    "EMA": averaged,
    "threads": on_threads,
    "fake": on_fake_tensors,
}
LONG = ("compile", "dynamic", "export")


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[pytest.mark.long] if title in LONG else []) for title in TRIED]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if LAYERS[name].long else []) for name in LAYERS]
)
def test_works(name: str, title: str) -> None:
    if name in tried(title):
        cell(name, title, lambda: TRIED[title](LAYERS[name]))


def test_the_page_is_of_this_table() -> None:
    assert PAGE.read_text() == page(), "python -m tests.test_works_with rewrites it"


def test_every_public_module_has_a_row() -> None:
    """Or a row has a subclass of it, or the page says why there is none."""
    found = pkgutil.walk_packages(fastroute.__path__, "fastroute.")
    apart = (".demos", ".kernels", "__main__", "._C", ".on_path")
    packages = [fastroute, *(importlib.import_module(i.name) for i in found if not any(a in i.name for a in apart))]
    public = [getattr(package, name) for package in packages for name in getattr(package, "__all__", ())]
    modules = {t for t in public if inspect.isclass(t) and issubclass(t, nn.Module) and "fastroute" in t.__module__}
    met = {base for case in LAYERS.values() for m in case.layer().modules() for base in type(m).__mro__}
    names = [f"{t.__module__}.{t.__qualname__}" for t in modules - met]
    assert [name for name in names if not name.startswith((*WITHOUT_ROW,))] == []
    assert all(any(name.startswith(start) for name in names) for start in WITHOUT_ROW), "a reason for what has a row"


def test_cells_of_the_table_are_of_its_rows_and_columns() -> None:
    assert {*REFUSED, *LIMITS} <= {(name, title) for name in LAYERS for title in TITLES}
    assert all((PAGE.parents[1] / "tests" / f"test_{c.where}.py").exists() for c in COLUMNS)


if __name__ == "__main__":
    PAGE.write_text(page())
