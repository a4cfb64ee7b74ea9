"""``fold`` and ``extract_task`` give the routed model's outputs or say what they cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.tasks import RoutedConv2d, RoutedLinear, TaskRouter, extract_task, fold, set_task
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

T = 4


def router(C: int = 8, sigma: float = 0.5, seed: int = 0) -> TaskRouter:
    return TaskRouter(C, T, sigma, generator=seeds.generator(seed))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeds.generator(1))


def check_folded(net: nn.Module, x: Tensor, *others: TaskRouter) -> None:
    """For every task, whatever the active one of the copy is; ``others`` are routers that are not registered."""
    net = net.double().eval()
    for task in range(T):
        set_task(nn.ModuleList([net, *others]), task)
        want = net(x)
        set_task(nn.ModuleList([net, *others]), (task + 1) % T)
        folded = fold(net, task)
        assert_same(folded(x).detach(), want.detach())
        assert not any(isinstance(m, (TaskRouter, RoutedConv2d, RoutedLinear)) for m in folded.modules())
        assert folded.state_dict().keys() >= {n for n, _ in net.named_parameters()}


@pytest.mark.parametrize("ends", ["input", "output", "both"])
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("use_routing", [True, False])
def test_routed_layers_are_folded(ends: str, spatial: bool, use_routing: bool) -> None:
    seeds.manual_seed(0)
    first, second = router(seed=0), router(seed=1)
    second.use_routing = use_routing
    routed: Any = RoutedConv2d if spatial else RoutedLinear
    dense: Any = nn.Conv2d if spatial else nn.Linear
    kernel, x = ((3,), normal(5, 6, 9, 9)) if spatial else ((), normal(5, 6))
    given = {"input_router": first if ends != "output" else None, "output_router": second if ends != "input" else None}
    layers = [dense(6, 8, *kernel), first, nn.ReLU(), routed(8, 8, *kernel, **given), nn.ReLU(), dense(8, 2, *kernel)]
    check_folded(nn.Sequential(*layers), x, second)


def _compact() -> list[nn.Module]:
    r = router()
    return [nn.Linear(6, 8), r, nn.ReLU(), RoutedLinear(8, 2, input_router=r, compact_input=True)]


def _own_subclass() -> list[nn.Module]:
    class Own(RoutedLinear):
        pass

    r = router()
    return [nn.Linear(6, 8), r, nn.ReLU(), Own(8, 2, input_router=r)]


def _twice() -> list[nn.Module]:
    r = router()
    layer = RoutedLinear(8, 8, input_router=r)
    return [nn.Linear(6, 8), r, layer, nn.ReLU(), layer]


def _hooked() -> list[nn.Module]:
    r = router()
    other = router()
    other.register_forward_hook(lambda m, i, o: None)
    return [nn.Linear(6, 8), r, RoutedLinear(8, 8, output_router=other)]


def _norm_twice() -> list[nn.Module]:
    norm = nn.BatchNorm1d(8, affine=False)
    return [nn.Linear(6, 8), norm, router(), nn.ReLU(), nn.Linear(8, 8), norm, nn.Linear(8, 2)]


def _linear_twice() -> list[nn.Module]:
    layer = nn.Linear(8, 8)
    return [nn.Linear(6, 8), layer, router(), nn.ReLU(), layer]


def _infinite_twice() -> list[nn.Module]:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[:, 0] = float("inf")
    return [nn.Linear(6, 8), layer, nn.BatchNorm1d(8), router(), nn.ReLU(), layer]


REFUSED = {
    "compact": (_compact, "^3: .* compact ends"), "a subclass": (_own_subclass, "^3: .* a subclass"),
    "routed, twice": (_twice, "^2: .* in 2 places"), "a hooked router": (_hooked, "^2: .* a router with hooks"),
    "a norm without weights, twice": (_norm_twice, "^1: .* in 2 places"),
    "twice": (_linear_twice, "^1: .* in 2 places"),
    "infinite, twice": (_infinite_twice, "^1: .* in 2 places"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_says_what_cannot_be_folded(name: str) -> None:
    layers, match = REFUSED[name]
    net = nn.Sequential(*layers()).eval()
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        fold(net, 1)
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("what", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"])
@pytest.mark.parametrize("layers", ["linear", "convolution", "transposed", "norm"])
def test_numbers_of_channels_that_are_off(layers: str, what: str, number: float) -> None:
    """They are zeros behind the mask, and behind the zeros."""
    seeds.manual_seed(0)
    made: dict[str, tuple[list[nn.Module], Tensor]] = {
        "linear": ([nn.Linear(6, 8), nn.BatchNorm1d(8)], normal(5, 6)),
        "convolution": ([nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)], normal(5, 6, 4, 4)),
        "transposed": ([nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8)], normal(5, 6, 4, 4)),
        "norm": ([nn.BatchNorm1d(8), nn.BatchNorm1d(8)], normal(5, 8)),
    }
    (first, norm), x = made[layers]
    net = nn.Sequential(first, norm, router(), nn.ReLU()).double().eval()
    mask = net[2].get_unit_mapping()[2] == 0
    with torch.no_grad():
        t = net.get_parameter(what) if "running" not in what else net.get_buffer(what)
        (t.movedim(1, 0) if layers == "transposed" and what == "0.weight" else t)[mask] = number
    set_task(net, 2)
    for mode in (False, True):
        net.train(mode)
        folded, want = fold(net, 2), net(x)
        assert bool(want.isfinite().all())
        assert_same(folded(x).detach(), want.detach())


def test_finite_numbers_of_channels_that_are_off_stay() -> None:
    """What a norm is given, and its statistics, are the model's."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), router())
    folded = fold(net, 2)
    for name, t in net.state_dict().items():
        if name not in ("1.weight", "1.bias", "2._unit_mapping"):
            assert torch.equal(folded.state_dict()[name], t), name


# ---------------------------------------------------------------------------------------------------- traced forwards


class Up(nn.Module):
    """A layer that is told its output's size, by keyword or not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.c, self.r, self.d = nn.Conv2d(3, 8, 3, 2, 1), router(), nn.ConvTranspose2d(8, 3, 3, 2, 1)
        self.options = options

    def forward(self, x: Tensor) -> Any:
        return self.d(self.r(self.c(x)), **self.options)


class UpPlaced(Up):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.r(self.c(x)), [16, 16])


class Fixed(Up):
    """Always of task 0."""

    def forward(self, x: Tensor) -> Any:
        return self.d(self.r(self.c(x), 0))


class FixedByName(Up):
    def forward(self, x: Tensor) -> Any:
        return self.d(self.r(self.c(x), task=0))


TOLD = {
    "size": (lambda: Up(output_size=[16, 16]), "d"), "size, placed": (UpPlaced, "d"),
    "task": (Fixed, "r"), "task, named": (FixedByName, "r"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_a_layer_that_is_told_more_is_refused(name: str) -> None:
    model, layer = TOLD[name]
    with pytest.raises(ValueError, match=f"^{layer}: expected a layer that is called with one input"):
        extract_task(model().eval(), 1)


def test_a_layer_that_is_told_no_more_is_taken() -> None:
    net, x = Up().double().eval(), normal(1, 3, 16, 16)
    set_task(net, 1)
    assert_same(extract_task(net, 1)(x).detach(), net(x).detach())


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh(), nn.ELU(), nn.PReLU()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("writes", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=["relu", "dropout"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_what_writes_into_the_masked_output_does_not_write_into_an_activations(
    act: nn.Module, writes: nn.Module, nested: bool
) -> None:
    """Which has a gradient by its output."""
    seeds.manual_seed(0)
    layers = [nn.Linear(8, 16), act, TaskRouter(16, 3, 0.5), nn.Identity(), writes, nn.Linear(16, 2)]
    net = nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])) if nested else nn.Sequential(*layers)
    x = torch.randn(5, 8, dtype=torch.float64)
    set_task(net.double(), 1)
    weight, bias = layers[0].parameters()
    for made in (net, fold(net, 1), extract_task(net, 1)):
        made.zero_grad()
        torch.manual_seed(0)
        y = made(x)
        y.square().sum().backward()
        first: Any = next(m for m in made.modules() if isinstance(m, nn.Linear))
        if made is net:
            expected, live = y.detach(), layers[2]._unit_mapping[1] != 0
        elif isinstance(writes, nn.ReLU) or len(first.weight) == 16:
            assert_same(y.detach(), expected)
            own = slice(None) if len(first.weight) < 16 else live
            assert_same(first.weight.grad[own], weight.grad[live])
            assert_same(first.bias.grad[own], bias.grad[live])
    assert writes.inplace


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_new_has_the_layers_dtype_and_not_other_masks(dtype: torch.dtype) -> None:
    layers = [nn.Conv2d(3, 8, 3, dtype=dtype), router(), nn.ReLU(), nn.InstanceNorm2d(8), router(seed=1)]
    net, x = nn.Sequential(*layers), normal(2, 3, 6, 6).to(dtype)
    set_task(net, 1)
    folded = fold(net, 1)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert torch.equal(folded(x), net(x))
