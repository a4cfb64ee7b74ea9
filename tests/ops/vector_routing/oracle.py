"""Inputs for ``vector_routing``, its exact answer, and how far a backend may be from it.

Axes: B batch, n input vectors, m output vectors, d width of an input vector.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastroute.ops.vector_routing.contract import Grads, Passes, Step
from fastroute.ops.vector_routing.reference import gates, row_is_live, vector_routing
from tests.helpers import seeds
from tests.helpers.budget import Yardstick

PARAMETERS = ("gate_weight", "gate_bias", "score_weight", "score_bias", "use", "ign", "use_bias", "ign_bias")


class Size(NamedTuple):
    """B, n, m, d as in every file of the op."""

    B: int
    n: int
    m: int
    d: int

    def __str__(self) -> str:
        return f"B{self.B}-n{self.n}-m{self.m}-d{self.d}"


class Problem(NamedTuple):
    """An iteration and what comes back to it from the loss."""

    step: Step
    dM: Tensor  # [B, m, d]
    dp: Tensor  # [B, m]


def problem(
    size: Size,
    *,
    first: bool = False,
    made: bool = False,
    linear: bool = False,
    shared_scores: bool | None = None,
    ign: bool = True,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Random inputs, logits of order 1. ``made``: the iteration makes its gates; ``linear``: rows share parameters.

    ``shared_scores``: rows share the score parameters, or not, whatever the betas do.
    """
    B, n, m, d = size
    rows = 1 if linear else n
    score_rows = rows if shared_scores is None else 1 if shared_scores else n
    generator = seeds.generator(seed)
    stored = parameter_dtype or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    betas = (m, d) if linear else (n, m)
    scale = d**-0.5 if linear else 1.0
    alive = None if lengths is None else torch.tensor(lengths, device=device)
    gate = None if made else normal(B, n).sigmoid()
    x = normal(B, n, d, dtype=dtype)
    step = Step(
        x=x,
        gate=gate,
        gate_weight=normal(rows, d, dtype=stored) if made else None,
        gate_bias=normal(rows, scale=0.3, dtype=stored) if made else None,
        scale=torch.full((B,), d**-0.5, device=device) if made else None,
        pred=None if first else normal(B, m, d, scale=d**-0.5),
        score_weight=None if first else normal(score_rows, m, dtype=stored),
        score_bias=None if first else normal(score_rows, m, dtype=stored),
        use=normal(*betas, scale=scale, dtype=stored),
        ign=normal(*betas, scale=scale, dtype=stored) if ign else None,
        use_bias=normal(m, scale=0.3, dtype=stored) if linear else None,
        ign_bias=normal(m, scale=0.3, dtype=stored) if linear and ign else None,
        prior=torch.full((m,), 1 / m, device=device) if first else None,
        mask=None if mask is None else mask.to(device),
        lengths=alive,
        precision=precision,
    )
    return Problem(step, normal(B, m, d), normal(B, m))


def empty_grads(step: Step, *, want_x: bool = True, want_rows: bool = True, start: float | None = None) -> Grads:
    """Buffers as the op layer makes them: nothing in them (NaN) for the first pass, or ``start``."""
    fill = float("nan") if start is None else start

    def like(t: Tensor | None, shared: bool = False) -> Tensor | None:
        return None if t is None else torch.full(t.shape, fill, dtype=step.acc if shared else t.dtype, device=t.device)

    grads = Grads(start is None, torch.full(step.x.shape[:2], fill, device=step.x.device))
    grads.x = like(step.x) if want_x else None
    if want_rows:
        for name in PARAMETERS:
            t = getattr(step, name)
            setattr(grads, name, like(t, shared=step.linear or (t is not None and t.shape[0] == 1)))
    return grads


def run(backend: ModuleType, case: Problem, **wants: Any) -> dict[str, Tensor]:
    """Forward and backward of a backend, by name; inputs' gradients as d<name>."""
    M, p, gate = backend.forward(case.step)
    grads = empty_grads(case.step, **wants)
    dpred = backend.backward(case.step._replace(gate=gate), case.dM, case.dp, grads)
    found = {"M": M, "p": p, "gate": gate, "dpred": dpred, "dx": grads.x, "dgate": grads.gate}
    found |= {f"d{name}": getattr(grads, name) for name in PARAMETERS}
    return {name: t for name, t in found.items() if t is not None}


def passes_of(backend: ModuleType, size: Size, rows: Tensor | None = None, **options: Any) -> list[Problem]:
    """A first iteration that makes its gates, and the next, of the same x in TF32, whose numbers are times ``rows``."""
    first = problem(size, precision="tf32", first=True, made=True, **options)
    after = problem(size, precision="tf32", seed=1, **options)
    x = first.step.x if rows is None else first.step.x * rows.to(first.step.x.device)
    gate = backend.forward(first.step._replace(x=x))[2]
    return [first._replace(step=first.step._replace(x=x)), after._replace(step=after.step._replace(x=x, gate=gate))]


def forward_passes(backend: ModuleType, cases: list[Problem], *, lost: bool) -> tuple[list[dict[str, Tensor]], Any]:
    """What passes of one call find, and what the backend kept for them; if ``lost``, the first alone is given x."""
    passes = Passes(len(cases))
    found = []
    for t, case in enumerate(cases):
        passes.to_come -= 1
        x = torch.full_like(case.step.x, float("nan")) if t and lost else case.step.x
        M, p, gate = backend.forward(case.step._replace(x=x, passes=passes))
        found.append({"M": M, "p": p, "gate": gate})
    return found, passes.kept


def answer(case: Problem, dtype: torch.dtype, *, start: float = 0.0) -> dict[str, Tensor]:
    """The reference in ``dtype``, with gradients by autograd; ``start`` is what came to every input from elsewhere."""
    step = case.step
    names = ("x", "gate", *PARAMETERS, "pred")
    leaf = {k: None if (t := getattr(step, k)) is None else t.detach().to(dtype).requires_grad_() for k in names}
    x = leaf["x"] if step.lengths is None else leaf["x"].masked_fill(~row_is_live(step.x, step.lengths)[..., None], 0.0)
    gate = leaf["gate"]
    if gate is None:
        gate = gates(x, leaf["gate_weight"], leaf["gate_bias"], step.scale.to(dtype)).sigmoid()
        if step.lengths is not None:
            gate = gate.masked_fill(~row_is_live(step.x, step.lengths), 0.0)
        gate.retain_grad()
    M, p = vector_routing(
        x, gate, leaf["pred"], leaf["score_weight"], leaf["score_bias"], leaf["use"], leaf["ign"],
        use_bias=leaf["use_bias"], ign_bias=leaf["ign_bias"],
        prior=None if step.prior is None else step.prior.to(dtype), mask=step.mask, lengths=step.lengths,
    )  # fmt: skip
    loss = (M * case.dM.to(dtype)).sum() + (p * case.dp.to(dtype)).sum() + start * gate.sum()
    loss.backward()
    found = {"M": M, "p": p, "gate": gate, "dgate": gate.grad}
    found |= {f"d{k}": t.grad for k, t in leaf.items() if t is not None and k != "gate"}
    for k, g in found.items():
        # The gates' parameters and dpred are written by one pass alone.
        if start and k[0] == "d" and k not in ("dgate", "dpred", "dgate_weight", "dgate_bias"):
            found[k] = g + start
    return {k: g.detach() for k, g in found.items() if g is not None}


def assert_within_budget(
    found: dict[str, Tensor],
    case: Problem,
    *,
    start: float = 0.0,
    but: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    forward: bool = False,
) -> None:
    """Every output is within budget of the reference in float64. ``dtype``: that of the products, if not x's.

    ``forward``: what was found is of the forward pass alone.
    """
    made = case.step.x.dtype
    half = dtype or (made if made.itemsize == 2 else None)  # p is the sum of the phi that the products take
    operands = "tf32" if case.step.precision == "tf32" else None

    def exact() -> dict[str, Tensor]:
        whole = answer(case, torch.float64, start=start)
        return {name: whole[name] for name in found if name in whole} if forward else whole

    yardstick = Yardstick(exact, made, stored=half, operands=operands)
    missing = set(yardstick.exact) - set(found) - set(but)
    assert not missing, missing
    for name in set(found) - set(yardstick.exact):
        assert not found[name].any(), f"{name} has no gradient here, so it must be zero"
    yardstick.check({name: t for name, t in found.items() if name in yardstick.exact})
