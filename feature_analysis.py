"""What does a feature of a sparse autoencoder mean? Pure functions that answer it for an image classifier.

    bank = collect_feature_bank(model, loader, sae, mu, std)            # which images fire each feature?
    heat = feature_input_pattern(model, sae, mu, std, k)                # which pixels drive feature k?
    delta, top = feature_logit_effect(model, loader, sae, mu, std, k)   # which classes does adding it push?
    delta, top = feature_ablation_effect(model, loader, sae, mu, std, k)  # ... and removing it?
    show_feature_gallery(k, bank, images)                               # the pictures; each returns a Figure

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
No function changes its inputs, draws random numbers or remembers anything between calls.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable
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
) -> Figure:
    """Everything about feature k in one picture: gallery, input pattern, label histogram and both logit effects.

    `heat` (H, W) comes from `feature_input_pattern`, `logit_delta` and `ablation_delta` (C,) from
    `feature_logit_effect` and `feature_ablation_effect`; the rest is as in `show_feature_gallery` and
    `visualize_feature_pattern`.
    """
    heat, images = _as_pattern(heat), _grey_images(images)
    mosaic = _gallery_mosaic(check_feature(k, len(bank.n_active)), bank, images, _Typewriter(7))
    height, width = mosaic.shape
    full_width, full_height = width + 440, max(height + TITLE + MARGIN, 530)
    figure = _new_figure(full_width, full_height)

    def axes_at(left: float, top: float, w: float, h: float):
        return figure.add_axes((left / full_width, 1 - (top + h) / full_height, w / full_width, h / full_height))

    figure.text(MARGIN / full_width, 1 - 24 / full_height, _gallery_title(k, bank), fontsize=12, weight="bold")
    axes = axes_at(MARGIN, TITLE, width, height)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    _write_gallery_headers(figure, MARGIN, TITLE, width, (height - 3 * HEADER) // 4)

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


def write_feature_pictures(
    folder: str | Path, features: Iterable[int], bank: FeatureBank, images, heats, inked=None
) -> None:
    """feature_{k}_gallery.png, feature_{k}_pattern.png and feature_{k}_pattern.npy for each of `features`.

    `heats` (d_sae, H, W) from `feature_input_patterns`; the .npy holds the raw gradient. Compressing and writing, which
    release Python's lock, go on in a second thread while the next picture is painted.
    """
    folder = Path(folder)
    heats = heats.detach().cpu().numpy() if isinstance(heats, Tensor) else np.asarray(heats)
    if heats.ndim != 3:
        raise ValueError(f"the patterns have shape {heats.shape}; expected (d_sae, H, W)")
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
