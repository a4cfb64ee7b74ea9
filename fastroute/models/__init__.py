"""Networks from the papers: constructed as published, for other sizes by arguments.

``fastroute train NAME`` trains each on handwritten digits; `docs/models.md` has recipes and results.
"""

from ..tasks import vgg11, vgg11_bn
from .capsule_head import CapsuleClassifier, CapsuleHead
from .routed_cnn import RoutedCNN
from .small_norb import SmallNORB
from .task_vgg import routed_vgg

__all__ = ["CapsuleClassifier", "CapsuleHead", "RoutedCNN", "SmallNORB", "routed_vgg", "vgg11", "vgg11_bn"]
