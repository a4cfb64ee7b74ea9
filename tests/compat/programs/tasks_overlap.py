"""How much two tasks share, from the masks alone."""

import numpy as np
import torch
from taskrouting import TaskRouter

np.random.seed(11)
routers = [TaskRouter(width, 8, off) for width, off in ((16, 4), (32, 16), (8, 7))]
masks = [router.get_unit_mapping().detach() for router in routers]
overlap = sum(mask @ mask.T for mask in masks)
result = {
    "masks": masks,
    "overlap": overlap,
    "orphans": [int((mask.sum(0) == 0).sum()) for mask in masks],
    "next": torch.tensor(np.random.rand(3)),
}
