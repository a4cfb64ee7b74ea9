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


def parameters_of(
    serving: Mapping[str, set[str]], layers: Mapping[str, object], tasks: set[str] | None
) -> list[nn.Parameter]:
    """Parameters that serve just these tasks; with None, those that serve several. In the order of the layers."""
    serves: dict[int, set[str]] = {}
    every: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        if name in serving and isinstance(layer, nn.Module):
            for p in layer.parameters():
                every[id(p)] = p
                serves.setdefault(id(p), set()).update(serving[name])
    return [p for key, p in every.items() if (len(serves[key]) > 1 if tasks is None else serves[key] == tasks)]


def feature_names(anchors: Anchors, outputs: Sequence[str]) -> list[str]:
    """Nodes that serve several tasks and whose outputs a task's own nodes take, or that are outputs themselves."""
    serving = servants(anchors, outputs)
    shared = {name for name, tasks in serving.items() if len(tasks) > 1}
    taken = {a for name, before in anchors.items() if name in serving and name not in shared for a in before}
    return [name for name in ("root", *anchors) if name in shared and (name in taken or name in outputs)]
