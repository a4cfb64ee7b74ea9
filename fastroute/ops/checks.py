"""Bad input, named: every message gives the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import isclass
from math import inf, isfinite
from numbers import Real
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from .host import may_look


def shown(t: Tensor) -> str:
    """A tensor's shape as users write it."""
    return str(list(t.shape))


def given(value: object) -> str:
    """A wrong value in a message: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor {shown(value)} of {value.dtype}" + (
            "" if value.device.type == "cpu" else f" on {value.device}"
        )
    if isclass(value):
        return f"the class {value.__name__}"
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array {list(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"{type(value).__name__} {' '.join(text.split())[:60]}..."


def integer(name: str, value: object) -> int:
    """An int, or what stands for one (a NumPy integer), but no bool."""
    try:
        if not isinstance(value, (bool, np.bool_)) and isinstance(value, SupportsIndex):
            return index(value)
    except Exception:  # tensors that are no integers, or that have no numbers
        pass
    raise TypeError(f"{name}: expected an int, got {given(value)}")


#: Of one axis: what indexes in 32 bits reach.
LARGEST = 2**31 - 1
#: Of what Python makes, or does, one by one: some tens of seconds of it.
MOST = 2**20


def at_least_one(name: str, value: object, most: int = LARGEST) -> int:
    """An int of 1 or more, and not so large that the work for it has no end."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return no_more(name, number, most)


def several(name: str, value: object) -> int:
    """An int of 1 or more: how many modules, names or steps Python makes, or does, one by one."""
    return at_least_one(name, value, MOST)


def inputs(name: str, value: object, of: str = "vectors") -> int:
    """How many vectors a layer takes: 1 or more, or -1 for any number."""
    number = integer(name, value)
    if number != -1 and number < 1:
        raise ValueError(f"{name}: expected a positive number of input {of}, or -1 for any number, got {number}")
    return no_more(name, number, LARGEST)


def outputs(name: str, value: object, of: str = "vectors") -> int:
    """How many vectors a layer gives: among one there is nothing to choose."""
    number = integer(name, value)
    if number < 2:
        raise ValueError(f"{name}: expected at least 2 output {of}, got {number}")
    return no_more(name, number, LARGEST)


def no_more(name: str, number: int, most: int) -> int:
    """The number, if it is no larger than that."""
    if number > most:
        raise ValueError(f"{name}: expected at most {most}, got {number}")
    return number


def is_number(value: object) -> bool:
    """A real number of Python's or NumPy's, but no bool."""
    if type(value) is float or type(value) is int:  # an abstract class takes five times as long to tell
        return True
    return isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def finite(name: str, value: Any) -> Any:
    """A number, neither NaN nor infinite."""
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {given(value)}")
    if not isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def _number(name: str, value: Any, what: str, fits: Callable[[Any], bool]) -> Any:
    if not is_number(value):
        raise TypeError(f"{name}: expected {what}, got {given(value)}")
    if not fits(value):
        raise ValueError(f"{name}: expected {what}, got {value}")
    return value


def numbers_by_name(name: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Python's floats, of whatever stands for one: NumPy's numbers, tensors of one element."""
    made = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected names, got {given(key)}")
        try:
            made[key] = value.__float__()
        except Exception as error:
            raise TypeError(f"{name}: {key}: expected a number, got {given(value)}") from error
    return made


def at_least_zero(name: str, value: Any, what: str = "a number of 0 or more") -> Any:
    """A finite number of 0 or more."""
    return _number(name, value, what, lambda v: 0 <= v < inf)


def natural(name: str, value: object) -> int:
    """An int of 0 or more."""
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected 0 or more, got {number}")
    return number


def positive(name: str, value: Any, what: str = "more than 0") -> Any:
    """A finite number above 0."""
    return _number(name, value, what, lambda v: 0 < v < inf)


def share(name: str, value: Any) -> Any:
    """A number from 0 to 1."""
    return _number(name, value, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def are_alike(x: Tensor, y: Tensor) -> bool:
    """Whether shapes are the same but for axes of one element."""
    return x.shape == y.shape or [n for n in x.shape if n != 1] == [n for n in y.shape if n != 1]


def floating_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """A dtype that parameters can have: none of eight bits, which PyTorch does not compute in."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"{name}: expected a floating-point dtype, got {dtype}")
    return dtype


def device(name: str, value: Any) -> Any:
    """What names a device."""
    try:
        torch.device(value)
    except Exception as error:
        raise ValueError(f"{name}: expected a device such as 'cpu' or 'cuda:0', got {given(value)}") from error
    return value


def tensor(name: str, t: object, what: str) -> None:
    """A tensor, neither sparse nor nested."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected {what}, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        got = "a nested tensor" if t.is_nested else f"one of {t.layout}"
        raise TypeError(f"{name}: expected {what}, dense, got {got}")


def function(name: str, value: object, what: str) -> None:
    """Something to call, and no class of modules, which is called to make one."""
    if not callable(value) or (isclass(value) and issubclass(value, torch.nn.Module)):
        got = f"the class {value.__name__}; write {value.__name__}(...)" if isclass(value) else type(value).__name__
        raise TypeError(f"{name}: expected {what}, got {got}")


def samples(name: str, t: Tensor) -> int:
    """B of a tensor [B, ...]."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor [B, ...], got {given(t)}")
    tensor(name, t, "a tensor [B, ...]")
    if t.dim() < 1:
        raise ValueError(f"{name}: expected a tensor [B, ...], got {given(t)}")
    return t.shape[0]


def flag(name: str, value: object) -> None:
    """True or False, or what stands for one."""
    if not isinstance(value, (bool, np.bool_, torch.SymBool)) and not (type(value) is int and value in (0, 1)):
        raise TypeError(f"{name}: expected True or False, got {given(value)}")


def flags(**given: object) -> None:
    """Each True or False, or what stands for one."""
    for name, value in given.items():
        if value is not True and value is not False:
            flag(name, value)


def as_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    """A tensor from a tensor or a list. Of an empty list, which torch takes for float32, int64 as of whole numbers."""
    if isinstance(value, Tensor):
        tensor(name, value, "a tensor")
        return value
    try:
        made = torch.as_tensor(value, device=device)
        return made.long() if isinstance(value, (list, tuple)) and not made.numel() else made
    except Exception as error:
        raise TypeError(f"{name}: expected a tensor or a list of numbers, got {given(value)}") from error


def moved(name: str, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor's numbers there."""
    if t.is_meta and device.type != "meta":
        raise ValueError(f"{name}: expected a tensor with numbers, got one on meta")
    return t.to(device, dtype)


def floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point() or t.dtype.itemsize < 2:
        raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")


def as_parameters(name: str, t: Tensor, module: torch.nn.Module, call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``. If it fails: whether an input is of another dtype, or device, than its module's parameters."""
    try:
        return call(*args)
    except RuntimeError:
        own = next((p for p in module.parameters() if p.is_floating_point()), None)
        if own is not None and (t.dtype, t.device) != (own.dtype, own.device):
            kind = TypeError if t.device == own.device else ValueError
            message = f"{name}: expected {own.dtype} on {own.device} like the parameters, got {given(t)}"
            raise kind(message)  # noqa: B904  (the input is at fault, whatever the call says)
        raise


def together(reference: tuple[str, Tensor], others: Mapping[str, Tensor | None]) -> None:
    """All tensors, on one device."""
    name, x = reference
    for other, t in others.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            tensor(other, t, "a tensor")
        if t.device != x.device:
            raise ValueError(f"{other}: expected a tensor on {x.device} like {name}, got one on {t.device}")


def on_one_device(x: Tensor, y: Tensor) -> None:
    """Whoever called knows their names. torch 2.11 multiplies what lies on a CPU and on meta, and gives meta."""
    if x.device != y.device:
        raise RuntimeError(f"expected all tensors on one device, got {x.device} and {y.device}")


def shape(name: str, t: Tensor, expected: Sequence[int], axes: str) -> None:
    if tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({axes}), got {shown(t)}")


def as_mask(mask: Tensor, batch: Sequence[int], n: int, m: int, name: str = "mask") -> Tensor:
    """A [B, n, m] view of a mask that broadcasts to [*batch, n, m]."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor (True = ignore), got {mask.dtype}")
    full = (*batch, n, m)
    fits = mask.dim() <= len(
        full
    ) and all(  # not "in (1, want)", which is False for a size torch.compile keeps symbolic
        have == 1 or have == want for have, want in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {list(full)} (..., n_inp, n_out), got {shown(mask)}"
        )
    B = 1
    for size in batch:
        B *= size
    if mask.dim() <= 2 or all(size == 1 for size in mask.shape[:-2]):
        return mask.reshape(mask.shape[-2:] if mask.dim() > 1 else mask.shape).expand(B, n, m)
    return mask.expand(full).reshape(B, n, m)


def as_lengths(lengths: Tensor | Sequence[int], batch: Sequence[int], n: int, device: torch.device) -> Tensor:
    """[B] int64 lengths on ``device``, each in [0, n]: checked on a CPU, clamped on a GPU and checked if strict."""
    lengths = as_tensor("lengths", lengths, device)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.device != device:
        raise ValueError(f"lengths: expected a tensor on {device} like x_inp, got one on {lengths.device}")
    if tuple(lengths.shape) != tuple(batch):
        raise ValueError(f"lengths: expected one length per sample, shape {list(batch)}, got {shown(lengths)}")
    lengths = lengths.reshape(-1).to(torch.int64)
    if may_look(lengths):
        bad = int(((lengths < 0) | (lengths > n)).sum())
        if bad:
            raise ValueError(
                f"lengths: expected values from 0 to {n} (the length of x_inp), got {bad} outside, "
                f"the smallest {int(lengths.min())}, the largest {int(lengths.max())}"
            )
    return lengths.clamp(0, n)


def input_vectors(x_inp: Tensor, n_inp: int, d_inp: int | None, home: torch.device) -> None:
    """Check a capsule layer's x_inp [..., n_inp, d_inp]; n_inp -1 and d_inp None allow any. ``home``: of parameters."""
    tensor("x_inp", x_inp, "a tensor")
    if x_inp.dim() < 2:
        raise ValueError(f"x_inp: expected [..., n_inp, d_inp], at least 2 dimensions, got {shown(x_inp)}")
    floating("x_inp", x_inp)
    n, d = x_inp.shape[-2:]
    if d_inp is not None and d != d_inp:
        raise ValueError(f"d_inp: expected input vectors of width {d_inp}, got {d} (x_inp is {shown(x_inp)})")
    if n_inp != -1 and n != n_inp:
        raise ValueError(f"n_inp: expected {n_inp} input vectors, got {n} (x_inp is {shown(x_inp)})")
    if n == 0:
        raise ValueError(f"x_inp: expected at least 1 input vector, got 0 (x_inp is {shown(x_inp)})")
    if x_inp.device != home:
        raise ValueError(
            f"x_inp: expected a tensor on {home} like the parameters, got one on {x_inp.device}; "
            "move one of them with .to()"
        )
