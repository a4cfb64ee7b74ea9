"""The decisions: every class of Routing Networks, by how it learns."""

from .actor_critic import AAC, WPL, ActorCritic, BootstrapAAC, EGreedyAAC
from .base import Decision
from .fixed import PassThrough, PerTaskAssignment
from .policy_gradient import REINFORCE, EGreedyREINFORCE, REINFORCEBl1, REINFORCEBl2
from .reparameterised import RELAX, GumbelSoftmax
from .storage import ApproxPolicyStorage, TabularPolicyStorage
from .value_based import SARSA, AdvantageLearning, BootstrapAdvantageLearning, QLearning, SurpriseLearning

__all__ = [
    "AAC",
    "REINFORCE",
    "RELAX",
    "SARSA",
    "WPL",
    "ActorCritic",
    "AdvantageLearning",
    "ApproxPolicyStorage",
    "BootstrapAAC",
    "BootstrapAdvantageLearning",
    "Decision",
    "EGreedyAAC",
    "EGreedyREINFORCE",
    "GumbelSoftmax",
    "PassThrough",
    "PerTaskAssignment",
    "QLearning",
    "REINFORCEBl1",
    "REINFORCEBl2",
    "SurpriseLearning",
    "TabularPolicyStorage",
]
