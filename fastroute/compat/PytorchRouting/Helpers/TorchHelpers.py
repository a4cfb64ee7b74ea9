"""Small modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import Identity


class FakeFlatModuleList(nn.Module):
    """One module that stands for a list of any length, whose entries it all is: for steps that share parameters.

    Args:
        module: the entry.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __getitem__(self, index: int) -> nn.Module:
        return self._module

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self._module,))


__all__ = ["FakeFlatModuleList", "Identity"]
