"""Which features does a prediction depend on? Features are removed until the prediction changes.

    effects = class_effects(layer, raw, activity)  # (C, d_sae, C), mean contributions by class
    fixes, breaks = flips_by_removal(layer, raw, activity)   # errors fixed, predictions broken
    sets = minimal_flip_sets(layer, raw, goal)  # few features without which `goal` is predicted
    review = review_tests(layer, raw, labels)  # the errors of a test set, and all above

Takes an `ExplainedLayer` and its output on images; gives counts, sets of features and logits. To
remove a feature is to subtract its own contribution, f_k W_dec[k], from the activations: what the
SAE does not reconstruct stays. It trains nothing, and does not interpret features.

Key: N, n, m images, C classes, d_in units, d_sae features, P pairs of a feature and an image that
activates it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import (
    Activity,
    ClassEffects,
    Removals,
    collect_activity,
    contributions,
    logits_without,
)

if TYPE_CHECKING:
    from saexplain.tours import Tour

ERRORS_SHOWN = 300  # misclassified images, those of the largest margin first
OTHERS_SHOWN = 60  # correctly classified images, the first of each class
# The same of layers with positions, where each removal runs much of the network
ERRORS_AT_POSITIONS, OTHERS_AT_POSITIONS = 24, 36
FLIPS_AT_POSITIONS = 4  # features in a flip set, at most


def class_effects(
    layer: fa.ExplainedLayer, raw: fa.Rows, activity: Activity, removed: Removals | None = None
) -> np.ndarray:
    """Mean contribution of each feature to each logit, by class of images, (C, d_sae, C) float32;
    see `ClassEffects`."""
    effects = ClassEffects.of(layer, raw, activity, removed)
    return torch.stack([effects.on(c) for c in range(len(effects.rate))]).float().numpy()


def flips_by_removal(
    layer: fa.ExplainedLayer, raw: fa.Rows, activity: Activity
) -> tuple[Tensor, Tensor]:
    """Errors fixed and correct predictions broken by removing each feature alone, (d_sae,) each,
    among the images of raw, whose `activity` is given."""
    is_correct = (layer.logits(raw).argmax(1).cpu() == activity.labels).long()
    counts = torch.zeros(2, 2, layer.d_sae, dtype=torch.int64)  # by whether correct before, after
    for k, image, logits in logits_without(layer, raw, activity):
        after = (logits.argmax(1).cpu() == activity.labels[image.cpu()]).long()
        index = (is_correct[image.cpu()], after, k.cpu())
        counts.index_put_(index, torch.ones_like(after), accumulate=True)
    return counts[0, 1], counts[1, 0]


def logit_margin(logits: Tensor, goal: Tensor) -> Tensor:
    """(n,) logit `goal` (n,) of logits (n, C) minus the largest other logit."""
    others = logits.scatter(1, goal[:, None], -math.inf)
    return logits.gather(1, goal[:, None])[:, 0] - others.amax(1)


class FlipSets(NamedTuple):
    """Features whose removal makes a goal class the prediction, for each of n images."""

    off: Tensor  # (n, d_sae) bool; no feature where no such set was found
    logits: Tensor  # (n, C) without them
    margin: Tensor  # (n,) of the goal class, before anything is removed


@torch.no_grad()
def minimal_flip_sets(
    layer: fa.ExplainedLayer, raw: Tensor, goal: Tensor, most: int | None = None
) -> FlipSets:
    """Few features, at most `most`, without which raw (n, d_in) is classified as `goal` (n,).

    Greedy: each step removes the feature whose removal raises the goal's margin most. Features that
    prove needless are then put back, until each of the rest is needed. A smaller set may exist.
    """
    if len(raw) == 0:
        none = torch.zeros(0, layer.d_sae, dtype=torch.bool)
        return FlipSets(none, torch.zeros(0, layer.n_classes), torch.zeros(0))
    goal, state = goal.to(raw.device), _Removing(layer, raw)
    margin = before = logit_margin(layer.logits(raw), goal)
    off = torch.zeros_like(state.acts, dtype=torch.bool)
    steps = []  # (images, the feature removed from each), in order
    for _ in range(most or off.shape[1]):
        image, k = ((state.acts > 0) & ~off & (margin <= 0)[:, None]).nonzero().unbind(1)
        if len(image) == 0:
            break
        margins = torch.full_like(state.acts, -math.inf)  # after removing one feature more
        for i, j in zip(image.split(layer.head_rows), k.split(layer.head_rows), strict=True):
            margins[i, j] = logit_margin(layer.logits(state.without(i, j)), goal[i])
        margin, best = torch.where(margin <= 0, margins.amax(1), margin), margins.argmax(1)
        image = image.unique()
        k = best[image]
        state.replace(image, state.without(image, k))
        off[image, k] = True
        steps.append((image, k))

    flipped = margin > 0
    _put_needless_back(state, goal, off, steps, flipped)
    logits = layer.logits(state.rows())
    return FlipSets((off & flipped[:, None]).cpu(), logits.cpu(), before.cpu())


class _Removing:
    """Rows of a layer of which features are removed one by one, and put back."""

    def __init__(self, layer: fa.ExplainedLayer, raw: fa.Rows):
        self.layer, self.before = layer, raw
        self.acts = layer.feature_acts(raw)  # (n, d_sae), the largest over positions
        self.now = fa.values_of(raw).to(torch.float32, copy=True)  # stored ones may be float16

    def rows(self) -> fa.Rows:
        """All rows as they are now."""
        return self.before.like(self.now) if isinstance(self.before, fa.BranchRows) else self.now

    def _acts_before(self, image: Tensor, k: Tensor) -> Tensor:
        """Activations of features k (m,) on images (m,), before anything was removed."""
        if self.layer.has_positions:
            return self.layer.acts_of(self.before[image], k)
        return self.acts[image, k]

    def without(self, image: Tensor, k: Tensor) -> fa.Rows:
        """Rows of images (m,) as they are now, each without one feature k (m,) more."""
        return self.layer.without(self.rows()[image], k, self._acts_before(image, k))

    def with_again(self, image: Tensor, k: Tensor) -> fa.Rows:
        """Rows of images (m,) as they are now, each with one feature k (m,) put back."""
        return self.layer.adding(self.rows()[image], k, self._acts_before(image, k))

    def replace(self, image: Tensor, rows: fa.Rows) -> None:
        """Make `rows` those of images (m,)."""
        self.now[image] = fa.values_of(rows)


def _put_needless_back(
    state: _Removing,
    goal: Tensor,
    off: Tensor,
    steps: list[tuple[Tensor, Tensor]],
    flipped: Tensor,
) -> None:
    """Put every feature back that the goal can spare, in `state` and in `off` (n, d_sae).

    Only images `flipped` (n,) bool, on which the goal is reached, are changed.
    """
    while flipped.any():  # a feature that is put back can make others needless
        changed = torch.zeros_like(flipped)
        for image, k in steps:
            still_off = off[image, k] & flipped[image]
            image, k = image[still_off], k[still_off]
            if len(image) == 0:
                continue
            restored = state.with_again(image, k)
            needless = logit_margin(state.layer.logits(restored), goal[image]) > 0
            image, k = image[needless], k[needless]
            state.replace(image, restored[needless])
            off[image, k] = False
            changed[image] = True
        flipped = changed


def chosen_tests(
    logits: Tensor, labels: Tensor, most: tuple[int, int] = (ERRORS_SHOWN, OTHERS_SHOWN)
) -> tuple[Tensor, Tensor]:
    """Numbers of the test images shown: errors and correct ones, at most so many of each.

    Errors come first whose label's logit is furthest below the largest; the correct ones are the
    first of each class, then the second of each, and so on.
    """
    behind = -logit_margin(logits, labels)
    correct = logits.argmax(1) == labels
    errors = torch.where(correct, -math.inf, behind).argsort(descending=True, stable=True)
    errors = errors[: min(most[0], int((~correct).sum()))]

    own = torch.nn.functional.one_hot(labels, logits.shape[1]) * correct[:, None]
    turn = own.cumsum(0).gather(1, labels[:, None])[:, 0]  # n-th correct image of its class
    others = torch.where(correct, turn, len(turn) + 1).argsort(stable=True)
    return errors, others[: min(most[1], int(correct.sum()))]


def confused_pair(logits: Tensor, labels: Tensor) -> list[int]:
    """The two classes most often confused with each other; the first two without any error."""
    n_classes = logits.shape[1]
    counts = torch.bincount(labels * n_classes + logits.argmax(1), minlength=n_classes**2)
    counts = counts.view(n_classes, n_classes)
    either = (counts + counts.T + 1).triu(1)  # + 1: so that a pair of two classes is the largest
    return [int(either.argmax()) // n_classes, int(either.argmax()) % n_classes]


class TestReview(NamedTuple):
    """The m of n test images worth showing: the errors, then others, then that of the tour."""

    image: Tensor  # (m,) their positions among the n
    n_errors: int  # the first n_errors of the m are misclassified
    activity: Activity  # of the m images
    added: Tensor  # (P, C) contributions of its pairs
    logits: Tensor  # (m, C)
    sets: FlipSets  # what fixes each error shown, (n_errors, ...)
    fixes: Tensor | None  # (d_sae,) errors among the n that removing the feature alone fixes;
    breaks: Tensor | None  # (d_sae,) correct predictions it breaks; None: not from all n removed
    all_errors: int  # among the n
    pair: list[int]  # the two classes most often confused
    tour: Tour | None = None


@torch.no_grad()
def review_tests(
    layer: fa.ExplainedLayer, raw: fa.Rows, labels: Tensor, tour: Tour | None = None
) -> TestReview:
    """The errors among n test images, and what features contribute on some of them, that of the
    tour included."""
    labels, fixes, breaks = labels.cpu(), None, None
    if layer.has_positions:
        logits, most = layer.logits(raw).cpu(), (ERRORS_AT_POSITIONS, OTHERS_AT_POSITIONS)
    else:
        logits, most = layer.logits(raw).cpu(), (ERRORS_SHOWN, OTHERS_SHOWN)
        fixes, breaks = flips_by_removal(layer, raw, collect_activity(layer, raw, labels))
    pair = confused_pair(logits, labels)
    errors, others = chosen_tests(logits, labels, most)
    shown = torch.cat([errors, others])
    if tour is not None and tour.image not in shown:
        shown = torch.cat([shown, torch.tensor([tour.image])])

    activity = collect_activity(layer, raw[shown], labels[shown])
    added, some = contributions(layer, raw[shown], activity)
    most_removed = FLIPS_AT_POSITIONS if layer.has_positions else None
    return TestReview(
        image=shown,
        n_errors=len(errors),
        activity=activity,
        added=added,
        logits=some,
        sets=minimal_flip_sets(layer, raw[errors], labels[errors], most_removed),
        fixes=fixes,
        breaks=breaks,
        all_errors=int((logits.argmax(1) != labels).sum()),
        pair=pair,
        tour=tour,
    )
