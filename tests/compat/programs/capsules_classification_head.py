"""A classification head on the hidden states of a frozen transformer: all depths, all positions, two routings."""

import torch
from torch import nn
from heinsen_routing import EfficientVectorRouting as Routing


class Head(nn.Module):
    def __init__(self, depths, width, parts, classes):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.W, self.B = nn.Parameter(torch.ones(depths, width)), nn.Parameter(torch.zeros(depths, width))
        self.routes = nn.Sequential(Routing(-1, parts, width, width), Routing(parts, classes, width, 1))

    def forward(self, hidden):  # [B, positions, depths, width]
        x = self.norm(hidden) * self.W + self.B
        return self.routes(x.flatten(1, 2)).squeeze(-1)


torch.manual_seed(0)
head = Head(3, 8, 6, 4)
hidden, labels = torch.randn(5, 7, 3, 8), torch.tensor([0, 1, 2, 3, 0])
optimizer = torch.optim.RAdam(head.parameters(), lr=1e-2)
losses = []
for _ in range(4):
    loss = nn.functional.cross_entropy(head(hidden), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
result = {"losses": torch.stack(losses), **head.state_dict()}
