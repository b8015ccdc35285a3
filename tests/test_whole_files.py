"""Files that are whole, one writer at a time, and JSON that is what it should be."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import pytest

import whole_files as wf


def test_a_durable_file_and_its_name_are_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    wf.write_whole(tmp_path / "file", b"content", durable=True)
    assert (tmp_path / "file").read_bytes() == b"content"
    expected = [(tmp_path / "file").stat().st_ino]
    if os.name != "nt":
        expected.append(tmp_path.stat().st_ino)
    assert synced == expected
    wf.write_whole(tmp_path / "file", b"quick")
    assert synced == expected


KILLED = """
import os, signal, sys
from pathlib import Path
import whole_files as wf
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
wf.write_whole(Path(sys.argv[1]) / "file", b"half")
"""


def python(code: str, *arguments: object, **more) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(wf.__file__)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **more)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    inside = tmp_path / "target_5"
    inside.mkdir()
    for folder in (tmp_path, inside):
        assert python(KILLED, folder).wait() == -signal.SIGKILL
        (folder / ".mine").write_text("kept")
    assert [len(list(folder.iterdir())) for folder in (tmp_path, inside)] == [3, 2]
    wf.remove_unfinished(tmp_path)
    assert len(list(inside.iterdir())) == 2
    wf.remove_unfinished(tmp_path, "target_*/")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".mine", "target_5", "target_5/.mine"}


HOLDER = """
import sys, time
from pathlib import Path
import whole_files as wf
with wf.only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_writer_is_told_who_is_the_first(tmp_path):
    with python(HOLDER, tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        told = rf"is being written to by process {first.pid} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(wf.BusyError, match=told), wf.only_writer(tmp_path):
            pass
        first.kill()
    with wf.only_writer(tmp_path):  # the death of a process frees its lock
        assert f"process {os.getpid()} " in (tmp_path / wf.WRITER).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [wf.LOCK]


def test_a_writer_that_waits_begins_when_the_first_one_ends(tmp_path, capsys):
    with python(HOLDER, tmp_path) as first:
        first.stdout.readline()
        waiting = python(HOLDER.replace("argv[1])", "argv[1]), wait=True"), tmp_path)
        assert f"waiting: {tmp_path} is being written to by" in waiting.stdout.readline()
        first.kill()
        assert waiting.stdout.readline() == "held\n"
        waiting.kill()
        waiting.wait()


def sleep_long() -> None:
    time.sleep(60)


def test_a_lock_does_not_live_on_in_the_processes_that_its_holder_started(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    with wf.only_writer(tmp_path):
        child = spawn.Process(target=sleep_long)
        child.start()
    with wf.only_writer(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()


def test_an_error_while_writing_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), wf.only_writer(tmp_path):
        raise ZeroDivisionError
    with wf.only_writer(tmp_path):
        pass


class Point(NamedTuple):
    x: float
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    points: list[Point]
    closed: bool
    colour: str | None


GOOD = {"points": [{"x": 1, "names": ["a"]}, {"x": 2.5, "names": []}], "closed": True}
GOOD |= {"colour": None, "more": 1}


def test_json_becomes_the_kinds_asked_for():
    shape = Shape([Point(1, ("a",)), Point(2.5, ())], True, None)
    assert wf.read_json(json.dumps(GOOD).encode(), Shape) == shape
    assert wf.as_kind(GOOD, {"closed": bool, "points": list[Any]}) == GOOD
    assert wf.as_kind({"a": [1], "b": []}, dict[str, tuple[int, ...]]) == {"a": (1,), "b": ()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"points": {}}, "it.points is {}, not a list"),
        ({"points": [[]]}, r"it.points\[0\] is \[\], not an object"),
        ({"points": [{"x": 1}]}, r"it.points\[0\] has no 'names'"),
        ({"points": [{"x": True, "names": []}]}, "x is True, not float"),
        ({"points": [{"x": 10**400, "names": []}]}, "x is 1000.*, not a finite number"),
        ({"closed": 1}, "it.closed is 1, not bool"),
        ({"colour": 3}, "it.colour is 3, not str"),
    ],
)
def test_json_of_other_kinds_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        wf.as_kind({**GOOD, **change}, Shape)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "not a list"),
        (b"[NaN]", "it holds NaN"),
        (b"[1e999]", r"it\[0\] is inf, not a finite number"),
        (b"\xff", "utf-8"),
        (b"[" + b"9" * 5000 + b"]", "limit"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_not_strict_json_is_refused(content, told):
    with pytest.raises(ValueError, match=told):
        wf.read_json(content, list[float])
