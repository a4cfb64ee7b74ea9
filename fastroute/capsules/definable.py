"""``DefinableVectorRouting``, Heinsen (2022): the same routing with activation, votes, prediction and scores defined by
the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.reading import reset
from ..ops import checks
from ..ops.arguments import Count, InputCount, Options, OutputCount, Several, checked
from ..ops.autograd import transformed
from ..ops.dtypes import accumulating
from ..ops.masked import only, reaches
from ..ops.precision import autocast_dtype
from ..ops.soft_assignment.op import share
from ..ops.vector_routing.op import row_is_live
from .over_inputs import OverInputs


class _OfAll(torch.autograd.Function):
    """[1, ...] of a tensor [B, ...] that is expanded from one; the gradient, too, is written once, not B times.

    It is right for what the tensor is expanded from, and of the tensor itself the mean over samples: for ones whose
    gradient nobody sees.
    """

    @staticmethod
    def forward(ctx: Any, expanded: Tensor) -> Tensor:
        ctx.B = expanded.shape[0]
        return expanded.narrow(0, 0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        made: Tensor = grad / ctx.B
        return made.expand(ctx.B, *grad.shape[1:])


#: Gradients of views that show all of what they are made of.
_VIEWS = frozenset(
    f"{name}Backward0" for name in ("Expand", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Alias")
)


def _shared(made: Tensor, given: Tensor) -> Tensor:
    """Votes [B, ...] expanded from ones that all samples share, as [1, ...] of these, whose gradient is written once.

    The graph then leads past the expanded votes, to their source. Where their own gradient is sure to be looked at
    (hooks, of ``given`` or of the module that gave it), or their source is not at hand, they stay what they are.
    """
    if not (torch.is_grad_enabled() and made.requires_grad):
        return made[:1]
    if torch.compiler.is_compiling():
        return _OfAll.apply(made)  # type: ignore[no-any-return]
    source = None if transformed() else made._base
    if source is None or given._backward_hooks or given.retains_grad or source.dtype != made.dtype:
        return made
    node: Any = made.grad_fn
    while node is not source.grad_fn and node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is source.grad_fn if not source.is_leaf else getattr(node, "variable", None) is source:
        one = source.as_strided((1, *made.shape[1:]), made.stride(), made.storage_offset())
        return _OfAll.apply(one.expand_as(made))  # type: ignore[no-any-return]
    return made


class DefinableVectorRouting(Options, OverInputs, nn.Module):
    r"""Routes n_inp vectors to n_out vectors; A, F, G and S say what a vector is, votes for, predicts and agrees with.

    .. math::
        f &= \sigma(A(x)), \quad V = F(x), \quad R = \tfrac{1}{n_{out}} \text{ at first, then }
        \mathrm{softmax}_j\, S(x, G(y)) \\
        \phi_{ij} &= \beta^{use}_{ij} f_i R_{ij} - \beta^{ign}_{ij} (f_i - f_i R_{ij}), \qquad
        y_j = \sum_i \phi_{ij} V_{ij}

    Heinsen (2022), section 2. Same parameters, names, initial values and order of random draws as
    ``heinsen_routing.DefinableVectorRouting``: a seed gives the same weights and state dicts load strictly both ways.
    Unlike there, ``n_inp=-1`` works, phi is not stored between forward and backward, and an input masked for every
    output contributes zero instead of NaN.

    Args:
        A: x_inp [..., n_inp, d_inp] to scores [..., n_inp] or [..., n_inp, 1] of using an input at all.
        F: x_inp to votes [..., n_inp, n_out, d_out], or flat [..., n_inp, n_out * d_out]. Votes that are the same for
            every sample may come without the leading dimensions, or expanded over them: they are not copied. The
            gradient of expanded ones is their source's alone, unless they ``retain_grad()``, or have a hook, when F
            returns.
        G: x_out [..., n_out, d_out] to predictions [..., n_out, any], of width d_inp in the paper.
        S: (x_inp, predictions) to scores of agreement [..., n_inp, n_out].
        n_inp: number of input vectors, or -1 for any number (benefits and costs are then linear in the input vector).
        n_out: number of output vectors, at least 2.
        n_iters: iterations, at least 1.
        return_dict: return a dict of the last iteration's arrays, ``phi`` among them, instead of x_out alone.
        d_inp: width of an input vector. With ``n_inp=-1`` and without it, ``compute_beta_use`` and
            ``compute_beta_ign`` are lazy: they take the width, and draw their weights, from the first input.
        device, dtype: of the module's own parameters.

    Raises:
        ValueError, TypeError: naming the argument, or which of A, F, G, S returned what, and what was expected.

    Examples:
        >>> n_inp, n_out, d = 6, 3, 8
        >>> route = fastroute.DefinableVectorRouting(
        ...     A=nn.Linear(d, 1),
        ...     F=lambda x: x.unsqueeze(-2).expand(*x.shape[:-1], n_out, d),
        ...     G=nn.Identity(),
        ...     S=lambda x, predicted: x @ predicted.transpose(-1, -2),
        ...     n_inp=n_inp,
        ...     n_out=n_out,
        ... )
        >>> route(torch.randn(4, n_inp, d)).shape
        torch.Size([4, 3, 8])
    """

    CONST_ones_over_n_out: Tensor

    _options = ("n_iters", "return_dict")
    _fixed = ("n_inp", "n_out", "d_inp")

    @checked
    def __init__(
        self,
        A: Callable[[Tensor], Tensor],
        F: Callable[[Tensor], Tensor],
        G: Callable[[Tensor], Tensor],
        S: Callable[[Tensor, Tensor], Tensor],
        n_inp: InputCount,
        n_out: OutputCount,
        n_iters: Several = 2,
        return_dict: bool = False,
        *,
        d_inp: Count | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_inp, self.n_out, self.d_inp = n_inp, n_out, d_inp
        self.n_iters, self.return_dict = n_iters, return_dict

        # The order of these lines is the order of keys in a state dict.
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("CONST_ones_over_n_out", torch.empty(n_out, **factory))
        self.A, self.F, self.G, self.S = A, F, G, S
        if n_inp != -1:
            self.beta_use = nn.Parameter(torch.empty(n_inp, n_out, **factory))
            self.beta_ign = nn.Parameter(torch.empty(n_inp, n_out, **factory))
        elif d_inp is None:
            self.compute_beta_use: nn.Linear = nn.LazyLinear(n_out, **factory)
            self.compute_beta_ign: nn.Linear = nn.LazyLinear(n_out, **factory)
        else:
            self.compute_beta_use = nn.Linear(d_inp, n_out, **factory)
            self.compute_beta_ign = nn.Linear(d_inp, n_out, **factory)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Its own tensors, in the order of random draws."""
        self.CONST_ones_over_n_out.fill_(1 / self.n_out)
        if self.n_inp != -1:
            self.beta_use.normal_()
            self.beta_ign.normal_()

    def reset_parameters(self) -> None:
        """Draw its own parameters anew, as they were drawn at first; A, F, G and S are the user's."""
        self._draw()
        if self.n_inp == -1:
            reset(self.compute_beta_use, self.compute_beta_ign)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"d_inp": None, **state})  # which a pickle of heinsen_routing's own has not

    def __repr__(self) -> str:
        names = ("A", "F", "G", "S", "n_inp", "n_out", "n_iters", "return_dict")
        return f"{self._get_name()}(" + ",\n ".join(f"{name}={getattr(self, name)}" for name in names) + ")"

    def _check_input(self, x_inp: Tensor) -> None:
        checks.input_vectors(x_inp, self._inputs_here(), self.d_inp, self.CONST_ones_over_n_out.device)

    def _betas(self, x_inp: Tensor, B: int) -> tuple[Tensor, Tensor]:
        """[n, m], or [B, n, m] where they are linear in x."""
        if self.n_inp != -1:
            return self.beta_use, self.beta_ign
        use, ign = self.compute_beta_use(x_inp), self.compute_beta_ign(x_inp)
        return use.reshape(B, *use.shape[-2:]), ign.reshape(B, *ign.shape[-2:])

    def forward(
        self, x_inp: Tensor, mask: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor | dict[str, Tensor | None]:
        """Route x_inp [..., n_inp, d_inp] to [..., n_out, d_out].

        Args:
            x_inp: floating point, on the parameters' device.
            mask: bool, broadcastable to [..., n_inp, n_out]; True = input i may not reach output j. An input masked
                for every output contributes zero: A, F and S are given zeros instead.
            lengths: integers, one per sample (the leading dimensions of x_inp), from 0 to n_inp: vectors from there on
                are padding. A, F and S are given zeros instead, and what they return there is not read.

        Returns:
            x_out in the promoted dtype of x_inp, votes and betas, at least float32 under autocast; or with return_dict
            the last iteration's a_inp [..., n_inp], V [..., n_inp, n_out, d_out], pred_x_inp, S, R, D_use, D_ign, phi
            [..., n_inp, n_out] and x_out. With n_iters=1, pred_x_inp and S are None.
        """
        self._check_input(x_inp)
        *batch, n, _ = x_inp.shape
        B, m = math.prod(batch), self.n_out
        if mask is not None:
            checks.tensor("mask", mask, "a bool tensor")
            checks.together(("x_inp", x_inp), {"mask": mask})
            mask = checks.as_mask(mask, batch, n, m)
            x_inp = only(x_inp, reaches(mask).reshape(*batch, n))
        if lengths is not None:
            lengths = checks.as_lengths(lengths, batch, n, x_inp.device)
            live = row_is_live(x_inp, lengths).reshape(*batch, n, 1)
            x_inp = only(x_inp, live[..., 0])

        use, ign = self._betas(x_inp, B)
        a_inp = self._scores_of_use(self.A(x_inp), batch, n)
        V = self._votes(self.F(x_inp), batch, n)
        dtype = torch.promote_types(torch.promote_types(x_inp.dtype, use.dtype), V.dtype)
        if autocast_dtype(x_inp.device.type) is not None:
            dtype = torch.promote_types(dtype, torch.float32)
        acc = accumulating(dtype)
        votes = V.to(acc) if acc == torch.float64 else V
        gate, prior = a_inp.reshape(B, n).to(acc).sigmoid(), self.CONST_ones_over_n_out.to(acc)

        x_out = pred = scores = None
        for t in range(self.n_iters):
            if x_out is not None:
                pred = self._for_inputs(self._predictions(self.G(x_out), batch))
                try:
                    agreed = self.S(x_inp, pred)
                except RuntimeError as error:
                    if pred.shape[-1] == x_inp.shape[-1]:
                        raise
                    raise ValueError(
                        f"G: expected to return predictions that S takes, as of width {x_inp.shape[-1]} like x_inp, "
                        f"got {checks.shown(pred)}"
                    ) from error
                scores = self._agreement(agreed, batch, n)
            if self.return_dict and t == self.n_iters - 1:
                break
            made = self._assigned(scores, votes, gate, use, ign, prior=prior, mask=mask, lengths=lengths)
            x_out = made.reshape(*batch, m, made.shape[-1]).to(dtype)
        if not self.return_dict and not watching.is_watched(self):
            assert x_out is not None
            return x_out

        if lengths is not None:
            gate = gate.masked_fill(~live.reshape(B, n), 0.0)
            scores = None if scores is None else scores.masked_fill(~live.reshape(B, n, 1), 0.0)
        wide = None if scores is None else scores.to(acc)
        sharing = partial(share, wide, gate, use.to(acc), ign.to(acc), prior, mask)
        watching.tell(self, "phi", lambda: sharing().phi.to(dtype).reshape(*batch, n, m))
        if not self.return_dict:
            assert x_out is not None
            return x_out
        if lengths is not None:
            votes = votes.masked_fill(~live.reshape(B, n, 1, 1), 0.0)
        shares = sharing()
        x_out = (shares.phi[..., None] * votes.to(acc).expand(B, -1, -1, -1)).sum(1)
        watching.tell(self, "credit", shares.R, shares.phi)
        found = {"a_inp": a_inp, "V": V.expand(B, -1, -1, -1), "pred_x_inp": pred, "S": scores,
                 **{k: t.to(dtype) for k, t in shares._asdict().items()}, "x_out": x_out.to(dtype)}  # fmt: skip
        as_given = ("a_inp", "pred_x_inp")
        return {k: t if t is None or k in as_given else t.reshape(*batch, *t.shape[1:]) for k, t in found.items()}

    # ------------------------------------------------------------------- what A, F, G and S returned, in known shapes

    def _scores_of_use(self, a: Tensor, batch: Sequence[int], n: int) -> Tensor:
        """[*batch, n]."""
        checks.tensor("A", a, "its output to be a tensor [..., n_inp]")
        expected = (*batch, n)
        if tuple(a.shape) != expected and tuple(a.shape) != (*expected, 1):
            raise ValueError(f"A: expected to return {list(expected)} or {[*expected, 1]}, got {checks.shown(a)}")
        return a.reshape(expected)

    def _votes(self, V: Tensor, batch: Sequence[int], n: int) -> Tensor:
        """[B, n, m, h], or [1, n, m, h] where they are the same for all samples."""
        checks.tensor("F", V, "its output to be a tensor [..., n_inp, n_out, d_out]")
        m, shape = self.n_out, tuple(V.shape)
        B = math.prod(batch)
        lead = len(batch)
        full, flat = (*batch, n, m), (*batch, n)
        if len(shape) == lead + 3 and shape[:-1] == full:
            made = V.reshape(B, n, m, shape[-1])
        elif len(shape) == lead + 2 and shape[:-1] == flat and shape[-1] % m == 0:
            made = V.reshape(B, n, m, shape[-1] // m)
        elif len(shape) >= 3 and shape[-3:-1] == (n, m) and all(size == 1 for size in shape[:-3]):
            made = V.reshape(1, n, m, shape[-1])
        elif len(shape) >= 2 and shape[-2] == n and shape[-1] % m == 0 and all(size == 1 for size in shape[:-2]):
            made = V.reshape(1, n, m, shape[-1] // m)
        else:
            raise ValueError(
                f"F: expected to return {[*full, 'd_out']}, flat {[*flat, f'{m} * d_out']}, or either without leading "
                f"dimensions, got {checks.shown(V)}".replace("'", "")
            )
        checks.floating("F's output", made)
        if made.shape[0] > 1 and made.stride(0) == 0:
            return _shared(made, V)
        return made

    def _predictions(self, pred: Tensor, batch: Sequence[int]) -> Tensor:
        checks.tensor("G", pred, "its output to be a tensor [..., n_out, d_inp]")
        if tuple(pred.shape[:-1]) != (*batch, self.n_out):
            expected = [*batch, self.n_out, "d_inp"]
            raise ValueError(f"G: expected to return {expected}, got {checks.shown(pred)}".replace("'", ""))
        return pred

    def _agreement(self, S: Tensor, batch: Sequence[int], n: int) -> Tensor:
        """[B, n, m]."""
        checks.tensor("S", S, "its output to be a tensor [..., n_inp, n_out]")
        expected = (*batch, n, self.n_out)
        if tuple(S.shape) != expected:
            raise ValueError(f"S: expected to return {list(expected)}, got {checks.shown(S)}")
        return S.reshape(-1, n, self.n_out)
