"""The pictures: what they take, what they refuse, and that a file comes out."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastroute
from fastroute import plots
from tests.helpers import seeds
from tests.helpers.extras import without
from tests.helpers.subprocesses import check_python

matplotlib_image = pytest.importorskip("matplotlib.image")
Text = pytest.importorskip("matplotlib.text").Text

IMAGES, CREDIT = (draw(3, 8, 12, generator=seeds.generator(0)) for draw in (torch.rand, torch.randn))


def test_a_row_of_images_over_a_row_of_maps(tmp_path: Path) -> None:
    path = tmp_path / "credit.png"
    figure = plots.credit(IMAGES, CREDIT, labels=[1, 2, 3], predictions=torch.tensor([1, 7, 3]), title="why", path=path)
    above, below = figure.axes[:3], figure.axes[3:6]
    assert [ax.get_title() for ax in above] == ["true 1\npred. 1", "true 2\npred. 7", "true 3\npred. 3"]
    assert above[0].title.get_color() == above[2].title.get_color() != above[1].title.get_color()
    assert figure.get_suptitle() == "why"
    for ax, expected in zip(below, CREDIT, strict=True):
        assert torch.equal(torch.from_numpy(ax.images[0].get_array().data), expected)
        low, high = ax.images[0].get_clim()
        assert low == -high < 0, "colours are centred on 0"
    drawn = matplotlib_image.imread(path)
    width, height = (figure.get_size_inches() * figure.dpi).round().astype(int)
    assert drawn.shape == (height, width, 4) and drawn.std() > 0.05


def test_cost_is_marked_without_its_colour() -> None:
    """In grey red and blue look alike."""
    maps = torch.tensor([[[1.0, -1.0], [-0.01, 0.5]]])
    below = plots.credit(torch.rand(1, 2, 4), maps).axes[1]
    assert below.collections[0].get_offsets().tolist() == [[3.0, 0.5]], "the middle of the cell of notable cost"
    tokens = plots.credit(["a", "bc", "d"], torch.tensor([1.0, -1.0, -0.01])).axes[0]
    assert len(tokens.lines) == 1 and tokens.lines[0].get_xdata()[0] < 3 < tokens.lines[0].get_xdata()[1]


def routed(tasks: list[str]) -> fastroute.Trajectory:
    net = fastroute.Sequential(fastroute.WPL(2, 3), fastroute.Selection(nn.Linear(3, 3), nn.Linear(3, 3)))
    trajectory: fastroute.Trajectory = net(torch.randn(len(tasks), 3), tasks=tasks)[1]
    return trajectory


@pytest.mark.parametrize("name", ["$a_$", "_a", "a $1 and $2", "\\$"])
def test_names_are_shown_as_they_are(name: str) -> None:
    """No formula, which fails or loses its dollars, and no label that a legend leaves out."""
    node = {"name": name, "layers": nn.Linear(3, 3)}
    drawn = {
        "labels": plots.credit(IMAGES[:1], CREDIT[:1], labels=[name]),
        "predictions": plots.credit([["b"]], [torch.ones(1)], predictions=[name]),
        "tokens": plots.credit([[name]], [torch.ones(1)]),
        "tasks of weights": plots.weights(torch.rand(3, 2), tasks=[name, "b"]),
        "keys of weights": plots.weights({name: torch.rand(3), "b": torch.rand(3)}),
        "labels of actions": plots.actions(torch.tensor([[0, 1], [1, 0]]), labels=[name, "b"]),
        "tasks of actions": plots.routing(routed([name, "b"])),
        "nodes": plots.graph(fastroute.MTLModel([node, {**node, "name": "b", "anchor_layer": name}], ["b"])),
    }
    for what, figure in drawn.items():
        figure.savefig(io.BytesIO(), format="svg")
        shown = [text for text in figure.findobj(Text) if name in text.get_text()]
        assert shown and not any(text.get_parse_math() for text in shown), what


@pytest.mark.parametrize("name", ["credit.svg", "credit.pdf"])
def test_the_suffix_is_the_format(tmp_path: Path, name: str) -> None:
    plots.credit(IMAGES, CREDIT, path=tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_patches_cover_their_image() -> None:
    figure = plots.credit(IMAGES, CREDIT[:, :2, :3])
    assert [list(figure.axes[i].images[0].get_extent()) for i in (0, 3)] == [[0, 12, 8, 0]] * 2


@pytest.mark.parametrize(
    ("images", "credit"),
    [
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)),
        (torch.rand(2, 1, 4), torch.rand(2, 1, 4)),
        (torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True), torch.rand(2, 1, 1).bfloat16()),
        (torch.randint(0, 256, (2, 4, 4), dtype=torch.uint8), torch.randn(2, 4, 4)),
    ],
)
def test_odd_but_fine(images: torch.Tensor, credit: torch.Tensor, tmp_path: Path) -> None:
    plots.credit(images, credit, path=tmp_path / "credit.png")


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "images type": (TypeError, {"images": [[1]]}, r"images: expected a tensor \[K, H, W\], got list"),
    "images rank": (ValueError, {"images": IMAGES[0]}, r"images: expected \[K, H, W\], none of them 0, got \[8, 12\]"),
    "no images": (ValueError, {"images": IMAGES[:0]}, r"images: expected .*, got \[0, 8, 12\]"),
    "complex": (TypeError, {"images": IMAGES + 1j}, "images: expected real values, got torch.complex64"),
    "NaN": (ValueError, {"credit": CREDIT / 0 * 0}, "credit: expected finite values, got 288 that are NaN"),
    "credit rank": (ValueError, {"credit": CREDIT.flatten(1)}, r"credit: expected \[K, h, w\], .* got \[3, 96\]"),
    "count": (ValueError, {"credit": CREDIT[:2]}, r"credit: expected 3 maps, one per image, got 2"),
    "sides": (ValueError, {"credit": CREDIT[:, :3]}, "credit: expected maps .* divide the images' 8 x 12, got 3 x 12"),
    "labels": (ValueError, {"labels": [1, 2]}, r"labels: expected 3 of them, one per image, got \[1, 2\]"),
    "predictions": (ValueError, {"predictions": torch.tensor(1)}, "predictions: expected 3 of them"),
}


@pytest.mark.parametrize(("error", "kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_input(error: type[Exception], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.credit(**{"images": IMAGES, "credit": CREDIT, **kwargs})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    without("matplotlib", monkeypatch)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'fastroute\[plots\]'"):
        plots.credit(IMAGES, CREDIT)


@pytest.mark.long
def test_neither_the_import_nor_any_picture_needs_pyplot() -> None:
    code = """
import sys, torch
from fastroute import MTLModel, plots
from fastroute.networks import REINFORCE, Initialization
assert "matplotlib" not in sys.modules
plots.credit(torch.rand(1, 2, 2), torch.rand(1, 2, 2))
assert "matplotlib.pyplot" not in sys.modules
x, meta, _ = Initialization()(torch.zeros(2, 2))
REINFORCE(3, 2)(x, meta)
plots.routing(meta)
assert "matplotlib.pyplot" not in sys.modules
plots.graph(MTLModel([{"name": "a", "layers": torch.nn.ReLU()}], "a"))
assert "matplotlib.pyplot" not in sys.modules
"""
    check_python(code)


# ------------------------------------------------------------------------------------------------------- credit of text

WORDS = ["the", "film", "is", "not", "good\n", "but", "long"]


def test_tokens_on_grounds_of_their_colours(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    credit = [torch.randn(7), torch.randn(3)]
    figure = plots.credit([WORDS, WORDS[:3]], credit, labels=[0, 1], predictions=[0, 0], title="why", path=path)
    ax = figure.axes[0]
    written = [text.get_text() for text in ax.texts]
    assert written[:7] == ["the", "film", "is", "not", "good\u23ce", "but", "long"] and written[7:10] == WORDS[:3]
    headings = ax.texts[10:]
    assert [text.get_text() for text in headings] == ["true 0, pred. 0", "true 1, pred. 0"]
    assert headings[0].get_color() != headings[1].get_color() and figure.get_suptitle() == "why"
    for patch, value in zip(ax.patches, torch.cat(credit).tolist(), strict=True):
        red, _, blue, _ = patch.get_facecolor()
        assert (red > blue) == (value > 0), "red is benefit"
    assert path.stat().st_size > 1000


def test_long_text_is_broken_into_lines_that_do_not_overlap() -> None:
    figure = plots.credit(["word" * (k % 5 + 1) for k in range(200)], torch.randn(200))
    boxes: dict[float, list[tuple[float, float]]] = {}
    for patch in figure.axes[0].patches:
        boxes.setdefault(patch.get_y(), []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    assert len(boxes) > 10
    low, high = sorted(figure.axes[0].get_xlim())
    for line in boxes.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(line))
        assert low <= line[0][0] and line[-1][1] <= high


BAD_TEXT: dict[str, tuple[type[Exception], Any, Any, dict[str, Any], str]] = {
    "count": (ValueError, [WORDS], [torch.zeros(7)] * 2, {}, "credit: expected a tensor for each of 1 texts, got 2"),
    "length": (ValueError, WORDS, torch.zeros(5), {}, r"credit\[0\]: expected 7 numbers, one for each token, got 5"),
    "rank": (
        ValueError,
        [WORDS],
        [torch.zeros(7, 2)],
        {},
        r"credit\[0\]: expected \[T\], none of them 0, got \[7, 2\]",
    ),
    "type": (TypeError, [WORDS], [[0.0] * 7], {}, r"credit\[0\]: expected a tensor \[T\], got list"),
    "NaN": (ValueError, WORDS, torch.full((7,), torch.nan), {}, r"credit\[0\]: expected finite values, got 7"),
    "labels": (ValueError, WORDS, torch.zeros(7), {"labels": [1, 2]}, "labels: expected 1 of them, one per text"),
}


@pytest.mark.parametrize(("error", "tokens", "credit", "kwargs", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_text(error: type[Exception], tokens: Any, credit: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        plots.credit(tokens, credit, **kwargs)
