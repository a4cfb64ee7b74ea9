"""The decisions' losses once more: sample by sample and step by step, as the formulas are written, in plain Python.

A sample's history is a list of steps; a step is a dict: ``algo``, ``state`` (columns [K], with their graph), ``a``,
``own`` (its per-action reward) and ``id`` (which layer). Nothing here is fast and nothing is shared with the library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Step = dict[str, Any]


def returns(history: list[Step], f: Tensor, gamma: float, normalize: bool) -> None:
    """Give every step its r and R."""
    T = len(history)
    for t, step in enumerate(history):
        r = step["own"] / T
        if normalize:
            r = r * f.abs()
        step["r"] = r + f if t == T - 1 else r + 0 * f
    R = torch.zeros_like(f)
    for step in reversed(history):
        R = step["r"] + gamma * R
        step["R"], step["f"] = R, f


def with_next(history: list[Step]) -> None:
    for t, step in enumerate(history):
        step["next"] = history[t + 1] if t + 1 < len(history) else None


def entry(step: Step, gamma: float, formula: str, mates: list[Step]) -> Tensor:
    """The loss of one entry; ``mates`` are all entries of its layer in the batch, itself among them."""
    s, a, r, R, f, after = step["state"], step["a"], step["r"], step["R"], step["f"], step["next"]
    K, upstream = len(s[0]), formula == "upstream"
    # upstream stops looking ahead where the number of choices changes, too
    cut = after is None or (upstream and len(after["state"][0]) != K)
    algo = step["algo"]
    literal = _upstream if upstream else _intended
    return literal(algo, s, a, r, R, f, None if cut else after, gamma, K, step, mates)


def _column(after: Step, i: int) -> Tensor:
    """A column of the next state; upstream pads states with zeros."""
    s = after["state"]
    return s[i].detach() if i < len(s) else torch.zeros_like(s[0]).detach()


def _intended(
    algo: str, s: list[Tensor], a: int, r: Tensor, R: Tensor, f: Tensor, after: Step | None, gamma: float, K: int,
    me: Step, mates: list[Step],
) -> Tensor:  # fmt: skip
    def target(what: str, i: int) -> Tensor:
        if after is None:
            return r
        column = _column(after, i)
        value = {"max": column.max(), "taken": column[after["a"]], "first": column[0]}[what]
        return r + gamma * value

    p = s[0].detach().exp()
    if algo == "REINFORCE":
        return -s[0][a] * R
    if algo in ("REINFORCEBl1", "REINFORCEBl2"):
        expected = sum(float(p[k]) * s[1][k].detach() for k in range(K))
        gained = R / (K * p[a]) if algo == "REINFORCEBl2" else R
        return -s[0][a] * (gained - expected) + (s[1][a] - target("max", 1)) ** 2
    if algo == "EGreedyREINFORCE":
        return -s[0][a] * (s[1][a] / s[2][a]).detach() * R
    if algo == "QLearning":
        return (s[0][a] - target("max", 0)) ** 2
    if algo == "SARSA":
        return (s[0][a] - target("taken", 0)) ** 2
    if algo == "ActorCritic":
        return -s[0][a] * (R - s[1][a].detach()) + (s[1][a] - target("max", 1)) ** 2
    if algo == "AAC":
        D = R - s[1][0]
        return -s[0][a] * D.detach() + D**2
    if algo == "BootstrapAAC":
        D = target("first", 1) - s[1][0]
        return -s[0][a] * D.detach() + D**2
    if algo == "EGreedyAAC":
        D = R - s[3][0]
        return -s[0][a] * (s[1][a] / s[2][a]).detach() * D.detach() + D**2
    if algo in ("AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning"):
        V = s[1][0]
        y = R
        if algo == "BootstrapAdvantageLearning":
            y = target("first", 1)
        if algo == "SurpriseLearning":
            y = f if after is None else gamma * _column(after, 1)[0] - r
        return (V - y) ** 2 + (s[0][a] - (y - V.detach())) ** 2
    if algo == "WPL":
        pa, q = s[0][a].exp(), s[1][a]
        d = float(R - s[2][0].detach())  # against the policy's mean value
        weight = float(pa.detach()) if d < 0 else 1 - float(pa.detach())
        return (pa - (pa.detach() + d * weight)) ** 2 + (q - R) ** 2
    if algo == "GumbelSoftmax":
        return torch.zeros_like(f)
    raise NotImplementedError(algo)


def _upstream(
    algo: str, s: list[Tensor], a: int, r: Tensor, R: Tensor, f: Tensor, after: Step | None, gamma: float, K: int,
    me: Step, mates: list[Step],
) -> Tensor:  # fmt: skip
    def target(value: Any) -> Tensor:
        made: Tensor = f if after is None else value(after)
        return made

    def highest(i: int) -> Any:
        return lambda n: _column(n, i).max() - r

    if algo in ("REINFORCE", "GumbelSoftmax"):
        return _intended(algo, s, a, r, R, f, after, gamma, K, me, mates)
    if algo in ("REINFORCEBl1", "REINFORCEBl2"):
        gained = R / (K * s[0].softmax(0)[a]) if algo == "REINFORCEBl2" else R
        return -s[0][a] * (gained - s[1][0]).detach() + (s[1][a] - target(highest(1))) ** 2
    if algo == "EGreedyREINFORCE":
        w = (s[1][a] / s[2][a]).detach()
        return w * sum(-m["state"][0][m["a"]] * m["R"] for m in mates)
    if algo == "QLearning":
        return (s[0][a] - target(highest(0))) ** 2
    if algo == "SARSA":
        return (s[0][a] - target(lambda n: s[0][n["a"]].detach())) ** 2
    if algo == "ActorCritic":
        return -s[0][a] * (R - s[1][a]).detach() + (s[1][a] - target(highest(1))) ** 2
    if algo == "AAC":
        squares = [(m["R"] - m["state"][1][0]) ** 2 for m in mates]
        return -s[0][a] * (R - s[1][0]).detach() + sum(squares) / len(squares)
    if algo == "BootstrapAAC":  # upstream's own cannot run: the intended advantage, put together as in its AAC
        squares = [_bootstrap(m, gamma) ** 2 for m in mates]
        return -s[0][a] * _bootstrap(me, gamma).detach() + sum(squares) / len(squares)
    if algo == "EGreedyAAC":
        w = (s[1][a] / s[2][a]).detach()
        total = torch.zeros_like(f)
        for m in mates:
            D = m["R"] - m["state"][3][0]
            total = total + w * -m["state"][0][m["a"]] * D.detach() + D**2
        return total
    if algo in ("AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning"):
        V, y = s[1][0], R
        if algo == "BootstrapAdvantageLearning":
            y = target(lambda n: _column(n, 1)[0] + r)
        if algo == "SurpriseLearning":
            y = target(lambda n: _column(n, 1)[0] - r)
        return (V - y) ** 2 + (s[0][a] - (y - V.detach())) ** 2
    if algo == "WPL":
        log_p, q = s[0][a], s[1][a]
        d = R - q.detach()
        proj = 1 + d if float(d) < 0 else 2 - d
        return (log_p - log_p.detach() * proj) ** 2 + (q - R) ** 2
    raise NotImplementedError(algo)


def _bootstrap(step: Step, gamma: float) -> Tensor:
    after = step["next"]
    y = step["r"] if after is None else step["r"] + gamma * _column(after, 1)[0]
    made: Tensor = y - step["state"][1][0]
    return made


def routing_losses(
    histories: list[list[Step]], finals: Tensor, *, gamma: float, normalize: bool, formula: str | dict[int, str]
) -> Tensor:
    """[B]: per sample the sum over its steps."""
    for history, f in zip(histories, finals, strict=True):
        returns(history, f, gamma, normalize)
        with_next(history)
    layers: dict[Any, list[Step]] = {}
    for history in histories:
        for step in history:
            layers.setdefault(step["id"], []).append(step)
    totals = []
    for history, f in zip(histories, finals, strict=True):
        total = torch.zeros_like(f)
        for step in history:
            which = formula if isinstance(formula, str) else formula[step["id"]]
            total = total + entry(step, gamma, which, layers[step["id"]])
        totals.append(total)
    return torch.stack(totals) if totals else finals
