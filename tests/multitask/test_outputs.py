"""Outputs by task: tensors of their own, which may be written to, of layers that may be watched and wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastroute.multitask import CGC, PLE, CrossStitch, Experts, MMoE, MTLModel, MultiHead
from tests.helpers import seeds

B, D, T = 5, 4, 6
SIZES: dict[str, Any] = {"hidden_features": 3, "out_features": D}


class Stitched(nn.Module):
    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.layer = CrossStitch(T, channels=channels)

    def forward(self, x: Tensor) -> Any:
        return self.layer([x * (t + 1) for t in range(T)])


def heads(*last: nn.Module, fuse: bool = True) -> nn.Module:
    nodes = [{"name": f"h{t}", "layers": [nn.Linear(D, D), *last]} for t in range(T)]
    return MTLModel(nodes, [f"h{t}" for t in range(T)], fuse_heads=fuse).outputs_only()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "MMoE": lambda: MMoE(D, 3, T, **SIZES),
    "MMoE of modules": lambda: MMoE(D, [nn.Linear(D, D) for _ in range(3)], T),
    "CGC": lambda: CGC(D, 1, 2, T, **SIZES),
    "CGC, none shared": lambda: CGC(D, 2, 0, T, **SIZES),
    "PLE": lambda: PLE(D, 1, 1, T, **SIZES),
    "CrossStitch": lambda: Stitched(None),
    "CrossStitch, channels": lambda: Stitched(D),
    "MultiHead": lambda: MultiHead(D, 3, D, T, returns="list"),
    "MultiHead, one layer": lambda: MultiHead(D, None, D, T, returns="dict"),
    "heads": lambda: heads(),
    "heads, relu": lambda: heads(nn.ReLU()),
    "heads, tanh": lambda: heads(nn.Tanh()),
    "heads, gelu": lambda: heads(nn.GELU()),
    "heads, two activations": lambda: heads(nn.Sigmoid(), nn.Tanh()),
}
#: What a tower does to its input in place, and the same otherwise.
WRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (torch.relu_, torch.relu),
    "mul": (lambda y: y.mul_(3), lambda y: y * 3),
    "zero": (lambda y: y.zero_(), lambda y: y * 0),
}


def each(made: Any) -> list[Tensor]:
    return list(made.values() if isinstance(made, dict) else made)


def everything(layer: nn.Module, x: Tensor, act: Callable[[Tensor], Tensor], copied: bool) -> list[Tensor]:
    """Outputs of towers, and all gradients."""
    x = x.clone().requires_grad_()
    ys = [y.clone() if copied else y for y in each(layer(x))]
    weights = torch.arange(1.0, B * D + 1).view(B, D).double()
    total = sum((t + 1) * (act(y) * weights[: y.shape[0]]).square().sum() for t, y in enumerate(ys))
    grads = torch.autograd.grad(total, [x, *layer.parameters()], allow_unused=True)
    return [*(y.detach() for y in ys), *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("rows", [B, 1, 0])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_written_to(name: str, rows: int, write: str) -> None:
    """One row, too, whose transposed layout is the same memory: what a gradient needs is not written to."""
    seeds.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(rows, D, generator=seeds.generator(3)).double()
    for copied, act in ((False, WRITES[write][0]), (True, WRITES[write][0])):
        made = everything(layer, x, act, copied)
        expected = everything(layer, x, WRITES[write][1], True)
        for a, b in zip(made[T:], expected[T:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ys = each(layer(x))
    kept = [y.detach().clone() for y in ys]
    ys[1].zero_()
    assert all(torch.equal(y, k) for t, (y, k) in enumerate(zip(ys, kept, strict=True)) if t != 1)


@pytest.mark.parametrize(
    "name", [pytest.param("PLE", marks=pytest.mark.long), "MMoE", "CrossStitch", "MultiHead", "heads, tanh"]
)
@pytest.mark.long_after(1)
def test_compiled_ones_too(name: str) -> None:
    torch._dynamo.reset()
    seeds.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(B, D).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = everything(layer, x, torch.relu, True)
    run = torch.compile(lambda x: [torch.relu_(y) for y in each(layer(x))], backend="aot_eager", fullgraph=True)
    for y, t in zip(run(x), expected[:T], strict=True):
        torch.testing.assert_close(y, torch.relu(t), rtol=1e-12, atol=1e-12)
    for y, t in zip(each(compiled(x)), expected[:T], strict=True):
        torch.testing.assert_close(y, t, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- what is put around parts


class Around(nn.Module):
    """Hands on to what it has, as adapters do, and counts its calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "adapter": Around,
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", ["MMoE", "CGC", "CGC, none shared", "PLE"])
def test_experts_may_be_wrapped(name: str, wrap: str) -> None:
    torch._dynamo.reset()
    seeds.manual_seed(0)
    plain = LAYERS[name]().double()
    layer: Any = copy.deepcopy(plain)
    around: list[Any] = []
    for level in layer.levels if isinstance(layer, PLE) else [layer]:
        for part in ("task_experts", "shared_experts"):
            if isinstance(bank := getattr(level, part), Experts):
                around.append(WRAPPED[wrap](bank))
                setattr(level, part, around[-1])
    for lead in ((B,), (2, 3)):
        x = torch.randn(*lead, D).double()
        for y, t in zip(each(layer(x)), each(plain(x)), strict=True):
            torch.testing.assert_close(y, t, rtol=1e-12, atol=1e-12)
    x = torch.randn(B, D).double()
    for a, b in zip(everything(layer, x, torch.relu, True), everything(plain, x, torch.relu, True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert around and all(m.calls for m in around if isinstance(m, Around))


def test_levels_are_called() -> None:
    """Hooks of every kind on a level run, in the order of levels."""
    layer = PLE(D, 1, 1, T, levels=3, **SIZES)
    ran: list[Any] = []
    for number, level in enumerate(layer.levels):
        level.register_forward_pre_hook(lambda m, i, k=number: ran.append(("before", k)))
        level.register_forward_hook(lambda m, i, o, k=number: ran.append(("after", k)))
        level.register_full_backward_pre_hook(lambda m, o, k=number: ran.append(("backward", k)))
    sum(y.sum() for y in layer(torch.randn(B, D, requires_grad=True))).backward()
    forward = [(when, k) for k in range(3) for when in ("before", "after")]
    assert ran == [*forward, *(("backward", k) for k in (2, 1, 0))]
    doubled = PLE(D, 1, 1, T, levels=1, **SIZES)
    x = torch.randn(B, D)
    before = doubled(x)
    doubled.levels[0].register_forward_hook(lambda m, i, o: tuple(2 * y for y in o))
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled(x), before, strict=True))
