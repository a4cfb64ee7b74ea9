"""Every op's function, as in ``torch.nn.functional``.

Examples:
    >>> plan = fastroute.ops.dispatch.plan(torch.tensor([0, 2, 2]), modules=3)
    >>> fastroute.functional.grouped_linear(torch.randn(3, 8), plan, torch.randn(3, 4, 8)).shape
    torch.Size([3, 4])
"""

from .ops.agent_policy.op import agent_policy
from .ops.batch_norm_mask_relu.op import batch_norm_mask_relu
from .ops.combine.op import combine
from .ops.efficient_routing.op import efficient_routing
from .ops.expert_ffn.op import expert_ffn
from .ops.grouped_linear.op import grouped_linear
from .ops.matrix_routing.op import matrix_routing
from .ops.policy.op import policy
from .ops.soft_assignment.op import soft_assignment
from .ops.task_mask.op import task_mask
from .ops.trajectory_loss.op import trajectory_loss
from .ops.vector_routing.op import vector_routing

__all__ = [
    "agent_policy",
    "batch_norm_mask_relu",
    "combine",
    "efficient_routing",
    "expert_ffn",
    "grouped_linear",
    "matrix_routing",
    "policy",
    "soft_assignment",
    "task_mask",
    "trajectory_loss",
    "vector_routing",
]
