"""Does a run survive what machines do? Kills, a second writer, a full disk; then it runs again.

    python bench/chaos.py            # some 110 disturbed runs, about eight minutes
    python bench/chaos.py --short    # seven, within a minute

Each disturbance meets a tiny run that replaces a finished one of another seed. Afterwards load_run
must open one of the two with all its files, or where the files were being replaced find an
unfinished run; the same command must end with status 0 and the files of an undisturbed run. Exit
status: 1 when anything failed, otherwise 0.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "MNIST_SAE_code.py"
sys.path.insert(0, str(SCRIPT.parent))

import torch  # noqa: E402

from MNIST_SAE_code import InputError, load_run  # noqa: E402

TINY = """--data sample --sae-latents 12 --hidden-units 16 --target-actives 2 --epochs-sae-final 1
--epochs-ffn 1 --batch-sae 512 --batch-ffn 512 --features 1 --stability-seeds 0
--workers 0 --seed""".split()
NEW, OLD = [*TINY, "0"], [*TINY, "1"]  # a run, and the finished one that it replaces
SIZES = [5000, 0, 100, 1000, 12_000, 25_000, 50_000, 100_000]  # bytes a file may have: a full disk
TIMED = re.compile(rb'"diagnoses": ?\[.*?\]|"seconds": ?\{.*?\}', re.DOTALL)  # a diagnosis is, too


def script(flags: list[str], output: int, disturb: Callable) -> None:
    """The body of a forked process: the script as a person starts it, disturbed."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [SCRIPT.name, *flags]
    disturb()
    runpy.run_path(str(SCRIPT), run_name="__main__")


class Chaos:
    """Disturbed runs in one folder, each over a fresh copy of the finished run."""

    def __init__(self, place: Path):
        self.folder, self.finished = place / "run", place / "finished"
        self.expected, self.n, self.failed = {}, 0, 0  # files by seed
        self.seeds = ""  # of what load_run opened after each disturbance, "-": nothing
        for flags in (NEW, OLD):  # each in a fresh folder
            started = time.perf_counter()
            self.start(flags)()
            self.seconds = time.perf_counter() - started
            self.expected[load_run(self.folder).settings.seed] = self.files()
            if flags is NEW:
                self.folder.rename(place / "new")
        shutil.copytree(self.folder, self.finished)

    def start(self, flags: list[str], disturb: Callable = lambda: None) -> Callable:
        """Start a run; what is returned waits for it, and gives its exit status and output."""
        reader, writer = os.pipe()  # holds 64 KB, more than any output
        given = ([*flags, "--out", str(self.folder)], writer, disturb)
        process = multiprocessing.get_context("fork").Process(target=script, args=given)
        process.start()
        os.close(writer)

        def wait(seconds: float | None = None, number: int = signal.SIGKILL) -> tuple[int, str]:
            process.join(seconds)
            if process.is_alive():
                os.kill(process.pid, number)
            process.join()
            return process.exitcode, os.fdopen(reader).read()

        return wait

    def files(self) -> dict[str, bytes]:
        """Name and content of every file but locks, without timings."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {str(p.relative_to(self.folder)): TIMED.sub(b"", p.read_bytes()) for p in paths}

    def check(self, what: str, wrong: object) -> None:
        """Print and count what failed: `wrong`, or what is found now; then start over."""
        found = {name: content for name, content in self.files().items() if name[0] != "."}
        try:
            seed = load_run(self.folder).settings.seed
            wrong = wrong or (found != self.expected[seed] and "the files are not of one run")
            self.seeds += str(seed)
        except InputError as error:
            wrong = wrong or ("an unfinished run; the same" not in str(error) and error)
            self.seeds += "-"
        status, output = self.start(NEW)()
        wrong = wrong or (status and f"the same command ended with {status}: {output[-300:]}")
        other = sorted({name for name, _ in self.files().items() ^ self.expected[0].items()})
        wrong = wrong or (other and f"other files: {other}")
        self.n, self.failed = self.n + 1, self.failed + bool(wrong)
        print(f"FAILED {what}: {wrong}" if wrong else f"ok     {what}", flush=True)
        shutil.rmtree(self.folder)
        shutil.copytree(self.finished, self.folder)


def die_before(change: int) -> None:
    """SIGKILL instead of the renaming or removal of a file or folder with this number."""
    numbers = itertools.count(1)

    def hook(event: str, _: tuple) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir") and next(numbers) == change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def disturbances(chaos: Chaos, short: bool, draw: random.Random) -> Iterator[tuple[str, object]]:
    """Disturb one run after another; what was done, and what was wrong with how the run ended."""
    for change in (20, 60) if short else itertools.count(1):
        status, output = chaos.start(NEW, partial(die_before, change))()
        yield f"killed before change {change} of a file", status > 0 and output[-300:]
        if status == 0:  # there are no further changes
            break
    for number in (signal.SIGKILL, signal.SIGTERM) * (1 if short else 10):
        seconds = draw.uniform(0, chaos.seconds)
        status, output = chaos.start(NEW)(seconds, number)
        odd = status not in (0, -number) or "Traceback" in output
        yield f"{number.name} after {seconds:.2f} s", odd and output[-300:]
    for further, expected in (([], [0, 2]), (["--wait"], [0, 0])):
        both = [chaos.start([*flags, *further]) for flags in (OLD, NEW)]
        ended = sorted(wait()[0] for wait in both)
        yield f"two writers {further} end with {expected}", ended != expected and ended
    import resource  # here, because Windows lacks it

    for size in SIZES[:1] if short else SIZES:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        status, output = chaos.start(NEW, limit)()
        fine = status == 2 and output.count("error: ") == 1 and "Traceback" not in output
        yield f"files of at most {size} bytes", status and not fine and output[-300:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="seven disturbed runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        print("skipped: this system cannot fork")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        chaos = Chaos(Path(place))
        for what, wrong in disturbances(chaos, args.short, random.Random(args.seed)):
            chaos.check(what, wrong)
    print(f"{chaos.n - chaos.failed} of {chaos.n} disturbed runs ended well, seed {args.seed}")
    print(f"the seed of the run that load_run opened in between: {chaos.seeds}")
    return int(chaos.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
