"""The picture of a multi-task model: what it shows, what it refuses, and that a file comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastroute import plots
from fastroute.multitask import MTLModel
from tests.helpers.extras import without
from tests.helpers.multitask import README_TASKS, readme

matplotlib_image = pytest.importorskip("matplotlib.image")


def places(figure: Any) -> dict[str, tuple[float, float]]:
    return {t.get_text().split("\n")[0]: t.get_position() for t in figure.axes[0].texts if t.get_text()}


def test_every_node_is_right_of_its_anchors(tmp_path: Path) -> None:
    path = tmp_path / "graph.png"
    model = MTLModel(readme(), README_TASKS)
    figure = plots.graph(model, title="three tasks", path=path)
    found = places(figure)
    assert set(found) == set(model.g.nodes) and len(set(found.values())) == 8
    assert all(found[a][0] < found[b][0] for a, b in model.g.edges)
    arrows = [t for t in figure.axes[0].texts if not t.get_text()]
    assert len(arrows) == 8 and figure.get_suptitle() == "three tasks"
    drawn = matplotlib_image.imread(path)
    width, height = (figure.get_size_inches() * figure.dpi).round().astype(int)
    assert drawn.shape == (height, width, 4) and drawn.std() > 0.05


def test_what_is_said_of_nodes() -> None:
    model = MTLModel(readme(), ["Task1", "Task3"])
    model.losses["Task1"] = nn.functional.l1_loss
    said = {t.get_text(): t for t in plots.graph(model).axes[0].texts if t.get_text()}
    assert {"Task1\nl1_loss x 1.0", "Task2\nBCEWithLogitsLoss x 1.0", "Task3\nMSELoss x learned"} < said.keys()
    assert {"root", "CatTask\nConcat", "FNN\nSequential"} < said.keys()
    dark = {text for text, t in said.items() if t.get_color() == "white"}
    grey = {text.split("\n")[0] for text, t in said.items() if t.get_color() == "#aaaaaa"}
    assert {text.split("\n")[0] for text in dark} == {"Task1", "Task3"} and grey == {"Task2"} == set(model.unused)


@pytest.mark.parametrize("name", ["graph.svg", "graph.pdf"])
def test_the_suffix_is_the_format(tmp_path: Path, name: str) -> None:
    plots.graph(MTLModel(readme(), README_TASKS), path=tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_hundreds_of_nodes_are_dots() -> None:
    layers = [{"name": f"t{k}", "layers": nn.Identity()} for k in range(300)]
    figure = plots.graph(MTLModel(layers, ["t0"]))
    assert not places(figure) and len(figure.axes[0].lines) == 301
    width, height = figure.get_size_inches()
    assert width < 41 and height < 15


def test_no_nodes() -> None:
    assert list(places(plots.graph(MTLModel([], [])))) == ["root"]


@pytest.mark.parametrize("given", [None, nn.Linear(2, 2), torch.ones(2)])
def test_bad_input(given: Any) -> None:
    with pytest.raises(TypeError, match=f"model: expected an MTLModel, got {type(given).__name__}"):
        plots.graph(given)


def test_without_matplotlib_and_networkx(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MTLModel(readme(), README_TASKS)
    without("networkx", monkeypatch)
    assert len(places(plots.graph(model))) == 8
    without("matplotlib", monkeypatch)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'fastroute\[plots\]'"):
        plots.graph(model)
