"""Hypotheses about planted strokes: found, confirmed on other images, and rarely by chance.

A stroke is planted at each of 15 places, in each of four orientations over four models. Hypotheses
are proposed on one set of random images and tested on another. Seconds, all in `outcomes`.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
import torch
from planted_strokes import (
    CENTERS,
    ORIENTATIONS,
    Planted,
    draw_labelled,
    plant,
    shuffled,
    stroke_table,
)
from saexplain.strokes import LENGTHS, Place, word_of

from saexplain.activity import Activity, collect_activity
from saexplain.evaluation import CONFIRMED, Decision, decide_hypotheses, evaluate_hypotheses
from saexplain.hypotheses import Hypothesis, propose_hypotheses

SHIFTS = (1, 2, 4)  # a hypothesis is tested on the feature so many further on
SHUFFLES = 2


def check_hypothesis(h: Hypothesis, row: Planted) -> dict[str, bool]:
    """Whether it names the planted stroke: by its first word, whose cell may also touch the
    stroke's, and by its labels and logits, if it names any."""
    word_right = False
    if h.ink.there:
        word, planted = h.ink.there[0], word_of(Place(*row.center, row.orientation, LENGTHS[0]))
        near = max(abs(word.row - planted.row), abs(word.col - planted.col)) <= 1
        word_right = near and word.shape == planted.shape
    effect_right = True
    if h.effect is not None:
        raises, lowers = h.effect.raises, h.effect.lowers
        effect_right = raises in (None, row.pushes) and lowers in (None, row.against)
    labels_right = h.enriched in ((), (row.pushes,)) and not h.depleted
    return {"word": word_right, "labels": labels_right, "effect": effect_right}


class Outcomes(NamedTuple):
    right: list[dict[str, bool]]  # of each feature: what its hypothesis has right, "confirmed"
    swapped: list[bool]  # whether a hypothesis about another feature is confirmed
    random: list[bool]  # whether one is confirmed on shuffled activations


def run_model(turn: int) -> Outcomes:
    """Propose on some images, test on others, and test where chance alone can confirm."""
    table = stroke_table(turn)
    layer = plant(table)
    seen = layer.activations(*draw_labelled(table, turn))
    unseen = layer.activations(*draw_labelled(table, 100 + turn))
    hypotheses = propose_hypotheses(layer, seen, drawings=False)
    activity = collect_activity(layer, unseen.raw, unseen.labels)

    def evaluate(some: Sequence[Hypothesis], activity: Activity) -> list[Decision]:
        return decide_hypotheses(some, evaluate_hypotheses(some, layer, unseen, activity))

    right = []
    for h, result, row in zip(hypotheses, evaluate(hypotheses, activity), table, strict=True):
        right.append(check_hypothesis(h, row) | {"confirmed": result.explained})
    swapped, random = [], []
    for shift in SHIFTS:
        moved = [h._replace(feature=(h.feature + shift) % len(hypotheses)) for h in hypotheses]
        swapped += [result.outcome == CONFIRMED for result in evaluate(moved, activity)]
    for seed in range(SHUFFLES):
        results = evaluate(hypotheses, shuffled(activity, seed))
        random += [result.outcome == CONFIRMED for result in results]
    return Outcomes(right, swapped, random)


@pytest.fixture(scope="module")
def outcomes():
    """Of all models together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    runs = [run_model(turn) for turn in range(len(ORIENTATIONS))]
    torch.set_num_threads(threads)
    return Outcomes(*(list(chain(*parts)) for parts in zip(*runs, strict=True)))


@pytest.mark.parametrize("what", ["word", "labels", "effect", "confirmed"])
def test_planted_strokes_are_found_and_confirmed(what, outcomes):
    assert len(outcomes.right) == len(CENTERS) * len(ORIENTATIONS)
    assert np.mean([feature[what] for feature in outcomes.right]) >= 0.95


def test_nearly_all_features_are_right_in_every_respect(outcomes):
    assert np.mean([all(feature.values()) for feature in outcomes.right]) >= 0.95


def test_hypotheses_about_other_features_are_rarely_confirmed(outcomes):
    assert len(outcomes.swapped) == 180
    assert np.mean(outcomes.swapped) <= 0.02


def test_hypotheses_are_rarely_confirmed_on_shuffled_activations(outcomes):
    assert len(outcomes.random) == 120
    assert np.mean(outcomes.random) <= 0.02
