"""Names in classes that users make from this package's: upstream's are hooks, every other name is the user's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

#: What upstream's users override or set: these names mean the same to them and to fastroute.
_UPSTREAMS = frozenset(
    {"forward", "_forward", "_loss", "set_exploration", "_construct_policy_storage", "_eval_stochastic_are_exp",
     "_pg_temperature", "register", "clear", "get_reward"}
)  # fmt: skip
#: What fastroute sets on an object where its class has a default.
_SET = frozenset({"_temperature", "processes"})


class _Given:
    """One of fastroute's names on a user's class: whatever the user puts on an object under it has precedence."""

    def __init__(self, name: str, found: Any) -> None:
        self._name, self._found = name, found

    def __get__(self, made: Any, cls: type) -> Any:
        if made is not None and self._name in made._fastroute_claimed:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")  # nn.Module looks further
        get = getattr(type(self._found), "__get__", None)
        return self._found if get is None else get(self._found, made, cls)


def definer(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "fastroute"


class OwnNames:
    """First base of a class that users of upstream make classes from.

    fastroute's classes have more names than upstream's. Where a user's class or object has one of them for something
    of its own, fastroute does not look at that object, but at a stand-in: an object of this package's class with the
    same state, parameters and modules. A few names are needed to make the object; these are refused.
    """

    _fastroute_house: ClassVar[type]  #: the class of this package's that a class is made from
    _fastroute_names: ClassVar[frozenset[str]]  #: the names that upstream's class does not have
    _fastroute_taken: ClassVar[tuple[str, ...]] = ("_option", "_options", "_fixed")  #: those that are refused
    _fastroute_clashes = False  #: whether the user's classes have some of them
    _fastroute_claimed: frozenset[str] = frozenset()  #: those that the user put on the object
    _fastroute_theirs: frozenset[str] = frozenset()  #: those that stand in a user's class itself

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = frozenset(vars(cls))  # before fastroute puts something there
        super().__init_subclass__(**kwargs)
        ours = [base for base in cls.__mro__ if _is_ours(base)]
        if _is_ours(cls):
            options = {name for base in ours for name in vars(base).get("_options", ())}
            known = {name for base in ours for name in vars(base) if not name.startswith(("__", "_fastroute", "_abc"))}
            cls._fastroute_names = frozenset(known - options - _UPSTREAMS - _SET - set(dir(nn.Module)))
            cls._fastroute_house = cls
            return
        cls._fastroute_theirs = own & cls._fastroute_names
        theirs: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if not _is_ours(base):
                named = vars(base).get("_fastroute_theirs", cls._fastroute_names & set(vars(base)))
                theirs |= {name: vars(base)[name] for name in named}
        for name in cls._fastroute_taken:
            if name in theirs:
                raise TypeError(f"{cls.__name__}.{name}: {_refusal(cls)}")
        cls._fastroute_clashes = bool(theirs)
        for name, value in theirs.items():  # those of a mixin behind a class that has fastroute's
            if vars(definer(cls, name))[name] is not value:
                setattr(cls, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._fastroute_claim(name)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = getattr(super(), "__setstate__", self.__dict__.update)
        known(state)
        for name in self._fastroute_claimed:  # the class is another process's
            self._fastroute_claim(name)

    def _fastroute_claim(self, name: str) -> None:
        """Told that the user puts something on the object under a name."""
        cls = type(self)
        if name not in cls._fastroute_names or _is_ours(cls):
            return
        if name in cls._fastroute_taken:
            raise AttributeError(f"{cls.__name__}.{name}: {_refusal(cls)}")
        owner = definer(cls, name)
        found = vars(owner)[name]
        theirs = not _is_ours(owner) and name in vars(owner).get("_fastroute_theirs", (name,))
        if not (theirs or isinstance(found, _Given)):
            setattr(cls, name, _Given(name, found))
        self.__dict__["_fastroute_claimed"] = self._fastroute_claimed | {name}

    def _fastroute_stands(self) -> Any:
        """The object that fastroute's own methods may be called on."""
        return self._fastroute_stand_in() if self._fastroute_clashes or self._fastroute_claimed else self

    def _fastroute_stand_in(self) -> Any:
        """An object of this package's class with the state of this one."""
        made: Any = object.__new__(self._fastroute_house)
        known = {name: value for name, value in self.__dict__.items() if name not in self._fastroute_names}
        made.__dict__ = {**known, "_fastroute_claimed": frozenset(), "_fastroute_of": self}
        return made

    def _fastroute_call(self, name: str, *args: Any) -> Any:
        """One of fastroute's methods, which may change the object's state."""
        stands = self._fastroute_stands()
        made = getattr(stands, name)(*args)
        if stands is not self:
            kept = vars(stands).items()
            self.__dict__.update((k, v) for k, v in kept if k not in ("_fastroute_claimed", "_fastroute_of"))
        return made


class ModulesOwnNames(OwnNames):
    """The same of modules, which register parameters, buffers and modules by name."""

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in every module."""
        self._fastroute_claim(name)
        super().register_buffer(name, *args, **kwargs)  # type: ignore[misc]

    def register_parameter(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in every module."""
        self._fastroute_claim(name)
        super().register_parameter(name, *args, **kwargs)  # type: ignore[misc]

    def add_module(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As in every module."""
        self._fastroute_claim(name)
        super().add_module(name, *args, **kwargs)  # type: ignore[misc]


def _refusal(cls: Any) -> str:
    return f"expected another name, fastroute needs this one itself; so it does {', '.join(cls._fastroute_taken)}"
