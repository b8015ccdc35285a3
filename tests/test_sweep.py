"""Many SAEs, in one process and on two ranks: saexplain.sweep."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BARE, contents_of

import MNIST_SAE_code as driver
from saexplain import compare_page, sweep
from saexplain.files import load_stage

SWEEP = [*BARE, "--seeds", "0", "1"]


def record(seed: int, latents: int, target: int, **more) -> dict:
    """A record with every measurement of SWEEP_TABLE equal to seed + target."""
    found = {key: float(seed + target) for _, key, _ in sweep.SWEEP_TABLE}
    found["dense_share_of_l0"] = 0.5
    return {"seed": seed, "sae_latents": latents, "target_actives": target, **found, **more}


RECORDS = [record(s, n, t) for s in (0, 2) for n in (32, 64) for t in (4, 8)]


def test_means_and_deviations_over_seeds_are_those_of_each_size_and_target():
    found = sweep.over_seeds(RECORDS, 32, 8, "fvu")
    assert found == {"mean": 9.0, "std": pytest.approx(math.sqrt(2))}
    panels = sweep.sweep_panels(RECORDS)
    curve = panels["FVU"]["64 latents"]
    assert (curve.l0, curve.values) == ([5, 9], [5, 9])
    row = sweep.sweep_table(RECORDS).splitlines()[-1]
    assert row.split()[:2] == ["64", "8"]
    assert "9.0000±1.4142" in row
    assert "900.00±141.42%" in row
    shares = {key: 0.9876 for _, key, form in sweep.SWEEP_TABLE if "%" in form}
    usual = {**shares, "achieved_actives_test": 79.9, "fvu": 0.1272, "dead_features": 120}
    wide = [{**r, **usual, "fvu_to_pca": 0.3 + r["seed"] / 10} for r in RECORDS]
    assert 90 < len(sweep.sweep_table(wide).splitlines()[-1]) <= 100


def test_one_seed_has_no_spread():
    alone = [r for r in RECORDS if r["seed"] == 0]
    assert "±" not in sweep.sweep_table(alone)
    figure = sweep.draw_sweep(alone)
    assert "deviation" not in figure.get_suptitle()
    bars = [bar for axes in figure.axes for bar in axes.containers]
    assert bars
    assert not any(bar.has_yerr for bar in bars)
    figure = sweep.draw_sweep(RECORDS)
    assert "standard deviation over seeds" in figure.get_suptitle()
    assert all(bar.has_yerr for axes in figure.axes for bar in axes.containers)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, driver.main([*SWEEP, "--out", str(folder)])


def test_every_combination_is_trained_in_a_folder_of_its_own(swept):
    folder, records = swept
    assert [(r["seed"], r["target_actives"]) for r in records] == [(0, 4), (1, 4)]
    for r in records:
        stage = load_stage(folder / f"seed_{r['seed']}_latents_32_target_4", "sae")
        assert stage.tensors["W_enc"].shape == (128, 32)
        assert stage.inputs["seed"] == r["seed"]
        assert r["achieved_actives_val"] == pytest.approx(4, abs=2 / 500)


def test_a_sweep_has_the_saes_of_single_runs_and_continues_where_it_stopped(swept, finished):
    folder, records = swept
    alone = load_stage(finished, "sae")
    assert load_stage(folder / "seed_0_latents_32_target_4", "sae").digest == alone.digest
    before = contents_of(folder)
    (folder / "seed_1_latents_32_target_4" / "sae.json").unlink()
    assert driver.main([*SWEEP, "--out", str(folder)]) == records
    assert contents_of(folder) == before


def test_a_sweep_ends_in_a_page_of_its_numbers(swept):
    folder, records = swept
    page = (folder / "sweep.html").read_text()
    for r in records:
        assert f"<td>{r['fvu']:.4f}</td>" in page
        assert f"seed {r['seed']}, 32 latents, target 4" in page
    assert "Features of" not in page  # two seeds, two classifiers


def test_features_are_matched_among_combinations_of_one_seed(loaded, swept):
    """The second and the third combination have the SAE of the first; the last has another seed."""
    records = [{**swept[1][0], "sae_latents": n} for n in (32, 33, 34)] + [swept[1][1]]
    given = [replace(loaded.settings, seed=r["seed"]) for r in records]

    def train_one(settings: driver.Settings):
        assert settings.seed == 0
        print("reusing")
        return loaded.layer, None, ""

    page = sweep.sweep_page(given, records, train_one, swept[0]).decode()
    assert re.findall("Features of ([A-D] and [A-D])", page) == ["A and B", "A and C"]
    assert page.count("cosine 1.00") == 2 * min(32, compare_page.SHOWN)


@pytest.mark.slow
def test_two_ranks_make_the_same_files(swept, tmp_path):
    script = str(Path(driver.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", script, *SWEEP, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents_of(tmp_path) == contents_of(swept[0])
    assert done.stdout.count("over 2 seeds") == 1  # the first rank prints for all
