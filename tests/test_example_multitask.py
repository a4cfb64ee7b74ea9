"""The examples of multi-task models run, on little data, and write what they say they write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.examples import cells, example, leave_no_trace, little_data

pytest.importorskip("sklearn")
pytest.importorskip("rich")

__all__ = ["leave_no_trace", "little_data"]  # fixtures of every test here


def test_multitask_digits(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    page, picture = tmp_path / "page.md", tmp_path / "digits.png"
    page.write_text("before\n<!-- begin digits -->\nold\n<!-- end digits -->\nafter\n")
    digits = example("multitask_digits")
    argv = ["--epochs", "1", "--seeds", "2", "--images", "80", "--out", str(page), "--picture", str(picture)]
    assert digits.main(argv) == 0
    text = page.read_text()
    assert "old" not in text and text.endswith("<!-- end digits -->\nafter\n")
    head, *rows = cells(text)
    assert head == ["network", *digits.HEAD] and [row[0] for row in rows] == list(digits.NETWORKS)
    assert rows[0][3] == "–" and all(re.fullmatch(r"[+-]\d+\.\d\d ± \d+\.\d\d", row[3]) for row in rows[1:])
    assert "8 tasks, 80 images to learn from and 100 held out, 1 epochs, 2 seed(s)" in text
    assert matplotlib_image.imread(picture).std() > 0.05


def test_some_networks_on_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--epochs", "1", "--seeds", "1", "--networks", "MMoE", "--images", "64"]
    assert example("multitask_digits").main(argv) == 0
    _, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["single-task networks", "MMoE"] and "±" not in rows[1][1]


def test_the_readme_learns_and_is_the_same_from_compat(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's model and loop; every loss falls, and so does the unbounded weight."""
    said = []
    for options in ([], ["--compat"]):
        assert example("torchmtl_readme").main(["--epochs", "3", *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    numbers = [[float(n) for n in re.findall(r"\d\.\d+", line)] for line in said[0].splitlines()[:3]]
    assert len(numbers) == 3 and all(a > b for a, b in zip(numbers[0], numbers[2], strict=True))


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("multitask_digits", ["--epochs", "0"], "--images, --epochs, --seeds, --threads: expected at least 1"),
        ("multitask_digits", ["--images", "0"], "--images, --epochs, --seeds, --threads: expected at least 1"),
        ("multitask_digits", ["--networks", "MTAN"], "invalid choice: 'MTAN'"),
        ("torchmtl_readme", ["--epochs", "0"], "--epochs: expected at least 1"),
    ],
)
def test_misuse(name: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(argv)
    assert message in capsys.readouterr().err
