"""How near benchmarks come to what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..ops import checks
from .figures import INK, LINES, Figure, empty_figure, lined, saved


class _Row(NamedTuple):
    suite: str
    flops_per_byte: float
    gflops: float  #: a second
    share: float  #: of the roof above it


def roofline(
    results: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    *,
    peak: float | None = None,
    bandwidth: float | None = None,
    threads: int = 1,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Rows of benchmarks under the machine's roofline (Williams, Waterman and Patterson 2009).

    A row stands at (FLOPs / bytes of its algorithm, FLOPs / its time). It can be no higher than
    min(peak, bandwidth * FLOPs / bytes), the line. Rows without FLOPs are left out.

    Args:
        results: files of ``bench/results/``, or what is in them; all of one machine.
        peak: GFLOP/s that the processor can do. None: the most that a row or a floor (its products alone, by the
            library) reached in these results, which is less than the machine's own.
        bandwidth: GB/s of memory. None: the most that a row reached.
        threads: draw the rows of so many threads, by their CPU time (one thread) or wall time.
        title: shown above everything.
        path: a file to write, in the format of its suffix.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such row, or results are of different machines. TypeError: no results.

    Examples:
        >>> row = {"case": "a", "threads": 1, "GFLOP": 2.0, "GB": 0.1, "rivals": {"fastroute": {"ms": 50.0}}}
        >>> result = {"machine": {"cpu": "one"}, "benchmarks": [{"name": "test_a[x]", "extra_info": row}]}
        >>> figure = fastroute.plots.roofline(result, peak=100.0, bandwidth=10.0)
        >>> figure.axes[0].get_ylabel()
        'GFLOP/s'
    """
    given = [results] if isinstance(results, (str, Path, Mapping)) else results
    if not isinstance(given, Sequence) or not all(isinstance(r, (str, Path, Mapping)) for r in given):
        raise TypeError(f"results: expected a file of bench/results, or what is in one, got {checks.given(results)}")
    read = [r if isinstance(r, Mapping) else json.loads(Path(r).read_text()) for r in given]
    for r in read:
        if missing := {"machine", "benchmarks"} - set(r):
            raise ValueError(f"results: expected machine and benchmarks, got none of {', '.join(sorted(missing))}")
    machines = {str(r["machine"].get("cpu")) for r in read}
    if len(machines) > 1:
        raise ValueError(f"results: expected those of one machine, got {', '.join(sorted(machines))}")
    clock = "ms" if threads == 1 else "wall_ms"
    found, floors, fastest = [], [0.0], [0.0]
    for result in read:
        for benchmark in result["benchmarks"]:
            info = benchmark["extra_info"]
            took = info["rivals"].get("fastroute", {}).get(clock)
            if info["threads"] != threads or not took or not info.get("GB"):
                continue
            fastest.append(info["GB"] / took * 1e3)
            if not info.get("GFLOP"):
                continue
            floors += [info["GFLOP"] / floor[clock] * 1e3 for floor in (info.get("floors") or {}).values()]
            suite = benchmark["name"].partition("[")[0].removeprefix("test_")
            found.append((suite, info["GFLOP"] / info["GB"], info["GFLOP"] / took * 1e3))
    if not found:
        raise ValueError(f"results: expected a row of {threads} threads with FLOPs and bytes, got none")
    assumed = [] if peak is not None else ["peak"]
    assumed += [] if bandwidth is not None else ["bandwidth"]
    peak = max(*floors, *(gflops for *_, gflops in found)) if peak is None else peak
    bandwidth = max(fastest) if bandwidth is None else bandwidth
    rows = [_Row(suite, x, y, y / min(peak, bandwidth * x)) for suite, x, y in found]

    figure = empty_figure(7.2, 4.0, title)
    ax = figure.subplots()
    low = min(row.flops_per_byte for row in rows) / 2
    high = max(max(row.flops_per_byte for row in rows) * 2, 4 * peak / bandwidth)
    ridge = peak / bandwidth
    ends = (min(low, ridge / 4), ridge, high)
    ax.plot(ends, [min(peak, bandwidth * x) for x in ends], color=INK, linewidth=1.4)
    ax.annotate(f"{peak:.0f} GFLOP/s", (high, peak), xytext=(0, 4), textcoords="offset points", ha="right", fontsize=7)
    middle = (ends[0] * ridge) ** 0.5  # of the slope, on logarithmic axes
    ax.annotate(
        f"{bandwidth:.0f} GB/s", (middle, bandwidth * middle), xytext=(-6, 6), textcoords="offset points", ha="right",
        fontsize=7,
    )  # fmt: skip
    suites = sorted({row.suite for row in rows})
    for s, suite in enumerate(suites):
        style = LINES[s % len(LINES)]
        points = [row for row in rows if row.suite == suite]
        best = max(row.share for row in points)
        ax.scatter(
            [row.flops_per_byte for row in points],
            [row.gflops for row in points],
            s=26, c=style["color"], marker=style["marker"], edgecolors="white", linewidths=0.5, zorder=3,
            label=f"{suite} (best {best:.0%})",
        )  # fmt: skip
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("FLOPs per byte of the algorithm", fontsize=8)
    ax.set_ylabel("GFLOP/s", fontsize=8)
    lined(ax, title="share of the roof", title_fontsize=8)
    of = f"{next(iter(machines))}, {threads} thread{'s' if threads > 1 else ''}"
    if assumed:
        of += f"; {' and '.join(assumed)}: the most that was measured in these results"
    figure.supxlabel(of, fontsize=7, color="#555555")
    return saved(figure, path)
