"""Triton's interpreter: with the NumPy that is there, and without work that it repeats or throws away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any


def let_scalars_be_ints() -> None:
    """Make Triton 3.6 take a kernel's scalar as a bound of a loop under NumPy 2.4 and newer.

    It keeps scalars as arrays of one element and calls ``int`` on them, which NumPy now refuses. Later Tritons ask for
    the element.
    """
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def make_it_faster() -> None:
    """Replace the language's functions by interpreted ones once a launch; Triton does at every call of a function.

    A call within a launch finds all replaced that its module can see, so that going through it again changes nothing.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, replaced = interpreter._patch_lang, set()

    @cache
    def seen_by(fn: Any) -> frozenset[str]:
        return frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)

    class Nothing:
        def restore(self) -> None: ...

    def patched(fn: Any) -> Any:
        if seen_by(fn) and seen_by(fn) <= replaced:
            return Nothing()
        scope = patch(fn)
        restore = scope.restore

        def restored() -> None:
            replaced.clear()
            restore()

        replaced.update(seen_by(fn))
        scope.restore = restored
        return scope

    interpreter._patch_lang = patched
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # what says whether an integer left its type is then computed and not looked at
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype: Any) -> Any:
        name = str(dtype.scalar)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = looked_up

    def remember(cls: Any, name: str, key: Callable[..., Any]) -> None:
        """Objects that differ in their first argument alone, which they keep under this name, share the rest."""
        make, known = cls.__init__, dict[Any, dict[str, Any]]()

        def made(self: Any, *given: Any) -> None:
            kind = key(*given)
            if kind not in known:
                make(self, *given)
                known[kind] = {**vars(self)}
            vars(self).update(known[kind])
            vars(self)[name] = given[0]

        cls.__init__ = made

    remember(tl.block_type, "element_ty", lambda element, shape: (element.name, *shape))
    remember(tl.tensor, "handle", lambda handle, type: type.name)
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        is_alike = lhs.type.is_block() and rhs.type.is_block() and [*lhs.type.shape] == [*rhs.type.shape]
        return (lhs, rhs) if is_alike else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcasted
