"""Multi-task models from a list of dicts: a graph of layers that is checked and scheduled once.

Examples:
    >>> nodes = [{"name": t, "layers": nn.Linear(8, 1), "loss": nn.MSELoss()} for t in ("price", "rent")]
    >>> model = fastroute.MTLModel(nodes, ["price", "rent"], weighting="uncertainty")
    >>> total, each = model.loss(model(torch.randn(4, 8)), {"price": torch.randn(4, 1), "rent": torch.randn(4, 1)})
    >>> total.backward()
"""

from .adapters import EachTask, OfTask, ToTasks, Unpack
from .cross_stitch import CrossStitch
from .expert_bank import Experts
from .experts import CGC, PLE, MMoE
from .loss import task_losses
from .metrics import F1 as F1  # metrics are not in __all__: their names say little outside of this package
from .metrics import L1 as L1
from .metrics import Accuracy as Accuracy
from .metrics import TaskMetrics, relative_improvement
from .model import MTLModel
from .multihead import MultiHead
from .weighting import (
    DWA,
    FAMO,
    IMTL,
    RLW,
    STCH,
    EqualWeights,
    FixedWeights,
    GeometricMean,
    LearnedWeights,
    Uncertainty,
    Weighting,
    as_weighting,
)
from .wrapping import Add, Concat, Lambda, Multiply, SimpleSelect, SliceSelect, Split
from .wrapping import Stack as Stack  # not in __all__: fastroute.Stack is that of fastroute.networks

__all__ = ["Add", "Concat", "Lambda", "MTLModel", "Multiply", "SimpleSelect", "SliceSelect", "Split"]
__all__ += ["DWA", "FAMO", "IMTL", "RLW", "STCH", "EqualWeights", "FixedWeights", "GeometricMean", "LearnedWeights"]
__all__ += [
    "MultiHead",
    "TaskMetrics",
    "Uncertainty",
    "Weighting",
    "as_weighting",
    "relative_improvement",
    "task_losses",
]
__all__ += ["CGC", "PLE", "CrossStitch", "EachTask", "Experts", "MMoE", "OfTask", "ToTasks", "Unpack"]
