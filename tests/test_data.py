"""Digits to learn from: scikit-learn's, and every way an IDX file can be whole or damaged."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastroute import data
from tests.helpers import seeds
from tests.helpers.extras import without

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(t: torch.Tensor, magic: int | None = None) -> bytes:
    """An IDX file of unsigned bytes."""
    magic = 0x0800 + t.dim() if magic is None else magic
    return struct.pack(f">{1 + t.dim()}I", magic, *t.shape) + t.to(torch.uint8).numpy().tobytes()


def some(n: int = 20, height: int = 4, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (n, height, width), generator=seeds.generator(n))
    return images, torch.arange(n) % 2


def write(directory: Path, *, images: bytes | None = None, labels: bytes | None = None, suffix: str = "") -> None:
    have = some()
    pack: Callable[[bytes], bytes] = gzip.compress if suffix else bytes
    (directory / (IMAGES + suffix)).write_bytes(pack(idx(have[0])) if images is None else images)
    (directory / (LABELS + suffix)).write_bytes(pack(idx(have[1])) if labels is None else labels)


def test_digits_are_split_the_same_way_every_time() -> None:
    a, b = data.digits(), data.digits()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a.train_images.shape == (1442, 8, 8) and a.test_images.shape == (355, 8, 8)
    assert a.train_images.dtype == torch.float32 and a.train_labels.dtype == torch.int64
    assert a.train_images.min() == 0 and a.train_images.max() == 1
    share = a.test_labels.bincount() / (a.test_labels.bincount() + a.train_labels.bincount())
    assert ((share > 0.19) & (share <= 0.2)).all()


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    without("sklearn", monkeypatch)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'fastroute\[demo\]'"):
        data.digits()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_set_is_split(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, suffix=suffix)
    images, labels = some()
    found = data.mnist(tmp_path)
    held_out = [8, 9, 18, 19]  # every fifth of each class
    assert torch.equal(found.test_images, images[held_out].float() / 255)
    assert torch.equal(found.test_labels, labels[held_out])
    assert len(found.train_images) == len(found.train_labels) == 16


def test_one_set_of_too_few(tmp_path: Path) -> None:
    images, labels = some(8)
    write(tmp_path, images=idx(images), labels=idx(labels))
    with pytest.raises(ValueError, match=r"expected five images of a digit at least, .* got 8 images"):
        data.mnist(tmp_path)


def test_both_sets_are_taken_as_they_are(tmp_path: Path) -> None:
    write(tmp_path)
    images, labels = some(7)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    found = data.mnist(str(tmp_path))
    assert torch.equal(found.train_images, images.float() / 255) and torch.equal(found.train_labels, labels)
    assert torch.equal(found.test_images, some()[0].float() / 255) and torch.equal(found.test_labels, some()[1])


def test_sets_of_two_sizes(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(some(7, 5, 5)[0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(some(7)[1]))
    with pytest.raises(ValueError, match=r"expected train and t10k images of one size, got \[5, 5\] and \[4, 6\]"):
        data.mnist(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: expected a folder with MNIST's IDX files, found no folder"):
        data.mnist(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte\[.gz\] with .* found neither"):
        data.mnist(tmp_path)


@pytest.mark.parametrize(("absent", "there"), [(IMAGES, LABELS), (LABELS, IMAGES)])
def test_half_a_set(tmp_path: Path, absent: str, there: str) -> None:
    write(tmp_path)
    (tmp_path / absent).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{absent}\[.gz\]: expected beside {there}, found no such file"):
        data.mnist(tmp_path)


whole = idx(some()[0])
packed = gzip.compress(whole)
DAMAGE = {
    "empty": (b"", "", "beginning 00 00 08 03, got an empty file"),
    "labels for images": (idx(some()[1]), "", "3-dimensional unsigned bytes, beginning 00 00 08 03, got 00 00 08 01"),
    "floats": (idx(some()[0], 0x0D03), "", "beginning 00 00 08 03, got 00 00 0d 03"),
    "a web page": (b"<!DOCTYPE html>", "", "beginning 00 00 08 03, got 3c 21 44 4f"),
    "short header": (whole[:9], "", "expected a header of 16 bytes, got 9"),
    "no images": (idx(torch.zeros(0, 4, 6)), "", r"expected at least one value, got sizes \[0, 4, 6\]"),
    "cut off": (whole[:-1], "", r"expected 480 bytes of data for sizes \[20, 4, 6\], got 479"),
    "too long": (whole + b"x", "", r"expected 480 bytes of data for sizes \[20, 4, 6\], got more"),
    "absurd sizes": (struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "", r"expected \d{29} bytes of data .*, got 0"),
    "not gzip": (whole, ".gz", "expected a whole gzip file, got a damaged one or none .Not a gzipped file"),
    "gzip cut off": (
        packed[:-20],
        ".gz",
        "expected a whole gzip file, got a damaged one or none .Compressed file ended",
    ),
    "gzip with a wrong byte": (
        packed[:40] + bytes([packed[40] ^ 255]) + packed[41:],
        ".gz",
        "expected a whole gzip file",
    ),
    "gzip with a wrong checksum": (packed[:-8] + bytes(4) + packed[-4:], ".gz", "none .CRC check failed"),
    "gzip of the wrong thing": (gzip.compress(b"hello"), ".gz", "beginning 00 00 08 03, got 68 65 6c 6c"),
}


@pytest.mark.parametrize(("content", "suffix", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_images(tmp_path: Path, content: bytes, suffix: str, message: str) -> None:
    write(tmp_path, images=content, suffix=suffix)
    with pytest.raises(ValueError, match=f"{IMAGES}{suffix}: .*{message}"):
        data.mnist(tmp_path)


def test_damaged_labels(tmp_path: Path) -> None:
    write(tmp_path, labels=idx(some(19)[1]))
    with pytest.raises(ValueError, match=f"{LABELS}: expected 20 labels, one per image in {IMAGES}, got 19"):
        data.mnist(tmp_path)
    write(tmp_path, labels=idx(torch.arange(20)))
    with pytest.raises(ValueError, match=f"{LABELS}: expected labels from 0 to 9, got 19"):
        data.mnist(tmp_path)
