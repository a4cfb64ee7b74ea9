"""Names that a class has taken: what is put under one of them is found there, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from ..ops.checks import given

_NOTHING = object()
_VALUES = "_values_by_name"  #: where a module holds what is put under yielding names
Class = TypeVar("Class", bound=type)


class Yielding:
    """A name that the house has added to an upstream's class: what a user puts under it comes first.

    What is no child and no tensor of the module is held in a dict of its own: Dynamo of torch 2.11 would look for it in
    ``__dict__`` by this descriptor, again and again. A dict is never written to, as shallow copies share it.
    """

    def __init__(self, name: str, house: Any) -> None:
        self.name, self.house, self.__doc__ = name, house, house.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is not None:
            own = instance.__dict__
            for held in (*(own.get(kind, ()) for kind in (_VALUES, "_modules", "_parameters", "_buffers")), own):
                if self.name in held:
                    return held[self.name]
        return self.house.__get__(instance, owner)

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[_VALUES] = {**instance.__dict__.get(_VALUES, {}), self.name: value}

    def __delete__(self, instance: Any) -> None:
        if not self.forget(instance):
            raise AttributeError(self.name)

    def forget(self, instance: Any) -> bool:
        """Whether there was a value to forget."""
        own = instance.__dict__
        found = self.name in own or self.name in own.get(_VALUES, ())
        own.pop(self.name, None)  # of a model that an older version has saved
        if self.name in own.get(_VALUES, ()):
            own[_VALUES] = {name: value for name, value in own[_VALUES].items() if name != self.name}
        return found


def added(cls: type, upstream: Collection[str]) -> frozenset[str]:
    """The public methods and properties of a class that neither ``nn.Module`` nor its upstream has."""
    known = {*dir(nn.Module), *upstream}
    return frozenset(name for name in dir(cls) if not name.startswith("_") and name not in known)


def yields(*upstream: str) -> Any:
    """A decorator of a class that gives every name which its upstream does not have to whoever takes it.

    The house's own code must not read these names of an instance.
    """

    def decorate(cls: Class) -> Class:
        for name in added(cls, upstream):
            setattr(cls, name, Yielding(name, inspect.getattr_static(cls, name)))
        return cls

    return decorate


def has_own(instance: Any, names: frozenset[str]) -> bool:
    """Whether an instance has one of these names itself, in place of its class's."""
    own = vars(instance)
    if torch.compiler.is_compiling():  # Dynamo of torch 2.11 looks single names up, no more
        return any(name in own for name in names)
    return not names.isdisjoint(own)


class TakenNames:
    """First base of a module that refuses what would be put under the name of a method or a property of the house.

    torch registers a child under any name, where nobody finds it: the method comes first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not torch.compiler.is_compiling() and getattr(type(self), name, _NOTHING) is not _NOTHING:
            _check(self, name, value)
        super().__setattr__(name, value)


def _check(module: Any, name: str, value: Any) -> None:
    cls = type(module)
    base = next(base for base in cls.__mro__ if name in vars(base))
    held = vars(base)[name]
    if isinstance(held, Yielding):
        held.forget(module)  # a child is held elsewhere
        return
    if not base.__module__.startswith("fastroute."):
        return
    is_method = isinstance(held, (FunctionType, staticmethod, classmethod))
    if isinstance(value, nn.Module) or (is_method and not callable(value)):
        kind = "method" if is_method else "property" if isinstance(held, property) else "value"
        raise ValueError(
            f"{name}: expected another name for an attribute of {cls.__name__}, which has a {kind} {name!r} already, "
            f"got {given(value)}"
        )
