"""Handwritten digits as many binary questions: what digit, what kind of digit, where its ink is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data

DIGITS: dict[str, tuple[int, ...]] = {
    **{f"is {d}": (d,) for d in range(10)},
    "odd": (1, 3, 5, 7, 9),
    "at least 5": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "has a loop": (0, 6, 8, 9),
    "divisible by 3": (0, 3, 6, 9),
    "1 or 7": (1, 7),
    "3 or 8": (3, 8),
    "4 or 9": (4, 9),
    "5 or 6": (5, 6),
    "0 or 8": (0, 8),
    "2 or 7": (2, 7),
    "2, 3 or 5": (2, 3, 5),
    "1, 4 or 7": (1, 4, 7),
    "a square": (0, 1, 4, 9),
    "a power of 2": (1, 2, 4, 8),
}


def _box(top: float, bottom: float, left: float, right: float) -> Callable[[Tensor], Tensor]:
    """The share of the ink in a box, whose sides are shares of the image's."""

    def share(x: Tensor) -> Tensor:
        H, W = x.shape[1:]
        rows, columns = slice(int(top * H), max(int(bottom * H), 1)), slice(int(left * W), max(int(right * W), 1))
        return x[:, rows, columns].sum((1, 2)) / x.sum((1, 2)).clamp_min(1e-6)

    return share


def _unlike(*axes: int) -> Callable[[Tensor], Tensor]:
    """Minus the difference between an image and its reflection."""
    return lambda x: -(x - x.flip(axes)).abs().sum((1, 2)) / x.sum((1, 2)).clamp_min(1e-6)


def _spread(axis: int) -> Callable[[Tensor], Tensor]:
    """The variance of the ink's position along an axis of [H, W]."""

    def variance(x: Tensor) -> Tensor:
        ink = x.sum(2 - axis) / x.sum((1, 2)).clamp_min(1e-6)[:, None]
        at = torch.arange(ink.shape[1], device=x.device, dtype=x.dtype)
        return ink @ at**2 - (ink @ at) ** 2

    return variance


#: Each is asked as: is it above its median over the training images?
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "much ink": lambda x: x.sum((1, 2)),
    "ink on the left": _box(0, 1, 0, 0.5),
    "ink at the top": _box(0, 0.5, 0, 1),
    "like its mirror image": _unlike(2),
    "like itself upside down": _unlike(1),
    "like itself turned": _unlike(1, 2),
    "ink at the top left": _box(0, 0.5, 0, 0.5),
    "ink at the top right": _box(0, 0.5, 0.5, 1),
    "ink at the bottom left": _box(0.5, 1, 0, 0.5),
    "ink at the bottom right": _box(0.5, 1, 0.5, 1),
    "ink in the centre": _box(0.25, 0.75, 0.25, 0.75),
    "ink in the middle rows": _box(0.375, 0.625, 0, 1),
    "ink in the middle columns": _box(0, 1, 0.375, 0.625),
    "tall": _spread(0),
    "wide": _spread(1),
    "full strokes": lambda x: (x > 0.75).float().mean((1, 2)),
    "grey strokes": lambda x: ((x > 0) & (x < 0.5)).float().mean((1, 2)),
}
BASE = len(DIGITS) + len(MEASURES)  #: how many attributes have a name of their own


class Attributes(NamedTuple):
    """Images [N, 1, H, W] with T answers each, float32 [N, T] of 0 and 1."""

    names: list[str]
    train_images: Tensor
    train_answers: Tensor
    test_images: Tensor
    test_answers: Tensor

    def to(self, device: torch.device) -> Attributes:
        return Attributes(self.names, *(t.to(device) for t in self[1:]))


def attributes(found: data.Digits, count: int = BASE, seed: int = 0) -> Attributes:
    """The first ``count`` attributes: those with names, then random ones, which ``seed`` draws.

    A random one is a set of digits, an xor, or, and of two with names, or whether a random box has more ink than a
    random quantile; one that fewer than 5 % or more than 95 % of the training images have is drawn again.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    images = torch.cat([found.train_images, found.test_images])
    labels = torch.cat([found.train_labels, found.test_labels])
    n = len(found.train_images)
    answers = {name: torch.isin(labels, labels.new_tensor(digits)) for name, digits in DIGITS.items()}
    for name, measure in MEASURES.items():
        value = measure(images)
        answers[name] = value > value[:n].median()
    named = list(answers)
    generator = torch.Generator().manual_seed(seed)
    while len(answers) < count:
        name, answer = _random(images, labels, n, {k: answers[k] for k in named}, generator)
        if 0.05 <= float(answer[:n].float().mean()) <= 0.95:
            answers.setdefault(name, answer)
    names = list(answers)[:count]
    stacked = torch.stack([answers[name] for name in names], 1).float()
    images = images.unsqueeze(1)
    return Attributes(names, images[:n], stacked[:n], images[n:], stacked[n:])


def _random(
    images: Tensor, labels: Tensor, n: int, named: dict[str, Tensor], generator: torch.Generator
) -> tuple[str, Tensor]:
    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    kind = below(5)
    if kind == 0:
        digits = sorted(torch.randperm(10, generator=generator)[: 2 + below(4)].tolist())
        return f"in {digits}", torch.isin(labels, labels.new_tensor(digits))
    if kind == 1:
        top, left = below(6) / 8, below(6) / 8
        height, width = (2 + below(3)) / 8, (2 + below(3)) / 8
        quantile = (2 + below(7)) / 10
        value = _box(top, min(top + height, 1), left, min(left + width, 1))(images)
        name = f"ink from {top}, {left}, {height} by {width}, above {quantile}"
        return name, value > value[:n].sort().values[int(quantile * (n - 1))]
    a, b = (list(named)[i] for i in torch.randperm(len(named), generator=generator)[:2].tolist())
    word = ("xor", "or", "and")[kind - 2]
    x, y = named[a], named[b]
    return f"{a} {word} {b}", (x ^ y, x | y, x & y)[kind - 2]
