"""The classes that decide."""

from .Decision import Decision
from .Others.GumbelSoftmax import GumbelSoftmax
from .Others.PerTaskAssignment import PerTaskAssignment
from .Others.RELAX import RELAX
from .ReinforcementLearning.AAC import AAC, BootstrapAAC, EGreedyAAC
from .ReinforcementLearning.ActorCritic import ActorCritic
from .ReinforcementLearning.AdvantageLearning import AdvantageLearning
from .ReinforcementLearning.QLearning import QLearning
from .ReinforcementLearning.REINFORCE import REINFORCE, EGreedyREINFORCE, REINFORCEBl1, REINFORCEBl2
from .ReinforcementLearning.SARSA import SARSA
from .ReinforcementLearning.WPL import WPL

__all__ = [
    "AAC",
    "REINFORCE",
    "RELAX",
    "SARSA",
    "WPL",
    "ActorCritic",
    "AdvantageLearning",
    "BootstrapAAC",
    "Decision",
    "EGreedyAAC",
    "EGreedyREINFORCE",
    "GumbelSoftmax",
    "PerTaskAssignment",
    "QLearning",
    "REINFORCEBl1",
    "REINFORCEBl2",
]
