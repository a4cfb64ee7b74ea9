"""Which pixels, and which words, count for a decision? Two networks of routings, and the credit of their inputs.

The first tells handwritten digits apart: a capsule per pixel, a residual routing in the middle. The second tells
apart sentences of documentation that is on every machine with PyTorch: neural networks, probability distributions,
optimizers. Both are trained here, in about a minute, and what is drawn is their end-to-end credit on inputs that they
have not seen.

    python examples/credit.py
    python examples/credit.py --images 12 --epochs 40 --folder pictures
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers make small ops slow

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastroute import EfficientVectorRouting, data, plots
from fastroute.capsules import Residual, credit

WIDTH, HIDDEN = 32, 16
BATCH, LEARNING_RATE = 64, 1e-2


def router(classes: int) -> nn.Sequential:
    """Any number of vectors to a number per class, with a residual on the way."""
    return nn.Sequential(
        EfficientVectorRouting(-1, HIDDEN, WIDTH, WIDTH),
        Residual(EfficientVectorRouting(HIDDEN, HIDDEN, WIDTH, WIDTH)),
        EfficientVectorRouting(HIDDEN, classes, WIDTH, 1),
    )


class Classifier(nn.Module):
    """Vectors made of the inputs one by one, then a network of routings."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.route = router(classes)

    def vectors(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.route(self.vectors(x)).squeeze(-1)
        return scores

    def credit(self, x: Tensor) -> Tensor:
        """Of every input [B, n] in the class that is predicted."""
        with torch.no_grad():
            best = self(x).argmax(-1)
            weights = F.one_hot(best, self.route[-1].n_out).to(torch.float32)
            return credit(self.route, self.vectors(x), weights, normalize=True)


class Digits(Classifier):
    """Images [B, 8, 8]: what a pixel and its neighbours look like, times where it is."""

    def __init__(self) -> None:
        super().__init__(10)
        self.look = nn.Linear(9, WIDTH, bias=False)
        self.position = nn.Parameter(2 * torch.randn(64, WIDTH))

    def vectors(self, x: Tensor) -> Tensor:
        seen: Tensor = self.look(F.unfold(x[:, None], 3, padding=1).mT) * self.position
        return seen


class Sentences(Classifier):
    """Numbers of words [B, n], 0 for padding and for unknown words: a vector each."""

    def __init__(self, words: int, classes: int) -> None:
        super().__init__(classes)
        self.embed = nn.Embedding(words, WIDTH, padding_idx=0)

    def vectors(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.embed(x)
        return embedded


def train(model: Classifier, x: Tensor, y: Tensor, epochs: int, noise: float = 0.0) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            inputs = x[batch]
            if noise:
                inputs = inputs + noise * torch.randn_like(inputs)
            F.cross_entropy(model(inputs), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())


TOPICS = {"networks": torch.nn, "probability": torch.distributions, "optimizers": torch.optim}
LONGEST = 30


def sentences() -> tuple[list[list[str]], list[int]]:
    """Words of the sentences in the docstrings of three packages, and which package it was."""
    found: dict[tuple[str, ...], int] = {}
    for topic, package in enumerate(TOPICS.values()):
        for name in sorted(vars(package)):
            member = getattr(package, name)
            if not inspect.isclass(member):
                continue
            for sentence in re.split(r"(?<=[.:])\s+", (inspect.getdoc(member) or "").replace("``", "")):
                words = re.findall(r"[a-z][a-z-]+", sentence.lower())
                if 5 <= len(words) <= LONGEST and "`" not in sentence and ">>>" not in sentence:
                    found.setdefault(tuple(words), topic)
    return [list(words) for words in found], list(found.values())


def digits_picture(folder: Path, images: int, epochs: int) -> float:
    found = data.digits()
    model = Digits()
    train(model, found.train_images, found.train_labels, epochs, noise=0.1)
    right = accuracy(model, found.test_images, found.test_labels)
    x, y = found.test_images[:images], found.test_labels[:images]
    with torch.no_grad():
        predicted = model(x).argmax(-1)
    plots.credit(
        x, model.credit(x).unflatten(1, (8, 8)), labels=y, predictions=predicted,
        title="Credit of pixels in the predicted class", path=folder / "credit_digits.png",
    )  # fmt: skip
    return right


def sentences_picture(folder: Path, shown: int, epochs: int) -> tuple[float, float]:
    """Accuracy, and that of always naming the most frequent topic."""
    texts, topics = sentences()
    words = [w for w, count in Counter(w for text in texts for w in text).most_common() if count > 1]
    numbers = {word: k + 1 for k, word in enumerate(words)}
    x = torch.zeros(len(texts), LONGEST, dtype=torch.int64)
    for row, text in zip(x, texts, strict=True):
        row[: len(text)] = torch.tensor([numbers.get(word, 0) for word in text])
    y = torch.tensor(topics)
    order = torch.randperm(len(texts))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    model = Sentences(len(words) + 1, len(TOPICS))
    train(model, x[rest], y[rest], epochs)
    right = accuracy(model, x[held_out], y[held_out])
    names = list(TOPICS)
    picked = [k for topic in range(3) for k in held_out.tolist() if topics[k] == topic and len(texts[k]) > 7]
    picked = [k for topic in range(3) for k in [k for k in picked if topics[k] == topic][: max(1, shown // 3)]]
    with torch.no_grad():
        predicted = model(x[picked]).argmax(-1).tolist()
    made = model.credit(x[picked])
    plots.credit(
        [texts[k] for k in picked],
        [row[: len(texts[k])] for row, k in zip(made, picked, strict=True)],
        labels=[names[topics[k]] for k in picked],
        predictions=[names[p] for p in predicted],
        title="Credit of words in the predicted topic",
        path=folder / "credit_words.png",
    )
    return right, float(y[held_out].bincount().max() / len(held_out))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10, help="digits to draw")
    parser.add_argument("--sentences", type=int, default=6, help="sentences to draw")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the pictures go")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    right = digits_picture(options.folder, options.images, options.epochs)
    print(f"digits: {right:.1%} of held-out images right, {options.folder / 'credit_digits.png'}")
    right, always = sentences_picture(options.folder, options.sentences, options.epochs)
    where = options.folder / "credit_words.png"
    print(f"sentences: {right:.1%} of held-out sentences right ({always:.1%}: the most frequent topic), {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
