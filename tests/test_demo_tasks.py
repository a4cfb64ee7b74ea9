"""The demo of task routing learns, draws and says whether it learnt enough; its attributes are what they say."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import pytest
import torch

from fastroute import data, demos
from fastroute.cli import main
from tests.helpers import seeds
from tests.helpers.demos import run_demo
from tests.helpers.examples import few

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fastroute.demos import tasks  # noqa: E402
from fastroute.demos.attributes import BASE, DIGITS, attributes  # noqa: E402


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, float, str]:
    return run_demo(capsys, "tasks", *argv)


@pytest.mark.long
def test_it_learns_compares_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = attributes(data.digits(), 12)
    monkeypatch.setattr(tasks, "attributes", lambda digits: found)
    share = found.test_answers.mean(0)
    constant = float(torch.maximum(share, 1 - share).mean())  # what the better of always yes and always no gets
    bar = constant + 0.25 * (1 - constant)
    monkeypatch.setattr(tasks, "ACCURACY_BAR", bar)
    out = tmp_path / "picture.png"
    status, accuracy, said = run(capsys, "--epochs", "6", "--out", str(out))
    assert status == 0 and accuracy >= bar, said
    rows = re.findall(r"│ (.+?)\s+│\s+([0-9.]+) │\s+[0-9.]+ │\s+[0-9.]+ │\s+[0-9.]+ s │\s+([0-9,]+) │", said)
    assert [name for name, _, _ in rows] == list(tasks.NETWORKS)
    assert len({parameters for _, _, parameters in rows}) == 1
    assert matplotlib_image.imread(out).std() > 0.05


def test_it_fails_below_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demos, "digits", lambda options: few(100))
    status, accuracy, said = run(capsys, "--epochs", "1", "--out", str(tmp_path / "picture.png"))
    assert accuracy < 0.9 and status == 1
    assert f"failed: expected a held-out accuracy of at least 0.9, got {accuracy:.4f}" in said


def write_mnist(folder: Path, compressed: bool) -> None:
    """MNIST's four files, of digits of 28 by 28: scikit-learn's, larger and on a margin."""
    digits = data.digits()
    parts = {"train": (digits.train_images[:120], digits.train_labels[:120])}
    parts["t10k"] = digits.test_images[:40], digits.test_labels[:40]
    for name, (images, labels) in parts.items():
        wide = torch.nn.functional.pad(images.repeat_interleave(3, 1).repeat_interleave(3, 2), (2, 2, 2, 2))
        for kind, t in (("images-idx3", wide * 255), ("labels-idx1", labels)):
            whole = struct.pack(f">{1 + t.dim()}I", 0x0800 + t.dim(), *t.shape) + t.to(torch.uint8).numpy().tobytes()
            suffix = ".gz" if compressed else ""
            (folder / f"{name}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(whole) if compressed else whole)


@pytest.mark.long
def test_mnists_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are and compressed; the demo learns from either."""
    (plain := tmp_path / "plain").mkdir()
    for folder, compressed in ((plain, False), (tmp_path, True)):
        write_mnist(folder, compressed)
        loaded = data.mnist(folder)
        assert loaded.train_images.shape == (120, 28, 28) and loaded.test_images.shape == (40, 28, 28)
        found = attributes(loaded)
        for name, members in DIGITS.items():
            expected = [float(int(label) in members) for label in data.digits().test_labels[:40]]
            assert found.test_answers[:, found.names.index(name)].tolist() == expected
    monkeypatch.setattr(tasks, "NETWORKS", dict(list(tasks.NETWORKS.items())[:1]))
    picture = tmp_path / "picture.png"
    status, accuracy, said = run(capsys, "--data", str(tmp_path), "--epochs", "1", "--out", str(picture))
    assert "120 handwritten digits of 28 × 28 pixels to learn from, 40 held out" in said and picture.exists()
    assert status == (accuracy < tasks.ACCURACY_BAR)


def test_mnists_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["demo", "tasks", "--device", "cpu", "--data", str(tmp_path), "--epochs", "1"])
    said = capsys.readouterr()
    assert status != 0 and "train-images-idx3-ubyte" in said.out + said.err


def test_a_trained_network_is_compared_with_the_constant_answer() -> None:
    """Balanced accuracy is 1/2 for it, whatever the share of yes."""
    found = attributes(few(60), 5)

    class Always(torch.nn.Module):
        def forward(self, x: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
            return torch.where(task % 2 == 0, 1.0, -1.0)

    accuracy, _, balanced = tasks.test(Always(), found)
    share = found.test_answers.mean(0)
    torch.testing.assert_close(accuracy, torch.where(torch.arange(5) % 2 == 0, share, 1 - share))
    torch.testing.assert_close(balanced, torch.full((5,), 0.5))


def test_attributes_say_what_they_ask() -> None:
    digits = data.digits()
    found = attributes(digits)
    assert len(found.names) == BASE >= 40 and len(set(found.names)) == BASE
    for name, members in DIGITS.items():
        expected = [float(int(label) in members) for label in digits.test_labels]
        assert found.test_answers[:, found.names.index(name)].tolist() == expected
    medians = found.train_answers[:, len(DIGITS) :].mean(0)
    assert ((medians > 0.2) & (medians <= 0.5)).all()  # ties are not above it


def test_attributes_see_where_the_ink_is() -> None:
    images = torch.zeros(4, 8, 8)
    images[0, :2, :2], images[1, 6:, 6:], images[2, 3:5, 3:5], images[3, :, 4] = 1, 1, 1, 1
    labels = torch.arange(4)
    found = attributes(data.Digits(images, labels, images, labels))

    def answers(name: str) -> list[float]:
        return found.train_answers[:, found.names.index(name)].tolist()

    assert answers("ink at the top left") == [1, 0, 1, 0]  # shares 1, 0, 1/4, 0; the lower of two medians
    assert answers("ink on the left") == [1, 0, 1, 0]
    assert answers("much ink") == [0, 0, 0, 1]
    assert answers("tall") == [0, 0, 0, 1]


def test_random_attributes_are_seeded_and_come_after_the_named_ones() -> None:
    digits = few(200)
    a, b, c = attributes(digits, 70), attributes(digits, 70), attributes(digits, 70, seed=1)
    assert a.names == b.names and torch.equal(a.train_answers, b.train_answers)
    assert a.names[:BASE] == c.names[:BASE] and a.names[BASE:] != c.names[BASE:]
    share = a.train_answers[:, BASE:].mean(0)
    assert ((share >= 0.05) & (share <= 0.95)).all() and len(set(a.names)) == 70
    assert attributes(digits, 3).names == a.names[:3]
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        attributes(digits, 0)


@pytest.mark.parametrize("make", [tasks.Separate, tasks.AtOnce, lambda n: tasks.ManyTasks(n, 0.5)])
def test_a_mixed_batch_is_its_tasks_one_by_one(make) -> None:
    seeds.manual_seed(0)
    model = make(5).double().eval()
    x, task = torch.rand(7, 1, 8, 8, dtype=torch.float64), torch.tensor([4, 0, 2, 2, 0, 1, 4])
    one = torch.cat([model(x[i : i + 1], task[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(model(x, task), one)
    if isinstance(model, tasks.AtOnce):
        torch.testing.assert_close(model.all(x)[torch.arange(7), task], one)


def test_masked_and_live_channels_learn_the_same() -> None:
    found = attributes(few(64), 6)
    models = []
    for compute in ("masked", "live"):
        with torch.random.fork_rng(devices=[]):
            seeds.manual_seed(0)
            model = tasks.ManyTasks(6, 0.5, compute).double()
            x = found._replace(train_images=found.train_images.double(), train_answers=found.train_answers.double())
            x = x._replace(test_images=found.test_images.double())
            tasks.train("", model, x, 1, tasks.Console(quiet=True))
            models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
