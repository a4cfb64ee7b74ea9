"""Routing by the user's functions, of whose input vectors every process has some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .row_layers import RowSharded, under


class RowShardedDefinable(RowSharded):
    """A ``DefinableVectorRouting`` of whose input vectors every rank of a mesh has some.

    A, F and S are called with this rank's vectors. So each has to treat a vector as if it were alone, which is tried
    before the first call; and what they train has to be parameters of modules that the layer has.
    """

    A: Callable[..., Tensor]
    F: Callable[..., Tensor]
    G: Callable[..., Tensor]
    S: Callable[..., Tensor]
    n_out: int
    _check_input: Callable[..., None]
    _votes: Callable[..., Tensor]
    row_parameters = ("beta_use", "beta_ign")

    @classmethod
    def refuses(cls, module: Any) -> Exception | None:
        """Also while its width is not known."""
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            return ValueError("d_inp: expected the width of an input vector with n_inp=-1, got None; give it, or call")
        return super().refuses(module)

    @classmethod
    def by_inputs(cls, module: Any) -> dict[str, nn.Parameter]:
        """Those of A, F, S and the betas' maps."""
        return under(module, ("A", "F", "S", "compute_beta_use", "compute_beta_ign"))

    def forward(self, x_inp: Any, mask: Any = None, *, lengths: Any = None) -> Any:
        """Route the input vectors of all ranks, x_inp [..., k, d_inp] of this one, to [..., n_out, d_out]."""
        own: Any = super().forward

        def run(x: Tensor, mask: Any, lengths: Any) -> Any:
            return own(x, mask, lengths=lengths)

        return self._returned(self._of_all({"x_inp": (x_inp, -2)}, mask, lengths, {}, self.n_out, run, self._probe))

    def _probe(self, x: Tensor) -> None:
        """A, F and S on vectors beside others, and at another place: the same of each."""
        self._check_input(x)
        k = x.shape[-2]
        half = k // 2
        *batch, _, _ = x.shape
        training = [m for m in self.modules() if m.training]
        norms = nn.modules.batchnorm._BatchNorm
        mixing = [name for name, m in self.named_modules() if m.training and isinstance(m, norms)]
        if mixing:
            raise ValueError(f"{', '.join(mixing)}: expected no batch norm in training mode, which mixes input vectors")
        try:
            for m in training:
                m.training = False
            with torch.no_grad():
                x = x.detach()
                largest = x.abs().nan_to_num(0, 0, 0).amax() if x.numel() else x.new_zeros(())
                others = (1 + 2 * largest).expand(*batch, k - half, x.shape[-1])
                moved = not self._more_rows
                again = torch.cat([x[..., k - half :, :] if moved else x[..., :half, :], others], -2)
                y = self._for_probe(x, batch)
                for name, function in (("A", self.A), ("F", self.F), ("S", lambda t: self.S(t, y))):
                    self._compare(name, function, x, again, (k - half if moved else 0), half, len(batch))
        finally:
            for m in training:
                m.training = True
        with torch.enable_grad():
            for name, function in (("A", self.A), ("F", self.F)):
                self._captures(name, function, x)
            self._captures("S", lambda t: self.S(t, y.detach()), x)

    def _for_probe(self, x: Tensor, batch: Sequence[int]) -> Tensor:
        """Predictions of the right shape."""
        V = self._votes(self.F(x), batch, x.shape[-2])
        y = V.mean(1).expand(prod(batch), -1, -1).reshape(*batch, self.n_out, V.shape[-1])
        return self.G(y)

    @staticmethod
    def _compare(name: str, function: Any, x: Tensor, again: Tensor, first: int, count: int, lead: int) -> None:
        a, b = function(x), function(again)
        if not (isinstance(a, Tensor) and a.dim() > lead and a.shape == b.shape):
            return  # the layer's own checks say what was expected
        if count == 0 or a.shape[lead : lead + 1] != x.shape[-2:-1]:
            return
        a, b = a.narrow(lead, first, count), b.narrow(lead, 0, count)
        size = a.abs().nan_to_num(0, 0, 0).amax() if a.numel() else a.new_zeros(())
        # half of the digits: another place may mean another order of sums
        if bool(((a - b).abs().nan_to_num(0, 0, 0) > size * torch.finfo(a.dtype).eps ** 0.5).any()):
            raise ValueError(
                f"{name}: expected what it returns for an input vector to depend on that vector alone, got other "
                "numbers beside other vectors, or at another place; a rank has its own vectors only. Parameters with a "
                "row per input vector: name them in RowShardedCapsules(row_parameters=...)"
            )

    def _captures(self, name: str, function: Any, x: Tensor) -> None:
        """Whether something trains that is not the layer's."""
        known = {n: t.detach() for n, t in (*self.named_parameters(), *self.named_buffers())}
        with self._with(known):
            made = function(x.detach())
        if isinstance(made, Tensor) and made.requires_grad:
            raise ValueError(
                f"{name}: expected what it trains to be parameters of a module, {name}=module, got a function with "
                "tensors of its own that require gradients, which would be sums over this rank's vectors alone"
            )
