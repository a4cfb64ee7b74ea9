"""State dicts of the upstreams, read, recognised and written; nothing is unpickled.

fastroute's layers have the upstreams' own keys, so that a conversion is mostly a check: that the file is a state dict,
that it holds layers of the upstream it is said to come from, and that these are whole.
"""

from __future__ import annotations

import importlib
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..multitask.model_losses import LossModules
from ..multitask.weighting import WEIGHTINGS
from ..ops import files
from ..ops.arguments import checked

UPSTREAMS = ("heinsen_routing", "heinsen_routing_2019", "PytorchRouting", "taskrouting", "torchmtl")
#: Under which training loops put a state dict beside other things.
_NESTS = ("state_dict", "model_state_dict", "model", "state")
#: What DataParallel and torch.compile put in front of every key.
_WRAPPERS = ("module.", "_orig_mod.")

_EFFICIENT = ("CONST_ones_over_n_out", "W_A", "B_A", "W_F1", "W_F2", "B_F2", "W_G1", "W_G2", "B_G2", "W_S", "B_S")
_BETAS = ("beta_use", "beta_ign")
_COMPUTED = tuple(f"compute_{beta}.{kind}" for beta in _BETAS for kind in ("weight", "bias"))

State = Mapping[str, Tensor]


class CannotConvert(Exception):
    """Why, in one line."""


@dataclass
class Report:
    """What became of every key."""

    layers: list[str] = field(default_factory=list)  #: the upstream's layers, as they would be printed
    taken: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  #: what is not in the new file, and why

    def __str__(self) -> str:
        lines = [f"layers   {layer}" for layer in self.layers]
        lines += [f"taken    {key}" for key in self.taken]
        lines += [f"renamed  {old} -> {new}" for old, new in self.renamed.items()]
        lines += [f"left     {key}: {why}" for key, why in self.left.items()]
        counts = f"{len(self.taken)} taken, {len(self.renamed)} renamed, {len(self.left)} left"
        return "\n".join([*lines, counts])


@checked
def convert(source: str | Path, target: str | Path, upstream: str, *, back: bool = False) -> Report:
    """Write what ``source`` has of an upstream's state dict to ``target``, for fastroute, or ``back`` for the upstream.

    Args:
        source, target: ``.safetensors``, or anything else that torch.save wrote.
        upstream: one of ``UPSTREAMS``.
        back: leave out what only fastroute has.

    Raises:
        CannotConvert: why; ``target`` is then as it was. TypeError, ValueError: naming the argument.
    """
    source, target = Path(source), Path(target)
    if upstream not in UPSTREAMS:
        raise ValueError(f"upstream: expected one of {', '.join(UPSTREAMS)}, got {upstream!r}")
    if source.exists() and target.exists() and source.samefile(target):
        raise CannotConvert(f"{target}: expected another file than {source}, which is kept as it is")
    report = Report()
    state = _state_dict(_read(source), report, source)
    if back and upstream == "torchmtl":
        for key in _only_ours(state):
            del state[key]
            report.left[key] = "torchMTL has no such parameter"
    if back and upstream == "PytorchRouting":
        for key in [key for key in state if re.search(r"(^|\.)_extra_state$", key)]:
            del state[key]
            report.left[key] = "PytorchRouting saves nothing of rewards"
    stacked = next((key for key in state if re.search(r"(^|\.)_\w+\.pattern\.", key)), None)
    if back and upstream == "PytorchRouting" and stacked is not None:
        raise CannotConvert(
            f"{stacked}: expected modules in lists, as PytorchRouting has, got stacked ones; save "
            "fastroute.unstacked_state_dict(model)"
        )
    _check(state, upstream, report, source)
    kept = [key for key in state if key not in report.renamed.values()]
    report.taken = kept
    _write(state, target)
    return report


# ---------------------------------------------------------------------------------------------------------------- files


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise CannotConvert("needs safetensors: pip install safetensors") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CannotConvert(f"{path}: expected a file, found none")
    try:
        if path.suffix == ".safetensors":
            return _safetensors().load_file(path)
        if zipfile.is_zipfile(path) and (names := torch.serialization.get_unsafe_globals_in_checkpoint(path)):
            raise CannotConvert(_whole(path, names))
        return torch.load(path, map_location="cpu", weights_only=True)
    except CannotConvert:
        raise
    except Exception as error:
        said = str(error)
        if names := re.findall(r"GLOBAL (\S+) was not", said):
            raise CannotConvert(_whole(path, names)) from error
        first = f"{type(error).__name__}: {files.reason(error)}"
        raise CannotConvert(
            f"{path}: expected a state dict that torch.save or safetensors wrote, got a truncated file or one of "
            f"another kind ({first})"
        ) from error


def _whole(path: Path, names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{path}: expected a state dict, got objects of {shown}, which are not unpickled. Where that code is "
        "installed, save the state dict alone: torch.save(torch.load(path, weights_only=False).state_dict(), "
        "'state.pt'); of a checkpoint with other things beside it, checkpoint['state_dict']"
    )


def _write(state: dict[str, Tensor], path: Path) -> None:
    if not path.parent.is_dir():
        raise CannotConvert(f"{path}: expected a file in an existing folder")
    writer = _safetensors() if path.suffix == ".safetensors" else None
    for key, t in {} if writer is None else state.items():
        if (kind := _not_dense(t)) is not None:
            raise CannotConvert(f"{key}: expected a dense tensor, as safetensors has, got one {kind}; write a .pt file")
    errors = () if writer is None else (importlib.import_module("safetensors").SafetensorError,)
    try:
        with files.whole(path, *errors) as part:
            if writer is not None:
                alone = {key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in state.items()}
                writer.save_file(alone, part, metadata={"format": "pt"})
            else:
                torch.save(state, part)
    except OSError as error:
        raise CannotConvert(f"{path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------- state dicts


def _state_dict(found: Any, report: Report, path: Path) -> dict[str, Tensor]:
    """The tensors by their keys, without what wraps them."""
    while isinstance(found, Mapping) and (
        nest := next((n for n in _NESTS if isinstance(found.get(n), Mapping) and _has_tensors(found[n])), None)
    ):
        report.left |= {str(k): f"beside {nest!r}" for k in found if k != nest}
        found = found[nest]
    if not isinstance(found, Mapping) or not any(isinstance(t, Tensor) for t in found.values()):
        kind = "no tensors" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        inside = [str(k) for k, v in found.items() if _has_tensors(v)] if isinstance(found, Mapping) else []
        hint = f"; there are some under {', '.join(map(repr, inside[:3]))}: save that alone" if inside else ""
        raise CannotConvert(f"{path}: expected a state dict, a dict of tensors by name, got {kind}{hint}")
    report.left |= {str(k): f"a {type(t).__name__}, no tensor" for k, t in found.items() if not isinstance(t, Tensor)}
    state: OrderedDict[str, Tensor] = OrderedDict((str(k), t) for k, t in found.items() if isinstance(t, Tensor))
    before = {key: key for key in state}
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None):
        before = {key.removeprefix(wrapper): old for key, old in before.items()}
        state = OrderedDict((key.removeprefix(wrapper), t) for key, t in state.items())
        report.renamed = {old: key for key, old in before.items()}
    if not report.renamed and hasattr(found, "_metadata"):  # versions of layers, as load_state_dict reads them
        state._metadata = found._metadata  # type: ignore[attr-defined]
    return state


def _has_tensors(found: Any) -> bool:
    """In itself, or where training loops nest them."""
    return isinstance(found, Mapping) and (
        any(isinstance(t, Tensor) for t in found.values()) or any(_has_tensors(found.get(nest)) for nest in _NESTS)
    )


def _not_dense(t: Tensor) -> str | None:
    """What a tensor is that is no plain array of numbers."""
    kinds = {"on meta": t.is_meta, "quantized": t.is_quantized, "sparse": t.layout is not torch.strided}
    return next((kind for kind, it_is in kinds.items() if it_is), None)


def _owners(state: State, last: str) -> Iterator[str]:
    """Prefixes ("", "head.") of keys that end so."""
    for key in state:
        if key == last or key.endswith(f".{last}"):
            yield key.removesuffix(last)


def _size(t: Tensor, axis: int) -> int:
    return t.shape[axis] if t.dim() > axis else 0


def _capsules(state: State, prefix: str) -> str:
    """EfficientVectorRouting or DefinableVectorRouting under a prefix."""
    variable = f"{prefix}{_COMPUTED[0]}" in state
    betas = _COMPUTED if variable else _BETAS
    efficient = any(f"{prefix}{name}" in state for name in _EFFICIENT[1:])
    names = [*(_EFFICIENT if efficient else _EFFICIENT[:1]), *betas]
    kind = "EfficientVectorRouting" if efficient else "DefinableVectorRouting"
    _whole_layer(state, prefix, names, kind)
    m = _size(state[f"{prefix}CONST_ones_over_n_out"], 0)
    beta = state[f"{prefix}{betas[0]}"]
    if not efficient:
        n = _size(beta, 0)
        _shapes(state, prefix, {} if variable else {name: [n, m] for name in _BETAS})
        return f"{kind}(n_inp={-1 if variable else n}, n_out={m})"
    (n, d), h = (_size(state[f"{prefix}W_A"], axis) for axis in (0, 1)), _size(state[f"{prefix}W_F2"], 1)
    sizes = {"W_A": [n, d], "B_A": [n], "W_F1": [m, d], "W_F2": [d, h], "B_F2": [m, h], "W_G1": [h, d]}
    sizes |= {"W_G2": [m, d], "B_G2": [m, d], "W_S": [n, m], "B_S": [n, m]}
    sizes |= dict(zip(_COMPUTED, ([m, d], [m]) * 2, strict=True)) if variable else {beta: [n, m] for beta in _BETAS}
    _shapes(state, prefix, sizes)
    return f"{kind}(n_inp={-1 if variable else n}, n_out={m}, d_inp={d}, d_out={h})"


def _matrices(state: State, prefix: str) -> str:
    """GenerativeMatrixRouting, or 2019's Routing, under a prefix."""
    _whole_layer(state, prefix, ["W", "B", *_BETAS], "GenerativeMatrixRouting")
    (n, m, d, h), c = (_size(state[f"{prefix}W"], axis) for axis in range(4)), _size(state[f"{prefix}B"], 2)
    sizes = {"W": [n, m, d, h], "B": [n, m, c, h], "beta_use": [n, m], "beta_ign": [n, m]}
    _shapes(state, prefix, sizes)
    if f"{prefix}B_brk" in state:
        _shapes(state, prefix, {"B_brk": [1, c, h]})
        return f"Routing(d_cov={c}, d_inp={d}, d_out={h}, n_inp={n if n > 1 else -1}, n_out=-1)"
    return f"GenerativeMatrixRouting(n_inp={n if n > 1 else -1}, n_out={m}, d_cov={c}, d_inp={d}, d_out={h})"


def _whole_layer(state: State, prefix: str, names: list[str], kind: str) -> None:
    missing = [name for name in names if f"{prefix}{name}" not in state]
    if missing:
        raise CannotConvert(f"{prefix or 'the root'}: expected all keys of {kind}, {', '.join(missing)} are missing")


def _shapes(state: State, prefix: str, sizes: Mapping[str, list[int]]) -> None:
    for name, size in sizes.items():
        if list(state[f"{prefix}{name}"].shape) != size:
            raise CannotConvert(f"{prefix}{name}: expected shape {size}, got {list(state[f'{prefix}{name}'].shape)}")


def _numbered(state: State, prefix: str, what: str) -> int:
    """How many entries a ModuleList has."""
    start = f"{prefix}{what}."
    found = {key.removeprefix(start).partition(".")[0] for key in state if key.startswith(start)}
    if not all(name.isdigit() for name in found):
        return 0
    # modules without parameters (a skip) have no keys, those that have some begin at any number
    return max(map(int, found)) + 1


def _router(state: State, prefix: str) -> str:
    mapping = state[f"{prefix}_unit_mapping"]
    if _not_dense(mapping) is not None or mapping.dim() != 2 or not bool(mapping.isfinite().all()):
        raise CannotConvert(f"{prefix}_unit_mapping: expected zeros and ones [task_count, unit_count]")
    T, C = mapping.shape
    off = int((mapping[0] == 0).sum()) if T else 0
    decayed = "" if bool(((mapping == 0) | (mapping == 1)).all()) else " with decayed masks, as fastroute.compat has"
    return f"TaskRouter(unit_count={C}, task_count={T}, sigma={off}){decayed}"


def _efficient_or_definable(state: State) -> dict[str, str]:
    return {p: _capsules(state, p) for p in dict.fromkeys([*_owners(state, "W_A"), *_owners(state, _EFFICIENT[0])])}


def _generative(state: State) -> dict[str, str]:
    return {prefix: _matrices(state, prefix) for prefix in _owners(state, "CONST_one")}


def _routed(state: State) -> dict[str, str]:
    found = {}
    for what, kind in (("_submodules", "Selection of {} modules"), ("_policy", "decision of {} agents")):
        pattern = re.compile(rf"(.*\.)?{what}\.\d+\.")
        for prefix in dict.fromkeys((match[1] or "") for key in state if (match := pattern.match(key))):
            found[f"{prefix}{what}"] = kind.format(_numbered(state, prefix, what))
    return found


def _masks(state: State) -> dict[str, str]:
    return {prefix: _router(state, prefix) for prefix in _owners(state, "_unit_mapping")}


def _only_ours(state: State) -> list[str]:
    """What fastroute.multitask adds to torchMTL's keys: a weighting, and parameters of losses, by their nodes.

    Nodes of torchMTL's may have these names, too. A weighting of fastroute's says whose its numbers are, or has just
    the tensors of one; a loss is under the name of a node, which has keys of its own, or is in the list of modules
    that state dicts carry. That list also says by a version that these are losses, since fastroute 0.3.0.
    """
    weighting = [key for key in state if key.startswith("weighting.")]
    losses = [key for key in state if key.startswith("loss_modules.")]
    nodes = {key.partition(".")[0] for key in state} | {key.removesuffix("_loss") for key in state}
    nodes |= {name for name in getattr(state, "_metadata", ()) if "." not in name}
    names = {key.removeprefix("weighting.") for key in weighting}
    kept = [{"weight"}, *(set(kind(2).state_dict()) for name, kind in WEIGHTINGS.items() if name != "auto")]
    is_a_layer = any(state[key].dim() > 1 for key in weighting if key == "weighting.weight")
    is_weighting = "task_names" in names or (names in kept and not is_a_layer)
    are_losses = all(key.count(".") > 1 and key.split(".")[1] in nodes for key in losses)
    version = getattr(state, "_metadata", {}).get("loss_modules", {}).get("version", LossModules._version)
    if losses and are_losses and version != LossModules._version:
        raise CannotConvert(
            f"{losses[0]}: expected to know whether loss_modules is a node, or has fastroute's parameters of losses; "
            "call the node otherwise, or save the model with such losses again, in this version"
        )
    return (weighting if is_weighting else []) + (losses if are_losses else [])


def _learned(state: State) -> dict[str, str]:
    return {key: "learned weight" for key, t in state.items() if re.fullmatch(r"[^.]+_loss", key) and t.shape == (1,)}


#: What is known of each upstream's layers in a state dict: their prefixes and what they are.
_FINDS: dict[str, tuple[Callable[[State], dict[str, str]], ...]] = {
    "heinsen_routing": (_efficient_or_definable, _generative),
    "heinsen_routing_2019": (_generative,),
    "PytorchRouting": (_routed,),
    "taskrouting": (_masks,),
    "torchmtl": (_learned,),
}


def _check(state: State, upstream: str, report: Report, path: Path) -> None:
    """Note the upstream's layers; CannotConvert where there are none, but others'."""
    own = {prefix: kind for find in _FINDS[upstream] for prefix, kind in find(state).items()}
    report.layers = [f"{prefix.rstrip('.') or 'the root'}: {kind}" for prefix, kind in own.items()]
    if own:
        return
    others = [name for name, finds in _FINDS.items() if name != upstream and any(find(state) for find in finds)]
    if others:
        raise CannotConvert(
            f"{path}: expected a state dict of {upstream}, found layers of {' or '.join(others)}; --from or --to "
            f"{others[0]}?"
        )
    if upstream != "torchmtl" or not all("." in key for key in state):  # whose layers may be anything
        raise CannotConvert(
            f"{path}: expected a state dict of {upstream}, found none of its layers' keys among {len(state)}, such as "
            f"{', '.join(list(state)[:3])}"
        )
