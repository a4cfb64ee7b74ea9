"""``dispatch``, ``grouped_linear`` and ``policy`` under the sanitizers, everything they are given between fences."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fastroute.ops import activations
from fastroute.ops.dispatch import reference as reference_dispatch
from fastroute.ops.grouped_linear import plain as grouped_linear_plain
from fastroute.ops.policy import contract
from fastroute.ops.policy import plain as policy_plain
from tests.helpers.layouts import LAYOUTS, Fenced
from tests.helpers.opcheck import assert_same

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OPS = torch.ops.fastroute

#: Rows, modules, features in and out: below, at and beyond the widths of vectors, tiles and runs.
SIZES = (
    (0, 2, 3, 3),
    (1, 1, 1, 1),
    (9, 20, 3, 5),
    (40, 3, 17, 4),
    (300, 3, 33, 50),
    (150, 1, 8, 7),
    (5, 1, 1100, 2),
    (600, 2, 19, 9),
    (70, 2, 192, 192),
)
CHOICES = ((0, 3), (1, 1), (70, 5), (900, 7), (3, 5000))


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if expected.dtype == F64:
        assert_same(found, expected, what)
    else:
        assert found.shape == expected.shape and found.dtype == expected.dtype, what
        assert found.isfinite().all(), f"{what}: something was not written"


def plans() -> None:
    for rows, modules, stride in product((0, 1, 50, 1000), (1, 7, 100), (1, 3)):
        fence = Fenced(torch.randint(-2, modules + 2, (rows * stride,)))
        actions = fence.tensor[::stride]
        expected = reference_dispatch.plan(actions, modules)
        for found, wanted in zip(OPS._dispatch_plan_native(actions, modules), expected, strict=False):
            assert torch.equal(found, wanted)
        assert fence.intact()


def grouped_linears() -> None:
    for size, dtype, layout in product(SIZES, (F32, F64, BF16), ("contiguous", "columns_first", "strided")):
        N, K, F, O = size
        arrange = LAYOUTS[layout]
        fences = [Fenced(torch.randn(shape).to(dtype)) for shape in ((N, F), *[(O, F)] * K, *[(O,)] * K, (N, O))]
        x, *parameters, grad = (f.tensor for f in fences)
        if layout != "contiguous":
            parameters = [arrange(p) for p in parameters]
        weights, biases = parameters[:K], parameters[K:]
        actions = torch.randint(-1, K, (N,))
        order, offsets, _ = OPS._dispatch_plan_native(actions, K)
        for take, put, has_weights, has_biases in product((None, order), (None, order), (True, False), (True, False)):
            if not has_weights and not has_biases:
                continue
            W, b = weights * has_weights, biases * has_biases
            what = f"{size} {dtype} {layout} {has_weights} {has_biases}"
            for name, keep in (
                (("none", False), ("sigmoid", False), ("silu", True)) if has_weights else (("none", False),)
            ):
                kind = list(activations.ACTIVATIONS).index(name)
                y, before = OPS._grouped_linear_native(x, take, put, offsets, W, b, kind, keep)
                expected_y, expected_before = grouped_linear_plain.forward(x, take, put, offsets, W, b, name, keep)
                same(y, expected_y, what)
                same(before, expected_before, what)
                if take is put is order and has_weights:
                    made = OPS._grouped_linear_native_planned(x, actions, W, b, kind, keep)
                    assert all(map(torch.equal, made[:4], (y, before, order, offsets))), what
                kept = None if name == "none" else before if keep else y
                wants = has_weights, has_weights, has_biases
                given = grad, x, take, take, put, offsets, W, K, *wants
                dx, dw, db = OPS._grouped_linear_native_backward(*given, kind, kept, False, True)
                expected_dx, *expected = grouped_linear_plain.backward(*given[:-3], wants, name, kept)
                if has_weights:
                    same(dx, expected_dx, what)
                for found, wanted in zip((*dw, *db), (*expected[0], *expected[1]), strict=True):
                    same(found.reshape(wanted.shape), wanted, what)
                OPS._grouped_linear_native_backward(*given, kind, kept, False, False)
        assert all(f.intact() for f in fences)


def policies() -> None:
    for (N, K), dtype, kind in product(CHOICES, (F32, F64, BF16), range(3)):
        sums = F64 if dtype == F64 else F32
        scores = Fenced(torch.randn(N, K).to(dtype))
        uniform, coin = Fenced(torch.rand(N, K, dtype=sums)), Fenced(torch.rand(N, dtype=sums))
        forced, grad = Fenced(torch.randint(-1, K, (N,))), Fenced(torch.randn(N, dtype=sums))
        name = contract.KINDS[kind]
        for choices in (
            (None, None, None),
            (uniform.tensor, None, None),
            (uniform.tensor, coin.tensor, None),
            (uniform.tensor, coin.tensor, forced.tensor),
        ):
            actions, value, greedy = OPS._policy_native(scores.tensor, *choices, kind, 0.7, 0.4)
            expected = policy_plain.forward(scores.tensor, *choices, name, 0.7, 0.4)
            assert torch.equal(greedy, expected.greedy)
            assert dtype != F64 or torch.equal(actions, expected.actions)
            same(value, expected.value, f"{name} {N} {K}")
            gradient = OPS._policy_native_backward(grad.tensor, scores.tensor, actions, kind, 0.7)
            same(gradient, policy_plain.backward(grad.tensor, scores.tensor, actions, name, 0.7), f"{name} {N} {K}")
        assert all(f.intact() for f in (scores, uniform, coin, forced, grad))
    extreme = torch.tensor([[torch.nan, 0.0], [torch.inf, 1.0], [-torch.inf, -torch.inf], [3e38, -3e38]])
    for kind in range(3):
        actions, _, _ = OPS._policy_native(extreme, torch.full((4, 2), 0.5), None, None, kind, 1.0, 0.0)
        assert ((actions >= 0) & (actions < 2)).all()
        OPS._policy_native_backward(torch.ones(4), extreme, actions, kind, 1.0)
