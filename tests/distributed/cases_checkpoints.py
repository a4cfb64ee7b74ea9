"""Checkpoints of every sharding here, resumed in another one. See ``tests/distributed/ranks.py``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import fastroute
from fastroute.distributed import Checkpoints, RowShardedCapsules, full_state_dict, load_full_state_dict
from fastroute.multitask.weighting import WEIGHTINGS
from tests.distributed.cases_capsules import D, N, full, layer, own, same, vectors
from tests.distributed.ranks import World, case, folder


class Model(nn.Module):
    """A module of each kind that keeps something: sharded capsules, plain parameters, a weighting that remembers."""

    def __init__(self, n_inp: int) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.norm = nn.LayerNorm(D, dtype=torch.float64)
        self.routing = layer(n_inp)
        self.weighting = fastroute.multitask.DWA(2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.routing(self.norm(x)).square().mean()


def model(world: World, size: int, n_inp: int, wrapped: bool = False) -> Model:
    made = Model(n_inp)
    parallelize_module(
        made, world.rows(size), {"routing": RowShardedCapsules(), "norm": SequenceParallel(use_local_output=True)}
    )
    return fully_shard(made, mesh=world.meshes[size]["data"]) if wrapped else made


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, number: int) -> None:
    optimizer.zero_grad()
    loss = module(x)
    losses = torch.stack([loss.detach(), 2 * loss.detach()])
    (loss * (1 + number)).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    module.weighting(losses)
    optimizer.step()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Which divides by no less than eps, so that rounding of a small gradient stays as small."""
    return torch.optim.AdamW(module.parameters(), lr=0.1, eps=0.1)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: full(t).detach().clone() for k, t in module.state_dict().items()}


@case
def resumed_in_another_sharding(world: World) -> None:
    for n_inp in (N, -1):
        x = vectors()
        alone = Model(n_inp)
        optimizer = adam(alone)
        expected = []
        for number in range(4):
            step(alone, optimizer, x, number)
            expected.append(state(alone))
        with folder(world) as path:
            for number, (size, wrapped, asynchronous) in enumerate(
                ((4, False, False), (2, True, True), (1, True, False), (2, False, True))
            ):
                module = model(world, size, n_inp, wrapped)
                optimizer = adam(module)
                checkpoints = Checkpoints(path, {"model": module}, optimizer)
                assert checkpoints.load() == (number or None)
                step(module, optimizer, own(x, world, size), number)
                same(state(module), expected[number])
                checkpoints.save(number + 1, asynchronous=asynchronous)
                with torch.no_grad():  # what was copied is what is saved
                    for p in module.parameters():
                        p.zero_()
                checkpoints.wait()
                dist.barrier()
                assert checkpoints.steps() == list(range(max(1, number), number + 2))
            one = Model(n_inp)  # in one process, without a group
            assert Checkpoints(path, {"model": one}, adam(one)).load() == 4
            same(state(one), expected[3])


@case
def one_process_state_dicts(world: World) -> None:
    for size, wrapped in ((1, True), (2, False), (2, True), (4, False)):
        for n_inp in (N, -1):
            plain = Model(n_inp)
            module = model(world, size, n_inp, wrapped)
            found = full_state_dict(module)
            if world.rank == 0:
                same(dict(found), dict(plain.state_dict()))
                plain.load_state_dict(found)
            else:
                assert not found
            given = {k: t + 1 for k, t in Model(n_inp).state_dict().items()}
            load_full_state_dict(module, given if world.rank == 0 else {})
            same(state(module), given)


def keeping() -> dict[str, nn.Module]:
    """What knows something that training has found out, beside weights."""
    torch.manual_seed(8)
    made: dict[str, nn.Module] = {name: kind(3) for name, kind in WEIGHTINGS.items()}
    made["gating"] = fastroute.TopKGating(4, D, k=2, bias_balancing=0.1)
    made["policy"] = fastroute.WPL(4, num_agents=2, policy_storage_type="tabular")
    made["router"] = fastroute.TaskRouter(8, 3, 0.5, "router")
    return made


@case
def weightings_and_routers(world: World) -> None:
    """What they know is there after a resumed run, whether or not a process group is."""
    modules = keeping()
    known = {name: dict(module.state_dict()) for name, module in modules.items()}
    draw = torch.Generator().manual_seed(9)
    for name, found in known.items():
        for t in found.values():
            if name == "router":  # zeros and ones
                t.copy_(1 - t)
            else:
                t.copy_(torch.rand(t.shape, generator=draw) if t.is_floating_point() else torch.ones_like(t))
    expected = {name: {k: t.clone() for k, t in found.items()} for name, found in known.items()}
    with folder(world) as path:
        Checkpoints(path, modules).save(3)
        for _ in range(2):
            fresh = keeping()
            assert Checkpoints(path, fresh).load() == 3
            for name, module in fresh.items():
                same(dict(module.state_dict()), expected[name], rtol=0, atol=0)
