"""Routed networks for the tests: the decision classes, small networks, and replays of upstream's recorded trajectories.

Axes: B samples, K choices, A agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.networks import Initialization, Loss, PerTaskAssignment, Selection, Trajectory

from . import seeds

F = 6  #: features of every network here, as in the golden files

#: Every class that learns, with how many columns its state has.
COLUMNS = {
    "REINFORCE": 1, "REINFORCEBl1": 2, "REINFORCEBl2": 2, "EGreedyREINFORCE": 3, "QLearning": 1, "SARSA": 1,
    "AdvantageLearning": 2, "BootstrapAdvantageLearning": 2, "SurpriseLearning": 2, "ActorCritic": 2, "AAC": 2,
    "BootstrapAAC": 2, "EGreedyAAC": 4, "WPL": 2, "GumbelSoftmax": 1, "RELAX": 3,
}  # fmt: skip
LEARNING = tuple(COLUMNS)


def columns(algo: str, formula: str) -> int:
    """WPL as intended also keeps the policy's mean value."""
    return COLUMNS[algo] + (algo == "WPL" and formula == "intended")


FORMULAS = ("intended", "upstream")


def decision(algo: str, K: int = 4, A: int = 1, **options: Any) -> networks.Decision:
    made: networks.Decision = getattr(networks, algo)(K, F, num_agents=A, **options)
    return made


def start(x: Tensor, tasks: Any = ()) -> Trajectory:
    return Initialization()(x, tasks)[1]


def linears(K: int, inputs: int = F, outputs: int = F, **options: Any) -> Selection:
    return Selection(*[nn.Linear(inputs, outputs) for _ in range(K)], **options)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()}


def scatter_tables(module: nn.Module, seed: int = 0) -> None:
    """Tables start out equal for all choices: give them values of order one."""
    generator = seeds.generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("_approx"):
                p.copy_(torch.randn(p.shape, generator=generator))


def play(
    decisions: Sequence[nn.Module],
    selections: Sequence[nn.Module],
    x: Tensor,
    *,
    tasks: Any = (),
    agents: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    forced: Sequence[Tensor] | None = None,
    meta: Any = None,
) -> tuple[Tensor, Any, list[Tensor]]:
    """(y, meta, actions): a decision and a selection after the other."""
    meta = start(x, tasks) if meta is None else meta
    taken = []
    for t, (decide, select) in enumerate(zip(decisions, selections, strict=True)):
        mask = None if masks is None else masks[t]
        more = {} if forced is None else {"forced_actions": forced[t]}
        x, meta, a = decide(x, meta, agents, mask, **more)
        taken.append(a)
        x, meta, _ = select(x, meta, a, mask)
    return x, meta, taken


def recorded_reward(name: str, K: int) -> Any:
    """The per-action reward of a golden trajectory."""
    if name == "none":
        return None
    if name == "manual":
        return networks.ManualReward([0.1 * (i + 1) for i in range(K)], K)
    cls = {"collab": networks.CollaborationReward, "running": networks.RunningAverageCollaborationReward}[name]
    return cls(0.3, K, 16, formula="upstream")


def _feed(decide: Any, algo: str, noise: Tensor) -> None:
    """Give a decision the draws of the recorded run."""
    if algo == "RELAX":
        decide._uniform = lambda *shape, like: noise.to(like)
    else:  # recorded are the Gumbel draws g = -log(-log u)
        decide._uniform = lambda *shape, like: (-(-noise.double()).exp()).exp().to(like)


def _listen(decide: Any, heard: dict[str, Tensor], t: int) -> None:
    """Note the rewards that a decision's loss is given."""
    loss = decide.loss

    def listening(e: Any) -> Any:
        heard.update({f"rewards.{t}": e.r, f"returns.{t}": e.R, f"final_reward.{t}": e.f})
        return loss(e)

    decide.loss = listening


Players = tuple[list[networks.Decision], list[Selection]]


def players(g: dict[str, Any], dtype: torch.dtype) -> Players:
    """The decisions and selections of a golden trajectory."""
    K, A = g["num_selections"], g["agents"]
    decisions = [
        decision(
            g["algo"], k, agents, policy_storage_type=g["storage"], detach=g["detach"], formula="upstream", dtype=dtype
        )
        for k, agents in ([(A, 1)] if g["dispatch"] else []) + [(k, A) for k in K]
    ]
    return decisions, [linears(k).to(dtype) for k in K]


def replay(g: dict[str, Any], dtype: torch.dtype = torch.float32, by: Players | None = None) -> dict[str, Any]:
    """Every number of a golden trajectory, made by ours: outputs, losses, rewards, state columns and all gradients.

    Args:
        by: its players, which replay it any number of times.
    """
    A, algo = g["agents"], g["algo"]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    decisions, selections = by or players(g, dtype)
    for decide in decisions:
        decide.additional_reward_func = recorded_reward(g["reward"], decide._num_selections)
        decide.__dict__.pop("loss", None)  # what listened to it
    for kind, modules in (("decisions", decisions), ("selections", selections)):
        for module, state in zip(modules, g[kind], strict=True):
            module.load_state_dict(state, strict=True)
            module.train(g["train"]).zero_grad()
    for decide, noise in zip(decisions, g["noise"], strict=False):
        _feed(decide, algo, noise)

    heard: dict[str, Tensor] = {}
    for t, decide in enumerate(decisions):
        _listen(decide, heard, t)

    x = cast(g["x"]).clone().requires_grad_()
    ys, meta, agents = PerTaskAssignment()(x, start(x, g["tasks"]))
    forced = list(g["actions"])
    if g["dispatch"]:
        ys, meta, agents = decisions[0](ys, meta, None, forced_actions=forced.pop(0))
    mask = None if g["mask3"] is None else torch.tensor(g["mask3"], dtype=torch.bool)
    ys, meta, _ = play(
        decisions[-3:],
        selections,
        ys,
        meta=meta,
        agents=agents if A > 1 else None,
        masks=(None, None, mask),
        forced=forced,
    )
    final = networks.NegLossReward() if g["final"] == "neg" else networks.CorrectClassifiedReward()
    loss = Loss(nn.CrossEntropyLoss(), final, normalize_per_action_rewards=g["npar"], formula="upstream")
    external = g["external_losses"]
    module_loss, routing_loss = loss(
        ys, meta, g["y"], external_losses=None if external is None else cast(external), reduce=False
    )
    total = module_loss.mean() + routing_loss.mean()
    if total.requires_grad:
        total.backward()
    found = {
        "output": ys.detach(), "module_loss": module_loss.detach(),
        "routing_loss": routing_loss.detach(), "grad_x": x.grad,
    }  # fmt: skip
    for kind, modules in (("decisions", decisions), ("selections", selections)):
        for j, module in enumerate(modules):
            found |= {f"{kind}.{j}.{k}": grad for k, grad in gradients(module).items()}
    found |= heard
    for t, record in enumerate(meta.records):
        found[f"states.{t}"] = record.states().detach()
        found[f"active.{t}"] = torch.ones(len(x), dtype=torch.bool) if record.active is None else record.active
    return found
