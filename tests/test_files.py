"""Locks, strict JSON and saved stages: saexplain.files."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import feature_analysis as fa
from saexplain import files
from saexplain.files import BusyError, InputError, folder_lock, load_cached, load_stage, save_stage

INPUTS = {"seed": 0, "lr": 0.1, "data_digest": "abc"}


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with one saved stage."""
    save_stage(tmp_path, "thing", {"a": torch.arange(6.0).view(2, 3).T}, INPUTS, {"note": "x"})
    return tmp_path


def test_a_stage_made_from_equal_inputs_is_reused(saved, capsys):
    stage = load_cached(saved, "thing", dict(INPUTS), "the thing")
    assert torch.equal(stage.tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert (stage.inputs, stage.record["note"]) == (INPUTS, "x")
    assert stage.digest == files.sha256_of((saved / "thing.safetensors").read_bytes())
    assert capsys.readouterr().out.startswith("reusing the thing: ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "SEED changed 0 -> 1"),
        ({"lr": 0.2, "seed": 1}, "SEED changed 0 -> 1, LR changed 0.1 -> 0.2"),
        ({"data_digest": "x"}, "other images"),
        ({"torch": "3"}, "the version of torch changed 2 -> 3"),
        ({"network_sha256": "x"}, "another network or layer"),
        ({"positions": 8}, "another kind of layer"),
        (
            {key: 7 for key in "abcdef"},
            f"{', '.join(f'{key} changed 1 -> 7' for key in 'ABCD')} and 2 more",
        ),
        ({"head_kl": 0.25}, "it is of another version of the program"),
    ],
)
def test_what_changed_is_a_line_before_the_retraining(tmp_path, changes, line, capsys):
    inputs = INPUTS | {"torch": "2", "network_sha256": "n"} | dict.fromkeys("abcdef", 1)
    save_stage(tmp_path, "thing", {"a": torch.zeros(3)}, inputs, {})
    given = (tmp_path, "thing", inputs | changes)
    assert load_cached(*given, "the thing", str.upper) is None
    assert capsys.readouterr().out == f"{line}: retraining the thing\n"
    assert load_cached(*given) is None  # a further SAE of a run, which has named it already
    assert capsys.readouterr().out == ""


def test_without_a_stage_or_with_fresh_there_is_none_and_nothing_to_explain(saved, capsys):
    assert load_cached(saved, "nothing", INPUTS) is None
    assert load_cached(saved, "thing", INPUTS, "the thing", fresh=True) is None
    assert capsys.readouterr().out == ""


def cut_tensors(folder):
    path = folder / "thing.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def replace_tensors(folder):
    """As an interruption between the two files leaves them."""
    record = (folder / "thing.json").read_bytes()
    save_stage(folder, "thing", {"a": torch.zeros(3)}, INPUTS, {})
    (folder / "thing.json").write_bytes(record)


@pytest.mark.parametrize(
    "damage",
    [
        cut_tensors,
        replace_tensors,
        lambda folder: (folder / "thing.safetensors").unlink(),
        *(
            lambda folder, content=content: (folder / "thing.json").write_text(content)
            for content in ("", "{", "[]", "null", "{}", '{"sha256": 1, "inputs": []}', "\x00")
        ),
    ],
)
def test_a_damaged_stage_is_explained_and_made_again(saved, damage, capsys):
    damage(saved)
    expected = "damaged" if (saved / "thing.safetensors").exists() else "incomplete"
    with pytest.raises(InputError, match=rf"thing\.safetensors .* {expected}.*run again"):
        load_stage(saved, "thing")
    assert load_cached(saved, "thing", INPUTS, "the thing") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf".*thing\.safetensors .* {expected}.*: retraining the thing", line)


def test_a_stage_that_is_being_replaced_is_none(saved, monkeypatch):
    """Killed after the tensors were written, there is no record of others beside them."""

    def write(path, content, usual=fa.write_whole):
        usual(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(fa, "write_whole", write)
    with pytest.raises(KeyboardInterrupt):
        save_stage(saved, "thing", {"a": torch.zeros(3)}, INPUTS, {})
    assert [path.name for path in saved.iterdir()] == ["thing.safetensors"]
    assert load_cached(saved, "thing", INPUTS) is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for content in (b"new", b"replaced"):
            fa.write_whole(tmp_path / "file", content)
            assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"replaced"]


def test_json_is_strict_and_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json({"a": math.nan})
    path = tmp_path / "record.json"
    with pytest.raises(InputError, match=r"cannot be written to .*--out"):
        files.prepare_folder(Path(files.__file__))
    path.write_bytes(files.to_json({"a": [1.5, None]}))
    assert files.read_json(path) == {"a": [1.5, None]}
    path.write_bytes(b"{")
    for bad in (path, tmp_path / "missing.json"):
        with pytest.raises(InputError, match=str(bad)):
            files.read_json(bad)


def test_only_one_writer_has_the_lock_which_ends_with_an_error(tmp_path):
    folder = tmp_path / "made"

    def fail() -> None:
        with folder_lock(folder):
            folder_lock(folder).__enter__()

    for _ in range(2):  # the error frees the folder
        with pytest.raises(BusyError, match=rf"process {os.getpid()} since"):
            fail()
    assert not (folder / files.WRITER).exists()


def test_unfinished_files_are_removed_and_nothing_else(tmp_path):
    inside = tmp_path / "target_5"
    inside.mkdir()
    for folder in (tmp_path, inside):
        for name in (f".sae.json.x{fa.UNFINISHED}", ".mine", "sae.json"):
            (folder / name).touch()
    with folder_lock(tmp_path):
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".mine", "sae.json", files.LOCK, files.WRITER}


HOLDER = """
import sys, time
from pathlib import Path
from saexplain.files import folder_lock
with folder_lock(Path(sys.argv[1]), wait=sys.argv[2] == "wait"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_writer_frees_the_folder_for_one_that_waits(tmp_path):
    def start(how: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), how]
        root = Path(fa.__file__).parent
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)

    with start("now") as first:
        assert first.stdout.readline() == "locked\n"
        waiting = start("wait")
        try:
            with pytest.raises(BusyError, match=f"process {first.pid} since"):
                folder_lock(tmp_path).__enter__()
            first.send_signal(signal.SIGKILL)
            line = waiting.stdout.readline()
            if line.startswith("waiting:"):  # unless it came after the kill
                line = waiting.stdout.readline()
            assert line == "locked\n"
        finally:
            first.kill()
            waiting.kill()
            waiting.communicate()
