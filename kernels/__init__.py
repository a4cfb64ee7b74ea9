"""The ops as Triton kernels, one file or small group of files per op; installed as ``fastroute.kernels``."""
