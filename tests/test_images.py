"""saexplain.images and saexplain.idx: files and tensors, whole and damaged, to three splits."""

import gzip
import hashlib
import struct
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from saexplain import images as im
from saexplain.files import InputError
from saexplain.idx import KNOWN_SETS, KnownSet

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (150, 9, 11), np.uint8)  # of an unusual size
ARRAYS = {TRAIN_IMAGES: PIXELS[:120], TRAIN_LABELS: np.arange(120, dtype=np.uint8) % 3}
ARRAYS |= {TEST_IMAGES: PIXELS[120:], TEST_LABELS: np.arange(30, dtype=np.uint8) % 3}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def write_set(folder: Path, **changed: np.ndarray) -> Path:
    """The four files, the labels gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (ARRAYS | changed).items():
        content = idx_bytes(array)
        if "labels" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return folder


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "raw", "AnySet/raw"])
def test_a_set_is_found_and_read_pixel_for_pixel(tmp_path, capsys, place):
    write_set(tmp_path / place)
    data = im.load_images(str(tmp_path), seed=2)
    assert [len(split.labels) for split in data[:3]] == [96, 24, 30]
    assert data.classes == ("0", "1", "2")
    train, val, test = ((split.images * 255).round().byte().numpy() for split in data[:3])
    assert np.array_equal(test[:, 0], ARRAYS[TEST_IMAGES])
    assert np.array_equal(data.test.labels, ARRAYS[TEST_LABELS])
    learned = np.concatenate([train, val])[:, 0]
    assert np.array_equal(np.unique(learned, axis=0), np.unique(ARRAYS[TRAIN_IMAGES], axis=0))
    assert "no set known by its digests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({TRAIN_LABELS: ARRAYS[TRAIN_LABELS][1:]}, "one label for each image"),
        ({TEST_IMAGES: PIXELS[:30, :8]}, "images of one size"),
        ({TRAIN_IMAGES: PIXELS[:120, :7]}, "images of 7 x 11 pixels; 8 to 64"),
        ({TRAIN_LABELS: np.full(120, 4, np.uint8)}, "two classes"),
        ({name: array[:19] for name, array in ARRAYS.items()}, "100 training and 20 test images"),
    ],
)
def test_the_files_of_a_set_must_fit(tmp_path, changed, message):
    write_set(tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        im.load_images(str(tmp_path))


GOOD = idx_bytes(ARRAYS[TRAIN_IMAGES])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08", "must have magic number 2051"),
        (struct.pack(">I", 2049) + GOOD[4:], "must have magic number 2051, got 2049"),
        (GOOD[:-1], "is damaged: it announces 11,880 bytes, got 11,879"),
        (GOOD + b"\0", "is damaged: it announces 11,880 bytes, got more"),
        (struct.pack(">4I", 2051, 2**31, 28, 28), "is damaged: it announces 1,683,627,180,032"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, message, packed):
    plain = write_set(tmp_path) / TRAIN_IMAGES
    plain.unlink()
    if packed:
        plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(content))
    else:
        plain.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{TRAIN_IMAGES}{'.gz' * packed} {message}"):
        im.load_images(str(tmp_path))


def test_no_more_of_a_gzip_is_unpacked_than_its_header_announces(tmp_path):
    path = write_set(tmp_path) / TRAIN_IMAGES
    path.rename(path.with_suffix(".gz")).write_bytes(gzip.compress(GOOD + bytes(2**26)))
    tracemalloc.start()
    with pytest.raises(InputError, match="got more"):
        im.load_images(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("cut", [3, 20, -4])
def test_a_damaged_gzip_is_named(tmp_path, cut):
    path = write_set(tmp_path) / f"{TRAIN_LABELS}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"labels-idx1-ubyte\.gz is damaged"):
        im.load_images(str(tmp_path))


def test_part_of_a_set_is_an_error_and_no_reason_to_use_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(im, "DOWNLOADS", str(tmp_path))
    (write_set(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="neither t10k-labels-idx1-ubyte"):
        im.load_images("auto")


def test_of_two_sets_in_one_folder_none_is_chosen(tmp_path):
    for name in ("A", "B"):
        write_set(tmp_path / name / "raw")
    with pytest.raises(InputError, match="holds several sets"):
        im.load_images(str(tmp_path))


@pytest.mark.parametrize("where", ["missing", "", " ", "empty"])
def test_a_named_folder_must_hold_a_set(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "raw")  # an empty name must not stand for the current folder
    Path("empty").mkdir()
    with pytest.raises(InputError, match="holds no images" if where == "empty" else "no folder"):
        im.load_images(where)


def test_a_format_is_added_by_a_pair_of_functions(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", **ARRAYS)

    def read(folder: Path) -> im.ImageSet:
        with np.load(folder / "set.npz") as stored:
            return im.ImageSet(*stored.values(), name=None)

    pair = (lambda folder: (folder / "set.npz").exists(), read)
    monkeypatch.setattr(im, "FORMATS", (*im.FORMATS, pair))
    own = im.load_images(str(tmp_path))
    assert own.digest == im.load_images(str(write_set(tmp_path / "idx"))).digest


# --- Known sets and names of classes --------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_known_set_has_its_own_class_names(tmp_path, monkeypatch, capsys, packed):
    contents = [path.read_bytes() for path in write_set(tmp_path).iterdir()]
    if not packed:
        contents = [idx_bytes(array) for array in ARRAYS.values()]
    md5s = [hashlib.md5(content).hexdigest() for content in contents]
    monkeypatch.setitem(KNOWN_SETS, "Small", KnownSet(("hat", "shoe", "bag"), md5s))
    data = im.load_images(str(tmp_path))
    assert data.classes == ("hat", "shoe", "bag")
    assert data.source == "Small, full set of 150 images"
    assert capsys.readouterr().out == ""
    (tmp_path / "classes.txt").write_text("Hut\n Schuh \n\nTasche\nunused\n")
    assert im.load_images(str(tmp_path)).classes == ("Hut", "Schuh", "Tasche", "unused")
    write_set(tmp_path, **{TRAIN_LABELS: ARRAYS[TRAIN_LABELS][::-1]})
    with pytest.raises(InputError, match="train-labels-idx1-ubyte is unknown"):
        im.load_images(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"a\nb", b"a\nb\na", b"a\nb\n\xff\n", "\n".join(map(str, range(257))).encode()]
)
def test_names_of_classes_must_fit(tmp_path, content):
    (write_set(tmp_path) / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"classes\.txt must be UTF-8 text with 3 to 256 diff"):
        im.load_images(str(tmp_path))


# --- The bundled sample and the download ----------------------------------------------------------


def test_the_sample_is_split_by_class_without_overlap():
    data = im.load_images("sample", seed=3)
    for split, per_class in zip(data[:3], (350, 50, 100), strict=True):
        assert torch.bincount(split.labels).tolist() == [per_class] * 10
        assert split.images.shape[1:] == (1, 28, 28)
        assert split.images.dtype == torch.float32
        assert 0 == split.images.min() < split.images.max() == 1
    every = torch.cat([split.images.flatten(1) for split in data[:3]])
    original = np.unique(im.read_sample()[0].reshape(5000, -1), axis=0)
    assert np.array_equal(np.unique((every * 255).round().byte().numpy(), axis=0), original)
    train, val, test = ({x.numpy().tobytes() for x in split.images} for split in data[:3])
    assert not train & val | train & test | val & test
    again, other = (im.load_images("sample", seed) for seed in (3, 4))
    assert again.digest == data.digest != other.digest
    assert torch.equal(again.train.images, data.train.images)
    assert not torch.equal(other.train.labels, data.train.labels)


@pytest.mark.parametrize("change", [None, lambda s: s[:-1], lambda s: s[:99] + b"?" + s[100:]])
def test_the_sample_must_be_as_delivered(tmp_path, monkeypatch, change):
    stored = im.SAMPLE_FILE.read_bytes()
    monkeypatch.setattr(im, "SAMPLE_FILE", tmp_path / "mnist_5k.npz")
    if change:
        im.SAMPLE_FILE.write_bytes(change(stored))
    with pytest.raises(InputError, match=r"mnist_5k\.npz is missing or damaged"):
        im.load_images("sample")


def replace_torchvision(monkeypatch, download) -> None:
    datasets = types.SimpleNamespace(MNIST=download)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets if download else None)


def unreachable(root, download):
    raise RuntimeError("no mirror\nanswered")


@pytest.mark.parametrize(
    ("mnist", "reason"), [(unreachable, "no mirror answered"), (None, "import of torchvision")]
)
def test_without_a_download_the_sample_is_used(tmp_path, monkeypatch, capsys, mnist, reason):
    replace_torchvision(monkeypatch, mnist)
    monkeypatch.setattr(im, "DOWNLOADS", str(tmp_path))
    assert "sample" in im.load_images("auto").source
    (line,) = capsys.readouterr().out.splitlines()
    assert reason in line
    assert "--data DIR" in line
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_found_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(im, "DOWNLOADS", str(tmp_path / "data"))
    replace_torchvision(monkeypatch, lambda root, download: write_set(Path(root, "MNIST", "raw")))
    assert "150 images" in im.load_images("auto").source
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    replace_torchvision(monkeypatch, None)  # the second time nothing is downloaded
    assert "150 images" in im.load_images("auto").source


# --- Digests and batches --------------------------------------------------------------------------


def test_batches_of_a_split_are_its_images_in_order():
    split = im.Split(torch.rand(12, 1, 3, 3), torch.arange(12))
    batches = list(im.TensorLoader(split, 5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert len(im.TensorLoader(split, 5)) == 3
    assert torch.equal(torch.cat([images for images, _ in batches]), split.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


def test_digests_depend_on_values_shapes_and_dtypes():
    x = torch.arange(6.0)
    others = (x.reshape(2, 3), x.double(), x + 1)
    assert im.digest_of([x]) == im.digest_of([x.clone().requires_grad_()])
    assert len({im.digest_of([x]), *(im.digest_of([other]) for other in others)}) == 4


# --- Pictures -------------------------------------------------------------------------------------


def test_ink_of_any_images():
    digits = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).reshape(1, 1, 2, 2)
    assert torch.equal(im.as_ink(digits), digits)
    assert torch.equal(im.as_ink(digits[:, 0]), digits)
    normalized = (digits - 0.13) / 0.31
    assert im.as_ink(normalized).numpy() == pytest.approx(digits.numpy(), abs=1e-6)
    photo = torch.tensor([0.2, 0.9, 0.5, 0.7]).reshape(1, 1, 2, 2)  # no blank ground
    assert torch.equal(im.as_ink(photo), 1 - photo)  # so that light stays light
    color = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    grey = 0.299 * color[:, :1] + 0.587 * color[:, 1:2] + 0.114 * color[:, 2:]
    assert im.as_ink(color).numpy() == pytest.approx(1 - grey.numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="C = 1 or 3"):
        im.as_ink(torch.zeros(2, 2, 4, 4))


def test_a_display_undoes_a_normalization():
    colors = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = torch.empty_like(colors)
    for c in range(3):
        normalized[:, c] = (colors[:, c] - mean[c]) / std[c]
    shown = im.Display(mean, std).pictures(normalized.double())
    assert shown.dtype == torch.float32
    assert shown.numpy() == pytest.approx(colors.numpy(), abs=1e-6)
    assert torch.equal(im.Display().pictures(colors), colors)
    assert im.Display().pictures(torch.tensor([[[-1.0, 0.25], [2.0, 1.0]]])).tolist() == [
        [[[0.0, 0.25], [1.0, 1.0]]]
    ]
    grey = im.Display((0.5,), (0.25,)).pictures(torch.tensor([[[[1.0, -1.0]]]]))
    assert grey.tolist() == [[[[0.75, 0.25]]]]
