"""Every public name has a docstring with an example, and every example gives what it says."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
from typing import Any

import pytest
import torch
from torch import nn

import fastroute
from fastroute import data
from tests.helpers import seeds

#: Public modules: every name of their ``__all__``, and what is named here besides.
FACES: dict[str, tuple[str, ...]] = {
    "fastroute": (),
    "fastroute.functional": (),
    "fastroute.capsules": (),
    "fastroute.networks": (),
    "fastroute.networks.decisions": (),
    "fastroute.tasks": (),
    "fastroute.multitask": ("Accuracy", "F1", "L1", "Stack"),
    "fastroute.plots": (),
    "fastroute.data": ("Digits", "digits", "mnist"),
    "fastroute.compat": ("install",),
    "fastroute.ops.dispatch": ("plan",),
}


def public() -> dict[str, Any]:
    """By the first name under which it is public."""
    found: dict[int, tuple[str, Any]] = {}
    for face, more in FACES.items():
        module = importlib.import_module(face)
        for name in (*getattr(module, "__all__", ()), *more):
            thing = getattr(module, name)
            found.setdefault(id(thing), (f"{face}.{name}", thing))
    return dict(found.values())


PUBLIC = {"fastroute": fastroute, **public()}


pytestmark = pytest.mark.usefixtures("imports_as_before")


def _takes_arguments(thing: Any) -> bool:
    """Of its own: what torch.nn.Module or a tuple takes is known."""
    if inspect.isclass(thing) and (thing.__init__ is nn.Module.__init__ or issubclass(thing, (tuple, BaseException))):
        return False
    return callable(thing) and not dataclasses.is_dataclass(thing) and bool(inspect.signature(thing).parameters)


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if _takes_arguments(thing)])
def test_its_arguments_are_explained(name: str) -> None:
    """There, or where it says that they are."""
    said = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"^(Args|Attributes):$|\barguments\b", said, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_its_examples_run(name: str) -> None:
    thing = PUBLIC[name]
    text = inspect.getdoc(thing) or ""
    assert ">>> " in text, f"{name}: its docstring has no example (Examples: >>> ...)"
    if name.startswith("fastroute.plots"):
        pytest.importorskip("matplotlib")
    if thing is data.digits:
        pytest.importorskip("sklearn")
    seeds.fixed_seed(0)
    given = {"torch": torch, "nn": nn, "fastroute": fastroute}
    finder = doctest.DocTestFinder(recurse=inspect.isclass(thing))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    heard: list[str] = []
    for test in finder.find(thing, name, module=False, globs=given):  # type: ignore[arg-type]
        runner.run(test, out=heard.append)
    assert runner.tries and not runner.failures, "".join(heard)


def test_the_runner_would_notice() -> None:
    """A wrong output fails, and so does a name that is missing."""
    for text in (">>> torch.zeros(2).shape\ntorch.Size([3])", ">>> fastroute.Nothing()"):
        runner = doctest.DocTestRunner(verbose=False)
        test = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fastroute": fastroute}, "x", None, 0)
        runner.run(test, out=lambda _: None)
        assert runner.failures == 1
