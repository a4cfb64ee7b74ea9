"""What ``import fastroute`` waits for: the torch that it needs, and nothing else.

Dynamo, which brings SymPy, and the counter of FLOPs, which brings Triton, take as long to import as PyTorch itself.
What they have to be told is told when somebody else has imported them.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import sys
from collections.abc import Callable, Generator, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

if torch.__version__ < "2.11.dev0":  # a TorchVersion: it compares numbers
    raise ImportError(
        f"fastroute needs torch 2.11 or newer, found {torch.__version__} in {torch.__path__[0]}: "
        "pip install --upgrade 'torch>=2.11'"
    )


def uncollected() -> Generator[None, None, None]:
    """Python's garbage collector is at rest from ``next(...)`` until it is closed, or nobody holds it.

    All that an import makes is kept. A full collection among the objects that PyTorch has made finds nothing, and takes
    as long as the rest of `import fastroute`.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, with a loader that does the actions after the module's own code."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:  # what else is asked of a loader: get_source, is_package, ...
        return getattr(self.own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        for action in _finder.actions.pop(module.__name__, ()):
            action()


_finder = _Finder()


def when_imported(name: str, action: Callable[[], object]) -> None:
    """``action()`` as soon as the module ``name`` is imported: now, if it has been, or before its importer goes on."""
    if name in sys.modules:
        importlib.import_module(name)  # another thread may be at it
        action()
        return
    _finder.actions.setdefault(name, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def constant_result(fn: _F) -> _F:
    """``torch.compiler.assume_constant_result``, which would import Dynamo."""
    when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(fn))  # changes fn itself
    return fn


def not_compiled(fn: _F) -> _F:
    """``torch.compiler.disable``, which would import Dynamo."""
    run: Callable[..., Any] = fn

    def disable() -> None:
        nonlocal run
        run = torch.compiler.disable(fn)

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    when_imported("torch._dynamo", disable)
    return call  # type: ignore[return-value]
