"""Which of a model's parts serve one task, and which serve several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .schedule import Anchors, needed


def servants(anchors: Anchors, outputs: Iterable[str]) -> dict[str, set[str]]:
    """The outputs that each node is needed for, by its name; 'root' included."""
    found: dict[str, set[str]] = {}
    for output in dict.fromkeys(outputs):
        for name in needed(anchors, [output]):
            found.setdefault(name, set()).add(output)
    return found


def _parameters(layers: Mapping[str, object], names: Iterable[str]) -> dict[int, nn.Parameter]:
    """By identity, in the order of the layers."""
    chosen = set(names)
    modules = [layer for name, layer in layers.items() if name in chosen and isinstance(layer, nn.Module)]
    return {id(p): p for module in modules for p in module.parameters()}


def task_parameters(
    anchors: Anchors, outputs: Sequence[str], layers: Mapping[str, object], task: str
) -> list[nn.Parameter]:
    """Parameters that one output depends on and no other."""
    theirs = _parameters(layers, needed(anchors, [name for name in outputs if name != task]))
    return [p for key, p in _parameters(layers, needed(anchors, [task])).items() if key not in theirs]


def shared_parameters(anchors: Anchors, outputs: Sequence[str], layers: Mapping[str, object]) -> list[nn.Parameter]:
    """Parameters that several outputs depend on: of one layer, or of several that have them in common."""
    serving = servants(anchors, outputs)
    serves: dict[int, set[str]] = {}
    for name, tasks in serving.items():
        for key in _parameters({name: layers.get(name)}, [name]):
            serves.setdefault(key, set()).update(tasks)
    return [p for key, p in _parameters(layers, serving).items() if len(serves[key]) > 1]


def feature_names(anchors: Anchors, outputs: Sequence[str]) -> list[str]:
    """Nodes that serve several tasks and whose outputs a task's own nodes take, or that are outputs themselves."""
    serving = servants(anchors, outputs)
    shared = {name for name, tasks in serving.items() if len(tasks) > 1}
    taken = {a for name, before in anchors.items() if name in serving and name not in shared for a in before}
    return [name for name in ("root", *anchors) if name in shared and (name in taken or name in outputs)]
