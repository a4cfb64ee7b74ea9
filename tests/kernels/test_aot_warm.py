"""What is compiled ahead of time is what a launch looks up: the same key, on disk, by another process, elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import aot

pytest.importorskip("triton")


def choose(rows: int) -> Any:
    """A call with a tensor that does not lie at a multiple of 16 bytes, and integers of every kind."""
    from fastroute.kernels import policy

    scores, uniform = (torch.empty(rows + 1, 16, device="meta") for _ in range(2))
    return policy.forward(scores[1:, 1:9], uniform[1:], None, None, 0, 0.7, 0.3)


def print_hits() -> None:
    """Whether Triton's cache had each kernel."""
    from triton import knobs

    hits = []
    knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
    for launch in aot.record(lambda: choose(1000)):
        aot.warm(launch, 90)
    print(json.dumps(hits))


def print_keys() -> None:
    """What a launch and its warm-up look up; then the kernels' hashes at numbers of rows that are alike, or not."""
    from triton import knobs
    from triton.runtime import driver

    from fastroute.kernels import dispatch

    keys = []

    def hook(**about: Any) -> bool:
        keys.append((about["key"], sorted(map(str, about["compile"]["configs"]))))
        return True  # not to be compiled

    launches = aot.record(lambda: choose(1000))
    knobs.runtime.jit_cache_hook = hook
    driver.set_active(aot._Driver(90))
    choose(1000)
    for launch in launches:
        aot.warm(launch, 90)
    knobs.runtime.jit_cache_hook = None
    sizes = (1024, 16), (1025, 1)
    hashes = [
        aot.warm(launch, 90).hash
        for N, K in sizes
        for launch in aot.record(lambda N=N, K=K: dispatch.plan(torch.empty(N, dtype=torch.int64, device="meta"), K))
    ]
    print(json.dumps([keys[0] == keys[1], len(keys), len(hashes), len(set(hashes))]))


@pytest.mark.long
def test_another_process_finds_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "made"))
    assert json.loads(aot._printed(__file__, "print_hits")) == [False]
    shutil.copytree(tmp_path / "made", tmp_path / "copied")
    shutil.rmtree(tmp_path / "made")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "copied"))
    assert aot.move_cache(tmp_path / "copied") == 1
    assert json.loads(aot._printed(__file__, "print_hits")) == [True]


@pytest.mark.long
def test_keys_are_those_of_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that a kernel is not specialised for give one kernel, whatever they are."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    same, looked_up, kernels, different = json.loads(aot._printed(__file__, "print_keys"))
    assert same and looked_up == 2
    assert kernels == 2 and different == 1


def test_layers_are_recorded_with_their_gradients() -> None:
    import fastroute

    def step() -> None:
        with torch.device("meta"):
            x = torch.empty(8, 256, 7, 7, requires_grad=True)
            y = fastroute.TaskRouter(256, 20, 0.5)(x, torch.empty(8, dtype=torch.int64))
            fastroute.EfficientVectorRouting(49, 10, 256, 16)(y.flatten(2).mT).sum().backward()
            assert x.grad is not None

    names = [launch.name for launch in aot.record_ops(step)]
    assert names.count("mask_kernel") == 2
    assert {"forward_kernel", "aggregate_kernel", "backward_kernel", "spread_kernel"} <= set(names)


if __name__ == "__main__":
    {"print_hits": print_hits, "print_keys": print_keys}[sys.argv[1]]()
