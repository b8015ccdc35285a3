"""Sweeps, in one process, in several and on several ranks, and images of another size."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_end_to_end import ROOT, SMALL, files_of, run_script
from test_mnist_data import write_set

import feature_analysis as fa
import MNIST_SAE_code as driver
from MNIST_SAE_code import InputError

SWEEP = [*SMALL, "--seeds", "0", "1", "--sae-latents", "32", "48", "--target-actives", "4", "8"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run_ranks(*flags: object) -> subprocess.CompletedProcess:
    """The script on two ranks of this machine."""
    script = str(ROOT / "MNIST_SAE_code.py")
    command = [*TORCHRUN, "--standalone", script, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def swept_files(folder) -> dict[str, bytes]:
    """Name and content of every file, the timings taken out."""
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                content = re.sub(rb', "seconds": [\d.]+', b"", content)
            contents[str(path.relative_to(folder))] = content
    return contents


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_script(*SWEEP, "--workers", 0, "--out", folder)


def test_every_combination_is_trained_once(swept):
    folder, done = swept
    records = json.loads((folder / "sweep.json").read_text())
    of = [(r["seed"], r["sae_latents"], r["target_actives"]) for r in records]
    assert of == [(s, n, t) for s in (0, 1) for n in (32, 48) for t in (4, 8)]
    for seed, latents, target in of:
        place = folder / f"seed_{seed}_latents_{latents}_target_{target}"
        stage = driver.read_stage(place, "sae")
        assert stage.tensors["W_enc"].shape == (128, latents)
        assert stage.record["settings"]["seed"] == seed
        assert json.loads((place / "combination.json").read_text())["target_actives"] == target
    for r in records:
        assert r["achieved_actives_val"] == pytest.approx(r["target_actives"], abs=2 / 500)
    assert (folder / "sweep.png").stat().st_size > 5000
    (row,) = (line for line in done.stdout.splitlines() if line.split()[:2] == ["48", "8"])
    fvu = [r["fvu"] for r in records if (r["sae_latents"], r["target_actives"]) == (48, 8)]
    mean, spread = sum(fvu) / 2, abs(fvu[0] - fvu[1]) / math.sqrt(2)
    assert f"{mean:.4f} ± {spread:.4f}" in row


def test_processes_and_ranks_change_nothing(swept, tmp_path):
    expected = swept_files(swept[0])
    run_script(*SWEEP, "--workers", 2, "--out", tmp_path / "workers")
    assert swept_files(tmp_path / "workers") == expected
    done = run_ranks(*SWEEP, "--workers", 0, "--out", tmp_path / "ranks")
    assert done.returncode == 0, done.stderr
    assert swept_files(tmp_path / "ranks") == expected
    assert done.stdout.count("over 2 seeds") == 1  # the first rank speaks for all


def test_what_a_dead_rank_finished_is_used_again(swept, tmp_path):
    """A folder in which half of the combinations are missing, as after a rank died."""
    kept = tmp_path / "half"
    for name, content in swept_files(swept[0]).items():
        if "seed_1" not in name and not name.startswith("sweep"):
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("sae.safetensors")}
    run_script(*SWEEP, "--workers", 0, "--out", kept)
    assert swept_files(kept) == swept_files(swept[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_combination_can_be_explained(swept):
    place = swept[0] / "seed_1_latents_48_target_8"
    flags = ["--seed", 1, "--sae-latents", 48, "--target-actives", 8, "--out", place]
    done = run_script(*SMALL, *flags)
    assert "sae: reused" in done.stdout
    assert (place / "feature_report.html").exists()


def test_two_ranks_make_the_same_run(tmp_path):
    run_script(*SMALL, "--out", tmp_path / "one")
    done = run_ranks(*SMALL, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    del one["settings.json"], two["settings.json"]  # which name the folder
    assert one == two


def test_an_error_of_ranks_is_told(tmp_path):
    done = run_ranks(*SMALL, "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "error: --data" in done.stderr


def test_shares_of_images_make_the_bank_of_all():
    data = driver.load_images("sample")
    sae = driver.JumpReLUSAE(16, 24).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.copy_(torch.randn(16, 24, generator=generator))
    model = driver.new_classifier((784, 16, 10), 0, torch.device("cpu")).requires_grad_(False)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(16), torch.ones(16))
    data = data._replace(val=data.train)  # of two batches
    settings = driver.Settings(topk=30)
    whole = driver.shared_bank(layer, data, settings)
    parts = [driver.share_of_bank(layer, data, settings, driver.Rank(n, 3)) for n in range(3)]
    assert [part is None for part in parts].count(False) == 2
    first, second = (part for part in parts if part is not None)
    merged = fa.merge_feature_banks(first, second)
    for a, b in ((merged, whole), (fa.merge_feature_banks(second, first), whole)):
        assert torch.equal(a.label_histogram, b.label_histogram)
        assert torch.equal(a.activation_sum, b.activation_sum)
        assert torch.equal(a.top.index, b.top.index)
    acts = layer.feature_acts(data.val.images).double().sum(0)
    assert whole.activation_sum.numpy() == pytest.approx(acts.numpy(), rel=1e-6)


@pytest.mark.parametrize(
    "flags", ["--seeds", "--seeds 1 1", "--sae-latents 64 64", "--sae-latents"]
)
def test_sweeps_that_name_nothing_or_a_value_twice(flags):
    with pytest.raises(InputError, match="must name at least one value, each once"):
        driver.parse_runs(flags.split())


def test_images_of_another_size_go_all_the_way(tmp_path):
    """Bars of light on 12 x 10 pixels, three classes with names."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, n in (("train", 400), ("t10k", 120)):
        labels = (np.arange(n) % 3).astype(np.uint8)
        images = rng.integers(0, 60, (n, 12, 10)).astype(np.uint8)
        images[np.arange(n), 3 * labels + 1] = 250
        arrays[f"{name}-images-idx3-ubyte"] = images
        arrays[f"{name}-labels-idx1-ubyte"] = labels
    folder = write_set(tmp_path / "bars", arrays)
    (folder / "classes.txt").write_text("high\nmiddle\nlow\n")
    flags = """--sae-latents 16 --target-actives 3 --hidden-units 12 --epochs-sae-final 1
    --epochs-ffn 1 --stability-seeds 0""".split()
    done = run_script(*flags, "--data", folder, "--out", tmp_path / "out")
    assert "no set known by its digests" in done.stdout
    (summary,) = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["baseline_acc"] > 0.95
    report = json.loads((tmp_path / "out" / "feature_report.json").read_text())
    for k in (record["feature"] for record in report[:3]):
        assert np.load(tmp_path / "out" / f"feature_{k}_pattern.npy").shape == (12, 10)
    assert {len(record["label_histogram"]) for record in report} == {3}
    assert "label histogram" in done.stdout
    assert any(f"{name}: " in done.stdout for name in ("high", "middle", "low"))
    run = driver.load_run(str(tmp_path / "out"))
    assert run.data.classes == ("high", "middle", "low")
