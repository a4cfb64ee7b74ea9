"""Nodes without parameters: functions of several inputs, and parts of an input that is a list, a dict or a tensor.

They are plain objects, not Modules, as torchMTL's: they are no children of a model and have no keys in a state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add, mul
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.arguments import Count, checked


class Concat:
    """``torch.cat`` of a node's inputs, in the order of its anchors.

    Args:
        dim: the axis that they are joined along.

    Examples:
        >>> fastroute.Concat(dim=1)(torch.ones(4, 2), torch.zeros(4, 3)).shape
        torch.Size([4, 5])
    """

    @checked
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def __repr__(self) -> str:
        return f"Concat(dim={self.dim})"


class Stack:
    """``torch.stack`` of a node's inputs, in the order of its anchors.

    Args:
        dim: the axis of the result that numbers them.

    Examples:
        >>> fastroute.multitask.Stack(dim=0)(torch.ones(4, 2), torch.zeros(4, 2)).shape
        torch.Size([2, 4, 2])
    """

    @checked
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.stack(inputs, self.dim)

    def __repr__(self) -> str:
        return f"Stack(dim={self.dim})"


class Add:
    """The sum of a node's inputs; shapes broadcast. One input is its own sum: the same tensor.

    Examples:
        >>> fastroute.Add()(torch.ones(2), torch.ones(2), torch.ones(1))
        tensor([3., 3.])
    """

    def __call__(self, *inputs: Tensor) -> Tensor:
        return reduce(add, inputs)

    def __repr__(self) -> str:
        return "Add()"


class Multiply:
    """The product of a node's inputs, entry by entry; shapes broadcast. One input is its own product.

    Examples:
        >>> fastroute.Multiply()(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([3., 8.])
    """

    def __call__(self, *inputs: Tensor) -> Tensor:
        return reduce(mul, inputs)

    def __repr__(self) -> str:
        return "Multiply()"


class Split:
    """``torch.split`` of a node's input: a tuple of views; ``SimpleSelect(k)`` takes one.

    Args:
        sizes: of the parts along ``dim``, or the size of all of them; then the last may be smaller.
        dim: the axis that is cut.

    Examples:
        >>> left, right = fastroute.Split([2, 3], dim=1)(torch.ones(4, 5))
        >>> left.shape, right.shape
        (torch.Size([4, 2]), torch.Size([4, 3]))
    """

    @checked
    def __init__(self, sizes: Count | Sequence[Count], dim: int) -> None:
        self.sizes: int | tuple[int, ...] = sizes if isinstance(sizes, int) else tuple(sizes)
        self.dim = dim

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        checks.tensor("x", x, "a tensor")
        if not -x.dim() <= self.dim < x.dim():
            raise ValueError(f"x: expected a tensor with an axis {self.dim} to split, got {checks.shown(x)}")
        sizes = self.sizes if isinstance(self.sizes, int) else list(self.sizes)
        return tuple(torch.split(x, sizes, self.dim))

    def __repr__(self) -> str:
        return f"Split({self.sizes}, dim={self.dim})"


class SimpleSelect:
    """One item of a node's input: ``x[selection_axis]``.

    Args:
        selection_axis: the number of an item of a list, a tuple or a tensor's first axis, or the key of a dict. (It is
            no axis: the name is torchMTL's.)

    Examples:
        >>> fastroute.SimpleSelect("image")({"image": torch.ones(2), "text": "a"})
        tensor([1., 1.])
    """

    def __init__(self, selection_axis: Any) -> None:
        self.sel = selection_axis

    def __call__(self, x: Any) -> Any:
        return x[self.sel]

    def __repr__(self) -> str:
        return f"SimpleSelect({self.sel!r})"


class SliceSelect:
    """A part of a node's input: ``x[sel_slice]``.

    Args:
        sel_slice: a slice, or a tuple of them, one for each axis of a tensor.

    Examples:
        >>> fastroute.SliceSelect((slice(None), 0))(torch.ones(4, 5)).shape
        torch.Size([4])
    """

    def __init__(self, sel_slice: Any) -> None:
        self.slice = sel_slice

    def __call__(self, x: Any) -> Any:
        return x[self.slice]

    def __repr__(self) -> str:
        return f"SliceSelect({self.slice!r})"


class Lambda:
    """A function of a node's inputs, under a name of your own.

    A function does as well for a node's ``layers``; this one is shown as ``name``, and takes arguments that are always
    the same. For a model that is pickled, it must be a function that has a name of its own, too.

    Args:
        function: called with the anchors' outputs.
        name: shown by ``repr``; by default the function's.
        options: further keyword arguments for the function.

    Examples:
        >>> fastroute.Lambda(torch.flatten, name="flat", start_dim=1)
        Lambda(flat, start_dim=1)
    """

    @checked
    def __init__(self, function: Annotated[Callable[..., Any], None], name: str | None = None, **options: Any) -> None:
        checks.function("function", function, "something to call")
        self.function, self.options = function, options
        self.name = str(getattr(function, "__name__", repr(function)) if name is None else name)

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs, **self.options)

    def __repr__(self) -> str:
        return f"Lambda({', '.join([self.name, *(f'{k}={v!r}' for k, v in self.options.items())])})"
