"""Dropout in several branches: which draws first decides what all of them drop."""

import torch
from torch import nn
from torchmtl import MTLModel
from torchmtl.wrapping_layers import Concat, SliceSelect

torch.manual_seed(4)
layers = [
    {"name": "late", "layers": nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5)), "anchor_layer": "join"},
    {"name": "join", "layers": Concat(1), "anchor_layer": ["b", "a"]},
    {"name": "a", "layers": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), "anchor_layer": "left"},
    {"name": "b", "layers": nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5))},
    {"name": "left", "layers": SliceSelect((slice(None), slice(0, 3)))},
    {"name": "nobody", "layers": nn.Dropout(0.5)},
]
model = MTLModel(layers, ["late", "a", "root"])
x = torch.randn(6, 5)
torch.manual_seed(5)
outs, losses, weights = model(x)
result = {"outs": outs, "none": [losses, weights], "order": list(model.outputs), "next": torch.rand(2)}
