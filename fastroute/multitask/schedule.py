"""When each node runs, and where its output is kept: fixed once, in time linear in nodes and edges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .graph import ROOT

#: The names of each node's anchors, in the order of the list.
Anchors = Mapping[str, Sequence[str]]

#: What computes several nodes at once: called with the model's child modules by name and with the inputs, it returns an
#: output for each of its names. It holds names and no modules, so that it is copied with the model and sees layers that
#: are replaced; of nodes that are functions, which are no children, no groups are made.
Group = Callable[..., Sequence[Any]]


class Call(NamedTuple):
    """One thing to do, by names: a node's own layer is called, or ``group``, which computes several nodes."""

    names: tuple[str, ...]  #: the nodes that it computes
    inputs: tuple[str, ...]  #: the nodes whose outputs are its arguments
    group: Group | None = None  #: None: the layer called ``names[0]``


class Step(NamedTuple):
    """The same with slots: places in a list that outputs are kept in. The model's input is in slot 0."""

    names: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    free: tuple[int, ...]  #: what is in them is not needed after this
    group: Group | None = None


class Plan(NamedTuple):
    """A model's schedule."""

    steps: tuple[Step, ...]
    slots: int  #: how many there are
    results: tuple[int, ...]  #: the slots of ``output_tasks``


def in_list_order(anchors: Anchors, of: str = "task_layers") -> list[str]:
    """Names in the order of the list, but for what is declared after its first use, which comes just before that.

    Args:
        of: the argument that they come from.

    Raises:
        ValueError: the nodes are no acyclic graph; the message has the cycle.
    """
    order: dict[str, None] = {ROOT: None}
    for first in anchors:
        if first in order:
            continue
        path = {first: iter(anchors[first])}  # from a node to an anchor of it, to an anchor of that, ...
        while path:
            name = next(reversed(path))
            for anchor in path[name]:
                if anchor in path:
                    names = list(path)
                    cycle = [anchor, *reversed(names[names.index(anchor) :])]
                    raise ValueError(f"{of}: expected no cycle of anchors, got {' -> '.join(cycle)}")
                if anchor not in order:
                    path[anchor] = iter(anchors[anchor])
                    break
            else:
                del path[name]
                order[name] = None
    return list(order)[1:]


def breadth_first(anchors: Anchors, order: Sequence[str]) -> list[str]:
    """Names in the order in which torchMTL runs them.

    It takes nodes from a queue, and puts a node some of whose inputs are missing back at its end; either way the node's
    successors join the queue when it is first taken out. So everybody keeps their places relative to each other: those
    of a walk of the queue's tree, parents first. In rounds through the queue, a node runs in the first that is not
    before its own arrival nor before its inputs', or in the next if an input of that round has its place behind.

    Args:
        order: the names in any topological order.
    """
    following: dict[str, list[str]] = {name: [] for name in (ROOT, *anchors)}
    for name, before in anchors.items():
        for anchor in before:
            following[anchor].append(name)
    joined: dict[str, list[str]] = {name: [] for name in following}
    arrival, queue = {ROOT: 0}, [ROOT]
    for name in queue:
        for successor in following[name]:
            if successor not in arrival:
                arrival[successor] = arrival[name] + 1
                joined[name].append(successor)
                queue.append(successor)
    place: dict[str, int] = {}
    stack = [ROOT]
    while stack:
        name = stack.pop()
        place[name] = len(place)
        stack += reversed(joined[name])
    turn = {ROOT: 0}
    for name in order:
        earliest = max(turn[a] + (place[a] > place[name]) for a in anchors[name])
        turn[name] = max(arrival[name], earliest)
    return sorted(order, key=lambda name: (turn[name], place[name]))


def needed(anchors: Anchors, outputs: Collection[str]) -> set[str]:
    """The names of the nodes that these outputs depend on, theirs included."""
    found, stack = set(outputs), list(set(outputs))
    while stack:
        for anchor in anchors.get(stack.pop(), ()):  # 'root' has none
            if anchor not in found:
                found.add(anchor)
                stack.append(anchor)
    return found


def assign(calls: Sequence[Call], outputs: Sequence[str], keep: bool = False) -> Plan:
    """Slots for calls in a given order.

    A slot is used again when nobody needs what is in it, first of all for the output of the call that was the last to
    read it; ``Step.free`` has those that become empty otherwise. So nothing is kept alive longer than in a function
    that a careful author writes.

    Args:
        calls: each after those that compute its inputs.
        outputs: names whose outputs are kept until the end.
        keep: keep all of them: a slot for each.
    """
    last: Mapping[str, int] = {name: k for k, call in enumerate(calls) for name in call.inputs}
    kept = set(outputs)
    slot, slots = {ROOT: 0}, 1
    spare: list[int] = []
    steps = []
    for k, call in enumerate(calls):
        inputs = tuple(slot[name] for name in call.inputs)
        dying = [] if keep else [slot[n] for n in dict.fromkeys(call.inputs) if last[n] == k and n not in kept]
        spare += reversed(dying)
        filled = []
        for name in call.names:
            if not spare:
                spare.append(slots)
                slots += 1
            slot[name] = spare.pop()
            filled.append(slot[name])
        unread = [] if keep else [slot[n] for n in call.names if n not in last and n not in kept]
        spare += unread
        free = tuple(s for s in dying if s not in filled) + tuple(unread)
        steps.append(Step(call.names, inputs, tuple(filled), free, call.group))
    return Plan(tuple(steps), slots, tuple(slot[name] for name in outputs))
