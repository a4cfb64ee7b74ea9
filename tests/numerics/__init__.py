"""How good the error budget is, by experiment: ``python -m tests.numerics`` writes the tables of docs/numerics.md."""
