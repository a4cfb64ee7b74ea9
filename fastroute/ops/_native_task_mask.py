"""What ``task_mask`` is to the dispatcher on compiled backends: schemas and fakes.

C++ implements the ops whose names end in ``_native`` (csrc/cpu, csrc/cuda), Triton kernels those in ``_triton``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.task_mask import sum_dtype
from ._registry import library, register_fake

_TASK = "Tensor mapping, Tensor? tasks, int task"


def _gate(g: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(g)


def _mask_(*_: Any) -> None:
    return None


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    training = rest[7]
    mean = x.new_empty(x.shape[1] if training else 0, dtype=sum_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _batch_norm_backward(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, want_x = rest[6], rest[7], rest[-1]
    dw, db = (
        x.new_empty(x.shape[1], dtype=sum_dtype(x) if parameter is None else parameter.dtype)
        for parameter in (weight, bias)
    )
    return torch.empty_like(x) if want_x else x.new_empty(0), dw, db


def _in_triton(name: str) -> Callable[..., Any]:
    """The kernels' function of that name; triton is imported when it is first wanted."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module("fastroute.kernels.task_mask"), name)(*args)

    return call


for _backend in ("native", "triton"):
    for _name, _schema, _fake in (
        ("gate", f"(Tensor g, Tensor? y, {_TASK}) -> Tensor", _gate),
        ("rectify", f"(Tensor x, {_TASK}) -> Tensor", _gate),
        ("mask_", f"(Tensor(a!) x, {_TASK}, bool relu) -> ()", _mask_),
        (
            "batch_norm",
            f"(Tensor x, {_TASK}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
            "bool training, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
            _batch_norm,
        ),
        (
            "batch_norm_backward",
            f"(Tensor g, Tensor x, Tensor? y, {_TASK}, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
            "Tensor? bias, Tensor mean, Tensor scale, bool training, float eps, bool relu, bool want_x) "
            "-> (Tensor, Tensor, Tensor)",
            _batch_norm_backward,
        ),
    ):
        library.define(f"_task_mask_{_name}_{_backend}{_schema}", tags=(torch.Tag.needs_fixed_stride_order,))
        register_fake(f"_task_mask_{_name}_{_backend}", _fake)
        if _backend == "triton":
            library.impl(f"_task_mask_{_name}_triton", _in_triton(_name), "CompositeExplicitAutograd")
