"""A layer whose beta_ign may be its beta_use: one parameter, which a state dict has under both names, as upstream's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class SingleBeta(nn.Module):
    """The parameters ``beta_use`` and ``beta_ign``; or the first alone, and a buffer that repeats it in state dicts.

    One parameter under two names would come apart on the meta device, and with ``load_state_dict(assign=True)``.
    """

    single_beta: bool
    beta_use: nn.Parameter

    def _make_betas(self, single_beta: bool, *size: int, **factory: Any) -> None:
        self.single_beta = single_beta
        self.beta_use = nn.Parameter(torch.empty(size, **factory))
        if single_beta:
            self._buffers["beta_ign"] = torch.empty(size, **factory)  # a name that the class has: the property below
        else:
            self._parameters["beta_ign"] = nn.Parameter(torch.empty(size, **factory))

    @property
    def beta_ign(self) -> nn.Parameter:
        """``beta_use`` itself, if they are one."""
        if self.single_beta:
            return self.beta_use
        found: Any = self._parameters.get("beta_ign", self.__dict__.get("_made_beta_ign"))
        if found is None:  # as while it is parametrized or pruned
            raise AttributeError(f"{type(self).__name__} has no parameter beta_ign")
        return found

    @beta_ign.setter
    def beta_ign(self, made: Tensor) -> None:
        """What pruning and older normalisations make of other parameters, before each call."""
        self.__dict__["_made_beta_ign"] = made

    @beta_ign.deleter
    def beta_ign(self) -> None:
        self.__dict__.pop("_made_beta_ign", None)

    def _reset_betas(self) -> None:
        nn.init.zeros_(self.beta_use)
        nn.init.zeros_(cast(Tensor, (self._buffers if self.single_beta else self._parameters)["beta_ign"]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.single_beta:
            self._buffers["beta_ign"] = self.beta_use.detach().clone()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        use, ign = state_dict.get(prefix + "beta_use"), state_dict.get(prefix + "beta_ign")
        if self.single_beta and isinstance(use, Tensor):
            known = type(ign) in (Tensor, nn.Parameter) and not (ign.is_meta or use.is_meta)
            if known and not torch.equal(use, ign.to(use)):
                *_, error_msgs = args
                error_msgs.append(
                    f"{prefix}beta_ign: expected the values of beta_use, which are one with single_beta=True"
                )
            state_dict[prefix + "beta_ign"] = use.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
