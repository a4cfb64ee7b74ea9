"""``agent_policy``: every row's agent scores the choices and takes one, its critic beside it; ``policy`` for many.

Axes: N rows, A agents, F features in, K choices, C outputs of a critic: K, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import explained
from ..autograd import (
    apply,
    asked_again,
    constant,
    is_hooked,
    keep_for_again,
    kept_for_again,
    own,
    through,
    transformed,
    without_gradient,
)
from ..backends import note, offer
from ..checks import flags, floating, on_one_device, shown
from ..dispatch.contract import Plan, check_plan
from ..grouped_linear.op import parameters_of
from ..grouped_linear.reference import is_stacked
from ..policy.contract import KINDS
from ..policy.op import backend_for, check_draws, check_forced, triton_refuses
from ..precision import autocast_dtype, autocast_off
from . import plain
from . import reference as reference
from . import schema as schema  # defines the compiled ops
from . import triton as triton  # implements some of them
from .contract import AgentChoice as AgentChoice

Tensors = Sequence[Tensor]

OP = "agent_policy"

offer(OP, "schema", triton=triton_refuses)


class _Net(NamedTuple):
    """The agents' layers, as the op takes them: tensors of all agents, or one of each kind for all."""

    weights: Tensors
    biases: Tensors
    agents: int
    outputs: int
    features: int

    @property
    def stacked(self) -> bool:
        return is_stacked(self.weights, 3) or (not self.weights and len(self.biases) == 1 < self.agents)


class _Options(NamedTuple):
    """What of a call is no tensor."""

    counts: tuple[int, int, int]  #: of weights, biases and critic's weights; the critic's biases are the rest
    agents: int
    stacked: bool
    critic_stacked: bool
    critic_width: int  #: 0 without one
    kind: str
    temperature: float
    exploration: float
    expected: bool
    backend: str
    bounds: list[int] | None

    def split(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """What belongs to weights, biases, critic's weights, critic's biases."""
        a, b, c = self.counts
        return [values[:a], values[a : a + b], values[a + b : a + b + c], values[a + b + c :]]


def _stacked(tensors: Tensors, dims: int) -> Tensors:
    """The tensors of all agents as one with so many axes."""
    if not tensors or is_stacked(tensors, dims):
        return tensors
    return [torch.cat(tuple(tensors)) if tensors[0].dim() == dims else torch.stack(tuple(tensors))]


def _of_each(stacked: list[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """That again as tensors of such shapes."""
    if not stacked or len(shapes) == 1:
        return [t.reshape(shapes[0]) for t in stacked]
    return [t.reshape(shape) for t, shape in zip(stacked[0].unbind(), shapes, strict=True)]


class _AgentPolicy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, order: Tensor | None, offsets: Tensor | None, uniform: Tensor | None,
        coin: Tensor | None, forced: Tensor | None, options: _Options, *parameters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        nets = options.split(parameters)
        rest = options.temperature, options.exploration, options.expected
        if options.backend == "reference":
            made = plain.forward(x, order, offsets, *nets, uniform, coin, forced, options.kind, *rest)  # type: ignore[call-arg, arg-type]
            for i in (0, 2):  # an autograd function's output is no input, and each is its own
                if made[i] is forced or (i and made[0] is made[2]):
                    made[i] = made[i].clone()
        else:
            if options.backend == "triton":  # its kernels take all agents' layers in one tensor of each kind
                nets = [_stacked(of, 3 - i % 2) for i, of in enumerate(nets)]
            op = getattr(torch.ops.fastroute, f"_agent_policy_{options.backend}")
            made = op(x, order, offsets, *nets, uniform, coin, forced, KINDS.index(options.kind), *rest)
        made = [own(t) for t in made]
        ctx.mark_non_differentiable(made[0], made[2], *made[6:])
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.weights, ctx.shapes = len(nets[0]), [p.shape for p in parameters] if options.backend == "triton" else []
        ctx.save_for_backward(x, order, offsets, made[3], made[0], *nets[0], *nets[2])
        keep_for_again(ctx, parameters)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if asked_again(*grads):
            return _again(ctx, grads)
        o: _Options = ctx.options
        grad_value, grad_scores = grads[1], grads[3]
        grad_critic, grad_at = grads[4:6] if len(grads) > 4 else (None, None)
        x, order, offsets, scores, actions, *saved = ctx.saved_tensors
        weights, critic_weights = saved[: ctx.weights], saved[ctx.weights :]
        needs = ctx.needs_input_grad
        wants = [any(of) for of in o.split(needs[7:])]
        if o.backend == "reference":
            dx, *made = plain.backward(
                grad_value, grad_scores, grad_critic, grad_at, scores, actions, x, order, offsets, weights,
                critic_weights, o.agents, o.critic_width, o.kind, o.temperature, needs[0],
                (wants[0], wants[1]), (wants[2], wants[3]), o.stacked, o.critic_stacked,
            )  # fmt: skip
        else:
            op = getattr(torch.ops.fastroute, f"_agent_policy_{o.backend}_backward")
            stacked = (True, True) if o.backend == "triton" else (o.stacked, o.critic_stacked)
            dense = [None if g is None else g.contiguous() for g in (grad_value, grad_scores, grad_critic, grad_at)]
            dx, *made = op(
                *dense, scores, actions, x, order, offsets, weights, critic_weights, o.agents, o.critic_width,
                KINDS.index(o.kind), o.temperature, needs[0], *wants, *stacked, o.bounds is None,
            )  # fmt: skip
            if o.backend == "triton":
                made = [_of_each(got, like) for got, like in zip(made, o.split(ctx.shapes), strict=True)]
        found: list[Any] = []
        for i, (got, inputs) in enumerate(zip(made, o.split(needs[7:]), strict=True)):
            each: list[Any] = list(got) if got else [None] * len(inputs)
            if o.bounds is not None and got and not (o.critic_stacked if i > 1 else o.stacked):
                each = [g if a < b else None for g, (a, b) in zip(each, pairwise(o.bounds), strict=True)]
            found += each
        _tell_hooks(ctx, grads, found)
        return (dx if needs[0] and dx.shape == x.shape else None, *[None] * 6, *found)


def _tell_hooks(ctx: Any, grads: Sequence[Tensor | None], found: list[Tensor | None]) -> None:
    """Zeros for parameters with hooks, which expect a tensor, where only the policy is learnt from, or its critic."""
    unused = (set(of) == {None} for of in (grads[1:4:2], grads[4:6]))
    if torch.compiler.is_compiling() or not any(unused):
        return
    for i, p in enumerate(ctx.again[0]):
        if found[i] is None and ctx.needs_input_grad[7 + i] and is_hooked(p):
            found[i] = torch.zeros_like(p)


def _again(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    o: _Options = ctx.options
    (given,) = kept_for_again(ctx, "agent_policy: a parameter")
    x, order, offsets, _, actions, *_ = ctx.saved_tensors

    def plain(x: Tensor | None, *parameters: Tensor) -> list[Tensor]:
        rest = o.kind, o.temperature, 0.0
        made = reference.on_plan(x, order, offsets, o.split(parameters), None, None, actions, *rest)
        return [t for t in (made.value, made.scores, made.critic, made.critic_at) if t is not None]

    of_outputs = [grads[1], grads[3], *grads[4:6]]
    needs = ctx.needs_input_grad
    with autocast_off(actions.device.type):
        dx, *rest = through(plain, (x, *given), (needs[0], *needs[7:]), of_outputs)
    _tell_hooks(ctx, grads, rest)
    return (dx, *[None] * 6, *rest)


def _fits(
    plan: Plan | None, weights: Tensors | Tensor, biases: Tensors | Tensor = (), forced: Tensor | None = None, **_: Any
) -> None:
    if plan is not None:
        check_plan(plan.order, plan.offsets, plan.order.shape[0])
    check_forced(forced, _Net(*parameters_of(weights, biases)).outputs)


@explained(also=_fits)
def agent_policy(
    x: Tensor | None,
    plan: Plan | None,
    weights: Tensors | Tensor,
    biases: Tensors | Tensor = (),
    *,
    critic_weights: Tensors | Tensor = (),
    critic_biases: Tensors | Tensor = (),
    uniform: Tensor | None = None,
    coin: Tensor | None = None,
    forced: Tensor | None = None,
    kind: str = "softmax",
    temperature: float = 1.0,
    exploration: float = 0.0,
    expected: bool = False,
    keep_empty: bool = False,
) -> AgentChoice:
    """Choose one of K per row by its agent's scores z_n = W_a x_n + b_a, and read its agent's critic there.

    The choice and its value are those of :func:`policy` with these scores. Rows that the plan drops have zeros as
    scores, critic and values, no gradient, and the forced action or 0.

    Args:
        x: [N, F] float32, float64, bfloat16 (or, on other backends than "native", float16), any row stride. With tables
            alone it is not looked at: None, or without a plan a tensor of N rows.
        plan: of the rows' agents, from :func:`dispatch.plan`; None: one agent for all rows.
        weights: A tensors [K, F] in x's dtype, each a parameter of its own; or all of them in one, [A, K, F]; or none.
        biases: A tensors [K], or none; one tensor [A, K] with stacked weights; without weights A tables [1, K], or one
            [A, K].
        critic_weights, critic_biases: likewise, with C outputs: K, of which the action's is read, or 1, a state value.
        uniform, coin, forced, kind, temperature, exploration: as of :func:`policy`.
        expected: also give the mean of the critic, sum_k p_k critic_k, for a critic of K outputs and kinds with a p.
        keep_empty: give agents without a row zeros as gradients, not None. (On a GPU and under torch.compile, where
            counts are not read, and with stacked weights they always get zeros.)

    Returns:
        ``AgentChoice(actions [N] int64, value [N], greedy [N] int64, scores [N, K], critic [N, C], critic_at [N],
        expected [N])``, the last three None where not asked for. Scores and critic are in the parameters' dtype, what
        is read of them in float32 or float64. ``value``, ``scores``, ``critic`` and ``critic_at`` have gradients, to x
        only where it needs one. A second derivative and torch.func go through plain PyTorch.

    Raises:
        ValueError, TypeError: naming the argument that does not fit the others; IndexError as :func:`policy`.

    Examples:
        >>> x, agents = torch.randn(6, 8), torch.tensor([0, 1, 1, 0, 1, 0])
        >>> plan = fastroute.ops.dispatch.plan(agents, 2)
        >>> weights = torch.randn(2, 4, 8, requires_grad=True)  # two agents choose one of four
        >>> choice = fastroute.functional.agent_policy(x, plan, weights, uniform=torch.rand(6, 4))
        >>> choice.actions.shape, choice.value.requires_grad
        (torch.Size([6]), True)
    """
    flags(expected=expected, keep_empty=keep_empty)
    nets = [_Net(*parameters_of(weights, biases))]
    if len(critic_weights) > 0 or len(critic_biases) > 0:
        nets.append(_Net(*parameters_of(critic_weights, critic_biases)))
    _check_nets(nets, expected, kind)
    x, parameters = _inputs(x, nets)
    like = parameters[0]
    N = _rows(x, plan, nets)
    K = nets[0].outputs
    check_draws(uniform, coin, forced, N, K, temperature, exploration)
    uniform, coin = constant(uniform), constant(coin)
    note(OP, like, N=N, K=K)
    options = _Options(
        (len(nets[0].weights), len(nets[0].biases), len(nets[1].weights) if len(nets) > 1 else 0),
        nets[0].agents,
        nets[0].stacked,
        len(nets) > 1 and nets[1].stacked,
        nets[1].outputs if len(nets) > 1 else 0,
        kind,
        float(temperature),
        float(exploration),
        expected,
        backend_for(like, K, OP),
        None if keep_empty or plan is None else plan.bounds,
    )
    order, offsets = (None, None) if plan is None else (plan.order, plan.offsets)
    if transformed():
        rest = kind, options.temperature, options.exploration, expected
        with autocast_off(like.device.type):
            return reference.on_plan(x, order, offsets, options.split(parameters), uniform, coin, forced, *rest)
    if not (options.stacked or options.critic_stacked):
        parameters = list(without_gradient(parameters, options.bounds))
    made = apply(_AgentPolicy, x, order, offsets, uniform, coin, forced, options, *parameters)
    return AgentChoice(*made)


def _check_nets(nets: list[_Net], expected: bool, kind: str) -> None:
    first = nets[0]
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if first.outputs < 1:
        raise ValueError(f"weights: expected at least one choice, got {shown((*first.weights, *first.biases)[0])}")
    if len(nets) > 1:
        critic = nets[1]
        if critic.agents != first.agents:
            raise ValueError(f"critic_weights: expected one of each of {first.agents} agents, got {critic.agents}")
        if critic.outputs not in (1, first.outputs):
            raise ValueError(f"critic_weights: expected {first.outputs} outputs, or 1, got {critic.outputs}")
        if critic.features and first.features and critic.features != first.features:
            raise ValueError(f"critic_weights: expected {first.features} features, got {critic.features}")
    if expected and (len(nets) < 2 or nets[1].outputs != first.outputs or kind == "score"):
        raise ValueError(
            f"expected: expected a critic of {first.outputs} outputs and a kind with probabilities, "
            f"got {nets[1].outputs if len(nets) > 1 else 'no'} and {kind!r}"
        )


def _inputs(x: Tensor | None, nets: list[_Net]) -> tuple[Tensor | None, list[Tensor]]:
    """x and all parameters in one dtype, autocast's where it is on, and x with dense rows."""
    parameters = [p for net in nets for of in (net.weights, net.biases) for p in of]
    features = next((net.features for net in nets if net.weights), None)
    if features is None:
        dtype = parameters[0].dtype
    else:
        if x is None:
            raise ValueError("x: expected a tensor [N, F] to multiply, got None")
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"x: expected [N, {features}], as the agents take, got {shown(x)}")
        autocast = autocast_dtype(x.device.type)
        if autocast is not None and x.dtype != torch.float64:
            x, parameters = x.to(autocast), [p.to(autocast) for p in parameters]
        x = x.contiguous() if x.shape[1] > 1 and x.stride(1) != 1 else x
        dtype = x.dtype
        first = next(net.weights[0] for net in nets if net.weights)
        floating("weights", first)
        on_one_device(x, first)
    for p in parameters:
        if p.dtype != dtype:
            raise TypeError(f"x: expected the agents' dtype {p.dtype}, got {dtype}")
    return x, parameters


def _rows(x: Tensor | None, plan: Plan | None, nets: list[_Net]) -> int:
    if plan is None:
        if nets[0].agents != 1:
            raise ValueError(f"plan: expected one for {nets[0].agents} agents, got None")
        if x is None:
            raise ValueError("x: expected a tensor, whose rows are counted without a plan, got None")
        return x.shape[0]
    if plan.samples is not None:
        raise ValueError(f"plan: expected one agent per row, got {plan.per_sample}")
    if plan.offsets.shape[0] != nets[0].agents + 1:
        raise ValueError(f"plan: expected one of {nets[0].agents} agents, got one of {plan.offsets.shape[0] - 1}")
    N = plan.order.shape[0]
    if x is not None and any(net.weights for net in nets) and x.shape[0] != N:
        raise ValueError(f"x: expected the plan's {N} rows, got {shown(x)}")
    return N
