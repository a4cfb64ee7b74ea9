"""``policy``: a discrete choice per row, drawn from scores, with its log-probability or value.

Axes: N rows, K choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import apply, asked_again, constant, own, through, transformed
from ..backends import BackendName, Case, decide, note, offer, requested, taken
from ..backends import triton_refuses as of_dtype
from ..checks import floating, positive, shape, share
from ..host import may_look
from . import plain
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements some of them
from .contract import KINDS as KINDS
from .contract import Choice as Choice
from .reference import shifted as shifted
from .reference import values as values

OP = "policy"
CHOICES = 256  #: the most that the Triton kernels take: a row of scores lies in registers


def triton_refuses(case: Case) -> str | None:
    K = dict(case.sizes).get("K", 1)
    why = f"the Triton kernels take up to {CHOICES} choices, not {K}" if K > CHOICES else None
    return of_dtype(case) or why


def backend_for(like: Tensor, K: int, op: str = OP) -> BackendName:
    """The backend of this op, or of ``agent_policy``, for K choices."""
    device = like.device.type
    found: BackendName = taken(op, device, like.dtype)
    if found == "triton" and K > CHOICES:
        return decide(Case(op, device, like.dtype, (("K", K),)), requested()).backend
    return found


offer("policy", "schema", triton=triton_refuses)


def check_forced(forced: object, K: int) -> None:
    """Whether actions exist: looked at where a call has failed, or where ``fastroute.strict`` asks for it."""
    if isinstance(forced, Tensor) and may_look(forced) and forced.numel() and int(most := forced.max()) >= K:
        raise IndexError(f"forced: expected indices below {K}, got {int(most)}")


def check_draws(
    uniform: Tensor | None, coin: Tensor | None, forced: Tensor | None, N: int, K: int, temperature: float,
    exploration: float,
) -> None:  # fmt: skip
    """Shapes and dtypes of what decides, as compiled backends read them as they are told; and its numbers."""
    if not temperature > 0:
        positive("temperature", temperature)
    if not 0 <= exploration <= 1:
        share("exploration", exploration)
    for name, t, want, axes in (("uniform", uniform, (N, K), "N, K"), ("coin", coin, (N,), "N")):
        if t is not None:
            shape(name, t, want, axes)
            floating(name, t)
    if forced is not None:
        shape("forced", forced, (N,), "N")
        if forced.dtype != torch.int64:
            raise TypeError(f"forced: expected int64, got {forced.dtype}")
        if not forced.is_cpu:  # there a call fails
            check_forced(forced, K)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, uniform: Tensor | None, coin: Tensor | None, forced: Tensor | None, kind: str,
        temperature: float, exploration: float, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if backend == "reference":
            actions, value, greedy = plain.forward(scores, uniform, coin, forced, kind, temperature, exploration)
            if forced is not None:
                actions = actions.clone()  # an autograd function's output is no input
            if actions is greedy:
                greedy = greedy.clone()
        else:
            op = getattr(torch.ops.fastroute, f"_policy_{backend}")
            actions, value, greedy = op(scores, uniform, coin, forced, KINDS.index(kind), temperature, exploration)
        actions, value, greedy = map(own, (actions, value, greedy))
        ctx.mark_non_differentiable(actions, greedy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, actions)
        ctx.options = kind, temperature, backend
        return actions, value, greedy

    @staticmethod
    def backward(ctx: Any, _: None, grad: Tensor | None, __: None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 8
        kind, temperature, backend = ctx.options
        scores, actions = ctx.saved_tensors
        if asked_again(grad):

            def definition(z: Tensor) -> list[Tensor]:
                return [reference.value_of(z, actions, kind, temperature)]

            return (*through(definition, (scores,), (True,), [grad]), *[None] * 7)
        if backend == "reference":
            made = plain.backward(grad, scores, actions, kind, temperature)
        else:
            op = getattr(torch.ops.fastroute, f"_policy_{backend}_backward")
            made = op(grad.contiguous(), scores, actions, KINDS.index(kind), temperature)
        return (made, *[None] * 7)


def _forced_exists(scores: Tensor, forced: Tensor | None = None, **_: Any) -> None:
    check_forced(forced, scores.shape[1])


@explained(also=_forced_exists)
def policy(
    scores: Tensor,
    *,
    uniform: Tensor | None = None,
    coin: Tensor | None = None,
    forced: Tensor | None = None,
    kind: str = "softmax",
    temperature: float = 1.0,
    exploration: float = 0.0,
) -> Choice:
    """Choose one of K per row, and say what the choice is worth.

    kind "softmax": p = softmax(z / temperature), value log p_a. "score": value z_a, and a draw is uniform. "shifted":
    p = (z - min z + 1e-6) / sum, value log p_a with p kept 1.2e-7 from 0 and 1 (Weighted Policy Learner).
    A draw is the winner of an exponential race, argmax_k p_k / E_k with E = -log u (the Gumbel-max trick).

    Args:
        scores: z, [N, K], K >= 1, floating; half precision is computed in float32.
        uniform: u, [N, K], uniform in [0, 1) as of ``torch.rand``, in float32 (float64 for such scores): u = 0 never
            wins. None: the greedy choice.
        coin: [N], uniform in [0, 1): where coin < exploration the draw is taken, elsewhere the greedy choice.
        forced: [N] int64, taken instead of all that. A row where it is negative has value zero and no gradient.
        temperature: above 0.
        exploration: from 0 to 1.

    Returns:
        ``Choice(actions [N] int64, value [N] float32 or float64, greedy [N] int64)``. ``value`` has a gradient, to
        ``scores``; ``uniform`` and ``coin`` have no gradient.

    Raises:
        ValueError, TypeError: naming the argument.
        IndexError: ``forced`` has a K or more (on a GPU only ``fastroute.strict`` looks).

    Examples:
        >>> scores = torch.tensor([[0.0, 5.0], [5.0, 0.0]], requires_grad=True)
        >>> choice = fastroute.functional.policy(scores)  # greedy, as no random numbers are given
        >>> choice.actions.tolist()
        [1, 0]
        >>> drawn = fastroute.functional.policy(scores, uniform=torch.rand(2, 2))
        >>> drawn.value.sum().backward()  # the log-probability of what was drawn
        >>> scores.grad.shape
        torch.Size([2, 2])
    """
    floating("scores", scores)
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores: expected [N, K], K at least 1, got {list(scores.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    N, K = scores.shape
    check_draws(uniform, coin, forced, N, K, temperature, exploration)
    uniform, coin = constant(uniform), constant(coin)
    if transformed():
        return reference.policy(scores, uniform, coin, forced, kind, float(temperature), float(exploration))
    note(OP, scores, N=N, K=K)
    backend = backend_for(scores, K)
    if backend != "reference" and not scores.is_contiguous():
        scores = scores.contiguous()
    made = apply(_Policy, scores, uniform, coin, forced, kind, float(temperature), float(exploration), backend)
    return Choice(*made)
