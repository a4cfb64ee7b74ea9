"""``python -m fastroute``: a demo on real data, and the facts for a bug report."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import __version__, compat
from .compat import checkpoints, program
from .demos import DEMOS, MODELS, CannotRun, Options
from .ops import backends, environment
from .report import CannotReport, write_report

_INTERRUPTED = 130  #: as a shell says of what SIGINT has ended
_OPTIONAL = ("numpy", "matplotlib", "scikit-learn", "rich")
_ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
#: Sizes to ask each op about, in its own letters.
TYPICAL: dict[str, dict[str, int]] = {
    "vector_routing": {"B": 1, "n": 1000, "m": 100, "d": 256},
    "matrix_routing": {"B": 1, "n": 1000, "m": 64, "c": 4, "d": 4, "h": 4},
    "soft_assignment": {"B": 4, "n": 1000, "m": 10, "h": 64},
    "dispatch": {"N": 256, "K": 20},
    "grouped_linear": {"N": 256, "K": 20, "F": 128, "O": 48},
    "policy": {"N": 256, "K": 20},
    "agent_policy": {"N": 256, "K": 20},
    "trajectory_loss": {"B": 256, "T": 3},
    "task_mask": {"B": 64, "C": 256, "T": 20},
    "batch_norm_mask_relu": {"B": 64, "C": 256, "T": 20},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's) and return its exit status: 0, 1 for a failure, 2 for misuse."""
    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if isinstance(stream, io.TextIOWrapper):
            if not stream.encoding.lower().startswith("utf"):  # a terminal that has no × shows a ?
                stream.reconfigure(errors="replace")
            elif stream.errors == "strict":  # names of files are any bytes
                stream.reconfigure(errors="surrogateescape")
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse's way to end --help, --version and misuse
        return stop.code if isinstance(stop.code, int) else 2
    if args.command == "run":  # Ctrl-C is the program's
        return _run(args)
    commands = {"doctor": _doctor, "demo": _demo, "train": _train, "report": _report, "convert": _convert}
    if args.command not in commands:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = commands[args.command](args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output has read enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _failed("interrupted", args.command)
        return _INTERRUPTED
    except OSError as error:
        out = getattr(args, "out", None)
        where = error.filename or ("standard output" if out is None else f"--out {out}")
        return _failed(f"{where}: {error.strerror or error}", args.command)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Nothing where the stream is closed: Python 3.10's own raises."""
        if file is not None:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    description = "Routing layers for PyTorch on fused kernels."
    parser = _Parser(prog="python -m fastroute", description=description)
    parser.add_argument("--version", action="version", version=f"fastroute {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    learner = _Parser(add_help=False)
    learner.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST's IDX files, plain or .gz (default: scikit-learn's digits)"
    )
    learner.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")

    demo = commands.add_parser(
        "demo",
        parents=[learner],
        help="learn handwritten digits (about half a minute)",
        description="Train on real data, report the held-out accuracy and what it takes, and draw what the router did.",
        epilog="Exit status: 0, or 1 if the held-out accuracy stays below 0.95 (tasks: a mean of 0.9; multitask: "
        "of 0.85) or the data cannot be read. Ctrl-C leaves a checkpoint beside the picture, and gives 130.",
    )
    demo.add_argument(
        "name", nargs="?", default="capsules", choices=DEMOS,
        help="; ".join(f"{k}: {v}" for k, v in DEMOS.items()) + " (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--out", type=_png, metavar="PNG", default=str(Options.out), help="the picture to write (default: %(default)s)"
    )
    demo.add_argument("--epochs", type=_positive, metavar="N", help="default: enough for the data")
    demo.add_argument("--seed", type=_seed, metavar="N", default=Options.seed, help="default: %(default)s")
    demo.add_argument(
        "--threads", type=_threads, metavar="N", default=Options.threads,
        help="CPU threads (default: %(default)s, the model is too small to gain from more)",
    )  # fmt: skip
    demo.add_argument("--quiet", action="store_true", help="no progress bars; there are none without a terminal")

    train = commands.add_parser(
        "train",
        parents=[learner],
        help="train the papers' networks on handwritten digits",
        description="Train networks of fastroute.models from several seeds, log what their routers do, print the "
        "held-out accuracies, draw the learning curves.",
        epilog="Exit status: 0, or 1 if a network learns too little or the data cannot be read.",
    )
    train.add_argument(
        "names", nargs="+", choices=MODELS, metavar="MODEL", help="; ".join(f"{k}: {v}" for k, v in MODELS.items())
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("fastroute-runs"),
        help="where runs go, DIR/MODEL/seed-N (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--epochs", type=_positive, metavar="N", help="default: the recipe's, docs/models.md")
    train.add_argument("--seeds", type=_positive, metavar="N", default=3, help="how many (default: %(default)s)")
    train.add_argument("--seed", type=_seed, metavar="N", default=Options.seed, help="the first (default: %(default)s)")
    train.add_argument(
        "--threads", type=_threads, metavar="N", default=Options.threads, help="CPU threads (default: %(default)s)"
    )
    train.add_argument("--quiet", action="store_true", help="no line per epoch")

    report = commands.add_parser(
        "report",
        help="a page of what a run's routers did",
        description="Read RUN_DIR/routing.jsonl, which fastroute.RoutingMonitor writes by a RunLog, and write one HTML "
        "page with charts, which needs no network.",
        epilog="Exit status: 0, or 1 if there is no log, nothing in it can be read, or the page cannot be written.",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="HTML", help="the page (default: RUN_DIR/report.html)")

    run = commands.add_parser(
        "run",
        help="run a script that was written for an upstream",
        description=f"Run a program, as python would, in which {', '.join(compat.UPSTREAMS)} are fastroute.compat's.",
        epilog="Exit status: the program's, or 1 if there is no such program.",
        usage="%(prog)s [-h] (SCRIPT.py | -m MODULE | -c CODE) ...",
    )
    run.add_argument("script", type=Path, nargs="?", metavar="SCRIPT.py", help="also a notebook, or a folder")
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="...", help="the program's own arguments")
    run.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ...", help="run a module instead")
    run.add_argument("-c", dest="code", nargs=argparse.REMAINDER, metavar="CODE ...", help="run this code instead")

    convert = commands.add_parser(
        "convert",
        help="check an upstream's state dict, and write it for fastroute, or the other way round",
        description="Read a state dict, check that it holds whole layers of an upstream, and write it: as .safetensors "
        "if the name says so, else by torch.save. Nothing is unpickled.",
        epilog="Exit status: 0, or 1 if it cannot be converted; then nothing is written.",
    )
    convert.add_argument("source", type=Path, metavar="IN")
    convert.add_argument("target", type=Path, metavar="OUT")
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", choices=checkpoints.UPSTREAMS, help="whose state dict IN is")
    way.add_argument("--to", dest="destination", choices=checkpoints.UPSTREAMS, help="whose state dict OUT becomes")

    convert.add_argument("--quiet", action="store_true", help="say only what fails")

    commands.add_parser(
        "doctor",
        help="what to paste into a bug report: versions, hardware, backends and why",
        description="Print versions, hardware, and which backend each op would take on this machine and why.",
    )
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from low to high, of an option."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {value}")
        if value > high:
            raise argparse.ArgumentTypeError(f"expected at most {high}, got {value}")
        return value

    return parsed


_positive = _whole(1, 1 << 31)
_seed = _whole(0, (1 << 63) - 1)
_threads = _whole(1, 1024)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a name ending in .png, got {text}")
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written, got {text}")
    return path


def _trainer(args: argparse.Namespace, name: str) -> tuple[Any, str]:
    """The module of ``fastroute.demos`` that trains, and the device."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device cuda: expected a CUDA GPU, found none")
    try:
        importlib.import_module("matplotlib")  # the picture comes last: say now if it cannot come
        return importlib.import_module(f"fastroute.demos.{name}"), device
    except ModuleNotFoundError as error:
        raise CannotRun(f"needs {error.name}: pip install 'fastroute[demo]'") from error


def _demo(args: argparse.Namespace) -> int:
    try:
        demo, device = _trainer(args, args.name)
        return demo.run(Options(args.data, args.out, args.epochs, args.seed, device, args.threads, args.quiet))
    except KeyboardInterrupt as stop:
        if not hasattr(stop, "save"):
            raise
        _failed(stop.save(args.out.with_suffix(".pt")))
        return _INTERRUPTED
    except (CannotRun, backends.BackendUnavailable) as error:
        return _failed(str(error))


def _doctor(args: argparse.Namespace) -> int:
    print(doctor())
    return 0


def _train(args: argparse.Namespace) -> int:
    try:
        published, device = _trainer(args, "published")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotRun(f"--out {args.out}: cannot be made ({error.strerror})") from error
        if args.seed + args.seeds > 1 << 63:
            raise CannotRun(f"--seed {args.seed}: expected one from which there are {args.seeds}, below 2^63")
        options = published.TrainOptions(
            args.data, args.out, args.epochs, args.seed, device, args.threads, args.quiet, seeds=args.seeds
        )
        return published.run(list(dict.fromkeys(args.names)), options)
    except (CannotRun, backends.BackendUnavailable) as error:
        return _failed(str(error), "train")


def _report(args: argparse.Namespace) -> int:
    try:
        path, run = write_report(args.run_dir, args.out)
    except CannotReport as error:
        return _failed(str(error), "report")
    for remark in run.remarks:
        print(f"python -m fastroute report: {remark}", file=sys.stderr)
    print(path)
    return 0


def _run(args: argparse.Namespace) -> int:
    try:
        if args.script is not None:
            return program.run_script(args.script, args.args)
        for given, run in ((args.module, program.run_module), (args.code, program.run_code)):
            if given:
                return run(given[0], given[1:])
    except program.NoProgram as error:
        return _failed(str(error), "run")
    print("python -m fastroute run: the following arguments are required: SCRIPT.py (or -m, or -c)", file=sys.stderr)
    return 2


def _convert(args: argparse.Namespace) -> int:
    upstream = args.origin or args.destination
    try:
        with _shown_as_busy(f"converting {args.source}", args.quiet):
            report = checkpoints.convert(args.source, args.target, upstream, back=args.origin is None)
    except checkpoints.CannotConvert as error:
        return _failed(str(error), "convert")
    if not args.quiet:
        print(f"{args.source} -> {args.target}\n{report}")
    return 0


def _shown_as_busy(what: str, quiet: bool) -> AbstractContextManager[object]:
    """A spinner on a terminal, where there is rich: a large file takes a while."""
    if quiet or sys.stderr is None or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return nullcontext()
    return importlib.import_module("rich.console").Console(stderr=True).status(what)


def _failed(why: str, command: str = "demo") -> int:
    print(f"python -m fastroute {command}: {why}", file=sys.stderr)
    return 1


# ---------------------------------------------------------------------------------------------- doctor


def doctor() -> str:
    """Versions, hardware, and the backend of every op with reasons, as plain text."""
    facts = {"fastroute": __version__, **backends.describe_machine()}
    facts["cores"] = str(os.cpu_count())
    facts |= {name: _version(name) for name in _OPTIONAL}
    facts |= environment.facts(*_ENVIRONMENT)
    sections = [_columns(facts.items())]
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for op in backends.offered():
            sections.append(_backends_of(typical(op, device)))
    return "\n\n".join(sections)


def typical(op: str, device: str) -> backends.Case:
    """A case of an op as layers call it."""
    dtype = torch.int64 if op == "dispatch" else torch.float32  # a plan is made of actions
    return backends.Case(op, device, dtype, tuple(TYPICAL[op].items()))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backends_of(case: backends.Case) -> str:
    try:
        decision = backends.decide(case, backends.requested())
    except (ValueError, backends.BackendUnavailable) as error:
        return f"{case}\n{_columns([('none', str(error))], indent=2)}"
    requested = backends.requested()
    why = "first that can" if requested == "auto" else f"FASTROUTE_BACKEND={requested}"
    rows = [(decision.backend, f"taken: {why}"), *((name, f"not: {why}") for name, why in decision.rejected.items())]
    return f"{case}\n{_columns(rows, indent=2)}"


def _columns(rows: Iterable[tuple[str, str]], indent: int = 0) -> str:
    """Two aligned columns; the second one may have several lines."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, value in rows:
        first, *rest = value.splitlines() or [""]
        lines.append(f"{' ' * indent}{name:<{width}}{first}")
        lines += [f"{' ' * (indent + width)}{line}" for line in rest]
    return "\n".join(lines)
