"""Triton kernels of ``vector_routing``; ``launch`` starts them."""
