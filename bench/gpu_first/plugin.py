"""A pytest plugin: a record for each test when it ends, a time limit for each, and no test in a broken CUDA context.

``-p bench.gpu_first.plugin`` loads it. Tests that fail tell their message. A benchmark's row tells its figures. A
process that CUDA refuses after a failure ends at once: pytest-xdist replaces it, or the driver starts a new one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_first import records, waves

#: Seconds that a test may take.
ITEM_SECONDS = "GPU_FIRST_ITEM_SECONDS"
#: The wave of ``waves.WAVES`` whose tests run, most valuable first.
WAVE = "GPU_FIRST_WAVE"
#: A file of node ids: those alone run, in its order.
IDS = "GPU_FIRST_IDS"
#: A file of node ids that are not to run again.
DONE = "GPU_FIRST_DONE"


def _listed(variable: str) -> dict[str, int] | None:
    path = os.environ.get(variable)
    return None if path is None else {i: k for k, i in enumerate(Path(path).read_text(encoding="utf-8").splitlines())}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wave, ids, done = os.environ.get(WAVE), _listed(IDS), _listed(DONE) or {}
    chosen = list(items)
    if ids is not None:
        chosen = sorted((item for item in items if item.nodeid in ids), key=lambda item: ids[item.nodeid])
    elif wave is not None:
        ranked = sorted(((waves.place(item.nodeid), item) for item in items), key=lambda pair: pair[0])
        chosen = [item for (of, _), item in ranked if waves.WAVES[of].name == wave]
    chosen = [item for item in chosen if item.nodeid not in done]
    config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
    items[:] = chosen


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that hangs ends its process, with a traceback in the log."""
    seconds = float(os.environ.get(ITEM_SECONDS, "0"))
    records.write("start", id=item.nodeid)
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    info = dict(getattr(benchmark, "extra_info", None) or {})
    if call.when == "call" and info:
        records.write("row", id=item.nodeid, outcome=report.outcome, **info)
    return report  # type: ignore[no-any-return]


def pytest_runtest_logreport(report: Any) -> None:
    """Of the process that hears of every test: under xdist, not a worker."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        found = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
            found |= {"phase": report.when, "message": crash or str(report.longrepr)[:1500]}
        elif report.outcome == "skipped":
            found["message"] = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        records.write("test", **found)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Give memory back to the tests beside this one, and leave a context that an error broke."""
    cuda = _cuda()
    if cuda is None:
        return
    try:
        cuda.synchronize()
        cuda.empty_cache()
    except Exception as error:  # sticky: every later call of this process fails alike
        records.write("broken", id=nodeid, message=str(error))
        sys.stderr.flush()
        os._exit(70)


_compiled = {"hits": 0, "misses": 0}


def pytest_configure(config: pytest.Config) -> None:
    """Count what Triton finds in its cache."""
    try:
        from triton import knobs
    except ImportError:
        return

    def seen(*, cache_hit: bool, **_: Any) -> None:
        _compiled["hits" if cache_hit else "misses"] += 1

    knobs.compilation.listener = seen


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Without this record the process was lost before its last test."""
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        records.write("session", tests=session.testscollected)
    if any(_compiled.values()):
        records.write("cache", **_compiled)
