"""Hypotheses: the statistics against scipy and scikit-learn, the rest against hand-made models and plain loops."""

import hashlib
import itertools
import json
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor

import demo_feature_analysis as demo
import feature_analysis as fa

# --- Statistics -------------------------------------------------------------------------------------------------------


def draw(seed: int, n: int, share: float, ties: bool, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, rounded coarsely for ties, and activity independent of them unless shifted."""
    rng = np.random.default_rng(seed)
    active = np.zeros(n, dtype=bool)
    active[rng.choice(n, max(1, round(share * n)), replace=False)] = True
    scores = rng.normal(size=n) + shift * active
    return (scores.round() if ties else scores).astype(np.float32), active


CASES = list(itertools.product([0, 1, 2], [0.02, 0.3, 0.9], [False, True]))


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_detection_is_scikit_learns(seed, share, ties):
    scores, active = draw(seed, 300, share, ties, shift=0.7)
    found = fa.detection(scores, active, cut=0.3)
    assert found.auroc == pytest.approx(sklearn.metrics.roc_auc_score(active, scores), abs=1e-12)
    assert found.average_precision == pytest.approx(sklearn.metrics.average_precision_score(active, scores), abs=1e-12)
    assert found.balanced_accuracy == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(active, scores > 0.3), abs=1e-12
    )


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_weighted_detection_is_scikit_learns(seed, share, ties):
    scores, active = draw(seed, 300, share, ties, shift=0.7)
    weights = fa.bootstrap_weights(300, 4, seed)
    found = fa.detection_over(scores, active, 0.3, weights.double())
    for r, weight in enumerate(weights.numpy().T):
        expected = (
            sklearn.metrics.roc_auc_score(active, scores, sample_weight=weight),
            sklearn.metrics.average_precision_score(active, scores, sample_weight=weight),
            sklearn.metrics.balanced_accuracy_score(active, scores > 0.3, sample_weight=weight),
        )
        assert [float(value[r]) for value in found] == pytest.approx(expected, abs=1e-9)


def test_bootstrap_intervals_are_scipys():
    scores, active = draw(0, 400, 0.15, ties=True, shift=1.0)
    drawn = fa.detection_over(scores, active, 0.5, fa.bootstrap_weights(400, 4000).double())
    metrics = (sklearn.metrics.roc_auc_score, sklearn.metrics.average_precision_score)
    for values, metric in zip(drawn, metrics, strict=False):
        expected = scipy.stats.bootstrap(
            (scores, active),
            lambda s, a, metric=metric: metric(a, s),
            paired=True,
            vectorized=False,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = expected.high - expected.low
        assert np.quantile(values, fa.INTERVAL) == pytest.approx([expected.low, expected.high], abs=0.12 * width)


def test_resamples_without_an_active_image_are_nan():
    scores, active = np.arange(4, dtype=np.float32), np.array([False, False, False, True])
    weights = torch.tensor([[1.0, 2.0], [1, 1], [1, 1], [1, 0]])
    auroc = fa.detection_over(scores, active, 0.5, weights).auroc
    assert auroc[0] == 1
    assert math.isnan(auroc[1])


@pytest.mark.parametrize("active", [np.zeros(5, dtype=bool), np.ones(5, dtype=bool)])
def test_detection_needs_both_kinds(active):
    with pytest.raises(ValueError, match=f"{active.sum()} of 5 images are active"):
        fa.detection(np.arange(5), active, 0.0)


def test_bootstrap_weights_draw_every_image_alike():
    weights = fa.bootstrap_weights(50, 2000)
    assert (weights.sum(0) == 50).all()
    assert weights.mean(1).numpy() == pytest.approx(np.ones(50), abs=0.12)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # binomial(50, 1/50)


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_best_cut_beats_every_other(seed, share, ties):
    scores, active = draw(seed, 200, share, ties, shift=0.5)
    every = np.concatenate([[scores.min() - 1], np.unique(scores)])
    best = max(fa.detection(scores, active, cut).balanced_accuracy for cut in every)
    cut = fa.best_cut(scores, active)
    assert fa.detection(scores, active, cut).balanced_accuracy == pytest.approx(best, abs=1e-12)
    assert not (scores == cut).any() or ties


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_rank_sum_p_is_scipys(seed, share, ties):
    scores, active = draw(seed, 300, share, ties, shift=0.3)
    expected = scipy.stats.mannwhitneyu(
        scores[active].astype(float), scores[~active].astype(float), alternative="greater", method="asymptotic"
    )
    assert fa.rank_sum_p(scores, active) == pytest.approx(expected.pvalue, rel=1e-6)


def test_rank_sum_p_of_equal_scores_is_one():
    assert fa.rank_sum_p(np.zeros(9), np.arange(9) < 4) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_fisher_p_is_scipys(seed):
    rng = np.random.default_rng(seed)
    said, active = rng.random(80) < 0.3, rng.random(80) < 0.2
    table = [[(said & active).sum(), (said & ~active).sum()], [(~said & active).sum(), (~said & ~active).sum()]]
    assert fa.fisher_p(said, active) == pytest.approx(scipy.stats.fisher_exact(table, "greater").pvalue, rel=1e-9)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (5, 0), (3, 3), (40, 24), (64, 0)])
def test_sign_test_p_is_scipys(wins, losses):
    expected = scipy.stats.binomtest(wins, wins + losses, 0.5, "greater").pvalue if wins + losses else 1.0
    assert fa.sign_test_p(wins, losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_benjamini_hochberg_is_scipys(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.random(60), rng.random(40) ** 6]).round(3)  # ties included
    expected = scipy.stats.false_discovery_control(p, method="bh") <= 0.05
    assert 0 < expected.sum() < 100
    assert (fa.benjamini_hochberg(p, 0.05) == expected).all()


def test_benjamini_hochberg_of_nothing():
    assert fa.benjamini_hochberg([], 0.01).shape == (0,)


REPETITIONS = 1000


def nominal(p: list[float], discrete: bool) -> None:
    """Whether p-values under the null are below 0.05 and 0.01 as often as they say; less often where they come in
    steps. Three standard deviations are allowed."""
    for alpha in (0.05, 0.01):
        rate, slack = np.mean(np.array(p) <= alpha), 3 * math.sqrt(alpha * (1 - alpha) / REPETITIONS)
        assert rate <= alpha + slack
        assert discrete or rate >= alpha - slack


@pytest.mark.parametrize(("share", "ties"), [(0.01, False), (0.1, False), (0.1, True)])
def test_false_positives_of_detection(share, ties):
    """Activations shuffled over images."""
    nominal([fa.rank_sum_p(*draw(seed, 1000, share, ties)) for seed in range(REPETITIONS)], discrete=False)


def test_false_positives_of_the_class_part():
    """Labels permuted."""
    rng = np.random.default_rng(0)
    said, active = np.arange(1000) % 10 < 3, draw(0, 1000, 0.1, False)[1]
    nominal([fa.fisher_p(rng.permutation(said), active) for _ in range(REPETITIONS)], discrete=True)


def test_false_positives_of_edits():
    """Edits after which chance alone says whether the feature is active, in the editor that makes the comparisons."""
    planted, hypotheses, scene = planted_strokes()
    editor = fa._Editor(hypotheses[:1], planted[0], scene.images, *planted[1:], seed=0)
    coin, images = torch.Generator().manual_seed(0), torch.arange(40)

    def by_chance(feature: Tensor, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.rand(2, len(x), generator=coin) < 0.4)

    nominal([editor.test(by_chance, [(0, images)])[0].p for _ in range(REPETITIONS)], discrete=True)


def test_false_positives_of_effects():
    """A feature whose direction is, on every image, just another random direction."""
    d_in, n = 12, 40
    hypothesis = blank(0)._replace(effect=fa.Effect(0, 1.0, 1, 1.0), typical_activation=1.0)
    activity = fa.Activity(torch.tensor([0, n]), torch.arange(n), torch.ones(n), torch.zeros(n, dtype=torch.int64))
    generator, p = torch.Generator().manual_seed(0), []

    class Turned(NamedTuple):
        """A linear head that first turns each image's preactivations by its own rotation: turns (n, d_in, d_in)."""

        turns: Tensor

        def logits_from_preactivations(self, z):
            turns = self.turns.repeat(len(z) // len(self.turns), 1, 1)
            return torch.einsum("ni,nij->nj", z, turns)[:, :2]

    for repetition in range(REPETITIONS):
        turns, _ = torch.linalg.qr(torch.randn(n, d_in, d_in, generator=generator))
        turns = turns * torch.where(torch.rand(n, 1, d_in, generator=generator) < 0.5, -1.0, 1.0)
        sae = Planar(W_dec=torch.eye(1, d_in))
        model, raw = Turned(turns), torch.zeros(n, d_in)
        test = fa.effect_test(hypothesis, model, raw, activity, sae, torch.ones(d_in), seed=repetition)
        p.append(test.p)
    nominal(p, discrete=True)


def test_false_discoveries_under_the_null():
    """Where every null is true, anything is discovered at all in a share q of the repetitions."""
    rng = np.random.default_rng(0)
    found = [fa.benjamini_hochberg(rng.random(200), 0.05).any() for _ in range(REPETITIONS)]
    assert np.mean(found) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / REPETITIONS))


# --- Places -----------------------------------------------------------------------------------------------------------


def test_vocabulary_lies_on_the_image_and_speaks_of_all_shapes():
    vocabulary, masks = fa.stroke_vocabulary(), fa.place_masks(fa.stroke_vocabulary())
    assert len(set(vocabulary)) == len(vocabulary)
    assert {place.shape for place in vocabulary} == {"dot", "horizontal", "vertical", "rising", "falling"}
    centre_of_mass = np.stack([np.argwhere(mask.numpy()).mean(0) for mask in masks])
    assert centre_of_mass == pytest.approx(np.array([place[:2] for place in vocabulary]), abs=0.8)


@pytest.mark.parametrize(
    ("place", "pixels", "words"),
    [
        (
            fa.Place(3, 3, "horizontal", 7),
            {(r, c) for r in (2, 3, 4) for c in range(7)},
            "horizontal stroke at the upper left",
        ),
        (
            fa.Place(13, 13, "vertical", 13),
            {(r, c) for r in range(7, 20) for c in (12, 13, 14)},
            "long vertical stroke in the centre",
        ),
        (
            fa.Place(23, 13, "dot", 5),
            {(r, c) for r in range(20, 27) for c in range(10, 17) if (r - 23) ** 2 + (c - 13) ** 2 <= 2.6**2},
            "dot at the bottom",
        ),
    ],
)
def test_places(place, pixels, words):
    assert {tuple(at) for at in np.argwhere(fa.place_masks([place])[0].numpy()).tolist()} == pixels
    assert place.words() == words


def test_diagonals_lean_the_way_they_are_named():
    rising, falling = fa.place_masks([fa.Place(13, 13, "rising", 7), fa.Place(13, 13, "falling", 7)])
    assert rising[11, 15]  # up and to the right
    assert rising[15, 11]
    assert not rising[11, 11]
    assert torch.equal(rising.flip(1)[:, 1:], falling[:, :-1])  # mirror images about column 13


def test_place_ink_is_the_mean():
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    masks = fa.place_masks(fa.stroke_vocabulary())
    expected = torch.stack([images[:, 0][:, mask].mean(1) for mask in masks])
    torch.testing.assert_close(fa.place_ink(images), expected)


# --- A small world with planted strokes -------------------------------------------------------------------------------


class Planar(NamedTuple):
    W_dec: Tensor


def planted_strokes(turn: int = 0):
    """(model, sae, mu, std), hypotheses from one scene, another scene."""
    plan = demo.make_plan(demo.stroke_table(turn))
    planted, seen = demo.plant(plan), demo.draw_labelled(plan, 0)
    return (
        planted,
        fa.propose_hypotheses(planted[0], seen.images, seen.labels, *planted[1:]),
        demo.draw_labelled(plan, 1),
    )


@pytest.fixture(scope="module")
def world():
    return planted_strokes()


def blank(feature: int, **parts) -> fa.Hypothesis:
    return fa.Hypothesis(feature, None, None, None, 0.0, {}, 0.0, (0,) * 10, 0, {})._replace(**parts)


def evidence_in(world, hypotheses=None, **options) -> list[fa.Evidence]:
    (model, *rest), proposed, scene = world
    return fa.test_hypotheses(hypotheses or proposed, model, scene.images, scene.labels, *rest, **options)


def test_planted_strokes_are_found_and_nulls_are_not():
    failed = [check for check in demo.statement_checks() if not check.ok]
    assert failed == []


def test_activity_is_what_encode_says(world):
    (model, sae, mu, std), _, scene = world
    activity = fa.collect_activity(model, scene.images, scene.labels, sae, mu, std)
    acts = sae.encode((model.preactivations(scene.images) - mu) / std)
    dense = torch.zeros_like(acts)
    for k in range(acts.shape[1]):
        image, activation = activity.of(k)
        dense[image, k] = activation
        assert (activity.is_active(k) == (acts[:, k] > 0).numpy()).all()
    torch.testing.assert_close(dense, acts, rtol=1e-6, atol=1e-6)
    assert activity.n_active.tolist() == (acts > 0).sum(0).tolist()


def test_activity_needs_images_and_labels(world):
    (model, sae, mu, std), _, scene = world
    with pytest.raises(ValueError, match="0 images with 0 labels"):
        fa.collect_activity(model, scene.images[:0], scene.labels[:0], sae, mu, std)
    with pytest.raises(ValueError, match="5 images with 4 labels"):
        fa.collect_activity(model, scene.images[:5], scene.labels[:4], sae, mu, std)


def test_proposing_and_testing_repeat_themselves_and_change_nothing(world):
    hypotheses, scene = world[1:]
    before, state = [tensor.clone() for tensor in (scene.images, scene.labels)], torch.random.get_rng_state()
    assert planted_strokes()[1] == hypotheses
    assert evidence_in(world) == evidence_in(world)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, (scene.images, scene.labels), strict=True))


# --- Freezing ---------------------------------------------------------------------------------------------------------


def test_frozen_hypotheses_come_back_as_they_were(world, tmp_path):
    hypotheses = [*world[1], blank(99, why_not={"class": "nothing"})]
    rule = fa.Rule(both_auroc=0.9)
    digest = fa.freeze_hypotheses(hypotheses, tmp_path / "h.json", rule)
    assert fa.read_hypotheses(tmp_path / "h.json", digest) == (hypotheses, rule)


def test_a_changed_file_is_refused_with_both_hashes(world, tmp_path):
    path = tmp_path / "h.json"
    digest = fa.freeze_hypotheses(world[1], path)
    path.write_text(path.read_text().replace('"raises": 0', '"raises": 1', 1))
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"changed after it was frozen: its SHA-256 is {other}, recorded was {digest}"):
        fa.read_hypotheses(path, digest)


def test_no_ink_next_to_ink_of_the_same_words_says_where():
    places = (fa.Place(17, 17, "rising", 13), fa.Place(11, 15, "rising", 13))
    assert places[0].words() == places[1].words() == "long rising stroke in the centre"
    text = fa.statement(blank(0, stroke=fa.Stroke(places, (0.6, -0.4))))
    assert text == (
        "Long rising stroke in the centre; "
        "no long rising stroke in the centre 6 pixels higher and 2 pixels further left"
    )


def test_a_long_stroke_around_a_short_one_is_told_apart():
    places = (fa.Place(13, 13, "vertical", 7), fa.Place(13, 13, "vertical", 13))
    text = fa.statement(blank(0, stroke=fa.Stroke(places, (0.6, -0.4))))
    assert text == "Vertical stroke in the centre; no long vertical stroke in the centre around that one"


def test_labels_are_named_for_their_lift():
    usual = np.array([100, 100, 100, 100, 600])
    assert fa._name_labels(np.array([40, 14, 16, 0, 30]), usual) == (0, 2)  # 4, 1.4, 1.6, 0, 0.5 times
    assert fa._name_labels(np.array([30, 30, 25, 15, 0]), usual) == (0, 1, 2)  # three at most


def test_statements_in_words():
    stroke = fa.Stroke((fa.Place(13, 13, "vertical", 13), fa.Place(13, 5, "dot", 5)), (0.7, -0.3))
    whole = blank(1, labels=(1, 7), stroke=stroke, effect=fa.Effect(1, 0.4, None, 0.0))
    assert fa.statement(whole) == "Long vertical stroke in the centre; no dot at the left; fires on 1s and 7s; raises 1"
    assert fa.statement(blank(1, labels=(3,))) == "Fires on 3s"
    assert fa.statement(blank(1)) == "no hypothesis"


def test_places_outside_the_vocabulary_are_refused(world):
    odd = world[1][0]._replace(stroke=fa.Stroke((fa.Place(4, 4, "dot", 5),), (1.0,)))
    with pytest.raises(ValueError, match=r"Place\(row=4, col=4.*name places from there"):
        evidence_in(world, [odd])


# --- Edits ------------------------------------------------------------------------------------------------------------


def test_matched_edits_move_the_same_ink_each_in_its_place():
    generator = torch.Generator().manual_seed(0)
    available = torch.rand(40, 784, generator=generator)
    mask = torch.rand(40, 784, generator=generator) < torch.linspace(0, 1, 40)[:, None]  # from none named to all
    named, elsewhere = available * mask, available * ~mask
    where = torch.rand(40, generator=generator)
    a, b = fa.matched_edit(named, elsewhere, fa._pixels_by_distance(), where)
    torch.testing.assert_close(a.sum(1), b.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.sum(1), torch.minimum(named.sum(1), elsewhere.sum(1)), rtol=1e-4, atol=1e-3)
    for edit, there in ((a, named), (b, elsewhere)):
        assert (edit >= 0).all()
        assert (edit <= there + 1e-5).all()


def test_the_patch_elsewhere_grows_around_its_centre():
    elsewhere = torch.ones(1, 784)
    named = torch.zeros(1, 784)
    named[0, :21] = 1
    _, patch = fa.matched_edit(named, elsewhere, fa._pixels_by_distance(), torch.tensor([(13 * 28 + 13.5) / 784]))
    rows, cols = np.divmod(np.flatnonzero(patch[0] > 0), 28)
    assert patch.sum() == pytest.approx(21)
    assert np.hypot(rows - 13, cols - 13).max() <= 3  # a disc of 21 pixels has the radius 2.6


def test_erasing_and_painting_by_hand(world):
    """The stroke named is the one the feature reads: erased it is off, painted it is on; ink elsewhere does nothing."""
    hypotheses = world[1]
    k = demo.CENTRES.index((10, 10))
    assert demo.stroke_table(0)[k].name.startswith("rising")
    stroke = fa.Stroke((fa.Place(9, 11, "rising", 7),), (1.0,))
    (evidence,) = evidence_in(world, [hypotheses[k]._replace(stroke=stroke)], n_bootstrap=0)
    assert evidence.erasing.elsewhere == 0
    assert evidence.painting.named == 64
    assert evidence.painting.elsewhere <= 4  # where the patch happens to grow over what the place leaves of the stroke
    wrong = fa.Stroke((fa.Place(23, 23, "rising", 7),), (1.0,))
    (evidence,) = evidence_in(world, [hypotheses[k]._replace(stroke=wrong)], n_bootstrap=0)
    assert evidence.erasing.named == 0
    assert evidence.painting.named == 0


def test_excess_of_an_edit_test_is_the_mean_over_images():
    test = fa.EditTest(n=10, named=6, elsewhere=3, only_named=5, only_elsewhere=2)
    values = [1] * 5 + [1 - 2] * 1 + [-2] * 2 + [0] * 2
    assert test.excess(2.0, 0.25) == pytest.approx((np.mean(values), np.std(values, ddof=1) / math.sqrt(10)))
    seldom = fa.EditTest(n=10, named=2, elsewhere=1, only_named=1, only_elsewhere=0)
    values = [1 - 0.25] * 2 + [-0.25] * 8  # a quarter of the images is more than twice one of ten
    assert seldom.excess(2.0, 0.25) == pytest.approx((np.mean(values), np.std(values, ddof=1) / math.sqrt(10)))
    assert fa.EditTest(64, 0, 0, 0, 0).excess(2.0, 0.25)[0] < 0  # an edit that does nothing has not held


def test_ink_painted_where_none_may_be_turns_a_feature_off():
    """A hypothesis that names only empty places."""

    class Absence(NamedTuple):
        W_enc: Tensor = torch.eye(1)
        W_dec: Tensor = torch.eye(1)

        def encode(self, z):
            return z.clamp(min=0)

    class Model:
        mask = fa.place_masks([fa.Place(13, 13, "dot", 5)])[0].flatten().float()

        def preactivations(self, images):
            return 0.5 - (images.flatten(1) @ self.mask / self.mask.sum())[:, None]

        def logits_from_preactivations(self, z):
            return torch.cat([z, -z], 1)

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 1, 28, 28, generator=generator) * 0.2
    images[100:, :, 11:16, 11:16] = 1.0
    h = blank(0, stroke=fa.Stroke((fa.Place(13, 13, "dot", 5),), (-1.0,)), cuts={"stroke": -0.5, "both": -0.5})
    labels = torch.zeros(200, dtype=torch.int64)
    (evidence,) = fa.test_hypotheses([h], Model(), images, labels, Absence(), torch.zeros(1), torch.ones(1))
    assert evidence.erasing == fa.EditTest(64, 64, 0, 64, 0)
    assert evidence.painting == fa.EditTest(64, 64, 0, 64, 0)
    assert evidence.detected["stroke"].auroc == 1.0


# --- Effects ----------------------------------------------------------------------------------------------------------


def test_effects_by_closed_form(world):
    """A linear head: the change is the same at every dose per unit, and the linear prediction is exact."""
    torch.manual_seed(0)
    head, d_in, n = torch.tensor([[2.0, -1.0], [0.0, 3.0], [1.0, 1.0]]), 3, 40

    class Linear:
        def logits_from_preactivations(self, z):
            return z @ head

    sae, std = Planar(W_dec=torch.tensor([[1.0, 0.0, 0.0]])), torch.tensor([0.5, 0.1, 0.1])
    acts = torch.linspace(1, 3, n)
    activity = fa.Activity(torch.tensor([0, n]), torch.arange(n), acts, torch.zeros(n + 5, dtype=torch.int64))
    h = blank(0, effect=fa.Effect(0, 1.0, 1, 0.25), typical_activation=2.0)
    raw = torch.randn(n + 5, d_in)
    test = fa.effect_test(h, Linear(), raw, activity, sae, std)
    assert test.n == n
    assert test.raised_by == pytest.approx(2 * 0.5 * 2.0)  # mean activation 2, std 0.5, head weight 2
    assert test.lowered_by == pytest.approx(2 * 0.5 * 1.0)
    assert test.share == pytest.approx(2.0 / 1.0)  # 1.0 / 0.25 would be more: the smaller counts
    assert test.dose_raises == pytest.approx([0, 1, 2, 4], abs=1e-5)
    assert test.dose_lowers == pytest.approx([0, -0.5, -1, -2], abs=1e-5)
    assert test.linear_raises == pytest.approx(test.dose_raises, abs=1e-5)
    assert test.linear_lowers == pytest.approx(test.dose_lowers, abs=1e-5)
    assert test.dose_follows
    assert test.only_named + test.only_random == n
    assert test.only_named > 30  # random directions seldom do more


def test_a_curve_that_turns_back_does_not_follow():
    test = fa.EffectTest(9, 1.0, None, 1.0, 0.1, 9, 0, fa.DOSES, (0.0, 1.0, 2.0, 1.5), None, None, None)
    assert not test.dose_follows
    assert test._replace(dose_raises=(0.0, 1.0, 2.0, 2.5)).dose_follows
    assert test._replace(dose_raises=None, dose_lowers=(0.0, -1.0, -2.0, -3.0)).dose_follows


# --- Judging ----------------------------------------------------------------------------------------------------------


def evidence_of(auroc: float, low: float, high: float, p: float, feature: int = 0) -> fa.Evidence:
    detected = fa.Detected(auroc, 0.5, 0.5, {"auroc": (low, high)}, p)
    return fa.Evidence(feature, 50, 1000, {"class": detected, "both": detected}, None, None, None)


@pytest.mark.parametrize(
    ("auroc", "low", "high", "p", "verdict", "confidence"),
    [
        (0.95, 0.9, 0.97, 1e-6, fa.CONFIRMED, "High"),
        (0.95, 0.8, 0.97, 1e-6, fa.CONFIRMED, "Medium"),  # its interval reaches below 0.85, the bar for both
        (0.95, 0.9, 0.97, 0.5, fa.INCONCLUSIVE, "Low"),  # not significant
        (0.84, 0.8, 0.9, 1e-6, fa.INCONCLUSIVE, "Medium"),  # the class part alone is confirmed
        (0.5, 0.45, 0.55, 0.5, fa.REFUTED, "Low"),
    ],
)
def test_verdicts(auroc, low, high, p, verdict, confidence):
    (judgement,) = fa.judge_hypotheses([blank(0, labels=(1,))], [evidence_of(auroc, low, high, p)])
    assert (judgement.verdict, judgement.confidence) == (verdict, confidence)
    assert not judgement.all_three


def test_p_values_are_corrected_over_all_features():
    hypotheses = [blank(k, labels=(1,)) for k in range(100)]
    good, chance = evidence_of(0.95, 0.9, 0.99, 0.004), evidence_of(0.95, 0.9, 0.99, 0.9)
    alone = fa.judge_hypotheses(hypotheses[:1], [good])
    among = fa.judge_hypotheses(hypotheses, [good] + [chance] * 99)
    assert alone[0].verdict == fa.CONFIRMED
    assert among[0].verdict == fa.INCONCLUSIVE


def test_no_hypothesis_and_too_few_images_are_legitimate():
    nothing = fa.Evidence(0, 3, 1000, {}, None, None, None)
    judgements = fa.judge_hypotheses([blank(0), blank(1, labels=(1,))], [nothing, nothing._replace(feature=1)])
    assert [j.verdict for j in judgements] == [fa.NONE, fa.INCONCLUSIVE]
    assert [j.confidence for j in judgements] == ["Low", "Low"]
    assert fa.held(nothing) is None


def test_held_asks_for_values_not_for_significance():
    assert fa.held(evidence_of(0.86, 0.5, 0.9, 0.9)) is True
    assert fa.held(evidence_of(0.84, 0.8, 0.9, 1e-9)) is False


def test_features_that_hardly_fire_are_not_judged(world, tmp_path):
    """Evidence with too few images, through JSON, in words, and without a NaN."""
    (model, *rest), hypotheses, scene = world
    few = fa.collect_activity(model, scene.images, scene.labels, *rest)
    first = few.of(0)[0][:5]  # images on which feature 0 is active
    images, labels = scene.images[first].repeat(1, 1, 1, 1), scene.labels[first]
    images = torch.cat([images, torch.zeros(50, 1, 28, 28)])
    labels = torch.cat([labels, torch.zeros(50, dtype=torch.int64)])
    evidence = fa.test_hypotheses(hypotheses[:1], model, images, labels, *rest)
    (judgement,) = fa.judge_hypotheses(hypotheses[:1], evidence)
    assert (evidence[0].n_active, judgement.verdict, judgement.confidence) == (5, fa.INCONCLUSIVE, "Low")
    assert "5 of 55 unseen images fire it: too few" in fa.evidence_line(hypotheses[0], evidence[0])
    proposed = fa.propose_hypotheses(model, images, labels, *rest)
    assert proposed[0].why_not["stroke"].startswith("active on 5 of 55 images; 8 active")
    fa.freeze_hypotheses(proposed, tmp_path / "h.json")
    assert "NaN" not in (tmp_path / "h.json").read_text()
    shares = fa.shares_explained(evidence, [judgement])
    assert shares.median_auroc is None
    assert shares.median_density == pytest.approx(5 / 55)
    json.dumps(shares._asdict(), allow_nan=False)


def test_labels_missing_from_a_split(world):
    (model, *rest), hypotheses, scene = world
    keep = scene.labels != hypotheses[0].labels[0]
    evidence = fa.test_hypotheses(hypotheses, model, scene.images[keep], scene.labels[keep], *rest)
    assert evidence[0].detected["class"].auroc == 0.5  # no image has the label: it predicts nothing
    text = json.dumps([e._asdict() for e in evidence], allow_nan=False)
    assert "NaN" not in text
    assert fa.judge_hypotheses(hypotheses, evidence)[0].parts["class"] == fa.REFUTED
    proposed = fa.propose_hypotheses(model, scene.images[keep], scene.labels[keep], *rest)
    assert hypotheses[0].labels[0] not in {label for h in proposed for label in h.labels or ()}


def test_images_of_another_size_keep_class_and_effect():
    torch.manual_seed(0)
    n = 400
    labels = torch.arange(n) % 4
    images = 0.1 * torch.rand(n, 3, 8, 8) + torch.nn.functional.one_hot(labels, 4)[:, None, :, None].repeat(1, 3, 2, 8)

    class Model:
        def preactivations(self, images):
            return images.mean((1, 3))[:, :4]

        def logits_from_preactivations(self, z):
            return z.relu()

    class SAE(NamedTuple):
        W_enc: Tensor = torch.eye(4)
        W_dec: Tensor = torch.eye(4)

        def encode(self, z):
            return torch.where(z > 0.5, z, 0.0)

    given = (Model(), images, labels, SAE(), torch.zeros(4), torch.ones(4))
    hypotheses = fa.propose_hypotheses(*given)
    judgements = fa.judge_hypotheses(hypotheses, fa.test_hypotheses(hypotheses, *given))
    for k, (h, j) in enumerate(zip(hypotheses, judgements, strict=True)):
        assert h.labels == (k,)
        assert h.effect.raises == k
        assert h.stroke is None
        assert h.why_not["stroke"] == "images have shape (3, 8, 8); strokes are described on grey 28 x 28 images only"
        assert j.parts == {"class": fa.CONFIRMED, "stroke": fa.NONE, "effect": fa.CONFIRMED}


def test_a_feature_is_tested_alike_whoever_is_tested_beside_it(world):
    assert evidence_in(world, world[1][3:]) == evidence_in(world)[3:]


def test_unclear_requests_are_refused(world):
    (model, *rest), hypotheses, scene = world
    with pytest.raises(ValueError, match="feature 0 has several hypotheses"):
        evidence_in(world, [hypotheses[0], hypotheses[0]])
    with pytest.raises(IndexError, match="feature 99 does not exist"):
        evidence_in(world, [blank(99)])
    activity = fa.collect_activity(model, scene.images, scene.labels, *rest)
    with pytest.raises(ValueError, match="the activity is of 2400 images, but 5 were given"):
        fa.test_hypotheses(hypotheses, model, scene.images[:5], scene.labels[:5], *rest, activity)
    with pytest.raises(ValueError, match=r"strokes cannot be tested: pixels run from -1 to 1"):
        fa.test_hypotheses(hypotheses, model, 2 * scene.images - 1, scene.labels, *rest)
    with pytest.raises(ValueError, match="whole numbers from 0 are needed"):
        fa.propose_hypotheses(model, scene.images, scene.labels.float(), *rest)
    with pytest.raises(ValueError, match="labels run to 10, but the model has 6 classes"):
        fa.propose_hypotheses(model, scene.images, scene.labels * 2, *rest)


def test_negative_activations_are_no_activity(world):
    (model, sae, mu, std), _, scene = world

    class Signed(NamedTuple):
        W_enc: Tensor
        W_dec: Tensor

        def encode(self, z):
            return z @ self.W_enc

    signed = Signed(sae.W_enc, sae.W_dec)
    activity = fa.collect_activity(model, scene.images, scene.labels, signed, mu, std)
    acts = signed.encode((model.preactivations(scene.images) - mu) / std)
    assert activity.n_active.tolist() == (acts > 0).sum(0).tolist()


def test_blank_discovery_images_give_no_hypotheses(world):
    (model, *rest), _, _ = world
    hypotheses = fa.propose_hypotheses(model, torch.zeros(20, 1, 28, 28), torch.zeros(20, dtype=torch.int64), *rest)
    assert not any(h.proposes(part) for h in hypotheses for part in fa.PARTS)


# --- Chance, comparisons, stability -----------------------------------------------------------------------------------


def test_swapped_explanations_change_places_with_their_neighbour_in_firing_rate():
    hypotheses = [blank(k, labels=(k,)) for k in range(4)] + [blank(4)]
    moved = {h.feature: h.labels for h in fa.swapped(hypotheses, torch.tensor([10, 50, 11, 52, 12]))}
    assert moved == {0: (2,), 2: (0,), 1: (3,), 3: (1,)}


def test_shuffled_activity_keeps_what_is_not_the_image(world):
    (model, *rest), _, scene = world
    activity = fa.collect_activity(model, scene.images, scene.labels, *rest)
    mixed = fa.shuffled(activity, seed=3)
    assert torch.equal(mixed.n_active, activity.n_active)
    assert torch.equal(mixed.activation, activity.activation)
    for k in range(3):
        image, _ = mixed.of(k)
        assert len(set(image.tolist())) == len(image)
        assert image.tolist() != activity.of(k)[0].tolist()
    same = np.mean([(mixed.is_active(k) & activity.is_active(k)).mean() for k in range(15)])
    independent = (activity.n_active / len(scene.labels)).square().mean()
    assert same == pytest.approx(float(independent), rel=0.2)


def test_matched_directions_fire_as_often_and_as_strongly():
    z = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)).double().float()
    density, mean = torch.tensor([0.01, 0.1, 0.4]), torch.tensor([0.3, 2.0, 1.0])
    features = fa.random_directions(z, density, mean, seed=1)
    acts = features.encode(z)
    assert ((acts > 0).float().mean(0)).tolist() == pytest.approx(density.tolist(), abs=1 / 4000)
    assert (acts.sum(0) / (acts > 0).sum(0)).tolist() == pytest.approx(mean.tolist(), rel=1e-3)
    assert features.W_dec.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_principal_directions_are_principal():
    scale = torch.tensor([1.0, 5.0, 2.0])
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * scale
    features = fa.principal_directions(z, torch.full((6,), 0.1), torch.ones(6))
    strongest = features.W_dec.abs().argmax(1)
    assert strongest.tolist() == [1, 1, 2, 2, 0, 0]
    assert (features.W_dec[0] + features.W_dec[1]).abs().max() < 1e-6


def test_neurons_are_the_hidden_units():
    mu, std = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5])
    raw = torch.tensor([[1.0, -3.0], [-2.0, 4.0]])
    features = fa.neurons(mu, std)
    acts = features.encode((raw - mu) / std)
    torch.testing.assert_close(acts > 0, raw > 0)
    torch.testing.assert_close(acts @ features.W_dec * std, raw.clamp(min=0))  # what a neuron contributes is itself


def test_the_same_sae_in_another_order_returns_and_another_does_not(world):
    (model, sae, mu, std), _, scene = world
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    mixed = demo.PlantedSAE(sae.W_enc[:, order], sae.b_enc[order], sae.W_dec[order], sae.b_dec, sae.threshold[order])
    matches = fa.match_features(model, scene.images, sae, mixed, mu, std)
    assert matches.feature.tolist() == torch.argsort(order).tolist()
    assert matches.returned.all()
    assert matches.correlation.numpy() == pytest.approx(np.ones(15), abs=1e-4)
    acts = sae.encode((model.preactivations(scene.images) - mu) / std)
    other = mixed._replace(W_enc=-mixed.W_enc, b_enc=-mixed.b_enc)
    found = fa.match_features(model, scene.images, sae, other, mu, std)
    silent = other.encode((model.preactivations(scene.images) - mu) / std)
    k = 4
    expected = (
        np.corrcoef(acts[:, k], silent[:, int(found.feature[k])])[0, 1] if silent[:, int(found.feature[k])].any() else 0
    )
    assert float(found.correlation[k]) == pytest.approx(expected, abs=1e-4)
    assert not found.returned.any()


def test_confidence_falls_when_a_feature_does_not_return():
    high = fa.Judgement(0, {}, {}, fa.CONFIRMED, "High", True)
    judgements = [high, high._replace(feature=1), high._replace(feature=2, confidence="Low")]
    after = fa.with_stability(judgements, torch.tensor([1, 2, 0]), n_runs=3)
    assert [j.confidence for j in after] == ["Medium", "High", "Low"]


# --- Words ------------------------------------------------------------------------------------------------------------


def test_every_measurement_is_told(world):
    _, hypotheses, _ = world
    evidence = evidence_in(world)
    judgements = fa.judge_hypotheses(hypotheses, evidence)
    text = "\n".join(fa.feature_lines(hypotheses[0], evidence[0], judgements[0], True, [2, 4]))
    strict = fa.measured_lines(hypotheses[0], evidence[0], judgements[0], fa.Rule(effect_share=0.75))
    assert any("bar 0.75" in line for line in strict)
    e = evidence[0]
    for words in (
        f"### Feature 0: {fa.statement(hypotheses[0])}",
        f"AUROC {e.detected['stroke'].auroc:.3f}",
        f"turns it off on {e.erasing.named} of {e.erasing.n} images, as much ink elsewhere on {e.erasing.elsewhere}; ",
        f"turns it on on {e.painting.named} of {e.painting.n}",
        f"by {e.effect.raised_by:.3f} (predicted {hypotheses[0].effect.raised_by:.3f})",
        f"{e.effect.dose_raises[3]:+.3f} (linear",
        "Confidence: **High**; verdict confirmed; on images set aside: held",
        "#2, #4",
    ):
        assert words in text


def test_best_first():
    judgement = fa.Judgement(0, {}, {}, fa.CONFIRMED, "Medium", True)
    judgements = [
        judgement,
        judgement._replace(confidence="High"),
        judgement._replace(verdict=fa.REFUTED, confidence="Low"),
        judgement._replace(confidence="High"),
    ]
    evidence = [evidence_of(auroc, 0, 1, 0.1) for auroc in (0.99, 0.9, 0.99, 0.95)]
    assert fa.best_first(judgements, evidence) == [3, 1, 0, 2]


def test_the_picture_shows_every_source():
    shares = fa.Shares(10, 0.4, 0.9, 0.95, 0.8, 0.7, 0.6, 0.01)
    figure = fa.draw_explained({"SAE": [0.9, 0.8], "neurons": []}, {"SAE": shares, "neurons": shares}, 0.85)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["SAE", "neurons"]
    curve = left.lines[0].get_xydata()
    assert curve.tolist() == [[0.8, 1.0], [0.9, 0.5], [1.0, 0.0]]
    assert [bar.get_width() for bar in right.patches] == [40, 40]
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["neurons\n(fire on 1.0%)", "SAE\n(fire on 1.0%)"]
