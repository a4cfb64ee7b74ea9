"""``gpu-first.md`` from the records of a run, also of one that was cut off. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_first import predicted, records
from bench.gpu_first.records import Record

NAME = "gpu-first.md"
#: A row this many times slower than predicted is something to look at.
SLOW = 1.5
BAD = ("failed", "lost", "error")


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])


def _of(found: Sequence[Record], kind: str) -> list[Record]:
    return [r for r in found if r["kind"] == kind]


def lacked_memory(test: Record) -> bool:
    """Whether a test failed for want of memory, which the tests beside it may have had."""
    return test["outcome"] in BAD and "OutOfMemoryError" in str(test.get("message"))


def _tests(found: Sequence[Record]) -> dict[str, Record]:
    """The last word on each test. A failure and a loss stay, but for want of memory."""
    by: dict[str, Record] = {}
    for record in _of(found, "test"):
        before = by.get(record["id"])
        if before is None or before["outcome"] not in BAD or lacked_memory(before):
            by[record["id"]] = record
    return by


def is_bad(found: Sequence[Record]) -> bool:
    """Whether anything that was looked at is wrong. What is absent or late is not."""
    tests = any(t["outcome"] in BAD for t in _tests(found).values())
    tools = any(str(t["ended"]).startswith("exit") for t in _of(found, "tool"))
    tables = any("ms" not in t for t in _of(found, "table"))
    # pytest's own status of failed tests, which have told more, and of a new process with nothing left to run
    known = {"ok", "time", "no time left", "exit 1", *["exit 5"] * (not any(r.get("dry") for r in _of(found, "run")))}
    stages = any(s["ended"] not in (known if s["name"].startswith("ti") or ": " in s["name"] else known - {"exit 1"})
                 for s in _of(found, "stage"))  # fmt: skip
    return tests or tools or tables or stages


def rates(found: Sequence[Record]) -> predicted.Rates:
    """As measured; what is missing is as assumed."""
    facts = {r["name"]: r["value"] for r in _of(found, "fact")}
    names = {"copy": "copy, GB/s", "bf16": "bf16, TFLOP/s", "tf32": "TF32, TFLOP/s", "fp32": "fp32, TFLOP/s"}
    numbers = {k: facts[name] for k, name in names.items() if isinstance(facts.get(name), float)}
    return predicted.ASSUMED._replace(**numbers)


def _short(row: str) -> str:
    return row.partition("[")[2].removesuffix("-1thread]") or row


def _ms(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "–"


def _against_predictions(found: Sequence[Record]) -> Iterator[tuple[list[str], str | None]]:
    """(a line of the table, what to try next)."""
    rows, speed = {r["id"]: r for r in _of(found, "row")}, rates(found)
    for p in predicted.PREDICTIONS:
        expected = p.ms(speed)
        figures = rows.get(p.row, {}).get("rivals", {}).get(p.who, {})
        measured = figures.get("ms")
        times = measured / expected if measured else None
        said = "not measured" if p.row not in rows else "wrong" if "off" in figures and not measured else "no time"
        if times is not None:
            said = "met" if p.target is None or measured <= p.target else f"**missed: {p.target:g} ms**"
        line = [_short(p.row), p.who, p.formula, _ms(expected), _ms(measured), _ms(times), said]
        late = times is not None and (times > SLOW or said != "met")
        yield line, f"{_short(p.row)}: {measured:.3g} ms for {expected:.3g}. {p.next}." if late else None


def _rivals(found: Sequence[Record]) -> str:
    body = []
    for row in _of(found, "row"):
        others = [
            f"{name} {_ms(figures['ms'])} ({figures['ratio'][1]:.2f}x)" if "ratio" in figures else f"{name} –"
            for name, figures in row.get("rivals", {}).items() if name != row.get("subject")
        ]  # fmt: skip
        mine = row.get("rivals", {}).get(row.get("subject"), {})
        memory = {k: round(v, 2) for k, v in row.get("memory", {}).items() if isinstance(v, float)}
        wrong = (
            f"{mine['off']} {mine['times_the_budget']:.3g} times its budget"
            if "off" in mine
            else row.get("outcome", "")
        )
        body.append([_short(row["id"]), _ms(mine.get("ms")), "; ".join(others), memory or "–",
                     f"{mine['share_of_roofline']:.0%}" if "share_of_roofline" in mine else "–", wrong])  # fmt: skip
    return _table(["row", "fastroute, ms", "others, ms (times fastroute's)", "GB", "of the roofline", ""], body)


def page(found: Sequence[Record]) -> str:
    tests, stages = _tests(found), _of(found, "stage")
    counts = Counter(t["outcome"] for t in tests.values())
    wrong = [t for t in tests.values() if t["outcome"] in BAD]
    lines = list(_against_predictions(found))
    summary = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()) or "no test ran"
    dry = any(r.get("dry") for r in _of(found, "run"))
    parts = ["# The first minutes on a GPU" + " (dry run, no GPU)" * dry]
    parts.append(f"Tests: {summary}. Rows timed: {len(_of(found, 'row'))}. "
                 f"Tables: {len({t['table'] for t in _of(found, 'table')})}.")  # fmt: skip
    asked = [f"Mend `{t['id']}`: {str(t.get('message', ''))[:300]}" for t in wrong[:10]]
    asked += [f"Look at {t['name']}: {t['ended']}" for t in _of(found, "tool") if str(t["ended"]).startswith("exit")]
    asked += [what for _, what in lines if what and not dry]
    asked += [f"Rerun what had no time: {s['name']}" for s in stages if s["ended"] in ("time", "no time left")]
    parts += ["## Next", "\n".join(f"{k}. {what}" for k, what in enumerate(asked, 1)) or "Nothing stands out."]
    if wrong:
        body = [[t["id"], t["outcome"], t.get("seconds", ""), str(t.get("message", ""))[:600]] for t in wrong]
        parts += ["## Wrong", _table(["test", "", "s", "message"], body)]
    head = ["row", "who", "formula", "predicted, ms", "measured, ms", "times", ""]
    parts += ["## Measured against predicted", _table(head, [line for line, _ in lines])]
    parts += ["## Rivals", _rivals(found)]
    kernels = [[t["name"], k["kernel"], k["launches"], _ms(k["us"]), _ms(k["MB"]), _ms(k["tensor pipe, %"])]
               for t in _of(found, "tool") for k in t.get("kernels", ())]  # fmt: skip
    parts += ["## Tools", _table(["tool", "ended", "said"],
              [[t["name"], t["ended"], str(t.get("message", ""))[:300]] for t in _of(found, "tool")])]  # fmt: skip
    if kernels:
        parts.append(_table(["profile", "kernel", "launches", "us", "MB", "tensor pipe, %"], kernels))
    parts += ["## Tables", _table(["table", "value", "ms"],
              [[t["table"], t.get("value", ""), _ms(t["ms"]) if "ms" in t else t.get("message", "")]
               for t in _of(found, "table")])]  # fmt: skip
    hits, misses = (sum(r.get(k, 0) for r in _of(found, "cache")) for k in ("hits", "misses"))
    parts += ["## Machine", _table(["fact", "value"], [[r["name"], r["value"]] for r in _of(found, "fact")])]
    brought = sum(r["kernels"] for r in _of(found, "cached"))
    parts += [f"Kernels brought along: {brought}. Found in the cache: {hits}; compiled: {misses}."]
    parts += ["## Stages", _table(["stage", "ended", "s"], [[s["name"], s["ended"], s["seconds"]] for s in stages])]
    skipped = Counter(str(t.get("message", "")) for t in tests.values() if t["outcome"] == "skipped")
    if skipped:
        parts += ["## Skipped", _table(["why", "tests"], skipped.most_common(20))]
    return "\n\n".join(parts) + "\n"


def make(out: Path) -> Path:
    """Write the page of a folder."""
    path = out / NAME
    path.write_text(page(list(records.read(out / records.NAME))), encoding="utf-8")
    return path
