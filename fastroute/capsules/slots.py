"""``SlotAttention``, Locatello et al. (2020), "Object-Centric Learning with Slot Attention", Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import _checks
from ..ops._autocast import autocast_dtype, autocast_off
from ..ops._masked import only, reaches
from ..ops._modules import reset
from ..ops._recomputation import check_draws
from ..ops.soft_assignment import soft_assignment
from ..reference.vector_routing import row_is_live


class SlotAttention(nn.Module):
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
    """

    def __init__(
        self,
        n_slots: int,
        d_inp: int,
        d_slot: int,
        n_iters: int = 3,
        d_hidden: int | None = None,
        eps: float = 1e-8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_hidden = 2 * _checks.at_least_one("d_slot", d_slot) if d_hidden is None else d_hidden
        sizes = {"n_slots": n_slots, "d_inp": d_inp, "d_slot": d_slot, "n_iters": n_iters, "d_hidden": d_hidden}
        n_slots, d_inp, d_slot, n_iters, d_hidden = (_checks.at_least_one(k, v) for k, v in sizes.items())
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps: expected a finite number of 0 or more, got {eps}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
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
        """
        n_slots = self.n_slots if n_slots is None else _checks.at_least_one("n_slots", n_slots)
        check_draws(generator)
        mu, device = self.mu, self.mu.device
        draw = torch.randn(*batch, n_slots, self.d_slot, generator=generator, device=device, dtype=mu.dtype)
        return mu + self.log_sigma.exp() * draw

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
        _checks.tensor("x_inp", x_inp, "a tensor")
        if x_inp.dim() < 2:
            raise ValueError(f"x_inp: expected [..., n, d_inp], at least 2 dimensions, got {_checks.shown(x_inp)}")
        _checks.floating("x_inp", x_inp)
        *batch, n, d = x_inp.shape
        if d != self.d_inp:
            raise ValueError(
                f"d_inp: expected input vectors of width {self.d_inp}, got {d} (x_inp is {_checks.shown(x_inp)})"
            )
        _checks.together(("the parameters", self.mu), {"x_inp": x_inp, "slots": slots, "mask": mask})
        slots = self._begin(slots, batch, generator)
        m = slots.shape[-2]
        if mask is not None:
            _checks.tensor("mask", mask, "a bool tensor")
            mask = _checks.as_mask(mask, batch, n, m)
        device, dtype = x_inp.device.type, self.mu.dtype
        samples = math.prod(batch)
        x = x_inp.to(dtype).reshape(samples, n, d)
        if mask is not None:
            x = only(x, reaches(mask))
        if lengths is not None:
            lengths = _checks.as_lengths(lengths, batch, n, x.device)
            x = only(x, row_is_live(x, lengths))
        inputs = self.norm_inputs(x)
        k, v = self.k(inputs), self.v(inputs)
        slots = slots.to(dtype).reshape(samples, m, self.d_slot)
        autocast = autocast_dtype(device) is not None
        with autocast_off(device):  # what is per slot is small, and is kept between iterations
            for _ in range(self.n_iters):
                q = self.q(self.norm_slots(slots)) * self.d_slot**-0.5
                scores = torch.bmm(k, q.to(k.dtype).mT)
                updates = soft_assignment(scores, v[:, :, None], mask=mask, lengths=lengths, mean=True, eps=self.eps)
                slots = self.gru(updates.to(dtype).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
                slots = slots + self.mlp(self.norm_mlp(slots))
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
            return found, attn.reshape(*batch, n, m)

    def _begin(self, slots: Tensor | None, batch: Sequence[int], generator: torch.Generator | None) -> Tensor:
        if slots is None:
            return self.initial_slots(*batch, generator=generator)
        if generator is not None:
            raise ValueError("generator: expected None with slots, which are not drawn then")
        _checks.floating("slots", slots)
        lead = slots.shape[:-2]
        fits = slots.dim() >= 2 and slots.shape[-1] == self.d_slot and len(lead) <= len(batch)
        if not fits or any(a != 1 and a != b for a, b in zip(reversed(lead), reversed(batch), strict=False)):
            expected = ", ".join(map(str, [*batch, "n_slots", self.d_slot]))
            raise ValueError(f"slots: expected a shape that broadcasts to [{expected}], got {_checks.shown(slots)}")
        return slots.expand(*batch, *slots.shape[-2:])
