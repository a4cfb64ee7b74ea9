"""The loss of a routed network: the modules', and what the decisions learn from it.

Axes: B samples, T decisions recorded for the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import trajectory_loss
from ..modules.reading import may_be_read
from ..ops.arguments import Options, Share, checked
from ..ops.checks import are_alike, flag, floating, samples, tensor
from ..ops.recomputation import is_recomputation
from ..ops.trajectory_loss.op import SILENT, makes_rewards, rewarded_loss
from .decision_record import Record
from .loss_entries import Entries, Need, Step, known_losses, reduce, rows_of
from .rewards import Formula, action_formulas, check_formula, final_formula, final_rewards, per_action_rewards
from .sample_view import SampleMetaInformation
from .trajectory import Trajectory

_Samples = Trajectory | Sequence[SampleMetaInformation]


class Loss(Options, nn.Module):
    """The modules' loss, and the decisions' loss on the rewards that follow from it.

    Args:
        pytorch_loss_func: a loss module, or a function of (ysest, ystrue) with a ``reduction`` argument or with one
            loss per sample as its result.
        routing_reward_func: of a sample's final reward f, see ``rewards``; a function is called for one sample with
            (loss [1], yest [1, ...], ytrue [1, ...]).
        discounting: gamma, of rewards and of what comes next. (Upstream takes no notice of it: ``formula="upstream"``.)
        clear: clear the per-action rewards' memory after each call.
        normalize_per_action_rewards: multiply them by \\|f\\|.
        formula: "intended" or "upstream". The decisions have formulas of their own.

    A decision's reward is r_t = (its per-action reward + what was added) / T_b, the last one's that plus f, T_b being
    how many decisions were recorded for the sample; R_t = sum_s gamma^(s - t) r_s. A sample's routing loss is the sum
    over its decisions of what each class defines. A sample without a decision has routing loss 0.

    Examples:
        >>> loss = fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward())
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.REINFORCE(3, 8)(h, meta, agents)
        >>> y, meta, actions = fastroute.Selection(*(nn.Linear(8, 2) for _ in range(3)))(h, meta, actions)
        >>> module_loss, routing_loss = loss(y, meta, torch.tensor([0, 1, 1, 0]))
        >>> (module_loss + routing_loss).backward()
    """

    _options = ("discounting", "clear", "normalize_per_action_rewards", "formula")
    _known: tuple[Any, bool] | None = None  #: a loss function, and whether it takes ``reduction``

    @checked
    def __init__(
        self,
        pytorch_loss_func: Any,
        routing_reward_func: Any,
        discounting: Share = 1.0,
        clear: bool = False,
        normalize_per_action_rewards: bool = True,
        *,
        formula: Formula = "intended",
    ) -> None:
        super().__init__()
        for name, one in (("pytorch_loss_func", pytorch_loss_func), ("routing_reward_func", routing_reward_func)):
            if inspect.isclass(one):
                raise TypeError(f"{name}: expected objects, got a class; write {one.__name__}(...)")
        if not callable(pytorch_loss_func):
            raise TypeError(f"pytorch_loss_func: expected a loss module or a function, got {pytorch_loss_func!r}")
        if not callable(routing_reward_func):
            raise TypeError(f"routing_reward_func: expected a reward object or a function, got {routing_reward_func!r}")
        self.pytorch_loss_func = pytorch_loss_func
        if not isinstance(pytorch_loss_func, nn.Module):
            self._known = pytorch_loss_func, _takes_reduction(pytorch_loss_func)
        self.routing_reward_func = routing_reward_func
        self.discounting, self.clear = float(discounting), bool(clear)
        self.normalize_per_action_rewards = bool(normalize_per_action_rewards)
        self.formula = check_formula(formula)

    def forward(
        self,
        ysest: Tensor,
        mys: _Samples | Tensor,
        ystrue: Tensor | _Samples | None = None,
        external_losses: Tensor | None = None,
        reduce: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(module_loss, routing_loss), both means over the batch.

        Args:
            ysest: [B, ...], the network's outputs.
            mys: their trajectory. The READMEs' order (ysest, ystrue, mys) is understood as well.
            ystrue: [B, ...], the targets. May be None with ``external_losses``. Floating-point ones get the
                prediction's shape, where that differs by axes of one element.
            external_losses: [B, ...], losses made elsewhere; those of a sample are summed.
            reduce: False for the vectors [B] instead of their means.

        Of an empty batch both are 0. A NaN in one sample's loss is in the means; with ``reduce=False`` it is in that
        sample alone (upstream's formulas that mix samples excepted).
        """
        routed: Any = mys
        truth: Any = ystrue
        if isinstance(mys, Tensor) or _is_meta(ystrue):
            routed, truth = ystrue, mys
        if not _is_meta(routed):
            raise TypeError(f"mys: expected a Trajectory or a list of its samples, got {type(routed).__name__}")
        meta = Trajectory.of(routed)
        B = meta.size
        flag("reduce", reduce)
        if samples("ysest", ysest) != B:
            raise ValueError(f"ysest: expected one row per sample of the trajectory, {B}, got {list(ysest.shape)}")
        losses = self._losses(ysest, truth, external_losses, B)
        routing = self._routing(meta, losses, ysest, truth)
        if (aux := meta.aux_losses()) is not None:  # what top-k gatings ask for
            routing = routing + aux
        if self.clear and not is_recomputation():
            for reward in {id(r.reward): r.reward for r in meta.records if r.reward is not None}.values():
                reward.clear()
        if not reduce:
            return losses, routing
        return (losses.mean(), routing.mean()) if B else (losses.sum(), routing.sum())

    # ------------------------------------------------------------------------------------------------ modules' losses

    def _losses(self, ysest: Tensor, ystrue: Tensor | None, external: Tensor | None, B: int) -> Tensor:
        if external is not None:
            tensor("external_losses", external, "a tensor [B, ...]")
            floating("external_losses", external)
            if external.shape[:1] != (B,):
                raise ValueError(f"external_losses: expected one row per sample, {B}, got {list(external.shape)}")
            return external.flatten(1).sum(1) if external.dim() > 1 else external
        if ystrue is None:
            raise ValueError("ystrue: expected the targets (or external_losses), got None")
        tensor("ystrue", ystrue, "a tensor [B, ...]")
        if ystrue.shape[:1] != (B,):
            raise ValueError(f"ystrue: expected one row per sample, {B}, got {list(ystrue.shape)}")
        alike = self.formula == "intended" and ysest.shape != ystrue.shape and are_alike(ysest, ystrue)
        # PyTorch would broadcast [B, 1] against [B] to [B, B]; integers may be classes, which have a shape of their own
        made = self._unreduced(ysest, ystrue.reshape(ysest.shape) if alike and ystrue.is_floating_point() else ystrue)
        if made.shape[:1] != (B,) or (alike and made.numel() > ysest.numel()):
            raise ValueError(
                f"pytorch_loss_func: expected one loss per sample, {B}, got shape {list(made.shape)} of ysest "
                f"{list(ysest.shape)} and ystrue {list(ystrue.shape)}; give a loss module, or a function that takes "
                "reduction='none', and targets of the prediction's shape"
            )
        return made.flatten(1).sum(1) if made.dim() > 1 else made

    def _unreduced(self, ysest: Tensor, ystrue: Tensor) -> Tensor:
        """What the loss function gives without its reduction over the batch, which the user's object keeps."""
        function: Any = self.pytorch_loss_func
        if isinstance(function, nn.Module):
            if not hasattr(function, "reduction"):
                return function(ysest, ystrue)
            of_torch = type(function).__module__ == nn.MSELoss.__module__  # whose losses keep nothing of a call
            if not of_torch or torch.compiler.is_compiling() or not may_be_read(function):  # Dynamo copies no module
                holder: Any = function
                if isinstance(getattr(function, "_orig_mod", None), nn.Module):  # torch.compile's
                    holder = function._orig_mod
                before, holder.reduction = holder.reduction, "none"
                try:
                    return function(ysest, ystrue)
                finally:
                    holder.reduction = before
            one: Any = object.__new__(type(function))  # as copy.copy, in a third of its time
            one.__dict__.update(function.__dict__)
            one.reduction = "none"
            return one(ysest, ystrue)
        if self._known is None or self._known[0] is not function:
            self._known = function, _takes_reduction(function)
        return function(ysest, ystrue, reduction="none") if self._known[1] else function(ysest, ystrue)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}_per_sample.")]:
            del state_dict[key]  # of 0.2.0, which kept the loss function twice
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---------------------------------------------------------------------------------------------- decisions' losses

    def _routing(self, meta: Trajectory, losses: Tensor, ysest: Tensor, ystrue: Tensor | None) -> Tensor:
        if makes_rewards(losses) and (at_once := self._with_rewards(meta, losses, ysest, ystrue)) is not None:
            return at_once
        f = final_rewards(self.routing_reward_func, losses, ysest, ystrue)
        meta.check_foreign()
        meta.finish(f)
        records = meta.records
        if not records:
            return torch.zeros_like(losses.detach())
        if self.formula == "intended" and (kinds := known_losses(records)) is not None:
            made = self._in_one(kinds, meta, records, f)
        else:
            made = self._by_layer(meta, records, f)
        return torch.zeros_like(losses.detach()) if made is None else made

    def _in_one(self, kinds: list[str], meta: Trajectory, records: list[Record], f: Tensor) -> Tensor | None:
        """One op for all decisions, of classes that it knows."""
        if all(kind == SILENT for kind in kinds):
            return None
        rows = rows_of(records, f.dtype)
        own = [_expanded(self._own_reward(meta, t, record, f), f) for t, record in enumerate(records)]
        return trajectory_loss(
            kinds, rows.s0, rows.s1, rows.aux, own, rows.look, [r.active for r in records], f, self.discounting,
            self.normalize_per_action_rewards, choices=[r.choices for r in records],
        )  # fmt: skip

    def _with_rewards(self, meta: Trajectory, losses: Tensor, ysest: Tensor, ystrue: Tensor | None) -> Tensor | None:
        """``_in_one`` of losses, which makes the rewards as well; None where it does not know them."""
        records, final = meta.records, final_formula(self.routing_reward_func, losses, ysest, ystrue)
        kinds = known_losses(records) if records and final is not None and self.formula == "intended" else None
        if final is None or kinds is None or all(kind == SILENT for kind in kinds):
            return None
        meta.check_foreign()
        like = final.losses
        rows = rows_of(records, like.dtype)
        by = action_formulas([r.reward for r in records], [r.actions for r in records], like)
        own = [
            meta.added_rewards(t, like) if by[t] is not None else self._own_reward(meta, t, record, like)
            for t, record in enumerate(records)
        ]
        made, f = rewarded_loss(
            kinds, rows.s0, rows.s1, rows.aux, [_expanded(reward, like) for reward in own], by, rows.look,
            [r.active for r in records], final, self.discounting, self.normalize_per_action_rewards,
            choices=[r.choices for r in records],
        )  # fmt: skip
        meta.finish(f)
        return made

    def _by_layer(self, meta: Trajectory, records: list[Record], f: Tensor) -> Tensor | None:
        """Every layer's own ``loss``."""
        total: Tensor | None = None
        steps = self._steps(meta, records, f)
        gamma = self._gamma
        layers: dict[Any, list[int]] = {}
        for t, record in enumerate(records):
            shares = getattr(type(record.law), "_fastroute_shares", None)
            shared = None if shares is None else shares(record)
            own = id(record.decision), len(record.columns)  # RELAX has fewer in eval
            layers.setdefault(own if shared is None else shared, []).append(t)
        for of_layer in layers.values():
            entries = Entries([records[t] for t in of_layer], [steps[t] for t in of_layer], gamma)
            made = records[of_layer[0]].law.loss(entries)
            if made is None:
                continue
            active = entries.active
            if active is not None:
                made = torch.where(active, made, 0)
            if len(of_layer) > 1:
                made = made.reshape(len(of_layer), meta.size).sum(0)
            total = made if total is None else total + made
        return total

    @property
    def _gamma(self) -> float:
        return 1.0 if self.formula == "upstream" else self.discounting

    def _steps(self, meta: Trajectory, records: list[Record], f: Tensor) -> list[Step]:
        rewards = [self._own_reward(meta, t, record, f) for t, record in enumerate(records)]
        masked = any(r.active is not None for r in records)
        if any(reward is not None for reward in rewards):
            counts: Tensor | int = meta.active.sum(0).clamp(min=1) if masked else len(records)
            scale = (f.abs() if self.normalize_per_action_rewards else torch.ones_like(f)) / counts
            rewards = [None if reward is None else reward * scale for reward in rewards]
        needs = set().union(*(r.law.lookahead for r in records))
        return self._masked(records, rewards, f, needs) if masked else self._full(records, rewards, f, needs)

    @staticmethod
    def _own_reward(meta: Trajectory, t: int, record: Record, f: Tensor) -> Tensor | None:
        own = per_action_rewards(record.reward, record.states, record.actions, record.active, f)
        added = meta.added_rewards(t, f)
        if own is None or added is None:
            return added if own is None else own
        return own + added

    def _full(self, records: list[Record], rewards: list[Tensor | None], f: Tensor, needs: set[Need]) -> list[Step]:
        """Every sample has every decision."""
        gamma, last = self._gamma, len(records) - 1
        steps: list[Step] = []
        ahead: dict[Need, Tensor] = {}
        R, zero = f, torch.zeros_like(f) if any(own is None for own in rewards[:-1]) else f
        for t in reversed(range(len(records))):
            record, own = records[t], rewards[t]
            if t == last:
                r = f if own is None else own + f
                R = r
            else:
                r = zero if own is None else own
                R = R if gamma == 1 else R * gamma
                R = R if own is None else R + own
            cut = t == last or records[t + 1].choices != record.choices
            steps.append(Step(r, R, f, t == last, cut, ahead))
            if t:
                ahead = {need: reduce(record, need, f.dtype) for need in needs}
        return steps[::-1]

    def _masked(self, records: list[Record], rewards: list[Tensor | None], f: Tensor, needs: set[Need]) -> list[Step]:
        """A sample's next decision is the next one it was active in."""
        gamma = self._gamma
        steps: list[Step] = []
        more = torch.zeros_like(f, dtype=torch.bool)
        choices = torch.zeros_like(records[0].actions)
        R = torch.zeros_like(f)
        ahead: dict[Need, Tensor] = {}
        for t in reversed(range(len(records))):
            record = records[t]
            active = torch.ones_like(more) if record.active is None else record.active
            r = torch.where(more, 0, f)
            if (own := rewards[t]) is not None:
                r = r + own
            R_here = r + gamma * R
            steps.append(Step(r, R_here, f, ~more, ~more | (choices != record.choices), dict(ahead)))
            R = torch.where(active, R_here, R)
            for need in needs:
                ahead[need] = _latest(active, reduce(record, need, f.dtype), ahead.get(need))
            choices = torch.where(active, record.choices, choices)
            more = more | active
        return steps[::-1]


def _expanded(reward: Tensor | None, like: Tensor) -> Tensor | None:
    return reward if reward is None or reward.shape == like.shape else reward.expand(like.shape)


def _latest(active: Tensor, here: Tensor, after: Tensor | None) -> Tensor:
    """``here`` where the sample is active, else what comes after; of states [B, K, ...] with the K of ``here``."""
    rows = active.reshape(-1, *[1] * (here.dim() - 1))
    if after is None:
        return torch.where(rows, here, 0)
    if here.dim() > 1 and after.shape[1] != here.shape[1]:  # a change of K cuts: nobody reads the others' rows
        after = torch.cat([after, here.new_zeros(here.shape)], 1)[:, : here.shape[1]]
    return torch.where(rows, here, after)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Trajectory) or (
        isinstance(value, (list, tuple)) and all(isinstance(v, SampleMetaInformation) for v in value)
    )


def _takes_reduction(function: Any) -> bool:
    try:
        return "reduction" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
