"""One iteration of matrix routing as a function that both a backend and plain PyTorch differentiate.

Axes: b sample, i input, j output, c row of a capsule's matrix, d column before, h column after routing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastroute.ops.matrix_routing.contract import MatrixGrads, MatrixStep, Moments, OutputGrads, Outputs
from fastroute.ops.matrix_routing.settling import settle
from tests.helpers import seeds
from tests.helpers.cases import Case, Function

EPS = 1e-5
AXES = {
    "gate": "bi", "mu_inp": "bicd", "W": "ijdh", "bias": "ijch", "use": "ij", "ign": "ij", "mask": "bij",
    "a": "bj", "mu": "bjch", "sig2": "bjch", "a_out": "bj", "mu_out": "bjch", "sig2_out": "bjch",
}  # fmt: skip
_WRT = ("gate", "mu_inp", "W", "bias", "use", "ign", "a", "mu", "sig2")
_PARAMETERS = ("W", "bias", "use", "ign")


class Size(NamedTuple):
    """B, n, m, c, d, h as in every file of the op."""

    B: int
    n: int
    m: int
    c: int
    d: int
    h: int

    def __str__(self) -> str:
        return "-".join(f"{k}{v}" for k, v in self._asdict().items())


def matrix_case(
    size: Size, *, first: bool = False, shared: bool = False, mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32, shift: float = 0.0, seed: int = 0, device: str = "cpu",
) -> Case:  # fmt: skip
    """Random inputs, parameters in ``dtype``, all else in float32. ``shift``: where all votes are, far from 0."""
    B, n, m, c, d, h = size
    n1 = 1 if shared else n
    generator = seeds.generator(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(dtype).to(device)

    inputs: dict[str, Tensor | None] = {
        "gate": normal(B, n).sigmoid(),
        "mu_inp": normal(B, n, c, d),
        "W": normal(n1, m, d, h, scale=d**-0.5, dtype=dtype),
        "bias": normal(n1, m, c, h, scale=0.3, mean=shift, dtype=dtype),
        "use": normal(n1, m, dtype=dtype),
        "ign": normal(n1, m, dtype=dtype),
        "mask": None if mask is None else mask.to(device),
        "a": None if first else normal(B, m),
        "mu": None if first else normal(B, m, c, h, scale=0.5, mean=shift),
        "sig2": None if first else normal(B, m, c, h, scale=0.3).exp(),
    }
    shapes = {"a_out": (B, m), "mu_out": (B, m, c, h), "sig2_out": (B, m, c, h)}
    wrt = tuple(name for name in _WRT if inputs[name] is not None)
    return Case(inputs, {name: normal(*shape) for name, shape in shapes.items()}, AXES, wrt)


def literal(p_model: str = "gaussian") -> Function:
    """The iteration as ``reference.matrix_routing`` has it, every vote held."""

    def step(
        gate: Tensor, mu_inp: Tensor, W: Tensor, bias: Tensor, use: Tensor, ign: Tensor, mask: Tensor | None,
        a: Tensor | None, mu: Tensor | None, sig2: Tensor | None,
    ) -> dict[str, Tensor | None]:  # fmt: skip
        f = gate[..., None]
        V = mu_inp.masked_fill(f[..., None] == 0, 0.0)[:, :, None] @ W + bias
        closed = torch.zeros_like(V[..., 0, 0], dtype=torch.bool) if mask is None else mask
        if a is None or mu is None or sig2 is None:
            scores = torch.zeros_like(V[..., 0, 0])
        else:
            square = (V - mu[:, None]).square()
            if p_model == "skm":
                log_p = F.log_softmax(-square.sum((-2, -1)), -1)
            else:
                log_p = -(square / (2 * sig2[:, None])).sum((-2, -1)) - sig2.sqrt().log().sum((-2, -1))[:, None]
            scores = F.logsigmoid(a)[:, None] + log_p
        nowhere = closed.all(-1, keepdim=True)
        R = scores.masked_fill(closed & ~nowhere, -torch.inf).softmax(-1).masked_fill(closed, 0.0)
        D_use = f * R
        D_ign = (f - D_use).masked_fill(closed, 0.0)
        a_out = (use * D_use).sum(1) - (ign * D_ign).sum(1)
        q = D_use / (D_use.sum(1, keepdim=True) + EPS)
        mu_out = torch.einsum("bij,bijch->bjch", q, V)
        sig2_out = torch.einsum("bij,bijch->bjch", q, (V - mu_out[:, None]).square()) + EPS
        return {"a_out": a_out, "mu_out": mu_out, "sig2_out": sig2_out}

    return step


def _step(tensors: tuple[Tensor | None, ...], p_model: str) -> MatrixStep:
    gate, mu_inp, W, bias, use, ign, mask, a, mu, sig2 = tensors
    previous = None if a is None or mu is None or sig2 is None else Outputs(a, mu, sig2)
    if mask is not None:
        mask = mask.expand(gate.shape[0], gate.shape[1], W.shape[1])  # type: ignore[union-attr]
    return MatrixStep(gate, mu_inp, W, bias, use, ign, mask, previous, p_model)  # type: ignore[arg-type]


class _Iteration(torch.autograd.Function):
    """A backend's two functions, as the op layer calls them."""

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, p_model: str, start: float | None, *tensors: Tensor | None) -> Any:
        step = _step(tensors, p_model)
        made = backend.forward(step)
        out = settle(made, EPS)
        ctx.save_for_backward(*tensors, *made)
        ctx.backend, ctx.p_model, ctx.start = backend, p_model, start
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Any:
        step = _step(ctx.saved_tensors[:10], ctx.p_model)
        fill = float("nan") if ctx.start is None else ctx.start
        needs = dict(zip(AXES, ctx.needs_input_grad[3:], strict=False))

        def like(t: Tensor, wanted: bool) -> Tensor | None:
            return torch.full(t.shape, fill, dtype=step.acc, device=t.device) if wanted else None

        rows = any(needs[name] for name in _PARAMETERS)
        grads = MatrixGrads(
            ctx.start is None, like(step.gate, True), like(step.mu_inp, needs["mu_inp"]),  # type: ignore[arg-type]
            *(like(t, rows) for t in (step.W, step.bias, step.beta_use, step.beta_ign)),
        )  # fmt: skip
        out = OutputGrads.of(Moments(*ctx.saved_tensors[10:]), Outputs(*d), EPS)
        sums = ctx.backend.backward(step, out, grads)
        made = [grads.gate, grads.mu_inp, grads.W, grads.bias, grads.beta_use, grads.beta_ign, None]
        if ctx.start is not None:
            made = [None if t is None else t - ctx.start for t in made]
        previous = (None,) * 3 if step.previous is None else sums.of(step.previous, ctx.p_model)
        if ctx.p_model == "skm":
            previous = (*previous[:2], None)  # no variance is read
        return (None, None, None, *made, *previous)


def backend_step(backend: ModuleType, p_model: str = "gaussian", *, start: float | None = None) -> Function:
    """The iteration by a backend. ``start``: its gradients are added to buffers that hold this."""

    def step(**tensors: Tensor | None) -> dict[str, Tensor | None]:
        made = _Iteration.apply(backend, p_model, start, *(tensors[name] for name in list(AXES)[:10]))
        return dict(zip(("a_out", "mu_out", "sig2_out"), made, strict=True))

    return step
