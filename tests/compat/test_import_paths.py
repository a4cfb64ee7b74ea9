"""Every module path and public name of the four upstreams, under ``fastroute.compat`` and under their own names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fastroute import compat
from fastroute.compat import heinsen_routing, imports
from fastroute.compat.heinsen_routing_2019 import Routing
from tests.compat.test_pytorch_routing import TREE
from tests.helpers import seeds
from tests.helpers.subprocesses import check_python

CAPSULES = "EfficientVectorRouting DefinableVectorRouting GenerativeMatrixRouting Routing math torch nn"
ROUTER = "TaskRouter device"
VGG = "VGG vgg11 vgg11_bn make_layers cfg model_urls"
#: Module -> its names.
UPSTREAMS: dict[str, str] = {
    "heinsen_routing": CAPSULES,
    "heinsen_routing.heinsen_routing": CAPSULES,
    "taskrouting": ROUTER,
    "taskrouting.taskrouting": ROUTER,
    "taskrouting.routed_vgg": VGG,
    "TaskRouting": "taskrouting routed_vgg",
    "TaskRouting.taskrouting": ROUTER,
    "TaskRouting.routed_vgg": VGG,
    "routed_vgg": VGG,
    "torchmtl": "MTLModel model_builder wrapping_layers __version__",
    "torchmtl.model_builder": "MTLModel LAYER_KEY NAME_KEY ANCHOR_KEY LOSS_KEY LOSS_REG_KEY AUTO_WEIGHT_KEY "
    "WEIGHT_INIT_KEY MISSING_WEIGHT_MSG",
    "torchmtl.wrapping_layers": "Concat SimpleSelect SliceSelect",
    "PytorchRouting": "CoreLayers DecisionLayers Helpers PreFabs RewardFunctions UtilLayers",
    **{f"PytorchRouting.{path}": names for path, names in TREE.items()},
    "PytorchRouting.DecisionLayers.Others.RELAX": "RELAX make_samples entropy",
    "PytorchRouting.RewardFunctions": "Final PerAction",
    "PytorchRouting.DecisionLayers.Others": "GumbelSoftmax PassThrough PerTaskAssignment RELAX",
    "PytorchRouting.DecisionLayers.ReinforcementLearning": "AAC ActorCritic AdvantageLearning QLearning REINFORCE "
    "SARSA WPL",
}


pytestmark = pytest.mark.usefixtures("imports_as_before")


@pytest.mark.parametrize("module", UPSTREAMS)
def test_names(module: str) -> None:
    """The same object by both paths; constants have upstream's values."""
    compat.install()
    top = module.split(".")[0]
    ours = importlib.import_module(imports.UPSTREAMS[top] + module.removeprefix(top))
    theirs = importlib.import_module(module)
    assert theirs is ours and ours.__spec__.name == ours.__name__
    for name in UPSTREAMS[module].split():
        space: dict[str, object] = {}
        exec(f"from {module} import {name}", space)  # as scripts do
        assert space[name] is getattr(ours, name) or name == "device"
    exec(f"from {module} import *", {})


def test_the_table_is_whole() -> None:
    """Every module that is here is in the table."""
    compat.install()
    found = set()
    for folder in ("heinsen_routing", "PytorchRouting", "taskrouting", "torchmtl"):
        root = Path(compat.__file__).parent / folder
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            if not parts[-1].startswith("_") or parts[-1] == "__init__":
                found.add(".".join(part for part in parts if part != "__init__"))
    assert found - set(UPSTREAMS) <= {"PytorchRouting.Helpers"}


def test_a_star_import_serves_both_generations() -> None:
    space: dict[str, object] = {}
    compat.install("heinsen_routing")
    exec("from heinsen_routing import *", space)
    assert space["Routing"] is Routing and space["torch"] is torch
    assert space["EfficientVectorRouting"] is heinsen_routing.EfficientVectorRouting


def test_constants_have_upstreams_values() -> None:
    from fastroute.compat.torchmtl import model_builder as keys

    made = (keys.NAME_KEY, keys.LAYER_KEY, keys.ANCHOR_KEY, keys.LOSS_KEY, keys.LOSS_REG_KEY, keys.WEIGHT_INIT_KEY)
    assert made == ("name", "layers", "anchor_layer", "loss", "loss_weight", "loss_init_val")
    assert keys.AUTO_WEIGHT_KEY == "auto"
    from fastroute.compat.taskrouting import device

    assert device == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with pytest.raises(AttributeError, match="has no attribute 'devices'"):
        importlib.import_module("fastroute.compat.taskrouting.taskrouting").devices  # noqa: B018


def test_a_module_is_called_like_its_class() -> None:
    """As in RoutingNetworks' README."""
    from fastroute.compat import PytorchRouting

    others = PytorchRouting.DecisionLayers.Others
    assert isinstance(others.PerTaskAssignment(), others.PerTaskAssignment.PerTaskAssignment)
    assert others.PassThrough().training and others.RELAX(3, 4)._num_selections == 3
    learning = PytorchRouting.DecisionLayers.ReinforcementLearning
    assert isinstance(learning.WPL(3, 4), learning.WPL.WPL)


@pytest.mark.parametrize("scores", [(5,), (1, 5), (2, 1, 5), (2, 3, 1)])
@pytest.mark.parametrize("generation", [2019, 2022])
def test_scores_broadcast(scores: tuple[int, ...], generation: int) -> None:
    layer = Routing(2, 3, 4, 5, 6) if generation == 2019 else heinsen_routing.GenerativeMatrixRouting(5, 6, 2, 3, 4)
    a, mu = torch.randn(scores), torch.randn(3, 5, 2, 3)
    whole = torch.broadcast_shapes(a.shape, (3, 5))
    made, expected = layer(a, mu), layer(a.expand(whole).clone(), mu.expand(*whole, 2, 3).clone())
    for x, y in zip(made, expected, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="a_inp: expected"):
        layer(torch.randn(4), mu)


# ----------------------------------------------------------------------------------------------------- sampling helpers


def test_relaxed_samples() -> None:
    """RELAX's draws: the hard choice, and two soft ones of which the second is conditioned on it."""
    from fastroute.compat.PytorchRouting.DecisionLayers.Others.RELAX import entropy, make_samples

    seeds.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3).clone().requires_grad_()
    hard, soft, conditional = make_samples(logits, 0.5)
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    share = torch.bincount(hard, minlength=3) / 4000
    assert ((share - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()
    assert torch.equal(soft.argmax(1), hard) and torch.allclose(soft.sum(1), torch.ones(4000))
    assert torch.allclose(conditional.sum(1), torch.ones(4000)) and soft.requires_grad and conditional.requires_grad
    torch.testing.assert_close(entropy(p[None]), -(p * p.log()).sum()[None])


def test_straight_through_sampling() -> None:
    from fastroute.compat.PytorchRouting.DecisionLayers.Others.GumbelSoftmax import GumbelSoftmaxSampling

    seen: list[torch.Tensor] = []
    sampling = GumbelSoftmaxSampling(temperature_init=0.5, hook=lambda g: seen.append(g))
    sampling.set_temperature(2.0)
    logits = torch.zeros(6, 3, requires_grad=True)
    index, multiplier = sampling.sample(logits)
    assert index.shape == multiplier.shape == (6, 1) and torch.equal(multiplier.detach(), torch.ones(6, 1))
    multiplier.sum().backward()
    assert len(seen) == 1 and sampling._temperature == 2.0
    soft = GumbelSoftmaxSampling(1.0, hard=False)(logits)
    assert torch.allclose(soft.sum(1), torch.ones(6)) and float(soft.max()) < 1


# ------------------------------------------------------------------------------------------- the upstream's own folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like RoutingNetworks': a package whose own code must not run, and examples."""
    examples = tmp_path / "PytorchRouting" / "Examples"
    examples.mkdir(parents=True)
    (tmp_path / "PytorchRouting" / "__init__.py").write_text("raise RuntimeError('the upstream itself')\n")
    (examples / "__init__.py").touch()
    (examples / "Models.py").write_text(
        "from PytorchRouting.CoreLayers import Selection\nfrom ..CoreLayers import Loss\nclass Net: pass\n"
    )
    return tmp_path


def test_what_else_the_package_holds(clone: Path) -> None:
    compat.install()
    with pytest.raises(ModuleNotFoundError, match=r"PytorchRouting\.Examples"):
        importlib.import_module("PytorchRouting.Examples")
    sys.path.insert(0, str(clone))
    models = importlib.import_module("PytorchRouting.Examples.Models")
    assert models.Selection is importlib.import_module("fastroute.compat.PytorchRouting.CoreLayers").Selection
    space: dict[str, object] = {}
    exec("from PytorchRouting import Examples\nimport PytorchRouting.Examples.Models as models", space)
    assert space["models"] is models and space["Examples"] is importlib.import_module("PytorchRouting.Examples")
    assert importlib.import_module("PytorchRouting").__name__ == "fastroute.compat.PytorchRouting"
    for name in ("PytorchRouting.Examples.Zoo", "torchmtl.nothing", "PytorchRouting.CoreLayers.Loss.deep"):
        with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[0]):
            importlib.import_module(name)


@pytest.mark.long
def test_a_process_that_starts_with_the_folder_on_its_path(clone: Path) -> None:
    """As those that a program starts do; a sitecustomize of the user's is read as well."""
    (clone / "sitecustomize.py").write_text("import sys; sys.customized = True\n")
    code = f"""
import sys
assert sys.customized and "fastroute" not in sys.modules and "torch" not in sys.modules
sys.path.insert(0, {str(clone)!r})  # before ours: ours is found all the same
import PytorchRouting.Examples.Models as models
print(models.Selection.__module__)
"""
    root = str(Path(compat.__file__).resolve().parents[2])
    path = ":".join([imports.ON_PATH, str(clone), root])
    assert check_python(code, {"PYTHONPATH": path}) == "fastroute.compat.PytorchRouting.CoreLayers.Selection\n"


@pytest.mark.long
def test_a_process_with_the_folder_on_its_path_later() -> None:
    """As where Python ignores the environment."""
    root = str(Path(compat.__file__).resolve().parents[2])
    code = f"import sys; sys.path += {[imports.ON_PATH, root]!r}; import torchmtl.model_builder as m; print(m.__name__)"
    assert check_python(code, {"PYTHONPATH": None}) == "fastroute.compat.torchmtl.model_builder\n"
