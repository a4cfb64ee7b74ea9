"""All iterations in one call of C++ a pass, between fences, on sizes that no tile and no vector divides."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastroute.ops.efficient_routing import native
from tests.helpers.cases import Case, evaluate
from tests.helpers.layouts import Fenced
from tests.helpers.opcheck import assert_same
from tests.helpers.routing_cases import Size, efficient_case, efficient_op, efficient_truth, some_mask

#: n is cut in tiles and pieces, m and d in vectors, sums over d and h in runs of 256; 20 samples, in pieces.
SIZES = (
    Size(1, 1, 2, 1, 1), Size(3, 37, 7, 13, 5), Size(20, 70, 33, 5, 17), Size(2, 600, 17, 40, 9),
    Size(1, 30, 3, 300, 270), Size(24, 130, 20, 70, 2), Size(2, 300, 35, 131, 6),
)  # fmt: skip


def _forms(size: Size) -> dict[str, dict[str, Any]]:
    """Options of cases: betas that make a Gram matrix or, where d > 4 m, one beta; masks of any strides; lengths."""
    b, n, m = size[:3]
    lengths = [n, 0, n // 2, *[n - 1] * b][:b]
    pairs, of_inputs = some_mask(b, n, m), some_mask(b, n, 1).expand(b, n, m)
    return {
        "fixed": {},
        "fixed, masked": {"mask": pairs, "lengths": lengths},
        "fixed, inputs masked": {"mask": of_inputs},
        "linear": {"linear": True},
        "linear, of lengths": {"linear": True, "lengths": lengths},
        "linear, masked": {"linear": True, "mask": pairs.mT.contiguous().mT, "lengths": lengths},
    }


def _fenced(case: Case, n_iters: int, what: str) -> list[Tensor]:
    """Both passes; what is read has a redzone either side, and every number of what is made is written."""
    fences = {k: Fenced(t) for k in native.NAMES[:-2] if (t := case.inputs[k]) is not None}
    given = [fences[k].tensor if k in fences else case.inputs[k] for k in native.NAMES]
    ops = torch.ops.fastroute
    out, kept = ops._efficient_routing_native(*given, n_iters, False)
    held, dout = Fenced(kept), Fenced(case.cotangents["x_out"].to(out.dtype))
    made = [out, kept]
    for want_x, want_rows in product((True, False), repeat=2):
        made += ops._efficient_routing_native_backward(
            *given, n_iters, False, dout.tensor, held.tensor, want_x, want_rows
        )
    assert all(f.intact() for f in (*fences.values(), held, dout)), what
    unwritten = [k for k, t in enumerate(made) if not t.isfinite().all()]
    assert not unwritten, (unwritten, what)
    return made


def one_call() -> None:
    for size, n_iters in product(SIZES, (1, 2, 3)):
        for name, options in _forms(size).items():
            if n_iters == 3 and options:
                continue
            what = f"{name}, {size}, {n_iters} iterations"
            for x, other in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
                _fenced(efficient_case(size, dtype=x, parameter_dtype=other, **options), n_iters, f"{what}, {x}")
            case, normalize = efficient_case(size, dtype=torch.float64, **options), n_iters == 2
            found = evaluate(efficient_op(n_iters, normalize), case)
            for result, expected in evaluate(efficient_truth(n_iters, normalize), case).items():
                got = found[result]
                assert (got is None) == (expected is None), result
                if got is not None and expected is not None and expected.norm().item() > 0:
                    assert_same(got, expected, f"{result} of {what}")
