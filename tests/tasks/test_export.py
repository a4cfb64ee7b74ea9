"""One task's network on its own: extracted, folded; and what tasks share."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute.tasks import VGG, TaskRouter, extract_task, fold, live, mask_overlap, route, set_task, vgg11, vgg11_bn
from tests.tasks.nets import T, assert_same, conv_net, generator, images, passes


def settled(batch_norm: bool) -> nn.Sequential:
    """In eval, with statistics that are not those of the start."""
    net = conv_net(batch_norm)
    for task in range(T):
        passes(net, images(seed=task), task)
    return net.eval()


def output(model: nn.Module, task: int) -> dict[str, Tensor]:
    set_task(model, task)
    return {"y": model(images()).detach()}


def channels(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("is_live", [False, True])
def test_extracted_equals_routed(is_live: bool, batch_norm: bool) -> None:
    model = settled(batch_norm)
    before = copy.deepcopy(model.state_dict())
    for task in range(T):
        small = extract_task(live(copy.deepcopy(model)) if is_live else model, task)
        assert_same({"y": small(images()).detach()}, output(model, task))
        assert channels(small) == [4, 6, 5]
        assert all(type(m).__module__.startswith("torch.nn.modules") for m in small.modules())
    assert_same(dict(model.state_dict()), before)
    keys = [k for k in model.state_dict() if "_unit_mapping" not in k]
    assert list(small.state_dict()) == keys
    assert small.training is False and not any(m.training for m in small.modules())
    mine = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in mine for p in small.parameters())


def test_extracted_trains_like_the_routed_one() -> None:
    """Until the first step: dead parameters get no gradient, live ones the same."""
    model = settled(True).train()
    small = extract_task(model, 2)
    routed = passes(model, images(), 2)
    y = small(images())
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    kept = model[0][2].get_unit_mapping()[2] != 0
    assert_same({"dw": small[0][0].weight.grad}, {"dw": routed["d0.0.weight"][kept]})  # type: ignore[index]


@pytest.mark.parametrize("make", [vgg11, vgg11_bn])
def test_vgg(make: type[nn.Module]) -> None:
    model = make(task_count=3, sigma=0.75, generator=generator()).eval()
    small, folded = extract_task(model, 1), fold(model, 1)
    x = torch.randn(1, 3, 32, 32)
    set_task(model, 1)
    torch.testing.assert_close(small(x), model(x))
    torch.testing.assert_close(folded(x), model(x))
    assert channels(small) == [16, 32, 64, 64, 128, 128, 128, 128]
    assert set(small.state_dict()) <= set(model.state_dict())
    assert small.classifier_1[0].weight.shape == (2, 128 * 49)  # type: ignore[index,union-attr]


class Custom(nn.Module):
    """As torchvision's VGG: a forward of its own over Sequentials."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(24, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 2))
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.avgpool(self.features(x))
        y = torch.flatten(F.relu(y), 1)
        return self.classifier(y) + (y.sum() if self.branch else 0)  # type: ignore[no-any-return]


class Chain(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.relu(self.avgpool(self.features(x))), 1))  # type: ignore[no-any-return]


def test_a_module_with_a_forward_of_its_own() -> None:
    model = route(Chain().double(), T, 0.5, generator=generator()).eval()
    small = extract_task(model, 3)
    assert_same({"y": small(images()).detach()}, output(model, 3))
    assert_same({"y": fold(model, 3)(images()).detach()}, output(model, 3))
    assert_same(output(live(copy.deepcopy(model)), 3), output(model, 3))
    with pytest.raises(ValueError, match=r"branches cannot be followed"):
        extract_task(route(Custom(branch=True), T, 0.5), 0)


BLOCKED = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "fastroute":
                raise ImportError("blocked")
    sys.meta_path.insert(0, Blocker())
    import torch
    torch.serialization.add_safe_globals([])
    model = torch.load(sys.argv[1], weights_only=False)
    given = torch.load(sys.argv[2], weights_only=True)
    torch.testing.assert_close(model(given["x"]), given["y"], rtol=0, atol=0)
    assert not any(name.split(".")[0] == "fastroute" for name in sys.modules)
"""


def test_runs_where_fastroute_is_not_installed(tmp_path: Path) -> None:
    small = extract_task(settled(True), 1)
    torch.save(small, tmp_path / "model.pt")
    torch.save({"x": images(), "y": small(images()).detach()}, tmp_path / "given.pt")
    command = [sys.executable, "-c", textwrap.dedent(BLOCKED), str(tmp_path / "model.pt"), str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- fold


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_folded_equals_routed(batch_norm: bool, training: bool) -> None:
    model = settled(batch_norm).train(training)
    for task in (0, 3):
        folded = fold(model, task)
        assert not any(isinstance(m, TaskRouter) for m in folded.modules())
        y = folded(images()).detach()
        assert_same({"y": y}, output(copy.deepcopy(model), task))
    keys = [k for k in model.state_dict() if "_unit_mapping" not in k]
    assert list(folded.state_dict()) == keys
    assert len(folded[0]) == len(model[0])  # type: ignore[arg-type,index]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)],
        [nn.ConvTranspose2d(3, 6, 2)],
        [nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2)],
    ],
    ids=["BatchNorm without parameters", "transposed", "grouped, behind pooling"],
)
def test_fold_into(layers: list[nn.Module]) -> None:
    model = nn.Sequential(*layers, TaskRouter(6, T, 3, generator=generator()), nn.Sigmoid()).double().eval()
    assert_same({"y": fold(model, 2)(images()).detach()}, output(model, 2))


# ---------------------------------------------------------------------------------------------- overlap


def test_overlap_of_known_masks() -> None:
    a, b = TaskRouter(4, 2, 1), TaskRouter(2, 2, 1)
    a.get_unit_mapping().copy_(torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]))
    b.get_unit_mapping().copy_(torch.tensor([[1, 0], [0, 1]]))
    model = nn.Sequential(a, b)
    found = mask_overlap(model)
    assert found.routers["0"].tolist() == [[1, 0.5], [0.5, 1]]
    assert found.routers["1"].tolist() == [[1, 0], [0, 1]]
    assert found.overall.tolist() == [[1, 2 / 6], [2 / 6, 1]]
    assert mask_overlap(model, "shared").overall.tolist() == [[1, 0.5], [0.5, 1]]
    with pytest.raises(ValueError, match=r'measure: expected "jaccard" or "shared", got \'cosine\''):
        mask_overlap(model, "cosine")


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 9), st.sampled_from(["jaccard", "shared"]))
def test_overlap_of_any_masks(units: int, tasks: int, off: int, measure: str) -> None:
    router = TaskRouter(units, tasks, off, generator=generator())
    kept = [{int(c) for c in row.nonzero()[:, 0]} for row in router.get_unit_mapping()]
    found = mask_overlap(router, measure)
    for i, a in enumerate(kept):
        for j, b in enumerate(kept):
            whole = len(a | b) if measure == "jaccard" else len(a)
            assert float(found.overall[i, j]) == (len(a & b) / whole if whole else 0.0)
    assert torch.equal(found.overall, found.routers["router"])


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_names_the_place() -> None:
    for fn in (extract_task, fold):
        with pytest.raises(IndexError, match=r"task: expected a task from 0 to 4, got 5"):
            fn(conv_net(), 5)
        with pytest.raises(TypeError, match=r"task: expected an int"):
            fn(conv_net(), torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"got none in Linear"):
            fn(nn.Linear(2, 2), 0)
    router = TaskRouter(4, T, 2)
    conv, after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    with pytest.raises(ValueError, match=r"^1: expected a convolution, Linear or norm before.*got Sigmoid"):
        fold(nn.Sequential(nn.Sigmoid(), router), 0)
    with pytest.raises(ValueError, match=r"^2: expected layers that treat channels alone.*Sigmoid"):
        extract_task(nn.Sequential(conv, router, nn.Sigmoid(), after), 0)
    with pytest.raises(ValueError, match=r"^2: expected layers that treat channels alone.*got Softmax"):
        extract_task(nn.Sequential(conv, router, nn.Softmax(1), after), 0)
    with pytest.raises(ValueError, match=r"^0: expected a convolution or Linear before the router"):
        extract_task(nn.Sequential(router, after), 0)
    with pytest.raises(ValueError, match=r"^1: expected a layer after the last router that reads all channels"):
        extract_task(nn.Sequential(conv, router), 0)
    with pytest.raises(ValueError, match=r"expected a task with units in every router, got 0"):
        extract_task(nn.Sequential(conv, TaskRouter(4, T, 4), after), 0)
    with pytest.raises(ValueError, match=r"expected routers for one number of tasks, got \{'0': 5, '1': 2\}"):
        mask_overlap(nn.Sequential(router, TaskRouter(4, 2, 1)))

    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"^3: expected modules of torch\.nn without hooks, got Mine"):
        extract_task(nn.Sequential(conv, router, after, Mine()), 0)


class InPlace(nn.Module):
    """A chain, but for a result that nobody takes."""

    def __init__(self, what: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.router, self.what, self.last = nn.Linear(4, 8), TaskRouter(8, T, 0.5), what, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.router(self.first(x))
        self.what(y)
        return self.last(y)  # type: ignore[no-any-return]


class Rounded(VGG):
    def forward(self, x: Tensor, task: object = None) -> Tensor:
        return super().forward(x, task).round()  # type: ignore[arg-type]


def hooked(model: nn.Module, part: str = "") -> nn.Module:
    model.get_submodule(part).register_forward_hook(lambda m, x, y: 2 * y)
    return model


def small_vgg(cls: type[VGG] = VGG) -> VGG:
    return cls(nn.Sequential(nn.Conv2d(3, 8, 3), TaskRouter(8, T, 0.5), nn.ReLU()), T, bottleneck_spatial=(1, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: InPlace(lambda y: F.relu(y, inplace=True)), "relu: expected a layer whose result the next one takes"),
        (lambda: InPlace(lambda y: y.mul_(2)), "mul_: expected a layer whose result the next one takes"),
        (lambda: InPlace(nn.ReLU(inplace=True)), "what: expected a layer whose result the next one takes"),
        (lambda: small_vgg(Rounded), "model: expected a chain of layers, got a Rounded"),
        (lambda: hooked(small_vgg()), "model: expected a model that does what its forward says, got a VGG: a hook"),
        (lambda: hooked(small_vgg(), "features"), "features: expected modules of torch.nn without hooks, got Sequ"),
        (lambda: hooked(conv_net()), "model: expected a model that does .* got a Sequential: a hook"),
        (lambda: hooked(InPlace(Tensor.size)), "model: expected a model that does .* got a InPlace: a hook"),
    ],
)
def test_what_a_model_does_besides_its_layers(model: Callable[[], nn.Module], message: str) -> None:
    """What no layer of the chain says is not left out silently."""
    with pytest.raises(ValueError, match=message):
        extract_task(model(), 1)


def test_a_look_at_a_tensor_is_no_layer() -> None:
    model, x = InPlace(lambda y: (y.size(0), y.shape)), torch.randn(3, 4)
    set_task(model, 2)
    torch.testing.assert_close(extract_task(model, 2)(x), model(x))


class Doubling(TaskRouter):
    def forward(self, x: Tensor, task: object = None) -> Tensor:
        return 2 * super().forward(x, task)  # type: ignore[arg-type]


def hooked_router() -> TaskRouter:
    router = TaskRouter(8, T, 0.5)
    router.register_forward_hook(lambda m, x, y: 2 * y)
    return router


@pytest.mark.parametrize("one", [fold, extract_task])
@pytest.mark.parametrize(
    "router, why", [(lambda: Doubling(8, T, 0.5), "a forward of its own"), (hooked_router, "hook")]
)
def test_a_router_that_does_more_than_mask(
    router: Callable[[], TaskRouter], why: str, one: Callable[..., object]
) -> None:
    """Its masks alone would say something else."""
    model = nn.Sequential(nn.Linear(6, 8), router(), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=f"1: expected a router that masks and does nothing else, got a .*{why}"):
        one(model, 1)
