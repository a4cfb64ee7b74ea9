"""Routing Networks (Rosenbaum et al. 2018): a learned choice of one module per sample, layer by layer.

Examples:
    >>> net = fastroute.Sequential(fastroute.WPL(3, 8), fastroute.Selection(*(nn.Linear(8, 2) for _ in range(3))))
    >>> loss = fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward())
    >>> y, meta = net(torch.randn(4, 8))
    >>> module_loss, routing_loss = loss(y, meta, torch.tensor([0, 1, 1, 0]))
    >>> (module_loss + routing_loss).backward()
"""

from .decision_record import Mixture, Record
from .decisions import (
    AAC,
    REINFORCE,
    RELAX,
    SARSA,
    WPL,
    ActorCritic,
    AdvantageLearning,
    BootstrapAAC,
    BootstrapAdvantageLearning,
    Decision,
    EGreedyAAC,
    EGreedyREINFORCE,
    GumbelSoftmax,
    PassThrough,
    PerTaskAssignment,
    QLearning,
    REINFORCEBl1,
    REINFORCEBl2,
    SurpriseLearning,
)
from .gating import TopKGating, rebalance
from .loss import Loss
from .mlp import MLP
from .moe import MoE
from .recurrent import RoutingGRUCell, RoutingLSTMCell, RoutingRNNCellBase
from .rewards import (
    BaseReward,
    CollaborationReward,
    CorrectClassifiedReward,
    ManualReward,
    NegLossReward,
    PerActionBaseReward,
    RunningAverageCollaborationReward,
)
from .sample_view import SampleMetaInformation
from .selection import Selection
from .sequential import Initialization, Sequential
from .stacked_modules import Stack, unstacked_state_dict
from .summary import Summary
from .trajectory import Trajectory

__all__ = [
    "AAC",
    "MLP",
    "REINFORCE",
    "RELAX",
    "SARSA",
    "WPL",
    "ActorCritic",
    "AdvantageLearning",
    "BaseReward",
    "BootstrapAAC",
    "BootstrapAdvantageLearning",
    "CollaborationReward",
    "CorrectClassifiedReward",
    "Decision",
    "EGreedyAAC",
    "EGreedyREINFORCE",
    "GumbelSoftmax",
    "Initialization",
    "Loss",
    "ManualReward",
    "Mixture",
    "MoE",
    "NegLossReward",
    "PassThrough",
    "PerActionBaseReward",
    "PerTaskAssignment",
    "QLearning",
    "REINFORCEBl1",
    "REINFORCEBl2",
    "Record",
    "RoutingGRUCell",
    "RoutingLSTMCell",
    "RoutingRNNCellBase",
    "RunningAverageCollaborationReward",
    "SampleMetaInformation",
    "Selection",
    "Sequential",
    "Stack",
    "Summary",
    "SurpriseLearning",
    "TopKGating",
    "Trajectory",
    "rebalance",
    "unstacked_state_dict",
]
