"""The Triton backend of ``matrix_routing``: what its kernels' launcher offers (kernels/)."""

from ...kernels.matrix_routing.launch import (
    backward as backward,
)
from ...kernels.matrix_routing.launch import (
    folded as folded,
)
from ...kernels.matrix_routing.launch import (
    folded_backward as folded_backward,
)
from ...kernels.matrix_routing.launch import (
    folded_forward as folded_forward,
)
from ...kernels.matrix_routing.launch import (
    forward as forward,
)
from ...kernels.matrix_routing.launch import (
    unsupported as unsupported,
)
