"""What a mask, an action of -1 or a length leaves out is left out before anything is computed from it.

NaN, infinity and 1e30 in any masked place change no bit of outputs and gradients elsewhere, and the masked place's own
gradient is exactly zero: forward and backward, in every layer that takes a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastroute import capsules, functional, multitask, networks, tasks, use_backend
from fastroute.networks import Loss, MoE, Selection, TopKGating, Trajectory
from fastroute.ops import dispatch
from fastroute.ops.matrix_routing.contract import Capsules
from fastroute.ops.trajectory_loss.contract import ALGORITHMS, SILENT
from tests.helpers import seeds
from tests.helpers.networks import LEARNING

B, F, K = 7, 6, 3
GONE = torch.tensor([0, 1, 0, 0, 1, 0, 1]).bool()  #: samples that are masked
NOWHERE = torch.tensor(False)
POISON = (float("nan"), float("inf"), float("-inf"), 1e30)
DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    module: nn.Module
    inputs: Mapping[str, Tensor]
    masked: Mapping[str, Tensor]  #: by input: the places that are left out, broadcastable
    run: Callable[[dict[str, Tensor]], Any]  #: inputs -> outputs, of which nothing depends on masked places


def rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.dim() - 1))


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------- networks

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(F),
    "rms": lambda: nn.RMSNorm(F),
    "group": lambda: nn.GroupNorm(2, F),
    "layer alone": lambda: nn.LayerNorm(F, elementwise_affine=False),
}
ACTIVATIONS = {
    name: getattr(nn, name)
    for name in (
        "ReLU", "ReLU6", "GELU", "SiLU", "Tanh", "Sigmoid", "LeakyReLU", "ELU", "SELU", "CELU", "Mish", "Softplus",
        "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "Hardshrink", "Softshrink",
    )
}  # fmt: skip


def routing_loss(meta: Trajectory) -> Tensor:
    _, made = Loss(nn.MSELoss(), networks.NegLossReward())(torch.zeros(B, 1), meta, torch.ones(B, 1), reduce=False)
    return made  # type: ignore[no-any-return]


def linear(out: int = F) -> nn.Module:
    return nn.Linear(F, out)


STACKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda k: linear(4),
    "mlp": lambda k: networks.MLP(F, 4, (5,)),
    "unequal": lambda k: nn.Sequential(linear(4 + k), nn.GELU(), nn.Linear(4 + k, 4)),
    "in place": lambda k: nn.Sequential(nn.ReLU(inplace=True), linear()),
    "softmax": lambda k: nn.Sequential(nn.Softmax(1), linear()),
    "norm last": lambda k: nn.Sequential(linear(), nn.LayerNorm(F)),
    **{f"{name} norm": lambda k, norm=norm: nn.Sequential(norm(), linear(4)) for name, norm in NORMS.items()},
    **{f"{name} norm only": lambda k, norm=norm: norm() for name, norm in NORMS.items()},
    **{f"{name}, linear": lambda k, act=act: nn.Sequential(act(), linear()) for name, act in ACTIVATIONS.items()},
    **{f"linear, {name}": lambda k, act=act: nn.Sequential(linear(), act()) for name, act in ACTIVATIONS.items()},
    **{f"{name} only": lambda k, act=act: act() for name, act in ACTIVATIONS.items()},
}


def selected(stack: str, dtype: torch.dtype, how: str = "mask", x: Tensor | None = None, **options: Any) -> Case:
    layer = Selection(*[STACKS[stack](k) for k in range(K)], **options).to(dtype)
    x = draw(B, F, dtype=dtype) if x is None else x
    return Case(layer, {"x": x}, {"x": rows(GONE, x)}, lambda given: chosen(layer, given["x"], how))


def chosen(layer: Selection, x: Tensor, how: str) -> Tensor:
    actions = torch.arange(B) % K
    meta = Trajectory(B)
    if how == "mask":
        y, *_ = layer(x, meta, actions, ~GONE)
    elif how == "-1":
        y, *_ = layer(x, meta, torch.where(GONE, -1, actions))
    elif how == "mixture":
        y, *_ = layer(x, meta, torch.stack([actions, (actions + 1) % K], 1), ~GONE, weights=x.new_ones(B, 2))
    else:
        both = torch.where(GONE[:, None], -1, torch.stack([actions, torch.full_like(actions, -1)], 1))
        y, *_ = layer(x, meta, both, weights=x.new_ones(B, 2))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", STACKS)
def test_selection(stack: str, dtype: torch.dtype) -> None:
    check(lambda: selected(stack, dtype))


@pytest.mark.parametrize("how", ["-1", "mixture", "mixture of -1"])
@pytest.mark.parametrize("stack", ["linear", "unequal", "layer norm", "rms norm only", "GELU, linear", "Softplus only"])
def test_selection_by_action(stack: str, how: str) -> None:
    check(lambda: selected(stack, torch.float32, how))


@pytest.mark.parametrize("stack", ["linear", "mlp", "layer norm", "rms norm", "SiLU, linear", "linear, Sigmoid"])
@pytest.mark.parametrize("how", ["mask", "mixture"])
def test_stacked(stack: str, how: str) -> None:
    check(lambda: selected(stack, torch.float32, how, stacked=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("stack", ["linear", "layer norm", "rms norm", "GELU, linear", "norm last"])
def test_selection_on_every_backend(stack: str, backend: str) -> None:
    with use_backend(backend):
        check(lambda: selected(stack, torch.float32))


def test_convolutions() -> None:
    def case() -> Case:
        layer = Selection(*[nn.Sequential(nn.GroupNorm(1, 2), nn.Conv2d(2, 3, 3), nn.ReLU()) for _ in range(K)])
        x = draw(B, 2, 5, 5, dtype=torch.float32)
        return Case(layer, {"x": x}, {"x": rows(GONE, x)}, lambda given: chosen(layer, given["x"], "mask"))

    check(case)


def test_positions_of_a_sequence() -> None:
    check(lambda: selected("layer norm", torch.float32, x=draw(B, 4, F, dtype=torch.float32)))


def test_weights_of_no_module() -> None:
    def case() -> Case:
        layer = Selection(*[linear(4) for _ in range(K)])
        actions = torch.tensor([[0, -1]]).expand(B, 2)
        w, gone = draw(B, 2, dtype=torch.float32), actions < 0
        return Case(
            layer, {"w": w}, {"w": gone},
            lambda given: layer(torch.ones(B, F), Trajectory(B), actions, weights=given["w"])[0],
        )  # fmt: skip

    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {}, {"shared_experts": 1}, {"shared_experts": 2, "gated": False}, {"k": 1}, {"k": 3, "scores": "sigmoid"},
    {"shared_experts": 1, "activation": "gelu"}, {"activation": "relu", "capacity": 1.0}, {"jitter": 0.1},
    {"normalize": False, "z_loss": 0.1, "bias_balancing": 0.1}, {"activation": "tanh"}, {"activation": "sigmoid"},
], ids=str)  # fmt: skip
def test_moe(options: dict[str, Any], dtype: torch.dtype) -> None:
    def case() -> Case:
        layer = MoE(F, 8, 4, **options).to(dtype)
        x = draw(B, F, dtype=dtype)

        def run(given: dict[str, Tensor]) -> Any:
            y, aux = layer(given["x"], ~GONE, return_aux=True)
            return y, aux.loss, aux.weights, aux.counts, aux.actions

        return Case(layer, {"x": x}, {"x": rows(GONE, x)}, run)

    check(case)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_moe_on_every_backend(backend: str) -> None:
    def case() -> Case:
        layer = MoE(F, 8, 4, shared_experts=1)
        x = draw(B, F, dtype=torch.float32)
        return Case(layer, {"x": x}, {"x": rows(GONE, x)}, lambda given: layer(given["x"], ~GONE))

    with use_backend(backend):
        check(case)


@pytest.mark.parametrize("forced", [False, True])
def test_gating(forced: bool) -> None:
    def case() -> Case:
        gate = TopKGating(K, F, 2, z_loss=0.1)
        x = draw(B, F, dtype=torch.float32)
        actions = torch.where(GONE[:, None], -1, torch.tensor([[0, 2]])) if forced else None

        def run(given: dict[str, Tensor]) -> Any:
            _, meta, a = gate(given["x"], Trajectory(B), mask=~GONE, forced_actions=actions)
            return meta.mixtures[0].weights, meta.aux_loss, a

        return Case(gate, {"x": x}, {"x": rows(GONE, x)}, run)

    check(case)


@pytest.mark.parametrize("formula", ["intended", "upstream"])
@pytest.mark.parametrize("agents", [1, 2])
@pytest.mark.parametrize("storage", ["approx", "norm"])
@pytest.mark.parametrize("algo", LEARNING)
def test_decisions(algo: str, storage: str, agents: int, formula: str) -> None:
    def case() -> Case:
        options = {"policy_net": nn.Sequential(nn.LayerNorm(F), nn.Linear(F, K))} if storage == "norm" else {}
        layer = getattr(networks, algo)(K, F, num_agents=agents, detach=False, formula=formula, **options)
        x = draw(B, F, dtype=torch.float32)

        def run(given: dict[str, Tensor]) -> Any:
            y, meta, a = layer(given["x"], Trajectory(B), torch.arange(B) % agents, ~GONE)
            routing = routing_loss(meta)
            return torch.where(GONE[:, None], 0, y), routing, a

        return Case(layer, {"x": x}, {"x": rows(GONE, x)}, run)

    check(case)


@pytest.mark.parametrize("cell", ["RoutingLSTMCell", "RoutingGRUCell"])
@pytest.mark.parametrize("options", [
    {}, {"recurrent": True}, {"route_i2h": True}, {"route_i2h": True, "recurrent": True}, {"route_h2h": False},
    {"num_selections": 1},
], ids=str)  # fmt: skip
def test_cells(cell: str, options: dict[str, Any]) -> None:
    def case() -> Case:
        given = {"num_selections": K, "detach": False, **options}
        layer = getattr(networks, cell)(F, 4, depth_routing=2, routing_agent=networks.REINFORCE, **given)
        lstm = cell == "RoutingLSTMCell"
        inputs = {"x": draw(B, F, dtype=torch.float32), "h": draw(B, 4, dtype=torch.float32, seed=1)}
        inputs |= {"c": draw(B, 4, dtype=torch.float32, seed=2)} if lstm else {}

        def run(given: dict[str, Tensor]) -> Any:
            state: Any = (given["h"], given["c"]) if lstm else given["h"]
            made, meta = layer(given["x"], state, mask=~GONE)
            kept = [torch.where(GONE[:, None], 0, t) for t in (made if lstm else (made,))]
            routing = routing_loss(meta)
            return *kept, routing, meta.actions

        return Case(layer, inputs, {name: GONE[:, None] for name in inputs}, run)

    check(case)


def test_a_state_that_is_kept_has_the_gradient_of_what_it_is_kept_as() -> None:
    cell = networks.RoutingGRUCell(F, 4, K, 1, networks.REINFORCE)
    h = draw(B, 4, dtype=torch.float32).requires_grad_()
    made, _ = cell(draw(B, F, dtype=torch.float32), h, mask=~GONE)
    made[GONE].sum().backward()
    assert torch.equal(made[GONE], h[GONE]) and torch.equal(h.grad, GONE[:, None].float().expand(B, 4))


# ------------------------------------------------------------------------------------------------------- capsules

N, M, D = 5, 3, 4


def capsule_cases() -> dict[str, Callable[[torch.dtype, str], Case]]:
    def vectors(layer: Callable[[], nn.Module]) -> Callable[[torch.dtype, str], Case]:
        def case(dtype: torch.dtype, how: str) -> Case:
            module = layer().to(dtype)
            x, (gone, given_as) = draw(B, N, D, dtype=dtype), left_out(how)

            def run(given: dict[str, Tensor]) -> Any:
                made = module(given["x"], **given_as)
                if not isinstance(made, dict):
                    return made
                # what is shown of an input itself is shown of those that are left out, too
                own = ("a_inp", "S", "V") if how == "mask" else ()
                return {k: t[~gone] if k in own and t is not None else t for k, t in made.items()}

            return Case(module, {"x": x}, {"x": gone[..., None]}, run)

        return case

    def matrices(**options: Any) -> Callable[[torch.dtype, str], Case]:
        def case(dtype: torch.dtype, how: str) -> Case:
            module = capsules.GenerativeMatrixRouting(N, M, 2, 2, 3, **options).to(dtype)
            a, mu = draw(B, N, dtype=dtype), draw(B, N, 2, 2, dtype=dtype, seed=1)
            gone, given_as = left_out(how)
            masked = {"a": gone, "mu": gone[..., None, None]}
            return Case(module, {"a": a, "mu": mu}, masked, lambda given: module(given["a"], given["mu"], **given_as))

        return case

    class Definable(capsules.DefinableVectorRouting):
        def __init__(self, n: int, **options: Any) -> None:
            votes, back = nn.Linear(D, M * 2), nn.Linear(2, D)
            super().__init__(
                nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1), nn.Flatten(-2)),
                nn.Sequential(nn.LayerNorm(D), votes, nn.Unflatten(-1, (M, 2))),
                back, lambda x, y: x @ y.mT, n, M, d_inp=D, **options,
            )  # fmt: skip

    def slots(dtype: torch.dtype, how: str) -> Case:
        module = capsules.SlotAttention(M, D, 4).to(dtype)
        x, (gone, given_as) = draw(B, N, D, dtype=dtype), left_out(how)
        begin = draw(B, M, 4, dtype=dtype, seed=1)
        run = lambda given: module(given["x"], begin, return_attn=True, **given_as)  # noqa: E731
        return Case(module, {"x": x}, {"x": gone[..., None]}, run)

    efficient = capsules.EfficientVectorRouting

    def streamed(dtype: torch.dtype, how: str) -> Case:
        module = efficient(N, M, D, 2).to(dtype)
        x, (gone, given_as) = draw(B, N, D, dtype=dtype), left_out(how)
        run = lambda given: module.stream(given["x"].detach(), rows=2, **given_as)  # noqa: E731
        return Case(module, {"x": x}, {"x": gone[..., None]}, run)

    return {
        "efficient": vectors(lambda: efficient(N, M, D, 2)),
        "efficient, any length": vectors(lambda: efficient(-1, M, D, 2)),
        "efficient, three iterations": vectors(lambda: efficient(N, M, D, 2, n_iters=3)),
        "efficient, dict": vectors(lambda: efficient(N, M, D, 2, return_dict=True)),
        "efficient, dict with votes": vectors(lambda: efficient(N, M, D, 2, return_dict=True, memory_efficient=False)),
        "efficient, streamed": streamed,
        "definable": vectors(lambda: Definable(N)),
        "definable, any length": vectors(lambda: Definable(-1)),
        "definable, dict": vectors(lambda: Definable(N, return_dict=True)),
        "matrix": matrices(),
        "matrix, skm": matrices(p_model="skm"),
        "matrix, dict": matrices(return_dict=True),
        "slots": slots,
    }


def left_out(how: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Which inputs [B, N] are, and the arguments that say so."""
    if how == "lengths":
        lengths = torch.arange(B) % (N + 1)
        return torch.arange(N) >= lengths[:, None], {"lengths": lengths}
    gone = torch.rand(B, N, generator=seeds.generator(5)) < 0.4
    return gone, {"mask": gone[..., None]}


@pytest.mark.parametrize("how", ["lengths", "mask"])
@pytest.mark.parametrize(
    "backend, dtype", [("reference", torch.float32), ("auto", torch.float32), ("auto", torch.bfloat16)]
)
@pytest.mark.parametrize("layer", capsule_cases())
def test_capsules(layer: str, dtype: torch.dtype, how: str, backend: str) -> None:
    with use_backend(backend):
        check(lambda: capsule_cases()[layer](dtype, how))


def op_cases() -> dict[str, Callable[[], Case]]:
    """The ops of capsules as they are called without a layer: what is in a row that reaches no output."""
    gone, given_as = left_out("mask")

    def case(fn: Callable[..., Any], names: tuple[str, ...], **made: Tensor) -> Callable[[], Case]:
        masked = {k: gone.reshape(B, N, *[1] * (t.dim() - 2)) if k in names else NOWHERE for k, t in made.items()}
        return lambda: Case(nn.Identity(), made, masked, lambda given: fn(**given, **given_as))

    def drawn(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float64, seed=len(shape))

    def matrices(a: Tensor, mu: Tensor, mask: Tensor, **w: Tensor) -> Any:
        return tuple(functional.matrix_routing(a, mu, Capsules(**w), n_iters=2, mask=mask))

    x, gate, pair = {"x": drawn(B, N, D)}, {"gate": drawn(B, N)}, drawn(N, M)
    step = {"pred": drawn(B, M, D), "score_weight": pair, "score_bias": pair, "use": pair, "ign": pair}
    first = partial(functional.vector_routing, pred=None, score_weight=None, score_bias=None)
    pairs = {"scores": drawn(B, N, M), "votes": drawn(B, N, M, D)}
    capsule = {"W": drawn(N, M, D, 2), "B": drawn(N, M, 3, 2), "beta_use": pair, "beta_ign": pair}
    return {
        "vector_routing": case(functional.vector_routing, ("x", "gate"), **x, **gate, **step),
        "vector_routing, first": case(first, ("x", "gate"), **x, **gate, use=pair, ign=pair, prior=drawn(M).exp()),
        "soft_assignment": case(functional.soft_assignment, ("scores", "gate"), **pairs, **gate, use=pair, ign=pair),
        "soft_assignment, mean": case(partial(functional.soft_assignment, mean=True), ("scores",), **pairs),
        "matrix_routing": case(matrices, ("a", "mu"), a=drawn(B, N), mu=drawn(B, N, 3, D), **capsule),
    }


def ops_of_networks() -> dict[str, Callable[[], Case]]:
    """Those of networks, whose layers leave out before they call them."""

    def case(fn: Callable[..., Any], names: tuple[str, ...], **made: Tensor) -> Callable[[], Case]:
        masked = {k: rows(GONE, t) if k in names else NOWHERE for k, t in made.items()}
        return lambda: Case(nn.Identity(), made, masked, lambda given: fn(**given))

    def drawn(*shape: int, seed: int = 0) -> Tensor:
        return draw(*shape, dtype=torch.float64, seed=seed)

    actions = torch.where(GONE, -1, torch.arange(B) % K)
    nets, names = {"W": drawn(K, 4, F), "b": drawn(K, 4), "V": drawn(K, 4, F), "c": drawn(K, 4)}, ("s0", "s1", "aux")

    def value(scores: Tensor, kind: str) -> Tensor:
        return functional.policy(scores, forced=actions, kind=kind).value

    def of_agents(x: Tensor, W: Tensor, b: Tensor, V: Tensor, c: Tensor) -> Tensor:
        plan = dispatch.plan(actions, K)
        return functional.agent_policy(x, plan, W, b, critic_weights=V, critic_biases=c).value

    def loss(s0: Tensor, s1: Tensor, aux: Tensor, kind: str) -> Tensor:
        kept, none = [~GONE, None], [None, None]
        columns = ([t, drawn(B, seed=5).abs()] for t in (s0, s1, aux))  # the second decision is made for all
        return functional.trajectory_loss([kind] * 2, *columns, none, none, kept, drawn(B), choices=[K] * 2)

    return {
        **{
            f"policy, {k}": case(partial(value, kind=k), ("scores",), scores=drawn(B, K))
            for k in ("softmax", "shifted", "score")
        },
        "agent_policy": case(of_agents, ("x",), x=drawn(B, F), **nets),
        **{
            f"trajectory_loss, {k}": case(
                partial(loss, kind=k), names, **{n: drawn(B, seed=i) for i, n in enumerate(names)}
            )
            for k in sorted({*ALGORITHMS} - {SILENT})
        },
    }


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("op", op_cases() | ops_of_networks())
def test_ops(op: str, backend: str) -> None:
    with use_backend(backend):
        check((op_cases() | ops_of_networks())[op], twice=True)


# ---------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", [1, torch.arange(B) % K], ids=["one task", "tasks"])
@pytest.mark.parametrize("inplace", [False, True])
def test_units_that_are_off(task: Any, dtype: torch.dtype, inplace: bool) -> None:
    def case() -> Case:
        router = tasks.TaskRouter(F, K, 0.5, generator=seeds.generator(0), inplace=inplace)
        x = draw(B, F, 3, dtype=dtype)
        off = (router.get_unit_mapping()[task] == 0).expand(B, F)
        return Case(router, {"x": x}, {"x": off[..., None]}, lambda given: router(given["x"] * 1, task))

    check(case)


@pytest.mark.parametrize("task", [1, torch.arange(B) % K], ids=["one task", "tasks"])
def test_layers_between_routers(task: Any) -> None:
    def case() -> Case:
        router = tasks.TaskRouter(F, K, 0.5, generator=seeds.generator(0))
        layer = tasks.RoutedLinear(F, 4, input_router=router)
        off = (router.get_unit_mapping()[task] == 0).expand(B, F)
        return Case(layer, {"x": draw(B, F, dtype=torch.float32)}, {"x": off}, lambda given: layer(given["x"], task))

    check(case)


def test_outputs_of_other_tasks() -> None:
    def case() -> Case:
        y, task = draw(K, B, 4, dtype=torch.float32), torch.arange(B) % K
        gone = torch.arange(K)[:, None] != task
        return Case(
            nn.Identity(), {"y": y}, {"y": gone[..., None]}, lambda given: multitask.OfTask()(*given["y"], task)
        )

    check(case)


# ----------------------------------------------------------------------------------------------------------- check


def check(case: Callable[[], Case], twice: bool = False) -> None:
    expected = record(case, None, twice)
    for value in POISON:
        found = record(case, value, twice)
        assert found.keys() == expected.keys()
        for name, t in expected.items():
            assert torch.equal(found[name], t), f"{value} changes {name}"


def record(case: Callable[[], Case], poison: float | None, twice: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients of parameters, and of inputs, which are zero where masked. ``twice``: also those of them."""
    seeds.fixed_seed(0)
    module, inputs, masked, run = case()
    module.train()
    given = {}
    for name, x in inputs.items():
        x = x if poison is None else torch.where(masked[name], poison, x)
        given[name] = x.clone().requires_grad_()
    seeds.fixed_seed(1)
    made = run(given)
    outputs = made if isinstance(made, dict) else dict(enumerate(made if isinstance(made, tuple) else (made,)))
    seen = {f"output {name}": t for name, t in outputs.items() if t is not None}
    loss = sum((t * draw(*t.shape, dtype=t.dtype, seed=3)).sum() for t in seen.values() if t.requires_grad)
    assert isinstance(loss, Tensor)
    if twice:
        leaves = {**given, **dict(module.named_parameters())}
        first = torch.autograd.grad(loss, [*leaves.values()], create_graph=True, allow_unused=True)
        seen |= {f"first gradient of {n}": g for n, g in zip(leaves, first, strict=True) if g is not None}
        loss = loss + sum(g.square().sum() for g in first if g is not None)
    loss.backward()
    for name, x in given.items():
        own = torch.zeros_like(x) if x.grad is None else x.grad
        assert not own[masked[name].expand_as(own)].any(), f"{poison} in {name} has a gradient"
        seen[f"gradient of {name}"] = own
    seen |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in seen.items()}
