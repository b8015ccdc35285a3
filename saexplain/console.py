"""What does the terminal show of a finished run? The numbers that matter most, in 40 lines.

    print_results(Path("out"), {Path("out"): record}, [report])  # verbose=True for all numbers

Takes records of summary.json and feature_report.json; prints text of WIDTH characters. All else is
in the files that it names. It computes nothing.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import NamedTuple

import feature_analysis as fa
from saexplain.progress import WIDTH, encodable
from saexplain.quantities import NOT_COMPUTED, quantity_rows
from saexplain.text import confidence_words, headline

COLUMNS = 4  # SAEs beside each other, at most
IN_LINES = {  # of many SAEs, a line each: a title, and the key of a quantity
    "latents": "sae_latents",
    "L0": "l0_of_vector",
    "L0 per position": "l0_position_test",
    "FVU": "fvu",
    "agreement": "agreement_jumprelu",
    "acc. lost": "delta_acc_jumprelu",
    "by drawings": "agreement_hypotheses",
    "found again": "features",
}
WARNINGS_SHOWN, PAGES_SHOWN = 4, 4


def page_results(record: Mapping) -> list[tuple[str, str]]:
    """The numbers that the page shows, with their titles."""
    return [
        (f"{quantity.title.replace('  ', '... ')} ({quantity.images})", value)
        for quantity, (value,) in quantity_rows([record], most=1)
    ]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def hypothesis_lines(record: dict) -> list[str]:
    """Hypothesis, evidence and confidence of a record of feature_report.json, if it has them."""
    if "caption" not in record:
        return []
    marked = f"; {record['mark']}" if "mark" in record else ""
    lines = [
        f'  hypothesis  "{record["caption"]}"',
        f"  evidence    {record['evidence']['text']}",
        f"  confidence  {confidence_words(record['confidence'], record['replicated'])}{marked}",
    ]
    return lines + (
        [f"  effects     {record['effects_words']}"] if "effects_words" in record else []
    )


def features_text(record: dict, report: Sequence[dict]) -> str:
    """One or two lines about each of the most influential features of an SAE, and a summary."""
    lines = [f"Target {record['target_actives']}: the most influential features"]
    for entry in report[: len(record["top_features"])]:
        words = feature_words(entry)
        if "effects_words" in entry:
            words += f"; {entry['effects_words']}"
        lines.append(wrapped(words, 14, 2))
    if "hypotheses" in record:
        lines.append(wrapped(headline(record["hypotheses"]), 0))
    return "\n".join(lines)


def feature_words(entry: dict) -> str:
    """Number, influence and caption of a record of feature_report.json."""
    words = entry.get("caption", f"active on {entry['mean_active']:.1%} of the images")
    return f"{entry['feature']:>6}{entry['influence']:7.1%}  {words}"


def diagnosis_words(d: Mapping) -> str:
    """A diagnosis beyond its limit, with its number and what to change."""
    if d["value"] is None:
        return f"{d['complaint']}: {NOT_COMPUTED} ({d['what']}); {d['advice']}"
    measured = f"{d['value']:.3g}, above {d['limit']:g} ({d['what']})"
    return f"{d['complaint']}: {measured}; {d['advice']}"


def diagnoses_text(record: dict) -> str:
    """The diagnoses beyond their limits."""
    lines = [diagnosis_words(d) for d in record["diagnoses"] if not d["fine"]]
    fine = len(record["diagnoses"]) - len(lines)
    shown = [wrapped(f"  {line}", 4) for line in lines]
    return "\n".join([f"Diagnoses: {fine} of {len(record['diagnoses'])} fine", *shown])


# --------------------------------------------------------------------------------------------------
# The result in short
# --------------------------------------------------------------------------------------------------


def line_width() -> int:
    """Characters of a line: WIDTH, or fewer where the terminal is narrower."""
    return min(WIDTH, get_terminal_size((WIDTH, 24)).columns)


def wrapped(words: str, indent: int, most: int | None = None) -> str:
    """The words in lines, at most so many, the further ones indented; those that stdout cannot
    encode as escapes, which count as they are printed, and without what steers a terminal."""
    words = "".join(c for c in words if c.isprintable())
    words = encodable(words, getattr(sys.stdout, "encoding", None) or "utf-8")
    given = {"max_lines": most, "placeholder": " ...", "subsequent_indent": " " * indent}
    return textwrap.fill(words, line_width(), break_on_hyphens=False, **given)


def print_words(words: str) -> None:
    """Print the words in lines of at most WIDTH characters."""
    print(wrapped(words, 2))


def layer_words(layer: fa.ExplainedLayer) -> str:
    """The sizes of a layer's activations."""
    sizes = " + ".join(f"{len(split.raw):,}" for split in layer.splits.values())
    at = f", {layer.positions.n} positions" if layer.has_positions else ""
    return f"{sizes} images{at}, {len(layer.mu)} units"


def kept_words(record: dict) -> str:
    """What is kept with the SAE spliced in, in a few words; `record` is that of summary.json."""
    kept, right = record["agreement_jumprelu"], record["recon_acc_jumprelu"]
    return f"{kept:.1%} of predictions kept, {right:.2%} right"


def reproduced_words(record: dict) -> str:
    """How much another SAE has, too, in a few words; `record` is `reproducibility` there."""
    return f"{record['features']['mean']:.1%} of features found again by another SAE"


def explained_words(summary: NamedTuple) -> str:
    """The result of testing hypotheses in a few words; `summary` is that of an `Evaluation`."""
    if summary.agreement_hypotheses is None:
        return f"{summary.influence_high:.0%} of the influence has confidence High"
    kept = f"{summary.agreement_hypotheses:.1%} of predictions kept by drawings"
    return f"{kept}; F1 {summary.f1_by_influence:.2f}"


def results_table(records: Sequence[dict], most: int) -> str:
    """The numbers of at most this detail, and over which images each is, a column for each SAE; of
    more than COLUMNS SAEs a few numbers, a line for each."""
    if len(records) > COLUMNS:
        return lines_table([f"target {r['target_actives']}" for r in records], records)
    found = quantity_rows(records, most)
    rows = [[quantity.title, *cells] for quantity, cells in found]
    images = [quantity.images for quantity, _ in found]
    if len(records) > 1:
        rows.insert(0, ["target", *(str(r["target_actives"]) for r in records)])
        images.insert(0, "")
    lines = zip(text_table(rows).splitlines(), images, strict=True)
    return "\n".join(f"  {line}  {over}".rstrip() for line, over in lines)


def lines_table(titles: Sequence[str], records: Sequence[Mapping]) -> str:
    """A few numbers of many SAEs, a line for each."""
    cells = {quantity.key: cells for quantity, cells in quantity_rows(records, most=3)}
    shown = {title: cells[key] for title, key in IN_LINES.items() if key in cells}
    columns = [["", *titles], *([title, *own] for title, own in shown.items())]
    return text_table(list(zip(*columns, strict=True)))


def warnings_text(records: Sequence[dict]) -> str:
    """The diagnoses beyond their limits in two lines each, of several SAEs the first that has it,
    and how many more there are."""
    found = {}
    for record in records:
        for d in record["diagnoses"]:
            if not d["fine"]:
                found.setdefault(d["complaint"], (d, []))[1].append(record["target_actives"])
    if not found:
        return f"Diagnoses: all {len(records[0]['diagnoses'])} fine"
    lines = ["Diagnoses beyond their limits, which are rules of thumb"]
    for d, targets in list(found.values())[:WARNINGS_SHOWN]:
        at = f"target {', '.join(map(str, targets))}: " if len(records) > 1 else ""
        lines.append(wrapped(f"  {at}{diagnosis_words(d)}", 4, 3))
    if len(found) > WARNINGS_SHOWN:
        lines.append(f"  and {len(found) - WARNINGS_SHOWN} more: --verbose, or summary.json")
    return "\n".join(lines)


def places_to_look(root: Path, folders: Mapping[Path, dict]) -> str:
    """The last lines of a run: its pages, in the folders of its SAEs, and what is beside them."""
    pages = [folder / "feature_report.html" for folder in folders]
    lines = ["Open in a browser (classes, errors, features, a canvas for your hypotheses):"]
    lines += [f"  {path}" for path in pages[:PAGES_SHOWN]]
    if len(pages) > PAGES_SHOWN:
        lines.append(f"  and {len(pages) - PAGES_SHOWN} more, of the other targets")
    folder, record = next(iter(folders.items()))
    beside = {
        f"feature_{(record['top_features'] or [0])[0]}_panel.png": "all about one feature",
        "hypotheses.md": "the tests",
        "feature_report.json": "a record per feature",
    }
    beside = {folder / name: what for name, what in beside.items()}
    beside |= {root / "frontier.png": "the targets compared"}
    beside |= {root / "summary.json": "all numbers"}
    named = [f"{path.name} ({what})" for path, what in beside.items() if path.exists()]
    return "\n".join([*lines, wrapped(f"Beside it: {', '.join(named)}", 2)])


def print_results(
    root: Path,
    folders: Mapping[Path, dict],
    reports: Sequence[Sequence[dict]],
    verbose: bool = False,
) -> None:
    """Print what the terminal shows of a finished run, at most 40 lines: `folders` of its SAEs with
    their records of summary.json, and their records of feature_report.json; all with `verbose`."""
    records = list(folders.values())
    seconds = records[0]["seconds"]["whole run"]
    table = results_table(records, most=3 if verbose else 1)
    print(f"\nResult after {seconds:.0f} s\n{table}\n")
    if verbose:
        for record, report in zip(records, reports, strict=True):
            print(f"{features_text(record, report)}\n{diagnoses_text(record)}\n")
    else:
        if len(records) == 1:
            print("The most influential features, their share of all influence, their hypothesis")
            for entry in reports[0][: len(records[0]["top_features"])]:
                print(wrapped(feature_words(entry), 15, 1))
            print()
        print(f"{warnings_text(records)}\n")
    print(places_to_look(root, folders))
