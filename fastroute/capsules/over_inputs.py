"""What a layer does over its inputs, where all of them are in one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import matrix_routing, soft_assignment
from ..ops.matrix_routing.contract import Capsules, Outputs


class OverInputs:
    """Layers call these; for inputs that several processes have, ``fastroute.distributed`` has others of them."""

    n_inp: int
    n_iters: int
    p_model: str
    eps: float

    def _inputs_here(self) -> int:
        """n_inp, of which other processes may have some."""
        return self.n_inp

    def _assigned(self, *args: Any, **options: Any) -> Tensor:
        """The sums over inputs."""
        return soft_assignment(*args, **options)

    def _for_inputs(self, t: Tensor) -> Tensor:
        """What is per output, as each input sees it."""
        return t

    def _agreed(self, draw: Tensor) -> Tensor:
        """A draw that has to be the same wherever inputs are."""
        return draw

    def _iterations(self, a: Tensor, mu: Tensor, w: Capsules, mask: Tensor | None) -> Outputs:
        """All of matrix routing's, of which the sums over inputs are in here alone."""
        return matrix_routing(a, mu, w, n_iters=self.n_iters, p_model=self.p_model, eps=self.eps, mask=mask)
