"""The Triton backend of ``soft_assignment``: what its kernels' launcher offers (kernels/)."""

from ...kernels.soft_assignment import backward as backward
from ...kernels.soft_assignment import forward as forward
from ...kernels.soft_assignment import unsupported as unsupported
