"""One run on two ranks against one process: saexplain.parallel.Ranks, rows, training, stages.

This file is also the program that each rank runs: `python test_ranks.py PART FOLDER`.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import activations, fidelity, parallel, store
from saexplain.files import InputError, load_stage, read_json
from saexplain.images import Data
from saexplain.parallel import ONE_PROCESS, Ranks, WorkerError, Workers, open_ranks, shard_of
from saexplain.rows import TrainingRows, mean_and_std
from saexplain.sae import JumpReLUSAE
from saexplain.stages import gather_training, train_saes

N, D_IN, LATENTS, TARGET = 601, 12, 40, 4  # an odd number: the shards differ by an image
SMALL = dict(sae_latents=LATENTS, batch_sae=300, epochs_sae_final=1, lr_sae=2e-3)
FEW_ROWS = 500  # of which statistics are made
DIED = 7  # exit status of a rank that ends itself


class Net(torch.nn.Module):
    """A layer whose output is its input, and two logits."""

    def preactivations(self, images):
        return images

    def logits_from_preactivations(self, raw):
        return 3 * raw.flatten(1)[:, :2].float()


def vectors() -> torch.Tensor:
    """raw (N, d_in): sparse combinations of 30 directions."""
    rng = torch.Generator().manual_seed(5)
    directions = F.normalize(torch.randn(30, D_IN, generator=rng), dim=1)
    codes = torch.rand(N, 30, generator=rng) * (torch.rand(N, 30, generator=rng) < 0.15)
    return 4 * codes @ directions + 1


def positions() -> torch.Tensor:
    """raw (N, 3, d_in)"""
    raw = vectors()
    return torch.stack([raw, raw.flip(0), 0.5 * raw.roll(7, 0)], 1)


def settings(folder: Path) -> driver.Settings:
    return driver.Settings(target_actives=(TARGET,), out=str(folder), workers=0, **SMALL)


def data_of(raw: torch.Tensor, *sizes: int) -> Data:
    splits = (driver.Split(raw[:n], torch.arange(n) % 2) for n in sizes)
    return Data(*splits, classes=("a", "b"), source="", digest="")


def layer_of(raw: torch.Tensor, ranks: Ranks) -> fa.ExplainedLayer:
    """Training activations of this rank, validation activations of all on the first."""
    mine, n_val = raw[shard_of(N, ranks)], 200
    val = ranks.gather_rows(raw[:n_val][shard_of(n_val, ranks)].clone())
    mu, std = mean_and_std(mine, ranks)
    some = torch.zeros(1, dtype=torch.int64)
    splits = {"train": fa.Activations(some, some, mine), "val": fa.Activations(some, some, val)}
    return fa.ExplainedLayer(Net(), None, mu, std, splits)


def train(raw: torch.Tensor, folder: Path, ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """Tensors of the SAE, of another seed's, and of a frozen decoder."""
    with Workers(0) as workers:
        given = ({"data_digest": "-"}, driver.train_wanted, workers, ranks)
        found = train_saes(layer_of(raw, ranks), settings(folder), *given)[TARGET]
        ((frozen,),) = workers.results([found.frozen])
    return [stage.tensors for stage in (*found.stages.values(), frozen)]


def raw_rows(raw: torch.Tensor, ranks: Ranks) -> TrainingRows:
    mine = raw[shard_of(N, ranks)]
    return TrainingRows(mine, *mean_and_std(mine, ranks), ranks=ranks)


def first_steps(raw: torch.Tensor, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The SAE in training after three steps, one of which has an auxiliary loss, and its losses."""
    rows = raw_rows(raw, ranks)
    trainer = driver.SAETrainer(rows, TARGET, settings(Path("unused")))
    trainer.density[::3] = 0  # dying
    # Each latent starts with an image exactly at its threshold, where rounding decides.
    trainer.controller.log_threshold += 0.003
    for step, index in enumerate(itertools.islice(trainer.batches(), 3)):
        trainer.step(step, rows.batch(index))
    sae = rows.coordinates.sae_of_z(trainer.sae)  # signs of principal components are arbitrary
    return {**sae.state_dict(), "density": trainer.density, "loss": trainer.reconstruction[:3]}


def squared_error(tensors: dict[str, torch.Tensor], z: torch.Tensor) -> float:
    return (JumpReLUSAE.from_weights(tensors)(z) - z).square().sum().item()


def exchange(folder: Path, ranks: Ranks) -> None:
    """What each exchange gives, on each rank."""
    fidelity.STATS_ROWS = FEW_ROWS

    def fail() -> None:
        raise InputError("only the first rank finds out")

    own = torch.full((ranks.rank + 2, 2), float(ranks.rank))
    parts, share = [torch.tensor([ranks.rank + 1.0]), torch.ones(2, 2)], [0.25, 0.75][ranks.rank]
    found = {
        "sum": ranks.sum_(own[:2].clone()),
        "broadcast": ranks.broadcast_(own[:2].clone()),
        "mean": ranks.mean(parts, share),
        "of none": ranks.mean([torch.tensor([1.0, float("nan")][ranks.rank])], 1 - ranks.rank),
        "gather": ranks.gather(ranks.rank + 10),
        "rows": ranks.gather_rows(own),
        "range": activations.range_of(vectors()[: ranks.rank], ranks),  # of one row of all
        "std": mean_and_std(vectors()[: 2 * ranks.rank][:, None], ranks)[1],
        "layer of two": activations.collect_activations(
            Net(), data_of(vectors(), 2, 1, 1), ranks=ranks
        ).mu,
        "first": ranks.on_first(lambda: ranks.rank),
    }
    activations.IMAGES_SENT, usual = 7, store.MEMORY_SHARE
    store.MEMORY_SHARE = 0 if ranks.is_first else usual  # only its own are in a file
    for name, raw in (("vectors in files", vectors()), ("positions in files", positions())):
        storing = activations.Storing(folder=folder / name, made_from={"raw": name})
        progress = storing.folder / "activations_val" / store.PROGRESS
        for done in (None, 28, 61):  # made, continued after a kill, and taken from the folder
            if done and ranks.is_first:
                progress.write_text(json.dumps({**read_json(progress), "done": done}))
            given = data_of(raw, 90, 61, 40), True, storing, ranks
            splits = activations.collect_activations(Net(), *given).splits
        is_there = sorted(path.name for path in storing.folder.glob("*_val"))
        found[name] = [splits[part].raw.clone() for part in ("val", "test")] + [is_there]
    store.MEMORY_SHARE = usual
    try:
        ranks.on_first(fail)
    except InputError as error:
        found["error"] = str(error)
    for name, raw in (("vectors", vectors()), ("positions", positions())):
        split = driver.Split(raw, torch.arange(N))
        whole = gather_training(layer_of(raw, ranks), split, ranks).splits["train"]
        found[name] = (whole.raw, whole.labels)
    ranks.barrier()
    torch.save(found, folder / f"exchange{ranks.rank}.pt")


def die(folder: Path, ranks: Ranks) -> None:
    """The second rank ends in the middle of a training."""
    rows = TrainingRows(vectors()[shard_of(N, ranks)], ranks=ranks)
    trainer, usual = driver.SAETrainer(rows, TARGET, settings(folder)), rows.batch

    def batch(*given: object):
        if ranks.rank and len(trainer.history) > 5:
            os._exit(DIED)
        return usual(*given)

    rows.batch = batch
    driver.train_together([trainer])


def rank_program(part: str, folder: Path) -> int:
    try:
        with open_ranks() as ranks, parallel.torch_threads(1):
            if part == "exchange":
                exchange(folder, ranks)
                for name, raw in (("vectors", vectors()), ("positions", positions())):
                    found = {"steps": first_steps(raw, ranks)}
                    found["saes"] = train(raw, folder / name, ranks)
                    torch.save(found, folder / f"{name}{ranks.rank}.pt")
            else:
                die(folder, ranks)
        return 0
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_ranks(part: str, folder: Path) -> list[tuple[int, str]]:
    """Exit status and stderr of both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **own, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, part, str(folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    ended = [process.communicate(timeout=120) for process in started]
    return [(p.returncode, errors) for p, (_, errors) in zip(started, ended, strict=True)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder with what two ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    assert [status for status, _ in run_ranks("exchange", folder)] == [0, 0]
    return folder


def test_each_exchange_gives_every_rank_what_it_names(two_ranks):
    first, second = (torch.load(two_ranks / f"exchange{rank}.pt") for rank in (0, 1))
    for found in (first, second):
        assert torch.equal(found["sum"], torch.ones(2, 2))
        assert torch.equal(found["broadcast"], torch.zeros(2, 2))
        assert [part.tolist() for part in found["mean"]] == [[1.75], [[1, 1], [1, 1]]]
        assert found["of none"] == [torch.tensor(1.0)]
        assert found["gather"] == [10, 11]
        assert found["first"] == 0
        assert found["error"] == "only the first rank finds out"
        torch.testing.assert_close(found["range"], (vectors()[0], vectors()[0]))
        torch.testing.assert_close(found["std"], vectors()[:2].std(0))
        torch.testing.assert_close(found["layer of two"], vectors()[:2].mean(0))
    assert first["rows"][:, 0].tolist() == [0, 0, 1, 1, 1]
    assert second["rows"][:, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["vectors", "positions"])
def test_what_does_not_fit_into_memory_is_gathered_in_a_file(name, two_ranks):
    first, second = (torch.load(two_ranks / f"exchange{rank}.pt") for rank in (0, 1))
    raw = RAW[name]().half()
    val, test, is_there = first[f"{name} in files"]
    assert torch.equal(val, raw[:61])
    assert torch.equal(test, raw[:40])
    assert is_there == ["activations_val"]
    assert torch.equal(second[f"{name} in files"][0], raw[30:61])  # its own


RAW = {"vectors": vectors, "positions": positions}


@pytest.mark.parametrize("name", RAW)
def test_the_first_rank_analyses_the_training_rows_of_all(name, two_ranks):
    """Those that one process would take, where there are more positions than it takes."""
    first, second = (torch.load(two_ranks / f"exchange{rank}.pt")[name] for rank in (0, 1))
    raw = RAW[name]()
    rows = raw.flatten(0, -2)
    if name == "positions":
        rows = rows[torch.linspace(0, 3 * N - 1, FEW_ROWS).round().long()]
    assert torch.equal(first[0].flatten(0, -2), rows)
    assert torch.equal(first[1], torch.arange(N))
    assert torch.equal(second[0], raw[N // 2 :])  # its own


@pytest.mark.parametrize("name", RAW)
def test_the_first_steps_on_two_ranks_are_those_of_one_process(name, two_ranks):
    first, second = (torch.load(two_ranks / f"{name}{rank}.pt") for rank in (0, 1))
    with parallel.torch_threads(1):
        expected = first_steps(RAW[name](), ONE_PROCESS)
    for key, value in expected.items():
        torch.testing.assert_close(first["steps"][key], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(first["steps"][key], second["steps"][key])


@pytest.mark.parametrize("name", RAW)
def test_two_ranks_train_the_saes_of_one_process(name, two_ranks, tmp_path):
    """Rounding grows with the steps: jumps, and Adam, divide by small numbers."""
    raw = RAW[name]()
    with parallel.torch_threads(1):
        alone = train(raw, tmp_path, ONE_PROCESS)
    first, second = (torch.load(two_ranks / f"{name}{rank}.pt")["saes"] for rank in (0, 1))
    z = (raw.flatten(0, -2) - alone[0]["mu"]) / alone[0]["std"]
    start = driver.starting_rows(raw_rows(raw, ONE_PROCESS), LATENTS, 0)
    assert (alone[0]["W_dec"] - start).norm() > 5 * (first[0]["W_dec"] - alone[0]["W_dec"]).norm()
    for expected, found, other in zip(alone, first, second, strict=True):
        fvu = [squared_error(sae, z) / z.square().sum().item() for sae in (expected, found)]
        assert fvu[1] == pytest.approx(fvu[0], rel=5e-3)
        for key, value in expected.items():
            assert (found[key] - value).norm() < 0.03 * value.norm(), key
            assert torch.equal(found[key], other[key])  # the same stages on every rank
    assert not torch.allclose(alone[0]["W_dec"], alone[1]["W_dec"], atol=0.1)
    saved = load_stage(two_ranks / name, "sae")
    assert torch.equal(saved.tensors["W_enc"], first[0]["W_enc"])
    assert saved.inputs == load_stage(tmp_path, "sae").inputs  # either is reused by the other


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_one_line(tmp_path):
    (status, errors), (died, _) = run_ranks("die", tmp_path)
    assert (status, died) == (2, DIED)
    assert errors.strip().startswith("error: another rank ended or cannot be reached")
    assert "run the same command again: finished stages are reused" in errors
    assert len([line for line in errors.splitlines() if line.startswith("Traceback")]) == 0


def test_shards_are_contiguous_and_cover_all():
    for n, world in ((10, 3), (7, 7), (2, 3), (0, 2)):
        found = [shard_of(n, Ranks(rank, world)) for rank in range(world)]
        assert [i for shard in found for i in range(n)[shard]] == list(range(n))
        sizes = [len(range(n)[shard]) for shard in found]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("value", ["two", "0", "-1", "", "1.5"])
def test_a_wrong_number_of_ranks_is_one_line(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(InputError, match=rf"WORLD_SIZE must be .* got '{value}'; torchrun sets it"):
        with open_ranks():
            pass


if __name__ == "__main__":
    sys.exit(rank_program(sys.argv[1], Path(sys.argv[2])))
