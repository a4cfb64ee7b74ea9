"""Apply to every sample the module that its action names, or a weighted sum of several.

Axes: B samples, k modules that each takes, N = B k entries, K modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import combine
from ..modules import watching
from ..ops import dispatch, host
from ..ops.arguments import Options, checked
from ..ops.checks import as_tensor, floating, samples, shown, tensor
from . import grouped_modules
from .decisions.base import as_mask
from .sample_view import SampleMetaInformation
from .stacked_modules import Stack, from_stack
from .trajectory import Trajectory


class Selection(Options, nn.Module):
    """K modules. Every sample goes through the one that its action names, or through k of them.

    With actions [B, k] it is a mixture: y_b = sum_j w_bj module_a(x_b) over the sample's actions a = a_bj.

    Modules that do the same with parameters of the same shapes run together, see ``grouped_modules.run``; each keeps
    its own parameters, under ``_submodules.{k}``.

    Args:
        modules: K of them, whose outputs have one shape. A single one is applied to all samples, whatever their
            action and the mask, as upstream.
        name: stored only.
        store_module_pointers: note in every sample's step the module it took, as ``selected_modules``.
        dropped: what comes of samples of whose actions none names a module (negative, or masked out): "zero" rows
            without gradient, as upstream, or "identity": the input row.
        unused_grad: of a module that no sample took: "none" leaves its gradients None, so that optimizers skip it, as
            upstream; "zeros" makes them zeros. On a GPU and under torch.compile, where counting would wait, they are
            zeros in any case.
        stacked: keep the modules' parameters in one tensor of each kind, see :class:`~fastroute.networks.Stack`: steps
            and optimizers then cost the same whatever K is. Modules that no sample took then have zeros for gradients.
            The modules have to do the same with parameters of the same shapes. State dicts load both ways: the keys are
            ``_submodules.pattern.{name}``, [K, ...].

    Examples:
        >>> modules = [nn.Linear(8, 2) for _ in range(3)]
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> y, meta, actions = fastroute.Selection(*modules)(h, meta, torch.tensor([0, 2, 2, 1]))
        >>> torch.allclose(y[1], modules[2](h[1]), atol=1e-6)
        True
    """

    _options = ("store_module_pointers", "dropped", "unused_grad")

    @checked
    def __init__(
        self,
        *modules: nn.Module,
        name: str = "",
        store_module_pointers: bool = False,
        dropped: Literal["zero", "identity"] = "zero",
        unused_grad: Literal["none", "zeros"] = "none",
        stacked: bool = False,
    ) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], (list, tuple, nn.ModuleList)):
            modules = tuple(modules[0])
        if not modules or not all(isinstance(m, nn.Module) for m in modules):
            raise TypeError(f"Selection: expected one or more modules, got {[type(m).__name__ for m in modules]}")
        self._submodules = Stack(modules) if stacked and len(modules) > 1 else nn.ModuleList(modules)
        self._recipe = grouped_modules.Recipe()
        self.name, self.store_module_pointers = name, bool(store_module_pointers)
        self.dropped, self.unused_grad = dropped, unused_grad
        self._log: set[int] | None = None
        self.last_selection_freeze: list[int] | None = None

    def extra_repr(self) -> str:
        return f"dropped={self.dropped!r}, unused_grad={self.unused_grad!r}"

    def forward(
        self,
        batch: Tensor,
        meta: Trajectory | Sequence[SampleMetaInformation],
        actions: Tensor | Sequence[int] | None,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Trajectory, Tensor | None]:
        """Apply the modules.

        Args:
            batch: [B, ...].
            meta: the batch's trajectory; passed on.
            actions: [B] or [B, 1] integers, of a decision, or [B, k]. May be None with a single module.
            mask: [B] bool; samples that are False are dropped. Not looked at with a single module.
            weights: floating, of actions' shape: makes [B] and [B, 1] a mixture as well. None: those that a
                ``TopKGating`` gave with these very actions; without a gating ones. Actions that name no module add
                nothing, whatever their weight; the same module twice adds twice.

        Returns:
            (y [B, ...], meta, actions). dtype and shape are those of the modules' outputs; a mixture is summed in
            float32 for half precision.

        Raises:
            IndexError: an action of K or more; on a GPU such samples are dropped instead, unless ``strict``.
            ValueError, TypeError: naming the argument; outputs of different shapes; actions [B, k] that are not those
                of the trajectory's gating, without weights.
        """
        B, K = samples("batch", batch), len(self._submodules)
        meta = Trajectory.of(meta, B)
        if self.store_module_pointers:
            meta.point_to(self._submodules)
        if actions is not None:
            actions = as_tensor("actions", actions, batch.device)
        if actions is not None and (weights is not None or actions.dim() == 2):
            if weights is None:
                weights = meta.weights_of(actions)
            if weights is not None or actions.shape[1] != 1:
                return self._mixture(batch, actions, weights, mask), meta, actions
        if K == 1 and weights is None:
            return self._of_one(batch), meta, actions
        if actions is None:
            raise ValueError(f"actions: expected one per sample to choose among {K} modules by, got None")
        chosen = dispatch.as_actions(actions, B, batch.device)
        active = as_mask(mask, B, batch.device)
        if active is not None:
            chosen = torch.where(active, chosen, -1)
        y, plan = self._run(batch, chosen)
        if self.dropped == "identity":
            y = self._passed(y, batch, grouped_modules.kept(plan, B))
        return y, meta, actions

    def _mixture(self, batch: Tensor, actions: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
        B, K = batch.shape[0], len(self._submodules)
        if weights is not None:
            tensor("weights", weights, "a floating-point tensor of actions' shape")
            floating("weights", weights)
            if weights.shape != actions.shape:
                raise ValueError(f"weights: expected one per action, {shown(actions)}, got {shown(weights)}")
            weights = weights[:, None] if weights.dim() == 1 else weights
        chosen = dispatch.as_entries(actions[:, None] if actions.dim() == 1 else actions, B, batch.device)
        k = chosen.shape[1]
        active = as_mask(mask, B, batch.device)
        if active is not None:
            chosen = torch.where(active[:, None], chosen, -1)
        y, plan = self._run(batch, chosen)
        all_kept = plan.bounds is not None and plan.bounds[-1] == B * k
        valid = None if all_kept else (chosen >= 0) & (chosen < K)
        if weights is None:
            weights = torch.ones(B, k, device=y.device)
        y = combine(y.reshape(B, k, *y.shape[1:]), weights.to(y.device), valid)
        return y if self.dropped == "zero" else self._passed(y, batch, None if valid is None else valid.any(1))

    def _of_one(self, batch: Tensor) -> Tensor:
        """What a single module gives."""
        if self._log is not None:
            self._log.add(0)
        return self._submodules[0](batch)

    def _run(self, batch: Tensor, chosen: Tensor) -> tuple[Tensor, dispatch.Plan]:
        """chosen [B] or [B, k] -> (what its module gives for every entry [N, ...], the plan)."""
        K = len(self._submodules)
        if self._log is not None and not chosen.is_meta:
            self._log.update(a for a in host.read(chosen.reshape(-1)) if 0 <= a < K)
        watching.tell(self, "entries", chosen, K, None)
        return self._routed(batch, chosen)

    def _routed(self, batch: Tensor, chosen: Tensor) -> tuple[Tensor, dispatch.Plan]:
        """As ``_run``, which has noted the selections."""
        modules, keep_empty = self._submodules, self.unused_grad == "zeros"
        each, called = list(modules._modules.values()), None
        if isinstance(modules, Stack):
            each, called = [modules.pattern], modules.each
        return grouped_modules.run_actions(
            each, batch, chosen, len(modules), self._recipe, keep_empty=keep_empty, called=called
        )

    def _passed(self, y: Tensor, batch: Tensor, kept: Tensor | None) -> Tensor:
        """The input where nothing was applied."""
        if kept is None:
            return y
        if y.shape != batch.shape:
            raise ValueError(
                f"dropped='identity': expected modules that keep the shape {list(batch.shape)}, "
                f"these give {list(y.shape)}"
            )
        return torch.where(kept.reshape(-1, *[1] * (y.dim() - 1)), y, batch.to(y.dtype))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not isinstance(self._submodules, Stack):
            from_stack(state_dict, f"{prefix}_submodules.", len(self._submodules))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def start_logging_selections(self) -> None:
        """Note from now on which modules are taken. (On a GPU this waits for the device in every forward.)"""
        self._log = set()

    def stop_logging_and_get_selections(self, add_to_old: bool = False) -> list[int]:
        """The distinct modules taken since ``start_logging_selections``, also kept as ``last_selection_freeze``.

        Args:
            add_to_old: together with those of the last time.
        """
        found = set() if self._log is None else self._log
        if add_to_old:
            found = found | set(self.last_selection_freeze or ())
        self._log, self.last_selection_freeze = None, sorted(found)
        return list(self.last_selection_freeze)
