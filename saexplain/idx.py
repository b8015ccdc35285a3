"""What do the files of a set in MNIST's format (IDX) hold? Arrays, and its name if known.

    if has_idx_file(folder):
        found = read_idx_set(folder)   # ImageSet: images and labels for training and test, name

Takes a folder with four files, gzipped or not; gives an `ImageSet`. It checks each file against its
header, and its MD5 against those of KNOWN_SETS; whether images and labels fit is for images.py.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saexplain.files import InputError


class ImageSet(NamedTuple):
    """A set as its files hold it; every array is uint8."""

    train_images: np.ndarray  # (N, H, W), 255 is ink
    train_labels: np.ndarray  # (N,)
    test_images: np.ndarray
    test_labels: np.ndarray
    name: str | None  # in KNOWN_SETS; None for any other set


# --------------------------------------------------------------------------------------------------
# IDX files, MNIST's format
# --------------------------------------------------------------------------------------------------

IDX_FILES = (  # idx3: three dimensions
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
UINT8 = 2048  # magic number of an IDX file of bytes, less its number of dimensions
SIDES = range(8, 65)  # heights and widths, in pixels, that are taken
MOST_PIXELS = 2**32  # in one file; a damaged header may announce any number
AGAIN = "download the file again"


def has_idx_file(folder: Path) -> bool:
    """Whether the folder holds at least one of the four files."""
    return any((folder / f"{name}{end}").is_file() for name in IDX_FILES for end in ("", ".gz"))


def read_idx_set(folder: Path) -> ImageSet:
    """The set in the folder's four files. Raises InputError for a missing or damaged file."""
    arrays, digests = zip(*(read_idx(folder, name) for name in IDX_FILES), strict=True)
    return ImageSet(*arrays, name=known_set(digests))


def read_idx(folder: Path, name: str) -> tuple[np.ndarray, set[str]]:
    """The array of the IDX file `name`, plain or gzipped, and MD5s of the file and its content."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    if not path.exists():
        raise InputError(f"{folder} holds part of a set but neither {name} nor {name}.gz; add it")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            array, md5 = parse_idx(file, path.name)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} is damaged ({error}); {AGAIN}") from error
    return array, {md5, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}


def parse_idx(file: io.BufferedIOBase, name: str) -> tuple[np.ndarray, str]:
    """The uint8 array of an opened IDX file, (N, H, W) or (N,), and the MD5 of its bytes.

    No more is read than the header announces: a small gzip may unpack to any size.
    """
    n_dims = 3 if "idx3" in name else 1
    header = file.read(4 * (1 + n_dims))
    magic, *shape = struct.unpack(f">{1 + n_dims}I", header.ljust(4 * (1 + n_dims), b"\xff"))
    if magic != UINT8 + n_dims:
        raise InputError(f"{name} must have magic number {UINT8 + n_dims}, got {magic}; {AGAIN}")
    if any(side not in SIDES for side in shape[1:]):
        met, taken = " x ".join(map(str, shape[1:])), f"{SIDES[0]} to {SIDES[-1]}"
        raise InputError(f"{name} holds images of {met} pixels; {taken} are taken each way")
    size = math.prod(shape)
    content = file.read(size + 1) if size <= MOST_PIXELS else b""  # 1: is the file too long?
    if len(content) != size:
        met = "more" if len(content) > size else f"{len(content):,}"
        raise InputError(f"{name} is damaged: it announces {size:,} bytes, got {met}; {AGAIN}")
    md5 = hashlib.md5(header + content, usedforsecurity=False).hexdigest()
    return np.frombuffer(content, np.uint8).reshape(shape), md5


# --------------------------------------------------------------------------------------------------
# Known sets, recognized by their digests
# --------------------------------------------------------------------------------------------------


class KnownSet(NamedTuple):
    """Names of the classes, and MD5s of the files, plain or gzipped."""

    classes: tuple[str, ...]
    md5s: Sequence[str]


DIGITS = tuple("0123456789")
FASHION = "T-shirt/top|Trouser|Pullover|Dress|Coat|Sandal|Shirt|Sneaker|Bag|Ankle boot"
KNOWN_SETS = {
    "MNIST": KnownSet(
        DIGITS,
        """6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624
        2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637""".split(),
    ),
    # As they are in Debian's dataset-fashion-mnist, and gzipped in torchvision 0.28.
    "Fashion-MNIST": KnownSet(
        tuple(FASHION.split("|")),
        """f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9
        8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965
        8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe
        bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310""".split(),
    ),
    "KMNIST": KnownSet(  # gzipped, in torchvision 0.28
        tuple("o ki su tsu na ha ma ya re wo".split()),
        """bdb82020997e1d708af4cf47b453dcf7 e144d726b3acfaa3e44228e80efcd344
        5c965bf0a639b31b8f53240b1b52f4d7 7320c461ea6c1c855c0b718fb2a4b134""".split(),
    ),
}


def known_set(digests: Sequence[set[str]]) -> str | None:
    """The name in KNOWN_SETS of the set whose four files have these MD5s; None for another set.

    Raises InputError where only some of the files are those of a known set.
    """
    names = []
    for own in digests:
        known = (name for name, of in KNOWN_SETS.items() if not own.isdisjoint(of.md5s))
        names.append(next(known, None))
    if len(set(names)) > 1:
        listed = ", ".join(
            f"{f} is {n or 'unknown'}" for f, n in zip(IDX_FILES, names, strict=True)
        )
        raise InputError(f"the files must be of one set, but {listed}; {AGAIN}")
    return names[0]
