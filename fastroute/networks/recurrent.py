"""Recurrent cells whose projections are chosen step by step: routing over depth and over time.

Axes: B samples, H the hidden size, G gates (4 of an LSTM, 3 of a GRU), K modules.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.reading import reset
from ..ops.arguments import Count, Options, Several, Share, checked
from ..ops.checks import as_parameters, as_tensor, floating, shown, tensor, together
from ..ops.masked import only
from .decisions.base import as_mask
from .rewards import Formula, check_formula
from .sample_view import SampleMetaInformation
from .selection import Selection
from .trajectory import Trajectory

_Samples = Trajectory | Sequence[SampleMetaInformation]


class RoutingRNNCellBase(Options, nn.Module):
    """What the cells share: two projections to the gates, of the input (i2h) and of the hidden state (h2h).

    A projection that is not routed is one ``Linear``. A routed one is ``depth_routing`` layers, each a decision and a
    selection among K ``Linear``, with ``nonlin`` between layers. The first layer's width is that of its input, the
    others' is G H.

    With ``recurrent`` a routed projection is one ``Linear`` to G H and then, up to ``depth_routing`` times, one
    decision and one selection that all steps share. The decision has K + 1 choices: 0 stops, and the row stays as it
    is; k replaces the row y by module k - 1 of nonlin(y).

    Args:
        in_features: of the input.
        hidden_size: H.
        num_selections: K.
        depth_routing: layers of a routed projection, or with ``recurrent`` the most steps that it takes.
        routing_agent: a decision class. All decisions are made with the arguments from ``num_agents`` on.
        route_i2h, route_h2h: which projections are routed.
        recurrent: see above.
        nonlin: between layers, a function of a tensor.
        num_agents, exploration, policy_storage_type, detach, approx_hidden_dims, additional_reward_func: as in
            :class:`Decision`. The decisions share a reward object; with ``recurrent`` it has to know K + 1 actions.
        kwargs: other arguments of the decision class.

    Parameters: ``linear_{i2h,h2h}``, ``router_{i2h,h2h}.{layer}`` and ``selection_{i2h,h2h}.{layer}``, as upstream. All
    of them, the decisions' too, start uniform in +-1 / sqrt(H).

    Examples:
        >>> cell = fastroute.RoutingGRUCell(8, 16, num_selections=3, depth_routing=2, routing_agent=fastroute.REINFORCE)
        >>> isinstance(cell, fastroute.RoutingRNNCellBase), cell.hidden_size
        (True, 16)
    """

    _gates: int
    #: whether upstream's formula has a meaning of its own for action 0
    _has_upstream = False
    _options = ("nonlin",)
    _fixed = ("num_selections", "depth_routing", "route_i2h", "route_h2h", "recurrent", "formula")

    @checked
    def __init__(
        self,
        in_features: Count,
        hidden_size: Count,
        num_selections: Several,
        depth_routing: Several,
        routing_agent: type[nn.Module],
        route_i2h: bool = False,
        route_h2h: bool = True,
        recurrent: bool = False,
        nonlin: Callable[[Tensor], Tensor] = F.relu,
        num_agents: Several = 1,
        exploration: Share = 0.1,
        policy_storage_type: str | int = "approx",
        detach: bool = True,
        approx_hidden_dims: int | Sequence[int] | None = (),
        additional_reward_func: Any = None,
        *,
        formula: Formula = "intended",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not (inspect.isclass(routing_agent) and issubclass(routing_agent, nn.Module)):
            raise TypeError(f"routing_agent: expected a decision class such as REINFORCE, got {routing_agent!r}")
        self.in_features, self.hidden_size = in_features, hidden_size
        self.num_selections, self.depth_routing = num_selections, depth_routing
        self.route_i2h, self.route_h2h, self.recurrent = bool(route_i2h), bool(route_h2h), bool(recurrent)
        self.nonlin = nonlin
        self.formula = check_formula(formula)
        self._zero_stops = self._has_upstream and formula == "upstream" and not recurrent
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = dict(
            num_agents=num_agents, exploration=exploration, policy_storage_type=policy_storage_type, detach=detach,
            approx_hidden_dims=approx_hidden_dims, additional_reward_func=additional_reward_func, formula=formula,
            **factory, **kwargs,
        )  # fmt: skip
        choices = self.num_selections + self.recurrent

        def decide(features: int, **more: Any) -> nn.Module:
            try:
                return routing_agent(choices, features, **{**options, **more})
            except TypeError as error:
                raise TypeError(f"routing_agent: {error}") from error

        if not (route_i2h or route_h2h):
            decide(in_features, device="meta")  # wrong arguments are wrong even if nobody reads them
        for name, features, routed in self._projections():
            widths = [features, *[self._gates * hidden_size] * self.depth_routing]
            if recurrent or not routed:
                setattr(self, f"linear_{name}", nn.Linear(widths[0], widths[-1], **factory))
            if not routed:
                continue
            layers = widths[-1:] if recurrent else widths[:-1]
            routers = [decide(width) for width in layers]
            selections = [
                Selection(*(nn.Linear(width, widths[-1], **factory) for _ in range(self.num_selections)))
                for width in layers
            ]
            setattr(self, f"router_{name}", nn.ModuleList(routers))
            setattr(self, f"selection_{name}", nn.ModuleList(selections))
        self._draw()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, uniform in +-1 / sqrt(H). Buffers of networks of the user's are set by those."""
        reset(*(m for m in self.modules() if m is not self and (m._parameters or m._buffers)))
        self._draw()

    def _draw(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        routed = [name for name, _, routed in self._projections() if routed]
        return (
            f"{self.in_features}, {self.hidden_size}, num_selections={self.num_selections}, "
            f"depth_routing={self.depth_routing}, routed={'+'.join(routed) or 'nothing'}, recurrent={self.recurrent}, "
            f"formula={self.formula!r}"
        )

    def _projections(self) -> tuple[tuple[str, int, bool], ...]:
        return ("i2h", self.in_features, self.route_i2h), ("h2h", self.hidden_size, self.route_h2h)

    def forward(
        self,
        x: Tensor,
        hidden: Any = None,
        meta: _Samples | None = None,
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
    ) -> tuple[Any, Trajectory]:
        """One time step: x [B, in_features] and the state -> (the new state, meta). To be defined in a subclass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    # ------------------------------------------------------------------------------------------------- for subclasses

    def _begin(
        self, x: Tensor, meta: _Samples | None, mask: Any, forced: Any
    ) -> tuple[Trajectory, Tensor | None, Iterator[Tensor | None]]:
        """The trajectory, who is active, and the forced actions of one decision after the other."""
        tensor("x", x, f"a tensor [B, {self.in_features}]")
        floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected one time step, shape [B, {self.in_features}], got {shown(x)}")
        B = x.shape[0]
        made = Trajectory(B) if meta is None else Trajectory.of(meta, B)
        decisions = self.depth_routing * (self.route_i2h + self.route_h2h)
        if forced is None:
            return made, as_mask(mask, B, x.device), iter([None] * decisions)
        forced = as_tensor("forced_actions", forced, x.device)
        together(("x", x), {"forced_actions": forced})
        if tuple(forced.shape) != (decisions, B):
            raise ValueError(
                f"forced_actions: expected those of each decision, i2h's before h2h's, shape [{decisions}, {B}], "
                f"got {shown(forced)}"
            )
        return made, as_mask(mask, B, x.device), iter(forced.unbind())

    def _state(self, name: str, state: Any, x: Tensor) -> Tensor:
        """A part of the state [B, H]; zeros for None."""
        shape = (x.shape[0], self.hidden_size)
        if state is None:
            return x.new_zeros(shape)
        tensor(name, state, f"a tensor [B, {self.hidden_size}]")
        if tuple(state.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {shown(state)}")
        together(("x", x), {name: state})
        return state

    def _project(
        self, name: str, y: Tensor, meta: Trajectory, agents: Any, active: Tensor | None,
        forced: Iterator[Tensor | None],
    ) -> Tensor:  # fmt: skip
        """[B, in] -> [B, G H]."""
        linear = getattr(self, f"linear_{name}", None)
        if linear is not None:
            y = as_parameters("x" if name == "i2h" else "h", y, linear, linear, y)
        routers, selections = getattr(self, f"router_{name}", None), getattr(self, f"selection_{name}", None)
        if routers is None or selections is None:
            return y
        for layer in range(self.depth_routing):
            shared = 0 if self.recurrent else layer
            if layer and not self.recurrent:
                y = self.nonlin(y)
            y, _, actions = routers[shared](y, meta, agents, active, forced_actions=next(forced))
            if self.recurrent or self._zero_stops:
                active = actions != 0  # what was inactive before has action 0 as well
            if self.recurrent:
                made, *_ = selections[shared](self.nonlin(y), meta, actions - 1, active)
                y = torch.where(active[:, None], made, y)  # type: ignore[index]
            else:
                y, *_ = selections[shared](y, meta, actions, active)
        return y

    def _seen(self, t: Tensor, active: Tensor | None) -> Tensor:
        """What the cell computes with: zeros for samples that ``mask`` leaves out (but for upstream, which goes on)."""
        return t if self._zero_stops else only(t, active)

    def _keep(self, active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
        """The new state, the old one where ``mask`` is False (but for upstream, which goes on from zeros)."""
        return new if active is None or self._zero_stops else torch.where(active[:, None], new, old)


class RoutingLSTMCell(RoutingRNNCellBase):
    """An LSTM cell with routed projections.

    [i f o g] = i2h(x) + h2h(h), i f o through the sigmoid, g through tanh: c' = f c + i g, h' = o tanh(c').

    Upstream: without ``recurrent`` action 0 stops too, and the row of the projection is then zero, so that no module 0
    is ever used; and samples that ``mask`` leaves out go on from such rows. (Its ``recurrent`` does not run.)

    See :class:`RoutingRNNCellBase` for the arguments.

    Examples:
        >>> cell = fastroute.RoutingLSTMCell(8, 16, num_selections=3, depth_routing=1, routing_agent=fastroute.WPL)
        >>> state = meta = None
        >>> for x in torch.randn(5, 4, 8):  # 5 time steps of 4 samples
        ...     state, meta = cell(x, state, meta)
        >>> h, c = state
        >>> h.shape, meta.actions.shape
        (torch.Size([4, 16]), torch.Size([5, 4]))
    """

    _gates = 4
    _has_upstream = True

    def forward(
        self,
        x: Tensor,
        hidden: tuple[Tensor | None, Tensor | None] | None = None,
        meta: _Samples | None = None,
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], Trajectory]:
        """One time step.

        Args:
            x: [B, in_features].
            hidden: (h, c), both [B, H]; None for zeros.
            meta: the trajectory, in which all time steps' decisions are recorded; None for a new one.
            agents: [B]: the agent of each sample, for instance its task, where there are several.
            mask: [B] bool: samples that are False keep their state, and nothing is recorded of them.
            forced_actions: [decisions, B]: actions to take instead of choosing, first those of i2h, then those of h2h.

        Returns:
            ((h', c'), meta), h' and c' [B, H].

        Raises:
            ValueError, TypeError: naming the argument.
        """
        meta, active, forced = self._begin(x, meta, mask, forced_actions)
        if hidden is None:
            hidden = None, None
        if not isinstance(hidden, (tuple, list)) or len(hidden) != 2:
            raise TypeError(f"hidden: expected the pair (h, c), got {_shown(hidden)}")
        h, c = self._state("h", hidden[0], x), self._state("c", hidden[1], x)
        made = self._project("i2h", self._seen(x, active), meta, agents, active, forced)
        made = made + self._project("h2h", self._seen(h, active), meta, agents, active, forced)
        i, f, o = made[:, : 3 * self.hidden_size].sigmoid().chunk(3, 1)
        g = made[:, 3 * self.hidden_size :].tanh()
        new_c = f * self._seen(c, active) + i * g
        new_h = o * new_c.tanh()
        return (self._keep(active, new_h, h), self._keep(active, new_c, c)), meta


class RoutingGRUCell(RoutingRNNCellBase):
    """A GRU cell with routed projections, with the equations and the order of gates of ``torch.nn.GRUCell``.

    [r z n] in i = i2h(x) and s = h2h(h): r = sigmoid(i_r + s_r), z = sigmoid(i_z + s_z), n = tanh(i_n + r s_n),
    h' = (1 - z) n + z h.

    See :class:`RoutingRNNCellBase` for the arguments. Upstream has none: ``formula`` is that of the decisions.

    Examples:
        >>> cell = fastroute.RoutingGRUCell(8, 16, num_selections=3, depth_routing=2, routing_agent=fastroute.REINFORCE)
        >>> h = meta = None
        >>> for x in torch.randn(5, 4, 8):  # 5 time steps of 4 samples
        ...     h, meta = cell(x, h, meta)
        >>> h.shape, meta.actions.shape  # two decisions a step
        (torch.Size([4, 16]), torch.Size([10, 4]))
    """

    _gates = 3

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        meta: _Samples | None = None,
        agents: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        *,
        forced_actions: Tensor | None = None,
    ) -> tuple[Tensor, Trajectory]:
        """One time step: see :meth:`RoutingLSTMCell.forward`, with h [B, H] for the state.

        Returns:
            (h' [B, H], meta).
        """
        meta, active, forced = self._begin(x, meta, mask, forced_actions)
        h = self._state("hidden", hidden, x)
        seen = self._seen(h, active)
        of_x = self._project("i2h", self._seen(x, active), meta, agents, active, forced)
        of_h = self._project("h2h", seen, meta, agents, active, forced)
        (i_r, i_z, i_n), (s_r, s_z, s_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
        z = (i_z + s_z).sigmoid()
        n = (i_n + (i_r + s_r).sigmoid() * s_n).tanh()
        return self._keep(active, (1 - z) * n + z * seen, h), meta


def _shown(value: object) -> str:
    return f"a tensor {shown(value)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
