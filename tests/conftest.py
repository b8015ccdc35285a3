"""One finished tiny run, made once per session, and helpers that several test files use."""

import json
import os
import re
import shutil
from pathlib import Path

import filelock
import pytest
import torch

import MNIST_SAE_code as driver

# Two cores, one test each: more threads would wait for each other.
torch.set_num_threads(1)

TINY = """--data sample --sae-latents 32 --target-actives 4 --epochs-ffn 1 --epochs-sae-final 1
--workers 0""".split()
BARE = [*TINY, "--features", "1", "--stability-seeds", "0", "--no-hypotheses"]


def contents_of(folder: Path) -> dict[str, bytes]:
    """Content of every file by name, hidden ones aside."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def files_of(folder: Path) -> dict[str, bytes]:
    """`contents_of` a run, without seconds and the name of the folder."""
    contents = contents_of(folder)
    records = json.loads(contents["summary.json"])
    for record in records:
        del record["seconds"]
        record["diagnoses"] = [d for d in record["diagnoses"] if d["complaint"] != "slow analysis"]
    contents["summary.json"] = json.dumps(records).encode()
    for name, content in contents.items():
        if name.endswith(".html"):
            contents[name] = re.sub(rb'"diagnoses":\[.*?\]', b"", content)
    contents["settings.json"] = re.sub(rb'"out": .*', b"", contents["settings.json"])
    return contents


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run with hypotheses and one further seed. Read it only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # shared by the workers of this session
    with filelock.FileLock(root / "finished.lock"):
        folder = root / "finished"
        if not (folder / "settings.json").exists():
            driver.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def loaded(finished) -> driver.Run:
    """The finished run, loaded."""
    return driver.load_run(finished)
