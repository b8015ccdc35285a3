"""Where are the layer's outputs kept? In memory, or in a file where they are too many.

    store = open_store((60_000, 8, 768), folder, inputs)
    for start in range(store.done, len(store), 512):
        store[start : start + 512] = compute(start)  # (512, 8, 768), in order
    store.raw  # (60000, 8, 768), float32 in memory or float16 mapped from the file

Takes the outputs batch by batch; gives one tensor of them. A file records how far it is, so that
after a kill the same command goes on from there. It knows nothing of networks.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.files import InputError, prepare_folder, read_json, to_json
from saexplain.parallel import MEMORY_SHARE, available_memory

RECORD_SECONDS = 5.0  # between two records of how far a file is: each waits for the disk
FLOAT16_MAX = torch.finfo(torch.float16).max
ROUNDED_SHARE = 0.01  # of a channel's variance that rounding may add before a line is printed
VALUES, PROGRESS = "activations.float16", "activations.json"  # files of a store


def format_bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


class ActivationStore:
    """The layer's output (N, p, d_in) for the images of one split, filled in their order."""

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.done = 0  # images that are there

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def raw(self) -> Tensor:
        """(N, p, d_in) Raises ValueError until all images are there."""
        if self.done < len(self):
            raise ValueError(f"{self.done} of {len(self)} images are stored: store the others")
        return self._all()

    def __setitem__(self, place: slice, raw: Tensor) -> None:
        """Store raw (n, p, d_in) of the images `place`, the first of which is `done`."""
        start, stop, _ = place.indices(len(self))
        expected = (stop - start, *self.shape[1:])
        if start != self.done or tuple(raw.shape) != expected:
            raise ValueError(
                f"images are stored in order: expected {expected} from image {self.done} on, got "
                f"{tuple(raw.shape)} from {start} on"
            )
        self._write(start, raw)
        self.done = stop

    def _all(self) -> Tensor:
        raise NotImplementedError

    def _write(self, start: int, raw: Tensor) -> None:
        raise NotImplementedError


class MemoryStore(ActivationStore):
    """Outputs in memory, as float32."""

    def __init__(self, shape: Sequence[int], device: torch.device):
        super().__init__(shape)
        self._values = torch.empty(self.shape, device=device)

    def _all(self) -> Tensor:
        return self._values

    def _write(self, start: int, raw: Tensor) -> None:
        self._values[start : start + len(raw)] = raw


class FileStore(ActivationStore):
    """Outputs in a file of float16, with a record of how many images it has.

    A file made from other inputs is replaced. Raises InputError where the disk has no space for it.
    """

    def __init__(self, shape: Sequence[int], folder: Path, inputs: dict):
        super().__init__(shape)
        prepare_folder(folder)
        self.folder, self.inputs = folder, {**inputs, "shape": list(self.shape)}
        self._bytes = 2 * math.prod(self.shape[1:])  # of an image
        self._recorded_at = time.monotonic()
        self.done = self._recorded()
        if not self.done:  # the record first: without it, the values are those of nothing
            (folder / PROGRESS).unlink(missing_ok=True)
            (folder / VALUES).unlink(missing_ok=True)
        self._check_space()
        self._file = open(folder / VALUES, "r+b" if self.done else "w+b")

    def _recorded(self) -> int:
        """How many images the file has, if it was made from the same inputs."""
        try:
            record = read_json(self.folder / PROGRESS)
            size = (self.folder / VALUES).stat().st_size
            is_ours = record["inputs"] == self.inputs and size >= record["done"] * self._bytes
            return record["done"] if is_ours else 0
        except (InputError, OSError, KeyError, TypeError):
            return 0

    def _check_space(self) -> None:
        """Print the size. Raises InputError where it exceeds what is free on the disk."""
        missing, free = (len(self) - self.done) * self._bytes, shutil.disk_usage(self.folder).free
        n, p, d_in = self.shape
        size = f"{n:,} x {p} x {d_in} activations in 16 bits, {format_bytes(n * self._bytes)}"
        if missing > free:
            raise InputError(
                f"{size}, do not fit in memory, and {self.folder} has {format_bytes(free)} free; "
                f"choose another folder, fewer positions per image, or fewer images"
            )
        state = f", {self.done:,} images are there" if self.done else ""
        print(f"{size}, go to {self.folder} ({format_bytes(free)} free{state})", flush=True)

    def _write(self, start: int, raw: Tensor) -> None:
        largest = raw.abs().amax() if raw.numel() else raw.new_zeros(())
        if not largest <= FLOAT16_MAX:  # nan is not, either
            raise InputError(
                f"activations must be at most {FLOAT16_MAX:,.0f} to be stored in 16 bits, got "
                f"{largest.item():,.6g} in images {start} to {start + len(raw) - 1}; choose "
                f"another layer, or fewer images, so that they fit in memory"
            )
        half = raw.detach().to("cpu", torch.float16).contiguous()
        if start == 0:
            warn_rounding(raw.detach().cpu(), half)
        values = half.numpy()
        # Written, not mapped: on a full disk this raises OSError, where a mapping ends the process.
        self._file.seek(start * self._bytes)
        self._file.write(values.tobytes())
        is_last = start + len(raw) == len(self)
        if is_last or time.monotonic() - self._recorded_at >= RECORD_SECONDS:
            self._record(start + len(raw))

    def _record(self, done: int) -> None:
        """Write how many images the file has, once they are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        record = {"inputs": self.inputs, "done": done}
        fa.write_whole(self.folder / PROGRESS, to_json(record))
        self._recorded_at = time.monotonic()

    def _all(self) -> Tensor:
        self._file.close()
        mapped = np.memmap(self.folder / VALUES, np.float16, "r+", shape=self.shape)  # no copies
        return torch.from_numpy(mapped)


def warn_rounding(raw: Tensor, half: Tensor) -> None:
    """Print a line where a channel of raw (n, p, d_in) varies so little about its mean that its
    values in 16 bits, `half`, are noisy."""
    rows, error = (values.double().flatten(0, 1) for values in (raw, half.double() - raw))
    std, noise = rows.std(0, correction=0), error.std(0, correction=0)
    varies = std > 1e-7 * rows.abs().amax(0)  # by more than float32 rounds
    share = torch.where(varies, noise / std, 0.0).square()
    worst = int(share.argmax())
    if share[worst] > ROUNDED_SHARE:
        print(
            f"warning: 16 bits add noise of {share[worst]:.1%} of its variance to channel {worst} "
            f"(mean {rows[:, worst].mean():.4g}, standard deviation {std[worst]:.2g}), and of over "
            f"{ROUNDED_SHARE:.0%} to {int((share > ROUNDED_SHARE).sum()):,} of {len(share):,}; "
            f"with fewer images, or fewer positions per image, activations fit in memory",
            flush=True,
        )


def open_store(
    shape: Sequence[int], folder: Path, inputs: dict, device: torch.device | str = "cpu"
) -> ActivationStore:
    """A store of outputs (N, p, d_in): in memory if they take at most MEMORY_SHARE of what is
    available, on the device or else beside the CPU; otherwise in files of `folder`.

    `inputs` is all that decides them: a file that was made from equal ones is continued. Each split
    and each rank needs a folder of its own.
    """
    needed = 4 * math.prod(shape)
    for place in dict.fromkeys((torch.device(device), torch.device("cpu"))):
        if needed <= MEMORY_SHARE * available_memory(place):
            return MemoryStore(shape, place)
    return FileStore(shape, Path(folder), inputs)
