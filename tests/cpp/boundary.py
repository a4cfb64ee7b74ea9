"""Direct calls of every op that C++ implements, with arguments that do not fit: an error, or the reference's result.

``python -m tests.cpp.boundary CALLS TRACE [LIBRARY]`` makes so many calls, of this build of the extension, and keeps
the last one in a file, for whoever finds that the process crashed. Calls of the public functions are recorded, then
one or two arguments are changed. Everything is float64, so that results are compared at its spacing.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastroute import functional, use_backend
from fastroute.ops import activations, dispatch
from fastroute.ops.agent_policy import plain as agent_policy_plain
from fastroute.ops.batch_norm_mask_relu import plain as batch_norm_mask_relu_plain
from fastroute.ops.dispatch import reference as reference_dispatch
from fastroute.ops.dtypes import accumulating
from fastroute.ops.efficient_routing import native
from fastroute.ops.efficient_routing import op as efficient
from fastroute.ops.efficient_routing.contract import Parameters
from fastroute.ops.expert_ffn import plain as expert_ffn_plain
from fastroute.ops.grouped_linear import plain as grouped_linear_plain
from fastroute.ops.grouped_linear.op import planned
from fastroute.ops.masked import reaching
from fastroute.ops.policy import plain as policy_plain
from fastroute.ops.policy.contract import KINDS
from fastroute.ops.soft_assignment import plain as soft_assignment_plain
from fastroute.ops.soft_assignment.contract import Grads as AssignmentGrads
from fastroute.ops.soft_assignment.contract import Pairs
from fastroute.ops.task_mask import plain as task_mask_plain
from fastroute.ops.trajectory_loss import contract
from fastroute.ops.trajectory_loss import plain as trajectory_loss_plain
from fastroute.ops.vector_routing import plain as tiles
from fastroute.ops.vector_routing.contract import Grads, Step
from tests.helpers import agent_policy_cases, assignment_cases, matrix_cases, routing_cases, seeds
from tests.helpers.cases import evaluate
from tests.helpers.opcheck import assert_same
from tests.helpers.trajectory_losses import loss_case, loss_op

F64 = torch.float64
ACTIVATIONS = list(activations.ACTIVATIONS)
Call = tuple[str, tuple[Any, ...]]


def names() -> list[str]:
    """The ops whose kernels are C++, from their schemas."""
    schemas = {s.name.removeprefix("fastroute::") for s in torch._C._jit_get_all_schemas() if "fastroute::" in s.name}
    return sorted(name for name in schemas if "_native" in name)


def mapped(f: Callable[[Tensor], Any], value: Any) -> Any:
    """f of each tensor in lists and tuples; pytree's own takes longer than the calls."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(f, item) for item in value])
    return f(value) if isinstance(value, Tensor) else value


def _copied(args: Any) -> Any:
    """The same values and strides in other memory; what shared memory still does."""
    storages: dict[int, torch.UntypedStorage] = {}

    def one(t: Tensor) -> Tensor:
        if t.is_meta or is_freed(t):  # set_ would give it new memory
            return t
        storage = t.untyped_storage()
        copied = storages.setdefault(storage._cdata, storage.clone())
        return torch.empty(0, dtype=t.dtype).set_(copied, t.storage_offset(), t.shape, t.stride())

    return mapped(one, args)


def is_freed(t: Tensor) -> bool:
    """Whether its memory was taken away, as sharding does; PyTorch's own clone would crash."""
    return t.device.type == "cpu" and t.numel() > 0 and t.untyped_storage().nbytes() == 0


@contextmanager
def _recorded() -> Iterator[list[Call]]:
    """The calls of these ops, as they were before the op wrote anything."""
    found: list[Call] = []
    kept = {name: getattr(torch.ops.fastroute, name) for name in names()}

    def recorder(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found.append((name, _copied(args)))
            return kept[name](*args)

        return call

    for name in kept:
        setattr(torch.ops.fastroute, name, recorder(name))
    try:
        yield found
    finally:
        for name, op in kept.items():
            setattr(torch.ops.fastroute, name, op)


# --------------------------------------------------------------------------------------------------------- valid calls


def _routings() -> None:
    size = routing_cases.Size(2, 5, 3, 4)
    for linear, first, ign, padded in product((False, True), repeat=4):
        mask = routing_cases.some_mask(2, 5, 3) if padded else None
        case = routing_cases.vector_case(
            size, dtype=F64, first=first, linear=linear, shared_scores=linear, ign=ign, mask=mask,
            lengths=[5, 3] if padded else None,
        )  # fmt: skip
        evaluate(routing_cases.vector_op, case)
    for linear, padded, d in product((False, True), (False, True), (4, 13)):  # with d = 13, both linear betas in one
        mask = routing_cases.some_mask(2, 5, 3) if padded else None
        case = routing_cases.efficient_case(
            size._replace(d=d), linear=linear, mask=mask, lengths=[5, 3] if padded else None, dtype=F64
        )
        evaluate(routing_cases.efficient_op(2, True), case)
    for shared, masked in product((False, True), repeat=2):
        mask = routing_cases.some_mask(2, 5, 3) if masked else None
        case = matrix_cases.matrix_case(matrix_cases.Size(2, 5, 3, 2, 3, 4), dtype=F64, shared=shared, mask=mask)
        evaluate(matrix_cases.matrix_op(2), case)
    for form, shared_votes in product(
        ("scores", "padded", "masked first", "use", "gated mean"), assignment_cases.SHARED.values()
    ):
        case = assignment_cases.case_of(form, (2, 5, 3, 4), shared_votes, dtype=F64)
        evaluate(assignment_cases.op("native", form), case)


def _networks() -> None:
    actions = torch.tensor([0, 2, -1, 1, 0, 2, 2])
    plan = dispatch.plan(actions, 3)
    x = torch.randn(7, 4, dtype=F64, requires_grad=True)
    W, b = torch.randn(3, 5, 4, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64, requires_grad=True)
    for activation in ("none", "relu", "silu", "gelu", "gelu_tanh"):
        for weights, biases in ((list(W), list(b)), (W, b), (list(W), ())):
            functional.grouped_linear(x, plan, weights, biases, activation=activation).sum().backward()
        assert planned(x, actions, list(W), list(b), 3, activation, False) is not None
    pairs = dispatch.plan(torch.stack([actions, actions.flip(0)], 1), 3)
    functional.grouped_linear(x, pairs, list(W), keep_sorted=True).sum().backward()
    functional.grouped_linear(None, plan, (), [t[None] for t in b]).sum().backward()
    out, shares = torch.randn(3, 6, 5, dtype=F64), torch.rand(7, 1, dtype=F64, requires_grad=True)
    for activation, weights, gated in product(activations.ACTIVATIONS, (None, shares), (False, True)):
        made = functional.expert_ffn(
            x, plan, weights, torch.cat([W, W], 1) if gated else W, out, activation=activation, gated=gated
        )
        made.sum().backward()
    scores = torch.randn(6, 3, dtype=F64, requires_grad=True)
    uniform, coin, forced = torch.rand(6, 3, dtype=F64), torch.rand(6, dtype=F64), torch.tensor([0, 1, 2, -1, 0, 2])
    for kind in KINDS:
        functional.policy(scores, uniform=uniform, coin=coin, kind=kind, exploration=0.5).value.sum().backward()
        functional.policy(scores, forced=forced, kind=kind, temperature=0.7).value.sum().backward()
    for net in agent_policy_cases.NETS:
        case = agent_policy_cases.case_of(actions, 3, 4, 5, net, dtype=F64)
        evaluate(agent_policy_cases.op("native"), case)
    for masked in (False, True):
        case = loss_case(contract.ALGORITHMS, 5, F64, masked=masked)
        evaluate(loss_op("native", contract.ALGORITHMS), case)


def _masks() -> None:
    mapping, tasks = (torch.rand(3, 4) < 0.6).float(), torch.tensor([2, 0, 1])
    for shape, task in product(((3, 4), (3, 4, 2, 2)), (1, tasks)):
        x = torch.randn(shape, dtype=F64, requires_grad=True)
        for relu in (False, True):
            functional.task_mask(x, mapping, task, relu=relu).square().sum().backward()
            functional.task_mask(x.detach().clone(), mapping, task, relu=relu, inplace=True)
        for training in (False, True):
            given = [torch.rand(4, dtype=F64) + 0.5 for _ in range(4)]
            weight, bias = (t.requires_grad_() for t in given[2:])
            y = functional.batch_norm_mask_relu(x, mapping, task, *given[:2], weight, bias, training, 0.1, 1e-5)
            y.square().sum().backward()


def valid_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Of every op, small ones in each of its forms."""
    seeds.manual_seed(0)
    with use_backend("native"), _recorded() as found:
        for part in (_routings, _networks, _masks):
            part()
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names()}
    for name, args in found:
        calls[name].append(args)
    return calls


# ------------------------------------------------------------------------------------------------------- the reference


def _efficient(*args: Any) -> tuple[Tensor, ...]:
    x, *given = args
    out, *kept = efficient._forward(reaching(x, given[-4]), *given, "reference", "")
    return out, torch.cat([t.flatten() for t in kept])


def _efficient_backward(*args: Any) -> list[Tensor]:
    x, *given, dout, kept, want_x, want_rows = args
    x, w, mask, n_iters = reaching(x, given[-4]), Parameters(*given[:15]), given[-4], given[-2]
    saved = native.parts(kept, x, w, mask, n_iters)
    return efficient._backward(x, *given, "reference", "", dout, *saved, want_x, want_rows)[:15]


def _vector(*args: Any) -> tuple[Tensor, ...]:
    M, p, gate = tiles.forward(Step(*args))
    return M, p, gate if args[1] is None else gate.new_empty(0)


def _vector_backward(*args: Any) -> Tensor:
    step, (dM, dp, fresh, gate, x), parameters = Step(*args[:15]), args[15:20], args[20:]
    buffers = zip(("gate_weight", "gate_bias", "score_weight", "score_bias", "use", "ign", "use_bias", "ign_bias"),
                  parameters, strict=True)  # fmt: skip
    made = tiles.backward(step, dM, dp, Grads(fresh, gate, x, **dict(buffers)))
    return made if made is not None else dM.new_empty(0, *dM.shape[1:])


def _matrix(
    gate: Tensor, mu_inp: Tensor, W: Tensor, bias: Tensor, use: Tensor, ign: Tensor, mask: Tensor | None,
    prior: Tensor | None, mu: Tensor | None, weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One iteration written out, with every vote in memory; sums that vanish are left out of the comparison."""
    V = torch.einsum("bncd,nmdh->bnmch", mu_inp, W.expand(mu_inp.shape[1], *W.shape[1:])) + bias
    open = torch.ones(V.shape[:3], dtype=torch.bool) if mask is None else ~mask
    some = open.any(-1, keepdim=True)
    if prior is None or mu is None or weight is None:
        R = open / open.sum(-1, keepdim=True).clamp(min=1)
    else:
        scores = prior[:, None] - (weight[:, None] * (V - mu[:, None]).square()).sum((-2, -1))
        R = scores.masked_fill(~open & some, -torch.inf).softmax(-1) * open
    f = gate[..., None] * open * some
    D = f * R
    N0 = D.sum(1)
    mean = torch.einsum("bnm,bnmch->bmch", D, V) / N0[..., None, None]
    M2 = torch.einsum("bnm,bnmch->bmch", D, (V - mean[:, None]).square())
    return N0, mean, M2, (use * D - ign * (f - D)).sum(1)


def _assignment(*args: Any) -> tuple[Tensor, Tensor]:
    M, p = soft_assignment_plain.forward(args[0], Pairs(*args[1:9]))
    if args[9]:
        p = p.masked_fill(p <= 0, 1.0)
        M = M / p[..., None]
    return M, p


def _assignment_backward(*args: Any) -> None:
    grads = AssignmentGrads(*args[11:])
    soft_assignment_plain.backward(args[0], Pairs(*args[1:9]), args[9], args[10], grads)


def _linear(*args: Any) -> Any:
    return grouped_linear_plain.forward(*args[:6], ACTIVATIONS[args[6]], args[7])


def _linear_planned(x: Tensor, actions: Tensor, weights: Any, biases: Any, activation: int, keep: bool) -> Any:
    modules = weights[0].shape[0] if weights[0].dim() == 3 else len(weights)
    order, offsets, beyond = reference_dispatch.plan(actions, modules)[:3]
    return *_linear(x, order, order, offsets, weights, biases, activation, keep), order, offsets, beyond


def _linear_backward(*args: Any) -> Any:
    *given, modules, want_x, want_weights, want_biases, activation, kept, stacked, _ = args
    wants = want_x and len(args[6]) > 0, want_weights and len(args[6]) > 0, want_biases
    return grouped_linear_plain.backward(*given, modules, wants, ACTIVATIONS[activation], kept, stacked)


def _hidden(u: Tensor, weights: Tensor | None, activation: int, gated: bool) -> Tensor:
    return expert_ffn_plain.Hidden(u, ACTIVATIONS[activation], gated).weighted(weights)


def _hidden_backward(
    t: Tensor, u: Tensor, weights: Tensor | None, activation: int, gated: bool, want_u: bool, want_weights: bool
) -> tuple[Tensor, Tensor]:
    made = expert_ffn_plain.Hidden(u, ACTIVATIONS[activation], gated).gradients(t, weights, want_u, want_weights)
    d_u, d_weights = (t.new_empty(0) if d is None else d for d in made)
    return d_u, d_weights


def _agents(*args: Any) -> Any:
    return agent_policy_plain.forward(*args[:10], KINDS[args[10]], *args[11:])


def _agents_backward(*args: Any) -> Any:
    *given, kind, temperature, want_x, want_w, want_b, want_cw, want_cb, stacked, critic_stacked, _ = args
    wants = (want_w and len(args[9]) > 0, want_b), (want_cw and len(args[10]) > 0, want_cb)
    return agent_policy_plain.backward(*given, KINDS[kind], temperature, want_x, *wants, stacked, critic_stacked)


def _dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    """PyTorch's batch norm reads parameters and statistics as if they were contiguous."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _normed(*args: Any) -> Any:
    return batch_norm_mask_relu_plain.batch_norm(*args[:6], *_dense(*args[6:8]), *args[8:])


def _normed_backward(*args: Any) -> Any:
    """With y found again where the op finds it out from x, and the batch's statistics as PyTorch has them."""
    g, x, _, mapping, tasks, task, *given, training, eps, relu, want_x = args
    mean, var, weight, bias, of_batch, scale = _dense(*given)
    of_batch, scale = (t.to(accumulating(x.dtype)) for t in (of_batch, scale))
    about, by = (of_batch, scale) if training else (mean, (var + eps).rsqrt())
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - about.view(shape)) * (by * (1 if weight is None else weight)).view(shape)
    y = y + (0 if bias is None else bias.view(shape))
    return batch_norm_mask_relu_plain.batch_norm_backward(
        g, x, y, mapping, tasks, task, mean, var, weight, bias, of_batch, scale, training, eps, relu, want_x
    )


#: By the op's name: what its raw arguments have to give.
REFERENCE: dict[str, Callable[..., Any]] = {
    "_dispatch_plan_native": lambda actions, modules: reference_dispatch.plan(actions, modules)[:3],
    "_grouped_linear_native": _linear,
    "_grouped_linear_native_planned": _linear_planned,
    "_grouped_linear_native_backward": _linear_backward,
    "_expert_ffn_native_hidden": _hidden,
    "_expert_ffn_native_hidden_backward": _hidden_backward,
    "_policy_native": lambda *a: policy_plain.forward(*a[:4], KINDS[a[4]], *a[5:]),
    "_policy_native_backward": lambda *a: policy_plain.backward(*a[:3], KINDS[a[3]], a[4]),
    "_agent_policy_native": _agents,
    "_agent_policy_native_backward": _agents_backward,
    "_trajectory_loss_native": trajectory_loss_plain.forward,
    "_trajectory_loss_native_backward": trajectory_loss_plain.backward,
    "_task_mask_gate_native": task_mask_plain.gate,
    "_task_mask_rectify_native": task_mask_plain.rectify,
    "_task_mask_mask__native": task_mask_plain.mask_,
    "_batch_norm_mask_relu_native": _normed,
    "_batch_norm_mask_relu_native_backward": _normed_backward,
    "_efficient_routing_native": _efficient,
    "_efficient_routing_native_backward": _efficient_backward,
    "_vector_routing_native": _vector,
    "_vector_routing_native_backward": _vector_backward,
    "_matrix_routing_native": _matrix,
    "_soft_assignment_native": _assignment,
    "_soft_assignment_native_backward": _assignment_backward,
}


PRIOR = 1 + Parameters._fields.index("prior")  # among the arguments of efficient routing

#: Where C++ reads parameters and statistics of any dtype, and empty batches; PyTorch's batch norm does not.
TAKES_MORE = ("_batch_norm_mask_relu_native", "_batch_norm_mask_relu_native_backward")


def written(name: str) -> list[int]:
    """Where arguments are that the op writes."""
    schema = torch._C._jit_get_schemas_for_operator(f"fastroute::{name}")[0]
    return [k for k, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def outcome(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Results, and what was written."""
    given = _copied(args)
    made = call(*given)
    return [t for t in tree_leaves((made, [given[k] for k in written(name)])) if isinstance(t, Tensor)]


def compare(name: str, args: tuple[Any, ...], found: Sequence[Tensor]) -> None:
    """What an accepted call gave against the reference."""
    if name not in REFERENCE:
        return
    try:
        expected = outcome(name, REFERENCE[name], args)
    except RuntimeError:
        if name not in TAKES_MORE:
            raise
        return
    if name != "_matrix_routing_native":
        assert len(found) == len(expected), f"{name}: {len(found)} results, not {len(expected)}"
    for k, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours.numel() == 0 or theirs.numel() == 0:
            continue
        assert ours.numel() == theirs.numel(), f"{name}: result {k}"
        assert ours.dtype == theirs.dtype or name in TAKES_MORE, f"{name}: result {k}"
        ours = ours.reshape(theirs.shape)
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs), f"{name}: result {k}"
        elif ours.dtype == theirs.dtype == F64:
            kept = theirs.isfinite()
            assert_same(ours[kept], theirs[kept], f"{name}: result {k}")


# ------------------------------------------------------------------------------------------------------------- changes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
          torch.uint8, torch.int8, torch.bool, torch.complex64)  # fmt: skip
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (0.0, -1.0, 1.0, 0.5, float("nan"), float("inf"), 1e300)


def _grown(t: Tensor, dim: int, by: int) -> Tensor:
    return t.narrow(dim, 0, t.shape[dim] - 1) if by < 0 else torch.cat([t, t.narrow(dim, 0, 1)], dim)


def _spread_out(t: Tensor) -> Tensor:
    """The same values, two apart."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _with_value(t: Tensor, at: int, value: int) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    t.view(-1)[at % t.numel()] = value
    return t


def changed_tensor(draw: random.Random, t: Tensor, others: Sequence[Tensor]) -> Any:
    """Another tensor in its place: dtype, sizes, strides, device, values, none at all, another argument's."""
    if is_freed(t):
        return t
    ways: list[str] = ["dtype", "none", "meta", "extra axis", "other", "scalar"]
    ways += ["fewer", "more", "empty", "expanded", "freed", "all axes"] if t.dim() and t.numel() else []
    ways += ["strided", "transposed"] if t.dim() > 1 and t.numel() else []
    ways += ["value", "value", "value"] if t.dtype == torch.int64 and t.numel() else []
    way = draw.choice(ways)
    dim = draw.randrange(t.dim()) if t.dim() else 0
    if way == "value":
        return _with_value(t, draw.randrange(t.numel()), draw.choice(INTEGERS))
    made: dict[str, Callable[[], Any]] = {
        "dtype": lambda: t.to(draw.choice(DTYPES)),
        "none": lambda: None,
        "meta": lambda: t.to("meta"),
        "extra axis": lambda: t[None],
        "other": lambda: draw.choice(list(others)),
        "scalar": lambda: t.sum().to(t.dtype),
        "fewer": lambda: _grown(t, dim, -1),
        "more": lambda: _grown(t, dim, 1),
        "empty": lambda: t.narrow(dim, 0, 0),
        "expanded": lambda: t.narrow(dim, 0, 1).expand(t.shape),
        "freed": lambda: freed(t),
        "all axes": lambda: t.flatten(),
        "strided": lambda: _spread_out(t),
        "transposed": lambda: t.mT.contiguous().mT,
    }
    return made[way]()


def changed_list(draw: random.Random, items: Sequence[Any], others: Sequence[Tensor]) -> Any:
    items = list(items)
    way = draw.choice(["empty", "fewer", "more", "item", "item", "item"])
    if way == "empty" or not items:
        return items[:0] if items else [draw.choice(list(others))]
    if way == "fewer":
        return items[:-1]
    if way == "more":
        return [*items, items[-1]]
    at = draw.randrange(len(items))
    new = changed(draw, items[at], others)
    return items[:at] + ([] if new is None else [new]) + items[at + 1 :]


def changed(draw: random.Random, value: Any, others: Sequence[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return changed_tensor(draw, value, others)
    if isinstance(value, (list, tuple)):
        return changed_list(draw, value, others)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice(FLOATS)
    return draw.choice(list(others))  # for what was None


def described(name: str, args: Any) -> str:
    return f"{name} {mapped(lambda t: f'{t.dtype} {tuple(t.shape)} {t.stride()} {t.device}', args)}"


def fuzz(calls: int, trace: int | None = None) -> tuple[int, int]:
    """So many calls; how many of them raised, and how many were compared."""
    draw, valid = random.Random(seeds.BASE), valid_calls()
    ops = sorted(valid)
    counts = {"raised": 0, "accepted": 0}

    def one() -> None:
        name = draw.choice(ops)
        args = list(_copied(draw.choice(valid[name])))
        others = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(args))
            args[at] = changed(draw, args[at], others)
        prior = args[PRIOR] if name.startswith("_efficient") else None
        if isinstance(prior, Tensor) and prior.dtype == F64 and not is_freed(prior):
            args[PRIOR] = prior.abs()  # of weights with signs the open ones can sum to nothing
        if trace is not None:
            line = described(name, args).encode()
            os.pwrite(trace, line, 0)
            os.ftruncate(trace, len(line))
        try:
            found = outcome(name, getattr(torch.ops.fastroute, name), tuple(args))
        except Exception:
            counts["raised"] += 1
            return
        counts["accepted"] += 1
        devices = {t.device.type for t in (*tree_leaves(args), *found) if isinstance(t, Tensor)}
        assert len(devices) == 1, f"{name}: accepted tensors on {devices}"
        if devices == {"meta"}:
            return
        compare(name, tuple(args), found)

    for _ in range(calls):
        one()
    return counts["raised"], counts["accepted"]


if __name__ == "__main__":
    if len(sys.argv) > 3:
        from tests.ops.vector_routing.cpp_cases import load

        load(sys.argv[3])
    raised, accepted = fuzz(int(sys.argv[1]), os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY))
    print(f"{raised} raised, {accepted} as the reference")
