"""``SlotAttention`` against Algorithm 1 of Locatello et al. (2020), transcribed line by line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import fastroute
from fastroute import SlotAttention
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
N, K, D, H = 9, 4, 6, 5

pytestmark = pytest.mark.usefixtures("backend")


def make(seed: int = 0, **options: Any) -> SlotAttention:
    """None of whose parameters is at a value that hides it."""
    seeds.manual_seed(seed)
    layer = SlotAttention(K, D, H, **{"dtype": F64, "eps": 1e-3, **options})
    with torch.no_grad():
        for norm in (layer.norm_inputs, layer.norm_slots, layer.norm_mlp):
            norm.weight.normal_(1, 0.3)
            norm.bias.normal_(0, 0.3)
    return layer


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed), dtype=F64).to(dtype)


def algorithm_1(layer: SlotAttention, *, x_inp: Tensor, slots: Tensor, **w: Tensor) -> dict[str, Tensor]:
    """Of the layer only its options; the parameters are w, under their names. The GRU as in Cho et al. (2014)."""

    def layer_norm(t: Tensor, name: str) -> Tensor:
        return F.layer_norm(t, t.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def gru(u: Tensor, h: Tensor) -> Tensor:
        a = u @ w["gru.weight_ih"].mT + w["gru.bias_ih"]
        b = h @ w["gru.weight_hh"].mT + w["gru.bias_hh"]
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        z = torch.sigmoid(a_z + b_z)
        return (1 - z) * torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n) + z * h

    inputs = layer_norm(x_inp, "norm_inputs")
    for _ in range(layer.n_iters):
        slots_prev = slots
        slots = layer_norm(slots, "norm_slots")
        scores = (inputs @ w["k.weight"].mT) @ (slots @ w["q.weight"].mT).mT / layer.d_slot**0.5
        attn = scores.softmax(-1)  # over the slots
        weights = attn + layer.eps
        values = inputs @ w["v.weight"].mT
        updates = (weights / weights.sum(-2, keepdim=True)).mT @ values  # weighted mean over the inputs
        slots = gru(updates, slots_prev)
        hidden = (layer_norm(slots, "norm_mlp") @ w["mlp.0.weight"].mT + w["mlp.0.bias"]).relu()
        slots = slots + hidden @ w["mlp.2.weight"].mT + w["mlp.2.bias"]
    return {"slots": slots, "attn": attn}


def case_of(layer: SlotAttention, *lead: int, n: int = N, k: int = K, seed: int = 1) -> Case:
    dtype = layer.mu.dtype
    state = {name: t.detach() for name, t in layer.state_dict().items() if name not in ("mu", "log_sigma")}
    inputs = {"x_inp": randn(*lead, n, D, seed=seed, dtype=dtype), "slots": randn(*lead, k, H, seed=2, dtype=dtype)}
    letters = "abc"[: len(lead)]
    axes = {name: "pqrs"[: t.dim()] for name, t in state.items()}
    axes |= {"x_inp": letters + "nd", "slots": letters + "kh", "attn": letters + "nk"}
    cotangents = {
        "slots": randn(*lead, k, H, seed=3, dtype=dtype),
        "attn": randn(*lead, n, k, seed=4, dtype=dtype),
    }
    return Case({**inputs, **state}, cotangents, axes, ("x_inp", "slots", *state))


def op(layer: SlotAttention) -> Any:
    def call(*, x_inp: Tensor, slots: Tensor, **state: Tensor) -> dict[str, Tensor]:
        made = torch.func.functional_call(layer, state, (x_inp, slots), {"return_attn": True})
        return dict(zip(("slots", "attn"), made, strict=True))

    return call


def truth(layer: SlotAttention) -> Any:
    return lambda **inputs: algorithm_1(layer, **inputs)


@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_is_algorithm_1(lead: tuple[int, ...], n_iters: int) -> None:
    layer = make(n_iters=n_iters)
    case = case_of(layer, *lead, k=7)
    found = evaluate(op(layer), case)
    for name, expected in evaluate(truth(layer), case).items():
        got = found[name]
        assert got is not None and expected is not None
        assert_same(got, expected, name)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_error_budget(dtype: torch.dtype) -> None:
    layers = [make(seed, dtype=dtype, eps=1e-8) for seed in range(3)]
    cases = [case_of(layer, 2, n=60, seed=seed) for seed, layer in enumerate(layers)]
    check(op(layers[0]), truth(layers[0]), cases, dtype=dtype, stored=dtype)


def test_gradcheck() -> None:
    layer = make(n_iters=2, d_hidden=3)
    gradcheck(op(layer), case_of(layer, n=4, k=3))


@given(n=st.integers(1, 12), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_slots_turn_with_slots_and_not_with_inputs(n: int, k: int, seed: int) -> None:
    layer, x, slots = make(), randn(n, D, seed=seed), randn(k, H, seed=seed + 1)
    generator = seeds.generator(seed)
    inputs, order = torch.randperm(n, generator=generator), torch.randperm(k, generator=generator)
    with torch.no_grad():
        found, attn = layer(x, slots, return_attn=True)
        turned, turned_attn = layer(x[inputs], slots[order], return_attn=True)
    assert_same(turned, found[order], "slots")
    assert_same(turned_attn, attn[inputs][:, order], "attn")
    assert_same(attn.sum(-1), torch.ones(n, dtype=F64), "an input divides itself over the slots")


def test_masked_inputs_are_deleted() -> None:
    """By mask or by lengths; not even NaN comes through padding, forward or backward."""
    layer, x, slots = make(), randn(3, N, D), randn(3, K, H)
    alone = torch.stack([layer(x[b, :n], slots[b]) for b, n in enumerate((N, 4, 1))])
    lengths = torch.tensor([N, 4, 1])
    padding = torch.arange(N) >= lengths[:, None]
    masked, attn = layer(x, slots, mask=padding[..., None], return_attn=True)
    assert_same(masked.detach(), alone.detach(), "masked")
    assert not attn[padding].any() and attn[~padding].sum(-1).allclose(torch.ones((), dtype=F64))
    padded, cut = layer(x.masked_fill(padding[..., None], torch.nan), slots, lengths=lengths, return_attn=True)
    assert_same(padded.detach(), alone.detach(), "padded")
    assert torch.equal(cut, attn)
    expected = torch.autograd.grad(alone.square().sum(), layer.k.weight)[0]
    for made in (masked, padded):
        assert_same(torch.autograd.grad(made.square().sum(), layer.k.weight)[0], expected, "gradient")


def test_a_mask_of_pairs() -> None:
    """A closed pair is left out of the softmax and of the mean; a slot with no inputs is updated with zero."""
    layer, x, slots = make(n_iters=1), randn(N, D), randn(K, H)
    mask = torch.zeros(N, K, dtype=torch.bool)
    mask[:, 1] = True
    found, attn = layer(x, slots, mask=mask, return_attn=True)
    rest = [0, 2, 3]
    fewer, fewer_attn = layer(x, slots[rest], return_attn=True)
    assert_same(found[rest].detach(), fewer.detach(), "the others do not see it")
    assert_same(attn[:, rest].detach(), fewer_attn.detach(), "attn")
    nothing = layer(x, slots, lengths=torch.tensor(0))
    assert_same(found[1].detach(), nothing[1].detach(), "no inputs at all")


def test_no_inputs_and_no_samples() -> None:
    layer = make()
    assert layer(randn(0, D), randn(K, H)).isfinite().all()
    assert layer(randn(0, N, D)).shape == (0, K, H)
    layer(randn(0, N, D)).sum().backward()


def test_drawn_slots() -> None:
    layer, x = make(), randn(2, N, D)
    seeded = [seeds.generator(7) for _ in range(2)]
    assert torch.equal(layer(x, generator=seeded[0]), layer(x, layer.initial_slots(2, generator=seeded[1])))
    drawn = layer.initial_slots(4000, n_slots=3, generator=seeded[0]).detach()
    assert drawn.shape == (4000, 3, H)
    normal = (drawn - layer.mu) / layer.log_sigma.exp()
    assert normal.mean((0, 1)).abs().max() < 0.05 and (normal.std((0, 1)) - 1).abs().max() < 0.05
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer(x, randn(1, 9, H)).shape == (2, 9, H), "any number of given slots, shared by samples"


def test_dtypes_and_autocast() -> None:
    for dtype in (F32, F64, BF16):
        layer = make(dtype=dtype)
        slots = layer.initial_slots(2)
        found, attn = layer(randn(2, N, D), slots, return_attn=True)
        assert found.dtype == attn.dtype == dtype
        with torch.autocast("cpu", dtype=BF16):
            cast, _ = layer(randn(2, N, D), slots, return_attn=True)
        assert cast.dtype == (F64 if dtype == F64 else F32)
        torch.testing.assert_close(cast.double(), found.double(), rtol=0.1, atol=0.1)


def test_compiles_to_one_graph() -> None:
    layer, slots = make(), randn(K, H)
    calls = [(randn(b, N, D).requires_grad_(), slots) for b in (3, 5)]
    check_compiled(layer, calls, parameters=list(layer.k.parameters()), backend="eager")


def test_exports() -> None:
    class Begun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.slots = make(dtype=F32), nn.Buffer(randn(K, H, dtype=F32))

        def forward(self, x: Tensor) -> Tensor:
            """x [B, n, d]."""
            found: Tensor = self.layer(x, self.slots)
            return found

    check_exported(Begun(), randn(3, N, D, dtype=F32), [randn(5, 4, D, dtype=F32)], {0: Dim("b"), 1: Dim("n")})


def test_face() -> None:
    layer = SlotAttention(7, 16, 8)
    assert repr(layer).startswith("SlotAttention(\n  n_slots=7, d_inp=16, d_slot=8, n_iters=3, d_hidden=16, eps=1e-08")
    assert fastroute.capsules.SlotAttention is SlotAttention
    on_meta = SlotAttention(7, 16, 8, device="meta", dtype=BF16)
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", BF16)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SlotAttention(0, D, H), ValueError, "n_slots: expected at least 1, got 0"),
        (lambda: SlotAttention(K, D, H, 0), ValueError, "n_iters: expected at least 1, got 0"),
        (lambda: SlotAttention(K, D, H, eps=-1), ValueError, "eps: expected a finite number of 0 or more, got -1"),
        (lambda: SlotAttention(K, D, H, dtype=torch.int64), TypeError, "dtype: expected a floating-point dtype"),
        (lambda: make()(randn(D)), ValueError, r"x_inp: expected \[..., n, d_inp\]"),
        (lambda: make()(randn(N, D + 1)), ValueError, "d_inp: expected input vectors of width 6, got 7"),
        (lambda: make()(randn(N, D).long()), TypeError, "x_inp: expected a floating-point tensor"),
        (lambda: make()(randn(2, N, D), randn(3, K, H)), ValueError, r"slots: .* broadcasts to \[2, n_slots, 5\]"),
        (lambda: make()(randn(N, D), randn(K, H + 1)), ValueError, r"slots: .* got \[4, 6\]"),
        (lambda: make()(randn(N, D), randn(0, H)), ValueError, r"slots: .* got \[0, 5\]"),
        (lambda: make()(randn(N, D), mask=torch.zeros(N, 3, dtype=torch.bool)), ValueError, "mask: expected a shape"),
        (lambda: make()(randn(2, N, D), lengths=[1]), ValueError, "lengths: expected one length per sample"),
        (lambda: make()(randn(N, D), randn(K, H), generator=torch.Generator()), ValueError, "generator: expected None"),
        (lambda: make()(randn(N, D).to("meta")), ValueError, "x_inp: expected a tensor on cpu like the parameters"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        ((-1,), {}, ValueError, "batch: expected 0 or more, got -1"),
        (("a",), {}, TypeError, "batch: expected an int, got 'a'"),
        ((2, 1.5), {}, TypeError, "batch: expected an int, got 1.5"),
        ((2,), {"generator": 3}, TypeError, r"generator: expected a torch\.Generator, got 3"),
    ],
)
def test_initial_slots_of_no_size(batch: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        fastroute.SlotAttention(3, 4, 5).initial_slots(*batch, **options)
