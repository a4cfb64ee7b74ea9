"""``from heinsen_routing import Routing`` as of 2019, the code of arXiv 1911.00792, under a name of its own.

``GenerativeMatrixRouting`` replaced it in 2022. This one has what was left out then: any number of output capsules, and
the routing probabilities on request. It runs on the same op, so votes are never stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...capsules.over_inputs import OverInputs
from ...capsules.single_beta import SingleBeta
from ...functional import matrix_routing
from ...modules.reading import are_watched, may_be_read
from ...ops import checks
from ...ops.arguments import checked
from ...ops.matrix_routing.contract import Capsules, Outputs
from ...ops.matrix_routing.op import first_or_next, known_model
from ...ops.precision import autocast_dtype, autocast_off

__all__ = ["Routing"]


def broadcast(a_inp: Any, mu_inp: Any) -> tuple[Any, Any]:
    """Scores [..., n] and matrices [..., n, c, d] with the leading axes of both, where these broadcast."""
    if isinstance(a_inp, Tensor) and isinstance(mu_inp, Tensor) and mu_inp.dim() > 2 and a_inp.dim() > 0:
        try:
            leading = torch.broadcast_shapes(a_inp.shape, mu_inp.shape[:-2])
        except RuntimeError:  # the layer's own error names the argument
            return a_inp, mu_inp
        return a_inp.expand(leading), mu_inp.expand(*leading, *mu_inp.shape[-2:])
    return a_inp, mu_inp


_FUNCTIONS = {"f": nn.Sigmoid, "log_f": nn.LogSigmoid, "softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}


class Routing(OverInputs, SingleBeta):
    r"""Routes n_inp capsules to n_out capsules, each a score and a matrix, Heinsen (2019), section 2.

    Same arguments, parameters, names, initial values and random draws as in 2019: state dicts load strictly both ways,
    and into ``GenerativeMatrixRouting`` of the same sizes where n_out is fixed.

    Args:
        d_cov, d_inp: an input capsule's matrix is [d_cov, d_inp].
        d_out: an output capsule's matrix is [d_cov, d_out].
        n_inp: number of input capsules, or -1 for any number (all inputs then share W, B and the betas).
        n_out: number of output capsules, or -1 for any number, given with each call: all outputs then share W, and are
            told apart by ``B_brk``, B_j = B + B_brk t_j with t from -1 to 1 in n_out equal steps.
        n_iters: iterations, at least 1.
        single_beta: beta_ign is beta_use.
        p_model: "gaussian", or "skm" for soft k-means.
        eps: added to the sums that are divided by, and to variances.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    CONST_one: Tensor

    @checked
    def __init__(
        self,
        d_cov: int,
        d_inp: int,
        d_out: int,
        n_inp: int = -1,
        n_out: int = -1,
        n_iters: int = 3,
        single_beta: bool = False,
        p_model: str = "gaussian",
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_cov": d_cov, "d_inp": d_inp, "d_out": d_out, "n_iters": n_iters}
        d_cov, d_inp, d_out, n_iters = (checks.at_least_one(name, value) for name, value in sizes.items())
        for name, count in (("n_inp", n_inp), ("n_out", n_out)):
            if checks.integer(name, count) != -1 and count < 1:
                raise ValueError(f"{name}: expected a positive number of capsules, or -1 for any number, got {count}")
        known_model("p_model", p_model)
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps}")
        self.n_iters, self.p_model, self.eps = n_iters, p_model, float(eps)
        self.n_inp_is_fixed, self.n_out_is_fixed = n_inp != -1, n_out != -1
        rows, columns = max(n_inp, 1), max(n_out, 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        # The order of these lines is the order of keys in a state dict.
        self.W = nn.Parameter(torch.empty(rows, columns, d_inp, d_out, **factory))
        self.B = nn.Parameter(torch.empty(rows, columns, d_cov, d_out, **factory))
        if not self.n_out_is_fixed:
            self.B_brk = nn.Parameter(torch.empty(1, d_cov, d_out, **factory))
        self._make_betas(bool(single_beta), rows, columns, **factory)
        self.register_buffer("CONST_one", torch.empty((), **factory))
        self.reset_parameters()

        # Upstream's submodules without parameters. The op does what they do; others in their place are refused.
        self.f, self.log_f = nn.Sigmoid(), nn.LogSigmoid()
        self.softmax, self.log_softmax = nn.Softmax(dim=-1), nn.LogSoftmax(dim=-1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W anew, normal with std 1 / d_inp; everything else is 0."""
        self.CONST_one.fill_(1)
        self.W.normal_().div_(self.W.shape[-2])
        self.B.zero_()
        if not self.n_out_is_fixed:
            self.B_brk.zero_()
        self._reset_betas()

    def _capsules(self, n_out: int) -> Capsules:
        if self.n_out_is_fixed:
            return Capsules(self.W, self.B, self.beta_use, self.beta_ign)
        t = torch.linspace(-1, 1, n_out, dtype=self.B.dtype, device=self.B.device)[:, None, None]
        betas = (beta.expand(-1, n_out) for beta in (self.beta_use, self.beta_ign))
        return Capsules(self.W.expand(-1, n_out, -1, -1), self.B + self.B_brk * t, *betas)

    def _check(self, a_inp: Tensor, mu_inp: Tensor, n_out: int | None) -> int:
        """n_out of this call."""
        for function, kind in _FUNCTIONS.items():
            m = self._modules.get(function)
            if type(m) is not kind or not (may_be_read(m) or are_watched()):
                raise ValueError(
                    f"{function}: expected the {kind.__name__} that the layer was made with, which is computed and not "
                    f"called, got another {type(m).__name__}, or one with hooks or a forward of its own"
                )
        for name, t in (("a_inp", a_inp), ("mu_inp", mu_inp)):
            checks.tensor(name, t, "a tensor")
            checks.floating(name, t)
        checks.together(("the parameters", self.W), {"a_inp": a_inp, "mu_inp": mu_inp})
        c, d = self.B.shape[-2], self.W.shape[-2]
        if mu_inp.dim() < 3 or tuple(mu_inp.shape[-2:]) != (c, d):
            raise ValueError(f"mu_inp: expected [..., n_inp, {c}, {d}], got {checks.shown(mu_inp)}")
        n = mu_inp.shape[-3]
        if n == 0 or (self.n_inp_is_fixed and n != self.W.shape[0]):
            wanted = self.W.shape[0] if self.n_inp_is_fixed else "at least 1"
            raise ValueError(f"n_inp: expected {wanted} input capsules, got {n} (mu_inp is {checks.shown(mu_inp)})")
        if a_inp.shape != mu_inp.shape[:-2]:
            raise ValueError(f"a_inp: expected shape {list(mu_inp.shape[:-2])}, got {checks.shown(a_inp)}")
        if self.n_out_is_fixed:
            if n_out is not None:
                raise ValueError(
                    f"n_out: expected none, as the layer has {self.W.shape[1]} output capsules, got {n_out}"
                )
            return self.W.shape[1]
        return n if n_out is None else checks.at_least_one("n_out", n_out)

    def forward(
        self, a_inp: Tensor, mu_inp: Tensor, return_R: bool = False, *, n_out: int | None = None
    ) -> tuple[Tensor, ...]:
        """Route capsules a_inp [..., n_inp], mu_inp [..., n_inp, d_cov, d_inp] to n_out capsules.

        Args:
            a_inp: scores before the sigmoid; -inf drops an input.
            mu_inp: the inputs' matrices, on the parameters' device.
            return_R: return the last iteration's routing probabilities, too; that iteration then stores its votes.
            n_out: number of outputs where it was not fixed; None: as many as inputs.

        Returns:
            a_out [..., n_out], mu_out and sig2_out [..., n_out, d_cov, d_out], and R [..., n_inp, n_out] if asked for.
        """
        checks.flag("return_R", return_R)
        a_inp, mu_inp = broadcast(a_inp, mu_inp)
        w = self._capsules(self._check(a_inp, mu_inp, n_out))
        batch, n = mu_inp.shape[:-3], mu_inp.shape[-3]
        a, mu = a_inp.reshape(-1, n), mu_inp.reshape(-1, *mu_inp.shape[-3:])
        options: dict[str, Any] = {"p_model": self.p_model, "eps": self.eps}
        made: tuple[Tensor, ...]
        if return_R:
            dtype = torch.promote_types(mu.dtype, w.W.dtype)
            acc = torch.promote_types(dtype, torch.float32)
            dtype = acc if autocast_dtype(mu.device.type) is not None else dtype
            with autocast_off(mu.device.type):
                a, mu, w = a.to(acc), mu.to(acc), Capsules(*(t.to(acc) for t in w))
                before: Outputs | None = None
                if self.n_iters > 1:
                    before = matrix_routing(a, mu, w, n_iters=self.n_iters - 1, **options)
                last = first_or_next(a, mu, before, w, **options)
            made = last.a_out.to(dtype), last.mu_out.to(dtype), last.sig2_out, last.R.to(dtype)
        else:
            made = self._iterations(a, mu, w, None)
        return tuple(t.reshape(*batch, *t.shape[1:]) for t in made)
