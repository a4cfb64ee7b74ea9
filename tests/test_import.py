"""What ``import fastroute`` brings with it, and what is told to PyTorch's modules that are imported after it."""

from __future__ import annotations

import gc
import json
import sys

import pytest

from fastroute.importing import uncollected, when_imported
from tests.helpers.subprocesses import check_python

#: What takes long to import, or is nobody's business who imports a layer.
HEAVY = {
    "torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torch.profiler", "torch.testing", "triton",
    "sympy", "mpmath", "matplotlib", "networkx", "transformers", "sklearn", "scipy", "pandas", "rich", "lightning",
    "tensorboard", "safetensors", "onnx", "torchvision", "IPython", "fastroute.plots", "fastroute.data",
    "fastroute.compat", "fastroute.demos", "fastroute.cli", "fastroute.kernels",
}  # fmt: skip

IN_A_NEW_PROCESS = """
import json, sys
import torch

seen = [set(sys.modules)]
import fastroute
seen.append(set(sys.modules))
x = torch.randn(3, 5, 4)
routed = fastroute.EfficientVectorRouting(5, 2, 4, 3)
mixed = fastroute.MoE(4, 8, num_experts=3, k=2)
(routed(x).sum() + mixed(x).sum()).backward()
fastroute.TaskRouter(4, 2, 0.5)(x[:, 0].requires_grad_(), task=1).sum().backward()
seen.append(set(sys.modules))
told = {}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    routed(x)
told["flops"] = counter.get_total_flops()
import torch._dynamo
from fastroute.modules.reading import is_pristine
told["constant"] = is_pristine._dynamo_marked_constant
told["loaders"] = [type(m.__spec__.loader).__module__ for m in (torch._dynamo, sys.modules[FlopCounterMode.__module__])]
told["finders"] = [type(f).__module__ for f in sys.meta_path if type(f).__module__.startswith("fastroute")]
compiled = torch.compile(lambda t: 2 * routed.stream(t), backend="eager")
with torch.no_grad():
    told["same"] = bool(torch.equal(compiled(x), 2 * routed.stream(x)))
print(json.dumps({"seen": [sorted(names) for names in seen], **told}))
"""


def test_what_an_import_brings() -> None:
    """Nothing heavy with the import, nor with a training step on a CPU; later imports are told what they need."""
    ignored = "ignore:the C++ extension,ignore:Guards may run slower"  # the latter is what Dynamo says of Python 3.13.0
    told = json.loads(check_python(IN_A_NEW_PROCESS, {"PYTHONWARNINGS": f"error,{ignored}", "TRITON_INTERPRET": None}))
    before, imported, trained = map(set, told["seen"])
    assert not HEAVY & (imported - before)
    assert not HEAVY & (trained - before)
    others = {name for name in imported - before if name.partition(".")[0] not in ("fastroute", "numpy")}
    assert len(others) < 20, sorted(others)
    assert told["flops"] > 0
    assert told["constant"] and told["same"]
    assert not any(module.startswith("fastroute") for module in told["loaders"])


def test_an_action_follows_an_import(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").write_text("VALUE = 1\n")
    (tmp_path / "imported_badly.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    when_imported("imported_later", lambda: seen.append(sys.modules["imported_later"].VALUE))
    assert not seen
    import imported_later  # type: ignore[import-not-found]

    assert seen == [1]
    assert imported_later.__loader__ is imported_later.__spec__.loader
    when_imported("imported_later", lambda: seen.append(2))  # by now it is there
    assert seen == [1, 2]
    when_imported("imported_badly", lambda: seen.append(3))
    with pytest.raises(ValueError, match="broken"):
        import imported_badly  # type: ignore[import-not-found] # noqa: F401
    assert seen == [1, 2]


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_as_it_was(collects: bool) -> None:
    """After an import, and after one that failed, of which nobody holds anything."""
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        for end in ("close", "drop"):
            importing = uncollected()
            next(importing)
            assert not gc.isenabled()
            importing = importing.close() if end == "close" else None  # type: ignore[attr-defined]
            assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
