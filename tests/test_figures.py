"""The plots of a run: saexplain.figures."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from saexplain import figures
from saexplain.evaluation import BANDS

STEPS = [0, 9]
SAE_LINES = [
    {"step": 0, "loss": 2.0, "l0": 30, "lambda": 3.0, "dead": 0},
    {"step": 9, "loss": 0.5, "l0": 6, "lambda": 4.0, "dead": 1},
]


def test_training_curves_are_the_lines_of_the_log():
    curves = figures.training_curves([{"step": 4, "loss": 1.5}], SAE_LINES, 5, 4.5, 1e-5)
    values = [[line[name] for line in SAE_LINES] for name in ("loss", "l0", "lambda", "dead")]
    assert [curve.values for curve in curves] == [[1.5], *values]
    assert [curve.steps for curve in curves] == [[4], *4 * [STEPS]]
    assert [curve.target for curve in curves] == [None, None, 5, None, None]
    assert [curve.logits_from for curve in curves] == [None, *4 * [4.5]]
    assert len(figures.training_curves([], SAE_LINES, 5, None, 1e-5)) == 4

    figure = figures.draw_training(curves)
    assert [axes.get_title() for axes in figure.axes] == [curve.title for curve in curves]
    drawn, target, dotted = figure.axes[2].lines
    assert (drawn.get_xdata().tolist(), drawn.get_ydata().tolist()) == (STEPS, [30, 6])
    assert (target.get_ydata()[0], dotted.get_xdata()[0]) == (5, 4.5)
    assert "Dotted" in figure.get_suptitle()


def frontier_record(target: int, **more) -> dict:
    measured = {"fvu_to_pca": 0.5, "agreement_jumprelu": 0.9, "dense_share_of_l0": 0.3}
    return {"target_actives": target, "achieved_actives_test": target + 0.1, **measured, **more}


def test_the_frontier_is_in_the_order_of_l0_and_leaves_gaps():
    records = [frontier_record(8), frontier_record(4, fvu_to_pca=None)]
    curves = figures.frontier_curves(records)
    assert len(curves) == 3
    relative = curves["FVU, relative to as many PCs"]
    assert relative.l0 == [8.1, 4.1]
    assert relative.values[0] == 0.5
    assert math.isnan(relative.values[1])
    assert curves["% of predictions that change"].values == pytest.approx([10, 10])
    axes = figures.draw_frontier(records).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["4", "8"]
    assert axes[1].lines[0].get_xdata().tolist() == [4.1, 8.1]
    assert axes[1].get_ylim()[0] == 0


def test_the_frontier_has_bars_only_where_there_are_several_pairs_of_saes():
    for std in (None, 0.125):
        measured = {"mean": 0.5, "std": std}
        more = {"reproducibility": {"variance": measured, "similarity": measured}}
        records = [frontier_record(4, **more), frontier_record(8, **more)]
        figure = figures.draw_frontier(records)
        bars = [axes.containers[0].has_yerr for axes in figure.axes]
        assert bars == [False, False, False, *2 * [std is not None]]
        assert ("deviation" in figure.get_suptitle()) == (std is not None)


def summary(agreement: float, f1: float | None) -> SimpleNamespace:
    bands = [{"features": n, "f1": f1} for n in range(len(BANDS) + 1)]
    return SimpleNamespace(agreement=agreement, agreement_hypotheses=agreement / 2, bands=bands)


def test_explained_sets_are_bars_of_agreement_and_of_f1_in_each_band():
    names = ["SAE", *(f"other {i}" for i in range(6))]  # more than there are colors
    summaries = {name: summary((i + 1) / 8, i / 8 or None) for i, name in enumerate(names)}
    left, right = figures.draw_explained(summaries).axes
    kept = [bar.get_height() for bar in left.patches]
    assert kept == [(i + 1) / 8 / (1 + half) for i in range(7) for half in (0, 1)]
    assert [text.get_text() for text in left.texts][:2] == ["12.5%", "6.2%"]
    heights = [bar.get_height() for bar in right.patches]
    assert heights == [i / 8 for i in range(7) for _ in range(4)]
    places = [bar.get_x() + bar.get_width() / 2 for bar in right.patches]
    assert [round(x) for x in places] == [0, 1, 2, 3] * 7
    assert [text.get_text() for text in right.get_legend().get_texts()] == names
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels[0] == "0 to 1%\n(0 of the SAE)"
    assert labels[3] == "over 10%\n(3 of the SAE)"


def test_influence_is_sorted_colored_by_confidence_and_summed():
    rows = [
        SimpleNamespace(
            evidence=SimpleNamespace(influence=influence),
            decision=SimpleNamespace(confidence=confidence),
        )
        for influence, confidence in zip((0.1, 0.6, 0.3), ("Low", "High", "Low"), strict=True)
    ]
    bars, total = figures.draw_influence(SimpleNamespace(rows=rows)).axes
    drawn = [patch.get_data() for patch in bars.patches]
    for found, heights in zip(drawn, ([60, 0, 0], [0, 0, 0], [0, 30, 10]), strict=True):
        np.testing.assert_allclose(found.values, heights)
        assert found.edges.tolist() == [0.5, 1.5, 2.5, 3.5]
    labels = [text.get_text() for text in bars.get_legend().get_texts()]
    shares = {"High": "60%", "Medium": "0%", "Low": "40%"}
    assert labels == [f"{name}: {share} of the influence" for name, share in shares.items()]
    np.testing.assert_allclose(total.lines[0].get_ydata(), [60, 90, 100])
    notes = [text.get_text() for text in total.texts]
    assert notes == ["first 1: 50%", "first 2: 90%", "first 3: 99%"]
