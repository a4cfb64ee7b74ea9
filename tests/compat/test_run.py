"""``fastroute run``: a program runs as ``python`` runs it, its children included."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastroute import compat
from fastroute.cli import main
from fastroute.compat import imports
from tests.helpers.subprocesses import check_python

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program of the test's own process leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    for name in ("argv", "path", "meta_path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed leaves its own
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        top = name.split(".")[0]
        if top in compat.UPSTREAMS or getattr(sys.modules[name], "__file__", None) is None or top.startswith("mine"):
            del sys.modules[name]


def script(text: str, name: str = "mine.py") -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return name


def test_a_script(capsys: Capture) -> None:
    script("here = __name__\n", "mine_beside.py")
    name = script("""
import dataclasses, os, pickle, sys
from heinsen_routing import Routing
from mine_beside import here
@dataclasses.dataclass
class Point:
    x: "int" = 1
assert __name__ == "__main__" and __file__ == "mine.py" and __package__ is None and __spec__ is None
assert sys.modules["__main__"].Point is Point and pickle.loads(pickle.dumps(Point())) == Point(1)
assert sys.path[0] == os.getcwd() and Routing.__module__.startswith("fastroute")
print(sys.argv, here)
""")
    assert main(["run", name, "-m", "--seed", "3", "-c"]) == 0
    assert capsys.readouterr().out == "['mine.py', '-m', '--seed', '3', '-c'] mine_beside\n"
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == imports.ON_PATH


def test_a_module_code_and_a_folder(capsys: Capture) -> None:
    script("", "mine_package/__init__.py")
    script("import sys\nprint(__name__, __spec__.name, sys.argv[1:])", "mine_package/__main__.py")
    script("import sys\nfrom . import __main__ as other\nprint(sys.argv[0][-7:])", "mine_package/part.py")
    assert main(["run", "-m", "mine_package", "-x", "1"]) == 0
    assert main(["run", "-m", "mine_package.part"]) == 0
    assert main(["run", "-c", "import sys, torchmtl; print(sys.argv, torchmtl.__name__)", "-m", "a"]) == 0
    script("import sys\nfrom mine_beside import here\nprint(__name__, here, sys.argv)", "mine_folder/__main__.py")
    script("here = 2", "mine_folder/mine_beside.py")
    assert main(["run", "mine_folder", "-v"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "__main__ mine_package.__main__ ['-x', '1']",
        "mine_package.__main__ mine_package.__main__ []",
        "part.py",
        "['-c', '-m', 'a'] fastroute.compat.torchmtl",
        "__main__ 2 ['mine_folder', '-v']",
    ]


def notebook(*cells: str) -> str:
    made = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    made.insert(1, {"cell_type": "markdown", "source": ["raise SystemExit(5)"]})
    return script(json.dumps({"nbformat": 4, "metadata": {}, "cells": made}), "mine.ipynb")


def test_a_notebook(capsys: Capture) -> None:
    book = notebook(
        "%matplotlib inline\nimport torch\n!pip install torchmtl\nfrom torchmtl import MTLModel",
        "%%bash\nexit 3",
        "%%time\nx = (7\n  % 4)\nif x:\n    %time y = x\n    display(y)",
        "def f():\n    return 1 / 0\nf()",
    )
    assert main(["run", book, "a"]) == 1
    said = capsys.readouterr()
    assert said.out == "3\n"
    shown = [line for line in said.err.splitlines() if set(line) - set(" ~^")]  # Pythons mark places differently
    assert shown == [
        "Traceback (most recent call last):",
        '  File "mine.ipynb, code cell 4", line 3, in <module>',
        "    f()",
        '  File "mine.ipynb, code cell 4", line 2, in f',
        "    return 1 / 0",
        "ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit()", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("import sys; sys.exit('no data')", 1, "no data\n"),
        ("import sys\nsys.excepthook = lambda kind, error, tb: print(kind.__name__, file=sys.stderr)\n1 / 0", 1,
         "ZeroDivisionError\n"),
        ("raise KeyboardInterrupt", 130, 'Traceback (most recent call last):\n  File "mine.py", line 1, in <module>\n'
         "    raise KeyboardInterrupt\nKeyboardInterrupt\n"),
    ],
)  # fmt: skip
def test_how_it_ends(code: str, status: int, said: str, capsys: Capture) -> None:
    assert main(["run", script(code)]) == status
    assert capsys.readouterr().err == said


def test_tracebacks_show_the_program(capsys: Capture) -> None:
    """And nothing of what runs it, however it is run."""
    script("def f():\n    raise ValueError('oops')\n", "mine_fault.py")
    name = script("import mine_fault\nmine_fault.f()\n")
    for argv in (["run", name], ["run", "-m", "mine"], ["run", "-c", "import mine"]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert "fastroute" not in said and "runpy" not in said and "mine_fault.py" in said, said
        assert said.startswith("Traceback (most recent call last):\n  File ") and said.endswith("ValueError: oops\n")
        sys.modules.pop("mine", None)
    assert main(["run", script("x = (\n")]) == 1
    said = capsys.readouterr().err
    assert said.startswith('  File "mine.py", line 1\n') and "SyntaxError" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("from PytorchRouting.DecisionLayers import REINFORC", "PytorchRouting.DecisionLayers has no REINFORC; did you "
         "mean REINFORCE?"),
        ("from heinsen_routing import EfficientVectorRoutin", "heinsen_routing has no EfficientVectorRoutin; did you "
         "mean EfficientVectorRouting?"),
        ("import torchmtl.wrapping_layer", "no upstream has a module torchmtl.wrapping_layer; did you mean "
         "torchmtl.wrapping_layers?"),
        ("from PytorchRouting.DecisionLayer import WPL", "no upstream has a module PytorchRouting.DecisionLayer; did "
         "you mean PytorchRouting.DecisionLayers?"),
        ("import taskrouting.zebra", "no upstream has a module taskrouting.zebra"),
    ],
)  # fmt: skip
def test_names_that_no_upstream_had(line: str, hint: str, capsys: Capture) -> None:
    assert main(["run", script(line)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastroute: {hint}")
    assert main(["run", script("import mine_nothing")]) == 1
    assert "fastroute" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such.py", "--fast"], "no/such.py: expected a script, found no such file"),
        (["-m", "mine_nothing.at.all"], "-m mine_nothing.at.all: expected a module, found none of that name"),
        (["empty"], "empty: expected a script, found a folder without a __main__.py"),
        (["broken.ipynb"], "broken.ipynb: expected a notebook of nbformat 4, a JSON object with cells"),
        (["julia.ipynb"], "julia.ipynb: expected a notebook in Python, found one in julia"),
    ],
)
def test_nothing_to_run(argv: list[str], message: str, capsys: Capture) -> None:
    Path("empty").mkdir()
    script("{}", "broken.ipynb")
    script(json.dumps({"cells": [], "metadata": {"kernelspec": {"language": "julia"}}}), "julia.ipynb")
    assert main(["run", *argv]) == 1
    assert capsys.readouterr().err == f"python -m fastroute run: {message}\n"


def test_an_upstreams_own_example(capsys: Capture) -> None:
    """Of a clone: what it imports beside the layers is its own, the layers are ours."""
    for folder in ("clone", "clone/PytorchRouting", "clone/PytorchRouting/Examples"):
        script(
            "raise RuntimeError('the upstream itself')" if folder.endswith("Routing") else "", f"{folder}/__init__.py"
        )
    script(
        "from PytorchRouting.CoreLayers import Selection\nclass Net: pass", "clone/PytorchRouting/Examples/Models.py"
    )
    name = script("from PytorchRouting.Examples.Models import Net, Selection\nprint(Selection.__module__)",
                  "clone/PytorchRouting/Examples/run_experiments.py")  # fmt: skip
    assert main(["run", name]) == 0
    assert capsys.readouterr().out == "fastroute.compat.PytorchRouting.CoreLayers.Selection\n"


WORKERS = """
import multiprocessing, sys
from heinsen_routing import Routing
from torch.utils.data import DataLoader
class Data:
    def __len__(self):
        return 2
    def __getitem__(self, i):
        import torchmtl.wrapping_layers, PytorchRouting.CoreLayers
        return i, torchmtl.__name__.startswith("fastroute"), Routing.__module__.startswith("fastroute")
def job(name):
    return __import__(name).__name__
if __name__ == "__main__":
    for how in sys.argv[1:]:
        batches = list(DataLoader(Data(), num_workers=1, multiprocessing_context=how))
        print(how, batches[1][0].item(), all(bool(b) for batch in batches for b in batch[1:]))
        with multiprocessing.get_context(how).Pool(1) as pool:
            print(pool.apply(job, ("routed_vgg",)))
"""


def workers(*how: str) -> None:
    name = str(Path(script(WORKERS)).resolve())
    said = check_python(f"import sys; from fastroute.cli import main; sys.exit(main(['run', {name!r}, *{how!r}]))")
    assert said == "".join(f"{h} 1 True\nfastroute.compat.routed_vgg\n" for h in how)


@pytest.mark.long
def test_workers() -> None:
    """Spawned ones have nothing but the environment and the path."""
    workers("spawn")


@pytest.mark.long
def test_workers_of_other_kinds() -> None:
    workers("forkserver", "fork")


@pytest.mark.long
def test_processes_that_the_program_starts() -> None:
    """torchrun's, and any other Python's."""
    name = str(
        Path(
            script("""
import os, torch.distributed as dist
from PytorchRouting.CoreLayers import Selection
dist.init_process_group("gloo")
os.write(1, f'{os.environ["RANK"]} {Selection.__module__.startswith("fastroute")}\\n'.encode())  # in one piece
dist.destroy_process_group()
""")
        ).resolve()
    )
    run = ["run", "-m", "torch.distributed.run", "--nproc_per_node", "2", name]
    said = check_python(f"import sys; from fastroute.cli import main; sys.exit(main({run!r}))")
    assert sorted(said.splitlines()) == ["0 True", "1 True"]
