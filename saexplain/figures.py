"""What did training, a sweep of targets and the tests find? The plots of a run.

    figure = draw_frontier(records)  # records of summary.json
    save_figure(figure, folder / "frontier.png")

Takes finished records and evaluations; gives matplotlib Figures, and writes nothing.

To add a plot, write a function that returns a Figure made by `new_figure(width, height)`, in
screen pixels; call `save_figure` where its records are complete; add the file's name to
OWN_FILES of saexplain/runs.py, which the next run removes, and to `places_to_look` of
saexplain/console.py, which the terminal shows.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import feature_analysis as fa
from saexplain.evaluation import BANDS, Evaluation, Summary, features_of_influence

if TYPE_CHECKING:  # matplotlib takes half a second, which only drawing needs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2166ac", "#b2182b", "#4d9221", "#e08214", "#666666")
CONFIDENCE_COLORS = {"High": "#1b7837", "Medium": "#a6dba0", "Low": "#bfbfbf"}
TITLES = {  # of panels, for short names of measurements
    "FVU": "variance not reconstructed\n(FVU), share",
    "FVU to PCs": "FVU over that of as many\nprincipal components",
    "FVU, relative to as many PCs": "FVU over that of as many\nprincipal components",
    "accuracy lost": "accuracy lost,\nshare of the test images",
    "% of predictions that change": "predictions that change,\n% of the test images",
    "dead": "dead latents,\nnumber",
    "L0 by dense": "share of L0 by features active\non over 10% of the images",
    "share of L0 by dense features": "share of L0 by features active\non over 10% of the images",
    "variance reproduced across seeds": "variance reproduced\nacross seeds, share",
    "similarity of nearest features": "similarity of nearest features\n(1: the same)",
}
PANEL_WIDTH = 250  # screen pixels of one panel in a row of them
TINY, SMALL, NORMAL, LARGE = 7, 8.5, 9.5, 11  # points: numbers, ticks, titles of panels, of all


def new_figure(width: float, height: float) -> Figure:
    """A Figure of width x height screen pixels, unknown to pyplot: it needs no closing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / fa.DPI, height / fa.DPI), dpi=fa.DPI)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a Figure as PNG, completely or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    fa.write_whole(path, buffer.getvalue())


def _row_of_panels(n: int, height: float, title: str) -> tuple[Figure, Sequence[Axes]]:
    """A Figure with n panels side by side under a title."""
    figure = new_figure(PANEL_WIDTH * n, height)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=LARGE)
    panels = figure.subplots(1, n, squeeze=False)[0]
    for axes in panels:
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
    return figure, panels


# --------------------------------------------------------------------------------------------------
# The course of training
# --------------------------------------------------------------------------------------------------


class TrainingCurve(NamedTuple):
    """One panel of training.png."""

    title: str
    unit: str
    steps: list[int]
    values: list[float]
    logarithmic: bool = False
    target: float | None = None  # a dashed line: the value asked for
    logits_from: float | None = None  # a dotted line: the step from which the loss has the logits


def training_curves(
    classifier: Sequence[dict],
    sae: Sequence[dict],
    target: int,
    logits_from: float | None,
    dead_below: float,
) -> list[TrainingCurve]:
    """The panels of training.png from lines of run.log.jsonl; none for a stage without lines.

    A latent is dead when it is active on a smaller share of the images than `dead_below`.
    """
    curves = []

    def add(lines: Sequence[dict], name: str, title: str, unit: str, **more) -> None:
        if lines:
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            curves.append(TrainingCurve(title, unit, steps, values, **more))

    add(classifier, "loss", "Classifier: loss\n(cross entropy)", "nats", logarithmic=True)
    variance = "SAE: variance not\nreconstructed (FVU)"
    add(sae, "loss", variance, "share", logarithmic=True, logits_from=logits_from)
    l0 = f"SAE: features active at once\n(dashed: the target, {target})"
    add(sae, "l0", l0, "features", target=target, logits_from=logits_from)
    price = "SAE: lambda, the price\nof an active feature"
    add(sae, "lambda", price, "variance per feature", logits_from=logits_from)
    dead = f"SAE: dead latents (active less\nthan 1 in {1 / dead_below:,.0f} times)"
    add(sae, "dead", dead, "latents", logits_from=logits_from)
    return curves


def draw_training(curves: Sequence[TrainingCurve]) -> Figure:
    """A panel for each curve, over the steps of its training."""
    title = "Training; every point is one batch"
    if any(curve.logits_from is not None for curve in curves):
        title += ". Dotted: from this step on the loss has the classifier's scores (logits)"
    figure, panels = _row_of_panels(len(curves), 290, title)
    for axes, curve in zip(panels, curves, strict=True):
        axes.plot(curve.steps, curve.values, color=COLORS[0], linewidth=1.2)
        axes.set_title(curve.title, fontsize=NORMAL)
        axes.set_xlabel("step", fontsize=SMALL)
        axes.set_ylabel(curve.unit, fontsize=SMALL)
        if curve.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(0, 1.05 * max(curve.values) or 1)  # 1: all of them are 0
            if all(isinstance(value, int) for value in curve.values):
                axes.yaxis.get_major_locator().set_params(integer=True)
        if curve.target is not None:
            axes.axhline(curve.target, color=COLORS[1], linestyle="--", linewidth=1)
        if curve.logits_from is not None:
            axes.axvline(curve.logits_from, color="0.4", linestyle=":", linewidth=1)
    return figure


# --------------------------------------------------------------------------------------------------
# Fidelity against sparsity, of one run or of a sweep
# --------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Values over the numbers of active features; NaN leaves a gap."""

    l0: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float] | None = None  # half the length of the bar at each value; None: no bars


def curve_of(l0: Sequence[float], values: Sequence[Mapping]) -> Curve:
    """The curve of means, with their standard deviations where all are known."""
    spread = [value["std"] for value in values]
    return Curve(l0, [value["mean"] for value in values], None if None in spread else spread)


def draw_curves(
    title: str, targets: Sequence[int], panels: dict[str, dict[str, Curve]], over: str
) -> Figure:
    """A panel for each title, with a curve for each name; the ticks are the `targets`, at the L0 of
    the first curve. `over` says of what the bars are the standard deviation."""
    if any(c.spread is not None for curves in panels.values() for c in curves.values()):
        title += f" (bars: standard deviation over {over})"
    figure, row = _row_of_panels(len(panels), 310, title)
    for axes, (what, curves) in zip(row, panels.items(), strict=True):
        for color, (name, curve) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
            axes.errorbar(*curve, fmt="o-", color=color, capsize=3, label=name)
        first = next(iter(curves.values()))
        axes.set_xscale("log")  # targets usually double
        axes.set_xticks(first.l0, [str(target) for target in targets])
        axes.minorticks_off()
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # from 0, without cutting the largest
        axes.set_xlabel("active features per image", fontsize=SMALL)
        axes.set_title(TITLES.get(what, what), fontsize=NORMAL)
        if len(curves) > 1 and axes is row[0]:
            axes.legend(fontsize=8)
    return figure


def frontier_curves(records: Sequence[dict]) -> dict[str, Curve]:
    """The frontier's curves by title, from records of summary.json in the order of their L0.

    Reproducibility is among them where SAEs of other seeds were trained.
    """
    l0 = [r["achieved_actives_test"] for r in records]
    found = {
        "FVU, relative to as many PCs": [r["fvu_to_pca"] for r in records],
        "% of predictions that change": [100 * (1 - r["agreement_jumprelu"]) for r in records],
        "share of L0 by dense features": [r["dense_share_of_l0"] for r in records],
    }
    curves = {}
    for title, values in found.items():
        plotted = [math.nan if value is None else value for value in values]
        curves[title] = Curve(l0, plotted)
    if all("reproducibility" in r for r in records):
        variance, similarity = (
            [r["reproducibility"][name] for r in records] for name in ("variance", "similarity")
        )
        titles = {"variance reproduced across seeds": variance}
        titles["similarity of nearest features"] = similarity
        for title, over_pairs in titles.items():
            curves[title] = curve_of(l0, over_pairs)
    return curves


def draw_frontier(records: Sequence[dict]) -> Figure:
    """Fidelity, and reproducibility if it was measured, against sparsity."""
    records = sorted(records, key=lambda r: r["achieved_actives_test"])
    panels = {title: {"": curve} for title, curve in frontier_curves(records).items()}
    targets = [r["target_actives"] for r in records]
    return draw_curves("Fidelity and sparsity", targets, panels, "pairs of SAEs")


# --------------------------------------------------------------------------------------------------
# Tested hypotheses
# --------------------------------------------------------------------------------------------------


def _draw_agreements(axes: Axes, summaries: dict[str, Summary]) -> None:
    """Of each set of features, the predictions kept with its activations, and with hypotheses."""
    for x, (color, s) in enumerate(zip(itertools.cycle(COLORS), summaries.values(), strict=False)):
        for dx, value, alpha in ((-0.2, s.agreement, 0.4), (0.2, s.agreement_hypotheses, 1.0)):
            if value is None:  # drawings take the place of no features
                continue
            axes.bar(x + dx, value, 0.38, color=color, alpha=alpha)
            axes.text(x + dx, value + 0.01, f"{value:.1%}", ha="center", fontsize=TINY)
    names = [name.replace(" ", "\n", 1) for name in summaries]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.1)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_ylabel("share of test images", fontsize=SMALL)
    title = "predictions kept: with the features (pale), with hypotheses in their place"
    axes.set_title(title, fontsize=NORMAL, loc="left")


def _draw_bands(axes: Axes, summaries: dict[str, Summary]) -> None:
    """Mean F1 of the hypotheses of each set, by the rate at which features are active."""
    width = 0.8 / len(summaries)  # of a bar; the groups are 1 apart
    colored = zip(itertools.cycle(COLORS), summaries.items(), strict=False)
    for i, (color, (name, s)) in enumerate(colored):
        for x, band in enumerate(s.bands):
            center = x - 0.4 + (i + 0.5) * width
            axes.bar(center, band["f1"] or 0, width, color=color, label=None if x else name)
    ends = ["0", *(f"{edge:.0%}" for edge in BANDS)]
    edges = [f"{low} to {high}" for low, high in itertools.pairwise(ends)] + [f"over {ends[-1]}"]
    counts = [band["features"] for band in summaries["SAE"].bands]
    names = [f"{edge}\n({n} of the SAE)" for edge, n in zip(edges, counts, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.25)  # space for the legend
    axes.set_xlabel("share of images on which the feature is active", fontsize=SMALL)
    axes.set_ylabel("mean F1 (1: perfect)", fontsize=SMALL)
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.set_title("how well the drawings predict activity", fontsize=NORMAL, loc="left")
    axes.legend(fontsize=SMALL, loc="upper left", ncols=3)


def draw_explained(summaries: dict[str, Summary]) -> Figure:
    """How well hypotheses about several sets of features, by name, replace them, and how well
    they predict activity in each band of rates; "SAE" is among them."""
    figure = new_figure(1050, 400)
    left = figure.add_axes((0.06, 0.17, 0.42, 0.65))
    right = figure.add_axes((0.55, 0.17, 0.43, 0.65))
    _draw_agreements(left, summaries)
    _draw_bands(right, summaries)
    for axes in (left, right):
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Hypotheses about features, tested on images that were not used to make them"
    figure.suptitle(title, fontsize=LARGE)
    return figure


def draw_influence(evaluation: Evaluation) -> Figure:
    """The influence of each feature, the largest first, in the color of its hypothesis' confidence,
    with the running total."""
    order = sorted(evaluation.rows, key=lambda row: -row.evidence.influence)
    influence = np.array([row.evidence.influence for row in order])
    confidences = np.array([row.decision.confidence for row in order])
    ranks = np.arange(1, len(order) + 1)

    figure = new_figure(1050, 400)
    axes = figure.add_axes((0.07, 0.14, 0.86, 0.72))
    for name, color in CONFIDENCE_COLORS.items():
        some = confidences == name
        label = f"{name}: {influence[some].sum():.0%} of the influence"
        # A bar for each feature would be a patch for each, which are slow.
        edges = np.append(ranks, len(ranks) + 1) - 0.5
        axes.stairs(np.where(some, 100 * influence, 0), edges, fill=True, color=color, label=label)
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.set_xlabel("features, the most influential first", fontsize=SMALL)
    axes.set_ylabel("influence of each feature (bars), %", fontsize=SMALL)
    axes.legend(fontsize=SMALL, loc="center right", title="confidence in its hypothesis")

    total = axes.twinx()
    total.plot(ranks, 100 * influence.cumsum(), color="0.2", linewidth=1.5)
    for share, n in features_of_influence(evaluation).items():
        at = (n, float(share.rstrip("%")))
        total.plot(*at, "o", color="0.2", markersize=4)
        given = {"fontsize": SMALL, "textcoords": "offset points"}
        total.annotate(f"first {n}: {share}", at, (6, -12), **given)
    total.set_ylim(0, 105)
    total.set_ylabel("influence of all up to here (line), %", fontsize=SMALL)
    for one in (axes, total):
        one.tick_params(labelsize=SMALL)
        one.spines["top"].set_visible(False)
    figure.suptitle(
        "Influence: a feature's share of all changes of scores (logits) that removing single "
        "features causes, on the test half",
        fontsize=LARGE,
    )
    return figure
