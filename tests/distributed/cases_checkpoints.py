"""Checkpoints of every sharding here, resumed in another one. See ``tests/distributed/ranks.py``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
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


@case
def a_state_dict_that_does_not_fit(world: World) -> None:
    """An error on all ranks; others than the first one's is not read."""
    for wrong in (3, {"weight": torch.ones(2, 3)}, {**training()[0].state_dict(), "more": torch.ones(1)}):
        with pytest.raises((ValueError, RuntimeError), match=r"expected a dict, got 3|issing key|nexpected key"):
            load_full_state_dict(training()[0], wrong if world.rank == 0 else None)  # type: ignore[arg-type]
    checkpoints = Checkpoints(__file__, training()[0])
    with pytest.raises(ValueError, match=r"raised FileExistsError.*on rank 0"):
        checkpoints.save(1)


def training() -> tuple[nn.Module, torch.optim.Adam]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2, dtype=torch.float64)
    return module, torch.optim.Adam(module.parameters(), lr=0.1)


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return module.weight.detach().clone()  # type: ignore[union-attr, operator]


@case
def optimizers_are_saved_as_they_are_and_loaded_whole(world: World) -> None:
    """A save makes no step, also before the first one; gradients, a state in part and frozen ones lose no moments."""
    straight = trained(*training(), steps=2)
    with folder(world) as path:
        module, optimizer = training()
        before = Checkpoints(path, module, optimizer)
        before.save(0)
        assert not optimizer.state and module.weight.grad is None
        same(trained(module, optimizer), trained(*training()), rtol=0, atol=0)
        before.save(1)

        def unused(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None: ...

        def with_gradients(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
            module(torch.ones(2, 3, dtype=torch.float64)).sum().backward()

        def in_part(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
            with_gradients(module, optimizer)
            module.weight.grad = None
            optimizer.step()

        def frozen(module: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
            module.weight.requires_grad_(False)

        for what in (unused, with_gradients, in_part, frozen):
            for step in (0, 1):
                module, optimizer = training()
                what(module, optimizer)
                assert Checkpoints(path, module, optimizer).load(step) == step
                assert module.weight.requires_grad == (what is not frozen)
                module.requires_grad_()
                same(trained(module, optimizer, 2 - step), straight, rtol=0, atol=0)


@case
def a_load_leaves_the_rest_as_it_was(world: World) -> None:
    """Gradients; where it fails state and rates, too. Each optimizer gets its own groups, also without a state."""
    with folder(world) as path:
        for number, kind in enumerate((torch.optim.SGD, torch.optim.Adam)):
            for loaded in (False, True):
                module, _ = training()
                rates = (0.3, 0.4) if loaded else (0.1, 0.2)
                optimizers = [kind([p], lr=lr) for p, lr in zip(module.parameters(), rates, strict=True)]
                module(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
                grads = [p.grad for p in module.parameters()]
                checkpoints = Checkpoints(path, module, optimizers)
                if loaded:
                    assert checkpoints.load(number) == number
                    assert [each.param_groups[0]["lr"] for each in optimizers] == [0.1, 0.2]
                else:
                    checkpoints.save(number)
                assert all(p.grad is grad for p, grad in zip(module.parameters(), grads, strict=True))
        module = nn.Linear(3, 2, bias=False)
        for optimizer in (
            torch.optim.Adam([module.weight]),
            torch.optim.SparseAdam([module.weight]),
        ):  # has no such step
            module.weight.grad = grad = torch.ones(2, 3)
            optimizer.state[module.weight] = state = {"known": 1}
            with pytest.raises((ValueError, RuntimeError), match=r"without bias|dense gradients"):
                Checkpoints(path, module, optimizer).load()
            assert module.weight.grad is grad and optimizer.state[module.weight] is state
            assert optimizer.param_groups[0]["lr"] == 0.001


class Says(nn.Linear):
    """With something to say of itself."""

    def __init__(self, more: Any) -> None:
        super().__init__(3, 2)
        self.more = more

    def get_extra_state(self) -> Any:
        return self.more

    def set_extra_state(self, state: Any) -> None:
        self.more = state


@case
def extra_states_come_back(world: World) -> None:
    """Of any kind, whatever the module says before the load; one that was not saved changes nothing."""
    kinds = [5, b"x", None, {}, [1, 2], {"a": 1}, [], "s", torch.ones(2), {"a": torch.ones(2)}, [torch.ones(1)]]
    with folder(world) as path:
        Checkpoints(path, {str(i): Says(said) for i, said in enumerate(kinds)}).save(1)
        for before in (kinds, [{"b": torch.zeros(3)}] * len(kinds), [torch.zeros(3)] * len(kinds), [0] * len(kinds)):
            modules = {str(i): Says(said) for i, said in enumerate(before)}
            assert Checkpoints(path, modules).load() == 1
            assert str([module.more for module in modules.values()]) == str(kinds)
        Checkpoints(path, {"a": nn.Linear(3, 2)}).save(99)
        module = Says(7)
        assert Checkpoints(path, {"a": module}).load() == 99 and module.more == 7


class Known:
    """Something with a state."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = state


@case
def more_comes_back_as_it_was(world: World) -> None:
    """Whatever keys and sizes it had before the load; tensors in whatever sharding; of fastroute 0.2.0, too."""
    module, _ = training()
    told = {3: Counter({1: 2}), "3": [1, {"a": None}], "seen": {"x": 0.5}, "t": [torch.ones(2), torch.zeros(0, 3)]}
    sharded = {"w": distribute_tensor(torch.arange(6.0).view(6, 1), world.rows(4), [Shard(0)])}
    with folder(world) as path:
        for step, asynchronous in enumerate((False, True)):
            checkpoints = Checkpoints(path, module, more={"told": Known(told), "none": Known({}), "w": Known(sharded)})
            checkpoints.save(step, asynchronous=asynchronous)
            checkpoints.wait()
            again = {"told": Known({}), "none": Known({"a": 1}), "w": Known({"w": torch.zeros(6, 1)})}
            if asynchronous:
                again |= {"told": Known({"t": [torch.ones(5)], "seen": {}, 3: 1}), "w": Known(dict(sharded))}
            assert Checkpoints(path, module, more=again).load() == step
            found, expected = again["told"].state, told
            assert str(found) == str(expected) and type(found[3]) is Counter and again["none"].state == {}
            same([*found["t"], full(again["w"].state["w"])], [*told["t"], torch.arange(6.0).view(6, 1)])
        old = {"modules": dict(module.state_dict()), "optimizers": {}, "step": torch.tensor(7)}
        save({**old, "more": {"told": {"a": 5, "t": torch.ones(2)}}}, checkpoint_id=path / "step-000000007")
        known = Known({"a": 0, "t": torch.zeros(2)})
        assert Checkpoints(path, module, more={"told": known}).load() == 7
        assert known.state["a"] == 5 and known.state["t"].tolist() == [1, 1]


@case
def a_run_that_goes_back(world: World) -> None:
    """What it saves stays and is loaded next; steps of another run, which was not loaded, are not in its way."""
    with folder(world) as path:
        module, _ = training()
        checkpoints = Checkpoints(path, module, keep=3)
        for step in (5, 10, 15):
            checkpoints.save(step)
        dist.barrier()
        with pytest.raises(ValueError, match=r"step: expected one after 15, which is in .*, got 6; load a step"):
            Checkpoints(path, module).save(6)
        dist.barrier()
        assert checkpoints.steps() == [5, 10, 15]
        again = Checkpoints(path, module, keep=2)
        assert again.load(10) == 10
        again.save(11, asynchronous=True)
        again.wait()
        dist.barrier()
        assert again.steps() == [10, 11] and again.load() == 11
        with pytest.raises(ValueError, match=r"step: expected one after 11, which is in .*, got 1; load a step up to"):
            again.save(1)  # of a run that counts anew
        with pytest.raises(ValueError, match="names: expected the same on every rank"):
            Checkpoints(path, nn.Linear(3 + world.rank, 2)).save(11)
        dist.barrier()
        assert again.steps() == [10, 11]
        again.save(12, asynchronous=True)
        again._saving.result()
        dist.barrier()
        Checkpoints(path, module, keep=1).save(13)
        again.wait()
        dist.barrier()
        assert again.steps() == [13]
