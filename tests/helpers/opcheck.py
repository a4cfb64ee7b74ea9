"""What PyTorch expects of an op: gradients, schema, fake, autograd registration, one graph, no recompiling, export."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute.ops.backends import requested

from .cases import Case, Function, Results


def gradcheck(fn: Function, case: Case) -> None:
    """Gradients against finite differences in float64, of every output with respect to every input in ``wrt``."""
    case = case.to(torch.float64)
    names = [k for k in case.wrt if case.inputs[k] is not None]
    leaves = [case.inputs[k].clone().requires_grad_() for k in names]  # type: ignore[union-attr]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = fn(**{**case.inputs, **dict(zip(names, tensors, strict=True))})
        return tuple(t for t in outputs.values() if t is not None)

    assert torch.autograd.gradcheck(call, leaves)


def _prepared(args: Sequence[Any], layout: Callable[[Tensor], Tensor], grad: bool) -> tuple[Any, ...]:
    def one(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        a = layout(a.detach())
        return a.requires_grad_(grad) if a.is_floating_point() else a

    return tuple(map(one, args))


def opcheck(
    op: Any, args: Sequence[Any], *, layout: Callable[[Tensor], Tensor] = Tensor.contiguous, grad: bool = True
) -> None:
    """``torch.library.opcheck`` with every tensor in a layout, with or without gradients wanted."""
    torch.library.opcheck(op, _prepared(args, layout, grad))


def _outcome(fn: Callable[..., Any], inputs: Sequence[Any], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and all gradients of a call."""
    leaves = [t for t in (*inputs, *parameters) if isinstance(t, Tensor) and t.requires_grad]
    outputs = [t for t in torch.utils._pytree.tree_leaves(fn(*inputs)) if isinstance(t, Tensor)]
    ends = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad([t.square().sum() for t in ends], leaves, allow_unused=True)
    return [*(t.detach() for t in outputs), *(g for g in grads if g is not None)]


def check_compiled(
    fn: Callable[..., Any],
    calls: Sequence[Sequence[Any]],
    *,
    parameters: Sequence[Tensor] = (),
    backend: str = "aot_eager",
    restarts: int = 0,
) -> None:
    """One graph (``fullgraph``), made once for all ``calls`` (which differ in a size) under ``dynamic=True``.

    A graph that depends on a module's number (a norm's eps) may be begun anew in the first call, as often as
    ``restarts`` says: the number is an input at first, and then found to be a constant.

    With ``aot_eager`` the graph runs the very same kernels, so results are the eager ones bit for bit; another compiler
    may fuse what is around the op, and is compared at float32's spacing on float64 calls.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
    made = 0
    for k, inputs in enumerate(calls):
        for got, expected in zip(_outcome(compiled, inputs, parameters), _outcome(fn, inputs, parameters), strict=True):
            assert got.dtype == expected.dtype and got.stride() == expected.stride()
            if backend == "aot_eager":
                assert torch.equal(got, expected)
            else:
                assert_same(got, expected)
        made = counter.frame_count if k == 0 else made
        assert counter.frame_count == made <= 1 + restarts, f"compiled again for call {k}"


def assert_same(a: Tensor, b: Tensor, what: str = "") -> None:
    """Two float64 computations of the same numbers, from inputs of order one.

    They may differ by rounding, a few thousand times 1e-16; two formulas differ by more than float32's spacing, 1e-7.
    Where everything cancels, what is left is itself rounding: nothing is measured below that spacing of one.
    """
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape, what
    if a.numel():
        spacing = torch.finfo(torch.float32).eps
        error, scale = float((a - b).abs().max()), float(b.abs().max())
        assert error <= spacing * max(scale, spacing), f"{what}: differ by {error:.3g}, values to {scale:.3g}"


def assert_all_same(found: Results, exact: Results) -> None:
    """:func:`assert_same` of each result."""
    assert found.keys() == exact.keys()
    for name, t in exact.items():
        got = found[name]
        assert got is not None and t is not None, name
        assert_same(got, t, name)


def kept_by_autograd(op: Callable[..., Any], case: Case) -> list[int]:
    """How many numbers each tensor has that a call of ``op`` saves, inputs aside."""
    given = {t.untyped_storage().data_ptr() for t in case.inputs.values() if t is not None}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    leaves = {k: t.requires_grad_() for k in case.wrt if (t := case.inputs[k]) is not None}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(**{**case.inputs, **leaves})
    return list(kept.values())


def check_exported(module: nn.Module, example: Tensor, others: Sequence[Tensor], dynamic: dict[int, Any]) -> None:
    """``torch.export``, saved and loaded: the program gives the module's numbers, at other sizes too.

    To the bit where it has the ops in it; on the backend "reference" it has the definitions in place of their tiles.
    """
    plain = requested() == "reference"
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,))
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        loaded = torch.export.load(stored).module()
        for x in (example, *others):
            for got, expected in zip(
                torch.utils._pytree.tree_leaves(loaded(x)), torch.utils._pytree.tree_leaves(module(x)), strict=True
            ):
                if plain and got is not None:
                    torch.testing.assert_close(got, expected)
                else:
                    assert (got is None and expected is None) or torch.equal(got, expected)
