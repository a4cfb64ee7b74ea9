"""What layers tell those who watch them: no hook, so that watched modules stay plain and run as before.

A layer calls :func:`tell` where it has decided something. Nobody is told in what ``torch.compile`` or ``torch.export``
trace (the call is left out of the graph; :func:`is_compiled` knows of it), in a forward pass that is made again for
backward, or within ``torch.func``.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.recomputation import is_recomputation


class Watcher(Protocol):
    def see(self, layer: nn.Module, kind: str, *seen: Any) -> None: ...


#: Beside the modules, not on them: copies and pickles of a module are not watched, and its state is as before.
_watchers: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Watcher], ...]] = weakref.WeakKeyDictionary()
_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.RLock()  # of changes to _watchers; who is told reads one tuple, whole


def _note_compiled(context: Any) -> None:
    """Called by Dynamo while it traces :func:`is_watched`, with what its arguments are."""
    seen = context.get_local("layer")._i_will_not_complain_if_bc_breaks_VariableTracker().realize()
    if isinstance(getattr(seen, "value", None), nn.Module):
        _compiled.add(seen.value)


def is_compiled(layer: nn.Module) -> bool:
    """Whether torch.compile has traced a call of a layer, in which it tells nothing."""
    return layer in _compiled


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody is to be told of this call of a layer."""
    if torch.compiler.is_compiling():
        torch._dynamo.comptime.comptime(_note_compiled)  # adds nothing to the graph
        return False
    return (
        bool(_watchers)
        and layer in _watchers
        and not is_recomputation()
        and not torch._C._are_functorch_transforms_active()
    )


def tell(layer: Any, kind: str, *seen: Any) -> None:
    """Tell a layer's watchers what it has just done."""
    if is_watched(layer):
        for reference in _watchers.get(layer, ()):
            watcher = reference()
            if watcher is not None:
                watcher.see(layer, kind, *seen)


def watch(layer: nn.Module, watcher: Watcher) -> None:
    """Tell a watcher from now on, as long as watcher and layer exist."""
    with _lock:
        others = tuple(r for r in _watchers.get(layer, ()) if r() not in (None, watcher))
        _watchers[layer] = (*others, weakref.ref(watcher))


def unwatch(layer: nn.Module, watcher: Watcher) -> None:
    """Tell a watcher no more."""
    with _lock:
        others = tuple(r for r in _watchers.get(layer, ()) if r() not in (None, watcher))
        if others:
            _watchers[layer] = others
        else:
            _watchers.pop(layer, None)
