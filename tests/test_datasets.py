"""saexplain.datasets, sources and normalization: images of one's own, in any form, and errors."""

import hashlib
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from saexplain import datasets as ds
from saexplain import images as im
from saexplain import layers, report
from saexplain.files import InputError

N, C = 60, 3  # images and classes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bytes_of(n: int, seed: int, shape=(8, 9, 3)) -> np.ndarray:
    """Random pictures (n, H, W, channels), each channel from 0 to 255."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    return pixels


PIXELS = bytes_of(N, 0)
X = torch.from_numpy(PIXELS).movedim(-1, 1).contiguous().float() / 255  # (N, 3, 8, 9)
Y = torch.arange(N) % C
OTHERS = [
    (torch.rand(n, 3, 8, 9, generator=torch.Generator().manual_seed(n)), Y[:n]) for n in (12, 15)
]


def pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


class Rows(Dataset):
    """Items in a form of their own, by default (image, label)."""

    def __init__(self, form=lambda image, label: (image, label), images=X, **attributes):
        self.form, self.images = form, images
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.form(self.images[i], int(Y[i]))


class Streamed(IterableDataset):
    """Items in their order, of no known number."""

    def __init__(self, n=N):
        self.n = n

    def __iter__(self):
        return ((X[i], int(Y[i])) for i in range(self.n))


class Passes:
    """Elements in their order, in each pass anew; nothing else is known of them."""

    def __init__(self, elements):
        self.elements = elements

    def __iter__(self):
        return iter(self.elements)


class HubDataset:
    """The interface of a Hugging Face dataset: rows by number as dicts, features by column."""

    def __init__(self, label="label", image="img", **more):
        names = types.SimpleNamespace(names=["cat", "dog", "eel"])
        self.features = {image: object(), label: names, **{name: object() for name in more}}
        self.row = lambda i: {**more, label: int(Y[i]), image: pil(PIXELS[i])}

    def __len__(self):
        return N

    def __getitem__(self, i: int) -> dict:
        assert isinstance(i, int)
        return self.row(i)


class Normalize:
    """torchvision's, by its attributes and its arithmetic."""

    def __init__(self, mean=MEAN, std=STD):
        self.mean, self.std = mean, std

    def __call__(self, image):
        mean, std = (torch.as_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (image - mean) / std


class Compose:
    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


def to_tensor(picture):
    return torch.from_numpy(np.array(picture, np.float32)).movedim(-1, 0) / 255


class ImageFolder(Rows):
    """torchvision's, by its attributes; `transforms` is another way to the same transform."""

    def __init__(self, transform):
        super().__init__(lambda pixels, label: (transform(pil(pixels)), label), PIXELS)
        self.classes, self.transform = ["cat", "dog", "eel"], transform
        self.transforms = types.SimpleNamespace(transform=transform, target_transform=None)
        self.samples = [(f"{i}.png", int(label)) for i, label in enumerate(Y)]


def as_dict(image, label):
    return {"label": label, "image": image}


def load(given, **options) -> im.Data:
    return ds.load_own(given, *OTHERS, **options)


def write_folder(folder: Path, pixels=PIXELS, classes=("cat", "dog", "eel")) -> Path:
    """Picture i, as 0i.png, in the folder of class i % 3, so that their order is by class."""
    for i, picture in enumerate(pixels):
        path = folder / classes[i % C] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pil(picture).save(path)
    return folder


def by_class(images=X) -> torch.Tensor:
    return torch.cat([images[i::C] for i in range(C)])


# --- Forms ----------------------------------------------------------------------------------------

FORMS = {
    "list of two": lambda: [X, Y.int()],
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "labels in a list": lambda: (X, Y.tolist()),
    "labels in a column": lambda: (X, Y[:, None]),
    "gradients asked for": lambda: (X.clone().requires_grad_(), Y),
    "a parameter": lambda: (torch.nn.Parameter(X), Y),
    "channels last in memory": lambda: (X.to(memory_format=torch.channels_last), Y),
    "double": lambda: (X.double(), Y),
    "columns": lambda: {"label": Y, "image": X},
    "columns of another name": lambda: {"name": 5, "y": Y, "x": X},
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset": lambda: Rows(),
    "Dataset of arrays": lambda: Rows(lambda x, y: (x.numpy(), y)),
    "Dataset of arrays, channels last": lambda: Rows(
        lambda x, y: (x.numpy().transpose(1, 2, 0), y)
    ),
    "Dataset of dicts": lambda: Rows(as_dict),
    "Dataset of dicts, found by kind": lambda: Rows(lambda x, y: {"id": "a", "c": y, "photo": x}),
    "labels as tensors": lambda: Rows(lambda x, y: (x, torch.tensor([y]))),
    "pictures": lambda: Rows(lambda p, y: (pil(p), y), PIXELS),
    "Subset": lambda: Subset(ConcatDataset([Rows(), Rows()]), range(N)),
    "list of items": lambda: list(zip(X, Y, strict=True)),
    "list of batches": lambda: [(X[:50], Y[:50]), (X[50:], Y[50:])],
    "DataLoader": lambda: DataLoader(Rows(), batch_size=7),
    "DataLoader of TensorDataset": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "DataLoader of dicts": lambda: DataLoader(Rows(as_dict), batch_size=7),
    "DataLoader, other processes": lambda: DataLoader(Rows(), batch_size=7, num_workers=1),
    "DataLoader with an order": lambda: DataLoader(
        TensorDataset(X.flip(0), Y.flip(0)), 7, sampler=range(N - 1, -1, -1)
    ),
    "DataLoader that collates": lambda: DataLoader(
        Rows(),
        7,
        collate_fn=lambda rows: as_dict(torch.stack([x for x, _ in rows]), [y for _, y in rows]),
    ),
    "stream": lambda: Streamed(),
    "stream of items": lambda: Passes([as_dict(x, int(y)) for x, y in zip(X, Y, strict=True)]),
    "stream of batches": lambda: Passes([as_dict(X[:50], Y[:50]), as_dict(X[50:], Y[50:])]),
    "DataLoader of a stream": lambda: DataLoader(Streamed(), 7),
    "DataLoader without batches": lambda: DataLoader(Rows(), batch_size=None),
    "Hugging Face": lambda: HubDataset(),
    "Hugging Face, two labels": lambda: HubDataset("fine_label", coarse_label=0),
}


@pytest.mark.parametrize("form", FORMS)
def test_only_the_values_of_images_count(form):
    given, state = FORMS[form](), torch.get_rng_state()
    is_stream = form in ("DataLoader of a stream", "DataLoader without batches")
    images, labels = load(given).train
    assert torch.equal(images, X)
    assert torch.equal(labels, Y)
    assert images.stride() == X.stride()
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert not images.requires_grad
    assert is_stream or torch.equal(torch.get_rng_state(), state)  # which draw a seed by themselves


def test_half_precision_and_grey_images_without_a_channel():
    data = ds.load_own((X[:, 0].half(), Y), *((x[:, 0], y) for x, y in OTHERS))
    assert torch.equal(data.train.images, X[:, :1].half().float())
    assert data.test.images.shape == (15, 1, 8, 9)


def test_images_of_inference_mode_can_have_gradients():
    with torch.inference_mode():
        given = X + 0, Y + 0
    assert load(given).train.images.requires_grad_().sum().requires_grad


def test_columns_are_taken_by_their_names():
    rows = Rows(lambda x, y: {"image": x, "edited": 1 - x, "label": 0, "kind": y})
    images, labels = load(rows, columns=("edited", "kind")).train
    assert torch.equal(images, 1 - X)
    assert torch.equal(labels, Y)


def test_a_transform_is_applied_to_each_image():
    pixels = [PIXELS, bytes_of(12, 1), bytes_of(15, 2)]
    rows = [Rows(lambda p, y: (pil(p), y), own) for own in pixels]
    doubled = ds.load_own(*rows, transform=lambda picture: 2 * to_tensor(picture))
    assert doubled.train.images.numpy() == pytest.approx(2 * X.numpy())

    def resize(picture):
        return picture.resize((9, 16), Image.Resampling.NEAREST)

    larger = ds.load_own(*rows, transform=resize)
    assert torch.equal(larger.train.images, X.repeat_interleave(2, dim=2))


# --- Folders --------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_split_by_class(tmp_path, capsys):
    data = ds.load_own(write_folder(tmp_path / "photos"), seed=4)
    assert data.classes == ("cat", "dog", "eel")
    assert [len(split.labels) for split in data[:3]] == [42, 6, 12]  # 14, 2 and 4 of each class
    for split, n in zip(data[:3], (14, 2, 4), strict=True):
        assert torch.bincount(split.labels).tolist() == [n] * C
        for image, label in zip(*split, strict=True):
            (i,) = (X == image).all((1, 2, 3)).nonzero().flatten().tolist()
            assert label == Y[i]
    every = {image.numpy().tobytes() for split in data[:3] for image in split.images}
    assert len(every) == N
    line = " ".join(capsys.readouterr().out.split())
    for words in ("42 / 6 / 12", "3 x 8 x 9", "3 classes: cat, dog, eel", "seed 4"):
        assert words in line
    again, other = (ds.load_own(str(tmp_path / "photos"), seed=seed) for seed in (4, 5))
    assert again.digest == data.digest != other.digest


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "test")])
def test_a_folder_may_have_its_splits(tmp_path, names):
    pixels = [PIXELS, bytes_of(12, 1), bytes_of(15, 2)]
    for name, own in zip(names, pixels, strict=True):
        write_folder(tmp_path / name, own)
    (tmp_path / names[1] / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / names[1] / ".hidden").mkdir()
    data = ds.load_own(tmp_path)
    for split, own in zip(data[:3], pixels, strict=True):
        assert torch.equal(split.images, by_class(torch.from_numpy(own).movedim(-1, 1) / 255))
    beside = ds.load_own(tmp_path / names[0], tmp_path / names[1], tmp_path / names[2])
    assert beside.digest == data.digest
    hub = {"train": HubDataset(), "validation": OTHERS[0], "test": OTHERS[1]}
    assert torch.equal(ds.load_own(hub).val.images, OTHERS[0][0])


def test_a_class_may_be_named_train(tmp_path):
    data = ds.load_own(write_folder(tmp_path, classes=("bus", "test", "train")))
    assert data.classes == ("bus", "test", "train")


def test_a_missing_split_is_drawn_from_another():
    without_val = ds.load_own((X, Y), None, OTHERS[1])
    assert [len(split.labels) for split in without_val[:3]] == [51, 9, 15]
    assert torch.equal(without_val.test.images, OTHERS[1][0])
    without_test = ds.load_own((X, Y), OTHERS[0])
    assert [len(split.labels) for split in without_test[:3]] == [60, 3, 9]
    assert torch.equal(without_test.train.images, X)


def test_pictures_are_grey_where_all_are(tmp_path):
    grey = bytes_of(N, 3, (8, 9))
    data = ds.load_own(write_folder(tmp_path / "grey", grey))
    assert data.train.images.shape == (42, 1, 8, 9)
    assert {x.numpy().tobytes() for x in data.test.images} <= {
        (x / np.float32(255)).tobytes() for x in grey.astype(np.float32)
    }
    write_folder(tmp_path / "mixed", grey)
    pil(PIXELS[0]).save(tmp_path / "mixed" / "eel" / "0.png")
    assert ds.load_own(tmp_path / "mixed").train.images.shape == (42, 3, 8, 9)
    as_rgb = ds.load_own(tmp_path / "grey", mean=MEAN, std=STD)  # of a model for three channels
    assert as_rgb.train.images.shape[1] == 3


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".ppm", ".tif", ".PNG"])
def test_pictures_of_many_formats_and_modes(tmp_path, suffix):
    flat = np.full((8, 9, 3), 64, np.uint8) * np.arange(1, 4, dtype=np.uint8)  # survives JPEG
    for i in range(N):
        path = tmp_path / "abc"[i % C] / f"{i}{suffix}"
        path.parent.mkdir(exist_ok=True)
        pil(flat).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    pil(flat).quantize().save(tmp_path / "a" / "palette.png")
    images = torch.cat(ds.read_source(opened(tmp_path), torch.device("cpu")).images.split(100))
    assert images.numpy() == pytest.approx(
        np.moveaxis(flat, -1, 0)[None].repeat(61, 0) / 255, abs=0.02
    )


def opened(folder: Path) -> ds.Source:
    return ds.open_source(ds.ClassFolders(folder), "train", ds.Reader())


def test_pictures_of_16_bits_keep_their_scale(tmp_path):
    deep = np.linspace(0, 65535, 72).reshape(8, 9).astype(np.uint16)
    for i in range(N):
        path = tmp_path / "abc"[i % C] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pil(deep).save(path)
    part = ds.read_source(opened(tmp_path), torch.device("cpu"))
    assert part.images[7, 0].numpy() == pytest.approx(deep / 65535, abs=1 / 255)


# --- Display --------------------------------------------------------------------------------------


def shown(data: im.Data) -> torch.Tensor:
    return data.display.pictures(data.train.images)


@pytest.mark.parametrize(
    "transform",
    [
        Compose(to_tensor, Normalize()),
        Compose(to_tensor, Normalize(*(list(v) for v in (MEAN, STD)))),
        Compose(Compose(to_tensor), Normalize((0.5,), (0.5,)), Normalize(torch.tensor(MEAN), 2.0)),
    ],
)
@pytest.mark.parametrize(
    "wrapped", [lambda d: d, lambda d: DataLoader(d, 7), lambda d: Subset(d, range(N))]
)
def test_the_normalization_of_a_transform_is_undone(transform, wrapped, capsys):
    data = load(wrapped(ImageFolder(transform)))
    assert data.train.images.min() < -0.4
    assert shown(data).numpy() == pytest.approx(X.numpy(), abs=1e-6)
    assert data.classes == ("cat", "dog", "eel")
    assert "of the transform" in capsys.readouterr().out


NORMALIZED = Normalize()(X)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": MEAN, "std": torch.tensor(STD)},
        {"model": types.SimpleNamespace(pretrained_cfg={"mean": MEAN, "std": STD})},
        {"model": types.SimpleNamespace(default_cfg={"mean": MEAN, "std": STD})},
        {
            "model": types.SimpleNamespace(
                config=types.SimpleNamespace(image_mean=MEAN, image_std=STD)
            )
        },
        {
            "model": types.SimpleNamespace(
                module=types.SimpleNamespace(pretrained_cfg={"mean": MEAN, "std": STD})
            )
        },
    ],
)
def test_the_normalization_of_arguments_or_model_is_undone(options):
    given = [(Normalize()(x), y) for x, y in ((X, Y), *OTHERS)]
    data = ds.load_own(*given, **options)
    assert torch.equal(data.train.images, NORMALIZED)
    assert shown(data).numpy() == pytest.approx(X.numpy(), abs=1e-6)


def test_images_from_0_to_1_are_shown_as_they_are(capsys):
    model = types.SimpleNamespace(pretrained_cfg={"mean": MEAN, "std": STD})
    assert torch.equal(shown(load((X, Y), model=model)), X)
    assert "as they are" in capsys.readouterr().out


def test_other_images_are_scaled_by_the_range_of_all_channels(capsys):
    given = [
        (6 * x * torch.tensor([1, 0.5, 0.25]).view(3, 1, 1) - 2, y) for x, y in ((X, Y), *OTHERS)
    ]
    data = ds.load_own(*given)
    assert shown(data).numpy() == pytest.approx((given[0][0].numpy() + 2) / 6, abs=1e-5)
    assert "values from -2 to 4 scaled" in capsys.readouterr().out
    assert data.display == ds.load_own(*given, mean=9.0, std=1.0).display
    assert "the given mean and std would" in capsys.readouterr().out


def test_pictures_without_a_transform_get_the_normalization(tmp_path):
    write_folder(tmp_path)
    for options in (
        {"mean": MEAN, "std": STD},
        {"model": types.SimpleNamespace(pretrained_cfg={"mean": MEAN, "std": STD})},
    ):
        data = ds.load_own(tmp_path, seed=0, **options)
        plain = ds.load_own(tmp_path, seed=0)
        expected = Normalize()(plain.train.images)
        assert data.train.images.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
        assert shown(data).numpy() == pytest.approx(plain.train.images.numpy(), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"mean": MEAN}, {"mean": 0, "std": 0}, {"mean": "a", "std": 1}]
)
def test_mean_and_std_must_be_usable(options):
    with pytest.raises(InputError, match="mean and std must both"):
        load((X, Y), **options)


# --- Names of classes -----------------------------------------------------------------------------


def test_names_of_classes_are_given_or_found():
    assert load((X, Y)).classes == ("0", "1", "2")
    assert load((X, Y), n_classes=4).classes == ("0", "1", "2", "3")
    assert load((X, Y), classes=("a", "b", "c", "d")).classes == ("a", "b", "c", "d")
    assert load(HubDataset()).classes == ("cat", "dog", "eel")
    assert load(HubDataset("kind")).classes == ("cat", "dog", "eel")
    assert load(HubDataset(), classes=("a", "b", "c")).classes == ("a", "b", "c")
    twice = Rows(classes=[("crane", "bird"), ("eel",), ("crane", "machine")])
    assert load(twice, n_classes=3).classes == ("crane (0)", "eel", "crane (2)")


def test_the_number_of_classes_is_asked_for_before_all_images_are_read():
    read, seen = [], []

    def form(image, label):
        read.append(label)
        return image, label

    def n_classes(images):
        seen.append((images.shape[1:], len(read)))
        return 3

    images = X.repeat(10, 1, 1, 1)

    class Many(Rows):
        def __getitem__(self, i):
            return self.form(images[i], i % C)

    load(Many(form, images), n_classes=n_classes)
    ((shape, n_read),) = seen
    assert shape == X.shape[1:]
    assert n_read <= 100 < 600 <= len(read)


def test_data_can_be_given_to_the_report(monkeypatch):
    net = layers.AtLayer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(216, 3)), "1")
    loaded = load((X, Y), classes=("a", "b", "c"))
    for cap in (None, 0):
        monkeypatch.setattr(ds, "MEMORY_CAP", cap)
        given = report.load_splits(net, (), load((X, Y), classes=("a", "b", "c")))
        assert torch.equal(given.test.images[:], OTHERS[1][0])
        assert given.classes == ("a", "b", "c")
        assert given.digest == loaded.digest == report.load_splits(net, (), (X, Y), *OTHERS).digest
    assert report.load_splits(net, ("d", "e", "f"), loaded).classes == ("d", "e", "f")
    with pytest.raises(InputError, match="the data have 4 classes; the network has 3 logits"):
        report.load_splits(net, (), load((X, Y), n_classes=4))
    smaller = layers.AtLayer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(216, 2)), "1")
    with pytest.raises(InputError, match=r"labels of train run from 0 to 2; .* has 2 logits"):
        report.load_splits(smaller, (), (X, Y), *OTHERS)


# --- Images larger than memory --------------------------------------------------------------------


def test_lazy_images_equal_those_in_memory(monkeypatch, tmp_path, capsys):
    (val, y_val), test = OTHERS
    val[3], val[5] = X[7], X[9]
    folder = write_folder(tmp_path)
    for given in (
        ((X, Y), (val, y_val), test),
        (Rows(), (val, y_val), test),
        (DataLoader(Rows(), 7, num_workers=1), (val, y_val), test),
        (DataLoader(Rows(), 7, collate_fn=collate), (val, y_val), test),
        (folder,),
    ):
        capsys.readouterr()
        eager = ds.load_own(*given, seed=1)
        lines = " ".join(capsys.readouterr().out.split())
        monkeypatch.setattr(ds, "MEMORY_CAP", 20 * X[0].nbytes)
        lazy = ds.load_own(*given, seed=1)
        monkeypatch.setattr(ds, "MEMORY_CAP", None)
        images, expected = lazy.train.images, eager.train.images
        assert isinstance(images, ds.LazyImages)
        assert isinstance(expected, torch.Tensor)
        assert lazy.digest == eager.digest
        assert lazy.display == eager.display
        printed = " ".join(capsys.readouterr().out.split())
        assert re.search(r"; train, \S+ GB, read when needed", printed)
        assert re.sub(r"; \w+, [^,;]+ GB, read when needed", "", printed) == lines
        assert ("2 of 12 validation images are also training images" in lines) == (len(given) == 3)
        assert images.shape == expected.shape
        assert len(images) == len(expected)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        for key in (
            slice(3, 30, 4),
            order,
            order[:0],
            order.numpy(),
            order > 9,
            torch.tensor([5, 5]),
        ):
            assert torch.equal(images[key], expected[key])
            assert torch.equal(images.subset(key)[:], expected[key])
        assert torch.equal(images[4], expected[4])
        batches = list(images.split(9))
        assert [len(batch) for batch in batches] == [len(b) for b in expected.split(9)]
        assert torch.equal(torch.cat(batches), expected)
        loaded = list(im.TensorLoader(lazy.train, 11))
        assert torch.equal(torch.cat([x for x, _ in loaded]), expected)
        assert torch.equal(torch.cat([y for _, y in loaded]), eager.train.labels)


def collate(rows):
    return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])


def test_lazy_images_are_not_kept(monkeypatch):
    read = []

    def form(image, label):
        read.append(label)
        return image, label

    monkeypatch.setattr(ds, "MEMORY_CAP", 0)
    images = load(Rows(form)).train.images
    n_read = len(read)
    assert n_read <= N + 96  # the probes, and once all
    images[10:14], images[10:14]
    assert len(read) == n_read + 8


def test_an_array_on_disk_is_read_by_index(monkeypatch, tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    monkeypatch.setattr(ds, "MEMORY_CAP", X.nbytes - 1)
    data = load((np.load(tmp_path / "x.npy", mmap_mode="r"), Y))
    assert isinstance(data.train.images, ds.LazyImages)
    assert isinstance(data.val.images, torch.Tensor)
    assert torch.equal(data.train.images[:], X)
    assert data.digest == load((X, Y)).digest


def test_a_stream_must_fit_into_memory(monkeypatch):
    monkeypatch.setattr(ds, "MEMORY_CAP", X.nbytes - 1)
    with pytest.raises(InputError, match=r"train is a stream of more than .* give a Dataset"):
        load(Streamed())


# --- Duplicates and digests -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 3, 3)])
def test_images_in_two_splits_are_counted(shape, capsys):
    """Also beside images that agree with a training image but for one pixel."""
    parts = [
        torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)) for n in (40, 12, 15)
    ]
    train, val, test = parts
    test[3], test[14], val[11], test[0] = train[39], train[0], train[7], val[2]
    test[5], val[5] = train[5], train[5]
    test[5].view(-1)[0] += 1  # at the edge
    val[5].view(-1)[val[5].numel() // 2] += 1  # in the middle
    data = im.Data(*(im.Split(part, torch.zeros(len(part))) for part in parts), (), "", "")
    expected = {("val", "train"): 1, ("test", "train"): 2, ("test", "val"): 1}
    hashes = {name: ds.hashes_of(getattr(data, name)) for name in im.SPLIT_NAMES}
    assert ds.count_duplicates(hashes) == expected
    ds.check_split_leakage(data)
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("1 of 12 validation", "2 of 15 test", "1 of 15 test"):
        assert words in printed


def test_the_digest_depends_on_images_labels_and_splits():
    data = load((X, Y))
    other, labels = X.clone(), Y.clone()
    other[7, 0, 0, 0] += 0.1
    labels[:2] = labels[:2].flip(0)
    others = [
        ds.load_own((other, Y), *OTHERS),
        ds.load_own((X, labels), *OTHERS),
        ds.load_own((X, Y), *OTHERS[::-1]),
        ds.load_own(*((x.transpose(2, 3), y) for x, y in ((X, Y), *OTHERS))),
    ]
    assert len({data.digest, *(o.digest for o in others)}) == 5
    assert int(data.digest, 16).bit_length() <= 256 == 4 * len(hashlib.sha256().hexdigest())


# --- What cannot be used --------------------------------------------------------------------------


def flip_at_random(image, label):
    return (image.flip(2) if random.random() < 0.5 else image), label


ONE_HOT = torch.nn.functional.one_hot(Y)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "train is a NoneType; give a pair of tensors"),
        (5, "train is a int; give"),
        ({1, 2}, "train is a set; give"),
        ((row for row in Rows()), "train is a generator, which can be read only once; give"),
        (iter([(X, Y)]), "train is a list_iterator, which can be read only once"),
        ("nowhere", "train: 'nowhere' does not exist; give"),
        (" ", "train: ' ' does not exist"),
        (X, "train is a tensor without labels; give"),
        (X.numpy(), "train is a tensor without labels; give"),
        ([], "train must have two images at least, got 0"),
        ((X[:1], Y[:1]), "train must have two images at least, got 1"),
        (Streamed(0), "train must have two images at least, got none"),
        (Streamed(1), "train must have two images at least, got 1"),
        (
            {"photo": X, "kind": Y, "z": X},
            "train, a dict, has no image and label .* photo, kind, z",
        ),
        (Rows(lambda x, y: {"a": x, "b": x}), "image 0 has no image and label .* columns="),
        (Rows(lambda x, y: x), r"image 0 must be \(image, label\), got a Tensor"),
        (Rows(lambda x, y: (x, y, 0)), r"image 0 must be \(image, label\), got a tuple of 3"),
        (DataLoader(Rows(lambda x, y: x), 2), r"must be \(image, label\), got a Tensor"),
        (DataLoader(Streamed(), 2, collate_fn=lambda r: r[0][0]), "got a Tensor"),
        (DataLoader(Rows(), 2, collate_fn=lambda rows: ([0], [0])), r"images of shape \(N\)"),
        (DataLoader(Rows(), 2, collate_fn=lambda rows: rows[0][0] + "a"), "gives no images"),
        (DataLoader(Rows(), shuffle=True), "a DataLoader, must not shuffle"),
        (DataLoader(Rows(), 7, drop_last=True), "drops 4 images at its end"),
        (Rows(lambda x, y: (x + torch.rand(1), y)), "must not shuffle or augment: read twice"),
        (Rows(flip_at_random), "must not shuffle or augment: .* transform of evaluation"),
        (Rows(lambda x, y: (x, random.randrange(10**9))), "must not shuffle or augment"),
        ((X[:, :2], Y), r"images of shape \(N, 2, 8, 9\); .* C being 1 or 3"),
        ((X.movedim(1, 3), Y), r"C being 1 or 3, are needed; give images.permute\(0, 3, 1, 2\)"),
        ((X[0, 0], Y), r"images of shape \(8, 9\)"),
        ((X, Y[1:]), r"labels of shape \(59,\)"),
        ((X, Y.float()), "labels of whole numbers from 0, got float32 such as 0.0"),
        (Rows(lambda x, y: (x, "cat")), "labels of whole numbers .* such as 'cat'"),
        (Rows(lambda x, y: (x, None)), "labels of whole numbers .* such as None"),
        ((X, ONE_HOT), r"one label an image, got labels of shape \(N, 3\): one-hot .*argmax"),
        (Rows(lambda x, y: (x, ONE_HOT[y])), "one label an image, got labels of shape"),
        (Rows(lambda x, y: (x, [1] * (1 + y))), "one label an image, got labels of different"),
        ((X, Y - 1), "run from -1 to 1; .* leave out images without a label"),
        ((X / 0, Y), "not finite"),
        ((X.double() * 1e300, Y), "not finite"),
        (((X * 255).byte(), Y), "scale .* torch.uint8 up to 255; give images / 255"),
        (Rows(lambda p, y: (torch.from_numpy(p), y), PIXELS.transpose(0, 3, 1, 2)), "torch.uint8"),
        (Rows(lambda x, y: ("a.png", y)), r"image 0 must have an image \(C, H, W\), got a str"),
        (Rows(lambda x, y: (x[None], y)), r"an image \(C, H, W\), got a Tensor of shape \(1, 3"),
        (Rows(lambda x, y: (x[:, y:], y)), "image 1 is 3 x 7 x 9 .* first image of train is 3 x 8"),
        (Rows(lambda x, y: [][y]), r"image 0 cannot be read \(IndexError: list"),
    ],
)
def test_splits_that_cannot_be_used_are_named(given, message):
    with pytest.raises(InputError, match=message):
        load(given)


def test_labels_count_from_0_without_a_gap():
    with pytest.raises(
        InputError, match=r"1 to 3; .* 0 to 2, without a gap: count from 0: give la"
    ):
        ds.load_own((X, Y + 1))
    with pytest.raises(InputError, match=r"0 to 4; .* 0 to 2, without a gap: renumber them"):
        ds.load_own((X, 2 * Y))


def test_labels_must_fit_the_network():
    with pytest.raises(
        InputError, match=r"labels of train run from 0 to 2; .* 0 to 1, as the network"
    ):
        load((X, Y), n_classes=2)
    with pytest.raises(InputError, match="0 to 2, as the network has 3 logits: count from 0"):
        load((X, Y + 1), n_classes=3)
    with pytest.raises(InputError, match="2 different names; the network has 3 logits"):
        load((X, Y), n_classes=3, classes=("a", "b"))
    with pytest.raises(InputError, match="2 different names"):
        load((X, Y), n_classes=3, classes=("a", "b", "b"))
    with pytest.raises(
        InputError, match=r"train has 3 classes .* the network has 1000 logits: give cl"
    ):
        load(HubDataset(), n_classes=1000)
    assert load(HubDataset(), n_classes=4, classes=tuple("abcd")).classes == tuple("abcd")


@pytest.mark.parametrize(
    "stored",
    [{"targets": (Y + 1).tolist()}, {"labels": Y + 1}, {"samples": [("a", int(y) + 1) for y in Y]}],
)
@pytest.mark.parametrize("wrapped", [lambda d: d, lambda d: DataLoader(Subset(d, range(50)), 7)])
def test_stored_labels_are_checked_before_all_images_are_read(stored, wrapped):
    read = []

    def form(image, label):
        read.append(label)
        return image, label

    with pytest.raises(InputError, match=r"run from 1 to 3; .*: count from 0"):
        ds.load_own(wrapped(Rows(form, **stored)), n_classes=3)
    assert len(read) <= 96  # 32 images, three times, and not all
    changed = Rows(**stored, target_transform=lambda label: label - 1)
    assert torch.equal(
        load(changed).train.labels, Y
    )  # labels that are stored are not the final ones


def test_splits_must_agree(tmp_path):
    with pytest.raises(
        InputError, match=r"val.* is 3 x 9 x 8 .* first image of train is 3 x 8 x 9"
    ):
        ds.load_own((X, Y), (X.transpose(2, 3), Y), OTHERS[1])
    other = Rows(classes=["cat", "eel", "dog"])
    with pytest.raises(InputError, match="val must have the classes of train"):
        ds.load_own(HubDataset(), other, OTHERS[1])
    with pytest.raises(InputError, match="all 12 images of val are in train"):
        ds.load_own((X, Y), (X[:12], Y[:12]), OTHERS[1])
    with pytest.raises(InputError, match="train has 7 images, too few"):
        ds.load_own((X[:7], Y[:7]))
    with pytest.raises(InputError, match="val gives whole batches: apply transform="):
        ds.load_own(Rows(lambda p, y: (pil(p), y), PIXELS), *OTHERS, transform=to_tensor)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(InputError, match="has no folder for each class"):
        ds.load_own(tmp_path)
    folder = write_folder(tmp_path / "photos")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"photos/empty has no image \(\.jpg, .*remove it"):
        ds.load_own(folder)
    (folder / "empty").rmdir()
    pil(PIXELS[0][:5]).save(folder / "dog" / "small.png")
    small, first = folder / "dog" / "small.png", folder / "cat" / "000.png"
    message = (
        rf"{small} is 3 x 5 x 9 .* {first} is 3 x 8 x 9: all images must have one size; give tr"
    )
    with pytest.raises(InputError, match=message):
        ds.load_own(folder)
    small.write_bytes(first.read_bytes()[:90])
    with pytest.raises(InputError, match=rf"{small} cannot be read .* remove or replace"):
        ds.load_own(folder)
    small.unlink()
    write_folder(tmp_path / "val", PIXELS[:12], ("cat", "dog", "fox"))
    with pytest.raises(InputError, match=r"val has folders of other classes than train: \['fox'\]"):
        ds.load_own(folder, tmp_path / "val")


@pytest.mark.parametrize(("n_workers", "collate_fn"), [(0, None), (0, collate), (1, None)])
def test_an_item_that_cannot_be_read_has_a_number(n_workers, collate_fn):
    def form(image, label):
        if image is rows.images[51]:
            raise KeyError("no such row")
        return image, label

    rows = Rows(form, list(X))
    order = [*range(50), 57, 51, *range(52, 57)]  # image 51 is at place 51, and is not read early
    loader = DataLoader(rows, 7, sampler=order, num_workers=n_workers, collate_fn=collate_fn)
    message = r"^train: image 51 cannot be read \(KeyError: 'no such row'\); remove or replace it$"
    with pytest.raises(InputError, match=message):
        load(loader)
    rows.form = lambda image, label: (image[:, 1:] if image is rows.images[51] else image, label)
    with pytest.raises(InputError, match=r"^train: image 51 is 3 x 7 x 9 .*") as caught:
        load(DataLoader(rows, 7, sampler=order, num_workers=n_workers))
    assert "\n" not in str(caught.value)


def names_by_image(data) -> dict[bytes, str]:
    """The name of the class of each image."""
    found = {}
    for split in data[:3]:
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            found[image.numpy().tobytes()] = data.classes[label]
    return found


def test_labels_follow_the_names_of_the_logits(tmp_path):
    folder = write_folder(tmp_path / "photos")
    plain = names_by_image(ds.load_own(folder))
    own = ds.load_own(folder, classes=("eel", "cat", "dog"))
    assert own.classes == ("eel", "cat", "dog")
    assert names_by_image(own) == plain
    more = ds.load_own(folder, classes=("ant", "dog", "eel", "cat"))  # the network knows another
    assert names_by_image(more) == plain
    renamed = names_by_image(ds.load_own(folder, classes=("x", "y", "z")))
    assert {name: renamed[image] for image, name in plain.items()} == dict(
        zip(("cat", "dog", "eel"), "xyz", strict=True)
    )
