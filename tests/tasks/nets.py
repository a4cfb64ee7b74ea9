"""Small routed networks, and what a step of training makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastroute.tasks import live, route, set_task
from tests.helpers import seeds

T = 5  #: tasks
Task = int | Tensor


def generator(seed: int = 0) -> torch.Generator:
    return seeds.generator(seed)


def conv_net(batch_norm: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Three convolutions with routers, and a classifier with a routed hidden layer."""
    seeds.manual_seed(seed)

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), *([nn.BatchNorm2d(o)] if batch_norm else []), nn.ReLU(inplace=True)]

    net = nn.Sequential(
        nn.Sequential(*block(3, 8), nn.MaxPool2d(2), *block(8, 12), *block(12, 10), nn.AvgPool2d(2)),
        nn.Flatten(),
        nn.Linear(10 * 4, 9),
        *([nn.BatchNorm1d(9)] if batch_norm else []),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Linear(9, 4),
    ).to(dtype)
    return route(net, T, 0.5, generator=generator(seed), where=lambda name, _: name != f"{len(net) - 1}")  # type: ignore[return-value]


def images(B: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(B, 3, 8, 8, dtype=dtype, generator=generator(seed))


def twin(model: nn.Module, **options: str) -> nn.Module:
    """A live copy."""
    return live(copy.deepcopy(model), **options)


def passes(model: nn.Module, x: Tensor, task: Task) -> dict[str, Tensor]:
    """Output, gradients and buffers after a forward and a backward pass."""
    set_task(model, task)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[f"d{name}"] = parameter.grad.clone()
    found |= {name: t.clone() for name, t in model.state_dict().items() if name not in found}
    return found  # type: ignore[return-value]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to 64 units in the last place of the largest entry of all."""
    assert actual.keys() == expected.keys()
    largest = max((float(t.detach().abs().max()) for t in expected.values() if t.numel()), default=0.0)
    for name, right in expected.items():
        got = actual[name]
        assert got.shape == right.shape and got.dtype == right.dtype, name
        if not right.dtype.is_floating_point:
            assert torch.equal(got, right), name
        elif right.numel():
            allowed = 64 * torch.finfo(right.dtype).eps * largest
            assert float((got - right).detach().abs().max()) <= allowed, name


def train(
    model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], steps: int, tasks: Callable[[int], Task]
) -> dict[str, Tensor]:
    """The state after some steps."""
    chosen = optimizer(model.parameters())
    for n in range(steps):
        set_task(model, tasks(n))
        chosen.zero_grad()
        model(images(seed=100 + n)).square().sum().backward()
        chosen.step()
    return dict(model.state_dict())
