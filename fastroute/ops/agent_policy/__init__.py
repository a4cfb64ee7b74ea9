"""``agent_policy``: the choice of every row's agent."""

from .op import agent_policy as agent_policy
