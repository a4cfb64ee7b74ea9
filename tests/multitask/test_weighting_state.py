"""What a weighting keeps: by task name, in float32 at least, through every way a state goes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastroute.multitask import MTLModel
from fastroute.multitask import weighting as w
from tests.helpers import seeds
from tests.helpers.extras import needed
from tests.multitask.test_weighting import MAKERS, make

pytestmark = pytest.mark.filterwarnings("ignore:'auto' multiplies:UserWarning")  # which has a test of its own

safetensors = needed("safetensors.torch")
HEADS = [f"h{k}" for k in range(8)]
KEEPING = [name for name in MAKERS if name not in ("equal", "fixed", "rlw", "geometric")]
RECORDS = ("summed", "counted", "before", "seen")


def losses(seed: int, names: Any = HEADS) -> dict[str, Tensor]:
    drawn = torch.rand(8, generator=seeds.generator(seed)) + 0.1
    return {name: drawn[int(name[1:])].clone().requires_grad_() for name in names}


def train(weighting: w.Weighting, epochs: int = 3) -> w.Weighting:
    """Epochs of two batches of the same losses by name; of the last batch, the pass after the step is to come."""
    optimizer = torch.optim.Adam(weighting.parameters(), 0.1) if list(weighting.parameters()) else None
    for epoch in range(epochs):
        for batch in range(2):
            weighting(losses(10 * epoch + batch)).backward()
            if optimizer is not None:
                optimizer.step()
            if (epoch, batch) != (epochs - 1, 1):
                weighting.update(losses(100 + epoch))
        if epoch < epochs - 1:
            weighting.step()
    return weighting


def go_on(weighting: w.Weighting) -> Tensor:
    """What it makes of the same losses by name from here on."""
    weighting.update(losses(50))
    weighting.step()
    return weighting(losses(51))


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


FORMATS = {
    "as it is": lambda state: state,
    "a plain dict": dict,
    "torch.save": through_a_file,
    "safetensors": lambda state: safetensors.load(safetensors.save(dict(state))),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KEEPING)
def test_every_task_takes_its_own(name: str, form: str) -> None:
    first = train(make(name, HEADS, dtype=torch.float32))
    second = make(name, HEADS[::-1], dtype=torch.float32)
    second.load_state_dict(FORMATS[form](first.state_dict()))
    for key, value in first.state_dict().items():
        if value.shape[-1:] == (8,):
            assert torch.equal(second.state_dict()[key].nan_to_num(), value.flip(-1).nan_to_num()), key
    torch.testing.assert_close(go_on(second), go_on(first), rtol=1e-6, atol=0)


def model_of(heads: list[str], weighting: str) -> MTLModel:
    tasks = [{"name": h, "layers": nn.Linear(4, 1), "loss": nn.MSELoss()} for h in heads]
    return MTLModel(tasks, heads, weighting=weighting)


@pytest.mark.parametrize("assign", [False, True])
def test_of_a_model(assign: bool) -> None:
    """Heads go by name, and so do their weights."""
    first, second = model_of(HEADS, "uncertainty"), model_of(HEADS[::-1], "uncertainty")
    with torch.no_grad():
        first.weighting.log_variance.copy_(torch.arange(8.0))
    if assign:
        second.to("meta")
    second.load_state_dict(first.state_dict(), assign=assign)
    assert second.weighting.log_variance.tolist() == list(range(7, -1, -1))
    assert isinstance(second.weighting.log_variance, nn.Parameter)
    x, y = torch.randn(5, 4), {h: torch.randn(5, 1) for h in HEADS}
    torch.testing.assert_close(first.loss(first(x), y)[0], second.loss(second(x), y)[0])
    third = model_of(HEADS, "uncertainty")
    third.load_state_dict({k: v.bfloat16() for k, v in second.state_dict().items()})
    assert torch.equal(third.weighting.log_variance, first.weighting.log_variance)
    third.load_state_dict(second.state_dict())  # the names that it saves are those of its own order
    assert torch.equal(third.weighting.log_variance, first.weighting.log_variance)


@pytest.mark.parametrize("name", KEEPING)
def test_a_state_without_names_goes_by_position(name: str) -> None:
    """As all did, when records had one row."""
    first = train(make(name, HEADS, dtype=torch.float32))
    old = {k: v[0] if k in RECORDS else v for k, v in first.state_dict().items() if k != "task_names"}
    old = {k: v.bool() if k == "seen" else v.clone() for k, v in old.items()}
    expected = go_on(first)
    for tasks in (HEADS, 8):
        second = make(name, tasks, dtype=torch.float32)
        second.load_state_dict(old)
        second.update(list(losses(50).values()))
        second.step()
        torch.testing.assert_close(second(list(losses(51).values())), expected, rtol=1e-6, atol=0)
    second.load_state_dict(first.state_dict())  # into one whose tasks have numbers
    assert "task_names" not in second.state_dict()


def test_other_tasks_are_an_error() -> None:
    state = w.Uncertainty(["a", "b"]).state_dict()
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*\"task_names\['c'\]\".*Unexpected.*\"task_names\['b'\]\""
    ):
        w.Uncertainty(["a", "c"]).load_state_dict(state)
    del state["task_names"]
    w.Uncertainty(["a", "c"]).load_state_dict(state)
    state["task_names"] = torch.tensor([7, 255], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"Missing key.*\"task_names\['a'\]\", \"task_names\['c'\]\""):
        w.Uncertainty(["a", "c"]).load_state_dict(state)


@pytest.mark.parametrize("name", KEEPING)
def test_some_tasks_of_another_model(name: str) -> None:
    """``strict=False``: those that both have take what has their name, the others begin."""
    first = train(make(name, HEADS, dtype=torch.float32))
    tasks = ["new", *HEADS[5:1:-1]]
    second = make(name, tasks, dtype=torch.float32)
    fresh = copy.deepcopy(second.state_dict())
    told = second.load_state_dict(first.state_dict(), strict=False)
    kept = told.missing_keys == ["task_names['new']"] and len(told.unexpected_keys) == 4
    assert kept, f"{told}: if {name} is stateless, leave it out of KEEPING"
    for key, value in first.state_dict().items():
        if value.shape[-1:] == (8,):
            expected = torch.cat([fresh[key][..., :1], value[..., [5, 4, 3, 2]]], -1)
            assert torch.equal(second.state_dict()[key].nan_to_num(), expected.nan_to_num()), key
    assert torch.equal(second.state_dict()["task_names"], fresh["task_names"])


def test_what_keeps_nothing_has_no_state() -> None:
    for name in set(MAKERS) - set(KEEPING):
        assert not make(name, HEADS).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MAKERS)
def test_no_cast_makes_a_memory_coarser(name: str, dtype: torch.dtype) -> None:
    """lightning#18620: sums, means, an optimizer's moments and numbers that were given."""
    plain, cast = (make(name, HEADS, dtype=torch.float32) for _ in range(2))
    cast.to(dtype)
    for _ in range(300):  # where a sum in bfloat16 has stopped
        for one in (plain, cast):
            one(losses(1))
            one.update(losses(2))
    for one in (plain, cast):
        one.step()
    for key, value in plain.named_buffers():
        other = dict(cast.named_buffers())[key]
        assert other.dtype == value.dtype and torch.equal(other.nan_to_num(), value.nan_to_num()), key
    assert all(p.dtype == dtype for p in cast.parameters())
    assert all(b.dtype == torch.float64 for b in cast.double().buffers() if b.is_floating_point())
    small = make(name, HEADS, dtype=dtype)
    assert all(b.dtype == torch.float32 for b in small.buffers() if b.is_floating_point())
    assert all(b.is_meta for b in cast.to("meta", dtype).buffers())


@pytest.mark.parametrize("name", MAKERS)
def test_reset_parameters_sets_everything(name: str) -> None:
    """On the meta device, then ``to_empty``, whose memory holds anything."""
    for weighting in (train(make(name, HEADS)), make(name, HEADS, device="meta").to_empty(device="cpu")):
        for t in (*weighting.parameters(), *weighting.buffers()):
            t.data.fill_(7)
        weighting.reset_parameters()
        new = make(name, HEADS)
        for (key, t), (_, expected) in zip(
            (*weighting.named_parameters(), *weighting.named_buffers()),
            (*new.named_parameters(), *new.named_buffers()),
            strict=True,
        ):
            assert torch.equal(t.nan_to_num(), expected.nan_to_num()), key


@pytest.mark.parametrize("name", KEEPING)
def test_a_moving_average_of_it(name: str) -> None:
    """Of buffers too: names stay names."""
    weighting = make(name, HEADS, dtype=torch.float32)
    averaged = torch.optim.swa_utils.AveragedModel(weighting, use_buffers=True)
    for _ in range(3):
        train(weighting)
        averaged.update_parameters(weighting)
    assert torch.equal(averaged.module.task_names, weighting.task_names)
    make(name, HEADS[::-1], dtype=torch.float32).load_state_dict(averaged.module.state_dict())


@pytest.mark.parametrize("name", KEEPING)
def test_a_state_dict_is_made_of_parameters_and_buffers(name: str) -> None:
    weighting = train(make(name, HEADS, dtype=torch.float32)).eval()
    owned = {**dict(weighting.named_parameters()), **dict(weighting.named_buffers())}
    state = weighting.state_dict()
    assert all(owned[key].data_ptr() == value.data_ptr() for key, value in state.items())
    called = torch.func.functional_call(weighting, dict(state), (losses(4),))
    assert torch.equal(called, weighting(losses(4)))
