"""End-to-end credit of a chain of routings."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastroute import EfficientVectorRouting, credit_assignment
from tests.helpers.opcheck import assert_same


def chain(*sizes: int, lead: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*lead, n, m, dtype=torch.float64, generator=generator) for n, m in pairwise(sizes)]


def test_is_the_sum_over_all_paths() -> None:
    one, two, three = chain(4, 3, 5, 2)
    paths = sum(one[:, a, None] * two[a, b] * three[b] for a in range(3) for b in range(5))
    assert isinstance(paths, Tensor)
    assert_same(credit_assignment([one, two, three], normalize=False), paths)


def test_is_upstreams_recipe() -> None:
    """The product, divided by its standard deviation plus 1e-5 after each one."""
    phis = chain(6, 4, 3, 5)
    expected = phis[0]
    for phi in phis[1:]:
        expected = expected @ phi
        expected = expected / (expected.std() + 1e-5)
    assert_same(credit_assignment(phis), expected)


def test_normalizing_is_per_sample_and_changes_no_ratio() -> None:
    phis = chain(4, 3, 5, lead=(2, 3))
    raw, scaled = credit_assignment(phis, normalize=False), credit_assignment(phis)
    assert scaled.shape == (2, 3, 4, 5)
    for b in range(2):
        for t in range(3):
            assert_same(scaled[b, t], credit_assignment([phi[b, t] for phi in phis]))
            assert_same(scaled[b, t] / scaled[b, t, 0, 0], raw[b, t] / raw[b, t, 0, 0])


def test_one_routing() -> None:
    (phi,) = chain(4, 3)
    assert credit_assignment([phi], normalize=False) is phi
    assert_same(credit_assignment([phi]), phi / (phi.std() + 1e-5))


def test_long_chains_stay_in_range() -> None:
    phis = [100 * phi for phi in chain(*[8] * 400)]
    assert not credit_assignment(phis, normalize=False).isfinite().all()
    assert credit_assignment(phis).isfinite().all()


def test_of_two_routings() -> None:
    """Credit explains the output: with linear votes and no norm, phi is what each input counts."""
    torch.manual_seed(0)
    first = EfficientVectorRouting(6, 4, 5, 5, return_dict=True, dtype=torch.float64)
    second = EfficientVectorRouting(4, 3, 5, 5, return_dict=True, dtype=torch.float64)
    a = first(torch.randn(2, 6, 5, dtype=torch.float64))
    b = second(a["x_out"])
    credit = credit_assignment([a["phi"], b["phi"]])
    assert credit.shape == (2, 6, 3)
    credit.sum().backward()
    assert first.W_A.grad is not None and first.W_A.grad.isfinite().all() and first.W_A.grad.any()


@pytest.mark.parametrize(
    ("phis", "message"),
    [
        ([], r"phis: expected at least one phi \[\.\.\., n_inp, n_out\], got none"),
        ([torch.zeros(3)], r"phis\[0\]: expected \[\.\.\., n_inp, n_out\], got \[3\]"),
        ([torch.zeros(4, 3), torch.zeros(2)], r"phis\[1\]: expected \[\.\.\., n_inp, n_out\], got \[2\]"),
        (
            [torch.zeros(4, 3), torch.zeros(2, 5)],
            r"phis\[1\]: expected 3 input vectors, as many as phis\[0\] has outputs, got 2 \(phis\[1\] is \[2, 5\]\)",
        ),
    ],
)
def test_bad_input(phis: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        credit_assignment(phis)
