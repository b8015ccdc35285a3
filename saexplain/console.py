"""What does the terminal show? Tables and lines of text about finished records.

    print(results_table(records))  # records of summary.json, a column for each

Takes records of summary.json and feature_report.json; gives text, about 50 lines for a run of one
target: its most influential features, its diagnoses, its results, where to look. All else is in the
files that it names. It computes nothing.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from saexplain.text import confidence_words, headline

NOT_COMPUTED = "not computed"  # a ratio whose denominator is 0
WIDTH = 110  # characters of a line of words


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


def stage_line(name: str, seconds: float, number: str = "") -> None:
    """Print a line about a finished stage where stdout is no terminal, which shows bars instead, as
    in "activations: 20,000 images, 49 positions of 64 numbers (3.2 s)"."""
    if not sys.stdout.isatty():
        print(f"{name}: {number} ({seconds:.1f} s)" if number else f"{name} ({seconds:.1f} s)")
        sys.stdout.flush()  # a pipe would show it with the next thousand characters


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
        words = f"{entry['feature']:>5}  {entry['influence']:5.1%}  "
        words += entry.get("caption", f"active on {entry['mean_active']:.1%} of the images")
        if "effects_words" in entry:
            words += f"; {entry['effects_words']}"
        lines += textwrap.wrap(
            words, WIDTH, subsequent_indent=" " * 14, max_lines=2, placeholder=" ..."
        )
    if "hypotheses" in record:
        lines += textwrap.wrap(headline(record["hypotheses"]), WIDTH)
    return "\n".join(lines)


def diagnoses_text(record: dict) -> str:
    """The diagnoses beyond their limits, each with its number and what to change."""
    lines = []
    for d in record["diagnoses"]:
        if not d["fine"]:
            value = NOT_COMPUTED if d["value"] is None else f"{d['value']:.3g}"
            measured = f"{value}, limit {d['limit']:g} ({d['what']})"
            lines.append(f"  {d['complaint']}: {measured}; {d['advice']}")
    fine = len(record["diagnoses"]) - len(lines)
    return "\n".join([f"Diagnoses: {fine} of {len(record['diagnoses'])} fine", *lines])


def places_to_look(root: Path, folders: Mapping[Path, dict]) -> str:
    """The last lines of a run: its files, of which `folders` are those of its SAEs with their
    records."""
    lines = ["Where to look next"]
    for folder, record in folders.items():
        top = record["top_features"]
        places = {
            "feature_report.html": "open it: the network, features, errors, your own hypotheses",
            f"feature_{top[0]}_panel.png": f"one feature on one page ({len(top)} such pages)",
            "hypotheses.md": "a hypothesis about each feature, and its tests",
            "influence.png": "each feature's share of the logit effects, and its confidence",
            "training.png": "the course of training; its numbers are in run.log.jsonl",
            "feature_report.json": "every feature as a table (pandas.read_json)",
        }
        lines += [
            f"  {folder / name}   {what}"
            for name, what in places.items()
            if (folder / name).exists()
        ]
    if len(folders) > 1:
        lines.append(f"  {root / 'frontier.png'}   sparsity against fidelity and reproducibility")
    lines.append(f"  {root / 'summary.json'}   all numbers, with diagnoses and seconds per stage")
    return "\n".join(lines)


def print_results(
    root: Path, folders: Mapping[Path, dict], reports: Sequence[Sequence[dict]]
) -> None:
    """What the terminal shows of a finished run: `folders` of its SAEs with their records of
    summary.json, and their records of feature_report.json."""
    for record, report in zip(folders.values(), reports, strict=True):
        print(f"\n{features_text(record, report)}\n{diagnoses_text(record)}")
    print(f"\n{results_table(list(folders.values()))}\n\n{places_to_look(root, folders)}")
