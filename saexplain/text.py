"""How are hypotheses and their evidence put into words? Records of files, and hypotheses.md.

    evaluated_record(k, evaluation)                         # an entry of feature_report.json
    headline(record)                                        # the result in short
    hypotheses_markdown(evaluation, record, title, marks)   # hypotheses.md

Takes an `Evaluation` and its `evaluation_record`; gives text and JSON objects. It tests nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import feature_analysis as fa
from saexplain.captions import caption, images_of, listed, percent
from saexplain.evaluation import (
    CONFIDENCE_RULE,
    CONFIDENCES,
    Decision,
    EditTest,
    EffectTest,
    Evaluation,
    Evidence,
    Measurement,
    Selection,
    measurements,
)
from saexplain.hypotheses import NO_EFFECT_CHANGES, Hypothesis, Rule, hypothesis_record
from saexplain.statistics import Detection

# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def _record(result: NamedTuple | None, *properties: str) -> dict | None:
    """The fields of a result, and the properties named."""
    if result is None:
        return None
    return {**result._asdict(), **{name: getattr(result, name) for name in properties}}


def evaluated_record(k: int, evaluation: Evaluation) -> dict:
    """The entry of feature_report.json about the hypothesis on feature k."""
    h, e, d = evaluation.hypotheses[k], evaluation.evidence[k], evaluation.decisions[k]
    edited = None
    if e.edits or e.drawn_edits:
        edited = dict(zip(("active", "inactive"), evaluation.edited[k], strict=True))
    return {
        "caption": caption(h),
        "influence": h.influence,
        "changes": e.changes,
        "confidence": d.confidence,
        "outcome": d.outcome,
        "explained": d.explained,
        "measured": measured_lines(h, e, d, evaluation.rule),
        "hypothesis": hypothesis_record(h),
        "evidence": {
            "text": evidence_line(h, e),
            "n_active": e.n_active,
            "n_images": e.n_images,
            "influence": e.influence,
            "label_histogram": list(e.label_histogram),
            "detected": {part: _record(detection) for part, detection in e.detected.items()},
            "selected": _record(e.selected, "precision", "recall"),
            "edits": {name: _record(test, "p") for name, test in e.edits.items()},
            "effect": _record(e.effect, "p"),
            "drawn": _record(e.drawn),
            "drawn_edits": {name: _record(test, "p") for name, test in e.drawn_edits.items()},
            "outcomes": {"tests": d.tests, "parts": d.parts},
            "replicated": evaluation.replicated[k],
            "test_images": evaluation.top_images[k],
            "edited_images": edited,
        },
    }


# --------------------------------------------------------------------------------------------------
# Lines about one hypothesis
# --------------------------------------------------------------------------------------------------

SCORE_NAMES = {"ink": "the ink named", "class": "labels", "both": "the hypothesis as a whole"}
EDIT_WORDS = {
    "erasing": "erasing the ink named deactivates",
    "filling": "painting the absent ink deactivates",
    "painting": "painting and erasing as named activates",
}


def auroc_words(auroc: float) -> str:
    """An AUROC in three digits, rounded down: only a perfect one is 1.000."""
    return f"{math.floor(auroc * 1000) / 1000:.3f}"


def _bar_and_p(m: Measurement) -> str:
    p = "no p-value of its own" if m.p is None else f"p = {max(m.p, 1e-99):.1g}"
    return f"bar {m.bar:g}, {p}"


def _detection_line(name: str, d: Detection) -> str:
    ends = f"[{auroc_words(d.auroc_low)}, {auroc_words(d.auroc_high)}]"
    also = f"average precision {d.average_precision:.3f}"
    return f"AUROC {auroc_words(d.auroc)} {ends} of {name}, {also}"


def _selection_words(s: Selection) -> str:
    precision, recall = percent(s.precision), percent(s.recall)
    return f"{s.n:,} images predicted active: precision {precision}, recall {recall}"


def _edit_counts(name: str, t: EditTest) -> str:
    return f"{EDIT_WORDS[name]} it on {t.named} of {t.n} images, elsewhere on {t.elsewhere}"


def _edit_line(name: str, t: EditTest) -> str:
    value, low, high = t.difference()
    return f"{_edit_counts(name, t)}: difference {value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values[1:])


def _effect_lines(h: Hypothesis, t: EffectTest, m: Measurement, outcome: str) -> list[str]:
    changes, doses = [], []
    found = ((t.raised_by, t.null_raised), (t.lowered_by, t.null_lowered))
    curves = ((t.dose_raises, t.linear_raises), (t.dose_lowers, t.linear_lowers))
    # Removal lowers what the feature raises.
    columns = (h.effect[::2], h.effect[1::2], ("lowers", "raises"), found, curves)
    for c, predicted, verb, (by, null), (curve, line) in zip(*columns, strict=True):
        if c is not None:
            logit = f"logit of {fa.class_name(h.classes, c)}"
            others = f"predicted {predicted:.3f}, random directions {null:.3f}"
            changes.append(f"{verb} the {logit} by {by:.3f} ({others})")
            doses.append(f"{logit} {_signed(curve)} (linear {_signed(line)})")
    ratio = f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}] times what is required"
    exceeding = f"more than random directions on {t.exceeding} of {t.n} images"
    added = ", ".join(f"{dose:g}" for dose in t.doses[1:])
    return [
        f"removing it {' and '.join(changes)}: {ratio}; {exceeding}, p = {m.p:.1g}: {outcome}",
        f"adding {added} times its typical activation: {'; '.join(doses)}",
    ]


def measured_lines(h: Hypothesis, e: Evidence, d: Decision, rule: Rule | None = None) -> list[str]:
    """One line for each measurement with its 95% interval and, for a test, its bar and outcome."""
    measured, lines = measurements(e, rule or Rule()), []
    for part, detection in e.detected.items():
        line = _detection_line(SCORE_NAMES[part], detection)
        lines.append(f"{line}, {_bar_and_p(measured[part])}: {d.tests[part]}")
    if e.selected:
        lines.append(_selection_words(e.selected))
    for name, test in e.edits.items():
        lines.append(f"{_edit_line(name, test)}, {_bar_and_p(measured[name])}: {d.tests[name]}")
    if e.effect is not None:
        lines += _effect_lines(h, e.effect, measured["effect"], d.tests["effect"])
    if "no_effect" in measured:
        found = f"{percent(e.changes)} of {e.n_active} images, at most {percent(NO_EFFECT_CHANGES)}"
        lines.append(f"removing it changes the prediction on {found}: {d.tests['no_effect']}")
    if e.drawn:
        lines.append(_detection_line("the drawing", e.drawn))
    lines += [f"drawing: {_edit_line(name, test)}" for name, test in e.drawn_edits.items()]
    return lines


def evidence_line(h: Hypothesis, e: Evidence) -> str:
    """The evidence in one line, all of it from images on which nothing was proposed."""
    clauses = [f"active on {percent(e.n_active / e.n_images)} of {e.n_images:,} unseen images"]
    ranked = sorted(range(len(e.label_histogram)), key=lambda c: (-e.label_histogram[c], c))
    shares = []
    for c in ranked[:2]:
        if e.label_histogram[c]:
            share = percent(e.label_histogram[c] / e.n_active)
            shares.append(f"{share} of them {images_of(h.classes, c)}")
    clauses[0] += ", " + listed(shares) if shares else ""
    if not e.testable:
        clauses.append("too few active, or inactive, images to test")
    if e.selected:
        clauses.append(_selection_words(e.selected))
    if e.auroc is not None:
        clauses.append(f"AUROC {auroc_words(e.auroc)}")
    if e.drawn:
        clauses.append(f"of the drawing {auroc_words(e.drawn.auroc)}")
    clauses += [_edit_counts(name, test) for name, test in e.edits.items()]
    if e.n_active:
        clauses.append(f"without it {percent(e.changes)} of their predictions change")
    return "; ".join(clauses)


def feature_lines(i: int, evaluation: Evaluation, mark: str | None) -> list[str]:
    """The Markdown section of the hypothesis at position i; `mark` says whether other SAEs have the
    feature, too."""
    h, e, d = evaluation.hypotheses[i], evaluation.evidence[i], evaluation.decisions[i]
    words = {True: "replicated", False: "not replicated", None: "too few images to replicate"}
    marked = f"; {mark}" if mark else ""
    lines = [
        f"### Feature {h.feature}: {caption(h)}",
        "",
        f"- Influence: {percent(h.influence)}",
        f"- Evidence: {evidence_line(h, e)}",
        f"- Confidence: **{d.confidence}**; {d.outcome}; {words[evaluation.replicated[i]]}{marked}",
    ]
    lines += [f"- no {part} part: {reason}" for part, reason in h.skip_reasons.items()]
    if evaluation.top_images[i]:
        numbers = ", ".join(f"#{image}" for image in evaluation.top_images[i])
        lines.append(f"- strongest of the {e.n_active:,} test images that activate it: {numbers}")
    return [*lines, ""]


# --------------------------------------------------------------------------------------------------
# hypotheses.md
# --------------------------------------------------------------------------------------------------

HOW_TESTED = """Each hypothesis was proposed from {discovery:,} validation images and frozen before
it was tested, once, on the test half: the {test_half:,} test images with even numbers. The
{replication_half:,} with odd numbers, the replication half, show whether the confidence is
deserved. SHA-256 of hypotheses.json: `{sha256}`.

A word is a region: the middle of the image has 5 x 5 cells (top, upper, middle, lower, bottom; far
left, left, middle, right, far right). The ink of "stem upper left" is that of the best vertical
piece of stroke centered in that cell, less the ink beside it. A bar is horizontal, a stem vertical,
a slash rises (/), a backslash falls (\\), ink has any shape. The sum of the inks named, all with
weight 1, and of the labels' scores predicts activity. Percentages are of the validation images that
activate the feature; they are not tested.

- Detection: the ink named must predict activity with AUROC {ink_auroc}, labels with {class_auroc},
the hypothesis as a whole with {both_auroc}. An image is predicted active from the threshold on that
has the largest F1 on the validation images.
- Erasing: the ink named is removed from active images, and as much ink elsewhere. Filling: absent
strokes are painted on active images. Painting: on inactive images of the classes named, strokes are
painted and erased as named. Elsewhere the same shapes are painted, with as much ink. The edit as
named must change the activity on a share of the images that is larger by {edit_difference}.
- Effect: removing the feature must change the logit named by {effect_size:.0%} of the prediction,
and by more than {percentile:.0%} of random directions of its norm change the logit they change
most; each larger dose must change it further. "Little effect": at most {no_effect:.0%} of
predictions change. "Effect no larger than a random direction's": more do.
- Drawing: the same tests for the exact places of the drawing. They do not count in the outcome.

A test is confirmed when its value reaches the bar and it is significant among all tests of all
features at a false discovery rate of {false_discovery_rate}; refuted when its 95% interval stays
below the bar; otherwise inconclusive. One refuted test refutes the hypothesis, and all must be
confirmed to confirm it. Features with fewer than {min_active} active, or inactive, images are not
tested. Intervals: of an AUROC, DeLong's on the logit scale; of edits, Newcombe's for pairs.

{confidence}

A feature's influence is its share of the logit effect of all single ablations.
"""

WHAT_TRAINING_ADDED = """The features of the other sets are active as often and as strongly as the
SAE's, one for one: the more images activate a feature, the easier its tests are. A hypothesis can
be true of a random direction, too: a good prediction alone does not show that training found
anything. Discrimination: the hypothesis predicts its own feature better than seven others of like
rate (by chance 12.5%), than the nearest other in decoder direction, and than the most coactive one
(by chance 50%). Neurons have no other in the same direction."""

LISTED = 100  # features, the most influential, with a section in hypotheses.md
WHERE_ALL = """{listed} of {all} features. All of them, and each test with its interval and outcome,
are in feature_report.html and in feature_report.json (`evidence`, `measured`)."""
SHARE_TITLES = {
    "explained": "explained: all parts are confirmed",
    "ink_confirmed": "  ink is confirmed",
    "class_confirmed": "  labels are",
    "effect_confirmed": "  an effect is",
    "predicted": "predicted, AUROC {both_auroc:g}, by the caption",
    "drawn": "  by the drawing",
    "among_eight": "discrimination: among 8 of like rate",
    "over_nearest": "  against nearest",
    "over_coactive": "  against most coactive",
    "median_precision": "precision (median)",
    "median_recall": "recall (median)",
    "influence_explained": "influence explained",
    "influence_high": "influence with confidence High",
}


def _replicated_words(counts: dict) -> str:
    if not counts["checked"]:
        return f"{counts['hypotheses']}, none checked"
    return f"{counts['hypotheses']}, {counts['replicated'] / counts['checked']:.0%} replicated"


def shares_rows(record: dict) -> list[list[str]]:
    """The table of all sets of features, a column each; `record` is the `evaluation_record`."""
    sets = record["shares"].values()

    def row(title: str, cells: Iterable) -> list[str]:
        return [title, *map(str, cells)]

    rows = [
        row("", record["shares"]),
        row("testable features", (s["features"] for s in sets)),
        row("  too rare", (s["too_rare"] for s in sets)),
    ]
    for key, title in SHARE_TITLES.items():
        cells = ("none" if s[key] is None else f"{s[key]:.0%}" for s in sets)
        rows.append(row(title.format(**record["rule"]), cells))
    ends = (f"{s['explained_low']:.0%} to {s['explained_high']:.0%}" for s in sets)
    rows.insert(4, row("  95% interval over features", ends))
    first, *_ = sets
    names = [f"active on up to {band['upto']:.1%}" for band in first["bands"][:-1]]
    for i, name in enumerate([*names, "active on more"]):
        bands = [s["bands"][i] for s in sets]
        counts = (f"{band['explained']} of {band['features']}" for band in bands)
        rows.append(row(f"explained, {name}", counts))
    for name in (*CONFIDENCES, "all"):
        counts = (_replicated_words(s["confidence"][name]) for s in sets)
        rows.append(row(f"hypotheses: {name}", counts))
    return rows


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *others)]


def headline(record: dict) -> str:
    """The result in short; `record` is the `evaluation_record`."""
    shares = dict(record["shares"])
    own = shares.pop("SAE")
    text = (
        f"{own['influence_explained']:.0%} of the influence is explained, "
        f"{own['influence_high']:.0%} with confidence High; "
        f"{own['explained']:.0%} of the features are"
    )
    none = not any(found["explained"] for found in record["shares"].values())
    if none and record["median_words"] is None:
        text = "The SAE's hypotheses name no strokes, so no feature counts as explained"
    elif shares:
        best = max(shares, key=lambda name: shares[name]["explained"])
        other = shares[best]["explained"]
        times = f" ({own['explained'] / other:.1f} times)" if other else ""
        text += f", of the best baseline ({best}) {other:.0%}{times}"
    counts = record["features_that_make_influence"]
    made = ", ".join(f"{n} make up {share}" for share, n in counts.items())
    return f"{text}. Features by influence on the test images: {made}."


def hypotheses_markdown(
    evaluation: Evaluation, record: dict, title: str, marks: dict[int, str] | None = None
) -> str:
    """hypotheses.md: how the hypotheses were tested, the summary, and the LISTED most influential
    features. `record` is the `evaluation_record`; `marks` by feature say whether other SAEs have
    it, too."""
    how = HOW_TESTED.format(
        discovery=evaluation.hypotheses[0].n_images,
        test_half=evaluation.evidence[0].n_images,
        replication_half=evaluation.n_replication,
        sha256=record["sha256"],
        confidence=CONFIDENCE_RULE,
        no_effect=NO_EFFECT_CHANGES,
        **evaluation.rule._asdict(),
    )
    influence = [h.influence for h in evaluation.hypotheses]
    order = sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:LISTED]
    lines = [f"# What the features mean: {title}", "", headline(record), "", how]
    lines += ["## What did training add, and does it replicate?", "", WHAT_TRAINING_ADDED, ""]
    lines += [*_markdown_table(shares_rows(record)), ""]
    lines += ["## Feature by feature, the most influential first", ""]
    lines += [WHERE_ALL.format(listed=len(order), all=len(influence)), ""]
    for i in order:
        lines += feature_lines(i, evaluation, (marks or {}).get(evaluation.hypotheses[i].feature))
    return "\n".join(lines)
