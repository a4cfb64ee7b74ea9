"""Upstream's numbers: graphs, keys, every node's output, losses, gradients, and three trainings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastroute.compat import torchmtl
from fastroute.multitask import MTLModel
from tests.helpers.budget import MovedStarts, Yardstick
from tests.helpers.multitask import README_TASKS, Layers, load, readme, select, triple, uncertainty

CASES: dict[str, tuple[Layers, list[str]]] = {
    "readme": (readme(), README_TASKS),
    "triple_regression": (triple(), README_TASKS),
    "uncertainty": (uncertainty(), ["MultiLoss"]),
    "select": (select(), ["t", "cat_ba", "t"]),
}
each_class = pytest.mark.parametrize("cls", [MTLModel, torchmtl.MTLModel], ids=["fastroute", "compat"])


def build(cls: Any, case: str, **options: Any) -> Any:
    layers, outputs = CASES[case]
    return cls(copy.deepcopy(layers), outputs, **options)


@each_class
@pytest.mark.parametrize("case", CASES)
def test_graphs_and_keys(case: str, cls: Any) -> None:
    model, g = build(cls, case), load(f"mtl_{case}.pt")["graph"]
    assert list(model.g.nodes) == g["nodes"]
    assert [list(edge) for edge in model.g.edges] == g["edges"]
    assert {name: list(model.g.predecessors(name)) for name in g["nodes"]} == g["preds"]
    assert list(model.state_dict()) == g["keys"]
    assert [name for name, _ in model.named_children()] == g["children"]
    assert list(model.losses) == g["loss_keys"] and list(model.loss_weights) == g["weight_keys"]


def everything(model: Any, g: Any) -> dict[str, Tensor]:
    """What the README's file holds of a training step."""
    model = copy.deepcopy(model)
    dtype = model.Task3_loss.dtype
    y_hat, l_funcs, l_weights = model(g["X"].to(dtype))
    losses = [f(a, b.to(dtype)) for f, a, b in zip(l_funcs, y_hat, g["y"], strict=True)]
    total = sum(w * loss for w, loss in zip(l_weights, losses, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    return {
        **{f"node {name}": y.detach() for name, y in model.outputs.items()},
        **{f"output {k}": y.detach() for k, y in enumerate(y_hat)},
        **{f"loss {k}": loss.detach() for k, loss in enumerate(losses)},
        **{f"weight {k}": torch.as_tensor(w).detach() for k, w in enumerate(l_weights)},
        "total": total.detach().reshape(1),
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize(
    "options", [{"keep_outputs": True}, {"order": "bfs", "run_all": True, "keep_outputs": True}, None]
)
def test_the_readme(options: dict[str, Any] | None) -> None:
    """Upstream's float32 numbers, and ours, within budget."""
    g = load("mtl_readme.pt")
    model = build(MTLModel, "readme", **options) if options else build(torchmtl.MTLModel, "readme")
    model.load_state_dict(g["state"], strict=True)
    _, losses, weights = model(g["X"])
    assert [type(f).__name__ for f in losses] == g["loss_types"] and weights[2] is model.Task3_loss
    assert [str(list(w.shape)) if isinstance(w, Tensor) else type(w).__name__ for w in weights] == g["weight_shapes"]
    theirs = {
        **{f"node {name}": y for name, y in g["all_nodes"].items()},
        **{f"output {k}": y for k, y in enumerate(g["outputs"])},
        **{f"loss {k}": torch.tensor(loss) for k, loss in enumerate(g["losses"])},
        **{f"weight {k}": torch.as_tensor(w) for k, w in enumerate(g["weights"])},
        "total": torch.tensor([g["total"]]),
        **g["grads"],
    }
    exact = copy.deepcopy(model).double()
    yardstick = Yardstick(lambda: everything(exact, g), torch.float32)
    assert yardstick.exact.keys() == theirs.keys()
    yardstick.check(theirs, "upstream's")
    yardstick.check(everything(model, g))


@each_class
def test_selections(cls: Any) -> None:
    model, g = build(cls, "select"), load("mtl_select.pt")
    model.load_state_dict(g["state"], strict=True)
    outputs, losses, weights = model([g["a"], g["b"]])
    exact = copy.deepcopy(model).double()

    def run() -> dict[str, Tensor]:
        made = exact([g["a"].double(), g["b"].double()])[0]
        return {**{str(k): y.detach() for k, y in enumerate(made)}, "sl": made[1][:, 1:4].detach()}

    yardstick = Yardstick(run, torch.float32)
    for ys in (outputs, g["outputs"]):
        yardstick.check({str(k): y.detach() for k, y in enumerate(ys)})
    assert losses == weights == [None, None, None]
    kept = build(MTLModel, "select", keep_outputs=True, run_all=True)
    kept.load_state_dict(g["state"])
    kept([g["a"], g["b"]])
    assert len(kept.outputs["raw"]) == g["raw_len"] and torch.equal(kept.outputs["raw"][0], g["a"])
    for sl in (kept.outputs["sl"], g["sl"]):
        yardstick.check({"sl": sl.detach()})


# --------------------------------------------------------------------------- trainings, to the accuracy that came along


def steps(model: Any, x: Tensor, y: list[Tensor], count: int, lr: float = 0.01) -> Iterator[tuple[float, float]]:
    """Total loss, and the learned weight after the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(count):
        optimizer.zero_grad()
        terms = zip(*model(x), y, strict=True)
        loss = sum(weight * f(y_hat, t) for y_hat, f, weight, t in terms)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        yield float(loss.detach()), float(model.Task3_loss.detach())


def trained(model: Any, g: Any, y: list[Tensor], count: int) -> dict[str, Tensor]:
    """Losses and learned weights of so many steps in the model's dtype, and its state after them."""
    model, dtype = copy.deepcopy(model), next(model.parameters()).dtype
    loss, weight = zip(*steps(model, g["X"].to(dtype), [t.to(dtype) for t in y], count), strict=True)
    return {"loss": torch.tensor(loss, dtype=dtype), "weight": torch.tensor(weight, dtype=dtype), **model.state_dict()}


def test_sixty_steps_of_the_readme() -> None:
    """Upstream's losses, learned weights and state after 60 steps, and those of both classes, within budget."""
    g = load("mtl_readme_train60.pt")
    models = [build(cls, "readme") for cls in (MTLModel, torchmtl.MTLModel)]
    for model in models:
        model.load_state_dict(g["init"], strict=True)
    yardstick = MovedStarts(lambda model: trained(model, g, g["y"], 60), models[0])
    loss, weight = torch.tensor(g["trace"]).unbind(1)
    yardstick.check({"loss": loss, "weight": weight, **g["final"]}, "upstream's")
    for model in models:
        found = trained(model, g, g["y"], 60)
        assert found.keys() == yardstick.exact.keys() == {"loss", "weight", *g["final"]}
        yardstick.check(found, type(model).__module__)


@pytest.mark.long
def test_three_regressions() -> None:
    """Upstream's first notebook: 500 steps."""
    g = load("mtl_triple_regression.pt")
    model = build(MTLModel, "triple_regression")
    model.load_state_dict(g["init"], strict=True)
    x, y = g["X"], [torch.full((16, 1), target) for target in (10.0, 20.0, 30.0)]
    torch.testing.assert_close(model(x)[0], [t.requires_grad_() for t in g["first"]], rtol=1e-6, atol=1e-6)

    def pieces(trace: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight[-1:], **{f"loss from {100 * k}": t for k, t in enumerate(trace.split(100))}}

    def run(model: Any) -> dict[str, Tensor]:
        made = trained(model, g, y, 500)
        model.load_state_dict({k: made[k] for k in model.state_dict()})
        return pieces(made["loss"], made["weight"])

    yardstick = MovedStarts(run, copy.deepcopy(model))
    yardstick.check(pieces(torch.tensor(g["trace"]), torch.tensor([g["auto_weight_final"]])), "upstream's")
    yardstick.check(run(model))
    for ours, target, near in zip(model(x)[0], (10, 20, 30), g["within_1"], strict=True):
        assert bool(((ours - target).abs() < 1).all()) == near


@pytest.mark.long
def test_learned_uncertainties() -> None:
    """Upstream's second notebook, 200 of its epochs: a node returns a tuple of a parameter and predictions."""
    g = load("mtl_uncertainty.pt")
    model = build(MTLModel, "uncertainty")
    model.load_state_dict(g["init"], strict=True)

    def run(model: Any) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        optimizer = torch.optim.Adam(model.parameters())
        random = np.random.RandomState(0)
        N = len(g["X"])
        random.randn(3 * N)  # the data's
        data, trace = [g[k].to(dtype) for k in ("X", "Y1", "Y2")], []
        for epoch in range(200):
            order = np.arange(N)
            random.shuffle(order)
            batches = zip(*(t[torch.from_numpy(order)].split(20) for t in data), strict=True)
            total = 0.0
            for x, *y in batches:
                optimizer.zero_grad()
                ((log_vars, y_hat),), (f,), (weight,) = model(x)
                assert f is weight is None
                terms = [(torch.exp(-v) * (a - b) ** 2 + v).sum(-1) for v, a, b in zip(log_vars, y_hat, y, strict=True)]
                loss = torch.stack(terms).sum(0).mean()
                total += float(loss.detach())
                loss.backward()
                optimizer.step()
            if epoch % 50 == 49:
                trace.append(total / 5)
        return {f"loss {k}": torch.tensor([loss], dtype=dtype) for k, loss in enumerate(trace)}

    yardstick = MovedStarts(run, copy.deepcopy(model))
    yardstick.check({name: torch.tensor([g["trace"][k]]) for k, name in enumerate(yardstick.exact)}, "upstream's")
    yardstick.check(run(model))
    model.load_state_dict(g["final"])
    ((log_vars, _),), _, _ = model(g["X"])
    torch.testing.assert_close(log_vars.detach().exp().sqrt(), g["std"])
