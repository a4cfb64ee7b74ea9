"""Whether a module may be read: its parameters taken and used for what a call of it does.

Whatever changes what a call does without changing the class (a hook, a forward of its own, a parametrization, a tensor
subclass, an adapter) is seen here, and only here. Whoever reads modules asks here first, and calls them where the
answer is no.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ..importing import constant_result
from ..ops.arguments import is_as_written
from ..ops.backends import extension
from ..ops.host import is_traced
from .names import has_own

_AFFINE = ("weight", "bias")
#: The parameters and buffers that the classes which are read have, under their names.
_TENSORS: dict[type, tuple[str, ...]] = {
    **dict.fromkeys((nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d), _AFFINE),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _AFFINE),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _AFFINE),
    **dict.fromkeys((nn.RMSNorm, nn.PReLU), ("weight",)),
}
#: What an instance shadows by having it in its ``__dict__``: what a call runs, and the tensors that it uses.
_SHADOWED = frozenset({
    "forward", "_conv_forward", "_check_input_dim", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl",
    "_slow_forward", "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
})  # fmt: skip
#: What a class runs in a call; the latter is another's while something traces.
_METHODS = ("forward", "_conv_forward", "_check_input_dim")
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (type(None), nn.Parameter, Tensor)

#: Hooks on all modules.
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)

#: By class: names of what a call of it runs, what looks that up, and what it was when the class was first seen.
_originals: dict[tuple[type, bool], tuple[list[str], Callable[[type], Any], Any]] = {}


def options(m: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Its arguments and their names, as its class declares them, and a forward of its own; not its mode.

    Dynamo of torch 2.11 cannot go through m.__dict__, which has them too.
    """
    own = ("forward",) if "forward" in m.__dict__ else ()
    return tuple((name, getattr(m, name)) for name in (*getattr(type(m), "__constants__", ()), *own))


# ---------------------------------------------------------------------------------------------------- what is looked at


def _original(cls: type, names: Sequence[str]) -> tuple[list[str], Callable[[type], Any], Any] | None:
    """None if somebody has replaced one of them."""
    names = [name for name in names if hasattr(cls, name)]
    for name in names:
        owner = next(base for base in cls.__mro__ if name in vars(base))
        function = vars(owner)[name]
        if function is global_hooks._forward_unimplemented:  # of containers
            continue
        own = getattr(function, "__qualname__", "").startswith(f"{owner.__qualname__}.")
        if not own or getattr(function, "__module__", None) != owner.__module__ or not is_as_written(function):
            return None
    look = attrgetter(*names)
    return names, look, look(cls)


@constant_result
def is_pristine(cls: type) -> bool:
    """Whether a call of an instance runs what the class was written with: nobody has replaced a method of it."""
    key = cls, torch.compiler.is_compiling() or is_traced()
    known = _originals.get(key)
    if known is None:
        known = _original(cls, _METHODS if key[1] else _METHODS + _CALLS)
        if known is None:
            return False
        _originals[key] = known
    return bool(known[1](cls) == known[2])


def are_watched() -> bool:
    """Whether somebody looks at every module's calls, or at all functions of PyTorch."""
    return any(_GLOBAL_HOOKS) or _functions_are_watched()


def _functions_are_watched() -> bool:
    """Whether a ``TorchFunctionMode`` is active that is none of PyTorch's own (a default device is one)."""
    if torch.compiler.is_compiling() or not (count := torch._C._len_torch_function_stack()):
        return False
    modes = map(torch._C._get_function_stack_at, range(count))
    return any(not type(mode).__module__.startswith("torch.") for mode in modes)


def is_hooked(m: nn.Module) -> bool:
    """Whether somebody looks at its calls."""
    own = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(own) or are_watched()


def _is_plain(t: Any) -> bool:
    """Whether it is a tensor, and nothing but one, or None. What torch.func wraps is: ops know its rules.

    One whose memory holds other numbers (``z.conj().imag``) is not: the dispatcher sees that of no tensor in a list.
    """
    kind = type(t)  # a trace's stand-in is read as what it stands for
    if kind in _PLAIN:
        return t is None or torch.compiler.is_compiling() or not t.is_neg()
    return bool(kind.__module__.startswith("torch._subclasses."))


def why_called(m: nn.Module, kinds: tuple[type, ...] = ()) -> str | None:
    """Why a module has to be called rather than read, its children apart; None if it may be read.

    That its class is one which the reader knows is the reader's to see; tensors of ``kinds`` are, too.
    """
    cls = type(m)
    if not is_pristine(cls):
        return f"a method of {cls.__name__} is replaced"
    if has_own(m, _SHADOWED):
        return "a forward or a tensor of its own in place of the class's"
    if torch.compiler.is_compiling():  # no __dict__ is guarded: a later forward is seen where the class's is looked up
        for name in _METHODS:
            getattr(m, name, None)
    if is_hooked(m):
        return "a hook on all modules, or a function mode" if are_watched() else "a hook"
    names = _TENSORS.get(cls)
    if names is not None:
        found = m._parameters
        if len(found) != len(names) or any(name not in found for name in names):
            return "parameters that its class does not have"
    for t in (*m._parameters.values(), *m._buffers.values()):
        if not _is_plain(t) and type(t) not in kinds:
            return f"a {type(t).__name__} for a parameter"
    return None


def may_be_read(m: nn.Module, kinds: tuple[type, ...] = ()) -> bool:
    """Whether a call of a module does what its class and its tensors say; its children are to be asked for themselves.

    Seen are: methods replaced on the instance or the class, own and global hooks of every kind, parametrizations (which
    change the class, too), ``weight_norm``, ``spectral_norm`` and ``prune`` of the old style, tensor subclasses,
    wrapped tensors, lazy and offloaded parameters. Tensors of ``kinds`` are the reader's own matter.
    """
    return why_called(m, kinds) is None


def at_every_place(m: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other tensors in place of a module's, by name, for ``functional_call(..., tie_weights=False)``.

    A parameter has every name under which another module has it, too. A module in several places has one name: of two,
    torch would put the other tensors back as its own.
    """
    every = (m.named_parameters(remove_duplicate=False), m.named_buffers(remove_duplicate=False))
    other = {t: tensors[name] for named in every for name, t in named if name in tensors}
    return {
        f"{path}.{name}" if path else name: other[t]
        for path, part in m.named_modules()
        for name, t in (*part._parameters.items(), *part._buffers.items())
        if t is not None and t in other
    }


def call(m: nn.Module, x: Tensor) -> Tensor:
    """What a module gives for x, its floating-point parameters taken in x's dtype."""
    other = {
        name: p.to(x.dtype)
        for name, p in m.named_parameters()
        if type(p) is nn.Parameter and p.is_floating_point() and p.dtype != x.dtype
    }
    if not other:
        return m(x)  # type: ignore[no-any-return]
    return torch.func.functional_call(m, at_every_place(m, other), (x,), tie_weights=False)


def name_before(name: str) -> str:
    """What a tensor was called before a parametrization, or pruning, renamed it."""
    return name.replace("parametrizations.", "").removesuffix(".original").removesuffix("_orig").removesuffix("_mask")


def reset(*modules: Any) -> None:
    """Draw the parameters of modules anew, of those that can: what a user has put in a layer's place may not."""
    for m in modules:
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


def signature(m: nn.Module) -> tuple[Any, ...]:
    """What else than its class and its tensors' values tells what a module does; alike modules have the same."""
    tensors = (*m._parameters.items(), *m._buffers.items())
    return m.training, options(m), tuple((name, None if t is None else _form(t)) for name, t in tensors)


def _form(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device


# --------------------------------------------------------------------------------------------------------------- memos


class Memo:
    """Holds what was found out about modules, given complete: threads see all of it or nothing. Copies are empty."""

    def __init__(self) -> None:
        self.known: Any = None

    def __deepcopy__(self, memo: Any) -> Memo:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


@cache
def _compiled() -> Any:
    """fastroute._C, if it can tell fingerprints of modules (see csrc/common/module.cpp) here; else None."""
    if extension()[0] is None or not hasattr(Tensor, _EXCHANGE) or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        return importlib.import_module("fastroute._C")
    except ImportError:  # built without Python's headers
        return None


@cache
def _has_versions() -> bool:
    """Whether each change of a dict, and of an object's attributes, gives it another version; nothing else does."""
    compiled = _compiled()

    class Owner:
        pass

    def differ(d: dict[str, Any], changes: Sequence[Callable[[], Any]]) -> bool:
        seen = [compiled.version(d)]
        for change in changes:
            change()
            seen.append(compiled.version(d))
            if compiled.version(d) != seen[-1] or (d.copy(), list(d.items()), d.get("a"), "b" in d) is None:
                return False
        return len(set(seen)) == len(seen) and compiled.version(d) == seen[-1]

    made: tuple[dict[str, Any], ...] = {"a": 1}, OrderedDict(a=1)
    for d in made:
        if not differ(d, [partial(d.__setitem__, "a", 2), partial(d.update, b=1), partial(d.pop, "b"), d.clear]):
            return False
    owner: Any = Owner()
    owner.a = 1
    given = partial(setattr, owner, "a", 2), partial(setattr, owner, "b", 1), partial(delattr, owner, "b")
    return differ(owner.__dict__, given)


_EXCHANGE = "__dlpack_c_exchange_api__"


class Proof:
    """Shows at little cost that what was found out by looking at modules is still so.

    It holds as long as nothing has changed that ``why_called`` and ``signature`` of these modules, or their children,
    depend on. That nothing at all has changed is told by a fingerprint, where there is the extension; where something
    has, or without it, they are looked over.

    Args:
        modules: what it is about.
        read: the modules that were looked at.
        others: modules of whom only the classes were looked at.
        changing: modules that may be read, and keep what changes from call to call among their attributes.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        read: Sequence[nn.Module],
        others: Sequence[Any] = (),
        changing: Sequence[nn.Module] = (),
    ) -> None:
        every = (*read, *changing)
        self._modules, self._every = list(modules), (*every, *others)
        self._dicts: list[dict[str, Any]] = [m.__dict__ for m in read]
        self._changing = [m.__dict__ for m in changing]
        self._children: list[dict[str, Any]] = [m._modules for m in every if m._modules]
        self._owners: list[dict[str, Any]] = [d for m in every for d in (m._parameters, m._buffers) if d]
        hooks: list[dict[str, Any]] = [m.__dict__[name] for m in every for name in _HOOKS]
        self._empty, self._full = [d for d in hooks if not d], [d for d in hooks if d]
        self._classes = dict.fromkeys(map(type, every))
        tensors = [t for d in self._owners for t in d.values()]
        self._all_on_cpu = all(t.is_cpu for t in tensors if t is not None)  # which is told faster than a device
        dicts: list[dict[Any, Any]] = [*self._dicts, *self._children, *hooks, *_GLOBAL_HOOKS]
        versions = not torch.compiler.is_compiling() and _compiled() is not None and _has_versions()
        self._facts = list(self._every), dicts, self._owners, _PLAIN, getattr(Tensor, _EXCHANGE, None), versions
        self._printed = self._print()
        self._copies, self._state, self._called = [d.copy() for d in self._dicts], self._look(), self._calls()
        self._looks = self._attributes()

    def _print(self) -> tuple[bytes, Any]:
        """The fingerprint of what is, and that, kept alive: it has addresses. Empty without the extension or traced."""
        compiled = None if torch.compiler.is_compiling() or is_traced() else _compiled()
        if compiled is None:
            return b"", None
        kept = [d.copy() for d in self._facts[1]]
        return compiled.fingerprint(*self._facts), kept

    def _attributes(self) -> list[tuple[type, str, Any]] | None:
        """Of every class what a call runs; None where a fingerprint is not enough."""
        pristine, shadowed, watched = self._called
        if watched or not self._printed[0] or not all(pristine) or not all(shadowed):
            return None
        return [(cls, name, getattr(cls, name)) for cls in self._classes for name in _originals[cls, False][0]]

    def _look(self) -> tuple[Any, ...]:
        named: list[Any] = [t for d in self._owners for t in d.values()]
        kinds = list(map(type, named))
        tensors = [t for t in named if t is not None] if type(None) in kinds else named
        where = [t.is_cpu for t in tensors] if self._all_on_cpu else [t.device for t in tensors]
        return (
            list(map(type, self._every)),
            list(chain.from_iterable(map(dict.items, self._children))),
            list(chain.from_iterable(self._owners)),
            kinds,
            [t.shape for t in tensors],
            [t.dtype for t in tensors],
            where,
        )

    def _calls(self) -> tuple[Any, ...]:
        """What is no matter of the modules' own."""
        return list(map(is_pristine, self._classes)), list(map(_SHADOWED.isdisjoint, self._changing)), are_watched()

    def holds(self, modules: Sequence[Any]) -> bool:
        """Whether it does, and is about these modules. Not for a trace, which is guarded by what it reads."""
        if (
            self._looks is not None
            and not _functions_are_watched()
            and all(map(_SHADOWED.isdisjoint, self._changing))
            and _compiled().is_same(self._printed[0], modules, self._modules, self._looks, *self._facts)
        ):
            return True
        if self._modules != modules or self._calls() != self._called:
            return False
        if any(self._empty) or not all(self._full):
            return False
        now = self._print()  # before it is looked at: what changes meanwhile is not in it
        try:
            if self._dicts != self._copies or self._look() != self._state:
                return False
        except (RuntimeError, ValueError, TypeError):  # of tensors or arrays, one of which has changed
            return False
        self._printed = now
        if self._looks is None:  # of a proof that was made in a trace
            self._looks = self._attributes()
        return True
