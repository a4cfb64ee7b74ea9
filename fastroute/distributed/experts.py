"""Modules of a layer spread over the ranks of a mesh, to which samples are sent: expert parallelism.

Lepikhin et al. 2021, "GShard" (arXiv 2006.16668), section 3. Axes: W ranks of the mesh, B samples of one of them, k
modules that each takes, N = B k entries, K modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from inspect import isclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn.utils import stateless

from ..functional import combine, expert_ffn
from ..modules.reading import at_every_place
from ..networks import MoE, Selection, Stack, grouped_modules
from ..networks.gating import Routed
from ..ops import checks, dispatch
from ..ops.arguments import checked
from ..ops.autograd import transformed
from ..ops.backends import is_strict
from ..ops.dispatch.contract import Plan
from ..ops.precision import autocast_dtype
from ..ops.processes import Processes
from .agreement import agree
from .dispatchers import AllToAll, Dispatcher, Local, Place, lost
from .exchange import bounds_by_rank, mean_gradient, part, placed, rows_of_all, sum_of, whole

_AXES = 8  #: of a module's output, at most, that ranks without a module can be told


class ExpertParallel(ParallelStyle):
    """A style for ``parallelize_module``: the modules of a ``Selection`` or the experts of an ``MoE``, over ranks.

    Rank r of the mesh has the modules that ``torch.chunk`` would give it, none where there are more ranks than modules.
    Results are those of the one-process module with the samples of all ranks, in the order of ranks, as one batch:
    capacity and balance losses included, whose statistics are the mesh's.

    *Gradients.* With different samples on each rank (``input_layouts=Shard``) a module's gradient is the mean over
    ranks, of what each rank's loss gives: as DistributedDataParallel and FSDP make it for all other parameters, which
    remain theirs to reduce: the gating's and the shared experts' too. With the same samples on all ranks
    (``Replicate``, beside tensor-parallel neighbours) gradients are whole on every rank.

    *Parameters.* [K, ...] ones (an MoE's, a stacked Selection's) become DTensors, ``Shard(0)``. Modules with parameters
    of their own stay plain on their rank, under their names; the others' names are not in that rank's state dict. So
    ``torch.distributed.checkpoint`` saves and loads either on any number of ranks. :func:`whole_state_dict` has what
    one process would save, and :func:`load_full_state_dict` loads that.

    *Overlap.* The shared experts' two products are computed while samples travel there and back, in backward as well.

    Args:
        dispatcher: how samples travel, see ``Dispatcher``. None: :class:`AllToAll`.
        input_layouts: what the ranks have of the batch: ``Shard(dim)``: samples of their own, of any number;
            ``Replicate()``: all the same. With ``AllToAll`` each then takes its chunk, and results are gathered.
        output_layouts: of a DTensor output; None: the input's.
        use_local_output: return plain tensors; False: a DTensor, if a DTensor came.
        replicas: a mesh over which the modules are replicated with other samples, as ``mesh["data"]`` of a mesh data x
            expert: gradients are averaged over it too. None: whoever replicates them does it (``fully_shard``).

    Under ``fastroute.strict`` rows are counted on both sides, and a dispatcher that loses samples is an error on all
    ranks. torch.compile makes one graph of a layer whose modules are alike (set
    ``torch._dynamo.config.capture_scalar_outputs``, since the numbers of rows are read).

    Raises:
        TypeError: the module is no Selection or MoE, or its parameters cannot be split.
        ValueError: the ranks differ in modules, shapes, dtypes or options; on all of them, at set-up. In a call: the
            ranks' samples differ in size or dtype; on all of them.

    Example (``torchrun --nproc-per-node 2``)::

        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
        model = nn.Sequential(nn.Linear(16, 64), MoE(64, 128, num_experts=8))
        parallelize_module(model, mesh, {"1": ExpertParallel()})
    """

    @checked
    def __init__(
        self,
        *,
        dispatcher: Annotated[Dispatcher | None, None] = None,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        replicas: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.dispatcher = AllToAll() if dispatcher is None else dispatcher
        if not isinstance(self.dispatcher, Dispatcher) or isclass(dispatcher):
            raise TypeError(
                "dispatcher: expected an object with samples, send, receive, send_back and receive_back, got "
                f"{checks.given(dispatcher)}"
            )
        default: Placement = Shard(0) if self.dispatcher.samples == "own" else Replicate()
        self.input_layouts = default if input_layouts is None else input_layouts
        self.output_layouts = self.input_layouts if output_layouts is None else output_layouts
        for name, layout in (("input_layouts", self.input_layouts), ("output_layouts", self.output_layouts)):
            if not isinstance(layout, (Shard, Replicate)):
                raise TypeError(f"{name}: expected Shard(dim) or Replicate(), got {layout!r}")
        if self.dispatcher.samples == "all" and not isinstance(self.input_layouts, Replicate):
            raise ValueError(
                f"input_layouts: expected Replicate() with {type(self.dispatcher).__name__}, which takes the same "
                f"samples on all ranks, got {self.input_layouts}"
            )
        self.use_local_output, self.replicas = use_local_output, replicas

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> Any:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{_name(module)}: device_mesh: expected one dimension, as mesh['expert'], got {device_mesh.ndim}"
            )
        if isinstance(module, (_ParallelMoE, _ParallelSelection)):
            raise TypeError(f"{_name(module)}: expected a layer that is not spread yet, got one that is")
        what = _described(module, self)
        problem = _problem(module, device_mesh) or _other_ranks(self.replicas, device_mesh)
        agree(what if problem is None else {**what, "module": problem}, device_mesh, layer=_name(module))
        spread = _Shards(module, device_mesh, self)
        kind = _ParallelMoE if isinstance(module, MoE) else _ParallelSelection
        own = type(module)
        module.__class__ = type(f"ExpertParallel{own.__name__}", (kind, own), {"__doc__": own.__doc__})
        module._shards = spread
        source = getattr(self, "src_data_rank", 0)
        if isinstance(module, MoE):
            for name in ("w_gate_up", "w_down"):
                _split(module, name, device_mesh, source)
            if spread.samples == "own":
                module.gate.load_group = Processes.of(device_mesh.get_group())
        else:
            _keep_own(module, spread.place, device_mesh, source)
        return module


def _name(module: nn.Module) -> str:
    return f"ExpertParallel of {type(module).__name__}"


def _problem(module: nn.Module, mesh: DeviceMesh) -> Exception | None:
    """Why a module cannot be spread; all ranks then raise."""
    name = _name(module)
    if not isinstance(module, (MoE, Selection)):
        return TypeError(f"{name}: expected a Selection or an MoE, got {type(module).__name__}")
    if isinstance(module, MoE):
        for part_name in ("w_gate_up", "w_down"):
            p = module._parameters.get(part_name)
            if p is None or isinstance(p, DTensor):
                what = "one that is parametrized or pruned" if p is None else "a DTensor"
                return TypeError(f"{name}: {part_name}: expected a parameter [K, ...] that can be split, got {what}")
        return None
    modules = module._submodules
    if isinstance(modules, Stack):
        found = modules._tensors()
        for part_name, p in modules.pattern.named_parameters():
            if part_name not in found or "parametrizations" in part_name or isinstance(p, DTensor):
                return TypeError(f"{name}: {part_name}: expected a parameter [K, ...] that can be split")
        return None
    bounds, owners = bounds_by_rank(len(modules), mesh.size()), dict[int, tuple[int, int]]()
    for k, m in enumerate(modules):
        rank = max(r for r in range(mesh.size()) if bounds[r] <= k)
        for part_name, t in [*m.named_parameters(), *m.named_buffers()]:
            other = owners.setdefault(id(t), (k, rank))
            if other[1] != rank:
                return ValueError(
                    f"{name}: expected modules with tensors of their own, but {part_name} of module {k}, which goes to "
                    f"rank {rank}, is that of module {other[0]}, which goes to rank {other[1]}"
                )
    return None


def _other_ranks(replicas: DeviceMesh | None, mesh: DeviceMesh) -> Exception | None:
    """Gradients of different modules would be averaged if a rank of the mesh were among a rank's replicas."""
    if replicas is None:
        return None
    if not isinstance(replicas, DeviceMesh):
        return TypeError(f"replicas: expected a mesh, got {checks.given(replicas)}")
    if replicas.ndim != 1 or set(replicas.mesh.tolist()) & set(mesh.mesh.tolist()) != {dist.get_rank()}:
        return ValueError(
            f"replicas: expected another dimension of the mesh than the modules', as mesh['data'] beside "
            f"mesh['expert'], got {replicas} beside {mesh}"
        )
    return None


def _described(module: nn.Module, style: ExpertParallel) -> dict[str, object]:
    """What all ranks have to have in common."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    options = [module.extra_repr()]
    if isinstance(module, MoE):
        options += [module.gate.extra_repr()]
    return {
        "module": type(module).__name__,
        "submodules": [f"{n}: {type(m).__name__}" for n, m in module.named_modules()],
        "options": options,
        "parameters": [f"{n} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in tensors],
        "training": module.training,
        "dispatcher": type(style.dispatcher).__name__,
        "input_layouts": str(style.input_layouts),
    }


def _split(owner: nn.Module, name: str, mesh: DeviceMesh, source: int | None) -> None:
    p: Any = owner._parameters[name]
    made = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=source)
    owner._parameters[name] = nn.Parameter(made, p.requires_grad)


class _Elsewhere(nn.Module):
    """In the place of a module that another rank has."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def extra_repr(self) -> str:
        return f"on rank {self.rank}"

    def _load_from_state_dict(self, *args: Any) -> None:
        """Of what one process saved, this is not here."""

    def forward(self, *args: Any) -> Any:
        """There is nothing to call."""
        raise RuntimeError(f"this module is on rank {self.rank} of the mesh: call the layer")


@torch.no_grad()
def _keep_own(module: Selection, place: Place, mesh: DeviceMesh, source: int | None) -> None:
    """Let go of other ranks' modules; the own ones are those of rank ``source``."""
    modules = module._submodules
    if isinstance(modules, Stack):
        each: dict[int, nn.Parameter] = {}
        for m in modules.pattern.modules():
            for name, p in m._parameters.items():
                if p is None:
                    continue
                if id(p) not in each:
                    made = distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=source)
                    each[id(p)] = nn.Parameter(made, p.requires_grad)
                m._parameters[name] = each[id(p)]
        return
    if source is not None:
        group = mesh.get_group()
        for t in [*modules.parameters(), *modules.buffers()]:
            if not t.is_meta:
                dist.broadcast(t.detach(), group=group, group_src=source)
    for k in range(len(modules)):
        if k not in place.own:
            rank = next(r for r in range(place.ranks) if place.bounds[r] <= k < place.bounds[r + 1])
            modules[k] = _Elsewhere(rank)


# -------------------------------------------------------------------------------------------------------- the exchange


class _Shards:
    """What a spread layer knows of its ranks, and how its samples travel."""

    def __init__(self, module: Any, mesh: DeviceMesh, style: ExpertParallel) -> None:
        K = module.num_experts if isinstance(module, MoE) else len(module._submodules)
        group, W = mesh.get_group(), mesh.size()
        self.place = Place(group.group_name, mesh.get_local_rank(), W, bounds_by_rank(K, W), layer=_name(module))
        self.mesh, self.dispatcher = mesh, style.dispatcher
        self.input_layouts, self.output_layouts = style.input_layouts, style.output_layouts
        self.use_local_output = style.use_local_output
        self.samples = "all" if isinstance(style.input_layouts, Replicate) else "own"
        replicas = style.replicas
        self.replicas = 1 if replicas is None else replicas.size()
        self.replicas_group = "" if replicas is None else replicas.get_group().group_name
        self.shapes: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {}
        self.first = True

    def __deepcopy__(self, memo: Any) -> _Shards:
        made = _Shards.__new__(_Shards)
        made.__dict__.update(self.__dict__, shapes={})
        return made

    def meet(self, layer: nn.Module, given: dict[str, Any], batch: Any) -> None:
        """In a first call, and in every call under ``strict``: the ranks compare what they are called with.

        Whether this rank's modules are trained is known anew in each call. Where all ranks have the samples, nobody
        tells: each takes the others' to be.
        """
        trains = self.dispatcher.samples == "all" or any(p.requires_grad for p in _spread_here(layer))
        if trains != self.place.trains:
            self.place = replace(self.place, trains=trains)
        strict = is_strict()
        if torch.compiler.is_compiling() or transformed() or not (self.first or strict):
            return
        what: dict[str, object] = {"gradient mode": torch.is_grad_enabled()}
        what["autocast"] = str(autocast_dtype(self.mesh.device_type))
        B = batch.shape[:1] if isinstance(batch, Tensor) else None
        for name, t in given.items():
            if isinstance(t, Tensor):
                each = "one for each sample" if t.shape[:1] == B else f"{list(t.shape)} for {B} samples"
                what[name] = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape[1:])}, {each}"
            else:
                what[name] = "none" if t is None else type(t).__name__
        if self.samples == "all" and isinstance(batch, Tensor):
            what["number of samples"] = B
            what["gradient of the samples"] = batch.requires_grad
            what |= {"samples": batch, **given} if strict and not isinstance(batch, DTensor) else {}
        agree(what, self.mesh, layer=self.place.layer)
        self.first = False

    def through(
        self,
        x: Tensor,
        plan: Plan,
        run: Callable[[Tensor, Plan], Tensor],
        meanwhile: Callable[[], Any] = lambda: None,
        after: Callable[[Any], Any] = lambda made: made,
    ) -> tuple[Tensor, Any]:
        """([N, ...] of this rank's entries, zeros where the plan has none; what was made meanwhile).

        Args:
            x: [B, ...].
            run: (rows [M, ...], their plan) -> [M, ...] by this rank's modules.
            meanwhile, after: called while samples travel there, and with its result while they travel back.
        """
        place, dispatcher = self.place, self.dispatcher
        sent = dispatcher.send(x, plan, place)
        half = meanwhile()
        rows, modules = dispatcher.receive(sent)
        strict = is_strict() and not torch.compiler.is_compiling()
        if strict:
            self._check_received(plan, rows, modules)
        own = dispatch.plan(modules, max(len(place.own), 1))
        y = run(rows, own)
        if torch.compiler.is_compiling():  # or a rank without a row would drop collectives, whose results it never uses
            y = y + rows.reshape(-1)[:0].sum().to(y.dtype)
        dispatcher.send_back(y, sent)
        made = after(half)
        y = dispatcher.receive_back(sent)
        if strict:
            self._check_returned(plan, y)
        return placed(y, plan.order.narrow(0, 0, y.shape[0]), plan.order.shape[0]), made

    def _check_received(self, plan: Plan, rows: Tensor, modules: Tensor) -> None:
        place, own = self.place, self.place.own
        sent, done = plan.offsets.diff(), torch.zeros_like(plan.offsets[1:])
        named = modules[(modules >= 0) & (modules < len(own))]
        done[own.start : own.stop] = named.bincount(minlength=len(own))[: len(own)] if len(own) else 0
        mine = torch.cat([sent, done, sent.new_tensor([int(rows.shape[0] != modules.shape[0])])])
        sent, done, unequal = sum_of(mine, place.group).split([place.modules, place.modules, 1])
        if self.dispatcher.samples == "all":
            sent = sent // place.ranks
        what = "rows without a module" if int(unequal) else lost(sent, done, place)
        if what is not None:
            raise RuntimeError(f"{place.layer}: {type(self.dispatcher).__name__} lost samples: {what}")

    def _check_returned(self, plan: Plan, y: Tensor) -> None:
        counts = torch.cat([plan.offsets.new_tensor([y.shape[0]]), plan.offsets[-1:]])
        each = rows_of_all(counts, self.place.ranks, self.place.group).tolist()
        if wrong := [f"{b - a} of {b} of rank {rank}'s" for rank, (a, b) in enumerate(each) if a != b]:
            raise RuntimeError(
                f"{self.place.layer}: {type(self.dispatcher).__name__} lost samples on the way back: {', '.join(wrong)}"
            )

    def own_part(self, *tensors: Tensor | None) -> list[Any]:
        """This rank's chunk of what all have, where each is to send one."""
        place = self.place
        if not self._divides:
            return list(tensors)
        return [None if t is None else part(t, place.ranks, place.rank, place.group) for t in tensors]

    def all_parts(self, y: Tensor, rows: int) -> Tensor:
        """The opposite of a result."""
        place = self.place
        return whole(y, rows, place.ranks, place.rank, place.group) if self._divides else y

    @property
    def _divides(self) -> bool:
        return self.samples == "all" and self.dispatcher.samples == "own"

    def local(self, p: Tensor) -> Tensor:
        """A parameter as this rank computes with it, of whose gradient the mean is taken."""
        t: Tensor = p.to_local() if isinstance(p, DTensor) else p
        parts = self.place.ranks if self.samples == "own" else 1
        if not t.requires_grad or parts * self.replicas == 1:
            return t
        return mean_gradient(t, parts, self.replicas, self.replicas_group)

    def given(self, t: Any) -> Any:
        """What a layer is called with, as plain tensors in the layout it expects."""
        if not isinstance(t, DTensor):
            return t
        if t.device_mesh != self.mesh:
            raise ValueError(f"{self.place.layer}: expected a DTensor on {self.mesh}, got one on {t.device_mesh}")
        return t.redistribute(placements=[self.input_layouts]).to_local()

    def returned(self, y: Tensor, was: Any) -> Any:
        """What the layer gives for it."""
        if self.use_local_output or not isinstance(was, DTensor):
            return y
        made = DTensor.from_local(y, self.mesh, [self.input_layouts], run_check=False)
        return made.redistribute(placements=[self.output_layouts])

    def shape_of(self, rows: Tensor, y: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
        """An output row's shape and dtype on all ranks; y: None where there is no module. Told once for each input."""
        key = (*rows.shape[1:], rows.dtype, autocast_dtype(rows.device.type))
        if key not in self.shapes:
            self.shapes[key] = self._told(y, rows)
        return self.shapes[key]

    @torch.compiler.disable
    def _told(self, y: Tensor | None, rows: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        fact = [-1] * (_AXES + 2)
        if y is not None:
            own = y.shape[1:]
            if len(own) > _AXES or y.dtype not in dtypes:
                raise ValueError(f"{self.place.layer}: expected floating outputs of at most {_AXES + 1} axes")
            fact = [len(own), dtypes.index(y.dtype), *own, *[0] * (_AXES - len(own))]
        facts = rows_of_all(torch.tensor(fact, device=rows.device), self.place.ranks, self.place.group).tolist()
        there = {rank: told for rank, told in enumerate(facts) if told[0] >= 0}
        first = next(iter(there.values()))
        if any(told != first for told in there.values()):
            shown = ", ".join(f"{told[2 : 2 + told[0]]} {dtypes[told[1]]} on {rank}" for rank, told in there.items())
            raise ValueError(
                f"{self.place.layer}: modules: expected outputs of one shape and dtype, got by rank: {shown}"
            )
        return tuple(first[2 : 2 + first[0]]), dtypes[first[1]]


class _ParallelMoE(MoE):
    """An MoE whose experts are spread."""

    _shards: _Shards

    def forward(self, x: Any, mask: Any = None, *, return_aux: bool = False) -> Any:
        """As of the one-process layer; see :class:`ExpertParallel`."""
        shards = self._shards
        shards.meet(self, {"x": x, "mask": mask}, x)
        made = super().forward(shards.given(x), shards.given(mask), return_aux=return_aux)
        if return_aux:
            return shards.returned(made[0], x), made[1]
        return shards.returned(made, x)  # type: ignore[arg-type]

    def _mixture(self, x: Tensor, active: Tensor | None, routed: Routed) -> Tensor:
        shards, options = self._shards, {"activation": self.activation, "gated": self.gated}
        w_in, w_out = shards.local(self.w_gate_up), shards.local(self.w_down)
        own, actions, weights = shards.own_part(x, routed.actions, routed.weights)
        to = autocast_dtype(x.device.type)
        own = own if to is None or x.dtype == torch.float64 else own.to(to)
        plan = dispatch.plan(actions, self.num_experts)

        def run(rows: Tensor, of_rows: Plan) -> Tensor:
            if not w_in.shape[0]:
                return rows.new_zeros(rows.shape) + w_in.sum().to(rows.dtype) + w_out.sum().to(rows.dtype)
            return expert_ffn(rows, of_rows, None, w_in, w_out, **options)  # type: ignore[arg-type]

        shares = self.shared_experts > 0
        z, shared = shards.through(
            own,
            plan,
            run,
            (lambda: self._shared_hidden(x)) if shares else lambda: None,
            (lambda h: self._shared_out(h, active)) if shares else lambda made: made,
        )
        valid = (actions >= 0) & (actions < self.num_experts)
        y = shards.all_parts(combine(z.view(*actions.shape, z.shape[1]), weights, valid), x.shape[0])
        return y if shared is None else y + shared


class _ParallelSelection(Selection):
    """A Selection whose modules are spread."""

    _shards: _Shards

    def forward(self, batch: Any, meta: Any, actions: Any, mask: Any = None, *, weights: Any = None) -> Any:
        """As of the one-process layer; see :class:`ExpertParallel`."""
        given = self._shards.given
        self._shards.meet(self, {"actions": actions, "weights": weights, "mask": mask}, batch)
        as_given = actions
        y, meta, actions = super().forward(given(batch), meta, given(actions), given(mask), weights=given(weights))
        return self._shards.returned(y, batch), meta, as_given

    def stop_logging_and_get_selections(self, add_to_old: bool = False) -> list[int]:
        """As of the one-process layer, over all ranks, which all have to call it."""
        if self._log is not None:
            place, device = self._shards.place, self._shards.mesh.device_type
            taken = torch.tensor([k in self._log for k in range(place.modules)], dtype=torch.int64, device=device)
            self._log = {k for k, count in enumerate(sum_of(taken, place.group).tolist()) if count}
        return super().stop_logging_and_get_selections(add_to_old)

    def _of_one(self, batch: Tensor) -> Tensor:
        return self._run(batch, torch.zeros(batch.shape[0], dtype=torch.int64, device=batch.device))[0]

    def _routed(self, batch: Tensor, chosen: Tensor) -> tuple[Tensor, Plan]:
        plan = dispatch.plan(chosen, len(self._submodules))
        return self._on_plan(batch, plan), plan

    def _on_plan(self, batch: Tensor, plan: Plan) -> Tensor:
        shards, own = self._shards, plan
        if shards._divides:
            B, k, entries = batch.shape[0], plan.per_sample, plan.order.shape[0]
            whose = torch.empty_like(plan.order).index_copy(
                0, plan.order, dispatch.module_of_row(plan.offsets, entries)
            )
            (batch, mine) = shards.own_part(batch, whose.view(B, k))
            mine = torch.where(mine < len(self._submodules), mine, -1)
            own = dispatch.plan(mine[:, 0] if k == 1 else mine, len(self._submodules))
            y = shards.through(batch, own, self._on_rows)[0]
            return shards.all_parts(y.view(batch.shape[0], k, *y.shape[1:]), B).flatten(0, 1)
        return shards.through(batch, own, self._on_rows)[0]

    def _on_rows(self, rows: Tensor, plan: Plan) -> Tensor:
        shards, y = self._shards, None
        if len(shards.place.own):
            y = self._by_own(rows, plan)
        shape, dtype = shards.shape_of(rows, y)
        if y is None:  # a stack's parameters without a row still have a gradient
            ties = [shards.local(p).sum().to(dtype) for p in self._submodules.parameters() if isinstance(p, DTensor)]
            return sum(ties, rows.new_zeros(rows.shape[0], *shape, dtype=dtype))
        if y.shape[1:] != shape or y.dtype != dtype:
            raise ValueError(
                f"{shards.place.layer}: modules: expected outputs {list(shape)} {dtype} per sample, as before, got "
                f"{list(y.shape[1:])} {y.dtype}"
            )
        return y

    def _by_own(self, rows: Tensor, plan: Plan) -> Tensor:
        modules, shards = self._submodules, self._shards
        stack = modules if isinstance(modules, Stack) else None
        each: list[Any] = [modules[k] for k in shards.place.own] if stack is None else [stack.pattern]
        owner = nn.ModuleList(each)
        called = None if stack is None else partial(stack.each, len(shards.place.own))
        options: dict[str, Any] = {"keep_empty": self.unused_grad == "zeros", "called": called}
        named = dict(owner.named_parameters())
        own = {name: shards.local(p) for name, p in named.items()}
        if all(own[name] is p for name, p in named.items()):
            return grouped_modules.run(each, rows, plan, self._recipe, **options)
        with stateless._reparametrize_module(owner, at_every_place(owner, own)):
            return grouped_modules.run(each, rows, plan, self._recipe, **options)


# --------------------------------------------------------------------------------------------------------- whole models


def of_one_rank(model: nn.Module) -> tuple[str, ...]:
    """What the names of modules begin with that only one rank of a mesh has."""
    spread = ((name, m) for name, m in model.named_modules() if isinstance(m, _ParallelSelection))
    found = [name for name, m in spread if not isinstance(m._submodules, Stack)]
    return tuple(f"{name}._submodules.".removeprefix(".") for name in found)


@checked
def expert_parameters(model: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    """The parameters that :class:`ExpertParallel` has spread: this rank's share of them.

    Each rank has others, so whoever replicates a model leaves them out: ``fully_shard(..., ignored_params=set(...))``;
    ``fastroute.distributed.ddp`` and ``shard`` do it.
    """
    return (p for m in (model.modules() if recurse else (model,)) for p in _spread_here(m))


def _spread_here(m: nn.Module) -> Iterable[nn.Parameter]:
    """A layer's own, if it is a spread one."""
    if isinstance(m, _ParallelMoE):
        return m.w_gate_up, m.w_down
    return m._submodules.parameters() if isinstance(m, _ParallelSelection) else ()


@checked
def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What the same model in one process would save, on every rank's CPU, gathered from all ranks.

    All ranks that have a part of it have to call it. DTensors, of whatever style, come whole.
    """
    others = spread_modules(model)
    return {key: _whole(t) for key, t in model.state_dict().items() if key not in others} | others


def _whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


def _own_states(model: nn.Module) -> Iterator[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
    """For each spread selection, its ranks and what this rank's own modules save, by ``model``'s names."""
    for name, m in model.named_modules():
        if isinstance(m, _ParallelSelection):
            prefix = f"{name}._submodules." if name else "_submodules."
            yield m._shards.mesh.get_group(), m._submodules.state_dict(prefix=prefix)


def own_names(model: nn.Module) -> set[str]:
    """The names of :func:`spread_modules` that this rank's own modules have, but for tensors that all ranks share."""
    return {key for _, state in _own_states(model) for key, t in state.items() if not isinstance(t, DTensor)}


def spread_modules(model: nn.Module) -> dict[str, Tensor]:
    """What all ranks' own modules of spread selections save, on every rank's CPU, by ``model``'s names.

    Each rank has such modules under keys that other ranks lack. All ranks of the layers' meshes have to call it.
    """
    made: dict[str, Tensor] = {}
    for group, own in _own_states(model):
        each: list[dict[str, Tensor]] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(each, {key: _whole(t) for key, t in own.items()}, group=group)
        made |= {key: t for one in each for key, t in one.items()}
    return made


__all__ = ["AllToAll", "Dispatcher", "ExpertParallel", "Local", "Place", "expert_parameters", "whole_state_dict"]
