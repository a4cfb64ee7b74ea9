"""The 2019 layer: its formulas, its checkpoints, any number of outputs, and what 2022's layer loads of it.

Axes: b samples, n inputs, m outputs, c rows of a capsule's matrix, d its columns before routing, h after.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute import GenerativeMatrixRouting, use_backend
from fastroute.compat.heinsen_routing_2019 import Routing
from tests.helpers import seeds
from tests.helpers.backends import each_backend
from tests.helpers.opcheck import assert_same

F64 = torch.float64
C, D, H = 3, 4, 2


def layer(n_inp: int = -1, n_out: int = -1, **options: Any) -> Routing:
    """With parameters that are not zero."""
    seeds.manual_seed(0)
    made = Routing(C, D, H, n_inp, n_out, **options, dtype=F64)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.5)
    return made


def inputs(n: int = 7, *batch: int) -> tuple[Tensor, Tensor]:
    generator = seeds.generator(1)
    return (
        torch.randn(*batch, n, dtype=F64, generator=generator),
        torch.randn(*batch, n, C, D, dtype=F64, generator=generator),
    )


def formulas(module: Routing, a: Tensor, mu: Tensor, m: int) -> tuple[Tensor, ...]:
    """Section 2 of the paper, with everything stored."""
    w = dict(module.named_parameters())
    beta_ign = w.get("beta_ign", w["beta_use"])
    B = w["B"]
    if "B_brk" in w:
        B = B + w["B_brk"] * torch.linspace(-1, 1, m, dtype=F64)[:, None, None]
    V = torch.einsum("...icd,ijdh->...ijch", mu, w["W"].expand(mu.shape[-3], m, -1, -1)) + B
    f = a.sigmoid()[..., None]
    R = torch.full((*a.shape, m), 1 / m, dtype=F64)
    score = mean = var = torch.empty(0)
    for t in range(module.n_iters):
        if t:
            square = (V - mean[..., None, :, :, :]).square()
            if module.p_model == "gaussian":
                log_p = -(square / (2 * var[..., None, :, :, :])).sum((-2, -1))
                log_p = log_p - var.sqrt().log().sum((-2, -1))[..., None, :]
            else:
                log_p = (-square.sum((-2, -1))).log_softmax(-1)
            R = (score.sigmoid().log()[..., None, :] + log_p).softmax(-1)
        D_use = f * R
        D_ign = f - D_use
        score = (w["beta_use"] * D_use).sum(-2) - (beta_ign * D_ign).sum(-2)
        q = D_use / (D_use.sum(-2, keepdim=True) + module.eps)
        mean = torch.einsum("...ij,...ijch->...jch", q, V)
        var = torch.einsum("...ij,...ijch->...jch", q, (V - mean[..., None, :, :, :]).square()) + module.eps
    return score, mean, var, R


@each_backend
@pytest.mark.parametrize("n_inp", [7, -1])
@pytest.mark.parametrize("n_out", [5, -1])
@pytest.mark.parametrize(
    "options", [{}, {"p_model": "skm"}, {"n_iters": 1}, {"single_beta": True, "eps": 1e-2}], ids=str
)
def test_the_formulas(backend: str, n_inp: int, n_out: int, options: dict[str, Any]) -> None:
    """Outputs and every gradient, with R and without."""
    module, given = layer(n_inp, n_out, **options), [t.requires_grad_() for t in inputs(7, 2, 3)]
    more = {} if n_out != -1 else {"n_out": 5}
    with use_backend(backend):
        made, with_R = module(*given, **more), module(*given, return_R=True, **more)
    expected = formulas(module, *given, 5)
    leaves = [*given, *module.parameters()]
    for got in (made, with_R):
        for name, x, y in zip(("a", "mu", "sig2", "R"), got, expected, strict=False):
            assert_same(x.detach(), y.detach(), name)
        cotangents = [torch.randn(t.shape, generator=seeds.generator(k), dtype=F64)
                      for k, t in enumerate(expected[:3])]  # fmt: skip
        for x, y in zip(
            torch.autograd.grad(got[:3], leaves, cotangents, retain_graph=True, allow_unused=True),
            torch.autograd.grad(expected[:3], leaves, cotangents, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            assert x is not None and y is not None
            assert_same(x, y)
    assert len(made) == 3 and len(with_R) == 4
    assert_same(with_R[3].sum(-1).detach(), torch.ones(2, 3, 7, dtype=F64))


def test_as_many_outputs_as_inputs() -> None:
    module = layer()
    a, mu = inputs(6, 2)
    assert [list(t.shape) for t in module(a, mu)] == [[2, 6], [2, 6, C, H], [2, 6, C, H]]
    assert_same(module(a, mu)[1], module(a, mu, n_out=6)[1])
    assert [list(t.shape) for t in module(a[0], mu[0], n_out=1)] == [[1], [1, C, H], [1, C, H]]


def test_state_and_draws() -> None:
    """W alone is drawn; the keys are 2019's, in its order."""
    seeds.manual_seed(3)
    module = Routing(C, D, H)
    seeds.manual_seed(3)
    assert torch.equal(module.W, torch.empty(1, 1, D, H).normal_() / D)
    assert list(module.state_dict()) == ["W", "B", "B_brk", "beta_use", "beta_ign", "CONST_one"]
    assert list(Routing(C, D, H, 5, 4).state_dict()) == ["W", "B", "beta_use", "beta_ign", "CONST_one"]
    shapes = {k: list(t.shape) for k, t in module.state_dict().items()}
    assert shapes["B_brk"] == [1, C, H] and shapes["beta_use"] == [1, 1]
    one = Routing(C, D, H, 5, 4, single_beta=True)
    assert one.beta_ign is one.beta_use and "beta_ign" in one.state_dict()
    assert (module.n_iters, module.p_model, module.eps) == (3, "gaussian", 1e-5)
    assert not module.n_inp_is_fixed and not module.n_out_is_fixed and one.n_inp_is_fixed and one.n_out_is_fixed


@pytest.mark.parametrize("n_inp", [7, -1])
def test_checkpoints_load_in_the_layer_of_2022_and_back(n_inp: int) -> None:
    old = layer(n_inp, 5)
    new = GenerativeMatrixRouting(n_inp, 5, C, D, H, dtype=F64)
    new.load_state_dict(old.state_dict(), strict=True)
    again = Routing(C, D, H, n_inp, 5, dtype=F64)
    again.load_state_dict(new.state_dict(), strict=True)
    given = inputs(7, 2)
    for x, y, z in zip(old(*given), new(*given), again(*given), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_outputs_are_told_apart_by_what_breaks_their_symmetry() -> None:
    """B_brk starts at zero, so all outputs are one, and its gradient is not zero, so they do not stay so."""
    seeds.manual_seed(0)
    module = Routing(C, D, H, dtype=F64)
    _, mean, _ = module(*inputs(7, 2), n_out=4)
    assert_same(mean, mean[:, :1].expand_as(mean))
    (grad,) = torch.autograd.grad((mean * torch.randn(mean.shape, dtype=F64)).sum(), module.B_brk)
    assert grad.all()


def test_compiles_once_for_all_batch_sizes() -> None:
    """In one graph. (eps, a number of the module's, makes torch.compile start twice for the first one.)"""
    module = layer(-1, 5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for b in (6, 8, 9):
        for got, expected in zip(compiled(*inputs(7, b)), module(*inputs(7, b)), strict=True):
            assert torch.equal(got, expected)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d_cov": 0}, ValueError, "d_cov: expected at least 1, got 0"),
        ({"n_inp": 0}, ValueError, "n_inp: expected a positive number of capsules, or -1 for any number, got 0"),
        ({"n_out": -2}, ValueError, "n_out: expected a positive number of capsules, or -1"),
        ({"p_model": "em"}, ValueError, "p_model: expected one of gaussian, skm, got 'em'"),
        ({"eps": 0.0}, ValueError, r"eps: expected a positive number, got 0\.0"),
    ],
)
def test_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        Routing(**{"d_cov": C, "d_inp": D, "d_out": H, **arguments})


A7, MU7 = inputs(7, 2)


@pytest.mark.parametrize(
    ("module", "call", "options", "error", "message"),
    [
        (layer(6, 5), (A7, MU7), {}, ValueError, "n_inp: expected 6 input capsules, got 7"),
        (layer(), (A7[:, :0], MU7[:, :0]), {}, ValueError, "n_inp: expected at least 1 input capsules, got 0"),
        (layer(), (A7[:, :3], MU7), {}, ValueError, r"a_inp: expected shape \[2, 7\], got \[2, 3\]"),
        (layer(), (A7, MU7.mT), {}, ValueError, r"mu_inp: expected \[\.\.\., n_inp, 3, 4\], got \[2, 7, 4, 3\]"),
        (layer(), (A7, MU7.long()), {}, TypeError, "mu_inp: expected a floating-point tensor"),
        (layer(-1, 5), (A7, MU7), {"n_out": 5}, ValueError, "n_out: expected none, as the layer has 5 output"),
        (layer(), (A7, MU7), {"n_out": 0}, ValueError, "n_out: expected at least 1, got 0"),
    ],
)
def test_calls(module: Routing, call: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        module(*call, **options)
