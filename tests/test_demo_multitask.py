"""The demo of multi-task models learns, compares, draws its graph and says whether it learnt enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastroute import data, demos
from tests.helpers import seeds
from tests.helpers.demos import run_demo
from tests.helpers.examples import few

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fastroute.demos import multitask  # noqa: E402
from fastroute.demos.multitask import NAMES, NETWORKS, Objective, Result, T, Tasks, model_of, tasks_of  # noqa: E402


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, float, str]:
    return run_demo(capsys, "multitask", *argv)


@pytest.mark.long
def test_it_learns_compares_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = data.digits()
    some = data.Digits(*(t[:500] for t in digits[:2]), *digits[2:])
    monkeypatch.setattr(demos, "digits", lambda options: some)
    found = tasks_of(some)
    constant = sum(float(t.bincount().max()) / len(t) for t in found.test_labels) / T  # always the commonest answer
    bar = constant + 0.25 * (1 - constant)
    monkeypatch.setattr(multitask, "ACCURACY_BAR", bar)
    out = tmp_path / "picture.png"
    status, accuracy, said = run(capsys, "--epochs", "6", "--out", str(out))
    assert status == 0 and accuracy >= bar, said
    rows = re.findall(r"│ (.+?)\s+│\s+([0-9.]+) │\s+[0-9.]+ │\s+([-+0-9.]+)% │\s+[0-9.]+ ms │\s+[0-9,]+ │", said)
    assert [name for name, _, _ in rows] == list(NETWORKS) and rows[0][2] == "+0.00"
    assert re.search(r"for odd +SimpleSelect +<- experts\n", said) and re.search(r"wide +Linear +<- for wide\n", said)
    assert matplotlib_image.imread(out).std() > 0.02


def test_it_fails_below_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demos, "digits", lambda options: few(100))
    monkeypatch.setattr(multitask, "NETWORKS", {k: NETWORKS[k] for k in ("single-task networks", "shared trunk")})
    status, accuracy, said = run(capsys, "--epochs", "1", "--out", str(tmp_path / "picture.png"))
    assert accuracy < 0.85 and status == 1
    assert f"failed: expected a held-out accuracy of at least 0.85, got {accuracy:.4f}" in said


def test_tasks_say_what_they_ask() -> None:
    found = tasks_of(data.digits(), 50)
    digit, odd, high, loop = found.labels[:4]
    assert found.images.shape == (50, 64) and len(found.labels) == T == len(found.test_labels)
    assert torch.equal(odd, digit % 2) and torch.equal(high, (digit >= 5).long())
    assert torch.equal(loop, torch.isin(digit, torch.tensor([0, 6, 8, 9])).long())
    assert all(len(t) == 355 for t in found.test_labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_all_tasks_and_trains_all_its_parameters(name: str) -> None:
    seeds.manual_seed(0)
    model, found = model_of(name, 64), tasks_of(few(40))
    outputs, losses, _ = model(found.images)
    assert [y.shape for y in outputs[:T]] == [(40, n) for n in multitask.TASKS.values()]
    assert all(loss is not None for loss in losses[:T])
    Objective()(model, found.images, found.labels).backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert not [key for key in unused if "_submodules" not in key]  # a module that no sample took


@pytest.mark.parametrize("name", ["task routing", "routing network"])
def test_tasks_go_through_a_routed_network_one_beside_the_other(name: str) -> None:
    """A sample's outputs do not depend on who else is in the batch, nor a task's on the other tasks."""
    seeds.manual_seed(0)
    model, found = model_of(name, 64).double().eval(), tasks_of(few(12))
    x = found.images.double()
    together, alone = model(x)[0][:T], model(x[3:4])[0][:T]
    for y, own in zip(together, alone, strict=True):
        torch.testing.assert_close(y[3:4], own)


def test_relative_improvement() -> None:
    baseline, better = Result((0.5, 0.8), 1.0, 1), Result((0.6, 0.72), 1.0, 1)
    assert multitask.improvement(better, baseline) == pytest.approx((0.2 - 0.1) / 2)
    assert multitask.improvement(baseline, baseline) == 0
    assert better.accuracy == pytest.approx(0.66)


def test_a_seed_learns_the_same_twice() -> None:
    found = tasks_of(few(60))
    assert isinstance(found, Tasks) and NAMES[0] == "digit"
    made = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            seeds.manual_seed(3)
            made.append(multitask.train("", model_of("CGC", 64), found, 2, multitask.Console(quiet=True)).accuracies)
    assert made[0] == made[1]
