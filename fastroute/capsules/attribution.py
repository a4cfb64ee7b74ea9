"""Credit assignment: how much each input vector of a network of routings counts in each of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.arguments import NotNegative, checked
from .compose import Add, Concatenate, Residual
from .credit_map import Credit, checked_phi
from .definable import DefinableVectorRouting
from .vector import EfficientVectorRouting

_ROUTINGS = (EfficientVectorRouting, DefinableVectorRouting)

#: Modules that give every vector what depends on it alone.
_PER_VECTOR = (
    nn.Identity, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish,
    nn.Hardtanh, nn.Softsign,
)  # fmt: skip


@checked
def credit_assignment(phis: Sequence[Tensor], *, normalize: bool = True, eps: NotNegative = 1e-5) -> Tensor:
    r"""End-to-end credit of a chain of routings, Heinsen (2022), Appendix A.

    The credit of input i of the first routing in output j of the last is the sum over all paths between them,
    :math:`\Phi = \phi^{(1)} \phi^{(2)} \cdots \phi^{(L)}`.

    Args:
        phis: each routing's ``phi`` [..., n_l, m_l], first to last, with m_l = n_{l+1} (``return_dict=True`` gives it).
        normalize: divide by the standard deviation (plus ``eps``) of each sample's matrix after every product, which
            changes no ratio within a sample and keeps long chains in range.

    Returns:
        [..., n_1, m_L], in phi's units, or in standard deviations if normalize.

    Raises:
        ValueError: no phi, or two whose shapes do not chain.

    Examples:
        >>> first = fastroute.EfficientVectorRouting(6, 4, 8, 8, return_dict=True)
        >>> second = fastroute.EfficientVectorRouting(4, 3, 8, 8, return_dict=True)
        >>> a = first(torch.randn(2, 6, 8))
        >>> b = second(a["x_out"])
        >>> fastroute.credit_assignment([a["phi"], b["phi"]]).shape
        torch.Size([2, 6, 3])
    """
    if not phis:
        raise ValueError("phis: expected at least one phi [..., n_inp, n_out], got none")
    for k, phi in enumerate(phis):
        checked_phi(f"phis[{k}]", phi)
        if k and phi.shape[-2] != phis[k - 1].shape[-1]:
            raise ValueError(
                f"phis[{k}]: expected {phis[k - 1].shape[-1]} input vectors, as many as phis[{k - 1}] has outputs, "
                f"got {phi.shape[-2]} (phis[{k}] is {list(phi.shape)})"
            )

    def scaled(credit: Tensor) -> Tensor:
        if not normalize:
            return credit
        return credit / (credit.flatten(-2).std(-1)[..., None, None] + eps)

    credit = phis[0]
    if len(phis) == 1:
        return scaled(credit)
    for phi in phis[1:]:
        credit = scaled(torch.matmul(credit, phi))
    return credit


def _trace(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Credit]:
    """(model(x), its credit)."""
    if isinstance(model, _ROUTINGS):
        made = model(x)
        return made["x_out"] if isinstance(made, dict) else made, Credit.routed(model, x)
    if isinstance(model, nn.Sequential):
        made, credit = x, None
        for key, module in model._modules.items():  # named_children() has a repeated one once
            made, own = _trace(module, made, f"{name}.{key}")
            credit = own if credit is None else credit @ own
        return made, Credit.identity(x.shape[-2], x) if credit is None else credit
    if isinstance(model, Residual):
        y, credit = _trace(model.module, x, f"{name}.module")
        return x + y, 1 + credit
    if isinstance(model, (Concatenate, Add)):
        traced = [_trace(branch, x, f"{name}.branches.{k}") for k, branch in enumerate(model.branches)]
        ys, credits = zip(*traced, strict=True)
        if isinstance(model, Concatenate):
            return torch.cat(ys, -2), Credit.of_outputs(*credits)
        total: Any = sum(credits)
        return sum(ys[1:], start=ys[0]), total
    if isinstance(model, _PER_VECTOR):
        y = model(x)
        return y, Credit.identity(x.shape[-2], y)
    raise TypeError(
        f"{name}: expected routings, modules that treat every vector alone, and nn.Sequential, Residual, Concatenate "
        f"or Add of them, got {type(model).__name__}; record() its routings and compose their credits by hand"
    )


@checked
def trace(model: nn.Module, x_inp: Tensor) -> tuple[Tensor, Credit]:
    """Run a network of routings, and return its output with its end-to-end credit as a map.

    Args:
        model: routings, modules that treat every vector alone (norms, Linear, activations), and ``nn.Sequential``,
            ``Residual``, ``Concatenate`` and ``Add`` of all these.
        x_inp: [..., n, d].

    Returns:
        model(x_inp), without gradients, and its ``Credit``, which holds every routing's input but no phi.

    Raises:
        TypeError: the network has another module in it; the message says where.

    Examples:
        >>> Routing = fastroute.EfficientVectorRouting
        >>> net = nn.Sequential(Routing(6, 4, 8, 8), Routing(4, 3, 8, 8))
        >>> y, credit = fastroute.capsules.trace(net, torch.randn(2, 6, 8))
        >>> y.shape, credit.dense().shape
        (torch.Size([2, 3, 8]), torch.Size([2, 6, 3]))
    """
    checks.tensor("x_inp", x_inp, "a tensor [..., n_inp, d_inp]")
    with torch.no_grad():
        return _trace(model, x_inp, "model")


@checked
def credit(
    model: nn.Module, x_inp: Tensor, output: int | Tensor, *, normalize: bool = False, eps: NotNegative = 1e-5
) -> Tensor:
    r"""End-to-end credit of every input vector in one output of a network, Heinsen (2022), Appendix A.

    :math:`\Phi e_j` with :math:`\Phi = \phi^{(1)} \cdots \phi^{(L)}`, from the last product to the first, each made in
    tiles of rows: no [n_inp, n_out] matrix is stored, the memory is that of the routings' inputs. Column j of
    ``credit_assignment`` of all phi without its normalization.

    Args:
        model: as :func:`trace` takes it.
        x_inp: [..., n, d].
        output: j; or weights [m] or [..., m] of a sum of outputs.
        normalize: divide by the standard deviation (plus ``eps``) over each sample's inputs.

    Returns:
        [..., n].

    Examples:
        >>> Routing = fastroute.EfficientVectorRouting
        >>> net = nn.Sequential(Routing(6, 4, 8, 8), Routing(4, 3, 8, 8))
        >>> fastroute.capsules.credit(net, torch.randn(2, 6, 8), output=1).shape
        torch.Size([2, 6])
    """
    _, found = trace(model, x_inp)
    if isinstance(output, Tensor):
        if output.dim() < 1 or output.shape[-1] != found.n_out:
            raise ValueError(f"output: expected weights [..., {found.n_out}], got {checks.shown(output)}")
        made = found.times(output[..., None])[..., 0]
    else:
        made = found.output(checks.integer("output", output))
    return made / (made.std(-1, keepdim=True) + eps) if normalize else made


@checked
@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Credit]]]:
    """Collect the credit of every routing in any network, call by call, while it runs.

    Forward hooks keep what each routing was given, with its mask and lengths; phi is made from that when it is asked
    for (``Credit.dense()`` is phi [..., n, m]). A routing with ``return_dict=True`` hands on its x_out meanwhile, as in
    the paper's own recipe.

    Args:
        model: with ``EfficientVectorRouting`` and ``DefinableVectorRouting`` layers.

    Returns:
        A dict that fills up: a layer's name in ``model.named_modules()`` to a ``Credit`` for every call of it.

    Examples:
        >>> Routing = fastroute.EfficientVectorRouting
        >>> net = nn.Sequential(Routing(6, 4, 8, 8), Routing(4, 3, 8, 8))
        >>> with fastroute.capsules.record(net) as credits:
        ...     y = net(torch.randn(2, 6, 8))
        >>> (credits["0"][0] @ credits["1"][0]).dense().shape
        torch.Size([2, 6, 3])
    """
    found: dict[str, list[Credit]] = {}
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, _ROUTINGS)
    }

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
        if busy:
            return None
        busy.append(module)
        try:
            found.setdefault(names[module], []).append(Credit.routed(module, *args, **kwargs))
        finally:
            busy.pop()
        return made["x_out"] if isinstance(made, dict) else None

    busy: list[nn.Module] = []
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
