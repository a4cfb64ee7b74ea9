"""Upstream's numbers for single parts: selections, decisions in eval, raw losses, rewards, and a dispatched network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import networks
from fastroute.networks import (
    REINFORCE,
    CollaborationReward,
    CorrectClassifiedReward,
    ManualReward,
    NegLossReward,
    RunningAverageCollaborationReward,
    Selection,
    Sequential,
)
from tests.helpers import golden, seeds
from tests.helpers.backends import each_backend
from tests.helpers.budget import Yardstick
from tests.helpers.networks import COLUMNS, decision, gradients, linears, start


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = golden.load("networks", name)
    return found


def files(pattern: str) -> Any:
    return pytest.mark.parametrize("file", golden.names("networks", pattern))


def to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: to(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def compare(theirs: dict[str, Tensor | None], run: Callable[[torch.dtype], dict[str, Any]]) -> None:
    """Upstream's numbers, of our dtypes, are within budget of ours in float64; None where it has None."""
    ours = run(torch.float32)
    assert all(t is None or t.dtype == ours[name].dtype for name, t in theirs.items())
    Yardstick(lambda: run(torch.float64), torch.float32).check(theirs)


# ---------------------------------------------------------------------------------------------------- selections


def select(g: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    g = to(g, dtype)
    mask = g.get("mask")
    state = g["state_dict"]
    K = 1 + max(int(k.split(".")[1]) for k in state)
    if "_submodules.0.weight" in state:
        module = linears(K, 6, 5)
    else:
        module = Selection(*[nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()) for _ in range(K)])
    module.to(dtype).load_state_dict(state, strict=True)
    x, given = g["x"].clone().requires_grad_(), g["actions"]
    y, _, actions = module(x, start(x), given, mask)
    assert actions is given and x.grad is None
    y.backward(g["grad_y"])
    assert x.grad is not None
    return {"y": y.detach(), "grad_x": x.grad, **gradients(module)}


@files("selection_*.pt")
@each_backend
def test_selections(file: str, backend: str) -> None:
    g = load(file)
    with fastroute.use_backend(backend):
        ours = select(g, torch.float32)
    for found in ({"y": g["y"], "grad_x": g["grad_x"], **g["grads"]}, ours):
        compare(found, partial(select, g))


# ------------------------------------------------------------------------------------------------ decisions in eval


def decide(g: dict[str, Any], formula: str, dtype: torch.dtype) -> dict[str, Any]:
    g = to(g, dtype)
    made = decision(
        g["algo"], 4, 3, policy_storage_type=g["storage"], approx_hidden_dims=g["hidden"], dtype=dtype, formula=formula
    )
    made.load_state_dict(g["state_dict"], strict=True)
    made.eval()
    ys, meta, actions = made(g["x"], start(g["x"]), g["prior_actions"])
    states = meta.records[0].states().detach()
    assert states.shape == (len(ys), 4, 5)
    columns = min(COLUMNS[g["algo"]], g["states"].shape[2])  # RELAX has z alone in eval
    return {"ys": ys, "actions": actions, "states": states[:, :, :columns]}


@files("eval_*.pt")
@pytest.mark.parametrize("formula", ["intended", "upstream"])
@each_backend
def test_decisions_in_eval(file: str, formula: str, backend: str) -> None:
    """Both formulas: no fault of upstream's touches what is decided in eval."""
    g = load(file)
    with fastroute.use_backend(backend):
        ours = decide(g, formula, torch.float32)
    assert torch.equal(ours.pop("ys"), g["ys"])
    compare(ours, partial(decide, g, formula))
    compare(
        {"actions": g["actions"], "states": g["states"][:, :, : ours["states"].shape[2]]}, partial(decide, g, formula)
    )


# ----------------------------------------------------------------------------------------------------- raw losses

RAW = ("is_terminal", "state", "next_state", "action", "next_action", "reward", "cum_return", "final_reward")


def raw_loss(g: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    g = to(g, dtype)
    state = g["state"].clone().requires_grad_()
    loss = decision(g["algo"], formula="upstream").loss_func(*(state if k == "state" else g[k] for k in RAW))
    if loss.requires_grad:
        loss.sum().backward()
    return {"loss": loss.detach(), "grad_state": state.grad}


@files("lossvec_*.pt")
def test_raw_losses(file: str) -> None:
    """Of the epsilon-greedy classes upstream gives [N, N], of which ``Loss`` adds up the rows: ours are those sums."""
    g = load(file)
    if "raises" in g:
        exact = raw_loss(g, torch.float64)
        # upstream raises here. Ours: D = r + V' - V, at the last step r - V; -log p_a sg(D) + mean D^2
        assert file == "lossvec_BootstrapAAC.pt"
        g64 = to(g, torch.float64)
        ahead = torch.where(g64["is_terminal"].bool(), 0, g64["next_state"][:, 0, 1])
        D = g64["reward"] + ahead - g64["state"][:, 0, 1]
        log_p = g64["state"][torch.arange(7), g64["action"], 0]
        torch.testing.assert_close(exact["loss"], -log_p * D + (D * D).mean(), rtol=1e-12, atol=0)
        return
    loss = g["loss"].sum(1) if g["loss"].dim() == 2 else g["loss"]
    # a sum of upstream's own float32 numbers is one more rounding of each; it is taken in float64
    theirs = {
        "loss": g["loss"].double().sum(1).float() if g["loss"].dim() == 2 else loss,
        "grad_state": g["grad_state"],
    }
    compare(theirs, partial(raw_loss, g))


# -------------------------------------------------------------------------------------------------------- rewards

PER_ACTION = golden.load("networks", "per_action_rewards.pt")


def reward(name: str) -> Any:
    if name == "manual":
        return ManualReward(PER_ACTION["manual"], 4)
    cls = CollaborationReward if name == "collab" else RunningAverageCollaborationReward
    return cls(PER_ACTION["ratio"], 4, PER_ACTION["history"], formula="upstream")


def close(found: Tensor, numbers: Tensor) -> None:
    """Rewards below one, after at most ``history`` float32 additions by upstream."""
    assert found.shape == numbers.shape
    eps = torch.finfo(torch.float32).eps
    assert float((found - numbers).abs().max()) <= math.sqrt(PER_ACTION["history"]) * eps * float(numbers.abs().max())


@pytest.mark.parametrize("name", ["collab", "running", "manual"])
def test_per_action_rewards_one_by_one(name: str) -> None:
    made, table = reward(name), []
    for action in PER_ACTION["actions"]:
        made.register(torch.zeros(1, 4, 5), action)
        gained = [made.get_reward(torch.zeros(1, 4, 5), torch.tensor(a)) for a in range(4)]
        assert all(g.shape == (1,) for g in gained)
        table.append(torch.cat(gained))
    close(torch.stack(table), PER_ACTION["reward_of_each_action_after_each_register"][name])


@pytest.mark.parametrize("name", ["collab", "running", "manual"])
@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (7, 13, 20), (25, 15), (16, 17, 7), (0, 3, 0, 37)], ids=str)
def test_per_action_rewards_in_bulk(name: str, sizes: tuple[int, ...]) -> None:
    made, done = reward(name), 0
    table = PER_ACTION["reward_of_each_action_after_each_register"][name]
    for size in sizes:
        made.register_all(lambda: torch.zeros(0), PER_ACTION["actions"][done : done + size])
        done += size
        if done:
            close(made.rewards(lambda: torch.zeros(0), torch.arange(4), torch.zeros(4)), table[done - 1])


@pytest.mark.parametrize("name", ["collab", "running"])
def test_inactive_samples_do_not_count(name: str) -> None:
    """Among as many samples again that were not decided for."""
    generator = seeds.generator(0)
    order = torch.randperm(80, generator=generator)
    active = order < 40
    actions = torch.randint(4, (80,), generator=generator).masked_scatter(active, PER_ACTION["actions"])
    made, table = reward(name), PER_ACTION["reward_of_each_action_after_each_register"][name]
    for part in (slice(0, 11), slice(11, 50), slice(50, 80)):
        made.register_all(lambda: torch.zeros(0), actions[part], active[part])
        done = int(active[: part.stop].sum())
        close(made.rewards(lambda: torch.zeros(0), torch.arange(4), torch.zeros(4)), table[done - 1])


def test_final_rewards() -> None:
    g = load("final_rewards.pt")
    for name, made in (("neg", NegLossReward()), ("correct", CorrectClassifiedReward())):
        assert torch.equal(made.rewards(g["loss"], g["yest"], g["ytrue"]), g[name])
        one_by_one = [
            made(loss[None], yest[None], ytrue[None])
            for loss, yest, ytrue in zip(g["loss"], g["yest"], g["ytrue"], strict=True)
        ]
        assert torch.equal(torch.cat(one_by_one), g[name])


# -------------------------------------------------------------------------------------- a dispatched network


def dispatched(g: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Any]:
    made = (
        Sequential(REINFORCE(4, 6), linears(4), nn.ReLU(), REINFORCE(4, 6, num_agents=4), linears(4)).to(dtype).eval()
    )
    made.load_state_dict(to(g["state_dict"], dtype), strict=True)
    y, meta = made(to(g["x"], dtype))
    return y.detach(), meta


@each_backend
def test_sequential_action_dispatch(backend: str) -> None:
    g = load("sequential_action_dispatch.pt")
    with fastroute.use_backend(backend):
        ours, meta = dispatched(g, torch.float32)
    for y in (ours, g["y"]):
        compare({"y": y}, lambda dtype: {"y": dispatched(g, dtype)[0]})
    assert meta.actions.T.tolist() == [list(map(int, a)) for a in g["actions"]]
    assert torch.equal(meta.agents[1], meta.actions[0])


def test_all_files_are_used() -> None:
    """The recurrent cells' have a test of their own."""
    patterns = ("selection_*", "eval_*", "lossvec_*", "traj_*", "lstm_*")
    listed = [f for p in patterns for f in golden.names("networks", p + ".pt")]
    listed += ["per_action_rewards.pt", "final_rewards.pt", "sequential_action_dispatch.pt"]
    assert sorted(listed) == golden.names("networks", "*.pt") and len(listed) == 131
    assert {load(f)["algo"] for f in golden.names("networks", "eval_*.pt")} == set(COLUMNS)
    assert all(hasattr(networks, name) for name in COLUMNS)
