"""Matrix capsules, slots and routing by the user's functions, sharded by inputs, against the layer in one process.

See ``tests/distributed/ranks.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import fastroute
from fastroute.compat import heinsen_routing
from fastroute.distributed import Checkpoints, RowShardedCapsules, full_state_dict
from tests.distributed.cases_capsules import D, H, M, N, full, gradients, same, says, vectors
from tests.distributed.ranks import World, case, folder
from tests.helpers.budget import assert_within_budget
from tests.helpers.traffic import Traffic

C, B = 2, 2  #: rows of a capsule's matrix; samples
Given = dict[str, Tensor]
Layer = Callable[[int], nn.Module]


class Votes(nn.Module):
    """Of parameters with a row per input vector."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, M, H, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...nd,nmhd->...nmh", x, self.weight)


def agreement(x: Tensor, predicted: Tensor) -> Tensor:
    return x @ predicted.transpose(-1, -2)


def definable(n_inp: int, **options: Any) -> nn.Module:
    modules: dict[str, Any] = {
        "A": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1)),
        "F": nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, M * H)),
        "G": nn.Linear(H, D),
        "S": agreement,
        "d_inp": D,
        "n_iters": 3,
    }
    return fastroute.DefinableVectorRouting(**modules | options, n_inp=n_inp, n_out=M)  # type: ignore[arg-type]


def matrix(n_inp: int, **options: Any) -> nn.Module:
    kind = options.pop("kind", fastroute.GenerativeMatrixRouting)
    return kind(n_inp=n_inp, n_out=M, d_cov=C, d_inp=D, d_out=H, **options)  # type: ignore[no-any-return]


LAYERS: dict[str, Layer] = {
    "matrix": matrix,
    "skm": lambda n: matrix(n, p_model="skm", n_iters=2, single_beta=True),
    "one iteration": lambda n: matrix(n, n_iters=1),
    "compat": lambda n: matrix(n, kind=heinsen_routing.GenerativeMatrixRouting, n_iters=2),
    "2019": lambda n: matrix(n, kind=heinsen_routing.Routing),
    "2019, any outputs": lambda n: heinsen_routing.Routing(d_cov=C, d_inp=D, d_out=H, n_inp=n, n_out=-1),
    "slots": lambda _: fastroute.SlotAttention(M, D, H),
    "definable": definable,
    "a layer twice": lambda n: definable(
        n, G=nn.Sequential(layer := nn.Linear(H, H), nn.Tanh(), layer, nn.Linear(H, D))
    ),
}


#: Slots take any number of inputs.
THREE = (("matrix", N), ("matrix", -1), ("slots", N), ("definable", N), ("definable", -1))


def made(name: str, n_inp: int = N) -> nn.Module:
    """In float64, every parameter with its own values."""
    torch.manual_seed(1)
    layer = LAYERS[name](n_inp).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def inputs(name: str, n: int = N, batch: tuple[int, ...] = (B,)) -> tuple[Given, dict[str, Any]]:
    """(inputs, other arguments)."""
    x = vectors(n, batch)
    if name == "slots":
        return {"x_inp": x}, {"slots": torch.linspace(-1, 1, M * H, dtype=x.dtype).view(M, H)}
    if name in ("definable", "a layer twice"):
        return {"x_inp": x}, {}
    given = {"a_inp": x[..., 0], "mu_inp": vectors(n * C, batch, 3).unflatten(-2, (n, C))}
    return given, {"n_out": 4} if name == "2019, any outputs" else {}


def axis(name: str) -> int:
    return {"a_inp": -1, "mu_inp": -3, "x_inp": -2}[name]


def part(t: Tensor, world: World, size: int, along: int) -> Tensor:
    parts, k = t.chunk(size, along), world.rows(size).get_local_rank()
    return parts[k] if k < len(parts) else t.narrow(along, 0, 0)


def loss(made: Any) -> Tensor:
    """Of every output, each number with a weight of its own."""
    several = made if isinstance(made, tuple) else (made,)
    each = [(full(y) * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in several]
    total: Tensor = torch.stack(each).sum()
    return total


def outputs(made: Any) -> list[Tensor]:
    return [full(y).detach() for y in (made if isinstance(made, tuple) else (made,))]


def compare(
    world: World, size: int, name: str, n: int, n_inp: int, style: RowShardedCapsules | None = None,
    whole: bool = False, batch: tuple[int, ...] = (B,), mask: Tensor | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """Values, and gradients of the inputs and of all parameters."""
    plain = made(name, n_inp)
    sharded = parallelize_module(deepcopy(plain), world.rows(size), style or RowShardedCapsules())
    given, more = inputs(name, n, batch)
    here: Given = {}
    for key, t in given.items():
        t.requires_grad_()
        here[key] = (t if whole else part(t, world, size, axis(key))).detach().clone().requires_grad_()
    masks = {} if mask is None else {"mask": mask}
    own_masks = {} if mask is None else {"mask": part(mask, world, size, -2)}
    y = plain(**given, **more, **options, **masks)
    z = sharded(**here, **more, **options, **own_masks)
    same(outputs(z), outputs(y))
    loss(y).backward()
    loss(z).backward()
    for key, t in given.items():
        same(here[key].grad, t.grad if whole else part(t.grad, world, size, axis(key)))  # type: ignore[arg-type]
    same(gradients(sharded), gradients(plain))
    assert all(isinstance(t, DTensor) for t in (*sharded.parameters(), *sharded.buffers()))
    assert list(sharded.state_dict()) == list(plain.state_dict())
    return sharded


@case
def every_layer(world: World) -> None:
    for name, size in itertools.product(LAYERS, (1, 2, 4)):
        for n_inp in (N,) if name == "slots" else (N, -1):
            compare(world, size, name, N, n_inp)


@case
def uneven_and_empty(world: World) -> None:
    """Fewer inputs than ranks; no sample; several leading dimensions."""
    for name, n in itertools.product(LAYERS, (1, 3, 5)):
        for n_inp in (n,) if name in ("slots", "one iteration") else (n, -1):
            compare(world, 4, name, n, n_inp)
    for name, batch in itertools.product(("matrix", "slots", "definable"), ((), (2, 3), (0,))):
        compare(world, 4, name, N, N, batch=batch)


@case
def masks_and_lengths(world: World) -> None:
    draw = torch.Generator().manual_seed(4)
    mask = torch.rand(B, N, M, generator=draw) < 0.4
    mask[:, 4] = True  # an input that reaches nothing
    for (name, n_inp), size in itertools.product(THREE, (2, 4)):
        compare(world, size, name, N, n_inp, mask=mask)
        compare(world, size, name, N, n_inp, lengths=[N, 2])
        compare(world, size, name, N, n_inp, mask=mask, lengths=[4, N])


@case
def layouts(world: World) -> None:
    for size in (2, 4):
        for name, n_inp in THREE:
            compare(world, size, name, N, n_inp, RowShardedCapsules(input_layouts=Replicate()), whole=True)
            mesh, plain = world.rows(size), made(name, n_inp)
            given, more = inputs(name)
            y = plain(**given, **more)
            sharded = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules(use_local_output=False))
            z = sharded(**{k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in given.items()}, **more)
            assert all(t.placements == (Replicate(),) for t in (z if isinstance(z, tuple) else (z,)))
            same(outputs(z), outputs(y))
            split = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules(output_layouts=Shard(-2)))
            z = split(**{k: part(t, world, size, axis(k)) for k, t in given.items()}, **more)
            axes = (-1, -3, -3) if name == "matrix" else (-2,)
            same([t.detach() for t in (z if isinstance(z, tuple) else (z,))],
                 [part(t, world, size, a) for t, a in zip(outputs(y), axes, strict=True)])  # fmt: skip


@case
def row_parameters(world: World) -> None:
    """Votes of the user's with a row per input vector; without their name, an error."""
    for n in (N, 3):
        torch.manual_seed(1)
        plain = definable(n, F=Votes(n)).double()
        mesh = world.rows(4)
        sharded = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules(row_parameters=["F.weight"]))
        x = vectors(n)
        y, z = plain(x), sharded(part(x, world, 4, -2))
        same(z, y.detach())
        loss(y).backward()
        loss(z).backward()
        same(gradients(sharded), gradients(plain))
        assert sharded.F.weight.placements == (Shard(0),)  # type: ignore[union-attr]
        unnamed = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules())
        says("(does not broadcast|einsum|[Ss]ize|operands|F: expected)", (RuntimeError, ValueError),  # type: ignore[arg-type]
             lambda x=x, unnamed=unnamed: unnamed(part(x, world, 4, -2)))  # fmt: skip


@case
def second_derivatives(world: World) -> None:
    for name, n_inp in (*THREE, ("skm", 3), ("slots", 3)):
        n = 3 if n_inp == 3 else N
        plain = made(name, n_inp)
        sharded = parallelize_module(deepcopy(plain), world.rows(4), RowShardedCapsules())
        given, more = inputs(name, n)
        found = []
        for module, here in ((plain, given), (sharded, {k: part(t, world, 4, axis(k)) for k, t in given.items()})):
            leaves = {k: t.clone().requires_grad_() for k, t in here.items()}
            parameters = list(module.parameters())
            first = torch.autograd.grad(
                loss(module(**leaves, **more)), parameters, create_graph=True, allow_unused=True
            )
            penalty = sum(full(g).square().sum() for g in first if g is not None)
            again = torch.autograd.grad(penalty, [*leaves.values(), *parameters], allow_unused=True)
            names = [*leaves, *(k for k, _ in module.named_parameters())]
            found.append({k: None if t is None else full(t) for k, t in zip(names, again, strict=True)})
        expected, got = found
        for key in given:
            same(got.pop(key), part(expected.pop(key), world, 4, axis(key)), rtol=1e-9, atol=1e-9)
        zeros = {k: torch.zeros(()) for k in expected}
        for key, t in expected.items():
            other = got[key]
            same(zeros[key] if other is None else other, torch.zeros_like(other) if t is None and other is not None
                 else zeros[key] if t is None else t, rtol=1e-9, atol=1e-9)  # fmt: skip


@case
def drawn_slots(world: World) -> None:
    """Those of the first rank, whatever the others' seeds; attention is of a rank's own inputs."""
    plain = made("slots")
    sharded = parallelize_module(deepcopy(plain), world.rows(4), RowShardedCapsules())
    x = vectors(3)
    torch.manual_seed(7)
    y, attn = plain(x, return_attn=True)
    torch.manual_seed(7 + world.rank)
    z, own = sharded(part(x, world, 4, -2), return_attn=True)
    same(z, y)
    same(own, part(attn, world, 4, -2))


@case
def compiled(world: World) -> None:
    """``fullgraph``: collectives are in the graph."""
    if world.rank >= 2:
        return
    layers = {"matrix": matrix(N, n_iters=2), "definable": definable(-1, n_iters=2)}
    layers["slots"] = fastroute.SlotAttention(M, D, H, n_iters=2)
    for name, layer in layers.items():
        torch._dynamo.reset()
        plain = layer.double()
        sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
        given, more = inputs(name)
        here = {k: part(t, world, 2, axis(k)) for k, t in given.items()}
        z = torch.compile(sharded, fullgraph=True, backend="aot_eager")(**here, **more)
        y = plain(**given, **more)
        same(outputs(z), outputs(y))
        loss(y).backward()
        loss(z).backward()
        same(gradients(sharded), gradients(plain))


@case
def two_dimensions_and_checkpoints(world: World) -> None:
    """Data x inputs trains to the weights of one process, and goes on in other shardings, and in one process."""
    for name, n_inp in THREE:
        plain = made(name, n_inp)
        given, more = inputs(name, batch=(4,))
        sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
        data = world.meshes[2]["data"]
        fully_shard(sharded, mesh=data)
        here = {k: part(t.chunk(2)[data.get_local_rank()], world, 2, axis(k)) for k, t in given.items()}
        optimizers = []
        for module, own in ((plain, given), (sharded, here)):
            optimizers.append(torch.optim.AdamW(module.parameters(), lr=0.1, eps=0.1))
            for _ in range(2):
                optimizers[-1].zero_grad()
                y = module(**own, **more)
                (
                    sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))) / len(next(iter(own.values())))
                ).backward()
                optimizers[-1].step()
        expected = {k: t.detach() for k, t in plain.state_dict().items()}
        same({k: full(t).detach() for k, t in sharded.state_dict().items()}, expected)
        found = full_state_dict(sharded)
        if world.rank == 0:
            made(name, n_inp).load_state_dict(found)
        with folder(world) as path:
            Checkpoints(path, {"model": sharded}, optimizers[1]).save(1)
            for size in (4, 1):
                other = parallelize_module(made(name, n_inp), world.rows(size), RowShardedCapsules())
                optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, eps=0.1)
                assert Checkpoints(path, {"model": other}, optimizer).load() == 1
                same({k: full(t).detach() for k, t in other.state_dict().items()}, expected)
                known = [k for k, p in plain.named_parameters() if p in optimizers[0].state]
                assert known == [k for k, p in other.named_parameters() if optimizer.state[p]]
                for k in known:  # slots that are given teach nothing of how to draw them
                    pairs = ((optimizer, other), (optimizers[0], plain))
                    moments = (o.state[m.get_parameter(k)]["exp_avg"] for o, m in pairs)
                    same(*map(full, moments))


@case
def made_without_memory(world: World) -> None:
    for name, n_inp in itertools.product(("matrix", "slots", "definable", "2019"), (N, 3)):
        torch.manual_seed(world.rank)
        with torch.device("meta"):
            layer = LAYERS[name](n_inp)
        sharded = parallelize_module(layer, world.rows(4), RowShardedCapsules()).to_empty(device="cpu")
        with torch.no_grad():
            for p in sharded.parameters():
                p.fill_(1)
        sharded.reset_parameters()
        for m in sharded.modules():
            if m is not sharded and hasattr(m, "reset_parameters"):
                torch.manual_seed(0)
                m.reset_parameters()
        exact = LAYERS[name](n_inp).double()
        exact.load_state_dict({k: full(t) for k, t in sharded.state_dict().items()})
        given, more = inputs(name, 3 if n_inp == 3 else N)
        given = {k: t.float() for k, t in given.items()}
        more = {k: t.float() if isinstance(t, Tensor) else t for k, t in more.items()}
        z = sharded(**{k: part(t, world, 4, axis(k)) for k, t in given.items()}, **more)
        double = {k: t.double() if isinstance(t, Tensor) else t for k, t in (given | more).items()}

        def truth(exact: nn.Module = exact, double: Any = double) -> dict[Any, Tensor]:
            return dict(enumerate(outputs(exact(**double))))

        assert_within_budget(dict(enumerate(outputs(z))), truth, torch.float32, name)


@case
def bytes_of_a_step(world: World) -> None:
    """The formulas of docs/distributed.md."""
    capsule = M * C * H
    expected = {
        "matrix": 3 * [B * (2 * M + capsule), B * capsule] + 2 * [B * (M + 2 * capsule)],
        "definable": 3 * [B * M * H] + 2 * [B * M * D],
        "slots": 3 * [B * M * (H + 1)] + 3 * [B * M * H],
    }
    for name, sums in expected.items():
        sharded = parallelize_module(made(name), world.rows(4), RowShardedCapsules())
        given, more = inputs(name)
        here = {k: part(t, world, 4, axis(k)) for k, t in given.items()}
        sharded(**here, **more)
        common = sum(p.numel() for p in sharded.by_inputs(sharded).values())  # type: ignore[operator, union-attr]
        sums = [*sums, *([common] if common else [])]
        with Traffic() as traffic:
            loss(sharded(**here, **more)).backward()
        assert traffic.calls["all_reduce"] == len(sums), (name, traffic.calls, sums)
        assert traffic.bytes["all_reduce"] == 8 * sum(sums), (name, traffic.bytes, sums)


@case
def what_cannot_be_sharded(world: World) -> None:
    mesh, odd = world.rows(4), world.rank == 2
    x = part(vectors(), world, 4, -2)

    def shard(module: nn.Module, **options: Any) -> Any:
        return parallelize_module(module.double(), mesh, RowShardedCapsules(**options))

    says("return_dict: expected False", ValueError, lambda: shard(matrix(N, return_dict=True)))
    says("d_inp: expected the width", ValueError, lambda: shard(definable(-1, d_inp=None)))
    says("one of EfficientVectorRouting, .*SlotAttention.*got Linear", TypeError, lambda: shard(nn.Linear(2, 2)))
    both = fastroute.SlotAttention(3, 4, 4)
    both.k.weight = both.q.weight
    says("q.weight, which both use", ValueError, lambda: shard(both))
    tied = definable(N, G=nn.Linear(D, D), F=nn.Linear(D, D * M))
    tied.A = nn.Sequential(tied.G, nn.Linear(D, 1))  # type: ignore[operator]
    says("G.weight.*which both use", ValueError, lambda: shard(tied))
    says("row_parameters: expected names", ValueError, lambda: shard(definable(N), row_parameters=["F.weigth"]))
    for name, function in (
        ("A", lambda t: (t - t.mean(-2, keepdim=True)).sum(-1)),  # mixes vectors
        ("A", lambda t: t.sum(-1) * torch.arange(t.shape[-2])),  # counts them
        ("F", nn.Sequential(nn.Flatten(-2), nn.Unflatten(-1, (-1, D)), nn.Softmax(-2), nn.Linear(D, M * H))),
        ("S", lambda t, y: (t @ y.mT).softmax(-2)),
    ):
        says(f"{name}: expected what it returns", ValueError,
             lambda name=name, f=function: shard(definable(N, **{name: f}))(x))  # fmt: skip
    weight = nn.Parameter(torch.randn(D, dtype=torch.float64))
    says("A: expected what it trains", ValueError, lambda: shard(definable(N, A=lambda t: t @ weight))(x))
    norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(D), nn.Unflatten(0, (B, -1)), nn.Linear(D, 1))
    shard(definable(N, A=deepcopy(norm)).eval())(x)
    says("A.1: expected no batch norm", ValueError, lambda: shard(definable(N, A=norm))(x))
    dropping = shard(definable(N, A=nn.Sequential(nn.Dropout(0.5), nn.Linear(D, 1))))
    dropping(x)
    assert dropping.A.training
    given, _ = inputs("matrix")
    here = {k: part(t, world, 4, axis(k)) for k, t in given.items()}
    sharded = shard(matrix(N))
    wrong = here | {"mu_inp": here["mu_inp"][..., :4]} if odd else here
    says("d_inp: expected matrices of 5 columns, got 4.* on rank 2", ValueError, lambda: sharded(**wrong))
    less = {k: t.narrow(axis(k), 0, 0) for k, t in here.items()} if world.rank == 1 else here
    says("mu_inp: expected the 3 of 10 inputs.* on rank 1", ValueError, lambda: sharded(**less))
    says("mask: expected .*on rank 2", ValueError,
         lambda: sharded(**here, mask=torch.zeros(1, 7, dtype=torch.bool) if odd else None))  # fmt: skip
    slots = torch.full((M, H), float(odd), dtype=torch.float64)
    says("slots: expected the same on every rank", ValueError, lambda: shard(made("slots"))(x, slots))
    says("n_out: expected a number", ValueError, lambda: shard(made("2019, any outputs"))(**here))
    says("return_R: expected False", ValueError, lambda: shard(made("2019"))(**here, return_R=True))
    routing = shard(made("definable"))
    says("torch.func", NotImplementedError, lambda: torch.func.grad(lambda t: routing(t).sum())(x))
