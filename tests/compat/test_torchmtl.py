"""Upstream's documented examples, unchanged, under its import paths; and where its ways differ from ours."""

from __future__ import annotations

import copy
import doctest
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute import multitask
from fastroute.compat import install, torchmtl
from fastroute.compat.torchmtl import MTLModel
from fastroute.compat.torchmtl.wrapping_layers import Concat, SimpleSelect
from fastroute.multitask.graph import Graph
from tests.helpers import seeds
from tests.helpers.multitask import README_TASKS, Tagged, load, readme, triple
from tests.helpers.subprocesses import check_python

README = """
from torch import manual_seed, randn, rand, optim
from torch.nn import Sequential, Linear, MSELoss, BCEWithLogitsLoss
from torchmtl.wrapping_layers import Concat
manual_seed(0)
tasks = [
    {'name': "Embed1", 'layers': Sequential(*[Linear(16, 32), Linear(32, 8)])},
    {'name': "Embed2", 'layers': Sequential(*[Linear(16, 32), Linear(32, 8)])},
    {'name': "CatTask", 'layers': Concat(dim=1), 'loss_weight': 1.0, 'anchor_layer': ['Embed1', 'Embed2']},
    {'name': "Task1", 'layers': Sequential(*[Linear(8, 32), Linear(32, 1)]), 'loss': MSELoss(), 'loss_weight': 1.0,
     'anchor_layer': 'Embed1'},
    {'name': "Task2", 'layers': Sequential(*[Linear(8, 64), Linear(64, 1)]), 'loss': BCEWithLogitsLoss(),
     'loss_weight': 1.0, 'anchor_layer': 'Embed2'},
    {'name': "FNN", 'layers': Sequential(*[Linear(16, 32), Linear(32, 32)]), 'anchor_layer': 'CatTask'},
    {'name': "Task3", 'layers': Sequential(*[Linear(32, 16), Linear(16, 1)]), 'anchor_layer': 'FNN', 'loss': MSELoss(),
     'loss_weight': 'auto', 'loss_init_val': 1.0},
]
from torchmtl import MTLModel
model = MTLModel(tasks, output_tasks=['Task1', 'Task2', 'Task3'])

import networkx as nx
pos = nx.planar_layout(model.g)
assert len(pos) == 8

optimizer = optim.AdamW(model.parameters(), lr=0.01)
data_loader = [(randn(16, 16), [randn(16, 1), (rand(16, 1) > 0.5).float(), randn(16, 1)])] * 30
trace = []
for X, y in data_loader:
    optimizer.zero_grad()
    y_hat, l_funcs, l_weights = model(X)
    loss = None
    for i in range(len(y_hat)):
        if not loss:
            loss = l_weights[i] * l_funcs[i](y_hat[i], y[i])
        else:
            loss += l_weights[i] * l_funcs[i](y_hat[i], y[i])
    loss.backward()
    optimizer.step()
    trace.append(loss.item())
assert trace[-1] < 0.7 * trace[0], trace
assert model.Task3_loss.shape == (1,) and model.Task3_loss.item() < 1
print("trained", __name__)
"""


def test_the_readme_as_a_script(tmp_path: Any) -> None:
    (tmp_path / "beside.py").write_text("here = True\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\nassert sys.argv[1:] == ['--epochs', '3'], sys.argv\n" + README)
    code = f"import sys; from fastroute.cli import main; sys.exit(main(['run', {str(script)!r}, '--epochs', '3']))"
    assert check_python(code) == "trained __main__\n"


def test_import_paths() -> None:
    assert torchmtl.__all__[0] == "MTLModel" and torchmtl.model_builder.MTLModel is torchmtl.MTLModel
    for name in ("Concat", "SimpleSelect", "SliceSelect"):
        assert getattr(torchmtl.wrapping_layers, name) is getattr(multitask, name)
    assert issubclass(MTLModel, multitask.MTLModel) and torchmtl.__version__ == "0.1.8"
    assert doctest.testmod(torchmtl).failed == 0


@pytest.mark.long
def test_install() -> None:
    code = """
import sys, types
from fastroute import compat
sys.modules["torchmtl"] = types.ModuleType("torchmtl")
try:
    compat.install()
except RuntimeError as error:
    print(error)
del sys.modules["torchmtl"]
compat.install()
from torchmtl import *
from torchmtl.model_builder import MTLModel as again
import torchmtl.wrapping_layers, heinsen_routing, routed_vgg, PytorchRouting.CoreLayers, taskrouting.taskrouting
from PytorchRouting.DecisionLayers.ReinforcementLearning import REINFORCE
import fastroute.compat.torchmtl as ours
assert MTLModel is again is ours.MTLModel
compat.install()  # twice is once
print("installed")
"""
    late = "torchmtl: expected to be installed before it is imported, found None imported already"
    assert check_python(code) == f"{late}\ninstalled\n"
    with pytest.raises(ValueError, match=r"names: expected some of heinsen_routing, .*, got 'torchMTL'"):
        install("torchMTL")


def test_outputs_of_the_last_call_and_copies() -> None:
    seeds.manual_seed(0)
    model = MTLModel(readme(), ["Task1"])
    model(torch.ones(2, 16))
    assert list(model.outputs) == ["root", "Embed1", "Embed2", "CatTask", "Task1", "Task2", "FNN", "Task3"]
    other = copy.deepcopy(model)  # which fails upstream
    assert not hasattr(other, "outputs") and type(other.Task3_loss) is type(model.Task3_loss)
    other(torch.ones(2, 16))
    assert torch.equal(other.outputs["Task3"], model.outputs["Task3"])


def test_repeated_anchors_are_one_argument() -> None:
    layers = [
        {"name": "a", "layers": Tagged("a"), "anchor_layer": ["root", "root"], "colour": "ignored"},
        {"name": "b", "layers": Tagged("b"), "anchor_layer": ["a", "root", "a"], "loss_weight": "any"},
    ]
    assert MTLModel(layers, ["b"])("x") == ([("b", ("a", "x"), "x")], [None], ["any"])


def test_names_with_dots() -> None:
    model = MTLModel([{"name": "a.b", "layers": nn.Linear(2, 1)}, {"name": "", "layers": Concat(0)}], ["a.b", ""])
    assert list(model.state_dict()) == ["a.b.weight", "a.b.bias"]
    assert model(torch.ones(3, 2))[0][0].shape == (3, 1)


def test_checkpoints_go_both_ways() -> None:
    g = load("mtl_readme.pt")
    theirs, ours = MTLModel(readme(), README_TASKS), multitask.MTLModel(readme(), README_TASKS)
    theirs.load_state_dict(g["state"], strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == g["graph"]["keys"]


def test_a_learned_weight_times_a_loss() -> None:
    """Has the loss's axes if it has none, which is all that differs from the product of a tensor [1]."""
    model = MTLModel(readme(init=0.7), README_TASKS)
    weight = model(torch.ones(2, 16))[2][2]
    assert weight is model.Task3_loss and isinstance(weight, nn.Parameter) and weight.is_leaf and weight.shape == (1,)
    loss = torch.tensor(2.0, requires_grad=True)
    for product in (weight * loss, loss.detach() * weight, weight * loss.detach()):
        assert float(product.detach().sum()) == pytest.approx(1.4)
    (weight * loss).backward()
    assert (weight * loss).shape == () and weight.grad.tolist() == [2.0] and float(loss.grad) == pytest.approx(0.7)  # type: ignore[arg-type]
    for other in (2, torch.ones(3), torch.ones(1)):
        assert torch.equal(weight * other, torch.Tensor(weight.detach()) * other)
        assert torch.equal(other * weight, torch.Tensor(weight.detach()) * other)
    assert type(weight * loss) is Tensor
    model.load_state_dict(model.state_dict(), assign=True)
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert (other.Task3_loss * loss).shape == () and torch.equal(other.Task3_loss, weight)
        assert other(torch.ones(2, 16))[2][2] is other.Task3_loss
    run = torch.compile(lambda: model.Task3_loss * loss, fullgraph=True, backend="eager")
    assert run().shape == () and torch.equal(run(), model.Task3_loss * loss)


def test_the_notebook_of_three_regressions() -> None:
    """Its loop works around the fault with an axis for every loss; that is fine, too."""
    torch.manual_seed(42)
    model = MTLModel(triple(), output_tasks=README_TASKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    X, truths = torch.rand((16, 16)), [torch.ones(16, 1) * k for k in (10.0, 20.0, 30.0)]
    trace = []
    for _ in range(60):
        optimizer.zero_grad()
        preds, loss_funcs, loss_weights = model(X)
        loss = None
        for i in range(len(preds)):
            cur = loss_weights[i] * loss_funcs[i](preds[i], truths[i]).unsqueeze(0)
            if loss is None:
                loss = cur
            else:
                loss += cur
        assert loss is not None and loss.shape == (1,)
        loss.backward()
        optimizer.step()
        trace.append(float(loss.detach()))
    assert trace[-1] < trace[0] / 10


def test_selections_before_their_declaration() -> None:
    """Two inputs, and a join that is declared after the task that uses it, as public code has it."""
    layers = [
        {"name": "task", "layers": nn.Linear(5, 1), "anchor_layer": ["join"], "loss": nn.MSELoss(), "loss_weight": 1},
        {"name": "join", "layers": Concat(dim=1), "anchor_layer": ["image", "clinical"]},
        {"name": "image", "layers": SimpleSelect(0)},
        {"name": "clinical", "layers": SimpleSelect(selection_axis=1)},
    ]
    model = MTLModel(layers, ["task"])
    a, b = torch.randn(4, 3), torch.randn(4, 2)
    outputs, _, weights = model([a, b])
    assert torch.equal(outputs[0], model.task(torch.cat((a, b), 1))) and weights == [1]


class Scaled(nn.Module):
    """A loss with a parameter of its own, and one that an optimizer would bring to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, yest: Tensor, y: Tensor) -> Tensor:
        return self.scale * (yest - y).square().mean()


def test_a_loss_with_parameters_is_not_the_models() -> None:
    """As upstream's, which the model's optimizer does not see: 50 steps are those of the loss without one."""
    trained = []
    for loss in (Scaled(), nn.MSELoss()):
        seeds.manual_seed(0)
        model = MTLModel([{"name": "A", "layers": nn.Linear(3, 1), "loss": loss, "loss_weight": 1.0}], ["A"])
        x, y = torch.randn(16, 3), torch.randn(16, 1)
        assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == ["A.weight", "A.bias"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(50):
            (out,), (function,), (weight,) = model(x)
            optimizer.zero_grad()
            (weight * function(out, y)).backward()
            optimizer.step()
        trained.append(model.state_dict())
        assert function is loss and model.losses["A"] is loss
    torch.testing.assert_close(trained[0], trained[1])
    model.losses["A"] = Scaled()
    assert len(list(model.parameters())) == 2
    assert model.double().losses["A"].scale.dtype == torch.float32
    ours = multitask.MTLModel([{"name": "A", "layers": nn.Linear(3, 1), "loss": Scaled()}], ["A"])
    assert len(list(ours.parameters())) == 3


@pytest.mark.parametrize("loss", [
    lambda: nn.CrossEntropyLoss(torch.ones(3)), lambda: nn.Sequential(nn.MSELoss()), Scaled, nn.MSELoss,
])  # fmt: skip
def test_losses_are_no_children(loss: Any) -> None:
    """They are in a dict, as upstream's: the last child is the last head; class weights follow the model."""
    model = MTLModel([{"name": n, "layers": nn.Linear(2, 3), "loss": loss()} for n in "AB"], ["A", "B"])
    model.losses["A"] = again = loss()
    assert list(model.children()) == [model.A, model.B] and list(model.modules()) == [model, model.A, model.B]
    assert [n for n, _ in model.named_buffers()] == [] and len(list(model.state_dict())) == 4
    assert copy.deepcopy(model).double() is not None and model.losses["A"] is again
    assert all(t.dtype == torch.float32 for t in again.buffers())
    assert model.double().losses["A"] is again and all(t.dtype == torch.float64 for t in again.buffers())


def test_output_tasks_is_a_list_to_be_changed() -> None:
    names = ["Task1"]
    model = MTLModel(readme(), names)
    x = torch.ones(2, 16)
    assert model.output_tasks is names and len(model(x)[0]) == 1
    model.output_tasks.append("Task3")
    outputs, losses, weights = model(x)
    assert torch.equal(outputs[1], model.outputs["Task3"]) and losses[1] is model.losses["Task3"]
    assert weights[1] is model.Task3_loss and len(model.forward_outputs(x)) == 2
    names.remove("Task1")  # the caller's own list
    assert torch.equal(model(x)[0][0], outputs[1])
    names.append("Task4")
    with pytest.raises(ValueError, match=r"output_tasks\[1\]: expected the name of a node, got 'Task4'; did you mean"):
        model(x)
    model.output_tasks = ["Task2"]
    other = copy.deepcopy(model)
    other.output_tasks.append("root")
    assert len(model(x)[0]) == 1 and len(other(x)[0]) == 2
    run = torch.compile(model, fullgraph=True, backend="eager")
    assert len(run(x)[0]) == 1
    ours = multitask.MTLModel(readme(), names := ["Task1"])
    ours.output_tasks.append("Task3")
    assert len(ours(x)[0]) == 2 and names == ["Task1"]


def test_losses_weights_and_graph_are_assigned() -> None:
    """As upstream's plain attributes: a call takes what was given; a learned weight that is given back stays so."""
    model, x = MTLModel(readme(), ["Task1", "Task3"]), torch.ones(2, 16)
    first, learned = nn.L1Loss(), model.Task3_loss
    model.losses = {"Task1": first}
    assert model(x)[1] == [first, None] and dict(model.losses) == {"Task1": first}
    model.losses = nn.ModuleDict({"Task3": first})
    assert model(x)[1] == [None, first] and "losses" not in model._modules
    model.loss_weights = {"Task3": learned, "Task1": 2.0}
    assert model(x)[2][0] == 2.0 and model(x)[2][1] is learned is model.Task3_loss
    model.loss_weights = {}
    assert model(x)[2] == [None, None] and "Task3_loss" in model.state_dict()
    for name in ("losses", "loss_weights"):
        before = dict(getattr(model, name))
        with pytest.raises(ValueError, match=rf"{name}: expected names of nodes, got \['Task9'\]"):
            setattr(model, name, {"Task9": 1.0})
        with pytest.raises(TypeError, match=f"{name}: expected a dict, got 3"):
            setattr(model, name, 3)
        assert dict(getattr(model, name)) == before
    layers = {name: nn.Linear(3, 3) for name in "AB"}
    chain = MTLModel([{"name": "A", "layers": layers["A"]}, {"name": "B", "layers": layers["B"], "anchor_layer": "A"}],
                     ["B"])  # fmt: skip
    chain.g = Graph(["root", "A", "B"], [("root", "B"), ("B", "A")])
    x = torch.ones(2, 3)
    assert list(chain.g.predecessors("A")) == ["B"] and torch.equal(chain(x)[0][0], layers["B"](x))
    assert torch.equal(chain.outputs["A"], layers["A"](layers["B"](x)))
    for bad in (Graph(["A", "B"], [("A", "B"), ("B", "A")]), Graph(["A"], []), 3):
        with pytest.raises(ValueError, match=r"g: expected|anchor|cycle"):
            chain.g = bad
        assert torch.equal(chain(x)[0][0], layers["B"](x))


def test_overrides_that_nobody_would_call() -> None:
    for name in ("_get_losses", "_bfs_forward", "_initialize_loss_weights"):
        with pytest.raises(TypeError, match=rf"Mine\.{name}: .* would change nothing; instead: forward, or set losses"):
            type("Mine", (MTLModel,), {name: lambda self: None})
