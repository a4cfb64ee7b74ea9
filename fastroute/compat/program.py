"""Runs a program as ``python`` would, with the upstreams' names installed."""

from __future__ import annotations

import difflib
import importlib
import importlib.abc
import importlib.util
import json
import linecache
import os
import pkgutil
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from . import UPSTREAMS, imports, install


class NoProgram(Exception):
    """There is nothing to run: why, in one line."""


def run_script(path: Path, arguments: Sequence[str]) -> int:
    """``python PATH ARGUMENTS``: a script, a notebook's code cells, a folder or a zip file with a ``__main__.py``."""
    try:
        if not path.exists():
            raise NoProgram(f"{path}: expected a script, found no such file")
        source = b"" if path.is_dir() else path.read_bytes()
    except OSError as error:
        raise NoProgram(f"{path}: cannot be read ({error.strerror})") from error
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise NoProgram(f"{path}: expected a script, found a folder without a __main__.py")
    _begin([str(path), *arguments], str(folder.resolve()))
    for above in path.resolve().parents:  # an upstream's own example: what else its package holds is beside it
        if above.name in UPSTREAMS:
            sys.path.append(str(above.parent))
    if path.is_dir() or path.suffix in (".zip", ".pyz"):
        if sys.path[0] == str(folder.resolve()):
            sys.path.pop(0)  # runpy puts it there itself
        return _status(lambda: runpy.run_path(str(path), run_name="__main__"))
    cells = _cells(path, source) if path.suffix == ".ipynb" else [(source, str(path))]
    return _run(cells, None if path.suffix == ".ipynb" else str(path))


def run_module(name: str, arguments: Sequence[str]) -> int:
    """``python -m NAME ARGUMENTS``."""
    _begin(["-m", *arguments], os.getcwd())
    try:
        missing = name.startswith(".") or importlib.util.find_spec(name) is None
    except ModuleNotFoundError as error:
        missing = error.name is not None and name.startswith(error.name)
        if not missing:
            raise
    except (AttributeError, ValueError):
        missing = True
    if missing:
        raise NoProgram(f"-m {name}: expected a module, found none of that name")
    return _status(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def run_code(code: str, arguments: Sequence[str]) -> int:
    """``python -c CODE ARGUMENTS``."""
    _begin(["-c", *arguments], "")
    return _run([(code.encode(), "<string>")], None)


# --------------------------------------------------------------------------------------------------------------- before


def _begin(argv: list[str], folder: str) -> None:
    """``sys.argv`` and ``sys.path`` as the program expects them, and the upstreams' names, in its children, too."""
    root = str(Path(__file__).resolve().parents[2])
    install()
    sys.argv = argv
    if not sys.flags.safe_path if sys.version_info >= (3, 11) else True:
        sys.path[0] = folder
    if not any(os.path.exists(os.path.join(p, "fastroute", "__init__.py")) for p in sys.path):
        sys.path.append(root)  # it was found in the working directory
    before = os.environ.get("PYTHONPATH", "")
    if imports.ON_PATH not in before.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([imports.ON_PATH, *([before] if before else [])])


def _cells(path: Path, content: bytes) -> list[tuple[bytes, str]]:
    """The code cells of a notebook, without its commands to Jupyter and the shell."""
    try:
        book = json.loads(content)
        cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
        language = book.get("metadata", {}).get("kernelspec", {}).get("language", "python")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NoProgram(f"{path}: expected a notebook of nbformat 4, a JSON object with cells") from error
    if language != "python":
        raise NoProgram(f"{path}: expected a notebook in Python, found one in {language}")
    made = []
    for number, source in enumerate(sources, 1):
        source = _without_commands(source)
        name = f"{path}, code cell {number}"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        made.append((source.encode(), name))
    return made


def _without_commands(source: str) -> str:
    """Lines for Jupyter (%) or the shell (!) become ``pass``, what %time times stays; cells in other languages go."""
    if source.startswith("%%"):
        first, _, rest = source.partition("\n")
        source = "\n" + rest if first.split()[0] in ("%%time", "%%capture") else ""
    try:
        compile(source, "", "exec", dont_inherit=True)
    except SyntaxError:
        source = re.sub(r"^([ \t]*)%time +(?=\S)", r"\1", source, flags=re.MULTILINE)
        return re.sub(r"^([ \t]*)(%[A-Za-z]|!(?!=)).*$", r"\1pass", source, flags=re.MULTILINE)
    return source


class _Code(importlib.abc.InspectLoader):
    """What runs compiled code in a module."""

    def __init__(self, code: CodeType) -> None:
        self._code = code

    def get_code(self, fullname: str) -> CodeType:
        """The code, whatever the name."""
        return self._code

    def get_source(self, fullname: str) -> None:
        """Not known here; tracebacks read the file."""


def _run(cells: Sequence[tuple[bytes, str]], file: str | None) -> int:
    """Source, one piece after the other, as ``__main__``."""
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={}, __loader__=None, __spec__=None)
    if file is None:
        main.__dict__["display"] = print  # which notebooks have
    else:
        main.__file__ = file
        main.__cached__ = None  # type: ignore[attr-defined]
    sys.modules["__main__"] = main

    def run() -> None:
        for source, name in cells:
            _Code(compile(source, name, "exec", dont_inherit=True)).exec_module(main)

    return _status(run)


# ---------------------------------------------------------------------------------------------------------------- after

_FROZEN = ("runpy", "importlib._bootstrap", "importlib._bootstrap_external")
_NOT_THE_PROGRAMS = {__file__, runpy.__file__, importlib.abc.__file__, *(f"<frozen {name}>" for name in _FROZEN)}


def _status(run: Any) -> int:
    """What Python would exit with; an error is shown by ``sys.excepthook`` as Python would show it."""
    try:
        run()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0)
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        shown = error.with_traceback(_of_program(error.__traceback__))
        if sys.excepthook is sys.__excepthook__:  # which reads files alone, and so no cells
            traceback.print_exception(shown)
        else:
            sys.excepthook(type(error), shown, shown.__traceback__)
        if isinstance(error, ImportError) and (hint := _hint(error)):
            print(hint, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _of_program(tb: TracebackType | None) -> TracebackType | None:
    """A traceback that begins with the program."""
    while tb is not None and tb.tb_frame.f_code.co_filename in _NOT_THE_PROGRAMS:
        tb = tb.tb_next
    return tb


def _hint(error: ImportError) -> str | None:
    """The nearest name that the upstreams have, of one that they have not."""
    missing = re.search(r"cannot import name '([^']+)'", str(error))
    module = (error.name or "").removeprefix(f"{imports.HERE}.")
    if module.partition(".")[0] not in UPSTREAMS:
        return None
    if missing is not None:
        here = importlib.import_module(f"{imports.HERE}.{module}")
        names, wanted = [name for name in dir(here) if not name.startswith("_")], missing[1]
        what = f"{module} has no {wanted}"
    else:
        names, wanted = list(_modules()), module
        what = f"no upstream has a module {module}"
    near = difflib.get_close_matches(wanted, names, 1)
    return f"fastroute: {what}" + (f"; did you mean {near[0]}?" if near else "")


def _modules() -> Iterator[str]:
    """Every module of the upstreams, by its name there."""
    for name, ours in imports.UPSTREAMS.items():
        yield name
        module = importlib.import_module(ours)
        for part in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}."):
            yield part.name


__all__ = ["NoProgram", "run_code", "run_module", "run_script"]
