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


def comparison(aurocs: list[float], explained: int) -> SimpleNamespace:
    bands = [{"features": 4, "explained": explained} for _ in (*BANDS, 1)]
    return SimpleNamespace(aurocs=aurocs, shares=SimpleNamespace(bands=bands, explained=explained))


def evaluation(explained: int = 1) -> SimpleNamespace:
    """Three features with influences and confidences."""
    given = zip((0.1, 0.6, 0.3), ("Low", "High", "Low"), strict=True)
    evidence, decisions = [], []
    for influence, confidence in given:
        evidence.append(SimpleNamespace(influence=influence))
        decisions.append(SimpleNamespace(confidence=confidence))
    rule = SimpleNamespace(both_auroc=0.85)
    result = comparison([0.5, 0.9], explained)
    return SimpleNamespace(evidence=evidence, decisions=decisions, rule=rule, result=result)


def test_explained_features_are_bars_of_their_bands_and_aurocs_a_falling_curve():
    others = {f"other {i}": comparison([0.7], 2) for i in range(6)}  # more than there are colors
    left, right = figures.draw_explained(evaluation(), others).axes
    falling = left.lines[0]
    assert falling.get_xdata().tolist() == [0.5, 0.9, 1.0]
    assert falling.get_ydata().tolist() == [1, 0.5, 0]
    heights = [bar.get_height() for bar in right.patches]
    assert heights == [*4 * [1 / 4], *24 * [2 / 4]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["SAE", *others]


def test_influence_is_sorted_colored_by_confidence_and_summed():
    bars, total = figures.draw_influence(evaluation()).axes
    by_place = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars.patches)
    assert by_place == [(1, 60), (2, pytest.approx(30)), (3, pytest.approx(10))]
    labels = [text.get_text() for text in bars.get_legend().get_texts()]
    shares = [f"{name}: {share} of the influence" for name, share in (("High", "60%"),)]
    assert labels[:1] == shares
    np.testing.assert_allclose(total.lines[0].get_ydata(), [60, 90, 100])
    notes = [text.get_text() for text in total.texts]
    assert notes == ["1 make 50%", "2 make 90%", "3 make 99%"]
