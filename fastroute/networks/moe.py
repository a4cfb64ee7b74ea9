"""A mixture-of-experts layer: top-k gating and feed-forward experts, as one module.

Axes: N tokens, D features (``d_model``), H hidden ones (``d_hidden``), E experts, k of them for a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import expert_ffn
from ..modules.reading import may_be_read, reset
from ..ops import dispatch
from ..ops.activations import ACTIVATIONS
from ..ops.arguments import Count, Natural, Options, checked
from ..ops.checks import flag, floating, shown, tensor, together
from ..ops.masked import only
from .decisions.base import as_mask
from .gating import Routed, TopKGating
from .trajectory import Trajectory


class Aux(NamedTuple):
    """What a mixture did beside its output."""

    loss: Tensor  #: the balance loss and the z-loss, scaled, in one number: to be added to the loss
    actions: Tensor  #: [..., k] int64: the experts of each token, -1 for dropped ones
    weights: Tensor  #: [..., k]: theirs, with their gradient
    counts: Tensor  #: [E] int64: tokens that chose each expert


class MoE(Options, nn.Module):
    """y = sum_j w_j W_down,a (act(W_gate,a x) * W_up,a x) over the token's k experts a, plus what all tokens share.

    Shazeer et al. 2017 (arXiv 1701.06538) with gated experts (Shazeer 2020, arXiv 2002.05202); shared experts as in
    DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066). The experts are one op, ``ops.expert_ffn``, whose activation memory
    is that of its input: it does not grow with k or ``d_hidden``, the hidden layer is computed again in backward.

    Args:
        d_model, d_hidden, num_experts, k: D, H, E, k.
        activation: "silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid" or "none".
        gated: False for experts W_down act(W_up x).
        shared_experts: as many experts that every token takes, unweighted, in one feed-forward network of
            ``shared_experts * d_hidden`` hidden features.
        gating: ``TopKGating``'s options: scores, normalize, bias, jitter, capacity, balance_loss, z_loss,
            bias_balancing, generator.

    Parameters: ``w_gate_up`` [E, 2H, D] (the gates' rows first; [E, H, D] if not gated), ``w_down`` [E, D, H], all
    experts' in one tensor, so that every one has a gradient, zeros where nobody came; ``gate.router.weight`` [E, D];
    ``shared_gate_up`` and ``shared_down`` without the first axis.

    Examples:
        >>> layer = fastroute.MoE(d_model=16, d_hidden=32, num_experts=8, k=2)
        >>> y, aux = layer(torch.randn(2, 10, 16), return_aux=True)
        >>> (y.sum() + aux.loss).backward()
        >>> y.shape, aux.counts.sum()  # two entries for each of 20 tokens
        (torch.Size([2, 10, 16]), tensor(40))
    """

    _fixed = ("gated", "shared_experts")

    @checked
    def __init__(
        self,
        d_model: Count,
        d_hidden: Count,
        num_experts: Count,
        k: Count = 2,
        *,
        activation: str = "silu",
        gated: bool = True,
        shared_experts: Natural = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gating: Any,
    ) -> None:
        super().__init__()
        D, H, E, S = d_model, d_hidden, num_experts, shared_experts
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.d_model, self.d_hidden, self.num_experts, self.shared_experts = D, H, E, S
        self.activation, self.gated = activation, bool(gated)
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = TopKGating(E, D, k, **gating, **own)
        rows = 2 if self.gated else 1
        self.w_gate_up = nn.Parameter(torch.empty(E, rows * H, D, **own))
        self.w_down = nn.Parameter(torch.empty(E, D, H, **own))
        self.shared_gate_up = nn.Parameter(torch.empty(rows * S * H, D, **own)) if S else None
        self.shared_down = nn.Parameter(torch.empty(D, S * H, **own)) if S else None
        self._draw()

    def reset_parameters(self) -> None:
        """Uniform up to 1 / sqrt(features in), as ``nn.Linear``; the gate's as well."""
        reset(self.gate)
        self._draw()

    def _draw(self) -> None:
        for w in (self.w_gate_up, self.w_down, self.shared_gate_up, self.shared_down):
            if w is not None:
                nn.init.uniform_(w, -(w.shape[-1] ** -0.5), w.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        shared = f", shared_experts={self.shared_experts}" if self.shared_experts else ""
        return (
            f"d_model={self.d_model}, d_hidden={self.d_hidden}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, gated={self.gated}{shared}"
        )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, Aux]:
        """Every token through its experts.

        Args:
            x: [..., D] floating, in the experts' dtype (any, under autocast).
            mask: [...] bool; tokens that are False give zeros and take no part in losses and counts.
            return_aux: return (y, :class:`Aux`). Nothing is kept on the module, so that it can be called several times,
                compiled and checkpointed; without this the losses are not to be had.

        Returns:
            y [..., D] in x's dtype (autocast's, under autocast). Tokens whose experts are all dropped give zeros (or
            the shared experts' output).

        Raises:
            ValueError, TypeError: naming the argument.
        """
        tensor("x", x, "a tensor [..., d_model]")
        floating("x", x)
        D, lead = self.d_model, x.shape[:-1]
        if x.dim() < 1 or x.shape[-1] != D:
            raise ValueError(f"x: expected [..., {D}], got {shown(x)}")
        flag("return_aux", return_aux)
        together(("the experts", self.w_down), {"x": x})
        flat, active = x.reshape(-1, D), None
        if mask is not None:
            tensor("mask", mask, "a bool tensor [...]")
            if mask.shape != lead:
                raise ValueError(f"mask: expected one per token, {list(lead)}, got {shown(mask)}")
            active = as_mask(mask.reshape(-1), flat.shape[0], x.device)
            flat = only(flat, active)
        routed = self._routed(flat, active, return_aux)
        y = self._mixture(flat, active, routed)
        y = y.reshape(*lead, D)
        if not return_aux:
            return y
        k = routed.actions.shape[1]
        return y, Aux(routed.loss, routed.actions.view(*lead, k), routed.weights.view(*lead, k), routed.counts)

    def _routed(self, x: Tensor, active: Tensor | None, losses: bool) -> Routed:
        """The gating's decision, by a call of it where that is seen or changed by others."""
        gate: Any = self.gate
        if type(gate) is TopKGating and may_be_read(gate):
            return gate.route(x, active, losses=losses)
        meta = Trajectory(x.shape[0])
        actions = gate(x, meta, None, active)[2]
        weights = meta.weights_of(actions)
        if weights is None:
            raise ValueError("gate: expected a gating that leaves its weights in the trajectory, got none there")
        made = meta.mixtures[-1]
        counts = made.counts
        if counts is None:
            taken = torch.where(actions >= 0, actions, self.num_experts).reshape(-1)
            counts = taken.new_zeros(self.num_experts + 1).index_add(0, taken, torch.ones_like(taken))[:-1]
        return Routed(actions, weights, made.losses, counts)

    def _mixture(self, x: Tensor, active: Tensor | None, routed: Routed) -> Tensor:
        """[N, D]: the routed experts and the shared ones."""
        plan = dispatch.plan(routed.actions, self.num_experts)
        options: dict[str, Any] = {"activation": self.activation, "gated": self.gated}
        y = expert_ffn(x, plan, routed.weights, self.w_gate_up, self.w_down, **options)
        return y if self.shared_experts == 0 else y + self._shared_out(self._shared_hidden(x), active)

    def _shared_hidden(self, x: Tensor) -> Tensor:
        """The first half of the shared experts."""
        u = F.linear(x, self.shared_gate_up)  # type: ignore[arg-type]
        g, v = u.chunk(2, -1) if self.gated else (u, None)
        h = ACTIVATIONS[self.activation](g)
        return h if v is None else h * v

    def _shared_out(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return only(F.linear(h, self.shared_down), mask)  # type: ignore[arg-type]
