"""Triton kernels of ``grouped_linear``; ``launch`` starts them."""
