"""The Triton backend of ``vector_routing``: what its kernels' launcher offers (kernels/)."""

from ...kernels.vector_routing.launch import backward as backward
from ...kernels.vector_routing.launch import forward as forward
from ...kernels.vector_routing.launch import unsupported as unsupported
