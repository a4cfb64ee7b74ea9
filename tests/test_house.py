"""The rules of the house that a reader cannot check at a glance."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import re
import tokenize
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastroute
from fastroute.ops.backends import offered
from fastroute.ops.efficient_routing.op import _backward, _forward
from fastroute.ops.vector_routing import plain as tiles
from fastroute.ops.vector_routing.contract import Grads, Step
from tests.helpers.routing_cases import Size, efficient_case, some_mask, vector_case

ROOT = Path(fastroute.__file__).resolve().parents[1]

#: Rooms by floor: an import goes down or stays on its floor, but never from one family to another.
FLOORS = (
    ("kernels", "_C", "ops", "importing"),
    ("functional",),
    ("modules",),
    ("capsules", "networks", "tasks", "multitask"),
    ("distributed", "compat", "plots", "data", "monitor", "loggers", "lightning", "report", "models", "demos"),
    ("cli", "__main__"),
)
FAMILIES = ("capsules", "networks", "tasks", "multitask")


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
        return floor("fastroute.capsules") + 1
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise AssertionError(f"{module}: which floor is {room(module)!r} on? Add it to FLOORS")


def base_of(module: str, node: ast.ImportFrom) -> str:
    """The full name of what is imported from."""
    here = folder(module).split(".")
    above = here[: len(here) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def folder(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(module: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The package's modules that a module imports in some of its nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = base_of(module, node)
            names = [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        else:
            continue
        for name in names:
            name = name.replace("kernels", "fastroute.kernels", 1) if name.split(".")[0] == "kernels" else name
            if name.split(".")[0] == "fastroute":
                yield name


class Source(NamedTuple):
    """A module, parsed once for all rules."""

    module: str
    tree: ast.Module
    nodes: list[ast.AST]

    def imports(self) -> Iterator[str]:
        return imports(self.module, self.nodes)


Rule = Callable[[Source], None]
#: What is asked of which modules' sources.
RULES: list[tuple[Callable[[str], bool], Rule]] = []


def rule(applies: Callable[[str], bool] = lambda module: True) -> Callable[[Rule], Rule]:
    def noted(check: Rule) -> Rule:
        RULES.append((applies, check))
        return check

    return noted


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_the_rules(module: str) -> None:
    """Every one in ``RULES`` that is for it."""
    tree = ast.parse(MODULES[module].read_text())
    source = Source(module, tree, list(ast.walk(tree)))
    for applies, check in RULES:
        if applies(module):
            check(source)


@rule()
def imports_go_down(source: Source) -> None:
    module = source.module
    for name in source.imports():
        assert floor(name) <= floor(module), f"{module} imports {name}, which is above it"
        if room(module) in FAMILIES and room(name) in FAMILIES:
            assert room(module) == room(name), f"{module} imports {name}, another family"


@rule()
def asserts_only_narrow_types(source: Source) -> None:
    """A wrong argument is a ValueError or a TypeError: asserts vanish under -O."""

    def narrows(test: ast.expr) -> bool:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return all(map(narrows, test.values))
        if isinstance(test, ast.Compare):
            return isinstance(test.ops[0], ast.IsNot) and isinstance(test.comparators[0], ast.Constant)
        return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"

    for node in source.nodes:
        if isinstance(node, ast.Assert):
            assert narrows(node.test), f"{source.module}:{node.lineno}: {ast.unparse(node)}"


@rule()
def nothing_unpickles_evaluates_or_downloads(source: Source) -> None:
    module = source.module
    forbidden = {"pickle", "urllib", "requests", "http", "ftplib", "socket", "marshal", "dill"}
    for node in source.nodes:
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


def is_hot(module: str) -> bool:
    return room(module) in ("kernels", "ops", *FAMILIES)


#: Functions that read numbers: on a CPU only, or where their callers say in their documentation that they wait.
READERS = {"fastroute.ops.host": ("on_host", "read", "memory"), "fastroute.multitask.named_tasks": ("decoded",)}


@rule(is_hot)
def nothing_waits_for_the_device(source: Source) -> None:
    """No .item() and its relatives where tensors are computed with; ``_checks`` reads lengths on a CPU."""
    readers = [n for n in source.tree.body if getattr(n, "name", None) in READERS.get(source.module, ())]
    allowed = {part for reader in readers for part in ast.walk(reader)}
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node not in allowed:
            waits = node.func.attr in ("item", "tolist", "nonzero", "numpy", "cpu", "unique", "masked_select")
            assert not waits, f"{source.module}:{node.lineno}: {ast.unparse(node)}"


@rule(lambda module: is_hot(module) and module != "fastroute.ops.precision")
def autocast_is_asked_in_one_place(source: Source) -> None:
    """Which knows the devices that have none."""
    asking = ("autocast", "is_autocast_enabled", "get_autocast_dtype")
    for node in source.nodes:
        assert getattr(node, "attr", None) not in asking, f"{source.module}:{node.lineno}"


def test_export_is_asked_in_one_place() -> None:
    """Which knows what torch 2.11 says instead."""
    asking = [m for m, path in MODULES.items() if "compiler.is_exporting()" in path.read_text()]
    assert asking == ["fastroute.ops.host"]


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
            here = getattr(fastroute, name, None) is getattr(family, name)
            assert here, (
                f"{family.__name__}.__all__ has {name}: fastroute/__init__.py has to import it, and its __all__ too"
            )
    assert (ROOT / "fastroute" / "py.typed").exists()


@rule(lambda module: room(module) in ("ops", *FAMILIES))
def what_users_call_is_documented(source: Source) -> None:
    """An op's function, named like its file; a family's classes and their ``forward``."""
    module, tree, _ = source
    assert ast.get_docstring(tree), module
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == module.rpartition(".")[2]:
            assert ast.get_docstring(node), f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and room(module) in FAMILIES:
            for part in (node, *(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward")):
                assert ast.get_docstring(part), f"{module}.{part.name}"


# --------------------------------------------------------------------------------- ops: a folder each (ARCHITECTURE.md)

OPS = sorted(path.parent.name for path in (ROOT / "fastroute" / "ops").glob("*/op.py"))
#: Files of an op's folder by role, and those that only one op has.
ROLES = {"__init__", "op", "contract", "reference", "plain", "schema", "native", "triton"}
PARTS = {"efficient_routing": {"gram", "outputs", "passes", "streamed"}, "matrix_routing": {"settling"}}
#: Below every role: what is shared by all ops and knows none.
GROUND = {"dtypes", "host", "activations", "tiles", "registry", "precision", "environment", "backends"}
#: Glue that takes the plain path where a kernel sees only from strides or sizes that it cannot.
FALLBACKS = {("task_mask.triton", "task_mask.plain"), ("dispatch.triton", "dispatch.reference")}


def files_of(folder: str, op: str) -> set[str]:
    return {p.stem for p in (ROOT / folder / op).glob("*")} | ({op} if (ROOT / folder / f"{op}.py").exists() else set())


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_one_folder_on_every_floor(op: str) -> None:
    files = files_of("fastroute/ops", op) - {"__pycache__"}
    missing, more = {"__init__", "op", "reference"} - files, files - ROLES - PARTS.get(op, set())
    assert not missing, f"fastroute/ops/{op} has no {', '.join(f'{name}.py' for name in sorted(missing))}"
    assert not more, (
        f"fastroute/ops/{op}: {sorted(more)}: no role of ARCHITECTURE.md; rename them, or add them to PARTS"
    )
    assert op == "dispatch" or hasattr(fastroute.functional, op), f"fastroute/functional.py does not import {op}"
    tested = "test_op" in files_of("tests/ops", op) or op == "batch_norm_mask_relu"  # tested beside task_mask
    assert tested, f"tests/ops/{op} has no test_op.py"
    backends = offered().get(op, {})
    for name, offer in backends.items():
        assert importlib.util.find_spec(offer.module), f"{op} offers {name} in {offer.module}, which is not there"
    if {"schema", "native"} & files:
        assert files_of("csrc/cpu", op), f"{op} has compiled ops, but there is no csrc/cpu/{op}"
    if "triton" in files:
        assert files_of("kernels", op), f"{op} has a Triton backend, but there is no kernels/{op}"
    offers, has = "triton" in backends, "triton" in files
    assert offers == has, (
        f"{op}: op.py {'offers' if offers else 'does not offer'} Triton, triton.py is {'' if has else 'not '}there"
    )


def role(module: str) -> tuple[str, str]:
    """("vector_routing", "plain"); ("", "") for what is no part of an op."""
    parts = module.split(".")
    return (parts[2], parts[3]) if parts[1:2] == ["ops"] and len(parts) == 4 else ("", "")


@rule(lambda module: room(module) in ("ops", "kernels"))
def backends_do_not_know_one_another(source: Source) -> None:
    module = source.module
    op, own = role(module)
    for name in source.imports():
        of, other = role(name)
        if own in ("reference", "plain"):
            allowed = {"contract", "reference", *(("plain",) if own == "plain" else ())}
            allowed |= PARTS.get(of, set())
            assert (of and other in allowed) or name.split(".")[2] in GROUND, f"{module} imports {name}"
        elif own in ("contract", "schema", "native", "triton") or room(module) == "kernels":
            forbidden = {"reference", "plain", *({"native", "schema"} - {own, "schema"})}
            exempt = (f"{op}.{own}", f"{of}.{other}") in FALLBACKS
            assert other not in forbidden or exempt, f"{module} imports {name}"


@rule(lambda module: room(module) in (*FAMILIES, "modules", "compat", "demos", "plots"))
def families_know_ops_by_their_faces(source: Source) -> None:
    for name in source.imports():
        of, other = role(name)
        assert other in {"", "op", "contract", *PARTS.get(of, ())}, f"{source.module} imports {name}"
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(".op"):
            assert not {alias.name for alias in node.names} & set(fastroute.functional.__all__), (
                f"{source.module}:{node.lineno}: an op's function is imported from fastroute.functional"
            )


def test_imports_have_no_circle() -> None:
    """Of modules, as they are imported; what a function imports when it is called does not count."""
    top = {m: ast.parse(path.read_text()).body for m, path in MODULES.items()}
    graph = {m: {n for n in imports(m, top[m]) if n in MODULES and n != m} for m in MODULES}
    done: set[str] = set()
    while rest := {m for m in graph if m not in done}:
        free = {m for m in rest if graph[m] <= done}
        assert free, f"a circle is among {sorted(rest)}"
        done |= free


@rule()
def private_names_stay_in_their_folder(source: Source) -> None:
    here = folder(source.module)
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom):
            base = base_of(source.module, node)
            there = folder(base) if base in MODULES else base.rpartition(".")[0]
            for alias in node.names:
                private = alias.name.startswith("_") and base.split(".")[0] in ("fastroute", "kernels")
                assert not private or there == here, f"{source.module}:{node.lineno}: {alias.name} of {base}"


# ------------------------------------------------------------------------------------------------------------- doors


@rule(lambda module: "compat" not in module)
def no_star_is_imported(source: Source) -> None:
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{source.module}:{node.lineno}"


@pytest.mark.parametrize(
    "module",
    ["fastroute", "fastroute.functional", *(f"fastroute.{f}" for f in FAMILIES), "fastroute.networks.decisions"],
)
def test_faces_say_what_is_public(module: str) -> None:
    face = importlib.import_module(module)
    assert len(set(face.__all__)) == len(face.__all__)
    for name in face.__all__:
        assert hasattr(face, name), f"{module}.__all__ has {name}, {module} has not"
        assert not name.startswith("_")


def test_annotations_can_be_read() -> None:
    """As documentation tools and validators do."""
    for module in (m for m in MODULES if not {"kernels", "on_path"} & set(m.split("."))):
        for value in vars(importlib.import_module(module)).values():
            if getattr(value, "__module__", None) != module or not callable(value):
                continue
            methods = [getattr(f, "__func__", f) for f in vars(value).values()] if isinstance(value, type) else []
            for function in (value, *filter(inspect.isfunction, methods)):
                typing.get_type_hints(function)


def test_no_function_hides_a_module() -> None:
    for name in MODULES:
        if name.count(".") and "compat" not in name:
            parent, _, leaf = name.rpartition(".")
            found = getattr(importlib.import_module(parent), leaf, None) if parent in MODULES else None
            assert found is None or inspect.ismodule(found), f"{parent}.{leaf} is {found!r}, not the module {name}"


@rule(lambda module: module not in ("fastroute.ops.environment", "fastroute.compat.program"))  # which is for children
def the_environment_is_read_in_one_place(source: Source) -> None:
    for node in source.nodes:
        assert getattr(node, "attr", None) not in ("environ", "getenv"), f"{source.module}:{node.lineno}"


def test_the_environment_has_a_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    sources = [*MODULES.values(), *(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"]
    read = {
        n
        for p in sources
        for n in re.findall(r"""(?:environ\S*|getenv|facts|switch)\(?\[?\(?["'](FASTROUTE_\w+)""", p.read_text())
    }
    assert read >= {"FASTROUTE_BACKEND", "FASTROUTE_ISA", "FASTROUTE_BUILD"}
    assert not {name for name in read if f"`{name}`" not in page}


# --------------------------------------------------------------------------------------------- every statement true

_TOP = "fastroute|kernels|csrc|tests|bench|docs|examples"
_PATH = re.compile(rf"``?((?:{_TOP})/[\w./*-]+|[\w-]+\.(?:py|md|h|inc|cpp|cu|toml))``?")
_NAME = re.compile(r"``?((?:fastroute|bench|tests)(?:\.\w+)+)(?:\(.*?\))?``?")
_FILE = re.compile(r"(?<![\w/.-])[\w-]+\.(?:h|inc|cpp|cu)\b")
#: Made by a command, not kept.
_MADE = {"gpu-first.md"}


def _prose(path: Path) -> Iterator[str]:
    """Docstrings and comments of a Python file; all of another."""
    text = path.read_text()
    if path.suffix != ".py":
        yield text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and '"""' in token.string[:5]):
            yield token.string


@cache
def _is_there(dotted: str) -> bool:
    parts = dotted.split(".")
    for stop in range(len(parts), 0, -1):
        name = ".".join(parts[:stop])
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            there = False
        if there:
            found: Any = importlib.import_module(name)
            for part in parts[stop:]:
                if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                    return False
                found = getattr(found, part, None)
            return True
    return False


WRITTEN = [
    p
    for folder in (*_TOP.split("|"), ".")
    for p in sorted((ROOT / folder).glob("*" if folder == "." else "**/*"))
    if p.suffix in (".py", ".md", ".h", ".inc", ".cpp", ".cu") and "golden" not in p.parts and not p.is_symlink()
    and (ROOT / "fastroute" / "kernels") not in p.parents
]  # fmt: skip


@pytest.mark.parametrize("folder", [*_TOP.split("|"), "."])
def test_what_prose_names_is_there(folder: str) -> None:
    """Every path and every dotted name in backticks."""
    names = {p.name for p in WRITTEN} | {p.name for p in ROOT.iterdir()} | _MADE
    missing = []
    for path in (
        p for p in WRITTEN if (p.relative_to(ROOT).parts[0] == folder) or (folder == "." and p.parent == ROOT)
    ):
        for text in _prose(path):
            paths = {m[1].rstrip(".") for m in _PATH.finditer(text)}
            if path.suffix in (".h", ".inc", ".cpp", ".cu"):  # whose comments have no backticks
                paths |= {name for comment in re.findall(r"//.*", text) for name in _FILE.findall(comment)}
            missing += [(path.name, p) for p in paths if not (any(ROOT.glob(p)) if "/" in p else p in names)]
            missing += [(path.name, m[1]) for m in _NAME.finditer(text) if not _is_there(m[1])]
    assert not missing


#: What stands at the margin of a module; tests and hooks are called by pytest.
_DEFINED = re.compile(r"^(?:def|class) (?!test_|pytest_)(\w+)|^(?!__)([A-Za-z_]\w*)(?:: [^=\n]+)? = ", re.MULTILINE)


def test_every_name_is_read() -> None:
    """One that the library, the kernels, the benchmarks or the tests' helpers define stands somewhere else, too."""
    texts = {p.relative_to(ROOT).parts: p.read_text() for p in WRITTEN if p.suffix == ".py"}
    words = Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
    ours = [t for p, t in texts.items() if p[0] in ("fastroute", "kernels", "bench") or p[:2] == ("tests", "helpers")]
    defined = Counter(m[1] or m[2] for text in ours for m in _DEFINED.finditer(text))
    unread = [name for name, times in defined.items() if words[name] == times]
    assert not unread, f"nobody reads {', '.join(unread)}"


#: Words of the longest sentence of the docs.
LONGEST = 36
#: No prose: tables that a command writes, fenced and indented blocks, headings, rows of a table, pictures, tags.
_NO_PROSE = (
    re.compile(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", re.DOTALL),
    re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE),
    re.compile(r"^(?: {4}| *[|#<!]).*$", re.MULTILINE),
)
_ITEM = re.compile(r"\n\s*(?:[*+-]|\d+\.) ")


def sentences(page: str) -> Iterator[str]:
    """Of paragraphs and list items; code in a sentence and a link's text count as their words."""
    for pattern in _NO_PROSE:
        page = pattern.sub("\n", page)
    for part in re.split(r"\n\s*\n", _ITEM.sub("\n\n", "\n" + page)):
        text = re.sub(r"\]\([^)]*\)", "]", " ".join(part.split()))
        text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", lambda code: re.sub(r"[.!?]", "_", code[0]), text)
        yield from re.split(r"(?<=[.!?])[)*\"]*\s+", text)


def test_sentences_are_found() -> None:
    page = (
        "# Not. Here\n\nOne `x. y` [fact](a.b c d). Another\none.\n* An item\n* Two\n\n"
        "```py\nno. no\n```\n| no. no |\n<!-- begin t-cpu -->\nno. no\n<!-- end t-cpu -->\nLast."
    )
    assert [s for s in sentences(page) if s] == ["One `x_ y` [fact].", "Another one.", "An item", "Two", "Last."]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in WRITTEN if p.suffix == ".md"])
def test_sentences_are_short(page: str) -> None:
    """One fact each."""
    long = [s for s in sentences((ROOT / page).read_text()) if len(s.split()) > LONGEST]
    assert not long, f"{page}: sentences of more than {LONGEST} words: {long}"


def test_an_ops_folder_can_be_called() -> None:
    """As its function, which had the name until version 0.1."""
    z, w = torch.rand(2, 3), torch.rand(2, 3)
    assert torch.equal(fastroute.ops.combine(z, w), fastroute.functional.combine(z, w))
    for op in OPS:
        called = op == "dispatch" or callable(getattr(fastroute.ops, op, None))
        assert called, f"import {op} in fastroute/ops/__init__.py, and its function in fastroute/ops/{op}/__init__.py"
