"""FASTROUTE_ISA: which variant of the C++ kernels runs, what is refused, and that all variants compute the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastroute.cli import main
from fastroute.ops import backends
from fastroute.ops import isa as _isa
from tests.helpers.backends import HERE, needs_native
from tests.helpers.every_op import EVERY_OP
from tests.helpers.opcheck import assert_same
from tests.helpers.subprocesses import check_python

AVAILABLE: Sequence[str] = torch.ops.fastroute._isas() if "native" in HERE else ()
DOCTOR = "import fastroute.cli; print(fastroute.cli.doctor())"


def lines(doctor: str) -> dict[str, str]:
    """The first section of what doctor says."""
    return dict(re.split("  +", line, maxsplit=1) for line in doctor.split("\n\n")[0].splitlines())  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- what is chosen


@needs_native
@pytest.mark.long
def test_the_best_one_runs_unless_asked() -> None:
    said = lines(check_python(DOCTOR, {"FASTROUTE_ISA": None}))
    assert said["C++ kernels"] == f"{AVAILABLE[-1]} (available: {', '.join(AVAILABLE)})"
    assert said["FASTROUTE_ISA"] == "auto"
    assert all(torch.ops.fastroute._choose_isa(asked, AVAILABLE) == AVAILABLE[-1] for asked in ("", "auto"))


@pytest.mark.long
@needs_native
def test_each_variant(tmp_path: Path) -> None:
    """What is asked for runs; all variants compute the same, whatever the number of threads."""
    missing = backends.offered().keys() - EVERY_OP.keys() - {"dispatch"}  # which is a part of grouped_linear
    assert not missing, "add a call of each to EVERY_OP in tests/helpers/every_op.py"
    made = {}
    for isa in AVAILABLE:
        path = tmp_path / f"{isa}.pt"
        code = f"""
from pathlib import Path
from tests.helpers.every_op import save_results
save_results(Path({str(path)!r}))
{DOCTOR}
print(torch.ops.fastroute._prefers_onednn())
"""
        said = check_python(f"import torch\n{code}", {"FASTROUTE_ISA": isa, "FASTROUTE_GEMM": None})
        assert lines(said)["C++ kernels"] == f"{isa} (available: {', '.join(AVAILABLE)})"
        assert lines(said)["FASTROUTE_ISA"] == isa
        assert isa == "avx512" or said.splitlines()[-1] == "False", "as on a processor without AVX-512"
        made[isa] = torch.load(path, weights_only=True)
    for isa in AVAILABLE[1:]:
        for op, expected in made[AVAILABLE[0]].items():
            assert made[isa][op].keys() == expected.keys()
            for name, t in expected.items():
                what = f"{op} with {isa}: {name}"
                if t is None or not t.is_floating_point():
                    assert made[isa][op][name] is t is None or torch.equal(made[isa][op][name], t), what
                else:
                    assert_same(made[isa][op][name], t, what)


@needs_native
def test_names_are_in_order() -> None:
    assert list(AVAILABLE) == [name for name in _isa.ISAS if name in AVAILABLE]


@needs_native
@pytest.mark.parametrize("asked", ["avx2", "avx512"])
def test_the_best_there_is(asked: str) -> None:
    assert torch.ops.fastroute._choose_isa("auto", ["default"]) == "default"
    assert torch.ops.fastroute._choose_isa("", ["default", asked]) == asked


# ------------------------------------------------------------------------------------------------------ what is refused


@needs_native
@pytest.mark.parametrize(
    ("asked", "here", "expected"),
    [
        ("avx512", ["default", "avx2"], "auto, default, avx2"),
        ("avx2", ["default"], "auto, default"),
        ("AVX2", ["default", "avx2", "avx512"], "auto, default, avx2, avx512"),
        ("sse9", ["default"], "auto, default"),
    ],
)
def test_what_the_processor_lacks(asked: str, here: list[str], expected: str) -> None:
    said = f"FASTROUTE_ISA: expected one of {expected} (what this processor has), got '{asked}'"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        torch.ops.fastroute._choose_isa(asked, here)


def refused() -> str:
    if AVAILABLE:
        return f"FASTROUTE_ISA: expected one of auto, {', '.join(AVAILABLE)} (what this processor has), got 'sse9'"
    return "FASTROUTE_ISA: expected one of auto, default, avx2, avx512, got 'sse9'"


def test_an_unknown_name() -> None:
    """Every call of a layer says it, whatever backend is asked for; doctor says it; kernels do not run."""
    code = f"""
import torch, fastroute
def caught(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return error
if {"native" in HERE}:  # nobody has asked extension() yet
    torch.ops.load_library({backends.extension()[0]!r})
    given = torch.zeros(3, 2), None, None, None, 0, 1.0, 0.0
    assert caught(lambda: torch.ops.fastroute._policy_native(*given)) is not None
layer = fastroute.EfficientVectorRouting(4, 3, 6, 5)
for name in ("auto", "auto", "reference"):
    with fastroute.use_backend(name):
        error = caught(lambda: layer(torch.zeros(2, 4, 6)))
        assert type(error) is ValueError and str(error) == {refused()!r}, error
{DOCTOR}
"""
    said = lines(check_python(code, {"FASTROUTE_ISA": "sse9", "FASTROUTE_BACKEND": None}))
    assert said["C++ kernels"] == refused() and said["FASTROUTE_ISA"] == "sse9"


# ------------------------------------------------------------------------------------------------ without an extension


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: None if name == "fastroute._C" else find_spec(name)
    )
    monkeypatch.setattr(backends, "extension", backends.extension.__wrapped__)


def test_not_built_and_a_known_name(
    not_built: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("", "auto", *_isa.ISAS):
        monkeypatch.setenv("FASTROUTE_ISA", name)
        where, why = backends.extension()
        assert where is None and "is not built" in why
    assert main(["doctor"]) == 0
    said = lines(capsys.readouterr().out)
    assert said["C++ kernels"] == "none: FASTROUTE_ISA has no effect without the extension"


def test_not_built_and_an_unknown_name(not_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROUTE_ISA", "sse9")
    with pytest.raises(ValueError, match=r"^FASTROUTE_ISA: expected one of auto, default, avx2, avx512, got 'sse9'$"):
        backends.extension()
