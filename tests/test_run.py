"""The script from its flags to a finished folder, and runs that are loaded again."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import BARE, TINY, contents_of, files_of

import MNIST_SAE_code as driver
from saexplain.files import STAGING, BusyError, InputError, read_json
from saexplain.parallel import WorkerError

# --- What a run writes ----------------------------------------------------------------------------

FILES = """settings.json FILES.md summary.json feature_report.json feature_report.html
hypotheses.json hypotheses.md explained.png influence.png training.png run.log.jsonl
classifier.json sae.json stability_seed_1/sae.json frozen_decoder/sae.json saelens/cfg.json
saelens/sae_weights.safetensors saelens/README.md""".split()
SUMMARY = """threshold_shift recon_acc_boolean recon_acc_boolean_scaled agreement_jumprelu kl
ce_recovered dense_features sae_latents normalize_z seed data device seconds agreement_hypotheses
f1_mean f1_by_influence""".split()
REPORT = """mean_active label_histogram top_examples top_scores logit_delta_vector caption evidence
ablation_delta_vector nearest_feature hypothesis confidence replicated f1 measured counterparts mark
pattern_correlation""".split()


@pytest.fixture(scope="module")
def record(finished) -> dict:
    (found,) = read_json(finished / "summary.json")
    return found


@pytest.fixture(scope="module")
def report(finished) -> pd.DataFrame:
    return pd.read_json(finished / "feature_report.json")


def test_a_run_has_its_files_and_pictures_of_every_feature(finished, record, report):
    for name in FILES:
        assert (finished / name).stat().st_size > 100, name
    for k in report.feature:
        for name in ("gallery.png", "pattern.png", "pattern.npy"):
            assert (finished / f"feature_{k}_{name}").exists()
    assert len(list(finished.glob("feature_*_panel.png"))) == len(record["top_features"]) == 5


def test_the_summary_is_consistent(record):
    assert set(SUMMARY) <= set(record)
    assert record["target_actives"] == 4
    assert record["achieved_actives_val"] == pytest.approx(4, abs=2 / 500)
    assert record["achieved_actives_test"] == pytest.approx(4, rel=0.1)
    lost = record["baseline_acc"] - record["recon_acc_jumprelu"]
    assert record["delta_acc_jumprelu"] == pytest.approx(lost)
    assert 0.8 < record["baseline_acc"] <= 1
    assert 0 < record["fvu"] < 1


def test_summaries_of_sets_of_features_add_up(record):
    found = record["hypotheses"]["summaries"]
    baselines = ["untrained SAE", "random directions", "neurons", "frozen decoder"]
    assert list(found) == ["SAE", *baselines]
    own = found["SAE"]
    assert own["features"] + own["too_rare"] == 32
    assert [found[name]["features"] + found[name]["too_rare"] for name in baselines] == [32] * 4
    assert sum(band["features"] for band in own["bands"]) == own["features"]
    confidence = own["confidence"]
    total = sum(confidence[name]["hypotheses"] for name in ("High", "Medium", "Low"))
    assert total == confidence["all"]["hypotheses"] == own["features"] > 10
    for name in ("agreement_hypotheses", "f1_mean", "f1_by_influence"):
        assert record[name] == own[name] > 0.5
    assert record["hypotheses"]["agreement_swapped"] < own["agreement_hypotheses"] - 0.2


def test_the_report_is_a_table_sorted_by_influence_which_sums_to_one(report, record):
    assert set(REPORT) <= set(report.columns)
    assert record["hypotheses_sha256"] == record["hypotheses"]["sha256"]
    assert sorted(report.feature) == list(range(32))
    assert report.influence.is_monotonic_decreasing
    assert report.influence.sum() == pytest.approx(1)
    assert record["top_features"] == report.feature[:5].tolist()
    half = set(range(0, 1000, 2))
    for row in report.itertuples():
        assert set(row.evidence["test_images"]) <= half
        edited = row.evidence["edited_images"] or {"active": [], "inactive": []}
        assert {*edited["active"], *edited["inactive"]} <= half
        assert (len(row.hypothesis["drawing"]), len(row.hypothesis["drawing"][0])) == (28, 28)


# --- The same run again ---------------------------------------------------------------------------


def test_a_second_run_reuses_the_stages_and_writes_the_same_bytes(run_copy, capsys):
    before = files_of(run_copy)
    driver.main([*TINY, "--out", str(run_copy)])
    text = capsys.readouterr().out
    assert (text.count("reusing the classifier"), text.count("reusing the SAE")) == (1, 1)
    assert "retraining" not in text
    assert "replaced" not in text
    assert len(text.splitlines()) <= 64  # a line for each stage among them
    (page,) = re.findall(r"^  (\S+)$", text[text.index("Open in a browser") :], re.MULTILINE)
    assert Path(page).exists()
    after = files_of(run_copy)
    assert [name for name in before if before[name] != after.get(name)] == []
    assert set(after) == set(before)


@pytest.mark.slow
def test_neither_workers_nor_threads_change_a_byte(finished, tmp_path):
    with driver.torch_threads(2):
        driver.main([*TINY, "--workers", "1", "--out", str(tmp_path)])
    before, after = files_of(finished), files_of(tmp_path)
    assert [name for name in before if before[name] != after.get(name)] == []
    assert set(after) == set(before)


def test_other_settings_replace_the_results_of_another_run_with_a_line(run_copy, capsys):
    driver.main([*BARE, "--epochs-sae-final", "2", "--out", str(run_copy)])
    text = " ".join(capsys.readouterr().out.split())
    first, changed = text.index(f"{run_copy} has results with "), text.index("EPOCHS_SAE_FINAL ch")
    assert first < text.index("reusing the classifier") < changed
    named = "HYPOTHESES True, STABILITY_SEEDS 1, FEATURES 0; they are replaced when this run has"
    assert f"with EPOCHS_SAE_FINAL 1, {named} finished: give --out another folder" in text
    assert text.count("EPOCHS_SAE_FINAL changed 1 -> 2: retraining the SAE ") == 1
    assert not list(run_copy.glob("hypotheses*"))
    assert not list(run_copy.glob("stability*"))
    assert "hypothesis" not in read_json(run_copy / "feature_report.json")[0]
    driver.load_run(run_copy)


def test_several_targets_have_folders_and_a_frontier(tmp_path, capsys):
    flags = [*BARE, "--target-actives", "4", "12", "--no-normalize-z", "--out", str(tmp_path)]
    records = driver.main(flags)
    assert [r["target_actives"] for r in records] == [4, 12]
    assert records[0]["fvu"] > records[1]["fvu"]
    assert not any(r["normalize_z"] for r in records)
    assert (tmp_path / "frontier.png").exists()
    assert "frontier.png" in capsys.readouterr().out
    for target in (4, 12):
        assert (tmp_path / f"target_{target}" / "feature_report.json").exists()
    run = driver.load_run(tmp_path, target=12)
    assert torch.equal(run.layer.mu, torch.zeros(128))
    with pytest.raises(InputError, match=r"target must be one of \[4, 12\]"):
        driver.load_run(tmp_path)
    driver.main([*BARE, "--target-actives", "12", "--no-normalize-z", "--out", str(tmp_path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "has results with TARGET_ACTIVES 4, 12; they" in shown
    assert not [*tmp_path.glob("target_*"), *tmp_path.glob("frontier.png")]
    assert driver.load_run(tmp_path).folder == tmp_path


# --- Loading --------------------------------------------------------------------------------------


def test_a_run_can_be_moved(run_copy, report):
    loaded = driver.load_run(run_copy)
    assert loaded.folder == run_copy
    assert [r["feature"] for r in loaded.report] == report.feature.tolist()
    (images, _), *_ = loaded.loaders["val"]
    assert torch.equal(images, loaded.data.val.images[: len(images)])
    (run_copy / "sae.json").unlink()
    with pytest.raises(InputError, match=re.escape(f"{run_copy}/sae.safetensors")):
        driver.load_run(run_copy)


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def stage_of_another_seed(folder) -> None:
    for ending in ("json", "safetensors"):
        shutil.copy(folder / "stability_seed_1" / f"sae.{ending}", folder)


def edit_hypotheses(folder) -> None:
    path = folder / "hypotheses.json"
    path.write_text(path.read_text().replace("0.25", "0.24"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "settings.json").unlink(), "no finished run"),
        (lambda f: edit(f / "settings.json", data_digest="x"), "was made with: bundled sample"),
        (lambda f: edit(f / "settings.json", network="net"), r"not stored .*call explain\(\)"),
        (lambda f: edit(f / "settings.json", settings={}), "of another version .*run it again"),
        (lambda f: (f / "settings.json").write_text("{}"), r"settings\.json is damaged"),
        (lambda f: (f / "settings.json").write_text("{"), r"settings\.json cannot be read"),
        (stage_of_another_seed, "networks of another run"),
        (lambda f: (f / "classifier.safetensors").write_bytes(b""), "is damaged"),
        (edit_hypotheses, r"hypotheses\.json.*run it again"),
        (lambda f: (f / "hypotheses.json").unlink(), "hypotheses.*run it again"),
    ],
)
def test_what_is_not_the_finished_run_is_not_loaded(run_copy, harm, message):
    harm(run_copy)
    with pytest.raises(InputError, match=message):
        driver.load_run(run_copy)


class StopHere(Exception):  # noqa: N818
    pass


def stop(*_, **__):
    raise StopHere


def test_a_run_that_stops_half_way_leaves_the_finished_one_as_it_was(
    run_copy, tmp_path, monkeypatch, capsys
):
    other, before = [*BARE, "--seed", "3", "--out"], contents_of(run_copy)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "finish_target", stop)
        for folder in (run_copy, tmp_path / "new"):
            with pytest.raises(StopHere):
                driver.main([*other, str(folder)])
    assert before.items() <= contents_of(run_copy).items()
    assert driver.load_run(run_copy).settings.seed == 0
    with pytest.raises(InputError, match="has an unfinished run; the same command again"):
        driver.load_run(tmp_path / "new")
    capsys.readouterr()
    for folder in (run_copy, tmp_path / "new"):
        driver.main([*other, str(folder)])
        text = " ".join(capsys.readouterr().out.split())
        assert f"{folder} has an unfinished run" in text
        assert "reusing the classifier" in text
        assert "reusing the SAE" in text
        assert ("has results with HYPOTHESES True, " in text) == (folder == run_copy)
    assert files_of(run_copy) == files_of(tmp_path / "new")
    assert [p.name for p in run_copy.iterdir() if p.name.startswith(".")] == [".lock"]


def test_hypotheses_are_frozen_before_a_test_image_is_used(finished, tmp_path, monkeypatch):
    """They are the same where all test images are blank."""
    load = driver.load_images

    def blank_test_images(*args):
        data = load(*args)
        return data._replace(test=data.test._replace(images=torch.zeros_like(data.test.images)))

    monkeypatch.setattr(driver, "load_images", blank_test_images)
    monkeypatch.setattr(driver, "finish_target", stop)
    with pytest.raises(StopHere):
        driver.main([*TINY, "--out", str(tmp_path)])
    frozen = (tmp_path / STAGING / "hypotheses.json").read_bytes()
    assert frozen == (finished / "hypotheses.json").read_bytes()


# --- Wrong input ----------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script with flags; its exit status and the lines on stderr."""

    def run(*flags: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["MNIST_SAE_code.py", *map(str, flags)])
        status = driver.run_script()
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--target-actives 600", "--target-actives must be .* 512, got 600"),
        ("--device warp", "--device warp cannot be used"),
        ("--data nowhere", "--data nowhere"),
        ("--seeds", "--seeds"),
        ("--my-hypotheses nowhere.json", "has no finished run"),
    ],
)
def test_wrong_flags_are_one_line_and_status_2(script, tmp_path, flags, message):
    status, lines = script(*flags.split(), "--workers", 0, "--out", tmp_path / "out")
    assert status == 2
    assert len(lines) == 1
    assert re.match(f"error: .*{message}", lines[0])


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (WorkerError("a worker\nended"), 2, "a worker ended"),
        (BusyError("busy"), 2, "busy"),
        (MemoryError(), 2, "out of memory"),
        (OSError(28, "No space left", "file"), 2, "file could not be written"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_that_a_user_can_meet_are_one_line(script, monkeypatch, error, status, message):
    def fail():
        raise error

    monkeypatch.setattr(driver, "main", fail)
    found, (line,) = script()
    assert found == status
    assert line.startswith(f"error: {message}")
