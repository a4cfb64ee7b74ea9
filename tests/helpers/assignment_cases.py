"""Calls of ``soft_assignment`` as cases, for every backend, and its definition.

Axes: b samples, n inputs, m outputs, h width of a vote; an axis of votes that is shared has size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastroute import functional, use_backend
from fastroute.ops import dtypes
from fastroute.ops.soft_assignment import contract
from fastroute.ops.soft_assignment import reference as reference

from . import seeds
from .cases import Case
from .routing_cases import some_mask

#: Which axes of the votes are shared.
SHARED = {"own": "", "by samples": "b", "by outputs": "m", "by both": "bm"}

#: What there is: scores, gate, betas (None, "use", "both", "per sample"), mask and lengths.
FORMS: dict[str, dict[str, Any]] = {
    "scores": {"gate": False},
    "first": {"scores": False, "betas": "both"},
    "gated": {},
    "use": {"betas": "use"},
    "ign": {"betas": "ign", "mask": True},
    "routing": {"betas": "both"},
    "any length": {"betas": "per sample"},
    "masked": {"betas": "both", "mask": True},
    "masked first": {"scores": False, "betas": "both", "mask": True},
    "padded": {"betas": "per sample", "lengths": True, "mask": True},
    "padded first": {"scores": False, "betas": "both", "lengths": True},
    "mean": {"gate": False, "mean": True, "eps": 1e-2},
    "gated mean": {"mean": True},
    "masked mean": {"gate": False, "mean": True, "eps": 1e-2, "mask": True, "lengths": True},
}


def case_of(
    form: str, size: tuple[int, int, int, int], shared: str = "", dtype: torch.dtype = torch.float32, seed: int = 0,
    scores_dtype: torch.dtype | None = None, device: str = "cpu",
) -> Case:  # fmt: skip
    b, n, m, h = size
    has = {"scores": True, "gate": True, "betas": None, "mask": False, "lengths": False, **FORMS[form]}
    acc = torch.promote_types(dtype, torch.float32)
    generator = seeds.generator(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    beta = (b, n, m) if has["betas"] == "per sample" else (n, m)
    inputs = {
        "scores": normal(b, n, m, dtype=scores_dtype or dtype) if has["scores"] else None,
        "votes": normal(1 if "b" in shared else b, n, 1 if "m" in shared else m, h),
        "gate": normal(b, n, dtype=acc).sigmoid() if has["gate"] else None,
        "use": normal(*beta) if has["betas"] not in (None, "ign") else None,
        "ign": normal(*beta) if has["betas"] not in (None, "use") else None,
        "prior": torch.full((m,), 1 / m, dtype=acc, device=device) if not has["scores"] else None,
        "mask": some_mask(b, n, m, seed=seed).to(device) if has["mask"] and b else None,
        "lengths": torch.tensor([n * (b - k) // b for k in range(b)], dtype=torch.int64, device=device)
        if has["lengths"]
        else None,
    }
    axes = {"scores": "bnm", "votes": "bnmh", "gate": "bn", "use": "bnm"[3 - len(beta):], "ign": "bnm"[3 - len(beta):],
            "prior": "m", "mask": "bnm", "lengths": "b", "y": "bmh"}  # fmt: skip
    wrt = tuple(k for k in ("scores", "votes", "gate", "use", "ign") if inputs[k] is not None)
    return Case(inputs, {"y": normal(b, m, h, dtype=acc)}, axes, wrt)


def _options(form: str) -> dict[str, Any]:
    return {k: v for k, v in FORMS[form].items() if k in ("mean", "eps")}


def of_form(form: str) -> Callable[..., dict[str, Tensor]]:
    return lambda **inputs: {"y": functional.soft_assignment(**inputs, **_options(form))}


def op(backend: str, form: str) -> Callable[..., dict[str, Tensor]]:
    return use_backend(backend)(of_form(form))


def truth(form: str) -> Callable[..., dict[str, Tensor]]:
    options = _options(form)

    def call(**inputs: Any) -> dict[str, Tensor]:
        votes = inputs.pop("votes")
        acc = dtypes.accumulating(votes.dtype)
        names = ("scores", "gate", "use", "ign", "prior", "mask", "lengths")
        given = {k: inputs[k] for k in names}
        for k in ("scores", "use", "ign"):
            given[k] = None if given[k] is None else given[k].to(acc)
        M, p = reference.soft_assignment(votes.to(acc), contract.Pairs(**given, eps=options.get("eps", 0.0)))
        return {"y": M / torch.where(p > 0, p, 1.0)[..., None] if options.get("mean") else M}

    return call
