"""How far from the exact answer a result may be: as far as plain PyTorch is, twice, and one rounding.

No tolerance is chosen by hand. The exact answer is the literal reference in float64, on the very values that the op was
given. The yardstick is the same reference in the op's own dtype.

One computation's rounding error is one draw from a distribution; dividing two such draws says little, most of all for
results of a few numbers, or where a later iteration amplifies the first one's error along a few directions. So both
sides are computed for several draws. A draw is another order of summation (axes permuted alike in every input), of
which the root mean square counts, or another case of the same kind (a seed): rounding that does not depend on the
order, as most of bfloat16's, varies with the values alone. Over cases it is the geometric mean that counts, since the
worst conditioned one of a few would outweigh all others in any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Function, Results, evaluate, orders

_NORMS = (("largest entry", torch.inf), ("Frobenius norm", 2.0))


class _Draw(NamedTuple):
    """Results of one problem in several orders."""

    actual: Sequence[Tensor]
    exact64: Tensor
    plain: Sequence[Tensor]


def _size(t: Tensor, p: float) -> float:
    return float(torch.linalg.vector_norm(t.double().flatten(), p)) if t.numel() else 0.0


def _rms(values: Sequence[float]) -> float:
    return (sum(v * v for v in values) / len(values)) ** 0.5


def _typical(values: Sequence[float]) -> float:
    """Geometric mean, 0 if one is."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(values) else 0.0


def _assert_within_budget(draws: Sequence[_Draw], what: str) -> None:
    for draw in draws:
        for t in draw.actual:
            assert t.shape == draw.exact64.shape, f"{what}: shape {list(t.shape)}, expected {list(draw.exact64.shape)}"
            wild = int((~t.isfinite()).sum())
        assert not wild, f"{what}: {wild} of {t.numel()} entries are not finite"
    dtype = draws[0].actual[0].dtype
    eps = torch.finfo(dtype).eps
    for norm, p in _NORMS:
        errors = [_rms([_size(t.double() - draw.exact64, p) for t in draw.actual]) for draw in draws]
        yardsticks = [_rms([_size(t.double() - draw.exact64, p) for t in draw.plain]) for draw in draws]
        scales = [_size(draw.exact64, p) for draw in draws]
        error = _typical(errors)
        allowed = _typical([2 * plain + eps * scale for plain, scale in zip(yardsticks, scales, strict=True)])
        assert error <= allowed, (
            f"{what}: error {error:.3g} in the {norm}, allowed {allowed:.3g} "
            f"(plain PyTorch {_typical(yardsticks):.3g}, scale {_typical(scales):.3g}, "
            f"{str(dtype).removeprefix('torch.')}, {len(draws)} cases)"
        )


def assert_within_budget(
    actual: Tensor | Sequence[Tensor], exact64: Tensor, plain: Tensor | Sequence[Tensor], what: str = "result"
) -> None:
    """|actual - exact| <= 2 |plain - exact| + eps |exact|, in the largest entry and in the Frobenius norm.

    * ``2 |plain - exact|``: a fused kernel adds in another order than plain PyTorch, so its error is another draw of
      the same size; a factor of two is the rule that FlashAttention's tests made common.
    * ``eps |exact|`` with eps that of ``actual.dtype``: the spacing of numbers at the size of the result, so that a
      result is never failed for its own final rounding, even where plain PyTorch happens to be exact.
    * Two norms: the largest entry bounds every element, and Frobenius fails a result all of whose elements are as bad
      as plain PyTorch's single worst one.

    Several results of either kind count by their root mean square. Not-a-number is an error however large the budget.
    """
    actuals = [actual] if isinstance(actual, Tensor) else actual
    plains = [plain] if isinstance(plain, Tensor) else plain
    _assert_within_budget([_Draw(actuals, exact64, plains)], what)


def check(
    fn: Function,
    truth: Function,
    cases: Case | Sequence[Case],
    *,
    dtype: torch.dtype,
    permute: str,
    count: int = 4,
    also: Sequence[Results] = (),
) -> Results:
    """Every output and gradient of ``fn`` is within budget of ``truth``; returns what ``fn`` gave for the first case.

    Args:
        cases: one, or several of the same kind that differ in their values.
        dtype: plain PyTorch's: that of the inputs, or what they promote to where they differ.
        permute: letters of axes that may be permuted.
        count: orders of summation of each case.
        also: other results of plain PyTorch for the first case, such as an upstream's.
    """
    draws: dict[str, list[_Draw]] = {}
    first: Results = {}
    for k, case in enumerate([cases] if isinstance(cases, Case) else cases):
        exact = evaluate(truth, case.to(torch.float64))
        actuals, plains = [], []
        for turned, back in orders(case, permute, count):
            actuals.append(back(evaluate(fn, turned)))
            if dtype != torch.float64 or turned is not case:  # float64's exact answer is one of its own orders
                plains.append(back(evaluate(truth, turned.to(dtype))))
        if k == 0:
            first = actuals[0]
            plains += also
        for name, expected in exact.items():
            made = [results[name] for results in actuals]
            if expected is None:
                assert all(t is None for t in made), f"{name}: something, where the reference has nothing"
                continue
            found = [t for t in made if t is not None]
            assert len(found) == len(made), f"{name}: nothing, where the reference has something"
            plain = [t.to(found[0].dtype) for results in plains if (t := results[name]) is not None]
            draws.setdefault(name, []).append(_Draw(found, expected, plain))
        assert actuals[0].keys() == exact.keys()
    for name, drawn in draws.items():
        _assert_within_budget(drawn, name)
    return first
