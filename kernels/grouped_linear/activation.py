"""What follows a module's product, and its slope, by the number that ``reference.grouped_linear.ACTIVATIONS`` gives it.

In float32. EXACT: what is made stays in float32, so exponentials are good to a rounding or two (the hardware's own lose
a rounding for every unit of the exponent), and quotients are rounded as they should be; else the fast ones will do.
Axes: any.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ACTIVATION: 0 is none.
RELU: tl.constexpr = tl.constexpr(1)
TANH: tl.constexpr = tl.constexpr(2)
SIGMOID: tl.constexpr = tl.constexpr(3)
SILU: tl.constexpr = tl.constexpr(4)
GELU: tl.constexpr = tl.constexpr(5)
GELU_TANH: tl.constexpr = tl.constexpr(6)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """2^n 2^f with n whole and f = x / log 2 - n: multiplying x itself by 1 / log 2 would round off |x| units."""
    if EXACT:
        x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # NaN stays
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = x - n * 0.693359375  # log 2 in two parts, the first so short that n times it is exact
        rest = rest + n * 2.12194440e-4
        made = tl.exp2(n) * tl.exp2(rest * 1.4426950408889634)
    else:
        made = tl.exp2(x * 1.4426950408889634)
    return made


@triton.jit
def _quotient(a, b, EXACT: tl.constexpr):
    if EXACT:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    return _quotient(1.0, 1.0 + _exp(-x, EXACT), EXACT)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """Near zero an odd polynomial, as 1 - 2 / (1 + e^2x) cancels there."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    p = ((p + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x
    size = tl.abs(x)
    far = 1.0 - _quotient(2.0, 1.0 + _exp(2.0 * size, EXACT), EXACT)
    return tl.where(size < 0.625, p, tl.where(x < 0, -far, far))


@triton.jit
def _gelu_inner(x):
    return 0.7978845608028654 * (x + 0.044715 * (x * x * x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of float32 numbers."""
    y = x
    if ACTIVATION == RELU:
        y = tl.where(x <= 0.0, 0.0, x)  # NaN is kept
    elif ACTIVATION == TANH:
        y = _tanh(x, EXACT)
    elif ACTIVATION == SIGMOID:
        y = _sigmoid(x, EXACT)
    elif ACTIVATION == SILU:
        y = _quotient(x, 1.0 + _exp(-x, EXACT), EXACT)
    elif ACTIVATION == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        y = 0.5 * x * (1.0 + _tanh(_gelu_inner(x), EXACT))
    return y


@triton.jit
def sloped(grad, kept, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """grad times the slope, in float32; ``kept`` is the activation's value, or from silu on what it was applied to."""
    made = grad
    if ACTIVATION == RELU:
        made = tl.where(kept <= 0.0, 0.0, grad)
    elif ACTIVATION == TANH:
        made = grad * (1.0 - kept * kept)
    elif ACTIVATION == SIGMOID:
        made = grad * ((1.0 - kept) * kept)
    elif ACTIVATION == SILU:
        s = _sigmoid(kept, EXACT)
        made = grad * (s * (1.0 + kept * (1.0 - s)))
    elif ACTIVATION == GELU:
        below = 0.5 * (1.0 + tl.erf(kept * 0.7071067811865476))
        made = grad * (below + kept * (0.3989422804014327 * _exp(-0.5 * (kept * kept), EXACT)))
    elif ACTIVATION == GELU_TANH:
        t = _tanh(_gelu_inner(kept), EXACT)
        inner = 0.7978845608028654 * (1.0 + 0.134145 * (kept * kept))
        made = grad * (0.5 * (1.0 + t) + 0.5 * kept * (1.0 - t * t) * inner)
    return made
