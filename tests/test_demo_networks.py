"""The demo of routing networks learns, draws and says whether it learnt enough. Short: a few epochs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastroute import data, demos, explain
from fastroute.cli import main
from tests.helpers import seeds
from tests.helpers.demos import run_demo

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fastroute.demos import networks  # noqa: E402


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, float, str]:
    return run_demo(capsys, "networks", *argv)


def test_it_learns_compares_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "ACCURACY_BAR", 0.8)
    out = tmp_path / "picture.png"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    status, accuracy, said = run(capsys, "--epochs", "5", "--out", str(out))
    assert status == 0 and accuracy >= 0.8, said
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)

    rows = re.findall(r"│ (.+?)\s+│\s+([0-9.]+) │\s+[0-9.]+ ms │\s+(\d+|fixed) │\s+[0-9,]+ │", said)
    assert [name for name, _, _ in rows] == list(networks.NETWORKS)
    assert min(float(right) for _, right, _ in rows) >= 0.8
    assert [routes for _, _, routes in rows[2:]] == ["fixed", "fixed"]
    assert "355 samples, 5 tasks," in said and "decision 2 (WPL): " in said

    picture = matplotlib_image.imread(out)
    height, width = picture.shape[:2]
    assert width > 800 and 200 < height < width and picture.std() > 0.05


@pytest.mark.gpu
def test_it_learns_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "networks", "--device", "cuda", "--epochs", "5", "--out", str(tmp_path / "picture.png")])
    said = capsys.readouterr().out
    assert "on cuda, backend" in said
    assert float(said.split("held-out accuracy: ")[1].split()[0]) >= 0.8


def test_it_fails_below_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = data.digits()
    few = data.Digits(*(t[:200] for t in found))
    monkeypatch.setattr(demos, "digits", lambda options: few)
    status, accuracy, said = run(capsys, "--epochs", "1", "--out", str(tmp_path / "picture.png"))
    assert accuracy < 0.95 and status == 1
    assert f"failed: expected a held-out accuracy of at least 0.95, got {accuracy:.4f}" in said


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_seed_gives_the_same_network_whatever_came_before(name: str) -> None:
    few = data.Digits(*(t[:128] for t in data.digits()))

    def trained(look: bool) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            seeds.manual_seed(3)
            model = networks.NETWORKS[name](64)
            if look:  # which computes nothing, and must not be noted as if it had
                explain(model, few.train_images, few.train_labels // 2)
            networks.train(name, model, few, 1, networks.Console(quiet=True))
            logits: torch.Tensor = model(few.test_images, few.test_labels // 2)[0]
            return logits

    assert torch.equal(trained(False), trained(True))


def test_every_sample_of_a_task_goes_to_the_module_of_its_task() -> None:
    model = networks.NETWORKS["a module per task"](64)
    images, tasks = torch.rand(6, 8, 8), torch.tensor([0, 4, 2, 2, 1, 3])
    logits, _ = model(images, tasks)
    for image, task, expected in zip(images, tasks, logits, strict=True):
        x = image.flatten()
        for selection in model.selections:
            x = selection._submodules[task](x)
        torch.testing.assert_close(x, expected)
