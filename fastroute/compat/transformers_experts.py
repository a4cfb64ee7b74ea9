"""Experts of Hugging Face transformers (5 and later) on fastroute's kernels.

    from fastroute.compat import transformers_experts
    transformers_experts.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="fastroute")

Axes: N tokens, k experts for each, E experts, D features, H hidden ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import combine, expert_ffn, grouped_linear
from ..modules.reading import may_be_read
from ..ops import dispatch
from ..ops.activations import ACTIVATIONS
from ..ops.arguments import checked
from ..ops.precision import autocast_dtype

NAME = "fastroute"


@checked
def register(name: str = NAME) -> None:
    """Offer ``experts_forward`` as an ``experts_implementation``.

    Raises:
        ImportError: transformers is not installed, or older than its experts interface (``pip install
            'fastroute[hf]'``).
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"transformers_experts: expected transformers 5 or later with its experts interface, got: {error}; "
            "pip install 'fastroute[hf]'"
        ) from error
    ExpertsInterface.register(name, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[N, D], [N, k] and [N, k] -> [N, D]: what the interface asks of an implementation.

    Experts act(g) * v with an activation that ``expert_ffn`` knows, without biases, run as that one op, and keep for
    backward their input alone. Others (biases, a gating of their own, a norm after it) run as two grouped products.
    Indices of ``num_experts`` or more are other processes' experts and add nothing where the module says that it is
    expert-parallel; elsewhere they are errors (on a GPU: they add nothing).
    """
    E = self.num_experts
    actions = top_k_index.to(torch.int64)
    if getattr(self, "_is_expert_parallel", False):
        actions = torch.where(actions < E, actions, -1)
    w_in = self.gate_up_proj if self.has_gate else self.up_proj
    w_out = self.down_proj
    if self.is_transposed:
        w_in, w_out = w_in.mT, w_out.mT
    plan = dispatch.plan(actions, E, "top_k_index")
    x = hidden_states if autocast_dtype(hidden_states.device.type) is not None else hidden_states.to(w_in.dtype)
    name = _activation(self.act_fn) if hasattr(self, "act_fn") else None
    if name is not None and _is_plain(self):
        y = expert_ffn(x, plan, top_k_weights, w_in, w_out, activation=name, gated=self.has_gate)
        return y.to(hidden_states.dtype)
    return _in_two_products(self, x, plan, actions, top_k_weights, w_in, w_out).to(hidden_states.dtype)


def _in_two_products(
    self: Any, x: Tensor, plan: dispatch.Plan, actions: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor
) -> Tensor:
    b_in = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else ()
    b_out = self.down_proj_bias if self.has_bias else ()
    u = grouped_linear(x, plan, w_in, b_in, keep_sorted=True)
    h = self._apply_gate(u) if self.has_gate else self.act_fn(u)
    z = grouped_linear(h, plan, w_out, b_out, is_sorted=True)
    valid = (actions >= 0) & (actions < w_in.shape[0])
    if self.has_post_expert_norm:
        z = torch.where(valid.reshape(-1, 1), self.post_expert_norm(z), 0)
    return combine(z.view(*actions.shape, z.shape[1]), weights, valid)


def _is_plain(self: Any) -> bool:
    """Whether an experts module does what ``expert_ffn`` does."""
    if self.has_bias or self.has_post_expert_norm:
        return False
    if not self.has_gate:
        return True
    from transformers.integrations.moe import _default_apply_gate

    return type(self)._apply_gate is _default_apply_gate and "_apply_gate" not in vars(self)


def _activation(act: Any) -> str | None:
    """The name of an activation module here, or None where it is another, or has to be called."""
    if not isinstance(act, nn.Module) or not may_be_read(act):
        return None
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    plain = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: "none"}
    if type(act) in plain:
        return plain[type(act)]
    # transformers' own classes; their variants written out in Python are left to themselves
    own = {"SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "LinearActivation": "none"}
    name = own.get(type(act).__name__) if type(act).__module__ == "transformers.activations" else None
    if name == "gelu" and getattr(act, "act", None) is not F.gelu:
        return None
    if name == "gelu_tanh" and "python" in repr(getattr(act, "act", "")):
        return None
    return name if name in ACTIVATIONS else None
