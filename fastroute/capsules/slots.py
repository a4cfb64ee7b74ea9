"""``SlotAttention``, Locatello et al. (2020), "Object-Centric Learning with Slot Attention", Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import watching
from ..modules.reading import may_be_read, reset
from ..ops import checks
from ..ops.arguments import Count, Options, Several, checked
from ..ops.masked import only, reaching
from ..ops.precision import autocast_dtype, autocast_off
from ..ops.recomputation import draws_of
from ..ops.vector_routing.op import row_is_live
from .over_inputs import OverInputs


class SlotAttention(Options, OverInputs, nn.Module):
    r"""Slots compete for input vectors: each input divides itself over the *slots*, each slot takes a weighted mean.

    With LN a layer norm with affine, K slots of width D, and n_iters times:

    .. math::
        A_{ij} &= \mathrm{softmax}_j\, \langle k(\mathrm{LN}(x_i)), q(\mathrm{LN}(s_j)) \rangle / \sqrt{D} \\
        u_j &= \sum_i (A_{ij} + \epsilon)\, v(\mathrm{LN}(x_i)) \Big/ \sum_i (A_{ij} + \epsilon) \\
        s_j &\leftarrow \mathrm{GRU}(u_j, s_j), \qquad s_j \leftarrow s_j + \mathrm{MLP}(\mathrm{LN}(s_j))

    It is one more routing with a softmax over outputs and a sum over inputs: the mean runs on ``ops.soft_assignment``,
    which stores no [n, n_slots] array but the scores.

    Slots begin as draws from one learned normal distribution, N(mu, exp(log_sigma)^2), which makes them exchangeable;
    any number of them can be drawn when the layer is used (``initial_slots``).

    Args:
        n_slots: how many slots, at least 1.
        d_inp, d_slot: widths of an input vector and of a slot.
        n_iters: iterations, at least 1.
        d_hidden: of the MLP; None: 2 * d_slot.
        eps: added to every weight of the mean.
        device, dtype: of the parameters.

    Shapes:
        x_inp [..., n, d_inp] of any leading dimensions; output [..., n_slots, d_slot] in the parameters' dtype, float32
        under autocast.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> layer = fastroute.SlotAttention(n_slots=5, d_inp=16, d_slot=32)
        >>> slots, attn = layer(torch.randn(2, 40, 16), return_attn=True)
        >>> slots.shape, attn.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 40, 5]))
        >>> torch.allclose(attn.sum(-1), torch.ones(2, 40))
        True
    """

    _options = ("n_slots", "n_iters", "eps")
    _fixed = ("d_slot",)

    @checked
    def __init__(
        self,
        n_slots: Count,
        d_inp: Count,
        d_slot: Count,
        n_iters: Several = 3,
        d_hidden: Count | None = None,
        eps: Annotated[float, partial(checks.at_least_zero, what="a finite number of 0 or more")] = 1e-8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = 2 * d_slot if d_hidden is None else d_hidden
        self.n_slots, self.d_inp, self.d_slot = n_slots, d_inp, d_slot
        self.n_iters, self.d_hidden, self.eps = n_iters, d_hidden, eps

        def linear(a: int, b: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(a, b, bias=bias, device=device, dtype=dtype)

        def normed(width: int) -> nn.LayerNorm:
            return nn.LayerNorm(width, device=device, dtype=dtype)

        self.mu = nn.Parameter(torch.empty(1, d_slot, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.empty(1, d_slot, device=device, dtype=dtype))
        self._draw()
        self.norm_inputs, self.norm_slots, self.norm_mlp = normed(d_inp), normed(d_slot), normed(d_slot)
        self.k, self.q, self.v = linear(d_inp, d_slot), linear(d_slot, d_slot), linear(d_inp, d_slot)
        self.gru = nn.GRUCell(d_slot, d_slot, device=device, dtype=dtype)
        self.mlp = nn.Sequential(linear(d_slot, d_hidden, True), nn.ReLU(), linear(d_hidden, d_slot, True))

    def _draw(self) -> None:
        nn.init.xavier_uniform_(self.mu)
        nn.init.xavier_uniform_(self.log_sigma)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as they were drawn at first."""
        self._draw()
        reset(*(part for part in self.modules() if part is not self))

    def extra_repr(self) -> str:
        names = ("n_slots", "d_inp", "d_slot", "n_iters", "d_hidden", "eps")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def initial_slots(
        self, *batch: int, n_slots: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw slots [*batch, n_slots, d_slot] to begin with.

        Args:
            batch: leading sizes.
            n_slots: another number of slots than the layer's.
            generator: of the random numbers; None: torch's own.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        n_slots = self.n_slots if n_slots is None else checks.at_least_one("n_slots", n_slots)
        mu, device = self.mu, self.mu.device
        try:
            draw = torch.randn(*batch, n_slots, self.d_slot, device=device, dtype=mu.dtype, **draws_of(generator))
        except (RuntimeError, TypeError):
            for size in batch:
                checks.natural("batch", size)
            if generator is not None and not isinstance(generator, torch.Generator):
                raise TypeError(f"generator: expected a torch.Generator, got {checks.given(generator)}") from None
            raise
        return mu + self.log_sigma.exp() * self._agreed(draw)

    def forward(
        self,
        x_inp: Tensor,
        slots: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        return_attn: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gather x_inp [..., n, d_inp] in slots [..., n_slots, d_slot].

        Args:
            x_inp: floating point, on the parameters' device.
            slots: to begin with, broadcastable to [..., n_slots, d_slot], any number of them; None: drawn.
            mask: bool, broadcastable to [..., n, n_slots]; True = input i may not reach slot j. An input masked for
                every slot counts for none (``padding[..., None]``), a slot without inputs is updated with zero.
            lengths: integers, one per sample (the leading dimensions of x_inp), from 0 to n: vectors from there on are
                padding, never read.
            generator: of the drawn slots.
            return_attn: also return the last iteration's A [..., n, n_slots], 0 where masked or padding.

        Returns:
            slots, or (slots, attn).
        """
        checks.tensor("x_inp", x_inp, "a tensor")
        if x_inp.dim() < 2:
            raise ValueError(f"x_inp: expected [..., n, d_inp], at least 2 dimensions, got {checks.shown(x_inp)}")
        checks.floating("x_inp", x_inp)
        *batch, n, d = x_inp.shape
        if d != self.d_inp:
            raise ValueError(
                f"d_inp: expected input vectors of width {self.d_inp}, got {d} (x_inp is {checks.shown(x_inp)})"
            )
        checks.flag("return_attn", return_attn)
        for name, t in (("slots", slots), ("mask", mask)):
            if t is not None:
                checks.tensor(name, t, "a tensor")
        checks.together(("the parameters", self.mu), {"x_inp": x_inp, "slots": slots, "mask": mask})
        slots = self._begin(slots, batch, generator)
        m = slots.shape[-2]
        if mask is not None:
            mask = checks.as_mask(mask, batch, n, m)
        device, dtype = x_inp.device.type, self.mu.dtype
        samples = math.prod(batch)
        x = reaching(x_inp.to(dtype).reshape(samples, n, d), mask)
        if lengths is not None:
            lengths = checks.as_lengths(lengths, batch, n, x.device)
            x = only(x, row_is_live(x, lengths))
        norm, (to_k, to_v) = _folded(self.norm_inputs, self.k, self.v)
        x = norm(x)
        k, v = to_k(x), to_v(x)
        slots = slots.to(dtype).reshape(samples, m, self.d_slot)
        autocast = autocast_dtype(device) is not None
        with autocast_off(device):  # what is per slot is small, and is kept between iterations
            norm_slots, (to_q,) = _folded(self.norm_slots, self.q)
            is_read = type(self.mlp) is nn.Sequential and may_be_read(self.mlp)
            begin, *others = self.mlp if is_read else (self.mlp,)
            norm_mlp, (first,) = _folded(self.norm_mlp, begin)
            for _ in range(self.n_iters):
                q = to_q(norm_slots(slots)) * self.d_slot**-0.5
                scores = torch.bmm(k, self._for_inputs(q).to(k.dtype).mT)
                updates = self._assigned(scores, v[:, :, None], mask=mask, lengths=lengths, mean=True, eps=self.eps)
                slots = self.gru(updates.to(dtype).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
                made = first(norm_mlp(slots))
                for layer in others:
                    made = layer(made)
                slots = slots + made
            if autocast:
                slots = slots.to(torch.promote_types(dtype, torch.float32))
            found = slots.reshape(*batch, m, self.d_slot)
            if not return_attn:
                return found
            closed = torch.zeros_like(scores, dtype=torch.bool) if mask is None else mask
            if lengths is not None:
                closed = closed | ~row_is_live(x, lengths)[..., None]
            shut = closed.all(-1, keepdim=True)
            attn = scores.to(found.dtype).masked_fill(closed & ~shut, -torch.inf).softmax(-1).masked_fill(shut, 0.0)
            watching.tell(self, "credit", attn, None)
            return found, attn.reshape(*batch, n, m)

    def _begin(self, slots: Tensor | None, batch: Sequence[int], generator: torch.Generator | None) -> Tensor:
        if slots is None:
            return self.initial_slots(*batch, generator=generator)
        if generator is not None:
            raise ValueError("generator: expected None with slots, which are not drawn then")
        checks.floating("slots", slots)
        lead = slots.shape[:-2]
        fits = slots.dim() >= 2 and slots.shape[-2] > 0 and slots.shape[-1] == self.d_slot and len(lead) <= len(batch)
        if not fits or any(a != 1 and a != b for a, b in zip(reversed(lead), reversed(batch), strict=False)):
            expected = ", ".join(map(str, [*batch, "n_slots", self.d_slot]))
            raise ValueError(f"slots: expected a shape that broadcasts to [{expected}], got {checks.shown(slots)}")
        return slots.expand(*batch, *slots.shape[-2:])


def _folded(norm: Any, *linears: Any) -> tuple[Callable[[Tensor], Tensor], list[Callable[[Tensor], Tensor]]]:
    """The norm and what is done with its output, W (w * x + b) + c as (W w) x + (W b + c).

    So the gradients of w and b are sums over W's rows, after a product. PyTorch's layer norm sums over x's rows, in as
    many parts as there are threads: other bits for another number of them.
    """
    alike = type(norm) is nn.LayerNorm and norm.bias is not None and may_be_read(norm)
    for m in linears:
        alike = alike and type(m) is nn.Linear and may_be_read(m) and m.weight.dtype == norm.weight.dtype
    if not alike:
        return norm, list(linears)
    biases = [m.weight @ norm.bias if m.bias is None else torch.addmv(m.bias, m.weight, norm.bias) for m in linears]
    return (
        partial(F.layer_norm, normalized_shape=norm.normalized_shape, eps=norm.eps),
        [partial(F.linear, weight=m.weight * norm.weight, bias=b) for m, b in zip(linears, biases, strict=True)],
    )
