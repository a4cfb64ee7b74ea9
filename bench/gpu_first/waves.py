"""The GPU's tests in waves, most valuable first. Imports no torch."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Wave(NamedTuple):
    """Tests that run in one process with its own limit.

    Attributes:
        seconds: what it gets of a run of 540 seconds.
        workers: processes side by side; those that need most of the GPU's memory run alone.
        item_seconds: after which a test counts as hanging.
        picks: regular expressions of node ids, in the order in which they are to run.
        dry: what runs instead without a GPU: arguments of pytest.
    """

    name: str
    seconds: float
    workers: int
    item_seconds: float
    picks: tuple[str, ...]
    dry: tuple[str, ...]


_LARGE = r"more_than|at_a_million|large_regime|large_batch|test_memory"
_BEHAVIOUR = r"same_input|same_bits|repeats|captur|graph|sync|wait|afresh|compiled|out_of_range|stream|another_gpu"

WAVES = (
    Wave(
        "headline",
        50,
        12,
        30,
        (
            rf"vector_routing/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            r"capsules/test_gpu\.py::.*(agrees|takes)",
            rf"grouped_linear/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
        ),
        ("tests/ops/vector_routing/test_kernels.py", "-k", "test_lengths"),
    ),
    Wave(
        "ops",
        50,
        12,
        30,
        (
            rf"matrix_routing/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            rf"soft_assignment/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            rf"networks/test_(mixture_)?gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            rf"(policy|trajectory_loss)/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            rf"task_mask/test_gpu\.py::(?!.*({_LARGE}|{_BEHAVIOUR}))",
            rf"(multitask|tasks)/.*::(?!.*({_LARGE}|{_BEHAVIOUR}))",
        ),
        ("tests/ops/task_mask/test_kernels.py", "-k", "test_values and scalar and 32-bit"),
    ),
    Wave(
        "behaviour",
        35,
        12,
        30,
        (
            rf"vector_routing/test_gpu\.py::.*({_BEHAVIOUR})",
            rf"capsules/.*({_BEHAVIOUR})",
            rf"grouped_linear/test_gpu\.py::.*({_BEHAVIOUR})",
            rf"^(?!.*({_LARGE})).*({_BEHAVIOUR})",
            rf"^(?!.*({_LARGE}))",
        ),
        ("tests/ops/trajectory_loss/test_kernels.py", "-k", "in_its_layout or goes_elsewhere"),
    ),
    Wave(
        "large",
        15,
        1,
        60,
        (r"at_a_million", r"test_gpu\.py.*more_than", r""),
        ("tests/ops/vector_routing/test_gpu.py",),
    ),
)


def place(nodeid: str) -> tuple[int, int]:
    """(wave, rank in it) of a test: of the first expression that finds something in its name."""
    for w, wave in enumerate(WAVES):
        for rank, pick in enumerate(wave.picks):
            if re.search(pick, nodeid):
                return w, rank
    raise AssertionError(f"{nodeid}: the last wave takes what is left")


@cache
def files() -> tuple[str, ...]:
    """Test files with tests for a GPU."""
    marked = re.compile(r"^pytestmark = .*mark\.gpu|^@pytest\.mark\.gpu|^ *(gpu = )?pytest\.mark\.gpu", re.MULTILINE)
    found = (p for p in (ROOT / "tests").rglob("test_*.py") if marked.search(p.read_text(encoding="utf-8")))
    return tuple(sorted(str(p.relative_to(ROOT)) for p in found))
