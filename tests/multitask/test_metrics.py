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

from fastroute.multitask import F1, L1, Accuracy, TaskMetrics, relative_improvement, task_losses
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


@pytest.mark.parametrize("shape", [(20,), (20, 1), (20, 3)])
def test_probabilities_of_two_classes(shape: tuple[int, ...]) -> None:
    """Of a head that ends in Sigmoid, as BCELoss wants one."""
    seeds.manual_seed(0)
    p, y = torch.rand(shape), torch.randint(2, shape).float()
    accuracy, f1 = Accuracy(threshold=0.5), F1(threshold=0.5)
    accuracy.update(p, y)
    f1.update(p, y)
    guess, t = (p > 0.5).flatten().numpy(), y.flatten().numpy()
    assert float(accuracy.compute()) == pytest.approx(sk.accuracy_score(t, guess))
    assert float(f1.compute()) == pytest.approx(sk.f1_score(t, guess))
    logits = Accuracy(threshold=0)
    logits.update(p - 0.5, y)
    assert torch.equal(logits.compute(), accuracy.compute())


@pytest.mark.parametrize("trailing", [(), (4,)])
def test_labels_that_are_probabilities(trailing: tuple[int, ...]) -> None:
    seeds.manual_seed(0)
    scores, y = torch.randn(30, 5, *trailing), torch.randn(30, 5, *trailing).softmax(1)
    hard = torch.nn.functional.one_hot(y.argmax(1), 5).movedim(-1, 1)
    p, t = scores.argmax(1).flatten().numpy(), y.argmax(1).flatten().numpy()
    right, macro = sk.accuracy_score(t, p), sk.f1_score(t, p, average="macro")
    for metric, labels, expected in (
        (Accuracy(), y, right), (Accuracy(), y.bfloat16(), right), (Accuracy(), y.argmax(1), right),
        (Accuracy(classes=5), y, right), (Accuracy(classes=5), hard, right), (Accuracy(classes=5), hard.float(), right),
        (F1(5), y, macro), (F1(5), hard.float(), macro), (F1(5), y.argmax(1), macro),
    ):  # fmt: skip
        metric.update(scores, labels)
        assert float(metric.compute()) == pytest.approx(expected)
    hidden = y.clone()
    hidden[::3, 1] = math.nan  # of such a row, all is missing
    for metric in (Accuracy(), F1(5)):
        metric.update(scores, hidden)
        got = metric.compute()
        metric.reset()
        metric.update(scores, y, torch.arange(30) % 3 != 0)
        assert torch.equal(got, metric.compute())


def test_labels_between_0_and_1_of_several_questions() -> None:
    """Smoothed ones, whose rows do not sum to 1, and those that margin losses have."""
    seeds.manual_seed(0)
    logits, y = torch.randn(20, 3), torch.randint(2, (20, 3)).float()
    expected = sk.accuracy_score(y.flatten().numpy(), (logits > 0).flatten().numpy())
    for labels in (y, 0.05 + 0.9 * y, 2 * y - 1):
        accuracy = Accuracy()
        accuracy.update(logits, labels)
        assert float(accuracy.compute()) == pytest.approx(expected)
    pairs = torch.tensor([[0.2, 0.8], [0.9, 0.1]])  # they may as well be two questions
    told = Accuracy(threshold=0)
    told.update(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), pairs)
    assert float(told.compute()) == 0.5
    told = Accuracy()
    told.update(torch.tensor([[0.5, 1.0], [0.5, 1.0]]), pairs)
    assert float(told.compute()) == 0.5 and told.count == 2


def test_a_score_of_nan_predicts_nothing() -> None:
    nan = math.nan
    scores, y = torch.tensor([[nan, 0.0], [nan, 9.0], [0.0, nan], [0.0, 1.0]]), torch.tensor([0, 1, 0, 1])
    for metric, expected in ((Accuracy(), 1 / 4), (F1(2), (0 + 2 / 3) / 2)):
        metric.update(scores, y)
        assert float(metric.compute()) == pytest.approx(expected)
    for metric, expected in ((Accuracy(), 1 / 4), (F1(), 2 / 3)):
        metric.update(torch.tensor([nan, nan, nan, 1.0]), y)
        assert float(metric.compute()) == pytest.approx(expected)
        metric.reset()
        metric.update(torch.tensor([nan, nan, nan, 1.0]), y, torch.tensor([False, False, False, True]))
        assert float(metric.compute()) == 1


MASKABLE = [
    (Accuracy(), (10, 3), (10, 3)), (Accuracy(), (10, 1), (10,)), (Accuracy(), (10, 4), (10,)),
    (Accuracy(), (10, 4), (10, 1)), (Accuracy(), (10, 4, 2), (10, 2)), (F1(), (10, 3), (10, 3)),
    (F1(4), (10, 4, 2), (10, 2)), (L1(), (10, 3), (10, 3)), (L1(), (10, 1), (10,)), (L1(), (10,), (10, 1)),
    (L1(), (10, 2, 1), (10, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "x", "y"), MASKABLE)
def test_masking_equals_deleting(metric: Any, x: tuple[int, ...], y: tuple[int, ...]) -> None:
    """A mask of the labels' shape, of the predictions' where that is the same but for axes of one, or [B]."""
    seeds.manual_seed(0)
    scores, labels = torch.randn(x), torch.randint(2, y).float()
    rows = torch.arange(10) % 3 > 0

    def of(*given: Tensor) -> Tensor:
        metric.reset()
        metric.update(*given)
        return metric.compute()

    expected = of(scores[rows], labels[rows])
    each = rows.reshape(-1, *[1] * (len(y) - 1)).expand(y)
    masks = [rows, each]
    if math.prod(x) == math.prod(y):
        masks.append(each.reshape(x))
    for mask in masks:
        assert torch.equal(of(scores, labels, mask), expected)
    assert torch.equal(of(scores, labels.masked_fill(~each, math.nan)), expected)


PAIRS = [
    ((10, 1), (10,)),
    ((10,), (10, 1)),
    ((10, 3), (10, 3)),
    ((10, 2, 1), (10, 2)),
    ((10, 3), (10,)),
    ((10, 4), (3, 4)),
]


@pytest.mark.parametrize(("x", "y"), PAIRS)
@pytest.mark.parametrize("mask", [None, (10,), (10, 1), (10, 3), (3,)])
def test_a_loss_and_its_metric_read_alike(x: tuple[int, ...], y: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    """The same numbers, or an error for both."""
    seeds.manual_seed(0)
    given = (torch.randn(x), torch.randn(y), None if mask is None else torch.rand(mask) < 0.7)

    def loss() -> Tensor:
        masks = None if given[2] is None else {"t": given[2]}
        return task_losses({"t": given[0]}, {"t": given[1]}, {"t": nn.L1Loss()}, masks)[0]["t"]

    def metric() -> Tensor:
        error = L1()
        error.update(*given)
        return error.compute().float()

    def outcome(run: Callable[[], Tensor]) -> Tensor | str:
        try:
            return run()
        except ValueError as error:
            return str(error).split(":")[1]

    got, expected = outcome(metric), outcome(loss)
    if isinstance(expected, str):
        assert got == expected
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("y", "mask", "fits"),
    [
        ((4, 2, 3), (4, 2, 3), True),
        ((4, 2, 3), (4,), True),
        ((4, 2, 3), (4, 1, 3), True),
        ((4, 1, 2, 3), (4, 2, 3), True),
        ((3, 3), (3,), True),  # samples, not columns
        ((4, 2, 3), (4, 3, 2), False),  # as many elements, in another order
        ((4, 4, 3), (4, 1), False),
        ((4, 3), (3,), False),
        ((4, 3), (), False),
    ],
    ids=str,
)
def test_which_masks_fit(y: tuple[int, ...], mask: tuple[int, ...], fits: bool) -> None:
    """Of the labels' shape but for axes of one element, or [B]; nothing else is broadcast or reshaped."""
    guess, label = torch.zeros(y), torch.randn(y, generator=seeds.generator(0))
    there = torch.rand(mask, generator=seeds.generator(1)) < 0.6
    error = L1()

    def loss() -> Tensor:
        return task_losses({"t": guess}, {"t": label}, {"t": nn.L1Loss()}, {"t": there})[0]["t"]

    if not fits:
        for run in (loss, lambda: error.update(guess, label, there)):
            with pytest.raises(ValueError, match=r"mask.*: expected the target's shape .*, or \[B\], got"):
                run()
        return
    whole = there.reshape(y) if there.numel() == label.numel() else there
    whole = whole.reshape(-1, *[1] * (label.dim() - 1)) if mask == (y[0],) else whole
    expected = label[whole.expand(y)].abs().mean()
    error.update(guess, label, there)
    torch.testing.assert_close(error.compute().float(), expected)
    torch.testing.assert_close(loss(), expected)


def test_sums_stay_float64() -> None:
    """A mean of 2^25 small things: float32 would stop counting at 2^24."""
    error = L1().half()
    error.count += 2**24
    error.update(torch.ones(3).half(), torch.zeros(3).half())
    assert error.count == 2**24 + 3
    assert not error.state_dict()


@pytest.mark.parametrize("metric", [Accuracy(), F1(3), L1()])
def test_reset_parameters_sets_all_sums(metric: Any) -> None:
    """Of memory that ``to_empty`` left as it was."""
    metric.to("meta").to_empty(device="cpu")
    for t in metric.buffers():
        t.fill_(7)
    metric.reset_parameters()
    assert all((t == 0).all() for t in metric.buffers())


@pytest.mark.parametrize("wrong", [1.9, -0.5, torch.inf])
def test_a_label_is_no_class_only_where_it_is_there(wrong: float) -> None:
    """The loss and the metric refuse the same labels, and read none that is masked or NaN."""
    scores, y, mask = torch.eye(3), torch.tensor([0.0, wrong, torch.nan]), torch.tensor([True, False, True])
    loss: dict[str, Any] = {"a": nn.CrossEntropyLoss()}
    accuracy = Accuracy()
    accuracy.update(scores, y, mask)
    found, _ = task_losses({"a": scores}, {"a": y}, loss, {"a": mask})
    assert accuracy.compute() == 1 and found["a"] == loss["a"](scores[:1], torch.tensor([0]))
    for call in (lambda: accuracy.update(scores, y), lambda: task_losses({"a": scores}, {"a": y}, loss)):
        with pytest.raises(ValueError, match=r"expected class indices, which are whole numbers, got"):
            call()


@pytest.mark.parametrize("y", [[1.0, -1.0, -1.0], [0.9, 0.1, 0.0]])
def test_labels_of_two_classes_may_be_soft_or_of_a_soft_margin(y: list[float]) -> None:
    accuracy = Accuracy()
    accuracy.update(torch.tensor([2.0, -2.0, 2.0]), torch.tensor(y))
    assert accuracy.compute() == pytest.approx(2 / 3)


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
        (lambda: Accuracy(threshold="0.5"), TypeError, "threshold: expected a number, got '0.5'"),
        (lambda: F1(threshold=True), TypeError, "threshold: expected a number, got True"),
        (lambda: F1(3).update(torch.ones(4, 2), torch.ones(4)), ValueError, r"y_hat: expected scores \[B, 3, ...\]"),
        (lambda: F1().update(torch.ones(4, 3), torch.ones(4)), ValueError, r"expected 3, .* \[4, 3\], got None"),
        (
            lambda: L1().update(torch.ones(4, 3), torch.ones(3, 4)),
            ValueError,
            r"expected the prediction's shape \[4, 3",
        ),
        (lambda: L1().update(torch.ones(4), torch.ones(4), torch.ones(5) > 0), ValueError, r"the target's shape \[4\]"),
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
        (lambda: relative_improvement({"a": 1.0}, {"a": 1.0}, {"a": "up"}), ValueError, r"better\['a'\]: .* got 'up'"),  # type: ignore[dict-item]
        (lambda: TaskMetrics({"a": Accuracy}), TypeError, r"metrics\['a'\]: expected a metric, got the class Accuracy"),
        (
            lambda: Accuracy().update(torch.ones(3), torch.tensor([1, 0, 9])),
            ValueError,
            "expected labels 0 or 1, got 9",
        ),
        (
            lambda: F1().update(torch.ones(3), torch.tensor([1.0, 0, 1.5])),
            ValueError,
            "expected labels 0 or 1, got 1.5",
        ),
        (lambda: Accuracy().update(torch.eye(3), torch.tensor([0, 1, 7])), ValueError, "classes below 3, got 7"),
        (lambda: F1(3).update(torch.eye(3), torch.tensor([0, -1, 1])), ValueError, "expected classes below 3, got -1"),
        (lambda: F1(3).update(torch.eye(3), torch.tensor([0, 1.5, 2])), ValueError, "whole numbers, got 1.5"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
