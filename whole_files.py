"""Is what stands on disk whole, by one writer, and what it says it is? Files of a run, in and out.

Takes bytes, paths and types. Gives files that are there completely or not at all, a folder that one
process at a time writes to, and JSON as the types that were asked for. Knows nothing of features or
images, and imports no other room.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import filelock

UNFINISHED = ".unfinished"  # how the names of files end that are being written
LOCK, WRITER = ".lock", ".writer"  # files of a folder: what is locked, and who holds it


class BusyError(Exception):
    """Another process writes to the folder; the message says which one, and since when."""


# --------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------


def write_whole(path: str | Path, content: bytes, durable: bool = False) -> None:
    """Write a file so that it is there completely or not at all, whatever interrupts.

    A `durable` one is on the disk when this returns, and outlives a power cut.
    """
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names of its files on the disk, too; Windows does so by itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path, inside: str = "") -> None:
    """What killed processes were writing in the folder, or in those `inside` it, such as
    "target_*/". Only for who alone writes there."""
    for left in folder.glob(f"{inside}.*{UNFINISHED}"):
        left.unlink()


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to the folder. Raises BusyError, or waits for the other one.

    The lock belongs to this process alone, not to those it starts, and ends with it, however it
    ends.
    """
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        busy = f"{folder} is being written to by {_writer(folder)}"
        if not wait:
            raise BusyError(busy) from None
        print(f"waiting: {busy}", flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        (folder / WRITER).write_text(f"process {os.getpid()} since {since}")
        yield
    finally:
        (folder / WRITER).unlink(missing_ok=True)
        lock.release()


def _writer(folder: Path) -> str:
    """Who holds the lock, in words."""
    said = ""
    with suppress(OSError, ValueError):
        said = (folder / WRITER).read_text()
    return said or "another process"


# --------------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------------


def read_json(content: bytes, kind: Any) -> Any:
    """Strict JSON as `kind`, see `as_kind`. Raises ValueError."""
    try:
        return as_kind(json.loads(content, parse_constant=_refuse_constant), kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def as_kind(value: Any, kind: Any, where: str = "it") -> Any:
    """`value`, plain as JSON gives it, as an instance of `kind`: bool, int, str, None, a finite
    float, list[...], tuple[..., ...], dict[str, ...], a union of those, a NamedTuple or dataclass
    of such fields, or a dict that names the kinds of some of its values.

        as_kind({"x": [1, 2]}, {"x": list[int]})  ->  {"x": [1, 2]}

    All that is named must be there; what is not named is left as it is in a dict, and left out
    elsewhere. Raises ValueError saying where something else stands.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _as_one_of(value, args, where)
    if isinstance(kind, Mapping):
        return {**_mapping(value, where), **_fields_as(value, kind, where)}
    if origin is dict:
        items = _mapping(value, where).items()
        return {name: as_kind(item, args[1], f"{where}.{name}") for name, item in items}
    if origin in (list, tuple):
        if type(value) is not list:
            raise ValueError(f"{where} is {_short(value)}, not a list")
        return origin(as_kind(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        _mapping(value, where)
        return kind(**_fields_as(value, _hints(kind), where))
    return _plain(value, kind, where)


_hints = functools.cache(get_type_hints)  # which would be read anew for every record


def _as_one_of(value: Any, kinds: tuple, where: str) -> Any:
    """As the first of `kinds` that fits."""
    refused = []
    for kind in kinds:
        try:
            return as_kind(value, kind, where)
        except ValueError as error:
            refused.append(str(error))
    raise ValueError(refused[0])


def _mapping(value: Any, where: str) -> dict:
    if type(value) is not dict:
        raise ValueError(f"{where} is {_short(value)}, not an object")
    return value


def _fields_as(value: dict, kinds: Mapping, where: str) -> dict:
    found = {}
    for name, kind in kinds.items():
        if name not in _mapping(value, where):
            raise ValueError(f"{where} has no {name!r}")
        found[name] = as_kind(value[name], kind, f"{where}.{name}")
    return found


def _plain(value: Any, kind: type, where: str) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    if type(value) not in allowed:  # exactly: True is no number here
        raise ValueError(f"{where} is {_short(value)}, not {kind.__name__}")
    if kind is float and abs(value) > sys.float_info.max:
        raise ValueError(f"{where} is {value}, not a finite number")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]} ..."
