"""The script as a person runs it: small runs on the bundled sample, and the bars on the full set."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import feature_analysis as fa
import MNIST_SAE_code as driver

ROOT = Path(driver.__file__).parent
SMALL = "--data sample --sae-latents 64 --target-actives 8 --features 3 --epochs-sae-final 1 --epochs-ffn 1".split()


def run_script(*flags: object, status: int = 0) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    command = [sys.executable, str(ROOT / "MNIST_SAE_code.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def files_of(folder: Path) -> dict[str, bytes]:
    """Name and content of every file, the timings taken out."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    records = json.loads(contents["summary.json"])
    for record in records:
        del record["seconds"]
        record["diagnoses"] = [d for d in record["diagnoses"] if d["complaint"] != "slow analysis"]
    contents["summary.json"] = json.dumps(records).encode()
    return contents


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished small run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_script(*SMALL, "--out", folder)


def test_a_run_says_what_it_used_and_where_to_look(first):
    folder, done = first
    assert done.stderr == ""  # no progress bars where nobody watches
    assert "data: bundled sample of 5,000 MNIST training digits; 3,500 / 500 / 1,000" in done.stdout
    for line in ("mean active", "label histogram", "boosts class", "top examples", "dead latents", "whole run"):
        assert line in done.stdout
    for path in re.findall(r"\S+\.(?:png|json)", done.stdout):
        assert Path(path).exists(), path
    assert str(folder / "summary.json") in done.stdout


def test_summary_has_what_it_promises(first):
    (record,) = json.loads((first[0] / "summary.json").read_text())
    promised = """target_actives achieved_actives_before_shift achieved_actives_val achieved_actives_test lambda
    threshold_shift baseline_acc recon_acc_jumprelu recon_acc_boolean recon_acc_boolean_scaled delta_acc_jumprelu
    agreement_jumprelu fvu ce_recovered kl dead_features dense_features sae_latents normalize_z seed data device
    versions seconds""".split()
    assert set(promised) <= set(record)
    assert record["target_actives"] == 8
    assert record["achieved_actives_val"] == pytest.approx(8, abs=2 / 500)
    assert record["delta_acc_jumprelu"] == pytest.approx(record["baseline_acc"] - record["recon_acc_jumprelu"])
    assert 0.8 < record["baseline_acc"] <= 1
    assert 0 < record["fvu"] < 1
    assert record["lambda"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert {"imports", "data", "classifier", "sae", "bank", "effects", "pictures", "whole run"} <= set(
        record["seconds"]
    )
    assert len(record["diagnoses"]) == 5


def test_course_of_lambda_is_recorded(first):
    stage = driver.read_stage(first[0], "sae").record
    course = stage["course"]
    assert len(course["step"]) == len(course["l0"]) == len(course["l0_coefficient"]) >= 50
    assert course["l0_coefficient"][-1] == pytest.approx(stage["lambda"])
    assert course["l0"][0] > 2 * 8 > course["l0"][-1]


def test_report_is_a_table_sorted_by_rate(first):
    folder = first[0]
    frame = pd.read_json(folder / "feature_report.json")
    promised = """feature mean_active label_histogram label_mode_when_active top_examples top_scores logit_boost_class
    logit_delta_vector ablation_delta_vector nearest_feature nearest_cosine""".split()
    assert set(promised) <= set(frame.columns)
    assert len(frame) == 3
    assert frame.mean_active.is_monotonic_decreasing
    for k in frame.feature:
        for name in ("gallery.png", "pattern.png", "pattern.npy"):
            assert (folder / f"feature_{k}_{name}").stat().st_size > 500
        assert np.load(folder / f"feature_{k}_pattern.npy").shape == (28, 28)
    assert len(list(folder.glob("feature_*_gallery.png"))) == 3


def test_report_agrees_with_the_saved_weights(first):
    """The numbers of the report from the checkpoint, by other means."""
    run = driver.load_run(str(first[0]))
    record = json.loads((first[0] / "feature_report.json").read_text())[0]
    k, images, labels = record["feature"], run.data.val.images, run.data.val.labels
    raw = run.model.preactivations(images)
    acts = run.sae.encode((raw - run.mu) / run.std)[:, k]
    active = acts > 0
    assert record["mean_active"] == pytest.approx(active.double().mean().item())
    assert record["label_histogram"] == torch.bincount(labels[active], minlength=10).tolist()
    assert record["top_examples"] == torch.sort(acts, descending=True, stable=True).indices[:20].tolist()
    direction = run.sae.W_dec[k] * run.std
    logits = run.model.logits_from_preactivations
    added = (logits(raw + direction) - logits(raw)).mean(0)
    assert record["logit_delta_vector"] == pytest.approx(added.tolist(), abs=1e-4)
    removed = (logits(raw[active] - acts[active, None] * direction) - logits(raw[active])).mean(0)
    assert record["ablation_delta_vector"] == pytest.approx(removed.tolist(), abs=1e-4)
    heat = ((run.sae.W_enc[:, k] / run.std) @ run.model.hidden.weight).reshape(28, 28)
    assert np.load(first[0] / f"feature_{k}_pattern.npy") == pytest.approx(heat.numpy(), abs=1e-5)


def test_the_second_run_reuses_and_the_fresh_one_agrees_byte_for_byte(first, tmp_path):
    folder, _ = first
    before = files_of(folder)
    again = run_script(*SMALL, "--out", folder)
    assert "classifier: reused" in again.stdout
    assert "sae: reused" in again.stdout
    assert files_of(folder) == before
    fresh = run_script(*SMALL, "--out", folder, "--fresh")
    assert "reused" not in fresh.stdout
    assert files_of(folder) == before


def test_other_settings_and_damage_retrain_only_what_they_concern(first, tmp_path):
    folder = tmp_path / "copy"
    run_script(*SMALL, "--out", folder)
    pictures = set(folder.glob("feature_*_gallery.png"))
    other = run_script(*SMALL, "--out", folder, "--epochs-sae-final", 2, "--features", 2)
    assert "classifier: reused" in other.stdout
    assert "sae: retrained, because it belongs to other settings, data or code; the old one is kept" in other.stdout
    assert driver.read_stage(folder, "sae.kept-1").record["settings"]["epochs_sae_final"] == 1
    assert len(list(folder.glob("feature_*_gallery.png"))) == 2 != len(pictures)  # none left of the other SAE
    path = folder / "classifier.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    mended = run_script(*SMALL, "--out", folder)
    assert "classifier: retrained, because classifier.safetensors" in mended.stdout
    assert (folder / "classifier.kept-1.safetensors").stat().st_size == 1000


def test_several_targets_without_standardisation(tmp_path):
    flags = [*SMALL, "--target-actives", 4, 12, "--no-normalize-z", "--out", tmp_path]
    done = run_script(*flags)
    records = json.loads((tmp_path / "summary.json").read_text())
    assert [record["target_actives"] for record in records] == [4, 12]
    assert records[0]["fvu"] > records[1]["fvu"]
    assert not any(record["normalize_z"] for record in records)
    assert (tmp_path / "frontier.png").exists()
    for target in (4, 12):
        assert (tmp_path / f"target_{target}" / "feature_report.json").exists()
    assert str(tmp_path / "frontier.png") in done.stdout
    run = driver.load_run(str(tmp_path), target=12)
    assert torch.equal(run.mu, torch.zeros(128))
    with pytest.raises(driver.InputError, match=r"targets \[4, 12\], not None"):
        driver.load_run(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-actives", 600], "error: --target-actives 600 must be positive and below --sae-latents 512"),
        (["--device", "warp"], "error: --device warp is unknown"),
        (["--nonsense"], "error: unrecognized arguments: --nonsense"),
        (["--out", ROOT / "README.md"], "README.md cannot be written to"),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(flags, message):
    done = run_script(*flags, status=2)
    (line,) = done.stderr.splitlines()
    assert message in line
    assert done.stdout == ""


def test_divergence_is_one_line_and_loses_nothing(tmp_path):
    done = run_script(*SMALL, "--lr-sae", "1e38", "--out", tmp_path, status=2)
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: SAE training for 8 actives diverged: .* at step \d+; lower --lr-sae \(now 1e\+38\)", line
    )
    assert driver.read_stage(tmp_path, "classifier").tensors["head.bias"].shape == (10,)


def readme_block(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def test_the_notebook_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "artifacts_mnist_sae"
    run_script(*SMALL, "--sae-latents", 128, "--out", folder)
    monkeypatch.chdir(tmp_path)
    block = readme_block("load_run")
    assert len(block.strip().splitlines()) <= 12
    scope: dict = {}
    exec(block, scope)
    assert isinstance(scope["bank"], fa.FeatureBank)
    assert scope["heat"].shape == (28, 28)
    assert scope["delta"].shape == (10,)


def test_load_run_refuses_other_digits(first, tmp_path):
    described = json.loads((first[0] / "settings.json").read_text())
    described["data_digest"] = "another"
    for path in first[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "settings.json").write_text(json.dumps(described))
    with pytest.raises(driver.InputError, match="was made with: bundled sample"):
        driver.load_run(str(tmp_path))


# --- The full set -----------------------------------------------------------------------------------------------------

needs_mnist = pytest.mark.skipif(
    "MNIST_DATA" not in os.environ, reason="MNIST_DATA does not name the full set's folder"
)


def trained(seed: int, target: int, cache: dict) -> dict:
    """The record of one target with the default settings."""
    settings = driver.Settings(seed=seed, target_actives=(target,))
    if seed not in cache:
        data = driver.load_mnist(os.environ["MNIST_DATA"], seed)
        model = driver.train_classifier(data.train, settings)
        cache[seed] = data, model, driver.collect_preactivations(model, data, settings.normalize_z)
    data, model, pre = cache[seed]
    head = driver.standardised_head(model, pre)
    before, _ = driver.train_sae((pre.train - pre.mu) / pre.std, head, target, settings)
    after, _ = driver.adjust_thresholds(before, (pre.val - pre.mu) / pre.std, target)
    return driver.measure(before, after, pre, data, head)


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.mark.full
@needs_mnist
def test_full_set_is_mnist():
    data = driver.load_mnist(os.environ["MNIST_DATA"])
    assert [len(split.labels) for split in data[:3]] == [48_000, 12_000, 10_000]
    assert torch.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    every = torch.bincount(torch.cat([data.train.labels, data.val.labels]))
    assert every.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    images, _ = driver.read_sample()  # the sample's digits are training images of the full set
    training = {row.tobytes() for split in data[:2] for row in (split.images * 255).round().byte().flatten(1).numpy()}
    assert all(row.tobytes() in training for row in images.reshape(5000, -1))


@pytest.mark.full
@needs_mnist
@pytest.mark.parametrize(("target", "most_dead"), [(5, 0.15), (10, 0.15), (20, 0.05), (40, 0.05), (80, 0.05)])
def test_calibration_at_every_target(cache, target, most_dead):
    record = trained(0, target, cache)
    assert record["achieved_actives_before_shift"] == pytest.approx(target, rel=0.03)
    assert record["achieved_actives_val"] == pytest.approx(target, abs=1 / 12_000)
    assert record["achieved_actives_test"] == pytest.approx(target, rel=0.015)
    assert record["dead_features"] <= most_dead * 512


@pytest.fixture(scope="module")
def three_seeds(cache):
    """The records at target 20 for the seeds 0, 1 and 2."""
    return [trained(seed, 20, cache) for seed in range(3)]


def mean_of(records: list[dict], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


@pytest.mark.full
@needs_mnist
def test_fidelity_at_target_20_over_three_seeds(three_seeds):
    assert mean_of(three_seeds, "baseline_acc") >= 0.965
    assert mean_of(three_seeds, "agreement_jumprelu") >= 0.994
    assert mean_of(three_seeds, "fvu") <= 0.011
    assert all(record["dead_features"] <= 0.05 * 512 for record in three_seeds)


@pytest.mark.full
@needs_mnist
def test_accuracy_lost_at_target_20_over_three_seeds(three_seeds):
    """One of the 10,000 test images is 0.01 points, and single seeds differ by 0.1."""
    assert mean_of(three_seeds, "delta_acc_jumprelu") <= 0.0010
