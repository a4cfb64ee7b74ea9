"""The base of rewards for single actions, and the default: none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastroute import networks

from ..._names import OwnNames


class PerActionBaseReward(OwnNames, networks.PerActionBaseReward):
    """``fastroute.networks.PerActionBaseReward`` with upstream's histories for classes that are made from it.

    ``_dists`` and ``_actions`` have the last ``history_window`` states [1, K, 5] and actions [], the latest last.
    (The classes of this package read neither, so that theirs stay empty.)
    """

    _dists: deque[Tensor]
    _actions: deque[Tensor]

    def clear(self) -> None:
        """Forget what was registered."""
        super().clear()
        self._dists, self._actions = deque(maxlen=self.history_window), deque(maxlen=self.history_window)
        self._precomp: Any = None

    @property
    def _hist_len(self) -> int:
        return self.history_window

    def register(self, dist: Tensor, action: Tensor) -> None:
        """Note one sample's state [1, K, 5] and action []."""
        self._fastroute_call("register_all", lambda: dist, networks.PerActionBaseReward._action(dist, action))

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        """[1]: the reward of one action."""
        stands = self._fastroute_stands()
        if stands is not self:
            return stands.get_reward(dist, action)  # type: ignore[no-any-return]
        return super().get_reward(dist, action)

    def register_all(self, dists: Callable[[], Tensor], actions: Tensor, active: Tensor | None = None) -> None:
        """Note a batch's actions [B], those of active samples [B]; ``dists()`` are their states [B, K, 5]."""
        super().register_all(dists, actions, active)
        if type(self) is self._fastroute_house and "_fastroute_of" not in self.__dict__:
            return
        states = dists().detach()
        rows: Sequence[int] = range(len(actions)) if active is None else active.nonzero()[:, 0].tolist()
        for b in rows[-self.history_window :]:
            self._dists.append(states[b : b + 1])
            self._actions.append(actions[b].detach())


__all__ = ["PerActionBaseReward"]
