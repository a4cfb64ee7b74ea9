"""Parameters that lie side by side in memory, so that many are one tensor without a copy.

Axes: T networks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _is_own(p: Tensor) -> bool:
    """A parameter that nobody else has arranged: the only one in its memory, which no other process shares."""
    if type(p) is not nn.Parameter or p.device.type not in ("cpu", "cuda") or not p.is_leaf:
        return False
    alone = p.untyped_storage().nbytes() == p.numel() * p.element_size()
    return alone and not (p.device.type == "cpu" and p.is_shared())


#: Of two threads that would move the same parameters, the second finds them moved.
_moving = threading.Lock()


class SideBySide:
    """The parameters of T networks, each kind in one tensor whose parts the parameters are.

    They are moved there when they are first asked for, and again when ``.to()``, a deep copy or a loaded checkpoint has
    parted them: where they are is looked up at every call. They stay the modules' own Parameters. Parameters that
    somebody else may have put somewhere (a flat optimizer, shared memory, anybody in a process group) stay there.

    Args:
        T: how many lie side by side.
        before: others that have moved some of these parameters.
    """

    def __init__(self, T: int, before: Sequence[SideBySide] = ()) -> None:
        self.T = T
        self._ours = [t for other in before for t in other._whole]
        self._known: tuple[list[Tensor], list[int]] = [], []  # the whole, and where its parts are; replaced together

    @property
    def _whole(self) -> list[Tensor]:
        return self._known[0]

    def __call__(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Each T of them as one tensor without gradient, [T A, ...] of T [A, ...]; None if they are not together."""
        made = self._as_before(parameters)
        if made is None:
            with _moving:
                made = self._as_before(parameters) or self._found(parameters) or self._moved(parameters)
                if made is not None:
                    self._ours, self._known = [], (made, [p.data_ptr() for p in parameters])
        return made

    def _as_before(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        whole, places = self._known
        if not whole or places != list(map(Tensor.data_ptr, parameters)):
            return None
        first = whole[0]
        return whole if first.dtype == parameters[0].dtype and first.device == parameters[0].device else None

    def _found(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """What lies side by side already: a loaded model's, or another schedule's."""
        made = []
        for k in range(0, len(parameters), self.T):
            each = parameters[k : k + self.T]
            first = each[0]
            if type(first) is not nn.Parameter or first.device.type not in ("cpu", "cuda") or not first.numel():
                return None
            memory, size = first.untyped_storage(), first.numel() * first.element_size()
            start = first.data_ptr()
            for t, p in enumerate(each):
                inside = type(p) is nn.Parameter and p.is_contiguous() and p.dtype == first.dtype
                if not inside or p.data_ptr() != start + t * size:
                    return None
                if p.untyped_storage().data_ptr() != memory.data_ptr():
                    return None
            made.append(first.detach().as_strided((self.T * first.shape[0], *first.shape[1:]), first.stride()))
        return made

    def _is_ours(self, p: Tensor, whole: set[int]) -> bool:
        return type(p) is nn.Parameter and p.untyped_storage().data_ptr() in whole

    def _moved(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """All of them put side by side, if nobody else has put them where they are."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._ours, self._known = [], ([], [])  # FSDP lends parameters memory of its own, which looks like theirs
            return None
        whole = {t.untyped_storage().data_ptr() for t in (*self._whole, *self._ours)}
        if len(set(map(id, parameters))) < len(parameters):  # tied
            return None
        if not all(p.numel() and (_is_own(p) or self._is_ours(p, whole)) for p in parameters):
            return None
        if parameters[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(False), torch.no_grad():
            made = []
            for k in range(0, len(parameters), self.T):
                each = parameters[k : k + self.T]
                made.append(torch.cat([p.detach() for p in each]))
                for p, part in zip(each, made[-1].split(each[0].shape[0]), strict=True):
                    p.data = part
        return made
