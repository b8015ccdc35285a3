"""Where does work run? Devices and threads of torch, worker processes, ranks on several machines.

    with Workers(1) as workers:
        tasks = [workers.start("baselines", function, *args) for args in many]
        results = workers.results(tasks)  # in their order, wherever they ran

Takes functions with their arguments; gives their results, which do not depend on the number of
workers. Small matrices are multiplied by one thread, which other processes cannot stall; further
cores take whole tasks. It knows nothing of what the functions compute, and writes no files.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

from saexplain.files import InputError, folder_lock
from saexplain.progress import live_line, progress_bar, safe_output, stage_words

MAX_WORKERS = 7  # each holds a few hundred MB, and a run has few tasks at a time
CGROUP = Path("/sys/fs/cgroup")  # of a container on Linux
MEMORY_SHARE = 1 / 4  # of the available memory that one split may fill
PARENT_CHECKED_EVERY = 1.0  # seconds between two looks of a worker at whether its parent lives
RANK_TIMEOUT = timedelta(days=7)  # one rank may train for so long while others wait


class WorkerError(RuntimeError):
    """A worker process ended before its task did; the message says what to do."""


def available_cores() -> int:
    """Number of cores this process may use, or of all cores where the system reports only those."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers often get fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(device: torch.device) -> int:
    """Bytes that this rank may use there now: its part of the GPU's or the machine's free memory,
    within the limit of a container; 4 GiB where the system does not know."""
    found = []
    with suppress(OSError, LookupError, ValueError):  # Linux alone knows what it could free
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
        found.append(1024 * int(kilobytes))
    with suppress(OSError, ValueError):  # in a container that has a limit, which else is "max"
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    free = min(found, default=2**32) // environment_number("LOCAL_WORLD_SIZE")
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def pick_device(name: str) -> torch.device:
    """The device of that name; for 'auto' the best of this machine. Raises InputError."""
    try:
        device = torch.device(name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
            make_deterministic(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({reason}); try --device cpu") from error


def make_deterministic(device: torch.device) -> None:
    """On a GPU, have torch use only algorithms that repeat their results."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products need it
        torch.use_deterministic_algorithms(True)


@contextmanager
def default_torch_state() -> Iterator[None]:
    """float32, full precision and gradients, whatever the caller has switched on or off."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


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
    """Seconds per stage; where the device works asynchronously, a stage ends when its work does.

    With `shown`, a live line is shown of a stage, and a line of each finished one, with its
    `result`, which may be set inside of the stage; it begins with `label`.
    """

    def __init__(self, shown: bool = False, label: str = "") -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.shown, self.label, self.result = shown, label, ""

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started, self.result = time.perf_counter(), ""
        with live_line(stage) if self.shown else nullcontext():
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        passed = time.perf_counter() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + passed
        if self.shown and (self.result or passed > 0.05):
            number = ": ".join(filter(None, (self.label, self.result)))
            print(stage_words(stage, passed, number), flush=True)


# --------------------------------------------------------------------------------------------------
# Worker processes
# --------------------------------------------------------------------------------------------------

# cloudpickle sends torch.classes with a function of the script that reads data.classes, and cannot.
copyreg.pickle(type(torch.classes), lambda module: (import_module, (module.__name__,)))

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


@contextmanager
def _library_warnings_ignored() -> Iterator[None]:
    """Processes started inside show no Python warnings, on which a user cannot act."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        yield
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def _timed(function: Callable, args: tuple) -> tuple[object, float, str]:
    """The function's result, the seconds that it took, and an empty text."""
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started, ""


def _run_pickled(task: bytes) -> bytes:
    """The pickled result of `_timed` with its pickled arguments, and in place of the empty text
    what was printed, which would break a live line if a worker wrote it.

    Tensors that are not pickled by hand go through shared memory, of which containers have little.
    """
    with redirect_stdout(io.StringIO()) as printed:
        result, seconds, _ = _timed(*pickle.loads(task))
    return cloudpickle.dumps((result, seconds, printed.getvalue()))


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
            with _ctrl_c_ignored(), _library_warnings_ignored():
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

    def run(self, name: str, function: Callable, *args) -> Task:
        """A task that has run here: `results` gives its result, or raises its error."""
        task = Task(name, function, args, Future())
        try:
            task.future.set_result(cloudpickle.dumps(_timed(function, args)))
        except Exception as error:
            task.future.set_exception(error)
        return task

    def _run_in_worker(self, pickled: bytes) -> bytes:
        return self.processes.submit(_run_pickled, pickled).result()

    def results(self, tasks: Sequence[Task]) -> list:
        """The results of `tasks`, in their order; those that no worker has begun are run here, the
        last one first.

        Raises what the functions raise, and WorkerError when a worker process was ended.
        """
        return list(self._results(tasks))

    def _results(self, tasks: Sequence[Task]) -> Iterator:
        found = {}
        for task in progress_bar(reversed(tasks), "tasks", len(tasks)):
            if task.future is None or task.future.cancel():
                found[task] = _timed(task.function, task.args)
        for task in progress_bar(tasks, "tasks", len(tasks)):
            if task not in found:
                try:
                    found[task] = pickle.loads(task.future.result())
                except BrokenProcessPool as error:
                    raise WorkerError(
                        f"a worker process ended early, while it ran {task.name!r}, perhaps for "
                        f"lack of memory; use fewer --workers, or --workers 0"
                    ) from error
            result, task.seconds, printed = found[task]
            print(printed, end="")
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + task.seconds
            yield result


def worker_count(asked: int) -> int:
    """Number of worker processes: as asked, or for -1 one for each further core of this rank."""
    if asked >= 0:
        return asked
    ranks_here = environment_number("LOCAL_WORLD_SIZE")  # on this machine
    return min(max(available_cores() // ranks_here - 1, 0), MAX_WORKERS)


# --------------------------------------------------------------------------------------------------
# Ranks: copies of the script that torchrun started, here or on other machines
# --------------------------------------------------------------------------------------------------


@contextmanager
def _exchange() -> Iterator[None]:
    """Raise WorkerError where an exchange with the other ranks fails inside."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it bare, after a line of its code; NCCL a subclass
        reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])[:120]
        raise WorkerError(
            f"another rank ended or cannot be reached ({reason}); run the same command again: "
            f"finished stages are reused"
        ) from error


class Ranks:
    """The processes that share one run; with a single one nothing is exchanged.

    Every rank must call the same methods in the same order. Tensors on a GPU travel over NCCL,
    all else over gloo. Raises WorkerError when another rank has ended.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, with the sum over all ranks in place of its values."""
        if self.world > 1:
            with _exchange():
                dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The tensor, with the values of the first rank in place of its own."""
        if self.world > 1:
            with _exchange():
                dist.broadcast(tensor, 0)
        return tensor

    def mean(self, means: Sequence[Tensor], share: float) -> list[Tensor]:
        """Means over a batch, from those over this rank's `share` of it, 0 to 1; one exchange."""
        if self.world == 1:
            return list(means)
        flat = torch.cat([part.reshape(-1) for part in means])
        flat = flat.mul_(share) if share else flat.zero_()  # the mean of no rows is NaN
        parts = self.sum_(flat).split([part.numel() for part in means])
        return [part.view_as(like) for part, like in zip(parts, means, strict=True)]

    def gather(self, value: object) -> list:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        with _exchange():
            dist.all_gather_object(found, value)
        return found

    def gather_rows(self, rows: Tensor) -> Tensor:
        """On the first rank, the rows (n, ...) of all in the order of the ranks; on the others its
        own."""
        if self.world == 1:
            return rows
        sizes = self.gather(len(rows))
        with _exchange():
            if not self.is_first:
                dist.send(rows.cpu().contiguous(), 0)
                return rows
            whole = torch.empty(sum(sizes), *rows.shape[1:], dtype=rows.dtype)
            parts = whole.split(sizes)
            parts[0].copy_(rows)
            for rank in range(1, self.world):
                dist.recv(parts[rank], rank)
        return whole.to(rows.device)

    def gather_pieces(self, rows: Tensor, n: int) -> Iterator[Tensor]:
        """On the first rank, the rows (N, ...) of all in the order of the ranks, at most n at a
        time; on the others nothing, while they send theirs. All have the same dtype."""
        sizes = self.gather(len(rows))
        if self.is_first:
            yield from rows.split(n)
            for rank, size in enumerate(sizes[1:], 1):
                for start in range(0, size, n):
                    piece = torch.empty(min(n, size - start), *rows.shape[1:], dtype=rows.dtype)
                    with _exchange():
                        dist.recv(piece, rank)
                    yield piece
            return
        for start in range(0, len(rows), n):
            with _exchange():
                dist.send(rows[start : start + n].contiguous(), 0)

    def on_first(self, function: Callable, *args) -> Any:
        """The result of function(*args), which runs on the first rank, on every rank; so are its
        errors, except those that end the process."""
        if self.world == 1:
            return function(*args)
        found = [None, None]
        if self.is_first:
            try:
                found[0] = function(*args)
            except Exception as error:
                found[1] = error
        with _exchange():
            dist.broadcast_object_list(found, 0)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def barrier(self) -> None:
        """Wait until every rank is here; over gloo, so that no GPU is kept busy by it."""
        self.sum_(torch.zeros(1))


ONE_PROCESS = Ranks()


def shard_of(n: int, ranks: Ranks) -> slice:
    """This rank's part of n images: contiguous parts in the order of the ranks."""
    return slice(n * ranks.rank // ranks.world, n * (ranks.rank + 1) // ranks.world)


def environment_number(name: str) -> int:
    """A number that torchrun sets; 1 where it is unset. Raises InputError for anything else."""
    value = os.environ.get(name, "1")
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise InputError(
            f"{name} must be a whole number from 1 on, got {value!r}; torchrun sets it: unset it "
            f"for a run of one process"
        )
    return int(value)


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks of torchrun's environment; without it, one process.

    With as many GPUs as ranks on this machine, "cuda" is the GPU of this rank afterwards. Raises
    InputError where the ranks cannot connect.
    """
    world = environment_number("WORLD_SIZE")
    if world == 1:
        yield ONE_PROCESS
        return
    here = environment_number("LOCAL_WORLD_SIZE")
    use_nccl = dist.is_nccl_available() and torch.cuda.device_count() >= here
    if use_nccl:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if use_nccl else "gloo"
    try:
        dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"WORLD_SIZE is {world}, but the ranks cannot connect ({reason}); start them with "
            f"torchrun, or unset WORLD_SIZE for a run of one process"
        ) from error
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


@contextmanager
def printing_once(ranks: Ranks) -> Iterator[None]:
    """Only the first rank prints inside, and whatever it prints raises no error."""
    if ranks.is_first:
        with safe_output():
            yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def one_writer(folder: Path, wait: bool, ranks: Ranks) -> Iterator[None]:
    """`folder_lock` by the first rank, for all of them."""
    lock = folder_lock(folder, wait) if ranks.is_first else nullcontext()
    with lock:
        ranks.barrier()  # the folder is there
        yield
