"""Claims: what may a feature mean, in words and in a form that a program can check?

    hypotheses = propose_hypotheses(layer, images, labels)     # one for every feature
    statement(hypotheses[k])                                   # "Dot at the top; fires on 3s"
    sha256 = freeze_hypotheses(hypotheses, "hypotheses.json")  # no change stays unseen from here on
    hypotheses, rule = read_hypotheses("hypotheses.json", sha256)

Takes a `fa.ExplainedLayer` and discovery images (N, ...) with labels (N,), and gives `Hypothesis`
objects. This room never sees an image on which a claim will be tested: the trial is another room.

Dimension key: N images, C classes, d_sae features, M places of the vocabulary, K claims at once,
784 = 28 x 28 pixels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa

# --------------------------------------------------------------------------------------------------
# The words of a stroke claim: places on a 28 x 28 image
# --------------------------------------------------------------------------------------------------

SIDE = 28  # the vocabulary is made for images of this height and width
DIRECTIONS = {  # steps (down, right)
    "horizontal": (0, 1),
    "vertical": (1, 0),
    "rising": (-1, 1),
    "falling": (1, 1),
}
LENGTHS = (7, 13)  # of a short and of a long piece of stroke, in pixels
GRID = range(3, 26, 2)  # rows and columns on which pieces are centred
HALF_WIDTH = 1.5  # of a stroke, in pixels
DOT_RADIUS = 2.6
DOT_LENGTH = 5  # pixels across


class Place(NamedTuple):
    """A piece of pen stroke."""

    row: int  # of its centre, in pixels
    col: int
    shape: str  # one of DIRECTIONS, or "dot"
    length: int  # pixels

    def words(self) -> str:
        """As in "long rising stroke at the upper left"."""
        where = _region(self.row, self.col)
        if self.shape == "dot":
            return f"dot {where}"
        long = "long " if self.length == LENGTHS[1] else ""
        return f"{long}{self.shape} stroke {where}"


def _third(at: int) -> int:
    """0, 1 or 2: which third of the middle 20 rows or columns, where the digits stand."""
    return min(2, max(0, (at - 4) // 7))


def _region(row: int, col: int) -> str:
    """As in "at the upper left"."""
    high = ("upper", "", "lower")[_third(row)]
    wide = ("left", "", "right")[_third(col)]
    if high and wide:
        return f"at the {high} {wide}"
    if wide:
        return f"at the {wide}"
    return {"": "in the centre", "upper": "at the top", "lower": "at the bottom"}[high]


def place_masks(places: Sequence[Place]) -> Tensor:
    """(n, 28, 28) bool, the pixels of each place."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    masks = np.zeros((len(places), SIDE, SIDE), dtype=bool)
    for mask, place in zip(masks, places, strict=True):
        down, right = rows - place.row, cols - place.col
        if place.shape == "dot":
            mask[:] = down**2 + right**2 <= DOT_RADIUS**2
            continue
        step = np.array(DIRECTIONS[place.shape]) / math.hypot(*DIRECTIONS[place.shape])
        along = down * step[0] + right * step[1]
        across = right * step[0] - down * step[1]
        mask[:] = (abs(along) <= place.length / 2) & (abs(across) <= HALF_WIDTH)
    return torch.from_numpy(masks)


def _fits(row: int, col: int, shape: str, length: int) -> bool:
    """Whether both ends of a stroke lie on the image."""
    direction = DIRECTIONS[shape]
    for at, step in zip((row, col), direction, strict=True):
        reach = abs(step) / math.hypot(*direction) * (length - 1) / 2
        if at < reach or at + reach > SIDE - 1:
            return False
    return True


@functools.cache
def stroke_vocabulary() -> tuple[Place, ...]:
    """All M places that a claim may name: those whose ends lie on the image."""
    places = []
    for row, col in itertools.product(GRID, GRID):
        places.append(Place(row, col, "dot", DOT_LENGTH))
        for shape, length in itertools.product(DIRECTIONS, LENGTHS):
            if _fits(row, col, shape, length):
                places.append(Place(row, col, shape, length))
    return tuple(places)


class _Vocabulary(NamedTuple):
    number: dict[Place, int]
    masks: Tensor  # (M, 784) bool
    size: Tensor  # (M,) pixels of each place
    mean_over: Tensor  # (M, 784) weights that turn an image into its mean over each place


@functools.cache
def _vocabulary() -> _Vocabulary:
    places = stroke_vocabulary()
    masks = place_masks(places).flatten(1)
    size = masks.sum(1)
    number = {place: m for m, place in enumerate(places)}
    return _Vocabulary(number, masks, size, masks / size[:, None])


# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------

PARTS = ("class", "stroke", "effect")


class Rule(NamedTuple):
    """The thresholds by which claims are judged; they are frozen together with them."""

    class_auroc: float = 0.65  # smallest AUROC with which the labels must predict activity ...
    stroke_auroc: float = 0.8  # ... and the strokes ...
    both_auroc: float = 0.85  # ... and both together
    times_elsewhere: float = 2.0  # editing named ink must work so many times as often as other ink
    edit_share: float = 0.25  # ... and on at least this share of the images
    effect_share: float = 0.5  # smallest share of a predicted change of a logit that must be found
    min_active: int = 8  # active images, and silent ones, below which nothing is claimed or judged
    false_discovery_rate: float = 0.01  # of all tests of all features together


class Stroke(NamedTuple):
    """Places, and their weights in the score: positive where ink is wanted, negative where none."""

    places: tuple[Place, ...]
    weights: tuple[float, ...]

    def wanted(self) -> list[Place]:
        return [place for place, w in zip(self.places, self.weights, strict=True) if w > 0]

    def empty(self) -> list[Place]:
        return [place for place, w in zip(self.places, self.weights, strict=True) if w < 0]


class Effect(NamedTuple):
    """The logit a feature raises and the one it lowers on the images that fire it, and by how much.

    None: no claim.
    """

    raises: int | None
    raised_by: float
    lowers: int | None
    lowered_by: float


class Hypothesis(NamedTuple):
    """What a feature is claimed to mean. A part that is None claims nothing; `why_not` says why."""

    feature: int
    labels: tuple[int, ...] | None  # class part: it fires on images with these labels
    stroke: Stroke | None
    effect: Effect | None
    label_weight: float  # what a named label adds to the strokes' score where both are claimed
    typical_activation: float  # mean where it is active
    label_histogram: tuple[int, ...]  # active discovery images by label
    n_images: int  # discovery images
    why_not: dict[str, str]

    @property
    def n_active(self) -> int:
        return sum(self.label_histogram)

    def proposes(self, part: str) -> bool:
        claim = {"class": self.labels, "stroke": self.stroke, "effect": self.effect}[part]
        return claim is not None


# --------------------------------------------------------------------------------------------------
# How a claim predicts where its feature is active
# --------------------------------------------------------------------------------------------------

AT_ONCE = 128  # claims whose scores are held at a time, (AT_ONCE, N)


def _numbers(stroke: Stroke) -> list[int]:
    """Numbers of its places in the vocabulary."""
    number = _vocabulary().number
    for place in stroke.places:
        if place not in number:
            raise ValueError(f"{place} is not in stroke_vocabulary(): name places from there")
    return [number[place] for place in stroke.places]


def stroke_pixels(stroke: Stroke) -> tuple[Tensor, Tensor]:
    """(784,) bool each: the pixels of the wanted places, and those of empty places alone."""
    masks = _vocabulary().masks[_numbers(stroke)]
    is_wanted = torch.tensor(stroke.weights) > 0
    wanted = masks[is_wanted].any(0)
    return wanted, masks[~is_wanted].any(0) & ~wanted


def _pixel_weights(stroke: Stroke) -> Tensor:
    """(784,) the score of an image is its product with these: the weighted mean inks of places."""
    return torch.tensor(stroke.weights) @ _vocabulary().mean_over[_numbers(stroke)]


def stroke_scores(strokes: Sequence[Stroke | None], pixels: Tensor) -> np.ndarray:
    """(K, N) float32 scores of up to AT_ONCE strokes on pixels (N, 784); zeros for None.

    The product always has AT_ONCE rows, so that the scores of a stroke are the same to the last
    bit whichever others are scored beside it.
    """
    weights = torch.zeros(AT_ONCE, pixels.shape[1])
    for row, stroke in zip(weights, strokes, strict=False):
        if stroke is not None:
            row[:] = _pixel_weights(stroke)
    return (weights @ pixels.T).numpy()[: len(strokes)]


def part_scores(
    hypotheses: Sequence[Hypothesis], images: Tensor, labels: Tensor
) -> Iterator[tuple[Hypothesis, dict[str, np.ndarray]]]:
    """By how much each part of each claim predicts activity: "class", "stroke", "both" -> (N,).

    A claim of one part predicts by that part alone, and "both" is the very same array. One without
    a class or stroke part has no scores. Raises ValueError for a place that is not in the
    vocabulary.
    """
    label_of = labels.cpu().numpy()
    pixels = None
    if any(h.stroke for h in hypotheses):
        pixels = images.flatten(1).float().cpu()
    for first in range(0, len(hypotheses), AT_ONCE):
        some = hypotheses[first : first + AT_ONCE]
        of_strokes = itertools.repeat(None)
        if any(h.stroke for h in some):
            of_strokes = stroke_scores([h.stroke for h in some], pixels)
        for h, of_stroke in zip(some, of_strokes, strict=False):
            yield h, _scores_of_parts(h, of_stroke, label_of)


def _scores_of_parts(
    h: Hypothesis, of_stroke: np.ndarray | None, label_of: np.ndarray
) -> dict[str, np.ndarray]:
    scores = {}
    if h.labels is not None:
        named = np.zeros(max(label_of.max(), *h.labels) + 1, dtype=np.float32)
        named[list(h.labels)] = 1
        scores["class"] = named[label_of]
    if h.stroke is not None:
        scores["stroke"] = of_stroke
    if len(scores) == 2:
        scores["both"] = of_stroke + np.float32(h.label_weight) * scores["class"]
    elif scores:
        scores["both"] = next(iter(scores.values()))
    return scores


class Ranks(NamedTuple):
    """Where the scores of m active images, ascending, stand among those of n others: (m,) each."""

    own_less: np.ndarray  # active images with a smaller score
    own_up_to: np.ndarray  # ... with one at most as large
    less: np.ndarray  # others with a smaller score
    up_to: np.ndarray  # ... with one at most as large
    ranked: np.ndarray  # (m + n,) all scores, ascending
    m: int
    n: int

    @property
    def auroc(self) -> float:
        """Share of (active, other) pairs in which the active image has the larger score, a tie
        counting one half."""
        return int((self.less + self.up_to).sum()) / (2 * self.m * self.n)


def ranks_of(scores: np.ndarray, at: np.ndarray) -> Ranks:
    """Of scores (N,), of which those at the indices `at` (m,) are of active images.

    Raises ValueError unless some images are active and some are not.
    """
    m, n = len(at), len(scores) - len(at)
    if m == 0 or n == 0:
        counts = f"{m} of {len(scores)} images are active"
        raise ValueError(f"{counts}: at least one must be, and one must not")
    own, ranked = np.sort(scores[at]), np.sort(scores)
    own_less, own_up_to = (np.searchsorted(own, own, side) for side in ("left", "right"))
    all_less, all_up_to = (np.searchsorted(ranked, own, side) for side in ("left", "right"))
    return Ranks(own_less, own_up_to, all_less - own_less, all_up_to - own_up_to, ranked, m, n)


# --------------------------------------------------------------------------------------------------
# Propose strokes: orthogonal matching pursuit with signs
# --------------------------------------------------------------------------------------------------

MOST_PLACES = 3  # a stroke part names at most so many places with ink, and so many without
WORTH_A_PLACE = 1.03  # a further place must raise the explained variance by this factor
AS_GOOD = 0.95  # share of the best place's gain from which a place counts as good
PATTERN_IMAGES = 32  # over which input patterns are averaged; any, for a model linear in the pixels
IMAGES_AT_ONCE = 2048  # whose products are summed in float32 before they are added in float64


def spread(indices: Tensor, n: int) -> Tensor:
    """At most n of the indices, spread evenly."""
    places = torch.linspace(0, len(indices) - 1, min(n, len(indices)))
    return indices[places.round().long()]


def _pixel_covariance(pixels: Tensor) -> Tensor:
    """(784, 784) float64 covariance over images of pixels (N, 784); products in float32."""
    inked = (pixels.amax(0) > 0).nonzero()[:, 0]  # blank margins vary with nothing
    shown = pixels[:, inked]
    width, half = len(inked), len(inked) // 2
    products = torch.zeros(width, width, dtype=torch.float64)
    for some in shown.split(IMAGES_AT_ONCE):  # three quarters: the products are symmetric
        products[:half] += some[:, :half].T @ some
        products[half:, half:] += some[:, half:].T @ some[:, half:]
    products[half:, :half] = products[:half, half:].T
    mean = _pixel_mean(shown)
    covariance = torch.zeros(pixels.shape[1], pixels.shape[1], dtype=torch.float64)
    covariance[inked[:, None], inked] = products / len(pixels) - mean[:, None] * mean
    return covariance


def _pixel_mean(pixels: Tensor) -> Tensor:
    """(784,) float64 mean over images of pixels (N, 784)."""
    sums = [some.sum(0) for some in pixels.split(IMAGES_AT_ONCE)]
    return torch.stack(sums).sum(0, dtype=torch.float64) / len(pixels)


def _covariance_with_activity(pixels: Tensor, activity: fa.Activity) -> Tensor:
    """(d_sae, 784) float64 covariance of activity, 0 or 1, with pixels (N, 784)."""
    sums = torch.nn.functional.embedding_bag(
        activity.image, pixels, activity.start[:-1], mode="sum"
    )
    share = activity.n_active[:, None].double() / len(pixels)
    return sums.double() / len(pixels) - share * _pixel_mean(pixels)


def _pursue(covariance: Tensor, gram: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit with signs (Pati, Rezaiifar & Krishnaprasad 1993): up to six
    columns of `gram` (M, M) for each row of `covariance` (K, M).

    gradient (K, M) is the mean input pattern over each place: a place may be wanted only where ink
    raises the feature, and unwanted only where ink lowers it, so that what is named is a cause and
    not mere company. Among places that are AS_GOOD as the best, the one most like the pattern is
    taken, in cosine. Places are added while each multiplies the explained variance by
    WORTH_A_PLACE.

    Returns numbers of places and weights, (K, 6); 0 where not used.
    """
    n = len(covariance)
    alignment = gradient.abs() * _vocabulary().size.sqrt()
    scale = gram.diagonal().sqrt() + 1e-3
    ridge = 1e-6 * gram.diagonal().mean() + 1e-12  # a row that stopped growing may name one twice
    chosen = torch.zeros(n, 0, dtype=torch.int64)
    weights = torch.zeros(n, 0, dtype=gram.dtype)
    explained = torch.zeros(n, dtype=gram.dtype)
    growing = torch.ones(n, dtype=torch.bool)
    residual = covariance
    for _ in range(2 * MOST_PLACES):
        gain = _allowed_gain(residual / scale, gradient, chosen)
        best = gain.amax(1, keepdim=True)
        as_good = gain >= AS_GOOD * best
        place = torch.where(as_good, alignment, -1.0).argmax(1, keepdim=True)
        chosen = torch.cat([chosen, place], 1)

        among = gram[chosen[:, :, None], chosen[:, None, :]]
        wanted = covariance.gather(1, chosen)
        fitted = torch.linalg.solve(among + ridge * torch.eye(among.shape[1]), wanted)
        turned = fitted * gradient.gather(1, chosen) <= 0  # correlated places can turn a weight
        fitted[turned] = 0

        product = (among @ fitted[:, :, None])[:, :, 0]
        now = (fitted * (2 * wanted - product)).sum(1)
        growing = growing & (best[:, 0] > 0) & (now > WORTH_A_PLACE * explained)
        kept = torch.nn.functional.pad(weights, (0, 1))
        weights = torch.where(growing[:, None], fitted, kept)
        explained = torch.where(growing, now, explained)
        residual = covariance - (weights[:, None] @ gram[chosen])[:, 0]
    return chosen, weights


def _allowed_gain(gain: Tensor, gradient: Tensor, chosen: Tensor) -> Tensor:
    """(K, M) |gain|, 0 for a place whose sign contradicts the pattern, one of a kind of which there
    are MOST_PLACES, and one already chosen (K, n)."""
    signs = gradient.gather(1, chosen)
    full_up = ((signs > 0).sum(1) >= MOST_PLACES)[:, None]
    full_down = ((signs < 0).sum(1) >= MOST_PLACES)[:, None]
    refused = (gain * gradient <= 0) | full_up & (gradient > 0) | full_down & (gradient < 0)
    return gain.abs().masked_fill_(refused, 0).scatter_(1, chosen, 0)


def _as_stroke(places: list[int], weights: list[float]) -> Stroke | None:
    """Wanted places first, the heaviest of each kind in front; weights sum to one in size."""
    used = [(p, w) for p, w in zip(places, weights, strict=True) if w]
    if not used:
        return None
    total = sum(abs(w) for _, w in used)
    vocabulary = stroke_vocabulary()
    used.sort(key=lambda entry: (entry[1] < 0, -abs(entry[1]), vocabulary[entry[0]]))
    return Stroke(tuple(vocabulary[p] for p, _ in used), tuple(w / total for _, w in used))


def _fit_strokes(pixels: Tensor, activity: fa.Activity, heats: Tensor) -> list[Stroke | None]:
    """The best description of each feature by places: pixels (N, 784), heats (d_sae, 784)."""
    mean_over = _vocabulary().mean_over
    gram = (mean_over @ _pixel_covariance(pixels).float() @ mean_over.T).double()
    gram += (1e-4 * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram))  # blank images, too
    covariance = (_covariance_with_activity(pixels, activity).float() @ mean_over.T).double()
    gradient = heats @ mean_over.T
    strokes = []
    for some in torch.arange(len(covariance)).split(512):
        places, weights = _pursue(covariance[some], gram, gradient[some])
        strokes += map(_as_stroke, places.tolist(), weights.tolist())
    return strokes


# --------------------------------------------------------------------------------------------------
# Propose: a claim for every feature
# --------------------------------------------------------------------------------------------------

MOST_DIGITS = 3  # a class part names at most so many labels ...
LEAST_LIFT = 1.5  # ... each so many times as frequent among the active images as among all
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth a statement


def _label_histograms(activity: fa.Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the images that fire each feature by label."""
    d_sae = len(activity.n_active)
    feature = torch.repeat_interleave(torch.arange(d_sae), activity.n_active)
    cell = feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def _name_labels(histogram: np.ndarray, label_counts: np.ndarray) -> tuple[int, ...]:
    """The labels whose share among the active images exceeds their share of all images most: at
    most MOST_DIGITS, and LEAST_LIFT times that share at least."""
    share = histogram / histogram.sum()
    usual = label_counts / label_counts.sum()
    ranked = np.argsort(usual - share, kind="stable")[:MOST_DIGITS].tolist()
    named = [c for c in ranked if share[c] > 0 and share[c] >= LEAST_LIFT * usual[c]]
    return tuple(sorted(named))


def _name_effect(delta: Tensor) -> Effect | None:
    """The logits that fall and rise most when removing the feature changes them by delta (C,)."""
    raises, lowers = int(delta.argmin()), int(delta.argmax())
    raised_by, lowered_by = -float(delta[raises]), float(delta[lowers])
    if raised_by < SMALLEST_EFFECT:
        raises, raised_by = None, 0.0
    if lowered_by < SMALLEST_EFFECT:
        lowers, lowered_by = None, 0.0
    if raises is None and lowers is None:
        return None
    return Effect(raises, raised_by, lowers, lowered_by)


def _without(h: Hypothesis, part: str, why: str) -> Hypothesis:
    field = "labels" if part == "class" else part
    return h._replace(**{field: None}, why_not={**h.why_not, part: why})


def _weak(auroc: float, bar: float) -> str:
    return f"AUROC {auroc:.2f} on the discovery images, {bar} is asked for"


def _class_auroc(h: Hypothesis, label_counts: np.ndarray) -> float:
    """AUROC of "has a named label": half the sum of the two shares that it gets right."""
    named = list(h.labels)
    histogram = np.array(h.label_histogram)
    others = label_counts - histogram
    right = histogram[named].sum() / histogram.sum()
    wrong = others[named].sum() / others.sum()
    return float((right + 1 - wrong) / 2)


def _label_weight(score: np.ndarray, named: np.ndarray, at: np.ndarray) -> float:
    """What a named label adds to the strokes' score: least squares of activity on both.

    score (N,), named (N,) 0 or 1, `at` the indices of the active images. With centred sums of
    products s for the strokes, l for the label and a for activity, the normal equations give
    weight on the label / weight on the score = (la ss - sa sl) / (sa ll - la sl).
    """
    score = score - score.mean()
    share = float(named.mean())
    ss, sl = float(score @ score), float(score @ named)
    ll = len(named) * share * (1 - share)
    sa = float(score[at].sum())
    la = float(named[at].sum()) - len(at) * share
    if ss * ll - sl * sl <= 1e-9 * ss * ll:
        return 0.0  # one says what the other says
    on_score, on_label = sa * ll - la * sl, la * ss - sa * sl
    if on_score <= 0:
        return 0.0
    return float(max(0.0, on_label) / on_score)


def why_no_strokes(images: Tensor) -> str | None:
    """Why strokes cannot be named on such images; None when they can."""
    shape = tuple(images.shape[1:])
    if shape not in ((1, SIDE, SIDE), (SIDE, SIDE)):
        return (
            f"images have shape {shape}; strokes are described on grey {SIDE} x {SIDE} images only"
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return (
            f"pixels run from {low:g} to {high:g}; strokes are described where ink runs from 0 to 1"
        )
    return None


def _propose_strokes(
    layer: fa.ExplainedLayer, images: Tensor, activity: fa.Activity
) -> list[Stroke | None]:
    shown = spread(torch.arange(len(images)), PATTERN_IMAGES).to(images.device)
    heats = fa.feature_input_patterns(*layer, images[shown]).cpu()
    return _fit_strokes(images.flatten(1).float().cpu(), activity, heats.flatten(1))


def _unclaimed(k: int, activity: fa.Activity, histogram: np.ndarray) -> Hypothesis:
    """What is known of feature k before anything is claimed."""
    _, activations = activity.of(k)
    return Hypothesis(
        feature=k,
        labels=None,
        stroke=None,
        effect=None,
        label_weight=0.0,
        typical_activation=float(activations.mean()) if len(activations) else 0.0,
        label_histogram=tuple(histogram.tolist()),
        n_images=len(activity.labels),
        why_not={},
    )


def _claim_labels(h: Hypothesis, label_counts: np.ndarray, rule: Rule) -> Hypothesis:
    labels = _name_labels(np.array(h.label_histogram), label_counts)
    if not labels:
        why = f"no label is {LEAST_LIFT} times as frequent as among all images"
        return _without(h, "class", why)
    h = h._replace(labels=labels)
    auroc = _class_auroc(h, label_counts)
    if auroc < rule.class_auroc:
        return _without(h, "class", _weak(auroc, rule.class_auroc))
    return h


def _claim_effect(h: Hypothesis, delta: Tensor) -> Hypothesis:
    effect = _name_effect(delta)
    if effect is None:
        why = f"removing it changes no logit by {SMALLEST_EFFECT} on average"
        return _without(h, "effect", why)
    return h._replace(effect=effect)


def _weigh_strokes(
    hypotheses: Sequence[Hypothesis],
    images: Tensor,
    activity: fa.Activity,
    rule: Rule,
) -> dict[int, Hypothesis]:
    """By feature, the claims that name strokes: dropped where they are weak, else weighed against
    the labels."""
    weighed = {}
    with_stroke = [h for h in hypotheses if h.stroke]
    for h, scores in part_scores(with_stroke, images, activity.labels):
        at = activity.of(h.feature)[0].numpy()
        auroc = ranks_of(scores["stroke"], at).auroc
        if auroc < rule.stroke_auroc:
            h = _without(h, "stroke", _weak(auroc, rule.stroke_auroc))
        elif h.labels:
            h = h._replace(label_weight=_label_weight(scores["stroke"], scores["class"], at))
        weighed[h.feature] = h
    return weighed


def propose_hypotheses(
    layer: fa.ExplainedLayer, images: Tensor, labels: Tensor, rule: Rule | None = None
) -> list[Hypothesis]:
    """A claim about every feature, from the discovery images (N, ...) with labels (N,) alone.

    class   the labels on which it fires more often than on average
    stroke  up to three places with ink and up to three without that best predict where it is active
            (orthogonal matching pursuit), each agreeing with the sign of its input pattern there
    effect  the logits that its removal lowers and raises most

    A part that does not reach the rule's bar on these very images is not claimed. Raises ValueError
    for shapes that do not fit, labels that the model does not know, or no images.
    """
    rule = rule or Rule()
    activity = fa.collect_activity(layer, images, labels)
    loader = fa.batches_of(images, labels)
    removed = fa.feature_ablation_effects(layer.model, loader, *layer[1:]).mean_delta.cpu()
    d_sae, n_classes = removed.shape
    last_label = int(activity.labels.max())
    if last_label >= n_classes:
        raise ValueError(f"labels run to {last_label}, but the model has {n_classes} classes")

    no_strokes = why_no_strokes(images)
    strokes = [None] * d_sae if no_strokes else _propose_strokes(layer, images, activity)
    histograms = _label_histograms(activity, n_classes)
    label_counts = torch.bincount(activity.labels, minlength=n_classes).numpy()

    hypotheses = []
    for k, stroke in enumerate(strokes):
        h = _unclaimed(k, activity, histograms[k])
        if not rule.min_active <= h.n_active <= len(images) - rule.min_active:
            found = f"active on {h.n_active} of {len(images)} images"
            why = f"{found}; {rule.min_active} active and as many silent ones needed"
            hypotheses.append(h._replace(why_not=dict.fromkeys(PARTS, why)))
            continue
        h = h._replace(stroke=stroke)
        if stroke is None:
            h = _without(h, "stroke", no_strokes or "no ink predicts it")
        h = _claim_effect(h, removed[k])
        hypotheses.append(_claim_labels(h, label_counts, rule))
    weighed = _weigh_strokes(hypotheses, images, activity, rule)
    return [weighed.get(h.feature, h) for h in hypotheses]


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def listed(words: Sequence[str], last: str = "and") -> str:
    """As in "a, b and c", each once; "" for nothing."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _way(place: Place, other: Place) -> str:
    """As in "2 pixels lower and 3 pixels further left" than the other."""
    steps = (
        (place.row - other.row, ("higher", "lower")),
        (place.col - other.col, ("further left", "further right")),
    )
    return listed([f"{abs(n)} pixels {ways[n > 0]}" for n, ways in steps if n])


def _apart(place: Place, others: Sequence[Place]) -> str:
    """The place in words; where one of the others has the same words, with the way from there."""
    words = place.words()
    for other in others:
        if other.words().removeprefix("long ") == words.removeprefix("long "):
            return f"{words} {_way(place, other) or 'around that one'}"
    return words


def statement(h: Hypothesis) -> str:
    """The claim in plain English."""
    pieces = []
    if h.stroke:
        wanted = h.stroke.wanted()
        pieces.append(listed([place.words() for place in wanted]))
        empty = listed([_apart(place, wanted) for place in h.stroke.empty()], "or")
        pieces.append(f"no {empty}" if empty else "")
    if h.labels:
        pieces.append("fires on " + listed([f"{label}s" for label in h.labels]))
    if h.effect:
        moves = (("raises", h.effect.raises), ("lowers", h.effect.lowers))
        pieces.append(listed([f"{verb} {c}" for verb, c in moves if c is not None]))
    text = "; ".join(piece for piece in pieces if piece)
    return text[:1].upper() + text[1:] if text else "no hypothesis"


# --------------------------------------------------------------------------------------------------
# Freeze
# --------------------------------------------------------------------------------------------------


def _stroke_record(stroke: Stroke) -> dict:
    record = {"ink": [], "no_ink": []}
    for place, weight in zip(stroke.places, stroke.weights, strict=True):
        entry = {**place._asdict(), "weight": weight, "words": place.words()}
        record["ink" if weight > 0 else "no_ink"].append(entry)
    return record


def hypothesis_record(h: Hypothesis) -> dict:
    """A claim as JSON has it."""
    return {
        "feature": h.feature,
        "statement": statement(h),
        "class": {"labels": list(h.labels)} if h.labels else None,
        "stroke": _stroke_record(h.stroke) if h.stroke else None,
        "effect": h.effect._asdict() if h.effect else None,
        "label_weight": h.label_weight,
        "typical_activation": h.typical_activation,
        "label_histogram": list(h.label_histogram),
        "n_images": h.n_images,
        "why_not": h.why_not,
    }


def _stroke_of(record: dict) -> Stroke:
    entries = record["ink"] + record["no_ink"]
    places = [Place(*(entry[name] for name in Place._fields)) for entry in entries]
    return Stroke(tuple(places), tuple(entry["weight"] for entry in entries))


def _hypothesis_of(record: dict) -> Hypothesis:
    return Hypothesis(
        feature=record["feature"],
        labels=tuple(record["class"]["labels"]) if record["class"] else None,
        stroke=_stroke_of(record["stroke"]) if record["stroke"] else None,
        effect=Effect(**record["effect"]) if record["effect"] else None,
        label_weight=record["label_weight"],
        typical_activation=record["typical_activation"],
        label_histogram=tuple(record["label_histogram"]),
        n_images=record["n_images"],
        why_not=record["why_not"],
    )


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """Write claims and the rule that will judge them; returns the SHA-256 of the file."""
    frozen = {
        "rule": (rule or Rule())._asdict(),
        "hypotheses": [hypothesis_record(h) for h in hypotheses],
    }
    content = (json.dumps(frozen, indent=1, allow_nan=False) + "\n").encode()
    fa.write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def read_hypotheses(path: str | Path, sha256: str) -> tuple[list[Hypothesis], Rule]:
    """What `freeze_hypotheses` wrote.

    Raises ValueError with both hashes when it is not the file of that SHA-256.
    """
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} was changed after it was frozen: its SHA-256 is {found}, recorded was {sha256}"
        )
    frozen = json.loads(content)
    return [_hypothesis_of(record) for record in frozen["hypotheses"]], Rule(**frozen["rule"])
