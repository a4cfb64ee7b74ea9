"""A multi-task model made of a list of dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..importing import constant_result
from ..modules.names import TakenNames
from ..ops.arguments import checked
from .graph import ROOT, Edges, draw, edges, read, read_outputs, rearranged
from .heads import join
from .model_losses import Losses, LossWeights, hold
from .objective import Objective
from .schedule import Call, Plan, assign, breadth_first, in_list_order, needed
from .side_by_side import note_allocated
from .weighting import Weighting

#: A step, flat: the layer's name, the first input's slot, the first output's, then what most steps do without: all
#: inputs if they are not one, slots to free, and of a group, the function and all outputs.
_Flat = tuple[str, int, int, tuple[int, ...] | None, tuple[int, ...], tuple[Any, tuple[int, ...]] | None]


#: Instance attributes that no node may be called like, besides those of a new Module.
_OWN = (
    *("layer_names", "loss_modules", "outputs", "task_layers", "weighting", "_results"),
    *(
        "_anchors",
        "_empty",
        "_flat",
        "_graph",
        "_initial",
        "_keep",
        "_kept",
        "_learned",
        "_listed",
        "_loss_weights",
        "_losses",
        "_order",
        "_output_tasks",
        "_planned",
        "_upstreams_order",
    ),
    *("_fuse", "_run_all", "_task_learned", "_task_losses", "_task_weights"),
)


class MTLModel(Objective):
    """A graph of layers. Each takes the outputs of others; some outputs are those of tasks.

    A dict of ``task_layers`` is a node:

    ================  ==================================================================================================
    ``name``          of the node, an attribute of the model, and the first part of its keys in a state dict
    ``layers``        a Module, a list of them (a Sequential), or any function; called with the anchors' outputs
    ``anchor_layer``  a node, or a list of them in the order of arguments: here, later in the list, or 'root', the
                      model's input; by default 'root'
    ``loss``          anything; returned, not called
    ``loss_weight``   a number, a tensor or None; or 'auto': a parameter ``<name>_loss`` [1], learned
    ``loss_init_val`` where that one begins
    ================  ==================================================================================================

    The schedule is fixed here. Nodes run in the order of the list (what is declared after its use, before that), those
    that no output depends on do not run, and nothing is kept longer than the last node needs it. Nodes are looked up by
    name at every call, so a layer that is replaced is the one that runs. A node may take and return anything: tensors,
    lists, dicts; per-sample task ids go through the graph like everything else.

    Attributes:
        task_layers: as given.
        output_tasks, keep_outputs: setting them makes another schedule.
        layer_names: of all nodes, in the order of the list.
        unused: of the nodes that do not run.
        plan: the schedule.
        g: the graph, a ``networkx.DiGraph`` where networkx is installed (else with the same ``nodes``, ``edges``,
            ``predecessors`` and ``successors``). Edges that are added or removed count from the next call on.
        losses, loss_weights: by the name of the node, where the dict has the key.
        loss_modules: the losses that have tensors of their own: a child, see ``LossModules``.
        outputs: with ``keep_outputs``, the last call's, by the name of the node, 'root' included.

    Args:
        task_layers: a list of dicts.
        output_tasks: names of nodes, 'root' included, any number of times; or one name.
        order: "list", or "bfs", which is torchMTL's: layers that draw random numbers draw the same ones, if
            ``run_all`` is set as well.
        run_all: run what no output depends on, too.
        keep_outputs: keep every output until the next call.
        fuse_heads: run nodes that are alike on the same single anchor as one, see ``Siblings``. Their parameters then
            lie side by side in memory, unless another tensor has that of one of them (a tie, a state dict that is
            kept): to save one head alone, save a deep copy of it. A parameter made of a NumPy array leaves its memory.
        weighting: of the losses in ``loss``: a name, numbers or a ``Weighting``, see ``as_weighting``; a child
            ``weighting``, the last one. By default each dict's ``loss_weight``.
        device, dtype: of learned weights; the layers come as they are.

    Raises:
        ValueError: which dict is wrong, and how; a cycle, as a path. TypeError: there is no list, or no dict in it.

    Examples:
        >>> model = fastroute.MTLModel(
        ...     [
        ...         {"name": "trunk", "layers": [nn.Linear(16, 8), nn.ReLU()]},
        ...         {"name": "price", "layers": nn.Linear(8, 1), "anchor_layer": "trunk", "loss": nn.MSELoss()},
        ...         {"name": "kind", "layers": nn.Linear(8, 3), "anchor_layer": "trunk", "loss": nn.CrossEntropyLoss()},
        ...     ],
        ...     output_tasks=["price", "kind"],
        ... )
        >>> outputs, losses, weights = model(torch.randn(4, 16))
        >>> total, each = model.loss(outputs, {"price": torch.randn(4, 1), "kind": torch.tensor([0, 2, 1, 1])})
        >>> total.backward()
        >>> sorted(each)
        ['kind', 'price']
    """

    #: Whether unknown keys and the like are errors.
    _strict: ClassVar[bool] = True
    #: Whether losses that have tensors are children.
    _holds_losses: ClassVar[bool] = True
    #: Names of the class that nodes may have all the same.
    _free: ClassVar[frozenset[str]] = frozenset()
    #: The graph that was handed out, and what was in it when it was last looked at.
    _graph: tuple[Any, Edges] | None = None

    @checked
    def __init__(
        self,
        task_layers: Annotated[Sequence[Mapping[str, Any]], None],
        output_tasks: Annotated[Sequence[str] | str, None],
        *,
        order: str = "list",
        run_all: bool = False,
        keep_outputs: bool = False,
        fuse_heads: bool = True,
        weighting: str | Mapping[str, float] | Sequence[float] | Weighting | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if order not in ("list", "bfs"):
            raise ValueError(f"order: expected 'list' or 'bfs', got {order!r}")
        nodes = read(task_layers, {*dir(self), *_OWN} - self._free, self._strict)
        self.task_layers = task_layers
        self.layer_names = [node.name for node in nodes]
        self._keep, self._run_all, self._fuse = keep_outputs, run_all, fuse_heads
        self._upstreams_order = order == "bfs"
        self._arrange({node.name: node.anchors for node in nodes})
        for node in nodes:
            setattr(self, node.name, node.layers)
            if node.init is not None:
                setattr(self, node.weight_name, self._learned_weight(node.init, device, dtype))
        self._losses = {node.name: node.loss[0] for node in nodes if node.loss}
        self._loss_weights = {node.name: node.loss_weight[0] for node in nodes if node.loss_weight}
        self._learned = {node.name: node.weight_name for node in nodes if node.init is not None}
        self._initial = {node.weight_name: node.init for node in nodes if node.init is not None}
        hold(self, self._losses)
        self.output_tasks = output_tasks
        self._weigh(weighting, self._losses, device, dtype)
        if fuse_heads and not torch.compiler.is_compiling():
            note_allocated(self.parameters())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._fuse:
            note_allocated(self.parameters(), unpickled=True)

    def reset_parameters(self) -> None:
        """Set learned weights of losses to where they begin. Layers and the weighting have their own method."""
        for name, value in self._initial.items():
            nn.init.constant_(getattr(self, name), value)

    @staticmethod
    def _learned_weight(value: float, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
        return nn.Parameter(torch.full((1,), value, device=device, dtype=dtype))

    # ------------------------------------------------------------------------------------------------------- schedule

    def _arrange(self, anchors: Edges, of: str = "task_layers") -> None:
        ordered = in_list_order(anchors, of)
        self._order = breadth_first(anchors, ordered) if self._upstreams_order else ordered
        self._anchors = anchors

    @property
    def output_tasks(self) -> list[str]:
        """The nodes whose outputs are returned. Changes of the list count from the next call on."""
        return self._listed

    @output_tasks.setter
    def output_tasks(self, names: Sequence[str] | str) -> None:
        self._set_outputs(names)

    def _set_outputs(self, names: Sequence[str] | str) -> None:  # Dynamo of torch 2.11 goes through no setter
        self._output_tasks = read_outputs(names, self._anchors)
        self._listed: list[str] = list(self._output_tasks)
        if isinstance(names, list) and not self._strict:
            self._listed = names  # upstream's list is the caller's own
        self._schedule()

    @property
    def keep_outputs(self) -> bool:
        """Whether every output is kept, as ``outputs``, until the next call."""
        return self._keep

    @keep_outputs.setter
    def keep_outputs(self, keep: bool) -> None:
        self._keep = keep
        self._schedule()

    @property
    def unused(self) -> list[str]:
        """The nodes that do not run.

        DistributedDataParallel wants a gradient of every parameter: ``requires_grad_(False)`` theirs, and their learned
        weights'. (Its ``find_unused_parameters`` takes all learned weights for unused: they leave forward as they are.)
        """
        self._refresh()
        run = {name for step in self._planned.steps for name in step.names}
        return [name for name in self.layer_names if name not in run]

    def _calls(self) -> list[Call]:
        """The calls of a forward pass, in order. Subclasses join nodes into groups here."""
        run = self._anchors if self._run_all else needed(self._anchors, self._output_tasks)
        calls = [Call((name,), tuple(self._anchors[name])) for name in self._order if name in run]
        return join(calls, self._modules) if self._fuse else calls

    def _schedule(self) -> None:
        self._planned = assign(self._calls(), self._output_tasks, self._keep)
        self._flat: tuple[_Flat, ...] = tuple(
            (
                step.names[0],
                step.inputs[0],
                step.outputs[0],
                None if len(step.inputs) == 1 and step.group is None else step.inputs,
                step.free,
                None if step.group is None else (step.group, step.outputs),
            )
            for step in self._planned.steps
        )
        self._kept = (
            (ROOT, 0),
            *((n, s) for step in self._planned.steps for n, s in zip(step.names, step.outputs, strict=True)),
        )
        self._results, self._empty = self._planned.results, self._planned.slots - 1
        self._terms()

    def _terms(self) -> None:
        """What forward returns besides outputs: tuples, since looking names up costs a compiled graph a guard each."""
        tasks = self._output_tasks
        self._task_losses = tuple(self._losses.get(name) for name in tasks)
        self._task_weights = tuple(None if name in self._learned else self._loss_weights.get(name) for name in tasks)
        self._task_learned = tuple((k, self._learned[name]) for k, name in enumerate(tasks) if name in self._learned)

    @property
    def plan(self) -> Plan:
        """The schedule."""
        self._refresh()
        return self._planned

    @property
    def g(self) -> Any:
        """The graph. Edges that are added or removed count from the next call on."""
        if self._graph is None:
            graph = draw(self._anchors)
            self._graph = graph, edges(graph)
        return self._graph[0]

    def _refresh(self) -> None:
        """What was done since to what the model has handed out: to its graph, to the list of outputs."""
        if self._graph is not None:
            if torch.compiler.is_compiling():
                for before in getattr(self._graph[0], "_pred", {}).values():
                    tuple(before)  # so that it is compiled again when they change
                self._look_now()
            else:
                self._look()
        if tuple(self._listed) != self._output_tasks:
            self._set_outputs(self._listed)

    def _look(self) -> None:
        """Make another schedule if the graph has other edges; raises, and keeps the schedule, if they are wrong."""
        assert self._graph is not None
        graph, seen = self._graph
        if (now := edges(graph)) != seen:
            self._take(graph, seen, now)

    @constant_result
    def _look_now(self) -> None:
        self._look()

    def _take(self, graph: Any, seen: Edges, now: Edges) -> None:
        self._arrange(rearranged(self._anchors, seen, now), "g")
        self._graph = graph, now
        self._schedule()

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(self, input: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Outputs, losses and weights of ``output_tasks``, in their order.

        Args:
            input: what the nodes without anchors take: a tensor, or a list or a dict that they take parts of.

        Returns:
            Three lists: outputs; losses, None where there is none; weights, likewise, learned ones as Parameters [1].
        """
        outputs, weights = self._outputs_of(input), list(self._task_weights)
        for task, name in self._task_learned:
            weights[task] = getattr(self, name)
        return outputs, list(self._task_losses), weights

    def forward_outputs(self, input: Any) -> list[Any]:
        """The outputs alone, as ``forward`` computes them."""
        return self._outputs_of(input)

    def _outputs_of(self, input: Any) -> list[Any]:
        if self._graph is not None or tuple(self._listed) != self._output_tasks:
            self._refresh()
        values: list[Any] = [input] + [None] * self._empty
        modules = self._modules
        name, first = ROOT, 0
        inputs: Any = None
        try:
            for name, first, out, inputs, free, group in self._flat:
                if group is not None:
                    run, outs = group
                    made = run(modules, *[values[i] for i in inputs])
                    for slot, value in zip(outs, made, strict=True):
                        values[slot] = value
                else:
                    layer: Any = modules[name] if name in modules else getattr(self, name)
                    values[out] = layer(values[first]) if inputs is None else layer(*[values[i] for i in inputs])
                for slot in free:
                    values[slot] = None
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                given = ", ".join(_shown(values[i]) for i in (inputs or (first,)))
                error.add_note(f"in node {name!r} of {type(self).__name__}, called with {given}")
            raise
        if self._keep:
            self.outputs = {name: values[slot] for name, slot in self._kept}
        return [values[slot] for slot in self._results]

    def outputs_only(self) -> OutputsOnly:
        """A Module that returns the list of outputs alone: what ``torch.export`` and DataParallel can return."""
        return OutputsOnly(self)

    # -------------------------------------------------------------------------------------------------------- losses

    @property
    def losses(self) -> Losses:
        """By the name of the node."""
        return Losses(self, "losses", self._losses)

    @property
    def loss_weights(self) -> LossWeights:
        """By the name of the node."""
        return LossWeights(self, "loss_weights", self._loss_weights)

    def _held_losses(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return self.losses, self.loss_weights

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("outputs", None)  # a copy or a file of a model holds no activations
        return state

    def extra_repr(self) -> str:
        """The nodes that are functions, which are no children."""
        functions = [name for name in self.layer_names if name not in self._modules]
        return "\n".join(f"({name}): {getattr(self, name)!r}" for name in functions)


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


class OutputsOnly(TakenNames, nn.Module):
    """A model's outputs without its losses and weights; its child ``model`` is the model itself."""

    def __init__(self, model: MTLModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Any) -> list[Tensor]:
        """The outputs of ``output_tasks``, in their order."""
        return self.model._outputs_of(input)
