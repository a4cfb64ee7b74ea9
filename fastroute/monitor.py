"""What the router of a model does while it trains, as numbers for any logger.

Axes: B samples, N entries, K modules, A agents, T tasks.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from inspect import isclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .capsules import DefinableVectorRouting, EfficientVectorRouting, GenerativeMatrixRouting, SlotAttention
from .modules import watching
from .modules.wrapped import unwrapped
from .multitask.expert_bank import Gates
from .multitask.objective import Objective
from .multitask.weighting import Weighting
from .networks import Decision, Selection, TopKGating, Trajectory
from .networks.summary import COLLAPSE
from .ops import checks
from .ops.arguments import Count, checked
from .ops.checks import given
from .tasks.active_task import TaskAware
from .tasks.layers import RoutedConv2d, RoutedLinear

#: Layers that tell what they do (``fastroute.modules.watching``). A mixture of experts tells by its gate.
TELLING = (
    Decision, TopKGating, Selection, Gates, Weighting, Objective, TaskAware, RoutedConv2d, RoutedLinear,
    EfficientVectorRouting, GenerativeMatrixRouting, DefinableVectorRouting, SlotAttention,
)  # fmt: skip
_BY_AGENT = 400  #: the most numbers that a module gives by agent and by module


class Sink(Protocol):
    """Where numbers go: a ``RunLog``, a ``TensorBoard``, or anything else with this method."""

    def write(self, numbers: Mapping[str, float], step: int) -> None: ...


class RoutingMonitor:
    """Counts what a model's fastroute layers decide, and says it as a flat dict of floats.

    No hook is set: layers tell a monitor beside the model. So outputs, gradients, state dicts and compiled graphs are
    what they are without it, modules that are read instead of called stay so, and copies and pickles of the model are
    not watched. Each call adds to a tally on the device; nothing waits for the device until :meth:`numbers` is called.
    A forward pass that torch.utils.checkpoint makes again is not counted again. Compiled and exported code, and calls
    within ``torch.func``, tell nothing; their trajectories can be given to :meth:`observe`. :meth:`numbers` warns once
    of layers that it can see to be silent for such a reason. Threads may call the model, and read, at the same time.

    Args:
        model: any module with fastroute layers in it.
        every: look at one in so many calls of each layer.
        when: count always, or what modules do in "training" or in "evaluation" mode only.
        counts: give how often each module was taken as well, ``NAME/count/K``, and by agent ``NAME/by_agent/A/K``.

    Example::

        >>> import torch, fastroute
        >>> moe = fastroute.MoE(16, 32, num_experts=4, k=1)
        >>> with fastroute.RoutingMonitor(moe) as monitor:
        ...     _ = moe(torch.randn(100, 16))
        ...     numbers = monitor.numbers()
        >>> numbers["gate/entries"], numbers["gate/dead"] + numbers["gate/used"]
        (100.0, 4.0)

    Raises:
        TypeError, ValueError: naming the argument; a model without a fastroute layer.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        every: Count = 1,
        when: Literal["always", "training", "evaluation"] = "always",
        counts: bool = True,
    ) -> None:
        self.model, self.every, self.when, self.counts = model, every, when, counts
        self._begin()
        self.attach()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._tallies: dict[str, _Tally] = {}
        self._routes: list[_Route] = []
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._calls: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._conflict: dict[str, float] = {}
        self._told: set[str] = set()  # since the last reading
        self._warned: set[str] = set()
        self._depth = 0  # blocks that are open

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are off, and have counted nothing: :meth:`attach` turns them on."""
        return {name: getattr(self, name) for name in ("model", "every", "when", "counts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # ---------------------------------------------------------------------------------------------------- on and off

    def attach(self) -> RoutingMonitor:
        """Watch the model as it is now: also after layers were added, and after :meth:`remove`."""
        found = {m: _named(m, unwrapped(self.model, name)) for name, m in self.model.named_modules()}
        if not any(isinstance(module, TELLING) for module in found):
            raise ValueError(f"model: expected a fastroute layer in it, found none in {type(self.model).__name__}")
        with self._lock:
            for module in self._names.keys() - found.keys():  # it has left the model
                watching.unwatch(module, self)
                del self._names[module]
            for module, name in found.items():
                self._names[module] = name
                watching.watch(module, self)
        return self

    def remove(self) -> None:
        """Watch no more. What was counted can still be read."""
        with self._lock:
            for module in list(self._names):
                watching.unwatch(module, self)

    def __enter__(self) -> RoutingMonitor:
        with self._lock:
            self._depth += 1
        return self.attach()  # after a block that is over, too

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:  # the outermost block's end
                self.remove()

    def __repr__(self) -> str:
        return f"RoutingMonitor({type(self.model).__name__}, {len(self.layers)} layers, every={self.every})"

    @property
    def layers(self) -> list[str]:
        """The names of the layers that tell something."""
        return [name for _, name in self._telling()]

    def _telling(self) -> list[tuple[nn.Module, str]]:
        with self._lock:
            return [(module, name) for module, name in self._names.items() if isinstance(module, TELLING)]

    @property
    def silent(self) -> list[str]:
        """Layers that have told nothing yet: not called, called in compiled code only, or asked for no credit.

        Capsule layers tell with ``return_dict=True`` only, slot attention with ``return_attn=True``: they do not store
        the shares otherwise. A model's losses are told by ``model.loss``, weights by the weighting.
        """
        return [name for name in self.layers if name not in self._tallies]

    def _warn_of_silence(self) -> None:
        """Once per layer: it told nothing since the last reading, though it may well have been called."""
        replicated: set[nn.Module] = set()
        for module in self.model.modules():
            if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
                replicated.update(module.modules())
        reasons: dict[str, list[str]] = {_COMPILED: [], _REPLICATED: []}
        for module, name in self._telling():
            if name not in self._told and name not in self._warned:
                if watching.is_compiled(module):
                    reasons[_COMPILED].append(name)
                elif module in replicated:
                    reasons[_REPLICATED].append(name)
        for reason, names in reasons.items():
            self._warned.update(names)
            if names:
                warnings.warn(f"RoutingMonitor: {', '.join(names)} told nothing. {reason}", stacklevel=_outside())

    # ------------------------------------------------------------------------------------------------- while it runs

    def see(self, layer: nn.Module, kind: str, *seen: Any) -> None:
        """What a layer tells; not to be called by users."""
        if self.when != "always" and layer.training != (self.when == "training"):
            return
        with self._lock:
            name = self._names.get(layer)
            if name is None:
                return
            counted = True
            if kind != "mixture":  # the gate's, which tells its entries as well
                calls = self._calls[layer] = self._calls.get(layer, -1) + 1
                counted = calls % self.every == 0
            if counted or kind == "decision":
                with torch.inference_mode(False), torch.no_grad():
                    self._take(layer, name, kind, seen, counted)

    def _take(self, layer: Any, name: str, kind: str, seen: tuple[Any, ...], counted: bool = True) -> None:
        if any(type(t) is not Tensor or t.is_meta for t in seen if isinstance(t, Tensor)):
            return  # a stand-in without numbers, or sharded
        if kind in ("decision", "mixture"):
            batch, record = seen
            self._follow(batch, record)  # a trajectory's, whole or not at all
            if kind == "decision" and counted:
                agents, A = record.agents, int(getattr(layer, "_num_agents", 1))
                self._tally(name, _Entries).add(record.actions, record.choices, record.active, agents, A)
        elif kind == "entries":
            self._tally(name, _Entries).add(*seen)
        elif kind == "tasks":
            task, x, count = seen
            self._tally(name, _Tasks).add_tasks(task, x.shape[0], count)
        elif kind == "shares":
            self._tally(name, _Shares).add(*seen)
        elif kind == "credit":
            self._tally(name, _Credit).add(*seen)
        elif kind == "losses":
            self._tally(name, _Losses).follow(*seen)
        elif kind == "task losses":
            found, weights = seen
            self._tally(name, _Losses).keep(tuple(found), [t.detach() for t in found.values()], weights)

    def _tally(self, name: str, kind: type[Any]) -> Any:
        self._told.add(name)
        found = self._tallies.get(name)
        if type(found) is not kind:
            found = self._tallies[name] = kind()
        return found

    def _follow(self, batch: Any, record: Any) -> None:
        """Keep the last trajectory's actions, of which the routes are made; those of all that threads are in."""
        route = next((r for r in self._routes if r.batch() is batch), None)
        if route is None:
            under_way = [r for r in self._routes[:-1] if r.batch() is not None][-_THREADS:]
            route = _Route(weakref.ref(batch), threading.get_ident(), [])
            self._routes = [*under_way, *self._routes[-1:], route]
        route.steps.append((record.actions.detach(), record.active))

    def _last_route(self) -> list[tuple[Tensor, Tensor | None]]:
        """The last batch's steps. One that another thread is still making is left out: it is shorter than others."""
        if not self._routes:
            return []
        last = self._routes[-1]
        if last.thread != threading.get_ident():
            last = max(reversed(self._routes), key=lambda r: len(r.steps))
        return list(last.steps)

    def observe(self, trajectory: Trajectory) -> None:
        """Count a trajectory whose decisions were made where nothing is told: in a compiled model that returns it.

        Raises:
            TypeError: no trajectory.
        """
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"trajectory: expected a Trajectory, got {given(trajectory)}")
        with self._lock, torch.inference_mode(False), torch.no_grad():
            made: dict[str, list[Any]] = {"decision": [*trajectory.records], "mixture": [*trajectory.mixtures]}
            for kind, records in made.items():
                for number, record in enumerate(records):
                    name = self._names.get(record.decision) or f"{kind}{number}"
                    self._take(record.decision, name, kind, (trajectory._batch, record))
                    if kind == "mixture":
                        self._tally(name, _Entries).add(record.actions, record.choices, record.active)

    @checked
    def gradient_conflict(
        self, losses: Mapping[str, Tensor], parameters: Iterable[Tensor] | None = None
    ) -> dict[str, float]:
        """Cosines between the gradients of tasks' losses: -1 for opposed ones, 0 for unrelated ones.

        This costs a backward pass per task and waits for the device: call it once in a while, before ``backward``. No
        ``.grad`` is touched; the graph stays. The next :meth:`numbers` have the result as well.

        Args:
            losses: by task, a tensor of one element each, with a graph.
            parameters: whose gradients are compared; None: those that several tasks share
                (``model.shared_parameters()``), or all of the model's that require a gradient.

        Returns:
            ``conflict/A|B``, the cosine of two tasks (0 where one has no gradient); ``conflict/mean``,
            ``conflict/lowest``, ``conflict/opposed``: their mean, the lowest, the share of pairs below 0;
            ``conflict/norm/A``, the norm of a gradient.

        Raises:
            ValueError, TypeError: fewer than two losses; one without a graph or of several elements; no parameters;
                names of which two pairs make the same one, as "a|b", "c", "a" and "b|c" do.
        """
        if len(losses) < 2:
            raise ValueError(f"losses: expected two tasks' or more, by name, got {len(losses)}")
        names = _conflict_names(list(losses))
        if len(set(names)) < len(names):
            raise ValueError(
                f"losses: expected tasks whose pairs A|B have different names, got {', '.join(map(str, losses))}"
            )
        for task, loss in losses.items():
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise ValueError(
                    f"losses: expected a tensor of one element with a graph for {task!r}, got {given(loss)}"
                )
        if parameters is None:
            shared = getattr(self.model, "shared_parameters", None)
            parameters = shared() if callable(shared) else self.model.parameters()
        parameters = list(parameters)
        for p in parameters:
            checks.tensor("parameters", p, "tensors")
        chosen = [p for p in parameters if p.requires_grad]
        if not chosen:
            raise ValueError("parameters: expected one that requires a gradient at least, got none")
        rows = []
        for loss in losses.values():
            grads = torch.autograd.grad(loss.reshape(()), chosen, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)])
        gram = sum(
            torch.stack([g[i].flatten().double() for g in rows])
            @ torch.stack([g[i].flatten().double() for g in rows]).mT
            for i in range(len(chosen))
        )
        made = _conflicts(list(losses), torch.as_tensor(gram, device="cpu"))
        with self._lock:
            self._conflict = made
        return dict(made)

    # ------------------------------------------------------------------------------------------------------- reading

    @checked
    def numbers(self, *, reset: bool = True) -> dict[str, float]:
        """What was counted since the last reading; waits for the device.

        Args:
            reset: begin to count anew.

        Returns:
            By the layer's name in the model. Of decisions, selections, gatings: ``entries``, ``dropped`` (those without
            a module), ``entropy`` in bits, ``agent_entropy`` (within an agent), ``used``, ``dead``, ``top_share``,
            ``collapsed`` (1 where nearly all go to one module, of k to k), ``count/K``. Of task routers: ``entries``,
            ``task_entropy``, ``tasks``. Of gates with shares: ``share/T/E``, ``entropy`` (of a sample), ``dead``. Of
            capsules: ``routing_entropy`` (of an input, over outputs), ``credit_entropy`` (of an output, over inputs).
            Of weightings and models: ``loss/T``, ``weight/T`` (the derivative of the total by the loss, as the last
            backward pass had it). Over all: ``routes/distinct``, ``routes/samples`` of the last batch,
            ``total/collapsed``, ``total/dead``, and ``conflict/...`` of :meth:`gradient_conflict`.
        """
        return self._read(reset, (), 0, {})

    def _read(self, reset: bool, sinks: Iterable[Sink], step: int, more: Mapping[str, float]) -> dict[str, float]:
        """The numbers beside ``more``, handed to the sinks; where one raises, they can be read again."""
        made, totals = dict(more), dict[str, float]()
        with self._lock, torch.inference_mode(False), torch.no_grad():  # nothing waits for the device in here
            self._warn_of_silence()
            tallies = {name: tally.copy() for name, tally in self._tallies.items()}
            routes, route, conflict, told = self._routes, self._last_route(), self._conflict, self._told
            if reset:
                self.reset()
        try:
            with torch.inference_mode(False), torch.no_grad():  # other threads train on
                for name, tally in tallies.items():
                    for key, value in tally.read(self.counts):
                        made[f"{name}/{key}"] = value
                        if key in ("collapsed", "dead"):
                            totals[key] = totals.get(key, 0.0) + value
                made.update(_routes(route) if route else ())
            made.update(conflict)
            made.update((f"total/{key}", value) for key, value in totals.items())
            for sink in sinks:
                sink.write(made, step)
        except BaseException:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                for name, tally in tallies.items() if reset else ():
                    if type(self._tallies.get(name)) is type(tally):
                        self._tallies[name].add_read(tally)
                self._routes, self._conflict = self._routes or routes, self._conflict or conflict
                self._told |= told
            raise
        return made

    def reset(self) -> None:
        """Begin to count anew."""
        with self._lock:
            for tally in self._tallies.values():
                tally.clear()
            self._routes, self._conflict, self._told = [], {}, set()

    @checked
    def write(self, *sinks: Sink, step: int, **more: float) -> dict[str, float]:
        """Read the numbers and hand them to loggers.

        Args:
            sinks: ``RunLog`` or ``TensorBoard`` of ``fastroute.loggers``, or what has ``write(numbers, step)``.
            step: of the training.
            more: numbers of your own beside them, the loss, say.

        Returns:
            The numbers.

        Raises:
            TypeError: naming the argument. Then, and where a sink raises, the numbers can still be read.
        """
        for sink in sinks:
            if not callable(getattr(sink, "write", None)) or isclass(sink):
                raise TypeError(f"sinks: expected what has write(numbers, step), got {given(sink)}")
        return self._read(True, sinks, step, checks.numbers_by_name("more", more))


_COMPILED = (
    "torch.compile compiled it, and compiled code tells nothing. Run a step in a while under "
    "torch.compiler.set_stance('force_eager'), or give monitor.observe the trajectory that the model returns."
)
_REPLICATED = (
    "nn.DataParallel runs copies of it on its devices, which are not watched. Use DistributedDataParallel, with a "
    "monitor in each process."
)
_THREADS = 64  #: the most unfinished trajectories that are kept
_HERE = __name__.partition(".")[0]


def _named(module: nn.Module, name: str) -> str:
    """A layer's name, with its class where that is empty, or taken by the sums over all."""
    return f"{name}.{type(module).__name__}".removeprefix(".") if name in ("", "total") else name


def _outside() -> int:
    """The ``stacklevel`` of the caller's caller that is not fastroute's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _HERE:
        frame, level = frame.f_back, level + 1
    return level


class _Route(NamedTuple):
    """The decisions of a batch so far, and the thread that makes them."""

    batch: weakref.ref[Any]
    thread: int
    steps: list[tuple[Tensor, Tensor | None]]


# -------------------------------------------------------------------------------------------------------------- tallies


def _entropy(counts: Tensor) -> Tensor:
    """In bits, over the last axis."""
    share = counts.double() / counts.double().sum(-1, keepdim=True).clamp(min=1e-300)
    made: Tensor = torch.special.entr(share).sum(-1) / math.log(2)
    return made


class _Tally:
    """Sums of one layer since the last reading, on its device."""

    summed: tuple[str, ...] = ()  #: names of the sums

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        raise NotImplementedError

    def copy(self) -> _Tally:
        """As it is now, whatever is added afterwards."""
        made = copy.copy(self)
        made.__dict__.update((key, t.clone()) for key, t in self.__dict__.items() if isinstance(t, Tensor))
        return made

    def add_read(self, read: Any) -> None:
        """Count what was read of it, and reached nobody, once more; not if shapes have changed since."""
        each: list[Any] = [(name, vars(self).get(name), vars(read).get(name)) for name in self.summed]
        if all(t is not None and getattr(t, "shape", ()) == getattr(own, "shape", ()) for _, own, t in each):
            for name, own, t in each:
                own += t.to(own.device) if isinstance(t, Tensor) else t  # in place
                setattr(self, name, own)

    def clear(self) -> None:
        raise NotImplementedError


class _Entries(_Tally):
    """Entries by agent and column, [A, K + 3]: no module, K modules, a module that is not there, not decided for."""

    summed = ("table",)
    table: Tensor | None = None
    k = 1

    def _table(self, A: int, K: int, device: torch.device) -> Tensor:
        if self.table is None or self.table.shape != (A, K + 3):
            self.table = torch.zeros(A, K + 3, dtype=torch.int64, device=device)
            self.one = self.table.new_ones(())
        elif self.table.device != device:
            self.table, self.one = self.table.to(device), self.one.to(device)
        return self.table

    def add(
        self, actions: Tensor, K: int, active: Tensor | None = None, agents: Tensor | None = None, A: int = 1
    ) -> None:
        table = self._table(A, K, actions.device)
        self.k = actions.shape[1] if actions.dim() == 2 else 1
        column = actions.long().clamp(-1, K) + 1
        if active is not None:
            column = torch.where(active[:, None] if column.dim() == 2 else active, column, K + 2)
        if agents is not None and A > 1:
            first = agents.long().clamp(0, A - 1) * (K + 3)
            column = column + (first[:, None] if column.dim() == 2 else first)
        column = column.reshape(-1)
        table.view(-1).index_add_(0, column, self.one.expand(column.shape[0]))

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        if self.table is None:
            return
        table = self.table.cpu()
        by_agent, dropped = table[:, 1:-2], int(table[:, 0].sum() + table[:, -2].sum())
        (A, K), total = by_agent.shape, by_agent.sum(0)
        entries, within = int(total.sum()), by_agent.sum(1)
        if entries + dropped == 0:
            return
        top = float(total.topk(min(self.k, K)).values.sum()) / max(entries, 1)
        used = int((total > 0).sum())
        yield "entries", float(entries)
        yield "dropped", float(dropped)
        yield "entropy", float(_entropy(total))
        if A > 1:
            yield "agent_entropy", float((_entropy(by_agent) * within).sum() / max(entries, 1))
        yield "used", float(used)
        yield "dead", float(K - used)
        yield "top_share", top
        yield "collapsed", float(self.k < K and entries > 0 and top >= COLLAPSE)
        if counts:
            yield from ((f"count/{k}", float(n)) for k, n in enumerate(total.tolist()))
            if A > 1 and A * K <= _BY_AGENT:
                rows = enumerate(by_agent.tolist())
                yield from ((f"by_agent/{a}/{k}", float(n)) for a, row in rows for k, n in enumerate(row))

    def clear(self) -> None:
        if self.table is not None:
            self.table.zero_()  # in place: a CUDA graph may add to it


class _Tasks(_Entries):
    """Samples by task."""

    def add_tasks(self, task: int | Tensor, size: int, count: int) -> None:
        if isinstance(task, Tensor) and task.dim():
            self.add(task.reshape(-1), count)
        elif isinstance(task, Tensor):
            self.add(task.reshape(1).expand(size), count)
        else:
            table = self.table
            self._table(1, count, torch.device("cpu") if table is None else table.device)[0, task + 1] += size

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        if self.table is None:
            return
        total = self.table[0, 1:-2].cpu()
        if int(total.sum()) == 0:
            return
        yield "entries", float(total.sum())
        yield "tasks", float((total > 0).sum())
        yield "task_entropy", float(_entropy(total))
        if counts and total.numel() <= _BY_AGENT:
            yield from ((f"count/{t}", float(n)) for t, n in enumerate(total.tolist()))


class _Shares(_Tally):
    """Sums of a softmax gate's shares, [T, E], and of their entropies."""

    summed = ("shares", "entropies", "samples")
    shares: Tensor | None = None

    def add(self, weights: Tensor) -> None:
        weights = weights.detach().double()
        summed, entropy = weights.sum(0), (torch.special.entr(weights).sum(-1) / math.log(2)).sum(0)
        if self.shares is None or self.shares.shape != summed.shape or self.shares.device != summed.device:
            self.shares, self.entropies, self.samples = torch.zeros_like(summed), torch.zeros_like(entropy), 0
        self.shares += summed
        self.entropies += entropy
        self.samples += weights.shape[0]

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        if self.shares is None or not self.samples:
            return
        mean = (self.shares / self.samples).cpu()
        T, E = mean.shape
        yield "entries", float(self.samples)
        yield "entropy", float(self.entropies.cpu().mean()) / self.samples
        yield "dead", float((mean.amax(0) < 0.01 / E).sum())
        if counts and T * E <= _BY_AGENT:
            for t, row in enumerate(mean.tolist()):
                yield from ((f"share/{t}/{e}", share) for e, share in enumerate(row))

    def clear(self) -> None:
        if self.shares is not None:
            self.shares.zero_()
            self.entropies.zero_()
            self.samples = 0


class _Credit(_Tally):
    """Sums of entropies of routing shares, and how many there were, on the device."""

    summed = ("sums",)
    sums: Tensor | None = None

    def add(self, shares: Tensor, phi: Tensor | None) -> None:
        made = [*_mean_entropy(shares, -1)]
        made += [*_mean_entropy(phi.abs(), -2)] if phi is not None else [made[0].new_zeros(())] * 2
        found = torch.stack(made)
        self.sums = found if self.sums is None or self.sums.device != found.device else self.sums.add_(found)

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        if self.sums is None:
            return
        routing, rows, credit, columns = self.sums.tolist()
        if rows:
            yield "routing_entropy", routing / rows
        if columns:
            yield "credit_entropy", credit / columns

    def clear(self) -> None:
        if self.sums is not None:
            self.sums.zero_()


def _mean_entropy(shares: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(sum of entropies in bits along an axis, how many): rows without a share, of masked inputs, are left out."""
    shares = shares.detach().double()
    whole = shares.sum(axis, keepdim=True)
    entropy = torch.special.entr(shares / whole.clamp(min=1e-300)).sum(axis) / math.log(2)
    there = whole.squeeze(axis) > 0
    return torch.where(there, entropy, 0).sum(), there.sum().double()


class _Losses(_Tally):
    """The last losses, and the weights that the last backward pass had."""

    tasks: tuple[str, ...] = ()
    losses: Any = ()
    weights: Any = None
    held: Any = None

    def keep(self, tasks: tuple[str, ...], losses: Any, held: Any = None) -> None:
        self.tasks, self.losses, self.held = tasks, losses, held

    def follow(self, tasks: tuple[str, ...], values: Tensor, total: Tensor) -> None:
        self.keep(tasks, values.detach())
        if not (values.requires_grad and total.requires_grad):
            return
        above: list[Tensor] = []
        mine = weakref.ref(self)

        def note(grad: Tensor) -> None:
            tally = mine()
            if tally is not None and above:
                tally.weights = grad.detach() / above[-1]  # of a loss that was scaled, too

        total.register_hook(lambda grad: above.append(grad.detach()))
        values.register_hook(note)

    def read(self, counts: bool) -> Iterator[tuple[str, float]]:
        for task, loss in zip(self.tasks, self.losses, strict=False):
            yield f"loss/{task}", float(loss)
        if self.weights is not None:
            yield from ((f"weight/{t}", float(w)) for t, w in zip(self.tasks, self.weights.tolist(), strict=False))
        elif self.held is not None:
            weights = ((task, self.held.get(task)) for task in self.tasks)
            yield from ((f"weight/{task}", 1.0 if w is None else float(w)) for task, w in weights)

    def add_read(self, read: Any) -> None:
        if not self.tasks:
            self.__dict__.update(read.__dict__)

    def clear(self) -> None:
        self.keep((), ())
        self.weights = None


def _routes(steps: list[tuple[Tensor, Tensor | None]]) -> Iterator[tuple[str, float]]:
    """Distinct sequences of actions (of a mixture: of sets of them) of one batch."""
    columns = []
    for actions, active in steps:
        found = (actions[:, None] if actions.dim() == 1 else actions.sort(1).values).cpu()
        columns.append(found if active is None else torch.where(active.cpu()[:, None], found, -1))
    routes = torch.cat(columns, 1)
    routes = routes[(routes >= 0).any(1)]
    yield "routes/distinct", float(len(routes.unique(dim=0))) if len(routes) else 0.0
    yield "routes/samples", float(len(routes))


def _conflict_names(tasks: list[str]) -> list[str]:
    pairs = (f"{b}|{a}" for n, a in enumerate(tasks) for b in tasks[:n])
    return [f"conflict/{name}" for name in (*pairs, "mean", "lowest", "opposed", *(f"norm/{task}" for task in tasks))]


def _conflicts(tasks: list[str], gram: Tensor) -> dict[str, float]:
    norms, cosines = gram.diagonal().clamp(min=0).sqrt(), []
    for a in range(len(tasks)):
        for b in range(a):
            scale = float(norms[a] * norms[b])
            cosines.append(float(gram[a, b]) / scale if scale else 0.0)
    n = len(cosines)
    numbers = *cosines, sum(cosines) / n, min(cosines), sum(c < 0 for c in cosines) / n, *map(float, norms)
    return dict(zip(_conflict_names(tasks), numbers, strict=True))
