"""The graph that a list of dicts describes: read, checked, and as a networkx graph or what stands for one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..ops.checks import given as shown

ROOT = "root"  #: the node that stands for the model's input
AUTO = "auto"  #: a loss weight that is learned
KEYS = ("name", "layers", "anchor_layer", "loss", "loss_weight", "loss_init_val")


@dataclass(frozen=True)
class Node:
    """A dict of ``task_layers``, checked; ``loss`` and ``loss_weight`` hold one value, or none if there is no key."""

    name: str
    layers: Callable[..., Any]
    anchors: tuple[str, ...]
    loss: tuple[Any, ...] = ()
    loss_weight: tuple[Any, ...] = ()
    init: float | None = None  #: of a weight that is learned

    @property
    def weight_name(self) -> str:
        """The attribute that a learned weight is."""
        return f"{self.name}_loss"


def read(task_layers: Sequence[Mapping[str, Any]], reserved: Collection[str] = (), strict: bool = True) -> list[Node]:
    """The nodes of a list of dicts.

    Args:
        task_layers: dicts with the keys of ``KEYS``; ``name`` and ``layers`` are required.
        reserved: names that no node may have.
        strict: whether unknown keys, a "." in a name, and strings as weights are errors (they are ignored otherwise),
            and a name twice among a node's anchors is twice its argument (otherwise once).

    Raises:
        ValueError: what is wrong with which dict, and the nearest name where one is unknown.
        TypeError: there are no dicts, or no list of them.
    """
    if isinstance(task_layers, (str, Mapping)) or not isinstance(task_layers, Sequence):
        raise TypeError(f"task_layers: expected a list of dicts, got {type(task_layers).__name__}")
    names: dict[str, int] = {}
    for index, entry in enumerate(task_layers):
        if not isinstance(entry, Mapping):
            raise TypeError(f"task_layers[{index}]: expected a dict, got {type(entry).__name__}")
        names[_name(index, entry, names, reserved, strict)] = index
    nodes = [_node(index, entry, names, strict) for index, entry in enumerate(task_layers)]
    for index, node in enumerate(nodes):
        taken = node.init is not None and (node.weight_name in names or node.weight_name in reserved)
        if taken:
            of = f"task_layers[{names[node.weight_name]}]" if node.weight_name in names else "an attribute of the model"
            where = _where(index, node.name)
            raise ValueError(f"{where}: loss_weight: 'auto' makes a parameter {node.weight_name!r}, the name of {of}")
    return nodes


def read_outputs(output_tasks: Sequence[str] | str, names: Collection[str]) -> tuple[str, ...]:
    """The names of nodes whose outputs are returned; one name stands for a list of it.

    Raises:
        ValueError: one is not the name of a node. TypeError: something else than names.
    """
    if isinstance(output_tasks, str):
        output_tasks = (output_tasks,)
    if not isinstance(output_tasks, Sequence):
        raise TypeError(f"output_tasks: expected a list of names of nodes, got {type(output_tasks).__name__}")
    for index, name in enumerate(output_tasks):
        if name != ROOT and (not isinstance(name, str) or name not in names):
            raise ValueError(f"output_tasks[{index}]: expected the name of a node, got {name!r}{nearest(name, names)}")
    return tuple(output_tasks)


def nearest(name: object, names: Collection[str]) -> str:
    """A question, or nothing if no name is near."""
    found = get_close_matches(name, [*names, ROOT], n=1) if isinstance(name, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""


def _where(index: int, name: object) -> str:
    return f"task_layers[{index}] ({name!r})"


def _name(index: int, entry: Mapping[str, Any], names: dict[str, int], reserved: Collection[str], strict: bool) -> str:
    for key in ("name", "layers"):
        if key not in entry:
            named = repr(entry["name"]) if "name" in entry else f"its keys are {list(entry)}"
            unknown = [k for k in entry if k not in KEYS]
            hint = next((f"; is {k!r} meant to be it?" for k in unknown if get_close_matches(str(k), [key], 1)), "")
            raise ValueError(f"task_layers[{index}] ({named}): expected the key {key!r}, found none{hint}")
    name = entry["name"]
    where = _where(index, name)
    if not isinstance(name, str):
        raise ValueError(f"task_layers[{index}]: name: expected a str, got {name!r}")
    if strict and (not name or "." in name):
        raise ValueError(
            f'{where}: name: expected at least one letter and no ".", which separates keys of a state dict'
        )
    if name == ROOT:
        raise ValueError(f"{where}: name: {ROOT!r} is the input of the model")
    if name in names:
        raise ValueError(f"{where}: name: expected another than that of task_layers[{names[name]}]")
    if name in reserved:
        raise ValueError(f"{where}: name: expected another than that of an attribute or a method of the model")
    return name


def _node(index: int, entry: Mapping[str, Any], names: Collection[str], strict: bool) -> Node:
    name = entry["name"]
    where = _where(index, name)
    for key in entry if strict else ():
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    weight = entry.get("loss_weight")
    if strict and isinstance(weight, str) and weight != AUTO:
        raise ValueError(f"{where}: loss_weight: expected a number or 'auto', got {weight!r}")
    if strict and isinstance(weight, Real) and not isfinite(weight):
        raise ValueError(f"{where}: loss_weight: expected a finite number, got {weight}")
    if strict and entry.get("loss") is not None:
        _function(where, "loss", entry["loss"])
    return Node(
        name,
        _layers(where, entry["layers"]),
        _anchors(where, entry.get("anchor_layer"), names, strict),
        (entry["loss"],) if "loss" in entry else (),
        (weight,) if "loss_weight" in entry else (),
        _initial(where, entry) if isinstance(weight, str) and weight == AUTO else None,
    )


def _layers(where: str, layers: Any) -> Callable[..., Any]:
    if isinstance(layers, (list, tuple)):
        for k, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise ValueError(f"{where}: layers[{k}]: expected a Module, got {_described(layer)}")
        return nn.Sequential(*layers)
    return _function(where, "layers", layers, "a Module, a list of them")


def _function(where: str, key: str, value: Any, what: str = "a Module") -> Callable[..., Any]:
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ValueError(f"{where}: {key}: expected a Module, got the class {value.__name__}: {value.__name__}(...)?")
    if not callable(value):
        raise ValueError(f"{where}: {key}: expected {what} or a function, got {_described(value)}")
    made: Callable[..., Any] = value
    return made


def _described(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _anchors(where: str, given: Any, names: Collection[str], strict: bool) -> tuple[str, ...]:
    if given is None:
        return (ROOT,)
    anchors = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not anchors:
        raise ValueError(f"{where}: anchor_layer: expected at least one name, got {given!r}")
    for anchor in anchors:
        if not isinstance(anchor, str) or (anchor != ROOT and anchor not in names):
            hint = nearest(anchor, names)
            raise ValueError(f"{where}: anchor_layer: expected the name of a node, got {anchor!r}{hint}")
    return anchors if strict else tuple(dict.fromkeys(anchors))


def _initial(where: str, entry: Mapping[str, Any]) -> float:
    if "loss_init_val" not in entry:
        raise ValueError(f"{where}: loss_init_val: expected a number, since loss_weight is 'auto'; found none")
    value = entry["loss_init_val"]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{where}: loss_init_val: expected a finite number, got {value!r}")
    return float(value)


class Names(tuple[Any, ...]):
    """Nodes or edges, as ``g.nodes`` or ``g.nodes()``."""

    def __call__(self) -> Names:
        return self


class Graph:
    """What of a ``networkx.DiGraph`` a model's graph needs, where networkx is not installed."""

    def __init__(self, nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> None:
        self._successors: dict[str, dict[str, None]] = {name: {} for name in nodes}
        self._pred: dict[str, dict[str, None]] = {name: {} for name in nodes}
        for a, b in edges:
            self._successors[a][b] = self._pred[b][a] = None

    @property
    def nodes(self) -> Names:
        """In the order of their first mention."""
        return Names(self._successors)

    @property
    def edges(self) -> Names:
        """Pairs (from, to), in the order of the nodes that they come from."""
        return Names((a, b) for a, following in self._successors.items() for b in following)

    def predecessors(self, name: str) -> Iterator[str]:
        """The anchors of a node, in order."""
        return iter(self._pred[name])

    def successors(self, name: str) -> Iterator[str]:
        """Whom a node is an anchor of."""
        return iter(self._successors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._successors

    def __iter__(self) -> Iterator[str]:
        return iter(self._successors)

    def __len__(self) -> int:
        return len(self._successors)


def draw(anchors: Mapping[str, Sequence[str]]) -> Any:
    """The nodes and their anchors as a ``networkx.DiGraph``, or as a ``Graph``; 'root' comes first."""
    mentioned = dict.fromkeys([ROOT])
    edges = []
    for name, before in anchors.items():
        mentioned[name] = None
        for anchor in before:
            mentioned[anchor] = None
            edges.append((anchor, name))
    try:
        from networkx import DiGraph
    except ImportError:
        return Graph(tuple(mentioned), edges)
    graph = DiGraph()
    graph.add_nodes_from(mentioned)
    graph.add_edges_from(edges)
    return graph


#: The names of each node's anchors, in the order of the list.
Edges = dict[str, tuple[str, ...]]


def edges(graph: Any) -> Edges:
    """What is in a graph: of every node, those before it.

    Raises:
        ValueError: it is no graph.
    """
    try:
        return dict(zip(graph, map(tuple, map(graph.predecessors, graph)), strict=True))
    except Exception as error:
        raise ValueError(f"g: expected a graph, got {shown(graph)}: {error}") from error


def rearranged(anchors: Mapping[str, Sequence[str]], seen: Edges, now: Edges) -> Edges:
    """The anchors after a graph has changed, from what was ``seen`` in it before.

    A node whose edges are what they were keeps its anchors: it may have one twice, which a graph cannot say.

    Raises:
        ValueError: a node is missing, or has no edge to it; an edge is between what is no node of the model.
    """
    for name in anchors:
        if not now.get(name):
            raise ValueError(f"g: expected all nodes, each with an edge to it, found {name!r} without one")
    for name, before in now.items():
        for end in (name, *before) if before else ():
            if end not in anchors and (end != ROOT or end == name):
                raise ValueError(
                    f"g: expected edges between nodes, got {before[0]!r} -> {name!r}{nearest(end, anchors)}"
                )
    return {name: tuple(own) if now[name] == seen.get(name) else now[name] for name, own in anchors.items()}
