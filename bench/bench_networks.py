"""A training step of a routed network: forward, both losses and backward, at the sizes of upstream's measurements.

Three routed layers 128 -> 48 -> 48 -> 5 of K modules each, a task's samples decided for by an agent of their own,
cross-entropy with NegLossReward. Axes: B samples, T = 3 layers, K modules, A agents (and tasks).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bench import harness
from bench.harness import Product, Results, Step, Truth
from bench.routed_rivals import LOOP, SHARE, SORTED, Batch, Batched, BySample, Layer
from fastroute import networks
from fastroute.ops.backends import taken

WIDTHS = (128, 48, 48, 5)
DEPTH = len(WIDTHS) - 1

_NAMES = {"REINFORCE": "REINFORCE approx", "WPL": "WPL tabular collab"}


class Case(NamedTuple):
    """An algorithm and the sizes of one step."""

    algorithm: str
    B: int
    K: int = 20
    A: int = 20

    def __str__(self) -> str:
        return f"{_NAMES.get(self.algorithm, f'{self.algorithm} approx')}, B {self.B}, K {self.K}, A {self.A}"

    @property
    def is_tabular(self) -> bool:
        return self.algorithm == "WPL"

    @property
    def collaborates(self) -> bool:
        return self.algorithm == "WPL"


@dataclass(frozen=True)
class Row:
    """A case, and what is asked of it."""

    case: Case
    targets: dict[str, float] = field(default_factory=dict, hash=False)
    threads: int = 1

    def __str__(self) -> str:
        c = self.case
        return f"{c.algorithm}-B{c.B}-K{c.K}-A{c.A}-{self.threads}thread"


_SIZES = [Case(algorithm, B) for B in (64, 256, 1024) for algorithm in ("REINFORCE", "WPL")]
_MANY = [Case("REINFORCE", 256, K=5), Case("REINFORCE", 256, K=100)]
_AGENTS = [Case("REINFORCE", 256, A=1), Case("REINFORCE", 256, A=100)]
_OTHERS = [Case(algorithm, 256) for algorithm in ("GumbelSoftmax", "QLearning", "AAC")]
_WALL_MS = {64: 2.5, 256: 3.5, 1024: 8.0}
_OPERATORS = 600
#: What kernels were to bring it down to, whether parameters are stacked or not.
_KERNELS_WALL_MS = {64: 1.5, 256: 2.0, 1024: 6.0}
_KERNELS_OPERATORS = 150

#: (case, compared with, at most so many times its time; None: only reported)
_ACROSS = [(*reversed(_MANY), 1.5), (*reversed(_AGENTS), None)]

#: Pytorch-Routing 0.4.1's own step, ms and operators (None: not counted), measured once on another machine with two
#: threads; only its masks had been made boolean. Its formulas differ where ``formula="upstream"`` does.
_UPSTREAM = {
    Case("REINFORCE", 64): (59.1, 15022),
    Case("REINFORCE", 256): (152, 38550),
    Case("REINFORCE", 1024): (779, None),
    Case("REINFORCE", 256, K=5): (132, 36299),
    Case("REINFORCE", 256, K=100): (242, 65338),
    Case("REINFORCE", 256, A=1): (121, 34062),
    Case("WPL", 64): (92.0, 19434),
    Case("WPL", 256): (246, 49870),
    Case("WPL", 1024): (1193, None),
    Case("QLearning", 256): (141, 38489),
    Case("AAC", 256): (166, 40571),
    Case("GumbelSoftmax", 256): (109, 24455),
}


def rows(options: harness.Options) -> list[Row]:
    """conftest makes a test of each; rows of one case stand together, so that it is built once."""
    if options.gpu:
        return [Row(case, {"max_operators": _OPERATORS}) for case in _SIZES]
    found: list[Row] = []
    for case in _SIZES + _MANY + _AGENTS + _OTHERS:
        asked: dict[str, float] = {}
        if case in _SIZES:
            asked["max_wall_ms"] = _WALL_MS[case.B]
            asked["max_wall_ms, kernels"] = asked["max_wall_ms, stacked"] = _KERNELS_WALL_MS[case.B]
        if case.K == case.A == 20:
            asked["max_operators"] = _OPERATORS
        if case in _SIZES:
            asked["max_operators, kernels"] = asked["max_operators, stacked"] = _KERNELS_OPERATORS
        found += [Row(case), Row(case, asked, threads=2)]
    return found


# ---------------------------------------------------------------------------------------------- the network


class Network(nn.Module):
    """The network as a user of fastroute writes it."""

    def __init__(self, case: Case, stacked: bool = False) -> None:
        super().__init__()
        self.start, self.assign = networks.Initialization(), networks.PerTaskAssignment()
        decisions, selections = [], []
        for t, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
            modules: list[nn.Module] = [nn.Linear(inputs, outputs) for _ in range(case.K)]
            if t < DEPTH - 1:
                modules = [nn.Sequential(m, nn.ReLU()) for m in modules]
            decisions.append(
                getattr(networks, case.algorithm)(
                    case.K,
                    inputs,
                    num_agents=case.A,
                    policy_storage_type="tabular" if case.is_tabular else "approx",
                    additional_reward_func=networks.CollaborationReward(SHARE) if case.collaborates else None,
                    stacked=stacked,
                )
            )
            selections.append(networks.Selection(*modules, stacked=stacked))
        self.decisions, self.selections = nn.ModuleList(decisions), nn.ModuleList(selections)
        self.loss = networks.Loss(nn.CrossEntropyLoss(), networks.NegLossReward())

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, networks.Trajectory]:
        y, meta, agents = self.assign(*self.start(batch.x, batch.tasks))
        for t, (decide, select) in enumerate(zip(self.decisions, self.selections, strict=True)):
            forced = None if batch.actions is None else batch.actions[t]
            y, meta, actions = decide(y, meta, agents, forced_actions=forced)
            y, meta, _ = select(y, meta, actions)
        return (*self.loss(y, meta, batch.target), meta)

    def clear(self) -> None:
        for decide in self.decisions:
            decide.additional_reward_func.clear()


def layers_of(net: Network) -> list[Layer]:
    """The same parameters, for rivals."""
    found = []
    for decide, select in zip(net.decisions, net.selections, strict=True):
        modules = list(select._submodules)
        is_plain = isinstance(modules[0], nn.Linear)
        linears = modules if is_plain else [m[0] for m in modules]
        critics = getattr(decide, "_qvalue_mem", None) or getattr(decide, "_value_mem", None) or ()
        agents = [
            [s._approx if isinstance(s._approx, nn.Parameter) else s._approx._layers[0] for s in storages]
            for storages in (decide._policy, critics)
        ]
        found.append(Layer(modules, linears, not is_plain, *agents))
    return found


#: (layer, "modules" | "policies" | "critics", "weight" | "bias" | "table")
Group = tuple[int, str, str]


def shown(group: Group) -> str:
    t, what, name = group
    return f"d {name} of layer {t}'s {what}"


def groups(net: Network) -> dict[Group, list[nn.Parameter]]:
    """A parameter per module or agent."""
    found: dict[Group, list[nn.Parameter]] = {}
    for t, layer in enumerate(layers_of(net)):
        for what, members in (("modules", layer.linears), ("policies", layer.policies), ("critics", layer.critics)):
            if members and isinstance(members[0], nn.Parameter):
                found[t, what, "table"] = list(members)
            elif members:
                found[t, what, "weight"] = [m.weight for m in members]
                found[t, what, "bias"] = [m.bias for m in members]
    return found


class Problem(NamedTuple):
    """A network with what it is trained on; ``forced`` names the actions and draws for the gate."""

    case: Case
    net: Network
    batch: Batch
    forced: Batch


@lru_cache(maxsize=1)
def problem(case: Case, device: str) -> Problem:
    torch.manual_seed(0)
    net = Network(case)
    if case.is_tabular:  # all choices are alike at first, which would hide faults
        with torch.no_grad():
            for parameter in net.decisions.parameters():
                parameter.uniform_()
    net.to(device)
    B = case.B
    batch = Batch(
        torch.randn(B, WIDTHS[0]).to(device),
        (torch.arange(B) % case.A)[torch.randperm(B)].to(device),
        torch.randint(WIDTHS[-1], (B,)).to(device),
    )
    uniform = torch.rand(DEPTH, B, case.K).to(device)
    with torch.no_grad():
        actions = net(batch)[2].actions
    return Problem(case, net, batch, batch._replace(actions=actions, uniform=uniform))


# ---------------------------------------------------------------------------------------------- the contestants

#: What a contestant does with a batch: (module loss, routing loss).
Losses = Callable[[Batch], tuple[Tensor, Tensor]]


def _drop(of: nn.Module) -> None:
    for parameter in of.parameters():
        parameter.grad = None


def _results(net: Network, losses: Losses, batch: Batch) -> Results:
    """Both losses, and the gradients: one tensor of a layer's modules, one of its agents; zeros where there is none."""
    _drop(net)
    module_loss, routing_loss = losses(batch)
    (module_loss + routing_loss).backward()
    found = _collected(net, module_loss, routing_loss)
    _drop(net)
    return found


def _collected(net: Network, module_loss: Tensor, routing_loss: Tensor) -> Results:
    found = {"module loss": module_loss.detach(), "routing loss": routing_loss.detach()}
    if isinstance(net.decisions[0], networks.GumbelSoftmax):  # it has none
        assert found.pop("routing loss") == 0
    for key, members in groups(net).items():
        if any(p.grad is not None for p in members):  # GumbelSoftmax's last decision may change nothing
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            found[shown(key)] = torch.stack(grads)
    return found


def _forced_uniform(net: Network, batch: Batch) -> None:
    """GumbelSoftmax has noise even when told what to choose."""
    for decide, u in zip(net.decisions, batch.uniform, strict=True):
        decide._uniform = lambda *shape, like, u=u: u.to(like)


def fastroute_step(p: Problem, name: str, backend: str, device: str) -> Step:
    def check() -> Results:
        def losses(batch: Batch) -> tuple[Tensor, Tensor]:
            return p.net(batch)[:2]

        p.net.clear()
        if p.case.algorithm == "GumbelSoftmax":
            _forced_uniform(p.net, p.forced)
        try:
            with harness.on(backend):
                return _results(p.net, losses, p.forced)
        finally:
            for decide in p.net.decisions:
                decide.__dict__.pop("_uniform", None)

    def run() -> Tensor:
        with harness.on(backend):
            module_loss, routing_loss, _ = p.net(p.batch)
            loss: Tensor = module_loss + routing_loss
            loss.backward()
        return loss.detach()

    return Step(name, check, run, lambda: _drop(p.net), device)


def stacked_step(p: Problem, device: str) -> Step:
    """The same network with its parameters stacked."""
    net = Network(p.case, stacked=True).to(device)
    net.load_state_dict(p.net.state_dict())
    same = p._replace(net=net)
    step = fastroute_step(same, "fastroute, stacked", "auto", device)

    def check() -> Results:
        """Under the names of single modules."""
        net.clear()
        if p.case.algorithm == "GumbelSoftmax":
            _forced_uniform(net, p.forced)
        try:
            module_loss, routing_loss, _ = net(p.forced)
            (module_loss + routing_loss).backward()
        finally:
            for decide in net.decisions:
                decide.__dict__.pop("_uniform", None)
        single = dict(p.net.named_parameters())
        for name, parameter in net.named_parameters():
            for k in range(len(parameter) if "pattern." in name else 0):
                single[name.replace("pattern.", f"{k}.")].grad = None if parameter.grad is None else parameter.grad[k]
            if "pattern." not in name:
                single[name].grad = parameter.grad
        found = _collected(p.net, module_loss, routing_loss)
        _drop(net)
        _drop(p.net)
        return found

    return dataclasses.replace(step, check=check)


def rival_step(p: Problem, name: str, rival: Batched | BySample, device: str, every: int = 1) -> Step:
    def check() -> Results:
        rival.clear()
        return _results(p.net, rival, p.forced)

    def run() -> Tensor:
        module_loss, routing_loss = rival(p.batch)
        loss = module_loss + routing_loss
        loss.backward()
        return loss.detach()

    return Step(name, check, run, lambda: _drop(p.net), device, every)


def rivals_of(p: Problem, device: str, gpu: bool) -> list[Step]:
    """On a GPU going through samples one by one would take minutes."""
    case, layers = p.case, layers_of(p.net)
    found = [stacked_step(p, device)]
    found += [] if gpu else [fastroute_step(p, "fastroute, reference", "reference", device)]
    found += [harness.replayed(one) for one in (fastroute_step(p, "fastroute", "auto", device), *found)] if gpu else []
    for name, way in (("module loop", LOOP), ("sorted loop", SORTED)):
        found.append(rival_step(p, name, Batched(case.algorithm, layers, way, case.collaborates), device))
    if not gpu and case.B <= 256:
        slow = BySample(case.algorithm, layers, case.collaborates)
        found.append(rival_step(p, "sample by sample", slow, device, every=20))
    return found


# ---------------------------------------------------------------------------------------------- the truth


@lru_cache(maxsize=1)
def truth(case: Case, device: str) -> Truth:
    """Sample by sample in float64 is the definition; module after module, which is quicker, has to agree with it."""
    p = problem(case, device)
    net = copy.deepcopy(p.net).to("cpu", torch.float64)
    forced = Batch(*(None if t is None else t.cpu() for t in p.forced))
    forced = forced._replace(x=forced.x.double(), uniform=p.forced.uniform.cpu().double())
    exact = _results(net, BySample(case.algorithm, layers_of(net), case.collaborates), forced)

    def by_module() -> Results:
        found = _results(net, Batched(case.algorithm, layers_of(net), LOOP, case.collaborates), forced)
        return {k: found[k].to(device) for k in exact}

    truth = Truth(by_module, torch.float32)
    for name, t in exact.items():
        torch.testing.assert_close(truth.exact[name].cpu(), t, rtol=1e-10, atol=1e-12)
    return truth


# ---------------------------------------------------------------------------------------------- counts


def products(case: Case) -> list[Product]:
    """Every matrix product of a step, with as many rows and as if all had one module; no gradient of x is asked for.

    Policies do not pass gradients on either, so theirs have two products each.
    """
    found: list[Product] = []
    for t, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        found += [Product("nt", case.B, inputs, outputs), Product("tn", outputs, case.B, inputs)]
        if t:
            found.append(Product("nn", case.B, outputs, inputs))
        if not case.is_tabular:
            widths = [case.K] + [1] * (case.algorithm == "AAC")
            for width in widths:
                found += [Product("nt", case.B, inputs, width), Product("tn", width, case.B, inputs)]
    return found


def moved(p: Problem) -> int:
    """Bytes: the input, and every layer's activations, parameters and their gradients written and read once."""
    activations = p.case.B * (WIDTHS[0] + 4 * sum(WIDTHS[1:]))
    return 4 * (activations + 2 * sum(parameter.numel() for parameter in p.net.parameters()))


# ---------------------------------------------------------------------------------------------- the rows


@pytest.fixture
def settings(row: Row, options: harness.Options) -> Iterator[Case]:
    """The row's threads, and its sizes in these options."""
    with harness.threads(row.threads, options):
        yield _sized(row.case, options)


def _sized(case: Case, options: harness.Options) -> Case:
    return case._replace(B=min(case.B, 32)) if options.quick else case


def _compared(case: Case, options: harness.Options) -> dict[str, Any]:
    for one, other, most in _ACROSS:
        if one == case:
            axis = "K" if one.K != other.K else "A"
            what = f"{axis} = {getattr(one, axis)} against {axis} = {getattr(other, axis)}"
            return {"against": {"case": str(_sized(other, options)), "what": what, "at_most": most}}
    return {}


def test_networks(benchmark: Any, row: Row, options: harness.Options, settings: Case) -> None:
    case, device = settings, options.device
    p, checked = problem(case, device), truth(case, device)
    subject = fastroute_step(p, "fastroute", "auto", device)
    rivals: Sequence[Step] = rivals_of(p, device, options.gpu)
    made = products(case)
    info: dict[str, Any] = {"case": str(case), "pass": "step", "threads": row.threads, "targets": row.targets}
    info |= {"GFLOP": harness.flops(made) / 1e9, "GB": moved(p) / 1e9, **_compared(row.case, options)}
    info["backend"] = {op: taken(op, torch.device(device).type, torch.float32) for op in ("dispatch", "policy")}
    if row.case in _UPSTREAM:
        ms, count = _UPSTREAM[row.case]
        info["upstream"] = {"ms": ms, "operators": count}
    benchmark.extra_info.update(info)
    harness.race(
        benchmark,
        subject,
        rivals,
        harness.floors(made, torch.float32, device),
        checked,
        options=options,
        seconds=2.5,
        most=200,
    )
    if options.gpu or row.threads == 2:  # the count is the same for any number
        benchmark.extra_info["operators"] = {one.name: harness.operators(one) for one in (subject, *rivals)}
    if options.gpu:
        harness.add_roofline(benchmark.extra_info, device, torch.float32, False, options.quick)
    harness.fail_if_wrong(benchmark, str(row))
