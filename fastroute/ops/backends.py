"""The one place that knows which backends this machine has, which one an op takes, and why not the others."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from ..importing import constant_result
from . import environment, isa, registry
from .environment import interpreting

BackendName = Literal["reference", "native", "triton"]
BACKENDS: tuple[BackendName, ...] = ("triton", "native", "reference")  #: in the order "auto" tries them
_CHOICES = ("auto", *BACKENDS)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot take this call; the message says why.

    Examples:
        >>> try:
        ...     with fastroute.use_backend("triton"):
        ...         fastroute.functional.policy(torch.randn(4, 3, dtype=torch.float64))
        ... except fastroute.BackendUnavailable:
        ...     print("Triton has no float64")
        Triton has no float64
    """


@dataclass(frozen=True)
class Case:
    """What a choice may depend on: never on tensor values."""

    op: str
    device: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.sizes)
        return f"{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}, {sizes}"


@dataclass(frozen=True)
class Offer:
    """One backend of one op: the module that implements it, and why it would not take a case (None: it would)."""

    module: str
    refuses: Callable[[Case], str | None]
    devices: tuple[str, ...] = ("cpu",)  #: of what C++ implements; Triton's are the same for every op


_offers: dict[str, dict[BackendName, Offer]] = {}


class _State:
    """Process-wide, like torch.backends flags: a backward pass runs on autograd's threads and must see them too."""

    def __init__(self) -> None:
        self.requested: str = environment.backend()
        self.strict = False
        self.recorder: list[Decision] | None = None


_state = _State()  # an instance: Dynamo of torch 2.11 sets no attributes of classes


def offer(
    op: str,
    compiled: str,
    *,
    plain: str = "plain",
    native: Callable[[Case], str | None] | None = None,
    triton: Callable[[Case], str | None] | None = None,
    devices: tuple[str, ...] = ("cpu",),
) -> None:
    """Say that every backend implements ``op``, in modules of its folder: ``plain``, ``compiled`` (C++) and triton.

    Args:
        native, triton: why they would not take a case. None: :func:`native_refuses`; what the kernels say themselves.
        devices: of what C++ implements.
    """
    folder = f"fastroute.ops.{op}"

    def kernels_refuse(case: Case) -> str | None:
        why: str | None = importlib.import_module(f"{folder}.triton").unsupported(
            case.device, case.dtype, **dict(case.sizes)
        )
        return why

    _offers[op] = {
        "triton": Offer(f"{folder}.triton", triton or kernels_refuse),
        "native": Offer(f"{folder}.{compiled}", native or native_refuses, devices),
        "reference": Offer(f"{folder}.{plain}", lambda case: None),
    }


def offered() -> dict[str, dict[BackendName, Offer]]:
    """Every op with its backends."""
    return _offers


# ---------------------------------------------------------------------------------------------- the machine


@cache
def extension() -> tuple[str | None, str]:
    """(where fastroute._C is, loaded; "") or (None, why it is not here); ValueError for a wrong FASTROUTE_ISA."""
    found = importlib.util.find_spec("fastroute._C")
    elsewhere = (  # an editable install of another checkout has a finder that offers the one there
        found is not None
        and "fastroute._C" not in sys.modules
        and os.path.dirname(found.origin or "") not in sys.modules["fastroute"].__path__
    )
    if found is None or found.origin is None or elsewhere:
        isa.check_name()
        why = build_info().get("reason") or "no fastroute._C was installed"
        return None, f"the C++ extension fastroute._C is not built: {why}"
    try:
        if _is_cut_off(found.origin):
            raise OSError(f"{found.origin} is cut off; install fastroute again")
        torch.ops.load_library(
            found.origin
        )  # not an import: it needs no Python headers to have been there at the build
    except OSError as error:
        isa.check_name()
        return None, f"the C++ extension fastroute._C does not load: {error}"
    isa.in_use()
    return found.origin, ""


def _is_cut_off(path: str) -> bool:
    """Whether a 64-bit ELF file ends before what the loader maps: reading there ends the process by SIGBUS."""
    with open(path, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
            return False
        file.seek(int.from_bytes(head[32:40], "little"))
        count = int.from_bytes(head[56:58], "little")
        table = file.read(56 * count)
        size = file.seek(0, os.SEEK_END)
    segments = struct.iter_unpack("<I4xQ16xQ16x", table)  # kind, where it begins, its length; 1 is PT_LOAD
    return len(table) < 56 * count or any(kind == 1 and start + length > size for kind, start, length in segments)


registry.load_extension = lambda: extension()[1]


@constant_result
def has_extension() -> bool:
    return extension()[0] is not None


def build_info() -> dict[str, Any]:
    """What setup.py noted about the extension; empty if it noted nothing."""
    path = Path(__file__).resolve().parents[1] / "_build_info.json"
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing(backend: BackendName, device: str, devices: tuple[str, ...] = ("cpu",)) -> str | None:
    """Why this machine does not have ``backend`` for tensors on ``device`` ("cpu", "cuda"), or None.

    ``devices``: where the op in question has native kernels.
    """
    if backend == "native":
        if device not in devices:
            where = " and ".join(name.upper() for name in devices)
            return f"native kernels exist for {where} tensors only, these are on {device}"
        if (why := extension()[1]) or device == "cpu":
            return why or None
        info = build_info()
        return None if info.get("cuda") else f"the C++ extension has no CUDA part: {info.get('cuda_reason')}"
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed"
        if device != "cuda" and not interpreting():
            return f"triton kernels need CUDA tensors, these are on {device} (TRITON_INTERPRET=1 interprets them)"
    return None


def native_refuses(case: Case) -> str | None:
    """Why the C++ kernels, which all take the same dtypes, would not take a case."""
    if case.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"the C++ kernels take float32, float64 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"
    return None


def triton_refuses(case: Case) -> str | None:
    """The same of Triton's kernels, where that is all they ask."""
    why: str | None = registry.Kernels("launch").refuses(case.device, case.dtype)
    return why


# ---------------------------------------------------------------------------------------------- choosing


@dataclass
class Decision:
    """Which backend an op takes for a case, and why each other one does not."""

    case: Case
    backend: BackendName
    rejected: dict[BackendName, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.case}: {self.backend}"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        return "\n".join(lines)


def requested() -> str:
    """The backend asked for by use_backend or FASTROUTE_BACKEND: a name, or "auto"."""
    return _state.requested


def _check_name(name: str, what: str) -> None:
    if name not in _CHOICES:
        raise ValueError(f"{what}: expected one of {', '.join(_CHOICES)}, got {name!r}")


def decide(case: Case, request: str) -> Decision:
    """The first backend that takes the case, or the requested one; BackendUnavailable if that one cannot."""
    _check_name(request, "FASTROUTE_BACKEND")
    rejected: dict[BackendName, str] = {}
    for name in BACKENDS:
        proposal = _offers[case.op].get(name)
        why = (
            f"{case.op} has no {name} implementation"
            if proposal is None
            else missing(name, case.device, proposal.devices)
        )
        if why is None and proposal is not None:
            why = proposal.refuses(case)
        if why is None and request == "auto" and name == "triton" and case.device == "cpu":
            why = "the interpreter is for checking kernels, not for speed: ask for it by name"
        if why is None and request in ("auto", name):
            rest = {other: f"{name} comes first" for other in BACKENDS if other != name and other not in rejected}
            return Decision(case, name, {**rejected, **rest} if request == "auto" else {})
        if request == name:
            raise BackendUnavailable(f"backend {name!r} was asked for but cannot run {case}: {why}")
        if why is not None:
            rejected[name] = why
    raise BackendUnavailable(f"no backend can run {case}: {rejected}")


def _run_on(case: Case, request: str) -> BackendName:
    """``decide`` for a call that is made, not described."""
    decision = decide(case, request)
    why = decision.rejected.get("native", "")
    if decision.backend == "reference" and case.device == "cpu" and why.startswith("the C++ extension"):
        _warn_of_slowness(why)
    return decision.backend


@cache
def _warn_of_slowness(why: str) -> None:
    """Once in a process: pip shows nothing of what a build says that ends well."""
    if build_info().get("reason") != "FASTROUTE_BUILD=0":
        line = (
            f"{why}. CPU tensors take plain PyTorch, which is slower. Once that is mended, install fastroute again, "
            "by pip install --force-reinstall --no-deps --no-cache-dir"
        )
        warnings.warn_explicit(line, UserWarning, "fastroute", 1)  # not a line of the user's code


def choose(case: Case, request: str) -> ModuleType:
    """The module that implements ``case.op`` for this case."""
    return importlib.import_module(_offers[case.op][_run_on(case, request)].module)


def record(case: Case) -> None:
    """Called where an op is described but not run (its fake): what ``explain`` collects."""
    if _state.recorder is not None:
        _state.recorder.append(decide(case, requested()))


@cache
def _taken(op: str, device: str, dtype: torch.dtype, request: str, interpreted: bool) -> BackendName:
    return _run_on(Case(op, device, dtype, ()), request)


@constant_result
def taken(op: str, device: str, dtype: torch.dtype) -> BackendName:
    """The backend that ``op`` takes now, for ops whose backends take any sizes."""
    return _taken(op, device, dtype, _state.requested, "triton" in _offers[op] and interpreting())


def is_explaining() -> bool:
    """Whether ``explain`` listens."""
    return _state.recorder is not None


def note(op: str, t: Tensor, **sizes: int) -> None:
    """``record``, for ops that are not described by a fake of their own; only while ``explain`` listens."""
    if _state.recorder is not None:
        record(Case(op, t.device.type, t.dtype, tuple(sizes.items())))


# ---------------------------------------------------------------------------------------------- the public face


class use_backend:
    """Run every op on one backend: "reference", "native", "triton"; "auto" chooses by device, dtype and shape.

    ``fastroute.use_backend("reference")`` switches it for the process, ``with fastroute.use_backend("reference"):`` for
    a block, ``@fastroute.use_backend("reference")`` for each call of a function. A backward pass uses the backend of
    its forward pass. An op that the named backend cannot run raises :class:`BackendUnavailable` and says why. The
    environment's ``FASTROUTE_BACKEND`` sets the same.

    Args:
        name: the backend's.

    Examples:
        >>> route = fastroute.EfficientVectorRouting(6, 3, 8, 8)
        >>> with fastroute.use_backend("reference"):
        ...     y = route(torch.randn(2, 6, 8))
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "use_backend")
        self._name = name
        self._before, _state.requested = _state.requested, name

    def __enter__(self) -> None:
        _state.requested = self._name

    def __exit__(self, *exc: object) -> None:
        _state.requested = self._before

    def __call__(self, function: _Function) -> _Function:
        self.__exit__()  # a function's is for its calls alone
        name = self._name

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with use_backend(name):
                return function(*args, **kwargs)

        return cast(_Function, run)


class strict:
    """Check on a GPU what only the device knows (lengths, actions) and raise with the counts, at a host sync's price.

    ``fastroute.strict(True)`` switches it for the process, ``with fastroute.strict(True):`` for a block. Default: off.

    Args:
        enabled: whether to check.

    Examples:
        >>> with fastroute.strict(True):
        ...     y = fastroute.ops.dispatch.plan(torch.tensor([0, 1]), modules=2)
    """

    def __init__(self, enabled: bool = True) -> None:
        if enabled not in (True, False):
            raise TypeError(f"enabled: expected True or False, got {enabled!r}")
        self._before, _state.strict = _state.strict, bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        _state.strict = self._before


def is_strict() -> bool:
    return _state.strict


class Explanation(list[Decision]):
    """The decisions of one call, in order; prints as a report."""

    def __str__(self) -> str:
        return "\n".join(dict.fromkeys(map(str, self))) or "no fastroute op was called"


def explain(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Which backend each op of ``fn(*inputs)`` would take, and why each other one would not. Nothing is computed.

    Args:
        fn: a module or any function that calls fastroute ops.
        inputs: its inputs; only devices, dtypes and shapes matter.

    Raises:
        TypeError: ``fn`` cannot be called. RuntimeError: it reads numbers, as modules that cannot run together make a
            ``Selection`` do.

    Examples:
        >>> route = fastroute.EfficientVectorRouting(6, 3, 8, 8)
        >>> print(fastroute.explain(route, torch.randn(2, 6, 8)))
        vector_routing on cpu, float32, B=2, n=6, m=3, d=8: ...
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Untouched(TorchDispatchMode):
        """A buffer is not written to: of numbers that are there alone, the mode below would compute others."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.is_mutable:
                args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, self.shape_of, (args, kwargs))
            return func(*args, **(kwargs or {}))

        @staticmethod
        def shape_of(t: torch.Tensor) -> torch.Tensor:
            return t if isinstance(t, FakeTensor) else mode.from_tensor(t)

    if not callable(fn) or (isinstance(fn, type) and issubclass(fn, torch.nn.Module)):
        raise TypeError(f"fn: expected a module or a function, got {fn!r}")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (inputs, kwargs))
        before, _state.recorder = _state.recorder, []
        try:
            with Untouched():
                fn(*fake[0], **fake[1])
            return Explanation(_state.recorder)
        except DataDependentOutputException as error:
            name = getattr(fn, "__name__", type(fn).__name__)
            raise RuntimeError(
                f"fn: expected a function that reads no numbers, as those of actions, got {name}; explain its parts"
            ) from error
        finally:
            _state.recorder = before


def describe_machine() -> dict[str, str]:
    """Versions and hardware, for a bug report."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if _has_triton() else "not installed",
        "threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        facts["gpu"] = "none"
    try:
        where, why = extension()
        kernels = isa.describe() if where else "none: FASTROUTE_ISA has no effect without the extension"
    except ValueError as error:
        where, why, kernels = None, "not usable with this FASTROUTE_ISA", str(error)
    facts["extension"] = f"built ({build_info().get('compiler', 'unknown compiler')})" if where else why
    facts["C++ kernels"] = kernels
    facts["FASTROUTE_ISA"] = environment.instruction_set() or "auto"
    facts["FASTROUTE_BACKEND"] = requested()
    return facts
