"""Matrix routing for the other helpers: the literal reference behind the op's names, and inputs.

Axes: b samples, n input capsules, m output capsules, c rows of a capsule's matrix, d its columns before, h after.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastroute import functional
from fastroute.ops.matrix_routing import reference as reference
from fastroute.ops.matrix_routing.contract import Capsules

from . import seeds
from .cases import Case, Function


class Size(NamedTuple):
    b: int
    n: int
    m: int
    c: int
    d: int
    h: int

    def __str__(self) -> str:
        return "-".join(f"{k}{v}" for k, v in self._asdict().items())


PARAMETERS = ("W", "B", "beta_use", "beta_ign")
_PER_INPUT = {"W": "nmdh", "B": "nmch", "beta_use": "nm", "beta_ign": "nm"}
AXES = {"a_inp": "bn", "mu_inp": "bncd", **_PER_INPUT, "mask": "bnm", "a": "bm", "mu": "bmch", "sig2": "bmch"}


def matrix_case(
    size: Size,
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    shared: bool = False,
    mask: Tensor | None = None,
    far: float = 0.0,
    seed: int = 0,
) -> Case:
    """``far``: how far from 0, in standard deviations, all votes are."""
    generator = seeds.generator(seed)
    b, n, m, c, d, h = size
    n1 = 1 if shared else n

    def normal(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(of)

    own = parameter_dtype or dtype
    inputs = {
        "a_inp": normal(b, n),
        "mu_inp": normal(b, n, c, d),
        "W": normal(n1, m, d, h, scale=d**-0.5, of=own),
        "B": normal(n1, m, c, h, scale=0.3, of=own) + far,
        "beta_use": normal(n1, m, of=own),
        "beta_ign": normal(n1, m, of=own),
        "mask": mask,
    }
    cotangents = {"a": normal(b, m), "mu": normal(b, m, c, h), "sig2": normal(b, m, c, h)}
    return Case(inputs, cotangents, AXES, ("a_inp", "mu_inp", *PARAMETERS))


def matrix_op(n_iters: int = 3, **options: Any) -> Function:
    def call(a_inp: Tensor, mu_inp: Tensor, mask: Tensor | None, **w: Tensor) -> dict[str, Tensor | None]:
        return dict(
            functional.matrix_routing(a_inp, mu_inp, Capsules(**w), n_iters=n_iters, mask=mask, **options)._asdict()
        )

    return call


def matrix_truth(n_iters: int = 3, **options: Any) -> Function:
    def call(a_inp: Tensor, mu_inp: Tensor, mask: Tensor | None, **w: Tensor) -> dict[str, Tensor | None]:
        made = reference.matrix_routing(a_inp, mu_inp, Capsules(**w), n_iters=n_iters, mask=mask, **options)
        return {"a": made.a_out, "mu": made.mu_out, "sig2": made.sig2_out}

    return call
