"""The ops in plain PyTorch: what every other backend is checked against."""
