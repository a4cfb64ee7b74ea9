"""Upstream's own training steps, replayed: outputs, losses, rewards, states and every gradient.

Its numbers are float32. What is exact is our replay in float64. How far float32 is from that, replays in plain PyTorch
show, in several orders of the samples and with every input rounded once more: upstream's numbers, and each backend's,
may be twice as far as the furthest of them, and one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fastroute
from tests.helpers import golden, seeds
from tests.helpers.backends import each_backend
from tests.helpers.networks import COLUMNS, moved, replay

FILES = golden.names("networks", "traj_*.pt")
each_file = pytest.mark.parametrize("file", FILES, ids=[f.removeprefix("traj_").removesuffix(".pt") for f in FILES])

DRAWS = 3


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


def _scales(exact: dict[str, Tensor | None]) -> dict[str, float]:
    """Per output and per layer the largest number: what its rounding errors are measured by."""
    scales: dict[str, float] = {}
    for name, t in exact.items():
        if t is not None and t.numel():
            group = ".".join(name.split(".")[:2])
            scales[group] = max(scales.get(group, 0.0), float(t.abs().max()))
    return scales


def _errors(found: dict[str, Tensor | None], exact: dict[str, Tensor | None], scales: dict[str, float]) -> Tensor:
    """All errors of one replay, relative to those scales."""
    parts = []
    for name, t in found.items():
        if t is not None:
            truth = exact[name]
            assert truth is not None
            scale = scales[".".join(name.split(".")[:2])] or 1.0
            parts.append(((t.double() - truth) / scale).flatten())
    return torch.cat(parts)


@cache
def yardsticks(file: str) -> list[dict[str, Any]]:
    """Float32 replays in plain PyTorch."""
    g, generator = golden.load("networks", file), seeds.generator(0)
    rounded = [{k: moved(g[k], generator) for k in ("x", "decisions", "selections")} for _ in range(DRAWS)]
    with fastroute.use_backend("reference"):
        return [replay(g)] + [replay(g | r, order=torch.randperm(8, generator=generator)) for r in rounded]


def compare(theirs: dict[str, Any], exact: dict[str, Any], ours: list[dict[str, Any]]) -> None:
    scales = _scales({k: exact[k] for k in theirs})
    error = _errors(theirs, exact, scales)
    draws = [_errors({k: o[k] for k in theirs}, exact, scales) for o in ours]
    for norm in (torch.inf, 2):
        allowed = 2 * max(float(d.norm(norm)) for d in draws) + torch.finfo(torch.float32).eps
        assert float(error.norm(norm)) <= allowed, f"they are {float(error.norm(norm)):.3g} off, allowed {allowed:.3g}"


@each_file
@each_backend
def test_a_training_step(file: str, backend: str) -> None:
    g, plain = golden.load("networks", file), yardsticks(file)
    with fastroute.use_backend(backend):
        exact, ours = replay(g, torch.float64), replay(g)
    theirs = recorded(g)
    for name, t in theirs.items():
        for made in (exact, ours):
            assert (t is None) == (made[name] is None), (
                f"{name}: {'a' if t is None else 'no'} gradient, unlike upstream"
            )
    compare(theirs, exact, plain)
    compare({k: ours[k] for k in theirs}, exact, plain)
    listed = list(entries(g, exact))
    if listed:
        compare(
            {name: t for name, t, _ in listed},
            {name: t for name, _, t in listed},
            [{name: t for name, _, t in entries(g, o)} for o in plain],
        )


@each_backend
def test_a_wrong_formula_shows(backend: str) -> None:
    """The tolerances are no wider than that: SARSA's own reading of the next state is found out."""
    g = golden.load("networks", "traj_SARSA.pt")
    with fastroute.use_backend(backend):
        exact = replay(g | {"algo": "QLearning"}, torch.float64)
        with pytest.raises(AssertionError, match="they are"):
            compare(recorded(g), exact, [replay(g | {"algo": "QLearning"})])
