"""Activation, votes, prediction and scores defined by the user: a memory that the inputs read."""

import torch
from torch import nn
from heinsen_routing import DefinableVectorRouting

torch.manual_seed(5)


class Memory(nn.Module):
    def __init__(self, n, m, h):
        super().__init__()
        self.W = nn.Parameter(torch.randn(n, m, h))

    def forward(self, x):
        return self.W.expand(*x.shape[:-2], -1, -1, -1)


class Scores(nn.Module):
    def forward(self, x, pred):
        return x @ pred.transpose(-2, -1) / x.shape[-1] ** 0.5


route = DefinableVectorRouting(
    A=nn.Linear(5, 1), F=Memory(7, 3, 4), G=nn.Linear(4, 5), S=Scores(), n_inp=7, n_out=3, n_iters=3
)
x = torch.randn(2, 7, 5, requires_grad=True)
y = route(x)
y.sin().sum().backward()
result = {"y": y, "dx": x.grad, **{k: p.grad for k, p in route.named_parameters()}}
