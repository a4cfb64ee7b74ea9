"""The page: what was logged, layer by layer."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from ..ops import files
from ..ops.arguments import checked
from . import charts
from .reading import CannotReport, Run, read_run

#: What a layer's numbers end with, and what kind of layer that tells.
_PER_MODULE = re.compile(r"(?P<layer>.+)/(?P<what>count|by_agent|share|loss|weight)/(?P<rest>.+)")
_PLAIN = (
    "entries", "dropped", "entropy", "agent_entropy", "used", "dead", "top_share", "collapsed", "tasks", "task_entropy",
    "routing_entropy", "credit_entropy",
)  # fmt: skip
_OVERALL = ("routes", "total", "conflict")
_CHARTS = 24  #: of the run's own numbers

_STYLE = """
:root{--ground:#fff;--card:#f6f7f9;--text:#16191d;--soft:#565d66;--grid:#d9dde2;--cell:#123e7c;--over:#fff;--warn:#7a4b00;
--warnground:#fff3d6;--s0:#123e7c;--s1:#c4570c;--s2:#1b7f5c;--s3:#8f2d7f;--s4:#4d8fd6;--s5:#7c6a00;--s6:#b3232f;--s7:#53585f}
@media (prefers-color-scheme:dark){:root{--ground:#14171a;--card:#1e2226;--text:#eceff2;--soft:#a9b1ba;--grid:#3a4047;
--cell:#8ec2ff;--over:#10151b;--warn:#ffd37a;--warnground:#3a2f14;--s0:#8ec2ff;--s1:#ffab66;--s2:#6fd6b0;--s3:#e79bdb;--s4:#4d86c4;
--s5:#d8c54a;--s6:#ff8b8f;--s7:#b8bec6}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:16px;max-width:1360px;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2em 0 .6em;padding-bottom:.25em;border-bottom:1px solid var(--grid);overflow-wrap:anywhere}
h3{font-size:.92rem;font-weight:600;margin:0 0 .5em;overflow-wrap:anywhere}
p{margin:.4em 0;max-width:72ch}
.soft,.none{color:var(--soft)}
.remarks{background:var(--warnground);color:var(--warn);border-radius:6px;padding:.6em 1em;margin:1em 0}
.remarks p{margin:.2em 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:1em 0;padding:0}
.tiles div,.card{background:var(--card);border-radius:8px;padding:12px}
.tiles b{display:block;font-size:1.35rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.85rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px;align-items:start}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--text);font-size:11px;font-variant-numeric:tabular-nums}
svg text.axis{fill:var(--soft)}svg text.over{fill:var(--over)}
.grid{stroke:var(--grid);stroke-width:1;fill:none}.tick{stroke:var(--soft);fill:none}.frame{fill:none;stroke:var(--grid)}
.cell{fill:var(--cell)}.against{fill:var(--s1);stroke:var(--s1);stroke-width:1.5}.bar{fill:var(--s0)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1);stroke-dasharray:7 3}.s2{stroke:var(--s2);stroke-dasharray:2 3}
.s3{stroke:var(--s3);stroke-dasharray:9 3 2 3}.s4{stroke:var(--s4);stroke-width:3.5}
.s5{stroke:var(--s5);stroke-dasharray:4 4}
.s6{stroke:var(--s6);stroke-dasharray:12 4}
.s7{stroke:var(--s7);stroke-dasharray:1 4;stroke-linecap:round;stroke-width:3}
circle.s0{fill:var(--s0)}circle.s1{fill:var(--s1)}circle.s2{fill:var(--s2)}circle.s3{fill:var(--s3)}circle.s4{fill:var(--s4)}
circle.s5{fill:var(--s5)}circle.s6{fill:var(--s6)}circle.s7{fill:var(--s7)}
details{margin:2em 0}summary{cursor:pointer;font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid var(--grid)}
td:first-child,th:first-child{text-align:left;
overflow-wrap:anywhere}
"""


@checked
def write_report(folder: str | Path, out: str | Path | None = None) -> tuple[Path, Run]:
    """Write a run's page, which needs no other file and no network.

    Args:
        folder: a run's folder, with ``routing.jsonl``; or that file.
        out: the page; None: ``report.html`` beside the log.

    Returns:
        (its path, what was read).

    Raises:
        CannotReport: there is nothing to read, or the page cannot be written.
    """
    run = read_run(folder)
    path = run.path.parent / "report.html" if out is None else Path(out)
    text = page(run)
    try:
        if path.exists() and path.samefile(run.path):
            raise CannotReport(f"out: expected another file than the log, got {path}")
        with files.whole(path) as part:
            part.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise CannotReport(f"{path}: {error.strerror}") from error
    return path, run


def page(run: Run) -> str:
    """The page, as text."""
    name = run.path.resolve().parent.name or str(run.path)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(name)}: routing</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(name)}</h1><p class='soft'>{escape(_span(run))}</p>",
    ]
    if run.remarks:
        parts.append(f'<div class="remarks">{"".join(f"<p>{escape(r)}</p>" for r in run.remarks)}</div>')
    parts += [_tiles(run), _own(run), _overall(run), *_layers(run), _table(run), "</body></html>"]
    return "\n".join(part for part in parts if part)


def _span(run: Run) -> str:
    said = f"{len(run.steps)} readings, step {run.steps[0]:,} to {run.steps[-1]:,}"
    times = [t for t in run.times if math.isfinite(t) and 0 < t < 1e11]
    if times:
        said += f"; {time.strftime('%Y-%m-%d %H:%M', time.gmtime(min(times)))} UTC"
        said += f", {_duration(max(times) - min(times))}"
    return said + "."


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _card(title: str, chart: str, note: str = "") -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{chart}{note and f"<p class=soft>{escape(note)}</p>"}</div>'


def _section(title: str, cards: Iterable[str], note: str = "") -> str:
    made = list(cards)
    if not made:
        return ""
    said = f"<p class='soft'>{escape(note)}</p>" if note else ""
    return f'<section><h2>{escape(title)}</h2>{said}<div class="cards">{"".join(made)}</div></section>'


# ----------------------------------------------------------------------------------------------------- what is there


def _layer_of(name: str) -> str | None:
    """The layer that a number is of; None for the run's own and those over all layers."""
    if name.split("/")[0] in _OVERALL:
        return None
    found = _PER_MODULE.fullmatch(name)
    if found is not None:
        return found["layer"]
    layer, _, what = name.rpartition("/")
    return layer if layer and what in _PLAIN else None


def _by_rest(run: Run, layer: str, what: str) -> dict[str, list[float]]:
    """The numbers ``LAYER/WHAT/...`` by the rest of the name, numbers in their order."""
    start = f"{layer}/{what}/"
    found = {name[len(start) :]: values for name, values in run.numbers.items() if name.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: [(not p.isdigit(), int(p) if p.isdigit() else 0, p)
                                                        for p in item[0].split("/")]))  # fmt: skip


def _tiles(run: Run) -> str:
    shown = []
    own = [n for n in run.numbers if _is_own(n)][:3]
    for name, label in (
        *((n, f"last {n}") for n in own),
        ("total/collapsed", "layers collapsed"),
        ("total/dead", "modules that nothing took"),
        ("routes/distinct", "distinct routes in the last batch"),
        ("conflict/opposed", "of task pairs pull apart"),
    ):
        value = run.last(name)
        if value is not None:
            text = f"{value:.0%}" if name == "conflict/opposed" and math.isfinite(value) else charts.number(value)
            shown.append(f"<div><b>{text}</b><span>{escape(label)}</span></div>")
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def _is_own(name: str) -> bool:
    return _layer_of(name) is None and name.split("/")[0] not in _OVERALL


def _own(run: Run) -> str:
    names = [name for name in run.numbers if _is_own(name)]
    cards = [_card(n, charts.lines(n, run.steps, [(n, run.numbers[n])], n)) for n in names[:_CHARTS]]
    left = f"{len(names) - _CHARTS} more are in the table below." if len(names) > _CHARTS else ""
    return _section("The run", cards, left)


def _overall(run: Run) -> str:
    n, cards = run.numbers, []
    if "routes/distinct" in n:
        series = [("distinct routes", n["routes/distinct"])]
        note = "Sequences of modules that samples of one batch took."
        if "routes/samples" in n:
            series.append(("samples", n["routes/samples"]))
        cards.append(_card("Routes", charts.lines("distinct routes by step", run.steps, series, "routes", low=0), note))
    if "total/dead" in n:
        chart = charts.lines(
            "modules that nothing took, by step", run.steps, [("dead", n["total/dead"])], "modules", low=0
        )
        cards.append(_card("Modules that nothing took", chart))
    pairs = {name[9:]: v for name, v in n.items() if name.startswith("conflict/") and "|" in name}
    if pairs:
        tasks = list(dict.fromkeys(t for pair in pairs for t in pair.split("|", 1)))
        last = {pair: run.last(f"conflict/{pair}") for pair in pairs}
        cells = [[_cosine(last, a, b) for b in tasks] for a in tasks]
        chart = charts.grid("cosines between tasks' gradients", tasks, tasks, cells, "task", "task")
        note = "1: the same direction; below 0, framed: what helps one hurts the other."
        cards.append(_card("Cosine of the tasks' gradients, last reading", chart, note))
        both = [(k, n[f"conflict/{k}"]) for k in ("mean", "lowest") if f"conflict/{k}" in n]
        chart = charts.lines("cosines by step", run.steps, both, "cosine", low=-1, high=1)
        cards.append(_card("Cosine of the tasks' gradients", chart))
    return _section("Over all layers", cards)


def _cosine(last: dict[str, float | None], a: str, b: str) -> float:
    found = 1.0 if a == b else last.get(f"{a}|{b}", last.get(f"{b}|{a}"))
    return math.nan if found is None else found


def _layers(run: Run) -> Iterator[str]:
    for layer in dict.fromkeys(found for name in run.numbers if (found := _layer_of(name)) is not None):
        yield _section(layer, _of_layer(run, layer), _state(run, layer))


def _state(run: Run, layer: str) -> str:
    """In words, as of the last reading."""
    used, dead = run.last(f"{layer}/used"), run.last(f"{layer}/dead")
    said = []
    if used is not None and dead is not None and math.isfinite(used + dead):
        said.append(f"{used:.0f} of {used + dead:.0f} modules in use.")
    if run.last(f"{layer}/collapsed"):
        said.append("Collapsed: nearly everything goes to one module (of mixtures: to k).")
    dropped = run.last(f"{layer}/dropped")
    if dropped:
        said.append(f"{charts.number(dropped)} entries went to no module.")
    return " ".join(said)


def _of_layer(run: Run, layer: str) -> Iterator[str]:
    steps = run.steps
    counts = _by_rest(run, layer, "count")
    is_tasks = f"{layer}/task_entropy" in run.numbers
    what = "task" if is_tasks else "module"
    if counts:
        whole = [math.fsum(v for v in at if math.isfinite(v)) for at in zip(*counts.values(), strict=True)]
        rows = [
            (k, [v / w if w else math.nan for v, w in zip(values, whole, strict=True)]) for k, values in counts.items()
        ]
        if len(steps) > 1:
            yield _card(f"Share of each {what}", charts.shares(f"share of each {what} by step", steps, rows, what))
        last = [run.last(f"{layer}/count/{k}") or 0.0 for k in counts]
        chart = charts.bars(f"entries by {what}", list(counts), last, "entries", what)
        yield _card(f"Entries by {what}, last reading", chart)
    by_agent = _by_rest(run, layer, "by_agent")
    if by_agent:
        yield _card("Which agent takes which module, last reading", _table_map(by_agent, "agent", "module", scale=True))
    gates = _by_rest(run, layer, "share")
    if gates:
        yield _card("Mean share of each expert, last reading", _table_map(gates, "task", "expert", scale=False))
    entropies = [k for k in ("entropy", "agent_entropy", "task_entropy") if f"{layer}/{k}" in run.numbers]
    if entropies:
        names = {"entropy": "all", "agent_entropy": "within an agent", "task_entropy": "of tasks"}
        series = [(names[k], run.numbers[f"{layer}/{k}"]) for k in entropies]
        most = math.log2(len(counts)) if len(counts) > 1 else None
        note = f"{most:.2f} bits if all {len(counts)} are taken equally often; 0 if one is." if most else ""
        yield _card("Entropy", charts.lines("entropy by step", steps, series, "bits", low=0, high=most), note)
    credit = [k for k in ("routing_entropy", "credit_entropy") if f"{layer}/{k}" in run.numbers]
    if credit:
        names = {"routing_entropy": "input, over outputs", "credit_entropy": "output, over inputs"}
        series = [(names[k], run.numbers[f"{layer}/{k}"]) for k in credit]
        note = "0: an input goes to one output; an output has its credit from one input."
        yield _card(
            "Entropy of routing and credit", charts.lines("entropies by step", steps, series, "bits", low=0), note
        )
    for kind, title in (("weight", "Weights of losses"), ("loss", "Losses")):
        tasks = _by_rest(run, layer, kind)
        for start in range(0, min(len(tasks), 4 * charts.LINES), charts.LINES):
            part = list(tasks.items())[start : start + charts.LINES]
            more = f", {start + 1} to {start + len(part)} of {len(tasks)}" if len(tasks) > charts.LINES else ""
            yield _card(title + more, charts.lines(f"{title} by step", steps, part, kind, low=0))


def _table_map(found: dict[str, list[float]], down: str, across: str, scale: bool) -> str:
    """Numbers ``A/K`` as rows and columns; with ``scale`` as shares of their row."""
    rows = list(dict.fromkeys(name.split("/")[0] for name in found))
    columns = list(dict.fromkeys(name.split("/", 1)[-1] for name in found))
    last = {n: next((v for v in reversed(values) if math.isfinite(v)), math.nan) for n, values in found.items()}
    cells = [[last.get(f"{r}/{c}", math.nan) for c in columns] for r in rows]
    if scale:
        cells = [[v / (sum(row) or 1.0) for v in row] for row in cells]
    return charts.grid(f"{down} by {across}", rows, columns, cells, down, across)


def _table(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{_shown(_first(values))}</td><td>{_shown(run.last(name))}</td></tr>"
        for name, values in run.numbers.items()
    )
    return (
        f"<details><summary>All {len(run.numbers)} numbers</summary><div class='scroll'><table><tr><th>number</th>"
        f"<th>first</th><th>last</th></tr>{rows}</table></div></details>"
    )


def _first(values: Sequence[float]) -> float | None:
    return next((v for v in values if not math.isnan(v)), None)


def _shown(value: float | None) -> str:
    return "nan" if value is None else charts.number(value)


__all__ = ["CannotReport", "page", "write_report"]
