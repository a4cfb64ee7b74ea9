"""Data parallel training of all families: what has to be the same on all ranks, and what they count together.

Axes: W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..multitask import Weighting
from ..networks import Decision, TopKGating
from ..networks.rewards import PerActionBaseReward, is_silent
from ..ops.arguments import checked
from ..ops.processes import Processes
from .agreement import agree, group_of
from .exchange import bounds_by_rank
from .experts import expert_parameters, of_one_rank

Model = TypeVar("Model", bound=nn.Module)


@checked
def prepare(
    model: Model,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    sync_rewards: bool = True,
    sync_load: bool = True,
    sync_losses: bool = True,
    unused_grad: Literal["none", "zeros"] = "zeros",
) -> Model:
    """Make a model ready for ranks that each have samples of their own; before DDP, ``fully_shard`` and torch.compile.

    All ranks have to call it, and from then on to call its decisions, gatings and weightings equally often, as they
    have to for gradients anyway. With one rank it changes nothing but ``unused_grad``.

    Args:
        model: of any family; changed in place.
        group: the ranks that have different samples, a process group or a mesh of one dimension; None: all.
        sync_rewards: per-action rewards see the actions of all ranks, see ``PerActionBaseReward.sync_rewards``.
        sync_load: ``TopKGating``'s losses and capacity are those of all ranks' samples as one batch.
        sync_losses: a multi-task ``Weighting`` sees, and remembers, the mean of all ranks' losses.
        unused_grad: "zeros": modules, heads and agents without a sample on this rank have gradients of zeros, as DDP
            and FSDP need: a rank without a gradient would leave the others waiting. "none": see ``Selection``.

    Returns:
        The model.

    Raises:
        ValueError: the ranks differ in modules, in parameters' shapes or dtypes, or in the masks of tasks, bit by bit;
            on all ranks. TypeError: a reward of one's own remembers actions in a way that cannot be told other ranks'.
            TypeError, ValueError: naming the argument.

    Example::

        model = prepare(Sequential(WPL(4, 8, additional_reward_func=CollaborationReward(0.3)), Selection(*modules)))
        ddp(model)
    """
    problem = next(_foreign(model), None) if sync_rewards else None
    agree({**_in_common(model), "rewards": "as known" if problem is None else problem}, group, layer="prepare")
    processes = Processes.of(group_of(group)) if dist.is_initialized() else None
    for m in model.modules():
        if hasattr(m, "unused_grad"):
            m.unused_grad = unused_grad  # type: ignore[assignment]
        if isinstance(m, Decision):
            _set_rewards(m.additional_reward_func, sync_rewards, processes)
            _set_unused(m, unused_grad)
        elif isinstance(m, TopKGating) and sync_load:
            m.load_group = processes
        elif isinstance(m, Weighting) and sync_losses:
            m.processes = processes
    return model


@checked
def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """``DistributedDataParallel(model, **options)``, which leaves alone what ``ExpertParallel`` has spread.

    Their gradients are means over the expert mesh already; over a data mesh beside it, ``ExpertParallel(replicas=...)``
    makes them so. Let go of the wrapper before ``destroy_process_group``: freed after its group, it can wait for ever
    (torch 2.13, gloo).

    Raises:
        ValueError: other parameters are DTensors, which DDP cannot replicate.
    """
    experts = {id(p) for p in expert_parameters(model)}
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and id(p) not in experts]
    if sharded:
        raise ValueError(
            f"ddp: expected parameters that are not sharded, got DTensors: {', '.join(sharded)}; replicate them with "
            'fully_shard(model, mesh=mesh["data"])'
        )
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in experts]
    names += [name for name, _ in model.named_buffers() if name.startswith(of_one_rank(model))]
    if names:
        names += [f".{name}" for name in names if "." not in name]  # as DDP calls what is the model's own
        before = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
    return DistributedDataParallel(model, **options)


@checked
def shard(model: Model, mesh: DeviceMesh, *, data: str = "data", expert: str = "expert", **options: Any) -> Model:
    """``fully_shard`` of a model on a mesh data x expert: experts over the data dimension, everything else over both.

    Args:
        model: after ``parallelize_module``.
        mesh: of two dimensions.
        data, expert: their names.
        options: ``fully_shard``'s: ``mp_policy``, ``offload_policy``, ``reshard_after_forward``.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has other dimensions, or ranks without experts [K, ...].
    """
    named = mesh.mesh_dim_names or ()
    if {data, expert} != set(named) or len(named) != 2:
        raise ValueError(f"mesh: expected two dimensions, {data!r} and {expert!r}, got {mesh}")
    experts, ranks = set(expert_parameters(model)), mesh[expert].size()
    for p in experts:
        if isinstance(p, DTensor) and len(set(bounds_by_rank(len(p), ranks))) <= ranks:
            raise ValueError(
                f"mesh: expected experts on every rank, as FSDP takes no empty parameters, got {len(p)} over {ranks} "
                "ranks, of which the last has none; use fewer, or ExpertParallel(replicas=...) and ddp"
            )
    fully_shard(model, mesh=mesh[data, expert]._flatten(), ignored_params=experts, **options)
    others = set(model.parameters()) - experts
    for m in model.modules():
        own = set(expert_parameters(m, recurse=False))
        if own:
            place = partial(_another_axis, ranks=mesh[data].size())
            fully_shard(m, mesh=mesh[data], ignored_params=others, shard_placement_fn=place, **options)
    return model


def _another_axis(p: nn.Parameter, ranks: int) -> Shard:
    """Experts [K, ...] are spread along the first axis; FSDP splits others only evenly."""
    if not isinstance(p, DTensor):
        return Shard(0)
    return Shard(next((axis for axis in range(1, p.dim()) if p.shape[axis] % ranks == 0), 0))


# ------------------------------------------------------------------------------------------------- what has to be equal


def _in_common(model: nn.Module) -> dict[str, object]:
    one_rank = {id(p) for p in expert_parameters(model)}
    spread = of_one_rank(model)
    modules, tensors, masks = [], [], dict[str, object]()
    for name, m in model.named_modules():
        if not name.startswith(spread):
            modules.append(f"{name}: {type(m).__name__}")
        for key, t in m.named_buffers(recurse=False):
            if key == "_unit_mapping":
                masks[f"masks of {name or type(m).__name__}"] = t
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(spread):
            shape = "on its rank" if id(p) in one_rank and not hasattr(p, "placements") else list(p.shape)
            tensors.append(f"{name} {str(p.dtype).removeprefix('torch.')} {shape}")
    return {"modules": modules, "parameters": tensors, **masks}


def _foreign(model: nn.Module) -> Iterator[Exception]:
    """Rewards that register actions in a way of their own."""
    known = PerActionBaseReward.register_all
    for name, m in model.named_modules():
        reward = getattr(m, "additional_reward_func", None) if isinstance(m, Decision) else None
        if reward is None or is_silent(reward):
            continue
        ours = type(reward).__module__ == PerActionBaseReward.__module__
        plain = (
            getattr(type(reward), "register_all", None) is known
            and type(reward).register is PerActionBaseReward.register
        )
        if not (ours or plain):
            yield TypeError(
                f"{name}.additional_reward_func: expected one of fastroute's rewards, or a subclass without register "
                f"and register_all of its own, got {type(reward).__name__}, which would see this rank's actions alone; "
                "sync_rewards=False lets it"
            )


def _set_rewards(reward: Any, sync: bool, processes: Processes | None) -> None:
    if isinstance(reward, PerActionBaseReward):
        reward.sync_rewards, reward.processes = sync and processes is not None, processes


class _Zeros(torch.autograd.Function):
    """A tensor, and zeros for the gradients of others."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(p.new_zeros(()).expand(p.shape) for p in ctx.saved_tensors)


def _set_unused(decision: Decision, unused_grad: str) -> None:
    """Agents that decide for no sample have gradients of zeros, by way of the batch that the decision returns."""
    if (handle := decision.__dict__.pop("_unused_hook", None)) is not None:
        handle.remove()
    if unused_grad == "zeros":
        decision.__dict__["_unused_hook"] = decision.register_forward_hook(_with_zeros)


def _with_zeros(decision: nn.Module, _: Any, made: Any) -> Any:
    own = [p for p in decision.parameters() if p.requires_grad]
    if not own or not torch.is_grad_enabled() or not made[0].is_floating_point():
        return made
    return (_Zeros.apply(made[0], *own), *made[1:])


__all__ = ["ddp", "prepare", "shard"]
