"""What does the terminal show of a finished run? The numbers that matter most, in 40 lines.

    print_results(Path("out"), {Path("out"): record}, [report])  # verbose=True for all numbers

Takes records of summary.json and feature_report.json; prints text of WIDTH characters. All else is
in the files that it names. It computes nothing.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import NamedTuple

import feature_analysis as fa
from saexplain.progress import WIDTH, encodable
from saexplain.text import confidence_words, headline

NOT_COMPUTED = "not computed"  # a ratio whose denominator is 0
COLUMNS = 5  # SAEs beside each other
WARNINGS_SHOWN, PAGES_SHOWN = 4, 6


class Result(NamedTuple):
    """A number of summary.json with its titles."""

    title: str  # in the terminal's table
    key: str  # in the record
    form: str  # a format
    on_page: str = ""  # its title on the page; empty: not shown there


RESULTS = (
    Result("L0, validation", "achieved_actives_val", "{:.4f}"),
    Result("L0, test", "achieved_actives_test", "{:.2f}", "features active per image (L0)"),
    Result("L0 per position, test", "l0_position_test", "{:.2f}", "features active per position"),
    Result("  per image", "l0_image_test", "{:.1f}", "... per image, at any position"),
    Result("lambda", "lambda", "{:.4f}"),
    Result("accuracy, network", "baseline_acc", "{:.2%}", "accuracy of the network"),
    Result(
        "  SAE spliced in",
        "recon_acc_jumprelu",
        "{:.2%}",
        "accuracy with the SAE's reconstruction in place of the activations",
    ),
    Result("  boolean activations", "recon_acc_boolean", "{:.2%}"),
    Result("  boolean, scaled", "recon_acc_boolean_scaled", "{:.2%}"),
    Result("agreement", "agreement_jumprelu", "{:.2%}", "predictions kept with the SAE"),
    Result("  of as many PCs", "agreement_pca", "{:.2%}", "... with as many principal components"),
    Result("  of the untrained SAE", "agreement_untrained", "{:.2%}", "... with the untrained SAE"),
    Result(
        "  hypotheses in place of features",
        "agreement_hypotheses",
        "{:.2%}",
        "predictions kept with hypotheses in place of all features",
    ),
    Result("F1 of hypotheses, by influence", "f1_by_influence", "{:.3f}", "F1, by influence"),
    Result("  mean", "f1_mean", "{:.3f}"),
    Result("FVU", "fvu", "{:.4f}", "fraction of variance unexplained (FVU)"),
    Result("  of as many PCs", "fvu_pca", "{:.4f}", "... by as many principal components"),
    Result("  of the untrained SAE", "fvu_untrained", "{:.4f}", "... by the untrained SAE"),
    Result("  relative to PCs", "fvu_to_pca", "{:.3f}"),
    Result("cross entropy recovered", "ce_recovered", "{:.4f}"),
    Result("KL", "kl", "{:.5f}"),
    Result("dead features", "dead_features", "{}", "features that are never active (dead)"),
    Result("dense features (> 10%)", "dense_features", "{}"),
    Result("  their share of L0", "dense_share_of_l0", "{:.1%}"),
)
RATIOS = ("ce_recovered", "fvu_to_pca", "dense_share_of_l0")  # may have 0 as their denominator


INSTEAD = {  # what is left out where a record has another number, which says more
    "achieved_actives_test": "l0_position_test",
    "agreement_untrained": "agreement_hypotheses",  # then it is in the table of hypotheses.md
    "fvu_untrained": "agreement_hypotheses",
}


def is_known(result: Result, record: Mapping) -> bool:
    """Whether a record has the number, or it is a ratio that could not be computed."""
    if record.get(INSTEAD.get(result.key)) is not None:
        return False
    return record.get(result.key) is not None or (result.key in RATIOS and result.key in record)


def page_results(record: Mapping) -> list[tuple[str, str]]:
    """The numbers that the page shows, those that the record has, with their titles there."""
    shown = [result for result in RESULTS if result.on_page and is_known(result, record)]
    return [(result.on_page, shown_result(result, record)) for result in shown]


def shown_result(result: Result, record: Mapping) -> str:
    """The number in its format."""
    value = record.get(result.key)
    return NOT_COMPUTED if value is None else result.form.format(value)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def results_table(records: Sequence[dict]) -> str:
    """The numbers of summary.json that matter most, a column for each SAE."""
    rows = [["target", *(str(r["target_actives"]) for r in records)]]
    for result in RESULTS:
        if any(is_known(result, r) for r in records):
            rows.append([result.title, *(shown_result(result, r) for r in records)])
    if all("reproducibility" in r for r in records):
        rows += reproducibility_rows(records)
    rows.append(["seconds", *(f"{r['seconds']['whole run']:.1f}" for r in records)])
    return text_table(rows)


def reproducibility_rows(records: Sequence[dict]) -> list[list[str]]:
    """Rows of the results: how much of an SAE is reproduced with another seed, ± the standard
    deviation over pairs of SAEs if there are several, and the most in one of the baselines."""
    rows = []
    titles = {
        "features": "features reproduced across seeds",
        "variance": "variance reproduced across seeds",
        "pw_mcc": "PW-MCC across seeds",
    }
    for name, title in titles.items():
        cells, nulls = [], []
        for r in (r["reproducibility"] for r in records):
            mean, std = r[name]["mean"], r[name]["std"]
            cells.append(f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}")
            nulls.append(f"{max(null[name] for null in r['baselines'].values()):.3f}")
        rows += [[title, *cells], ["  in the best baseline", *nulls]]
    return rows


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


def _percent(key: str) -> Callable[[dict], str | None]:
    return lambda r: None if r.get(key) is None else f"{r[key]:.2%}"


def _number(key: str, form: str) -> Callable[[dict], str | None]:
    return lambda r: None if r.get(key) is None else form.format(r[key])


def _of_set(record: dict, name: str, key: str) -> float | None:
    return record.get("hypotheses", {}).get("summaries", {}).get(name, {}).get(key)


def _best_drawn(record: dict) -> str | None:
    """The most predictions that the drawings of a baseline keep."""
    sets = record.get("hypotheses", {}).get("summaries", {})
    kept = [s["agreement_hypotheses"] for name, s in sets.items() if name != "SAE"]
    return f"{max(kept):.2%}" if kept and None not in kept else None


def _high(record: dict) -> str | None:
    share = _of_set(record, "SAE", "influence_high")
    return None if share is None else f"{share:.0%}"


def _reproduced(record: dict) -> str | None:
    found = record.get("reproducibility")
    return f"{found['features']['mean']:.1%}" if found else None


def _best_reproduced(record: dict) -> str | None:
    nulls = record.get("reproducibility", {}).get("baselines", {})
    return f"{max(null['features'] for null in nulls.values()):.1%}" if nulls else None


SHORT = (  # what is shown of each SAE: title, text from its record, None where it has none
    ("test images classified right by the network", _percent("baseline_acc")),
    ("  with the SAE's output in place of the layer's", _percent("recon_acc_jumprelu")),
    ("predictions that stay the same with the SAE", _percent("agreement_jumprelu")),
    ("  with as many principal components (PCA)", _percent("agreement_pca")),
    ("features active per image (L0)", _number("l0_image_test", "{:.1f}")),
    ("features active per position (L0)", _number("l0_position_test", "{:.2f}")),
    ("variance that the SAE loses (FVU)", _number("fvu", "{:.4f}")),
    ("  as many principal components", _number("fvu_pca", "{:.4f}")),
    ("features that are never active (dead)", _number("dead_features", "{}")),
    ("predictions kept by drawings of all features", _percent("agreement_hypotheses")),
    ("  by drawings in the best baseline", _best_drawn),
    ("influence of features with a hypothesis rated High", _high),
    ("features found again by an SAE of another seed", _reproduced),
    ("  in the best baseline", _best_reproduced),
)


def short_table(records: Sequence[dict]) -> str:
    """The numbers that matter most, with titles in words, a column for each SAE."""
    if "l0_image_test" not in records[0]:
        records = [{**r, "l0_image_test": r["achieved_actives_test"]} for r in records]
    blocks = []
    for start in range(0, len(records), COLUMNS):
        some = records[start : start + COLUMNS]
        rows = [["target", *(str(r["target_actives"]) for r in some)]] if len(records) > 1 else []
        for title, value in SHORT:
            values = [value(r) for r in some]
            if any(v is not None for v in values):
                rows.append([title, *(v or "-" for v in values)])
        blocks.append(textwrap.indent(text_table(rows), "  "))
    return "\n".join(blocks)


def warnings_text(records: Sequence[dict]) -> str:
    """The diagnoses beyond their limits in two lines each, of several SAEs the first that has it,
    and how many more there are."""
    found = {}
    for record in records:
        for d in record["diagnoses"]:
            if not d["fine"]:
                found.setdefault(d["complaint"], (d, []))[1].append(record["target_actives"])
    if not found:
        return f"Warnings: none, in {len(records[0]['diagnoses'])} diagnoses"
    lines = ["Warnings"]
    for d, targets in list(found.values())[:WARNINGS_SHOWN]:
        at = f"target {', '.join(map(str, targets))}: " if len(records) > 1 else ""
        lines.append(wrapped(f"  {at}{diagnosis_words(d)}", 4, 2))
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
    beside |= {root / "summary.json": "all numbers, which --verbose prints"}
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
    print(f"\nResult, on the test images, after {seconds:.0f} s\n{short_table(records)}\n")
    if verbose:
        for record, report in zip(records, reports, strict=True):
            print(f"{features_text(record, report)}\n{diagnoses_text(record)}\n")
        print(f"{results_table(records)}\n")
    else:
        if len(records) == 1:
            print("The most influential features, their share of all influence, their hypothesis")
            for entry in reports[0][: len(records[0]["top_features"])]:
                print(wrapped(feature_words(entry), 15, 1))
            print()
        print(f"{warnings_text(records)}\n")
    print(places_to_look(root, folders))
