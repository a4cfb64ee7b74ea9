"""Pictures of what a router does. Drawn without pyplot, so they need no display and change no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .multitask import MTLModel
from .networks import Summary, Trajectory
from .tasks import mask_overlap
from .tasks.export import routers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RIGHT, _WRONG = "#1a1a1a", "#c1121f"
_MOST_ANNOTATED = 16  #: rows or columns of cells that have a number in them
_MOST_TICKS = 32  #: of an axis that have a label
_MOST_BOXES = 24  #: nodes of a layer of a graph that have a name


def credit(
    images: Tensor | Sequence[str] | Sequence[Sequence[str]],
    credit: Tensor | Sequence[Tensor],
    *,
    labels: Sequence[object] | Tensor | None = None,
    predictions: Sequence[object] | Tensor | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Inputs with the credit of their parts in one output of a router: images above their maps, or coloured text.

    All maps share their colours: red is net benefit, blue net cost, white none. That is the sign of phi, not of the
    vote: a strongly coloured part counts, whichever way. Colours end at the 99th percentile of all |credit|. The
    outline of an image is drawn over its map.

    Args:
        images: [K, H, W], shown in grey from their lowest to their highest value; or a text's tokens, or K texts'.
        credit: [K, h, w], of ``credit_assignment``: per pixel, or per patch, where h divides H and w divides W. Of
            tokens: [T], or K tensors [T_k], one number for each token.
        labels: K true classes, shown above the images or the text.
        predictions: K predicted classes, shown there too, in red where they differ from ``labels``.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    texts = _as_texts(images)
    if texts is not None:
        return _credit_of_tokens(texts, credit, labels=labels, predictions=predictions, title=title, path=path)
    pictures, maps = _checked("images", images, "[K, H, W]"), _checked("credit", credit, "[K, h, w]")
    (K, H, W), (k, h, w) = pictures.shape, maps.shape
    if k != K:
        raise ValueError(f"credit: expected {K} maps, one per image, got {k} (credit is {list(maps.shape)})")
    if H % h or W % w:
        raise ValueError(
            f"credit: expected maps [h, w] whose sides divide the images' {H} x {W}, got {h} x {w} "
            f"(credit is {list(maps.shape)})"
        )
    true = _names("labels", labels, K)
    predicted = _names("predictions", predictions, K)

    figure = _figure(1.15 * K + 1.0, 2.7, title)
    axes = figure.subplots(2, K, squeeze=False)
    bound = _bound(maps)
    low, high = float(pictures.min()), float(pictures.max())
    drawn = None
    for i in range(K):
        above, below = axes[0, i], axes[1, i]
        picture, extent = pictures[i].numpy(), (0, W, H, 0)
        above.imshow(picture, cmap="gray_r", vmin=low, vmax=high, extent=extent, interpolation="nearest")
        drawn = below.imshow(
            maps[i].numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, extent=extent, interpolation="nearest"
        )
        if H > 1 and W > 1 and high > low:
            x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5  # centres of pixels
            below.contour(
                x.numpy(), y.numpy(), picture, levels=[(low + high) / 2], colors=_RIGHT, linewidths=0.9, alpha=0.8
            )
        heading = [f"true {true[i]}"] if true else []
        heading += [f"pred. {predicted[i]}"] if predicted else []
        wrong = bool(true and predicted and true[i] != predicted[i])
        above.set_title("\n".join(heading), fontsize=9, color=_WRONG if wrong else _RIGHT)
        for ax in (above, below):
            ax.set(xticks=[], yticks=[], xlim=(0, W), ylim=(H, 0))
            for spine in ax.spines.values():
                spine.set(linewidth=0.6, color="#999999")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("credit", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes[1, :].tolist(), extend="both", fraction=0.06 / K, aspect=13, pad=0.01)  # type: ignore[arg-type]
    bar.ax.tick_params(labelsize=7)
    bar.set_label("cost  ·  benefit", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure


def _as_texts(images: Any) -> list[list[str]] | None:
    """K lists of tokens, if that is what came."""
    if isinstance(images, (Tensor, str)) or not isinstance(images, Sequence) or not images:
        return None
    if all(isinstance(token, str) for token in images):
        return [list(images)]
    texts = [list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [] for text in images]
    return texts if all(text and all(isinstance(token, str) for token in text) for text in texts) else None


_LINE = 88  #: characters of a line of tokens
_CHARACTER, _LEADING = 0.085, 0.26  #: width of one and distance of lines, in inches


def _credit_of_tokens(
    texts: list[list[str]], credit: Any, *, labels: Any, predictions: Any, title: str | None, path: str | Path | None
) -> Figure:
    """Every token on a ground of its colour, in lines of fixed-width type."""
    rows = [credit] if isinstance(credit, Tensor) and credit.dim() == 1 else list(credit)
    if len(rows) != len(texts):
        raise ValueError(f"credit: expected a tensor for each of {len(texts)} texts, got {len(rows)}")
    values = []
    for k, (text, row) in enumerate(zip(texts, rows, strict=True)):
        name = f"credit[{k}]"
        checked = _checked(name, row[None, None] if isinstance(row, Tensor) and row.dim() == 1 else row, "[T]")[0, 0]
        if len(checked) != len(text):
            raise ValueError(f"{name}: expected {len(text)} numbers, one for each token, got {len(checked)}")
        values.append(checked)
    true = _names("labels", labels, len(texts), "text")
    predicted = _names("predictions", predictions, len(texts), "text")

    placed: list[tuple[int, int, str, float]] = []  # line, column, token, credit
    headings: list[tuple[int, str, bool]] = []
    line = 0
    for k, text in enumerate(texts):
        heading = ([f"true {true[k]}"] if true else []) + ([f"pred. {predicted[k]}"] if predicted else [])
        if heading:
            headings.append((line, ", ".join(heading), bool(true and predicted and true[k] != predicted[k])))
            line += 1
        column = 0
        for token, value in zip(text, values[k].tolist(), strict=True):
            shown = token.replace("\n", "\u23ce") or " "
            if column and column + len(shown) > _LINE:
                line, column = line + 1, 0
            placed.append((line, column, shown, value))
            column += len(shown) + 1
        line += 2 if k + 1 < len(texts) else 1
    widest = max(max(column + len(token) for _, column, token, _ in placed), 24)

    figure = _figure(_CHARACTER * (widest + 2) + 1.0, _LEADING * (line + 0.5) + 0.2, title)
    ax = figure.subplots()
    ax.set(xlim=(-1, widest + 1), ylim=(line, -0.5))
    ax.axis("off")
    bound = _bound(torch.cat(values))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colours: Any = ScalarMappable(Normalize(-bound, bound), "RdBu_r")
    for row_of, column, token, value in placed:
        ground = colours.to_rgba(value)
        ax.add_patch(Rectangle((column - 0.4, row_of), len(token) + 0.8, 0.9, facecolor=ground, edgecolor="none"))
        ink = "white" if abs(value) > 0.7 * bound else _RIGHT
        middle = column + len(token) / 2
        ax.text(middle, row_of + 0.45, token, family="monospace", fontsize=8, color=ink, ha="center", va="center")
    for row_of, text_of, wrong in headings:
        ax.text(-0.4, row_of + 0.5, text_of, fontsize=9, color=_WRONG if wrong else _RIGHT, va="center")
    bar = figure.colorbar(colours, ax=ax, extend="both", fraction=0.03, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("cost  ·  benefit", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure


def _bound(credit: Tensor) -> float:
    """Where colours end."""
    sizes = credit.abs().flatten().sort().values
    return float(sizes[int(0.99 * (len(sizes) - 1))]) or float(sizes[-1]) or 1.0


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
    """
    if not isinstance(trajectory, (Trajectory, Summary)):
        raise TypeError(f"trajectory: expected a Trajectory or its summary(), got {type(trajectory).__name__}")
    summary = trajectory.summary() if isinstance(trajectory, Trajectory) else trajectory
    if not summary.layers or not summary.samples:
        raise ValueError(
            f"trajectory: expected a decision and a sample at least, got {len(summary.layers)} decisions of "
            f"{summary.samples} samples"
        )
    shapes = [tuple(layer.counts.shape) for layer in summary.layers]
    A, modules = shapes[0][0], [K for _, K in shapes]
    widths = [min(0.34 * max(K, 4), 8.0) for K in modules]
    figure = _figure(sum(widths) + 0.35 * len(widths) + 1.4, min(0.3 * max(A, 2), 8.0) + 1.0, title)
    axes = figure.subplots(1, len(shapes), squeeze=False, width_ratios=widths)[0]
    drawn = None
    for t, (ax, layer) in enumerate(zip(axes, summary.layers, strict=True)):
        counts, K = layer.counts, modules[t]
        share = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
        drawn = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if K <= _MOST_ANNOTATED and A <= _MOST_ANNOTATED:
            for a, k in counts.nonzero().tolist():
                ink = "white" if share[a, k] > 0.55 else _RIGHT
                ax.text(k, a, str(int(counts[a, k])), ha="center", va="center", fontsize=7, color=ink)
        ax.set_title(f"{t}: {layer.name}", fontsize=9, color=_RIGHT)
        ax.set_xlabel("module", fontsize=8)
        ax.set_xticks(range(0, K, _stride(K)))
        ax.set_yticks(range(0, A, _stride(A)) if t == 0 else [])
        ax.tick_params(labelsize=7, length=0)
        for spine in ax.spines.values():
            spine.set(linewidth=0.6, color="#999999")
    names = ["all" if task is None else str(task) for task in summary.tasks]
    axes[0].set_yticklabels(names[:: _stride(A)])
    axes[0].set_ylabel("task", fontsize=8)
    bar = figure.colorbar(drawn, ax=axes.tolist(), fraction=0.05, pad=0.01)  # type: ignore[arg-type]
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the task's samples", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure


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
    """
    found = routers_of(model)
    overlap = mask_overlap(model, measure).overall
    T = len(overlap)
    height, side = min(0.16 * max(T, 4), 4.0), 0.16 * max(T, 8) if T <= 24 else 4.0
    rows = -(-len(found) // 2)
    figure = _figure(9.0 + side, max((height + 0.45) * rows, side + 0.8), title)
    grid = figure.add_gridspec(rows, 3, width_ratios=[4.5, 4.5, side + 0.6])
    for n, (name, router) in enumerate(found.items()):
        ax = figure.add_subplot(grid[n // 2, n % 2])
        kept = (router.get_unit_mapping().detach() != 0).float().cpu()
        ax.imshow(kept.numpy(), cmap="Greys", vmin=0, vmax=1.2, aspect="auto", interpolation="nearest")
        ax.set_title(f"{name}: {router.unit_count} units, {kept.mean():.0%} on", fontsize=8, color=_RIGHT)
        ax.set_yticks(range(0, T, _stride(T)) if n % 2 == 0 else [])
        ax.tick_params(labelsize=6, length=0)
        if n % 2 == 0:
            ax.set_ylabel("task", fontsize=7)
    ax = figure.add_subplot(grid[:, 2])
    drawn = ax.imshow(overlap.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if T <= _MOST_ANNOTATED // 2:
        for a in range(T):
            for b in range(T):
                ink = "white" if overlap[a, b] > 0.55 else _RIGHT
                ax.text(b, a, f"{overlap[a, b]:.2f}", ha="center", va="center", fontsize=6, color=ink)
    ax.set_title("shared by two tasks", fontsize=8, color=_RIGHT)
    ax.set(xticks=range(0, T, _stride(T)), yticks=range(0, T, _stride(T)), xlabel="task")
    ax.tick_params(labelsize=6, length=0)
    figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
    if path is not None:
        figure.savefig(path)
    return figure


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
    """
    if not isinstance(model, MTLModel):
        raise TypeError(f"model: expected an MTLModel, got {type(model).__name__}")
    drawn = model.g
    columns, places = _layers(drawn)
    rows = max(map(len, columns))
    named = rows <= _MOST_BOXES and len(columns) <= _MOST_BOXES
    figure = _figure(min(1.5 * len(columns) + 0.4, 40.0), min(0.55 * rows + 0.4, 14.0), title)
    ax = figure.add_subplot()
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-rows / 2 - 0.1, rows / 2 + 0.1))
    ax.axis("off")
    unused, outputs = set(model.unused), set(model.output_tasks)
    boxes = {}
    for name, at in places.items():
        ink = _RIGHT if name not in unused else "#aaaaaa"
        if named:
            face, text = (_RIGHT, "white") if name in outputs else ("#e8eef5" if name == "root" else "white", ink)
            box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": ink, "linewidth": 0.8}
            said = _described(model, name)
            label = ax.text(*at, said, ha="center", va="center", fontsize=7, color=text, bbox=box, zorder=2)
            boxes[name] = label.get_bbox_patch()
        else:
            ax.plot(*at, "o", markersize=2, color=_WRONG if name in outputs else ink, zorder=2)
    for a, b in drawn.edges:
        arrow = {"arrowstyle": "-|>", "linewidth": 0.7 if named else 0.2, "shrinkA": 0, "shrinkB": 0}
        if places[b][0] - places[a][0] > 1:
            arrow["connectionstyle"] = "arc3,rad=-0.15"  # around what is between
        arrow |= {"color": "#aaaaaa" if {a, b} & unused else "#555555", "mutation_scale": 8 if named else 2}
        if named:
            arrow |= {"patchA": boxes[a], "patchB": boxes[b]}
        ax.annotate("", xy=places[b], xytext=places[a], arrowprops=arrow, zorder=1)
    if path is not None:
        figure.savefig(path)
    return figure


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


def _stride(count: int) -> int:
    """Every which tick has a label."""
    return -(-count // _MOST_TICKS)


def _figure(width: float, height: float, title: str | None) -> Figure:
    """An empty one, with 0.3 inches more for a title."""
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


def _checked(name: str, t: Any, axes: str) -> Tensor:
    """As float32 on the CPU."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(t).__name__}")
    if t.dim() != 3 or 0 in t.shape:
        raise ValueError(f"{name}: expected {axes}, none of them 0, got {list(t.shape)}")
    if t.is_complex():
        raise TypeError(f"{name}: expected real values, got {t.dtype}")
    values: Tensor = t.detach().float().cpu()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got {bad} that are NaN or infinite")
    return values


def _names(name: str, values: Sequence[object] | Tensor | None, count: int, what: str = "image") -> list[str]:
    if values is None:
        return []
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if not isinstance(listed, list) or len(listed) != count:
        raise ValueError(f"{name}: expected {count} of them, one per {what}, got {listed}")
    return [str(value) for value in listed]
