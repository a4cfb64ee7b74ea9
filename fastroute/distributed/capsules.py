"""Capsule layers over several processes: each has some of the input vectors and their parameters.

The M-step of an iteration is a sum over input vectors, and the E-step sees one of them at a time. So every rank routes
its own ones, and the ranks add up [n_out, d_inp + 1] numbers per iteration. ``docs/distributed.md`` has the derivation.
Axes: B batch, T iterations, n input vectors in all, k of this rank, m output vectors, d width of an input vector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ..capsules import DefinableVectorRouting, EfficientVectorRouting, GenerativeMatrixRouting, SlotAttention
from ..capsules.stream import Chunks, Ranks, stream
from ..compat import heinsen_routing
from ..functional import efficient_routing, vector_routing
from ..ops import checks
from ..ops.arguments import checked
from ..ops.autograd import asked_again, through
from ..ops.backends import choose, requested
from ..ops.efficient_routing import passes
from ..ops.efficient_routing.contract import Parameters
from ..ops.efficient_routing.outputs import LATER, outputs, predictions
from ..ops.efficient_routing.passes import STEP_NAMES, prepared
from ..ops.efficient_routing.reference import norm
from ..ops.host import may_look
from ..ops.masked import only, reaches
from ..ops.precision import autocast_off, autocast_precision
from ..ops.vector_routing.op import case_of, gates, row_is_live
from .agreement import agree
from .row_definable import RowShardedDefinable
from .row_layers import RowSharded, RowShardedMatrixRouting, RowShardedRouting2019, RowShardedSlots
from .row_sums import Rows, local, shared, shared_by_rows, total

__all__ = ["RowShardedCapsules", "RowShardedVectorRouting"]

#: Parameters with a row per input vector, where n_inp is fixed.
_ROWS = ("W_A", "B_A", "W_S", "B_S", "beta_use", "beta_ign")
_NOT_PLAIN = (
    "module: expected the layer's submodules (compute_beta_use, compute_beta_ign, N, f, log_f, softmax) as they were "
    "made, without hooks, parametrizations and adapters, got others, which have to be called on whole input vectors"
)


def _shared_rows(w: Parameters, n_iters: int, group: dist.ProcessGroup) -> Parameters:
    """With n_inp = -1 all rows share the parameters: their gradients are summed over ranks in one all-reduce."""
    if w.bias_use is None or not torch.is_grad_enabled():
        return w
    names = [k for k in STEP_NAMES if getattr(w, k).requires_grad and not (n_iters == 1 and k in LATER)]
    if not names:
        return w
    made = shared_by_rows([getattr(w, k) for k in names], group)
    return w._replace(**dict(zip(names, made, strict=True)))


# -------------------------------------------------------------------------------------------------- the iterations


class _Call(NamedTuple):
    """What a rank gives to a routing over all ranks, beside its vectors and parameters."""

    scale: Tensor  # [B] acc, of all vectors
    mask: Tensor | None  # [B, k, m] bool
    lengths: Tensor | None  # [B] int64, how many of this rank's vectors are live
    n_iters: int
    normalize: bool
    precision: str
    backend: str
    group: dist.ProcessGroup

    def of(self, x: Tensor, w: Parameters) -> passes.Call:
        kernel = choose(case_of(x, w.W_F1.shape[0]), self.backend)
        chunks = (passes.Chunk(0, None, x, self.mask, self.lengths, kernel),)
        form = passes.first_form(w, whole=True, masked=self.mask is not None)
        of_all = partial(total, group=self.group)
        return passes.Call(lambda: chunks, True, form, self.scale, self.n_iters, self.normalize, self.precision, of_all)


def _differentiable(call: _Call, x: Tensor, w: Parameters) -> Tensor:
    """The same of ops that autograd and torch.compile know, collectives included."""
    acc, device = call.scale.dtype, x.device.type
    live = None if call.lengths is None else row_is_live(x, call.lengths)
    with autocast_off(device):
        xs = only(x, live).to(acc)
        gate = only(gates(xs, w.W_A.to(acc), w.B_A.to(acc), call.scale).sigmoid(), live)
    pred: Tensor | None = None
    for t in range(call.n_iters):
        M, p = vector_routing(
            x, gate, pred, w.W_S, w.B_S, w.beta_use, w.beta_ign, use_bias=w.bias_use, ign_bias=w.bias_ign,
            prior=w.prior.to(acc), mask=call.mask, lengths=call.lengths,
        )  # fmt: skip
        M, p = total(M, p, group=call.group)
        with autocast_off(device):
            y = outputs(M, p, call.scale, w)
            if t + 1 < call.n_iters:
                pred = shared(predictions(y, w).P, call.group, "the predictions' gradient")
    with autocast_off(device):
        return norm(y) if call.normalize else y


class _Route(torch.autograd.Function):
    """All iterations on the fused passes of one process, whose sums go over all ranks."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *w: Tensor | None) -> Tensor:
        with autocast_off(x.device.type):
            y, saved = passes.forward(call.of(x, parameters := Parameters._make(w)), parameters)
        ctx.call = call._replace(mask=None, lengths=None)
        ctx.save_for_backward(call.mask, call.lengths, x, *w, *saved.gates, *saved[1:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mask, lengths, x, *rest = ctx.saved_tensors
        call = ctx.call._replace(mask=mask, lengths=lengths)
        given, saved = rest[: len(Parameters._fields)], rest[len(Parameters._fields) :]
        needs = ctx.needs_input_grad[1:]
        if asked_again(dy):

            def plain(x: Tensor, *w: Tensor) -> list[Tensor]:
                return [_differentiable(call, x, Parameters(*w))]

            return None, *through(plain, (x, *given), needs, [dy])
        w = Parameters(*given)
        wants = dict(zip(Parameters._fields, needs[1:], strict=True))
        dx = torch.empty_like(x) if needs[0] else None
        with autocast_off(x.device.type):
            found = passes.backward(
                call.of(x, w), w, passes.Saved(saved[:1], *saved[1:]), dy.to(call.scale.dtype),
                want_rows=any(wants[k] for k in STEP_NAMES), dx=dx,
            )  # fmt: skip
        unused = ("prior", *(LATER if call.n_iters == 1 else ()))
        grads = (found[k].to(t.dtype) if wants[k] and k not in unused else None for k, t in zip(wants, w, strict=True))  # type: ignore[union-attr]
        return None, dx, *grads


def _route(call: _Call, x: Tensor, w: Parameters) -> Tensor:
    """[B, m, h] in the dtype of sums, the same on all ranks."""
    if torch.compiler.is_compiling():
        return _differentiable(call, x, w)
    return _Route.apply(call, x, *w)


# ------------------------------------------------------------------------------------------------------- the layer


class RowShardedVectorRouting(RowSharded, EfficientVectorRouting):
    """An ``EfficientVectorRouting`` whose input vectors, with their parameters, are divided over the ranks of a mesh.

    ``parallelize_module`` makes it by ``RowShardedCapsules``. All parameters are DTensors under their own names: those
    with a row per input vector are ``Shard(0)``, the others ``Replicate()``. Results are those of the layer in one
    process to rounding, on every rank.
    """

    row_parameters = _ROWS
    output_axes = (None,)

    @classmethod
    def refuses(cls, module: Any) -> Exception | None:
        """Also parametrizations, and submodules that have to be called."""
        if (error := super().refuses(module)) is not None:
            return error
        names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
        if "parametrizations" in module._modules or names - {*Parameters._fields, "weight", "bias"}:
            return ValueError("module: expected no parametrizations; remove them, or shard first")
        return None if module._is_plain() else ValueError(_NOT_PLAIN)

    def _own(self, name: str, t: Any, axis: int) -> tuple[Tensor, int | None]:
        x, n = super()._own(name, t, axis)
        wide = x if x.shape[-2] else x.new_empty((*x.shape[:-2], 1, x.shape[-1]))
        checks.input_vectors(wide, self.n_inp if self._rows.ranks == 1 else -1, self.d_inp, self.W_A.device)
        if n == 0:
            raise ValueError(f"x_inp: expected at least 1 input vector, got 0 (x_inp is {checks.shown(x)})")
        return x, n

    def _can_be_sharded(self) -> None:
        super()._can_be_sharded()
        if self.return_dict:
            raise ValueError("return_dict: expected False, got True: no rank has whole [n_inp, n_out] arrays")
        if not self._is_plain():
            raise ValueError(_NOT_PLAIN)

    def _is_plain(self) -> bool:
        return self._looks_plain((DTensor,))

    def _local_parameters(self) -> Parameters:
        return Parameters(*map(local, self._parameters_by_name()))

    def forward(
        self, x_inp: Tensor, mask: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Route the input vectors of all ranks to x_out [..., n_out, d_out].

        Args:
            x_inp: this rank's input vectors [..., k, d_inp], a local tensor: with n_inp fixed, k is what
                ``torch.chunk`` would give this rank of n_inp, and 0 on a rank past the end; with n_inp = -1 any number,
                none included. Or all of them, [..., n_inp, d_inp]: as a DTensor, or as a tensor that is the same on all
                ranks if the style's ``input_layouts`` is ``Replicate()``.
            mask: bool, True = input i may not reach output j, for this rank's vectors: broadcastable to
                [..., k, n_out]; or for all of them, [..., n_inp, n_out], where their number is known.
            lengths: integers, one per sample, the same on all ranks: how many vectors each sample has in all. Vectors
                from there on are padding, on whichever rank they are.

        Returns:
            x_out, the same on all ranks: local tensors or DTensors as the style says, float32 under autocast.

        Raises:
            ValueError, TypeError: naming the argument. In the first call, and in every call under ``fastroute.strict``,
                the ranks compare what they were given: if it cannot go together, all of them raise.
        """
        found, n, mask, lengths = self._compared({"x_inp": (x_inp, -2)}, mask, lengths, {}, self.n_out)
        x = found["x_inp"]
        mask = None if mask is None else checks.as_mask(mask, x.shape[:-2], x.shape[-2], self.n_out)
        made: Tensor = self._returned(self._routed(x, n, mask, lengths))
        return made

    def _routed(self, x_inp: Tensor, n: int | None, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        """x_out [..., m, h] of local tensors."""
        *batch, k, d = x_inp.shape
        B = prod(batch)
        w = self._local_parameters()
        x = x_inp.reshape(B, k, d)
        if mask is not None and k:
            x = only(x, reaches(mask))
        precision = autocast_precision(x.device.type)
        dtype, w = prepared(x.dtype, w, precision)
        x = x.to(dtype)
        out = torch.promote_types(dtype, w.W_F2.dtype)
        if B == 0 or self._rows.ranks == 1:
            x_out = efficient_routing(x, w, n_iters=self.n_iters, normalize=self.normalize, mask=mask, lengths=lengths)
            return x_out.reshape(*batch, self.n_out, self.d_out)
        in_all, before = self._rows.places(n, k, x.device)
        if isinstance(in_all, Tensor) and may_look(in_all):
            in_all, before = int(in_all), int(before)
            if in_all == 0:
                raise ValueError("x_inp: expected at least 1 input vector on some rank, got none")
            if lengths is not None:
                checks.as_lengths(lengths, (B,), in_all, x.device)
        acc = torch.promote_types(dtype, torch.float32)
        if lengths is not None:
            scale = (lengths if isinstance(in_all, int) else lengths.minimum(in_all)).clamp(min=1).to(acc).rsqrt()
            lengths = (lengths - before).clamp(0, k)
        elif isinstance(in_all, Tensor):
            scale = in_all.clamp(min=1).to(acc).rsqrt().expand(B)
        else:
            scale = torch.full((B,), in_all**-0.5, dtype=acc, device=x.device)
        if k == 0:  # one vector that is past every sample's length: nothing is read of it
            x, w, mask = torch.cat([x, x.new_zeros((B, 1, d))], 1), _with_a_row(w), None
            lengths = torch.zeros(B, dtype=torch.int64, device=x.device)
        x = x if x.stride(-1) == 1 or d == 1 else x.contiguous()
        w = _shared_rows(w, self.n_iters, self._rows.group)
        call = _Call(scale, mask, lengths, self.n_iters, self.normalize, precision, requested(), self._rows.group)
        return _route(call, x, w).to(out).reshape(*batch, self.n_out, self.d_out)

    def stream(
        self,
        chunks: Chunks,
        *,
        n: int | None = None,
        rows: int | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        buffer: bool = False,
    ) -> Tensor:
        """As ``EfficientVectorRouting.stream``: each rank gives the chunks of its own input vectors.

        Args:
            chunks: of this rank's vectors; a rank that has none gives an empty tensor [..., 0, d_inp].
            n: how many vectors this rank has.
            mask: of this rank's vectors.
            lengths: as in ``forward``, of each sample's vectors in all.
            rows, buffer: as in one process.

        Returns:
            x_out [..., n_out, d_out], the same on all ranks.

        Raises:
            ValueError, TypeError: as in one process; before the first pass, all ranks raise if one does.
        """
        group, named = self._rows.group, f"{type(self).__name__}.stream"
        placed: list[bool] = []
        own = None if self.n_inp == -1 else self._rows.of(self.n_inp)[1]
        empty = own == 0 if own is not None else getattr(chunks, "shape", (1, 1))[-2:-1] == (0,)

        def place(count: int, batch: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int]:
            placed.append(True)
            agree(
                {"leading dimensions of chunks": batch, "dtype of chunks": dtype, "lengths": lengths,
                 "gradient mode": torch.is_grad_enabled(), "autocast": autocast_precision(w.W_A.device.type)},
                group, layer=named,
            )  # fmt: skip
            count = 0 if empty else count
            in_all, before = (
                int(t) for t in self._rows.places(None if self.n_inp == -1 else self.n_inp, count, w.W_A.device)
            )
            if in_all == 0:
                raise ValueError("chunks: expected at least 1 input vector on some rank, got none")
            return in_all, before, count

        try:
            self._can_be_sharded()
            w = self._local_parameters()
            ranks = None if self._rows.ranks == 1 else Ranks(place, partial(total, group=group))
            n_inp = -1 if own is None else own
            if empty:  # as in forward
                nothing = w.W_A.new_zeros((*getattr(chunks, "shape", ())[:-2], 1, self.d_inp))
                chunks = nothing.to(getattr(chunks, "dtype", None)) if isinstance(chunks, Tensor) else nothing
                n, rows, mask, w, n_inp = None, None, None, _with_a_row(w), -1
            if ranks is not None:
                w = _shared_rows(w, self.n_iters, group)
            return stream(
                w, chunks, n_inp=n_inp, n_iters=self.n_iters, normalize=self.normalize, n=n, rows=rows, mask=mask,
                lengths=lengths, buffer=buffer, ranks=ranks,
            )  # fmt: skip
        except Exception as error:
            if not placed:
                agree({"stream": error}, group, layer=named)
            raise


def _with_a_row(w: Parameters) -> Parameters:
    """A rank without vectors has parameters of none; kernels take one or more."""
    if w.bias_use is not None:
        return w
    return w._replace(**{k: torch.cat([t := getattr(w, k), t.new_zeros((1, *t.shape[1:]))]) for k in _ROWS})


# ------------------------------------------------------------------------------------------------------- the style

#: By class: what a layer becomes.
KINDS: dict[type[nn.Module], type[RowSharded]] = {
    EfficientVectorRouting: RowShardedVectorRouting,
    GenerativeMatrixRouting: RowShardedMatrixRouting,
    heinsen_routing.GenerativeMatrixRouting: RowShardedMatrixRouting,
    heinsen_routing.Routing: RowShardedRouting2019,
    SlotAttention: RowShardedSlots,
    DefinableVectorRouting: RowShardedDefinable,
}


class RowShardedCapsules(ParallelStyle):
    """Sharding of a capsule layer over a mesh dimension by its inputs.

    For ``torch.distributed.tensor.parallel.parallelize_module``. Every rank has about n / N of the inputs and, with
    n_inp fixed, of the parameters that belong to them (``Shard(0)``); it has all others (``Replicate()``). What an
    iteration sums over inputs is summed over ranks: one all-reduce forward (``GenerativeMatrixRouting``: two) and, but
    for the first one, one backward; their sizes do not depend on n. Heinsen (2022), "An Algorithm for Routing Vectors
    in Sequences", section 2; Heinsen (2019), section 2; Locatello et al. (2020), Algorithm 1.

    Layers: ``EfficientVectorRouting``, ``GenerativeMatrixRouting``, ``SlotAttention``, ``DefinableVectorRouting`` whose
    A, F and S treat each input vector alone, and those of ``fastroute.compat.heinsen_routing``.

    Args:
        input_layouts: ``Shard(-2)`` (default): tensors that are given are this rank's inputs. ``Replicate()``: they are
            all inputs, on every rank. DTensors of any layout are taken either way.
        output_layouts: ``Replicate()`` (default): every rank has all outputs. ``Shard(-2)``: each its own ones.
        use_local_output: return local tensors, not DTensors.
        row_parameters: of a ``DefinableVectorRouting``: names of parameters [n_inp, ...] in A, F and S, such as
            "F.weight", of which every rank has the rows of its inputs.

    Raises:
        TypeError, ValueError: at set-up, on all ranks: the module is none of these layers, has ``return_dict=True``, or
            hooks, adapters or parametrizations (``EfficientVectorRouting``), or parameters that inputs and outputs
            share; the mesh has several dimensions; the modules differ between ranks.

    Example::

        mesh = init_device_mesh("cuda", (8, 8), mesh_dim_names=("data", "sequence"))
        model = parallelize_module(model, mesh["sequence"], {"routing": RowShardedCapsules()})
        fully_shard(model, mesh=mesh["data"])
    """

    @checked
    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        row_parameters: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if not (layout is None or isinstance(layout, (Replicate, Shard))):
                raise TypeError(f"{name}: expected Shard(-2) or Replicate(), got {layout!r}")
        self.input_layouts = input_layouts or Shard(-2)
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output, self.row_parameters = use_local_output, tuple(row_parameters)

    def _check(self, module: nn.Module, mesh: DeviceMesh) -> type[nn.Module]:
        """What the layer becomes."""
        if mesh.ndim != 1:
            raise ValueError(f"device_mesh: expected one dimension, such as mesh['sequence'], got {mesh}")
        sharded = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
        if sharded:
            raise ValueError(f"module: expected parameters that are not sharded, got DTensors: {', '.join(sharded)}")
        kind = KINDS.get(type(module))
        if kind is None:
            known = ", ".join(dict.fromkeys(layer.__name__ for layer in KINDS))
            raise TypeError(
                f"module: expected one of {known}, got {type(module).__name__}, which cannot be sharded by its inputs; "
                "name the routing itself in parallelize_module's plan"
            )
        there = dict(module.named_parameters())
        for name in self.row_parameters:
            n = getattr(module, "n_inp", -1)
            if kind is not RowShardedDefinable or name not in there or n == -1 or there[name].shape[:1] != (n,):
                raise ValueError(
                    "row_parameters: expected names of parameters [n_inp, ...] of a DefinableVectorRouting with a "
                    f"fixed n_inp, got {name!r}"
                )
        problem = kind.refuses(module)
        if problem is not None:
            raise problem
        return kind

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        have: dict[str, object] = {}
        try:
            kind = self._check(module, device_mesh)
            named = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # functions of the user's
            have |= {"module": named, "input_layouts": self.input_layouts, "output_layouts": self.output_layouts}
            have |= {name: [t.dtype, t.shape, t.requires_grad] for name, t in module.named_parameters()}
            have |= {"use_local_output": self.use_local_output, "row_parameters": self.row_parameters}
        except Exception as error:
            have["module"] = error
        agree(have, device_mesh if device_mesh.ndim == 1 else None, layer=type(self).__name__)
        own, made = type(module), dict[int, Any]()
        module.__class__ = kind if kind is RowShardedVectorRouting else type(kind.__name__, (kind, own), {})
        layer: Any = module
        layer._rows = Rows(device_mesh, self.input_layouts, self.output_layouts, self.use_local_output)
        layer._more_rows = self.row_parameters
        for prefix, owner in list(layer.named_modules()):
            for name, t in (*owner._parameters.items(), *owner._buffers.items()):
                if t is None:
                    continue
                place = Shard(0) if layer.has_rows(f"{prefix}.{name}" if prefix else name) else Replicate()
                if id(t) not in made:  # tied ones stay so
                    whole = distribute_tensor(t.detach(), device_mesh, [place], src_data_rank=self.src_data_rank)
                    is_parameter = isinstance(t, nn.Parameter)
                    made[id(t)] = nn.Parameter(whole, requires_grad=t.requires_grad) if is_parameter else whole
                (owner._buffers if name in owner._buffers else owner._parameters)[name] = made[id(t)]
        return module
