"""MoE: the layer against a loop over experts in float64, in one graph, with memory that does not grow.

Axes: N tokens, k experts of each, E experts, D features, H hidden ones.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastroute
from fastroute import use_backend
from fastroute.networks import MoE
from fastroute.ops.activations import ACTIVATIONS
from tests.helpers import seeds, strategies
from tests.helpers.backends import HERE, each_backend
from tests.helpers.budget import assert_within_budget
from tests.helpers.opcheck import assert_same, check_compiled, check_exported

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
D, H, E = 8, 6, 5


def layer(k: int = 2, *, seed: int = 0, dtype: torch.dtype = F64, **options: Any) -> MoE:
    seeds.manual_seed(seed)
    return MoE(D, H, E, k, dtype=dtype, **options)


def tokens(*lead: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*lead, D, generator=seeds.generator(seed), dtype=F64).to(dtype)


def by_loop(moe: MoE, x: Tensor) -> Tensor:
    """As Hugging Face's models have it: router, top k, and every expert on the tokens that chose it."""
    flat = x.reshape(-1, D)
    p = nn.functional.linear(flat, moe.gate.router.weight).softmax(-1)
    top, chosen = p.topk(moe.gate.k, dim=-1)
    top = top / top.sum(-1, keepdim=True) if moe.gate.normalize else top
    y = torch.zeros_like(flat)
    act = ACTIVATIONS[moe.activation]
    for e in range(E):
        rows, place = torch.where(chosen == e)
        u = nn.functional.linear(flat[rows], moe.w_gate_up[e])
        g, v = u.chunk(2, -1) if moe.gated else (u, torch.ones_like(u))
        made = nn.functional.linear(act(g) * v, moe.w_down[e])
        y = y.index_add(0, rows, made * top[rows, place, None])
    if moe.shared_gate_up is not None:
        u = flat @ moe.shared_gate_up.mT
        g, v = u.chunk(2, -1) if moe.gated else (u, torch.ones_like(u))
        y = y + (act(g) * v) @ moe.shared_down.mT
    return y.reshape(x.shape)


def outcome(call: Any, moe: MoE, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x.clone().requires_grad_(), **dict(moe.named_parameters())}
    y = call(leaves["x"])
    cotangent = torch.randn(y.shape, dtype=F64, generator=seeds.generator(1)).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, t in expected.items():
        assert_same(found[key], t, key)


@each_backend
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": False},
        {"activation": "gelu"},
        {"shared_experts": 2},
        {"normalize": False, "gated": False, "shared_experts": 1},
    ],
    ids=str,
)
def test_the_same_as_a_loop(backend: str, k: int, options: dict[str, Any]) -> None:
    moe, x = layer(k, **options), tokens(3, 7)
    with use_backend(backend):
        compare(outcome(moe, moe, x), outcome(lambda x: by_loop(moe, x), moe, x))


@each_backend
@hypothesis.given(data=st.data())
def test_any_batch(backend: str, data: st.DataObject) -> None:
    """Any number of tokens, and routers that send them all to a few experts."""
    lead = data.draw(st.lists(st.integers(1, 6), max_size=3))
    moe = layer(data.draw(st.integers(1, E)), seed=data.draw(strategies.seeds))
    x = tokens(*lead, seed=data.draw(strategies.seeds)) + data.draw(st.sampled_from([0.0, 3.0]))
    with use_backend(backend):
        compare(outcome(moe, moe, x), outcome(lambda x: by_loop(moe, x), moe, x))


def test_gradcheck() -> None:
    moe, x = layer(z_loss=0.1, balance_loss=0.1), tokens(4)
    names = [name for name, _ in moe.named_parameters()]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = moe

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, aux = self.moe(x, return_aux=True)
            return y, aux.loss

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = {f"moe.{name}": p for name, p in zip(names, parameters, strict=True)}
        made: tuple[Tensor, ...] = torch.func.functional_call(Both(), given, (x,))
        return made

    leaves = [x, *(p.detach().clone() for p in moe.parameters())]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


# --------------------------------------------------------------------------------------------------------------- laws


@each_backend
def test_laws(backend: str) -> None:
    moe, x = layer(shared_experts=1, z_loss=0.1), tokens(12)
    order = torch.randperm(12, generator=seeds.generator(0))
    with use_backend(backend), torch.no_grad():
        y, aux = moe(x, return_aux=True)
        assert torch.equal(moe(x), y) and torch.equal(moe(x.view(3, 4, D)), y.view(3, 4, D))
        turned, turned_aux = moe(x[order], return_aux=True)
        assert_same(turned, y[order], "permuted tokens")
        assert_same(turned_aux.loss, aux.loss)
        assert_same(torch.cat([moe(x[:5]), moe(x[5:])]), y, "joined batches")
        labels = torch.randperm(E, generator=seeds.generator(1))
        moved = copy.deepcopy(moe)
        for p in (moved.w_gate_up, moved.w_down, moved.gate.router.weight):
            p.copy_(p[labels])
        again, moved_aux = moved(x, return_aux=True)
        assert_same(again, y, "relabelled experts")
        assert torch.equal(labels[moved_aux.actions], aux.actions)
        mask = torch.arange(12) % 3 > 0
        poisoned = torch.where(mask[:, None], x, torch.nan)
        masked, masked_aux = moe(poisoned.view(3, 4, D), mask.view(3, 4), return_aux=True)
        removed, removed_aux = moe(x[mask], return_aux=True)
        assert not masked.view(12, D)[~mask].any()
        assert_same(masked.view(12, D)[mask], removed, "masked is removed")
        assert_same(masked_aux.loss, removed_aux.loss)
        assert torch.equal(masked_aux.counts, removed_aux.counts) and masked_aux.actions.shape == (3, 4, 2)


def test_not_a_number_stays_in_its_token() -> None:
    moe, x = layer(shared_experts=1), tokens(9)
    bad = torch.arange(9) == 4
    y = moe(torch.where(bad[:, None], torch.nan, x))
    assert torch.equal(y[~bad], moe(x)[~bad]) and y[bad].isnan().any()


def test_one_expert_of_one_is_a_feed_forward_network() -> None:
    seeds.manual_seed(0)
    moe, x = MoE(D, H, 1, 1, dtype=F64), tokens(6)
    g, v = (x @ moe.w_gate_up[0].mT).chunk(2, -1)
    assert_same(moe(x).detach(), ((nn.functional.silu(g) * v) @ moe.w_down[0].mT).detach())


def test_capacity_leaves_tokens_out() -> None:
    moe, x = layer(1, capacity=0.5), tokens(20) + 2
    y, aux = moe(x, return_aux=True)
    out = aux.actions[:, 0] < 0
    assert out.any() and not y[out].any() and aux.counts.sum() == 20
    load = torch.bincount(aux.actions[~out, 0], minlength=E)
    assert torch.equal(load, aux.counts.clamp(max=2))


# ------------------------------------------------------------------------------------------ memory, gradients, dtypes


@pytest.mark.parametrize("backend", HERE)
def test_activation_memory_does_not_grow_with_k_or_width(backend: str) -> None:
    """But for an index and a few router numbers of every entry."""
    N, width = 64, 32
    kept = {}
    for k, hidden in ((1, 16), (8, 16), (1, 256), (8, 256)):
        seeds.manual_seed(0)
        moe = MoE(width, hidden, 8, k)
        own, saved = {p.data_ptr() for p in moe.parameters()}, {}

        def pack(t: Tensor, own: set[int] = own, saved: dict[int, int] = saved) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with use_backend(backend), saved_tensors_hooks(pack, lambda t: t):
            moe(torch.randn(N, width, requires_grad=True))
        kept[k, hidden] = sum(saved.values())
    assert kept[1, 16] == kept[1, 256] and kept[8, 16] == kept[8, 256]
    per_entry = 8 + 8 + 4  # the action, its place in the plan, the weight, which is the softmax
    assert kept[8, 16] - kept[1, 16] == N * 7 * per_entry


@each_backend
def test_every_parameter_has_a_gradient(backend: str) -> None:
    """Zeros where no token came, as data-parallel training wants it."""
    moe, x = layer(1, normalize=False, shared_experts=1), tokens(1, 3)
    with use_backend(backend):
        y, aux = moe(x, return_aux=True)
        (y.sum() + aux.loss).backward()
    assert all(p.grad is not None for p in moe.parameters())
    used = aux.counts > 0
    assert 0 < used.sum() < E and not moe.w_gate_up.grad[~used].any() and moe.w_down.grad[used].any()  # type: ignore[index]
    moe.zero_grad()
    with use_backend(backend):
        moe(x[:, :0]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def by_weights(moe: Any, x: Tensor, actions: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The experts of given routes, one token after another."""
    rows = []
    for n in range(len(x)):
        row = torch.zeros_like(x[n])
        for a, w in zip(actions[n], weights[n], strict=True):
            g, v = (moe.w_gate_up[a] @ x[n]).chunk(2)
            row = row + w * (moe.w_down[a] @ (nn.functional.silu(g) * v))
        rows.append(row.detach())
    return {"y": torch.stack(rows)}


@each_backend
def test_half_precision(backend: str) -> None:
    """Against the loop in float64 on the same numbers and the same routes."""
    for seed in range(2):
        moe, x = layer(seed=seed, dtype=BF16), tokens(40, seed=seed, dtype=BF16)
        moe.gate.float()
        _, aux = moe(x, return_aux=True)
        exact = copy.deepcopy(moe).double()
        with use_backend(backend):
            found = moe(x).detach()
        assert found.dtype == BF16
        assert torch.equal(aux.actions, exact(x.double(), return_aux=True)[1].actions)
        run = partial(by_weights, exact, x.double(), aux.actions, aux.weights.double())
        assert_within_budget({"y": found}, run, BF16, stored=BF16)


@each_backend
def test_autocast(backend: str) -> None:
    """The experts in bfloat16, the router not; gradients in the parameters' dtype."""
    moe, x = layer(dtype=F32, shared_experts=1), tokens(30, dtype=F32)
    with use_backend(backend), torch.autocast("cpu", dtype=BF16):
        y, aux = moe(x, return_aux=True)
    assert y.dtype == BF16 and aux.weights.dtype == F32
    assert torch.equal(aux.weights, moe(x, return_aux=True)[1].weights)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in moe.parameters())


@each_backend
def test_the_same_bits_again(backend: str) -> None:
    moe, x = layer(dtype=F32), tokens(50, dtype=F32)
    with use_backend(backend):
        first, again = outcome(moe, moe, x), outcome(moe, moe, x)
    assert all(torch.equal(t, again[key]) for key, t in first.items())


# ------------------------------------------------------------------------------------------- what PyTorch expects


@each_backend
def test_compile(backend: str) -> None:
    moe = layer(dtype=F64, shared_experts=1, z_loss=0.1, capacity=2.0, bias_balancing=0.01)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = moe(x, return_aux=True)
        return y, aux.loss

    with use_backend(backend):
        calls = [(tokens(2, size, seed=size).requires_grad_(),) for size in (7, 5, 13)]  # not 8, which is D
        check_compiled(call, calls, parameters=list(moe.parameters()), backend="eager")


@each_backend
def test_export(backend: str) -> None:
    moe = layer(dtype=F32, shared_experts=1, capacity=2.0).eval()
    example, *others = [tokens(N, dtype=F32, seed=N) for N in (7, 2, 33)]
    with use_backend(backend):
        check_exported(moe, example, others, {0: torch.export.Dim("tokens", min=2, max=4096)})


def test_checkpointing() -> None:
    moe, x = layer(bias_balancing=0.1), tokens(20)
    expected = outcome(moe, moe, x)
    compare(outcome(lambda x: checkpoint(moe, x, use_reentrant=False), moe, x), expected)


def test_state_and_copies() -> None:
    moe = layer(shared_experts=1, bias=True, bias_balancing=0.1)
    shapes = {name: list(t.shape) for name, t in moe.state_dict().items()}
    assert shapes == {
        "w_gate_up": [E, 2 * H, D], "w_down": [E, D, H], "shared_gate_up": [2 * H, D], "shared_down": [D, H],
        "gate.selection_bias": [E], "gate.router.weight": [E, D], "gate.router.bias": [E],
    }  # fmt: skip
    assert all(p.is_contiguous() for p in moe.parameters())
    other = layer(seed=1, shared_experts=1, bias=True, bias_balancing=0.1)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(tokens(4)), moe(tokens(4)))
    on_meta = MoE(D, H, E, device="meta")
    assert on_meta.w_down.is_meta and "num_experts=5" in repr(on_meta)
    empty = on_meta.to_empty(device="cpu")
    empty.reset_parameters()
    assert all(p.isfinite().all() for p in empty.parameters())


def test_explain() -> None:
    with use_backend("reference"):
        made = fastroute.explain(layer(dtype=F32), tokens(4, dtype=F32))
    assert {d.case.op for d in made} == {"dispatch", "grouped_linear"}


CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"d_model": 0}, ValueError, "d_model: expected at least 1, got 0"),
    ({"d_hidden": 1.5}, TypeError, "d_hidden: expected an int, got 1.5"),
    ({"num_experts": 0}, ValueError, "num_experts: expected at least 1, got 0"),
    ({"k": 6}, ValueError, "k: expected at most num_selections, 5, got 6"),
    ({"activation": "swish"}, ValueError, "activation: expected one of none, relu.*'swish'"),
    ({"shared_experts": -1}, ValueError, "shared_experts: expected 0 or more, got -1"),
    ({"gatd": True}, TypeError, "unexpected keyword argument 'gatd'"),
]


@pytest.mark.parametrize("options, error, message", CONSTRUCTION, ids=[str(c[0]) for c in CONSTRUCTION])
def test_construction(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoE(**{"d_model": D, "d_hidden": H, "num_experts": E, **options})


def test_bad_input() -> None:
    moe, x = layer(dtype=F32), tokens(3, 4, dtype=F32)
    for error, message, args in (
        (TypeError, r"x: expected a tensor \[..., d_model\], got list", ([1.0],)),
        (TypeError, "x: expected a floating-point tensor, got torch.int64", (x.long(),)),
        (ValueError, r"x: expected \[..., 8\], got \[3, 4, 7\]", (x[..., 1:],)),
        (ValueError, r"x: expected \[..., 8\], got \[\]", (x.sum(),)),
        (ValueError, r"mask: expected one per token, \[3, 4\], got \[3\]", (x, torch.ones(3, dtype=torch.bool))),
        (TypeError, r"mask: expected a bool tensor \[...\], got list", (x, [True] * 3)),
        (TypeError, r"w_in: expected x's dtype torch.float64, got torch.float32", (x.double(),)),
    ):
        with pytest.raises(error, match=message):
            moe(*args)
