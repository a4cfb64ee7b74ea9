"""``GenerativeMatrixRouting``: upstream's numbers, what users rely on, and every wrong argument named.

Axes: n input capsules, m output capsules, c rows of a capsule's matrix, d its columns before, h after.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastroute
from fastroute import GenerativeMatrixRouting, use_backend
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.matrix_routing.reference import matrix_routing
from tests.helpers import golden, seeds
from tests.helpers.backends import each_backend, each_float32_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, Function, evaluate
from tests.helpers.golden import Golden, assert_same_draws
from tests.helpers.matrix_cases import AXES
from tests.helpers.opcheck import assert_same
from tests.helpers.routing_cases import some_mask

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
N, M, C, D, H = 11, 5, 3, 4, 2
NAMES = ("a_out", "mu_out", "sig2_out")
modes = pytest.mark.parametrize("n_inp", [N, -1], ids=["fixed", "any-number"])


def make(n_inp: int = N, *, seed: int = 0, **options: Any) -> GenerativeMatrixRouting:
    """A module none of whose parameters is zero, so that every path is live."""
    seeds.manual_seed(seed)
    module = GenerativeMatrixRouting(n_inp, M, C, D, H, **options)
    with torch.no_grad():
        for p in (module.B, module.beta_use, module.beta_ign):
            p.normal_(std=0.3)
    return module


def inputs(*lead: int, n: int = N, dtype: torch.dtype = F32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = seeds.generator(seed)
    a = torch.randn(*lead, n, generator=generator, dtype=F64).to(dtype)
    return a, torch.randn(*lead, n, C, D, generator=generator, dtype=F64).to(dtype)


def outputs(made: Any) -> dict[str, Tensor]:
    return made if isinstance(made, dict) else dict(zip(NAMES, made, strict=True))


# ------------------------------------------------------------------------------------------------------- upstream


def as_case(recorded: Golden) -> Case:
    """The file's call with its leading dimensions as one, for the literal reference."""
    r = recorded.record
    state = {k: r["state_dict"][k] for k in ("W", "B", "beta_use", "beta_ign")}
    flat = {"a_inp": 1, "mu_inp": 3}
    given = {k: t.reshape(-1, *t.shape[-flat[k] :]) for k, t in r["inputs"].items()}
    back = {k: t.reshape(-1, *t.shape[-(1 if k == "a_out" else 3) :]) for k, t in r["cotangents"].items()}
    axes = AXES | {"a_out": "bm", "mu_out": "bmch", "sig2_out": "bmch"}
    wrt = ["a_inp", "mu_inp", "W", "B", "beta_use", *([] if r["kwargs"].get("single_beta") else ["beta_ign"])]
    return Case({**given, **state}, back, axes, tuple(wrt))


def literal(recorded: Golden) -> Function:
    options = {"n_iters": 3} | recorded.record["kwargs"]

    def call(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        if options.get("single_beta"):
            w["beta_ign"] = w["beta_use"]
        chosen = {k: options[k] for k in ("n_iters", "p_model", "eps") if k in options}
        made = matrix_routing(a_inp, mu_inp, Capsules(**w), **chosen)._asdict()
        return {k: made[k] for k in NAMES}

    return call


def layer(recorded: Golden) -> Function:
    module = recorded.module(fastroute)

    def call(a_inp: Tensor, mu_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        if recorded.record["kwargs"].get("single_beta"):
            w["beta_ign"] = w["beta_use"]
        made = outputs(torch.func.functional_call(module, w, (a_inp, mu_inp), tie_weights=False))
        return {k: made[k] for k in NAMES}

    return call


def run(recorded: Golden) -> golden.Found:
    module = recorded.module(fastroute)
    given = recorded.inputs()
    made = outputs(module(**given))
    recorded.backward(dict(made))
    found = {k: None if t is None else t.detach() for k, t in made.items()}
    found |= {f"d{k}": t.grad for k, t in given.items()}
    return found | {f"d{k}": p.grad for k, p in module.named_parameters()}


def compare(found: golden.Found, expected: golden.Found) -> None:
    """Rounding alone separates two float64 implementations; the recorded ones are of order one."""
    for name, numbers in expected.items():
        got = found[name]
        assert (got is None) == (numbers is None), name
        if got is not None and numbers is not None:
            assert got.dtype == F64
            assert_same(got.reshape(numbers.shape), numbers, name)


def recorded_outputs(recorded: Golden) -> golden.Found:
    made = recorded.record["outputs"]
    return recorded.expected() | (dict(zip(NAMES, made, strict=True)) if not isinstance(made, dict) else {})


@pytest.mark.parametrize("file", golden.names("capsules", "gmr_*.float64.pt"))
@each_backend
def test_upstream_in_float64(file: str, backend: str) -> None:
    recorded = Golden.read("capsules", file)
    with use_backend(backend):
        compare(run(recorded), recorded_outputs(recorded))


@pytest.mark.parametrize("file", golden.names("capsules", "gmr_*.float64.pt"))
def test_the_literal_reference(file: str) -> None:
    """The truth that all other tests rely on is itself upstream's."""
    recorded = Golden.read("capsules", file)
    found = evaluate(literal(recorded), as_case(recorded))
    compare(found, {k: t for k, t in recorded_outputs(recorded).items() if k in found})


@pytest.mark.parametrize("file", golden.names("capsules", "gmr_*.float32.pt"))
@each_float32_backend
def test_upstream_in_float32(file: str, backend: str) -> None:
    """Upstream's float32 counts as plain PyTorch, with the literal reference in other orders and on other inputs."""
    recorded = Golden.read("capsules", file)
    case = as_case(recorded)
    generator = seeds.generator(0)
    others = [
        case.with_inputs(**{k: torch.randn(case.inputs[k].shape, generator=generator) for k in ("a_inp", "mu_inp")})  # type: ignore[union-attr]
        for _ in range(2)
    ]
    fixed = evaluate(literal(recorded), case)
    upstream = {k: t.reshape(fixed[k].shape) for k, t in recorded_outputs(recorded).items() if k in fixed}  # type: ignore[union-attr]
    with use_backend(backend):
        check(
            layer(recorded), literal(recorded), [case, *others], dtype=F32, also=[upstream],
        )  # fmt: skip


INITIAL = golden.load("capsules", "init_seed1234.pt")
SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "GMR(9,4,3,5,2)": ((9, 4, 3, 5, 2), {}),
    "GMR(-1,4,3,5,2)": ((-1, 4, 3, 5, 2), {}),
    "GMR(9,4,3,5,2,single_beta=True)": ((9, 4, 3, 5, 2), {"single_beta": True}),
}


@pytest.mark.parametrize("name", SIZES)
def test_initial_values_and_state_dicts(name: str) -> None:
    """A seed gives upstream's weights, and leaves the generator where upstream does; state dicts load both ways."""
    sizes, options = SIZES[name]
    torch.manual_seed(1234)
    module = GenerativeMatrixRouting(*sizes, **options)
    after = torch.randn(4)
    state = module.state_dict()
    assert list(state) == list(INITIAL[name])
    for key, value in INITIAL[name].items():
        assert_same_draws(state[key], value, key)
    assert_same_draws(after, INITIAL[f"{name} next_randn"], "what comes next")
    module.load_state_dict(INITIAL[name], strict=True)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "CONST_one"'):
        module.load_state_dict({k: t for k, t in state.items() if k != "CONST_one"}, strict=True)


def test_attributes() -> None:
    module = GenerativeMatrixRouting(9, 4, 3, 5, 2, 2, True, "skm", 1e-4, True)
    text = (
        "GenerativeMatrixRouting(n_inp=9, n_out=4, d_cov=3, d_inp=5, d_out=2, n_iters=2, single_beta=True, "
        "p_model=skm, eps=0.0001, return_dict=True)"
    )
    assert repr(module) == text and module.n_inp_is_fixed and not make(-1).n_inp_is_fixed
    assert [k for k, _ in module.named_parameters()] == ["W", "B", "beta_use"]
    assert module.beta_ign is module.beta_use and copy.deepcopy(module).beta_ign.shape == (9, 4)
    again = copy.deepcopy(module)
    assert again.beta_ign is again.beta_use


# ---------------------------------------------------------------------------------------------------- behaviour


def compared(module: GenerativeMatrixRouting, a: Tensor, mu: Tensor, **options: Any) -> dict[str, Tensor]:
    """Outputs are the literal reference's, in float64."""
    found = outputs(module(a, mu, **options))
    mask = options.get("mask")
    n = a.shape[-1]
    made = matrix_routing(
        a.reshape(-1, n), mu.reshape(-1, n, C, D), Capsules(module.W, module.B, module.beta_use, module.beta_ign),
        n_iters=module.n_iters, p_model=module.p_model, eps=module.eps,
        mask=None if mask is None else mask.expand(*a.shape, M).reshape(-1, n, M),
    )._asdict()  # fmt: skip
    for name, t in found.items():
        if t is None:
            assert made[name] is None
        else:
            assert t.shape[: a.dim() - 1] == a.shape[:-1]
            assert_same(t.reshape(made[name].shape), made[name], name)
    return found


@modes
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_shapes(backend: str, n_inp: int, lead: tuple[int, ...], return_dict: bool, n_iters: int) -> None:
    module = make(n_inp, return_dict=return_dict, n_iters=n_iters, dtype=F64)
    found = compared(module, *inputs(*lead, dtype=F64))
    assert list(found) == (["V", "log_p", "R", "D_use", "D_ign", *NAMES] if return_dict else list(NAMES))


@pytest.mark.parametrize("n", [1, 40])
def test_any_number(backend: str, n: int) -> None:
    compared(make(-1, dtype=F64), *inputs(2, n=n, dtype=F64))


def test_one_input_capsule(backend: str) -> None:
    compared(make(1, dtype=F64), *inputs(3, n=1, dtype=F64))


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_no_samples(backend: str, lead: tuple[int, ...], return_dict: bool) -> None:
    module = make(return_dict=return_dict)
    found = outputs(module(*inputs(*lead)))
    assert all(t.shape[: len(lead)] == lead for t in found.values())
    sum(t.sum() for t in found.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@modes
@pytest.mark.parametrize(
    "mask",
    [some_mask(N, M), some_mask(3, N, M), some_mask(3, N, 1), torch.arange(M) == 2, some_mask(3, M, 2 * N).mT[:, 1::2]],
    ids=["n,m", "B,n,m", "B,n,1", "m", "strided"],
)
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_masks(backend: str, n_inp: int, mask: Tensor, return_dict: bool) -> None:
    compared(make(n_inp, return_dict=return_dict, dtype=F64), *inputs(3, dtype=F64), mask=mask)


@modes
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_padding_does_not_matter(backend: str, n_inp: int, return_dict: bool) -> None:
    """A padded sample gives what it gives alone, with any numbers in the padding, and those have no gradient."""
    module, lengths = make(n_inp, return_dict=return_dict, dtype=F64), [N, 4, 1]
    a, mu = inputs(3, dtype=F64)
    for b, stop in enumerate(lengths):
        a[b, stop:], mu[b, stop:] = math.nan, math.nan
    a.requires_grad_(), mu.requires_grad_()
    found = outputs(module(a, mu, lengths=lengths))
    for b, stop in enumerate(lengths):
        w = Capsules(*(p if n_inp == -1 else p[:stop] for p in (module.W, module.B, module.beta_use, module.beta_ign)))
        alone = matrix_routing(a[b : b + 1, :stop], mu[b : b + 1, :stop], w, n_iters=3)._asdict()
        for name in NAMES:
            assert_same(found[name][b].detach(), alone[name][0].detach(), name)
    sum(found[name].sum() for name in NAMES).backward()  # type: ignore[union-attr]
    assert a.grad is not None and mu.grad is not None and mu.grad.isfinite().all()
    for b, stop in enumerate(lengths):
        assert not a.grad[b, stop:].any() and not mu.grad[b, stop:].any()


@modes
def test_half_precision(backend: str, n_inp: int) -> None:
    """Variances come in float32, whatever the module is in; all else in its dtype."""
    module = make(n_inp, dtype=BF16)
    a, mu, sig2 = module(*inputs(2, dtype=BF16))
    assert (a.dtype, mu.dtype, sig2.dtype) == (BF16, BF16, F32)
    found = make(n_inp, dtype=BF16, return_dict=True)(*inputs(2, dtype=BF16))
    for got, name in zip((a, mu, sig2), NAMES, strict=True):
        assert found[name].dtype == got.dtype
        assert (found[name] - got).abs().max() <= 2 * torch.finfo(BF16).eps * got.abs().max()


@modes
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_autocast(backend: str, n_inp: int, return_dict: bool) -> None:
    module = make(n_inp, return_dict=return_dict)
    expected = outputs(module(*inputs(2)))
    with torch.autocast("cpu", dtype=BF16):
        found = outputs(module(*inputs(2)))
    assert all(t.dtype == F32 and torch.equal(t, expected[k]) for k, t in found.items())


def test_single_beta_collects_both_gradients(backend: str) -> None:
    one, two = make(single_beta=True, dtype=F64), make(dtype=F64)
    two.load_state_dict(one.state_dict())
    for module in (one, two):
        sum(t.square().sum() for t in module(*inputs(2, dtype=F64))).backward()
    assert one.beta_use.grad is not None and two.beta_use.grad is not None and two.beta_ign.grad is not None
    assert_same(one.beta_use.grad, two.beta_use.grad + two.beta_ign.grad)


@modes
def test_compiled_once_for_every_batch(n_inp: int) -> None:
    module = make(n_inp)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    compiled(*inputs(6))
    graphs = counter.frame_count
    for batch in (6, 7, 8):
        a, mu = inputs(batch)
        assert all(map(torch.equal, compiled(a, mu), module(a, mu)))
    assert counter.frame_count == graphs


@modes
def test_exported(n_inp: int) -> None:
    module = make(n_inp).eval()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, inputs(6), dynamic_shapes={"a_inp": {0: batch}, "mu_inp": {0: batch}})
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        loaded = torch.export.load(stored).module()
        for b in (6, 9):
            assert all(map(torch.equal, loaded(*inputs(b)), module(*inputs(b))))


def test_routes_to_as_many_as_the_parameters_are_for() -> None:
    """What a layer with a variable number of outputs passes in place of its own parameters."""
    module = make(-1)
    w = Capsules(*(p[:, :1].expand(-1, 9, *p.shape[2:]) for p in module._route_parameters()))
    a_out, mu_out, _ = module._route(*inputs(2), w)
    assert a_out.shape == (2, 9) and mu_out.shape == (2, 9, C, H)


# ---------------------------------------------------------------------------------------------------- bad input

GOOD = {"n_inp": 4, "n_out": 3, "d_cov": 2, "d_inp": 6, "d_out": 5}
A, MU = torch.zeros(2, 4), torch.zeros(2, 4, 2, 6)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n_inp": 0}, ValueError, r"n_inp: expected a positive number of input capsules, or -1 .*, got 0"),
        ({"n_out": 1}, ValueError, r"n_out: expected at least 2 output capsules, got 1"),
        ({"d_cov": 0}, ValueError, r"d_cov: expected at least 1, got 0"),
        ({"d_inp": 0}, ValueError, r"d_inp: expected at least 1, got 0"),
        ({"d_out": -1}, ValueError, r"d_out: expected at least 1, got -1"),
        ({"n_iters": 0}, ValueError, r"n_iters: expected at least 1, got 0"),
        ({"n_iters": 2.0}, TypeError, r"n_iters: expected an int.*2\.0"),
        ({"p_model": "normal"}, ValueError, r"p_model: expected one of gaussian, skm, got 'normal'"),
        ({"eps": 0.0}, ValueError, r"eps: expected a positive number, got 0"),
        ({"eps": math.nan}, ValueError, r"eps: expected a positive number, got nan"),
        ({"dtype": torch.int64}, TypeError, r"dtype: expected a floating-point dtype, got torch\.int64"),
    ],
)
def test_construction(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        GenerativeMatrixRouting(**{**GOOD, **wrong})
    assert torch.equal(torch.get_rng_state(), before), "checked after work had begun"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (([1.0], MU, {}), TypeError, r"a_inp: expected a tensor, got list"),
        ((A, MU.long(), {}), TypeError, r"mu_inp: expected a floating-point tensor, got torch\.int64"),
        ((A, MU.to("meta"), {}), ValueError, r"mu_inp: expected a tensor on cpu like the parameters, got one on meta"),
        ((A, MU[0, 0], {}), ValueError, r"mu_inp: expected \[\.\.\., n_inp, d_cov, d_inp\], .*got \[2, 6\]"),
        ((A, MU[..., :1, :], {}), ValueError, r"d_cov: expected matrices of 2 rows, got 1 \(mu_inp is \[2, 4, 1, 6\]"),
        ((A, MU[..., :5], {}), ValueError, r"d_inp: expected matrices of 6 columns, got 5 \(mu_inp is \[2, 4, 2, 5\]"),
        ((A[:, :1], MU[:, :1], {}), ValueError, r"n_inp: expected 4 input capsules, got 1 \(mu_inp is \[2, 1, 2, 6\]"),
        ((A[:, :3], MU, {}), ValueError, r"a_inp: expected one activation per input capsule, \[2, 4\], got \[2, 3\]"),
        ((A, MU, {"mask": torch.zeros(4, 3)}), TypeError, r"mask: expected a bool tensor"),
        (
            (A, MU, {"mask": torch.zeros(4, 2).bool()}),
            ValueError,
            r"mask: expected a shape that broadcasts to \[2, 4, 3",
        ),
        ((A, MU, {"lengths": [4, 5]}), ValueError, r"lengths: expected values from 0 to 4"),
        ((A, MU, {"lengths": [4]}), ValueError, r"lengths: expected one length per sample, shape \[2\], got \[1\]"),
    ],
)
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_call(call: tuple[Any, ...], error: type[Exception], message: str, return_dict: bool) -> None:
    module = GenerativeMatrixRouting(**GOOD, return_dict=return_dict)
    a, mu, options = call
    with pytest.raises(error, match=message):
        module(a, mu, **options)


def test_no_input_capsules() -> None:
    with pytest.raises(ValueError, match=r"mu_inp: expected at least 1 input capsule, got 0"):
        GenerativeMatrixRouting(**{**GOOD, "n_inp": -1})(A[:, :0], MU[:, :0])
