"""What fastroute does, on real data, in a minute: one demo per file, each with ``run(Options) -> exit status``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import data as _data

DEMOS = {
    "capsules": "learn handwritten digits with a capsule router, time it, draw what it looked at",
    "networks": "learn handwritten digits as five tasks with a routing network, draw which task took which module",
    "tasks": "learn handwritten digits as more than forty tasks of one network, draw the channels that tasks share",
    "multitask": "learn handwritten digits as eight tasks, a network divided among them in nine ways; draw the graph",
}

#: What ``fastroute train`` trains, by ``published.py``.
MODELS = {
    "routed-cnn": "the routed CNN of 2018, five tasks",
    "capsule-vision": "the capsule head of 2022 on an encoder of patches",
    "capsule-text": "the capsule head of 2022 on an encoder of words",
    "small-norb": "the smallNORB network of 2019",
    "task-vgg": "VGG-11 with task routing of 2019, twenty tasks",
}


@dataclass(frozen=True)
class Options:
    """What every demo is told."""

    data: Path | None = None  #: a folder of MNIST's IDX files instead of scikit-learn's digits
    out: Path = Path("fastroute-demo.png")
    epochs: int | None = None  #: None: enough
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    quiet: bool = False  #: no bars on a terminal either


class CannotRun(Exception):
    """What a demo needs is not there; the message says what."""


def on_digits(options: Options, body: Callable[[_data.Digits, Options, float], int]) -> int:
    """``body(digits on the options' device, options, when this began)``, with the options' seed and threads."""
    began, threads = time.perf_counter(), torch.get_num_threads()
    device = torch.device(options.device)
    found = digits(options)
    height, width = found.train_images.shape[1:]
    if min(height, width) < 4:
        raise CannotRun(f"{options.data}: expected images of 4 x 4 pixels at least, got {height} x {width}")
    torch.set_num_threads(options.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            return body(_data.Digits(*(t.to(device) for t in found)), options, began)
    finally:
        torch.set_num_threads(threads)


def digits(options: Options) -> _data.Digits:
    """The handwritten digits that the options name."""
    try:
        return _data.digits() if options.data is None else _data.mnist(options.data)
    except (ImportError, OSError, ValueError) as error:
        raise CannotRun(str(error)) from error
