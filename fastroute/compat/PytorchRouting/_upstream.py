"""What makes a class of ``fastroute.networks`` upstream's: its formulas, and its names for a batch and its samples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from fastroute.networks import SampleMetaInformation, Trajectory
from fastroute.ops.arguments import renamed

from ._samples import Samples


class Literal:
    """First base of a class with ``formula``: upstream's formulas, faults included, unless told otherwise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formula", "upstream")
        super().__init__(*args, **kwargs)


class Named:
    """First base of a class that passes the triplet on: its first two are called ``xs`` and ``mxs``."""

    _fastroute_marks: ClassVar[str | None] = None  #: an attribute that every object of fastroute's has

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._fastroute_marks is not None and self._fastroute_marks not in state:
            raise RuntimeError(
                f"{type(self).__name__}: expected an object that fastroute pickled, got one of PytorchRouting's own. "
                "Where that is installed, save torch.save(model.state_dict(), 'state.pt'); it loads as it is, and "
                "python -m fastroute convert state.pt out.pt --from PytorchRouting checks it"
            )
        super().__setstate__(state)  # type: ignore[misc]

    @renamed(batch="xs", x="xs", meta="mxs")
    def forward(
        self, xs: Tensor, mxs: Trajectory | Sequence[SampleMetaInformation], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Samples, Tensor]:
        """xs [B, ...] and its trajectory -> (ys, mxs, actions [B])."""
        ys, meta, actions = super().forward(xs, mxs, *args, **kwargs)  # type: ignore[misc]
        return own_copy(ys, xs), Samples.of(meta), actions


def own_copy(ys: Tensor, xs: Tensor) -> Tensor:
    """What is passed on is the caller's to write into, and not the tensor that was given."""
    return ys.clone() if ys is xs else ys


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def callable_as_its_class(name: str) -> None:
    """Let a module be called like the class of its name, as RoutingNetworks' README does."""
    sys.modules[name].__class__ = _Callable
