"""mnist_data.py: files on disk, whole and damaged, to three splits."""

import gzip
import hashlib
import math
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import mnist_data as md
from mnist_data import DataError

SMALL = {"images": (2051, (3, 2, 2)), "labels": (2049, (3,))}


def idx_bytes(name: str, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    expected_magic, expected_shape = SMALL[name]
    shape = shape or expected_shape
    content = bytes(range(math.prod(expected_shape)))
    return struct.pack(f">{1 + len(shape)}I", magic or expected_magic, *shape) + content


@pytest.fixture
def small_idx(monkeypatch):
    """IDX files of three tiny images instead of MNIST's."""
    table = {
        name: (magic, shape, hashlib.md5(idx_bytes(name)).hexdigest())
        for name, (magic, shape) in SMALL.items()
    }
    monkeypatch.setattr(md, "IDX_FILES", table)


@pytest.mark.usefixtures("small_idx")
def test_idx_files_are_read_plain_and_gzipped(tmp_path):
    (tmp_path / "images").write_bytes(idx_bytes("images"))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx_bytes("labels")))
    assert md.read_idx(tmp_path, "images").tolist() == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    assert md.read_idx(tmp_path, "labels").tolist() == [0, 1, 2]


@pytest.mark.usefixtures("small_idx")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x08", "images is damaged: 3 bytes are too few"),
        (
            idx_bytes("images", magic=2049),
            "images is not what its name says: magic number 2049, expected 2051",
        ),
        (
            idx_bytes("images", shape=(4, 2, 2)),
            r"images announces the shape \(4, 2, 2\), expected \(3, 2, 2\)",
        ),
        (idx_bytes("images")[:-1], "images is damaged: 27 bytes, expected 28"),
        (idx_bytes("images") + b"\0", "images is damaged: 29 bytes, expected 28"),
        (idx_bytes("images")[:-1] + b"\xff", "images differs from MNIST's own file: MD5"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(DataError, match=message):
        md.read_idx(tmp_path, "images")


@pytest.mark.usefixtures("small_idx")
@pytest.mark.parametrize("cut", [3, 20, -4])
def test_a_damaged_gzip_is_named(tmp_path, cut):
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx_bytes("images"))[:cut])
    with pytest.raises(DataError, match=r"images\.gz is damaged"):
        md.read_idx(tmp_path, "images")


@pytest.mark.usefixtures("small_idx")
def test_some_files_without_the_others_is_an_error_not_a_fallback(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "images").write_bytes(idx_bytes("images"))
    with pytest.raises(
        DataError, match=r"holds some of MNIST's files but neither labels nor labels\.gz"
    ):
        md.load_mnist(str(tmp_path))


def test_sample_is_split_by_class_without_overlap():
    data = md.load_mnist("sample", seed=3)
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
    a, b, c = (md.load_mnist("sample", seed) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.labels, c.train.labels)


@pytest.mark.parametrize("content", [b"not an archive", b""])
def test_a_damaged_sample_is_an_error(tmp_path, monkeypatch, content):
    monkeypatch.setattr(md, "SAMPLE_FILE", tmp_path / "mnist_5k.npz")
    md.SAMPLE_FILE.write_bytes(content)
    with pytest.raises(DataError, match=r"mnist_5k\.npz is damaged or missing"):
        md.load_mnist("sample")


def test_a_sample_of_the_wrong_size_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(md, "SAMPLE_FILE", tmp_path / "mnist_5k.npz")
    np.savez(md.SAMPLE_FILE, images=np.zeros((4, 28, 28), np.uint8), labels=np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"holds \(4, 28, 28\) images"):
        md.load_mnist("sample")


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
    data = md.load_mnist(str(tmp_path))
    (line,) = capsys.readouterr().out.splitlines()
    assert "no mirror answered" in line
    assert "bundled 5,000 digits" in line
    assert "--data DIR" in line
    assert "sample" in data.source
    assert list(tmp_path.iterdir()) == []


def test_a_torchvision_that_cannot_be_imported_is_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "sample" in md.load_mnist(str(tmp_path / "new")).source
    assert "torchvision" in capsys.readouterr().out


def test_a_download_lands_where_the_next_run_looks(tmp_path, monkeypatch):
    def mirror(root, download):
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / "images").write_bytes(b"1")

    fake_torchvision(monkeypatch, mirror)
    md.download_mnist(tmp_path / "data")
    assert (tmp_path / "data" / "MNIST" / "raw" / "images").read_bytes() == b"1"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_loader_gives_the_split_in_order_and_more_than_once():
    split = md.Split(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    loader = md.TensorLoader(split, batch_size=4)
    assert len(loader) == 3
    for _ in range(2):
        assert torch.cat([labels for _, labels in loader]).tolist() == list(range(10))
