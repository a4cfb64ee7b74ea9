"""Which task a module works on: one for all samples or one for each, changed without compiling anything again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..importing import constant_result
from ..modules.names import TakenNames
from ..ops import checks
from ..ops.host import has_numbers, unseen, version_of
from ..ops.recomputation import is_in_backward, is_recomputation
from ..ops.task_mask.op import of_all

#: A task for all samples, also as a tensor 0-d or [1], or [B] one for each.
Task = int | Tensor


def task_index(task: object, task_count: int, name: str = "task") -> Task:
    """An int from 0 to T - 1 or an integer tensor, 0-d or [B], from what users give.

    Raises:
        TypeError: neither, or a fraction.
        IndexError: an int out of range. (Values of tensors are looked at where they are used.)
        ValueError: a tensor of more axes, or on the meta device.
    """
    if isinstance(task, Tensor):
        if task.dtype.is_floating_point or task.dtype.is_complex or task.dtype == torch.bool:
            raise TypeError(f"{name}: expected an int or an integer tensor, 0-d or [B], got {task.dtype}")
        if task.dim() > 1:
            raise ValueError(f"{name}: expected an int or an integer tensor, 0-d or [B], got {checks.shown(task)}")
        return task
    if isinstance(task, torch.SymInt):  # under torch.compile an int argument may be any
        return task  # type: ignore[return-value]
    try:
        index = task if type(task) is int else checks.integer(name, task)
    except TypeError:
        raise TypeError(
            f"{name}: expected an int or an integer tensor, 0-d or [B] (one per sample), got {task!r}"
        ) from None
    if not 0 <= index < task_count:
        raise IndexError(f"{name}: expected a task from 0 to {task_count - 1}, got {index}")
    return index


def on_device(task: Task, device: torch.device) -> Tensor:
    """The task as an int64 tensor on a device, 0-d for an int."""
    if isinstance(task, Tensor):
        return checks.moved("task", task, device, torch.int64)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # a graph may save it for a backward pass
            return on_device(task, device)
    return torch.full((), task, dtype=torch.int64, device=device)


def traced() -> bool:
    """Whether torch.compile or a transform of torch.func is active."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_mapped(task: Task) -> bool:
    """Whether vmap maps over the task: then its number is not known, and is not the same for all samples."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while isinstance(task, Tensor) and functorch.is_functorch_wrapped_tensor(task):
        if functorch.is_batchedtensor(task):
            return True
        task = functorch.get_unwrapped(task)
    return False


class _Block:
    """The tasks that modules work on in a call, or a ``with on_task``, whatever is their active task."""

    def __init__(self, tasks: dict[TaskAware, Task], keeps: bool) -> None:
        self.tasks, self.keeps = tasks, keeps  #: ``keeps``: a task that is set within is the block's own


#: Of a thread, or a task of asyncio: the blocks that it is in, the innermost last.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("fastroute.tasks", default=())
#: Of all of them, in the order in which they were entered: what compiled code reads is the last one's.
_open: list[_Block] = []


@contextmanager
def _within(block: _Block) -> Iterator[None]:
    """Others may enter and leave theirs meanwhile, in any order."""
    parts = (*block.tasks,)
    _blocks.set((*_blocks.get(), block))
    _open.append(block)
    try:
        if _graphs:
            for part in parts:
                _show(part)
        yield
    finally:
        _blocks.set(tuple(b for b in _blocks.get() if b is not block))
        _open.remove(block)
        if _graphs or block.keeps:
            for part in parts:
                _show(part)


#: Whether any graph was made that reads a task: from then on compiled code is shown those of calls, too.
_graphs: list[bool] = []


@constant_result
def _is_read_by_a_graph() -> bool:
    """While one is made."""
    if not _graphs:
        _graphs.append(True)
        for part in {part for block in _open for part in block.tasks}:
            _show(part)
    return True


def given(tasks: dict[TaskAware, Task]) -> AbstractContextManager[None]:
    """Within, modules work on these tasks where they are called without one, in this thread alone.

    What is compiled of them reads, as in ``on_task``, the task that was given last, by anybody.
    """
    return _within(_Block(tasks, keeps=False))


def _is_kept(part: TaskAware, task: Task, on: Tensor | None) -> bool:
    """Whether a task that is set is the innermost block's; a call's own task counts no more, for the rest of it."""
    for block in reversed(() if torch.compiler.is_compiling() else _blocks.get()):
        if part in block.tasks:
            if block.keeps:
                on = on_device(task, part._device()) if on is None else on
                block.tasks[part] = task if type(task) is int else on
                _show(part)
                return True
            block.tasks = {p: t for p, t in block.tasks.items() if p is not part}
    return False


def _lent(parts: Sequence[TaskAware]) -> AbstractContextManager[None]:
    """Within, tasks that are set are those of this block, and of nobody else who works on the parts meanwhile."""
    return _within(_Block({part: part.active_task for part in parts}, keeps=True))


@contextmanager
def held(parts: Sequence[TaskAware]) -> Iterator[None]:
    """The same of a trace, in which tasks are attributes."""
    before = [(part, part._active, part._active_id, part._shown_id) for part in parts]
    try:
        yield
    finally:
        for part, active, on, shown in before:
            part._hold(active, on)
            object.__setattr__(part, "_shown_id", shown)


def _show(part: TaskAware) -> None:
    """Have compiled code see the task of the block that was entered last, or the active one."""
    state = part.__dict__  # found faster
    shown: Tensor = state["_active_id"]
    for block in reversed((*_open,)):
        if part in block.tasks:
            shown = on_device(block.tasks[part], part._device())
            break
    state["_shown_id"] = shown


class TaskAware(TakenNames, nn.Module):
    """A module that works on one of ``task_count`` tasks, told in ``forward`` or beforehand by ``set_active_task``.

    The active task is kept twice: as users gave it, which is what eager code reads, and as a tensor, which is what
    traced code reads, so that no graph depends on its value. The tensor is replaced rather than written to, since a
    backward pass may still need the old one, and is no buffer, since DistributedDataParallel would copy rank 0's to
    all ranks, which may be at different tasks.

    A forward pass that is made again for backward (torch.utils.checkpoint) has to have the task of the first time. A
    task that is given is the same; that the active one is still the same is checked by ``_checked``, which saves it for
    backward and so compares it with what it is when it is saved again, and, for checkpoints that save nothing the first
    time (``use_reentrant=True``), by ``_note`` and ``_compare``.
    """

    task_count: int
    _active: Task
    _active_id: Tensor
    _shown_id: Tensor  #: what traced code reads: that of ``on_task``, too

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_follow_device)

    def _device(self) -> torch.device:
        """Where the task is needed."""
        raise NotImplementedError

    def _hold(self, task: Task, on: Tensor | None = None) -> None:
        """Make a checked task the active one; ``on`` is the same on this module's device, if there is one already."""
        if on is None:
            on = on_device(task, self._device())
        object.__setattr__(self, "_active", task)  # nn.Module's own looks for parameters of the name first
        object.__setattr__(self, "_active_id", on)
        object.__setattr__(self, "_shown_id", on)
        if not torch.compiler.is_compiling() and _open:
            _show(self)

    def _set(self, task: Task, on: Tensor | None = None) -> None:
        """As ``_hold``, from now on: within ``on_task`` until its end."""
        if not _is_kept(self, task, on):
            self._hold(task, on)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose active task is that of ``on_task`` where it is made within."""
        state, task = self.__dict__.copy(), self.active_task
        if "_active" in state and (task is not self._active or self._shown_id is not self._active_id):
            state["_active"] = task
            state["_active_id"] = state["_shown_id"] = on_device(task, self._device())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_active_id" in self.__dict__:  # of a copy that another version has saved
            self.__dict__.setdefault("_shown_id", self._active_id)

    def _replicate_for_data_parallel(self) -> Any:
        made: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        made.__dict__.update({k: v for k, v in self.__getstate__().items() if k.startswith(("_active", "_shown"))})
        return made

    @property
    def active_task(self) -> Task:
        """The task used when ``forward`` is given none, as it was set."""
        found = self._given()
        return self._active if found is None else found

    @active_task.setter
    def active_task(self, task: Task) -> None:
        self.set_active_task(task)

    def set_active_task(self, active_task: Task) -> Task:
        """Work on a task from now on; returns it.

        Args:
            active_task: an int, or an integer tensor: 0-d or [1], or [B]: one per sample.

        Raises:
            IndexError, TypeError, ValueError: no task of this module.
        """
        task = task_index(active_task, self.task_count, "active_task")
        self._set(task)
        return task

    def _given(self) -> Task | None:
        """The task of the call that this one is a part of, if it has one of its own."""
        if not torch.compiler.is_compiling():
            mine = _blocks.get()
            # a GPU's backward pass, in which checkpointing and hooks call this, is in a thread of autograd's own
            lent = [block for block in list(_open) if block.keeps] if _open and is_in_backward() else ()
            for block in reversed((*lent, *mine)):
                if self in block.tasks:
                    return block.tasks[self]
        return None

    def _task(self, task: Task | None) -> Task:
        """The task to work on: the given one, checked, or the active one; a tensor is 0-d or has one per sample."""
        if task is not None:
            return of_all(task_index(task, self.task_count))
        if torch.compiler.is_compiling():
            _is_read_by_a_graph()
            return of_all(self._shown_id)
        active = self._given() if _blocks.get() or _open else None
        if active is None:
            active = self._active_id if isinstance(self._active, Tensor) else self._active
        if is_recomputation():
            self._compare(active)
        if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():  # in a Function's forward
            self._note(active)
        return of_all(active)

    def _note(self, active: Task) -> None:
        """Tell the autograd Functions that this is called within, one of which may call it again in its backward."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" and code.co_argcount:
                ctx = frame.f_locals.get(code.co_varnames[0])
                if isinstance(ctx, FunctionCtx):
                    noted: dict[TaskAware, list[tuple[Task, int]]] = ctx.__dict__.setdefault("_tasks", {})
                    noted.setdefault(self, []).append((active, _version(active)))
            frame = frame.f_back

    def _compare(self, active: Task) -> None:
        """Raise if the Function whose backward this is called within has called this for other tasks."""
        noted = getattr(torch._C._current_autograd_node(), "_tasks", {}).get(self)
        if noted and not any(_is_still(task, version, active) for task, version in noted):
            raise RuntimeError(_CHANGED)

    def _checked(self, y: Tensor, task: Task | None) -> Tensor:
        """y, made for a task that may be the active one; its backward raises if it was made again for another."""
        if not is_made_again(task):
            return y
        active = self.active_task
        active = active if isinstance(active, Tensor) else torch.tensor(active, device="cpu")
        # what follows depends on the task
        anchor = None if y.requires_grad else torch.empty(0, device="cpu", requires_grad=True)
        with _unsafe_preserve_version_counter(y):  # whoever keeps y sees that its numbers are the same
            return _Checked.apply(y, active, anchor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        _follow_device(self)
        return self


def is_made_again(task: Task | None) -> bool:
    """Whether torch.utils.checkpoint, and not another, keeps what is saved for backward, and makes it again, of a pass
    for the active task."""
    if task is not None or traced() or not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


_CHANGED = (
    "task: expected a forward pass that is made again for backward (torch.utils.checkpoint) to have the task of the "
    "first time, but the active task was changed in between; give the task in the call, model(x, task), or set it "
    "within the function that is checkpointed, by on_task(model, task)"
)


def _version(task: Task) -> int:
    return version_of(task) if isinstance(task, Tensor) else 0


def _is_still(task: Task, version: int, now: Task) -> bool:
    """Whether a task that was kept is what it was, and the same as now."""
    if version != _version(task):
        return False
    tensors = [t for t in (now, task) if isinstance(t, Tensor)]
    with unseen() if all(map(has_numbers, tensors)) else nullcontext():
        if len(tensors) == 2:
            return now is task or torch.equal(*tensors)
        return bool(torch.as_tensor(now == task, device="cpu").all())


class _Checked(torch.autograd.Function):
    """The identity, in place, of what was made for a task."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, task: Tensor, anchor: Tensor | None) -> Tensor:
        ctx.save_for_backward(task)
        ctx.task, ctx.version = task, _version(task)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        if not _is_still(ctx.task, ctx.version, saved):
            raise RuntimeError(_CHANGED)
        return grad, None, None


def _follow_device(module: nn.Module, *_: object) -> None:
    """The active task's tensor is to be where the module is."""
    assert isinstance(module, TaskAware)
    device = module._device()
    if module._active_id.device != device:
        module._hold(module._active)


def set_task(model: nn.Module, task: Task) -> None:
    """Make ``task`` the active one in every part of a model that works on tasks. Nothing is compiled again.

    ``model.apply`` of a function that calls ``set_active_task`` on whatever has an ``active_task`` does so, too.

    Args:
        model: any module with a :class:`TaskRouter` or a :class:`VGG` in it (or that is one).
        task: an int; or an integer tensor: 0-d or [1], or [B]: one per sample of the batches to come.

    Raises:
        IndexError, TypeError, ValueError: not a task of some part; all parts then keep the task they had; nothing in
            the model works on tasks.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), fastroute.TaskRouter(16, 4, 0.5), nn.ReLU())
        >>> fastroute.set_task(net, 3)
        >>> net(torch.randn(5, 8)).shape
        torch.Size([5, 16])
    """
    aware, others = aware_parts(model)
    if not aware and not others:
        raise ValueError(f"model: expected a module with task routers in it, found none in {type(model).__name__}")
    if foreign := _foreign(others):
        with unless_refused((*aware, *foreign)):
            _tell(aware, others, task)
    else:  # at less cost
        _tell(aware, others, task)


def _tell(aware: Sequence[TaskAware], others: Sequence[Any], task: Task) -> None:
    if aware:
        hold_in_all(aware, task)
    for other in others:
        other.set_active_task(task)


def _foreign(others: Sequence[Any]) -> list[Any]:
    """Those that are no mere lists of parts that are set as well."""
    return [other for other in others if not hasattr(other, "tells_its_parts")]


def _now(parts: Sequence[Any]) -> list[tuple[Any, Task]]:
    return [(part, part.active_task) for part in parts if hasattr(part, "active_task")]


def _set_back(before: Sequence[tuple[Any, Task]]) -> None:
    for part, active in before:
        part.set_active_task(active)


@contextmanager
def unless_refused(parts: Sequence[Any]) -> Iterator[None]:
    """Within, modules are set to a task; if one refuses it, all keep the task they had."""
    before = _now(parts)
    try:
        yield
    except Exception:
        _set_back(before)
        raise


_setter = TaskAware.set_active_task


def _has_its_own(part: TaskAware) -> bool:
    setter = type(part).set_active_task
    is_ours = setter is _setter or setter.__module__.startswith("fastroute.")
    return not is_ours or "set_active_task" in part.__dict__


def _with_their_own(parts: Sequence[TaskAware]) -> list[TaskAware]:
    """Those with a ``set_active_task`` of the user's, which has to be called."""
    return [part for part in parts if _has_its_own(part)]


def hold_in_all(parts: Sequence[TaskAware], task: Task, name: str = "task") -> None:
    """Make a task the active one of several modules, or of none if it is no task of one, or one refuses it."""
    checked = task_index(task, min([module.task_count for module in parts], default=1), name)
    if own := _with_their_own(parts):
        with unless_refused(parts):
            if rest := [part for part in parts if part not in own]:
                hold_in_all(rest, task, name)
            for part in own:
                part.set_active_task(task)
        return
    where: dict[torch.device, Tensor] = {}
    is_plain = not (torch.compiler.is_compiling() or _blocks.get() or _open)
    for module in parts:
        device = module._active_id.device  # the module's, found faster
        if device not in where:
            where[device] = on_device(checked, device)
        on = where[device]
        if is_plain:  # as _set does then, at less cost
            module.__dict__.update(_active=checked, _active_id=on, _shown_id=on)
        else:
            module._set(checked, on)


@contextmanager
def on_task(model: nn.Module, task: Task) -> Iterator[None]:
    """Within, ``task`` is the active one in every part of a model that works on tasks; afterwards what was before.

    So a task is given to one call of a model that does not take it as an argument, whatever other threads, or other
    tasks of asyncio, do with the model meanwhile. (A compiled model reads the task that was set last, by anybody.)

    Where the call may be made again for backward, as torch.utils.checkpoint does, this belongs into the function that
    is checkpointed::

        def trunk(x, task):
            with on_task(model, task):
                return model.trunk(x)

        y = checkpoint(trunk, x, task, use_reentrant=False)

    Args:
        model, task: as of :func:`set_task`.

    Raises:
        IndexError, TypeError, ValueError: as :func:`set_task`.

    Examples:
        >>> router = fastroute.TaskRouter(8, 3, 0.5)
        >>> with fastroute.on_task(router, 2):
        ...     y = router(torch.ones(1, 8))
        >>> router.active_task
        0
    """
    aware, others = aware_parts(model)
    before = _now([*_with_their_own(aware), *_foreign(others)])
    with held(aware) if torch.compiler.is_compiling() else _lent(aware):
        try:
            set_task(model, task)
            yield
        finally:
            _set_back(before)


#: What classes were seen to be: see ``_kind``.
_kinds: dict[type, Literal["aware", "other", "none"]] = {}


def _kind(cls: type) -> Literal["aware", "other", "none"]:
    if issubclass(cls, TaskAware):
        return "aware"
    return "other" if hasattr(cls, "set_active_task") else "none"


def aware_parts(model: nn.Module) -> tuple[list[TaskAware], list[Any]]:
    """The parts that are TaskAware, and others with a ``set_active_task``; the model itself may be one.

    ``model.modules()`` would find them, but takes longer than everything else in a switch of tasks.
    """
    aware: list[TaskAware] = []
    others: list[Any] = []
    seen: set[nn.Module] = set()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {checks.given(model)}")
    modules: list[Any] = [model]
    traces = torch.compiler.is_compiling()  # what a trace has written, it is guarded by, and is made again
    for module in modules:  # which grows
        cls = type(module)
        kind = None if traces else _kinds.get(cls)
        if kind is None:
            if module is None:
                continue
            kind = _kind(cls)
            if not traces:
                _kinds[cls] = kind
        if kind != "none":
            (aware if kind == "aware" else others).append(module)
        if (children := module._modules) and module not in seen:
            seen.add(module)
            modules.extend(children.values())
    return aware, others
