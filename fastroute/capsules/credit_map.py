"""The credit of inputs in outputs as a linear map: what a matrix of credit is multiplied with, and how maps compose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.reading import is_hooked
from ..ops import checks
from ._phi_tiles import PhiTiles
from .definable import DefinableVectorRouting
from .vector import EfficientVectorRouting


def checked_phi(name: str, phi: Tensor) -> None:
    checks.tensor(name, phi, "a tensor [..., n_inp, n_out]")
    checks.floating(name, phi)
    if phi.dim() < 2:
        raise ValueError(f"{name}: expected [..., n_inp, n_out], got {list(phi.shape)}")


_Product = Callable[[Tensor], Tensor]


class Credit:
    r"""The credit of n inputs in m outputs, as a linear map: a matrix :math:`\Phi` [..., n, m] that need not be there.

    Credits compose as what they are of, Heinsen (2022), Appendix A:

    ======================================  ============================================
    a routing, its phi known                ``Credit.of(phi)``
    a routing, its phi never stored         ``Credit.routed(layer, x)``
    ``b(a(x))``                             ``A @ B``
    ``x + a(x)``                            ``1 + A`` (a number stands for so many identities)
    ``a(x) + b(x)``                         ``A + B``
    ``cat([a(x), b(x)], -2)``               ``Credit.of_outputs(A, B)``, columns of A then of B
    ``a(cat([x, z], -2))``                  A itself: rows of x then of z
    ``a(x) + b(z)``, input ``cat([x, z])``  ``Credit.of_inputs(A, B)``, rows of A then of B
    ``cat([a(x), b(z)], -2)``               ``Credit.diagonal(A, B)``
    ======================================  ============================================

    A module that treats every vector alone (a layer norm, a Linear, an activation) is the identity.

    Args:
        n_inp, n_out: n, m.
        forth: weights of outputs [..., m, k] to credit of inputs [..., n, k]: :math:`\Phi w`.
        back: weights of inputs [..., n, k] to those of outputs [..., m, k]: :math:`\Phi^T w`.
        like: any tensor of the dtype and on the device of credits.

    Examples:
        >>> first, second = fastroute.Credit.of(torch.rand(6, 3)), fastroute.Credit.of(torch.rand(3, 2))
        >>> (first @ second).dense().shape  # end to end
        torch.Size([6, 2])
        >>> (first @ (1 + fastroute.Credit.of(torch.rand(3, 3)))).dense().shape  # the second routing has a residual
        torch.Size([6, 3])
    """

    def __init__(self, n_inp: int, n_out: int, forth: _Product, back: _Product, like: Tensor) -> None:
        self.n_inp, self.n_out, self._forth, self._back, self._like = n_inp, n_out, forth, back, like

    def __repr__(self) -> str:
        return f"Credit(n_inp={self.n_inp}, n_out={self.n_out})"

    # ---------------------------------------------------------------------------------------------------- made of

    @staticmethod
    def of(phi: Tensor) -> Credit:
        """Of a routing whose phi [..., n, m] is known."""
        checked_phi("phi", phi)
        n, m = phi.shape[-2:]
        return Credit(n, m, lambda w: phi @ w, lambda w: phi.mT @ w, phi)

    @staticmethod
    def routed(
        layer: nn.Module, x_inp: Tensor, mask: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> Credit:
        """Of a routing layer in its last iteration on an input, without gradients.

        Of an ``EfficientVectorRouting``, phi is made in tiles of rows whenever it is multiplied and never stored: the
        memory is that of x_inp, which must not be changed meanwhile (a ``RuntimeError`` says so), and of the
        parameters, which may. Of a ``DefinableVectorRouting``, whose S may look at all inputs at once, and of a layer
        whose submodules have to be called, it is stored. A layer that has hooks or a forward of its own is called, and
        the credit is that of what its routing is then given.
        """
        if isinstance(layer, EfficientVectorRouting) and routes(layer) and not is_hooked(layer) and layer._is_plain():
            return _of_tiles(layer, x_inp, mask, lengths)
        return routed(layer, x_inp, mask, lengths=lengths)[1]

    @staticmethod
    def identity(n: int, like: Tensor) -> Credit:
        """Of n vectors in themselves."""
        return Credit(n, n, lambda w: w, lambda w: w, like)

    @staticmethod
    def of_outputs(*parts: Credit) -> Credit:
        """Of outputs concatenated, the inputs being the same: columns beside columns."""
        _same("n_inp", parts)
        sizes = [part.n_out for part in parts]

        def forth(w: Tensor) -> Tensor:
            return _total([part.times(v) for part, v in zip(parts, w.split(sizes, -2), strict=True)])

        def back(w: Tensor) -> Tensor:
            return torch.cat([part.transposed_times(w) for part in parts], -2)

        return Credit(parts[0].n_inp, sum(sizes), forth, back, parts[0]._like)

    @staticmethod
    def of_inputs(*parts: Credit) -> Credit:
        """Of inputs concatenated, the outputs being sums of what each contributes: rows under rows."""
        _same("n_out", parts)
        sizes = [part.n_inp for part in parts]

        def forth(w: Tensor) -> Tensor:
            return torch.cat([part.times(w) for part in parts], -2)

        def back(w: Tensor) -> Tensor:
            return _total([part.transposed_times(v) for part, v in zip(parts, w.split(sizes, -2), strict=True)])

        return Credit(sum(sizes), parts[0].n_out, forth, back, parts[0]._like)

    @staticmethod
    def diagonal(*parts: Credit) -> Credit:
        """Of inputs and outputs concatenated, each part apart from the others: blocks on the diagonal."""
        _same("", parts)
        inputs, outputs = [part.n_inp for part in parts], [part.n_out for part in parts]

        def forth(w: Tensor) -> Tensor:
            return torch.cat([part.times(v) for part, v in zip(parts, w.split(outputs, -2), strict=True)], -2)

        def back(w: Tensor) -> Tensor:
            return torch.cat([part.transposed_times(v) for part, v in zip(parts, w.split(inputs, -2), strict=True)], -2)

        return Credit(sum(inputs), sum(outputs), forth, back, parts[0]._like)

    # ---------------------------------------------------------------------------------------------------- composed

    def __matmul__(self, other: Credit) -> Credit:
        if not isinstance(other, Credit):
            return NotImplemented
        if self.n_out != other.n_inp:
            raise ValueError(
                f"A @ B: expected B of {self.n_out} inputs, as many as A has outputs, got {other.n_inp} (A is "
                f"{self.n_inp} x {self.n_out}, B is {other.n_inp} x {other.n_out})"
            )
        return self._of(
            lambda w: self.times(other.times(w)),
            lambda w: other.transposed_times(self.transposed_times(w)),
            other.n_out,
        )

    def _of(self, times: _Product, transposed: _Product, n_out: int | None = None) -> Credit:
        return Credit(self.n_inp, self.n_out if n_out is None else n_out, times, transposed, self._like)

    def __mul__(self, factor: float) -> Credit:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self._of(lambda w: factor * self.times(w), lambda w: factor * self.transposed_times(w))

    __rmul__ = __mul__

    def __add__(self, other: Credit | float) -> Credit:
        if isinstance(other, (int, float)):
            if not other:  # where sum() starts
                return self
            if self.n_inp != self.n_out:
                raise ValueError(
                    f"A + {other}: expected as many outputs as inputs, got {self.n_inp} inputs and {self.n_out} outputs"
                )
            identity = Credit.identity(self.n_inp, self._like)
            return self + (identity if other == 1 else other * identity)
        if not isinstance(other, Credit):
            return NotImplemented
        if (self.n_inp, self.n_out) != (other.n_inp, other.n_out):
            raise ValueError(
                f"A + B: expected equal sizes, got {self.n_inp} x {self.n_out} and {other.n_inp} x {other.n_out}"
            )
        return self._of(
            lambda w: self.times(w) + other.times(w), lambda w: self.transposed_times(w) + other.transposed_times(w)
        )

    __radd__ = __add__

    # -------------------------------------------------------------------------------------------------------- asked

    def times(self, weights: Tensor) -> Tensor:
        """Credit [..., n, k] of the inputs in k weighted sums of outputs, weights [..., m, k]."""
        _rows("weights", weights, self.n_out, "outputs")
        return self._forth(weights)

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Credit [..., m, k] that outputs give to k weighted sums of inputs, weights [..., n, k]."""
        _rows("weights", weights, self.n_inp, "inputs")
        return self._back(weights)

    def output(self, j: int) -> Tensor:
        """Credit [..., n] of the inputs in output j."""
        if not -self.n_out <= j < self.n_out:
            raise IndexError(f"output: expected an output from 0 to {self.n_out - 1}, got {j}")
        weights = self._like.new_zeros(self.n_out, 1)
        weights[j] = 1.0
        return self.times(weights)[..., 0]

    def dense(self) -> Tensor:
        """The matrix [..., n, m]."""
        return self.times(torch.eye(self.n_out, dtype=self._like.dtype, device=self._like.device))


ROUTINGS = (EfficientVectorRouting, DefinableVectorRouting)


def routes(layer: nn.Module) -> bool:
    """Whether a call of a module is the call of a routing, and nothing more; its hooks apart."""
    own = getattr(type(layer), "forward", None)
    return "forward" not in layer.__dict__ and own in [cls.forward for cls in ROUTINGS]


def _of_tiles(layer: EfficientVectorRouting, x_inp: Tensor, mask: Any, lengths: Any) -> Credit:
    tiles = PhiTiles(layer, x_inp, mask, lengths)
    return Credit(x_inp.shape[-2], layer.n_out, tiles.times, tiles.transposed_times, tiles.x)


class Told:
    """The credit that a routing tells of, of the very pass it runs in, whatever calls it with whatever input."""

    def __init__(self, keep: Callable[[Credit], None]) -> None:
        self._keep = keep

    def see(self, layer: Any, kind: str, *seen: Any) -> None:
        if kind == "routed":
            self._keep(_of_tiles(layer, *seen))
        elif kind == "phi":
            with torch.no_grad():
                self._keep(Credit.of(seen[0]().detach()))

    @contextmanager
    def of(self, layer: nn.Module) -> Iterator[None]:
        watching.watch(layer, self)
        try:
            yield
        finally:
            watching.unwatch(layer, self)


def routed(layer: nn.Module, *args: Any, **options: Any) -> tuple[Any, Credit]:
    """(what a routing layer returns, its credit), of one call without gradients."""
    if not isinstance(layer, ROUTINGS):
        raise TypeError(
            "layer: expected an EfficientVectorRouting or a DefinableVectorRouting, whose votes have one weight phi "
            f"each, got {type(layer).__name__}"
        )
    found: list[Credit] = []
    with torch.no_grad(), Told(found.append).of(layer):
        made = layer(*args, **options)
    if len(found) != 1:
        raise TypeError(
            f"layer: expected a {type(layer).__name__} that routes once in a call, and is not compiled, got one that "
            f"told of {len(found)} routings"
        )
    return made, found[0]


def _same(size: str, parts: Sequence[Credit]) -> None:
    if not parts:
        raise ValueError("parts: expected at least one Credit, got none")
    if size and len({getattr(part, size) for part in parts}) > 1:
        raise ValueError(f"parts: expected equal {size}, got {', '.join(str(getattr(part, size)) for part in parts)}")


def _total(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _rows(name: str, t: Tensor, count: int, what: str) -> None:
    if t.dim() < 2 or t.shape[-2] != count:
        raise ValueError(f"{name}: expected [..., {count}, k], a row for each of the {what}, got {list(t.shape)}")
