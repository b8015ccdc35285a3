"""Which run a folder has, while one replaces another: saexplain.runs."""

import json
import os
from pathlib import Path

import pytest

from saexplain import runs
from saexplain.files import INTERRUPTED, STAGING, InputError
from saexplain.images import Data

OLD = {"seed": 0, "sae_latents": 512, "target_actives": [10, 20], "out": "here", "data": "auto"}
NEW = {**OLD, "target_actives": [10]}
DATA = Data(None, None, None, ("a", "b"), "two digits", "digest")
OLD_FILES = """classifier.json classifier.safetensors frontier.png target_10/sae.json
target_10/sae.safetensors target_10/feature_3_gallery.png target_10/my_hypotheses.md
target_20/sae.json target_20/stability_seed_1/sae.json target_20/frozen_decoder/sae.safetensors
target_20/saelens/cfg.json target_20/my_hypothesis_1_feature_3.png""".split()
NEW_FILES = "classifier.json classifier.safetensors sae.json sae.safetensors".split()
KEPT = """my_hypotheses.json my_hypotheses_tried.json notes.md sae.png feature_3.png sweep.json
target_10/notes.md target_x/sae.json activations_val/activations.json data/summary.json""".split()


def write(folder: Path, names: list[str], content: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def manifest(settings: dict, sae: str = "") -> dict:
    found = runs.Network("script", "net", "weights").manifest(settings, DATA)
    return {**found, "sae_sha256": {"10": sae}, "hypotheses_sha256": {"10": None}}


def write_manifest(folder: Path, settings: dict, sae: str = "") -> None:
    (folder / "settings.json").write_text(json.dumps(manifest(settings, sae)))


def begin(root: Path, settings: dict = NEW) -> Path:
    return runs.begin_run(root, manifest(settings), str.upper)


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a finished run, and a complete one that is to replace it."""
    write(tmp_path, [*OLD_FILES, *KEPT], "old")
    write_manifest(tmp_path, OLD, "a")
    write(begin(tmp_path), NEW_FILES, "new")
    write_manifest(tmp_path / STAGING, NEW, "b")
    return tmp_path


def names_in(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# --- One run replaces another ---------------------------------------------------------------------


def test_a_complete_run_replaces_the_files_of_the_old_one_and_no_others(root):
    runs.finish_run(root)
    assert names_in(root) == {*NEW_FILES, *KEPT, "settings.json"}
    assert runs.load_manifest(root)["settings"] == NEW
    assert {(root / name).read_text() for name in NEW_FILES} == {"new"}
    assert not (root / "target_20").exists()
    runs.finish_run(root)  # there is nothing left to do


class Killed(BaseException):
    pass


@pytest.mark.parametrize("sae", ["a", "b"])
@pytest.mark.parametrize("change", range(32))
def test_killed_at_any_change_the_folder_has_one_run_or_none(root, change, sae, monkeypatch):
    """Of the old run, tests of a person's own hypotheses are kept where its SAE is the new one."""
    write_manifest(root / STAGING, NEW, sae)
    mine = ["target_10/my_hypotheses.md", "target_20/my_hypothesis_1_feature_3.png"]
    new = {*NEW_FILES, *KEPT, *(mine if sae == "a" else [])}
    done = []

    def or_die(usual):
        def changed(*given, **named):
            if len(done) == change:
                raise Killed
            done.append(given)
            return usual(*given, **named)

        return changed

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, or_die(getattr(os, name)))
        try:
            runs.finish_run(root)
        except Killed:
            assert len(done) == change
    if (root / "settings.json").exists():
        old = runs.load_manifest(root)["settings"] == OLD
        expected = {*OLD_FILES, *KEPT} if old else new
        assert {name for name in names_in(root) if name[0] != "."} == {*expected, "settings.json"}
        assert (root / (OLD_FILES if old else NEW_FILES)[0]).read_text() == ("new", "old")[old]
    else:
        with pytest.raises(InputError, match="has an unfinished run; the same command again"):
            runs.load_manifest(root)
    begin(root).rmdir()
    assert names_in(root) == {*new, "settings.json"}


def test_the_changes_that_were_killed_are_all(root, monkeypatch):
    done = []
    for name in ("replace", "rename", "unlink", "rmdir"):
        usual = getattr(os, name)
        patched = lambda *given, usual=usual, **named: done.append(usual(*given, **named))  # noqa: E731
        monkeypatch.setattr(os, name, patched)
    runs.finish_run(root)
    assert 20 < len(done) < 32


def test_of_an_interrupted_run_the_latest_whole_stages_are_kept(tmp_path, capsys):
    for n in ("1", "2"):
        staging = begin(tmp_path)
        assert list(staging.iterdir()) == []
        write(staging, ["sae.json", "sae.safetensors", "summary.json"], n)
        write(staging, ["frozen_decoder/sae.safetensors"], n)  # killed before its record
        write(staging, [f"seed_{n}/sae.json", f"seed_{n}/sae.safetensors"], n)
    assert capsys.readouterr().out.count("has an unfinished run") == 1
    begin(tmp_path)
    kept = tmp_path / INTERRUPTED
    stages = ("sae", "seed_1/sae", "seed_2/sae")
    assert names_in(kept) == {f"{name}.{end}" for name in stages for end in ("json", "safetensors")}
    assert [(kept / f"{name}.safetensors").read_text() for name in stages] == ["2", "1", "2"]


def test_files_in_a_folder_without_a_run_stay_unless_the_run_writes_them(tmp_path, capsys):
    mine = ["training.png", "hypotheses.md", "saelens/README.md", "target_1/summary.json"]
    write(tmp_path, [*mine, "sae.json"], "mine")
    write(begin(tmp_path), NEW_FILES, "new")
    shown = " ".join(capsys.readouterr().out.split())
    assert "has files with names of results (hypotheses.md, sae.json, saelens/README.md" in shown
    write_manifest(tmp_path / STAGING, NEW)
    runs.finish_run(tmp_path)
    assert names_in(tmp_path) == {*NEW_FILES, *mine, "settings.json"}
    assert {(tmp_path / name).read_text() for name in mine} == {"mine"}
    assert (tmp_path / "sae.json").read_text() == "new"


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ("saelens", "saelens is a file, but a run writes a folder"),
        ("target_10/frozen_decoder", "frozen_decoder is a file, but"),
        ("training.png/a.txt", "training.png is a folder, but a run writes a file"),
        ("target_10/sae.json/a.txt", "sae.json is a folder, but"),
    ],
)
def test_a_name_that_a_run_cannot_use_is_an_error_before_it(tmp_path, taken, words):
    write(tmp_path, [taken], "mine")
    with pytest.raises(InputError, match=words):
        begin(tmp_path)
    assert names_in(tmp_path) == {taken}


# --- What a folder has, in words ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({}, ""),
        ({"settings": {**OLD, "out": "there", "data": "sample"}}, ""),
        ({"network_sha256": ""}, ""),  # it is not known yet
        ({"settings": {**OLD, "target_actives": None}}, ""),
        ({"settings": {**OLD, "sae_latents": 256}}, "with SAE_LATENTS 512"),
        ({"settings": {**NEW, "seed": 1}}, "with SEED 0, TARGET_ACTIVES 10, 20"),
        ({"settings": {**OLD, "seed": 1}, "data_digest": "x"}, "with SEED 0"),
        ({"data_digest": "x"}, "of other images"),
        ({"network_sha256": "x"}, "of a network with other weights"),
        ({"sae_sha256": {"10": "x"}}, "of another SAE"),
        ({"network": "another"}, "for net"),
        ({"network": "another", "settings": {**OLD, "seed": 1}}, "for net with SEED 0"),
        ({"caller": "explain_sae"}, "of MNIST_SAE_code.py for net"),
        ({"settings": {"seed": 0}}, "of another version of the program"),
    ],
)
def test_results_of_another_run_are_named_before_they_are_replaced(tmp_path, new, words, capsys):
    write_manifest(tmp_path, OLD)
    runs.begin_run(tmp_path, {**manifest(OLD), **new}, str.upper)
    line = f"{tmp_path} has results {words}; they are replaced when this run has finished: give "
    line += "out=" if "caller" in new else "--out"
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == (f"{line} another folder to keep them" if words else "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("settings.json", "{}", "results with a settings.json that cannot be read"),
        ("settings.json", '{"settings": {}}', "results of another version of the program"),
        ("summary.json", "[]", "files with names of results (summary.json)"),
        ("notes.md", "mine", ""),
    ],
)
def test_results_without_a_usable_manifest_are_named(tmp_path, name, content, words, capsys):
    (tmp_path / name).write_text(content)
    begin(tmp_path)
    shown = " ".join(capsys.readouterr().out.split("; they are")[0].split())
    assert shown == (words and f"{tmp_path} has {words}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "no finished run; run MNIST_SAE_code.py --out"),
        ("sweep.json", "a sweep, no finished run"),
        ("sae.json", "an unfinished run, or one SAE of a sweep"),
        (f"{STAGING}/sae.json", "an unfinished run; the same command again finishes it"),
        (f"{INTERRUPTED}/sae.json", "an unfinished run; the same command again finishes it"),
    ],
)
def test_a_folder_without_a_finished_run_is_described(tmp_path, name, message):
    write(tmp_path, [name], "{}")
    with pytest.raises(InputError, match=f"{tmp_path} has {message}"):
        runs.load_manifest(tmp_path)


def test_a_run_of_an_earlier_version_is_named(tmp_path):
    found = manifest(OLD)
    runs.check_version(tmp_path, found, {**OLD, "fresh": False})
    for changed in (
        {**found, "settings": {**OLD, "gone": 1}},
        {**found, "settings": {"seed": 0}},
        {key: found[key] for key in found if key != "classes"},
    ):
        with pytest.raises(InputError, match="of another version of the program; run it again"):
            runs.check_version(tmp_path, changed, OLD)
