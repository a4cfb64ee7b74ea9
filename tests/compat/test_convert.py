"""``fastroute convert``: every golden checkpoint both ways, what is reported, and what is refused without a trace."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import multitask, networks
from fastroute.cli import main
from fastroute.compat.checkpoints import UPSTREAMS, CannotConvert, Report, convert
from fastroute.compat.heinsen_routing import EfficientVectorRouting
from fastroute.compat.heinsen_routing_2019 import Routing
from fastroute.compat.torchmtl import MTLModel
from fastroute.multitask import Uncertainty
from tests.helpers import golden

GOLDEN = golden.GOLDEN


def states(found: Any, key: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts in a golden file."""
    if isinstance(found, dict) and found and all(isinstance(t, Tensor) for t in found.values()):
        if "state" in key or "decisions" in key or "selections" in key or key in ("last", "first"):
            yield key, found
    elif isinstance(found, (dict, list)):
        for k, inner in found.items() if isinstance(found, dict) else enumerate(found):
            if k not in ("params", "grads", "input_grads", "param_grads"):
                yield from states(inner, f"{key}.{k}".lstrip(".") if isinstance(inner, (dict, list)) else key)


FAMILIES = {
    "capsules": "heinsen_routing", "networks": "PytorchRouting", "tasks": "taskrouting", "multitask": "torchmtl",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_golden_checkpoint_goes_both_ways(family: str, tmp_path: Path) -> None:
    """There by safetensors, back by torch.save: bit for bit, whatever the dtype."""
    upstream, seen = FAMILIES[family], 0
    known: set[Any] = set()
    for file in golden.names(family, "*.pt"):
        for where, state in states(golden.load(family, file)):
            kind = tuple((k, t.shape, t.dtype) for k, t in state.items())
            seen += 1
            if kind in known:  # one of each form: hundreds differ in their numbers alone
                continue
            known.add(kind)
            paths = [tmp_path / name for name in ("there.pt", "here.safetensors", "there_again.pt")]
            torch.save(state, paths[0])
            report = convert(paths[0], paths[1], upstream)
            again = convert(paths[1], paths[2], upstream, back=True)
            made = torch.load(paths[2], weights_only=True)
            assert made.keys() == state.keys() == set(report.taken) == set(again.taken), (file, where)
            assert not (report.renamed or report.left or again.renamed or again.left)
            for key, t in state.items():
                assert made[key].dtype == t.dtype and torch.equal(made[key], t), (file, where, key)
    assert seen >= {"capsules": 50, "networks": 100, "tasks": 2, "multitask": 2}[family]


def test_one_checkpoint_of_2019_serves_both(trip: Trip, tmp_path: Path) -> None:
    for n_out in (3, -1):
        layer = Routing(2, 3, 4, n_inp=5, n_out=n_out)
        for upstream in ("heinsen_routing_2019", "heinsen_routing"):
            assert not trip(layer.state_dict(), upstream).left


Trip = Callable[..., Report]


@pytest.fixture
def trip(tmp_path: Path) -> Trip:
    """A state dict from in.pt to out.pt."""

    def run(state: Any, upstream: str, back: bool = False) -> Report:
        torch.save(state, tmp_path / "in.pt")
        return convert(tmp_path / "in.pt", tmp_path / "out.pt", upstream, back=back)

    return run


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=EfficientVectorRouting(-1, 3, 4, 2)))
    state = {f"module.{k}": t for k, t in head.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "in.pt")
    argv = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors"), "--from", "heinsen_routing"]
    assert main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "layers   head: EfficientVectorRouting(n_inp=-1, n_out=3, d_inp=4, d_out=2)"
    assert "renamed  module.body.weight -> body.weight" in said
    assert said[-3:] == ["left     epoch: beside 'state_dict'", "left     optimizer: beside 'state_dict'",
                         f"0 taken, {len(state)} renamed, 2 left"]  # fmt: skip
    from safetensors.torch import load_file

    head.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)


def test_what_only_fastroute_has_stays_here(trip: Trip, tmp_path: Path) -> None:
    nodes = [{"name": "A", "layers": nn.Linear(2, 1), "loss": nn.MSELoss()}]
    model = multitask.MTLModel(nodes, ["A"], weighting="uncertainty")
    report = trip(model.state_dict(), "torchmtl", back=True)
    assert all(key.startswith("weighting.") for key in report.left) and report.left
    MTLModel(nodes, ["A"]).load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=True)


@pytest.mark.parametrize("name", ["loss_modules", "weighting"])
@pytest.mark.parametrize("layers", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())], ids=["one", "several"])
def test_nodes_by_the_names_of_what_only_fastroute_has(
    name: str, layers: nn.Module, trip: Trip, tmp_path: Path
) -> None:
    nodes = [
        {"name": name, "layers": layers},
        {"name": "A", "layers": nn.Linear(2, 1), "anchor_layer": name, "loss": nn.MSELoss(), "loss_weight": "auto",
         "loss_init_val": 1.0},
    ]  # fmt: skip
    state = MTLModel(nodes, ["A"]).state_dict()
    assert not trip(state, "torchmtl", back=True).left
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(made) == list(state)
    MTLModel(nodes, ["A"]).load_state_dict(made, strict=True)


def test_a_node_that_looks_like_losses_is_refused(trip: Trip) -> None:
    """Its keys were left out, as if they were fastroute's."""
    layers = nn.Sequential()
    layers.A = nn.Linear(2, 2)
    nodes = [
        {"name": "loss_modules", "layers": layers},
        {"name": "A", "layers": nn.Linear(2, 1), "anchor_layer": "loss_modules", "loss": nn.MSELoss()},
    ]
    state = MTLModel(nodes, ["A"]).state_dict()
    assert "loss_modules.A.weight" in state
    with pytest.raises(
        CannotConvert, match=r"^loss_modules\.A\.weight: expected to know whether loss_modules is a node"
    ):
        trip(state, "torchmtl", back=True)


def test_parameters_of_losses_stay_here(trip: Trip, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.scale * (a - b).square().mean()

    for layers in (nn.Linear(2, 1), nn.Identity()):
        nodes = [{"name": "A", "layers": layers, "loss": Scaled()}, {"name": "B", "layers": nn.Linear(2, 1)}]
        weighting = Uncertainty(2) if isinstance(layers, nn.Identity) else "uncertainty"
        report = trip(multitask.MTLModel(nodes, ["A", "B"], weighting=weighting).state_dict(), "torchmtl", back=True)
        assert "loss_modules.A.scale" in report.left and "weighting.log_variance" in report.left
        MTLModel(nodes, ["A", "B"]).load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=True)


def test_batch_norms_keep_their_version(trip: Trip, tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), EfficientVectorRouting(2, 3, 3, 3))
    trip(model.state_dict(), "heinsen_routing")
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert made._metadata["0"]["version"] == 2
    model.load_state_dict(made, strict=True)


EVR = EfficientVectorRouting(2, 3, 4, 5).state_dict()
WRONG: dict[str, tuple[Any, str, str]] = {
    "mixed up": (EVR, "PytorchRouting", "expected a state dict of PytorchRouting, found layers of heinsen_routing; "),
    "mixed up again": ({"features.1._unit_mapping": torch.ones(2, 3)}, "torchmtl", "found layers of taskrouting"),
    "foreign": (nn.Linear(2, 2).state_dict(), "heinsen_routing", "found none of its layers' keys among 2, such as we"),
    "foreign to all": (nn.Linear(2, 2).state_dict(), "torchmtl", "found none of its layers' keys"),
    "half": ({k: EVR[k] for k in list(EVR)[:5]}, "heinsen_routing", "the root: expected all keys of EfficientVectorRo"),
    "half a layer": ({"a.CONST_one": torch.ones(())}, "heinsen_routing_2019", "a.: expected all keys of Generative"),
    "shapes": (EVR | {"W_S": torch.ones(2, 2)}, "heinsen_routing", r"W_S: expected shape \[2, 3\], got \[2, 2\]"),
    "no masks": (
        {"a._unit_mapping": torch.full((2, 3), torch.nan)},
        "taskrouting",
        "a._unit_mapping: expected zeros and ones",
    ),
    "no tensors": ({"a": 1}, "torchmtl", "expected a state dict, a dict of tensors by name, got no tensors"),
    "a tensor": (torch.ones(2), "torchmtl", "got a Tensor"),
    "under another name": ({"net": EVR, "epoch": 1}, "heinsen_routing", "no tensors; there are some under 'net': save"),
    "a list of it": ([EVR], "heinsen_routing", "got a list"),
}


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "DataParallel": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": t for k, t in s.items()},
    "DataParallel, compiled": lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
    "compiled, DataParallel": lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()},
    **{f"under {key}": lambda s, key=key: {key: s, "epoch": 1} for key in ("state_dict", "model", "model_state_dict")},
    "twice": lambda s: {"model": {"state_dict": s, "epoch": 1}, "optimizer": {"state": {}}},
    "twice, DataParallel": lambda s: {"model": {"state_dict": {f"module.{k}": t for k, t in s.items()}}},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_training_loops_wrap(how: str, trip: Trip, tmp_path: Path) -> None:
    given = WRAPPED[how](dict(EVR))
    report = trip(given, "heinsen_routing")
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert made.keys() == EVR.keys() and all(torch.equal(made[k], t) for k, t in EVR.items())
    prefixed = "odul" in str(list(given)) + str(given.get("model", "")) or "_orig" in next(iter(given))
    assert len(report.taken) + len(report.renamed) == len(EVR) and bool(report.renamed) == prefixed
    assert list(report.renamed.values()) == (list(EVR) if prefixed else [])


@pytest.mark.parametrize("kind", ["quantized", "sparse", "on meta"])
def test_tensors_that_safetensors_lacks(kind: str, tmp_path: Path) -> None:
    t = torch.ones(2, 3)
    odd = {"quantized": lambda: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "sparse": t.to_sparse,
           "on meta": lambda: t.to("meta")}[kind]()  # fmt: skip
    torch.save({**EVR, "body.weight": odd}, tmp_path / "in.pt")
    with pytest.raises(CannotConvert, match=f"body.weight: expected a dense tensor, .* got one {kind}; write a .pt"):
        convert(tmp_path / "in.pt", tmp_path / "out.safetensors", "heinsen_routing")
    convert(str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "heinsen_routing")
    torch.save({"a._unit_mapping": odd}, tmp_path / "in.pt")
    with pytest.raises(CannotConvert, match="unit_mapping: expected zeros and ones"):
        convert(tmp_path / "in.pt", tmp_path / "out.pt", "taskrouting")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pt", "out.pt"]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_checkpoint_of_it(case: str, trip: Trip, tmp_path: Path) -> None:
    state, upstream, message = WRONG[case]
    (tmp_path / "out.pt").write_text("before")
    with pytest.raises(CannotConvert, match=message):
        trip(state, upstream)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.pt", "out.pt"]
    assert (tmp_path / "out.pt").read_text() == "before"


def test_whole_models_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever format: the error says what to do."""
    ran = []
    foreign = types.ModuleType("heinsen_routing_foreign")
    monkeypatch.setitem(sys.modules, foreign.__name__, foreign)
    body = {"__module__": foreign.__name__, "__qualname__": "Model", "__setstate__": lambda self, state: ran.append(1)}
    foreign.Model = type("Model", (nn.Module,), body)  # type: ignore[attr-defined]
    for name, zipped in (("new.pt", True), ("legacy.pt", False)):
        torch.save(foreign.Model(), tmp_path / name, _use_new_zipfile_serialization=zipped)  # type: ignore[attr-defined]
        with pytest.raises(
            CannotConvert, match=r"objects of heinsen_routing_foreign\.Model.*weights_only=False\)\.stat"
        ):
            convert(tmp_path / name, tmp_path / "out.pt", "heinsen_routing")
    assert not ran and not (tmp_path / "out.pt").exists()


def test_decayed_masks(trip: Trip) -> None:
    """What upstream's weight decay leaves, which compat's routers load."""
    mapping = torch.tensor([[0.95, 0.0, 0.9]])
    (layer,) = trip({"a._unit_mapping": mapping}, "taskrouting").layers
    assert layer == "a: TaskRouter(unit_count=3, task_count=1, sigma=1) with decayed masks, as fastroute.compat has"


@pytest.mark.parametrize("make", [
    lambda: networks.Selection(nn.Linear(2, 3), nn.Linear(2, 3), stacked=True),
    lambda: networks.REINFORCE(2, 3, 2, stacked=True),
    lambda: nn.Sequential(networks.REINFORCE(2, 3, 2), networks.Selection(nn.Linear(2, 3), nn.Identity())),
], ids=["selection", "decision", "none is stacked"])  # fmt: skip
def test_stacked_modules_are_not_upstreams(make: Callable[[], nn.Module], trip: Trip) -> None:
    model = make()
    if any(isinstance(part, networks.Stack) for part in model.modules()):
        with pytest.raises(CannotConvert, match=r"pattern\.\S+: expected modules in lists.*unstacked_state_dict"):
            trip(model.state_dict(), "PytorchRouting", back=True)
    assert not trip(networks.unstacked_state_dict(model), "PytorchRouting", back=True).left


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("cut", [0, 10, -40])
def test_truncated_files(cut: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part, out = (tmp_path / f"{name}.{suffix}" for name in ("whole", "part", "out"))
    torch.save(EVR, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", whole, "heinsen_routing")
    part.write_bytes(whole.read_bytes()[:cut])
    assert main(["convert", str(part), str(out), "--from", "heinsen_routing"]) == 1
    said = capsys.readouterr()
    assert f"{part}: expected a state dict that torch.save or safetensors wrote, got a truncated file" in said.err
    assert not said.out and not out.exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["no.pt", "out.pt", "--from", "torchmtl"], 1, "no.pt: expected a file, found none"),
        (["in.pt", "no/such/out.pt", "--from", "heinsen_routing"], 1, "out.pt: expected a file in an existing folder"),
        (["in.pt", "in.pt", "--from", "heinsen_routing"], 1, "in.pt: expected another file than in.pt, which is kept"),
        (["in.pt", "./in.pt", "--from", "heinsen_routing"], 1, "in.pt: expected another file than in.pt"),
        (["in.pt", "", "--from", "heinsen_routing"], 1, ".: cannot be written (a folder)"),
        (["in.pt", "/dev/full", "--from", "heinsen_routing"], 1, "/dev/full: cannot be written"),
        (["in.pt", "x" * 300, "--from", "heinsen_routing"], 1, "xxx: File name too long"),
        (["x" * 300, "out.pt", "--from", "heinsen_routing"], 1, "xxx: File name too long"),
        ([".", "out.pt", "--from", "heinsen_routing"], 1, ".: expected a file, found none"),
        (["in.pt", "out.pt"], 2, "one of the arguments --from --to is required"),
        (["in.pt", "out.pt", "--from", "torchMTL"], 2, "invalid choice: 'torchMTL'"),
        (["in.pt", "out.pt", "--from", "torchmtl", "--to", "torchmtl"], 2, "not allowed with argument"),
    ],
)
def test_misuse(
    argv: list[str], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(EVR, "in.pt")
    assert main(["convert", *argv]) == status
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.pt"]


def test_every_upstream_is_known() -> None:
    assert set(UPSTREAMS) == {*FAMILIES.values(), "heinsen_routing_2019"}
