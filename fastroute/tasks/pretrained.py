"""Torchvision's VGG weights, from a file, in a model with routers between its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from ..ops import checks
from .router import TaskRouter

#: False, or the path of a state dict; ``read`` checks it.
Pretrained = Annotated[bool | str | Path, None]


def read(pretrained: Pretrained, name: str) -> Mapping[str, Tensor] | None:
    """The state dict in a file; None for False."""
    if pretrained is False or pretrained is None:
        return None
    if isinstance(pretrained, bool) or not isinstance(pretrained, (str, Path)):
        raise ValueError(
            f"pretrained: expected False or the path of torchvision's state dict of {name} (nothing is downloaded), "
            f"got {pretrained!r}"
        )
    path = Path(pretrained).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"pretrained: expected the file of torchvision's state dict of {name}, found no {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"pretrained: expected a state dict that torch.save wrote, cannot read {path}: {error}"
        ) from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in weights.items()
    ):
        raise ValueError(f"pretrained: expected a state dict of tensors in {path}, got {type(weights).__name__}")
    return weights


def load_features(features: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Torchvision's features into routed ones: layers are counted there without the routers. Its classifier stays out.

    Raises:
        ValueError: parameters that are missing, left over or of other shapes.
    """
    layers = [layer for layer in features.children() if not isinstance(layer, TaskRouter)]
    wanted = {f"features.{i}.{k}": t for i, layer in enumerate(layers) for k, t in layer.state_dict().items()}
    given = {k: t for k, t in weights.items() if not k.startswith("classifier.")}
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}  # files from before PyTorch 0.4.1 have none
    missing, beyond = sorted(wanted.keys() - given.keys() - optional), sorted(given.keys() - wanted.keys())
    if missing or beyond:
        raise ValueError(
            f"pretrained: expected torchvision's state dict of {name}, got one with {len(missing)} of its keys missing "
            f"{missing[:3]} and {len(beyond)} others {beyond[:3]}"
        )
    for key, t in given.items():
        if t.shape != wanted[key].shape:
            raise ValueError(f"pretrained: {key}: expected {checks.shown(wanted[key])}, got {checks.shown(t)}")
    with torch.no_grad():
        for key, t in given.items():
            wanted[key].copy_(t)
