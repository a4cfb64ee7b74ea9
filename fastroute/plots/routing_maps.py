"""Which module was taken: by which task, at which step of training, and when by a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..networks import Summary, Trajectory
from .figures import INK, MOST_ANNOTATED, Figure, empty_figure, names_of, numbers, places, saved, stride


def _summary(name: str, given: Any) -> Summary:
    if not isinstance(given, (Trajectory, Summary)):
        raise TypeError(f"{name}: expected a Trajectory or its summary(), got {type(given).__name__}")
    return given.summary() if isinstance(given, Trajectory) else given


def routing(trajectory: Trajectory | Summary, *, title: str | None = None, path: str | Path | None = None) -> Figure:
    """Which task went through which module: a map per decision, a row per task, a column per module.

    A cell's shade is the share of its task's samples that took the module, so a row sums to one; the number in it is
    how many they were, where there is room. A task that a decision was not made for has an empty row, and without task
    labels there is one row for all samples.

    Args:
        trajectory: of a batch, or its ``summary()``.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(16, 8), tasks=torch.arange(16) % 4)
        >>> h, meta, actions = fastroute.REINFORCE(3, 8)(h, meta, agents)
        >>> figure = fastroute.plots.routing(meta)
        >>> figure.axes[0].images[0].get_array().shape  # tasks, modules
        (4, 3)
    """
    summary = _summary("trajectory", trajectory)
    if not summary.layers or not summary.samples:
        raise ValueError(
            f"trajectory: expected a decision and a sample at least, got {len(summary.layers)} decisions of "
            f"{summary.samples} samples"
        )
    shapes = [tuple(layer.counts.shape) for layer in summary.layers]
    A, modules = shapes[0][0], [K for _, K in shapes]
    widths = [min(0.34 * max(K, 4), 8.0) for K in modules]
    figure = empty_figure(sum(widths) + 0.35 * len(widths) + 1.4, min(0.3 * max(A, 2), 8.0) + 1.0, title)
    axes = figure.subplots(1, len(shapes), squeeze=False, width_ratios=widths)[0]
    drawn: Any = None
    for t, (ax, layer) in enumerate(zip(axes, summary.layers, strict=True)):
        counts, K = layer.counts, modules[t]
        share = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
        drawn = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if K <= MOST_ANNOTATED and A <= MOST_ANNOTATED:
            for a, k in counts.nonzero().tolist():
                ink = "white" if share[a, k] > 0.55 else INK
                ax.text(k, a, str(int(counts[a, k])), ha="center", va="center", fontsize=7, color=ink)
        ax.set_title(f"{t}: {layer.name}", fontsize=9, color=INK, parse_math=False)
        ax.set_xlabel("module", fontsize=8)
        ax.set_xticks(range(0, K, stride(K)))
        ax.set_yticks(range(0, A, stride(A)) if t == 0 else [])
        ax.tick_params(labelsize=7, length=0)
        for spine in ax.spines.values():
            spine.set(linewidth=0.6, color="#999999")
    names = ["all" if task is None else str(task) for task in summary.tasks]
    axes[0].set_yticklabels(names[:: stride(A)], parse_math=False)
    axes[0].set_ylabel("task", fontsize=8)
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.05, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the task's samples", fontsize=8)
    return saved(figure, path)


def routing_over_time(
    summaries: Sequence[Trajectory | Summary] | Tensor,
    *,
    steps: Sequence[float] | Tensor | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """How the use of modules changed in training: a map per decision, a row per module, a column per step.

    A cell's shade is the share of the batch's samples (of a mixture: of its entries) that took the module, so a column
    sums to one; shades end at the largest share. A row that turns dark while the others fade is a router that
    collapses.

    Args:
        summaries: of batches in the order of training, S of them: trajectories, their ``summary()``, or one tensor
            [S, K] of counts, such as ``aux.counts`` of ``MoE``.
        steps: [S], what stands on the axis below; by default 0 to S - 1.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> decide = fastroute.REINFORCE(3, 8)
        >>> seen = []
        >>> for step in range(4):
        ...     h, meta, agents = fastroute.Initialization()(torch.randn(16, 8))
        ...     h, meta, actions = decide(h, meta, agents)
        ...     seen.append(meta.summary())
        >>> figure = fastroute.plots.routing_over_time(seen, steps=[0, 10, 20, 30])
        >>> figure.axes[0].images[0].get_array().shape  # modules, steps
        (3, 4)
    """
    if isinstance(summaries, Tensor):
        counts, names = [numbers("summaries", summaries, 2)], ["modules"]
    else:
        read = [_summary(f"summaries[{s}]", item) for s, item in enumerate(summaries)]
        shapes = [[layer.counts.shape[1] for layer in summary.layers] for summary in read]
        if not read or not shapes[0] or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"summaries: expected one at least, all of the same decisions, got numbers of modules {shapes}"
            )
        names = [f"{t}: {layer.name}" for t, layer in enumerate(read[0].layers)]
        counts = [torch.stack([s.layers[t].counts.sum(0) for s in read]).float().cpu() for t in range(len(names))]
    S = len(counts[0])
    at = places(steps, S, "summary")

    heights = [min(0.22 * max(t.shape[1], 3), 4.0) for t in counts]
    figure = empty_figure(6.4, sum(heights) + 0.5 * len(heights) + 0.4, title)
    axes = figure.subplots(len(counts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    drawn: Any = None
    shares = [count / count.sum(1, keepdim=True).clamp(min=1) for count in counts]
    most = max(float(share.max()) for share in shares) or 1.0
    for ax, count, share, name in zip(axes, counts, shares, names, strict=True):
        drawn = ax.imshow(share.T.numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=9, color=INK, loc="left", parse_math=False)
        ax.set_ylabel("module", fontsize=8)
        ax.set_yticks(range(0, count.shape[1], stride(count.shape[1])))
        ax.tick_params(labelsize=7, length=0)
    every = -(-S // 8)
    axes[-1].set_xticks(range(0, S, every), [f"{float(x):g}" for x in at[::every]])
    axes[-1].set_xlabel("step", fontsize=8)
    bar = figure.colorbar(drawn, ax=list(axes), fraction=0.04, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of samples", fontsize=8)
    return saved(figure, path)


def actions(
    trajectory: Trajectory | Tensor,
    *,
    labels: Sequence[object] | Tensor | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Which module when: a row per sample, a column per decision, the module's number and shade in the cell.

    For networks that decide often: recurrent cells, one router for many steps. A decision that was not made for a
    sample is white.

    Args:
        trajectory: of a batch, or its ``actions`` [T, B], negative where there is none.
        labels: B names for the rows; by default the trajectory's tasks, or else the samples' numbers. Rows are sorted
            by them.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> figure = fastroute.plots.actions(torch.tensor([[0, 1, 2], [2, 2, -1]]), labels=["a", "b", "a"])
        >>> figure.axes[0].images[0].get_array().shape  # samples, decisions
        (3, 2)
    """
    if isinstance(trajectory, Trajectory):
        found, tasks = trajectory.actions, trajectory.tasks
        labels = tasks if labels is None else labels
    elif isinstance(trajectory, Tensor):
        found = trajectory
    else:
        raise TypeError(f"trajectory: expected a Trajectory or its actions [T, B], got {type(trajectory).__name__}")
    if found.dim() != 2 or 0 in found.shape or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"trajectory: expected actions [T, B], integers, neither of them 0, got {list(found.shape)} {found.dtype}"
        )
    cells = found.detach().cpu().long().T
    B, T = cells.shape
    rows = names_of("labels", labels, B, "sample") or [str(b) for b in range(B)]
    order = sorted(range(B), key=lambda b: (rows[b], b)) if labels is not None else list(range(B))
    cells, rows = cells[order], [rows[b] for b in order]
    K = max(int(cells.max()) + 1, 1)

    figure = empty_figure(min(0.32 * max(T, 6), 9.0) + 1.8, min(0.17 * max(B, 6), 8.0) + 0.7, title)
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = ListedColormap(colormaps["viridis_r"](torch.linspace(0.05, 0.95, K, device="cpu").numpy()))
    ax = figure.subplots()
    shown = np.ma.masked_less(cells.numpy(), 0)
    norm = BoundaryNorm([k - 0.5 for k in range(K + 1)], K) if K > 1 else None
    drawn = ax.imshow(shown, cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    if B <= 2 * MOST_ANNOTATED and T <= 2 * MOST_ANNOTATED:
        for b in range(B):
            for t in range(T):
                if (k := int(cells[b, t])) >= 0:
                    ink = "white" if k >= 0.4 * K else INK
                    ax.text(t, b, str(k), ha="center", va="center", fontsize=6, color=ink)
    ax.set_xticks(range(0, T, stride(T)))
    first = [b for b in range(B) if b == 0 or rows[b] != rows[b - 1]]  # one name for all rows of a task
    named = first if labels is not None and len(first) < B else list(range(B))
    named = named[:: stride(len(named))]
    ax.set_yticks(named, [rows[b] for b in named], parse_math=False)
    for b in first[1:] if labels is not None else ():
        ax.axhline(b - 0.5, color="white", linewidth=1.5)
    ax.set_xlabel("decision", fontsize=8)
    ax.set_ylabel("sample", fontsize=8)
    ax.tick_params(labelsize=7, length=0)
    ticks = range(0, K, stride(K))
    bar = figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.01, aspect=30, ticks=list(ticks))
    bar.ax.tick_params(labelsize=7, length=0)
    bar.set_label("module", fontsize=8)
    return saved(figure, path)
