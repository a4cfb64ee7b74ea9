"""``soft_assignment``: soft assignment of inputs to outputs, and the outputs' sums."""

from .op import soft_assignment as soft_assignment
