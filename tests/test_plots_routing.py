"""The picture of a routing: what it shows, what it refuses, and that a file comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastroute import plots
from fastroute.networks import REINFORCE, Initialization, Trajectory
from tests.helpers.extras import without

matplotlib_image = pytest.importorskip("matplotlib.image")


def routed(actions: list[list[int]], choices: list[int], tasks: list[Any] | None, mask: Any = None) -> Trajectory:
    """A trajectory with these actions, decision by decision."""
    x, meta, _ = Initialization()(torch.zeros(len(actions[0]), 2), tasks if tasks is not None else ())
    for forced, K in zip(actions, choices, strict=True):
        REINFORCE(K, 2).eval()(x, meta, mask=mask, forced_actions=torch.tensor(forced, dtype=torch.int64))
    return meta


TWO = routed([[0, 0, 1, 2], [3, 3, 3, 0]], [3, 4], [5, 5, 5, 7])


def shares(figure: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(ax.images[0].get_array().data) for ax in figure.axes if ax.images]


@pytest.mark.parametrize("given", [TWO, TWO.summary()], ids=["trajectory", "summary"])
def test_a_map_per_decision(given: Any, tmp_path: Path) -> None:
    path = tmp_path / "routing.png"
    figure = plots.routing(given, title="who goes where", path=path)
    first, second = shares(figure)
    torch.testing.assert_close(first, torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 1]], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([[0, 0, 0, 1.0], [1, 0, 0, 0]], dtype=torch.float64))
    assert figure.get_suptitle() == "who goes where"
    assert [ax.get_title() for ax in figure.axes[:2]] == ["0: REINFORCE", "1: REINFORCE"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["5", "7"]
    numbers = [(t.get_position(), t.get_text()) for t in figure.axes[0].texts]
    assert numbers == [((0, 0), "2"), ((1, 0), "1"), ((2, 1), "1")]
    drawn = matplotlib_image.imread(path)
    width, height = (figure.get_size_inches() * figure.dpi).round().astype(int)
    assert drawn.shape == (height, width, 4) and drawn.std() > 0.05


@pytest.mark.parametrize("name", ["routing.svg", "routing.pdf"])
def test_the_suffix_is_the_format(tmp_path: Path, name: str) -> None:
    plots.routing(TWO, path=tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_without_tasks_there_is_one_row() -> None:
    figure = plots.routing(routed([[0, 1, 1]], [2], None))
    assert shares(figure)[0].shape == (1, 2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["all"]


def test_a_task_that_was_not_decided_for_has_an_empty_row() -> None:
    mask = torch.tensor([True, True, False])
    (share,) = shares(plots.routing(routed([[0, 1, 1]], [2], ["a", "a", "b"], mask)))
    assert share.sum(1).tolist() == [1, 0]


def test_many_tasks_and_modules_have_no_numbers_and_few_ticks(tmp_path: Path) -> None:
    wide = list(range(100))
    figure = plots.routing(routed([wide, [0] * 100], [100, 1], wide), path=tmp_path / "routing.png")
    assert not figure.axes[0].texts and len(figure.axes[0].get_yticklabels()) <= 32
    width, height = figure.get_size_inches()
    assert width < 14 and height < 14


BAD: dict[str, tuple[type[Exception], Any, str]] = {
    "actions": (TypeError, torch.zeros(3, 2), "trajectory: expected a Trajectory or its summary.*, got Tensor"),
    "nothing": (TypeError, None, "trajectory: expected a Trajectory .*, got NoneType"),
    "no decision": (ValueError, Trajectory(3), "expected a decision and a sample .*, got 0 decisions of 3 samples"),
    "no sample": (ValueError, routed([[]], [2], None), "got 1 decisions of 0 samples"),
}


@pytest.mark.parametrize(("error", "given", "message"), BAD.values(), ids=BAD)
def test_bad_input(error: type[Exception], given: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        plots.routing(given)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    without("matplotlib", monkeypatch)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'fastroute\[plots\]'"):
        plots.routing(TWO)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("", OSError, "cannot be written .a folder"),
        ("/", OSError, "cannot be written .a folder"),
        ("x.unknown", ValueError, r"^path: expected a file's name that ends in one of .*png.*, got 'x.unknown'"),
    ],
)
def test_a_path_that_is_no_files_name_is_refused_by_name(name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plots.actions(torch.tensor([[0, 1]]), path=name)
