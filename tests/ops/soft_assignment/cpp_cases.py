"""``soft_assignment`` under the sanitizers: every form, tiles of rows and what is around them, between fences."""

from __future__ import annotations

import math
from itertools import product

import torch

import fastroute.ops.soft_assignment.native as native
from fastroute.ops.soft_assignment import plain
from fastroute.ops.soft_assignment import reference as reference
from fastroute.ops.soft_assignment.contract import Grads, Pairs
from tests.helpers.assignment_cases import FORMS, SHARED, case_of
from tests.helpers.layouts import Fenced, sliced_rows
from tests.helpers.opcheck import assert_same

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
#: The third is cut in pieces, and those in tiles.
SIZES = ((1, 1, 2, 1), (3, 37, 7, 13), (2, 520, 3, 130), (9, 70, 33, 5))


def soft_assignments() -> None:
    for form, shared, size, dtype in product(FORMS, SHARED.values(), SIZES, (F32, F64, BF16)):
        case = case_of(form, size, shared, dtype, scores_dtype=None if dtype != BF16 else F32)
        fences = {k: Fenced(t) for k, t in case.inputs.items() if t is not None}
        given = {k: fences[k].tensor if k in fences else None for k in case.inputs}
        for k in ("use", "ign"):
            if (t := given[k]) is not None:
                given[k] = (t if t.dim() == 3 else t[None]).to(torch.promote_types(dtype, F32))
        votes = given.pop("votes")
        assert votes is not None
        pairs = Pairs(**given, eps=FORMS[form].get("eps", 0.0))
        M, p = native.forward(votes, pairs)
        wanted = {"votes": votes, **{k: given[k] for k in ("scores", "gate", "use", "ign")}}
        filled = {k: Fenced(torch.full_like(t, math.nan)) for k, t in wanted.items() if t is not None}
        grads = Grads(**{k: filled[k].tensor if k in filled else None for k in Grads._fields})
        dM, dp = case.cotangents["y"], torch.ones_like(p)
        native.backward(votes, pairs, dM, dp, grads)
        assert all(f.intact() for f in (*fences.values(), *filled.values()))
        assert all(t.isfinite().all() for t in (M, p, *(f.tensor for f in filled.values()))), "not written"
        if dtype == F64:
            for found, expected in zip((M, p), plain.forward(votes, pairs), strict=True):
                assert_same(found, expected)
            others = Grads(*(None if t is None else torch.empty_like(t) for t in grads))
            plain.backward(votes, pairs, dM, dp, others)
            for got, expected_grad in zip(grads, others, strict=True):
                if got is not None and expected_grad is not None:
                    assert_same(got, expected_grad)
        apart, _ = native.forward(sliced_rows(votes), pairs)
        assert torch.equal(apart, M)
        if "mean" in form:
            y, total = native.forward(votes, pairs, mean=True)
            assert torch.equal(total, p.masked_fill(p <= 0, 1.0)) and torch.equal(y, M / total[..., None])
