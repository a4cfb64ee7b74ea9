"""``from heinsen_routing import EfficientVectorRouting``, unchanged but for ``fastroute.compat.`` in front.

Same arguments, attributes, parameters, random draws and numbers as heinsen_routing 1.0.1 to 1.0.4. Where that one gives
NaN (an input masked for every output) or crashes (``return_dict=True`` with ``n_iters=1``, ``DefinableVectorRouting``
with ``n_inp=-1``), this one works.
"""

from ...capsules import DefinableVectorRouting, EfficientVectorRouting

__all__ = ["DefinableVectorRouting", "EfficientVectorRouting"]
