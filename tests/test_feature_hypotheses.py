"""Claims: AUROC against scikit-learn, the rest against hand-made models and plain loops."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from small_models import banded_images

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_hypotheses as fh

CASES = list(itertools.product([0, 1, 2], [0.02, 0.3, 0.9], [False, True]))


def draw(seed: int, n: int, share: float, ties: bool, shift: float) -> tuple[np.ndarray, ...]:
    """Scores, rounded coarsely for ties, and the indices of active images, shifted upwards."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    scores = rng.normal(size=n)
    scores[at] += shift
    return (scores.round() if ties else scores).astype(np.float32), at


def blank(feature: int, **parts) -> fh.Hypothesis:
    nothing = fh.Hypothesis(feature, None, None, None, 0.0, 0.0, (0,) * 10, 0, {})
    return nothing._replace(**parts)


def planted_strokes() -> tuple[fa.ExplainedLayer, list[fh.Hypothesis], demo.Scene]:
    """A layer, claims about its features, and the scene they were made from."""
    plan = demo.make_plan(demo.stroke_table(0))
    layer, seen = demo.plant(plan), demo.draw_labelled(plan, 0)
    return layer, fh.propose_hypotheses(layer, seen.images, seen.labels), seen


@pytest.fixture(scope="module")
def world():
    return planted_strokes()


# --- AUROC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_auroc_is_scikit_learns(seed, share, ties):
    scores, at = draw(seed, 300, share, ties, shift=0.7)
    active = np.isin(np.arange(300), at)
    expected = sklearn.metrics.roc_auc_score(active, scores)
    assert fh.ranks_of(scores, at).auroc == pytest.approx(expected, abs=1e-12)


def test_ranks_by_counting():
    scores, at = draw(3, 60, 0.4, ties=True, shift=0.5)
    r = fh.ranks_of(scores, at)
    own, others = np.sort(scores[at]), np.delete(scores, at)
    assert r.own_less.tolist() == [int((own < s).sum()) for s in own]
    assert r.own_up_to.tolist() == [int((own <= s).sum()) for s in own]
    assert r.less.tolist() == [int((others < s).sum()) for s in own]
    assert r.up_to.tolist() == [int((others <= s).sum()) for s in own]
    assert (r.m, r.n) == (24, 36)


@pytest.mark.parametrize("at", [[], [0, 1, 2, 3, 4]])
def test_auroc_needs_both_kinds(at):
    with pytest.raises(ValueError, match=f"{len(at)} of 5 images are active"):
        fh.ranks_of(np.arange(5, dtype=np.float32), np.array(at, dtype=int))


# --- Places ---------------------------------------------------------------------------------------


def test_vocabulary_lies_on_the_image_and_speaks_of_all_shapes():
    vocabulary = fh.stroke_vocabulary()
    masks = fh.place_masks(vocabulary)
    shapes = {"dot", "horizontal", "vertical", "rising", "falling"}
    assert len(set(vocabulary)) == len(vocabulary)
    assert {place.shape for place in vocabulary} == shapes
    centre_of_mass = np.stack([np.argwhere(mask.numpy()).mean(0) for mask in masks])
    centres = np.array([place[:2] for place in vocabulary])
    assert centre_of_mass == pytest.approx(centres, abs=0.8)


def box(rows, cols) -> set[tuple[int, int]]:
    return set(itertools.product(rows, cols))


DOT = {
    (r, c) for r, c in box(range(20, 27), range(10, 17)) if (r - 23) ** 2 + (c - 13) ** 2 <= 6.76
}


@pytest.mark.parametrize(
    ("place", "pixels", "words"),
    [
        (
            fh.Place(3, 3, "horizontal", 7),
            box((2, 3, 4), range(7)),
            "horizontal stroke at the upper left",
        ),
        (
            fh.Place(13, 13, "vertical", 13),
            box(range(7, 20), (12, 13, 14)),
            "long vertical stroke in the centre",
        ),
        (fh.Place(23, 13, "dot", 5), DOT, "dot at the bottom"),
    ],
)
def test_places(place, pixels, words):
    found = np.argwhere(fh.place_masks([place])[0].numpy())
    assert {tuple(at) for at in found.tolist()} == pixels
    assert place.words() == words


@pytest.mark.parametrize(
    ("row", "col", "where"),
    [
        (3, 13, "at the top"),
        (13, 3, "at the left"),
        (13, 25, "at the right"),
        (25, 25, "at the lower right"),
        (13, 13, "in the centre"),
    ],
)
def test_regions(row, col, where):
    assert fh.Place(row, col, "dot", 5).words() == f"dot {where}"


def test_diagonals_lean_the_way_they_are_named():
    places = [fh.Place(13, 13, "rising", 7), fh.Place(13, 13, "falling", 7)]
    rising, falling = fh.place_masks(places)
    assert rising[11, 15]  # up and to the right
    assert rising[15, 11]
    assert not rising[11, 11]
    assert torch.equal(rising.flip(1)[:, 1:], falling[:, :-1])  # mirror images about column 13


# --- Scores ---------------------------------------------------------------------------------------


def two_strokes() -> list[fh.Stroke]:
    wanted, empty = fh.Place(13, 13, "vertical", 13), fh.Place(5, 5, "dot", 5)
    return [fh.Stroke((wanted, empty), (0.7, -0.3)), fh.Stroke((empty,), (1.0,))]


def test_stroke_scores_are_weighted_mean_inks():
    images = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    strokes = two_strokes()
    scores = fh.stroke_scores([strokes[0], None, strokes[1]], images.flatten(1))
    for row, stroke in ((0, strokes[0]), (2, strokes[1])):
        expected = 0
        for place, weight in zip(stroke.places, stroke.weights, strict=True):
            expected = expected + weight * images[:, 0][:, fh.place_masks([place])[0]].mean(1)
        assert scores[row] == pytest.approx(expected.numpy(), abs=1e-6)
    assert (scores[1] == 0).all()


def test_a_stroke_scores_alike_to_the_last_bit_whoever_is_beside_it():
    pixels = torch.rand(501, 784, generator=torch.Generator().manual_seed(0))
    stroke, other = two_strokes()
    alone = fh.stroke_scores([stroke], pixels)[0]
    for place in (0, 3, 47, fh.AT_ONCE - 1):
        strokes = [other] * fh.AT_ONCE
        strokes[place] = stroke
        assert np.array_equal(fh.stroke_scores(strokes, pixels)[place], alone)


def test_scores_of_parts():
    labels = torch.tensor([0, 1, 2, 1])
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    stroke = two_strokes()[0]
    claims = [
        blank(0, labels=(1,), stroke=stroke, label_weight=0.25),
        blank(1, labels=(1, 2)),
        blank(2, stroke=stroke),
        blank(3),
    ]
    both, labelled, inked, nothing = [s for _, s in fh.part_scores(claims, images, labels)]
    assert both["class"].tolist() == [0, 1, 0, 1]
    expected = both["stroke"] + np.float32(0.25) * both["class"]
    assert np.array_equal(both["both"], expected)
    assert labelled["both"] is labelled["class"]
    assert labelled["class"].tolist() == [0, 1, 1, 1]
    assert inked["both"] is inked["stroke"]
    assert np.array_equal(inked["stroke"], both["stroke"])
    assert nothing == {}


def test_a_named_label_that_no_image_carries_scores_nothing():
    images, labels = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)
    ((_, scores),) = fh.part_scores([blank(0, labels=(7,))], images, labels)
    assert scores["class"].tolist() == [0, 0, 0]


def test_places_outside_the_vocabulary_are_refused():
    odd = blank(0, stroke=fh.Stroke((fh.Place(4, 4, "dot", 5),), (1.0,)))
    images, labels = torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Place\(row=4, col=4.*name places from there"):
        list(fh.part_scores([odd], images, labels))


def test_pixels_of_a_stroke():
    wanted, empty = fh.Place(13, 13, "vertical", 13), fh.Place(13, 13, "horizontal", 13)
    found = fh.stroke_pixels(fh.Stroke((wanted, empty), (0.6, -0.4)))
    masks = fh.place_masks([wanted, empty]).flatten(1)
    assert torch.equal(found[0], masks[0])
    assert torch.equal(found[1], masks[1] & ~masks[0])  # where both cross, ink is wanted


# --- Proposing ------------------------------------------------------------------------------------


def test_planted_strokes_are_proposed(world):
    """Class, effect, place and shape, for nearly all of the 15 strokes."""
    _, claims, _ = world
    right = []
    for h, row, (r, c) in zip(claims, demo.stroke_table(0), demo.CENTRES, strict=True):
        place = h.stroke.places[0] if h.stroke else fh.Place(-28, -28, "none", 0)
        near = math.hypot(place.row - r, place.col - c) <= 4
        shape = place.shape == row.name.split()[0]
        moved = h.effect is not None and h.effect[::2] == (row.pushes, row.against)
        right.append(h.labels == (row.pushes,) and near and shape and moved)
    assert sum(right) >= 14


def test_covariances_by_numpy(world):
    layer, _, scene = world
    pixels = scene.images.flatten(1)
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    active = (layer.feature_acts(scene.images) > 0).double().numpy()
    both = np.cov(pixels.double().numpy(), active, rowvar=False, bias=True)
    found = fh._pixel_covariance(pixels)
    assert found.numpy() == pytest.approx(both[:784, :784], abs=1e-6)
    crossed = fh._covariance_with_activity(pixels, activity)
    assert crossed.numpy() == pytest.approx(both[784:, :784], abs=1e-6)


def test_label_histograms_by_counting(world):
    layer, claims, scene = world
    active = layer.feature_acts(scene.images) > 0
    for h in claims:
        at = active[:, h.feature]
        expected = torch.bincount(scene.labels[at], minlength=demo.N_CLASSES)
        assert list(h.label_histogram) == expected.tolist()
        acts = layer.feature_acts(scene.images)[at, h.feature]
        assert h.typical_activation == pytest.approx(float(acts.mean()), rel=1e-5)


def test_auroc_of_labels_in_closed_form():
    rng = np.random.default_rng(0)
    labels, active = rng.integers(5, size=400), rng.random(400) < 0.2
    histogram = np.bincount(labels[active], minlength=5)
    h = blank(0, labels=(1, 4), label_histogram=tuple(histogram.tolist()))
    expected = sklearn.metrics.roc_auc_score(active, np.isin(labels, (1, 4)))
    found = fh._class_auroc(h, np.bincount(labels, minlength=5))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_label_weight_is_least_squares(seed):
    rng = np.random.default_rng(seed)
    score, named = rng.normal(size=500), rng.random(500) < 0.3
    active = score + 0.8 * named + rng.normal(size=500) > 1.5
    columns = np.stack([score, named, np.ones(500)], 1)
    on_score, on_label, _ = np.linalg.lstsq(columns, active.astype(float), rcond=None)[0]
    found = fh._label_weight(
        score.astype(np.float32), named.astype(np.float32), np.flatnonzero(active)
    )
    assert found == pytest.approx(on_label / on_score, rel=1e-4)


def test_labels_that_say_what_the_strokes_say_weigh_nothing():
    named = (np.arange(100) % 4 == 0).astype(np.float32)
    assert fh._label_weight(0.5 * named, named, np.arange(0, 100, 4)) == 0.0
    assert fh._label_weight(-np.arange(100, dtype=np.float32), named, np.arange(50, 100)) == 0.0


def test_pursuit_finds_the_places_that_were_mixed():
    """Activity that is a mixture of two places' ink is described by just these two."""
    vocabulary = fh.stroke_vocabulary()
    m = len(vocabulary)
    rng = np.random.default_rng(0)
    spread = torch.from_numpy(rng.normal(size=(m, 2 * m)))
    gram = spread @ spread.T / (2 * m)
    truth = torch.zeros(1, m, dtype=gram.dtype)
    truth[0, 10], truth[0, 500] = 1.0, -0.6
    places, weights = fh._pursue(truth @ gram, gram, truth.sign().float())
    used = {p: w for p, w in zip(places[0].tolist(), weights[0].tolist(), strict=True) if w}
    assert used == pytest.approx({10: 1.0, 500: -0.6}, rel=1e-3)


def test_places_against_the_pattern_are_not_named():
    m = len(fh.stroke_vocabulary())
    covariance = torch.zeros(1, m, dtype=torch.float64)
    covariance[0, 3], covariance[0, 8] = 1.0, 0.5
    gradient = torch.zeros(1, m)
    gradient[0, 3], gradient[0, 8] = -1.0, 1.0  # ink at place 3 would lower the feature
    places, weights = fh._pursue(covariance, torch.eye(m, dtype=torch.float64), gradient)
    used = [p for p, w in zip(places[0].tolist(), weights[0].tolist(), strict=True) if w]
    assert used == [8]


def test_at_most_three_places_of_a_kind_are_named():
    m = len(fh.stroke_vocabulary())
    covariance = torch.zeros(1, m, dtype=torch.float64)
    covariance[0, :10] = 1.0
    gradient = covariance.float()
    _, weights = fh._pursue(covariance, torch.eye(m, dtype=torch.float64), gradient)
    assert int((weights > 0).sum()) == fh.MOST_PLACES


def test_labels_are_named_for_their_lift():
    usual = np.array([100, 100, 100, 100, 600])
    lifts = np.array([40, 14, 16, 0, 30])  # 4, 1.4, 1.6, 0 and 0.5 times
    assert fh._name_labels(lifts, usual) == (0, 2)
    assert fh._name_labels(np.array([30, 30, 25, 15, 0]), usual) == (0, 1, 2)  # three at most


def test_effects_are_named_when_they_are_worth_it():
    assert fh._name_effect(torch.tensor([0.25, -0.5, 0.0])) == fh.Effect(1, 0.5, 0, 0.25)
    small = fh._name_effect(torch.tensor([0.01, -0.5, 0.0]))
    assert small == fh.Effect(1, 0.5, None, 0.0)
    assert fh._name_effect(torch.tensor([0.01, -0.01, 0.0])) is None


def test_proposing_repeats_itself_and_changes_nothing(world):
    _, claims, scene = world
    before = [tensor.clone() for tensor in (scene.images, scene.labels)]
    state = torch.random.get_rng_state()
    assert planted_strokes()[1] == claims
    assert torch.equal(state, torch.random.get_rng_state())
    after = (scene.images, scene.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_labels_missing_from_a_split_are_not_named(world):
    layer, claims, scene = world
    missing = claims[0].labels[0]
    keep = scene.labels != missing
    proposed = fh.propose_hypotheses(layer, scene.images[keep], scene.labels[keep])
    assert missing not in {label for h in proposed for label in h.labels or ()}


def test_features_that_hardly_fire_get_no_claims(world):
    layer, _, scene = world
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    first = activity.of(0)[0][:5]
    images = torch.cat([scene.images[first], torch.zeros(50, 1, 28, 28)])
    labels = torch.cat([scene.labels[first], torch.zeros(50, dtype=torch.int64)])
    proposed = fh.propose_hypotheses(layer, images, labels)
    why = "active on 5 of 55 images; 8 active and as many silent ones needed"
    assert proposed[0].why_not == dict.fromkeys(fh.PARTS, why)
    assert not any(proposed[0].proposes(part) for part in fh.PARTS)


def test_blank_discovery_images_give_no_claims(world):
    layer = world[0]
    labels = torch.zeros(20, dtype=torch.int64)
    claims = fh.propose_hypotheses(layer, torch.zeros(20, 1, 28, 28), labels)
    assert not any(h.proposes(part) for h in claims for part in fh.PARTS)


def test_weak_parts_are_dropped_and_say_why(world):
    layer, claims, scene = world
    strict = fh.Rule(class_auroc=0.999, stroke_auroc=1.1)
    for h in fh.propose_hypotheses(layer, scene.images, scene.labels, strict):
        assert h.labels is None
        assert h.stroke is None
        assert h.label_weight == 0
        assert h.why_not["stroke"].endswith("on the discovery images, 1.1 is asked for")
    assert any(h.labels and h.stroke for h in claims)


def test_images_of_another_size_keep_class_and_effect():
    for k, h in enumerate(fh.propose_hypotheses(*banded_images())):
        assert h.labels == (k,)
        assert h.effect.raises == k
        assert h.stroke is None
        why = "images have shape (3, 8, 8); strokes are described on grey 28 x 28 images only"
        assert h.why_not["stroke"] == why


def test_strokes_need_ink_from_0_to_1():
    assert fh.why_no_strokes(torch.rand(5, 28, 28)) is None
    why = "pixels run from -1 to 1; strokes are described where ink runs from 0 to 1"
    images = torch.ones(1, 1, 28, 28)
    images[0, 0, 0, 0] = -1
    assert fh.why_no_strokes(images) == why


def test_unclear_requests_are_refused(world):
    layer, _, scene = world
    with pytest.raises(ValueError, match="whole numbers from 0 are needed"):
        fh.propose_hypotheses(layer, scene.images, scene.labels.float())
    with pytest.raises(ValueError, match="labels run to 10, but the model has 6 classes"):
        fh.propose_hypotheses(layer, scene.images, scene.labels * 2)


def test_spread_is_even_and_complete():
    assert fh.spread(torch.arange(10), 3).tolist() == [0, 4, 9]
    assert fh.spread(torch.arange(2), 5).tolist() == [0, 1]
    assert fh.spread(torch.arange(0), 5).tolist() == []


# --- Words ----------------------------------------------------------------------------------------


def test_statements_in_words():
    places = (fh.Place(13, 13, "vertical", 13), fh.Place(13, 5, "dot", 5))
    stroke = fh.Stroke(places, (0.7, -0.3))
    whole = blank(1, labels=(1, 7), stroke=stroke, effect=fh.Effect(1, 0.4, None, 0.0))
    assert fh.statement(whole) == (
        "Long vertical stroke in the centre; no dot at the left; fires on 1s and 7s; raises 1"
    )
    assert fh.statement(blank(1, labels=(3,))) == "Fires on 3s"
    assert fh.statement(blank(1, effect=fh.Effect(2, 1, 5, 1))) == "Raises 2 and lowers 5"
    assert fh.statement(blank(1)) == "no hypothesis"


def test_no_ink_next_to_ink_of_the_same_words_says_where():
    places = (fh.Place(17, 17, "rising", 13), fh.Place(11, 15, "rising", 13))
    assert places[0].words() == places[1].words() == "long rising stroke in the centre"
    assert fh.statement(blank(0, stroke=fh.Stroke(places, (0.6, -0.4)))) == (
        "Long rising stroke in the centre; no long rising stroke in the centre "
        "6 pixels higher and 2 pixels further left"
    )


def test_a_long_stroke_around_a_short_one_is_told_apart():
    places = (fh.Place(13, 13, "vertical", 7), fh.Place(13, 13, "vertical", 13))
    assert fh.statement(blank(0, stroke=fh.Stroke(places, (0.6, -0.4)))) == (
        "Vertical stroke in the centre; no long vertical stroke in the centre around that one"
    )


def test_listed():
    assert fh.listed([]) == ""
    assert fh.listed(["a", "a"]) == "a"
    assert fh.listed(["a", "b", "c"]) == "a, b and c"
    assert fh.listed(["a", "b"], "or") == "a or b"


# --- Freezing -------------------------------------------------------------------------------------


def test_frozen_claims_come_back_as_they_were(world, tmp_path):
    claims = [*world[1], blank(99, why_not={"class": "nothing"})]
    rule = fh.Rule(both_auroc=0.9)
    digest = fh.freeze_hypotheses(claims, tmp_path / "h.json", rule)
    assert digest == hashlib.sha256((tmp_path / "h.json").read_bytes()).hexdigest()
    assert fh.read_hypotheses(tmp_path / "h.json", digest) == (claims, rule)
    assert "NaN" not in (tmp_path / "h.json").read_text()


def test_a_changed_file_is_refused_with_both_hashes(world, tmp_path):
    path = tmp_path / "h.json"
    digest = fh.freeze_hypotheses(world[1], path)
    path.write_text(path.read_text().replace('"raises": 0', '"raises": 1', 1))
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    assert other != digest
    told = f"changed after it was frozen: its SHA-256 is {other}, recorded was {digest}"
    with pytest.raises(ValueError, match=told):
        fh.read_hypotheses(path, digest)
