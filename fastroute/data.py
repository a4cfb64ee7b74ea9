"""Handwritten digits to learn from: scikit-learn's, which need no download, or MNIST's IDX files from a folder."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from .ops.arguments import checked

_UINT8 = 0x08  # the type code of unsigned bytes in an IDX file
_CHUNK = 1 << 20
_MNIST = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class Digits(NamedTuple):
    """Images [N, H, W], float32 from 0 (background) to 1 (ink), and their labels [N], int64 from 0 to 9.

    Examples:
        >>> found = fastroute.data.Digits(torch.zeros(3, 8, 8), torch.arange(3), torch.zeros(1, 8, 8), torch.arange(1))
        >>> len(found.train_images)
        3
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Scikit-learn's 1797 digits, 8 x 8: 1442 to train on, 355 to test on, the same ones every time.

    Raises:
        ImportError: scikit-learn is not installed.

    Examples:
        >>> found = fastroute.data.digits()
        >>> found.train_images.shape, found.test_images.shape
        (torch.Size([1442, 8, 8]), torch.Size([355, 8, 8]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install 'fastroute[demo]'") from error
    found = load_digits()
    return _split(torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long())


@checked
def mnist(directory: str | Path) -> Digits:
    """The MNIST digits in a folder of IDX files, plain or gzipped, under their original names.

    With both sets there, ``train-*`` is trained on and ``t10k-*`` tested on; one set alone is split, every fifth image
    of each digit to test on.

    Args:
        directory: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` or the two ``t10k-`` files or all
            four, each with or without ``.gz``.

    Raises:
        FileNotFoundError: no such folder, neither set in it, or images without labels.
        ValueError: a damaged file, or one set of less than five images of each digit; the message names it, what was
            expected and what came.

    Examples:
        >>> try:
        ...     fastroute.data.mnist("no/such/folder")
        ... except FileNotFoundError as error:
        ...     print(error)
        no/such/folder: expected a folder with MNIST's IDX files, found no folder
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a folder with MNIST's IDX files, found no folder")
    sets = {name: pair for name in _MNIST if (pair := _read_set(directory, *_MNIST[name])) is not None}
    if not sets:
        wanted = " or ".join(f"{images}[.gz] with {labels}[.gz]" for images, labels in _MNIST.values())
        raise FileNotFoundError(f"{directory}: expected {wanted}, found neither")
    if len(sets) == 1:
        found = _split(*next(iter(sets.values())))
        if not len(found.test_labels):
            raise ValueError(
                f"{directory}: expected five images of a digit at least, the fifth to test on, "
                f"got {len(found.train_labels)} images"
            )
        return found
    train, test = sets["train"], sets["t10k"]
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{directory}: expected train and t10k images of one size, "
            f"got {list(train[0].shape[1:])} and {list(test[0].shape[1:])}"
        )
    return Digits(*train, *test)


def _split(images: Tensor, labels: Tensor) -> Digits:
    """Every fifth image of each class to test on."""
    test = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        test[(labels == label).nonzero()[4::5, 0]] = True
    return Digits(images[~test], labels[~test], images[test], labels[test])


def _read_set(directory: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor] | None:
    images_path, labels_path = _find(directory, images_name), _find(directory, labels_name)
    if images_path is None and labels_path is None:
        return None
    if images_path is None or labels_path is None:
        there, absent = (labels_path, images_name) if images_path is None else (images_path, labels_name)
        raise FileNotFoundError(
            f"{directory / absent}[.gz]: expected beside {cast(Path, there).name}, found no such file"
        )
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: expected {len(images)} labels, one per image in {images_path.name}, got {len(labels)}"
        )
    if int(labels.max()) > 9:
        raise ValueError(f"{labels_path}: expected labels from 0 to 9, got {int(labels.max())}")
    return images.float() / 255, labels.long()


def _find(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dims: int) -> Tensor:
    """The unsigned bytes of an IDX file: 0, 0, type, number of dimensions, each size as big-endian uint32, the data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(cast(BinaryIO, file), path, dims)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a damaged one or none ({error})") from error


def _parse_idx(file: BinaryIO, path: Path, dims: int) -> Tensor:
    magic = bytes([0, 0, _UINT8, dims])
    header = _read_up_to(file, 4 + 4 * dims)
    if header[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file of {dims}-dimensional unsigned bytes, beginning {magic.hex(' ')}, "
            f"got {header[:4].hex(' ') or 'an empty file'}"
        )
    if len(header) < 4 + 4 * dims:
        raise ValueError(f"{path}: expected a header of {4 + 4 * dims} bytes, got {len(header)}")
    sizes = struct.unpack(f">{dims}I", header[4:])
    if 0 in sizes:
        raise ValueError(f"{path}: expected at least one value, got sizes {list(sizes)}")
    count = math.prod(sizes)
    data = _read_up_to(file, count + 1)
    if len(data) != count:
        came = f"{len(data)}" if len(data) < count else "more"
        raise ValueError(f"{path}: expected {count} bytes of data for sizes {list(sizes)}, got {came}")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(sizes)


def _read_up_to(file: BinaryIO, count: int) -> bytearray:
    """At most ``count`` bytes. In pieces: what a damaged header asks for is never allocated at once."""
    data = bytearray()
    while len(data) < count and (piece := file.read(min(_CHUNK, count - len(data)))):
        data += piece
    return data
