"""The Triton backend of ``policy`` as implementations of its compiled ops: importing registers them."""

from ..registry import Kernels, implement

_kernels = Kernels("policy")
implement("_policy_triton", _kernels.forward, anywhere=True)
implement("_policy_triton_backward", _kernels.backward, anywhere=True)
