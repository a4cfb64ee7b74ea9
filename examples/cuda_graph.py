"""A routed training step, forward, loss and backward, as one CUDA graph; without a GPU, as one compiled graph.

    python examples/cuda_graph.py

A routed network launches many small kernels, and at the sizes such networks have, telling the GPU about them takes
longer than running them. fastroute never reads a count back, so a whole step can be captured once and replayed: the
actions are drawn anew at each replay, and different samples take different modules, in the same graph. Without a GPU
the same step goes through ``torch.compile(fullgraph=True)``, which shows that nothing in it depends on a value either.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning workers slow small steps down

import torch
from torch import Tensor, nn

import fastroute


class Routed(nn.Module):
    """Three layers 128 -> 48 -> 48 -> 5 of K modules each, an agent per task."""

    def __init__(self, modules: int, tasks: int) -> None:
        super().__init__()
        widths = (128, 48, 48, 5)
        self.decisions, self.selections = nn.ModuleList(), nn.ModuleList()
        for a, b in itertools.pairwise(widths):
            self.decisions.append(fastroute.REINFORCE(modules, a, num_agents=tasks))
            self.selections.append(
                fastroute.Selection(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for _ in range(modules)))
            )
        self.loss = fastroute.Loss(nn.CrossEntropyLoss(), fastroute.NegLossReward())

    def forward(self, x: Tensor, tasks: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, actions [T, B])."""
        x, meta, agents = fastroute.PerTaskAssignment()(*fastroute.Initialization()(x, tasks=tasks))
        for decide, select in zip(self.decisions, self.selections, strict=True):
            x, meta, actions = decide(x, meta, agents)
            x, meta, _ = select(x, meta, actions)
        module_loss, routing_loss = self.loss(x, meta, y)
        return module_loss + routing_loss, meta.actions


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 30) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def captured(net: Routed, given: tuple[Tensor, ...]) -> tuple[Callable[[], object], Tensor, Tensor]:
    """(replay, loss, actions): the step as a CUDA graph. New inputs are copied into ``given``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled before the capture
        for _ in range(3):
            net(*given)[0].backward()
            net.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, actions = net(*given)
        loss.backward()
    return graph.replay, loss.detach(), actions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--modules", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="torch.compile's, where there is no GPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = Routed(args.modules, args.tasks).to(device)
    given = (
        torch.randn(args.batch, 128, device=device),
        torch.randint(args.tasks, (args.batch,), device=device),
        torch.randint(5, (args.batch,), device=device),
    )

    def eager() -> None:
        net.zero_grad(set_to_none=True)
        net(*given)[0].backward()

    print(f"batch {args.batch}, {args.modules} modules, {args.tasks} agents, on {device.type}")
    eager()
    print(f"  step by step: {milliseconds(eager, device):.2f} ms")
    if device.type == "cuda":
        net.zero_grad(set_to_none=True)
        replay, loss, actions = captured(net, given)
        routes = []
        for _ in range(2):
            replay()
            routes.append(actions.clone())
        changed = (routes[0] != routes[1]).any(0).float().mean()
        print(f"  as a CUDA graph: {milliseconds(replay, device):.3f} ms, loss {float(loss):.3f}")
    else:
        compiled = torch.compile(net, fullgraph=True, backend=args.backend)

        def step() -> Tensor:
            net.zero_grad(set_to_none=True)
            loss, actions = compiled(*given)
            loss.backward()
            return actions

        changed = (step() != step()).any(0).float().mean()
        print(f"  as one compiled graph: {milliseconds(step, device):.2f} ms")
    print(f"  {100 * float(changed):.0f} % of the samples took another route the second time: draws are fresh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
