"""Which images activate which features, and what does each feature do there?

    activity = collect_activity(layer, raw, labels)      # every pair of a feature and an active image
    removed = removal_effects(layer, raw, activity)      # what removing each feature does to the logits
    added, logits = contributions(layer, raw, activity)  # what each pair adds to its image's logits
    others, r = coactivation_neighbors(activity, 4)      # features that are active on the same images

Takes an `ExplainedLayer`, its output on some images and their labels; gives tables of numbers. It makes
no claim about what a feature means, and imports only feature_analysis.

Key: N images, C classes, d_sae features, P pairs of a feature and an image that activates it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa

PAIRS_AT_ONCE = 2**18  # pairs of features counted at once: few enough for the processor's cache


class Activity(NamedTuple):
    """Every pair of a feature and an image with a positive activation, features in order, on the CPU."""

    start: Tensor  # (d_sae + 1,) int64; the pairs of feature k are start[k] .. start[k + 1] - 1
    image: Tensor  # (P,) int64, ascending within a feature
    activation: Tensor  # (P,)
    labels: Tensor  # (N,) int64

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """The images (n,) that activate feature k, and its activations there (n,)."""
        pairs = slice(int(self.start[k]), int(self.start[k + 1]))
        return self.image[pairs], self.activation[pairs]

    def is_active(self, k: int) -> np.ndarray:
        """(N,) bool, whether each image activates feature k."""
        active = np.zeros(len(self.labels), dtype=bool)
        active[self.of(k)[0]] = True
        return active

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) number of images that activate each feature."""
        return self.start.diff()

    @property
    def feature(self) -> Tensor:
        """(P,) the feature of each pair."""
        return torch.repeat_interleave(torch.arange(len(self.n_active)), self.n_active)


def check_activity(activity: Activity, layer: fa.ExplainedLayer, raw: Tensor) -> None:
    """Raise ValueError unless the activity is of as many images as raw (N, d_in), and features."""
    found = len(activity.labels), len(activity.n_active)
    if found != (len(raw), layer.d_sae):
        expected = len(raw), layer.d_sae
        raise ValueError(f"the activity must be of (images, features) {expected}, got {found}")


def _append(column: Tensor, new: Tensor, n: int) -> Tensor:
    """A column (capacity,) with `new` (m,) after its first n values; twice as large when full.

    Pieces kept in a list would lie between the large arrays that come and go, and memory with such
    holes grows without end.
    """
    if n + len(new) > len(column):
        column = torch.cat([column, column.new_empty(len(column) + len(new))])
    column[n : n + len(new)] = new
    return column


@torch.no_grad()
def collect_activity(layer: fa.ExplainedLayer, raw: Tensor, labels: Tensor) -> Activity:
    """The activity of every feature on images with the layer's output raw (N, d_in).

    Memory grows with the pairs. Raises ValueError for labels that are no class indices and for
    negative activations.
    """
    labels = fa.class_indices(labels.cpu(), len(raw), layer.n_classes)
    columns, n_pairs, at_once = None, 0, max(1, min(fa.ROWS, fa.ENTRIES // layer.d_sae))
    for number, batch in enumerate(raw.split(at_once)):
        acts = layer.feature_acts(batch).cpu()
        fa.check_nonnegative(acts)
        image, feature = (acts > 0).nonzero().unbind(1)
        new = (feature, number * at_once + image, acts[image, feature])
        columns = columns or [column[:0] for column in new]
        columns = [_append(*given, n_pairs) for given in zip(columns, new, strict=True)]
        n_pairs += len(feature)
    feature, image, activation = (column[:n_pairs] for column in columns)
    counts = torch.bincount(feature, minlength=layer.d_sae)
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = torch.argsort(feature, stable=True)  # images stay ascending within a feature
    return Activity(start, image[order], activation[order], labels)


# --------------------------------------------------------------------------------------------------
# What removing a feature does
# --------------------------------------------------------------------------------------------------


def _logits_without(
    layer: fa.ExplainedLayer, raw: Tensor, activity: Activity
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pair by pair, in blocks: features (n,), images (n,), and the logits (n, C) of these images
    without these features."""
    columns = (activity.feature, activity.image, activity.activation)
    for part in zip(*(column.split(fa.HEAD_ROWS) for column in columns), strict=True):
        k, image, acts = (column.to(raw.device) for column in part)
        yield k, image, layer.logits(layer.without(raw[image], k, acts))


class Removals(NamedTuple):
    """What removing each feature alone does, over all images that activate it."""

    mean_delta: Tensor  # (d_sae, C) float64, mean change of the logits, as `LogitEffects` has it
    n_images: Tensor  # (d_sae,) int64, images that activate it
    size: Tensor  # (d_sae,) float64, sum over images of the length of the change of centered logits
    n_changed: Tensor  # (d_sae,) int64, images whose prediction changes

    @property
    def influence(self) -> Tensor:
        """(d_sae,) share of the total logit effect of single ablations; they sum to 1."""
        return self.size / self.size.sum().clamp(min=1e-300)

    @property
    def changes(self) -> Tensor:
        """(d_sae,) share of the images that activate it whose prediction changes."""
        return self.n_changed.float() / self.n_images.clamp(min=1)


@torch.no_grad()
def removal_effects(layer: fa.ExplainedLayer, raw: Tensor, activity: Activity) -> Removals:
    """What removing each feature does to the logits of raw (N, d_in), whose `activity` is given.

    Only the feature's own contribution is subtracted. Centered logits have their mean over classes
    taken away, which no prediction depends on. Raises ValueError for an activity of another number
    of images or features.
    """
    check_activity(activity, layer, raw)
    base = layer.logits(raw)
    predicted = base.argmax(1)
    sums = torch.zeros(layer.d_sae, base.shape[1], dtype=torch.float64, device=raw.device)
    size, changed = sums.new_zeros(layer.d_sae), sums.new_zeros(layer.d_sae)
    for k, image, logits in _logits_without(layer, raw, activity):
        delta = logits - base[image]
        sums.index_add_(0, k, delta.double())
        centered = delta - delta.mean(1, keepdim=True)
        size.index_add_(0, k, centered.norm(dim=1).double())
        changed.index_add_(0, k, (logits.argmax(1) != predicted[image]).double())
    n = activity.n_active
    mean = sums.cpu() / n[:, None].clamp(min=1)
    return Removals(mean, n, size.cpu(), changed.cpu().long())


@torch.no_grad()
def contributions(
    layer: fa.ExplainedLayer, raw: Tensor, activity: Activity
) -> tuple[Tensor, Tensor]:
    """What each pair's feature adds to the logits of its image, (P, C), and these logits, (N, C).

    It is what the image loses with the feature: its logits before minus those after. What two
    features add is not what both together add. raw is (N, d_in); raises like `removal_effects`.
    """
    check_activity(activity, layer, raw)
    logits = layer.logits(raw)
    added = [
        (logits[image] - without).cpu()
        for _, image, without in _logits_without(layer, raw, activity)
    ]
    return torch.cat(added), logits.cpu()


# --------------------------------------------------------------------------------------------------
# Which features are alike?
# --------------------------------------------------------------------------------------------------


class _ByImage(NamedTuple):
    """The pairs of an Activity in the order of their images."""

    start: Tensor  # (N + 1,) int64; the pairs of image i are start[i] .. start[i + 1] - 1
    feature: Tensor  # (P,) int32

    @classmethod
    def of(cls, activity: Activity) -> _ByImage:
        counts = torch.bincount(activity.image, minlength=len(activity.labels))
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order = torch.argsort(activity.image, stable=True)
        return cls(start, activity.feature.int()[order])


def _images_in_common(activity: Activity, by_image: _ByImage, first: int, last: int) -> Tensor:
    """(last - first, d_sae) int32, number of images that activate both, for the features first .. last - 1.

    Sparse: each pair of such a feature and an image counts the features that are active on the image.
    """
    d_sae = len(activity.n_active)
    common = torch.zeros((last - first) * d_sae, dtype=torch.int32)
    pairs = slice(int(activity.start[first]), int(activity.start[last]))
    row = torch.repeat_interleave(torch.arange(last - first), activity.n_active[first:last])
    active = by_image.start.diff()  # (N,) features of each image
    at_once = max(1, PAIRS_AT_ONCE // max(1, int(active.max())))
    for image, own in zip(activity.image[pairs].split(at_once), row.split(at_once), strict=True):
        n = active[image]
        end = n.cumsum(0)
        repeated = functools.partial(torch.repeat_interleave, repeats=n, output_size=int(n.sum()))
        place = torch.arange(int(n.sum()))
        place += repeated(by_image.start[image] - end + n)
        both = repeated(own * d_sae) + by_image.feature[place]
        common.index_add_(0, both, torch.ones_like(both, dtype=torch.int32))
    return common.view(-1, d_sae)


def top_similar(similarity: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row (F, d_sae) but column own (F,): columns, values (F, n)."""
    others = similarity.scatter(1, own[:, None], -2.0)
    best = others.topk(min(n, similarity.shape[1] - 1), dim=1)
    return best.indices, best.values


def top_similar_rows(unit: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`top_similar` by the products of the rows `own` (F,) of unit (d_sae, d_in) with all rows."""
    found = [top_similar(unit[some] @ unit.T, some, n) for some in own.split(fa.ROWS)]
    columns, values = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(values)


def coactivation_neighbors(activity: Activity, n: int) -> tuple[Tensor, Tensor]:
    """For every feature the n others whose activity, 0 or 1, correlates most with its own.

    Where p and q of the images activate two features, and r activate both, Pearson's correlation is
    (r - p q) / sqrt(p (1 - p) q (1 - q)). It counts as 0 for an inactive feature.

    Returns the others, best first, and the correlations, (d_sae, n) each.
    """
    n_images = len(activity.labels)
    share = activity.n_active.float() / n_images
    spread = (share * (1 - share)).sqrt()

    by_image, found = _ByImage.of(activity), []
    for some in torch.arange(len(share)).split(fa.ROWS):  # (ROWS, d_sae) at a time
        common = _images_in_common(activity, by_image, int(some[0]), int(some[-1]) + 1)
        covariance = common.float() / n_images - torch.outer(share[some], share)
        correlation = covariance / torch.outer(spread[some], spread).clamp(min=1e-9)
        found.append(top_similar(correlation, some, n))
    others, correlations = zip(*found, strict=True)
    return torch.cat(others), torch.cat(correlations)
