"""The contracts: one registered op per file, its checks, its fake, its gradient, and the choice of a backend."""

from . import dispatch as dispatch
from .efficient_routing import efficient_routing as efficient_routing
from .grouped_linear import grouped_linear as grouped_linear
from .policy import policy as policy
from .task_mask import batch_norm_mask_relu as batch_norm_mask_relu
from .task_mask import task_mask as task_mask
from .vector_routing import vector_routing as vector_routing
