"""Linear modules over a plan's entries, in plain PyTorch: what ``dispatch`` is for.

Axes: N rows (a plan's entries, or so many times the rows of one), K modules, F features in, O features out. Weights
and biases are K tensors [O, F] and [O], or one of each, stacked: [K, O, F] and [K, O].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..dispatch.reference import module_of_row


def grouped_linear(
    x: Tensor, actions: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str = "none"
) -> Tensor:
    """y_b = act(W_k x_b + b_k) with k = actions_b, zero where there is no such module: the definition, with autograd.

    ``weights`` are K tensors [O, F] and ``biases`` K tensors [O], or none; or biases alone, K rows [1, O] of tables.
    """
    parameters = weights or biases
    y = parameters[0].new_zeros(x.shape[0], _width(weights, biases))
    for k in range(len(parameters)):
        rows = (actions == k)[:, None]
        made = x @ weights[k].mT if weights else torch.zeros_like(y)
        y = torch.where(rows, ACTIVATIONS[activation](made + biases[k] if biases else made), y)
    return y


def of_sorted(
    x: Tensor | None, order: Tensor, samples: Tensor | None, offsets: Tensor, bounds: Sequence[int] | None,
    weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, takes: bool = True, puts: bool = True,
) -> Tensor:  # fmt: skip
    """The same on a plan, with every derivative there is: a slice of the sorted rows for each module.

    Where nobody may read the counts (``bounds`` is None), every module gets all rows, zeros for those of others.
    """
    weights, biases, act = _each(weights, 3), _each(biases, 2), ACTIVATIONS[activation]
    K, N, like = len(weights or biases), order.shape[0], (weights or biases)[0]
    if x is not None and weights:
        x = x.index_select(0, order if samples is None else samples) if takes else x
        N = x.shape[0]

    def of(k: int, rows: Tensor | None, count: int) -> Tensor:
        if rows is None:
            return biases[k].reshape(1, -1).expand(count, -1)
        made = rows @ weights[k].mT
        return act(made + biases[k] if biases else made)

    if bounds is not None:
        parts = [
            of(k, None if x is None or not weights else x[a:b], b - a) for k, (a, b) in enumerate(pairwise(bounds))
        ]
        y = torch.cat([*parts, like.new_zeros(N - bounds[-1], _width(weights, biases))])
    else:
        ids = module_of_row(offsets, N)
        y = like.new_zeros(N, _width(weights, biases))
        for k in range(K):
            here = (ids == k)[:, None]
            y = torch.where(here, of(k, None if x is None or not weights else torch.where(here, x, 0), N), y)
    return y.index_select(0, order.argsort()) if puts else y


def _width(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> int:
    return weights[0].shape[-2] if weights else biases[0].shape[-1]


def is_stacked(tensors: Sequence[Tensor], dims: int) -> bool:
    """Whether it is all modules' in one tensor, which then has so many axes."""
    return len(tensors) == 1 and tensors[0].dim() == dims


def _each(tensors: Sequence[Tensor], dims: int) -> Sequence[Tensor]:
    """A tensor per module, of those or of one with so many axes."""
    return tensors[0].unbind() if is_stacked(tensors, dims) else tensors
