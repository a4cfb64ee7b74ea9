"""The upstreams' import paths, on fastroute's layers."""

import importlib
import pkgutil
import sys

UPSTREAMS = ("heinsen_routing", "PytorchRouting", "taskrouting", "routed_vgg", "torchmtl")


def install(*names: str) -> None:
    """From now on ``import torchmtl`` and the like give ``fastroute.compat.torchmtl`` and the like.

    Args:
        names: of upstream packages; by default all of ``UPSTREAMS``. One that is not imported costs nothing later.

    Raises:
        ValueError: another name. RuntimeError: the upstream package itself has been imported already.
    """
    for name in names or UPSTREAMS:
        if name not in UPSTREAMS:
            raise ValueError(f"names: expected some of {', '.join(UPSTREAMS)}, got {name!r}")
        module = importlib.import_module(f"{__name__}.{name}")
        found = sys.modules.setdefault(name, module)
        if found is not module:
            where = getattr(found, "__file__", None)
            raise RuntimeError(
                f"{name}: expected to be installed before it is imported, found {where} imported already"
            )
        for part in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{module.__name__}."):
            sys.modules[part.name.removeprefix(f"{__name__}.")] = importlib.import_module(part.name)
