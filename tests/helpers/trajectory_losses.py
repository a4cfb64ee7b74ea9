"""Calls of ``trajectory_loss`` as cases: what a decision is made of by name, ``s0.2`` being decision 2's first column.

Axes: B (b) samples, T decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops.trajectory_loss import reference as reference
from fastroute.ops.trajectory_loss.contract import AIDED, ALGORITHMS, BOOTSTRAPPING, CRITICS, SILENT

from . import seeds
from .cases import Case

LISTS = ("s0", "s1", "aux", "own", "look", "active")
LOG_P = (
    frozenset(ALGORITHMS) - {"QLearning", "SARSA", SILENT} - {k for k in ALGORITHMS if k.endswith("AdvantageLearning")}
)


def loss_case(
    kinds: Sequence[str],
    B: int,
    dtype: torch.dtype = torch.float32,
    *,
    masked: bool = False,
    own: bool = True,
    seed: int = 0,
) -> Case:
    """Numbers of order one; every second decision has a reward of its own, all but the second one a mask."""
    generator = seeds.generator(seed)

    def normal() -> Tensor:
        return torch.randn(B, generator=generator, dtype=torch.float64).to(dtype)

    inputs: dict[str, Tensor | None] = {"f": normal()}
    for t, kind in enumerate(kinds):
        first, second, third, mine, seen = (normal() for _ in range(5))
        made: dict[str, Tensor | None] = {
            "s0": None if kind == SILENT else -first.abs() if kind in LOG_P else first,
            "s1": second if kind in CRITICS else None,
            "aux": (third.abs() if kind.startswith("EGreedy") else third) if kind in AIDED else None,
            "own": mine if own and t % 2 == 0 else None,
            "look": seen if t and set(kinds[:t]) & BOOTSTRAPPING else None,
            "active": torch.rand(B, generator=generator) < 0.6 if masked and t != 1 else None,
        }
        inputs |= {f"{name}.{t}": value for name, value in made.items()}
    wrt = tuple(name for name, t in inputs.items() if t is not None and name[:2] in ("s0", "s1"))
    return Case(inputs, {"loss": normal()}, {name: "b" for name in (*inputs, "loss")}, wrt)


def arguments(kinds: Sequence[str], inputs: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments of a case's inputs."""
    rows = {name: [inputs.get(f"{name}.{t}") for t in range(len(kinds))] for name in LISTS}
    return {"kinds": list(kinds), **rows, "f": inputs["f"], "choices": [3 + t for t in range(len(kinds))]}


def loss_op(backend: str, kinds: Sequence[str], **options: Any) -> Callable[..., dict[str, Tensor | None]]:
    def call(**inputs: Tensor | None) -> dict[str, Tensor | None]:
        with use_backend(backend):
            return {"loss": functional.trajectory_loss(**arguments(kinds, inputs), **options)}

    return call


def loss_truth(kinds: Sequence[str], **options: Any) -> Callable[..., dict[str, Tensor | None]]:
    return lambda **inputs: {"loss": reference.trajectory_loss(**arguments(kinds, inputs), **options)}
