"""Matrix capsules and slots, and what routing by the user's functions has in common with them, on a rank's inputs.

Their layers run as they are, on a rank's own inputs and parameters. Two things are put in between: what is summed over
inputs is summed over ranks, and what is per output has the sum of all ranks' gradients where inputs begin to use it.
Axes: B batch, n inputs in all, k of this rank, m outputs, c rows of a capsule's matrix, h its columns after routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import stateless

from ..compat import heinsen_routing
from ..compat.heinsen_routing_2019 import broadcast
from ..modules.reading import at_every_place
from ..ops import checks
from ..ops.autograd import asked_again, through, transformed
from ..ops.backends import is_strict, requested
from ..ops.host import may_look
from ..ops.matrix_routing.contract import Capsules, Moments, Outputs, PreviousGrads
from ..ops.matrix_routing.op import Call, backward_passes, forward_passes
from ..ops.matrix_routing.reference import log_probability, votes
from ..ops.precision import autocast_off, autocast_precision
from ..ops.soft_assignment.contract import Pairs
from ..ops.soft_assignment.op import mean_of
from .agreement import agree
from .row_sums import Rows, along, local, own_mask, shared, shared_by_rows, told, total

_MOMENTS = "the moments of the outputs"
_GRADIENT = "the outputs' gradient"


def _learned_prior(module: Any) -> ValueError | None:
    """Why a prior is not learned here: each rank would have the part of its gradient that comes from its own inputs."""
    prior = getattr(module, "CONST_ones_over_n_out", None)
    if not isinstance(prior, Tensor) or not prior.requires_grad:
        return None
    return ValueError(
        "CONST_ones_over_n_out: expected shares of outputs that are not learned where inputs are on several ranks, got "
        "some that require a gradient; learn them in one process, or call requires_grad_(False)"
    )


class RowSharded(nn.Module):
    """What the layers have in common. A subclass says which of its tensors have a row per input."""

    row_parameters: ClassVar[tuple[str, ...]] = ()  #: with fixed n_inp
    output_axes: ClassVar[tuple[int | None, ...]] = (-2,)  #: of outputs, in what the layer returns; None: as the style
    _rows: Rows
    _more_rows: tuple[str, ...] = ()
    _first = True
    _trains = False
    _here = 0

    # ------------------------------------------------------------------------------------------ what is said at set-up

    @classmethod
    def refuses(cls, module: Any) -> Exception | None:
        """Why a layer cannot be sharded."""
        if getattr(module, "return_dict", False):
            return ValueError("return_dict: expected False, got True: no rank has whole [n_inp, n_out] arrays")
        by_rows = {id(p) for p in cls.by_inputs(module).values()}
        both = [name for name, p in cls.by_outputs(module) if id(p) in by_rows]
        if both:
            return ValueError(
                f"module: expected parameters used by inputs and parameters used by outputs to be different ones, got "
                f"{', '.join(both)}, which both use: its gradient would be partly a sum over ranks"
            )
        return _learned_prior(module)

    @classmethod
    def by_inputs(cls, module: Any) -> dict[str, nn.Parameter]:
        """Parameters that every input uses: their gradients are sums over inputs."""
        return {}

    @classmethod
    def by_outputs(cls, module: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The others, but for those with a row per input."""
        known = set(cls.by_inputs(module))
        for name, p in module.named_parameters(remove_duplicate=False):
            if name not in known and name not in cls.row_parameters:
                yield name, p

    def has_rows(self, name: str) -> bool:
        """Whether a parameter or buffer has a row per input."""
        return self._n_rows() != -1 and (name in self.row_parameters or name in self._more_rows)

    # ------------------------------------------------------------------------------------------------- a rank's inputs

    def _n_rows(self) -> int:
        """n, or -1."""
        return getattr(self, "n_inp", -1)

    def _inputs_here(self) -> int:
        return -1 if self._n_rows() == -1 else self._here

    def _own(self, name: str, t: Any, axis: int) -> tuple[Tensor, int | None]:
        """(this rank's inputs, along an axis counted from the end; how many there are in all, None: not known)."""
        rows, n = self._rows, self._n_rows()
        checks.tensor(name, t, "a tensor")
        if t.dim() < -axis:
            raise ValueError(f"{name}: expected at least {-axis} dimensions, got {checks.shown(t)}")
        found: int | None = None if n == -1 else n
        place = Shard(t.dim() + axis)
        if not isinstance(t, DTensor) and isinstance(rows.input_layout, Replicate):
            t = DTensor.from_local(t, rows.mesh, [Replicate()], run_check=False)
        if isinstance(t, DTensor):
            if t.device_mesh != rows.mesh:
                raise ValueError(f"{name}: expected a DTensor on {rows.mesh}, the layer's mesh, got {t.device_mesh}")
            found = t.shape[axis]
            if n not in (-1, found):
                raise ValueError(f"n_inp: expected {n} inputs, got {found} ({name} is {checks.shown(t)})")
            t = t.redistribute(placements=[place]).to_local()
        elif isinstance(rows.input_layout, Shard) and rows.input_layout.dim not in (-2, place.dim):
            raise ValueError(
                f"input_layouts: expected Shard(-2), the axis of inputs, got {rows.input_layout} ({name} is "
                f"{checks.shown(t)})"
            )
        elif rows.ranks == 1:
            found = t.shape[axis]
        if found is not None and t.shape[axis] != (own := rows.of(found))[1]:
            raise ValueError(
                f"{name}: expected the {own[1]} of {found} inputs from number {own[0]} on, which rank "
                f"{rows.mesh.get_local_rank()} of {rows.ranks} has, got {t.shape[axis]} (it is {checks.shown(t)})"
            )
        return t, found

    def _can_be_sharded(self) -> None:
        if transformed():
            raise NotImplementedError(
                "RowShardedCapsules: expected no torch.func transform and no forward mode, which know no collectives"
            )
        if self._rows.ranks > 1 and torch.is_grad_enabled() and (error := _learned_prior(self)) is not None:
            raise error

    def _compared(
        self, given: Mapping[str, tuple[Any, int]], mask: Any, lengths: Any, facts: Mapping[str, object], m: int,
        check: Callable[..., Any] | None = None,
    ) -> tuple[dict[str, Tensor], int | None, Tensor | None, Tensor | None]:  # fmt: skip
        """(this rank's inputs, how many there are in all, its part of the mask, lengths [B]), which go together.

        Arguments are those of :meth:`_of_all`. In a first call, and under ``strict``, ranks compare what they have.
        """
        rows = self._rows
        checking = not (torch.compiler.is_compiling() or transformed()) and (self._first or is_strict())
        try:
            self._can_be_sharded()
            found = {name: self._own(name, t, axis) for name, (t, axis) in given.items()}
            counts = {name: t.shape[given[name][1]] for name, (t, _) in found.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"n_inp: expected as many inputs in each, got {counts}")
            (name, (first, n)), *_ = found.items()
            k, batch, device = counts[name], first.shape[: first.dim() + given[name][1]], first.device
            if mask is not None:
                checks.tensor("mask", mask, "a bool tensor")
                mask = own_mask(mask)
                checks.together((name, first), {"mask": mask})
                if n is not None and mask.dim() > 1 and mask.shape[-2] == n != k:
                    mask = mask.narrow(-2, *rows.of(n))
                checks.as_mask(mask, batch, k, m)
            if lengths is not None:
                lengths = checks.as_lengths(lengths, batch, checks.LARGEST if n is None else n, device)
            inputs = {name: t for name, (t, _) in found.items()}
            if check is not None and checking and k:
                self._here = k
                with self._with(self._locals(0)):
                    check(*inputs.values())
        except Exception as error:
            if checking:
                agree({"forward": error}, rows.mesh, layer=type(self).__name__)
            raise
        trains = any(t.requires_grad for t in (*inputs.values(), *self.parameters(), *_tensors(facts)))
        if checking:
            agree(
                {f"leading dimensions of {name}": batch, **{f"dtype of {key}": t.dtype for key, t in inputs.items()},
                 "vectors in all": n, "lengths": lengths, "autocast": autocast_precision(device.type), "gradient mode":
                 torch.is_grad_enabled(), "gradients": trains, "training": self.training,
                 **told(self, rows, {name: t for name, (t, _) in given.items()}), **facts},
                rows.mesh, layer=type(self).__name__,
            )  # fmt: skip
            self._first = False
        self._trains = trains and torch.is_grad_enabled()
        return inputs, n, mask, lengths

    def _of_all(
        self, given: Mapping[str, tuple[Any, int]], mask: Any, lengths: Any, facts: Mapping[str, object],
        m: int, run: Callable[..., Any], check: Callable[..., Any],
    ) -> Any:  # fmt: skip
        """Run the layer on this rank's inputs.

        Args:
            given: the layer's inputs by name, with the axis of inputs, counted from the end.
            facts: what else has to be the same on all ranks.
            m: how many outputs a mask is of.
            run: (inputs, mask, lengths) -> what the layer returns.
            check: (inputs): raises if the layer would; called where ranks compare what they have, before they begin.
        """
        inputs, n, mask, lengths = self._compared(given, mask, lengths, facts, m, check)
        first, axis = next(iter(inputs.values())), next(iter(given.values()))[1]
        k, batch, device = first.shape[axis], first.shape[: first.dim() + axis], first.device
        if lengths is not None:
            in_all, before = self._rows.places(n, k, device)
            if isinstance(in_all, Tensor) and may_look(in_all):
                in_all, before = int(in_all), int(before)
                checks.as_lengths(lengths, lengths.shape, in_all, device)
            lengths = (lengths - before).clamp(0, k).reshape(batch)
        pad = int(k == 0)
        if pad:  # an input that is past every sample's length: nothing is read of it
            mask, lengths = None, torch.zeros(batch, dtype=torch.int64, device=device)
            inputs = {name: _with_a_row(t, given[name][1]) for name, t in inputs.items()}
        self._here = k + pad
        with self._with(self._locals(pad)):
            return run(*inputs.values(), mask, lengths)

    def _locals(self, pad: int) -> dict[str, Tensor]:
        """Parameters and buffers as this rank computes with them."""
        found: dict[str, Tensor] = {}
        common: dict[torch.dtype, list[str]] = {}
        by_inputs = self.by_inputs(self)
        for name, t in (*self.named_parameters(), *self.named_buffers()):
            own = local(t)
            if self.has_rows(name):
                own = torch.cat([own, own.new_zeros((pad, *own.shape[1:]))]) if pad else own
            elif name in by_inputs and t.requires_grad and torch.is_grad_enabled() and self._rows.ranks > 1:
                common.setdefault(own.dtype, []).append(name)
            found[name] = own
        for names in common.values():
            found |= zip(names, shared_by_rows([found[name] for name in names], self._rows.group), strict=True)
        return found

    @contextmanager
    def _with(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        with stateless._reparametrize_module(self, at_every_place(self, tensors)):
            yield

    def _returned(self, *made: Tensor) -> Any:
        """Outputs, as the style says."""
        rows, found = self._rows, list(made)
        if not (rows.use_local_output and isinstance(rows.output_layout, Replicate)):
            for i, (y, axis) in enumerate(zip(made, self.output_axes, strict=False)):
                whole = DTensor.from_local(y, rows.mesh, [Replicate()], run_check=False)
                given = whole.redistribute(placements=[along(rows.output_layout, y.dim(), axis)])
                found[i] = given.to_local() if rows.use_local_output else given
        return found[0] if len(found) == 1 else tuple(found)

    # ------------------------------------------------------------------------------------------------ the layers' seams

    def _for_inputs(self, t: Tensor) -> Tensor:
        return shared(t, self._rows.group, _GRADIENT) if self._rows.ranks > 1 else t

    def _agreed(self, draw: Tensor) -> Tensor:
        if self._rows.ranks == 1:
            return draw
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.broadcast(draw.contiguous(), 0, self._rows.group.group_name))

    def _assigned(
        self, scores: Tensor | None, votes: Tensor, gate: Tensor | None = None, use: Tensor | None = None,
        ign: Tensor | None = None, *, prior: Tensor | None = None, mask: Tensor | None = None,
        lengths: Tensor | None = None, mean: bool = False, eps: float = 0,
    ) -> Tensor:  # fmt: skip
        """``soft_assignment`` of all ranks' inputs."""
        use, ign = (beta[None] if beta is not None and beta.dim() == 2 else beta for beta in (use, ign))
        pairs = Pairs(scores, gate, use, ign, None if scores is not None else prior, mask, lengths, float(eps))
        M, p = torch.ops.fastroute.soft_assignment(votes, *pairs, requested())
        if self._rows.ranks > 1:
            M, *rest = total(M, *((p,) if mean else ()), group=self._rows.group, what=_MOMENTS, trains=self._trains)
            p = rest[0] if mean else p
        return mean_of(M, p, mean)

    def _iterations(self, a: Tensor, mu: Tensor, w: Capsules, mask: Tensor | None) -> Outputs:
        """``matrix_routing`` of all ranks' inputs."""
        dtype = torch.promote_types(mu.dtype, w.W.dtype)
        if dtype == torch.float64:
            mu, w = mu.to(dtype), Capsules(*(t.to(dtype) for t in w))
        out = dtype if autocast_precision(mu.device.type) == "" else torch.promote_types(dtype, torch.float32)
        rest = (mask, self.n_iters, self.p_model, self.eps, requested())
        if self._rows.ranks == 1:
            made = torch.ops.fastroute.matrix_routing(a, mu, *w, *rest)[:3]
        else:
            if w.W.shape[0] == 1 and self._n_rows() == -1 and torch.is_grad_enabled():
                names = [name for name, t in w._asdict().items() if t.requires_grad]
                if names:
                    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (getattr(w, n) for n in names)]
                    each = shared_by_rows(wide, self._rows.group)  # of wide ones: partial sums are not rounded
                    w = w._replace(**dict(zip(names, each, strict=True)))
            if self._trains and not any(t.requires_grad for t in (a, mu, *w)):
                a = a.detach().requires_grad_()
            given = (a, mu, *w, *rest)
            group = self._rows.group
            compiling = torch.compiler.is_compiling()
            made = _differentiable(Call.of(given), group) if compiling else _Route.apply(group, *given)
        return Outputs(made[0].to(out), made[1].to(out), made[2])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew: each rank its own rows; those that all ranks have are the first one's.

        The values are not those that one process draws from the same seed.
        """
        tensors = {name: local(t) for name, t in (*self.named_parameters(), *self.named_buffers())}
        self._here = 1
        with self._with(tensors):
            super().reset_parameters()  # type: ignore[misc]
        for name, t in tensors.items():
            if not self.has_rows(name):
                dist.broadcast(t, group=self._rows.group, group_src=0)


def _tensors(facts: Mapping[str, object]) -> Iterable[Tensor]:
    return (t for t in facts.values() if isinstance(t, Tensor))


def _with_a_row(t: Tensor, axis: int) -> Tensor:
    shape = list(t.shape)
    shape[axis] = 1
    return torch.cat([t, t.new_zeros(shape)], axis)


# ------------------------------------------------------------------------------------------------------ matrix capsules


class _Sums:
    """``total`` of the passes of ``matrix_routing``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, made: Any) -> Any:
        if isinstance(made, PreviousGrads):
            parts = (made.A0, made.A1, made.A2)
            return PreviousGrads(*total(*parts, group=self.group, what=_GRADIENT))
        return self._moments(made)

    def _moments(self, made: Moments) -> Moments:
        """Chan, Golub and LeVeque (1979): parts with means and centred sums of their own, put together. In float64, as
        tiles are: what is left of the mean's rounding is wanted."""
        acc = made.mean.dtype
        mean, weight = made.mean.double(), made.N0.double()
        if made.low is not None:
            mean = mean + made.low
        N0, S1, a = total(weight, weight[..., None, None] * mean, made.a.double(), group=self.group, what=_MOMENTS)
        whole = S1 / torch.where(N0 > 0, N0, 1.0)[..., None, None]
        off = (mean - whole).square() * weight[..., None, None]
        (M2,) = total(made.M2.double() + off, group=self.group, what=_MOMENTS)
        rounded = whole.to(acc)
        return Moments(N0.to(acc), rounded, M2.to(acc), a.to(acc), (whole - rounded).to(acc))


class _Route(torch.autograd.Function):
    """All iterations on the fused passes of one process, whose sums go over all ranks."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, saved = forward_passes(Call.of(given), _Sums(group))
        ctx.group, ctx.options = group, given[7:]
        ctx.save_for_backward(*given[:7], *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[Any, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:8]
        inputs, saved = tensors[:7], tensors[7:]
        if asked_again(*d):

            def plain(*again: Any) -> tuple[Tensor, ...]:
                return _differentiable(Call.of((*again, *ctx.options)), ctx.group)

            return None, *through(plain, inputs, needs, d), *(None,) * 4
        call = Call.of((*inputs, *ctx.options))
        outputs = Outputs(*(t.contiguous() for t in d))
        made = backward_passes(call, Moments(*saved), outputs, needs[1], any(needs[2:6]), _Sums(ctx.group))
        grads = (g.to(t.dtype) if need else None for g, t, need in zip(made, inputs, needs, strict=False))
        return None, *grads, None, *(None,) * 4


def _differentiable(call: Call, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The same of operations that autograd and torch.compile know; it keeps this rank's votes [B, k, m, c, h]."""
    acc, mask = call.acc, call.mask
    with autocast_off(call.mu_inp.device.type):
        w = Capsules(*(t.to(acc) for t in call.w))
        f = call.a_inp.to(acc).sigmoid()[..., None]
        closed = torch.zeros((), dtype=torch.bool, device=f.device) if mask is None else mask
        closed = closed.expand(*f.shape[:2], w.W.shape[1])
        nowhere = closed.all(-1, keepdim=True)
        V = votes(call.mu_inp.to(acc).masked_fill(((f == 0) | nowhere)[..., None], 0.0), w)
        scores = torch.zeros_like(V[..., 0, 0])
        for t in range(call.n_iters):
            R = scores.masked_fill(closed & ~nowhere, -torch.inf).softmax(-1).masked_fill(closed, 0.0)
            D = f * R
            ignored = (f - D).masked_fill(closed, 0.0)
            N0, a, S1 = total(
                D.sum(1), (w.beta_use * D - w.beta_ign * ignored).sum(1), torch.einsum("bij,bijch->bjch", D, V),
                group=group, what=_MOMENTS,
            )  # fmt: skip
            N0 = N0[..., None, None] + call.eps
            mu = S1 / N0
            off = V - shared(mu, group, _GRADIENT)[:, None]
            (S2,) = total(torch.einsum("bij,bijch->bjch", D, off.square()), group=group, what=_MOMENTS)
            sig2 = S2 / N0 + call.eps
            if t + 1 < call.n_iters:
                flat = shared(torch.cat([a.flatten(), mu.flatten(), sig2.flatten()]), group, _GRADIENT)
                parts = flat.split([a.numel(), mu.numel(), sig2.numel()])
                before = Outputs(*(s.view(like.shape) for s, like in zip(parts, (a, mu, sig2), strict=True)))
                log_p = log_probability(V, before.mu, before.sig2, call.p_model)
                scores = nn.functional.logsigmoid(before.a)[:, None] + log_p
    return a, mu, sig2


class _Matrix(RowSharded):
    """Parameters of a ``GenerativeMatrixRouting``, or of ``Routing`` as of 2019, by rows."""

    W: Tensor
    n_out: int
    _check_inputs: Callable[..., None]
    _check: Callable[..., int]
    row_parameters = ("W", "B", "beta_use", "beta_ign")
    output_axes = (-1, -3, -3)

    @classmethod
    def by_inputs(cls, module: Any) -> dict[str, nn.Parameter]:
        """With n_inp = -1 it is all of them, which the routing itself sums up."""
        return under(module, ("B_brk",)) if module.n_inp_is_fixed else {}


class RowShardedMatrixRouting(_Matrix):
    """A ``GenerativeMatrixRouting`` whose input capsules, with their parameters, are divided over a mesh's ranks."""

    def forward(self, a_inp: Any, mu_inp: Any, *, mask: Any = None, lengths: Any = None) -> Any:
        """Route the capsules of all ranks: a_inp [..., k], mu_inp [..., k, d_cov, d_inp] of this one."""
        own: Any = super().forward
        if isinstance(self, heinsen_routing.GenerativeMatrixRouting):
            a_inp, mu_inp = broadcast(a_inp, mu_inp)

        def run(mu: Tensor, a: Tensor, mask: Any, lengths: Any) -> Any:
            return own(a, mu, mask=mask, lengths=lengths)

        given = {"mu_inp": (mu_inp, -3), "a_inp": (a_inp, -1)}
        check = self._check_inputs
        return self._returned(*self._of_all(given, mask, lengths, {}, self.n_out, run, lambda mu, a: check(a, mu)))


class RowShardedRouting2019(_Matrix):
    """``Routing`` of 2019, of whose input capsules every rank has some."""

    def _n_rows(self) -> int:
        return self.W.shape[0] if self.n_inp_is_fixed else -1

    def forward(self, a_inp: Any, mu_inp: Any, return_R: bool = False, *, n_out: int | None = None) -> Any:
        """Route the capsules of all ranks; R [..., k, n_out] of this rank's is not returned."""
        if return_R:
            raise ValueError("return_R: expected False, got True: it stores the votes of all input capsules")
        if n_out is None and not self.n_out_is_fixed:
            raise ValueError("n_out: expected a number, got None: no rank knows how many input capsules there are")
        own: Any = super().forward
        a_inp, mu_inp = broadcast(a_inp, mu_inp)

        def run(mu: Tensor, a: Tensor, mask: Any, lengths: Any) -> Any:
            if lengths is not None:  # a rank without capsules
                a = a.masked_fill(torch.ones_like(a, dtype=torch.bool), -torch.inf)
            return own(a, mu, n_out=n_out)

        def check(mu: Tensor, a: Tensor) -> None:
            self._check(a, mu, n_out)

        given = {"mu_inp": (mu_inp, -3), "a_inp": (a_inp, -1)}
        return self._returned(*self._of_all(given, None, None, {"n_out": n_out}, n_out or 1, run, check))


# ---------------------------------------------------------------------------------------------------------------- slots


class RowShardedSlots(RowSharded):
    """A ``SlotAttention`` of whose inputs every rank of a mesh has some."""

    n_slots: int
    _begin: Callable[..., Tensor]

    @classmethod
    def by_inputs(cls, module: Any) -> dict[str, nn.Parameter]:
        """Those of keys and values."""
        return under(module, ("norm_inputs", "k", "v"))

    def forward(
        self, x_inp: Any, slots: Any = None, *, mask: Any = None, lengths: Any = None,
        generator: torch.Generator | None = None, return_attn: bool = False,
    ) -> Any:  # fmt: skip
        """Gather the inputs of all ranks in slots; x_inp [..., k, d_inp] and attn [..., k, n_slots] are this rank's.

        Slots that are not given are those that the first rank draws.
        """
        own: Any = super().forward
        slots = local(slots)
        here = x_inp.shape[-2] if isinstance(x_inp, Tensor) and x_inp.dim() > 1 else 1

        def run(x: Tensor, mask: Any, lengths: Any) -> Any:
            made = own(x, slots, mask=mask, lengths=lengths, generator=generator, return_attn=return_attn)
            if return_attn and here == 0:
                return made[0], made[1][..., :0, :]
            return made

        facts = {"slots": slots, "return_attn": return_attn}
        m = self.n_slots if slots is None else slots.shape[-2]

        def check(x: Tensor) -> None:
            checks.floating("x_inp", x)
            if x.shape[-1] != self.d_inp:
                raise ValueError(
                    f"d_inp: expected input vectors of width {self.d_inp}, got {x.shape[-1]} (x_inp is "
                    f"{checks.shown(x)})"
                )
            if slots is not None:
                self._begin(slots, x.shape[:-2], generator)

        made = self._of_all({"x_inp": (x_inp, -2)}, mask, lengths, facts, m, run, check)
        return self._returned(*(made if return_attn else (made,)))


def under(module: nn.Module, children: Sequence[str]) -> dict[str, nn.Parameter]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if name.partition(".")[0] in children}
