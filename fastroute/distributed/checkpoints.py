"""``Checkpoints``: what a training run needs to go on from, of any sharding, on any number of ranks.

PyTorch's ``torch.distributed.checkpoint`` writes and reads; this keeps steps apart, and knows which are complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

from ..modules.wrapped import unwrapped
from .agreement import agree
from .experts import own_names, spread_modules

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
        more: other things with ``state_dict`` and ``load_state_dict``, by name: schedulers, data loaders.
        keep: how many complete steps stay; the oldest are deleted.

    Raises:
        ValueError: the ranks have other steps or other parameters: on every rank, before anything is written.

    Example::

        checkpoints = Checkpoints("run", {"model": model}, optimizer)
        for step in range(checkpoints.load() or 0, 10_000):
            train(step)
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1, asynchronous=True)
        checkpoints.wait()

    A folder is to be trusted as a program is: PyTorch's format keeps its table of contents as a pickle.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        modules: nn.Module | Mapping[str, nn.Module],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        *,
        more: Mapping[str, Stateful] | None = None,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder = Path(folder)
        self._root = modules if isinstance(modules, nn.Module) else nn.ModuleDict(dict(modules))
        self._optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self._more = dict(more or {})
        self._keep = keep
        self._saving: Any = None
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

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizers = get_state_dict(self._root, self._optimizers)
        more = {name: each.state_dict() for name, each in self._more.items()}
        return {"modules": model, "optimizers": optimizers, "more": more, "step": torch.tensor(step, device="cpu")}

    def save(self, step: int, *, asynchronous: bool = False) -> None:
        """Save the state after so many steps; called by all ranks.

        Args:
            step: steps that have been done.
            asynchronous: return once the state is copied to memory, and write it in the background. An error is raised
                by the next call of ``save``, ``load`` or ``wait``.
        """
        self.wait()
        path = self._path(step)
        state = self._state(step)
        if self._leads:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)  # of a run that ended while it saved
        # nobody writes before the first rank is here, too
        own = own_names(self._root)
        names = [
            f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" if isinstance(t, Tensor) else key
            for key, t in sorted(state["modules"].items())
            if key not in own
        ]
        agree({"step": step, "names": names, "more": sorted(state["more"])}, self._group, layer=type(self).__name__)
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
            for step in self.steps()[: -self._keep]:
                (self._path(step) / _COMPLETE).unlink()  # first: a step is whole or does not count
                shutil.rmtree(self._path(step), ignore_errors=True)

    def load(self, step: int | None = None) -> int | None:
        """Load a step, the last complete one by default, into modules, optimizers and the rest; called by all ranks.

        Returns:
            The number of steps done; None where there is none to load.

        Raises:
            FileNotFoundError: the step that was asked for is not there, or not complete; on every rank.
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
        state = self._state(which)
        self._leave_out(state["optimizers"], FileSystemReader(self._path(which)).read_metadata().state_dict_metadata)
        load(state, checkpoint_id=self._path(which), process_group=self._group, no_dist=self._alone)
        set_model_state_dict(self._root, state["modules"])
        if self._optimizers:
            options = StateDictOptions(strict=False)  # what has no state is known to have had none
            set_optimizer_state_dict(self._root, self._optimizers, state["optimizers"], options=options)
        for name, each in self._more.items():
            each.load_state_dict(state["more"][name])
        return int(state["step"])

    @staticmethod
    def _leave_out(optimizers: dict[str, Any], there: Mapping[str, Any]) -> None:
        """The state of parameters that had no gradient in any step before the save, so that no state was saved."""
        known = {key.rpartition(".")[0] for key in there if key.startswith("optimizers.state.")}
        of_parameters = optimizers.get("state", {})
        for name in [name for name in of_parameters if f"optimizers.state.{name}" not in known]:
            del of_parameters[name]


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


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state dict of one process, which rank 0 has, into a module in whatever sharding it has.

    Called by all ranks; what others than rank 0 give is not read.

    Raises:
        RuntimeError: missing or unexpected keys, or other shapes.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(module, dict(state) if leads else {}, options=options)
