"""torchMTL's import paths: ``torchmtl``, ``torchmtl.model_builder`` and ``torchmtl.wrapping_layers``.

Write ``fastroute.compat.`` in front, or call ``fastroute.compat.install()`` before the first import, or run a script
by ``python -m fastroute run script.py``. Same arguments, attributes, state dicts and numbers. Where torchMTL hangs, or
fails later with another name in the message, this raises at construction. It prints nothing.

The README's loop, which fails there, adds a learned weight's term to the sum of the others in place:

>>> import torch
>>> from torch import nn
>>> from fastroute.compat.torchmtl import MTLModel
>>> from fastroute.compat.torchmtl.wrapping_layers import Concat
>>> _ = torch.manual_seed(0)
>>> model = MTLModel(
...     [
...         {"name": "Embed1", "layers": nn.Linear(4, 3)},
...         {"name": "Embed2", "layers": nn.Linear(4, 3)},
...         {"name": "Both", "layers": Concat(dim=1), "anchor_layer": ["Embed1", "Embed2"]},
...         {"name": "A", "layers": nn.Linear(3, 1), "anchor_layer": "Embed1", "loss": nn.MSELoss(),
...          "loss_weight": 1.0},
...         {"name": "B", "layers": nn.Linear(6, 1), "anchor_layer": "Both", "loss": nn.MSELoss(),
...          "loss_weight": "auto", "loss_init_val": 1.0},
...     ],
...     output_tasks=["A", "B"],
... )
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
>>> X, y = torch.randn(8, 4), [torch.ones(8, 1), torch.zeros(8, 1)]
>>> for step in range(20):
...     optimizer.zero_grad()
...     y_hat, l_funcs, l_weights = model(X)
...     loss = None
...     for i in range(len(y_hat)):
...         if not loss:
...             loss = l_weights[i] * l_funcs[i](y_hat[i], y[i])
...         else:
...             loss += l_weights[i] * l_funcs[i](y_hat[i], y[i])
...     loss.backward()
...     optimizer.step()
>>> list(model.state_dict())[:2], model.B_loss.shape
(['B_loss', 'Embed1.weight'], torch.Size([1]))
"""

from . import model_builder, wrapping_layers
from .model_builder import MTLModel

__all__ = ["MTLModel", "model_builder", "wrapping_layers"]
__version__ = "0.1.8"
