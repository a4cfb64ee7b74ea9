"""Many equal heads as one module, their parameters stacked.

Axes: T tasks, B samples, F features, O outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..functional import grouped_linear
from ..ops import dispatch
from ..ops.arguments import Count, Tasks, checked
from ..ops.checks import as_parameters, shown, tensor, together
from .head_chains import Layer, chain, split
from .named_tasks import Axis, NamedTasks
from .weighting.base import names_of

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU,
}  # fmt: skip


class _Layers(nn.ParameterList):
    """A parameter per layer, each drawn within +-1 / sqrt(its layer's features in)."""

    def __init__(self, parameters: Iterable[Tensor], features: Sequence[int]) -> None:
        super().__init__(parameters)
        self.features = tuple(features)

    def reset_parameters(self) -> None:
        """Draw all of them anew."""
        for k in range(len(self)):
            self.draw(k)

    def draw(self, k: int) -> None:
        """Draw one of them anew."""
        bound = 1 / math.sqrt(self.features[k])
        nn.init.uniform_(self[k], -bound, bound)


class MultiHead(NamedTasks):
    """A small network per task on the same features: Linear, or Linear, activation, Linear and so on.

    The parameters of all tasks are one tensor per layer, so that a step costs autograd and the optimizer the same
    however many tasks there are. Where heads are to keep their own parameters and state-dict keys, give ``MTLModel``
    modules of their own instead.

    Args:
        in_features: F.
        hidden: the width of the hidden layer, a list of several, or None.
        out_features: O of every task.
        tasks: names, or how many.
        activation: "relu", "tanh", "sigmoid", "silu" or "gelu".
        bias: whether layers have one.
        returns: "tensor" [T, B, O], "list" of T tensors [B, O], or "dict" of them by name.

    In a state dict each task's head goes by its name, see :class:`NamedTasks`.

    Attributes:
        weights: a list of [T, O, F], layer by layer. biases: of [T, O].
        tasks: tuple of names.

    Raises:
        ValueError, TypeError: a size below 1, an unknown word, a name twice.

    Examples:
        >>> heads = fastroute.MultiHead(16, 8, 1, tasks=["price", "kind"], returns="dict")
        >>> {task: list(y.shape) for task, y in heads(torch.randn(4, 16)).items()}
        {'price': [4, 1], 'kind': [4, 1]}
    """

    @checked
    def __init__(
        self,
        in_features: Count,
        hidden: Count | Sequence[Count] | None,
        out_features: Count,
        tasks: Tasks,
        *,
        activation: str = "relu",
        bias: bool = True,
        returns: str = "tensor",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        if returns not in ("tensor", "list", "dict"):
            raise ValueError(f"returns: expected 'tensor', 'list' or 'dict', got {returns!r}")
        self.tasks: tuple[str, ...] = names_of(tasks)
        if isinstance(tasks, Sequence):
            self._keep_names(device)
        self.returns, self.activation = returns, activation
        inner = [] if hidden is None else list(hidden) if isinstance(hidden, Sequence) else [hidden]
        widths = [in_features, *inner, out_features]
        T = len(self.tasks)
        act = _ACTIVATIONS[activation]()
        pairs = list(itertools.pairwise(widths))
        self._layers = tuple(Layer(O, F, bias, (act,) if k < len(inner) else ()) for k, (F, O) in enumerate(pairs))
        features = widths[:-1]
        self.weights = _Layers((torch.empty(T, O, F, device=device, dtype=dtype) for F, O in pairs), features)
        self.biases = _Layers((torch.empty(T, O, device=device, dtype=dtype) for F, O in pairs if bias), features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters as ``nn.Linear`` draws those of every head."""
        super().reset_parameters()
        for k in range(len(self.weights)):
            self.weights.draw(k)
            if self.biases:
                self.biases.draw(k)

    def _task_axes(self) -> dict[str, tuple[Axis, ...]]:
        lists = {"weights": self.weights, "biases": self.biases}
        return {f"{name}.{k}": (Axis(0),) for name, layers in lists.items() for k in range(len(layers))}

    def extra_repr(self) -> str:
        widths = " -> ".join(map(str, [self._layers[0].F, *(layer.O for layer in self._layers)]))
        return f"{widths}, tasks={len(self.tasks)}, activation={self.activation!r}"

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor | list[Tensor] | dict[str, Tensor]:
        """Every head's output, or of each sample that of its task.

        Args:
            x: [..., F]; with ``task`` [B, F].
            task: [B] integers; on a CPU one that is no task, -1 among them, raises, on a GPU its sample gets zeros
                (see ``fastroute.strict``).

        Returns:
            [T, ..., O], or what ``returns`` says; with ``task`` [B, O].

        Raises:
            ValueError, TypeError, IndexError: x does not have F features; a task per sample is not what came.
        """
        first = self._layers[0]
        tensor("x", x, "a tensor [..., in_features]")
        together(("the parameters", self.weights[0]), {"x": x})
        if x.dim() == 0 or x.shape[-1] != first.F:
            raise ValueError(f"x: expected [..., {first.F}], got {shown(x)}")
        for layers in (self.weights, self.biases):
            for hook in layers._forward_pre_hooks.values():  # of pruning: nobody else calls these lists
                hook(layers, ())
        if task is not None:
            return self._by_task(x, task)
        rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), first.F)
        biases = [b.flatten() for b in self.biases] or [None] * len(self.weights)
        stacked = list(zip((w.flatten(0, 1) for w in self.weights), biases, strict=True))
        T = len(self.tasks)
        y = as_parameters("x", x, self, chain, rows, self._layers, stacked, T)
        shape = (*x.shape[:-1], self._layers[-1].O)
        if self.returns == "tensor":
            return y.view(T, *shape)
        made = list(split(y)) if x.dim() == 2 else [t.view(shape) for t in split(y)]
        return made if self.returns == "list" else dict(zip(self.tasks, made, strict=True))

    def _by_task(self, x: Tensor, task: Tensor) -> Tensor:
        """Samples sorted by their tasks, then each task's through its own head."""
        if x.dim() != 2:
            raise ValueError(f"x: expected [B, {self._layers[0].F}] with a task per sample, got {shown(x)}")
        task = dispatch.as_actions(task, x.shape[0], x.device, "task")
        plan = dispatch.plan(task, len(self.tasks), "task")
        dispatch.check_all_named(plan, task, "task")
        h, last = x, len(self._layers) - 1
        for k, (layer, weight) in enumerate(zip(self._layers, self.weights, strict=True)):
            h = grouped_linear(
                h, plan, weight, self.biases[k] if self.biases else (),
                activation=self.activation if layer.then else "none", is_sorted=k > 0, keep_sorted=k < last,
            )  # fmt: skip
        return h
