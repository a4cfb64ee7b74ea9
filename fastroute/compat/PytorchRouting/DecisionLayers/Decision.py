"""The base of what decides."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import networks
from fastroute.networks import SampleMetaInformation, Trajectory
from fastroute.networks.decision_record import STATE_COLUMNS, Column, Record
from fastroute.networks.decisions.base import Decided, as_mask
from fastroute.networks.decisions.storage import Storages
from fastroute.networks.loss_entries import Entries, Need, from_raw
from fastroute.ops import dispatch
from fastroute.ops.arguments import renamed
from fastroute.ops.checks import samples
from fastroute.ops.dispatch.contract import Plan
from fastroute.ops.host import may_look

from .._names import ModulesOwnNames
from .._names import definer as _definer
from .._samples import Samples
from .._upstream import Literal, Named, own_copy

#: Upstream's methods, and what ``fastroute.networks`` calls in their place.
_HOOKS = {"_forward": "decide", "_loss": "loss"}
#: What a user's loss reads of the next state: all of it.
_WHOLE: tuple[Need, ...] = (("action", 0), ("state", 0))
#: Upstream's methods, as ``Decision`` calls them.
_CALLS = {"_forward": ("xs", "agent"), "_loss": ("is_terminal", "state", "next_state", "action", "next_action",
          "reward", "cum_return", "final_reward")}  # fmt: skip


class Decision(ModulesOwnNames, Literal, Named, networks.Decision, metaclass=ABCMeta):
    """``fastroute.networks.Decision`` with upstream's formulas and its two methods to override.

    ``_forward(xs, agent)`` decides for one agent's samples, ``_loss(is_terminal, state, next_state, action,
    next_action, reward, cum_return, final_reward)`` is the loss of each entry. A class that overrides one, or an
    object that is given one, has it called as upstream calls it: agent by agent, and once for all of a layer's entries
    in a batch, those of a sample side by side; a function that several layers share, once for all of theirs. An empty
    ``prior_actions`` means agent 0 for all. ys is a copy. The methods that ``fastroute.networks`` calls, such as
    ``decide``, are no hooks here: a class has such names for itself.
    """

    _fastroute_marks = "_storage_type"
    _fastroute_taken = (*ModulesOwnNames._fastroute_taken, "_storages", "_check_exploration", "_value_outputs")
    _fastroute_hooks: frozenset[str] = frozenset()  #: of upstream's methods, those that are a user's
    _fastroute_decides = False  #: whether there is something that decides
    _fastroute_idles = False  #: whether a mask may leave out every sample

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fastroute_hooks = frozenset(hook for hook in _HOOKS if _definer(cls, hook) is not Decision)
        native = cls._fastroute_house.decide  # type: ignore[attr-defined]
        cls._fastroute_decides = native is not networks.Decision.decide or "_forward" in cls._fastroute_hooks
        for hook in cls._fastroute_hooks:
            _check_call(cls, hook)
            if not cls._fastroute_clashes:
                for name, value in _instead(hook).items():
                    setattr(cls, name, value)
        if _definer(cls, "_eval_stochastic_are_exp") is not Decision and "_forward" not in cls._fastroute_hooks:
            raise TypeError(
                f"{cls.__name__}._eval_stochastic_are_exp: expected no override where _forward is not overridden: "
                "nobody else calls it"
            )
        if _definer(cls, "_construct_policy_storage") is not Decision:
            cls._storages = _own_storages  # type: ignore[method-assign,assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOOKS:
            super().__setattr__(name, value)
            return
        for attribute, given in {name: value, **_instead(name, self)}.items():
            object.__setattr__(self, attribute, given)

    @renamed(agents="prior_actions")
    def forward(  # type: ignore[override]
        self,
        xs: Tensor,
        mxs: Trajectory | Sequence[SampleMetaInformation],
        prior_actions: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        update_target: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Samples, Tensor]:
        """xs [B, ...], its trajectory, each sample's agent [B] and who is decided for [B] -> (ys, mxs, actions [B]).

        See ``fastroute.networks.Decision.forward``, which calls the first three batch, meta and agents.
        """
        stands = self._fastroute_stands()
        if stands is not self:
            return stands.forward(xs, mxs, prior_actions, mask, update_target, **kwargs)  # type: ignore[no-any-return]
        if not self._fastroute_decides:
            self._fastroute_native("_forward")  # says what is missing
        if mask is not None and not self._fastroute_idles:
            _check_mask(mask, samples("xs", xs), xs.device)
        if isinstance(prior_actions, (Tensor, Sequence)) and len(prior_actions) == 0:
            prior_actions = torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
        ys, made, actions = super().forward(xs, mxs, prior_actions, mask, update_target, **kwargs)
        return ys if update_target is None else own_copy(ys, update_target), Samples.of(made), actions

    def _fastroute_stands(self) -> Any:
        """The object that fastroute's own methods may be called on, with the user's hooks in their places."""
        made = super()._fastroute_stands()
        if made is not self:
            for hook in _HOOKS:
                if hook in self._fastroute_hooks or hook in self.__dict__:
                    made.__dict__ |= _instead(hook, self)
        return made

    @staticmethod
    def _fastroute_shares(record: Record) -> Any:
        """What decisions have in common whose entries are one call's: as upstream, the loss function. None: nothing."""
        decision = record.decision
        if "_loss" in decision._fastroute_hooks or "_loss" in decision.__dict__:
            return decision._loss, record.choices, max(len(record.columns), STATE_COLUMNS)
        return None

    # ------------------------------------------------------------------------------------- what upstream's classes have

    def _forward(self, xs: Tensor, agent: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One agent's samples [n, ...] -> (ys, actions [n], are_exploratory [n], states [n, K, C])."""
        plan = None
        if self._num_agents > 1:
            whose = torch.full((len(xs),), int(agent), dtype=torch.int64, device=xs.device)
            plan = dispatch.plan(whose, self._num_agents, "agents")
        native, stands = self._fastroute_native("_forward"), self._fastroute_stands()
        made: Decided = native(self if stands is self else self._fastroute_stand_in(), xs, plan, None)
        columns = [c.full.expand(len(xs), self._num_selections) for c in made.columns]
        explored = made.exploratory() if callable(made.exploratory) else made.exploratory
        explored = torch.zeros_like(made.actions) if explored is None else explored
        return xs if made.y is None else made.y, made.actions, explored.to(torch.uint8), torch.stack(columns, -1)

    def _loss(
        self, is_terminal: Tensor, state: Tensor, next_state: Tensor, action: Tensor, next_action: Tensor,
        reward: Tensor, cum_return: Tensor, final_reward: Tensor,
    ) -> Tensor:  # fmt: skip
        """States [N, K, 5], the others [N] -> the loss of each entry [N]."""
        native, stands = self._fastroute_native("_loss"), self._fastroute_stand_in()
        raw = is_terminal, state, next_state, action, next_action, reward, cum_return, final_reward
        made: Tensor | None = native(stands, from_raw(stands.lookahead, *raw))
        return torch.zeros_like(cum_return) if made is None else made

    def _fastroute_native(self, hook: str) -> Callable[..., Any]:
        cls, ours = self._fastroute_house, _HOOKS[hook]
        method: Callable[..., Any] = getattr(cls, ours)
        if method is getattr(networks.Decision, ours) and not (hook == "_loss" and cls._formula_of):  # type: ignore[attr-defined]
            wanted = f"{hook}(self, {', '.join(_CALLS[hook])})"
            raise NotImplementedError(f"{type(self).__name__}: expected it to define {wanted}")
        return method

    def _construct_policy_storage(
        self, out_dim: int, policy_storage_type: str | int, approx_module: nn.Module | None,
        approx_hidden_dims: Sequence[int], in_dim: int | None = None,
    ) -> nn.ModuleList:  # fmt: skip
        """A storage per agent, as classes with further networks make them."""
        options: dict[str, Any] = {"policy_storage_type": policy_storage_type, "detach": self._detach, **self._factory}
        options |= {"approx_hidden_dims": approx_hidden_dims, "policy_net": approx_module}
        made: Any = networks.Decision(out_dim, in_dim or self._in_features, self._num_agents, **options)._policy
        return made  # type: ignore[no-any-return]

    @staticmethod
    def _eval_stochastic_are_exp(actions: Tensor, dist: Tensor) -> Tensor:
        """[n] uint8: where an action is the most likely one of dist [n, K] or [n, K, C]."""
        dist = dist[:, :, 0] if dist.dim() == 3 else dist
        return (dist.argmax(1) == actions.reshape(-1)).to(torch.uint8)

    @property
    def _pol_type(self) -> str:
        return self._storage_type

    @property
    def _pol_hidden_dims(self) -> tuple[int, ...]:
        return self._hidden_dims

    @property
    def _pg_temperature(self) -> float:
        temperature: float = getattr(self, "_temperature", 1.0)
        return temperature

    @_pg_temperature.setter
    def _pg_temperature(self, value: float) -> None:
        self._temperature = value


def _check_mask(mask: Any, B: int, device: torch.device) -> None:
    if torch.compiler.is_compiling():
        return
    active = as_mask(mask, B, device)
    if active is not None and B and may_look(active) and not active.any():
        raise ValueError(f"mask: expected a sample that is decided for, got none of {B}")


def _check_call(cls: type, hook: str) -> None:
    """TypeError for a method that cannot be called as upstream calls it (versions 0.1 and 0.2 had other arguments)."""
    method = inspect.getattr_static(cls, hook)
    given = _CALLS[hook] if isinstance(method, staticmethod) else ("self", *_CALLS[hook])
    method = getattr(method, "__func__", method)
    try:
        inspect.signature(method).bind(*given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{cls.__name__}.{hook}: expected to be called with ({', '.join(given)}): {error}") from error


def _own_storages(self: Decision, outputs: int, net: nn.Module | None) -> Storages:
    return Storages(self._construct_policy_storage(outputs, self._pol_type, net, self._pol_hidden_dims), outputs)


def _decide(self: Decision, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
    """A user's ``_forward``, agent by agent."""
    B, K = len(x), self._num_selections
    order = torch.arange(B, device=x.device) if plan is None else plan.order
    ends = [0, B] if plan is None else plan.offsets.tolist()
    y, actions = None, torch.zeros(B, dtype=torch.int64, device=x.device)
    explored, states = torch.zeros(B, dtype=torch.bool, device=x.device), x.new_zeros(B, K, STATE_COLUMNS)
    for agent, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        rows = order[start:end]
        given = x[rows]
        made_of_agent = self._forward(given, torch.tensor(agent, device=x.device))
        if not isinstance(made_of_agent, tuple) or len(made_of_agent) != 4:
            raise TypeError(
                f"{type(self).__name__}._forward: expected (ys, actions, are_exploratory, states), got "
                f"{made_of_agent if not isinstance(made_of_agent, tuple) else f'{len(made_of_agent)} results'}"
            )
        ys, chosen, are_exploratory, state = made_of_agent
        if state.shape[:2] != (len(rows), K):
            raise ValueError(
                f"{type(self).__name__}._forward: states: expected [{len(rows)}, {K}] or [{len(rows)}, {K}, columns], "
                f"got {list(state.shape)}"
            )
        state = state.reshape(len(rows), K, -1)
        columns = state.shape[2]
        if columns > states.shape[2]:
            states = torch.cat([states, states.new_zeros(B, K, columns - states.shape[2])], 2)
        pad = state.new_zeros(len(rows), K, states.shape[2] - columns)
        states = states.to(state.dtype).index_copy(0, rows, torch.cat([state, pad], 2))
        actions = actions.index_copy(0, rows, chosen.reshape(-1).to(torch.int64))
        if are_exploratory is not None:
            explored = explored.index_copy(0, rows, are_exploratory.reshape(-1).bool())
        if ys is not given:
            y = (x if y is None else y).index_copy(0, rows, ys.to(x.dtype))
    actions = actions if forced is None else forced
    return Decided(actions, [Column(column) for column in states.unbind(2)], explored, y)


def _entry_losses(self: Decision, e: Entries) -> Tensor:
    """[N]: what a user's ``_loss`` says to the entries of active samples, a sample's side by side."""
    records, steps = e._records, e._steps

    def whole(flag: Tensor | bool) -> Tensor:
        return flag if isinstance(flag, Tensor) else torch.full_like(records[0].actions, flag, dtype=torch.bool)

    states = [r.states() for r in records]
    following = [s.next.get(("state", 0), state) for s, state in zip(steps, states, strict=True)]
    cut = [whole(s.cut) for s in steps]
    rows = [c.reshape(-1, 1, 1) for c in cut]
    actions = [s.next.get(("action", 0), torch.zeros_like(r.actions)) for r, s in zip(records, steps, strict=True)]
    after = [
        state if state.shape != ahead.shape else torch.where(end, state, ahead)
        for end, state, ahead in zip(rows, states, following, strict=True)
    ]
    raw = (
        cut, states, after, [r.actions for r in records],
        [torch.where(c, 0, a) for c, a in zip(cut, actions, strict=True)],
        [s.r for s in steps], [s.R for s in steps], [s.f for s in steps],
    )  # fmt: skip
    # from one after the other decision to one after the other sample, as upstream collects them
    T, B = len(records), e.batch
    kept = torch.arange(T * B, device=cut[0].device).reshape(T, B).T.reshape(-1)
    if e.active is not None:
        kept = kept[e.active[kept]]
    losses = self._loss(*[torch.cat(part)[kept] for part in raw])
    if not isinstance(losses, Tensor) or losses.shape[:1] != kept.shape:
        raise ValueError(
            f"{type(self).__name__}._loss: expected one loss per entry, [{len(kept)}], got "
            f"{list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__}"
        )
    losses = losses.reshape(len(kept), -1).sum(1)
    return losses.new_zeros(T * B).index_copy(0, kept, losses)


#: What a class has in place of ``fastroute.networks``' method where upstream's is a user's.
_THROUGH: dict[str, Callable[..., Any]] = {"_forward": _decide, "_loss": _entry_losses}


def _instead(hook: str, of: Decision | None = None) -> dict[str, Any]:
    """What fastroute calls, and reads, in place of a method of a user's: of a class, or of an object."""
    through = _THROUGH[hook] if of is None else MethodType(_THROUGH[hook], of)
    if hook == "_forward":
        return {_HOOKS[hook]: through, "_fastroute_decides": True}
    # no ``algorithm``: fastroute knows another loss under that name
    return {_HOOKS[hook]: through, "needs": _WHOLE, "upstream_needs": _WHOLE, "algorithm": None}
