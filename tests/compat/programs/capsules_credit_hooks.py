"""Credit from end to end: hooks keep every phi and pass on what the next layer takes."""

import torch
from torch import nn
from heinsen_routing import EfficientVectorRouting

torch.manual_seed(2)
layers = [
    EfficientVectorRouting(-1, 6, 5, 5, return_dict=True),
    EfficientVectorRouting(6, 4, 5, 5, return_dict=True),
    EfficientVectorRouting(4, 3, 5, 1, n_iters=3, return_dict=True),
]
model, kept = nn.Sequential(*layers), []


def keep(module, inputs, output):
    kept.append(output["phi"].detach())
    return output["x_out"]


hooks = [layer.register_forward_hook(keep) for layer in layers]
y = model(torch.randn(9, 5))
credit = kept[0]
for phi in kept[1:]:
    credit = credit @ phi
    credit = credit / (credit.std() + 1e-5)
for hook in hooks:
    hook.remove()
last = layers[2](torch.randn(2, 4, 5))
result = {"y": y, "credit": credit, **{k: last[k] for k in ("a_inp", "S", "R", "D_use", "D_ign", "phi", "x_out")}}
