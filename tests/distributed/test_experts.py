"""Spread layers in one process, whose group is itself; ``cases_experts.py`` has four."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import fastroute
from fastroute import networks
from fastroute.distributed import ExpertParallel, ddp, expert_parameters, prepare, whole_state_dict
from tests.distributed.ranks import started

D = 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def step(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, networks.MoE):
        y: torch.Tensor = layer(x)
    else:
        y = layer(x, networks.Trajectory(len(x)), torch.arange(len(x)) % 4 - 1)[0]
    y.square().sum().backward()
    return y.detach()


@pytest.mark.parametrize("kind", ["MoE", "Selection", "stacked"])
def test_one_process(mesh: DeviceMesh, kind: str) -> None:
    """The same results, gradients and names; the state dict goes both ways."""
    modules = [nn.Sequential(nn.Linear(D, 5), nn.ReLU(), nn.Linear(5, D)) for _ in range(3)]
    ref: nn.Module = (
        networks.MoE(D, 5, 3, 2, shared_experts=1, capacity=0.8)
        if kind == "MoE"
        else networks.Selection(*modules, stacked=kind == "stacked", dropped="identity", unused_grad="zeros")
    )
    layer = parallelize_module(copy.deepcopy(ref), mesh, ExpertParallel())
    assert isinstance(layer, type(ref))
    x = torch.randn(7, D)
    with fastroute.strict(True):
        torch.testing.assert_close(step(layer, x), step(ref, x))
    for (name, p), q in zip(ref.named_parameters(), layer.parameters(), strict=True):
        assert isinstance(q, DTensor) == (kind != "Selection" and not name.startswith(("gate", "shared"))), name
        grad = q.grad.full_tensor() if isinstance(q, DTensor) else q.grad  # type: ignore[union-attr]
        torch.testing.assert_close(grad, p.grad)
    assert sum(p.numel() for p in expert_parameters(layer)) > 0
    other = copy.deepcopy(ref)
    other.load_state_dict(whole_state_dict(layer))
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(step(twin, x), step(ref, x))


def test_a_model_of_all_families_is_prepared(mesh: DeviceMesh) -> None:
    """Agents without a sample have gradients, so that DDP ends its step; with one rank nothing else changes."""
    reward = fastroute.RunningAverageCollaborationReward(0.5, sync_rewards=True)
    model = networks.Sequential(
        networks.SARSA(3, D, num_agents=4, additional_reward_func=reward),
        networks.Selection(*(nn.Linear(D, 2) for _ in range(3))),
        fastroute.TaskRouter(2, 3, 1, name="masks"),
    )
    assert prepare(model) is model and not reward.sync_rewards
    fastroute.tasks.set_task(model, 1)
    y, meta = ddp(model)(torch.randn(2, D), torch.tensor([0, 2]))
    loss = networks.Loss(nn.MSELoss(), networks.NegLossReward())
    sum(loss(y, meta, torch.zeros(2, 2))).backward()  # type: ignore[union-attr, arg-type]
    assert all(p.grad is not None for p in model.parameters())
    prepare(model, unused_grad="none")
    assert model[2].unused_grad == "none"


@pytest.mark.long
def test_examples(tmp_path: Path) -> None:
    """On two processes, for a few steps."""
    printed = started("tests.distributed.run_examples", "experts", str(tmp_path))
    experts, network = (json.loads(line)[1] for line in printed.splitlines())
    assert "8 of 16 experts on rank 0" in experts
    assert "samples by module" in network
    assert torch.load(tmp_path / "experts.pt", weights_only=True)["moe.w_down"].shape == (16, 32, 64)


def test_without_processes() -> None:
    """Where there is no group, a model can be prepared all the same."""
    gate = prepare(networks.TopKGating(3, D, 1))
    assert gate.load_group is None
