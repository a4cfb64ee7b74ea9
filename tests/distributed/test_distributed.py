"""Four processes, started once: every case of ``tests/distributed/ranks.py``; runs that are killed; one process."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from fastroute import EfficientVectorRouting, SlotAttention
from fastroute.distributed import (
    AllToAll,
    Checkpoints,
    ExpertParallel,
    RowShardedCapsules,
    agree,
    ddp,
    expert_parameters,
    full_state_dict,
    load_full_state_dict,
    prepare,
    shard,
    whole_state_dict,
)
from tests.distributed import ranks
from tests.distributed.ranks import failed, started
from tests.helpers.subprocesses import ROOT, ran

NAMES = [
    f"{path.stem}.{name}"
    for path in sorted(Path(__file__).parent.glob("cases_*.py"))
    for name in re.findall(r"^@case\ndef (\w+)", path.read_text(), re.MULTILINE)
]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks(name: str) -> None:
    assert not failed().get(name)


@pytest.mark.long
def test_killed_runs_go_on_on_fewer_ranks(tmp_path: Path) -> None:
    """A rank is killed in a forward pass, before an optimizer's step, and while a checkpoint is written."""
    report = json.loads(started("tests.distributed.killed", str(tmp_path)).splitlines()[-1])
    assert [run["statuses"] for run in report["runs"]] == [[3, 3, 3, -9], [3, 3, -9], [3, -9], [0]]
    assert [run["complete"] for run in report["runs"]] == [[2], [2, 4], [2, 4], [6, 8]]
    for run in report["runs"]:
        for error in run["errors"]:
            assert re.search(r"RowShardedCapsules: the all-reduce of .* over ranks \[0, 1|Checkpoints", error), error
    assert report["difference"] < 1e-12


@pytest.mark.long
def test_torchrun_restarts(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/examples/distributed"}
    done = ran([sys.executable, *command, "-m", "tests.distributed.killed", str(tmp_path)], 300, env)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    report = json.loads((tmp_path / "report").read_text())
    assert not report["first"]
    assert report["difference"] < 1e-12


@pytest.mark.long
def test_examples(tmp_path: Path) -> None:
    printed = started("tests.distributed.run_examples", "capsules", str(tmp_path))
    found = [json.loads(line) for line in printed.splitlines()]
    begun, resumed, streamed, alone = (text for _, text in found)
    assert "2 processes on cpu, 15 of 30 vectors on rank 0, from step 0" in begun
    assert "4 processes on cpu, 15 of 30 vectors on rank 0, from step 4" in resumed and "running accuracy" in resumed
    assert "rank 1: 34,464 vectors" in streamed and "40,000 x 64" in alone


@pytest.fixture
def alone() -> Iterator[ranks.World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ranks.World(0, {1: init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "rows"))})
    dist.destroy_process_group()


def test_one_process(alone: ranks.World, tmp_path: Path) -> None:
    """Sharding over a group of one, and a checkpoint of it."""
    from tests.distributed.cases_capsules import N, compare, layer, same, vectors

    for n_inp in (N, -1):
        sharded = compare(alone, 1, layer(n_inp), vectors(), lengths=[N, 3])
        checkpoints = Checkpoints(tmp_path / str(n_inp), sharded)
        checkpoints.save(5)
        before = {k: t.full_tensor().clone() for k, t in sharded.state_dict().items()}
        sharded.reset_parameters()
        assert checkpoints.load() == 5
        same({k: t.full_tensor() for k, t in sharded.state_dict().items()}, before)
        with pytest.raises(FileNotFoundError, match="expected one of"):
            checkpoints.load(4)


def test_other_layers_in_one_process(alone: ranks.World) -> None:
    from tests.distributed.cases_layers import THREE, N, compare

    for name, n_inp in THREE:
        compare(alone, 1, name, N, n_inp, lengths=[N, 3])


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.tensor([[1, 2], [2, 0]])) - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "tensor": lambda p: torch.optim.SGD(p, torch.tensor(0.1), momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "Muon": lambda p: torch.optim.Muon(p, 0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2, history_size=2),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, 0.1),
}


@pytest.mark.parametrize(
    ("saved", "loading"), [*zip(OPTIMIZERS, OPTIMIZERS, strict=True), *permutations(["SGD", "momentum", "tensor"], 2)]
)
def test_every_optimizer_goes_on(saved: str, loading: str, tmp_path: Path) -> None:
    """With what was saved, whatever it was made with; no hook takes a load for a step."""
    start, steps, seen = torch.arange(6.0).view(3, 2), [], list[object]()
    for go_on in (False, True):
        model = nn.Embedding(3, 2, _weight=start.clone(), sparse=saved == "SparseAdam")
        optimizer = OPTIMIZERS[loading if go_on else saved](list(model.parameters()))
        if go_on:
            for add in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
                add(lambda *found: seen.append(found))
            assert Checkpoints(tmp_path, model, optimizer).load() == 3 and not seen
        else:
            trained(optimizer, model, 3)
            Checkpoints(tmp_path, model, optimizer).save(3)
        trained(optimizer, model, 3)
        steps.append(model.weight.detach())
    assert torch.equal(*steps) and len(seen) == 6


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    """By names of what is there and what came; nothing is loaded then."""
    schedule = torch.optim.lr_scheduler.StepLR
    model = nn.Embedding(3, 2)
    adam = OPTIMIZERS["Adam"](list(model.parameters()))
    trained(adam, model, 1)
    Checkpoints(tmp_path, model, adam, more={"known": schedule(OTHERS, 1)}).save(1)
    fresh = nn.Embedding(3, 2)
    before, p = fresh.weight.detach().clone(), list(fresh.parameters())
    wrong: dict[str, list[torch.optim.Optimizer]] = {
        "got SGD with dampening, momentum, nesterov and without .*betas": [OPTIMIZERS["SGD"](p)],
        "got Adamax with exp_inf and without amsgrad": [OPTIMIZERS["Adamax"](p)],
        "got LBFGS with history_size": [OPTIMIZERS["LBFGS"](p)],
        "got Adam with max_exp_avg_sq": [torch.optim.Adam(p, amsgrad=True)],
        "with 1 groups of parameters, got Adam, Adam with 2": [torch.optim.Adam(p), torch.optim.Adam(p)],
    }
    for message, optimizers in wrong.items():
        with pytest.raises(ValueError, match=f"^optimizers: expected those of step 1, .*{message}"):
            Checkpoints(tmp_path, fresh, optimizers).load()
        assert not any(each.state for each in optimizers) and optimizers[0].param_groups[0]["lr"] in (0.1, 0.001)
    with pytest.raises(ValueError, match=r"^more: expected what step 1 has, under known, got others under new"):
        Checkpoints(tmp_path, fresh, more={"known": schedule(OTHERS, 1), "new": schedule(OTHERS, 1)}).load()
    assert torch.equal(fresh.weight, before)
    Checkpoints(tmp_path, model).save(2)
    with pytest.raises(ValueError, match=r"^optimizers: expected those of step 2, with 0 groups"):
        Checkpoints(tmp_path, fresh, OPTIMIZERS["SGD"](p)).load()
    assert Checkpoints(tmp_path, fresh).load(1) == 1 and torch.equal(fresh.weight, model.weight)


LINEAR = nn.Linear(3, 2)
OTHERS = torch.optim.SGD(nn.Linear(3, 2).parameters())
WRONG: list[tuple[str, Callable[[DeviceMesh], object]]] = [
    ("what: expected a dict", lambda _: agree([1], layer="x")),  # type: ignore[arg-type]
    ("group: expected a ProcessGroup", lambda _: agree({}, 3, layer="x")),  # type: ignore[arg-type]
    ("group: expected a process group or a mesh of one dimension", lambda mesh: agree({}, mesh, layer="x")),
    ("group: expected a process group or a mesh of one dimension", lambda mesh: prepare(LINEAR, mesh)),
    ("model: expected a module, got 'x'", lambda _: prepare("x")),  # type: ignore[type-var]
    ("model: expected a module, got the class Linear", lambda _: prepare(nn.Linear)),  # type: ignore[type-var]
    ("sync_load: expected True or False, got None", lambda _: prepare(LINEAR, sync_load=None)),  # type: ignore[arg-type]
    ("unused_grad: expected 'none' or 'zeros'", lambda _: prepare(LINEAR, unused_grad="x")),  # type: ignore[arg-type]
    ("model: expected a module", lambda _: ddp("x")),  # type: ignore[arg-type]
    ("model: expected a module", lambda mesh: shard("x", mesh)),  # type: ignore[type-var]
    ("mesh: expected a DeviceMesh", lambda _: shard(LINEAR, "x")),  # type: ignore[arg-type]
    ("mesh: expected two dimensions, 'rows' and 'rows'", lambda mesh: shard(LINEAR, mesh, data="rows", expert="rows")),
    ("model: expected a module", lambda _: expert_parameters("x")),  # type: ignore[arg-type]
    ("model: expected a module", lambda _: whole_state_dict("x")),  # type: ignore[arg-type]
    ("module: expected a module", lambda _: full_state_dict("x")),  # type: ignore[arg-type]
    ("module: expected a module", lambda _: load_full_state_dict("x", {})),  # type: ignore[arg-type]
    ("state: expected a dict", lambda _: load_full_state_dict(LINEAR, 3)),  # type: ignore[arg-type]
    ("dispatcher: .* got the class AllToAll", lambda _: ExpertParallel(dispatcher=AllToAll)),  # type: ignore[arg-type]
    ("replicas: expected a DeviceMesh", lambda _: ExpertParallel(replicas="x")),  # type: ignore[arg-type]
    ("use_local_output: expected True", lambda _: ExpertParallel(use_local_output="x")),  # type: ignore[arg-type]
    ("use_local_output: expected True", lambda _: RowShardedCapsules(use_local_output="x")),  # type: ignore[arg-type]
    ("row_parameters: expected a list", lambda _: RowShardedCapsules(row_parameters="F.weight")),
    ("output_layouts: expected Shard", lambda mesh: split(mesh, EfficientVectorRouting(-1, 3, 4, 4), Shard(3))),
    ("output_layouts: expected Shard", lambda mesh: split(mesh, EfficientVectorRouting(-1, 3, 4, 4), Shard(-1))),
    ("output_layouts: expected Shard", lambda mesh: split(mesh, EfficientVectorRouting(-1, 3, 4, 4), Shard(0))),
    ("output_layouts: expected Shard", lambda mesh: split(mesh, SlotAttention(3, 4, 4), Shard(0))),
    ("folder: expected a str", lambda _: Checkpoints(3, LINEAR)),  # type: ignore[arg-type]
    ("modules: expected a module", lambda _: Checkpoints("no", [LINEAR])),  # type: ignore[arg-type]
    ("modules: expected a module under 'a', got 3", lambda _: Checkpoints("no", {"a": 3})),  # type: ignore[dict-item]
    ("modules: expected names, without dots, got 'a.b'", lambda _: Checkpoints("no", {"a.b": LINEAR})),
    ("optimizers: expected a", lambda _: Checkpoints("no", LINEAR, "x")),  # type: ignore[arg-type]
    ("optimizers: expected optimizers of the modules'", lambda _: Checkpoints("no", LINEAR, OTHERS)),
    ("more: expected what has state_dict", lambda _: Checkpoints("no", LINEAR, more={"a": 3})),  # type: ignore[dict-item]
    ("keep: expected an int, got 1.5", lambda _: Checkpoints("no", LINEAR, keep=1.5)),  # type: ignore[arg-type]
    ("step: expected 0 or more, got -1", lambda _: Checkpoints("no", LINEAR).save(-1)),
    ("step: expected an int, got '3'", lambda _: Checkpoints("no", LINEAR).save("3")),  # type: ignore[arg-type]
    ("step: expected an int, got '3'", lambda _: Checkpoints("no", LINEAR).load("3")),  # type: ignore[arg-type]
]


def split(mesh: DeviceMesh, layer: nn.Module, layout: Shard) -> object:
    return parallelize_module(layer, mesh["rows"], RowShardedCapsules(output_layouts=layout))(torch.randn(2, 3, 4))


def test_wrong_arguments_are_named(alone: ranks.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for message, call in WRONG:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call(alone.meshes[1])
    assert not list(tmp_path.iterdir())
    agree({"t": torch.ones(2, device="meta")}, layer="x")  # which has nothing else to be compared by


def test_agreement_without_a_group() -> None:
    agree({"n": 1, "mask": torch.ones(2)}, layer="routing")
    with pytest.raises(KeyError, match="n"):
        agree({"n": KeyError("n")}, layer="routing")


def test_it_is_not_imported_unasked() -> None:
    for path in (ROOT / "fastroute").rglob("*.py"):
        if "distributed" not in path.parts:
            assert not re.search(r"^\s*(from|import) .*(fastroute|\.)\.?distributed", path.read_text(), re.MULTILINE), (
                path
            )


def test_waiting_for_processes_ends() -> None:
    """Whatever they leave behind has the output open; and what they printed is told."""
    began = time.monotonic()
    assert ran(["sh", "-c", "echo said; sleep 60 & exit 3"], 30).returncode == 3
    with pytest.raises(AssertionError, match=r"(?s)not done after 0.2 s.*said"):
        ran(["sh", "-c", "echo said; sleep 60 & sleep 60"], 0.2)
    assert time.monotonic() - began < 30
