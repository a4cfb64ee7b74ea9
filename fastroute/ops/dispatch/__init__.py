"""``dispatch``: samples sorted by the modules that their actions name."""

from .contract import Plan as Plan
from .op import as_actions as as_actions
from .op import as_entries as as_entries
from .op import check_all_named as check_all_named
from .op import plan as plan
from .reference import bounds_of as bounds_of
from .reference import module_of_row as module_of_row
