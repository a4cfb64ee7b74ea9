"""What a module of torch.nn is, apart from its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn


def options(m: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Its arguments and their names, as its class declares them, and a forward of its own; not its mode.

    Dynamo of torch 2.11 cannot go through m.__dict__, which has them too.
    """
    own = ("forward",) if "forward" in m.__dict__ else ()
    return tuple((name, getattr(m, name)) for name in (*getattr(type(m), "__constants__", ()), *own))
