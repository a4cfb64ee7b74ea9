"""Multi-task models: the graph against code by hand and a polling queue, heads and experts against loops.

Axes: B samples, T tasks or heads, D features in, H hidden ones, P features out, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from bench.harness import Product, Results, Step, Truth
from fastroute.multitask import CGC, Concat, MMoE, MTLModel, MultiHead

HAND, LOOP, POLL = "by hand", "loop", "polling queue"
EXPERTS = "the layer"  #: what fastroute has, compiled: its rounding is the compiler's, so it is judged as others are
EVEN = 0.952  #: at most 1.05 times as long


class Case(NamedTuple):
    """What is run; ``sizes`` are the problem's own."""

    what: str
    B: int
    sizes: tuple[int, ...] = ()
    training: bool = False
    compiled: bool = False
    calls: int = 1  #: in a sample: a call of some microseconds is too short for a clock

    def __str__(self) -> str:
        named = {
            "readme": "the README's model",
            "chain": "{} nodes in a chain",
            "joiners": "{} nodes, of which {} join the end of a chain",
            "heads": "{} heads {}-{}-{}",
            "MMoE": "MMoE, {} tasks, {} experts {}-{}-{}",
            "CGC": "CGC, {} tasks, {} experts {}-{}-{}",
        }[self.what].format(*self.sizes)
        many = f", {self.calls} calls" if self.calls > 1 else ""
        return f"{named}, batch {self.B}{', compiled' if self.compiled else ''}{many}"


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it: see ``report``."""

    case: Case
    threads: int = 1
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    against: dict[str, Any] | None = field(default=None, hash=False)

    def __str__(self) -> str:
        c = self.case
        sizes = "".join(f"-{n}" for n in c.sizes)
        what = ("training" if c.training else "forward") + "-compiled" * c.compiled
        return f"{c.what}{sizes}-B{c.B}-{what}-{self.threads}thread"


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each."""
    thousand = Case("chain", 1, (1000,), calls=5)
    found = [
        Row(Case("readme", 32, calls=50), targets={HAND: EVEN}),
        Row(Case("readme", 32, training=True, calls=20), targets={HAND: EVEN}),
        Row(Case("readme", 32, compiled=True, calls=50), targets={f"{HAND}, torch.compile": EVEN}),
        Row(Case("joiners", 1, (1000, 500)), targets={"max_ms": 1.6}),
        *(
            Row(
                Case("chain", 1, (n,), calls=5),
                against=None if n == 1000 else {"case": str(thousand), "what": f"{n} nodes over 1000", "at_most": most},
            )
            for n, most in ((1000, None), (100, 0.15), (4000, 4.4))
        ),
    ]
    grouped = [
        (Case("heads", 64, (100, 256, 32, 2), training=True), {LOOP: 2.0}, {LOOP: 3.0}),
        (Case("heads", 64, (20, 512, 64, 2), training=True), {}, {}),
        (Case("MMoE", 256, (4, 8, 128, 64, 32), training=True), {}, {}),
        (Case("MMoE", 4096, (4, 8, 128, 64, 32), training=True), {}, {}),
        (Case("CGC", 256, (8, 2, 128, 64, 32), training=True), {}, {}),
    ]
    for case, one, two in grouped:
        found.append(Row(case, targets=one))
        found += [Row(case, threads=2, targets=two)] * (not options.gpu)
    if options.gpu:
        found = [row for row in found if row.case.what not in ("chain", "joiners")]
    return found


# ---------------------------------------------------------------------------------------------- the contestants


class Way(NamedTuple):
    """A way to compute the case's outputs, its leaves, and their gradients under names that all ways have."""

    name: str
    fn: Callable[[Tensor], Sequence[Tensor]]
    leaves: list[Tensor]
    named: Callable[[list[Tensor]], Results]
    every: int = 1


class Problem(NamedTuple):
    """A case's input, what comes back from the loss, and the ways; the first is plain PyTorch's."""

    x: Tensor
    dys: list[Tensor]
    ways: list[Way]


def _by_name(names: Sequence[str]) -> Callable[[list[Tensor]], Results]:
    return lambda grads: dict(zip(names, grads, strict=True))


def _mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def readme(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Two embeddings of 16 features, a head on each, and a third on both."""

    def node(name: str, layers: Any, *anchors: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "layers": layers, **({"anchor_layer": list(anchors)} if anchors else {}), **more}

    nodes = [
        node("Embed1", _mlp(16, 32, 8)), node("Embed2", _mlp(16, 32, 8)),
        node("CatTask", Concat(dim=1), "Embed1", "Embed2", loss_weight=1.0),
        node("Task1", _mlp(8, 32, 1), "Embed1", loss=nn.MSELoss(), loss_weight=1.0),
        node("Task2", _mlp(8, 64, 1), "Embed2", loss=nn.BCEWithLogitsLoss(), loss_weight=1.0),
        node("FNN", _mlp(16, 32, 32), "CatTask"),
        node("Task3", _mlp(32, 16, 1), "FNN", loss=nn.MSELoss(), loss_weight="auto", loss_init_val=1.0),
    ]  # fmt: skip
    model = MTLModel(nodes, ["Task1", "Task2", "Task3"]).to(device, dtype)
    named = [(k, p) for k, p in model.named_parameters() if k != "Task3_loss"]
    modules = {name: model.get_submodule(name) for name, _ in model.named_children()}

    class Hand(nn.Module):
        """As one writes it."""

        def __init__(self) -> None:
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x: Tensor) -> list[Tensor]:
            a, b = self.Embed1(x), self.Embed2(x)
            return [self.Task1(a), self.Task2(b), self.Task3(self.FNN(torch.cat((a, b), 1)))]

    hand, leaves, grads = Hand(), [p for _, p in named], _by_name([k for k, _ in named])
    ways = [
        Way(HAND, hand, leaves, grads),
        Way("fastroute", lambda x: model(x)[0], leaves, grads),
    ]
    if case.compiled:
        compiled, by_hand = torch.compile(model), torch.compile(hand)
        ways[1] = Way("fastroute", lambda x: compiled(x)[0], leaves, grads)
        ways += [
            Way(f"{HAND}, torch.compile", by_hand, leaves, grads),
            Way("fastroute, eager", lambda x: model(x)[0], leaves, grads),
        ]
    x = torch.randn(case.B, 16).to(device, dtype)
    return Problem(x, [torch.randn(case.B, 1).to(device, dtype) for _ in range(3)], ways)


def _first(a: Tensor, b: Tensor) -> Tensor:
    return a


class Polling:
    """torchMTL's schedule as its behaviour is described, on tables made once.

    Nodes wait in a queue, breadth first; one whose inputs are not all there goes back to its end; either way its
    successors join the queue once.
    """

    def __init__(self, nodes: list[dict[str, Any]], outputs: Sequence[str]) -> None:
        self.layers = {node["name"]: node["layers"] for node in nodes}
        self.before = {node["name"]: node.get("anchor_layer", ["root"]) for node in nodes}
        self.after: dict[str, list[str]] = {name: [] for name in ("root", *self.layers)}
        for name, anchors in self.before.items():
            for anchor in anchors:
                self.after[anchor].append(name)
        self.outputs = list(outputs)

    def __call__(self, x: Tensor) -> list[Tensor]:
        made, joined, queue = {"root": x}, set(self.after["root"]), deque(self.after["root"])
        while queue:
            name = queue.popleft()
            if all(anchor in made for anchor in self.before[name]):
                made[name] = self.layers[name](*[made[anchor] for anchor in self.before[name]])
            else:
                queue.append(name)
            for successor in self.after[name]:
                if successor not in joined:
                    joined.add(successor)
                    queue.append(successor)
        return [made[name] for name in self.outputs]


def chain(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Identities one behind the other; and functions of the first and the last, which are declared before them."""
    count, joiners = (*case.sizes, 0)[:2]
    length = count - joiners
    links = [
        {"name": f"n{k}", "layers": nn.Identity(), **({"anchor_layer": [f"n{k - 1}"]} if k else {})}
        for k in range(length)
    ]
    last = f"n{length - 1}"
    joins = [{"name": f"j{k}", "layers": _first, "anchor_layer": ["root", last]} for k in range(joiners)]
    outputs = [node["name"] for node in joins] or [last]
    model, polling = MTLModel([*joins, *links], outputs), Polling([*joins, *links], outputs)
    layers = [node["layers"] for node in links]

    def by_hand(x: Tensor) -> list[Tensor]:
        y = x
        for layer in layers:
            y = layer(y)
        return [_first(x, y) for _ in range(joiners)] or [y]

    ways = [
        Way(HAND, by_hand, [], _by_name([])),
        Way("fastroute", lambda x: model(x)[0], [], _by_name([])),
        Way(POLL, polling, [], _by_name([]), every=10 if joiners else 1),
    ]
    return Problem(torch.randn(case.B, 4).to(device, dtype), [], ways)


def _stacks(modules: Sequence[nn.Sequential]) -> tuple[list[Tensor], Callable[[list[Tensor]], Results]]:
    """The parameters of two layers of each module, and their gradients stacked."""
    parts = [(0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")]
    leaves = [getattr(m[i], name) for i, name in parts for m in modules]
    n = len(modules)
    return leaves, lambda grads: {
        f"{i}.{name}": torch.stack(grads[k * n : (k + 1) * n]) for k, (i, name) in enumerate(parts)
    }


def _stacked_copies(modules: Sequence[nn.Sequential]) -> list[Tensor]:
    parts = [(0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")]
    return [torch.stack([getattr(m[i], n).detach() for m in modules]).requires_grad_() for i, n in parts]


def _two_layers(n: int, D: int, H: int, P: int, device: str, dtype: torch.dtype) -> list[nn.Sequential]:
    return [nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, P)).to(device, dtype) for _ in range(n)]


def heads(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """T equal heads on one input."""
    T, D, H, P = case.sizes
    modules = _two_layers(T, D, H, P, device, dtype)
    names = [f"head{t}" for t in range(T)]
    nodes = [{"name": name, "layers": module} for name, module in zip(names, modules, strict=True)]
    model = MTLModel(nodes, names)
    leaves, grads = _stacks(modules)
    W1, b1, W2, b2 = stacked = _stacked_copies(modules)

    def by_bmm(x: Tensor) -> Sequence[Tensor]:
        h = F.linear(x, W1.flatten(0, 1), b1.flatten()).relu().unflatten(1, (T, H))
        return torch.baddbmm(b2.unsqueeze(1), h.transpose(0, 1), W2.mT).unbind()

    keys = ["0.weight", "0.bias", "2.weight", "2.bias"]
    ways = [
        Way(LOOP, lambda x: [module(x) for module in modules], leaves, grads),
        Way("fastroute", lambda x: model(x)[0], leaves, grads),
        Way("stacked parameters, by hand", by_bmm, stacked, _by_name(keys)),
    ]
    made = MultiHead(D, H, P, T, returns="list").to(device, dtype)
    order = [0, 2, 1, 3]  # both weights first
    ways.append(_copied("fastroute, MultiHead", made, [stacked[k] for k in order], [keys[k] for k in order]))
    x = torch.randn(case.B, D).to(device, dtype)
    return Problem(x, [torch.randn(case.B, P).to(device, dtype) for _ in range(T)], ways)


def _copied(name: str, module: nn.Module, stacked: Sequence[Tensor], keys: Sequence[str]) -> Way:
    """A module whose parameters are, in order, these."""
    leaves: list[Tensor] = list(module.parameters())
    with torch.no_grad():
        for mine, theirs in zip(leaves, stacked, strict=True):
            mine.copy_(theirs)

    return Way(name, module, leaves, _by_name(keys))


def experts(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """MMoE; or CGC with one own expert per task and E shared ones."""
    T, E, D, H, P = case.sizes
    own = 1 if case.what == "CGC" else 0
    sizes: dict[str, Any] = {"hidden_features": H, "out_features": P}
    module = (CGC(D, 1, E, T, **sizes) if own else MMoE(D, E, T, **sizes)).to(device, dtype)
    banks = [bank for bank in (module.task_experts, module.shared_experts) if bank is not None]
    modules = _two_layers(T * own + E, D, H, P, device, dtype)
    with torch.no_grad():
        for k, net in enumerate(modules):
            bank, e = (banks[0], k) if k < T * own else (banks[-1], k - T * own)
            for (i, name), w in zip(
                ((0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")), bank.parameters(), strict=True
            ):
                getattr(net[i], name).copy_(w[e])
    gates = [w.detach().clone().requires_grad_() for w in module.gate.weight]

    def by_loop(x: Tensor) -> list[Tensor]:
        made = [net(x) for net in modules]
        outputs = []
        for t, w in enumerate(gates):
            g = F.linear(x, w).softmax(-1)
            seen = torch.stack([made[t]] * own + made[T * own :], 1)
            outputs.append(torch.einsum("be,bep->bp", g, seen))
        return outputs

    leaves, grads = _stacks(modules)
    keys = ["0.weight", "0.bias", "2.weight", "2.bias"]

    def named(found: list[Tensor]) -> Results:
        return {**grads(found[: len(leaves)]), "gates": torch.stack(found[len(leaves) :])}

    def mine(found: list[Tensor]) -> Results:
        every, *rest = found[:-1], found[-1]
        banked = [every[4 * k : 4 * k + 4] for k in range(len(banks))]
        return {**{key: torch.cat([b[k] for b in banked]) for k, key in enumerate(keys)}, "gates": rest[0]}

    parameters = [p for bank in banks for p in bank.parameters()] + [module.gate.weight]
    ways = [
        Way(LOOP, by_loop, [*leaves, *gates], named),
        Way("fastroute", lambda x: module(x), parameters, mine),
        Way(f"{LOOP}, torch.compile", torch.compile(by_loop, options=harness.ANY_THREADS), [*leaves, *gates], named),
        Way(f"{EXPERTS}, torch.compile", torch.compile(module, options=harness.ANY_THREADS), parameters, mine),
    ]
    x = torch.randn(case.B, D).to(device, dtype)
    return Problem(x, [torch.randn(case.B, P).to(device, dtype) for _ in range(T)], ways)


GROUPS = {"readme": "readme", "chain": "schedule", "joiners": "schedule", "heads": "heads"}
MAKE = {"readme": readme, "chain": chain, "joiners": chain, "heads": heads, "MMoE": experts, "CGC": experts}


def problem(case: Case, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    """The same numbers in each dtype: they are drawn in float32."""
    torch.manual_seed(0)
    return MAKE[case.what](case, device, dtype)


@lru_cache(maxsize=1)
def shared(case: Case, device: str) -> Problem:
    """For the rows of a case: what is compiled, is so once."""
    return problem(case, device)


def _pass(p: Problem, way: Way, training: bool) -> Sequence[Tensor]:
    if not training:
        with torch.no_grad():
            return way.fn(p.x)
    ys = way.fn(p.x)
    torch.autograd.backward(ys, p.dys)
    return ys


def _results(p: Problem, way: Way, training: bool) -> Results:
    for leaf in way.leaves:
        leaf.grad = None
    ys = _pass(p, way, training)
    found = {"y": torch.stack([y.detach() for y in ys])}
    if training:
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in way.leaves]
        found |= {f"d{k}": g.clone() for k, g in way.named(grads).items()}
    return found


def contestant(p: Problem, way: Way, case: Case, device: str) -> Step:
    def run() -> None:
        for _ in range(case.calls):
            _pass(p, way, case.training)

    def drop() -> None:
        for leaf in way.leaves:
            leaf.grad = None

    return Step(way.name, lambda: _results(p, way, case.training), run, drop, device, way.every)


# ---------------------------------------------------------------------------------------------- the truth


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> Truth:
    exact = problem(case, device, torch.float64)
    return Truth(lambda: _results(exact, exact.ways[0], case.training), torch.float32)


# ---------------------------------------------------------------------------------------------- the rows


def products(case: Case) -> list[Product]:
    """Of the linear layers; a backward pass has two for each, but for the first layers' dx, which nobody asks for."""
    if case.what in ("chain", "joiners"):
        return []
    if case.what == "readme":
        layers = [(16, 32), (32, 8)] * 2 + [(8, 32), (32, 1), (8, 64), (64, 1), (16, 32), (32, 32), (32, 16), (16, 1)]
        count, first = 1, layers[:1]
    else:
        T, *sizes = case.sizes
        E = sizes.pop(0) + (T if case.what == "CGC" else 0) if case.what in ("MMoE", "CGC") else T
        D, H, P = sizes
        layers, count, first = [(D, H), (H, P)], E, [(D, H)]
    made = [Product("nt", case.B, a, b, count) for a, b in layers]
    if case.training:
        made += [Product("tn", b, case.B, a, count) for a, b in layers]
        made += [Product("nn", case.B, b, a, count) for a, b in layers if (a, b) not in first]
    return made


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield _small(row.case) if options.quick else row.case


def _small(case: Case) -> Case:
    small = {
        "chain": (20,),
        "joiners": (20, 10),
        "heads": (3, 8, 4, 2),
        "MMoE": (2, 3, 8, 4, 2),
        "CGC": (2, 3, 8, 4, 2),
    }
    return case._replace(B=min(case.B, 8), sizes=small.get(case.what, ()), calls=1)


def graphs(case: Case, device: str) -> dict[str, int]:
    """How many graphs torch.compile makes of the README's model for five batch sizes, and whether it is whole."""
    from torch._dynamo.testing import CompileCounterWithBackend

    found = {}
    torch._dynamo.reset()
    for k, way in enumerate(problem(case._replace(compiled=False), device).ways):
        counter = CompileCounterWithBackend("eager")
        run = torch.compile(way.fn, fullgraph=True, dynamic=True, backend=counter)
        for B in (32, 7, 64, 100, 33):
            run(torch.randn(B, 16, device=device))
        found[("by hand", "fastroute")[k]] = counter.frame_count
    torch._dynamo.reset()
    return found


def test_multitask(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    info: dict[str, Any] = {"case": str(case), "threads": row.threads, "targets": row.targets}
    if case.compiled:
        info["graphs"] = graphs(case, device)
    p, checked = shared(case, device), truth(case, device)
    made = products(case)
    info |= {"pass": "training" if case.training else "forward", "GFLOP": harness.flops(made) * case.calls / 1e9}
    parameters = sum(t.numel() for t in p.ways[0].leaves)
    info["GB"] = 4 * (parameters * (3 if case.training else 1) + p.x.numel()) * case.calls / 1e9
    info["group"] = GROUPS.get(case.what, "experts") + ", compiled" * case.compiled
    if row.against is not None:
        info["against"] = row.against
    benchmark.extra_info.update(info)
    subject, *rivals = (contestant(p, way, case, device) for way in (p.ways[1], p.ways[0], *p.ways[2:]))
    floors = harness.floors(made, torch.float32, device) if case.what not in ("readme", "chain", "joiners") else []
    harness.race(benchmark, subject, rivals, floors, checked, options=options, seconds=3, most=100)
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
    if case.compiled:
        assert info["graphs"]["fastroute"] == 1, f"expected one graph for all batch sizes, got {info['graphs']}"
