"""``from heinsen_routing import EfficientVectorRouting``, unchanged but for ``fastroute.compat.`` in front.

Same arguments, attributes, parameters, random draws and numbers as heinsen_routing 1.0.1 to 1.0.4, and as the file of
2019, whose only class is ``Routing``. Where upstream gives NaN (an input masked for every output) or crashes
(``return_dict=True`` with ``n_iters=1``, ``DefinableVectorRouting`` with ``n_inp=-1``), this one works.
"""

from .heinsen_routing import (
    DefinableVectorRouting,
    EfficientVectorRouting,
    GenerativeMatrixRouting,
    Routing,
    math,
    nn,
    torch,
)

__all__ = [
    "DefinableVectorRouting",
    "EfficientVectorRouting",
    "GenerativeMatrixRouting",
    "Routing",
    "math",
    "nn",
    "torch",
]
