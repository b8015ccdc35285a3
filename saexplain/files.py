"""What is on disk whole, written by one process, and made from what it says? Files of a run.

    with folder_lock(folder): ...                             # one process writes to a folder
    stage = load_cached(folder, "sae", inputs)                # a trained stage, if its inputs are equal
    stage = save_stage(folder, "sae", tensors, inputs, info)  # name.safetensors with name.json

Takes bytes, tensors and records; gives files. It knows nothing of features or images, and imports only
feature_analysis.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

import feature_analysis as fa

LOCK, WRITER = ".lock", ".writer"  # files of a folder: what is locked, and who holds it


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do."""


class BusyError(Exception):
    """Another process writes to the folder; the message says which one, and since when."""


def to_json(record: object) -> bytes:
    """Strict JSON: a NaN is an error here rather than for the reader of the file."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """What the JSON file holds. Raises InputError when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); move it away, or run again") from error


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def prepare_folder(folder: Path) -> None:
    """Make the folder and make sure that files can be written there. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}); choose another folder with --out"
        ) from error


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to the folder, which is made if need be.

    Raises BusyError, or waits for the other process. The lock ends with the process, however it
    ends. What killed processes were writing there is removed.
    """
    prepare_folder(folder)
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        writer = "another process"
        with suppress(OSError, ValueError):
            writer = (folder / WRITER).read_text() or writer
        busy = f"{folder} is being written to by {writer}"
        if not wait:
            raise BusyError(busy) from None
        print(f"waiting: {busy}", flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        (folder / WRITER).write_text(f"process {os.getpid()} since {since}")
        for left in [*folder.glob(f".*{fa.UNFINISHED}"), *folder.glob(f"*/.*{fa.UNFINISHED}")]:
            left.unlink(missing_ok=True)
        yield
    finally:
        (folder / WRITER).unlink(missing_ok=True)
        lock.release()


# --------------------------------------------------------------------------------------------------
# Trained stages
# --------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A trained stage: its tensors, the record beside them, and the tensors' SHA-256."""

    tensors: dict[str, Tensor]
    record: dict
    digest: str

    @property
    def inputs(self) -> dict:
        """What the stage was made from: settings, digest of the data, digest of the stage before."""
        return self.record["inputs"]


def save_stage(
    folder: Path, name: str, tensors: dict[str, Tensor], inputs: dict, info: dict
) -> Stage:
    """Write name.safetensors, then name.json with its SHA-256, so that halves never match."""
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    stored = safetensors.torch.save(on_cpu)
    record = {"sha256": sha256_of(stored), "inputs": inputs, **info}
    fa.write_whole(folder / f"{name}.safetensors", stored)
    fa.write_whole(folder / f"{name}.json", to_json(record))
    return Stage(on_cpu, record, record["sha256"])


def load_stage(folder: Path, name: str) -> Stage:
    """What `save_stage` wrote. Raises InputError when it is missing, damaged or half of another."""
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        stored = (folder / f"{name}.safetensors").read_bytes()
        if record["sha256"] != sha256_of(stored):
            raise ValueError("its two files do not belong together")
        return Stage(safetensors.torch.load(stored), record, record["sha256"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{folder / name}.safetensors with its .json is damaged or incomplete ({error})"
        ) from error


def load_cached(folder: Path, name: str, inputs: dict, fresh: bool = False) -> Stage | None:
    """The saved stage when it was made from equal inputs; otherwise None, and a line saying why."""
    if fresh or not (folder / f"{name}.json").exists():
        return None
    try:
        stage = load_stage(folder, name)
        changed = [key for key in inputs if stage.inputs.get(key) != inputs[key]]
    except (InputError, KeyError, AttributeError) as error:
        print(f"{name}: trained again, because {error}")
        return None
    if changed:
        print(f"{name}: trained again in place of the old one: other {', '.join(changed)}")
        return None
    print(f"{name}: reused, made from equal settings and data (--fresh trains again)")
    return stage


def check_chain(root: Path, manifest: dict, target: int, classifier: Stage, sae: Stage) -> None:
    """Raise InputError unless the SAE was made from the classifier, both from the data of the
    manifest in settings.json, and the run finished with both."""
    made_from = [
        (classifier.inputs["data_digest"], manifest["data_digest"]),
        (sae.inputs["data_digest"], manifest["data_digest"]),
        (sae.inputs["network_sha256"], classifier.digest),
        (manifest["network_sha256"], classifier.digest),
        (manifest["sae_sha256"][str(target)], sae.digest),
    ]
    if any(found != expected for found, expected in made_from):
        raise InputError(
            f"{root} holds networks of another run than its settings.json: a later one stopped "
            f"half way; run it again"
        )
