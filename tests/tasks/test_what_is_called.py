"""Routers, Sequentials and heads that have to be called: hooks on them run, and what they change counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.tasks import VGG, RoutedConv2d, RoutedLinear, TaskRouter, live, set_task
from tests.helpers import seeds
from tests.helpers.opcheck import assert_same

T = 4


def router(C: int, sigma: float = 0.5, cls: type[TaskRouter] = TaskRouter) -> TaskRouter:
    return cls(C, T, sigma, generator=seeds.generator(0), dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeds.generator(1))


class Scaled(TaskRouter):
    """Keeps the expected sum, as dropout does."""

    def forward(self, x: Tensor, task: Any = None) -> Tensor:
        return 2 * super().forward(x, task)


def hooked(C: int, sigma: float = 0.5) -> TaskRouter:
    made = router(C, sigma)
    made.register_forward_hook(lambda m, i, o: o * 2)
    return made


def replaced(C: int, sigma: float = 0.5) -> TaskRouter:
    made: Any = router(C, sigma)
    made.forward = lambda x, task=None: 2 * TaskRouter.forward(made, x, task)
    return made  # type: ignore[no-any-return]


ROUTERS: dict[str, Callable[..., TaskRouter]] = {
    "plain": router, "hooked": hooked, "replaced": replaced,
    "a subclass": lambda C, sigma=0.5: router(C, sigma, Scaled),
}  # fmt: skip
#: Layers of 6 channels in and 8 out, as (routed, masked by calls of the routers).
LAYERS: dict[str, Any] = {
    "linear": (RoutedLinear, nn.functional.linear, (5, 6), ()),
    "convolution": (RoutedConv2d, nn.functional.conv2d, (5, 6, 4, 4), (3,)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("sigma", [0.5, 0.0])
@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.arange(5) % T])
def test_routers_of_a_routed_layer(layer: str, kind: str, sigma: float, task: int | Tensor) -> None:
    """Whether its tasks are one or several, and also where no channel is off."""
    cls, function, shape, kernel = LAYERS[layer]
    x = normal(*shape)
    for sides in ((True, False), (False, True), (True, True)):
        inp, out = (ROUTERS[kind](C, sigma) if side else None for C, side in zip((6, 8), sides, strict=True))
        made = cls(6, 8, *kernel, input_router=inp, output_router=out).double()
        y = function(x if inp is None else inp(x, task), made.weight, made.bias)
        assert_same(made(x, task).detach(), (y if out is None else out(y, task)).detach())


@pytest.mark.parametrize("kind", [k for k in ROUTERS if k != "plain"])
@pytest.mark.parametrize("later", [False, True], ids=["", "after a call"])
def test_compact_ends_have_no_place_for_it(kind: str, later: bool) -> None:
    out = ROUTERS[kind](8)
    layer = RoutedLinear(6, 8, output_router=out, compact_output=True).double()
    x = normal(5, 6)
    if later and kind == "hooked":
        hooks = dict(out._forward_hooks)
        out._forward_hooks.clear()
        assert layer(x, 1).shape == (5, 4)
        out._forward_hooks.update(hooks)
    with pytest.raises(ValueError, match="expected routers without hooks and a forward of their own"):
        layer(x, 1)


# ----------------------------------------------------------------------------------------------------------------- VGG


def small(make_live: bool = False) -> VGG:
    seeds.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), router(8), nn.ReLU())
    features: nn.Module = nn.Sequential(live(inner) if make_live else inner, nn.Conv2d(8, 8, 1), router(8))
    return VGG(features, T, bottleneck_spatial=(2, 2)).double()


@pytest.mark.parametrize("where", ["features", "features.0"])
@pytest.mark.parametrize("make_live", [False, True])
@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.arange(3) % T])
def test_hooks_on_a_vggs_sequentials(where: str, make_live: bool, task: int | Tensor) -> None:
    """They run as often, and change as much, whether the task is given or set."""
    net, x = small(make_live), normal(3, 3, 8, 8).requires_grad_()
    part, ran = net.get_submodule(where), []
    part.register_forward_pre_hook(lambda m, i: (ran.append("before"), (i[0] + 1, *i[1:]))[1])
    part.register_forward_hook(lambda m, i, o: (ran.append("after"), o * 2)[1])
    part.register_full_backward_hook(lambda m, i, o: ran.append("backward"))
    found = []
    for given in (None, task):
        set_task(net, task if given is None else 0)
        y = net(x, given)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach(), dx, tuple(ran)))
        ran.clear()
    for a, b in zip(*(f[:2] for f in found), strict=True):
        assert_same(a, b)
    assert found[0][2] == found[1][2] == ("before", "after", "backward")


def test_a_global_hook_sees_a_vggs_sequentials() -> None:
    net, x, seen = small(), normal(2, 3, 8, 8), []
    with torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m)):
        net(x, 1)
    assert {net.features, net.features[0]} <= set(seen)  # type: ignore[index]


def _hooked(net: VGG) -> None:
    net.get_layer("classifier_2")[0].register_forward_hook(lambda m, i, o: None)


def _frozen(net: VGG) -> None:
    _hooked(net)
    net.get_layer("classifier_3")[0].bias.requires_grad_(False)


def _without_parameters(net: VGG) -> None:
    net.get_layer("classifier_0")[0] = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(2))


HEADS: dict[str, Callable[[VGG], None]] = {
    "plain": lambda net: None, "one hooked": _hooked, "hooked, frozen": _frozen,
    "one without parameters": _without_parameters,
}  # fmt: skip


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("task", [1, torch.tensor(1), torch.tensor([1, 3])])
def test_gradients_of_heads_that_are_not_used(heads: str, task: int | Tensor) -> None:
    """ "zeros" gives every head's parameters one, whatever the heads are, and changes no number."""
    grads = []
    for unused_grad in ("none", "zeros"):
        net = small()
        net.unused_grad = unused_grad  # type: ignore[assignment]
        HEADS[heads](net)
        y = net(normal(2, 3, 8, 8), task)
        y.square().sum().backward()
        grads.append((y.detach(), {n: p.grad for n, p in net.named_parameters() if p.requires_grad}))
    (y, some), (same, every) = grads
    assert_same(y, same)
    for name, grad in every.items():
        assert grad is not None, name
        assert_same(grad, torch.zeros_like(grad) if some[name] is None else some[name])  # type: ignore[arg-type]
