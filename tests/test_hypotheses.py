"""Hypotheses: scores and thresholds by brute force, proposals on a planted model, frozen files."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
from planted import SIDE, drawing, planted_world
from small_models import activity_of

import feature_analysis as fa
from saexplain import hypotheses as hy
from saexplain.activity import collect_activity, removal_effects
from saexplain.hypotheses import Hypothesis, Rule
from saexplain.sae import JumpReLUSAE

MASK = np.eye(4) == 1


def same(a: Hypothesis, b: Hypothesis) -> bool:
    return hy.hypothesis_record(a) == hy.hypothesis_record(b)


# --- Hypotheses, scores, thresholds ---------------------------------------------------------------


def test_a_hypothesis_has_weights_and_by_default_a_caption_of_its_geometry():
    stem = np.zeros((SIDE, SIDE))
    stem[8:20, 13:15] = 1
    h = Hypothesis(116, stem, classes=[1, np.int64(7)], raises=1, confidence="High")
    assert (h.caption, h.classes, h.threshold) == ("Stem in the center", (1, 7), None)
    assert np.array_equal(h.weights, stem)
    assert h.weights.dtype == np.int8
    both = Hypothesis(0, 2 * MASK, torch.eye(4).flip(0), caption="cross")
    assert np.array_equal(both.weights, 2 * np.eye(4) - np.eye(4)[::-1])
    assert (both.caption, both.is_drawn) == ("cross", True)
    assert not Hypothesis(0, 0 * MASK).is_drawn
    one = np.int64(1)  # which is no JSON
    record = hy.hypothesis_record(
        Hypothesis(one, MASK, None, (one,), one, np.int64(2), threshold=one)
    )
    assert json.loads(json.dumps(record))["classes"] == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feature": -1}, "feature must be at least 0, got -1"),
        ({"feature": 1.5}, "feature must be .*got 1.5"),
        ({"wanted": np.zeros((0, 3))}, r"wanted must have shape \(h, w\), got \(0, 3\)"),
        ({"wanted": np.ones((2, 3, 4))}, r"wanted must have shape \(h, w\), got \(2, 3, 4\)"),
        ({"wanted": 3 * MASK}, "wanted must hold 0, 1 and 2 only, got .*3"),
        ({"unwanted": 0.5 * MASK}, "unwanted must hold 0, 1 and 2 only, got .*0.5"),
        ({"unwanted": np.eye(3)}, r"one shape, got \(4, 4\) and \(3, 3\)"),
        ({"unwanted": MASK}, "cannot be wanted and unwanted, but 4 are"),
        ({"classes": 3}, "classes must be .*got 3"),
        ({"raises": True}, "raises must be a whole number, got True"),
        ({"classes": (1, -2)}, "a class must be at least 0, got -2"),
        ({"raises": "1"}, "raises must be .*'1'"),
        ({"lowers": -1}, "lowers must be at least 0, got -1"),
        ({"confidence": "Sure"}, "confidence must be one of .*Low.*got 'Sure'"),
        ({"threshold": 0.5}, "threshold must be .*got 0.5"),
        ({"caption": 3}, "caption must be text of at most 300 characters"),
    ],
)
def test_what_is_no_hypothesis_is_an_error_of_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        Hypothesis(**{"feature": 0, "wanted": MASK, **given})
    assert "\n" not in str(error.value)


def test_scores_are_exact_sums():
    rng = np.random.default_rng(0)
    weights, levels = rng.integers(-2, 3, (3, 20, 30)), rng.integers(0, 256, (50, 600))
    weights[0], levels[0] = 2, 255  # the largest score
    found = hy.scores_of(weights, torch.from_numpy(levels).float())
    assert found.dtype == torch.int32
    assert found.tolist() == (weights.reshape(3, 600) @ levels.T).tolist()
    assert found[0, 0] == 2 * 255 * 600


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_active", [1, 9, 60, 80])
def test_the_threshold_has_the_largest_f1_half_way_to_the_next_lower_score(seed, n_active):
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(80, n_active, replace=False))
    scores = rng.integers(-40, 40, 80).astype(np.int32)
    scores[at] += 12
    active = np.isin(np.arange(80), at)
    f1 = {cut: sklearn.metrics.f1_score(active, scores >= cut) for cut in scores.tolist()}
    found = hy.best_threshold(scores, at)
    last = scores[scores >= found].min()
    assert f1[last] == pytest.approx(max(f1.values()))
    lower = scores[scores < last].max() if scores.min() < last else last
    assert found == np.ceil((last + lower) / 2)


def test_missing_thresholds_are_found_and_others_stay():
    levels = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 3.0], [30.0, 0.0]])
    activity = activity_of([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    weights = [[1, 0]]
    some = [drawing(0, weights), drawing(0, weights, threshold=7), drawing(1, weights)]
    found = hy.with_thresholds(some, levels, activity)
    assert [h.threshold for h in found] == [15, 7, 31]  # an inactive feature: never reached


# --- Proposals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return planted_world()


def test_thresholds_and_classes_are_those_of_the_discovery_images(world):
    images, labels, raw = world.val
    levels = (255 * images).round().flatten(1).long()
    usual = np.bincount(labels, minlength=6) / len(labels)
    for h in world.hypotheses:
        active = (world.layer.feature_acts(raw)[:, h.feature] > 0).numpy()
        scores = (levels @ torch.from_numpy(h.weights).flatten().long()).numpy()
        cuts = {s: sklearn.metrics.f1_score(active, scores >= s) for s in np.unique(scores)[::50]}
        assert sklearn.metrics.f1_score(active, scores >= h.threshold) >= max(cuts.values())
        share = np.bincount(labels[active], minlength=6) / active.sum()
        assert h.classes == tuple(np.flatnonzero(share >= 1.5 * usual))


@pytest.mark.parametrize(
    ("histogram", "usual", "named"),
    [
        ((40, 14, 16, 0, 30), (1, 1, 1, 1, 6), (0, 2)),
        ((30, 30, 25, 15, 0), (1, 1, 1, 1, 6), (0, 1)),  # two at most
        ((3, 2, 2, 2, 7), (1, 1, 1, 1, 4), (0,)),  # from 1.5 times on
        ((25, 25, 25, 25, 0), (1, 1, 1, 1, 0), ()),  # a label of no image
    ],
)
def test_classes_are_named_for_their_share(histogram, usual, named):
    assert hy.enriched_classes(np.array(histogram), 100 * np.array(usual), 1.5) == named


def test_logits_are_named_where_random_directions_change_them_less(world):
    layer, (_, labels, raw) = world.layer, world.val
    activity = collect_activity(layer, raw, labels)
    deltas = removal_effects(layer, raw, activity).mean_delta
    for h, row in zip(world.hypotheses, layer.sae.W_dec, strict=True):
        at, acts = activity.of(h.feature)
        some = np.linspace(0, len(at) - 1, 16).round()
        rows, changes = raw[at[some]], []
        for direction in row.norm() * hy.random_directions(len(row)):
            without = rows - acts[some][:, None] * direction * layer.std
            logits = layer.model.logits_from_preactivations(torch.stack([rows, without]))
            changes.append((logits[0] - logits[1]).mean(0).numpy())
        highest = np.quantile(np.max(changes, 1), 0.95), np.quantile(-np.min(changes, 1), 0.95)
        found = hy.null_effect(h.feature, layer, raw[at], acts, 0.95)
        assert (found["raises"], found["lowers"]) == pytest.approx(highest, rel=1e-4)
        delta = deltas[h.feature]
        pairs = zip((-delta, delta), highest, strict=True)
        named = [int(d.argmax()) if d.max() > 1.25 * null else None for d, null in pairs]
        assert [h.raises, h.lowers] == named
    assert {h.raises is None for h in world.hypotheses} == {True, False}


def test_proposals_are_the_same_again_and_leave_inputs_and_generator_alone(world):
    before, state = [v.clone() for v in world.val], torch.random.get_rng_state()
    again = hy.propose_hypotheses(world.layer, world.discovery)
    assert all(map(same, again, world.hypotheses))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, world.val))
    plain = hy.propose_hypotheses(world.layer, world.discovery, in_full=False)
    for h, other in zip(plain, world.hypotheses, strict=True):
        assert (h.threshold, h.raises, h.lowers) == (other.threshold, None, None)
        assert np.array_equal(h.weights, other.weights)


def test_labels_and_test_images_change_neither_drawing_nor_threshold(world):
    order = torch.randperm(len(world.val.labels), generator=torch.Generator().manual_seed(0))
    val = world.val._replace(labels=world.val.labels[order])
    layer = replace(world.layer, splits={"val": val})  # without test images
    found = hy.propose_hypotheses(layer, hy.discover(layer))
    for h, other in zip(found, world.hypotheses, strict=True):
        assert np.array_equal(h.weights, other.weights)
        assert h.threshold == other.threshold
    assert [h.classes for h in found] == [()] * len(found)


def test_features_that_are_hardly_active_have_no_drawing(world):
    weights = dict(world.layer.sae.state_dict())
    acts = world.layer.feature_acts(world.val.raw)
    weights["threshold"] = weights["threshold"].clone()
    for k, n in enumerate((0, 7, 8)):  # images that still activate the feature
        weights["threshold"][k] = acts[:, k].sort(descending=True).values[n]
    weights["threshold"][3] = -1e9  # always active
    weights["b_enc"] = weights["b_enc"].clone()
    weights["b_enc"][3] += 1e3
    layer = world.layer.with_sae(JumpReLUSAE.from_weights(weights))
    found = hy.propose_hypotheses(layer, hy.discover(layer))
    assert [h.is_drawn for h in found[:5]] == [False, False, True, False, True]
    for k in (0, 1, 3):
        h = found[k]
        assert (h.caption, h.classes, h.raises, h.threshold) == ("nothing drawn", (), None, None)
    assert all(map(same, found[4:], world.hypotheses[4:]))


def test_errors_of_proposals(world):
    few = collect_activity(world.layer, world.val.raw[:100], world.val.labels[:100])
    with pytest.raises(ValueError, match="activity must be of"):
        hy.propose_hypotheses(world.layer, world.discovery, activity=few)
    doubled = world.discovery._replace(labels=world.discovery.labels * 2)
    with pytest.raises(ValueError, match="labels"):
        hy.propose_hypotheses(world.layer, doubled)


# --- Files ----------------------------------------------------------------------------------------


def test_rows_of_a_drawing_and_records_come_back_as_they_were(world):
    weights = np.array([[0, 1, 2], [-1, -2, 0]], dtype=np.int8)
    assert hy.drawing_rows(weights) == [".+#", "-=."]
    assert np.array_equal(hy.weights_of_rows([".+#", "-=."]), weights)
    full = drawing(3, weights, classes=(1,), raises=0, lowers=2, confidence="Low", threshold=-4)
    for h in (*world.hypotheses, full, drawing(0, weights)):
        record = json.loads(json.dumps(hy.hypothesis_record(h)))
        assert same(hy.hypothesis_of(record), h)
    assert hy.hypothesis_of({"feature": 1, "drawing": ["+"], "other": 3}).caption


@pytest.mark.parametrize("rows", [[], ["..", "."], ["..", ".x"]])
def test_rows_that_are_no_drawing(rows):
    with pytest.raises(ValueError, match="a drawing "):
        hy.weights_of_rows(rows)


def digest_of(path) -> str:
    """The SHA-256 of a frozen file without its second line."""
    lines = path.read_bytes().splitlines(keepends=True)
    return hashlib.sha256(b"".join([lines[0], *lines[2:]])).hexdigest()


def test_frozen_hypotheses_and_rule_come_back_as_they_were(world, tmp_path):
    path, rule = tmp_path / "h.json", Rule(high_f1=0.9)
    digest = hy.freeze_hypotheses(world.hypotheses, path, rule)
    assert digest == digest_of(path) == json.loads(path.read_bytes())["sha256"]
    for known in (digest, None):
        found, of_file = hy.load_frozen(path, known)
        assert of_file == rule
        assert all(map(same, found, world.hypotheses))


@pytest.mark.parametrize("known", [True, False])
def test_edited_files_are_found_out(world, tmp_path, known):
    path = tmp_path / "h.json"
    digest = hy.freeze_hypotheses(world.hypotheses, path)
    path.write_text(path.read_text().replace('"threshold": 8', '"threshold": 9', 1))
    other = digest_of(path)
    with pytest.raises(ValueError, match=f"is {other}, recorded was {digest}"):
        hy.load_frozen(path, digest if known else None)
    path.write_text(path.read_text().replace(digest, other))  # the digest replaced as well
    assert not all(map(same, hy.load_frozen(path)[0], world.hypotheses))
    with pytest.raises(ValueError, match=f"is {other}, recorded was {digest}"):
        hy.load_frozen(path, digest)
    fa.write_whole(path, path.read_bytes().replace(b'"sha256"', b'"sha"'))
    with pytest.raises(ValueError, match="recorded was nowhere"):
        hy.load_frozen(path)
