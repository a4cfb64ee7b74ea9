"""Routing layers for PyTorch: capsule routing and routing networks on fused kernels, with plain-PyTorch references."""

from . import networks as networks
from . import ops as ops
from . import tasks as tasks
from .capsules import EfficientVectorRouting as EfficientVectorRouting
from .capsules import GenerativeMatrixRouting as GenerativeMatrixRouting
from .capsules import credit_assignment as credit_assignment
from .networks import *  # noqa: F403  (its __all__: decisions, rewards, Selection, Loss, ...)
from .ops._backends import BackendUnavailable as BackendUnavailable
from .ops._backends import explain as explain
from .ops._backends import strict as strict
from .ops._backends import use_backend as use_backend
from .tasks import *  # noqa: F403

__version__ = "0.1.0"
