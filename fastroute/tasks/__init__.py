"""Task routing (Strezoski et al. 2019): a fixed random subset of the channels per task, hundreds of tasks in one."""

from .active import set_task
from .router import TaskRouter
from .vgg import VGG, vgg11, vgg11_bn

__all__ = ["VGG", "TaskRouter", "set_task", "vgg11", "vgg11_bn"]
