"""Are the hypotheses true of images on which they were not proposed? Tests and decisions.

    evidence = evaluate_hypotheses(hypotheses, layer, test_half)     # what was measured
    decisions = decide_hypotheses(hypotheses, evidence, rule)        # confirmed, refuted, ...
    found = discriminate(evidence, scores, layer, activity)          # against other features
    evaluation = make_evaluation(hypotheses, rule, evidence, ...)    # everything of one SAE

Takes hypotheses, an `ExplainedLayer` and activations of test images; gives tables of numbers. It
proposes nothing, and puts nothing into words: `text` does that.

Key: N test images, C classes, n edited images or images from which a feature is removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, coactivation_neighbors, collect_activity, removal_effects
from saexplain.captions import caption
from saexplain.edits import N_EDIT, EditableImages, Editor, edited_images, evenly_spaced
from saexplain.hypotheses import (
    NO_EFFECT_CHANGES,
    PARTS,
    Hypothesis,
    Rule,
    drawing_score,
    label_histograms,
    null_effect,
    part_scores,
)
from saexplain.statistics import (
    Z_95,
    Detection,
    auroc_of_ranks,
    benjamini_hochberg,
    midranks,
    score_detections,
    sign_test_p,
    wilson_interval,
)
from saexplain.strokes import Strokes, place_inks, why_no_strokes, word_inks

# --------------------------------------------------------------------------------------------------
# Do edits of the named strokes change whether the feature is active?
# --------------------------------------------------------------------------------------------------

EDITS = ("erasing", "filling", "painting")  # see `edit_tests`


class EditTest(NamedTuple):
    """On how many of n images the feature's activity changed: by the edit as named, and by the same
    edit elsewhere."""

    n: int
    named: int
    elsewhere: int
    only_named: int
    only_elsewhere: int

    @classmethod
    def of(cls, named: np.ndarray, elsewhere: np.ndarray) -> EditTest:
        """From whether activity changed on each image, (n,) bool each."""
        cells = np.bincount(2 * named + elsewhere, minlength=4).tolist()
        _, only_elsewhere, only_named, both = cells
        n_named, n_elsewhere = only_named + both, only_elsewhere + both
        return cls(len(named), n_named, n_elsewhere, only_named, only_elsewhere)

    @property
    def p(self) -> float:
        """Sign test: p-value when both edits are equally likely to change the activity."""
        return sign_test_p(self.only_named, self.only_elsewhere)

    @property
    def phi(self) -> float:
        """Correlation of the two edits over images; in a positive one the numerator is reduced by
        n / 2, as in Newcombe's method 10."""
        both, neither = self.named - self.only_named, self.n - self.named - self.only_elsewhere
        cross = both * neither - self.only_named * self.only_elsewhere
        if cross > 0:
            cross = max(0, cross - self.n / 2)
        unchanged = (self.n - self.named) * (self.n - self.elsewhere)
        return cross / math.sqrt(self.named * self.elsewhere * unchanged or 1)

    def difference(self) -> tuple[float, float, float]:
        """Share changed by the named edit less that changed elsewhere, and its 95% interval: method
        10 of Newcombe (1998, Statistics in Medicine 17:2635-2650), for pairs."""
        named, elsewhere = self.named / self.n, self.elsewhere / self.n
        low, high = wilson_interval(self.named, self.n)
        other_low, other_high = wilson_interval(self.elsewhere, self.n)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * self.phi * a * b + b * b))

        value = named - elsewhere
        down = reach(named - low, other_high - elsewhere)
        up = reach(high - named, elsewhere - other_low)
        return value, value - down, value + up


@torch.no_grad()
def edit_tests(
    strokes: Strokes,
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    images: EditableImages,
    activity: Activity,
) -> dict[str, EditTest]:
    """The tests of a hypothesis by edits of its words or of its drawing, `strokes`.

    erasing   strokes that are there are erased on active images: does the feature turn inactive?
    filling   absent strokes are painted on active images: does it turn inactive?
    painting  both are made as named on inactive images: does it turn active?

    Without strokes of a kind its tests are left out.
    """
    if not any(strokes):
        return {}
    editor = Editor(strokes, images, h.feature)
    on, off = edited_images(h, activity)
    x, inactive = images.pixels.index_select(0, on), images.pixels.index_select(0, off)
    pairs = {}
    if strokes.there:
        pairs["erasing"] = editor.erase(x, strokes.there)
    if strokes.absent:
        pairs["filling"] = editor.paint(x, strokes.absent)
        pairs["painting"] = editor.erase(inactive, strokes.absent)
    if strokes.there:  # last, so that nothing of it is erased again
        pairs["painting"] = editor.paint(inactive, strokes.there, pairs.get("painting"))
    # One batch per feature: its result cannot depend on which other features are tested.
    edited = torch.cat([side for pair in pairs.values() for side in pair])
    active = (images.feature_acts(layer, edited, h.feature) > 0).numpy()
    tests = {}
    for name, (named, _) in pairs.items():
        n = len(named)
        changed = active[: 2 * n] if name == "painting" else ~active[: 2 * n]
        tests[name] = EditTest.of(changed[:n], changed[n:])
        active = active[2 * n :]
    return tests


# --------------------------------------------------------------------------------------------------
# Does the feature change the logits as predicted?
# --------------------------------------------------------------------------------------------------

DOSES = (0.0, 0.5, 1.0, 2.0)  # times the typical activation
TINY_DOSE = 1 / 64  # of the typical activation, for the slope of the linear prediction

DoseCurve = tuple[float, ...] | None


class EffectTest(NamedTuple):
    """Removing a feature from n active images, and adding it again in doses."""

    n: int
    raised_by: float | None  # by how much it changes the named logits, as in `Effect`
    lowered_by: float | None
    null_raised: float  # mean change of a logit that the rule's percentile of random directions
    null_lowered: float  # of the same norm do not exceed
    ratio: float  # change found over change required; of the logit with the smaller one
    ratio_error: float  # standard error
    exceeding: int  # images on which the named logits change by more than the random directions'
    doses: tuple[float, ...]  # times the typical activation
    dose_raises: DoseCurve  # mean change of the logits at each dose
    dose_lowers: DoseCurve
    linear_raises: DoseCurve  # the same, extrapolated from TINY_DOSE
    linear_lowers: DoseCurve

    @property
    def p(self) -> float:
        """Sign test: p-value when the random directions are exceeded on half of the images."""
        return sign_test_p(self.exceeding, self.n - self.exceeding)

    @property
    def dose_follows(self) -> bool:
        """Whether each larger dose changes the named logits further."""
        up = np.diff(self.dose_raises or (0.0, 1.0))
        down = np.diff(self.dose_lowers or (1.0, 0.0))
        return bool((up > 0).all() and (down < 0).all())


@torch.no_grad()
def _logits_in_states(
    h: Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor
) -> np.ndarray:
    """(3 + doses, n, C) float64 logits of raw (n, d_in), which activates the feature by acts (n,):
    as it is, without the feature, at each dose but 0, and at TINY_DOSE."""
    without = layer.without(raw, h.feature, acts)
    doses = [dose * h.typical_activation for dose in (*DOSES[1:], TINY_DOSE)]
    added = [layer.adding(without, h.feature, dose) for dose in doses]
    states = [raw, without, *added]
    logits = layer.logits(torch.cat(states))
    return logits.cpu().double().numpy().reshape(len(states), len(raw), -1)


def effect_test(
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: Activity,
    rule: Rule | None = None,
) -> EffectTest:
    """The test of a hypothesis's effect on raw (N, d_in), the layer's output."""
    rule, effect = rule or Rule(), h.effect
    named = {"raises": (effect.raises, effect.raised_by)}
    named["lowers"] = (effect.lowers, effect.lowered_by)
    named = {verb: (c, by) for verb, (c, by) in named.items() if c is not None}
    classes = [c for c, _ in named.values()]
    sign = np.array([1.0 if verb == "raises" else -1.0 for verb in named])

    at, acts = activity.of(h.feature)
    chosen = evenly_spaced(torch.arange(len(at)), N_EDIT)
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    base, without, *at_doses, tiny = _logits_in_states(h, layer, rows, acts)[:, :, classes]
    found = sign * (base - without)  # (n, named logits)

    null = null_effect(h.feature, layer, rows, acts, rule.percentile)
    strength = (acts / acts.mean()).cpu().double().numpy()[:, None]  # relative, (n, 1)
    exceeding = (found > strength * [null[verb] for verb in named]).all(1)

    required = [max(null[verb], rule.effect_size * by) for verb, (_, by) in named.items()]
    ratio = (found / required)[:, (found.mean(0) / required).argmin()]
    curve = np.stack([without, *at_doses]).mean(1) - without.mean(0)  # (doses, named logits)
    line = np.outer(DOSES, (tiny - without).mean(0) / TINY_DOSE)
    changes = dict(zip(named, found.mean(0).tolist(), strict=True))
    curves = dict(zip(named, map(tuple, curve.T.tolist()), strict=True))
    lines = dict(zip(named, map(tuple, line.T.tolist()), strict=True))
    return EffectTest(
        n=len(base),
        raised_by=changes.get("raises"),
        lowered_by=changes.get("lowers"),
        null_raised=null["raises"],
        null_lowered=null["lowers"],
        ratio=float(ratio.mean()),
        ratio_error=float(ratio.std() / math.sqrt(max(1, len(ratio) - 1))),
        exceeding=int(exceeding.sum()),
        doses=DOSES,
        dose_raises=curves.get("raises"),
        dose_lowers=curves.get("lowers"),
        linear_raises=lines.get("raises"),
        linear_lowers=lines.get("lowers"),
    )


# --------------------------------------------------------------------------------------------------
# All tests of all hypotheses
# --------------------------------------------------------------------------------------------------

Scores = dict[int, dict[str, np.ndarray]]  # by feature and "ink", "class", "both" or "drawing"


class Selection(NamedTuple):
    """Images that a hypothesis predicts to be active, those with at least its threshold."""

    n: int  # predicted
    active: int
    both: int

    @property
    def precision(self) -> float:
        return self.both / max(1, self.n)

    @property
    def recall(self) -> float:
        return self.both / max(1, self.active)


class Evidence(NamedTuple):
    """What was measured about one hypothesis; None or empty for parts that it has not, and for all
    of a feature that is not testable."""

    feature: int
    n_active: int
    n_images: int
    testable: bool  # whether there are as many active, and inactive, images as the rule requires
    label_histogram: tuple[int, ...]  # of the active images
    influence: float  # share of the logit effect of all single ablations
    changes: float  # share of the active images whose prediction changes without it
    detected: dict[str, Detection]  # "ink", "class", "both"
    edits: dict[str, EditTest]  # some of EDITS
    drawn_edits: dict[str, EditTest]  # the same of the drawing
    selected: Selection | None = None
    effect: EffectTest | None = None
    drawn: Detection | None = None  # by the drawing in place of the words
    claims_no_effect: bool = False  # whether it predicts that removal changes few predictions

    @property
    def auroc(self) -> float | None:
        """Of the hypothesis as a whole."""
        return self.detected["both"].auroc if "both" in self.detected else None


def split_test_images(test: fa.Activations) -> tuple[fa.Activations, fa.Activations]:
    """The test half, images with even numbers, and the replication half, those with odd ones.

    Every other one, because the first and the second half of MNIST's test images were written by
    different people.
    """
    return fa.Activations(*(v[0::2] for v in test)), fa.Activations(*(v[1::2] for v in test))


def score_hypotheses(hypotheses: Sequence[Hypothesis], images: Tensor, labels: Tensor) -> Scores:
    """The scores by which hypotheses about different features predict activity on images (N, ...)
    with labels (N,)."""
    of_places = of_words = torch.empty(0, len(images), dtype=torch.float32)
    if any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        of_places = place_inks(images)
        of_words = word_inks(of_places)
    labels, scores = labels.cpu(), {}
    for h in hypotheses:
        scores[h.feature] = part_scores(h, of_words, labels)
        if any(h.drawing):
            scores[h.feature]["drawing"] = drawing_score(h, of_places, labels)
    return scores


def _detect_all(
    scores: Scores, features: Sequence[int], activity: Activity
) -> dict[int, dict[str, Detection]]:
    """By feature, how well each of its scores predicts its activity."""
    keys = [(k, part) for k in features for part in scores[k]]
    values = [scores[k][part] for k, part in keys]
    active = [activity.of(k)[0].numpy() for k, _ in keys]
    found: dict[int, dict[str, Detection]] = {k: {} for k in features}
    for (k, part), detection in zip(keys, score_detections(values, active), strict=True):
        found[k][part] = detection
    return found


def _select_images(
    h: Hypothesis, scores: dict[str, np.ndarray], activity: Activity
) -> Selection | None:
    """The images that a hypothesis predicts to be active; None for one without a score."""
    if h.threshold is None:
        return None
    at, _ = activity.of(h.feature)
    predicted = scores["both"] >= np.float32(h.threshold)
    return Selection(int(predicted.sum()), len(at), int(predicted[at.numpy()].sum()))


def evaluate_hypotheses(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    activity: Activity | None = None,
    seed: int = 0,
    rule: Rule | None = None,
    scores: Scores | None = None,
) -> list[Evidence]:
    """The evidence of the images of `split` for hypotheses about different features.

    detection  AUROC and average precision with which ink, labels and both predict activity, and the
               drawing in place of the ink
    edits      of N_EDIT active and as many inactive images, see `edit_tests`
    effect     the feature, and random directions of its norm, are removed from active images; then
               it is added in DOSES

    Features with fewer active, or inactive, images than the rule's `min_active` are not tested. A
    given `activity` replaces the SAE's own, as for a test under chance; `scores` are those of
    `score_hypotheses`, where they are at hand; `seed` draws the positions of edits elsewhere.

    Raises ValueError for strokes on images that cannot have them, and for an activity of other
    images.
    """
    images, labels, raw = split
    n, rule = len(images), rule or Rule()
    no_strokes = why_no_strokes(images)
    if no_strokes and any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        raise ValueError(f"images must allow the strokes of the hypotheses, but {no_strokes}")
    activity = activity or collect_activity(layer, raw, labels)
    removed = removal_effects(layer, raw, activity)
    n_active = activity.n_active.tolist()
    testable = {k for k, m in enumerate(n_active) if rule.min_active <= m <= n - rule.min_active}
    some = [h for h in hypotheses if h.feature in testable]
    scores = scores or score_hypotheses(some, images, labels)
    found = _detect_all(scores, [h.feature for h in some], activity)
    histograms = label_histograms(activity, removed.mean_delta.shape[1])
    editable = EditableImages.of(images, seed)
    evidence = []
    for h in hypotheses:
        k = h.feature
        e = Evidence(
            feature=k,
            n_active=n_active[k],
            n_images=n,
            testable=k in testable,
            label_histogram=tuple(histograms[k].tolist()),
            influence=float(removed.influence[k]),
            changes=float(removed.changes[k]),
            detected={},
            edits={},
            drawn_edits={},
        )
        if e.testable:
            e = e._replace(
                drawn=found[k].pop("drawing", None),
                detected=found[k],
                selected=_select_images(h, scores[k], activity),
                edits=edit_tests(h.ink, h, layer, editable, activity),
                drawn_edits=edit_tests(h.drawing, h, layer, editable, activity),
                effect=effect_test(h, layer, raw, activity, rule) if h.effect else None,
                claims_no_effect=h.claims_no_effect,
            )
        evidence.append(e)
    return evidence


# --------------------------------------------------------------------------------------------------
# Decisions
# --------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED, NONE = "confirmed", "inconclusive", "refuted", "no hypothesis"
CONFIDENCES = ("High", "Medium", "Low")
CONFIDENCE_RULE = """High: every part of the hypothesis is confirmed, ink among them, and each
measurement clears its bar even at the pessimistic end of its 95% interval. Medium: not High, but at
least one part is confirmed and nothing is refuted. Low: the rest. A hypothesis is replicated when
each measurement clears its bar on the replication half, too."""
TESTS_OF = {"ink": ("ink", *EDITS), "class": ("class",), "effect": ("effect",)}  # by part
TESTS_OF_WHOLE = ("both", "no_effect")


class Measurement(NamedTuple):
    """A measured value with its 95% interval, the bar it must reach, its p-value, and the value of
    no relation at all, which the interval must leave out."""

    value: float
    low: float
    high: float
    bar: float
    p: float | None  # None: it has none, or repeats a measurement whose p-value counts
    null: float

    def outcome(self, significant: bool) -> str:
        """CONFIRMED, INCONCLUSIVE or REFUTED."""
        if self.value >= self.bar and self.low > self.null and significant:
            return CONFIRMED
        return REFUTED if self.high < self.bar else INCONCLUSIVE


class Decision(NamedTuple):
    """The outcomes of one hypothesis, by test, by part and overall, and the confidence in it."""

    feature: int
    tests: dict[str, str]
    parts: dict[str, str]
    outcome: str
    confidence: str
    explained: bool  # all parts are confirmed, and ink is one of them


def measurements(evidence: Evidence, rule: Rule) -> dict[str, Measurement]:
    """The measurements of each test, with the rule's bars."""
    found = {}
    bars = {"class": rule.class_auroc, "ink": rule.ink_auroc, "both": rule.both_auroc}
    for part, d in evidence.detected.items():
        # With a single part, "both" is that part's score: one test, not two.
        p = None if part == "both" and len(evidence.detected) == 2 else d.p
        found[part] = Measurement(d.auroc, d.auroc_low, d.auroc_high, bars[part], p, 0.5)
    for name, test in evidence.edits.items():
        found[name] = Measurement(*test.difference(), rule.edit_difference, test.p, 0.0)
    e = evidence.effect
    if e is not None:
        wide = Z_95 * e.ratio_error
        found["effect"] = Measurement(e.ratio, e.ratio - wide, e.ratio + wide, 1.0, e.p, 0.0)
    if evidence.claims_no_effect:
        kept, bar = 1 - evidence.changes, 1 - NO_EFFECT_CHANGES
        count = round(evidence.changes * evidence.n_active)
        low, high = wilson_interval(count, evidence.n_active)
        found["no_effect"] = Measurement(kept, 1 - high, 1 - low, bar, None, 0.0)
    return found


def _joint(outcomes: Sequence[str]) -> str:
    """The outcome of several: one refuted refutes, all confirmed confirm."""
    if REFUTED in outcomes:
        return REFUTED
    if outcomes and all(v == CONFIRMED for v in outcomes):
        return CONFIRMED
    return INCONCLUSIVE


def _decide(
    h: Hypothesis, e: Evidence, tests: dict[str, Measurement], significant: dict[str, bool]
) -> Decision:
    """The decision about one hypothesis."""
    parts = dict.fromkeys(PARTS, NONE)
    if not h.parts:
        return Decision(h.feature, {}, parts, NONE, "Low", False)
    outcomes = {name: m.outcome(significant[name]) for name, m in tests.items()}
    if e.effect and outcomes["effect"] == CONFIRMED and not e.effect.dose_follows:
        outcomes["effect"] = INCONCLUSIVE
    for part in h.parts:
        parts[part] = _joint([outcomes[t] for t in TESTS_OF[part] if t in outcomes])
    together = [outcomes[t] for t in TESTS_OF_WHOLE if t in outcomes]
    whole = _joint([parts[part] for part in h.parts] + together)
    explained = whole == CONFIRMED and h.proposes("ink")
    confidence = "Low"
    if explained and all(m.low >= m.bar for m in tests.values()):
        confidence = "High"
    elif CONFIRMED in parts.values() and whole != REFUTED:
        confidence = "Medium"
    return Decision(h.feature, outcomes, parts, whole, confidence, explained)


def decide_hypotheses(
    hypotheses: Sequence[Hypothesis], evidence: Sequence[Evidence], rule: Rule | None = None
) -> list[Decision]:
    """The outcome and confidence of each hypothesis by its evidence, in the same order.

    A test is confirmed when its value reaches the bar, its interval leaves out that there is no
    relation, and it is significant among all tests of all features; refuted when its 95% interval
    stays below the bar; otherwise inconclusive. A part is refuted by one of its tests and confirmed
    by all; so is the hypothesis by its parts. Confidence is by CONFIDENCE_RULE.
    """
    rule = rule or Rule()
    found = [measurements(e, rule) for e in evidence]
    p = [m.p for tests in found for m in tests.values() if m.p is not None]
    passed = iter(benjamini_hochberg(p, rule.false_discovery_rate).tolist())
    decisions = []
    for h, e, tests in zip(hypotheses, evidence, found, strict=True):
        significant = {name: m.p is None or next(passed) for name, m in tests.items()}
        decisions.append(_decide(h, e, tests, significant))
    return decisions


def clears_bars(evidence: Evidence, rule: Rule | None = None) -> bool | None:
    """Whether every measurement clears its bar, significant or not; None when there is none."""
    tests = measurements(evidence, rule or Rule())
    return all(m.value >= m.bar for m in tests.values()) if tests else None


# --------------------------------------------------------------------------------------------------
# Does a hypothesis predict its own feature better than others?
# --------------------------------------------------------------------------------------------------

CANDIDATES = 8  # features of like density among which a hypothesis must predict its own best


class Discrimination(NamedTuple):
    """Whether the score of a hypothesis predicts its own feature better than others."""

    among_eight: bool  # of like density
    over_nearest: bool | None  # the nearest other in decoder cosine; None: there is none
    over_coactive: bool | None  # the other whose activity correlates most with its own


def discriminate(
    evidence: Sequence[Evidence], scores: Scores, layer: fa.ExplainedLayer, activity: Activity
) -> dict[int, Discrimination]:
    """The discrimination of each testable feature's hypothesis; False for one without a score."""
    testable = [e for e in evidence if e.testable]
    order = [e.feature for e in sorted(testable, key=lambda e: (e.n_active, e.feature))]
    nearest, cosine = (column.tolist() for column in fa.nearest_features(layer.sae.W_dec))
    coactive = coactivation_neighbors(activity, 1)[0].tolist()
    active = {k: activity.of(k)[0].numpy() for k in range(layer.d_sae)}
    n = len(activity.labels)
    active = {k: at for k, at in active.items() if 0 < len(at) < n}  # those that have an AUROC

    def beats(k: int, others: Sequence[int]) -> bool | None:
        """Whether the score of k predicts it better than each of the others."""
        some = [c for c in others if c in active and c != k]
        if not some:
            return None
        if ranks is None:
            return False
        best = max(auroc_of_ranks(ranks, active[c]) for c in some)
        return bool(auroc_of_ranks(ranks, active[k]) > best)

    discriminated = {}
    for place, k in enumerate(order):
        ranks = midranks(scores[k]["both"]) if "both" in scores[k] else None
        first = max(0, min(place - CANDIDATES // 2, len(order) - CANDIDATES))
        eight = beats(k, order[first : first + CANDIDATES]) is not False and ranks is not None
        near = beats(k, [nearest[k]] if cosine[k] > 0 else [])
        discriminated[k] = Discrimination(eight, near, beats(k, coactive[k]))
    return discriminated


# --------------------------------------------------------------------------------------------------
# Summary of one set of features
# --------------------------------------------------------------------------------------------------

BANDS = (0.003, 0.01, 0.03)  # densities at which bands of features end


class Shares(NamedTuple):
    """Shares of the testable features, unless noted otherwise."""

    features: int  # testable
    too_rare: int  # not testable: too few active images; they count in no share
    explained: float
    explained_low: float  # 95% interval, over features
    explained_high: float
    ink_confirmed: float
    class_confirmed: float
    effect_confirmed: float
    predicted: float  # the hypothesis reaches the AUROC required
    drawn: float | None  # the drawing does
    median_auroc: float | None
    median_precision: float | None
    median_recall: float | None
    average_precision: float | None  # its median
    among_eight: float
    over_nearest: float | None
    over_coactive: float | None
    influence_explained: float  # share of the influence of all features
    influence_high: float
    median_density: float | None
    bands: list[dict]  # by density: upto, features, explained
    confidence: dict[str, dict]  # by confidence: hypotheses, checked, replicated


class Comparison(NamedTuple):
    """Summary of one set of features, to be compared with others."""

    shares: Shares
    aurocs: list[float]  # of the hypotheses about testable features; 0 without one


def _mean(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _count_bands(pairs: Sequence[tuple[Evidence, Decision]]) -> list[dict]:
    """Features, and explained ones, by density."""
    bands = []
    for low, high in zip((0.0, *BANDS), (*BANDS, 1.0), strict=True):
        some = [d.explained for e, d in pairs if low < e.n_active / e.n_images <= high]
        bands.append({"upto": high, "features": len(some), "explained": sum(some)})
    return bands


def count_replicated(
    decisions: Sequence[Decision], replicated: Sequence[bool | None]
) -> dict[str, dict]:
    """Hypotheses of each confidence, and of all: how many there are, how many could be checked on
    the replication half, and how many were replicated."""
    check = {}
    for name in (*CONFIDENCES, "all"):
        pairs = [(d, r) for d, r in zip(decisions, replicated, strict=True) if d.outcome != NONE]
        some = [r for d, r in pairs if name in (d.confidence, "all")]
        seen = [r for r in some if r is not None]
        check[name] = {"hypotheses": len(some), "checked": len(seen), "replicated": sum(seen)}
    return check


def comparison_of(
    evidence: Sequence[Evidence],
    decisions: Sequence[Decision],
    discriminated: dict[int, Discrimination],
    replicated: Sequence[bool | None],
    rule: Rule,
) -> Comparison:
    """The summary of one set of features; its shares are 0 where none is testable."""
    pairs = [(e, d) for e, d in zip(evidence, decisions, strict=True) if e.testable]
    n = max(1, len(pairs))
    explained = sum(d.explained for _, d in pairs)
    low, high = wilson_interval(explained, n)
    confirmed = {part: sum(d.parts[part] == CONFIRMED for _, d in pairs) / n for part in PARTS}
    whole = [e.detected["both"] for e, _ in pairs if e.detected]
    selected = [e.selected for e, _ in pairs if e.selected]
    drawn = [e.drawn.auroc >= rule.both_auroc for e, _ in pairs if e.drawn]
    own = [discriminated[e.feature] for e, _ in pairs]
    shares = Shares(
        features=len(pairs),
        too_rare=len(evidence) - len(pairs),
        explained=explained / n,
        explained_low=low,
        explained_high=high,
        ink_confirmed=confirmed["ink"],
        class_confirmed=confirmed["class"],
        effect_confirmed=confirmed["effect"],
        predicted=sum(d.auroc >= rule.both_auroc for d in whole) / n,
        drawn=sum(drawn) / n if drawn else None,
        median_auroc=_median([d.auroc for d in whole]),
        median_precision=_median([s.precision for s in selected]),
        median_recall=_median([s.recall for s in selected]),
        average_precision=_median([d.average_precision for d in whole]),
        among_eight=sum(d.among_eight for d in own) / n,
        over_nearest=_mean([d.over_nearest for d in own]),
        over_coactive=_mean([d.over_coactive for d in own]),
        influence_explained=sum(e.influence for e, d in pairs if d.explained),
        influence_high=sum(e.influence for e, d in pairs if d.confidence == "High"),
        median_density=_median([e.n_active / e.n_images for e, _ in pairs]),
        bands=_count_bands(pairs),
        confidence=count_replicated(decisions, replicated),
    )
    return Comparison(shares, [e.auroc or 0.0 for e, _ in pairs])


# --------------------------------------------------------------------------------------------------
# Everything of one SAE
# --------------------------------------------------------------------------------------------------

STRONGEST = 10  # images listed for a feature


class Evaluation(NamedTuple):
    """Hypotheses with all that was measured and decided, in the order of the features."""

    hypotheses: list[Hypothesis]
    rule: Rule
    evidence: list[Evidence]
    decisions: list[Decision]
    replicated: list[bool | None]  # on the replication half; None: too few images
    n_replication: int  # images of the replication half
    top_images: list[list[int]]  # numbers of the test images that activate each feature most
    edited: list[tuple[list[int], list[int]]]  # ... and of those edited: active, inactive
    result: Comparison


def make_evaluation(
    hypotheses: list[Hypothesis],
    rule: Rule,
    evidence: list[Evidence],
    replication_evidence: Sequence[Evidence],
    activity: Activity,
    discriminated: dict[int, Discrimination],
) -> Evaluation:
    """The evaluation of hypotheses by the evidence of both halves of the test images; `activity` is
    that of the test half."""
    decisions = decide_hypotheses(hypotheses, evidence, rule)
    top_images, edited = [], []
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:STRONGEST]
        # Image i of the test half is image 2 i of the test images.
        top_images.append((2 * at[strongest]).tolist())
        on, off = edited_images(h, activity)
        edited.append(((2 * on).tolist(), (2 * off).tolist()))
    replicated = [clears_bars(e, rule) for e in replication_evidence]
    n_replication = replication_evidence[0].n_images
    result = comparison_of(evidence, decisions, discriminated, replicated, rule)
    return Evaluation(
        hypotheses, rule, evidence, decisions, replicated, n_replication, top_images, edited, result
    )


def all_shares(evaluation: Evaluation, comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons by name, with the SAE's own features in front."""
    return {"SAE": evaluation.result, **comparisons}


def features_of_influence(evaluation: Evaluation) -> dict[str, int]:
    """How many features, the most influential first, make up 50, 90 and 99% of the influence."""
    total = np.sort([e.influence for e in evaluation.evidence])[::-1].cumsum()
    if not total[-1]:
        return {}
    return {f"{q:.0%}": int(np.searchsorted(total, q - 1e-9)) + 1 for q in (0.5, 0.9, 0.99)}


def evaluation_record(
    evaluation: Evaluation, comparisons: dict[str, Comparison], sha256: str
) -> dict:
    """The evaluation in summary.json; `sha256` is that of the frozen hypotheses."""
    words = [len(caption(h).split()) for h in evaluation.hypotheses if h.proposes("ink")]
    return {
        "sha256": sha256,
        "rule": evaluation.rule._asdict(),
        "confidence_rule": " ".join(CONFIDENCE_RULE.split()),
        "shares": {n: c.shares._asdict() for n, c in all_shares(evaluation, comparisons).items()},
        "features_that_make_influence": features_of_influence(evaluation),
        "median_words": _median(words),
    }
