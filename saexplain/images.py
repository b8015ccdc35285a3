"""Which images are explained? Three disjoint splits of images with labels.

    data = load_images("auto", seed=0)         # MNIST, downloaded if need be, or the bundled digits
    data = load_images("data/FashionMNIST")    # a folder with a set in MNIST's file format (IDX)
    data.display.pictures(data.val.images[:8]) # as they look: float32 (8, C, H, W) from 0 to 1

To add another file format, write a module like idx.py with two functions, `is_in(folder) -> bool`
and `read(folder) -> ImageSet`, and add the pair to FORMATS. Checks, names of classes, splits and
the digest then follow as for IDX files.

Takes names of folders; gives a `Data`. It augments and normalizes nothing, and writes nothing but
a downloaded MNIST. Images of one's own are for datasets.py.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saexplain.files import InputError
from saexplain.idx import DIGITS, IDX_FILES, KNOWN_SETS, ImageSet, has_idx_file, read_idx_set

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}  # in messages
PIXELS_AT_ONCE = 2**21  # in a batch: a network of many channels makes many more numbers of them


class Display(NamedTuple):
    """How images look: times std plus mean, for each channel or for all, undoes a normalization."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def pictures(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) or (N, H, W), as the model reads them, in their own colors: float32
        (N, C, H, W) from 0 to 1."""
        images = images[:, None] if images.dim() == 3 else images
        mean, std = (images.new_tensor(v, dtype=torch.float32)[:, None, None] for v in self)
        return (images.detach().float() * std + mean).clamp(0, 1)


class Split(NamedTuple):
    """Images (N, C, H, W) float32, C = 1 or 3, and labels (N,) int64."""

    images: Tensor  # or datasets.LazyImages, which are read when they are indexed
    labels: Tensor


class Data(NamedTuple):
    """The three disjoint splits, the names of their classes, and where they are from."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]  # the name of each label
    source: str  # in words
    digest: str  # SHA-256 of images, labels and splits
    display: Display = Display()

    def in_words(self) -> str:
        """Source and numbers of images."""
        sizes = " / ".join(f"{len(split.labels):,}" for split in self[:3])
        return f"{self.source}; {sizes} training, validation, test images"


def images_per_batch(shape: Iterable[int]) -> int:
    """How many images (C, H, W) make a batch."""
    return min(2000, max(1, PIXELS_AT_ONCE // math.prod(shape)))


class TensorLoader:
    """Batches of a Split in its own order, without copying; a `loader` for the analysis."""

    def __init__(self, split: Split, batch_size: int | None = None):
        self.split = split
        self.batch_size = batch_size or images_per_batch(split.images.shape[1:])

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*(tensor.split(self.batch_size) for tensor in self.split), strict=True)


# --------------------------------------------------------------------------------------------------
# Where images come from: "auto", "sample", or a folder
# --------------------------------------------------------------------------------------------------

AUTO = "auto"  # the digits under DOWNLOADS, downloaded if need be, or else the sample
SAMPLE = "sample"  # the bundled digits
DOWNLOADS = "data"  # where torchvision stores MNIST
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer after which a mirror is given up
SAMPLE_FILE = Path(__file__).resolve().parent / "data" / "mnist_5k.npz"
SAMPLE_SHA256 = "246e0c30eeea57c8d0037d3f38c8e00651ec204cc61b8022563e9aeeb9d756f4"
TRAIN_SHARE = 0.8  # of a set's training images; the others are for validation
FEWEST = (100, 20)  # training images needed to learn anything, and test images to test it
CLASSES_FILE = "classes.txt"  # names of the classes, one a line, beside the images
MOST_CLASSES = 256  # labels are bytes


FORMATS = ((has_idx_file, read_idx_set),)  # (is_in, read) of each file format that is read


def load_images(where: str, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """Images in [0, 1] and labels, split into training, validation and test images, on `device`.

    `where` names a folder with a set, or is "sample" for the bundled digits, or "auto": MNIST in
    data/, downloaded if need be, or else the sample. A fifth of a set's training images, drawn with
    `seed`, are for validation; the sample is split 3,500 / 500 / 1,000.

    Raises InputError when the folder holds no set, or files that are damaged or do not fit.
    """
    rng = np.random.default_rng(seed)
    folder = find_images(where)
    if folder is None:
        images, labels = read_sample()
        parts = split_by_class(labels, rng)
        classes, source = DIGITS, "bundled sample of 5,000 MNIST training digits"
    else:
        found = next(read(folder) for is_in, read in FORMATS if is_in(folder))
        check_set(found, folder)
        images = np.concatenate([found.train_images, found.test_images])
        labels = np.concatenate([found.train_labels, found.test_labels])
        n_train = len(found.train_labels)
        train, val = np.split(rng.permutation(n_train), [round(TRAIN_SHARE * n_train)])
        parts = [train, val, np.arange(n_train, len(labels))]
        classes = class_names(folder, found.name, int(labels.max()) + 1)
        source = describe_set(folder, found.name, len(labels))

    digest = hashlib.sha256()
    for array in (images, labels, *parts):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    splits = []
    for part in parts:
        pixels = torch.from_numpy(images[part]).to(device).float().div_(255)[:, None]
        splits.append(Split(pixels, torch.from_numpy(labels[part]).to(device).long()))
    return Data(*splits, classes=classes, source=source, digest=digest.hexdigest())


def find_images(where: str) -> Path | None:
    """The folder of the set that `where` names; None: the sample. Raises InputError."""
    if where == SAMPLE:
        return None
    if where == AUTO:
        places = (Path(DOWNLOADS), Path(DOWNLOADS) / "MNIST" / "raw")
        return next(filter(has_set, places), None) or download_mnist(Path(DOWNLOADS))
    root = Path(where).expanduser()
    is_folder = root.is_dir() and bool(where.strip())  # Path("") is the current folder
    # The folder itself, or else where torchvision stores a set.
    places = [root] if has_set(root) else [root / "raw", *sorted(root.glob("*/raw"))]
    found = list(filter(has_set, places)) if is_folder else []
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise InputError(f"{root} holds several sets: {listed}; name one of these folders")
    if not found:
        raise InputError(
            f"--data {where or repr(where)} {'holds no images' if is_folder else 'is no folder'}: "
            f"looked for {IDX_FILES[0]} and its three companions, gzipped or not, there, in raw/ "
            f"and in */raw/; name the folder of a set in MNIST's format, or '{SAMPLE}'"
        )
    return found[0]


def has_set(folder: Path) -> bool:
    """Whether the folder holds files of one of FORMATS."""
    return any(is_in(folder) for is_in, _ in FORMATS)


def download_mnist(root: Path) -> Path | None:
    """The folder of MNIST, downloaded into `root`; None, and a line printed, where that fails."""
    timeout, target = socket.getdefaulttimeout(), root / "MNIST" / "raw"
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision has no option for it
    try:
        # Only here: a torchvision without its C++ operators fails on import.
        from torchvision.datasets import MNIST

        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as unfinished:  # no half of it stays in target
            MNIST(unfinished, download=True)
            target.parent.mkdir(exist_ok=True)
            os.replace(Path(unfinished) / "MNIST" / "raw", target)
        return target
    except Exception as error:  # whatever the import or the network raises
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        print(
            f"No MNIST under {root} and no download ({reason}): using the bundled 5,000 digits, "
            f"so accuracy is lower and features are coarser. For the full set give --data DIR, the "
            f"folder of its four IDX files."
        )
        return None
    finally:
        socket.setdefaulttimeout(timeout)


def read_sample() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 28, 28) and labels of the bundled digits. Raises InputError."""
    stored = SAMPLE_FILE.read_bytes() if SAMPLE_FILE.is_file() else b""
    if hashlib.sha256(stored).hexdigest() != SAMPLE_SHA256:
        raise InputError(f"the bundled sample {SAMPLE_FILE} is missing or damaged; restore it")
    with np.load(io.BytesIO(stored)) as arrays:
        return arrays["images"], arrays["labels"]


def split_by_class(
    labels: np.ndarray, rng: np.random.Generator, percent: tuple[int, ...] = (70, 10, 20)
) -> list[np.ndarray]:
    """Indices of so many percent of every class, each part in random order."""
    parts: list[list[np.ndarray]] = [[] for _ in percent]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = [len(members) * end // 100 for end in np.cumsum(percent)[:-1].tolist()]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def check_set(found: ImageSet, folder: Path) -> None:
    """Raise InputError unless images and labels fit, and there are enough of them."""
    x, y, x_test, y_test, _ = found
    checks = {
        "one label for each image": (len(x), len(x_test)) == (len(y), len(y_test)),
        "images of one size": x.shape[1:] == x_test.shape[1:],
        "at least {} training and {} test images".format(*FEWEST): (
            len(x) >= FEWEST[0] and len(x_test) >= FEWEST[1]
        ),
        "training images of at least two classes": len(np.unique(y)) > 1,
    }
    met = ", ".join(str(array.shape) for array in found[:4])
    for needed, is_met in checks.items():
        if not is_met:
            raise InputError(f"{folder} must have {needed}; its four files have shapes {met}")


def class_names(folder: Path, known: str | None, n_labels: int) -> tuple[str, ...]:
    """Names of labels 0 to n_labels - 1: from CLASSES_FILE, else of the known set, else numbers."""
    path = folder / CLASSES_FILE
    if not path.exists():
        return KNOWN_SETS[known].classes if known else tuple(map(str, range(n_labels)))
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    names = tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())
    if "\ufffd" in text or not n_labels <= len(set(names)) == len(names) <= MOST_CLASSES:
        raise InputError(
            f"{path} must be UTF-8 text with {n_labels} to {MOST_CLASSES} different names, one a "
            f"line, as labels run to {n_labels - 1}; it has {len(names)} names: {names[:4]} ..."
        )
    return names


def describe_set(folder: Path, known: str | None, n_images: int) -> str:
    """The name and size of a set, in words; prints a line about one that is not known."""
    own = folder.resolve()
    name = known or (own.parent.name if own.name == "raw" else own.name)
    words = f"{name}, full set of {n_images:,} {'digits' if known == 'MNIST' else 'images'}"
    if known is None:
        print(f"{folder} is no set known by its digests: taken as {words}")
    return words


# --------------------------------------------------------------------------------------------------
# Digests and pictures
# --------------------------------------------------------------------------------------------------


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and values; of packed weights, which are no tensors, their text."""
    found = hashlib.sha256()
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            found.update(repr(tensor).encode())
            continue
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
BLANK_SHARE = 0.3  # of the pixels that have the smallest value: a ground with ink on it


def as_ink(images: Tensor, on_ground: bool | None = None) -> Tensor:
    """Images (N, C, H, W), C = 1 or 3, as pictures show them: (N, 1, H, W) ink from 0 to 1.

    Normalized values are brought to [0, 1] by the smallest and the largest of each channel; colors
    become their luminance. Where a blank ground has the smallest value, as in MNIST, what is light
    is shown dark. `on_ground` gives whether it has; None: as it is in these images.
    """
    light = _light(images)
    return light if (_is_on_ground(light) if on_ground is None else on_ground) else 1 - light


def has_ground(images: Tensor) -> bool:
    """Whether a blank ground has the smallest value in images, so that `as_ink` shows light as
    dark."""
    return _is_on_ground(_light(images))


def _is_on_ground(light: Tensor) -> bool:
    return float((light <= light.min()).float().mean()) >= BLANK_SHARE


def _light(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as light (N, 1, H, W) from 0 to 1."""
    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape)
        raise ValueError(f"images have shape {shape}; expected (N, C, H, W) with C = 1 or 3")
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    light = images.float()
    if low.min() < 0 or high.max() > 1:
        span = (high - low).clamp(min=1e-12)
        light = (light - low[:, None, None]) / span[:, None, None]
    if images.shape[1] == 3:
        weights = torch.tensor(LUMINANCE, device=images.device)
        light = (light * weights[:, None, None]).sum(1, keepdim=True).clamp(0, 1)
    return light
