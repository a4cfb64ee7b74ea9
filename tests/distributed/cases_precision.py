"""Lower precision over ranks gives what one process gives that casts alike. See ``tests/distributed/ranks.py``.

One process takes every rank's samples by themselves, in the same dtypes, and averages the gradients in float32. What
then differs is where a gradient is rounded to bfloat16: each rank's part of it, or what several ranks' samples make.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.func import functional_call

import fastroute
from fastroute.distributed import ExpertParallel, RowShardedCapsules, ddp, prepare, shard, whole_state_dict
from fastroute.networks import MoE
from tests.distributed.cases_data_parallel import FAMILIES, RANKS, B, D
from tests.distributed.ranks import World, case

BF16 = torch.bfloat16
LR = 0.05
Loss = Callable[[nn.Module, Tensor, int], Tensor]


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = FAMILIES[name]().float()
    return prepare(model, sync_rewards=False, sync_load=False, sync_losses=False)


def batch() -> Tensor:
    return torch.randn(RANKS * B, D, generator=torch.Generator().manual_seed(4))


def of_rank(x: Tensor, rank: int) -> Tensor:
    return x[rank * B : (rank + 1) * B]


def call(model: nn.Module, x: Tensor, rank: int) -> Tensor:
    loss: Tensor = model(x, slice(rank, rank + 1))
    return loss


Masters = dict[str, tuple[Tensor, Tensor]]  #: by name: after a step, and how far rounding may have moved it


def one_process(model: nn.Module, parameters: torch.dtype | None, loss: Loss) -> Masters:
    """``parameters``: what they are cast to; None: autocast.

    Each of four parts of a gradient, and what is made of two of them together, is rounded to within 2^-9 of itself: at
    most eight roundings, and as many of what they are made of.
    """
    each = []
    for rank in range(RANKS):
        cast = {k: p.detach().to(parameters or p.dtype).requires_grad_() for k, p in model.named_parameters()}
        x = of_rank(batch(), rank)
        called = _Called(copy.deepcopy(model), lambda m, x=x, rank=rank: loss(m, x.to(parameters or x.dtype), rank))
        with torch.autocast("cpu", BF16, enabled=parameters is None):
            made: Tensor = functional_call(called, {f"inner.{k}": p for k, p in cast.items()}, ())
        made.backward()
        each.append({k: torch.zeros_like(p) if p.grad is None else p.grad.float() for k, p in cast.items()})
    parts = {k: torch.stack([g[k] for g in each]) for k, _ in model.named_parameters()}
    largest: dict[str, Tensor] = {}  # of a module and what is in it: terms that cancel in one gradient are in another
    for k, t in parts.items():
        owner = k.partition(".")[0]
        largest[owner] = torch.maximum(largest.get(owner, torch.zeros(())), t.abs().mean(0).amax())
    found: Masters = {}
    for k, p in model.named_parameters():
        found[k] = p.detach() - LR * parts[k].mean(0), LR * largest[k.partition(".")[0]] * 16 * 2**-9
    return found


class _Called(nn.Module):
    def __init__(self, inner: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.inner, self.loss = inner, loss

    def forward(self) -> Tensor:
        return self.loss(self.inner)


def train(model: nn.Module, own: nn.Module, world: World, autocast: bool, loss: Loss = call) -> None:
    optimizer = torch.optim.SGD(own.parameters(), lr=LR, foreach=False)
    with torch.autocast("cpu", BF16, enabled=autocast):
        made = loss(model, of_rank(batch(), world.rank), world.rank)
    made.backward()
    optimizer.step()
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in own.parameters() if p.grad is not None} == {torch.float32}


def same(found: dict[str, Any], expected: Masters, said: str) -> None:
    for key, (t, rounding) in expected.items():
        other = found[key]
        other = (other.full_tensor() if isinstance(other, DTensor) else other).detach()
        atol = float(rounding) + 2**-22 * float(t.abs().amax())  # the latter of the masters, in float32
        torch.testing.assert_close(other, t, rtol=0, atol=atol, msg=lambda m, key=key: f"{said}, {key}: {m}")


@case
def fsdp(world: World) -> None:
    mesh = world.rows(RANKS)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    for name in ("capsules", "networks", "tasks", "multitask", "weighting dwa", "weighting uncertainty"):
        expected = one_process(made(name), BF16, call)
        for offload in (False, True):
            model = made(name)
            options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
            fully_shard(model, mesh=mesh, mp_policy=policy, **options)  # type: ignore[call-overload]
            train(model, model, world, False)
            same(dict(model.state_dict()), expected, f"FSDP2, {name}, offload {offload}")


@case
def ddp_under_autocast(world: World) -> None:
    for name in ("capsules", "networks", "tasks", "multitask", "weighting dwa"):
        expected = one_process(made(name), None, call)
        model = made(name)
        train(ddp(model), model, world, True)
        same(dict(model.state_dict()), expected, f"DDP, {name}")


class Mixture(nn.Module):
    """A dense layer and a mixture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.dense, self.moe = nn.Linear(D, D), MoE(D, 8, 4, 2, shared_experts=1)

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        loss: Tensor = self.moe(self.dense(x)).float().square().mean()
        return loss


class Routing(nn.Module):
    """Vectors made of a sample, and a routing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.routing: Any = {
            "vectors": lambda: fastroute.EfficientVectorRouting(-1, 3, D, 4),
            "matrix": lambda: fastroute.GenerativeMatrixRouting(-1, 3, 1, D, 4, n_iters=2),
            "slots": lambda: fastroute.SlotAttention(3, D, 4, n_iters=2),
        }[kind]()
        self.kind = kind

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        """Input vectors of a rank, or all eight of one process."""
        v = x[:, None] * torch.arange(1, 9, dtype=x.dtype)[rows, None]
        if self.kind == "matrix":
            made = self.routing(v[..., 0], v[..., None, :])[1]
        elif self.kind == "slots":
            made = self.routing(v, torch.linspace(-1, 1, 12, dtype=x.dtype).view(3, 4))
        else:
            made = self.routing(v)
        loss: Tensor = made.float().square().mean()
        return loss


@case
def experts(world: World) -> None:
    expected = one_process(prepare(Mixture(), sync_load=False), BF16, call)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    for offload in (False, True):
        model = Mixture()
        parallelize_module(model, world.meshes[2]["rows"], {"moe": ExpertParallel()})
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
        shard(prepare(model), world.meshes[2], expert="rows", mp_policy=policy, **options)
        train(model, model, world, False)
        same(whole_state_dict(model), expected, f"experts, FSDP2, offload {offload}")
    expected = one_process(prepare(Mixture(), sync_load=False), None, call)
    model = Mixture()
    parallelize_module(model, world.meshes[2]["rows"], {"moe": ExpertParallel(replicas=world.meshes[2]["data"])})
    train(ddp(prepare(model)), model, world, True)
    same(whole_state_dict(model), expected, "experts, DDP under autocast")


@case
def inputs_over_ranks(world: World) -> None:
    """Samples over two groups, input vectors over two ranks of each."""
    data, rows = world.meshes[2]["data"], world.rows(2)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    group, half = data.get_local_rank(), slice(4 * rows.get_local_rank(), 4 * rows.get_local_rank() + 4)
    for kind in ("vectors", "matrix", "slots"):

        def whole(m: nn.Module, x: Tensor, rank: int) -> Tensor:
            made: Tensor = m(x, slice(0, 8))
            return made

        def own(m: nn.Module, x: Tensor, rank: int) -> Tensor:
            made: Tensor = m(x, half)
            return made

        for offload, autocast in ((False, False), (True, False), (False, True)):
            expected = one_process(Routing(kind), None if autocast else BF16, whole)
            model = Routing(kind)
            parallelize_module(model, rows, {"routing": RowShardedCapsules()})
            options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
            fully_shard(model, mesh=data, mp_policy=MixedPrecisionPolicy() if autocast else policy, **options)  # type: ignore[call-overload]
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, foreach=False)
            loss = torch.zeros(())
            for rank in (2 * group, 2 * group + 1):  # this group's samples are those of two ranks
                with torch.autocast("cpu", BF16, enabled=autocast):
                    loss = loss + own(model, of_rank(batch(), rank), rank) / 2
            loss.backward()
            optimizer.step()
            same(dict(model.state_dict()), expected, f"{kind}, offload {offload}, autocast {autocast}")
