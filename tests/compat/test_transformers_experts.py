"""Hugging Face experts on fastroute: every kind of experts module that transformers has, against its own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import use_backend
from fastroute.compat import transformers_experts
from fastroute.functional import expert_ffn as expert_ffn_op
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.budget import assert_within_budget
from tests.helpers.extras import needed
from tests.helpers.opcheck import assert_same, check_compiled

transformers = needed("transformers")
moe = needed("transformers.integrations.moe")
F64 = torch.float64
N, D, H, E, k = 11, 8, 6, 5, 3


@pytest.fixture(autouse=True)
def leave_no_trace() -> Any:
    before = dict(moe.ExpertsInterface._global_mapping)
    transformers_experts.register()
    yield
    moe.ExpertsInterface._global_mapping.clear()
    moe.ExpertsInterface._global_mapping.update(before)


def mixtral(act: str = "silu") -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=k, hidden_act=act
    )
    return MixtralExperts(config)


def qwen3() -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = transformers.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=H, num_experts=E, num_experts_per_tok=k, num_hidden_layers=1
    )
    return Qwen3MoeExperts(config)


def gpt_oss() -> nn.Module:
    """Transposed weights, biases, a gate of its own on interleaved rows."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(
        hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=k, num_hidden_layers=1
    )
    return GptOssExperts(config)


class Small(nn.Module):
    """What a user's experts class looks like."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, H, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, H))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(D)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for n in range(len(x)):
            for e, w in zip(index[n], weights[n], strict=True):
                z = self.down_proj[e] @ self.act_fn(self.up_proj[e] @ x[n])
                y[n] += w * (self.post_expert_norm(z) if self.has_post_expert_norm else z)
        return y


def small(norm: bool) -> nn.Module:
    cls = moe.use_experts_implementation(type("Small", (Small,), {}), has_gate=False, has_post_expert_norm=norm)
    return cls(transformers.PretrainedConfig())


#: Experts modules, and whether they are one op.
MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "mixtral": (mixtral, True),
    "mixtral-relu": (lambda: mixtral("relu"), True),
    "mixtral-gelu": (lambda: mixtral("gelu"), True),
    "mixtral-gelu-tanh": (lambda: mixtral("gelu_pytorch_tanh"), True),
    "mixtral-gelu-new": (lambda: mixtral("gelu_new"), False),
    "qwen3": (qwen3, True),
    "gpt-oss": (gpt_oss, False),
    "no-gate": (lambda: small(False), True),
    "norm-after": (lambda: small(True), False),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    generator = seeds.generator(0)
    module = MODULES[name][0]().to(F64)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:k] for _ in range(N)])  # nobody takes the last
    x, w = (torch.randn(N, size, generator=generator, dtype=F64) for size in (D, k))
    return module, x, index, w.softmax(1)


def run(module: Any, implementation: str, x: Tensor, index: Tensor, w: Tensor) -> dict[str, Tensor]:
    module.config._experts_implementation = implementation
    leaves = {"x": x.clone().requires_grad_(), "w": w.clone().requires_grad_(), **dict(module.named_parameters())}
    y = module(leaves["x"], index, leaves["w"])
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=seeds.generator(1))
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves.values(), strict=True))
    return {"y": y.detach(), **dict(zip(leaves, zeros, strict=True))}


@each_backend
@pytest.mark.parametrize("name", MODULES)
def test_the_same_as_its_own_loop(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        transformers_experts, "expert_ffn", lambda *a, **o: [calls.append(1), expert_ffn_op(*a, **o)][1]
    )
    module, x, index, w = made(name)
    expected = run(module, "eager", x, index, w)
    with use_backend(backend):
        found = run(module, "fastroute", x, index, w)
    assert bool(calls) == MODULES[name][1]
    for key, t in expected.items():
        assert_same(found[key], t, key)


def test_other_processes_experts_add_nothing() -> None:
    for name in ("mixtral", "gpt-oss"):
        module, x, index, w = made(name)
        kept = index.clone()
        index[::2, 1] = E  # as expert parallelism marks them
        module._is_expert_parallel = True
        found = run(module, "fastroute", x, index, w)
        without = w.clone()
        without[::2, 1] = 0
        expected = run(module, "fastroute", x, kept, without)
        assert_same(found["y"], expected["y"])
        module._is_expert_parallel = False
        with pytest.raises(IndexError, match="top_k_index: expected indices below 5"):
            run(module, "fastroute", x, index, w)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.long_after(1)
def test_compile(name: str) -> None:
    module, x, index, w = made(name)
    module.config._experts_implementation = "fastroute"
    calls = [(t.clone().requires_grad_(), i, v.clone().requires_grad_()) for t, i, v in (
        (x, index, w), (x[:4], index[:4], w[:4]), (x.repeat(2, 1), index.repeat(2, 1), w.repeat(2, 1)))]  # fmt: skip
    check_compiled(module, calls, parameters=list(module.parameters()), backend="eager")


def test_half_precision_and_autocast() -> None:
    module, x, index, w = made("mixtral")
    module = module.to(torch.bfloat16)
    x, w = x.bfloat16(), w.float()
    found, exact = run(module, "fastroute", x, index, w)["y"], copy.deepcopy(module).double()
    assert found.dtype == torch.bfloat16
    assert_within_budget(
        {"y": found}, lambda: {"y": run(exact, "eager", x.double(), index, w.double())["y"]},
        torch.bfloat16, stored=torch.bfloat16,
    )  # fmt: skip
    module.config._experts_implementation = "fastroute"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.float()(x.float(), index, w).dtype == torch.float32


def test_a_model_can_be_switched() -> None:
    config = transformers.MixtralConfig(
        vocab_size=17, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, experts_implementation="fastroute",
    )  # fmt: skip
    seeds.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double()
    ids = torch.randint(17, (2, 5))
    found = []
    for name in ("fastroute", "eager"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        model.zero_grad()
        logits = model(ids).logits
        logits.square().sum().backward()
        found.append((logits.detach(), model.model.layers[0].mlp.experts.gate_up_proj.grad))
    for a, b in zip(*found, strict=True):
        assert_same(a, b)
