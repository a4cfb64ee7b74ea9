"""Parameters that lie side by side in memory, so that many are one tensor without a copy.

Axes: T networks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.host import is_lent, others_write

#: By address: the memory in which parameters lie side by side, as long as anybody uses it so.
_whole_at: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


#: By address: memory that PyTorch allocated, which it may have lent to a NumPy array since.
_allocated: dict[int, StorageWeakRef] = {}


def note_allocated(parameters: Iterable[Tensor], *, unpickled: bool = False) -> None:
    """Remember whose memory PyTorch has allocated, before anybody borrows it: afterwards that cannot be told.

    What is unpickled is nobody else's, though ``torch.load`` gives it memory as if it were.
    """
    for at in [at for at, ref in _allocated.items() if ref.expired()]:
        _allocated.pop(at, None)
    for p in parameters:
        if type(p) is nn.Parameter and p.is_cpu and (unpickled or not is_lent(p)):
            storage = p.untyped_storage()
            _allocated[storage._cdata] = StorageWeakRef(storage)


def _is_foreign(p: Tensor) -> bool:
    """Whether it lies in memory of somebody else's: a NumPy array's, a file's."""
    if not is_lent(p):
        return False
    ref = _allocated.get(p.untyped_storage()._cdata)
    return ref is None or ref.expired()


def _home(p: Tensor) -> Tensor | None:
    """The memory of several parameters in which this one lies."""
    at = p.data_ptr()
    for start, whole in list(_whole_at.items()):
        if start <= at < start + whole.numel() * whole.element_size() and whole.device == p.device:
            return whole
    return None


def _users(t: Tensor) -> int:
    """How many tensors have its storage, and a constant."""
    return int(torch._C._storage_Use_Count(t.untyped_storage()._cdata))


@cache
def _users_of_one() -> int | None:
    """``_users`` of a tensor that is alone; None where that does not tell."""
    try:
        t = torch.empty(1, device="cpu")
        counts = _users(t), _users(t)
        other = t.detach()
        return counts[0] if (*counts, _users(other)) == (counts[0], counts[0], counts[0] + 1) else None
    except AttributeError:  # of another PyTorch
        return None


def _is_own(p: Tensor) -> bool:
    """A parameter that nobody else has arranged: the only tensor in its memory, which no other process shares.

    Others are one that is tied to it by its ``data``, an entry of a state dict, and a NumPy array made of it.
    """
    if type(p) is not nn.Parameter or p.device.type not in ("cpu", "cuda") or not p.is_leaf:
        return False
    alone = p.untyped_storage().nbytes() == p.numel() * p.element_size() and _users(p) == _users_of_one()
    return alone and not others_write(p)


def _part(whole: Tensor, t: int, like: Tensor) -> Tensor:
    """The t-th part, with a storage of its own in the memory of the whole.

    So to whoever saves, counts or shares storages it has nothing in common with the other parts.
    """
    size = like.numel() * like.element_size()
    storage = whole.untyped_storage()[t * size : (t + 1) * size]
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, like.shape)  # type: ignore[call-overload]


#: Of two threads that would move the same parameters, the second finds them moved.
_moving = threading.Lock()


class SideBySide:
    """The parameters of T networks, each kind in one tensor whose parts the parameters are.

    They are moved there when they are first asked for, and again when ``.to()``, a deep copy or a loaded checkpoint has
    parted them: where they are is looked up at every call. They stay the modules' own Parameters. Parameters that
    somebody else may have put somewhere (a flat optimizer, shared memory, anybody in a process group), and those whose
    memory another tensor has at the time (a state dict, an array made of it), stay there. So do those in memory that
    PyTorch did not allocate (a NumPy array's, and what was loaded with ``assign=True``).

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
        """What lies side by side already, by another schedule."""
        made = []
        for k in range(0, len(parameters), self.T):
            each = parameters[k : k + self.T]
            first = each[0]
            if type(first) is not nn.Parameter or not first.numel() or (home := _home(first)) is None:
                return None
            start, size = first.data_ptr(), first.numel() * first.element_size()
            for t, p in enumerate(each):
                inside = type(p) is nn.Parameter and p.is_contiguous() and p.dtype == first.dtype == home.dtype
                if not inside or p.data_ptr() != start + t * size or _home(p) is not home:
                    return None
            offset = (start - home.data_ptr()) // first.element_size()
            shape = (self.T * first.shape[0], *first.shape[1:])
            made.append(home if home.shape == shape else home.as_strided(shape, first.stride(), offset))
        return made

    def _may_move(self, p: Tensor, ours: Sequence[Tensor]) -> bool:
        if not p.numel() or not _is_own(p):
            return False
        home = _home(p)
        return not _is_foreign(p) if home is None else any(home is t for t in ours)

    def _moved(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """All of them put side by side, if nobody else has put them where they are."""
        if any(map(others_write, parameters)):
            self._ours, self._known = [], ([], [])  # FSDP lends parameters memory of its own, which looks like theirs
            return None
        if len(set(map(id, parameters))) < len(parameters):  # tied
            return None
        ours = [*self._whole, *self._ours]
        if not all(self._may_move(p, ours) for p in parameters):
            return None
        if parameters[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(False), torch.no_grad():
            made = []
            for k in range(0, len(parameters), self.T):
                each = parameters[k : k + self.T]
                made.append(torch.cat([p.detach() for p in each]))
                _whole_at[made[-1].data_ptr()] = made[-1]
                for t, p in enumerate(each):
                    p.data = _part(made[-1], t, p)
        return made
