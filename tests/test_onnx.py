"""Every family's inference module by ``torch.onnx.export(dynamo=True)``, run by onnxruntime: PyTorch's numbers at any
batch size. And the same modules in PyTorch's own ops by ``torch.export``.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import fastroute
from fastroute import networks, tasks
from fastroute.multitask import CrossStitch, MTLModel, MultiHead
from tests.helpers import seeds
from tests.helpers.budget import assert_within_budget
from tests.helpers.layers import ACTIONS, LAYERS, TASK, B, F, K, LayerCase, Outputs, T, rand
from tests.helpers.matrix import cell, tried
from tests.helpers.multitask import README_TASKS, readme
from tests.helpers.networks import LEARNING, decision, linears
from tests.helpers.subprocesses import ROOT, check_python
from tests.tasks.nets import conv_net, images


class Decided(nn.Module):
    """A decision of each task's agent, and what is selected."""

    def __init__(self, algo: str) -> None:
        super().__init__()
        self.begin, self.decide, self.select = networks.Initialization(), decision(algo, K, T), linears(K)

    def forward(self, x: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        x, meta, actions = self.decide(*self.begin(x, tasks=task)[:2], task)
        return self.select(x, meta, actions)[0], actions


class Routed(nn.Module):
    """A decision and a selection, twice: the second agents are the first actions, the first ones the tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = networks.Initialization()
        self.first, self.second = decision("WPL", K, K), decision("WPL", K, K)
        self.one, self.two = linears(K), linears(K, unused_grad="zeros")

    def forward(self, x: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        x, meta, _ = self.begin(x, tasks=task)
        x, meta, actions = self.first(x, meta, task)
        x, meta, _ = self.one(x, meta, actions)
        x, meta, actions = self.second(x, meta, actions)
        return self.two(x, meta, actions)[0], actions


def unlike() -> nn.Module:
    """Modules that cannot run together."""
    layers = (nn.Linear(F, F), nn.Sequential(nn.Linear(F, 4), nn.Tanh(), nn.Linear(4, F)), nn.Identity())
    return Selected(networks.Selection(*layers, dropped="identity"))


class Selected(nn.Module):
    def __init__(self, select: nn.Module) -> None:
        super().__init__()
        self.select = select

    def forward(self, x: Tensor, actions: Tensor) -> Tensor:
        made: Tensor = self.select(x, networks.Initialization()(x)[1], actions)[0]
        return made


def sequence() -> nn.Module:
    layers = (networks.PerTaskAssignment(), networks.QLearning(K, F, num_agents=T), linears(K), nn.ReLU())
    return Outputs(networks.Sequential(*layers))


def of_task(one: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A routed convolutional network with BatchNorms, in the form of one task, or of all."""

    def build() -> nn.Module:
        net = one(conv_net(True).eval())
        tasks.set_task(net, 2)
        return net

    return build


class Cell(nn.Module):
    """A recurrent cell with two routed layers, without its trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = networks.RoutingGRUCell(F, 4, K, 2, networks.REINFORCE)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        made: Tensor = self.cell(x, hidden)[0]
        return made


def over_features() -> nn.Module:
    """Masks, or what is computed alive, over the last of three axes."""
    masks = seeds.generator(0)
    layers = (nn.Linear(F, 8), tasks.TaskRouter(8, T, 0.5, generator=masks, axis=-1), nn.GELU(), nn.Linear(8, 4))
    return tasks.live(nn.Sequential(*layers))


def stack() -> nn.Module:
    routing = fastroute.EfficientVectorRouting
    return nn.Sequential(routing(-1, 3, F, 5), nn.LayerNorm(5), routing(3, 2, 5, 4, normalize=False))


CASES: dict[str, LayerCase] = {
    **{name: LAYERS[name] for name in tried("ONNX")},
    "EfficientVectorRouting, stack": LayerCase(stack, rand(2, 4, F)),
    "GenerativeMatrixRouting, any number": LayerCase(
        lambda: fastroute.GenerativeMatrixRouting(-1, 3, 2, 2, 2, p_model="skm"), rand(2, 4), rand(2, 4, 2, 2, seed=2)
    ),
    "Selection, unlike modules": LayerCase(unlike, rand(B, F), rest=(ACTIONS,)),
    "Selection, convolutions": LayerCase(
        lambda: Selected(networks.Selection(*(nn.Conv2d(3, 4, 3) for _ in range(K)))), images(B), rest=(ACTIONS,)
    ),
    "MoE, not gated": LayerCase(
        lambda: networks.MoE(F, 4, K, 1, gated=False, activation="gelu", scores="sigmoid"), rand(B, F)
    ),
    **{f"{algo}, decided": LayerCase(lambda algo=algo: Decided(algo), rand(B, F), rest=(TASK,)) for algo in LEARNING},
    "WPL, routed": LayerCase(Routed, rand(B, F), rest=(TASK,)),
    "Sequential": LayerCase(sequence, rand(B, F), rest=(TASK,)),
    "live, convolutions": LayerCase(of_task(tasks.live), images(B)),
    "live, convolutions, tasks": LayerCase(of_task(tasks.live), images(B), rest=(TASK,)),
    "live, last axis": LayerCase(over_features, rand(B, 4, F)),
    "live, last axis, tasks": LayerCase(over_features, rand(B, 4, F), rest=(TASK,)),
    "RoutingGRUCell": LayerCase(Cell, rand(B, F), rand(B, 4, seed=2)),
    "masked, convolutions": LayerCase(of_task(lambda net: net), images(B)),
    "fold": LayerCase(lambda: tasks.fold(conv_net(True).eval(), 2), images(B)),
    "extract_task": LayerCase(lambda: tasks.extract_task(conv_net(True).eval(), 2), images(B)),
    "MTLModel": LayerCase(lambda: MTLModel(readme(), README_TASKS).outputs_only(), rand(B, 16)),
    "CrossStitch": LayerCase(lambda: CrossStitch(T), rand(B, F), rand(B, F, seed=2), rand(B, F, seed=3)),
    "MultiHead, by task": LayerCase(lambda: MultiHead(F, 4, 2, T), rand(B, F), rest=(TASK,)),
}
#: What make test tries; the rest is long.
FIRST = ("EfficientVectorRouting, any length", "TaskRouter", "MTLModel")
#: What the checks compile by AOTInductor: it calls ops of ours, some with lists that are empty.
PACKED = "QLearning, tabular"
TRIED = [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.long]) for name in CASES]


@pytest.fixture(scope="module", autouse=True)
def _translations_are_read_once() -> Iterator[None]:
    """Those of PyTorch's operators, which every export would make anew for half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


def given(case: LayerCase) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    """The layer in float32 and eval, and what it is called with."""

    def narrow(t: Any) -> Any:
        return t.float() if isinstance(t, Tensor) and t.is_floating_point() else t

    layer = case.layer().float().eval()
    return layer, tuple(map(narrow, (*case.inputs, *case.rest))), {k: narrow(t) for k, t in case.options.items()}


def any_batch(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The ``dynamic_shapes`` for which axis 0 is a batch."""
    named = inspect.signature(layer.forward).bind(*args, **options).arguments
    batch = torch.export.Dim("batch")
    return tree_map_only(Tensor, lambda _: {0: batch}, dict(named))  # type: ignore[no-any-return]


def sizes(args: Any, options: Any) -> Iterator[tuple[Any, Any]]:
    """The inputs, a single sample, and more than there are."""
    for other in (lambda t: t, lambda t: t[:1], lambda t: torch.cat([t.flip(0), t, t])):
        yield tree_map_only(Tensor, other, args), tree_map_only(Tensor, other, options)


def check(layer: nn.Module, run: Callable[..., Any], args: Any, options: Any) -> None:
    with torch.no_grad():
        for some, others in sizes(args, options):
            expected = [t for t in tree_leaves(layer(*some, **others)) if isinstance(t, Tensor)]
            for got, want in zip(run(*some, **others), expected, strict=True):
                torch.testing.assert_close(got, want)


def to_onnx(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """Written by PyTorch, read by onnxruntime."""
    file = io.BytesIO()
    shapes = any_batch(layer, args, options)
    program = torch.onnx.export(layer, args, kwargs=options, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*args: Tensor, **options: Tensor) -> list[Tensor]:
        feed = {name: t.numpy() for name, t in zip(names, (*args, *options.values()), strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


@pytest.mark.parametrize("name", TRIED)
def test_onnx(name: str) -> None:
    layer, args, options = given(CASES[name])
    check(layer, to_onnx(layer, args, options), args, options)


def exported(case: LayerCase, backend: str) -> tuple[torch.export.ExportedProgram, nn.Module, Any, Any]:
    layer, args, options = given(case)
    with fastroute.use_backend(backend):
        program = torch.export.export(layer, args, options, dynamic_shapes=any_batch(layer, args, options))
    return program, layer, args, options


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_exported_on_the_reference_has_only_ops_of_pytorch(name: str) -> None:
    program, layer, args, options = exported(CASES[name], "reference")
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets and not [target for target in targets if "fastroute" in target]
    run = program.module()
    check(layer, lambda *args, **options: tree_leaves(run(*args, **options)), args, options)


LOADS = """
import torch
given = torch.load(sys.argv[1] + ".pt", weights_only=True)
for name, (args, options, expected) in given.items():
    made = torch.export.load(f"{sys.argv[1]}-{name}.pt2").module()(*args, **options)
    for got, want in zip(torch.utils._pytree.tree_leaves(made), expected, strict=True):
        torch.testing.assert_close(got, want)
"""


#: By backend: which programs are loaded in another process, and what it does first.
APART = {
    "reference": (FIRST, 'sys.modules["fastroute"] = None'),
    "auto": ((*FIRST, "Selection", PACKED), "import fastroute"),
}


@pytest.mark.long
@pytest.mark.parametrize("backend", APART)
def test_loads_in_another_process(backend: str, tmp_path: Path) -> None:
    """Where fastroute is not installed; of fastroute's ops, where nothing but the import has been done."""
    names, first = APART[backend]
    kept = {}
    for k, name in enumerate(names):
        program, layer, args, options = exported({**LAYERS, **CASES}[name], backend)
        torch.export.save(program, tmp_path / f"model-{k}.pt2")
        kept[k] = args, options, [t.detach() for t in tree_leaves(layer(*args, **options))]
    torch.save(kept, tmp_path / "model.pt")
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys\n{first}\n{LOADS}", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.long
def test_the_first_call_may_be_traced() -> None:
    """What a process asks of C++ before it first uses it is in no graph."""
    check_python(
        "import io, torch, fastroute\n"
        "layer = fastroute.EfficientVectorRouting(4, 3, 6, 5).eval()\n"
        "program = torch.export.export(layer, (torch.randn(2, 4, 6),))\n"
        "ops = {str(n.target) for n in program.graph.nodes if 'fastroute' in str(n.target)}\n"
        "assert ops == {'fastroute.efficient_routing.default'}, ops\n"
        "torch.export.save(program, io.BytesIO())"
    )


#: Without these, parameters whose numbers are all alike, and small ones of one axis, are constants of the code.
CHANGEABLE = {"joint_graph_constant_folding": False, "always_keep_tensor_constants": True}


def packaged(program: torch.export.ExportedProgram, folder: Path) -> Any:
    """Compiled by AOTInductor, and loaded; no parameter is a constant of the code."""
    config = CHANGEABLE | {"aot_inductor.compile_wrapper_opt_level": "O0"}  # which is compiled sooner
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2"), inductor_configs=config
    )
    return torch._inductor.aoti_load_package(package)


def within_budget(layer: nn.Module, run: Callable[..., Any], args: Any, options: Any) -> None:
    """Near the layer in float64: of the inputs, of others of the same shapes, of one sample and of more."""

    def results(made: Any) -> dict[str, Tensor | None]:
        return {str(k): t for k, t in enumerate(tree_leaves(made)) if isinstance(t, Tensor)}

    def double(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    exact, others = copy.deepcopy(layer).double(), (args, options)
    turned = tree_map_only(Tensor, lambda t: t.flip(0), others)
    for some, more in (*sizes(args, options), turned):
        given = tree_map(double, (some, more))
        assert_within_budget(
            results(run(*some, **more)), lambda given=given: results(exact(*given[0], **given[1])), torch.float32
        )


def check_package(name: str, folder: Path) -> None:
    program, layer, args, options = exported(LAYERS[name], "auto")
    run = packaged(program, folder)
    with torch.no_grad():
        within_budget(layer, run, args, options)
        for p in layer.parameters():
            p.mul_(0.5)
        state = {**program.constants, **dict(layer.named_buffers()), **dict(layer.named_parameters())}
        names = run.get_constant_fqns()
        known = {name: state[name] for name in names if name in state}  # the compiler has made the others
        assert set(known) >= {name for name in names if not name.startswith("_tensor_constant")}
        run.load_constants(known, check_full_update=len(known) == len(names))
        within_budget(layer, run, args, options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long, *([pytest.mark.packaged] if name != PACKED else [])])
        for name in tried("AOTInductor")
    ],
)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    cell(name, "AOTInductor", lambda: check_package(name, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", ["EfficientVectorRouting", "Selection", "TaskRouter", "MTLModel"])
def test_aot_inductor_of_ops_of_pytorch(name: str, tmp_path: Path) -> None:
    program, layer, args, options = exported(CASES[name], "reference")
    within_budget(layer, packaged(program, tmp_path), args, options)


def test_exported_programs_of_unlike_modules_are_in_eval() -> None:
    layer, args, _ = given(CASES["Selection, unlike modules"])
    with pytest.raises(ValueError, match=r"modules: expected eval mode to export .* call eval\(\) first"):
        torch.export.export(layer.train(), args)


@pytest.mark.long
def test_the_page_runs() -> None:
    block, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, "export.md", "exec"), space)
    ops = [
        {str(node.target).split(".")[0] for node in space[name].graph.nodes if node.op == "call_function"}
        for name in ("program", "portable")
    ]
    assert "fastroute" in ops[0] and "fastroute" not in ops[1]
    x = torch.randn(3, 7, 64)
    torch.testing.assert_close(space["portable"].module()(x), space["net"](x))
    space["portable"].module()(x).sum().backward()
    assert all(p.grad is not None for p in space["net"][2].parameters())
