"""The Triton backend of ``matrix_routing``: what its kernels' launcher offers (kernels/)."""

from ...kernels.matrix_routing import launch

backward, folded, folded_backward = launch.backward, launch.folded, launch.folded_backward
folded_forward, forward, unsupported = launch.folded_forward, launch.forward, launch.unsupported
