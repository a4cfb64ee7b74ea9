"""A multi-task model as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..multitask import MTLModel
from .figures import INK, WRONG, Figure, empty_figure, saved

_COLUMN, _ROW = 1.5, 0.55  #: inches between nodes
MOST_BOXES = 24  #: nodes of a layer of a graph that have a name


def graph(model: MTLModel, *, title: str | None = None, path: str | Path | None = None) -> Figure:
    """A multi-task model's nodes from left to right, each to the right of all its anchors.

    Outputs are dark; below their names are their losses and weights, below others what they are. Nodes that no output
    depends on are grey. Where there are too many nodes for names, they are dots.

    Args:
        model: its nodes and outputs as they are now.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed. TypeError: something else than a model.

    Examples:
        >>> trunk = {"name": "trunk", "layers": nn.Linear(8, 8)}
        >>> price = {"name": "price", "layers": nn.Linear(8, 1), "anchor_layer": "trunk", "loss": nn.MSELoss()}
        >>> figure = fastroute.plots.graph(fastroute.MTLModel([trunk, price], ["price"]))
    """
    if not isinstance(model, MTLModel):
        raise TypeError(f"model: expected an MTLModel, got {type(model).__name__}")
    drawn = model.g
    columns, places = _layers(drawn)
    rows = max(map(len, columns))
    named = rows <= MOST_BOXES and len(columns) <= MOST_BOXES
    figure = empty_figure(min(_COLUMN * len(columns) + 0.4, 40.0), min(_ROW * rows + 0.4, 14.0), title)
    ax = figure.add_subplot()
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-rows / 2 - 0.1, rows / 2 + 0.1))
    ax.axis("off")
    unused, outputs = set(MTLModel.unused.__get__(model)), set(model.output_tasks)  # or compat's node
    boxes = {}
    for name, at in places.items():
        ink = INK if name not in unused else "#aaaaaa"
        if named:
            face, text = (INK, "white") if name in outputs else ("#e8eef5" if name == "root" else "white", ink)
            box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": ink, "linewidth": 0.8}
            said = _described(model, name)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": text, "bbox": box}
            label = ax.text(*at, said, zorder=2, parse_math=False, **style)
            boxes[name] = label.get_bbox_patch()
        else:
            ax.plot(*at, "o", markersize=2, color=WRONG if name in outputs else ink, zorder=2)
    heights = [[places[name][1] for name in column] for column in columns]
    for a, b in drawn.edges:
        arrow = {"arrowstyle": "-|>", "linewidth": 0.7 if named else 0.2, "shrinkA": 0, "shrinkB": 0}
        if places[b][0] - places[a][0] > 1:
            arrow["connectionstyle"] = f"arc3,rad={_bend(places[a], places[b], heights)}"
        arrow |= {"color": "#aaaaaa" if {a, b} & unused else "#555555", "mutation_scale": 8 if named else 2}
        if named:
            arrow |= {"patchA": boxes[a], "patchB": boxes[b]}
        ax.annotate("", xy=places[b], xytext=places[a], arrowprops=arrow, zorder=1)
    return saved(figure, path)


def _bend(a: tuple[float, float], b: tuple[float, float], heights: list[list[float]]) -> float:
    """The least curvature with which an arrow passes no box of the columns between."""
    columns = range(int(a[0]) + 1, int(b[0]))

    def room(rad: float) -> float:
        least = float("inf")
        for column in columns:
            t = (column - a[0]) / (b[0] - a[0])
            y = (1 - t) * a[1] + t * b[1] - 2 * t * (1 - t) * rad * (b[0] - a[0]) * _COLUMN / _ROW
            least = min([least, *(abs(y - height) for height in heights[column])])
        return least

    tried = [sign * rad / 100 for rad in range(5, 60, 5) for sign in (-1, 1)]
    return next((rad for rad in tried if room(rad) > 0.6), max(tried, key=room))


def _layers(graph: Any) -> tuple[list[list[str]], dict[str, tuple[float, float]]]:
    """Nodes by the length of their longest way from the root, each column in the order of its anchors' heights."""
    depth = {name: 0 for name in graph.nodes}
    missing = {name: len(list(graph.predecessors(name))) for name in graph.nodes}
    ready = [name for name, count in missing.items() if not count]
    for name in ready:
        for after in graph.successors(name):
            depth[after] = max(depth[after], depth[name] + 1)
            missing[after] -= 1
            if not missing[after]:
                ready.append(after)
    columns: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in graph.nodes:
        columns[depth[name]].append(name)
    places: dict[str, tuple[float, float]] = {}
    for x, column in enumerate(columns):
        heights = {name: [places[a][1] for a in graph.predecessors(name)] for name in column}
        column.sort(key=lambda name: -sum(heights[name]) / max(len(heights[name]), 1))
        for k, name in enumerate(column):
            places[name] = (float(x), (len(column) - 1) / 2 - k)
    return columns, places


def _described(model: MTLModel, name: str) -> str:
    """A node's name, and its loss and weight, or what it is."""
    if name == "root":
        return name
    loss = model.losses.get(name)
    if loss is None:
        layers = getattr(model, name)
        return f"{name}\n{getattr(layers, '__name__', type(layers).__name__)}"
    weight = model.loss_weights.get(name)
    shown = {float: f" x {weight}", int: f" x {weight}", type(None): ""}.get(type(weight), " x learned")
    return f"{name}\n{getattr(loss, '__name__', type(loss).__name__)}{shown}"
