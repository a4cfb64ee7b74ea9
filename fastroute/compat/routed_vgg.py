"""TaskRouting's second file beside its first: ``fastroute.compat.taskrouting.routed_vgg`` by a shorter path."""

from ..tasks.vgg import cfg
from .taskrouting.routed_vgg import VGG, make_layers, model_urls, vgg11, vgg11_bn

__all__ = ["VGG", "cfg", "make_layers", "model_urls", "vgg11", "vgg11_bn"]
