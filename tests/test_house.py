"""The rules of the house that a reader cannot check at a glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastroute
from fastroute.ops.efficient_routing import _backward, _forward
from fastroute.reference import tiles
from fastroute.reference.step import Grads, Step
from tests.helpers.routing_cases import Size, efficient_case, some_mask, vector_case

ROOT = Path(fastroute.__file__).resolve().parents[1]

#: Rooms by floor: an import goes down or stays on its floor, but never from one family to another.
FLOORS = (
    ("reference",),
    ("kernels", "_C"),
    ("ops",),
    ("capsules", "networks", "tasks", "multitask"),
    ("distributed", "compat", "plots", "data", "demos"),
    ("cli", "__main__"),
)
FAMILIES = FLOORS[3]


def package() -> dict[str, Path]:
    """Every module of the package, by its import name."""
    found = {}
    for folder, prefix in ((ROOT / "fastroute", "fastroute"), (ROOT / "kernels", "fastroute.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = package()


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def floor(module: str) -> int:
    """The package's face, ``fastroute/__init__.py``, is a user of the families."""
    if module == "fastroute":
        return FLOORS.index(FAMILIES) + 1
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise AssertionError(f"{module}: which floor is {room(module)!r} on? Add it to FLOORS")


def imports(module: str) -> Iterator[str]:
    """The package's modules that a module imports, anywhere in it."""
    path = MODULES[module]
    here = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        else:
            continue
        for name in names:
            name = name.replace("kernels", "fastroute.kernels", 1) if name.split(".")[0] == "kernels" else name
            if name.split(".")[0] == "fastroute":
                yield name


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for name in imports(module):
        assert floor(name) <= floor(module), f"{module} imports {name}, which is above it"
        if room(module) in FAMILIES and room(name) in FAMILIES:
            assert room(module) == room(name), f"{module} imports {name}, another family"


@pytest.mark.parametrize("module", MODULES)
def test_asserts_only_narrow_types(module: str) -> None:
    """A wrong argument is a ValueError or a TypeError: asserts vanish under -O."""

    def narrows(test: ast.expr) -> bool:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return all(map(narrows, test.values))
        if isinstance(test, ast.Compare):
            return isinstance(test.ops[0], ast.IsNot) and isinstance(test.comparators[0], ast.Constant)
        return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"

    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not isinstance(node, ast.Assert) or narrows(node.test), f"{module}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_evaluates_or_downloads(module: str) -> None:
    forbidden = {"pickle", "urllib", "requests", "http", "ftplib", "socket", "marshal", "dill"}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, module
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            assert node.module.split(".")[0] not in forbidden, module
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__"), f"{module}:{node.lineno}"
            if called == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{module}:{node.lineno}"


HOT = [name for name in MODULES if room(name) in ("reference", "kernels", "ops", *FAMILIES)]


#: Functions that read numbers: on a CPU only, or where their callers say in their documentation that they wait.
READERS = {"fastroute.reference.dispatch": ("on_host", "read"), "fastroute.multitask.named_tasks": ("decoded",)}


@pytest.mark.parametrize("module", HOT)
def test_nothing_waits_for_the_device(module: str) -> None:
    """No .item() and its relatives where tensors are computed with; ``_checks`` reads lengths on a CPU."""
    tree = ast.parse(MODULES[module].read_text())
    tree.body = [n for n in tree.body if getattr(n, "name", None) not in READERS.get(module, ())]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            waits = node.func.attr in ("item", "tolist", "nonzero", "numpy", "cpu", "unique", "masked_select")
            assert not waits, f"{module}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("module", [m for m in HOT if m != "fastroute.ops._autocast"])
def test_autocast_is_asked_in_one_place(module: str) -> None:
    """Which knows the devices that have none."""
    asking = ("autocast", "is_autocast_enabled", "get_autocast_dtype")
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert getattr(node, "attr", None) not in asking, f"{module}:{node.lineno}"


def test_the_reference_depends_on_no_value() -> None:
    """On fake tensors whatever would need a value raises: the same passes are then free of host syncs on a GPU."""
    mode = FakeTensorMode()

    def fake(tensors: object) -> object:
        return tree_map_only(torch.Tensor, mode.from_tensor, tensors)

    for options in ({}, {"linear": True, "shared_scores": True}, {"first": True}, {"first": True, "linear": True}):
        case = vector_case(Size(2, 300, 5, 12), mask=some_mask(2, 300, 5), lengths=[300, 7], **options)  # type: ignore[arg-type]
        given = fake(case.inputs)
        assert isinstance(given, dict)
        with mode:
            step = Step(gate_weight=None, gate_bias=None, scale=None, **given)
            tiles.forward(step)
            buffers = {k: torch.empty_like(t) for k in case.wrt if k != "pred" and (t := getattr(step, k)) is not None}
            tiles.backward(step, *fake(list(case.cotangents.values())), Grads(True, **buffers))  # type: ignore[misc]
    for linear, lengths, mask in ((False, [300, 7], None), (True, None, None), (True, [300, 7], some_mask(2, 300, 5))):
        case = efficient_case(Size(2, 300, 5, 12), linear=linear, lengths=lengths, mask=mask)
        args = (*fake(list(case.inputs.values())), 3, True, "reference", "")  # type: ignore[misc]
        with mode:
            out, *saved = _forward(*args)
            _backward(*args, torch.ones_like(out), *saved, True, True)


def test_a_routed_network_depends_on_no_value() -> None:
    """Nor does a training step of a routed network on the backend that a GPU takes."""
    K, B = 4, 6
    decisions = [fastroute.WPL(K, num_agents=K, policy_storage_type="tabular"), fastroute.ActorCritic(K, 3)]
    decisions[0].additional_reward_func = fastroute.CollaborationReward(0.3, K)
    selections = [fastroute.Selection(*(torch.nn.Linear(3, 3) for _ in range(K))) for _ in decisions]
    loss = fastroute.Loss(torch.nn.CrossEntropyLoss(), fastroute.NegLossReward())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fastroute.use_backend("reference"), mode:
        x, truth, mask = mode.from_tensor(torch.randn(B, 3)), torch.empty(B, dtype=torch.int64), torch.empty(B) > 0
        y, meta, agents = fastroute.Initialization()(x, tasks=torch.empty(B, dtype=torch.int64))
        y, meta, agents = fastroute.PerTaskAssignment()(y, meta, agents)
        for decide, select in zip(decisions, selections, strict=True):
            y, meta, actions = decide(y, meta, agents, mask=mask)
            y, meta, actions = select(y, meta, actions, mask=mask)
        sum(loss(y, meta, truth)).backward()


def test_the_public_face() -> None:
    for name in (
        "EfficientVectorRouting",
        "credit_assignment",
        "use_backend",
        "explain",
        "strict",
        "BackendUnavailable",
        "ops",
        "__version__",
    ):
        assert hasattr(fastroute, name), name
    assert fastroute.EfficientVectorRouting is fastroute.capsules.EfficientVectorRouting
    for family in (fastroute.networks, fastroute.tasks, fastroute.multitask):
        for name in family.__all__:
            assert getattr(fastroute, name) is getattr(family, name), name
    assert (ROOT / "fastroute" / "py.typed").exists()


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("ops", *FAMILIES)])
def test_what_users_call_is_documented(module: str) -> None:
    """An op's function, named like its file; a family's classes and their ``forward``."""
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), module
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == module.rpartition(".")[2]:
            assert ast.get_docstring(node), f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and room(module) in FAMILIES:
            for part in (node, *(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward")):
                assert ast.get_docstring(part), f"{module}.{part.name}"
