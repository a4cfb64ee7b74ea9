"""The contracts: one registered op per file, its checks, its fake, its gradient, and the choice of a backend."""

from . import _flops as _flops
from . import dispatch as dispatch
from .agent_policy import agent_policy as agent_policy
from .combine import combine as combine
from .efficient_routing import efficient_routing as efficient_routing
from .expert_ffn import expert_ffn as expert_ffn
from .grouped_linear import grouped_linear as grouped_linear
from .matrix_routing import matrix_routing as matrix_routing
from .policy import policy as policy
from .soft_assignment import soft_assignment as soft_assignment
from .task_mask import batch_norm_mask_relu as batch_norm_mask_relu
from .task_mask import task_mask as task_mask
from .trajectory_loss import trajectory_loss as trajectory_loss
from .vector_routing import vector_routing as vector_routing
