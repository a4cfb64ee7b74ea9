"""Rewards: of a sample's final loss, and of single actions.

Axes: B samples of one decision, C choices. All rewards are without gradient.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import CellType, CodeType, FunctionType, ModuleType, NoneType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..modules.names import has_own
from ..ops import dispatch
from ..ops.arguments import Count, Options, checked
from ..ops.checks import given, samples, shown, tensor, together
from ..ops.host import is_hollow
from ..ops.processes import Processes
from ..ops.recomputation import is_recomputation
from ..ops.trajectory_loss.op import ByAction, Final

Formula = Literal["intended", "upstream"]


def check_formula(formula: Any) -> Formula:
    if formula not in ("intended", "upstream"):
        raise ValueError(f"formula: expected 'intended' or 'upstream', got {formula!r}")
    return formula


# ---------------------------------------------------------------------------------------------------- final rewards


class BaseReward(Options, nn.Module):
    """A final reward. Subclasses define ``forward`` for one sample, and ``rewards`` where a batch can be done at once.

    Args:
        scale: multiplies the reward. (Upstream stores it and never uses it: ``formula="upstream"``.)

    Examples:
        >>> class Confidence(fastroute.BaseReward):
        ...     def rewards(self, loss, yest, ytrue):
        ...         return self.scaled(yest.softmax(1).amax(1))
        >>> loss = fastroute.Loss(nn.CrossEntropyLoss(), Confidence(scale=0.5))
    """

    _options = ("formula",)

    @checked
    def __init__(self, scale: float = 1.0, *, formula: Formula = "intended") -> None:
        super().__init__()
        self.scale = scale
        self.formula = check_formula(formula)

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        """One sample: loss [1], yest [1, ...], ytrue [1, ...] -> its reward [1]. To be defined in a subclass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward(loss, yest, ytrue)")

    def _scale(self) -> float:
        return 1.0 if self.formula == "upstream" else self.scale

    def scaled(self, reward: Tensor) -> Tensor:
        """The reward times ``scale``."""
        return reward if self._scale() == 1.0 else reward * self._scale()


class NegLossReward(BaseReward):
    """Minus the loss.

    Args:
        scale: multiplies the reward.
        formula: "intended", or "upstream", where ``scale`` is not used.

    Examples:
        >>> fastroute.NegLossReward(scale=2.0)(torch.tensor([0.5, 1.0]), torch.randn(2, 3))
        tensor([-1., -2.])
    """

    def rewards(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
        """[B] losses -> [B]."""
        tensor("loss", loss, "a tensor")
        return self.scaled(-loss.detach())

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None = None) -> Tensor:
        """Of one sample or many: the loss, any shape, and what it came from, which is not looked at."""
        return self.rewards(loss, yest, ytrue)

    def formula_of(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Final | None:
        """What :meth:`rewards` is made of, where the loss's kernel can make it."""
        return Final(loss, self._scale())


class CorrectClassifiedReward(BaseReward):
    """+1 where the prediction is right, -1 where it is not.

    The prediction is the argmax of [B, C] scores, or the class index itself where there is one number per sample;
    the truth is a class index, or one-hot.

    Args:
        scale: the reward of a right prediction; a wrong one has -scale.
        formula: "intended", or "upstream", where ``scale`` is not used.

    Examples:
        >>> scores, truth = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])
        >>> fastroute.CorrectClassifiedReward()(torch.zeros(2), scores, truth)
        tensor([ 1., -1.])
    """

    def rewards(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
        """yest [B, C] or [B], ytrue [B], [B, 1] or one-hot [B, C] -> [B]."""
        if ytrue is None:
            raise ValueError("ystrue: CorrectClassifiedReward needs the true classes, got none")
        B = samples("loss", loss)
        for name, t in (("ysest", yest), ("ystrue", ytrue)):
            if samples(name, t) != B:
                raise ValueError(f"{name}: expected one per sample, {B}, got {shown(t)}")
            together(("loss", loss), {name: t})
        if yest.is_complex():
            raise TypeError(f"ysest: expected real scores, got {yest.dtype}")
        yest, ytrue = (t.detach().reshape(B, t.shape[1:].numel()) for t in (yest, ytrue))
        classes = yest.shape[1]
        guess = yest.argmax(1) if classes > 1 else yest[:, 0]
        truth = ytrue.argmax(1) if ytrue.shape[1] == classes and classes > 1 else ytrue[:, 0]
        if ytrue.shape[1] not in (1, classes):
            raise ValueError(f"ystrue: expected class indices [B] or one-hot [B, {classes}], got {list(ytrue.shape)}")
        right = guess == truth
        return self.scaled(torch.where(right, 1.0, -1.0).to(loss.dtype))

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor) -> Tensor:
        """Of one sample or many: loss [B], yest [B, C] or [B], ytrue [B] or one-hot [B, C] -> [B]."""
        tensor("loss", loss, "a tensor [B]")
        return self.rewards(loss.reshape(-1), yest, ytrue)

    def formula_of(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Final | None:
        """What :meth:`rewards` is made of, where the loss's kernel can make it: scores, and the classes' indices."""
        B = loss.shape[0]
        if ytrue is None or ytrue.dtype != torch.int64 or ytrue.shape[0] != B or ytrue.numel() != B:
            return None
        if yest.shape[0] != B or yest[:1].numel() < 2 or yest.dtype not in _SCORES:
            return None
        return Final(loss, self._scale(), yest.detach().reshape(B, yest.shape[1:].numel()), ytrue.reshape(B))


_SCORES = (torch.float32, torch.bfloat16, torch.float16)


#: What an instance may have in place of its class's.
_METHODS = frozenset({"forward", "rewards", "scaled", "get_reward", "by_action", "register", "register_all"})
_FINAL, _BY_ACTION = frozenset({"rewards", "scaled"}), frozenset({"rewards", "by_action"})


def _handed(reward: Any) -> Callable[[Any], Any]:
    """How tensors are handed to a reward, and taken from it: as copies where its code is a user's, who may write into
    them."""
    if type(reward).__module__ == __name__ and not has_own(reward, _METHODS):
        return lambda t: t
    return lambda t: t.detach().clone() if isinstance(t, Tensor) else t


def _number(name: str, reward: Any, like: Tensor) -> Tensor:
    """A user's number as a tensor of the dtype, and on the device, that it is for, whatever the defaults are."""
    if reward is None:
        raise TypeError(f"{name}: expected a number or a tensor as a sample's reward, got None; does it return?")
    return reward if isinstance(reward, Tensor) else torch.as_tensor(reward, dtype=like.dtype, device=like.device)


def _one(reward: Any, like: Tensor) -> Tensor:
    made = _number("routing_reward_func", reward, like)
    if made.numel() != 1:
        raise ValueError(f"routing_reward_func: expected one reward for a sample, got shape {list(made.shape)}")
    return made.reshape(())


def _by_vmap(function: Any, args: tuple[Tensor, ...]) -> Tensor | None:
    try:
        return torch.vmap(lambda *sample: _one(function(*sample), sample[0]))(*args)
    except Exception:  # whatever vmap cannot do with a user's function; its own error comes again sample by sample
        return None


def final_rewards(function: Any, losses: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
    """[B] final rewards by a reward object or a user's function of a sample (loss [1], yest [1, ...], ytrue [1, ...]).

    It is called sample by sample; a function that can be seen to keep nothing, all at once, by ``torch.vmap``.
    """
    losses = losses.detach()
    handed = _handed(function)
    mine, yest, ytrue = handed(losses), handed(yest), handed(ytrue)
    with torch.no_grad():
        if _in_bulk(function, "rewards", "forward"):
            made: Tensor = handed(_call(function, "rewards", mine, yest, ytrue))
        else:
            truth = torch.zeros_like(losses) if ytrue is None else ytrue.detach()
            args = mine[:, None], yest.detach()[:, None], truth[:, None]
            at_once = torch.compiler.is_compiling() or _keeps_nothing(function)
            found = _by_vmap(function, args) if at_once else None
            if found is None:
                each = [_one(function(*sample), losses) for sample in zip(*args, strict=True)]
                found = torch.stack(each) if each else losses
            made = found
    if made.numel() != losses.shape[0]:
        raise ValueError(f"routing_reward_func: expected {losses.shape[0]} rewards, got {list(made.shape)}")
    as_it_is = made.dim() == 1 and made.dtype == losses.dtype and not made.requires_grad
    return made if as_it_is else made.detach().reshape(-1).to(losses.dtype)


_BUILT_IN = {"abs", "bool", "float", "int", "len", "max", "min", "round", "sum"}
_WRITES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SUBSCR", "DELETE_", "IMPORT_", "MAKE_FUNCTION")


@functools.lru_cache(256)
def _names_read(code: CodeType) -> frozenset[str] | None:
    """The globals that a function reads; None if it writes more than its own variables."""
    names = set()
    for step in dis.get_instructions(code):
        name = str(step.argval)
        in_place = step.opname in ("LOAD_ATTR", "LOAD_METHOD") and name.endswith("_")
        in_place |= step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        if step.opname.startswith(_WRITES) or in_place:
            return None
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(name)
    return frozenset(names)


def _keeps_nothing(function: Any) -> bool:
    """Whether it is a function of its arguments alone, made of PyTorch's: its calls have no order."""
    if type(function) is not FunctionType or (names := _names_read(function.__code__)) is None:
        return False
    own = function.__globals__
    if any(name not in own and name not in _BUILT_IN for name in names):
        return False
    used = [own[name] for name in names if name in own]
    cells = function.__closure__ or ()
    used += [cell.cell_contents for cell in cells if cell != CellType()]
    used += function.__defaults__ or ()
    homes = [v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) or "" for v in used]
    return all(
        isinstance(v, (int, float, str, NoneType, torch.dtype, Tensor))
        or (isinstance(v, (ModuleType, FunctionType)) and home.partition(".")[0] in ("torch", "math"))
        for v, home in zip(used, homes, strict=True)
    )


def final_formula(function: Any, losses: Tensor, yest: Tensor, ytrue: Tensor | None) -> Final | None:
    """What ``final_rewards`` is made of, where the op knows that formula: of this module's own classes, as they are."""
    if type(function) not in (NegLossReward, CorrectClassifiedReward) or has_own(function, _FINAL):
        return None
    if not isinstance(function.scale, int | float):
        return None
    return function.formula_of(losses.detach(), yest, ytrue)


# ----------------------------------------------------------------------------------------------- per-action rewards


class PerActionBaseReward(Options):
    """No reward, and the interface of those that give one.

    A subclass defines ``rewards`` (and ``register_all``) on a batch, or upstream's ``get_reward`` (and ``register``) on
    one sample: whichever it has is used, the latter in a loop.

    Args:
        history_window: how many of the last actions are kept (``history``), where a subclass wants them.

    Attributes:
        sync_rewards: whether what is registered are the actions of all processes of a group, in the order of ranks, as
            if their batches were one. All of them then have to call the decision equally often.
        processes: that group; None: all processes, where ``torch.distributed`` runs several.
    Examples:
        >>> class Dear(fastroute.PerActionBaseReward):
        ...     def rewards(self, dists, actions, like):
        ...         return -0.1 * actions.to(like.dtype)
        >>> Dear().get_reward(torch.zeros(3), torch.tensor(2))
        tensor([-0.2000])
    """

    _options: ClassVar[tuple[str, ...]] = ("history_window",)
    keeps_history = False  #: whether ``register_all`` has to keep the last actions
    sync_rewards = False
    processes: Processes | None = None

    @checked
    def __init__(self, history_window: Count = 256) -> None:
        self.history_window = history_window
        self.clear()

    def _group(self) -> Processes | None:
        """With whom to register."""
        if self.sync_rewards and self.processes is None:
            self.processes = Processes.of()
        return self.processes if self.sync_rewards else None

    def clear(self) -> None:
        """Forget what was registered."""
        self._ring: Tensor | None = None

    @property
    def history(self) -> Tensor:
        """[history_window] int64: the last actions, the latest last; -1 before there were so many."""
        return self._kept("cpu") if self._ring is None else self._ring

    def _kept(self, device: torch.device | str) -> Tensor:
        """``history`` on a device."""
        if self._ring is None:
            return torch.full((self.history_window,), -1, device=device)
        return self._ring.to(device)

    def saved(self) -> Tensor | None:
        """What decisions have of this in their state dicts, always of one size: ``history``, if one is kept."""
        return self.history if self.keeps_history else None

    def restore(self, saved: Tensor) -> None:
        """Go on from what another one's :meth:`saved` gave; ValueError where that is no history."""
        if saved.dim() != 1 or saved.is_floating_point() or saved.is_complex():
            raise ValueError(f"history: expected the last actions, [n] int64, got {given(saved)}")
        if not saved.is_meta:
            history = saved.detach().to(torch.int64)[-self.history_window :]
            self._ring = torch.cat([history.new_full((self.history_window - len(history),), -1), history])

    def register_all(self, dists: Callable[[], Tensor], actions: Tensor, active: Tensor | None = None) -> None:
        """Note a batch's actions [B], those of active samples [B]; ``dists()`` are their states [B, K, 5]."""
        if not self.keeps_history:
            return
        W, actions = self.history_window, actions.long()
        if (group := self._group()) is not None:  # of each process as many as are kept, so that sizes are alike
            actions = actions if active is None else torch.where(active, actions, -1)
            own = torch.cat([actions.new_full((W,), -1), actions])
            actions = group.gather(own[(own >= 0).to(torch.int8).argsort(stable=True)][-W:]).flatten()
            active = actions >= 0
        if active is None and len(actions) >= W:  # what was there before is forgotten
            self._ring = torch.cat([actions if len(actions) == W else actions[-W:]])  # a copy: others have them too
            return
        ring = self._kept(actions.device)
        if active is not None:
            actions = torch.where(active, actions, -1)
        ring = torch.cat([ring, actions])
        if active is not None:  # what is not there comes first, without reading how much that is
            ring = ring[(ring >= 0).to(torch.int8).argsort(stable=True)]
        self._ring = ring[-W:]

    def register(self, dist: Tensor, action: Tensor) -> None:
        """Note one sample's action."""
        self.register_all(lambda: dist, self._action(dist, action))

    @staticmethod
    def _action(dist: Tensor, action: Any) -> Tensor:
        """[1], where it is, or where ``dist`` is for a number."""
        return torch.as_tensor(action, device=None if isinstance(action, Tensor) else dist.device).reshape(1)

    def rewards(self, dists: Callable[[], Tensor], actions: Tensor, like: Tensor) -> Tensor | None:
        """[B] rewards of actions [B] in the dtype of ``like``, or None for zeros."""
        made = self.by_action(actions.long(), like)
        return None if made is None else made.made(like.dtype)

    def by_action(self, actions: Tensor, like: Tensor) -> ByAction | None:
        """What :meth:`rewards` is made of in a class whose rewards depend on actions alone; None for zeros."""
        return None

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        """[1]: the reward of one action."""
        action = self._action(dist, action)
        like = torch.zeros(1, device=action.device)
        made = self.rewards(lambda: dist, action, like)
        return like if made is None else made

    def check(self, choices: int) -> None:
        """Told the number of choices of a decision that uses it."""


class _PerActionCounting(PerActionBaseReward):
    """The arguments of the two collaboration rewards."""

    _options = ("reward_ratio", "num_actions", "formula", "sync_rewards")

    @checked
    def __init__(
        self,
        reward_ratio: float = 0.1,
        num_actions: Count | None = None,
        history_len: int = 256,
        *,
        formula: Formula = "intended",
        sync_rewards: bool = False,
    ) -> None:
        self.reward_ratio, self.num_actions, self.history_len = reward_ratio, num_actions, history_len
        self.formula, self.sync_rewards = check_formula(formula), sync_rewards
        super().__init__(history_len)

    def check(self, choices: int) -> None:
        if self.num_actions is None:
            self.num_actions = choices
        elif self.num_actions < choices:
            raise ValueError(f"num_actions: expected at least the decision's {choices} choices, got {self.num_actions}")

    def _first_time(self) -> None:
        if is_recomputation():
            raise RuntimeError(
                f"{type(self).__name__}: expected the loss outside of what is checkpointed: a forward pass that is "
                "made again would count other actions than the first one did"
            )

    def _known_actions(self) -> int:
        if self.num_actions is None:
            raise ValueError("num_actions: expected the number of actions, got None and no decision to tell it")
        return self.num_actions


class CollaborationReward(_PerActionCounting):
    """How often an action was taken lately, times ``reward_ratio``: agents that agree are rewarded.

    Args:
        reward_ratio: the reward of an action that everybody takes. Upstream multiplies by it twice
            (``formula="upstream"``).
        num_actions: how many actions there are; None: as many as the decision that uses it has.
        history_len: how many of the last registered actions are counted.
        sync_rewards: count the actions of all processes, see :class:`PerActionBaseReward`.

    Examples:
        >>> reward = fastroute.CollaborationReward(0.5, num_actions=3, history_len=4)
        >>> reward.register_all(lambda: torch.zeros(4, 3, 5), torch.tensor([2, 2, 2, 0]))
        >>> reward.get_reward(torch.zeros(3), torch.tensor(2))  # half of three quarters
        tensor([0.3750])
        >>> decide = fastroute.WPL(3, 8, additional_reward_func=reward)
    """

    keeps_history = True
    _fixed = ("history_len",)  # of ``history_window``

    def by_action(self, actions: Tensor, like: Tensor) -> ByAction | None:
        """The share of each action among those registered."""
        self._first_time()
        ring = self._kept(actions.device)
        made = dispatch.plan(ring, self._known_actions())  # to sort them is to count them
        ratio = self.reward_ratio**2 if self.formula == "upstream" else self.reward_ratio
        if made.bounds is None:
            return ByAction(actions, made.offsets, ratio)
        each = ratio / max(made.bounds[-1], 1)
        shares = [each * (b - a) for a, b in pairwise(made.bounds)]
        return ByAction(actions, torch.tensor(shares, dtype=like.dtype, device=actions.device))


class RunningAverageCollaborationReward(_PerActionCounting):
    """As :class:`CollaborationReward`, with shares that fade: after each sample e <- k e + (1 - k) onehot(action).

    k = 10^(-1 / history_len); e sums to one from the first sample on. The samples of a batch count in their order. A
    batch of n is taken in at once: e <- k^n e + sum_i (1 - k) k^(n - i) onehot(a_i), and the very first sample ever has
    weight k^(n - 1).

    Args:
        reward_ratio, num_actions, formula, sync_rewards: as in :class:`CollaborationReward`.
        history_len: after so many samples a share has faded to a tenth.

    Examples:
        >>> reward = fastroute.RunningAverageCollaborationReward(0.5, num_actions=3)
        >>> reward.register_all(lambda: torch.zeros(4, 3, 5), torch.tensor([2, 2, 2, 2]))
        >>> reward.get_reward(torch.zeros(3), torch.tensor(2))
        tensor([0.5000])
    """

    def clear(self) -> None:
        """Forget what was registered."""
        super().clear()
        self._average: Tensor | None = None

    @property
    def average(self) -> Tensor:
        """[num_actions] float64: each action's faded share; zeros before the first sample."""
        if self._average is None:
            return torch.zeros(self._known_actions(), dtype=torch.float64, device="cpu")
        return self._average

    def saved(self) -> Tensor | None:
        """``average``, once it is known of how many actions."""
        return None if self.num_actions is None else self.average

    def restore(self, saved: Tensor) -> None:
        """Go on from other shares; ValueError where they are of other actions."""
        if tuple(saved.shape) != (self._known_actions(),) or not saved.is_floating_point():
            raise ValueError(f"average: expected shares of {self._known_actions()} actions, got {given(saved)}")
        if not saved.is_meta:
            self._average = saved.detach().to(torch.float64, copy=True)

    def register_all(self, dists: Callable[[], Tensor], actions: Tensor, active: Tensor | None = None) -> None:
        """Note a batch's actions [B], those of active samples [B]."""
        C, k, actions = self._known_actions(), 10 ** (-1 / self.history_len), actions.long()
        here = torch.ones_like(actions) if active is None else active.to(torch.int64)
        after = here.flip(0).cumsum(0).flip(0) - here  # active samples after this one
        if self._average is None:
            self._average = torch.zeros(C, dtype=torch.float64, device=actions.device)
        e = self._average.to(actions.device)
        weight = torch.where(here > 0, (1 - k) * k ** after.double(), 0.0)
        first = torch.where((here > 0) & (here.cumsum(0) == 1), weight.new_ones(()), 0)
        index = actions.clamp(0, C - 1)
        own = e.new_zeros(2, C).index_add(1, index, torch.stack([weight, first]))
        facts = torch.cat([own.flatten(), here.sum().double()[None]])[None]  # the same size in every process
        if (group := self._group()) is not None:
            facts = group.gather(facts[0])
        counts = facts[:, -1]
        later = counts.flip(0).cumsum(0).flip(0) - counts
        is_first = (counts > 0) & (counts.cumsum(0) == counts)  # of the first process with a sample
        n, never = counts.sum(), e.sum() == 0
        start = torch.where(never, k**n, 0) * (facts[:, C:-1] * is_first[:, None]).sum(0)
        self._average = e * k**n + (facts[:, :C] * k ** later[:, None]).sum(0) + start

    def by_action(self, actions: Tensor, like: Tensor) -> ByAction | None:
        """The faded share of each action, times ``reward_ratio``."""
        self._first_time()
        if self._average is None:
            return None
        return ByAction(actions, self._average.to(actions.device) * self.reward_ratio)


class ManualReward(PerActionBaseReward):
    """A table: action -> reward.

    Args:
        rewards: one number per action.
        num_actions: how many there are; has to be the length of ``rewards`` if given.

    Examples:
        >>> reward = fastroute.ManualReward([0.0, -0.1, -0.2])  # modules 1 and 2 cost something
        >>> reward.get_reward(torch.zeros(3), torch.tensor(2))
        tensor([-0.2000])
        >>> decide = fastroute.REINFORCE(3, 8, additional_reward_func=reward)
    """

    @checked
    def __init__(self, rewards: Sequence[float] | Tensor, num_actions: Count | None = None) -> None:
        super().__init__()
        device = rewards.device if isinstance(rewards, Tensor) else "cpu"  # not meta, where it would be lost
        self.table = torch.as_tensor(rewards, dtype=torch.float32, device=device).reshape(-1)
        if num_actions is not None and num_actions != len(self.table):
            raise ValueError(f"rewards: expected num_actions = {num_actions} of them, got {len(self.table)}")

    def check(self, choices: int) -> None:
        """ValueError if there are fewer rewards than choices."""
        if len(self.table) < choices:
            raise ValueError(f"rewards: expected one per choice, {choices}, got {len(self.table)}")

    def by_action(self, actions: Tensor, like: Tensor) -> ByAction | None:
        """The table's entries."""
        table = self.table.to(actions.device)
        if not table.is_meta:
            self.table = table
        return ByAction(actions, table)


def _in_bulk(reward: Any, bulk: str, single: str) -> bool:
    """Whether to call its method for batches, not the one for a sample: unless a subclass overrides only the latter."""
    if single in getattr(reward, "__dict__", {}):
        return False
    hooked = getattr(type(reward), "_fastroute_house", type(reward))  # in compat a user's ``bulk`` is something else
    for cls in type(reward).__mro__:
        if bulk in cls.__dict__ and issubclass(hooked, cls):
            return True
        if single in cls.__dict__:
            return False
    return False


def _call(reward: Any, name: str, *args: Any) -> Any:
    """A method for batches; of classes made from fastroute.compat's on what stands in for the object."""
    call = getattr(type(reward), "_fastroute_call", None)
    return getattr(reward, name)(*args) if call is None else call(reward, name, *args)


def saved(reward: Any) -> Tensor | None:
    """A copy of what a reward has counted: several decisions may share it."""
    made = reward.saved() if isinstance(reward, PerActionBaseReward) else None
    return None if made is None else made.detach().clone()


def restore(reward: Any, numbers: Any) -> None:
    """Give a reward what :func:`saved` gave; one that counts nothing needs none."""
    if saved(reward) is None:
        return
    if not isinstance(numbers, Tensor):
        raise ValueError(f"expected what a reward has counted, got {given(numbers)}")
    reward.restore(numbers)


def is_silent(reward: Any) -> bool:
    """Whether it gives nothing and notes nothing."""
    return reward is None or type(reward) is PerActionBaseReward


def check_reward(reward: Any, choices: int) -> Any:
    """A per-action reward object, or one with upstream's three methods."""
    if inspect.isclass(reward):
        raise TypeError(
            f"additional_reward_func: expected an object, got the class {reward.__name__}; write {reward.__name__}(...)"
        )
    if not isinstance(reward, PerActionBaseReward):
        lacking = [name for name in ("register", "clear", "get_reward") if not hasattr(reward, name)]
        if lacking:
            raise TypeError(
                f"additional_reward_func: expected register, clear and get_reward, {reward!r} lacks {lacking}"
            )
    else:
        _call(reward, "check", choices)
    return reward


def register(reward: Any, dists: Callable[[], Tensor], actions: Tensor, active: Tensor | None) -> None:
    """Tell a per-action reward what a batch did."""
    if is_silent(reward) or is_hollow(actions):  # explain, export: nothing happened
        return
    handed = _handed(reward)
    actions, active = handed(actions), handed(active)
    if _in_bulk(reward, "register_all", "register"):
        _call(reward, "register_all", dists, actions, active)
        return
    states = dists().detach()
    for b in range(len(actions)):
        if active is None or active[b]:
            reward.register(states[b : b + 1], actions[b])


def per_action_rewards(
    reward: Any, dists: Callable[[], Tensor], actions: Tensor, active: Tensor | None, like: Tensor
) -> Tensor | None:
    """[B] per-action rewards in the dtype of ``like``, or None where all are zero."""
    if is_silent(reward):
        return None
    handed = _handed(reward)
    actions = handed(actions)
    with torch.no_grad():
        if _in_bulk(reward, "rewards", "get_reward"):
            return handed(_call(reward, "rewards", dists, actions, handed(like)))
        states, total = dists().detach(), torch.zeros_like(like)
        for b in range(len(actions)):
            if active is None or active[b]:
                made = reward.get_reward(states[b : b + 1], actions[b])
                total[b] = _number("additional_reward_func", made, total).sum()
        return total


def action_formulas(rewards: Sequence[Any], actions: Sequence[Tensor], like: Tensor) -> list[ByAction | None]:
    """What the ``per_action_rewards`` of decisions are made of, where the op knows the formula; None elsewhere."""
    known = (ManualReward, CollaborationReward, RunningAverageCollaborationReward)
    once: dict[int, ByAction | None] = {}  # a table does not depend on whose reward it is
    found: list[ByAction | None] = []
    for reward, own in zip(rewards, actions, strict=True):
        if type(reward) not in known or has_own(reward, _BY_ACTION):
            found.append(None)
            continue
        if id(reward) not in once:
            with torch.no_grad():
                once[id(reward)] = reward.by_action(own, like)
        made = once[id(reward)]
        found.append(None if made is None else made._replace(actions=own))
    return found


__all__ = [
    "BaseReward",
    "CollaborationReward",
    "CorrectClassifiedReward",
    "ManualReward",
    "NegLossReward",
    "PerActionBaseReward",
    "RunningAverageCollaborationReward",
]
