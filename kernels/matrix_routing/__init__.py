"""Triton kernels of ``matrix_routing``; ``launch`` starts them."""
