"""TODO"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import feature_analysis as fa
from saexplain.captions import caption, images_of, listed, percent
from saexplain.evaluation import (
    CONFIDENCE_RULE,
    CONFIDENCES,
    Decision,
    Edits,
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


def _test_record(test: NamedTuple | None, *names: str) -> dict | None:
    """Its fields, and those of its properties that are named."""
    if test is None:
        return None
    return {**test._asdict(), **{name: getattr(test, name) for name in names}}


def _edits_record(edits: Edits | None) -> dict | None:
    if edits is None:
        return None
    return {name: _test_record(test, "p") for name, test in edits._asdict().items()}


def evaluated_record(k: int, evaluation: Evaluation) -> dict:
    """What feature_report.json says about the statement on feature k."""
    h, e, j = evaluation.hypotheses[k], evaluation.evidence[k], evaluation.decisions[k]
    edited = None
    if e.edits is not None or e.drawn_edits is not None:
        edited = dict(zip(("active", "inactive"), evaluation.edited[k], strict=True))
    return {
        "caption": caption(h),
        "influence": h.influence,
        "changes": e.changes,
        "confidence": j.confidence,
        "outcome": j.outcome,
        "explained": j.explained,
        "measured": measured_lines(h, e, j, evaluation.rule),
        "hypothesis": hypothesis_record(h),
        "evidence": {
            "text": evidence_line(h, e),
            "n_active": e.n_active,
            "n_images": e.n_images,
            "influence": e.influence,
            "label_histogram": list(e.label_histogram),
            "detected": {part: d._asdict() for part, d in e.detected.items()},
            "selected": _test_record(e.selected, "precision", "recall"),
            "edits": _edits_record(e.edits),
            "effect": _test_record(e.effect, "p"),
            "drawn": _test_record(e.drawn),
            "drawn_edits": _edits_record(e.drawn_edits),
            "outcomes": {"tests": j.tests, "parts": j.parts},
            "replicated": evaluation.replicated[k],
            "test_images": evaluation.top_images[k],
            "edited_images": edited,
        },
    }


# --------------------------------------------------------------------------------------------------
# Telling it to people
# --------------------------------------------------------------------------------------------------


def _p_words(p: float | None) -> str:
    if p is None:
        return "no test of its own"
    return "p < 1e-99" if p < 1e-99 else f"p = {p:.1g}"


def auroc_words(auroc: float) -> str:
    """Three digits, rounded down: only a perfect one is 1.000."""
    return f"{math.floor(auroc * 1000) / 1000:.3f}"


def _detection_line(name: str, d: Detection) -> str:
    ends = f"[{auroc_words(d.auroc_low)}, {auroc_words(d.auroc_high)}]"
    also = f"average precision {d.average_precision:.3f}"
    return f"{name} where it fires: AUROC {auroc_words(d.auroc)} {ends}, {also}"


EDIT_WORDS = {
    "erasing": ("erasing what is said to be there", "off"),
    "filling": ("painting what is said to be absent", "off"),
    "painting": ("making it as said", "on"),
}


def _edit_counts(name: str, t: EditTest) -> str:
    what, way = EDIT_WORDS[name]
    return f"{what} turns it {way} on {t.named} of {t.n} images, elsewhere on {t.elsewhere}"


def _edit_line(name: str, t: EditTest) -> str:
    value, low, high = t.difference()
    return f"{_edit_counts(name, t)}: difference {value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values[1:])


def _effect_lines(h: Hypothesis, t: EffectTest, m: Measurement, outcome: str) -> list[str]:
    claim = h.effect
    moves, doses = [], []
    if claim.raises is not None:
        logit, other = f"logit of {fa.class_name(h.classes, claim.raises)}", t.chance_raised
        said = f"said {claim.raised_by:.3f}, other directions {other:.3f}"
        moves.append(f"lowers the {logit} by {t.raised_by:.3f} ({said})")
        doses.append(f"{logit} {_signed(t.dose_raises)} (linear {_signed(t.linear_raises)})")
    if claim.lowers is not None:
        logit, other = f"logit of {fa.class_name(h.classes, claim.lowers)}", t.chance_lowered
        said = f"said {claim.lowered_by:.3f}, other directions {other:.3f}"
        moves.append(f"raises the {logit} by {t.lowered_by:.3f} ({said})")
        doses.append(f"{logit} {_signed(t.dose_lowers)} (linear {_signed(t.linear_lowers)})")
    reach = f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}] of what is asked for"
    further = f"further than those on {t.further} of {t.further + t.less_far} images"
    added = ", ".join(f"{dose:g}" for dose in t.doses[1:])
    return [
        f"removing it {' and '.join(moves)}: {reach}; {further}, {_p_words(m.p)}: {outcome}",
        f"adding {added} times its typical activation: {'; '.join(doses)}",
    ]


def measured_lines(h: Hypothesis, e: Evidence, j: Decision, rule: Rule | None = None) -> list[str]:
    """One line for each test: what was measured with its 95% interval, the bar, and the verdict."""
    measured = measurements(e, rule or Rule())
    names = {
        "ink": "the ink named predicts",
        "class": "labels predict",
        "both": "the sentence predicts",
    }
    lines = []
    for part, d in e.detected.items():
        m = measured[part]
        said = f"bar {m.bar:g}, {_p_words(m.p)}: {j.tests[part]}"
        lines.append(f"{_detection_line(names[part], d)}, {said}")
    if e.selected:
        lines.append(_selection_words(e.selected))
    for name, test in (e.edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            m = measured[name]
            said = f"bar {m.bar:g}, {_p_words(m.p)}: {j.tests[name]}"
            lines.append(f"{_edit_line(name, test)}, {said}")
    if e.effect is not None:
        lines += _effect_lines(h, e.effect, measured["effect"], j.tests["effect"])
    if "little" in measured:
        share, bar = percent(e.changes), percent(NO_EFFECT_CHANGES)
        said = f"on {share} of {e.n_active} images, at most {bar}: {j.tests['little']}"
        lines.append(f"removing it changes the prediction {said}")
    if e.drawn:
        lines.append(_detection_line("as drawn, it is predicted", e.drawn))
    for name, test in (e.drawn_edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            lines.append(f"as drawn, {_edit_line(name, test)}")
    return lines


def _selection_words(d: Selection) -> str:
    """How often the sentence is right."""
    fire = f"of the {d.n:,} images it describes {percent(d.precision)} fire it"
    return f"{fire}; of those that fire it, it describes {percent(d.recall)}"


def evidence_line(h: Hypothesis, e: Evidence) -> str:
    """The evidence in one line, all of it from images on which no claim was made."""
    pieces = [f"fires on {percent(e.n_active / e.n_images)} of {e.n_images:,} unseen images"]
    ranked = sorted(range(len(e.label_histogram)), key=lambda c: (-e.label_histogram[c], c))
    shares = []
    for c in ranked[:2]:
        if e.label_histogram[c]:
            share = percent(e.label_histogram[c] / e.n_active)
            shares.append(f"{share} of them {images_of(h.classes, c)}")
    pieces[0] += ", " + listed(shares) if shares else ""
    if not e.testable:
        pieces.append("too few that do, or do not, to judge")
    if e.selected:
        pieces.append(_selection_words(e.selected))
    if e.auroc is not None:
        pieces.append(f"AUROC {auroc_words(e.auroc)}")
    if e.drawn:
        pieces.append(f"as drawn {auroc_words(e.drawn.auroc)}")
    for name, t in (e.edits or Edits(None, None, None))._asdict().items():
        if t is not None:
            pieces.append(_edit_counts(name, t))
    if e.n_active:
        pieces.append(f"without it {percent(e.changes)} of their predictions change")
    return "; ".join(pieces)


def feature_lines(i: int, evaluation: Evaluation, mark: str | None) -> list[str]:
    """The Markdown section of the claim at position i; `mark` says whether other SAEs have the
    feature, too."""
    h, e, j = evaluation.hypotheses[i], evaluation.evidence[i], evaluation.decisions[i]
    words = {True: "held", False: "did not hold", None: "too few images to see"}
    aside = f"on images set aside: {words[evaluation.replicated[i]]}"
    marked = f"; {mark}" if mark else ""
    lines = [
        f"### Feature {h.feature}: {caption(h)}",
        "",
        f"- Influence: {percent(h.influence)}",
        f"- Evidence: {evidence_line(h, e)}",
        f"- Confidence: **{j.confidence}**; verdict {j.outcome}; {aside}{marked}",
    ]
    lines += [f"- no {part} part: {why}" for part, why in h.skip_reasons.items()]
    if evaluation.top_images[i]:
        numbers = ", ".join(f"#{image}" for image in evaluation.top_images[i])
        lines.append(f"- strongest of the {e.n_active:,} test images that fire it: {numbers}")
    return [*lines, ""]


def order_by_influence(hypotheses: Sequence[Hypothesis]) -> list[int]:
    """Positions by falling influence on the discovery images, ties by number."""
    return sorted(range(len(hypotheses)), key=lambda i: (-hypotheses[i].influence, i))


HOW_TESTED = """Each statement was made from {discovery:,} validation images and frozen before it
was tested, once, on the {test_half:,} test images with even numbers. The {replication_half:,} with odd numbers
were set aside to see whether confidence is deserved. SHA-256 of hypotheses.json: `{sha256}`.

A word is a region: the middle of the image has 5 x 5 cells (top, upper, middle, lower, bottom; far
left, left, middle, right, far right), and "stem upper left" is as true of an image as the best
vertical piece of stroke centred in that cell is inked, with blank sides. A bar is horizontal, a
stem vertical, a slash rises (/), a backslash falls (\\), ink is any. The sentence is scored by its
words alone, each counting alike. Percentages are of the validation images that fire the feature:
the share of a class among them, and of predictions that change. They are not tested as numbers; the
evidence has them for unseen images.

- The ink named predicts where the feature fires with AUROC {ink_auroc}, labels with {class_auroc},
the sentence as a whole with {both_auroc}. An image is described when it scores as high as separates
best (F1) on the validation images.
- Erasing: on images that fire it, the ink named is removed, and as much ink elsewhere. Filling:
strokes said to be absent are painted. Painting: on images that do not fire it, of the classes
named, what is said is made true. Elsewhere the same shapes are painted, with as much ink. Edits as
named must change the feature on a share of the images that is larger by {edit_difference}.
- Effect: removing the feature moves the logit named by {effect_size:.0%} of what is said, and
further than {percentile:.0%} of random directions of its length, each on the logit it moves most;
each larger dose moves it further. "Little effect": at most {little:.0%} of predictions change.
"Effect like any direction's": more do, but no logit moves further than by such a direction.
- As drawn: the same tests for the exact places of the drawing. They are no part of the verdict.

A test is confirmed when its value reaches the bar and it is significant among all tests of all
features at a false discovery rate of {false_discovery_rate}; refuted when its 95% interval stays
below the bar; otherwise inconclusive. One refuted test refutes the statement, and all must be
confirmed to confirm it. Fewer than {min_active} images that fire a feature, or do not, are too few
to judge it. Intervals: of an AUROC, DeLong's on the logit scale; of edits, Newcombe's for pairs.

{confidence}

A feature's influence is its share of all that removing single features does to the logits.
"""

TRAINING_ADDED = """Of the features that can be judged. The others fire as often and as strongly as
the SAE's features do, one for one: the more images fire a feature, the easier its tests are. A
statement can be true of a random direction, too: that it predicts does not say that training found
anything. "Picked of 8": the sentence predicts its own feature better than seven others of like rate
(by chance 12.5%); "over like" and "over company": than the nearest other in decoder direction, and
than the one that fires most on the same images (by chance 50%). Neurons have no other in the same
direction."""

LISTED = 100  # features, the most influential, that hypotheses.md tells
WHERE_ALL = """{listed_features} of {all} features. All of them, and each test with its interval and verdict,
are in feature_report.html, to look at, and in feature_report.json (`evidence`, `measured`)."""


def _percent_or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _held_words(row: dict) -> str:
    if not row["checked"]:
        return f"{row['hypotheses']}, none seen again"
    return f"{row['hypotheses']}, {row['replicated'] / row['checked']:.0%} held"


def shares_rows(record: dict) -> list[list[str]]:
    """The table of all sets of features, a column each. `record` is the `evaluation_record`."""
    shares = record["shares"]
    titles = {
        "explained": "explained: all that is said is confirmed",
        "ink_confirmed": "  ink is said and confirmed",
        "class_confirmed": "  labels are",
        "effect_confirmed": "  an effect is",
        "predicted": f"predicted, AUROC {record['rule']['both_auroc']:g}, as worded",
        "drawn": "  as drawn",
        "among_eight": "picked of 8 of like rate",
        "over_nearest": "picked over like",
        "over_coactive": "picked over company",
        "median_precision": "fire, of images described (median)",
        "median_recall": "described, of images that fire (median)",
        "influence_explained": "influence explained",
        "influence_high": "influence with confidence High",
    }
    rows = [["", *shares]]
    rows.append(["features that can be judged", *(str(s["features"]) for s in shares.values())])
    rows.append(["  too rare", *(str(s["too_rare"]) for s in shares.values())])
    for key, title in titles.items():
        rows.append([title, *(_percent_or_none(s[key]) for s in shares.values())])
    ends = [f"{s['explained_low']:.0%} to {s['explained_high']:.0%}" for s in shares.values()]
    rows.insert(4, ["  95% interval over features", *ends])
    firsts = next(iter(shares.values()))["bands"]
    names = [f"fire on up to {band['upto']:.1%}" for band in firsts[:-1]] + ["fire on more"]
    for i, name in enumerate(names):
        cells = [
            f"{s['bands'][i]['explained']} of {s['bands'][i]['features']}" for s in shares.values()
        ]
        rows.append([f"explained, {name}", *cells])
    for name in (*CONFIDENCES, "all"):
        cells = [_held_words(s["confidence"][name]) for s in shares.values()]
        rows.append([f"statements: {name}", *cells])
    return rows


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *others)]


def headline(record: dict) -> str:
    """The one sentence about the trial."""
    shares = dict(record["shares"])
    own = shares.pop("SAE")
    text = (
        f"{own['influence_explained']:.0%} of the influence is explained, "
        f"{own['influence_high']:.0%} with confidence High; "
        f"{own['explained']:.0%} of the features are"
    )
    none = not any(found["explained"] for found in record["shares"].values())
    if none and record["median_words"] is None:
        text = "The SAE's sentences name no strokes, so no feature counts as explained"
    elif shares:
        best = max(shares, key=lambda name: shares[name]["explained"])
        other = shares[best]["explained"]
        times = f" ({own['explained'] / other:.1f} times)" if other else ""
        text += f", of the best control ({best}) {other:.0%}{times}"
    course = record["features_that_make_influence"]
    made = ", ".join(f"{n} make {share}" for share, n in course.items())
    return f"{text}. Features by influence on the test images: {made}."


def hypotheses_markdown(
    evaluation: Evaluation, record: dict, title: str, marks: dict[int, str] | None = None
) -> str:
    """hypotheses.md: how the statements were tested, how they did as a whole, and the TOLD most
    influential features. `record` is the `evaluation_record`; `marks` by feature say whether other SAEs
    have it, too."""
    how = HOW_TESTED.format(
        discovery=evaluation.hypotheses[0].n_images,
        test_half=evaluation.evidence[0].n_images,
        replication_half=evaluation.n_replication,
        sha256=record["sha256"],
        confidence=CONFIDENCE_RULE,
        little=NO_EFFECT_CHANGES,
        **evaluation.rule._asdict(),
    )
    lines = [f"# What the features mean: {title}", "", headline(record), "", how]
    lines += ["## What did training add, and does it hold?", "", TRAINING_ADDED, ""]
    lines += [*_markdown_table(shares_rows(record)), ""]
    lines += ["## Feature by feature, the most influential first", ""]
    listed_features = order_by_influence(evaluation.hypotheses)[:LISTED]
    lines += [
        WHERE_ALL.format(listed_features=len(listed_features), all=len(evaluation.hypotheses)),
        "",
    ]
    for i in listed_features:
        lines += feature_lines(i, evaluation, (marks or {}).get(evaluation.hypotheses[i].feature))
    return "\n".join(lines)
