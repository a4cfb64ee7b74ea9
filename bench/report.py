"""The tables of docs/benchmarks*.md, from bench/results/*.json. Everything outside the markers is written by hand."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_DOCS = Path(__file__).resolve().parents[1] / "docs"
#: By what a result's name ends in: see ``instruction_sets.kind``.
PAGES = {name: _DOCS / f"benchmarks{name and '_'}{name}.md" for name in ("", "avx2", "intel")}

Row = dict[str, Any]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(key, {})))


def _cell(row: Row, name: str, figure: str, ratio: str) -> str:
    found = row["rivals"].get(name) or row["floors"].get(name)
    if found is None:
        return "–"
    off = f"{found['off']} {found['times_the_budget']:.1f}× its budget" if "off" in found else ""
    if figure not in found:
        return f"**wrong**: {off}"
    shown = _ms(found[figure]) + (f" ({found[ratio][1]:.2f}×)" if ratio in found else "")
    return f"{shown} †" if off else shown


def _marks(rows: Sequence[Row]) -> list[str]:
    """What † stands for: the least accurate of each rival that is over the budget and timed all the same."""
    worst: dict[str, tuple[float, str]] = {}
    for row in rows:
        for name, found in row["rivals"].items():
            if "off" in found and "ms" in found:
                this = (found["times_the_budget"], f"{found['off']} at {row['case']}, {row['pass']}")
                worst[name] = max(worst.get(name, this), this)
    return [
        f"† {name}: beyond the error budget, at most {times:.1f} times it ({where})."
        for name, (times, where) in worst.items()
    ]


def _head(row: Row) -> list[str]:
    return [row["case"], row["pass"]]


def _times(rows: Sequence[Row], figure: str, ratio: str, *, floor: bool) -> str:
    names = _names(rows, "rivals") + (_names(rows, "floors") if floor else [])
    shown = [f"floor, {n}" if n in _names(rows, "floors") else n for n in names]
    last = ["share of the floor", "GFLOP", "GB"] if floor else []
    body = []
    for row in rows:
        line = _head(row) + [_cell(row, name, figure, ratio) for name in names]
        if floor:
            line += [_percent(row["share_of_floor"]), f"{row['GFLOP']:.3g}", f"{row['GB']:.2g}"]
        body.append(line)
    return _table(["case", "pass", *shown, *last], body)


def _split(target: str) -> tuple[str, str]:
    """(what, whose): "stacked" asks it of fastroute with stacked parameters, "kernels" is a second figure for it."""
    what, _, which = target.rpartition(", ")
    return (what, which) if which in ("stacked", "kernels") else (target, "")


def _measured(row: Row, target: str) -> tuple[float, str, str] | None:
    """(measured, as shown, its unit) of one target."""
    target, which = _split(target)
    subject = row["subject"] + (", stacked" if which == "stacked" else "")
    memory = row.get("memory", {}).get(subject)
    mine = row["rivals"].get(subject, {})
    if target in ("max_MB", "max_GB"):
        return None if memory is None else (memory, f"{memory:.1f}", target[4:])
    if target == "max_wall_ms":
        if "wall_ms" not in mine:
            return None
        return mine["wall_ms"], f"{_ms(mine['wall_ms'])} ms (best {_ms(mine['best_wall_ms'])})", ""
    if target == "max_operators":
        count = row.get("operators", {}).get(subject)
        return None if count is None else (count["all"], str(count["all"]), "")
    if target == "max_ms":
        return None if "ms" not in mine else (mine["ms"], _ms(mine["ms"]), "ms")
    if target == "memory":
        theirs = row.get("memory", {}).get("eager")
        return None if memory is None or theirs is None else (theirs / memory, f"{theirs / memory:.1f}×", "")
    if target == "floor":
        floor = row["floors"].get("torch.mm", {}).get("ratio")
        return None if floor is None else (floor[1], _percent(floor[1]), "")
    if target == "matmul":
        share = mine.get("share_of_matmul")
        return None if share is None else (share, _percent(share), "")
    if target == "best rival":
        best = _best_rival(row)
        return None if best is None else (best[0], f"{best[0]:.2f}× ({best[1]})", "")
    if which == "stacked":
        theirs = row["rivals"].get(target, {}).get("ms")
        ratio = None if theirs is None or "ms" not in mine else [0, theirs / mine["ms"], 0]  # of medians
    else:
        ratio = row["rivals"].get(target, {}).get("ratio")
    return None if ratio is None else (ratio[1], f"{ratio[1]:.2f}×", "")


def _best_rival(row: Row) -> tuple[float, str] | None:
    """The lowest (rival / fastroute) there is, of what is not fastroute, and whose it is."""
    found = [
        (r["ratio"][1], name)
        for name, r in row["rivals"].items()
        if "ratio" in r and not name.startswith(row["subject"])
    ]
    return min(found) if found and "ms" in row["rivals"][row["subject"]] else None


def _together(rows: Sequence[Row]) -> str:
    """Over all sizes, against the best rival at each."""
    best = [found for row in rows if "best rival" in row["targets"] and (found := _best_rival(row))]
    mean = statistics.geometric_mean(ratio for ratio, _ in best)
    return f"Geometric mean over these {len(best)} sizes, against the best rival at each: **{mean:.2f}×**."


_TARGETS: dict[str, Callable[[float], tuple[str, str]]] = {
    "floor": lambda v: ("share of torch.mm's floor", f"≥ {100 * v:.0f} %"),
    "matmul": lambda v: ("share of the measured matmul rate", f"≥ {100 * v:.0f} %"),
    "max_ms": lambda v: ("time", f"≤ {v:g} ms"),
    "max_wall_ms": lambda v: ("wall time, two threads", f"≤ {v:g} ms"),
    "max_operators": lambda v: ("operators", f"≤ {v:g}"),
    "memory": lambda v: ("peak growth, eager's over fastroute's", f"≥ {v:g}×"),
    "max_MB": lambda v: ("peak resident growth", f"≤ {v:g} MB"),
    "max_GB": lambda v: ("peak memory", f"≤ {v:g} GB"),
}


def _targets(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        for target, value in row["targets"].items():
            kind, which = _split(target)
            what, wanted = _TARGETS.get(kind, lambda v, t=kind: (f"against {t}", f"≥ {v:g}×"))(value)
            what += {"stacked": ", stacked parameters", "kernels": " (kernels' target)"}.get(which, "")
            found = _measured(row, target)
            if found is None:
                why = "no time: wrong" if "ms" not in row["rivals"][row["subject"]] else "not measured"
                body.append([*_head(row), what, wanted, why, "**missed**" if "wrong" in why else ""])
                continue
            measured, shown, unit = found
            met = measured <= value if target.startswith("max_") else measured >= value
            body.append([*_head(row), what, wanted, f"{shown} {unit}".strip(), "met" if met else "**missed**"])
    return _table(["case", "pass", "what", "target", "measured", ""], body)


def _operators(rows: Sequence[Row]) -> str:
    """In all, and those not called by another operator."""
    names = _names(rows, "operators")
    has_upstream = any("upstream" in row for row in rows)
    body = []
    for row in rows:
        counts = [row["operators"].get(name) for name in names]
        line = [row["case"], *("–" if c is None else f"{c['all']} ({c['direct']})" for c in counts)]
        if has_upstream:
            theirs = row.get("upstream", {})
            line += [str(theirs.get("operators") or "–"), _ms(theirs["ms"]) if "ms" in theirs else "–"]
        body.append(line)
    head = ["case", *names, *["upstream, elsewhere", "upstream's ms, elsewhere"] * has_upstream]
    return _table(head, body)


def _across(rows: Sequence[Row]) -> str:
    """A row's time over another's, of each contestant: ratios of medians."""
    body = []
    names = _names([row for row in rows if "against" in row], "rivals")
    for row in rows:
        asked = row.get("against", {})
        same = [r for r in rows if (r["case"], r["threads"]) == (asked.get("case"), row["threads"])]
        for other in same:
            figure = "ms" if row["threads"] == 1 else "wall_ms"
            times = [(row["rivals"].get(n, {}).get(figure), other["rivals"].get(n, {}).get(figure)) for n in names]
            ratios = [mine / theirs if mine and theirs else None for mine, theirs in times]
            own, most = ratios[names.index(row["subject"])], asked["at_most"]
            verdict = "" if most is None else "no time" if own is None else "met" if own <= most else "**missed**"
            body.append(
                [
                    asked["what"],
                    "one thread, CPU time" if row["threads"] == 1 else "two threads, wall time",
                    "–" if most is None else f"≤ {most:g}×",
                    *("–" if ratio is None else f"{ratio:.2f}×" for ratio in ratios),
                    verdict,
                ]
            )
    return _table(["what", "figure", "target", *names, ""], body)


def _graphs(rows: Sequence[Row]) -> str:
    names = _names(rows, "graphs")
    return _table(["case", *names], [[row["case"], *(str(row["graphs"].get(n, "–")) for n in names)] for row in rows])


def _by_group(rows: Sequence[Row], show: Callable[[Sequence[Row]], str]) -> str:
    """A table for each group of rows that have the same rivals, where a suite says which these are."""
    groups = dict.fromkeys(row.get("group") for row in rows)
    return "\n\n".join(show([row for row in rows if row.get("group") == group]) for group in groups)


def _memory(rows: Sequence[Row], unit: str) -> str:
    names = _names(rows, "memory")
    shown = {"forward": "forward, graph kept"}
    body = [
        [row["case"], shown.get(row["pass"], row["pass"])]
        + [f"{row['memory'][n]:.1f}" if n in row["memory"] else "–" for n in names]
        for row in rows
    ]
    return _table(["case", "pass", *(f"{n}, {unit}" for n in names)], body)


def _mkl(rows: Sequence[Row]) -> str:
    """What the kernels alone win: products by the library that eager and torch.compile use. Ratios of medians."""
    body = []
    for row in rows:
        rivals, mine = row["rivals"], row["rivals"]["fastroute, MKL"]
        if "ms" not in mine:
            continue
        floor = row["floors"]["torch.mm"]["ms"] / mine["ms"]
        ratios = [f"{rivals[n]['ms'] / mine['ms']:.2f}×" for n in ("eager", "torch.compile")]
        body.append([*_head(row), _ms(mine["ms"]), *ratios, _percent(floor)])
    return _table(
        ["case", "pass", "fastroute, MKL, ms", "against eager", "against torch.compile", "share of torch.mm's floor"],
        body,
    )


def _roofline(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        roof, mine = row["roofline"], row["rivals"][row["subject"]]
        body.append(
            [
                *_head(row),
                f"{row['GB']:.2g}",
                f"{row['GFLOP']:.3g}",
                f"{roof['GB/s']:.0f}",
                f"{roof['TFLOP/s']:.3g}",
            ]
            + [
                _ms(roof["ms"]),
                _percent(mine.get("share_of_roofline")),
                _percent(mine.get("share_of_matmul")),
            ]
        )
    head = [
        "GB",
        "GFLOP",
        "copy, GB/s",
        "matmul, TFLOP/s",
        "roofline, ms",
        "share of it",
        "share of the matmul rate",
    ]
    return _table(["case", "pass", *head], body)


# ---------------------------------------------------------------------------------------------- grids

#: (case, pass, threads, rival, how many times fastroute's)
Cell = tuple[str, str, int, str, float]


def _cells(rows: Sequence[Row]) -> list[Cell]:
    """What stands beside fastroute in a grid, smallest work first; fastroute's other forms are no rivals."""
    return [
        (row["case"], row["pass"], row["threads"], name, r["ratio"][1])
        for row in sorted(rows, key=lambda row: row["GFLOP"])
        for name, r in row["rivals"].items()
        if "ratio" in r and not name.startswith(row["subject"])
    ]


def _conclusions(rows: Sequence[Row]) -> list[str]:
    """A line for each rival and number of threads: cells won, geometric means of both halves, the lowest cells."""
    cells, lines = _cells(rows), []
    sizes = list(dict.fromkeys(case for case, *_ in cells))
    small = set(sizes[: len(sizes) // 2])
    for name, threads in dict.fromkeys((name, threads) for _, _, threads, name, _ in cells):
        own = [(ratio, f"{case}, {of}") for case, of, n, rival, ratio in cells if (rival, n) == (name, threads)]
        halves = [[r for r, what in own if (what.rpartition(", ")[0] in small) is half] for half in (True, False)]
        means = " and ".join(
            f"{statistics.geometric_mean(half):.2f}× over the {which} half"
            for half, which in zip(halves, ("small", "large"), strict=True)
            if half
        )
        lost = sorted((ratio, what) for ratio, what in own if ratio < 1)
        lowest = "; ".join(f"{ratio:.2f}× at {what}" for ratio, what in lost[:3])
        lines.append(
            f"* Against {name}, {threads} thread{'s' * (threads > 1)}: {means}; {len(own) - len(lost)} of {len(own)} "
            f"cells at 1.00× or more" + (f"; lowest {lowest}." if lost else f", the lowest at {min(own)[0]:.2f}×.")
        )
    return lines


def heat_map(rows: Sequence[Row], path: Path) -> None:
    """A picture of a grid: a line for each size, smallest first, a column for each rival and pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = _cells(rows)
    sizes = list(dict.fromkeys(case for case, *_ in cells))
    columns = sorted(dict.fromkeys((threads, name, of) for _, of, threads, name, _ in cells))
    table = np.full((len(sizes), len(columns)), np.nan)
    for case, of, threads, name, ratio in cells:
        table[sizes.index(case), columns.index((threads, name, of))] = ratio
    figure = Figure(figsize=(2.6 + 0.62 * len(columns), 1.9 + 0.24 * len(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(np.log2(table), cmap="RdBu", vmin=-2, vmax=2, aspect="auto")
    for (i, j), ratio in np.ndenumerate(table):
        if np.isfinite(ratio):
            dark = abs(np.log2(ratio)) > 1.3
            shown = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
            weight = "bold" if ratio < 1 else "normal"  # a row that loses is seen in grey, too
            color = "white" if dark else "black"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color=color, fontweight=weight)
    labels = [f"{name}, {of}, {threads} thread{'s' * (threads > 1)}" for threads, name, of in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(sizes)), sizes, fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.6)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"], fontsize=7)
    bar.set_label("rival's time over fastroute's", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _rows(data: Mapping[str, Any]) -> list[Row]:
    """The rows of a result file, each cell of a grid that one benchmark ran being a row."""
    found: list[Row] = []
    for info in (row["extra_info"] for row in data["benchmarks"]):
        if isinstance(cells := info.get("grid"), list):
            found += [_of_cell(cell) for cell in cells if "ratios" in cell]
        elif "rivals" in info:
            found.append(info)
    return found


def _of_cell(cell: Mapping[str, Any]) -> Row:
    B, n, m, d, h = (cell["size"][name] for name in "Bnmdh")
    return {
        "case": f"{B}, {n}×{d} → {m}×{h}", "pass": cell["pass"], "threads": cell["threads"],
        "isa": cell.get("isa"), "GFLOP": B * n * m * d, "subject": "fastroute", "grid": True, "load": [cell["load"]],
        "targets": {},
        "rivals": {name: {"ratio": ratio} for name, ratio in cell["ratios"].items()},
    }  # fmt: skip


def _grid(stem: str, rows: Sequence[Row]) -> list[str]:
    """What the grid says, and its picture, which stands in docs/img."""
    held = f", held to {rows[0]['isa']}" if rows[0].get("isa") else ""
    title = f"**A grid of {len({row['case'] for row in rows})} sizes{held}** (CPU time; above 1 fastroute wins)"
    return [title, "\n".join(_conclusions(rows)), f"![Heat map](img/bench_{stem}.png)"]


def tables(path: Path) -> str:
    """One result file as Markdown."""
    data = json.loads(path.read_text())
    rows = _rows(data)
    machine = ", ".join(v if k in ("cpu", "gpu") else f"{k} {v}" for k, v in data["machine"].items())
    loads = sorted(row["load"][0] for row in rows) or [0.0]
    small = ", small sizes" if data["quick"] else ""
    parts = [f"{machine}. {data['date']}{small}. Load average while it ran: {loads[0]} to {loads[-1]}."]
    if grid := [row for row in rows if row.get("grid")]:
        parts += _grid(path.stem, grid)
    rows = [row for row in rows if not row.get("grid")]
    gpu = any("roofline" in row for row in rows)
    one = rows if gpu else [row for row in rows if row["threads"] == 1]
    two = [] if gpu else [row for row in rows if row["threads"] == 2]
    if any(row["targets"] for row in rows):
        parts += ["**Targets**", _targets([*one, *two])]
    if any("best rival" in row["targets"] for row in rows):
        parts += [_together(one)]
    if any("against" in row for row in rows):
        parts += ["**One size against another**", _across(rows)]
    if any("graphs" in row for row in rows):
        parts += ["**Graphs that torch.compile makes for five batch sizes**"]
        parts += [_graphs([row for row in rows if "graphs" in row])]
    counted = two or [row for row in one if "operators" in row]
    if any("operators" in row for row in counted):
        parts += ["**Operators of one step**, in all (and not counting those that another one calls)"]
        parts += [_operators([row for row in counted if "operators" in row])]
    if one:
        title = ("GPU time" if "gpu" in data["machine"] else "Dry run on the CPU") if gpu else "One thread, CPU time"
        parts += [f"**{title}, ms** (and how many times fastroute's)"]
        parts += [_by_group(one, lambda rows: _times(rows, "ms", "ratio", floor=True))]
    if any("fastroute, MKL" in row["rivals"] for row in one):
        parts += [
            "**One thread, fastroute with MKL's products**",
            _mkl([r for r in one if "fastroute, MKL" in r["rivals"]]),
        ]
    if two:
        parts += [
            "**Two threads, CPU time of both, ms**",
            _by_group(two, lambda r: _times(r, "ms", "ratio", floor=False)),
        ]
        walls = _by_group(two, lambda rows: _times(rows, "wall_ms", "wall_ratio", floor=False))
        parts += ["**Two threads, wall time, ms**", walls]
        parts += ["**Two threads, best wall time, ms**", _by_group(two, _best)]
    if gpu:
        parts += ["**Share of the roofline**", _roofline(one)]
    remembered = [row for row in one if "memory" in row]
    if remembered:
        title = "Peak memory" if gpu else "Peak resident growth beyond module, input and gradients"
        parts += [f"**{title}**", _memory(remembered, "GB" if gpu else "MB")]
    left_out = [f"{row['case']}, {row['pass']}: {row['left out']}" for row in one if "left out" in row]
    return "\n\n".join(parts + left_out + _marks(rows))


def _best(rows: Sequence[Row]) -> str:
    names = _names(rows, "rivals")
    body = [
        _head(row) + [_ms(row["rivals"][n]["best_wall_ms"]) if "ms" in row["rivals"].get(n, {}) else "–" for n in names]
        for row in rows
    ]
    return _table(["case", "pass", *names], body)


def rewrite(results: Path) -> None:
    """Put each result file's tables between its markers in its page."""
    written = {page: page.read_text() for page in PAGES.values()}
    for path in sorted(p for p in results.glob("*.json") if {"cpu", "cuda"} & set(p.stem.split("-"))):
        data = json.loads(path.read_text())
        if data["quick"]:
            raise SystemExit(f"{path.name} is from a --quick run: its sizes are not the tables'")
        page = PAGES[next((name for name in path.stem.split("-") if name in PAGES), "")]
        begin, end = f"<!-- begin {path.stem} -->", f"<!-- end {path.stem} -->"
        between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        old = between.search(written[page])
        if old is None:
            raise SystemExit(f"{page.name} has no place for {path.name}: add the lines {begin} and {end}")
        written[page] = written[page].replace(old.group(), f"{begin}\n{tables(path)}\n{end}")
        if grid := [row for row in _rows(data) if row.get("grid")]:
            heat_map(grid, page.parent / "img" / f"bench_{path.stem}.png")
    for page, text in written.items():
        page.write_text(text)
