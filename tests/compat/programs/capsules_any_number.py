"""2019's extras: outputs whose number comes with the call, and the routing probabilities."""

import torch
from heinsen_routing import Routing

torch.manual_seed(9)
route = Routing(d_cov=2, d_inp=3, d_out=3, p_model="skm")
with torch.no_grad():
    for p in route.parameters():
        p.add_(torch.randn(p.shape) * 0.3)
a, mu = torch.randn(2, 5), torch.randn(2, 5, 2, 3)
result = {}
for n_out in (None, 3, 8):
    options = {} if n_out is None else {"n_out": n_out}
    a_out, mu_out, sig2, R = route(a, mu, return_R=True, **options)
    result[f"{n_out}"] = (a_out, mu_out, sig2, R)
a_out.sum().backward()
result["grads"] = {k: p.grad for k, p in route.named_parameters() if p.grad is not None}
