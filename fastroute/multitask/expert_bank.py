"""Experts and gates: what ``MMoE``, ``CGC`` and ``PLE`` are made of.

Axes: N samples (all leading axes together), T tasks, D features in, H hidden ones, P features out, E experts; G groups
of experts, each with an input of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import watching
from ..modules.names import TakenNames
from ..modules.reading import may_be_read
from ..ops.activations import ACTIVATIONS
from ..ops.arguments import Count, checked
from ..ops.autograd import is_observed
from ..ops.checks import floating, shown, tensor, together
from ..ops.dtypes import accumulating
from ..ops.precision import autocast_dtype, autocast_off
from ..ops.softmax import softmax_of_few


class Experts(TakenNames, nn.Module):
    """E feed-forward networks of one shape, run as one batched product: y_e = W_out,e act(W_in,e x + b_in,e) + b_out,e.

    Without ``hidden_features`` an expert is one layer, y_e = act(W_in,e x + b_in,e).

    Args:
        in_features, hidden_features, out_features, num_experts: D, H or None, P, E.
        activation: "relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid" or "none".
        device, dtype: of the parameters.

    Parameters: ``w_in`` [E, H, D], ``b_in`` [E, H], ``w_out`` [E, P, H], ``b_out`` [E, P]; without
    ``hidden_features`` only the first two, with P for H. Initial values are those of E times ``nn.Linear``.

    Raises:
        ValueError, TypeError: naming the argument.

    Examples:
        >>> experts = fastroute.Experts(in_features=16, hidden_features=32, out_features=8, num_experts=4)
        >>> experts(torch.randn(5, 16)).shape
        torch.Size([5, 4, 8])
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        hidden_features: Count | None,
        out_features: Count,
        num_experts: Count,
        *,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, H, P, E = in_features, hidden_features, out_features, num_experts
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.hidden_features, self.out_features, self.num_experts = D, H, P, E
        self.activation = activation
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = P if H is None else H
        self.w_in = nn.Parameter(torch.empty(E, inner, D, **own))
        self.b_in = nn.Parameter(torch.empty(E, inner, **own))
        self.w_out = None if H is None else nn.Parameter(torch.empty(E, P, H, **own))
        self.b_out = None if H is None else nn.Parameter(torch.empty(E, P, **own))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform up to 1 / sqrt(features in), weights and biases, as ``nn.Linear``."""
        for w, b in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            if w is not None and b is not None:
                bound = w.shape[2] ** -0.5
                nn.init.uniform_(w, -bound, bound)
                nn.init.uniform_(b, -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, "
            f"out_features={self.out_features}, num_experts={self.num_experts}, activation={self.activation!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., E, P], in x's dtype (autocast's, under autocast).

        Raises:
            ValueError, TypeError: x is no such tensor.
        """
        features("x", x, self.in_features, self.w_in)
        y = self.run(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.num_experts, self.out_features)

    def ask(self, xs: Sequence[Tensor]) -> Tensor:
        """One input [N, D] for all, or G for as many groups -> [N, E, P]; called where the experts may not be read."""
        if type(self) is Experts and may_be_read(self):
            return self.run(xs[0]) if len(xs) == 1 else self.run_grouped(xs)
        each = self.num_experts // len(xs)
        return torch.cat([self(x)[:, g * each : (g + 1) * each] for g, x in enumerate(xs)], 1)

    def run(self, x: Tensor) -> Tensor:
        """Unchecked: [N, D] -> [N, E, P]."""
        act = ACTIVATIONS[self.activation]
        if self.w_out is not None and _is_eager(x, self.w_in) and not (x.requires_grad and torch.is_grad_enabled()):
            # in order at once: the gradient of x, which is a sum over experts, is not wanted
            u = torch.baddbmm(self.b_in.unsqueeze(1), x.expand(self.num_experts, *x.shape), self.w_in.mT)
            return self._second(torch.relu_(u) if self.activation == "relu" else act(u)).transpose(0, 1)
        # the first layers are one product
        u = F.linear(x, self.w_in.flatten(0, 1), self.b_in.flatten()).unflatten(1, (self.num_experts, -1))
        if self.w_out is None:
            return act(u)
        # put in order before the activation: backward then needs one copy, too, and torch.compile's loops half the time
        return self._second(act(u.transpose(0, 1).contiguous())).transpose(0, 1)

    def run_grouped(self, xs: Sequence[Tensor]) -> Tensor:
        """G times [N, D] -> [N, E, P]: experts g E / G and following ones take x_g."""
        x = torch.stack([x for x in xs for _ in range(self.num_experts // len(xs))])  # expanding would copy it again
        u = torch.bmm(x, self.w_in.mT)
        u = u + self.b_in.unsqueeze(1).to(u.dtype)  # which autocast does for a linear layer, but not for a sum
        h = ACTIVATIONS[self.activation](u)
        return (h if self.w_out is None else self._second(h)).transpose(0, 1)

    def _second(self, h: Tensor) -> Tensor:
        """[E, N, H] -> [E, N, P]."""
        if self.w_out is None or self.b_out is None:
            raise RuntimeError("experts of one layer have no second one")
        return torch.baddbmm(self.b_out.unsqueeze(1), h, self.w_out.mT)


def _is_eager(x: Tensor, w: Tensor) -> bool:
    """Whether nothing looks at what is computed, or computes it otherwise, and a CPU has x's own dtype for it.

    For fewer rows to ask costs more than it gains.
    """
    if not x.is_cpu or is_observed(x, w):  # before its size is looked at, on which a graph would be guarded
        return False
    return x.shape[0] >= 16 and x.dtype in (torch.float32, torch.float64) and autocast_dtype("cpu") is None


class Gates(TakenNames, nn.Module):
    """g_t = softmax(V_t x + c_t) over E experts for each of T tasks, in float32 (or float64), under autocast too.

    Parameters: ``weight`` [T, E, D]; with ``bias``, ``bias`` [T, E].
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        num_experts: Count,
        num_tasks: Count,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, E, T = self.in_features, self.num_experts, self.num_tasks = in_features, num_experts, num_tasks
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(T, E, D, **own))
        self.bias = nn.Parameter(torch.empty(T, E, **own)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform up to 1 / sqrt(features in), as ``nn.Linear``."""
        for p in (self.weight, self.bias):
            if p is not None:
                nn.init.uniform_(p, -(self.in_features**-0.5), self.in_features**-0.5)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_experts={self.num_experts}, num_tasks={self.num_tasks}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] floating -> weights [..., T, E] that sum to one over experts.

        Raises:
            ValueError, TypeError: x is no such tensor.
        """
        features("x", x, self.in_features, self.weight, any_dtype=True)
        weights = self.run(x.reshape(-1, self.in_features))
        return weights.reshape(*x.shape[:-1], self.num_tasks, self.num_experts)

    def ask(self, xs: Sequence[Tensor]) -> Tensor:
        """One input [N, D] for all tasks, or one for each -> [N, T, E], by calls where the gates may not be read."""
        made: Tensor
        if type(self) is Gates and may_be_read(self):
            made = self.run(xs[0]) if len(xs) == 1 else self.run_grouped(torch.stack(list(xs)))
        elif len(xs) == 1:
            made = self(xs[0])
        else:
            made = torch.stack([self(x)[:, t] for t, x in enumerate(xs)], 1)
        watching.tell(self, "shares", made)
        return made

    def run(self, x: Tensor) -> Tensor:
        """Unchecked: [N, D] -> [N, T, E]."""
        with autocast_off(x.device.type):
            x, w, b = self._cast(x)
            z = F.linear(x, w.flatten(0, 1), None if b is None else b.flatten())
            return softmax_of_few(z.unflatten(1, (self.num_tasks, -1)))

    def run_grouped(self, x: Tensor) -> Tensor:
        """[T, N, D] -> [N, T, E]: a task's gate sees the task's own input."""
        with autocast_off(x.device.type):
            x, w, b = self._cast(x)
            z = torch.bmm(x, w.mT) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.mT)
            return softmax_of_few(z.transpose(0, 1))

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        to = torch.promote_types(accumulating(x.dtype), accumulating(self.weight.dtype))
        return x.to(to), self.weight.to(to), None if self.bias is None else self.bias.to(to)


class ModuleBank(nn.ModuleList):
    """Experts of any kind, in the order of their groups."""

    def of(self, xs: Sequence[Tensor], lead: torch.Size) -> tuple[Tensor, torch.Size]:
        """An input per group -> ([N, E, F], the shape that F was)."""
        each = len(self) // len(xs)
        made = [module(xs[k // each]) for k, module in enumerate(self)]
        for k, y in enumerate(made):
            tensor(f"experts[{k}]", y, "a module that gives a tensor")
            if y.shape != made[0].shape:
                raise ValueError(f"experts[{k}]: expected an output {shown(made[0])} like experts[0]'s, got {shown(y)}")
            if y.shape[: len(lead)] != lead:
                raise ValueError(
                    f"experts[{k}]: expected an output of {list(lead)} and more axes, as the gates' input has, "
                    f"got {shown(y)}"
                )
        tail = made[0].shape[len(lead) :]
        return torch.stack(made, len(lead)).reshape(lead.numel(), len(made), tail.numel()), tail


def features(name: str, x: Tensor, D: int, like: Tensor | None = None, *, any_dtype: bool = False) -> None:
    """Raises unless x is [..., D], floating, and as the parameter ``like``; its dtype may differ under autocast."""
    tensor(name, x, "a tensor [..., in_features]")
    floating(name, x)
    if x.dim() < 1 or x.shape[-1] != D:
        raise ValueError(f"{name}: expected [..., {D}], got {shown(x)}")
    if like is None:
        return
    together(("the parameters", like), {name: x})
    if not any_dtype and x.dtype != like.dtype and autocast_dtype(x.device.type) is None:
        raise TypeError(f"{name}: expected the experts' dtype {like.dtype}, got {x.dtype}")
