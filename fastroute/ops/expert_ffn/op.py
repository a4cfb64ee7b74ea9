"""``expert_ffn``: every sample through k feed-forward experts and a weighted sum of what they give, as one op.

Shazeer et al. (2017), arXiv 1701.06538, equation 1, with the gated experts of Shazeer (2020), arXiv 2002.05202.
Axes: B samples, k experts that each takes, N = B k entries, K experts, D features in, H hidden ones, P features out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, NUMBERS
from ..arguments import explained
from ..autograd import asked_again, called, through, transformed
from ..backends import note, taken
from ..checks import flags, floating, shown
from ..dispatch.contract import Plan
from ..dtypes import accumulating
from ..grouped_linear import plain as linear
from ..grouped_linear.op import OP as PRODUCT  # defines the products, and says which backends there are
from ..grouped_linear.reference import of_sorted
from ..host import on_host
from ..precision import autocast_dtype, autocast_off, precision_of
from ..registry import Kernels, define, no_second_derivative
from . import native, plain

OP = "expert_ffn"
_INPUTS = (
    "Tensor x, Tensor order, Tensor offsets, Tensor? weights, Tensor w_in, Tensor w_out, int per_sample, "
    "str activation, bool gated, str backend"
)


_kernels = Kernels("expert_ffn")


def _is_fused(backend: str) -> bool:
    """Whether the hidden layer is made by kernels of its own, not by a product and PyTorch."""
    return backend == "triton" and _kernels.is_fused()


def _product(backend: str, x: Tensor, take: Tensor | None, put: Tensor | None, offsets: Tensor, w: Tensor) -> Tensor:
    """One linear module per sorted row: see ``grouped_linear.plain.forward``."""
    if backend == "reference":
        return linear.forward(x, take, put, offsets, [w], ())[0]
    op, w = getattr(torch.ops.fastroute, f"_grouped_linear_{backend}"), w.resolve_neg()  # not seen in a list
    return op(x, take, put, offsets, [w], [], 0, False)[0]  # type: ignore[no-any-return]


def _product_backward(
    backend: str, grad: Tensor, x: Tensor, take: Tensor | None, spread: Tensor | None, put: Tensor | None,
    offsets: Tensor, w: Tensor, want_x: bool, want_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x (a row for each reading of it) and of w; sorted row i of ``grad`` is put[i], or i."""
    K = w.shape[0]
    if backend == "reference":
        wants = want_x, want_w, False
        dx, dw, _ = linear.backward(grad, x, take, spread, put, offsets, [w], K, wants, stacked=True)
    else:
        op, w = getattr(torch.ops.fastroute, f"_grouped_linear_{backend}_backward"), w.resolve_neg()
        dx, dw, _ = op(grad, x, take, spread, put, offsets, [w], K, want_x, want_w, False, 0, None, True, True)
    return dx, dw[0] if want_w else w.new_empty(0)


class _Call(NamedTuple):
    """The op's arguments, in the order of its schema."""

    x: Tensor
    order: Tensor
    offsets: Tensor
    weights: Tensor | None
    w_in: Tensor
    w_out: Tensor
    k: int
    activation: str
    gated: bool
    backend: str

    @property
    def samples(self) -> Tensor:
        """Of the sorted entries."""
        return self.order if self.k == 1 else self.order // self.k

    @property
    def entry_weights(self) -> Tensor | None:
        """Of the sorted entries, zero for those that are dropped whatever is there."""
        if self.weights is None:
            return None
        w = self.weights.reshape(-1).index_select(0, self.order).to(accumulating(self.x.dtype))
        bounds = on_host(self.offsets)
        if bounds is not None and bounds[-1] == self.order.shape[0]:  # none is dropped
            return w
        return torch.where(torch.arange(self.order.shape[0], device=self.order.device) < self.offsets[-1], w, 0)

    def summed(self, entries: Tensor) -> Tensor:
        """[N, ...] -> [B, ...], in float32 for half precision."""
        N, k = entries.shape[0], self.k
        return entries if k == 1 else entries.view(-1 if N else 0, k, entries.shape[1]).sum(1)


def _hidden(c: _Call, u: Tensor) -> plain.Hidden | native.Hidden:
    """The hidden layer of the sorted entries."""
    return (native.Hidden if c.backend == "native" else plain.Hidden)(u, c.activation, c.gated)


def _forward(*args: Any) -> Tensor:
    c = _Call(*args)
    with autocast_off(c.x.device.type):
        if _is_fused(c.backend):
            h, _ = _kernels.hidden(*c[:5], c.k, NUMBERS[c.activation], c.gated, precision_of(c.x, ""))
        else:
            u = _product(c.backend, c.x, c.samples, None, c.offsets, c.w_in)
            h = _hidden(c, u).weighted(c.entry_weights)
            del u
        return c.summed(_product(c.backend, h, None, c.order, c.offsets, c.w_out))


def _forward_fake(*args: Any) -> Tensor:
    c = _Call(*args)
    return c.x.new_empty(c.x.shape[0], c.w_out.shape[1])


#: The gradients of u, of weights and of w_out.
_OfHidden = tuple[Tensor | None, Tensor | None, Tensor]


def _hidden_backward(
    c: _Call, samples: Tensor, dy: Tensor, want_u: bool, want_weights: bool, want_out: bool
) -> _OfHidden:
    """The hidden layer between two products."""
    w = c.entry_weights
    u = _product(c.backend, c.x, samples, None, c.offsets, c.w_in)
    g = dy.index_select(0, samples)
    hidden = _hidden(c, u)
    h = hidden.weighted(w) if want_out else u[:, : c.w_out.shape[2]]  # then only its width is read
    inside = want_u or want_weights
    t, d_out = _product_backward(c.backend, g, h, None, None, None, c.offsets, c.w_out, inside, want_out)
    del g, h, u
    d_u, dw = hidden.gradients(t, w, want_u, want_weights) if inside else (None, None)
    d_weights = None
    if dw is not None and c.weights is not None:
        d_weights = torch.empty_like(dw).index_copy_(0, c.order, dw).view_as(c.weights).to(c.weights.dtype)
    return d_u, d_weights, d_out


def _fused_backward(
    c: _Call, samples: Tensor, dy: Tensor, want_u: bool, want_weights: bool, want_out: bool
) -> _OfHidden:
    """The same by kernels of the hidden layer; entries read their sample's row of ``dy`` where it is."""
    options, inside = (NUMBERS[c.activation], c.gated), want_u or want_weights
    h, u = _kernels.hidden(*c[:5], c.k, *options, precision_of(c.x, ""), want_h=want_out, want_u=inside)
    source = u[:, : c.w_out.shape[2]] if h is None else h  # then only its width is read
    t, d_out = _product_backward(c.backend, dy, source, None, None, samples, c.offsets, c.w_out, inside, want_out)
    d_u, d_weights = None, None
    if inside:
        d_u, d_weights = _kernels.backward(t, u, *c[1:4], *options, want_u=want_u, want_weights=want_weights)
    return d_u, d_weights, d_out


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """The hidden layer is computed again; the experts' outputs are not needed: <g, W h> = <W^T g, h>."""
    c, (dy, want_x, want_weights, want_in, want_out) = _Call(*args[:10]), args[10:]
    made: list[Tensor] = [c.x.new_empty(0) for _ in range(4)]
    want_u = want_x or want_in
    if not (want_u or want_weights or want_out):
        return tuple(made)
    with autocast_off(c.x.device.type):
        samples = c.samples
        of_hidden = _fused_backward if _is_fused(c.backend) else _hidden_backward
        d_u, d_weights, made[3] = of_hidden(c, samples, dy, want_u, want_weights, want_out)
        made[1] = made[1] if d_weights is None else d_weights
        if d_u is not None:
            dx, made[2] = _product_backward(
                c.backend, d_u, c.x, samples, c.order, None, c.offsets, c.w_in, want_x, want_in
            )
            made[0] = c.summed(dx) if want_x else made[0]
    return tuple(made)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    c, wants = _Call(*args[:10]), args[11:]
    given = zip((c.x, c.weights, c.w_in, c.w_out), wants, strict=True)
    return tuple(t.new_empty(t.shape) if wanted and t is not None else c.x.new_empty(0) for t, wanted in given)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _plain(c: _Call) -> Tensor:
    """On slices of the sorted entries, with every derivative there is."""
    with autocast_off(c.x.device.type):
        bounds = on_host(c.offsets)
        u = of_sorted(c.x, c.order, c.samples, c.offsets, bounds, [c.w_in], (), "none", True, False)
        h = plain.Hidden(u, c.activation, c.gated).weighted(c.entry_weights)
        return c.summed(of_sorted(h, c.order, None, c.offsets, bounds, [c.w_out], (), "none", False, True))


def _gradient(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * 10
    inputs = ctx.saved_tensors
    if asked_again(dy):

        def plain(*given: Any) -> list[Tensor]:
            return [_plain(_Call(*given, *ctx.options))]

        return (*through(plain, inputs, needs[:6], [dy]), *(None,) * 4)
    wants = needs[0], needs[3] and inputs[3] is not None, needs[4], needs[5]
    made = called(f"{OP}_backward", *inputs, *ctx.options, dy.contiguous(), *wants)
    dx, d_weights, d_in, d_out = (g if want else None for g, want in zip(made, wants, strict=True))
    return dx, None, None, d_weights, d_in, d_out, *(None,) * 4


define(
    "expert_ffn_backward",
    f"({_INPUTS}, Tensor dy, bool want_x, bool want_weights, bool want_in, bool want_out) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    autograd=no_second_derivative(OP),
)
define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake, autograd=(_gradient, _setup))


def _check(x: Tensor, plan: Plan, weights: Tensor | None, w_in: Tensor, w_out: Tensor, gated: bool) -> None:
    for name, t in (("x", x), ("w_in", w_in), ("w_out", w_out)):
        floating(name, t)
    N, k = plan.order.shape[0], plan.per_sample
    if w_in.dim() != 3 or w_out.dim() != 3:
        raise ValueError(
            f"w_in, w_out: expected [K, {'2H' if gated else 'H'}, D] and [K, P, H], as gated is {bool(gated)}, "
            f"got {shown(w_in)}, {shown(w_out)}"
        )
    K, inner, D = w_in.shape
    H, odd = (inner // 2, inner % 2) if gated else (inner, 0)  # jit.trace has tensors for sizes
    if odd:
        raise ValueError(f"w_in: expected [K, 2H, D] for gated experts, got {shown(w_in)}")
    if w_out.shape[0] != K or w_out.shape[2] != H:
        raise ValueError(
            f"w_out: expected [{K}, P, {H}], as w_in is {shown(w_in)} and gated is {bool(gated)}, got {shown(w_out)}"
        )
    if plan.offsets.shape[0] != K + 1:
        raise ValueError(f"plan: expected one of {K} experts, as w_in has, got one of {plan.offsets.shape[0] - 1}")
    if x.dim() != 2 or x.shape[1] != D:
        raise ValueError(f"x: expected [B, {D}], as the experts take, got {shown(x)}")
    if x.shape[0] * k != N:
        raise ValueError(f"x: expected the plan's {N // k} rows, got {shown(x)}")
    if weights is not None:
        floating("weights", weights)
        if weights.shape != (x.shape[0], k):
            raise ValueError(f"weights: expected one per entry, [{x.shape[0]}, {k}], got {shown(weights)}")


@explained
def expert_ffn(
    x: Tensor,
    plan: Plan,
    weights: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """y_b = sum_j w_bj W_out,a h(W_in,a x_b) over sample b's entries j, a the expert that the plan gives the entry.

    h(u) = act(g) * v with [g, v] = u if ``gated``, else act(u). Entries that the plan drops add nothing, whatever their
    weight is. Kept for backward are the arguments and nothing else, so that activation memory does not grow with k but
    for the plan's indices and the weights; the hidden layer is computed a second time there.

    Args:
        x: [B, D] float32, float64, bfloat16 (or, on the reference backend, any floating dtype).
        plan: from ``dispatch.plan(actions, K)``, actions [B] or [B, k].
        weights: [B, k], any floating dtype; None: ones.
        w_in: [K, 2H, D], the gate's rows before the other ones; or [K, H, D] if not ``gated``. In x's dtype.
        w_out: [K, P, H], in x's dtype.
        activation: "none", "relu", "tanh", "sigmoid", "silu", "gelu" or "gelu_tanh".

    Returns:
        y [B, P] in x's dtype (autocast's, under autocast). Half precision is rounded after each of the two products and
        after the activation; sums over features and over k are made in float32. A second
        derivative and torch.func go through plain PyTorch.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> x, actions = torch.randn(5, 8), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]])
        >>> plan = fastroute.ops.dispatch.plan(actions, 3)
        >>> w_in, w_out = torch.randn(3, 2 * 16, 8), torch.randn(3, 8, 16)
        >>> fastroute.functional.expert_ffn(x, plan, torch.full((5, 2), 0.5), w_in, w_out).shape
        torch.Size([5, 8])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    flags(gated=gated)
    _check(x, plan, weights, w_in, w_out, gated)
    device = x.device.type
    autocast = autocast_dtype(device)
    if autocast is not None and x.dtype != torch.float64:
        x, w_in, w_out = x.to(autocast), w_in.to(autocast), w_out.to(autocast)
    for name, t in (("w_in", w_in), ("w_out", w_out)):
        if t.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    given = x, plan.order, plan.offsets, weights, w_in, w_out, plan.per_sample, activation, gated
    if transformed():
        return _plain(_Call(*given, "reference"))
    N = plan.order.shape[0]
    for w in (w_in, w_out):
        note(PRODUCT, x, N=N, K=w.shape[0], F=w.shape[2], O=w.shape[1])
    backend = taken(PRODUCT, device, x.dtype)
    return called(OP, *given, backend)
