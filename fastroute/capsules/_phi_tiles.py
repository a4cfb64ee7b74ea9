"""phi of an ``EfficientVectorRouting``'s last iteration, tile by tile of input rows, and its products with matrices.

Axes: B batch, n input vectors, r rows of a tile, m output vectors, d width of an input vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..functional import efficient_routing
from ..ops import checks
from ..ops.efficient_routing.contract import Parameters, check_sizes
from ..ops.efficient_routing.op import input_scale, predict
from ..ops.host import version_of
from ..ops.masked import only, reaches
from ..ops.precision import autocast_off
from ..ops.tiles import tile_rows
from ..ops.vector_routing.op import assign, gates, row_is_live
from .vector import EfficientVectorRouting

_BY_ROW = ("W_A", "B_A", "W_S", "B_S")
_BETAS = ("beta_use", "beta_ign")


class PhiTiles:
    """phi [..., n, m] as a matrix that is only multiplied. Memory: x_inp, a prediction [B, m, d] and one tile.

    Parameters are copied, which an optimizer changes (a fused one without a new version of them); x_inp and mask are
    looked at again, and refused where their versions have changed.
    """

    def __init__(
        self,
        layer: EfficientVectorRouting,
        x_inp: Tensor,
        mask: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
    ) -> None:
        layer._check_input(x_inp)
        self.batch, n = x_inp.shape[:-2], x_inp.shape[-2]
        if mask is not None:
            checks.tensor("mask", mask, "a bool tensor")
            mask = checks.as_mask(mask, self.batch, n, layer.n_out)
        if lengths is not None:
            lengths = checks.as_lengths(lengths, self.batch, n, x_inp.device)
        self.mask, self.lengths, self.n_out = mask, lengths, layer.n_out
        self.x = x_inp.detach().reshape(math.prod(self.batch), n, x_inp.shape[-1])
        with torch.no_grad(), autocast_off(x_inp.device.type):
            w = layer._parameters_by_name()
            check_sizes(w, *self.x.shape[-2:])
            dtype = torch.promote_types(self.x.dtype, w.W_F2.dtype)
            self.x = self.x.to(dtype)
            self.x = self.x.clone() if self.x.is_inference() else self.x  # which has no version
            self.w = Parameters._make(t if t is None else t.to(dtype, copy=True) for t in w)
            self._versions = self._seen()
            self.pred = None
            if layer.n_iters > 1:
                before = efficient_routing(
                    self.x, self.w, n_iters=layer.n_iters - 1, normalize=False, mask=mask, lengths=lengths
                )
                self.pred = predict(before.to(dtype), self.w)

    def _seen(self) -> list[int]:
        return [version_of(t) for t in (self.x, self.mask) if t is not None]

    def _of_rows(self, rows: slice) -> Parameters:
        names = _BY_ROW if self.w.bias_use is not None else _BY_ROW + _BETAS
        made = {k: t if (t := getattr(self.w, k)).shape[0] == 1 else t[rows] for k in names}
        return self.w._replace(**made)

    @torch.no_grad()
    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, phi [*batch, r, m]) for all rows."""
        if self._seen() != self._versions:
            raise RuntimeError(
                "x_inp: expected the routing's input (or its mask) as it was in the call, got one that was changed in "
                "place since, as by x += y; write x = x + y, or ask for the credit (Credit.dense()) before"
            )
        B, n, d = self.x.shape
        scale = input_scale(self.x, self.lengths).to(self.x.dtype)
        live = None if self.lengths is None else row_is_live(self.x, self.lengths)
        reached = None if self.mask is None else reaches(self.mask)
        size = tile_rows(max(B, 1), n, d + 4 * self.n_out, self.x.element_size(), self.x.device)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            x, w = self.x[:, rows], self._of_rows(rows)
            for kept in (live, reached):
                x = only(x, None if kept is None else kept[:, rows])
            gate = only(gates(x, w.W_A, w.B_A, scale).sigmoid(), None if live is None else live[:, rows])
            phi = assign(
                x, gate, self.pred, w.W_S, w.B_S, w.beta_use, w.beta_ign, use_bias=w.bias_use, ign_bias=w.bias_ign,
                prior=w.prior, mask=None if self.mask is None else self.mask[:, rows],
            ).phi  # fmt: skip
            yield rows, phi.reshape(*self.batch, rows.stop - rows.start, self.n_out)

    def times(self, weights: Tensor) -> Tensor:
        """phi times weights [..., m, k]: [..., n, k]."""
        weights = weights.to(self.x.dtype)
        return torch.cat([phi @ weights for _, phi in self.tiles()], -2)

    def transposed_times(self, weights: Tensor) -> Tensor:
        """The transpose of phi times weights [..., n, k]: [..., m, k]."""
        weights = weights.to(self.x.dtype)
        lead = torch.broadcast_shapes(self.batch, weights.shape[:-2])
        total = weights.new_zeros(*lead, self.n_out, weights.shape[-1])
        for rows, phi in self.tiles():
            total += phi.mT @ weights[..., rows, :]
        return total
