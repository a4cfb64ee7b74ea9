"""Packages of the test extra. A test that needs one fails without it; tests that need none are collected and run."""

from __future__ import annotations

import builtins
import importlib
from typing import Any

import pytest


class _Missing:
    def __init__(self, name: str, error: ImportError) -> None:
        self.__dict__.update(_name=name, _error=error)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") or attribute == "pytestmark":  # asked by who collects tests
            raise AttributeError(attribute)
        pytest.fail(f"{self._name}.{attribute}: {self._error} (pip install 'fastroute[test]')")


def needed(name: str) -> Any:
    """The module of that name; where there is none, what fails the test that asks anything of it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return _Missing(name, error)


def without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No import of a package that is called so succeeds."""
    real = builtins.__import__

    def imported(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted.startswith(name):
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", imported)
