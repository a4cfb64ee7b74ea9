"""plots.masks draws what the routers hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastroute.tasks import TaskRouter, mask_overlap
from tests.tasks.nets import T, conv_net, generator

pytest.importorskip("matplotlib")
from fastroute import plots


def test_maps_hold_the_masks(tmp_path: Path) -> None:
    model = conv_net()
    figure = plots.masks(model, title="masks", path=tmp_path / "masks.png")
    routers = [m for m in model.modules() if isinstance(m, TaskRouter)]
    *maps, shared = [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]
    assert len(maps) == len(routers)
    for ax, router in zip(maps, routers, strict=True):
        drawn = torch.as_tensor(ax.images[0].get_array())
        assert torch.equal(drawn, (router.get_unit_mapping() != 0).float())
    assert torch.equal(torch.as_tensor(shared.images[0].get_array()), mask_overlap(model).overall)
    assert len(shared.texts) == T * T
    assert (tmp_path / "masks.png").stat().st_size > 1000


def test_one_router_of_many_tasks() -> None:
    router = TaskRouter(16, 100, 0.5, generator=generator())
    figure = plots.masks(router, measure="shared")
    assert figure.axes[0].get_title().startswith("router: 16 units, 50% on")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"got none in Linear"):
        plots.masks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"measure"):
        plots.masks(conv_net(), measure="cosine")
