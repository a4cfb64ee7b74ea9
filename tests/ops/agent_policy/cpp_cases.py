"""``agent_policy`` under the sanitizers, everything that it is given between fences."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

import fastroute.ops.agent_policy.schema  # noqa: F401
from fastroute.ops.agent_policy import plain
from fastroute.ops.agent_policy import reference as reference
from fastroute.ops.policy.contract import KINDS
from tests.helpers.layouts import Fenced
from tests.helpers.opcheck import assert_same

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OPS = torch.ops.fastroute

#: Rows, agents, features in, choices: below, at and beyond the widths of vectors and tiles.
SIZES = ((0, 2, 3, 3), (1, 1, 1, 1), (40, 3, 17, 4), (300, 5, 9, 20), (9, 2, 4, 5000))
#: Whether there are weights, critic's weights, and outputs of the critic (0: none, None: as many as choices).
NETS: tuple[tuple[bool, bool, int | None], ...] = (
    (True, True, None), (True, False, 1), (False, False, None), (True, True, 0), (False, True, 1),
)  # fmt: skip


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if expected.dtype == F64:
        assert_same(found, expected, what)
    else:
        assert found.shape == expected.shape and found.dtype == expected.dtype, what
        assert found.dtype == torch.int64 or found.isfinite().all(), f"{what}: something was not written"


def agent_policies() -> None:
    for (N, A, F, K), dtype, (linear, critic_linear, outputs) in product(SIZES, (F32, F64, BF16), NETS):
        C, sums = K if outputs is None else outputs, F64 if dtype == F64 else F32
        what = f"{(N, A, F, K, C)} {dtype} {linear} {critic_linear}"
        shapes = [(K, F)] * A * linear, [(K,) if linear else (1, K)] * A
        critics = [(C, F)] * A * (critic_linear and C > 0), [(C,) if critic_linear else (1, C)] * A * (C > 0)
        fences = [[Fenced(torch.randn(s).to(dtype)) for s in of] for of in (*shapes, *critics)]
        nets = [[f.tensor for f in of] for of in fences]
        more = [
            Fenced(t)
            for t in (
                torch.randn(N, F).to(dtype), torch.rand(N, K, dtype=sums), torch.rand(N, dtype=sums),
                torch.randint(-1, K, (N,)), torch.randn(N, dtype=sums), torch.randn(N, K).to(dtype),
                torch.randn(N, max(C, 1)).to(dtype),
            )
        ]  # fmt: skip
        x, uniform, coin, forced, grad, grad_scores, grad_critic = (f.tensor for f in more)
        order, offsets, _ = OPS._dispatch_plan_native(torch.randint(-1, A, (N,)), A)
        plans: list[tuple[Any, Any]] = [(order, offsets)] + [(None, None)] * (A == 1)
        for (at, of), kind in product(plans, range(3)):
            expected = C == K and kind != 1
            for choices in ((None, None, None), (uniform, coin, None), (None, None, forced)):
                given = x, at, of, *nets, *choices
                made = OPS._agent_policy_native(*given, kind, 0.7, 0.4, expected)
                wanted = plain.forward(*given, KINDS[kind], 0.7, 0.4, expected)
                assert len(made) == len(wanted)
                if dtype == F64:
                    assert torch.equal(made[0], wanted[0]) and torch.equal(made[2], wanted[2])
                for i in (1, *range(3, len(made))):
                    same(made[i], wanted[i], f"{what} output {i}")
            actions, scores = made[0], made[3]
            for grads in ((grad, None, None, grad), (None, grad_scores, grad_critic, None), (grad, grad_scores) * 2):
                if len(set(map(id, grads))) == 2 and grads[2] is grad:  # of all outputs at once
                    grads = grad, grad_scores, grad_critic, grad
                grads = grads[:2] + ((None, None) if C == 0 else grads[2:])
                rest = scores, actions, x, at, of, nets[0], nets[2], A, C
                wants = linear, True, critic_linear and C > 0, C > 0
                found = OPS._agent_policy_native_backward(*grads, *rest, kind, 0.7, True, *wants, False, False, True)
                exact = plain.backward(*grads, *rest, KINDS[kind], 0.7, True, wants[:2], wants[2:], False, False)
                if exact[0].numel():
                    same(found[0], exact[0], f"{what} dx")
                for ours, theirs in zip(found[1:], exact[1:], strict=True):
                    assert len(ours) == len(theirs), what
                    for a, b in zip(ours, theirs, strict=True):
                        same(a, b.reshape(a.shape), what)
                OPS._agent_policy_native_backward(*grads, *rest, kind, 0.7, False, *wants, False, False, False)
        assert all(f.intact() for of in (*fences, more) for f in of)
