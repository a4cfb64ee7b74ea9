"""Gradients through the draw itself: Gumbel-softmax (Jang et al. 2017) and RELAX (Grathwohl et al. 2018).

Notation as in ``policy_gradient``; z are the logits, p = softmax(z).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.autograd import transformed
from ...ops.dispatch.contract import Plan
from ..decision_record import STATE_COLUMNS, Column
from ..loss_entries import Entries
from .base import Decided, Decision
from .policy_gradient import _WithValueNet
from .storage import AnyStorages

__all__ = ["RELAX", "GumbelSoftmax"]

_TINY = 1e-20
_EPS = 1e-8
_OF_A_GRADIENT = "its loss is made of a gradient"


def _none_in_inference_mode() -> Tensor:
    raise RuntimeError(f"RELAX: expected torch.no_grad instead of torch.inference_mode; {_OF_A_GRADIENT}")


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, K] in the dtype of ``like`` [B, K]. (PyTorch's writes into zeros, which checkpoints may have kept.)"""
    return (index[:, None] == torch.arange(like.shape[1], device=index.device)).to(like.dtype)


class GumbelSoftmax(Decision):
    """Straight-through Gumbel-softmax: the policy learns from the modules' loss and has none of its own.

    g is Gumbel noise, p~ = softmax((z + g) / temperature), a = argmax p~. The batch leaves as
    y = x (1 + p~_a - sg(p~_a)): x in value, with dy/dp~_a = x. In eval a = argmax z, y = x. State: [z].

    ``exploration`` e, in the constructor and in ``set_exploration``, sets temperature = 0.1 + 9.9 e.

    The arguments are :class:`Decision`'s.

    Examples:
        >>> decide = fastroute.GumbelSoftmax(3, 8, exploration=0.1)  # temperature 1.09
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    algorithm = "GumbelSoftmax"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_exploration(self._exploration)

    def set_exploration(self, exploration: float) -> None:
        """Set the temperature to 0.1 + 9.9 exploration."""
        self._exploration = self._check_exploration(exploration)
        self._temperature = 0.1 + 9.9 * self._exploration

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        z = self._ask(self._policy, x, plan)
        best = z.argmax(1)
        if not self.training:
            actions = best if forced is None else forced
            return Decided(actions, [Column(z)])
        u = self._uniform(*z.shape, like=z)
        noisy = (z - (_TINY - (u + _TINY).log()).log()) / self._temperature
        soft = noisy.softmax(1)
        actions = noisy.argmax(1) if forced is None else forced
        taken = soft.gather(1, actions.clamp(min=0)[:, None])[:, 0]
        upstream = self.formula == "upstream"
        made = Decided(actions, [Column(z)], lambda: (actions == best) == upstream)
        if x.is_floating_point() or x.is_complex():  # other inputs have no gradient to give, and leave as they are
            made.y = x * (1 + (taken - taken.detach())).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return made

    def loss(self, e: Entries) -> None:
        return None


class RELAX(_WithValueNet):
    """RELAX: a score-function gradient with a learned control variate c(x, soft choice).

    u1, u2 uniform, l = log p, h = l + gumbel(u1), a = argmax h, H = onehot(a), h~ the relaxed choice given a, from u2;
    c = V(x, softmax(h / temperature)), c~ the same of h~. State: [z, c, c~]. In eval a = argmax z, without
    loss, also where that is made in training; the state is [z].

    Intended, per entry, with g = (R - c~)(H - p) + d(c - c~)/dz the estimate of dE[R]/dz:
    -<sg(g), z> - 0.01 entropy(p), and sum_k g_k^2 for V alone: its gradient makes g vary less. The first term is 0.
    Upstream, over all entries at once and without a mean: the gradient of the policy's parameters theta is
    G - 0.01 d(entropy)/d(theta), G = -(R - c~)(H - p) dp/d(theta) - d(sum_k c - c~)/d(theta), and to all parameters
    that of 0.5 sum G^2 is added; the value is 0. With ``detach`` upstream cuts the soft choice off too, so that the
    c - c~ term is zero; and its h~ bounds the other choices by 0 instead of the highest.
    (Upstream writes these into .grad during the loss, where zero_grad() removes them again and agents without a sample
    mix up the rest; here they come with backward() like any gradient.)

    ``set_exploration(e)`` sets temperature = 0.1 + 9.9 e; it starts at 0.5.

    Args:
        value_net: V, [B, in_features + K] -> [B, 1]; the others are :class:`Decision`'s. in_features is an int.

    Examples:
        >>> decide = fastroute.RELAX(3, 8)
        >>> h, meta, agents = fastroute.Initialization()(torch.randn(4, 8))
        >>> h, meta, actions = decide(h, meta, agents)
        >>> actions.shape
        torch.Size([4])
    """

    def __init__(self, num_selections: int, in_features: int | None = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(in_features, int):
            raise ValueError(
                f"in_features: RELAX expects an int, for its network also sees the choice; got {in_features!r}"
            )
        if kwargs.get("stacked"):
            raise ValueError("stacked: RELAX differentiates its networks twice, which a stack cannot; expected False")
        super().__init__(num_selections, in_features, *args, **kwargs)
        self._temperature = 0.5

    def _storages(self, outputs: int, net: nn.Module | None) -> AnyStorages:
        if not hasattr(self, "_policy"):
            return super()._storages(outputs, net)
        seen, self._in_features = self._in_features, self._in_features + self._num_selections  # type: ignore[operator]
        made: Any = super()._storages(outputs, net)
        self._in_features = seen
        for storage in made:  # what it is given also has the choice, whose gradient it has to keep
            storage._detach = False
        return made

    def set_exploration(self, exploration: float) -> None:
        """Set the temperature to 0.1 + 9.9 exploration."""
        self._exploration = self._check_exploration(exploration)
        self._temperature = 0.1 + 9.9 * self._exploration

    def decide(self, x: Tensor, plan: Plan | None, forced: Tensor | None) -> Decided:
        learns = self.training and self.formula == "intended"
        if learns and transformed():
            raise RuntimeError(f"RELAX: expected a call in eval under torch.func and forward mode; {_OF_A_GRADIENT}")
        if learns and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            with torch.enable_grad():
                made = self.decide(x, plan, forced)
            return replace(made, columns=[Column(column.full.detach()) for column in made.columns])
        z = self._ask(self._policy, x, plan, differentiable_twice=True)
        best = z.argmax(1)
        if not self.training:
            return Decided(best if forced is None else forced, [Column(z)])  # of which it learns nothing
        u1, u2 = self._uniform(2, *z.shape, like=z)
        upstream = self.formula == "upstream"
        # the estimate's gradient stops at z, so that V's part of the loss moves V alone
        root = z if upstream else z.detach().requires_grad_(torch.is_grad_enabled())
        log_p = root.log_softmax(1)
        h = log_p - (_EPS - (u1 + _EPS).log()).log()
        actions = h.argmax(1) if forced is None else forced
        H = _one_hot(actions.clamp(min=0), z)
        conditional = self._conditional(log_p, u2, H, upstream)
        soft = [t.div(self._temperature).softmax(1) for t in (h, conditional)]
        c, c2 = (self._critic(x, s, plan, upstream) for s in soft)
        columns = [Column(z), Column(c), Column(c2)]
        if not upstream:
            columns.append(Column(self._control(c, c2, root)))
        return Decided(actions, columns, lambda: (actions == best) == upstream)

    @staticmethod
    def _conditional(log_p: Tensor, u: Tensor, H: Tensor, upstream: bool) -> Tensor:
        """[B, K]: h~, the perturbed logits given which of them is the highest."""
        gumbel = -(_EPS - (u + _EPS).log()).log()
        # the highest of Gumbels with locations log p is a standard one, and bounds the others
        top = H * (log_p + gumbel) if upstream else (H * gumbel).sum(1, keepdim=True)
        below = log_p - ((log_p - top).exp() - (u if upstream else u + _EPS).log()).log()
        return torch.where(H > 0, top, below)

    def _critic(self, x: Tensor, soft: Tensor, plan: Plan | None, upstream: bool) -> Tensor:
        """[B, 1]: V of the input and the soft choice."""
        if upstream and self._detach:
            soft = soft.detach()
        seen = torch.cat([x.flatten(1).detach() if self._detach else x.flatten(1), soft.to(x.dtype)], 1)
        return self._ask(self._value_mem, seen, plan, differentiable_twice=True)

    @staticmethod
    def _control(c: Tensor, c2: Tensor, root: Tensor) -> Tensor | Callable[[], Tensor]:
        """[B, K]: d(c - c~)/dz, differentiable in V's parameters."""
        if torch.is_inference_mode_enabled():
            return _none_in_inference_mode
        gap = (c - c2).sum()
        if not (root.requires_grad and gap.requires_grad):  # nobody was decided for
            return torch.zeros_like(root)
        (made,) = torch.autograd.grad(gap, root, create_graph=True, allow_unused=True)
        return torch.zeros_like(root) if made is None else made

    def loss(self, e: Entries) -> Tensor | None:
        decided_in_eval = e.columns == 1 or (e.columns == STATE_COLUMNS and not self.training)  # padded: upstream's own
        if decided_in_eval:
            return None
        z, H = e.full(0), _one_hot(e.actions, e.full(0))
        p, log_p = z.softmax(1), z.log_softmax(1)
        if self.formula == "upstream":
            return self._upstream_loss(e, p, log_p, H)
        g = (e.R[:, None] - e.full(2)) * (H - p.detach()) + e.full(3)
        entropy = -(p * log_p).sum(1)
        policy = -(g.detach() * z).sum(1)
        return policy - policy.detach() - 0.01 * entropy + g.square().sum(1)

    def _upstream_loss(self, e: Entries, p: Tensor, log_p: Tensor, H: Tensor) -> Tensor:
        """Zeros, with upstream's gradient in the mean over the batch."""
        if not p.requires_grad:  # nobody was decided for, or nothing is to be learnt
            return p.new_zeros(p.shape[0])
        K, active = e.choices, e.active
        rows = 1.0 if active is None else active[:, None].to(p.dtype)
        theta = [t for t in self._policy.parameters() if t.requires_grad]
        # upstream's c and c~ are spread over the K choices before they are summed
        cotangent = -(e.R[:, None] - e.full(2)) * (H - p) * rows
        control = (e.full(1) - e.full(2)).expand(-1, K) * rows
        score = torch.autograd.grad(p, theta, cotangent, create_graph=True, allow_unused=True)
        through: Any = [None] * len(theta)
        if control.requires_grad:
            through = torch.autograd.grad(control.sum(), theta, create_graph=True, allow_unused=True)
        entropy = -(p * log_p * rows).sum()
        of_entropy = torch.autograd.grad(entropy, theta, retain_graph=True, allow_unused=True)
        total = p.new_zeros(())
        for t, a, b, s in zip(theta, score, through, of_entropy, strict=True):
            if a is None and b is None:
                continue
            G = (0 if a is None else a) - (0 if b is None else b)
            pull = G.detach() - (0 if s is None else 0.01 * s)
            total = total + (pull * t).sum() + 0.5 * G.square().sum()
        # shared out over the entries, so that the mean over the batch's samples has it once
        entries = p.shape[0] if active is None else active.sum().clamp(min=1)
        return (total - total.detach()).expand(p.shape[0]) * (e.batch / entries)
