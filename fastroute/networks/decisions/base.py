"""What all decisions share: who decides for which sample, sampling, and the record they leave.

Axes: B samples, K choices (``num_selections``), A agents.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import agent_policy, policy
from ...ops import dispatch
from ...ops.agent_policy.op import AgentChoice
from ...ops.arguments import Count, Options, Several, Share, checked
from ...ops.checks import as_parameters, as_tensor, moved, samples, shape, share, shown, tensor
from ...ops.checks import given as shown_value
from ...ops.dispatch.contract import Plan
from ...ops.dtypes import accumulating
from ...ops.host import may_look
from ...ops.masked import only
from ...ops.policy.op import shifted
from ...ops.recomputation import draws_of, is_recomputation
from ...ops.trajectory_loss.op import Entry, loss_of
from ..decision_record import Column, Record
from ..loss_entries import Entries, Need, from_raw
from ..rewards import Formula, PerActionBaseReward, check_formula, check_reward, is_silent, register, restore, saved
from ..sample_view import SampleMetaInformation
from ..trajectory import Trajectory
from .storage import (
    AnyStorages,
    ApproxPolicyStorage,
    StackedStorages,
    Storages,
    TabularPolicyStorage,
    as_storages,
    ask,
    heads,
)

Triplet = tuple[Tensor, Trajectory, Tensor]

#: A subclass that defines one of these has another loss than its parent.
_MAKES_A_LOSS = ("loss", "loss_of", "entry", "target", "needs", "lookahead", "loss_func")


#: What a subclass would override in vain, and what instead: upstream's methods, and a way to call ``loss``.
_NOT_CALLED = {"_forward": "decide", "_decide": "decide", "_loss": "loss_of", "loss_func": "loss_of"}

#: What keeps what a decision knows, and the arguments that networks for it are given as.
_STORAGES = {"_policy": "policy_net", "_value_mem": "value_net", "_qvalue_mem": "qvalue_net"}


@dataclass
class Decided:
    """What a class decided: actions [B], its state columns, what explored, and the batch if it changes it."""

    actions: Tensor
    columns: Sequence[Column]
    exploratory: Tensor | Callable[[], Tensor] | None = None
    y: Tensor | None = None


class Decision(Options, nn.Module):
    """Chooses one of K modules per sample, and learns to.

    A class of one's own defines :meth:`decide` and :meth:`loss_of`, and says in ``needs`` what the loss reads of the
    next decision and in ``critic`` which of its columns is a critic's.

    Args:
        num_selections: K.
        in_features: of the input, for ``policy_storage_type="approx"`` without ``policy_net``; an int, or a tuple whose
            product is taken.
        num_agents: A. With more than one, ``forward`` needs ``agents``: each sample's agent decides for it.
        exploration: how often value-based and epsilon-greedy classes explore, 0 to 1.
        policy_storage_type: "approx" (0): a network on the input; "tabular" (1): a row per agent, whatever the input.
        detach: keep the policies' gradients out of the input.
        approx_hidden_dims: widths of hidden layers in the "approx" networks.
        policy_net: a network [B, ...] -> [B, K] instead of those, copied per agent. Also ``approx_module``.
        additional_reward_func: a per-action reward object; None: no such reward. Also ``additional_reward_class`` with
            ``additional_reward_args`` (a dict or a tuple).
        set_pg_temp: let ``set_exploration`` set the temperature of policy-gradient classes.
        formula: "intended", or "upstream" for the formulas of Pytorch-Routing 0.4.1 as they stand, where they are
            faulty: see each class.
        stacked: keep the parameters of all agents in one tensor of each kind, see :class:`~fastroute.networks.Stack`:
            fewer parameters, and zeros for gradients of agents without a sample; state dicts load both ways.
        generator: of the random numbers; None: PyTorch's own.

    Parameters: ``_policy.{agent}._approx...``, as upstream. All classes take these arguments.

    Examples:
        >>> from fastroute.networks.decision_record import Column
        >>> from fastroute.networks.decisions.base import Decided
        >>> class Greedy(fastroute.Decision):
        ...     def decide(self, x, plan, forced):
        ...         z = self._ask(self._policy, x, plan)
        ...         return Decided(z.argmax(1) if forced is None else forced, [Column(z.log_softmax(1))])
        ...     def loss_of(self, e):
        ...         return -e.s0 * e.R
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = Greedy(3, 8)(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    #: what a loss reads of the next state: of this class as intended, and as upstream has it
    needs: tuple[Need, ...] = ()
    upstream_needs: tuple[Need, ...] = ()

    #: the name by which ``ops.trajectory_loss`` knows the intended loss of this very class; None: it does not
    algorithm: str | None = None
    critic: int | None = None  #: the state column, besides the first, that the loss moves
    _options = ("formula", "generator", "additional_reward_func")
    _fixed = ("_storage_type", "_hidden_dims", "_stacked", "_factory")
    _formula_of = ""  # the ``algorithm`` of the class that this one's loss is inherited from
    _fastroute_of: Any = None  # whose stand-in it is, see fastroute.compat

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, instead in _NOT_CALLED.items():
            if name in cls.__dict__ and not hasattr(cls, "_fastroute_hooks"):
                raise TypeError(
                    f"{cls.__name__}.{name}: expected no override of a method that nobody calls here; override "
                    f"{instead}, or make the class from fastroute.compat.PytorchRouting's"
                )
        if "algorithm" in cls.__dict__:
            cls._formula_of = cls.algorithm or ""
        known = next(c for c in cls.__mro__ if "algorithm" in c.__dict__)
        if any(getattr(cls, n) is not getattr(known, n) for n in _MAKES_A_LOSS if hasattr(known, n)):
            cls.algorithm = None  # a subclass with a loss of its own

    @checked
    def __init__(
        self,
        num_selections: Count,
        in_features: int | Sequence[int] | None = None,
        num_agents: Several = 1,
        exploration: Share = 0.1,
        policy_storage_type: str | int = "approx",
        detach: bool = True,
        approx_hidden_dims: int | Sequence[int] | None = (),
        policy_net: nn.Module | None = None,
        additional_reward_func: Any = None,
        set_pg_temp: bool = False,
        *,
        formula: Formula = "intended",
        stacked: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **readme: Any,
    ) -> None:
        super().__init__()
        self._num_selections, self._num_agents = num_selections, num_agents
        policy_net, reward = _readme_spellings(type(self).__name__, readme, policy_net, additional_reward_func)
        self.formula = check_formula(formula)
        self.generator, self._stacked = generator, bool(stacked)
        self._in_features, self._detach, self._set_pg_temp = in_features, bool(detach), bool(set_pg_temp)
        self._hidden_dims = (
            (approx_hidden_dims,) if isinstance(approx_hidden_dims, int) else tuple(approx_hidden_dims or ())
        )
        self._storage_type = _storage_type(policy_storage_type)
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._exploration = float(exploration)
        self.additional_reward_func = reward
        self._policy = self._storages(self._num_selections, policy_net)

    def extra_repr(self) -> str:
        return f"num_selections={self._num_selections}, num_agents={self._num_agents}, formula={self.formula!r}"

    # -------------------------------------------------------------------------------------------------- construction

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STORAGES and isinstance(have := self.__dict__.get("_modules", {}).get(name), AnyStorages):
            value = as_storages(name, value, have.outputs, self._num_agents)
        super().__setattr__(name, value)

    def _storages(self, outputs: int, net: nn.Module | None) -> AnyStorages:
        """A storage per agent: the user's network, or what ``policy_storage_type`` says."""
        made: Iterable[nn.Module]
        if net is None and self._storage_type == "tabular":
            made = (TabularPolicyStorage(outputs, **self._factory) for _ in range(self._num_agents))
        else:
            made = (
                ApproxPolicyStorage(net, self._in_features, outputs, self._hidden_dims, self._detach, **self._factory)  # type: ignore[arg-type]
                for _ in range(self._num_agents)
            )
        return (StackedStorages if self._stacked and self._num_agents > 1 else Storages)(made, outputs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _saves_reward(self) and (numbers := saved(self.additional_reward_func)) is not None:
            destination[f"{prefix}_extra_state"] = numbers

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name, (*_, errors) = f"{prefix}_extra_state", args
        if _saves_reward(self) and name in state_dict:  # state dicts without it change nothing
            try:
                restore(self.additional_reward_func, state_dict.pop(name))
            except ValueError as error:
                errors.append(f"{name}: {error}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _option(self, name: str, value: Any) -> Any:
        if name != "additional_reward_func":
            return value
        return check_reward(PerActionBaseReward() if value is None else value, self._num_selections)

    @staticmethod
    def _check_exploration(value: float) -> float:
        return float(share("exploration", value))

    @property
    def exploration(self) -> float:
        """What :meth:`set_exploration`, or the constructor, has set; to set it is to call that."""
        return self._exploration

    @exploration.setter
    def exploration(self, value: float) -> None:
        self.set_exploration(value)

    def set_exploration(self, exploration: float) -> None:
        """Explore so often, 0 to 1; classes that have a temperature instead say what they do."""
        self._exploration = self._check_exploration(exploration)

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        batch: Tensor,
        meta: Trajectory | Sequence[SampleMetaInformation],
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        update_target: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
        prior_actions: Tensor | Sequence[int] | None = None,
    ) -> Triplet:
        """Decide for every sample.

        Args:
            batch: [B, ...], what the policies look at.
            meta: the batch's trajectory, in which the decision is recorded.
            agents: [B] integers: the agent that decides for each sample, for instance the actions of an earlier
                decision. Not looked at with one agent. Also ``prior_actions``.
            mask: [B] bool (or 0 and 1): samples that are False are not decided for; their action is 0 and nothing is
                recorded of them.
            update_target: [B, ...]: what masked-out samples' rows come from, instead of ``batch``.
            forced_actions: [B] integers: take these actions, instead of choosing (replay, teacher forcing, off-policy).
                Those of samples that ``mask`` leaves out, for which a trajectory has -1, are not looked at.

        Returns:
            (y, meta, actions [B] int64). y is the batch itself, except from GumbelSoftmax.

        Raises:
            ValueError, TypeError, IndexError: naming the argument. On a GPU, unless ``strict``, an agent or a forced
                action out of range is no error but drops the sample, which then gives no gradient: no agent means
                action 0 (or the forced one), a forced action out of range -1, which a Selection turns into zeros.
        """
        B = samples("batch", batch)
        meta = Trajectory.of(meta, B)
        active = as_mask(mask, B, batch.device)
        whose = self._agents_of(agents if agents is not None else prior_actions, B, batch.device)
        plan, whose = self._plan(meta, whose, active, B, batch.device)
        forced = None
        if forced_actions is not None:
            forced = self._forced(forced_actions, B, batch.device, active)
        seen = only(batch, active)
        if torch.compiler.is_compiling() or not batch.is_floating_point():
            made = self.decide(seen, plan, forced)
        else:
            made = as_parameters("batch", batch, self._policy, self.decide, seen, plan, forced)
        y = batch if made.y is None else made.y
        actions = made.actions
        for column in made.columns:
            column.taken(actions)
        if active is not None:
            actions = torch.where(active, actions, 0)
            if update_target is not None:
                tensor("update_target", update_target, "a tensor [B, ...]")
                shape("update_target", update_target, batch.shape, "as batch")
            rows = active.reshape(-1, *[1] * (batch.dim() - 1))
            if update_target is not None:
                y = torch.where(rows, y, update_target)
            elif made.y is not None:
                y = torch.where(rows, y, batch)
        record = Record(
            self if self._fastroute_of is None else self._fastroute_of,
            actions,
            self._num_selections,
            made.columns,
            agents=whose,
            active=active,
            exploratory=made.exploratory,
            reward=self.additional_reward_func,
            law=self,
        )
        meta.record(record)
        notes = (self.training or self.formula == "upstream") and not is_recomputation()
        if notes and not is_silent(self.additional_reward_func):
            register(self.additional_reward_func, record.states, actions, active)
        return y, meta, actions.clone()  # the user may write into what is returned, the record stays

    def _agents_of(self, agents: Any, B: int, device: torch.device) -> Tensor | None:
        if self._num_agents == 1:
            return None
        indices = None if agents is None else as_tensor("agents", agents, device)
        if indices is None or (indices.dim() == 1 and indices.shape[0] == 0 != B):
            raise ValueError(
                f"agents: expected the agent of each sample, [{B}] below {self._num_agents}, got none; "
                "pass task labels or an earlier decision's actions"
            )
        return dispatch.as_actions(indices, B, device, "agents")

    def _plan(
        self, meta: Trajectory, agents: Tensor | None, active: Tensor | None, B: int, device: torch.device
    ) -> tuple[Plan | None, Tensor | None]:
        """Samples by agent, and a copy of the agents for the record."""
        if active is None:
            if agents is None:
                return None, None
            plan, own = meta.dispatched(agents, self._num_agents)
            dispatch.check_all_named(plan, own, "agents")
            return plan, own
        whose = torch.zeros(B, dtype=torch.int64, device=device) if agents is None else agents
        plan = dispatch.plan(torch.where(active, whose, -1), self._num_agents, "agents")
        return plan, None if agents is None else agents.clone()

    def _forced(self, forced: Any, B: int, device: torch.device, active: Tensor | None) -> Tensor:
        forced = dispatch.as_actions(forced, B, device, "forced_actions")
        forced = forced.clone() if active is None else torch.where(active, forced, 0)
        K = self._num_selections
        if may_look(forced) and B:
            lowest, highest = int(forced.min()), int(forced.max())
            if lowest < 0 or highest >= K:
                raise IndexError(f"forced_actions: expected indices from 0 to {K - 1}, got {lowest} to {highest}")
        return forced if device.type == "cpu" else torch.where((forced >= 0) & (forced < K), forced, -1)

    # ----------------------------------------------------------------------------------------- what subclasses fill in

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        """The actions of x [B, ...], ``forced`` ones if given, and the columns that the loss reads.

        ``plan`` says which agent decides for which sample; None: the only one, for all.
        """
        raise NotImplementedError(f"{type(self).__name__} decides nothing: it defines no decide")

    def loss_of(self, e: Entry) -> Tensor | None:
        """[N]: the loss of entries, of the numbers [N] that :meth:`entry` says; or None for no loss."""
        if not self._formula_of:
            raise NotImplementedError(f"{type(self).__name__} defines no loss_of")
        return loss_of(e)

    def loss(self, e: Entries) -> Tensor | None:
        """[N]: :meth:`loss_of` these entries. Defined by classes whose loss reads more than an ``Entry`` has."""
        return self.loss_of(self.entry(e))

    def entry(self, e: Entries) -> Entry:
        """What a loss is made of: the first column and the critic's at the action, the auxiliary number, R and y."""
        s1 = None if self.critic is None else e.at(self.critic)
        return Entry(self._formula_of, e.choices, e.at(0), s1, e.auxiliary(self), e.R, self.target(e))

    def target(self, e: Entries) -> Tensor:
        """[N], without gradient: y, the reward and what ``needs`` of the next state; R where it needs nothing."""
        if not self.lookahead:
            return e.R
        (how, i), *_ = self.lookahead
        if self.formula == "upstream":
            return e.upstream_target(lambda: e.next(how, i) - e.r)
        return e.target(how, i)

    def auxiliary(self, record: Record) -> Tensor | None:
        """[B], without gradient: what else the loss reads of a record."""
        return None

    @property
    def lookahead(self) -> tuple[Need, ...]:
        """What the loss reads of the next state."""
        return self.upstream_needs if self.formula == "upstream" else self.needs

    def loss_func(
        self,
        is_terminal: Tensor,
        state: Tensor,
        next_state: Tensor,
        action: Tensor,
        next_action: Tensor,
        reward: Tensor,
        cum_return: Tensor,
        final_reward: Tensor,
    ) -> Tensor:
        """The loss as upstream's functions are called: states [N, K, 5], everything else [N] -> [N]."""
        raw = (is_terminal, state, next_state, action, next_action, reward, cum_return, final_reward)
        made = self.loss(from_raw(self.lookahead, *raw))
        return torch.zeros_like(cum_return) if made is None else made

    # --------------------------------------------------------------------------------------------------------- sampling

    def _uniform(self, *shape: int, like: Tensor) -> Tensor:
        return torch.rand(shape, dtype=accumulating(like.dtype), device=like.device, **draws_of(self.generator))

    def _answer(
        self,
        x: Tensor,
        plan: Plan | None,
        forced: Tensor | None,
        critic: AnyStorages | None = None,
        *,
        kind: str = "softmax",
        temperature: float = 1.0,
        with_coin: bool = False,
        expected: bool = False,
    ) -> tuple[AgentChoice, Tensor | Callable[[], Tensor] | None]:
        """What every sample's agent chooses by its policy, what its critic says to that, and what of it explored.

        With a coin it explores where the coin falls below ``exploration``. ``expected``: also the critic's mean.
        """
        own, judge = heads(self._policy, critic, x, plan)
        z: Any = self._ask(self._policy, x, plan) if own is None else None
        q = self._ask(critic, x, plan) if critic is not None and judge is None else None
        like = z if z is not None else (own.weights or own.biases)[0]  # type: ignore[union-attr]
        uniform = coin = None
        upstream = self.formula == "upstream"
        if self.training and forced is None:
            uniform = self._uniform(x.shape[0], self._num_selections, like=like)
        if with_coin and forced is None and (self.training or upstream):
            coin = self._uniform(x.shape[0], like=like)
        how: dict[str, Any] = {
            "uniform": uniform, "coin": coin if uniform is not None else None, "forced": forced, "kind": kind,
            "temperature": temperature, "exploration": self._exploration,
        }  # fmt: skip
        if own is None:
            alone = policy(z, **how)
            made = AgentChoice(*alone, z)
        else:
            given = own.x if own.x is not None else judge.x if judge is not None and judge.x is not None else x
            critics: dict[str, Any] = (
                {} if judge is None else {"critic_weights": judge.weights, "critic_biases": judge.biases}
            )
            made = agent_policy(
                given, plan, own.weights, own.biases, **critics, **how, expected=expected and judge is not None
            )
        if q is not None:
            at = q[:, 0] if q.shape[1] == 1 else policy(q, forced=made.actions, kind="score").value
            made = made._replace(critic=q, critic_at=at, expected=mean(made.scores, q) if expected else None)
        exploration = self._exploration
        if kind == "score":
            explored = None if coin is None else (lambda: coin < exploration)
        else:  # upstream's flag says the opposite
            explored = lambda: (made.actions == made.greedy) == upstream  # noqa: E731
        return made, explored

    def _ask(
        self, storages: AnyStorages, x: Tensor, plan: Plan | None, *, differentiable_twice: bool = False
    ) -> Tensor:
        made = ask(storages, x, plan, differentiable_twice=differentiable_twice)
        if made.dim() != 2 or made.shape[1] != storages.outputs:
            name = next(net for n, net in _STORAGES.items() if getattr(self, n, None) is storages)
            raise ValueError(f"{name}: expected outputs [{x.shape[0]}, {storages.outputs}], got {shown(made)}")
        return made


def _saves_reward(decide: Decision) -> bool:
    """Whether what the reward has counted is the module's extra state; not where the class has one of its own."""
    is_upstreams = hasattr(type(decide), "_fastroute_hooks")  # whose state dicts have nothing of rewards
    return not is_upstreams and type(decide).get_extra_state is nn.Module.get_extra_state


def mean(z: Tensor, q: Tensor) -> Tensor:
    """[B], without gradient: sum_k p_k q_k, p = (z - min z + 1e-6) / sum."""
    with torch.no_grad():
        weight = shifted(z)
        return torch.linalg.vecdot(weight, q.to(weight.dtype)).div(weight.sum(1))


def as_mask(mask: Any, B: int, device: torch.device) -> Tensor | None:
    """[B] bool from what users give as a mask: a copy, for they go on with theirs."""
    if mask is None:
        return None
    mask = as_tensor("mask", mask, device)
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask: expected bool (or 0 and 1), got {mask.dtype}")
    if mask.numel() != B or mask.dim() > 2:
        raise ValueError(f"mask: expected one per sample, shape [{B}], got {shown(mask)}")
    return moved("mask", mask.reshape(-1), device, torch.bool).clone()


def _storage_type(value: str | int) -> str:
    if value in ("approx", 0) and value is not False:
        return "approx"
    if value in ("tabular", 1) and value is not True:
        return "tabular"
    raise ValueError(f"policy_storage_type: expected 'approx' (0) or 'tabular' (1), got {value!r}")


_SPELLINGS = ("additional_reward_class", "additional_reward_args", "approx_module")


def _readme_spellings(
    name: str, given: dict[str, Any], policy_net: nn.Module | None, reward: Any
) -> tuple[nn.Module | None, Any]:
    """The argument names of upstream's READMEs, and an error for any other."""
    for key in given:
        if key not in _SPELLINGS:
            known = [*inspect.signature(Decision).parameters, "value_net", "qvalue_net", *_SPELLINGS]
            near = difflib.get_close_matches(key, known, 1)
            raise TypeError(f"{name}: unexpected keyword {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if given.get("approx_module") is not None:
        if policy_net is not None:
            raise TypeError(f"{name}: expected policy_net or approx_module, got both")
        policy_net = given["approx_module"]
        if not isinstance(policy_net, nn.Module):
            raise TypeError(f"approx_module: expected a module, got {shown_value(policy_net)}")
    if given.get("additional_reward_class") is not None:
        if reward is not None:
            raise TypeError(f"{name}: expected additional_reward_func or additional_reward_class, got both")
        args = given.get("additional_reward_args") or {}
        reward = given["additional_reward_class"]
        reward = reward(**args) if isinstance(args, dict) else reward(*args)
    elif given.get("additional_reward_args"):
        raise TypeError(f"{name}: additional_reward_args: expected additional_reward_class with it, got none")
    return policy_net, reward
