"""``fastroute train``: the papers' networks learn, their routers' log becomes a page, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastroute.cli import main
from fastroute.demos import MODELS, published


def test_every_model_has_a_recipe() -> None:
    assert published.RECIPES.keys() == MODELS.keys()


@pytest.mark.long
def test_it_learns_logs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe of one seed, in half of its epochs."""
    assert main(["train", "routed-cnn", "--seeds", "1", "--epochs", "10", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "routed-cnn, seed 0, epoch 10 of 10" in said and (tmp_path / "curves.png").stat().st_size > 5_000
    run = tmp_path / "routed-cnn" / "seed-0"
    lines = [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]
    read = [line for line in lines if "accuracy" in str(line)]
    assert len(read) == 10
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<svg" in page and "accuracy" in page


def test_a_network_that_learns_too_little_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "routed-cnn", "--epochs", "1", "--seeds", "2", "--quiet", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert (
        "failed: routed-cnn: expected a mean of at least 0.9, got" in said
        and "2 seeds" in said
        and "epoch 1" not in said
    )


def test_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "routed-cnn", "--data", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "no: expected a folder with MNIST's IDX files" in capsys.readouterr().err
