"""Can a saved file be trusted? Locks, strict JSON, and trained stages with their inputs.

    with folder_lock(folder):  # no other process writes there
        stage = load_cached(folder, "sae", inputs, "the SAE")  # None unless made from equal inputs
        stage = stage or save_stage(folder, "sae", tensors, inputs, info)

Takes tensors and records; gives name.safetensors with name.json, or one error that says what is
wrong with them. It knows nothing of features or images, and imports only feature_analysis.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import safetensors
import safetensors.torch
from torch import Tensor

import feature_analysis as fa

# Of a folder: what a run has written so far, and the stages of one that was interrupted.
STAGING, INTERRUPTED = ".unfinished_run", ".interrupted_run"
CHANGED_IN_WORDS = {"data_digest": "other images", "network_sha256": "another network or layer"}
INPUTS_IN_WORDS = {"torch": "the version of torch", "device": "the kind of device"}
INPUTS_IN_WORDS |= {"positions": "the number of positions per image"}
OPTIONAL_INPUTS = {"positions", "freeze_decoder"}  # of some stages only
AGAIN = "; delete both, or run again"
MOST_CHANGES = 4  # named in a line
LOCK, WRITER = ".lock", ".writer"  # files of a folder: its lock, and which process has it


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


class BusyError(Exception):
    """Another process writes to the folder; the message says which one, and since when."""


def to_json(record: object) -> bytes:
    """The record as strict JSON. Raises ValueError for a NaN, which other readers reject."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def to_json_lines(records: Sequence[object]) -> bytes:
    """The records as one JSON array, a line each: for many records, ten times as fast."""
    lines = (json.dumps(record, allow_nan=False) for record in records)
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); move it away, or run again") from error


def sha256_of(content: bytes) -> str:
    """The SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def file_name(words: str) -> str:
    """Words as the name of a folder: "layer 1.conv of ResNet" becomes layer_1.conv_of_ResNet."""
    return re.sub(r"[^\w.-]+", "_", words)


def prepare_folder(folder: Path) -> None:
    """Make the folder. Raises InputError where no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not show it
            pass
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}); choose another folder with --out"
        ) from error


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Make the folder and be the only process that writes to it.

    Where another process has the lock, raises BusyError, or waits with `wait`. A lock ends with its
    process, even with one that is killed; files that such a process had not finished are removed,
    in the folder and in its subfolders.
    """
    prepare_folder(folder)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        writer = "another process"
        with suppress(OSError):  # it may end at this moment
            writer = (folder / WRITER).read_text() or writer
        busy = f"{folder} is being written to by {writer}"
        if not wait:
            raise BusyError(f"{busy}; wait for it (wait=True, --wait) or write elsewhere") from None
        print(f"waiting: {busy}", flush=True)
        lock.acquire(poll_interval=0.2)  # seconds
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
        """Everything that decides the tensors: settings, digests of the data and of the stage
        before, kind of device, version of torch."""
        return self.record["inputs"]


def save_stage(
    folder: Path, name: str, tensors: dict[str, Tensor], inputs: dict, info: dict
) -> Stage:
    """The stage, written to name.safetensors with name.json; `info` is added to its record."""
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    stored = safetensors.torch.save(on_cpu)
    record = {"sha256": sha256_of(stored), "inputs": inputs, **info}
    write_stage(folder, name, stored, to_json(record))
    return Stage(on_cpu, record, record["sha256"])


def write_stage(folder: Path, name: str, stored: bytes, record: bytes) -> None:
    """Write both files of a stage, the record last: without it there is no stage."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    fa.write_whole(folder / f"{name}.safetensors", stored)
    fa.write_whole(folder / f"{name}.json", record)


def load_stage(folder: Path, name: str) -> Stage:
    """The stage that `save_stage` wrote.

    Raises InputError when a file is missing or damaged, or the two do not belong together.
    """
    at = f"{folder / name}.safetensors with its .json"
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        stored = (folder / f"{name}.safetensors").read_bytes()
        if not isinstance(record["inputs"], dict) or record["sha256"] != sha256_of(stored):
            raise ValueError("its two files do not belong together")
        return Stage(safetensors.torch.load(stored), record, record["sha256"])
    except FileNotFoundError as error:
        raise InputError(f"{at} is incomplete: {error.filename} is missing{AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{at} is damaged ({type(error).__name__}: {error}){AGAIN}") from error


def stage_folders(folder: Path) -> list[Path]:
    """Where a stage of the folder may be: inside STAGING also in the same subfolder of the run that
    was interrupted, and of the finished one, which may have had other targets."""
    if STAGING not in folder.parts:
        return [folder]
    at = folder.parts.index(STAGING)
    root, inside = Path(*folder.parts[:at]), folder.parts[at + 1 :]
    if inside and inside[0].startswith("target_"):
        others = [root.joinpath(*inside[1:])]
    else:
        others = [target.joinpath(*inside) for target in sorted(root.glob("target_*"))]
    return [folder, root.joinpath(INTERRUPTED, *inside), *others, root.joinpath(*inside)]


def load_cached(
    folder: Path,
    name: str,
    inputs: dict,
    what: str = "",
    named: Callable[[str], str] = str,
    fresh: bool = False,
) -> Stage | None:
    """The stage that was made from equal inputs, in one of `stage_folders`; otherwise None, after
    printing why. It is in the folder then. With `fresh` it is always None.

    `what` is the stage in words; without it nothing is printed. `named` gives the name by which the
    user knows a setting.
    """
    reason = ""
    for place in [] if fresh else stage_folders(folder):
        if not (place / f"{name}.json").exists():
            continue
        try:
            stage = load_stage(place, name)
        except InputError as error:
            reason = reason or str(error).removesuffix(AGAIN)
            continue
        reason = input_changes(stage.inputs, inputs, named)
        if not reason:
            if what:
                print(f"reusing {what}: its settings and images are equal")
            if place != folder:
                files = (place / f"{name}{ending}" for ending in (".safetensors", ".json"))
                write_stage(folder, name, *(path.read_bytes() for path in files))
            return stage
    if reason and what:
        print(f"{reason}: retraining {what}")
    return None


def input_changes(old: dict, new: dict, named: Callable[[str], str] = str) -> str:
    """What differs between the inputs of two stages, in words; "" where they are equal."""
    if old.keys() - OPTIONAL_INPUTS != new.keys() - OPTIONAL_INPUTS:
        return "it is of another version of the program"
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    words = []
    for key in changed:
        if key in CHANGED_IN_WORDS:  # another seed draws other images, and trains other networks
            words += [] if "seed" in changed else [CHANGED_IN_WORDS[key]]
        elif key not in old or key not in new:
            words.append("another kind of layer")
        else:
            values = change_in_words(old[key], new[key])
            words.append(f"{INPUTS_IN_WORDS.get(key) or named(key)} changed {values}")
    return in_short(words)


def change_in_words(*values: object) -> str:
    """Values on one line, the old one and the new."""
    return " -> ".join(" ".join(str(value).strip("[]").split())[:40] for value in values)


def in_short(words: Sequence[str]) -> str:
    """The words, of many the first."""
    more = len(words) - MOST_CHANGES
    return ", ".join(words[:MOST_CHANGES]) + (f" and {more} more" if more > 0 else "")


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
            f"{root} has networks of another run than its settings.json: files of two runs were "
            f"mixed; run it again"
        )
