"""How many threads there are changes no bit of what fastroute computes; docs/numerics.md says where PyTorch's ops do.

Every op of a training step is run again on two and three threads, on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastroute
from fastroute import networks, tasks
from tests.helpers import seeds
from tests.helpers.layers import Routed, Scores, Selected
from tests.helpers.process_wide import threads

F, B, K = 64, 700, 8

#: PyTorch's ops whose bits may depend on the number of threads, as docs/numerics.md says.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::mkldnn_linear"}
PRODUCTS |= {"mkldnn::_linear_pointwise"}
CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}
NORMS = {"aten::native_layer_norm_backward", "aten::native_batch_norm", "aten::native_batch_norm_backward"}
NORMS |= {"aten::_native_batch_norm_legit", "aten::native_group_norm_backward"}


def own(args: Any) -> Any:
    """For an op that may write into what it is given."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args)


class Again(TorchDispatchMode):
    """Notes the ops that give other bits on more threads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.differ: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in name:
            return func(*args, **kwargs)
        self.seen.add(name)
        found = []
        for count in (2, 3, 1):
            given = own((args, kwargs)) if func._schema.is_mutable and count > 1 else (args, kwargs)
            with threads(count):
                made = func(*given[0], **given[1])
            found.append([t.clone() for t in tree_leaves((made, given)) if isinstance(t, Tensor)])
        *others, one = found
        if any(
            not torch.equal(a.nan_to_num(), b.nan_to_num()) for many in others for a, b in zip(many, one, strict=True)
        ):
            self.differ.add(name)
        return made


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeds.generator(seed))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(F, 96), nn.Tanh(), nn.Linear(96, F))


def live_net() -> nn.Module:
    masks = seeds.generator(3)
    return tasks.live(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), tasks.TaskRouter(16, 4, 0.5, generator=masks),
            nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 8),
        )
    )  # fmt: skip


ACTIONS = torch.randint(-1, K, (B,), generator=seeds.generator(1))
LABELS = torch.randint(F, (B,), generator=seeds.generator(2))
evr = fastroute.EfficientVectorRouting
#: (the layer, its inputs, which of PyTorch's ops it may differ by)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], set[str]]] = {
    "EfficientVectorRouting": (lambda: evr(B, 16, F, 48), (rand(2, B, F),), PRODUCTS),
    "EfficientVectorRouting, any length": (lambda: evr(-1, 16, F, 48), (rand(2, B, F),), PRODUCTS),
    "EfficientVectorRouting, many outputs": (lambda: evr(32, 96, F, 48), (rand(16, 32, F),), PRODUCTS),
    "DefinableVectorRouting": (
        lambda: fastroute.DefinableVectorRouting(
            nn.Linear(F, 1), nn.Linear(F, F), nn.Linear(4, F), Scores(), n_inp=200, n_out=16
        ),
        (rand(4, 200, F),),
        PRODUCTS,
    ),
    "GenerativeMatrixRouting": (
        lambda: fastroute.GenerativeMatrixRouting(100, 16, 4, 4, 4),
        (rand(4, 100), rand(4, 100, 4, 4, seed=1)),
        PRODUCTS,
    ),
    "SlotAttention": (
        lambda: fastroute.SlotAttention(7, F, F, n_iters=2), (rand(8, 100, F), rand(8, 7, F, seed=1)), PRODUCTS
    ),
    "Selection": (lambda: Selected(networks.Selection(*(mlp() for _ in range(K)))), (rand(B, F), ACTIONS), PRODUCTS),
    "Selection, norms": (
        lambda: Selected(
            networks.Selection(
                *(nn.Sequential(nn.LayerNorm(F), nn.Linear(F, F), nn.GELU(), nn.LayerNorm(F)) for _ in range(K))
            )
        ),
        (rand(B, F), ACTIONS),
        PRODUCTS,
    ),
    "MoE": (
        lambda: networks.MoE(F, 96, K, 2, shared_experts=1, scores="sigmoid", bias_balancing=0.1),
        (rand(B, F),), PRODUCTS,
    ),
    "routed network": (
        lambda: Routed(
            *(networks.WPL(K, F, num_agents=4), networks.Selection(*(nn.Linear(F, F) for _ in range(K)))),
            *(networks.REINFORCE(K, F), networks.Selection(*(nn.Linear(F, F) for _ in range(K)))),
        ),
        (rand(B, F), ACTIONS % 4, LABELS),
        PRODUCTS,
    ),
    "live": (live_net, (rand(32, 3, 16, 16), ACTIONS[:32] % 4), PRODUCTS | CONVOLUTIONS | NORMS),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    build, inputs, may = CASES[name]
    seeds.manual_seed(0)
    layer = build()
    inputs = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs)
    with Again() as again:
        made = [t for t in tree_leaves(layer(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(made, [torch.linspace(-1, 1, t.numel()).view_as(t) for t in made])
    assert any(name.startswith("fastroute::") for name in again.seen)
    assert again.differ <= may
