"""Which rows is an SAE trained on? One per image, or one per position, in memory or mapped.

    rows = TrainingRows(raw, mu, std)  # raw (N, d_in) or (N, p, d_in)
    for index in rows.batches(128, epochs, generator):  # of images, the same on every rank
        x = rows.batch(index).x  # (B p, d_in), of this rank's images

Takes the layer's output for the training images, or for this rank's shard of them; gives batches in
the coordinates that SAEs are trained in. It knows nothing of SAEs, and writes nothing.

Dimension key: N images of this rank, p positions per image (1 for a vector layer), d_in channels,
C classes. Rows are numbered image by image, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from saexplain.optimization import batches, spread_batches
from saexplain.parallel import ONE_PROCESS, Ranks
from saexplain.sae import PCACoordinates

PRECOMPUTED = 2**28  # numbers of x or of logits that are computed once and kept, 1 GB of each
MOMENT_ROWS = 8192  # rows whose products are summed in float32; further sums are in float64
HEAD_ROWS = 4096  # rows that go through the rest of the network at once


class Batch(NamedTuple):
    """This rank's rows of a batch."""

    x: Tensor  # (B p, d_in)
    teacher_logits: Tensor | None  # (B, C), where they are asked for and the layer is a vector
    share: float  # of the whole batch, 0 to 1


def spread_over(n: int, wanted: int) -> Tensor:
    """(wanted,) int64, evenly spaced numbers from 0 to n - 1; all n where there are no more."""
    return torch.linspace(0, n - 1, min(n, wanted), dtype=torch.float64).round().long()


def are_grouped(labels: Tensor) -> bool:
    """Whether images of a class, by labels (N,), follow each other much more often than in random
    order, as in splits that are read class by class."""
    labels = labels.cpu()
    shares = labels.bincount() / len(labels)
    changes = (labels.diff() != 0).double().mean()
    return bool(changes < 0.5 * (1 - shares.square().sum()))


def moments(
    chunks: Iterable[Tensor], ranks: Ranks, square: Callable[[Tensor], Tensor]
) -> tuple[int, Tensor, Tensor]:
    """Number of rows of all ranks, their mean (d_in,), and their mean square about it, in float64.

    `square` gives the sum of squares of a chunk (n, d_in): (d_in,), or (d_in, d_in) of products.
    """
    n, shift, total, squares = 0, None, 0.0, 0.0
    for chunk in chunks:
        if shift is None:  # near the mean, so that squares about it lose no digits
            shift = ranks.broadcast_(chunk.mean(0) if len(chunk) else chunk.sum(0))  # or none
        chunk = chunk - shift
        n += len(chunk)
        total = total + chunk.sum(0, dtype=torch.float64)
        squares = squares + square(chunk).double()
    n = sum(ranks.gather(n))
    off, squares = ranks.sum_(total) / n, ranks.sum_(squares) / n
    about = torch.outer(off, off) if squares.dim() == 2 else off.square()
    return n, shift.double() + off, squares - about


def mean_and_std(raw: Tensor, ranks: Ranks = ONE_PROCESS) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (d_in,) of each channel of raw (N, d_in) or (N, p, d_in), over
    the rows of all ranks; float32."""
    if raw.dim() == 2 and raw.dtype == torch.float32 and ranks.world == 1:
        return raw.mean(0), raw.std(0)
    chunks = TrainingRows(raw, ranks=ranks).split(MOMENT_ROWS)
    n, mean, variance = moments(chunks, ranks, lambda c: c.double().square().sum(0))
    return mean.float(), (variance.clamp(min=0) * n / max(n - 1, 1)).sqrt().float()


class TrainingRows:
    """Rows that SAEs are trained on: standardized, and on request in principal components.

    Args:
        raw: (N, d_in), or (N, p, d_in) for p positions of each image; of the rank's shard, float32
            in memory or float16 mapped from a file. Shards follow the order of the ranks.
        mu, std: (d_in,), on the device of the training; without, raw is standardized already.
        logits_of: maps standardized rows (B, d_in) of a vector layer to logits (B, C).
        ranks: that share the images.
        is_grouped: whether images of a class follow each other, on any rank.
    """

    def __init__(
        self,
        raw: Tensor,
        mu: Tensor | None = None,
        std: Tensor | None = None,
        logits_of: Callable[[Tensor], Tensor] | None = None,
        ranks: Ranks = ONE_PROCESS,
        is_grouped: bool = False,
    ):
        raw = getattr(raw, "raw", raw)  # rows that have their images with them
        self.raw, self.mu, self.std, self.logits_of, self.ranks = raw, mu, std, logits_of, ranks
        self.device = raw.device if mu is None else mu.device
        self.positions, self.d_in = (1 if raw.dim() == 2 else raw.shape[1]), raw.shape[-1]
        found = ranks.gather((len(raw), raw.dtype != torch.float32, is_grouped))
        shards, mapped, grouped = zip(*found, strict=True)
        self.n_images, self.first_image = sum(shards), sum(shards[: ranks.rank])
        self.is_mapped = any(mapped)  # from a file that SAEs should share
        self.is_grouped = any(grouped)

    @classmethod
    def of(cls, z: Tensor | TrainingRows, logits_of: Callable | None = None) -> TrainingRows:
        """z itself, or the rows of standardized activations z (N, d_in) or (N, p, d_in)."""
        return z if isinstance(z, cls) else cls(z, logits_of=logits_of)

    def __len__(self) -> int:
        """Number of rows of this rank."""
        return len(self.raw) * self.positions

    def split(self, n: int) -> Iterator[Tensor]:
        """This rank's rows, standardized, in pieces of about n: (n, d_in) each."""
        for part in self.raw.split(max(1, n // self.positions)):
            yield self._standardize(part)

    def _standardize(self, raw: Tensor) -> Tensor:
        """z (n p, d_in) on the device of the training, of raw (n, d_in) or (n, p, d_in)."""
        if raw.device != self.device:
            raw = raw.pin_memory().to(self.device, non_blocking=True)
        z = raw.float() if self.mu is None else (raw.float() - self.mu) / self.std
        return z.flatten(0, -2)

    # ----------------------------------------------------------------------------------------------
    # Coordinates
    # ----------------------------------------------------------------------------------------------

    @property
    def _is_precomputed(self) -> bool:
        """Whether x of all rows is computed once: vectors in memory, unless they are too many."""
        return self.raw.dim() == 2 and not self.is_mapped and self.raw.numel() <= PRECOMPUTED

    @cached_property
    def _fitted(self) -> tuple[PCACoordinates, Tensor | None]:
        """The coordinates, and the standard deviation (d_in,) of x where x is not kept."""
        if self._is_precomputed and self.ranks.world == 1:
            return PCACoordinates.fit(self._standardize(self.raw)), None
        n, mean, covariance = moments(self.split(MOMENT_ROWS), self.ranks, lambda c: c.T @ c)
        _, components = torch.linalg.eigh(covariance)
        self.ranks.broadcast_(components)  # other machines may round otherwise
        scale = (covariance.trace() / self.d_in).sqrt()
        variance = (components * (covariance @ components)).sum(0)  # of each component
        std = (variance.clamp(min=0) * n / max(n - 1, 1)).sqrt() / scale
        fitted = PCACoordinates(mean.float(), components.float(), scale.float())
        return fitted, std.float()

    @property
    def coordinates(self) -> PCACoordinates:
        """The coordinates x in which SAEs are trained, of the rows of all ranks."""
        return self._fitted[0]

    @property
    def x_std(self) -> Tensor:
        """(d_in,) standard deviation of each coordinate of x, over the rows of all ranks."""
        return self._all_x.std(0) if self._fitted[1] is None else self._fitted[1]

    @cached_property
    def _all_x(self) -> Tensor:
        return self.coordinates.transform(self._standardize(self.raw))

    @cached_property
    def _all_logits(self) -> Tensor | None:
        """(N, C) of this rank's images; None where that is too much, or nothing kept."""
        some = self.logits_of(self._standardize(self.raw[:1]))
        if not self._is_precomputed or len(self.raw) * some.shape[1] > PRECOMPUTED:
            return None
        return torch.cat([self.logits_of(chunk) for chunk in self.split(HEAD_ROWS)])

    def __getstate__(self) -> dict:
        """What a worker is sent: nothing that can be computed there."""
        computed = ("_fitted", "_all_x", "_all_logits")
        return {name: value for name, value in vars(self).items() if name not in computed}

    # ----------------------------------------------------------------------------------------------
    # Rows of x
    # ----------------------------------------------------------------------------------------------

    def batches(self, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Index tensors (B,) of images, shuffled anew in each pass; the same on all ranks."""
        # Ranks pick their own, whose number a GPU would be waited for.
        device = self.raw.device if self.ranks.world == 1 else torch.device("cpu")
        draw = batches if self.raw.dim() == 2 else spread_batches
        return draw(self.n_images, size, epochs, generator, device)

    @torch.no_grad()
    def batch(self, index: Tensor, with_logits: bool = False) -> Batch:
        """This rank's rows of the images `index` (B,), all positions of each."""
        own = index
        if self.ranks.world > 1:
            own = own - self.first_image
            own = own[(own >= 0) & (own < len(self.raw))].to(self.raw.device, non_blocking=True)
        z = None if self._is_precomputed else self._z(own)
        x = self._all_x.index_select(0, own) if z is None else self.coordinates.transform(z)
        teacher_logits = None
        if with_logits and self._all_logits is not None:
            teacher_logits = self._all_logits[own]
        elif with_logits:
            teacher_logits = self.logits_of(self._z(own) if z is None else z)
        return Batch(x, teacher_logits, len(own) / len(index))

    def _z(self, own: Tensor) -> Tensor:
        """z (n p, d_in) of this rank's images with the numbers `own` (n,)."""
        return self._standardize(self.raw.index_select(0, own))

    def logits_of_x(self, x: Tensor) -> Tensor:
        """Logits (B, C) of x (B, d_in); gradients flow to x."""
        return self.logits_of(self.coordinates.inverse_transform(x))

    @torch.no_grad()
    def x_of(self, numbers: Tensor) -> Tensor:
        """x (n, d_in) of the rows with these numbers, wherever they are; the same on all ranks."""
        image = torch.div(numbers, self.positions, rounding_mode="floor") - self.first_image
        is_own = (image >= 0) & (image < len(self.raw))
        place = image[is_own].to(self.raw.device)
        raw = self.raw[place]
        if self.raw.dim() == 3:
            each = torch.arange(len(raw), device=raw.device)
            raw = raw[each, (numbers % self.positions)[is_own].to(raw.device)]
        if self._is_precomputed:
            own = self._all_x[place]
        else:
            own = self.coordinates.transform(self._standardize(raw))
        if self.ranks.world == 1:
            return own
        found = torch.zeros(len(numbers), self.d_in, device=self.device)
        found[is_own] = own
        return self.ranks.sum_(found)

    def sample(self, n: int) -> Tensor:
        """x (n, d_in) of a row of each of n images, their positions in turn.

        Evenly spaced ones with positions, or where they are grouped by class, as in folders; the
        first ones serve for vectors in random order, as those of MNIST.
        """
        images = torch.arange(min(n, self.n_images))
        if self.raw.dim() == 3 or self.is_grouped:
            images = spread_over(self.n_images, n)
        numbers = images * self.positions + torch.arange(len(images)) % self.positions
        return self.x_of(numbers.to(self.device))
