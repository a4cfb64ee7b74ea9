"""Weightings against their formulas, written out in plain Python."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute.multitask import weighting as w
from tests.helpers import seeds

NAMES = ("a", "b", "c")
VALUES = (0.7, 2.5, 0.02)
MAKERS: dict[str, Callable[..., w.Weighting]] = {
    **w.WEIGHTINGS,
    "fixed": lambda tasks, **options: w.FixedWeights([0.5] * len(tasks), tasks, **options),
    "stch warm": lambda tasks, **options: w.STCH(tasks, warmup=2, **options),
}


def make(name: str, tasks: Sequence[str] = NAMES, **options: Any) -> w.Weighting:
    options = {"dtype": torch.float64, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that of 'auto', which has a test of its own
        return MAKERS[name](tasks, **options)


def losses(values: Sequence[float] = VALUES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(v, dtype=dtype, requires_grad=True) for v in values]


def close(got: Tensor, expected: float, rounding: float = 1e-12) -> None:
    assert got.shape == ()
    got = got.detach()
    assert abs(float(got) - expected) <= rounding * max(1.0, abs(expected)), (float(got), expected)


def a_softmax(z: Sequence[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


# ------------------------------------------------------------------------------------------------------------ formulas


def test_equal_and_fixed() -> None:
    close(w.EqualWeights(3)(losses()), sum(VALUES))
    close(w.FixedWeights({"b": 2, "a": 0.5, "c": 0}, NAMES, dtype=torch.float64)(losses()), 0.5 * 0.7 + 2 * 2.5)
    assert w.FixedWeights({"b": 2, "a": 0.5}).tasks == ("b", "a")


def test_learned_weights_warn_and_are_a_product() -> None:
    with pytest.warns(UserWarning, match="without bound"):
        auto = w.LearnedWeights(NAMES, [1.0, 0.5, 2.0], dtype=torch.float64)
    total = auto(losses())
    close(total, 0.7 + 1.25 + 0.04)
    total.backward()
    assert auto.weight.grad is not None
    assert torch.equal(auto.weight.grad, torch.tensor(VALUES, dtype=torch.float64))


def test_uncertainty() -> None:
    uw = w.Uncertainty(NAMES, dtype=torch.float64)
    s = [0.3, -1.0, 2.0]
    with torch.no_grad():
        uw.log_variance.copy_(torch.tensor(s))
    s = [float(v) for v in uw.log_variance]
    close(uw(losses()), sum(math.exp(-b) * L / 2 + b / 2 for b, L in zip(s, VALUES, strict=True)))
    with torch.no_grad():
        uw.log_variance.copy_(torch.tensor(VALUES).double().log())  # the optimum
    uw(losses()).backward()
    assert uw.log_variance.grad is not None
    assert uw.log_variance.grad.abs().max() < 1e-7


def test_imtl() -> None:
    imtl = w.IMTL(NAMES, 0.25, dtype=torch.float64)
    close(imtl(losses()), sum(math.exp(0.25) * L - 0.25 for L in VALUES))


def test_geometric_mean() -> None:
    given = losses()
    total = w.GeometricMean(3)(given)
    expected = math.prod(VALUES) ** (1 / 3)
    close(total, expected)
    total.backward()
    for t, v in zip(given, VALUES, strict=True):
        close(t.grad, expected / (3 * v))  # type: ignore[arg-type]
    many = losses([1e-30] * 200 + [1e30] * 200, torch.float32)
    assert abs(float(w.GeometricMean(400)(many)) - 1) < 1e-4  # neither overflows nor vanishes


@pytest.mark.parametrize("others", [1, 2, 99, 399])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("absent", [0, 1])
def test_geometric_mean_of_a_loss_that_is_zero(others: int, dtype: torch.dtype, absent: int) -> None:
    """It is 0 however many others there are, and these stop."""
    given = losses([0.0] + [2.0] * others, dtype)
    total = w.GeometricMean(1 + others + absent)(given + [None] * absent)
    assert float(total) == 0
    total.backward()
    assert all(t.grad is not None and float(t.grad) == 0 for t in given)
    seen = losses([0.5] + [2.0] * others)  # an absent task's loss stops nobody
    present = [True] * (1 + others) + [False] * absent
    beside = w.GeometricMean(1 + others + absent)(seen + losses([0.0] * absent), present=present)
    close(beside, 0.5 ** (1 / (1 + others)) * 2 ** (others / (1 + others)))


def test_rlw() -> None:
    rlw = w.RLW(NAMES, generator=seeds.generator(3))
    z = torch.randn(3, generator=seeds.generator(3), dtype=torch.float64)
    close(rlw(losses()), sum(a * L for a, L in zip(a_softmax([float(v) for v in z]), VALUES, strict=True)))
    close(rlw.eval()(losses()), sum(VALUES) / 3)
    assert float(w.RLW(NAMES)(losses())) != float(w.RLW(NAMES)(losses()))


@pytest.mark.parametrize("mu", [0.05, 1.0])
def test_stch(mu: float) -> None:
    lam, z = [0.2, 0.3, 0.5], [0.1, 0.0, -1.0]
    stch = w.STCH(NAMES, mu, lam, z, dtype=torch.float64)
    expected = mu * math.log(sum(math.exp(a * (L - b) / mu) for a, L, b in zip(lam, VALUES, z, strict=True)))
    close(stch(losses()), expected)
    close(w.STCH(NAMES, mu, dtype=torch.float64)(losses()), mu * math.log(sum(math.exp(L / 3 / mu) for L in VALUES)))


def test_stch_warms_up() -> None:
    stch = w.STCH(("a", "b"), 0.5, warmup=2, dtype=torch.float64)
    close(stch(losses([3.0, 5.0])), math.log(15))
    stch.step()
    close(stch(losses([1.0, 2.0])), math.log(2))
    close(stch(losses([3.0, 6.0])), math.log(18))
    stch.eval()(losses([100.0, 100.0]))  # not counted
    stch.train().step()  # nadir: means of the last epoch, 2 and 4
    for _ in range(2):
        f = [math.log(1 / 2), math.log(8 / 4)]
        close(stch(losses([1.0, 8.0])), 0.5 * math.log(sum(math.exp(v / 2 / 0.5) for v in f)))
        stch.step()


def test_dwa() -> None:
    dwa = w.DWA(("a", "b"), dtype=torch.float64)
    epochs = [[(4.0, 1.0), (2.0, 3.0)], [(2.0, 2.0), (1.0, 1.0)], [(1.0, 1.0)], [(0.5, 2.0)]]
    means: list[list[float]] = []
    for epoch in epochs:
        weights = [1.0, 1.0]
        if len(means) > 1:
            r = [means[-1][i] / means[-2][i] / 2 for i in range(2)]
            weights = [2 * v for v in a_softmax(r)]
        for batch in epoch:
            close(dwa(losses(batch)), sum(a * L for a, L in zip(weights, batch, strict=True)))
        dwa.eval()(losses([50.0, 50.0]))
        dwa.train().step()
        means.append([sum(batch[i] for batch in epoch) / len(epoch) for i in range(2)])


def test_dwa_of_a_task_that_comes_late() -> None:
    dwa = w.DWA(("a", "b"), dtype=torch.float64)
    for _ in range(3):
        dwa({"a": losses([2.0])[0]})
        dwa.step()
    assert dwa.weights.isfinite().all()
    close(dwa({"a": losses([2.0])[0], "b": losses([3.0])[0]}), 5.0)


def test_famo_follows_the_paper() -> None:
    """The authors' loop, with PyTorch's Adam and autograd for the Jacobian."""
    seeds.manual_seed(0)
    lowest = [0.01, 0.0, 0.005]
    famo = w.FAMO(NAMES, lowest, dtype=torch.float64)
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-3)
    low = torch.tensor(lowest, dtype=torch.float64)
    for _ in range(5):
        before, after = (torch.rand(3, dtype=torch.float64) + 0.1 for _ in range(2))
        z = xi.softmax(0)
        D = before - low + 1e-8
        expected = (D.log() * z / (z / D).sum()).sum()
        close(famo(list(before)), float(expected))
        famo.update(dict(zip(NAMES, after, strict=True)))
        delta = D.log() - (after - low + 1e-8).log()
        (xi.grad,) = torch.autograd.grad(xi.softmax(0), xi, delta)
        adam.step()
        assert torch.allclose(famo.logits, xi.detach(), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- what all have


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name: str) -> None:
    """With respect to the losses and to what the weighting learns."""
    weighting = make(name, dtype=torch.float64).eval()
    for p in weighting.parameters():
        nn.init.uniform_(p, 0.2, 1.0)
    if name == "famo":  # whose denominator has no gradient: see test_famo_follows_the_paper
        given = losses()
        weighting(given).backward()
        D = [v + 1e-8 for v in VALUES]
        c = sum(1 / 3 / d for d in D)
        for t, d in zip(given, D, strict=True):
            close(t.grad, 1 / 3 / d / c)  # type: ignore[arg-type]
        return
    learned = list(weighting.parameters())

    def call(*t: Tensor) -> Tensor:
        return torch.func.functional_call(
            weighting, dict(zip(dict(weighting.named_parameters()), t[3:], strict=True)), (list(t[:3]),)
        )

    assert torch.autograd.gradcheck(call, (*losses(), *learned))


@pytest.mark.parametrize("name", MAKERS)
def test_masking_equals_deleting(name: str) -> None:
    """A loss that is not there, told as None, left out of the dict or told by a tensor: no matter what it is."""
    if name == "rlw":
        seeds.manual_seed(0)
    kept = {"a": 0.7, "c": 0.02}

    def run(given: Any, present: Any, names: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        weighting = make(name, names).eval()
        total = weighting(given, present)
        total.backward()
        return total, [p.grad for p in weighting.parameters()]  # type: ignore[misc]

    forms: list[tuple[Any, Any]] = []
    for bad in (0.0, 3.0, math.nan, math.inf):
        forms.append((losses([0.7, bad, 0.02]), [True, torch.tensor(False), True]))
        forms.append((losses([0.7, bad, 0.02]), {"a": True, "b": False, "c": torch.tensor(True)}))
        forms.append((losses([0.7, bad, 0.02]), torch.tensor([True, False, True])))
        forms.append((losses([0.7, bad, 0.02]), [1, 0, True]))
        forms.append((losses([0.7, bad, 0.02]), [np.True_, np.False_, None]))
    forms.append(([losses()[0], None, losses()[2]], None))
    forms.append(({"c": losses()[2], "a": losses()[0]}, None))
    expected = run(
        {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in kept.items()}, None, ("a", "c")
    )
    for told, present in forms:
        total, grads = run(told, present, NAMES)
        if name not in ("stch", "stch warm"):  # whose weights are 1 / T
            close(total, float(expected[0]))
        assert total.isfinite()
        for grad in grads:
            assert grad[1] == 0
            assert grad.isfinite().all()
        if isinstance(told, list) and told[1] is not None:
            assert told[1].grad == 0
            assert told[0].grad.isfinite() and told[0].grad != 0


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_there(name: str) -> None:
    """No label in the whole batch: zero, and zero gradients."""
    weighting = make(name)
    given = losses([0.0, 0.0, 0.0])
    total = weighting(given, torch.zeros(3, dtype=torch.bool))
    total.backward()
    assert total == 0
    for t in (*given, *weighting.parameters()):
        assert t.grad is None or (t.grad == 0).all()
    weighting.update(given, torch.zeros(3, dtype=torch.bool))
    weighting.step()
    for t in weighting.state_dict().values():
        assert name == "dwa" or t.isfinite().all()
    assert weighting(losses()).isfinite()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(sorted(set(MAKERS) - {"rlw"})))
def test_the_order_of_a_dict_does_not_matter(order: list[int], name: str) -> None:
    names = [f"t{i}" for i in range(4)]
    values = [0.3, 1.0, 2.0, 0.1]
    straight = make(name, names)(dict(zip(names, losses(values), strict=True)))
    turned = make(name, names)({names[i]: losses(values)[i] for i in order})
    assert torch.equal(straight, turned)


@pytest.mark.parametrize("name", MAKERS)
def test_its_state_goes_through_a_checkpoint(name: str) -> None:
    first = make(name)
    for values in ((1.0, 2.0, 3.0), (0.5, 2.0, 2.0), (0.4, 1.0, 2.0)):
        first(losses(values))
        first.update(losses([v / 2 for v in values]))
        first.step()
    first(losses())
    second, third = make(name), copy.deepcopy(first)
    second.load_state_dict(first.state_dict())
    for one in (first, second, third):
        one.update(losses())
        one.step()
    if name == "rlw":
        return
    assert torch.equal(first(losses()), second(losses()))
    assert torch.equal(first(losses()), third(losses()))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_shapes(name: str, dtype: torch.dtype) -> None:
    given = [t.reshape(1) for t in losses(dtype=dtype)]
    total = make(name, dtype=torch.float32)(given)
    assert total.shape == () and total.dtype == torch.float32 and total.isfinite()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.long_after(3)
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    weighting = make(name, dtype=torch.float32)
    if name == "rlw":
        weighting.eval()  # compiled draws are others
    compiled = torch.compile(copy.deepcopy(weighting), fullgraph=True, backend="aot_eager")
    given = dict(zip(NAMES, losses(dtype=torch.float32), strict=True))
    here = {"a": torch.tensor(True), "b": torch.tensor(False), "c": torch.tensor(True)}
    for present in (None, here):
        got, expected = compiled(given, present), weighting(given, present)
        assert torch.allclose(got, expected, rtol=1e-6)
        got.backward()


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_learns(name: str) -> None:
    """The same loop for all; the losses of two tasks of very different scales fall."""
    seeds.manual_seed(0)
    x, target = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    model = nn.Linear(8, 2, dtype=torch.float64)
    weighting = make(name, ("small", "large"))
    optimizer = torch.optim.Adam([*model.parameters(), *weighting.parameters()], 0.02)

    def each() -> dict[str, Tensor]:
        y = model(x)
        return {"small": (y[:, 0] - target[:, 0]).square().mean(), "large": 100 * (y[:, 1] - target[:, 1]).abs().mean()}

    first = {k: float(v.detach()) for k, v in each().items()}
    for _ in range(4):
        for _ in range(15):
            optimizer.zero_grad()
            weighting(each()).backward()
            optimizer.step()
            weighting.update(each())
        weighting.step()
    last = each()
    assert all(float(last[k].detach()) < first[k] for k in first), (first, last)


# ------------------------------------------------------------------------------------------------------ losses of zero


def weight_of(weighting: w.Weighting, value: float) -> tuple[Tensor, Tensor]:
    """Its total, and what it multiplies the second task's loss by."""
    given = losses([1.0, value], torch.float32)
    total = weighting(given)
    (grad,) = torch.autograd.grad(total, given[1])
    return total, grad


@pytest.mark.parametrize("steps", [0, 200])
@pytest.mark.parametrize("name", ["uncertainty", "imtl"])
def test_a_loss_of_zero_leaves_its_weight(name: str, steps: int) -> None:
    """AutomaticWeightedLoss#2: s would move by lr at every step of Adam; from 88 / lr steps on all is NaN."""
    weighting = make(name, ("a", "b"), dtype=torch.float32)
    lr = 0.1
    adam = torch.optim.Adam(weighting.parameters(), lr)

    def train(value: float, steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            weighting(losses([1.0, value], torch.float32)).backward()
            adam.step()

    train(2.0, steps)
    _, before = weight_of(weighting, 2.0)
    train(0.0, 1000)
    for t in (*weighting.parameters(), weighting(losses([1.0, 0.0], torch.float32))):
        assert t.isfinite().all()
    total, after = weight_of(weighting, 2.0)
    assert total.isfinite()
    assert abs(float((after / before).log())) < 10 * lr  # what Adam's momentum may go on for
    train(2.0, 300)
    assert weight_of(weighting, 2.0)[1] == pytest.approx({"uncertainty": 0.25, "imtl": 0.5}[name], rel=0.05)


@pytest.mark.parametrize("value", [1e-44, 1e-30, 1e-17])
@pytest.mark.parametrize("name", ["uncertainty", "imtl"])
def test_a_loss_that_vanishes_keeps_s_finite(name: str, value: float) -> None:
    """Without being 0: the optimum of 1e-44 is where exp(-s) is no number in float32."""
    weighting = make(name, ("a", "b"), dtype=torch.float32)
    adam = torch.optim.Adam(weighting.parameters(), 0.5)
    found = []
    for b in (value, 1.0):  # and then it comes back
        for _ in range(300):
            adam.zero_grad()
            total = weighting(losses([1.0, b], torch.float32))
            total.backward()
            adam.step()
            assert total.isfinite() and all(s.isfinite().all() for s in weighting.parameters())
        (s,) = weighting.parameters()
        found.append(abs(float(s.detach()[1])))
    assert found[0] < 50 and found[1] <= found[0]


@pytest.mark.parametrize("name", MAKERS)
def test_every_loss_may_be_zero_for_epochs(name: str) -> None:
    weighting = make(name, dtype=torch.float32)
    adam = torch.optim.Adam([*weighting.parameters(), nn.Parameter(torch.zeros(1))], 0.1)
    for values in [(1.0, 2.0, 3.0)] * 2 + [(1.0, 0.0, 3.0)] * 3 + [(0.0, 0.0, 0.0)] * 3 + [(1.0, 0.5, 3.0)] * 3:
        for _ in range(20):
            given = losses(values, torch.float32)
            total = weighting(given)
            adam.zero_grad()
            total.backward()
            adam.step()
            weighting.update(losses(values, torch.float32))
            for t in (total, *(v.grad for v in given), *weighting.parameters(), *weighting.buffers()):
                assert t is not None and not t.isinf().any()
                assert not t.isnan().any() or t is getattr(weighting, "last", None)
        weighting.step()


def test_stch_takes_no_nadir_of_zero() -> None:
    stch = w.STCH(("a", "b"), warmup=1, dtype=torch.float64)
    stch(losses([4.0, 0.0]))
    stch.step()
    f = [math.log(2 / 4), math.log(3)]
    close(stch(losses([2.0, 3.0])), math.log(sum(math.exp(v / 2) for v in f)))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_names() -> None:
    assert w.as_weighting("dwa", ["x", "y"]).tasks == ("x", "y")
    assert isinstance(w.as_weighting([1, 2], 2), w.FixedWeights)
    given = w.EqualWeights(2)
    assert w.as_weighting(given, 5) is given
    with pytest.raises(ValueError, match="did you mean 'uncertainty'"):
        w.as_weighting("uncertanty", 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: w.EqualWeights([]), ValueError, "tasks: expected at least one"),
        (lambda: w.EqualWeights(0), ValueError, "tasks: expected at least one"),
        (lambda: w.EqualWeights("ab"), TypeError, "tasks: expected a list of names"),
        (lambda: w.EqualWeights(["a", "a"]), ValueError, "got 'a' twice"),
        (lambda: w.EqualWeights(["a", 3]), TypeError, "tasks: expected names, got 3"),
        (lambda: w.FixedWeights({"a": 1.0}, ["a", "b"]), ValueError, "expected a number for 'b'"),
        (lambda: w.FixedWeights({"aa": 1.0}, ["a", "b"]), ValueError, "did you mean 'a'"),
        (lambda: w.EqualWeights(NAMES)(losses()[:2]), ValueError, "one for each of the 3 tasks, got 2"),
        (lambda: w.EqualWeights(NAMES)({"d": losses()[0]}), ValueError, "there is no task 'd'"),
        (lambda: w.EqualWeights(NAMES)([None, None, None]), ValueError, "expected one at least"),
        (
            lambda: w.EqualWeights(NAMES)(losses(), ["x", 0, 1]),
            TypeError,
            r"present\['a'\]: expected True or False, got 'x'",
        ),
        (
            lambda: w.EqualWeights(NAMES)(losses(), [torch.ones(2), 0, 1]),
            ValueError,
            "present: expected a tensor of one element for 'a', got one of shape",
        ),
        (
            lambda: w.EqualWeights(NAMES)([*losses()[:2], torch.ones((), device="meta")]),
            ValueError,
            r"losses\['c'\]: expected a tensor on cpu like the others, got one on meta",
        ),
        (lambda: w.EqualWeights(1)([torch.ones(2)]), ValueError, r"one element for '0', got one of shape \[2\]"),
        (lambda: w.EqualWeights(1)([1.0]), ValueError, "got float"),
        (lambda: w.EqualWeights(2)(torch.ones(3)), ValueError, r"expected a tensor \[2\], got \[3\]"),
        (lambda: w.DWA(2, 0.0), ValueError, "temperature: expected more than 0"),
        (lambda: w.STCH(2, 0.0), ValueError, "mu: expected more than 0"),
        (lambda: w.STCH(2, warmup=-1), ValueError, "warmup: expected a number of epochs"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
