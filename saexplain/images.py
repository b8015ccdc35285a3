"""TODO"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.files import InputError

# --------------------------------------------------------------------------------------------------
# Any network
# --------------------------------------------------------------------------------------------------


def _images_and_labels(given: object) -> tuple[Tensor, Tensor]:
    """Images and labels of a pair of arrays, a DataLoader or a Dataset; what these cannot give
    raises."""
    if isinstance(given, torch.utils.data.DataLoader):
        images, labels = (
            torch.cat(part) for part in zip(*fa.fixed_order_batches(given), strict=True)
        )
        if given.drop_last and len(images) < len(given.dataset):
            raise ValueError(f"it drops {len(given.dataset) - len(images)} images at its end")
        return images, labels
    if isinstance(given, (tuple, list)):
        images, labels = (torch.as_tensor(part) for part in given)
        return images, labels
    pairs = [given[i] for i in range(len(given))]
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs])
    return images, torch.as_tensor([label for _, label in pairs])


def as_split(given: object, name: str, device: torch.device) -> Split:
    """Images and labels as tensors on `device`, from a pair of tensors, a Dataset of (image, label)
    pairs, or a DataLoader, read once. Raises InputError where they are none of these."""
    try:
        images, labels = _images_and_labels(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}, a {type(given).__name__}, gives no images and labels ({error}); give a pair "
            f"of tensors, a Dataset of such pairs, or a DataLoader that does not shuffle"
        ) from error
    images = images.clone() if images.is_inference() else images  # or no gradient flows to them
    images = images[:, None] if images.dim() == 3 else images
    fits = images.dim() == 4 and images.shape[1] in (1, 3) and labels.shape == images.shape[:1]
    if not fits or len(images) < 2 or labels.is_floating_point():
        raise InputError(
            f"{name} has images of shape {tuple(images.shape)} and {labels.dtype} labels of shape "
            f"{tuple(labels.shape)}; (N, C, H, W), C being 1 or 3, and whole numbers (N,) are "
            f"needed, of two images at least"
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError(f"{name} has pixels that are not finite numbers")
    return Split(images.to(device).float(), labels.to(device).long())


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def data_from_splits(splits: Sequence[Split], classes: Sequence[str], n_classes: int) -> Data:
    """The splits that explain() was given. Raises InputError for names or labels that do not
    fit."""
    names = tuple(map(str, classes)) or tuple(map(str, range(n_classes)))
    if len(names) != n_classes or len(set(names)) < n_classes:
        raise InputError(
            f"classes has {len(set(names))} different names; the network has {n_classes} logits"
        )
    for name, split in zip(("train", "val", "test"), splits, strict=True):
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= n_classes:
            raise InputError(
                f"labels of {name} run from {low} to {high}; the network has {n_classes} logits, "
                f"so 0 to {n_classes - 1} are needed"
            )
    n = sum(len(split.labels) for split in splits)
    tensors = [tensor for split in splits for tensor in split]
    return Data(*splits, names, f"{n:,} images of one's own", digest_of(tensors))


def check_split_leakage(data: Data) -> dict[tuple[str, str], int]:
    """`count_duplicates`, with a line printed about each.

    Raises InputError where all images of a split, which should be unseen, are in an earlier one.
    """
    duplicates = count_duplicates(data)
    for (name, earlier), n in duplicates.items():
        if n == len(getattr(data, name).labels):
            raise InputError(
                f"all {n:,} images of {name} are in {earlier}, too, so none is unseen; give three "
                f"splits without common images"
            )
    warn_duplicates(data, duplicates)
    return duplicates


AUTO = "auto"  # stands for the digits under DOWNLOADS, fetched if need be, or else the sample
SAMPLE = "sample"  # the name that stands for the bundled digits
DOWNLOADS = "data"
SAMPLE_FILE = Path(__file__).resolve().parent / "data" / "mnist_5k.npz"

SAMPLE_SHA256 = "246e0c30eeea57c8d0037d3f38c8e00651ec204cc61b8022563e9aeeb9d756f4"

TRAIN_SHARE = 0.8  # of the training images; the others validate
DOWNLOAD_TIMEOUT = 10.0  # seconds a mirror may stay silent
IMAGES, LABELS = 2051, 2049  # magic numbers of IDX files of uint8, three dimensions and one
IDX_FILES = {
    "train-images-idx3-ubyte": IMAGES,
    "train-labels-idx1-ubyte": LABELS,
    "t10k-images-idx3-ubyte": IMAGES,
    "t10k-labels-idx1-ubyte": LABELS,
}
SIDES = range(8, 65)  # heights and widths of images that are taken
MOST_CLASSES = 256  # labels are bytes
MOST_PIXELS = 2**32  # in one file
PIXELS_AT_ONCE = 2**21  # in a batch: a network of many channels makes much more of them
FEWEST = {"train": 100, "t10k": 20}  # images below which nothing can be learned, or tested


class KnownSet(NamedTuple):
    """A set that its digests tell: MD5s, in the order of IDX_FILES."""

    classes: tuple[str, ...]
    plain: tuple[str, ...] = ()  # of the files as they are, where known
    packed: tuple[str, ...] = ()  # of the gzipped files as published, from torchvision 0.28


DIGITS = tuple("0123456789")
FASHION = "T-shirt/top|Trouser|Pullover|Dress|Coat|Sandal|Shirt|Sneaker|Bag|Ankle boot"
KNOWN_SETS = {
    "MNIST": KnownSet(
        DIGITS,
        plain=(
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "Fashion-MNIST": KnownSet(
        tuple(FASHION.split("|")),
        plain=(  # of Debian's dataset-fashion-mnist 0.0~git20200523.55506a9-1
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
        packed=(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "KMNIST": KnownSet(
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        packed=(
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}
CLASSES_FILE = "classes.txt"  # names of the classes, one a line, beside the images


class Split(NamedTuple):
    """Images (N, 1, H, W) float32 in [0, 1] and labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The three disjoint splits, what their labels are called, and where they came from."""

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]  # the name of each label
    source: str  # in words
    digest: str  # SHA-256 of the images, the labels and the split of each

    def in_words(self) -> str:
        """Source and numbers of images."""
        sizes = " / ".join(f"{len(split.labels):,}" for split in self[:3])
        return f"{self.source}; {sizes} training, validation, test images"


MIDDLE = 32  # pixels to each side of the middle that tell most images apart


def count_duplicates(data: Data) -> dict[tuple[str, str], int]:
    """How many validation and test images are also images of an earlier split, pixel for pixel, by
    the names of the two splits; without those of which there are none.

    Whole images are compared only where they agree in the middle: 70,000 of 28 x 28 pixels take
    less than 0.1 s.
    """
    splits = {name: getattr(data, name).images.flatten(1) for name in ("train", "val", "test")}
    n_pixels = splits["train"].shape[1]
    middle = slice(max(0, n_pixels // 2 - MIDDLE), n_pixels // 2 + MIDDLE)
    middles = {name: _rows(images[:, middle]) for name, images in splits.items()}
    kinds = {name: set(rows) for name, rows in middles.items()}
    found = {}
    for name, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
        common = kinds[name] & kinds[earlier]
        if common:
            alike = [[row in common for row in middles[side]] for side in (name, earlier)]
            known = set(_rows(splits[earlier][alike[1]]))
            found[name, earlier] = sum(row in known for row in _rows(splits[name][alike[0]]))
    return {pair: n for pair, n in found.items() if n}


SPLIT_NAMES = {
    "train": "training",
    "val": "validation",
    "test": "test",
}  # what their images are called


def warn_duplicates(data: Data, repeated: dict[tuple[str, str], int]) -> None:
    """Print one line about what `count_duplicates` found, if anything."""
    listed_features = []
    for (name, earlier), n in repeated.items():
        of = len(getattr(data, name).labels)
        listed_features.append(
            f"{n:,} of {of:,} {SPLIT_NAMES[name]} images are also {SPLIT_NAMES[earlier]} images"
        )
    if listed_features:
        print(f"{', '.join(listed_features)}: what is found on them is not found on unseen images")


def _rows(values: Tensor) -> list[bytes]:
    """The bytes of each row."""
    return [row.tobytes() for row in values.cpu().numpy()]


class TensorLoader:
    """Batches of a Split in its own order, without copying; a `loader` for the analysis.

    Without a batch size, batches are of 2,000 images, or fewer where these are large.
    """

    def __init__(self, split: Split, batch_size: int | None = None):
        self.split = split
        n_pixels = math.prod(split.images.shape[1:])
        self.batch_size = batch_size or min(2000, max(1, PIXELS_AT_ONCE // n_pixels))

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.split.images.split(self.batch_size)
        labels = self.split.labels.split(self.batch_size)
        return zip(images, labels, strict=True)


# --------------------------------------------------------------------------------------------------
# Files in MNIST's format
# --------------------------------------------------------------------------------------------------

AGAIN = "fetch the file again"


class IdxFile(NamedTuple):
    """One file: its array, and the MD5s of what is stored and of what that unpacks to."""

    array: np.ndarray  # uint8, (N, H, W) or (N,)
    digests: frozenset[str]


def idx_shape(header: bytes, name: str) -> tuple[int, ...]:
    """What the first bytes of the IDX file `name` announce. Raises InputError naming the file."""
    expected = IDX_FILES[name.removesuffix(".gz")]
    n_dims = expected % 256
    size = 4 * (1 + n_dims)
    if len(header) < size:
        raise InputError(
            f"{name} is damaged: {len(header)} bytes are too few for a header; {AGAIN}"
        )
    magic, *shape = struct.unpack(f">{1 + n_dims}I", header[:size])
    if magic != expected:
        raise InputError(
            f"{name} is not what its name says: magic number {magic}, expected {expected}"
        )
    if any(side not in SIDES for side in shape[1:]):
        raise InputError(
            f"{name} holds images of {shape[1]} x {shape[2]} pixels; "
            f"{SIDES[0]} to {SIDES[-1]} are taken each way"
        )
    if math.prod(shape) > MOST_PIXELS:
        raise InputError(f"{name} announces {shape[0]:,} entries: more than can be held; {AGAIN}")
    return tuple(shape)


def parse_idx(file: io.BufferedIOBase, name: str) -> tuple[np.ndarray, str]:
    """An opened IDX file as a uint8 array, and its MD5; never more is read than is announced.

    Raises InputError naming the file.
    """
    header_size = 4 * (1 + IDX_FILES[name.removesuffix(".gz")] % 256)
    header = file.read(header_size)
    shape = idx_shape(header, name)
    size = math.prod(shape)
    content = file.read(size + 1)
    if len(content) != size:
        found = f"{len(header) + len(content):,}" if len(content) < size else "more"
        raise InputError(
            f"{name} is damaged: {found} bytes, {header_size + size:,} are announced; {AGAIN}"
        )
    md5 = hashlib.md5(header + content, usedforsecurity=False).hexdigest()
    return np.frombuffer(content, np.uint8).reshape(shape), md5


def read_idx(folder: Path, name: str) -> IdxFile:
    """The IDX file `name` of `folder`, plain or gzipped.

    Raises InputError when it is missing or damaged.
    """
    plain = folder / name
    if plain.exists():
        with plain.open("rb") as file:
            array, md5 = parse_idx(file, name)
        return IdxFile(array, frozenset([md5]))

    packed = folder / f"{name}.gz"
    if not packed.exists():
        raise InputError(f"{folder} holds part of a set but neither {name} nor {name}.gz; add it")
    try:
        with gzip.open(packed) as file:
            array, md5 = parse_idx(file, packed.name)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed.name} is damaged ({error}); {AGAIN}") from error
    stored = hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest()
    return IdxFile(array, frozenset([md5, stored]))


def known_set(files: list[IdxFile]) -> str | None:
    """Which of KNOWN_SETS the four files are; None for a set that nobody knows.

    Raises InputError for some files of a set beside others: images with another's labels, or a
    damaged file.
    """
    for set_name, known in KNOWN_SETS.items():
        same = [False] * len(files)
        for digests in (known.plain, known.packed):
            for n, digest in enumerate(digests):
                same[n] |= digest in files[n].digests
        if all(same):
            return set_name
        if any(same):
            names = list(IDX_FILES)
            other, fitting = names[same.index(False)], names[same.index(True)]
            raise InputError(
                f"{other} differs from {set_name}'s own file, which {fitting} is; {AGAIN}"
            )
    return None


class ImageSet(NamedTuple):
    """Images (N, H, W) and labels (N,), uint8, the training images first."""

    images: np.ndarray
    labels: np.ndarray
    n_train: int
    known: str | None


def read_set(folder: Path) -> ImageSet:
    """The four files of a folder. Raises InputError where one is damaged or they do not fit."""
    files = [read_idx(folder, name) for name in IDX_FILES]
    known = known_set(files)
    train_images, train_labels, test_images, test_labels = (file.array for file in files)
    for name, images, labels in (
        ("train", train_images, train_labels),
        ("t10k", test_images, test_labels),
    ):
        if len(images) != len(labels):
            raise InputError(
                f"{folder}: {len(images):,} {name} images have {len(labels):,} labels; one each is "
                f"needed"
            )
        if len(images) < FEWEST[name]:
            raise InputError(
                f"{folder}: {len(images)} {name} images are too few; {FEWEST[name]} are needed"
            )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(
            f"{folder}: training images are {train_images.shape[1:]}, test images "
            f"{test_images.shape[1:]}; they must be of one size"
        )
    images = np.concatenate([train_images, test_images])
    labels = np.concatenate([train_labels, test_labels])
    if train_labels.max() == train_labels.min():
        raise InputError(f"{folder}: all training labels are {train_labels[0]}; two are needed")
    return ImageSet(images, labels, len(train_labels), known)


def class_names(folder: Path, known: str | None, n_labels: int) -> tuple[str, ...]:
    """What the labels 0 .. n_labels - 1 are called: CLASSES_FILE of the folder decides, then what
    is known of the set; otherwise numbers. Raises InputError for a file that does not fit."""
    path = folder / CLASSES_FILE
    if not path.exists():
        numbers = tuple(map(str, range(n_labels)))
        return KNOWN_SETS[known].classes if known else numbers
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); write one name a line") from error
    names = tuple(" ".join(line.split()) for line in lines if line.strip())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} names {twice!r} twice; give each class a name of its own")
    if not n_labels <= len(names) <= MOST_CLASSES:
        raise InputError(
            f"{path} has {len(names)} names, but labels run to {n_labels - 1}; "
            f"{n_labels} to {MOST_CLASSES} are needed, one a line"
        )
    return names


def has_idx_file(folder: Path) -> bool:
    """Whether the folder holds at least one of the four files."""
    names = [*IDX_FILES, *(f"{name}.gz" for name in IDX_FILES)]
    return any((folder / name).is_file() for name in names)


def find_set(root: Path) -> Path | None:
    """Where under `root` a set is: there itself, or where torchvision puts it; None: nowhere.

    Raises InputError where several are.
    """
    if has_idx_file(root):
        return root
    inside = [root / "raw", *sorted(root.glob("*/raw"))]
    found = [folder for folder in inside if has_idx_file(folder)]
    if len(found) > 1:
        raise InputError(
            f"{root} holds several sets: {', '.join(map(str, found))}; name one of these folders"
        )
    return found[0] if found else None


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
    """The 5,000 bundled digits. Raises InputError when the file is missing or not as delivered."""
    try:
        stored = SAMPLE_FILE.read_bytes()
    except OSError as error:
        raise InputError(
            f"the bundled sample {SAMPLE_FILE.name} cannot be read ({error.strerror}); restore it"
        ) from error
    found = hashlib.sha256(stored).hexdigest()
    if found != SAMPLE_SHA256:
        raise InputError(
            f"the bundled sample {SAMPLE_FILE.name} is damaged: SHA-256 {found}, expected "
            f"{SAMPLE_SHA256}; restore it"
        )
    with np.load(io.BytesIO(stored)) as arrays:
        return arrays["images"], arrays["labels"]


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


def find_images(where: str) -> Path | None:
    """The folder of the set that is asked for; None: the sample.

    Says in one line why the sample is used, unless that is what was asked for. Raises InputError
    for a named folder without a set.
    """
    if where == SAMPLE:
        return None
    if where == AUTO:
        places = (Path(DOWNLOADS), Path(DOWNLOADS) / "MNIST" / "raw")
        found = next((place for place in places if has_idx_file(place)), None)
        return found or downloaded(Path(DOWNLOADS))
    folder = find_set(Path(where)) if where.strip() else None
    if folder is None:
        first = next(iter(IDX_FILES))
        state = "holds no images" if Path(where).is_dir() and where.strip() else "is no folder"
        raise InputError(
            f"--data {where or repr(where)} {state}: looked for {first} and its three companions, "
            f"gzipped or not, there, in raw/ and in */raw/; name the folder of a set in MNIST's "
            f"format, or '{SAMPLE}'"
        )
    return folder


def downloaded(root: Path) -> Path | None:
    """MNIST, fetched into `root`; None, and a line that says why, where that fails."""
    try:
        download_mnist(root)
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        print(
            f"No MNIST under {root} and no download ({reason}): using the bundled 5,000 digits, "
            f"so accuracy is lower and features are coarser. For the full set give --data DIR, the "
            f"folder of its four IDX files."
        )
        return None
    return find_set(root)


def split_from_bytes(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Split:
    """uint8 images (N, H, W) and labels (N,) as a Split on `device`."""
    pixels = torch.from_numpy(images).to(device).float().div_(255)
    return Split(pixels[:, None], torch.from_numpy(labels).to(device).long())


def load_images(where: str, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """Images and labels, split into training, validation and test images, on `device`.

    `where` names a folder that holds a set in MNIST's file format, or "sample" for the bundled
    digits, or "auto": MNIST in data/, downloaded if need be, or else the sample. A fifth of a
    set's training images, drawn with `seed`, validate, and its test images test; the sample is
    split 3,500 / 500 / 1,000.

    Raises InputError when the folder holds no set, or files that are damaged or do not fit.
    """
    rng = np.random.default_rng(seed)
    folder = find_images(where)
    if folder is None:
        images, labels = read_sample()
        parts = sample_split(labels, rng)
        classes, source = DIGITS, "bundled sample of 5,000 MNIST training digits"
    else:
        images, labels, n_train, known = read_set(folder)
        train, val = np.split(rng.permutation(n_train), [round(TRAIN_SHARE * n_train)])
        parts = [train, val, np.arange(n_train, len(labels))]
        classes = class_names(folder, known, int(labels.max()) + 1)
        kind = "digits" if known == "MNIST" else "images"
        own = folder.resolve()
        name = own.parent.name if own.name == "raw" else own.name
        source = f"{known or name}, full set of {len(labels):,} {kind}"
        if known is None:
            height, width = images.shape[1:]
            print(
                f"{folder} is no set known by its digests: taken as it is, {len(labels):,} images "
                f"of {height} x {width} pixels in {len(classes)} classes"
            )

    digest = hashlib.sha256()
    for array in (images, labels, *parts):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    splits = [split_from_bytes(images[part], labels[part], device) for part in parts]
    return Data(*splits, classes=classes, source=source, digest=digest.hexdigest())


LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
BLANK_SHARE = (
    0.3  # of the pixels that have one and the same value: the paper that others are ink on
)


def as_ink(images: Tensor) -> Tensor:
    """Images (N, C, H, W), C = 1 or 3, as pictures show them: (N, 1, H, W) ink from 0 to 1.

    Values outside of [0, 1], as of normalised images, are brought there by the smallest and the
    largest of each channel; colours become their luminance. What is light is shown dark where the
    smallest value is that of a blank ground, as in MNIST, and light otherwise. Raises ValueError
    for another number of channels and for values that are not finite.
    """
    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape)
        raise ValueError(f"images have shape {shape}; expected (N, C, H, W) with C = 1 or 3")
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    if not bool(torch.isfinite(high - low).all()):
        raise ValueError("images hold values that are not finite numbers")
    light = images.float()
    if low.min() < 0 or high.max() > 1:
        span = (high - low).clamp(min=1e-12)
        light = (light - low[:, None, None]) / span[:, None, None]
    if images.shape[1] == 3:
        weights = torch.tensor(LUMINANCE, device=images.device)
        light = (light * weights[:, None, None]).sum(1, keepdim=True).clamp(0, 1)
    is_ground = float((light <= light.min()).float().mean()) >= BLANK_SHARE
    return light if is_ground else 1 - light
