"""What forward returns, what the model holds, and that it is a Module like any other."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fastroute import TaskRouter
from fastroute.multitask import Concat, MTLModel, SimpleSelect
from tests.helpers import seeds
from tests.helpers.multitask import README_TASKS, mlp, readme, readme_by_hand

X = torch.randn(5, 16, generator=seeds.generator(0))


def model_of_readme(outputs: Any = README_TASKS, **options: Any) -> Any:
    seeds.manual_seed(0)
    return MTLModel(readme(), outputs, **options)


def equal(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ------------------------------------------------------------------------------------------------------------- forward


def test_the_triple() -> None:
    layers = readme()
    model = MTLModel(layers, README_TASKS)
    for mode in (True, False):
        made = model.train(mode)(X)
        assert isinstance(made, tuple) and all(type(part) is list for part in made)
        outputs, losses, weights = made
        assert equal(outputs, readme_by_hand(model, X))
        assert losses == [layers[3]["loss"], layers[4]["loss"], layers[6]["loss"]]
        assert weights[:2] == [1.0, 1.0] and weights[2] is model.Task3_loss
    assert model(input=X)[1] == losses
    assert model.task_layers is layers and model.layer_names == [entry["name"] for entry in layers]
    assert model.output_tasks == README_TASKS
    for entry in layers:
        assert getattr(model, entry["name"]) is entry["layers"]


def test_any_outputs() -> None:
    model = model_of_readme(["Task1", "root", "Embed1", "Task1", "CatTask"])
    outputs, losses, weights = model(X)
    assert outputs[0] is outputs[3] and outputs[1] is X and torch.equal(outputs[2], model.Embed1(X))
    assert [type(f) for f in losses] == [nn.MSELoss, type(None), type(None), nn.MSELoss, type(None)]
    assert weights == [1.0, None, None, 1.0, 1.0]
    assert model.unused == ["Task2", "FNN", "Task3"]
    assert model_of_readme([])(X) == ([], [], [])
    one = model_of_readme("Task2")
    assert one.output_tasks == ["Task2"] and len(one(X)[0]) == 1


def test_other_outputs_later() -> None:
    model = model_of_readme()
    model.output_tasks = ["Task2"]
    assert equal(model(X)[0], readme_by_hand(model, X)[1:2]) and model.unused == [
        "Embed1",
        "CatTask",
        "Task1",
        "FNN",
        "Task3",
    ]
    model.output_tasks = ("Task3", "Task1")
    assert equal(model(X)[0], [readme_by_hand(model, X)[2], readme_by_hand(model, X)[0]]) and model.unused == ["Task2"]


def test_layers_that_are_replaced() -> None:
    model = model_of_readme()
    model.Task1 = nn.Linear(8, 2)
    model.CatTask = lambda a, b: torch.cat((b, a), 1)
    model._modules["Embed2"] = mlp(16, 8)
    a, b = model.Embed1(X), model.Embed2(X)
    expected = [model.Task1(a), model.Task2(b), model.Task3(model.FNN(torch.cat((b, a), 1)))]
    assert equal(model(X)[0], expected) and expected[0].shape == (5, 2)
    model.CatTask = nn.Bilinear(8, 8, 16)  # a Module in place of a function, and back
    assert (
        torch.equal(model(X)[0][2], model.Task3(model.FNN(model.CatTask(a, b))))
        and "CatTask.weight" in model.state_dict()
    )
    del model.CatTask
    model.CatTask = Concat(1)
    assert model(X)[0][2].shape == (5, 1)


def test_hooks_run() -> None:
    model, seen = model_of_readme(), []
    model.FNN.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(X)
    assert seen == [(5, 32)]


def test_unneeded_nodes() -> None:
    ran: list[str] = []
    layers = [{"name": n, "layers": lambda x, n=n: ran.append(n) or x} for n in "abc"]
    MTLModel(layers, ["b"])(1)
    assert ran == ["b"]
    ran.clear()
    MTLModel(layers, ["b"], run_all=True)(1)
    assert ran == ["a", "b", "c"]


def test_random_numbers_are_upstreams_in_breadth_first_order() -> None:
    """A queue runs the second branch before the rest of the first; the list's order is another stream."""
    layers = [
        {"name": "a1", "layers": nn.Dropout(0.5)},
        {"name": "a2", "layers": nn.Dropout(0.5), "anchor_layer": "a1"},
        {"name": "b1", "layers": nn.Dropout(0.5)},
    ]
    x = torch.ones(64)

    def draws(**options: Any) -> dict[str, Tensor]:
        seeds.manual_seed(0)
        model = MTLModel(layers, ["a1", "a2", "b1"], **options)
        return dict(zip(model.output_tasks, model(x)[0], strict=True))

    seeds.manual_seed(0)
    first, second = nn.functional.dropout(x), nn.functional.dropout(x)
    listed, queued = draws(), draws(order="bfs")
    assert torch.equal(listed["a1"], first) and torch.equal(queued["a1"], first)
    assert torch.equal(queued["b1"], second) and not torch.equal(listed["b1"], second)
    assert torch.equal(listed["a2"], first * second)


def test_anything_goes_through_the_graph() -> None:
    """An input of several kinds, and a task for each sample on its way to a router."""
    seeds.manual_seed(0)
    layers = [
        {"name": "routed", "layers": TaskRouter(8, 3, 0.5), "anchor_layer": ["image", "task"]},
        {"name": "image", "layers": SimpleSelect("image")},
        {"name": "task", "layers": SimpleSelect("task")},
        {"name": "meta", "layers": lambda data, task: {"ids": task, "n": len(data)}, "anchor_layer": ["root", "task"]},
    ]
    model = MTLModel(layers, ["routed", "meta"])
    data = {"image": torch.randn(4, 8, 2), "task": torch.tensor([0, 2, 1, 2])}
    (routed, meta), _, _ = model(data)
    assert torch.equal(routed, data["image"] * model.routed.get_unit_mapping()[data["task"], :, None])
    assert meta == {"ids": data["task"], "n": 2}


# -------------------------------------------------------------------------------------------------- losses and weights


def test_losses_and_weights_by_name() -> None:
    layers = readme()
    model = MTLModel(layers, README_TASKS)
    assert dict(model.losses) == {n: layers[k]["loss"] for n, k in zip(README_TASKS, (3, 4, 6), strict=True)}
    assert model.loss_weights == {"CatTask": 1.0, "Task1": 1.0, "Task2": 1.0, "Task3": model.Task3_loss}
    assert repr(model.losses) == "{'Task1': MSELoss(), 'Task2': BCEWithLogitsLoss(), 'Task3': MSELoss()}"
    assert len(model.losses) == 3 and "FNN" not in model.losses and model.losses.get("FNN") is None
    for key in ("loss", "loss_weight"):  # a key with None is a key
        nones = MTLModel([{"name": "a", "layers": nn.Identity(), key: None}], ["a"])
        assert len(nones.losses) + len(nones.loss_weights) == 1 and nones(1) == ([1], [None], [None])


def test_losses_and_weights_that_are_changed() -> None:
    model = model_of_readme()
    model.losses["FNN"] = model.losses["Task1"] = nn.L1Loss()
    model.loss_weights["Task1"] = 0.25
    model.loss_weights["Task3"] = 2
    _, losses, weights = model(X)
    assert type(losses[0]) is nn.L1Loss and weights == [0.25, 1.0, 2] and "Task3_loss" in model.state_dict()
    del model.losses["Task1"], model.loss_weights["Task1"]
    assert model(X)[1][0] is model(X)[2][0] is None and "FNN" in model.losses


def test_learned_weights() -> None:
    """A Parameter [1], first in the state dict, never stale."""
    model = MTLModel(readme(init=2), README_TASKS, dtype=torch.float64)  # type: ignore[arg-type]
    assert torch.equal(model.Task3_loss, torch.tensor([2.0], dtype=torch.float64)) and isinstance(
        model.Task3_loss, nn.Parameter
    )
    assert next(iter(model.state_dict())) == next(name for name, _ in model.named_parameters()) == "Task3_loss"
    model = model_of_readme()
    model.load_state_dict({k: t + 1 for k, t in model.state_dict().items()}, assign=True)
    for found in (model.loss_weights["Task3"], model(X)[2][2], dict(model.loss_weights)["Task3"]):
        assert found is model.Task3_loss and torch.equal(found, torch.tensor([1.7]))
    swapped = functional_call(model, {"Task3_loss": torch.zeros(1)}, (X,))
    assert torch.equal(swapped[2][2], torch.zeros(1)) and torch.equal(model.loss_weights["Task3"], torch.tensor([1.7]))
    model.double()
    assert model(X.double())[2][2].dtype == torch.float64
    assert MTLModel(readme(), README_TASKS, device="meta").Task3_loss.is_meta


def test_learned_weights_are_reset() -> None:
    model = MTLModel(readme(init=2), README_TASKS, device="meta")  # type: ignore[arg-type]
    model._parameters["Task3_loss"] = nn.Parameter(torch.full((1,), 9.0))
    model.reset_parameters()
    assert model.Task3_loss.tolist() == [2.0]


def test_gradients_by_functional_call() -> None:
    model = model_of_readme()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def total(parameters: dict[str, Tensor]) -> Tensor:
        outputs, losses, weights = functional_call(model, parameters, (X,))
        terms = [w * f(y, torch.ones(5, 1)) for y, f, w in zip(outputs, losses, weights, strict=True)]
        return torch.cat([term.reshape(1) for term in terms]).sum()

    found = grad(total)(parameters)
    total(dict(model.named_parameters())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


class Huber(nn.Module):
    """A loss that is trained, with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.register_buffer("delta", torch.ones(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (nn.functional.huber_loss(a, b) * self.log_scale.exp() + self.log_scale).sum() * self.delta


def with_losses(*losses: Any) -> Any:
    seeds.manual_seed(0)
    return MTLModel(
        [{"name": f"t{k}", "layers": nn.Linear(16, 2), "loss": loss} for k, loss in enumerate(losses)],
        [f"t{k}" for k in range(len(losses))],
    )


def test_losses_move_with_the_model() -> None:
    shared = nn.CrossEntropyLoss(torch.ones(2))
    model = with_losses(nn.BCEWithLogitsLoss(pos_weight=torch.ones(2)), shared, nn.MSELoss(), None, shared, len)
    assert [name for name, _ in model.loss_modules.named_children()] == ["t0", "t1"]  # named_children: once each
    assert model.losses["t4"] is shared and list(model.loss_modules._modules) == ["t0", "t1", "t4"]
    model.double()
    assert model.losses["t0"].pos_weight.dtype == model(X.double())[1][1].weight.dtype == torch.float64
    model.to("meta")
    assert model.losses["t0"].pos_weight.is_meta
    assert list(model.state_dict()) == [f"t{k}.{part}" for k in range(6) for part in ("weight", "bias")]
    bare = with_losses(nn.MSELoss(), nn.L1Loss())
    assert [name for name, _ in bare.named_children()] == ["t0", "t1"] and not hasattr(bare, "loss_modules")


def test_losses_that_are_trained() -> None:
    """Are among the parameters and in the state dict; one without them loads, in a model within a model, too."""
    model = with_losses(Huber(), nn.MSELoss())
    keys = [f"t{k}.{part}" for k in range(2) for part in ("weight", "bias")]
    assert (
        [name for name, _ in model.named_parameters()]
        == [*keys, "loss_modules.t0.log_scale"]
        == list(model.state_dict())
    )
    y_hat, (f, _), _ = model(X)
    f(y_hat[0], torch.ones(5, 2)).backward()
    assert model.losses["t0"].log_scale.grad is not None
    with torch.no_grad():
        model.losses["t0"].log_scale.fill_(3)
        model.losses["t0"].delta.fill_(5)
    fresh = with_losses(Huber(), nn.MSELoss())
    for assign in (False, True):
        outer, inner = nn.ModuleDict({"m": fresh}), nn.ModuleDict({"m": model})
        state = {k: t.clone() for k, t in inner.state_dict().items()}
        assert list(state) == [f"m.{k}" for k in [*keys, "loss_modules.t0.log_scale"]]
        outer.load_state_dict(state, strict=True, assign=assign)
        assert fresh.losses["t0"].log_scale.tolist() == [3, 3] and fresh.losses["t0"].delta.item() == 1
        state.pop("m.loss_modules.t0.log_scale")
        outer.load_state_dict(state, strict=True, assign=assign)
        assert fresh.losses["t0"].log_scale.tolist() == [3, 3]
        with pytest.raises(RuntimeError, match="Unexpected key"):
            outer.load_state_dict({**state, "m.loss_modules.t9.x": torch.ones(1)})
    old = {k: t for k, t in model.state_dict().items() if k in keys}
    assert not any(with_losses(Huber(), nn.MSELoss()).load_state_dict(old, strict=True))
    found = functional_call(model, {"loss_modules.t0.log_scale": torch.zeros(2)}, (X,))  # found by its name
    assert found[1][0] is model.losses["t0"]


def test_a_loss_that_is_a_layer_is_one_module() -> None:
    both = Huber()
    layers = [
        {"name": "a", "layers": nn.Linear(16, 2)},
        {"name": "b", "layers": both, "anchor_layer": ["a", "a"], "loss": both},
    ]
    model = MTLModel(layers, ["b"])
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.log_scale", "b.delta"]


def test_a_loss_with_tensors_that_is_put_in_later() -> None:
    model = model_of_readme()
    model.losses["Task1"] = nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))
    assert model.double().losses["Task1"].pos_weight.dtype == torch.float64
    model.losses["Task1"] = nn.MSELoss()
    assert not list(model.loss_modules.children())
    model.losses["Task2"] = Huber()
    del model.losses["Task2"]
    assert not list(model.loss_modules.children()) and model(X.double())[1][1] is None


# ------------------------------------------------------------------------------------------------- a Module like others


@pytest.mark.parametrize("options", [{}, {"keep_outputs": True}, {"order": "bfs", "run_all": True}])
def test_copies_and_files(options: dict[str, Any]) -> None:
    """Before and after a call, and without its activations."""
    model = model_of_readme(**options)
    size = len(pickle.dumps(model))
    expected = [y.detach() for y in model(torch.randn(4096, 16)) and model(X)[0]]
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert len(pickle.dumps(model)) == size
    for other in (copied, loaded, torch.load(stored, weights_only=False)):
        assert equal(other(X)[0], expected) and other.Task3_loss is not model.Task3_loss
        assert other(X)[2][2] is other.Task3_loss and other.losses["Task1"] is other.task_layers[3]["loss"]
        assert other.layer_names == model.layer_names and list(other.g.edges) == list(model.g.edges)
        with torch.no_grad():
            other.Embed1[0].weight.zero_()
        assert not equal(other(X)[0], expected) and equal(model(X)[0], expected)


def test_kept_outputs() -> None:
    model = model_of_readme(["Task1"], keep_outputs=True)
    assert not hasattr(model, "outputs")
    model(X)
    assert list(model.outputs) == ["root", "Embed1", "Task1"] and model.outputs["root"] is X
    assert torch.equal(model.outputs["Embed1"], model.Embed1(X))
    assert not hasattr(copy.deepcopy(model), "outputs")
    model = model_of_readme()
    model.keep_outputs = True
    model(X)
    assert list(model.outputs) == ["root", *model.layer_names]
    for name in ("Embed1", "Embed2", "Task1"):
        assert torch.equal(
            model.outputs[name], getattr(model, name)(model.outputs["Embed1" if name == "Task1" else "root"])
        )


def test_calls_within_calls() -> None:
    """A node may call its own model: nothing of a call is held by the model."""
    model: Any = MTLModel(
        [
            {"name": "a", "layers": lambda x: x + 1},
            {"name": "b", "layers": lambda x, a: model(x - 1)[0][0] + a if x > 0 else a, "anchor_layer": ["root", "a"]},
        ],
        ["b"],
    )
    assert model(3)[0] == [4 + 3 + 2 + 1]


def test_it_is_shown_with_its_functions() -> None:
    shown = repr(model_of_readme())
    assert "(CatTask): Concat(dim=1)" in shown and shown.index("(Embed1)") < shown.index("(Task3)")


def test_nothing_waits_and_vmap_works() -> None:
    model = model_of_readme().requires_grad_(False)
    x = torch.randn(3, 5, 16)
    found = torch.vmap(lambda x: tuple(model.forward_outputs(x)))(x)
    for k in range(3):
        for a, b in zip(found, model(x[k])[0], strict=True):
            torch.testing.assert_close(a[k], b)


def test_outputs_only() -> None:
    model = model_of_readme()
    only = model.outputs_only()
    assert equal(only(X), model(X)[0]) and only.model is model and isinstance(only(X), list)
    assert list(only.state_dict()) == [f"model.{k}" for k in model.state_dict()]
