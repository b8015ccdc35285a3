"""Seconds and peak memory up to a million rows and 16,384 latents, and how they grow.

    python tests/benchmark_large.py                          # some ten minutes on two cores
    python tests/benchmark_large.py --rows 1000 10000 --latents 256 512

Rows (128 numbers each, sparse combinations of 512 directions) are written to a file and mapped into
memory; every case is a process of its own, in one thread. The SAEs of all parts but training are
untrained, with 20 active features per row. Exit status 2 when an argument cannot be used.

seconds     Of the processor, which what else it does disturbs less than those of a clock. Start of
            training: coordinates and first weights, from all rows. One pass: the mean of a few
            steps on rows drawn from all, half of them with the classifier's logits, times the steps
            of a pass over all rows. Removals and firing together: of all rows, with 20 features per
            row spread evenly. Calibration, usage, bank, activity: timed on the first rows, at most
            --entries rows x latents, and scaled up; matching: 1,024 features against all others,
            on at most --entries / 16,384 rows, and scaled up. `share timed` says how much was not
            scaled; 1 is all. Nearest features takes no rows.
            `~rows`, `~latents`: exponents of growth, seconds ~ rows^a latents^b, least squares in
            logarithms. What compares all pairs of features (firing together, nearest, matching)
            grows with their number: there, b is of the seconds per feature.
peak MiB    The largest that the process was, all parts included. The file's own pages count as long
            as the system keeps them in memory: `of it file` is the size of what was mapped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import benchmark  # which also says where the driver is
import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
import MNIST_SAE_code as driver

D_IN, CLASSES, DIRECTIONS, SPARSE = 128, 10, 512, 10
TARGET = 20  # mean active features per row
STEPS = 12  # of training, timed after two that are not
PAIRS = ("firing together", "nearest features", "matching")  # each with each


class Plain(NamedTuple):
    """A model whose images are their own preactivations."""

    head: Tensor  # (D_IN, CLASSES)

    def preactivations(self, rows: Tensor) -> Tensor:
        return rows

    def logits_from_preactivations(self, z: Tensor) -> Tensor:
        return z @ self.head


def synthetic_rows(n: int) -> Iterator[tuple[Tensor, None]]:
    """A loader of n rows (B, D_IN)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, D_IN, generator=generator)
    for first in range(0, n, fa.HEAD_ROWS):
        size = (min(fa.HEAD_ROWS, n - first), DIRECTIONS)
        active = torch.rand(size, generator=generator) < SPARSE / DIRECTIONS
        codes = torch.rand(size, generator=generator) * active
        noise = 0.05 * torch.randn(size[0], D_IN, generator=generator)
        yield codes @ directions + noise, None


def full_activity(n: int, d_sae: int) -> fa.Activity:
    """TARGET different features for each of n rows, in even steps from a random one."""
    first = torch.randint(d_sae, (n, 1), generator=torch.Generator().manual_seed(1))
    feature = (first + torch.arange(TARGET) * (d_sae // TARGET)) % d_sae
    order = torch.argsort(feature.flatten(), stable=True)
    start = torch.bincount(feature.flatten(), minlength=d_sae).cumsum(0)
    start = torch.nn.functional.pad(start, (1, 0))
    return fa.Activity(start, order // TARGET, torch.ones(n * TARGET), torch.arange(n) % CLASSES)


class Case:
    """Everything that is timed with so many rows z (N, D_IN) and latents. `found`: of each part its
    name, its seconds and the share of its work that was timed rather than scaled up."""

    def __init__(self, z: Tensor, d_sae: int, entries: int):
        self.z, self.entries = z, entries
        self.settings = driver.Settings(sae_latents=d_sae, target_actives=(TARGET,))
        self.model = Plain(torch.eye(D_IN, CLASSES))
        self.sae = benchmark.random_sae(z[: fa.HEAD_ROWS], d_sae, 0)
        self.layer = fa.ExplainedLayer(self.model, self.sae, torch.zeros(D_IN), torch.ones(D_IN))
        self.found: list[tuple[str, float, float]] = []

    def add(self, what: str, work, share: float = 1.0):
        started = time.process_time()
        result = work()
        seconds = time.process_time() - started
        self.found.append((what, seconds / share, share))
        return result

    def training(self) -> None:
        z, settings = self.z, self.settings
        generator = torch.Generator().manual_seed(0)
        given = (z, self.model.logits_from_preactivations, TARGET, settings, generator)
        training = self.add("start of training", partial(driver.SAETraining, *given))
        steps = driver.n_steps(len(z), settings.batch_sae, 1)
        plan = list(itertools.islice(driver.batches(len(z), settings.batch_sae, 9, generator), 14))

        def some(first: int, last: int) -> None:
            for number in range(first, last):
                training.step(plan[number], number, (number - 1.5) / STEPS)

        some(0, 2)
        self.add("training, one pass", partial(some, 2, 2 + STEPS), STEPS / steps)

    def rows_of_latents(self) -> None:
        """What goes through all activations once."""
        d_sae = self.settings.sae_latents
        z = self.z[: max(1, self.entries // d_sae)]
        share, labels = len(z) / len(self.z), torch.arange(len(z)) % CLASSES
        loader = fa.batches_of(z, labels)
        shift = partial(driver.threshold_shift, self.sae, z, TARGET)
        self.add("calibration", shift, share)
        self.add("usage", partial(driver.feature_usage, self.sae, z), share)
        self.add("mean actives", partial(driver.mean_actives, self.sae, z), share)
        bank = partial(fa.collect_feature_bank, self.model, loader, *self.layer[1:])
        self.add("bank", bank, share)
        self.add("activity", partial(fa.collect_activity, self.layer, z, labels), share)

    def pairs(self) -> None:
        d_sae = self.settings.sae_latents
        activity = full_activity(len(self.z), d_sae)
        self.add("removals", partial(fa.removal_effects, self.layer, self.z, activity))
        self.add("firing together", partial(fa.firing_together, activity, 5))
        del activity
        self.add("nearest features", partial(fa.nearest_features, self.sae.W_dec))
        some = driver.JumpReLUSAE(D_IN, min(fa.MATCHED, d_sae)).requires_grad_(False)
        for name, value in self.sae.state_dict().items():
            part = value[:, : fa.MATCHED] if name == "W_enc" else value
            getattr(some, name).copy_(part[: len(getattr(some, name))])
        rows = self.z[: max(1, self.entries // 2**14)]
        share = len(rows) / len(self.z) * len(some.threshold) / d_sae
        match = partial(fa.match_features, self.layer._replace(sae=some), rows, self.sae)
        self.add("matching", match, share)


def run_case(file: str, rows: int, latents: int, entries: int) -> str:
    """One case, in this process: its parts and its peak in MiB, as JSON."""
    z = torch.from_file(file, shared=True, size=rows * D_IN).view(rows, D_IN)
    with driver.torch_threads(1), torch.no_grad():
        case = Case(z, latents, entries)
        case.training()
        case.rows_of_latents()
        case.pairs()
    usage = benchmark.resource.getrusage(benchmark.resource.RUSAGE_SELF)
    return json.dumps({"parts": case.found, "peak": benchmark.mebibytes(usage.ru_maxrss)})


def write_rows(file: str, rows: int) -> str:
    """The file of synthetic rows; seconds, as JSON."""
    started = time.process_time()
    with driver.torch_threads(1):
        model, loader = Plain(torch.empty(0)), synthetic_rows(rows)
        driver.memory_mapped_preactivations(model, loader, file)
    return json.dumps(time.process_time() - started)


def in_process(*case: object) -> object:
    """What a process of its own finds. Raises CommandError when it fails."""
    command = [sys.executable, __file__, "--case", *map(str, case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise benchmark.CommandError(f"{' '.join(command)} ended with status {done.returncode}")
    print(" ".join(command[3:]), done.stdout.strip(), file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def exponents(sizes: Sequence[tuple[int, int]], values: Sequence[float]) -> tuple[float, float]:
    """Of rows and of latents in values ~ rows^a latents^b; 0 for a size that does not vary."""
    logs = np.log(np.array(sizes, dtype=float))
    design = np.column_stack([logs - logs.mean(0), np.ones(len(logs))])
    found = np.linalg.lstsq(design, np.log(values), rcond=None)[0]
    return float(found[0]), float(found[1])


def tables(sizes: Sequence[tuple[int, int]], cases: Sequence[dict]) -> dict[str, list]:
    """Seconds, shares and memory, each with a column for every case."""
    titles = [f"{rows:,} x {latents:,}" for rows, latents in sizes]
    found: dict[str, list] = {"seconds": [], "share timed": [], "peak MiB": []}
    for parts in zip(*(case["parts"] for case in cases), strict=True):
        what, seconds = parts[0][0], [part[1] for part in parts]
        each = [latents if what in PAIRS else 1 for _, latents in sizes]
        a, b = exponents(sizes, np.divide(seconds, each))
        columns = {**dict(zip(titles, seconds, strict=True)), "~rows": a, "~latents": b}
        found["seconds"].append(benchmark.Row(what, columns))
        shares = [part[2] for part in parts]
        found["share timed"].append(benchmark.Row(what, dict(zip(titles, shares, strict=True))))
    peaks = [case["peak"] for case in cases]
    a, b = exponents(sizes, peaks)
    mapped = [rows * D_IN * 4 / 2**20 for rows, _ in sizes]
    for what, values, grows in (("all parts", peaks, (a, b)), ("of it file", mapped, (None, None))):
        columns = dict(zip(titles, values, strict=True))
        columns |= {"~rows": grows[0], "~latents": grows[1]}
        found["peak MiB"].append(benchmark.Row(what, columns))
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = driver.OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--latents", type=int, nargs="+", default=[512, 4096, 16384])
    add("--entries", type=int, default=2**29, help="rows x latents that a part is timed on")
    add("--json", default="benchmark_large.json", help="where the tables are written as JSON")
    # What a process of ours is given: a file with its rows, and the latents of the case, if any.
    add("--case", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if min(given.rows) < 2000 or min(given.latents) <= TARGET or given.entries < 2**14:
        parser.error(f"--rows from 2000, --latents above {TARGET}, --entries from {2**14}")
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    if given.case:
        file, *sizes = given.case
        rows, *latents = map(int, sizes)
        print(run_case(file, rows, *latents, given.entries) if latents else write_rows(file, rows))
        return
    sizes = list(itertools.product(given.rows, given.latents))
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own: what this one held would count as the peak of its children.
        path = f"{folder}/z.f32"
        print(f"the file: {in_process(path, max(given.rows)):.1f} seconds", flush=True)
        more = ["--entries", given.entries]
        cases = [in_process(path, *size, *more) for size in sizes]
    found = tables(sizes, cases)
    for title, rows in found.items():
        benchmark.show(title, rows)
    record = {title: [{"what": r.what, **r.columns} for r in rows] for title, rows in found.items()}
    Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (driver.InputError, benchmark.CommandError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
