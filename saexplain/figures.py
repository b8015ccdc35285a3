"""TODO"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import feature_analysis as fa
from saexplain.evaluation import BANDS, Comparison, Evaluation, all_shares, influence_course
from saexplain.statistics import wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def frontier_curves(records: Sequence[dict]) -> dict[str, tuple[list[float], list[float]]]:
    """What the frontier shows, by title: values and their spread, one of each record."""
    nothing = [0.0] * len(records)
    relative = [math.nan if r["fvu_to_pca"] is None else r["fvu_to_pca"] for r in records]
    changed = [100 * (1 - r["agreement_jumprelu"]) for r in records]
    dense = [math.nan if s is None else s for s in (r["dense_share_of_l0"] for r in records)]
    curves = {
        "FVU, relative to as many PCs": (relative, nothing),
        "% of predictions that change": (changed, nothing),
        "share of L0 by dense features": (dense, nothing),
    }
    if all("reproducibility" in r for r in records):
        titles = {"variance": "variance reproduced across seeds"}
        titles["similarity"] = "similarity of nearest features"
        for name, title in titles.items():
            found = [r["reproducibility"][name] for r in records]
            curves[title] = [f["mean"] for f in found], [f["std"] or 0.0 for f in found]
    return curves


class Curve(NamedTuple):
    """Values over the numbers of active features, with their spread."""

    l0: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float]


CURVE_COLORS = ("#2166ac", "#b2182b", "#4d9221", "#7b3294", "#666666")


def draw_curves(
    path: Path, title: str, targets: Sequence[int], panels: dict[str, dict[str, Curve]]
) -> None:
    """A picture with one panel for each title, in it one curve for each name; `targets` stand at
    the places of the first curve."""
    figure = fa.new_figure(250 * len(panels), 310)
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (what, curves) in zip(axes_of, panels.items(), strict=True):
        for (name, curve), colour in zip(
            curves.items(), itertools.cycle(CURVE_COLORS), strict=False
        ):
            axes.errorbar(*curve, fmt="o-", color=colour, capsize=3, label=name)
        first = next(iter(curves.values()))
        axes.set_xscale("log")
        axes.set_xticks(first.l0, [str(target) for target in targets])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("active features per image", fontsize=9)
        axes.set_title(what, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.3)
    if len(panels) and len(curves) > 1:
        axes_of[0].legend(fontsize=8)
    fa.save_figure(figure, path)


def draw_frontier(records: Sequence[dict], path: Path) -> None:
    """Sparsity against fidelity, and against what returns where other seeds were trained."""
    records = sorted(records, key=lambda r: r["achieved_actives_test"])
    l0 = [r["achieved_actives_test"] for r in records]
    panels = {}
    for title, (values, spread) in frontier_curves(records).items():
        panels[title] = {"": Curve(l0, values, spread)}
    title = "What the number of active features changes (bars: spread over pairs of SAEs)"
    draw_curves(path, title, [r["target_actives"] for r in records], panels)


class TrainingCurve(NamedTuple):
    """One panel of training.png."""

    title: str
    steps: list[int]
    values: list[float]
    logarithmic: bool = False
    aim: float | None = None  # what is asked for
    turn: float | None = None  # the step from which the classifier's logits count


def training_curves(
    classifier: Sequence[dict],
    sae: Sequence[dict],
    target: int,
    logits_from: int | None,
    dead_below: float,
) -> list[TrainingCurve]:
    """What training.png shows of the lines of run.log.jsonl; nothing of a stage without lines."""
    curves = []

    def add(lines: Sequence[dict], name: str, title: str, *given) -> None:
        if lines:
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            curves.append(TrainingCurve(title, steps, values, *given))

    turn = logits_from
    add(classifier, "loss", "Classifier: cross entropy\nin nats", True)
    add(sae, "loss", "SAE: share of the variance\nnot reconstructed", True, None, turn)
    what = f"SAE: active features per image\n(dashed: the {target} asked for)"
    add(sae, "l0", what, False, target, turn)
    add(sae, "lambda", "SAE: lambda, the price\nof an active feature", False, None, turn)
    what = f"SAE: dead latents, firing on\nfewer than 1 in {1 / dead_below:,.0f} images"
    add(sae, "dead", what, False, None, turn)
    return curves


def draw_training(curves: Sequence[TrainingCurve], path: Path) -> None:
    """A panel for each curve, over the steps of its training."""
    figure = fa.new_figure(250 * len(curves), 290)
    figure.set_layout_engine("constrained")
    words = "How training went; every point is one batch"
    if any(curve.turn is not None for curve in curves):
        words += ". Dotted: from here on the classifier's logits count"
    figure.suptitle(words, fontsize=11)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        axes.plot(curve.steps, curve.values, color="#2166ac", linewidth=1.2)
        if curve.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(0, 1.05 * max(curve.values) or 1)
            if all(isinstance(value, int) for value in curve.values):
                axes.yaxis.get_major_locator().set_params(integer=True)
        if curve.aim is not None:
            axes.axhline(curve.aim, color="#b2182b", linestyle="--", linewidth=1)
        if curve.turn is not None:
            axes.axvline(curve.turn, color="#666666", linestyle=":", linewidth=1)
        axes.set_title(curve.title, fontsize=9.5)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.3)
    fa.save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# Sweeps: every combination of seeds, numbers of latents and targets, trained once and measured
# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------
# Sketches: where ink is claimed to be, and where none
# --------------------------------------------------------------------------------------------------


COLOURS = ("#b2182b", "#2166ac", "#4d9221", "#e08214", "0.4")
CONFIDENCE_COLOURS = {"High": "#1b7837", "Medium": "#a6dba0", "Low": "0.75"}


def _draw_aurocs(axes, everything: dict[str, Comparison], bar: float) -> None:
    for colour, (name, c) in zip(COLOURS, everything.items(), strict=False):
        ranked = np.sort(c.aurocs)
        at_least = 1 - np.arange(len(ranked)) / max(1, len(ranked))
        axes.step([*ranked, 1.0], [*at_least, 0.0], color=colour, label=name)
    axes.axvline(bar, color="0.6", linestyle=":")
    axes.text(bar - 0.01, 0.03, f"bar {bar:g}", ha="right", fontsize=8.5, color="0.4")
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("AUROC on unseen images (0 without a statement)", fontsize=9)
    axes.set_title("share of features predicted at least so well", fontsize=10, loc="left")
    axes.legend(fontsize=8.5, loc="lower left")


def _draw_bands(axes, everything: dict[str, Comparison]) -> None:
    """Explained shares by firing rate, with 95% intervals over features."""
    width = 0.8 / len(everything)
    for i, (colour, (name, c)) in enumerate(zip(COLOURS, everything.items(), strict=False)):
        for x, band in enumerate(c.shares.bands):
            n = max(1, band["features"])
            share, (low, high) = band["explained"] / n, wilson_interval(band["explained"], n)
            at, label = x - 0.4 + (i + 0.5) * width, name if x == 0 else None
            axes.bar(at, share, width, color=colour, label=label)
            if band["features"]:
                ends = [[max(0.0, share - low)], [max(0.0, high - share)]]
                axes.errorbar(at, share, ends, color="0.2", linewidth=1, capsize=2)
    edges = [f"up to {edge:.1%}" for edge in BANDS] + ["more"]
    counts = [band["features"] for band in everything["SAE"].shares.bands]
    names = [f"{edge}\n({n} of the SAE)" for edge, n in zip(edges, counts, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("share of images that fire the feature", fontsize=9)
    if not any(c.shares.explained for c in everything.values()):
        axes.text(0.5, 0.5, "none is", ha="center", color="0.4", transform=axes.transAxes)
    axes.set_title(
        "share of features explained: all that is said is confirmed", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8.5)


def draw_explained(evaluation: Evaluation, comparisons: dict[str, Comparison]) -> Figure:
    """How well the statements about several sets of features predict, and what share is explained
    in each band of firing rates."""
    everything = all_shares(evaluation, comparisons)
    figure = fa.new_figure(1050, 400)
    left = figure.add_axes((0.06, 0.17, 0.4, 0.65))
    right = figure.add_axes((0.53, 0.17, 0.45, 0.65))
    _draw_aurocs(left, everything, evaluation.rule.both_auroc)
    _draw_bands(right, everything)
    for axes in (left, right):
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Statements about features, tested on images that were not used to make them"
    figure.suptitle(title, fontsize=11.5)
    return figure


def draw_influence(evaluation: Evaluation) -> Figure:
    """How many features do how much of the work, and with what confidence each is explained."""
    order = sorted(range(len(evaluation.evidence)), key=lambda i: -evaluation.evidence[i].influence)
    influence = np.array([evaluation.evidence[i].influence for i in order])
    figure = fa.new_figure(1050, 400)
    axes = figure.add_axes((0.07, 0.14, 0.86, 0.72))
    ranks = np.arange(1, len(order) + 1)
    confidences = [evaluation.decisions[i].confidence for i in order]
    for name, colour in CONFIDENCE_COLOURS.items():
        some = np.array([confidence == name for confidence in confidences])
        label = f"{name}: {influence[some].sum():.0%} of the influence"
        axes.bar(ranks[some], 100 * influence[some], 1.0, color=colour, label=label)
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.set_xlabel("features, the most influential first", fontsize=9)
    axes.set_ylabel("influence of each, %", fontsize=9)
    axes.legend(fontsize=9, loc="center right", title="confidence in its statement")
    total = axes.twinx()
    total.plot(ranks, 100 * influence.cumsum(), color="0.2", linewidth=1.5)
    for share, n in influence_course(evaluation).items():
        total.plot([n], [float(share.rstrip("%"))], "o", color="0.2", markersize=4)
        total.annotate(
            f"{n} make {share}",
            (n, float(share.rstrip("%"))),
            (6, -12),
            fontsize=9,
            textcoords="offset points",
        )
    total.set_ylim(0, 105)
    total.set_ylabel("all so far, %", fontsize=9)
    for one in (axes, total):
        one.tick_params(labelsize=8.5)
        one.spines["top"].set_visible(False)
    title = "Who does the work: what removing single features does to the logits"
    figure.suptitle(title, fontsize=11.5)
    return figure
