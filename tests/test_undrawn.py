"""Hypotheses without a drawing: places, classes that predict, effects and confidence, on layers
whose features are known, and in words."""

import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import planted_positions as pp
import pytest
import sklearn.metrics
import torch
from planted import drawing, planted_world
from planted_positions import positions_layer
from small_models import analysis_of, make_scene

from saexplain import baselines, console, diagnoses, substitution, text
from saexplain import evaluation as ev
from saexplain import hypotheses as hy
from saexplain.activity import collect_activity
from saexplain.edits import EditTest
from saexplain.evaluation import CONFIRMED, INCONCLUSIVE, REFUTED
from saexplain.hypotheses import PLACES, Faithful, Hypothesis, Rule, place_cells, place_of
from saexplain.own import read_hypotheses, write_hypotheses
from saexplain.sae import JumpReLUSAE
from saexplain.statistics import wilson_interval
from saexplain.substitution import LEAST_DRAWN_SHARE, measure_agreements

BLANK = np.zeros((1, 1))
NAMES = ("cat", "dog", "red fox", "owl", "hen")

# --- Places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7, 7), (6, 9), (1, 5), (2, 2), (14, 14)])
def test_places_are_thirds_and_ninths_by_the_centers_of_cells(grid):
    for place in PLACES:
        cells = place_cells(place, grid)
        for row, column in np.ndindex(grid):
            down, across = (row + 0.5) / grid[0], (column + 0.5) / grid[1]
            vertical = ("upper", "middle", "lower")[int(3 * down)]
            horizontal = ("left", "center", "right")[int(3 * across)]
            ninth = f"{vertical} {horizontal}".replace("middle center", "center")
            found = place in (ninth, f"{vertical} third", f"{horizontal} third")
            assert cells[row, column] == found


EVEN = np.full((6, 6), 1 / 36)


@pytest.mark.parametrize(
    ("peaks", "usual", "place"),
    [
        ([0, 1, 6, 7], EVEN, "upper left"),
        ([0, 2, 5], EVEN, "upper third"),
        ([0, 1, 20, 33], EVEN, "upper left"),  # half of the peaks
        ([0, 14, 20, 33], EVEN, "center"),  # 14 and 20 are in rows 2 and 3, columns 2 and 3
        ([0, 9, 17, 25, 34, 14], EVEN, ""),
        ([4, 10, 16, 22, 28], EVEN, "right third"),
        ([0, 1, -1, -1, -1], EVEN, ""),  # most are on prefix tokens
        ([], EVEN, ""),
        ([14, 15, 20, 21], np.pad(np.full((2, 2), 0.2), 2), ""),  # where most peaks are
        ([0, 1, 6, 7], np.pad(np.full((2, 2), 0.2), 2), "upper left"),
    ],
)
def test_a_place_has_half_of_the_peaks_and_more_than_usual(peaks, usual, place):
    assert place_of(np.array(peaks, dtype=int), (6, 6), usual, 1.5) == place


# --- Classes that predict -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_classes_named_without_a_drawing_have_the_largest_f1_of_enriched_ones(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 60, 6)
    histogram = rng.binomial(counts, rng.permutation([0.9, 0.7, 0.4, 0.1, 0.05, 0.0]))
    share, usual = histogram / histogram.sum(), counts / counts.sum()
    enriched = [c for c in range(6) if share[c] >= 1.5 * usual[c]]
    f1 = {}
    for n in range(1, len(enriched) + 1):
        for some in map(list, itertools.combinations(enriched, n)):
            f1[tuple(some)] = 2 * histogram[some].sum() / (counts[some].sum() + histogram.sum())
    found = hy.predictive_classes(histogram, counts, 1.5)
    assert f1[tuple(sorted(found))] == pytest.approx(max(f1.values()))
    rates = [histogram[c] / counts[c] for c in found]
    assert rates == sorted(rates, reverse=True)


def test_at_most_twenty_classes_are_named_and_none_where_none_is_enriched():
    assert hy.predictive_classes(np.full(10, 7), np.full(10, 10), 1.5) == ()
    histogram = np.where(np.arange(80) < 40, 9, 0)
    assert len(hy.predictive_classes(histogram, np.full(80, 10), 1.5)) == 20


# --- Proposals for a layer with positions ---------------------------------------------------------


@pytest.fixture(scope="module")
def layer():
    return positions_layer()


@pytest.fixture(scope="module")
def discovery(layer):
    return hy.discover(layer)


@pytest.fixture(scope="module")
def hypotheses(layer, discovery):
    return hy.propose_hypotheses(layer, discovery, classes=NAMES)


def test_a_layer_with_positions_has_no_canvas_and_no_drawings(discovery, hypotheses):
    assert discovery.canvas is None
    assert discovery.levels.numel() == discovery.metric.numel() == 0
    for h in hypotheses:
        assert (h.weights.shape, h.is_drawn, h.threshold) == ((1, 1), False, None)
        assert h.undrawn == hy.POSITIONS_UNDRAWN


def test_classes_places_and_logits_are_those_planted(hypotheses):
    named = [(tuple(sorted(h.classes)), h.place, h.raises) for h in hypotheses]
    assert named[pp.CORNER] == ((0,), "upper left", 0)
    assert named[pp.BOTTOM] == ((1, 2), "lower third", 1)
    assert named[pp.ANYWHERE] == ((), "", None)
    assert named[pp.PREFIX] == ((3,), "", 3)
    assert named[pp.RARE] == ((), "", None)  # too few images
    assert named[pp.WEAK] == ((0,), "", None)
    captions = [h.caption for h in hypotheses]
    assert captions[pp.CORNER] == "Cats, in the upper left"
    assert captions[pp.BOTTOM] == "Red foxes and dogs, in the lower third"
    assert captions[pp.ANYWHERE] == "No class, place or score stands out"
    assert captions[pp.PREFIX] == "Owls, on a prefix token"
    assert captions[pp.RARE] == "nothing drawn"


@pytest.fixture(scope="module")
def always(layer):
    """The layer with an SAE whose features are all active at all positions."""
    weights = {name: values.clone() for name, values in layer.sae.state_dict().items()}
    weights["b_enc"] += 10
    return layer.with_sae(JumpReLUSAE.from_weights(weights))


def test_features_that_are_always_active_have_strong_images(always):
    proposed = hy.propose_hypotheses(always, hy.discover(always), classes=NAMES)
    h, anywhere = proposed[pp.CORNER], proposed[pp.ANYWHERE]
    _, labels, raw = always.splits["val"]
    strongest = always.acts_at(raw)[:, :, pp.CORNER].amax(1).sort(descending=True).values
    assert h.strong_from == strongest[119]  # 20% of 600 images are as many as class 0 has
    assert h.caption == "Strongest on cats, in the upper left"
    assert anywhere.strong_from == pytest.approx(
        float(always.acts_at(raw)[:, :, pp.ANYWHERE].amax(1).sort().values[-32])
    )
    assert (anywhere.classes, anywhere.place) == ((), "")

    _, labels, raw = always.splits["test"]
    (e,) = ev.collect_evidence([h], always, always.splits["test"], None)
    acts, position = always.acts_at(raw)[:, :, pp.CORNER].max(1)
    strong, cat = (acts >= h.strong_from).numpy(), (labels == 0).numpy()
    assert (e.n_active, e.n_strong) == (600, strong.sum())
    assert 0.1 < strong.mean() < 0.3
    assert e.f1 == pytest.approx(sklearn.metrics.f1_score(strong, cat))
    assert e.chance_f1 == pytest.approx(sklearn.metrics.f1_score(strong, strong | True))
    assert (e.classes.share, e.classes.usual) == pytest.approx((cat[strong].mean(), cat.mean()))
    row, column = np.divmod(position.numpy()[strong] - pp.N_PREFIX, 6)
    assert e.place.share == pytest.approx(((row < 2) & (column < 2)).mean())
    assert e.place.usual < 0.3
    assert sum(e.label_histogram) == 600
    decision = ev.decide(e)
    assert (decision.results["classes"], decision.results["place"]) == (CONFIRMED, CONFIRMED)
    assert not e._replace(n_strong=7).is_testable
    assert e._replace(undrawn=False).is_testable  # enough images are not strongly active
    words = f"the {e.n_strong} images ({e.n_strong / 600:.0%}) on which it is strongest"
    for line in (text.class_words(h, e, NAMES), text.place_words(h, e), text.evidence_line(e)):
        assert words in line
    assert "activate the feature strongly" in text.evidence_line(e)
    assert "of such peaks of all features" in text.place_words(h, e)
    assert text.evidence_record(e, {})["n_strong"] == e.n_strong
    again = hy.hypothesis_of(json.loads(json.dumps(hy.hypothesis_record(h))))
    assert again.strong_from == h.strong_from


def shuffled(layer, name: str, seed: int):
    """The activity of a split with each feature's activations in random order, and positions, of
    all features, as well."""
    _, labels, raw = layer.splits[name]
    activity, rng = collect_activity(layer, raw, labels), np.random.default_rng(seed)
    acts = activity.activation.split(activity.n_active.tolist())
    mixed = torch.cat([own[rng.permutation(len(own))] for own in acts])
    position = activity.position[rng.permutation(len(mixed))]
    return activity._replace(activation=mixed, position=position)


def test_strong_images_chosen_by_chance_confirm_nothing(always):
    discovery, results, n_named = hy.discover(always), [], [0, 0]
    for seed in range(20):
        given = None, shuffled(always, "val", seed), None, False
        found = hy.propose_hypotheses(always, discovery, *given)
        n_named[0] += sum(bool(h.classes) for h in found)
        n_named[1] += sum(bool(h.place) for h in found)
        # Classes that chance would name without a test of their own
        found = [replace(h, classes=h.classes or (seed % 5,)) for h in found]
        activity = shuffled(always, "test", 100 + seed)
        split = always.splits["test"]
        tested = ev.collect_evidence(found, always, split, None, None, activity, in_full=False)
        results += [ev.decide(e) for e in tested]
    assert len(results) == 120
    assert n_named[0] <= 6
    assert n_named[1] <= 18
    for name, most in (("classes", 8), ("place", 2)):
        assert sum(d.results.get(name) == CONFIRMED for d in results) <= most


def test_levels_of_strong_activity_have_their_share_of_images():
    acts = torch.rand(900, generator=torch.Generator().manual_seed(0))
    found = hy.strong_levels(acts, 1000)
    counts = {share: int((acts >= level).sum()) for share, level in found.items()}
    assert counts == {0.4: 400, 0.2: 200, 0.1: 100, 0.05: 50, 0.02: 32}
    assert hy.strong_levels(acts[:100], 1000).keys() == {0.05, 0.02}
    assert hy.strong_levels(acts[:32], 1000) == {}  # all of them count


def test_strongest_pairs_are_those_of_each_feature(always):
    _, labels, raw = always.splits["val"]
    activity = collect_activity(always, raw, labels)
    kept = hy.strongest_pairs(activity)
    acts = always.acts_at(raw).amax(1)
    assert kept.sum() == 6 * 32
    for k, own in enumerate(acts.T):  # active on all images
        strongest = own.sort(descending=True).values[:32]
        found = own[kept[600 * k : 600 * (k + 1)]].sort(descending=True).values
        assert torch.equal(found, strongest)


def test_random_directions_are_removed_with_the_features_own_map(layer, monkeypatch):
    monkeypatch.setattr(hy, "NULL_SIZE_SLOW", (5, 3))
    k, (_, _, raw) = pp.CORNER, layer.splits["val"]
    rows = raw[layer.acts_at(raw)[:, :, k].amax(1) > 0]
    acts = layer.acts_of(rows, k)
    some = np.linspace(0, len(rows) - 1, 3).round().astype(int)
    norm, effects = layer.sae.W_dec[k].norm(), []
    for direction in hy.random_directions(raw.shape[2])[:5]:
        moved = acts[some].mean(1)[:, None] * direction * norm * layer.std  # the head is linear
        effects.append((moved @ layer.model.weights).mean(0).numpy())
    found = hy.null_effect(k, layer, rows, acts, 0.95)
    assert found["raises"] == pytest.approx(np.quantile(np.max(effects, 1), 0.95), rel=1e-4)
    assert found["lowers"] == pytest.approx(np.quantile(-np.min(effects, 1), 0.95), rel=1e-4)


# --- Evidence -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence(layer, hypotheses):
    return ev.collect_evidence(hypotheses, layer, layer.splits["test"], None)


def test_classes_named_predict_activity(layer, hypotheses, evidence):
    _, labels, raw = layer.splits["test"]
    acts = layer.acts_at(raw).amax(1).numpy()
    for h, e in zip(hypotheses, evidence, strict=True):
        active, picked = acts[:, h.feature] > 0, np.isin(labels, h.classes)
        assert e.undrawn
        assert (e.detection, e.correlation, e.edits) == (None, None, {})
        if not h.classes:
            assert (e.picked, e.f1) == (None, None)
            continue
        assert e.f1 == pytest.approx(sklearn.metrics.f1_score(active, picked))
        assert e.picked.precision == sklearn.metrics.precision_score(active, picked)
        assert e.picked.recall == sklearn.metrics.recall_score(active, picked)
        assert e.f1_of_drawing is None


def test_places_are_tested_on_the_peaks_of_the_test_images(layer, hypotheses, evidence):
    raw = layer.splits["test"].raw
    acts = layer.acts_at(raw)
    peaks = acts.argmax(1) - pp.N_PREFIX  # (N, S)
    active = acts.amax(1) > 0
    for k, inside in (
        (pp.CORNER, lambda p: (p // 6 < 2) & (p % 6 < 2)),
        (pp.BOTTOM, lambda p: p >= 24),
    ):
        own = peaks[active[:, k], k]
        count = int((inside(own) & (own >= 0)).sum())
        usual = (inside(peaks) & (peaks >= 0) & active).sum() / active.sum()
        found = evidence[k].place
        expected = count / len(own), *wilson_interval(count, len(own)), float(usual)
        assert found == pytest.approx(expected)
    assert [k for k, e in enumerate(evidence) if e.place] == [pp.CORNER, pp.BOTTOM]
    wrong = replace(hypotheses[pp.CORNER], place="lower right")
    (e,) = ev.collect_evidence([wrong], layer, layer.splits["test"], None)
    assert ev.decide(e).results["place"] == REFUTED


def test_doses_scale_the_features_own_map(layer, hypotheses, evidence):
    _, _, raw = layer.splits["test"]
    k = pp.CORNER
    acts = layer.acts_at(raw)[:, :, k]
    at = (acts.amax(1) > 0).nonzero()[:, 0]
    some = at[np.linspace(0, len(at) - 1, ev.EFFECT_IMAGES_SLOW).round()]
    lost = acts[some].mean(1) * 9.0  # the head's weight; the mean over positions
    change = evidence[k].effects["raises"]
    assert (change.logit, change.by) == (0, pytest.approx(float(lost.mean()), rel=1e-4))
    few = np.linspace(0, len(some) - 1, ev.DOSED_IMAGES_SLOW).round()
    doses = [dose * float(lost[few].mean()) for dose in ev.DOSES]
    assert change.at_doses == pytest.approx(doses, rel=1e-3, abs=1e-5)
    assert change.linear == pytest.approx(doses, rel=1e-2, abs=1e-5)


def test_confidence_of_planted_features_and_their_replication(layer, hypotheses):
    halves = ev.split_test_images(layer.splits["test"])
    rows = ev.evaluate_halves(hypotheses, layer, halves, None, Rule())
    found = [row.decision.confidence for row in rows]
    assert found == ["High", "High", "Low", "High", "Low", "Medium"]
    assert [row.replicated for row in rows] == [True, True, None, True, None, True]
    assert rows[pp.PREFIX].again.effects  # without them the other half would give Medium
    assert not rows[pp.WEAK].again.effects


# --- Decisions ------------------------------------------------------------------------------------

GOOD, OPEN, BAD = (
    ev.ClassTest(*v, 0.2) for v in ((0.6, 0.5, 0.7), (0.4, 0.1, 0.6), (0.2, 0.1, 0.25))
)
SHARP = ev.ClassTest(0.75, 0.6, 0.85, 0.2)
CHANGE = ev.LogitChange(1, 0.3, 0.25, 0.4, 0.2, (), ())
NO_CHANGE = CHANGE._replace(by=0.1, low=0.0, high=0.15)


def undrawn_evidence(f1: float | None = None, **parts) -> ev.Evidence:
    """Of 1,000 images, 100 of them active; as many are of the classes named, with this F1."""
    picked = None if f1 is None else ev.Picked(100, 100, round(100 * f1))
    return ev.Evidence(0, 100, 1000, (60, 40), 0.1, 0.1, picked, undrawn=True, **parts)


@pytest.mark.parametrize(
    ("e", "confidence"),
    [
        (undrawn_evidence(0.6, classes=GOOD, place=GOOD), "High"),
        (undrawn_evidence(0.6, classes=GOOD, effects={"raises": CHANGE}), "High"),
        (undrawn_evidence(0.6, classes=GOOD), "Medium"),  # by itself
        (undrawn_evidence(0.59, classes=GOOD, place=GOOD), "Medium"),
        (undrawn_evidence(0.3, classes=GOOD, place=SHARP), "High"),
        (undrawn_evidence(None, place=SHARP, effects={"lowers": CHANGE}), "High"),
        (undrawn_evidence(None, place=GOOD, effects={"lowers": CHANGE}), "Medium"),
        (undrawn_evidence(0.6, classes=GOOD, place=BAD, effects={"raises": CHANGE}), "Medium"),
        (undrawn_evidence(0.6, classes=GOOD, place=GOOD, effects={"raises": NO_CHANGE}), "Medium"),
        (undrawn_evidence(0.6, classes=OPEN, place=GOOD, effects={"raises": CHANGE}), "High"),
        (undrawn_evidence(0.6, classes=OPEN, effects={"raises": CHANGE}), "Low"),
        (undrawn_evidence(None, effects={"raises": CHANGE, "lowers": CHANGE}), "Low"),
        (undrawn_evidence(None), "Low"),
    ],
)
def test_confidence_without_a_drawing(e, confidence):
    assert ev.decide(e).confidence == confidence
    assert ev.decide(e._replace(undrawn=False)).confidence == "Low"  # no edit is confirmed


def test_effects_alone_never_give_more_than_low():
    """Whatever F1 is, of a drawing or by class: no other result is confirmed."""
    both = {"raises": CHANGE, "lowers": CHANGE}
    same_elsewhere = EditTest(n=100, named=90, elsewhere=90, only_named=0, only_elsewhere=0)
    for f1, place in itertools.product((None, 0.3, 1.0), (None, OPEN, BAD)):
        for classes in (None,) if f1 is None else (OPEN, BAD):
            e = undrawn_evidence(f1, classes=classes, place=place, effects=both)
            assert ev.decide(e).confidence == "Low"
        for edits in ({}, {"erasing": same_elsewhere, "painting": same_elsewhere}):
            d = ev.decide(undrawn_evidence(f1, edits=edits, effects=both)._replace(undrawn=False))
            assert (d.results["raises"], d.confidence) == (CONFIRMED, "Low")


def test_a_place_is_confirmed_by_half_of_the_peaks_and_more_than_usual():
    for share, low, high, usual, result in (
        (0.5, 0.4, 0.6, 0.1, CONFIRMED),
        (0.49, 0.4, 0.6, 0.1, INCONCLUSIVE),
        (0.49, 0.4, 0.495, 0.1, REFUTED),  # three times as often, but not half
        (0.7, 0.6, 0.8, 0.5, INCONCLUSIVE),
        (0.6, 0.5, 0.74, 0.5, REFUTED),
    ):
        e = undrawn_evidence(place=ev.ClassTest(share, low, high, usual))
        assert ev.decide(e).results == {"place": result}


# --- Vector layers whose patterns follow some features only ---------------------------------------


@pytest.fixture(scope="module")
def world():
    return planted_world()


def faithful_from(k: int) -> Faithful:
    """Features from k on may be drawn."""
    correlation = torch.where(torch.arange(15) < k, 0.2149, 0.9)
    return Faithful(correlation >= 0.5, correlation)


def test_unfaithful_features_are_not_drawn_and_others_are_as_before(world):
    found = hy.propose_hypotheses(world.layer, world.discovery, faithful=faithful_from(4))
    for k, (h, before) in enumerate(zip(found, world.hypotheses, strict=True)):
        if k >= 4:
            assert hy.hypothesis_record(h) == hy.hypothesis_record(before)
            continue
        assert h.undrawn == "its pattern follows it with a correlation of 0.21 only"
        assert (h.weights.shape, h.is_drawn, h.threshold) == ((28, 28), False, None)
        assert (h.classes, h.raises, h.lowers) == (before.classes, before.raises, before.lowers)
        assert h.caption == f"{h.classes[0]}s"  # a stroke is frequent in one class
    none = faithful_from(15)
    empty = hy.discover(world.layer, drawable=none.drawable)
    assert empty.canvas is None
    bare = hy.propose_hypotheses(world.layer, empty, faithful=none)
    assert [h.weights.shape for h in bare] == [(1, 1)] * 15


def test_drawings_replace_features_only_where_half_of_l0_may_be_drawn(world):
    activity = collect_activity(world.layer, world.val.raw, world.val.labels)
    half, _ = ev.split_test_images(world.test)
    share = activity.n_active.flip(0).cumsum(0).flip(0) / activity.n_active.sum()
    last = int((share >= LEAST_DRAWN_SHARE).nonzero()[-1])  # drawn from here on: half of L0
    for k, compared in ((0, True), (last, True), (last + 1, False), (15, False)):
        found = hy.propose_hypotheses(world.layer, world.discovery, faithful=faithful_from(k))
        given = world.layer, world.discovery, activity, found, half
        agreements = measure_agreements(*given)
        assert (agreements.hypotheses is not None) == (agreements.swapped is not None) == compared
        assert bool(agreements.not_compared) != compared
        assert agreements.features == 1
    assert agreements.not_compared.startswith("no feature is drawn: its pattern follows")


def test_positions_are_all_replaced_for_the_agreement(layer):
    raw = layer.splits["test"].raw[:150]
    assert substitution.agreement_of_features(layer, raw) > 0.9
    before = raw.mean(1) @ layer.model.weights + layer.model.bias
    W_dec = layer.sae.W_dec.clone()
    W_dec[pp.CORNER] = 0
    other = layer.with_sae(JumpReLUSAE.from_weights({**layer.sae.state_dict(), "W_dec": W_dec}))
    spliced = (layer.acts_at(raw) @ W_dec + layer.sae.b_dec) * layer.std + layer.mu
    after = spliced.mean(1) @ layer.model.weights + layer.model.bias
    expected = (after.argmax(1) == before.argmax(1)).double().mean()
    assert substitution.agreement_of_features(other, raw) == pytest.approx(float(expected))
    assert expected < 0.9


def test_baselines_draw_faithful_features_only(world):
    halves = ev.split_test_images(world.test)
    given = world.layer.sae, world.layer, world.discovery, *halves
    for least, drawn in ((0.5, 15), (1.01, 0)):
        found = baselines.faithful_on_canvas(world.layer, world.discovery, least)
        assert int(found.drawable.sum()) == drawn
        assert found.correlation.min() > 0.9
    plain, same = (baselines.evaluate_baseline(*given, least) for least in (None, 0.5))
    assert plain == same
    none = baselines.evaluate_baseline(*given, 1.01)
    assert (none.f1_mean, none.undrawn["features"]) == (None, 15)


# --- Images that are not in memory ----------------------------------------------------------------


class ReadImages:
    """Images that are read from a tensor when they are indexed, and counted."""

    def __init__(self, images: torch.Tensor):
        self.images, self.read = images, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key) -> torch.Tensor:
        found = self.images[key]
        self.read.append(len(found))
        return found

    def split(self, n: int):
        return (self[i : i + n] for i in range(0, len(self), n))

    def subset(self, key) -> "ReadImages":
        return ReadImages(self.images[key])


def test_images_are_read_in_batches_and_halves_are_not_read(world, monkeypatch):
    monkeypatch.setattr(hy, "CANVAS_IMAGES", 300)
    images = ReadImages(world.test.images)
    canvas = hy.fit_canvas(images)
    assert images.read == [300]
    assert canvas.image_shape == (1, 28, 28)
    images.read.clear()
    assert torch.equal(hy.ink_levels(canvas, images), canvas.levels(world.test.images))
    assert max(images.read) <= 512
    images.read.clear()
    halves = ev.split_test_images(world.test._replace(images=images))
    assert not any(some.read for some in (images, *(half.images for half in halves)))
    assert torch.equal(halves[1].images.images, world.test.images[1::2])
    assert torch.equal(halves[0].labels, world.test.labels[0::2])


# --- Files and words ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(layer, discovery, hypotheses):
    halves = ev.split_test_images(layer.splits["test"])
    activity = collect_activity(layer, halves[0].raw, halves[0].labels)
    rows = ev.evaluate_halves(hypotheses, layer, halves, None, Rule(), activity)
    of_val = collect_activity(layer, discovery.raw, discovery.labels)
    agreements = measure_agreements(layer, discovery, of_val, hypotheses, halves[0])
    return ev.make_evaluation(hypotheses, Rule(), rows, activity, agreements, 600)


def test_frozen_hypotheses_keep_place_and_reason(hypotheses, tmp_path):
    digest = hy.freeze_hypotheses(hypotheses, tmp_path / "h.json")
    content = json.loads((tmp_path / "h.json").read_bytes())
    assert content["places"] == {"least_place_share": 0.5, "high_place_share": 0.75}
    found, rule = hy.load_frozen(tmp_path / "h.json", digest)
    assert rule == Rule()
    records = [hy.hypothesis_record(h) for h in hypotheses]
    assert [hy.hypothesis_record(h) for h in found] == records
    assert records[pp.CORNER]["place"] == "upper left"
    assert "place" not in records[pp.ANYWHERE]
    plain = drawing(0, np.eye(4))
    assert not {"place", "undrawn"} & hy.hypothesis_record(plain).keys()
    hy.freeze_hypotheses([plain], tmp_path / "h.json")
    assert "places" not in json.loads((tmp_path / "h.json").read_bytes())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"place": "attic"}, "place must be one of upper third, .*got 'attic'"),
        ({"place": 3}, "place must be one of .*got 3"),
        ({"undrawn": "x" * 301}, "undrawn must be text of at most 300 characters"),
        ({"strong_from": 0}, "strong_from must be a positive number, got 0"),
        ({"strong_from": float("nan")}, "strong_from must be a positive number, got nan"),
        ({"strong_from": "1"}, "strong_from must be a positive number, got '1'"),
        (
            {"undrawn": "too hard", "wanted": np.eye(2)},
            "undrawn must be empty where a cell is wanted",
        ),
    ],
)
def test_what_is_no_place_or_reason_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        Hypothesis(**{"feature": 0, "wanted": BLANK, **given})


def test_summaries_count_what_is_confirmed(evaluation):
    s = evaluation.summary
    assert (s.agreement_hypotheses, evaluation.agreement_swapped) == (None, None)
    assert (s.f1_mean, s.f1_by_influence, s.chance_mean) == (None, None, None)
    assert (s.features, s.too_rare, s.undrawn["features"]) == (5, 1, 5)
    by_class = [evaluation.rows[k].evidence for k in (pp.CORNER, pp.BOTTOM, pp.PREFIX, pp.WEAK)]
    assert s.undrawn["f1"] == pytest.approx(np.mean([e.f1 for e in by_class]))
    assert s.undrawn["classes"] == {"named": 4, "confirmed": 1.0}
    assert s.undrawn["place"] == {"named": 2, "confirmed": 1.0}
    record = ev.evaluation_record(evaluation, {}, "abc")
    json.dumps(record, allow_nan=False)
    assert record["not_compared"] == f"no feature is drawn: {hy.POSITIONS_UNDRAWN}"
    rule = record["confidence_rule"]
    assert rule.startswith("Of a hypothesis without a drawing: Medium: ")
    assert " 0.6 and 0.25 above" in rule
    assert "75% of its peaks" in rule
    both = ev.format_rule(Rule(), [*evaluation.hypotheses, drawing(0, np.eye(2))])
    assert both == f"{ev.format_rule(Rule())} {rule}"


def test_records_and_markdown_without_drawings(evaluation):
    record = ev.evaluation_record(evaluation, {}, "abc")
    entry = text.evaluated_record(pp.CORNER, evaluation, NAMES)
    json.dumps(entry, allow_nan=False)
    assert entry["f1_by"] == "classes"
    assert entry["evidence"]["place"]["share"] == evaluation.rows[pp.CORNER].evidence.place.share
    lines = entry["measured"]
    assert lines[0] == f"nothing is drawn: {hy.POSITIONS_UNDRAWN}"
    assert lines[1].startswith("by class, not by a drawing: F1 0.")
    assert any(
        "its peak is in the upper left" in line and line.endswith(": confirmed") for line in lines
    )
    assert "effects_words" not in entry  # few classes
    assert "of the images of the classes named" in entry["evidence"]["text"]
    titles = [row[0] for row in text.summary_rows(record)]
    assert "  place, confirmed" in titles
    assert not [t for t in titles if "F1, " in t or "painting" in t or "in their place" in t]
    assert not [row for row in text.summary_rows(record) if "none" in row]
    headline = text.headline(record)
    assert headline.startswith("5 of 5 features that could be tested have no drawing; 100% of 4 ")
    page = text.hypotheses_markdown(evaluation, record, "a title", classes=NAMES)
    for absent in ("{", "None", "Erasing", "Untrained features", "exchanged"):
        assert absent not in page
    assert "- Place: on " in page
    assert "6 hypotheses have no drawing" in page


def test_the_terminal_shows_rows_that_a_record_has():
    record = {"target_actives": 4, "achieved_actives_test": 4.0, "seconds": {"whole run": 1.0}}
    record |= {"l0_position_test": 4.0, "l0_image_test": 75.2, "fvu_untrained": 0.5}
    record |= {"agreement_hypotheses": None, "f1_by_influence": None, "fvu_to_pca": None}
    rows = [
        re.split("  +", line.strip()) for line in console.results_table([record], 3).split("\n")
    ]
    assert rows == [
        ["the former relative to the latter", "not computed", "test images"],
        ["that the untrained SAE loses", "0.5000", "test images"],
        ["features active per position (L0)", "4.00", "test images"],
        ["on an image, at any position", "75.2", "test images"],
    ]
    shown = dict(console.page_results(record))
    assert shown["... on an image, at any position (test images)"] == "75.2"
    assert not any("drawings" in title for title in shown)


def test_many_classes_are_summarized_in_groups(evaluation):
    row = evaluation.rows[pp.CORNER]
    e = row.evidence._replace(delta=(-3.0, -2.0, 0.5, 0.0, 0.4))
    changed = evaluation._replace(rows=[row._replace(evidence=e)])
    words = text.evaluated_record(0, changed, NAMES)["effects_words"]
    falls = "remove it and the scores for 2 classes fall by 2.50 on average, most for cat, then dog"
    assert (
        words
        == f"{falls}; the scores for 2 classes rise by 0.45 on average, most for red fox, then hen"
    )
    entry = {"caption": "c", "evidence": {"text": "t"}, "confidence": "Low", "replicated": None}
    assert console.hypothesis_lines({**entry, "effects_words": words})[-1].endswith(words)


def test_changes_of_logits_are_kept_where_there_are_many(layer, hypotheses, monkeypatch):
    given = hypotheses[:1], layer, layer.splits["test"], None
    (few,) = ev.collect_evidence(*given)
    monkeypatch.setattr(ev, "MANY_CLASSES", 4)
    (many,) = ev.collect_evidence(*given)
    acts = layer.acts_at(layer.splits["test"].raw)[:, :, 0]
    lost = float(acts[acts.amax(1) > 0].mean(1).mean()) * 9.0
    assert few.delta == ()  # many: of 64 images
    assert many.delta == pytest.approx([-lost, 0, 0, 0, 0], rel=0.02, abs=1e-5)


def test_a_place_needs_positions_and_a_drawing_a_canvas(layer, world):
    placed = Hypothesis(1, BLANK, place="center", undrawn="a place")
    with pytest.raises(ValueError, match="feature 1: only layers with positions have a place"):
        ev.collect_evidence([placed], world.layer, world.test, world.discovery.canvas)
    drawn = drawing(1, np.eye(4), threshold=1)
    with pytest.raises(ValueError, match="feature 1 must have no drawing: there is no canvas"):
        ev.collect_evidence([drawn], layer, layer.splits["test"], None)


def test_a_person_may_name_a_place_and_nothing_else(tmp_path):
    mine = Hypothesis(pp.CORNER, BLANK, classes=(0,), place="upper left", undrawn="a map")
    write_hypotheses([mine], tmp_path / "mine.json")
    (h,) = read_hypotheses(tmp_path / "mine.json")
    assert (h.place, h.undrawn, h.is_drawn) == ("upper left", "a map", False)


# --- Diagnoses ------------------------------------------------------------------------------------


def test_advice_names_what_the_caller_has():
    analysis = analysis_of(make_scene("relu"))
    record = {"sae_latents": 12, "dead_features": 3, "delta_acc_boolean_scaled": 0.5}
    record |= {"dense_share_of_l0": 0.7, "reproducibility": {"variance": {"mean": 0.1}}}
    seconds = dict.fromkeys(("bank", "patterns", "effects", "pictures"), 1.0)
    for names, there, absent in (
        (diagnoses.SCRIPT_NAMES, "SAE_LATENTS", "sae_latents="),
        (diagnoses.EXPLAIN_NAMES, "sae_latents=", "_LATENTS"),
        (diagnoses.GIVEN_SAE_NAMES, "number of latents", "="),
    ):
        found = diagnoses.diagnose(record, analysis, [1, 2], seconds, names)
        advice = {d.complaint: d.advice for d in found if d.complaint != "slow analysis"}
        assert there in advice["dead latents"]
        assert names["target"] in advice["dense features"]
        assert names["target"] in advice["seed-specific features"]
        assert not any(absent in words for words in advice.values())
        assert ("WEIGHT_DECAY_FFN" in advice["noisy patterns"]) == (names is diagnoses.SCRIPT_NAMES)


def test_layers_with_positions_have_diagnoses_of_their_own():
    analysis = analysis_of(make_scene("relu"))
    density = torch.tensor([0.5, 0.3, 0.1, 0.1])
    maps = SimpleNamespace(kind="activation", n_prefix=1, position_density=density)
    maps.place_only = torch.tensor([True, False, False, False])
    maps.blank_share = torch.tensor([0.6, 0.6, 0.7, 0.5])
    maps.prefix_share = torch.tensor([0.9, 0.6, 0.5, 0.0])
    patterns = analysis.patterns._replace(linear=False, correlation=torch.full((12,), 0.2))
    analysis = analysis._replace(maps=maps, patterns=patterns)
    record = {"sae_latents": 12, "dead_features": 0, "delta_acc_boolean_scaled": 0.0}
    record |= {
        "dense_share_of_l0": 0.1,
        "hypotheses": {"summaries": {"SAE": {"agreement_hypotheses": None}}},
    }
    seconds = dict.fromkeys(("bank", "patterns", "effects", "pictures"), 1.0)
    given = (record, analysis, [1, 2], seconds)
    found = {d.complaint: d for d in diagnoses.diagnose(*given)}
    assert found["dense features"].value == pytest.approx(0.8)
    assert "positions" in found["dense features"].what
    assert found["features that encode only a place"].value == 0.25
    assert found["features on prefix tokens"].value == 0.5
    assert found["features on blank background"].value == 0.25
    assert found["unfaithful patterns"].value == pytest.approx(0.8)
    assert not {"noisy patterns", "failing hypotheses"} & found.keys()
    maps.n_prefix, maps.position_density = 0, torch.zeros(4)
    found = {d.complaint: d for d in diagnoses.diagnose(*given)}
    assert "features on prefix tokens" not in found
    assert found["dense features"].value is None
