"""The upstreams' layers written out from their papers and specifications, sample by sample where theirs are.

``upstreams()`` puts them under the upstreams' import paths: a program then runs as it ran there. fastroute is not
used. Axes: i inputs, j outputs, d and h their features, c rows of a capsule's matrix; B samples, K choices.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import networkx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------------------- capsules


def normal(*size: int, std: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size).normal_(std=std))


def zeros(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*size))


def shares(scores: Tensor | None, mask: Tensor | None, first: Tensor) -> Tensor:
    """R: softmax over outputs; the first iteration's is uniform over those that are open."""
    if scores is None:
        scores = first.log() if mask is not None else None
    if scores is None:
        return first
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf) if scores.dim() > 1 else torch.where(mask, -math.inf, scores)
    return scores.softmax(-1)


class Vectors(nn.Module):
    """The E-, D- and M-steps that both vector routings have."""

    def routed(self, x: Tensor, a: Tensor, use: Tensor, ign: Tensor, mask: Tensor | None) -> Any:
        f = torch.sigmoid(a).unsqueeze(-1)
        if mask is not None:
            f = f * ~mask
        S = pred = None
        for t in range(self.n_iters):
            if t > 0:
                pred, S = self.predicted(x, x_out)  # noqa: F821
            R = shares(S, mask, self.CONST_ones_over_n_out)
            D_use = f * R
            D_ign = f - D_use
            phi = use * D_use - ign * D_ign
            x_out = self.votes(x, phi)
        return {"a_inp": a, "pred_x_inp": pred, "S": S, "R": R, "D_use": D_use, "D_ign": D_ign, "phi": phi,
                "x_out": x_out}  # fmt: skip


class EfficientVectorRouting(Vectors):
    def __init__(
        self, n_inp: int, n_out: int, d_inp: int, d_out: int, n_iters: int = 2, normalize: bool = True,
        memory_efficient: bool = True, return_dict: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_iters, self.normalize, self.return_dict = n_iters, normalize, return_dict
        one, d, h, m = max(n_inp, 1), d_inp, d_out, n_out
        self.register_buffer("CONST_ones_over_n_out", torch.ones(m) / m)
        self.W_A, self.B_A = normal(one, d, std=2 * d**-0.5), zeros(one)
        self.W_F1, self.W_F2, self.B_F2 = normal(m, d), normal(d, h, std=2 * d**-0.5), zeros(m, h)
        self.W_G1, self.W_G2, self.B_G2 = normal(h, d, std=h**-0.5), normal(m, d), zeros(m, d)
        self.W_S, self.B_S = normal(one, m, std=d**-0.5), zeros(one, m)
        if n_inp > 0:
            self.beta_use, self.beta_ign = normal(n_inp, m), normal(n_inp, m)
        else:
            self.compute_beta_use, self.compute_beta_ign = nn.Linear(d, m), nn.Linear(d, m)
        self.norm = (lambda y: F.layer_norm(y, (h,))) if h > 1 else (lambda y: y)

    def predicted(self, x: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
        pred = (self.norm(x_out) @ self.W_G1) * self.W_G2 + self.B_G2
        return pred, F.logsigmoid(torch.einsum("...id,...jd->...ij", x, pred) * self.W_S + self.B_S)

    def votes(self, x: Tensor, phi: Tensor) -> Tensor:
        scaled = x * x.shape[-2] ** -0.5
        V = torch.einsum("...id,jd,dh->...ijh", scaled, self.W_F1, self.W_F2) + self.B_F2
        return torch.einsum("...ij,...ijh->...jh", phi, V)

    def forward(self, x_inp: Tensor, mask: Tensor | None = None) -> Any:
        fixed = hasattr(self, "beta_use")
        use, ign = (
            (self.beta_use, self.beta_ign) if fixed else (self.compute_beta_use(x_inp), self.compute_beta_ign(x_inp))
        )
        a = (x_inp * x_inp.shape[-2] ** -0.5 * self.W_A).sum(-1) + self.B_A
        made = self.routed(x_inp, a, use, ign, mask)
        made["x_out"] = self.norm(made["x_out"]) if self.normalize else made["x_out"]
        return made if self.return_dict else made["x_out"]


class DefinableVectorRouting(Vectors):
    def __init__(
        self, A: Any, F: Any, G: Any, S: Any, n_inp: int, n_out: int, n_iters: int = 2, return_dict: bool = False
    ) -> None:
        super().__init__()
        self.n_iters, self.return_dict, self.n_out = n_iters, return_dict, n_out
        self.register_buffer("CONST_ones_over_n_out", torch.ones(n_out) / n_out)
        self.A, self.F, self.G, self.S = A, F, G, S
        self.beta_use, self.beta_ign = normal(n_inp, n_out), normal(n_inp, n_out)

    def predicted(self, x: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
        pred = self.G(x_out)
        return pred, self.S(x, pred)

    def votes(self, x: Tensor, phi: Tensor) -> Tensor:
        return torch.einsum("...ij,...ijh->...jh", phi, self.F(x).reshape(*x.shape[:-1], self.n_out, -1))

    def forward(self, x_inp: Tensor, mask: Tensor | None = None) -> Any:
        made = self.routed(x_inp, self.A(x_inp).reshape(x_inp.shape[:-1]), self.beta_use, self.beta_ign, mask)
        return made if self.return_dict else made["x_out"]


class Routing(nn.Module):
    """2019's."""

    def __init__(
        self, d_cov: int, d_inp: int, d_out: int, n_inp: int = -1, n_out: int = -1, n_iters: int = 3,
        single_beta: bool = False, p_model: str = "gaussian", eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_iters, self.p_model, self.eps, self.fixed = n_iters, p_model, eps, n_out > 0
        n, m = max(n_inp, 1), max(n_out, 1)
        self.register_buffer("CONST_one", torch.tensor(1.0))
        self.W = nn.Parameter(torch.empty(n, m, d_inp, d_out).normal_() / d_inp)
        self.B = zeros(n, m, d_cov, d_out)
        if not self.fixed:
            self.B_brk = zeros(1, d_cov, d_out)
        self.beta_use = zeros(n, m)
        self.beta_ign = self.beta_use if single_beta else zeros(n, m)

    def forward(self, a_inp: Tensor, mu_inp: Tensor, return_R: bool = False, n_out: int | None = None) -> Any:
        n, m = a_inp.shape[-1], self.W.shape[1] if self.fixed else n_out or a_inp.shape[-1]
        B = self.B if self.fixed else self.B + self.B_brk * torch.linspace(-1, 1, m)[:, None, None]
        V = torch.einsum("ijdh,...icd->...ijch", self.W.expand(n, m, -1, -1), mu_inp) + B
        f = torch.sigmoid(a_inp).unsqueeze(-1)
        for t in range(self.n_iters):
            R = torch.full(V.shape[:-2], 1 / m)
            if t > 0:
                if self.p_model == "gaussian":
                    var = sig2.unsqueeze(-4)  # noqa: F821
                    log_p = (-square / (2 * var) - var.sqrt().log()).sum((-2, -1))  # noqa: F821
                else:
                    log_p = (-square.sum((-2, -1))).log_softmax(-1)  # noqa: F821
                R = (F.logsigmoid(a_out).unsqueeze(-2) + log_p).softmax(-1)  # noqa: F821
            D_use = f * R
            a_out = (self.beta_use * D_use - self.beta_ign * (f - D_use)).sum(-2)
            q = D_use / (D_use.sum(-2, keepdim=True) + self.eps)
            mu = torch.einsum("...ij,...ijch->...jch", q, V)
            square = (V - mu.unsqueeze(-4)) ** 2
            sig2 = torch.einsum("...ij,...ijch->...jch", q, square) + self.eps
        return (a_out, mu, sig2, R) if return_R else (a_out, mu, sig2)


class GenerativeMatrixRouting(Routing):
    """2022's: the same with its sizes in another order."""

    def __init__(
        self, n_inp: int, n_out: int, d_cov: int, d_inp: int, d_out: int, n_iters: int = 3, single_beta: bool = False,
        p_model: str = "gaussian", eps: float = 1e-5, return_dict: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(d_cov, d_inp, d_out, n_inp, n_out, n_iters, single_beta, p_model, eps)


# ---------------------------------------------------------------------------------------------------------------- tasks


class TaskRouter(nn.Module):
    def __init__(self, unit_count: int, task_count: int, sigma: int, name: str = "TaskRouter") -> None:
        super().__init__()
        self.name, self.unit_count, self.active_task = name, unit_count, 0
        mapping = np.ones((task_count, unit_count), np.float32)
        if sigma != 0:
            for row, order in zip(mapping, np.random.rand(task_count, unit_count).argsort(1), strict=True):
                row[order[:sigma]] = 0
        self._unit_mapping = nn.Parameter(torch.from_numpy(mapping))

    def get_unit_mapping(self) -> Tensor:
        return self._unit_mapping

    def set_active_task(self, active_task: int) -> int:
        self.active_task = active_task
        return active_task

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            input.data.mul_(self._unit_mapping[self.active_task][:, None, None].to(input.dtype))
        return input


def make_layers(cfg: Any, task_count: int, sigma: float, batch_norm: bool = False) -> nn.Sequential:
    made: list[nn.Module] = []
    channels = 3
    for position, v in enumerate(cfg):
        if v == "M":
            made.append(nn.MaxPool2d(2, 2))
            continue
        made.append(nn.Conv2d(channels, v, 3, padding=1))
        made += [nn.BatchNorm2d(v)] if batch_norm else []
        made += [TaskRouter(v, task_count, int(v * sigma), f"taskrouter_{position}"), nn.ReLU(inplace=True)]
        channels = v
    return nn.Sequential(*made)


# ------------------------------------------------------------------------------------------------------------ multitask


class MTLModel(nn.Module):
    def __init__(self, task_layers: Any, output_tasks: Any) -> None:
        super().__init__()
        self.task_layers, self.output_tasks = task_layers, output_tasks
        self.layer_names = [t["name"] for t in task_layers]
        self.g = networkx.DiGraph()
        self.g.add_node("root")
        self.losses = {t["name"]: t["loss"] for t in task_layers if "loss" in t}
        self.loss_weights: dict[str, Any] = {}
        for t in task_layers:
            setattr(self, t["name"], t["layers"])
            anchors = t.get("anchor_layer", "root")
            for anchor in anchors if isinstance(anchors, list) else [anchors]:
                self.g.add_edge(anchor, t["name"])
        for t in task_layers:
            if "loss_weight" in t:
                self.loss_weights[t["name"]] = t["loss_weight"]
                if t["loss_weight"] == "auto":
                    setattr(self, f"{t['name']}_loss", nn.Parameter(torch.full((1,), t["loss_init_val"])))
                    self.loss_weights[t["name"]] = getattr(self, f"{t['name']}_loss")

    def forward(self, input: Any) -> Any:
        self.outputs, queue = {"root": input}, list(self.g.successors("root"))
        while queue:
            node = queue.pop(0)
            if node in self.outputs:
                continue
            inputs = list(self.g.predecessors(node))
            if any(i not in self.outputs for i in inputs):
                queue.append(node)
                continue
            self.outputs[node] = getattr(self, node)(*[self.outputs[i] for i in inputs])
            queue += self.g.successors(node)
        names = self.output_tasks
        found = [self.outputs[n] for n in names], [self.losses.get(n) for n in names]
        return (*found, [self.loss_weights.get(n) for n in names])


class Concat:
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)


class SimpleSelect:
    def __init__(self, selection_axis: Any) -> None:
        self.sel = selection_axis

    def __call__(self, X: Any) -> Any:
        return X[self.sel]


class SliceSelect:
    def __init__(self, sel_slice: Any) -> None:
        self.slice = sel_slice

    def __call__(self, X: Any) -> Any:
        return X[self.slice]


# ----------------------------------------------------------------------------------------------------- routing networks


class SampleMetaInformation:
    def __init__(self, task: Any = None) -> None:
        self.task, self.steps = task, []


class Initialization(nn.Module):
    def forward(self, xs: Tensor, tasks: Any = ()) -> Any:
        labels = tasks if len(tasks) else [None] * len(xs)
        return xs, [SampleMetaInformation(task) for task in labels], None


class MLP(nn.Module):
    def __init__(
        self, input_dim: int, output_dim: int, layers: Any = (), nonlin: Any = F.relu, hidden: Any = None
    ) -> None:
        super().__init__()
        widths = [input_dim, *(hidden or layers), output_dim]
        self._layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self._nonlin = nonlin

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers[:-1]:
            x = self._nonlin(layer(x))
        return self._layers[-1](x)


class Storage(nn.Module):
    def __init__(self, net: Any, inputs: int, outputs: int, tabular: bool, hidden: Any, detach: bool) -> None:
        super().__init__()
        self.tabular, self.detach = tabular and net is None, detach
        if self.tabular:
            self._approx = nn.Parameter(torch.ones(1, outputs) / outputs)
        else:
            self._approx = MLP(inputs, outputs, hidden) if net is None else copy.deepcopy(net)

    def forward(self, xs: Tensor) -> Tensor:
        if self.tabular:
            return self._approx.expand(len(xs), -1)
        return self._approx(xs.detach() if self.detach else xs)


class PerActionBaseReward:
    def __init__(self, history_window: int = 256) -> None:
        self._hist_len = history_window
        self.clear()

    def clear(self) -> None:
        self._dists, self._actions = deque(maxlen=self._hist_len), deque(maxlen=self._hist_len)
        self._precomp = None

    def register(self, dist: Tensor, action: Tensor) -> None:
        self._dists.append(dist.detach())
        self._actions.append(action.detach())

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        return torch.zeros(1)


class CollaborationReward(PerActionBaseReward):
    def __init__(self, reward_ratio: float = 0.1, num_actions: int | None = None, history_len: int = 256) -> None:
        super().__init__(history_len)
        self._reward_ratio, self._num_actions = reward_ratio, num_actions

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        share = sum(int(a) == int(action) for a in self._actions) / len(self._actions)
        return torch.tensor([share * self._reward_ratio**2])


class Decision(nn.Module):
    def __init__(
        self, num_selections: int, in_features: Any, num_agents: int = 1, exploration: float = 0.1,
        policy_storage_type: Any = "approx", detach: bool = True, approx_hidden_dims: Any = (), policy_net: Any = None,
        additional_reward_func: Any = None, set_pg_temp: bool = False, approx_module: Any = None,
        additional_reward_class: Any = None, additional_reward_args: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._num_selections, self._in_features, self._num_agents = num_selections, in_features, num_agents
        self._exploration, self._detach, self._pg_temperature = exploration, detach, 1.0
        self._pol_type, self._pol_hidden_dims = policy_storage_type, approx_hidden_dims
        net = policy_net if policy_net is not None else approx_module
        self._policy = self._construct_policy_storage(num_selections, policy_storage_type, net, approx_hidden_dims)
        if additional_reward_class is not None:
            additional_reward_func = additional_reward_class(**(additional_reward_args or {}))
        self.additional_reward_func = additional_reward_func or PerActionBaseReward()

    def _construct_policy_storage(
        self, out: int, kind: Any, net: Any, hidden: Any, in_dim: Any = None
    ) -> nn.ModuleList:
        inputs, tabular = in_dim or self._in_features, kind in ("tabular", 1)
        return nn.ModuleList(Storage(net, inputs, out, tabular, hidden, self._detach) for _ in range(self._num_agents))

    @staticmethod
    def _eval_stochastic_are_exp(actions: Tensor, dist: Tensor) -> Tensor:
        dist = dist[:, :, 0] if dist.dim() == 3 else dist
        return (dist.argmax(1) == actions.view(-1)).byte()

    def forward(self, xs: Tensor, mxs: Any, prior_actions: Any = None, mask: Any = None) -> Any:
        B = len(xs)
        agents = torch.zeros(B).long() if prior_actions is None or len(prior_actions) == 0 else prior_actions
        agents = torch.as_tensor(agents).reshape(-1) * (self._num_agents > 1)
        active = torch.ones(B, dtype=torch.bool) if mask is None else mask.bool()
        ys, actions, states = xs.clone(), torch.zeros(B).long(), torch.zeros(B, self._num_selections, 5)
        for agent in range(self._num_agents):
            m = (agents == agent) & active
            if m.any():
                y, a, _, state = self._forward(xs[m], torch.tensor(agent))
                ys[m], actions[m] = y, a.view(-1)
                state = state.reshape(len(state), self._num_selections, -1)
                states = states.clone()
                states[m, :, : state.shape[2]] = state
        for b in range(B):
            if active[b]:
                step = {"actions": actions[b], "states": states[b : b + 1], "loss_funcs": self._loss}
                mxs[b].steps.append(step | {"reward_func": self.additional_reward_func})
                self.additional_reward_func.register(states[b : b + 1], actions[b])
        return ys, mxs, actions


def at(state: Tensor, column: int, action: Tensor) -> Tensor:
    return state[:, :, column].gather(1, action.unsqueeze(1)).view(-1)


class REINFORCE(Decision):
    def _forward(self, xs: Tensor, agent: Any) -> Any:
        log_p = (self._policy[agent](xs) / self._pg_temperature).log_softmax(1)
        actions = log_p.argmax(1)
        return xs, actions, self._eval_stochastic_are_exp(actions, log_p), log_p

    def _loss(self, end: Any, state: Any, ahead: Any, action: Any, then: Any, r: Any, R: Any, f: Any) -> Any:
        return -at(state, 0, action) * R.detach()


class WPL(REINFORCE):
    def __init__(self, *args: Any, qvalue_net: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._qvalue_mem = self._construct_policy_storage(
            self._num_selections, self._pol_type, qvalue_net, self._pol_hidden_dims
        )

    def _forward(self, xs: Tensor, agent: Any) -> Any:
        z = self._policy[agent](xs)
        p = z - z.min(1, keepdim=True).values + 1e-6
        log_p = torch.distributions.Categorical(probs=p).logits
        actions = log_p.argmax(1)
        return (
            xs,
            actions,
            self._eval_stochastic_are_exp(actions, log_p),
            torch.stack([log_p, self._qvalue_mem[agent](xs)], 2),
        )

    def _loss(self, end: Any, state: Any, ahead: Any, action: Any, then: Any, r: Any, R: Any, f: Any) -> Any:
        log_p, q = at(state, 0, action), at(state, 1, action)
        d = (R - q).detach()
        factor = torch.where(d < 0, 1 + d, 2 - d)
        return (log_p - (log_p * factor).detach()) ** 2 + (q - R.detach()) ** 2


class QLearning(Decision):
    def _forward(self, xs: Tensor, agent: Any) -> Any:
        q = self._policy[agent](xs)
        return xs, q.argmax(1), torch.zeros(len(xs)).byte(), q

    def _loss(self, end: Any, state: Any, ahead: Any, action: Any, then: Any, r: Any, R: Any, f: Any) -> Any:
        target = torch.where(end.bool(), f, ahead[:, :, 0].max(1).values - r).detach()
        return (at(state, 0, action) - target) ** 2


class AAC(Decision):
    def __init__(self, *args: Any, value_net: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._value_mem = self._construct_policy_storage(1, self._pol_type, value_net, self._pol_hidden_dims)

    def _forward(self, xs: Tensor, agent: Any) -> Any:
        log_p = self._policy[agent](xs).log_softmax(1)
        actions = log_p.argmax(1)
        state = torch.stack([log_p, self._value_mem[agent](xs).expand_as(log_p)], 2)
        return xs, actions, self._eval_stochastic_are_exp(actions, state), state

    def _loss(self, end: Any, state: Any, ahead: Any, action: Any, then: Any, r: Any, R: Any, f: Any) -> Any:
        advantage = R - state[:, 0, 1]
        return -at(state, 0, action) * advantage.detach() + (advantage**2).mean()


class PerTaskAssignment(nn.Module):
    def forward(self, xs: Tensor, mxs: Any, _: Any = None, __: Any = None) -> Any:
        return xs, mxs, torch.tensor([m.task for m in mxs])


class Selection(nn.Module):
    def __init__(self, *modules: nn.Module, name: str = "", store_module_pointers: bool = False) -> None:
        super().__init__()
        self._submodules = nn.ModuleList(modules)
        self._log: set[int] = set()

    def start_logging_selections(self) -> None:
        self._log = set()

    def stop_logging_and_get_selections(self, add_to_old: bool = False) -> list[int]:
        return sorted(self._log)

    def forward(self, xs: Tensor, mxs: Any, actions: Any, mask: Any = None) -> Any:
        if len(self._submodules) == 1:
            return self._submodules[0](xs), mxs, actions
        outs = [self._submodules[int(a)](xs[b : b + 1]) for b, a in enumerate(actions)]
        self._log |= set(map(int, actions))
        ys = torch.cat(outs)
        return ys if mask is None else ys * mask.bool().unsqueeze(1), mxs, actions


class Sequential(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for i, m in enumerate([Initialization(), *modules]):
            self.add_module(str(i), m)

    def forward(self, x: Tensor, tasks: Any = ()) -> Any:
        first, *rest = self.children()
        ys, mxs, actions = first(x, tasks)
        for m in rest:
            if isinstance(m, (Decision, Selection, PerTaskAssignment)):
                ys, mxs, actions = m(ys, mxs, actions)
            else:
                ys = m(ys)
        return ys, mxs


class NegLossReward(nn.Module):
    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        return -loss.detach()


class CorrectClassifiedReward(nn.Module):
    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        truth = ytrue.argmax(-1) if ytrue.dim() > 1 else ytrue
        return torch.where(yest.argmax(-1) == truth, 1.0, -1.0)


class Loss(nn.Module):
    def __init__(
        self, pytorch_loss_func: Any, routing_reward_func: Any, discounting: float = 1.0, clear: bool = False,
        normalize_per_action_rewards: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.reward = pytorch_loss_func, routing_reward_func
        self.clear, self.normalize = clear, normalize_per_action_rewards
        if isinstance(pytorch_loss_func, nn.Module):
            pytorch_loss_func.reduction = "none"

    def forward(
        self, ysest: Tensor, mys: Any, ystrue: Any = None, external_losses: Any = None, reduce: bool = True
    ) -> Any:
        if isinstance(mys, Tensor):
            mys, ystrue = ystrue, mys
        B = len(mys)
        losses = self.loss(ysest, ystrue) if external_losses is None else external_losses
        losses = losses.reshape(B, -1).sum(1)
        truth = torch.zeros(B) if ystrue is None else ystrue
        raw: Any = defaultdict(lambda: [[] for _ in range(9)])
        for b, my in enumerate(mys):
            f = self.reward(losses[b : b + 1], ysest[b : b + 1], truth[b : b + 1]).reshape(1)
            rewards = []
            for step in my.steps:
                r = step["reward_func"].get_reward(step["states"], step["actions"]).reshape(1)
                r = (r + torch.as_tensor(step.get("add_rewards", 0.0)).reshape(1)) / len(my.steps)
                rewards.append(r * f.abs() if self.normalize else r)
            if rewards:
                rewards[-1] = rewards[-1] + f
            for t, step in enumerate(my.steps):
                after = my.steps[t + 1] if t + 1 < len(my.steps) else None
                end = after is None or after["states"].numel() != step["states"].numel()
                entry = (torch.tensor([end]), step["states"], step["states"] if end else after["states"],  # type: ignore[index]
                         step["actions"].view(1), torch.zeros(1).long() if end else after["actions"].view(1),  # type: ignore[index]
                         rewards[t], torch.stack(rewards[t:]).sum(0), f, torch.tensor([b]))  # fmt: skip
                for part, value in zip(raw[step["loss_funcs"]], entry, strict=True):
                    part.append(value)
        routing = torch.zeros(B)
        for function, parts in raw.items():
            *arguments, rows = (torch.cat(part) for part in parts)
            routing = routing.index_add(0, rows, function(*arguments))
        if self.clear:
            for my in mys:
                for step in my.steps:
                    step["reward_func"].clear()
        return (losses.mean(), routing.mean()) if reduce else (losses, routing)


# ---------------------------------------------------------------------------------------------------------- their names

_ALL = (
    EfficientVectorRouting, DefinableVectorRouting, GenerativeMatrixRouting, Routing, TaskRouter, make_layers, MTLModel,
    Concat, SimpleSelect, SliceSelect, Initialization, Selection, Loss, Decision, REINFORCE, WPL, QLearning, AAC,
    PerTaskAssignment, NegLossReward, CorrectClassifiedReward, PerActionBaseReward, CollaborationReward, Sequential,
    MLP,
)  # fmt: skip
#: Every path that a program may import one of them from.
PATHS = [
    "heinsen_routing",
    "heinsen_routing.heinsen_routing",
    "taskrouting",
    "routed_vgg",
    "torchmtl",
    "torchmtl.wrapping_layers",
    "PytorchRouting",
    "PytorchRouting.CoreLayers",
    "PytorchRouting.DecisionLayers",
    "PytorchRouting.DecisionLayers.Decision",
    "PytorchRouting.DecisionLayers.Others",
    "PytorchRouting.UtilLayers",
    "PytorchRouting.Helpers",
    "PytorchRouting.Helpers.MLP",
    "PytorchRouting.RewardFunctions",
    "PytorchRouting.RewardFunctions.Final",
    "PytorchRouting.RewardFunctions.PerAction",
    "PytorchRouting.RewardFunctions.PerAction.PerActionBaseReward",
]


@contextmanager
def upstreams() -> Iterator[None]:
    """Their import paths, for as long as this lasts."""
    before = dict(sys.modules)
    for path in PATHS:
        module = ModuleType(path)
        module.__dict__.update({thing.__name__: thing for thing in _ALL}, torch=torch, nn=nn, math=math)
        module.__path__ = []
        sys.modules[path] = module
    for path in PATHS:
        parent, _, name = path.rpartition(".")
        if parent and name not in ("Decision", "MLP", "PerActionBaseReward"):
            setattr(sys.modules[parent], name, sys.modules[path])
    try:
        yield
    finally:
        for path in PATHS:
            sys.modules.pop(path, None)
            if path in before:
                sys.modules[path] = before[path]
