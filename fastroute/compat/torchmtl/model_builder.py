"""The model."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import multitask
from fastroute.modules.names import added, yields
from fastroute.multitask.graph import AUTO, KEYS, edges
from fastroute.multitask.model_losses import Losses, LossWeights
from fastroute.ops import checks

from ..overrides import Overrides

__all__ = ["MTLModel"]

# Upstream's names of the keys of a node.
NAME_KEY, LAYER_KEY, ANCHOR_KEY, LOSS_KEY, LOSS_REG_KEY, WEIGHT_INIT_KEY = KEYS
AUTO_WEIGHT_KEY = AUTO
MISSING_WEIGHT_MSG = "Expect {0} for task {1} but none provided."


class LearnedWeight(nn.Parameter):
    """A Parameter [1] that leaves a loss without axes without them: ``weight * loss`` can be added to another in place.

    The one way in which it differs, and only there: any other product is that of the [1] tensor.
    """

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Tensor) and other.dim() == 0:
            return self.squeeze(0) * other
        return super().__mul__(other)

    __rmul__ = __mul__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return LearnedWeight, (self.data, self.requires_grad)


#: Upstream's public attributes.
_UPSTREAM = ("g", "layer_names", "loss_weights", "losses", "output_tasks", "outputs", "task_layers")


@yields(*_UPSTREAM)
class MTLModel(Overrides, multitask.MTLModel):
    """``fastroute.multitask.MTLModel`` with upstream's ways.

    * Nodes run in upstream's order, so dropout draws the same numbers; all of them run; ``outputs`` has what they gave.
    * ``output_tasks`` is the list that was given: what is done to it counts from the next call on.
    * ``losses``, ``loss_weights`` and ``g`` can be assigned; what is in them is then what a call takes.
    * A node, or an attribute of a subclass, may have a name that only fastroute has, ``loss`` say: ``model.loss`` is
      then it, and ``MTLModel.loss(model, ...)`` is fastroute's.
    * Unknown keys are ignored. A node that is twice among another's anchors is one argument of it.
    * ``loss_weight`` may be any string; "auto" is a Parameter [1], as upstream's.
    * Losses are no children: the model's optimizer does not train them. Those without parameters of their own follow
      ``.to()``.

    Args:
        task_layers: a list of dicts with ``name``, ``layers``, and as needed ``anchor_layer``, ``loss``,
            ``loss_weight``, ``loss_init_val``.
        output_tasks: names of nodes.

    Raises:
        ValueError: for what upstream hangs on, or fails for at the first call: undefined anchors, cycles, names of
            methods. Also for names that are there twice, and nodes without anchors, which upstream may drop silently.
    """

    _strict = False
    _holds_losses = False
    _free = added(multitask.MTLModel, _UPSTREAM) | {"loss_modules", "weighting"}
    _never_called = dict.fromkeys(
        ("_get_losses", "_bfs_forward", "_build_graph", "_add_to_graph", "_add_node", "_add_layer", "_set_loss_weight",
         "_initialize_graph", "_initialize_losses", "_initialize_loss_weights"),
        "forward, or set losses, loss_weights and output_tasks",
    )  # fmt: skip

    def __init__(self, task_layers: Sequence[Mapping[str, Any]], output_tasks: Sequence[str]) -> None:
        super().__init__(task_layers, output_tasks, order="bfs", run_all=True, keep_outputs=True, fuse_heads=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_anchors" in state:
            super().__setstate__(state)
            return
        # a whole model that torchMTL's own class pickled
        MTLModel.__init__(self, state["task_layers"], state["output_tasks"])
        self._modules.update(state["_modules"])
        for name, weight in state["_parameters"].items():
            setattr(self, name, nn.Parameter(weight.data, weight.requires_grad))
        self.training = state["training"]

    @property
    def losses(self) -> Losses:
        """By the name of the node."""
        return super().losses

    @losses.setter
    def losses(self, losses: Mapping[str, Any]) -> None:
        self._replace("losses", super().losses, losses)

    @property
    def loss_weights(self) -> LossWeights:
        """By the name of the node."""
        return super().loss_weights

    @loss_weights.setter
    def loss_weights(self, weights: Mapping[str, Any]) -> None:
        self._replace("loss_weights", super().loss_weights, weights)

    @property
    def g(self) -> Any:
        """The graph."""
        return super().g

    @g.setter
    def g(self, graph: Any) -> None:
        self._take(graph, {}, edges(graph))

    def _replace(self, name: str, held: MutableMapping[str, Any], given: Mapping[str, Any]) -> None:
        if not isinstance(given, (Mapping, nn.ModuleDict)):
            raise TypeError(f"{name}: expected a dict, got {checks.given(given)}")
        wanted = dict(given.items())
        if unknown := wanted.keys() - set(self.layer_names):
            raise ValueError(f"{name}: expected names of nodes, got {sorted(map(str, unknown))}")
        for node in list(held):
            if node not in wanted:
                del held[node]
        for node, value in wanted.items():
            if node not in held or held[node] is not value:  # so a learned weight stays the parameter
                held[node] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("losses", "loss_weights", "g"):  # also a ModuleDict, which is no child
            object.__setattr__(self, name, value)
            return
        if type(value) is nn.Parameter and type(self._parameters.get(name)) is LearnedWeight:
            value = LearnedWeight(value.data, value.requires_grad)  # load_state_dict(assign=True)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> MTLModel:
        super()._apply(fn, recurse)
        for loss in self._losses.values() if recurse else ():
            if isinstance(loss, nn.Module) and next(loss.parameters(), None) is None:
                loss._apply(fn)
        return self

    @staticmethod
    def _learned_weight(value: float, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
        return LearnedWeight(torch.full((1,), value, device=device, dtype=dtype))
