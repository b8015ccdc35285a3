"""mnist_data.py: files on disk, whole and damaged, to three splits."""

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

import mnist_data as md
from mnist_data import DataError

SHAPES = {"train": (120, 9, 11), "t10k": (30, 9, 11)}  # of a small set of another size


def idx_bytes(array: np.ndarray) -> bytes:
    magic = 2048 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def small_arrays() -> dict[str, np.ndarray]:
    """Images and labels of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in SHAPES.items():
        arrays[f"{name}-images-idx3-ubyte"] = rng.integers(0, 256, shape, np.uint8)
        arrays[f"{name}-labels-idx1-ubyte"] = (np.arange(shape[0]) % 3).astype(np.uint8)
    return arrays


def write_set(folder: Path, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """The four files; every second one gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, array) in enumerate((arrays or small_arrays()).items()):
        content = idx_bytes(array)
        if n % 2:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("place", [".", "raw", "AnySet/raw"])
def test_a_set_of_another_size_is_read_wherever_it_lies(tmp_path, capsys, place):
    arrays = small_arrays()
    write_set(tmp_path / place, arrays)
    data = md.load_images(str(tmp_path), seed=2)
    assert [len(split.labels) for split in data[:3]] == [96, 24, 30]
    assert data.train.images.shape == (96, 1, 9, 11)
    assert data.classes == ("0", "1", "2")
    test = (data.test.images[:, 0] * 255).round().byte().numpy()
    assert np.array_equal(test, arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    learned = torch.cat([data.train.images, data.val.images])[:, 0].mul(255).round().byte().numpy()
    every = arrays["train-images-idx3-ubyte"]
    assert np.array_equal(np.unique(learned, axis=0), np.unique(every, axis=0))
    (line,) = capsys.readouterr().out.splitlines()
    assert "no set known by its digests" in line
    assert "150 images of 9 x 11 pixels in 3 classes" in line


def changed(name: str, change) -> dict[str, np.ndarray]:
    arrays = small_arrays()
    arrays[name] = change(arrays[name])
    return arrays


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-labels-idx1-ubyte", lambda a: a[:-1], "120 train images have 119 labels"),
        ("t10k-images-idx3-ubyte", lambda a: a[:, :8], r"\(9, 11\), test images \(8, 11\)"),
        ("train-images-idx3-ubyte", lambda a: a[:, :7], "images of 7 x 11 pixels; 8 to 64"),
        ("train-labels-idx1-ubyte", lambda a: 0 * a + 4, "all training labels are 4"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, change, message):
    write_set(tmp_path, changed(name, change))
    with pytest.raises(DataError, match=message):
        md.load_images(str(tmp_path))


def test_too_few_images_are_refused(tmp_path):
    write_set(tmp_path, {name: array[:19] for name, array in small_arrays().items()})
    with pytest.raises(DataError, match="19 train images are too few; 100 are needed"):
        md.load_images(str(tmp_path))


GOOD = idx_bytes(small_arrays()["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08", "ubyte is damaged: 3 bytes are too few"),
        (struct.pack(">I", 2049) + GOOD[4:], "ubyte is not what its name says: magic number 2049"),
        (GOOD[:-1], "ubyte is damaged: 11,895 bytes, 11,896 are announced"),
        (GOOD + b"\0", "ubyte is damaged: more bytes, 11,896 are announced"),
        (struct.pack(">4I", 2051, 2**31, 28, 28), "announces 2,147,483,648 entries"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files_are_named(tmp_path, content, message, packed):
    write_set(tmp_path)
    plain = tmp_path / "train-images-idx3-ubyte"
    plain.unlink()
    if packed:
        plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(content))
        message = message.replace("ubyte", r"ubyte\.gz")
    else:
        plain.write_bytes(content)
    with pytest.raises(DataError, match=message):
        md.load_images(str(tmp_path))


def test_a_gzip_that_unpacks_to_more_than_it_announces_is_not_unpacked(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.unlink()
    with gzip.open(f"{path}.gz", "wb", compresslevel=1) as file:
        file.write(GOOD)
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(DataError, match="more bytes"):
        md.load_images(str(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("cut", [3, 20, -4])
def test_a_damaged_gzip_is_named(tmp_path, cut):
    path = write_set(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"labels-idx1-ubyte\.gz is damaged"):
        md.load_images(str(tmp_path))


def test_some_files_without_the_others_is_an_error_not_a_fallback(tmp_path):
    (write_set(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="holds part of a set but neither t10k-labels-idx1-ubyte"):
        md.load_images(str(tmp_path))


def test_two_sets_in_one_folder_are_not_chosen_between(tmp_path):
    for name in ("A", "B"):
        write_set(tmp_path / name / "raw")
    with pytest.raises(DataError, match="holds several sets"):
        md.load_images(str(tmp_path))


@pytest.mark.parametrize("where", ["missing", "", " ", "empty"])
def test_a_named_folder_without_a_set_is_an_error(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    words = {"empty": "holds no images", "missing": "is no folder"}
    with pytest.raises(DataError, match=words.get(where, "'? ?'? is no folder")):
        md.load_images(where)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def digests_of(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    return tuple(hashlib.md5(idx_bytes(array)).hexdigest() for array in arrays.values())


def test_a_set_known_by_its_digests_brings_its_names(tmp_path, monkeypatch, capsys):
    known = md.KnownSet(("hat", "shoe", "bag"), plain=digests_of(small_arrays()))
    monkeypatch.setitem(md.KNOWN_SETS, "Small", known)
    data = md.load_images(str(write_set(tmp_path)))
    assert data.classes == ("hat", "shoe", "bag")
    assert data.source == "Small, full set of 150 images"
    assert capsys.readouterr().out == ""
    (tmp_path / "classes.txt").write_text("Hut\n Schuh \n\nTasche\nunused\n")
    assert md.load_images(str(tmp_path)).classes == ("Hut", "Schuh", "Tasche", "unused")


def test_a_set_known_by_its_packed_files(tmp_path, monkeypatch):
    packed = {}
    for name, array in small_arrays().items():
        packed[name] = gzip.compress(idx_bytes(array))
        (tmp_path / f"{name}.gz").write_bytes(packed[name])
    digests = tuple(hashlib.md5(content).hexdigest() for content in packed.values())
    known = md.KnownSet(("hat", "shoe", "bag"), packed=digests)
    monkeypatch.setitem(md.KNOWN_SETS, "Small", known)
    assert md.load_images(str(tmp_path)).classes == ("hat", "shoe", "bag")


def test_one_file_that_is_not_the_known_sets_own_is_refused(tmp_path, monkeypatch):
    known = md.KnownSet(("hat", "shoe", "bag"), plain=digests_of(small_arrays()))
    monkeypatch.setitem(md.KNOWN_SETS, "Small", known)
    write_set(tmp_path, changed("train-labels-idx1-ubyte", lambda a: a[::-1].copy()))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte differs from Small's own file"):
        md.load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb", "has 2 names, but labels run to 2"),
        (b"a\nb\na", "names 'a' twice"),
        (b"\xff\n", "is not UTF-8"),
        ("\n".join(map(str, range(257))).encode(), "has 257 names"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, content, message):
    (write_set(tmp_path) / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        md.load_images(str(tmp_path))


def test_sample_is_split_by_class_without_overlap():
    data = md.load_images("sample", seed=3)
    assert [len(split.labels) for split in data[:3]] == [3500, 500, 1000]
    for split, per_class in zip(data[:3], (350, 50, 100), strict=True):
        assert torch.bincount(split.labels).tolist() == [per_class] * 10
        assert split.images.shape[1:] == (1, 28, 28)
        assert split.images.dtype == torch.float32
        assert 0 == split.images.min() < split.images.max() == 1
    everything = torch.cat([split.images.flatten(1) for split in data[:3]])
    images, _ = md.read_sample()
    original = np.unique(images.reshape(5000, -1), axis=0)
    assert np.array_equal(np.unique((everything * 255).round().byte().numpy(), axis=0), original)
    assert "sample" in data.source


def test_the_seed_decides_the_split():
    a, b, c = (md.load_images("sample", seed) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.labels, c.train.labels)


@pytest.mark.parametrize("change", [lambda s: b"", lambda s: s[:-1], lambda s: flipped(s, 9_000)])
def test_a_sample_that_is_not_as_delivered_is_an_error(tmp_path, monkeypatch, change):
    stored = md.SAMPLE_FILE.read_bytes()
    monkeypatch.setattr(md, "SAMPLE_FILE", tmp_path / "mnist_5k.npz")
    md.SAMPLE_FILE.write_bytes(change(stored))
    with pytest.raises(DataError, match=r"mnist_5k\.npz is damaged: SHA-256"):
        md.load_images("sample")


def flipped(content: bytes, bit: int) -> bytes:
    changed_content = bytearray(content)
    changed_content[bit // 8] ^= 1 << bit % 8
    return bytes(changed_content)


def test_a_missing_sample_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "SAMPLE_FILE", tmp_path / "mnist_5k.npz")
    with pytest.raises(DataError, match=r"mnist_5k\.npz cannot be read \(No such file"):
        md.load_images("sample")


def fake_torchvision(monkeypatch, download) -> None:
    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST = download
    package = types.ModuleType("torchvision")
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_without_a_download_the_sample_is_used_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    def unreachable(root, download):
        raise RuntimeError("no mirror\nanswered")

    fake_torchvision(monkeypatch, unreachable)
    monkeypatch.setattr(md, "DOWNLOADS", str(tmp_path))
    data = md.load_images("auto")
    (line,) = capsys.readouterr().out.splitlines()
    assert "no mirror answered" in line
    assert "bundled 5,000 digits" in line
    assert "--data DIR" in line
    assert "sample" in data.source
    assert list(tmp_path.iterdir()) == []


def test_a_torchvision_that_cannot_be_imported_is_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(md, "DOWNLOADS", str(tmp_path / "new"))
    assert "sample" in md.load_images("auto").source
    assert "torchvision" in capsys.readouterr().out


def test_a_download_lands_where_the_next_run_looks(tmp_path, monkeypatch):
    def mirror(root, download):
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        write_set(raw)

    fake_torchvision(monkeypatch, mirror)
    monkeypatch.setattr(md, "DOWNLOADS", str(tmp_path / "data"))
    assert "150 images" in md.load_images("auto").source
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    monkeypatch.setitem(sys.modules, "torchvision", None)  # the second time nothing is fetched
    assert "150 images" in md.load_images("auto").source


def test_loader_gives_the_split_in_order_and_more_than_once():
    split = md.Split(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    loader = md.TensorLoader(split, batch_size=4)
    assert len(loader) == 3
    for _ in range(2):
        assert torch.cat([labels for _, labels in loader]).tolist() == list(range(10))


# --- Images of two splits -------------------------------------------------------------------------


def splits_with_common_images(shape: tuple[int, ...]) -> md.Data:
    """Two test images and a validation image are training images; a third test image is a
    validation image; others agree with a training image but for one pixel."""
    parts = []
    for seed, n in enumerate((40, 12, 15)):
        parts.append(torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)))
    train, val, test = parts
    test[3], test[14], val[11], test[0] = train[39], train[0], train[7], val[2]
    test[5], val[5] = train[5], train[5]
    test[5].view(-1)[0] += 1  # at the edge
    val[5].view(-1)[val[5].numel() // 2] += 1  # in the middle
    splits = [md.Split(part, torch.zeros(len(part))) for part in parts]
    return md.Data(*splits, classes=(), source="", digest="")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 3, 3)])
def test_images_of_two_splits_are_counted_and_told(shape, capsys):
    data = splits_with_common_images(shape)
    found = md.repeated_images(data)
    assert found == {("val", "train"): 1, ("test", "train"): 2, ("test", "val"): 1}
    md.tell_repeated(data, found)
    assert capsys.readouterr().out == (
        "1 of 12 validation images are also training images, 2 of 15 test images are also "
        "training images, 1 of 15 test images are also validation images: what is found on them "
        "is not found on unseen images\n"
    )


def test_of_splits_without_common_images_nothing_is_told(capsys):
    data = md.load_images("sample")
    found = md.repeated_images(data)
    md.tell_repeated(data, found)
    assert (found, capsys.readouterr().out) == ({}, "")
