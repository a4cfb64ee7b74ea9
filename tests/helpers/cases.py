"""One call of an op as data, so that the same call can be made in another dtype, order, layout or backend.

An op under test is a function from named inputs to named outputs. ``axes`` gives a letter per axis of every input and
output; equal letters are the same axis, which is what lets a case be permuted, sliced and concatenated by axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Function = Callable[..., Mapping[str, Tensor | None]]
Results = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Inputs by name, what comes back to each output from the loss, and the letters of all their axes."""

    inputs: dict[str, Tensor | None]
    cotangents: dict[str, Tensor]
    axes: dict[str, str]
    wrt: tuple[str, ...]  #: the inputs whose gradients are wanted

    def to(self, dtype: torch.dtype) -> Case:
        """Every floating-point tensor in ``dtype``."""

        def cast(t: Tensor | None) -> Tensor | None:
            return t.to(dtype) if t is not None and t.is_floating_point() else t

        return replace(
            self,
            inputs={k: cast(t) for k, t in self.inputs.items()},
            cotangents={k: t.to(dtype) for k, t in self.cotangents.items()},
        )

    def with_inputs(self, **changed: Tensor | None) -> Case:
        return replace(self, inputs={**self.inputs, **changed})

    def select(self, letter: str, index: Tensor) -> Case:
        """The case with an axis reordered, or some of it deleted. An axis of size 1 is shared and stays."""
        return replace(
            self,
            inputs=select(self.inputs, self.axes, letter, index),
            cotangents=select(self.cotangents, self.axes, letter, index),
        )

    def size(self, letter: str) -> int:
        """The length of an axis."""
        tensors: dict[str, Tensor | None] = {**self.inputs, **self.cotangents}
        return max(
            t.shape[self.axes[k].index(letter)] for k, t in tensors.items() if t is not None and letter in self.axes[k]
        )


def _axes_of(name: str, axes: Mapping[str, str]) -> str:
    """Of an input, an output, or a gradient ``d<input>``."""
    return axes[name] if name in axes else axes[name.removeprefix("d")]


def select(
    tensors: Mapping[str, Tensor | None], axes: Mapping[str, str], letter: str, index: Tensor
) -> dict[str, Tensor | None]:
    """Index every axis called ``letter``, of inputs, outputs or gradients."""
    chosen: dict[str, Tensor | None] = {}
    for name, t in tensors.items():
        if t is not None:
            for axis, called in enumerate(_axes_of(name, axes)):
                if called == letter and t.shape[axis] > 1:
                    t = t.index_select(axis, index)
        chosen[name] = t
    return chosen


def evaluate(fn: Function, case: Case) -> Results:
    """Outputs, and the gradient ``d<name>`` of every input in ``wrt`` (None where nothing flows)."""
    leaves = {k: t.detach().requires_grad_() for k in case.wrt if (t := case.inputs[k]) is not None}
    outputs = fn(**{**case.inputs, **leaves})
    found: Results = {k: None if t is None else t.detach() for k, t in outputs.items()}
    ends = [t for k in case.cotangents if (t := outputs[k]) is not None]
    cotangents = [g.to(t.dtype) for g, t in zip(case.cotangents.values(), ends, strict=True)]
    gradients = torch.autograd.grad(ends, list(leaves.values()), cotangents, allow_unused=True)
    return found | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
