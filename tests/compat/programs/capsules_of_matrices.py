"""Capsules from pixels: convolutions, two routings of matrices, scores that are logits."""

import torch
from torch import nn
from heinsen_routing import GenerativeMatrixRouting

torch.manual_seed(6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.SiLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 17, 3, 2))
        self.parts = GenerativeMatrixRouting(-1, 6, 4, 4, 4)
        self.objects = GenerativeMatrixRouting(6, 3, 4, 4, 4, p_model="skm", single_beta=True)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)  # [B, places, 17]
        a, mu, _ = self.parts(x[..., 0], x[..., 1:].unflatten(-1, (4, 4)))
        return self.objects(a, mu)


net = Net()
x, y = torch.randn(4, 1, 13, 13), torch.tensor([0, 1, 2, 0])
optimizer = torch.optim.RAdam(net.parameters(), lr=5e-2)
for _ in range(4):
    a, mu, sig2 = net(x)
    loss = nn.functional.cross_entropy(a + mu.mean((-2, -1)), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
result = {"loss": loss.detach(), "sig2": sig2, **net.state_dict()}
