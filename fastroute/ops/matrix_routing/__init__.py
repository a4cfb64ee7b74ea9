"""``matrix_routing``: routing of matrix capsules."""

from .op import matrix_routing as matrix_routing
