"""Where decisions keep what they know."""

from fastroute.networks.decisions import ApproxPolicyStorage, TabularPolicyStorage

__all__ = ["ApproxPolicyStorage", "TabularPolicyStorage"]
