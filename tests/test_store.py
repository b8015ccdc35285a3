"""Activations in memory and in files: saexplain.store."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_networks import ResNet, ViT, marked_images, trained

import MNIST_SAE_code as driver
from saexplain import images as images_module
from saexplain import store as store_module
from saexplain.files import InputError
from saexplain.rows import TrainingRows, mean_and_std
from saexplain.store import FileStore, MemoryStore, open_store

ROOT = Path(driver.__file__).parent
SHAPE = (50, 3, 4)
INPUTS = {"layer": "block", "seed": 0}


def values() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def fill(store, raw: torch.Tensor, stop: int = 50, batch: int = 7) -> None:
    for start in range(store.done, stop, batch):
        end = min(start + batch, stop)
        store[start:end] = raw[start:end]


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(store_module, "available_memory", lambda device: 100)
    monkeypatch.setattr(store_module, "RECORD_SECONDS", 0.0)


@pytest.mark.parametrize(("available", "kind"), [(9600, MemoryStore), (9599, FileStore)])
def test_a_quarter_of_the_available_memory_decides(available, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "available_memory", lambda device: available)
    store, raw = open_store(SHAPE, tmp_path / "train", INPUTS), values()  # 4 * 600 bytes
    assert type(store) is kind
    fill(store, raw)
    expected = raw if kind is MemoryStore else raw.half()
    assert store.raw.dtype == expected.dtype
    assert torch.equal(store.raw, expected)
    assert (tmp_path / "train").exists() == (kind is FileStore)


def test_a_file_says_its_size_and_the_space(no_memory, tmp_path, capsys):
    open_store((1_000_000, 8, 384), tmp_path, INPUTS)
    line = capsys.readouterr().out
    assert line.startswith("1,000,000 x 8 x 384 activations in 16 bits, 6.14 GB, go to ")
    assert "free)" in line


def test_a_full_disk_is_noticed_before_anything_is_written(no_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1199))
    with pytest.raises(InputError, match=r"16 bits, 0\.00 MB, do not fit .* has 0\.00 MB free"):
        open_store(SHAPE, tmp_path, INPUTS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1200))
    open_store(SHAPE, tmp_path, INPUTS)


@pytest.mark.parametrize("value", [65520.0, -7e4, float("inf"), float("nan")])
def test_what_16_bits_cannot_store_is_named(value, no_memory, tmp_path):
    store, raw = open_store(SHAPE, tmp_path, INPUTS), values()
    raw[3, 1, 2] = 65504.0  # the largest that they can
    store[:7] = raw[:7]
    raw[9, 2, 1] = value
    with pytest.raises(
        InputError, match=rf"at most 65,504 .* got {abs(value):,.6g} in images 7 to"
    ):
        store[7:14] = raw[7:14]
    assert store.done == 7


def test_a_channel_that_16_bits_make_noisy_is_named(no_memory, tmp_path, capsys):
    """About 100 the numbers of 16 bits are 1/16 apart: the variance of rounding is its square by
    12, here 13% of .05 squared."""
    raw = torch.randn(4000, 3, 4, generator=torch.Generator().manual_seed(1))
    raw[..., 0] = 100.03  # never varies
    store = open_store(raw.shape, tmp_path / "even", INPUTS)
    store[:4000] = raw
    assert "warning" not in capsys.readouterr().out
    raw[..., 2] = 100 + 0.05 * raw[..., 2]
    store = open_store(raw.shape, tmp_path / "uneven", INPUTS)
    store[:3000] = raw[:3000]
    store[3000:] = raw[3000:]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "warning" in line)
    words = r"noise of (\d+\.\d)% .* to channel 2 \(mean 100, .* 0\.0\d+\), .* to 1 of 4;"
    assert float(re.search(words, line)[1]) == pytest.approx(100 / 16**2 / 12 / 0.05**2, abs=1)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_images_are_stored_in_order_and_completely(kind, tmp_path):
    is_file, raw = kind == "file", values()
    store = FileStore(SHAPE, tmp_path, INPUTS) if is_file else MemoryStore(SHAPE, raw.device)
    store[:7] = raw[:7]
    for place, given in ((slice(14, 21), raw[14:21]), (slice(7, 14), raw[7:13])):
        with pytest.raises(ValueError, match="in order: expected"):
            store[place] = given
    with pytest.raises(ValueError, match="7 of 50 images are stored"):
        store.raw  # noqa: B018


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_store as t
t.store_module.RECORD_SECONDS = 0.0
store = t.FileStore(t.SHAPE, t.Path({folder!r}), t.INPUTS)
t.fill(store, t.values(), 21)
store._file.seek(21 * 24)
store._file.write(b"half of a batch")
store._file.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_after_a_kill_a_file_goes_on_where_it_stopped(no_memory, tmp_path, capsys):
    given = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", KILLED.format(**given)])
    assert killed.returncode == -9
    store, raw = open_store(SHAPE, tmp_path, INPUTS), values()
    assert store.done == 21
    assert "free, 21 images are there)" in capsys.readouterr().out
    fill(store, raw)
    assert torch.equal(store.raw, raw.half())
    again = open_store(SHAPE, tmp_path, INPUTS)
    assert again.done == 50
    assert torch.equal(again.raw, raw.half())


@pytest.mark.parametrize("change", ["inputs", "shape", "damage", "no record", "short"])
def test_a_file_of_anything_else_is_made_anew(change, no_memory, tmp_path):
    shape, inputs = SHAPE, INPUTS
    fill(FileStore(SHAPE, tmp_path, INPUTS), values())
    record = tmp_path / store_module.PROGRESS
    if change == "inputs":
        inputs = {**INPUTS, "seed": 1}
    elif change == "shape":
        shape = (50, 4, 3)  # as many numbers
    elif change == "damage":
        record.write_bytes(b"{")
    elif change == "no record":
        record.unlink()
    else:
        os.truncate(tmp_path / store_module.VALUES, 50 * 24 - 1)
    store = open_store(shape, tmp_path, inputs)
    assert store.done == 0
    fill(store, torch.ones(shape))
    assert torch.equal(store.raw, torch.ones(shape).half())
    assert json.loads(record.read_bytes())["inputs"] == {**inputs, "shape": list(shape)}


def test_a_record_does_not_outlive_its_values(no_memory, tmp_path, monkeypatch):
    fill(open_store(SHAPE, tmp_path, INPUTS), values())
    monkeypatch.setattr(store_module, "RECORD_SECONDS", 3600.0)
    fill(open_store(SHAPE, tmp_path, {**INPUTS, "seed": 1}), values() + 1, 49)  # not recorded
    assert open_store(SHAPE, tmp_path, INPUTS).done == 0


def test_a_record_is_written_only_now_and_then_and_at_the_end(no_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "RECORD_SECONDS", 3600.0)
    store = open_store(SHAPE, tmp_path, INPUTS)
    fill(store, values(), 21)
    assert not (tmp_path / store_module.PROGRESS).exists()
    fill(store, values())
    assert json.loads((tmp_path / store_module.PROGRESS).read_bytes())["done"] == 50


def test_saes_are_trained_on_a_file_as_in_memory(no_memory, tmp_path):
    rng = torch.Generator().manual_seed(2)
    raw = (torch.rand(500, 3, 8, generator=rng) * 4 - 1).relu()
    store = open_store(raw.shape, tmp_path, INPUTS)
    store[:500] = raw
    settings = driver.Settings(
        target_actives=(3,), sae_latents=16, batch_sae=500, epochs_sae_final=1, lr_sae=1e-3
    )
    fvu = []
    for given in (raw, store.raw):
        rows = TrainingRows(given, *mean_and_std(given))
        assert rows.is_mapped == (given is not raw)
        sae, _ = driver.train_sae(rows, None, 3, settings)
        z = torch.cat([*rows.split(100)])
        fvu.append(((z - sae(z)).square().sum() / z.square().sum()).item())
    assert fvu[1] == pytest.approx(fvu[0], rel=0.02)
    assert fvu[0] < 0.8


class StoppedError(Exception):
    """Ends a run in the middle."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "branch"])
def test_a_run_with_its_activations_in_files_is_that_in_memory(kind, tmp_path, monkeypatch, capsys):
    """It is stopped while it reads, and goes on from there."""
    images, labels, _ = marked_images(240, 1)
    splits = [
        (images[part], labels[part]) for part in (slice(120), slice(120, 180), slice(180, 240))
    ]
    net, name = (ResNet, "layer2") if kind == "stream" else (ViT, "blocks.1.mlp")
    net = trained(net, 20)
    given = dict(target=3, sae_latents=24, epochs_sae_final=1, lr_sae=2e-3, stability_seeds=0)
    given |= dict(hypotheses=False, features=1, batch_sae=120)
    in_memory = driver.explain(net, name, *splits, out=str(tmp_path / "memory"), **given)
    monkeypatch.setattr(store_module, "available_memory", lambda device: 0)
    monkeypatch.setattr(store_module, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(images_module, "PIXELS_AT_ONCE", 50 * images[0].numel())  # a batch
    usual = FileStore._write

    def stop(self, start: int, raw: torch.Tensor) -> None:
        if start >= 100:
            raise StoppedError
        usual(self, start, raw)

    with monkeypatch.context() as patched:
        patched.setattr(FileStore, "_write", stop)
        with pytest.raises(StoppedError):
            driver.explain(net, name, *splits, out=str(tmp_path / "file"), **given)
    capsys.readouterr()
    in_files = driver.explain(net, name, *splits, out=str(tmp_path / "file"), **given)
    printed = capsys.readouterr().out
    assert "100 images are there)" in printed
    assert printed.count("activations in 16 bits") == 3
    assert not torch.equal(in_files.layer.mu, in_memory.layer.mu)  # of rounded numbers
    torch.testing.assert_close(in_files.layer.mu, in_memory.layer.mu, atol=1e-3, rtol=1e-3)
    found, expected = (
        json.loads((run.folder / "summary.json").read_bytes())[0] for run in (in_files, in_memory)
    )
    assert found["baseline_acc"] == expected["baseline_acc"]
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=0.05)
    assert found["fvu_pca"] == pytest.approx(expected["fvu_pca"], rel=1e-3)
