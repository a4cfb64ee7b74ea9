"""Where the parameters of sibling heads lie, and what may happen to them."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastroute.multitask import MTLModel
from fastroute.multitask.heads import Siblings
from tests.helpers import seeds
from tests.helpers.subprocesses import check_python

from .test_heads import T, model_of


def lie_side_by_side(model: MTLModel) -> bool:
    """Each is the whole of a storage of its own: nobody else sees that they have anything in common."""
    weights = [model.get_parameter(f"head{i}.0.weight") for i in range(T)]
    step = weights[0].numel() * weights[0].element_size()
    return all(b.data_ptr() - a.data_ptr() == step for a, b in itertools.pairwise(weights)) and (
        all(w.untyped_storage().data_ptr() == w.data_ptr() and w.untyped_storage().nbytes() == step for w in weights)
    )


def agrees(model: MTLModel) -> None:
    """With its own layers called one by one."""
    x = torch.randn(3, 4, dtype=model.trunk.weight.dtype)
    out = model(x)[0]
    for i, y in enumerate(out):
        assert torch.allclose(y, model.get_submodule(f"head{i}")(model.trunk(x)), rtol=1e-4, atol=1e-6)


def test_parameters_lie_side_by_side() -> None:
    model = model_of()
    before = [id(p) for p in model.parameters()]
    assert not lie_side_by_side(model)
    agrees(model)
    assert lie_side_by_side(model) and [id(p) for p in model.parameters()] == before
    whole = [id(t) for t in part_of(model).memory._whole]
    for p in model.parameters():
        torch.nn.init.normal_(p)
    agrees(model)
    assert [id(t) for t in part_of(model).memory._whole] == whole  # the same memory, no copy


def part_of(model: MTLModel) -> Any:
    (group,) = [step.group for step in model.plan.steps if step.group is not None]
    assert isinstance(group, Siblings) and group._known is not None
    (part,) = group._known[0].parts
    return part


def saved(model: MTLModel) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


CHANGES: dict[str, Callable[[MTLModel], MTLModel]] = {
    "double": lambda m: m.double(),
    "to and back": lambda m: m.double().float(),
    "deepcopy": copy.deepcopy,
    "load": lambda m: (m.load_state_dict(model_of().state_dict()), m)[1],
    "assign": lambda m: (m.load_state_dict(model_of().state_dict(), assign=True), m)[1],
    "assign what lay together": lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()},
                                                              assign=True), m)[1],
    "pickle": lambda m: torch.load(saved(m), weights_only=False),
    "a new parameter": lambda m: (setattr(m.head2[0], "weight", nn.Parameter(torch.randn(4, 5))), m)[1],
    "data": lambda m: (setattr(m.head2[0].weight, "data", torch.randn(4, 5)), m)[1],
    "another schedule": lambda m: (setattr(m, "keep_outputs", True), m)[1],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_parts_parameters(change: str) -> None:
    model = model_of()
    agrees(model)
    model = CHANGES[change](model)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    agrees(model)
    assert lie_side_by_side(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sum(y.sum() for y in model(torch.randn(3, 4, dtype=model.trunk.weight.dtype))[0]).backward()
    optimizer.step()
    agrees(model)


def test_parameters_that_somebody_has_put_somewhere_stay() -> None:
    model = model_of()
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector, model.parameters())  # as a flat optimizer's
    agrees(model)
    vector.normal_()
    agrees(model)
    assert model.head1[0].weight.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    shared = model_of().share_memory()
    agrees(shared)
    assert shared.head1[0].weight.is_shared()
    tied = model_of()
    tied.head1[0].weight = tied.head0[0].weight
    agrees(tied)
    sum(y.sum() for y in tied(torch.randn(3, 4))[0]).backward()


USERS: dict[str, Callable[[MTLModel], Any]] = {
    "tied by data": lambda m: setattr(m.head1[0].weight, "data", m.head0[0].weight.data),
    "tied to something else": lambda m: nn.Parameter(m.head3[0].weight.detach()),
    "state dict": lambda m: m.state_dict(),
    "detached": lambda m: m.head2[0].weight.detach(),
    "a row": lambda m: m.head2[0].weight.data[1],
    "numpy": lambda m: m.head4[2].bias.detach().numpy(),
    "dlpack": lambda m: torch.from_dlpack(m.head4[2].bias.detach()),
}  # fmt: skip


def everywhere(kept: Any) -> list[torch.Tensor]:
    parts = list(kept.values()) if isinstance(kept, dict) else [] if kept is None else [kept]
    return [torch.as_tensor(part).detach().clone() for part in parts]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("use", USERS)
def test_memory_that_somebody_else_uses_stays(use: str, first: bool) -> None:
    """What a parameter has in common with others before it is called, or after, it has in training, as one by one."""
    found = []
    for fuse in (True, False):
        model = model_of(fuse_heads=fuse)
        if first:
            agrees(model)
        kept = USERS[use](model)
        if first:
            model.head5[0].weight.data = model.head5[0].weight.data.clone()  # parts it from the others
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        seeds.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            sum(y.square().sum() for y in model(torch.randn(3, 4))[0]).backward()
            optimizer.step()
        found.append([*everywhere(kept), *(p.detach().clone() for p in model.parameters())])
        agrees(model)
        if fuse and use != "tied by data":
            del kept
            agrees(model)
            assert lie_side_by_side(model)  # once nobody else uses it
    skip = {"state dict": "head5.0.weight"}.get(use) if first else None
    names = list(model.state_dict()) if use == "state dict" else []
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        if skip is None or k >= len(names) or names[k] != skip:
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), k


@pytest.mark.parametrize("how", ["made of", "assigned", "loaded"])
def test_memory_of_somebody_elses_stays(how: str) -> None:
    """Parameters in a NumPy array's memory, or a file's, follow what is written there."""
    model = model_of()
    arrays = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    held = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if how == "loaded":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        held = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    if how == "made of":
        for name, p in model.named_parameters():
            p.data = held[name]
    else:
        model.load_state_dict(held, assign=True)
    places = [p.data_ptr() for p in model.parameters()]
    del held
    agrees(model)
    assert places == [p.data_ptr() for p in model.parameters()]
    if how != "loaded":
        for array in arrays.values():
            array[...] = 1.0
        assert all((p == 1).all() for p in model.parameters())
    agrees(model)
    other = copy.deepcopy(model)  # in memory of PyTorch's
    agrees(other)
    assert lie_side_by_side(other)


def test_functional_call() -> None:
    model = model_of()
    agrees(model)
    x = torch.randn(3, 4)
    given = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    got = torch.func.functional_call(model, given, (x,))[0]
    other = model_of(fuse_heads=False)
    other.load_state_dict(given)
    for a, b in zip(got, other(x)[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    agrees(model)


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error() -> None:
    for fuse in (True, False):
        model = model_of(fuse_heads=fuse)
        out = model(torch.randn(3, 4))[0]
        with torch.no_grad():
            model.head1[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(y.sum() for y in out).backward()


def test_inference_first_then_training() -> None:
    model = model_of()
    with torch.inference_mode():
        model(torch.randn(3, 4))
    sum(y.sum() for y in model(torch.randn(3, 4))[0]).backward()
    torch.optim.Adam(model.parameters()).step()
    agrees(model)


GROUP = """
import copy, math, os, tempfile
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.helpers import seeds
from tests.multitask.test_heads import T, model_of
from tests.multitask.test_heads_memory import lie_side_by_side

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
seeds.manual_seed(0)
x, y = torch.randn(8, 4).double(), [torch.randn(8, 2).double() for _ in range(T)]
y[1][:] = math.nan

def trained(wrap, fuse):
    model = model_of(fuse_heads=fuse, weighting="uncertainty").double()
    for name in model.unused:
        getattr(model, name).requires_grad_(False)
    called = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(called(x), y)[0].backward()
        optimizer.step()
    return model


plain = trained(lambda m: m, False)
ddp = trained(DistributedDataParallel, True)
whole = trained(fully_shard, True)
for model in (ddp, whole):
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(a.full_tensor() if hasattr(a, "full_tensor") else a, b, msg=name)
assert not lie_side_by_side(ddp)
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_in_a_process_group() -> None:
    """DistributedDataParallel, and FSDP, whose parameters are lent to the forward pass."""
    assert "the same" in check_python(GROUP, timeout=240)
