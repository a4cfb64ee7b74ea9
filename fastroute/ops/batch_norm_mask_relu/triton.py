"""The Triton backend of ``batch_norm_mask_relu`` as implementations of its compiled ops: importing registers them."""

from ..registry import Kernels, implement

_kernels = Kernels("batch_norm_mask_relu")
implement("_batch_norm_mask_relu_triton", _kernels.forward, anywhere=True)
implement("_batch_norm_mask_relu_triton_backward", _kernels.backward, anywhere=True)
