"""``trajectory_loss`` in Triton against its definition in float64: compiled on a GPU, else in Triton's interpreter.

Axes: B (b) samples, T decisions.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute import functional, networks, use_backend
from fastroute.kernels import launch
from fastroute.kernels import trajectory_loss as kernels
from fastroute.ops.trajectory_loss import plain
from fastroute.ops.trajectory_loss import reference as reference
from fastroute.ops.trajectory_loss.contract import ALGORITHMS, SILENT
from fastroute.ops.trajectory_loss.op import ByAction, Final, laid_out, rewarded_loss
from tests import aot
from tests.helpers import seeds
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.opcheck import opcheck
from tests.helpers.trajectory_losses import arguments, loss_case, loss_op, loss_truth

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
#: Compiled code may contract a product and a sum into one rounding; operators of their own cannot.
SAME = {"rtol": 0.0, "atol": 0.0} if DEVICE == "cpu" else {}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def on_device(case: Case) -> Case:
    return replace(
        case,
        inputs={k: None if t is None else t.to(DEVICE) for k, t in case.inputs.items()},
        cotangents={k: t.to(DEVICE) for k, t in case.cotangents.items()},
    )


@each_dtype
@pytest.mark.parametrize("kind", [kind for kind in ALGORITHMS if kind != SILENT])
def test_losses(kind: str, dtype: torch.dtype) -> None:
    for T, masked, options in ((3, True, {"gamma": 0.7}), (2, False, {"normalize": False})):
        kinds = (kind,) * T
        cases = [on_device(loss_case(kinds, 67, dtype, masked=masked, seed=seed)) for seed in range(3)]
        op, truth = loss_op("triton", kinds, **options), loss_truth(kinds, **options)
        check(op, truth, cases, dtype=dtype)


@pytest.mark.parametrize("B", [0, 1, 127, 128, 129, 400])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
def test_every_kind_at_once(B: int, masked: bool) -> None:
    """Two more than a kernel is written out for, three times, so that there are several and a short one."""
    kinds = (*ALGORITHMS, "WPL", "SARSA", *reversed(ALGORITHMS))[: 3 * kernels.CHUNK + 2]
    cases = [on_device(loss_case(kinds, B, masked=masked, seed=seed)) for seed in range(2)]
    op, truth = loss_op("triton", kinds, gamma=0.7), loss_truth(kinds, gamma=0.7)
    check(op, truth, cases, dtype=torch.float32)


def test_what_is_not_a_number_stays_in_its_sample() -> None:
    """And what a mask leaves out is nowhere."""
    case = on_device(loss_case(ALGORITHMS, 9, masked=True))
    op = loss_op("triton", ALGORITHMS, gamma=0.7)
    clean, others = evaluate(op, case), torch.arange(9, device=DEVICE) != 2
    for name, t in case.inputs.items():
        if t is None or t.dtype == torch.bool:
            continue
        bad = t.clone()
        bad[2] = math.nan
        found = evaluate(op, case.with_inputs(**{name: bad}))
        for k, expected in clean.items():
            assert torch.equal(found[k][others], expected[others])  # type: ignore[index]
        on = case.inputs.get(f"active.{name[3:]}") if "." in name else None
        if name in case.wrt:
            assert bool(found["loss"][2].isfinite()) == (on is not None and not on[2])  # type: ignore[index]


def test_agrees_with_the_reference_in_its_layout() -> None:
    """The op's contract: both are given the same lists, with slopes and without."""
    kinds = ("WPL", "REINFORCEBl2", SILENT, "EGreedyAAC")
    given = arguments(kinds, dict(on_device(loss_case(kinds, 50, masked=True)).inputs))
    args = (given["f"], *laid_out(**given), 0.7, True)
    for want in (True, False):
        (loss, slopes), (expected, rows) = kernels.forward(*args, want), plain.forward(*args, want)
        assert slopes.shape == rows.shape == (len(args[1]) if want else 0, 50)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(slopes, rows)
    opcheck(torch.ops.fastroute._trajectory_loss_triton.default, (*args, True), grad=False)


def test_compile() -> None:
    """One graph for any batch size; the op is one node of it."""
    torch._dynamo.reset()
    kinds = ("WPL", "REINFORCEBl2", "QLearning", SILENT)
    counter = CompileCounterWithBackend("aot_eager")

    def call(**inputs: Tensor | None) -> dict[str, Tensor | None]:
        return {"loss": functional.trajectory_loss(**arguments(kinds, inputs), gamma=0.7)}

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    with use_backend("triton"):
        for B in (16, 7, 33):
            case = on_device(loss_case(kinds, B, masked=True))
            found, expected = (evaluate(fn, case) for fn in (compiled, call))
            assert all(torch.equal(t, expected[name]) for name, t in found.items())  # type: ignore[arg-type]
            assert counter.frame_count == 1


def test_float64_goes_elsewhere() -> None:
    given = arguments(("AAC",), dict(on_device(loss_case(("AAC",), 4, torch.float64)).inputs))
    with use_backend("triton"), pytest.raises(RuntimeError, match="not float64"):
        functional.trajectory_loss(**given)


# ------------------------------------------------------------------------------------- rewards made in the same kernel


def finals(B: int, generator: torch.Generator) -> dict[str, Final]:
    losses = torch.randn(B, generator=generator).to(DEVICE)
    scores = torch.randn(B, 45, generator=generator).round(decimals=1).to(DEVICE)  # with ties
    scores[3:6, [2, 40]] = math.nan
    scores[7], scores[8, 7], scores[9] = -math.inf, math.inf, math.nan
    truth = scores.argmax(1)
    truth[::3] = 44
    few = scores[:, :2].bfloat16()
    return {
        "loss": Final(losses),
        "scaled loss": Final(losses, 0.3),
        "classes": Final(losses, 1.0, scores, truth),
        "scaled classes": Final(losses, -0.7, scores.mT.contiguous().mT, truth[:, None].expand(B, 2)[:, 1]),
        "two classes": Final(losses, 1.0, few, few.argmax(1) ^ (truth & 1)),
    }


def tables(generator: torch.Generator) -> dict[str, tuple[Tensor, float | None]]:
    counted = torch.randint(9, (5,), generator=generator).cumsum(0)
    made: dict[str, tuple[Tensor, float | None]] = {
        "float32": (torch.randn(4, generator=generator), None),
        "float64": (torch.randn(4, generator=generator, dtype=torch.float64), None),
        "counted": (counted - counted[0], 0.1),
        "nothing counted": (torch.zeros(5, dtype=torch.int64), 0.3),
    }
    return {name: (table.to(DEVICE), ratio) for name, (table, ratio) in made.items()}


#: of each decision: which table is its own reward's, or a row ("+": both)
BY_ACTION = {
    "loss": ("float32", "none", "row"),
    "scaled loss": ("counted+", "counted", "nothing counted"),  # two kinds: the first one's in the kernel
    "classes": ("float64", "float32", "counted", "float64+") * 3,  # more decisions than a kernel is written out for
    "scaled classes": ("nothing counted", "row", "nothing counted"),
    "two classes": ("none", "none"),
}


@pytest.mark.parametrize("name", BY_ACTION)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
def test_rewards_in_the_kernel(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, final rewards and gradients have the bits of rewards that PyTorch made; a second gradient has them too."""
    B, which, generator = 133, BY_ACTION[name], seeds.generator(4)
    kinds = ("WPL", "SARSA", "ActorCritic", "REINFORCE")[: len(which)] * max(1, len(which) // 4)
    final, of = finals(B, generator)[name], tables(generator)
    case = on_device(loss_case(kinds, B, masked=masked))
    given = arguments(kinds, dict(case.inputs))
    columns = [t.requires_grad_() for row in zip(given["s0"], given["s1"], strict=True) for t in row if t is not None]
    by: list[ByAction | None] = []
    for t, what in enumerate(which):
        actions = torch.randint(4, (2, B), generator=generator).to(DEVICE)[t % 2]
        table = of.get(what.removesuffix("+"))
        by.append(None if table is None else ByAction(actions, *table))
        given["own"][t] = given["f"] if what == "row" or what.endswith("+") else None
    del given["f"]
    options = {"gamma": 0.7, "normalize": masked}
    launches: list[str] = []
    real = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, *a, **k: (launches.append(kernel), real(kernel, *a, **k)))
    with use_backend("triton"):
        loss, f = rewarded_loss(**given, by=by, final=final, **options)
        assert len(launches) == -(-len(kinds) // kernels.CHUNK)
        own = [
            row if b is None else b.made(torch.float32) if row is None else b.made(torch.float32) + row
            for row, b in zip(given["own"], by, strict=True)
        ]
        expected = functional.trajectory_loss(**{**given, "own": own}, f=final.made(), **options)
    assert f.dtype == torch.float32 and torch.equal(f, final.made()) and not f.requires_grad
    torch.testing.assert_close(loss, expected, **SAME)
    grads = [torch.autograd.grad(made.sum(), columns, retain_graph=True) for made in (loss, expected)]
    again = [torch.autograd.grad(made.sum(), columns, create_graph=True) for made in (loss, expected)]
    for pairs in (zip(*grads, strict=True), zip(*again, strict=True)):
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, **SAME)


def test_an_action_that_there_is_not_has_no_reward() -> None:
    table, actions = torch.tensor([1.0, 2.0], device=DEVICE), torch.tensor([0, 1, 2, -1, 1 << 40], device=DEVICE)
    row = torch.zeros(5, device=DEVICE)
    given = {"kinds": ["REINFORCE"], "s0": [row - 1], **{k: [None] for k in ("s1", "aux", "own", "look", "active")}}
    with use_backend("triton"):
        made = rewarded_loss(**given, by=[ByAction(actions, table)], final=Final(row), normalize=False)[0]
    assert made.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]


def test_its_op() -> None:
    """What the registered op promises."""
    rewards = finals(20, seeds.generator(0))["classes"]
    layout = laid_out(["WPL"], *[[rewards.losses]] * 3, [None], [None], [None], rewards.losses)
    table, actions = torch.ones(3, device=DEVICE), torch.zeros(1, 20, dtype=torch.int64, device=DEVICE)
    args = (rewards.losses, 1.0, *rewards[2:], table, actions, [0, 0, 3], None, *layout, 0.7, True, True)
    opcheck(torch.ops.fastroute._trajectory_loss_rewarded_triton.default, args, grad=False)


REWARDS = {
    "table": lambda: networks.ManualReward([0.1, 0.2, -0.3, 0.4]),
    "share": lambda: networks.CollaborationReward(0.3, history_len=16),
    "faded": lambda: networks.RunningAverageCollaborationReward(0.3),
}


def routed(reward: str, final: Any, device: str = DEVICE) -> tuple[networks.Loss, Any, Tensor, Tensor]:
    seeds.manual_seed(0)
    own = REWARDS[reward]()  # one for all decisions
    if device == "meta":  # where decisions register nothing
        own.check(4)
        own.register_all(lambda: torch.zeros(9, 4, 5, device=device), torch.zeros(9, dtype=torch.int64, device=device))
    x, truth = torch.randn(37, 6, device=device), torch.randint(3, (37,), device=device)
    meta = networks.Initialization()(x)[1]
    layers = [networks.REINFORCE(4, 6, additional_reward_func=own, device=device) for _ in range(3)]
    for t, layer in enumerate(layers):
        layer(x, meta, None, torch.rand(37, device=device) < 0.7 if t == 1 else None)
    meta.add_rewards(torch.randn(37, device=device))
    return networks.Loss(torch.nn.CrossEntropyLoss(), final, 0.9), meta, x[:, :3], truth


class Counted(TorchDispatchMode):
    """Operators that would be kernels on a GPU."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        views = func.is_view or name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift"))
        self.number += func.namespace == "aten" and not views
        return func(*args, **(kwargs or {}))


def on_a_gpu(reward: str, final: networks.BaseReward) -> int:
    """How many kernels the loss takes there."""
    found: list[int] = []

    def call() -> None:
        loss, meta, y, truth = routed(reward, final, "meta")
        with Counted() as seen:
            loss(y, meta, truth, reduce=False)
        found.append(seen.number)

    before = len(aot.record_ops(lambda: routed(reward, final, "meta")))
    return len(aot.record_ops(call)) - before + found[0]


FINALS = {"loss": networks.NegLossReward(), "class": networks.CorrectClassifiedReward(0.5)}


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("final", FINALS)
def test_a_loss_with_rewards_in_its_kernel(reward: str, final: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``networks.Loss`` takes either; samples show the same, and on a GPU there are fewer kernels."""
    found, counts = [], []
    for force in (None, True):
        monkeypatch.setattr(kernels, "force_rewards", force)
        loss, meta, y, truth = routed(reward, FINALS[final])
        with use_backend("triton"):
            made = loss(y, meta, truth, reduce=False)[1]
        found.append((made, meta.final_reward))
        counts.append(on_a_gpu(reward, FINALS[final]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **SAME)
    assert counts[1] <= counts[0] - 3, counts


def test_what_is_not_known_is_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of the user's own, a function, another dtype: the same as ever."""

    class Own(networks.NegLossReward):
        def rewards(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
            return 3 * loss

    calls: list[Any] = []
    monkeypatch.setattr("fastroute.networks.loss.rewarded_loss", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(kernels, "force_rewards", True)
    changed = networks.NegLossReward()
    changed.rewards = Own().rewards  # type: ignore[method-assign]
    for final in (Own(), changed, lambda loss, y, t: loss.sum()):
        loss, meta, y, truth = routed("table", final)
        with use_backend("triton"):
            losses, _ = loss(y, meta, truth, reduce=False)
        assert torch.equal(
            meta.final_reward, losses.detach() * (1 if callable(final) and not hasattr(final, "rewards") else 3)
        )
    loss, meta, y, truth = routed("table", networks.NegLossReward())
    loss(y.double(), meta, truth)
    assert not calls
