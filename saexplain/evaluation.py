"""TODO"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import (
    Activity,
    check_activity,
    coactivation_neighbors,
    collect_activity,
    removal_effects,
)
from saexplain.captions import caption
from saexplain.edits import N_EDIT, Editable, Editor, edited_images, spread
from saexplain.hypotheses import (
    DIRECTION_IMAGES,
    NO_EFFECT_CHANGES,
    PARTS,
    Hypothesis,
    Rule,
    drawing_score,
    label_histograms,
    largest_moves,
    part_scores,
    removed_by_others,
)
from saexplain.statistics import (
    Z_95,
    Detection,
    auroc_of_ranks,
    benjamini_hochberg,
    detected,
    midranks,
    sign_test_p,
    wilson_interval,
)
from saexplain.strokes import Strokes, place_inks, why_no_strokes, word_inks


class Selection(NamedTuple):
    """Images that a claim describes, those scored at least its cut, and images that are active."""

    n: int  # described
    active: int
    both: int

    @property
    def precision(self) -> float:
        return self.both / max(1, self.n)

    @property
    def recall(self) -> float:
        return self.both / max(1, self.active)


class EditTest(NamedTuple):
    """Edits of n images as the claim names them, and of as much ink elsewhere: on how many of them
    the feature's activity changed."""

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
        """Sign test: chance of this when naming makes no difference."""
        return sign_test_p(self.only_named, self.only_elsewhere)

    @property
    def phi(self) -> float:
        """Correlation of the two edits over images; a positive one is moved towards 0, by n / 2 in
        its numerator, as Newcombe's method 10 has it."""
        both, neither = self.named - self.only_named, self.n - self.named - self.only_elsewhere
        cross = both * neither - self.only_named * self.only_elsewhere
        if cross > 0:
            cross = max(0, cross - self.n / 2)
        unchanged = (self.n - self.named) * (self.n - self.elsewhere)
        return cross / math.sqrt(self.named * self.elsewhere * unchanged or 1)

    def difference(self) -> tuple[float, float, float]:
        """Share changed as named less that changed elsewhere, and its 95% interval: method 10 of
        Newcombe (1998, Statistics in Medicine 17:2635-2650), for pairs."""
        named, elsewhere = self.named / self.n, self.elsewhere / self.n
        low, high = wilson_interval(self.named, self.n)
        other_low, other_high = wilson_interval(self.elsewhere, self.n)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * self.phi * a * b + b * b))

        value = named - elsewhere
        down, up = (
            reach(named - low, other_high - elsewhere),
            reach(high - named, elsewhere - other_low),
        )
        return value, value - down, value + up


class Edits(NamedTuple):
    """What became of the strokes of a claim; None where there is none of that kind."""

    erasing: EditTest | None  # strokes said to be there are erased: does the feature turn off?
    filling: EditTest | None  # strokes said to be absent are painted: does it turn off?
    painting: EditTest | None  # both are made as said: does it turn on?


@torch.no_grad()
def edit_tests(
    strokes: Strokes,
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    editable: Editable,
    activity: Activity,
) -> Edits | None:
    """Edits of the strokes, words or places, by which a claim says or draws when a feature fires.

    One feature at a time: what is found for it cannot depend on the others, and its pictures stay
    in the processor's cache. None where no stroke is named.
    """
    if not any(strokes):
        return None
    editor = Editor(strokes, editable, h.feature)
    on, off = edited_images(h, activity)
    x, silent = editable.pixels.index_select(0, on), editable.pixels.index_select(0, off)
    pairs = {}
    if strokes.there:
        pairs["erasing"] = editor.erase(x, strokes.there)
    if strokes.absent:
        pairs["filling"] = editor.paint(x, strokes.absent)
        pairs["painting"] = editor.erase(silent, strokes.absent)
    if strokes.there:  # last, so that nothing of it is erased again
        pairs["painting"] = editor.paint(silent, strokes.there, pairs.get("painting"))
    edited = torch.cat([side for pair in pairs.values() for side in pair])
    active = (editable.feature_acts(layer, edited, h.feature) > 0).numpy()
    found = dict.fromkeys(Edits._fields)
    for name, (named, _) in pairs.items():
        n = len(named)
        changed = active[: 2 * n] if name == "painting" else ~active[: 2 * n]
        found[name] = EditTest.of(changed[:n], changed[n:])
        active = active[2 * n :]
    return Edits(**found)


# --------------------------------------------------------------------------------------------------
# Does the feature move the logits as claimed?
# --------------------------------------------------------------------------------------------------

DOSES = (0.0, 0.5, 1.0, 2.0)  # times the typical activation
TINY_DOSE = 1 / 64  # of the typical activation, for the slope of the linear prediction

Curve = tuple[float, ...] | None


class EffectTest(NamedTuple):
    """Removing a feature from n images that fire it, and adding it again in doses."""

    n: int
    raised_by: float | None  # by how much it moves the named logits, as in fh.Effect
    lowered_by: float | None
    chance_raised: float  # how far other directions of its length move some logit: the rule's
    chance_lowered: float  # percentile of them
    reach: float  # found, in units of what is asked for; of the logit where that is smaller
    reach_error: float  # standard error
    further: int  # images whose named logits move further than by that percentile of directions
    less_far: int
    doses: tuple[float, ...]  # times the typical activation
    dose_raises: Curve  # mean change of the logits at each dose
    dose_lowers: Curve
    linear_raises: Curve  # the same, extrapolated from TINY_DOSE
    linear_lowers: Curve

    @property
    def p(self) -> float:
        """Sign test: chance of this when it moves them further on half of the images."""
        return sign_test_p(self.further, self.less_far)

    @property
    def dose_follows(self) -> bool:
        """Whether each larger dose moves the named logits further."""
        up = np.diff(self.dose_raises or (0.0, 1.0))
        down = np.diff(self.dose_lowers or (1.0, 0.0))
        return bool((up > 0).all() and (down < 0).all())


@torch.no_grad()
def _logits_in_states(
    h: Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor
) -> np.ndarray:
    """(3 + doses, n, C) float64 logits of n images that fire the feature, with preactivations raw
    (n, d_in): as they are, without it, at each dose but 0, and at TINY_DOSE.

    One call of the model's head, always for one feature: no other can change its rounding.
    """
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
    """The effect part of one claim on raw preactivations (N, d_in)."""
    rule, claim = rule or Rule(), h.effect
    claims = {"raises": (claim.raises, claim.raised_by), "lowers": (claim.lowers, claim.lowered_by)}
    claims = {verb: (c, by) for verb, (c, by) in claims.items() if c is not None}
    classes = [c for c, _ in claims.values()]
    sign = np.array([1.0 if verb == "raises" else -1.0 for verb in claims])

    at, acts = activity.of(h.feature)
    chosen = spread(torch.arange(len(at)), N_EDIT)
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    base, without, *at_doses, tiny = _logits_in_states(h, layer, rows, acts)[:, :, classes]
    found = sign * (base - without)  # (n, claims)

    few = spread(torch.arange(len(rows)), DIRECTION_IMAGES)
    norm = float(layer.sae.W_dec[h.feature].norm())
    others = largest_moves(removed_by_others(layer, rows[few], acts[few], norm))
    chance = {v: float(np.quantile(by.mean(1), rule.percentile)) for v, by in others.items()}
    strength = (acts / acts.mean()).cpu().double().numpy()[:, None]  # what is removed of each
    further = (found > strength * [chance[verb] for verb in claims]).all(1)

    asked = [max(chance[verb], rule.effect_size * by) for verb, (_, by) in claims.items()]
    weaker = (found / asked)[:, (found.mean(0) / asked).argmin()]
    curve = np.stack([without, *at_doses]).mean(1) - without.mean(0)  # (doses, claims)
    line = np.outer(DOSES, (tiny - without).mean(0) / TINY_DOSE)
    by_claim = dict(zip(claims, found.mean(0).tolist(), strict=True))
    curves = dict(zip(claims, map(tuple, curve.T.tolist()), strict=True))
    lines = dict(zip(claims, map(tuple, line.T.tolist()), strict=True))
    return EffectTest(
        n=len(base),
        raised_by=by_claim.get("raises"),
        lowered_by=by_claim.get("lowers"),
        chance_raised=chance["raises"],
        chance_lowered=chance["lowers"],
        reach=float(weaker.mean()),
        reach_error=float(weaker.std() / math.sqrt(max(1, len(weaker) - 1))),
        further=int(further.sum()),
        less_far=int((~further).sum()),
        doses=DOSES,
        dose_raises=curves.get("raises"),
        dose_lowers=curves.get("lowers"),
        linear_raises=lines.get("raises"),
        linear_lowers=lines.get("lowers"),
    )


# --------------------------------------------------------------------------------------------------
# Test
# --------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """All that was measured about one claim; None or empty where that part was not claimed, or
    where the feature cannot be judged."""

    feature: int
    n_active: int
    n_images: int
    testable: bool  # whether as many images as the rule asks for fire it, and leave it silent
    label_histogram: tuple[int, ...]  # of the images that fire it
    influence: float  # its share of all that removing single features does to the logits
    changes: float  # share of the images that fire it whose prediction changes without it
    detected: dict[str, Detection]  # "ink", "class", "both"
    selected: Selection | None = None
    edits: Edits | None = None
    effect: EffectTest | None = None
    drawn: Detection | None = None  # with the drawing in place of the words
    drawn_edits: Edits | None = None
    claims_no_effect: bool = False  # whether it is claimed that removing it changes few predictions

    @property
    def auroc(self) -> float | None:
        """Of the statement as a whole."""
        return self.detected["both"].auroc if "both" in self.detected else None


def split_test_images(test: fa.Activations) -> tuple[fa.Activations, fa.Activations]:
    """The test images with even numbers, which judge, and those with odd numbers, set aside to
    check the judgement.

    Every other one, because the first and the second half of MNIST's test images were written by
    different people.
    """
    return fa.Activations(*(v[0::2] for v in test)), fa.Activations(*(v[1::2] for v in test))


def _check_testable(
    hypotheses: Sequence[Hypothesis], layer: fa.ExplainedLayer, images: Tensor
) -> None:
    seen = set()
    for h in hypotheses:
        k = fa.check_feature(h.feature, layer.d_sae)
        if k in seen:
            raise ValueError(f"feature {k} has several hypotheses: test them in calls of their own")
        seen.add(k)
    no_strokes = why_no_strokes(images)
    if no_strokes and any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        raise ValueError(f"strokes cannot be tested: {no_strokes}")


class Scored(NamedTuple):
    """By how much claims predict where features are active, on images set out once."""

    parts: dict[int, dict[str, np.ndarray]]  # by feature and part, (N,)
    drawn: dict[int, np.ndarray]  # by feature, of the drawings


def score_claims(hypotheses: Sequence[Hypothesis], images: Tensor, labels: Tensor) -> Scored:
    """Of claims about different features, on images (N, ...) with labels (N,)."""
    of_places = of_words = torch.empty(0, len(images), dtype=torch.float32)
    if any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        of_places = place_inks(images)
        of_words = word_inks(of_places)
    labels = labels.cpu()
    parts = {h.feature: part_scores(h, of_words, labels) for h in hypotheses}
    with_drawing = [h for h in hypotheses if any(h.drawing)]
    drawn = {h.feature: drawing_score(h, of_places, labels) for h in with_drawing}
    return Scored(parts, drawn)


def _check_scored(scored: Scored, n: int) -> None:
    """Raise ValueError unless the scores are of n images."""
    of_parts = (values for parts in scored.parts.values() for values in parts.values())
    found = {len(values) for values in (*of_parts, *scored.drawn.values())} - {n}
    if found:
        raise ValueError(f"the scores are of {min(found)} images, but {n} were given")


def _detect(
    scored: Scored, features: Sequence[int], activity: Activity
) -> dict[int, dict[str, Detection]]:
    """By feature, how well its parts predict where it is active; "drawn" is a part here."""
    keys, scores = [], []
    for k in features:
        for part, values in scored.parts[k].items():
            keys.append((k, part))
            scores.append(values)
        if k in scored.drawn:
            keys.append((k, "drawn"))
            scores.append(scored.drawn[k])
    active = [activity.of(k)[0].numpy() for k, _ in keys]
    found: dict[int, dict[str, Detection]] = {k: {} for k in features}
    for (k, part), one in zip(keys, detected(scores, active), strict=True):
        found[k][part] = one
    return found


def _selection(
    h: Hypothesis, scores: dict[str, np.ndarray], activity: Activity
) -> Selection | None:
    """The images that a claim describes; None for one without a score."""
    if h.threshold is None:
        return None
    at, _ = activity.of(h.feature)
    said = scores["both"] >= np.float32(h.threshold)
    return Selection(int(said.sum()), len(at), int(said[at.numpy()].sum()))


def evaluate_hypotheses(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    activity: Activity | None = None,
    seed: int = 0,
    rule: Rule | None = None,
    scored: Scored | None = None,
) -> list[Evidence]:
    """What images (N, ...) with labels (N,) say about the claims.

    detection  AUROC and average precision with which labels, ink and both predict where the feature
               is active, as worded, and as drawn
    erasing    on up to fh.N_EDIT images that fire it, the ink named is erased, and as much
               elsewhere
    filling    on the same, strokes named absent are painted, and as much elsewhere
    painting   on as many that do not, it is made as said, and as much elsewhere
    effect     on images that fire it, the feature is removed, and other directions of its length;
               then it is added in DOSES

    Claims about features that fewer than the rule's `min_active` images fire, or leave silent, are
    not tested. `activity` takes the place of the SAE's own, to see what chance gives; `scored` is
    that of `score_claims`, where it is at hand. Raises ValueError for shapes that do not fit, two
    claims about one feature, and strokes on images that cannot have them; IndexError for a feature
    that does not exist.
    """
    images, labels, raw = split
    n, rule = len(images), rule or Rule()
    activity = activity or collect_activity(layer, raw, labels)
    check_activity(activity, layer, raw)
    _check_testable(hypotheses, layer, images)
    n_active = activity.n_active.tolist()
    testable = {k for k, m in enumerate(n_active) if rule.min_active <= m <= n - rule.min_active}
    some = [h for h in hypotheses if h.feature in testable]
    scored = scored or score_claims(some, images, labels)
    _check_scored(scored, n)
    found = _detect(scored, [h.feature for h in some], activity)
    removed = removal_effects(layer, raw, activity)
    n_classes = removed.mean_delta.shape[1]
    histograms = label_histograms(activity, n_classes)
    editable = Editable.of(images, seed)

    def on_claim(h: Hypothesis) -> Evidence:
        k = h.feature
        known = Evidence(
            feature=k,
            n_active=n_active[k],
            n_images=n,
            testable=k in testable,
            label_histogram=tuple(histograms[k].tolist()),
            influence=float(removed.influence[k]),
            changes=float(removed.changes[k]),
            detected={},
        )
        if not known.testable:
            return known
        detected = dict(found[k])
        return known._replace(
            drawn=detected.pop("drawn", None),
            detected=detected,
            selected=_selection(h, scored.parts[k], activity),
            edits=edit_tests(h.ink, h, layer, editable, activity),
            effect=effect_test(h, layer, raw, activity, rule) if h.effect else None,
            drawn_edits=edit_tests(h.drawing, h, layer, editable, activity),
            claims_no_effect=h.claims_no_effect,
        )

    return [on_claim(h) for h in hypotheses]


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED, NONE = "confirmed", "inconclusive", "refuted", "no hypothesis"
CONFIDENCES = ("High", "Medium", "Low")
CONFIDENCE_RULE = """High: everything the sentence claims is confirmed, ink among it, and each
measurement clears its bar even at the pessimistic end of its 95% interval. Medium: not High, but at
least one part is confirmed and nothing is refuted. Low: the rest. A statement held on images set
aside when each measurement clears its bar there, too."""


class Measurement(NamedTuple):
    """One measured value with its 95% interval, the bar it must reach, its p-value, and the value
    that means no relation at all, which the interval must leave out."""

    value: float
    low: float
    high: float
    bar: float
    p: float | None  # None: it has none, or copies a measurement whose p-value counts
    null: float

    def outcome(self, significant: bool) -> str:
        if self.value >= self.bar and self.low > self.null and significant:
            return CONFIRMED
        return REFUTED if self.high < self.bar else INCONCLUSIVE


class Decision(NamedTuple):
    """Verdicts about one claim: on each test, on each part, and overall; and how much confidence it
    deserves."""

    feature: int
    tests: dict[str, str]
    parts: dict[str, str]
    outcome: str
    confidence: str
    explained: bool  # everything that is claimed is confirmed, and ink is claimed


TESTS_OF = {
    "ink": ("ink", *Edits._fields),
    "class": ("class",),
    "both": ("both",),
    "effect": ("effect",),
}


def measurements(evidence: Evidence, rule: Rule) -> dict[str, Measurement]:
    """What was measured, test by test, and the rule's bars."""
    found = {}
    bars = {"class": rule.class_auroc, "ink": rule.ink_auroc, "both": rule.both_auroc}
    for part, d in evidence.detected.items():
        p = None if part == "both" and len(evidence.detected) == 2 else d.p
        found[part] = Measurement(d.auroc, d.auroc_low, d.auroc_high, bars[part], p, 0.5)
    for name, test in (evidence.edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            found[name] = Measurement(*test.difference(), rule.edit_difference, test.p, 0.0)
    e = evidence.effect
    if e is not None:
        wide = Z_95 * e.reach_error
        found["effect"] = Measurement(e.reach, e.reach - wide, e.reach + wide, 1.0, e.p, 0.0)
    if evidence.claims_no_effect:
        count = round(evidence.changes * evidence.n_active)
        low, high = wilson_interval(count, evidence.n_active)
        found["little"] = Measurement(
            1 - evidence.changes, 1 - high, 1 - low, 1 - NO_EFFECT_CHANGES, None, 0.0
        )
    return found


def _joint(outcomes: Sequence[str]) -> str:
    """One refuted refutes; all confirmed confirm."""
    if REFUTED in outcomes:
        return REFUTED
    if outcomes and all(v == CONFIRMED for v in outcomes):
        return CONFIRMED
    return INCONCLUSIVE


def _decide(
    h: Hypothesis, e: Evidence, tests: dict[str, Measurement], passed: dict[str, bool]
) -> Decision:
    """One claim; `passed` says which of its tests are significant."""
    outcomes = {name: m.outcome(passed[name]) for name, m in tests.items()}
    if e.effect and outcomes["effect"] == CONFIRMED and not e.effect.dose_follows:
        outcomes["effect"] = INCONCLUSIVE
    claimed = [part for part in PARTS if h.proposes(part)]
    parts = dict.fromkeys(PARTS, NONE)
    if not claimed:
        return Decision(h.feature, {}, parts, NONE, "Low", False)

    for part in claimed:
        parts[part] = _joint([outcomes[t] for t in TESTS_OF[part] if t in outcomes])
    together = [outcomes[t] for t in (*TESTS_OF["both"], "little") if t in outcomes]
    whole = _joint([parts[part] for part in claimed] + together)
    explained = whole == CONFIRMED and h.proposes("ink")
    some = any(parts[part] == CONFIRMED for part in claimed)
    confidence = "Low"
    if explained and all(m.low >= m.bar for m in tests.values()):
        confidence = "High"
    elif some and whole != REFUTED:
        confidence = "Medium"
    return Decision(h.feature, outcomes, parts, whole, confidence, explained)


def _check_pairs(claims: Sequence, found: Sequence, what: str) -> None:
    """Raise ValueError unless both are about the same features, in the same order."""
    ours, theirs = ([one.feature for one in some] for some in (claims, found))
    if ours != theirs:
        apart = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
        where = "feature {} meets feature {}" if apart else "they are {} and {}"
        where = where.format(*(apart or [(len(ours), len(theirs))])[0])
        raise ValueError(f"{what} are not about the same features in the same order: {where}")


def decide_hypotheses(
    hypotheses: Sequence[Hypothesis], evidence: Sequence[Evidence], rule: Rule | None = None
) -> list[Decision]:
    """Verdicts and confidence, by CONFIDENCE_RULE; p-values corrected over all features and tests.

    A test is confirmed when its value reaches the bar, its interval leaves out that there is no
    relation, and it is significant; refuted when its 95% interval stays below the bar; and
    otherwise inconclusive. A part is refuted by one of its tests and confirmed by all; so is the
    whole. Raises ValueError unless the evidence is about the features of the hypotheses, in their
    order.
    """
    _check_pairs(hypotheses, evidence, "hypotheses and evidence")
    rule = rule or Rule()
    found = [measurements(e, rule) for e in evidence]
    p = [m.p for tests in found for m in tests.values() if m.p is not None]
    significant = iter(benjamini_hochberg(p, rule.false_discovery_rate).tolist())
    decisions = []
    for h, e, tests in zip(hypotheses, evidence, found, strict=True):
        passed = {name: m.p is None or next(significant) for name, m in tests.items()}
        decisions.append(_decide(h, e, tests, passed))
    return decisions


def clears_bars(evidence: Evidence, rule: Rule | None = None) -> bool | None:
    """Whether every measurement clears its bar, significant or not; None when there is none."""
    tests = measurements(evidence, rule or Rule())
    return all(m.value >= m.bar for m in tests.values()) if tests else None


# --------------------------------------------------------------------------------------------------
# Does a sentence single its feature out?
# --------------------------------------------------------------------------------------------------

CANDIDATES = 8  # features of like rate among which a sentence must find its own


class Discrimination(NamedTuple):
    """Whether the score of a sentence predicts its own feature better than others."""

    among_eight: bool  # of like firing rate
    over_nearest: bool | None  # than the nearest other in decoder cosine
    over_coactive: bool | None  # than the other that fires most on the same images


def _check_images(evidence: Sequence[Evidence], activity: Activity) -> None:
    """Raise ValueError unless the evidence is from as many images as the activity."""
    counts = {e.n_images for e in evidence} - {len(activity.labels)}
    if counts:
        n = len(activity.labels)
        raise ValueError(f"the activity is of {n} images, but the evidence of {min(counts)}")


def discriminate(
    evidence: Sequence[Evidence],
    scored: Scored,
    layer: fa.ExplainedLayer,
    activity: Activity,
) -> dict[int, Discrimination]:
    """By feature that can be judged. A sentence without a score picks nothing. Raises ValueError
    for what is of another number of images than the activity."""
    _check_images(evidence, activity)
    _check_scored(scored, len(activity.labels))
    testable = [e for e in evidence if e.testable]
    order = [e.feature for e in sorted(testable, key=lambda e: (e.n_active, e.feature))]
    nearest = fa.nearest_features(layer.sae.W_dec)
    like = [[k] if c > 0 else [] for k, c in zip(*map(Tensor.tolist, nearest), strict=True)]
    company, _ = coactivation_neighbors(activity, 1)
    n = len(activity.labels)
    active = {}  # of features that tell images apart
    for k in range(layer.d_sae):
        at = activity.of(k)[0].numpy()
        if 0 < len(at) < n:
            active[k] = at

    def beats(k: int, others: Sequence[int]) -> bool | None:
        """Whether the sentence of k predicts it better than each of the others."""
        some = [c for c in others if c in active and c != k]
        if not some:
            return None
        if "both" not in scored.parts[k]:
            return False
        best = max(auroc_of_ranks(ranks, active[c]) for c in some)
        return bool(auroc_of_ranks(ranks, active[k]) > best)

    discriminated = {}
    for place, k in enumerate(order):
        ranks = midranks(scored.parts[k]["both"]) if "both" in scored.parts[k] else None
        first = max(0, min(place - CANDIDATES // 2, len(order) - CANDIDATES))
        eight = beats(k, order[first : first + CANDIDATES])
        near = beats(k, like[k]), beats(k, company[k].tolist())
        discriminated[k] = Discrimination(eight is not False and "both" in scored.parts[k], *near)
    return discriminated


# --------------------------------------------------------------------------------------------------
# How one set of features did
# --------------------------------------------------------------------------------------------------

BANDS = (0.003, 0.01, 0.03)  # firing rates at which bands of features end


class Band(NamedTuple):
    """Features whose firing rate is in a band."""

    upto: float  # 1.0: the last band
    features: int
    explained: int


class Replication(NamedTuple):
    """Statements of one confidence, and those of them that could be checked and held on images set
    aside."""

    hypotheses: int
    checked: int
    replicated: int


class Shares(NamedTuple):
    """Shares of the features that can be judged; of influence, where it says so."""

    features: int
    too_rare: int  # features that cannot be judged; they count in no share
    explained: float
    explained_low: float  # 95% interval, over features
    explained_high: float
    ink_confirmed: float
    class_confirmed: float
    effect_confirmed: float
    predicted: float  # the sentence reaches the AUROC asked for
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
    median_density: float | None  # share of the images that fire the median of these features
    bands: list[dict]
    confidence: dict[str, dict]


def _mean(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _bands(pairs: Sequence[tuple[Evidence, Decision]]) -> list[dict]:
    bands = []
    for low, high in zip((0.0, *BANDS), (*BANDS, 1.0), strict=True):
        some = [j for e, j in pairs if low < e.n_active / e.n_images <= high]
        bands.append(Band(high, len(some), sum(j.explained for j in some))._asdict())
    return bands


def confidence_check(
    decisions: Sequence[Decision], replicated: Sequence[bool | None]
) -> dict[str, dict]:
    """Of the statements of each confidence, and of all, how many held on the images set aside."""
    check = {}
    for name in (*CONFIDENCES, "all"):
        pairs = [(j, h) for j, h in zip(decisions, replicated, strict=True) if j.outcome != NONE]
        again = [h for j, h in pairs if name in (j.confidence, "all")]
        seen = [h for h in again if h is not None]
        check[name] = Replication(len(again), len(seen), sum(seen))._asdict()
    return check


def shares_explained(
    evidence: Sequence[Evidence],
    decisions: Sequence[Decision],
    discriminated: dict[int, Discrimination],
    replicated: Sequence[bool | None],
    rule: Rule,
) -> Shares:
    """How one set of features did; zeros where none can be judged. Raises ValueError unless
    evidence and judgements are about the same features."""
    _check_pairs(evidence, decisions, "evidence and judgements")
    pairs = [(e, j) for e, j in zip(evidence, decisions, strict=True) if e.testable]
    n = max(1, len(pairs))
    explained = sum(j.explained for _, j in pairs)
    low, high = wilson_interval(explained, n)
    confirmed = {part: sum(j.parts[part] == CONFIRMED for _, j in pairs) / n for part in PARTS}
    aurocs = [e.auroc for e, _ in pairs if e.auroc is not None]
    selected = [e.selected for e, _ in pairs if e.selected]
    drawn = [e.drawn.auroc >= rule.both_auroc for e, _ in pairs if e.drawn]
    picks = [discriminated[e.feature] for e, _ in pairs]
    return Shares(
        features=len(pairs),
        too_rare=len(evidence) - len(pairs),
        explained=explained / n,
        explained_low=low,
        explained_high=high,
        ink_confirmed=confirmed["ink"],
        class_confirmed=confirmed["class"],
        effect_confirmed=confirmed["effect"],
        predicted=sum(auroc >= rule.both_auroc for auroc in aurocs) / n,
        drawn=sum(drawn) / n if drawn else None,
        median_auroc=_median(aurocs),
        median_precision=_median([d.precision for d in selected]),
        median_recall=_median([d.recall for d in selected]),
        average_precision=_median(
            [e.detected["both"].average_precision for e, _ in pairs if e.detected]
        ),
        among_eight=sum(p.among_eight for p in picks) / n,
        over_nearest=_mean([p.over_nearest for p in picks]),
        over_coactive=_mean([p.over_coactive for p in picks]),
        influence_explained=sum(e.influence for e, j in pairs if j.explained),
        influence_high=sum(e.influence for e, j in pairs if j.confidence == "High"),
        median_density=_median([e.n_active / e.n_images for e, _ in pairs]),
        bands=_bands(pairs),
        confidence=confidence_check(decisions, replicated),
    )


class Comparison(NamedTuple):
    """How one set of features did."""

    shares: Shares
    aurocs: list[float]  # of the sentences on features that can be judged; 0 without one


def comparison_of(
    evidence: Sequence[Evidence],
    decisions: Sequence[Decision],
    discriminated: dict[int, Discrimination],
    replicated: Sequence[bool | None],
    rule: Rule,
) -> Comparison:
    """From what came of one set of features."""
    aurocs = [e.auroc or 0.0 for e in evidence if e.testable]
    return Comparison(
        shares_explained(evidence, decisions, discriminated, replicated, rule), aurocs
    )


# --------------------------------------------------------------------------------------------------
# The trial as a whole
# --------------------------------------------------------------------------------------------------

STRONGEST = 10  # images named for a feature


class Evaluation(NamedTuple):
    """Claims with all that is known about them, in the order of the features."""

    hypotheses: list[Hypothesis]
    rule: Rule
    evidence: list[Evidence]
    decisions: list[Decision]
    replicated: list[bool | None]  # whether they held on the images set aside; None: too few
    n_replication: int  # how many images those were
    top_images: list[list[int]]  # numbers of the test images that fire each feature most
    edited: list[tuple[list[int], list[int]]]  # ... and of those edited: some fire it, some do not
    result: Comparison


def make_evaluation(
    hypotheses: list[Hypothesis],
    rule: Rule,
    evidence: list[Evidence],
    replication_evidence: Sequence[Evidence],
    activity: Activity,
    discriminated: dict[int, Discrimination],
) -> Evaluation:
    """Judge the claims by the evidence, and say on which images it rests: `activity` is that of the
    judging images, number i of which is number 2 i of the test images. Raises ValueError for what
    does not belong together."""
    decisions = decide_hypotheses(hypotheses, evidence, rule)
    _check_pairs(
        hypotheses, replication_evidence, "hypotheses and the evidence of images set aside"
    )
    _check_images(evidence, activity)
    top_images, edited = [], []
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:STRONGEST]
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
    """The comparisons with the SAE's own features in front."""
    return {"SAE": evaluation.result, **comparisons}


def influence_course(evaluation: Evaluation) -> dict[str, int]:
    """How many features, the most influential first, make 50, 90 and 99% of the influence."""
    falling = np.sort([e.influence for e in evaluation.evidence])[::-1].cumsum()
    if not falling[-1]:
        return {}
    return {f"{q:.0%}": int(np.searchsorted(falling, q - 1e-9)) + 1 for q in (0.5, 0.9, 0.99)}


def evaluation_record(
    evaluation: Evaluation, comparisons: dict[str, Comparison], sha256: str
) -> dict:
    """What summary.json says about the trial; `sha256` is that of the frozen claims."""
    words = [len(caption(h).split()) for h in evaluation.hypotheses if h.proposes("ink")]
    return {
        "sha256": sha256,
        "rule": evaluation.rule._asdict(),
        "confidence_rule": " ".join(CONFIDENCE_RULE.split()),
        "shares": {n: c.shares._asdict() for n, c in all_shares(evaluation, comparisons).items()},
        "features_that_make_influence": influence_course(evaluation),
        "median_words": _median(words),
    }
