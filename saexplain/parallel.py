"""How is work spread over cores, processes and machines? Worker processes, threads and ranks.

    with Workers(1) as workers:
        tasks = [workers.start(function, *args) for args in many]
        results = workers.results(tasks)       # in their order, wherever they ran

Small matrices are multiplied by one thread, which other processes cannot stall; further cores take whole
tasks. Results do not depend on how many there are.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from saexplain.files import InputError

MAX_WORKERS = 7  # each holds a few hundred MB, and a run has few tasks at a time
RANK_TIMEOUT = timedelta(days=7)  # one rank may train for so long while others wait


def available_cores() -> int:
    """Number of cores this process may use, where the system says so; otherwise all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """torch with n threads, and as it was afterwards.

    Two threads wait for each other at every small product: little gain on idle cores, ten times
    slower when something else uses one of them. With one, results do not depend on the machine's
    number of cores either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopwatch:
    """Seconds per stage; where the device works asynchronously, a stage ends when its work does."""

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self.seconds: dict[str, float] = {}

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        passed = time.perf_counter() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + passed


@dataclass(eq=False)
class Task:
    """A function with its arguments, and the worker's promise of a result."""

    name: str  # under which its seconds are counted
    function: Callable
    args: tuple
    future: Future | None = None


def _start_worker() -> None:
    torch.set_num_threads(1)


def _run_pickled(task: bytes) -> bytes:
    """Pickled by hand: tensors would otherwise go through shared memory, of which containers have
    little."""
    import cloudpickle

    function, args = pickle.loads(task)
    started = time.perf_counter()
    result = function(*args)
    return cloudpickle.dumps((result, time.perf_counter() - started))


class Workers:
    """Runs tasks in worker processes while this process goes on; a context manager.

    A task that no worker has begun when its result is needed is run here, and without workers all
    are: the results are the same. Functions and classes of a notebook can be sent (cloudpickle).
    """

    def __init__(self, n: int):
        from loky import ProcessPoolExecutor  # a tenth of a second that not every import needs

        self.seconds: dict[str, float] = {}  # by name of the tasks, wherever they ran
        self.pool = ProcessPoolExecutor(n, initializer=_start_worker) if n else None
        if self.pool:
            for _ in range(n):  # starts the processes, which import what they will need
                self.pool.submit(_start_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(wait=False, kill_workers=True)

    def start(self, name: str, function: Callable, *args, here: bool = False) -> Task:
        """Let a worker run `function(*args)`; with `here`, leave it until its result is needed."""
        import cloudpickle

        task = Task(name, function, args)
        if self.pool and not here:
            task.future = self.pool.submit(_run_pickled, cloudpickle.dumps((function, args)))
        return task

    def results(self, tasks: Sequence[Task]) -> list:
        """The results of `tasks`, in their order; those that no worker has begun are run here, the
        last one first. Raises what the functions raise."""
        found = {}
        for task in reversed(tasks):
            if task.future is None or task.future.cancel():
                started = time.perf_counter()
                found[task] = task.function(*task.args), time.perf_counter() - started
        for task in tasks:
            if task not in found:
                found[task] = pickle.loads(task.future.result())
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + found[task][1]
        return [found[task][0] for task in tasks]


def worker_count(asked: int) -> int:
    """Number of worker processes: as asked, or for -1 one for each further core of this rank."""
    if asked >= 0:
        return asked
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(available_cores() // ranks_here - 1, 0), MAX_WORKERS)


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """(rank, number of ranks) of this process, which torchrun's environment says; without it (0, 1).

    Ranks exchange only small records, over gloo. Raises InputError where they cannot meet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    try:
        torch.distributed.init_process_group("gloo", timeout=RANK_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the {world} ranks of WORLD_SIZE cannot meet ({reason}); start them with torchrun, "
            f"and unset WORLD_SIZE for a run on its own"
        ) from error
    try:
        yield torch.distributed.get_rank(), world
    finally:
        torch.distributed.destroy_process_group()


def gather_from_ranks(value: object) -> list:
    """The values of all ranks, in their order, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
