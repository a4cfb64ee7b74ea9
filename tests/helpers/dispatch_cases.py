"""Actions for the tests of ``dispatch`` and of what goes by its plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import seeds

#: Histograms of actions: samples per module, K = 5, then dropped ones.
HISTOGRAMS: dict[str, list[int]] = {
    "even": [8, 8, 8, 8, 8, 0],
    "one takes all": [0, 0, 40, 0, 0, 0],
    "some empty": [0, 17, 0, 1, 30, 4],
    "one each": [1, 1, 1, 1, 1, 1],
    "all dropped": [0, 0, 0, 0, 0, 9],
    "one row": [0, 0, 0, 1, 0, 0],
    "no rows": [0, 0, 0, 0, 0, 0],
    "uneven": [3, 65, 7, 129, 2, 13],
}
each_histogram = pytest.mark.parametrize(
    "histogram", HISTOGRAMS.values(), ids=[k.replace(" ", "-") for k in HISTOGRAMS]
)


def actions_of(histogram: list[int], seed: int = 0) -> Tensor:
    """In some order; the last count is of -1 and other negative ones."""
    K = len(histogram) - 1
    made = [k if k < K else -1 - i % 3 for k, count in enumerate(histogram) for i in range(count)]
    order = torch.randperm(len(made), generator=seeds.generator(seed))
    return torch.tensor(made, dtype=torch.int64)[order]
