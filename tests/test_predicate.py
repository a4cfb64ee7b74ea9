"""A module is called wherever reading it would miss something: ways to change a module, times layers that take modules.

What is expected is the plain loop that calls each module on its samples.
"""

from __future__ import annotations

import copy
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

from fastroute.capsules import Add, Concatenate, EfficientVectorRouting
from fastroute.capsules.credit import credit
from fastroute.compat.heinsen_routing_2019 import Routing
from fastroute.multitask import MMoE, MTLModel
from fastroute.networks import MLP, REINFORCE, Initialization, MoE, Selection, TopKGating, Trajectory
from fastroute.ops._modules import Proof, may_be_read
from fastroute.reference.efficient_routing import Parameters, efficient_routing
from fastroute.tasks import TaskRouter, fold, live, route, set_task
from tests.helpers.tasks import images, small_vgg

F64 = torch.float64
B, D, O, K = 12, 6, 4, 3


def rows(seed: int = 0, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (B, D), generator=generator, dtype=dtype)


ACTIONS = torch.arange(B) % K


# ------------------------------------------------------------------------------------------------- ways to change a module


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
    "backward hook": on(lambda m: m.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 2 * g for g in gi))),
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


# ---------------------------------------------------------------------------------------------- layers that take modules


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
    made = [selection._submodules[k](x[ACTIONS == k]) for k in range(K)]
    order = torch.cat([(ACTIONS == k).nonzero()[:, 0] for k in range(K)])
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
        return x * (mask if mask.dim() == 1 else mask).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def masked(net: Any, x: Tensor) -> Tensor:
    for m in net:
        x = Masked(m)(x) if isinstance(m, TaskRouter) else m(x)
    return x


def routed_net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    case = CASES[name]()
    before = case.run(case.layer, case.x).detach()
    check(case)
    torch.manual_seed(1)
    undo = CHANGES[change](case.parent, case.name)
    try:
        check(case)
        if "backward" not in change:  # the change matters
            assert not torch.allclose(case.run(case.layer, case.x), before)
    finally:
        if undo is not None:
            undo()


@pytest.mark.parametrize("name", CASES)
def test_a_change_that_is_taken_back(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    before = results(case, case.run)
    handle = getattr(case.parent, case.name).register_forward_hook(lambda m, x, y: 2 * y)
    assert not torch.allclose(case.run(case.layer, case.x), before[0])  # type: ignore[arg-type]
    handle.remove()
    for a, b in zip(results(case, case.run), before, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_quantized_modules_are_called() -> None:
    torch.manual_seed(0)
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
