"""Containers."""

from .Sequential import Sequential

__all__ = ["Sequential"]
