"""The list of a batch's samples, ``mxs``."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from fastroute.networks import SampleMetaInformation, Trajectory

if TYPE_CHECKING:  # which would have two kinds of metaclass

    class _List: ...

else:
    _List = list


class Samples(Trajectory, MutableSequence[SampleMetaInformation], _List):  # type: ignore[misc]
    """A trajectory that is a list, and may be changed as one: it is then that of the samples which are in it.

    What Python keeps of a list is empty: all that a list does is done on the trajectory.
    """

    @classmethod
    def of(cls, samples: Trajectory | Sequence[SampleMetaInformation], size: int | None = None) -> Samples:
        """As a list that can be changed; the same object, if it is one."""
        made = Trajectory.of(samples, size)
        return made if isinstance(made, Samples) else cls._view(made._batch, made._rows)

    @classmethod
    def _view(cls, batch: Any, rows: list[int] | None) -> Samples:
        made: Any = super()._view(batch, rows)
        return made  # type: ignore[no-any-return]

    def _become(self, change: Callable[[list[SampleMetaInformation]], Any]) -> Any:
        samples = list(self)
        made = change(samples)
        joined = Trajectory.of(samples)._held_by(samples)
        self._batch, self._rows = joined._batch, joined._rows
        return made

    def __setitem__(self, key: Any, value: Any) -> None:
        self._become(lambda samples: samples.__setitem__(key, value))

    def __delitem__(self, key: Any) -> None:
        self._become(lambda samples: samples.__delitem__(key))

    def insert(self, index: SupportsIndex, value: SampleMetaInformation) -> None:
        self._become(lambda samples: samples.insert(index, value))

    def append(self, value: SampleMetaInformation) -> None:
        self._become(lambda samples: samples.append(value))

    def extend(self, values: Iterable[SampleMetaInformation]) -> None:
        self._become(lambda samples: samples.extend(values))

    def clear(self) -> None:
        self._become(list.clear)

    def reverse(self) -> None:
        self._become(list.reverse)

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        self._become(lambda samples: samples.sort(key=key, reverse=reverse))

    def copy(self) -> Samples:
        return self._view(self._batch, self._rows)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Samples.of(found) if isinstance(found, Trajectory) else found

    def __add__(self, other: Any) -> Samples:
        return Samples.of(super().__add__(other))

    def __radd__(self, other: Any) -> Samples:
        return Samples.of(super().__radd__(other))

    def __iadd__(self, other: Any) -> Samples:
        self.extend(other)
        return self

    def __mul__(self, times: SupportsIndex) -> Samples:
        return Samples.of(list(self) * times)

    __rmul__ = __mul__

    def __imul__(self, times: SupportsIndex) -> Samples:
        self._become(lambda samples: samples.__imul__(times))
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, list) and list(self) == list(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = Trajectory.__hash__

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]
