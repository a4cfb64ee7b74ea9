"""A model's layers in the order in which its forward calls them, if that is a chain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..modules.reading import is_pristine, may_be_read, why_called
from .layer_chain import Leaf, is_sequence, leaves
from .router import TaskRouter
from .vgg import VGG


def flow(model: nn.Module, task: int) -> list[Leaf]:
    """The chain of layers of a model for a task.

    Raises:
        ValueError: it is no chain, naming where.
    """
    if is_pristine(type(model)) and (why := why_called(model)) is not None:
        raise ValueError(
            f"model: expected a model that does what its forward says, got a {type(model).__name__}: {why}"
        )
    if isinstance(model, VGG) and type(model).forward is VGG.forward:
        named: list[tuple[str, nn.Module]] = [
            ("features", model.features),
            ("avgpool", model.avgpool),
            ("flatten", nn.Flatten(1).train(model.training)),
            (f"classifier_{task}", getattr(model, f"classifier_{task}")),
        ]
        return [leaf for name, module in named for leaf in _opened(name, module)]
    if is_sequence(model) or isinstance(model, TaskRouter):
        return _opened("", model)
    return _traced(model)


def _opened(name: str, module: nn.Module) -> list[Leaf]:
    if is_sequence(module) and may_be_read(module):
        return list(leaves(module, name))
    return [Leaf(name, module, nn.Sequential(), name)]


_FUNCTIONS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.ReLU: (torch.relu, F.relu, "relu"),
    nn.SiLU: (F.silu,),
    nn.Tanh: (torch.tanh, F.tanh, "tanh"),
}


#: What only looks at a tensor.
_LOOKS = ("size", "dim", "numel", "type", "is_floating_point", "data_ptr", getattr)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_sequence(m) or isinstance(m, TaskRouter) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> list[Leaf]:
    """By torch.fx: one call after the other, each of the result before."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"model: expected a chain of layers, got a {type(model).__name__} that torch.fx cannot trace ({error})"
        ) from error
    found: list[Leaf] = []
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is None:
                last = node
            continue
        if node.op == "output":
            if node.args[0] is not last:
                raise ValueError("model: expected the last layer's result as the output, got something else")
            continue
        if not node.users:
            if node.op == "get_attr" or node.target in _LOOKS:
                continue
            raise ValueError(
                f"{_name(node)}: expected a layer whose result the next one takes, got one whose result nobody takes: "
                "what it does in place cannot be followed"
            )
        if node.all_input_nodes != [last] or not node.args or node.args[0] is not last:
            raise ValueError(
                f"{_name(node)}: expected a layer of the result of the one before ({last}), got inputs "
                f"{list(node.all_input_nodes)}: "
                f"branches cannot be followed"
            )
        found += _layers_of(model, node)
        last = node
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _layers_of(model: nn.Module, node: fx.Node) -> list[Leaf]:
    if node.op == "call_module":
        name = str(node.target)
        if len(node.args) > 1 or node.kwargs:
            others = [*node.args[1:], *node.kwargs]
            raise ValueError(f"{name}: expected a layer that is called with one input, got {others} beside it")
        return _opened(name, model.get_submodule(name))
    module = _as_module(node)
    if module is None:
        raise ValueError(f"{node.name}: expected modules, flatten and activations in forward, got {_name(node)}")
    return [Leaf(node.name, module.train(model.training), nn.Sequential(), node.name)]


def _as_module(node: fx.Node) -> nn.Module | None:
    given: dict[str, Any] = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    if node.target in (torch.flatten, "flatten"):
        return nn.Flatten(given.get("start_dim", 0), given.get("end_dim", -1))
    if node.target is F.gelu:
        return nn.GELU(given.get("approximate", "none"))
    of = next((module for module, functions in _FUNCTIONS.items() if node.target in functions), None)
    return None if of is None else of()
