"""Top-k gating: a decision for k modules per sample, with weights through which it learns.

Axes: B samples, k modules that each takes, N = B k entries, K modules, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import watching
from ..modules.reading import call, may_be_read, reset
from ..ops import dispatch, host
from ..ops.accumulating import Accumulating
from ..ops.arguments import Count, NotNegative, Options, checked
from ..ops.checks import at_least_zero, floating, is_number, samples, shown, tensor
from ..ops.dtypes import accumulating
from ..ops.host import may_look
from ..ops.masked import only
from ..ops.precision import autocast_off
from ..ops.processes import Processes
from ..ops.recomputation import draws_of, is_recomputation
from ..ops.softmax import softmax_of_few
from .decision_record import Mixture
from .decisions.base import Triplet, as_mask
from .sample_view import SampleMetaInformation
from .trajectory import Trajectory

Scores = Literal["softmax", "sigmoid"]


class Routed(NamedTuple):
    """What a gating decided for a batch."""

    actions: Tensor  #: [B, k] int64, -1 for no module
    weights: Tensor  #: [B, k] float32 or float64, 0 where the action is -1
    #: By name, [B], scaled; the mean over the batch is the loss. Empty where none are asked for.
    losses: dict[str, Tensor]
    counts: Tensor  #: [K] int64: entries of each module, before any was dropped for capacity; the group's, if any

    @property
    def loss(self) -> Tensor:
        """All losses of the batch in one number."""
        losses = [t.mean() if t.numel() else t.sum() for t in self.losses.values()]
        return torch.stack(losses).sum() if losses else self.weights.new_zeros(())


def _below_one(name: str, value: Any) -> float:
    if not at_least_zero(name, value) < 1:
        raise ValueError(f"{name}: expected a number below 1, got {value}")
    return float(value)


def _capacity(name: str, value: Any) -> float | None:
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}: expected a finite number above 0 or None, got {value}")
    return None if value is None else float(value)


class TopKGating(Options, Accumulating):
    """Chooses k of K modules per sample, the ones with the highest scores, and weights them by their scores.

    Shazeer et al. 2017 (arXiv 1701.06538). With z = W x the logits and s their softmax or sigmoid, the weights are
    w_j = s_a for the chosen a, divided by their sum if ``normalize``. (With k = 1 that is 1, and only the losses teach
    the router: Switch Transformers take k = 1 with ``normalize=False``.) Everything here is computed in float32, or
    float64, under autocast too.

    Args:
        num_selections: K.
        in_features: of a sample, an int or a tuple whose product is taken.
        k: modules per sample, 1 to K.
        scores: "softmax" over modules, or "sigmoid" of each (DeepSeek-AI 2024, arXiv 2412.19437).
        normalize: divide the weights of a sample by their sum.
        bias: of the router's linear layer.
        jitter: eps; in training the router sees its input times a uniform number from 1 - eps to 1 + eps (Fedus et al.
            2021).
        capacity: c; of a module's entries the first ceil(c N / K) are kept, all first choices before all second ones,
            in the order of samples; others are dropped (action -1). None: all are kept.
        balance_loss: alpha of the loss alpha K sum_k f_k P_k, f_k the share of entries of module k and P_k the mean of
            its score, normalised (Fedus, Zoph and Shazeer 2021, arXiv 2101.03961); alpha where both are even.
        z_loss: beta of the loss beta (log sum_k exp z_k)^2, mean over samples (Zoph et al. 2022, arXiv 2202.08906).
        bias_balancing: u; modules are chosen by s + b, and :func:`rebalance` moves b_k by u towards an even load (Wang
            et al. 2024, arXiv 2408.15664). b is no part of the weights.
        generator: of the jitter; None: PyTorch's own.

    Losses and weights are in the trajectory (``meta.mixtures``); ``Loss`` adds the losses to the routing loss, and
    elsewhere ``meta.aux_loss`` is to be added to one's own.

    Attributes:
        load_group: the processes whose samples count as one batch, in the order of ranks, for capacity and
            for the losses: f_k and the number of samples are then the group's, and the mean of the losses over its
            processes is the loss of the whole batch. ``fastroute.distributed`` sets it. None: this process alone.

    Parameters: ``router.weight`` [K, F], ``router.bias`` [K];
    buffers with ``bias_balancing``: ``selection_bias`` [K] and, not saved, ``counts`` [K].

    Examples:
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = fastroute.TopKGating(6, 8, k=2)(h, meta, agents)
        >>> y, meta, actions = fastroute.Selection(*(nn.Linear(8, 8) for _ in range(6)))(h, meta, actions)
        >>> (y.sum() + meta.aux_loss).backward()
        >>> actions.shape
        torch.Size([4, 2])
    """

    selection_bias: Tensor | None
    counts: Tensor | None
    _options = (
        "k", "scores", "normalize", "jitter", "capacity", "balance_loss", "z_loss", "bias_balancing", "generator",
    )  # fmt: skip

    @checked
    def __init__(
        self,
        num_selections: Count,
        in_features: Count | Sequence[Count],
        k: Count = 2,
        *,
        scores: Scores = "softmax",
        normalize: bool = True,
        bias: bool = False,
        jitter: Annotated[float, _below_one] = 0.0,
        capacity: Annotated[float | None, _capacity] = None,
        balance_loss: NotNegative = 0.01,
        z_loss: NotNegative = 0.0,
        bias_balancing: NotNegative = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K = self._num_selections = num_selections
        self.k = k
        self._in_features = in_features if isinstance(in_features, int) else math.prod(in_features)
        self.scores, self.normalize, self.jitter, self.capacity = scores, normalize, jitter, capacity
        self.balance_loss, self.z_loss = float(balance_loss), float(z_loss)
        self.bias_balancing = float(bias_balancing)
        self.generator = generator
        self.load_group: Processes | None = None
        self.router = nn.Linear(self._in_features, K, bias=bool(bias), device=device, dtype=dtype)
        balances = self.bias_balancing > 0
        made = torch.zeros(K, dtype=torch.float32, device=device) if balances else None
        self.register_buffer("selection_bias", made)
        counts = torch.zeros(K, dtype=torch.int64, device=device) if balances else None
        self.register_buffer("counts", counts, persistent=False)

    def _option(self, name: str, value: Any) -> Any:
        if name == "k" and value > self._num_selections:
            raise ValueError(f"k: expected at most num_selections, {self._num_selections}, got {value}")
        if name == "bias_balancing" and value > 0 and self._buffers.get("counts", self) is None:
            raise ValueError(f"{name}: expected 0, as the gating was made without it, got {value}; make another gating")
        return value

    def reset_parameters(self) -> None:
        """Draw the router anew; no load, and no bias, as at first."""
        reset(self.router)
        for buffer in (self.selection_bias, self.counts):
            if buffer is not None:
                nn.init.zeros_(buffer)

    def _set_unsaved(self) -> None:
        nn.init.zeros_(self.counts)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        shown = [f"num_selections={self._num_selections}", f"k={self.k}", f"scores={self.scores!r}"]
        for name, default in (("normalize", True), ("jitter", 0), ("capacity", None), ("bias_balancing", 0)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)}")
        return ", ".join([*shown, f"balance_loss={self.balance_loss}", f"z_loss={self.z_loss}"])

    def set_exploration(self, exploration: float) -> None:
        """Nothing to set: see ``jitter``."""

    def forward(
        self,
        batch: Tensor,
        meta: Trajectory | Sequence[SampleMetaInformation],
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
    ) -> Triplet:
        """Decide for every sample.

        Args:
            batch: [B, ...] floating, what the router looks at.
            meta: the batch's trajectory, in which actions, weights and losses are recorded.
            agents: not looked at, there is one router.
            mask: [B] bool; samples that are False take no module (actions -1) and no part in losses and counts.
            forced_actions: [B, k] integers: take these, weighted by their scores; -1 for no module. Their capacity is
                not looked at. ``normalize`` divides by the sum over the modules that there are.

        Returns:
            (batch, meta, actions [B, k] int64), the best module first. ``Selection`` finds the weights of these very
            actions in ``meta``.

        Raises:
            ValueError, TypeError, IndexError: naming the argument.
        """
        meta = Trajectory.of(meta, samples("batch", batch))
        made = self.route(batch, mask, forced_actions)
        active = as_mask(mask, batch.shape[0], batch.device)
        mixture = Mixture(
            self, made.actions, made.weights, self._num_selections, made.losses, active=active, counts=made.counts
        )
        actions = made.actions.clone()  # the user may write into what is returned, the record stays
        meta.mix(mixture, actions)
        return batch, meta, actions

    def route(
        self, x: Tensor, mask: Tensor | None = None, forced_actions: Tensor | None = None, *, losses: bool = True
    ) -> Routed:
        """The decision alone, for x [B, ...]; the arguments are ``forward``'s.

        With ``losses`` False there are none, nor counts (an empty tensor), unless processes make them together.
        """
        tensor("batch", x, "a tensor [B, ...]")
        floating("batch", x)
        B = x.shape[0]
        flat = x.flatten(1) if x.dim() > 1 else x[:, None]
        if flat.shape[1] != self._in_features:
            raise ValueError(f"batch: expected {self._in_features} features a sample, got {shown(x)}")
        active = as_mask(mask, B, x.device)
        forced = None if forced_actions is None else self._forced(forced_actions, B, x.device)
        with autocast_off(x.device.type):
            z = self._logits(flat, active)
            scores = softmax_of_few(z) if self.scores == "softmax" else z.sigmoid()
            actions = self._choose(z, scores) if forced is None else forced
            taken, kept = self._kept(actions, active, forced is None)
            weights = self._weights(z, scores, actions, None if forced is None else actions >= 0)
            learns = losses or self.load_group is not None
            own = self._entries(taken) if learns or (self.counts is not None and self.training) else taken.new_empty(0)
            counts, made = own, {}
            if learns:
                counts, share = self._load(own, active, B, z.dtype)
                made = self._losses(z, scores, counts, active, share)
        if self.counts is not None and self.training and not is_recomputation():
            looked_on = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
            if looked_on and not host.is_wrapped(self.counts):
                raise RuntimeError(
                    "counts: expected a call in eval, or buffers that are given to functional_call as the parameters "
                    "are: torch.func cannot change a buffer of the module"
                )
            with torch.no_grad():
                self.counts.add_(own)
        if kept is not None:
            actions, weights = torch.where(kept, actions, -1), torch.where(kept, weights, 0)
        watching.tell(self, "entries", actions, self._num_selections, active)
        return Routed(actions, weights, made, counts)

    def _forced(self, forced: Tensor, B: int, device: torch.device) -> Tensor:
        forced = dispatch.as_entries(forced, B, device, "forced_actions")
        K = self._num_selections
        if forced.shape[1] != self.k:
            raise ValueError(f"forced_actions: expected {self.k} per sample, [{B}, {self.k}], got {shown(forced)}")
        if may_look(forced) and B and int(forced.max()) >= K:
            raise IndexError(f"forced_actions: expected indices below {K}, got {int(forced.max())}")
        return torch.where((forced >= 0) & (forced < K), forced, -1)

    def _logits(self, x: Tensor, active: Tensor | None) -> Tensor:
        router = self.router
        is_read = type(router) is nn.Linear and may_be_read(router)
        to = accumulating(x.dtype)
        for p in (router.weight,) if is_read and router.bias is None else router.parameters():
            to = torch.promote_types(to, accumulating(p.dtype)) if p.is_floating_point() else to
        x = only(x.to(to), active)
        if self.jitter and self.training:
            noise = torch.rand(x.shape, dtype=to, device=x.device, **draws_of(self.generator))
            x = x * (1 + self.jitter * (2 * noise - 1))
        if is_read:
            bias = router.bias
            return F.linear(x, router.weight.to(to), None if bias is None else bias.to(to))
        z = call(router, x)
        tensor("router", z, "a module that gives a tensor")
        if z.shape != (x.shape[0], self._num_selections):
            raise ValueError(f"router: expected to return [{x.shape[0]}, {self._num_selections}], got {shown(z)}")
        return z.to(to)

    def _choose(self, z: Tensor, scores: Tensor) -> Tensor:
        by = z.detach() if self.selection_bias is None else scores.detach() + self.selection_bias
        return by.topk(self.k, dim=1).indices

    def _kept(self, actions: Tensor, active: Tensor | None, bounded: bool) -> tuple[Tensor, Tensor | None]:
        """Each entry's module before any is dropped, K for none, and which have one (None: all), [B, k]."""
        (B, k), K = actions.shape, self._num_selections
        valid = None if bounded and active is None else actions >= 0
        if valid is not None and active is not None:
            valid = valid & active[:, None]
        taken = actions if valid is None else torch.where(valid, actions, K)
        if self.capacity is None or not bounded:
            return taken, valid
        share = Fraction(self.capacity).limit_denominator(1 << 20)
        # rounded up; of what is negative, ONNX's division would round towards 0
        limit: Any = (B * k * share.numerator + share.denominator * K - 1) // (share.denominator * K)
        flat = torch.where(taken < K, taken, -1).mT.reshape(-1)  # first choices first
        plan = dispatch.plan(flat, K)
        rank = torch.arange(B * k, device=actions.device)
        modules = dispatch.module_of_row(plan.offsets, B * k)
        place = rank - plan.offsets.index_select(0, modules)
        if self.load_group is not None:
            ahead, entries = self._ahead(taken, self.load_group)
            place = place + ahead.reshape(-1).index_select(0, plan.order // max(B, 1) * (K + 1) + modules)
            limit = (entries * share.numerator + share.denominator * K - 1) // (share.denominator * K)
        fits = (modules < K) & (place < limit)
        return taken, torch.empty_like(fits).index_copy(0, plan.order, fits).view(k, B).mT

    def _entries(self, taken: Tensor) -> Tensor:
        """[K]: how many of [B, k] each module has."""
        ones = torch.ones_like(taken).reshape(-1)
        return ones.new_zeros(self._num_selections + 1).index_add(0, taken.reshape(-1), ones)[:-1]

    def _ahead(self, taken: Tensor, group: Processes) -> tuple[Tensor, Tensor]:
        """Of the group's entries that come before this process's j-th choices of a module, those of others.

        taken [B, k], K for none -> (ahead [k, K + 1], how many entries the group has []).
        """
        k, K1 = taken.shape[1], self._num_selections + 1
        slots = (taken + K1 * torch.arange(k, device=taken.device)).reshape(-1)
        own = slots.new_zeros(k * K1).index_add(0, slots, torch.ones_like(slots))
        each = group.gather(torch.cat([own, own.sum()[None]]))
        here, all_of = group.rank, each[:, :-1].view(-1, k, K1)
        mine, total = all_of[here], all_of.sum(0)
        before = all_of[:here].sum(0) + (total.cumsum(0) - total) - (mine.cumsum(0) - mine)
        return before, each[:, -1].sum()

    def _load(self, own: Tensor, active: Tensor | None, B: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(entries by module, what a sample's losses are multiplied by, if at all): the group's, if there is one."""
        if self.load_group is None:
            return own, None if active is None else B / active.sum().clamp(min=1).to(dtype)
        samples = own.new_full((1,), B) if active is None else active.sum().reshape(1)
        counts = self.load_group.sum(torch.cat([own, samples]))
        return counts[:-1], B * self.load_group.size / counts[-1].clamp(min=1).to(dtype)

    def _weights(self, z: Tensor, scores: Tensor, actions: Tensor, valid: Tensor | None) -> Tensor:
        at = actions if valid is None else actions.clamp(min=0)
        if not self.normalize:
            picked = scores.gather(1, at)
        elif self.scores == "softmax":  # of the picked alone: the same, without their sum's rounding
            picked = softmax_of_few(only(z.gather(1, at), valid, torch.finfo(z.dtype).min))
        else:
            picked = only(scores.gather(1, at), valid)
            picked = picked / picked.sum(1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        return only(picked, valid)

    def _losses(
        self, z: Tensor, scores: Tensor, counts: Tensor, active: Tensor | None, scale: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every sample, times B over the active ones: the mean over the batch is that over them."""
        made = {}
        if self.balance_loss:
            share = counts.to(z.dtype) / counts.sum().clamp(min=1)
            p = scores if self.scores == "softmax" else scores / scores.sum(1, keepdim=True).clamp(min=1e-20)
            made["balance"] = self.balance_loss * self._num_selections * (p @ share)
        if self.z_loss:
            made["z"] = self.z_loss * z.logsumexp(1).square()
        if scale is not None:
            made = {name: only(loss, active) * scale for name, loss in made.items()}
        return made

    @torch.no_grad()
    def rebalance(self, group: Any = None) -> None:
        """Move the selection bias against the load since the last time: b_k += u sign(mean count - count of k).

        Once per optimizer step. Nothing without ``bias_balancing``. (DistributedDataParallel copies the first process's
        buffers to the others at each forward pass: with gradient accumulation give it ``broadcast_buffers=False``.)

        Args:
            group: of torch.distributed processes whose counts are summed; None: the default group, if there is one.
        """
        if self.counts is None or self.selection_bias is None:
            return
        counts = self.counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts, group=group)
        load = counts.to(self.selection_bias.dtype)
        self.selection_bias.add_(self.bias_balancing * torch.sign(load.mean() - load))
        counts.zero_()


@checked
def rebalance(model: nn.Module, group: Any = None) -> None:
    """``TopKGating.rebalance`` for every gating of a model, once per optimizer step.

    ``optimizer.register_step_post_hook(lambda *_: rebalance(model))`` does it.

    Args:
        model: whatever has gatings in it; those without ``bias_balancing`` stay as they are.
        group: of torch.distributed processes whose counts are summed; None: the default group, if there is one.

    Examples:
        >>> layer = fastroute.MoE(8, 16, num_experts=4, balance_loss=0.0, bias_balancing=1e-3)
        >>> y = layer(torch.randn(32, 8))
        >>> fastroute.rebalance(layer)  # after the optimizer's step
        >>> layer.gate.selection_bias.abs().max() > 0
        tensor(True)
    """
    for m in model.modules():
        if isinstance(m, TopKGating):
            m.rebalance(group)
