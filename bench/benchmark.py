"""How long does a run take, stage by stage, how much of it is arithmetic, and how does it grow?

    python bench/benchmark.py --data DIR                        # the default settings, three runs
    python bench/benchmark.py --latents 512 2048 8192           # and how each stage grows
    python bench/benchmark.py --vs "python old.py --out {out}"  # the whole command against another
    python bench/benchmark.py --rows                            # SAE training alone, on rows
    python bench/benchmark.py --ranks 2                         # and on two ranks of this machine

All but --vs and --ranks runs in one thread, without worker processes. Titles say over how many runs
a number is the median.

stages     Seconds of each stage of a run with default settings, as its summary.json has them.
           `growth` is b in seconds ~ latents^b, from the least to the most latents.
SAE step   A training on 4,096 rows, divided by its steps; its start, some 3%, is included. GFLOP
           are operations in matrix products, as torch.utils.flop_counter counts them; `of product`
           compares GFLOP/s with a large product in one thread. The rest is memory traffic, sorting,
           the optimizer and Python.
command    Both commands take turns, each in a process of its own and a fresh folder in the place of
           {out}; the ratio is taken pair by pair.
rows       Rows per second of a core in SAE training, 1,024 rows a step, beside a plain ReLU SAE
           written here and overcomplete's TopK SAE where it is installed. The trainers take turns
           on the same rows; `own / it` is the ratio of seconds, pair by pair. Seconds are those
           that the core worked, so that other programs do not count. MB: growth of a fresh process
           beyond its rows. And what that is for ImageNet.
ranks      A training of about --seconds on one rank and on several, in turn. Where other programs
           take the cores, only the seconds that a core worked count.
"""

import argparse
import io
import math
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import training_rows
from torch.utils.flop_counter import FlopCounterMode

import MNIST_SAE_code as driver
from saexplain.activations import collect_activations
from saexplain.files import InputError
from saexplain.images import load_images
from saexplain.parallel import available_cores, torch_threads

STEP_ROWS = 4096  # that the timed training steps draw from
SIDES = {"cpu": 768, "cuda": 8192}  # of the square matrices whose product gives the machine's rate
PRODUCTS = 50  # of which the fastest counts
WIDTHS = ((128, 1024), (384, 3072), (768, 6144))  # of a CNN's block, ViT-S, ViT-B; with latents
OWN = f"{shlex.quote(sys.executable)} {shlex.quote(driver.__file__)} --out {{out}}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print rows, a title for each and numbers of four digits; None is a dash."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        return "-" if value is None else str(value)

    lines = [["", *columns], *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, *cells in lines:
        numbers = [text.rjust(width) for text, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *numbers]), flush=True)


def seconds_of(work: Callable, device: torch.device) -> float:
    """Seconds until the device has finished `work`."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def growth(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """b in values ~ sizes^b, from the first and the last; None for a single size."""
    if len(sizes) == 1:
        return None
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def product_rate(device: torch.device) -> float:
    """GFLOP/s of a large float32 matrix product; prints it for one thread and for all."""
    side, cores = SIDES[device.type], available_cores()
    a, rates = torch.rand(side, side, device=device), []
    for n in (1, cores):
        with torch_threads(n):
            seconds = min(seconds_of(lambda: a @ a, device) for _ in range(PRODUCTS))
        rates.append(2 * side**3 / seconds / 1e9)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}")
    best = " and ".join(f"{rate:.0f}" for rate in rates)
    print(f"1 and {cores} threads: {best} GFLOP/s, best of {PRODUCTS} products of {side} rows")
    return rates[0]


def time_stages(settings: dict[int, driver.Settings], n: int) -> None:
    """Print the seconds of each stage, a column for each number of latents."""
    found = {}
    for latents, own in settings.items():
        flags = ["--data", own.data, "--device", own.device, "--seed", str(own.seed)]
        flags += ["--sae-latents", str(latents), "--workers", "0"]
        found[latents] = []
        for _ in range(n):
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                (record,) = driver.main([*flags, "--out", folder])
            found[latents].append(record["seconds"])
    rows = []
    for stage in record["seconds"]:
        seconds = [median(run[stage] for run in runs) for runs in found.values()]
        rows.append([stage, *seconds, growth(list(found), seconds)])
    columns = [f"{latents} latents" for latents in found]
    print_table(f"stages: seconds, median of {n} runs", [*columns, "growth"], rows)


def time_steps(settings: dict[int, driver.Settings], n: int, rate: float) -> None:
    """Print milliseconds and arithmetic of a training step, a row for each number of latents."""
    own, *_ = settings.values()
    device = driver.pick_device(own.device)
    data = load_images(own.data, own.seed, device)
    model, _ = driver.train_classifier(data.train, own, len(data.classes))
    layer = collect_activations(model, data, own.normalize_z)
    z = layer.standardize(layer.splits["train"].raw)[:STEP_ROWS]
    rows, ms = [], []
    for latents, own in settings.items():
        short = replace(own, epochs_sae_final=1)
        train = partial(driver.train_sae, z, layer.logits_of_z, own.target_actives[0], short)
        with FlopCounterMode(display=False) as counter:
            steps = train()[1][-1]["step"] + 1
        seconds = median(seconds_of(train, device) for _ in range(n)) / steps
        ms.append(1000 * seconds)
        gflop = counter.get_total_flops() / steps / 1e9
        share = f"{gflop / seconds / rate:.0%}"
        b = growth(list(settings)[: len(ms)], ms)
        rows.append([f"{latents} latents", ms[-1], gflop, gflop / seconds, share, b])
    columns = ["ms", "GFLOP", "GFLOP/s", "of product", "growth"]
    print_table(f"SAE step: median of {n} trainings of {steps} steps", columns, rows)


def time_command(command: str) -> float:
    """Seconds of a command in a fresh folder. Raises InputError unless it ends with status 0."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word.replace("{out}", folder) for word in shlex.split(command)]
        started = time.perf_counter()
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.perf_counter() - started
    if done.returncode:
        last = " ".join(done.stdout.split())[-200:]
        raise InputError(f"{command!r} must end with status 0, got {done.returncode}: {last}")
    return seconds


def compare_commands(commands: Sequence[str], n: int) -> None:
    """Print the seconds of two commands that take turns, and their ratio."""
    seconds = ([], [])
    for number in range(n):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[which].append(time_command(commands[which]))
    ratios = [second / first for first, second in zip(*seconds, strict=True)]
    parts = {"first": seconds[0], "second": seconds[1], "second / first": ratios}
    rows = [[name, median(runs), min(runs), max(runs)] for name, runs in parts.items()]
    print(f"first:  {commands[0]}\nsecond: {commands[1]}")
    print_table(f"seconds, {n} runs of each in turn", ["median", "least", "most"], rows)


def time_rows(n: int) -> None:
    """Print what SAE training on rows takes, for each of WIDTHS, and a projection."""
    rates = {}
    for width, latents in WIDTHS:
        table = training_rows.measure_trainers(width, latents, n)
        rates[width, latents] = table[0][1]
        title = f"{width} wide, {latents:,} latents: median of {n} turns of {training_rows.STEPS}"
        print_table(f"{title} steps", ["rows/s", "own / it", "MB"], table)
    print()
    for size in training_rows.PROJECTED:
        print("\n".join(training_rows.projection(*size, rates[size])), flush=True)


def time_ranks(ranks: int, seconds: float, n: int) -> None:
    """Print the seconds of SAE training on one rank and on several, and their ratio."""
    found = training_rows.measure_ranks(ranks, *WIDTHS[0], seconds, n)
    rows = [[name, median(runs), min(runs), max(runs)] for name, runs in found.items()]
    print_table(f"ranks, {n} runs of each in turn", ["median", "least", "most"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", default="auto", help="folder of images in MNIST's format, 'sample' or 'auto'")
    add("--latents", type=int, nargs="+", default=[512], help="numbers of SAE features (512)")
    add("--runs", type=int, default=3, help="runs behind each number (3)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--vs", metavar="COMMAND", help="time only whole commands: --command against this one")
    add("--command", default=OWN, help="the first of the two (MNIST_SAE_code.py)")
    add("--rows", action="store_true", help="time only SAE training on rows")
    add("--ranks", type=int, default=1, help="time only SAE training on so many ranks")
    add("--seconds", type=float, default=60, help="about, of the training with --ranks (60)")
    args = parser.parse_args()
    try:
        if args.vs:
            compare_commands((args.command, args.vs), max(1, args.runs))
        if args.rows:
            with torch_threads(1):
                time_rows(max(1, args.runs))
        if args.ranks > 1:
            time_ranks(args.ranks, args.seconds, max(1, args.runs))
        if args.vs or args.rows or args.ranks > 1:
            return 0
        given = {"data": args.data, "device": args.device, "seed": args.seed}
        settings = {d: driver.Settings(sae_latents=d, **given) for d in sorted(set(args.latents))}
        with torch_threads(1):
            rate = product_rate(driver.pick_device(args.device))
            time_stages(settings, max(1, args.runs))
            time_steps(settings, max(1, args.runs), rate)
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
