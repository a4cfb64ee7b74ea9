"""What Python may know of a tensor's numbers without waiting for a device: nothing, where there are none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import is_strict

_SAYS_SO_ALWAYS = torch.__version__ < "2.13"  # a TorchVersion: it compares numbers


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which Dynamo of torch 2.11 takes for true under every torch.compile."""
    return torch.compiler._is_exporting_flag if _SAYS_SO_ALWAYS else torch.compiler.is_exporting()


def is_traced() -> bool:
    """Whether torch.jit.trace or make_fx records operators, which are then run on other numbers."""
    if torch.compiler.is_compiling():
        return False
    return _tracing_state() is not None or _has_mode(_MODES.PROXY) or _is_included(_PRE_DISPATCH)


_MODES, _PRE_DISPATCH = torch._C._TorchDispatchModeKey, torch._C.DispatchKey.PreDispatch
_tracing_state, _is_included = torch._C._get_tracing_state, torch._C._dispatch_tls_is_dispatch_key_included


def _has_mode(key: torch._C._TorchDispatchModeKey) -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 and torch._C._get_dispatch_mode(key) is not None


def is_wrapped(t: Tensor) -> bool:
    """Whether it stands for many under torch.vmap."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def compares(t: Tensor) -> bool:
    """Whether to count by comparisons, as vmap and ONNX know no search."""
    return is_exporting() or is_wrapped(t)


def is_many(t: Tensor) -> bool:
    """Whether torch.vmap has made many of it, whose numbers nobody may read."""
    if not is_wrapped(t):
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def is_hollow(t: Tensor) -> bool:
    """Whether it has a shape and no numbers: on the meta device, or of a FakeTensorMode."""
    return t.is_meta or isinstance(t, torch._subclasses.FakeTensor)


def has_numbers(t: Tensor) -> bool:
    """Whether there are any to be looked at: not under torch.compile or a trace, in a fake tensor or among some, in one
    of many of a vmap, on the meta device."""
    if type(t) is not Tensor or torch.compiler.is_compiling() or t.is_meta or is_traced() or _has_mode(_MODES.FAKE):
        return False
    functorch = torch._C._functorch
    return not (torch._C._are_functorch_transforms_active() and functorch.is_functorch_wrapped_tensor(t))


def on_host(offsets: Tensor) -> list[int] | None:
    """The numbers, where reading them waits for nothing; else None."""
    if not offsets.is_cpu or not has_numbers(offsets):
        return None
    return offsets.tolist()


def read(offsets: Tensor) -> list[int]:
    """The numbers, waiting for the device if need be."""
    return offsets.tolist()


#: Within, no mode of the dispatcher is told of what runs: a check of ours is nobody's computation. Not for subclasses.
unseen = torch._C._DisableTorchDispatch


def memory(t: Tensor) -> Any:
    """The bits as an array, which on a CPU is t's own memory; waits for another device."""
    with unseen(), torch._C._DisableFuncTorch():
        return t.detach().cpu().view(_BITS[t.element_size()]).numpy()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def others_write(t: Tensor) -> bool:
    """Whether a process that shares it, or a collective, may write to it, which changes no version of it here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    return t.is_cpu and t.untyped_storage().is_shared()


def is_lent(t: Tensor) -> bool:
    """Whether PyTorch did not allocate its memory, or has lent it to a NumPy array: who else has it may write to it.

    So is what ``torch.load`` gives, which cannot be told from it; what ``load_state_dict`` copies is not.
    """
    return t.is_cpu and not t.untyped_storage().resizable()


def version_of(t: Tensor) -> int:
    """Another one after every change in place, where tensors have any."""
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version


def may_look(t: Tensor) -> bool:
    """Whether a check may look at numbers: on a CPU, or where ``fastroute.strict`` asks for it; if there are any."""
    return (t.device.type == "cpu" or is_strict()) and has_numbers(t)
