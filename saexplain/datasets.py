"""Which images of one's own are explained? Three checked splits, of any usual form.

    data = load_own("photos", n_classes=10)           # a folder of class folders; it is split
    data = load_own(train, val, test, classes=names)  # tensors, Datasets, DataLoaders, folders
    data.train.images[:8]                             # (8, C, H, W), as the model reads them
    data.display.pictures(data.train.images[:8])      # as they look

Splits that fit into memory are tensors; larger ones are `LazyImages`, read when they are indexed.
Every image is read once for all checks: shapes, dtypes, finite values, duplicates and the digest.

Takes what sources.py reads; gives a `Data`. It writes nothing and knows nothing of networks but
their number of logits and the normalization in their config.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.console import print_words
from saexplain.files import InputError
from saexplain.images import (
    SPLIT_NAMES,
    Data,
    Split,
    TensorLoader,
    images_per_batch,
    split_by_class,
)
from saexplain.normalization import find_display, given_normalization, model_normalization
from saexplain.parallel import MEMORY_SHARE, available_memory
from saexplain.progress import progress_bar
from saexplain.sources import (
    FORMS,
    ClassFolders,
    Reader,
    Source,
    found_names,
    gives_batches,
    is_picture,
    open_source,
)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
MEMORY_CAP: int | None = None  # bytes of a split that are kept in memory; None: MEMORY_SHARE
SPLIT_PERCENT = (70, 10, 20)  # of each class for training, validation, test
VAL_PERCENT = (88, 12)  # of each class of the training images, where validation images lack
HELD_OUT_PERCENT = (33, 67)  # of each class of the validation images, where test images lack
MOST_LETTERS = 24  # of the name of a class in a line


# --------------------------------------------------------------------------------------------------
# Reading: once for all checks, into memory where it is large enough
# --------------------------------------------------------------------------------------------------


class LazyImages:
    """Images (N, C, H, W) float32 on `device`, read whenever they are indexed; none is kept.

    images[10:20], images[torch.tensor([5, 3])]  # tensors
    images.subset(slice(0, None, 2))             # LazyImages again
    for batch in images.split(100): ...
    """

    dtype = torch.float32

    def __init__(
        self, source: Source, shape: Sequence[int], device: torch.device, index: np.ndarray
    ):
        self.source, self.device, self.index = source, torch.device(device), index
        self.image_shape = tuple(shape)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)"""
        return torch.Size((len(self.index), *self.image_shape))

    def __len__(self) -> int:
        return len(self.index)

    def dim(self) -> int:
        """Four."""
        return len(self.shape)

    def to(self, device: torch.device) -> LazyImages:
        """The same images, read onto another device."""
        return LazyImages(self.source, self.image_shape, device, self.index)

    def subset(self, key: slice | Tensor | np.ndarray) -> LazyImages:
        """The images at these places, not read yet."""
        index = self.index[key.cpu().numpy() if isinstance(key, Tensor) else key]
        return LazyImages(self.source, self.image_shape, self.device, index)

    def __getitem__(self, key: int | slice | Tensor | np.ndarray) -> Tensor:
        chosen = self.index[key.cpu().numpy() if isinstance(key, Tensor) else key]
        found = [torch.empty(0, *self.image_shape, device=self.device)]
        for images, _ in self.source.batches(np.atleast_1d(chosen), workers=False):
            found.append(images.to(self.device))
        images = torch.cat(found)
        return images[0] if np.ndim(chosen) == 0 else images

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in batches."""
        for images, _ in self.source.batches(self.index, size):
            yield images.to(self.device)


class Part(NamedTuple):
    """A split, read once."""

    images: Tensor | LazyImages
    labels: Tensor  # (N,) int64, on the CPU
    hashes: np.ndarray  # (N, 16) bytes, of each image
    low: Tensor  # (C,) the smallest value of each channel
    high: Tensor

    def at(self, index: np.ndarray) -> Part:
        """The images at these places."""
        is_lazy = isinstance(self.images, LazyImages)
        rows = torch.from_numpy(index)
        images = self.images.subset(index) if is_lazy else self.images[rows.to(self.images.device)]
        return self._replace(images=images, labels=self.labels[rows], hashes=self.hashes[index])


def read_source(source: Source, device: torch.device) -> Part:
    """All images and labels of a source, the images in memory where they are few enough.

    Raises InputError for images that cannot be used, and for a stream of too many.
    """
    shape, limit = tuple(source.some.shape[1:]), memory_limit(device)
    n, n_most = source.n, limit // (4 * int(np.prod(shape)))
    images = torch.empty(n, *shape, device=device) if n and n <= n_most else None
    kept, facts, at = [], [], 0  # of a stream, of all batches
    for pixels, labels in read_batches(source, images_per_batch(shape)):
        low, high = pixels.amin((0, 2, 3)), pixels.amax((0, 2, 3))
        # NaN is both the smallest and the largest value.
        if not bool(torch.isfinite(torch.cat([low, high])).all()):
            wrong = pixels.isfinite().flatten(1).logical_not().sum(1)
            i = int(wrong.nonzero()[0])
            raise InputError(
                f"{source.name} must have finite pixels, but {int(wrong[i]):,} of image {at + i} "
                f"are not finite float32 numbers; replace them, or leave out such images"
            )
        facts.append((labels, image_hashes(pixels), low, high))
        at += len(pixels)
        if images is not None:
            images[at - len(pixels) : at] = pixels
        elif n is None:
            kept.append(pixels.to(device))
        if n is None and at > n_most:
            raise InputError(
                f"{source.name} is a stream of more than {limit / 1e9:.2g} GB of images, more than "
                f"{MEMORY_SHARE:.0%} of the memory available; give a Dataset with __getitem__ and "
                f"__len__, which is read by index, or fewer images"
            )
    if at < 2:
        raise InputError(f"{source.name} must have two images at least, got {at}")
    if images is None:
        images = torch.cat(kept) if kept else LazyImages(source, shape, device, np.arange(n))
    labels, hashes, low, high = zip(*facts, strict=True)
    low, high = torch.stack(low).amin(0).cpu(), torch.stack(high).amax(0).cpu()
    return Part(images, torch.cat(labels), np.concatenate(hashes), low, high)


def read_batches(source: Source, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches of a source, with a bar."""
    n_batches = math.ceil(source.n / size) if source.n else None
    yield from progress_bar(source.batches(size=size), f"read {source.name}", n_batches)


def memory_limit(device: torch.device) -> float:
    """Bytes of a split's images that may be kept on the device."""
    if MEMORY_CAP is not None:
        return MEMORY_CAP
    return MEMORY_SHARE * available_memory(device)


def image_hashes(images: Tensor) -> np.ndarray:
    """16 bytes (N, 16) of each image's SHA-256: no two different images of any set share them."""
    pixels = np.ascontiguousarray(images.detach().cpu().numpy())
    hashes = [hashlib.sha256(image).digest()[:16] for image in pixels]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


# --------------------------------------------------------------------------------------------------
# The three splits: what is missing is drawn by class; images in two splits
# --------------------------------------------------------------------------------------------------


def find_splits(train: object, val: object, test: object) -> dict[str, object]:
    """The splits that are given, by name; those in a folder or a dict of splits are found there.

    Raises InputError for a path that is no folder, or has no folder for each class.
    """
    given = {"train": train, "val": val, "test": test}
    inside = {}
    if val is None and test is None and gives_batches(train) and len(train) == 3:
        raise InputError("train has three (images, labels): give splits as train, val and test")
    if isinstance(train, Mapping):
        inside = train
    elif isinstance(train, (str, os.PathLike)) and (root := check_folder(train, "train")):
        inside = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
        main = [inside[name] for name in SPLIT_FOLDERS["train"] if name in inside]
        if not main or any(map(is_picture, main[0].iterdir())):
            inside = {}  # a class may be named train
    if any(name in inside for name in SPLIT_FOLDERS["train"]):
        for split, names in SPLIT_FOLDERS.items():
            found = [inside[name] for name in names if name in inside]
            if found and (split == "train" or given[split] is None):
                given[split] = found[0]
    classes = ()
    for name, value in given.items():
        if isinstance(value, (str, os.PathLike)):
            given[name] = ClassFolders(check_folder(value, name), classes)
            classes = classes or given[name].classes
    return {name: value for name, value in given.items() if value is not None or name == "train"}


def check_folder(path: str | os.PathLike, name: str) -> Path:
    """The folder. Raises InputError for anything else."""
    folder = Path(path).expanduser()
    if not str(path).strip() or not folder.is_dir():
        met = "is a file" if folder.is_file() else "does not exist"
        raise InputError(f"{name}: {str(path)!r} {met}; give {FORMS}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{name}: {folder} cannot be read; change its permissions")
    return folder


def fill_splits(parts: dict[str, Part], seed: int) -> tuple[dict[str, Part], str]:
    """The three splits, those missing being drawn from the others by class, and how, in words."""
    rng = np.random.default_rng(seed)

    def draw(name: str, into: Sequence[str], percent: tuple[int, ...]) -> str:
        part = parts[name]
        index = split_by_class(part.labels.numpy(), rng, percent)
        if min(map(len, index)) < 2:
            raise InputError(
                f"{name} has {len(part.labels)} images, too few to be split into {', '.join(into)} "
                f"by class; give these splits, or more images"
            )
        parts.update({other: part.at(i) for other, i in zip(into, index, strict=True)})
        shares = " / ".join(map(str, percent))
        return f"{shares}% of each class of {name} drawn for {', '.join(into)} (seed {seed})"

    missing = {"val", "test"} - parts.keys()
    if missing == {"val", "test"}:
        return parts, draw("train", ("train", "val", "test"), SPLIT_PERCENT)
    if missing == {"val"}:
        return parts, draw("train", ("train", "val"), VAL_PERCENT)
    return parts, draw("val", ("val", "test"), HELD_OUT_PERCENT) if missing else ""


def check_split_leakage(data: Data) -> None:
    """Print a line about images in two splits. Raises InputError where a split has no new image."""
    warn_leakage({name: hashes_of(getattr(data, name)) for name in SPLIT_NAMES})


def hashes_of(split: Split) -> np.ndarray:
    """The hashes (N, 16) of a split's images."""
    return np.concatenate([image_hashes(images) for images, _ in TensorLoader(split)])


def warn_leakage(hashes: Mapping[str, np.ndarray]) -> None:
    """`check_split_leakage` of the images' hashes."""
    lines = []
    for (name, earlier), n in count_duplicates(hashes).items():
        total = len(hashes[name])
        if n == total:
            raise InputError(
                f"all {n:,} images of {name} are in {earlier}, too, so none is unseen; give three "
                f"splits without common images"
            )
        kind, other = SPLIT_NAMES[name], SPLIT_NAMES[earlier]
        lines.append(f"{n:,} of {total:,} {kind} images are also {other} images")
    if lines:
        print_words(f"{', '.join(lines)}: what is found on them is not found on unseen images")


def count_duplicates(hashes: Mapping[str, np.ndarray]) -> dict[tuple[str, str], int]:
    """Numbers of images that are also in an earlier split, by the names of the two splits."""
    rows = {name: [row.tobytes() for row in found] for name, found in hashes.items()}
    found = {}
    for name, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
        known = set(rows[earlier])
        found[name, earlier] = sum(row in known for row in rows[name])
    return {pair: n for pair, n in found.items() if n}


def digest_of_parts(parts: Iterable[Part]) -> str:
    """SHA-256 of images, labels and splits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(str(tuple(part.images.shape)).encode())
        found.update(np.ascontiguousarray(part.hashes))
        found.update(part.labels.numpy())
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------
# Labels and names of classes
# --------------------------------------------------------------------------------------------------


def check_label_range(labels: Mapping[str, np.ndarray], n_classes: int | None) -> int:
    """The number of classes. Raises InputError for labels other than 0 to that number, less 1;
    without a network's number, each of them must occur."""
    known = np.unique(np.concatenate([np.unique(found) for found in labels.values()]))
    needed = f"labels must be whole numbers from 0 to {(n_classes or len(known)) - 1}"
    why = f", as the network has {n_classes} logits" if n_classes else ", without a gap"
    for name, found in labels.items():
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= (n_classes or len(known)):
            remedy = "renumber them, as the network counts its logits"
            if low == 1 and high == (n_classes or len(known)):
                remedy = "count from 0: give labels - 1"
            elif low < 0:
                remedy = "leave out images without a label"
            raise InputError(f"labels of {name} run from {low} to {high}; {needed}{why}: {remedy}")
    return n_classes or len(known)


def listed_names(classes: object) -> tuple[str, ...]:
    """The names of the logits in their order, of a list, or a dict from or to their numbers.

    Raises InputError for what has no order.
    """
    if isinstance(classes, Mapping):
        by_number = dict(classes)
        if not all(isinstance(key, int) for key in by_number):
            by_number = {number: name for name, number in by_number.items()}
        if sorted(by_number) == list(range(len(classes))):
            return tuple(str(by_number[i]) for i in range(len(classes)))
    elif isinstance(classes, Iterable) and not isinstance(classes, (set, frozenset)):
        return tuple(map(str, classes))
    raise InputError(f"classes must be names in the order of the logits, got {classes!r:.60}")


def class_names(
    classes: Sequence[str], sources: Mapping[str, Source], n_classes: int | None
) -> tuple[str, ...]:
    """Names of the classes: as given, else those of the Dataset, else none.

    Raises InputError for names that do not fit the network, or differ from split to split.
    """
    names = classes
    if names and (len(set(names)) < len(names) or len(names) != (n_classes or len(names))):
        raise InputError(
            f"classes has {len(set(names))} different names; the network has {n_classes} logits"
        )
    found = {name: found_names(source) for name, source in sources.items()}
    for name, own in found.items():
        if own and found["train"] and own != found["train"]:
            other = sorted(set(own) ^ set(found["train"]))[:5] or "another order"
            raise InputError(
                f"{name} must have the classes of train, in their order, but differs: {other}; "
                f"its labels have other meanings"
            )
    if names or not found["train"]:
        return names
    if n_classes and len(found["train"]) != n_classes:
        raise InputError(
            f"train has {len(found['train'])} classes ({', '.join(found['train'][:3])}, ...); the "
            f"network has {n_classes} logits: give classes=, the names of all logits, and labels "
            f"as the network counts them"
        )
    return tuple(found["train"])


def reordered(classes: Sequence[str], sources: Mapping[str, Source]) -> Tensor | None:
    """(n,) int64, for each class of the Dataset its place among `classes`, by name; None where they
    are in one order, or where the names are others, which rename the classes."""
    given, own = tuple(classes), tuple(found_names(sources["train"]) or ())
    if own == given[: len(own)] or not set(own) <= set(given):
        return None
    return torch.tensor([given.index(name) for name in own])


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_own(
    train: object,
    val: object = None,
    test: object = None,
    *,
    classes: Sequence[str] = (),
    n_classes: int | Callable[[Tensor], int] | None = None,
    device: torch.device | str = "cpu",
    mean: object = None,
    std: object = None,
    columns: tuple[str, str] | None = None,
    transform: Callable | None = None,
    model: object = None,
    seed: int = 0,
) -> Data:
    """Three checked splits of one's own images, on `device`; prints a line about them.

    Args:
        train, val, test: each a pair of tensors (images, labels), a dict of them, a Dataset of
            pairs or dicts, a DataLoader, a Hugging Face dataset, or a folder with a folder of
            images for each class. A `train` with folders (or keys) train, val and test has all
            three. Of a missing split, images are drawn by class with `seed`.
        classes: names of the logits, in their order; by default those that the Dataset or the
            folder has. Where these are the same in another order, labels follow the names.
        n_classes: number of logits, or a function of some images that gives it; by default that of
            the names, or of the labels.
        mean, std: of the normalization that the model's images have. Pictures that are read here,
            from files or PIL images without a `transform` to tensors, get it; images that are
            tensors have it, and it is undone where they are shown. By default it is that of the
            transform or of the model.
        columns: names of image and label in a dict; by default they are found.
        transform: of each image of a Dataset or folder, before all else.
        model: whose config may have a normalization, as timm's and transformers' do.

    Raises InputError for what cannot be used, before all images are read where possible.
    """
    device, given = torch.device(device), given_normalization(mean, std)
    classes = listed_names(classes)
    if columns is not None and (isinstance(columns, str) or len(columns) != 2):
        raise InputError(f"columns must name image and label, got {columns!r}")
    normalization = given or model_normalization(model)
    sources = open_sources(find_splits(train, val, test), Reader(columns, transform, normalization))
    if callable(n_classes):
        n_classes = n_classes(sources["train"].some.to(device))
    names = class_names(classes, sources, n_classes)
    n_classes = n_classes or len(names) or None
    stored = {name: source.stored_labels() for name, source in sources.items()}
    if all(found is not None for found in stored.values()):  # else known when all images are read
        check_label_range(stored, n_classes)
    parts = {name: read_source(source, device) for name, source in sources.items()}
    order = reordered(classes, sources)
    if order is not None:  # labels count the Dataset's classes, logits those given
        parts = {k: part._replace(labels=order[part.labels]) for k, part in parts.items()}
    n_classes = check_label_range({k: part.labels.numpy() for k, part in parts.items()}, n_classes)
    ends = parts["train"].low, parts["train"].high
    display, shown = find_display(sources["train"], ends, given, model)
    parts, drawn = fill_splits(parts, seed)
    parts = {name: parts[name] for name in SPLIT_NAMES}
    warn_leakage({name: part.hashes for name, part in parts.items()})
    splits = [Split(part.images, part.labels.to(device)) for part in parts.values()]
    n = sum(len(split.labels) for split in splits)
    source, names = f"{n:,} images", names or tuple(map(str, range(n_classes)))
    data = Data(*splits, names, source, digest_of_parts(parts.values()), display)
    print_words(describe(data, drawn, shown))
    return data


def fit_data(data: Data, classes: Sequence[str], n_classes: int, device: torch.device) -> Data:
    """The data on `device`. Raises InputError where they do not fit a network of `n_classes`."""
    names = listed_names(classes) or data.classes
    if len(names) != n_classes:
        raise InputError(
            f"the data have {len(names)} classes; the network has {n_classes} logits: give "
            f"load_own(..., n_classes={n_classes}), and labels as the network counts them"
        )
    splits = [Split(split.images.to(device), split.labels.to(device)) for split in data[:3]]
    return data._replace(**dict(zip(SPLIT_NAMES, splits, strict=True)), classes=names)


def open_sources(given: Mapping[str, object], reader: Reader) -> dict[str, Source]:
    """The source of each split; sizes and modes of all are those of the first."""
    sources = {}
    for name, value in given.items():
        sources[name] = open_source(value, name, replace(reader))
        first = sources[name].reader
        reader = replace(reader, mode=first.mode, shape=first.shape, first=first.first)
    return sources


def describe(data: Data, drawn: str, shown: str) -> str:
    """A line about the data: what was found, and what was made of it."""
    shape = " x ".join(map(str, data.train.images.shape[1:]))
    listed = ", ".join(fa.shortened(name, MOST_LETTERS) for name in data.classes[:3])
    listed += ", ..." if len(data.classes) > 3 else ""
    words = [f"{data.in_words()} of {shape}; {len(data.classes)} classes: {listed}"]
    present = torch.cat([split.labels for split in data[:3]]).unique().numel()
    if present < len(data.classes):
        words.append(f"images of {present} of these classes only")
    for name in SPLIT_NAMES:
        images = getattr(data, name).images
        if isinstance(images, LazyImages):
            words.append(f"{name}, {4e-9 * math.prod(images.shape):.2g} GB, read when needed")
    return "data: " + "; ".join([*words, *([drawn] if drawn else []), shown])
