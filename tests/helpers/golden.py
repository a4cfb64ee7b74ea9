"""Numbers that an upstream system produced: one file is one call of a module, with outputs and every gradient.

Each file holds module, kwargs, dtype, seed, state_dict, inputs, mask, outputs, cotangents, input_grads and param_grads;
the loss behind the gradients is the sum of <output, cotangent>. ``load`` reads tensors and plain containers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

Found = dict[str, Tensor | None]


def load(family: str, name: str) -> Any:
    return torch.load(GOLDEN / family / name, weights_only=True)


def names(family: str, pattern: str) -> list[str]:
    found = sorted(path.name for path in (GOLDEN / family).glob(pattern))
    assert found, f"no golden files {pattern} in {GOLDEN / family}"
    return found


def assert_same_draws(found: Tensor, expected: Tensor, what: str) -> None:
    """Normal numbers from a seed: bit for bit where PyTorch has vector code, which is where the files were made.

    Elsewhere it computes r cos t and r sin t, r = sqrt(-2 log u) < 5.8, with functions that have other last bits.
    """
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(found, expected), what
    else:
        error = float((found - expected).abs().max()) if found.numel() else 0.0
        assert error <= 4 * torch.finfo(found.dtype).eps * 5.8, f"{what}: {error:.3g}"


@dataclass(frozen=True)
class Golden:
    """A file, and the module it asks for."""

    record: dict[str, Any]

    @classmethod
    def read(cls, family: str, name: str) -> Golden:
        return cls(load(family, name))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.record["dtype"])  # type: ignore[no-any-return]

    @property
    def mask(self) -> Tensor | None:
        return self.record["mask"]  # type: ignore[no-any-return]

    def module(self, family: Any) -> nn.Module:
        """The module with the file's parameters; ``family`` is where its class is found."""
        module: nn.Module = getattr(family, self.record["module"])(**self.record["kwargs"], dtype=self.dtype)
        module.load_state_dict(self.record["state_dict"], strict=True)
        return module

    def inputs(self) -> dict[str, Tensor]:
        return {k: t.clone().requires_grad_() for k, t in self.record["inputs"].items()}

    def expected(self) -> Found:
        """What ``run`` should find: outputs by name, gradients of inputs and parameters as d<name>."""
        return {
            **self.record["outputs"],
            **{f"d{k}": g for k, g in self.record["input_grads"].items()},
            **{f"d{k}": g for k, g in self.record["param_grads"].items()},
        }

    def backward(self, outputs: dict[str, Tensor | None]) -> None:
        terms = [
            (t * self.record["cotangents"][k]).sum()
            for k, t in outputs.items()
            if t is not None and k in self.record["cotangents"]
        ]
        torch.stack(terms).sum().backward()

    def run(self, module: nn.Module) -> Found:
        """Outputs and every gradient of the module in the file's call."""
        inputs = self.inputs()
        made = module(**inputs) if self.mask is None else module(**inputs, mask=self.mask)
        outputs = made if isinstance(made, dict) else {"x_out": made}
        self.backward(outputs)
        return {
            **{k: None if t is None else t.detach() for k, t in outputs.items()},
            **{f"d{k}": t.grad for k, t in inputs.items()},
            **{f"d{k}": p.grad for k, p in module.named_parameters()},
        }
