"""The pictures: what they take, what they refuse, and that a file comes out."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastroute import plots

matplotlib_image = pytest.importorskip("matplotlib.image")

IMAGES, CREDIT = torch.rand(3, 8, 12), torch.randn(3, 8, 12)


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
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'fastroute\[plots\]'"):
        plots.credit(IMAGES, CREDIT)


def test_neither_the_import_nor_the_picture_needs_pyplot() -> None:
    code = (
        "import sys, torch; from fastroute import plots; assert 'matplotlib' not in sys.modules; "
        "plots.credit(torch.rand(1, 2, 2), torch.rand(1, 2, 2)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
