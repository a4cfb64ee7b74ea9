"""One step of a routed network without fastroute: in plain PyTorch on the whole batch, and sample by sample.

They share their parameters and their formulas (the intended ones of ``docs/networks.md``) with the network they race
against, and can be told what was chosen and drawn, so that their results can be compared.

Axes: B samples, T layers, K modules, A agents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 256  #: how many of the last actions CollaborationReward looks at
SHARE = 0.3  #: what it gives for an action that everybody takes
EXPLORATION = 0.1
TEMPERATURE = 0.1 + 9.9 * EXPLORATION  # GumbelSoftmax's
_TINY = 1e-20
_SHIFT, _CLAMP = 1e-6, torch.finfo(torch.float32).eps  # WPL's


class Layer(NamedTuple):
    """One routed layer's parameters: its modules, and its agents' networks, or their tables' rows [1, K]."""

    modules: Sequence[nn.Module]
    linears: Sequence[nn.Linear]  #: the modules' own, and whether a ReLU follows
    relu: bool
    policies: Sequence[nn.Linear] | Sequence[Tensor]
    critics: Sequence[nn.Linear] | Sequence[Tensor] = ()


class Batch(NamedTuple):
    """What a step is given."""

    x: Tensor  #: [B, F]
    tasks: Tensor  #: [B] int64, the agents
    target: Tensor  #: [B] int64
    actions: Tensor | None = None  #: [T, B] int64: to be taken instead of drawing
    uniform: Tensor | None = None  #: [T, B, K]: GumbelSoftmax's draws


def _at(full: Tensor, actions: Tensor) -> Tensor:
    return full.gather(1, actions.unsqueeze(1)).squeeze(1)


def _draw(p: Tensor) -> Tensor:
    return torch.multinomial(p, 1).squeeze(1)


def _shifted(z: Tensor) -> Tensor:
    weight = z - z.min(1, keepdim=True).values + _SHIFT
    return weight / weight.sum(1, keepdim=True)


def _clamped(p: Tensor) -> Tensor:
    return p.clamp(_CLAMP, 1 - _CLAMP)


def _or_uniform(greedy: Tensor, choices: int) -> Tensor:
    coin = torch.rand(greedy.shape, device=greedy.device) < EXPLORATION
    return torch.where(coin, torch.randint(choices, greedy.shape, device=greedy.device), greedy)


def _gumbel(z: Tensor, uniform: Tensor | None) -> Tensor:
    u = torch.rand_like(z) if uniform is None else uniform.to(z.dtype)
    return ((z - (_TINY - (u + _TINY).log()).log()) / TEMPERATURE).softmax(1)


# ---------------------------------------------------------------------------------------------- the whole batch


Rows = Any  #: which samples go to which module, however a way of applying modules has it


def rows_by_module(whose: Tensor, count: int) -> Rows:
    return [(k, (whose == k).nonzero().squeeze(1)) for k in whose.unique().tolist()]


def module_loop(layer: Layer, x: Tensor, rows: Rows) -> Tensor:
    """index_select, the module, index_copy_, for every module that somebody chose."""
    return _loop(layer.modules, x, rows)


def _loop(modules: Sequence[nn.Module], x: Tensor, rows: Rows) -> Tensor:
    y: Tensor | None = None
    for k, of_module in rows:
        made = modules[k](x.index_select(0, of_module))
        y = made.new_zeros(x.shape[0], made.shape[1]) if y is None else y
        y.index_copy_(0, of_module, made)
    assert y is not None
    return y


def rows_by_sort(whose: Tensor, count: int) -> Rows:
    return whose.argsort(), torch.bincount(whose, minlength=count).tolist()


def sorted_loop(layer: Layer, x: Tensor, rows: Rows) -> Tensor:
    """One sort, a slice for every module's product, one ReLU for all."""
    y = _sorted(layer.linears, x, rows)
    return y.relu() if layer.relu else y


def _sorted(linears: Sequence[nn.Linear], x: Tensor, rows: Rows) -> Tensor:
    order, counts = rows
    parts = x.index_select(0, order).split(counts)
    made = torch.cat([F.linear(p, m.weight, m.bias) for m, p in zip(linears, parts, strict=True) if len(p)])
    return torch.empty_like(made).index_copy(0, order, made)


class Way(NamedTuple):
    """A way of applying modules to their samples."""

    rows: Callable[[Tensor, int], Rows]
    modules: Callable[[Layer, Tensor, Rows], Tensor]
    networks: Callable[[Any, Tensor, Rows], Tensor]


LOOP = Way(rows_by_module, module_loop, _loop)
SORTED = Way(rows_by_sort, sorted_loop, _sorted)


class Batched:
    """What a careful user writes in PyTorch: no work per sample, a call per module and agent.

    Args:
        algorithm: a class of ``fastroute.networks``.
        layers: the parameters.
        way: how modules (and agents' networks) get their samples.
        collaborates: whether actions are rewarded for being common.
    """

    def __init__(self, algorithm: str, layers: Sequence[Layer], way: Way, collaborates: bool) -> None:
        self.algorithm, self.layers, self.way, self.collaborates = algorithm, layers, way, collaborates
        self.clear()

    def clear(self) -> None:
        """Forget the last actions."""
        self.history: list[Tensor | None] = [None] * len(self.layers)

    def _ask(self, agents: Sequence[Any], x: Tensor, tasks: Tensor, rows: Rows) -> Tensor:
        if isinstance(agents[0], nn.Parameter):
            return agents[0].expand(len(x), -1) if len(agents) == 1 else torch.cat(list(agents))[tasks]
        return agents[0](x.detach()) if len(agents) == 1 else self.way.networks(agents, x.detach(), rows)

    def _own_reward(self, t: int, actions: Tensor, choices: int, like: Tensor) -> Tensor:
        before = self.history[t]
        seen = (actions if before is None else torch.cat([before, actions]))[-WINDOW:]
        self.history[t] = seen
        return torch.bincount(seen, minlength=choices).to(like.dtype)[actions] * (SHARE / len(seen))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(module loss, routing loss)."""
        x, tasks = batch.x, batch.tasks
        agents = len(self.layers[0].policies)
        per_agent = self.way.rows(tasks, agents) if agents > 1 and self.algorithm != "WPL" else None
        states: list[tuple[Tensor, ...]] = []
        own: list[Tensor] = []
        for t, layer in enumerate(self.layers):
            z = self._ask(layer.policies, x, tasks, per_agent)
            critic = self._ask(layer.critics, x, tasks, per_agent) if layer.critics else z
            forced = None if batch.actions is None else batch.actions[t]
            if self.algorithm == "WPL":
                p = _shifted(z)
                actions = _draw(p.detach()) if forced is None else forced
                expected = (p * critic).detach().sum(1)
                states.append((_clamped(_at(p, actions)), _at(critic, actions), expected))
            elif self.algorithm == "QLearning":
                actions = _or_uniform(z.argmax(1), z.shape[1]) if forced is None else forced
                states.append((_at(z, actions), z.detach()))
            elif self.algorithm == "GumbelSoftmax":
                soft = _gumbel(z, None if batch.uniform is None else batch.uniform[t])
                actions = soft.argmax(1) if forced is None else forced
                taken = _at(soft, actions)
                x = x * (1 + taken - taken.detach()).unsqueeze(1)
            else:  # REINFORCE, AAC
                log_p = z.log_softmax(1)
                actions = _draw(log_p.detach().exp()) if forced is None else forced
                states.append((_at(log_p, actions), critic))
            if self.collaborates:
                own.append(self._own_reward(t, actions, z.shape[1], x))
            x = self.way.modules(layer, x, self.way.rows(actions, len(layer.modules)))
        losses = F.cross_entropy(x, batch.target, reduction="none")
        f = -losses.detach()
        routing = torch.zeros_like(f)
        returns, ahead = f, None
        for t in reversed(range(len(states))):
            r = own[t] * f.abs() / len(states) if own else None
            if r is not None:
                returns = returns + r
            first, second, *expected = states[t]
            if self.algorithm == "REINFORCE":
                made = -first * returns
            elif self.algorithm == "AAC":
                advantage = returns - second.squeeze(1)
                made = advantage.square() - first * advantage.detach()
            elif self.algorithm == "QLearning":
                made = (first - (f if ahead is None else ahead)).square()
                ahead = second.max(1).values
            else:  # WPL
                p, d = first.detach(), returns - expected[0]
                move = d * torch.where(d < 0, p, 1 - p)
                made = (first - (p + move)).square() + (second - returns).square()
            routing = routing + made
        return losses.mean(), routing.mean()


# ---------------------------------------------------------------------------------------------- sample by sample


@dataclass
class Sample:
    """One sample's history."""

    task: int
    steps: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Commonness:
    """The reward of common actions, one action at a time."""

    zero: Tensor
    seen: deque[Tensor] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def register(self, state: Tensor, action: Tensor) -> None:
        self.seen.append(action)

    def get(self, state: Tensor, action: Tensor) -> Tensor:
        return SHARE * (torch.cat(list(self.seen)) == action).to(self.zero.dtype).mean()


@dataclass
class Nothing:
    """No reward."""

    zero: Tensor

    def register(self, state: Tensor, action: Tensor) -> None:
        pass

    def get(self, state: Tensor, action: Tensor) -> Tensor:
        return self.zero


class BySample:
    """The way of Pytorch-Routing 0.4.1: an object per sample with a dict per decision, and a loss that reads those.

    Written from a description of what it does. Agents and modules get their samples by boolean masks; rewards, returns
    and the samples' sums are loops over samples. The arguments are :class:`Batched`'s.
    """

    def __init__(self, algorithm: str, layers: Sequence[Layer], collaborates: bool) -> None:
        self.algorithm, self.layers, self.collaborates = algorithm, layers, collaborates
        self.clear()

    def clear(self) -> None:
        """Forget the last actions."""
        kind = Commonness if self.collaborates else Nothing
        self.rewards = [kind(layer.linears[0].weight.new_zeros(1)) for layer in self.layers]

    def _answer(self, agent: Any, x: Tensor) -> Tensor:
        return agent.expand(len(x), -1) if isinstance(agent, nn.Parameter) else agent(x.detach())

    def _decide(
        self, layer: Layer, agent: int, x: Tensor, forced: Tensor | None, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One agent's samples: (y, actions, exploratory, state [n, K, C])."""
        z = self._answer(layer.policies[agent], x)
        y, greedy = x, z.argmax(1)
        columns = [z]
        if self.algorithm == "QLearning":
            actions = _or_uniform(greedy, z.shape[1]) if forced is None else forced
        elif self.algorithm == "GumbelSoftmax":
            soft = _gumbel(z, uniform)
            actions = soft.argmax(1) if forced is None else forced
            taken = _at(soft, actions)
            y = x * (1 + taken - taken.detach()).unsqueeze(1)
        else:
            p = _shifted(z) if self.algorithm == "WPL" else None
            log_p = z.log_softmax(1) if p is None else _clamped(p).log()
            actions = _draw(log_p.detach().exp()) if forced is None else forced
            columns = [log_p]
            if layer.critics:
                columns.append(self._answer(layer.critics[agent], x).expand_as(z))
            if p is not None:
                columns.append((p * columns[1]).detach().sum(1, keepdim=True).expand_as(z))
        return y, actions, actions == greedy, torch.stack(columns, 2)

    def _decisions(self, t: int, x: Tensor, batch: Batch, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        layer, B, K = self.layers[t], len(x), len(self.layers[t].modules)
        agents = torch.tensor([s.task for s in samples]) if len(layer.policies) > 1 else batch.tasks.new_zeros(B)
        y, actions, explored = x.clone(), batch.tasks.new_zeros(B), torch.zeros(B, dtype=torch.bool)
        states = x.new_zeros(B, K, 5)
        for a in range(len(layer.policies)):
            if a not in agents:
                continue
            mask = agents == a
            forced = None if batch.actions is None else batch.actions[t][mask]
            uniform = None if batch.uniform is None else batch.uniform[t][mask]
            y[mask], actions[mask], explored[mask], state = self._decide(layer, a, x[mask], forced, uniform)
            states[mask] = F.pad(state, (0, 5 - state.shape[2]))
        for b, sample in enumerate(samples):
            step = {"actions": actions[b : b + 1], "is_exploratory": explored[b], "states": states[b : b + 1]}
            sample.steps.append({**step, "loss": t, "reward": self.rewards[t]})
            self.rewards[t].register(step["states"], step["actions"])
        return y, actions

    def _select(self, layer: Layer, x: Tensor, actions: Tensor) -> Tensor:
        y = x.new_zeros(len(x), layer.linears[0].out_features)
        for k in range(int(actions.max()) + 1):
            if k in actions:
                mask = actions == k
                y[mask] = layer.modules[k](x[mask])
        return y

    def _loss(
        self, last: Tensor, state: Tensor, next_state: Tensor, action: Tensor, reward: Tensor, returns: Tensor
    ) -> Tensor:
        """[N] from the entries of one decision layer."""
        first = state[:, :, 0].gather(1, action.unsqueeze(1)).squeeze(1)
        if self.algorithm == "REINFORCE":
            return -first * returns
        if self.algorithm == "QLearning":
            ahead = next_state[:, :, 0].max(1).values + reward
            return (first - torch.where(last, reward, ahead).detach()).square()
        if self.algorithm == "GumbelSoftmax":
            return torch.zeros_like(returns)
        second = state[:, :, 1].gather(1, action.unsqueeze(1)).squeeze(1)
        if self.algorithm == "AAC":
            return -first * (returns - second).detach() + (returns - second).square()
        p, d = first.exp(), returns - state[:, 0, 2]  # WPL
        move = d * torch.where(d < 0, p, 1 - p)
        return (p - (p + move).detach()).square() + (second - returns).square()

    def _routing(self, losses: Tensor, samples: list[Sample]) -> Tensor:
        entries: dict[int, list[tuple[Tensor, ...]]] = {}
        whose: dict[int, list[int]] = {}
        lasts: dict[int, list[bool]] = {}
        for b, sample in enumerate(samples):
            final = -losses[b : b + 1].detach()
            size, depth = final.abs(), len(sample.steps)
            rewards = [step["reward"].get(step["states"], step["actions"]) / depth * size for step in sample.steps]
            rewards[-1] = rewards[-1] + final
            returns = rewards[-1:]
            for reward in reversed(rewards[:-1]):
                returns.insert(0, returns[0] + reward)
            for t, step in enumerate(sample.steps):
                ahead = sample.steps[min(t + 1, depth - 1)]
                entry = step["states"], ahead["states"], step["actions"], rewards[t], returns[t]
                entries.setdefault(step["loss"], []).append(entry)
                whose.setdefault(step["loss"], []).append(b)
                lasts.setdefault(step["loss"], []).append(t == depth - 1)
        total = torch.zeros_like(losses)
        for layer, of_layer in entries.items():
            columns = (torch.cat(column) for column in zip(*of_layer, strict=True))
            made = self._loss(torch.tensor(lasts[layer]), *columns)
            index = torch.tensor(whose[layer])
            for b in range(len(samples)):
                total[b] += made[index == b].sum()
        return total

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(module loss, routing loss)."""
        x = batch.x
        samples = [Sample(task) for task in batch.tasks.tolist()]
        for t, layer in enumerate(self.layers):
            x, actions = self._decisions(t, x, batch, samples)
            x = self._select(layer, x, actions)
        losses = F.cross_entropy(x, batch.target, reduction="none")
        return losses.mean(), self._routing(losses, samples).mean()
