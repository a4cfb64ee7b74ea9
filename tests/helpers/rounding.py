"""The arithmetic of a floating-point dtype at random: how far an exact answer moves when everything is rounded.

Under ``Rounded(dtype, seed)`` a computation in float64 behaves as one in ``dtype`` would: the result of every operator
is rounded to one of its two neighbours in ``dtype``, forward and backward. Which of the two depends on the value and on
the seed, so a run can be repeated and does not depend on the processor, its instruction set or its number of threads.
What needs no rounding is left as it is: zeros, masks, copies, powers of two.

* float64 itself has no room between two neighbours. There a number is moved by a unit in the last place, or is not, as
  often as gives the variance of a rounding.
* Equal values are rounded alike, as a processor would: a constant is off by the same in every row.
* Operators made of several roundings (softmax, layer norm, sigmoid's gradient) are taken apart by PyTorch's own
  decompositions.
* A sum of n terms is n - 1 roundings of partial sums, in an order that nobody promises. How large the partial sums of
  terms in random order are is known (``_coefficients``), and with that the variance of all their errors, which is
  drawn at once.
* A number that comes from Python is rounded to the nearest in what PyTorch computes in, which is the same every time.
* exp, log and their like are good to one unit in the last place, as those of the vector libraries are.

The idea is Monte Carlo arithmetic (Parker, 1997), with the roundings of sums drawn at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute.ops.registry import implementations

aten = torch.ops.aten

#: Terms that are added one by one. A sum is one of such sums, and so on; a matrix product is of so many and no further.
SUM_RUN, PRODUCT_RUN = 64, 512

#: The mean square of a rounding error, relative to the number and in units of roundoff: 1/3 for numbers just above a
#: power of two, a quarter of that just below the next.
_ROUNDING = 1 / (8 * math.log(2))

#: The spacing of TensorFloat-32, ten bits behind the point.
TF32 = 2.0**-10

Numbers = npt.NDArray[np.float64]

_EXPONENT = 0x7FF0000000000000
#: In float64 one number of twelve is moved by a unit in the last place, which is the variance of a rounding, 1/12. A
#: number of at most 33 bits is taken for exact: one in a million of all others is.
_WIDER, _BEHIND = 6 / 11 / 0.499, 2**20 - 1
#: What makes a random number of another's bits.
_MIXES = -0x61C8864680B583EB, 0x3F58476D1CE4E5B9

#: Of the gamma distribution of a random walk's mean square: its mean squared over its variance, (1/2)^2 / (1/3).
_SHAPE = 0.75

#: Operators that make no new values: nothing to round.
_EXACT = {
    "_local_scalar_dense", "_reshape_copy", "_to_copy", "_unsafe_index", "_unsafe_view", "abs", "amax", "amin",
    "arange", "argmax", "argmin", "as_strided_scatter", "bernoulli", "cat", "ceil", "clamp", "clamp_max",
    "clamp_min", "clone", "constant_pad_nd", "copy", "diag_embed", "diagonal_scatter", "embedding", "empty",
    "empty_like", "empty_strided", "eq", "fill", "flip", "floor", "gather", "ge", "gt", "index", "index_select",
    "isfinite", "isnan", "le", "lift_fresh_copy", "lt", "masked_fill", "masked_scatter", "masked_select", "max",
    "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "maximum", "min", "minimum", "ne", "neg",
    "new_empty", "new_empty_strided", "new_ones", "new_zeros", "nonzero", "ones", "ones_like", "relu", "repeat",
    "repeat_interleave", "resize_", "roll", "round", "scatter", "select_backward", "select_scatter", "set_", "sign",
    "slice_backward", "slice_scatter", "sort", "stack", "threshold_backward", "topk", "tril", "triu", "trunc",
    "unfold_backward", "unique_consecutive", "value_selecting_reduction_backward", "where", "zero", "zeros",
    "zeros_like",
}  # fmt: skip

#: Good to a unit in the last place, not half of one.
_ELEMENTARY = {
    "atan", "cos", "digamma", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p",
    "log2", "log_sigmoid_forward", "logit", "pow", "rsqrt", "sigmoid", "sin", "special_erfcx", "tanh",
}  # fmt: skip

#: One rounding each.
_ELEMENTWISE = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "add", "addcdiv", "addcmul", "atan2", "avg_pool2d",
    "avg_pool2d_backward", "cumsum", "div", "exponential", "fmod", "full", "full_like", "lerp", "linspace", "mul",
    "native_dropout", "new_full", "normal", "rand", "rand_like", "randn", "randn_like", "reciprocal", "remainder",
    "rsub", "scalar_tensor", "sqrt", "square", "sub", "uniform",
}  # fmt: skip

#: Where each entry is a sum of what its index finds, one by one.
_BY_INDEX = {"index_put", "scatter_add", "index_add", "embedding_dense_backward"}

#: Bilinear operators: of squares they are the sum of squared terms.
_PRODUCTS = {"mm", "bmm", "convolution", "convolution_backward", "dot", "mv"}
_SUMS = {"sum", "mean"}
_WHOLE = {*_PRODUCTS, *_SUMS, *_BY_INDEX, *_EXACT, *_ELEMENTWISE, *_ELEMENTARY}


def _name(func: Any) -> str:
    name: str = func.overloadpacket.__name__
    return name


def _layer_norm(x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """As PyTorch's kernels have it: x is scaled before the mean goes off, which costs digits where it is large."""
    axes = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(axes, keepdim=True)
    rstd = ((x - mean).square().mean(axes, keepdim=True) + eps).rsqrt()
    y = x * rstd + -mean * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    shape: Any,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: Any,
) -> Any:
    axes = list(range(x.dim() - len(shape), x.dim()))
    rows, n = list(range(axes[0])), math.prod(shape)
    g = dy if weight is None else dy * weight
    ds, db = (g * x).sum(axes, keepdim=True), g.sum(axes, keepdim=True)
    b = (db * mean - ds) * rstd * rstd * rstd / n
    c = -(b * mean + db * rstd / n)
    dx = rstd * g + b * x + c
    dweight = (dy * (x * rstd + -mean * rstd)).sum(rows) if wanted[1] and weight is not None else None
    return dx if wanted[0] else None, dweight, dy.sum(rows) if wanted[2] and bias is not None else None


def _var_mean(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    axes = list(range(x.dim())) if dim is None else dim
    mean = x.mean(axes, keepdim=True)
    n = math.prod(x.shape[a] for a in axes)
    var = (x - mean).square().sum(axes, keepdim=keepdim) / max(n - (1 if correction is None else correction), 0)
    return var, mean if keepdim else mean.reshape(var.shape)


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    made: Tensor = _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]
    return made


def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _var(*args, **kwargs).sqrt()


def _added(product: Any) -> Callable[..., Tensor]:
    def call(to: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        made = product(a, b) if alpha == 1 else product(a, b) * alpha
        return made + (to if beta == 1 else to * beta)

    return call


#: What PyTorch does not take apart, or into something more exact than its kernels are.
_AS_COMPUTED = {
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.addmm.default: _added(aten.mm),
    aten.addmv.default: _added(aten.mv),
    aten.baddbmm.default: _added(aten.bmm),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}


def decomposition(func: Any) -> Callable[..., Any] | None:
    """What an operator of several roundings is made of; None for those that are one."""
    return None if _name(func) in _WHOLE else _AS_COMPUTED.get(func) or decomposition_table.get(func)


def _functional(func: Any) -> Any:
    """The operator of which ``func`` is the in-place form, or None."""
    name = _name(func)
    if not name.endswith("_") or name.startswith("__") or func.namespace != "aten" or name in ("resize_", "set_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return None if packet is None else getattr(packet, func._overloadname, None)


def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Operator(NamedTuple):
    """What is asked of an operator at every call."""

    name: str
    is_ours: bool
    is_composite: bool
    is_view: bool
    functional: Any
    decomposed: Callable[..., Any] | None

    @classmethod
    @cache
    def of(cls, func: Any) -> _Operator:
        is_ours = func.namespace == "fastroute"
        return cls(_name(func), is_ours, _is_composite(func), _is_view(func), _functional(func), decomposition(func))


@cache
def _coefficients(n: float, run: int, levels: bool) -> tuple[float, float]:
    """What (sum t)^2 and sum t^2 of n terms t count in the sum of the squares of all partial sums.

    In a run of r terms with sum T and sum of squares Q, taken in random order, the k-th partial sum has expected square
    (k/r T)^2 + k/r (1 - k/r) Q, so all have r (T^2 / 3 + Q / 6). Over runs sum T^2 is (sum t)^2 / runs + (1 - 1 / runs)
    sum t^2.
    """
    of_total = of_squares = 0.0
    while n > 1:
        r = min(run, n)
        n /= r
        of_total += r / (3 * n)
        of_squares += r * ((1 - 1 / n) / 3 + 1 / 6)
        run = run if levels else max(int(n), run)
    return of_total, of_squares


class Rounded(TorchDispatchMode):
    """Every result of float64 arithmetic, rounded to ``dtype`` at random.

    Sums are kept in at least float32. ``operands``: a dtype, or "tf32", that what a matrix product takes is rounded to.
    """

    def __init__(self, dtype: torch.dtype, seed: int, operands: torch.dtype | str | None = None) -> None:
        super().__init__()
        self.operands = operands and (TF32 if operands == "tf32" else torch.finfo(operands).eps)  # type: ignore[call-overload]
        self.dtype, self.acc = dtype, torch.promote_types(dtype, torch.float32)
        self.spacing = torch.finfo(dtype).eps
        self.acc_unit = torch.finfo(self.acc).eps / 2
        self.key = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**63
        self.draws = np.random.Generator(np.random.SFC64(seed))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled, and to say so takes longer than many an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, is_ours, is_composite, is_view, functional, decomposed = _Operator.of(func)
        if is_view and not is_composite:
            return func(*args, **kwargs)
        if is_ours and name in implementations:
            with self:
                return implementations[name](*args, **kwargs)
        if is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        if functional is not None and isinstance(args[0], Tensor):
            made = self.__torch_dispatch__(functional, types, args, kwargs)
            if isinstance(made, Tensor) and made.dtype.is_floating_point:
                return _write(args[0], made)
            return func(*args, **kwargs)
        if decomposed is not None:
            with self:
                made = decomposed(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if name.startswith("_foreach_"):
            raise NotImplementedError(f"{func}: an optimizer with foreach=False is what can be followed")
        if self.acc != torch.float64:
            args = tuple(_as_float32(a) if type(a) is float else a for a in args)
            kwargs = {k: _as_float32(a) if type(a) is float else a for k, a in kwargs.items()}
        if self.operands and name in _PRODUCTS:
            args = tuple(map(self._operand, args))
        made = func(*args, **kwargs)
        if name in _EXACT:
            return made
        if name in _BY_INDEX:
            return self._added_by_index(func, made, args, kwargs)
        if name in _PRODUCTS or name in _SUMS:
            return self._reduced(func, name, made, args, kwargs)
        times = 2.0 if name in _ELEMENTARY else 1.0
        if name not in _ELEMENTARY and name not in _ELEMENTWISE and _is_floating(made):
            raise NotImplementedError(f"{func}: say in {__name__} how it rounds")
        if func._schema.is_mutable:
            return _write(made, self.rounded(made, times))
        if isinstance(made, Tensor):
            return self.rounded(made, times)
        if isinstance(made, (tuple, list)):
            return type(made)(self.rounded(t, times) if isinstance(t, Tensor) else t for t in made)
        return made

    # ------------------------------------------------------------------------------------------------- one rounding

    def _shaken(self, numbers: Numbers, spacing: float) -> Numbers:
        """They and less than half a spacing (of numbers from 1 to 2), to either side: then the nearest is a random one.

        By how much is a function of the value and the seed. What has no more digits than that keeps its nearest.
        """
        bits = numbers.view(np.int64)
        moved = np.bitwise_and(bits, _EXPONENT, out=np.empty_like(bits)).view(np.float64)  # the power of two below
        np.minimum(moved, 2.0**1023, out=moved)  # infinity stays as it is
        coin = np.bitwise_xor(bits, self.key, out=np.empty_like(bits))
        coin *= _MIXES[0]
        coin ^= np.right_shift(coin, 29, out=np.empty_like(bits))
        coin *= _MIXES[1]
        moved *= 0.499 * spacing * 2.0**-63
        moved *= coin
        moved += numbers
        return moved

    def _nearest(self, numbers: Numbers, times: float = 1.0) -> Numbers:
        if self.dtype == torch.float64:  # there is nothing between two neighbours to be moved to
            moved = self._shaken(numbers, self.spacing * times * _WIDER)
            return np.where(numbers.view(np.int64) & _BEHIND, moved, numbers)
        moved = self._shaken(numbers, self.spacing * times)
        if self.dtype.itemsize == 2:  # its digits, with the range of the float32 that it is computed in
            return np.where(np.isfinite(numbers), _split(moved, self.spacing), numbers)
        return moved.astype(np.float32).astype(np.float64)

    def rounded(self, t: Tensor, times: float = 1.0) -> Tensor:
        """One of t's neighbours in the dtype; t itself where it is one. ``times``: of the shaking before."""
        if t.dtype != torch.float64 or not t.numel():
            return t
        return _tensor(self._nearest(_numbers(t), times), t)

    def _operand(self, t: Any) -> Any:
        """Rounded as tensor cores round what they multiply."""
        if not isinstance(t, Tensor):
            return t
        return _tensor(_split(self._shaken(_numbers(t), self.operands), self.operands), t)

    # ------------------------------------------------------------------------------------------------------ a sum

    def _reduced(self, func: Any, name: str, made: Any, args: Any, kwargs: Any) -> Any:
        squared = [a.square() if isinstance(a, Tensor) else a for a in args]
        if name in _SUMS:
            t = args[0]
            if not t.is_floating_point():
                return made
            n = t.numel() / max(made.numel(), 1)
            scale = n if name == "mean" else 1.0
            squares = func(*squared, **kwargs) / scale  # of a mean's terms, t / n
            return self._summed(made, squares, n, is_product=False)
        if name == "convolution":
            squared[2] = None if args[2] is None else args[2].square()
            n = args[1][0].numel()
            return self._summed(made, func(*squared, **kwargs), n)
        if name == "convolution_backward":
            g, _, w = args[:3]
            squares = func(*squared, **kwargs)
            counts = (w.numel() / w.shape[1], g.numel() / g.shape[1], g.numel() / g.shape[1])
            return tuple(
                None if t is None else self._summed(t, q, n) for t, q, n in zip(made, squares, counts, strict=True)
            )
        return self._summed(made, func(*squared, **kwargs), args[0].shape[-1])

    def _added_by_index(self, func: Any, made: Tensor, args: Any, kwargs: Any) -> Tensor:
        if not made.is_floating_point() or (_name(func) == "index_put" and not (len(args) > 3 and args[3])):
            return made  # nothing is added

        def of(f: Callable[[Tensor], Tensor]) -> Tensor:
            return func(*(f(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **kwargs)  # type: ignore[no-any-return]

        additions = of(torch.ones_like) - 1
        variance = additions * (made.square() / 3 + of(torch.square) / 6)
        return self._with_noise(made, variance, 1)

    def _with_noise(self, total: Tensor, variance: Tensor, runs: float) -> Tensor:
        """In some orders partial sums stay small, in others not: the variance of a run is gamma distributed."""
        made, sd = _numbers(total), _numbers(variance)
        noise = np.maximum(sd, 0.0, out=np.empty_like(sd))
        noise *= self.draws.standard_gamma(_SHAPE * runs, made.shape)
        np.sqrt(noise, out=noise)
        noise *= self.acc_unit * math.sqrt(_ROUNDING / (_SHAPE * runs))
        noise *= self.draws.standard_normal(made.shape)
        noise += made
        return _tensor(self._nearest(noise), total)

    def _summed(self, total: Tensor, squares: Tensor, n: float, is_product: bool = True) -> Tensor:
        run = PRODUCT_RUN if is_product else SUM_RUN
        of_total, of_squares = _coefficients(n, run, not is_product)
        return self._with_noise(total, total.square() * of_total + squares * of_squares, max(n / run, 1))


def _as_float32(number: float) -> float:
    return c_float(number).value


def _numbers(t: Tensor) -> Numbers:
    """Those of a tensor, for NumPy, which takes a tenth of PyTorch's time for a few."""
    found: Numbers = t.numpy(force=True)
    return found


def _tensor(numbers: Numbers, like: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(like.device)


def _split(numbers: Numbers, spacing: float) -> Numbers:
    """The nearest numbers with so few digits: Veltkamp's splitting."""
    wide = numbers * (2.0**52 * spacing + 1)
    return np.asarray(wide - (wide - numbers))


def _is_floating(made: Any) -> bool:
    parts = made if isinstance(made, (tuple, list)) else [made]
    return any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in parts)


def _write(to: Tensor, value: Tensor) -> Tensor:
    aten.copy_.default(to, value)
    return to
