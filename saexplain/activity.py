"""Which images activate which features, and what does each feature do there?

    activity = collect_activity(layer, raw, labels)      # pairs of a feature and an active image
    removed = removal_effects(layer, raw, activity)      # the logits without each feature
    added, logits = contributions(layer, raw, activity)  # what each pair adds to its image's logits
    others, r = coactivation_neighbors(activity, 4)      # features active on the same images

Takes an `ExplainedLayer`, its output raw on some images and their labels (N,); gives tables of
numbers. It does not interpret features, and imports only feature_analysis.

Key: N images, C classes, d_sae features, P pairs of a feature and an image that activates it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import feature_analysis as fa

PAIRS_AT_ONCE = 2**18  # pairs of features counted at once: few enough for the processor's cache
PRIOR = 4.0  # pairs that the mean over all classes counts as, where a class has few of its own
KEPT_ENTRIES = 2**26  # logits of pairs that are kept for the page, at most
REMOVED_FROM = 64  # images from which a feature of a layer with positions is removed, at most


class Activity(NamedTuple):
    """Every pair of a feature and an image that activates it, features in order, on the CPU."""

    start: Tensor  # (d_sae + 1,) int64; the pairs of feature k are start[k] .. start[k + 1] - 1
    image: Tensor  # (P,) int64, ascending within a feature
    activation: Tensor  # (P,) the largest over positions
    labels: Tensor  # (N,) int64
    position: Tensor  # (P,) int64, where it is; 0 for a vector layer

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """The images (n,) that activate feature k, and its activations there (n,)."""
        pairs = slice(int(self.start[k]), int(self.start[k + 1]))
        return self.image[pairs], self.activation[pairs]

    def peaks_of(self, k: int) -> Tensor:
        """(n,) the positions at which feature k is most active on the images that activate it."""
        return self.position[int(self.start[k]) : int(self.start[k + 1])]

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) number of images that activate each feature."""
        return self.start.diff()

    @property
    def feature(self) -> Tensor:
        """(P,) the feature of each pair."""
        return torch.repeat_interleave(torch.arange(len(self.n_active)), self.n_active)

    def fewer(self, n: int) -> Activity:
        """The same with at most n pairs of each feature, evenly spaced."""
        counts = self.n_active.clamp(max=n)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        nth = torch.arange(int(start[-1])) - start[:-1].repeat_interleave(counts)
        step = (self.n_active / counts.clamp(min=1)).double().repeat_interleave(counts)
        kept = self.start[:-1].repeat_interleave(counts) + (nth * step).long()
        columns = self.image[kept], self.activation[kept], self.labels, self.position[kept]
        return Activity(start, *columns)


def check_activity(activity: Activity, layer: fa.ExplainedLayer, raw: Tensor) -> None:
    """Raise ValueError unless the activity is of as many images as raw (N, d_in), and features."""
    met, expected = (len(activity.labels), len(activity.n_active)), (len(raw), layer.d_sae)
    if met != expected:
        raise ValueError(f"the activity must be of (images, features) {expected}, got {met}")


def _append(column: Tensor, new: Tensor, n: int) -> Tensor:
    """A column (capacity,) with `new` (m,) after its first n values, twice as large when full.

    Many pieces in a list would fragment memory, which the large arrays between them then outgrow.
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
        acts, position = (found.cpu() for found in layer.peaks(batch))
        fa.check_nonnegative(acts)
        image, feature = (acts > 0).nonzero().unbind(1)
        at = image, feature
        new = (feature, number * at_once + image, acts[at], position[at])
        columns = columns or [column[:0] for column in new]  # empty, of the same dtypes
        columns = [_append(*given, n_pairs) for given in zip(columns, new, strict=True)]
        n_pairs += len(feature)
    feature, image, activation, position = (column[:n_pairs] for column in columns)
    counts = torch.bincount(feature, minlength=layer.d_sae)
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = torch.argsort(feature, stable=True)  # images stay ascending within a feature
    return Activity(start, image[order], activation[order], labels, position[order])


# --------------------------------------------------------------------------------------------------
# What removing a feature does
# --------------------------------------------------------------------------------------------------


def logits_without(
    layer: fa.ExplainedLayer, raw: fa.Rows, activity: Activity
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features (n,), images (n,), and the logits (n, C) without the feature, in blocks of pairs."""
    columns = (activity.feature, activity.image, activity.activation)
    for part in zip(*(column.split(layer.head_rows) for column in columns), strict=True):
        k, image, acts = (column.to(raw.device) for column in part)
        known = None if layer.has_positions else acts
        yield k, image, layer.logits(layer.without(raw[image], k, known))


def removed_pairs(layer: fa.ExplainedLayer, activity: Activity) -> Activity:
    """The pairs of which the feature is removed: all, or REMOVED_FROM of each feature of a layer
    with positions, where each runs much of the network."""
    return activity.fewer(REMOVED_FROM) if layer.has_positions else activity


class Contributions(NamedTuple):
    """What features add to the logits of images, feature by feature."""

    pairs: Activity  # of P features and images
    added: Tensor  # (P, C), what the image's logits lose with the feature
    logits: Tensor  # (N, C) with all features


class Removals(NamedTuple):
    """What removing each feature alone does, over all images that activate it."""

    mean_delta: Tensor  # (d_sae, C) float64, mean change of the logits, as `LogitEffects` has it
    n_images: Tensor  # (d_sae,) int64, images that activate it and from which it is removed
    size: Tensor  # (d_sae,) float64, sum over all images that activate it of the length of the
    # change of centered logits: the mean over n_images times their number
    n_changed: Tensor  # (d_sae,) int64, images among n_images whose prediction changes
    kept: Contributions | None = None  # of a layer with positions, unless they are too many

    @property
    def influence(self) -> Tensor:
        """(d_sae,) share of the total logit effect of single ablations; they sum to 1."""
        return self.size / self.size.sum().clamp(min=1e-300)  # all 0 where nothing is active

    @property
    def changes(self) -> Tensor:
        """(d_sae,) share of the images that activate it whose prediction changes."""
        return self.n_changed.float() / self.n_images.clamp(min=1)


@torch.no_grad()
def removal_effects(layer: fa.ExplainedLayer, raw: Tensor, activity: Activity) -> Removals:
    """What removing each feature does to the logits of raw, whose `activity` is given.

    Only the feature's own contribution is subtracted, from the images of `removed_pairs`. Centered
    logits are less their mean over classes, on which no prediction depends. Raises ValueError for
    an activity of another number of images or features.
    """
    check_activity(activity, layer, raw)
    n_active, activity = activity.n_active, removed_pairs(layer, activity)
    base = layer.logits(raw)
    predicted = base.argmax(1)
    sums = torch.zeros(layer.d_sae, base.shape[1], dtype=torch.float64, device=raw.device)
    size, changed = sums.new_zeros(layer.d_sae), sums.new_zeros(layer.d_sae)
    is_kept = layer.has_positions and len(activity.image) * base.shape[1] <= KEPT_ENTRIES
    added = []
    for k, image, logits in logits_without(layer, raw, activity):
        delta = logits - base[image]
        added += [-delta.cpu()] if is_kept else []
        sums.index_add_(0, k, delta.double())
        centered = delta - delta.mean(1, keepdim=True)  # (n, C)
        size.index_add_(0, k, centered.norm(dim=1).double())
        changed.index_add_(0, k, (logits.argmax(1) != predicted[image]).double())
    n = activity.n_active
    mean = sums.cpu() / n[:, None].clamp(min=1)
    size = size.cpu() * (n_active / n.clamp(min=1))  # 1 where no image is left out
    kept = Contributions(activity, torch.cat(added), base.cpu()) if added else None
    return Removals(mean, n, size, changed.cpu().long(), kept)


@torch.no_grad()
def contributions(
    layer: fa.ExplainedLayer, raw: Tensor, activity: Activity
) -> tuple[Tensor, Tensor]:
    """What each pair's feature adds to the logits of its image, (P, C), and these logits, (N, C).

    It is what the image loses with the feature: its logits before minus those after. What two
    features add is not what both together add. Raises like `removal_effects`.
    """
    check_activity(activity, layer, raw)
    logits = layer.logits(raw)
    added = [
        (logits[image] - without).cpu()
        for _, image, without in logits_without(layer, raw, activity)
    ]
    return torch.cat(added), logits.cpu()


class ClassEffects(NamedTuple):
    """Mean contributions of features by class of images, one class at a time."""

    found: Contributions
    rate: Tensor  # (C, d_sae) float64, share of the images of a class that activate a feature
    mean: Tensor | None  # (d_sae, C) float64 over the kept pairs; None where all pairs are kept

    @classmethod
    def of(
        cls,
        layer: fa.ExplainedLayer,
        raw: fa.Rows,
        activity: Activity,
        removed: Removals | None = None,
    ) -> ClassEffects:
        """Of raw, whose `activity` is given; `removed` has the contributions of a layer with
        positions, where they are known."""
        found, n_classes = removed.kept if removed is not None else None, layer.n_classes
        if found is None:
            pairs = removed_pairs(layer, activity)
            if len(pairs.image) * n_classes > KEPT_ENTRIES:
                pairs = pairs.fewer(max(1, KEPT_ENTRIES // (n_classes * layer.d_sae)))
            found = Contributions(pairs, *contributions(layer, raw, pairs))
        cell = activity.labels[activity.image] * layer.d_sae + activity.feature
        counts = torch.bincount(cell, minlength=n_classes * layer.d_sae).view(n_classes, -1)
        of_class = torch.bincount(activity.labels, minlength=n_classes)  # a class may be empty
        rate = counts.double() / of_class.clamp(min=1)[:, None]
        mean = None
        if len(found.pairs.image) < len(activity.image):
            sums = torch.zeros(layer.d_sae, n_classes, dtype=torch.float64)
            sums.index_add_(0, found.pairs.feature, found.added.double())
            mean = sums / found.pairs.n_active.clamp(min=1)[:, None]
        return cls(found, rate, mean)

    def on(self, c: int) -> Tensor:
        """(d_sae, C) float64, the mean over all images of class c; one that does not activate a
        feature counts as 0.

        Where a feature was removed from some images only, its rate in the class is known, and its
        mean effect there is that on the kept images of the class and PRIOR of all kept ones.
        """
        pairs, added, _ = self.found
        own = pairs.labels[pairs.image] == c
        feature = pairs.feature[own]
        sums = torch.zeros(self.rate.shape[1], added.shape[1], dtype=torch.float64)
        sums.index_add_(0, feature, added[own].double())
        if self.mean is None:
            return sums / max(1, int((pairs.labels == c).sum()))
        n = torch.bincount(feature, minlength=len(sums))[:, None]
        return self.rate[c, :, None] * (sums + PRIOR * self.mean) / (n + PRIOR)


# --------------------------------------------------------------------------------------------------
# Which features are alike?
# --------------------------------------------------------------------------------------------------


def _features_by_image(activity: Activity) -> tuple[Tensor, Tensor]:
    """The features (P,) int32 image by image, and how many each image activates, (N,)."""
    order = torch.argsort(activity.image, stable=True)
    counts = torch.bincount(activity.image, minlength=len(activity.labels))
    return activity.feature.int()[order], counts


def _images_in_common(
    activity: Activity, by_image: tuple[Tensor, Tensor], first: int, last: int
) -> Tensor:
    """Number of images that activate both, (n, d_sae) int32, of the n features first .. last - 1.

    Sparse: for each of their pairs, the features that its image activates are counted once.
    `by_image` comes from `_features_by_image`.
    """
    features, active = by_image
    end_of = active.cumsum(0)  # (N,) where the features of each image end
    d_sae = len(activity.n_active)
    common = torch.zeros((last - first) * d_sae, dtype=torch.int32)
    pairs = slice(int(activity.start[first]), int(activity.start[last]))
    row = torch.repeat_interleave(torch.arange(last - first), activity.n_active[first:last])
    at_once = max(1, PAIRS_AT_ONCE // max(1, int(active.max())))
    for image, own in zip(activity.image[pairs].split(at_once), row.split(at_once), strict=True):
        n = active[image]
        repeated = functools.partial(torch.repeat_interleave, repeats=n, output_size=int(n.sum()))
        place = torch.arange(int(n.sum())) + repeated(end_of[image] - n.cumsum(0))
        both = repeated(own * d_sae) + features[place]
        common.index_add_(0, both, torch.ones_like(both, dtype=torch.int32))
    return common.view(-1, d_sae)


def top_similar(similarity: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row (F, d_sae), column own (F,) left out: columns, values (F, n)."""
    others = similarity.scatter(1, own[:, None], -2.0)  # below any cosine or correlation
    best = others.topk(min(n, similarity.shape[1] - 1), dim=1)
    return best.indices, best.values


def top_similar_rows(unit: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`top_similar` by the products of the rows `own` (F,) of unit (d_sae, d_in) with all rows."""
    found = [top_similar(unit[some] @ unit.T, some, n) for some in own.split(fa.ROWS)]
    columns, values = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(values)


def coactivation_neighbors(activity: Activity, n: int) -> tuple[Tensor, Tensor]:
    """The n others most often active with each feature, and the correlations, (d_sae, n) each.

    The most correlated comes first. Activity counts as 0 or 1: where shares p and q of the images
    activate two features, and r both, it is (r - p q) / sqrt(p (1 - p) q (1 - q)), Pearson's. It is
    0 for an inactive feature.
    """
    n_images = len(activity.labels)
    share = activity.n_active.float() / n_images
    spread = (share * (1 - share)).sqrt()

    by_image, found = _features_by_image(activity), []
    for some in torch.arange(len(share)).split(fa.ROWS):  # (ROWS, d_sae) at a time
        common = _images_in_common(activity, by_image, int(some[0]), int(some[-1]) + 1)
        covariance = common.float() / n_images - torch.outer(share[some], share)
        correlation = covariance / torch.outer(spread[some], spread).clamp(min=1e-9)  # not 0 / 0
        found.append(top_similar(correlation, some, n))
    others, correlations = zip(*found, strict=True)
    return torch.cat(others), torch.cat(correlations)
