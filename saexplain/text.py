"""How are hypotheses and their evidence put into words? Records of files, and hypotheses.md.

    evaluated_record(k, evaluation)                  # an entry of feature_report.json
    headline(record)                                 # the result in short
    hypotheses_markdown(evaluation, record, title)   # hypotheses.md

Takes an `Evaluation` and its `evaluation_record`; gives text and JSON objects. It tests nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import feature_analysis as fa
from saexplain.baselines import MAX_TESTED
from saexplain.captions import (
    MOST_LETTERS,
    images_of,
    images_of_classes,
    listed,
    logit_groups,
    percent,
)
from saexplain.edits import EditTest
from saexplain.evaluation import (
    CONFIDENCES,
    Decision,
    Evaluation,
    Evidence,
    LogitChange,
    Picked,
    Row,
)
from saexplain.hypotheses import MIN_ACTIVE, Hypothesis, hypothesis_record
from saexplain.statistics import Detection, wilson_interval

# --------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------


def _record(result: NamedTuple | None, *properties: str) -> dict | None:
    """The fields of a result, and the properties named."""
    if result is None:
        return None
    return {**result._asdict(), **{name: getattr(result, name) for name in properties}}


def _known(**fields: object) -> dict:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value}


def _edit_record(test: EditTest) -> dict:
    return {
        **test._asdict(),
        **dict(zip(("difference", "low", "high"), test.difference(), strict=True)),
    }


def evidence_record(e: Evidence, results: dict[str, str]) -> dict:
    """The evidence for one hypothesis as a JSON object."""
    return {
        "n_active": e.n_active,
        "n_images": e.n_images,
        "influence": e.influence,
        "label_histogram": list(e.label_histogram),
        "chance_f1": e.chance_f1,
        "picked": _record(e.picked, "precision", "recall", "f1"),
        "detection": _record(e.detection),
        "correlation": e.correlation,
        "edits": {name: _edit_record(test) for name, test in e.edits.items()},
        "classes": _record(e.classes),
        "effects": {verb: _record(change) for verb, change in e.effects.items()},
        **_known(place=_record(e.place)),
        **({} if e.n_strong is None else {"n_strong": e.n_strong}),
        "results": results,
    }


def evaluated_record(k: int, evaluation: Evaluation, classes: Sequence[str] = ()) -> dict:
    """The entry of feature_report.json about the hypothesis on feature k."""
    h, row = evaluation.hypotheses[k], evaluation.rows[k]
    e, d = row.evidence, row.decision
    edited = dict(zip(("active", "inactive"), evaluation.edited[k], strict=True))
    return {
        "caption": h.caption,
        "confidence": d.confidence,
        "replicated": row.replicated,
        "f1": e.f1,
        **_known(f1_by="classes" if e.undrawn and e.picked else ""),
        "changes": e.changes,
        **_known(effects_words=logit_groups(e.delta, classes) if e.delta else ""),
        "measured": measured_lines(h, e, d, classes),
        "hypothesis": hypothesis_record(h),
        "evidence": {
            "text": evidence_line(e, classes),
            **evidence_record(e, d.results),
            "test_images": evaluation.top_images[k],
            "edited_images": edited if e.edits else None,
        },
    }


# --------------------------------------------------------------------------------------------------
# Lines about one hypothesis
# --------------------------------------------------------------------------------------------------

EDIT_WORDS = {
    "erasing": "erasing the wanted ink turns it off",
    "filling": "filling the unwanted cells turns it off",
    "painting": "making an image as drawn turns it on",
}


def auroc_words(auroc: float) -> str:
    """An AUROC in three digits, rounded down: only a perfect one is 1.000."""
    return f"{math.floor(auroc * 1000) / 1000:.3f}"


def picked_words(p: Picked, by_class: bool = False, is_strong: bool = False) -> str:
    """Precision and recall in words; of the images of the classes named where those are picked, and
    of strongly active images where only these count."""
    if not p.n:
        return "it picks no image"
    if by_class:
        return (
            f"of the images of the classes named, {percent(p.precision)} activate the feature"
            f"{' strongly' if is_strong else ''}; they are {percent(p.recall)} of those that do"
        )
    return (
        f"of the images it picks, {percent(p.precision)} activate the feature"
        f"{' strongly' if is_strong else ''}; it finds {percent(p.recall)} of those that do"
    )


def _interval(count: int, n: int) -> str:
    low, high = wilson_interval(count, max(1, n))
    return f"{count / max(1, n):.2f} [{low:.2f}, {high:.2f}]"


def _picked_line(e: Evidence) -> str:
    p, chance = e.picked, e.chance_f1
    precision, recall = _interval(p.both, p.n), _interval(p.both, p.active)
    found = f"precision {precision}, recall {recall}, on {p.n:,} images"
    found += " of the classes named" if e.undrawn else " picked"
    by = "by class, not by a drawing: " if e.undrawn else ""
    return f"{by}F1 {p.f1:.2f} (picking every image: {chance:.2f}): {found}"


def _detection_line(d: Detection) -> str:
    ends = f"[{auroc_words(d.auroc_low)}, {auroc_words(d.auroc_high)}]"
    found = f"AUROC {auroc_words(d.auroc)} {ends}"
    return f"the match ranks images with {found}, average precision {d.average_precision:.3f}"


def _edit_counts(name: str, t: EditTest) -> str:
    return (
        f"{EDIT_WORDS[name]} in {t.named} of {t.n} images, the same edit elsewhere in {t.elsewhere}"
    )


def _edit_line(name: str, t: EditTest) -> str:
    value, low, high = t.difference()
    return f"{_edit_counts(name, t)}: difference {value:+.2f} [{low:+.2f}, {high:+.2f}]"


def class_words(h: Hypothesis, e: Evidence, classes: Sequence[str]) -> str:
    """The share of the images that count as active that are of the classes named, in words."""
    c, named = e.classes, images_of_classes(h.classes, classes)
    share = f"{percent(c.share)} [{percent(c.low)}, {percent(c.high)}]"
    return f"{share} of {counted_words(e)} are {named}, of all images {percent(c.usual)}"


def counted_words(e: Evidence) -> str:
    """The images that count as active, in words."""
    if e.n_strong is None:
        return "the active images"
    return f"the {strong_words(e)} on which it is strongest"


def strong_words(e: Evidence) -> str:
    """The number of strongly active images, as in "52 images (5%)"."""
    return f"{e.n_strong:,} images ({percent(e.n_strong / e.n_images)})"


def place_words(h: Hypothesis, e: Evidence) -> str:
    """The share of the peaks that are in the place named, in words."""
    p = e.place
    share = f"{percent(p.share)} [{percent(p.low)}, {percent(p.high)}]"
    usual = f"of {'the' if e.n_strong is None else 'such'} peaks of all features {percent(p.usual)}"
    return f"on {share} of {counted_words(e)} its peak is in the {h.place}, {usual}"


def short_name(classes: Sequence[str], c: int) -> str:
    """The name of class c in at most MOST_LETTERS."""
    return fa.shortened(fa.class_name(classes, c), MOST_LETTERS)


def effect_words(verb: str, c: LogitChange, classes: Sequence[str]) -> str:
    """What removing the feature does to the score for a class, in words."""
    falls = (verb == "raises") == (c.by >= 0)
    lost, name = "falls" if falls else "rises", short_name(classes, c.logit)
    low, high = (c.low, c.high) if c.by >= 0 else (-c.high, -c.low)
    change = f"{abs(c.by):.2f} [{low:.2f}, {high:.2f}]"
    others = (
        f"95% of random directions make one {'fall' if verb == 'raises' else 'rise'} by at most"
    )
    return f"remove it and the score for {name} {lost} by {change}; {others} {c.null:.2f}"


def measured_lines(
    h: Hypothesis, e: Evidence, d: Decision, classes: Sequence[str] = ()
) -> list[str]:
    """One line for each measurement, with its 95% interval and its result."""
    lines = [f"nothing is drawn: {h.undrawn}"] if h.undrawn else []
    if e.picked:
        lines.append(_picked_line(e))
    if e.detection:
        lines.append(_detection_line(e.detection))
    if e.correlation is not None:
        lines.append(f"correlation of the match with the pre-activation {e.correlation:.2f}")
    lines += [f"{_edit_line(name, t)}: {d.results[name]}" for name, t in e.edits.items()]
    if e.classes:
        lines.append(f"{class_words(h, e, classes)}: {d.results['classes']}")
    if e.place:
        lines.append(f"{place_words(h, e)}: {d.results['place']}")
    if groups := logit_groups(e.delta, classes) if e.delta else "":
        lines.append(groups)
    for verb, change in e.effects.items():
        lines.append(f"{effect_words(verb, change, classes)}: {d.results[verb]}")
        pairs = zip(change.at_doses[1:], change.linear[1:], strict=True)
        doses = ", ".join(f"{found:+.2f} (linear {line:+.2f})" for found, line in pairs)
        name = short_name(classes, change.logit)
        typical = "its own map" if e.at_positions else "its mean activation"
        lines.append(f"the score for {name} with 0.5, 1, 2 times {typical} added: {doses}")
    return lines


def evidence_line(e: Evidence, classes: Sequence[str] = ()) -> str:
    """The evidence in one line, all of it from images on which nothing was proposed."""
    clauses = [f"active on {percent(e.n_active / e.n_images)} of {e.n_images:,} test images"]
    ranked = sorted(range(len(e.label_histogram)), key=lambda c: (-e.label_histogram[c], c))
    shares = []
    for c in ranked[:2]:
        if e.label_histogram[c]:
            share = percent(e.label_histogram[c] / e.n_active)
            named = fa.shortened(images_of(classes, c), MOST_LETTERS)
            shares.append(f"{share} of them {named}")
    clauses[0] += ", " + listed(shares) if shares else ""
    if e.n_strong is not None:
        tested = "classes and place are tested" if e.undrawn else "it is tested"
        clauses.append(f"{tested} on {counted_words(e)}")
    if not e.is_testable:
        clauses.append("not tested: too few active, or inactive, images")
    if e.picked:
        clauses.append(picked_words(e.picked, e.undrawn, e.n_strong is not None))
        f1 = "F1 by class" if e.undrawn else "F1"
        clauses.append(f"{f1} {e.picked.f1:.2f} (picking every image: {e.chance_f1:.2f})")
    if e.place:
        where = f"of its peaks {percent(e.place.share)} are in the place named"
        clauses.append(f"{where}, of all features' {percent(e.place.usual)}")
    clauses += [_edit_counts(name, test) for name, test in e.edits.items()]
    if e.n_active:
        clauses.append(f"removing it changes {percent(e.changes)} of their predictions")
    return "; ".join(clauses)


def confidence_words(confidence: str, replicated: bool | None) -> str:
    """The confidence, and whether the replication half gives it as well."""
    if confidence == CONFIDENCES[-1]:
        return confidence
    on = "on the other half"
    words = {True: f"replicated {on}", False: f"not replicated {on}", None: f"too few images {on}"}
    return f"{confidence}, {words[replicated]}"


def feature_lines(
    h: Hypothesis, row: Row, top_images: Sequence[int], mark: str | None, classes: Sequence[str]
) -> list[str]:
    """The Markdown section of one hypothesis; `mark` says whether other SAEs have the feature."""
    e, d = row.evidence, row.decision
    marked = f"; {mark}" if mark else ""
    lines = [
        f"### Feature {h.feature}: {h.caption}",
        "",
        f"- It accounts for {percent(e.influence)} of all influence",
        f"- Evidence: {evidence_line(e, classes)}",
        f"- Confidence: {confidence_words(d.confidence, row.replicated)}{marked}",
    ]
    if e.classes:
        lines.append(f"- Classes: {class_words(h, e, classes)}: {d.results['classes']}")
    if e.place:
        lines.append(f"- Place: {place_words(h, e)}: {d.results['place']}")
    if groups := logit_groups(e.delta, classes) if e.delta else "":
        lines.append(f"- Effects: {groups}")
    for verb, change in e.effects.items():
        lines.append(f"- Effect: {effect_words(verb, change, classes)}: {d.results[verb]}")
    if top_images:
        numbers = ", ".join(f"#{image}" for image in top_images)
        lines.append(f"- Strongest of the {e.n_active:,} test images that activate it: {numbers}")
    return [*lines, ""]


# --------------------------------------------------------------------------------------------------
# hypotheses.md
# --------------------------------------------------------------------------------------------------

HOW_TESTED = """Each hypothesis was proposed from {discovery:,} validation images and frozen before
it was tested, once, on the test half: the {test_half:,} test images with even numbers. The
{replication_half:,} with odd numbers, the replication half, show whether the confidence holds
there as well. SHA-256 of hypotheses.json: `{sha256}`.
"""
HOW_DRAWN = """
A hypothesis is a drawing: cells where ink is wanted, and cells where it is not, some of them
strongly, which counts twice. An image's match is its ink in the former less that in the latter. An
image whose match reaches the threshold is picked: the feature is predicted to be active on it.
Precision is the share of the picked images that activate the feature, recall the share of the
images that activate it that are picked, F1 their harmonic mean. The threshold is the one with the
largest F1 on the validation images. Classes and effects are tested by themselves and are no part of
the match. The captions are made from the geometry of the drawings, and decide nothing.
"""
HOW_CROPS = """
Drawings are of the {side} pixels that a position of the layer sees. An image's match is the largest
over its positions. Edits change an active image around the feature's peak, and an inactive one
around the position with the largest match.
"""
HOW_UNDRAWN = """
{undrawn} hypotheses have no drawing, for the reason given with each. They name classes, and, where
the layer has positions, the place in which the feature's peak is on at least half of the images
that activate it, and {enrichment} times as often as the peaks of all features. The images of the
classes named are predicted to activate the feature, which gives an F1 by class. A feature that is
active on all images is tested as well.
"""
HOW_STRONG = """
With positions a feature can be active somewhere on nearly all images. {strong} hypotheses are
therefore about the images on which the feature is strongest: those from an activation on
(`strong_from`) that 2, 5, 10, 20 or 40% of the validation images reach, whichever lets the classes,
or the drawing, predict it best; 5% where no class is named. Only these count as active. The number
was frozen with the hypothesis, and is the same on the test images. Captions without a drawing then
begin with "Strongest".
"""
HOW_EDITED = """
- Erasing: the ink in wanted cells is removed from active images. Filling: unwanted cells of
active images get {fill} of full ink. Painting: inactive images are made as drawn. The
same shapes elsewhere, with as much ink, are edited for comparison."""
HOW_DECIDED = """
- Classes: their share of the active images must be {enrichment} times that of all images.
- Effects: a class's score (logit) is the number that the network computes for it; it predicts the
class with the largest. Removing the feature must change the score by more than {percentile:.0%} of
random directions of its norm change the score they change most. Effects say what removing the
feature does to the network, not why it is active: with activations shuffled over images, many are
confirmed as well. Alone they never give a confidence above Low.

A test is confirmed when its value reaches the bar and its 95% interval leaves out that there is no
difference; refuted when the interval stays below the bar; otherwise inconclusive. Features with
fewer than {min_active} active, or inactive, images are not tested. Intervals: of an AUROC, DeLong's
on the logit scale; of shares, Wilson's; of edits, Newcombe's for pairs.

{confidence} A hypothesis is replicated when the replication half gives it at least the same
confidence.

A feature's influence is its share of all changes of scores that removing single features causes.
Here it is counted on the test half; on the page, and in feature_report.json, on the validation
images.
"""

SWAPPED = """With each feature's drawing exchanged for that of the feature that is active next more
often, {share:.1%} of the predictions are kept."""
WHAT_TRAINING_ADDED = """Untrained features, random directions and neurons are active as often and
as strongly as the SAE's features, one for one: the more images activate a feature, the higher an F1
can be. There are fewer neurons than features, so that fewer are active per image. Random directions
have the variance of the SAE's encoder as well. "Frozen decoder" is an SAE of which only the encoder
was trained, for two epochs at most; its rates are its own: its mean F1 is no comparison. {tested}
features of each set, evenly spaced in rate, are tested; all take part in the predictions kept: with
the set's own activations in place of the layer's, and with what its hypotheses predict. Directions
without a decoder of their own get the one of least squared error. A hypothesis can be true of a
random direction, too: a good F1 alone does not show that training found anything."""

LISTED = 100  # features, the most influential, with a section in hypotheses.md
WHERE_ALL = """{listed} of {all} features. All of them, and each test with its interval and result,
are in feature_report.html and in feature_report.json (`evidence`, `measured`)."""
SUMMARY_ROWS = (  # title, key, format
    ("testable features", "features", "{}"),
    ("  too rare", "too_rare", "{}"),
    ("features active per image", "l0", "{:.1f}"),
    ("predictions kept, own activations", "agreement", "{:.1%}"),
    ("  hypotheses in their place", "agreement_hypotheses", "{:.1%}"),
    ("F1, weighted by influence", "f1_by_influence", "{:.2f}"),
    ("F1, mean", "f1_mean", "{:.2f}"),
    ("  of picking every image", "chance_mean", "{:.2f}"),
    ("average precision", "average_precision", "{:.2f}"),
    ("AUROC of 0.85 or more", "auroc_above", "{:.0%}"),
    ("correlation of match and pre-activation", "correlation", "{:.2f}"),
    ("influence with confidence High", "influence_high", "{:.0%}"),
    ("  Medium", "influence_medium", "{:.0%}"),
)


UNDRAWN_ROWS = (  # title, result
    ("  classes", "classes"),
    ("  place", "place"),
    ("  score it raises", "raises"),
    ("  score it lowers", "lowers"),
)


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else form.format(value)


def _replicated_words(counts: dict) -> str:
    words = [str(counts["hypotheses"])]
    if counts["checked"]:
        words.append(f"{counts['replicated'] / counts['checked']:.0%} replicated")
    if counts["f1"] is not None:
        words.append(f"F1 {counts['f1']:.2f}, then {_number(counts['f1_again'], '{:.2f}')}")
    return "; ".join(words)


def summary_rows(record: dict) -> list[list[str]]:
    """The table of all sets of features, a column each; `record` is the `evaluation_record`."""
    sets = list(record["summaries"].values())

    def row(title: str, cells: Iterable[str]) -> list[str]:
        return [title, *cells]

    rows = [row("", record["summaries"])]
    for title, key, form in SUMMARY_ROWS:
        if any(s[key] is not None for s in sets):
            rows.append(row(title, (_number(s[key], form) for s in sets)))
    rows += undrawn_rows(sets)
    for name in EDIT_WORDS:
        cells = [s["edits"][name] for s in sets]
        if any(s["f1_mean"] is not None for s in sets):
            rows.append(
                row(f"{EDIT_WORDS[name]}, confirmed", (_number(cell, "{:.0%}") for cell in cells))
            )
    ends = [f"{band['upto']:.0%}" for band in sets[0]["bands"][:-1]]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(["0", *ends])]
    for i, name in enumerate([*names, f"more than {ends[-1]}"]):
        bands = [s["bands"][i] for s in sets]
        cells = (f"{_number(b['f1'], '{:.2f}')} of {b['features']}" for b in bands)
        if any(s["f1_mean"] is not None for s in sets):
            rows.append(row(f"F1, active on {name}", cells))
    for name in CONFIDENCES:
        cells = (_replicated_words(s["confidence"][name]) for s in sets)
        rows.append(row(f"confidence {name}", cells))
    return rows


def undrawn_rows(sets: Sequence[dict]) -> list[list[str]]:
    """The rows about hypotheses without a drawing, if a set has any."""
    counts = [s.get("undrawn") or {} for s in sets]
    if not any(counts):
        return []
    rows = [["features without a drawing", *(str(c.get("features", 0)) for c in counts)]]
    for title, key in (("  F1 by class, mean", "f1"), ("  of picking every image", "chance_f1")):
        rows.append([title, *(_number(c.get(key), "{:.2f}") for c in counts)])
    for title, name in UNDRAWN_ROWS:
        cells = [c.get(name) or {"named": 0, "confirmed": None} for c in counts]
        if any(cell["named"] for cell in cells):
            words = (_confirmed_words(cell) for cell in cells)
            rows.append([f"{title}, confirmed", *words])
    return rows


def _confirmed_words(counts: dict) -> str:
    if not counts["named"]:
        return "none named"
    return f"{_number(counts['confirmed'], '{:.0%}')} of {counts['named']}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, the first row being its header."""
    header, *others = rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *others)]


def headline(record: dict) -> str:
    """The result in short; `record` is the `evaluation_record`."""
    summaries = dict(record["summaries"])
    own = summaries.pop("SAE")
    text = headline_undrawn(own)
    if own["agreement_hypotheses"] is not None:
        text = (
            f"{own['agreement_hypotheses']:.1%} of the predictions are kept with hypotheses in "
            f"place of all features"
        )
        if summaries:
            best = max(summaries, key=lambda name: summaries[name]["agreement_hypotheses"])
            text += f" ({best}: {summaries[best]['agreement_hypotheses']:.1%})"
    if own["f1_by_influence"] is not None:
        high, f1 = percent(own["influence_high"]), own["f1_by_influence"]
        text += f"; F1 {f1:.2f} weighted by influence"
        if own["agreement_hypotheses"] is not None:
            text += f"; {high} of it with confidence High"
    counts = record["features_that_make_influence"]
    (first, n), *others = counts.items()
    made = [f"{n} features account for {first} of all influence"]
    made += [f"{n} for {share}" for share, n in others]
    return f"{text}. On the test half {listed(made)}."


def headline_undrawn(own: dict) -> str:
    """The result in short, where drawings do not take the place of the features."""
    if not own["features"]:
        return f"nothing was tested: fewer than {MIN_ACTIVE} test images activate each feature"
    undrawn = own.get("undrawn") or {"features": 0}
    tested = f"{undrawn['features']} of {own['features']} features that could be tested"
    clauses = [f"{tested} have no drawing"]
    for name, words in (("classes", "classes"), ("place", "places")):
        if undrawn.get(name, {}).get("named"):
            clauses.append(f"{_confirmed_words(undrawn[name])} {words} named are confirmed")
    high, medium = percent(own["influence_high"]), percent(own["influence_medium"])
    clauses.append(f"{high} of the influence has confidence High, {medium} Medium")
    return "; ".join(clauses)


def hypotheses_markdown(
    evaluation: Evaluation,
    record: dict,
    title: str,
    marks: dict[int, str] | None = None,
    classes: Sequence[str] = (),
) -> str:
    """hypotheses.md: how the hypotheses were tested, the summary, and the LISTED most influential
    features. `record` is the `evaluation_record`; `marks` by feature say whether other SAEs have
    it, too."""
    first = evaluation.rows[0]
    undrawn = sum(bool(h.undrawn) for h in evaluation.hypotheses)
    all_drawn, none_drawn = not undrawn, undrawn == len(evaluation.hypotheses)
    how = HOW_TESTED + ("" if none_drawn else HOW_DRAWN)
    how += HOW_CROPS if first.evidence.at_positions and not none_drawn else ""
    how += "" if all_drawn else HOW_UNDRAWN
    strong = sum(h.strong_from is not None for h in evaluation.hypotheses)
    how += HOW_STRONG if strong else ""
    how += ("" if none_drawn else HOW_EDITED) + HOW_DECIDED
    how = how.format(
        discovery=evaluation.n_discovery,
        test_half=first.evidence.n_images,
        replication_half=first.again.n_images,
        sha256=record["sha256"],
        confidence=record["confidence_rule"],
        fill="a quarter",
        min_active=MIN_ACTIVE,
        undrawn=undrawn,
        strong=strong,
        side=" x ".join(map(str, evaluation.hypotheses[0].weights.shape)),
        **evaluation.rule._asdict(),
    )
    influence = [row.evidence.influence for row in evaluation.rows]
    order = sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:LISTED]
    lines = [f"# What the features mean: {title}", "", headline(record), "", how]
    if len(record["summaries"]) > 1:
        added = WHAT_TRAINING_ADDED.format(tested=MAX_TESTED)
        lines += ["## What did training add, and does it replicate?", "", added, ""]
    else:
        lines += ["## What is confirmed, and does it replicate?", ""]
    swapped = record["agreement_swapped"]
    if swapped is None:
        lines += [f"Drawings do not take the place of the features: {record['not_compared']}.", ""]
    else:
        lines += [SWAPPED.format(share=swapped), ""]
    lines += [*markdown_table(summary_rows(record)), ""]
    lines += ["## Feature by feature, the most influential first", ""]
    lines += [WHERE_ALL.format(listed=len(order), all=len(influence)), ""]
    for i in order:
        h = evaluation.hypotheses[i]
        mark = (marks or {}).get(h.feature)
        lines += feature_lines(h, evaluation.rows[i], evaluation.top_images[i], mark, classes)
    return "\n".join(lines)
