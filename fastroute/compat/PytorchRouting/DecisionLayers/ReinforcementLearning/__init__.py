"""Decisions that learn from rewards."""
