"""A list of modules, one for each sample: modules of one kind run as one, others by one sort and a slice each.

Axes: B samples, K modules.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import grouped_linear
from ..importing import not_compiled
from ..modules.reading import Memo, Proof, may_be_read, signature
from ..ops import dispatch, host
from ..ops.autograd import is_observed, transformed
from ..ops.dispatch.contract import Plan
from ..ops.grouped_linear import op as grouped_linear_op
from ..ops.grouped_linear.op import of_alike, planned
from ..ops.masked import only
from .mlp import MLP
from .sorted_rows import SortedRows

#: What acts on every element (or every sample) alone and has no parameters.
_FREE: frozenset[type] = frozenset({
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink,
    nn.Softshrink, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
})  # fmt: skip
#: Functions of the same kind, as nonlinearities of an MLP.
_FREE_FUNCTIONS: frozenset[Any] = frozenset({
    F.relu, F.relu6, F.gelu, F.silu, F.tanh, F.sigmoid, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.softplus,
    F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.tanhshrink, F.hardshrink, F.softshrink,
    torch.relu, torch.tanh, torch.sigmoid, torch.selu, torch.sin, torch.cos, torch.exp, torch.abs, torch.square,
})  # fmt: skip
_NORMS: frozenset[type] = frozenset({nn.LayerNorm, nn.RMSNorm, nn.GroupNorm})
#: Unfolded images beyond so many bytes go image by image through their own convolution.
_UNFOLDED_BYTES = 1 << 26
#: On a CPU the norms of so few modules are called one by one.
_NORMS_APART = 8
#: On a CPU, of a module's images on the average: patches win by sparing calls (``bench/calibrate_thresholds.py``).
_UNFOLDED_BYTES_OF_A_MODULE = 1 << 17

Leaf = nn.Module | Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu",
    F.relu: "relu", F.tanh: "tanh", F.sigmoid: "sigmoid", F.silu: "silu",
    torch.relu: "relu", torch.tanh: "tanh", torch.sigmoid: "sigmoid",
}  # fmt: skip


def _activation(leaf: Any) -> str | None:
    """What ``grouped_linear`` calls it, if it can make it along with the product."""
    if type(leaf) is nn.GELU:
        return "gelu" if leaf.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(type(leaf) if isinstance(leaf, nn.Module) else leaf)


def _sequence(m: Any) -> list[Any]:
    return [child for child in m._modules.values() if child is not None]


def _perceptron(m: Any) -> list[Any]:
    layers = _sequence(m._layers)
    return [part for layer in layers[:-1] for part in (layer, m._nonlin)] + layers[-1:]


#: What a module of a class calls, one after the other, and nothing else.
CHAINS: dict[type, Callable[[Any], list[Any]]] = {nn.Sequential: _sequence, MLP: _perceptron}


class _Seen(NamedTuple):
    """The modules that were looked at, and those of whom the class was enough."""

    read: list[Any]
    others: list[Any]


def _leaves(m: Any, into: list[Leaf], seen: _Seen) -> bool:
    """Append what a module does, in order; False if that cannot be told, or the module has to be called."""
    if not isinstance(m, nn.Module):
        into.append(m)
        return m in _FREE_FUNCTIONS
    kind = type(m)
    if not (kind in CHAINS or kind is nn.Linear or kind is nn.Conv2d or kind in _NORMS or kind in _FREE):
        seen.others.append(m)
        return False
    seen.read.append(m)
    if not may_be_read(m):
        return False
    if kind in CHAINS:
        seen.read.extend(child for child in m._modules.values() if type(child) is nn.ModuleList)
        return all(_leaves(part, into, seen) for part in CHAINS[kind](m))
    into.append(m)
    return True


@dataclass
class _Stage:
    """The same step of every module."""

    leaves: list[Any]
    kind: str = field(init=False)  #: "linear", "conv", "norm" or "free"
    device: torch.device | None = field(init=False)  #: where the parameters are: those of offloaded modules are not
    then: _Stage | None = None  #: an activation that is made along with it

    def __post_init__(self) -> None:
        kind = type(self.leaves[0])
        self.kind = (
            "linear" if kind is nn.Linear else "conv" if kind is nn.Conv2d else "norm" if kind in _NORMS else "free"
        )
        self._owners: list[dict[str, Any]] = [] if self.kind == "free" else [leaf._parameters for leaf in self.leaves]
        self.device = (
            next((p.device for p in self._owners[0].values() if p is not None), None) if self._owners else None
        )

    def fits(self) -> bool:
        """Whether all leaves do the same, with parameters of the same shapes, which can be done together."""
        first: Any = self.leaves[0]
        kind = type(first)
        if not isinstance(first, nn.Module):
            return all(leaf is first for leaf in self.leaves)
        if any(type(leaf) is not kind for leaf in self.leaves):
            return False
        if kind is nn.Linear:
            if first._parameters["weight"] is None:
                return False
        elif kind is nn.Flatten:
            if first.start_dim < 1:  # type: ignore[operator]
                return False
        elif kind is nn.Conv2d:
            weight: Any = first._parameters["weight"]
            plain = first.groups == 1 and first.padding_mode == "zeros" and not isinstance(first.padding, str)
            if not plain or weight is None or weight.shape[-2:] != first.kernel_size:
                return False
        elif getattr(first, "return_indices", False):
            return False
        same = signature(first)
        return all(signature(leaf) == same for leaf in self.leaves[1:])

    @property
    def activation(self) -> str:
        """What follows it, in the words of ``grouped_linear``."""
        return "none" if self.then is None else _activation(self.then.leaves[0]) or "none"

    def parameters(self, name: str) -> list[Tensor]:
        first = self._owners[0].get(name)
        return [] if first is None else [d[name] for d in self._owners]


class _Made(NamedTuple):
    """What was found out about a list of modules, and why that is still so."""

    proof: Proof
    stages: list[_Stage] | None


class Recipe(Memo):
    """What a list of modules has in common, worked out once and proved at every call."""

    known: _Made | None

    def stages(self, modules: list[Any]) -> list[_Stage] | None:
        """The steps that all modules have in common; None where they differ, are not known, or have to be called."""
        if torch.compiler.is_compiling() or transformed():  # a graph is guarded by what it reads, not by a memo
            return self._found(modules, _Seen([], []))
        made = self.known
        if made is None or not made.proof.holds(modules):
            seen = _Seen([], [])
            stages = self._found(modules, seen)
            made = self.known = _Made(Proof(modules, *seen), stages)
        return made.stages

    def _found(self, modules: list[Any], seen: _Seen) -> list[_Stage] | None:
        return _stages(modules, seen)


def are_alike(modules: Sequence[nn.Module]) -> bool:
    """Whether they do the same with parameters of the same shapes, so that they can run together."""
    return _stages(modules, _Seen([], [])) is not None


def _stages(modules: Sequence[nn.Module], seen: _Seen) -> list[_Stage] | None:
    rows: list[list[Leaf]] = []
    for m in modules:
        leaves: list[Leaf] = []
        if not _leaves(m, leaves, seen) or (rows and len(leaves) != len(rows[0])):
            return None
        rows.append(leaves)
    made: list[_Stage] = []
    for column in zip(*rows, strict=True):
        stage = _Stage(list(column))
        if not stage.fits():
            return None
        if made and made[-1].kind in ("linear", "conv") and made[-1].then is None and _activation(column[0]):
            made[-1].then = stage
        else:
            made.append(stage)
    return made or None


class _Flow:
    """A batch on its way through the stages: in the plan's order or in its own.

    A row is a sample before the first stage, and one of the plan's entries after it.
    """

    def __init__(self, x: Tensor, plan: Plan, keep_empty: bool) -> None:
        self.x, self.rows, self.keep_empty, self.is_sorted, self.unfolds = x, SortedRows(plan), keep_empty, False, False

    @property
    def plan(self) -> Plan:
        return self.rows.plan

    def sort(self) -> None:
        if not self.is_sorted:
            self.x, self.is_sorted = self.rows.sort(self.x), True
            self._spread()

    def _spread(self) -> None:
        """Rows are entries from now on."""
        if self.plan.samples is not None:
            self.rows.plan = self.plan._replace(samples=None, per_sample=1)

    def unsort(self) -> None:
        if self.is_sorted:
            self.x, self.is_sorted = self.rows.unsort(self.x), False

    def _rows(self, per_sample: int) -> Plan:
        """The plan of sorted rows, with so many rows for each sample."""
        if per_sample == 1:
            return self.plan
        bounds = None if self.plan.bounds is None else [b * per_sample for b in self.plan.bounds]
        return self.plan._replace(offsets=self.plan.offsets * per_sample, bounds=bounds)

    def linear(self, stage: _Stage, stay_sorted: bool) -> None:
        shape = self.x.shape
        weights, biases = stage.parameters("weight"), stage.parameters("bias")
        if len(shape) == 2:
            K, F = weights[0].shape[0] if weights[0].dim() == 3 else len(weights), weights[0].shape[-1]
            self.x = of_alike(
                self.x, self.plan, weights, biases, K, F, stage.activation, self.is_sorted, stay_sorted, self.keep_empty
            )
            self.is_sorted = stay_sorted
            self._spread()
            return
        self.sort()
        per_sample, shape = shape[1:-1].numel(), self.x.shape
        flat = self.x.reshape(shape[0] * per_sample, shape[-1])
        made = grouped_linear(
            flat, self._rows(per_sample), weights, biases, activation=stage.activation, is_sorted=True,
            keep_sorted=True, keep_empty=self.keep_empty,
        )  # fmt: skip
        self.x = made.reshape(*shape[:-1], made.shape[-1])

    def _unfolded_bytes(self) -> int:
        """The most that a convolution's patches may take."""
        if not self.x.is_cpu or self.unfolds or torch.compiler.is_compiling() or transformed():
            return _UNFOLDED_BYTES
        return min(_UNFOLDED_BYTES, (self.plan.offsets.shape[0] - 1) * _UNFOLDED_BYTES_OF_A_MODULE)

    def conv(self, stage: _Stage) -> bool:
        """By the patches that it sees, one product for all modules; False where those would take too much."""
        m: Any = stage.leaves[0]
        B, (C, H, W) = self.plan.order.shape[0], self.x.shape[1:]  # of entries, which are samples where k is 1
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip((H, W), m.padding, m.dilation, m.kernel_size, m.stride, strict=True)
        ]
        patch, pixels = C * m.kernel_size[0] * m.kernel_size[1], sizes[0] * sizes[1]
        if host.is_exporting():  # for any number of samples
            if transformed():
                return False
        elif B * pixels * patch * self.x.element_size() > self._unfolded_bytes():
            return False
        self.unfolds = True
        self.sort()
        patches = F.unfold(self.x, m.kernel_size, m.dilation, m.padding, m.stride).mT
        weights = [w.flatten(-3) for w in stage.parameters("weight")]
        made = grouped_linear(
            patches.reshape(B * pixels, patch), self._rows(pixels), weights, stage.parameters("bias"),
            activation=stage.activation, is_sorted=True, keep_sorted=True, keep_empty=self.keep_empty,
        )  # fmt: skip
        self.x = made.reshape(B, pixels, m.out_channels).mT.reshape(B, m.out_channels, *sizes)
        return True

    def norm(self, stage: _Stage) -> None:
        m: Any = stage.leaves[0]
        bounds = self.plan.bounds
        if (
            bounds is not None
            and len(bounds) - 1 == len(stage.leaves) <= _NORMS_APART
            and bounds[-1] > 0
            and not self.keep_empty
            and not is_observed(self.x)
        ):
            self.sort()
            parts = [m(rows) for m, rows in zip(stage.leaves, _slices(self.x, bounds), strict=True) if len(rows)]
            if bounds[-1] < self.x.shape[0]:
                parts.append(parts[0].new_zeros(self.x.shape[0] - bounds[-1], *self.x.shape[1:]))
            self.x = torch.cat(parts)
            return
        if self.plan.samples is not None:
            self.sort()
        if isinstance(m, nn.GroupNorm):
            y = F.group_norm(self.x, m.num_groups, None, None, m.eps)
            shape = (m.num_channels, *[1] * (y.dim() - 2))
        else:
            plain = F.layer_norm if isinstance(m, nn.LayerNorm) else F.rms_norm
            y = plain(self.x, m.normalized_shape, eps=m.eps)
            shape = (*[1] * (y.dim() - 1 - len(m.normalized_shape)), *m.normalized_shape)
        dtype = y.dtype  # whatever autocast lets a norm give on this device
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            tables = stage.parameters(name)
            if tables:
                own = grouped_linear(
                    None, self.plan, (), [t.reshape(-1, math.prod(shape)) for t in tables],
                    is_sorted=self.is_sorted, keep_sorted=self.is_sorted, keep_empty=self.keep_empty,
                )  # fmt: skip
                y = combine(y, own.reshape(y.shape[0], *shape))
        self.x = y.to(dtype)


def kept(plan: Plan, rows: int) -> Tensor | None:
    """[rows] bool: the entries that match a module; None where they all do and seeing that costs nothing."""
    if plan.bounds is not None and plan.bounds[-1] == rows:
        return None
    sorted_kept = torch.arange(rows, device=plan.order.device) < plan.offsets[-1]
    return torch.empty_like(sorted_kept).index_copy(0, plan.order, sorted_kept)


def _has_module(plan: Plan, samples: int) -> Tensor | None:
    """[B] bool: the samples with an entry that matches a module; None as of :func:`kept`."""
    found = kept(plan, samples * plan.per_sample)
    return found if found is None or plan.per_sample == 1 else found.view(samples, plan.per_sample).any(1)


def run(
    modules: list[Any],
    x: Tensor,
    plan: Plan,
    recipe: Recipe,
    *,
    keep_empty: bool = False,
    differentiable_twice: bool = False,
    called: Callable[[], Sequence[Callable[[Tensor], Tensor]]] | None = None,
    inputs: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Every entry's sample through the module that the plan gives it; zeros for entries that match none.

    Modules that do the same with parameters of the same shapes (stacks of Linear, Conv2d, activations, norms, dropout)
    run together, if they may be read (see ``ops._modules``). Others are called one by one on contiguous slices, which
    on a GPU costs one read of the counts by the host.

    Args:
        modules: K of them.
        x: [B, ...].
        plan: of the B samples, N = B k entries.
        recipe: the same one at every call with these modules.
        keep_empty: see ``ops.grouped_linear``.
        differentiable_twice: only use what has a second derivative.
        called: gives what is called in place of the modules where these are not as many as the plan's.
        inputs: what all modules do to x before the first of their leaves sees it.

    Returns:
        [N, ...], entry n of sample n // k.
    """
    alike = None if differentiable_twice else recipe.stages(modules)
    return _run(modules, alike, x, plan, keep_empty, called, inputs)


def run_actions(
    modules: list[Any],
    x: Tensor,
    actions: Tensor,
    K: int,
    recipe: Recipe,
    *,
    keep_empty: bool = False,
    called: Callable[[], Sequence[Callable[[Tensor], Tensor]]] | None = None,
) -> tuple[Tensor, Plan]:
    """:func:`run` of actions [B] or [B, k] among K, and their plan: one call of C++ where no more is needed."""
    alike = recipe.stages(modules)
    made = None if alike is None or len(alike) > 1 else _planned(alike[0], x, actions, K, keep_empty)
    if made is not None:
        return made
    plan = dispatch.plan(actions, K)
    return _run(modules, alike, x, plan, keep_empty, called), plan


def _planned(stage: _Stage, x: Tensor, actions: Tensor, K: int, keep_empty: bool) -> tuple[Tensor, Plan] | None:
    if stage.kind != "linear" or actions.dim() != 1 or stage.device != x.device:
        return None
    if len(stage.leaves) > grouped_linear_op.MOST_PLANNED:  # before their parameters are listed
        return None
    return planned(x, actions, stage.parameters("weight"), stage.parameters("bias"), K, stage.activation, keep_empty)


def _run(
    modules: list[Any],
    alike: list[_Stage] | None,
    x: Tensor,
    plan: Plan,
    keep_empty: bool,
    called: Callable[[], Sequence[Callable[[Tensor], Tensor]]] | None,
    inputs: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    if alike is not None and (keep_empty or not _is_one(x, plan)):
        made = _together(alike, x if inputs is None else inputs(x), plan, keep_empty)
        if made is not None:
            return made
    wanted = keep_empty and torch.is_grad_enabled() and not transformed()
    others = [p for m in modules for p in m.parameters() if p.requires_grad] if wanted else []
    y = one_by_one(modules if called is None else called(), x, plan)
    return _WithZeros.apply(y, *others) if others else y


def _is_one(x: Tensor, plan: Plan) -> bool:
    """Whether there is one entry, whose module is called on it: nothing to sort, and nothing that others share."""
    return plan.bounds is not None and x.shape[0] == plan.order.shape[0] == plan.bounds[-1] == 1 and not is_observed(x)


def _together(alike: list[_Stage], x: Tensor, plan: Plan, keep_empty: bool) -> Tensor | None:
    """The stages, one after the other; None where one of them would rather not."""
    where = x.device
    for stage in alike:
        if stage.device is not None and stage.device != where:
            return None
    if alike[0].kind in ("norm", "free"):  # the others leave dropped samples out themselves
        x = only(x, _has_module(plan, x.shape[0]))
    flow = _Flow(x, plan, keep_empty)
    last = -1  # the last stage with parameters
    for i, stage in enumerate(alike):
        if stage.kind != "free":
            last = i
    for i, stage in enumerate(alike):
        if stage.kind == "linear":
            flow.linear(stage, i < last)
        elif stage.kind == "norm":
            flow.norm(stage)
        elif stage.kind == "conv":
            if flow.x.dim() != 4 or not flow.conv(stage):
                return None
        else:
            leaf = stage.leaves[0]
            if i < last or last < 0:
                flow.sort()  # also a copy, for modules that work in place
            flow.x = leaf(flow.x)
        if i == last:
            flow.unsort()
    flow.unsort()
    if alike[-1].kind != "linear":
        flow.x = only(flow.x, kept(plan, flow.x.shape[0]))
    return flow.x


def up_to_the_last(
    modules: list[Any], x: Tensor, plan: Plan | None, recipe: Recipe, inputs: Callable[[Tensor], Tensor], *,
    alone: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], bool] | None:  # fmt: skip
    """Everything but a last Linear, for an op that has it in itself.

    Args:
        modules, x, recipe, inputs: as of :func:`run`.
        plan: of the samples; None: the first module has them all.
        alone: only where the Linear is all there is.

    Returns:
        (what it is given, its weights, its biases, whether that is what modules are given); None where the modules
        differ, or end in something else.
    """
    alike = recipe.stages(modules)
    if alike is None or alike[-1].kind != "linear" or alike[-1].then is not None or (alone and len(alike) > 1):
        return None
    head, before = alike[-1], alike[:-1]
    made: Tensor | None = (x := inputs(x))
    if before and plan is not None:
        made = _together(before, x, plan, False)
    elif plan is None:
        for stage in before:
            made = stage.leaves[0](made)
            made = made if stage.then is None else stage.then.leaves[0](made)
    return None if made is None else (made, head.parameters("weight"), head.parameters("bias"), not before)


class _WithZeros(torch.autograd.Function):
    """The first tensor, with a gradient of zeros for the others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.others = others
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.others)


def one_by_one(modules: Sequence[Callable[[Tensor], Tensor]], x: Tensor, plan: Plan) -> Tensor:
    """``run``, every module called with its own samples; in an exported program, or a trace, with all of them."""
    rows, N, is_one = SortedRows(plan), plan.order.shape[0], _is_one(x, plan)
    sorted_x = x.clone() if is_one else rows.sort(x)  # which modules may change in place
    if host.is_exporting() or host.is_traced():
        return _all_by_all(modules, sorted_x, plan)
    if host.is_many(plan.offsets):
        return _of_all(modules, sorted_x, plan)
    bounds = dispatch.bounds_of(plan)
    slices = _slices(sorted_x, bounds)
    made: dict[int, Tensor] = {}
    for k, m in enumerate(modules):
        if bounds[k] < bounds[k + 1]:
            made[k] = m(slices[k])
            if not isinstance(made[k], Tensor) or made[k].dim() == 0 or len(made[k]) != bounds[k + 1] - bounds[k]:
                raise ValueError(f"module {k}: expected an output with a row per sample, got {_shown(made[k])}")
    if not made:  # nothing but the shape is asked for
        like = _like(modules[0], x)
        return torch.zeros(N, *like.shape[1:], dtype=like.dtype, device=like.device)
    first = next(iter(made))
    for k, y in made.items():
        if y.shape[1:] != made[first].shape[1:]:
            raise ValueError(
                f"modules: expected outputs of one shape, module {first} gives {list(made[first].shape[1:])} "
                f"per sample, module {k} {list(y.shape[1:])}"
            )
    parts = list(made.values())
    if bounds[-1] < N:
        parts.append(parts[0].new_zeros(N - bounds[-1], *parts[0].shape[1:]))
    return parts[0] if is_one else rows.unsort(torch.cat(parts) if len(parts) > 1 else parts[0])


@not_compiled
def _like(m: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a module gives for samples like x, in shape, dtype and device.

    A copy without hooks is called, of tensors without numbers: the module itself counts no batch that it did not see.
    It is called without samples where that is not possible.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with eager, FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            with FakeCopyMode(mode):
                m_like = copy.deepcopy(m)
            for part in m_like.modules() if isinstance(m_like, nn.Module) else ():
                part._forward_hooks.clear()
                part._forward_pre_hooks.clear()
            y = m_like(torch.empty(2, *x.shape[1:], dtype=x.dtype, device=x.device))
    except Exception:  # of modules that cannot be copied, or read numbers
        y = m(x[:0])
    if not isinstance(y, Tensor) or y.dim() == 0:
        raise ValueError(f"module 0: expected an output with a row per sample, got {_shown(y)}")
    return y


def _slices(x: Tensor, bounds: list[int]) -> Sequence[Tensor]:
    """Each module's rows, which it may change in place.

    Of a split the gradient is made once, of slices once for each. A safe split's parts may not be changed in place.
    """
    if is_observed(x):
        return [x[a:b] for a, b in pairwise(bounds)]
    parts: Sequence[Tensor] = x.unsafe_split_with_sizes([b - a for a, b in pairwise([*bounds, x.shape[0]])])
    return parts[:-1]


def _all_by_all(modules: Sequence[Callable[[Tensor], Tensor]], sorted_x: Tensor, plan: Plan) -> Tensor:
    """Every module called with all rows, zeros for those of others: no shape of it depends on the actions."""
    if any(getattr(part, "training", False) for m in modules if isinstance(m, nn.Module) for part in m.modules()):
        raise ValueError(
            "modules: expected eval mode to export or trace modules that cannot run together, each of which gets all "
            "rows, got training; call eval() first"
        )
    ids = dispatch.module_of_row(plan.offsets, plan.order.shape[0])
    y: Tensor | None = None
    for k, m in enumerate(modules):
        made = m(only(sorted_x, ids == k))
        y = only(made, ids == k, 0 if y is None else y)
    assert y is not None
    return torch.zeros_like(y).index_copy(0, plan.order, y)


def _of_all(modules: Sequence[Callable[[Tensor], Tensor]], x: Tensor, plan: Plan) -> Tensor:
    """The same where counts are many at a time: every module is called, which is right for a single row only."""
    if plan.order.shape[0] != 1:
        raise RuntimeError(
            "actions: expected one sample in each call under torch.vmap over actions, as modules that are not alike, "
            f"or have to be called, are given their own samples alone; got {plan.order.shape[0]}"
        )
    module, y = dispatch.module_of_row(plan.offsets, 1), None
    for k, m in enumerate(modules):
        made = only(m(only(x, module == k)), module == k)
        y = made if y is None else y + made
    assert y is not None
    return y


def _shown(y: object) -> str:
    return str(list(y.shape)) if isinstance(y, Tensor) else type(y).__name__
