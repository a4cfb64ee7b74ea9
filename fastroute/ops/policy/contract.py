"""What passes between ``policy`` and its backends. Axes: N rows, K choices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: What a row of scores z stands for: logits of a softmax; the values themselves; probabilities up to a shift (WPL).
KINDS = ("softmax", "score", "shifted")


class Choice(NamedTuple):
    """What was chosen, and what it is worth."""

    actions: Tensor  #: [N] int64
    value: Tensor  #: [N], log-probability of the action, or its score; zero where a forced action is negative
    greedy: Tensor  #: [N] int64, the best choice
