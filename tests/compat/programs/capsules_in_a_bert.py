"""A layer of a BERT whose output vectors are routed, with padding masked."""

import torch
from torch import nn
from heinsen_routing.heinsen_routing import EfficientVectorRouting

torch.manual_seed(4)


class Layer(nn.Module):
    def __init__(self, width, positions):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.routing = EfficientVectorRouting(n_inp=positions, n_out=positions, d_inp=width, d_out=width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask):
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=mask[:, 0], need_weights=False)[0])
        open_ = mask.transpose(1, 2).expand(-1, -1, x.shape[1]).clone()
        open_[:, :, 0] = False  # every input may reach the first output
        return self.norm(x + self.routing(x, open_))


layers = nn.ModuleList(Layer(8, 6) for _ in range(2))
x = torch.randn(3, 6, 8)
mask = torch.arange(6)[None, None] >= torch.tensor([6, 4, 2])[:, None, None]
for layer in layers:
    x = layer(x, mask)
x[:, 0].square().sum().backward()
result = {"x": x.detach(), **{k: p.grad for k, p in layers.named_parameters()}}
