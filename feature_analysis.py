"""What does a feature of a sparse autoencoder mean? Functions that answer it for an image classifier, and test it.

    bank = collect_feature_bank(model, loader, sae, mu, std)            # which images fire each feature?
    heat = feature_input_pattern(model, sae, mu, std, k)                # which pixels drive feature k?
    delta, top = feature_logit_effect(model, loader, sae, mu, std, k)   # which classes does adding it push?
    delta, top = feature_ablation_effect(model, loader, sae, mu, std, k)  # ... and removing it?
    show_feature_gallery(k, bank, images)                               # the pictures; each returns a Figure

    hypotheses = propose_hypotheses(model, seen, labels, sae, mu, std)  # a statement about every feature ...
    digest = freeze_hypotheses(hypotheses, "hypotheses.json")           # ... that cannot change any more ...
    evidence = test_hypotheses(hypotheses, model, unseen, their_labels, sae, mu, std)
    judgements = judge_hypotheses(hypotheses, evidence)                 # ... and whether it holds

What is asked of the arguments, everywhere:

    model    an object with ``preactivations(images) -> (B, d_in)`` and ``logits_from_preactivations(z) -> (B, C)``;
             nothing else is used, so a convolutional network serves as well. A model with dropout or batch norm must
             be in evaluation mode.
    loader   iterable more than once, in the same order, of ``(images, labels)`` batches, images (B, ...), labels (B,).
             An image's index is its position in that order.
    sae      an object with ``encode(z) -> (B, d_sae)``, ``W_enc (d_in, d_sae)`` and ``W_dec (d_sae, d_in)``; it works
             on standardised preactivations ``(z - mu) / std``.
    mu, std  (d_in,) tensors. They also say on which device the work is done.

Dimension key: N images, B images in a batch, C classes, d_in preactivations, d_sae features, K examples kept.
No function changes its inputs. Random numbers come from a `seed` and leave torch's own generator as it was; what is
remembered between calls is only the vocabulary of strokes.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.colors
import matplotlib.image
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

N_BANDS = 4  # quantile bands of the active range that examples are drawn from
PER_BAND = 5  # examples shown for each band
SAMPLE_PER_FEATURE = 64  # active images remembered per feature to find those bands; a uniform random sample
ROWS = 512  # images the tests of statements give the model at once: few enough to stay in the processor's cache
HEAD_ROWS = 16_384  # rows the classifier's head is given at once, or n_eval if that is more: bounds the memory

# ---------------------------------------------------------------------------------------------------------------------
# Checks, shared by all
# ---------------------------------------------------------------------------------------------------------------------


def check_standardisation(sae, mu: Tensor, std: Tensor) -> None:
    """Raise ValueError unless mu and std are (d_in,) like the SAE's input."""
    d_in = sae.W_enc.shape[0]
    for name, value in (("mu", mu), ("std", std)):
        if tuple(value.shape) != (d_in,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but the SAE takes d_in = {d_in}: expected ({d_in},)"
            )


def check_feature(k: int, d_sae: int) -> int:
    """k itself. Raises IndexError unless 0 <= k < d_sae."""
    if not 0 <= k < d_sae:
        raise IndexError(f"feature {k} does not exist: the SAE has features 0 to {d_sae - 1}")
    return int(k)


def raw_preactivations(model, images: Tensor, mu: Tensor) -> Tensor:
    """The model's preactivations (B, d_in) of images (B, ...). Raises ValueError when shapes do not fit."""
    try:
        raw = model.preactivations(images.to(mu.device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the model cannot take images of shape {tuple(images.shape)}: {error}") from error
    if raw.shape[1:] != mu.shape:
        raise ValueError(f"preactivations have shape {tuple(raw.shape)}, but mu has shape {tuple(mu.shape)}")
    return raw


def standardised(model, images: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    """Standardised preactivations (B, d_in) of images (B, ...). Raises ValueError when shapes do not fit."""
    return (raw_preactivations(model, images, mu) - mu) / std


def logits_of(model, z: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    """Logits (B, C) of standardised preactivations (B, d_in)."""
    return model.logits_from_preactivations(z * std + mu)


# ---------------------------------------------------------------------------------------------------------------------
# Which images fire a feature?
# ---------------------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Some images of each feature, each (d_sae, n): index (-1 where there is none), activation and label."""

    index: Tensor
    activation: Tensor
    label: Tensor

    def of(self, k: int) -> Examples:
        """Those of feature k alone, each (m,), without the empty places."""
        there = self.index[k] >= 0
        return Examples(*(column[k][there] for column in self))


class FeatureBank(NamedTuple):
    """Where each feature fires, over `n_images` images. All tensors are on the CPU."""

    top: Examples  # (d_sae, topk), strongest first
    sample: Examples  # (d_sae, SAMPLE_PER_FEATURE), a uniform random sample of the images that fire the feature
    label_histogram: Tensor  # (d_sae, C) int64, how many active images carry each label
    activation_sum: Tensor  # (d_sae,) float64
    n_images: int

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) how many images fire the feature."""
        return self.label_histogram.sum(1)

    @property
    def feature_density(self) -> Tensor:
        """(d_sae,) share of images that fire the feature: its mean activation rate."""
        return self.n_active / self.n_images

    @property
    def mean_activation_when_active(self) -> Tensor:
        """(d_sae,) 0 for a feature that never fires."""
        return (self.activation_sum / self.n_active.clamp(min=1)).float()

    def bands(self, k: int, n_bands: int = N_BANDS, per_band: int = PER_BAND) -> list[Examples]:
        """Examples of feature k from equal quantile bands of its active range, strongest band first.

        Each band holds up to `per_band` examples spread evenly over it. The bands are those of the random sample: exact
        while at most SAMPLE_PER_FEATURE images fire the feature. A feature that never fires has empty bands.
        """
        held = self.sample.of(check_feature(k, len(self.n_active)))
        order = torch.argsort(held.activation, descending=True, stable=True)
        bands = []
        for members in order.tensor_split(n_bands):
            spread = torch.linspace(0, max(0, len(members) - 1), min(per_band, len(members))).round().long()
            bands.append(Examples(*(column[members[spread]] for column in held)))
        return bands


LAST_INDEX = 2**31 - 1  # image indices and the bits of a non-negative float32 both fit into 31 bits


def _strength_key(examples: Examples) -> Tensor:
    """(d_sae, n) int64, larger for a stronger activation and, among equals, for an earlier image; -1 where empty.

    Non-negative floats are ordered like their bits, so both fit into one integer and no two keys are equal: which
    examples are kept depends neither on the order of the batches nor on how a library breaks ties.
    """
    bits = examples.activation.float().contiguous().view(torch.int32).long()
    return torch.where(examples.activation > 0, (bits << 32) | (LAST_INDEX - examples.index), -1)


def _lottery_key(examples: Examples) -> Tensor:
    """(d_sae, n) int64, a pseudo-random number that belongs to the image index; -1 where the feature is not active.

    Keeping the largest draws a uniform sample of the active images that is the same however the data was cut. The
    scrambling is the finaliser of MurmurHash3 (Appleby 2011), a bijection, so no two images share a number.
    """
    mask, h = 2**32 - 1, examples.index + 1
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return torch.where(examples.activation > 0, h ^ (h >> 16), -1)


def _keep(examples: Examples, key: Tensor, n: int) -> Examples:
    """The n examples of each feature with the largest keys, in that order, filled up with empty places."""
    best, place = key.topk(min(n, key.shape[1]), dim=1)
    empty = best < 0
    kept = []
    for column, filler in zip(examples, (-1, 0, -1), strict=True):
        chosen = column.expand(key.shape).gather(1, place).masked_fill(empty, filler)
        kept.append(torch.nn.functional.pad(chosen, (0, n - chosen.shape[1]), value=filler))
    return Examples(*kept)


def _bank_of_batch(feature_acts: Tensor, labels: Tensor, n_classes: int, first_index: int, topk: int) -> FeatureBank:
    """The bank of one batch: feature_acts (B, d_sae), labels (B,) in 0 .. n_classes - 1."""
    index = torch.arange(first_index, first_index + len(labels), device=labels.device)
    every = Examples(index[None], feature_acts.T.contiguous(), labels[None])  # (1 or d_sae, B)
    one_hot = torch.nn.functional.one_hot(labels, n_classes).float()  # (B, C)
    return FeatureBank(
        top=_keep(every, _strength_key(every), topk),
        sample=_keep(every, _lottery_key(every), SAMPLE_PER_FEATURE),
        label_histogram=((feature_acts > 0).float().T @ one_hot).round().long(),  # exact: counts below 2^24
        activation_sum=feature_acts.sum(0, dtype=torch.float64),
        n_images=len(labels),
    )


def merge_feature_banks(a: FeatureBank, b: FeatureBank) -> FeatureBank:
    """The bank of two disjoint sets of images, as if it had been collected over both at once.

    Collect the second with `first_index` set to the number of images before it. Raises ValueError when the banks are of
    different SAEs, classes or topk.
    """
    if a.label_histogram.shape != b.label_histogram.shape or a.top.index.shape != b.top.index.shape:
        raise ValueError(
            f"banks do not fit together: histograms {tuple(a.label_histogram.shape)} and "
            f"{tuple(b.label_histogram.shape)}, top examples {tuple(a.top.index.shape)} and {tuple(b.top.index.shape)}"
        )
    top, sample = (
        Examples(*(torch.cat(pair, 1) for pair in zip(*two, strict=True))) for two in zip(a[:2], b[:2], strict=True)
    )
    return FeatureBank(
        top=_keep(top, _strength_key(top), a.top.index.shape[1]),
        sample=_keep(sample, _lottery_key(sample), a.sample.index.shape[1]),
        label_histogram=a.label_histogram + b.label_histogram,
        activation_sum=a.activation_sum + b.activation_sum,
        n_images=a.n_images + b.n_images,
    )


@torch.no_grad()
def collect_feature_bank(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, topk: int = 20, first_index: int = 0
) -> FeatureBank:
    """One pass over the images: which of them fire each feature, how strongly, with which labels.

    Memory grows with batch size x d_sae and d_sae x topk, never with the number of images.

    Args:
        topk: strongest examples kept per feature.
        first_index: index of the loader's first image, for banks that will be merged.

    Raises:
        ValueError: shapes that do not fit, an empty loader, labels that are no class indices, topk not between 1 and
            the number of images.
    """
    check_standardisation(sae, mu, std)
    if topk < 1:
        raise ValueError(f"topk is {topk}; it must be at least 1")
    bank = None
    for images, labels in loader:
        if tuple(labels.shape) != (len(images),) or labels.is_floating_point():
            raise ValueError(
                f"a batch pairs images {tuple(images.shape)} with labels {tuple(labels.shape)} {labels.dtype}; "
                f"expected one whole number per image"
            )
        z = standardised(model, images, mu, std)
        n_classes = logits_of(model, z[:1], mu, std).shape[1]
        labels = labels.to(mu.device).long()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {n_classes} classes"
            )
        start = first_index + (bank.n_images if bank else 0)
        part = _bank_of_batch(sae.encode(z), labels, n_classes, start, topk)
        bank = part if bank is None else merge_feature_banks(bank, part)
    if bank is None or bank.n_images == 0:
        raise ValueError("the loader is empty: it must give at least one batch of (images, labels)")
    if topk > bank.n_images:
        raise ValueError(f"topk = {topk} is more than the {bank.n_images} images there are")
    return FeatureBank(
        *(Examples(*(column.cpu() for column in examples)) for examples in bank[:2]),
        *(tensor.cpu() for tensor in bank[2:4]),
        n_images=bank.n_images,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which pixels drive a feature?
# ---------------------------------------------------------------------------------------------------------------------


def _mean_input_jacobian(model, images: Tensor, mu: Tensor, directions: Tensor) -> Tensor:
    """Mean over images of d(z @ directions) / d(pixels): (n_directions, *image shape), directions (d_in, n)."""
    pixels = images.to(mu.device).float().detach().clone().requires_grad_(True)
    with torch.enable_grad():
        projected = (raw_preactivations(model, pixels, mu) @ directions).sum(
            0
        )  # (n,): images do not mix, so the sum separates
        rows = [torch.autograd.grad(value, pixels, retain_graph=True)[0].mean(0) for value in projected]
    return torch.stack(rows)


def _input_images(model, mu: Tensor, images: Tensor | None, image_shape: tuple[int, ...]) -> Tensor:
    """The images to average over; without any, one blank image, after making sure that it does not matter which.

    The preactivations are linear in the pixels when they are so on the way between any two images; three pairs of
    noise images, fixed and unlike each other, are tried.
    """
    if images is not None:
        if len(images) == 0:
            raise ValueError("images is empty: give at least one image to average the gradient over")
        return images
    noise = torch.rand(6, *image_shape, generator=torch.Generator().manual_seed(0)).to(mu.device)
    a, b = noise[:3], noise[3:]
    with torch.no_grad():
        at_a, at_b, between = (raw_preactivations(model, x, mu) for x in (a, b, 0.3 * a + 0.7 * b))
    bend = (0.3 * at_a + 0.7 * at_b - between).abs().amax(0)
    if (bend > 1e-4 * torch.cat([at_a, at_b]).abs().amax(0)).any():
        raise ValueError("the model is not linear in the pixels: pass images to average the gradient over")
    return torch.zeros(1, *image_shape, device=mu.device)


def feature_input_pattern(
    model,
    sae,
    mu: Tensor,
    std: Tensor,
    k: int,
    images: Tensor | None = None,
    image_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """Gradient of feature k's pre-threshold activation with respect to the pixels; (28, 28) for MNIST.

    By the chain rule through the standardisation and the model:

        d pre_k / d x  =  sum_i  W_enc[i, k] / std[i]  *  d z_i / d x

    Exact and the same for every image when the preactivations are linear in the pixels. For any other model pass
    `images` (N, ...), over which the gradient is averaged. The result has the shape of one image, a single channel
    dropped, and is on the device of mu.

    Raises IndexError for a k out of range; ValueError for shapes that do not fit, for no images, and for a non-linear
    model without images.
    """
    check_standardisation(sae, mu, std)
    direction = (sae.W_enc[:, check_feature(k, sae.W_enc.shape[1])] / std)[:, None].detach()
    heat = _mean_input_jacobian(model, _input_images(model, mu, images, image_shape), mu, direction)[0]
    return heat[0] if heat.dim() == 3 and len(heat) == 1 else heat


def feature_input_patterns(
    model, sae, mu: Tensor, std: Tensor, images: Tensor | None = None, image_shape: tuple[int, ...] = (1, 28, 28)
) -> Tensor:
    """`feature_input_pattern` of every feature: (d_sae, 28, 28).

    Features are linear in z, so d_in gradients serve all of them, however many there are.
    """
    check_standardisation(sae, mu, std)
    basis = torch.eye(len(mu), device=mu.device)
    jacobian = _mean_input_jacobian(model, _input_images(model, mu, images, image_shape), mu, basis)  # (d_in, ...)
    heats = torch.tensordot((sae.W_enc.detach() / std[:, None]).T, jacobian, dims=1)
    return heats[:, 0] if heats.dim() == 4 and heats.shape[1] == 1 else heats


# ---------------------------------------------------------------------------------------------------------------------
# Which classes does a feature push?
# ---------------------------------------------------------------------------------------------------------------------


class LogitEffect(NamedTuple):
    """Mean change of the logits, (C,), and the class it raises most; -1 when no image was changed."""

    mean_delta: Tensor
    top_class: int


class LogitEffects(NamedTuple):
    """The same for every feature: (d_sae, C), (d_sae,), and on how many images each mean was taken, (d_sae,)."""

    mean_delta: Tensor
    top_class: Tensor
    n_images: Tensor


def _as_effects(delta_sum: Tensor, n_images: Tensor) -> LogitEffects:
    mean = (delta_sum / n_images.clamp(min=1)[:, None]).float()
    return LogitEffects(mean, torch.where(n_images > 0, mean.argmax(1), -1), n_images)


def _first_preactivations(model, loader: Iterable, sae, mu: Tensor, std: Tensor, n_eval: int) -> Tensor:
    """Standardised preactivations (n, d_in) of the loader's first n_eval images. Raises ValueError without any."""
    check_standardisation(sae, mu, std)
    if n_eval < 1:
        raise ValueError(f"n_eval is {n_eval}; it must be at least 1")
    parts, seen = [], 0
    for images, _ in loader:
        parts.append(standardised(model, images[: n_eval - seen], mu, std))
        seen += len(parts[-1])
        if seen == n_eval:
            break
    if seen == 0:
        raise ValueError("the loader is empty: it must give at least one batch of (images, labels)")
    return torch.cat(parts)


def _steering_effects(model, z: Tensor, directions: Tensor, mu: Tensor, std: Tensor) -> LogitEffects:
    """Effects of adding each row of `directions` (n, d_in) to every row of z (N, d_in)."""
    raw, shifts = z * std + mu, directions * std
    base = model.logits_from_preactivations(raw).sum(0, dtype=torch.float64)
    sums = torch.zeros(len(shifts), len(base), dtype=torch.float64, device=z.device)
    at_once = max(1, HEAD_ROWS // len(raw))
    for first in range(0, len(shifts), at_once):
        some = shifts[first : first + at_once]
        moved = (raw[None] + some[:, None]).flatten(0, 1)  # (features * N, d_in)
        logits = model.logits_from_preactivations(moved).unflatten(0, (len(some), len(raw)))
        sums[first : first + at_once] = logits.sum(1, dtype=torch.float64) - base
    return _as_effects(sums, torch.full((len(shifts),), len(raw), device=z.device))


@torch.no_grad()
def feature_logit_effects(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, alpha: float = 1.0, n_eval: int = 2000
) -> LogitEffects:
    """`feature_logit_effect` of every feature."""
    z = _first_preactivations(model, loader, sae, mu, std, n_eval)
    return _steering_effects(model, z, alpha * sae.W_dec.detach(), mu, std)


@torch.no_grad()
def feature_logit_effect(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, k: int, alpha: float = 1.0, n_eval: int = 2000
) -> LogitEffect:
    """What adding feature k does to the logits, averaged over the loader's first `n_eval` images.

    In the space of the SAE the change is alpha * W_dec[k]; in that of the model alpha * W_dec[k] * std. It is added to
    the image's own preactivations, not to their reconstruction.

    Returns (mean_delta (C,), top_class). Raises IndexError for a k out of range, ValueError for shapes that do not fit,
    an empty loader or n_eval < 1.
    """
    k = check_feature(k, sae.W_dec.shape[0])
    z = _first_preactivations(model, loader, sae, mu, std, n_eval)
    effects = _steering_effects(model, z, alpha * sae.W_dec.detach()[k : k + 1], mu, std)
    return LogitEffect(effects.mean_delta[0], int(effects.top_class[0]))


def _ablation_effects(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, features: Tensor, n_eval: int
) -> LogitEffects:
    """Effects of removing each of `features` (n,) from the first n_eval images that fire it."""
    check_standardisation(sae, mu, std)
    if n_eval < 1:
        raise ValueError(f"n_eval is {n_eval}; it must be at least 1")
    sums, seen, counts = None, 0, torch.zeros(len(features), dtype=torch.int64, device=mu.device)
    shifts = sae.W_dec.detach()[features] * std  # (n, d_in)
    for images, _ in loader:
        z = standardised(model, images, mu, std)
        raw = z * std + mu
        seen += len(z)
        feature_acts = sae.encode(z)[:, features]  # (B, n)
        base = model.logits_from_preactivations(raw)
        if sums is None:
            sums = torch.zeros(len(features), base.shape[1], dtype=torch.float64, device=mu.device)
        active = feature_acts > 0
        wanted = active & (active.cumsum(0) + counts <= n_eval)
        counts = counts + wanted.sum(0)
        # Every (feature, image) pair is one row of the head, features in order.
        which, image = wanted.T.nonzero(as_tuple=True)
        for w, i in zip(which.split(HEAD_ROWS), image.split(HEAD_ROWS), strict=True):
            without = raw[i] - feature_acts[i, w, None] * shifts[w]
            delta = model.logits_from_preactivations(without) - base[i]
            sums.index_add_(0, w, delta.double())
    if seen == 0:
        raise ValueError("the loader is empty: it must give at least one batch of (images, labels)")
    return _as_effects(sums, counts)


@torch.no_grad()
def feature_ablation_effects(model, loader: Iterable, sae, mu: Tensor, std: Tensor, n_eval: int = 2000) -> LogitEffects:
    """`feature_ablation_effect` of every feature. The cost grows with the number of active (feature, image) pairs."""
    return _ablation_effects(model, loader, sae, mu, std, torch.arange(sae.W_dec.shape[0], device=mu.device), n_eval)


@torch.no_grad()
def feature_ablation_effect(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, k: int, n_eval: int = 2000
) -> LogitEffect:
    """What removing feature k does to the logits, averaged over the first `n_eval` images of the loader that fire it.

    Only the feature's own contribution f_k * W_dec[k] is subtracted from the image's preactivations. The rest, the part
    that the SAE does not reconstruct included, stays, so the SAE's error is not mistaken for the feature's effect.

    Returns (mean_delta (C,), top_class); zeros and -1 for a feature that no image fires. Raises like
    `feature_logit_effect`.
    """
    k = check_feature(k, sae.W_dec.shape[0])
    effects = _ablation_effects(model, loader, sae, mu, std, torch.tensor([k], device=mu.device), n_eval)
    return LogitEffect(effects.mean_delta[0], int(effects.top_class[0]))


# ---------------------------------------------------------------------------------------------------------------------
# How do the features relate, and how readable are they?
# ---------------------------------------------------------------------------------------------------------------------


class NearestFeatures(NamedTuple):
    """For every feature the other one whose decoder direction is most alike, (d_sae,), and the cosine, (d_sae,).

    -1 and 0 when there is no other feature.
    """

    feature: Tensor
    cosine: Tensor


@torch.no_grad()
def nearest_features(W_dec: Tensor, rows_at_once: int = 1024) -> NearestFeatures:
    """Nearest neighbours among the rows of W_dec (d_sae, d_in), by cosine."""
    if len(W_dec) < 2:
        return NearestFeatures(torch.full((len(W_dec),), -1), torch.zeros(len(W_dec)))
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    cosines, features = [], []
    for first in range(0, len(unit), rows_at_once):
        similarity = unit[first : first + rows_at_once] @ unit.T
        similarity.diagonal(first).fill_(-2.0)  # never itself
        best = similarity.max(1)
        cosines.append(best.values)
        features.append(best.indices)
    return NearestFeatures(torch.cat(features).cpu(), torch.cat(cosines).cpu())


def pattern_roughness(heats: Tensor) -> Tensor:
    """How noisy each pattern (n, H, W) is: mean squared difference of neighbouring pixels over twice the mean square.

    0 for a constant picture, 1 for white noise of mean zero, up to 2 for a chessboard; 0 for an empty one.
    """
    if min(heats.shape[1:]) < 2:
        raise ValueError(f"patterns of shape {tuple(heats.shape)} have no neighbouring pixels")
    steps = (heats.diff(dim=1).square().mean((1, 2)) + heats.diff(dim=2).square().mean((1, 2))) / 2
    power = heats.square().mean((1, 2))
    return torch.where(power > 0, steps / (2 * power).clamp(min=torch.finfo(heats.dtype).tiny), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics, in numpy, one feature at a time: how well do scores (N,) predict on which images it is active, (N,) bool?
# ---------------------------------------------------------------------------------------------------------------------

N_BOOTSTRAP = 200  # resamples of the images behind an interval
INTERVAL = (0.025, 0.975)  # of the resampled values: 95%


class Detection(NamedTuple):
    """How well scores predict activity: floats, or arrays (R,) over resamples."""

    auroc: float | np.ndarray
    average_precision: float | np.ndarray
    balanced_accuracy: float | np.ndarray


def detection_over(scores: np.ndarray, active: np.ndarray, cut: float, weights: Tensor) -> Detection:
    """Detection when image i counts weights[i, r] times, for each of R weightings (N, R).

    AUROC: share of (active, other) pairs in which the active image has the larger score, a tie counting one half.
    Average precision: mean over active images of the share of active ones among all with at least their score.
    Balanced accuracy: mean of the share of active images above the cut and of others not above it.

    NaN for a weighting that leaves no active image or no other.
    """
    ranked = np.unique(scores[active])
    # Only where a score stands among those of the active images matters: slots, even between them and odd at them.
    slot = np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")
    n_slots, said = 2 * len(ranked) + 1, scores > cut
    cell = torch.from_numpy(slot + n_slots * active)
    counts = weights.new_zeros(2 * n_slots, weights.shape[1]).index_add_(0, cell, weights)
    misses, hits = counts.view(2, n_slots, -1)
    kinds = torch.from_numpy(np.stack([active & said, ~active & said])).to(weights.dtype)
    said_hits, said_misses = kinds @ weights
    hits_to, misses_to = hits.cumsum(0), misses.cumsum(0)  # up to and with each slot
    n_hits, n_misses = hits_to[-1], misses_to[-1]
    below = misses_to - misses / 2
    hits_above, misses_above = n_hits - hits_to + hits, n_misses - misses_to + misses
    precision = hits_above / (hits_above + misses_above).clamp(min=1e-9)
    values = (
        (hits * below).sum(0) / (n_hits * n_misses),
        (hits * precision).sum(0) / n_hits,
        (said_hits / n_hits + 1 - said_misses / n_misses) / 2,
    )
    return Detection(*(torch.where((n_hits > 0) & (n_misses > 0), value, torch.nan).numpy() for value in values))


def detection(scores: np.ndarray, active: np.ndarray, cut: float) -> Detection:
    """`detection_over` with every image counted once, faster. Raises ValueError unless some images are active and some
    are not."""
    if not 0 < active.sum() < len(active):
        raise ValueError(f"{active.sum()} of {len(active)} images are active: at least one must be, and one must not")
    own, others = np.sort(scores[active]), np.sort(scores[~active])
    less, up_to = np.searchsorted(others, own, "left"), np.searchsorted(others, own, "right")
    hits_above, misses_above = len(own) - np.searchsorted(own, own, "left"), len(others) - less
    precision = hits_above / (hits_above + misses_above)
    right = (own > cut).mean() + (others <= cut).mean()
    return Detection(float((less + up_to).mean() / (2 * len(others))), float(precision.mean()), float(right / 2))


def bootstrap_weights(n_images: int, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> Tensor:
    """(n_images, n_bootstrap) how often each image is drawn in each resample of n_images with replacement."""
    drawn = np.random.default_rng(seed).integers(n_images, size=(n_bootstrap, n_images))
    counts = [np.bincount(resample, minlength=n_images) for resample in drawn]
    return torch.from_numpy(np.stack(counts, axis=1).astype(np.float32))


def best_cut(scores: np.ndarray, active: np.ndarray) -> float:
    """The cut of the largest balanced accuracy, halfway between the score of an active image and the next one below."""
    own, others = np.sort(scores[active]), np.sort(scores[~active])
    kept = 1 - np.searchsorted(own, own, "left") / len(own)  # of the active images, when all from this score on are
    gain = kept + np.searchsorted(others, own, "left") / len(others)
    lowest = own[np.argmax(gain)]
    below = scores[scores < lowest]
    return float(lowest + below.max()) / 2 if len(below) else float(lowest) - 1.0


def rank_sum_p(scores: np.ndarray, active: np.ndarray) -> float:
    """One-sided p-value that active images have larger scores than others, when activity is shuffled over images.

    Wilcoxon, Mann and Whitney's test in its normal approximation, variance corrected for ties, continuity by one half
    (Lehmann 1975, section 1.4). 1 when all scores are equal.
    """
    ties = np.unique(scores, return_counts=True)[1].astype(float)
    n, n1 = len(scores), int(active.sum())
    excess = (detection(scores, active, 0.0).auroc - 0.5) * n1 * (n - n1)
    variance = n1 * (n - n1) / 12 * ((n + 1) - (ties**3 - ties).sum() / (n * (n - 1)))
    return 0.5 * math.erfc((excess - 0.5) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def _log_choose(n, k) -> np.ndarray:
    """log of the number of ways to choose k of n."""
    n, k = torch.as_tensor(n, dtype=torch.float64), torch.as_tensor(k, dtype=torch.float64)
    return (torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).numpy()


def fisher_p(said: np.ndarray, active: np.ndarray) -> float:
    """One-sided p-value that the active images carry a label of the set, (N,) bool `said`, when labels are permuted.

    Fisher's exact test: the upper tail of the hypergeometric distribution.
    """
    n, n_said, n_active, both = len(said), int(said.sum()), int(active.sum()), int((said & active).sum())
    k = np.arange(both, min(n_said, n_active) + 1)
    log_p = _log_choose(n_said, k) + _log_choose(n - n_said, n_active - k) - _log_choose(n, n_active)
    return float(min(1.0, np.exp(log_p).sum()))


def sign_test_p(wins: int, losses: int) -> float:
    """One-sided exact p-value of so many wins or more when a win and a loss are equally likely; 1 without either."""
    n = wins + losses
    return float(min(1.0, np.exp(_log_choose(n, np.arange(wins, n + 1)) - n * math.log(2)).sum()))


def benjamini_hochberg(p: Sequence[float], q: float) -> np.ndarray:
    """(m,) bool: which p-values are significant at a false discovery rate of q (Benjamini & Hochberg 1995)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= q * np.arange(1, len(p) + 1) / max(1, len(p)))
    significant = np.zeros(len(p), dtype=bool)
    significant[order[: passed[-1] + 1 if len(passed) else 0]] = True
    return significant


# ---------------------------------------------------------------------------------------------------------------------
# The words of a stroke hypothesis: places on a 28 x 28 image
# ---------------------------------------------------------------------------------------------------------------------

SIDE = 28  # the vocabulary is made for images of this height and width
DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "rising": (-1, 1), "falling": (1, 1)}  # (down, right)
LENGTHS = (7, 13)  # of a short and of a long piece of stroke, in pixels
GRID = range(3, 26, 2)  # rows and columns on which pieces are centred
HALF_WIDTH, DOT_RADIUS = 1.5, 2.6  # pixels


class Place(NamedTuple):
    """A piece of pen stroke: its centre in pixels, its shape (a direction or "dot") and its length in pixels."""

    row: int
    col: int
    shape: str
    length: int

    def words(self) -> str:
        """As in "long rising stroke at the upper left"."""
        third = [min(2, max(0, (at - 4) // 7)) for at in (self.row, self.col)]
        where = " ".join(word for word in (("upper", "", "lower")[third[0]], ("left", "", "right")[third[1]]) if word)
        where = {"": "in the centre", "upper": "at the top", "lower": "at the bottom"}.get(where, f"at the {where}")
        if self.shape == "dot":
            return f"dot {where}"
        return f"{'long ' if self.length == LENGTHS[1] else ''}{self.shape} stroke {where}"


def place_masks(places: Sequence[Place]) -> Tensor:
    """(n, 28, 28) bool, the pixels of each place."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    masks = []
    for place in places:
        down, right = rows - place.row, cols - place.col
        if place.shape == "dot":
            masks.append(np.hypot(down, right) <= DOT_RADIUS)
            continue
        unit = np.array(DIRECTIONS[place.shape]) / np.hypot(*DIRECTIONS[place.shape])
        along, across = down * unit[0] + right * unit[1], right * unit[0] - down * unit[1]
        masks.append((abs(along) <= place.length / 2) & (abs(across) <= HALF_WIDTH))
    return torch.from_numpy(np.stack(masks))


@functools.cache
def stroke_vocabulary() -> tuple[Place, ...]:
    """All places a hypothesis may name: those whose ends lie on the image."""
    places = []
    for row, col in itertools.product(GRID, GRID):
        places.append(Place(row, col, "dot", 5))
        for (shape, direction), length in itertools.product(DIRECTIONS.items(), LENGTHS):
            reach = [abs(step) / math.hypot(*direction) * (length - 1) / 2 for step in direction]
            if all(0 <= at - r and at + r <= SIDE - 1 for at, r in zip((row, col), reach, strict=True)):
                places.append(Place(row, col, shape, length))
    return tuple(places)


@functools.cache
def _places_by_number() -> dict[Place, int]:
    return {place: m for m, place in enumerate(stroke_vocabulary())}


def _mean_over(places: Sequence[Place]) -> Tensor:
    """(n, 784) weights that turn an image into its mean over each place."""
    masks = place_masks(places).flatten(1).float()
    return masks / masks.sum(1, keepdim=True)


def place_ink(images: Tensor) -> Tensor:
    """(M, N) mean ink of each place of the vocabulary on each image (N, 1, 28, 28), on the images' device."""
    return _mean_over(stroke_vocabulary()).to(images.device) @ images.flatten(1).float().T


# ---------------------------------------------------------------------------------------------------------------------
# Where is each feature active, exactly?
# ---------------------------------------------------------------------------------------------------------------------


class Activity(NamedTuple):
    """Every (feature, image) pair with a positive activation, features in order; memory grows with their number."""

    start: Tensor  # (d_sae + 1,) int64; the pairs of feature k are start[k] .. start[k + 1] - 1
    image: Tensor  # (P,) int64, ascending within a feature
    activation: Tensor  # (P,)
    labels: Tensor  # (N,) int64

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """The images (n,) that fire feature k and their activations (n,)."""
        pairs = slice(int(self.start[k]), int(self.start[k + 1]))
        return self.image[pairs], self.activation[pairs]

    def is_active(self, k: int) -> np.ndarray:
        """(N,) bool, whether each image fires feature k."""
        active = np.zeros(len(self.labels), dtype=bool)
        active[self.of(k)[0]] = True
        return active

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) how many images fire each feature."""
        return self.start.diff()


@torch.no_grad()
def collect_activity(model, images: Tensor, labels: Tensor, sae, mu: Tensor, std: Tensor) -> Activity:
    """The activity of every feature on images (N, ...) with labels (N,), on the CPU.

    Raises ValueError for shapes that do not fit, and for no images.
    """
    check_standardisation(sae, mu, std)
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images with {len(labels)} labels: one label per image, and at least one image")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(f"labels are {labels.dtype} from {float(labels.min()):g}: whole numbers from 0 are needed")
    feature, image, activation = [], [], []
    for batch, first in zip(images.split(ROWS), range(0, len(images), ROWS), strict=True):
        acts = sae.encode(standardised(model, batch, mu, std))
        at = (acts > 0).nonzero()
        image.append((at[:, 0] + first).cpu())
        feature.append(at[:, 1].cpu())
        activation.append(acts[at[:, 0], at[:, 1]].cpu())
    features = torch.cat(feature)
    order = torch.argsort(features, stable=True)
    counts = torch.bincount(features, minlength=sae.W_enc.shape[1])
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Activity(start, torch.cat(image)[order], torch.cat(activation)[order], labels.cpu().long())


def _as_loader(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(ROWS), labels.split(ROWS), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Propose: a hypothesis per feature, in a form a program can check
# ---------------------------------------------------------------------------------------------------------------------

PARTS = ("class", "stroke", "effect")
MOST_DIGITS = 3  # a class part names at most so many labels ...
LEAST_LIFT = 1.5  # a label is named when it is so many times as frequent among the active images as among all
MOST_PLACES = 3  # ... and a stroke part so many places with ink, and so many without
WORTH_A_PLACE = 1.03  # a further place must raise the explained variance by this factor
AS_GOOD = 0.95  # share of the best place's gain from which a place counts as good
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth a statement
PATTERN_IMAGES = 32  # images over which input patterns are averaged; for a model linear in the pixels any will do


class Rule(NamedTuple):
    """The thresholds by which hypotheses are judged; they are frozen together with them."""

    class_auroc: float = 0.65  # smallest AUROC with which the labels must predict activity ...
    stroke_auroc: float = 0.8  # ... and the strokes ...
    both_auroc: float = 0.85  # ... and both together
    times_elsewhere: float = 2.0  # named ink must turn the feature off or on so many times as often as other ink
    edit_share: float = 0.25  # ... and on at least this share of the images
    effect_share: float = 0.5  # smallest share of the predicted change of each named logit that must be found
    min_active: int = 8  # active images below which nothing is proposed, and the verdict is "inconclusive"
    false_discovery_rate: float = 0.01  # of all tests of all features together


class Stroke(NamedTuple):
    """Places and their weights in the score: positive where ink is wanted, negative where there must be none."""

    places: tuple[Place, ...]
    weights: tuple[float, ...]


class Effect(NamedTuple):
    """The logit a feature raises and the one it lowers, and by how much on the images that fire it; None: no claim."""

    raises: int | None
    raised_by: float
    lowers: int | None
    lowered_by: float


class Hypothesis(NamedTuple):
    """What a feature is claimed to mean. A part that is None claims nothing, and `why_not` says why."""

    feature: int
    labels: tuple[int, ...] | None  # class part: it fires on images with these labels
    stroke: Stroke | None
    effect: Effect | None
    label_weight: float  # what one of `labels` adds to the score of the strokes where both are used
    cuts: dict[str, float]  # "class", "stroke", "both" -> score above which the feature is predicted to be active
    typical_activation: float  # mean where it is active
    label_histogram: tuple[int, ...]  # active discovery images by label
    n_images: int  # discovery images
    why_not: dict[str, str]

    @property
    def n_active(self) -> int:
        return sum(self.label_histogram)

    def proposes(self, part: str) -> bool:
        return {"class": self.labels, "stroke": self.stroke, "effect": self.effect}[part] is not None


def _mean_ink_when_active(ink: Tensor, activity: Activity) -> Tensor:
    """(K, M) mean over the active images of each feature of the ink (M, N) of each place; 0 for a silent feature."""
    total = torch.zeros(len(activity.n_active), len(ink))
    which = torch.repeat_interleave(torch.arange(len(total)), activity.n_active)
    by_image = ink.T.contiguous()
    for features, images in zip(which.split(ROWS * 8), activity.image.split(ROWS * 8), strict=True):
        total.index_add_(0, features, by_image[images])
    return total / activity.n_active.clamp(min=1)[:, None]


def _pursue(covariance: Tensor, gram: Tensor, gradient: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with signs: up to six columns of `gram` (M, M) for each row of `covariance` (K, M).

    gradient (K, M) is the mean input pattern over each place: a place may be wanted only where ink raises the feature,
    and unwanted only where ink lowers it, so that what is named is a cause and not mere company. Among places that are
    AS_GOOD as the best, the one most like the pattern is taken, in cosine; `sizes` (M,) are their pixels. Places are
    added while each multiplies the explained variance by WORTH_A_PLACE. Returns indices and weights, (K, 6); 0 where
    not used.
    """
    alignment = gradient.abs() * sizes.sqrt()
    scale = gram.diagonal().sqrt() + 1e-3
    chosen = torch.zeros(len(covariance), 0, dtype=torch.int64)
    weights, residual = torch.zeros(len(covariance), 0, dtype=gram.dtype), covariance
    explained, growing = torch.zeros(len(covariance), dtype=gram.dtype), torch.ones(len(covariance), dtype=torch.bool)
    for _ in range(2 * MOST_PLACES):
        gain = residual / scale
        signs = gradient.gather(1, chosen)
        full_up, full_down = ((signs > 0).sum(1) >= MOST_PLACES)[:, None], ((signs < 0).sum(1) >= MOST_PLACES)[:, None]
        gain[(gain * gradient <= 0) | full_up & (gradient > 0) | full_down & (gradient < 0)] = 0
        gain.scatter_(1, chosen, 0)
        as_good = gain.abs() >= AS_GOOD * gain.abs().amax(1, keepdim=True)
        chosen = torch.cat([chosen, torch.where(as_good, alignment, -1.0).argmax(1, keepdim=True)], 1)
        among, wanted = gram[chosen[:, :, None], chosen[:, None, :]], covariance.gather(1, chosen)
        ridge = (1e-6 * gram.diagonal().mean() + 1e-12) * torch.eye(among.shape[1], dtype=gram.dtype)
        fitted = torch.linalg.solve(among + ridge, wanted)  # a row that stopped growing may name a place twice
        fitted[fitted * gradient.gather(1, chosen) <= 0] = 0  # correlated places can turn a weight around
        now = 2 * (fitted * wanted).sum(1) - (fitted[:, None] @ among @ fitted[:, :, None])[:, 0, 0]
        growing = growing & (gain.abs().amax(1) > 0) & (now > WORTH_A_PLACE * explained)
        weights = torch.where(growing[:, None], fitted, torch.nn.functional.pad(weights, (0, 1)))
        explained = torch.where(growing, now, explained)
        residual = covariance - (weights[:, None] @ gram[chosen])[:, 0]
    return chosen, weights


def _fit_strokes(ink: Tensor, activity: Activity, heats: Tensor) -> list[Stroke | None]:
    """The best description of each feature by places: ink (M, N) from `place_ink`, heats (d_sae, 28, 28)."""
    mean = ink.mean(1, dtype=torch.float64)
    gram = (ink @ ink.T / ink.shape[1]).double() - mean[:, None] * mean
    gram += (1e-4 * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype)  # blank images, too
    share = activity.n_active[:, None] / ink.shape[1]
    covariance = share * (_mean_ink_when_active(ink, activity).double() - mean)  # of activity (0 or 1) and ink
    vocabulary = stroke_vocabulary()
    gradient = heats.flatten(1) @ _mean_over(vocabulary).T
    sizes = place_masks(vocabulary).flatten(1).sum(1)
    strokes: list[Stroke | None] = []
    for some in torch.arange(len(covariance)).split(512):
        for places, weights in zip(
            *(t.tolist() for t in _pursue(covariance[some], gram, gradient[some], sizes)), strict=True
        ):
            total = sum(map(abs, weights))
            used = sorted((-abs(w), w / total, vocabulary[p]) for p, w in zip(places, weights, strict=True) if w)
            used.sort(key=lambda entry: entry[1] < 0)  # wanted places first, the heaviest of each kind in front
            strokes.append(Stroke(tuple(p for *_, p in used), tuple(w for _, w, _ in used)) if used else None)
    return strokes


def _name_labels(histogram: np.ndarray, label_counts: np.ndarray) -> tuple[int, ...]:
    """The labels whose share among the active images exceeds their share of all images most: at most MOST_DIGITS, and
    LEAST_LIFT times that share at least."""
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    ranked = np.argsort(usual - share, kind="stable")[:MOST_DIGITS].tolist()
    return tuple(sorted(c for c in ranked if share[c] > 0 and share[c] >= LEAST_LIFT * usual[c]))


def _name_effect(delta: Tensor) -> Effect | None:
    """The logits that fall and rise most when the feature is removed, which changes them by `delta` (C,)."""
    raises, lowers = int(delta.argmin()), int(delta.argmax())
    raised_by, lowered_by = -float(delta[raises]), float(delta[lowers])
    if max(raised_by, lowered_by) < SMALLEST_EFFECT:
        return None
    up, down = raised_by >= SMALLEST_EFFECT, lowered_by >= SMALLEST_EFFECT
    return Effect(
        raises if up else None, raised_by if up else 0.0, lowers if down else None, lowered_by if down else 0.0
    )


def part_scores(h: Hypothesis, ink: np.ndarray | None, labels: np.ndarray) -> dict[str, np.ndarray]:
    """By how much each part predicts the feature to be active: "class", "stroke", "both" -> (N,) float32.

    ink (M, N) from `place_ink`, None when there are no strokes; labels (N,). A hypothesis of one part predicts by that
    part alone, and "both" is the same.
    """
    scores = {}
    if h.labels is not None:
        scores["class"] = np.isin(np.arange(labels.max() + 1), h.labels)[labels].astype(np.float32)
    if h.stroke is not None:
        where = _places_by_number()
        if unknown := [place for place in h.stroke.places if place not in where]:
            raise ValueError(f"{unknown[0]} is not in stroke_vocabulary(): name places from there")
        scores["stroke"] = np.float32(h.stroke.weights) @ ink[[where[place] for place in h.stroke.places]]
    if len(scores) == 2:
        scores["both"] = scores["stroke"] + np.float32(h.label_weight) * scores["class"]
    elif scores:
        scores["both"] = next(iter(scores.values()))
    return scores


def _label_weight(stroke: np.ndarray, named: np.ndarray, active: np.ndarray) -> float:
    """What a named label adds to the stroke's score: least squares of activity on both."""
    covariance = np.cov(np.stack([stroke, named, active]).astype(float))
    on_stroke, on_label = np.linalg.lstsq(covariance[:2, :2], covariance[:2, 2], rcond=None)[0]
    return float(max(0.0, on_label) / on_stroke) if on_stroke > 0 else 0.0


def _drop(h: Hypothesis, part: str, why: str) -> Hypothesis:
    field = "labels" if part == "class" else part
    return h._replace(**{field: None}, why_not={**h.why_not, part: why})


def _propose_one(
    h: Hypothesis, ink: np.ndarray | None, labels: np.ndarray, active: np.ndarray, rule: Rule
) -> Hypothesis:
    """Drop what does not even hold on the discovery images; weigh and cut the rest."""
    scores = part_scores(h, ink, labels)
    for part, bar in (("class", rule.class_auroc), ("stroke", rule.stroke_auroc)):
        if part in scores and (found := detection(scores[part], active, 0.5).auroc) < bar:
            h = _drop(h, part, f"AUROC {found:.2f} on the discovery images, {bar} is asked for")
    if h.labels and h.stroke:
        h = h._replace(label_weight=_label_weight(scores["stroke"], scores["class"], active))
    scores = part_scores(h, ink, labels)
    return h._replace(cuts={p: 0.5 if p == "class" else best_cut(s, active) for p, s in scores.items()})


def why_no_strokes(images: Tensor) -> str | None:
    """Why strokes cannot be named on such images; None when they can."""
    shape = tuple(images.shape[1:])
    if shape not in ((1, SIDE, SIDE), (SIDE, SIDE)):
        return f"images have shape {shape}; strokes are described on grey {SIDE} x {SIDE} images only"
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return f"pixels run from {low:g} to {high:g}; strokes are described where ink runs from 0 to 1"
    return None


def propose_hypotheses(
    model, images: Tensor, labels: Tensor, sae, mu: Tensor, std: Tensor, rule: Rule | None = None
) -> list[Hypothesis]:
    """A hypothesis for every feature, from the discovery images (N, ...) with labels (N,) and nothing else.

    class   the labels on which it fires more often than on average
    stroke  up to three places with ink and up to three without that best predict where it is active (orthogonal
            matching pursuit), each agreeing with the sign of the feature's input pattern there
    effect  the logits that its removal lowers and raises most

    A part that does not reach the rule's bar on these very images is not claimed. Raises ValueError for shapes that do
    not fit or no images.
    """
    rule = rule or Rule()
    activity = collect_activity(model, images, labels, sae, mu, std)
    removed = feature_ablation_effects(model, _as_loader(images, labels), sae, mu, std).mean_delta.cpu()
    no_strokes = why_no_strokes(images)
    strokes, ink = [None] * len(removed), None
    if no_strokes is None:
        shown = _spread(torch.arange(len(images)), PATTERN_IMAGES).to(images.device)
        heats = feature_input_patterns(model, sae, mu, std, images[shown]).cpu()
        ink = place_ink(images).cpu()
        strokes, ink = _fit_strokes(ink, activity, heats), ink.numpy()
    label_of, n_classes = activity.labels.numpy(), removed.shape[1]
    if label_of.max() >= n_classes:
        raise ValueError(f"labels run to {label_of.max()}, but the model has {n_classes} classes")
    label_counts, hypotheses = np.bincount(label_of, minlength=n_classes), []
    for k, stroke in enumerate(strokes):
        at, acts = activity.of(k)
        histogram = np.bincount(label_of[at.numpy()], minlength=n_classes)
        typical = float(acts.mean()) if len(at) else 0.0
        h = Hypothesis(k, None, None, None, 0.0, {}, typical, tuple(histogram.tolist()), len(images), {})
        if not rule.min_active <= len(at) <= len(images) - rule.min_active:
            why = (
                f"active on {len(at)} of {len(images)} images; {rule.min_active} active and as many silent ones needed"
            )
            hypotheses.append(h._replace(why_not=dict.fromkeys(PARTS, why)))
            continue
        effect, named = _name_effect(removed[k]), _name_labels(histogram, label_counts) or None
        why_not = {} if effect else {"effect": f"removing it changes no logit by {SMALLEST_EFFECT} on average"}
        if named is None:
            why_not["class"] = f"no label is {LEAST_LIFT} times as frequent as among all images"
        if stroke is None:
            why_not["stroke"] = no_strokes or "no ink predicts it"
        h = h._replace(labels=named, stroke=stroke, effect=effect, why_not=why_not)
        hypotheses.append(_propose_one(h, ink, label_of, activity.is_active(k), rule))
    return hypotheses


def _listed(words: Sequence[str], last: str = "and") -> str:
    """As in "a, b and c", each once."""
    words = list(dict.fromkeys(words))
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _apart(place: Place, others: Sequence[Place]) -> str:
    """The place in words; where one of the others has the same words, with the way from there."""
    for other in others:
        if other.words().removeprefix("long ") == place.words().removeprefix("long "):
            down, right = place.row - other.row, place.col - other.col
            steps = [(down, "lower" if down > 0 else "higher"), (right, f"further {'right' if right > 0 else 'left'}")]
            apart = [f"{abs(n)} pixels {way}" for n, way in steps if n]
            return f"{place.words()} {_listed(apart) if apart else 'around that one'}"
    return place.words()


def statement(h: Hypothesis) -> str:
    """The hypothesis in plain English."""
    pieces = []
    if h.stroke:
        signed = list(zip(h.stroke.places, h.stroke.weights, strict=True))
        ink, no_ink = ([place for place, w in signed if w * sign > 0] for sign in (1, -1))
        pieces.append(_listed([place.words() for place in ink]).capitalize() if ink else "")
        empty = [_apart(place, ink) for place in no_ink]
        pieces.append(f"no {_listed(empty, 'or')}" if empty else "")
    if h.labels:
        pieces.append(f"fires on {_listed([f'{c}s' for c in h.labels])}")
    if h.effect:
        moves = (("raises", h.effect.raises), ("lowers", h.effect.lowers))
        pieces.append(_listed([f"{verb} {c}" for verb, c in moves if c is not None]))
    text = "; ".join(piece for piece in pieces if piece)
    return text[:1].upper() + text[1:] if text else "no hypothesis"


# ---------------------------------------------------------------------------------------------------------------------
# Freeze
# ---------------------------------------------------------------------------------------------------------------------


def hypothesis_record(h: Hypothesis) -> dict:
    """A hypothesis as JSON has it."""
    stroke = None
    if h.stroke:
        pairs = list(zip(h.stroke.places, h.stroke.weights, strict=True))
        stroke = {
            name: [{**place._asdict(), "weight": w, "words": place.words()} for place, w in pairs if w * sign > 0]
            for name, sign in (("ink", 1), ("no_ink", -1))
        }
    return {
        "feature": h.feature,
        "statement": statement(h),
        "class": {"labels": list(h.labels)} if h.labels else None,
        "stroke": stroke,
        "effect": h.effect._asdict() if h.effect else None,
        "score": {"label_weight": h.label_weight, "cuts": h.cuts},
        "typical_activation": h.typical_activation,
        "label_histogram": list(h.label_histogram),
        "n_images": h.n_images,
        "why_not": h.why_not,
    }


def _hypothesis_of(record: dict) -> Hypothesis:
    stroke = None
    if record["stroke"]:
        places = record["stroke"]["ink"] + record["stroke"]["no_ink"]
        named = tuple(Place(*(p[name] for name in Place._fields)) for p in places)
        stroke = Stroke(named, tuple(p["weight"] for p in places))
    return Hypothesis(
        feature=record["feature"],
        labels=tuple(record["class"]["labels"]) if record["class"] else None,
        stroke=stroke,
        effect=Effect(**record["effect"]) if record["effect"] else None,
        label_weight=record["score"]["label_weight"],
        cuts=record["score"]["cuts"],
        typical_activation=record["typical_activation"],
        label_histogram=tuple(record["label_histogram"]),
        n_images=record["n_images"],
        why_not=record["why_not"],
    )


def freeze_hypotheses(hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None) -> str:
    """Write hypotheses and the rule that will judge them; returns the SHA-256 of the file."""
    frozen = {"rule": (rule or Rule())._asdict(), "hypotheses": [hypothesis_record(h) for h in hypotheses]}
    content = (json.dumps(frozen, indent=1, allow_nan=False) + "\n").encode()
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def read_hypotheses(path: str | Path, sha256: str) -> tuple[list[Hypothesis], Rule]:
    """What `freeze_hypotheses` wrote. Raises ValueError with both hashes when it is not the file of that SHA-256."""
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} was changed after it was frozen: its SHA-256 is {found}, recorded was {sha256}")
    frozen = json.loads(content)
    return [_hypothesis_of(record) for record in frozen["hypotheses"]], Rule(**frozen["rule"])


# ---------------------------------------------------------------------------------------------------------------------
# Test, on images that were not used to propose
# ---------------------------------------------------------------------------------------------------------------------

N_EDIT = 64  # active images, and as many silent ones, that are edited for a feature
DOSES = (0.0, 0.5, 1.0, 2.0)  # times the typical activation
TINY_DOSE = 1 / 64  # of the typical activation, for the slope of the linear prediction
NEAR = 1.96  # standard errors to either end of a 95% interval


class Detected(NamedTuple):
    """How well a part predicts activity, with 95% bootstrap intervals; p-value against chance."""

    auroc: float
    average_precision: float
    balanced_accuracy: float
    intervals: dict[str, tuple[float, float]]  # empty when not asked for
    p: float


class EditTest(NamedTuple):
    """Edits of n images as the hypothesis names them, and of as much ink elsewhere: on how many activity changed."""

    n: int
    named: int
    elsewhere: int
    only_named: int
    only_elsewhere: int

    @property
    def p(self) -> float:
        """Sign test: chance of this when naming makes no difference."""
        return sign_test_p(self.only_named, self.only_elsewhere)

    def excess(self, times: float, least: float) -> tuple[float, float]:
        """By how much the share of images that changed as named exceeds `times` that elsewhere, or the share `least`
        if that is harder; and its standard error."""
        if times * self.elsewhere < least * self.n:
            times = 0.0
        else:
            least = 0.0
        both = self.named - self.only_named
        neither = self.n - self.named - self.only_elsewhere
        values = np.array([1.0, 1.0 - times, -times, 0.0]) - least
        counts = np.array([self.only_named, both, self.only_elsewhere, neither])
        mean = values @ counts / self.n
        return float(mean), float(np.sqrt((values - mean) ** 2 @ counts / self.n / max(1, self.n - 1)))


class EffectTest(NamedTuple):
    """Removing a feature from n images that fire it, and adding it again in doses.

    `share` is the change found in units of the change predicted, of the named logit where that is smaller.
    """

    n: int
    raised_by: float | None  # what it adds to the named logits, as in Effect
    lowered_by: float | None
    share: float
    share_error: float  # standard error
    only_named: int  # images on which the named logits move further than for as much of a random direction
    only_random: int  # ... and less far
    doses: tuple[float, ...]  # times the typical activation
    dose_raises: tuple[float, ...] | None  # mean change of the logits at each dose
    dose_lowers: tuple[float, ...] | None
    linear_raises: tuple[float, ...] | None  # the same, extrapolated from TINY_DOSE
    linear_lowers: tuple[float, ...] | None

    @property
    def p(self) -> float:
        """Sign test: chance of this when the feature's direction is as good as any other."""
        return sign_test_p(self.only_named, self.only_random)

    @property
    def dose_follows(self) -> bool:
        """Whether each larger dose moves the named logits further."""
        up, down = (np.diff(curve) if curve else np.ones(1) for curve in (self.dose_raises, self.dose_lowers))
        return bool((up > 0).all() and ((down < 0).all() or not self.dose_lowers))


class Evidence(NamedTuple):
    """All that was measured about one hypothesis; None where that part was not proposed or has too few images."""

    feature: int
    n_active: int
    n_images: int
    detected: dict[str, Detected]  # "class", "stroke", "both"
    erasing: EditTest | None
    painting: EditTest | None
    effect: EffectTest | None

    @property
    def fires(self) -> bool:
        """Whether the feature fires on at least one in a thousand of these images."""
        return self.n_active >= 0.001 * self.n_images


@functools.cache
def _pixels_by_distance() -> Tensor:
    """(784, 784) all pixels in the order of their distance from each pixel."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    return (at[:, None] - at[None]).square().sum(2).argsort(dim=1, stable=True)


def matched_edit(named: Tensor, elsewhere: Tensor, nearest_first: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Two edits (B, 784) that move the same amount of ink: of what there is at the named pixels, and elsewhere.

    The one elsewhere is a patch that grows around a pixel drawn with the probability of its share, by `where` (B,) in
    [0, 1). Where one of the two has less ink to move, both move that much. `nearest_first` (784, 784) holds all pixels
    by their distance from each.
    """
    total = elsewhere.cumsum(1)
    amount = torch.minimum(named.sum(1), total[:, -1])[:, None]
    centre = torch.searchsorted(total, (where * total[:, -1])[:, None], right=True)[:, 0].clamp(max=total.shape[1] - 1)
    order = nearest_first[centre]
    there = elsewhere.gather(1, order)
    taken = torch.minimum(there, (amount - (there.cumsum(1) - there)).clamp(min=0))
    patch = torch.zeros_like(elsewhere).scatter_(1, order, taken)
    return named * (amount / named.sum(1, keepdim=True).clamp(min=1e-9)), patch


def _spread(indices: Tensor, n: int) -> Tensor:
    """At most n of the indices, spread evenly."""
    return indices[torch.linspace(0, len(indices) - 1, min(n, len(indices))).round().long()]


class _Editor:
    """Edits ink as hypotheses name it, and as much elsewhere, and sees whether the feature is active after.

    Ink is moved on the CPU, where the sums that decide how far a patch grows are the same in every run.
    """

    def __init__(
        self, hypotheses: Sequence[Hypothesis], model, images: Tensor, sae, mu: Tensor, std: Tensor, seed: int
    ):
        self.model, self.images, self.sae, self.mu, self.std, self.seed = model, images, sae, mu, std, seed
        self.wanted, self.empty = torch.zeros(2, sae.W_enc.shape[1], SIDE * SIDE, dtype=torch.bool)
        for h in hypotheses:
            masks, wanted = place_masks(h.stroke.places).flatten(1), torch.tensor(h.stroke.weights) > 0
            self.wanted[h.feature] = masks[wanted].any(0)
            self.empty[h.feature] = masks[~wanted].any(0) & ~self.wanted[h.feature]
        self.ever_inked = (images.flatten(1) > 0).float().mean(0).cpu() > 0.01  # blank margins would be too easy
        self.nearest_first = _pixels_by_distance()

    def active(self, pixels: Tensor, feature: Tensor) -> Tensor:
        """(B,) bool, whether each edited image fires its feature."""
        edited = pixels.unflatten(1, self.images.shape[1:])
        acts = self.sae.encode(standardised(self.model, edited, self.mu, self.std))
        return acts.gather(1, feature[:, None].to(acts.device))[:, 0].cpu() > 0

    def erased(self, feature: Tensor, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Whether removing the ink named, and as much elsewhere, turned the feature off: (B,) each.

        Where only empty places are named, ink painted into them is what must turn it off.
        """
        wanted, empty = self.wanted[feature], self.empty[feature]
        other = self.ever_inked & ~(wanted | empty)
        paint = ~wanted.any(1, keepdim=True)
        named, elsewhere = matched_edit(
            torch.where(paint, (1 - x) * empty, x * wanted),
            torch.where(paint, 1 - x, x) * other,
            self.nearest_first,
            where[:, 0],
        )
        sign = torch.where(paint, 1.0, -1.0)
        return ~self.active(x + sign * named, feature), ~self.active(x + sign * elsewhere, feature)

    def painted(self, feature: Tensor, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Whether inking the wanted places and clearing the empty ones, and as much elsewhere, turned it on."""
        wanted, empty = self.wanted[feature], self.empty[feature]
        other = self.ever_inked & ~(wanted | empty)
        ink, ink_elsewhere = matched_edit((1 - x) * wanted, (1 - x) * other, self.nearest_first, where[:, 0])
        clear, clear_elsewhere = matched_edit(x * empty, x * other, self.nearest_first, where[:, 1])
        return self.active(x + ink - clear, feature), self.active(x + ink_elsewhere - clear_elsewhere, feature)

    def test(self, edit: Callable, pairs: list[tuple[int, Tensor]]) -> dict[int, EditTest]:
        """`edit` on the (feature, images) pairs. What is drawn for a feature does not depend on the others."""
        if not pairs:
            return {}
        features = torch.cat([torch.full_like(at, k) for k, at in pairs])
        where = torch.cat([torch.rand(len(at), 2, generator=_generator(self.seed, k)) for k, at in pairs])
        counts = torch.zeros(len(self.wanted), 5, dtype=torch.int64)
        rows = zip(*(t.split(ROWS) for t in (features, torch.cat([at for _, at in pairs]), where)), strict=True)
        for k, i, w in rows:
            x = self.images[i.to(self.images.device)].flatten(1).float().cpu()
            named, elsewhere = edit(k, x, w)
            row = [torch.ones_like(named), named, elsewhere, named & ~elsewhere, elsewhere & ~named]
            counts.index_add_(0, k, torch.stack(row, 1).long())
        return {k: EditTest(*counts[k].tolist()) for k, _ in pairs}


def _generator(seed: int, feature: int) -> torch.Generator:
    """Random numbers that belong to a feature."""
    return torch.Generator().manual_seed((seed * 1_000_003 + feature) % 2**63)


def edited_images(activity: Activity, k: int) -> tuple[Tensor, Tensor]:
    """The images that the tests of feature k edit: up to N_EDIT that fire it and N_EDIT that do not, spread evenly."""
    silent = torch.from_numpy(np.flatnonzero(~activity.is_active(k)))
    return _spread(activity.of(k)[0], N_EDIT), _spread(silent, N_EDIT)


def edit_tests(
    hypotheses: Sequence[Hypothesis], model, images: Tensor, activity: Activity, sae, mu: Tensor, std: Tensor, seed: int
) -> tuple[dict[int, EditTest], dict[int, EditTest]]:
    """Erasing and painting, by feature, of the hypotheses that name strokes."""
    editor = _Editor(hypotheses, model, images, sae, mu, std, seed)
    firing, silent = [], []
    for h in hypotheses:
        on, off = edited_images(activity, h.feature)
        firing.append((h.feature, on))
        silent.append((h.feature, off))
    with torch.no_grad():
        return editor.test(editor.erased, firing), editor.test(editor.painted, silent)


def _dose_response(
    model, without: Tensor, step: Tensor, named: Sequence[int | None]
) -> list[tuple[tuple[float, ...] | None, tuple[float, ...] | None]]:
    """For each named class the mean change of its logit when DOSES times step (d_in,) are added to the preactivations
    `without` (n, d_in) the feature: as it is, and extrapolated from TINY_DOSE."""
    with torch.no_grad():
        at_doses = torch.stack([model.logits_from_preactivations(without + dose * step) for dose in DOSES])
        curve = (at_doses - at_doses[0]).mean(1)  # (doses, C)
        little = (model.logits_from_preactivations(without + TINY_DOSE * step) - at_doses[0]).mean(0)
    slope = little / TINY_DOSE
    return [
        (None, None) if c is None else (tuple(curve[:, c].tolist()), tuple(float(slope[c]) * dose for dose in DOSES))
        for c in named
    ]


def effect_test(h: Hypothesis, model, raw: Tensor, activity: Activity, sae, std: Tensor, seed: int = 0) -> EffectTest:
    """The effect part of one hypothesis on raw preactivations (N, d_in)."""
    at, acts = activity.of(h.feature)
    chosen = _spread(torch.arange(len(at)), N_EDIT)
    firing, f = raw[at[chosen].to(raw.device)], acts[chosen, None].to(raw.device)
    direction = sae.W_dec[h.feature].detach()
    noise = torch.randn(len(chosen), len(direction), generator=_generator(seed, h.feature)).to(raw.device)
    random = torch.nn.functional.normalize(noise, dim=1) * direction.norm()
    with torch.no_grad():
        three = torch.cat([firing, firing - f * direction * std, firing - f * random * std])
        base, without, without_random = model.logits_from_preactivations(three).chunk(3)

    def ratios(changed: Tensor) -> Tensor:  # (claims, n)
        claims = [(h.effect.raises, h.effect.raised_by, 1), (h.effect.lowers, h.effect.lowered_by, -1)]
        return torch.stack([sign * (base - changed)[:, c] / by for c, by, sign in claims if c is not None])

    found, mean = ratios(without), (base - without).mean(0)
    own, other, weaker = found.mean(0), ratios(without_random).mean(0), found[found.mean(1).argmin()]
    step = h.typical_activation * direction * std
    (up, up_line), (down, down_line) = _dose_response(
        model, firing - f * direction * std, step, (h.effect.raises, h.effect.lowers)
    )
    return EffectTest(
        n=len(chosen),
        raised_by=None if h.effect.raises is None else float(mean[h.effect.raises]),
        lowered_by=None if h.effect.lowers is None else -float(mean[h.effect.lowers]),
        share=float(weaker.mean()),
        share_error=float(weaker.std() / len(weaker) ** 0.5),
        only_named=int((own > other).sum()),
        only_random=int((own < other).sum()),
        doses=DOSES,
        dose_raises=up,
        dose_lowers=down,
        linear_raises=up_line,
        linear_lowers=down_line,
    )


def _detect(
    h: Hypothesis, active: np.ndarray, ink: np.ndarray | None, labels: np.ndarray, weights: Tensor | None
) -> dict[str, Detected]:
    """How well each part predicts activity; `weights` from `bootstrap_weights` when intervals are wanted."""
    detected: dict[str, Detected] = {}
    for part, scores in part_scores(h, ink, labels).items():
        if part == "both" and (h.labels is None or h.stroke is None or h.label_weight == 0):
            detected[part] = detected["class" if h.stroke is None else "stroke"]  # the very same scores
            continue
        measured, intervals = detection(scores, active, h.cuts[part]), {}
        if weights is not None:
            resampled = detection_over(scores, active, h.cuts[part], weights)
            for name, values in resampled._asdict().items():
                intervals[name] = tuple(np.nanquantile(values, INTERVAL).tolist())
        p = fisher_p(scores > 0.5, active) if part == "class" else rank_sum_p(scores, active)
        detected[part] = Detected(*measured, intervals, p)
    return detected


def test_hypotheses(
    hypotheses: Sequence[Hypothesis],
    model,
    images: Tensor,
    labels: Tensor,
    sae,
    mu: Tensor,
    std: Tensor,
    activity: Activity | None = None,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
    rule: Rule | None = None,
) -> list[Evidence]:
    """What images (N, ...) with labels (N,) say about the hypotheses.

    detection  AUROC, average precision and balanced accuracy with which class part, stroke part and both predict where
               the feature is active
    erasing    on up to N_EDIT images that fire it, the ink named is removed, and as much elsewhere
    painting   on as many that do not, the wanted places are inked and the empty ones cleared, and as much elsewhere
    effect     on images that fire it, the feature is removed, and as much of a random direction; then added in DOSES

    Hypotheses about features that fewer than the rule's `min_active` images fire, or leave silent, are not tested.
    `activity` takes the place of the SAE's own, to measure what chance gives. `n_bootstrap` = 0 leaves intervals out.
    Raises ValueError for shapes that do not fit, two hypotheses about one feature, and strokes on images that cannot
    have them; IndexError for a feature that does not exist.
    """
    activity, n = activity or collect_activity(model, images, labels, sae, mu, std), len(images)
    if len(activity.labels) != n:
        raise ValueError(f"the activity is of {len(activity.labels)} images, but {n} were given")
    features = [check_feature(h.feature, sae.W_enc.shape[1]) for h in hypotheses]
    if len(set(features)) < len(features):
        twice = next(k for k in features if features.count(k) > 1)
        raise ValueError(f"feature {twice} has several hypotheses: test them in calls of their own")
    no_strokes = why_no_strokes(images)
    if no_strokes and any(h.stroke for h in hypotheses):
        raise ValueError(f"strokes cannot be tested: {no_strokes}")
    least = (rule or Rule()).min_active
    testable = [h for h in hypotheses if least <= activity.n_active[h.feature] <= n - least]
    ink = place_ink(images).cpu().numpy() if any(h.stroke for h in testable) else None
    weights = bootstrap_weights(n, n_bootstrap, seed) if n_bootstrap else None
    label_of = labels.cpu().numpy()
    detected = {h.feature: _detect(h, activity.is_active(h.feature), ink, label_of, weights) for h in testable}
    with_stroke = [h for h in testable if h.stroke]
    erasing, painting = {}, {}
    if with_stroke:
        erasing, painting = edit_tests(with_stroke, model, images, activity, sae, mu, std, seed)
    with torch.no_grad():
        raw = torch.cat([raw_preactivations(model, some, mu) for some in images.split(ROWS)])
    effects = {h.feature: effect_test(h, model, raw, activity, sae, std, seed) for h in testable if h.effect}
    return [
        Evidence(k, int(activity.n_active[k]), n, detected.get(k, {}), erasing.get(k), painting.get(k), effects.get(k))
        for k in (h.feature for h in hypotheses)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Judge
# ---------------------------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED, NONE = "confirmed", "inconclusive", "refuted", "no hypothesis"
CONFIDENCE_RULE = """High: every part that is claimed is confirmed, and each of its measurements clears its bar even
at the pessimistic end of its 95% interval. Medium: not High, but at least one part is confirmed and nothing is refuted.
Low: the rest. Where other seeds were tried, High also asks that the feature returned in at least half of them. A
statement held on images set aside when each measurement clears its bar there, too."""


class Measurement(NamedTuple):
    """One measured value with its 95% interval, the bar it must reach and its p-value."""

    value: float
    low: float
    high: float
    bar: float
    p: float

    def verdict(self, significant: bool) -> str:
        if self.value >= self.bar and significant:
            return CONFIRMED
        return REFUTED if self.high < self.bar else INCONCLUSIVE


class Judgement(NamedTuple):
    """Verdicts about one hypothesis: on each test, on each part, and overall; and how much confidence it deserves."""

    feature: int
    tests: dict[str, str]
    parts: dict[str, str]
    verdict: str
    confidence: str
    all_three: bool  # class, stroke and effect are all claimed and confirmed


TESTS_OF = {"class": ("class",), "stroke": ("stroke", "erasing", "painting"), "both": ("both",), "effect": ("effect",)}


def measurements(evidence: Evidence, rule: Rule) -> dict[str, Measurement]:
    """What was measured, test by test, and the rule's bars; of erasing and painting `EditTest.excess`, against 0."""
    found = {}
    for part, bar in (("class", rule.class_auroc), ("stroke", rule.stroke_auroc), ("both", rule.both_auroc)):
        if part in evidence.detected:
            d = evidence.detected[part]
            low, high = d.intervals.get("auroc", (0.0, 1.0))
            found[part] = Measurement(d.auroc, low, high, bar, d.p)
    for name in ("erasing", "painting"):
        test = getattr(evidence, name)
        if test is not None:
            mean, error = test.excess(rule.times_elsewhere, rule.edit_share)
            found[name] = Measurement(mean, mean - NEAR * error, mean + NEAR * error, 0.0, test.p)
    if evidence.effect is not None:
        e = evidence.effect
        wide = NEAR * e.share_error
        found["effect"] = Measurement(e.share, e.share - wide, e.share + wide, rule.effect_share, e.p)
    return found


def _joint(verdicts: Sequence[str]) -> str:
    """One refuted refutes; all confirmed confirm."""
    if REFUTED in verdicts:
        return REFUTED
    return CONFIRMED if verdicts and all(v == CONFIRMED for v in verdicts) else INCONCLUSIVE


def judge_hypotheses(
    hypotheses: Sequence[Hypothesis], evidence: Sequence[Evidence], rule: Rule | None = None
) -> list[Judgement]:
    """Verdicts and confidence, by CONFIDENCE_RULE; p-values corrected over all features and tests.

    A test is confirmed when its value reaches the bar and is significant, refuted when its 95% interval stays below the
    bar, and otherwise inconclusive. A part is refuted by one of its tests and confirmed by all; so is the whole.
    """
    rule = rule or Rule()
    found = [measurements(e, rule) for e in evidence]
    flat = [(i, name) for i, tests in enumerate(found) for name in tests]
    significant = benjamini_hochberg([found[i][name].p for i, name in flat], rule.false_discovery_rate)
    passed = dict(zip(flat, significant.tolist(), strict=True))
    judgements = []
    for i, (h, e, tests) in enumerate(zip(hypotheses, evidence, found, strict=True)):
        verdicts = {name: m.verdict(passed[i, name]) for name, m in tests.items()}
        if e.effect is not None and verdicts["effect"] == CONFIRMED and not e.effect.dose_follows:
            verdicts["effect"] = INCONCLUSIVE
        claimed = [part for part in PARTS if h.proposes(part)]
        parts = {
            p: _joint([verdicts[t] for t in TESTS_OF[p] if t in verdicts]) if p in claimed else NONE for p in PARTS
        }
        if not claimed:
            judgements.append(Judgement(h.feature, {}, parts, NONE, "Low", False))
            continue
        whole = _joint([parts[part] for part in claimed] + [verdicts[t] for t in ("both",) if t in verdicts])
        clear = all(m.low >= m.bar for m in tests.values())
        some = whole != REFUTED and any(parts[part] == CONFIRMED for part in claimed)
        confidence = "High" if whole == CONFIRMED and clear else "Medium" if some else "Low"
        all_three = whole == CONFIRMED and len(claimed) == len(PARTS)
        judgements.append(Judgement(h.feature, verdicts, parts, whole, confidence, all_three))
    return judgements


def held(evidence: Evidence, rule: Rule | None = None) -> bool | None:
    """Whether every measurement clears its bar, significant or not; None when there is none to see."""
    tests = measurements(evidence, rule or Rule())
    return all(m.value >= m.bar for m in tests.values()) if tests else None


class Shares(NamedTuple):
    """Shares of the features that fire on at least one in a thousand of the images they were tested on."""

    features: int
    explained: float  # class, stroke and effect are all confirmed
    predicted: float  # class and stroke together reach the AUROC asked for
    median_auroc: float | None
    class_confirmed: float
    stroke_confirmed: float
    effect_confirmed: float
    median_density: float | None  # share of the images that fire the median of these features


def shares_explained(evidence: Sequence[Evidence], judgements: Sequence[Judgement], rule: Rule | None = None) -> Shares:
    """The shares of one set of features; zeros where none fires."""
    rule = rule or Rule()
    firing = [(e, j) for e, j in zip(evidence, judgements, strict=True) if e.fires]
    auroc = [e.detected["both"].auroc for e, _ in firing if "both" in e.detected]
    n = max(1, len(firing))
    confirmed = [sum(j.parts[part] == CONFIRMED for _, j in firing) / n for part in PARTS]
    return Shares(
        len(firing),
        sum(j.all_three for _, j in firing) / n,
        sum(a >= rule.both_auroc for a in auroc) / n,
        float(np.median(auroc)) if auroc else None,
        *confirmed,
        float(np.median([e.n_active / e.n_images for e, _ in firing])) if firing else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Chance, and what training added
# ---------------------------------------------------------------------------------------------------------------------


def swapped(hypotheses: Sequence[Hypothesis], n_active: Tensor) -> list[Hypothesis]:
    """Each hypothesis about the feature next to its own in firing rate, (d_sae,) `n_active`: explanations in pairs."""
    order = sorted(
        (h for h in hypotheses if any(map(h.proposes, PARTS))), key=lambda h: (int(n_active[h.feature]), h.feature)
    )
    pairs = zip(order[0::2], order[1::2], strict=False)
    return [moved for a, b in pairs for moved in (a._replace(feature=b.feature), b._replace(feature=a.feature))]


def shuffled(activity: Activity, seed: int = 0) -> Activity:
    """As many active images per feature and the same activations, but on images drawn at random."""
    generator, n = np.random.default_rng(seed), len(activity.labels)
    counts = activity.n_active.tolist()
    image = [np.sort(generator.choice(n, count, replace=False)) for count in counts]
    return activity._replace(image=torch.from_numpy(np.concatenate(image)))


class LinearFeatures(NamedTuple):
    """Features to compare an SAE's with: f = pre 1[pre > threshold], pre = z W_enc + b_enc."""

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in)
    threshold: Tensor  # (d_sae,)

    def encode(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> feature_acts (B, d_sae)"""
        pre = torch.addmm(self.b_enc, z, self.W_enc)
        return torch.where(pre > self.threshold, pre, 0.0)


def matched_directions(directions: Tensor, z: Tensor, density: Tensor, mean_activation: Tensor) -> LinearFeatures:
    """Features along `directions` (n, d_in) that fire on a share `density` (n,) of z (N, d_in), or wherever z points
    along them if that is less, with `mean_activation` (n,) where they do."""
    unit, density, mean_activation = (t.to(z) for t in (directions, density, mean_activation))
    unit = torch.nn.functional.normalize(unit, dim=1)
    W_enc, threshold = torch.empty_like(unit.T), torch.empty(len(unit), device=z.device)
    for some in torch.arange(len(unit), device=z.device).split(64):
        pre = z @ unit[some].T  # (N, 64)
        rank = ((1 - density[some]) * len(z)).round().long().clamp(1, len(z)) - 1
        cut = pre.sort(dim=0).values.gather(0, rank[None])[0].clamp(min=0)  # an activation is positive
        active = pre > cut
        scale = mean_activation[some] * active.sum(0) / torch.where(active, pre, 0.0).sum(0).clamp(min=1e-9)
        W_enc[:, some], threshold[some] = unit[some].T * scale, cut * scale
    return LinearFeatures(W_enc, torch.zeros_like(threshold), unit, threshold)


def random_directions(z: Tensor, density: Tensor, mean_activation: Tensor, seed: int = 0) -> LinearFeatures:
    """Random directions matched to an SAE's features in firing rate and in the norm of what they contribute."""
    noise = torch.randn(len(density), z.shape[1], generator=torch.Generator().manual_seed(seed)).to(z.device)
    return matched_directions(noise, z, density, mean_activation)


def principal_directions(z: Tensor, density: Tensor, mean_activation: Tensor) -> LinearFeatures:
    """Both ends of the principal directions of z (N, d_in), strongest first, matched to the most active features."""
    _, basis = torch.linalg.eigh((z - z.mean(0)).T @ (z - z.mean(0)))
    ends = torch.stack([basis.T.flip(0), -basis.T.flip(0)], 1).flatten(0, 1)[: len(density)]
    order = torch.argsort(density, descending=True, stable=True)[: len(ends)]
    return matched_directions(ends, z, density[order], mean_activation[order])


def neurons(mu: Tensor, std: Tensor) -> LinearFeatures:
    """The hidden units themselves: active where the raw preactivation mu + std z is positive, as ReLU has it."""
    eye = torch.eye(len(mu), device=mu.device)
    return LinearFeatures(eye, mu / std, eye, torch.zeros_like(mu))


# ---------------------------------------------------------------------------------------------------------------------
# Does a feature return when the SAE is trained again?
# ---------------------------------------------------------------------------------------------------------------------

ALIKE = 0.7  # cosine of decoder rows, and correlation of activations, from which two features are the same


class Matches(NamedTuple):
    """For every feature of one SAE its counterpart in another, (d_sae,) each: the one whose smaller of the two
    similarities is largest."""

    feature: Tensor
    cosine: Tensor  # of the decoder rows
    correlation: Tensor  # of the activations over images

    @property
    def returned(self) -> Tensor:
        """(d_sae,) bool"""
        return (self.cosine >= ALIKE) & (self.correlation >= ALIKE)


@torch.no_grad()
def match_features(model, images: Tensor, sae, other, mu: Tensor, std: Tensor) -> Matches:
    """Counterparts of the features of `sae` among those of `other`, an SAE of the same preactivations."""
    sums = [torch.zeros((), dtype=torch.float64, device=mu.device)] * 5
    for batch in images.split(ROWS):
        z = standardised(model, batch, mu, std)
        a, b = sae.encode(z), other.encode(z)
        products = (a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b)
        sums = [total + product.double() for total, product in zip(sums, products, strict=True)]
    mean_a, mean_b, square_a, square_b, product = (total / len(images) for total in sums)
    spread_a, spread_b = ((s - m.square()).clamp(min=0).sqrt() for s, m in ((square_a, mean_a), (square_b, mean_b)))
    covariance = product - mean_a[:, None] * mean_b
    correlation = (covariance / (spread_a[:, None] * spread_b).clamp(min=1e-12)).float()  # 0 for a silent feature
    unit, other_unit = (torch.nn.functional.normalize(s.W_dec.detach(), dim=1) for s in (sae, other))
    cosine = unit @ other_unit.T
    best = torch.minimum(cosine, correlation).argmax(1, keepdim=True)
    return Matches(best[:, 0].cpu(), cosine.gather(1, best)[:, 0].cpu(), correlation.gather(1, best)[:, 0].cpu())


def with_stability(judgements: Sequence[Judgement], returned: Tensor, n_runs: int) -> list[Judgement]:
    """High becomes Medium for a feature that returned in fewer than half of n_runs: `returned` (d_sae,) counts them."""
    return [
        j._replace(confidence="Medium") if j.confidence == "High" and 2 * int(returned[j.feature]) < n_runs else j
        for j in judgements
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Telling it to people
# ---------------------------------------------------------------------------------------------------------------------


def _p_words(p: float) -> str:
    return "p < 1e-99" if p < 1e-99 else f"p = {p:.1g}"


def measured_lines(h: Hypothesis, e: Evidence, j: Judgement, rule: Rule | None = None) -> list[str]:
    """One line for each test: what was measured with its 95% interval, the bar, and the verdict."""
    lines, margins = [], measurements(e, rule or Rule())
    for part, d in e.detected.items():
        low, high = d.intervals.get("auroc", (0.0, 1.0))
        whole = "labels and strokes together" if h.labels and h.stroke else "the statement as a whole"
        name = {"class": "labels", "stroke": "strokes", "both": whole}[part]
        lines.append(
            f"{name}, predicting where it fires: AUROC {d.auroc:.3f} [{low:.3f}, {high:.3f}], average precision "
            f"{d.average_precision:.3f}, balanced accuracy {d.balanced_accuracy:.3f}, {_p_words(d.p)}: {j.tests[part]}"
        )
    for name, verb, t in (("erasing", "off", e.erasing), ("painting", "on", e.painting)):
        if t is not None:
            m = margins[name]
            lines.append(
                f"{name} what is named turns it {verb} on {t.named} of {t.n} images, as much ink elsewhere on "
                f"{t.elsewhere}; {m.value:+.2f} [{m.low:+.2f}, {m.high:+.2f}] above the bar, {_p_words(t.p)}: "
                f"{j.tests[name]}"
            )
    if e.effect is not None:
        t = e.effect
        claims = (
            ("lowers", h.effect.raises, t.raised_by, h.effect.raised_by, t.dose_raises, t.linear_raises),
            ("raises", h.effect.lowers, t.lowered_by, h.effect.lowered_by, t.dose_lowers, t.linear_lowers),
        )
        moves, doses = [], []
        for verb, c, found, predicted, curve, line in claims:
            if c is not None:
                moves.append(f"{verb} the logit of {c} by {found:.3f} (predicted {predicted:.3f})")
                steps = ", ".join(f"{value:+.3f}" for value in curve[1:])
                doses.append(f"logit of {c} {steps} (linear {', '.join(f'{value:+.3f}' for value in line[1:])})")
        m = margins["effect"]
        lines.append(
            f"removing it {' and '.join(moves)}; {m.value:.2f} [{m.low:.2f}, {m.high:.2f}] of the prediction, bar "
            f"{m.bar:g}; further than as much of a random direction on {t.only_named} of {t.n} images, "
            f"{_p_words(t.p)}: {j.tests['effect']}"
        )
        lines.append(
            f"adding {', '.join(f'{dose:g}' for dose in t.doses[1:])} times its typical activation: {'; '.join(doses)}"
        )
    return lines


def evidence_line(h: Hypothesis, e: Evidence) -> str:
    """The evidence in one line."""
    if not h.n_active:
        return f"fires on none of {h.n_images:,} discovery images"
    common = sorted(range(len(h.label_histogram)), key=lambda c: (-h.label_histogram[c], c))[:2]
    shares = [f"{100 * h.label_histogram[c] / h.n_active:.0f}% of them {c}s" for c in common if h.label_histogram[c]]
    line = f"fires on {100 * h.n_active / h.n_images:.3g}% of images, {' and '.join(shares)}"
    if "both" in e.detected:
        line += f"; predicted with AUROC {e.detected['both'].auroc:.2f} on {e.n_images:,} unseen images"
    elif any(map(h.proposes, PARTS)) and e.effect is None:
        line += f"; {e.n_active:,} of {e.n_images:,} unseen images fire it: too few that do, or do not, to judge"
    if e.erasing is not None:
        line += f"; erasing turns it off on {e.erasing.named} of {e.erasing.n}, elsewhere {e.erasing.elsewhere}"
    if e.painting is not None:
        line += f"; painting turns it on on {e.painting.named} of {e.painting.n}, elsewhere {e.painting.elsewhere}"
    return line


def shares_lines(shares: dict[str, Shares]) -> list[str]:
    """A Markdown table of several sets of features."""
    rows = ["| features | how many | fire on (median) | all three confirmed | class | stroke | effect | predicted |"]
    rows.append("|---" * 8 + "|")
    for name, s in shares.items():
        cells = [s.explained, s.class_confirmed, s.stroke_confirmed, s.effect_confirmed, s.predicted]
        percent = " | ".join(f"{100 * value:.0f}%" for value in cells)
        rate = "none" if s.median_density is None else f"{s.median_density:.2%}"
        rows.append(f"| {name} | {s.features} | {rate} | {percent} |")
    return rows


def feature_lines(
    h: Hypothesis,
    e: Evidence,
    j: Judgement,
    held_aside: bool | None,
    firing: Sequence[int],
    rule: Rule | None = None,
    returned: str = "",
) -> list[str]:
    """The Markdown section of one feature; `firing` are the test images that fire it most."""
    aside = {True: "held", False: "did not hold", None: "too few images to see"}[held_aside]
    lines = [f"### Feature {h.feature}: {statement(h)}", "", f"- Evidence: {evidence_line(h, e)}"]
    lines.append(f"- Confidence: **{j.confidence}**; verdict {j.verdict}; on images set aside: {aside}{returned}")
    lines += [f"- {line}" for line in measured_lines(h, e, j, rule)]
    lines += [f"- no {part} part: {why}" for part, why in h.why_not.items()]
    if firing:
        lines.append(
            f"- strongest of the {e.n_active:,} test images that fire it: {', '.join(f'#{i}' for i in firing)}"
        )
    return [*lines, ""]


def best_first(judgements: Sequence[Judgement], evidence: Sequence[Evidence]) -> list[int]:
    """Positions by falling confidence, then verdict, then AUROC."""
    confidence, verdicts = ("High", "Medium", "Low"), (CONFIRMED, INCONCLUSIVE, REFUTED, NONE)

    def key(i: int) -> tuple:
        j, e = judgements[i], evidence[i]
        auroc_of = e.detected["both"].auroc if "both" in e.detected else 0.0
        return confidence.index(j.confidence), verdicts.index(j.verdict), -auroc_of, j.feature

    return sorted(range(len(judgements)), key=key)


# ---------------------------------------------------------------------------------------------------------------------
# Writing files
# ---------------------------------------------------------------------------------------------------------------------


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all, whatever interrupts."""
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(unfinished, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


LIGHT = {"compress_level": 1}  # PNG compression: four times faster than the default, files a fifth larger


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a Figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs=LIGHT)
    write_whole(path, buffer.getvalue())


def save_pixels(pixels: np.ndarray, path: str | Path) -> None:
    """Save a picture (height, width, 4) uint8 as PNG, whole or not at all."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png", dpi=DPI, pil_kwargs=LIGHT)
    write_whole(path, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures. Drawing text anew is most of the cost of a matplotlib figure, so a painter has matplotlib draw once what all
# its pictures share and then only pastes tiles and characters: twenty times faster than one Figure per picture.
# ---------------------------------------------------------------------------------------------------------------------

DPI = 100
TILE = 56  # screen pixels across an image in a gallery, about: images are enlarged by whole numbers
PATTERN = 224  # and in a pattern
COLUMNS = 10  # tiles in a row of a gallery
HEADER = 24  # screen pixels above a block of tiles, for the line that says what it shows
CAPTION_LETTERS, CAPTION_LINE = 100, 17  # letters in a line of a panel's caption, and its height in screen pixels
MARGIN, TITLE = 12, 30  # screen pixels around a picture, and above it for the title
FRAME = 217  # grey level of a tile's frame; ink is drawn dark on white, 255


def _new_figure(width: float, height: float) -> Figure:
    """A Figure of width x height screen pixels that is registered nowhere, so it needs no closing."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: Figure) -> np.ndarray:
    """The Figure as (height, width, 4) uint8."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())


def _figure_of(pixels: np.ndarray) -> Figure:
    """A Figure that shows the picture (height, width, 4), pixel for pixel."""
    height, width = pixels.shape[:2]
    figure = _new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    return figure


class _Typewriter:
    """Lines of monospaced text as grey pictures (height, width) uint8; each character is drawn only once."""

    def __init__(self, size: float, weight: str = "normal"):
        self.width, self.height = round(size * 0.86), round(size * 1.7)
        self.figure = _new_figure(self.width, self.height)
        style = {"fontsize": size, "weight": weight, "family": "DejaVu Sans Mono", "parse_math": False}
        self.text = self.figure.text(0.5, 0.3, "", ha="center", **style)
        self.drawn: dict[str, np.ndarray] = {}

    def character(self, character: str) -> np.ndarray:
        if character not in self.drawn:
            self.text.set_text(character)
            self.drawn[character] = _drawn(self.figure)[:, :, 0]
        return self.drawn[character]

    def line(self, text: str, width: int | None = None) -> np.ndarray:
        """`text`, centred on `width` pixels when given and cut when it is too long for them."""
        written = np.concatenate([self.character(character) for character in text], axis=1)
        if width is None:
            return written
        left = max(0, width - written.shape[1]) // 2
        line = np.full((self.height, width), 255, np.uint8)
        line[:, left : left + written.shape[1]] = written[:, :width]
        return line


def _zoom(picture: np.ndarray, width: int) -> int:
    """How many screen pixels to give each pixel of a picture (..., W) so that it is about `width` wide; 1 at least."""
    return max(1, round(width / picture.shape[-1]))


def _paste(pixels: np.ndarray, grey: np.ndarray, top: int, left: int) -> None:
    """Put a grey picture into the colour picture `pixels`, which is changed, cut at its right edge."""
    space = pixels[top : top + grey.shape[0], left : left + grey.shape[1], :3]
    space[:] = grey[:, : space.shape[1], None]


def _three_digits(value: float) -> str:
    """A positive number in few characters: 1.83, 12.6, 128, 4e-03."""
    if value < 0.005:
        return f"{value:.0e}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _tile_row(groups: list[Examples], images: np.ndarray, captions: _Typewriter) -> np.ndarray:
    """One grey picture of a row of captioned tiles; groups of examples share its columns evenly."""
    zoom = _zoom(images, TILE)
    height, width = (zoom * side + 2 for side in images.shape[1:])
    row = np.full((height + captions.height, COLUMNS * (width + 4)), 255, np.uint8)
    for group, examples in enumerate(groups):
        first = group * (COLUMNS // len(groups))
        for place, (index, activation, label) in enumerate(zip(*(c.tolist() for c in examples), strict=True)):
            left = (first + place) * (width + 4)
            row[:height, left : left + width] = FRAME
            ink = images[index].repeat(zoom, 0).repeat(zoom, 1)
            row[1 : height - 1, left + 1 : left + width - 1] = 255 - 255 * ink.clip(0, 1)
            row[height:, left : left + width] = captions.line(f"{label}: {_three_digits(activation)}", width)
    return row


def _gallery_mosaic(k: int, bank: FeatureBank, images: np.ndarray, captions: _Typewriter) -> np.ndarray:
    """The tiles of a gallery in one grey picture, a blank strip of HEADER pixels above each of its three blocks."""
    last = max(int(bank.top.index[k].max()), int(bank.sample.index[k].max()))
    if last >= len(images):
        raise IndexError(f"feature {k} fires on image {last}, but only {len(images)} images were given")
    top, bands = bank.top.of(k), bank.bands(k)
    strongest = [Examples(*(column[i : i + COLUMNS] for column in top)) for i in (0, COLUMNS)]
    rows = [_tile_row(groups, images, captions) for groups in ([strongest[0]], [strongest[1]], bands[:2], bands[2:])]
    strip = np.full((HEADER, rows[0].shape[1]), 255, np.uint8)
    return np.concatenate([strip, rows[0], rows[1], strip, rows[2], strip, rows[3]])


def _grey_images(images) -> np.ndarray:
    """Images as an array (N, H, W) with ink in [0, 1]. Raises ValueError when they are not grey pictures."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise ValueError(f"images have shape {array.shape}; expected (N, H, W) or (N, 1, H, W)")
    return array


def _gallery_title(k: int, bank: FeatureBank) -> str:
    if bank.n_active[k] == 0:
        return f"Feature {k}: never fires on these {bank.n_images:,} images"
    return f"Feature {k}: fires on {100 * float(bank.feature_density[k]):.3g}% of {bank.n_images:,} images"


GALLERY_HEADERS = (  # (block of tiles above which it stands, share of the width at which it starts, text)
    (0, 0.0, "strongest images (under each its label: activation)"),
    (1, 0.0, "from the strongest quarter of its active range"),
    (1, 0.5, "from the second quarter"),
    (2, 0.0, "from the third quarter"),
    (2, 0.5, "from the weakest quarter"),
)


def _write_gallery_headers(figure: Figure, left: float, top: float, width: float, row_height: int) -> None:
    """Write the headers into the blank strips of a mosaic whose upper left corner is at (left, top), in pixels."""
    full_width, full_height = figure.get_size_inches() * DPI
    for block, share, text in GALLERY_HEADERS:
        rows_above, strips_above = (0, 2, 3)[block], block + 1
        y = top + rows_above * row_height + strips_above * HEADER - 7
        figure.text((left + share * width) / full_width, 1 - y / full_height, text, fontsize=8.5)


class GalleryPainter:
    """Paints galleries: the strongest images of a feature, then examples from each quarter of its active range."""

    def __init__(self, images):
        self.images = _grey_images(images)
        self.captions, self.titles = _Typewriter(7), _Typewriter(11, "bold")
        row_height, width = _tile_row([], self.images, self.captions).shape
        height = 4 * row_height + 3 * HEADER
        figure = _new_figure(width + 2 * MARGIN, height + TITLE + MARGIN)
        _write_gallery_headers(figure, MARGIN, TITLE, width, row_height)
        self.background = _drawn(figure)

    def paint(self, k: int, bank: FeatureBank) -> np.ndarray:
        """The gallery of feature k, (height, width, 4) uint8. Raises IndexError for images that are not the bank's."""
        pixels = self.background.copy()
        mosaic = _gallery_mosaic(check_feature(k, len(bank.n_active)), bank, self.images, self.captions)
        space = pixels[TITLE : TITLE + len(mosaic), MARGIN : MARGIN + mosaic.shape[1], :3]
        np.minimum(space, mosaic[:, :, None], out=space)  # keeps the headers, which stand where the mosaic is blank
        _paste(pixels, self.titles.line(_gallery_title(k, bank)), 8, MARGIN)
        return pixels


def _display_scale(heat: np.ndarray, inked: np.ndarray | None) -> float:
    """What full colour stands for: the 99th percentile of |heat| where there is ink, so one pixel cannot dim all.

    At least a quarter of the largest, though: a pattern of a few pixels must not be scaled by the noise around them.
    """
    visible = np.abs(heat[inked] if inked is not None else heat)
    return max(float(np.quantile(visible, 0.99)), float(visible.max()) / 4) if visible.size else 0.0


PATTERN_COLOURS = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.88")


def _coloured(heat: np.ndarray, inked: np.ndarray | None) -> np.ndarray:
    """`heat` (H, W) as colours (H, W, 4) uint8."""
    scale = _display_scale(heat, inked)
    shown = np.ma.array(heat / scale if scale else heat, mask=np.ma.nomask if inked is None else ~inked)
    return PATTERN_COLOURS((shown.clip(-1, 1) + 1) / 2, bytes=True)


class PatternPainter:
    """Paints input patterns: red pixels raise the feature, blue ones lower it, grey ones are not `inked`."""

    def __init__(self, shape: tuple[int, int], inked: np.ndarray | None = None):
        self.inked, self.shape = _as_mask(inked, shape), tuple(shape)
        self.titles, self.notes = _Typewriter(10, "bold"), _Typewriter(8)
        self.top = TITLE + self.notes.height + 4
        self.zoom = _zoom(np.empty(shape), PATTERN)
        height, width = (self.zoom * side for side in shape)
        full_width, full_height = width + 2 * MARGIN + 76, height + self.top + MARGIN
        figure = _new_figure(full_width, full_height)
        bar_place = ((2 * MARGIN + width) / full_width, MARGIN / full_height, 12 / full_width, height / full_height)
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-1, 1), PATTERN_COLOURS)
        bar = figure.colorbar(scale, cax=figure.add_axes(bar_place), ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["lowers", "0", "raises"], fontsize=8)
        self.background = _drawn(figure)

    def paint(self, heat: np.ndarray, k: int) -> np.ndarray:
        """The pattern `heat` (H, W) of feature k, (height, width, 4) uint8. Raises ValueError for another shape."""
        if heat.shape != self.shape:
            raise ValueError(f"the pattern has shape {heat.shape}, expected {self.shape}")
        pixels = self.background.copy()
        zoomed = _coloured(heat, self.inked).repeat(self.zoom, 0).repeat(self.zoom, 1)
        pixels[self.top : self.top + zoomed.shape[0], MARGIN : MARGIN + zoomed.shape[1]] = zoomed
        _paste(pixels, self.titles.line(f"Feature {k}: pixels that drive it"), 6, MARGIN)
        note = f"full colour = {_display_scale(heat, self.inked):.2g} per unit of ink"
        _paste(pixels, self.notes.line(note), TITLE, MARGIN)
        return pixels


def _as_pattern(heat) -> np.ndarray:
    array = heat.detach().cpu().numpy() if isinstance(heat, Tensor) else np.asarray(heat)
    if array.ndim != 2:
        raise ValueError(f"the pattern has shape {array.shape}; expected (H, W)")
    return array


def _as_patterns(heats) -> np.ndarray:
    array = heats.detach().cpu().numpy() if isinstance(heats, Tensor) else np.asarray(heats)
    if array.ndim != 3:
        raise ValueError(f"the patterns have shape {array.shape}; expected (d_sae, H, W)")
    return array


def _as_mask(inked, shape: tuple[int, ...]) -> np.ndarray | None:
    """`inked` as a bool array. Raises ValueError when it has not the shape of the pattern."""
    if inked is None:
        return None
    mask = np.asarray(inked.detach().cpu() if isinstance(inked, Tensor) else inked).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"inked has shape {mask.shape}, but patterns have shape {tuple(shape)}")
    return mask


def show_feature_gallery(k: int, bank: FeatureBank, images, save_path: str | Path | None = None) -> Figure:
    """The images that fire feature k: the strongest ones, then five from each quarter of its active range.

    `images` (N, H, W) or (N, 1, H, W) are those the bank was collected on, in the same order. A feature that never
    fires gets a picture that says so.

    Raises IndexError for a k out of range or too few images, ValueError for images of another shape.
    """
    pixels = GalleryPainter(images).paint(k, bank)
    if save_path is not None:
        save_pixels(pixels, save_path)
    return _figure_of(pixels)


def visualize_feature_pattern(heat, k: int, save_path: str | Path | None = None, inked=None) -> Figure:
    """The input pattern `heat` (H, W) of feature k in colour, zero being white.

    `inked` (H, W) bool marks the pixels that images ink; the others are drawn grey and do not set the scale, since
    what a model does with a pixel that is all but always empty means nothing. Raises ValueError for other shapes.
    """
    heat = _as_pattern(heat)
    pixels = PatternPainter(heat.shape, inked).paint(heat, k)
    if save_path is not None:
        save_pixels(pixels, save_path)
    return _figure_of(pixels)


def _bars(axes, values: np.ndarray, title: str, signed: bool) -> None:
    """One bar per class; signed values in the colours of the pattern."""
    colours = ["#b2182b" if value > 0 else "#2166ac" for value in values] if signed else "0.4"
    axes.bar(range(len(values)), values, color=colours)
    axes.set_xticks(range(len(values)))
    axes.axhline(0, color="black", linewidth=0.8)
    if not np.any(values):
        axes.set_yticks([0])
        axes.text(0.5, 0.6, "none", transform=axes.transAxes, ha="center", color="0.4")
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def show_feature_panel(
    k: int,
    bank: FeatureBank,
    images,
    heat,
    logit_delta,
    ablation_delta,
    save_path: str | Path | None = None,
    inked=None,
    caption: str = "",
) -> Figure:
    """Everything about feature k in one picture: gallery, input pattern, label histogram and both logit effects.

    `heat` (H, W) comes from `feature_input_pattern`, `logit_delta` and `ablation_delta` (C,) from
    `feature_logit_effect` and `feature_ablation_effect`; `caption` is written below the gallery; the rest is as in
    `show_feature_gallery` and `visualize_feature_pattern`.
    """
    heat, images = _as_pattern(heat), _grey_images(images)
    mosaic = _gallery_mosaic(check_feature(k, len(bank.n_active)), bank, images, _Typewriter(7))
    height, width = mosaic.shape
    lines = [line for paragraph in caption.splitlines() for line in textwrap.wrap(paragraph, CAPTION_LETTERS)]
    full_width, full_height = width + 440, max(height + TITLE + MARGIN + CAPTION_LINE * (len(lines) + 1), 530)
    figure = _new_figure(full_width, full_height)

    def axes_at(left: float, top: float, w: float, h: float):
        return figure.add_axes((left / full_width, 1 - (top + h) / full_height, w / full_width, h / full_height))

    figure.text(MARGIN / full_width, 1 - 24 / full_height, _gallery_title(k, bank), fontsize=12, weight="bold")
    axes = axes_at(MARGIN, TITLE, width, height)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    _write_gallery_headers(figure, MARGIN, TITLE, width, (height - 3 * HEADER) // 4)
    for row, line in enumerate(lines):
        y = 1 - (TITLE + height + CAPTION_LINE * (row + 1.2)) / full_height
        figure.text(MARGIN / full_width, y, line, fontsize=8.5, parse_math=False)

    left = width + 90
    axes = axes_at(left, 34, 150, 150)
    axes.imshow(_coloured(heat, _as_mask(inked, heat.shape)), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("pixels: red raises it, blue lowers it", fontsize=9.5, loc="left")
    charts = (
        (bank.label_histogram[k], "images that fire it, by label", False),
        (logit_delta, "change of each logit when it is added", True),
        (ablation_delta, "change of each logit when it is removed", True),
    )
    for row, (values, title, signed) in enumerate(charts):
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        _bars(axes_at(left, 224 + 102 * row, 320, 58), values, title, signed)
    if save_path is not None:
        save_figure(figure, save_path)
    return figure


def draw_explained(aurocs: dict[str, Sequence[float]], shares: dict[str, Shares], bar: float) -> Figure:
    """How well the statements about several sets of features predict, and what share is confirmed in all parts."""
    figure = _new_figure(1000, 380)
    left, right = figure.add_axes((0.07, 0.15, 0.4, 0.68)), figure.add_axes((0.66, 0.15, 0.31, 0.68))
    colours = ["#b2182b", "#2166ac", "#4d9221", "#e08214", "#7b3294", "0.4"]
    for colour, (name, values) in zip(colours, aurocs.items(), strict=False):
        ranked = np.sort(values)
        left.step([*ranked, 1.0], [*(1 - np.arange(len(ranked)) / max(1, len(ranked))), 0.0], color=colour, label=name)
    left.axvline(bar, color="0.6", linestyle=":")
    left.text(bar - 0.01, 0.03, f"bar {bar:g}", ha="right", fontsize=8.5, color="0.4")
    left.set_xlim(0.5, 1)
    left.set_ylim(0, 1.02)
    left.set_xlabel("AUROC on unseen images")
    left.set_title("share of features predicted at least so well", fontsize=10, loc="left")
    left.legend(fontsize=8.5, loc="center left")
    names = list(shares)[::-1]
    values = [100 * shares[name].explained for name in names]
    rates = [shares[name].median_density for name in names]
    ticks = [name if rate is None else f"{name}\n(fire on {rate:.1%})" for name, rate in zip(names, rates, strict=True)]
    right.barh(ticks, values, color=colours[: len(names)][::-1])
    for row, value in enumerate(values):
        right.text(value + 1, row, f"{value:.0f}%", va="center", fontsize=9)
    right.set_xlim(0, 105)
    right.set_title("class, stroke and effect all confirmed, % of features", fontsize=10, loc="right")
    for axes in (left, right):
        axes.tick_params(labelsize=8.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("Statements about features, tested on images that were not used to make them", fontsize=11.5)
    return figure


def write_feature_pictures(
    folder: str | Path, features: Iterable[int], bank: FeatureBank, images, heats, inked=None
) -> None:
    """feature_{k}_gallery.png, feature_{k}_pattern.png and feature_{k}_pattern.npy for each of `features`.

    `heats` (d_sae, H, W) from `feature_input_patterns`; the .npy holds the raw gradient. Compressing and writing, which
    release Python's lock, go on in a second thread while the next picture is painted.
    """
    folder = Path(folder)
    heats = _as_patterns(heats)
    gallery, pattern = GalleryPainter(images), PatternPainter(heats.shape[1:], inked)
    with ThreadPoolExecutor(1) as writer:
        waiting: list[Future] = []
        for k in features:
            raw = io.BytesIO()
            np.save(raw, heats[k])
            waiting.append(writer.submit(save_pixels, gallery.paint(k, bank), folder / f"feature_{k}_gallery.png"))
            waiting.append(writer.submit(save_pixels, pattern.paint(heats[k], k), folder / f"feature_{k}_pattern.png"))
            waiting.append(writer.submit(write_whole, folder / f"feature_{k}_pattern.npy", raw.getvalue()))
            while len(waiting) > 30:  # never hold more than a few pictures in memory; a failed write ends the loop here
                waiting.pop(0).result()
        for done in waiting:
            done.result()


# ---------------------------------------------------------------------------------------------------------------------
# A page to look at all this, and to draw a digit: one file that needs neither network nor server
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATE = Path(__file__).resolve().parent / "templates" / "feature_report.html"
PAGE_TOP, PAGE_PER_BAND = 12, 4  # images shown for a feature: the strongest, and of each quarter of its range
HISTOGRAM_BINS = 24
TOGETHER = 4  # neighbours named for a feature


class Network(NamedTuple):
    """A network that the page can compute by itself: logits = W2 relu(W1 x + b1) + b2 of pixels x in [0, 1]."""

    W1: Tensor  # (d_in, n_pixels)
    b1: Tensor  # (d_in,)
    W2: Tensor  # (C, d_in)
    b2: Tensor  # (C,)


def activation_histograms(activity: Activity, bins: int = HISTOGRAM_BINS) -> tuple[np.ndarray, np.ndarray]:
    """How the positive activations of each feature are spread between 0 and its largest: counts (d_sae, bins), largest
    (d_sae,), 0 for a silent feature."""
    feature = np.repeat(np.arange(len(activity.n_active)), activity.n_active.numpy())
    values, largest = activity.activation.numpy(), np.zeros(len(activity.n_active), np.float32)
    np.maximum.at(largest, feature, values)
    place = np.minimum((values / largest[feature] * bins).astype(int), bins - 1)
    return np.bincount(feature * bins + place, minlength=len(largest) * bins).reshape(-1, bins), largest


def firing_together(activity: Activity, n: int = TOGETHER) -> tuple[Tensor, Tensor]:
    """For every feature the n others whose activity (0 or 1) correlates most with its own, and the correlations:
    (d_sae, n) each. A silent feature correlates with none."""
    d_sae, n_images = len(activity.n_active), len(activity.labels)
    both = torch.zeros(d_sae, d_sae)
    which = torch.repeat_interleave(torch.arange(d_sae), activity.n_active)
    for first in range(0, n_images, ROWS):
        here = (activity.image >= first) & (activity.image < first + ROWS)
        active = torch.zeros(min(ROWS, n_images - first), d_sae)
        active[activity.image[here] - first, which[here]] = 1
        both += active.T @ active
    share = activity.n_active / n_images
    spread = (share * (1 - share)).sqrt()
    correlation = (both / n_images - share[:, None] * share) / (spread[:, None] * spread).clamp(min=1e-9)
    correlation.fill_diagonal_(-2.0)
    best = correlation.topk(min(n, d_sae - 1), dim=1)
    return best.indices, best.values


def _pack(arrays: dict[str, np.ndarray]) -> tuple[dict[str, dict], str]:
    """Arrays one after the other, compressed, as base64; and where each is. Offsets are multiples of four."""
    kinds, places, raw = {"uint8": "u1", "int8": "i1", "float32": "f4"}, {}, bytearray()
    for name, array in arrays.items():
        raw += bytes(-len(raw) % 4)
        places[name] = {"type": kinds[str(array.dtype)], "offset": len(raw), "length": array.size}
        raw += np.ascontiguousarray(array).tobytes()
    return places, base64.b64encode(gzip.compress(bytes(raw), 6, mtime=0)).decode()


def _safe_json(value: object) -> str:
    """JSON that may stand in a script element: no character of it can end the element or a line of a script."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII alone: the rest is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(values) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _page_examples(bank: FeatureBank, features: Sequence[int]) -> tuple[list[dict], list[int]]:
    """For each feature its strongest and its band examples as (slot, label, activation); and the image of each slot."""
    slots: dict[int, int] = {}

    def listed(examples: Examples, n: int) -> list[list]:
        rows = zip(*(column[:n].tolist() for column in examples), strict=True)
        return [[slots.setdefault(i, len(slots)), label, float(f"{a:.4g}")] for i, a, label in rows]

    found = [
        {
            "top": listed(bank.top.of(k), PAGE_TOP),
            "bands": [listed(band, PAGE_PER_BAND) for band in bank.bands(k, per_band=PAGE_PER_BAND)],
        }
        for k in features
    ]
    return found, list(slots)


def _page_feature(record: dict) -> dict:
    """What the page says about a feature, from its record in feature_report.json."""
    effect = (record.get("evidence") or {}).get("effect")
    claimed = (record.get("hypothesis") or {}).get("effect") or {}
    detected = (record.get("evidence") or {}).get("detected") or {}
    verdicts = (record.get("evidence") or {}).get("verdicts", {}).get("parts", {})
    dose = None
    if effect:
        pairs = (("raises", "dose_raises", "linear_raises"), ("lowers", "dose_lowers", "linear_lowers"))
        curves = [
            [claimed[name], _rounded(effect[curve]), _rounded(effect[line])]
            for name, curve, line in pairs
            if claimed.get(name) is not None
        ]
        dose = {"at": list(effect["doses"]), "curves": curves}
    return {
        "feature": record["feature"],
        "density": float(f"{record['mean_active']:.6g}"),
        "mode": record["label_mode_when_active"],
        "labels": record["label_histogram"],
        "logit": _rounded(record["logit_delta_vector"]),
        "ablation": _rounded(record["ablation_delta_vector"]),
        "raises": record["logit_boost_class"],
        "statement": record.get("statement"),
        "evidence": (record.get("evidence") or {}).get("text"),
        "lines": record.get("measured", []),
        "confidence": record.get("confidence"),
        "verdict": record.get("verdict"),
        "explained": bool(verdicts)
        and all(v == CONFIRMED for v in verdicts.values())
        and record["verdict"] == CONFIRMED,
        "auroc": float(f"{detected['both']['auroc']:.4g}") if "both" in detected else None,
        "dose": dose,
    }


def _as_bytes(images: Tensor) -> np.ndarray:
    """Images with ink in [0, 1] as uint8."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def write_dashboard(
    path: str | Path,
    records: Sequence[dict],
    bank: FeatureBank,
    activity: Activity,
    images: Tensor,
    heats: Tensor,
    sae,
    mu: Tensor,
    std: Tensor,
    inked: np.ndarray | None = None,
    title: str = "Features of an image classifier",
    results: Sequence[tuple[str, str]] = (),
    diagnoses: Sequence[dict] = (),
    frontier: Sequence[dict] = (),
    network: Network | None = None,
    tests: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write one HTML file that shows the features of `records`, the records of feature_report.json.

    bank, activity and images (N, 1, H, W) belong to the same images; heats (d_sae, H, W). With `network`, and an SAE
    that has `b_enc`, `threshold` and `b_dec`, the page computes: one can draw a digit, or take one of `tests` (images
    (n, 1, H, W), labels (n,)), and switch features off. `results` are (name, value) pairs for its overview, `diagnoses`
    as in summary.json, `frontier` records with l0, fvu and agreement. Raises ValueError when images are not grey.
    """
    features = [record["feature"] for record in records]
    examples, used = _page_examples(bank, features)
    histograms, largest = activation_histograms(activity)
    partner, correlation = firing_together(activity)
    unit = torch.nn.functional.normalize(sae.W_dec.detach().cpu(), dim=1)
    cosine = unit[features] @ unit.T
    cosine[torch.arange(len(features)), features] = -2.0
    near = cosine.topk(min(TOGETHER, len(unit) - 1), dim=1)
    shown = [_page_feature(record) for record in records]
    threshold = getattr(sae, "threshold", torch.zeros(len(unit))).detach().cpu()
    for row, (k, feature) in enumerate(zip(features, shown, strict=True)):
        pairs = {"near": (near.indices[row], near.values[row]), "together": (partner[k], correlation[k])}
        for name, (others, values) in pairs.items():
            feature[name] = [[int(g), round(float(v), 3)] for g, v in zip(others, values, strict=True)]
        feature |= {"largest": float(f"{largest[k]:.4g}"), "threshold": float(f"{threshold[k]:.4g}"), **examples[row]}

    grey = torch.from_numpy(_grey_images(images))
    patterns = _as_patterns(heats)[features]
    mask = _as_mask(inked, patterns.shape[1:])
    scales = np.array([_display_scale(heat, mask) or 1.0 for heat in patterns])[:, None, None]
    arrays = {
        "images": _as_bytes(grey[used]) if used else np.zeros(0, np.uint8),
        "heats": (127 * (patterns / scales).clip(-1, 1)).round().astype(np.int8),
        "inked": (np.ones(patterns.shape[1:]) if mask is None else mask).astype(np.uint8),
        "histograms": histograms[features].astype(np.float32),
    }
    described = None
    if network is not None:
        weights = {**network._asdict(), "mu": mu, "std": std}
        weights |= {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")}
        arrays |= {name: value.detach().cpu().float().numpy() for name, value in weights.items()}
        described = {"d_in": len(mu), "d_sae": len(unit)}
    if tests is not None:
        arrays["tests"] = _as_bytes(tests[0])
    places, packed = _pack(arrays)
    meta = {
        "title": title,
        "shape": list(patterns.shape[1:]),
        "classes": len(bank.label_histogram[0]),
        "bins": HISTOGRAM_BINS,
        "results": list(results),
        "diagnoses": list(diagnoses),
        "frontier": list(frontier),
        "features": shown,
        "network": described,
        "tests": [] if tests is None else tests[1].tolist(),
        "arrays": places,
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{PACK}}", packed).replace("{{META}}", _safe_json(meta))
    write_whole(path, page.encode("utf-8"))
