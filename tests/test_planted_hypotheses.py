"""Hypotheses about planted strokes: found, confirmed on other images, and not if wrong.

A stroke is planted at each of 15 places, in each of four orientations over four models. Hypotheses
are proposed on one set of random images and tested on another.
"""

import os
from collections.abc import Sequence

import numpy as np
import pytest
from planted import ORIENTATIONS, World, drawing, planted_world, shuffled

import MNIST_SAE_code as driver
from saexplain.activity import collect_activity
from saexplain.evaluation import collect_evidence, decide, split_test_images
from saexplain.hypotheses import Hypothesis, load_frozen, with_thresholds
from saexplain.ink import Canvas

ACROSS = {"horizontal": (3, 0), "vertical": (0, 3), "rising": (3, 3), "falling": (3, -3)}
NOUNS = dict(zip(ORIENTATIONS, ("Bar", "Stem", "Slash", "Backslash"), strict=True))
WRONG = ("next in rate", "mirrored", "shifted", "signs exchanged")


def redrawn(some: Sequence[Hypothesis], weights: Sequence[np.ndarray]) -> list[Hypothesis]:
    """Hypotheses about the same features, with the same thresholds and other drawings."""
    pairs = zip(some, weights, strict=True)
    return [drawing(h.feature, w, threshold=h.threshold) for h, w in pairs]


def shifted(weights: np.ndarray, down: int, right: int) -> np.ndarray:
    """The drawing (h, w) moved; what leaves the canvas is lost."""
    found = np.zeros_like(weights)
    for row, column in np.argwhere(weights):
        at = row + down, column + right
        if 0 <= min(at) and at[0] < weights.shape[0] and at[1] < weights.shape[1]:
            found[at] = weights[row, column]
    return found


def wrong_hypotheses(some: Sequence[Hypothesis], n_active: Sequence[int], moves) -> dict[str, list]:
    """Hypotheses about the same features, by what is wrong with them."""
    own = [h.weights for h in some]
    by_rate = np.argsort(n_active, kind="stable")
    following = dict(zip(by_rate.tolist(), np.roll(by_rate, -1).tolist(), strict=True))
    drawn = {
        "next in rate": [own[following[k]] for k in range(len(own))],
        "mirrored": [w[:, ::-1] for w in own],
        "shifted": [shifted(w, *move) for w, move in zip(own, moves, strict=True)],
        "signs exchanged": [-w for w in own],
    }
    return {name: redrawn(some, weights) for name, weights in drawn.items()}


def confidences(world: World, some: Sequence[Hypothesis], activity=None) -> list[str]:
    given = (world.layer, world.test, world.discovery.canvas)
    found = collect_evidence(some, *given, activity=activity, in_full=False)
    return [decide(e).confidence for e in found]


@pytest.mark.parametrize("turn", range(4))
def test_planted_strokes_are_found_and_confirmed(turn):
    world = planted_world(turn)
    evidence = collect_evidence(world.hypotheses, world.layer, world.test, world.discovery.canvas)
    for h, e, row in zip(world.hypotheses, evidence, world.table, strict=True):
        wanted = h.weights > 0
        overlap = (wanted & row.mask).sum() / (wanted | row.mask).sum()
        assert overlap > (0.75 if row.orientation in ("horizontal", "vertical") else 0.45)
        assert h.caption.split()[0] == NOUNS[row.orientation]
        assert h.classes == (row.pushes,)
        assert h.raises in (None, row.pushes)
        assert h.lowers in (None, row.against)
        assert e.f1 > 0.95
    found = [decide(e) for e in evidence]
    assert [d.confidence for d in found].count("High") >= 13
    assert all(set(d.results.values()) <= {"confirmed", "inconclusive"} for d in found)
    assert any(h.raises is not None for h in world.hypotheses)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_hypotheses_have_low_confidence(what):
    """Although the threshold is the best one for the wrong drawing."""
    world, found = planted_world(), []
    activity = collect_activity(world.layer, world.val.raw, world.val.labels)
    moves = [ACROSS[row.orientation] for row in world.table]
    wrong = wrong_hypotheses(world.hypotheses, activity.n_active.tolist(), moves)[what]
    levels = world.discovery.levels
    without = [drawing(h.feature, h.weights) for h in wrong]
    refitted = with_thresholds(without, levels, activity)
    for some in (wrong, refitted):
        found += confidences(world, some)
    assert found == ["Low"] * len(found)


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_activations_give_low_confidence(seed):
    world = planted_world()
    activity = collect_activity(world.layer, world.test.raw, world.test.labels)
    found = confidences(world, world.hypotheses, shuffled(activity, seed))
    assert found == ["Low"] * len(found)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif("MNIST_DATA" not in os.environ, reason="MNIST_DATA names no folder")
def test_wrong_hypotheses_about_a_trained_sae_have_low_confidence(tmp_path):
    flags = "--features 1 --stability-seeds 0 --workers 1".split()
    driver.main([*flags, "--data", os.environ["MNIST_DATA"], "--out", str(tmp_path)])
    layer = driver.load_run(tmp_path).layer
    hypotheses, _ = load_frozen(tmp_path / "hypotheses.json")
    half, _ = split_test_images(layer.splits["test"])
    canvas = Canvas.fit(layer.splits["val"].images)
    activity = collect_activity(layer, half.raw, half.labels)

    def share(some: Sequence[Hypothesis], activity=activity) -> float:
        """Of hypotheses with confidence High or Medium."""
        found = collect_evidence(some, layer, half, canvas, activity=activity, in_full=False)
        return float(np.mean([decide(e).confidence != "Low" for e in found]))

    moves = [[(3, 0), (0, 3), (-3, 0), (0, -3)][k % 4] for k in range(len(hypotheses))]
    wrong = wrong_hypotheses(hypotheses, activity.n_active.tolist(), moves)
    assert share(hypotheses) > 0.7
    assert {name: share(some) for name, some in wrong.items() if share(some) > 0.03} == {}
    assert share(hypotheses, shuffled(activity, 0)) <= 0.03
