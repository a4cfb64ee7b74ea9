"""All four families, data parallel, train to the weights of one process. See ``tests/distributed/ranks.py``.

Every rank has as many samples as the others, so that the mean of its losses is a share of the whole batch's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fastroute
from fastroute import networks
from fastroute.distributed import Checkpoints, ExpertParallel, RowShardedCapsules, ddp, prepare, shard
from fastroute.multitask import MTLModel
from fastroute.tasks import TaskRouter, set_task
from tests.distributed.cases_experts import message, same
from tests.distributed.ranks import World, case

F64, D, B = torch.float64, 6, 5  #: B samples on a rank
RANKS, STEPS = 4, 3


class Capsules(nn.Module):
    """A routing of vectors whose number is not fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = fastroute.EfficientVectorRouting(-1, 3, D, 4, n_iters=2)

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        loss: Tensor = (
            self.routing(x.unflatten(1, (1, D)).expand(-1, 4, D) * torch.arange(1, 5)[:, None]).square().mean()
        )
        return loss


class Routed(nn.Module):
    """Two decisions, of which the second has agents without a sample; rewards for what everybody does."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"exploration": 0.0, "approx_hidden_dims": (4,)}
        rewards = [fastroute.CollaborationReward(0.3, history_len=7), fastroute.RunningAverageCollaborationReward(0.5)]
        self.net = networks.Sequential(
            networks.QLearning(3, D, additional_reward_func=rewards[0], **options),
            networks.Selection(*(nn.Linear(D, D) for _ in range(3))),
            networks.SARSA(4, D, num_agents=3, additional_reward_func=rewards[1], **options),
            networks.Selection(*(nn.Linear(D, 2) for _ in range(4)), stacked=True),
        )
        self.loss = networks.Loss(nn.MSELoss(), networks.NegLossReward())

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        y, meta = self.net(x)
        of_modules, of_decisions = self.loss(y, meta, x[:, :2].sin())
        total: Tensor = of_modules + of_decisions
        return total


class Tasks(nn.Module):
    """A network that every rank runs at a task of its own, in one step."""

    def __init__(self) -> None:
        super().__init__()
        masks = {name: TaskRouter(8, RANKS, 3, name=name, generator=torch.Generator().manual_seed(1)) for name in "ab"}
        self.net = nn.Sequential(nn.Linear(D, 8), masks["a"], nn.ReLU(), nn.Linear(8, 8), masks["b"])
        self.heads = networks.Selection(*(nn.Linear(8, 2) for _ in range(RANKS)))

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        losses = []
        for rank in range(RANKS)[rows]:
            set_task(self.net, rank)
            own = x if rows.stop - rows.start == 1 else x[rank * B : (rank + 1) * B]
            actions = torch.full((len(own),), rank)
            losses.append(self.heads(self.net(own), networks.Trajectory(len(own)), actions)[0].square().mean())
        return torch.stack(losses).mean()


class Several(nn.Module):
    """Tasks whose losses a weighting remembers; one has a target on some ranks only."""

    def __init__(self, weighting: str | None, missing: str = "") -> None:
        super().__init__()
        layers = [{"name": "trunk", "layers": nn.Linear(D, 4)}]
        for name in "ab":
            layers.append({"name": name, "layers": nn.Linear(4, 2), "loss": nn.MSELoss(), "anchor_layer": "trunk"})  # type: ignore[dict-item]
        self.model, self.missing = MTLModel(layers, list("ab"), weighting=weighting), missing

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        y: list[Any] = [x[:, :2].cos(), x[:, 2:4].exp()]
        made = self.model(x)
        if not self.missing:
            return self.model.loss(made, y)[0]
        parts = []  # of the ranks: targets are missing on rank 1
        for rank in range(RANKS)[rows]:
            part = slice(None) if rows.stop - rows.start == 1 else slice(rank * B, (rank + 1) * B)
            outputs = [t[part] for t in made[0]]
            targets = [None if rank == 1 and name in self.missing else t[part] for name, t in zip("ab", y, strict=True)]
            if rows.stop - rows.start == 1 or any(t is not None for t in targets):
                parts.append(self.model.loss((outputs, *made[1:]), targets)[0])
            else:
                parts.append(x.new_zeros(()))  # of one process, which has other targets beside
        return torch.stack(parts).mean()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "capsules": Capsules,
    "networks": Routed,
    "tasks": Tasks,
    "multitask": lambda: Several(None),
    "a target that is None on one rank": lambda: Several(None, "b"),
    "targets that are all None on one rank": lambda: Several(None, "ab"),
    **{
        f"weighting {name}": lambda name=name: Several(name)
        for name in ("dwa", "famo", "stch", "uncertainty", "geometric")
    },  # type: ignore[misc]
}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES[name]().double()


def whole_batch() -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(RANKS * B, D, dtype=F64) for _ in range(STEPS)]


def train(model: nn.Module, own: nn.Module, batches: list[Tensor], rows: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    weighting = getattr(getattr(own, "model", None), "weighting", None)
    for x in batches:
        optimizer.zero_grad()
        model(x, rows).backward()
        optimizer.step()
        if weighting is not None and hasattr(weighting, "min_losses"):
            with torch.no_grad():
                inner = own.model.forward_outputs(x)  # type: ignore[union-attr, operator]
                weighting.update([(y - t).square().mean() for y, t in zip(inner, (x[:, :2], x[:, 2:4]), strict=True)])
        elif weighting is not None:
            weighting.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, t in model.state_dict().items():
        found[name.replace("_orig_mod.", "")] = (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
    return found


def one_process(name: str) -> dict[str, Tensor]:
    model = prepare_alone(made(name))
    train(model, model, whole_batch(), slice(0, RANKS))
    return weights(model)


def prepare_alone(model: nn.Module) -> nn.Module:
    """Zeros for unused gradients, which momentum notices; nothing of the group."""
    return prepare(model, sync_rewards=False, sync_load=False, sync_losses=False)


def compare(
    world: World, name: str, wrap: Callable[[nn.Module], nn.Module], said: str, tolerance: float = 1e-12
) -> None:
    expected = one_process(name)
    model = prepare(made(name))
    rows = slice(world.rank, world.rank + 1)
    own = [x[world.rank * B : (world.rank + 1) * B] for x in whole_batch()]
    train(wrap(model), model, own, rows)
    for key, t in weights(model).items():
        torch.testing.assert_close(
            t, expected[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{said}, {name}, {key}: {m}"
        )


@case
def all_families_under_ddp(world: World) -> None:
    for name in FAMILIES:
        compare(world, name, ddp, "DDP")


@case
def all_families_under_fsdp(world: World) -> None:
    for name in FAMILIES:
        if name == "weighting famo":  # whose update runs the model outside of FSDP
            continue
        compare(world, name, lambda m: fully_shard(m, mesh=world.rows(RANKS)), "FSDP2")


@case
def all_families_under_hsdp(world: World) -> None:
    for name in ("capsules", "networks", "tasks", "multitask"):
        compare(world, name, lambda m: fully_shard(m, mesh=world.meshes[2]), "HSDP")


@case
def offloaded_and_in_mixed_precision(world: World) -> None:
    """In float32 instead of float64: the weights differ by its rounding."""
    mesh = world.rows(RANKS)
    for name in ("capsules", "networks", "tasks", "multitask"):
        policy = CPUOffloadPolicy(pin_memory=False)
        compare(world, name, lambda m, policy=policy: fully_shard(m, mesh=mesh, offload_policy=policy), "offload")  # type: ignore[misc]
        precision = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=F64)
        compare(world, name, lambda m, p=precision: fully_shard(m, mesh=mesh, mp_policy=p), "mixed", 1e-5)  # type: ignore[misc]


@case
def compiled_and_wrapped(world: World) -> None:
    for name in ("capsules", "multitask"):
        torch._dynamo.reset()
        compare(world, name, lambda m: torch.compile(ddp(m), backend="aot_eager"), "compiled")  # type: ignore[return-value]


@case
def rewards_see_all_ranks(world: World) -> None:
    """Uneven batches, masks, a rank without a sample; more actions than are kept."""
    C, counts = 4, (3, 0, 6, 2)
    torch.manual_seed(9)
    rounds = [(torch.randint(0, C, (sum(counts),)), torch.rand(sum(counts)) > 0.4) for _ in range(4)]
    start = sum(counts[: world.rank])
    rows = slice(start, start + counts[world.rank])
    here, like = torch.arange(C), torch.zeros(C, dtype=F64)
    dists = lambda: here  # noqa: E731  (which these rewards do not look at)
    for make in (fastroute.CollaborationReward, fastroute.RunningAverageCollaborationReward):
        for masked in (False, True):
            one, mine = make(0.5, C, history_len=9), make(0.5, C, history_len=9, sync_rewards=True)
            for actions, active in rounds:
                for reward, part in ((one, slice(None)), (mine, rows)):
                    reward.register_all(dists, actions[part], active[part] if masked else None)
                same(mine.rewards(dists, here, like), one.rewards(dists, here, like), make.__name__)
            if make is fastroute.CollaborationReward:
                assert torch.equal(mine.history, one.history)


@case
def what_ranks_have_to_have_in_common(world: World) -> None:
    first = world.rank == 0
    masks = TaskRouter(8, 4, 3, name="a", generator=torch.Generator().manual_seed(int(first)))
    said = message(ValueError, lambda: prepare(nn.Sequential(nn.Linear(D, 8), masks)))
    assert said.startswith("prepare: ") and "masks of 1" in said and "with bits" in said and "on rank 0" in said
    assert "on ranks 1 to 3" in message(ValueError, lambda: prepare(nn.Linear(D, 3 + first)))
    assert "float64 [3]" in message(ValueError, lambda: prepare(nn.Linear(D, 3, dtype=F64 if first else None)))
    said = message(ValueError, lambda: prepare(nn.Sequential(*(nn.ReLU() for _ in range(2 + first)))))
    assert "modules: expected the same on every rank" in said

    class Own(fastroute.PerActionBaseReward):
        def register_all(self, dists: Any, actions: Tensor, active: Tensor | None = None) -> None:
            self.last = actions

    model = networks.QLearning(3, D, additional_reward_func=Own())
    assert "sync_rewards=False lets it" in message(TypeError, lambda: prepare(model))
    prepare(model, sync_rewards=False)
    assert "unused_grad: expected" in message(ValueError, lambda: prepare(nn.Linear(2, 2), unused_grad="x"))  # type: ignore[arg-type]


@case
def load_of_the_group(world: World) -> None:
    """A gating's losses and capacity, of a mixture that is not spread."""
    torch.manual_seed(5)
    ref = networks.MoE(D, 5, 4, 2, dtype=F64, capacity=0.7, z_loss=0.1)
    model = prepare(copy.deepcopy(ref))
    x = torch.randn(RANKS * B, D, dtype=F64)
    rows = slice(world.rank * B, (world.rank + 1) * B)
    y, aux = ref(x, return_aux=True)
    own, own_aux = model(x[rows], return_aux=True)
    same(own, y[rows].detach())
    assert torch.equal(own_aux.counts, aux.counts)
    mean = own_aux.loss.detach().clone()
    dist.all_reduce(mean)
    same(mean / RANKS, aux.loss.detach())


@case
def a_spread_layer_alone_under_ddp(world: World) -> None:
    """DDP has other names for what is the model's own. Gradients that are accumulated are those of one process."""
    torch.manual_seed(3)
    plain = fastroute.MoE(D, 4, 4, 2, dtype=F64)
    model = parallelize_module(copy.deepcopy(plain), world.rows(RANKS), ExpertParallel())
    wrapped = ddp(prepare(model))
    for number, x in enumerate(whole_batch()):
        with contextlib.nullcontext() if number == STEPS - 1 else wrapped.no_sync():
            wrapped(x[world.rank * B : (world.rank + 1) * B]).square().mean().backward()
        plain(x).square().mean().backward()
    for name, p in plain.named_parameters():
        found: Any = model.get_parameter(name).grad
        same(found.full_tensor() if isinstance(found, DTensor) else found, p.grad)


@case
def what_cannot_be_wrapped(world: World) -> None:
    mesh = world.rows(RANKS)
    sharded = parallelize_module(Capsules(), mesh, {"routing": RowShardedCapsules()})
    assert "fully_shard(model" in message(ValueError, lambda: ddp(sharded))
    for wrong in (mesh, world.meshes[2]):
        assert "'data' and 'expert'" in message(ValueError, lambda wrong=wrong: shard(nn.Linear(D, D), wrong))
    assert "names: expected the same" in message(
        ValueError, lambda: Checkpoints("unwritten", nn.Linear(D, 1 + (world.rank == 2))).save(1)
    )
