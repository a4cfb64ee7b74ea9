"""torch.ops.fastroute: the namespace every op is defined in, with or without the C++ extension."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch.library import Library
from torch.utils._pytree import tree_leaves

from .environment import interpreting


def _namespace() -> Library:
    try:
        return Library("fastroute", "DEF")
    except RuntimeError as error:
        first = re.search(r"registered at (.+?):\d+;", str(error))
        raise ImportError(
            f"fastroute: expected to be imported once in a process, found the ops registered by {first and first[1]}. "
            "Start Python again; if that file is another copy's, take one of the two off sys.path"
        ) from error


library = _namespace()

#: Loads the C++; says why not, or nothing. :mod:`.backends` knows how.
load_extension: Callable[[], str] = lambda: "nothing can load the C++ extension yet"  # noqa: E731
_here = threading.local()

#: What each op of :func:`define` runs, by its name, and the same with its gradient.
implementations: dict[str, Callable[..., Any]] = {}
functions: dict[str, type[torch.autograd.Function]] = {}


def no_second_derivative(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The gradient of a gradient op: an error instead of autograd's silence."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"{op} has no second derivative; the plain-PyTorch function fastroute.ops.{op}.reference.{op} has"
        )

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    return backward, setup_context


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """``fake`` for fake and for meta tensors; the latter only all together, which PyTorch leaves to the op."""

    def on_one_device(*args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if len({t.device.type == "meta" for t in tensors}) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got some on meta")
        return fake(*args, **kwargs)

    torch.library.register_fake(f"fastroute::{name}", on_one_device, lib=library)


def _load_first(name: str) -> None:
    """Let a first call of C++ load the extension: that of a program, or a package, which was exported elsewhere.

    C++ is on the key of a device, which comes before this one.
    """

    def run(*args: Any) -> Any:
        why = "has no C++ for these tensors" if getattr(_here, "loads", False) else load_extension()
        if why:
            raise NotImplementedError(f"fastroute::{name}: {why}")
        _here.loads = True
        try:
            return getattr(torch.ops.fastroute, name)(*args)
        finally:
            _here.loads = False

    library.impl(name, run, "CompositeExplicitAutograd")


def define_compiled(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    triton: Callable[..., Any] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """One op for each compiled backend, which stands for {} in ``name``; ``triton``: a fake of its own.

    For what an autograd function of ours calls: its C++ is on the CPU's key, so that a call costs no Python. A list of
    tensors is ``Tensor[]?`` in its schema: AOTInductor's packages give None for one that is empty.
    """
    for backend, describe in (("native", fake), ("triton", triton or fake)):
        library.define(name.format(backend) + schema, tags=tuple(tags))
        register_fake(name.format(backend), describe)
    _load_first(name.format("native"))


class Kernels:
    """A module of ``fastroute.kernels``, imported when a function of it is first called, as Triton takes long to."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"fastroute.kernels.{self._name}")

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return getattr(self._module, function)(*args, **options)

        return call


def implement(name: str, implementation: Callable[..., Any], *, anywhere: bool = False) -> None:
    """Register Triton's implementation of a compiled op; ``anywhere``: for every device, not those of its kernels."""
    (schema,) = torch._C._jit_get_schemas_for_operator(f"fastroute::{name}")
    lists = [k for k, argument in enumerate(schema.arguments) if str(argument.type) == "Optional[List[Tensor]]"]

    def run(*args: Any) -> Any:
        given = list(args)
        for k in lists:
            given[k] = given[k] or ()
        return implementation(*given)

    keys = ("CompositeExplicitAutograd",) if anywhere else ("CUDA", "CPU") if interpreting() else ("CUDA",)
    for key in keys:
        library.impl(name, torch.no_grad()(run if lists else implementation), key)


def define(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *, autograd: Any = None
) -> None:
    """Register ``fastroute::name`` for every device: its schema, its Python dispatcher, its fake and its gradient."""
    library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, torch.no_grad()(implementation), "CompositeExplicitAutograd")
    implementations[name] = implementation
    register_fake(name, fake)
    if autograd is not None:
        backward, setup_context = autograd
        functions[name] = _function(implementation, backward, setup_context)
        torch.library.register_autograd(f"fastroute::{name}", backward, setup_context=setup_context, lib=library)


def _function(run: Callable[..., Any], gradient: Callable[..., Any], setup: Callable[..., None]) -> Any:
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            made = run(*args)
            setup(ctx, args, made)
            return made

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradient(ctx, *grads)

    return Op
