"""Methods that an upstream calls and fastroute does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Overrides:
    """First base of a class of which upstream calls methods that are not called here: whoever overrides one is told."""

    _never_called: ClassVar[Mapping[str, str]] = {}  #: the methods, and what to override or set instead

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_never_called" in cls.__dict__:
            return
        known = next(base for base in cls.__mro__ if "_never_called" in base.__dict__)
        for name, instead in cls._never_called.items():
            if getattr(cls, name, None) is not getattr(known, name, None):
                raise TypeError(
                    f"{cls.__name__}.{name}: expected no override of a method that upstream calls and fastroute does "
                    f"not, which would change nothing; instead: {instead}"
                )
