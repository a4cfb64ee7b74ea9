"""Triton's interpreter, with the NumPy that is there."""

from __future__ import annotations

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
