"""TaskRouting's import paths: ``taskrouting`` and ``routed_vgg``, with ``fastroute.compat.taskrouting.`` in front.

Same arguments, random draws, state dicts and numbers, its gradient included. Where TaskRouting cannot run, this does:
any rank from two up, any device, heads of the VGG that fit its features, a task per sample. It prints nothing.

>>> import numpy, torch
>>> from fastroute.compat.taskrouting.taskrouting import TaskRouter
>>> numpy.random.seed(0)
>>> router = TaskRouter(8, 4, 3)  # 8 units, 4 tasks, 3 units off for each
>>> router.set_active_task(1)
1
>>> x = torch.ones(2, 8, 1, 1)
>>> router(x) is x, x[0].flatten().tolist()
(True, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
"""

from typing import Any

from . import routed_vgg, taskrouting
from .taskrouting import TaskRouter

__all__ = ["TaskRouter", "routed_vgg", "taskrouting"]


def __getattr__(name: str) -> Any:
    if name == "device":  # looked up when asked for: it asks for a GPU
        return taskrouting.device
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
