"""Every public class and function refuses what an argument cannot be, with an error of its own that names it.

The sweep finds the classes and functions by itself; what it needs of each is one good call, in ``EXAMPLES``.
"""

from __future__ import annotations

import inspect
import random
import re
import struct
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastroute
from fastroute import (
    capsules,
    data,
    functional,
    loggers,
    models,
    monitor,
    multitask,
    networks,
    ops,
    plots,
    report,
    tasks,
)
from fastroute.compat import heinsen_routing, taskrouting, torchmtl
from fastroute.compat.checkpoints import convert
from fastroute.compat.PytorchRouting import CoreLayers, DecisionLayers, PreFabs
from fastroute.compat.PytorchRouting.RewardFunctions import Final, PerAction
from fastroute.multitask import metrics
from fastroute.networks import Initialization, Trajectory
from fastroute.ops import dispatch
from fastroute.ops.matrix_routing.contract import Capsules
from tests.helpers import seeds
from tests.helpers.backends import HERE
from tests.helpers.networks import LEARNING, F, linears

B, K, T = 5, 4, 3


class Example(NamedTuple):
    """A good call: arguments by name, and what a call of the result is given, where it can be called."""

    make: Callable[[], dict[str, Any]]
    call: Callable[[], dict[str, Any]] | None = None
    method: str = "__call__"


def x(*size: int) -> Tensor:
    return torch.randn(size or (B, F))


def triplet(**more: Any) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        batch = x()
        return {"batch": batch, "meta": Trajectory(B, [0, 1, 2, 0, 1]), **{k: v() for k, v in more.items()}}

    return made


def whose() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1])


def live() -> Tensor:
    return torch.tensor([True, True, False, True, True])


def played() -> dict[str, Any]:
    y, meta, actions = networks.REINFORCE(K, F)(*Initialization()(x())[:2])
    y, meta, _ = linears(K)(y, meta, actions)
    return {"ysest": y, "mys": meta, "ystrue": x()}


def sequence() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        tasks.TaskRouter(8, T, 0.5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def sizes(**given: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(given)


def losses() -> dict[str, Any]:
    return {"losses": torch.rand(T)}


def routed() -> dict[str, Any]:
    return {"x_inp": x(2, 3, 5), "mask": torch.zeros(2, 3, 4, dtype=torch.bool), "lengths": torch.tensor([3, 2])}


def efficient() -> dict[str, Any]:
    layer = capsules.EfficientVectorRouting(3, 4, 5, 6)
    return {"x": x(2, 3, 5), "w": layer._parameters_by_name(), "n_iters": 2, "normalize": True}


def plan() -> Any:
    return dispatch.plan(whose(), K)


class Encoder(nn.Module):
    """As Hugging Face's: an embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=F, num_hidden_layers=1)
        self.layer = nn.Linear(F, F)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False) -> Any:
        return SimpleNamespace(hidden_states=(x, self.layer(x)))


def monitored() -> monitor.RoutingMonitor:
    return monitor.RoutingMonitor(networks.MoE(F, 3, num_experts=K))


def losses_of_two() -> dict[str, Tensor]:
    w = torch.ones(2, requires_grad=True)
    return {"a": w.sum(), "b": w.prod()}


def logged() -> Path:
    log = loggers.RunLog("logged")
    log.write({"loss": 1.0}, 1)
    return log.folder


def digits() -> str:
    """A folder of IDX files."""
    for name, sizes_, data_ in (("images-idx3", (10, 2, 2), bytes(40)), ("labels-idx1", (10,), bytes(10))):
        header = struct.pack(f">{1 + len(sizes_)}I", 0x0800 + len(sizes_), *sizes_)
        Path(f"t10k-{name}-ubyte").write_bytes(header + data_)
    return "."


EXPERTS = sizes(in_features=F, task_experts=2, shared_experts=1, tasks=T, hidden_features=5, out_features=2, levels=2)
EXAMPLES: dict[str, Example] = {
    # capsules
    "capsules.EfficientVectorRouting": Example(
        sizes(n_inp=3, n_out=4, d_inp=5, d_out=6, n_iters=2, normalize=True, memory_efficient=True, return_dict=False),
        routed,
    ),
    "capsules.DefinableVectorRouting": Example(
        lambda: {
            "A": nn.Linear(5, 1), "F": nn.Linear(5, 24), "G": nn.Linear(6, 5), "S": lambda x, y: x @ y.mT,
            "n_inp": 3, "n_out": 4, "n_iters": 2, "return_dict": False, "d_inp": 5,
        },
        routed,
    ),
    "capsules.GenerativeMatrixRouting": Example(
        sizes(n_inp=3, n_out=4, d_cov=2, d_inp=5, d_out=6, n_iters=2, single_beta=False, p_model="gaussian", eps=1e-5),
        lambda: {
            "a_inp": x(2, 3), "mu_inp": x(2, 3, 2, 5), "mask": torch.zeros(2, 3, 4, dtype=torch.bool),
            "lengths": torch.tensor([3, 2]),
        },
    ),
    "capsules.SlotAttention": Example(
        sizes(n_slots=4, d_inp=5, d_slot=6, n_iters=2, d_hidden=7, eps=1e-8), lambda: {**routed(), "slots": x(2, 4, 6)}
    ),
    "capsules.VectorChunks": Example(lambda: {"vectors": x(7, 3), "rows": 2}),
    "capsules.Residual": Example(lambda: {"module": nn.Linear(5, 5)}, lambda: {"x": x(2, 3, 5)}),
    "capsules.credit_assignment": Example(lambda: {"phis": [x(2, 3, 4), x(2, 4, 5)], "normalize": True, "eps": 1e-5}),
    "capsules.credit": Example(
        lambda: {
            "model": capsules.EfficientVectorRouting(3, 4, 5, 6), "x_inp": x(2, 3, 5), "output": 1, "normalize": True,
            "eps": 1e-5,
        }
    ),
    "capsules.trace": Example(lambda: {"model": capsules.EfficientVectorRouting(3, 4, 5, 6), "x_inp": x(2, 3, 5)}),
    "capsules.record": Example(lambda: {"model": capsules.EfficientVectorRouting(3, 4, 5, 6)}),
    # networks
    **{
        f"networks.{name}": Example(
            lambda: {
                "num_selections": K, "in_features": F, "num_agents": T, "exploration": 0.1,
                "policy_storage_type": "approx", "detach": True, "approx_hidden_dims": (4,), "policy_net": None,
                "additional_reward_func": None, "set_pg_temp": False, "formula": "intended", "stacked": False,
                "generator": None, "device": None, "dtype": None,
            },
            triplet(agents=whose, mask=live, forced_actions=whose),
        )
        for name in LEARNING
    },
    **{
        f"networks.{name}": Example(dict, triplet(mask=live, forced_actions=whose))
        for name in ("PerTaskAssignment", "PassThrough")
    },
    "networks.TopKGating": Example(
        sizes(
            num_selections=K, in_features=F, k=2, scores="softmax", normalize=True, bias=False, jitter=0.1,
            capacity=1.5, balance_loss=0.1, z_loss=0.1, bias_balancing=0.1,
        ),
        triplet(mask=live, forced_actions=lambda: torch.stack([whose(), whose()], 1)),
    ),
    "networks.MoE": Example(
        sizes(d_model=F, d_hidden=3, num_experts=K, k=2, activation="silu", gated=True, shared_experts=1),
        lambda: {"x": x(), "mask": live(), "return_aux": False},
    ),
    "networks.MLP": Example(
        lambda: {"input_dim": F, "output_dim": 3, "layers": (4,), "nonlin": torch.relu}, lambda: {"x": x()}
    ),
    "networks.Selection": Example(
        lambda: {
            "modules": [nn.Linear(F, F) for _ in range(K)], "name": "s", "store_module_pointers": False,
            "dropped": "zero", "unused_grad": "none", "stacked": False,
        },
        triplet(actions=whose, mask=live),
    ),
    "networks.Stack": Example(lambda: {"modules": [nn.Linear(F, F) for _ in range(K)]}),
    "networks.Initialization": Example(dict, lambda: {"xs": x(), "tasks": whose()}),
    "networks.Sequential": Example(
        lambda: {"modules": [networks.REINFORCE(K, F), linears(K)]}, lambda: {"x": x(), "tasks": whose()}
    ),
    "networks.Loss": Example(
        lambda: {
            "pytorch_loss_func": nn.MSELoss(), "routing_reward_func": networks.NegLossReward(), "discounting": 0.9,
            "clear": False, "normalize_per_action_rewards": True, "formula": "intended",
        },
        played,
    ),
    **{
        f"networks.{name}": Example(
            lambda: {
                "in_features": F, "hidden_size": 3, "num_selections": K, "depth_routing": 2,
                "routing_agent": networks.REINFORCE, "route_i2h": True, "route_h2h": True, "recurrent": False,
                "nonlin": torch.relu, "num_agents": T, "exploration": 0.1, "policy_storage_type": "approx",
                "detach": True, "approx_hidden_dims": (4,), "formula": "intended",
            },
            lambda: {"x": x(), "agents": whose(), "mask": live(), "forced_actions": torch.stack([whose()] * 4)},
        )
        for name in ("RoutingLSTMCell", "RoutingGRUCell")
    },
    "networks.NegLossReward": Example(
        sizes(scale=1.0, formula="intended"), lambda: {"loss": torch.rand(B), "yest": x(), "ytrue": whose()}
    ),
    "networks.CorrectClassifiedReward": Example(
        sizes(scale=1.0, formula="intended"), lambda: {"loss": torch.rand(B), "yest": x(), "ytrue": whose()}
    ),
    "networks.PerActionBaseReward": Example(sizes(history_window=4)),
    "networks.CollaborationReward": Example(sizes(reward_ratio=0.1, num_actions=K, history_len=4, formula="intended")),
    "networks.RunningAverageCollaborationReward": Example(
        sizes(reward_ratio=0.1, num_actions=K, history_len=4, formula="intended")
    ),
    "networks.ManualReward": Example(sizes(rewards=[0.1] * K, num_actions=K)),
    "networks.Trajectory": Example(lambda: {"size": B, "tasks": [0, 1, 2, 0, 1]}),
    "networks.rebalance": Example(lambda: {"model": networks.TopKGating(K, F, bias_balancing=0.1)}),
    "networks.unstacked_state_dict": Example(lambda: {"module": linears(K, stacked=True)}),
    # tasks
    "tasks.TaskRouter": Example(
        sizes(
            unit_count=8, task_count=T, sigma=0.5, name="r", no_orphans=False, balanced=False, inplace=False,
            device=None,
        ),
        lambda: {"x": x(B, 8), "task": whose()},
    ),
    "tasks.RoutedLinear": Example(
        lambda: {
            "in_features": 8, "out_features": 8, "input_router": tasks.TaskRouter(8, T, 0.5),
            "output_router": tasks.TaskRouter(8, T, 0.5), "compact_input": False, "compact_output": False,
        },
        lambda: {"x": x(B, 8), "task": whose()},
    ),
    "tasks.RoutedConv2d": Example(
        lambda: {
            "in_channels": 8, "out_channels": 8, "kernel_size": 3, "input_router": tasks.TaskRouter(8, T, 0.5),
            "output_router": tasks.TaskRouter(8, T, 0.5), "compact_input": False, "compact_output": False,
        },
        lambda: {"x": x(B, 8, 5, 5), "task": whose()},
    ),
    "tasks.LiveSequential": Example(
        lambda: {"sequence": sequence(), "batch_norm": "exact"}, lambda: {"x": x(B, 3, 6, 6), "task": whose()}
    ),
    "tasks.VGG": Example(
        lambda: {
            "features": nn.Sequential(nn.Conv2d(3, 8, 3)), "task_count": T, "init_weights": True, "active_task": 0,
            "bottleneck_spatial": (2, 2), "unused_grad": "none",
        },
        lambda: {"x": x(B, 3, 6, 6), "task": whose()},
    ),
    **{
        f"tasks.{name}": Example(lambda more=more: {"model": sequence(), **more})
        for name, more in (
            ("extract_task", {"task": 1}), ("fold", {"task": 1}), ("set_task", {"task": 1}), ("on_task", {"task": 1}),
            ("mask_overlap", {"measure": "jaccard"}), ("live", {"batch_norm": "exact"}),
        )
    },
    "tasks.route": Example(
        lambda: {"model": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "task_count": T, "sigma": 0.5, "where": None}
    ),
    # multitask
    "multitask.MTLModel": Example(
        lambda: {
            "task_layers": [
                {"name": "a", "layers": nn.Linear(F, 4)}, {"name": "b", "layers": nn.Linear(4, 1), "anchor_layer": "a"}
            ],
            "output_tasks": ["b"], "order": "list", "run_all": False, "keep_outputs": False, "fuse_heads": True,
        },
        lambda: {"input": x()},
    ),
    "multitask.MultiHead": Example(
        sizes(in_features=F, hidden=4, out_features=2, tasks=T, activation="relu", bias=True, returns="tensor"),
        lambda: {"x": x(), "task": whose()},
    ),
    "multitask.Experts": Example(
        sizes(in_features=F, hidden_features=4, out_features=2, num_experts=3, activation="relu"), lambda: {"x": x()}
    ),
    "multitask.PLE": Example(EXPERTS, lambda: {"x": x(), "gate_input": x()}),
    "multitask.CGC": Example(
        lambda: {k: v for k, v in EXPERTS().items() if k != "levels"}, lambda: {"x": x(), "gate_input": x()}
    ),
    "multitask.MMoE": Example(
        sizes(in_features=F, experts=3, tasks=T, hidden_features=5, out_features=2, activation="relu"),
        lambda: {"x": x(), "gate_input": x()},
    ),
    "multitask.CrossStitch": Example(
        sizes(tasks=T, channels=F, own=0.9), lambda: {"inputs": [x() for _ in range(T)]}
    ),
    "multitask.Unpack": Example(lambda: {"layer": nn.Linear(F, F), "take": None}),
    "multitask.EachTask": Example(sizes(tasks=T), lambda: {"x": x()}),
    "multitask.ToTasks": Example(sizes(tasks=T), lambda: {"x": x(2 * T, F)}),
    "multitask.OfTask": Example(dict, lambda: {"inputs": [x(), x(), x(), whose()]}),
    "multitask.Concat": Example(sizes(dim=1), lambda: {"inputs": [x(), x()]}),
    "multitask.Stack": Example(sizes(dim=1), lambda: {"inputs": [x(), x()]}),
    "multitask.Split": Example(sizes(sizes=3, dim=1), lambda: {"x": x()}),
    "multitask.Lambda": Example(lambda: {"function": torch.add, "name": "sum"}),
    "multitask.EqualWeights": Example(sizes(tasks=T), losses),
    "multitask.FixedWeights": Example(sizes(weights=[1.0, 2.0, 3.0], tasks=T), losses),
    "multitask.RLW": Example(sizes(tasks=T, generator=None), losses),
    "multitask.GeometricMean": Example(sizes(tasks=T), losses),
    "multitask.LearnedWeights": Example(sizes(tasks=T, init=1.0), losses),
    "multitask.Uncertainty": Example(sizes(tasks=T, init=0.0), losses),
    "multitask.IMTL": Example(sizes(tasks=T, init=0.0), losses),
    "multitask.DWA": Example(sizes(tasks=T, temperature=2.0), losses),
    "multitask.FAMO": Example(sizes(tasks=T, min_losses=[0.0] * T, lr=0.1, weight_decay=0.1), losses),
    "multitask.STCH": Example(sizes(tasks=T, mu=1.0, weights=[1.0] * T, reference=[0.0] * T, warmup=1), losses),
    "multitask.as_weighting": Example(sizes(kind="equal", tasks=T)),
    "multitask.Accuracy": Example(
        sizes(ignore_index=-100, classes=F, threshold=0.5), lambda: {"y_hat": x(), "y": whose(), "mask": live()}
    ),
    "multitask.F1": Example(
        sizes(ignore_index=-100, classes=F, threshold=0.5), lambda: {"y_hat": x(), "y": whose(), "mask": live()}
    ),
    "multitask.L1": Example(dict, lambda: {"y_hat": x(B), "y": x(B), "mask": live()}),
    "multitask.TaskMetrics": Example(
        lambda: {"metrics": {"a": metrics.L1()}},
        lambda: {"y_hat": {"a": x(B)}, "y": {"a": x(B)}, "mask": {"a": live()}},
        "update",
    ),
    "multitask.relative_improvement": Example(sizes(metrics={"a": 1.0}, baselines={"a": 2.0}, higher_is_better=True)),
    "multitask.task_losses": Example(
        lambda: {
            "outputs": {"a": x(), "b": x()}, "targets": {"a": whose(), "b": x()},
            "losses": {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}, "masks": {"a": live()}, "apart": False,
        }
    ),
    # ops
    "functional.vector_routing": Example(
        lambda: {
            "x": x(2, 3, 5), "gate": torch.rand(2, 3), "pred": x(2, 4, 5), "score_weight": x(3, 4),
            "score_bias": x(3, 4), "use": x(3, 4), "ign": x(3, 4), "prior": torch.rand(4),
            "mask": torch.zeros(2, 3, 4, dtype=torch.bool), "lengths": torch.tensor([3, 2]),
        }
    ),
    "functional.efficient_routing": Example(efficient),
    "functional.matrix_routing": Example(
        lambda: {
            "a_inp": x(2, 3), "mu_inp": x(2, 3, 2, 5), "n_iters": 2, "p_model": "gaussian", "eps": 1e-5,
            "w": Capsules(x(3, 4, 5, 6), x(3, 4, 2, 6), x(3, 4), x(3, 4)),
            "mask": torch.zeros(2, 3, 4, dtype=torch.bool),
        }
    ),
    "functional.soft_assignment": Example(
        lambda: {
            "scores": x(2, 3, 4), "votes": x(2, 3, 4, 5), "gate": torch.rand(2, 3), "use": x(3, 4), "ign": x(3, 4),
            "prior": None, "mask": torch.zeros(2, 3, 4, dtype=torch.bool), "lengths": torch.tensor([3, 2]),
            "mean": False,
            "eps": 0.0,
        }
    ),
    "functional.grouped_linear": Example(
        lambda: {
            "x": x(), "plan": plan(), "weights": x(K, 3, F), "biases": x(K, 3), "activation": "none",
            "is_sorted": False, "keep_sorted": False, "keep_empty": False,
        }
    ),
    "functional.policy": Example(
        lambda: {
            "scores": x(B, K), "uniform": torch.rand(B, K), "coin": torch.rand(B), "forced": None, "kind": "softmax",
            "temperature": 1.0, "exploration": 0.1,
        }
    ),
    "functional.agent_policy": Example(
        lambda: {
            "x": x(), "plan": plan(), "weights": x(K, 3, F), "biases": x(K, 3), "uniform": torch.rand(B, 3),
            "coin": torch.rand(B), "forced": None, "kind": "softmax", "temperature": 1.0, "exploration": 0.1,
            "expected": False, "keep_empty": False,
        }
    ),
    "functional.trajectory_loss": Example(
        lambda: {
            "kinds": ["REINFORCE"], "s0": [-torch.rand(B)], "s1": [None], "aux": [None], "own": [None], "look": [None],
            "active": [None], "f": x(B), "gamma": 1.0, "normalize": True,
        }
    ),
    "functional.task_mask": Example(
        lambda: {"x": x(B, 8), "mapping": torch.ones(T, 8), "task": whose(), "relu": False, "inplace": False}
    ),
    "functional.batch_norm_mask_relu": Example(
        lambda: {
            "x": x(B, 8), "mapping": torch.ones(T, 8), "task": whose(), "running_mean": torch.zeros(8),
            "running_var": torch.ones(8), "weight": torch.ones(8), "bias": torch.zeros(8), "training": True,
            "momentum": 0.1, "eps": 1e-5, "relu": True,
        }
    ),
    "functional.expert_ffn": Example(
        lambda: {
            "x": x(), "plan": dispatch.plan(torch.stack([whose(), whose()], 1), K), "weights": torch.rand(B, 2),
            "w_in": x(K, 6, F), "w_out": x(K, F, 3), "activation": "silu", "gated": True,
        }
    ),
    "functional.combine": Example(
        lambda: {"z": x(B, 2, F), "weights": torch.rand(B, 2), "valid": torch.ones(B, 2, dtype=torch.bool)}
    ),
    "ops.dispatch.plan": Example(lambda: {"actions": whose(), "modules": K}),
    # models
    "models.CapsuleHead": Example(
        sizes(classes=3, features=F, depths=2, parts=4, hidden=5, n_iters=2, return_credit=True),
        lambda: {"hidden_states": x(2, 3, 2, F), "attention_mask": torch.ones(2, 3, dtype=torch.bool)},
    ),
    "models.CapsuleClassifier": Example(
        lambda: {"encoder": Encoder(), "classes": 3, "freeze": True, "parts": 4}, lambda: {"x": x(2, 3, F)}
    ),
    "models.RoutedCNN": Example(
        sizes(
            tasks=T, classes=2, in_channels=1, image_size=8, blocks=2, channels=4, width=5, layers=2, modules=2,
            collaboration=0.3, exploration=0.1,
        ),
        lambda: {"images": x(B, 1, 8, 8), "tasks": whose()},
    ),
    "models.SmallNORB": Example(
        sizes(classes=3, views=1, parts=4, channels=4, n_iters=2), lambda: {"images": x(2, 1, 40, 40)}
    ),
    "models.routed_vgg": Example(sizes(task_count=T, sigma=0.5, width=0.01, batch_norm=True)),
    # what watches a run
    "monitor.RoutingMonitor": Example(
        lambda: {"model": networks.MoE(F, 3, num_experts=K), "every": 1, "when": "always", "counts": True},
        lambda: {"losses": losses_of_two(), "parameters": None},
        "gradient_conflict",
    ),
    "loggers.RunLog": Example(sizes(folder="run"), lambda: {"numbers": {"a": 1.0}, "step": 1}, "write"),
    "loggers.TensorBoard": Example(
        lambda: {"writer": SimpleNamespace(add_scalar=lambda *_: None), "prefix": "x/"},
        lambda: {"numbers": {"a": 1.0}, "step": 1},
        "write",
    ),
    "report.write_report": Example(lambda: {"folder": logged(), "out": "page.html"}),
    "report.read_run": Example(lambda: {"folder": logged()}),
    "data.mnist": Example(lambda: {"directory": digits()}),
}  # fmt: skip


def as_upstream(name: str, **renamed: str) -> Example:
    """The example of the class that an upstream's is made from, with the arguments of a call that it renames."""
    make, call, method = EXAMPLES[name]
    return Example(make, call and (lambda: {renamed.get(k, k): v for k, v in call().items()}), method)


UPSTREAMS_NAMES = {
    "CoreLayers": {"batch": "xs", "meta": "mxs"},
    "DecisionLayers": {"batch": "xs", "meta": "mxs", "agents": "prior_actions"},
    "PreFabs": {"agents": "task_actions"},
}
EXAMPLES |= {
    "heinsen_routing.GenerativeMatrixRouting": as_upstream("capsules.GenerativeMatrixRouting"),
    "heinsen_routing.Routing": Example(
        sizes(d_cov=2, d_inp=5, d_out=6, n_inp=3, n_out=4, n_iters=2, single_beta=False, p_model="gaussian", eps=1e-5),
        lambda: {"a_inp": x(2, 3), "mu_inp": x(2, 3, 2, 5), "return_R": False, "n_out": None},
    ),
    "taskrouting.TaskRouter": Example(
        sizes(unit_count=8, task_count=T, sigma=4, name="r"), lambda: {"input": x(B, 8), "task": 1}
    ),
    "torchmtl.MTLModel": Example(
        lambda: {k: EXAMPLES["multitask.MTLModel"].make()[k] for k in ("task_layers", "output_tasks")},
        EXAMPLES["multitask.MTLModel"].call,
    ),
    **{
        f"{package}.{name}": as_upstream(f"networks.{name}", **UPSTREAMS_NAMES.get(package, {}))
        for package, module in (("CoreLayers", CoreLayers), ("DecisionLayers", DecisionLayers), ("PreFabs", PreFabs),
                                ("Final", Final), ("PerAction", PerAction))
        for name, thing in vars(module).items()
        if f"networks.{name}" in EXAMPLES and getattr(thing, "__module__", "").startswith("fastroute.compat")
    },
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is swept

#: Packages whose public names are swept, under the name in ``EXAMPLES``.
PACKAGES: dict[str, Any] = {
    "capsules": capsules, "networks": networks, "tasks": tasks, "multitask": multitask, "ops": ops,
    "functional": functional, "models": models, "monitor": monitor, "loggers": loggers, "report": report, "data": data,
    "heinsen_routing": heinsen_routing, "taskrouting": taskrouting, "torchmtl": torchmtl, "CoreLayers": CoreLayers,
    "DecisionLayers": DecisionLayers, "PreFabs": PreFabs, "Final": Final, "PerAction": PerAction,
}  # fmt: skip
#: Records of what layers did, which users read and do not make; what others are derived from; and what takes anything.
NOT_SWEPT = {
    "capsules.Credit", "capsules.Add", "capsules.Concatenate", "networks.Mixture", "networks.Record",
    "networks.Summary", "networks.SampleMetaInformation", "networks.BaseReward", "networks.Decision",
    "networks.RoutingRNNCellBase", "multitask.Weighting", "multitask.Add", "multitask.Multiply",
    "multitask.SimpleSelect", "multitask.SliceSelect", "tasks.Overlap", "tasks.vgg11", "tasks.vgg11_bn",
    "monitor.Sink", "report.CannotReport", "report.Run", "data.Digits", "data.digits", "DecisionLayers.Decision",
}  # fmt: skip


def public() -> Iterator[str]:
    for package, module in PACKAGES.items():
        for name, thing in vars(module).items():
            if name.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            own = module.__name__ if module is not functional else "fastroute.ops"
            if thing.__module__.startswith(own) and f"{package}.{name}" not in NOT_SWEPT:
                yield f"{package}.{name}"


def find(name: str) -> Any:
    package, *path = name.split(".")
    thing = PACKAGES[package]
    for part in path:
        thing = getattr(thing, part)
    return thing


class Bad(NamedTuple):
    """A value that few arguments take: those whose annotation has one of the words."""

    value: Callable[[], Any]
    fits: str


ANYTHING = "Any object Losses Present"
#: Arguments that are documented as not looked at, or as whatever a user's own code takes.
NOT_READ = {
    ("MTLModel", "input"), ("NegLossReward", "yest"), ("NegLossReward", "ytrue"), ("TopKGating", "agents"),
    *((name, argument) for name in (*LEARNING, "PassThrough", "PerTaskAssignment") for argument in ("prior_actions",)),
    *((name, argument) for name in ("PassThrough", "PerTaskAssignment") for argument in ("agents", "update_target")),
    ("plan", "name"), *(("trajectory_loss", argument) for argument in ("s1", "aux", "look")),
}  # fmt: skip
#: What an op takes for a number as Python does, and ops whose flags and numbers layers have checked.
AS_NUMBERS, LAYERS_CHECK = ("a 0-d tensor", "True", "inf"), ("efficient_routing", "soft_assignment", "plan")
#: Layers of users' own modules, or of torch's: of a tensor that these refuse the error is theirs. So it is of a
#: decision's network for a batch on another device.
OF_USERS = {"Residual", "Selection", "Loss", "MLP", "Sequential", "LiveSequential", "VGG"}
#: What messages call an argument where it has several names, or which follows from it.
ALSO_CALLED = {
    "batch": "x", "mys": "meta|ysest", "ystrue": "ysest", "ytrue": "ystrue", "yest": "ysest", "x": "xs", "y_hat": "y",
    "kind": "weightings?|weights", "history_len": "history_window", "loss": "ysest", "size": "tasks", "xs": "tasks",
    "task_layers": "output_tasks", "kinds": "s0", "use_bias": "use", "modules": "indices",
}  # fmt: skip
BAD: dict[str, Bad] = {
    "a str": Bad(lambda: "x", "str"),
    "None": Bad(lambda: None, "None"),
    "nan": Bad(lambda: float("nan"), ""),
    "inf": Bad(lambda: float("inf"), ""),
    "a 0-d tensor": Bad(lambda: torch.tensor(2.5), "Tensor"),
    "-1": Bad(lambda: -1, "int float InputCount InputCapsules Task Tasks Sigma"),
    "0": Bad(lambda: 0, "int float bool Natural NotNegative Share Task Tasks Sigma"),
    "a float": Bad(lambda: 2.5, "float Positive NotNegative"),
    "a huge int": Bad(lambda: 10**12, "int float Natural Positive NotNegative Sigma"),
    "True": Bad(lambda: True, "bool"),
    "a class": Bad(lambda: nn.ReLU, "type"),
    "an object": Bad(object, ""),
    "a list": Bad(lambda: [1.5], "Sequence"),
    "an empty list": Bad(list, "Sequence Widths"),
    "a dict": Bad(dict, "Mapping"),
}
#: What a good tensor is made into: refused in our own words, or taken.
BENT: dict[str, Callable[[Tensor], Any]] = {
    "another dtype": lambda t: t.long() if t.is_floating_point() else t.float(),
    "complex": lambda t: t.to(torch.complex64),
    "rank 0": lambda t: t.new_zeros(()),
    "rank + 1": lambda t: t[None],
    "narrower": lambda t: t[..., :-1],
    "shorter": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "on meta": lambda t: t.to("meta"),
    "as a list": lambda t: t.tolist(),
}


def signature(name: str, what: str) -> dict[str, inspect.Parameter]:
    """The arguments by name: of a constructor with ``**kwargs`` also those of the one that it hands them to."""
    thing = find(name)
    if not inspect.isclass(thing):
        return dict(inspect.signature(thing).parameters)
    if what == "make":
        owners = [cls for cls in thing.__mro__ if "__init__" in vars(cls) and cls.__module__.startswith("fastroute")]
        methods = [vars(cls)["__init__"] for cls in owners]
    else:
        method = EXAMPLES[name].method
        methods = [getattr(thing, "forward" if issubclass(thing, nn.Module) and method == "__call__" else method)]
    found: dict[str, inspect.Parameter] = {}
    for method in methods:
        own = list(inspect.signature(method).parameters.values())[1:]
        found = {**{p.name: p for p in own if p.kind is not p.VAR_KEYWORD}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    if len(methods) > 1 and found.get("args") is not None:
        del found["args"]
    return found


def run(name: str, what: str, given: dict[str, Any]) -> Any:
    """Make it, or make it by the example and call it."""
    thing = find(name)
    if what == "call":
        thing = getattr(run(name, "make", EXAMPLES[name].make()), EXAMPLES[name].method)
    several = [k for k, p in signature(name, what).items() if p.kind is p.VAR_POSITIONAL and k in given]
    made = thing(*(given.pop(several[0]) if several else ()), **given)
    if hasattr(made, "__enter__") and hasattr(made, "__exit__"):
        with made:
            pass
    return made


def cases(*only: str) -> list[tuple[str, str, str, str]]:
    """(class or function, "make" or "call", argument, what is wrong with it)."""
    found = []
    for name, example in ((name, EXAMPLES[name]) for name in only or EXAMPLES):
        for what, arguments in (("make", example.make), ("call", example.call)):
            good = None if arguments is None else arguments()
            for argument, parameter in {} if good is None else signature(name, what).items():
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    wrong = [*BAD, *(BENT if isinstance(good.get(argument), Tensor) else ())]
                    found += [(name, what, argument, bad) for bad in wrong]
    return found


def verdict(name: str, what: str, argument: str, bad: str) -> str | None:
    """What is wrong with how it is taken; None: nothing."""
    example, short = EXAMPLES[name], name.split(".")[-1]
    is_op = name.startswith(("ops.", "functional."))
    given = (example.make if what == "make" else example.call)()  # type: ignore[misc]
    names = [*given, argument]
    parameter = signature(name, what)[argument]
    words = set(re.findall(r"\w+", str(parameter.annotation)))
    is_tensor = isinstance(given.get(argument), Tensor)
    if (short, argument) in NOT_READ or (is_op and not is_tensor and (bad in AS_NUMBERS or short in LAYERS_CHECK)):
        return None
    if (argument, bad) == ("device", "0"):
        return None  # the first GPU, where this torch knows of GPUs
    if (argument, bad) == ("device", "a huge int") and torch.backends.cuda.is_built():
        return None  # a GPU of that number, which PyTorch looks for
    if bad in BAD:
        may_pass = bool(words & {*BAD[bad].fits.split(), *ANYTHING.split()})
        may_pass |= is_op and bool(words & {"Tensors", "Sequence"})  # what has nothing in it may be left out
        given[argument] = BAD[bad].value()
        names = names if isinstance(given[argument], Tensor) else [argument]
    else:
        may_pass = True
        given[argument] = BENT[bad](given[argument])
    is_bent = isinstance(given[argument], Tensor) and is_tensor
    try:
        run(name, what, given)
    except Exception as error:
        if is_bent and (is_op or short in OF_USERS or (bad, short) in {("on meta", of) for of in LEARNING}):
            return None
        if isinstance(error, (OSError, report.CannotReport)):  # which name a path
            names = [str(given[argument])]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "<frozen" not in f.filename]
        text = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}: {str(error)[:160]}"
        if (
            not isinstance(error, (TypeError, ValueError, IndexError, OSError, report.CannotReport))
            or "/fastroute/" not in frames[-1].filename
        ):
            return f"not ours: {text}"
        if not any(re.search(rf"\b({k}|{ALSO_CALLED.get(k, k)})\b", str(error)) for k in names):
            return f"does not name it: {text}"
        return None
    return None if may_pass else "accepted"


def complaints(found: list[tuple[str, str, str, str]]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what LearnedWeights says of itself
        return [f"{' '.join(case)}: {what}" for case in found if (what := verdict(*case))]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is given a name of a file."""
    monkeypatch.chdir(tmp_path)


def test_every_public_name_has_an_example() -> None:
    assert [name for name in public() if name not in EXAMPLES] == [], "add a good call of each to EXAMPLES"


@pytest.mark.parametrize("name", EXAMPLES)
def test_good_calls(name: str) -> None:
    """Otherwise whatever is wrong is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(name, "make", EXAMPLES[name].make())
        if (call := EXAMPLES[name].call) is not None:
            run(name, "call", call())


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_bad_value_of_each_argument(name: str) -> None:
    """By a seed; all of them are in the long set."""
    draw = random.Random(f"{seeds.BASE} {name}")
    each: dict[Any, Any] = {}
    for case in cases(name):
        each.setdefault(case[:3], []).append(case)
    assert complaints([draw.choice(options) for options in each.values()]) == []


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_all_bad_values(name: str) -> None:
    assert complaints(cases(name)) == []


# ------------------------------------------------------------------------------------------------------- state dicts

#: What no parameter and no buffer can be.
NO_STATE = {
    "None": None,
    "an int": 3,
    "a str": "x",
    "a list": [1.0],
    "a dict": {},
    "rank 5": torch.zeros(1, 2, 3, 4, 5),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_state_dicts_with_a_wrong_value(name: str) -> None:
    """PyTorch's own error, which names the key; and what is as it should be can be loaded again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = run(name, "make", EXAMPLES[name].make())
    draw = random.Random(f"{seeds.BASE} {name}")
    state = module.state_dict() if isinstance(module, nn.Module) else {}
    for key in state:
        bad = draw.choice([*NO_STATE])
        with pytest.raises(RuntimeError, match=rf"(?s)Error\(s\) in loading.*{re.escape(key)}"):
            module.load_state_dict({**state, key: NO_STATE[bad]})
    if state:
        module.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------- single values

HUGE = 10**12
VALUES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: networks.CollaborationReward(reward_ratio="3"), TypeError, "reward_ratio: expected a number, got '3'"),
    (lambda: networks.CollaborationReward(reward_ratio=None), TypeError, "reward_ratio: expected a number, got None"),
    (lambda: networks.CollaborationReward(float("nan")), ValueError, "reward_ratio: expected a finite number, got nan"),
    (lambda: networks.CollaborationReward(0.1, float("nan")), TypeError, "num_actions: expected an int, got nan"),
    (lambda: networks.CollaborationReward(history_len=float("nan")), TypeError, "history_len: expected an int"),
    (lambda: networks.REINFORCE(K, F, policy_net="x"), TypeError, "policy_net: expected a module, got 'x'"),
    (
        lambda: networks.REINFORCE(K, F, policy_net=nn.Linear), TypeError,
        r"policy_net: expected a module, got the class Linear; write Linear\(\.\.\.\)",
    ),
    (lambda: networks.AAC(K, F, value_net=nn.Linear), TypeError, "value_net: expected a module, got the class Linear"),
    (lambda: networks.WPL(K, F, qvalue_net="x"), TypeError, "qvalue_net: expected a module, got 'x'"),
    (lambda: networks.WPL(K, F, approx_module=nn.Linear), TypeError, "approx_module: expected a module, got the class"),
    (lambda: networks.REINFORCE(K, F, generator="x"), TypeError, r"generator: expected a torch.Generator, got 'x'"),
    (
        lambda: capsules.EfficientVectorRouting(3, 4, 5, 6, normalize="x"), TypeError,
        "normalize: expected True or False, got 'x'",
    ),
    (
        lambda: capsules.GenerativeMatrixRouting(3, 4, 2, 5, 6, single_beta="x"), TypeError,
        "single_beta: expected True or False, got 'x'",
    ),
    (lambda: networks.REINFORCE(K, torch.tensor(6.0)), TypeError, r"in_features: expected an int, got a tensor \[\]"),
    (lambda: networks.MLP(torch.tensor(6.0), 3), TypeError, "MLP: expected widths .*input_dim"),
    (lambda: networks.REINFORCE(K, F, HUGE), ValueError, "num_agents: expected at most 1048576, got 1000000000000"),
    (lambda: multitask.EqualWeights(HUGE), ValueError, "tasks: expected at most 1048576, got 1000000000000"),
    (lambda: multitask.MMoE(F, 3, HUGE, out_features=2), ValueError, "tasks: expected at most 1048576"),
    (lambda: multitask.PLE(F, 2, 1, 2, levels=HUGE, out_features=F), ValueError, "levels: expected at most 1048576"),
    (lambda: tasks.TaskRouter(8, HUGE, 0.5), ValueError, "task_count: expected at most 2147483647, got 10000000"),
    (
        lambda: tasks.TaskRouter(2**30, 2**30, 0.5), ValueError,
        "unit_count=1073741824, task_count=1073741824: expected sizes that fit into memory",
    ),
    (lambda: networks.MLP(F, 3, device="x"), ValueError, "device: expected a device such as 'cpu' .*got 'x'"),
    (lambda: networks.MLP(F, 3, dtype=torch.int32), TypeError, "dtype: expected a floating-point dtype"),
    (lambda: networks.MLP(F, 3, nonlin=nn.ReLU), TypeError, "nonlin: expected a module or a function, got the class"),
]  # fmt: skip


class TupleEncoder(nn.Module):
    """Returns no hidden states, whatever it is asked for."""

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor]:
        return (x,)


def images(*size: int) -> Tensor:
    return torch.rand(*size)


def cnn(*given: Any) -> Any:
    return models.RoutedCNN(3, 2, 1, 8, blocks=2)(*given)


def head(*given: Any) -> Any:
    return models.CapsuleHead(3, F, 2, parts=4)(*given)


VALUES += [
    (lambda: fastroute.explain(None), TypeError, "fn: expected a module or a function, got None"),
    (lambda: fastroute.explain(nn.Linear, x()), TypeError, "fn: expected a module or a function, got <class"),
    (lambda: fastroute.strict("on"), TypeError, "enabled: expected True or False, got 'on'"),
    (lambda: fastroute.use_backend("Native").__enter__(), ValueError, "use_backend: expected one of auto, triton"),
    (lambda: convert(3, "out.pt", "torchmtl"), TypeError, "source: expected a str, got 3"),
    (lambda: convert("in.pt", None, "torchmtl"), TypeError, "target: expected a str, got None"),
    (lambda: convert("in.pt", "out.pt", "torchMTL"), ValueError, "upstream: expected one of .*, got 'torchMTL'"),
    (lambda: cnn(images(2, 1, 8, 8).double(), whose()[:2]), TypeError, r"images: expected torch.float32 on cpu like"),
    (lambda: cnn(images(2, 1, 8, 8).byte(), whose()[:2]), TypeError, "images: expected a floating-point tensor"),
    (lambda: cnn(images(2, 1, 8, 8).numpy(), whose()[:2]), TypeError, "images: expected a tensor .* got ndarray"),
    (lambda: cnn(images(2, 1, 8, 8).to("meta"), whose()[:2]), ValueError, "images: expected torch.float32 on cpu"),
    (lambda: cnn(images(2, 1, 8, 8), torch.tensor([0, 3])), IndexError, "tasks: expected indices below 3"),
    (lambda: cnn(images(2, 1, 8, 8), torch.tensor([0, -1])), IndexError, "tasks: expected indices of 0 or more"),
    (lambda: cnn(images(2, 1, 8, 8), whose()), ValueError, "tasks: expected one label per sample, 2, got 5"),
    (lambda: models.RoutedCNN(3, 2, 1, 8), ValueError, "image_size: expected at least 16 for 4 blocks, got 8"),
    (
        lambda: models.SmallNORB(2, 1, parts=2, channels=4)(images(2, 1, 48, 48).double()), TypeError,
        "images: expected torch.float32 on cpu like the parameters, got a tensor .* torch.float64",
    ),
    (lambda: models.SmallNORB(1), ValueError, "classes: expected at least 2 output capsules, got 1"),
    (lambda: models.CapsuleHead(1), ValueError, "classes: expected at least 2 output vectors, got 1"),
    (lambda: models.CapsuleHead(2, parts=1), ValueError, "parts: expected at least 2 output vectors, got 1"),
    (lambda: head(x(2, 0, 2, F)), ValueError, "hidden_states: expected at least 1 input vector, got 0"),
    (lambda: head([x(2, 3, F), x(2, 4, F)]), ValueError, "hidden_states: expected 2 tensors .* of one shape"),
    (lambda: head(x(2, 3, 2, F), torch.tensor([[0.0, 0, -1e9]] * 2)), ValueError, "attention_mask: expected 1 or True"),
    (
        lambda: models.CapsuleClassifier(TupleEncoder(), 3, features=F, depths=2)(x()), TypeError,
        "encoder: expected an output with hidden_states, got tuple without",
    ),
    (lambda: models.CapsuleClassifier(TupleEncoder(), 3), TypeError, "features: expected a number, as the encoder has"),
    (
        lambda: models.routed_vgg(T, width=0.01)(images(2, 3, 32, 32).double(), 1), TypeError,
        "x: expected torch.float32 on cpu like the parameters",
    ),
    (
        lambda: loggers.RunLog("run").write({"loss": "0.5"}, 1), TypeError,
        "numbers: loss: expected a number, got '0.5'",
    ),
    (lambda: loggers.RunLog("run").write({"loss": torch.ones(2)}, 1), TypeError, "loss: expected a number, got a tens"),
    (lambda: loggers.RunLog("run").write({3: 0.5}, 1), TypeError, "numbers: expected names, got 3"),
    (lambda: loggers.RunLog(__file__), NotADirectoryError, "folder: expected a folder, found a file: .*test_bad_input"),
    (lambda: monitored().write(open, step=1), TypeError, r"sinks: expected what has write\(numbers, step\), got <b"),
    (lambda: monitored().write(loggers.RunLog, step=1), TypeError, "sinks: expected .*, got the class RunLog"),
    (lambda: monitored().write(step=1, loss="low"), TypeError, "more: loss: expected a number, got 'low'"),
    (lambda: monitored().observe([]), TypeError, r"trajectory: expected a Trajectory, got \[\]"),
    (
        lambda: monitored().gradient_conflict(losses_of_two(), torch.ones(2, requires_grad=True)), TypeError,
        "parameters: expected a list, got a tensor",
    ),
    (
        lambda: monitored().gradient_conflict(losses_of_two(), nn.Sequential(nn.ReLU())), TypeError,
        "parameters: expected tensors, got ReLU",
    ),
]  # fmt: skip


def test_what_a_monitor_counted_outlives_a_bad_write() -> None:
    made = monitored()
    made.model(x())
    for bad in ({"step": None}, {"step": 1, "loss": "low"}):
        with pytest.raises(TypeError):
            made.write(**bad)
    with pytest.raises(TypeError):
        made.write(None, step=1)  # type: ignore[arg-type]
    assert made.write(step=1)["gate/entries"] == 2 * B


PLOTTED = torch.tensor([[0, 1, 2], [2, 2, -1]])
VALUES += [
    (lambda: plots.actions(PLOTTED, labels=3), TypeError, "labels: expected 3 of them, one per .*got 3"),
    (lambda: plots.actions(PLOTTED, title=3), TypeError, "title: expected a text or None, got 3"),
    (lambda: plots.actions(PLOTTED, path=1.5), TypeError, "path: expected a file's name or None, got 1.5"),
    (
        lambda: plots.credit(torch.rand(3, 8, 8).to("meta"), x(3, 8, 8)), ValueError,
        "images: expected values, got a tensor on meta",
    ),
    (lambda: plots.masks("x"), TypeError, "model: expected a module, got str"),
]  # fmt: skip


STATS = torch.zeros(3), torch.ones(3)
GROUPED: dict[str, Callable[..., Any]] = {
    "grouped_linear": functional.grouped_linear,
    "agent_policy": functional.agent_policy,
}
CHOOSING: dict[str, Callable[..., Any]] = {
    "policy": lambda **given: functional.policy(x(4, 3), **given),
    "agent_policy": lambda **given: functional.agent_policy(x(4, F), planned(), x(2, 3, F), **given),
}


def planned(**given: Any) -> Any:
    return dispatch.plan(torch.tensor([0, 1, 1, 0]), 2)._replace(**given)


def normed(**given: Any) -> Any:
    good = {"x": x(4, 3), "mapping": torch.ones(2, 3), "task": 1, "running_mean": STATS[0], "running_var": STATS[1],
            "weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}  # fmt: skip
    return functional.batch_norm_mask_relu(**{**good, **given})


def learned(**given: Any) -> Any:
    none = [None]
    return functional.trajectory_loss(["REINFORCE"], [x(4)], none, none, none, none, none, x(4), **given)


def vectors(**given: Any) -> Any:
    good = {"x": x(2, 6, 8), "gate": torch.rand(2, 6), "pred": x(2, 4, 8),
            **{name: x(6, 4) for name in ("score_weight", "score_bias", "use", "ign")}}  # fmt: skip
    return functional.vector_routing(**{**good, **given})


def _case(call: Callable[..., Any], error: type[Exception], message: str, **given: Any) -> Any:
    return lambda: call(**given), error, message


NAN = float("nan")
SHARES = [(CHOOSING["policy"], "exploration"), (CHOOSING["agent_policy"], "exploration"), (normed, "momentum"),
          (learned, "gamma")]  # fmt: skip
VALUES += [
    *(_case(call, ValueError, "temperature: expected more than 0, got", temperature=bad)
      for call in CHOOSING.values() for bad in (0, -1.0, NAN)),
    *(_case(call, ValueError, f"{name}: expected a number from 0 to 1, got", **{name: bad})
      for call, name in SHARES for bad in (-0.1, 1.1, NAN)),
    *(_case(normed, ValueError, "eps: expected a number of 0 or more, got", eps=bad) for bad in (-1.0, NAN)),
    *(_case(learned, ValueError, r"choices\[0\]: expected at least 1, got", choices=[bad]) for bad in (0, -1)),
    _case(learned, TypeError, "normalize: expected True or False, got 'no'", normalize="no"),
    *(_case(lambda **given: functional.grouped_linear(x(4, F), planned(), x(2, 3, F), **given), TypeError,
            f"{name}: expected True or False, got 'no'", **{name: "no"})
      for name in ("is_sorted", "keep_sorted", "keep_empty")),
    *(_case(vectors, TypeError, f"{name}: expected a floating-point tensor, got {dtype}", **{name: x(6, 4).to(dtype)})
      for name in ("use", "ign", "score_weight", "score_bias") for dtype in (torch.complex64, torch.int64)),
    _case(vectors, TypeError, "x: expected a floating-point tensor, got torch.float8",
          x=x(2, 6, 8).to(torch.float8_e5m2)),
    _case(vectors, TypeError, "use: expected a tensor, got ndarray", use=x(6, 4).numpy()),
    _case(normed, TypeError, "running_mean: expected a tensor, got ndarray", running_mean=STATS[0].numpy()),
    *(_case(call, TypeError, message, x=x(4, F), plan=planned(), weights=weights)
      for call in GROUPED.values() for weights, message in (
          (x(2, 3, F).numpy(), r"weights: expected a tensor, got an array \[3, \d\] of float32"),
          (x(2, 3, F).to_sparse(), "weights: expected a tensor, dense, got one of torch.sparse_coo"),
          ([w.to_sparse() for w in x(2, 3, F)], "weights: expected a tensor, dense, got one of torch.sparse_coo"),
          (x(2, 3, F).to(torch.float8_e5m2), "weights: expected a floating-point tensor, got torch.float8"))),
    *(_case(call, ValueError, message, **{"x": x(4, F), "plan": planned(), "weights": x(2, 3, F), **given})
      for call in GROUPED.values() for given, message in (
          ({"x": x(4, F).to("meta")}, "plan: expected a tensor on meta like x, got one on cpu"),
          ({"weights": x(2, 3, F).to("meta")}, "weights: expected a tensor on cpu like x, got one on meta"))),
    *(_case(call, IndexError, "forced: expected indices below 3, got 3", forced=torch.arange(4))
      for call in CHOOSING.values()),
    _case(functional.combine, TypeError, "valid: expected bool, got torch.float32", z=x(2, 2, 3),
          weights=torch.rand(2, 2), valid=torch.ones(2, 2)),
    (lambda: networks.MLP(F, 3, dtype=torch.float8_e5m2), TypeError, "dtype: expected a floating-point dtype, got"),
    (lambda: plots.roofline({}), ValueError, "results: expected machine and benchmarks, got none of benchmarks, mach"),
    *((lambda bad=bad: plots.roofline(bad), TypeError, "results: expected a file of bench/results, or what is in one")
      for bad in (None, 3, [None])),
]  # fmt: skip


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("call", GROUPED)
@pytest.mark.parametrize("wrong", [
    {"order": [0, 0, 1, 1]}, {"order": [0, 1, 2, 9]}, {"order": [0, 1, 2, -1]}, {"offsets": [0, 3, 2]},
    {"offsets": [0, 2, 9]}, {"offsets": [1, 2, 4]}, {"offsets": [0, -2, 4]},
], ids=str)  # fmt: skip
def test_plans_made_by_hand(wrong: dict[str, list[int]], call: str, backend: str) -> None:
    """Refused by all backends alike, which would read out of bounds, or leave rows unwritten."""
    made = planned(**{name: torch.tensor(numbers) for name, numbers in wrong.items()})
    with fastroute.use_backend(backend), pytest.raises(ValueError, match="plan: expected"):
        GROUPED[call](x(4, F), made, x(2, 3, F))


@pytest.mark.parametrize("make, error, message", VALUES, ids=[c[2][:40] for c in VALUES])
def test_values_of_constructors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("agents", [1, T])
def test_a_batch_on_another_device_than_the_tables(agents: int) -> None:
    decide = networks.QLearning(K, F, agents, policy_storage_type="tabular")
    with pytest.raises(ValueError, match="batch: expected a tensor on cpu like the policies' tables, got one on meta"):
        decide(x().to("meta"), Trajectory(B), whose().to("meta"))


@pytest.mark.parametrize(
    "agents", [torch.tensor(1), torch.tensor(1.5), 3, "x", object()], ids=["0-d", "float", "int", "str", "object"]
)
def test_agents_and_trajectories_of_a_wrong_kind(agents: Any) -> None:
    decide = networks.REINFORCE(K, F, T)
    with pytest.raises((TypeError, ValueError), match="agents: expected"):
        decide(x(), Trajectory(B), agents)
    with pytest.raises((TypeError, ValueError), match="meta: expected a Trajectory"):
        decide(x(), agents, whose())
    with pytest.raises((TypeError, ValueError), match="tasks: expected"):
        Trajectory(B, agents)


def test_what_stands_for_an_int_or_a_flag() -> None:
    """As NumPy's and 0-d integer tensors do, where an int is meant."""
    made = networks.REINFORCE(np.int64(K), torch.tensor(F), detach=1, exploration=np.float32(0.5))
    assert made._num_selections == K and type(made._num_selections) is int and made._detach is True
    assert networks.MLP(torch.tensor(F), 3)(x()).shape == (B, 3)
