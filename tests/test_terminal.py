"""What a terminal, a pipe and a notebook show of a run: saexplain.progress, .console and .flags."""

import io
import itertools
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import BARE
from test_images import write_set

import MNIST_SAE_code as driver
from saexplain import console, progress
from saexplain.files import InputError, read_json
from saexplain.flags import build_parser, check_fields, setting
from saexplain.parallel import Stopwatch, Workers

SCRIPT = driver.__file__
NAMES = [f"ספרה {c} \N{CAT}" for c in range(10)]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, and keeps what a screen shows of it."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines, each as the characters after a carriage return overwrote it."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """To be stdout, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


# --- Stages ---------------------------------------------------------------------------------------


def take_items(clock: Stopwatch) -> None:
    with clock("sae"):
        for i in progress.progress_bar(range(4), "items", 4):
            if i == 2:
                print("in between")
            for line in progress._lines:  # a busy machine may let its thread wait
                line.refresh()
        clock.result = "L0 4.0"


def test_a_terminal_shows_a_moving_line_for_each_stage_and_one_that_stays(terminal):
    with redirect_stdout(terminal), progress.safe_output():
        take_items(Stopwatch(shown=True))
    between, stays, end = terminal.screen
    assert between == "in between"
    assert re.fullmatch(r"SAE +\d\.\d s  L0 4\.0", stays)
    assert end == ""
    drawn = re.findall(r"SAE +[\d.]+ s +(\d+)% \|.*?\| items (\d) of 4", terminal.getvalue())
    assert len(set(drawn)) >= 3
    assert all(int(percent) == 25 * int(n) for percent, n in drawn)
    assert all(len(part) < 80 for part in re.split("[\r\n]", terminal.getvalue()))


def test_elsewhere_each_stage_is_one_line(capsys):
    clock = Stopwatch(shown=True, label="target 20")
    with progress.safe_output():
        take_items(clock)
        take_items(Stopwatch())
        with clock("page"):
            clock.result = "4 MB, " + 100 * "x"
    between, line, again, page = capsys.readouterr().out.splitlines()
    assert between == again == "in between"
    assert re.fullmatch(r"SAE +\d\.\d s  target 20: L0 4\.0", line)
    assert len(page) == 100
    assert page.endswith("x ...")
    assert list(clock.seconds) == ["sae", "page"]


def test_an_inner_loop_takes_the_line_over_and_gives_it_back(terminal):
    with redirect_stdout(terminal), progress.live_line("outer"):
        line = progress._lines[-1]
        for n, _ in enumerate(progress.progress_bar("abc", "letters", 3)):
            assert (line.n, line.total, line.what) == (n, 3, "letters")
            for _ in progress.progress_bar(range(5), "digits", 5):
                assert (line.total, line.what) == (5, "digits")
        assert line.total is None
        with progress.live_line("inner"):
            assert progress._lines == [line]
    assert progress._lines == []
    assert terminal.screen == [""]


def test_text_without_a_newline_follows_the_live_line(terminal):
    with redirect_stdout(terminal), progress.safe_output():
        with progress.live_line("SAE"):
            print("one\ntwo", end="")
        print(" three")
        with progress.live_line("SAE"):
            print("four", end="")
    assert terminal.screen == ["one", "two three", "four"]


def test_a_stage_that_fails_leaves_no_line(terminal):
    clock = Stopwatch(shown=True)
    with redirect_stdout(terminal), pytest.raises(InputError), clock("sae"):
        raise InputError("no")
    assert terminal.screen == [""]
    assert progress._lines == []


def print_and_warn() -> int:
    import warnings

    print("printed", flush=True)
    for _ in progress.progress_bar(range(3), "items", 3):
        warnings.warn("of a library", stacklevel=1)
    return 3


def test_a_worker_draws_nothing_and_its_lines_are_printed_with_its_result(capfd):
    with Workers(1) as workers:
        task = workers.start("print", print_and_warn)
        task.future.result()
        assert capfd.readouterr() == ("", "")
        assert workers.results([task]) == [3]
        assert capfd.readouterr() == ("printed\n", "")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo terminals")
def test_the_script_shows_something_before_pytorch_is_loaded_and_no_broken_line(tmp_path):
    import pty

    terminal, other = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, *BARE, "--workers", "1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=other, stderr=other, env=environment) as process:
        os.close(other)
        parts = []
        while True:
            try:
                parts.append(os.read(terminal, 65536))
            except OSError:  # Linux: the other end is closed
                break
            if not parts[-1]:
                break
    os.close(terminal)
    assert process.returncode == 0
    screen = Terminal()
    screen.write(b"".join(parts).decode().replace("\r\n", "\n"))
    assert screen.getvalue().lstrip("\r").startswith("loading PyTorch")
    stages = list(itertools.takewhile(bool, screen.screen))
    assert [line.split()[0] for line in stages[:4]] == ["data", "classifier", "activations", "SAE"]
    assert all(re.match(r"[\w ]{18} *\d+\.\d s", line) for line in stages)
    # Where a line is drawn, it is not wrapped
    assert all(len(part) <= 80 for part in screen.getvalue().split("\r") if "\n" not in part)


# --- Results --------------------------------------------------------------------------------------


def print_results(run: Path, verbose: bool = False, **changed) -> None:
    """Print what the terminal shows of a finished run, with changes in each feature's record."""
    (record,) = read_json(run / "summary.json")
    report = [{**entry, **changed} for entry in read_json(run / "feature_report.json")]
    console.print_results(run, {run: record}, [report], verbose)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_result_is_40_lines_of_100_characters(finished, encoding):
    caption = " ".join(30 * NAMES) + "\x1b[2J\n"
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    with redirect_stdout(stream), progress.safe_output():
        print_results(finished, caption=caption)
    lines = stream.buffer.getvalue().decode(encoding).splitlines()
    assert 20 < len(lines) <= 40
    assert all(len(line) <= 100 or line.strip().startswith(str(finished)) for line in lines)
    assert "\x1b" not in "".join(lines)
    first = next(line for line in lines if "ספרה" in line or "05e1" in line)
    assert ("\\u05e1" in first) == (encoding == "ascii")


def test_a_result_has_the_numbers_of_the_record(finished, capsys):
    (record,) = read_json(finished / "summary.json")
    print_results(finished)
    text = capsys.readouterr().out
    shown = dict(re.findall(r"^  +(\S.*?)  +([\d.]+%?)  +\w+ \w+$", text, re.MULTILINE))
    network = f"{record['baseline_acc']:.2%}"
    assert shown["images classified right by the network"] == network
    assert shown["variance that the SAE loses (FVU)"] == f"{record['fvu']:.4f}"
    sets = record["hypotheses"]["summaries"]
    best = max(s["agreement_hypotheses"] for name, s in sets.items() if name != "SAE")
    assert shown["by those of the best baseline"] == f"{best:.2%}"
    for k in record["top_features"]:
        assert re.search(rf"^ *{k} +[\d.]+%  \w", text, re.MULTILINE)
    for d in record["diagnoses"]:
        assert (f"  {d['complaint']}: " in text) != d["fine"]
    assert "on or off, scaled" not in text
    print_results(finished, verbose=True)
    assert "on or off, scaled" in capsys.readouterr().out


@pytest.mark.parametrize("n", [4, 7, 10])
def test_several_targets_are_columns_and_many_are_lines(finished, tmp_path, capsys, n):
    (record,) = read_json(finished / "summary.json")
    targets = [str(target) for target in range(11, 11 + n)]
    records = {tmp_path / f"t{t}": {**record, "target_actives": t} for t in targets}
    console.print_results(tmp_path, records, [[]] * len(records))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(len(line.replace(str(tmp_path), "")) for line in lines) <= 100
    if n == 4:
        assert next(line for line in lines if "target" in line).split() == ["target", *targets]
    else:
        assert [line.split()[1] for line in lines if re.match(r"target \d", line)] == targets


# --- Output never stops a run ---------------------------------------------------------------------


@pytest.mark.slow
def test_python_without_docstrings_runs():
    command = [sys.executable, "-OO", SCRIPT, "--help"]
    found = subprocess.run(command, capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    assert b"--my-hypotheses" in found.stdout


@pytest.mark.slow
def test_names_that_stdout_cannot_encode_are_written_as_escapes(tmp_path):
    """In a whole run, without docstrings."""
    data = write_set(tmp_path / "data")
    (data / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    out = tmp_path / "פלט \N{CAT}"
    flags = [*BARE, "--data", data, "--out", out]
    command = [sys.executable, "-OO", SCRIPT, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, env=environment, capture_output=True)
    assert (found.returncode, found.stderr) == (0, b"")
    assert rb"\u05e4\u05dc\u05d8 \U0001f408" in found.stdout
    assert read_json(out / "settings.json")["classes"] == NAMES


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_a_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, SCRIPT, *BARE, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")
    assert (tmp_path / "settings.json").exists()


def test_a_stream_that_breaks_is_left_alone_and_stdout_is_restored():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with redirect_stdout(Broken()) as broken:
        with progress.safe_output():
            print("one")
            print("two")
            assert not sys.stdout.is_open
        assert sys.stdout is broken


@pytest.mark.parametrize(
    ("error", "kept"),
    [(BlockingIOError(11, "full"), "02"), (OSError(28, "no space left"), "0"), (ValueError, "0")],
)
def test_an_error_that_passes_loses_one_text_and_another_all_that_follow(error, kept):
    class Failing(io.StringIO):
        def write(self, text):
            if text == "1\n":
                raise error
            return super().write(text)

    stream = progress.SafeStream(Failing())
    for n in range(3):
        stream.write(f"{n}\n")
    assert stream.stream.getvalue().split() == list(kept)


# --- Flags ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Two:
    size: int = setting(3, "how large, in %", 1)
    fast: bool = setting(True, "whether fast")

    def __post_init__(self) -> None:
        check_fields(self)


def test_each_group_of_flags_has_its_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        driver.parse_runs(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    groups = re.findall(r"^(\S.*):\n +example: \S+ (--\S+)", text, re.MULTILINE)
    assert [title for title, _ in groups] == [*driver.GROUPS, "a sweep"]
    for f in fields(driver.Settings):
        assert f"--{f.name.replace('_', '-')}" in text
    for example, _ in driver.GROUPS.values():
        driver.parse_runs(example.split())


def test_flags_are_made_from_a_dataclass():
    groups = {"all": ("--size 4", "size fast")}
    parser = build_parser(Two, groups, None)
    assert vars(parser.parse_args(["--size", "4", "--no-fast"])) == {"size": 4, "fast": False}
    assert "how large, in % (default: 3)" in parser.format_help()
    assert "whether fast (default: yes)" in parser.format_help()
    with pytest.raises(InputError, match=r"unrecognized arguments: --slow \(--help lists"):
        parser.parse_args(["--slow"])
    with pytest.raises(ValueError, match="add fast"):
        build_parser(Two, {"some": ("--size 4", "size")}, None)
    with pytest.raises(InputError, match="--size must be at least 1, got 0"):
        Two(size=0)
