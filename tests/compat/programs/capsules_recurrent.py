"""The same layer over and over, with residuals and dropout between."""

import torch
from torch import nn
from heinsen_routing import EfficientVectorRouting

torch.manual_seed(8)
state, route = nn.Parameter(torch.randn(4, 6)), EfficientVectorRouting(-1, 4, 6, 6)
drop = nn.Dropout(0.2)
words = torch.randn(5, 3, 6)
out = state
for word in words:
    out = out + drop(route(torch.cat([out, word])))
out.pow(2).mean().backward()
result = {"out": out, "dstate": state.grad, **{k: p.grad for k, p in route.named_parameters()}}
