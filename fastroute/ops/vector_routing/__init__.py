"""``vector_routing``: one routing iteration."""

from .op import vector_routing as vector_routing
