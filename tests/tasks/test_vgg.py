"""The routed VGG: heads, batches of several tasks, initial weights, pretrained weights, checkpoints."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import use_backend
from fastroute.tasks import VGG, TaskRouter, set_task, vgg, vgg11, vgg11_bn
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same
from tests.helpers.tasks import T, images, small_vgg, tasks_of

each_backend = pytest.mark.parametrize("backend", ["reference", "auto"])
each_norm = pytest.mark.parametrize("batch_norm", [False, True])


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    y.square().sum().backward()
    return {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize("size", [32, 64])
def test_vgg11_runs(size: int) -> None:
    for make in (vgg11, vgg11_bn):
        model = make(task_count=3, sigma=0.9, init_weights=False)
        y = model(torch.randn(2, 3, size, size), torch.tensor([2, 0]))
        assert y.shape == (2, 2) and y.isfinite().all()
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert norms == (8 if make is vgg11_bn else 0)
        assert model.get_layer("classifier_2") is model.classifier_2


def test_images_that_are_too_small() -> None:
    """The smallest size that the poolings take is named, and runs."""
    features = vgg.make_layers([4, "M", 4, "M"], 3, 0.5)
    for model in (VGG(features, 3), fastroute.live(VGG(copy.deepcopy(features), 3))):
        assert model(torch.randn(2, 3, 4, 4), 1).shape == (2, 2)
        for shape in ((2, 3, 3, 3), (2, 3, 4, 3), (2, 3, 0, 8)):
            message = re.escape(f"x: expected images of 4 x 4 or larger, got {list(shape)}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                model(torch.randn(shape), 1)
        with pytest.raises(RuntimeError, match="3 channels, but got 2"):
            model(torch.randn(2, 2, 8, 8), 1)


@each_backend
@each_norm
def test_a_batch_of_tasks(batch_norm: bool, backend: str) -> None:
    """In evaluation its tasks one by one; its gradients are their sum; None for heads without a sample."""
    model, x = small_vgg(batch_norm).double().eval(), images().double()
    tasks = torch.tensor([3, 0, 3, 3, 1, 0])
    with use_backend(backend):
        y = model(x, tasks)
        found = gradients(model, y)
        alone = [model(x[b : b + 1], task) for b, task in enumerate(tasks.tolist())]
        assert_same(y.detach(), torch.cat(alone).detach())
        expected = gradients(model, torch.cat(alone))
        set_task(model, tasks)
        assert torch.equal(model(x), y)
    for name, g in found.items():
        assert (g is None) == (expected[name] is None) == (name.startswith(("classifier_2", "classifier_4"))), name
        if g is not None:
            assert_same(g, expected[name], name)  # type: ignore[arg-type]


def test_permuting_samples_with_their_tasks() -> None:
    model, x, tasks = small_vgg().double().requires_grad_(False), images().double(), tasks_of(6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert_same(model(x[order], tasks[order]), model(x, tasks)[order])


@each_norm
def test_unused_heads(batch_norm: bool) -> None:
    """``unused_grad="zeros"`` is the same but for zeros in place of None."""
    ours, zeros = small_vgg(batch_norm), small_vgg(batch_norm, unused_grad="zeros")
    zeros.load_state_dict(ours.state_dict())
    ours, zeros, x = ours.double(), zeros.double(), images().double()
    for task in (1, torch.tensor(1), tasks_of(6)):
        a, b = gradients(ours, ours(x, task)), gradients(zeros, zeros(x, task))
        for name in a:
            g, filled = a[name], b[name]
            assert filled is not None
            assert_same(filled, torch.zeros_like(filled) if g is None else g, name)


def test_masked_equals_deleted_channels() -> None:
    """Without the channels that a task does without, the network is smaller and gives the same."""
    model, x = small_vgg().double().requires_grad_(False), images().double()
    for task in range(T):
        y, live = x, torch.ones(3, dtype=torch.bool)
        for layer in model.features:
            if isinstance(layer, TaskRouter):
                kept = layer.get_unit_mapping()[task].bool()
                y, live = y[:, kept], kept
            elif isinstance(layer, nn.Conv2d):
                y = nn.functional.conv2d(y, layer.weight[:, live], layer.bias, padding=1)
            else:
                y = copy.deepcopy(layer)(y.clone())
        head = model.get_layer(f"classifier_{task}")[0]
        weight = head.weight.unflatten(1, (-1, 2, 2))[:, live].flatten(1)
        assert_same(model(x, task), nn.functional.linear(model.avgpool(y).flatten(1), weight, head.bias))


def test_nested_features() -> None:
    flat = small_vgg()
    layers = list(flat.features)
    nested = VGG(nn.Sequential(nn.Sequential(*layers[:5]), *layers[5:]), T, bottleneck_spatial=[2, 2])
    for t in range(T):
        nested.get_layer(f"classifier_{t}").load_state_dict(flat.get_layer(f"classifier_{t}").state_dict())
    x = images()
    assert torch.equal(nested(x, tasks_of(6)), flat(x, tasks_of(6)))


def test_training_a_batch_of_tasks() -> None:
    """The loss of five tasks with a rule of their own, over one batch."""
    np.random.seed(0)
    model, x, tasks = small_vgg(True), images(40), tasks_of(40)
    y = ((x.mean((1, 2, 3)) > 0).long() + tasks) % 2
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x, tasks), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------------------------------- seeds


@each_norm
def test_random_draws(batch_norm: bool) -> None:
    """Masks in the order of the layers from NumPy; weights as torchvision's are, from torch."""
    np.random.seed(4)
    seeds.manual_seed(4)
    model = small_vgg(batch_norm, seed=4)
    np.random.seed(4)
    for router in (m for m in model.modules() if isinstance(m, TaskRouter)):
        drawn = np.random.rand(T, router.unit_count)
        off = router.unit_count // 2
        assert (router.get_unit_mapping().numpy() == (drawn.argsort(1).argsort(1) >= off)).all()
    seeds.manual_seed(4)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    for layer in layers:
        type(layer).reset_parameters(copy.deepcopy(layer))  # the constructors' draws
    for layer in layers:
        expected = torch.empty_like(layer.weight)
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(expected, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(expected, 0, 0.01)
        else:
            expected.fill_(1)
        assert torch.equal(layer.weight, expected) and (layer.bias == 0).all()


def test_options() -> None:
    plain = small_vgg(init_weights=False)
    assert (plain.classifier_0[0].bias != 0).any()
    made = [
        vgg11(False, 4, 0.5, generator=seeds.generator(1), balanced=True, init_weights=False, active_task=3)
        for _ in range(2)
    ]
    for a, b in zip(made[0].modules(), made[1].modules(), strict=True):
        if isinstance(a, TaskRouter) and isinstance(b, TaskRouter):
            assert torch.equal(a.get_unit_mapping(), b.get_unit_mapping()) and a.active_task == 3
            assert (a.get_unit_mapping().sum(0) == 2).all()
    half = vgg11(task_count=2, dtype=torch.float64, device="meta", bottleneck_spatial=(1, 2))
    assert half.classifier_1[0].weight.shape == (2, 1024) and half.classifier_1[0].weight.dtype == torch.float64
    assert half(torch.empty(3, 3, 32, 32, dtype=torch.float64, device="meta"), 1).shape == (3, 2)


def test_dtypes() -> None:
    model, x = small_vgg().eval(), images()
    expected = model(x, tasks_of(6))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, tasks_of(6))
    assert y.dtype == torch.bfloat16 and (y.float() - expected).norm() < 0.1 * expected.norm()
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16(), tasks_of(6)).dtype == torch.bfloat16
    model, x = model.double().to(memory_format=torch.channels_last), x.double()
    last = model(x.to(memory_format=torch.channels_last), tasks_of(6)).detach()
    assert_same(last, model.to(memory_format=torch.contiguous_format)(x, tasks_of(6)).detach())


def test_explain() -> None:
    ops = {d.case.op for d in fastroute.explain(small_vgg(), images(), tasks_of(6))}
    assert ops == {"task_mask", "dispatch", "grouped_linear"}


# --------------------------------------------------------------------------------------------------------- checkpoints


@each_norm
def test_checkpoints(batch_norm: bool) -> None:
    a, b, x = small_vgg(batch_norm, seed=0), small_vgg(batch_norm, seed=1), images()
    b.load_state_dict(a.state_dict(), strict=True)
    assert torch.equal(a(x, tasks_of(6)), b(x, tasks_of(6)))
    keys = {k.split(".")[0] for k in a.state_dict()}
    assert keys == {"features", *(f"classifier_{t}" for t in range(T))}


def torchvisions(batch_norm: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """Features as torchvision lays them out, and a state dict with its classifier."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in vgg.cfg["A"]:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        norm = [nn.BatchNorm2d(entry)] if batch_norm else []
        layers += [nn.Conv2d(channels, entry, 3, padding=1), *norm, nn.ReLU(inplace=True)]
        channels = entry
    features = nn.Sequential(*layers)
    for m in features:
        if isinstance(m, nn.BatchNorm2d):
            m(torch.randn(2, m.num_features, 1, 1))  # statistics of its own
    state = {f"features.{k}": t for k, t in features.state_dict().items()}
    return features.eval(), {**state, "classifier.0.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}


@each_norm
def test_pretrained(tmp_path: Path, batch_norm: bool) -> None:
    """With no unit off, the features are torchvision's own."""
    make: Any = vgg11_bn if batch_norm else vgg11
    theirs, state = torchvisions(batch_norm)
    path, x = tmp_path / "vgg.pth", torch.randn(2, 3, 32, 32)
    for kept in (state, {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}):
        torch.save(kept, path)
        for given in (path, str(path)):
            model = make(pretrained=given, task_count=2, sigma=0).eval()
            assert torch.equal(model.features(x), theirs(x.clone()))
    other: Any = vgg11 if batch_norm else vgg11_bn
    with pytest.raises(ValueError, match=f"pretrained: expected torchvision's state dict of {other.__name__}"):
        other(pretrained=path, task_count=2, sigma=0)
    torch.save({**state, "features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"features.0.weight: expected \[64, 3, 3, 3\], got \[64, 1, 3, 3\]"):
        make(pretrained=path, task_count=2, sigma=0)


def test_pretrained_with_masks(tmp_path: Path) -> None:
    """Weights from the file, masks as ever."""
    _, state = torchvisions(False)
    torch.save(state, tmp_path / "vgg.pth")
    np.random.seed(0)
    expected = vgg11(task_count=3, init_weights=False).features[1].get_unit_mapping()  # type: ignore[operator]
    np.random.seed(0)
    model = vgg11(pretrained=tmp_path / "vgg.pth", task_count=3)
    assert torch.equal(model.features[1].get_unit_mapping(), expected)  # type: ignore[operator]
    for ours, theirs in ((0, 0), (4, 3), (8, 6), (11, 8), (15, 11), (18, 13), (22, 16), (25, 18)):
        assert torch.equal(model.features[ours].weight, state[f"features.{theirs}.weight"])  # type: ignore[arg-type]
