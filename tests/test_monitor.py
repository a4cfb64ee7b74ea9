"""What a monitor counts, that it changes nothing, and what its log and page make of good and bad files."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastroute
from fastroute import EfficientVectorRouting, MoE, RoutingMonitor, Selection, TaskRouter, Trajectory, Uncertainty
from fastroute import monitor as monitor_module
from fastroute.cli import main
from fastroute.loggers import RunLog, TensorBoard
from fastroute.models import CapsuleHead, SmallNORB
from fastroute.modules import watching
from fastroute.report import charts, read_run, write_report
from fastroute.tasks import live_products
from tests.helpers import seeds

K = 4


def moe() -> MoE:
    seeds.fixed_seed(0)
    return MoE(8, 8, K, 2)


def selection() -> Selection:
    return Selection(*(nn.Linear(3, 3) for _ in range(K)))


@contextmanager
def process_group() -> Iterator[None]:
    hook = sys.excepthook  # which a group puts its rank before
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = hook


def test_counts_are_those_of_the_actions() -> None:
    layer = moe()
    x = torch.randn(30, 8)
    with RoutingMonitor(layer) as monitor:
        _, aux = layer(x, return_aux=True)
        numbers = monitor.numbers()
        assert monitor.numbers() == {}
    counts = [numbers[f"gate/count/{k}"] for k in range(K)]
    assert counts == aux.counts.tolist() and numbers["gate/entries"] == 60
    assert numbers["gate/dead"] == sum(c == 0 for c in counts) == numbers["total/dead"]
    share = aux.counts.double() / 60
    entropy = float(torch.special.entr(share).sum() / torch.tensor(2.0).double().log())
    assert numbers["gate/entropy"] == pytest.approx(entropy)


def test_blocks_within_blocks() -> None:
    """Of the same monitor: it counts until the outermost one ends, by an error too, and again in the next."""
    layer = selection()
    taken = lambda: layer(torch.randn(5, 3), Trajectory(5), torch.arange(5) % K)  # noqa: E731
    monitor = RoutingMonitor(layer)
    for _ in range(2):
        with pytest.raises(KeyError), monitor:
            with monitor:
                taken()
            taken()
            raise KeyError
        taken()
        assert monitor.numbers()["Selection/entries"] == 10


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("task", [2, torch.tensor([0, 2, 1, 2])], ids=["one", "several"])
def test_a_live_network_tells_what_the_masked_one_tells(
    task: int | Tensor, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_products, "grouped_is_cheaper", lambda *_, **__: grouped)
    masked = nn.Sequential(nn.Linear(3, 8), TaskRouter(8, 3, 0.5), nn.ReLU(), nn.Linear(8, 6), TaskRouter(6, 3, 0.5))
    fastroute.set_task(masked, task)
    told = []
    for net in (masked, fastroute.live(masked)):
        with RoutingMonitor(net) as monitor:
            net(torch.randn(4, 3))
            told.append(monitor.numbers())
    assert told[0] == told[1] and told[0]["1/entries"] == 4


def test_a_weighting_that_is_not_the_models() -> None:
    """Its weights are its own matter; those of the dicts had no part in the total."""
    nodes = [{"name": t, "layers": nn.Linear(3, 1), "loss": nn.MSELoss(), "loss_weight": 4.0} for t in "ab"]
    outside, y = fastroute.FixedWeights({"a": 2.0, "b": 3.0}), [torch.randn(5, 1)] * 2
    for own in (None, "uncertainty"):
        model = fastroute.MTLModel(nodes, ["a", "b"], weighting=own)
        with RoutingMonitor(model) as monitor:
            model.loss(model(torch.randn(5, 3)), y, weighting=outside)[0].backward()
            assert set(monitor.numbers()) == {"MTLModel/loss/a", "MTLModel/loss/b"}
            model.loss(model(torch.randn(5, 3)), y)[0].backward()
            numbers = monitor.numbers()
        assert numbers["MTLModel/weight/a" if own is None else "weighting/weight/a"] == (4 if own is None else 0.5)


class Failing:
    def write(self, numbers: dict[str, float], step: int) -> None:
        raise OSError("disk full")


def test_what_a_sink_refuses_can_be_read_again() -> None:
    """With what was told in between: of decisions, tasks, shares, credits, losses, routes and conflicts."""

    seeds.fixed_seed(0)
    x, capsules = torch.randn(6, 8), EfficientVectorRouting(-1, 3, 4, 4, return_dict=True)
    bank = fastroute.multitask.MMoE(8, [nn.Linear(8, 4) for _ in range(3)], 2)
    for model, given in (
        (moe(), x), (bank, x), (TaskRouter(4, 2, sigma=0.5), x[:, :4]), (capsules, torch.ones(2, 3, 4)),
        (Uncertainty(2), torch.ones(2)),
    ):  # fmt: skip
        twin = copy.deepcopy(model)
        failing, right = RoutingMonitor(model), RoutingMonitor(twin)
        w = torch.ones(2, requires_grad=True)
        for monitor, run in ((failing, lambda m=model, x=given: m(x)), (right, lambda m=twin, x=given: m(x))):
            torch.manual_seed(1)
            run()
            monitor.gradient_conflict({"a": w[0], "b": w[1] + w[0]}, [w])
            if monitor is failing:
                with pytest.raises(OSError, match="disk full"):
                    monitor.write(Failing(), step=1)
            run()
        found, expected = failing.numbers(), right.numbers()
        assert found == pytest.approx(expected) and expected["conflict/mean"]
        assert len(expected) > 6, expected
        assert failing.numbers() == right.numbers()


def test_names_are_not_in_each_others_way() -> None:
    """Sums over all, and pairs of tasks; a task that is called as a number is."""
    chosen = torch.tensor([0, 1, 1])
    model = nn.ModuleDict({"total": selection(), "other": selection()})
    monitor = RoutingMonitor(model)
    model["total"](torch.randn(3, 3), Trajectory(3), chosen)
    model["other"](torch.randn(3, 3), Trajectory(3), chosen * 0)
    numbers = monitor.numbers()
    assert [numbers[f"{name}/dead"] for name in ("total.Selection", "other", "total")] == [K - 2, K - 1, 2 * K - 3]
    weighting = Uncertainty(["dead", "b"])
    monitor = RoutingMonitor(nn.ModuleList([weighting]))
    weighting({"dead": torch.tensor(3.0), "b": torch.tensor(2.0)})
    assert "0/loss/dead" in (numbers := monitor.numbers()) and "total/dead" not in numbers
    w = torch.ones(2, requires_grad=True)
    for names in (("a|b", "c", "a", "b|c"), ("norm/a", "b", "a|b")):
        with pytest.raises(ValueError, match=r"losses: expected tasks whose pairs A\|B .*, got .*b"):
            monitor.gradient_conflict({name: w[0] for name in names}, [w])
    assert "conflict/a|b|c" in monitor.gradient_conflict({"a|b": w[0], "c": w[1]}, [w])


def test_one_call_in_so_many_of_each_layer() -> None:
    """Of decisions, too; the routes are those of the last batch, whichever calls are counted."""
    net = fastroute.Sequential(fastroute.WPL(K, 3), selection(), fastroute.MoE(3, 3, K, 1))
    monitor = RoutingMonitor(net, every=3)
    for samples in (1, 10, 100, 1000, 20):
        net(torch.randn(samples, 3))
    numbers = monitor.numbers()
    entries = {name: n for name, n in numbers.items() if name.endswith("/entries")}
    assert len(entries) == 3 and set(entries.values()) == {1001.0}
    assert numbers["routes/samples"] == 20


def test_collapse_dead_and_dropped() -> None:
    layer = selection()
    monitor = RoutingMonitor(layer)
    layer(torch.randn(5, 3), Trajectory(5), torch.tensor([2, 2, 2, -1, 2]))
    numbers = monitor.numbers()
    assert numbers["Selection/collapsed"] == 1 and numbers["Selection/dead"] == 3 and numbers["Selection/dropped"] == 1


def test_nothing_changes() -> None:
    x, made = torch.randn(6, 8), []
    for is_watched in (False, True):
        layer = moe()
        monitor = RoutingMonitor(layer) if is_watched else None
        y = layer(x)
        y.sum().backward()
        made.append((y.detach(), *(p.grad for p in layer.parameters())))
        assert monitor is None or monitor.numbers()["gate/entries"] == 12
        assert not layer._forward_hooks and list(layer.state_dict()) == list(moe().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant: bool) -> None:
    layer = moe()
    monitor = RoutingMonitor(layer)
    y = checkpoint(layer, torch.randn(6, 8).requires_grad_(), use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert monitor.numbers()["gate/entries"] == 12


def test_copies_and_compiled_code_tell_nothing() -> None:
    layer = moe()
    monitor = RoutingMonitor(layer)
    x = torch.randn(6, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(x)
    assert monitor.numbers() == {} and monitor.silent == ["gate"]  # and no warning: it was not called
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="eager")
    compiled(x)
    with pytest.warns(UserWarning, match=r"^RoutingMonitor: gate told nothing.*force_eager") as said:
        assert monitor.numbers() == {} and monitor.silent == ["gate"]
    assert [w.filename for w in said] == [__file__]
    assert monitor.numbers() == {}  # it warns once
    with torch.compiler.set_stance("force_eager"):  # as the warning says
        compiled(x)
    assert monitor.numbers()["gate/entries"] == 12
    assert pickle.loads(pickle.dumps(monitor)).numbers() == {}
    monitor.remove()
    layer(x)
    assert monitor.numbers() == {}


#: One of every kind that tells, and a call of it.
TELLERS: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "decision": (fastroute.WPL(K, 8), lambda m: m(torch.randn(6, 8), Trajectory(6))),
    "gating": (moe(), lambda m: m(torch.randn(6, 8))),
    "selection": (selection(), lambda m: m(torch.randn(6, 3), Trajectory(6), torch.randint(K, (6,)))),
    "task": (TaskRouter(8, 3, 0.5), lambda m: m(torch.randn(4, 8), 2)),
    "tasks": (TaskRouter(8, 3, 0.5), lambda m: m(torch.randn(4, 8), torch.tensor([0, 2, 2, 1]))),
    "shares": (fastroute.MMoE(8, K, 2, out_features=4), lambda m: m(torch.randn(4, 8))),
    "credit": (EfficientVectorRouting(5, 2, 4, 3, return_dict=True), lambda m: m(torch.randn(2, 5, 4))),
    "losses": (Uncertainty(["a", "b"]), lambda m: m(torch.rand(2, requires_grad=True)).backward()),
}


#: What waits for a GPU: it reads a number, or makes a tensor of as many rows as numbers say.
WAITS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal",
    "allclose", "nonzero", "argwhere", "masked_select", "unique", "bincount", "repeat_interleave",
}  # fmt: skip


class Asked(TorchFunctionMode):
    """The names of PyTorch's functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TELLERS)
def test_telling_reads_no_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call = TELLERS[kind]
    asked, reading, seen = Asked(), Asked(), RoutingMonitor.see

    def see(*told: Any) -> None:
        with asked:
            seen(*told)

    monkeypatch.setattr(RoutingMonitor, "see", see)
    monitor = RoutingMonitor(layer)
    for _ in range(3):
        call(layer)
    assert asked.names and not WAITS & asked.names
    with reading:
        assert monitor.numbers()
    assert WAITS & reading.names


def test_tallies_copy_nothing_from_the_host() -> None:
    """On tensors without values: reading one raises, and so does mixing them with the CPU's."""
    with torch.device("meta"):
        actions, active = torch.ones(6, dtype=torch.int64), torch.ones(6).bool()
        shares, losses = torch.rand(6, 2, K), torch.rand(2, requires_grad=True)
    tallies = [monitor_module._Entries(), monitor_module._Tasks(), monitor_module._Shares(), monitor_module._Credit()]
    entries, tasks, of_shares, credit = tallies
    for _ in range(2):
        entries.add(actions, K, active, actions, 3)
        entries.add(actions[:, None], K, active)
        for task in (actions, actions[0], 1):
            tasks.add_tasks(task, 6, 3)  # type: ignore[attr-defined]
        of_shares.add(shares)  # type: ignore[attr-defined]
        credit.add(shares, shares)  # type: ignore[attr-defined]
        monitor_module._Losses().follow(("a", "b"), losses, losses.sum())
        for tally in tallies:
            assert {t.device.type for t in vars(tally.copy()).values() if isinstance(t, Tensor)} == {"meta"}
            tally.clear()


def test_nothing_is_left_of_many_steps() -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    monitors = {kind: RoutingMonitor(layer) for kind, (layer, _) in TELLERS.items()}

    def steps(count: int) -> None:
        for layer, call in TELLERS.values():
            for _ in range(count):
                call(layer)

    steps(3)
    before = alive()
    steps(10)
    assert alive() <= before  # less, where other tests leave something
    assert all(len(monitor._routes) <= 2 for monitor in monitors.values())


def test_threads_call_and_read_at_once() -> None:
    """As DataParallel's threads and a logger's: every entry is counted once, and routes are whole ones."""
    decide, select = fastroute.WPL(K, 8), Selection(*(nn.Linear(8, 8) for _ in range(K)))
    model = nn.ModuleList([decide, select])
    monitor, found, failed = RoutingMonitor(model), list[dict[str, float]](), list[BaseException]()
    calls, T, is_over = 30, 3, threading.Event()

    def train() -> None:
        try:
            for _ in range(calls):
                h, meta = torch.randn(5, 8), Trajectory(5)
                for _ in range(T):
                    h, meta, _ = select(*decide(h, meta))
        except BaseException as error:
            failed.append(error)

    def read() -> None:
        while not is_over.is_set():
            found.append(monitor.numbers())

    trains, reads = [threading.Thread(target=train) for _ in range(3)], threading.Thread(target=read)
    for thread in (*trains, reads):
        thread.start()
    for thread in trains:
        thread.join()
    is_over.set()
    reads.join()
    found.append(monitor.numbers())
    assert not failed
    for name in ("0", "1"):
        assert sum(numbers.get(f"{name}/entries", 0) for numbers in found) == 3 * calls * T * 5


def test_a_trajectory_under_way_is_no_route() -> None:
    decide = fastroute.WPL(K, 8)
    monitor, made = RoutingMonitor(decide), list[dict[str, float]]()
    for steps in (2, 1):  # another thread reads after one of two steps
        meta = Trajectory(6)
        for _ in range(steps):
            decide(torch.randn(6, 8), meta)
    reader = threading.Thread(target=lambda: made.append(monitor.numbers(reset=False)))
    reader.start()
    reader.join()
    two = monitor._routes[0].steps
    routes = torch.stack([actions for actions, _ in two], 1)
    assert made[0]["routes/distinct"] == len(routes.unique(dim=0))
    decide(torch.randn(6, 8), meta)
    assert len(monitor._last_route()) == 2 and monitor._last_route()[0] is not two[0]


def counted_once(wrap: Callable[[nn.Module], Any], name: str) -> None:
    model = wrap(nn.Sequential(OrderedDict(moe=moe(), out=nn.Linear(8, 2))))
    monitor = RoutingMonitor(model)
    assert monitor.layers == [name]
    with torch.compiler.set_stance("force_eager"):
        model(torch.randn(6, 8)).sum().backward()
    assert monitor.numbers()[f"{name}/entries"] == 12


def test_wrapped_models_are_counted_once_under_their_own_names() -> None:
    with process_group():
        counted_once(nn.DataParallel, "moe.gate")
        counted_once(nn.parallel.DistributedDataParallel, "moe.gate")
        counted_once(lambda m: torch.compile(nn.DataParallel(m), backend="eager"), "moe.gate")


@pytest.mark.long
def test_more_wrapped_models() -> None:
    """FSDP2's, FSDP's, checkpoint's, peft's, one in another: 8 s, nearly all of it to import them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["out"], r=2)
    with process_group():
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        counted_once(lambda m: fully_shard(m, mesh=mesh), "moe.gate")
        counted_once(
            lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True), "moe.gate"
        )
        counted_once(checkpoint_wrapper, "moe.gate")
        counted_once(lambda m: peft.get_peft_model(m, config), "base_model.model.moe.gate")
        counted_once(lambda m: nn.DataParallel(checkpoint_wrapper(m)), "moe.gate")


def test_replicas_of_data_parallel_are_warned_of() -> None:
    model = nn.DataParallel(moe())
    monitor = RoutingMonitor(model)
    assert monitor.numbers() == {}
    model.device_ids = [0, 1]
    with pytest.warns(UserWarning, match="gate told nothing.*DistributedDataParallel"):
        monitor.numbers()


def test_models_that_change() -> None:
    """Loaded, evaluated, taken apart, watched again, by two, with a module in two places."""
    net = nn.Sequential(moe(), moe())
    net.append(net[0])
    first, second = RoutingMonitor(net), RoutingMonitor(net, when="evaluation")
    net.load_state_dict(net.state_dict(), assign=True)
    net(torch.randn(6, 8))
    assert first.numbers()["0.gate/entries"] == 24 and second.numbers() == {}
    with torch.inference_mode():
        net.eval()(torch.randn(6, 8))
    assert first.numbers()["0.gate/entries"] == second.numbers()["0.gate/entries"] == 24
    left = net[1]
    del net[1]
    first.remove()
    first.attach()
    left(torch.randn(6, 8))
    assert first.layers == ["0.gate"] and first.numbers() == {} and second.numbers()["1.gate/entries"] == 12
    whole = io.BytesIO()
    torch.save(net, whole)
    whole.seek(0)
    torch.load(whole, weights_only=False)(torch.randn(6, 8))
    assert first.numbers() == {}


def test_tasks_weights_and_conflict() -> None:
    router = TaskRouter(8, 3, 0.5)
    monitor = RoutingMonitor(router)
    router(torch.randn(4, 8), 2)
    router(torch.randn(2, 8), torch.tensor([0, 2]))
    numbers = monitor.numbers()
    assert [numbers[f"TaskRouter/count/{t}"] for t in range(3)] == [1, 0, 5]

    weighting = Uncertainty(["a", "b"])
    monitor = RoutingMonitor(weighting)
    losses = torch.tensor([2.0, 3.0], requires_grad=True)
    (weighting(losses) * 1024).backward()  # as a gradient scaler has it
    assert losses.grad is not None
    numbers = monitor.numbers()
    assert [numbers[f"Uncertainty/weight/{t}"] for t in "ab"] == pytest.approx((losses.grad / 1024).tolist())

    w = nn.Parameter(torch.ones(2))
    found = monitor.gradient_conflict({"a": w[0] + w[1], "b": -w[0] - w[1], "c": w[0] - w[1]}, [w])
    assert found["conflict/a|b"] == pytest.approx(-1) and found["conflict/a|c"] == pytest.approx(0)
    assert w.grad is None and monitor.numbers()["conflict/lowest"] == pytest.approx(-1)


def test_credit_ignores_padding_and_is_watched() -> None:
    seeds.fixed_seed(0)
    head = CapsuleHead(5, 8, 3, parts=4, return_credit=True)
    x, mask = torch.randn(2, 6, 3, 8), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 0]])
    monitor = RoutingMonitor(head)
    y, _ = head(x, mask)
    assert monitor.numbers()["route.0/credit_entropy"] > 0
    torch.testing.assert_close(y[1:], head(x[1:, 2:5])[0])


def test_a_block_that_is_entered_again() -> None:
    layer, x = moe(), torch.randn(10, 8)
    monitor = RoutingMonitor(layer)
    for block in (monitor, monitor):
        with block:
            layer(x)
        layer(x)  # nobody watches
    assert monitor.numbers()["gate/entries"] == 40  # two calls of ten samples with two experts each


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected a fastroute layer"):
        RoutingMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="losses: expected two"):
        RoutingMonitor(moe()).gradient_conflict({})
    with pytest.raises(ValueError, match="images: expected"):
        SmallNORB()(torch.rand(1, 2, 28, 28))


# ---------------------------------------------------------------------------------------------------- log and page


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]


def test_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer, log = moe(), RunLog(tmp_path)
    monitor = RoutingMonitor(layer)
    for step in range(3):
        layer(torch.randn(10, 8))
        monitor.write(log, step=step, loss=float("nan") if step == 1 else step, **{"<script>": 1.0})
    with log.path.open("ab") as file:
        file.write(b'not json\n{"step": 3, "num')
    assert main(["report", str(tmp_path)]) == 0
    said, text = capsys.readouterr(), (tmp_path / "report.html").read_text()
    assert "unfinished" in said.err and "unfinished" in text and "no log line" in text and "NaN" in text
    page = _Page()
    page.feed(text)
    assert page.tags.count("svg") >= 4 and "script" not in page.tags and not page.references
    assert not re.search(r"url\(|@import|https?:", text) and "prefers-color-scheme" in text
    RunLog(tmp_path).write({"loss": 1.0}, 4)  # begins a line of its own
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("scale", [1e-7, 0.0105, 1.0, 123_456.0, 9.9e8, 1e300])
def test_labels_are_neither_cut_nor_in_each_others_way(scale: float) -> None:
    steps, name = [0, 100_000, 1_000_000], "a rather long name of a task"
    rows = [(name, [scale, 0.0, -scale]), ("b", [0.1, 0.2, 0.3])]
    for chart in (
        charts.lines("", steps, rows, "a unit"),
        charts.shares("", steps, [("13", [0.1, 0.05, 0.02])], "module"),
        charts.grid("", [name, "b"], [name, "b"], [[1.0, -0.5], [0.5, 1.0]], "task", "task"),
        charts.bars("", [name, "b"], [scale, scale / 2], "entries", "task"),
    ):
        labels = re.findall(r'<text x="(\S+)" y="(\S+)" text-anchor="(\w+)"[^>]*>([^<]*)<', chart)
        assert labels
        for x, _, anchor, text in labels:
            width = charts.LETTER * len(text)
            first = float(x) - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            assert first >= (14 if anchor == "end" else 0), f"{text} meets the axis' name"
            assert first + width <= charts.WIDTH, text


STRANGE = {
    "steps": ["step", [0, -1, 10**6, 2**63 - 1, -(2**63) + 1, 10**30, 10**400, True, None, "1", 1.0]],
    "times": ["time", ["nan", None, 1e30, -5, 10**400, {}, "soon"]],
    "numbers": [
        "numbers", [{"a": v, "g/count/0": v, "g/count/1": 1e308, "g/entropy": v, "conflict/a|b": v}
                    for v in (1e308, -1e308, 1e-320, "nan", "inf", "-inf", 10**400, True, None, [], {}, "1", 2**70)],
    ],
    "names": [
        "numbers", [{name: 1.0} for name in ("", "/", "//", "/entropy", "g/count/", "g/share/x", "g/by_agent/0",
                                             "total", "conflict/|", "conflict/a|b|c", "\ud800", "<b>", "a" * 5000)],
    ],
    "small": ["numbers", [{"a": 5e-324}, {"a": 0.0}]],
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_strange_lines_make_a_page_or_are_left_out(what: str, tmp_path: Path) -> None:
    """Each one alone, and all of them together, beside good ones."""
    key, values = STRANGE[what]
    good = [{"step": step, "time": 1.7e9, "numbers": {"loss": 1.0, "g/entropy": 0.5}} for step in (1, 2)]
    strange = [{**good[0], "step": 3 + i, key: value} for i, value in enumerate(values)]
    for lines in (*([line] for line in strange), strange):
        (tmp_path / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*good, *lines]))
        path, run = write_report(tmp_path)
        assert run.steps[-1] >= 2 and "</html>" in path.read_text()


def test_a_step_in_several_lines(tmp_path: Path) -> None:
    """As training and validation write it; the same number under one name again is remarked."""
    log = RunLog(tmp_path)
    for numbers in ({"loss": 1.0}, {"val/loss": 2.0}):
        log.write(numbers, 1)
    assert read_run(tmp_path).remarks == []
    for _ in range(2):
        log.write({"loss": 3.0}, 1)
    run = read_run(tmp_path)
    assert run.remarks == ["1 step was logged more than once: the last value counts."]
    assert run.numbers == {"loss": [3.0], "val/loss": [2.0]}


def test_a_failed_report_leaves_the_old_page_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog("run")
    log.write({"loss": 1.0}, 1)
    text = log.path.read_text()
    Path("folder").mkdir()
    Path("old.html").write_text("old")
    with monkeypatch.context() as broken:  # a disk that is full at the end
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(["report", "run", "--out", "old.html"]) == 1
        assert "old.html: cannot be written (No space left on device)" in capsys.readouterr().err
    for out, said in {
        "run/routing.jsonl": "out: expected another file than the log, got run/routing.jsonl",
        "folder": "folder: cannot be written (a folder)",
        "": ".: cannot be written (a folder)",
        "no/such/page.html": "page.html: cannot be written (No such file or directory)",
        "old.html/page.html": "page.html: cannot be written (Not a directory)",
        "/dev/full": "/dev/full: cannot be written (No space left on device)",
        "x" * 300: "xxx: File name too long",
    }.items():
        assert main(["report", "run", "--out", out]) == 1
        assert said in capsys.readouterr().err
    assert log.path.read_text() == text and Path("old.html").read_text() == "old"
    assert sorted(str(p) for p in Path().rglob("*")) == ["folder", "old.html", "run", "run/routing.jsonl"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\n", b"[1, 2]\n", b'{"step": 1, "num'])
def test_no_page(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "routing.jsonl").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 1
    assert "expected" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    writer = tensorboard.SummaryWriter(tmp_path)
    layer = moe()
    monitor = RoutingMonitor(layer)
    layer(torch.randn(3, 8))
    monitor.write(TensorBoard(writer), step=1)
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("routing/gate/entries")[0].value == 6


@pytest.mark.long
def test_the_page_in_chromium(tmp_path: Path) -> None:
    """Nothing sticks out of the window or of a chart at 500 and 1400 pixels. Needs a Chromium that is there."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed; test_a_page parses the page without one")
    layer, log = moe(), RunLog(tmp_path)
    monitor = RoutingMonitor(layer)
    for step in range(3):
        layer(torch.randn(10, 8))
        monitor.write(log, step=100_000 * step, loss=123_456.0 * step, learning_rate=0.00015)
    assert main(["report", str(tmp_path)]) == 0
    page = tmp_path / "report.html"
    cut = """[...document.querySelectorAll('svg text')].filter(t => {
        const label = t.getBoundingClientRect(), chart = t.ownerSVGElement.getBoundingClientRect()
        return label.left < chart.left || label.right > chart.right || label.bottom > chart.bottom}).length"""
    script = f"<script>document.title=[document.documentElement.scrollWidth,innerWidth,{cut}]</script>"
    (tmp_path / "asked.html").write_text(page.read_text() + script)
    for width in (500, 1400):  # a window is 500 wide at least
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
        said = subprocess.run(
            [*command, (tmp_path / "asked.html").as_uri()], capture_output=True, text=True, timeout=120
        )
        found = re.search(r"<title>(\d+),(\d+),0</title>", said.stdout)
        assert found is not None and int(found[1]) <= int(found[2]) <= width, said.stderr[-500:]


@pytest.mark.long
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from fastroute.lightning import RoutingCallback

    class Net(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.moe = moe()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.moe(batch[0]).square().mean()  # type: ignore[union-attr]

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.moe(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 8)), batch_size=4)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    callback = RoutingCallback(tmp_path, every_n_steps=1)
    trainer = lightning.Trainer(max_epochs=1, callbacks=[callback], enable_model_summary=False, **options)
    trainer.fit(Net(), data, data)
    run = read_run(tmp_path)
    assert run.steps == [1, 2] and run.numbers["moe.gate/entries"] == [8.0, 8.0]
    assert run.last("val/moe.gate/entries") == 16.0

    class Heard(lightning.loggers.logger.DummyLogger):  # type: ignore[misc,name-defined]
        def __init__(self, prefix: str = "routing") -> None:
            super().__init__()
            self.name_of_entries = f"{prefix}/moe.gate/entries"
            self.lines: list[tuple[int, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.lines += [(step, value) for key, value in metrics.items() if key == self.name_of_entries]

    many = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), batch_size=4)
    # batches to an optimizer step, steps to a line, batches to a validation -> each step once, with all its entries
    for accumulated, every, validated, lines in (
        (1, 2, 16, [(2, 16.0), (4, 16.0), (6, 16.0), (8, 16.0)] + [(s, 16.0) for s in (10, 12, 14, 16)]),
        (4, 1, 16, [(1, 32.0), (2, 32.0), (3, 32.0), (4, 32.0)]),
        (4, 2, 16, [(2, 64.0), (4, 64.0)]),
        (4, 3, 16, [(3, 96.0), (4, 32.0)]),
        (4, 1, 6, [(1, 32.0), (2, 32.0), (3, 32.0), (4, 32.0)]),  # validated within a step, and after one
        (1, 2, 3, [(step, 16.0) for step in range(2, 17, 2)]),
        (1, 5, 3, [(5, 40.0), (10, 40.0), (15, 40.0), (16, 8.0)]),  # and what is left at the end
    ):
        heard = Heard()
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=[RoutingCallback(every_n_steps=every)], enable_model_summary=False,
            accumulate_grad_batches=accumulated, val_check_interval=validated, **{**options, "logger": heard},
        )  # fmt: skip
        trainer.fit(Net(), many, data)
        assert heard.lines == lines, (accumulated, every, validated)

    class Odd(Net):  # a first batch of one step, then of two; made where Lightning shards models
        automatic_optimization = False

        def __init__(self, error: int | None = None) -> None:
            lightning.LightningModule.__init__(self)
            self.error = error

        def configure_model(self) -> None:
            self.moe = getattr(self, "moe", None) or moe()

        def training_step(self, batch: list[Tensor], number: int) -> None:
            if number == self.error:
                raise ZeroDivisionError
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, number))
            for _ in range(2 if number else 1):
                optimizer.step()

        test_step = predict_step = Net.validation_step

    def ran(prefix: str, *functions: Callable[[Any, nn.Module], Any], **more: Any) -> list[tuple[int, float]]:
        """What the last of them logged."""
        heard, callback, net = Heard(prefix), RoutingCallback(**more), Odd(error=3)
        for function in functions:
            heard.lines = []
            trainer = lightning.Trainer(
                max_epochs=1, callbacks=[callback], enable_model_summary=False, **{**options, "logger": heard}
            )
            function(trainer, net)
            net.error = None
            assert not any(watching.is_watched(m) for m in net.modules())
        return heard.lines

    def failed(trainer: Any, net: nn.Module) -> None:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(net, many)

    def fitted(trainer: Any, net: nn.Module) -> None:
        net.error = None
        trainer.fit(net, many)

    # steps 1, 3, ... 31: a line for every tenth that was passed, whatever the run before had counted
    once = [(11, 48.0), (21, 40.0), (31, 40.0)]
    for before in ((), (failed,), (fitted,), (lambda t, net: t.test(net, data, verbose=False),)):
        assert ran("routing", *before, fitted, every_n_steps=10) == once
    validated = lambda t, net: t.validate(net, data, verbose=False)  # noqa: E731
    for before in ((), (fitted,), (lambda t, net: t.predict(net, data),)):
        assert ran("val_routing", *before, validated, every_n_steps=10) == [(0, 16.0)]


@pytest.mark.parametrize(
    "name", ["monitor", "loggers", "models.routed_cnn", "models.small_norb", "models.task_vgg", "models.capsule_head"]
)
def test_examples_of_docstrings(name: str) -> None:
    module = importlib.import_module(f"fastroute.{name}")
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
