"""Worker processes, torch's threads and ranks: saexplain.parallel.

All fast tests share one worker process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
from conftest import BARE

import MNIST_SAE_code as driver
from saexplain import datasets, parallel
from saexplain.files import InputError
from saexplain.parallel import WorkerError, Workers

ROOT = Path(driver.__file__).parent
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")


@pytest.fixture(scope="module")
def pool():
    """One worker process, which has started."""
    with Workers(1) as workers:
        workers.start("warm up", os.getpid).future.result()
        yield workers


def double_or_fail(value: int) -> int:
    if value < 0:
        raise InputError(f"{value} is negative")
    return 2 * value


def where_and_a_sum() -> tuple[bool, int, float]:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    return parallel.in_worker(), torch.get_num_threads(), values.sum().item()


@pytest.mark.parametrize("n", [0, 1])
def test_results_are_in_the_order_of_the_tasks(n, pool):
    workers = pool if n else Workers(0)
    tasks = [workers.start("double", double_or_fail, i, here=i % 3 == 0) for i in range(7)]
    assert workers.results(tasks) == [0, 2, 4, 6, 8, 10, 12]
    assert workers.seconds["double"] > 0


@pytest.mark.parametrize("n", [0, 1])
def test_an_error_arrives(n, pool):
    workers = pool if n else Workers(0)
    task = workers.start("fail", double_or_fail, -1)
    if n:
        task.future.exception()  # waits, so that the worker runs it
    with pytest.raises(InputError, match="-1 is negative"):
        workers.results([task])


def test_a_worker_has_one_thread_and_gives_the_same_bits(pool):
    task = pool.start("sum", where_and_a_sum)
    task.future.result()
    with parallel.torch_threads(1):
        _, threads, total = where_and_a_sum()
    assert pool.results([task]) == [(True, threads, total)]
    assert not parallel.in_worker()


def test_what_a_function_of_the_script_may_need_can_be_sent():
    """A module of torch that cloudpickle adds where a function reads an attribute `classes`."""
    assert cloudpickle.loads(cloudpickle.dumps(torch.classes)) is torch.classes


def test_a_task_that_no_worker_has_begun_runs_here(pool):
    tasks = [pool.start("sleep", time.sleep, 0.5)]
    tasks += [pool.start("pid", os.getpid) for _ in range(3)]
    time.sleep(0.1)
    assert pool.results(tasks) == [None, *3 * [os.getpid()]]


@pytest.mark.parametrize(
    ("cores", "ranks_here", "expected"),
    [(1, 1, 0), (2, 1, 1), (8, 2, 3), (64, 1, parallel.MAX_WORKERS), (2, 4, 0)],
)
def test_each_further_core_of_a_rank_gets_a_worker(monkeypatch, cores, ranks_here, expected):
    monkeypatch.setattr(parallel, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    assert (parallel.worker_count(-1), parallel.worker_count(5)) == (expected, 5)


def test_memory_available_is_that_of_the_machine_or_its_container(monkeypatch, tmp_path):
    """For each of the ranks on this machine its part."""
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(parallel, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    assert 2**26 < parallel.available_memory(cpu) < 2**50
    (tmp_path / "memory.max").write_text("7000000\n")
    assert parallel.available_memory(cpu) == 4_000_000
    assert datasets.memory_limit(cpu) == 1_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel.available_memory(cpu) == 1_000_000


def test_ranks_that_cannot_connect_are_one_line(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, .*torchrun"), parallel.open_ranks():
        pass


@pytest.mark.slow
@posix
def test_a_worker_that_is_killed_is_reported():
    with Workers(1) as workers:
        task = workers.start("die", lambda: os.kill(os.getpid(), signal.SIGKILL))
        task.future.exception()
        with pytest.raises(WorkerError, match=r"'die'.*--workers 0"):
            workers.results([task])


NOTEBOOK = """
import os, time
from saexplain.parallel import Workers
class Own:
    pid = None
def own_pid(own):
    own.pid = os.getpid()
    return own
workers = Workers(1)
task = workers.start("pid", own_pid, Own())
task.future.result()
busy = workers.start("busy", time.sleep, 60)
print(workers.results([task])[0].pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@posix
def test_a_worker_ends_with_its_parent_even_where_the_code_has_no_file():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-"], text=True, cwd=ROOT, **pipes) as parent:
        parent.stdin.write(NOTEBOOK)
        parent.stdin.close()
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it exists
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} still runs")


@pytest.mark.slow
@posix
def test_ctrl_c_ends_a_run_with_its_workers_and_without_tracebacks(tmp_path):
    flags = [*BARE, "--workers", "1", "--epochs-sae-final", "200", "--out", str(tmp_path)]
    command = [sys.executable, "MNIST_SAE_code.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    process.stdout.readline()  # the data: workers start, the classifier is trained
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to workers, too
    _, errors = process.communicate(timeout=60)  # pipes close with the last process
    assert process.returncode == 130
    assert errors.count("\n") == 1, errors
    assert not (tmp_path / ".writer").exists()
