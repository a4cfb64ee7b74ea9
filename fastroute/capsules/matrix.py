"""``GenerativeMatrixRouting``, Heinsen (2019), "An Algorithm for Routing Capsules in All Domains"."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..functional import matrix_routing
from ..modules import watching
from ..ops import checks
from ..ops.arguments import Count, InputCapsules, Options, OutputCapsules, Several, checked
from ..ops.masked import only, reaches
from ..ops.matrix_routing.contract import Capsules, Outputs
from ..ops.matrix_routing.op import first_or_next, known_model
from ..ops.precision import autocast_dtype, autocast_off
from .over_inputs import OverInputs
from .single_beta import SingleBeta


class GenerativeMatrixRouting(Options, OverInputs, SingleBeta):
    r"""Routes n_inp capsules to n_out capsules, each an activation and a matrix, by n_iters iterations of EM.

    Every input votes for every output's matrix, V_ij = mu_inp_i W_ij + B_ij. In each iteration an input divides itself
    over the *outputs* by how probable its votes are under their Gaussians (E-step) times its own activation (D-step),
    and every output takes the mean and variance of the votes it was given, and the net benefit of the data it uses as
    its activation (M-step). Same parameters, names, initial values and order of random draws as
    ``heinsen_routing.GenerativeMatrixRouting``: a seed gives the same weights and state dicts load strictly both ways.

    Unlike there, the votes [n_inp, n_out, d_cov, d_out] are never stored (``docs/matrix_routing.md``), variances are
    never kept in less than float32, there are masks and lengths, and ``return_dict`` works with one iteration.

    Args:
        n_inp: number of input capsules, or -1 for any number (all inputs then share W, B and the betas).
        n_out: number of output capsules, at least 2.
        d_cov, d_inp: an input capsule's matrix is [d_cov, d_inp].
        d_out: an output capsule's matrix is [d_cov, d_out].
        n_iters: iterations, at least 1.
        single_beta: beta_ign is beta_use, one parameter; state dicts have its values under both names.
        p_model: "gaussian", or "skm" for soft k-means, which has no variances in its E-step.
        eps: added to the sums that are divided by, and to variances.
        return_dict: return a dict of the last iteration's arrays instead. Costs its votes and five arrays
            [..., n_inp, n_out].
        device, dtype: of the parameters.

    Shapes:
        a_inp [..., n_inp], scores before the sigmoid (-inf drops the input, whatever its matrix); mu_inp
        [..., n_inp, d_cov, d_inp]; outputs a_out [..., n_out], mu_out and sig2_out [..., n_out, d_cov, d_out]. a_out,
        mu_out come in the promoted dtype of mu_inp and the parameters, float32 under autocast, sig2_out in float32 or
        float64.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> route = fastroute.GenerativeMatrixRouting(n_inp=20, n_out=5, d_cov=4, d_inp=4, d_out=4)
        >>> a_out, mu_out, sig2_out = route(torch.randn(2, 20), torch.randn(2, 20, 4, 4))
        >>> a_out.shape, mu_out.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 4, 4]))
    """

    CONST_one: Tensor

    _options = ("n_iters", "p_model", "eps", "return_dict")

    @checked
    def __init__(
        self,
        n_inp: InputCapsules,
        n_out: OutputCapsules,
        d_cov: Count,
        d_inp: Count,
        d_out: Count,
        n_iters: Several = 3,
        single_beta: bool = False,
        p_model: Annotated[str, known_model] = "gaussian",
        eps: Annotated[float, partial(checks.positive, what="a positive number")] = 1e-5,
        return_dict: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_inp, self.n_out, self.d_cov, self.d_inp, self.d_out = n_inp, n_out, d_cov, d_inp, d_out
        self.n_iters, self.p_model, self.eps = n_iters, p_model, float(eps)
        self.return_dict, self.n_inp_is_fixed = return_dict, n_inp != -1

        rows = n_inp if self.n_inp_is_fixed else 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **factory))

        # The order of these lines is the order of keys in a state dict.
        self.W = empty(rows, n_out, d_inp, d_out)
        self.B = empty(rows, n_out, d_cov, d_out)
        self._make_betas(bool(single_beta), rows, n_out, **factory)
        self.register_buffer("CONST_one", torch.empty((), **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W anew, normal with std 1 / d_inp; everything else is 0."""
        self.CONST_one.fill_(1)
        self.W.normal_().div_(self.d_inp)
        self.B.zero_()
        self._reset_betas()

    def extra_repr(self) -> str:
        names = ("n_inp", "n_out", "d_cov", "d_inp", "d_out", "n_iters", "single_beta", "p_model", "eps", "return_dict")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    def _check_inputs(self, a_inp: Tensor, mu_inp: Tensor) -> None:
        for name, t in (("a_inp", a_inp), ("mu_inp", mu_inp)):
            checks.tensor(name, t, "a tensor")
            checks.floating(name, t)
            if t.device != self.W.device:
                raise ValueError(
                    f"{name}: expected a tensor on {self.W.device} like the parameters, got one on {t.device}; "
                    "move one of them with .to()"
                )
        if mu_inp.dim() < 3:
            raise ValueError(
                "mu_inp: expected [..., n_inp, d_cov, d_inp], at least 3 dimensions, got " + checks.shown(mu_inp)
            )
        n, c, d = mu_inp.shape[-3:]
        for name, what, expected, got in (
            ("d_cov", "matrices of {} rows", self.d_cov, c),
            ("d_inp", "matrices of {} columns", self.d_inp, d),
            ("n_inp", "{} input capsules", self._inputs_here() if self.n_inp_is_fixed else n, n),
        ):
            if got != expected:
                raise ValueError(
                    f"{name}: expected {what.format(expected)}, got {got} (mu_inp is {checks.shown(mu_inp)})"
                )
        if n == 0:
            raise ValueError(f"mu_inp: expected at least 1 input capsule, got 0 (mu_inp is {checks.shown(mu_inp)})")
        if a_inp.shape != mu_inp.shape[:-2]:
            raise ValueError(
                f"a_inp: expected one activation per input capsule, {list(mu_inp.shape[:-2])}, got "
                f"{checks.shown(a_inp)} (mu_inp is {checks.shown(mu_inp)})"
            )

    def forward(
        self,
        a_inp: Tensor,
        mu_inp: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor | None]:
        """Route capsules a_inp [..., n_inp], mu_inp [..., n_inp, d_cov, d_inp] to n_out capsules.

        Args:
            a_inp, mu_inp: floating point, on the parameters' device.
            mask: bool, broadcastable to [..., n_inp, n_out]; True = input i may not reach output j, which then neither
                uses nor ignores it. An input masked for every output contributes nothing.
            lengths: integers, one per sample (the leading dimensions), from 0 to n_inp: capsules from there on are
                padding, whose numbers do not matter. Each sample then gives what it gives alone at its own length.

        Returns:
            (a_out, mu_out, sig2_out), or with return_dict the last iteration's V [..., n_inp, n_out, d_cov, d_out],
            log_p (None with n_iters=1), R, D_use, D_ign [..., n_inp, n_out], a_out, mu_out and sig2_out.
        """
        self._check_inputs(a_inp, mu_inp)
        return self._route(a_inp, mu_inp, self._route_parameters(), mask, lengths)

    def _route_parameters(self) -> Capsules:
        return Capsules(self.W, self.B, self.beta_use, self.beta_ign)

    def _route(
        self,
        a_inp: Tensor,
        mu_inp: Tensor,
        w: Capsules,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor | None]:
        """Route to as many capsules as ``w`` is for, [n_inp or 1, any, ...]."""
        *batch, n, c, d = mu_inp.shape
        if mask is not None:
            checks.tensor("mask", mask, "a bool tensor")
            checks.together(("mu_inp", mu_inp), {"mask": mask})
            mask = checks.as_mask(mask, batch, n, w.W.shape[1])
        a, mu = a_inp.reshape(-1, n), mu_inp.reshape(-1, n, c, d)
        if mask is not None:
            open_rows = reaches(mask)
            a, mu = only(a, open_rows), only(mu, open_rows)
        if lengths is not None:
            lengths = checks.as_lengths(lengths, batch, n, mu_inp.device)
            live = torch.arange(n, device=mu_inp.device) < lengths[:, None]
            a, mu = torch.where(live, a, -torch.inf), only(mu, live)
        if self.return_dict:
            found = self._last_iteration(a, mu, w, mask)
            watching.tell(self, "credit", found["R"], None)
            return {k: None if t is None else t.reshape(*batch, *t.shape[1:]) for k, t in found.items()}
        made = self._iterations(a, mu, w, mask)
        a_out, mu_out, sig2_out = (t.reshape(*batch, *t.shape[1:]) for t in made)
        return a_out, mu_out, sig2_out

    def _last_iteration(self, a: Tensor, mu: Tensor, w: Capsules, mask: Tensor | None) -> dict[str, Tensor | None]:
        """All iterations but the last on the fused op, the last one written out, in float32 at least."""
        dtype = torch.promote_types(mu.dtype, w.W.dtype)
        acc = torch.promote_types(dtype, torch.float32)
        if autocast_dtype(mu.device.type) is not None:
            dtype = acc
        a, mu, w = a.to(acc), mu.to(acc), Capsules(*(t.to(acc) for t in w))
        with autocast_off(mu.device.type):
            before: Outputs | None = None
            if self.n_iters > 1:
                before = matrix_routing(
                    a, mu, w, n_iters=self.n_iters - 1, p_model=self.p_model, eps=self.eps, mask=mask
                )
            last = first_or_next(a, mu, before, w, p_model=self.p_model, eps=self.eps, mask=mask)
        return {k: t if t is None or k == "sig2_out" else t.to(dtype) for k, t in last._asdict().items()}
