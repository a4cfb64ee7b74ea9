"""``soft_assignment``: the tail of any routing, softmax over outputs and weighted sum over inputs, as one op.

Axes: B batch, n inputs, m outputs, h width of a vote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import explained
from ..autograd import apply, asked_again, called, is_observed, through, transformed
from ..backends import Case, choose, is_explaining, offer, record, requested, taken
from ..dtypes import accumulating
from ..environment import interpreting
from ..host import is_exporting
from ..masked import reaching
from ..precision import autocast_off
from ..registry import define, no_second_derivative
from . import native as native  # defines the native ops
from . import reference as reference
from .contract import Grads, Pairs, sizes
from .reference import share as share

OP = "soft_assignment"

_INPUTS = (
    "Tensor votes, Tensor? scores, Tensor? gate, Tensor? use, Tensor? ign, Tensor? prior, Tensor? mask, "
    "Tensor? lengths, float eps, str backend"
)


def case_of(votes: Tensor, pairs: Pairs) -> Case:
    named = zip(("B", "n", "m", "h"), sizes(votes, pairs), strict=True)
    return Case(OP, votes.device.type, votes.dtype, tuple(named))


offer(OP, "native")


def _empty(votes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    B, _, m, h = sizes(votes, pairs)
    acc = accumulating(votes.dtype)
    return votes.new_empty((B, m, h), dtype=acc), votes.new_empty((B, m), dtype=acc)


def _forward(votes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, backend = rest
    pairs = Pairs(*given)
    B, n, _, h = sizes(votes, pairs)
    if B == 0 or n == 0 or h == 0:
        M, p = _empty(votes, pairs)
        return M.zero_(), p.zero_()
    with autocast_off(votes.device.type):
        made: tuple[Tensor, Tensor] = choose(case_of(votes, pairs), backend).forward(votes, pairs)
    return made


def _forward_fake(votes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    pairs = Pairs(*rest[:-1])
    record(case_of(votes, pairs))
    return _empty(votes, pairs)


def _buffers(votes: Tensor, pairs: Pairs, wants: list[bool]) -> Grads:
    tensors = (votes, pairs.scores, pairs.gate, pairs.use, pairs.ign)
    made = [t.new_empty(t.shape) if t is not None and want else None for t, want in zip(tensors, wants, strict=True)]
    return Grads(*made)


def _listed(votes: Tensor, grads: Grads) -> list[Tensor]:
    return [votes.new_empty(0) if t is None else t for t in grads]


def _backward(votes: Tensor, *rest: Any) -> list[Tensor]:
    *given, backend, dM, dp, wants = rest
    pairs = Pairs(*given)
    grads = _buffers(votes, pairs, wants)
    B, n, _, h = sizes(votes, pairs)
    if B == 0 or n == 0 or h == 0:
        return [t.zero_() for t in _listed(votes, grads)]
    with autocast_off(votes.device.type):
        choose(case_of(votes, pairs), backend).backward(votes, pairs, dM, dp, grads)
    return _listed(votes, grads)


def _backward_fake(votes: Tensor, *rest: Any) -> list[Tensor]:
    *given, _, _, _, wants = rest
    pairs = Pairs(*given)
    record(case_of(votes, pairs))
    return _listed(votes, _buffers(votes, pairs, wants))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _plain(votes: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The reference, in the dtype of sums."""
    acc = accumulating(votes.dtype)
    wide: dict[str, Any] = {
        name: t.to(acc) for name, t in pairs._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    with autocast_off(votes.device.type):
        return reference.soft_assignment(votes.to(acc), pairs._replace(**wide))


def _gradient(ctx: Any, dM: Tensor, dp: Tensor) -> tuple[Tensor | None, ...]:
    wants, tensors = list(ctx.needs_input_grad[:5]), ctx.saved_tensors
    if asked_again(dM, dp):

        def plain(votes: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
            return _plain(votes, Pairs(*(*given, ctx.eps)))

        return (*through(plain, tensors, ctx.needs_input_grad[: len(tensors)], [dM, dp]), None, None)
    found = called(f"{OP}_backward", *tensors, ctx.eps, ctx.backend, dM.contiguous(), dp.contiguous(), wants)
    return (*(g if want else None for g, want in zip(found, wants, strict=True)), *[None] * 5)


define(
    "soft_assignment_backward",
    f"({_INPUTS}, Tensor dM, Tensor dp, bool[] wants) -> Tensor[]",
    _backward,
    _backward_fake,
    autograd=no_second_derivative(OP),
)
define(OP, f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake, autograd=(_gradient, _setup))


class _OneCall(torch.autograd.Function):
    """The C++'s sum, or mean, one call a pass; a registered op that chooses in Python costs several times as much."""

    @staticmethod
    def forward(ctx: Any, mean: bool, eps: float, votes: Tensor, *given: Any) -> Tensor:
        y, p = native.forward(votes, _pairs(given, eps), mean)
        ctx.eps, ctx.mean = eps, mean
        ctx.save_for_backward(votes, *given, *((y, p) if mean else (None, None)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        votes, *given, y, p = ctx.saved_tensors
        eps, mean = ctx.eps, ctx.mean
        if asked_again(dy):

            def plain(votes: Tensor, *given: Any) -> list[Tensor]:
                return [mean_of(*_plain(votes, _pairs(given, eps)), mean)]

            return (None, None, *through(plain, (votes, *given), ctx.needs_input_grad[2:], [dy]))
        pairs = _pairs(given, eps)
        wants = list(ctx.needs_input_grad[2:7])
        grads = _buffers(votes, pairs, wants)
        if mean:
            dM = dy / p[..., None]
            dp = (dM * y).sum(-1).neg_()  # nothing where p is 0: y is
        else:
            dM, dp = dy, dy.new_zeros(dy.shape[:2])
        native.backward(votes, pairs, dM, dp, grads)
        return (None, None, *grads, None, None, None)


def _pairs(given: Sequence[Any], eps: float) -> Pairs:
    scores, gate, use, ign, prior, mask, lengths = given
    return Pairs(scores, gate, use, ign, prior, mask, lengths, eps)


def mean_of(M: Tensor, p: Tensor, mean: bool) -> Tensor:
    """What is returned, of the sums over all inputs."""
    return M / torch.where(p > 0, p, 1.0)[..., None] if mean else M


def _is_one_call(votes: Tensor, pairs: Pairs) -> bool:
    if not votes.is_cpu or is_explaining() or is_observed(votes, *pairs[:-1]) or interpreting():
        return False
    return taken(OP, "cpu", votes.dtype) == "native" and 0 not in sizes(votes, pairs)


#: Multiply-adds, and inputs (whose sum a compiler makes one by one), up to which torch.compile gets plain operators on
#: a CPU: an op's call in a graph costs 50 to 200 us more than the C++ itself.
_SMALL, _FEW_INPUTS = 2**20, 1024


def _is_better_compiled(votes: Tensor, pairs: Pairs) -> bool:
    """Whether a compiler's own code is faster than a call of the op, of sizes that it takes for constants."""
    if not (torch.compiler.is_compiling() and votes.is_cpu) or is_exporting() or requested() != "auto":
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    B, n, m, h = sizes(votes, pairs)
    return statically_known_true(B * n * m * h <= _SMALL) and statically_known_true(n <= _FEW_INPUTS)


@explained
def soft_assignment(
    scores: Tensor | None,
    votes: Tensor,
    gate: Tensor | None = None,
    use: Tensor | None = None,
    ign: Tensor | None = None,
    *,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    mean: bool = False,
    eps: float = 0,  # an int: torch.compile does not make it a variable
) -> Tensor:
    r"""Assign every input softly to outputs; an output is the sum, or the weighted mean, of what inputs vote for it.

    .. math::
        R_{ij} &= \mathrm{softmax}_j\, S_{ij}, \qquad
        \phi_{ij} = \beta^{use}_{ij} f_i R_{ij} - \beta^{ign}_{ij} (f_i - f_i R_{ij}) \\
        y_{jh} &= \sum_i \phi_{ij} V_{ijh} \qquad\text{or, as a mean,}\qquad
        y_{jh} = \frac{\sum_i (\phi_{ij} + \epsilon) V_{ijh}}{\sum_i (\phi_{ij} + \epsilon)}

    The sum is Heinsen (2022), section 2, of any routing; the mean is Locatello et al. (2020), Algorithm 1 (slots are
    outputs). Nothing of size n x m is stored between forward and backward but ``scores`` itself. A row whose every pair
    is masked contributes zero, whatever its scores and gate are (its votes must be finite), and a mean over nothing is
    zero.

    Args:
        scores: S [B, n, m], any floating dtype. None: R is ``prior`` for every input (over its open pairs).
        votes: V [B, n, m, h], [1, n, m, h] (the same for every sample), [B, n, 1, h] (the same for every output) or
            [1, n, 1, h]; float16, bfloat16, float32 or float64, any strides.
        gate: f [B, n], float32, or float64 with float64 votes. None: 1.
        use, ign: betas [n, m] or [B, n, m]. None: 1, and 0.
        prior: [m], dtype of gate; read where there are no scores.
        mask: bool [B, n, m] or what broadcasts to it; True closes the pair.
        lengths: int64 [B]; rows from there on are padding and get zero gradient.
        mean: divide by the sum of weights over inputs; without betas only, as weights must not be negative.
        eps: added to the weight of every open pair of a mean.

    Returns:
        y [B, m, h], float32, or float64 with float64 votes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> scores, votes = torch.randn(2, 6, 3), torch.randn(2, 6, 1, 8)
        >>> fastroute.functional.soft_assignment(scores, votes, mean=True).shape
        torch.Size([2, 3, 8])
    """
    checks.tensor("votes", votes, "a tensor [B, n, m, h]")
    checks.floating("votes", votes)
    acc = accumulating(votes.dtype)
    if votes.dim() != 4:
        raise ValueError(f"votes: expected [B, n, m, h], got {checks.shown(votes)}")
    if scores is not None:
        checks.tensor("scores", scores, "a tensor [B, n, m]")
        checks.floating("scores", scores)
        if scores.dim() != 3:
            raise ValueError(f"scores: expected [B, n, m], got {checks.shown(scores)}")
        B, n, m = scores.shape
    else:
        if gate is None or prior is None:
            raise ValueError(f"{'gate' if gate is None else 'prior'}: expected a tensor when scores is None, got None")
        if gate.dim() != 2:
            raise ValueError(f"gate: expected [B, n], got {checks.shown(gate)}")
        if prior.dim() != 1:
            raise ValueError(f"prior: expected [m], got {checks.shown(prior)}")
        (B, n), m = gate.shape, prior.shape[0]
    wide = votes.shape
    if wide[1] != n or (wide[0] != B and wide[0] != 1) or (wide[2] != m and wide[2] != 1):
        raise ValueError(
            f"votes: expected [{B} or 1, {n}, {m} or 1, h] (B, n, m, h), like the "
            f"{'gate' if scores is None else 'scores'}, got {checks.shown(votes)}"
        )
    given = {"scores": scores, "gate": gate, "use": use, "ign": ign, "prior": prior, "mask": mask}
    checks.together(("votes", votes), given)

    def weights(name: str, t: Tensor, expected: tuple[int, ...], axes: str) -> None:
        checks.shape(name, t, expected, axes)
        if t.dtype != acc:
            raise TypeError(f"{name}: expected {acc} with votes {votes.dtype}, got {t.dtype}")

    def beta(name: str, t: Tensor) -> Tensor:
        checks.floating(name, t)
        if t.dim() == 2:
            checks.shape(name, t, (n, m), "n, m")
            return t[None]
        checks.shape(name, t, (B, n, m), "B, n, m")
        return t

    if gate is not None:
        weights("gate", gate, (B, n), "B, n")
    if prior is not None:
        weights("prior", prior, (m,), "m")
    use = None if use is None else beta("use", use)
    ign = None if ign is None else beta("ign", ign)
    if mask is not None:
        mask = checks.as_mask(mask, (B,), n, m)
        gate = None if gate is None else reaching(gate, mask)
    if lengths is not None:
        lengths = checks.as_lengths(lengths, (B,), n, votes.device)
    if mean and (use is not None or ign is not None):
        raise ValueError("mean: expected no use and no ign, whose weights could be negative")
    if eps:
        checks.at_least_zero("eps", eps)
        if not mean:
            raise ValueError(f"eps: expected 0 without mean, got {eps}")
    pairs = Pairs(scores, gate, use, ign, None if scores is not None else prior, mask, lengths, float(eps))
    learned = pairs.prior is not None and pairs.prior.requires_grad and torch.is_grad_enabled()  # no kernel has that
    if not learned and _is_one_call(votes, pairs):
        with autocast_off("cpu"):
            if not torch.is_grad_enabled():
                return native.forward(votes, pairs, mean)[0]
            made: Tensor = apply(_OneCall, mean, pairs.eps, votes, *pairs[:-1])
        return made
    if learned or transformed() or _is_better_compiled(votes, pairs):
        M, p = _plain(votes, pairs)
    else:
        M, p = called(OP, votes, *pairs, requested())
    return mean_of(M, p, mean)
