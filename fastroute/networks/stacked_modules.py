"""Modules that do the same, their parameters stacked: an optimizer and autograd see one where there were K.

Axes: K modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modules.reading import at_every_place, name_before
from ..ops.arguments import checked
from . import grouped_modules

#: Under this name a stack has its pattern, with it begin the keys of a state dict.
_PATTERN = "pattern."


def _set(module: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = value


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by every name that they have, tied ones under several."""
    return dict(module.named_parameters(remove_duplicate=False))


class Stack(nn.Module):
    """K modules as one, every parameter [K, ...].

    A step then costs autograd and the optimizer the same whatever K is. In return a module that no sample took has
    zeros for a gradient, not None, so that momentum and weight decay go on for it.

    The state dict has the parameters as they are, ``pattern.{name}`` [K, ...]. One that a list of the modules has,
    ``{k}.{name}``, is loaded too, also in parts (``strict=False``); :func:`unstacked_state_dict` makes one.

    Args:
        modules: K of them, which do the same with parameters of the same shapes, see ``grouped_modules.run``.
            They are copied. Parameters that are tied within each of them stay tied.

    Attributes:
        pattern: one of the modules, with the stacked parameters for its own.

    Examples:
        >>> stack = fastroute.Stack([nn.Linear(8, 2) for _ in range(20)])
        >>> {name: list(p.shape) for name, p in stack.named_parameters()}
        {'pattern.weight': [20, 2, 8], 'pattern.bias': [20, 2]}
    """

    @checked
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        modules = list(modules)
        if not modules or not self._do_alike(modules):
            raise ValueError(
                "stacked: expected modules that do the same with parameters of the same shapes (stacks of Linear, "
                f"activations, norms, dropout), got {', '.join(dict.fromkeys(type(m).__name__ for m in modules))}"
            )
        if any(isinstance(m, nn.Conv2d) for m in modules[0].modules()):
            raise ValueError("stacked: expected modules without Conv2d, whose images may be too large to go together")
        self.count = len(modules)
        each = [_own(m) for m in modules]
        ties = _ties(each)
        self._stacked = set(ties)
        self.pattern = copy.deepcopy(modules[0])
        made: dict[str, nn.Parameter] = {}
        for name, first in ties.items():
            if name == first:
                wants = {own[name].requires_grad for own in each}
                if len(wants) > 1:
                    raise ValueError(f"stacked: expected {name} to require a gradient in all modules or in none")
                made[name] = nn.Parameter(torch.stack([own[name].detach() for own in each]), wants.pop())
            _set(self.pattern, name, made[first])
        for leaf in self.pattern.modules():
            if leaf._parameters and hasattr(leaf, "reset_parameters"):
                leaf.__dict__["reset_parameters"] = partial(_reset, [leaf], self.count)  # its class takes it for one
        self.register_load_state_dict_pre_hook(_from_list)

    def _do_alike(self, modules: Sequence[nn.Module]) -> bool:
        return grouped_modules.are_alike(modules)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, those of one module after the other, as their classes draw them."""
        _reset([m for m in self.pattern.modules() if "reset_parameters" in m.__dict__], self.count)

    def extra_repr(self) -> str:
        return f"count={self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> nn.Module:
        """A copy of one of the modules."""
        if not -self.count <= k < self.count:
            raise IndexError(f"index: expected one below {self.count}, got {k}")
        made = copy.deepcopy(self.pattern)
        one: dict[int, Any] = {}
        for m in made.modules():
            m.__dict__.pop("reset_parameters", None)
        for name, t in self._tensors(made).items():
            own = t.detach()[k].clone()
            value = one.setdefault(id(t), nn.Parameter(own, t.requires_grad) if isinstance(t, nn.Parameter) else own)
            path, _, last = name.rpartition(".")
            owner = made.get_submodule(path)
            (owner._parameters if last in owner._parameters else owner._buffers)[last] = value
        return made

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(self.count))

    def _tensors(self, pattern: nn.Module | None = None) -> dict[str, Tensor]:
        """What has a part for each module, by its name in one of them."""
        pattern = self.pattern if pattern is None else pattern
        found = (*_own(pattern).items(), *pattern.named_buffers(remove_duplicate=False))
        return {name: t for name, t in found if name_before(name) in self._stacked}

    def each(self, count: int | None = None) -> list[Callable[[Tensor], Tensor]]:
        """The modules, to be called: the pattern with the parameters of one of them for its own.

        Args:
            count: how many the parameters are of, where the pattern has others for the time of a call; all.

        Raises:
            RuntimeError: the pattern has other tensors than it was made with, or one that is not stacked.
        """
        pattern, count = self.pattern, self.count if count is None else count
        if any(map(parametrize.is_parametrized, pattern.modules())) or any(map(self._is_plain, self._stacked)):
            pattern = _opened(pattern, self._stacked)
        tensors = dict([*pattern.named_parameters(), *pattern.named_buffers()])
        for name, t in tensors.items():
            if name_before(name) not in self._stacked:
                raise RuntimeError(
                    f"stacked: expected the parameters that the modules had, parametrized or pruned, got {name} too, "
                    "which cannot be told apart by module; make the layer with stacked=False"
                )
            if t.shape[:1] != (count,):
                raise RuntimeError(f"stacked: expected {name} of all modules, [{count}, ...], got {list(t.shape)}")

        def call(k: int, x: Tensor) -> Tensor:
            own = {name: t[k] for name, t in tensors.items()}
            return torch.func.functional_call(pattern, at_every_place(pattern, own), (x,), tie_weights=False)

        return [partial(call, k) for k in range(count)]

    def _is_plain(self, name: str) -> bool:
        """Whether a plain tensor stands in a parameter's place, as in DataParallel's replicas and of hypernetworks."""
        path, _, last = name.rpartition(".")
        return isinstance(vars(self.pattern.get_submodule(path)).get(last), Tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not defined: which module a sample takes is said by a plan, see ``grouped_modules.run``."""
        raise TypeError("Stack: a stack of modules is run by Selection or a decision, not called")


def _opened(m: nn.Module, names: set[str]) -> nn.Module:
    """A shallow copy in which what parametrizations make of all modules' tensors stands in their place, as a buffer.

    So do plain tensors that have one of the names.
    """
    made: nn.Module = type(m).__new__(type(m))
    made.__dict__ = m.__dict__.copy()
    made._modules = {
        key: None
        if child is None
        else _opened(child, {n.removeprefix(f"{key}.") for n in names if n.startswith(f"{key}.")})
        for key, child in m._modules.items()
    }
    if plain := {name for name in names & m.__dict__.keys() if isinstance(m.__dict__[name], Tensor)}:
        made._parameters = {name: p for name, p in m._parameters.items() if name not in plain}
        made._buffers = {**m._buffers, **{name: made.__dict__.pop(name) for name in plain}}
    if parametrize.is_parametrized(m):
        made.__class__ = type(m).__bases__[0]
        own: Any = made._modules.pop("parametrizations")
        made._buffers = {**made._buffers, **{name: getattr(m, name) for name in own}}
    return made


def _ties(each: Sequence[dict[str, nn.Parameter]]) -> dict[str, str]:
    """Of every name of a parameter, the first name that the same parameter has.

    Raises:
        ValueError: modules share a parameter, or tie different ones.
    """
    made: list[dict[str, str]] = []
    owners: dict[int, tuple[int, str]] = {}
    for k, own in enumerate(each):
        first: dict[int, str] = {}
        made.append({name: first.setdefault(id(p), name) for name, p in own.items()})
        for name, p in own.items():
            other, theirs = owners.setdefault(id(p), (k, name))
            if other != k:
                raise ValueError(
                    f"stacked: expected modules with parameters of their own, but {name} of module {k} is {theirs} of "
                    f"module {other}; copy it (copy.deepcopy), or leave stacked=False"
                )
        for name, tie in made[-1].items():
            if made[0][name] != tie:
                raise ValueError(
                    f"stacked: expected the same parameters tied in all modules, but {name} is "
                    f"{made[0][name]} in module 0 and {tie} in module {k}; tie them alike, or leave stacked=False"
                )
    return made[0]


@torch.no_grad()
def _reset(leaves: Sequence[nn.Module], count: int) -> None:
    """Draw the stacked parameters of these modules anew, those of the first of ``count`` modules first."""
    parameters = {id(p): p for leaf in leaves for p in leaf._parameters.values() if p is not None}
    sharded: dict[Any, Any] = {key: p for key, p in parameters.items() if hasattr(p, "placements")}
    whole = {
        key: torch.empty(p.shape, dtype=p.dtype, device=p.device) if key in sharded else p.detach()
        for key, p in parameters.items()
    }
    for k in range(count):
        for leaf in leaves:
            one: Any = copy.copy(leaf)
            one.__dict__["_parameters"] = {
                name: p if p is None else nn.Parameter(whole[id(p)][k], False) for name, p in leaf._parameters.items()
            }
            type(one).reset_parameters(one)
    for key, p in sharded.items():
        p.copy_(torch.distributed.tensor.distribute_tensor(whole[key], p.device_mesh, p.placements))


# ---------------------------------------------------------------------------------------------------- state dicts


@checked
def unstacked_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that a module would have if every stack in it were a list of modules, ``{k}.{name}``.

    It is what the same network without ``stacked=True`` loads, and what upstream loads. Entries of stacks are copies.

    Args:
        module: anything, with stacks in it or without.

    Examples:
        >>> select = fastroute.Selection(nn.Linear(8, 2), nn.Linear(8, 2), stacked=True)
        >>> list(fastroute.unstacked_state_dict(select))
        ['_submodules.0.weight', '_submodules.0.bias', '_submodules.1.weight', '_submodules.1.bias']
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    for path, stack in module.named_modules(remove_duplicate=False):
        if not isinstance(stack, Stack):
            continue
        prefix = f"{path}." if path else ""
        inside = {key: t for key, t in state.items() if key.startswith(prefix + _PATTERN)}
        names, made = stack._tensors(), dict[str, Tensor]()
        for key, t in state.items():
            if key not in inside:
                made[key] = t
            elif prefix + "0." + key[len(prefix + _PATTERN) :] not in made:  # the first of them, for all
                for k in range(stack.count):
                    for inner, whole in inside.items():
                        name = inner[len(prefix + _PATTERN) :]
                        made[f"{prefix}{k}.{name}"] = (whole[k] if name in names else whole).clone()
        state = made
    return state


def from_stack(state_dict: dict[str, Any], prefix: str, count: int) -> None:
    """In a state dict that a list of ``count`` modules is to load, give what a stack has saved the list's keys."""
    for key in [key for key in state_dict if key.startswith(prefix + _PATTERN)]:
        whole = state_dict[key]
        if whole.dim() and whole.shape[0] == count:
            del state_dict[key]
            for k in range(count):
                state_dict[f"{prefix}{k}.{key[len(prefix + _PATTERN) :]}"] = whole[k].clone()


def _from_list(
    stack: Stack, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
    unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """The other way round, also of some of the modules. What is missing is named, and left as it was here."""
    names = stack._tensors()
    listed = {f"{prefix}{k}.{name}": (k, name) for name in names for k in range(stack.count)}
    if not any(key in state_dict for key in listed):
        return
    for name, own in names.items():
        if prefix + _PATTERN + name in state_dict:
            continue  # and the list's keys are unexpected
        keys = [f"{prefix}{k}.{name}" for k in range(stack.count)]
        found = {k: state_dict.pop(key) for k, key in enumerate(keys) if key in state_dict}
        missing_keys += [key for k, key in enumerate(keys) if k not in found]
        for k, t in list(found.items()):
            if t.shape != own.shape[1:]:
                error_msgs.append(
                    f"size mismatch for {keys[k]}: expected {list(own.shape[1:])}, the checkpoint has {list(t.shape)}"
                )
                del found[k]
        state_dict[prefix + _PATTERN + name] = _joined(own, found, stack.count)


def _joined(own: Tensor, found: dict[int, Tensor], count: int) -> Tensor:
    """The parts of all modules: those that were found, in the place of one's own."""
    if len(found) == count:
        return torch.stack(list(found.values()))
    made = own.detach()
    if not found:
        return made
    if made.is_meta:  # ``assign=True``: what comes with no part shows that it did not
        made = torch.full(own.shape, torch.nan, dtype=own.dtype, device=next(iter(found.values())).device)
    else:
        made = made.clone()
    for k, t in found.items():
        made[k] = t
    return made
