"""Begin, choose, and learn."""

from .Initialization import Initialization
from .Loss import Loss
from .Selection import Selection

__all__ = ["Initialization", "Loss", "Selection"]
