"""The routed VGG.

Upstream's cannot run: its heads take twice as many inputs as there are. These fit. Nothing is downloaded:
``pretrained`` is the path of torchvision's file. ``vgg11_bn`` has no batch norm, as upstream's, so that checkpoints
fit; that of ``fastroute.tasks`` has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastroute import tasks
from fastroute.tasks import vgg
from fastroute.tasks.active_task import Task, TaskAware
from fastroute.tasks.vgg import cfg

from ...ops.arguments import checked
from .taskrouting import TaskRouter

__all__ = ["VGG", "vgg11", "vgg11_bn"]

#: Where torchvision has its files. Nothing here reads it: ``pretrained`` is a path.
model_urls = {
    "vgg11": "https://download.pytorch.org/models/vgg11-bbd30ac9.pth",
    "vgg11_bn": "https://download.pytorch.org/models/vgg11_bn-6002323d.pth",
}


class VGG(tasks.VGG):
    """``fastroute.tasks.VGG``, whose ``set_active_task`` is for the heads alone, as upstream's.

    ``model.apply`` of a function that sets it everywhere, or ``fastroute.set_task``, reaches the routers, too.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_active" in state:
            super().__setstate__(state)
            return
        # a whole model that TaskRouting's own classes pickled
        super().__setstate__({name: value for name, value in state.items() if name != "active_task"})
        self.unused_grad = "none"
        self.set_active_task(state["active_task"])

    def set_active_task(self, active_task: Task) -> Task:
        """Work with a task's head from now on; returns it."""
        return TaskAware.set_active_task(self, active_task)


@checked
def make_layers(cfg: Iterable[int | str], task_count: int, sigma: vgg.Sigma, batch_norm: bool = False) -> nn.Sequential:
    """Layers of a configuration, with a router before every ReLU; ``sigma`` is the fraction of units off."""
    return vgg.layers(cfg, batch_norm, lambda width, name: TaskRouter(width, task_count, int(width * sigma), name))


@checked
def vgg11(
    pretrained: vgg.Pretrained = False,
    task_count: int = 10,
    sigma: vgg.Sigma = 0.5,
    **kwargs: Any,
) -> VGG:
    """VGG-11, without batch norm."""
    return vgg.build(VGG, "vgg11", lambda: make_layers(cfg["A"], task_count, sigma), pretrained, task_count, kwargs)


@checked
def vgg11_bn(
    pretrained: vgg.Pretrained = False,
    task_count: int = 10,
    sigma: vgg.Sigma = 0.5,
    **kwargs: Any,
) -> VGG:
    """The same, as upstream's."""
    return vgg11(pretrained, task_count, sigma, **kwargs)
