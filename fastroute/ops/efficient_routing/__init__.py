"""``efficient_routing``: all iterations of efficient vector routing."""

from .op import efficient_routing as efficient_routing
