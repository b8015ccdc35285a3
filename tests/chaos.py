"""Does a run hold? Killed at every step and at any moment, on a full disk, beside another one.

    python tests/chaos.py            # everything, in about twenty minutes
    python tests/chaos.py --short    # a part of it, within two minutes
    python tests/chaos.py --fuzz     # 2,000 odd inputs to each reader (tests/test_fuzz.py)

Each trial starts a small run over a finished one of other settings and disturbs it. Then nothing
that `load_run` still believes may be mixed; the same command again must end with status 0; and the
files must equal, byte for byte and timings aside, those of a run that nobody disturbed. Trials are
forked from one process, which spares the imports; they need Linux or macOS.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from test_end_to_end import files_of

import MNIST_SAE_code as driver

TINY = """--data sample --sae-latents 12 --hidden-units 16 --target-actives 2 --epochs-sae-final 1
--epochs-ffn 1 --batch-sae 512 --batch-ffn 512 --features 1 --stability-seeds 0""".split()
BEFORE = [*TINY, "--seed", "1", "--workers", "0"]  # has statements; was finished when all begins
PLAIN = [*TINY, "--no-hypotheses", "--workers", "0"]
STATED = [*TINY, "--workers", "0"]
SIZES = [0, 100, 1000, 3000, 6000, 12_000, 25_000, 50_000, 100_000, 400_000]  # bytes in a file


class Trials:
    """Runs disturbed ones in `folder`, each over a fresh copy of the same finished run."""

    def __init__(self, place: Path):
        self.folder, self.finished = place / "run", place / "finished"
        self.said = ""  # by the last run
        self.expected: dict[tuple, dict[str, bytes]] = {}  # files by flags
        self.failed: list[str] = []
        self.count = 0
        assert self.forked(BEFORE) == 0, self.said
        self.folder.rename(self.finished)
        for flags in (PLAIN, STATED):
            self.renew()
            started = time.perf_counter()
            assert self.forked(flags) == 0, self.said
            self.seconds = time.perf_counter() - started
            self.expected[tuple(flags)] = self.files()

    def renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.finished, self.folder)

    def files(self) -> dict[str, bytes]:
        """What must be equal: all but the locks, and what was kept of earlier stages."""
        found = files_of(self.folder)
        return {n: c for n, c in found.items() if Path(n).name != ".lock" and ".kept-" not in n}

    def forked(self, flags: list[str], disturb: Callable = lambda: None) -> int:
        """The status of a run in a process of its own, in which `disturb` is called first; minus
        the signal that ended it."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                for stream in (1, 2):
                    os.dup2(theirs, stream)
                os.close(theirs)
                sys.argv = ["run", *flags, "--out", str(self.folder)]
                disturb()
                status = driver.run_script()
                sys.stdout.flush()
                os._exit(status)
            os._exit(99)
        os.close(theirs)
        with open(ours, encoding="utf-8") as reader:
            self.said = reader.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def started(self, flags: list[str]) -> subprocess.Popen:
        """The script as a person starts it, with a worker."""
        script = [sys.executable, driver.__file__, *flags, "--workers", "1"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*script, "--out", str(self.folder)], **pipes)

    def check(self, what: str, flags: list[str], wrong: str = "") -> None:
        """After a disturbance: is what is believed true, and does the same command mend it?"""
        self.count += 1
        wrong = wrong or self.believed()
        if not wrong and (status := self.forked(flags)):
            wrong = f"the rerun ended with {status}: {self.said[-300:]}"
        if not wrong:
            expected, found = self.expected[tuple(flags)], self.files()
            names = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
            wrong = f"other files: {names}" if names else ""
        if wrong:
            self.failed.append(f"{what}: {wrong}")
            print(f"FAILED {self.failed[-1]}", flush=True)

    def believed(self) -> str:
        """What is wrong with what load_run gives, if it gives anything."""
        try:
            run = driver.load_run(str(self.folder))
        except driver.InputError:
            return ""
        made_by = [tuple(flags) for flags in (PLAIN, STATED)]
        if run.settings.seed == 1:
            true = (self.finished / "sae.safetensors").read_bytes()
        else:
            true = self.expected[made_by[run.settings.hypotheses]]["sae.safetensors"]
        same = torch.equal(run.sae.W_dec, driver.safetensors.torch.load(true)["W_dec"])
        return "" if same else "load_run believes networks of another run"


def die_before(step: int) -> Callable:
    """SIGKILL instead of the step-th change of a name on disk."""
    left = [step]

    def deadly(change: Callable) -> Callable:
        def changed(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return changed

    def disturb() -> None:
        os.replace, os.unlink = deadly(os.replace), deadly(os.unlink)
        Path.unlink = lambda self, missing_ok=False: _unlink(self, missing_ok)

    return disturb


def _unlink(path: Path, missing_ok: bool) -> None:
    with contextlib.suppress(*[FileNotFoundError] * missing_ok):
        os.unlink(path)


def killed_at_steps(trials: Trials, every: int) -> None:
    for flags in (STATED, PLAIN):
        step, status = 1, -signal.SIGKILL
        while status == -signal.SIGKILL:
            trials.renew()
            status = trials.forked(flags, die_before(step))
            if status == -signal.SIGKILL:
                trials.check(f"killed before change {step} of {flags[-3]}", flags)
            elif status:
                trials.check("steps", flags, f"ended with {status} at step {step}")
            step += every


def killed_at_random(trials: Trials, n: int, number: int, draw: random.Random) -> None:
    """`number` is the signal; SIGTERM must be answered with one line, too."""
    for _ in range(n):
        trials.renew()
        after = draw.uniform(0, 4 + trials.seconds)
        process = trials.started(STATED[:-2])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.send_signal(number)
        _, said = process.communicate()
        odd = number == signal.SIGTERM and process.returncode == 143 and said.count("\n") != 1
        trials.check(f"signal {number} after {after:.2f} s", STATED, f"it said {said}" * odd)


def limited(size: int) -> Callable:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disks(trials: Trials, every: int) -> None:
    """No file may grow beyond a size: what a full disk looks like to whoever writes."""
    for size in SIZES[::every]:
        trials.renew()
        status = trials.forked(STATED, limited(size))
        said = trials.said
        odd = status not in (0, 2) or said.count("error: ") != (status == 2) or "Traceback" in said
        trials.check(f"files up to {size} bytes", STATED, f"{status}, {said[-300:]}" * odd)


def two_writers(trials: Trials, n: int, draw: random.Random) -> None:
    """Of two at once one is refused; when it waits instead, it has the last word."""
    for _ in range(n):
        trials.renew()
        pair = [trials.started(STATED[:-2]), trials.started(BEFORE[:-2])]
        ended = sorted(process.wait() for process in pair)
        trials.check("two writers", STATED, f"they ended with {ended}" * (ended != [0, 2]))
        trials.renew()
        first = trials.started(BEFORE[:-2])
        time.sleep(draw.uniform(3, 4))
        second = trials.started([*STATED[:-2], "--wait"])
        ended = [first.wait(), second.wait()]
        trials.check("a second one that waits", STATED, f"{ended}" * (ended != [0, 0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a part of it, within two minutes")
    parser.add_argument("--fuzz", action="store_true", help="odd inputs instead of bad moments")
    parser.add_argument("--random", type=int, default=25, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    if args.fuzz:
        test = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_fuzz.py"))]
        return subprocess.run(test, env={**os.environ, "FUZZ_EXAMPLES": "2000"}).returncode

    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    n = 2 if args.short else args.random
    with tempfile.TemporaryDirectory() as place:
        trials = Trials(Path(place))
        parts = {
            "two writers": lambda: two_writers(trials, 1 if args.short else 4, draw),
            "killed at any moment": lambda: killed_at_random(trials, n, signal.SIGKILL, draw),
            "terminated": lambda: killed_at_random(trials, n, signal.SIGTERM, draw),
            "full disk": lambda: full_disks(trials, 5 if args.short else 1),
            "killed before a change": lambda: killed_at_steps(trials, 8 if args.short else 1),
        }
        for name, part in parts.items():
            before, started = (trials.count, len(trials.failed)), time.perf_counter()
            part()
            n_tried, n_failed = trials.count - before[0], len(trials.failed) - before[1]
            seconds = time.perf_counter() - started
            print(f"{name:24} {n_tried - n_failed} of {n_tried} held, {seconds:.0f} s", flush=True)
    return 1 if trials.failed else 0


if __name__ == "__main__":
    sys.exit(main())
