"""``DefinableVectorRouting``: upstream's numbers, its laws, what it never stores, and what it says of wrong modules.

Axes: B samples, n input vectors, m output vectors, d and h their widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastroute
from fastroute import DefinableVectorRouting, use_backend
from fastroute.compat import heinsen_routing
from tests.capsules.test_golden import FLOAT64, compare
from tests.helpers import golden, seeds
from tests.helpers.backends import HERE, each_backend, each_float32_backend
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.golden import Golden
from tests.helpers.opcheck import assert_same, check_compiled, check_exported
from tests.helpers.opcheck import gradcheck as gradcheck_case

N, M, D, H = 11, 5, 8, 6
F32, F64 = torch.float32, torch.float64


class Memory(nn.Module):
    """Votes that do not depend on the input, expanded over the batch."""

    def __init__(self, dtype: torch.dtype = F64, size: tuple[int, int, int] = (N, M, H)) -> None:
        super().__init__()
        self.W_mem = nn.Parameter(torch.randn(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.W_mem.expand(*x.shape[:-2], -1, -1, -1)


class Agreement(nn.Module):
    def forward(self, x: Tensor, pred: Tensor) -> Tensor:
        return x @ pred.mT * D**-0.5


def layer(
    dtype: torch.dtype = F64, votes: str = "memory", size: tuple[int, int, int, int] = (N, M, D, H), **options: Any
) -> DefinableVectorRouting:
    """As upstream's golden files were made: A, F, G, S in that order, then the layer."""
    n, m, d, h = size
    A = nn.Linear(d, 1, dtype=dtype)
    F = Memory(dtype, (n, m, h)) if votes == "memory" else nn.Linear(d, m * h, dtype=dtype)
    options = {"n_inp": n, "n_out": m, **options}
    return DefinableVectorRouting(A, F, nn.Linear(h, d, dtype=dtype), Agreement(), **options, dtype=dtype)


def of_file(recorded: Golden) -> DefinableVectorRouting:
    kwargs = {k: v for k, v in recorded.record["kwargs"].items() if k not in ("d_inp", "d_out")}
    made = layer(recorded.dtype, **kwargs)
    made.load_state_dict(recorded.record["state_dict"], strict=True)
    return made


# ------------------------------------------------------------------------------------------------ upstream's numbers


@pytest.mark.parametrize("file", golden.names("capsules", "dvr_*.float64.pt"))
@each_backend
def test_golden_float64(file: str, backend: str) -> None:
    recorded = Golden.read("capsules", file)
    with use_backend(backend):
        found, expected = recorded.run(of_file(recorded)), recorded.expected()
    bias, theirs = found.pop("dG.bias"), expected.pop("dG.bias")
    compare(found, expected)
    # it adds one number to all scores of a row: its gradient is zero, and what either computes is rounding
    assert bias is theirs is None or (
        bias is not None and theirs is not None and float((bias - theirs).abs().max()) < FLOAT64
    )


def as_case(module: DefinableVectorRouting, x: Tensor, cotangents: dict[str, Tensor]) -> Case:
    """A call with the parameters among the inputs, by name."""
    state = {k: t.detach() for k, t in module.state_dict().items()}
    lead = "uv"[: x.dim() - 2]
    axes = {"x_inp": lead + "nd", "beta_use": "nm", "beta_ign": "nm", "CONST_ones_over_n_out": "m", "A.weight": "ad",
            "A.bias": "a", "F.W_mem": "nmh", "F.weight": "kd", "F.bias": "k", "G.weight": "dh",
            "G.bias": "d"}  # fmt: skip
    outputs = {"a_inp": "n", "V": "nmh", "pred_x_inp": "md", "S": "nm", "R": "nm", "D_use": "nm", "D_ign": "nm",
               "phi": "nm", "x_out": "mh"}  # fmt: skip
    axes |= {k: lead + letters for k, letters in outputs.items()}
    wrt = ("x_inp", *(k for k, _ in module.named_parameters() if k != "G.bias"))  # whose gradient is zero
    return Case({"x_inp": x, **state}, cotangents, axes, wrt)


def as_function(module: DefinableVectorRouting, **arguments: Any) -> Callable[..., dict[str, Tensor | None]]:
    def call(x_inp: Tensor, **state: Tensor) -> dict[str, Tensor | None]:
        made = torch.func.functional_call(module, state, (x_inp,), arguments)
        return made if isinstance(made, dict) else {"x_out": made}

    return call


def literal(module: DefinableVectorRouting, mask: Tensor | None = None) -> Callable[..., dict[str, Tensor | None]]:
    """Upstream's formulas for layers with ``Memory`` or a Linear for F, all arrays stored."""
    n_iters, return_dict = module.n_iters, module.return_dict

    def call(x_inp: Tensor, **w: Tensor) -> dict[str, Tensor | None]:
        a = (x_inp @ w["A.weight"].mT + w["A.bias"]).squeeze(-1)
        V = w["F.W_mem"] if "F.W_mem" in w else (x_inp @ w["F.weight"].mT + w["F.bias"]).unflatten(-1, (M, H))
        V = V.expand(*x_inp.shape[:-1], M, H)
        f = a.sigmoid()[..., None].expand(*a.shape, M)
        f = f if mask is None else f.masked_fill(mask, 0.0)
        pred = S = x_out = None
        scores = w["CONST_ones_over_n_out"].log().expand_as(f)
        for t in range(n_iters):
            if t:
                pred = x_out @ w["G.weight"].mT + w["G.bias"]  # type: ignore[operator]
                S = scores = x_inp @ pred.mT * D**-0.5
            R = (scores if mask is None else scores.masked_fill(mask, -torch.inf)).softmax(-1)
            D_use = f * R
            D_ign = f - D_use
            phi = w["beta_use"] * D_use - w["beta_ign"] * D_ign
            x_out = torch.einsum("...ij,...ijh->...jh", phi, V)
        found = {"a_inp": a, "V": V, "pred_x_inp": pred, "S": S, "R": R, "D_use": D_use, "D_ign": D_ign, "phi": phi,
                 "x_out": x_out}  # fmt: skip
        return found if return_dict else {"x_out": x_out}

    return call


@pytest.mark.parametrize("file", golden.names("capsules", "dvr_*.float32.pt"))
@each_float32_backend
def test_golden_float32(file: str, backend: str) -> None:
    recorded = Golden.read("capsules", file)
    module, x = of_file(recorded), recorded.record["inputs"]["x_inp"]
    case = as_case(module, x, recorded.record["cotangents"])
    generator = seeds.generator(0)
    others = [case.with_inputs(x_inp=torch.randn(x.shape, generator=generator)) for _ in range(1)]
    with use_backend(backend):
        check(
            as_function(module), literal(module), [case, *others], dtype=F32,
            also=[recorded.expected()],
        )  # fmt: skip


def test_the_draws_are_upstreams() -> None:
    """A caller's modules first, then beta_use and beta_ign, of standard deviation 1."""
    seeds.manual_seed(5)
    modules = nn.Linear(D, 1), nn.Linear(D, M * H), nn.Linear(H, D), Agreement()
    made = DefinableVectorRouting(*modules, N, M)
    seeds.manual_seed(5)
    again = nn.Linear(D, 1), nn.Linear(D, M * H), nn.Linear(H, D)
    use, ign = torch.empty(N, M).normal_(), torch.empty(N, M).normal_()
    assert torch.equal(made.beta_use, use) and torch.equal(made.beta_ign, ign)
    assert torch.equal(made.A.weight, again[0].weight)
    assert list(made.state_dict()) == ["beta_use", "beta_ign", "CONST_ones_over_n_out", "A.weight", "A.bias",
                                       "F.weight", "F.bias", "G.weight", "G.bias"]  # fmt: skip
    assert [name for name, _ in made.named_children()] == ["A", "F", "G", "S"]


def test_repr_and_attributes() -> None:
    made = layer(n_iters=3)
    assert (made.n_inp, made.n_out, made.n_iters, made.return_dict) == (N, M, 3, False)
    assert repr(made).endswith(f"S=Agreement(),\n n_inp={N},\n n_out={M},\n n_iters=3,\n return_dict=False)")
    assert heinsen_routing.DefinableVectorRouting is fastroute.DefinableVectorRouting is DefinableVectorRouting


# ------------------------------------------------------------------------------------------------------ what it does


@each_backend
@pytest.mark.parametrize("votes", ["memory", "flat"])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_the_formulas(backend: str, votes: str, masked: bool) -> None:
    seeds.manual_seed(1)
    module = layer(votes=votes, n_iters=3, return_dict=True)
    mask = torch.rand(2, N, M) < 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = False
    shapes = {"x_out": (2, M, H), "phi": (2, N, M), "S": (2, N, M)}
    case = as_case(module, torch.randn(2, N, D, dtype=F64), {k: torch.randn(s, dtype=F64) for k, s in shapes.items()})
    with use_backend(backend):
        found = evaluate(as_function(module, mask=mask), case)
    for name, expected in evaluate(literal(module, mask), case).items():
        got = found[name]
        assert got is not None and expected is not None
        assert_same(got, expected, name)


@each_backend
@pytest.mark.parametrize("votes", ["memory", "flat"])
def test_gradcheck(backend: str, votes: str) -> None:
    seeds.manual_seed(0)
    module = layer(votes=votes, size=(5, 3, 4, 2))
    case = as_case(module, torch.randn(2, 5, 4, dtype=F64), {})
    mask = torch.rand(2, 5, 3) < 0.4
    mask[0, 3] = True
    with use_backend(backend):
        gradcheck_case(as_function(module, mask=mask, lengths=[5, 2]), case)


@each_backend
def test_votes_that_all_samples_share(backend: str) -> None:
    """Expanded, or without leading dimensions, flat or not: the same numbers, and none is written per sample."""
    seeds.manual_seed(0)
    x, memory = torch.randn(3, 2, N, D, dtype=F64), torch.randn(N, M, H, dtype=F64, requires_grad=True)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "copied": lambda x: memory.expand(3, 2, N, M, H).clone(),
        "expanded": lambda x: memory.expand(3, 2, N, M, H),
        "alone": lambda x: memory,
        "ones": lambda x: memory[None, None],
        "flat": lambda x: memory.flatten(1),
        "flat expanded": lambda x: memory.flatten(1).expand(3, 2, N, M * H),
    }
    found = {}
    with use_backend(backend):
        for name, F in forms.items():
            module = layer(n_iters=2)
            module.load_state_dict({**layer(votes="flat").state_dict(), **_fixed_state()}, strict=False)
            module._modules.pop("F")
            module.F = F
            with Largest() as largest:
                y = module(x)
                (grad,) = torch.autograd.grad(y.square().sum(), memory)
            found[name] = y.detach(), grad
            assert (largest.numel < 6 * N * M * H) == (name != "copied"), (name, largest.numel)
    for name in forms:
        for got, expected in zip(found[name], found["copied"], strict=True):
            assert_same(got, expected, name)


class Given(nn.Module):
    """Votes that the caller has at hand."""

    votes: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.votes


def of_votes(votes: Tensor) -> DefinableVectorRouting:
    made = layer(n_iters=2)
    made.load_state_dict(_fixed_state(), strict=False)
    made.F = Given()
    made.F.votes = votes
    return made


def test_the_gradient_of_expanded_votes() -> None:
    """Each sample's own, or none at all; of what they are expanded from, their sum."""
    seeds.manual_seed(0)
    x, memory = torch.randn(3, N, D, dtype=F64), torch.randn(N, M, H, dtype=F64)
    whole = memory.expand(3, N, M, H).clone().requires_grad_()
    (each,) = torch.autograd.grad(of_votes(whole)(x).square().sum(), whole)

    def expanded() -> tuple[Tensor, Tensor]:
        leaf = memory.clone().requires_grad_()
        return leaf, leaf.expand(3, N, M, H)

    leaf, votes = expanded()
    votes.retain_grad()
    of_votes(votes)(x).square().sum().backward()
    assert_same(votes.grad, each)  # type: ignore[arg-type]
    assert_same(leaf.grad, each.sum(0))  # type: ignore[arg-type]

    seen: list[Tensor] = []
    _, votes = expanded()
    votes.register_hook(lambda grad: seen.append(grad))
    of_votes(votes)(x).square().sum().backward()
    module = of_votes(expanded()[1])
    module.F.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0]))
    module(x).square().sum().backward()
    own = memory.expand(3, N, M, H).requires_grad_()  # a leaf
    seen += torch.autograd.grad(of_votes(own)(x).square().sum(), own)
    assert len(seen) == 3
    for grad in seen:
        assert_same(grad, each)

    _, votes = expanded()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(of_votes(votes)(x).square().sum(), votes)
    leaf, votes = expanded()
    y = of_votes(votes)(x).square().sum()
    (first,) = torch.autograd.grad(y, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    whole = memory.expand(3, N, M, H).clone().requires_grad_()
    (same,) = torch.autograd.grad(of_votes(whole)(x).square().sum(), whole, create_graph=True)
    assert_same(second, torch.autograd.grad(same.sum(0).square().sum(), whole)[0].sum(0))

    module = of_votes(memory)

    def loss(memory: Tensor) -> Tensor:
        module.F.votes = memory.expand(3, N, M, H)  # type: ignore[union-attr]
        return module(x).square().sum()  # type: ignore[no-any-return]

    assert_same(torch.func.grad(loss)(memory), each.sum(0))
    tangent = torch.randn_like(memory)
    assert_same(torch.func.jvp(loss, (memory,), (tangent,))[1], (each.sum(0) * tangent).sum())
    stack = torch.stack([memory, -memory])
    assert_same(torch.func.vmap(torch.func.grad(loss))(stack)[0], each.sum(0))


def test_g_of_a_width_that_s_does_not_take() -> None:
    wrong = layer()
    wrong.G = nn.Linear(H, D + 1, dtype=F64)
    with pytest.raises(ValueError, match=r"^G: expected to return predictions that S takes, .* width 8 .* \[2, 5, 9\]"):
        wrong(torch.randn(2, N, D, dtype=F64))


@pytest.mark.parametrize("n_iters", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["efficient", "any number", "definable"])
@each_backend
def test_a_learned_prior_has_its_gradient(backend: str, kind: str, masked: bool, n_iters: int) -> None:
    """The buffer set to require one, or a parameter in its place; the number of a difference quotient."""
    seeds.manual_seed(0)
    x, mask = torch.randn(2, N, D, dtype=F64), torch.rand(2, N, M) < 0.3 if masked else None
    if kind == "definable":
        module: Any = layer(n_iters=n_iters)
    else:
        rows = -1 if kind == "any number" else N
        module = fastroute.EfficientVectorRouting(rows, M, D, H, n_iters=n_iters, dtype=F64)

    def loss() -> Tensor:
        made: Tensor = module(x, mask)
        return (made * torch.linspace(0, 1, H, dtype=F64)).square().sum()

    with use_backend(backend):
        module.CONST_ones_over_n_out.requires_grad_()
        loss().backward()
        grad = module.CONST_ones_over_n_out.grad
        slope = torch.randn(M, dtype=F64)
        with torch.no_grad():
            module.CONST_ones_over_n_out.add_(slope, alpha=1e-6)
            up = loss()
            module.CONST_ones_over_n_out.sub_(slope, alpha=2e-6)
            numeric = (up - loss()) / 2e-6
            module.CONST_ones_over_n_out.add_(slope, alpha=1e-6)
        torch.testing.assert_close((grad * slope).sum(), numeric, rtol=1e-6, atol=1e-7)
        assert all(p.grad is not None for p in module.parameters() if p.shape != (1,)) or n_iters == 1
        prior = nn.Parameter(module.CONST_ones_over_n_out.detach().clone())
        del module.CONST_ones_over_n_out
        module.CONST_ones_over_n_out = prior
        loss().backward()
        assert_same(prior.grad, grad)  # type: ignore[arg-type]
    if kind != "definable":
        with pytest.raises(ValueError, match=r"^CONST_ones_over_n_out: expected one that requires no gradient"):
            module.stream(x)


def _fixed_state() -> dict[str, Tensor]:
    generator = seeds.generator(9)
    shapes = {
        "beta_use": (N, M),
        "beta_ign": (N, M),
        "A.weight": (1, D),
        "G.weight": (D, H),
        "A.bias": (1,),
        "G.bias": (D,),
    }
    return {k: torch.randn(s, generator=generator, dtype=F64) for k, s in shapes.items()}


class Largest(TorchDispatchMode):
    """The most memory behind any tensor that an operator made, in elements."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(made):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return made


class PerElement(nn.Module):
    """A, F and G of any number of inputs."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, out, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def any_length(**options: Any) -> DefinableVectorRouting:
    seeds.manual_seed(3)
    made = PerElement(D, 1), PerElement(D, M * H), nn.Linear(H, D, dtype=F64), Agreement()
    return DefinableVectorRouting(*made, -1, M, **options, dtype=F64)


@each_backend
def test_any_number_of_inputs(backend: str) -> None:
    """Betas are linear in x: the same as a layer of fixed length that was given those betas."""
    module, x = any_length(d_inp=D), torch.randn(1, 7, D, dtype=F64)
    assert {k: list(t.shape) for k, t in module.named_parameters() if k.startswith("compute")} == {
        "compute_beta_use.weight": [M, D], "compute_beta_use.bias": [M],
        "compute_beta_ign.weight": [M, D], "compute_beta_ign.bias": [M],
    }  # fmt: skip
    with use_backend(backend):
        got = module(x)
        fixed = DefinableVectorRouting(module.A, module.F, module.G, module.S, 7, M, dtype=F64)
        with torch.no_grad():
            fixed.beta_use.copy_(module.compute_beta_use(x[0]))
            fixed.beta_ign.copy_(module.compute_beta_ign(x[0]))
        assert_same(got, fixed(x))
        assert module(torch.randn(2, 3, 13, D, dtype=F64)).shape == (2, 3, M, H)
        got.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.shape != (1,))


def test_lazy_betas() -> None:
    """Without d_inp the width, and the draws, come with the first input."""
    lazy, eager = any_length(), any_length(d_inp=D)
    assert isinstance(lazy.compute_beta_use.weight, nn.parameter.UninitializedParameter)
    x = torch.randn(2, 4, D, dtype=F64)
    lazy(x)
    assert list(lazy.state_dict()) == list(eager.state_dict())
    lazy.load_state_dict(eager.state_dict(), strict=True)
    assert torch.equal(lazy(x), eager(x))
    again = any_length()
    again.load_state_dict(eager.state_dict(), strict=True)
    assert torch.equal(again(x), eager(x))


@each_backend
def test_a_padded_sample_gives_what_it_gives_alone(backend: str) -> None:
    module = any_length(d_inp=D)
    x, lengths = torch.randn(3, 9, D, dtype=F64), [9, 4, 0]
    x[1, 4:] = math.nan
    x[2] = math.inf
    leaf = x.clone().requires_grad_()
    with use_backend(backend):
        y = module(leaf, lengths=lengths)
        assert_same(y[0], module(x[0]))
        assert_same(y[1], module(x[1, :4]))
        assert not y[2].any()
        y.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[1, 4:].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@each_backend
def test_masking_is_deleting(backend: str) -> None:
    """An input that is masked for every output contributes zero, and gets none; upstream gives NaN."""
    module = any_length(d_inp=D)
    x = torch.randn(2, 6, D, dtype=F64)
    mask = torch.zeros(6, M, dtype=torch.bool)
    mask[2] = True
    leaf = x.clone().requires_grad_()
    rest = [0, 1, 3, 4, 5]
    with use_backend(backend):
        y = module(leaf, mask)
        assert_same(y, module(x[:, rest]))
        y.square().sum().backward()
        assert_same(module(x, torch.zeros(6, M, dtype=torch.bool)), module(x))
    assert leaf.grad is not None and not leaf.grad[:, 2].any() and leaf.grad[:, rest].all()


@pytest.mark.parametrize("lengths", [None, [N, 3]])
def test_return_dict(lengths: list[int] | None) -> None:
    seeds.manual_seed(0)
    module, x = layer(return_dict=True), torch.randn(2, N, D, dtype=F64)
    found = module(x, lengths=lengths)
    module.return_dict = False
    assert list(found) == ["a_inp", "V", "pred_x_inp", "S", "R", "D_use", "D_ign", "phi", "x_out"]
    assert_same(found["x_out"], module(x, lengths=lengths))
    if lengths is not None:
        assert not found["phi"][1, 3:].any()
    one = layer(return_dict=True, n_iters=1)(x)
    assert one["pred_x_inp"] is None and one["S"] is None and one["phi"].shape == (2, N, M)


def test_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16, F32, F64):
        module = layer(dtype, return_dict=dtype == F32)
        made = module(torch.randn(2, N, D, dtype=dtype))
        assert (made["x_out"] if isinstance(made, dict) else made).dtype == dtype
    x = torch.randn(2, N, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(F32, votes="flat")(x).dtype == F32
    assert layer(F32)(x.double().float()).dtype == F32
    assert layer(F64)(torch.randn(0, N, D, dtype=F64)).shape == (0, M, H)
    assert layer(F64)(torch.randn(N, D, dtype=F64)).shape == (M, H)


def test_device_and_dtype() -> None:
    made = layer(F32, votes="flat").__class__(nn.Identity(), nn.Identity(), nn.Identity(), Agreement(), -1, M, d_inp=D,
                                              device="meta", dtype=torch.bfloat16)  # fmt: skip
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(("votes", "backend"), [("memory", HERE[0]), ("flat", HERE[-1])])
def test_compile(votes: str, backend: str) -> None:
    seeds.manual_seed(0)
    module = layer(votes=votes)
    calls = [(torch.randn(B, N, D, dtype=F64, requires_grad=True),) for B in (3, 5, 2)]
    with use_backend(backend):
        check_compiled(module, calls, parameters=list(module.parameters()))


def test_export() -> None:
    example, *others = [torch.randn(B, N, D, dtype=F64) for B in (3, 2, 7)]
    check_exported(layer(votes="flat"), example, others, {0: torch.export.Dim("batch", min=2)})


def test_explain() -> None:
    made = fastroute.explain(layer(F32), torch.randn(2, N, D))
    assert [d.case.op for d in made] == ["soft_assignment"] * 2


# ---------------------------------------------------------------------------------------------------------- bad input

GOOD: dict[str, Any] = {
    "A": nn.Identity(),
    "F": nn.Identity(),
    "G": nn.Identity(),
    "S": Agreement(),
    "n_inp": N,
    "n_out": M,
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n_inp": 0}, ValueError, "n_inp: expected a positive number of input vectors, or -1 for any number, got 0"),
        ({"n_out": 1}, ValueError, "n_out: expected at least 2 output vectors, got 1"),
        ({"n_iters": 0}, ValueError, "n_iters: expected at least 1, got 0"),
        ({"n_iters": 2.0}, TypeError, "n_iters: expected an int"),
        ({"d_inp": 0}, ValueError, "d_inp: expected at least 1, got 0"),
        ({"S": None}, TypeError, "S: expected a module or a function, got NoneType"),
        ({"dtype": torch.int64}, TypeError, r"dtype: expected a floating-point dtype, got torch\.int64"),
    ],
)
def test_construction(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        DefinableVectorRouting(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("name", "returned", "message"),
    [
        ("A", torch.zeros(2, N, 2), rf"A: expected to return \[2, {N}\] or \[2, {N}, 1\], got \[2, {N}, 2\]"),
        ("A", torch.zeros(2, 1, N), rf"A: expected to return .*, got \[2, 1, {N}\]"),
        (
            "F", torch.zeros(2, N, M * H - 1),
            rf"F: expected to return \[2, {N}, {M}, d_out\], flat \[2, {N}, {M} \* d_out\], or either without leading "
            rf"dimensions, got \[2, {N}, {M * H - 1}\]",
        ),
        ("F", torch.zeros(3, N, M, H), rf"F: expected .* got \[3, {N}, {M}, {H}\]"),
        ("F", torch.zeros(N, M + 1, H), rf"F: expected .* got \[{N}, {M + 1}, {H}\]"),
        ("G", torch.zeros(2, N, D), rf"G: expected to return \[2, {M}, d_inp\], got \[2, {N}, {D}\]"),
        ("S", torch.zeros(2, M, N), rf"S: expected to return \[2, {N}, {M}\], got \[2, {M}, {N}\]"),
    ],
)  # fmt: skip
def test_what_a_module_returned(name: str, returned: Tensor, message: str) -> None:
    module = layer(F32)
    delattr(module, name)
    setattr(module, name, lambda *_: returned)
    with pytest.raises(ValueError, match="^" + message):
        module(torch.zeros(2, N, D))


@pytest.mark.parametrize("name", ["A", "F", "G", "S"])
def test_a_module_that_returned_no_tensor(name: str) -> None:
    module = layer(F32)
    delattr(module, name)
    setattr(module, name, lambda *_: [1.0])
    with pytest.raises(TypeError, match=rf"^{name}: expected its output to be a tensor \[.*, got list"):
        module(torch.zeros(2, N, D))


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "x_inp: expected a tensor, got list"),
        (torch.zeros(D), {}, ValueError, r"x_inp: expected \[\.\.\., n_inp, d_inp\], at least 2 dimensions, got"),
        (torch.zeros(2, 1, D), {}, ValueError, rf"n_inp: expected {N} input vectors, got 1"),
        (torch.zeros(2, N, D).long(), {}, TypeError, "x_inp: expected a floating-point tensor"),
        (torch.zeros(2, N, D, device="meta"), {}, ValueError, "x_inp: expected a tensor on cpu like the parameters"),
        (torch.zeros(2, N, D), {"mask": torch.zeros(N, M)}, TypeError, "mask: expected a bool tensor"),
        (torch.zeros(2, N, D), {"lengths": [1]}, ValueError, r"lengths: expected one length per sample, shape \[2\]"),
    ],
)
def test_calls(x: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        layer(F32)(x, **arguments)


def test_the_width_it_was_told() -> None:
    with pytest.raises(ValueError, match=rf"^d_inp: expected input vectors of width {D}, got {D + 1}"):
        any_length(d_inp=D)(torch.zeros(2, 3, D + 1, dtype=F64))
