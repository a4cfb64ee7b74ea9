"""All iterations in one call of C++ a pass, between fences, on sizes that no tile and no vector divides."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from tests.helpers.cases import evaluate
from tests.helpers.layouts import Fenced
from tests.helpers.opcheck import assert_same
from tests.helpers.routing_cases import Size, efficient_case, efficient_op, efficient_truth

#: n is cut in tiles and pieces, m and d in vectors, sums over d and h in runs of 256; 20 samples, in pieces.
SIZES = (
    Size(1, 1, 2, 1, 1), Size(3, 37, 7, 13, 5), Size(20, 70, 33, 5, 17), Size(2, 600, 17, 40, 9),
    Size(1, 30, 3, 300, 270), Size(24, 130, 20, 70, 2),
)  # fmt: skip


def _fenced(size: Size, n_iters: int, dtype: torch.dtype) -> list[Tensor]:
    """Both passes; what is read has a redzone either side, and every number of what is made is written."""
    case = efficient_case(size, dtype=dtype)
    names = [k for k in case.inputs if k not in ("bias_use", "bias_ign", "mask", "lengths")]
    fences = [Fenced(t) for k in names if (t := case.inputs[k]) is not None]
    given = [f.tensor for f in fences]
    ops = torch.ops.fastroute
    out, kept = ops._efficient_routing_native(*given, n_iters, False)
    held, dout = Fenced(kept), Fenced(case.cotangents["x_out"])
    made = [out, kept]
    for want_x, want_rows in product((True, False), repeat=2):
        made += ops._efficient_routing_native_backward(
            *given, n_iters, False, dout.tensor, held.tensor, want_x, want_rows
        )
    assert all(f.intact() for f in (*fences, held, dout))
    unwritten = [k for k, t in enumerate(made) if not t.isfinite().all()]
    assert not unwritten, (unwritten, str(size), n_iters, dtype)
    return made


def one_call() -> None:
    for size, n_iters in product(SIZES, (1, 2, 3)):
        for dtype in (torch.float32, torch.float64):
            _fenced(size, n_iters, dtype)
        for normalize in (False, True):
            case = efficient_case(size, dtype=torch.float64)
            found = evaluate(efficient_op(n_iters, normalize), case)
            for name, expected in evaluate(efficient_truth(n_iters, normalize), case).items():
                got = found[name]
                assert (got is None) == (expected is None), name
                if got is not None and expected is not None and not math.isclose(expected.norm().item(), 0):
                    assert_same(got, expected, f"{name} of {size}, {n_iters} iterations")
