"""The losses of a model's tasks where some labels are missing, tasks alike in one computation.

Axes: G tasks that are alike, B samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.reading import may_be_read
from ..ops.checks import are_alike, flag, given
from ..ops.host import is_exporting
from .labels import classes, known, like, shown, spread
from .weighting.base import wide

#: PyTorch's losses that compare elements, and what they are made with.
_ELEMENTS: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.MSELoss: (F.mse_loss, ()),
    nn.L1Loss: (F.l1_loss, ()),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("beta",)),
    nn.HuberLoss: (F.huber_loss, ("delta",)),
    nn.BCELoss: (F.binary_cross_entropy, ("weight",)),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, ("log_input", "full", "eps")),
    nn.SoftMarginLoss: (F.soft_margin_loss, ()),
    nn.KLDivLoss: (F.kl_div, ("log_target",)),
}
#: And those that name a class.
_CLASSES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "label_smoothing")),
    nn.NLLLoss: (F.nll_loss, ("weight",)),
}
_ELEMENT_FUNCTIONS = frozenset(fn for fn, _ in _ELEMENTS.values())
_CLASS_FUNCTIONS = frozenset(fn for fn, _ in _CLASSES.values())
_OURS: frozenset[Any] = frozenset((*_ELEMENTS, *_CLASSES)) | _ELEMENT_FUNCTIONS | _CLASS_FUNCTIONS


@dataclass
class _Task:
    """A task's loss, prediction, target and which of its labels are there, on the way to a number."""

    name: str
    loss: Any
    x: Tensor
    y: Tensor
    mask: Tensor | None
    call: Any = None  #: a function; None: the loss is its author's own
    options: tuple[tuple[str, Any], ...] = ()
    reduction: str = "mean"
    ignore_index: Any = None  #: None: no class is named

    def key(self, met: list[torch.Size]) -> tuple[Any, ...]:
        """Tasks with the same are computed together. ``met``: of ``_sizes``."""
        options = tuple((k, id(v) if isinstance(v, Tensor) else v) for k, v in self.options)
        mask = None if self.mask is None else _sizes(self.mask, met)
        kind = self.call, options, self.reduction, self.ignore_index
        return (*kind, *((_sizes(t, met), t.dtype, t.device) for t in (self.x, self.y)), mask)


def _sizes(t: Tensor, met: list[torch.Size]) -> Any:
    """To be hashed, which makes sizes that torch.compile takes for any into constants, and an exported graph's not.

    ``met``: sizes, in the order in which they are met, which compiled code compares instead.
    """
    if is_exporting():
        return tuple(map(str, t.shape))
    if not torch.compiler.is_compiling():
        return t.shape
    met.append(t.shape)
    return next(i for i, shape in enumerate(met) if shape == t.shape)


def task_losses(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor | None],
    losses: Mapping[str, Any],
    masks: Mapping[str, Tensor | None] | None = None,
    *,
    apart: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor | bool]]:
    """The loss of every task that has one and a target.

    What is missing is left out of the mean, and its prediction has exactly zero for a gradient:

    * floating-point targets: an element that is NaN (of class probabilities, the whole row; class indices may be
      floating-point for that);
    * class indices: the loss's ``ignore_index``;
    * any target: where the mask is False.

    That is so for PyTorch's losses that compare elements (MSE, L1, SmoothL1, Huber, BCE, BCEWithLogits, PoissonNLL,
    SoftMargin, KLDiv) or name classes (CrossEntropy, NLL), as modules or functions, with reduction "mean" ("none" is
    taken for it), "sum" or "batchmean"; and for any callable with an attribute ``reduction = "none"`` that gives a
    value per element or per sample. Every other loss is called as it is with what there is, NaN included.

    A target has the prediction's shape but for axes of one element, and gets it, whatever the loss: PyTorch would
    broadcast [B] against [B, 1] to [B, B]. Class indices are [B, ...] or [B, 1, ...].

    Args:
        outputs: predictions by task.
        targets: labels by task; None, or no entry, is a task without a target.
        losses: by task; None, or no entry, is a task without a loss.
        masks: bool by task, True where there is a label; of the target's shape, or [B].
        apart: compute every task by itself, so that the gradient of one passes no other, instead of tasks that are
            alike together.

    Returns:
        (losses by task, each without axes, whether there was a label: a bool tensor without axes, or True).

    Raises:
        ValueError: the shapes of a prediction, a target and a mask do not fit; a mask for a loss that is called as it
            is.

    Examples:
        >>> outputs = {"price": torch.tensor([[1.0], [9.0]]), "kind": torch.zeros(2, 4)}
        >>> targets = {"price": torch.tensor([[2.0], [float("nan")]]), "kind": None}
        >>> criteria = {"price": nn.MSELoss(), "kind": nn.CrossEntropyLoss()}
        >>> losses, there = fastroute.task_losses(outputs, targets, criteria)
        >>> losses
        {'price': tensor(1.)}
    """
    flag("apart", apart)
    masks = {} if masks is None else masks
    for name, of in (("outputs", outputs), ("targets", targets), ("losses", losses), ("masks", masks)):
        if not isinstance(of, Mapping):
            raise TypeError(f"{name}: expected a dict by task, got {shown(of)}")
    names = [name for name in outputs if losses.get(name) is not None and targets.get(name) is not None]
    tasks = [_task(name, losses[name], outputs[name], targets[name], masks.get(name)) for name in names]
    found: dict[str, Tensor] = {}
    present: dict[str, Tensor | bool] = {}
    groups: dict[tuple[Any, ...], list[_Task]] = {}
    met: list[torch.Size] = []
    for task in tasks:
        if task.call is None:
            found[task.name], present[task.name] = _own(task)
        else:
            groups.setdefault((task.name,) if apart else task.key(met), []).append(task)
    for group in groups.values():
        values, there = _classes(group) if group[0].ignore_index is not None else _elements(group)
        for task, value, here in zip(group, values.unbind(), there.unbind(), strict=True):
            found[task.name], present[task.name] = value, here
    return {name: found[name] for name in names}, {name: present[name] for name in names}


def _task(name: str, loss: Any, x: Tensor, y: Any, mask: Tensor | None) -> _Task:
    """What there is to compute, with the target in the form of the prediction."""
    of = f"[{name!r}]"
    if mask is not None and not isinstance(y, Tensor):
        raise TypeError(f"mask{of}: expected a target that is a tensor, got {shown(y)}")
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    task = _Task(name, loss, x, y, mask)
    kind: Any = type(loss) if isinstance(loss, nn.Module) else loss
    if not tensors and _is_in(kind, _OURS):
        what, wrong = ("y", y) if isinstance(x, Tensor) else ("y_hat", x)
        raise TypeError(f"{what}{of}: expected a tensor, got {given(wrong)}")
    if tensors and isinstance(kind, type):
        if (found := _ELEMENTS.get(kind) or _CLASSES.get(kind)) and may_be_read(loss):
            task.call, names = found
            task.options = tuple((k, getattr(loss, k)) for k in names)
            task.reduction = loss.reduction
            task.ignore_index = getattr(loss, "ignore_index", None)
    elif tensors and _is_in(kind, _ELEMENT_FUNCTIONS | _CLASS_FUNCTIONS):
        task.call = kind
        task.ignore_index = -100 if kind in _CLASS_FUNCTIONS else None
    if task.call is None:
        if tensors and are_alike(x, y):
            task.y = like(x, y, of)
    elif task.ignore_index is None:
        y = like(x, y, of)
        task.y = y if y.is_floating_point() else y.to(x.dtype)
        task.mask = None if mask is None else spread(mask, y, of)
    else:
        task.x, task.y, task.mask = classes(x, y, mask, of)
    return task


def _is_in(function: Any, functions: frozenset[Any]) -> bool:
    try:
        return function in functions
    except TypeError:  # unhashable
        return False


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _reduce(values: Tensor, there: Tensor, norm: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(losses [G], whether there was a label [G]) of values [G, ...] that are 0 where there is none."""
    total = wide(values).flatten(1).sum(1)
    some = there.flatten(1).any(1)
    if reduction != "sum":
        total = total / torch.where(some, norm, 1)
    return total, some


def _elements(group: Sequence[_Task]) -> tuple[Tensor, Tensor]:
    """Of losses that compare elements. Missing ones are filled first: NaN times a gradient of zero is NaN."""
    task = group[0]
    x, y = (_stack([getattr(t, a) for t in group]) for a in ("x", "y"))
    there = ~y.isnan()
    if task.mask is not None:
        there = there & _stack([t.mask for t in group if t.mask is not None])
    made = task.call(torch.where(there, x, 0), torch.where(there, y, 0), reduction="none", **dict(task.options))
    rows = there.flatten(2).any(2) if task.reduction == "batchmean" and there.dim() > 2 else there
    return _reduce(torch.where(there, made, 0), there, rows.flatten(1).sum(1), task.reduction)


def _classes(group: Sequence[_Task]) -> tuple[Tensor, Tensor]:
    """Of losses that name a class, of the tasks' samples one after the other."""
    task = group[0]
    G, options = len(group), dict(task.options)
    x, y = (torch.cat([getattr(t, a) for t in group]) for a in ("x", "y"))  # [G B, C, ...], [G B, ...]
    mask = None if task.mask is None else torch.cat([t.mask for t in group if t.mask is not None])
    weight = options.get("weight")
    norms: Tensor
    if y.is_floating_point():
        there = ~y.isnan().any(1)
        there = there if mask is None else there & mask
        y = torch.where(there.unsqueeze(1), y, 0)
        norms = there
    else:
        there = y.ne(task.ignore_index)
        there = there if mask is None else there & mask
        norms = there if weight is None else torch.where(there, weight[torch.where(there, y, 0)], 0)
        y = torch.where(there, y, task.ignore_index)
        options["ignore_index"] = task.ignore_index
    x = torch.where(there.unsqueeze(1), x, 0)
    made = torch.where(there, task.call(x, y, reduction="none", **options), 0)
    made, there, norms = (t.reshape(G, -1) for t in (made, there, norms))
    return _reduce(made, there, wide(norms).sum(1), task.reduction)


def _own(task: _Task) -> tuple[Tensor, Tensor | bool]:
    """Of a loss that is its author's own."""
    if getattr(task.loss, "reduction", None) != "none" or not isinstance(task.y, Tensor):
        if task.mask is not None:
            raise ValueError(
                f"mask[{task.name!r}]: expected one of PyTorch's losses, or one with the attribute reduction = 'none' "
                f"that gives a value per element or sample, got {type(task.loss).__name__}"
            )
        made = task.loss(task.x, task.y)
        if not isinstance(made, Tensor):
            raise TypeError(f"losses[{task.name!r}]: expected it to give a tensor, got {type(made).__name__}")
        return (made.reshape(()) if made.numel() == 1 else made.mean()), True
    y = task.y
    there = known(y, None if task.mask is None else spread(task.mask, y, f"[{task.name!r}]"))
    x = task.x
    if x.shape == y.shape:
        x = torch.where(there, x, 0)
    elif x.shape[:1] == y.shape[:1]:  # a sample without any label
        rows = there.flatten(1).any(1) if there.dim() > 1 else there
        x = torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), x, 0)
    made = task.loss(x, torch.where(there, y, 0))
    if made.shape != there.shape:
        if made.shape != there.shape[: made.dim()]:
            raise ValueError(f"losses[{task.name!r}]: expected it to give {shown(y)} or [B] values, got {shown(made)}")
        there = there.flatten(made.dim()).all(-1)
    values, some = _reduce(torch.where(there, made, 0)[None], there[None], there.sum()[None], "mean")
    return values[0], some[0]
