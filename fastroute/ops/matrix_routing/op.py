"""``matrix_routing``: all iterations of routing matrix capsules as one registered op and its gradient.

Heinsen (2019), "An Algorithm for Routing Capsules in All Domains", section 2. The passes over the inputs are the
backends'; what is per output ([m, c, h]) is plain PyTorch. Derived in ``docs/matrix_routing.md``.
Axes: B batch, T iterations, n input capsules, m output capsules, c rows of a capsule's matrix (d_cov), d its columns
before routing (d_inp), h its columns after (d_out).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..arguments import explained
from ..autograd import asked_again, called, through, transformed
from ..backends import Case, choose, offer, record, requested
from ..masked import reaching
from ..precision import autocast_dtype, autocast_off
from ..registry import define, no_second_derivative
from . import native as native  # defines the native ops
from . import reference as reference
from .contract import Capsules, MatrixGrads, MatrixStep, Moments, OutputGrads, Outputs
from .reference import first_or_next as first_or_next
from .settling import settle

OP = "matrix_routing"
P_MODELS = ("gaussian", "skm")


def known_model(name: str, value: str) -> str:
    """A p_model; ValueError if there is none of that name."""
    if value not in P_MODELS:
        raise ValueError(f"{name}: expected one of {', '.join(P_MODELS)}, got {value!r}")
    return value


#: Moments, or PreviousGrads, of some inputs to those of all.
Total = Callable[[Any], Any]
_INPUTS = (
    "Tensor a_inp, Tensor mu_inp, Tensor W, Tensor B, Tensor beta_use, Tensor beta_ign, Tensor? mask, int n_iters, "
    "str p_model, float eps, str backend"
)
_SAVED = "Tensor N0, Tensor mean, Tensor M2, Tensor a, Tensor low"


offer(OP, "native")


class Call(NamedTuple):
    """The op's arguments, and what follows from their shapes."""

    a_inp: Tensor
    mu_inp: Tensor
    w: Capsules
    mask: Tensor | None
    n_iters: int
    p_model: str
    eps: float
    backend: str

    @classmethod
    def of(cls, args: Any) -> Call:
        return cls(args[0], args[1], Capsules(*args[2:6]), *args[6:])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.mu_inp.dtype, self.w.W.dtype)

    @property
    def acc(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def case(self) -> Case:
        B, n, c, d = self.mu_inp.shape
        _, m, _, h = self.w.W.shape
        sizes = (("B", B), ("n", n), ("m", m), ("c", c), ("d", d), ("h", h))
        return Case(OP, self.mu_inp.device.type, self.dtype, sizes)

    @property
    def is_empty(self) -> bool:
        return self.a_inp.numel() == 0

    def step(self, gate: Tensor, previous: Outputs | None) -> MatrixStep:
        mu_inp = self.mu_inp.to(self.acc).contiguous()
        return MatrixStep(gate, mu_inp, *self.w, self.mask, previous, self.p_model)

    def gate(self) -> Tensor:
        return torch.sigmoid(self.a_inp.to(self.acc)).contiguous()

    def new_saved(self) -> Moments:
        """Of every iteration: [T, ...]."""
        B, _, c, _ = self.mu_inp.shape
        _, m, _, h = self.w.W.shape
        few, many = (self.n_iters, B, m), (self.n_iters, B, m, c, h)
        return Moments(*(self.mu_inp.new_empty(size, dtype=self.acc) for size in (few, many, many, few, many)))


def _folds(kernel: Any) -> bool:
    """Whether a backend does what is per output in its own kernels."""
    return bool(getattr(kernel, "folded", bool)())


def _at(saved: Moments, t: int) -> Moments:
    return Moments._make(part[t] for part in saved)


def forward_passes(call: Call, total: Total | None = None) -> tuple[Outputs, Moments]:
    """(outputs, what to keep of every iteration). ``total`` makes an iteration's moments those of all inputs, from
    those of these; None: these are all."""
    saved = call.new_saved()
    if call.is_empty:
        for part in saved:
            part.zero_()
        out = settle(_at(saved, -1), call.eps)
        return Outputs(out.a.clone(), out.mu, out.sig2), saved
    kernel = choose(call.case, call.backend)
    with autocast_off(call.mu_inp.device.type):
        step = call.step(call.gate(), None)
        for t in range(call.n_iters):
            if total is None and _folds(kernel):
                out = kernel.folded_forward(step, _at(saved, t), call.eps)
                step = step._replace(previous=out)
                continue
            made: Moments = kernel.forward(step)
            made = made if total is None else total(made)
            for kept, part in zip(saved, made, strict=True):
                if part is None:
                    kept[t].zero_()
                else:
                    kept[t] = part
            out = settle(made, call.eps)
            step = step._replace(previous=out)
    return out, saved


def _forward(*args: Any) -> tuple[Tensor, ...]:
    out, saved = forward_passes(Call.of(args))
    return *out, *saved


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call.of(args)
    record(call.case)
    saved = call.new_saved()
    return *(t.new_empty(t.shape[1:]) for t in (saved.a, saved.mean, saved.M2)), *saved


def _new_grads(call: Call, want_mu: bool, want_parameters: bool) -> MatrixGrads:
    def like(t: Tensor, wanted: bool = True) -> Tensor | None:
        return t.new_empty(t.shape, dtype=call.acc) if wanted else None

    parameters = [like(t, want_parameters) for t in call.w]
    gate = call.a_inp.new_empty(call.a_inp.shape, dtype=call.acc)
    return MatrixGrads(True, gate, like(call.mu_inp, want_mu), *parameters)


def _listed(call: Call, da_inp: Tensor, grads: MatrixGrads) -> list[Tensor]:
    made = (grads.mu_inp, grads.W, grads.bias, grads.beta_use, grads.beta_ign)
    return [da_inp, *(t if t is not None else call.mu_inp.new_empty(0, dtype=call.acc) for t in made)]


def backward_passes(
    call: Call, saved: Moments, d: Outputs, want_mu: bool, want_parameters: bool, total: Total | None = None
) -> list[Tensor]:
    """Gradients of a_inp, mu_inp and the parameters, empty where they are not wanted, from those of the outputs."""
    grads = _new_grads(call, want_mu, want_parameters)
    if call.is_empty:
        return [t.zero_() for t in _listed(call, grads.gate, grads)]
    kernel = choose(call.case, call.backend)
    with autocast_off(call.mu_inp.device.type):
        gate = call.gate()
        step = call.step(gate, None)
        for t in reversed(range(call.n_iters)):
            if total is None and _folds(kernel):
                d = kernel.folded_backward(step, _at(saved, t), _at(saved, t - 1) if t else None, d, call.eps, grads)
                grads.fresh = False
                continue
            previous = settle(_at(saved, t - 1), call.eps) if t else None
            sums = kernel.backward(step._replace(previous=previous), OutputGrads.of(_at(saved, t), d, call.eps), grads)
            grads.fresh = False
            if previous is not None:
                d = (sums if total is None else total(sums)).of(previous, call.p_model)
        da_inp = grads.gate.mul_(gate * (1 - gate))
    return _listed(call, da_inp, grads)


def _backward(*args: Any) -> list[Tensor]:
    *inputs, da, dmu, dsig2, N0, mean, M2, a, low, want_mu, want_parameters = args
    saved = Moments(N0, mean, M2, a, low)
    return backward_passes(Call.of(inputs), saved, Outputs(da, dmu, dsig2), want_mu, want_parameters)


def _backward_fake(*args: Any) -> list[Tensor]:
    *inputs, _, _, _, _, _, _, _, _, want_mu, want_parameters = args
    call = Call.of(inputs)
    record(call.case)
    grads = _new_grads(call, want_mu, want_parameters)
    return _listed(call, grads.gate, grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[3:])


def _plain(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, in the dtype of sums."""
    w = Capsules(*(t.to(call.acc) for t in call.w))
    options: dict[str, Any] = {"n_iters": call.n_iters, "p_model": call.p_model, "eps": call.eps, "mask": call.mask}
    with autocast_off(call.mu_inp.device.type):
        made = reference.matrix_routing(call.a_inp.to(call.acc), call.mu_inp.to(call.acc), w, **options)
    return made.a_out, made.mu_out, made.sig2_out


def _gradient(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # once: under checkpointing each look is a computation
    inputs, saved = tensors[:7], tensors[7:]
    needs = ctx.needs_input_grad
    nothing = (None,) * 5
    if all(t is None for t in d[:3]):
        return (*[None] * 6, *nothing)
    if asked_again(*d[:3]):

        def plain(*given: Any) -> tuple[Tensor, ...]:
            return _plain(Call.of((*given, *ctx.options)))

        return *through(plain, inputs, needs[:7], d[:3]), *nothing[1:]
    N0, mean = saved[:2]
    given = [
        torch.zeros_like(like[0]) if t is None else t.contiguous()
        for t, like in zip(d[:3], (N0, mean, mean), strict=True)
    ]
    made = called(f"{OP}_backward", *inputs, *ctx.options, *given, *saved, needs[1], any(needs[2:6]))
    grads = [g.to(t.dtype) if need else None for g, t, need in zip(made, inputs, needs, strict=False)]
    return *grads, *nothing


define(
    "matrix_routing_backward",
    f"({_INPUTS}, Tensor da_out, Tensor dmu_out, Tensor dsig2_out, {_SAVED}, bool want_mu_inp, bool want_parameters)"
    " -> Tensor[]",
    _backward,
    _backward_fake,
    autograd=no_second_derivative(OP),
)
define(
    OP,
    f"({_INPUTS}) -> (Tensor a_out, Tensor mu_out, Tensor sig2_out, {_SAVED})",
    _forward,
    _forward_fake,
    autograd=(_gradient, _setup),
)


def _check(a_inp: Tensor, mu_inp: Tensor, w: Capsules) -> None:
    if mu_inp.dim() != 4:
        raise ValueError(f"mu_inp: expected [B, n, c, d], got {checks.shown(mu_inp)}")
    if w.W.dim() != 4:
        raise ValueError(f"W: expected [n or 1, m, d, h], got {checks.shown(w.W)}")
    B, n, c, d = mu_inp.shape
    n1, m, _, h = w.W.shape
    if n1 != 1:
        n1 = n
    checks.shape("a_inp", a_inp, (B, n), "B, n")
    checks.shape("W", w.W, (n1, m, d, h), "n or 1, m, d, h")
    checks.shape("B", w.B, (n1, m, c, h), "n or 1, m, c, h")
    checks.shape("beta_use", w.beta_use, (n1, m), "n or 1, m")
    checks.shape("beta_ign", w.beta_ign, (n1, m), "n or 1, m")
    tensors = {"a_inp": a_inp, **w._asdict()}
    for name, t in {"mu_inp": mu_inp, **tensors}.items():
        checks.floating(name, t)
    checks.together(("mu_inp", mu_inp), tensors)


@explained
def matrix_routing(
    a_inp: Tensor,
    mu_inp: Tensor,
    w: Capsules,
    *,
    n_iters: int,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Outputs:
    """Route n input capsules to m output capsules by n_iters iterations, Heinsen (2019), section 2.

    The equations are in ``reference.py``. The votes [B, n, m, c, h] are never stored.

    Args:
        a_inp: [B, n], activations before the sigmoid; -inf drops the input, whatever its matrix.
        mu_inp: [B, n, c, d], the input capsules.
        w: parameters with a row per input (n1 = n) or one for all (n1 = 1).
        n_iters: iterations, at least 1.
        p_model: "gaussian", or "skm" for soft k-means.
        eps: added to the sums that are divided by, and to variances.
        mask: bool, broadcastable to [B, n, m]; True = input i may not reach output j and is neither used nor ignored by
            it, as if the pair were not there. An input masked for every output contributes nothing.

    Returns:
        ``Outputs(a [B, m], mu [B, m, c, h], sig2 [B, m, c, h])``, computed in float32 (float64 where an argument is).
        a and mu come in the promoted dtype of mu_inp and W, in float32 at least under autocast; sig2 never in less than
        float32.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> from fastroute.ops.matrix_routing.contract import Capsules
        >>> n, m, c, d, h = 6, 3, 2, 4, 4
        >>> w = Capsules(torch.randn(n, m, d, h), torch.zeros(n, m, c, h), torch.rand(n, m), torch.rand(n, m))
        >>> out = fastroute.functional.matrix_routing(torch.randn(2, n), torch.randn(2, n, c, d), w, n_iters=3)
        >>> out.a.shape, out.mu.shape
        (torch.Size([2, 3]), torch.Size([2, 3, 2, 4]))
    """
    _check(a_inp, mu_inp, w)
    checks.at_least_one("n_iters", n_iters)
    known_model("p_model", p_model)
    B, n = a_inp.shape
    m = w.W.shape[1]
    if mask is not None:
        checks.tensor("mask", mask, "a bool tensor")
        checks.together(("mu_inp", mu_inp), {"mask": mask})
        mask = checks.as_mask(mask, (B,), n, m)
        a_inp = reaching(a_inp, mask)
    dtype = torch.promote_types(mu_inp.dtype, w.W.dtype)
    if dtype == torch.float64:  # one dtype of sums, whatever is wide
        mu_inp, w = mu_inp.to(dtype), Capsules(*(t.to(dtype) for t in w))
    if autocast_dtype(mu_inp.device.type) is not None:
        dtype = torch.promote_types(dtype, torch.float32)
    if not 0 <= eps < inf:
        checks.at_least_zero("eps", eps)
    args = a_inp, mu_inp, *w, mask, n_iters, p_model, float(eps), requested()
    a, mu, sig2, *_ = _plain(Call.of(args)) if transformed() else called(OP, *args)
    return Outputs(a.to(dtype), mu.to(dtype), sig2)
