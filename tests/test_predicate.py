"""A module is called wherever reading it would miss something: ways to change a module, times layers that take modules.

What is expected is the plain loop that calls each module on its samples.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
import sys
import threading
import timeit
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fastroute
from fastroute.capsules import Add, Concatenate, EfficientVectorRouting
from fastroute.capsules.attribution import credit
from fastroute.compat.heinsen_routing_2019 import Routing
from fastroute.modules import reading as _modules
from fastroute.modules.reading import Proof, is_pristine, may_be_read
from fastroute.multitask import PLE, MTLModel
from fastroute.networks import MLP, REINFORCE, Initialization, MoE, Selection, TopKGating, Trajectory
from fastroute.ops.efficient_routing.contract import Parameters
from fastroute.ops.efficient_routing.reference import efficient_routing
from fastroute.tasks import TaskRouter, fold, live, route, set_task
from tests.helpers import seeds
from tests.helpers.tasks import images, small_vgg
from tests.helpers.threads import in_threads

F64 = torch.float64
B, D, O, K = 12, 6, 4, 3


def rows(seed: int = 0, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (B, D), generator=generator, dtype=dtype)


ACTIONS = torch.arange(B) % K


# ------------------------------------------------------------ ways to change a module


class Triple(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 3 * w


class Adapted(nn.Module):
    """As adapters do it: the layer, and a product of two small ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        like = base.weight
        self.down = nn.Linear(base.in_features, 2, bias=False).to(like)
        self.up = nn.Linear(2, base.out_features, bias=False).to(like)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base_layer(x) + self.up(self.down(x))
        return made


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Stored(Tensor):
    """A weight that is kept as something else, as quantized ones are."""

    def __new__(cls, inner: Tensor) -> Stored:
        made: Stored = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined]
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Stored(args[0].inner)

        def opened(t: Any) -> Any:
            return 2 * t.inner if isinstance(t, Stored) else t

        args, kwargs = torch.utils._pytree.tree_map(opened, (args, kwargs or {}))
        return func(*args, **kwargs)


def tensor_subclass(parent: Any, name: str) -> None:
    m = getattr(parent, name)
    m.weight = nn.Parameter(Stored(m.weight.detach()), requires_grad=False)


def adapter(parent: Any, name: str) -> None:
    setattr(parent, name, Adapted(getattr(parent, name)))


def offload(parent: Any, name: str) -> None:
    """As accelerate does it: weights on the meta device, and a forward that fetches them."""
    m = getattr(parent, name)
    stored = {k: p.detach().clone() for k, p in m.named_parameters()}
    m.to("meta")
    m.forward = lambda x: 2 * F.linear(x, stored["weight"], stored.get("bias"))


def plain_attribute(parent: Any, name: str) -> None:
    m = getattr(parent, name)
    w = m.weight.detach() * 2
    del m.weight
    m.weight = w


def own_forward(parent: Any, name: str) -> None:
    m = getattr(parent, name)
    m.forward = lambda x: 3 * F.linear(x, m.weight, m.bias)


def class_changed(parent: Any, name: str) -> None:
    getattr(parent, name).__class__ = Doubled


def without_bias(parent: Any, name: str) -> None:
    getattr(parent, name).bias = None


def pruned(parent: Any, name: str) -> None:
    prune.l1_unstructured(getattr(parent, name), "weight", amount=0.5)  # type: ignore[no-untyped-call]


def normalized(m: Any) -> None:
    torch.nn.utils.weight_norm(m)
    m.weight_g.data *= 2


def on(change: Callable[[Any], Any]) -> Callable[[Any, str], None]:
    """A change of the module itself."""

    def apply(parent: Any, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            change(getattr(parent, name))

    return apply


def patched(parent: Any, name: str) -> Callable[[], None]:
    cls: Any = nn.Linear
    before = cls.forward
    cls.forward = lambda self, x: 3 * before(self, x)

    def undo() -> None:
        cls.forward = before

    return undo


def hook_on_all(parent: Any, name: str) -> Callable[[], None]:
    def double(m: nn.Module, args: Any, made: Any) -> Any:
        return 2 * made if isinstance(m, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(double).remove


Change = Callable[[Any, str], Callable[[], None] | None]
CHANGES: dict[str, Change] = {
    "forward hook": on(lambda m: m.register_forward_hook(lambda m, x, y: 2 * y)),
    "forward hook with kwargs": on(lambda m: m.register_forward_hook(lambda m, x, k, y: 2 * y, with_kwargs=True)),
    "pre-hook": on(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] + 1,))),
    "pre-hook with kwargs": on(
        lambda m: m.register_forward_pre_hook(lambda m, x, k: ((x[0] + 1,), k), with_kwargs=True)
    ),
    "backward hook": on(
        lambda m: m.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 2 * g for g in gi))
    ),
    "backward pre-hook": on(lambda m: m.register_full_backward_pre_hook(lambda m, go: tuple(2 * g for g in go))),
    "own forward": own_forward,
    "class changed": class_changed,
    "class patched": patched,
    "hook on all modules": hook_on_all,
    "parametrization": on(lambda m: parametrize.register_parametrization(m, "weight", Triple())),
    "weight_norm": on(normalized),
    "spectral_norm": on(lambda m: torch.nn.utils.spectral_norm(m).eval()),  # whose power iteration moves in training
    "prune": pruned,
    "adapter": adapter,
    "tensor subclass": tensor_subclass,
    "offloaded": offload,
    "plain attribute": plain_attribute,
    "without bias": without_bias,
}


# ------------------------------------------------------------ layers that take modules


class Case(NamedTuple):
    layer: nn.Module
    parent: Any  #: of the Linear that is changed
    name: str
    run: Callable[[nn.Module, Tensor], Tensor]
    loop: Callable[[nn.Module, Tensor], Tensor]  #: what is expected
    x: Tensor


def chosen(selection: nn.Module, x: Tensor) -> Tensor:
    made: Tensor = selection(x, Initialization()(x)[1], ACTIONS)[0]
    return made


def each_chosen(selection: Any, x: Tensor) -> Tensor:
    made = [selection._submodules[k](x[k == ACTIONS]) for k in range(K)]
    order = torch.cat([(k == ACTIONS).nonzero()[:, 0] for k in range(K)])
    return torch.cat(made)[order.argsort()]


def selection_of(make: Callable[[], nn.Module], parent: Callable[[Any], Any], name: str) -> Case:
    layer = Selection(*[make() for _ in range(K)]).to(F64)
    return Case(layer, parent(layer._submodules), name, chosen, each_chosen, rows())


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, O))


def mixture() -> Case:
    layer = Selection(*[nn.Linear(D, O) for _ in range(K)]).to(F64)
    pairs = torch.stack([ACTIONS, (ACTIONS + 1) % K], 1)
    w = rows(3, B, 2).abs()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = m(x, Initialization()(x)[1], pairs, weights=w)[0]
        return made

    def loop(m: Any, x: Tensor) -> Tensor:
        each = torch.stack([m._submodules[k](x) for k in range(K)], 1)
        return sum(w[:, j, None] * each[torch.arange(B), pairs[:, j]] for j in range(2))  # type: ignore[return-value]

    return Case(layer, layer._submodules, "1", run, loop, rows())


def top_two(z: Tensor) -> Tensor:
    """[B, K]: the weights of two, zeros for others."""
    picked = z.topk(2, 1).indices
    return torch.zeros_like(z).scatter(1, picked, z.gather(1, picked).softmax(1))


def gating() -> Case:
    layer = TopKGating(5, D, bias=True, balance_loss=0).to(F64)

    def run(m: Any, x: Tensor) -> Tensor:
        meta = Trajectory(B)
        _, _, actions = m(x, meta)
        weights: Tensor = meta.weights_of(actions)
        return torch.zeros(B, 5, dtype=F64).scatter(1, actions, weights)

    return Case(layer, layer, "router", run, lambda m, x: top_two(m.router(x)), rows())  # type: ignore[operator]


def moe() -> Case:
    layer = MoE(D, 8, 4, bias=True).to(F64)

    def loop(m: Any, x: Tensor) -> Tensor:
        w = top_two(m.gate.router(x))
        u, v = torch.einsum("bd,ehd->beh", x, m.w_gate_up).chunk(2, -1)
        return torch.einsum("beh,edh,be->bd", F.silu(u) * v, m.w_down, w)

    return Case(layer, layer.gate, "router", lambda m, x: m(x), loop, rows())  # type: ignore[no-any-return]


AGENTS = torch.arange(B) % 2


def policies(agents: int) -> Case:
    layer = REINFORCE(K, D, num_agents=agents, approx_hidden_dims=(5,), detach=False).to(F64).eval()

    def run(m: Any, x: Tensor) -> Tensor:
        meta = Trajectory(B)
        m(x, meta, AGENTS if agents > 1 else None)
        full: Tensor = meta.records[0].columns[0].full
        return full

    def loop(m: Any, x: Tensor) -> Tensor:
        each = torch.stack([s(x) for s in m._policy], 1)
        return each[torch.arange(B), AGENTS % agents].log_softmax(1)

    return Case(layer, layer._policy[agents - 1]._approx._layers, "0", run, loop, rows())


def capsules(name: str) -> Case:
    layer = EfficientVectorRouting(-1, 4, D, 5, 2).to(F64)

    def loop(m: Any, x: Tensor) -> Tensor:
        w = Parameters(
            m.W_A, m.B_A, m.W_F1, m.W_F2, m.B_F2, m.W_G1, m.W_G2, m.B_G2, m.W_S, m.B_S, m.compute_beta_use(x),
            m.compute_beta_ign(x), None, None, m.CONST_ones_over_n_out,
        )  # fmt: skip
        return efficient_routing(x, w, n_iters=2, normalize=True)

    return Case(layer, layer, name, lambda m, x: m(x), loop, rows(0, 2, 7, D))


class Masked(nn.Module):
    """A router, written out."""

    def __init__(self, router: TaskRouter) -> None:
        super().__init__()
        self.router = [router]

    def forward(self, x: Tensor) -> Tensor:
        r = self.router[0]
        task = r.active_task
        mask = r._unit_mapping[task].to(x.dtype)
        return x * mask.reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def masked(net: Any, x: Tensor) -> Tensor:
    for m in net:
        x = Masked(m)(x) if isinstance(m, TaskRouter) else m(x)
    return x


def routed_net(**options: Any) -> nn.Sequential:
    seeds.fixed_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10),
        nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip
    route(net, 3, 0.5, generator=torch.Generator().manual_seed(1), where=lambda name, m: name != "7", **options)
    return net.to(F64)


def live_net(task: Any) -> Case:
    net = live(routed_net())
    set_task(net, task)
    linear = next(name for name, m in net.named_children() if isinstance(m, nn.Linear))
    return Case(net, net, linear, lambda m, x: m(x), masked, rows(0, 4, 3, 6, 6))


def heads() -> Case:
    nodes: list[Any] = [{"name": "trunk", "layers": nn.Linear(D, 5)}]
    nodes += [{"name": f"h{k}", "layers": nn.Linear(5, O), "anchor_layer": "trunk"} for k in range(8)]
    layer = MTLModel(nodes, [f"h{k}" for k in range(8)]).to(F64)

    def loop(m: Any, x: Tensor) -> Tensor:
        trunk = m.trunk(x)
        return torch.stack([getattr(m, f"h{k}")(trunk) for k in range(8)])

    return Case(layer, layer, "h3", lambda m, x: torch.stack(m(x)[0]), loop, rows())


def vgg_heads() -> Case:
    model = small_vgg().to(F64).eval()
    tasks = torch.tensor([0, 1, 2, 0, 1, 2])
    nn.init.normal_(model.classifier_1[0].bias)  # type: ignore[operator]

    def loop(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m(x[i : i + 1], int(t)) for i, t in enumerate(tasks)])

    return Case(model, model.classifier_1, "0", lambda m, x: m(x, tasks), loop, images().to(F64))  # type: ignore[operator]


CASES: dict[str, Callable[[], Case]] = {
    "Selection of Linear": lambda: selection_of(lambda: nn.Linear(D, O), lambda m: m, "1"),
    "Selection of Sequential": lambda: selection_of(two_layers, lambda m: m[1], "0"),
    "Selection of MLP": lambda: selection_of(lambda: MLP(D, O, (5,)), lambda m: m[1]._layers, "1"),
    "mixture": mixture,
    "TopKGating": gating,
    "MoE": moe,
    "policies of two agents": lambda: policies(2),
    "policy": lambda: policies(1),
    "compute_beta_use": lambda: capsules("compute_beta_use"),
    "compute_beta_ign": lambda: capsules("compute_beta_ign"),
    "live": lambda: live_net(1),
    "live, a task per sample": lambda: live_net(torch.tensor([0, 2, 1, 2])),
    "heads": heads,
    "VGG": vgg_heads,
}


def results(case: Case, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor | None]:
    """The output, and the gradients of x and of all parameters."""
    x = case.x.clone().requires_grad_()
    wanted = [x, *(p for p in case.layer.parameters() if p.requires_grad and not p.is_meta)]
    y = run(case.layer, x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)]


def check(case: Case) -> None:
    for _ in range(2):  # what is computed once must not be differentiated twice
        found, expected = results(case, case.run), results(case, case.loop)
        for a, b in zip(found, expected, strict=True):
            zero = torch.zeros_like(a if a is not None else b) if a is not None or b is not None else None
            if zero is not None:
                torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CASES)
def test_a_changed_module_is_called(name: str, change: str) -> None:
    seeds.fixed_seed(0)
    case = CASES[name]()
    before = case.run(case.layer, case.x).detach()
    check(case)
    seeds.fixed_seed(1)
    undo = CHANGES[change](case.parent, case.name)
    try:
        check(case)
        if "backward" not in change:  # the change matters
            assert not torch.allclose(case.run(case.layer, case.x), before)
    finally:
        if undo is not None:
            undo()


#: What make test compiles; the rest is long.
COMPILED = ("Selection of Linear",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in COMPILED else [pytest.mark.long]) for n in CASES])
def test_a_forward_that_is_set_after_compiling_is_called(name: str) -> None:
    """Dynamo guards no ``__dict__``: what is read has to be what it guards."""
    seeds.fixed_seed(0)
    case = CASES[name]()
    compiled = torch.compile(case.run, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(case.layer, case.x), before := case.run(case.layer, case.x))
        own_forward(case.parent, case.name)
        found = compiled(case.layer, case.x)
        torch.testing.assert_close(found, case.loop(case.layer, case.x))
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("name", CASES)
def test_a_change_that_is_taken_back(name: str) -> None:
    seeds.fixed_seed(0)
    case = CASES[name]()
    before = results(case, case.run)
    handle = getattr(case.parent, case.name).register_forward_hook(lambda m, x, y: 2 * y)
    assert not torch.allclose(case.run(case.layer, case.x), before[0])  # type: ignore[arg-type]
    handle.remove()
    for a, b in zip(results(case, case.run), before, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_quantized_modules_are_called() -> None:
    seeds.fixed_seed(0)
    x = rows(0, B, D, dtype=torch.float32)
    selection = Selection(*[nn.Linear(D, O) for _ in range(K)])
    gate, capsule = TopKGating(5, D), EfficientVectorRouting(-1, 4, D, 5)
    chosen(selection, x), gate.route(x), capsule(x)
    for layer in (selection, gate, capsule):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear}, dtype=torch.qint8)
        if layer is selection:
            assert torch.equal(chosen(made, x), each_chosen(made, x))
            assert not torch.equal(chosen(made, x), chosen(selection, x))
        elif layer is gate:
            routed = made.route(x)
            torch.testing.assert_close(
                torch.zeros(B, 5).scatter(1, routed.actions, routed.weights), top_two(made.router(x))
            )
        else:
            assert made(x).shape == (4, 5) and not torch.equal(made(x), capsule(x))


# ------------------------------------------------------------ what is not a Linear's change


def test_hooks_see_the_gating_of_a_mixture() -> None:
    layer, x = MoE(D, 8, 4, capacity=1.0, z_loss=0.1).to(F64), rows()
    y, aux = layer(x, torch.arange(B) > 1, return_aux=True)
    seen: list[Any] = []
    layer.gate.register_forward_hook(lambda m, args, made: seen.append(made))
    hooked, hooked_aux = layer(x, torch.arange(B) > 1, return_aux=True)
    assert len(seen) == 1 and torch.equal(seen[0][2], aux.actions)
    assert torch.equal(hooked, y)
    assert all(torch.equal(a, b) for a, b in zip(hooked_aux, aux, strict=True))


def test_a_gating_in_place_of_another() -> None:
    class First(TopKGating):
        def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(batch, *args, forced_actions=torch.zeros(len(batch), self.k, dtype=torch.int64))

    layer = MoE(D, 8, 4, k=1).to(F64)
    layer.gate = First(4, D, 1).to(F64)
    assert torch.equal(layer(rows(), return_aux=True)[1].actions, torch.zeros(B, 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_hooked_router_is_as_exact_as_a_plain_one(dtype: torch.dtype) -> None:
    gate, x = TopKGating(5, D, bias=True).to(dtype), rows().to(dtype)
    before = gate.route(x)
    gate.router.register_forward_hook(lambda m, args, made: None)
    after = gate.route(x)
    assert torch.equal(before.actions, after.actions) and torch.equal(before.weights, after.weights)


def test_hooks_on_what_stands_between_layers() -> None:
    """The nonlinearity of an MLP, an activation, a norm, and the Sequential itself."""
    made = {
        "nonlinearity": (lambda: MLP(D, O, (5,), nn.ReLU()), "_nonlin"),
        "activation": (two_layers, "1"),
        "norm": (lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, O)), "0"),
        "whole": (two_layers, ""),
    }
    for make, path in made.values():
        layer = Selection(*[make() for _ in range(K)]).to(F64)  # type: ignore[operator]
        case = Case(layer, None, "", chosen, each_chosen, rows())
        check(case)
        calls: list[int] = []
        layer._submodules[1].get_submodule(path).register_forward_hook(
            lambda m, x, y, calls=calls: calls.append(1) or 2 * y
        )
        check(case)
        assert calls


def test_a_nonlinearity_that_sees_the_batch() -> None:
    """A function that nobody knows may look at all rows it is given."""
    layer = Selection(*[MLP(D, O, (5,), lambda h: h - h.mean(0)) for _ in range(K)]).to(F64)
    check(Case(layer, None, "", chosen, each_chosen, rows()))


@pytest.mark.parametrize(
    "change", ["forward hook", "pre-hook", "backward hook", "own forward", "parametrization", "prune"]
)
def test_stacked_modules_are_called(change: str) -> None:
    seeds.fixed_seed(0)
    modules = [two_layers().to(F64) for _ in range(K)]
    layer = Selection(*modules, stacked=True)
    like = Selection(*copy.deepcopy(modules))
    x = rows()
    chosen(layer, x)
    stack: Any = layer._submodules
    if change == "prune":
        prune.custom_from_mask(stack.pattern[0], "weight", torch.ones(K, 5, D) * (torch.arange(D) > 1))  # type: ignore[no-untyped-call]
    elif change == "own forward":
        for m in (stack.pattern[0], *[m[0] for m in like._submodules]):  # type: ignore[index]
            m.forward = lambda x, m=m: 3 * F.linear(x, m.weight, m.bias)
    else:
        CHANGES[change](stack.pattern, "0")
    for m in like._submodules:
        if change == "prune":
            prune.custom_from_mask(m[0], "weight", torch.ones(5, D) * (torch.arange(D) > 1))  # type: ignore[index,no-untyped-call]
        elif change != "own forward":
            CHANGES[change](m, "0")
    found = results(Case(layer, None, "", chosen, chosen, x), chosen)
    expected = results(Case(like, None, "", each_chosen, each_chosen, x), each_chosen)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    p, q = [next(s for n, s in m.named_parameters() if n.endswith("2.weight")) for m in (layer, like)]
    assert p.shape[0] == K and q.dim() == 2


@pytest.mark.parametrize("name", ["N", "f", "log_f", "softmax"])
@pytest.mark.parametrize("change", ["hook", "replaced"])
def test_functions_of_a_capsule_layer(name: str, change: str) -> None:
    """``N``, ``f``, ``softmax`` and ``log_f`` are what the layer applies."""
    layer, x = EfficientVectorRouting(5, 4, D, 5, 3).to(F64), rows(0, 2, 5, D)
    before = layer(x)
    m: Any = getattr(layer, name)
    if change == "hook":
        m.register_forward_hook(lambda m, args, y: 1.5 * y)
        other: Any = m
    else:
        other = nn.Sequential(m, Triple())
        setattr(layer, name, other)
    N, f, log_f, softmax = (getattr(layer, k) for k in ("N", "f", "log_f", "softmax"))
    n = x.shape[-2]
    gate, y, w = f(n**-0.5 * (x * layer.W_A).sum(-1) + layer.B_A)[..., None], None, layer
    for _ in range(3):
        R = w.CONST_ones_over_n_out.expand(2, n, 4)
        if y is not None:
            R = softmax(log_f(x @ (N(y) @ w.W_G1 * w.W_G2 + w.B_G2).mT * w.W_S + w.B_S))
        phi = w.beta_use * gate * R - w.beta_ign * (gate - gate * R)
        y = torch.einsum("bij,bid,jd,dh->bjh", phi, n**-0.5 * x, w.W_F1, w.W_F2) + phi.sum(1)[..., None] * w.B_F2
    torch.testing.assert_close(layer(x), N(y), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(layer(x), before)
    with pytest.raises(ValueError, match=r"stream: expected the layer's submodules"):
        layer.stream(x)
    layer.return_dict = True
    phi_of = layer(x)["phi"]
    layer.return_dict = False
    torch.testing.assert_close(credit(layer, x, 1), phi_of[..., 1])


@pytest.mark.parametrize("outer", [Add, Concatenate])
def test_capsules_in_compositions(outer: Any) -> None:
    layer, x = outer(*[EfficientVectorRouting(-1, 4, D, 5) for _ in range(2)]).to(F64), rows(0, 2, 7, D)
    before = layer(x)
    prune.l1_unstructured(layer.branches[1].compute_beta_use, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    for _ in range(2):
        layer(x).sum().backward()
    assert layer.branches[1].compute_beta_use.weight_orig.grad.abs().sum() > 0
    assert not torch.allclose(layer(x), before)


def test_padding_of_a_called_capsule_layer() -> None:
    layer, x = EfficientVectorRouting(-1, 4, D, 5).to(F64), rows(0, 2, 7, D)
    x[1, 4:] = torch.nan
    lengths = torch.tensor([7, 4])
    before = layer(x, lengths=lengths)
    layer.compute_beta_use.register_forward_hook(lambda m, args, y: None)
    torch.testing.assert_close(layer(x, lengths=lengths), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["f", "log_f", "softmax", "log_softmax"])
def test_functions_of_the_2019_layer_are_refused(name: str) -> None:
    layer, a, mu = Routing(2, 4, 3, n_inp=5, n_out=4).to(F64), rows(0, 2, 5), rows(1, 2, 5, 2, 4)
    layer(a, mu)
    setattr(layer, name, nn.Identity())
    with pytest.raises(ValueError, match=f"{name}: expected the "):
        layer(a, mu)


@pytest.mark.parametrize("name", ["gate", "shared_gate", "task_experts", "shared_experts"])
def test_hooks_on_gates_and_experts_of_tasks(name: str) -> None:
    """Calls give what the batched products do, also where every task has an input of its own."""
    layer, x = PLE(D, 2, 1, 3, levels=3, hidden_features=5, out_features=D).to(F64), rows()
    before = layer(x)
    calls: list[int] = []
    parts = [getattr(level, name) for level in layer.levels]
    for part in filter(None, parts):
        part.register_forward_hook(lambda m, args, y: calls.append(1))
    for a, b in zip(layer(x), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(calls) >= len([part for part in parts if part is not None])
    next(filter(None, parts)).register_forward_hook(lambda m, args, y: 2 * y)
    assert not torch.allclose(layer(x)[0], before[0])


def test_why_costs_little() -> None:
    for m in (nn.Linear(4, 4), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.LayerNorm(4)):
        assert min(timeit.repeat(lambda m=m: may_be_read(m), number=100, repeat=20)) / 100 < 2e-5  # type: ignore[misc]
    modules = [nn.Linear(4, 4) for _ in range(20)]
    proof = Proof(modules, modules)
    assert proof.holds(modules)
    assert min(timeit.repeat(lambda: proof.holds(modules), number=100, repeat=20)) / 100 < 20 * 2e-5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("change", [*CHANGES, "shape", "dtype", "meta", "mode", "option", "child"])
def test_proofs_see_changes(change: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fingerprint that the extension takes, and without."""
    if not compiled:
        monkeypatch.setattr(_modules, "_compiled", lambda: None)
    modules: Any = [nn.Sequential(nn.Linear(D, D), nn.Softplus()) for _ in range(K)]
    every = [m for module in modules for m in module.modules()]
    proof = Proof(modules, every)
    modules[1][1].beta, modules[1][1].threshold = float("1"), float("20")  # other objects, which are equal
    assert proof.holds(modules) and proof.holds(list(modules)) and not proof.holds(modules[:2])
    more: dict[str, Callable[[], Any]] = {
        "shape": lambda: setattr(modules[1][0].weight, "data", torch.zeros(D, 1)),
        "dtype": modules[1].double,
        "meta": lambda: modules[1].to("meta"),
        "mode": modules[1].eval,
        "option": lambda: setattr(modules[1][1], "beta", 2.0),
        "child": lambda: modules[1].append(nn.Tanh()),
    }
    undo = more[change]() if change in more else CHANGES[change](modules[1], "0")
    assert not proof.holds(modules)
    if change in CHANGES and undo is not None:
        undo()
        assert proof.holds(modules)


# ------------------------------------------------------------ plans are proved at every call


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_norms_with_and_without_bias(missing: int) -> None:
    layer = Selection(*[nn.LayerNorm(D, bias=k != missing) for k in range(K)]).to(F64)
    for p in layer.parameters():
        nn.init.normal_(p)
    check(Case(layer, None, "", chosen, each_chosen, rows()))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(D), lambda: nn.RMSNorm(D), lambda: nn.GroupNorm(2, D)])
@pytest.mark.parametrize("name", ["weight", "bias", "eps"])
def test_a_norm_that_loses_a_parameter(make: Callable[[], nn.Module], name: str) -> None:
    layer = Selection(*[make() for _ in range(K)]).to(F64)
    for p in layer.parameters():
        nn.init.normal_(p)
    case = Case(layer, None, "", chosen, each_chosen, rows())
    check(case)
    if hasattr(layer._submodules[1], name):
        setattr(layer._submodules[1], name, 0.5 if name == "eps" else None)
        if isinstance(layer._submodules[1], nn.GroupNorm) and name == "weight":
            layer._submodules[1].bias = None  # alone it has no gradient in PyTorch
        check(case)


def test_another_shape_in_the_same_parameter() -> None:
    layer = Selection(*[two_layers() for _ in range(K)]).to(F64)
    case = Case(layer, None, "", chosen, each_chosen, rows())
    check(case)
    narrow: Any = layer._submodules[1]
    for p, size in ((narrow[0].weight, (3, D)), (narrow[0].bias, (3,)), (narrow[2].weight, (O, 3))):
        p.data = rows(5, *size)
        p.grad = None
    check(case)


def test_another_dtype_in_the_same_parameter() -> None:
    layer = Selection(*[nn.Linear(D, O) for _ in range(K)]).to(F64)
    chosen(layer, rows())
    layer._submodules[2].float()
    with pytest.raises((RuntimeError, TypeError)):
        chosen(layer, rows())
    only = torch.zeros(B, dtype=torch.int64)
    x = rows()
    assert torch.equal(layer(x, Initialization()(x)[1], only)[0], layer._submodules[0](x))


def test_a_layer_of_an_mlp_is_replaced() -> None:
    layer = Selection(*[MLP(D, O, (5,)) for _ in range(K)]).to(F64)
    case = Case(layer, None, "", chosen, each_chosen, rows())
    check(case)
    layer._submodules[0]._layers[0] = nn.Linear(D, 5).to(F64)  # type: ignore[operator,index]
    check(case)
    layer._submodules[0]._nonlin = torch.tanh  # type: ignore[assignment]
    check(case)


def test_modules_that_return_indices_are_refused() -> None:
    layer = Selection(*[nn.MaxPool2d(2, return_indices=True) for _ in range(K)])
    x = rows(0, B, 2, 4, 4)
    with pytest.raises(ValueError, match=r"expected an output with a row per sample, got tuple"):
        chosen(layer, x)


# ------------------------------------------------------------ LiveSequential


def same_as_masked(net: Any, x: Tensor) -> None:
    check(Case(net, None, "", lambda m, x: m(x), masked, x))


LIVE: dict[str, Callable[[Any], Any]] = {
    "replaced": lambda net: net.__setitem__(-1, nn.Linear(10, 7)),
    "append": lambda net: net.append(nn.Linear(4, 3)),
    "extend": lambda net: net.extend([nn.ReLU(), nn.Linear(4, 3)]),
    "insert": lambda net: net.insert(1, nn.BatchNorm2d(8)),
    "pop": lambda net: net.pop(-1),
    "del": lambda net: net.__delitem__(-1),
    "replaced convolution": lambda net: net.__setitem__(0, nn.Conv2d(3, 8, 5, padding=2)),
    "padding mode": lambda net: setattr(net[0], "padding_mode", "circular"),
    "stride": lambda net: setattr(net[0], "padding", (1, 1)),
    "nested": lambda net: net.append(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    "iadd": lambda net: net.__iadd__(nn.Sequential(nn.Linear(4, 3))),
}


@pytest.mark.parametrize("task", [1, torch.tensor([0, 2, 1, 2])], ids=["one", "several"])
@pytest.mark.parametrize("name", LIVE)
def test_live_sequentials_are_sequentials(name: str, task: Any) -> None:
    net: Any = live(routed_net())
    x = rows(0, 4, 3, 6, 6)
    set_task(net, task)
    same_as_masked(net, x)
    if name == "padding mode":
        net[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    LIVE[name](net)
    net.to(F64)
    same_as_masked(net, x)


def test_parts_of_live_sequentials() -> None:
    net: Any = live(routed_net())
    x = rows(0, 4, 3, 6, 6)
    set_task(net, 2)
    part = net[:-1]
    assert len(part) == len(net) - 1 and part[0] is net[0]
    torch.testing.assert_close(part(x), masked(list(net)[:-1], x))
    torch.testing.assert_close(net[-1](part(x)), net(x))
    torch.testing.assert_close(net[3:](net[:3](x)), net(x))
    assert net[-1:](part(x)).shape == (4, 4)
    copied = copy.deepcopy(net)
    copied[-1] = nn.Identity()
    torch.testing.assert_close(copied(x), part(x))
    assert net(x).shape == (4, 4)


@pytest.mark.parametrize("name", ["0", "1", "2", "3", "6"])
@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "backward hook", "backward pre-hook", "observed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_in_live_networks(name: str, kind: str, when: str) -> None:
    """On convolutions, routers and activations; put there before ``live``, or after the first call."""
    net: Any = routed_net()
    change = CHANGES.get(kind) or on(lambda m: m.register_forward_hook(lambda m, args, y: None))
    x = rows(0, 4, 3, 6, 6)
    if when == "before":
        change(net, name)
    net = live(net)
    set_task(net, 1)
    net(x)
    if when == "after":
        change(net, name)

    def loop(m: Any, x: Tensor) -> Tensor:
        for layer in m:
            x = layer(x)
        return x

    check(Case(net, None, "", lambda m, x: m(x), loop, x))
    torch.testing.assert_close(net(x, 2), (set_task(net, 2), loop(net, x))[1])


def test_a_task_reaches_routers_of_a_part_that_is_called() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), TaskRouter(8, 3, 0.5), nn.ReLU())
    net: Any = live(nn.Sequential(inner, nn.Conv2d(8, 4, 3), TaskRouter(4, 3, 0.5))).to(F64)
    x = rows(0, 4, 3, 6, 6)
    expected = [net(x, t) for t in range(3)]
    inner.register_forward_hook(lambda m, args, y: None)
    for t in range(3):
        torch.testing.assert_close(net(x, t), expected[t])
    tasks = torch.tensor([0, 2, 1, 2])
    torch.testing.assert_close(net(x, tasks), torch.stack([expected[int(t)][i] for i, t in enumerate(tasks)]))
    assert inner[1].active_task == 0


class Standardized(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_convolutions_with_another_conv_forward(how: str) -> None:
    net: Any = routed_net()
    if how == "subclass":
        net[0].__class__ = Standardized
    else:
        net[0]._conv_forward = lambda x, w, b: nn.Conv2d._conv_forward(net[0], x, 2 * w, b)
    plain = live(routed_net())
    set_task(net, 1), set_task(plain, 1)
    made = live(net)
    same_as_masked(made, rows(0, 4, 3, 6, 6))
    assert not torch.allclose(made(rows(0, 4, 3, 6, 6)), plain(rows(0, 4, 3, 6, 6)))
    with pytest.raises(ValueError, match=r"0: expected a layer before the router whose weights say what it does"):
        fold(net, 1)


@pytest.mark.parametrize("change", ["forward hook", "own forward", "parametrization", "weight_norm", "prune"])
def test_fold_refuses_what_it_cannot_read(change: str) -> None:
    net: Any = nn.Sequential(nn.Linear(D, 8), TaskRouter(8, 3, 0.5), nn.Linear(8, O)).to(F64)
    CHANGES[change](net, "0")
    with pytest.raises(ValueError, match=r"^0: expected a layer before the router whose weights say what it does"):
        fold(net, 1)


# ------------------------------------------------------------ threads


THREADED: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
    "Selection": lambda: (Selection(*[nn.Linear(4, 4) for _ in range(3)]), lambda m: chosen(m, rows(0, B, 4))),
    "policies": lambda: (REINFORCE(K, D, num_agents=2).eval(), lambda m: policies(2).run(m, rows())),
    "live": lambda: (
        live(nn.Sequential(nn.Linear(D, 8), TaskRouter(8, 3, 0.5), nn.Linear(8, O))),
        lambda m: m(rows(), 1),
    ),
    "capsules": lambda: (EfficientVectorRouting(-1, 4, D, 5), lambda m: m(rows(0, 1, 5, D))),
}


@pytest.mark.parametrize("name", THREADED)
def test_first_calls_in_threads(name: str) -> None:
    """A thousand fresh layers, whose first calls four threads make at once: bit for bit what one thread gets."""
    seeds.fixed_seed(0)
    pattern, run = THREADED[name]()
    pattern = pattern.to(F64)
    expected = run(copy.deepcopy(pattern)).detach()
    layers = [copy.deepcopy(pattern) for _ in range(1000 if name == "Selection" else 100)]
    gates = [threading.Barrier(4) for _ in layers]

    def work(k: int) -> bool:
        same = True
        for layer, gate in zip(layers, gates, strict=True):
            gate.wait()
            same &= torch.equal(run(layer).detach(), expected)
        return same

    assert all(in_threads(work))


def test_first_calls_of_heads_in_threads() -> None:
    """Parameters are put side by side by one thread; training afterwards moves what the heads compute with."""
    seeds.fixed_seed(0)
    case = heads()
    expected = case.run(case.layer, case.x).detach()
    for _ in range(50):
        layer = copy.deepcopy(case.layer)
        gate = threading.Barrier(4)

        def work(k: int, layer: nn.Module = layer, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return torch.equal(case.run(layer, case.x).detach(), expected)

        assert all(in_threads(work))
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(0.5)
            torch.testing.assert_close(case.run(layer, case.x), case.loop(layer, case.x))


def test_a_dicts_version_is_relied_on_only_where_every_change_gives_another() -> None:
    """CPython has one up to 3.12; without it, or where it says too little, what is in the dicts is compared."""
    compiled = _modules._compiled()
    if compiled is None:
        pytest.skip("the extension is not built")
    assert _modules._has_versions() == (sys.version_info < (3, 13))
    for told in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_modules, "_has_versions", lambda told=told: told and sys.version_info < (3, 13))
            m = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
            proof = Proof([m], [m, m[0], m[1]])
            assert proof.holds([m])
            m[1].p = 0.5
            assert proof.holds([m])  # looked over
            m[1].p = 0.25
            assert not proof.holds([m])


def test_every_module_of_ours_is_as_it_was_written() -> None:
    """What only names the argument in an error is no method that somebody replaced."""
    found = {
        value
        for info in pkgutil.walk_packages(fastroute.__path__, "fastroute.")
        if ".on_path" not in info.name and not info.name.endswith("__main__")
        for value in vars(importlib.import_module(info.name)).values()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__.startswith("fastroute.")
    }
    assert len(found) > 100
    assert not [cls for cls in found if not is_pristine(cls)]
    assert not is_pristine(
        type("Wrapped", (nn.Linear,), {"forward": functools.wraps(nn.Linear.forward)(lambda m, x: x)})
    )
