"""Are the hypotheses true of images on which they were not proposed? Tests and confidence.

    evidence = evaluate_hypotheses(hypotheses, layer, images, labels)   # what was measured
    decision = decide(evidence[0], rule)                                # confidence, and why
    evaluation = make_evaluation(hypotheses, rule, ...)                 # everything of one SAE

Takes hypotheses with their thresholds, an `ExplainedLayer` and test images; gives numbers. It
proposes nothing, and puts nothing into words: `text` does that. A hypothesis without a drawing is
tested by the classes and the place that it names.

Key: N test images, C classes, F hypotheses, P cells of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activations import part_of
from saexplain.activity import (
    Activity,
    Removals,
    check_activity,
    collect_activity,
    removal_effects,
)
from saexplain.crops import Crops, can_draw_crops
from saexplain.edits import Drawn, EditTest, edit_tests, edited_images
from saexplain.hypotheses import (
    CONFIDENCES,
    HIGH_PLACE_SHARE,
    LEAST_PLACE_SHARE,
    MIN_ACTIVE,
    Hypothesis,
    Places,
    Rule,
    acts_on,
    chance_f1,
    evenly_spaced,
    fit_canvas,
    fit_canvas_of_crops,
    ink_levels,
    is_slow,
    label_histograms,
    null_effect,
    place_cells,
    scores_of,
    strong_histogram,
    strong_pairs,
    with_thresholds,
)
from saexplain.ink import Canvas
from saexplain.patterns import correlations
from saexplain.progress import progress_bar
from saexplain.statistics import Z_95, Detection, score_detections, wilson_interval
from saexplain.substitution import Agreements

# --------------------------------------------------------------------------------------------------
# Does the drawing pick the images on which the feature is active?
# --------------------------------------------------------------------------------------------------


class Picked(NamedTuple):
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

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.both / max(1, self.n + self.active)


# --------------------------------------------------------------------------------------------------
# Are the classes named more frequent, and do the logits named change?
# --------------------------------------------------------------------------------------------------

DOSES = (0.0, 0.5, 1.0, 2.0)  # times the mean activation on the images tested
TINY_DOSE = 1 / 64  # of the same, for the slope of the linear prediction
EFFECT_IMAGES = 48  # active images from which the feature is removed
EFFECT_IMAGES_SLOW = 32  # the same where the rest of the network takes long ...
DOSED_IMAGES_SLOW = 8  # ... and those of them to which doses are added
SCORED_AT_ONCE = 256  # drawings, which bounds the memory of their scores
MANY_CLASSES = 20  # from more classes on, the change of each logit is kept


class ClassTest(NamedTuple):
    """The share of the active images, or of those strongly active, that are of the classes, or
    whose peak is in the place, named."""

    share: float
    low: float  # 95% interval
    high: float
    usual: float  # their share of all images, or of the peaks of all features


class LogitChange(NamedTuple):
    """By how much a feature raises, or lowers, a logit: what removing it takes away."""

    logit: int
    by: float  # mean over the images
    low: float  # 95% interval
    high: float
    null: float  # mean change that the rule's percentile of random directions do not exceed
    at_doses: tuple[float, ...]  # mean change of the logit when the feature is added in DOSES
    linear: tuple[float, ...]  # the same, extrapolated from TINY_DOSE


def measure_classes(
    h: Hypothesis, histogram: np.ndarray, label_counts: np.ndarray
) -> ClassTest | None:
    """The test of the classes of a hypothesis, by counts (C,) of active, or strongly active, and of
    all, images."""
    if not h.classes:
        return None
    named = list(h.classes)
    count, n = int(histogram[named].sum()), int(histogram.sum())
    usual = label_counts[named].sum() / label_counts.sum()
    return ClassTest(count / n, *wilson_interval(count, n), float(usual))


def measure_place(h: Hypothesis, places: Places | None) -> ClassTest | None:
    """The test of the place of a hypothesis, where it has one and the layer has positions."""
    if not h.place or places is None:
        return None
    cells, peaks = place_cells(h.place, places.grid), places.peaks(h.feature, h.strong_from)
    count, n = int(cells.ravel()[peaks[peaks >= 0]].sum()), len(peaks)
    usual = float(places.usual_peaks(h.strong_from)[cells].sum())
    return ClassTest(count / n, *wilson_interval(count, n), usual)


def pick_classes(h: Hypothesis, histogram: np.ndarray, label_counts: np.ndarray) -> Picked | None:
    """What an undrawn hypothesis predicts to be active, the images of the classes named, by counts
    (C,) of active, or strongly active, and of all, images."""
    if not (h.undrawn and h.classes):
        return None
    named = list(h.classes)
    counts = label_counts[named].sum(), histogram.sum(), histogram[named].sum()
    return Picked(*(int(count) for count in counts))


@torch.no_grad()
def measure_effects(
    h: Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, activity: Activity, percentile: float
) -> dict[str, LogitChange]:
    """The tests of the logits that a hypothesis "raises" and "lowers", on raw (N, ...). Where the
    layer has positions a dose is a multiple of the feature's own map."""
    named = {verb: getattr(h, verb) for verb in ("raises", "lowers")}
    named = {verb: logit for verb, logit in named.items() if logit is not None}
    if not named:
        return {}
    k, (at, acts) = h.feature, activity.of(h.feature)
    slow = EFFECT_IMAGES_SLOW, DOSED_IMAGES_SLOW
    most = slow if is_slow(layer) else (EFFECT_IMAGES, EFFECT_IMAGES)
    some = evenly_spaced(torch.arange(len(at)), most[0])
    few = evenly_spaced(torch.arange(len(some)), most[1]).to(raw.device)
    rows = raw[at[some].to(raw.device)]
    acts = acts_on(layer, rows, k, acts[some])
    without = layer.without(rows, k, acts)
    typical = acts[few] if layer.has_positions else float(acts.mean())
    changed = [without] + [
        layer.adding(without[few], k, typical * dose) for dose in (*DOSES[1:], TINY_DOSE)
    ]
    base, none, *dosed = (layer.logits(state).cpu().double() for state in (rows, *changed))
    dosed = [logits - none[few.cpu()] for logits in dosed]
    null = null_effect(k, layer, rows, acts, percentile)
    found = {}
    for verb, logit in named.items():
        lost = (base - none if verb == "raises" else none - base)[:, logit].numpy()
        reach = Z_95 * float(lost.std(ddof=1)) / np.sqrt(len(lost))
        mean = float(lost.mean())
        *at_doses, tiny = (float(change[:, logit].numpy().mean()) for change in dosed)
        curve, slope = [0.0, *at_doses], tiny / TINY_DOSE
        line = [dose * slope for dose in DOSES]
        given = (mean, mean - reach, mean + reach, null[verb])
        found[verb] = LogitChange(logit, *given, tuple(curve), tuple(line))
    return found


# --------------------------------------------------------------------------------------------------
# All tests of all hypotheses
# --------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """What was measured about one hypothesis; None or empty where it says nothing, and for all of a
    feature that is not testable."""

    feature: int
    n_active: int
    n_images: int
    label_histogram: tuple[int, ...]  # of the active images
    influence: float | None = None  # share of the logit effect of all single ablations
    changes: float | None = None  # share of the active images whose prediction changes without it
    picked: Picked | None = None  # by the score; of an undrawn hypothesis, by the classes named
    detection: Detection | None = None  # by the score
    correlation: float | None = None  # of the score with the pre-activation, z W_enc
    edits: dict[str, EditTest] = {}  # noqa: RUF012 - never changed
    classes: ClassTest | None = None
    effects: dict[str, LogitChange] = {}  # noqa: RUF012
    place: ClassTest | None = None
    delta: tuple[float, ...] = ()  # mean change of each logit without it, of MANY_CLASSES or more
    undrawn: bool = False  # by intent, with a reason
    n_strong: int | None = None  # images from the hypothesis's `strong_from` on, if it has one
    at_positions: bool = False  # of a layer with positions

    @property
    def n_counted(self) -> int:
        """The images that count as active for the classes and the place."""
        return self.n_active if self.n_strong is None else self.n_strong

    @property
    def chance_f1(self) -> float:
        """F1 of picking every image."""
        return chance_f1(self.n_counted / self.n_images)

    @property
    def is_testable(self) -> bool:
        """Whether enough images are active and, unless nothing is drawn, inactive."""
        return self.n_counted >= MIN_ACTIVE and (
            self.undrawn or self.n_images - self.n_counted >= MIN_ACTIVE
        )

    @property
    def f1(self) -> float | None:
        """0 for a testable feature without a drawing, None for one that is not testable, and for
        one that is undrawn and names no classes."""
        if not self.is_testable or (self.undrawn and not self.picked):
            return None
        return self.picked.f1 if self.picked else 0.0

    @property
    def f1_of_drawing(self) -> float | None:
        """The F1, where it is not that of classes."""
        return None if self.undrawn else self.f1


@torch.no_grad()
def collect_evidence(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    canvas: Canvas | None,
    rule: Rule | None = None,
    activity: Activity | None = None,
    removed: Removals | None = None,
    in_full: bool = True,
    drawn: Sequence[Drawn | None] | None = None,
) -> list[Evidence]:
    """The evidence of the images of `split` for hypotheses, of which several may be about one
    feature.

    Without `in_full` neither logits nor, of drawn hypotheses, classes are tested, and influence and
    the score's ranking are left out; `drawn` are the drawings prepared by `prepare_drawings`, where
    they are at hand. A given `activity` replaces the SAE's own, as for a test under chance. Raises
    ValueError for an activity of other images, drawings of another shape than the canvas's, and a
    drawing without a threshold.
    """
    rule, raw = rule or Rule(), split.raw
    activity = activity or collect_activity(layer, raw, split.labels)
    check_activity(activity, layer, raw)
    check_hypotheses(hypotheses, layer, canvas)
    if in_full:
        removed = removed or removal_effects(layer, raw, activity)
    histograms = label_histograms(activity, layer.n_classes)
    label_counts = torch.bincount(activity.labels, minlength=histograms.shape[1]).numpy()
    evidence = [
        count_images(h, layer, activity, histograms[h.feature], removed if in_full else None)
        for h in hypotheses
    ]
    tested = [i for i, e in enumerate(evidence) if e.is_testable and hypotheses[i].is_drawn]
    own = [hypotheses[i] for i in tested]
    prepared = [drawn[i] if drawn else None for i in tested]
    found = evaluate_drawings(own, layer, split, canvas, activity, in_full, prepared)
    for i, of_drawing in zip(tested, found, strict=True):
        evidence[i] = evidence[i]._replace(**of_drawing)

    places = Places.of(layer, activity) if layer.has_positions else None
    pairs = zip(hypotheses, evidence, strict=True)
    for i, (h, e) in enumerate(progress_bar(pairs, "tested", len(hypotheses))):
        if not e.is_testable:
            continue
        if in_full or h.undrawn:
            counted = histograms[h.feature]
            if h.strong_from is not None:
                counted = strong_histogram(h.feature, activity, h.strong_from, len(label_counts))
            classes = measure_classes(h, counted, label_counts)
            picked = e.picked or pick_classes(h, counted, label_counts)
            e = e._replace(classes=classes, place=measure_place(h, places), picked=picked)
        if in_full:
            e = e._replace(effects=measure_effects(h, layer, raw, activity, rule.percentile))
        evidence[i] = e
    return evidence


def count_images(
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    activity: Activity,
    histogram: np.ndarray,
    removed: Removals | None,
) -> Evidence:
    """The evidence before anything is tested: how many images activate the feature, `histogram`
    (C,) by label, and what removing it does, if that is known."""
    k = h.feature
    known = {}
    if removed:
        known = {"influence": float(removed.influence[k]), "changes": float(removed.changes[k])}
        if len(histogram) > MANY_CLASSES:
            known["delta"] = tuple(removed.mean_delta[k].tolist())
    if h.strong_from is not None:
        known["n_strong"] = int(strong_pairs(k, activity, h.strong_from).sum())
    return Evidence(
        k,
        int(activity.n_active[k]),
        len(activity.labels),
        tuple(histogram.tolist()),
        undrawn=bool(h.undrawn),
        at_positions=layer.has_positions,
        **known,
    )


def evaluate_drawings(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    canvas: Canvas,
    activity: Activity,
    in_full: bool,
    drawn: Sequence[Drawn | None],
) -> Iterator[dict]:
    """Of each drawn hypothesis, the fields of `Evidence` about its drawing, in their order."""
    if not hypotheses:
        return
    if any(h.threshold is None for h in hypotheses):
        raise ValueError("each hypothesis must have a threshold: see with_thresholds")
    crops = crops_on(canvas, layer, split.images)
    levels = None if crops else ink_levels(canvas, split.images)
    for first in range(0, len(hypotheses), SCORED_AT_ONCE):
        own = hypotheses[first : first + SCORED_AT_ONCE]
        weights = np.stack([h.weights for h in own])
        scores = crops.scores(weights, split.images)[0] if crops else scores_of(weights, levels)
        active = [
            activity.of(h.feature)[0][strong_pairs(h.feature, activity, h.strong_from)] for h in own
        ]
        ranked = found = [None] * len(own)
        if in_full:
            ranked = score_detections(list(scores.numpy()), [at.numpy() for at in active])
            readouts = layer.sae.W_enc.detach()[:, [h.feature for h in own]]
            found = correlations(scores, pre_activations(layer, split.raw, readouts)).tolist()
        for n, (h, at) in enumerate(
            progress_bar(zip(own, active, strict=True), "edited", len(own))
        ):
            predicted = scores[n] >= h.threshold
            picked = Picked(int(predicted.sum()), len(at), int(predicted[at].sum()))
            given = (h, layer, split.images, activity, canvas, drawn[first + n], crops)
            yield {
                "picked": picked,
                "detection": ranked[n],
                "correlation": found[n],
                "edits": edit_tests(*given),
            }


def crops_on(canvas: Canvas, layer: fa.ExplainedLayer, images) -> Crops | None:
    """The crops of images (N, C, H, W) around the layer's positions, if the canvas is one of crops,
    not of whole images."""
    if not layer.has_positions or canvas.image_shape == tuple(images.shape[1:]):
        return None
    return Crops.of(canvas, layer.positions, tuple(images.shape[-2:]))


def pre_activations(layer: fa.ExplainedLayer, raw: Tensor, readouts: Tensor) -> Tensor:
    """(F, N) on the CPU, z W_enc of features with columns `readouts` (d_in, F) of W_enc; of a layer
    with positions, the largest."""
    pre = layer.standardize(raw) @ readouts
    return (pre.amax(1) if pre.dim() == 3 else pre).T.cpu()


def prepare_drawings(hypotheses: Sequence[Hypothesis], canvas: Canvas) -> list[Drawn | None]:
    """The drawings of hypotheses, prepared for edits; None for an empty one."""
    return [Drawn.of(h.weights, canvas) if h.is_drawn else None for h in hypotheses]


def check_hypotheses(
    hypotheses: Sequence[Hypothesis], layer: fa.ExplainedLayer, canvas: Canvas | None
) -> None:
    """Raise ValueError, or IndexError, for a hypothesis that does not fit the layer or canvas.
    Without a canvas, nothing may be drawn."""
    n_classes = layer.n_classes
    for h in hypotheses:
        fa.check_feature(h.feature, layer.d_sae)
        if h.is_drawn and canvas is None:
            raise ValueError(f"feature {h.feature} must have no drawing: there is no canvas")
        if h.place and not layer.has_positions:
            raise ValueError(
                f"feature {h.feature}: only layers with positions have a place; leave it out"
            )
        if h.strong_from is not None and not layer.has_positions:
            raise ValueError(
                f"feature {h.feature}: only for layers with positions strong_from counts; leave it "
                f"out"
            )
        if canvas is not None and not h.undrawn and h.weights.shape != canvas.shape:
            raise ValueError(
                f"the drawing of feature {h.feature} must have shape {canvas.shape}, got "
                f"{h.weights.shape}"
            )
        named = (*h.classes, h.raises or 0, h.lowers or 0)
        if max(named) >= n_classes:
            raise ValueError(
                f"feature {h.feature}: classes and logits are 0 to {n_classes - 1}, got "
                f"{max(named)}"
            )


def canvas_for(hypotheses: Sequence[Hypothesis], layer: fa.ExplainedLayer, images) -> Canvas:
    """The canvas of images (N, C, H, W), or of crops, where the layer has positions and drawings
    are smaller."""
    sides = {h.weights.shape for h in hypotheses if h.is_drawn}
    whole = fit_canvas(images)
    if layer.has_positions and sides and whole.shape not in sides:
        side = min(sides)
        if can_draw_crops(side, tuple(images.shape[-2:])):
            return fit_canvas_of_crops(images, layer.positions, side)[0]
    return whole


def evaluate_hypotheses(
    hypotheses: Sequence[Hypothesis], layer: fa.ExplainedLayer, images: Tensor, labels: Tensor
) -> list[Evidence]:
    """The evidence of test images (N, ...) with labels (N,) for hypotheses.

        layer = load_run("artifacts_mnist_sae").layer
        (e,) = evaluate_hypotheses([Hypothesis(116, wanted=mask)], layer, images, labels)
        e.picked.f1, e.picked.precision, e.detection.auroc, e.edits["erasing"].difference()

    Several may be about one feature. A hypothesis without a threshold gets the one with the largest
    F1 on the layer's split "val", which therefore must not hold the test images; drawings of what a
    position sees must have one. Raises ValueError, or IndexError, for hypotheses that do not fit
    the layer.
    """
    val, rule = layer.splits["val"], Rule()
    canvas = canvas_for(hypotheses, layer, val.images)
    check_hypotheses(hypotheses, layer, canvas)
    if not crops_on(canvas, layer, val.images) and any(h.threshold is None for h in hypotheses):
        activity = collect_activity(layer, val.raw, val.labels)
        hypotheses = with_thresholds(hypotheses, ink_levels(canvas, val.images), activity)
    split = layer.activations(images, labels)
    activity = collect_activity(layer, split.raw, split.labels)
    removed = removal_effects(layer, split.raw, activity)
    return collect_evidence(hypotheses, layer, split, canvas, rule, activity, removed)


def split_test_images(test: fa.Activations) -> tuple[fa.Activations, fa.Activations]:
    """The test half, images with even numbers, and the replication half, those with odd ones.

    Every other one, because the first and the second half of MNIST's test images were written by
    different people. Images that are not in memory are not read for it.
    """
    images, labels, raw = test
    halves = []
    for part in (slice(0, None, 2), slice(1, None, 2)):
        halves.append(fa.Activations(part_of(images, part), labels[part], raw[part]))
    return halves[0], halves[1]


# --------------------------------------------------------------------------------------------------
# Confidence
# --------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED = "confirmed", "inconclusive", "refuted"
CONFIDENCE_RULE = """High: F1 is at least {high_f1:g} and {high_lift:g} above that of picking every
image, and each edit as drawn changes the activity on {edit_difference:.0%} more of the images than
the same edit elsewhere, with a 95% interval above 0. Medium: F1 is at least {medium_f1:g} and
{medium_lift:g} above that of picking every image, and at least one edit is so confirmed. Low: the
rest."""
UNDRAWN_RULE = """Of a hypothesis without a drawing: Medium: the place that it names is confirmed,
or the classes are, and their images predict it better than picking every image does. High: so is
another of its results, none is refuted, and the F1 of picking the images of the classes named is at
least {high_f1:g} and {high_lift:g} above that of picking every image, or {high_place:.0%} of its
peaks are in the place. Low: the rest; effects on scores alone say what the feature does, not why
it is active."""


class Decision(NamedTuple):
    """The result of each test of one hypothesis, and the confidence in its drawing."""

    feature: int
    results: dict[str, str]  # by test: "erasing", "filling", "painting", "classes", "place", ...
    confidence: str  # one of CONFIDENCES


def interval_result(value: float, low: float, high: float, bar: float, null: float) -> str:
    """CONFIRMED where a value reaches its bar and its interval leaves out the null, REFUTED where
    the interval stays below the bar."""
    if value >= bar and low > null:
        return CONFIRMED
    return REFUTED if high < bar else INCONCLUSIVE


def decide(evidence: Evidence, rule: Rule | None = None) -> Decision:
    """The results and the confidence by CONFIDENCE_RULE, or UNDRAWN_RULE. Of a drawn hypothesis
    classes and logits are results of their own, and no part of the confidence in the drawing."""
    rule, results = rule or Rule(), {}
    for name, test in evidence.edits.items():
        results[name] = interval_result(*test.difference(), rule.edit_difference, 0.0)
    edits = list(results.values())
    if evidence.classes:
        share, low, high, usual = evidence.classes
        results["classes"] = interval_result(share, low, high, rule.enrichment * usual, usual)
    if evidence.place:
        share, low, high, usual = evidence.place
        bar = max(LEAST_PLACE_SHARE, rule.enrichment * usual)
        results["place"] = interval_result(share, low, high, bar, usual)
    for verb, c in evidence.effects.items():
        results[verb] = interval_result(c.by, c.low, c.high, c.null, c.null)
    if evidence.undrawn:
        return Decision(evidence.feature, results, confidence_undrawn(evidence, results, rule))
    confidence = "Low"
    if evidence.picked:
        f1, lift = evidence.picked.f1, evidence.picked.f1 - evidence.chance_f1
        if f1 >= rule.high_f1 and lift >= rule.high_lift and set(edits) == {CONFIRMED}:
            confidence = "High"
        elif f1 >= rule.medium_f1 and lift >= rule.medium_lift and CONFIRMED in edits:
            confidence = "Medium"
    return Decision(evidence.feature, results, confidence)


def confidence_undrawn(evidence: Evidence, results: dict[str, str], rule: Rule) -> str:
    """The confidence by UNDRAWN_RULE."""
    picked, place, found = evidence.picked, evidence.place, list(results.values())
    predicts = picked is None or picked.f1 > evidence.chance_f1
    by_class = results.get("classes") == CONFIRMED and predicts
    if not by_class and results.get("place") != CONFIRMED:
        return "Low"
    is_sharp = place is not None and place.share >= HIGH_PLACE_SHARE
    if picked and picked.f1 >= rule.high_f1:
        is_sharp |= picked.f1 - evidence.chance_f1 >= rule.high_lift
    is_high = is_sharp and found.count(CONFIRMED) > 1 and REFUTED not in found
    return "High" if is_high else "Medium"


def is_replicated(confidence: str, again: Evidence, rule: Rule | None = None) -> bool | None:
    """Whether the evidence of other images gives at least the same confidence; None where these
    have too few active, or inactive, images, and for Low, below which nothing is."""
    if not again.is_testable or confidence == CONFIDENCES[-1]:
        return None
    found = decide(again, rule).confidence
    return CONFIDENCES.index(found) <= CONFIDENCES.index(confidence)


# --------------------------------------------------------------------------------------------------
# Summary of one set of features
# --------------------------------------------------------------------------------------------------

BANDS = (0.01, 0.03, 0.1)  # rates at which bands of features end
RANKS_WELL = 0.85  # AUROC
UNDRAWN_RESULTS = ("classes", "place", "raises", "lowers")


class Summary(NamedTuple):
    """Numbers of one set of features: an SAE's, or a baseline's. Means and shares are over testable
    features, and None without any."""

    features: int  # testable ones
    too_rare: int  # not testable: too few active images
    l0: float  # features active per image, of all
    agreement: float  # with the network, with the set's own activations in place of the layer's
    agreement_hypotheses: float | None  # ... and with what drawings predict; None: not compared
    f1_mean: float | None  # of drawings, as the numbers below
    f1_by_influence: float | None  # weighted by influence
    chance_mean: float | None  # F1 of picking every image
    average_precision: float | None
    auroc_above: float | None  # share with an AUROC of RANKS_WELL
    correlation: float | None  # of score and pre-activation
    edits: dict[str, float | None]  # share of the tests of each kind that are confirmed
    influence_high: float  # share of the influence that features with confidence High have
    influence_medium: float
    median_rate: float | None
    bands: list[dict]  # by rate: upto, features, f1
    confidence: dict[str, dict]  # by confidence: hypotheses, checked, replicated
    undrawn: dict | None = None  # `summarize_undrawn`, if a hypothesis has no drawing by intent

    def as_record(self) -> dict:
        """The summary as JSON values, without `undrawn` where there is none."""
        return {name: v for name, v in self._asdict().items() if name != "undrawn" or v}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def count_replicated(rows: Sequence[Row]) -> dict[str, dict]:
    """Of each confidence, and of all: how many hypotheses there are, how many could be checked on
    the replication half, and how many were replicated; and their mean F1 on both halves."""
    counts = {}
    for name in (*CONFIDENCES, "all"):
        some = [row for row in rows if name in (row.decision.confidence, "all")]
        seen = [row.replicated for row in some if row.replicated is not None]
        counts[name] = {
            "hypotheses": len(some),
            "checked": len(seen),
            "replicated": sum(seen),
            "f1": _mean([row.evidence.f1_of_drawing for row in some]),
            "f1_again": _mean([row.again.f1_of_drawing for row in some]),
        }
    return counts


class Row(NamedTuple):
    """One hypothesis with the evidence of both halves of the test images."""

    evidence: Evidence
    decision: Decision
    again: Evidence  # of the replication half
    replicated: bool | None  # as `is_replicated` has it

    @classmethod
    def of(cls, evidence: Evidence, again: Evidence, rule: Rule) -> Row:
        decision = decide(evidence, rule)
        return cls(evidence, decision, again, is_replicated(decision.confidence, again, rule))


def evaluate_halves(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    halves: tuple[fa.Activations, fa.Activations],
    canvas: Canvas,
    rule: Rule,
    activity: Activity | None = None,
) -> list[Row]:
    """Hypotheses tested on the first of `halves`, whose `activity` may be given, and again on the
    second."""
    half, other_half = halves
    drawn = prepare_drawings(hypotheses, canvas)
    evidence = collect_evidence(hypotheses, layer, half, canvas, rule, activity, drawn=drawn)
    other = collect_activity(layer, other_half.raw, other_half.labels)
    given = (hypotheses, layer, other_half, canvas, rule, other)
    again = collect_evidence(*given, in_full=False, drawn=drawn)
    for i, (h, e) in enumerate(zip(hypotheses, evidence, strict=True)):
        # Only of these does the confidence depend on effects.
        if h.undrawn and again[i].is_testable and decide(e, rule).confidence == "High":
            effects = measure_effects(h, layer, other_half.raw, other, rule.percentile)
            again[i] = again[i]._replace(effects=effects)
    return [Row.of(*both, rule) for both in zip(evidence, again, strict=True)]


def summarize_undrawn(rows: Sequence[Row]) -> dict | None:
    """Of the testable features without a drawing by intent: how many there are, the mean F1 of
    picking the images of the classes named, and for each kind of result how many are named, and
    which share is confirmed. None without any."""
    some = [row for row in rows if row.evidence.undrawn]
    if not some:
        return None
    by_class = [row.evidence for row in some if row.evidence.picked]
    counts = {
        "features": len(some),
        "f1": _mean([e.f1 for e in by_class]),
        "chance_f1": _mean([e.chance_f1 for e in by_class]),
    }
    for name in UNDRAWN_RESULTS:
        results = [r.decision.results[name] for r in some if name in r.decision.results]
        confirmed = _mean([result == CONFIRMED for result in results])
        counts[name] = {"named": len(results), "confirmed": confirmed}
    return counts


def summarize(
    rows: Sequence[Row], l0: float, agreement: float, agreement_hypotheses: float | None
) -> Summary:
    """The summary of one set of features; l0 and agreements as in `Summary`."""
    testable = [row for row in rows if row.evidence.is_testable]
    own = [row.evidence for row in testable]
    drawn = [e for e in own if not e.undrawn]
    f1, influence = [e.f1 for e in drawn], [e.influence for e in drawn]
    bands = []
    for low, high in zip((0.0, *BANDS), (*BANDS, 1.0), strict=True):
        some = [e.f1_of_drawing for e in own if low < e.n_active / e.n_images <= high]
        bands.append({"upto": high, "features": len(some), "f1": _mean(some)})
    edits = {}
    for name in ("erasing", "filling", "painting"):
        results = [r.decision.results[name] for r in testable if name in r.decision.results]
        edits[name] = _mean([result == CONFIRMED for result in results])
    by_confidence = dict.fromkeys(CONFIDENCES, 0.0)
    for row in rows:
        by_confidence[row.decision.confidence] += row.evidence.influence
    ranked = [e.detection for e in own if e.detection]
    total, of_all = sum(influence), sum(row.evidence.influence for row in rows)
    return Summary(
        features=len(own),
        too_rare=len(rows) - len(own),
        l0=l0,
        agreement=agreement,
        agreement_hypotheses=agreement_hypotheses,
        f1_mean=_mean(f1),
        f1_by_influence=float(np.dot(f1, influence)) / total if total else None,
        chance_mean=_mean([e.chance_f1 for e in drawn]),
        average_precision=_mean([d.average_precision for d in ranked]),
        auroc_above=_mean([d.auroc >= RANKS_WELL for d in ranked]),
        correlation=_mean([e.correlation for e in own]),
        edits=edits,
        influence_high=by_confidence["High"] / of_all if of_all else 0.0,
        influence_medium=by_confidence["Medium"] / of_all if of_all else 0.0,
        median_rate=float(np.median([e.n_active / e.n_images for e in own])) if own else None,
        bands=bands,
        confidence=count_replicated(testable),
        undrawn=summarize_undrawn(testable),
    )


# --------------------------------------------------------------------------------------------------
# Everything of one SAE
# --------------------------------------------------------------------------------------------------

STRONGEST = 10  # images listed for a feature


class Evaluation(NamedTuple):
    """Hypotheses with all that was measured and decided, in the order of the features."""

    hypotheses: list[Hypothesis]
    rule: Rule
    rows: list[Row]
    n_discovery: int  # validation images
    top_images: list[list[int]]  # numbers of the test images that activate each feature most
    edited: list[tuple[list[int], list[int]]]  # ... and of those edited: active, inactive
    summary: Summary
    agreement_swapped: float | None  # as `agreement_hypotheses`, with drawings of other features
    not_compared: str = ""  # why drawings take the place of no features


def make_evaluation(
    hypotheses: list[Hypothesis],
    rule: Rule,
    rows: list[Row],
    activity: Activity,
    agreements: Agreements,
    n_discovery: int,
) -> Evaluation:
    """The evaluation of hypotheses; `activity` is that of the test half."""
    top_images, edited = [], []
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:STRONGEST]
        # Image i of the test half is image 2 i of the test images.
        top_images.append((2 * at[strongest]).tolist())
        edited.append(
            tuple((2 * some).tolist() for some in edited_images(h.feature, activity, h.strong_from))
        )
    l0 = len(activity.image) / len(activity.labels)
    summary = summarize(rows, l0, agreements.features, agreements.hypotheses)
    listed = (top_images, edited, summary, agreements.swapped, agreements.not_compared)
    return Evaluation(hypotheses, rule, rows, n_discovery, *listed)


def features_of_influence(evaluation: Evaluation) -> dict[str, int]:
    """How many features, the most influential first, make up 50, 90 and 99% of the influence."""
    total = np.sort([row.evidence.influence for row in evaluation.rows])[::-1].cumsum()
    if not total[-1]:
        return {}
    return {f"{q:.0%}": int(np.searchsorted(total, q - 1e-9)) + 1 for q in (0.5, 0.9, 0.99)}


def evaluation_record(evaluation: Evaluation, baselines: dict[str, Summary], sha256: str) -> dict:
    """The evaluation in summary.json; `sha256` is that of the frozen hypotheses."""
    summaries = {"SAE": evaluation.summary, **baselines}
    not_compared = {"not_compared": evaluation.not_compared} if evaluation.not_compared else {}
    return {
        "sha256": sha256,
        "rule": evaluation.rule._asdict(),
        "confidence_rule": format_rule(evaluation.rule, evaluation.hypotheses),
        "agreement_swapped": evaluation.agreement_swapped,
        **not_compared,
        "summaries": {name: s.as_record() for name, s in summaries.items()},
        "features_that_make_influence": features_of_influence(evaluation),
    }


def format_rule(rule: Rule, hypotheses: Sequence[Hypothesis] = ()) -> str:
    """CONFIDENCE_RULE with the bars of a rule, and UNDRAWN_RULE, where one of the hypotheses has no
    drawing, or all; on one line."""
    undrawn = [bool(h.undrawn) for h in hypotheses]
    parts = [] if undrawn and all(undrawn) else [CONFIDENCE_RULE]
    parts += [UNDRAWN_RULE] if any(undrawn) else []
    given = {**rule._asdict(), "high_place": HIGH_PLACE_SHARE}
    return " ".join(" ".join(parts).format(**given).split())
