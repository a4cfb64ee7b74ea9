"""Calls of autograd functions, and derivatives beyond the first one.

Kernels have a gradient of their own, and no other rules. Whatever needs more goes through plain PyTorch, whose every
step has them: torch.func's transforms and forward mode, from the op's call on (``transformed``); a gradient that is to
be differentiated again, or many at a time, from the backward pass on (``asked_again``). That is slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress, cycle
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..importing import constant_result
from .backends import requested
from .host import is_exporting, is_traced
from .registry import functions, implementations


def transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...), forward mode or an export without our ops is active."""
    if torch.compiler.is_compiling():
        return bool(exported_plainly())
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@constant_result
def exported_plainly() -> bool:
    """Whether a module is exported in PyTorch's own ops: for ONNX, or on the backend "reference"."""
    return is_exporting() and (torch.onnx.is_in_onnx_export() or requested() == "reference")


def asked_again(*grads: Tensor | None) -> bool:
    """In a backward pass: whether what it gives is differentiated itself, or these are many gradients at a time."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled():
        return True
    return any(_is_many(g) or _is_many_of_func(g) for g in grads if g is not None)


_version = attrgetter("_version")


def keep_for_again(ctx: Any, tensors: Sequence[Tensor], *rest: Any) -> None:
    """What a second derivative alone asks for: not saved, as it is there anyway, but known by its tensors' versions."""
    if not torch.compiler.is_compiling() and type(ctx) is not _NoContext:
        try:
            ctx.again, ctx.versions = (tensors, *rest), list(map(_version, tensors))
        except RuntimeError as error:  # which says "do not track version counter"
            raise RuntimeError(
                "expected no tensor of torch.inference_mode where gradients are made: clone it, or use torch.no_grad"
            ) from error


def kept_for_again(ctx: Any, what: str) -> tuple[Any, ...]:
    """(tensors, *rest) again; ``what`` names the op and one of the tensors.

    Raises:
        RuntimeError: a tensor has changed in place since.
    """
    if ctx.versions != list(map(_version, ctx.again[0])):
        raise RuntimeError(f"{what} was changed in place between the forward and the backward pass")
    return ctx.again


def constant(t: Tensor | None) -> Tensor | None:
    """An argument that has no gradient, out of the graph: autograd would call its hooks all the same, with None."""
    return t.detach() if t is not None and t.requires_grad else t


def is_hooked(p: Tensor) -> bool:
    """Whether somebody is to be told of its gradient, or of its being added to ``grad``; told from Python."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def without_gradient(parameters: Sequence[Tensor], bounds: Sequence[int] | None) -> tuple[Tensor, ...]:
    """Parameters, some for each module, with those of modules that have no row taken out of the graph.

    They get None as gradient either way. But autograd would call hooks all the same, which expect a gradient.
    """
    if bounds is None or not torch.is_grad_enabled():
        return tuple(parameters)
    idle = list(map(eq, bounds, bounds[1:]))  # a flag for each module, of whom there are several lists
    if True not in idle:
        return tuple(parameters)
    at_rest = list(compress(range(len(parameters)), cycle(idle)))
    hooked = [i for i in at_rest if is_hooked(parameters[i])]
    if not hooked:
        return tuple(parameters)
    made = list(parameters)
    for i in hooked:
        made[i] = made[i].detach()
    return tuple(made)


#: Whether a tensor is many at a time, of torch.autograd.grad(is_grads_batched=True) or of torch.func.
_is_many, _is_many_of_func = torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor


def through(
    plain: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of ``inputs`` (None for those that need none) as autograd makes them from ``plain(*inputs)``.

    ``grads`` are those of its outputs. The inputs are those that the graph knows, as they were saved.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():  # by a view: under torch.vmap nothing may be told to require a gradient
        own = [
            (t.view_as(t) if again or t.requires_grad else t.detach().requires_grad_())
            if need and isinstance(t, Tensor)
            else t
            for t, need in zip(inputs, needs, strict=True)
        ]
        outputs = plain(*own)
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [i for i, (t, need) in enumerate(zip(own, needs, strict=True)) if need and isinstance(t, Tensor)]
    found: list[Tensor | None] = [None] * len(own)
    if not pairs or not wanted:
        return found
    made = torch.autograd.grad(
        [y for y, _ in pairs], [own[i] for i in wanted], [g for _, g in pairs], create_graph=again, allow_unused=True
    )
    for i, g in zip(wanted, made, strict=True):
        found[i] = g
    return found


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_transforms_active, _modes_active = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack


def is_observed(*tensors: Tensor | None) -> bool:
    """Whether anything but autograd is active (torch.func, a trace, a mode, a subclass): it needs the registered op."""
    if torch.compiler.is_compiling():
        return True
    if _transforms_active() or forward_ad._current_level >= 0 or _modes_active() > 0 or is_traced():
        return True
    return not _PLAIN.issuperset(map(type, tensors))


class _NoContext:
    """What a ``forward`` is given where there is no graph: nothing of it is kept."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, at less cost; its ``forward`` returns new tensors alone.

    Without gradients it is its ``forward``. With them, what is left out is the search for torch.func's leftovers where
    torch.func is not at work: it looks at every argument in Python, and there may be a parameter of every module.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        # Dynamo (2.13) drops the context where no gradient is wanted and forward(ctx, a, *rest) has two of the rest;
        # torch.jit.trace compares with a trace without gradients, and saves no function in Python
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            return function.apply(*args)
        return function.forward(_NoContext(), *args)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(_NoContext(), *args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def called(name: str, *args: Any) -> Any:
    """The op ``torch.ops.fastroute.<name>``; without its dispatcher (25 us) where only autograd is active."""
    if is_observed(*(t for t in args if isinstance(t, Tensor))):
        return getattr(torch.ops.fastroute, name)(*args)
    return apply(functions[name], *args) if torch.is_grad_enabled() else implementations[name](*args)


def own(output: Tensor) -> Tensor:
    """What a function's ``forward`` returns: a tensor that is none of its intermediate results.

    Dynamo of torch 2.11 makes all of them outputs of the function, and an output's gradient is lost, silently, where
    one is the same tensor: after an operation in place, or a cast to the dtype that it has.
    """
    return output.clone() if _LOSES_GRADIENTS and torch.compiler.is_compiling() else output


_LOSES_GRADIENTS = torch.__version__ < "2.12"  # a TorchVersion: it compares numbers
