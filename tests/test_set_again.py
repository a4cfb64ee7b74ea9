"""Options of a layer that are set after it was made: used as if it had been made with them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import networks

x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _selection(**options: Any) -> nn.Module:
    return networks.Selection(*(nn.Linear(6, 6) for _ in range(3)), **options)


def _loss(**options: Any) -> nn.Module:
    return networks.Loss(nn.MSELoss(), networks.NegLossReward(), **options)


def _of_selection(layer: Any) -> Tensor:
    made: Tensor = layer(x, networks.Trajectory(12), torch.tensor([0, 1, 2, -1] * 3))[0]
    return made


def _of_gate(layer: Any) -> Tensor:
    meta = networks.Trajectory(12)
    actions = layer(x, meta)[2]
    return torch.cat([actions, meta.mixtures[0].weights, meta.aux_losses()[:, None]], 1)  # type: ignore[index]


def _of_loss(layer: Any) -> Tensor:
    torch.manual_seed(1)
    meta = networks.Trajectory(12)
    decide = networks.QLearning(3, 6).double().eval()
    decide(x, meta)
    decide(x + 1, meta)
    return torch.stack(layer(x, meta, x + 1))


Make, Call = Callable[..., nn.Module], Callable[[Any], Tensor]
#: A layer, what is made of it, and by option another value and a wrong one.
CASES: dict[str, tuple[Make, Call, dict[str, tuple[Any, Any]]]] = {
    "TopKGating": (
        lambda **o: networks.TopKGating(5, 6, **o), _of_gate,
        {"k": (3, 6), "scores": ("sigmoid", "linear"), "normalize": (False, "x"), "jitter": (0.1, 1.0),
         "capacity": (0.5, -1.0), "balance_loss": (0.5, float("nan")), "z_loss": (0.3, -1.0)},
    ),
    "Selection": (_selection, _of_selection, {"dropped": ("identity", "keep"), "unused_grad": ("zeros", "nan")}),
    "Loss": (
        _loss, _of_loss,
        {"discounting": (0.5, 7.0), "clear": (True, "x"), "normalize_per_action_rewards": (False, "x"),
         "formula": ("upstream", "x")},
    ),
    "EfficientVectorRouting": (
        lambda **o: fastroute.EfficientVectorRouting(12, 4, 6, 5, **o), lambda layer: layer(x),
        {"n_iters": (3, 0), "normalize": (False, "x")},
    ),
    "GenerativeMatrixRouting": (
        lambda **o: fastroute.GenerativeMatrixRouting(12, 3, 2, 3, 4, **o),
        lambda layer: layer(x[:, 0], x.view(12, 2, 3))[1],
        {"n_iters": (2, 0), "p_model": ("skm", "x"), "eps": (0.1, -1.0)},
    ),
    "SlotAttention": (
        lambda **o: fastroute.SlotAttention(**{"n_slots": 3, "d_inp": 6, "d_slot": 5, **o}), lambda layer: layer(x),
        {"n_slots": (4, 0), "n_iters": (2, 0), "eps": (0.1, -1.0)},
    ),
}  # fmt: skip
OPTIONS = [(name, option) for name, (_, _, options) in CASES.items() for option in options]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_an_option_that_is_set_is_used_or_refused(name: str, option: str) -> None:
    make, call, options = CASES[name]
    other, wrong = options[option]

    def made(**given: Any) -> nn.Module:
        torch.manual_seed(0)
        return make(**given).double()

    def called(layer: nn.Module) -> Tensor:
        torch.manual_seed(2)
        return call(layer)

    layer = made()
    called(layer)
    setattr(layer, option, other)
    torch.testing.assert_close(called(layer), called(made(**{option: other})))
    with pytest.raises((TypeError, ValueError), match=f"^{option}: expected"):
        setattr(layer, option, wrong)
    assert getattr(layer, option) == other


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: networks.MoE(6, 8, 4), "gated", False),
        (lambda: networks.MoE(6, 8, 4), "shared_experts", 1),
        (lambda: networks.TopKGating(5, 6), "bias_balancing", 0.1),
        (lambda: networks.RoutingGRUCell(6, 5, 3, 1, networks.REINFORCE), "route_i2h", True),
        (lambda: networks.RoutingGRUCell(6, 5, 3, 1, networks.REINFORCE), "recurrent", True),
        (lambda: networks.CollaborationReward(0.5, 3, 16), "history_len", 4),
        (lambda: fastroute.EfficientVectorRouting(12, 4, 6, 5), "n_out", 3),
        (lambda: networks.WPL(3, 6), "formula", "mine"),
        (lambda: networks.WPL(3, 6), "additional_reward_func", networks.CollaborationReward),
    ],
)
def test_what_only_a_constructor_reads_is_refused(make: Callable[[], Any], name: str, value: Any) -> None:
    layer = make()
    setattr(layer, name, getattr(layer, name))
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        setattr(layer, name, value)


def test_a_reward_that_is_set_is_told_the_choices() -> None:
    decide = networks.REINFORCE(3, 6)
    decide.additional_reward_func = networks.CollaborationReward(0.5)
    assert decide.additional_reward_func.num_actions == 3


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_compiled_layer_norms_with_its_norms_eps(eps: float, dynamic: bool | None) -> None:
    layer = fastroute.EfficientVectorRouting(12, 4, 6, 5).double()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
    layer.N.eps = eps
    assert torch.equal(compiled(x), layer(x))
    for other in (1e-3, eps):
        layer.N.eps = other
        assert torch.equal(compiled(x), layer(x))
