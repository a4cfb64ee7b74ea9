"""What functional collectives are given, in bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts, while it is on, the calls and bytes of this rank's collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace == "_c10d_functional" and not name.startswith("wait_tensor"):
            given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            name = name.partition(".")[0]
            self.calls[name] += 1
            self.bytes[name] += sum(t.nbytes for t in given if isinstance(t, Tensor))
        return function(*args, **(kwargs or {}))
