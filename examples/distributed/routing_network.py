"""Train a routing network on several processes: its modules spread over them, its decisions the same everywhere.

The task: the sign of x_0 says which of two other features is the target. A decision chooses a module for every sample
and is rewarded for a small loss, and for choosing what is chosen often (``CollaborationReward``); what is often is
counted over the samples of all processes.

    torchrun --nproc-per-node 2 examples/distributed/routing_network.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from _ranks import progress, say, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fastroute import CollaborationReward, Loss, NegLossReward, QLearning, Selection, networks
from fastroute.distributed import ExpertParallel, ddp, prepare

FEATURES = 8


class Network(nn.Module):
    """A decision, its modules, and their losses."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        reward = CollaborationReward(0.05)
        self.decision = QLearning(
            modules, FEATURES, approx_hidden_dims=(32,), exploration=0.3, additional_reward_func=reward
        )
        self.net = networks.Sequential(self.decision, Selection(*(nn.Linear(FEATURES, 1) for _ in range(modules))))
        self.loss = Loss(nn.MSELoss(), NegLossReward())

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the modules' loss, the decision's, actions [B]) of x [B, features] and y [B, 1]."""
        made, meta = self.net(x)
        return (*self.loss(made, meta, y), meta.records[0].actions)


def samples(count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [count, features] and y [count, 1]."""
    x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    y = torch.where(x[:, :1] > 0, 2 * x[:, 1:2], -2 * x[:, 2:3])
    return x.to(device), y.to(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--batch", type=int, default=512, help="samples of a step, of all processes together")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(argv)
    device = start()
    ranks = dist.get_world_size()
    if args.batch % ranks:
        parser.error(f"--batch: expected a multiple of {ranks} processes, got {args.batch}")
    train(args, device)
    dist.destroy_process_group()  # after DDP has gone: see docs/distributed_experts.md
    return 0


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Make the network, train and test it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("expert",))
    torch.manual_seed(0)
    model = Network(args.modules).to(device)
    parallelize_module(model, mesh, {"net.2": ExpertParallel()})
    wrapped = ddp(prepare(model))
    torch.manual_seed(1 + rank)  # every process explores for itself
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with progress() as bar:
        task = bar.add_task("training", total=args.steps)
        for step in range(args.steps):
            model.decision.set_exploration(0.3 * (1 - step / args.steps))
            of_modules, of_decision, _ = wrapped(*samples(args.batch // ranks, step * ranks + rank, device))
            optimizer.zero_grad()
            (of_modules + of_decision).backward()
            optimizer.step()
            bar.update(task, advance=1, description=f"loss {of_modules.item():.3f}")
    model.eval()
    with torch.no_grad():
        x, y = samples(1000, -1 - rank, device)
        error, _, actions = model(x, y)
    counts = actions.bincount(minlength=args.modules).double()
    dist.all_reduce(error, dist.ReduceOp.SUM)
    dist.all_reduce(counts)
    load = ", ".join(f"{100 * share:.0f}" for share in (counts / counts.sum()).tolist())
    say(f"{ranks} processes on {device.type}: test loss {error.item() / ranks:.3f} (one linear module: 2)")
    say(f"samples by module, %: {load}; each process has the modules of its rank")


if __name__ == "__main__":
    sys.exit(main())
