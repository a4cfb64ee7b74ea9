"""Upstream's own training steps, replayed: outputs, losses, rewards, states and every gradient.

Its numbers are float32. What is exact is our replay in float64; upstream's numbers, and each backend's, are within
the budget that it sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastroute
from tests.helpers import golden
from tests.helpers.backends import each_backend
from tests.helpers.budget import Yardstick
from tests.helpers.networks import COLUMNS, players, replay

FILES = golden.names("networks", "traj_*.pt")


def _cases() -> Iterator[Any]:
    """Long but where an algorithm or a variant of one comes for the first time."""
    met: set[str] = set()
    for file in FILES:
        name = file.removeprefix("traj_").removesuffix(".pt")
        parts = set(name.split("_"))
        yield pytest.param(file, id=name, marks=[pytest.mark.long] if parts <= met else [])
        met |= parts


each_file = pytest.mark.parametrize("file", list(_cases()))


def recorded(g: dict[str, Any]) -> dict[str, Tensor | None]:
    """The file's results under the names that ``replay`` gives them."""
    found: dict[str, Tensor | None] = {k: g[k] for k in ("output", "module_loss", "routing_loss", "grad_x")}
    for kind in ("decisions", "selections"):
        for j, grads in enumerate(g[f"grad_{kind}"]):
            found |= {f"{kind}.{j}.{k}": grad for k, grad in grads.items()}
    return found


def entries(g: dict[str, Any], made: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, upstream's, ours) of what each decision's loss is made of, entry by entry as upstream lists them."""
    layers = range(len(g["actions"]))
    for key, group in g["sarsa"].items():
        steps = [key] if len(g["sarsa"]) == len(layers) else list(layers)  # one static loss for all Gumbel layers
        # per sample, the steps in which it was decided for
        rows = [(t, b) for b in range(len(g["x"])) for t in steps if made[f"active.{t}"][b]]
        assert [b for _, b in rows] == group["indices"].tolist()
        for theirs, ours in (("states", "states"), ("rewards", "rewards"), ("returns", "returns"),
                             ("final_reward", "final_reward")):  # fmt: skip
            if theirs in group and f"{ours}.{rows[0][0]}" in made:
                numbers, own = group[theirs], torch.stack([made[f"{ours}.{t}"][b] for t, b in rows])
                if theirs == "states":  # a lone column fills upstream's padding too, which nothing reads
                    numbers, own = (s[:, :, : COLUMNS[g["algo"]]] for s in (numbers, own))
                yield f"{ours}.{key}", numbers, own


def test_there_are_54() -> None:
    assert len(FILES) == 54


def everything(g: dict[str, Any], made: dict[str, Any]) -> dict[str, Tensor | None]:
    """Of a replay, what the file has numbers for."""
    listed = {f"entry {name}": own for name, _, own in entries(g, made)}
    return {name: made[name] for name in recorded(g)} | listed


@cache
def checked(file: str) -> tuple[dict[str, Any], Yardstick]:
    """A file, and the yardstick that upstream's own numbers have passed: one for all backends."""
    g = golden.load("networks", file)
    by = players(g, torch.float64)
    exact = replay(g, torch.float64, by)
    yardstick = Yardstick(lambda: everything(g, replay(g, torch.float64, by)), torch.float32)
    yardstick.check(recorded(g) | {f"entry {name}": t for name, t, _ in entries(g, exact)}, "upstream's")
    return g, yardstick


@each_backend
@each_file
def test_a_training_step(file: str, backend: str) -> None:
    g, yardstick = checked(file)
    with fastroute.use_backend(backend):
        yardstick.check(everything(g, replay(g)))


def test_a_wrong_formula_shows() -> None:
    """The budget is no wider than that: SARSA's own reading of the next state is found out."""
    g = golden.load("networks", "traj_SARSA.pt")
    other = g | {"algo": "QLearning"}
    yardstick = Yardstick(lambda: replay(other, torch.float64), torch.float32)
    with pytest.raises(AssertionError, match="allowed"):
        yardstick.check(recorded(g))
