"""Charts as inline SVG, in the page's colours: lines, maps of shares, bars.

All are drawn 360 wide, about what a phone shows, and scaled up to the width of a column. Lines differ in dashes as well
as in colour; shades of maps are one colour's opacity. So both can be told apart in grey, and in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 360
RIGHT, TOP = 12, 10
LETTER = 6.9  #: the width of a letter, in a wide font
LINES = 8  #: styles of lines that there are
_MOST = 300  #: points of a line, columns of a map at most 60
_COLUMNS = 60


def number(value: float) -> str:
    """For a tile or a table: four digits at most."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "\u2212")
    text = f"{value:.4g}" if size < 10000 else f"{value:,.0f}"
    return text.replace("-", "\u2212")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """For an axis: 20k for 20,000 and 1.5M for 1,500,000."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if max(size, 1e4) <= abs(value) < 1e9:
            return number(value / size) + unit
    return number(value)


def _left(labels: Iterable[str]) -> float:
    """Where a chart begins, right of its labels and of the axis' name."""
    return 24 + LETTER * max(map(len, labels), default=0)


def _inside(x: float, text: str) -> float:
    """x, or as far left of it as a centred label needs so as not to be cut."""
    return min(x, WIDTH - 2 - len(text) * LETTER / 2)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind and f" class={kind!r}"}>{escape(text)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _steps_axis(steps: Sequence[int], left: float, bottom: float) -> tuple[list[str], float, float]:
    """Labels below; (they, the first step, what a step is wide)."""
    first, last = steps[0], steps[-1]
    wide = (WIDTH - left - RIGHT) / max(last - first, 1)
    parts = []
    for at in ticks(first, last, 4):
        if at == round(at):
            x, label = left + (at - first) * wide, short_number(at)
            parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
            parts.append(_text(_inside(x, label), bottom + 15, label))
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 29, "step", kind="axis"))
    return parts, first, wide


def _upright(y: float, text: str) -> str:
    return (
        f'<text class="axis" text-anchor="middle" transform="translate(11 {y:.1f}) rotate(-90)">{escape(text)}</text>'
    )


def _levels(levels: Sequence[float], low: float, bottom: float, tall: float) -> tuple[list[str], float]:
    """Lines across at round numbers, and their labels; (they, where they begin)."""
    parts, left = [], _left(map(short_number, levels))
    for at in levels:
        y = bottom - (at - low) * tall
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(left - 5, y + 3.5, short_number(at), "end"))
    return parts, left


def lines(
    title: str,
    steps: Sequence[int],
    series: Sequence[tuple[str, Sequence[float]]],
    unit: str,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Numbers by step, with a legend below where there are several. What is not finite leaves a gap.

    Args:
        title: for screen readers.
        steps: ascending.
        series: (name, values) of at most ``LINES`` lines.
        unit: label of the vertical axis.
        low, high: ends of the vertical axis that have to be seen.
    """
    finite = [v for _, values in series for v in values if math.isfinite(v)]
    if not finite:
        return '<p class="none">No finite value.</p>'
    bottom_of, top_of = (
        min([*finite, *([] if low is None else [low])]),
        max([*finite, *([] if high is None else [high])]),
    )
    if bottom_of == top_of:
        room = abs(top_of) * 0.1 or 1.0
        bottom_of, top_of = bottom_of - (0 if low is not None and low <= bottom_of else room), top_of + room
    bottom, rows = 170.0, math.ceil(len(series) / 2) if len(series) > 1 else 0
    tall = (bottom - TOP) / (top_of - bottom_of)
    parts, left = _levels(ticks(bottom_of, top_of), bottom_of, bottom, tall)
    below, first, wide = _steps_axis(steps, left, bottom)
    parts += below
    parts.append(_upright((TOP + bottom) / 2, unit))
    every = max(1, math.ceil(len(steps) / _MOST))
    for k, (_, values) in enumerate(series):
        path, is_down, alone = [], False, []
        for i in range(0, len(steps), every):
            if not math.isfinite(values[i]):
                is_down = False
                continue
            x, y = left + (steps[i] - first) * wide, bottom - (values[i] - bottom_of) * tall
            if not is_down and (i + every >= len(steps) or not math.isfinite(values[i + every])):
                alone.append(f'<circle class="s{k % LINES}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
            path.append(f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}")
            is_down = True
        parts.append(f'<path class="line s{k % LINES}" d="{"".join(path)}"/>{"".join(alone)}')
    for k, (name, _) in enumerate(series if rows else ()):
        x, y = 16 + k % 2 * 172, bottom + 48 + k // 2 * 16
        parts.append(f'<path class="line s{k % LINES}" d="M{x} {y - 4}h26"/>')
        parts.append(_text(x + 32, y, name if len(name) <= 21 else f"{name[:9]}\u2026{name[-10:]}", "start"))
    return _svg(bottom + 36 + 16 * rows + (4 if rows else 0), title, parts)


def shares(title: str, steps: Sequence[int], rows: Sequence[tuple[str, Sequence[float]]], what: str) -> str:
    """A map: a row per module, a column per step (or several), the stronger the colour the larger the share.

    The strongest stands for the largest share that there is, rounded up: of many modules none has much.
    """
    columns = min(len(steps), _COLUMNS)
    edges = [round(c * len(steps) / columns) for c in range(columns + 1)]
    high = max(2.0, min(16.0, 150 / len(rows))) if len(rows) <= 150 else 300 / len(rows)
    left = _left(name for name, _ in rows)
    bottom, wide = TOP + high * len(rows), (WIDTH - left - RIGHT) / columns
    most = max((v for _, values in rows for v in values if math.isfinite(v)), default=1.0)
    full = next((top for top in (0.02, 0.05, 0.1, 0.2, 0.5) if most <= top), 1.0)
    parts = [
        f'<rect class="frame" x="{left:.1f}" y="{TOP}" width="{WIDTH - left - RIGHT:.1f}" height="{bottom - TOP:.1f}"/>'
    ]
    for r, (_, values) in enumerate(rows):
        for c in range(columns):
            found = [v for v in values[edges[c] : edges[c + 1]] if math.isfinite(v)]
            share = sum(found) / len(found) / full if found else 0.0
            if share > 0.002:
                parts.append(
                    f'<rect class="cell" x="{left + c * wide:.2f}" y="{TOP + r * high:.2f}" width="{wide + 0.3:.2f}" '
                    f'height="{high:.2f}" fill-opacity="{min(share, 1.0):.3f}"/>'
                )
    every = max(1, math.ceil(12 / high))
    for r in range(0, len(rows), every):
        parts.append(_text(left - 5, TOP + (r + 0.5) * high + 3.5, rows[r][0], "end"))
    parts.append(_upright((TOP + bottom) / 2, what))
    for c in sorted({0, columns // 2, columns - 1} if columns > 2 else set(range(columns))):
        label = short_number(steps[edges[c + 1] - 1])
        parts.append(_text(_inside(left + (c + 0.5) * wide, label), bottom + 15, label))
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 29, "step", kind="axis"))
    parts += _scale(left, bottom + 38, full)
    return _svg(bottom + 58, title, parts)


def _scale(left: float, y: float, full: float = 1.0) -> list[str]:
    """The key of the shades, up to the share that has the whole colour."""
    parts = [_text(left, y + 9, "share", "start")]
    wide = (WIDTH - left - 44) / 5
    for k, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        x = left + 40 + k * wide
        parts.append(f'<rect class="frame" x="{x:.1f}" y="{y}" width="16" height="11"/>')
        parts.append(f'<rect class="cell" x="{x:.1f}" y="{y}" width="16" height="11" fill-opacity="{share}"/>')
        parts.append(_text(x + 20, y + 9.5, number(share * full), "start"))
    return parts


def grid(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float]], down: str, across: str
) -> str:
    """A map of numbers from -1 to 1, written into the cells where there is room; negative ones have a frame."""
    names = [_short(row, 16) for row in rows]
    left = _left(names)
    room = WIDTH - left - RIGHT
    wide = room / len(columns)
    high = max(4.0, min(22.0, 220 / len(rows)))
    bottom = TOP + high * len(rows)
    is_written = wide >= 30 and high >= 13
    parts = [f'<rect class="frame" x="{left:.1f}" y="{TOP}" width="{room:.1f}" height="{bottom - TOP:.1f}"/>']
    for r, row in enumerate(cells):
        for c, value in enumerate(row):
            if not math.isfinite(value):
                continue
            x, y = left + c * wide, TOP + r * high
            kind = "cell" if value >= 0 else "cell against"
            shade = min(abs(value), 1.0)
            parts.append(
                f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" '
                f'fill-opacity="{shade:.3f}"/>'
            )
            if is_written:
                ink = "over" if shade > 0.55 else ""
                parts.append(_text(x + wide / 2, y + high / 2 + 3.5, f"{value:.2f}".replace("-", "\u2212"), kind=ink))
    every = max(1, math.ceil(12 / high))
    for r in range(0, len(rows), every):
        parts.append(_text(left - 5, TOP + (r + 0.5) * high + 3.5, names[r], "end"))
    parts += _across(columns, left, wide, bottom, across)
    parts.append(_upright((TOP + bottom) / 2, down))
    if not is_written:
        parts += _scale(left, bottom + 38)
    return _svg(bottom + (58 if not is_written else 36), title, parts)


def _across(names: Sequence[str], left: float, wide: float, bottom: float, axis: str) -> list[str]:
    """Names below columns, of as many as there is room for."""
    every = max(1, math.ceil(24 / wide))
    parts = []
    for c in range(0, len(names), every):
        name = _short(names[c], max(3, int(wide * every / LETTER)))
        parts.append(_text(_inside(left + (c + 0.5) * wide, name), bottom + 14, name))
    return [*parts, _text((left + WIDTH - RIGHT) / 2, bottom + 29, axis, kind="axis")]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def bars(title: str, names: Sequence[str], values: Sequence[float], down: str, across: str) -> str:
    """Upright bars from 0."""
    top_of = max([v for v in values if math.isfinite(v)], default=0.0) or 1.0
    bottom = 170.0
    tall = (bottom - TOP) / top_of
    parts, left = _levels(ticks(0, top_of), 0.0, bottom, tall)
    wide = (WIDTH - left - RIGHT) / len(values)
    gap = min(2.0, wide * 0.15)
    for k, value in enumerate(values):
        if math.isfinite(value) and value > 0:
            x, y = left + k * wide + gap / 2, bottom - value * tall
            parts.append(
                f'<rect class="bar" x="{x:.2f}" y="{y:.1f}" width="{wide - gap:.2f}" height="{bottom - y:.1f}"/>'
            )
    parts += _across(names, left, wide, bottom, across)
    parts.append(_upright((TOP + bottom) / 2, down))
    return _svg(bottom + 36, title, parts)
