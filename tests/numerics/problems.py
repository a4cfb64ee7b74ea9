"""A problem of every op that adds, long enough for a sum's errors to show: the reference and a call of it by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.helpers import agent_policy_cases, assignment_cases, matrix_cases, routing_cases, tasks, trajectory_losses
from tests.helpers.cases import Case, Function, Results, select
from tests.ops.combine import test_op as test_combine
from tests.ops.expert_ffn import test_op as test_expert_ffn
from tests.ops.grouped_linear import test_op as test_grouped_linear
from tests.ops.policy import test_op as test_policy
from tests.ops.task_mask import test_op as test_task_mask

F32 = torch.float32
#: Rows of a problem: of those that faults are planted in, and of those that plain PyTorch is tried on. In longer ones
#: its products of a few numbers each add term by term, which is a fault that the budget finds (docs/numerics.md).
LONG, VERY_LONG, USUAL = 4000, 40_000, 500


def _tokens(seed: int, count: int, experts: int = 5) -> torch.Tensor:
    return torch.randint(experts, (count, 2), generator=torch.Generator().manual_seed(seed))


def _batch_norm(seed: int, n: int) -> Case:
    return test_task_mask.bn_case((max(2, n // 500), 5, 24, 24), F32, seed)


def _bn_truth() -> Function:
    mapping = test_task_mask.random_mapping(5)
    made: Any = test_task_mask.bn_truth(mapping=mapping, task=1, training=True, relu=True)
    return made


def _masked(x: Any, task: Any) -> dict[str, torch.Tensor]:
    return {"y": tasks.masked(x, tasks.router().get_unit_mapping(), task)}


#: op: (the reference, a call by seed and rows, the axes whose order is free)
PROBLEMS: dict[str, tuple[Function, Callable[[int, int], Case], str]] = {
    "vector_routing": (
        routing_cases.vector_truth,
        lambda seed, n: routing_cases.vector_case(routing_cases.Size(1, n, 5, 8), seed=seed),
        "nmd",
    ),
    "vector_routing, betas from x": (
        routing_cases.vector_truth,
        lambda seed, n: routing_cases.vector_case(routing_cases.Size(1, n, 5, 8), linear=True, seed=seed),
        "nmd",
    ),
    "efficient_routing": (
        routing_cases.efficient_truth(),
        lambda seed, n: routing_cases.efficient_case(routing_cases.Size(1, n, 5, 8, 6), seed=seed),
        "nmd",
    ),
    "matrix_routing": (
        matrix_cases.matrix_truth(2),
        lambda seed, n: matrix_cases.matrix_case(matrix_cases.Size(1, n, 5, 2, 3, 4), seed=seed),
        "nmdh",
    ),
    "soft_assignment": (
        assignment_cases.truth("routing"),
        lambda seed, n: assignment_cases.case_of("routing", (1, n, 5, 6), "b", seed=seed),
        "nmh",
    ),
    "grouped_linear": (
        test_grouped_linear.truth("silu"),
        lambda seed, n: test_grouped_linear.linear_case([100, n // 4, 0, n], 70, 6, seed=seed),
        "nfo",
    ),
    "policy": (
        test_policy.truth(kind="softmax", temperature=0.7),
        lambda seed, n: test_policy.value_case(200, 300, seed=seed),
        "n",
    ),
    "agent_policy": (
        agent_policy_cases.truth(kind="softmax", temperature=0.7),
        lambda seed, n: agent_policy_cases.case_of(
            agent_policy_cases.some_agents(n, 3, seed), 3, 40, 6, "critic", F32, seed
        ),
        "n",
    ),
    "trajectory_loss": (
        trajectory_losses.loss_truth(("AAC", "QLearning", "REINFORCEBl1"), gamma=0.7),
        lambda seed, n: trajectory_losses.loss_case(("AAC", "QLearning", "REINFORCEBl1"), n, seed=seed),
        "b",
    ),
    "task_mask": (_masked, lambda seed, n: tasks.case((40, 8, 6, 6), seed).to(F32), "bh"),
    "batch_norm_mask_relu": (_bn_truth(), _batch_norm, "dh"),
    "expert_ffn": (
        test_expert_ffn.truth(),
        lambda seed, n: test_expert_ffn.ffn_case(_tokens(seed, n // 4), 40, 70, seed=seed),
        "bdk",
    ),
    "combine": (test_combine.truth, lambda seed, n: test_combine.combine_case(n // 8, 40, 17, seed=seed), "bkm"),
}


def rows_of(op: str) -> int:
    """For faults: where sums are short work, so long that how they are made shows."""
    return VERY_LONG if op.startswith(("vector_routing", "efficient_routing", "soft_assignment")) else LONG


def problem(op: str, seed: int, n: int) -> tuple[Function, Case, str]:
    truth, case, letters = PROBLEMS[op]
    return truth, case(seed, n), letters


def orders(case: Case, letters: str, count: int) -> Iterator[tuple[Case, Callable[[Results], Results]]]:
    """The case with its axes in random orders, each with what puts its results back.

    Reordering an axis of every input alike changes no result but for the order in which sums are rounded.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        moved = {letter: torch.randperm(case.size(letter), generator=generator) for letter in letters}
        turned = case
        for letter, index in moved.items():
            turned = turned.select(letter, index)

        def back(results: Results, moved: dict[str, torch.Tensor] = moved) -> Results:
            for letter, index in moved.items():
                results = select(results, case.axes, letter, index.argsort())
            return results

        yield turned, back
