"""Sweeps, in one process, in several and on several ranks, and images of another size."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_end_to_end import ROOT, SMALL, files_of, run_script
from test_mnist_data import write_set

import feature_analysis as fa
import MNIST_SAE_code as driver
import whole_files as wf
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


LITTLE = """--data sample --sae-latents 24 --hidden-units 16 --target-actives 3 --features 1
--epochs-sae-final 1 --epochs-ffn 1 --stability-seeds 0 --no-hypotheses --workers 0""".split()


def told_by_two(*flags: object, second=(), places=(ROOT, ROOT)) -> list[str]:
    """What two ranks say on stderr that somebody starts by hand in two folders, the second one with
    further flags; both must end with an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for number, folder in enumerate(places):
        own = map(str, (*flags, *second) if number else flags)
        command = [sys.executable, str(ROOT / "MNIST_SAE_code.py"), *own]
        place = {"WORLD_SIZE": "2", "RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    return said


def test_ranks_of_other_settings_or_images_make_nothing(tmp_path):
    """Both say the same line, and what an earlier run left is untouched."""
    out = tmp_path / "out"
    driver.main([*LITTLE, "--out", str(out)])
    before = files_of(out)
    unlike = ["--seed", 1, "--lr-sae", 0.001]
    said = told_by_two(*LITTLE, "--out", out, second=unlike)
    assert said[0] == said[1]
    line = re.escape("error: rank 1 differs from rank 0: --lr-sae is 0.001, not 0.013; --seed is 1")
    assert re.fullmatch(rf"{line}, not 0; data is .*\. Ranks make parts of .* versions\n", said[0])
    assert files_of(out) == before

    rng = np.random.default_rng(0)
    arrays = {}
    for name, n in (("train", 120), ("t10k", 30)):
        arrays[f"{name}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        arrays[f"{name}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    others = write_set(tmp_path / "others", arrays)
    sweep = [*LITTLE, "--seeds", 0, 1, "--out", tmp_path / "sweep"]
    said = told_by_two(*sweep, second=["--data", others])
    assert said[0] == said[1]
    assert re.fullmatch(
        r"error: rank 1 differs from rank 0: data is others, full set of 150 images, digest "
        r"[0-9a-f]{12}, not bundled sample of 5,000 MNIST training digits, digest [0-9a-f]{12}\. "
        r"Ranks make .*\n",
        said[0],
    )
    assert not (tmp_path / "sweep").exists()


def test_an_error_of_one_rank_is_told_by_both(tmp_path):
    flags = [*LITTLE, "--out", tmp_path / "out"]
    said = told_by_two(*flags, second=["--data", tmp_path / "nowhere"])
    assert said[0] == said[1]
    assert re.fullmatch(rf"error: --data {tmp_path}/nowhere is no folder: .* \(rank 1\)\n", said[0])


def test_ranks_that_see_different_folders_end_with_a_line_each(tmp_path):
    """Where the second one finds nothing, it trains nothing."""
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    first, second = told_by_two(*LITTLE, "--out", "out", places=places)
    assert re.fullmatch(
        r"error: classifier.safetensors with classifier.json in out is .*\n", second
    )
    assert re.fullmatch(r"error: another rank has ended, and says why itself \(.*\)\n", first)
    assert not list(places[1].iterdir())


class Two(driver.Rank):
    """The first of two ranks, the other of which has told `facts`."""

    facts: dict

    def wait(self):
        pass

    def share(self, value):
        return [value, (self.facts, "")]


@pytest.mark.parametrize(
    ("name", "other"),
    [("torch", "2.0.0"), ("code", "digest 0123456789ab"), ("device", "cuda"), ("--topk", 5)],
)
def test_ranks_of_another_version_or_device_are_refused(name, other):
    runs = driver.parse_runs([*LITTLE, "--seeds", "0", "1"])
    own = driver.decisive_facts(runs)
    rank = Two(0, 2)
    rank.facts = dict(own)
    driver.refuse_unlike_ranks(runs, rank)
    rank.facts = {**own, name: other}
    found = re.escape(f"rank 1 differs from rank 0: {name} is {other}, not {own[name]}. Ranks")
    with pytest.raises(InputError, match=found):
        driver.refuse_unlike_ranks(runs, rank)


def test_what_does_not_decide_may_differ_among_ranks():
    """Where each finds the images, its worker processes; in a single run, its cores, too."""
    single = driver.parse_runs(LITTLE)
    others = [replace(single[0], workers=3, fresh=True, wait=True)]
    assert driver.decisive_facts(others) == driver.decisive_facts(single)
    assert "cores of a training" not in driver.decisive_facts(single)


def test_cores_decide_where_ranks_train_large_saes(monkeypatch):
    runs = driver.parse_runs([*LITTLE, "--seeds", "0", "1"])
    monkeypatch.setattr(driver, "available_cores", lambda: 5)
    assert driver.decisive_facts(runs)["cores of a training"] == 1
    monkeypatch.setattr(driver, "LARGE_SAE", 16 * 24)
    assert driver.decisive_facts(runs)["cores of a training"] == 5


class Second(driver.Rank):
    """The second of two ranks, which hears `told` from the first one and keeps what it gives."""

    told: object
    given: list

    def share(self, value):
        return [self.told, value]

    def gather(self, value):
        self.given.append(value)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """A finished run, its settings and the digests of its stages."""
    folder = tmp_path_factory.mktemp("little")
    driver.main([*LITTLE, "--out", str(folder)])
    (settings,) = driver.parse_runs([*LITTLE, "--out", str(folder)])
    digests = [driver.read_stage(folder, name).digest for name in ("classifier", "sae")]
    return settings, digests


def help_with(settings: driver.Settings, told: object) -> list:
    """What the second rank gives to the first one."""
    rank = Second(1, 2)
    rank.told, rank.given = told, []
    context = copy_context()
    context.run(driver.THIS_RANK.set, rank)
    context.run(driver.help_first_rank, settings, driver.Clock())
    return rank.given


def test_another_rank_reads_the_stages_whatever_it_would_train_itself(little, monkeypatch):
    settings, (classifier, sae) = little
    before = files_of(Path(settings.out))
    monkeypatch.setattr(driver, "LARGE_SAE", 1)
    monkeypatch.setattr(driver, "available_cores", lambda: 3)  # of which the fingerprint depends
    (bank,) = help_with(replace(settings, lr_ffn=0.5), (classifier, {3: sae}))  # the only batch
    (record,) = json.loads((Path(settings.out) / "feature_report.json").read_text())
    assert bank.label_histogram[record["feature"]].tolist() == record["label_histogram"]
    assert files_of(Path(settings.out)) == before


@pytest.mark.parametrize("name", ["classifier", "sae"])
def test_another_rank_refuses_stages_that_the_first_one_did_not_make(little, name):
    settings, (classifier, sae) = little
    before = files_of(Path(settings.out))
    told = ("0" * 64, {3: sae}) if name == "classifier" else (classifier, {3: "0" * 64})
    message = rf"{name}.safetensors in .* is not the one that this run made .*, not 000000000000\)"
    with pytest.raises(InputError, match=message):
        help_with(settings, told)
    with pytest.raises(InputError, match=r"classifier.safetensors .* is damaged or incomplete"):
        help_with(replace(settings, out=f"{settings.out}/nowhere"), told)
    assert files_of(Path(settings.out)) == before


def test_a_combination_never_trains_a_classifier(little, tmp_path):
    settings, (classifier, _) = little
    with pytest.raises(InputError, match=r"classifier.safetensors in .* is not the one that this"):
        driver.train_combination(replace(settings, out=str(tmp_path)), settings.out, "0" * 64)
    others = replace(settings, out=str(tmp_path), seed=1)  # another split, so other images
    with pytest.raises(InputError, match=r"was trained on bundled sample .*; found here: bundled"):
        driver.train_combination(others, settings.out, classifier)


def test_records_of_a_sweep_say_of_which_images_they_are(swept):
    digests = {seed: driver.load_images("sample", seed).digest for seed in (0, 1)}
    assert digests[0] != digests[1]
    for record in json.loads((swept[0] / "sweep.json").read_text()):
        assert record["data_digest"] == digests[record["seed"]]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment, not a number from 0"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment, not a number from 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but there is no RANK; start"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "but there is no MASTER_ADDR; start ranks with torch"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK is '2' in the environment, not a number from 0 to 1; start ranks with torchrun",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
            "MASTER_PORT is 'port' in the environment, not a number from 0 to 65535",
        ),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x' in the environment, not a number"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_one_line(
    tmp_path, monkeypatch, environment, message
):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=re.escape(message)):
        driver.main(["--workers", "-1", "--data", "sample", "--out", str(tmp_path / "out")])


# --- Folders inside others ------------------------------------------------------------------------


def test_a_combination_that_is_trained_anew_loses_the_results_of_the_old_one(tmp_path, capsys):
    sweep = [*LITTLE, "--seeds", "0", "1", "--out", str(tmp_path)]
    driver.main(sweep)
    place = tmp_path / "seed_1_latents_24_target_3"
    single = [*LITTLE, "--seed", "1", "--out", str(place)]
    driver.main(single)
    assert not (place / "combination.json").exists()  # what is there now is that run
    explained = files_of(place)
    capsys.readouterr()

    driver.main(sweep)  # changes nothing
    assert f"{place}: sae: reused" in capsys.readouterr().out
    of_sweep = json.loads((place / "combination.json").read_text())
    (place / "combination.json").unlink()
    assert files_of(place) == explained

    driver.main([*sweep, "--head-kl", "0"])
    said = capsys.readouterr().out
    assert f"{place}: sae: retrained, because it belongs to other settings, data or code" in said
    left = {path.name for path in place.iterdir() if path.is_file()}
    stages = {f"{name}.{end}" for name in ("classifier", "sae") for end in driver.STAGE_FILES}
    stages |= {f"sae.kept-1.{end}" for end in driver.STAGE_FILES}
    assert left == {*stages, ".lock", "run.log.jsonl", "combination.json"}
    assert not list((place / "saelens").iterdir())
    assert json.loads((place / "combination.json").read_text()) != of_sweep
    driver.main([*single, "--head-kl", "0", "--lr-sae", "0.01"])
    assert not (place / "combination.json").exists()


def test_edited_claims_of_a_combination_are_not_overwritten(tmp_path):
    sweep = [*LITTLE, "--seeds", "0", "1", "--out", str(tmp_path)]
    claims = tmp_path / "seed_1_latents_24_target_3" / "hypotheses.json"
    claims.parent.mkdir()
    claims.write_text("edited")
    with pytest.raises(InputError, match=r"hypotheses.json .*to start over, move the file away or"):
        driver.main(sweep)
    assert claims.read_text() == "edited"


SEVERAL = [*LITTLE, "--target-actives", "3", "4", "--stability-seeds", "1"]
SWEPT = [*LITTLE, "--seeds", "0", "1"]


@pytest.mark.parametrize(
    ("inside", "flags"),
    [
        ("target_4", SEVERAL),
        ("target_3/stability_seed_1", SEVERAL),
        ("stability_seed_1", [*LITTLE, "--stability-seeds", "1"]),
        ("seed_1_latents_24_target_3", SWEPT),
        ("seed_1_classifier", SWEPT),
    ],
)
def test_a_run_stays_out_of_a_folder_in_its_own_that_another_one_writes_to(tmp_path, inside, flags):
    place = tmp_path / inside
    place.mkdir(parents=True)
    with wf.only_writer(place):
        found = rf"{re.escape(str(place))} is being written to by process {os.getpid()} since"
        with pytest.raises(wf.BusyError, match=found):
            driver.main([*flags, "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("inside", "flags", "meanwhile"),
    [
        ("target_4", SEVERAL, "prepare_target"),
        ("target_3/stability_seed_1", SEVERAL, "calibrated_sae"),
        ("seed_1_latents_24_target_3", SWEPT, "measure"),
        ("seed_0_latents_24_target_3", SWEPT, "measure"),
        ("seed_1_classifier", SWEPT, "train_classifier"),
    ],
)
def test_no_run_comes_into_a_folder_while_another_one_writes_there(
    tmp_path, monkeypatch, inside, flags, meanwhile
):
    """Tried each time that the outer run is at that function; refused at least once."""
    work, refused = getattr(driver, meanwhile), []

    def look(*args):
        if (tmp_path / inside).exists():
            try:
                with driver.working(driver.Settings(out=str(tmp_path / inside), workers=0)):
                    pass
            except wf.BusyError as error:
                refused.append(str(error))
        return work(*args)

    monkeypatch.setattr(driver, meanwhile, look)
    driver.main([*flags, "--out", str(tmp_path)])
    assert refused
    assert all(f"{tmp_path / inside} is being written to by" in line for line in refused)
    assert not list(tmp_path.rglob(".writer"))


def test_what_a_killed_run_left_is_cleared_by_whoever_holds_the_folder_alone(tmp_path):
    """Another run may be in the folder of a target, and be writing just this file."""
    for inside in ("", "saelens", "target_3", "target_4/saelens"):
        (tmp_path / inside).mkdir(parents=True, exist_ok=True)
        (tmp_path / inside / ".sae.json.x.unfinished").touch()
    (settings,) = driver.parse_runs([*LITTLE, "--out", str(tmp_path)])
    with driver.working(settings):
        left = {str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("*.unfinished")}
        assert left == {"target_3", "target_4/saelens"}
    with driver.working(replace(settings, target_actives=(3, 4))):
        assert not list(tmp_path.rglob("*.unfinished"))


def test_results_of_other_targets_go_where_their_classifier_went(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    driver.main([*LITTLE, "--target-actives", "3", "4", *out])
    alone = tmp_path / "target_9"  # a run of its own
    shutil.copytree(tmp_path / "target_4", alone)
    (tmp_path / "target_practice").mkdir()  # somebody's
    (tmp_path / "target_practice" / "summary.json").touch()
    for ending in driver.STAGE_FILES:
        shutil.copy(tmp_path / f"classifier.{ending}", alone)
    driver.main([*LITTLE, "--target-actives", "4", "5", *out])  # of the same classifier
    assert (tmp_path / "target_3" / "feature_report.json").exists()
    assert "removed its results" not in capsys.readouterr().out

    driver.main([*LITTLE, "--target-actives", "4", "5", "--seed", "1", *out])
    said = capsys.readouterr().out
    assert (
        f"{tmp_path / 'target_3'}: removed its results, which are of another classifier; its SAE "
        f"stays" in said
    )
    assert said.count("removed its results") == 1
    left = {path.name for path in (tmp_path / "target_3").iterdir()}
    assert left == {"sae.safetensors", "sae.json", ".lock", "run.log.jsonl", "saelens"}
    assert (alone / "feature_report.json").exists()
    assert [path.name for path in (tmp_path / "target_practice").iterdir()] == ["summary.json"]


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
