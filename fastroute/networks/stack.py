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

from ..ops._arguments import checked
from . import bank


def _set(module: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = nn.Parameter(value, requires_grad=requires_grad)


class Stack(nn.Module):
    """K modules as one, every parameter [K, ...]. A checkpoint has the keys that a list of the modules would have.

    A step then costs autograd and the optimizer the same whatever K is. In return a module that no sample took has
    zeros for a gradient, not None, so that momentum and weight decay go on for it.

    Args:
        modules: K of them, which do the same with parameters of the same shapes, see ``bank.run``; they are copied.

    Attributes:
        pattern: one of the modules, with the stacked parameters for its own.
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
        self._stacked = {name for name, _ in modules[0].named_parameters()}
        self.pattern = copy.deepcopy(modules[0])
        for name, _ in list(self.pattern.named_parameters()):
            each = [m.get_parameter(name) for m in modules]
            wants = {p.requires_grad for p in each}
            if len(wants) > 1:
                raise ValueError(f"stacked: expected {name} to require a gradient in all modules or in none")
            _set(self.pattern, name, torch.stack([p.detach() for p in each]), wants.pop())
        self.register_state_dict_post_hook(_to_list)
        self.register_load_state_dict_pre_hook(_from_list)

    def _do_alike(self, modules: Sequence[nn.Module]) -> bool:
        return bank.are_alike(modules)

    def extra_repr(self) -> str:
        return f"count={self.count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> nn.Module:
        """A copy of one of the modules."""
        if not -self.count <= k < self.count:
            raise IndexError(f"index: expected one below {self.count}, got {k}")
        made = copy.deepcopy(self.pattern)
        for name, p in list(made.named_parameters()):
            _set(made, name, p.detach()[k].clone(), p.requires_grad)
        return made

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(self.count))

    def each(self) -> list[Callable[[Tensor], Tensor]]:
        """The modules, to be called: the pattern with the parameters of one of them for its own.

        Raises:
            RuntimeError: the pattern has other tensors than it was made with.
        """
        pattern = self.pattern
        if any(map(parametrize.is_parametrized, pattern.modules())):
            pattern = _opened(pattern)
        tensors = dict([*pattern.named_parameters(), *pattern.named_buffers()])
        for name in tensors:
            if _before(name) not in self._stacked:
                raise RuntimeError(
                    f"stacked: expected the parameters that the modules had, parametrized or pruned, got {name} too, "
                    "which cannot be told apart by module; make the layer with stacked=False"
                )

        def call(k: int, x: Tensor) -> Tensor:
            own = {name: t[k] for name, t in tensors.items()}
            made: Tensor = torch.func.functional_call(pattern, own, (x,))
            return made

        return [partial(call, k) for k in range(self.count)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not defined: which module a sample takes is said by a plan, see ``bank.run``."""
        raise TypeError("Stack: a stack of modules is run by Selection or a decision, not called")


def _opened(m: nn.Module) -> nn.Module:
    """A shallow copy in which what parametrizations make of all modules' tensors stands in their place."""
    made: nn.Module = type(m).__new__(type(m))
    made.__dict__ = m.__dict__.copy()
    children = m._modules.items()
    made._modules = {name: None if child is None else _opened(child) for name, child in children}
    if parametrize.is_parametrized(m):
        made.__class__ = type(m).__bases__[0]
        own: Any = made._modules.pop("parametrizations")
        made._buffers = {**m._buffers, **{name: getattr(m, name) for name in own}}
    return made


def _before(name: str) -> str:
    """What a tensor was called before pruning renamed it."""
    return name.removesuffix("_orig").removesuffix("_mask")


def _to_list(stack: Stack, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The keys that a list of modules would have: views of the stacked parameters."""
    named = {name: state_dict.pop(f"{prefix}pattern.{name}") for name, _ in stack.pattern.named_parameters()}
    for k in range(stack.count):
        for name, p in named.items():
            state_dict[f"{prefix}{k}.{name}"] = p[k]


def _from_list(
    stack: Stack, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
    unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """The other way round. What is missing, or of another shape, is named as it is there, and left as it was here."""
    for name, p in stack.pattern.named_parameters():
        keys = [f"{prefix}{k}.{name}" for k in range(stack.count)]
        found = {key: state_dict.pop(key) for key in keys if key in state_dict}
        missing_keys += [key for key in keys if key not in found]
        wrong = {key: t for key, t in found.items() if t.shape != p.shape[1:]}
        error_msgs += [
            f"size mismatch for {key}: expected {list(p.shape[1:])}, the checkpoint has {list(t.shape)}"
            for key, t in wrong.items()
        ]
        whole = len(found) == stack.count and not wrong
        state_dict[f"{prefix}pattern.{name}"] = torch.stack(list(found.values())) if whole else p.detach()
