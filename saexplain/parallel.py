"""Where does work run? Threads of torch, worker processes, and ranks on several machines.

    with Workers(1) as workers:
        tasks = [workers.start("baselines", function, *args) for args in many]
        results = workers.results(tasks)  # in their order, wherever they ran

Takes functions with their arguments; gives their results, which do not depend on the number of
workers. Small matrices are multiplied by one thread, which other processes cannot stall; further
cores take whole tasks. It knows nothing of what the functions compute, and writes no files.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import cloudpickle
import torch

from saexplain.files import InputError

MAX_WORKERS = 7  # each holds a few hundred MB, and a run has few tasks at a time
PARENT_CHECKED_EVERY = 1.0  # seconds between two looks of a worker at whether its parent lives
RANK_TIMEOUT = timedelta(days=7)  # one rank may train for so long while others wait


class WorkerError(RuntimeError):
    """A worker process ended before its task did; the message says what to do."""


def available_cores() -> int:
    """Number of cores this process may use, or of all cores where the system reports only those."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers often get fewer than the machine has
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

    def __init__(self) -> None:
        self.started = time.perf_counter()
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


# --------------------------------------------------------------------------------------------------
# Worker processes
# --------------------------------------------------------------------------------------------------

_parent: int | None = None  # in a worker, the id of the process that started it


def in_worker() -> bool:
    """Whether this process is a worker, which must not draw progress bars of its own."""
    return _parent is not None


def _start_worker(parent: int) -> None:
    """Runs first in every worker; `parent` is the id of the process that it works for."""
    global _parent
    if in_worker():
        return
    _parent = parent
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers

    def end_with_parent() -> None:  # which may be killed without a chance to end its workers
        while os.getppid() == parent:
            time.sleep(PARENT_CHECKED_EVERY)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first moment on."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _timed(function: Callable, args: tuple) -> tuple[object, float]:
    """The function's result, and the seconds that it took."""
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started


def _run_pickled(task: bytes) -> bytes:
    """The pickled result of `_timed` with its pickled arguments.

    Tensors that are not pickled by hand go through shared memory, of which containers have little.
    """
    return cloudpickle.dumps(_timed(*pickle.loads(task)))


@dataclass(eq=False)
class Task:
    """A function with its arguments, and the worker's promise of a result."""

    name: str  # under which its seconds are counted
    function: Callable
    args: tuple
    future: Future | None = None  # of `_run_pickled`; None: it runs in this process
    seconds: float = 0.0  # that it took, once its result is there


class Workers:
    """Runs tasks in n worker processes while this process goes on; a context manager.

    A task that no worker has begun when its result is needed is run here, and without workers all
    are: the results are the same. Functions and classes of a notebook can be sent, too.
    """

    def __init__(self, n: int):
        n = worker_count(n)
        self.seconds: dict[str, float] = {}  # by name of the tasks, wherever they ran
        self.processes = self.threads = None
        if n:
            # With psutil, loky restarts workers that grow by 300 MB, as by many images, and each
            # restart imports torch anew.
            os.environ.setdefault("LOKY_MAX_MEMORY_LEAK_SIZE", str(2**50))
            from loky import ProcessPoolExecutor  # a tenth of a second that not every run needs

            # The pool of processes would queue tasks ahead, and none in its queue can be taken
            # back. So one thread for each worker hands over a task when a worker is free.
            with _ctrl_c_ignored():
                given = {"initializer": _start_worker, "initargs": (os.getpid(),)}
                self.processes = ProcessPoolExecutor(n, **given)
                started = self.processes.submit(os.getpid)  # starts all, which import torch
            self.threads = ThreadPoolExecutor(n, initializer=started.exception)  # waits for it

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self.processes:
            self.threads.shutdown(wait=False, cancel_futures=True)
            self.processes.shutdown(wait=False, kill_workers=True)

    def start(self, name: str, function: Callable, *args, here: bool = False) -> Task:
        """Let a worker run `function(*args)`; with `here`, leave it until its result is needed."""
        task = Task(name, function, args)
        if self.processes and not here:
            pickled = cloudpickle.dumps((function, args))  # now: the caller may change args later
            task.future = self.threads.submit(self._run_in_worker, pickled)
        return task

    def _run_in_worker(self, pickled: bytes) -> bytes:
        return self.processes.submit(_run_pickled, pickled).result()

    def results(self, tasks: Sequence[Task]) -> list:
        """The results of `tasks`, in their order; those that no worker has begun are run here, the
        last one first.

        Raises what the functions raise, and WorkerError when a worker process was ended.
        """
        found = {}
        for task in reversed(tasks):
            if task.future is None or task.future.cancel():
                found[task] = _timed(task.function, task.args)
        for task in tasks:
            if task not in found:
                try:
                    found[task] = pickle.loads(task.future.result())
                except BrokenProcessPool as error:
                    raise WorkerError(
                        f"a worker process ended early, while it ran {task.name!r}, perhaps for "
                        f"lack of memory; use fewer --workers, or --workers 0"
                    ) from error
            task.seconds = found[task][1]
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + task.seconds
        return [found[task][0] for task in tasks]


def worker_count(asked: int) -> int:
    """Number of worker processes: as asked, or for -1 one for each further core of this rank."""
    if asked >= 0:
        return asked
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, set by torchrun
    return min(max(available_cores() // ranks_here - 1, 0), MAX_WORKERS)


# --------------------------------------------------------------------------------------------------
# Ranks: copies of the script that torchrun started, here or on other machines
# --------------------------------------------------------------------------------------------------


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """(rank, number of ranks) of this process, from torchrun's environment; without it (0, 1).

    Ranks exchange only small records, over gloo. Raises InputError where they cannot connect.
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
            f"WORLD_SIZE is {world}, but the ranks cannot connect ({reason}); start them with "
            f"torchrun, or unset WORLD_SIZE for a run of one process"
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
