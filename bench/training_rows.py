"""How many rows a second does SAE training take, beside other trainers, and over ranks?

Behind `benchmark.py --rows` and `--ranks`: see there. Rows are synthetic: sparse combinations of
directions, as an activation store has them, so that no network and no images are needed.
"""

import ctypes
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import MNIST_SAE_code as driver
from saexplain.parallel import ONE_PROCESS, Ranks, open_ranks, shard_of, torch_threads
from saexplain.rows import TrainingRows, mean_and_std

POSITIONS = 8  # of each image
TARGET = 20  # active features per row
STEPS = driver.SCHEDULE.auxiliary_every  # between two turns: one of them has an auxiliary loss
IMAGENET = 1_281_167  # training images
PROJECTED = {(384, 3072): "ViT-S", (768, 6144): "ViT-B"}  # width and latents, by name
LR_PLAIN, L1_PLAIN = 1e-3, 1e-3  # of the plain trainer


def synthetic_raw(n: int, width: int) -> Tensor:
    """raw (n, POSITIONS, width), float32: a twentieth of 2 width directions in each row."""
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * width, width, generator=rng) / math.sqrt(width)
    raw = torch.empty(n * POSITIONS, width)
    for part in raw.split(1024):
        codes = torch.randn(len(part), 2 * width, generator=rng) - 1.645
        torch.mm(codes.relu_(), directions, out=part)
    return raw.view(n, POSITIONS, width)


def rows_of(n: int, width: int, ranks: Ranks = ONE_PROCESS) -> TrainingRows:
    raw = synthetic_raw(n, width)[shard_of(n, ranks)]
    return TrainingRows(raw, *mean_and_std(raw, ranks), ranks=ranks)


def settings_of(latents: int) -> driver.Settings:
    return driver.Settings(target_actives=(TARGET,), sae_latents=latents)


# --------------------------------------------------------------------------------------------------
# Trainers: each call takes STEPS steps, of the same rows in the same number
# --------------------------------------------------------------------------------------------------


def indices(rows: TrainingRows) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return rows.batches(driver.BATCH_SAE, 10**9, generator)


def own_trainer(rows: TrainingRows, latents: int) -> Callable[[], None]:
    """The trainer of MNIST_SAE_code.py."""
    trainer, plan = driver.SAETrainer(rows, TARGET, settings_of(latents)), indices(rows)
    counted = iter(range(trainer.steps))

    def take_steps() -> None:
        for _ in range(STEPS):
            trainer.step(next(counted), rows.batch(next(plan)))

    return take_steps


def plain_trainer(rows: TrainingRows, latents: int) -> Callable[[], None]:
    """A ReLU SAE with an L1 loss and unit decoder rows, autograd and torch.optim.Adam."""
    encoder = torch.nn.Linear(rows.d_in, latents)
    decoder = torch.nn.Linear(latents, rows.d_in)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR_PLAIN)
    plan = indices(rows)

    def take_steps() -> None:
        for _ in range(STEPS):
            z = standardized(rows, next(plan))
            acts = encoder(z).relu()
            loss = (decoder(acts) - z).square().mean() + L1_PLAIN * acts.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                decoder.weight.div_(decoder.weight.norm(dim=0, keepdim=True))

    return take_steps


def overcomplete_trainer(rows: TrainingRows, latents: int) -> Callable[[], None]:
    """The TopK SAE and the training loop of overcomplete (Fel et al. 2025), without its logs."""
    from overcomplete.sae import TopKSAE, train_sae

    sae = TopKSAE(rows.d_in, nb_concepts=latents, top_k=TARGET)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR_PLAIN)
    plan = indices(rows)

    def error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def take_steps() -> None:
        some = (standardized(rows, next(plan)) for _ in range(STEPS))
        train_sae(sae, some, error, optimizer, nb_epochs=1, monitoring=0)

    return take_steps


def standardized(rows: TrainingRows, index: Tensor) -> Tensor:
    return ((rows.raw[index] - rows.mu) / rows.std).flatten(0, 1)


def trainers() -> dict[str, Callable]:
    """By name, those that this machine has."""
    found = {"own": own_trainer, "plain": plain_trainer}
    try:
        import overcomplete  # noqa: F401
    except Exception as error:  # it needs other versions of its dependencies, or is not here
        print(f"overcomplete is left out: {' '.join(str(error).split())[:80]}")
    else:
        found["overcomplete"] = overcomplete_trainer
    return found


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def resident(name: str) -> float:
    """MB in memory, now (VmRSS) or at most (VmHWM), as Linux reports them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def peak_memory(make: Callable, n: int, width: int, latents: int) -> float | None:
    """MB by which a fresh process grows beyond its rows, from the trainer's start to its end; None
    where the system does not report them."""
    if sys.platform != "linux":
        return None
    with torch_threads(1):
        rows = rows_of(n, width)
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not returned would hide growth
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most is now what it is now
        make(rows, latents)()
        return resident("VmHWM") - before


def measure_trainers(width: int, latents: int, turns: int) -> list[list]:
    """A row of the table for each trainer: rows per second of a core, over those of the own
    trainer pair by pair, MB."""
    n = 16 * driver.BATCH_SAE
    rows, made = rows_of(n, width), trainers()
    turn = {name: make(rows, latents) for name, make in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(turns + 1):
        order = list(turn) if number % 2 == 0 else list(turn)[::-1]
        for name in order:
            started = time.process_time()  # of this process: what others run does not count
            turn[name]()
            seconds[name].append(time.process_time() - started)
    taken = STEPS * driver.BATCH_SAE * POSITIONS
    table = []
    for name, make in made.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            memory = fresh.submit(peak_memory, make, n, width, latents).result()
        own, its = seconds["own"][1:], seconds[name][1:]  # the first turn warms up
        ratio = median(a / b for a, b in zip(own, its, strict=True))
        table.append([name, taken / median(its), ratio, memory])
    return table


def projection(width: int, latents: int, rate: float) -> list[str]:
    """What SAE training on ImageNet takes, in words with their arithmetic."""
    rows = IMAGENET * POSITIONS
    seconds, gflop = rows / rate, rows * 10 * width * latents / 1e9
    return [
        f"{PROJECTED[width, latents]}, {width} wide, {latents:,} latents, one pass over ImageNet: "
        f"{IMAGENET:,} images x {POSITIONS} positions = {rows:,} rows",
        f"    {rows:,} rows / {rate:,.0f} rows per second of a core = {seconds / 3600:.1f} hours",
        f"    5 products of 2 x {width} x {latents} operations a row = {gflop / 1e6:.2f} PFLOP; "
        f"{gflop / seconds:.0f} GFLOP/s measured",
        f"    store: {rows:,} rows x {width} x 2 bytes = {rows * width * 2 / 1e9:.1f} GB",
    ]


# --------------------------------------------------------------------------------------------------
# Ranks
# --------------------------------------------------------------------------------------------------


def train_on_rank(n: int, width: int, latents: int, steps: int) -> None:
    """What each rank runs; prints its seconds and its core's seconds for the steps."""
    with open_ranks() as ranks, torch_threads(1):
        rows = rows_of(n, width, ranks)
        trainer, plan = driver.SAETrainer(rows, TARGET, settings_of(latents)), indices(rows)
        ranks.barrier()
        started, on_core = time.perf_counter(), time.process_time()
        for step in range(steps):
            trainer.step(step, rows.batch(next(plan)))
        ranks.barrier()
        print(time.perf_counter() - started, time.process_time() - on_core)


def time_ranks(world: int, n: int, width: int, latents: int, steps: int) -> tuple[float, float]:
    """Seconds, and the most that a rank's core worked, of a training on that many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = f"train_on_rank({n}, {width}, {latents}, {steps})"
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})"
    command = [sys.executable, "-c", f"{code}; import training_rows as t; t.{call}"]
    running = []
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    said = [process.communicate()[0].split() for process in running]
    return max(float(wall) for wall, _ in said), max(float(core) for _, core in said)


def measure_ranks(
    world: int, width: int, latents: int, seconds: float, turns: int
) -> dict[str, list[float]]:
    """Seconds, and those of the busiest core, with one rank and with `world`, and their ratios."""
    n = 32 * driver.BATCH_SAE
    probe, _ = time_ranks(1, n, width, latents, 20)
    steps = max(20, round(20 * seconds / probe))
    print(f"{steps} steps of {driver.BATCH_SAE * POSITIONS} rows")
    runs = {1: [], world: []}
    for number in range(turns):
        for ranks in runs if number % 2 == 0 else reversed(runs):
            runs[ranks].append(time_ranks(ranks, n, width, latents, steps))
    found = {}
    for i, what in enumerate(("seconds", "seconds of a core")):
        one, many = ([run[i] for run in runs[ranks]] for ranks in (1, world))
        found[f"{what}, 1 rank"], found[f"{what}, {world} ranks"] = one, many
        found[f"{what}, ratio"] = [b / a for a, b in zip(one, many, strict=True)]
    return found
