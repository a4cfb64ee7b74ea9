"""Credit assignment: how much each input vector of a network of routings counts in each of its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def credit_assignment(phis: Sequence[Tensor], *, normalize: bool = True, eps: float = 1e-5) -> Tensor:
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
    """
    if not phis:
        raise ValueError("phis: expected at least one phi [..., n_inp, n_out], got none")
    for k, phi in enumerate(phis):
        if phi.dim() < 2:
            raise ValueError(f"phis[{k}]: expected [..., n_inp, n_out], got {list(phi.shape)}")
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
