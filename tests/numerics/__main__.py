"""The experiments behind the error budget.

    python -m tests.numerics power                  plants faults, writes numerics-power.json
    python -m tests.numerics alarms [--seeds N]     plain PyTorch against the budget, adds to numerics-alarms.json
    python -m tests.numerics write                  the tables of docs/numerics.md from both

``alarms`` measures the instruction set and threads that the environment asks for (docs/numerics.md has the commands).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.budget import LOOKS, NORMS, Excess, Yardstick, distance, size, yardstick_of
from tests.helpers.cases import Results, evaluate

from .faults import FAULTS, Planted
from .problems import PROBLEMS, USUAL, orders, problem, rows_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "numerics.md"
POWER, ALARMS = RESULTS / "numerics-power.json", RESULTS / "numerics-alarms.json"
F32 = torch.float32


def results(found: Results) -> Iterator[tuple[str, Tensor]]:
    return ((k, t) for k, t in found.items() if t is not None and t.is_floating_point() and t.numel())


def judged(yardstick: Yardstick, found: Results) -> list[Excess]:
    """Every result in both norms, after every draw."""
    return [excess for name, t in results(found) for excess in yardstick.excess(name, t, LOOKS[-1:])]


def _same(a: Results, b: Results) -> bool:
    return all(torch.equal(t, b[k]) for k, t in results(a))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- power

#: A fault that moves no result by more typical errors than this is lost among them.
LOST = 3.0


def old_budget(yardstick: Yardstick, plain: list[Results]) -> dict[tuple[str, str], float]:
    """What the budget was: twice the root mean square of plain PyTorch's error in some orders, and one rounding."""
    found = {}
    for name, t in results(plain[0]):
        exact = yardstick.exact[name]
        assert exact is not None
        for norm, p in NORMS:
            errors = [distance(r[name], exact, p) for r in plain]  # type: ignore[arg-type]
            rms = math.sqrt(sum(e * e for e in errors) / len(errors))
            found[name, norm] = 2 * rms + torch.finfo(t.dtype).eps * size(exact, p)
    return found


def effect(yardstick: Yardstick, found: Results, plain: Results) -> float:
    """How far the fault moves a result, in typical rounding errors of it: at least this where it is most."""
    moved = [0.0]
    for name, t in results(found):
        for _, p in NORMS:
            typical = statistics.fmean(yardstick.errors(name, t.dtype, p, LOOKS[-1][0]))
            if typical:
                moved.append(distance(t, plain[name], p) / typical)  # type: ignore[arg-type]
    return max(moved)


def verdict(
    yardstick: Yardstick, found: Results, plain: Results, old: dict[tuple[str, str], float]
) -> dict[str, float]:
    """How far a fault moves results, and the largest share that one takes of the new budget and of the old one."""
    if any(not t.isfinite().all() for _, t in results(found)):
        return dict.fromkeys(("effect", "new", "old"), math.inf)
    by = judged(yardstick, found)
    return {
        "effect": effect(yardstick, found, plain),
        "new": max(e.times for e in by),
        "old": max(e.error / limit for e in by if (limit := old[e.name, e.norm])),
    }


def power_of(op: str, seed: int = 0, rows: int | None = None) -> dict[str, Any]:
    truth, case, letters = problem(op, seed, rows or rows_of(op))
    yardstick = yardstick_of(truth, case, F32)
    with Planted(FAULTS[0], place=-1):  # none, but taken apart alike
        plain = evaluate(truth, case)
    draws = [plain, *(back(evaluate(truth, turned)) for turned, back in orders(case, letters, 3))]
    old = old_budget(yardstick, draws)
    new = {(e.name, e.norm): e for e in judged(yardstick, plain)}
    width = {key: new[key].allowed / old[key] for key in old if old[key]}
    row: dict[str, Any] = {
        "plain": max(e.times for e in new.values()),
        "width": {norm: statistics.geometric_mean(w for (_, n), w in width.items() if n == norm) for norm, _ in NORMS},
        "widest": max(width.values()),
        "faults": {},
    }
    for fault in FAULTS:
        places, place = [], 0
        while True:
            with Planted(fault, place) as planted:
                found = evaluate(truth, case)
            if place >= planted.places:
                break
            if not _same(found, plain):
                places.append(verdict(yardstick, found, plain, old))
            place += 1
        row["faults"][fault] = places
    return row


def power() -> None:
    table = {}
    for op in PROBLEMS:
        began = time.perf_counter()
        table[op] = power_of(op)
        caught = {f: f"{sum(p['new'] > 1 for p in ps)}/{len(ps)}" for f, ps in table[op]["faults"].items()}
        print(f"{op} ({time.perf_counter() - began:.0f} s): {caught}", flush=True)
    POWER.write_text(json.dumps({"machine": machine(), "ops": table}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- alarms

#: Shares of the budget whose exceeding is counted.
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def alarms(seeds: range, count: int, cache: Path) -> None:
    """Of every op, plain PyTorch in ``count`` orders of summation for every seed."""
    made: dict[str, Any] = {}
    for seed in seeds:
        for op in PROBLEMS:
            truth, case, letters = problem(op, seed, USUAL)
            known = cache / f"{op}-{seed}.pt"
            if known.exists():
                exact, allowed = torch.load(known, weights_only=True)
            else:
                yardstick = yardstick_of(truth, case, F32)
                allowed = [(e.name, e.norm, e.allowed) for e in judged(yardstick, evaluate(truth, case))]
                exact = yardstick.exact
                torch.save((exact, allowed), known)
            row = made.setdefault(op, {"comparisons": 0, "cases": 0, "largest": 0.0, "above": [0] * len(LEVELS)})
            row["cases"] += 1
            norms = dict(NORMS)
            for turned, back in orders(case, letters, count):
                found = back(evaluate(truth, turned))
                for name, norm, limit in allowed:
                    share = distance(found[name], exact[name], norms[norm]) / limit if limit else 0.0  # type: ignore[arg-type]
                    row["comparisons"] += 1
                    row["largest"] = max(row["largest"], share)
                    for k, level in enumerate(LEVELS):
                        row["above"][k] += share > level
        print(seed, {op: f"{row['largest']:.2f}" for op, row in made.items()}, flush=True)
    entry = {
        "isa": os.environ.get("ATEN_CPU_CAPABILITY", "best"), "threads": torch.get_num_threads(),
        "machine": machine(), "seeds": [seeds.start, seeds.stop], "orders": count, "ops": made,
    }  # fmt: skip
    every = json.loads(ALARMS.read_text()) if ALARMS.exists() else []
    ALARMS.write_text(json.dumps([*every, entry], indent=1) + "\n")


def machine() -> dict[str, Any]:
    from bench.harness import machine as facts

    return facts() | {"date": time.strftime("%Y-%m-%d")}


# ----------------------------------------------------------------------------------------------------------- write


def _power_table(ops: dict[str, Any]) -> str:
    lines = ["| op | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for op, row in ops.items():
        cells = []
        for fault in FAULTS:
            shown = [p for p in row["faults"][fault] if p["effect"] > LOST]
            lost = len(row["faults"][fault]) - len(shown)
            caught, old = (sum(p[rule] > 1 for p in shown) for rule in ("new", "old"))
            least = min((p["new"] for p in shown), default=0.0)
            text = f"{caught} of {len(shown)}, least {least:.2g}× ({old})" if shown else "–"
            cells.append(text + (f"; {lost} lost" if lost else ""))
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _width_table(ops: dict[str, Any]) -> str:
    lines = [
        "| op | largest entry | Frobenius norm | widest result | plain PyTorch's largest share |",
        "|---" * 5 + "|",
    ]
    for op, row in ops.items():
        widths = " | ".join(f"{row['width'][norm]:.2f}" for norm, _ in NORMS)
        lines.append(f"| {op} | {widths} | {row['widest']:.2f} | {row['plain']:.2f} |")
    return "\n".join(lines)


def _alarm_table(entries: list[dict[str, Any]]) -> str:
    heads = ("instruction set", "threads", "cases", "comparisons", *(f"above {v:g}" for v in LEVELS), "largest")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    total = [0] * (2 + len(LEVELS))
    for entry in entries:
        rows = entry["ops"].values()
        above = [sum(row["above"][k] for row in rows) for k in range(len(LEVELS))]
        counts = [sum(row["cases"] for row in rows), sum(row["comparisons"] for row in rows), *above]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        largest = max((row["largest"], op) for op, row in entry["ops"].items())
        cells = [entry["isa"], entry["threads"], *(f"{n:,}" for n in counts), f"{largest[0]:.2f} ({largest[1]})"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append(f"| all | | {' | '.join(f'{n:,}' for n in total)} | |")
    return "\n".join(lines)


def write() -> None:
    text, measured = PAGE.read_text(), json.loads(POWER.read_text())
    tables = {
        "power": _power_table(measured["ops"]), "width": _width_table(measured["ops"]),
        "alarms": _alarm_table(json.loads(ALARMS.read_text())),
    }  # fmt: skip
    for name, table in tables.items():
        head, tail = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(head)
        _, after = rest.split(tail)
        text = f"{before}{head}\n{table}\n{tail}{after}"
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.numerics", description=__doc__)
    parser.add_argument("what", choices=("power", "alarms", "write"))
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument("--orders", type=int, default=100, help="orders of summation (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="where budgets are kept for runs under other instruction sets")
    args = parser.parse_args()
    if args.what == "power":
        power()
    elif args.what == "write":
        write()
    else:
        if args.cache is None:
            sys.exit("alarms: needs --cache DIR")
        args.cache.mkdir(parents=True, exist_ok=True)
        alarms(range(args.first, args.first + args.seeds), args.orders, args.cache)


if __name__ == "__main__":
    main()
