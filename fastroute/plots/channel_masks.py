"""Which channels tasks use, and how many they share."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..tasks import mask_overlap
from ..tasks.export import routers_of
from .figures import INK, MOST_ANNOTATED, Figure, empty_figure, saved, stride


def masks(
    model: nn.Module, *, measure: str = "jaccard", title: str | None = None, path: str | Path | None = None
) -> Figure:
    """What tasks use: a map per router, a row per task, a column per unit; and how much pairs of tasks share.

    Dark units are used. The last map is ``tasks.mask_overlap`` over all routers, with its numbers where there is room.

    Args:
        model: with TaskRouters, or one.
        measure: of ``mask_overlap``.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no routers, or they are for different numbers of tasks; another ``measure``.

    Examples:
        >>> net = fastroute.route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 4, 0.5)
        >>> figure = fastroute.plots.masks(net)
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['1: 8 units, 50% on', '4: 8 units, 50% on']
    """
    found = routers_of(model)
    overlap = mask_overlap(model, measure).overall
    T = len(overlap)
    height, side = (
        min(0.16 * max(T, 4), 4.0),
        (0.26 if T <= MOST_ANNOTATED // 2 else 0.16) * max(T, 6) if T <= 24 else 4.0,
    )
    rows = -(-len(found) // 2)
    figure = empty_figure(9.0 + side, max((height + 0.45) * rows, side + 0.8), title)
    grid = figure.add_gridspec(rows, 3, width_ratios=[4.5, 4.5, side + 0.6])
    for n, (name, router) in enumerate(found.items()):
        ax = figure.add_subplot(grid[n // 2, n % 2])
        kept = (router.get_unit_mapping().detach() != 0).float().cpu()
        ax.imshow(kept.numpy(), cmap="Greys", vmin=0, vmax=1.2, aspect="auto", interpolation="nearest")
        ax.set_title(
            f"{name}: {router.unit_count} units, {kept.mean():.0%} on", fontsize=8, color=INK, parse_math=False
        )
        ax.set_yticks(range(0, T, stride(T)) if n % 2 == 0 else [])
        ax.tick_params(labelsize=6, length=0)
        if n % 2 == 0:
            ax.set_ylabel("task", fontsize=7)
    ax = figure.add_subplot(grid[:, 2])
    drawn = ax.imshow(overlap.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if T <= MOST_ANNOTATED // 2:
        for a in range(T):
            for b in range(T):
                ink = "white" if overlap[a, b] > 0.55 else INK
                ax.text(b, a, f"{overlap[a, b]:.2f}", ha="center", va="center", fontsize=6, color=ink)
    ax.set_title("shared by two tasks", fontsize=8, color=INK)
    ax.set(xticks=range(0, T, stride(T)), yticks=range(0, T, stride(T)))
    ax.set_xlabel("task", fontsize=7)
    ax.tick_params(labelsize=6, length=0)
    figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
    return saved(figure, path)
