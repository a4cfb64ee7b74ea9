"""A discrete choice per row in plain PyTorch: sampling, and the value of what was chosen.

Axes: N rows, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import accumulating
from .contract import Choice

# The numbers stand in these functions, not in the module: with dynamic=True torch.compile would make variables of them,
# which the second autograd function of a graph cannot take in.


def shifted(z: Tensor) -> Tensor:
    """[N, K]: probabilities up to their sum, z - min z + 1e-6, which the least likely choice has."""
    return z - z.min(-1, keepdim=True).values + 1e-6


def clamped(p: Tensor) -> Tensor:
    """p, kept an epsilon of float32 from 0 and 1, for its logarithm."""
    return p.clamp(2.0**-23, 1 - 2.0**-23)


def values(scores: Tensor, kind: str, temperature: float) -> Tensor:
    """[N, K]: log-probabilities of all choices, or the scores; differentiable."""
    z = scores.to(accumulating(scores.dtype))
    if kind == "softmax":
        return torch.log_softmax(z / temperature, -1)
    if kind == "score":
        return z
    weight = shifted(z)
    return clamped(weight / weight.sum(-1, keepdim=True)).log()


def choose(
    scores: Tensor,
    uniform: Tensor | None,
    coin: Tensor | None,
    forced: Tensor | None,
    kind: str,
    temperature: float,
    exploration: float,
) -> tuple[Tensor, Tensor]:
    """(actions, greedy). ``uniform`` u [N, K] is uniform in [0, 1) (None: greedy), and ``coin`` [N] too.

    A draw is the winner of an exponential race, argmax p_k / E_k with E = -log u, so that u = 0 never wins; for kind
    "score", where p is uniform, that is the largest u. With a coin, it is taken where coin < exploration and the greedy
    choice elsewhere. ``forced`` [N] replaces all of that.
    """
    greedy = scores.argmax(-1)
    if forced is not None:
        return forced, greedy
    if uniform is None:
        return greedy, greedy
    z = scores.to(accumulating(scores.dtype))
    if kind == "softmax":
        drawn = (z / temperature - (-uniform.log()).log()).argmax(-1)
    elif kind == "score":
        drawn = uniform.argmax(-1)
    else:
        drawn = (shifted(z) / -uniform.log()).argmax(-1)
    return drawn if coin is None else torch.where(coin < exploration, drawn, greedy), greedy


def at(values: Tensor, actions: Tensor) -> Tensor:
    """[N]: values [N, K] at actions [N], zero where an action is negative."""
    picked = values.gather(-1, actions.clamp(min=0)[:, None])[:, 0]
    return torch.where(actions >= 0, picked, 0)


def value_of(scores: Tensor, actions: Tensor, kind: str, temperature: float) -> Tensor:
    """[N]: what the actions are worth; rows without one are left out before anything is computed."""
    return at(values(torch.where(actions[:, None] >= 0, scores, 0), kind, temperature), actions)


def policy(
    scores: Tensor,
    uniform: Tensor | None = None,
    coin: Tensor | None = None,
    forced: Tensor | None = None,
    kind: str = "softmax",
    temperature: float = 1.0,
    exploration: float = 0.0,
) -> Choice:
    """The definition, with autograd."""
    actions, greedy = choose(scores, uniform, coin, forced, kind, temperature, exploration)
    return Choice(actions, value_of(scores, actions, kind, temperature), greedy)
