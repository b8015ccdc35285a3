"""Which images, pixels and classes belong to a feature of a sparse autoencoder (SAE)?

    bank = collect_feature_bank(model, loader, sae, mu, std)              # images of each feature
    heat = feature_input_pattern(model, sae, mu, std, k)                  # pixels that drive it
    delta, top = feature_logit_effect(model, loader, sae, mu, std, k)     # logits when it is added
    delta, top = feature_ablation_effect(model, loader, sae, mu, std, k)  # logits without it
    show_feature_gallery(k, bank, images)                                 # a matplotlib Figure

Takes a trained model, an SAE and images; gives numbers, lists and pictures. It does not interpret
features, does not choose the images, and imports nothing else of this project.
Arguments that most functions share:

    model    an object with ``preactivations(images) -> (B, d_in)`` and
             ``logits_from_preactivations(raw) -> (B, C)``; nothing else of it is used. Dropout and
             batch norm must be in evaluation mode.
    loader   an iterable of ``(images, labels)`` batches, images (B, ...), labels (B,), that can be
             read more than once, in the same order. An image's index is its place in that order.
    sae      an object with ``encode(z) -> (B, d_sae)``, ``W_enc (d_in, d_sae)`` and
             ``W_dec (d_sae, d_in)``; it reads standardized activations z = (raw - mu) / std.
    mu, std  (d_in,) tensors; the work is done on their device.

Dimension key: N images, B images in a batch, C classes, d_in units of the layer, d_sae features,
H x W pixels of an image or a pattern. No function changes its inputs or random number generators.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import operator
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:  # matplotlib takes half a second to import, and only a Figure needs it
    from matplotlib.figure import Figure

N_BANDS = 4  # quantile bands of the active range that examples are drawn from
PER_BAND = 5  # examples shown for each band
SAMPLE_PER_FEATURE = 64  # active images kept per feature to find those bands
LAST_INDEX = 2**31 - 1  # image indices and the bits of a positive float32 both fit into 31 bits
ROWS = 512  # images in one forward pass: few enough to stay in the processor's cache
HEAD_ROWS = 4096  # rows in one pass through the rest of the model, at most
HEAD_ENTRIES = 2**22  # numbers in these rows, of all positions, at most
GRADIENT_ROWS = 32  # images whose gradients, d_in of each, are in memory at once, at most
GRADIENT_ENTRIES = 2**26  # numbers that these gradients may have
ENTRIES = 2**21  # activations of which several copies are made: larger arrays are slow to allocate
PROBED = 8  # images that go through the model twice, to see that it is deterministic
BATCHES_COMPARED = 8  # of two passes over a loader, to see that it does not shuffle
ROUNDING = 1e-4  # relative difference of two float32 results that is still rounding

# --------------------------------------------------------------------------------------------------
# The layer that is explained
# --------------------------------------------------------------------------------------------------


class Positions(NamedTuple):
    """The positions of a layer's output, row by row, after those without a place in the image."""

    grid: tuple[int, int]  # rows and columns
    n_prefix: int = 0  # tokens before the grid, such as a class token

    @property
    def n(self) -> int:
        return self.n_prefix + self.grid[0] * self.grid[1]


class BranchRows:
    """Outputs of a layer that something goes around, with the images that lead to the rest.

    It is indexed and split like the tensor `raw` (N, ...), and copies no image before it must.
    """

    def __init__(self, raw: Tensor, images, index: Tensor | None = None):
        self.raw, self._images = raw, images
        self._index = torch.arange(len(raw)) if index is None else index  # (N,) into the images

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, at) -> BranchRows:
        own = at.cpu() if isinstance(at, Tensor) else at
        return BranchRows(self.raw[at], self._images, self._index[own])

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def shape(self) -> torch.Size:
        return self.raw.shape

    @property
    def images(self) -> Tensor:
        """(N, ...), each read once"""
        own, places = self._index.unique(return_inverse=True)
        return self._images[own.to(self._images.device)][places.to(self._images.device)]

    def split(self, n: int) -> list[BranchRows]:
        """Pieces of n rows."""
        return [self[i : i + n] for i in range(0, len(self), n)]

    def like(self, raw: Tensor) -> BranchRows:
        """Other outputs for the same images."""
        return BranchRows(raw, self._images, self._index)


Rows = Tensor | BranchRows  # (N, d_in) of a vector layer, (N, P, d_in) of one with P positions


def values_of(raw: Rows) -> Tensor:
    """The layer's output alone."""
    return raw.raw if isinstance(raw, BranchRows) else raw


class Activations(NamedTuple):
    """Images of one split, and the layer's output for them, computed once."""

    images: Tensor  # (N, ...) as the model takes them
    labels: Tensor  # (N,) int64
    raw: Rows  # before standardization


@dataclass(frozen=True, eq=False)
class ExplainedLayer:
    """A layer of a model, the SAE that reads it, and the activations of the splits at hand.

    The SAE is None until one is trained; `with_sae` gives the same layer with one.

    Raises ValueError unless mu and std are (d_in,), finite and of the SAE's dtype, std is positive,
    and no dropout or batch norm of the model is in training mode.
    """

    model: object
    sae: object
    mu: Tensor  # (d_in,)
    std: Tensor  # (d_in,)
    splits: Mapping[str, Activations] = field(default_factory=dict, repr=False)  # by name, "val"

    def __post_init__(self) -> None:
        weights = self.mu if self.sae is None else self.sae.W_enc
        expected = weights.dtype, (weights.shape[0],)
        for name, value in (("mu", self.mu), ("std", self.std)):
            if (met := (value.dtype, tuple(value.shape))) != expected:
                raise ValueError(f"{name} must be {expected} like the SAE's input, got {met}")
            check_finite(value[None], name)
        if (low := self.std.min()) <= 0:
            raise ValueError(f"std must be positive, got {low:g} at unit {int(self.std.argmin())}")
        check_eval_mode(self.model)

    def with_sae(self, sae: object) -> ExplainedLayer:
        """The same layer, read by another SAE."""
        return replace(self, sae=sae)

    @property
    def device(self) -> torch.device:
        return self.mu.device

    @property
    def d_sae(self) -> int:
        return self.sae.W_enc.shape[1]

    @property
    def n_classes(self) -> int:
        known = getattr(self.model, "n_classes", None)
        row = self.mu.expand(1, self.positions.n, -1) if self.has_positions else self.mu[None]
        return known or self.logits(row).shape[1]

    @torch.no_grad()
    def activations(self, images: Tensor, labels: Tensor) -> Activations:
        """The layer's output for images (N, ...) with labels (N,), from one pass over them.

        Raises ValueError without images, for labels that are no class indices, or random outputs.
        """
        if images.dim() and len(images) == 0:
            raise ValueError("images is empty: give at least one")
        check_deterministic(self, images)
        raw = torch.cat([values_of(self.raw(some)) for some in images.split(ROWS)])
        raw = self.rows(raw, images)
        return Activations(images, class_indices(labels, len(images), self.n_classes).cpu(), raw)

    @property
    def positions(self) -> Positions | None:
        """The positions of the layer's output, None where it is a vector."""
        return getattr(self.model, "positions", None)

    @property
    def has_positions(self) -> bool:
        return self.positions is not None

    @property
    def head_rows(self) -> int:
        """Rows in one pass through the rest of the model: fewer where a row is large."""
        n_positions = self.positions.n if self.has_positions else 1
        entries = max(n_positions * len(self.mu), getattr(self.model, "head_entries", 0))
        return max(1, min(HEAD_ROWS, HEAD_ENTRIES // entries))

    def raw(self, images: Tensor) -> Rows:
        """The layer's output for images (B, ...): (B, d_in), or (B, P, d_in) with positions.

        Raises ValueError for images the model cannot take, other shapes, and what is not finite.
        """
        if not isinstance(images, Tensor) or images.dim() < 2:
            met = tuple(getattr(images, "shape", ())) or type(images).__name__
            raise ValueError(f"images must be a tensor (B, ...), got {met}")
        check_finite(images, "images", "column")
        try:
            raw = self.model.preactivations(images.to(self.device))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            shape = tuple(images.shape)
            raise ValueError(f"the model cannot take images of shape {shape}: {error}") from error
        shape, expected = tuple(values_of(raw).shape), tuple(self.mu.shape)
        if shape[-1:] != expected or len(shape) != 2 + self.has_positions:
            raise ValueError(f"preactivations have shape {shape}, but mu has shape {expected}")
        check_finite(values_of(raw), "preactivations")
        return raw

    def rows(self, raw: Tensor, images) -> Rows:
        """The layer's output raw for `images`, with them where the rest of the model reads them."""
        return BranchRows(raw, images) if getattr(self.model, "is_branch", False) else raw

    def standardize(self, raw: Rows) -> Tensor:
        """z, what the SAE reads, of raw, in its shape."""
        return (values_of(raw) - self.mu) / self.std

    def acts_at(self, raw: Rows) -> Tensor:
        """Feature activations by position, (B, P, d_sae); P is 1 for a vector layer."""
        z = self.standardize(raw)
        return self.sae.encode(z.flatten(0, -2)).unflatten(0, (len(z), -1))

    def peaks(self, raw: Rows) -> tuple[Tensor, Tensor]:
        """Each feature's largest activation over positions (B, d_sae), and the first position that
        has it (B, d_sae)."""
        if not self.has_positions:
            acts = self.sae.encode(self.standardize(raw))
            return acts, torch.zeros_like(acts, dtype=torch.int64)
        rows = max(1, ENTRIES // (self.positions.n * self.d_sae))
        acts, position = zip(*(self.acts_at(some).max(1) for some in raw.split(rows)), strict=True)
        return torch.cat(acts), torch.cat(position)

    def feature_acts(self, raw: Rows) -> Tensor:
        """Feature activations (B, d_sae) of raw, the largest over positions."""
        return self.peaks(raw)[0]

    def acts_of(self, raw: Rows, k: int | Tensor) -> Tensor:
        """Activations (B,), or (B, P) with positions, of feature k: one for all rows, or (B,)."""
        z = self.standardize(raw)
        encode_feature = getattr(self.sae, "encode_feature", None)  # an SAE of one's own has none
        if encode_feature is not None:
            return encode_feature(z, k)
        acts = self.sae.encode(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
        return acts.movedim(-1, 1)[torch.arange(len(z), device=z.device), k]

    def logits(self, raw: Rows) -> Tensor:
        """Logits (B, C) of raw, `head_rows` at a time."""
        head = self.model.logits_from_preactivations
        logits = torch.cat([head(some) for some in raw.split(self.head_rows)])
        check_finite(logits, "logits", "class")
        return logits

    def logits_of_z(self, z: Tensor) -> Tensor:
        """Logits (B, C) of standardized z, (B, d_in) or (B, P, d_in)."""
        return self.logits(torch.addcmul(self.mu, z, self.std))

    def from_z(self, z: Tensor, raw: Rows) -> Rows:
        """Rows like raw, with the values of standardized z, (B, d_in) or (B, P, d_in)."""
        values = torch.addcmul(self.mu, z, self.std)
        return raw.like(values) if isinstance(raw, BranchRows) else values

    def moved(self, raw: Rows, step: Tensor, alpha: float | Tensor) -> Rows:
        """raw + alpha step, step (d_in,) or (B, d_in), alpha a number, (B,), or (B, P)."""
        values = values_of(raw)
        if isinstance(alpha, Tensor) and alpha.dim():
            alpha = alpha.reshape(alpha.shape + (1,) * (values.dim() - alpha.dim()))
        step = step[:, None] if step.dim() == 2 and self.has_positions else step
        values = values + alpha * step
        return raw.like(values) if isinstance(raw, BranchRows) else values

    def adding(self, raw: Rows, k: int | Tensor, alpha: float | Tensor) -> Rows:
        """raw with alpha times feature k added, at all positions: raw + alpha W_dec[k] std.

        k is one for all rows, or (B,); alpha a number, (B,), or (B, P) by position.
        """
        return self.moved(raw, self.sae.W_dec.detach()[k] * self.std, alpha)

    def without(self, raw: Rows, k: int | Tensor, acts: Tensor | None = None) -> Rows:
        """raw without what feature k contributes to it, at all positions: raw - f_k W_dec[k] std.

        k is one for all rows, or (B,); acts are those of `acts_of` where they are known. What the
        SAE does not reconstruct stays, so its error is not mistaken for the feature's effect.
        """
        return self.adding(raw, k, -(self.acts_of(raw, k) if acts is None else acts))


def check_finite(values: Tensor, what: str, unit: str = "unit", first: int = 0) -> None:
    """Raise ValueError unless values (N, ..., d) are finite; image `first` is the first of them."""
    wrong = values.isfinite().logical_not()
    if wrong.any():
        image, *_, at = wrong.nonzero()[0].tolist()
        of = f" of image {first + image}, {int(wrong.sum()):,} in all" if len(wrong) > 1 else ""
        raise ValueError(f"{what} must be finite, got {values[wrong][0]:g} at {unit} {at}{of}")


def check_eval_mode(model: object) -> None:
    """Raise ValueError when the model, or one in its attributes, trains dropout or batch norm."""
    if getattr(model, "runs_in_eval_mode", False):  # it switches the mode itself
        return
    kinds = torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase
    for part in (model, *getattr(model, "__dict__", {}).values()):
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            if module.training and isinstance(module, (*kinds, torch.nn.RReLU)):
                kind = type(module).__name__
                raise ValueError(f"the model is in training mode, and has {kind}: call eval()")


@torch.no_grad()
def check_deterministic(layer: ExplainedLayer, images: Tensor, head: bool = True) -> None:
    """Raise ValueError when the first PROBED of images (N, ...) give other numbers the second time.

    It finds dropout that is no module of its own. With `head`, logits are compared as well.
    """
    raw = layer.raw(images[:PROBED])
    pairs = [(values_of(raw), values_of(layer.raw(images[:PROBED])))]
    if head:
        pairs.append((layer.logits(raw), layer.logits(raw)))
    if any((a - b).abs().max() > ROUNDING * a.abs().max() for a, b in pairs if a.numel()):
        raise ValueError(
            "the model must be deterministic, but gives other numbers for the same images the "
            "second time, as dropout in training mode does; call eval()"
        )


def check_feature(k: int, d_sae: int) -> int:
    """k itself. Raises IndexError unless 0 <= k < d_sae, ValueError unless it is whole."""
    if not 0 <= check_whole("feature", k) < d_sae:
        raise IndexError(f"feature {k} does not exist: the SAE has features 0 to {d_sae - 1}")
    return int(k)


def check_whole(name: str, value: int, least: int = -LAST_INDEX) -> int:
    """The value itself. Raises ValueError unless it is a whole number, `least` to LAST_INDEX."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r:.60}") from None
    if whole < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if whole > LAST_INDEX:
        raise ValueError(f"{name} must be at most {LAST_INDEX:,}, got {value}")
    return whole


def class_indices(labels: Tensor, n_images: int, n_classes: int) -> Tensor:
    """labels (N,) as int64. Raises ValueError unless each image has a class index."""
    if tuple(labels.shape) != (n_images,):
        raise ValueError(f"{n_images} images need as many labels, got {tuple(labels.shape)}")
    low, high = (float(labels.min()), float(labels.max())) if len(labels) else (0, 0)
    if labels.is_floating_point() or low < 0 or high >= n_classes:
        met = f"{labels.dtype} from {low:g} to {high:g}"
        raise ValueError(f"labels must be whole numbers from 0 to {n_classes - 1}, got {met}")
    return labels.long()


def check_nonnegative(feature_acts: Tensor) -> None:
    """Raise ValueError for activations (B, d_sae) below 0: an inactive feature is at 0."""
    if feature_acts.numel() and float(feature_acts.min()) < 0:
        least, k = feature_acts.min(0).values.min(0)
        met = f"{least:.3g} of feature {k}; give the SAE thresholds of 0 or more"
        raise ValueError(f"activations must be 0 or more, got {met}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on CPUs torch raises a plain RuntimeError for that."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def class_name(classes: Sequence[str], c: int) -> str:
    """The name of class c: its number where `classes` is empty."""
    return classes[c] if classes else str(c)


def check_pair(found: object, what: str) -> Sequence:
    """`found` itself. Raises ValueError unless it is (images, labels): no tensor or dict of two."""
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        keys = f" with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
        raise ValueError(f"{what} must be (images, labels), got a {type(found).__name__}{keys}")
    return found


def fixed_order_batches(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches.

    Raises ValueError for a loader that can be read only once, or that shuffles: the second pass
    must have the same first batch, and the same images first in the next ones.
    """
    if iter(loader) is loader:
        raise ValueError("the loader can be read only once: give a list, or a DataLoader")
    seen = []  # before the second pass begins: it may be by the same iterator, reset
    for batch in itertools.islice(loader, BATCHES_COMPARED):
        images, _ = check_pair(batch, "each batch")
        seen.append((images[:PROBED] if seen else images).clone())
    for number, batch in enumerate(loader):
        images, labels = check_pair(batch, "each batch")
        again = (images[:PROBED] if number else images).nan_to_num()  # `raw` has words for NaN
        if number < len(seen) and not again.equal(seen[number].nan_to_num()):
            raise ValueError("the loader must not shuffle or augment: each pass has other images")
        yield images, labels


@torch.no_grad()
def raw_batches(
    layer: ExplainedLayer, loader: Iterable, n: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The layer's output (B, d_in) and labels (B,), batch by batch, of the loader's first n images.

    Raises ValueError for an empty or shuffling loader, labels that are no class indices, and a
    model that is not deterministic.
    """
    seen = 0
    for images, labels in fixed_order_batches(loader):
        if n is not None:
            images, labels = images[: n - seen], labels[: n - seen]
        raw = layer.raw(images)
        if seen == 0:
            check_deterministic(layer, images)
            n_classes = layer.n_classes
        yield raw, class_indices(labels.to(raw.device), len(images), n_classes)
        seen += len(images)
        if seen == n:
            return
    if seen == 0:
        raise ValueError("the loader is empty: it must give at least one batch of (images, labels)")


# --------------------------------------------------------------------------------------------------
# Which images activate a feature?
# --------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Some images of each feature, each (d_sae, n); -1, 0, -1 where there is none."""

    index: Tensor
    activation: Tensor
    label: Tensor

    @classmethod
    def cat(cls, parts: Iterable[Examples], dim: int) -> Examples:
        """The examples of all parts, one after the other along `dim`."""
        return cls(*(torch.cat(columns, dim) for columns in zip(*parts, strict=True)))

    def at(self, places) -> Examples:
        """Those at `places`, anything that indexes a tensor."""
        return Examples(self.index[places], self.activation[places], self.label[places])

    def of(self, k: int) -> Examples:
        """Those of feature k alone, each (m,), without the empty places."""
        row = self.at(k)
        return row.at(row.index >= 0)


class FeatureBank(NamedTuple):
    """Where each feature is active, over `n_images` images. All tensors are on the CPU."""

    top: Examples  # (d_sae, topk), strongest first
    sample: Examples  # (d_sae, SAMPLE_PER_FEATURE), a uniform sample of its active images
    label_histogram: Tensor  # (d_sae, C) int64, active images by label
    activation_sum: Tensor  # (d_sae,) float64, of the positive activations
    n_images: int

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) number of images on which the feature is active."""
        return self.label_histogram.sum(1)

    @property
    def feature_density(self) -> Tensor:
        """(d_sae,) share of images on which the feature is active."""
        return self.n_active.float() / self.n_images

    @property
    def mean_activation_when_active(self) -> Tensor:
        """(d_sae,) 0 for a feature that is never active."""
        return (self.activation_sum / self.n_active.clamp(min=1)).float()

    def bands(self, k: int, n_bands: int = N_BANDS, per_band: int = PER_BAND) -> list[Examples]:
        """Examples of feature k from equal quantile bands of its active range, strongest first.

        Up to `per_band` are spread evenly over each band. The bands are those of the random sample:
        exact while the feature is active on at most SAMPLE_PER_FEATURE images.
        """
        sample = self.sample.of(check_feature(k, len(self.label_histogram)))
        order = torch.argsort(sample.activation, descending=True, stable=True)
        bands = []
        for members in order.tensor_split(n_bands):
            n = len(members)
            spread = torch.linspace(0, max(0, n - 1), min(per_band, n)).round().long()
            bands.append(sample.at(members[spread]))
        return bands


def _strength(examples: Examples) -> Tensor:
    """(d_sae, n) int64, larger for a stronger activation and, among equals, for an earlier image.

    Positive floats are ordered like their bits, so both fit into one integer, and no two of a
    feature's are equal: the order of batches does not matter, nor how a library breaks ties.
    """
    bits = examples.activation.float().contiguous().view(torch.int32).long()
    return (bits << 32) | (LAST_INDEX - examples.index)


def _hash(examples: Examples) -> Tensor:
    """(d_sae or 1, n) int64, a pseudo-random number that belongs to the image.

    Keeping the largest draws a uniform sample of the active images, the same however the data was
    cut. The finalizer of MurmurHash3 (Appleby 2011) is a bijection: no two images share a number.
    """
    mask = 2**32 - 1
    h = examples.index + 1
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return h ^ (h >> 16)


def _largest(examples: Examples, key: Tensor, n: int) -> Examples:
    """The n active examples of each feature with the largest keys, in that order, (d_sae, n).

    The columns of `examples`, and the key, are (d_sae, m), or (1, m) if all features share them.
    """
    key = torch.where(examples.activation > 0, key, -1)
    best, place = key.topk(min(n, key.shape[1]), dim=1)
    kept = []
    for column, empty in zip(examples, (-1, 0, -1), strict=True):
        chosen = column.expand_as(key).gather(1, place).masked_fill(best < 0, empty)
        missing = n - chosen.shape[1]
        kept.append(torch.nn.functional.pad(chosen, (0, missing), value=empty).cpu())
    return Examples(*kept)


def merge_feature_banks(a: FeatureBank, b: FeatureBank) -> FeatureBank:
    """The bank of two disjoint sets of images, as if it had been collected over both at once.

    Collect the second with `first_index` set to the number of images before it. Raises ValueError
    when the banks are of different SAEs, classes or topk, and when an image is in the samples of
    both; a few images in common can escape it where many activate each feature.
    """
    x, y = ((*bank.label_histogram.shape, bank.top.index.shape[1]) for bank in (a, b))
    if x != y:
        raise ValueError(f"banks must have the same (d_sae, C, topk), got {x} and {y}")
    top, sample = Examples.cat([a.top, b.top], 1), Examples.cat([a.sample, b.sample], 1)
    sample = _largest(sample, _hash(sample), SAMPLE_PER_FEATURE)
    twice = (sample.index.diff() == 0) & (sample.index[:, 1:] >= 0)  # the same hash: neighbors
    if twice.any():
        image = int(sample.index[:, 1:][twice][0])
        raise ValueError(f"both banks hold image {image}: collect the second with first_index")
    return FeatureBank(
        top=_largest(top, _strength(top), a.top.index.shape[1]),
        sample=sample,
        label_histogram=a.label_histogram + b.label_histogram,
        activation_sum=a.activation_sum + b.activation_sum,
        n_images=a.n_images + b.n_images,
    )


def _bank_of_rows(
    layer: ExplainedLayer, raw: Tensor, labels: Tensor, topk: int, first_index: int
) -> FeatureBank:
    """The bank of raw (B, d_in) with labels (B,), all rows at once and features in blocks."""
    acts = layer.feature_acts(raw)
    check_nonnegative(acts)
    index = torch.arange(first_index, first_index + len(raw), device=raw.device)
    one_hot = torch.nn.functional.one_hot(labels, layer.n_classes).float()
    tops, samples, counts, sums = [], [], [], []
    for block in acts.split(max(1, ENTRIES // max(1, len(raw))), dim=1):  # (B, n)
        every = Examples(index[None], block.T.contiguous(), labels[None])
        tops.append(_largest(every, _strength(every), topk))
        samples.append(_largest(every, _hash(every), SAMPLE_PER_FEATURE))
        counts.append((block > 0).float().T @ one_hot)  # exact, being below 2^24
        sums.append(block.clamp(min=0).sum(0, dtype=torch.float64))
    histogram = torch.cat(counts).long().cpu()
    # Multiples of 2^-30 below 2^23 add up exactly, in any order.
    total = (torch.round(torch.cat(sums) * 2**30) / 2**30).cpu()
    return FeatureBank(Examples.cat(tops, 0), Examples.cat(samples, 0), histogram, total, len(raw))


@torch.no_grad()
def feature_bank(
    layer: ExplainedLayer, raw: Tensor, labels: Tensor, topk: int = 20, first_index: int = 0
) -> FeatureBank:
    """The bank of images with the layer's output raw (N, d_in) and labels (N,).

    `topk` strongest examples are kept of each feature, fewer where fewer images activate it.
    """
    check_whole("topk", topk, 1)
    check_whole("first_index", first_index, 0)
    labels, at_once = labels.to(raw.device), max(ROWS, ENTRIES // layer.d_sae)
    banks = (  # one at a time
        _bank_of_rows(layer, raw[i : i + at_once], labels[i : i + at_once], topk, first_index + i)
        for i in range(0, max(1, len(raw)), at_once)
    )
    return functools.reduce(merge_feature_banks, banks)


def collect_feature_bank(
    model, loader: Iterable, sae, mu, std, topk: int = 20, first_index: int = 0
) -> FeatureBank:
    """One pass over the images: which of them activate each feature, how strongly, which labels.

    `topk` strongest examples are kept of each feature; `first_index` is the index of the loader's
    first image, for banks that will be merged. Memory grows with d_sae x topk, not with N. Raises
    ValueError for shapes, loaders and labels that do not fit, and topk < 1.
    """
    layer, bank = ExplainedLayer(model, sae, mu, std), None
    for raw, labels in raw_batches(layer, loader):
        part = feature_bank(layer, raw, labels, topk, first_index)
        bank = part if bank is None else merge_feature_banks(bank, part)
        first_index += len(labels)
    return bank


# --------------------------------------------------------------------------------------------------
# Which pixels drive a feature?
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def is_linear(layer: ExplainedLayer, image_shape, images: Tensor | None = None) -> bool:
    """Whether the layer's output is linear in the pixels of images of that shape.

    It is when it is so on the way between any two images. Three pairs of fixed noise images are
    tried, and pairs among up to 64 of `images` (N, ...), whose pixels may be on another scale.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(6, *image_shape, generator=generator, dtype=torch.float32)
    tried = noise.to(layer.device)
    if images is not None:
        n = min(len(images), 64) // 2
        some = images[: 2 * n].to(tried)
        tried = torch.cat([tried[:3], some[:n], tried[3:], some[n:]])
    a, b = tried.chunk(2)
    at_a, at_b, between = (values_of(layer.raw(x)) for x in (a, b, 0.3 * a + 0.7 * b))
    bend = (0.3 * at_a + 0.7 * at_b - between).abs().amax(0)  # (d_in,)
    return not (bend > ROUNDING * torch.cat([at_a, at_b]).abs().amax(0)).any()


def check_gradients(model, images: Tensor) -> None:
    """Raise ValueError where no gradient leads from the layer to the pixels of images (N, ...).

    Taken as zeros, such gradients would look like a feature that no pixel drives.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("input patterns need gradients: leave torch.inference_mode() for them")
    pixels = images[:1].float().clone().detach().requires_grad_()
    with torch.enable_grad():
        raw = values_of(model.preactivations(pixels)).sum()
        # None of the pixels' where weights alone have a gradient.
        found = torch.autograd.grad(raw, pixels, allow_unused=True) if raw.requires_grad else [None]
    if found[0] is None:
        raise ValueError(
            "no gradient leads from the layer to the pixels: the network must not use no_grad() or "
            "detach() on the way; freeze weights with requires_grad_(False) instead"
        )


def check_vector(layer: ExplainedLayer) -> None:
    """Raise ValueError for a layer with positions, whose features have a pattern at each."""
    if layer.has_positions:
        raise ValueError("the layer has positions: saexplain.where gives the patterns of features")


def _mean_jacobian(
    layer: ExplainedLayer, directions: Tensor, images: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Mean over images (N, ...) of d(raw @ directions) / d(pixels): (n, ...), directions (d_in, n).

    Without images, a blank one of that shape serves if the layer is linear. A single channel is
    dropped.
    """
    if images is None:
        if not is_linear(layer, shape):
            raise ValueError("the model is not linear in the pixels: pass images to average over")
        images = torch.zeros(1, *shape, dtype=torch.float32)
    if len(images) == 0:
        raise ValueError("images is empty: give at least one to average over")
    check_deterministic(layer, images, head=False)
    check_gradients(layer.model, images.to(layer.device))

    def projected(pixels: Tensor) -> Tensor:
        return (values_of(layer.raw(pixels)) @ directions).sum(0)  # (n,): images do not mix

    total = 0.0
    entries = directions.shape[1] * math.prod(images.shape[1:])  # of the gradients at one image
    at_once = max(1, min(GRADIENT_ROWS, GRADIENT_ENTRIES // max(1, entries)))
    for batch in images.split(at_once):
        pixels = batch.to(layer.device).float().clone()  # one of inference mode has no gradients
        total = total + torch.autograd.functional.jacobian(projected, pixels).sum(1)
    mean = total / len(images)
    return mean[:, 0] if mean.dim() == 4 and mean.shape[1] == 1 else mean


def feature_input_pattern(
    model, sae, mu, std, k: int, images: Tensor | None = None, image_shape=(1, 28, 28)
) -> Tensor:
    """Gradient of feature k's pre-activation with respect to the pixels, (28, 28) for MNIST.

    By the chain rule through the standardization and the model:

        d pre_k / d x  =  sum_i  W_enc[i, k] / std[i]  *  d raw_i / d x

    Exact, and the same for every image, when the layer's output is linear in the pixels. For any
    other model pass `images` (N, ...), over which the gradient is averaged. The result has the
    shape of one image, a single channel dropped. Raises IndexError for a k out of range; ValueError
    for shapes that do not fit and for a non-linear model without images.
    """
    layer = ExplainedLayer(model, sae, mu, std)
    k = check_feature(k, layer.d_sae)
    check_vector(layer)
    direction = (sae.W_enc[:, k] / std)[:, None].detach()
    return _mean_jacobian(layer, direction, images, image_shape)[0]


def feature_input_patterns(
    model, sae, mu, std, images: Tensor | None = None, image_shape=(1, 28, 28)
) -> Tensor:
    """`feature_input_pattern` of every feature: (d_sae, 28, 28).

    Pre-activations are linear in the layer's output, so d_in gradients serve all features.
    """
    layer = ExplainedLayer(model, sae, mu, std)
    check_vector(layer)
    basis = torch.eye(len(mu), device=mu.device, dtype=mu.dtype)
    jacobian = _mean_jacobian(layer, basis, images, image_shape)  # (d_in, H, W)
    return torch.tensordot((sae.W_enc.detach() / std[:, None]).T, jacobian, dims=1)


# --------------------------------------------------------------------------------------------------
# Which classes does a feature support?
# --------------------------------------------------------------------------------------------------


class LogitEffect(NamedTuple):
    """Mean change of the logits, (C,), and the class it raises most; -1 when no image changed."""

    mean_delta: Tensor
    top_class: int


class LogitEffects(NamedTuple):
    """The same for every feature, and the number of images of each mean."""

    mean_delta: Tensor  # (d_sae, C)
    top_class: Tensor  # (d_sae,)
    n_images: Tensor  # (d_sae,)

    def of(self, k: int) -> LogitEffect:
        return LogitEffect(self.mean_delta[k], int(self.top_class[k]))

    @classmethod
    def from_sums(cls, delta_sum: Tensor, n_images: Tensor) -> LogitEffects:
        """From the sums (n, C) of changes over n_images (n,) images each."""
        mean = (delta_sum / n_images.clamp(min=1)[:, None]).float()
        return cls(mean, torch.where(n_images > 0, mean.argmax(1), -1), n_images)


@torch.no_grad()
def logit_effects(
    layer: ExplainedLayer, raw: Tensor, alpha: float = 1.0, features: Tensor | None = None
) -> LogitEffects:
    """What adding alpha times each of `features` (n,), by default all, does to the logits of raw.

    A layer with positions gets it at all of them.
    """
    features = torch.arange(layer.d_sae) if features is None else features
    if not abs(alpha) < 1e300:  # nan is not, either
        raise ValueError(f"alpha must be finite, got {alpha}")
    base = layer.logits(raw).sum(0, dtype=torch.float64)
    sums = torch.zeros(len(features), len(base), dtype=torch.float64, device=raw.device)
    n = len(raw)
    at_once = max(1, layer.head_rows // n)  # features
    for out, some in zip(sums.split(at_once), features.split(at_once), strict=True):
        image = torch.arange(n, device=raw.device).repeat(len(some))
        moved = layer.adding(raw[image], some.to(raw.device).repeat_interleave(n), alpha)
        logits = layer.logits(moved).unflatten(0, (len(some), n))
        out.copy_(logits.sum(1, dtype=torch.float64) - base)
    return LogitEffects.from_sums(sums, torch.full((len(features),), len(raw), device=raw.device))


@torch.no_grad()
def ablation_effects(
    layer: ExplainedLayer, batches: Iterable[Tensor], features: Tensor, n_eval: int
) -> LogitEffects:
    """What removing each of `features` (n,) does, over the first n_eval images that activate it.

    `batches` give the layer's output, (B, d_in) each.
    """
    check_whole("n_eval", n_eval, 1)
    features = features.to(layer.device)
    counts = torch.zeros(len(features), dtype=torch.int64, device=layer.device)
    sums = counts.new_zeros(len(features), layer.n_classes, dtype=torch.float64)
    for raw in batches:
        base = layer.logits(raw)
        feature_acts = layer.feature_acts(raw)
        check_nonnegative(feature_acts)
        feature_acts = feature_acts[:, features]  # (B, n)
        active = (feature_acts > 0).T  # (n, B)
        wanted = active & (counts[:, None] + active.cumsum(1) <= n_eval)
        counts += wanted.sum(1)
        which, image = wanted.nonzero().unbind(1)  # each pair is a row of the head
        at_once = layer.head_rows
        for w, i in zip(which.split(at_once), image.split(at_once), strict=True):
            acts = None if layer.has_positions else feature_acts[i, w]
            without = layer.without(raw[i], features[w], acts)
            sums.index_add_(0, w, (layer.logits(without) - base[i]).double())
    return LogitEffects.from_sums(sums, counts)


def _first_raw(layer: ExplainedLayer, loader: Iterable, n_eval: int) -> Tensor:
    """The layer's output (n, d_in) for the loader's first n_eval images."""
    n_eval = check_whole("n_eval", n_eval, 1)
    found = [raw for raw, _ in raw_batches(layer, loader, n_eval)]
    if isinstance(found[0], BranchRows):
        images = torch.cat([rows.images for rows in found])
        return BranchRows(torch.cat([rows.raw for rows in found]), images)
    return torch.cat(found)


def feature_logit_effects(
    model, loader: Iterable, sae, mu, std, alpha: float = 1.0, n_eval: int = 2000
) -> LogitEffects:
    """`feature_logit_effect` of every feature."""
    layer = ExplainedLayer(model, sae, mu, std)
    return logit_effects(layer, _first_raw(layer, loader, n_eval), alpha)


def feature_logit_effect(
    model, loader: Iterable, sae, mu, std, k: int, alpha: float = 1.0, n_eval: int = 2000
) -> LogitEffect:
    """What adding feature k does to the logits, over the loader's first `n_eval` images.

    alpha * W_dec[k], which is alpha * W_dec[k] * std in the space of the model, is added to the
    image's own activations, not to their reconstruction. Raises IndexError for a k out of range,
    ValueError for shapes that do not fit, an empty loader or n_eval < 1.
    """
    layer = ExplainedLayer(model, sae, mu, std)
    only = torch.tensor([check_feature(k, layer.d_sae)])
    return logit_effects(layer, _first_raw(layer, loader, n_eval), alpha, only).of(0)


def feature_ablation_effects(
    model, loader: Iterable, sae, mu, std, n_eval: int = 2000
) -> LogitEffects:
    """`feature_ablation_effect` of every feature; one row of the head for each active pair."""
    layer = ExplainedLayer(model, sae, mu, std)
    batches = (raw for raw, _ in raw_batches(layer, loader))
    return ablation_effects(layer, batches, torch.arange(layer.d_sae), n_eval)


def feature_ablation_effect(
    model, loader: Iterable, sae, mu, std, k: int, n_eval: int = 2000
) -> LogitEffect:
    """What removing feature k does to the logits, over the first `n_eval` images that activate it.

    Only its own contribution f_k * W_dec[k] is subtracted from the image's activations, as
    `ExplainedLayer.without` does. Zeros for a feature that is never active. Raises like
    `feature_logit_effect`.
    """
    layer = ExplainedLayer(model, sae, mu, std)
    only = torch.tensor([check_feature(k, layer.d_sae)])
    batches = (raw for raw, _ in raw_batches(layer, loader))
    return ablation_effects(layer, batches, only, n_eval).of(0)


# --------------------------------------------------------------------------------------------------
# Which features are alike?
# --------------------------------------------------------------------------------------------------


class NearestFeatures(NamedTuple):
    """For every feature the other one with the most similar decoder direction, (d_sae,) each."""

    feature: Tensor  # -1 when there is no other feature
    cosine: Tensor  # and 0


@torch.no_grad()
def nearest_features(W_dec: Tensor) -> NearestFeatures:
    """Nearest neighbors among the rows of W_dec (d_sae, d_in), by cosine, on the CPU."""
    if len(W_dec) < 2:
        return NearestFeatures(torch.full((len(W_dec),), -1), torch.zeros(len(W_dec)))
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    cosines, features = [], []
    for first in range(0, len(unit), ROWS):  # (ROWS, d_sae) at a time, never (d_sae, d_sae)
        similarity = unit[first : first + ROWS] @ unit.T
        similarity.diagonal(first).fill_(-2.0)  # never itself
        cosine, feature = similarity.max(1)
        cosines.append(cosine)
        features.append(feature)
    return NearestFeatures(torch.cat(features).cpu(), torch.cat(cosines).cpu())


# --------------------------------------------------------------------------------------------------
# Pictures: painted into arrays of uint8, many times faster than drawing a figure
# --------------------------------------------------------------------------------------------------

UNFINISHED = ".unfinished"  # ending of the names of files that are being written
DPI = 100
TILE, PATTERN = 56, 224  # screen pixels across a gallery's image, and a pattern, about
COLUMNS, GAP = 10, 4  # tiles in a row of a gallery, and screen pixels between two of them
MARGIN, TITLE, HEADER = 12, 30, 24  # screen pixels around a picture, for its title, for a header
WHITE, FRAME = 255, 217  # gray levels; ink is dark on white
MONO, BOLD = "DejaVuSansMono", "DejaVuSansMono-Bold"  # files of fonts
STEPS = 100  # colors of a pattern on either side of white
TEXT = (2 * STEPS + 1, 254)  # the palette's black and white; grays lie between them
NO_INK = 255  # the palette's color of pixels that images do not ink
GRAYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)  # (256, 3), the palette of galleries


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all, whatever interrupts."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:  # not mkstemp, which ignores the umask
            file.write(content)
        os.replace(unfinished, path)  # atomic within a folder
    except BaseException:  # an interrupt as well
        unfinished.unlink(missing_ok=True)
        raise


def png_bytes(pixels: np.ndarray, palette: np.ndarray = GRAYS) -> bytes:
    """A picture as PNG: uint8 colors (height, width, 3), or indices into a palette (n, 3)."""
    image = Image.fromarray(pixels)
    if pixels.ndim == 2:  # with a palette, Pillow skips the filters, which take most of the time
        image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # many small files: speed before size
    return buffer.getvalue()


def save_pixels(pixels: np.ndarray, path: str | Path, palette: np.ndarray = GRAYS) -> None:
    """Save a picture as PNG, completely or not at all."""
    write_whole(path, png_bytes(pixels, palette))


@functools.cache
def pattern_palette() -> np.ndarray:
    """The 256 colors of patterns, (256, 3) uint8: values from -1 to 1, grays of TEXT, NO_INK."""
    from matplotlib import colormaps

    values = np.linspace(0, 1, 2 * STEPS + 1)
    colors = colormaps["RdBu_r"](values, bytes=True)[:, :3]
    grays = GRAYS[np.linspace(0, 255, TEXT[1] - TEXT[0] + 1).round().astype(int)]
    return np.concatenate([colors, grays, GRAYS[[224]]])


def figure_of(pixels: np.ndarray, save_path: str | Path | None, palette=GRAYS) -> Figure:
    """A Figure that shows a picture pixel for pixel, unknown to pyplot: it needs no closing. It is
    saved as well where there is a path. Picture and palette are those of `save_pixels`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if save_path is not None:
        save_pixels(pixels, save_path, palette)
    figure = Figure(figsize=(pixels.shape[1] / DPI, pixels.shape[0] / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure._repr_png_ = functools.partial(png_bytes, pixels, palette)  # a notebook shows it by this
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    colors = palette[pixels] if pixels.ndim == 2 else pixels
    axes.imshow(colors, interpolation="nearest", aspect="auto")
    return figure


@functools.lru_cache(maxsize=10_000)  # galleries repeat most of their labels and activations
def text_pixels(
    text: str, size: int = 12, name: str = "DejaVuSans", levels: tuple[int, int] = (0, WHITE)
) -> np.ndarray:
    """A line of text, (height, width) uint8, with `levels` of ink and paper."""
    from matplotlib import get_data_path  # it comes with fonts

    if name in (MONO, BOLD) and len(text) > 1:  # letters side by side: each is drawn only once
        return np.hstack([text_pixels(letter, size, name, levels) for letter in text])
    file = f"{get_data_path()}/fonts/ttf/{name}.ttf"
    basic = ImageFont.Layout.BASIC  # the other one depends on what is installed
    font = ImageFont.truetype(file, size, layout_engine=basic)
    ink, paper = levels
    ascent, descent = font.getmetrics()
    line = Image.new("L", (round(font.getlength(text)), ascent + descent), paper)
    ImageDraw.Draw(line).text((0, ascent), text, fill=ink, font=font, anchor="ls")
    return np.asarray(line)


def paste(page: np.ndarray, part: np.ndarray, top: int, left: int) -> None:
    """Put a picture, perhaps a gray one into one of colors, into `page`, cut at its edges."""
    space = page[top : top + part.shape[0], left : left + part.shape[1]]
    part = part[: space.shape[0], : space.shape[1]]
    space[:] = part if part.ndim == page.ndim else part[:, :, None]


def zoom_factor(shape: tuple[int, ...], width: int) -> int:
    """Screen pixels for each pixel of an (H, W) picture so that it is about `width` wide."""
    if len(shape) != 2:
        raise ValueError(f"the pattern must have shape (H, W), got {tuple(shape)}")
    return max(1, round(width / shape[1]))


def enlarged(pictures: np.ndarray, zoom: int) -> np.ndarray:
    """pictures (..., H, W), each pixel zoom times: (..., zoom * H, zoom * W)."""
    return pictures.repeat(zoom, -1).repeat(zoom, -2)


def as_array(values) -> np.ndarray:
    """A tensor or array as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_pictures(images) -> np.ndarray:
    """Images as an array (N, H, W) with ink in [0, 1], or (N, 3, H, W) in color.

    Raises ValueError for images of another shape or scale.
    """
    array = as_array(images)
    array = array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array
    if array.ndim not in (3, 4) or array.shape[1:-2] not in ((), (3,)) or 0 in array.shape[1:]:
        raise ValueError(f"images must be (N, H, W) or (N, C, H, W), C = 1 or 3: got {array.shape}")
    low, high = array.min(initial=0), array.max(initial=0)
    if not (low >= 0 and high <= 1):  # in this form NaN is an error as well
        met = f"pixels run from {low:.3g} to {high:.3g}"
        raise ValueError(f"images: {met}; pictures need 0 to 1: give as_ink(images)")
    return array


def as_mask(inked, shape: tuple[int, ...]) -> np.ndarray | None:
    """`inked` as a bool array, or None. Raises ValueError unless it has the pattern's shape."""
    if inked is None:
        return None
    mask = as_array(inked).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"inked must have the pattern's shape {tuple(shape)}, got {mask.shape}")
    return mask


# --------------------------------------------------------------------------------------------------
# Galleries and patterns
# --------------------------------------------------------------------------------------------------

GALLERY_HEADERS = (  # (row of tiles below it, column at which it starts, text)
    (0, 0, "strongest images (below each: label and activation)"),
    (2, 0, "from the strongest quarter of its active range"),
    (2, 5, "from the second quarter"),
    (3, 0, "from the third quarter"),
    (3, 5, "from the weakest quarter"),
)
HEADERS_ABOVE = (1, 1, 2, 3)  # lines of headers above each row of tiles
SHORT_NAME = 2  # letters of a class's name that leave space for an activation beside it


def _three_digits(value: float) -> str:
    """A positive number in few characters: 1.83, 12.6, 128, 4e-03."""
    if value < 0.005:
        return f"{value:.0e}"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def shortened(text: str, n: int) -> str:
    """A text in at most n letters."""
    return text if len(text) <= n else f"{text[: n - 1]}…"


def _gallery_title(k: int, bank: FeatureBank) -> str:
    percent = 100 * int(bank.n_active[k]) / bank.n_images
    if percent == 0:
        return f"Feature {k}: never active on these {bank.n_images:,} images"
    return f"Feature {k}: active on {percent:.3g}% of {bank.n_images:,} images"


def _gallery_examples(k: int, bank: FeatureBank) -> tuple[list[int], Examples]:
    """The numbers of a gallery's tiles that are not empty, row by row, and their examples."""
    blocks = [bank.top.of(k).at(slice(2 * COLUMNS)), *bank.bands(k)]  # two rows, then half rows
    starts = [0, *range(2 * COLUMNS, 4 * COLUMNS, PER_BAND)]
    tiles = []
    for start, block in zip(starts, blocks, strict=True):
        tiles += range(start, start + len(block.index))
    return tiles, Examples(*map(torch.cat, zip(*blocks, strict=True)))


class GalleryPainter:
    """Painter of galleries, which paints once what all of them have in common."""

    def __init__(self, images, classes: Sequence[str] = ()):
        self.images, self.classes = as_pictures(images), classes
        height, width = self.images.shape[-2:]
        self.zoom = zoom_factor((height, width), TILE)
        self.tile = self.zoom * height + 2, self.zoom * width + 2  # with its frame

        self.lines = 2 if max(map(len, classes), default=0) > SHORT_NAME else 1
        self.letter = text_pixels("m", 10, MONO).shape  # (height, width) below tiles
        pitch = self.tile[0] + self.lines * self.letter[0]
        tops = [TITLE + HEADER * n + pitch * row for row, n in enumerate(HEADERS_ABOVE)]
        lefts = [MARGIN + (self.tile[1] + GAP) * column for column in range(COLUMNS)]
        self.places = [(top, left) for top in tops for left in lefts]  # of the tiles

        size = tops[-1] + pitch + MARGIN, lefts[-1] + self.tile[1] + GAP + MARGIN
        self.channels = (3,) * (self.images.ndim == 4)  # none in gray
        self.background = np.full(size + self.channels, WHITE, np.uint8)
        for row, column, text in GALLERY_HEADERS:
            paste(self.background, text_pixels(text), tops[row] - HEADER + 5, lefts[column])

    def paint_images(self, k: int, numbers: Sequence[int], index: np.ndarray) -> np.ndarray:
        """The images at index (n,), for these tiles of feature k: uint8 (n, H, W), in color
        (n, H, W, 3)."""
        shown = self.images[index].clip(0, 1)
        if self.channels:
            return (255 * shown + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
        return (255.5 - 255 * shown).astype(np.uint8)

    def paint(self, k: int, bank: FeatureBank) -> np.ndarray:
        """The gallery of feature k, uint8 (height, width), or (height, width, 3) in color.

        Raises IndexError for a k out of range and for images that are not the bank's.
        """
        numbers, examples = _gallery_examples(check_feature(k, len(bank.label_histogram)), bank)
        index, last = examples.index.numpy(), int(examples.index.amax() if numbers else -1)
        if last >= len(self.images):
            met = f"only {len(self.images)} were given"
            raise IndexError(f"images must hold image {last}, which activates feature {k}; {met}")
        shown = self.paint_images(k, numbers, index)
        tiles = np.full((len(index), *self.tile, *self.channels), FRAME, np.uint8)
        tiles[:, 1:-1, 1:-1] = shown.repeat(self.zoom, 1).repeat(self.zoom, 2)

        page = self.background.copy()
        paste(page, text_pixels(_gallery_title(k, bank), 15, BOLD), 8, MARGIN)
        _, activations, labels = (column.tolist() for column in examples)
        for number, tile, activation, label in zip(
            numbers, tiles, activations, labels, strict=True
        ):
            top, left = self.places[number]
            paste(page, tile, top, left)
            name, strength = class_name(self.classes, label), _three_digits(activation)
            texts = [f"{name}: {strength}"]
            if self.lines == 2:
                texts = [shortened(name, self.tile[1] // self.letter[1]), strength]
            for n, text in enumerate(texts):
                line = text_pixels(text, 10, MONO)[:, : self.tile[1]]
                indent = (self.tile[1] - line.shape[1]) // 2
                paste(page, line, top + self.tile[0] + n * self.letter[0], left + indent)
        return page


def show_feature_gallery(
    k: int, bank: FeatureBank, images, save_path: str | Path | None = None, classes: Sequence = ()
) -> Figure:
    """The images that activate feature k: the strongest, then five from each quarter of its range.

    `images` (N, H, W), ink, or (N, 3, H, W), colors, are those the bank was collected on, in the
    same order; `classes` are the names of the labels. Raises IndexError for a k out of range or too
    few images, ValueError for images of another shape or scale.
    """
    return figure_of(GalleryPainter(images, classes).paint(k, bank), save_path)


def display_scale(heat: np.ndarray, inked: np.ndarray | None) -> float:
    """The value drawn in full color in the pattern `heat` (H, W): the 99th percentile of |heat|
    where there is ink, so one pixel cannot dim all; at least a quarter of the largest, so noise
    does not scale a pattern of few pixels."""
    visible = np.abs(heat if inked is None else heat[inked])
    if not visible.size:
        return 0.0
    return max(float(np.quantile(visible, 0.99)), float(visible.max()) / 4)


def pattern_colors(heat: np.ndarray, scale: float, inked: np.ndarray | None) -> np.ndarray:
    """`heat` (H, W) as indices into the palette, (H, W) uint8."""
    shown = heat / scale if scale else np.zeros_like(heat)
    colors = np.rint(STEPS * (shown.clip(-1, 1) + 1)).astype(np.uint8)
    if inked is not None:
        colors[~inked] = NO_INK
    return colors


def paint_pattern(heat: np.ndarray, k: int, inked=None, words: str = "") -> np.ndarray:
    """The pattern `heat` (H, W) of feature k, (height, width) uint8 into `pattern_palette`: red
    pixels raise it, blue ones lower it, gray ones are not inked. `words` replace the note on top.
    """
    zoom, mask = zoom_factor(heat.shape, PATTERN), as_mask(inked, heat.shape)
    height, width = zoom * heat.shape[0], zoom * heat.shape[1]
    top, left = TITLE + len(text_pixels("", 11, MONO)) + 4, width + 2 * MARGIN  # of pattern, bar
    page = np.full((top + height + MARGIN, left + 76), TEXT[1], np.uint8)
    bar = np.linspace(2 * STEPS, 0, height).round().astype(np.uint8)
    paste(page, bar[:, None].repeat(12, 1), top, left)
    for share, text in ((0.0, "raises"), (0.5, "0"), (1.0, "lowers")):
        line = text_pixels(text, 11, levels=TEXT)
        paste(page, line, top + round(share * (height - len(line))), left + 18)

    scale = display_scale(heat, mask)
    paste(page, enlarged(pattern_colors(heat, scale, mask), zoom), top, MARGIN)
    title, note = f"Feature {k}: pixels that drive it", f"full color: {scale:.2g} per pixel of ink"
    paste(page, text_pixels(title, 14, BOLD, TEXT), 6, MARGIN)
    line = text_pixels(words, 11, levels=TEXT) if words else text_pixels(note, 11, MONO, TEXT)
    paste(page, line, TITLE, MARGIN)
    return page


def visualize_feature_pattern(heat, k: int, save_path=None, inked=None) -> Figure:
    """The input pattern `heat` (H, W) of feature k in color, zero being white.

    `inked` (H, W) bool marks the pixels that images ink; the others are gray and do not set the
    scale, as there is no evidence about them. Raises ValueError for other shapes.
    """
    return figure_of(paint_pattern(as_array(heat), k, inked), save_path, pattern_palette())


def write_feature_pictures(
    folder, features: Iterable, bank, images, heats, inked=None, classes=(), ink_sign=1, words=None
) -> None:
    """Write feature_{k}_gallery.png, _pattern.png and _pattern.npy for every k of `features`.

    `heats` (d_sae, H, W) come from `feature_input_patterns`; the .npy holds them, the PNG times
    `ink_sign`: -1 where ink lowers a pixel's value; `words`, by feature, are above patterns. None:
    no patterns. `images` may be a `GalleryPainter`. Raises OSError for files it cannot write.
    """
    gallery = images if isinstance(images, GalleryPainter) else GalleryPainter(images, classes)
    heats = None if heats is None else as_array(heats)
    if heats is not None and heats.ndim != 3:
        raise ValueError(f"patterns must have shape (d_sae, H, W), got {heats.shape}")
    for k in features:
        name = f"{folder}/feature_{k}"
        save_pixels(gallery.paint(k, bank), f"{name}_gallery.png")
        if heats is not None:
            pixels = paint_pattern(ink_sign * heats[k], k, inked, (words or {}).get(k, ""))
            save_pixels(pixels, f"{name}_pattern.png", pattern_palette())
            stored = io.BytesIO()
            np.save(stored, heats[k])
            write_whole(f"{name}_pattern.npy", stored.getvalue())
