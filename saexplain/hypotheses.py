"""What may each feature mean? Hypotheses about ink, labels and logits, proposed and frozen.

    hypotheses = propose_hypotheses(layer, layer.splits["val"])      # one for each feature
    sha256 = freeze_hypotheses(hypotheses, "hypotheses.json")        # before any test image is read
    hypotheses, rule = read_hypotheses("hypotheses.json", sha256)    # raises if the file was edited

Takes an `ExplainedLayer` and the activations of its discovery images; gives a `Hypothesis` for each
feature and writes them. It tests nothing: `evaluation` does that, on other images, and this module
must not import it.

Key: N discovery images, C classes, d_sae features, K features at hand, W words, M places.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, Removals, check_activity, collect_activity, removal_effects
from saexplain.captions import caption
from saexplain.edits import EditableImages, Editor, evenly_spaced
from saexplain.statistics import ranks_of
from saexplain.strokes import (
    CELLS,
    IMAGES_AT_ONCE,
    Place,
    Strokes,
    Word,
    number_of,
    place_inks,
    vocabulary,
    why_no_strokes,
    why_unlike_strokes,
    word_inks,
    word_vocabulary,
)

PARTS = ("ink", "class", "effect")


class Rule(NamedTuple):
    """The thresholds of the tests, frozen together with the hypotheses."""

    class_auroc: float = 0.65  # smallest AUROC with which the labels must predict activity ...
    ink_auroc: float = 0.75  # ... and the ink ...
    both_auroc: float = 0.85  # ... and the hypothesis as a whole
    edit_difference: float = 0.25  # share of images changed by the named edit, less that elsewhere
    effect_size: float = 0.5  # smallest share of a predicted change of a logit that must be found
    percentile: float = 0.95  # of random directions of the same norm, which an effect must exceed
    min_active: int = 8  # active, and inactive, images below which nothing is proposed or tested
    false_discovery_rate: float = 0.01  # of all tests of all features together


class Effect(NamedTuple):
    """The logits that the feature raises and lowers most, and by how much on average: what a raised
    logit loses when the feature is removed. None for a logit: no hypothesis."""

    raises: int | None
    raised_by: float
    lowers: int | None
    lowered_by: float


class Hypothesis(NamedTuple):
    """What a feature may mean. A part that predicts nothing is empty; `skip_reasons` says why."""

    feature: int
    typical_activation: float  # mean over the active images
    label_histogram: tuple[int, ...]  # active discovery images by label
    n_images: int  # discovery images
    influence: float  # share of the logit effect of all single ablations
    changes: float  # share of the active images whose prediction changes without the feature
    skip_reasons: dict[str, str]  # of parts
    ink: Strokes = Strokes()  # words
    enriched: tuple[int, ...] = ()  # labels with a larger share of the active images than of all
    depleted: tuple[int, ...] = ()  # labels with hardly any active image
    label_scores: tuple[float, ...] = ()  # (C,) what each label adds to the score
    effect: Effect | None = None
    threshold: float | None = None  # score from which on an image is predicted to be active
    drawing: Strokes = Strokes()  # places; not a part of the caption
    classes: tuple[str, ...] = ()  # names of labels and logits; empty: their numbers

    @property
    def n_active(self) -> int:
        return sum(self.label_histogram)

    def proposes(self, part: str) -> bool:
        """Whether a part of PARTS predicts something."""
        if part == "ink":
            return any(self.ink)
        return bool(self.enriched or self.depleted) if part == "class" else self.effect is not None

    @property
    def parts(self) -> list[str]:
        """Those of PARTS that predict something."""
        return [part for part in PARTS if self.proposes(part)]

    @property
    def claims_no_effect(self) -> bool:
        """Whether it predicts that removing the feature changes few predictions."""
        return self.effect is None and self.changes < CLAIM_NO_EFFECT_BELOW and bool(self.parts)

    def drop(self, part: str, reason: str) -> Hypothesis:
        """The hypothesis without a part."""
        empty = {
            "ink": {"ink": Strokes()},
            "class": {"enriched": (), "depleted": (), "label_scores": ()},
            "effect": {"effect": None},
        }
        return self._replace(**empty[part], skip_reasons={**self.skip_reasons, part: reason})


# --------------------------------------------------------------------------------------------------
# Scores: how a hypothesis predicts where its feature is active
# --------------------------------------------------------------------------------------------------


def strokes_score(strokes: Strokes, inks: Tensor) -> Tensor:
    """(N,) sum of the inks of strokes that are there, less those of absent ones, all with weight 1;
    inks (W or M, N) are those of `word_inks` or `place_inks`."""
    score = torch.zeros(inks.shape[1], dtype=inks.dtype)
    for stroke in strokes.there:
        score += inks[number_of(stroke)]
    for stroke in strokes.absent:
        score -= inks[number_of(stroke)]
    return score


def part_scores(h: Hypothesis, inks: Tensor | None, labels: Tensor) -> dict[str, np.ndarray]:
    """(N,) each, the scores that predict activity: "ink", "class" and their sum "both".

    inks (W, N) are those of `word_inks`, labels (N,). Of a hypothesis with one of the two parts,
    "both" is that part's array; one with neither has no scores.
    """
    scores = {}
    if h.proposes("ink"):
        scores["ink"] = strokes_score(h.ink, inks).numpy()
    if h.proposes("class"):
        scores["class"] = torch.tensor(h.label_scores, dtype=torch.float32)[labels].numpy()
    if len(scores) == 2:
        scores["both"] = scores["ink"] + scores["class"]
    elif scores:
        scores["both"] = next(iter(scores.values()))
    return scores


def drawing_score(h: Hypothesis, inks: Tensor, labels: Tensor) -> np.ndarray:
    """(N,) the score with the drawing in place of the words; inks (M, N) are those of
    `place_inks`."""
    score = strokes_score(h.drawing, inks)
    if h.proposes("class"):
        score += torch.tensor(h.label_scores, dtype=torch.float32)[labels]
    return score.numpy()


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------

MAX_LABELS = 2  # named as enriched, and as depleted
ENRICHED, DEPLETED = 1.5, 0.25  # times a label's share of all images, at least, and at most


def label_histograms(activity: Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the active images of each feature by label."""
    d_sae = len(activity.n_active)
    cell = activity.feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def _name_labels(histogram: np.ndarray, label_counts: np.ndarray) -> dict[str, tuple]:
    """The enriched and depleted labels, and what each label adds to the score.

    Enriched are at most MAX_LABELS of the labels whose share of the active images is ENRICHED times
    their share of all; only where there is none, labels are named as depleted. A label's score is
    the square root of its rate of active images under this hypothesis, in units of the highest.
    """
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    lift = share / np.maximum(usual, 1e-9)
    most = np.argsort(-share, kind="stable").tolist()
    enriched = [c for c in most if share[c] > 0 and lift[c] >= ENRICHED][:MAX_LABELS]
    least = np.argsort(lift, kind="stable").tolist()
    depleted = [c for c in least if usual[c] > 0 and lift[c] <= DEPLETED][:MAX_LABELS]
    rate = np.ones(len(share))
    if enriched:
        depleted = []
        # All other labels get the same rate: the hypothesis does not distinguish them.
        rate[:] = (1 - share[enriched].sum()) / max(1 - usual[enriched].sum(), 1e-9)
        rate[enriched] = lift[enriched]
    rate[depleted] = 0
    scores = np.sqrt(rate / rate.max()).astype(np.float32).tolist()
    return {"enriched": tuple(enriched), "depleted": tuple(depleted), "label_scores": tuple(scores)}


def _class_auroc(h: Hypothesis, label_counts: np.ndarray) -> float:
    """AUROC of the labels' scores on the discovery images, from their counts (C,)."""
    active, scores = np.array(h.label_histogram), np.array(h.label_scores)
    higher = np.sign(scores[:, None] - scores) / 2 + 0.5  # (C, C), one half where equal
    others = label_counts - active
    return float(active @ higher @ others / (active.sum() * others.sum()))


def _low_auroc(auroc: float, bar: float) -> str:
    return f"AUROC {auroc:.3f} on the discovery images, below {bar}"


def _propose_labels(h: Hypothesis, label_counts: np.ndarray, rule: Rule) -> Hypothesis:
    """The hypothesis with its labels, where they predict activity well enough."""
    named = _name_labels(np.array(h.label_histogram), label_counts)
    if not named["enriched"] and not named["depleted"]:
        reason = f"no label is {ENRICHED} times as frequent as in all images, none {DEPLETED} times"
        return h.drop("class", reason)
    h = h._replace(**named)
    auroc = _class_auroc(h, label_counts)
    return h if auroc >= rule.class_auroc else h.drop("class", _low_auroc(auroc, rule.class_auroc))


# --------------------------------------------------------------------------------------------------
# Ink: strokes, one by one, while each adds to the prediction
# --------------------------------------------------------------------------------------------------

MAX_WORDS, MAX_PLACES = (3, 1), (3, 3)  # at most so many strokes there, and absent
MIN_GAIN = 1.03  # factor by which a further stroke must raise the squared correlation
PATTERN_IMAGES = 32  # over which input patterns are averaged; any, for a model linear in the pixels
N_CLAUSE = 24  # images on which a single word is edited
MAX_ROUNDS = 3  # of choosing words, each without those whose edit had no effect
MIN_WORD_EFFECT = 0.2  # of its edit, beyond the edit elsewhere, see `word_effects`


class _Moments(NamedTuple):
    """Second moments over images of inks, of activity (0 or 1) and of the labels' scores."""

    words: Tensor  # (W, W)
    activity: Tensor  # (K, W) with the words
    labels: Tensor  # (K, W) with the words
    label_activity: Tensor  # (K,)
    label_variance: Tensor  # (K,)

    def of(self, features: Tensor) -> _Moments:
        return _Moments(self.words, *(of_all[features] for of_all in self[1:]))


def _compute_moments(inks: Tensor, activity: Activity, label_score: Tensor) -> _Moments:
    """The moments of inks (W, N) and of the labels' scores for each feature, (d_sae, C)."""
    n, n_classes = inks.shape[1], label_score.shape[1]
    mean = inks.mean(1, dtype=torch.float64)
    words = torch.zeros(len(inks), len(inks), dtype=torch.float64)
    for some in inks.split(IMAGES_AT_ONCE, dim=1):
        words += some @ some.T
    words = words / n - torch.outer(mean, mean)

    share = activity.n_active.double() / n
    # Sums over the active images of each feature, without a dense (d_sae, N) matrix.
    sums = torch.nn.functional.embedding_bag(
        activity.image, inks.T.contiguous(), activity.start[:-1], mode="sum"
    )
    with_activity = sums.double() / n - share[:, None] * mean

    one_hot = torch.nn.functional.one_hot(activity.labels, n_classes).float()
    frequency = one_hot.mean(0, dtype=torch.float64)
    of_label = (inks @ one_hot).double().T / n - frequency[:, None] * mean  # (C, W)
    score = label_score.double()
    active = label_histograms(activity, n_classes) / n
    centered = torch.from_numpy(active) - share[:, None] * frequency
    variance = (score**2 @ frequency) - (score @ frequency) ** 2
    return _Moments(words, with_activity, score @ of_label, (score * centered).sum(1), variance)


def _moments_of_score(chosen: Tensor, m: _Moments) -> tuple[Tensor, Tensor]:
    """(K,) each: the score's covariance with activity, and its variance; the score is that of the
    labels and of the words chosen (K, W) in -1, 0, 1."""
    with_activity = m.label_activity + (chosen * m.activity).sum(1)
    variance = m.label_variance + (chosen * (2 * m.labels + chosen @ m.words)).sum(1)
    return with_activity, variance


def _squared_correlation(covariance: Tensor, variance: Tensor) -> Tensor:
    """The squared correlation in units of the variance of activity, with the correlation's sign."""
    return covariance * covariance.abs() / variance.clamp(min=1e-12)


def _same_cell(strokes: Sequence[Word | Place]) -> Tensor | None:
    """(W, W) float64, 1 where two words have the same cell, which a caption need not name twice;
    None for places."""
    if isinstance(strokes[0], Place):
        return None
    cell = torch.tensor([word.row * CELLS + word.col for word in strokes])
    return (cell[:, None] == cell).double()


def _best_addition(
    chosen: Tensor, m: _Moments, allowed: Tensor, most: tuple[int, int], alike: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The squared correlation with the best further stroke, and its number, (K,) each.

    allowed (K, W) is 1 where a stroke may be there, -1 where it may be absent; alike (W, W) is 1
    for two strokes of which one of the same sign is enough (None: only for a stroke itself).
    """
    with_activity, variance = _moments_of_score(chosen, m)
    with_words = m.labels + chosen @ m.words
    excluded = allowed * m.activity <= 0
    for sign, limit in zip((1, -1), most, strict=True):
        of_sign = chosen == sign
        full = of_sign.sum(1, keepdim=True) >= limit
        named = of_sign if alike is None else of_sign.double() @ alike > 0
        excluded |= (named | full) & (allowed == sign)
    covariance = with_activity[:, None] + allowed * m.activity
    variance = variance[:, None] + 2 * allowed * with_words + m.words.diagonal()
    gain = _squared_correlation(covariance, variance)
    return gain.masked_fill(excluded, -1.0).max(1)


def _choose_strokes(
    m: _Moments, allowed: Tensor, most: tuple[int, int], strokes: Sequence[Word | Place]
) -> list[Strokes]:
    """The strokes that together with the labels predict each feature best, chosen greedily.

    Strokes are added while one raises the squared correlation by MIN_GAIN; after each addition
    every earlier one is replaced where another is better. allowed (K, W): see `_best_addition`.
    """
    n_features, n_strokes = allowed.shape
    chosen = torch.zeros_like(allowed)
    order = torch.full((n_features, sum(most)), n_strokes)  # n_strokes: none
    growing = torch.ones(n_features, dtype=torch.bool)
    alike = _same_cell(strokes)

    def put(rows: Tensor, at: int, stroke: Tensor) -> None:
        order[rows, at] = stroke[rows]
        chosen[rows, stroke[rows]] = allowed[rows, stroke[rows]]

    def correlation() -> Tensor:
        return _squared_correlation(*_moments_of_score(chosen, m))

    for n in range(sum(most)):
        found, stroke = _best_addition(chosen, m, allowed, most, alike)
        growing &= (found > 0) & (found > MIN_GAIN * correlation())
        rows = growing.nonzero()[:, 0]
        put(rows, n, stroke)
        for earlier in range(n):
            without = chosen.clone()
            without[rows, order[rows, earlier]] = 0
            found, stroke = _best_addition(without, m, allowed, most, alike)
            better = growing & (found > (1 + 1e-9) * correlation())  # never for rounding alone
            chosen[better] = without[better]
            put(better.nonzero()[:, 0], earlier, stroke)
    result = []
    for row, signs in zip(order.tolist(), chosen, strict=True):
        used = [n for n in row if n < n_strokes]
        there = tuple(strokes[n] for n in used if signs[n] > 0)
        result.append(Strokes(there, tuple(strokes[n] for n in used if signs[n] < 0)))
    return result


def _pattern_signs(heats: Tensor) -> tuple[Tensor, Tensor]:
    """(d_sae, M) and (d_sae, W) float64, 1 where ink in a place, or in those of a word, raises the
    feature on average, -1 where it lowers it; heats (d_sae, 784) are input patterns.

    So a named stroke is a cause of the activity and not only correlated with it.
    """
    v = vocabulary()
    of_places = heats @ (v.masks / v.masks.sum(1, keepdim=True)).T
    pairs = itertools.pairwise(v.start)
    of_words = torch.stack([of_places[:, first:last].mean(1) for first, last in pairs], 1)
    return torch.sign(of_places).double(), torch.sign(of_words).double()


@torch.no_grad()
def word_effects(
    ink: Strokes,
    new: Strokes,
    k: int,
    layer: fa.ExplainedLayer,
    images: EditableImages,
    activity: Activity,
) -> dict[Word, float]:
    """The effect of editing each of the `new` words on images that activate feature k, beyond that
    of an edit elsewhere.

    A word that is there is erased, but for what earlier words of `ink` share with it: the effect is
    the lost share of the activation. An absent word is painted: the effect is the share of images
    on which the feature becomes inactive.
    """
    at, acts = activity.of(k)
    editor = Editor(ink, images, k)
    chosen = evenly_spaced(torch.arange(len(at)), N_CLAUSE)
    x, before = images.pixels.index_select(0, at[chosen]), acts[chosen]
    pairs = []
    for word in new.there:
        pairs.append(editor.erase(x, [word], spared=ink.there[: ink.there.index(word)]))
    pairs += [editor.paint(x, [word]) for word in new.absent]
    edited = torch.cat([side for pair in pairs for side in pair])
    after = images.feature_acts(layer, edited, k).view(len(pairs), 2, -1)
    kept = (after / before).clamp(max=2).mean(2)  # clamped so that no single image decides
    active = (after > 0).float().mean(2)
    n = len(new.there)
    left = torch.cat([kept[:n], active[n:]])
    return dict(zip((*new.there, *new.absent), (left[:, 1] - left[:, 0]).tolist(), strict=True))


def _choose_words(
    hypotheses: list[Hypothesis],
    moments: _Moments,
    allowed: Tensor,
    layer: fa.ExplainedLayer,
    images: EditableImages,
    activity: Activity,
) -> list[Hypothesis]:
    """The hypotheses with words for ink, each of which adds to the prediction and has an effect.

    A word whose edit has too little effect is excluded and the choice repeated, MAX_ROUNDS times at
    most. allowed (d_sae, W), see `_best_addition`, is changed.
    """
    found, words = list(hypotheses), word_vocabulary()
    kept: list[set[Word]] = [set() for _ in found]  # words whose edit is known to have an effect
    choosing = [k for k, h in enumerate(found) if "ink" not in h.skip_reasons]
    for _ in range(MAX_ROUNDS):
        some = torch.tensor(choosing, dtype=torch.int64)
        chosen = _choose_strokes(moments.of(some), allowed[some], MAX_WORDS, words)
        again = []
        for k, ink in zip(choosing, chosen, strict=True):
            new = Strokes(*(tuple(w for w in part if w not in kept[k]) for part in ink))
            idle = set()
            if any(new):
                effects = word_effects(ink, new, k, layer, images, activity)
                idle = {word for word, by in effects.items() if by < MIN_WORD_EFFECT}
                kept[k] |= effects.keys() - idle
            active = Strokes(*(tuple(w for w in part if w not in idle) for part in ink))
            found[k] = found[k]._replace(ink=active)
            if idle:
                allowed[k, [number_of(word) for word in idle]] = 0
                again.append(k)
        choosing = again
    return found


def _propose_ink(
    hypotheses: list[Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    inks: Tensor,
    of_places: Tensor | None,
    activity: Activity,
) -> list[Hypothesis]:
    """The hypotheses with words, by inks (W, N), and with drawings where of_places (M, N) is given.

    Raises ValueError where no gradient leads from the layer to the pixels.
    """
    shown = evenly_spaced(torch.arange(len(images)), PATTERN_IMAGES).to(images.device)
    given = (layer.model, layer.sae, layer.mu, layer.std, images[shown])
    heats = fa.feature_input_patterns(*given).cpu().flatten(1)
    place_signs, word_signs = _pattern_signs(heats)
    n_classes = len(hypotheses[0].label_histogram)
    scores = [h.label_scores or (0.0,) * n_classes for h in hypotheses]
    scores = torch.tensor(scores, dtype=torch.float32)
    moments = _compute_moments(inks, activity, scores)
    editable = EditableImages.of(images, seed=DIRECTIONS_SEED)
    hypotheses = _choose_words(hypotheses, moments, word_signs, layer, editable, activity)
    if of_places is None:
        return hypotheses
    moments = _compute_moments(of_places, activity, scores)
    drawings = _choose_strokes(moments, place_signs, MAX_PLACES, vocabulary().places)
    return [h._replace(drawing=d) for h, d in zip(hypotheses, drawings, strict=True)]


# --------------------------------------------------------------------------------------------------
# Effects: larger than those of random directions of the same norm
# --------------------------------------------------------------------------------------------------

N_DIRECTIONS = 128  # the same ones for all features
DIRECTIONS_SEED = 20_000_003  # no run's own: baselines must draw other directions
DIRECTION_IMAGES = 16  # from which random directions are removed
NO_EFFECT_CHANGES = 0.05  # largest share of changed predictions that counts as little effect ...
CLAIM_NO_EFFECT_BELOW = 0.01  # ... and the share below which little effect is proposed
EFFECT_MARGIN = 1.25  # times a random direction's effect that is needed to propose one
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth a hypothesis


@functools.cache
def random_directions(d_in: int) -> Tensor:
    """(N_DIRECTIONS, d_in) unit vectors drawn at random, the same in every run."""
    generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
    noise = torch.randn(N_DIRECTIONS, d_in, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(noise, dim=1)


@torch.no_grad()
def null_effect(
    k: int, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor, percentile: float
) -> dict[str, float]:
    """The mean change of a logit that a `percentile` of random directions does not exceed, when
    they are removed in place of feature k: for the logit that each "raises", and "lowers", most.

    raw (n, d_in) are outputs of the layer on images that activate the feature by acts (n,). Each
    direction has the feature's norm and may choose its logits, as the feature does.
    """
    some = evenly_spaced(torch.arange(len(raw)), DIRECTION_IMAGES).to(raw.device)
    raw, acts = raw[some], acts[some]
    norm = float(layer.sae.W_dec[k].norm())
    shifts = random_directions(raw.shape[1]).to(raw) * norm * layer.std
    states = raw - acts[:, None] * shifts[:, None]  # (N_DIRECTIONS, n, d_in)
    base, without = layer.logits(raw), layer.logits(states.flatten(0, 1))
    falls = (base - without.view(*states.shape[:2], -1)).cpu().double().numpy()
    mean = falls.mean(1)  # (N_DIRECTIONS, C)
    largest = {"raises": mean.max(1), "lowers": -mean.min(1)}
    return {verb: float(np.quantile(by, percentile)) for verb, by in largest.items()}


def _propose_effect(
    h: Hypothesis,
    delta: Tensor,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: Activity,
    rule: Rule,
) -> Hypothesis:
    """The hypothesis with the logits that change most, by delta (C,), when the feature is removed
    from raw (N, d_in), where they change by more than random directions change a logit."""
    raises, lowers = int(delta.argmin()), int(delta.argmax())
    changes = {"raises": -float(delta[raises]), "lowers": float(delta[lowers])}
    if max(changes.values()) < SMALLEST_EFFECT:
        return h.drop("effect", f"removing it changes no logit by {SMALLEST_EFFECT} on average")
    at, acts = activity.of(h.feature)
    chosen = evenly_spaced(torch.arange(len(at)), DIRECTION_IMAGES)
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    null = null_effect(h.feature, layer, rows, acts, rule.percentile)
    up, down = (
        by >= SMALLEST_EFFECT and by > EFFECT_MARGIN * null[verb] for verb, by in changes.items()
    )
    if not (up or down):
        share = f"{rule.percentile:.0%}"
        return h.drop("effect", f"no logit changes by more than {share} of random directions do")
    raised = (raises, changes["raises"]) if up else (None, 0.0)
    lowered = (lowers, changes["lowers"]) if down else (None, 0.0)
    return h._replace(effect=Effect(*raised, *lowered))


# --------------------------------------------------------------------------------------------------
# A hypothesis for every feature
# --------------------------------------------------------------------------------------------------


def best_threshold(score: np.ndarray, at: np.ndarray) -> float:
    """The threshold on scores (N,) with the largest F1, the harmonic mean of precision and recall,
    when the images `at` (m,) are the active ones."""
    order = np.argsort(-score, kind="stable")
    active = np.zeros(len(score), dtype=bool)
    active[at] = True
    hits = active[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + len(at))
    ranked = score[order]
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    return float(ranked[np.where(last_of_ties, f1, -1).argmax()])


def _drop_weak_parts(h: Hypothesis, inks: Tensor, activity: Activity, rule: Rule) -> Hypothesis:
    """The hypothesis without ink that predicts too little, without labels that add nothing to the
    ink, and with its threshold."""
    if all(part in h.skip_reasons for part in PARTS):
        return h
    at = activity.of(h.feature)[0].numpy()
    scores = part_scores(h, inks, activity.labels)
    auroc = {part: ranks_of(score, at).auroc for part, score in scores.items() if part != "class"}
    if "ink" not in scores:
        h = h if "ink" in h.skip_reasons else h.drop("ink", "no ink predicts and changes it")
    elif auroc["ink"] < rule.ink_auroc:
        h = h.drop("ink", _low_auroc(auroc["ink"], rule.ink_auroc))
    elif "class" in scores and auroc["both"] <= auroc["ink"]:
        h = h.drop("class", "labels add nothing to the prediction by ink")
    scores = part_scores(h, inks, activity.labels)
    return h._replace(threshold=best_threshold(scores["both"], at)) if scores else h


def propose_hypotheses(
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    rule: Rule | None = None,
    drawings: bool = True,
    activity: Activity | None = None,
    removed: Removals | None = None,
    strokes: bool = True,
    classes: Sequence[str] = (),
) -> list[Hypothesis]:
    """A hypothesis about every feature, from the discovery images of `split` alone.

    class   the labels of most of its active images, or those with hardly any
    ink     up to three words for ink that is there and one for absent ink (MAX_WORDS): those that
            together with the labels predict activity best and whose edit changes the feature
    effect  the logits that fall and rise most without it, where they change by more than random
            directions of the same norm change a logit

    A part that does not reach the rule's bar on these images is not proposed; `skip_reasons` says
    why.

    Args:
        drawings: also give each hypothesis a drawing of exact places.
        activity, removed: of the same images, by `collect_activity` and `removal_effects`, where
            they are at hand.
        strokes: name ink, where images are pen strokes on a blank ground of 28 x 28 pixels.
        classes: names of the labels; empty: their numbers.

    Raises ValueError for labels that the model does not know, an activity of other images, and
    where ink is to be named but no gradient leads from the layer to the pixels.
    """
    rule = rule or Rule()
    images, labels, raw = split
    activity = activity or collect_activity(layer, raw, labels)
    check_activity(activity, layer, raw)
    removed = removed or removal_effects(layer, raw, activity)
    n_classes = removed.mean_delta.shape[1]
    histograms = label_histograms(activity, n_classes)
    label_counts = torch.bincount(activity.labels, minlength=n_classes).numpy()
    hypotheses = []
    for k in range(layer.d_sae):
        _, acts = activity.of(k)
        h = Hypothesis(
            feature=k,
            typical_activation=float(acts.mean()) if len(acts) else 0.0,
            label_histogram=tuple(histograms[k].tolist()),
            n_images=len(activity.labels),
            influence=float(removed.influence[k]),
            changes=float(removed.changes[k]),
            skip_reasons={},
            classes=tuple(classes),
        )
        if rule.min_active <= h.n_active <= len(images) - rule.min_active:
            h = _propose_labels(h, label_counts, rule)
            h = _propose_effect(h, removed.mean_delta[k], layer, raw, activity, rule)
        else:
            found = f"active on {h.n_active} of {len(images)} images"
            reason = f"{found}; {rule.min_active} active and as many inactive ones are needed"
            h = h._replace(skip_reasons=dict.fromkeys(PARTS, reason))
        hypotheses.append(h)

    reason = "strokes are switched off"
    if strokes:
        reason = why_no_strokes(images) or why_unlike_strokes(images)
    inks = torch.empty(0, len(images), dtype=torch.float32)
    if reason:
        hypotheses = [h.drop("ink", h.skip_reasons.get("ink", reason)) for h in hypotheses]
    else:
        of_places = place_inks(images)
        inks = word_inks(of_places)
        drawn = of_places if drawings else None
        hypotheses = _propose_ink(hypotheses, layer, images, inks, drawn, activity)
    return [_drop_weak_parts(h, inks, activity, rule) for h in hypotheses]


# --------------------------------------------------------------------------------------------------
# Freeze
# --------------------------------------------------------------------------------------------------

DIGEST = re.compile(rb'\A{\n "sha256": "(\w{64})",\n')  # the first two lines of a frozen file


def _strokes_record(strokes: Strokes) -> dict:
    record = {}
    for name, some in strokes._asdict().items():
        record[name] = [s._asdict() for s in some]
        for entry, stroke in zip(record[name], some, strict=True):
            if isinstance(stroke, Word):
                entry["words"] = stroke.words()
    return record


def hypothesis_record(h: Hypothesis) -> dict:
    """The hypothesis as a JSON object; the names of the classes, the same for all, are left out."""
    record = {"caption": caption(h), **h._asdict()}
    record |= {"ink": _strokes_record(h.ink), "drawing": _strokes_record(h.drawing)}
    record["effect"] = h.effect._asdict() if h.effect else None
    del record["classes"]
    return record


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """The SHA-256 of the hypotheses and the rule by which they will be tested, which are written.

    The file's second line holds the digest of the file without this line, so that both are written
    in one step (`sed 2d FILE | sha256sum` computes it).
    """
    frozen = {
        "rule": (rule or Rule())._asdict(),
        "classes": list(hypotheses[0].classes) if hypotheses else [],
        "hypotheses": [hypothesis_record(h) for h in hypotheses],
    }
    content = (json.dumps(frozen, indent=1, allow_nan=False) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    signed = content.replace(b"{\n", f'{{\n "sha256": "{digest}",\n'.encode(), 1)
    fa.write_whole(path, signed)
    return digest


def read_hypotheses(path: str | Path, sha256: str | None = None) -> tuple[list[Hypothesis], Rule]:
    """The hypotheses and the rule that `freeze_hypotheses` wrote.

    Raises ValueError with both hashes when the content differs from the hash in the file, or from
    `sha256`.
    """
    content = Path(path).read_bytes()
    named = DIGEST.match(content)
    frozen = b"{\n" + content[named.end() :] if named else content
    found = hashlib.sha256(frozen).hexdigest()
    inside = named[1].decode() if named else "nowhere"
    for recorded in (inside, sha256 or inside):
        if recorded != found:
            raise ValueError(
                f"{path} was changed after it was frozen: its SHA-256 is {found}, recorded was "
                f"{recorded}"
            )
    record = json.loads(frozen)
    classes = tuple(record["classes"])
    return [_from_record(r, classes) for r in record["hypotheses"]], Rule(**record["rule"])


def _from_record(record: dict, classes: tuple[str, ...]) -> Hypothesis:
    """The hypothesis of a `hypothesis_record`."""
    fields = {name: record[name] for name in Hypothesis._fields if name != "classes"}
    for name in ("ink", "drawing"):
        kinds = (record[name]["there"], record[name]["absent"])
        fields[name] = Strokes(*(tuple(map(_stroke_from, entries)) for entries in kinds))
    for name in ("enriched", "depleted", "label_scores", "label_histogram"):
        fields[name] = tuple(record[name])
    if record["effect"]:
        fields["effect"] = Effect(**record["effect"])
    return Hypothesis(**fields, classes=classes)


def _stroke_from(entry: dict) -> Word | Place:
    kind = Word if "long" in entry else Place
    return kind(*(entry[name] for name in kind._fields))
