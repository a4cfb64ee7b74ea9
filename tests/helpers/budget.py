"""How far from the exact answer a result may be: as far as the problem itself moves when everything in it is rounded.

The exact answer is a function of plain PyTorch in float64, on the very values that the op was given. The yardstick is
the same function under :class:`tests.helpers.rounding.Rounded`, which rounds every result in it at random. Nothing in
it is measured on a float32 computation of this machine, so it is the same on every processor.
Trainings too long for that: :class:`MovedStarts`.

For a result and a norm, let mean and sd be those of |drawn - exact| over the draws. The error may be

    FACTOR (mean + SPREAD sd), and always one unit in the last place of the result, eps |exact|,

in the largest entry and in the Frobenius norm. ``docs/numerics.md`` has the experiments behind the two numbers: how
often plain PyTorch is beyond the bound, and which planted faults are.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastroute import use_backend

from .cases import Case, Function, Results, evaluate
from .rounding import Rounded

#: An implementation may have two roundings where the reference has one, which is 1.41 times the error.
FACTOR = 1.5
SPREAD = 10.0
#: Draws after which to look, and how many sd to allow then. What an earlier look allows, the last one does, too. Many
#: results are within a unit in the last place, which needs no draw; most are within 1.5 times the first draw's error.
LOOKS = ((0, 0.0), (1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0), (8, 4.0), (32, SPREAD))
NORMS = (("largest entry", math.inf), ("Frobenius norm", 2.0))


def _at(p: float) -> int:
    """Which of ``NORMS``."""
    return [q for _, q in NORMS].index(p)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of tensors of one shape, in the order of the first one's memory; no large one is doubled."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    return zip(*(t.detach().permute(order).reshape(-1).split(1 << 20) for t in tensors), strict=True)


def _norms(numbers: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """In each of ``NORMS``."""
    if not numbers.size:
        return 0.0, 0.0
    largest = float(np.abs(numbers).max())
    scale = largest if 0 < largest < math.inf else 1.0  # whose squares neither overflow nor vanish
    return largest, scale * math.sqrt(float(np.square(numbers / scale).sum()))


def sizes(t: Tensor) -> tuple[float, ...]:
    """The norms, piece by piece."""
    largest, squared = zip(*(_norms(part.double().numpy(force=True)) for (part,) in pieces(t)), strict=True)
    return max(largest), math.hypot(*squared)


def size(t: Tensor, p: float) -> float:
    return sizes(t)[_at(p)]


def distances(t: Tensor, exact: Tensor) -> tuple[float, ...]:
    """|t - exact| in each of ``NORMS``; infinite where t is not finite and exact is."""
    found = []
    for parts in pieces(t, exact):
        a, b = (part.double().numpy(force=True) for part in parts)
        with np.errstate(invalid="ignore"):
            apart = np.where(a == b, 0.0, a - b)
        if np.isnan(apart).any():
            apart[np.isnan(a) > np.isnan(b)] = math.inf
        found.append(_norms(apart))
    largest, squared = zip(*found, strict=True)
    return max(largest), math.hypot(*squared)


def distance(t: Tensor, exact: Tensor, p: float) -> float:
    return distances(t, exact)[_at(p)]


def beyond(t: Tensor, exact: Tensor, bound: float) -> str:
    """The shape, and which entries are off by more than ``bound`` or are not finite where ``exact`` is."""
    count, first, start = 0, None, 0
    flat, true = t.detach().reshape(-1), exact.reshape(-1)
    for a, b in zip(flat.split(1 << 24), true.split(1 << 24), strict=True):
        bad = ((a.double() - b).abs() > bound) | (a.isfinite() < b.isfinite())
        here = int(bad.sum())
        if here and first is None:
            first = start + int(bad.byte().argmax())
        count, start = count + here, start + len(a)
    if first is None:
        return f"shape {list(t.shape)}"
    index = [int(i) for i in np.unravel_index(first, t.shape)]
    values = f"{float(flat[first]):.6g} for {float(true[first]):.6g}"
    return f"shape {list(t.shape)}, {count} of {t.numel()} entries are off, the first at {index}: {values}"


class Excess(NamedTuple):
    """One result in one norm: its error, and what it may be."""

    name: str
    norm: str
    error: float
    allowed: float
    scale: float
    dtype: torch.dtype

    @property
    def times(self) -> float:
        """The share of the budget that the error takes; over 1 is a fault."""
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3g} in the {self.norm}, allowed {self.allowed:.3g} "
            f"({self.times:.2f} times; scale {self.scale:.3g}, {str(self.dtype).removeprefix('torch.')})"
        )


class Yardstick:
    """The exact results of a computation and their spread under rounding, drawn as needed.

    Args:
        run: the computation in float64: plain PyTorch, the same every time it is called. A registered op of fastroute
            in it runs on the reference backend.
        dtype: in which it is to be rounded. Half precision is kept in at least float32 between operators, as the ops
            promise.
        stored: the dtype of what is kept between operators, where that is less.
        operands: the dtype, or "tf32", of what matrix products take, where that is less.
    """

    def __init__(
        self,
        run: Callable[[], Mapping[str, Tensor | None]],
        dtype: torch.dtype,
        *,
        stored: torch.dtype | None = None,
        operands: torch.dtype | str | None = None,
    ) -> None:
        self._run = use_backend("reference")(run)
        self._operands = operands
        self._dtype = stored or torch.promote_types(dtype, torch.float32)
        self.exact: Results = {k: None if t is None else t.detach() for k, t in self._run().items()}
        self._dtypes: set[torch.dtype] = set()
        self._errors: dict[tuple[str, torch.dtype], list[tuple[float, ...]]] = {}
        self._sizes: dict[str, tuple[float, ...]] = {}

    def _made(self, seed: int) -> Mapping[str, Tensor | None]:
        with Rounded(self._dtype, seed, self._operands):
            return self._run()

    def _draw(self, seed: int) -> None:
        """One more draw: its errors are kept, in both norms and in every dtype that results have come in."""
        made = self._made(seed)
        for name, exact in self.exact.items():
            t = made[name]
            if exact is None or t is None or not exact.is_floating_point():
                continue
            for dtype in self._dtypes:
                known = self._errors.setdefault((name, dtype), [])
                if len(known) == seed:
                    narrower = torch.finfo(dtype).eps > torch.finfo(self._dtype).eps
                    last = Rounded(dtype, seed).rounded(t.detach()) if narrower else t
                    own = math.sqrt(2) if self._dtype == torch.float64 else 1.0  # the exact answer is a draw, too
                    known.append(tuple(own * error for error in distances(last, exact)))

    def errors(self, name: str, dtype: torch.dtype, p: float, count: int) -> list[float]:
        """Of that many draws of a result that is given in ``dtype``."""
        self._dtypes.add(dtype)
        known = self._errors.setdefault((name, dtype), [])
        while len(known) < count:
            self._draw(len(known))
        return [errors[_at(p)] for errors in known[:count]]

    def allowed(self, name: str, dtype: torch.dtype, p: float, count: int, spread: float) -> float:
        errors = self.errors(name, dtype, p, count)
        mean = sum(errors) / max(count, 1)
        sd = math.sqrt(sum((e - mean) ** 2 for e in errors) / max(count - 1, 1))
        if name not in self._sizes:
            exact = self.exact[name]
            assert exact is not None
            self._sizes[name] = sizes(exact.masked_fill(exact.isinf(), 0.0))
        return max(FACTOR * (mean + spread * sd), torch.finfo(dtype).eps * self._sizes[name][_at(p)])

    def excess(self, name: str, actual: Tensor, looks: Sequence[tuple[int, float]] = LOOKS) -> Iterator[Excess]:
        """Both norms of a result."""
        exact = self.exact[name]
        assert exact is not None, f"{name}: something, where the reference has nothing"
        assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
        for (norm, p), scale, error in zip(NORMS, sizes(exact), distances(actual, exact), strict=True):
            allowed = 0.0
            for count, spread in looks:
                allowed = self.allowed(name, actual.dtype, p, count, spread)
                if error <= allowed:
                    break
            yield Excess(name, norm, error, allowed, scale, actual.dtype)

    def expects(self, found: Mapping[str, Tensor | None]) -> None:
        """In which dtypes results will come: then each draw is made once."""
        self._dtypes |= {t.dtype for t in found.values() if t is not None and t.is_floating_point()}

    def check(self, found: Mapping[str, Tensor | None], what: str = "") -> None:
        """Every result is there, or not, as in the reference, finite and within its budget; integers are the same."""
        self.expects(found)
        for name, actual in found.items():
            label = f"{what} {name}".strip()
            if actual is None or self.exact[name] is None:
                assert actual is None, f"{label}: something, where the reference has nothing"
                assert self.exact[name] is None, f"{label}: nothing, where the reference has something"
                continue
            if not actual.is_floating_point():
                assert torch.equal(actual, self.exact[name]), f"{label}: {actual}, expected {self.exact[name]}"
                continue
            for excess in self.excess(name, actual):
                wild = int((actual.isfinite() < self.exact[name].isfinite()).sum())  # type: ignore[union-attr]
                where = partial(beyond, actual, self.exact[name])
                assert not wild, (
                    f"{label}: {wild} of {actual.numel()} not finite; {where(math.inf)}"
                )  # whatever the budget
                each = excess.allowed / (1 if excess.norm == NORMS[0][0] else math.sqrt(max(actual.numel(), 1)))
                assert excess.error <= excess.allowed, f"{what} {excess}; {where(each)}".strip()


class MovedStarts(Yardstick):
    """The yardstick of a training that is too long for every result in it to be rounded.

    A draw is a training in float32 whose first weights are moved by a unit in the last place, up or down at random: how
    far the training itself carries a rounding.

    Args:
        run: results of the training of a model, in the model's dtype, which it may change.
        model: the start, in float32.
    """

    def __init__(self, run: Callable[[nn.Module], Mapping[str, Tensor | None]], model: nn.Module) -> None:
        self._train, self._start = run, model
        super().__init__(lambda: run(copy.deepcopy(model).double()), torch.float32)

    def _made(self, seed: int) -> Mapping[str, Tensor | None]:
        draw, moved = torch.Generator().manual_seed(seed), copy.deepcopy(self._start)
        with torch.no_grad():
            for p in moved.parameters():
                up = torch.randint(2, p.shape, generator=draw, dtype=torch.bool)
                p.copy_(torch.nextafter(p, torch.where(up, math.inf, -math.inf)))
        return self._train(moved)


def check(
    fn: Function,
    truth: Function,
    cases: Case | Sequence[Case],
    *,
    dtype: torch.dtype,
    also: Sequence[Results] = (),
    **how: Any,
) -> Results:
    """Every output and gradient of ``fn`` is within budget of ``truth``; returns what ``fn`` gave for the first case.

    Args:
        cases: one, or several of the same kind that differ in their values.
        dtype: that of the inputs, or what they promote to where they differ.
        also: other results for the first case that are to be within budget, such as an upstream's.
        how: of :class:`Yardstick`.
    """
    first: Results = {}
    for k, case in enumerate([cases] if isinstance(cases, Case) else cases):
        yardstick = yardstick_of(truth, case, dtype, **how)
        found = evaluate(fn, case)
        assert found.keys() == yardstick.exact.keys()
        yardstick.check(found)
        if k == 0:
            first = found
            for other in also:
                yardstick.check({name: other[name] for name in found if name in other}, "the other")
    return first


def assert_within_budget(
    found: Mapping[str, Tensor | None],
    run: Callable[[], Mapping[str, Tensor | None]],
    dtype: torch.dtype,
    what: str = "",
    **how: Any,
) -> None:
    """All results of ``run``, and no others, are within budget of it in float64; ``how`` goes to :class:`Yardstick`."""
    yardstick = Yardstick(run, dtype, **how)
    assert found.keys() == yardstick.exact.keys(), f"{what}: {sorted(found)}, expected {sorted(yardstick.exact)}"
    yardstick.check(found, what)


#: The last ones made: a case is checked on one backend after the other.
_KNOWN: OrderedDict[Any, Yardstick] = OrderedDict()
_KEPT = 16


def yardstick_of(truth: Function, case: Case, dtype: torch.dtype, **how: Any) -> Yardstick:
    """That of ``truth`` for these very numbers, made once for tests that follow one another."""
    exact = case.to(torch.float64)
    key = _plain((truth, dtype, exact.wrt, *how.items())), _numbers(exact)
    if key[0] is None or key[1] is None:
        return Yardstick(lambda: evaluate(truth, exact), dtype, **how)
    if key not in _KNOWN:
        _KNOWN[key] = Yardstick(lambda: evaluate(truth, exact), dtype, **how)
    _KNOWN.move_to_end(key)
    while len(_KNOWN) > _KEPT:
        _KNOWN.popitem(last=False)
    return _KNOWN[key]


def _plain(value: Any) -> Any:
    """What is equal for equal values, functions of the same code and variables among them; None of what may change."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        value = (value.__module__, value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
    if isinstance(value, partial):
        value = ("partial", value.func, value.args, value.keywords)
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)):
        parts = [_plain(part) for part in value]
        return None if None in parts else (type(value), *parts)
    is_plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, CodeType))
    return (type(value), value) if is_plain else None


def _numbers(case: Case) -> Any:
    """Names, shapes, strides and a digest of the numbers; None of tensors elsewhere."""
    digest, facts = hashlib.blake2b(), []
    for name, t in (*case.inputs.items(), *case.cotangents.items()):
        if t is not None and (type(t) is not Tensor or t.device.type != "cpu"):
            return None
        facts.append((name, None if t is None else (t.dtype, t.shape, t.stride())))
        if t is not None:
            digest.update(t.detach().contiguous().numpy().data)
    return digest.digest(), tuple(facts)
