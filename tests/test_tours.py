"""The image of the guided tour: what agrees on it by hand, and the choice against a slow search."""

import pytest
import torch
from test_counterfactuals import logits_without, margin, random_layer, slow_flip_set

import feature_analysis as fa
from saexplain.tours import TOUR_FEATURES, agreement, find_tour, legibility


def record_of(k: int = 0, confidence: str | None = "High", **hypothesis) -> dict:
    """A record of a feature that supports class 1 of three, drawn on 2 x 3 cells."""
    usual = {"drawing": ["#+.", "-.."], "classes": [1], "raises": 1, "lowers": None}
    usual |= {"threshold": 255} | hypothesis
    changes = [0.1, -2.0, -1.0]
    return {"feature": k, "confidence": confidence, "hypothesis": usual} | {
        "ablation_delta_vector": changes
    }


def test_agreement_of_a_hypothesis_with_an_image_and_an_effect():
    levels = torch.tensor([100.0, 200, 0, 145, 0, 0])  # a score of 2 * 100 + 200 - 145 = 255
    assert agreement(record_of(), levels, 1, 0.5) == 3
    assert agreement(record_of(confidence="Medium"), levels, 1, 0.5) == 2
    assert agreement(record_of(confidence="Low", raises=None, classes=[]), levels, 1, 0.5) == 1
    assert agreement(record_of(confidence=None), levels, 1, 0.5) == 0
    assert agreement(record_of(threshold=256), levels, 1, 0.5) == -1  # it does not match
    assert agreement(record_of(threshold=256), None, 1, 0.5) == 3  # no drawing of whole images
    for contradiction in ({"classes": [0, 2]}, {"raises": 2}, {"lowers": 1}):
        assert agreement(record_of(**contradiction), levels, 1, 0.5) == -1
    assert agreement(record_of(), levels, 1, -0.5) == -1  # the score rises without it
    assert agreement(record_of(), levels, 2, 0.5) == -1  # it supports another class more


def test_legibility_is_the_smaller_share_of_cells_as_wanted():
    levels = torch.tensor([100.0, 200, 0, 100, 0, 0])
    assert legibility(record_of(), levels) == 0.5  # one of two with ink, one of one without
    assert legibility(record_of(drawing=["-+.", "+--"]), levels) == 0.5
    assert legibility(record_of(drawing=["-..", ".--"]), levels) == 1
    assert legibility(record_of(), None) == 1


def test_tour_is_the_best_of_a_slow_search():
    layer, raw, labels = random_layer(1)
    test, logits = fa.Activations(torch.zeros(len(raw), 1, 2, 3), labels, raw), layer.logits(raw)
    known = []  # (few, agreement, -size, margin, image, features) of all images that are right
    records = [record_of(k, ("High", "Medium", "Low")[k % 3], raises=None) for k in range(9)]
    for k, record in enumerate(records):
        record["hypothesis"] |= {"threshold": None, "classes": [k % 4, (k + 1) % 4]}
        record["ablation_delta_vector"] = [-1.0 if c == k % 4 else 0.0 for c in range(4)]
    for n, (row, label) in enumerate(zip(raw, labels.tolist(), strict=True)):
        goal = int(logits[n].argsort(descending=True)[1])
        off = slow_flip_set(layer, row, goal, TOUR_FEATURES)
        if logits[n].argmax() != label or not off:
            continue
        after = logits_without(layer, row, off)
        room = min(-margin(logits[n], goal), margin(after, goal))
        fits = []
        for k in off:
            falls = logits[n][label] > logits_without(layer, row, [k])[label]
            fits.append(3 - k % 3 if falls and label == k % 4 else -1)
        known.append((len(off) <= 2, min(fits), -len(off), room, n, off, fits))
    tour, best = find_tour(layer, test, records), max(known)
    assert (tour.image, tour.off) == best[4:6]
    assert tour.agrees == [fit > 0 for fit in best[6]] == [True] * len(tour.off)
    bare = find_tour(layer, test)  # without records few features and the margin decide
    expected = max(known, key=lambda found: (found[0], found[2], found[3]))
    assert (bare.image, bare.off) == expected[4:6] != best[4:6]
    assert not any(bare.agrees)
    for subset, row in enumerate(tour.logits):
        removed = [k for bit, k in enumerate(tour.off) if subset >> bit & 1]
        without = logits_without(layer, raw[tour.image], removed)
        assert row.tolist() == pytest.approx(without.tolist(), abs=1e-4)
    assert [logits[tour.image].argmax(), tour.logits[-1].argmax()] == [
        labels[tour.image],
        tour.goal,
    ]
