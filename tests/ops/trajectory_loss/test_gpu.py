"""``trajectory_loss`` on a GPU: in a CUDA graph, without synchronising, at large batches, and under ``Loss``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastroute import functional, networks, use_backend
from tests.helpers import seeds
from tests.helpers.cases import Case, evaluate
from tests.helpers.graphs import captured, check_captured
from tests.helpers.trajectory_losses import arguments, loss_case, loss_op

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = ("REINFORCEBl2", "WPL", "SurpriseLearning", "ActorCritic")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


def on_gpu(case: Case) -> Case:
    moved = {k: None if t is None else t.cuda() for k, t in case.inputs.items()}
    return replace(case, inputs=moved, cotangents={k: t.cuda() for k, t in case.cotangents.items()})


def test_auto_takes_triton() -> None:
    case = on_gpu(loss_case(KINDS, 300, masked=True))
    auto, triton = (evaluate(loss_op(backend, KINDS), case) for backend in ("auto", "triton"))
    assert all(torch.equal(t, triton[name]) for name, t in auto.items())  # type: ignore[arg-type]


def test_captures_in_a_graph_without_synchronising() -> None:
    """Forward and backward replay on new values to the bits of a plain call."""
    case, other = (on_gpu(loss_case(KINDS, 300, masked=True, seed=seed)) for seed in range(2))
    check_captured(loss_op("triton", KINDS, gamma=0.7), case, other)


def test_a_large_batch_in_parts() -> None:
    """A million samples, the same bits as some of them alone."""
    case = on_gpu(loss_case(KINDS, 1_000_003, masked=True))
    last = torch.arange(999_900, 1_000_003, device="cuda")
    whole, part = (evaluate(loss_op("triton", KINDS), c) for c in (case, case.select("b", last)))
    assert all(torch.equal(t[last], part[name]) for name, t in whole.items())  # type: ignore[index,arg-type]


def test_more_than_2_31_numbers() -> None:
    """The rows of a wide trajectory of many samples are further apart than 32 bits count."""
    T, B = 30, 40_000_000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB")
    rows = [torch.full((B,), float(t), device="cuda").requires_grad_() for t in range(2)]
    kinds, none = ["AAC"] * T, [None] * T
    args = [kinds, [rows[0]] * T, [rows[1]] * T, none, none, none, none, torch.ones(B, device="cuda")]
    with use_backend("triton"):
        made: Tensor = functional.trajectory_loss(*args, 0.5)  # type: ignore[arg-type]
        made[-1000:].sum().backward()
    short = [[row[-1000:].detach().requires_grad_()] * T for row in rows]
    with use_backend("reference"):
        expected = functional.trajectory_loss(
            kinds, *short, none, none, none, none, torch.ones(1000, device="cuda"), 0.5
        )
    torch.testing.assert_close(made[-1000:], expected)
    expected.sum().backward()
    for row, part in zip(rows, short, strict=True):
        torch.testing.assert_close(row.grad[-1000:], part[0].grad)  # type: ignore[index]


@pytest.mark.parametrize("algo", ["REINFORCE", "WPL", "ActorCritic", "EGreedyAAC"])
def test_a_network(algo: str) -> None:
    """``Loss`` of a routed network: one op, the reference's numbers, nothing read back."""
    seeds.manual_seed(0)
    layers = [getattr(networks, algo)(4, 6, device="cuda") for _ in range(3)]
    x = torch.randn(50, 6, device="cuda")
    meta = networks.Initialization()(x)[1]
    for layer in layers:
        layer(x, meta)
    loss = networks.Loss(nn.MSELoss(), networks.NegLossReward(), 0.9)
    external = torch.rand(50, device="cuda")
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            loss(x, meta, None, external_losses=external)  # compiles
            torch.cuda.set_sync_debug_mode("error")
            made = loss(x, meta, None, external_losses=external, reduce=False)[1]
            torch.cuda.set_sync_debug_mode("default")
        weights = [w for layer in layers for w in layer.parameters()]
        found.append([made, *torch.autograd.grad(made.sum(), weights, retain_graph=True)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "final", [networks.NegLossReward(), networks.CorrectClassifiedReward(0.5)], ids=["loss", "class"]
)
def test_rewards_in_the_kernel(final: networks.BaseReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured loss that makes its rewards has the numbers of one whose rewards PyTorch made."""
    from fastroute.kernels import trajectory_loss as kernels

    seeds.manual_seed(0)
    own = networks.CollaborationReward(0.3)
    layers = [networks.REINFORCE(4, 6, device="cuda", additional_reward_func=own) for _ in range(3)]
    x, truth = torch.randn(500, 6, device="cuda"), torch.randint(6, (500,), device="cuda")
    meta = networks.Initialization()(x)[1]
    for layer in layers:
        layer(x, meta)
    loss = networks.Loss(nn.CrossEntropyLoss(), final, 0.9)
    expected, rewards = loss(x, meta, truth, reduce=False)[1], meta.final_reward
    monkeypatch.setattr(kernels, "force_rewards", True)
    graph, made = captured(lambda: loss(x, meta, truth, reduce=False)[1])
    graph.replay()
    torch.testing.assert_close(made, expected)
    assert torch.equal(meta.final_reward, rewards)


def test_arguments() -> None:
    """A tensor of another device is named."""
    given = arguments(("AAC",), dict(loss_case(("AAC",), 4).inputs))
    with pytest.raises(ValueError, match=r"s0\[0\]: expected a tensor on cuda:0 like f, got one on cpu"):
        functional.trajectory_loss(**{**given, "f": given["f"].cuda()})
