"""One task's network, layer by layer: extracted, folded and live equal the masked one, or say why not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from fastroute.tasks import RoutedConv2d, RoutedLinear, TaskRouter, extract_task, fold, live, route, set_task
from tests.helpers import seeds

T = 4
F64 = torch.float64
Layers = Callable[[], list[nn.Module]]


def router(units: int, sigma: float = 0.5, seed: int = 0, axis: int = 1) -> TaskRouter:
    return TaskRouter(units, T, sigma, generator=seeds.generator(seed), axis=axis)


def net(layers: Layers, dtype: torch.dtype = F64) -> nn.Sequential:
    """In eval, with parameters and statistics that are not those of the start."""
    seeds.manual_seed(0)
    made = nn.Sequential(*layers()).eval().to(dtype)
    with torch.no_grad():
        for name, t in (*made.named_parameters(), *made.named_buffers()):
            if t.is_floating_point() and "_unit_mapping" not in name:
                t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t))
    return made


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=seeds.generator(7))


def of_task(model: nn.Module, x: Tensor, task: int) -> Tensor:
    set_task(model, task)
    return model(x).detach()  # type: ignore[no-any-return]


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert float((a - b).abs().max()) <= 1e-9 * float(b.abs().max())


def sets(router: nn.Module, *kept: list[int]) -> nn.Module:
    """A router with given channels."""
    assert isinstance(router, TaskRouter)
    mapping = router.get_unit_mapping().zero_()
    for t, row in enumerate(kept * T if len(kept) == 1 else kept):
        if t < T:
            mapping[t, row] = 1
    return router


EXTRACTED: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "Conv1d": (
        lambda: [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), router(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 2)],
        (5, 3, 12),
    ),
    "Conv3d": (
        lambda: [nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), router(6), nn.ELU(), nn.Conv3d(6, 3, 2)], (2, 2, 5, 5, 5),
    ),
    "padding": (
        lambda: [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), router(8), nn.ReLU(),
                 nn.Conv2d(8, 4, 3, padding="same", padding_mode="circular", dilation=2)], (2, 3, 6, 6),
    ),
    "ConvTranspose1d": (
        lambda: [nn.ConvTranspose1d(3, 8, 3, stride=2), router(8), nn.SiLU(), nn.ConvTranspose1d(8, 4, 2)], (2, 3, 6),
    ),
    "ConvTranspose2d": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, output_padding=1),
                 nn.BatchNorm2d(6), router(6, seed=1), nn.ReLU(), nn.Conv2d(6, 2, 1)], (2, 3, 6, 6),
    ),
    "ConvTranspose3d": (
        lambda: [nn.ConvTranspose3d(2, 6, 2), router(6), nn.ReLU(), nn.ConvTranspose3d(6, 2, 1, bias=False)],
        (1, 2, 3, 3, 3),
    ),
    "depthwise, one mask": (
        lambda: [nn.Conv2d(3, 8, 1), router(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), router(8), nn.ReLU6(),
                 nn.Conv2d(8, 4, 1)], (2, 3, 6, 6),
    ),
    "depthwise, two masks": (
        lambda: [nn.Conv2d(3, 8, 1), router(8), nn.ReLU6(), nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16),
                 router(16, seed=1), nn.ReLU6(), nn.Conv2d(16, 4, 1)], (2, 3, 6, 6),
    ),
    "depthwise without a router": (
        lambda: [nn.Conv2d(3, 8, 1), router(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
                 nn.ReLU6(), nn.Conv2d(8, 4, 1)], (2, 3, 6, 6),
    ),
    "grouped": (
        lambda: [nn.Conv1d(4, 8, 3, groups=2), router(8), nn.ReLU(), nn.Conv1d(8, 12, 3, groups=4),
                 router(12, seed=1), nn.Conv1d(12, 6, 1, groups=3)], (2, 4, 9),
    ),
    "grouped, whole groups": (
        lambda: [nn.Conv1d(4, 8, 3), sets(router(8), [0, 1, 4, 5]), nn.Conv1d(8, 4, 3, groups=4),
                 sets(router(4), [0, 2]), nn.Conv1d(4, 6, 1)], (2, 4, 9),
    ),
    "grouped, transposed": (
        lambda: [nn.ConvTranspose2d(4, 8, 2, groups=2), router(8), nn.ReLU(),
                 nn.ConvTranspose2d(8, 12, 2, groups=4), router(12, seed=1), nn.ConvTranspose2d(12, 6, 1, groups=6)],
        (2, 4, 4, 4),
    ),
    "GroupNorm of every channel": (
        lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), router(8), nn.ReLU(), nn.Conv2d(8, 4, 1)], (2, 3, 6, 6),
    ),
    "GroupNorm, whole groups": (
        lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), sets(router(8), [2, 3, 6, 7]), nn.Conv2d(8, 4, 1)],
        (2, 3, 6, 6),
    ),
    "InstanceNorm": (
        lambda: [nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), router(8), nn.Conv1d(8, 4, 1)], (2, 3, 9),
    ),
    "PReLU": (
        lambda: [nn.Conv1d(3, 8, 3), nn.PReLU(8), router(8), nn.PReLU(8), nn.Conv1d(8, 4, 1), nn.PReLU(4)], (2, 3, 9),
    ),
    "Linear": (
        lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8), router(8), nn.PReLU(8), nn.Linear(8, 4)], (5, 6),
    ),
    "flattened": (
        lambda: [nn.Conv1d(3, 8, 3), router(8), nn.Flatten(), nn.Linear(32, 6), router(6, seed=1), nn.PReLU(6),
                 nn.Linear(6, 2)], (2, 3, 6),
    ),
    "last axis, [B, D]": (
        lambda: [nn.Linear(6, 8), router(8, axis=-1), nn.GELU(), nn.Linear(8, 4)], (5, 6),
    ),
    "last axis, as many positions": (
        lambda: [nn.Linear(6, 8), router(8, axis=-1), nn.GELU(), nn.Linear(8, 4)], (5, 8, 6),
    ),
    "last axis, twice": (
        lambda: [nn.Linear(6, 8), nn.Tanh(), router(8, axis=-1), nn.Dropout(0.1), nn.Linear(8, 6), nn.SiLU(),
                 router(6, seed=1, axis=-1), nn.Linear(6, 4), nn.LayerNorm(4)], (5, 3, 2, 6),
    ),
    "last axis, flattened": (
        lambda: [nn.Linear(6, 8), router(8, axis=-1), nn.GELU(), nn.Flatten(), nn.Linear(24, 4)], (5, 3, 6),
    ),
    "BatchNorm in front": (
        lambda: [nn.BatchNorm1d(6), nn.Linear(6, 8), router(8, axis=-1), nn.Linear(8, 3)], (5, 6),
    ),
}  # fmt: skip
FOLDED: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "GroupNorm": (
        lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), router(8), nn.Conv2d(8, 4, 1)], (2, 3, 6, 6),
    ),
    "GroupNorm without parameters": (
        lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8, affine=False), nn.PReLU(8), router(8), nn.Conv2d(8, 4, 1)],
        (2, 3, 6, 6),
    ),
    "InstanceNorm without parameters": (
        lambda: [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), router(8), nn.Conv2d(8, 4, 1)], (2, 3, 6, 6),
    ),
    "LayerNorm": (
        lambda: [nn.Linear(6, 8), nn.LayerNorm(8), router(8, axis=-1), nn.Linear(8, 4)], (2, 8, 6),
    ),
    "LayerNorm without parameters": (
        lambda: [nn.LayerNorm(8, elementwise_affine=False), router(8, axis=-1), nn.Linear(8, 4)], (2, 8, 8),
    ),
    "RMSNorm": (
        lambda: [nn.Linear(6, 8), nn.RMSNorm(8), router(8, axis=-1), nn.Linear(8, 4)], (2, 3, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*EXTRACTED, *FOLDED])
def test_equals_the_masked_net(name: str) -> None:
    layers, shape = (EXTRACTED | FOLDED)[name]
    model, x = net(layers), randn(*shape)
    state = copy.deepcopy(model.state_dict())
    slim = live(copy.deepcopy(model))
    for task in range(T):
        expected = of_task(model, x, task)
        same(fold(model, task)(x).detach(), expected)
        same(of_task(slim, x, task), expected)
        if name in EXTRACTED:
            small = extract_task(model, task)
            same(small(x).detach(), expected)
            assert not any("fastroute" in type(m).__module__ for m in small.modules())
            assert list(small.state_dict()) == [k for k in state if "_unit_mapping" not in k]
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_a_depthwise_convolution_stays_one() -> None:
    small = extract_task(net(EXTRACTED["depthwise, one mask"][0]), 1)
    assert small[2].groups == small[2].in_channels == small[2].out_channels == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(5, 8, 6), (5, 3, 6), (5, 3, 8, 6)])
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Linear(6, 8), router(8), nn.GELU(), nn.Linear(8, 4)],
        lambda: [nn.Linear(6, 8), nn.BatchNorm1d(8), router(8, axis=-1), nn.Linear(8, 4)],
        lambda: [nn.Linear(6, 8), router(8, axis=-1), nn.PReLU(8), nn.Linear(8, 4)],
    ],
    ids=["router", "BatchNorm", "PReLU"],
)
def test_axis_1_is_not_that_of_features(layers: Layers, shape: tuple[int, ...]) -> None:
    """Nothing wrong for [B, L, D], whatever L: right, or an error when it is called."""
    model, x = net(layers), randn(*shape)
    for made in (extract_task, fold):
        try:
            expected = of_task(model, x, 1)
            got = made(model, 1)(x).detach()
        except (RuntimeError, ValueError):
            continue
        same(got, expected)


def test_route_puts_routers_over_features() -> None:
    """After a Linear, as those of transformers' MLPs, with as many positions as features."""
    layers = [nn.LayerNorm(6), nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 6)]
    model = route(nn.Sequential(*layers), T, 0.5, where=lambda name, _: name == "1", generator=seeds.generator(0))
    model, x = model.double().eval(), randn(3, 24, 6)
    assert model[2].axis == -1  # type: ignore[index]
    h = model[1](model[0](x))  # type: ignore[index]
    kept = model[2].get_unit_mapping()[2]  # type: ignore[index]
    expected = model[6 - 1](nn.functional.gelu(h * kept)).detach()  # type: ignore[index]
    same(of_task(model, x, 2), expected)
    same(of_task(live(copy.deepcopy(model)), x, 2), expected)
    same(extract_task(model, 2)(x).detach(), expected)
    same(fold(model, 2)(x).detach(), expected)
    each = torch.stack([of_task(model, x[b : b + 1], t)[0] for b, t in enumerate((2, 0, 3))])
    same(live(model)(x, torch.tensor([2, 0, 3])).detach(), each)


def test_a_router_over_the_last_axis() -> None:
    x = randn(3, 5, 8).requires_grad_()
    last, task = router(8, axis=-1).double(), torch.tensor([1, 0, 3])
    y = last(x, task)
    assert torch.equal(y, x * last.get_unit_mapping()[task][:, None]) and y.is_contiguous()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], last.get_unit_mapping()[task][:, None].expand(3, 5, 8))
    z = x.detach().clone()
    inplace = TaskRouter(8, T, 0.5, generator=seeds.generator(0), axis=-1, inplace=True).double()
    assert torch.equal(inplace(z, task), y) and torch.equal(z, y)
    for k, bad in enumerate((randn(3, 8, 5), randn(8))):
        with pytest.raises(ValueError, match=r"x: expected \[B, \.\.\., 8\]"):
            last(bad, k)
    with pytest.raises(ValueError, match=r"axis: expected 1 or -1, got 2"):
        TaskRouter(8, T, 0.5, axis=2)


def test_routed_layers_between_routers_over_the_last_axis() -> None:
    inp, out = router(6, axis=-1).double(), router(8, seed=1, axis=-1).double()
    layer = RoutedLinear(6, 8, input_router=inp, output_router=out).double()
    for shape in ((3, 6), (3, 6, 6), (3, 2, 8, 6)):
        x = randn(*shape)
        for task in (2, torch.tensor(1), torch.tensor([1, 0, 3])):
            same(
                layer(x, task).detach(),
                out(nn.functional.linear(inp(x, task), layer.weight, layer.bias), task).detach(),
            )
    with pytest.raises(ValueError, match=r"output_router: expected a router over axis 1"):
        RoutedConv2d(3, 8, 3, output_router=router(8, axis=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tracks", [True, False])
def test_what_is_new_has_the_dtype_of_the_net(dtype: torch.dtype, tracks: bool) -> None:
    """Of a network that was in half precision before it was routed."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False, track_running_stats=tracks), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 2, 1)).to(dtype)
    model = route(model, T, 0.5, where=lambda name, _: name == "0").train()
    x = randn(2, 3, 6, 6).to(dtype)
    expected = of_task(copy.deepcopy(model), x, 1)
    folded = fold(model, 1)
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {dtype}
    torch.testing.assert_close(folded(x).detach(), expected)
    small = extract_task(model, 1)
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {dtype}
    torch.testing.assert_close(small(x).detach(), expected)


def test_drawing_is_left_alone() -> None:
    model, state = net(EXTRACTED["Conv1d"][0]), torch.get_rng_state()
    extract_task(model, 1)
    fold(model, 1)
    assert torch.equal(state, torch.get_rng_state())


class MyConv(nn.Conv2d):
    pass


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


REFUSED: dict[str, tuple[Layers, str, str | None]] = {
    "hook": (
        lambda: [hooked(nn.Conv2d(3, 8, 3)), router(8), nn.Conv2d(8, 4, 1)],
        r"0, a Conv2d with a hook|^0: .*got Conv2d with a hook", r"^0: .*got a Conv2d: a hook",
    ),
    "hook, reading": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), hooked(nn.Conv2d(8, 4, 1))], r"^2: .*got Conv2d with a hook", None,
    ),
    "weight_norm": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), weight_norm(nn.Conv2d(8, 4, 1))], r"^2: .*got Conv2d with ", None,
    ),
    "parametrized": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))],
        r"^2: .*got ParametrizedConv2d with ", None,
    ),
    "subclass": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), MyConv(8, 4, 1)], r"^2: .*got MyConv", None,
    ),
    "GroupNorm": (
        lambda: [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), router(8), nn.Conv2d(8, 4, 1)],
        r"^1: .*got GroupNorm with groups of 4 channels, which it mixes", None,
    ),
    "LayerNorm": (
        lambda: [nn.Linear(3, 8), nn.LayerNorm(8), router(8, axis=-1), nn.Linear(8, 4)],
        r"^2: .*got 1, a LayerNorm with features, which it mixes", None,
    ),
    "norm of what is masked": (
        lambda: [nn.Conv2d(3, 8, 3), router(8), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 1)], r"^2: .*InstanceNorm2d",
        None,
    ),
    "pooling over features": (
        lambda: [nn.Linear(6, 8), router(8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 4)],
        r"^2: .*got MaxPool1d with inputs of 3 axes", None,
    ),
    "pooling over features before the router": (
        lambda: [nn.Linear(6, 8), nn.MaxPool1d(3, 1, 1), router(8), nn.Linear(8, 4)],
        r"^2: expected a convolution or Linear", r"^2: .*mixes features, got MaxPool1d",
    ),
    "positions of a convolution": (
        lambda: [nn.Conv2d(3, 8, 3), router(8, axis=-1), nn.Conv2d(8, 4, 1)],
        r"^1: expected a convolution or Linear.*got 0, a Conv2d", r"^0: .*a Conv2d: channels on axis 1",
    ),
    "Linear after a convolution": (
        lambda: [nn.Conv1d(3, 8, 3), router(8), nn.Linear(8, 4)], r"^2: .*flattened ones, got Linear", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_says_which_layer_and_why(name: str) -> None:
    layers, extracting, folding = REFUSED[name]
    with pytest.raises(ValueError, match=extracting):
        extract_task(nn.Sequential(*layers()).eval(), 1)
    if folding is not None:
        with pytest.raises(ValueError, match=folding):
            fold(nn.Sequential(*layers()).eval(), 1)


def test_a_layer_in_two_places_is_not_folded_into() -> None:
    """Its zeros would be in both."""
    conv = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match=r"^0: expected a layer of its own before the router, got .* in 2 places"):
        fold(nn.Sequential(conv, router(8), nn.ReLU(), conv), 1)
