"""A model's losses and their weights, by the name of the node: dicts that look into the model."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .graph import nearest

if TYPE_CHECKING:
    from .model import MTLModel
else:
    MTLModel = Any  # for typing.get_type_hints: that module imports this one


class _View(MutableMapping[str, Any]):
    """What the model holds is read at every look, so nothing here can be stale."""

    def __init__(self, model: MTLModel, what: str, held: dict[str, Any]) -> None:
        self._model, self._what, self._held = model, what, held

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _known(self, name: str) -> None:
        if name not in self._model.layer_names:
            near = nearest(name, self._model.layer_names)
            raise KeyError(f"{self._what}: expected the name of a node, got {name!r}{near}")


class Losses(_View):
    """``model.losses``: what the dicts have under ``loss``. A Module with tensors that is put here becomes a child."""

    def __setitem__(self, name: str, loss: Any) -> None:
        self._known(name)
        self._release(name)
        self._held[name] = loss
        hold(self._model, {name: loss})
        self._model._terms()

    def __delitem__(self, name: str) -> None:
        del self._held[name]
        self._release(name)
        self._model._terms()

    def _release(self, name: str) -> None:
        held = self._model._modules.get("loss_modules") if self._model._holds_losses else None
        if held is not None:
            held._modules.pop(name, None)


class LossWeights(_View):
    """``model.loss_weights``: what the dicts have under ``loss_weight``; a Parameter [1] for "auto".

    It can be changed. A node whose weight was learned keeps its parameter, which is then not used.
    """

    def __getitem__(self, name: str) -> Any:
        learned = self._model._learned
        return getattr(self._model, learned[name]) if name in learned else self._held[name]

    def __setitem__(self, name: str, weight: Any) -> None:
        self._known(name)
        self._model._learned.pop(name, None)
        self._held[name] = weight
        self._model._terms()

    def __delitem__(self, name: str) -> None:
        del self._held[name]
        self._model._learned.pop(name, None)
        self._model._terms()


class LossModules(nn.Module):
    """The losses that have tensors, by the name of the node.

    They are children, so that they move with the model, are trained and cast. Their buffers (class weights, say) come
    from whoever makes the model, and are in no state dict. Their parameters are, since nobody else has them; a state
    dict without them leaves them as they are.
    """

    _version = 2  #: by which a state dict tells them from a node that torchMTL may call so

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Without what is no parameter."""
        destination = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        learned = {prefix + name for name, _ in self.named_parameters(remove_duplicate=False)}
        for key in [key for key in destination if key.startswith(prefix) and key not in learned]:
            del destination[key]
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        own: dict[str, Tensor] = super().state_dict(prefix=prefix, keep_vars=True)
        for key, value in own.items():
            state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def hold(model: MTLModel, losses: dict[str, Any]) -> None:
    """Make children of the losses that have tensors or children and are none yet."""
    if not model._holds_losses:
        return
    known = set(map(id, model.modules()))
    for name, loss in losses.items():
        if not isinstance(loss, nn.Module) or id(loss) in known:
            continue
        if any(True for part in (loss.parameters(), loss.buffers(), loss.children()) for _ in part):
            held = model._modules.setdefault("loss_modules", LossModules())
            if held is not None:
                held._modules[name] = loss
