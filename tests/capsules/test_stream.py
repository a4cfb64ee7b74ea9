"""``EfficientVectorRouting.stream``: chunks give what the whole gives, and are gone through no more than needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastroute import EfficientVectorRouting
from fastroute.capsules import VectorChunks, stream
from tests.helpers import seeds
from tests.helpers.backends import FLOAT32, HERE
from tests.helpers.budget import check
from tests.helpers.cases import Case, evaluate
from tests.helpers.opcheck import assert_same, gradcheck
from tests.helpers.routing_cases import module_case, module_truth, some_mask

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
N, M, D, H = 23, 5, 8, 6

#: n_inp, n_out, d_inp, d_out: parameters with a row per input; the Gram form (d <= 2 m); both betas in one.
SIZES = {"fixed": (N, M, D, H), "gram": (-1, M, D, H), "betas": (-1, 3, D, H)}
each_size = pytest.mark.parametrize("size", SIZES)


pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def chunks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are too small not to be put together."""
    monkeypatch.setitem(stream._LEAST_BYTES, "cpu", 1)


def make(size: str = "fixed", **options: Any) -> EfficientVectorRouting:
    """A module none of whose parameters is zero."""
    seeds.manual_seed(0)
    module = EfficientVectorRouting(*SIZES[size], **{"dtype": F64, **options})
    with torch.no_grad():
        for name in ("B_A", "B_F2", "B_G2", "B_S"):
            getattr(module, name).normal_(std=0.3)
    return module


def vectors(*lead: int, n: int = N, dtype: torch.dtype = F64, seed: int = 1) -> Tensor:
    return torch.randn(*lead, n, D, generator=seeds.generator(seed), dtype=F64).to(dtype)


class Streams(nn.Module):
    """The layer, called by ``stream`` on the vectors cut to ``sizes`` (the last one to the end)."""

    def __init__(self, layer: EfficientVectorRouting, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.sizes = layer, sizes

    def forward(self, x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        """x [..., n, d]."""
        rest = x.shape[-2] - sum(self.sizes)
        return self.layer.stream(list(x.split([*self.sizes, rest], -2)), mask=mask, lengths=lengths)


def streamed(layer: EfficientVectorRouting, sizes: tuple[int, ...]) -> Callable[..., dict[str, Tensor]]:
    """As a function of a ``module_case``'s inputs."""
    streams = Streams(layer, sizes)

    def call(*, x_inp: Tensor, mask: Tensor | None, lengths: Tensor | None, **state: Tensor) -> dict[str, Tensor]:
        state = {f"layer.{k}": t for k, t in state.items()}
        return {"x_out": torch.func.functional_call(streams, state, (x_inp, mask, lengths))}

    return call


def case_of(layer: EfficientVectorRouting, x: Tensor, **options: Any) -> Case:
    g = torch.randn(*x.shape[:-2], layer.n_out, layer.d_out, generator=seeds.generator(2), dtype=F64)
    case = module_case(layer, x, {"x_out": g.to(x.dtype)}, **options)
    return replace(case, wrt=tuple(k for k in case.wrt if k != "x_inp"))


def truth(layer: EfficientVectorRouting) -> Callable[..., dict[str, Tensor | None]]:
    literal = module_truth(layer)
    return lambda **inputs: {"x_out": literal(**inputs)["x_out"]}


def compared(layer: EfficientVectorRouting, x: Tensor, sizes: tuple[int, ...] = (7, 1, 9), **options: Any) -> None:
    """Outputs and every parameter's gradient are the literal reference's on the whole, in float64."""
    case = case_of(layer, x, **options)
    found = evaluate(streamed(layer, sizes), case)
    for name, expected in evaluate(truth(layer), case).items():
        got = found[name]
        assert (got is None) == (expected is None), name
        if got is not None and expected is not None:
            assert_same(got, expected, name)


# -------------------------------------------------------------------------------------------------------- numbers


@each_size
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n_iters", [1, 2, 3])
def test_is_the_whole(size: str, n_iters: int, normalize: bool) -> None:
    compared(make(size, n_iters=n_iters, normalize=normalize), vectors())


@each_size
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
def test_batches(size: str, lead: tuple[int, ...]) -> None:
    compared(make(size), vectors(*lead))


@each_size
@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("options", ["mask", "a mask per sample", "lengths", "both"])
def test_masks_and_lengths(size: str, n_iters: int, options: str) -> None:
    """Lengths that end within a chunk, at its edge, before it, and never begin."""
    layer = make(size, n_iters=n_iters)
    found: dict[str, Tensor] = {}
    if options != "lengths":
        found["mask"] = some_mask(*(() if options == "mask" else (4,)), N, layer.n_out)
    if options in ("lengths", "both"):
        found["lengths"] = torch.tensor([N, 8, 3, 0])
    compared(layer, vectors(4), **found)


@each_size
def test_chunks_that_are_padding_for_all(size: str) -> None:
    compared(make(size), vectors(2), (8, 8), lengths=torch.tensor([8, 3]))


@each_size
def test_one_row_at_a_time(size: str) -> None:
    """Also where a chunk of one row has parameters with one row, which looks like shared ones."""
    compared(make(size), vectors(2), (1,) * (N - 1))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=8), size=st.sampled_from(sorted(SIZES)), b=st.integers(1, 2))
def test_any_cut_is_the_same(sizes: list[int], size: str, b: int) -> None:
    """Cutting is no part of the problem; empty chunks neither."""
    layer, x = make(size), vectors(b)
    while sum(sizes) > N:
        sizes.pop()
    with torch.no_grad():
        assert_same(Streams(layer, tuple(sizes))(x, None, None), layer(x), "x_out")


@pytest.mark.parametrize("backend", FLOAT32, indirect=True)
@each_size
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_error_budget(size: str, dtype: torch.dtype, backend: str) -> None:
    """Many chunks round no worse than one sum. (Few where kernels are interpreted.)"""
    n, m, d, h = 40 if backend == "triton" else 200, *SIZES[size][1:]
    cases = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer = EfficientVectorRouting(n if size == "fixed" else -1, m, d, h, dtype=dtype)
        cases.append(case_of(layer, vectors(n=n, dtype=dtype, seed=seed)))
    sizes = (24, 1) if backend == "triton" else (3,) * 65
    check(streamed(layer, sizes), truth(layer), cases, dtype=dtype, stored=dtype)


@each_size
def test_gradcheck(size: str) -> None:
    seeds.manual_seed(0)
    d = 5 if size == "betas" else 4
    layer = EfficientVectorRouting(5 if size == "fixed" else -1, 2, d, 2, dtype=F64)
    gradcheck(streamed(layer, (2, 1)), case_of(layer, vectors(n=5)[:, :d]))


def test_same_bits_twice() -> None:
    layer, x = make("betas", dtype=F32), vectors(n=500, dtype=F32)
    first, second = (layer.stream(x, rows=64) for _ in range(2))
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_small_chunks_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes them may use its memory again."""
    monkeypatch.setitem(stream._LEAST_BYTES, "cpu", 5 * D * 8)
    layer, x = make(), vectors()
    memory = torch.empty(2, D, dtype=F64)

    def reused() -> Iterator[Tensor]:
        for part in x.split(2):
            yield memory[: len(part)].copy_(part)

    seen: list[int] = []
    real = stream._Source._ready

    def noted(self: Any, chunk: Tensor) -> Tensor:
        seen.append(chunk.shape[-2])
        return real(self, chunk)

    monkeypatch.setattr(stream._Source, "_ready", noted)
    with torch.no_grad():
        assert_same(layer.stream(reused), layer(x), "x_out")
    assert seen == [6, 6, 6, 5] * 2


def test_dtypes_and_autocast() -> None:
    """Promoted as in forward; float32 under autocast."""
    for dtype, parameters in ((BF16, F32), (F32, F64), (F64, F32)):
        layer, x = make("betas", dtype=parameters), vectors(dtype=dtype)
        y, whole = layer.stream(x, rows=5), layer(x)
        assert y.dtype == whole.dtype == torch.promote_types(dtype, parameters)
        torch.testing.assert_close(y, whole)
    layer, x = make("betas", dtype=BF16), vectors(dtype=BF16)
    with torch.autocast("cpu", dtype=BF16):
        y = layer.stream(x, rows=5)
        assert y.dtype == F32
        y.sum().backward()
        torch.testing.assert_close(y, layer(x))
    assert layer.W_A.grad is not None and layer.W_A.grad.dtype == BF16


# --------------------------------------------------------------------------------------------- where chunks come from


class Again:
    """Chunks that can be gone through again, and are counted."""

    def __init__(self, x: Tensor, rows: int = 4) -> None:
        self.x, self.rows, self.passes = x, rows, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from self.x.split(self.rows, -2)


def sources(x: Tensor, folder: Path) -> dict[str, Any]:
    array = x.numpy()
    path = folder / "vectors.bin"
    framed = np.memmap(path, array.dtype, "w+", offset=64, shape=(array.shape[0] + 5, D))
    framed[3:-2] = array
    framed.flush()
    parts = x.split(4)
    read_only = array.copy()
    read_only.flags.writeable = False
    return {
        "tensor": x, "strided": x.mT.contiguous().mT, "array": array, "read-only array": read_only,
        "flipped array": array[::-1].copy()[::-1], "list": list(parts), "arrays": tuple(p.numpy() for p in parts),
        "function": lambda: iter(parts), "object": Again(x), "chunks": VectorChunks(x, 4),
        **{f"memmap {mode}": np.memmap(path, array.dtype, mode, 64, framed.shape)[3:-2] for mode in ("r", "r+", "c")},
        "memmap by columns": np.memmap(path, array.dtype, "r", 64, framed.shape)[3:-2].T.copy().T,
    }  # fmt: skip


def test_sources(tmp_path: Path) -> None:
    layer, x = make(), vectors()
    with torch.no_grad():
        whole = layer(x)
        for name, source in sources(x, tmp_path).items():
            assert_same(layer.stream(source), whole, name)
            if isinstance(source, (Tensor, np.ndarray)):
                assert_same(layer.stream(source, rows=4), whole, name)
        assert_same(layer.stream(iter(x.split(4)), buffer=True), whole, "iterator, kept")


def test_a_batch_in_a_file(tmp_path: Path) -> None:
    """A chunk is in as many places of the file as there are samples."""
    x = vectors(2, 3)
    mapped = np.memmap(tmp_path / "x", np.float64, "w+", shape=tuple(x.shape))
    mapped[:] = x.numpy()
    chunks = [chunk.clone() for chunk in VectorChunks(mapped, 10)]
    assert [c.shape[-2] for c in chunks] == [10, 10, 3] and len(VectorChunks(mapped, 10)) == 3
    assert torch.equal(torch.cat(chunks, -2), x)
    compared(make(), x)


def test_changes_that_are_in_no_file_are_seen(tmp_path: Path) -> None:
    x = vectors().numpy()
    x.tofile(tmp_path / "x")
    mine = np.memmap(tmp_path / "x", np.float64, "c", shape=x.shape)
    mine[0] = 7.0
    assert torch.cat([c.clone() for c in VectorChunks(mine, 5)])[0].eq(7.0).all()


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    vectors().numpy().tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float64, "r", shape=(N, D))
    with open(tmp_path / "x", "r+b") as file:
        file.truncate(10 * D * 8)
    with pytest.raises(ValueError, match="which has become shorter"):
        make().stream(mapped, rows=4)


def test_the_reader_stops_with_its_pass(tmp_path: Path) -> None:
    vectors().numpy().tofile(tmp_path / "x")
    before = threading.active_count()
    chunks = iter(VectorChunks(np.memmap(tmp_path / "x", np.float64, "r", shape=(N, D)), 2))
    next(chunks)
    assert threading.active_count() == before + 1
    chunks.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    wrong = EfficientVectorRouting(N - 1, *SIZES["fixed"][1:], dtype=F64)
    with pytest.raises(ValueError, match="n_inp: expected 22"):
        wrong.stream(np.memmap(tmp_path / "x", np.float64, "r", shape=(N, D)), rows=2)
    assert threading.active_count() == before


@pytest.mark.parametrize("n_iters", [1, 2, 3])
def test_passes(n_iters: int) -> None:
    """One an iteration, one more each for gradients, and one to count where nobody says how many there are."""
    layer = make("betas", n_iters=n_iters)
    with torch.no_grad():
        for n, expected in ((N, n_iters), (None, n_iters + 1)):
            source = Again(vectors())
            layer.stream(source, n=n)
            assert source.passes == expected
    source = Again(vectors())
    y = layer.stream(source, n=N)
    assert source.passes == n_iters
    y.sum().backward()
    assert source.passes == 2 * n_iters


@each_size
@pytest.mark.parametrize("n_iters", [1, 2])
def test_without_gradients_of_rows_the_last_pass_is_not_needed(size: str, n_iters: int) -> None:
    layer = make(size, n_iters=n_iters)
    for name, p in layer.named_parameters():
        p.requires_grad_(name[:3] in ("W_F", "B_F", "W_G", "B_G"))
    wanted = [p for p in layer.parameters() if p.requires_grad]
    source = Again(vectors())
    y, whole = layer.stream(source, n=N), layer(source.x)
    towards = torch.randn(y.shape, dtype=y.dtype)  # the sum of a normalised output is constant
    found = torch.autograd.grad(y, wanted, towards, allow_unused=True)
    assert source.passes == 2 * n_iters - 1
    for got, expected in zip(found, torch.autograd.grad(whole, wanted, towards, allow_unused=True), strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert_same(got, expected, "gradient")


def test_an_iterator_will_do_for_one_pass() -> None:
    layer, x = make(n_iters=1), vectors()
    with torch.no_grad():
        assert_same(layer.stream(iter(x.split(4))), layer(x), "x_out")


def test_no_samples() -> None:
    for n_inp in (N, -1):
        layer = EfficientVectorRouting(n_inp, M, D, H)
        assert layer.stream([torch.empty(2, 0, N, D)]).shape == (2, 0, M, H)


def test_in_a_compiled_model() -> None:
    """The graph is broken around it."""
    layer, x = make(), vectors()
    compiled = torch.compile(lambda t: 2 * layer.stream([t]), backend="aot_eager")
    assert_same(compiled(x).detach(), 2 * layer(x).detach(), "x_out")


def test_no_second_derivative() -> None:
    layer = make()
    y = layer.stream(vectors()).square().sum()
    with pytest.raises(NotImplementedError, match=r"stream: .*give the layer the vectors in one tensor"):
        torch.autograd.grad(y, layer.W_F2, create_graph=True)
    parameters = {f"layer.{k}": p for k, p in layer.named_parameters()}
    streams = Streams(layer, (4,))
    with pytest.raises(NotImplementedError, match=r"stream: expected no torch\.func transform"):
        torch.func.grad(lambda w: torch.func.functional_call(streams, w, (vectors(), None, None)).sum())(parameters)


# ---------------------------------------------------------------------------------------------------------- bad input


def shuffled() -> Callable[[], Iterator[Tensor]]:
    generator = seeds.generator(0)
    return lambda: iter(vectors()[torch.randperm(N, generator=generator)].split(4))


def shorter() -> Callable[[], Iterator[Tensor]]:
    parts = iter([vectors().split(4), vectors().split(4)[:3]])
    return lambda: iter(next(parts))


def recut() -> Callable[[], Iterator[Tensor]]:
    sizes = iter([4, 5])
    return lambda: iter(vectors().split(next(sizes)))


def emptied() -> Callable[[], Iterator[Tensor]]:
    once = iter(vectors().split(4))
    return lambda: once


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "width": (lambda: [vectors()[:20], torch.zeros(3, D + 1, dtype=F64)], {}, ValueError,
              r"chunks\[1\]: expected input vectors of width 8, got 9 \(it is \[3, 9\]\)"),
    "rank": (lambda: [torch.zeros(D)], {}, ValueError, r"chunks\[0\]: expected \[..., k, d_inp\]"),
    "batch": (lambda: [vectors(2)[:, :20], vectors(3)[:, 20:]], {}, ValueError,
              r"chunks\[1\]: expected leading dimensions \[2\] like the first chunk, got \[3, 3, 8\]"),
    "dtype": (lambda: [vectors()[:20], vectors(dtype=F32)[20:]], {}, TypeError, r"chunks\[1\]: expected torch.float64"),
    "integers": (lambda: torch.ones(N, D, dtype=torch.int64), {}, TypeError, "expected a floating-point tensor"),
    "kind": (lambda: ["vectors"], {}, TypeError, r"chunks\[0\]: expected a tensor or an array \[.*, got str"),
    "none": (lambda: [], {}, ValueError, "n_inp: expected 23 input vectors, got 0 in all chunks"),
    "source": (lambda: 3, {}, TypeError, "chunks: expected a tensor, an array, a list, or a function .* got int"),
    "function": (lambda: lambda: 3, {}, TypeError, "expected the function to return an iterator of chunks, got int"),
    "too few": (lambda: list(vectors()[:20].split(4)), {}, ValueError, "n_inp: expected 23 input vectors, got 20"),
    "too few, told late": (lambda: Again(vectors()[:20]), {}, ValueError,
                           "n_inp: expected 23 input vectors in all, got 20 in pass 1"),
    "too many": (lambda: Again(vectors(n=30)), {}, ValueError,
                 "n_inp: expected 23 input vectors in all, got 24 or more in pass 1"),
    "n": (lambda: vectors(), {"n": 20}, ValueError, "n: expected 23 like n_inp, got 20"),
    "n of 0": (lambda: vectors(), {"n": 0}, ValueError, "n: expected at least 1, got 0"),
    "rows": (lambda: [vectors()], {"rows": 4}, ValueError, "rows: expected None with chunks that are cut already"),
    "iterator": (lambda: iter(vectors().split(4)), {}, ValueError,
                 "since they are gone through 4 times, got an iterator, which is empty after the first; buffer=True"),
    "gradient": (lambda: [vectors().requires_grad_()], {}, ValueError, r"chunks\[0\]: .*that need no gradient"),
    "order": (shuffled, {}, ValueError, "got others in chunk 0 of pass 2 than in pass 1"),
    "other cuts": (recut, {}, ValueError, "got 5 in chunk 0 of pass 2, where pass 1 had 4"),
    "fewer later": (shorter, {}, ValueError, "n_inp: expected 23 input vectors in all, got 12 in pass 2"),
    "none later": (emptied, {}, ValueError, r"got 0 in pass 2 \(expected: a tensor"),
    "mask": (lambda: vectors(), {"mask": torch.zeros(N, 7, dtype=torch.bool)}, ValueError, "mask: expected a shape"),
    "lengths": (lambda: vectors(2), {"lengths": [1]}, ValueError, "lengths: expected one length per sample"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_bad_input(which: str) -> None:
    chunks, options, error, message = BAD[which]
    with pytest.raises(error, match=message):
        make().stream(chunks(), **options)


def test_bad_input_of_any_length() -> None:
    layer = make("gram")
    for chunks, options, message in (
        ([], {}, "chunks: expected at least 1 input vector, got none"),
        (Again(vectors()[:0]), {}, "chunks: expected at least 1 input vector, got none"),
        (vectors(), {"n": 20}, "n: expected 20 input vectors, got 23 in all chunks"),
        (iter([vectors()]), {}, r"since they are gone through 5 times \(once to count them: give n\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.stream(chunks, **options)
    layer.return_dict = True
    with pytest.raises(ValueError, match="return_dict: expected False for stream"):
        layer.stream(vectors())
    for wrong, error, message in (
        ([1], TypeError, "vectors: expected a tensor"),
        (torch.zeros(3), ValueError, "vectors"),
    ):
        with pytest.raises(error, match=message):
            VectorChunks(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- memory

_GROWTH = """
import sys, numpy as np, torch, fastroute
torch.set_num_threads(1)
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key + ":")) / 1e3
layer = fastroute.EfficientVectorRouting(-1, 20, 256, 8)
layer.stream([torch.randn(4096, 256)]).sum().backward()
mapped = np.memmap(sys.argv[1], np.float32, "r", shape=(100_000, 256))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
layer.stream(mapped).sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("backend", HERE[-1:], indirect=True)
@pytest.mark.long
def test_a_file_never_becomes_resident(tmp_path: Path, backend: str) -> None:
    """102 MB of vectors, in two buffers of 17 MB and what a pass has of its own."""
    path = tmp_path / "x"
    torch.randn(1000, 256).repeat(100, 1).numpy().tofile(path)
    ran = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(path)], capture_output=True, text=True, check=True,
        env={**os.environ, "FASTROUTE_BACKEND": backend},
    )  # fmt: skip
    assert float(ran.stdout) < 60
