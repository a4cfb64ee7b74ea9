"""``EfficientVectorRouting``: what its users rely on, on every backend."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fastroute import EfficientVectorRouting, use_backend
from fastroute.compat import heinsen_routing
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.budget import assert_within_budget, check
from tests.helpers.cases import Results, evaluate
from tests.helpers.layouts import LAYOUTS
from tests.helpers.opcheck import assert_same, check_compiled, check_exported, gradcheck
from tests.helpers.routing_cases import literal, module_case, module_op, module_truth, some_mask

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
N, M, D, H = 11, 5, 8, 6


pytestmark = pytest.mark.usefixtures("backend")


def make(n_inp: int = N, *, d_out: int = H, seed: int = 0, **options: Any) -> EfficientVectorRouting:
    """A module none of whose parameters is zero, so that every path is live."""
    seeds.manual_seed(seed)
    module = EfficientVectorRouting(n_inp, M, D, d_out, **options)
    with torch.no_grad():
        for name in ("B_A", "B_F2", "B_G2", "B_S"):
            getattr(module, name).normal_(std=0.3)
    return module


def inputs(*lead: int, n: int = N, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    return torch.randn(*lead, n, D, generator=seeds.generator(seed), dtype=F64).to(dtype)


def cotangents(module: EfficientVectorRouting, x: Tensor, *names: str) -> dict[str, Tensor]:
    generator = seeds.generator(2)
    shapes = {
        "x_out": (M, module.d_out),
        "phi": (x.shape[-2], M),
        "V": (x.shape[-2], M, module.d_out),
        "a_inp": x.shape[-2:-1],
    }
    return {k: torch.randn(*x.shape[:-2], *shapes[k], generator=generator).to(x.dtype) for k in names or ("x_out",)}


def compared(
    module: EfficientVectorRouting, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None, *names: str
) -> Results:
    """Every output and gradient is the literal reference's, in float64; what the module gave."""
    case = module_case(module, x, cotangents(module, x, *names), mask, lengths)
    found = evaluate(module_op(module), case)
    for name, expected in evaluate(module_truth(module), case).items():
        got = found[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert_same(got, expected, name)
    return found


MODES = pytest.mark.parametrize("n_inp", [N, -1], ids=["fixed", "any-length"])


# --------------------------------------------------------------------------------------------------------- shapes


@MODES
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(n_inp: int, lead: tuple[int, ...]) -> None:
    found = compared(make(n_inp, dtype=F64), inputs(*lead, dtype=F64))
    assert found["x_out"] is not None and found["x_out"].shape == (*lead, M, H)


@MODES
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("return_dict", [False, True], ids=["x_out", "dict"])
def test_no_samples(n_inp: int, lead: tuple[int, ...], return_dict: bool) -> None:
    module = make(n_inp, return_dict=return_dict)
    x = inputs(*lead).requires_grad_()
    out = module(x)
    for name, t in out.items() if return_dict else [("x_out", out)]:
        assert t is None or t.shape[: len(lead)] == lead, name
    (out["x_out"] if return_dict else out).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("n", [1, 2, 40])
def test_any_length(n: int) -> None:
    compared(make(-1, dtype=F64), inputs(2, n=n, dtype=F64))


@MODES
@pytest.mark.parametrize("d_out", [1, H])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n_iters", [1, 2, 3])
def test_options(n_inp: int, d_out: int, normalize: bool, n_iters: int) -> None:
    """With d_out = 1 there is no layer norm anywhere."""
    module = make(n_inp, d_out=d_out, normalize=normalize, n_iters=n_iters, dtype=F64)
    compared(module, inputs(2, dtype=F64))


def test_one_input_vector() -> None:
    """Against a fixed n_inp of 1, every parameter has one row, and they are still a row per input."""
    compared(make(1, dtype=F64), inputs(3, n=1, dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=["fp32", "fp64", "bf16"])
def test_one_input_vector_in(dtype: torch.dtype) -> None:
    cases = [
        module_case(m, x, cotangents(m, x))
        for m, x in ((make(1, seed=s, dtype=dtype), inputs(3, n=1, dtype=dtype, seed=s)) for s in range(3))
    ]
    check(module_op(make(1, dtype=dtype)), module_truth(make(1, dtype=dtype)), cases, dtype=dtype, stored=dtype)


# ------------------------------------------------------------------------------------------------ masks, lengths


@MODES
@pytest.mark.parametrize(
    "mask",
    [
        some_mask(N, M), some_mask(3, N, M), some_mask(3, N, 1), some_mask(1, N, M), some_mask(N, 1),
        torch.arange(M) == 2, torch.ones(N, M, dtype=torch.bool).triu(1), some_mask(3, M, 2 * N).mT[:, 1::2],
    ],
    ids=["n,m", "B,n,m", "B,n,1", "1,n,m", "n,1", "m", "causal", "strided"],
)  # fmt: skip
@pytest.mark.parametrize("return_dict", [False, True], ids=["x_out", "dict"])
def test_masks(n_inp: int, mask: Tensor, return_dict: bool) -> None:
    compared(make(n_inp, return_dict=return_dict, dtype=F64), inputs(3, dtype=F64), mask)


def test_a_mask_per_sample_of_several_leading_dimensions() -> None:
    compared(make(dtype=F64), inputs(2, 3, dtype=F64), some_mask(2, 3, N, M))
    compared(make(dtype=F64), inputs(2, 3, dtype=F64), some_mask(3, N, M))
    compared(make(dtype=F64), inputs(dtype=F64), some_mask(N, M))


@MODES
def test_an_open_mask_is_none(n_inp: int) -> None:
    module, x = make(n_inp, dtype=F64), inputs(2, dtype=F64)
    assert_same(module(x, torch.zeros(N, M, dtype=torch.bool)), module(x))


@MODES
@pytest.mark.parametrize("n_iters", [1, 2, 3])
@pytest.mark.parametrize("return_dict", [False, True], ids=["x_out", "dict"])
def test_a_fully_masked_input_contributes_nothing(n_inp: int, n_iters: int, return_dict: bool) -> None:
    """Where upstream gives NaN for the whole sample. Its values do not matter, and gradients are finite."""
    module = make(n_inp, n_iters=n_iters, return_dict=return_dict, dtype=F64)
    mask = torch.zeros(N, M, dtype=torch.bool)
    mask[[2, 7]] = True
    x, other = inputs(2, dtype=F64), inputs(2, dtype=F64)
    other[:, [2, 7]] = 100.0
    found = compared(module, x, mask)
    again = compared(module, other, mask)
    assert found["x_out"] is not None and again["x_out"] is not None
    assert torch.equal(found["x_out"], again["x_out"])
    assert found["dx_inp"] is not None and not found["dx_inp"][:, [2, 7]].any()
    assert all(t is None or t.isfinite().all() for t in found.values())
    if return_dict:
        assert not any(found[k][:, [2, 7]].any() for k in ("R", "D_use", "D_ign", "phi"))  # type: ignore[index]


@MODES
def test_a_fully_masked_output_gets_zero(n_inp: int) -> None:
    module = make(n_inp, normalize=False, dtype=F64)
    found = compared(module, inputs(2, dtype=F64), (torch.arange(M) == 3).expand(N, M))
    assert found["x_out"] is not None and not found["x_out"][:, 3].any()
    assert all(t is None or t.isfinite().all() for t in found.values())


@MODES
def test_everything_masked(n_inp: int) -> None:
    found = compared(make(n_inp, dtype=F64), inputs(2, dtype=F64), torch.ones(N, M, dtype=torch.bool))
    assert all(t is None or not t.any() for k, t in found.items() if k in ("x_out", "dx_inp", "dW_A"))


def shortened(module: EfficientVectorRouting, n: int) -> EfficientVectorRouting:
    """The module for the first n input vectors alone."""
    if module.n_inp == -1:
        return module
    short = EfficientVectorRouting(n, M, D, module.d_out, module.n_iters, module.normalize, dtype=module.W_A.dtype)
    short.load_state_dict({k: t[:n] if t.shape[:1] == (N,) else t for k, t in module.state_dict().items()})
    return short


@MODES
@pytest.mark.parametrize("n_iters", [1, 2, 3])
@pytest.mark.parametrize("kind", ["list", "int64", "int32"])
def test_lengths_give_each_sample_what_it_gets_alone(n_inp: int, n_iters: int, kind: str) -> None:
    module, x = make(n_inp, n_iters=n_iters, dtype=F64), inputs(4, dtype=F64)
    wanted = [N, 3, 1, 7]
    lengths: Any = wanted if kind == "list" else torch.tensor(wanted, dtype=getattr(torch, kind))
    found = module(x, lengths=lengths)
    for b, n in enumerate(wanted):
        assert_same(found[b], shortened(module, n)(x[b, :n]))
    compared(module, x, None, torch.tensor(wanted))


@MODES
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_padding_is_never_read(n_inp: int, masked: bool) -> None:
    module, x = make(n_inp, dtype=F64), inputs(3, dtype=F64)
    mask = some_mask(3, N, M) if masked else None
    lengths = torch.tensor([N, 0, 4])
    dirty = x.clone()
    dirty[1], dirty[2, 4:] = math.nan, math.inf
    clean, found = (
        evaluate(module_op(module), module_case(module, t, cotangents(module, t), mask, lengths)) for t in (x, dirty)
    )
    for name, a in clean.items():
        b = found[name]
        assert a is not None and b is not None and torch.equal(a, b) and a.isfinite().all(), name
    assert clean["x_out"] is not None and clean["dx_inp"] is not None
    assert not clean["x_out"][1].any() and not clean["dx_inp"][1].any() and not clean["dx_inp"][2, 4:].any()


def test_lengths_of_any_leading_dimensions() -> None:
    module = make(dtype=F64)
    x = inputs(2, 3, dtype=F64)
    lengths = torch.tensor([[1, 2, 3], [4, 0, N]])
    compared(module, x, None, lengths)
    assert_same(module(x[0, 1], lengths=2), module(x, lengths=lengths)[0, 1])
    assert_same(module(x[0, 1], lengths=torch.tensor(2)), module(x, lengths=lengths.tolist())[0, 1])


def test_full_lengths_are_none() -> None:
    for n_inp in (N, -1):
        module, x = make(n_inp, dtype=F64), inputs(2, dtype=F64)
        assert_same(module(x, lengths=[N, N]), module(x))


# ----------------------------------------------------------------------------------------------------- return_dict

KEYS = ["a_inp", "V", "pred_x_inp", "S", "R", "D_use", "D_ign", "phi", "x_out"]


@MODES
@pytest.mark.parametrize("n_iters", [1, 2, 3])
@pytest.mark.parametrize("memory_efficient", [True, False], ids=["lazy", "eager"])
def test_return_dict(n_inp: int, n_iters: int, memory_efficient: bool) -> None:
    module = make(n_inp, n_iters=n_iters, return_dict=True, memory_efficient=memory_efficient, dtype=F64)
    x = inputs(2, dtype=F64)
    out = module(x)
    assert list(out) == KEYS
    assert [k for k, t in out.items() if t is None] == ([] if not memory_efficient else ["V"]) + (
        ["pred_x_inp", "S"] if n_iters == 1 else []
    )
    compared(module, x, None, None, "x_out", "phi", "a_inp")
    # the arrays are those of the last iteration: they make x_out
    y = torch.einsum("bij,bid->bjd", out["phi"], x * N**-0.5)
    y = (y * module.W_F1) @ module.W_F2 + out["phi"].sum(1)[..., None] * module.B_F2
    assert_same(nn.functional.layer_norm(y, (H,)), out["x_out"])
    assert_same(out["R"].sum(-1), torch.ones(2, N, dtype=F64))
    assert_same(out["D_use"] + out["D_ign"], out["a_inp"].sigmoid()[..., None].expand(2, N, M))


@MODES
def test_the_dict_has_the_x_out_of_the_plain_call(n_inp: int) -> None:
    module, x = make(n_inp, n_iters=3, dtype=F64), inputs(2, dtype=F64)
    for arguments in ({}, {"mask": some_mask(2, N, M)}, {"lengths": [3, N]}):
        plain = module(x, **arguments)
        module.return_dict = True
        assert_same(module(x, **arguments)["x_out"], plain)
        module.return_dict = False


@MODES
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_votes_make_the_output(n_inp: int, padded: bool) -> None:
    """memory_efficient=False returns V, of which x_out is the sum with weights phi: at each sample's own scale."""
    module = make(n_inp, return_dict=True, memory_efficient=False, normalize=False, dtype=F64)
    x = inputs(2, dtype=F64)
    lengths = torch.tensor([N, 4]) if padded else None
    out = module(x, lengths=lengths)
    assert out["V"].shape == (2, N, M, H)
    live = slice(None) if lengths is None else slice(4)
    assert_same(torch.einsum("bij,bijh->bjh", out["phi"][:, :], out["V"]), out["x_out"])
    expected = literal(module, x_inp=x, lengths=lengths)["V"]
    assert expected is not None
    assert_same(out["V"][1, live], expected[1, live])


def test_votes_of_padding_are_finite() -> None:
    module = make(return_dict=True, memory_efficient=False, dtype=F64)
    x = inputs(2, dtype=F64)
    x[1, 4:] = math.nan
    assert all(t.isfinite().all() for t in module(x, lengths=[N, 4]).values())


def test_memory_efficient_changes_nothing_else() -> None:
    x = inputs(2)
    assert torch.equal(make(memory_efficient=False)(x), make()(x))


# -------------------------------------------------------------------------------------------- dtypes and autocast


@MODES
@pytest.mark.parametrize(
    ("module_dtype", "x_dtype"),
    [(F64, F64), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16), (BF16, F32), (F32, F64), (F64, F32), (BF16, F16)],
    ids=lambda d: str(d).removeprefix("torch."),
)  # fmt: skip
def test_dtypes(n_inp: int, module_dtype: torch.dtype, x_dtype: torch.dtype, backend: str) -> None:
    """The promoted dtype comes out, gradients are in their own, and both are as exact as plain PyTorch."""
    if F16 in (module_dtype, x_dtype) and backend == "native":
        backend = "auto"
    out = torch.promote_types(module_dtype, x_dtype)
    modules = [make(n_inp, dtype=module_dtype, seed=s) for s in range(2)]
    xs = [inputs(3, dtype=x_dtype, seed=s) for s in range(2)]
    cases = [module_case(m, x, {"x_out": cotangents(m, x.to(out))["x_out"]}) for m, x in zip(modules, xs, strict=True)]
    with use_backend(backend):
        found = check(module_op(modules[0]), module_truth(modules[0]), cases, dtype=out, stored=out)
    assert found["x_out"] is not None and found["x_out"].dtype == out
    for name in cases[0].wrt:
        t, g = cases[0].inputs[name], found[f"d{name}"]
        assert t is not None and g is not None and g.dtype == t.dtype, name


@MODES
@pytest.mark.parametrize("return_dict", [False, True], ids=["x_out", "dict"])
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("module_dtype", [F32, BF16], ids=["of-fp32", "of-bf16"])
def test_autocast_gives_float32(n_inp: int, return_dict: bool, x_dtype: torch.dtype, module_dtype: torch.dtype) -> None:
    module = make(n_inp, return_dict=return_dict, dtype=module_dtype)
    x = inputs(2, dtype=x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        out = module(x)
    x_out = out["x_out"] if return_dict else out
    assert x_out.dtype == F32
    assert all(t is None or t.dtype == F32 for t in (out.values() if return_dict else ()))
    exact = copy.deepcopy(module).double()
    assert_within_budget(
        {"x_out": x_out.detach()},
        lambda: {"x_out": literal(exact, x_inp=x.detach().double())["x_out"]},
        BF16,
        stored=BF16,
    )
    x_out.sum().backward()
    assert x.grad is not None and x.grad.dtype == x_dtype and x.grad.isfinite().all()


def test_backward_under_autocast() -> None:
    module, x = make(), inputs(2)
    module(x).sin().sum().backward()
    outside = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    with torch.autocast("cpu", dtype=BF16):
        loss = module(x).sin().sum()
    loss.backward()
    assert all(a.dtype == F32 and p.grad is not None for a, p in zip(outside, module.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------------- layouts


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(n_inp: int, layout: str) -> None:
    module, x = make(n_inp, dtype=F64), inputs(3, dtype=F64)
    laid = LAYOUTS[layout](x).requires_grad_()
    x.requires_grad_()
    a, b = module(x), module(laid)
    assert_same(b, a)
    assert a.is_contiguous() and b.is_contiguous()
    a.sin().sum().backward()  # the sum of squares of a normalised output is constant
    b.sin().sum().backward()
    assert x.grad is not None and laid.grad is not None
    assert_same(laid.grad, x.grad)


def test_a_permuted_batch_of_a_permuted_batch() -> None:
    module, x = make(dtype=F64), inputs(2, 3, dtype=F64)
    assert_same(module(x.transpose(0, 1)).transpose(0, 1), module(x))
    assert_same(module(x[:1].expand(4, -1, -1, -1))[3], module(x)[0])


def test_parameters_in_another_layout() -> None:
    module, x = make(dtype=F64), inputs(2, dtype=F64)
    expected = module(x)
    for p in module.parameters():
        if p.dim() == 2:
            p.data = LAYOUTS["columns_first"](p.data)
    assert_same(module(x), expected)


# ------------------------------------------------------------------------------------------------------- gradients


@MODES
def test_gradcheck_of_the_module(n_inp: int) -> None:
    seeds.manual_seed(0)
    module = EfficientVectorRouting(3 if n_inp != -1 else -1, 3, 3, 2, dtype=F64)
    x = torch.randn(2, 3, 3, dtype=F64)
    gradcheck(module_op(module), module_case(module, x, {"x_out": torch.ones(2, 3, 2)}))


@MODES
def test_frozen_parameters(n_inp: int) -> None:
    module, x = make(n_inp, dtype=F64), inputs(2, dtype=F64)
    module(x).sin().sum().backward()
    everything = {k: p.grad for k, p in module.named_parameters()}
    module.zero_grad()
    for name in ("W_A", "W_F2", "B_S"):
        getattr(module, name).requires_grad_(False)
    module(x).sin().sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad is None) if not p.requires_grad else torch.equal(p.grad, everything[name]), name  # type: ignore[arg-type]
    for p in module.parameters():
        p.requires_grad_(False)
    assert not module(x).requires_grad
    x.requires_grad_()
    module(x).sin().sum().backward()
    assert (
        x.grad is not None and x.grad.any() and all(p.grad is None or not p.requires_grad for p in module.parameters())
    )


@MODES
def test_two_backward_passes_and_accumulation(n_inp: int) -> None:
    module, x = make(n_inp), inputs(2).requires_grad_()
    loss = module(x).sin().sum()
    first = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * first[0])


def test_no_grad_saves_nothing() -> None:
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = make()(inputs(2))
    assert not saved and out.grad_fn is None


def test_changing_an_input_before_backward_is_an_error() -> None:
    """What is recomputed is recomputed from the inputs: autograd must notice that they changed."""
    module, x = make(), inputs(2)
    loss = module(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -------------------------------------------------------------------------------------------------- as an nn.Module


def test_attributes_and_repr() -> None:
    module = EfficientVectorRouting(N, M, D, H, 3, False, False, True)
    names = ("n_inp", "n_out", "d_inp", "d_out", "n_iters", "normalize", "memory_efficient", "return_dict")
    assert tuple(getattr(module, k) for k in names) == (N, M, D, H, 3, False, False, True)
    assert repr(module) == (
        "EfficientVectorRouting(n_inp=11, n_out=5, d_inp=8, d_out=6, n_iters=3, normalize=False, "
        "memory_efficient=False, return_dict=True)"
    )
    assert repr(nn.Sequential(EfficientVectorRouting(-1, M, D, 1))).splitlines()[1] == (
        "  (0): EfficientVectorRouting(n_inp=-1, n_out=5, d_inp=8, d_out=1, n_iters=2, normalize=True, "
        "memory_efficient=True, return_dict=False)"
    )


@pytest.mark.parametrize(("d_out", "norm"), [(H, nn.LayerNorm), (1, nn.Identity)])
def test_submodules_without_parameters(d_out: int, norm: type[nn.Module]) -> None:
    fixed, free = dict(make(d_out=d_out).named_modules()), dict(make(-1, d_out=d_out).named_modules())
    expected = {"N": norm, "f": nn.Sigmoid, "log_f": nn.LogSigmoid, "softmax": nn.Softmax}
    assert {k: type(m) for k, m in fixed.items() if k} == expected
    linear = {"compute_beta_use": nn.Linear, "compute_beta_ign": nn.Linear}
    assert {k: type(m) for k, m in free.items() if k} == expected | linear
    assert not any(True for name in expected for _ in fixed[name].parameters())
    assert isinstance(fixed["softmax"], nn.Softmax) and fixed["softmax"].dim == -1


def test_number_of_parameters() -> None:
    n, m, d, h = N, M, D, H
    assert sum(p.numel() for p in make().parameters()) == n * d + n + 4 * n * m + 3 * m * d + 2 * d * h + m * h
    assert sum(p.numel() for p in make(-1).parameters()) == d + 1 + 2 * m + 3 * m * d + 2 * d * h + m * h + 2 * m * (
        d + 1
    )


def test_a_hook_sees_the_dict_and_may_replace_it() -> None:
    module = make(return_dict=True)
    seen: list[Tensor] = []

    def keep_phi(_: nn.Module, __: Any, out: dict[str, Tensor]) -> Tensor:
        seen.append(out["phi"])
        return out["x_out"]

    module.register_forward_hook(keep_phi)
    assert module(inputs(2)).shape == (2, M, H) and seen[0].shape == (2, N, M)


@MODES
def test_copies(n_inp: int) -> None:
    module, x = make(n_inp), inputs(2)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    other = make(n_inp, seed=99)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert torch.equal(other(x), expected)


def test_moving() -> None:
    module = make()
    assert all(t.dtype == F64 for t in module.double().state_dict().values())
    assert module(inputs(2, dtype=F64)).dtype == F64
    assert all(t.device.type == "meta" for t in EfficientVectorRouting(N, M, D, H, device="meta").state_dict().values())
    assert EfficientVectorRouting(N, M, D, H, device="meta").to_empty(device="cpu").load_state_dict(make().state_dict())
    assert all(t.dtype == BF16 for t in EfficientVectorRouting(N, M, D, H, dtype=BF16).state_dict().values())


def test_training_step() -> None:
    """Adam on a fixed batch: the loss falls, and every parameter takes part."""
    seeds.manual_seed(0)
    module = make()
    x, target = inputs(16), torch.randint(M, (16,))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(module(x).mean(-1) + module(x)[..., 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(p, before[k]) for k, p in module.named_parameters())


def test_in_a_network() -> None:
    """The head of the paper: any length to a fixed number, then classes."""
    seeds.manual_seed(0)
    net = nn.Sequential(
        EfficientVectorRouting(-1, 7, D, D),
        EfficientVectorRouting(7, 6, D, D),
        EfficientVectorRouting(6, 3, D, 1),
        nn.Flatten(-2),
    )
    for n in (5, 30):
        out = net(inputs(4, n=n))
        assert out.shape == (4, 3)
    nn.functional.cross_entropy(out, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_paper_heads_have_the_published_size() -> None:
    """arXiv 2211.11754: scale and shift of 25 x 1024, then three routings; 312.8M in all with BEiT-large's 304.4M."""

    def head(classes: int) -> int:
        sizes = ((-1, 64, 1024, 1024), (64, 64, 1024, 1024), (64, classes, 1024, 1))
        routings = [EfficientVectorRouting(*size, device="meta") for size in sizes]
        return 2 * 25 * 1024 + sum(p.numel() for r in routings for p in r.parameters())

    assert [head(k) for k in (1000, 100, 10, 5, 2)] == [8_380_777, 5_384_677, 5_085_067, 5_068_422, 5_058_435]


def test_compat_is_the_same_class_of_module() -> None:
    seeds.manual_seed(3)
    ours = EfficientVectorRouting(N, M, D, H)
    seeds.manual_seed(3)
    theirs = heinsen_routing.EfficientVectorRouting(N, M, D, H)
    x = inputs(2)
    assert torch.equal(ours(x), theirs(x))


# ------------------------------------------------------------------------------------------------- compile, export


@pytest.mark.parametrize(
    ("n_inp", "return_dict"),
    [(N, False), pytest.param(-1, True, marks=pytest.mark.long)],
    ids=["fixed-x_out", "any-length-dict"],
)
def test_compiles_once_for_all_batch_sizes(n_inp: int, return_dict: bool) -> None:
    module = make(n_inp, return_dict=return_dict)

    def call(x: Tensor) -> Any:
        out = module(x)
        return [t for t in out.values() if t is not None] if isinstance(out, dict) else out

    calls = [[inputs(b).requires_grad_()] for b in (2, 3, 7)]
    check_compiled(call, calls, parameters=list(module.parameters()), restarts=1)


def test_compiles_once_for_all_lengths() -> None:
    module = make(-1)
    calls = [[inputs(2, n=n).requires_grad_()] for n in (5, 9, 40)]
    check_compiled(module, calls, parameters=list(module.parameters()), restarts=1)


def test_compiles_with_mask_and_lengths() -> None:
    module = make()
    calls = [[inputs(b).requires_grad_(), some_mask(b, N, M), torch.arange(1, b + 1)] for b in (2, 3, 7)]

    def call(x: Tensor, mask: Tensor, lengths: Tensor) -> Any:
        return module(x, mask, lengths=lengths)

    check_compiled(call, calls, parameters=list(module.parameters()), restarts=1)


@MODES
def test_exports(n_inp: int) -> None:
    batch = Dim("batch", min=1, max=64)
    sizes = {0: batch} if n_inp != -1 else {0: batch, 1: Dim("n", min=2, max=512)}
    check_exported(make(n_inp), inputs(3), [inputs(5), *([inputs(4, n=30)] if n_inp == -1 else [])], sizes)


# ------------------------------------------------------------------------------------------------- very large inputs


@each_backend
@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("which", ["all", "a row"])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_inputs_whose_squares_overflow(size: float, which: str, n_iters: int, backend: str) -> None:
    """Layer norm's squares do, in float32, and made zeros or NaN of what is finite."""
    seeds.fixed_seed(0)
    layer = EfficientVectorRouting(6, 3, 4, 5, n_iters=n_iters)
    x = torch.randn(2, 6, 4)
    x[:, : 1 if which == "a row" else 6] *= size
    results = []
    for dtype, how in ((torch.float64, "reference"), (torch.float32, backend)):
        made, leaf = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
        with use_backend(how):
            y = made(leaf)
            y.square().sum().backward()
        assert all(t.grad.isfinite().all() for t in (leaf, *made.parameters()) if t.grad is not None)
        results.append(y.detach().double())
    assert (results[1] - results[0]).norm() <= 2e-5 * results[0].norm()


@each_backend
@pytest.mark.parametrize("size", [1e18, 1e30])
def test_a_shut_gate_in_front_of_a_very_large_row(size: float, backend: str) -> None:
    """A row whose gate is 0 counts for nothing, in layers with linear betas, too, which multiply it with itself."""
    seeds.fixed_seed(0)
    layer, x = EfficientVectorRouting(-1, 3, 4, 5), torch.randn(1, 6, 4)
    x[0, 0] = -size * layer.W_A.detach().flatten().sign()
    with use_backend(backend):
        y = layer(x.requires_grad_())
        y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()) if t.grad is not None)
    rest = layer.double()(x.detach().double())
    assert (y.detach() - rest).norm() <= 2e-5 * rest.norm()
