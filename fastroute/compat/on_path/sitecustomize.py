"""Read by every Python that starts with this folder on PYTHONPATH: the upstreams' names are fastroute.compat's.

Nothing of fastroute is imported until one of them is.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def _read(name: str, spec: "importlib.machinery.ModuleSpec | None") -> None:
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if importlib.util.find_spec("fastroute") is not None:
    _file = os.path.join(os.path.dirname(_FOLDER), "imports.py")
    _read("_fastroute_imports", importlib.util.spec_from_file_location("_fastroute_imports", _file))
    _imports = sys.modules["_fastroute_imports"]
    _imports.install(list(_imports.UPSTREAMS))

# The sitecustomize that this one hides.
_read("sitecustomize", PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _FOLDER]))
