"""What all pictures share: an empty figure, inks, and the check of what is drawn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import files
from ..ops.checks import given

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure
else:
    Figure = Any  # for typing.get_type_hints: matplotlib is imported when it draws

INK, WRONG = "#1a1a1a", "#c1121f"
MOST_ANNOTATED = 16  #: rows or columns of cells that have a number in them
MOST_TICKS = 32  #: of an axis that have a label
#: Styles of lines and points. Neighbours differ in lightness, dashes and marker: they can be told apart in grey.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0b3c5d", "linestyle": "-", "marker": "o"},
    {"color": "#e69f00", "linestyle": "--", "marker": "s"},
    {"color": "#9b2226", "linestyle": ":", "marker": "^"},
    {"color": "#56b4e9", "linestyle": "-.", "marker": "D"},
    {"color": "#1a1a1a", "linestyle": (0, (5, 1)), "marker": "v"},
    {"color": "#8fbc5a", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#6a3d9a", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "X"},
    {"color": "#b0b0b0", "linestyle": "-", "marker": "*"},
)


def stride(count: int) -> int:
    """Every which tick has a label."""
    return -(-count // MOST_TICKS)


def empty_figure(width: float, height: float, title: str | None) -> Figure:
    """An empty one, with 0.3 inches more for a title."""
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a text or None, got {given(title)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastroute[plots]'") from error
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.0)
    figure = Figure(figsize=(width, height if title is None else height + 0.3), dpi=150, layout=layout)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to a file too where one is named."""
    if path is not None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path: expected a file's name or None, got {given(path)}")
        path = Path(path)
        if path.name and not path.suffix:  # as savefig does
            path = path.with_name(f"{path.name}.{figure.canvas.get_default_filetype()}")
        known = figure.canvas.get_supported_filetypes()
        if path.name and path.suffix[1:].lower() not in known:
            raise ValueError(f"path: expected a file's name that ends in one of {', '.join(known)}, got {path.name!r}")
        with files.whole(path) as part:
            figure.savefig(part, format=path.suffix[1:])
    return figure


def lined(ax: Any, **legend: Any) -> Any:
    """How axes of lines and points look; the legend, which is returned, stands outside, on the right."""
    ax.tick_params(labelsize=7, colors=INK, which="both")
    ax.grid(True, color="#e4e4e4", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False, **legend)


def places(steps: Sequence[float] | Tensor | None, count: int, what: str) -> Tensor:
    """What stands on the axis of steps: [count], by default 0 to count - 1."""
    at = torch.arange(count, device="cpu") if steps is None else numbers("steps", steps)
    if len(at) != count:
        raise ValueError(f"steps: expected {count} numbers, one per {what}, got {len(at)}")
    return at


def checked(name: str, t: Any, axes: str) -> Tensor:
    """As float32 on the CPU."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(t).__name__}")
    if t.dim() != 3 or 0 in t.shape:
        raise ValueError(f"{name}: expected {axes}, none of them 0, got {list(t.shape)}")
    if t.is_complex():
        raise TypeError(f"{name}: expected real values, got {t.dtype}")
    if t.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta")
    values: Tensor = t.detach().float().cpu()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got {bad} that are NaN or infinite")
    return values


def names_of(name: str, values: Sequence[object] | Tensor | None, count: int, what: str = "image") -> list[str]:
    if values is None:
        return []
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {count} of them, one per {what}, got {given(values)}")
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if not isinstance(listed, list) or len(listed) != count:
        raise ValueError(f"{name}: expected {count} of them, one per {what}, got {listed}")
    return [str(value) for value in listed]


def numbers(name: str, values: Any, dims: int = 1) -> Tensor:
    """As float32 on the CPU, of so many axes, none of them empty."""
    try:
        t = torch.as_tensor(values, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__} ({error})") from error
    if t.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {t.dtype}")
    if t.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on meta")
    if t.dim() != dims or 0 in t.shape:
        raise ValueError(f"{name}: expected {dims} ax{'i' if dims == 1 else 'e'}s, not empty, got {list(t.shape)}")
    return t.float().cpu()
