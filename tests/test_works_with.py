"""What people do with a module, tried on every layer: docs/works_with.md is written from the table here.

``python -m tests.test_works_with`` rewrites the page. A cell says that it works, or what is said instead; the columns
on derivatives are tried in test_derivatives.py, ONNX in test_onnx.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from tests.helpers import seeds
from tests.helpers.layers import LAYERS, LayerCase
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


def in_dtype(dtype: torch.dtype) -> Callable[[LayerCase], None]:
    def run(case: LayerCase) -> None:
        """Near float64, and gradients of every parameter that has one there."""
        layer = case.layer().to(dtype)
        made = outputs(layer, case, dtype)
        exact = outputs(case.layer().to(dtype).to(F64), case)
        size = max(float(t.detach().abs().max()) for t in exact)
        for a, b in zip(made, exact, strict=True):
            assert a.isfinite().all() and float((a.to(F64) - b).abs().max()) < 0.1 * size
        sum((t.float().sum() for t in made), torch.zeros(())).backward()
        assert any(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())

    return run


def under_autocast(case: LayerCase) -> None:
    layer = case.layer().float()
    exact = outputs(layer, case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        made = outputs(layer, case, torch.float32)
    size = max(float(t.detach().abs().max()) for t in exact)
    for a, b in zip(made, exact, strict=True):
        assert float((a.float() - b).abs().max()) < 0.1 * size


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
    """Four at once, on a layer that no one has called before."""
    expected = [t.detach() for t in outputs(case.layer(), case)]
    layer = case.layer()

    def run(_: int) -> list[Tensor]:
        made = tree_leaves(layer(*case.inputs, *case.rest, **case.options))
        return [t.detach() for t in made if isinstance(t, Tensor) and t.is_floating_point()]

    for made in in_threads(run):
        same(made, expected)


class Column(NamedTuple):
    title: str
    what: str
    try_: Callable[[LayerCase], None] | None = None  #: None: tried in test_derivatives.py, test_onnx.py
    is_long: bool = False


COLUMNS = (
    Column("deepcopy", "`copy.deepcopy`: the same values, no memory in common", deepcopied),
    Column("pickle", "`pickle` of the module", pickled),
    Column("weights_only", "`torch.save` of the state dict, `torch.load(weights_only=True)`, strict", saved),
    Column("compile", "`torch.compile(fullgraph=True)`, values and gradients", compiled, True),
    Column("dynamic", "the same with `dynamic=True`", lambda case: compiled(case, dynamic=True), True),
    Column("export", "`torch.export.export`", exported, True),
    Column("ONNX", "`torch.onnx.export(dynamo=True)`, run by onnxruntime, for any batch size"),
    Column("autocast", "`torch.autocast` to bfloat16", under_autocast),
    Column("bf16", "the module in bfloat16, with gradients", in_dtype(torch.bfloat16)),
    Column("fp16", "the module in float16, with gradients", in_dtype(torch.float16)),
    Column("inference", "`torch.inference_mode`, and training after it", in_inference_mode),
    Column("EMA", "`torch.optim.swa_utils.AveragedModel`", averaged),
    Column("threads", "first calls from four threads at once, to the bit", on_threads),
    Column("grad", "`torch.func.functional_call` and `grad`"),
    Column("vmap", "ensembles by `vmap`, and `vmap(grad)` for each sample"),
    Column("jvp", "forward mode"),
    Column("2nd", "second derivatives (`create_graph=True`, Jacobians, Hessians)"),
    Column("checkpoint", "`torch.utils.checkpoint`, both kinds, to the bit"),
)
TRIED = [
    pytest.param(c, id=c.title, marks=[pytest.mark.long] if c.is_long else []) for c in COLUMNS if c.try_ is not None
]
#: What does not work: (layer, column) and the beginning of what is said.
REFUSED: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("column", TRIED)
@pytest.mark.parametrize("name", LAYERS)
def test_works(name: str, column: Column) -> None:
    assert column.try_ is not None
    refused = REFUSED.get((name, column.title))
    if refused is None:
        column.try_(LAYERS[name])
        return
    with pytest.raises(Exception, match=refused):
        column.try_(LAYERS[name])


def page() -> str:
    head = "| | " + " | ".join(c.title for c in COLUMNS) + " |"
    rows = []
    notes: list[str] = []
    for name in LAYERS:
        cells = []
        for column in COLUMNS:
            said = REFUSED.get((name, column.title))
            if said is not None and said not in notes:
                notes.append(said)
            cells.append("yes" if said is None else f"no ({notes.index(said) + 1})")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    parts = [
        "# What works with what",
        "Each cell is a test in `tests/test_works_with.py`, `tests/test_derivatives.py` or `tests/test_onnx.py`, on a "
        "CPU, with small layers."
        "\nThis page is written from the tests' table.",
        "\n".join([head, "|---" * (len(COLUMNS) + 1) + "|", *rows]),
        "\n".join(f"* **{c.title}**: {c.what}" for c in COLUMNS),
    ]
    if notes:
        parts.append("What is said instead:\n\n" + "\n".join(f"{i}. {said}" for i, said in enumerate(notes, 1)))
    return "\n\n".join(parts) + "\n"


def test_the_page_is_of_this_table() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
