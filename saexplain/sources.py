"""What is given as images and labels? Any usual form, as batches of float32 images and labels.

    source = open_source(given, "train", Reader())  # tensors, a Dataset, a DataLoader, a folder ...
    for images, labels in source.batches(size=100): ...        # (B, C, H, W), (B,)
    source.batches(np.array([7, 3]))                           # where images have numbers

What is no usual form, or augmented at random, is an InputError before all images are read. This
module does not know of three splits, nor of the scale that a network expects.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from saexplain.files import InputError
from saexplain.normalization import Normalization

IMAGE_COLUMNS = ("image", "images", "img", "pixel_values", "x")
LABEL_COLUMNS = ("label", "labels", "y", "fine_label", "target")
USUAL_COLUMNS = (IMAGE_COLUMNS, LABEL_COLUMNS)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
FORMS = (
    "a pair of tensors (images, labels), a Dataset or DataLoader of such pairs, a Hugging Face "
    "dataset, or a folder with a folder of images for each class"
)
READ_TWICE = 32  # images of a split, to notice one that is augmented at random
CHUNK = 256  # items of a stream that make a batch
READ_ERRORS = (Exception,)  # whatever the code of a Dataset or a damaged file raises


# --------------------------------------------------------------------------------------------------
# Items and batches: images and labels, whatever contains them
# --------------------------------------------------------------------------------------------------


class ItemError(InputError):
    """An item that cannot be used, and its position in its batch."""

    def __init__(self, position: int, message: str):
        super().__init__(position, message)
        self.position, self.message = position, message


def take_pair(found: object, columns: tuple[str, str] | None = None) -> tuple[object, object]:
    """Image and label, or images and labels, of a pair or a dict of columns.

    Raises InputError for anything else, as for a tensor of two rows.
    """
    if isinstance(found, Mapping):
        return tuple(found[name] for name in find_columns(found, columns))
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return tuple(found)
    of = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
    raise InputError(f"must be (image, label), got a {type(found).__name__}{of}")


def find_columns(found: Mapping, columns: tuple[str, str] | None) -> tuple[str, str]:
    """The names of image and label: as given, else usual names, else the only ones of their kind.

    Raises InputError where there are none.
    """
    if columns is not None:
        if missing := [name for name in columns if name not in found]:
            listed = ", ".join(map(str, found))
            raise InputError(f"has no column {missing[0]!r}, as columns= names it; it has {listed}")
        return tuple(columns)
    picked = [[name for name in usual if name in found] for usual in USUAL_COLUMNS]
    for names, is_kind in zip(picked, (is_image, is_label), strict=True):
        by_kind = [name for name, value in found.items() if is_kind(value)]
        names += by_kind if not names and len(by_kind) == 1 else []
    if not all(picked):
        raise InputError(
            f"has no image and label that can be recognized among {', '.join(map(str, found))}; "
            f"name them: columns=('image', 'label')"
        )
    return picked[0][0], picked[1][0]


def is_image(value: object) -> bool:
    """Whether it may be an image or a batch of them."""
    return isinstance(value, Image.Image) or getattr(value, "ndim", 0) >= 2


def is_label(value: object) -> bool:
    """Whether it may be a label or a batch of them."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool)
    return getattr(value, "ndim", 2) < 2 and "int" in str(getattr(value, "dtype", ""))


@dataclass
class Reader:
    """Makes batches of items, in any process: float32 images (B, C, H, W) and int64 labels (B,)."""

    columns: tuple[str, str] | None = None
    transform: Callable | None = None  # of an image, before all else
    normalization: Normalization | None = None  # of pictures, which are read as 0 to 1
    collate: Callable | None = None  # makes (images, labels) of items; None: items are pairs
    mode: str | None = None  # that pictures are converted to: L where all are grey, else RGB
    makes_pictures: bool = False  # whether images are PIL's, so that their scale is known
    shape: tuple[int, ...] | None = None  # of each image, once the first is read
    first: str = ""  # its name

    def __call__(self, items: object) -> tuple[Tensor, Tensor] | InputError:
        """The batch, or what is wrong with it, as `Guarded` gives it."""
        try:
            check_read(items)
            if self.collate is None:
                images, labels = self.read_items(items)
            else:
                images, labels = self.take_pair(self.collate(items))
            images = check_images(images)
            self.shape = self.shape or tuple(images.shape[1:])
            if images.shape[1:] != self.shape:
                raise InputError(self.other_size(images.shape[1:]))
            return images, check_labels(labels, len(images))
        except InputError as error:
            return error
        except READ_ERRORS as error:
            return InputError(f"gives no images and labels ({describe_error(error)}); give {FORMS}")

    def take_pair(self, found: object) -> tuple[object, object]:
        """`take_pair`, from the same columns of all dicts."""
        if isinstance(found, Mapping):
            self.columns = find_columns(found, self.columns)
        return take_pair(found, self.columns)

    def read_items(self, items: Iterable) -> tuple[Tensor, list]:
        """Images and labels of items."""
        images, labels = [], []
        for position, item in enumerate(items):
            try:
                image, label = self.take_pair(item)
                image = self.pixels_of(image)
                self.shape = self.shape or tuple(image.shape)
                if image.shape != self.shape:
                    raise InputError(self.other_size(image.shape))
            except InputError as error:
                raise ItemError(position, str(error)) from error
            except READ_ERRORS as error:
                raise ItemError(position, f"cannot be read ({describe_error(error)})") from error
            images.append(image)
            labels.append(label)
        return torch.stack(images), labels

    def other_size(self, shape: Sequence[int]) -> str:
        """What is wrong with an image of that shape."""
        met, known = (" x ".join(map(str, size)) for size in (shape, self.shape))
        return (
            f"is {met} (channels x height x width), but {self.first} is {known}: all images must "
            f"have one size; give transform=, a function of a picture that resizes it, or a Dataset"
        )

    def pixels_of(self, image: object) -> Tensor:
        """The image as a tensor (C, H, W)."""
        image = self.converted(image)
        image = image if self.transform is None else self.transform(image)
        if isinstance(image, Image.Image):
            self.makes_pictures = True
            pixels = torch.from_numpy(np.array(self.converted(image), np.float32)) / 255
            pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
            if self.normalization:
                mean, std = (torch.tensor(v)[:, None, None] for v in self.normalization)
                pixels = (pixels - mean) / std
            return pixels.contiguous()
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(native(image))
            if image.dim() == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
                image = image.movedim(2, 0)
        if not isinstance(image, Tensor) or image.dim() not in (2, 3):
            met = f"a {type(image).__name__}"
            met += f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
            raise InputError(f"must have an image (C, H, W), got {met}")
        return image.detach()[None] if image.dim() == 2 else image.detach()

    def converted(self, image: object) -> object:
        """A picture in the reader's mode; anything else as it is."""
        if not isinstance(image, Image.Image) or image.mode == self.mode:
            return image
        if image.mode.startswith("I"):  # of 16 bits: convert() would cut them off at 255
            image = Image.fromarray((np.array(image) // 256).astype(np.uint8))
        return image.convert(self.mode)


def check_images(images: object) -> Tensor:
    """Images as a float32 tensor (B, C, H, W). Only their values count, not dtype or gradients.

    Raises InputError for other shapes, and for whole numbers, whose scale is ambiguous.
    """
    try:
        images = native(images) if isinstance(images, np.ndarray) else images
        images = torch.as_tensor(images).detach()
    except READ_ERRORS as error:
        raise InputError(f"has images that are no tensors ({error})") from error
    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        remedy = "; give images.permute(0, 3, 1, 2)" if images.shape[3:] in ((1,), (3,)) else ""
        raise InputError(
            f"has images of shape {shape_of_many(images)}; (N, C, H, W), C being 1 or 3, are "
            f"needed{remedy}"
        )
    if not images.is_floating_point():
        largest = "" if images.is_complex() else f" up to {images.max()}"
        raise InputError(
            f"must have images of floats on the scale that the network expects, got "
            f"{images.dtype}{largest}; give images / 255 for 0 to 1, or images.float()"
        )
    return images.float()


def native(array: np.ndarray) -> np.ndarray:
    """A copy, as the array may be read-only, of a dtype that torch has: float32 for any float."""
    return np.array(array, np.float32 if array.dtype.kind == "f" else None)


def shape_of_many(batch: Tensor | np.ndarray) -> str:
    """The shape of a batch, but for its size: that of all is meant."""
    return f"({', '.join(['N', *map(str, batch.shape[1:])])})"


def as_array(value: object) -> np.ndarray:
    """The value as an array, from any device."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def check_labels(labels: object, n: int) -> Tensor:
    """Labels as an int64 tensor (n,). Raises InputError for anything but one whole number each."""
    is_whole = isinstance(labels, (Tensor, np.ndarray))
    with suppress(*READ_ERRORS):  # lists of different lengths are no array
        labels = as_array(labels) if is_whole else np.stack([*map(as_array, labels)])
    is_array = isinstance(labels, np.ndarray)
    if not is_array or labels.shape[1:] not in ((), (1,)):
        met = f"of shape {shape_of_many(labels)}" if is_array else "of different lengths"
        raise InputError(
            f"must have one label an image, got labels {met}: one-hot or several an image; give "
            f"labels.argmax(1) where one is right, or one of them"
        )
    if labels.dtype.kind == "O":  # as pandas has whole numbers
        labels = np.array(labels.tolist())
    if labels.shape[:1] != (n,):
        raise InputError(f"must have one label an image, got {len(labels)} labels of {n} images")
    if labels.dtype.kind not in "iub":
        raise InputError(
            f"must have labels of whole numbers from 0, got {labels.dtype} such as "
            f"{labels.reshape(-1)[:1].tolist()[0]!r}; give the number of each class"
        )
    return torch.from_numpy(labels.reshape(n).astype(np.int64))


# --------------------------------------------------------------------------------------------------
# Sources: a split as it is given
# --------------------------------------------------------------------------------------------------


class Columns:
    """Images and labels, whole, as a Dataset that gives batches."""

    def __init__(self, images: object, labels: object):
        labels = labels if isinstance(labels, Tensor) else np.asarray(labels)
        if isinstance(images, Tensor) and (images.layout != torch.strided or images.is_meta):
            raise InputError("has images without dense values; give them as a dense tensor")
        if images.ndim < 3 or not 1 <= labels.ndim <= 2 or len(images) != len(labels):
            raise InputError(
                f"has images of shape {tuple(images.shape)} and labels of shape "
                f"{tuple(labels.shape)}; (N, C, H, W) and (N,) are needed"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, index: list[int]) -> tuple:
        return self.images[index], self.labels[index]


class ClassFolders:
    """The images of a folder that has a folder for each class, as a Dataset of pictures."""

    def __init__(self, folder: Path, classes: Sequence[str] = ()):
        found = {}
        for path in sorted(path for path in folder.iterdir() if path.is_dir()):
            if not path.name.startswith("."):
                found[path.name] = [file for file in sorted(path.rglob("*")) if is_picture(file)]
        self.classes = list(classes) or list(found)
        if not found:
            raise InputError(f"{folder} has no folder for each class; put the images into such")
        if other := sorted(found.keys() - set(self.classes)):
            raise InputError(f"{folder} has folders of other classes than train: {other[:5]}")
        if empty := [name for name, files in found.items() if not files]:
            raise InputError(
                f"{folder / empty[0]} has no image ({', '.join(SUFFIXES)}); add some or remove it"
            )
        self.samples = [
            (str(file), self.classes.index(name)) for name, files in found.items() for file in files
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.samples[i]
        return open_picture(path), label

    def __getitems__(self, index: list[int]) -> list[tuple[Image.Image, int]]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            return list(pool.map(self.__getitem__, index))

    def heads(self) -> Iterator[Image.Image]:
        """The pictures without their pixels, whose modes are known."""
        for path, _ in self.samples:
            with suppress(*READ_ERRORS):  # reading has the better message
                yield open_picture(path, load=False)


def open_picture(path: str, load: bool = True) -> Image.Image:
    """The picture of a file."""
    with Image.open(path) as picture:
        if load:
            picture.load()
        return picture


class Guarded:
    """A Dataset that gives an InputError for an item that cannot be read, so that it has a number.

    One raised in another process would come with a traceback in its message, and without a number.
    """

    def __init__(self, dataset: object):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> object:
        try:
            return self.dataset[i]
        except READ_ERRORS as error:
            return InputError(f"cannot be read ({describe_error(error)}); remove or replace it")

    def __getitems__(self, index: list[int]) -> object:
        with suppress(*READ_ERRORS):
            return self.dataset.__getitems__(index)
        return [self[i] for i in index]


def check_read(items: object) -> None:
    """Raise ItemError for the first of the items of a `Guarded` Dataset that cannot be read."""
    for position, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, InputError):
            raise ItemError(position, str(item))


def describe_error(error: Exception) -> str:
    """The kind of the error and what it says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def is_picture(file: Path) -> bool:
    """Whether the name is that of a picture."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def is_grey(picture: Image.Image) -> bool:
    """Whether the picture has one channel, or one and transparency."""
    return picture.mode in ("1", "L", "LA") or picture.mode.startswith("I")


def as_is(batch: object) -> object:
    """The batch, which needs no collation."""
    return batch


@dataclass
class Source:
    """A split as it is given: a Dataset, read by index, or a stream, read in its own order only."""

    name: str  # "train", "val" or "test"
    dataset: object
    reader: Reader
    order: np.ndarray | None  # the indices of the Dataset; None: a stream
    n_workers: int = 0
    some: Tensor = field(default_factory=lambda: torch.empty(0))  # of its images

    @property
    def n(self) -> int | None:
        """The number of images; None for a stream."""
        return None if self.order is None else len(self.order)

    def batches(
        self, index: np.ndarray | None = None, size: int = CHUNK, workers: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the images at these places, or of all. Raises InputError."""
        if self.order is None:
            yield from self.stream()
            return
        order = self.order if index is None else self.order[index]
        is_child = multiprocessing.parent_process() is not None  # which may have no children
        loader = DataLoader(
            self.dataset if isinstance(self.dataset, Columns) else Guarded(self.dataset),
            size,
            sampler=order.tolist(),
            collate_fn=self.reader,
            num_workers=self.n_workers if workers and not is_child else 0,
            generator=torch.Generator(),  # so that the global random numbers stay as they are
        )
        found = self.read(iter(loader))
        for start, batch in zip(itertools.count(0, size), found, strict=False):
            if isinstance(batch, ItemError):
                i = int(order[start + batch.position])
                what = name_file(self.dataset, i) or f"image {i}"
                raise InputError(f"{self.name}: {what} {batch.message}") from batch
            yield self.checked(batch)

    def transforms(self) -> list:
        """All transforms that the images go through, as torchvision names them."""
        found = [self.reader.transform]
        for inner in inner_datasets(self.dataset):
            found += [getattr(inner, "transform", None), getattr(inner, "transforms", None)]
        return found

    def stored_labels(self) -> np.ndarray | None:
        """The labels, where they are known without reading any image."""
        known = None
        if self.order is not None and self.reader.collate in (None, as_is):
            known = stored_labels(self.dataset)
        return None if known is None else known[self.order]

    def stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all images of a stream. Raises InputError."""
        given = self.dataset
        first = next(self.read(iter(given)), None)
        is_item = self.reader.collate is None
        with suppress(InputError):
            is_item = is_item or np.ndim(take_pair(first, self.reader.columns)[1]) == 0
        if is_item:
            self.reader.collate, elements = None, self.read(iter(given))
            given = iter(lambda: list(itertools.islice(elements, CHUNK)), [])
        for batch in self.read(iter(given)):
            yield self.checked(self.reader(batch))

    def checked(self, batch: tuple[Tensor, Tensor] | InputError) -> tuple[Tensor, Tensor]:
        """The batch. Raises InputError for what a reader found."""
        if isinstance(batch, ItemError):
            raise InputError(f"{self.name}: an item {batch.message}") from batch
        if isinstance(batch, InputError):
            raise InputError(f"{self.name} {batch}") from batch
        return batch

    def read(self, given: Iterator) -> Iterator:
        """What the iterator gives. Raises InputError instead of what reading raises."""
        while True:
            try:
                yield next(given)
            except StopIteration:
                return
            except InputError as error:
                raise InputError(f"{self.name}: {error}") from error
            except READ_ERRORS as error:
                raise InputError(
                    f"{self.name}, a {type(self.dataset).__name__}, gives no images and labels "
                    f"({describe_error(error)}); give {FORMS}"
                ) from error


def name_file(dataset: object, i: int) -> str:
    """The file of a Dataset's image; empty where it is not known."""
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        dataset, i = dataset.dataset, dataset.indices[i]
    with suppress(*READ_ERRORS):
        return str(dataset.samples[i][0])
    return ""


def open_source(given: object, name: str, reader: Reader) -> Source:
    """The source of a split, some of whose images are read twice: what is no usual form, or is
    augmented at random, is an InputError here, before all images are read."""
    if isinstance(given, (str, os.PathLike)):
        raise InputError(f"{name}: {given!r} is no folder; give {FORMS}")
    if isinstance(given, TensorDataset):
        given = given.tensors
    try:
        given = take_pair(given, reader.columns) if isinstance(given, Mapping) else given
        if isinstance(given, (tuple, list)) and len(given) and is_whole(given[0]):
            given, reader.collate = Columns(*take_pair(given)), as_is
        elif is_pair_of_lists(given):
            given = list(zip(*given, strict=True))
    except InputError as error:
        raise InputError(f"{name}, a {type(given).__name__}, {error}") from error
    except READ_ERRORS as error:
        raise InputError(f"{name} gives no images and labels ({error}); give {FORMS}") from error
    if isinstance(given, DataLoader):
        source = open_loader(given, name, reader)
    elif is_indexable(given) and not gives_batches(given):
        source = Source(name, given, reader, np.arange(len(given)))
    elif is_stream(given):
        reader.collate = None if isinstance(given, IterableDataset) else as_is
        source = Source(name, given, reader, None)
    else:
        met = f"a {type(given).__name__}"
        met += ", which can be read only once" if hasattr(given, "__next__") else ""
        met = "a tensor without labels" if isinstance(given, (Tensor, np.ndarray)) else met
        raise InputError(f"{name} is {met}; give {FORMS}")
    probe(source)
    return source


def is_whole(value: object) -> bool:
    """Whether it may be the images of a split, or its labels, in one."""
    return isinstance(value, (Tensor, np.ndarray))


def is_pair_of_lists(given: object) -> bool:
    """Whether it is a list of images and their labels, rather than two pairs (image, label)."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    first = given[0]
    return isinstance(first, (tuple, list)) and (len(first) != 2 or is_image(first[1]))


def is_indexable(given: object) -> bool:
    """Whether it has items by their numbers, as a Dataset has."""
    others = (Tensor, np.ndarray, Mapping, bytes, IterableDataset)
    has_items = hasattr(given, "__getitem__") or hasattr(given, "__getitems__")
    return has_items and hasattr(given, "__len__") and not isinstance(given, others)


def gives_batches(given: object) -> bool:
    """Whether it is a list of batches rather than of items."""
    if not isinstance(given, (list, tuple)) or len(given) == 0:
        return False
    with suppress(InputError):
        return getattr(take_pair(given[0])[0], "ndim", 0) == 4
    return False


def is_stream(given: object) -> bool:
    """Whether it gives batches or items in an order of its own, each time anew."""
    others = (Tensor, np.ndarray, Mapping, set, frozenset, bytes)
    return hasattr(given, "__iter__") and not isinstance(given, others) and given is not iter(given)


def open_loader(loader: DataLoader, name: str, reader: Reader) -> Source:
    """The source of a DataLoader: its Dataset in its order, or what it gives where it has none.

    Raises InputError for a loader that shuffles, or that drops images.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        reader.collate = as_is
        return Source(name, loader, reader, None)
    with torch.random.fork_rng(devices=[]):
        order, again = (list(itertools.chain(*loader.batch_sampler)) for _ in range(2))
    if order != again:
        raise InputError(
            f"{name}, a {type(loader).__name__}, must not shuffle: each pass has another order; "
            f"give DataLoader(dataset, shuffle=False), or the Dataset"
        )
    if loader.drop_last and len(order) < len(loader.dataset):
        n = len(loader.dataset) - len(order)
        raise InputError(f"{name} drops {n} images at its end; give drop_last=False")
    reader.collate = None if loader.collate_fn is default_collate else loader.collate_fn
    return Source(name, loader.dataset, reader, np.array(order), loader.num_workers)


def probe(source: Source) -> None:
    """Read some images of the source twice. Raises InputError where there are none, or where they
    differ."""
    reader, order, some, name = source.reader, source.order, None, source.name
    if reader.transform is not None and reader.collate is not None:
        raise InputError(f"{name} gives whole batches: apply transform= to its images before")
    if order is not None:
        if len(order) < 2:
            raise InputError(f"{name} must have two images at least, got {len(order)}")
        some = np.unique(np.linspace(0, len(order) - 1, READ_TWICE).astype(int))
        reader.mode = reader.mode or find_mode(source, some)
        reader.first = reader.first or name_file(source.dataset, int(order[0]))
    reader.first = reader.first or f"the first image of {name}"
    found, again = (next(source.batches(some, workers=False), None) for _ in range(2))
    if found is None:
        raise InputError(f"{name} must have two images at least, got none")
    if again is None:
        raise InputError(f"{name} can be read only once; give {FORMS}")
    for before, after in zip(found, again, strict=True):
        # NaN equals NaN here: images that are not finite have a message of their own
        if before.shape != after.shape or not torch.allclose(before, after, 0, 0, equal_nan=True):
            raise InputError(
                f"{name} must not shuffle or augment: read twice, the same image is another; give "
                f"the transform of evaluation, without random steps"
            )
    source.some = found[0][:READ_TWICE]


def find_mode(source: Source, some: np.ndarray) -> str | None:
    """The mode of pictures: L where all are grey, else RGB; None where images are no pictures."""
    reader, dataset = source.reader, source.dataset
    if reader.collate is not None:
        return None
    if isinstance(dataset, ClassFolders):
        pictures = dataset.heads()
    else:
        items = source.read(dataset[int(i)] for i in source.order[some])
        pictures = []
        with suppress(InputError):  # reading has the better message
            pictures = [take_pair(item, reader.columns)[0] for item in items]
        if not pictures or not all(isinstance(image, Image.Image) for image in pictures):
            return None
    in_color = reader.normalization is not None and len(reader.normalization.mean) == 3
    return "RGB" if in_color or not all(map(is_grey, pictures)) else "L"


# --------------------------------------------------------------------------------------------------
# What a Dataset stores besides images: names of classes, labels, transforms
# --------------------------------------------------------------------------------------------------


def inner_datasets(given: object) -> Iterator[object]:
    """A Dataset or DataLoader and what is inside: of a Subset, a concatenation, a loader."""
    for _ in range(10):  # of an object that contains itself, too
        if given is None:
            return
        yield given
        parts = getattr(given, "datasets", None)
        is_joined = isinstance(parts, (list, tuple)) and len(parts) > 0
        given = parts[0] if is_joined else getattr(given, "dataset", None)


def found_names(source: Source) -> list[str]:
    """Names of the classes that a Dataset stores, or none."""
    for inner in inner_datasets(source.dataset):
        names = getattr(inner, "classes", None)
        features = getattr(inner, "features", None)
        if hasattr(features, "keys"):
            own = source.reader.columns[1:] if source.reader.columns else ()
            column = next((name for name in (*own, *LABEL_COLUMNS) if name in features), None)
            names = getattr(features[column], "names", None) if column else None
        if isinstance(names, (list, tuple)) and names:
            firsts = [name[0] if isinstance(name, tuple) else name for name in names]
            names = [" ".join(str(name).split()) for name in firsts]
            twice = {name for name in names if names.count(name) > 1}  # as ImageNet's two cranes
            return [f"{name} ({i})" if name in twice else name for i, name in enumerate(names)]
    return []


def stored_labels(dataset: object) -> np.ndarray | None:
    """Labels that a Dataset stores beside its images; None where they are known by reading only."""
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        inner = stored_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "samples"):
        with suppress(*READ_ERRORS):
            stored = getattr(dataset, name)
            labels = as_array([row[1] for row in stored] if name == "samples" else stored)
            if labels.dtype.kind in "iu" and labels.shape == (len(dataset),):
                return labels
    return None
