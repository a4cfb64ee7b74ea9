"""The contracts: one registered op per file, its checks, its fake, its gradient, and the choice of a backend."""

from .efficient_routing import efficient_routing as efficient_routing
from .vector_routing import vector_routing as vector_routing
