"""The mixture-of-experts example runs, on little data, and its table says what it says it says."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.examples import cells, example, leave_no_trace

__all__ = ["leave_no_trace"]  # a fixture of every test here


@pytest.mark.parametrize("k", [1, 2])
def test_it_learns(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    mixture = example("mixture_of_experts")
    argv = ["--experts", "4", "--k", str(k), "--epochs", "3", "--seeds", "1"]
    assert mixture.main(argv) == 0
    head, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == [*mixture.BALANCES, mixture.ACTIVE, mixture.ALL]
    routers, active, everything = ([int(row[i]) for row in rows] for i in (1, 1, 2))
    router, expert = 4 * mixture.WIDTH, 3 * mixture.WIDTH * mixture.HIDDEN
    assert active == [router + k * expert] * 3 + [k * expert, 4 * expert] and routers[0] == active[0]
    assert everything == [router + 4 * expert] * 3 + [k * expert, 4 * expert]
    assert all(float(row[head.index("accuracy (range)")].split()[0]) > 0.7 for row in rows)
    for row in rows[:3]:
        load = [int(share) for share in row[head.index("load per expert, %")].split()]
        assert len(load) == 4 and abs(sum(load) - 100) <= 2 and load == sorted(load, reverse=True)


def test_patches_are_where_they_are() -> None:
    """Overlapping squares of four pixels, row by row."""
    mixture = example("mixture_of_experts")
    net = mixture.Classifier(mixture.Dense(4))
    seen: list[torch.Tensor] = []
    net.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.arange(64.0).reshape(1, 8, 8)
    net(image)
    assert torch.equal(seen[0][0, 5].reshape(4, 4), image[0, 2:6, 4:8])


@pytest.mark.parametrize(
    "argv, message",
    [(["--epochs", "0"], "expected at least 1"), (["--k", "9"], "--k: expected at most --experts, 8, got 9")],
)
def test_misuse(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("mixture_of_experts").main(argv)
    assert message in capsys.readouterr().err
