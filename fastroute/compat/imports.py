"""Where the upstreams' names are found: an import finder that needs the standard library alone.

Python processes that a program starts read this file before anything of fastroute, see ``on_path/sitecustomize.py``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HERE = "fastroute.compat"
#: Top-level names -> what they are here. TaskRouting has no package: its files are imported from a folder of its name.
UPSTREAMS = {
    "heinsen_routing": f"{HERE}.heinsen_routing",
    "PytorchRouting": f"{HERE}.PytorchRouting",
    "taskrouting": f"{HERE}.taskrouting",
    "TaskRouting": f"{HERE}.taskrouting",
    "routed_vgg": f"{HERE}.routed_vgg",
    "torchmtl": f"{HERE}.torchmtl",
}
#: On ``sys.path``, and so in processes that multiprocessing starts.
ON_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "on_path")


class Finder(importlib.abc.MetaPathFinder):
    """Finds the upstreams' modules here, and what else an upstream's package holds (its examples) in its own folder."""

    def __init__(self) -> None:
        self.names: set[str] = set()  #: those that are found

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top, _, rest = name.partition(".")
        if name.startswith(f"{HERE}."):  # `from PytorchRouting import Examples` asks the package for its own name
            theirs = name.removeprefix(f"{HERE}.")
            found = theirs.partition(".")[0] in self.names and PathFinder.find_spec(name, path) is None
            return ModuleSpec(name, _Alias(theirs)) if found and self._beside(theirs) is not None else None
        if top not in self.names:
            return None
        ours = f"{UPSTREAMS[top]}.{rest}" if rest else UPSTREAMS[top]
        try:
            spec = importlib.util.find_spec(ours)
        except ModuleNotFoundError as error:
            if error.name is None or not ours.startswith(error.name):
                raise  # something that fastroute needs
            spec = None
        if isinstance(spec and spec.loader, _Alias):
            spec = None
        if spec is None:
            return self._beside(name)
        made = ModuleSpec(name, _Alias(ours), origin=spec.origin)
        made.submodule_search_locations = spec.submodule_search_locations
        return made

    def _beside(self, name: str) -> ModuleSpec | None:
        """In the upstream's own package, wherever on the path that is."""
        where: Sequence[str] | None = [p for p in sys.path if os.path.abspath(p) != ON_PATH]
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            spec = PathFinder.find_spec(".".join(parts[:end]), where)
            if spec is None or end == len(parts) > 1:
                return spec
            if (where := spec.submodule_search_locations) is None:
                return None
        return None


class _Alias(importlib.abc.Loader):
    """Puts one module under another name."""

    def __init__(self, of: str) -> None:
        self.of = of

    def exec_module(self, module: ModuleType) -> None:
        """What is in ``sys.modules`` afterwards is what the import gives."""
        spec = module.__spec__
        if spec is None:
            return
        sys.modules[spec.name] = importlib.import_module(self.of)
        # Its parts, too: to import one would make it an attribute of its package, in place of a class of that name.
        for name, part in list(sys.modules.items()):
            if name.startswith(f"{self.of}."):
                sys.modules.setdefault(spec.name + name.removeprefix(self.of), part)


def install(names: Sequence[str]) -> None:
    """From now on ``import name`` gives the module of this package. Once is enough."""
    # The file may have been read twice, as part of the package and alone.
    finder = next((f for f in sys.meta_path if type(f).__name__ == "Finder" and hasattr(f, "names")), None)
    if finder is None:
        finder = Finder()
        sys.meta_path.insert(0, finder)
    finder.names.update(names)
    for name in names:  # a file of ON_PATH was found first
        found = sys.modules.get(name)
        file = getattr(found, "__file__", None)
        if file is not None and os.path.dirname(os.path.abspath(file)) == ON_PATH:
            sys.modules[name] = importlib.import_module(UPSTREAMS[name])
    if ON_PATH not in sys.path:
        sys.path.append(ON_PATH)
