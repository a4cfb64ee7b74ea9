"""Credit assignment: how much each input vector of a network of routings counts in each of its outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import watching
from ..modules.reading import why_called
from ..ops import checks
from ..ops.arguments import NotNegative, checked
from .compose import Add, Concatenate, Residual
from .credit_map import ROUTINGS, Credit, Told, checked_phi, routed, routes

#: Modules that give every vector what depends on it alone.
_PER_VECTOR: tuple[Any, ...] = (
    nn.Identity, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
    nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish,
    nn.Hardtanh, nn.Softsign,
)  # fmt: skip

#: Modules whose parts are traced, each by itself: their own forward is then not called.
_CONTAINERS = (nn.Sequential, Residual, Concatenate, Add)


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
        TypeError: not a list of floating-point tensors of one dtype, on one device.

    Examples:
        >>> first = fastroute.EfficientVectorRouting(6, 4, 8, 8, return_dict=True)
        >>> second = fastroute.EfficientVectorRouting(4, 3, 8, 8, return_dict=True)
        >>> a = first(torch.randn(2, 6, 8))
        >>> b = second(a["x_out"])
        >>> fastroute.credit_assignment([a["phi"], b["phi"]]).shape
        torch.Size([2, 6, 3])
    """
    if isinstance(phis, Tensor):
        raise TypeError(f"phis: expected a list of tensors, got {checks.given(phis)}; write [phi]")
    if not phis:
        raise ValueError("phis: expected at least one phi [..., n_inp, n_out], got none")
    for k, phi in enumerate(phis):
        checked_phi(f"phis[{k}]", phi)
        if phi.dtype != phis[0].dtype or phi.device != phis[0].device:
            raise TypeError(
                f"phis[{k}]: expected {phis[0].dtype} on {phis[0].device} like phis[0], got {checks.given(phi)}"
            )
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
    cls = type(model)
    if isinstance(model, ROUTINGS) and routes(model):
        made, credit = routed(model, x)
        return made["x_out"] if isinstance(made, dict) else made, credit
    alone = any(isinstance(model, known) and cls.forward is known.forward for known in _PER_VECTOR)
    if alone and "forward" not in vars(model) and len(getattr(model, "normalized_shape", (1,))) == 1:
        y = model(x)
        return y, Credit.identity(x.shape[-2], y)
    why = why_called(model) if cls in _CONTAINERS else ""
    if why is not None:
        raise TypeError(
            f"{name}: expected routings, modules that treat every vector alone, and nn.Sequential, Residual, "
            f"Concatenate or Add of them, none of another forward, got {cls.__name__}{why and ' with ' + why}; "
            "record() its routings and compose their credits by hand"
        )
    if isinstance(model, nn.Sequential):
        y, whole = x, None
        for key, module in model._modules.items():  # named_children() has a repeated one once
            assert module is not None
            y, own = _trace(module, y, f"{name}.{key}")
            whole = own if whole is None else whole @ own
        return y, Credit.identity(x.shape[-2], x) if whole is None else whole
    if isinstance(model, Residual):
        y, credit = _trace(model.module, x, f"{name}.module")
        return x + y, 1 + credit
    branches: Any = model.branches
    traced = [_trace(branch, x, f"{name}.branches.{k}") for k, branch in enumerate(branches)]
    ys, credits = zip(*traced, strict=True)
    if isinstance(model, Concatenate):
        return torch.cat(ys, -2), Credit.of_outputs(*credits)
    total: Any = sum(credits)
    return sum(ys[1:], start=ys[0]), total


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
        TypeError: the network has another module in it, a subclass with another forward, or a container with hooks; the
            message says where.

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

    Kept is what each routing was given, in the pass itself, with its mask and lengths, and a copy of the parameters;
    phi is made from that when it is asked for (``Credit.dense()`` is phi [..., n, m]). So an input must not be changed
    in place before: a ``RuntimeError`` says if it was. A ``DefinableVectorRouting``'s phi is stored. A routing with
    ``return_dict=True`` hands on its x_out meanwhile, as in the paper's own recipe. A routing that ``torch.compile``
    has compiled tells nothing, of which a warning is given at the end.

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
    routings = {name: module for name, module in model.named_modules() if isinstance(module, ROUTINGS)}

    def told_of(name: str) -> Told:
        return Told(lambda credit: found.setdefault(name, []).append(credit))

    def hand_on(module: nn.Module, args: tuple[Any, ...], made: Any) -> Any:
        return made["x_out"] if isinstance(made, dict) else None

    with ExitStack() as stack:
        for name, module in routings.items():
            stack.enter_context(told_of(name).of(module))
            stack.callback(module.register_forward_hook(hand_on).remove)
        yield found
    silent = [name or "the model" for name, m in routings.items() if name not in found and watching.is_compiled(m)]
    if silent:
        warnings.warn(
            f"record: {', '.join(silent)} told nothing, as torch.compile has compiled what calls it: record the model "
            "that was compiled, or under torch.compiler.set_stance('force_eager')", stacklevel=3,
        )  # fmt: skip
