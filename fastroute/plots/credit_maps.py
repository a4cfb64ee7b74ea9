"""How much each part of an input counted: images above their maps, or coloured text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .figures import INK, WRONG, Figure, checked, empty_figure, names_of, saved


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
    outline of an image is drawn over its map. In grey red and blue look alike: cells of notable cost have a minus in
    them, and tokens of notable cost are underlined.

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

    Examples:
        >>> net = nn.Sequential(fastroute.EfficientVectorRouting(64, 10, 2, 1))
        >>> images = torch.rand(3, 8, 8)
        >>> vectors = torch.stack([images, 1 - images], -1).flatten(1, 2)  # [3, 64, 2]: a vector per pixel
        >>> credit = fastroute.capsules.credit(net, vectors, output=7).reshape(3, 8, 8)
        >>> figure = fastroute.plots.credit(images, credit, predictions=[7, 7, 7])
        >>> figure = fastroute.plots.credit(["not", "a", "good", "film"], torch.tensor([2.0, 0.1, -1.5, 0.3]))
    """
    texts = _as_texts(images)
    if texts is not None:
        return _credit_of_tokens(texts, credit, labels=labels, predictions=predictions, title=title, path=path)
    pictures, maps = checked("images", images, "[K, H, W]"), checked("credit", credit, "[K, h, w]")
    (K, H, W), (k, h, w) = pictures.shape, maps.shape
    if k != K:
        raise ValueError(f"credit: expected {K} maps, one per image, got {k} (credit is {list(maps.shape)})")
    if H % h or W % w:
        raise ValueError(
            f"credit: expected maps [h, w] whose sides divide the images' {H} x {W}, got {h} x {w} "
            f"(credit is {list(maps.shape)})"
        )
    true = names_of("labels", labels, K)
    predicted = names_of("predictions", predictions, K)

    figure = empty_figure(1.15 * K + 1.0, 2.7, title)
    axes = figure.subplots(2, K, squeeze=False)
    bound = _bound(maps)
    low, high = float(pictures.min()), float(pictures.max())
    drawn: Any = None
    for i in range(K):
        above, below = axes[0, i], axes[1, i]
        picture, extent = pictures[i].numpy(), (0, W, H, 0)
        above.imshow(picture, cmap="gray_r", vmin=low, vmax=high, extent=extent, interpolation="nearest")
        drawn = below.imshow(
            maps[i].numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, extent=extent, interpolation="nearest"
        )
        cost = (maps[i] < -_NOTABLE * bound).nonzero()
        y, x = ((cost + 0.5) * torch.tensor([H / h, W / w], device="cpu")).T.numpy()
        below.scatter(x, y, marker="_", s=min(30.0, (40.0 / max(h, w)) ** 2), c=INK, linewidths=0.6)
        if H > 1 and W > 1 and high > low:
            across, down = (torch.arange(n, device="cpu") + 0.5 for n in (W, H))  # centres of pixels
            below.contour(
                across.numpy(), down.numpy(), picture, levels=[(low + high) / 2], colors=INK, linewidths=0.9, alpha=0.8
            )
        heading = [f"true {true[i]}"] if true else []
        heading += [f"pred. {predicted[i]}"] if predicted else []
        wrong = bool(true and predicted and true[i] != predicted[i])
        above.set_title("\n".join(heading), fontsize=9, color=WRONG if wrong else INK, parse_math=False)
        for ax in (above, below):
            ax.set(xticks=[], yticks=[], xlim=(0, W), ylim=(H, 0))
            for spine in ax.spines.values():
                spine.set(linewidth=0.6, color="#999999")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("credit", fontsize=9)
    bar = figure.colorbar(drawn, ax=list(axes[1, :]), extend="both", fraction=0.06 / K, aspect=13, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("cost  ·  benefit", fontsize=8)
    return saved(figure, path)


def _as_texts(images: Any) -> list[list[str]] | None:
    """K lists of tokens, if that is what came."""
    if isinstance(images, (Tensor, str)) or not isinstance(images, Sequence) or not images:
        return None
    if all(isinstance(token, str) for token in images):
        return [list(images)]
    texts = [list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [] for text in images]
    return texts if all(text and all(isinstance(token, str) for token in text) for text in texts) else None


_NOTABLE = 0.2  #: share of the colours' range from which on cost is marked
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
        of_text = checked(name, row[None, None] if isinstance(row, Tensor) and row.dim() == 1 else row, "[T]")[0, 0]
        if len(of_text) != len(text):
            raise ValueError(f"{name}: expected {len(text)} numbers, one for each token, got {len(of_text)}")
        values.append(of_text)
    true = names_of("labels", labels, len(texts), "text")
    predicted = names_of("predictions", predictions, len(texts), "text")

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

    figure = empty_figure(_CHARACTER * (widest + 2) + 1.0, _LEADING * (line + 0.5) + 0.2, title)
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
        ink = "white" if abs(value) > 0.7 * bound else INK
        if value < -_NOTABLE * bound:
            under = ([column - 0.2, column + len(token) + 0.2], [row_of + 0.84] * 2)
            ax.plot(*under, color=ink, linewidth=0.8, dashes=(3, 1.5))
        middle = column + len(token) / 2
        style: dict[str, Any] = {"family": "monospace", "fontsize": 8, "color": ink, "ha": "center", "va": "center"}
        ax.text(middle, row_of + 0.45, token, parse_math=False, **style)
    for row_of, text_of, wrong in headings:
        ax.text(-0.4, row_of + 0.5, text_of, fontsize=9, color=WRONG if wrong else INK, va="center", parse_math=False)
    bar = figure.colorbar(colours, ax=ax, extend="both", fraction=0.03, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("cost  ·  benefit", fontsize=8)
    return saved(figure, path)


def _bound(credit: Tensor) -> float:
    """Where colours end."""
    sizes = credit.abs().flatten().sort().values
    return float(sizes[int(0.99 * (len(sizes) - 1))]) or float(sizes[-1]) or 1.0
