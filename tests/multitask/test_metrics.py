"""Metrics against scikit-learn, and the relative improvement against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute.multitask import F1, L1, Accuracy, TaskMetrics, relative_improvement
from tests.helpers import seeds

sk = pytest.importorskip("sklearn.metrics")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_classes_batch_by_batch(seed: int, C: int, batches: list[int]) -> None:
    generator = seeds.generator(seed)
    accuracy, f1 = Accuracy(), F1(C)
    guesses, labels = [], []
    for B in batches:
        scores = torch.randn(B, C, generator=generator)
        y = torch.randint(C, (B,), generator=generator)
        for metric in (accuracy, f1):
            metric.update(scores, y)
        guesses.append(scores.argmax(1))
        labels.append(y)
    p, t = torch.cat(guesses).numpy(), torch.cat(labels).numpy()
    assert float(accuracy.compute()) == pytest.approx(sk.accuracy_score(t, p), abs=1e-12)
    expected = sk.f1_score(t, p, average="macro", labels=list(range(C)), zero_division=0)
    assert float(f1.compute()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(20,), (20, 1), (20, 3)])
def test_logits(shape: tuple[int, ...]) -> None:
    seeds.manual_seed(0)
    logits, y = torch.randn(shape), torch.randint(2, shape).float()
    accuracy, f1 = Accuracy(), F1()
    accuracy.update(logits, y)
    f1.update(logits, y)
    p, t = (logits > 0).flatten().numpy(), y.flatten().numpy()
    assert float(accuracy.compute()) == pytest.approx(sk.accuracy_score(t, p))
    assert float(f1.compute()) == pytest.approx(sk.f1_score(t, p))


def test_missing_labels_are_left_out() -> None:
    scores, y = torch.randn(6, 3), torch.tensor([0, 1, 2, -100, 1, 0])
    mask = torch.tensor([True, True, True, True, False, True])
    for metric in (Accuracy(), F1(3)):
        metric.update(scores, y, mask)
        got = metric.compute()
        metric.reset()
        metric.update(scores[[0, 1, 2, 5]], y[[0, 1, 2, 5]])
        assert torch.equal(got, metric.compute())
    error = L1()
    error.update(torch.tensor([1.0, 2.0, 7.0, 0.0]), torch.tensor([2.0, math.nan, 4.0, 9.0]), torch.arange(4) < 3)
    assert float(error.compute()) == 2.0


@pytest.mark.parametrize("metric", [Accuracy(), F1(), L1()])
def test_before_the_first_label(metric: Any) -> None:
    assert metric.compute().isnan()
    metric.update(torch.randn(2, 1), torch.full((2, 1), math.nan))
    assert metric.compute().isnan()


def test_sums_stay_float64() -> None:
    """A mean of 2^25 small things: float32 would stop counting at 2^24."""
    error = L1().half()
    error.count += 2**24
    error.update(torch.ones(3).half(), torch.zeros(3).half())
    assert error.count == 2**24 + 3
    assert not error.state_dict()


def test_tasks() -> None:
    class Theirs:
        """In the way of torchmetrics."""

        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def update(self, y_hat: Tensor, y: Tensor) -> None:
            self.seen.append((y_hat - y).abs().mean())

        def compute(self) -> Tensor:
            return torch.stack(self.seen).mean()

        def reset(self) -> None:
            self.seen.clear()

    metrics = TaskMetrics({"a": Accuracy(), "b": L1(), "c": Theirs()})
    scores, values = torch.eye(3), torch.tensor([[1.0], [2.0], [3.0]])
    metrics.update([scores, values, values], [torch.tensor([0, 1, 1]), values + 1, values + 2])
    metrics.update({"b": values}, {"b": values + 4}, {"b": torch.tensor([[True], [False], [False]])})
    metrics.update({"a": scores, "b": values}, {"a": torch.tensor([0, 1, 2]), "b": None})
    got = {k: float(v) for k, v in metrics.compute().items()}
    assert got == {"a": pytest.approx(5 / 6), "b": pytest.approx((3 * 1 + 4) / 4), "c": 2.0}
    assert isinstance(metrics["b"], L1)
    metrics.reset()
    assert metrics["a"].compute().isnan()


def test_relative_improvement() -> None:
    assert relative_improvement({"a": 0.9, "b": 2.0}, {"a": 0.6, "b": 1.0}, {"a": True, "b": False}) == pytest.approx(
        (0.5 - 1.0) / 2
    )
    several = relative_improvement(  # as in the paper's NYUv2: a task with several counts once
        {"seg": [0.5, 0.75], "depth": torch.tensor(0.2)},
        {"seg": [0.4, 0.5], "depth": 0.4},
        {"seg": [True, True], "depth": False},
    )
    assert several == pytest.approx(((0.25 + 0.5) / 2 + 0.5) / 2)
    assert relative_improvement({"a": 3.0}, {"a": 3.0}) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TaskMetrics({}), ValueError, "metrics: expected one"),
        (lambda: TaskMetrics({"a": nn.Linear(1, 1)}), TypeError, r"metrics\['a'\]: expected a metric, got Linear"),
        (lambda: TaskMetrics({"abc": L1()})["abd"], ValueError, "did you mean 'abc'"),
        (lambda: Accuracy().update(torch.ones(4, 3), torch.ones(5)), ValueError, r"scores \[4, 3\], got \[5\]"),
        (lambda: L1().update(torch.ones(4, 3), torch.ones(4)), ValueError, r"expected the prediction's shape \[4, 3\]"),
        (lambda: L1().update(torch.ones(4), torch.ones(4), torch.ones(4)), TypeError, "mask: expected a bool tensor"),
        (lambda: relative_improvement({}, {}), ValueError, "baselines: expected one"),
        (lambda: relative_improvement({"a": 1.0}, {"a": 1.0, "b": 2.0}), ValueError, "metrics: expected one for 'b'"),
        (lambda: relative_improvement({"a": 1.0}, {"a": 0.0}), ValueError, "a number other than 0"),
        (lambda: relative_improvement({"a": [1.0, 2.0]}, {"a": 1.0}), ValueError, "expected 1 as in the baselines"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
