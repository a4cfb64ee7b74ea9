"""The decisions: every class of Routing Networks, by how it learns."""

from .actor_critic import AAC as AAC
from .actor_critic import WPL as WPL
from .actor_critic import ActorCritic as ActorCritic
from .actor_critic import BootstrapAAC as BootstrapAAC
from .actor_critic import EGreedyAAC as EGreedyAAC
from .base import Decision as Decision
from .fixed import PassThrough as PassThrough
from .fixed import PerTaskAssignment as PerTaskAssignment
from .policy_gradient import REINFORCE as REINFORCE
from .policy_gradient import EGreedyREINFORCE as EGreedyREINFORCE
from .policy_gradient import REINFORCEBl1 as REINFORCEBl1
from .policy_gradient import REINFORCEBl2 as REINFORCEBl2
from .reparameterised import RELAX as RELAX
from .reparameterised import GumbelSoftmax as GumbelSoftmax
from .storage import ApproxPolicyStorage as ApproxPolicyStorage
from .storage import TabularPolicyStorage as TabularPolicyStorage
from .value_based import SARSA as SARSA
from .value_based import AdvantageLearning as AdvantageLearning
from .value_based import BootstrapAdvantageLearning as BootstrapAdvantageLearning
from .value_based import QLearning as QLearning
from .value_based import SurpriseLearning as SurpriseLearning
