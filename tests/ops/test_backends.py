"""Choosing a backend: by name, by environment, by what the machine has; and saying so."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import BackendUnavailable, EfficientVectorRouting, explain, functional, strict, use_backend
from fastroute.ops import backends as _backends
from fastroute.ops import environment
from fastroute.ops.backends import Case, Decision, choose, decide, is_strict, missing, offered, requested
from fastroute.ops.vector_routing import plain as tiles
from tests.helpers.backends import HERE, needs_native
from tests.helpers.routing_cases import Size, vector_case, vector_op
from tests.helpers.subprocesses import check_python

A_CASE = Case("vector_routing", "cpu", torch.float32, (("B", 2), ("n", 33), ("m", 5), ("d", 12)))


class Spy:
    """Counts a backend's passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.calls: list[str] = []
        for name in ("forward", "backward"):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            self.calls.append(name)
            return function(*args)

        return counted


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch, tiles)


def leaves() -> dict[str, Tensor | None]:
    case = vector_case(Size(2, 33, 5, 12))
    return {k: t.requires_grad_() if t is not None and k in case.wrt else t for k, t in case.inputs.items()}


# ---------------------------------------------------------------------------------------------------- use_backend


def test_the_reference_runs_when_it_is_asked_for(on_reference: Spy) -> None:
    with use_backend("reference"):
        vector_op(**leaves())
    assert on_reference.calls == ["forward"]


@needs_native
def test_native_is_first_on_a_cpu(on_reference: Spy) -> None:
    vector_op(**leaves())["M"].sum().backward()
    assert on_reference.calls == []


@needs_native
@pytest.mark.parametrize("during_backward", ["native", "auto"])
def test_backward_runs_where_forward_ran(on_reference: Spy, during_backward: str) -> None:
    with use_backend("reference"):
        out = vector_op(**leaves())
    with use_backend(during_backward):
        (out["M"].sum() + out["p"].sum()).backward()
    assert on_reference.calls == ["forward", "backward"]
    on_reference.calls.clear()
    with use_backend("native"):
        out = vector_op(**leaves())
    with use_backend("reference"):
        (out["M"].sum() + out["p"].sum()).backward()
    assert on_reference.calls == []


def test_nesting() -> None:
    assert requested() == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert requested() == "reference"
    assert requested() == "auto"


def test_an_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="use_backend: expected one of auto, triton, native, reference, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    assert requested() == "auto"


def test_as_a_decorator() -> None:
    @use_backend("reference")
    def asked() -> str:
        return requested()

    assert asked() == "reference" and requested() == "auto"


def test_as_a_call() -> None:
    """As ``strict``: it acts at once, and looks at the name; what it returns takes it back, and serves again."""
    switched = use_backend("reference")
    try:
        assert requested() == "reference"
        with pytest.raises(ValueError, match=r"use_backend: expected one of .*, got 'cuda'"):
            use_backend("cuda")
        assert requested() == "reference"
    finally:
        switched.__exit__(None, None, None)
    assert requested() == "auto"
    for _ in range(2):
        with switched:
            assert requested() == "reference"
        assert requested() == "auto"


def test_in_a_compiled_function() -> None:
    def asked(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return functional.policy(x).value

    x = torch.randn(4, 3)
    assert torch.equal(torch.compile(asked, fullgraph=True, backend="eager")(x), asked(x)) and requested() == "auto"


def test_a_request_that_cannot_be_met_says_why() -> None:
    half = vector_case(Size(2, 33, 5, 12), dtype=torch.float16).inputs
    why = (
        "C\\+\\+ extension fastroute._C is not built"
        if missing("native", "cpu")
        else "take float32, float64 and bfloat16, not float16"
    )
    with (
        use_backend("native"),
        pytest.raises(
            BackendUnavailable,
            match=rf"'native' was asked for but cannot .*vector_routing on cpu, float16, B=2, n=33, m=5, d=12: .*{why}",
        ),
    ):
        vector_op(**half)


@pytest.mark.skipif(environment.interpreting(), reason="Triton's interpreter takes CPU tensors")
def test_triton_on_a_cpu_says_why() -> None:
    with (
        use_backend("triton"),
        pytest.raises(
            BackendUnavailable, match=r"triton (kernels need CUDA tensors, these are on cpu|is not installed)"
        ),
    ):
        vector_op(**leaves())


def test_auto_falls_back_for_a_dtype_that_native_does_not_take(on_reference: Spy) -> None:
    vector_op(**vector_case(Size(2, 33, 5, 12), dtype=torch.float16).inputs)
    assert on_reference.calls == ["forward"]


# ----------------------------------------------------------------------------------------------------- environment


def test_environment() -> None:
    """It is read once per process, so in processes of their own, which share the import of PyTorch."""
    code = """
import os
import torch, torch._dynamo
for name in ("reference", None, "", "fast"):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    if name is not None:
        os.environ["FASTROUTE_BACKEND"] = name
    os.environ["FASTROUTE_ISA"] = ""
    import fastroute
    layer, x = fastroute.EfficientVectorRouting(4, 3, 6, 5), torch.zeros(2, 4, 6)
    try:
        layer(x)
        print(fastroute.explain(layer, x)[0].backend, flush=True)
    except ValueError as error:
        print(error, flush=True)
    os._exit(0)
"""
    named, free, empty, unknown = check_python(code, {"FASTROUTE_BACKEND": None}).splitlines()
    assert named == "reference" and free == empty == ("native" if "native" in HERE else "reference")
    assert unknown == "FASTROUTE_BACKEND: expected one of auto, triton, native, reference, got 'fast'"


# --------------------------------------------------------------------------------------------------- the machine


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        _backends, "extension", lambda: (None, "the C++ extension fastroute._C is not built: no C++ compiler found")
    )
    yield


def test_without_the_extension_the_reference_runs(
    without_extension: None, on_reference: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says why, and what to do, in one line a process; not where one has asked for no extension."""
    _backends._warn_of_slowness.cache_clear()
    with pytest.warns(
        UserWarning, match=r"not built: no C\+\+ compiler found\. CPU tensors .* pip install --force"
    ) as told:
        vector_op(**leaves())["M"].sum().backward()
    assert len(told) == 1 and "\n" not in str(told[0].message)
    monkeypatch.setattr(_backends, "build_info", lambda: {"reason": "FASTROUTE_BUILD=0"})
    _backends._warn_of_slowness.cache_clear()
    on_reference.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector_op(**leaves())["M"].sum().backward()
    assert on_reference.calls == ["forward", "backward"]
    assert choose(A_CASE, "auto") is tiles
    with use_backend("native"), pytest.raises(BackendUnavailable, match="not built: no C\\+\\+ compiler found"):
        vector_op(**leaves())


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_has_triton", lambda: False)
    assert missing("triton", "cuda") == "triton is not installed"
    assert decide(A_CASE, "auto").rejected["triton"] == "triton is not installed"


def test_native_is_for_the_cpu() -> None:
    assert missing("native", "cuda") == "native kernels exist for CPU tensors only, these are on cuda"


def test_every_op_has_a_reference() -> None:
    assert offered()
    for op, backends in offered().items():
        assert "reference" in backends, op
        for device in ("cpu", "cuda", "mps"):
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                assert backends["reference"].refuses(Case(op, device, dtype, A_CASE.sizes)) is None


def test_a_choice_is_by_device_dtype_and_shape_only() -> None:
    """What a choice is made from holds no tensor."""
    assert set(Case.__dataclass_fields__) == {"op", "device", "dtype", "sizes"}
    assert decide(A_CASE, "auto") == decide(A_CASE, "auto")


# --------------------------------------------------------------------------------------------------------- explain


def test_explain_names_every_backend_and_computes_nothing(on_reference: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    module = EfficientVectorRouting(4, 3, 6, 5)
    native = Spy(monkeypatch, choose(A_CASE, "native")) if "native" in HERE else None
    state = torch.get_rng_state()
    report = explain(module, torch.full((2, 4, 6), float("nan")), lengths=[3, 4])
    assert on_reference.calls == [] and (native is None or native.calls == [])
    assert torch.equal(torch.get_rng_state(), state)
    assert report and all(isinstance(d, Decision) for d in report)
    for decision in report:
        assert decision.case.op == "vector_routing" and dict(decision.case.sizes) == {"B": 2, "n": 4, "m": 3, "d": 6}
        assert {decision.backend, *decision.rejected} == {"triton", "native", "reference"}
        assert all(decision.rejected.values())
    text = str(report)
    assert text.splitlines()[0] == f"vector_routing on cpu, float32, B=2, n=4, m=3, d=6: {HERE[-1]}"
    assert "not triton: triton" in text


def test_explain_says_why_the_first_choice_does_not_run() -> None:
    report = str(
        explain(EfficientVectorRouting(4, 3, 6, 5, dtype=torch.float16), torch.zeros(2, 4, 6, dtype=torch.float16))
    )
    assert ": reference" in report
    if "native" in HERE:
        assert "not native: the C++ kernels take float32, float64 and bfloat16, not float16" in report


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        ("EfficientVectorRouting(4, 3, 6, 5)", "torch.zeros(2, 4, 6)"),
        pytest.param(
            "GenerativeMatrixRouting(4, 3, 2, 5, 6)",
            "torch.zeros(2, 4), torch.zeros(2, 4, 2, 5)",
            marks=pytest.mark.long,
        ),
        pytest.param("SlotAttention(3, 5, 6)", "torch.zeros(2, 4, 5)", marks=pytest.mark.long),
    ],
)
def test_explain_may_be_the_first_call(layer: str, inputs: str) -> None:
    """It loads the extension from within a fake's dispatch."""
    check_python(f"import torch, fastroute\nassert str(fastroute.explain(fastroute.{layer}, {inputs}))")


def test_explain_a_function_and_nothing() -> None:
    inputs = vector_case(Size(2, 33, 5, 12)).inputs
    found = explain(lambda x: functional.vector_routing(**{**inputs, "x": x})[0], inputs["x"])  # type: ignore[arg-type]
    assert [d.case.op for d in found] == ["vector_routing"]
    assert str(explain(torch.relu, torch.zeros(3))) == "no fastroute op was called"


class Counting(torch.nn.Module):
    """A running mean, a count and a clamped parameter, as norms and users have them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.factor = torch.nn.Buffer(torch.ones(6)), torch.nn.Parameter(torch.ones(1))
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        self.mean[0] = 2.0
        self.factor.clamp_(0, 0.5)
        made: torch.Tensor = self.norm(x)
        return made


def test_explain_changes_nothing() -> None:
    net = torch.nn.Sequential(Counting(), EfficientVectorRouting(4, 3, 6, 5))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert "routing" in str(explain(net, torch.zeros(2, 4, 6)))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_explain_of_what_reads_numbers() -> None:
    select = fastroute.Selection(torch.nn.Linear(6, 6), torch.nn.Identity())
    run = lambda x: select(x, fastroute.Initialization()(x)[1], (x[:, 0] > 0).long())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"^fn: expected a function that reads no numbers.* got <lambda>; explain"):
        explain(run, torch.zeros(4, 6))


def test_explain_under_a_request() -> None:
    with use_backend("reference"):
        assert explain(EfficientVectorRouting(4, 3, 6, 5), torch.zeros(2, 4, 6))[0].backend == "reference"
    with use_backend("native"), pytest.raises(BackendUnavailable):
        explain(EfficientVectorRouting(4, 3, 6, 5, dtype=torch.float16), torch.zeros(2, 4, 6, dtype=torch.float16))


# ---------------------------------------------------------------------------------------------------------- strict


def test_strict_is_a_switch_and_a_block() -> None:
    assert not is_strict()
    with strict(True):
        assert is_strict()
        with strict(False):
            assert not is_strict()
        assert is_strict()
    assert not is_strict()
    switched = strict(True)
    assert is_strict()
    switched.__exit__()
    assert not is_strict()


def test_the_public_names() -> None:
    assert fastroute.use_backend is use_backend and fastroute.explain is explain and fastroute.strict is strict
    assert issubclass(fastroute.BackendUnavailable, RuntimeError)


@pytest.mark.parametrize("noted", ["", "{", "[]", "null", '"built"', '{"built": true}'])
def test_a_note_of_the_build_that_is_none(noted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build_info.json").write_text(noted)
    monkeypatch.setattr(_backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    assert _backends.build_info() == ({"built": True} if ":" in noted else {})


@pytest.fixture
def another_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's Python files, the extension's place in it; PYTHONPATH is set."""
    package = Path(fastroute.__file__).parent
    ignore = shutil.ignore_patterns("_C.*", "kernels", "__pycache__", "_build_info.json")
    shutil.copytree(package, tmp_path / "fastroute", ignore=ignore)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "fastroute" / "_C.abi3.so"


SAYS = "import fastroute; from fastroute.ops import backends; print(*backends.extension())"


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF")
@pytest.mark.parametrize("kept", [0, 40, 5000, 0.5, 1], ids=str)
def test_an_extension_that_is_cut_off_is_not_loaded(another_checkout: Path, kept: float) -> None:
    where, why = _backends.extension()
    if where is None:
        pytest.skip(why)
    whole = Path(where).read_bytes()
    another_checkout.write_bytes(whole[: kept if kept > 1 else int(kept * len(whole))])
    run = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(
        str(another_checkout) if kept == 1 else "None the C++ extension fastroute._C does"
    )


@pytest.mark.long
def test_an_extension_of_another_checkout_is_not_taken(another_checkout: Path, tmp_path: Path) -> None:
    """As the finder of an editable install does, which comes last and offers what is in its own checkout."""
    other = tmp_path / "other"
    other.mkdir()
    (other / another_checkout.name).touch()
    offers = f"""
import sys
from importlib.machinery import PathFinder
class Finder:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(other)!r}]) if name == "fastroute._C" else None
sys.meta_path.append(Finder)
"""
    run = subprocess.run([sys.executable, "-c", offers + SAYS], capture_output=True, text=True, cwd="/")
    assert run.stdout.startswith("None the C++ extension fastroute._C is not built"), run
