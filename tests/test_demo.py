"""The demo learns, times, draws and says whether it learnt enough. Short: a few epochs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastroute import credit_assignment, data
from fastroute.cli import main
from fastroute.ops.backends import missing
from tests.helpers import seeds
from tests.helpers.demos import run_demo

matplotlib_image = pytest.importorskip("matplotlib.image")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fastroute.demos import capsules  # noqa: E402


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capsules, "TIMING_SECONDS", 1e-3)
    monkeypatch.setattr(capsules, "TIMING_ROUNDS", 1)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, float, str]:
    return run_demo(capsys, None, *argv)


def test_it_learns_times_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capsules, "ACCURACY_BAR", 0.8)  # ten times chance
    out = tmp_path / "picture.png"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    status, accuracy, said = run(capsys, "--epochs", "6", "--out", str(out))
    assert status == 0 and accuracy >= 0.8, said
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)

    timed = re.findall(r"(reference|native)\s+│\s+[0-9.]+ ms │\s+([0-9.]+)× │\s+[0-9.]+ ms", said)
    assert [name for name, _ in timed] == ["reference"] + ["native"] * (missing("native", "cpu") is None)
    assert timed[0][1] == "1.00"
    if not torch.cuda.is_available():
        assert "not timed: triton:" in said

    picture = matplotlib_image.imread(out)
    height, width = picture.shape[:2]
    assert width > 1500 and 300 < height < width / 2 and picture.std() > 0.05


@pytest.mark.gpu
def test_it_learns_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--device", "cuda", "--epochs", "6", "--out", str(tmp_path / "picture.png")])
    said = capsys.readouterr().out
    assert "backend triton" in said
    timed = re.findall(r"(reference|native|triton)\s+│\s+[0-9.]+ ms", said)
    assert timed == ["reference", "triton", "reference"] + ["native"] * (missing("native", "cpu") is None)
    assert float(said.split("held-out accuracy: ")[1].split()[0]) >= 0.8


def test_it_fails_below_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, accuracy, said = run(capsys, "--epochs", "1", "--out", str(tmp_path / "picture.png"))
    assert accuracy < 0.95 and status == 1
    assert f"failed: expected a held-out accuracy of at least 0.95, got {accuracy:.4f}" in said


def test_a_seed_gives_the_same_model_whatever_came_before() -> None:
    def trained() -> torch.Tensor:
        found = data.Digits(*(t[:64] for t in data.digits()))
        with torch.random.fork_rng(devices=[]):
            seeds.manual_seed(3)
            model = capsules.DigitRouter(8, 8, cell=1)
            capsules.train(model, found, 1, capsules.Console(quiet=True))
            logits: torch.Tensor = model(found.test_images)
            return logits

    assert torch.equal(trained(), trained())


@pytest.mark.parametrize(("side", "cell"), [(8, 1), (12, 4)])
def test_credit_is_that_of_both_routings(side: int, cell: int) -> None:
    model = capsules.DigitRouter(side, side, cell=cell, d=8, hidden=5, d_hidden=4)
    images = torch.rand(3, side, side)
    logits = model(images)
    credit = model.credit(images)
    assert credit.shape == (3, side // cell, side // cell, 10) and logits.shape == (3, 10)

    phis = []
    for routing in (model.to_hidden, model.to_classes):
        routing.register_forward_hook(lambda module, args, out: (phis.append(out["phi"]), out["x_out"])[1])
        routing.return_dict = True
    torch.testing.assert_close(model(images), logits)
    torch.testing.assert_close(credit, credit_assignment(phis).reshape(credit.shape))


def test_blank_paper_has_no_vote() -> None:
    model = capsules.DigitRouter(8, 8, cell=1)
    assert not model.capsules(torch.zeros(1, 8, 8)).any()


def test_sides_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="images: expected sides that 4 divides, got 30 x 28"):
        capsules.DigitRouter(30, 28, cell=4)
