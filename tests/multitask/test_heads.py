"""Sibling heads run together: the same numbers, parameters, keys and freedoms as one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastroute.multitask import MTLModel
from fastroute.multitask.heads import Siblings
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.poison import poisoned_memory

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
    seeds.manual_seed(0)
    return [STRUCTURES[structure]().to(dtype) for _ in range(count)]


def together(heads: Sequence[Any], x: Tensor, siblings: Siblings | None = None) -> list[Tensor]:
    siblings = siblings or Siblings([str(i) for i in range(len(heads))])
    return siblings(dict(zip(siblings.names, heads, strict=True)), x)


def everything(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor, heads: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Outputs, and the gradients of some weighted sum of them."""
    x = x.detach().requires_grad_()
    parameters = [p for h in heads for p in h.parameters()]
    ys = run(x)
    seeds.manual_seed(5)
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
    with poisoned_memory():
        made = everything(lambda x: together(heads, x), x, heads)
    assert all(t.dtype == dtype for t in made.values())
    assert_within_budget(
        made, lambda: everything(lambda x: [h(x) for h in exact_heads], x.double(), exact_heads), dtype, stored=dtype
    )
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
@pytest.mark.long_after(4)
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
    seeds.manual_seed(0)
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
    model.output_tasks = ["post1", "head3", "head2", "head0"]
    assert groups(model) == [("head0", "head1", "head2", "head3")]
    model.output_tasks = ["post1", "head3", "head0"]
    assert groups(model) == []  # three gain nothing
    other = MTLModel(
        [
            {"name": "a", "layers": nn.Linear(4, 2)},
            {"name": "b", "layers": nn.Linear(4, 2)},
            {"name": "k", "layers": nn.Linear(4, 2)},
            {"name": "l", "layers": nn.Linear(4, 2)},
            {"name": "c", "layers": nn.Linear(4, 3)},  # of another shape
            {"name": "d", "layers": nn.Linear(2, 2), "anchor_layer": "a"},
            {"name": "e", "layers": nn.Linear(2, 2), "anchor_layer": "b"},  # of another anchor
            {"name": "f", "layers": nn.Bilinear(2, 2, 2), "anchor_layer": ["a", "b"]},
            {"name": "h", "layers": nn.Bilinear(2, 2, 2), "anchor_layer": ["a", "b"]},
        ],
        list("abklcdefh"),
    )
    assert groups(other) == [("a", "b", "k", "l")]


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
            seeds.manual_seed(3)
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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("structure", ONE_NODE)
def test_heads_in_turn(structure: str, frozen: bool) -> None:
    """Each has its backward pass and its step before the next, as one by one."""
    kept = structure in ("deep", "leading")  # what comes before the first product is of all heads
    found = []
    for fuse in (True, False):
        heads = heads_of(structure)
        x = torch.randn(3, 5, dtype=torch.float64, generator=seeds.generator(2)).requires_grad_(not frozen)
        ys = together(heads, x) if fuse else [h(x) for h in heads]
        for head, y in zip(heads, ys, strict=True):
            y.square().sum().backward(retain_graph=fuse and kept)
            torch.optim.SGD(head.parameters(), 0.1).step()
        found.append([*(p for h in heads for p in h.parameters()), *([] if frozen else [x.grad])])
        if not fuse or not kept:
            with pytest.raises(RuntimeError, match=r"second time|inplace operation"):
                ys[0].square().sum().backward()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_only_what_a_gradient_reads_is_held_against_it() -> None:
    """By layer, weight or bias, and whether x has a gradient: an error where, and only where, one by one has one."""
    for layer, name, wants in [(k, n, w) for k in (0, 2) for n in ("weight", "bias") for w in (False, True)]:
        told = []
        for fuse in (True, False):
            heads = heads_of("mlp")
            x = torch.randn(3, 5, dtype=torch.float64).requires_grad_(wants)
            ys = together(heads, x) if fuse else [h(x) for h in heads]
            with torch.no_grad():
                getattr(heads[1][layer], name).add_(1)
            ys[0].sum().backward()  # which is of another head
            try:
                ys[1].sum().backward()
                told.append("")
            except RuntimeError as error:
                told.append("inplace operation" if "inplace operation" in str(error) else str(error))
        assert told[0] == told[1], (layer, name, wants)


def test_a_second_derivative_reads_biases_too() -> None:
    heads = heads_of("tanh")
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ys = together(heads, x)
    with torch.no_grad():
        heads[1][0].bias.add_(1)
    torch.autograd.grad(ys[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(ys[1].sum(), x, create_graph=True)


def test_what_changes_between_heads_in_turn_is_an_error() -> None:
    heads = heads_of("linear")
    x = torch.randn(3, 5, dtype=torch.float64)
    ys = together(heads, x)
    ys[0].sum().backward()
    x.add_(1)
    with pytest.raises(RuntimeError):
        ys[1].sum().backward()


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


# ---------------------------------------------------------------------------------------------- compiled, and the like


@pytest.mark.parametrize("structure", ["linear", "mlp", "gelu"])
@pytest.mark.long_after(1)
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
