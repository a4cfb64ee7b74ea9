"""``agree``: before any work, the ranks of a group compare what they have to have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops.arguments import checked

__all__ = ["agree", "collective_device", "group_of"]

Group = dist.ProcessGroup | DeviceMesh | None

_RAISED = "raised "  #: a description of an exception begins with it
_LONGEST = 200  #: characters of a value that a message shows whole


@checked
def agree(what: Mapping[str, object], group: Group = None, *, layer: str) -> None:
    """Raise on **every** rank of a group unless all ranks have the same of ``what``.

    One all-gather of 40 bytes. Only if the ranks differ, a second one fetches what each of them has, for the message.
    No rank is left waiting, whatever the others have. So a rank that finds its own arguments wrong calls this too, with
    its exception as a value.

    Args:
        what: a name to a value: numbers, strings, dtypes, shapes, lists and mappings of them, compared by their text;
            tensors, compared by shape, dtype and every bit (they are read: set-up is the place for that); None; an
            exception that this rank would raise: then every rank raises, and says which one it was.
        group: a process group or a mesh of one dimension; None: all ranks. Without ``init_process_group``, one rank.
        layer: what the message begins with.

    Raises:
        ValueError: the ranks differ. The message names every value that differs, with its ranks; it is the same on all.
            TypeError, ValueError: naming the argument; a mesh of several dimensions.
        Exception: every rank gave the same exception: each raises its own.

    Example::

        agree({"n_inp": layer.n_inp, "dtype": layer.W_A.dtype, "mask": mask}, mesh, layer="encoder.routing")
    """
    have = {str(name): _described(value) for name, value in what.items()}
    own = next((value for value in what.values() if isinstance(value, Exception)), None)
    text = json.dumps(have, sort_keys=True).encode()
    if not dist.is_initialized():
        if own is not None:
            raise own
        return
    group = group_of(group)
    digest = hashlib.sha256(text).digest() + len(text).to_bytes(8, "big")
    digests = _gathered(digest, group, layer)
    if own is None and all(other == digest for other in digests):
        return
    if all(other == digest for other in digests):
        raise own  # type: ignore[misc]
    longest = max(int.from_bytes(other[-8:], "big") for other in digests)
    texts = _gathered(text.ljust(longest), group, layer)
    raise ValueError(_message([json.loads(other) for other in texts], layer, group)) from own


def group_of(group: Group) -> dist.ProcessGroup | None:
    """A mesh's process group."""
    if isinstance(group, DeviceMesh) and group.ndim != 1:
        raise ValueError(f"group: expected a process group or a mesh of one dimension, got {group}")
    return group.get_group() if isinstance(group, DeviceMesh) else group


def collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's tensors have to be: the CPU if its back end takes them there, else this rank's accelerator."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _described(value: Any) -> str:
    """A text that is the same where the values are."""
    if isinstance(value, Exception):
        return f"{_RAISED}{type(value).__name__}: {value}"
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if value.is_meta:
            return f"{kind} without numbers"
        with torch.no_grad():
            found = value.full_tensor() if hasattr(value, "full_tensor") else value
            raw = found.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{kind} with bits {hashlib.sha256(raw).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (torch.Size, list, tuple)):
        return "[" + ", ".join(map(_described, value)) + "]"
    return str(value)


def _gathered(message: bytes, group: dist.ProcessGroup | None, layer: str) -> list[bytes]:
    """Every rank's message; all have the same length."""
    mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(collective_device(group))
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(every, mine, group=group)
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"{layer}: the all-gather by which ranks {ranks} agree failed; has one of them ended? {error}"
        ) from error
    return [bytes(other.cpu().numpy()) for other in every]


def _message(have: list[dict[str, str]], layer: str, group: dist.ProcessGroup | None) -> str:
    ranks = dist.get_process_group_ranks(group)
    parts, failures = [], []
    for name in {name: None for one in have for name in one}:
        by_value: dict[str, list[int]] = {}
        for rank, one in zip(ranks, have, strict=True):
            by_value.setdefault(one.get(name, "nothing"), []).append(rank)
        failures += [f"{value} on {_ranks(on)}" for value, on in by_value.items() if value.startswith(_RAISED)]
        if len(by_value) > 1:
            shown = (f"{_short(value, by_value)} on {_ranks(on)}" for value, on in by_value.items())
            parts.append(f"{name}: expected the same on every rank, got " + ", ".join(shown))
    return f"{layer}: " + "; ".join(failures or parts)  # what else differs may be the failure's consequence


def _short(value: str, others: Mapping[str, object]) -> str:
    """A long value from where it differs from another."""
    if len(value) <= _LONGEST:
        return value
    same = min(
        next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
        for other in others
        if other != value
    )
    start = max(0, same - _LONGEST // 4)
    return ("…" if start else "") + value[start : start + _LONGEST] + ("…" if start + _LONGEST < len(value) else "")


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0 to 6``, ``ranks 0, 2 and 5``"""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
