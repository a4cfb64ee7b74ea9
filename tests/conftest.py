"""Settings for all tests."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from fastroute import compat
from tests.helpers import seeds
from tests.helpers.backends import HERE
from tests.helpers.interpreter import let_scalars_be_ints, make_it_faster
from tests.helpers.poison import poisoned_memory
from tests.isa import is_numeric

if os.environ.get("TRITON_INTERPRET") == "1":
    let_scalars_be_ints()
    make_it_faster()

# The same examples on every machine and in every run; --hypothesis-profile=search looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=25, deadline=None, database=None)
hypothesis.settings.register_profile("search", max_examples=500, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Other examples under another FASTROUTE_TEST_SEED."""
    test = getattr(item, "obj", None)
    if seeds.BASE and hypothesis.is_hypothesis_test(test):
        hypothesis.seed(seeds.BASE)(test)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The garbage collector looks at what tests make, and not again and again at all that is imported and collected."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        gc.set_threshold(20_000, 10, 20)


def pytest_unconfigure() -> None:
    """At the end all is collected again: extensions count what is left of theirs."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _draws_are_the_tests_own(request: pytest.FixtureRequest) -> None:
    """See ``tests/helpers/seeds.py``."""
    seeds.seed_all(request.node.nodeid)


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """Unwritten memory is NaN in every test of the module: ``pytestmark = pytest.mark.usefixtures("poisoned")``."""
    with poisoned_memory():
        yield


@pytest.fixture
def imports_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test nothing is left of ``compat.install``, which puts a finder in front, nor of upstreams' modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in compat.UPSTREAMS]:
        del sys.modules[name]


#: What a test calls that is about graphs and formulas: slow, and the same on every instruction set.
_STRUCTURE = {"check_compiled", "check_exported", "compile", "export", "gradcheck", "opcheck"}


def _given(item: pytest.Item) -> dict[str, Any]:
    """The arguments of a case, by name."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def _apart_from_backend(item: pytest.Item) -> Any:
    """Equal for tests of a case on several backends."""
    given = _given(item).items()
    return item.nodeid.split("[")[0], *sorted((name, id(value)) for name, value in given if name != "backend")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1", help="k/n: the k-th of n parts of the tests (tests/isa.py)")


def _dealt(items: list[pytest.Item], mine: int, of: int) -> Iterator[pytest.Item]:
    """The cases of every test in turn, a case on all backends together, so that each part has some of every test."""
    tests: dict[str, tuple[int, dict[Any, int]]] = {}
    for item in items:
        test, *case = _apart_from_backend(item)
        first, cases = tests.setdefault(test, (len(tests), {}))
        if (first + cases.setdefault(tuple(case), len(cases))) % of == mine:
            yield item


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What compares numbers depends on the instruction set, and is run under each (``tests/isa.py``).

    A case runs on one backend after the other: ``tests/helpers/budget.py`` keeps the last yardsticks. Of graphs and
    formulas ``make test`` has each test's first case, of the C++ where there is a choice. Of the cases of a test with
    three arguments or more it has those in which two values meet for the first time.
    """
    together: dict[Any, list[pytest.Item]] = {}
    seen: Counter[Any] = Counter()
    met: set[Any] = set()
    first: set[str] = set()
    for item in items:
        test, given = item.nodeid.split("[")[0], _given(item)
        code = getattr(getattr(item, "function", None), "__code__", None)
        is_structure = code is not None and not _STRUCTURE.isdisjoint(code.co_names)
        if is_structure and (test in first or (given.get("backend") == "reference" and "native" in HERE)):
            item.add_marker("long")
        elif is_structure:
            first.add(test)
        if is_numeric(item.path) and not is_structure:
            item.add_marker("numeric")
        few = item.get_closest_marker("long_after")
        if few is not None:
            seen[test, given.get("backend")] += 1
            if seen[test, given.get("backend")] > few.args[0]:
                item.add_marker("long")
        if len(given) > 2 and item.keywords.keys().isdisjoint(("long", "gpu")):
            values = sorted((name, id(value)) for name, value in given.items())
            pairs = {(test, *pair) for pair in itertools.combinations(values, 2)}
            if pairs <= met:
                item.add_marker("long")
            met |= pairs
        together.setdefault(_apart_from_backend(item), []).append(item)
    every = [*itertools.chain(*together.values())]
    items[:] = _dealt(every, *map(int, config.getoption("share").split("/")))
    mine = set(items)
    config.hook.pytest_deselected(items=[item for item in every if item not in mine])
