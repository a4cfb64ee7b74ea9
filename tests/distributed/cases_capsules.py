"""Capsule layers sharded by input vectors, against the layer in one process (see ``tests/distributed/ranks.py``)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastroute
from bench.distributed_model import Routing
from fastroute.distributed import RowShardedCapsules, agree
from tests.distributed.ranks import World, case
from tests.helpers.budget import assert_within_budget
from tests.helpers.traffic import Traffic

N, M, D, H, B = 10, 3, 5, 4, 2
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


def layer(n_inp: int = N, n_iters: int = 2, **options: Any) -> fastroute.EfficientVectorRouting:
    """In float64, every parameter with its own values."""
    torch.manual_seed(1)
    made = fastroute.EfficientVectorRouting(n_inp, M, D, options.pop("d_out", H), n_iters, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def vectors(n: int = N, batch: Sequence[int] = (B,), seed: int = 2) -> Tensor:
    return torch.randn(*batch, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own(x: Tensor, world: World, size: int, along: int = -2) -> Tensor:
    """This rank's part, as ``torch.chunk`` cuts it."""
    mesh = world.rows(size)
    parts = x.chunk(size, along)
    k = mesh.get_local_rank()
    return parts[k] if k < len(parts) else x.narrow(along, 0, 0)


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {k: None if p.grad is None else full(p.grad) for k, p in module.named_parameters()}


def same(found: Any, expected: Any, **more: Any) -> None:
    torch.testing.assert_close(found, expected, **(TOLERANCE | more))


def compare(
    world: World, size: int, plain: fastroute.EfficientVectorRouting, x: Tensor, *,
    style: RowShardedCapsules | None = None, give: Callable[[Tensor], Tensor] | None = None,
    own_mask: Tensor | None = None, mask: Tensor | None = None, lengths: Any = None,
) -> torch.nn.Module:  # fmt: skip
    """Values, and gradients of x and of all parameters."""
    sharded = parallelize_module(deepcopy(plain), world.rows(size), style or RowShardedCapsules())
    whole = x.clone().requires_grad_()
    y = plain(whole, mask, lengths=lengths)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    plain.zero_grad()
    y.backward(dy)
    part = (give or (lambda t: own(t, world, size)))(x).clone().requires_grad_()
    z = sharded(part, own_mask, lengths=lengths)
    same(z, y.detach())
    z.backward(dy)
    if part.shape == x.shape:
        same(part.grad, whole.grad)
    else:
        same(part.grad, own(whole.grad, world, size))
    same(gradients(sharded), gradients(plain))
    assert all(isinstance(t, DTensor) for t in (*sharded.parameters(), *sharded.buffers()))
    return sharded


SIZES = (1, 2, 4)


@case
def local_vectors(world: World) -> None:
    for size, n_inp, n_iters in itertools.product(SIZES, (N, -1), (1, 2, 3)):
        compare(world, size, layer(n_inp, n_iters), vectors())
    compare(world, 4, layer(normalize=False, d_out=1), vectors())


@case
def uneven_and_empty(world: World) -> None:
    """Fewer vectors than ranks, too; and with n_inp = -1 other numbers than DTensor has."""
    for size, n in itertools.product((2, 4), (1, 2, 3, 5, 7)):
        for n_inp in (n, -1):
            compare(world, size, layer(n_inp), vectors(n))
    ends = [0, 1, 1, 6, N]  # rank 1 has none
    k = world.rank
    x, plain = vectors(), layer(-1)
    sharded = parallelize_module(deepcopy(plain), world.rows(4), RowShardedCapsules())
    part = x[:, ends[k] : ends[k + 1]].clone().requires_grad_()
    whole = x.clone().requires_grad_()
    for given in ({}, {"lengths": [7, 3]}):
        y, z = plain(whole, **given), sharded(part, **given)
        same(z, y.detach())
        plain.zero_grad()
        sharded.zero_grad()
        whole.grad = part.grad = None
        y.square().sum().backward()
        z.square().sum().backward()
        same(part.grad, whole.grad[:, ends[k] : ends[k + 1]])
        same(gradients(sharded), gradients(plain))


@case
def leading_dimensions(world: World) -> None:
    for batch in ((), (2, 3), (0,)):
        for n_inp in (N, -1):
            compare(world, 4, layer(n_inp), vectors(batch=batch))


@case
def masks_and_lengths(world: World) -> None:
    draw = torch.Generator().manual_seed(4)
    masks = [torch.rand(N, M, generator=draw) < 0.4, torch.rand(B, N, M, generator=draw) < 0.4,
             torch.rand(B, 1, M, generator=draw) < 0.4]  # fmt: skip
    masks[1][:, 4] = True  # an input that reaches nothing
    for size, mask, n_inp in itertools.product((2, 4), masks, (N, -1)):
        part = mask if mask.shape[-2] == 1 else own(mask, world, size)
        compare(world, size, layer(n_inp), vectors(), mask=mask, own_mask=part)
    compare(world, 4, layer(), vectors(), mask=masks[1], own_mask=masks[1])  # of all vectors
    for size, lengths, n_inp in itertools.product((2, 4), ([N, 2], [0, 5]), (N, -1)):
        compare(world, size, layer(n_inp), vectors(), lengths=lengths)
        compare(
            world, size, layer(n_inp), vectors(), lengths=lengths, mask=masks[1], own_mask=own(masks[1], world, size)
        )


@case
def layouts(world: World) -> None:
    """All vectors on every rank; DTensors in and out."""
    for size, n in itertools.product(SIZES, (N, 3)):
        mesh = world.rows(size)
        for n_inp in (n, -1):
            x = vectors(n)
            compare(world, size, layer(n_inp), x, style=RowShardedCapsules(input_layouts=Replicate()), give=lambda t: t)
            plain = layer(n_inp)
            for placement in (Shard(1), Replicate(), Shard(0)):
                given = torch.distributed.tensor.distribute_tensor(x, mesh, [placement]).requires_grad_()
                sharded = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules(use_local_output=False))
                z = sharded(given)
                assert isinstance(z, DTensor) and z.placements == (Replicate(),)
                whole = x.clone().requires_grad_()
                y = plain(whole)
                same(z.full_tensor(), y.detach())
                plain.zero_grad()
                y.square().sum().backward()
                z.square().sum().backward()
                same(given.grad.full_tensor(), whole.grad)
                same(gradients(sharded), gradients(plain))
            style = RowShardedCapsules(output_layouts=Shard(-2), use_local_output=False)
            split = parallelize_module(deepcopy(plain), mesh, style)
            z = split(own(x, world, size))
            assert z.placements == (Shard(1),)
            same(z.full_tensor(), plain(x))
            (z.to_local() * own(torch.arange(1.0, M + 1)[:, None].double(), world, size)).sum().backward()
            plain.zero_grad()
            (plain(x) * torch.arange(1.0, M + 1)[:, None]).sum().backward()
            same(gradients(split), gradients(plain))


@case
def streams(world: World) -> None:
    for size, n_inp, n, n_iters in itertools.product((1, 2, 4), (N, -1), (N, 5), (1, 2, 3)):
        plain = layer(n if n_inp == N else -1, n_iters)
        sharded = parallelize_module(deepcopy(plain), world.rows(size), RowShardedCapsules())
        x = vectors(n)
        part = own(x, world, size)
        mask = torch.rand(n, M, generator=torch.Generator().manual_seed(5)) < 0.4
        given: tuple[dict[str, Any], ...] = ({}, {"lengths": [n, 2]}, {"mask": mask, "lengths": [0, n]})
        for kwargs in given:
            own_kwargs = kwargs | ({"mask": own(mask, world, size)} if "mask" in kwargs else {})
            y, z = plain(x, **kwargs), sharded.stream(part, rows=1, **own_kwargs)
            same(z, y.detach())
            plain.zero_grad()
            sharded.zero_grad()
            y.square().sum().backward()
            z.square().sum().backward()
            same(gradients(sharded), gradients(plain))


@case
def second_derivatives(world: World) -> None:
    for n_inp, size in itertools.product((N, -1, 3), (2, 4)):
        plain = layer(n_inp)
        x = vectors(3 if n_inp == 3 else N)
        sharded = parallelize_module(deepcopy(plain), world.rows(size), RowShardedCapsules())
        found = []
        for module, given in ((plain, x), (sharded, own(x, world, size))):
            leaf = given.clone().requires_grad_()
            names = [k for k, _ in module.named_parameters()]
            y = module(leaf).square().sum()
            first = torch.autograd.grad(y, [module.W_F2, module.W_G1], create_graph=True)
            penalty = sum(full(g).square().sum() for g in first)
            made = torch.autograd.grad(penalty, [leaf, *module.parameters()], allow_unused=True)
            found.append({"x": made[0], **dict(zip(names, made[1:], strict=True))})
        expected, got = found
        same(got.pop("x"), own(expected.pop("x"), world, size))
        same({k: None if t is None else full(t) for k, t in got.items()}, expected, rtol=1e-10)


@case
def dtypes(world: World) -> None:
    """Every combination that one process takes; sums are in float32 or more."""
    for dtype, given in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        plain = layer().to(dtype)
        x = vectors().to(given)
        sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
        y, z = plain(x), sharded(own(x, world, 2))
        assert z.dtype == y.dtype
        exact = deepcopy(plain).double()
        assert_within_budget({"y": z}, lambda exact=exact, x=x: {"y": exact(x.double())}, z.dtype)
        z.sum().backward()
        assert {p.grad.dtype for p in sharded.parameters()} == {dtype}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sharded(own(x, world, 2)).dtype == plain(x).dtype


@case
def compiled(world: World) -> None:
    """``fullgraph``, and each collective is in the graph."""
    if world.rank >= 2:  # compiling takes seconds, and pairs are all alike
        return
    plain, x = layer(), vectors()
    sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
    sums: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        sums.append(sum(node.target is torch.ops._c10d_functional.all_reduce.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    made = torch.compile(sharded, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    part = own(x, world, 2).clone().requires_grad_()
    whole = x.clone().requires_grad_()
    z, y = made(part), plain(whole)
    same(z, y.detach())
    z.square().sum().backward()
    y.square().sum().backward()
    same(part.grad, own(whole.grad, world, 2))
    same(gradients(sharded), gradients(plain))
    assert sums == [2, 1]


@case
def two_dimensions(world: World) -> None:
    """Data parallel over one dimension of a mesh, input vectors over the other: the weights of one process."""
    x = vectors(batch=(4,))
    for n_inp, policy in ((N, None), (-1, None), (N, CPUOffloadPolicy(pin_memory=False))):
        plain = layer(n_inp)
        sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
        data = world.meshes[2]["data"]
        fully_shard(sharded, mesh=data, **({} if policy is None else {"offload_policy": policy}))
        replica = x.chunk(2)[data.get_local_rank()]
        for module, given in ((plain, x), (sharded, own(replica, world, 2))):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                module(given).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
        same({k: full(p).detach() for k, p in sharded.named_parameters()}, dict(plain.named_parameters()))


@case
def bytes_of_a_step(world: World) -> None:
    for size, n_inp, n_iters, batch in itertools.product((2, 4), (N, -1), (1, 2, 3), (1, B)):
        sharded = parallelize_module(layer(n_inp, n_iters), world.rows(size), RowShardedCapsules())
        x = own(vectors(batch=(batch,)), world, size)
        sharded(x)  # the ranks compare what they were given, once
        with Traffic() as traffic:
            sharded(x).sum().backward()
        expected = Routing(batch, N, M, D, H, n_iters, n_inp == -1).all_reduces()
        assert traffic.calls["all_reduce"] == len(expected)
        assert traffic.bytes["all_reduce"] == 8 * sum(expected)
        assert traffic.bytes["all_gather_into_tensor"] == (8 if n_inp == -1 else 0)
        with Traffic() as traffic, torch.no_grad():
            sharded(x)
        assert traffic.bytes["all_reduce"] == 8 * sum(expected[:n_iters])


@case
def made_without_memory(world: World) -> None:
    """A layer that is never whole: the ranks draw their own rows, and the first one what all have."""
    for size, n_inp in itertools.product((2, 4), (N, 3, -1)):
        torch.manual_seed(world.rank)
        made = fastroute.EfficientVectorRouting(n_inp, M, D, H, device="meta")
        sharded = parallelize_module(made, world.rows(size), RowShardedCapsules()).to_empty(device="cpu")
        sharded.reset_parameters()
        weights = {k: t.full_tensor() for k, t in sharded.state_dict().items()}
        assert all(t.isfinite().all() for t in weights.values())
        agree(weights, world.rows(size), layer="drawn")  # replicas are one
        if n_inp == N:
            assert weights["W_A"].unique().numel() == weights["W_A"].numel()
        plain = fastroute.EfficientVectorRouting(n_inp, M, D, H)
        plain.load_state_dict(weights)
        x = vectors(3 if n_inp == 3 else N).float()
        torch.testing.assert_close(sharded(own(x, world, size)), plain(x), rtol=1e-4, atol=1e-5)


def says(message: str, kind: type[Exception], run: Callable[[], Any]) -> None:
    try:
        run()
    except kind as error:
        assert re.search(message, str(error)), str(error)
    else:
        raise AssertionError(f"nothing was said; expected: {message}")


@case
def bad_input(world: World) -> None:
    """On all ranks, whichever is wrong; and afterwards the ranks still go together."""
    mesh, odd = world.rows(4), world.rank == 2

    def shard(module: torch.nn.Module, mesh: Any = mesh, **options: Any) -> Any:
        return parallelize_module(module, mesh, RowShardedCapsules(**options))

    other = torch.nn.Bilinear(3, 4, 2) if odd else layer()
    says(r"TypeError: module: .*Bilinear.* on rank 2", ValueError, lambda: shard(other))
    says(r"EfficientVectorRouting, .*, got Linear", TypeError, lambda: shard(torch.nn.Linear(2, 2)))
    says("return_dict: expected False, got True", ValueError, lambda: shard(layer(return_dict=True)))
    made = layer()
    shares = made._buffers.pop("CONST_ones_over_n_out")
    made.CONST_ones_over_n_out = torch.nn.Parameter(shares.clone())
    says("CONST_ones_over_n_out: expected shares of outputs that are not learned", ValueError, lambda: shard(made))
    says(r"module: .*n_inp=10.* on ranks 0, 1 and 3, .*n_inp=9.* on rank 2", ValueError,
         lambda: shard(layer(9 if odd else N)))  # fmt: skip
    says(r"W_A: .*float32.* on rank 2", ValueError, lambda: shard(layer().float() if odd else layer()))
    says("W_G1: .*False.* on rank 2", ValueError, lambda: shard(frozen("W_G1") if odd else layer()))
    says("one dimension", ValueError, lambda: shard(layer(), world.meshes[2]))
    says("not sharded, got DTensors", ValueError, lambda: shard(shard(layer())) and None)
    says("output_layouts: .*Partial", TypeError, lambda: RowShardedCapsules(output_layouts=Partial()))
    hooked = layer(-1)
    hooked.compute_beta_use.register_forward_hook(lambda *_: None)
    says("without hooks", ValueError, lambda: shard(hooked))
    parametrized = layer()
    torch.nn.utils.parametrize.register_parametrization(parametrized, "W_F1", torch.nn.Identity())
    says("(parametrizations|got Parametrized)", (ValueError, TypeError), lambda: shard(parametrized))

    x = own(vectors(), world, 4)
    for given, message in (
        (x[:1] if odd else x, r"leading dimensions of x_inp: .*\[2\] on ranks 0, 1 and 3, \[1\] on rank 2"),
        (x.float() if odd else x, "dtype of x_inp: .*float32 on rank 2"),
        (x[:, :2] if odd else x, r"ValueError: x_inp: expected the 3 of 10 .* from number 6 on.*got 2.* on rank 2"),
        (x[..., :4] if odd else x, "width 5, got 4.* on rank 2"),
    ):
        says(message, ValueError, lambda given=given: shard(layer())(given))
    says("lengths: .*on rank 2", ValueError, lambda: shard(layer())(x, lengths=[N, 3 if odd else 4]))
    says("lengths: expected values from 0 to 10", ValueError, lambda: shard(layer())(x, lengths=[N, 11]))
    sharded = shard(layer())
    sharded(x)
    with fastroute.strict(True):  # later calls, too
        says("dtype of x_inp: .*float32 on rank 2", ValueError, lambda: sharded(x.float() if odd else x))
    whole = shard(layer(), input_layouts=Replicate())
    whole(vectors())
    with fastroute.strict(True):
        says("x_inp: expected the same", ValueError, lambda: whole(vectors() + odd))
    later = shard(layer())
    later.W_F2.requires_grad_(not odd)
    says(r"frozen: .*\[W_F2\] on rank 2", ValueError, lambda: later(x))
    says("mask: expected .*broadcasts", ValueError, lambda: sharded(x, torch.zeros(4, 4, dtype=torch.bool)))
    says("lengths: expected values from 0 to 10", ValueError, lambda: shard(layer(-1))(x, lengths=[N, 11]))
    says("at least 1 input vector", ValueError, lambda: shard(layer(-1))(x[:, :0]))
    says("torch.func", NotImplementedError, lambda: torch.func.grad(lambda t: sharded(t).sum())(x))
    says("chunks: expected at least 1 input vector", ValueError, lambda: shard(layer(-1)).stream(x[:, :0]))
    says(r"stream: raised TypeError: chunks.* on rank 2", ValueError, lambda: sharded.stream(3 if odd else x))
    says(r"leading dimensions of chunks.* on rank 2", ValueError, lambda: sharded.stream(x[:1] if odd else x))
    same(sharded(x), layer()(vectors()).detach())


def frozen(name: str) -> fastroute.EfficientVectorRouting:
    made = layer()
    getattr(made, name).requires_grad_(False)
    return made


@case
def frozen_parameters(world: World) -> None:
    """Which get no gradient, and none of whose gradients is sent."""
    for name, n_inp in (("W_A", N), ("beta_use", N), ("W_F2", N), ("W_S", -1), ("B_A", -1)):
        plain = layer(n_inp)
        getattr(plain, name).requires_grad_(False)
        compare(world, 4, plain, vectors())
    plain = layer(-1).requires_grad_(False)
    compare(world, 4, plain, vectors())


@case
def as_other_modules(world: World) -> None:
    """Copies, averages, casts, inference mode, checkpointing, FSDP's mixed precision."""
    mesh, plain = world.rows(4), layer()
    x = own(vectors(), world, 4)
    sharded = parallelize_module(deepcopy(plain), mesh, RowShardedCapsules())
    same(deepcopy(sharded)(x), plain(vectors()))
    average = AveragedModel(sharded)
    average.update_parameters(sharded)
    same(average(x), plain(vectors()))
    with torch.inference_mode():
        y = sharded(x)
    same(y, plain(vectors()).detach())
    checkpoint(sharded, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    plain(vectors()).square().sum().backward()
    same(gradients(sharded), gradients(plain))
    assert sharded.float()(x.detach().float()).dtype == torch.float32
    mixed = parallelize_module(layer().float(), world.rows(2), RowShardedCapsules())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(mixed, mesh=world.meshes[2]["data"], mp_policy=policy)
    y = mixed(own(vectors(batch=(4,)).float(), world, 2))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}
    torch.testing.assert_close(y.float(), layer().float()(vectors(batch=(4,)).float()), rtol=0.1, atol=0.1)


@case
def compiled_for_any_number(world: World) -> None:
    if world.rank >= 2:
        return
    plain = layer(-1)
    sharded = parallelize_module(deepcopy(plain), world.rows(2), RowShardedCapsules())
    made = torch.compile(sharded, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (10, 16):
        x, lengths = vectors(n), torch.tensor([4, 1])
        z, y = made(own(x, world, 2), lengths=lengths), plain(x, lengths=lengths)
        same(z, y.detach())
        for module, out in ((plain, y), (sharded, z)):
            module.zero_grad()
            out.square().sum().backward()
        same(gradients(sharded), gradients(plain))
