"""The layers of both generations, under the path of their only file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import capsules
from ...capsules import DefinableVectorRouting, EfficientVectorRouting
from ..heinsen_routing_2019 import Routing, broadcast

#: ``from heinsen_routing import *`` brings what the file of 2019 itself imports, too: scripts use it.
__all__ = [
    "DefinableVectorRouting",
    "EfficientVectorRouting",
    "GenerativeMatrixRouting",
    "Routing",
    "math",
    "nn",
    "torch",
]


class GenerativeMatrixRouting(capsules.GenerativeMatrixRouting):
    """``fastroute.GenerativeMatrixRouting`` whose two inputs broadcast against each other, as upstream's."""

    def forward(self, a_inp: Tensor, mu_inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        """a_inp [..., n_inp] and mu_inp [..., n_inp, d_cov, d_inp]; see ``fastroute.GenerativeMatrixRouting``."""
        return super().forward(*broadcast(a_inp, mu_inp), *args, **kwargs)
