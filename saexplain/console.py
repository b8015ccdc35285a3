"""What does the terminal show? Tables and lines of text about finished records; details are in files.

Takes records of summary.json and feature_report.json; gives text, and prints warnings. It computes
nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from saexplain.hypotheses import Hypothesis
from saexplain.text import headline

NOT_COMPUTED = "not computed"  # a ratio whose denominator is 0


def warn_no_strokes(hypotheses: Sequence[Hypothesis]) -> None:
    """Print once why no hypothesis names strokes, where none can."""
    reasons = {h.skip_reasons.get("ink") for h in hypotheses if h.threshold is not None}
    if len(reasons) == 1 and None not in reasons and not any(any(h.ink) for h in hypotheses):
        print(
            f"no strokes are named: {reasons.pop()}; hypotheses name labels and effects, and no "
            f"feature counts as explained"
        )


class Result(NamedTuple):
    """A number of summary.json as people see it."""

    title: str
    key: str
    form: str
    on_page: str = ""  # its words on the page, if it is shown there


RESULTS = (
    Result("L0 before thresholds are adjusted", "achieved_actives_before_shift", "{:.2f}"),
    Result("L0, validation", "achieved_actives_val", "{:.4f}"),
    Result("L0, test", "achieved_actives_test", "{:.2f}", "features active per image (L0)"),
    Result("lambda", "lambda", "{:.4f}"),
    Result("threshold shift", "threshold_shift", "{:+.5f}"),
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
    Result("FVU", "fvu", "{:.4f}", "fraction of variance unexplained (FVU)"),
    Result("  of as many PCs", "fvu_pca", "{:.4f}", "... by as many principal components"),
    Result("  relative to PCs", "fvu_to_pca", "{:.3f}"),
    Result("disagreement relative to PCs", "disagreement_to_pca", "{:.3f}"),
    Result("cross entropy recovered", "ce_recovered", "{:.4f}"),
    Result("KL", "kl", "{:.5f}"),
    Result("dead features", "dead_features", "{}", "features that are never active (dead)"),
    Result("dense features (> 10%)", "dense_features", "{}"),
    Result("  their share of L0", "dense_share_of_l0", "{:.1%}"),
)


def shown_result(result: Result, record: Mapping) -> str:
    """The number as people see it."""
    value = record.get(result.key)
    return NOT_COMPUTED if value is None else result.form.format(value)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def results_table(records: Sequence[dict]) -> str:
    """One column per SAE."""
    rows = [["target", *(str(r["target_actives"]) for r in records)]]
    for result in RESULTS:
        rows.append([result.title, *(shown_result(result, r) for r in records)])
    if all("reproducibility" in r for r in records):
        rows += reproducibility_rows(records)
    rows.append(["seconds", *(f"{r['seconds']['whole run']:.1f}" for r in records)])
    return text_table(rows)


def reproducibility_rows(records: Sequence[dict]) -> list[list[str]]:
    """How much of an SAE is found again with another seed, with the standard deviation over pairs of
    SAEs where there are several; and the same for directions that were not trained."""
    rows = []
    titles = {
        "features": "features reproduced across seeds",
        "variance": "variance reproduced across seeds",
        "similarity": "similarity of nearest features",
    }
    for name, title in titles.items():
        cells, untrained = [], []
        for r in records:
            mean, std = r["reproducibility"][name]["mean"], r["reproducibility"][name]["std"]
            cells.append(f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}")
            untrained.append(f"{r['reproducibility']['untrained'][name]:.3f}")
        rows += [[title, *cells], ["  by untrained directions", *untrained]]
    return rows


def hypothesis_lines(record: dict) -> list[str]:
    """Hypothesis, evidence and confidence of a feature, if there are any."""
    if "caption" not in record:
        return []
    marked = f"; {record['mark']}" if "mark" in record else ""
    return [
        f'  hypothesis  "{record["caption"]}"',
        f"  evidence    {record['evidence']['text']}",
        f"  confidence  {record['confidence']} ({record['outcome']}{marked})",
    ]


def features_text(record: dict, report: Sequence[dict]) -> str:
    """A line about each of the most influential features of an SAE."""
    lines = [f"Target {record['target_actives']}: the most influential features"]
    for entry in report[: len(record["top_features"])]:
        words = f"{entry['feature']:>5}  {entry['influence']:5.1%}  "
        words += entry.get("caption", f"active on {entry['mean_active']:.1%} of the images")
        lines += textwrap.wrap(words, 110, initial_indent="", subsequent_indent=" " * 14)
    if "hypotheses" in record:
        lines += textwrap.wrap(headline(record["hypotheses"]), 110)
    return "\n".join(lines)


def diagnoses_text(record: dict) -> str:
    """The diagnoses that deserve attention, each with its number and what to change."""
    lines = []
    for d in record["diagnoses"]:
        if not d["fine"]:
            value = NOT_COMPUTED if d["value"] is None else f"{d['value']:.3g}"
            measured = f"{d['what']} is {value}, limit {d['limit']:g}"
            lines.append(f"  {d['complaint']}: {measured}; {d['advice']}")
    fine = len(record["diagnoses"]) - len(lines)
    return "\n".join([f"Diagnoses: {fine} of {len(record['diagnoses'])} fine", *lines])


def places_to_look(root: Path, folders: Mapping[Path, dict]) -> str:
    """The last lines of a run; `folders` are those of its SAEs, with their records."""
    lines = ["Where to look next"]
    for folder, record in folders.items():
        top = record["top_features"]
        places = {
            "feature_report.html": "a page to open: the network, its features, its errors",
            f"feature_{top[0]}_panel.png": f"one feature on one page ({len(top)} such pages)",
            "hypotheses.md": "what each feature may mean, and how that was tested",
            "influence.png": "which features make up the logit effects, and how far they are explained",
            "training.png": "the course of training; run.log.jsonl holds the numbers",
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
