"""A language model's block: position i routes to positions i and later alone."""

import torch
from heinsen_routing import EfficientVectorRouting

torch.manual_seed(7)
n = 6
route = EfficientVectorRouting(n, n, 8, 8)
mask = torch.ones(n, n, dtype=torch.bool).tril(-1)
x = torch.randn(2, n, 8, requires_grad=True)
y = route(x, mask=mask)
(dx,) = torch.autograd.grad(y[:, 2].sum(), x)
result = {"y": y, "dx": dx, "later": dx[:, 3:].abs().max()}
