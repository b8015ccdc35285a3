"""Where do the images come from? Files on disk to three splits of images and labels.

Takes the name of a folder and a seed. Gives `Data`: training, validation and test images with
their labels, in words where they came from, and a digest of all of it. Knows nothing of networks,
and imports no other room. What cannot be used ends in a DataError of one line.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLE = "sample"  # the name that stands for the bundled digits
SAMPLE_FILE = Path(__file__).resolve().parent / "data" / "mnist_5k.npz"
IDX_FILES = {  # name without .gz: (magic number, shape, MD5 of the decompressed file)
    "train-images-idx3-ubyte": (2051, (60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (2049, (60_000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (2051, (10_000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (2049, (10_000,), "27ae3e4e09519cfbb04c329615203637"),
}
FULL_TRAIN_IMAGES = 48_000  # of the full set; the rest of its 60,000 validate
DOWNLOAD_TIMEOUT = 10.0  # seconds a mirror may stay silent


class DataError(ValueError):
    """Images or labels that cannot be used; the message says what is wrong, and what to do."""


class Split(NamedTuple):
    """Images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The three disjoint splits, and where they came from."""

    train: Split
    val: Split
    test: Split
    source: str  # in words
    digest: str  # SHA-256 of the digits, the labels and who is in which split


class TensorLoader:
    """Batches of a Split in its own order, without copying; a `loader` for the analysis."""

    def __init__(self, split: Split, batch_size: int = 2000):
        self.split = split
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.split.images.split(self.batch_size)
        labels = self.split.labels.split(self.batch_size)
        return zip(images, labels, strict=True)


# --------------------------------------------------------------------------------------------------
# MNIST's own files
# --------------------------------------------------------------------------------------------------


def parse_idx(raw: bytes, name: str) -> np.ndarray:
    """One decompressed IDX file as a uint8 array of the shape MNIST has.

    Raises DataError naming the file.
    """
    magic, shape, md5 = IDX_FILES[name.removesuffix(".gz")]
    again = "fetch the file again"

    header = 4 * (1 + len(shape))
    if len(raw) < header:
        raise DataError(f"{name} is damaged: {len(raw)} bytes are too few for a header; {again}")

    found_magic, *found_shape = struct.unpack(f">{1 + len(shape)}I", raw[:header])
    if found_magic != magic:
        raise DataError(
            f"{name} is not what its name says: magic number {found_magic}, expected {magic}"
        )
    if tuple(found_shape) != shape:
        raise DataError(
            f"{name} announces the shape {tuple(found_shape)}, expected {shape}; {again}"
        )

    expected_size = header + math.prod(shape)
    if len(raw) != expected_size:
        raise DataError(
            f"{name} is damaged: {len(raw):,} bytes, expected {expected_size:,}; {again}"
        )

    found_md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found_md5 != md5:  # also what catches labels that belong to other images
        raise DataError(
            f"{name} differs from MNIST's own file: MD5 {found_md5}, expected {md5}; {again}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The IDX file `name` of `folder`, plain or gzipped.

    Raises DataError when it is missing or damaged.
    """
    plain = folder / name
    if plain.exists():
        return parse_idx(plain.read_bytes(), plain.name)

    packed = folder / f"{name}.gz"
    if not packed.exists():
        raise DataError(
            f"{folder} holds some of MNIST's files but neither {name} nor {name}.gz; add it"
        )
    try:
        raw = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed.name} is damaged ({error}); fetch the file again") from error
    return parse_idx(raw, packed.name)


def read_full_set(raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 images and labels, training images first. Raises DataError."""
    arrays = [read_idx(raw_dir, name) for name in IDX_FILES]
    return np.concatenate(arrays[0::2]), np.concatenate(arrays[1::2])


def has_idx_file(raw_dir: Path) -> bool:
    """Whether the folder holds at least one of MNIST's files."""
    names = [*IDX_FILES, *(f"{name}.gz" for name in IDX_FILES)]
    return any((raw_dir / name).exists() for name in names)


def download_mnist(data_dir: Path) -> None:
    """Fetch MNIST into `data_dir`/MNIST/raw; half a download never stays there.

    Raises whatever torchvision's import or the network raises; the caller turns it into words.
    """
    # Only here: a torchvision without its C++ operators fails on import.
    from torchvision.datasets import MNIST

    data_dir.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with tempfile.TemporaryDirectory(dir=data_dir) as unfinished:
            MNIST(unfinished, download=True)
            target = data_dir / "MNIST" / "raw"
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmdir()  # empty, or there would be nothing to download
            os.replace(Path(unfinished) / "MNIST" / "raw", target)
    finally:
        socket.setdefaulttimeout(patience)


# --------------------------------------------------------------------------------------------------
# The bundled sample
# --------------------------------------------------------------------------------------------------


def read_sample() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 bundled digits. Raises DataError when the file is missing or damaged."""
    name = SAMPLE_FILE.name
    try:
        with np.load(SAMPLE_FILE) as stored:
            images = stored["images"]
            labels = stored["labels"]
    except (OSError, KeyError, ValueError, EOFError, zlib.error) as error:
        raise DataError(
            f"the bundled sample {name} is damaged or missing ({error}); restore it"
        ) from error

    right_shape = images.shape == (5000, 28, 28) and labels.shape == (5000,)
    if not right_shape or np.bincount(labels).tolist() != [500] * 10:
        raise DataError(
            f"the bundled sample {name} holds {images.shape} images, not 500 a class; restore it"
        )
    return images, labels


def sample_split(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of 70, 10 and 20 per cent of every class, each part in random order."""
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = [len(members) * 7 // 10, len(members) * 8 // 10]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return [rng.permutation(np.concatenate(part)) for part in parts]


# --------------------------------------------------------------------------------------------------
# From either to three splits
# --------------------------------------------------------------------------------------------------


def find_full_set(data_dir: str) -> Path | None:
    """The folder of MNIST's files under `data_dir`, downloaded if need be; None: use the sample.

    Says in one line why the sample is used, unless that is what was asked for.
    """
    if data_dir == SAMPLE:
        return None
    raw_dir = Path(data_dir) / "MNIST" / "raw"
    if has_idx_file(raw_dir):
        return raw_dir
    try:
        download_mnist(Path(data_dir))
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        print(
            f"No MNIST under {raw_dir} and no download ({reason}): using the bundled 5,000 digits, "
            f"so accuracy is lower and features are coarser. For the full set put the four IDX "
            f"files there, or give --data DIR."
        )
        return None
    return raw_dir


def as_split(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Split:
    """uint8 images (N, 28, 28) and labels (N,) as a Split on `device`."""
    pixels = torch.from_numpy(images).to(device).float().div_(255)
    return Split(pixels[:, None], torch.from_numpy(labels).to(device).long())


def load_mnist(data_dir: str, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """The digits, split into training, validation and test images, on `device`.

    Takes the first of: the four IDX files under `data_dir`/MNIST/raw; a download into it; the
    bundled sample (outright when `data_dir` is "sample"). The full set is split 48,000 / 12,000 /
    10,000, the last being MNIST's own test set; the sample 3,500 / 500 / 1,000.

    Raises DataError when a file that is there is damaged, incomplete or not MNIST's.
    """
    rng = np.random.default_rng(seed)
    raw_dir = find_full_set(data_dir)
    if raw_dir is None:
        images, labels = read_sample()
        parts = sample_split(labels, rng)
        source = "bundled sample of 5,000 MNIST training digits"
    else:
        images, labels = read_full_set(raw_dir)
        order = rng.permutation(60_000)
        train, val = np.split(order, [FULL_TRAIN_IMAGES])
        parts = [train, val, np.arange(60_000, 70_000)]
        source = "MNIST, full set of 70,000 digits"

    digest = hashlib.sha256()
    for array in (images, labels, *parts):
        digest.update(np.ascontiguousarray(array))
    splits = [as_split(images[part], labels[part], device) for part in parts]
    return Data(*splits, source=source, digest=digest.hexdigest())
