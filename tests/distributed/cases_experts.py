"""Modules spread over ranks give what one process gives. See ``tests/distributed/ranks.py``.

Axes: W ranks, B samples of all of them, in the order of ranks.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint as activations
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import fastroute
from fastroute.distributed import (
    AllToAll,
    Checkpoints,
    ExpertParallel,
    Local,
    ddp,
    expert_parameters,
    full_state_dict,
    prepare,
    shard,
    whole_state_dict,
)
from fastroute.networks import MoE, Selection, TopKGating, Trajectory
from tests.distributed.ranks import World, case, folder

F64 = torch.float64
SIZES = (3, 0, 7, 2)  #: samples of each rank
D, P = 6, 3
WORLDS = (1, 2, 4)


def same(found: Tensor, expected: Tensor, said: str = "") -> None:
    found = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{said}: {m}")


def batches(W: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, D, dtype=F64) for n in SIZES[:W]]


def experts(K: int, out: int = P, **options: Any) -> Selection:
    torch.manual_seed(2)
    return Selection(
        *(nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, out)) for _ in range(K)), **options
    ).double()


def own(t: Tensor, W: int, rank: int) -> Tensor:
    first = sum(SIZES[:rank])
    return t[first : first + SIZES[rank]]


def compare(
    mesh: DeviceMesh, ref: nn.Module, call: Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Any], said: str,
    averaged: bool = False, **style: Any,
) -> nn.Module:  # fmt: skip
    """One training step's results and gradients; ``call`` gives (y, another loss)."""
    W, rank = mesh.size(), mesh.get_local_rank()
    parts, layer = batches(W), copy.deepcopy(ref)
    parallelize_module(layer, mesh, ExpertParallel(**style))
    x = torch.cat(parts).requires_grad_()
    y, more = call(ref, x, lambda t: t)
    (y.square().sum() / W + more + 0 * x.sum()).backward()
    x_own = parts[rank].clone().requires_grad_()
    with fastroute.strict(True):
        y_own, more_own = call(layer, x_own, lambda t: own(t, W, rank))
    same(y_own, own(y.detach(), W, rank), f"{said}: y")
    (y_own.square().sum() + more_own).backward()
    same(x_own.grad / W, own(x.grad, W, rank), f"{said}: x")  # type: ignore[operator, arg-type]
    gradients(layer, ref, W, mesh, said)
    state = whole_state_dict(layer)
    assert list(state) and {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ref.state_dict().items()}
    return layer


def gradients(layer: nn.Module, ref: nn.Module, W: int, mesh: DeviceMesh, said: str) -> None:
    mine = {name for name, p in layer.named_parameters() if isinstance(p, DTensor) or "_submodules" in name}
    for name, p in layer.named_parameters():
        expected = ref.get_parameter(name).grad
        found = p.grad
        if expected is None or found is None:
            assert expected is None and found is None, f"{said}: {name}"
            continue
        if name not in mine:  # DDP's to average
            found = found.clone()
            dist.all_reduce(found, group=mesh.get_group())
            found = found / W
        same(found, expected, f"{said}: {name}")


@case
def mixtures(world: World) -> None:
    """Top-k, weights, shared experts, capacity, losses, masks; ranks without a sample and without an expert."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"k": 1, "normalize": False, "capacity": 0.7, "gated": False},
        {"shared_experts": 2, "capacity": 1.0, "z_loss": 0.1},
        {"scores": "sigmoid", "bias_balancing": 0.1, "capacity": 0.5},
    )
    mask = torch.arange(sum(SIZES)) % 3 != 1
    for W in WORLDS:
        for E, own_options in ((5, options[0]), (5, options[1]), (3, options[2]), (4, options[3])):
            ref = MoE(D, 5, E, **{"k": 2, **own_options}, dtype=F64)
            for masked in (False, True):

                def call(
                    m: nn.Module, x: Tensor, part: Callable[[Tensor], Tensor], masked: bool = masked, W: int = W
                ) -> Any:
                    y, aux = m(x, part(mask[: sum(SIZES[:W])]) if masked else None, return_aux=True)
                    call.counts = aux.counts  # type: ignore[attr-defined]
                    return y, aux.loss

                one = copy.deepcopy(ref)
                layer = compare(world.rows(W), one, call, f"{W} ranks, {own_options}, masked {masked}")
                expected = one(torch.cat(batches(W)), mask[: sum(SIZES[:W])] if masked else None, return_aux=True)[
                    1
                ].counts
                assert torch.equal(call.counts, expected)  # type: ignore[attr-defined]
                if "bias_balancing" in own_options:
                    one.gate.counts.zero_().add_(expected)
                    one.gate.rebalance()
                    layer.gate.rebalance(world.rows(W).get_group())  # type: ignore[union-attr, operator]
                    same(layer.gate.selection_bias, one.gate.selection_bias)  # type: ignore[union-attr, arg-type]


@case
def selections(world: World) -> None:
    """Modules of their own or stacked, unlike ones, one alone, more ranks than modules; [B], [B, k] and a gating."""
    for W in WORLDS:
        B = sum(SIZES[:W])
        torch.manual_seed(3)
        for K, stacked in ((5, False), (5, True), (3, False), (3, True), (1, False)):
            one = torch.randint(-1, K, (B,))
            several = torch.randint(-1, K, (B, 2))
            weights, mask = torch.rand(B, 2, dtype=F64), torch.rand(B) > 0.3

            def simple(m: Any, x: Tensor, part: Any, a: Tensor = one, mask: Tensor = mask) -> Any:
                return m(x, Trajectory(len(x)), part(a), part(mask))[0], x.new_zeros(())

            def mixed(m: Any, x: Tensor, part: Any, a: Tensor = several, w: Tensor = weights) -> Any:
                return m(x, Trajectory(len(x)), part(a), weights=part(w))[0], x.new_zeros(())

            for call in (simple, mixed):
                compare(world.rows(W), experts(K, stacked=stacked, unused_grad="zeros"), call, f"{W}, {K}, {stacked}")
        compare(world.rows(W), experts(4, out=D, dropped="identity"), simple, "identity")
        unlike = Selection(nn.Linear(D, P), nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, P)), nn.Linear(D, P))
        compare(world.rows(W), unlike.double(), simple, "unlike modules")
        gate = TopKGating(4, D, 2, dtype=F64)

        def gated(m: Any, x: Tensor, part: Any, gate: TopKGating = gate) -> Any:
            y, meta, actions = gate(x, Trajectory(len(x)))
            return m(y, meta, actions)[0], x.new_zeros(())

        compare(world.rows(W), experts(4), gated, "gated")


@case
def modules_in_two_places_and_ranks_with_one_row(world: World) -> None:
    """Each keeps its parameters: a layer in two of a rank's modules, and those of a stack whose modules are called."""
    torch.manual_seed(3)
    layers = [nn.Linear(D, D) for _ in range(4)]
    twice = [m for layer in layers for m in (nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(D, P)), layer)]
    tied = [nn.Linear(D, D) for _ in range(8)]
    for first, second in zip(tied[::2], tied[1::2], strict=True):
        second.weight = first.weight
    for W in WORLDS:
        for said, layer in {
            "a layer": Selection(*twice[::2]),
            "a module": Selection(*(m for m in twice[1::2] for _ in range(2))),
            "parameters": Selection(*tied),
            "a stack": experts(5, stacked=True),
        }.items():
            K, rows = len(layer._submodules), torch.arange(sum(SIZES[:W]))
            for actions in (rows % K, torch.where(rows == 1, K - 1, 0)):

                def call(m: nn.Module, x: Tensor, cut: Callable[[Tensor], Tensor], actions: Tensor = actions) -> Any:
                    return m(x, Trajectory(len(x)), cut(actions))[0], 0.0

                layer.double().zero_grad()
                spread = compare(world.rows(W), layer, call, f"{said}, {W} ranks")
                assert all(isinstance(p, nn.Parameter) for p in spread.parameters())


@case
def samples_that_all_ranks_have(world: World) -> None:
    """Beside tensor-parallel neighbours: replicated inputs, DTensors in and out, both dispatchers."""
    for W in WORLDS:
        mesh = world.rows(W)
        for dispatcher in (AllToAll(), Local()):
            for kind in ("moe", "selection", "mixture"):
                torch.manual_seed(4)
                x = torch.randn(7, D, dtype=F64, requires_grad=True)
                a, w = torch.randint(-1, 4, (7, 2)), torch.rand(7, 2, dtype=F64)
                ref: Any = MoE(D, 5, 5, 2, dtype=F64, shared_experts=1, capacity=1.0) if kind == "moe" else experts(5)

                def call(m: Any, x: Any, kind: str = kind, a: Tensor = a, w: Tensor = w) -> Any:
                    if kind == "moe":
                        return m(x)
                    given = {"weights": w} if kind == "mixture" else {}
                    return m(x, Trajectory(7), a if kind == "mixture" else a[:, 0], **given)[0]

                layer = copy.deepcopy(ref)
                style = ExpertParallel(dispatcher=dispatcher, input_layouts=Replicate(), use_local_output=False)
                parallelize_module(layer, mesh, style)
                y = call(ref, x)
                y.square().sum().backward()
                mine = x.detach().clone().requires_grad_()
                with fastroute.strict(True):
                    found = call(layer, mine)
                found.square().sum().backward()
                said = f"{W} ranks, {type(dispatcher).__name__}, {kind}"
                same(found, y.detach(), said)
                same(mine.grad, x.grad, said)  # type: ignore[arg-type]
                for name, p in layer.named_parameters():
                    expected = ref.get_parameter(name).grad
                    assert (p.grad is None) == (expected is None), f"{said}: {name}"
                    if p.grad is not None:
                        same(p.grad, expected, f"{said}: {name}")
        layer = MoE(D, 5, 4, 2, dtype=F64)
        ref = copy.deepcopy(layer)
        parallelize_module(layer, mesh, ExpertParallel(use_local_output=False, output_layouts=Replicate()))
        x = torch.randn(2 * W, D, dtype=F64)
        dist.broadcast(x, group=mesh.get_group(), group_src=0)
        found = layer(DTensor.from_local(x, mesh, [Replicate()]).redistribute(placements=[Shard(0)]))
        assert isinstance(found, DTensor) and found.placements == (Replicate(),)
        same(found, ref(x).detach())


class Losing(AllToAll):
    """A dispatcher with room for all rows but one."""

    def receive(self, sent: Any) -> tuple[Tensor, Tensor]:
        rows, modules = super().receive(sent)
        return rows[:-1], modules[:-1]


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError(f"expected {error.__name__}, nothing was raised")


@case
def bad_input_is_an_error_on_all_ranks(world: World) -> None:
    mesh, first = world.rows(4), world.rank == 0
    x = torch.randn(5, D)

    def spread(m: nn.Module, **style: Any) -> Any:
        return parallelize_module(m, mesh, ExpertParallel(**style))

    with fastroute.strict(True):
        said = message(RuntimeError, lambda: spread(MoE(D, 5, 4, 2), dispatcher=Losing())(x))
    assert "Losing lost samples: module" in said and "on rank" in said
    said = message(ValueError, lambda: spread(MoE(D, 5 + first, 4, 2)))
    assert "ExpertParallel of MoE" in said and "on rank 0" in said and "on ranks 1 to 3" in said
    said = message(ValueError, lambda: spread(MoE(D, 5, 4, 2, dtype=F64 if first else None)))
    assert "float64" in said and "on rank 0" in said
    said = message(ValueError, lambda: spread(Selection(*(nn.Linear(D, D) for _ in range(3 + first)))))
    assert "submodules" in said and "on rank 0" in said
    assert "expected a Selection or an MoE, got Linear" in message(TypeError, lambda: spread(nn.Linear(D, D)))
    pruned = MoE(D, 5, 4, 2)
    if first:
        nn.utils.parametrize.register_parametrization(pruned, "w_down", nn.Identity())
    assert "parametrized or pruned" in message((TypeError, ValueError), lambda: spread(pruned))  # type: ignore[arg-type]
    one = nn.Linear(D, D)
    tied = Selection(one, nn.Linear(D, D), nn.Linear(D, D), one)
    assert "weight of module 3" in message(ValueError, lambda: spread(tied))
    assert "expected one dimension" in message(ValueError, lambda: ExpertParallel()._apply(experts(4), world.meshes[2]))
    relus = spread(Selection(*(nn.ReLU() for _ in range(4))))
    said = message(ValueError, lambda: relus(torch.randn(5, D + first), Trajectory(5), torch.arange(5) % 4))
    assert "7 numbers of torch.float32 on 0; 6 numbers of torch.float32 on 1, 2, 3" in said
    said = message(ValueError, lambda: relus(x.to(F64 if first else None), Trajectory(5), torch.arange(5) % 4))
    assert "torch.float64 on 0" in said
    unlike = spread(Selection(*(nn.Linear(D, 4 + (k == 2)) for k in range(4))))
    assert "outputs of one shape" in message(ValueError, lambda: unlike(x, Trajectory(5), torch.arange(5) % 4))
    mine = torch.arange(5) % 4

    def chosen(actions: Any, **given: Any) -> str:
        select = spread(Selection(*(nn.Linear(D, D) for _ in range(4))))
        return message(ValueError, lambda: select(x, Trajectory(5), actions, **given))

    assert "actions: expected the same" in chosen(mine.float() if first else mine)
    assert "[4] for " in chosen(mine[:4] if first else mine)
    assert "actions: expected the same" in chosen(mine[:, None] if first else mine)
    assert "mask: expected the same" in chosen(mine, mask=mine > 0 if first else None)
    assert "replicas: expected another dimension" in message(ValueError, lambda: spread(experts(4), replicas=mesh))
    mixture = spread(MoE(D, 5, 4, 2))
    with torch.set_grad_enabled(not first):
        assert "gradient mode" in message(ValueError, lambda: mixture(x))
    assert "x: expected the same" in message(ValueError, lambda: mixture(x[:, : D - first]))
    mixture(x)
    with torch.set_grad_enabled(not first), fastroute.strict(True):  # later calls, too
        assert "gradient mode" in message(ValueError, lambda: mixture(x))
    alike = spread(MoE(D, 5, 4, 2), input_layouts=Replicate())
    assert "number of samples" in message(ValueError, lambda: alike(x[: 5 - first]))
    with fastroute.strict(True):
        assert "samples: expected the same" in message(ValueError, lambda: alike(x + first))
    assert "Replicate() with Local" in message(
        ValueError, lambda: ExpertParallel(dispatcher=Local(), input_layouts=Shard(0))
    )
    assert "dispatcher: expected" in message(TypeError, lambda: ExpertParallel(dispatcher=3))  # type: ignore[arg-type]
    assert "not spread yet" in message(TypeError, lambda: spread(relus))


class Operators(TorchDispatchMode):
    """Names of operators, and bytes that all-to-alls send to other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.names, self.bytes = rank, list[str](), list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name == "all_to_all_single":
            t, _, given, _ = args
            away = sum(given) - given[self.rank]
            self.bytes.append(away * t[:1].numel() * t.element_size() if len(t) else 0)
        return func(*args, **(kwargs or {}))


@case
def bytes_are_the_formula(world: World) -> None:
    """Counts, samples there, results back; in backward the results' gradients there, the samples' back."""
    for W in (2, 4):
        mesh = world.rows(W)
        rank, K, B = mesh.get_local_rank(), 5, 9
        layer = experts(K)
        parallelize_module(layer, mesh, ExpertParallel())
        torch.manual_seed(10 + rank)
        x, a = torch.randn(B, D, dtype=F64, requires_grad=True), torch.randint(-1, K, (B, 2))
        each: list[Any] = [None] * W
        dist.all_gather_object(each, a, group=mesh.get_group())
        bounds = layer._shards.place.bounds  # type: ignore[union-attr]
        to = [[int(((t >= bounds[r]) & (t < bounds[r + 1])).sum()) for r in range(W)] for t in each]
        layer(x, Trajectory(B), a)  # the outputs' shape is told once
        with Operators(rank) as seen:
            layer(x, Trajectory(B), a)[0].sum().backward()
        out = sum(n for r, n in enumerate(to[rank]) if r != rank)
        home = sum(t[rank] for r, t in enumerate(to) if r != rank)
        counts = 8 * (K - (bounds[rank + 1] - bounds[rank]) + 4 * (W - 1))
        assert seen.bytes == [counts, out * D * 8, home * P * 8, out * P * 8, home * D * 8], (seen.bytes, out, home)


@case
def the_exchange_overlaps_the_shared_experts(world: World) -> None:
    """Between the beginning of an all-to-all and its end there is a product of theirs, forward and backward."""
    layer = MoE(D, 5, 4, 2, shared_experts=1)
    parallelize_module(layer, world.rows(4), ExpertParallel())
    x = torch.randn(8, D, requires_grad=True)
    y = layer(x)  # with the counts' exchange before
    for run in (lambda: layer(x), lambda: y.sum().backward()):
        with Operators(world.rank) as seen:
            run()
        kept = [
            n for n in seen.names if n in ("all_to_all_single", "wait_tensor", "mm", "addmm", "linear", "all_reduce")
        ]
        overlapped = [
            any(n in ("mm", "addmm", "linear") for n in kept[i + 1 : kept.index("wait_tensor", i)])
            for i, n in enumerate(kept)
            if n == "all_to_all_single"
        ]
        assert overlapped[-2:] == [True, True], (overlapped, kept)


class Model(nn.Module):
    """A dense layer, a mixture, modules that a gating chooses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.dense = nn.Linear(D, D)
        self.moe = MoE(D, 8, 4, 2, shared_experts=1)
        self.gate, self.select = TopKGating(4, D, 1, normalize=False), experts(4, out=D, unused_grad="zeros")
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, aux = self.moe(self.dense(x), return_aux=True)
        y, meta, actions = self.gate(h, Trajectory(len(h)))
        loss: Tensor = self.select(y, meta, actions)[0].square().mean() + aux.loss + meta.aux_loss
        return loss


def trained(model: nn.Module, parts: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.cat(parts)).backward()
        optimizer.step()


@case
def two_dimensions(world: World) -> None:
    """Data x expert, by DDP and by FSDP2, trained to the weights of one process; also with experts over all ranks."""
    torch.manual_seed(6)
    parts = [torch.randn(4, D, dtype=F64) for _ in range(4)]
    one = Model()
    trained(one, parts)
    for size in (1, 2, 4):
        mesh = world.meshes[size]
        for how in ("ddp", "fsdp"):
            model = Model()
            style = {"replicas": mesh["data"]} if how == "ddp" else {}
            plan = {name: ExpertParallel(**style) for name in ("moe", "select")}
            parallelize_module(model, mesh["rows"], plan)  # type: ignore[arg-type]
            prepare(model)
            wrapped = ddp(model) if how == "ddp" else shard(model, mesh, expert="rows")
            trained(wrapped, [parts[world.rank]])
            found = whole_state_dict(model)
            alone = full_state_dict(wrapped)  # on rank 0, of what is wrapped
            assert set(alone) == (set(one.state_dict()) if world.rank == 0 else set())
            for name, t in one.state_dict().items():
                same(found[name], t, f"{how}, {size} ranks of experts: {name}")
                if world.rank == 0:
                    same(alone[name], t, f"{how}, {size} ranks of experts, full: {name}")


@case
def compiled(world: World) -> None:
    """One graph forward, with the exchange in it, also on a rank without an expert."""
    torch._dynamo.config.capture_scalar_outputs = True
    if world.rank >= 2:
        return
    for kind in ("moe", "selection"):
        torch._dynamo.reset()
        torch.manual_seed(7)
        a = torch.arange(8) % 5
        layer: Any = (
            MoE(D, 5, 1, 1, shared_experts=1) if kind == "moe" else Selection(*(nn.Linear(D, D) for _ in a[:5]))
        )
        parallelize_module(layer, world.rows(2), ExpertParallel())

        def run(x: Tensor, layer: Any = layer, a: Any = None if kind == "moe" else a) -> Tensor:
            made: Tensor = layer(x) if a is None else layer(x, Trajectory(len(x)), a[: len(x)])[0]
            return made

        x = torch.randn(8, D, requires_grad=True)
        y = run(x)
        (expected,) = torch.autograd.grad(y.square().sum(), x)
        backend = "aot_eager" if kind == "moe" else "eager"
        made = torch.compile(run, fullgraph=True, backend=backend)(x)
        (found,) = torch.autograd.grad(made.square().sum(), x)
        torch.testing.assert_close(made, y)
        torch.testing.assert_close(found, expected)


@case
def saved_on_four_ranks_loaded_on_two(world: World) -> None:
    """torch.distributed.checkpoint: experts and their optimizer's state go where their modules are."""
    for kind in ("moe", "modules", "stacked"):

        def made(W: int, kind: str = kind) -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(11)
            layer: nn.Module = MoE(D, 5, 3, 2, dtype=F64) if kind == "moe" else experts(3, stacked=kind == "stacked")
            model = nn.ModuleList([nn.Linear(D, D, dtype=F64), layer])  # on a rank without a module, parameters anyway
            parallelize_module(model, world.rows(W), {"1": ExpertParallel()})
            return model, torch.optim.Adam(model.parameters(), 0.1)

        def step(layer: Any, optimizer: torch.optim.Optimizer, kind: str = kind) -> None:
            torch.manual_seed(12)  # the same samples on all ranks
            x, a = torch.randn(6, D, dtype=F64), torch.arange(6) % 3
            optimizer.zero_grad()
            h = layer[0](x)
            y: Tensor = layer[1](h) if kind == "moe" else layer[1](h, Trajectory(6), a)[0]
            y.square().sum().backward()
            optimizer.step()

        folder = Path(tempfile.gettempdir()) / f"fastroute-experts-{os.getppid()}-{kind}"
        layer, optimizer = made(4)
        step(layer, optimizer)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model_state, optimizer_state = get_state_dict(layer, optimizer, options=options)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        step(layer, optimizer)
        other, its = made(2)
        step(other, its)  # another state than the one that is to be loaded
        step(other, its)
        model_state, optimizer_state = get_state_dict(other, its, options=options)
        state = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(
            other, its, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
        step(other, its)
        found = whole_state_dict(other)
        for name, t in whole_state_dict(layer).items():
            same(found[name], t, f"{kind}: {name}")
        dist.barrier()
        if world.rank == 0:
            shutil.rmtree(folder)


@case
def a_run_is_saved_and_goes_on(world: World) -> None:
    """``Checkpoints`` of modules that ranks have for themselves, and of what had no gradient yet."""
    for stacked in (False, True):
        model = nn.ModuleList([nn.Linear(D, D, dtype=F64), experts(4, stacked=stacked)])
        parallelize_module(model, world.rows(4), {"1": ExpertParallel()})
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        x, a = torch.ones(4, D, dtype=F64), torch.arange(4)
        model[1](x, Trajectory(4), a)[0].square().sum().backward()  # the first layer has no gradient
        optimizer.step()
        expected = whole_state_dict(model)
        with folder(world) as path:
            Checkpoints(path, model, optimizer).save(1)
            other = nn.ModuleList([nn.Linear(D, D, dtype=F64), experts(4, stacked=stacked)])
            parallelize_module(other, world.rows(2), {"1": ExpertParallel()})
            its = torch.optim.Adam(other.parameters(), 0.1)
            assert Checkpoints(path, other, its).load() == 1
            found = whole_state_dict(other)
            for name, t in expected.items():
                same(found[name], t, name)
            assert not its.state[other[0].weight]


@case
def under_autocast_and_checkpointing(world: World) -> None:
    """A forward pass made again exchanges again; bfloat16 rows travel under autocast; x without gradients on a rank."""
    mesh = world.rows(4)
    for kind in ("moe", "selection"):
        torch.manual_seed(13)
        ref: Any = MoE(D, 5, 3, 2, shared_experts=1) if kind == "moe" else experts(3, unused_grad="zeros").float()
        layer = copy.deepcopy(ref)
        parallelize_module(layer, mesh, ExpertParallel())
        x = torch.randn(8, D)
        rows = slice(2 * world.rank, 2 * world.rank + 2)
        a = torch.arange(8) % 3

        def run(m: Any, x: Tensor, a: Tensor, kind: str = kind) -> Tensor:
            made: Tensor = m(x) if kind == "moe" else m(x, Trajectory(len(x)), a)[0]
            return made

        with torch.no_grad():
            assert not run(layer, x[rows], a[rows]).requires_grad
        own = x[rows].clone().requires_grad_(world.rank != 2)
        y = activations.checkpoint(run, layer, own, a[rows], use_reentrant=False)
        y.square().sum().backward()
        whole = x.clone().requires_grad_()
        expected = run(ref, whole, a)
        (expected.square().sum() / 4).backward()
        torch.testing.assert_close(y, expected[rows])
        if world.rank != 2:
            torch.testing.assert_close(own.grad, 4 * whole.grad[rows])  # type: ignore[index]
        for name, p in layer.named_parameters():
            if isinstance(p, DTensor) or "_submodules" in name:
                grad = p.grad.full_tensor() if isinstance(p, DTensor) else p.grad  # type: ignore[union-attr]
                torch.testing.assert_close(grad, ref.get_parameter(name).grad)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = run(layer, x[rows], a[rows]), run(ref, x, a)[rows]
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@case
def logged_selections_are_those_of_all_ranks(world: World) -> None:
    layer = experts(5)
    parallelize_module(layer, world.rows(4), ExpertParallel())
    layer.start_logging_selections()
    layer(torch.randn(1, D, dtype=F64), Trajectory(1), torch.tensor([world.rank]))
    assert layer.stop_logging_and_get_selections() == [0, 1, 2, 3]


@case
def second_derivatives(world: World) -> None:
    """Of the exchange, which then is one that can be differentiated."""
    mesh, ref = world.rows(2), Selection(*(nn.Sequential(nn.Linear(D, 4), nn.Tanh()) for _ in range(3))).double()
    rank, layer = mesh.get_local_rank(), copy.deepcopy(ref)
    parallelize_module(layer, mesh, ExpertParallel())
    torch.manual_seed(8)
    x, a = torch.randn(8, D, dtype=F64), torch.arange(8) % 3
    ref.load_state_dict(whole_state_dict(layer))

    def twice(m: Any, x: Tensor, a: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = m(x, Trajectory(len(x)), a)[0].square().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x)
        return gg

    rows = slice(4 * rank, 4 * rank + 4)
    same(twice(layer, x[rows], a[rows]), twice(ref, x, a)[rows])


@case
def unfrozen_after_they_were_spread(world: World) -> None:
    """Also where a rank has no module and no sample: all take part in backward, as they do when some are frozen."""
    mesh, n = world.rows(4), 3
    for dispatcher, K in itertools.product((AllToAll, Local), (1, 4)):
        torch.manual_seed(9)
        ref = Selection(*(nn.Linear(D, 2, dtype=F64) for _ in range(K)))
        layer = parallelize_module(
            copy.deepcopy(ref).requires_grad_(False), mesh, ExpertParallel(dispatcher=dispatcher())
        )
        x, actions = torch.randn(n, D, dtype=F64), torch.zeros(n, dtype=torch.int64)
        mine = n if world.rank == 0 or dispatcher is Local else 0
        for frozen in (False, True, False):
            layer.requires_grad_(not frozen)
            layer.zero_grad()
            ref.zero_grad()
            y = layer(x[:mine], Trajectory(mine), actions[:mine])[0]
            if frozen:
                continue
            y.square().sum().backward()
            ref(x, Trajectory(n), actions)[0].square().sum().backward()
            mean = 4 if dispatcher is AllToAll else 1
            expected = dict(ref.named_parameters())
            for name, p in layer.named_parameters():
                grad = expected[name].grad
                assert (p.grad is None) == (grad is None)
                if p.grad is not None:
                    same(p.grad, grad / mean)
    for dispatcher in (AllToAll, Local):  # ranks whose modules have no parameters, and inputs without a gradient
        layer = Selection(nn.Linear(D, D, dtype=F64), *(nn.Identity() for _ in range(3)))
        parallelize_module(layer, mesh, ExpertParallel(dispatcher=dispatcher()))
        x, actions = torch.randn(n, D, dtype=F64), torch.arange(n)
        layer(x, Trajectory(n), actions)[0].square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@case
def frozen_on_one_rank(world: World) -> None:
    """Gradients of the others, and of the samples, are those of one process; every rank has a graph to go back."""
    mesh, n = world.rows(4), 6
    layouts = ((AllToAll, Shard(0)), (AllToAll, Replicate()), (Local, Replicate()))
    for (dispatcher, layout), kind, needs in itertools.product(layouts, ("moe", "plain", "stacked"), (False, True)):
        torch.manual_seed(9)
        modules = (nn.Linear(D, 2) for _ in range(4))
        ref: Any = MoE(D, 3, 4, 2) if kind == "moe" else Selection(*modules, stacked=kind == "stacked")
        style = ExpertParallel(dispatcher=dispatcher(), input_layouts=layout)
        layer = parallelize_module(copy.deepcopy(ref.double()), mesh, style)
        of_experts = set(expert_parameters(layer))
        for p in layer.parameters():
            p.requires_grad_(p in of_experts and world.rank != 1)
        x, a = torch.randn(4 * n, D, dtype=F64), torch.arange(4 * n) % 4
        own = slice(None) if layout == Replicate() else slice(world.rank * n, world.rank * n + n)
        mine, whole = x[own].clone().requires_grad_(needs), x.clone().requires_grad_()
        for m, batch, actions in ((layer, mine, a[own]), (ref, whole, a)):
            y = m(batch) if kind == "moe" else m(batch, Trajectory(len(batch)), actions)[0]
            y.square().sum().backward()
        if needs:
            same(mine.grad, whole.grad[own])  # type: ignore[index]
        for name, p in layer.named_parameters():
            assert (p.grad is None) == (not p.requires_grad)
            if p.grad is not None:
                grad = ref.get_parameter(name).grad / (1 if layout == Replicate() else 4)
                split = isinstance(p, DTensor)
                same(p.grad.to_local() if split else p.grad, grad[world.rank, None] if split else grad)  # type: ignore[attr-defined]
    x, actions = torch.randn(4, D, requires_grad=world.rank == 1), torch.arange(4)
    layer = parallelize_module(experts(4).float(), mesh, ExpertParallel(dispatcher=Local(), input_layouts=Replicate()))
    told = message(ValueError, lambda: layer(x, Trajectory(4), actions))
    assert "gradient of the samples: expected the same on every rank, got False on ranks 0, 2 and 3" in told


@case
def wrapped_models_are_saved_and_loaded(world: World) -> None:
    """By DDP or torch.compile, with modules that only one rank has; other ranks, or other names, are found out."""
    for wrap in (ddp, lambda m: torch.compile(m, backend="eager")):
        torch.manual_seed(9)
        model = nn.Sequential(nn.Linear(D, D), experts(5))
        parallelize_module(model, world.rows(4), {"1": ExpertParallel()})
        expected = {k: t.clone() for k, t in model.state_dict().items()}
        wrapped = wrap(prepare(model))
        with folder(world) as path:
            Checkpoints(path, wrapped).save(1)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            assert Checkpoints(path, wrapped).load() == 1
            for key, t in model.state_dict().items():
                same(t, expected[key], key)
            whole = nn.Sequential(nn.Linear(D, D), experts(5))
            assert Checkpoints(path, whole).load() == 1
            for bad, said in (
                (nn.Sequential(nn.Linear(D, D, bias=False), experts(5)), "with none and without 0.bias"),
                (
                    nn.Sequential(nn.Linear(D + 1, D), experts(5)),
                    f"with 0.weight [{D}, {D + 1}] and without 0.w",
                ),
                (spread(nn.Sequential(nn.Linear(D, D), experts(4)), world), "with none and without 1._submodules.4."),
                (nn.Sequential(nn.Linear(D, D), experts(6)), "with 1._submodules.5.0.bias, 1._submodules.5.0.weight, "),
            ):
                assert said in message(ValueError, lambda bad=bad: Checkpoints(path, bad).load())
        del wrapped


def spread(model: nn.Module, world: World) -> Any:
    return parallelize_module(model, world.rows(4), {"1": ExpertParallel()})


@case
def groups_of_spread_modules_are_saved_and_loaded(world: World) -> None:
    """A group may have one rank's parameters alone; the last rank has none, and no optimizer."""
    with folder(world) as path:
        for lr in (0.1, 0.5):
            torch.manual_seed(9)
            model = spread(nn.Sequential(nn.Identity(), experts(5)), world)
            groups = [{"params": list(m.parameters()), "lr": lr} for m in model[1]._submodules if [*m.parameters()]]
            assert (world.rank == 3) == (not groups)
            optimizer: Any = torch.optim.Adam(groups) if groups else ()
            checkpoints = Checkpoints(path, model, optimizer)
            if lr == 0.1:
                for p in model.parameters():
                    p.grad = torch.full_like(p, world.rank)
                if groups:
                    optimizer.step()
                checkpoints.save(1)
                expected = [p.clone() for p in model.parameters()]
            else:
                assert checkpoints.load() == 1
                same([*model.parameters()], expected)
            for group in optimizer.param_groups if groups else ():
                assert group["lr"] == 0.1 and group["betas"] == (0.9, 0.999) and len(group["params"]) == 4
                for p in group["params"]:
                    same(optimizer.state[p]["exp_avg"], torch.full_like(p, world.rank / 10))


@case
def one_module_for_all_ranks(world: World) -> None:
    """Ranks without any are prepared and trained as the others; FSDP, which takes no empty parameters, is refused."""
    torch.manual_seed(9)
    ref = nn.Sequential(nn.Linear(D, D), Alone(D)).double()
    model = parallelize_module(copy.deepcopy(ref), world.rows(4), {"1.select": ExpertParallel()})
    wrapped = ddp(prepare(model))
    x = torch.randn(8, D, dtype=F64)
    wrapped(x.chunk(4)[world.rank]).square().mean().backward()
    ref(x).square().mean().backward()
    expected = dict(ref.named_parameters())
    for name, p in model.named_parameters():
        same(p.grad, expected[name].grad, name)
    for K in (1, 3, 5):
        mixture = parallelize_module(MoE(D, 4, K, 1), world.rows(4), ExpertParallel())
        named = DeviceMesh("cpu", torch.arange(4)[None], mesh_dim_names=("data", "expert"))
        assert "got" in message(ValueError, lambda mixture=mixture, named=named: shard(mixture, named))


class Alone(nn.Module):
    """A selection of one module, which has a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.select = Selection(nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.select(x, Trajectory(len(x)), torch.zeros(len(x), dtype=torch.int64))[0]
        return y


@case
def models_of_some_ranks(world: World) -> None:
    """Two groups of ranks, each with a model of its own, which is gathered from the ranks that have it."""
    mesh = world.meshes[2]
    torch.manual_seed(mesh["data"].get_local_rank())
    ref = Selection(*(nn.Linear(D, 2) for _ in range(3)))
    layer = parallelize_module(copy.deepcopy(ref), mesh["rows"], ExpertParallel())
    whole = whole_state_dict(layer)
    assert whole.keys() == ref.state_dict().keys()
    for name, t in ref.state_dict().items():
        same(whole[name], t, name)
