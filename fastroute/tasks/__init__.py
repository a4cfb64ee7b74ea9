"""Task routing (Strezoski et al. 2019): a fixed random subset of the channels per task, hundreds of tasks in one.

Examples:
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> net = fastroute.live(fastroute.route(net, task_count=100, sigma=0.5))
    >>> net(torch.randn(4, 3, 8, 8), torch.tensor([0, 7, 7, 99])).shape
    torch.Size([4, 2])
"""

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
