"""The script under bad conditions: two at once, stopped half way, files from a stranger, too large.

`chaos.py` tries the same at every place and at random ones; here stands what once went wrong.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import feature_analysis as fa
import feature_hypotheses as fh
import MNIST_SAE_code as driver

ROOT = Path(driver.__file__).parent
TINY = """--data sample --sae-latents 32 --target-actives 4 --epochs-sae-final 1 --epochs-ffn 1
--features 1 --stability-seeds 0 --no-hypotheses --workers 0""".split()
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals and limits")


def start(*flags: object, **more) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "MNIST_SAE_code.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **{**pipes, **more})


def told(process: subprocess.Popen, status: int) -> str:
    """The one line that a process says on stderr, which ends with that status."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    (line,) = errors.splitlines()
    return line


def parsed(*flags: object) -> driver.Settings:
    (settings,) = driver.parse_runs([*TINY, *map(str, flags)])
    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    driver.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, to do harm to."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# --- What belongs together ------------------------------------------------------------------------


def test_stages_name_what_they_were_made_from(finished):
    classifier, sae, settings = (
        json.loads((finished / f"{name}.json").read_text())
        for name in ("classifier", "sae", "settings")
    )
    data = driver.load_images("sample", 0)
    for record in (classifier, sae):
        assert (record["seed"], record["data_digest"]) == (0, data.digest)
    digests = {}
    for name in ("classifier", "sae"):
        digests[name] = hashlib.sha256((finished / f"{name}.safetensors").read_bytes()).hexdigest()
    assert sae["classifier_sha256"] == settings["classifier_sha256"] == digests["classifier"]
    assert settings["sae_sha256"] == {"4": digests["sae"]}
    assert settings["data_digest"] == data.digest
    assert not set(driver.PASSING) & set(settings["settings"])


class StopHere(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("flags", "last"),
    [
        (["--seed", "1"], "prepare_target"),
        (["--seed", "1"], "train_saes"),
        (["--epochs-sae-final", "2"], "prepare_target"),
        (["--lr-ffn", "0.01"], "train_saes"),
    ],
)
def test_networks_of_a_later_run_are_not_taken_for_those_of_the_finished_one(
    run, monkeypatch, flags, last
):
    """After seed 1, test images of seed 0's split would be training images."""

    def stop(*_):
        raise StopHere

    driver.load_run(str(run))
    monkeypatch.setattr(driver, last, stop)
    with pytest.raises(StopHere):
        driver.main([*TINY, *flags, "--out", str(run)])
    with pytest.raises(driver.InputError, match=r"another run than its settings|no finished run"):
        driver.load_run(str(run))


def test_a_run_that_stopped_half_way_leaves_nothing_that_looks_finished(run, monkeypatch):
    """Not even where the next one has another number of targets, and so other folders."""

    def stop(*_):
        raise StopHere

    assert (run / "summary.json").exists()
    assert list(run.glob("feature_*.png"))
    monkeypatch.setattr(driver, "prepare_target", stop)
    with pytest.raises(StopHere):
        driver.main([*TINY, "--target-actives", "3", "4", "--out", str(run)])
    left = {path.name for path in run.iterdir()}
    stages = {f"{name}.{ending}" for name in ("classifier", "sae") for ending in driver.STAGE_FILES}
    assert left == {*stages, ".lock", "run.log.jsonl", "saelens", "target_3", "target_4"}
    assert not list((run / "saelens").iterdir())


def stopped_at(folder: Path, monkeypatch, function: str, *flags: str) -> None:
    """Run into the folder, and stop where the function would be called."""

    def stop(*_, **__):
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(driver, function, stop)
        with pytest.raises(StopHere):
            driver.main([*TINY, *flags, "--out", str(folder)])


@pytest.mark.parametrize("name", ["classifier", "sae"])
def test_a_new_stage_leaves_nothing_of_the_old_run_that_looks_finished(run, monkeypatch, name):
    """Stopped as soon as the stage is there, before anything else is trained."""
    flags = {"classifier": ["--seed", "1"], "sae": ["--epochs-sae-final", "2"]}
    before = (run / f"{name}.json").read_bytes()
    stopped_at(run, monkeypatch, f"restored_{name}", *flags[name])
    assert (
        (run / f"{name}.kept-1.json").read_bytes() == before != (run / f"{name}.json").read_bytes()
    )
    assert not [n for n in driver.RESULTS_OF_RUN if (run / n).exists()]
    assert not list(run.glob("feature_*"))


def test_the_old_run_stays_whole_while_a_new_stage_is_trained(run, monkeypatch):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    stopped_at(run, monkeypatch, "train_classifier", "--seed", "1")
    stopped_at(run, monkeypatch, "train_sae", "--epochs-sae-final", "2")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    driver.load_run(str(run))


def test_a_stage_that_takes_nobodys_place_leaves_the_run(run):
    seed = run / "stability_seed_1"
    seed.mkdir()
    driver.make_room(parsed("--out", run), seed, "sae", False)
    driver.load_run(str(run))
    driver.make_room(parsed("--out", run), run, "sae", False)
    with pytest.raises(driver.InputError, match="holds no finished run"):
        driver.load_run(str(run))


def test_a_damaged_log_is_told_before_the_training(run, monkeypatch):
    log = run / "run.log.jsonl"
    log.write_text(log.read_text()[:-20])
    for training, flag in (("train_classifier", "--seed"), ("train_sae", "--epochs-sae-final")):
        monkeypatch.setattr(driver, training, None)
        with pytest.raises(driver.InputError, match=r"run.log.jsonl is damaged"):
            driver.main([*TINY, "--out", str(run), flag, "3"])


def test_without_its_last_file_a_run_is_not_finished(run, monkeypatch):
    """summary.json, which has the results, comes before settings.json, which says all is there."""
    written, write = [], fa.write_whole

    def noted(path, *args, **kwargs):
        written.append(Path(path).name)
        write(path, *args, **kwargs)

    monkeypatch.setattr(fa, "write_whole", noted)
    driver.main([*TINY, "--out", str(run)])
    assert written[-2:] == ["summary.json", "settings.json"]
    stopped_at(run, monkeypatch, "write_settings")
    with pytest.raises(driver.InputError, match="holds no finished run"):
        driver.load_run(str(run))


# --- Files from a stranger ------------------------------------------------------------------------


def sealed(text: str) -> str:
    """The JSON of a stage with the digest that it has now; another text as it is."""
    record = json.loads(text)
    return json.dumps(driver.sealed(record)) if driver.SEAL in record else text


def rewrite(folder: Path, name: str, change) -> None:
    """Change a stage's tensors and record the hash that they have now, everywhere."""
    path = folder / f"{name}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(safetensors.torch.save(tensors))
    after = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.glob("*.json"):
        path.write_text(sealed(path.read_text().replace(before, after)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sae", lambda t: t["std"].fill_(0), "std is too small: 0"),
        ("sae", lambda t: t["W_dec"][0].fill_(torch.nan), "W_dec is empty or not finite"),
        ("sae", lambda t: t["threshold"].sub_(99), "threshold is too small"),
        ("sae", lambda t: t.pop("mu"), "it holds .* not"),
        ("sae", lambda t: t.update(extra=torch.ones(1)), "it holds .*'extra'"),
        ("sae", lambda t: t.update(mu=t["mu"].double()), "mu is torch.float64"),
        (
            "sae",
            lambda t: t.update(b_enc=torch.zeros(31)),
            r"b_enc is .* \(31,\), expected \(32,\)",
        ),
        ("sae", lambda t: t.update(b_dec=torch.zeros(128, 1)), r"b_dec is .* \(128, 1\)"),
        ("classifier", lambda t: t["hidden.bias"].fill_(torch.inf), "hidden.bias is empty or not"),
        ("classifier", lambda t: t.update({"head.bias": torch.zeros(0)}), "head.bias"),
    ],
)
def test_tensors_that_cannot_be_are_not_believed(run, name, change, message):
    rewrite(run, name, change)
    with pytest.raises(driver.InputError, match=f"{name}.json in .* is damaged .*{message}"):
        driver.load_run(str(run))


@pytest.mark.parametrize("name", ["settings", "classifier", "sae"])
@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "{" + '"a": {' * 5000,
        "[]",
        "null",
        "{}",
        '{"sha256": NaN}',
        "\x00",
        '{"a": 1',
    ],
)
def test_json_that_is_something_else_is_one_line(run, name, content):
    (run / f"{name}.json").write_text(content)
    with pytest.raises(driver.InputError, match=r"holds no finished run|damaged or incomplete"):
        driver.load_run(str(run))


def fields_of(record: dict, inside: tuple = ()) -> list[tuple]:
    found = []
    for name, value in record.items():
        found.append((*inside, name))
        if isinstance(value, dict) and name == "settings":
            found += fields_of(value, (*inside, name))
    return found


def test_a_field_of_settings_that_is_missing_or_of_another_kind_is_refused(run):
    path = run / "settings.json"
    whole = path.read_text()
    for *inside, name in fields_of(json.loads(whole)):
        for harm in (lambda record, name: record.pop(name), lambda r, n: r.update({n: [{}]})):
            described = json.loads(whole)
            record = described["settings"] if inside else described
            harm(record, name)
            path.write_text(json.dumps(described))
            with pytest.raises(driver.InputError):
                driver.load_run(str(run))
    path.write_text(whole)
    driver.load_run(str(run))


def test_a_stage_that_cannot_be_is_trained_again(run, capsys):
    rewrite(run, "sae", lambda t: t["std"].fill_(0))
    driver.main([*TINY, "--out", str(run)])
    assert "sae: retrained, because" in capsys.readouterr().out
    driver.load_run(str(run))


@pytest.mark.parametrize(
    ("field", "value"),
    [("lambda", 55.5), ("threshold_shift", 0.5), ("seed", 7), ("course", {}), ("data", "others")],
)
def test_an_edited_record_of_a_stage_is_not_believed(run, capsys, field, value):
    path = run / "sae.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), field: value}, indent=2))
    line = f"sae.safetensors with sae.json in {run} is damaged or incomplete (sae.json was edited)"
    with pytest.raises(driver.InputError, match=re.escape(line)):
        driver.load_run(str(run))
    (record,) = driver.main([*TINY, "--out", str(run)])
    said = capsys.readouterr().out
    assert f"sae: retrained, because {line}; the old one is kept as sae.kept-1" in said
    assert record["lambda"] == json.loads(whole)["lambda"]
    assert path.read_text() == whole
    driver.load_run(str(run))


@pytest.mark.parametrize(("name", "field"), [("sae", "target_actives"), ("classifier", "seed")])
def test_a_record_that_says_something_else_never_blocks(run, capsys, name, field):
    """Not even with its digest mended."""
    path = run / f"{name}.json"
    path.write_text(sealed(json.dumps({**json.loads(path.read_text()), field: 7})))
    driver.main([*TINY, "--out", str(run)])
    assert f"{name}: retrained, because it belongs to other settings" in capsys.readouterr().out
    driver.load_run(str(run))


def test_the_report_is_that_of_the_run(run):
    path, loaded = run / "feature_report.json", driver.load_run(str(run))
    whole = path.read_bytes()
    assert loaded.report == json.loads(whole)
    for content in (whole.replace(b'"feature": ', b'"feature": 1'), b"{", b""):
        path.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
        line = (
            f"{path} is not the report of this run (its SHA-256 is {found}, recorded was "
            f"{hashlib.sha256(whole).hexdigest()}); run it again, load it again"
        )
        with pytest.raises(driver.InputError, match=f"^{re.escape(line)}$"):
            driver.load_run(str(run)).report  # noqa: B018
    path.unlink()
    with pytest.raises(driver.InputError, match=r"is not the report of this run .*No such file"):
        loaded.report  # noqa: B018


def test_lines_of_the_log_that_belong_to_another_training_are_not_drawn(
    run, monkeypatch, tmp_path_factory, capsys
):
    """A log copied from another run, and one whose lines were edited; seconds do not matter."""
    log, drawn = run / driver.LOG, []
    whole = log.read_text()
    other = tmp_path_factory.mktemp("other")
    driver.main([*TINY, "--epochs-sae-final", "2", "--out", str(other)])
    monkeypatch.setattr(driver, "draw_training", lambda curves, _: drawn.append(len(curves)))
    capsys.readouterr()
    for content in (
        whole,
        (other / driver.LOG).read_text(),
        whole.replace('"dead": ', '"dead": 1'),
        re.sub(r'"seconds": [\d.]+', '"seconds": 0.5', whole),
    ):
        log.write_text(content)
        driver.write_training(run, run, 4, 0.15)
    assert drawn == [5, 1, 1, 5]
    line = f"{log}: the lines of the sae there are of another training; they are not drawn\n"
    assert capsys.readouterr().out == 2 * line


def test_load_run_calls_the_classes_as_the_run_did(run, monkeypatch):
    load, names = driver.load_images, ("none", "one", *"23456789")
    monkeypatch.setattr(driver, "load_images", lambda *a: load(*a)._replace(classes=names))
    assert driver.load_run(str(run)).data.classes == tuple("0123456789")


# --- Claims ---------------------------------------------------------------------------------------


def test_claims_frozen_before_a_kill_do_not_block_the_next_run(tmp_path):
    """summary.json says nothing of these claims: it is written after each target's."""
    (tmp_path / "target_4").mkdir()
    fh.freeze_hypotheses([], tmp_path / "target_4" / "hypotheses.json")
    for said in ("[]", '[{"target_actives": 3, "hypotheses_sha256": "of the first"}]'):
        (tmp_path / "summary.json").write_text(said)
        driver.refuse_edited_claims(parsed("--target-actives", 3, 4, "--out", tmp_path))


def test_claims_that_summary_json_does_not_know_are_refused(tmp_path):
    """Edited, their own digest mended."""
    for target in (3, 4):
        folder = tmp_path / f"target_{target}"
        folder.mkdir()
        digest = fh.freeze_hypotheses([], folder / "hypotheses.json")
    record = '{"target_actives": %d, "hypotheses_sha256": "%s"}'
    said = f"[{record % (3, digest)}, {record % (4, digest)}]"
    (tmp_path / "summary.json").write_text(said)
    flags = ["--target-actives", 3, 4, "--out", tmp_path]
    driver.refuse_edited_claims(parsed(*flags))
    edited = fh.Rule(class_auroc=0.05)
    now = fh.freeze_hypotheses([], tmp_path / "target_4" / "hypotheses.json", edited)
    line = (
        f"{tmp_path}/target_4/hypotheses.json was changed after it was frozen: its SHA-256 is "
        f"{now}, recorded was {digest}; to start over, move the file away or give --fresh"
    )
    with pytest.raises(driver.InputError, match=re.escape(line)):
        driver.refuse_edited_claims(parsed(*flags))
    driver.refuse_edited_claims(parsed(*flags, "--fresh"))
    (tmp_path / "summary.json").write_text(said[:-1])
    with pytest.raises(driver.InputError, match=r"summary.json is damaged .*; move it away or"):
        driver.refuse_edited_claims(parsed(*flags))


def test_load_run_refuses_edited_claims(run):
    """Of the run's own digest it says nothing, as it has no claims; so it is told one."""
    now = fh.freeze_hypotheses([], run / "hypotheses.json")
    settings = run / "settings.json"
    said = json.loads(settings.read_text())
    for digest in (now, "0" * 64):
        settings.write_text(json.dumps({**said, "hypotheses_sha256": {"4": digest}}))
        if digest == now:
            driver.load_run(str(run))
    with pytest.raises(driver.InputError, match=rf"is {now}, recorded was 0{{64}}\); run it again"):
        driver.load_run(str(run))
    (run / "hypotheses.json").unlink()
    with pytest.raises(driver.InputError, match=r"claims are not as this run froze them .*No such"):
        driver.load_run(str(run))


def test_loaders_of_a_run_give_its_splits(run):
    loaded = driver.load_run(str(run))
    for name, n in (("train", 3500), ("val", 500), ("test", 1000)):
        images = torch.cat([images for images, _ in loaded.loaders[name]])
        assert torch.equal(images, getattr(loaded.data, name).images)
        assert len(images) == n


def test_edited_claims_are_refused_with_and_without_a_summary(tmp_path):
    path = tmp_path / "hypotheses.json"
    fh.freeze_hypotheses([], path)
    path.write_text(path.read_text().replace("0.85", "0.84"))
    with pytest.raises(driver.InputError, match=r"was changed after it was frozen.* --fresh"):
        driver.refuse_edited_claims(parsed("--out", tmp_path))
    driver.refuse_edited_claims(parsed("--out", tmp_path, "--fresh"))


@pytest.mark.parametrize("targets", [["8"], ["8", "9"]])
def test_edited_claims_of_all_whose_results_would_go_are_refused(tmp_path, targets):
    """Those of a target that this run has not, and those of an earlier run of a single target."""
    folder = tmp_path if len(targets) == 2 else tmp_path / "target_4"
    folder.mkdir(exist_ok=True)
    fh.freeze_hypotheses([], folder / "hypotheses.json")
    (folder / "sae.json").write_text("{}")
    flags = ["--out", tmp_path, "--target-actives", *targets]
    driver.refuse_edited_claims(parsed(*flags))
    text = (folder / "hypotheses.json").read_text()
    (folder / "hypotheses.json").write_text(text.replace("0.85", "0.84"))
    with pytest.raises(driver.InputError, match=rf"{folder}/hypotheses.json was changed"):
        driver.refuse_edited_claims(parsed(*flags))


# --- Two at once ----------------------------------------------------------------------------------


@posix
def test_two_runs_do_not_write_into_one_folder(tmp_path, finished):
    """The second is refused, or waits; killing the first with SIGKILL frees the folder."""
    with start(
        *TINY, "--seed", 1, "--workers", 1, "--epochs-sae-final", 50, "--out", tmp_path
    ) as a:
        assert "data: bundled sample" in a.stdout.readline()
        line = told(start(*TINY, "--out", tmp_path), 2)
        assert re.fullmatch(
            rf"error: {tmp_path} is being written to by process {a.pid} since .*; give --wait to "
            r"wait for it, or another --out",
            line,
        )
        waiting = start(*TINY, "--wait", "--out", tmp_path)
        assert f"process {a.pid} since" in waiting.stdout.readline()
        a.kill()
    waiting.communicate(timeout=300)
    assert waiting.returncode == 0
    (expected,) = json.loads((finished / "summary.json").read_text())
    (found,) = json.loads((tmp_path / "summary.json").read_text())
    assert found["fvu"] == expected["fvu"]
    driver.load_run(str(tmp_path))


# --- Too large ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--sae-latents", 10**8],
            r"GB of memory are needed, but there are .*; lower --sae-latents",
        ),
        (["--hidden-units", 10**8], "GB of memory are needed, .*; lower --hidden-units"),
        (["--epochs-sae-final", 10**8, "--batch-sae", 1], "lower --epochs-ffn or --epochs-sae"),
        (["--sae-latents", 10**19], "--sae-latents is 10000000000000000000; it must be at most"),
        (["--n-eval", 2**63], "--n-eval is .* it must be at most 100,000,000"),
        (["--workers", 10**6], "--workers is 1000000; it must be at most 1,000"),
        (["--alpha", "1e300"], r"--alpha is 1e\+300; it must be at most 1,000,000"),
        (["--alpha=-inf"], "--alpha is -inf; it must be a finite number"),
        (["--head-kl", "inf"], "--head-kl is inf; it must be a finite number"),
        (["--head-kl", "1e30"], r"--head-kl is 1e\+30; it must be at most 1,000"),
        (["--weight-decay-ffn", "1e30"], r"--weight-decay-ffn is 1e\+30; it must be at most 10"),
        (["--lr-ffn", "1e300"], r"--lr-ffn is 1e\+300; it must be at most 1e\+38"),
        (["--out", ""], "--out is ''; it must name a folder"),
        (["--data", " "], "--data is ' '; it must name a folder"),
    ],
)
def test_what_is_too_large_is_refused_before_training(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(driver, "memory_bytes", lambda: 64e9)
    monkeypatch.setattr(driver, "train_classifier", None)  # not reached
    out = ["--out", str(tmp_path)]
    with pytest.raises(driver.InputError, match=message):
        driver.main([*TINY, *out, *map(str, flags)])


def test_a_usual_run_is_not_too_large():
    data = driver.load_images("sample", 0)
    assert sum(driver.needed_bytes(driver.Settings(), data).values()) < 1e8
    assert 1e8 < driver.memory_bytes()


@posix
def test_memory_that_runs_out_is_one_line(tmp_path):
    """An allocation that the system refuses, on a CPU a plain RuntimeError of torch."""
    code = f"""
import resource, sys, torch
import MNIST_SAE_code as driver
def train(*_):
    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
    torch.zeros(2**40)
driver.train_classifier = train
sys.argv = ["run", *{TINY!r}, "--out", {str(tmp_path)!r}]
sys.exit(driver.run_script())
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert told(process, 2).startswith("error: out of memory; lower --sae-latents")


# --- Stopped --------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_so_in_one_line(tmp_path, number, status):
    process = start(*TINY, "--epochs-ffn", 50, "--workers", 1, "--out", tmp_path)
    process.stdout.readline()
    process.send_signal(number)
    assert re.fullmatch(
        r"error: (interrupted|terminated); finished .* reused", told(process, status)
    )
    assert not (tmp_path / ".writer").exists()


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_it_imports_it_says_so_in_one_line(tmp_path, number, status):
    """A package that is imported late says when the time has come."""
    (tmp_path / "tqdm.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = start(*TINY, "--out", tmp_path / "out", env=environment)
    assert process.stdout.readline() == "now\n"
    process.send_signal(number)
    assert told(process, status).startswith("error: stopped at once")


@posix
def test_closed_streams_are_not_written_to(tmp_path):
    """With `2>&-` the next file that is opened would be number 2, and get what is said there."""
    script = f"exec {sys.executable} MNIST_SAE_code.py {' '.join(TINY)} --out {tmp_path} <&- 2>&-"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 0
    assert b"Where to look next" in done.stdout
    done = subprocess.run(["sh", "-c", f"{script} --head-kl inf"], cwd=ROOT, timeout=300)
    assert done.returncode == 2


class Odd(Exception):  # noqa: N818
    """Can be pickled, but not unpickled."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def raise_odd() -> None:
    raise Odd("this", "that")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_raised_is_told_even_if_it_cannot_travel(workers):
    with driver.Jobs(workers) as jobs:
        job = jobs.start("odd", raise_odd)
        with pytest.raises((Odd, RuntimeError), match="this and that"):
            jobs.results([job])
        assert jobs.results([jobs.start("sum", sum, [1, 2])]) == [3]


@posix
def test_workers_of_a_killed_run_are_gone_before_they_write(tmp_path):
    process = start(*TINY, "--workers", 1, "--epochs-sae-final", 200, "--out", tmp_path)
    process.stdout.readline()
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True)
    assert children.stdout.split()
    process.kill()
    process.communicate()
    left = children.stdout.split()
    for _ in range(100):
        left = [pid for pid in left if Path(f"/proc/{pid.decode()}").exists()]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {left}")
