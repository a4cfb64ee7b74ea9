"""Task routing (Strezoski et al. 2019): a fixed random subset of the channels per task, hundreds of tasks in one."""

from .active_task import on_task, set_task
from .export import Overlap, extract_task, mask_overlap
from .folding import fold
from .layers import RoutedConv2d, RoutedLinear
from .live_model import LiveSequential, live
from .router import TaskRouter
from .routing import route
from .vgg import VGG, vgg11, vgg11_bn

__all__ = [
    "VGG",
    "LiveSequential",
    "Overlap",
    "RoutedConv2d",
    "RoutedLinear",
    "TaskRouter",
    "extract_task",
    "fold",
    "live",
    "mask_overlap",
    "on_task",
    "route",
    "set_task",
    "vgg11",
    "vgg11_bn",
]
