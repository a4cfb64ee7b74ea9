"""The capsules' examples run, on little data, and write what they say they write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.examples import cells, example, leave_no_trace

__all__ = ["leave_no_trace"]  # a fixture of every test here


@pytest.fixture
def page(tmp_path: Path) -> Path:
    parts = ("autoencoder", "recurrent", "million", "iterations")
    path = tmp_path / "page.md"
    path.write_text("before\n" + "".join(f"<!-- begin {p} -->\nold\n<!-- end {p} -->\n" for p in parts) + "after\n")
    return path


def test_sequence_autoencoder(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "made.png"
    autoencoder = example("sequence_autoencoder")
    assert autoencoder.main(["--quick", "--out", str(page), "--picture", str(picture)]) == 0
    text = page.read_text()
    assert text.count("old") == 3 and text.endswith("after\n")
    head, ours, *linear = cells(text)
    lost = head.index("variance lost, held-out")
    assert ours[1] == linear[0][1] == "8" and 0 < float(ours[lost]) < float("inf")
    assert [float(row[lost]) for row in linear] == sorted((float(row[lost]) for row in linear), reverse=True)
    assert matplotlib_image.imread(picture).std() > 0.05


def test_the_autoencoders_bottleneck_and_its_yardstick() -> None:
    """Nothing goes around the code, and the linear code is the best there is."""
    autoencoder = example("sequence_autoencoder")
    model = autoencoder.Bowtie(8, 8)
    images = torch.rand(5, 8, 8)
    code = model.code(images)
    assert code.shape == (5, autoencoder.CODE, autoencoder.CODE_WIDTH)
    model.code = lambda _: code[:1].expand(5, -1, -1)
    made = model(images)
    assert made.shape == images.shape and torch.allclose(made[0], made[4])
    train, test = torch.randn(30, 2, 3) + 1, torch.randn(7, 2, 3)
    assert torch.allclose(autoencoder.principal(train, test, 6), test, atol=1e-5)
    error = (autoencoder.principal(train, train, 2) - train).square().sum()
    spectrum = torch.linalg.svdvals(train.flatten(1) - train.flatten(1).mean(0)).square()
    assert torch.allclose(error, spectrum[2:].sum())


def test_recurrent_residual(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "steps.png"
    recurrent = example("recurrent_residual")
    assert recurrent.main(["--quick", "--out", str(page), "--picture", str(picture)]) == 0
    head, *rows = cells(page.read_text())
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[2:-1])
    assert rows[0][1] == rows[1][1] != rows[2][1], "the residual has no parameters, more routings have"
    assert matplotlib_image.imread(picture).std() > 0.05


def test_a_recurrent_step_is_the_same_routing_again() -> None:
    recurrent = example("recurrent_residual")
    model = recurrent.Recurrent(8, 8)
    images = torch.rand(3, 8, 8)
    assert model(images).shape == (recurrent.STEPS, 3, recurrent.CLASSES)
    assert len(model.routings) == 1
    with torch.no_grad():
        for p in model.routings[0].parameters():
            p.zero_()
    logits = model(images)
    assert torch.equal(logits[0], logits[-1]), "a routing that adds nothing changes nothing"


def test_routing_iterations(page: Path, tmp_path: Path) -> None:
    """R is even at first, and what the layer itself has at the end."""
    pytest.importorskip("sklearn")
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "iterations.png"
    iterations = example("routing_iterations")
    assert iterations.main(["--quick", "--out", str(page), "--picture", str(picture)]) == 0
    _, first, *_, last = cells(page.read_text())
    assert first[1:] == ["1.000", "0.100", "0.100"] and float(last[1]) < 1
    assert matplotlib_image.imread(picture).std() > 0.05
    model = iterations.OneRouting(8, 8)
    images = torch.rand(2, 8, 8)
    found = model.iterations(images)
    assert len(found) == iterations.ITERATIONS == model.route.n_iters and not model.route.return_dict
    model.route.return_dict = True
    assert torch.equal(found[-1]["phi"], model.route(model.vectors(images))["phi"].detach())


def test_million_vectors(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    million = example("million_vectors")
    argv = ["--rows", "3000", "--width", "32", "--outputs", "5", "--chunk", "700", "--folder", str(tmp_path)]
    for more, passes in (([], "2"), (["--gradients"], "4")):
        assert million.main([*argv, *more, "--out", str(page)]) == 0
        head, row = cells(page.read_text())
        assert len(head) == len(row) and row[0] == "3,000 x 32 to 5 x 32" and row[head.index("passes")] == passes
    assert not list(tmp_path.glob("million-vectors-*")), "the file is deleted"


def test_its_file_is_what_is_routed(tmp_path: Path) -> None:
    million = example("million_vectors")
    million.make_file(tmp_path / "x", 100, 6, lambda rows: None)
    vectors = np.fromfile(tmp_path / "x", np.float32).reshape(100, 6)
    assert abs(vectors.mean()) < 0.2 and abs(vectors.std() - 1) < 0.1
    floor = million.Floor(100, 6, 5, True)
    floor.sample()
    assert all(seconds > 0 for seconds in floor.of(1000))


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("sequence_autoencoder", ["--epochs", "0"], "--epochs, --threads: expected at least 1"),
        ("routing_iterations", ["--epochs", "0"], "--epochs, --threads: expected at least 1"),
        ("recurrent_residual", ["--threads", "0"], "--epochs, --threads: expected at least 1"),
        ("million_vectors", ["--rows", "0"], "--rows, --width, --chunk, --threads: expected at least 1"),
        ("million_vectors", ["--folder", "/nowhere"], "--folder: expected a folder, found none at /nowhere"),
        ("million_vectors", ["--rows", "1000000000000"], "--folder: expected 4505600.0 GB free"),
    ],
)
def test_misuse(name: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(argv)
    assert message in " ".join(capsys.readouterr().err.split())
