"""Arguments checked by their annotations, before any work: what is annotated is what is accepted."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, SupportsIndex, TypeVar, Union

import numpy as np
import torch
from torch import Tensor, nn

from . import checks

#: How many of something there are, or how wide it is.
Count = Annotated[int, checks.at_least_one]
#: How many of something are made, or done, one by one in Python.
Several = Annotated[int, checks.several]
#: How many vectors, or capsules, a layer takes, and gives.
InputCount = Annotated[int, checks.inputs]
OutputCount = Annotated[int, checks.outputs]
InputCapsules = Annotated[int, functools.partial(checks.inputs, of="capsules")]
OutputCapsules = Annotated[int, functools.partial(checks.outputs, of="capsules")]
#: Tasks by name, or how many. (``Annotated[..., None]``: who reads it checks it, in words of its own.)
Tasks = Annotated[int | Sequence[str], None]
#: A number of 0 or more; above 0; from 0 to 1.
Natural = Annotated[int, checks.natural]
NotNegative = Annotated[float, checks.at_least_zero]
Positive = Annotated[float, checks.positive]
Share = Annotated[float, checks.share]

Function = TypeVar("Function", bound=Callable[..., Any])
Check = Callable[[str, Any], Any]


class _Kind(NamedTuple):
    """What an annotation accepts, in words, and a further condition; ``None``: there is none."""

    takes: Callable[[Any], bool]
    what: str
    check: Check | None = None
    error: type[Exception] = TypeError


def _is_int(value: Any) -> bool:
    if isinstance(value, Tensor):  # 0-d ones stand for ints, as NumPy's do
        return value.dim() == 0 and not value.is_meta and not (value.is_floating_point() or value.dtype == torch.bool)
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def _is_many(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    return hasattr(value, "__len__") and hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping))


def _function(name: str, value: Any) -> Any:
    checks.function(name, value, "a module or a function")
    return value


def _tensor(name: str, value: Any) -> Any:
    checks.tensor(name, value, "a tensor")
    return value


def _flag(name: str, value: Any) -> bool:
    checks.flag(name, value)
    return bool(value)


_NOTHING = object()  #: only what leaves all to its check takes it
_PLAIN: dict[Any, _Kind] = {
    int: _Kind(_is_int, "an int", checks.integer),
    float: _Kind(checks.is_number, "a number", checks.finite),
    bool: _Kind(lambda v: not isinstance(v, Tensor), "True or False", _flag),
    str: _Kind(lambda v: isinstance(v, str), "a str"),
    NoneType: _Kind(lambda v: v is None, "None"),
    Tensor: _Kind(lambda v: isinstance(v, Tensor), "a tensor", _tensor),
    nn.Module: _Kind(lambda v: isinstance(v, nn.Module), "a module"),
    torch.dtype: _Kind(lambda v: isinstance(v, torch.dtype), "a torch.dtype", checks.floating_dtype),
    torch.device: _Kind(lambda v: isinstance(v, (torch.device, str, int)), "a device", checks.device),
    torch.Generator: _Kind(lambda v: isinstance(v, torch.Generator), "a torch.Generator"),
    Callable: _Kind(lambda v: True, "a module or a function", _function),
    Mapping: _Kind(lambda v: isinstance(v, Mapping), "a dict"),
    Sequence: _Kind(_is_many, "a list"),
    Iterable: _Kind(lambda v: hasattr(v, "__iter__") and not isinstance(v, Tensor), "a list"),
}


def _kinds(hint: Any) -> list[_Kind] | None:
    """What an annotation accepts; None: anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        hint, origin = hint.__bound__, typing.get_origin(hint.__bound__)
    if hint in (Any, object, None) or origin is type:
        return None
    if origin is Annotated:
        (check,) = hint.__metadata__
        return check and [kind._replace(check=check) for kind in _kinds(arguments[0]) or ()]
    if origin in (Union, UnionType):
        if torch.device in arguments:  # which a str, or an int, names
            arguments = tuple(part for part in arguments if part is not str)
        parts = [_kinds(part) for part in arguments]
        kinds = [kind for part in parts for kind in part or ()]
        return None if None in parts else sorted(kinds, key=lambda kind: kind.takes(_NOTHING))
    if origin is Literal:
        known = lambda v: isinstance(v, tuple(map(type, arguments))) and v in arguments  # noqa: E731
        return [_Kind(known, " or ".join(map(repr, arguments)), None, ValueError)]
    if origin is tuple and len(arguments) == 2 and ... not in arguments:
        pair = _of_each(_PLAIN[Sequence], arguments[:1])
        return [pair._replace(takes=lambda v: _is_many(v) and len(v) == 2, what="a pair" + pair.what[len("a list") :])]
    if origin is tuple or (origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence)):
        return [_of_each(_PLAIN[Sequence], arguments[:1])]
    known_kind = _PLAIN.get(origin or hint)
    if known_kind is not None:
        return [known_kind]
    cls = origin or hint
    return [_Kind(lambda v: isinstance(v, cls), f"a {cls.__name__}")] if inspect.isclass(cls) else None


def _of_each(kind: _Kind, of: Sequence[Any]) -> _Kind:
    """A sequence whose elements are of a kind as well."""
    kinds = _kinds(of[0]) if of else None
    if kinds is None:
        return kind

    def check(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):  # of many
            _tensor(name, value)
        for element in value if isinstance(value, (list, tuple, np.ndarray)) else ():
            _check(name, element, kinds)
        return value

    return kind._replace(check=check, what="a list of " + " or ".join(f"{k.what.split(' ', 1)[-1]}s" for k in kinds))


def _check(name: str, value: Any, kinds: Sequence[_Kind]) -> Any:
    fit = [kind for kind in kinds if kind.takes(value)]
    for kind in fit[:-1]:  # of several kinds of sequences, the one whose elements fit
        with suppress(TypeError, ValueError):
            return value if kind.check is None else kind.check(name, value)
    if fit:
        return value if fit[-1].check is None else fit[-1].check(name, value)
    first, *others = dict.fromkeys(kind.what for kind in kinds if kind.what != "None")
    hint = f" (or {', or '.join(others)})" if others else ""
    if inspect.isclass(value):
        hint += f"; write {value.__name__}(...)"
    raise kinds[0].error(f"{name}: expected {first}, got {checks.given(value)}{hint}")


def _plan(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, list[_Kind]]:
    plain = inspect.unwrap(function)
    given = SimpleNamespace(__annotations__={k: v for k, v in plain.__annotations__.items() if k != "return"})
    hints = typing.get_type_hints(given, plain.__globals__, include_extras=True)
    named = (p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    found = {name: _kinds(hints[name]) for name in named if name in hints}
    return {name: kinds for name, kinds in found.items() if kinds is not None}


_Args = tuple[Any, ...]
_Failed = Callable[[Exception, _Args, dict[str, Any]], None]


def _where_it_fails(function: Function, failed: _Failed, *errors: type[Exception]) -> Function:
    """A function that tells of an error, with its arguments, before that is raised: a good call costs nothing."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except errors as error:
            failed(error, args, kwargs)
            raise

    run.names_errors = True  # type: ignore[attr-defined]
    return typing.cast(Function, run)


def is_as_written(function: Any) -> bool:
    """Whether nothing is wrapped around it but what names the argument in an error."""
    return not hasattr(function, "__wrapped__") or "names_errors" in function.__dict__


@typing.overload
def explained(function: Function, *, also: Callable[..., None] | None = None) -> Function: ...
@typing.overload
def explained(*, also: Callable[..., None]) -> Callable[[Function], Function]: ...
def explained(function: Function | None = None, *, also: Callable[..., None] | None = None) -> Any:
    """A function whose arguments are checked where it fails: a good call costs nothing.

    Args:
        also: a check of its own, of the arguments by name.

    Raises:
        TypeError, ValueError: naming the argument, if one is not what its annotation says, or not on the device of the
            first tensor; what ``also`` raises; else what was raised.
    """
    if function is None:
        return functools.partial(explained, also=also)

    def failed(error: Exception, args: _Args, kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(function)
        if str(error).partition(":")[0].partition("[")[0] in signature.parameters:
            return
        kinds = _plan(function, signature)
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name in kinds:
                _check(name, value, kinds[name])
        ours = not isinstance(error, RuntimeError) and re.match(r"[\w\[\]]+: expected", str(error))
        if ours:  # it names what is in an argument
            return
        several = {name: (v,) if isinstance(v, Tensor) else v for name, v in given.items()}
        tensors = [
            (name, t) for name, v in several.items() if isinstance(v, (list, tuple)) for t in v if isinstance(t, Tensor)
        ]
        for name, t in tensors[1:]:
            checks.together(tensors[0], {name: t})
        if also is not None:
            also(**given)

    return _where_it_fails(function, failed, AttributeError, TypeError, ValueError, IndexError, RuntimeError)


def renamed(**names: str) -> Callable[[Function], Function]:
    """A function that hands its arguments to others, where they have other names: its errors say its own.

    Args:
        names: what an argument is called there, and here.
    """

    def failed(error: Exception, args: _Args, kwargs: dict[str, Any]) -> None:
        first, colon, rest = str(error).partition(":")
        if first in names and len(error.args) == 1:
            error.args = (f"{names[first]}{colon}{rest}",)

    return lambda function: _where_it_fails(function, failed, TypeError, ValueError, IndexError)


class TooLarge(ValueError, RuntimeError):
    """More memory than there is; a RuntimeError too, as torch's own."""


def checked(function: Function) -> Function:
    """A function or a constructor whose arguments are checked by its annotations, each time before it runs.

    Raises:
        TypeError, ValueError: naming the argument. Sizes that ask for more memory than there is are a ValueError too.
    """
    signature = inspect.signature(function)
    plan = functools.cache(lambda: _plan(function, signature))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own error says it
        kinds = plan()
        for name, value in bound.arguments.items():
            if name in kinds:
                bound.arguments[name] = _check(name, value, kinds[name])
        try:
            return function(*bound.args, **bound.kwargs)
        except (RuntimeError, TypeError, ValueError, MemoryError, OverflowError) as error:
            if not _is_about_memory(error):
                raise
            sizes = ", ".join(f"{name}={value}" for name, value in bound.arguments.items() if type(value) is int)
            raise TooLarge(f"{sizes}: expected sizes that fit into memory, got: {error}") from error

    return typing.cast(Function, run)


@functools.cache
def _settings(cls: Any) -> dict[str, list[_Kind]]:
    """What the options of a class accept, as its constructor, or that of the class it is made from, says."""
    found: dict[str, list[_Kind]] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not object:
            made = vars(base)["__init__"]
            found = {**_plan(made, inspect.signature(made)), **found} if hasattr(made, "__wrapped__") else found
    return {name: found[name] for name in cls._options if name in found}


class Options:
    """A module whose options may be set again, to what its constructor takes: a wrong one would be used in silence."""

    _options: typing.ClassVar[tuple[str, ...]] = ()  #: what a call reads, under the constructor's names
    _fixed: typing.ClassVar[tuple[str, ...]] = ()  #: what only the constructor reads

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._options and not torch.compiler.is_compiling():
            kinds = _settings(typing.cast(Any, type(self))).get(name)
            value = self._option(name, value if kinds is None else _check(name, value, kinds))
        elif name in self._fixed and name in self.__dict__ and self.__dict__[name] != value:
            raise ValueError(
                f"{name}: expected {self.__dict__[name]!r}, which the layer was made with, got {checks.given(value)}; "
                "make another layer"
            )
        super().__setattr__(name, value)

    def _option(self, name: str, value: Any) -> Any:
        """The value, if it goes with the others."""
        return value


_MEMORY = (
    "can't allocate",
    "array is too big",
    "unable to allocate",
    "calculation overflowed",
    "multiplication overflow",
    "unpacking long",
)


def _is_about_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, OverflowError)):
        return True
    return not isinstance(error, torch.OutOfMemoryError) and any(word in str(error).lower() for word in _MEMORY)
