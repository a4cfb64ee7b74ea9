"""The Triton backend of ``trajectory_loss``: one program per block of samples, written out for each decision.

Everything a program reads is one matrix in float32, whose rows are the tensors of the decisions, and one of masks.
Which row is whose is known when a kernel is compiled; a list of small numbers comes as one integer, 16 bits each.
Axes: B samples, T decisions, C differentiable columns, N rows of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from fastroute.ops.trajectory_loss.contract import ALGORITHMS, FIELDS

from . import launch as start
from .launch import _INTERPRETED, cdiv

BLOCK = 128
WARPS = 4
CHUNK = 8  #: decisions that a kernel is written out for; longer trajectories take several
COLUMNS = 16  #: scores of a sample that are looked at together

#: True: rewards whose formula is known are made in the loss's kernel. None is False: by PyTorch's operators, before.
force_rewards: bool | None = None


def makes_rewards() -> bool:
    """Whether rewards are made here."""
    return force_rewards is True


class Rewards(NamedTuple):
    """What rewards are made of: ``reference.trajectory_loss.Final`` and ``ByAction``, those of all decisions."""

    scale: float
    scores: Tensor | None  # [B, C]
    truth: Tensor | None  # [B] int64
    table: Tensor | None  # of all decisions, one after another
    actions: Tensor | None  # [., B] int64
    places: Sequence[int]  # of each decision: its row of actions or -1, where its table begins, its choices
    ratio: float | None
    final: Tensor  # out: f [B]


_REINFORCE = tl.constexpr(ALGORITHMS.index("REINFORCE"))
_BL1 = tl.constexpr(ALGORITHMS.index("REINFORCEBl1"))
_BL2 = tl.constexpr(ALGORITHMS.index("REINFORCEBl2"))
_EGREEDY_REINFORCE = tl.constexpr(ALGORITHMS.index("EGreedyREINFORCE"))
_BOOTSTRAP_AAC = tl.constexpr(ALGORITHMS.index("BootstrapAAC"))
_EGREEDY_AAC = tl.constexpr(ALGORITHMS.index("EGreedyAAC"))
_SURPRISE = tl.constexpr(ALGORITHMS.index("SurpriseLearning"))
_WPL = tl.constexpr(ALGORITHMS.index("WPL"))
_SILENT = tl.constexpr(ALGORITHMS.index("GumbelSoftmax"))


def _set(*names: str) -> tl.constexpr:
    return tl.constexpr(sum(1 << ALGORITHMS.index(name) for name in names))


# sets of kinds, a bit each
VALUES = _set("QLearning", "SARSA")
ADVANTAGES = _set("AdvantageLearning", "BootstrapAdvantageLearning", "SurpriseLearning")
RETURNS = _set("AAC", "EGreedyAAC", "AdvantageLearning", "WPL")  # whose critic learns R, not y


@triton.jit
def row(rows, number, at, on, B):
    """A row of a matrix [N, B], at some samples."""
    return tl.load(rows + tl.cast(number, tl.int64) * B + at, mask=on, other=0)


@triton.jit
def exp(x):
    """e^x to a rounding or two, as in PyTorch; tl.exp first rounds a product with log2(e)."""
    if _INTERPRETED:  # it has no libdevice
        made = tl.exp(x)
    else:
        made = libdevice.exp(x)
    return made


@triton.jit
def by_action(
    table, actions, number, at, on, B, ratio, BEGIN: tl.constexpr, CHOICES: tl.constexpr, COUNTED: tl.constexpr
):
    """Rewards by action; an action that there is not has none. With the roundings of PyTorch's operators."""
    a = row(actions, number, at, on, B)
    entry = table + BEGIN + a
    known = on & (a >= 0) & (a < CHOICES)
    found = tl.load(entry, mask=known, other=0).to(tl.float32)
    if COUNTED:
        total = tl.zeros_like(found) + tl.load(table + BEGIN + CHOICES).to(tl.float32)
        each = tl.div_rn(tl.zeros_like(found) + 1.0, tl.maximum(total, 1.0)) * ratio
        found = (tl.load(entry + 1, mask=known, other=0).to(tl.float32) - found) * each
    return found


@triton.jit
def best(scores, at, on, C, COLUMNS: tl.constexpr):
    """The first of a sample's largest scores, as torch.argmax finds it: what is not a number is the largest."""
    top = tl.zeros_like(at).to(tl.float32) + float("-inf")
    guess = tl.zeros_like(at).to(tl.int32)
    nowhere = guess + C
    is_nan = nowhere
    for first in range(0, C, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        keep = on[:, None] & (c < C)[None, :]
        z = tl.load((scores + at * C)[:, None] + c[None, :], mask=keep, other=float("-inf")).to(tl.float32)
        is_nan = tl.minimum(is_nan, tl.min(tl.where(z != z, c[None, :], C), 1))
        z = tl.where(z != z, float("-inf"), z)
        here = tl.max(z, 1)
        where = tl.min(tl.where(z == here[:, None], c[None, :], C), 1)
        guess = tl.where(here > top, where, guess)
        top = tl.maximum(top, here)
    return tl.where(is_nan < nowhere, is_nan, guess)


@triton.jit
def decision(
    rows, masks, slopes, table, actions, at, on, B, f, scale, gamma, ratio, R, ahead, more,
    KIND: tl.constexpr, K: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, AUX: tl.constexpr, OWN: tl.constexpr,
    LOOK: tl.constexpr, ACTIVE: tl.constexpr, ACTION: tl.constexpr, BEGIN: tl.constexpr, CHOICES: tl.constexpr,
    COUNTED: tl.constexpr, WANT: tl.constexpr,
):  # fmt: skip
    """One decision's loss and slopes; (loss, R, ahead, more), the last three for the decision before it."""
    zero = tl.zeros_like(f)
    active = on
    if ACTIVE != 0:
        active = row(masks, ACTIVE - 1, at, on, B) != 0
    r = tl.where(more, 0.0, f)
    if ACTION != 0:
        mine = by_action(table, actions, ACTION - 1, at, on, B, ratio, BEGIN, CHOICES, COUNTED)
        if OWN != 0:
            mine += row(rows, OWN, at, on, B)
        r += mine * scale
    elif OWN != 0:
        r += row(rows, OWN, at, on, B) * scale
    R_t = r + gamma * R
    y = tl.where(more, r + gamma * ahead, r)
    if KIND == _SURPRISE:
        y = tl.where(more, gamma * ahead - r, f)
    loss = zero
    if KIND != _SILENT:
        s0 = row(rows, S0, at, on, B)
        s1 = zero
        aux = zero
        if S1 != 0:
            s1 = row(rows, S1, at, on, B)
        if AUX != 0:
            aux = row(rows, AUX, at, on, B)
        goal = y
        if RETURNS & (1 << KIND):
            goal = R_t
        if VALUES & (1 << KIND):
            loss = (s0 - y) * (s0 - y)
            d0 = 2.0 * (s0 - y)
        elif ADVANTAGES & (1 << KIND):
            off = s0 - (goal - s1)
            loss = off * off
            d0 = 2.0 * off
        elif KIND == _WPL:
            p = exp(s0)
            d = R_t - aux
            step = tl.where(d < 0, d * p, d * (1.0 - p))
            off = p - (p + step)
            loss = off * off
            d0 = -2.0 * step * p
        else:
            advantage = R_t
            if KIND == _BL1:
                advantage = R_t - aux
            elif KIND == _BL2:
                advantage = R_t / (K * exp(s0)) - aux
            elif KIND == _EGREEDY_REINFORCE:
                advantage = aux * R_t
            elif KIND == _EGREEDY_AAC:
                advantage = aux * (R_t - s1)
            elif KIND == _BOOTSTRAP_AAC:
                advantage = y - s1
            elif KIND != _REINFORCE:
                advantage = R_t - s1
            loss = -s0 * advantage
            d0 = -advantage
        if S1 != 0:
            loss += (s1 - goal) * (s1 - goal)
        loss = tl.where(active, loss, 0.0)
        if WANT:
            tl.store(slopes + tl.cast(S0 - 1, tl.int64) * B + at, tl.where(active, d0, 0.0), mask=on)
            if S1 != 0:
                d1 = 2.0 * (s1 - goal)
                tl.store(slopes + tl.cast(S1 - 1, tl.int64) * B + at, tl.where(active, d1, 0.0), mask=on)
    seen = zero
    if LOOK != 0:
        seen = row(rows, LOOK, at, on, B)
    return loss, tl.where(active, R_t, R), tl.where(active, seen, ahead), more | active


@triton.jit
def forward_kernel(
    rows, masks, state, loss, slopes, gamma, B, M, unmasked,
    scores, truth, C, factor, table, actions, ratio, final,
    T: tl.constexpr, CHOICES: tl.constexpr, KIND: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    AUX: tl.constexpr, OWN: tl.constexpr, LOOK: tl.constexpr, ACTIVE: tl.constexpr, ACTION: tl.constexpr,
    BEGIN: tl.constexpr, ENTRIES: tl.constexpr, COUNTED: tl.constexpr, COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr,
    WANT: tl.constexpr, RESUME: tl.constexpr, PAUSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss [B] and slopes [C, B] from rows [N, B], row 0 being f, and masks [M, B]. In the lists of rows 0 is none.

    T decisions, the last one first. What later ones left for them is in state [3, B] (and in loss) if this is to
    RESUME, and they leave it there for earlier ones if this is to PAUSE.

    With ``final`` [B], row 0 are the losses of which f is made, or else of scores [B, C] and truth [B].
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = at < B
    f = row(rows, 0, at, on, B)
    if final is not None:
        if scores is not None:
            f = tl.where(best(scores, at, on, C, COLUMNS) == tl.load(truth + at, mask=on, other=0), factor, -factor)
        else:
            f = -f * factor
        tl.store(final + at, f, mask=on)
    count = tl.zeros_like(f) + unmasked
    if masks is not None:
        for m in range(M):
            count += row(masks, m, at, on, B).to(tl.float32)
    scale = 1.0 / tl.maximum(count, 1.0)
    if NORMALIZE:
        scale = tl.abs(f) / tl.maximum(count, 1.0)
    R = tl.zeros_like(f)
    ahead = tl.zeros_like(f)
    total = tl.zeros_like(f)
    more = at < 0
    if RESUME:
        R = row(state, 0, at, on, B)
        ahead = row(state, 1, at, on, B)
        more = row(state, 2, at, on, B) != 0
        total = row(loss, 0, at, on, B)
    for t in tl.static_range(T - 1, -1, -1):
        made, R, ahead, more = decision(
            rows, masks, slopes, table, actions, at, on, B, f, scale, gamma, ratio, R, ahead, more,
            (KIND >> (16 * t)) & 0xFFFF, (CHOICES >> (32 * t)) & 0xFFFFFFFF, (S0 >> (16 * t)) & 0xFFFF,
            (S1 >> (16 * t)) & 0xFFFF, (AUX >> (16 * t)) & 0xFFFF, (OWN >> (16 * t)) & 0xFFFF,
            (LOOK >> (16 * t)) & 0xFFFF, (ACTIVE >> (16 * t)) & 0xFFFF, (ACTION >> (16 * t)) & 0xFFFF,
            (BEGIN >> (32 * t)) & 0xFFFFFFFF, (ENTRIES >> (32 * t)) & 0xFFFFFFFF, COUNTED, WANT,
        )  # fmt: skip
        total += made
    tl.store(loss + at, total, mask=on)
    if PAUSE:
        tl.store(state + at, R, mask=on)
        tl.store(state + tl.cast(B, tl.int64) + at, ahead, mask=on)
        tl.store(state + tl.cast(B, tl.int64) * 2 + at, more.to(tl.float32), mask=on)


def _packed(numbers: Iterable[int], bits: int = 16) -> int:
    return sum(number << (bits * t) for t, number in enumerate(numbers))


def forward(
    f: Tensor, columns: Sequence[Tensor], others: Sequence[Tensor], masks: Sequence[Tensor], layout: Sequence[int],
    gamma: float, normalize: bool, want_slopes: bool, rewards: Rewards | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``fastroute.ops.trajectory_loss.plain.forward``, in float32; with ``rewards``, f are the losses."""
    B, C, T = f.shape[0], len(columns) if want_slopes else 0, len(layout) // FIELDS
    loss, slopes = f.new_empty(B, dtype=torch.float32), f.new_empty(C, B, dtype=torch.float32)
    if B == 0 or T == 0:
        return loss.zero_(), slopes
    rows = torch.stack([f, *columns, *others]).to(torch.float32)
    flags = torch.stack(list(masks)).view(torch.uint8) if masks else None
    state = f.new_empty(3, B, dtype=torch.float32) if T > CHUNK else None
    made = Rewards(1.0, *[None] * 4, [-1, 0, 0] * T, None, None) if rewards is None else rewards  # type: ignore[arg-type]
    scores, truth, table, actions = (None if t is None else t.contiguous() for t in made[1:5])  # type: ignore[union-attr]
    formulas = (
        scores, truth, 0 if scores is None else scores.shape[1], float(made.scale), table, actions,
        0.0 if made.ratio is None else float(made.ratio), made.final,
    )  # fmt: skip
    for end in range(T, 0, -CHUNK):
        begin = max(0, end - CHUNK)
        start.launch(
            forward_kernel, (cdiv(B, BLOCK),), rows, flags, state, loss, slopes, gamma, B, len(masks),
            T - len(masks), *formulas, **_constants(layout[begin * FIELDS : end * FIELDS], len(columns)),
            **_places(made.places[3 * begin : 3 * end]), COUNTED=made.ratio is not None, COLUMNS=COLUMNS,
            NORMALIZE=normalize, WANT=want_slopes, RESUME=end < T, PAUSE=begin > 0, BLOCK=BLOCK, warps=WARPS, stages=1,
        )  # fmt: skip
    return loss, slopes


def _constants(layout: Sequence[int], columns: int) -> dict[str, int]:
    """What the kernel is compiled for: the kinds of some decisions, and which rows are theirs."""
    kind, choices, s0, s1, aux, own, look, active = (layout[i::FIELDS] for i in range(FIELDS))
    bl2, after = ALGORITHMS.index("REINFORCEBl2"), columns + 1
    return {
        "T": len(kind),
        "CHOICES": _packed((K if k == bl2 else 0 for k, K in zip(kind, choices, strict=True)), 32),
        "KIND": _packed(kind),
        **{name: _packed(i + 1 for i in which) for name, which in (("S0", s0), ("S1", s1), ("ACTIVE", active))},
        **{
            name: _packed(i + after if i >= 0 else 0 for i in which)
            for name, which in (("AUX", aux), ("OWN", own), ("LOOK", look))
        },
    }


def _places(places: Sequence[int]) -> dict[str, int]:
    """Where a decision finds its rewards by action."""
    rows, begin, choices = (places[i::3] for i in range(3))
    packed = _packed(row + 1 for row in rows), _packed(begin, 32), _packed(choices, 32)
    return dict(zip(("ACTION", "BEGIN", "ENTRIES"), packed, strict=True))
