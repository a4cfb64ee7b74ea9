"""Forward passes that are made again during a backward pass, as torch.utils.checkpoint makes them.

They give values only: what a layer notes beside its output (trajectories, counts, statistics) was noted the first time.

A backward pass also calls what belongs to no forward pass: hooks, which may train or evaluate another model. That is a
first pass. The two are told by who called: the frames of this thread, from the innermost one, to autograd's engine.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def is_in_backward() -> bool:
    """Whether a backward pass is under way in this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_recomputation() -> bool:
    """Whether a forward pass is made again: by torch.utils.checkpoint, in the backward of an autograd Function, or by
    a saved-tensor hook whose packed object is no tensor.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._current_graph_task_id() == -1:
        # saved tensors may be looked at outside of a backward pass, which makes checkpoint compute them
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return False
        return _has_recomputing_frame()
    return _has_recomputing_frame(called_by_engine=True)


def _has_recomputing_frame(called_by_engine: bool = False) -> bool:
    frame, called = sys._getframe(2), None
    while frame is not None:
        module = frame.f_globals.get("__name__")
        name = frame.f_code.co_name
        if module == "torch.utils.checkpoint" and name == "unpack_hook":
            return True
        if module == "torch.autograd.function" and name.startswith("apply") and "self" in frame.f_locals:
            return True  # a node's, which calls the backward of its Function
        if module == "torch.autograd.graph" and name == "_engine_run_backward":
            break
        frame, called = frame.f_back, frame  # type: ignore[assignment]
    # the engine called this frame: a hook, which gets gradients, or the unpack hook of somebody's own checkpointing
    return called_by_engine and called is not None and not _gets_gradients(called)


def _gets_gradients(frame: FrameType) -> bool:
    """Whether a function that the engine has called was given gradients, or nothing, as callbacks are."""
    names, rest, _, values = inspect.getargvalues(frame)
    given = [values.get(name) for name in (*names, *([rest] if rest else ()))]
    return not given or any(isinstance(v, Tensor) or _are_gradients(v) for v in given)


def _are_gradients(value: object) -> bool:
    """Whether these are a node's gradients, or, in variable arguments, tuples of them."""
    if not isinstance(value, tuple):
        return False
    return all(v is None or isinstance(v, Tensor) or _are_gradients(v) for v in value)


def keeps_results() -> bool:
    """Whether somebody may keep what operators give, as selective checkpointing does: it may then not be written to."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


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
