"""Decisions that learn through the draw, or not at all."""
