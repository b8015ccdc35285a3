"""TODO"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, collect_activity, contributions

ERRORS_SHOWN = 300  # misclassified images, those first of which the network is surest
OTHERS_SHOWN = 60  # images that it gets right, the first of each class
TOUR_FEATURES = 4  # features, at most, that the guided tour switches off


def _check_contributions(activity: Activity, added: Tensor, logits: Tensor | None = None) -> None:
    """Raise ValueError unless they are those of the activity."""
    found = len(added), len(activity.labels) if logits is None else len(logits)
    expected = len(activity.image), len(activity.labels)
    if found != expected:
        raise ValueError(
            f"contributions of (pairs, images) {found}, but the activity has {expected}"
        )


def class_effects(activity: Activity, added: Tensor) -> np.ndarray:
    """What each feature adds to each logit on the images of a class, (C, d_sae, C) float32.

    The mean is over all images of the class, 0 for those that do not fire the feature; `added`
    (P, C) is that of `fa.contributions`. Raises ValueError where it is of another activity.
    """
    _check_contributions(activity, added)
    n_classes, d_sae = added.shape[1], len(activity.n_active)
    row = activity.labels[activity.image] * d_sae + activity.feature
    sums = torch.zeros(n_classes * d_sae, n_classes, dtype=torch.float64)
    sums.index_add_(0, row, added.double())
    images = torch.bincount(activity.labels, minlength=n_classes).clamp(min=1)
    return (sums.view(n_classes, d_sae, n_classes) / images[:, None, None]).float().numpy()


def flips_by_removal(activity: Activity, added: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each feature (d_sae,): on how many images removing it, alone, makes a wrong prediction
    right, and a right one wrong; `added` and `logits` are those of `fa.contributions`. Raises
    ValueError where these are of another activity."""
    _check_contributions(activity, added, logits)
    d_sae, image = len(activity.n_active), activity.image
    right = (logits.argmax(1) == activity.labels)[image]
    stays = (logits[image] - added).argmax(1) == activity.labels[image]
    fixes = torch.bincount(activity.feature[~right & stays], minlength=d_sae)
    breaks = torch.bincount(activity.feature[right & ~stays], minlength=d_sae)
    return fixes, breaks


def lead_of(logits: Tensor, goal: Tensor) -> Tensor:
    """(n,) how far logit goal (n,) of logits (n, C) is ahead of the largest other."""
    others = logits.scatter(1, goal[:, None], -math.inf)
    return logits.gather(1, goal[:, None])[:, 0] - others.amax(1)


class FlipSets(NamedTuple):
    """Features whose removal makes a class the largest logit of an image."""

    off: Tensor  # (n, d_sae) bool; none where no such set was found
    logits: Tensor  # (n, C) without them
    lead: Tensor  # (n,) of that class over the largest other, before anything is removed


@torch.no_grad()
def minimal_flip_sets(
    layer: fa.ExplainedLayer, raw: Tensor, goal: Tensor, most: int | None = None
) -> FlipSets:
    """Few features, `most` or less, without which each image, the layer's output raw (n, d_in), is read as `goal` (n,).

    Greedy: each step removes the feature without which the goal leads most; in the end those
    that prove to be needless are put back, one by one until each of the rest is needed. There may
    be a smaller set.
    """
    if len(raw) == 0:
        none = torch.zeros(0, layer.d_sae, dtype=torch.bool)
        return FlipSets(none, torch.zeros(0, layer.n_classes), torch.zeros(0))
    raw, goal = raw.clone(), goal.to(raw.device)
    acts = layer.feature_acts(raw)
    lead = first = lead_of(layer.logits(raw), goal)
    off = torch.zeros_like(acts, dtype=torch.bool)
    steps = []
    for _ in range(most or acts.shape[1]):
        image, k = ((acts > 0) & ~off & (lead <= 0)[:, None]).nonzero().unbind(1)
        if len(image) == 0:
            break
        leads = torch.full_like(acts, -math.inf)
        for i, j in zip(image.split(fa.HEAD_ROWS), k.split(fa.HEAD_ROWS), strict=True):
            without = layer.logits(layer.without(raw[i], j, acts[i, j]))
            leads[i, j] = lead_of(without, goal[i])
        lead, best = torch.where(lead <= 0, leads.amax(1), lead), leads.argmax(1)
        image = image.unique()
        k = best[image]
        raw[image] = layer.without(raw[image], k, acts[image, k])
        off[image, k] = True
        steps.append((image, k))

    looked_at = lead > 0
    while looked_at.any():  # one that is put back can make others needless
        changed = torch.zeros_like(looked_at)
        for image, k in steps:
            still = off[image, k] & looked_at[image]
            image, k = image[still], k[still]
            back = layer.adding(raw[image], k, acts[image, k])
            needless = lead_of(layer.logits(back), goal[image]) > 0
            image, k = image[needless], k[needless]
            raw[image] = back[needless]
            off[image, k] = False
            changed[image] = True
        looked_at = changed
    off &= (lead > 0)[:, None]
    return FlipSets(off.cpu(), layer.logits(raw).cpu(), first.cpu())


def chosen_tests(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the test images shown: up to ERRORS_SHOWN that are misclassified, those first
    whose label's logit is furthest behind; and OTHERS_SHOWN that are not, the first of each class
    in turn."""
    behind = -lead_of(logits, labels)
    right = logits.argmax(1) == labels
    errors = torch.where(right, -math.inf, behind).argsort(descending=True, stable=True)
    errors = errors[: min(ERRORS_SHOWN, int((~right).sum()))]

    own = torch.nn.functional.one_hot(labels, logits.shape[1]) * right[:, None]
    turn = own.cumsum(0).gather(1, labels[:, None])[:, 0]
    others = torch.where(right, turn, len(turn) + 1).argsort(stable=True)
    return errors, others[: min(OTHERS_SHOWN, int(right.sum()))]


def confused_pair(logits: Tensor, labels: Tensor) -> list[int]:
    """The two classes most often taken for one another; the first two where none is."""
    n_classes = logits.shape[1]
    counts = torch.bincount(labels * n_classes + logits.argmax(1), minlength=n_classes**2)
    counts = counts.view(n_classes, n_classes)
    either = (counts + counts.T + 1).triu(1)
    return [int(either.argmax()) // n_classes, int(either.argmax()) % n_classes]


class Tour(NamedTuple):
    """An image that becomes another class when few features are switched off."""

    image: int
    goal: int  # the class that it becomes
    off: list[int]  # the features
    logits: Tensor  # (2 ** len(off), C), of every subset: bit i is feature i


@torch.no_grad()
def find_tour(
    layer: fa.ExplainedLayer, raw: Tensor, labels: Tensor, logits: Tensor, pair: list[int]
) -> Tour | None:
    """The image of one class of the pair that turns into the other with fewest features off; of
    several the one that is surest before and after. None if all need more than TOUR_FEATURES."""
    right = logits.argmax(1) == labels
    (place,) = (right & torch.isin(labels, torch.tensor(pair))).nonzero(as_tuple=True)
    goal = sum(pair) - labels[place]
    turns = minimal_flip_sets(layer, raw[place], goal, TOUR_FEATURES)
    needed = turns.off.sum(1)
    if not needed.any():
        return None

    surety = torch.minimum(-turns.lead, lead_of(turns.logits, goal))
    surety[needed != needed[needed > 0].min()] = -math.inf
    best = int(surety.argmax())
    features = turns.off[best].nonzero()[:, 0].tolist()

    own = raw[place[best : best + 1]]
    acts = layer.feature_acts(own)[0]
    states = own.expand(2 ** len(features), -1)
    for bit, k in enumerate(features):
        is_off = (torch.arange(len(states), device=own.device) >> bit & 1).to(own)
        states = layer.without(states, k, is_off * acts[k])
    without = layer.logits(states).cpu()
    return Tour(int(place[best]), int(goal[best]), features, without)


class TestReview(NamedTuple):
    """Test images worth seeing, m of n: the errors, then others, then that of the tour."""

    image: Tensor  # (m,) their places among the n
    n_errors: int  # the first so many are misclassified
    activity: Activity  # of the m images
    added: Tensor  # (P, C) what its pairs add
    logits: Tensor  # (m, C)
    turns: FlipSets  # what makes each error right, (n_errors, ...)
    fixes: Tensor  # (d_sae,) errors among the n that removing the feature alone makes right
    breaks: Tensor  # (d_sae,) images among the n that it makes wrong
    all_errors: int  # among the n
    pair: list[int]  # the two classes most often taken for one another
    tour: Tour | None


@torch.no_grad()
def review_tests(layer: fa.ExplainedLayer, raw: Tensor, labels: Tensor) -> TestReview:
    """The errors among images (n, ...), and all that features do on some of them."""
    labels = labels.cpu()
    every = collect_activity(layer, raw, labels)
    added, logits = contributions(layer, raw, every)
    fixes, breaks = flips_by_removal(every, added, logits)
    pair = confused_pair(logits, labels)
    tour = find_tour(layer, raw, labels, logits, pair)
    errors, others = chosen_tests(logits, labels)
    shown = torch.cat([errors, others])
    if tour is not None and tour.image not in shown:
        shown = torch.cat([shown, torch.tensor([tour.image])])

    activity = collect_activity(layer, raw[shown], labels[shown])
    added, some = contributions(layer, raw[shown], activity)
    turns = minimal_flip_sets(layer, raw[errors], labels[errors])
    n_wrong = int((logits.argmax(1) != labels).sum())
    found = (shown, len(errors), activity, added, some, turns, fixes, breaks, n_wrong, pair, tour)
    return TestReview(*found)
