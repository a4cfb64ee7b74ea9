"""The ops: a folder each, whose roles ARCHITECTURE.md lists. ``fastroute.functional`` has their functions.

Examples:
    >>> z, weights = torch.ones(2, 3), torch.ones(2, 3)
    >>> fastroute.ops.combine(z, weights)  # an op's folder can be called
    tensor([3., 3.])
"""

import sys
from types import ModuleType
from typing import Any

from . import agent_policy as agent_policy
from . import batch_norm_mask_relu as batch_norm_mask_relu
from . import combine as combine
from . import dispatch as dispatch
from . import efficient_routing as efficient_routing
from . import expert_ffn as expert_ffn
from . import flops as flops
from . import grouped_linear as grouped_linear
from . import matrix_routing as matrix_routing
from . import policy as policy
from . import soft_assignment as soft_assignment
from . import task_mask as task_mask
from . import trajectory_loss as trajectory_loss
from . import vector_routing as vector_routing


class _Folder(ModuleType):
    """An op's folder. To call it is to call the op's function, as ``fastroute.ops.<op>`` was until version 0.1."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


for _name, _found in list(vars().items()):
    if isinstance(_found, ModuleType) and hasattr(_found, _name):
        sys.modules[_found.__name__].__class__ = _Folder
