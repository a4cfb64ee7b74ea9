"""The upstreams' import paths, on fastroute's layers."""

import importlib
import sys

from . import imports

UPSTREAMS = tuple(imports.UPSTREAMS)


def install(*names: str) -> None:
    """From now on ``import torchmtl`` and the like give ``fastroute.compat.torchmtl`` and the like.

    So they do in processes that multiprocessing starts, DataLoader's workers among them. What an upstream's package
    holds besides (``PytorchRouting.Examples``) is found where that package is on ``sys.path``.

    Args:
        names: of upstream packages; by default all of ``UPSTREAMS``. One that is not imported costs nothing.

    Raises:
        ValueError: another name. RuntimeError: the upstream package itself has been imported already.

    Examples:
        >>> import fastroute.compat
        >>> fastroute.compat.install("torchmtl")
        >>> import torchmtl
        >>> torchmtl.MTLModel.__module__
        'fastroute.compat.torchmtl.model_builder'
    """
    for name in names:
        if name not in UPSTREAMS:
            raise ValueError(f"names: expected some of {', '.join(UPSTREAMS)}, got {name!r}")
    for name in names or UPSTREAMS:
        found = sys.modules.get(name)
        where = getattr(found, "__file__", None) or ""
        if found is None or where.startswith(imports.ON_PATH):
            continue
        if found is not importlib.import_module(imports.UPSTREAMS[name]):
            raise RuntimeError(
                f"{name}: expected to be installed before it is imported, found {where or None} imported already"
            )
    imports.install(names or UPSTREAMS)
