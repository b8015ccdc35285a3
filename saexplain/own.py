"""Are hypotheses that a person wrote true? Read from a file, tested, and reported.

    hypotheses = read_hypotheses("my_hypotheses.json")   # exported by the page, or written by hand
    write_hypotheses(hypotheses, "my_hypotheses.json")   # for the page to import
    results = evaluate_own(hypotheses, layer, folder)    # on the test half, and on the other half
    write_report(results, folder, report, classes)       # my_hypotheses.md and pictures

Takes a file that may come from a stranger: sizes and types are checked, and words are escaped. The
tests are those of `evaluation`, the same as for the hypotheses that the program proposes.

Key: h x w cells of the canvas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import feature_analysis as fa
from saexplain.activity import collect_activity
from saexplain.captions import percent
from saexplain.evaluation import Row, check_hypotheses, evaluate_halves, split_test_images
from saexplain.files import InputError, read_json, to_json
from saexplain.hypotheses import (
    CONFIDENCES,
    Hypothesis,
    Rule,
    drawing_rows,
    fit_canvas,
    hypothesis_of,
    hypothesis_record,
    hypothesis_text,
    ink_levels,
    with_thresholds,
)
from saexplain.ink import FULL_INK
from saexplain.panels import Sketch, paint_hypothesis
from saexplain.text import confidence_words, markdown_table, measured_lines, picked_words

FORMAT = "saexplain hypotheses 1"
MAX_BYTES = 20_000_000  # of a file
MAX_HYPOTHESES = 10_000
TRIES_FILE = "my_hypotheses_tried.json"  # of a run's folder


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def digest_of_sae(sae: object) -> str:
    """What names an SAE in a file of hypotheses: the start of the SHA-256 of its W_enc."""
    weights = sae.W_enc.detach().cpu().float().contiguous().numpy()
    return hashlib.sha256(weights.tobytes()).hexdigest()[:16]


def read_hypotheses(path: str | Path, sae: object | None = None) -> list[Hypothesis]:
    """The hypotheses of a file that `write_hypotheses` or the page wrote, or a person.

    The file is JSON: {"format": "saexplain hypotheses 1", "hypotheses": [{"feature": 116,
    "drawing": ["..++..", ...], "classes": [1], "raises": 1, "place": "upper third", "caption":
    "..."}, ...]}; a drawing's characters are those of `hypotheses.TONES`, and a place is one of
    `hypotheses.PLACES`. Raises InputError for anything else, and where the
    file names another SAE than `sae`.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} must have at most {MAX_BYTES:,} bytes")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {str(error)[:100]}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f'{path} must be a JSON object with "format": "{FORMAT}"')
    if sae is not None and record.get("sae", digest_of_sae(sae)) != digest_of_sae(sae):
        raise InputError(f"{path} is about another SAE, that of: {record.get('source')!r:.80}")
    entries = record.get("hypotheses")
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_HYPOTHESES:
        raise InputError(f'{path} must have a list of 1 to {MAX_HYPOTHESES:,} "hypotheses"')
    return [_hypothesis_of_entry(entry, i, path) for i, entry in enumerate(entries, 1)]


def _hypothesis_of_entry(entry: object, i: int, path: Path) -> Hypothesis:
    """The hypothesis of the i-th entry of a file. Raises InputError."""
    if not isinstance(entry, dict):
        raise InputError(f"{path}: hypothesis {i} must be a JSON object, got {entry!r:.40}")
    try:
        rows = entry["drawing"]
        if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
            raise ValueError("drawing must be a list of text, a row each")
        return hypothesis_of(entry)
    except KeyError as error:
        raise InputError(f"{path}: hypothesis {i} must have {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: hypothesis {i}: {str(error)[:200]}") from error


def write_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, sae: object | None = None
) -> None:
    """Write hypotheses as a file that `read_hypotheses` and the page read; with the `sae` that they
    are about, the file is an error for any other."""
    entries = ",\n".join(hypothesis_text(h) for h in hypotheses)
    about = "" if sae is None else f' "sae": "{digest_of_sae(sae)}",\n'
    content = f'{{\n "format": "{FORMAT}",\n{about} "hypotheses": [\n{entries}\n]}}\n'
    path = Path(path).expanduser()
    try:
        fa.write_whole(path, content.encode())
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); name another file"
        ) from error


def count_tries(hypotheses: Sequence[Hypothesis], folder: Path, sae: object) -> list[int]:
    """How many different drawings of each hypothesis's feature were tested in the folder so far,
    these included; they are added to its TRIES_FILE.

    Drawings are counted for each SAE, so that no later run in the folder resets the count.
    """
    path = folder / TRIES_FILE
    of_saes = read_json(path) if path.exists() else {}
    try:
        lists = [seen for tried in of_saes.values() for seen in tried.values()]
    except AttributeError:
        lists = [None]
    if not all(isinstance(seen, list) for seen in lists):
        raise InputError(
            f"{path} is damaged, or of another version of the program; move it away, and "
            f"drawings are counted anew"
        )
    tried = of_saes.setdefault(digest_of_sae(sae), {})
    counts = []
    for h in hypotheses:
        digest = hashlib.sha256("\n".join(drawing_rows(h.weights)).encode()).hexdigest()
        seen = tried.setdefault(str(h.feature), [])
        if digest not in seen:
            seen.append(digest)
        counts.append(seen.index(digest) + 1)
    fa.write_whole(path, to_json(of_saes))
    return counts


# --------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------


class OwnResult(NamedTuple):
    """One hypothesis of a person, tested."""

    number: int  # in its file, from 1
    hypothesis: Hypothesis  # with its threshold
    row: Row
    tries: int  # drawings of this feature that were tested in the folder, up to this one
    mean_ink: np.ndarray  # (h, w) of the validation images that activate the feature


def evaluate_own(
    hypotheses: Sequence[Hypothesis], layer: fa.ExplainedLayer, folder: Path
) -> list[OwnResult]:
    """Each hypothesis tested on the test half of the layer's split "test", and on the replication
    half; the drawings are counted in the folder.

    A missing threshold is found on the split "val" first. Raises InputError for a hypothesis that
    does not fit the layer.
    """
    val, rule = layer.splits["val"], Rule()
    canvas = fit_canvas(val.images)
    try:
        check_hypotheses(hypotheses, layer, canvas)
    except (ValueError, IndexError) as error:
        raise InputError(str(error)) from error
    activity = collect_activity(layer, val.raw, val.labels)
    levels = ink_levels(canvas, val.images)
    hypotheses = with_thresholds(hypotheses, levels, activity)
    halves = split_test_images(layer.splits["test"])
    rows = evaluate_halves(hypotheses, layer, halves, canvas, rule)
    tries, results = count_tries(hypotheses, folder, layer.sae), []
    for number, (h, row, n_tried) in enumerate(zip(hypotheses, rows, tries, strict=True), 1):
        at, _ = activity.of(h.feature)
        mean = (levels[at] if len(at) else levels).mean(0).view(canvas.shape) / FULL_INK
        results.append(OwnResult(number, h, row, n_tried, mean.numpy()))
    return results


# --------------------------------------------------------------------------------------------------
# my_hypotheses.md and its pictures
# --------------------------------------------------------------------------------------------------


def printable(words: str) -> str:
    """Words on one line, without characters that steer a terminal or turn the direction of text."""
    return "".join(c for c in " ".join(words.split()) if c.isprintable())


def escaped(words: str) -> str:
    """Words without meaning in Markdown or HTML, on one line."""
    words = printable(words).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]>#|])", r"\\\1", words)


def calibration_rows(results: Sequence[OwnResult]) -> list[list[str]]:
    """A table: of hypotheses of each confidence, how many the tests find High, Medium, Low."""
    rows = [["your confidence", *(f"found {name}" for name in CONFIDENCES)]]
    for name in (*CONFIDENCES, ""):
        of_name = [r.row for r in results if r.hypothesis.confidence == name]
        own = [row.decision.confidence for row in of_name if row.evidence.picked]
        if own:
            rows.append([name or "none given", *(str(own.count(c)) for c in CONFIDENCES)])
    return rows


def result_lines(r: OwnResult, machine: dict | None, classes: Sequence[str]) -> list[str]:
    """The Markdown section of one result; `machine` is the feature's record of
    feature_report.json."""
    h, (e, d, again, replicated) = r.hypothesis, r.row
    lines = [
        f"## Feature {h.feature}: {escaped(h.caption)}",
        "",
        f"![ink wanted in red, unwanted in blue]({picture_name(r)})",
        "",
        f"- Confidence by the tests: {confidence_words(d.confidence, replicated)}; by its author: "
        f"{h.confidence or 'none given'}",
    ]
    words = (
        picked_words(e.picked, e.undrawn, e.n_strong is not None)
        if e.picked
        else escaped(why_not_tested(r))
    )
    lines.append(f"- In words: {words}")
    if again.f1 is not None:
        lines.append(f"- F1 on the replication half {again.f1:.2f}")
    if machine and machine.get("f1") is not None:
        lines.append(f"- The program's own: {machine['caption']}: F1 {machine['f1']:.2f}")
    if r.tries > 1:
        lines.append(
            f"- Drawing number {r.tries} of this feature on the test half: each look at it makes "
            f"the evidence weaker"
        )
    lines += [f"- {line}" for line in measured_lines(h, e, d, classes)]
    return [*lines, ""]


def why_not_tested(r: OwnResult) -> str:
    """The reason why a hypothesis has no F1."""
    e = r.row.evidence
    if e.is_testable:
        return f"nothing is drawn{': ' * bool(r.hypothesis.undrawn)}{r.hypothesis.undrawn}"
    return f"not tested: active on {e.n_active} of {e.n_images} images"


def picture_name(r: OwnResult) -> str:
    return f"my_hypothesis_{r.number}_feature_{r.hypothesis.feature}.png"


def own_markdown(
    results: Sequence[OwnResult], report: Sequence[dict], classes: Sequence[str]
) -> str:
    """my_hypotheses.md; `report` are the records of feature_report.json."""
    machine = {entry["feature"]: entry for entry in report}
    first = results[0].row
    lines = [
        "# Your hypotheses, tested",
        "",
        f"Tested on {first.evidence.n_images:,} test images, those with even numbers; the "
        f"{first.again.n_images:,} with odd numbers show whether the result is replicated.",
        "",
        *markdown_table(calibration_rows(results)),
        "",
    ]
    for r in results:
        lines += result_lines(r, machine.get(r.hypothesis.feature), classes)
    return "\n".join(lines)


def write_report(
    results: Sequence[OwnResult], folder: Path, report: Sequence[dict], classes: Sequence[str]
) -> None:
    """Write my_hypotheses.md, and a picture of each hypothesis."""
    for r in results:
        drawn = r.hypothesis.is_drawn
        weights = r.hypothesis.weights if drawn else np.zeros(r.mean_ink.shape, np.int8)
        sketch = Sketch(r.mean_ink, weights, r.hypothesis.caption)
        picture = paint_hypothesis(sketch, r.hypothesis.feature)
        fa.save_pixels(picture, folder / picture_name(r))
    content = own_markdown(results, report, classes)
    fa.write_whole(folder / "my_hypotheses.md", content.encode())


def report_own(
    hypotheses: Sequence[Hypothesis],
    layer: fa.ExplainedLayer,
    folder: Path,
    report: Sequence[dict],
    classes: Sequence[str],
) -> list[dict]:
    """The records of hypotheses, tested on a finished run in the folder, which gets
    my_hypotheses.md and a picture of each; prints a line about each."""
    results = evaluate_own(hypotheses, layer, folder)
    write_report(results, folder, report, classes)
    print(f"{results_text(results)}\n{folder / 'my_hypotheses.md'}   the tests, with pictures")
    return [
        {**hypothesis_record(r.hypothesis), "found": r.row.decision.confidence} for r in results
    ]


def results_text(results: Sequence[OwnResult]) -> str:
    """A line for each result, for the terminal."""
    lines = []
    for r in results:
        e, name = r.row.evidence, r.row.decision.confidence
        found = why_not_tested(r)
        if e.picked:
            precision, recall = percent(e.picked.precision), percent(e.picked.recall)
            found = f"F1 {e.picked.f1:.2f}, precision {precision}, recall {recall}"
            found = f"by class: {found}" if e.undrawn else found
        caption = printable(r.hypothesis.caption)[:60]
        lines.append(f"{r.hypothesis.feature:>5}  {name:<6}  {found}; {caption}")
    return "\n".join(lines)
