"""On which image is it clearest what removing a feature does? The guided tour of the page.

    tour = find_tour(layer, layer.splits["test"], records, canvas)

Takes a layer, images on which nothing was fitted, and the records of feature_report.json; gives an
image, the few features without which its prediction changes, and whether what is known of them
agrees with what is seen there. It proposes and tests nothing.

Key: n images, C classes, d_sae features, P cells of the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.counterfactuals import FlipSets, logit_margin, minimal_flip_sets
from saexplain.hypotheses import CONFIDENCES, evenly_spaced, scores_of, weights_of_rows
from saexplain.ink import FULL_INK, Canvas

TOUR_FEATURES = 4  # features, at most, that the tour removes
EASY_FEATURES = 2  # of so many a visitor can follow what each does
TOURS_TRIED = 2000  # images among which that of the tour is searched
TOURS_AT_POSITIONS = 60  # the same of layers with positions, where removals run much of the network
LEGIBLE = 0.9  # share of a drawing's cells that look on an image as the drawing wants


class Tour(NamedTuple):
    """An image whose prediction becomes another class when few features are removed."""

    image: int
    goal: int  # the class that is predicted without the features
    off: list[int]  # the features
    logits: Tensor  # (2 ** len(off), C), of every subset: bit i is feature off[i] removed
    agrees: list[bool]  # of each feature, whether its hypothesis agrees with what is seen


def agreement(record: Mapping, levels: Tensor | None, label: int, fall: float) -> int:
    """How far a feature's hypothesis agrees with an image that activates it and with its effect
    there: 3 for a confidence of High, 2 Medium, 1 Low, 0 without hypothesis, -1 a contradiction.

    A hypothesis contradicts that has other classes than `label`, that of the image, or a drawing
    that the image, with `levels` (P,) of ink, does not match. The effect contradicts where the
    score of the class does not `fall` without the feature, or another class is supported more.
    """
    supported = int(np.argmin(record["ablation_delta_vector"]))
    hypothesis = record.get("hypothesis")
    if fall <= 0 or supported != label:
        return -1
    if not hypothesis or record.get("confidence") not in CONFIDENCES:
        return 0
    has_class = label in (hypothesis.get("classes") or [label])
    raised, lowered = hypothesis.get("raises"), hypothesis.get("lowers")
    if not has_class or raised not in (None, label) or lowered == label:
        return -1
    if levels is not None and hypothesis.get("threshold") is not None:
        weights = weights_of_rows(hypothesis["drawing"])
        if int(scores_of(weights[None], levels[None])) < hypothesis["threshold"]:
            return -1
    return len(CONFIDENCES) - CONFIDENCES.index(record["confidence"])


def legibility(record: Mapping, levels: Tensor | None) -> float:
    """The share of the drawing's cells, of those with ink wanted or of those without, whichever is
    less, that an image with `levels` (P,) of ink has as the drawing wants; 1 without a drawing."""
    rows = (record.get("hypothesis") or {}).get("drawing")
    if levels is None or not rows:
        return 1.0
    weights, inked = weights_of_rows(rows).ravel(), levels.numpy() >= FULL_INK / 2
    shares = [(inked[weights > 0]).mean()] if (weights > 0).any() else []
    shares += [(~inked[weights < 0]).mean()] if (weights < 0).any() else []
    return float(min(shares, default=1.0))


def _falls(layer: fa.ExplainedLayer, raw: fa.Rows, sets: FlipSets, labels: Tensor) -> Tensor:
    """(n, d_sae) how far the score of each image's class falls without each feature of its set."""
    before, falls = layer.logits(raw).cpu(), torch.zeros(sets.off.shape)
    image, k = sets.off.nonzero().unbind(1)
    for i, j in zip(image.split(layer.head_rows), k.split(layer.head_rows), strict=True):
        rows = raw[i.to(raw.device)]
        after = layer.logits(layer.without(rows, j.to(raw.device))).cpu()
        falls[i, j] = (before[i] - after).gather(1, labels[i, None])[:, 0]
    return falls


def _logits_of_subsets(layer: fa.ExplainedLayer, row: fa.Rows, features: list[int]) -> Tensor:
    """(2 ** m, C) logits of one row without each subset of m features."""
    states = row[torch.zeros(2 ** len(features), dtype=torch.int64, device=row.device)]
    acts = {k: layer.acts_of(states, k) for k in features}  # before any is removed
    for bit, k in enumerate(features):
        is_off = torch.arange(len(states), device=row.device) >> bit & 1
        each = (-1, *(1 for _ in acts[k].shape[1:]))  # one for each row
        states = layer.without(states, k, is_off.view(each) * acts[k])
    return layer.logits(states).cpu()


@torch.no_grad()
def find_tour(
    layer: fa.ExplainedLayer,
    test: fa.Activations,
    records: Sequence[Mapping] = (),
    canvas: Canvas | None = None,
) -> Tour | None:
    """The correctly classified image that becomes its second class with few features removed, on
    which what is known of these agrees best with what is seen.

    In this order count: at most EASY_FEATURES; `agreement`, that of the worst of them; how few they
    are; drawings that are LEGIBLE on the image; the margin before and after. The canvas is that of
    the drawings; None: there are none of whole images. None if every image needs more than
    TOUR_FEATURES.
    """
    most = TOURS_AT_POSITIONS if layer.has_positions else TOURS_TRIED
    place = evenly_spaced(torch.arange(len(test.labels)), most)
    raw, labels = test.raw[place.to(test.raw.device)], test.labels.cpu()[place]
    logits = layer.logits(raw).cpu()
    kept = (logits.argmax(1) == labels).nonzero()[:, 0]
    place, raw, labels = place[kept], raw[kept.to(raw.device)], labels[kept]
    goal = logits[kept].scatter(1, labels[:, None], -math.inf).argmax(1)
    sets = minimal_flip_sets(layer, raw, goal, TOUR_FEATURES)
    flipped = sets.off.any(1).nonzero()[:, 0].tolist()
    if not flipped:
        return None

    falls, by_feature = _falls(layer, raw, sets, labels), {r["feature"]: r for r in records}
    margin = torch.minimum(-sets.margin, logit_margin(sets.logits, goal)).tolist()
    levels = canvas.levels(test.images[place]) if canvas is not None else [None] * len(place)

    def agreements(n: int) -> list[int]:
        label, off = int(labels[n]), sets.off[n].nonzero()[:, 0].tolist()
        known = [(by_feature.get(k), float(falls[n, k])) for k in off]
        return [agreement(r, levels[n], label, fall) if r else 0 for r, fall in known]

    def quality(n: int) -> tuple:
        off = sets.off[n].nonzero()[:, 0].tolist()
        shares = [legibility(by_feature.get(k, {}), levels[n]) for k in off]
        few = len(off) <= EASY_FEATURES
        return few, min(agreements(n)), -len(off), min(shares) >= LEGIBLE, margin[n]

    best = max(flipped, key=quality)
    features = sets.off[best].nonzero()[:, 0].tolist()
    without = _logits_of_subsets(layer, raw[best : best + 1], features)
    agrees = [value > 0 for value in agreements(best)]
    return Tour(int(place[best]), int(goal[best]), features, without, agrees)
