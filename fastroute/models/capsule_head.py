"""Heads of capsules on the hidden states of an encoder, Heinsen (2022).

Axes: B samples, n positions, L depths (the embeddings and every layer's output), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capsules import EfficientVectorRouting
from ..ops import checks
from ..ops.arguments import Count, OutputCount, Several, checked, renamed
from ..ops.host import may_look
from ..ops.masked import only


class _Routings(nn.Sequential):
    """Routings one after the other, the first of padded inputs; with their credit's product where they return dicts."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        credit: Tensor | None = None
        for k, routing in enumerate(self):
            made = routing(x, lengths=lengths) if k == 0 else routing(x)
            x, phi = (made["x_out"], made["phi"]) if isinstance(made, dict) else (made, None)
            credit = phi if k == 0 else None if credit is None or phi is None else credit @ phi
        return x if credit is None else (x, credit)


class CapsuleHead(nn.Module):
    """Hidden states of all depths to scores of classes: a norm, a scale per depth and three routings.

    Heinsen, "An Algorithm for Routing Vectors in Sequences" (2022, arXiv 2211.11754), section 4: the vectors of all
    positions at all depths, [n L, D], are normalised, scaled by W and shifted by B of their depth, and routed to
    ``parts`` vectors, to as many again, and to one number per class. The same head serves text and images. With D =
    1024 and L = 25 it has the paper's 8,380,777 parameters for 1000 classes, 5,068,422 for 5.

    Args:
        classes: how many scores, at least 2.
        features: D.
        depths: L.
        parts: vectors of the hidden routings; ``hidden``, their width, D if None.
        n_iters: iterations of each routing.
        return_credit: also return how much each input vector counts in each score; stores [n L, parts] arrays.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: naming the argument.

    Example::

        >>> import torch
        >>> from fastroute.models import CapsuleHead
        >>> head = CapsuleHead(classes=5, features=32, depths=3, parts=8)
        >>> hidden_states = tuple(torch.randn(2, 7, 32) for _ in range(3))  # as Hugging Face encoders return them
        >>> mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        >>> head(hidden_states, mask).shape
        torch.Size([2, 5])
    """

    @checked
    def __init__(
        self,
        classes: OutputCount,
        features: Count = 1024,
        depths: Count = 25,
        *,
        parts: OutputCount = 64,
        hidden: Count | None = None,
        n_iters: Several = 2,
        return_credit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, H = features, features if hidden is None else hidden
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.classes, self.features, self.depths = classes, D, depths
        self.normalize = nn.LayerNorm(D, elementwise_affine=False)
        self.W = nn.Parameter(torch.ones(depths, D, **own))
        self.B = nn.Parameter(torch.zeros(depths, D, **own))
        sizes = [(-1, parts, D, H), (parts, parts, H, H), (parts, classes, H, 1)]
        self.route = _Routings(*(EfficientVectorRouting(*s, n_iters=n_iters, **own) for s in sizes))
        self.return_credit = return_credit

    def _routings(self) -> list[EfficientVectorRouting]:
        """Wherever they are: ``route`` may be wrapped, by ``torch.compile`` for one."""
        return [m for m in self.route.modules() if isinstance(m, EfficientVectorRouting)]

    @property
    def return_credit(self) -> bool:
        """Whether the credit is returned, too: the routings' ``return_dict``. It may be set again."""
        return all(routing.return_dict for routing in self._routings())

    @return_credit.setter
    def return_credit(self, value: bool) -> None:
        for routing in self._routings():
            routing.return_dict = value

    def reset_parameters(self) -> None:
        """Initialise again: scales 1, shifts 0, random routings."""
        nn.init.ones_(self.W)
        nn.init.zeros_(self.B)
        for routing in self._routings():
            routing.reset_parameters()

    @renamed(x_inp="hidden_states")
    def forward(
        self, hidden_states: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores of classes.

        Args:
            hidden_states: L tensors [B, n, D], as encoders of Hugging Face return them with
                ``output_hidden_states=True``; or one [B, n, L, D].
            attention_mask: [B, n], 1 or True for positions that count, wherever the padding is. A sample then gives
                what it gives alone at its own length: others are never read, and their gradient is zero.

        Returns:
            [B, classes], in float32 under autocast. With ``return_credit`` also phi [B, n, L, classes], the product of
            the three routings' credit (but not within ``capsules.record``, which takes the credit itself).

        Raises:
            ValueError, TypeError: naming the argument.
        """
        x = self._stacked(hidden_states)
        B, n, L, _ = x.shape
        checks.together(("the parameters", self.W), {"hidden_states": x})
        there = order = lengths = None
        if attention_mask is not None:
            checks.tensor("attention_mask", attention_mask, "a tensor [B, n]")
            if tuple(attention_mask.shape) != (B, n):
                raise ValueError(f"attention_mask: expected [{B}, {n}], got {checks.shown(attention_mask)}")
            if may_look(attention_mask) and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
                raise ValueError(
                    "attention_mask: expected 1 or True for positions that count, 0 for others, got other numbers"
                )
            there = checks.moved("attention_mask", attention_mask, x.device, torch.bool)
        x = self.normalize(only(x, there)) * self.W + self.B
        if there is not None:
            # what is first counts: routing an unknown number of vectors does not look at their order
            order = (~there).long().argsort(dim=1, stable=True)
            x = x.gather(1, order[:, :, None, None].expand_as(x))
            lengths = there.sum(1) * L
        x = x.flatten(1, 2)
        made = self.route(x) if lengths is None else self.route(x, lengths)
        if isinstance(made, Tensor):
            return made.squeeze(-1)
        y, credit = made
        credit = credit.unflatten(1, (n, L))
        if order is not None:
            credit = torch.zeros_like(credit).scatter(1, order[:, :, None, None].expand_as(credit), credit)
        return y.squeeze(-1), credit

    def _stacked(self, hidden_states: Tensor | Sequence[Tensor]) -> Tensor:
        L, D = self.depths, self.features
        if not isinstance(hidden_states, Tensor):
            if not isinstance(hidden_states, Sequence) or not all(isinstance(h, Tensor) for h in hidden_states):
                raise TypeError(f"hidden_states: expected {L} tensors [B, n, {D}], got {checks.given(hidden_states)}")
            shapes = {tuple(h.shape) for h in hidden_states}
            if len(hidden_states) != L or len(shapes) != 1:
                raise ValueError(
                    f"hidden_states: expected {L} tensors [B, n, {D}] of one shape, got {len(hidden_states)} of "
                    f"{sorted(map(list, shapes))}"
                )
            hidden_states = torch.stack(list(hidden_states), -2)
        checks.floating("hidden_states", hidden_states)
        if hidden_states.dim() != 4 or tuple(hidden_states.shape[-2:]) != (L, D):
            raise ValueError(f"hidden_states: expected [B, n, {L}, {D}], got {checks.shown(hidden_states)}")
        return hidden_states


class CapsuleClassifier(nn.Module):
    """An encoder of Hugging Face, for text or images, with a :class:`CapsuleHead` on its hidden states.

    Args:
        encoder: returns an object with ``hidden_states`` when called with ``output_hidden_states=True``; its
            ``config`` has ``hidden_size`` and ``num_hidden_layers``.
        classes: how many scores.
        freeze: train the head alone, as the paper does: the encoder runs in evaluation mode, and its parameters require
            no gradient. Those that are set to require one afterwards get it, as an input that requires one does.
        head: options of :class:`CapsuleHead`.

    Raises:
        TypeError: the encoder's ``config`` lacks the sizes and ``head`` does not give them.

    Example::

        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> from fastroute.models import CapsuleClassifier
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        ...                    image_size=8, patch_size=4, num_channels=1)
        >>> model = CapsuleClassifier(ViTModel(config), classes=10, parts=4)
        >>> model(pixel_values=torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    @checked
    def __init__(self, encoder: nn.Module, classes: Count, *, freeze: bool = True, **head: Any) -> None:
        super().__init__()
        config: Any = getattr(encoder, "config", None)
        layers = getattr(config, "num_hidden_layers", None)
        depths = None if layers is None else layers + 1  # the embeddings too
        sizes: dict[str, Any] = {"features": getattr(config, "hidden_size", None), "depths": depths}
        sizes.update({name: head.pop(name) for name in tuple(sizes) if name in head})
        for name, size in sizes.items():
            if size is None:
                raise TypeError(f"{name}: expected a number, as the encoder has no config that tells it, got None")
        self.encoder, self.freeze = encoder, freeze
        self.head = CapsuleHead(classes, sizes["features"], sizes["depths"], **head)
        if freeze:
            encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> CapsuleClassifier:
        """As any module's; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, *args: Any, **inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """What the encoder takes -> what the head gives. ``attention_mask`` goes to both.

        Raises:
            TypeError: the encoder returns no hidden states; several arguments without a name.
        """
        if len(args) > 1:
            raise TypeError(f"args: expected one argument without a name (attention_mask=...), got {len(args)}")
        made = self.encoder(*args, **inputs, output_hidden_states=True)
        states = getattr(made, "hidden_states", None)
        if states is None:
            raise TypeError(f"encoder: expected an output with hidden_states, got {type(made).__name__} without")
        mask = inputs.get("attention_mask")
        return self.head(tuple(states), mask)
