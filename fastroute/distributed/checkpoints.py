"""``Checkpoints``: what a training run needs to go on from, of any sharding, on any number of ranks.

PyTorch's ``torch.distributed.checkpoint`` writes and reads; this keeps steps apart, and knows which are complete.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer, optimizer
from torch.utils._pytree import tree_map_only

from ..modules.wrapped import unwrapped
from ..ops.arguments import Count, Natural, checked
from ..ops.checks import given
from .agreement import agree
from .experts import own_names, spread_modules

__all__ = ["Checkpoints", "full_state_dict", "load_full_state_dict"]

_COMPLETE = ".metadata"  #: DCP writes it last, under another name first
#: What is missing is known to be: parameters without a state in an optimizer, modules on a rank that has none.
_AS_CHECKED = StateDictOptions(strict=False)


class Checkpoints:
    """Checkpoints of a training run in a folder, ``step-000000100`` and so on.

    Parameters that are DTensors (``RowShardedCapsules``, ``ExpertParallel``, FSDP2, tensor parallel) are saved by those
    who have them, and loaded in whatever sharding the modules have then, on more ranks or fewer, or in one process. A
    step counts once it is complete: a run that ends while it saves goes on from the one before.

    Args:
        folder: that all ranks see; made if it is not there.
        modules: a module, or several by name, such as ``{"model": model, "weighting": weighting}``. All their
            parameters and persistent buffers are saved: loss weightings and routers keep what they know there. What is
            no DTensor has to be the same on all ranks; one rank's is saved.
        optimizers: of their parameters.
        more: other things with ``state_dict`` and ``load_state_dict``, by name: schedulers, data loaders. They get back
            what they gave, with its keys and types.
        keep: how many complete steps stay; the oldest are deleted.

    Raises:
        TypeError, ValueError: naming the argument. The ranks have other steps or other parameters: on every rank,
            before anything is written.

    Example::

        checkpoints = Checkpoints("run", {"model": model}, optimizer)
        for step in range(checkpoints.load() or 0, 10_000):
            train(step)
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1, asynchronous=True)
        checkpoints.wait()

    A folder is to be trusted as a program is: PyTorch's format keeps its table of contents as a pickle.
    """

    @checked
    def __init__(
        self,
        folder: str | os.PathLike[str],
        modules: nn.Module | Mapping[str, nn.Module],
        optimizers: Optimizer | Sequence[Optimizer] = (),
        *,
        more: Mapping[str, Stateful] | None = None,
        keep: Count = 2,
    ) -> None:
        self.folder = Path(folder)
        if not isinstance(modules, nn.Module):
            _by_name("modules", modules, nn.Module, "a module")
        self._root = modules if isinstance(modules, nn.Module) else nn.ModuleDict(dict(modules))
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        own = {id(p) for p in self._root.parameters()}
        if any(id(p) not in own for p in self._parameters()):
            raise ValueError("optimizers: expected optimizers of the modules' parameters, got others'")
        self._more = dict(_by_name("more", more or {}, Stateful, "what has state_dict and load_state_dict"))
        self._keep = keep
        self._saving: Any = None
        self._loaded = math.inf  # nothing
        self._saved, self._later = 0, list[int]()
        # of its own: an asynchronous save has collectives in a thread, which must not mix with those of training
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @property
    def _leads(self) -> bool:
        return self._group is None or dist.get_rank() == 0

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def steps(self) -> list[int]:
        """The complete ones, in order."""
        found = (path.parent.name.removeprefix("step-") for path in self.folder.glob(f"step-*/{_COMPLETE}"))
        return sorted(int(name) for name in found if name.isdigit())

    def _parameters(self) -> Iterator[Tensor]:
        """The optimizers'."""
        return (p for each in self._optimizers for group in each.param_groups for p in group["params"])

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizers = get_state_dict(self._root, self._optimizers, options=_AS_CHECKED)
        model = {key: _packed(t) if _is_extra(key, t) else t for key, t in model.items()}
        more = {name: _packed(each.state_dict()) for name, each in self._more.items()}
        return {"modules": model, "optimizers": optimizers, "more": more, "step": torch.tensor(step, device="cpu")}

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """PyTorch makes a step of zeros for the state that an optimizer lacks, unless a parameter has a gradient."""
        empty = [each.param_groups for each in self._optimizers if not each.state]
        lent = [p for groups in empty for p in [p for group in groups for p in group["params"]][:1] if p.grad is None]
        for p in lent:
            p.grad = torch.zeros_like(p)
        try:
            yield
        finally:
            for p in lent:
                p.grad = None

    @contextmanager
    def _made_anew(self) -> Iterator[None]:
        """Optimizers whose state is made for all parameters, so that all can be loaded; as before if that fails."""
        before = [(each, dict(each.state), [dict(group) for group in each.param_groups]) for each in self._optimizers]
        grads = [(p, p.grad) for p in self._parameters()]
        frozen = [p for p in self._parameters() if not p.requires_grad and p.is_floating_point()]
        # which would take the step of zeros for one of training
        hooks: list[Any] = [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
        hooks += [h for o in self._optimizers for h in (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks)]
        kept = [dict(each) for each in hooks]
        for p, _ in grads:
            p.grad = None
        for each in (*hooks, *(o.state for o in self._optimizers)):
            each.clear()

        def restore(each: Optimizer, state: Mapping[Tensor, Any], groups: Sequence[Mapping[str, Any]]) -> None:
            each.state.clear()
            each.state.update(state)
            for group, old in zip(each.param_groups, groups, strict=True):
                group.update(old)

        try:
            for p in frozen:
                p.requires_grad_()
            for each, _, groups in before:
                try:
                    get_optimizer_state_dict(self._root, each, options=_AS_CHECKED)
                except Exception:  # needs a closure, or sparse gradients; those it has now prevent another try
                    restore(each, {}, groups)
            yield
        except BaseException:
            for one in before:
                restore(*one)
            raise
        finally:
            for each, own in zip(hooks, kept, strict=True):
                each.update(own)
            for p, grad in grads:
                p.grad = grad
            for p in frozen:
                p.requires_grad_(False)

    @checked
    def save(self, step: Natural, *, asynchronous: bool = False) -> None:
        """Save the state after so many steps; called by all ranks.

        Args:
            step: steps that have been done.
            asynchronous: return once the state is copied to memory, and write it in the background. An error is raised
                by the next call of ``save``, ``load`` or ``wait``.

        Raises:
            TypeError, ValueError: naming the argument; on all ranks, the folder cannot be made, or has later steps
                though none up to this one was loaded. After a load of such a one, a save deletes the later ones.
        """
        self.wait()
        path = self._path(step)
        with self._untouched():
            state = self._state(step)
        problem: object = None
        if self._leads:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._later = [other for other in self.steps() if other > step]  # of a run that went back
                if self._loaded > step and self._later:
                    raise ValueError(
                        f"step: expected one after {self._later[-1]}, which is in {self.folder}, got {step}; load a "
                        "step up to it first, or take another folder"
                    )
            except (OSError, ValueError) as error:
                problem = error
        own = self._of_this_rank()
        names = [
            f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" if isinstance(t, Tensor) else key
            for key, t in sorted(state["modules"].items())
            if key not in own
        ]
        what = {"step": step, "names": names, "more": sorted(state["more"]), "folder": problem}
        agree(what, self._group, layer=type(self).__name__)
        if self._leads:
            shutil.rmtree(path, ignore_errors=True)  # of the same step, or of a run that ended while it saved
        if self._group is not None:
            dist.barrier(group=self._group)  # nobody writes before
        self._saved = step
        if asynchronous:
            self._saving = async_save(state, checkpoint_id=path, process_group=self._group, no_dist=self._alone)
        else:
            save(state, checkpoint_id=path, process_group=self._group, no_dist=self._alone)
            self._forget()

    @property
    def _alone(self) -> bool:
        return self._group is None

    def wait(self) -> None:
        """Until an asynchronous save is written.

        Raises:
            RuntimeError: it failed; it does not count.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except BaseException as error:
                raise RuntimeError(f"Checkpoints: the asynchronous save in {self.folder} failed: {error}") from error
            self._forget()

    def _forget(self) -> None:
        if self._leads:
            upto = [step for step in self.steps() if step <= self._saved]
            for step in [*upto[: -self._keep], *self._later]:
                (self._path(step) / _COMPLETE).unlink(missing_ok=True)  # first: a step is whole or does not count
                shutil.rmtree(self._path(step), ignore_errors=True)

    @checked
    def load(self, step: Natural | None = None) -> int | None:
        """Load a step, the last complete one by default, into modules, optimizers and the rest; called by all ranks.

        Returns:
            The number of steps done; None where there is none to load.

        Raises:
            FileNotFoundError: the step that was asked for is not there, or not complete; on every rank.
            ValueError: the modules have other parameters or buffers, or of other shapes; the optimizers are of another
                kind or have other groups; ``more`` has a name that was not saved. On every rank.
        """
        self.wait()
        there = self.steps()
        found = torch.tensor((there or [-1])[-1] if step is None else step if step in there else -1, device="cpu")
        if self._group is not None:
            dist.broadcast(found, 0, group=self._group)
        which = int(found)
        if which == -1:
            if step is not None:
                raise FileNotFoundError(f"step: expected one of {there} in {self.folder}, got {step}")
            return None
        metadata = FileSystemReader(self._path(which)).read_metadata()
        saved = metadata.state_dict_metadata
        with self._made_anew():
            state = self._state(which)
            misfit = self._misfit(state["modules"], saved, which)
            self._leave_out(state["optimizers"], saved)
            groups = [list(group["params"]) for group in state["optimizers"].get("param_groups", [])]
            packed = {kind: _fitted(state[kind], kind, saved) for kind in ("modules", "more")}
            most = torch.tensor(len(groups), device="cpu")  # of any rank: some may have modules without parameters
            if self._group is not None:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
            misfit = misfit or self._unlike(state, int(most), metadata, which)
            agree({"modules": misfit}, self._group, layer=type(self).__name__)
            self._take_in(state["optimizers"], groups, metadata)
            for key in [key for key, t in state["modules"].items() if _is_extra(key, t)]:
                if not any(f"{other}.".startswith(f"modules.{key}.") for other in saved):
                    del state["modules"][key]  # what was not saved stays as it is
            load(state, checkpoint_id=self._path(which), process_group=self._group, no_dist=self._alone)
            for kind, names in packed.items():
                state[kind] |= {name: _unpacked(state[kind][name]) for name in names}
            set_model_state_dict(self._root, state["modules"], options=_AS_CHECKED)
            self._load_optimizers(state["optimizers"], groups)
        for name, each in self._more.items():
            each.load_state_dict(state["more"][name])
        self._loaded = which
        return int(state["step"])

    def _load_optimizers(self, state: dict[str, Any], groups: list[list[str]]) -> None:
        """One by one; ``groups``: this rank's names, where another rank's may have been saved."""
        saved, made = state.get("param_groups", []), []
        for there, own in zip(saved, groups, strict=True):
            like = next((group for group in saved if {*group["params"]} & {*own}), there)
            made.append({**like, "params": own})
        left = iter(made)
        for each in self._optimizers:
            one = {"state": state.get("state", {}), "param_groups": list(islice(left, len(each.param_groups)))}
            set_optimizer_state_dict(self._root, each, one, options=_AS_CHECKED)

    def _of_this_rank(self) -> list[str]:
        """What of the modules other ranks need not have."""
        return [unwrapped(self._root, name) for name in own_names(self._root)]

    def _misfit(self, modules: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> Exception | None:
        """What PyTorch finds out late, or not: parameters and buffers that only one side has, or in other shapes."""
        others = [self._of_this_rank()]
        if self._group is not None:
            others *= dist.get_world_size(self._group)
            dist.all_gather_object(others, others[0], group=self._group)
        own = {f"modules.{key}": list(t.shape) for key, t in modules.items() if isinstance(t, Tensor)}
        extra = [key for key, t in modules.items() if not isinstance(t, Tensor)]
        known = tuple(f"modules.{key}." for key in chain(extra, *others))
        lacks = list(own.keys() - saved.keys())
        more = [k for k in saved.keys() - own if k.startswith("modules.") and not f"{k}.".startswith(known)]
        there = {key: list(getattr(saved[key], "size", ())) for key in own.keys() & saved.keys()}
        unlike = [key for key, shape in there.items() if shape != own[key]]
        lacks += [f"{key} {own[key]}" for key in unlike]
        more += [f"{key} {there[key]}" for key in unlike]
        if not lacks and not more:
            return None
        names = [_listed(key.removeprefix("modules.") for key in keys) for keys in (lacks, more)]
        return ValueError(f"modules: expected those of step {step}, got some with {names[0]} and without {names[1]}")

    def _unlike(self, state: Mapping[str, Any], groups: int, saved: Metadata, step: int) -> Exception | None:
        """The same of optimizers and ``more``. Less of ``more`` may be loaded, and no optimizer at all."""
        there = set((saved.planner_data or {}).values())
        own = set(flatten_state_dict({kind: state[kind] for kind in ("optimizers", "more")})[1].values())
        lacks = {kind: [path for path in own - there if path[0] == kind] for kind in ("optimizers", "more")}
        if lacks["more"]:
            known = _listed(path[1] for path in there if path[0] == "more")
            others = _listed(path[1] for path in lacks["more"])
            return ValueError(f"more: expected what step {step} has, under {known}, got others under {others}")
        if not self._optimizers:
            return None
        kinds = ", ".join(type(each).__name__ for each in self._optimizers)
        found, here = ([p for p in paths if p[:2] == ("optimizers", "param_groups")] for paths in (there, own))
        count = len({path[2] for path in found})
        if count != groups:
            told = f"{count} groups of parameters, got {kinds} with {groups}"
            return ValueError(f"optimizers: expected those of step {step}, with {told}")
        if not lacks["optimizers"]:
            return None
        more = _listed(path[3] for path in lacks["optimizers"])
        less = _listed({path[3] for path in found} - {path[3] for path in here})
        return ValueError(
            f"optimizers: expected those of step {step}, got {kinds} with {more} and without {less}, in groups or state"
        )

    def _take_in(self, optimizers: dict[str, Any], groups: Sequence[Sequence[str]], saved: Metadata) -> None:
        """Room for what no step of zeros makes: state of LBFGS, momentum of an SGD that is made without."""
        parameters = dict(zip(chain(*groups), self._parameters(), strict=False))
        state, paths = optimizers.get("state", {}), {}
        for key, path in (saved.planner_data or {}).items():
            if path[:2] == ("optimizers", "state") and path[2] in parameters and path[3] not in state.get(path[2], ()):
                paths[key] = path[2:]
        like = {key: parameters[path[0]] if path[1] != "step" else None for key, path in paths.items()}
        room = {key: _room(saved.state_dict_metadata[key], p) for key, p in like.items()}
        for name, made in unflatten_state_dict(room, paths).items():
            state.setdefault(name, {}).update(made)
        for i, group in enumerate(optimizers.get("param_groups", [])):
            for key, own in group.items():  # a rate that was a tensor or is one now
                found = saved.state_dict_metadata[f"optimizers.param_groups.{i}.{key}"]
                if isinstance(own, Tensor) == isinstance(found, BytesStorageMetadata):
                    group[key] = _room(found, None)

    @staticmethod
    def _leave_out(optimizers: dict[str, Any], there: Mapping[str, Any]) -> None:
        """The state of parameters that had no gradient in any step before the save, so that no state was saved."""
        known = {key.rpartition(".")[0] for key in there if key.startswith("optimizers.state.")}
        of_parameters = optimizers.get("state", {})
        for name in [name for name in of_parameters if f"optimizers.state.{name}" not in known]:
            del of_parameters[name]


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted({str(name) for name in names})) or "none"


def _by_name(name: str, values: Mapping[str, Any], kind: type, what: str) -> Mapping[str, Any]:
    for key, value in values.items():
        if not isinstance(key, str) or (kind is nn.Module and (not key or "." in key)):
            raise ValueError(f"{name}: expected names, without dots, got {given(key)}")
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {what} under {key!r}, got {given(value)}")
    return values


@dataclass(frozen=True)
class _Piece:
    """What PyTorch saves in one piece: all of a state but its tensors, or, within that, the key of one."""

    what: Any


def _is_extra(key: str, t: Any) -> bool:
    """Whether it is what a module says of itself: anything, which may have other keys and sizes in a load."""
    return key.rpartition(".")[2] == "_extra_state" or not isinstance(t, Tensor)


def _packed(state: Any) -> dict[str, Any]:
    """A state's tensors, which may be sharded, and the rest: PyTorch would load only the keys that are there."""
    tensors: dict[str, Tensor] = {}

    def moved(t: Tensor) -> _Piece:
        tensors[key := str(len(tensors))] = t
        return _Piece(key)

    return {"rest": _Piece(tree_map_only(Tensor, moved, state)), "tensors": tensors}


def _unpacked(state: Mapping[str, Any]) -> Any:
    return tree_map_only(_Piece, lambda piece: state["tensors"][piece.what], state["rest"].what)


def _fitted(states: dict[str, Any], prefix: str, saved: Mapping[str, Any]) -> list[str]:
    """The packs that were saved as such, with room for their tensors; others (fastroute 0.2.0) are unpacked."""
    packed = []
    for name, pack in states.items():
        if isinstance(pack, dict) and f"{prefix}.{name}.rest" in saved:
            start, like = f"{prefix}.{name}.tensors.", pack["tensors"]
            tensors = {key.removeprefix(start): t for key, t in saved.items() if key.startswith(start)}
            pack["tensors"] = {key: _room(t, like.get(key)) for key, t in tensors.items()}
            packed.append(name)
        elif isinstance(pack, dict):
            states[name] = _unpacked(pack)
    return packed


def _room(saved: Any, like: Tensor | None) -> Tensor | None:
    """Where a tensor is loaded to: as it is now, if that has the shape. What is no tensor needs no room."""
    if isinstance(saved, BytesStorageMetadata):
        return None
    if like is not None and like.shape == saved.size:
        return torch.empty_like(like, dtype=saved.properties.dtype)
    return torch.empty(saved.size, dtype=saved.properties.dtype, device="cpu")


@checked
def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict that the module has in one process, on the CPU of rank 0; empty on the other ranks.

    Called by all ranks. Keys are those of the module before it was sharded and wrapped (DDP, FSDP2, ``torch.compile``),
    so ``torch.save`` of it loads strictly in one process, and in an upstream's class where the layer's do.
    """
    made: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    others = {unwrapped(module, key): t for key, t in spread_modules(module).items()}
    return made | others if not dist.is_initialized() or dist.get_rank() == 0 else {}


@checked
def load_full_state_dict(module: nn.Module, state: Annotated[Mapping[str, Tensor], None]) -> None:
    """Load the state dict of one process, which rank 0 has, into a module in whatever sharding it has.

    Called by all ranks; what others than rank 0 give is not read.

    Raises:
        RuntimeError, on several ranks ValueError: missing or unexpected keys, or other shapes; TypeError, on several
            ranks ValueError: no dict of tensors, and nothing is loaded. On all ranks.
    """
    leads, layer = not dist.is_initialized() or dist.get_rank() == 0, "load_full_state_dict"
    problem: Exception | None = None
    if leads and not isinstance(state, Mapping):
        problem = TypeError(f"state: expected a dict, got {given(state)}")
    agree({"state": problem}, layer=layer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    try:
        set_model_state_dict(module, dict(state) if leads else {}, options=options)
    except RuntimeError as error:
        problem = error
    agree({"state": problem}, layer=layer)
