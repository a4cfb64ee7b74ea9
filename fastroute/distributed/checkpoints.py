"""``Checkpoints``: what a training run needs to go on from, of any sharding, on any number of ranks.

PyTorch's ``torch.distributed.checkpoint`` writes and reads; this keeps steps apart, and knows which are complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..modules.wrapped import unwrapped
from ..ops.arguments import Count, Natural, checked
from ..ops.checks import given
from .agreement import agree
from .experts import of_one_rank, own_names, spread_modules

__all__ = ["Checkpoints", "full_state_dict", "load_full_state_dict"]

_COMPLETE = ".metadata"  #: DCP writes it last, under another name first


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
        self._loaded: int | None = None
        self._saved = 0
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
        model, optimizers = get_state_dict(self._root, self._optimizers)
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
        before = [(each, dict(each.state)) for each in self._optimizers]
        frozen = [p for p in self._parameters() if not p.requires_grad and p.is_floating_point()]
        for each, _ in before:
            each.zero_grad()
            each.state.clear()
        try:
            for p in frozen:
                p.requires_grad_()
            yield
        except BaseException:
            for each, state in before:
                each.state.clear()
                each.state.update(state)
            raise
        finally:
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
                though none was loaded. After a load of an earlier one, a save deletes the later ones.
        """
        self.wait()
        path = self._path(step)
        with self._untouched():
            state = self._state(step)
        problem: object = None
        if self._leads:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if self._loaded is None and (there := self.steps()) and there[-1] > step:
                    raise ValueError(
                        f"step: expected one after {there[-1]}, which is in {self.folder}, got {step}; load a step "
                        "first, or take another folder"
                    )
                shutil.rmtree(path, ignore_errors=True)  # of a run that ended while it saved
            except (OSError, ValueError) as error:
                problem = error
        # nobody writes before the first rank is here, too
        own = {unwrapped(self._root, name) for name in own_names(self._root)}
        names = [
            f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" if isinstance(t, Tensor) else key
            for key, t in sorted(state["modules"].items())
            if key not in own
        ]
        what = {"step": step, "names": names, "more": sorted(state["more"]), "folder": problem}
        agree(what, self._group, layer=type(self).__name__)
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
            there = self.steps()
            upto = there.index(self._saved) + 1  # later ones are of a run that went back
            for step in [*there[: max(0, upto - self._keep)], *there[upto:]]:
                (self._path(step) / _COMPLETE).unlink()  # first: a step is whole or does not count
                shutil.rmtree(self._path(step), ignore_errors=True)

    @checked
    def load(self, step: Natural | None = None) -> int | None:
        """Load a step, the last complete one by default, into modules, optimizers and the rest; called by all ranks.

        Returns:
            The number of steps done; None where there is none to load.

        Raises:
            FileNotFoundError: the step that was asked for is not there, or not complete; on every rank.
            ValueError: the modules have other parameters or buffers; on every rank.
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
        saved = FileSystemReader(self._path(which)).read_metadata().state_dict_metadata
        packed = {name for name in self._more if f"more.{name}.rest" in saved}  # fastroute 0.2.0: key by key
        with self._made_anew():
            state = self._state(which)
            wrong = self._misfit(state["modules"], saved, which)
            agree({"modules": wrong}, self._group, layer=type(self).__name__)
            self._leave_out(state["optimizers"], saved)
            for name, each in self._more.items():
                if name not in packed:
                    state["more"][name] = each.state_dict()
                    continue
                prefix, like = f"more.{name}.tensors.", state["more"][name]["tensors"]
                tensors = {key.removeprefix(prefix): t for key, t in saved.items() if key.startswith(prefix)}
                state["more"][name]["tensors"] = {key: _room(t, like.get(key)) for key, t in tensors.items()}
            load(state, checkpoint_id=self._path(which), process_group=self._group, no_dist=self._alone)
            set_model_state_dict(self._root, state["modules"])
            if self._optimizers:
                options = StateDictOptions(strict=False)  # what has no state is known to have had none
                set_optimizer_state_dict(self._root, self._optimizers, state["optimizers"], options=options)
        for name, each in self._more.items():
            each.load_state_dict(_unpacked(state["more"][name]) if name in packed else state["more"][name])
        self._loaded = which
        return int(state["step"])

    def _misfit(self, modules: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> Exception | None:
        """What PyTorch finds out late, or not: parameters and buffers that only one side has."""
        own = {f"modules.{key}" for key, t in modules.items() if isinstance(t, Tensor)}
        others = [unwrapped(self._root, name[:-1]) for name in of_one_rank(self._root)]  # other ranks have these
        others += [key for key, t in modules.items() if not isinstance(t, Tensor)]  # saved key by key
        known = tuple(f"modules.{name}." for name in others)
        more = sorted(key for key in saved.keys() - own if key.startswith("modules.") and not key.startswith(known))
        if not (lacks := sorted(own - saved.keys())) and not more:
            return None
        names = [", ".join(key.removeprefix("modules.") for key in keys) or "none" for keys in (lacks, more)]
        return ValueError(f"modules: expected those of step {step}, got some with {names[0]} and without {names[1]}")

    @staticmethod
    def _leave_out(optimizers: dict[str, Any], there: Mapping[str, Any]) -> None:
        """The state of parameters that had no gradient in any step before the save, so that no state was saved."""
        known = {key.rpartition(".")[0] for key in there if key.startswith("optimizers.state.")}
        of_parameters = optimizers.get("state", {})
        for name in [name for name in of_parameters if f"optimizers.state.{name}" not in known]:
            del of_parameters[name]


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


def _packed(state: Any) -> dict[str, Any]:
    """A state's tensors, which may be sharded, and the rest: PyTorch would load only the keys that are there."""
    tensors: dict[str, Tensor] = {}

    def moved(t: Tensor) -> _Piece:
        tensors[key := str(len(tensors))] = t
        return _Piece(key)

    return {"rest": _Piece(tree_map_only(Tensor, moved, state)), "tensors": tensors}


def _unpacked(state: Mapping[str, Any]) -> Any:
    return tree_map_only(_Piece, lambda piece: state["tensors"][piece.what], state["rest"].what)


def _room(saved: Any, like: Tensor | None) -> Tensor:
    """Where a tensor is loaded to: as it is now, if that has the shape."""
    if like is not None and like.shape == saved.size and like.dtype == saved.properties.dtype:
        return torch.empty_like(like)
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
