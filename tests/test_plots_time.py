"""Pictures over time and of benchmarks: what they draw, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastroute
from fastroute import plots
from tests.helpers import seeds

pytest.importorskip("matplotlib")


def summaries(steps: int, modules: tuple[int, ...] = (3, 4)) -> list[fastroute.Summary]:
    seeds.manual_seed(0)
    layers: list[nn.Module] = []
    for K in modules:
        layers += [fastroute.REINFORCE(K, 5), fastroute.Selection(*(nn.Linear(5, 5) for _ in range(K)))]
    net = fastroute.Sequential(*layers)
    return [net(torch.randn(8, 5))[1].summary() for _ in range(steps)]


def test_shares_of_modules_over_steps(tmp_path: Path) -> None:
    seen = summaries(6)
    figure = plots.routing_over_time(seen, steps=[0, 5, 10, 15, 20, 25], title="t", path=tmp_path / "a.png")
    first, second = figure.axes[:2]
    for layer, (ax, K) in enumerate(((first, 3), (second, 4))):
        drawn = torch.from_numpy(ax.images[0].get_array().data)
        expected = torch.stack([s.layers[layer].counts.sum(0) for s in seen], 1) / 8
        assert drawn.shape == (K, 6) and torch.equal(drawn, expected.float())
        assert torch.allclose(drawn.sum(0), torch.ones(6))
    assert first.images[0].get_clim() == second.images[0].get_clim()
    assert [label.get_text() for label in second.get_xticklabels()] == ["0", "5", "10", "15", "20", "25"]
    assert (tmp_path / "a.png").stat().st_size > 3000


def test_counts_of_a_mixture_and_a_trajectory_do_too() -> None:
    counts = torch.tensor([[4, 0], [3, 1], [0, 0]])
    drawn = plots.routing_over_time(counts).axes[0].images[0].get_array()
    assert drawn.tolist() == [[1, 0.75, 0], [0, 0.25, 0]], "a step without samples is white"
    _, meta, _ = fastroute.Initialization()(torch.randn(4, 5))
    fastroute.REINFORCE(3, 5)(torch.randn(4, 5), meta)
    assert plots.routing_over_time([meta]).axes[0].images[0].get_array().shape == (3, 1)


def test_which_module_when(tmp_path: Path) -> None:
    actions = torch.tensor([[0, 3, 1], [2, -1, 1]])
    figure = plots.actions(actions, labels=["b", "a", "b"], path=tmp_path / "a.png")
    ax = figure.axes[0]
    drawn = ax.images[0].get_array()
    assert drawn.tolist() == [[3, None], [0, 2], [1, 1]], "sorted by label; what was not decided is white"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert sorted(text.get_text() for text in ax.texts) == ["0", "1", "1", "2", "3"]
    ink = {text.get_text(): text.get_color() for text in ax.texts}
    assert ink["3"] == "white" != ink["0"], "numbers are readable on their ground"


def test_shades_differ_in_grey() -> None:
    ax = plots.actions(torch.arange(6)[None]).axes[0]
    colours = torch.tensor(ax.images[0].cmap(ax.images[0].norm(range(6)))[:, :3])
    luminance = colours @ torch.tensor([0.299, 0.587, 0.114], dtype=colours.dtype)
    assert bool((luminance.diff() < -0.05).all())


def test_a_trajectorys_rows_are_its_tasks() -> None:
    _, meta, _ = fastroute.Initialization()(torch.randn(4, 5), tasks=torch.tensor([1, 0, 1, 0]))
    fastroute.REINFORCE(3, 5)(torch.randn(4, 5), meta)
    labels = plots.actions(meta).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["0", "1"]


def test_a_line_for_each_task(tmp_path: Path) -> None:
    history = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    figure = plots.weights(history, tasks=["a", "b"], steps=[1, 2, 4], path=tmp_path / "w.svg")
    ax = figure.axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines] == history.T.tolist()
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 4] and ax.get_yscale() == "linear"
    styles = {(line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(styles) == 2, "they can be told apart in grey"
    figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1, "the legend is outside of the data"
    assert plots.weights({"a": [1, 100], "b": [2, 2]}).axes[0].get_yscale() == "log"


def result(cpu: str = "one", **rows: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "machine": {"cpu": cpu},
        "benchmarks": [
            {
                "name": f"test_{name}[x]",
                "extra_info": {
                    "case": name, "threads": 1, "GFLOP": flop, "GB": byte,
                    "rivals": {"fastroute": {"ms": ms, "wall_ms": ms}}, "floors": {},
                },
            }
            for name, (flop, byte, ms) in rows.items()
        ],
    }  # fmt: skip


def test_rows_under_a_roof(tmp_path: Path) -> None:
    """At 2 FLOPs a byte memory of 10 GB/s allows 20 GFLOP/s, at 100 the peak of 50."""
    figure = plots.roofline(result(slow=(1.0, 0.5, 100.0), fast=(1.0, 0.01, 20.0)), peak=50.0, bandwidth=10.0)
    ax = figure.axes[0]
    points = {c.get_label(): c.get_offsets().tolist() for c in ax.collections}
    assert points == {"fast (best 100%)": [[100.0, 50.0]], "slow (best 50%)": [[2.0, 10.0]]}
    assert max(ax.lines[0].get_ydata()) == 50
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result(a=(1.0, 0.5, 100.0), mask=(0.0, 1.0, 10.0))))
    figure = plots.roofline(path, path=tmp_path / "r.png")
    assert "the most that was measured" in figure.get_supxlabel()
    assert [c.get_label() for c in figure.axes[0].collections] == ["a (best 100%)"]


COUNTS = torch.ones(3, 2)
BAD: dict[str, tuple[type[Exception], Any, str]] = {
    "summary type": (TypeError, lambda: plots.routing_over_time(["x"]), r"summaries\[0\]: expected a Trajectory or"),  # type: ignore[list-item]
    "no summary": (ValueError, lambda: plots.routing_over_time([]), "summaries: expected one at least"),
    "unlike": (ValueError, lambda: plots.routing_over_time([*summaries(1), *summaries(1, (3, 5))]), "same decisions"),
    "steps": (ValueError, lambda: plots.routing_over_time(COUNTS, steps=[1]), "steps: expected 3 numbers, .* got 1"),
    "rank": (ValueError, lambda: plots.routing_over_time(COUNTS[0]), r"summaries: expected 2 axes, .* got \[2\]"),
    "no actions": (TypeError, lambda: plots.actions([1]), r"trajectory: expected a Trajectory or its actions \[T, B\]"),  # type: ignore[arg-type]
    "floats": (ValueError, lambda: plots.actions(COUNTS), r"trajectory: expected actions \[T, B\], integers"),
    "labels": (ValueError, lambda: plots.actions(COUNTS.long(), labels=[1]), "labels: expected 2 of them"),
    "lengths": (ValueError, lambda: plots.weights({"a": [1], "b": [1, 2]}), r"history: expected .* got \[1, 2\]"),
    "words": (TypeError, lambda: plots.weights({"a": ["x"]}), r"history\['a'\]: expected numbers, got list"),  # type: ignore[dict-item]
    "names": (ValueError, lambda: plots.weights(COUNTS, tasks=["a"]), "tasks: expected 2 names, .* got 1"),
    "twice": (ValueError, lambda: plots.weights({"a": [1]}, tasks=["a"]), "tasks: expected None beside a history"),
    "machines": (ValueError, lambda: plots.roofline([result("a"), result("b")]), "results: expected those of one"),
    "threads": (ValueError, lambda: plots.roofline(result(a=(1, 1, 1)), threads=2), "results: expected a row of 2"),
}  # fmt: skip


@pytest.mark.parametrize(("error", "call", "message"), BAD.values(), ids=BAD)
def test_bad_input(error: type[Exception], call: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_arrow_passes_no_box_between(tmp_path: Path) -> None:
    """a -> c goes around b, which stands straight between them."""
    nodes = [
        {"name": "b", "layers": nn.ReLU()},
        {"name": "c", "layers": fastroute.Add(), "anchor_layer": ["root", "b"]},
    ]
    figure = plots.graph(fastroute.MTLModel(nodes, "c"), path=tmp_path / "g.png")
    arrows = [text for text in figure.axes[0].texts if text.get_text() == ""]
    bends = [a.arrow_patch.get_connectionstyle() for a in arrows if a.arrowprops and "connectionstyle" in a.arrowprops]
    assert len(bends) == 1 and abs(bends[0].rad) > 0.2
