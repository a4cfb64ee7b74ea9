"""Small and large calls of the ops, for the tools and the tuning tables: each makes its tensors and returns a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastroute
from bench import harness
from fastroute import functional, networks
from fastroute.functional import grouped_linear
from fastroute.kernels import trajectory_loss
from fastroute.ops import dispatch

Call = Callable[[], object]


def vector_routing(
    device: str, n: int, m: int, d: int, h: int, *, dtype: torch.dtype = torch.float32, training: bool = True
) -> Call:
    layer = fastroute.EfficientVectorRouting(n, m, d, h, device=device, dtype=dtype)
    x = torch.randn(1, n, d, device=device, dtype=dtype, requires_grad=training)
    dy = torch.randn(1, m, h, device=device, dtype=dtype)

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            y: Tensor = layer(x)
        if training:
            y.backward(dy)
        return y

    return call


def experts(
    device: str, tokens: int, k: int, K: int, features: int, outputs: int, dtype: torch.dtype, *, training: bool = True
) -> Call:
    """Of each token's k experts a linear layer, their parameters in one tensor."""
    x = torch.randn(tokens, features, device=device, dtype=dtype, requires_grad=training)
    W = torch.randn(K, outputs, features, device=device, dtype=dtype, requires_grad=training)
    actions = torch.rand(tokens, K, device=device).topk(k).indices
    dy = torch.randn(tokens * k, outputs, device=device, dtype=dtype)

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            y = grouped_linear(x, dispatch.plan(actions, K), W)
        if training:
            y.backward(dy)
        return y

    return call


def mixture(device: str, tokens: int, k: int, K: int, features: int, hidden: int, dtype: torch.dtype) -> Call:
    """A training pass of gated experts."""
    moe = fastroute.MoE(features, hidden, K, k, device=device, dtype=dtype)
    x = torch.randn(tokens, features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, features, device=device, dtype=dtype)
    return lambda: moe(x).backward(dy)


def matrix_routing(device: str, B: int, n: int, m: int) -> Call:
    """A training pass, capsules of 4 x 4."""
    layer = fastroute.GenerativeMatrixRouting(n, m, 4, 4, 4, device=device)
    a, mu = torch.randn(B, n, device=device), torch.randn(B, n, 4, 4, device=device)
    return lambda: layer(a, mu)[1].sum().backward()


def rewards(device: str, B: int, K: int) -> Call:
    """The loss of three decisions whose actions are rewarded by how often they are taken, a graph where there can be.

    One for each setting of the kernel, as a captured one keeps its own.
    """
    decisions = [
        networks.REINFORCE(K, 64, additional_reward_func=networks.CollaborationReward(), device=device)
        for _ in range(3)
    ]
    x, truth = torch.randn(B, 64, device=device), torch.randint(10, (B,), device=device)
    meta = networks.Initialization()(x)[1]
    for decide in decisions:
        decide(x, meta)
    loss = networks.Loss(torch.nn.CrossEntropyLoss(), networks.CorrectClassifiedReward())
    graphs: dict[bool | None, torch.cuda.CUDAGraph] = {}

    def once() -> Tensor:
        return loss(x[:, :10], meta, truth, reduce=False)[1]

    def call() -> object:
        if device != "cuda":
            return once()
        setting = trajectory_loss.force_rewards
        if setting not in graphs:
            graphs[setting] = harness.capture(once, lambda: None)[0]
        return graphs[setting].replay()

    return call


def plan(device: str, entries: int, K: int) -> Call:
    actions = torch.randint(K, (entries,), device=device)
    return lambda: dispatch.plan(actions, K)


def task_mask(device: str, *shape: int) -> Call:
    x = torch.randn(shape, device=device, requires_grad=True)
    mapping = (torch.rand(4, shape[1], device=device) < 0.5).float()
    tasks = torch.randint(4, shape[:1], device=device)

    def call() -> None:
        functional.task_mask(x, mapping, tasks, relu=True).sum().backward()

    return call


def small(device: str, backend: str) -> None:
    """Each kernel of a backend, or what stands in for it, on a few numbers: what the sanitizer looks at."""
    calls = [plan(device, 1000, 20), plan(device, 17, 3), task_mask(device, 3, 20, 7, 5), task_mask(device, 4, 64)]
    if backend == "triton":
        calls += [vector_routing(device, 70, 12, 24, 40), experts(device, 50, 2, 5, 40, 24, torch.float32)]
    with fastroute.use_backend(backend):
        for call in calls:
            call()
    if device == "cuda":
        torch.cuda.synchronize()
