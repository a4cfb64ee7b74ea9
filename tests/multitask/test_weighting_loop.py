"""The training loop of docs/multitask_weighting.md over epochs, against the papers' formulas and against TorchJD."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastroute
from fastroute.multitask import DWA, FAMO, STCH, MTLModel, Weighting
from tests.helpers import seeds
from tests.helpers.extras import needed

scalarization = needed("torchjd.scalarization")
PAGE = Path(fastroute.__file__).resolve().parents[1] / "docs" / "multitask_weighting.md"
F64 = torch.float64
EPOCHS = 4
Batches = list[tuple[Tensor, dict[str, Tensor]]]


def train_epoch() -> Callable[[MTLModel, torch.optim.Optimizer, Batches], None]:
    """The page's own."""
    found = re.search(r"^def train_epoch.*?(?=\n\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    space: dict[str, Any] = {"torch": torch, "FAMO": FAMO}
    exec(compile(found[0], PAGE.name, "exec"), space)
    return space["train_epoch"]


def model_of(weighting: str | Weighting | None) -> MTLModel:
    seeds.manual_seed(0)
    return MTLModel(
        [
            {"name": "trunk", "layers": [nn.Linear(6, 8), nn.Tanh()]},
            {"name": "small", "layers": nn.Linear(8, 1), "anchor_layer": "trunk", "loss": nn.MSELoss()},
            {"name": "large", "layers": nn.Linear(8, 1), "anchor_layer": "trunk", "loss": nn.L1Loss()},
        ],
        ["small", "large"],
        weighting=weighting,
    ).double()


def batches(seed: int) -> Batches:
    generator = seeds.generator(seed)
    draw = partial(torch.randn, generator=generator, dtype=F64)
    return [(draw(8, 6), {"small": draw(8, 1), "large": 10 + 5 * draw(8, 1)}) for _ in range(5)]


# ------------------------------------------------------------------------------------------------------- the papers


class Rule(nn.Module):
    """A paper's rule: the total of losses [T], what follows the optimizer's step, and the end of an epoch."""

    def forward(self, losses: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, losses: Tensor) -> None: ...

    def step(self) -> None: ...


class UncertaintyRule(Rule):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, losses: Tensor) -> Tensor:
        return (0.5 * torch.exp(-self.s) * losses + 0.5 * self.s).sum()


class IMTLRule(UncertaintyRule):
    def forward(self, losses: Tensor) -> Tensor:
        return (torch.exp(self.s) * losses - self.s).sum()


class GeometricRule(Rule):
    def forward(self, losses: Tensor) -> Tensor:
        return losses.prod().sqrt()


class DWARule(Rule):
    """Equation 7: the loss of an epoch is the mean of its iterations'."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[Tensor]] = [[]]

    def forward(self, losses: Tensor) -> Tensor:
        weights = torch.ones(2, dtype=F64)
        if len(self.epochs) > 2:
            before, last = (torch.stack(epoch).mean(0) for epoch in self.epochs[-3:-1])
            weights = 2 * torch.softmax(last / before / 2.0, 0)
        self.epochs[-1].append(losses.detach())
        return (weights * losses).sum()

    def step(self) -> None:
        self.epochs.append([])


class STCHRule(Rule):
    """Logarithms of losses over their means of the second epoch, in two epochs of warm-up their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[Tensor]] = [[]]

    def forward(self, losses: Tensor) -> Tensor:
        self.epochs[-1].append(losses.detach())
        if len(self.epochs) <= 2:
            return losses.log().sum()
        nadir = torch.stack(self.epochs[1]).mean(0)
        return 0.5 * torch.log(torch.exp(0.5 * torch.log(losses / nadir) / 0.5).sum())

    def step(self) -> None:
        self.epochs.append([])


class FAMORule(Rule):
    """Algorithm 1, with PyTorch's Adam and autograd for the Jacobian of the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.xi = torch.zeros(2, dtype=F64, requires_grad=True)
        self.adam = torch.optim.Adam([self.xi], lr=0.025, weight_decay=1e-3)
        self.before = torch.zeros(2)

    def forward(self, losses: Tensor) -> Tensor:
        z, D = self.xi.softmax(0).detach(), losses + 1e-8
        self.before = D.detach().log()
        return (z * D.log()).sum() / (z / D.detach()).sum()

    def update(self, losses: Tensor) -> None:
        (self.xi.grad,) = torch.autograd.grad(self.xi.softmax(0), self.xi, self.before - (losses + 1e-8).log())
        self.adam.step()


class TorchJD(Rule):
    """One of TorchJD's scalarizers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, losses: Tensor) -> Tensor:
        return self.inner(losses)

    def update(self, losses: Tensor) -> None:
        if hasattr(self.inner, "update"):
            self.inner.update(losses)

    def step(self) -> None:
        if hasattr(self.inner, "step"):
            self.inner.step()


def learned(rule: Rule) -> list[nn.Parameter]:
    """What the model's optimizer moves: not what the rule itself does, as TorchJD's FAMO."""
    return [] if isinstance(rule, TorchJD) and hasattr(rule.inner, "update") else list(rule.parameters())


def train_by(rule: Rule) -> MTLModel:
    """By hand, without anything of ours but the layers."""
    model = model_of(None)
    optimizer = torch.optim.Adam([*model.parameters(), *learned(rule)], 0.02)

    def losses(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        small, large = model(x)[0]
        return torch.stack([F.mse_loss(small, y["small"]), F.l1_loss(large, y["large"])])

    for epoch in range(EPOCHS):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            rule(losses(x, y)).backward()
            optimizer.step()
            rule.update(losses(x, y).detach())
        rule.step()
    return model


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield
    model.train()


#: How losses are read: in validation after every batch and every epoch.
READS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]] | None] = {
    "never": None,
    "evaluation": evaluation,
    "no_grad": lambda model: torch.no_grad(),
    "inference_mode": lambda model: torch.inference_mode(),
    "as in training": lambda model: nullcontext(),
}


def train(weighting: str | Weighting, reads: str = "never") -> MTLModel:
    """By the page's loop."""
    run, mode = train_epoch(), READS[reads]
    model = model_of(weighting)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    class Reading(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                yield batch
                if mode is not None:
                    with mode(model):
                        model.loss(model(100 * batch[0]), batch[1])

    for epoch in range(EPOCHS):
        run(model, optimizer, Reading(batches(epoch)))
    return model


def same_parameters(ours: MTLModel, theirs: MTLModel) -> None:
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], p, rtol=1e-9, atol=1e-11)


TASKS = ("small", "large")
PAPERS: dict[str, tuple[Callable[[], str | Weighting], Callable[[], Rule]]] = {
    "uncertainty": (lambda: "uncertainty", UncertaintyRule),
    "imtl": (lambda: "imtl", IMTLRule),
    "geometric": (lambda: "geometric", GeometricRule),
    "dwa": (lambda: DWA(TASKS, dtype=F64), DWARule),
    "stch": (lambda: STCH(TASKS, 0.5, warmup=2, dtype=F64), STCHRule),
    "famo": (lambda: FAMO(TASKS, dtype=F64), FAMORule),
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("name", PAPERS)
def test_the_loop_is_the_papers_algorithm(name: str, reads: str) -> None:
    """However often losses are read meanwhile."""
    make, rule = PAPERS[name]
    same_parameters(train(make(), reads), train_by(rule()))


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("equal", lambda: scalarization.Sum()),
        ("uncertainty", lambda: scalarization.UW(2)),
        ("imtl", lambda: scalarization.IMTLL(2)),
        ("geometric", lambda: scalarization.GeometricMean()),
        (partial(STCH, TASKS, 0.3, [0.2, 0.8], [0.1, 0.0], dtype=F64),
         lambda: scalarization.STCH(0.3, torch.tensor([0.2, 0.8], dtype=F64), torch.tensor([0.1, 0.0], dtype=F64))),
        (partial(DWA, TASKS, dtype=F64), lambda: scalarization.DWA()),
        (partial(FAMO, TASKS, dtype=F64), lambda: scalarization.FAMO(2)),
    ],
)  # fmt: skip
def test_the_loop_is_torchjds(kind: Any, theirs: Callable[[], nn.Module]) -> None:
    same_parameters(train(kind if isinstance(kind, str) else kind()), train_by(TorchJD(theirs())))


def test_famo_learns() -> None:
    """Its weights are those of the paper, far from equal."""
    model, rule = train("famo"), FAMORule()
    train_by(rule)
    assert isinstance(model.weighting, FAMO)
    torch.testing.assert_close(model.weighting.logits.double(), rule.xi.detach(), rtol=1e-4, atol=0)  # kept in float32
    assert (rule.xi.abs() > 0.1).all()


# ----------------------------------------------------------------------------------------------- what is remembered


def remembering(kind: str) -> tuple[MTLModel, Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """A model, its loss on a batch, and what its weighting makes of the losses so far."""
    makers: dict[str, Callable[[], Weighting]] = {
        "dwa": lambda: DWA(TASKS, dtype=F64),
        "stch": lambda: STCH(TASKS, warmup=1, dtype=F64),
        "famo": lambda: FAMO(TASKS, dtype=F64),
    }
    model = model_of(makers[kind]())
    ((x, y),) = batches(0)[:1]
    rate = torch.tensor([0.5, 2.0], dtype=F64)

    def made() -> list[Tensor]:
        weighting = copy.deepcopy(model.weighting)
        assert weighting is not None
        weighting.update(rate)
        weighting.step()
        return [getattr(weighting, {"dwa": "last", "stch": "nadir", "famo": "logits"}[kind]), weighting(rate)]

    return model, lambda: model.loss(model(x), y)[0], made


def once(kind: str) -> list[Tensor]:
    _, loss, made = remembering(kind)
    loss().backward()
    return made()


KINDS = ("dwa", "stch", "famo")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_walked_twice_counts_once(kind: str) -> None:
    model, loss, made = remembering(kind)
    total = loss()
    torch.autograd.grad(total, list(model.trunk.parameters()), retain_graph=True, create_graph=True)
    total.backward()
    torch.testing.assert_close(made(), once(kind), rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_not_remembered(kind: str, value: float) -> None:
    """As if that task had no loss in that batch, at the step and after it; gradient scalers skip such a step."""
    states = []
    for bad in (torch.tensor(value, dtype=F64), None):
        made = {"dwa": DWA, "stch": partial(STCH, warmup=1), "famo": FAMO}
        weighting: Weighting = made[kind](["a", "b"], dtype=F64)
        for k in range(5):
            own = torch.tensor([2.0 + k, 3.0], dtype=F64, requires_grad=True)
            step = {"a": own[0] if k != 1 else bad, "b": own[1]}
            weighting(step).backward()
            weighting.update({"a": own.detach()[0] / 2 if k != 3 else bad, "b": own.detach()[1] / 3})
            if k % 2:
                weighting.step()
        states.append(weighting.state_dict())
        assert all(t.isfinite().all() for t in states[-1].values())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_recomputed_counts_once(kind: str, reentrant: bool) -> None:
    found = []
    for again in (False, True):
        model, _, made = remembering(kind)
        for k, (x, y) in enumerate(batches(0)[:2]):
            if again and k == (kind == "famo"):  # which remembers the last one
                run = lambda x, y=y, model=model: model.loss(model(x), y)[0]  # noqa: E731
                checkpoint(run, x.requires_grad_(), use_reentrant=reentrant).backward()
            else:
                model.loss(model(x), y)[0].backward()
        found.append(made())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.long) for k in KINDS[:-1]), KINDS[-1]])
def test_without_a_backward_pass_every_call_counts(kind: str) -> None:
    """And in a compiled graph, whose backward pass does not tell."""
    _, loss, made = remembering(kind)
    loss()
    torch.testing.assert_close(made(), once(kind), rtol=0, atol=0)
    torch._dynamo.reset()
    model, _, made = remembering(kind)
    ((x, y),) = batches(0)[:1]
    step = torch.compile(lambda x: model.loss(model(x), y)[0], fullgraph=True, backend="aot_eager")
    step(x).backward()
    with torch.no_grad():
        step(100 * x)
    torch.testing.assert_close(made(), once(kind), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_forgets_what_was_trained_on(kind: str) -> None:
    """A loop that begins to call without a backward pass is not held to an old batch."""
    model, loss, _ = remembering(kind)
    loss().backward()
    weighting = model.weighting
    assert weighting is not None
    rate = torch.tensor([0.3, 0.4], dtype=F64)
    weighting.update(rate)
    weighting.step()
    weighting(rate)
    other = copy.deepcopy(weighting)
    other(2 * rate)
    for w in (weighting, other):
        w.update(rate)
        w.step()
    name = {"dwa": "last", "stch": "nadir", "famo": "logits"}[kind]
    same = torch.equal(getattr(weighting, name), getattr(other, name))
    assert same is (kind == "stch")  # whose warm-up is over
