"""Forward passes that are made again during a backward pass, as torch.utils.checkpoint makes them.

They give values only: what a layer notes beside its output (trajectories, counts, statistics) was noted the first time.
"""

from __future__ import annotations

from typing import Any

import torch


def is_recomputation() -> bool:
    """Whether a backward pass is under way in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def draws_of(generator: torch.Generator | None) -> dict[str, Any]:
    """What a random function of PyTorch is given: nothing for None, with which it takes no sizes that are symbols.

    Raises:
        RuntimeError: draws cannot be those of the first time: only PyTorch's own generators are set back.
    """
    if generator is not None and is_recomputation():
        raise RuntimeError(
            "generator: expected None where a forward pass is made again for backward, since checkpoint sets back "
            "PyTorch's own generators only and another one would draw other numbers; got one"
        )
    return {} if generator is None else {"generator": generator}
