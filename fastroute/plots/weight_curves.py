"""The weights of tasks' losses over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .figures import LINES, Figure, empty_figure, lined, numbers, places, saved

_DECADES = 30  #: weights that differ by more have a logarithmic axis


def weights(
    history: Tensor | Mapping[str, Sequence[float] | Tensor],
    *,
    tasks: Sequence[str] | None = None,
    steps: Sequence[float] | Tensor | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """How a weighting divided the loss among tasks: a line per task, over steps or epochs.

    Lines differ in colour, in dashes and in lightness, so that they can be told apart in grey. Positive weights that
    differ by a factor of more than 30 have a logarithmic axis.

    Args:
        history: [S, T], a row per step; or by task a sequence of S numbers. What a weighting multiplies losses by
            (``DWA.weights``, ``exp(-Uncertainty.log_variance) / 2``), or the losses themselves.
        tasks: T names, in the order of the columns of a tensor.
        steps: [S], what stands on the axis below; by default 0 to S - 1.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> weighting = fastroute.DWA(["price", "kind"])
        >>> history = []
        >>> for epoch in range(4):
        ...     total = weighting(torch.tensor([4.0 / (epoch + 1), 1.0]))
        ...     weighting.step()
        ...     history.append(weighting.weights.clone())
        >>> figure = fastroute.plots.weights(torch.stack(history), tasks=weighting.tasks)
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['price', 'kind']
    """
    if isinstance(history, Mapping):
        if tasks is not None:
            raise ValueError("tasks: expected None beside a history by task, which has the names")
        tasks, columns = list(history), [numbers(f"history[{t!r}]", values) for t, values in history.items()]
        lengths = [len(column) for column in columns]
        if not columns or len(set(lengths)) > 1:
            raise ValueError(f"history: expected a task at least, and equally many numbers of all, got {lengths}")
        values = torch.stack(columns, 1)
    else:
        values = numbers("history", history, 2)
    S, T = values.shape
    shown = [str(t) for t in (range(T) if tasks is None else tasks)]
    if len(shown) != T:
        raise ValueError(f"tasks: expected {T} names, one per column of history, got {len(shown)}")
    x = places(steps, S, "row of history")

    figure = empty_figure(6.4, 3.2, title)
    ax = figure.subplots()
    marks: dict[str, Any] = {"markersize": 3.5, "markevery": max(1, S // 12)}
    for t in range(T):
        ax.plot(x.numpy(), values[:, t].numpy(), label=str(t), linewidth=1.4, **LINES[t % len(LINES)], **marks)
    if float(values.min()) > 0 and float(values.max()) > _DECADES * float(values.min()):
        ax.set_yscale("log")
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel("weight", fontsize=8)
    for line, text, task in zip(ax.lines, lined(ax, ncols=-(-T // 16)).get_texts(), shown, strict=True):
        line.set_label(task)  # after the legend is made, which leaves out labels that begin with _
        text.set(text=task, parse_math=False)
    return saved(figure, path)
