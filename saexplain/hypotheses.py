"""TODO"""

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
from saexplain.edits import Editable, Editor, spread
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

# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------

PARTS = ("ink", "class", "effect")


class Rule(NamedTuple):
    """The thresholds by which claims are judged; they are frozen together with them."""

    class_auroc: float = 0.65  # smallest AUROC with which the labels must predict activity ...
    ink_auroc: float = 0.75  # ... and the ink ...
    both_auroc: float = 0.85  # ... and the sentence as a whole
    edit_difference: float = 0.25  # share of images changed as named, less that changed elsewhere
    effect_size: float = 0.5  # smallest share of a predicted change of a logit that must be found
    percentile: float = 0.95  # of directions of the same norm, which an effect must exceed
    min_active: int = 8  # active images, and silent ones, below which nothing is claimed or judged
    false_discovery_rate: float = 0.01  # of all tests of all features together


class Effect(NamedTuple):
    """The logits that fall and rise most when the feature is removed from the images that fire it,
    and by how much; what it raises falls without it. None: no claim."""

    raises: int | None
    raised_by: float
    lowers: int | None
    lowered_by: float


class Hypothesis(NamedTuple):
    """What a feature is claimed to mean. A part that claims nothing is empty; `skip_reasons` says
    why."""

    feature: int
    ink: Strokes  # words
    enriched: tuple[int, ...]  # labels that make up more of what fires it than of all images
    depleted: tuple[int, ...]  # labels that hardly do
    label_scores: tuple[float, ...]  # (C,) what each label adds to the score
    effect: Effect | None
    threshold: float | None  # an image scored so high is said to fire it
    drawing: Strokes  # places; not a part of the sentence
    typical_activation: float  # mean where it is active
    label_histogram: tuple[int, ...]  # active discovery images by label
    n_images: int  # discovery images
    influence: float  # its share of all that removing single features does to the logits
    changes: float  # share of the images that fire it whose prediction changes without it
    skip_reasons: dict[str, str]
    classes: tuple[str, ...] = ()  # what labels and logits are called; empty: by their numbers

    @property
    def n_active(self) -> int:
        return sum(self.label_histogram)

    def proposes(self, part: str) -> bool:
        if part == "ink":
            return any(self.ink)
        return bool(self.enriched or self.depleted) if part == "class" else self.effect is not None

    @property
    def parts(self) -> list[str]:
        """Those of PARTS that claim something."""
        return [part for part in PARTS if self.proposes(part)]

    @property
    def claims_no_effect(self) -> bool:
        """Whether the sentence says that removing the feature changes little."""
        return self.effect is None and self.changes < CLAIM_NO_EFFECT_BELOW and bool(self.parts)

    def drops(self, part: str, why: str) -> Hypothesis:
        """Without a part."""
        empty = {
            "ink": {"ink": Strokes()},
            "class": {"enriched": (), "depleted": (), "label_scores": ()},
            "effect": {"effect": None},
        }
        return self._replace(**empty[part], skip_reasons={**self.skip_reasons, part: why})


# --------------------------------------------------------------------------------------------------
# How a claim predicts where its feature is active
# --------------------------------------------------------------------------------------------------


def strokes_score(strokes: Strokes, inks: Tensor) -> Tensor:
    """(N,) the inks that are said to be there, less those that are said not to be; every one counts
    alike. inks (W or M, N) are those of `word_inks` or `place_inks`."""
    score = torch.zeros(inks.shape[1], dtype=inks.dtype)
    for stroke in strokes.there:
        score += inks[number_of(stroke)]
    for stroke in strokes.absent:
        score -= inks[number_of(stroke)]
    return score


def part_scores(h: Hypothesis, inks: Tensor | None, labels: Tensor) -> dict[str, np.ndarray]:
    """By how much each part of a claim predicts activity: "ink", "class", "both" -> (N,).

    `inks` (W, N) are those of `word_inks`, labels (N,). A claim of one part predicts by that part
    alone, and "both", otherwise their sum, is the very same array. One without an ink or class part
    has no scores.
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
    """(N,) the same for the drawing in place of the words; inks (M, N) are those of
    `place_inks`."""
    score = strokes_score(h.drawing, inks)
    if h.proposes("class"):
        score += torch.tensor(h.label_scores, dtype=torch.float32)[labels]
    return score.numpy()


# --------------------------------------------------------------------------------------------------
# Propose ink: strokes, one by one, while each adds to the prediction
# --------------------------------------------------------------------------------------------------

MAX_WORDS, MAX_PLACES = (3, 1), (3, 3)  # at most so many strokes with ink, and without
MOST_LABELS = 2  # said to be frequent, and as many said to be rare
ENRICHED, DEPLETED = 1.5, 0.25  # times a label's share of all images, at least, and at most
WORTH_A_CLAUSE = 1.03  # a further clause must raise the squared correlation by this factor
PATTERN_IMAGES = 32  # over which input patterns are averaged; any, for a model linear in the pixels
N_CLAUSE = 24  # images on which a clause is edited
CHOICES = 3  # of words, each without those whose edit moved nothing
CLAUSE_MOVES = 0.2  # what its edit must cost beyond an edit elsewhere, see `clause_moves`


def _name_labels(histogram: np.ndarray, label_counts: np.ndarray) -> dict[str, tuple]:
    """What is said about labels, and what each label adds to the score.

    Said are the labels that make up most of what fires the feature, MOST_LABELS of those whose
    share is OFTEN times their share of all images; where there is none, those whose share is
    HARDLY. The score of a label is the square root of how often its images fire the feature
    according to what is said, in units of the highest: the labels named by their share, the
    others alike by what is left.
    """
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    lift = share / np.maximum(usual, 1e-9)
    most = np.argsort(-share, kind="stable").tolist()
    enriched = [c for c in most if share[c] > 0 and lift[c] >= ENRICHED][:MOST_LABELS]
    least = np.argsort(lift, kind="stable").tolist()
    depleted = [c for c in least if usual[c] > 0 and lift[c] <= DEPLETED][:MOST_LABELS]
    rate = np.ones(len(share))
    if enriched:
        depleted = []
        rate[:] = (1 - share[enriched].sum()) / max(1 - usual[enriched].sum(), 1e-9)
        rate[enriched] = lift[enriched]
    rate[depleted] = 0
    scores = np.sqrt(rate / rate.max()).astype(np.float32).tolist()
    return {"enriched": tuple(enriched), "depleted": tuple(depleted), "label_scores": tuple(scores)}


def _class_auroc(h: Hypothesis, label_counts: np.ndarray) -> float:
    """AUROC of the labels' scores on the discovery images, from their counts."""
    active, scores = np.array(h.label_histogram), np.array(h.label_scores)
    higher = np.sign(scores[:, None] - scores) / 2 + 0.5  # (C, C), one half where equal
    others = label_counts - active
    return float(active @ higher @ others / (active.sum() * others.sum()))


class _Moments(NamedTuple):
    """Second moments over images of inks, of activity (0 or 1) and of the labels' scores."""

    words: Tensor  # (W, W)
    activity: Tensor  # (K, W) with the words
    labels: Tensor  # (K, W) with the words
    label_activity: Tensor  # (K,)
    label_variance: Tensor  # (K,)

    def of(self, features: Tensor) -> _Moments:
        return _Moments(self.words, *(of_all[features] for of_all in self[1:]))


def _moments(inks: Tensor, activity: Activity, label_score: Tensor) -> _Moments:
    """Of inks (W, N), and of the scores of each label for each feature, (d_sae, C)."""
    n, n_classes = inks.shape[1], label_score.shape[1]
    mean = inks.mean(1, dtype=torch.float64)
    words = torch.zeros(len(inks), len(inks), dtype=torch.float64)
    for some in inks.split(IMAGES_AT_ONCE, dim=1):
        words += some @ some.T
    words = words / n - torch.outer(mean, mean)

    share = activity.n_active.double() / n
    sums = torch.nn.functional.embedding_bag(
        activity.image, inks.T.contiguous(), activity.start[:-1], mode="sum"
    )
    with_activity = sums.double() / n - share[:, None] * mean

    one_hot = torch.nn.functional.one_hot(activity.labels, n_classes).float()
    frequency = one_hot.mean(0, dtype=torch.float64)
    of_label = (inks @ one_hot).double().T / n - frequency[:, None] * mean  # (C, W)
    score = label_score.double()
    active = label_histograms(activity, n_classes) / n
    centred = torch.from_numpy(active) - share[:, None] * frequency
    variance = (score**2 @ frequency) - (score @ frequency) ** 2
    return _Moments(words, with_activity, score @ of_label, (score * centred).sum(1), variance)


def _moments_of_score(chosen: Tensor, m: _Moments) -> tuple[Tensor, Tensor]:
    """(K,) each: the covariance with activity, and the variance, of the score: labels and the words
    chosen (K, W) in -1, 0, 1."""
    with_activity = m.label_activity + (chosen * m.activity).sum(1)
    variance = m.label_variance + (chosen * (2 * m.labels + chosen @ m.words)).sum(1)
    return with_activity, variance


def _squared_correlation(covariance: Tensor, variance: Tensor) -> Tensor:
    """In units of the variance of activity; negative where the correlation is."""
    return covariance * covariance.abs() / variance.clamp(min=1e-12)


def _same_cell(strokes: Sequence[Word | Place]) -> Tensor | None:
    """(W, W) float64, 1 where two words have the same cell, which a sentence need not name twice;
    None for places."""
    if isinstance(strokes[0], Place):
        return None
    cell = torch.tensor([word.row * CELLS + word.col for word in strokes])
    return (cell[:, None] == cell).double()


def _best_addition(
    chosen: Tensor, m: _Moments, allowed: Tensor, most: tuple[int, int], alike: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The squared correlation with the best further stroke, and its number, (K,) each. allowed
    (K, W) is 1 where a stroke may be there, -1 where it may be absent; alike (W, W) is 1 for two of
    the same sign of which one is enough."""
    with_activity, variance = _moments_of_score(chosen, m)
    with_words = m.labels + chosen @ m.words
    full_up = (chosen > 0).sum(1, keepdim=True) >= most[0]
    full_down = (chosen < 0).sum(1, keepdim=True) >= most[1]
    if alike is None:
        refused = chosen != 0
    else:
        refused = ((chosen > 0).double() @ alike > 0) & (allowed > 0)
        refused |= ((chosen < 0).double() @ alike > 0) & (allowed < 0)
    refused |= allowed * m.activity <= 0
    refused |= full_up & (allowed > 0) | full_down & (allowed < 0)
    covariance = with_activity[:, None] + allowed * m.activity
    variance = variance[:, None] + 2 * allowed * with_words + m.words.diagonal()
    gain = _squared_correlation(covariance, variance)
    return gain.masked_fill(refused, -1.0).max(1)


def _choose(
    m: _Moments, allowed: Tensor, most: tuple[int, int], strokes: Sequence[Word | Place]
) -> list[Strokes]:
    """The strokes that together with the labels predict each feature best, greedily: while a
    further one raises the squared correlation by WORTH_A_CLAUSE, and after each every earlier one
    may give way to a better one. No cell is named twice. allowed (K, W): see `_best_addition`."""
    n_features, n_strokes = allowed.shape
    chosen = torch.zeros_like(allowed)
    order = torch.full((n_features, sum(most)), n_strokes)
    growing = torch.ones(n_features, dtype=torch.bool)
    alike = _same_cell(strokes)

    def put(rows: Tensor, at: int, stroke: Tensor) -> None:
        order[rows, at] = stroke[rows]
        chosen[rows, stroke[rows]] = allowed[rows, stroke[rows]]

    def now() -> Tensor:
        return _squared_correlation(*_moments_of_score(chosen, m))

    for n in range(sum(most)):
        found, stroke = _best_addition(chosen, m, allowed, most, alike)
        growing &= (found > 0) & (found > WORTH_A_CLAUSE * now())
        put(growing.nonzero()[:, 0], n, stroke)
        for earlier in range(n):
            rows = growing.nonzero()[:, 0]
            without = chosen.clone()
            without[rows, order[rows, earlier]] = 0
            found, stroke = _best_addition(without, m, allowed, most, alike)
            better = growing & (found > (1 + 1e-9) * now())
            chosen[better] = without[better]
            put(better.nonzero()[:, 0], earlier, stroke)
    said = []
    for row, signs in zip(order.tolist(), chosen, strict=True):
        used = [n for n in row if n < n_strokes]
        there = tuple(strokes[n] for n in used if signs[n] > 0)
        said.append(Strokes(there, tuple(strokes[n] for n in used if signs[n] < 0)))
    return said


def _causal_signs(heats: Tensor) -> tuple[Tensor, Tensor]:
    """(d_sae, M) and (d_sae, W) float64, 1 where ink in a place, or in those of a word, raises the
    feature on average, -1 where it lowers it; heats (d_sae, 784) are input patterns. So what is
    named is a cause and not mere company."""
    v = vocabulary()
    of_places = heats @ (v.masks / v.masks.sum(1, keepdim=True)).T
    pairs = itertools.pairwise(v.start)
    of_words = torch.stack([of_places[:, first:last].mean(1) for first, last in pairs], 1)
    return torch.sign(of_places).double(), torch.sign(of_words).double()


@torch.no_grad()
def clause_moves(
    ink: Strokes,
    new: Strokes,
    k: int,
    layer: fa.ExplainedLayer,
    editable: Editable,
    activity: Activity,
) -> dict[Word, float]:
    """What the edit of each of the `new` words costs on images that fire feature k, less what an
    edit elsewhere costs: of ink that is there, which is erased but for what earlier words of `ink`
    name too, the share of the activation; of ink that is absent, which is painted, the share of the
    images on which the feature turns off."""
    at, acts = activity.of(k)
    editor = Editor(ink, editable, k)
    chosen = spread(torch.arange(len(at)), N_CLAUSE)
    x, before = editable.pixels.index_select(0, at[chosen]), acts[chosen]
    pairs = []
    for word in new.there:
        pairs.append(editor.erase(x, [word], spared=ink.there[: ink.there.index(word)]))
    pairs += [editor.paint(x, [word]) for word in new.absent]
    edited = torch.cat([side for pair in pairs for side in pair])
    after = editable.feature_acts(layer, edited, k).view(len(pairs), 2, -1)
    kept = (after / before).clamp(max=2).mean(2)  # one image that fires more must not decide
    active = (after > 0).float().mean(2)
    n = len(new.there)
    left = torch.cat([kept[:n], active[n:]])
    return dict(zip((*new.there, *new.absent), (left[:, 1] - left[:, 0]).tolist(), strict=True))


def _choose_words(
    hypotheses: list[Hypothesis],
    moments: _Moments,
    allowed: Tensor,
    layer: fa.ExplainedLayer,
    editable: Editable,
    activity: Activity,
) -> list[Hypothesis]:
    """The claims with words for ink, each of which holds by itself: it adds to the prediction, and
    its edit moves the feature. One that does not move it is given up and the choice made again,
    CHOICES times at most. allowed (d_sae, W), see `_best_addition`, is changed."""
    found, words = list(hypotheses), word_vocabulary()
    holds: list[set[Word]] = [set() for _ in found]  # words that are known to move the feature
    choosing = [k for k, h in enumerate(found) if "ink" not in h.skip_reasons]
    for _ in range(CHOICES):
        some = torch.tensor(choosing, dtype=torch.int64)
        chosen = _choose(moments.of(some), allowed[some], MAX_WORDS, words)
        again = []
        for k, ink in zip(choosing, chosen, strict=True):
            new = Strokes(*(tuple(w for w in part if w not in holds[k]) for part in ink))
            idle = set()
            if any(new):
                moves = clause_moves(ink, new, k, layer, editable, activity)
                idle = {word for word, by in moves.items() if by < CLAUSE_MOVES}
                holds[k] |= moves.keys() - idle
            kept = Strokes(*(tuple(w for w in part if w not in idle) for part in ink))
            found[k] = found[k]._replace(ink=kept)
            if idle:
                allowed[k, [number_of(word) for word in idle]] = 0
                again.append(k)
        choosing = again
    return found


# --------------------------------------------------------------------------------------------------
# Propose an effect: further than other directions of the same length
# --------------------------------------------------------------------------------------------------

N_DIRECTIONS = 128  # the same ones for all features
OTHERS_SEED = 20_000_003  # no run's own: the directions compared with an SAE's are others
DIRECTION_IMAGES = 16  # on which they are removed
NO_EFFECT_CHANGES = 0.05  # an effect is little where at most this share of predictions changes ...
CLAIM_NO_EFFECT_BELOW = 0.01  # ... and it is said to be where less than this does
EFFECT_MARGIN = 1.25  # by which it must exceed theirs to be claimed
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth a statement


@functools.cache
def other_directions_of(d_in: int) -> Tensor:
    """(N_DIRECTIONS, d_in) unit vectors drawn at random, always the same."""
    generator = torch.Generator().manual_seed(OTHERS_SEED)
    noise = torch.randn(N_DIRECTIONS, d_in, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(noise, dim=1)


@torch.no_grad()
def removed_by_others(
    layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor, norm: float
) -> np.ndarray:
    """(N_DIRECTIONS, n, C) float64, by how much each logit falls on images with preactivations
    raw (n, d_in) when `acts` (n,) times another direction of length `norm` is removed."""
    shifts = other_directions_of(raw.shape[1]).to(raw) * norm * layer.std  # no feature's direction
    states = raw - acts[:, None] * shifts[:, None]  # (N_DIRECTIONS, n, d_in)
    base, without = layer.logits(raw), layer.logits(states.flatten(0, 1))
    return (base - without.view(*states.shape[:2], -1)).cpu().double().numpy()


def largest_moves(falls: np.ndarray) -> dict[str, np.ndarray]:
    """(N_DIRECTIONS, n) each: by how much the logit that a direction "raises" most falls without
    it, and the one it "lowers" most rises; `falls` are those of `removed_by_others`.

    Each direction may choose its logits, as the feature does.
    """
    mean, rows = falls.mean(1), np.arange(len(falls))
    return {"raises": falls[rows, :, mean.argmax(1)], "lowers": -falls[rows, :, mean.argmin(1)]}


def null_effect(
    h: Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, activity: Activity, share: float
) -> dict[str, float]:
    """How far a direction of the feature's length moves a logit on average that goes further than a
    `share` of all; raw (N, d_in) are preactivations of all images."""
    at, acts = activity.of(h.feature)
    chosen = spread(torch.arange(len(at)), DIRECTION_IMAGES)
    norm = float(layer.sae.W_dec[h.feature].norm())
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    moves = largest_moves(removed_by_others(layer, rows, acts, norm))
    return {verb: float(np.quantile(by.mean(1), share)) for verb, by in moves.items()}


def _name_effect(delta: Tensor) -> Effect | None:
    """The logits that fall and rise most when removing the feature changes them by delta (C,)."""
    raises, lowers = int(delta.argmin()), int(delta.argmax())
    raised_by, lowered_by = -float(delta[raises]), float(delta[lowers])
    return _if_any(
        raises if raised_by >= SMALLEST_EFFECT else None,
        raised_by,
        lowers if lowered_by >= SMALLEST_EFFECT else None,
        lowered_by,
    )


def _if_any(
    raises: int | None, raised_by: float, lowers: int | None, lowered_by: float
) -> Effect | None:
    if raises is None and lowers is None:
        return None
    raised_by = 0.0 if raises is None else raised_by
    return Effect(raises, raised_by, lowers, 0.0 if lowers is None else lowered_by)


def _claim_effect(
    h: Hypothesis,
    delta: Tensor,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: Activity,
    rule: Rule,
) -> Hypothesis:
    effect = _name_effect(delta)
    if effect is None:
        return h.drops("effect", f"removing it changes no logit by {SMALLEST_EFFECT} on average")
    chance = null_effect(h, layer, raw, activity, rule.percentile)
    raises, lowers = effect.raises, effect.lowers
    if effect.raised_by <= EFFECT_MARGIN * chance["raises"]:
        raises = None
    if effect.lowered_by <= EFFECT_MARGIN * chance["lowers"]:
        lowers = None
    effect = _if_any(raises, effect.raised_by, lowers, effect.lowered_by)
    if effect is None:
        share = f"{rule.percentile:.0%}"
        return h.drops("effect", f"no logit moves further than {share} of other directions move it")
    return h._replace(effect=effect)


# --------------------------------------------------------------------------------------------------
# Propose: a claim for every feature
# --------------------------------------------------------------------------------------------------


def label_histograms(activity: Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the images that fire each feature by label."""
    d_sae = len(activity.n_active)
    cell = activity.feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def _weak(auroc: float, bar: float) -> str:
    return f"AUROC {auroc:.3f} on the discovery images, {bar} is asked for"


def _claim_labels(h: Hypothesis, label_counts: np.ndarray, rule: Rule) -> Hypothesis:
    said = _name_labels(np.array(h.label_histogram), label_counts)
    if not said["enriched"] and not said["depleted"]:
        why = f"no label is {ENRICHED} times as frequent as among all images, none {DEPLETED} times"
        return h._replace(skip_reasons={**h.skip_reasons, "class": why})
    h = h._replace(**said)
    auroc = _class_auroc(h, label_counts)
    return h if auroc >= rule.class_auroc else h.drops("class", _weak(auroc, rule.class_auroc))


def best_threshold(score: np.ndarray, at: np.ndarray) -> float:
    """The score (N,) from which on images should be said to be active, if `at` (m,) are: the
    largest F1, the harmonic mean of precision and recall."""
    order = np.argsort(-score, kind="stable")
    active = np.zeros(len(score), dtype=bool)
    active[at] = True
    hits = active[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + len(at))
    ranked = score[order]
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    return float(ranked[np.where(last_of_ties, f1, -1).argmax()])


def _weigh(h: Hypothesis, inks: Tensor, activity: Activity, rule: Rule) -> Hypothesis:
    """A claim without ink that is weak, without labels that add nothing to it, and with its cut."""
    if all(part in h.skip_reasons for part in PARTS):
        return h
    at = activity.of(h.feature)[0].numpy()
    scores = part_scores(h, inks, activity.labels)
    auroc = {part: ranks_of(score, at).auroc for part, score in scores.items() if part != "class"}
    if "ink" not in scores:
        h = h if "ink" in h.skip_reasons else h.drops("ink", "no ink predicts and moves it")
    elif auroc["ink"] < rule.ink_auroc:
        h = h.drops("ink", _weak(auroc["ink"], rule.ink_auroc))
        scores = part_scores(h, inks, activity.labels)
    elif "class" in scores and auroc["both"] <= auroc["ink"]:
        h = h.drops("class", "labels add nothing to what the ink predicts")
        scores = part_scores(h, inks, activity.labels)
    return h._replace(threshold=best_threshold(scores["both"], at)) if scores else h


def _claim_ink(
    hypotheses: list[Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    inks: Tensor,
    of_places: Tensor | None,
    activity: Activity,
) -> list[Hypothesis]:
    """The claims with words, by inks (W, N), and with drawings where of_places (M, N) is given."""
    shown = spread(torch.arange(len(images)), PATTERN_IMAGES).to(images.device)
    heats = (
        fa.feature_input_patterns(layer.model, layer.sae, layer.mu, layer.std, images[shown])
        .cpu()
        .flatten(1)
    )
    place_signs, word_signs = _causal_signs(heats)
    n_classes = len(hypotheses[0].label_histogram)
    scores = [h.label_scores or (0.0,) * n_classes for h in hypotheses]
    scores = torch.tensor(scores, dtype=torch.float32)
    moments = _moments(inks, activity, scores)
    editable = Editable.of(images, seed=OTHERS_SEED)
    hypotheses = _choose_words(hypotheses, moments, word_signs, layer, editable, activity)
    if of_places is None:
        return hypotheses
    moments = _moments(of_places, activity, scores)
    drawn = _choose(moments, place_signs, MAX_PLACES, vocabulary().places)
    pairs = zip(hypotheses, drawn, strict=True)
    return [h._replace(drawing=drawing) for h, drawing in pairs]


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
    """A claim about every feature, from the discovery images (N, ...) with labels (N,) alone.

    class   the labels that make up most of what fires it, with their shares, or that hardly do
    ink     up to three words for ink that is there and one for none (SAID), those that together
            with the labels predict best where it is active, each of which moves the feature
    effect  the logits that its removal lowers and raises most, where it does so further than other
            directions would

    Ink is named with `strokes`, and where images are pen strokes on a blank ground of 28 x 28
    pixels. Beside the words stands a drawing of exact places. `classes` are the names of the
    labels, which otherwise are called by their numbers. `activity` and `removed`, by
    `fa.removal_effects`, are those of the same images, where they are at hand. A part that does not
    reach the rule's bar on these very images is not claimed. Raises ValueError for shapes that do
    not fit, labels that the model does not know, no images, an activity or removals of others, and
    where ink is to be named but no gradient leads from the layer to the pixels.
    """
    rule = rule or Rule()
    images, labels, raw = split
    activity = activity or collect_activity(layer, raw, labels)
    check_activity(activity, layer, raw)
    removed = removed or removal_effects(layer, raw, activity)
    if not torch.equal(removed.n_images, activity.n_active):
        raise ValueError("the removals are of other images than the activity")
    n_classes = removed.mean_delta.shape[1]
    histograms = label_histograms(activity, n_classes)
    label_counts = torch.bincount(activity.labels, minlength=n_classes).numpy()
    hypotheses = []
    for k in range(layer.d_sae):
        h = _unclaimed(k, activity, histograms[k], removed)._replace(classes=tuple(classes))
        if rule.min_active <= h.n_active <= len(images) - rule.min_active:
            h = _claim_labels(h, label_counts, rule)
            h = _claim_effect(h, removed.mean_delta[k], layer, raw, activity, rule)
        else:
            found = f"active on {h.n_active} of {len(images)} images"
            why = f"{found}; {rule.min_active} active and as many silent ones needed"
            h = h._replace(skip_reasons=dict.fromkeys(PARTS, why))
        hypotheses.append(h)

    no_strokes = "strokes are switched off"
    if strokes:
        no_strokes = why_no_strokes(images) or why_unlike_strokes(images)
    inks = torch.empty(0, len(images), dtype=torch.float32)
    if no_strokes:
        hypotheses = [h.drops("ink", h.skip_reasons.get("ink", no_strokes)) for h in hypotheses]
    else:
        of_places = place_inks(images)
        inks = word_inks(of_places)
        drawn = of_places if drawings else None
        hypotheses = _claim_ink(hypotheses, layer, images, inks, drawn, activity)
    return [_weigh(h, inks, activity, rule) for h in hypotheses]


def _unclaimed(k: int, activity: Activity, histogram: np.ndarray, removed: Removals) -> Hypothesis:
    """What is known of feature k before anything is claimed."""
    _, activations = activity.of(k)
    return Hypothesis(
        feature=k,
        ink=Strokes(),
        enriched=(),
        depleted=(),
        label_scores=(),
        effect=None,
        threshold=None,
        drawing=Strokes(),
        typical_activation=float(activations.mean()) if len(activations) else 0.0,
        label_histogram=tuple(histogram.tolist()),
        n_images=len(activity.labels),
        influence=float(removed.influence[k]),
        changes=float(removed.changes[k]),
        skip_reasons={},
    )


# --------------------------------------------------------------------------------------------------
# Freeze
# --------------------------------------------------------------------------------------------------


def _strokes_record(strokes: Strokes) -> dict:
    record = {}
    for name, some in strokes._asdict().items():
        record[name] = [s._asdict() for s in some]
        for entry, stroke in zip(record[name], some, strict=True):
            if isinstance(stroke, Word):
                entry["words"] = stroke.words()
    return record


def hypothesis_record(h: Hypothesis) -> dict:
    """A claim as JSON has it."""
    strokes = {"ink": _strokes_record(h.ink), "drawing": _strokes_record(h.drawing)}
    effect = {"effect": h.effect._asdict() if h.effect else None}
    record = {"caption": caption(h), **h._asdict(), **strokes, **effect}
    del record["classes"]  # the same for all
    return record


DIGEST = re.compile(rb'\A{\n "sha256": "(\w{64})",\n')  # the first two lines of a frozen file


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """Write claims and the rule that will judge them; returns the SHA-256 of all that is said.

    The file's second line holds it, and it is that of the file without this line, so that claims
    and digest are written in one step (`sed 2d FILE | sha256sum` shows it).
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
    """What `freeze_hypotheses` wrote.

    Raises ValueError with both hashes when it is not what the file itself, or `sha256`, says was
    frozen.
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
    """The hypothesis whose `hypothesis_record` this is."""
    fields = {name: record[name] for name in Hypothesis._fields if name != "classes"}
    for name in ("ink", "drawing"):
        fields[name] = _strokes_from(record[name])
    for name in ("enriched", "depleted", "label_scores", "label_histogram"):
        fields[name] = tuple(record[name])
    if record["effect"]:
        fields["effect"] = Effect(**record["effect"])
    return Hypothesis(**fields, classes=classes)


def _strokes_from(record: dict) -> Strokes:
    kinds = []
    for entries in (record["there"], record["absent"]):
        kinds.append(tuple(_stroke_from(entry) for entry in entries))
    return Strokes(*kinds)


def _stroke_from(entry: dict) -> Word | Place:
    kind = Word if "long" in entry else Place
    return kind(*(entry[name] for name in kind._fields))
