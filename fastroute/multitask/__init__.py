"""Multi-task models from a list of dicts."""
