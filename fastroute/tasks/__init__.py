"""Task routing (Strezoski et al. 2019): a fixed random subset of the channels per task, hundreds of tasks in one."""

from .active import set_task
from .router import TaskRouter

__all__ = ["TaskRouter", "set_task"]
