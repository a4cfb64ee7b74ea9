"""A run's log, with what is wrong with it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loggers import FILE
from ..ops.arguments import checked

_LARGE, _SMALL = 1e301, 1e-301  #: sums and differences of what is smaller are finite, quotients of what is larger


class CannotReport(Exception):
    """There is nothing to report; the message says why."""


@dataclass
class Run:
    """The numbers of a run by name, each as long as ``steps``; NaN where a step lacks one."""

    path: Path
    steps: list[int]
    numbers: dict[str, list[float]]
    times: list[float]  #: seconds since 1970, NaN where a line has none
    remarks: list[str] = field(default_factory=list)  #: what was wrong with the file

    def last(self, name: str) -> float | None:
        """The last number that there is under a name."""
        return next((v for v in reversed(self.numbers.get(name, [])) if not math.isnan(v)), None)


@checked
def read_run(folder: str | Path) -> Run:
    """Read a run's folder, or the file in it.

    Raises:
        CannotReport: no such folder, no log in it, or no line of the log can be read.
    """
    path = Path(folder)
    if path.is_dir():
        path = path / FILE
        if not path.is_file():
            inside = sorted(str(p.parent) for p in Path(folder).glob(f"*/{FILE}"))
            inside += sorted(str(p.parent) for p in Path(folder).glob(f"*/*/{FILE}"))
            hint = f"; there is one in {', '.join(inside[:4])}" if inside else ""
            raise CannotReport(f"{folder}: expected {FILE} in it, as fastroute.loggers.RunLog writes, found none{hint}")
    if not path.is_file():
        raise CannotReport(f"{folder}: expected the folder of a run, found none")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CannotReport(f"{path}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise CannotReport(f"{path}: expected lines of JSON, got an empty file: nothing was logged yet")
    by_step: dict[int, tuple[dict[str, float], float]] = {}
    bad: list[int] = []
    again, odd = set[int](), 0
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _parse(line)
        if found is None:
            bad.append(number)
            continue
        step, numbers, when, strange = found
        odd += strange
        before = by_step.get(step, ({}, 0.0))[0]
        if before.keys() & numbers.keys():
            again.add(step)
        by_step[step] = ({**before, **numbers}, when)
    if not by_step:
        raise CannotReport(
            f'{path}: expected lines {{"step": ..., "numbers": {{...}}}}, as fastroute.loggers.RunLog writes, '
            f"got {len(bad)} other lines"
        )
    steps = sorted(by_step)
    names = dict.fromkeys(name for step in steps for name in by_step[step][0])
    table = {name: [by_step[step][0].get(name, math.nan) for step in steps] for name in names}
    run = Run(path, steps, table, [by_step[step][1] for step in steps])
    run.remarks = _remarks(bad, len(lines), not text.endswith(b"\n"), len(again), odd, by_step)
    return run


def _parse(line: bytes) -> tuple[int, dict[str, float], float, int] | None:
    """(step, numbers, time, how many values are none); None for a line that is not a log's."""
    try:
        made: Any = json.loads(line)
        step, given = made["step"], made["numbers"]
        if type(step) is not int or abs(step) >= 1 << 63 or not isinstance(given, dict):
            return None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers, odd = {}, 0
    for name, value in given.items():
        number = _number(value)
        if number is None:
            odd += 1
        else:
            numbers[name] = number
    when = _number(made.get("time"))
    return step, numbers, math.nan if when is None else when, odd


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    if abs(number) < _SMALL:
        return 0.0
    return math.copysign(math.inf, number) if abs(number) >= _LARGE else number


def _remarks(
    bad: list[int],
    lines: int,
    unfinished: bool,
    again: int,
    odd: int,
    by_step: dict[int, tuple[dict[str, float], float]],
) -> list[str]:
    made = []
    if unfinished and bad and bad[-1] == lines:
        made.append(f"The last line, {bad.pop()}, is unfinished: the run was cut off, or is being written.")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        made.append(f"{_count(len(bad), 'line is', 'lines are')} no log line and left out ({shown}).")
    if again:
        made.append(f"{_count(again, 'step was', 'steps were')} logged more than once: the last value counts.")
    if odd:
        made.append(f"{_count(odd, 'value is', 'values are')} no number and left out.")
    infinite = {n for numbers, _ in by_step.values() for n, v in numbers.items() if not math.isfinite(v)}
    if infinite:
        shown = ", ".join(sorted(infinite)[:5]) + (", ..." if len(infinite) > 5 else "")
        made.append(f"NaN or infinite, and not drawn where it is: {shown}.")
    return made


def _count(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"
