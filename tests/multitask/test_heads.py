"""Sibling heads run together: the same numbers, parameters, keys and freedoms as one by one."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import fastroute
from fastroute.multitask import MTLModel, MultiHead
from fastroute.multitask.heads import Siblings
from tests.helpers.budget import assert_within_budget
from tests.helpers.poison import poisoned_memory
from tests.helpers.subprocesses import check_python

T = 7
STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "no bias": lambda: nn.Linear(5, 3, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    "inplace": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
    "tanh": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)),
    "two linear": lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)),
    "deep": lambda: nn.Sequential(
        nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Sequential(nn.Linear(6, 2))
    ),
    "gelu": lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU("tanh"), nn.Linear(4, 2)),
    "leaky": lambda: nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(0.3), nn.Linear(4, 1)),
    "trailing": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid()),
    "trailing softplus": lambda: nn.Sequential(nn.Linear(5, 4), nn.Softplus()),
    "leading": lambda: nn.Sequential(nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)),
    "two activations": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 2)),
    "dropout at rest": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 4), nn.Dropout(0.5)).eval(),
}
ONE_NODE = ("linear", "no bias", "mlp", "inplace", "tanh", "two linear", "deep", "trailing", "leading")


def heads_of(structure: str, count: int = T, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(0)
    return [STRUCTURES[structure]().to(dtype) for _ in range(count)]


def together(heads: Sequence[Any], x: Tensor, siblings: Siblings | None = None) -> list[Tensor]:
    siblings = siblings or Siblings([str(i) for i in range(len(heads))])
    return siblings(dict(zip(siblings.names, heads, strict=True)), x)


def everything(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor, heads: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Outputs, and the gradients of some weighted sum of them."""
    x = x.detach().requires_grad_()
    parameters = [p for h in heads for p in h.parameters()]
    ys = run(x)
    torch.manual_seed(5)
    cotangents = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in ys]
    grads = torch.autograd.grad(list(ys), [x, *parameters], cotangents)
    named = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return named | {"dx": grads[0]} | {f"dp{i}": g for i, g in enumerate(grads[1:])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_by_one_and_together(structure: str, dtype: torch.dtype) -> None:
    heads = heads_of(structure, dtype=dtype)
    x = torch.randn(33, 5, dtype=dtype)
    exact_heads = [copy.deepcopy(h).double() for h in heads]
    exact = everything(lambda x: [h(x) for h in exact_heads], x.double(), exact_heads)
    plain = everything(lambda x: [h(x) for h in heads], x, heads)
    with poisoned_memory():
        made = everything(lambda x: together(heads, x), x, heads)
    for kind in ("y", "dx", "dp"):
        keys = [k for k in exact if k.rstrip("0123456789") == kind]
        mine, theirs, true = (torch.cat([r[k].flatten() for k in keys]) for r in (made, plain, exact))
        assert all(made[k].shape == exact[k].shape and made[k].dtype == dtype for k in keys)
        assert_within_budget(mine, true, theirs, f"{structure} {kind}")
    assert all(t.is_contiguous() for t in together(heads, x))


@settings(max_examples=15, deadline=None)
@given(
    structure=st.sampled_from(sorted(STRUCTURES)),
    count=st.integers(6, 9),
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=3),
)
def test_any_batch(structure: str, count: int, shape: list[int]) -> None:
    heads = heads_of(structure, count)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    expected = everything(lambda x: [h(x) for h in heads], x, heads)
    made = everything(lambda x: together(heads, x), x, heads)
    for name, t in expected.items():
        assert made[name].shape == t.shape and torch.allclose(made[name], t, rtol=1e-12, atol=1e-13), name
    with torch.no_grad():
        for i, y in enumerate(together(heads, x)):
            assert torch.allclose(y, expected[f"y{i}"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_derivatives_of_both_orders(structure: str) -> None:
    heads = heads_of(structure, 6)
    names = [f"{i}.{n}" for i, h in enumerate(heads) for n, _ in h.named_parameters()]
    held = nn.ModuleList(heads)
    siblings = Siblings([str(i) for i in range(6)])

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = held

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(together(list(self.held), x, siblings))

    run = Run()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        given = {f"held.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(run, given, (x,))

    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in held.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("structure", ["mlp", "deep", "linear"])
def test_functorch_and_forward_mode(structure: str) -> None:
    heads = heads_of(structure)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    whole = torch.stack(together(heads, x))
    mapped = torch.func.vmap(lambda x: torch.stack(together(heads, x)))(x)
    assert torch.allclose(mapped.transpose(0, 1), whole)
    _, tangent = torch.func.jvp(lambda x: torch.stack(together(heads, x)), (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: torch.stack([h(x) for h in heads]), (x,), (torch.ones_like(x),))
    assert torch.allclose(tangent, expected)
    import torch.autograd.forward_ad as fwad

    with fwad.dual_level():
        dual = torch.stack(together(heads, fwad.make_dual(x, torch.ones_like(x))))
        assert torch.allclose(fwad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("structure", ONE_NODE)
def test_many_gradients_at_a_time(structure: str) -> None:
    """As Jacobians are made, by ``torch.func`` and by TorchJD."""
    heads = heads_of(structure)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for h in heads for p in h.parameters())]
    ys, zs = together(heads, x), [h(x) for h in heads]
    batched = [torch.randn(4, *y.shape, dtype=torch.float64) for y in ys]
    made, expected = (torch.autograd.grad(t, wanted, batched, is_grads_batched=True) for t in (ys, zs))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(made, expected, strict=True))


# --------------------------------------------------------------------------------------------------------- in a model


def model_of(structure: str = "mlp", count: int = T, **options: Any) -> MTLModel:
    torch.manual_seed(0)
    layers: list[dict[str, Any]] = [{"name": "trunk", "layers": nn.Linear(4, 5)}]
    for i in range(count):
        layers.append({"name": f"head{i}", "layers": STRUCTURES[structure](), "anchor_layer": "trunk",
                       "loss": nn.MSELoss()})  # fmt: skip
        layers.append({"name": f"post{i}", "layers": nn.Linear(2, 1), "anchor_layer": [f"head{i}"]})
    outputs = [f"head{i}" for i in range(count)]
    return MTLModel(layers, outputs, **options)


def groups(model: MTLModel) -> list[tuple[str, ...]]:
    return [step.names for step in model.plan.steps if step.group is not None]


def test_the_schedule() -> None:
    model = model_of()
    assert groups(model) == [tuple(f"head{i}" for i in range(T))]
    assert groups(model_of(fuse_heads=False)) == []
    assert list(model.state_dict()) == list(model_of(fuse_heads=False).state_dict())
    assert model.unused == [f"post{i}" for i in range(T)]
    model.output_tasks = ["post1", "head0"]
    assert groups(model) == [("head0", "head1")]
    other = MTLModel(
        [
            {"name": "a", "layers": nn.Linear(4, 2)},
            {"name": "b", "layers": nn.Linear(4, 2)},
            {"name": "c", "layers": nn.Linear(4, 3)},  # of another shape
            {"name": "d", "layers": nn.Linear(2, 2), "anchor_layer": "a"},
            {"name": "e", "layers": nn.Linear(2, 2), "anchor_layer": "b"},  # of another anchor
            {"name": "f", "layers": nn.Bilinear(2, 2, 2), "anchor_layer": ["a", "b"]},
            {"name": "h", "layers": nn.Bilinear(2, 2, 2), "anchor_layer": ["a", "b"]},
        ],
        list("abcdefh"),
    )
    assert groups(other) == [("a", "b")]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("order", ["list", "bfs"])
def test_a_model_trains_as_one_by_one(order: str, keep: bool) -> None:
    models = [model_of(order=order, keep_outputs=keep, fuse_heads=fuse).double() for fuse in (True, False)]
    x, y = torch.randn(8, 4).double(), [torch.randn(8, 2).double() for _ in range(T)]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model.loss(model(x), y)[0].backward()
            optimizer.step()
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


def test_a_head_that_differs_runs_by_itself() -> None:
    """Hooks, other layers, dropout at work, a parametrization, a subclass: each is seen when it comes and goes."""

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    heads = heads_of("mlp", 9)
    x = torch.randn(4, 5, dtype=torch.float64)
    siblings = Siblings([str(i) for i in range(9)])

    def agree(alone: set[int]) -> None:
        for got, head in zip(together(heads, x, siblings), heads, strict=True):
            assert torch.allclose(got, head(x), rtol=1e-12)
        recipe = siblings.recipe(heads)
        assert set(recipe.alone) == alone

    agree(set())
    seen: list[Any] = []
    handle = heads[3][0].register_forward_hook(lambda m, i, o: seen.append(o))
    together(heads, x, siblings)
    assert len(seen) == 1
    agree({3})
    handle.remove()
    agree(set())
    heads[1][2] = nn.Linear(4, 2).double()
    agree(set())
    heads[1][2] = nn.Linear(4, 3).double()
    agree({1})
    heads[1][2] = Own(4, 2).double()
    agree({1})
    heads[1][2] = nn.Linear(4, 2).double()
    parametrizations.weight_norm(heads[2][0])
    agree({2})
    heads[4] = nn.Linear(5, 2).double()
    agree({2, 4})
    heads[5][1] = nn.LeakyReLU(0.3)
    agree({2, 4, 5})
    heads[5][1], heads[6][1] = nn.LeakyReLU(0.3), nn.LeakyReLU(0.3)
    together(heads, x, siblings)
    heads[6][1].negative_slope = 0.9
    agree({2, 4, 5, 6})


def test_dropout_at_work_draws_as_one_by_one() -> None:
    models = [model_of("dropout at rest", fuse_heads=fuse).train() for fuse in (True, False)]
    x = torch.randn(8, 4)
    for mode in (True, False, True):
        outs = []
        for model in models:
            model.train(mode)
            torch.manual_seed(3)
            outs.append(model(x)[0])
        for a, b in zip(*outs, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_head_that_writes_to_its_input_is_left_alone() -> None:
    layers = [{"name": f"h{i}", "layers": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1))} for i in range(8)]
    assert groups(MTLModel(layers, [f"h{i}" for i in range(8)])) == []


def test_whoever_watches_all_modules_sees_them() -> None:
    model, seen = model_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        model(torch.randn(2, 4))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 1 + 2 * T


def test_outputs_may_be_written_to() -> None:
    model = model_of()
    out, *_ = model(torch.randn(3, 4))
    kept = [y.detach().clone() for y in out]
    out[0].mul_(2).add_(1)
    assert all(torch.equal(a, b) for a, b in zip(out[1:], kept[1:], strict=True))
    sum(y.sum() for y in out).backward()
    reference = model_of(fuse_heads=False)
    out, *_ = reference(torch.randn(3, 4))
    with torch.no_grad():
        out, *_ = model(torch.randn(3, 4))
        out[0].zero_()
        assert out[1].abs().sum() > 0


@pytest.mark.parametrize("structure", ["mlp", "linear", "deep", "trailing"])
@pytest.mark.parametrize("wanted", [(2,), (6,), (0, 3), (1, 2, 3), tuple(range(T))])
def test_gradients_of_some_outputs(structure: str, wanted: Sequence[int]) -> None:
    """A head whose output is not used has no gradient, as one by one."""
    heads = heads_of(structure)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    parameters = [p for h in heads for p in h.parameters()]
    made, expected = (
        torch.autograd.grad([ys[t].square().sum() for t in wanted], [x, *parameters], allow_unused=True)
        for ys in (together(heads, x), [h(x) for h in heads])
    )
    for a, b in zip(made, expected, strict=True):
        if b is None and structure != "trailing":
            assert a is None
        assert b is None or (a is not None and torch.allclose(a, b, rtol=1e-12))


def test_a_tasks_gradient_passes_no_other_task() -> None:
    model = model_of().double()
    x, y = torch.randn(3, 4).double(), [torch.randn(3, 2).double() for _ in range(T)]
    _, losses = model.loss(model(x), y, apart=True)
    _, together_ = model.loss(model(x), y)
    assert all(torch.allclose(losses[k], together_[k], rtol=1e-14) for k in losses)
    others = [p for i in range(1, T) for p in model.get_submodule(f"head{i}").parameters()]
    assert torch.autograd.grad(losses["head0"], others, allow_unused=True) == (None,) * len(others)


def test_frozen_heads() -> None:
    model, plain = model_of().double(), model_of(fuse_heads=False).double()
    x = torch.randn(3, 4).double()
    for m in (model, plain):
        m.head0.requires_grad_(False)
        m.head3[0].bias.requires_grad_(False)
        sum(y.sum() for y in m(x)[0]).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad), name
    for p in model.parameters():
        p.requires_grad_(False)
    assert not model(x)[0][0].requires_grad


# ------------------------------------------------------------------------------------------------------------- memory


def lie_side_by_side(model: MTLModel) -> bool:
    weights = [model.get_parameter(f"head{i}.0.weight") for i in range(T)]
    step = weights[0].numel() * weights[0].element_size()
    return all(b.data_ptr() - a.data_ptr() == step for a, b in itertools.pairwise(weights)) and (
        len({w.untyped_storage().data_ptr() for w in weights}) == 1
    )


def agrees(model: MTLModel) -> None:
    """With its own layers called one by one."""
    x = torch.randn(3, 4, dtype=model.trunk.weight.dtype)
    out = model(x)[0]
    for i, y in enumerate(out):
        assert torch.allclose(y, model.get_submodule(f"head{i}")(model.trunk(x)), rtol=1e-4, atol=1e-6)


def test_parameters_lie_side_by_side() -> None:
    model = model_of()
    before = [id(p) for p in model.parameters()]
    assert not lie_side_by_side(model)
    agrees(model)
    assert lie_side_by_side(model) and [id(p) for p in model.parameters()] == before
    whole = [id(t) for t in part_of(model).memory._whole]
    for p in model.parameters():
        torch.nn.init.normal_(p)
    agrees(model)
    assert [id(t) for t in part_of(model).memory._whole] == whole  # the same memory, no copy


def part_of(model: MTLModel) -> Any:
    (group,) = [step.group for step in model.plan.steps if step.group is not None]
    assert isinstance(group, Siblings) and group._recipe is not None
    (part,) = group._recipe.parts
    return part


def saved(model: MTLModel) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


CHANGES: dict[str, Callable[[MTLModel], MTLModel]] = {
    "double": lambda m: m.double(),
    "to and back": lambda m: m.double().float(),
    "deepcopy": copy.deepcopy,
    "load": lambda m: (m.load_state_dict(model_of().state_dict()), m)[1],
    "assign": lambda m: (m.load_state_dict(model_of().state_dict(), assign=True), m)[1],
    "assign what lay together": lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()},
                                                              assign=True), m)[1],
    "pickle": lambda m: torch.load(saved(m), weights_only=False),
    "a new parameter": lambda m: (setattr(m.head2[0], "weight", nn.Parameter(torch.randn(4, 5))), m)[1],
    "data": lambda m: (setattr(m.head2[0].weight, "data", torch.randn(4, 5)), m)[1],
    "another schedule": lambda m: (setattr(m, "keep_outputs", True), m)[1],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_parts_parameters(change: str) -> None:
    model = model_of()
    agrees(model)
    model = CHANGES[change](model)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    agrees(model)
    assert lie_side_by_side(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(y.sum() for y in model(torch.randn(3, 4, dtype=model.trunk.weight.dtype))[0]).backward()
    optimizer.step()
    agrees(model)


def test_parameters_that_somebody_has_put_somewhere_stay() -> None:
    model = model_of()
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector, model.parameters())  # as a flat optimizer's
    agrees(model)
    vector.normal_()
    agrees(model)
    assert model.head1[0].weight.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    shared = model_of().share_memory()
    agrees(shared)
    assert shared.head1[0].weight.is_shared()
    tied = model_of()
    tied.head1[0].weight = tied.head0[0].weight
    agrees(tied)
    sum(y.sum() for y in tied(torch.randn(3, 4))[0]).backward()


def test_functional_call() -> None:
    model = model_of()
    agrees(model)
    x = torch.randn(3, 4)
    given = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    got = torch.func.functional_call(model, given, (x,))[0]
    other = model_of(fuse_heads=False)
    other.load_state_dict(given)
    for a, b in zip(got, other(x)[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    agrees(model)


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error() -> None:
    for fuse in (True, False):
        model = model_of(fuse_heads=fuse)
        out = model(torch.randn(3, 4))[0]
        with torch.no_grad():
            model.head1[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(y.sum() for y in out).backward()


def test_inference_first_then_training() -> None:
    model = model_of()
    with torch.inference_mode():
        model(torch.randn(3, 4))
    sum(y.sum() for y in model(torch.randn(3, 4))[0]).backward()
    torch.optim.Adam(model.parameters()).step()
    agrees(model)


GROUP = """
import copy, math, os, tempfile
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.multitask.test_heads import T, lie_side_by_side, model_of

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
torch.manual_seed(0)
x, y = torch.randn(8, 4).double(), [torch.randn(8, 2).double() for _ in range(T)]
y[1][:] = math.nan

def trained(wrap, fuse):
    model = model_of(fuse_heads=fuse, weighting="uncertainty").double()
    for name in model.unused:
        getattr(model, name).requires_grad_(False)
    called = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(called(x), y)[0].backward()
        optimizer.step()
    return model


plain = trained(lambda m: m, False)
ddp = trained(DistributedDataParallel, True)
whole = trained(fully_shard, True)
for model in (ddp, whole):
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(a.full_tensor() if hasattr(a, "full_tensor") else a, b, msg=name)
assert not lie_side_by_side(ddp)
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_in_a_process_group() -> None:
    """DistributedDataParallel, and FSDP, whose parameters are lent to the forward pass."""
    assert "the same" in check_python(GROUP, timeout=240)


# ---------------------------------------------------------------------------------------------- compiled, and the like


@pytest.mark.parametrize("structure", ["linear", "mlp", "gelu"])
def test_compiles_to_one_graph(structure: str) -> None:
    torch._dynamo.reset()
    model = model_of(structure)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (3, 8):
        x = torch.randn(B, 4)
        for a, b in zip(compiled(x)[0], model(x)[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    sum(y.sum() for y in compiled(x)[0]).backward()
    assert model.head0.get_parameter("weight" if structure == "linear" else "0.weight").grad is not None


def test_export() -> None:
    model = model_of().outputs_only()
    x = torch.randn(3, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    for B in (3, 6):
        x = torch.randn(B, 4)
        for a, b in zip(program.module()(x), model(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    model, plain = model_of(), model_of(fuse_heads=False)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(model(x)[0], plain(x)[0], strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            assert torch.allclose(a, b, rtol=0.05, atol=0.05)
        sum(y.float().sum() for y in model(x)[0]).backward()
    assert model.head0[0].weight.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- MultiHead


def as_heads(multi: MultiHead, activation: type[nn.Module] = nn.ReLU) -> list[nn.Sequential]:
    """Its heads as modules of their own."""
    made = []
    for t in range(len(multi.tasks)):
        layers: list[nn.Module] = []
        for k, weight in enumerate(multi.weights):
            linear = nn.Linear(weight.shape[2], weight.shape[1], bias=len(multi.biases) > 0).to(weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight[t])
                if len(multi.biases):
                    linear.bias.copy_(multi.biases[k][t])
            layers += [linear] if k == len(multi.weights) - 1 else [linear, activation()]
        made.append(nn.Sequential(*layers))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [None, 4, [4, 6]])
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("gelu", nn.GELU)])
def test_multihead(hidden: Any, bias: bool, activation: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    multi = MultiHead(5, hidden, 2, 3, activation=activation, bias=bias, dtype=torch.float64)
    heads = as_heads(multi, kind)
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = torch.stack([h(x) for h in heads])
    assert torch.allclose(multi(x), expected)
    assert torch.allclose(multi(x.view(2, 3, 5)), expected.view(3, 2, 3, 2))
    task = torch.tensor([2, 0, 0, 1, 2, 0])
    assert torch.allclose(multi(x, task), expected[task, torch.arange(6)])
    names = list(multi.state_dict())
    assert names == [f"weights.{k}" for k in range(len(multi.weights))] + [
        f"biases.{k}" for k in range(len(multi.biases))
    ]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(multi, dict(zip(names, parameters, strict=True)), (x,))

    x.requires_grad_()
    parameters = [p.detach().requires_grad_() for p in multi.parameters()]
    assert torch.autograd.gradcheck(call, (x, *parameters))
    with fastroute.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, *p: torch.func.functional_call(multi, dict(zip(names, p, strict=True)), (x, task)),
            (x, *parameters),
        )


def test_multihead_forms() -> None:
    names = ["x", "y", "z"]
    for returns, kind in (("tensor", Tensor), ("list", list), ("dict", dict)):
        multi = MultiHead(5, 4, 2, names, returns=returns)
        made = multi(torch.randn(6, 5))
        assert isinstance(made, kind) and len(made) == 3
    assert list(made) == names and made["z"].shape == (6, 2)
    torch.manual_seed(0)
    wide = MultiHead(400, None, 50, 2)
    assert wide.weights[0].abs().max() <= 1 / 20 and abs(float(wide.weights[0].detach().std()) - 1 / 20 / 3**0.5) < 1e-3
    assert "400 -> 50, tasks=2" in repr(wide)


@pytest.mark.parametrize("by_task", [False, True])
def test_multihead_compiles(by_task: bool) -> None:
    torch._dynamo.reset()
    multi = MultiHead(5, 4, 2, 3)
    compiled = torch.compile(multi, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (4, 9):
        x = torch.randn(B, 5)
        args = (x, torch.randint(3, (B,))) if by_task else (x,)
        assert torch.allclose(compiled(*args), multi(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MultiHead(5, 4, 2, 3, activation="rely"), ValueError, "activation: expected one of relu.*'rely'"),
        (lambda: MultiHead(5, 4, 2, 3, returns="tuple"), ValueError, "returns: expected"),
        (lambda: MultiHead(0, 4, 2, 3), ValueError, "in_features: expected at least 1"),
        (lambda: MultiHead(5, [4, 0], 2, 3), ValueError, "hidden: expected at least 1"),
        (lambda: MultiHead(5, 4, 2.5, 3), TypeError, "out_features: expected an int"),  # type: ignore[arg-type]
        (lambda: MultiHead(5, 4, 2, []), ValueError, "tasks: expected at least one"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 4)), ValueError, r"x: expected \[..., 5\], got \[2, 4\]"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 5), torch.tensor([0, 3])), IndexError, "task: expected indices"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(2, 5), torch.tensor([0])), ValueError, "task: expected one per"),
        (lambda: MultiHead(5, 4, 2, 3)(torch.ones(1, 2, 5), torch.tensor([0])), ValueError, r"x: expected \[B, 5\]"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
