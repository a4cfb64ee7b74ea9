"""The plain backend of ``trajectory_loss``: the definition forward, the derivatives written out.

Axes: B samples, T decisions, C differentiable columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import sums
from .contract import FIELDS, Entry, taken_apart
from .reference import ADVANTAGES, advantage, critics_target, entries, loss_of, step_of


def slopes_of(e: Entry) -> tuple[Tensor, Tensor | None]:
    """The derivatives of ``loss_of`` by both columns."""
    if e.kind in ("QLearning", "SARSA"):
        return 2 * (e.s0 - e.y), None
    critic = None if e.s1 is None else 2 * (e.s1 - critics_target(e))
    if e.kind == "WPL":
        p = e.s0.exp()
        return -2 * step_of(e, p) * p, critic
    if e.kind in ADVANTAGES:
        return 2 * (e.s0 - (critics_target(e) - e.s1)), critic
    return -advantage(e), critic


def forward(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss [B], slopes [C, B]): slopes[c] is the derivative of a sample's loss by its number in column c."""
    d = taken_apart(columns, others, masks, layout)
    f = f.to(sums(f, *columns, *others))
    total, slopes = torch.zeros_like(f), [f.new_zeros(0)] * len(columns)
    for t, e in entries(d, f, gamma, normalize):
        on = d.active[t]
        of_both = slopes_of(e) if want_slopes else (None, None)
        made = [m if m is None or on is None else torch.where(on, m, 0) for m in (loss_of(e), *of_both)]
        total = total + made[0]
        for where, slope in zip(layout[FIELDS * t + 2 : FIELDS * t + 4], made[1:], strict=True):
            if slope is not None:
                slopes[where] = slope
    return total, torch.stack(slopes) if want_slopes and slopes else f.new_empty(0, f.shape[0])


def backward(grad: Tensor, slopes: Tensor) -> Sequence[Tensor]:
    """Per column [B], its gradient from that of the loss."""
    return (slopes * grad).unbind()
