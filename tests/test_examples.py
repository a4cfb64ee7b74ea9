"""The examples run, on little data, and write what they say they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.examples import EXAMPLES, cells, example, leave_no_trace
from tests.helpers.subprocesses import check_python

__all__ = ["leave_no_trace"]  # a fixture of every test here


def test_routing_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    routing = example("routing_digits")
    names = [row.algorithm for row in routing.ROWS]
    assert len(names) == 20 and len(dict.fromkeys((r.algorithm, r.storage, r.reward) for r in routing.ROWS)) == 20
    picked = [names[0], names[1], "REINFORCE", "SARSA"]
    assert routing.main(["--algorithms", *picked, "--epochs", "1", "--seeds", "2", "--threads", "1"]) == 0
    head, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == [names[0], names[1], "REINFORCE", "REINFORCE", "SARSA"]
    assert all(len(row) == len(head) for row in rows)
    assert all(0.3 < float(row[head.index("accuracy (range)")].split()[0]) <= 1 for row in rows)


def test_routing_digits_splits_the_digits_once() -> None:
    pytest.importorskip("sklearn")
    routing = example("routing_digits")
    (learn, test), (again, _) = routing.digits(), routing.digits()
    assert (len(learn), len(test)) == (1437, 360)
    assert torch.equal(learn.x, again.x)
    assert learn.task.unique().tolist() == [0, 1, 2, 3, 4] and learn.label.unique().tolist() == [0, 1]


@pytest.mark.long
def test_cost_vs_tasks_rewrites_its_part_of_a_page(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image")
    page, picture = tmp_path / "page.md", tmp_path / "cost.png"
    page.write_text("before\n<!-- begin cost -->\nold\n<!-- end cost -->\nafter\n")
    argv = ["--tasks", "2", "3", "--widths", "4", "--batch", "8", "--rounds", "2"]
    assert example("cost_vs_tasks").main([*argv, "--out", str(page), "--picture", str(picture)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- begin cost -->\n") and text.endswith("\n<!-- end cost -->\nafter\n")
    assert "old" not in text and [row[0] for row in cells(text)] == ["tasks", "2", "3"] * 2
    assert matplotlib_image.imread(picture).std() > 0.05


def test_the_cross_stitch_rival_is_the_network_it_says() -> None:
    """Against a loop over samples, columns and mixtures."""
    cost = example("cost_vs_tasks")
    model = cost.CrossStitch(3, 4).double()  # random weights cancel: float32 has no digits to spare
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    x, tasks = torch.randn(5, cost.FEATURES, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    got, _ = model(x, tasks)
    first = model.first.weight.reshape(3, 4, -1)
    for sample, task, expected in zip(x, tasks, got, strict=True):
        columns = [(w @ sample + b).relu() for w, b in zip(first, model.first.bias.reshape(3, 4), strict=True)]
        mixed = [sum(a * c for a, c in zip(row, columns, strict=True)) for row in model.stitches[0]]
        columns = [(m @ w + b[0]).relu() for m, w, b in zip(mixed, model.weight, model.bias, strict=True)]
        own = sum(a * c for a, c in zip(model.stitches[1][task], columns, strict=True))
        torch.testing.assert_close(model.heads._submodules[task](own), expected)


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("routing_digits", ["--epochs", "0"], "--epochs, --seeds, --threads: expected at least 1"),
        ("routing_digits", ["--algorithms", "Dice"], "invalid choice: 'Dice'"),
        ("cost_vs_tasks", ["--tasks", "0"], "--tasks, --widths, --batch, --rounds, --threads: expected at least 1"),
    ],
)
def test_misuse(name: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(argv)
    assert message in capsys.readouterr().err


def test_they_are_scripts() -> None:
    """All in one process of their own, which imports PyTorch once."""
    code = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
for name in ("routing_digits", "cost_vs_tasks", "mixture_of_experts"):
    sys.argv = [name + ".py", "--help"]
    try:
        runpy.run_path({str(EXAMPLES)!r} + "/" + name + ".py", run_name="__main__")
    except SystemExit as end:
        print("-- status", end.code)
"""
    digits, cost, mixture, rest = check_python(code).split("-- status 0\n")
    assert "--threads" in digits and "--threads" in cost and "--experts" in mixture and not rest


@pytest.mark.long
def test_cuda_graph(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU, one compiled graph of the same step."""
    made = example("cuda_graph").main(["--batch", "32", "--modules", "3", "--tasks", "2", "--backend", "aot_eager"])
    assert made == 0
    printed = capsys.readouterr().out
    assert "graph: " in printed and "draws are fresh" in printed
    assert float(printed.split(" % of the samples")[0].split()[-1]) > 0


def test_credit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert (
        example("credit").main(["--epochs", "1", "--images", "3", "--sentences", "3", "--folder", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    for name in ("credit_digits.png", "credit_words.png"):
        assert name in printed and (tmp_path / name).stat().st_size > 5000
