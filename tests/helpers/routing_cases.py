"""Capsule routing for the other helpers: the literal reference behind the names the op and the module use, and inputs.

Axes: b samples, n input vectors, m output vectors, d width of an input vector, h width of an output vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastroute import EfficientVectorRouting, functional
from fastroute.ops.efficient_routing import reference as reference_efficient
from fastroute.ops.efficient_routing.contract import Parameters
from fastroute.ops.vector_routing import reference as reference_vector

from . import seeds
from .cases import Case


class Size(NamedTuple):
    """Letters as above; h is for all iterations."""

    b: int
    n: int
    m: int
    d: int
    h: int = 5

    def __str__(self) -> str:
        return "-".join(f"{k}{v}" for k, v in self._asdict().items())


def _normal(generator: torch.Generator, dtype: torch.dtype) -> Any:
    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return normal


def some_mask(*shape: int, closed: float = 0.4, seed: int = 5) -> Tensor:
    """Random, with a row of the first sample shut for every output, where there is more than one row."""
    mask = torch.rand(shape, generator=seeds.generator(seed)) < closed
    if shape[-2] > 1:
        mask[(0,) * (len(shape) - 2) + (shape[-2] // 2,)] = True
    return mask


# ------------------------------------------------------------------------------------------------- one iteration

_BETAS = {False: "nm", True: "md"}


def vector_case(
    size: Size,
    *,
    first: bool = False,
    linear: bool = False,
    ign: bool = True,
    shared_scores: bool | Literal["weight", "bias"] = False,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Inputs of ``functional.vector_routing`` of order 1. ``shared_scores``: of one row, or which of both is."""
    b, n, m, d, _ = size
    acc = torch.promote_types(dtype, torch.float32)
    normal = _normal(seeds.generator(seed), parameter_dtype or dtype)
    rows = {name: 1 if shared_scores in (True, name) else n for name in ("weight", "bias")}
    betas, spread = ((m, d), d**-0.5) if linear else ((n, m), 1.0)
    inputs = {
        "x": normal(b, n, d, dtype=dtype),
        "gate": normal(b, n, dtype=acc).sigmoid(),
        "pred": None if first else normal(b, m, d, scale=d**-0.5, dtype=acc),
        "score_weight": None if first else normal(rows["weight"], m),
        "score_bias": None if first else normal(rows["bias"], m),
        "use": normal(*betas, scale=spread),
        "ign": normal(*betas, scale=spread) if ign else None,
        "use_bias": normal(m, scale=0.3) if linear else None,
        "ign_bias": normal(m, scale=0.3) if linear and ign else None,
        "prior": torch.full((m,), 1 / m, dtype=acc) if first else None,
        "mask": mask,
        "lengths": None if lengths is None else torch.tensor(lengths),
    }
    axes = {
        "x": "bnd", "gate": "bn", "pred": "bmd", "score_weight": "nm", "score_bias": "nm", "use": _BETAS[linear],
        "ign": _BETAS[linear], "use_bias": "m", "ign_bias": "m", "prior": "m", "lengths": "b", "M": "bmd", "p": "bm",
        "mask": "bnm"[3 - (0 if mask is None else mask.dim()):],
    }  # fmt: skip
    cotangents = {"M": normal(b, m, d, dtype=acc), "p": normal(b, m, dtype=acc)}
    return Case(inputs, cotangents, axes, tuple(k for k in inputs if k not in ("prior", "mask", "lengths")))


def vector_op(**inputs: Tensor | None) -> dict[str, Tensor]:
    M, p = functional.vector_routing(**inputs)  # type: ignore[arg-type]
    return {"M": M, "p": p}


def vector_truth(**inputs: Tensor | None) -> dict[str, Tensor]:
    """The literal equations; the mask is broadcast, as the op does it."""
    x, mask, use = inputs["x"], inputs["mask"], inputs["use"]
    assert x is not None and use is not None
    m = use.shape[0] if inputs["use_bias"] is not None else use.shape[1]
    mask = None if mask is None else mask.expand(*x.shape[:2], m)
    M, p = reference_vector.vector_routing(**{**inputs, "mask": mask})  # type: ignore[arg-type]
    return {"M": M, "p": p}


# ------------------------------------------------------------------------------------------------- all iterations


def efficient_case(
    size: Size,
    *,
    linear: bool = False,
    mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Inputs of ``functional.efficient_routing`` as a fresh module has them, but with biases that are not zero."""
    b, n, m, d, h = size
    stored = parameter_dtype or dtype
    normal = _normal(seeds.generator(seed), stored)
    rows = 1 if linear else n
    betas, spread = ((m, d), d**-0.5) if linear else ((n, m), 1.0)
    inputs = {
        "x": normal(b, n, d, dtype=dtype),
        "W_A": normal(rows, d, scale=2 * d**-0.5), "B_A": normal(rows, scale=0.3),
        "W_F1": normal(m, d), "W_F2": normal(d, h, scale=2 * d**-0.5), "B_F2": normal(m, h, scale=0.3),
        "W_G1": normal(h, d, scale=h**-0.5), "W_G2": normal(m, d), "B_G2": normal(m, d, scale=0.3),
        "W_S": normal(rows, m, scale=d**-0.5), "B_S": normal(rows, m, scale=0.3),
        "beta_use": normal(*betas, scale=spread), "beta_ign": normal(*betas, scale=spread),
        "bias_use": normal(m, scale=0.3) if linear else None, "bias_ign": normal(m, scale=0.3) if linear else None,
        "prior": torch.full((m,), 1 / m, dtype=torch.float64).to(stored),
        "mask": mask,
        "lengths": None if lengths is None else torch.tensor(lengths),
    }  # fmt: skip
    axes = {
        "x": "bnd", "W_A": "nd", "B_A": "n", "W_F1": "md", "W_F2": "dh", "B_F2": "mh", "W_G1": "hd", "W_G2": "md",
        "B_G2": "md", "W_S": "nm", "B_S": "nm", "beta_use": _BETAS[linear], "beta_ign": _BETAS[linear],
        "bias_use": "m", "bias_ign": "m", "prior": "m", "mask": "bnm", "lengths": "b", "x_out": "bmh",
    }  # fmt: skip
    out = torch.promote_types(dtype, stored)
    return Case(
        inputs,
        {"x_out": normal(b, m, h, dtype=out)},
        axes,
        tuple(k for k in inputs if k not in ("prior", "mask", "lengths")),
    )


def _routed(routing: Any, n_iters: int, normalize: bool, **inputs: Tensor | None) -> dict[str, Tensor]:
    w = Parameters(**{k: inputs[k] for k in Parameters._fields})  # type: ignore[arg-type]
    x_out = routing(
        inputs["x"], w, n_iters=n_iters, normalize=normalize, mask=inputs["mask"], lengths=inputs["lengths"]
    )
    return {"x_out": x_out}


def efficient_op(n_iters: int = 2, normalize: bool = True) -> Any:
    return partial(_routed, functional.efficient_routing, n_iters, normalize)


def efficient_truth(n_iters: int = 2, normalize: bool = True) -> Any:
    return partial(_routed, reference_efficient.efficient_routing, n_iters, normalize)


# ------------------------------------------------------------------------------------------------------ the module

_IN_MODULE = {
    "beta_use": "compute_beta_use.weight", "beta_ign": "compute_beta_ign.weight",
    "bias_use": "compute_beta_use.bias", "bias_ign": "compute_beta_ign.bias", "prior": "CONST_ones_over_n_out",
}  # fmt: skip
_PARAMETER_AXES = {
    "W_A": "nd", "B_A": "n", "W_F1": "md", "W_F2": "dh", "B_F2": "mh", "W_G1": "hd", "W_G2": "md", "B_G2": "md",
    "W_S": "nm", "B_S": "nm", "beta_use": "nm", "beta_ign": "nm", "CONST_ones_over_n_out": "m",
    "compute_beta_use.weight": "md", "compute_beta_ign.weight": "md",
    "compute_beta_use.bias": "m", "compute_beta_ign.bias": "m",
}  # fmt: skip
_OUTPUT_AXES = {
    "a_inp": "n", "V": "nmh", "pred_x_inp": "md", "S": "nm", "R": "nm", "D_use": "nm", "D_ign": "nm", "phi": "nm",
    "x_out": "mh",
}  # fmt: skip


class Options(NamedTuple):
    """Of a module, for its literal reference."""

    n_out: int
    n_iters: int
    normalize: bool
    memory_efficient: bool


def literal(
    module: EfficientVectorRouting | Options,
    *,
    x_inp: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    **state: Tensor,
) -> dict[str, Tensor | None]:
    """What ``return_dict=True`` returns, by the literal reference from first iteration to last, for x_inp [..., n, d].

    Of the module only the options are used where ``state`` gives parameters under their names in its state dict.
    """
    if not state:
        assert not isinstance(module, Options)
        state = dict(module.named_parameters()) | dict(module.named_buffers())
    w = Parameters(*(state.get(k, state.get(_IN_MODULE.get(k, ""))) for k in Parameters._fields))  # type: ignore[arg-type]
    *batch, n, d = x_inp.shape
    x = x_inp.reshape(-1, n, d)
    if mask is not None:
        mask = mask.expand(*batch, n, module.n_out).reshape(-1, n, module.n_out)
    if lengths is not None:
        lengths = lengths.reshape(-1)
    x_out: Tensor | None = None
    for _ in range(module.n_iters):
        last = reference_efficient.first_or_next(x, x_out, w, mask=mask, lengths=lengths)
        x_out = last.x_out
    assert x_out is not None
    V = None
    if not module.memory_efficient:
        scale = reference_efficient.input_scale(x, lengths).to(x.dtype)
        V = torch.einsum("bid,jd,dh->bijh", x * scale[:, None, None], w.W_F1, w.W_F2) + w.B_F2
    found = {
        "a_inp": last.a_inp, "V": V, "pred_x_inp": last.pred_x_inp, **last.assignment._asdict(),
        "x_out": reference_efficient.norm(x_out) if module.normalize else x_out,
    }  # fmt: skip
    return {k: None if t is None else t.reshape(*batch, *t.shape[1:]) for k, t in found.items()}


def module_case(
    module: EfficientVectorRouting,
    x_inp: Tensor,
    cotangents: dict[str, Tensor],
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Case:
    """A module's call with its parameters among the inputs, by their names in the state dict."""
    lead = "uvw"[: x_inp.dim() - 2]
    state = {k: t.detach() for k, t in module.state_dict().items()}
    axes = {"x_inp": lead + "nd", "mask": (lead + "nm")[-(0 if mask is None else mask.dim()) :], "lengths": lead}
    axes |= {k: _PARAMETER_AXES[k] for k in state} | {k: lead + a for k, a in _OUTPUT_AXES.items()}
    wrt = ("x_inp", *(k for k, _ in module.named_parameters()))
    return Case({"x_inp": x_inp, **state, "mask": mask, "lengths": lengths}, cotangents, axes, wrt)


def module_op(module: EfficientVectorRouting) -> Any:
    """The module as a function of a ``module_case``'s inputs."""

    def call(
        *, x_inp: Tensor, mask: Tensor | None, lengths: Tensor | None, **state: Tensor
    ) -> dict[str, Tensor | None]:
        made = torch.func.functional_call(module, state, (x_inp,), {"mask": mask, "lengths": lengths})
        return made if isinstance(made, dict) else {"x_out": made}

    return call


def module_truth(module: EfficientVectorRouting) -> Any:
    """The literal reference of the same function."""
    options, return_dict = Options(*(getattr(module, name) for name in Options._fields)), module.return_dict

    def call(**inputs: Any) -> dict[str, Tensor | None]:
        found = literal(options, **inputs)
        return found if return_dict else {"x_out": found["x_out"]}

    return call
