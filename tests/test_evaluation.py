"""Tests, decisions and summaries: against scikit-learn, closed forms and brute force."""

import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from planted_strokes import activity_of, blank, draw_labelled, paired, plant, stroke_table
from saexplain.strokes import Strokes, Word, place_inks, word_inks

import feature_analysis as fa
from saexplain import evaluation as ev
from saexplain import hypotheses as hy
from saexplain import text
from saexplain.activity import Activity, collect_activity
from saexplain.captions import caption
from saexplain.hypotheses import PARTS, Effect, Hypothesis, Rule
from saexplain.statistics import Detection


class World(NamedTuple):
    layer: fa.ExplainedLayer
    hypotheses: list[Hypothesis]
    test: fa.Activations
    activity: Activity
    evaluation: ev.Evaluation


@pytest.fixture(scope="module")
def world():
    table = stroke_table(0)
    layer = plant(table)
    val, test, again = (layer.activations(*draw_labelled(table, seed)) for seed in range(3))
    hypotheses = hy.propose_hypotheses(layer, val)
    activity = collect_activity(layer, test.raw, test.labels)
    evidence = ev.evaluate_hypotheses(hypotheses, layer, test)
    repeated = ev.evaluate_hypotheses(hypotheses, layer, again, seed=1)
    scores = ev.score_hypotheses(hypotheses, test.images, test.labels)
    found = ev.discriminate(evidence, scores, layer, activity)
    evaluation = ev.make_evaluation(hypotheses, Rule(), evidence, repeated, activity, found)
    return World(layer, hypotheses, test, activity, evaluation)


# --- Evidence -------------------------------------------------------------------------------------


def test_the_two_halves_of_the_test_images_do_not_overlap():
    test = fa.Activations(torch.arange(5), torch.arange(5) * 10, torch.arange(5) * 100)
    found = [[v.tolist() for v in half] for half in ev.split_test_images(test)]
    assert found == [[[0, 2, 4], [0, 20, 40], [0, 200, 400]], [[1, 3], [10, 30], [100, 300]]]


def test_a_feature_is_tested_alike_whichever_others_are_tested(world):
    """Influence, too: it is a share of the effects of all features, not of those tested."""
    layer, some, test, evidence = world.layer, world.hypotheses, world.test, []
    before, state = [v.clone() for v in test], torch.random.get_rng_state()
    for part in (some[7:], some[:7][::-1]):
        evidence += ev.evaluate_hypotheses(part, layer, test)
    expected = world.evaluation.evidence
    assert evidence == [*expected[7:], *expected[:7][::-1]]
    assert sum(e.influence for e in expected) == pytest.approx(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, test))


def test_detection_and_selection_are_scikit_learns(world):
    places = place_inks(world.test.images)
    for h, e in zip(world.hypotheses, world.evaluation.evidence, strict=True):
        active = world.activity.is_active(h.feature)
        scores = hy.part_scores(h, word_inks(places), world.test.labels)
        assert set(e.detected) == set(scores)
        pairs = [(e.detected[part], values) for part, values in scores.items()]
        for d, values in [*pairs, (e.drawn, hy.drawing_score(h, places, world.test.labels))]:
            auroc = sklearn.metrics.roc_auc_score(active, values)
            precision = sklearn.metrics.average_precision_score(active, values)
            assert (d.auroc, d.average_precision) == pytest.approx((auroc, precision), abs=1e-9)
            assert d.auroc_low < d.auroc < d.auroc_high or d.auroc == 1
        predicted = scores["both"] >= h.threshold
        assert e.selected == (predicted.sum(), active.sum(), (predicted & active).sum())
        assert e.selected.precision == sklearn.metrics.precision_score(active, predicted)
        assert e.selected.recall == sklearn.metrics.recall_score(active, predicted)


def test_an_image_whose_score_equals_the_threshold_is_selected():
    scores = np.array([0.2, 0.5, 0.5, 0.7], np.float32)
    activity = activity_of([[1.0], [1.0], [0.0], [1.0]])
    found = ev._select_images(blank(threshold=0.5), {"both": scores}, activity)
    assert found == ev.Selection(n=3, active=3, both=2)


def test_features_that_are_hardly_active_are_not_tested(world):
    some = world.activity.of(0)[0][:5]  # images that activate feature 0
    images = torch.cat([world.test.images[some], torch.zeros(50, 1, 28, 28)])
    split = world.layer.activations(images, torch.zeros(55, dtype=torch.int64))
    first, activity = world.hypotheses[:1], collect_activity(world.layer, split.raw, split.labels)
    (e,) = ev.evaluate_hypotheses(first, world.layer, split)
    assert (e.n_active, e.testable, e.detected, e.edits, e.selected) == (5, False, {}, {}, None)
    evaluation = ev.make_evaluation(first, Rule(), [e], [e], activity, {})
    (decision,), shares = evaluation.decisions, evaluation.result.shares
    assert (decision.outcome, decision.confidence) == (ev.INCONCLUSIVE, "Low")
    assert (shares.features, shares.too_rare, shares.explained) == (0, 1, 0.0)
    assert (shares.median_auroc, shares.drawn, shares.over_nearest) == (None, None, None)
    json.dumps([text.evaluated_record(0, evaluation), shares._asdict()], allow_nan=False)
    text.feature_lines(0, evaluation, None)
    (e,) = ev.evaluate_hypotheses(first, world.layer, split, rule=Rule(min_active=5))
    assert e.testable


def test_errors_of_evaluation(world):
    h, layer, test = world.hypotheses[0], world.layer, world.test
    inverted = layer.activations(2 * test.images - 1, test.labels)
    for given in (h, blank(drawing=h.drawing)):
        with pytest.raises(ValueError, match="images"):
            ev.evaluate_hypotheses([given], layer, inverted)
    few = fa.Activations(*(v[:5] for v in test))
    with pytest.raises(ValueError, match="activity"):
        ev.evaluate_hypotheses([h], layer, few, world.activity)


# --- Effects --------------------------------------------------------------------------------------

HEAD = torch.tensor([[2.0, -1.9, 0.1], [0.0, 3.0, 0.2], [1.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
STD, ACTS = torch.tensor([0.5, 0.1, 0.1, 0.2]), torch.linspace(1, 3, 40)
RAW = torch.randn(45, 4, generator=torch.Generator().manual_seed(0))


def effect_of(effect, direction=(1.0, 0.0, 0.0, 0.0), rule=None) -> ev.EffectTest:
    """Of a feature that is active on the first 40 images, 2 on average."""
    n = len(ACTS)
    sae = SimpleNamespace(W_enc=torch.zeros(4, 1), W_dec=torch.tensor([direction]))
    model = SimpleNamespace(logits_from_preactivations=lambda z: z @ HEAD)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(4), STD)
    labels = torch.zeros(len(RAW), dtype=torch.int64)
    activity = Activity(torch.tensor([0, n]), torch.arange(n), ACTS, labels)
    h = blank(0, effect=effect, typical_activation=2.0)
    return ev.effect_test(h, layer, RAW, activity, rule)


def test_effects_by_closed_form():
    """A linear head: a change per unit is the same at every dose, the linear prediction exact."""
    test = effect_of(Effect(0, 4.0, 1, 6.0))
    assert test.raised_by == pytest.approx(2 * 0.5 * 2.0)  # mean activation, std, head weight
    assert test.lowered_by == pytest.approx(2 * 0.5 * 1.9)
    assert test.ratio == pytest.approx(1.9 / 3.0)  # 2.0 / 2.0 is more: the smaller counts
    std = np.linspace(1, 3, 40).std(ddof=1) / 2 * test.ratio
    assert test.ratio_error == pytest.approx(std / math.sqrt(40), rel=1e-4)
    assert test.dose_raises == pytest.approx([0, 1, 2, 4], abs=1e-5)
    assert test.dose_lowers == pytest.approx([0, -0.95, -1.9, -3.8], abs=1e-5)
    assert test.linear_raises == pytest.approx(test.dose_raises, abs=1e-3)
    assert test.linear_lowers == pytest.approx(test.dose_lowers, abs=1e-3)
    assert (test.n, test.exceeding, test.dose_follows) == (40, 40, True)
    assert test.p == pytest.approx(2.0**-40)
    alone = effect_of(Effect(None, 0.0, 1, 3.0), rule=Rule(effect_size=0.8))
    assert (alone.raised_by, alone.dose_raises, alone.linear_raises) == (None, None, None)
    assert alone.ratio == pytest.approx(1.9 / 2.4)
    assert alone.dose_lowers == test.dose_lowers


# --- Decisions ------------------------------------------------------------------------------------

INK = {"ink": Strokes((Word("dot", False, 2, 2),))}
LABELS = {"enriched": (1,), "label_scores": (0.0, 1.0)}
NEVER = ev.EditTest(48, 0, 0, 0, 0)


def evidence_of(feature: int = 0, **parts) -> ev.Evidence:
    nothing = (50, 1000, True, (0, 40, 10), 0.25, 0.1, {}, {}, {})
    return ev.Evidence(feature, *nothing)._replace(**parts)


def detection(auroc: float, low: float, high: float, p: float, *parts: str) -> dict:
    return {part: Detection(auroc, low, high, 0.5, p) for part in parts}


def decided(parts: dict, rule: Rule | None = None, **measured) -> ev.Decision:
    return ev.decide_hypotheses([blank(0, **parts)], [evidence_of(**measured)], rule)[0]


@pytest.mark.parametrize(
    ("measured", "outcome", "confidence"),
    [
        ((0.95, 0.9, 0.97, 1e-6), ev.CONFIRMED, "High"),
        ((0.95, 0.8, 0.97, 1e-6), ev.CONFIRMED, "Medium"),  # reaches below 0.85, the bar for both
        ((0.95, 0.49, 0.99, 1e-6), ev.INCONCLUSIVE, "Low"),  # the interval does not leave out 0.5
        ((0.95, 0.9, 0.97, 0.5), ev.INCONCLUSIVE, "Low"),  # not significant
        ((0.84, 0.8, 0.9, 1e-6), ev.INCONCLUSIVE, "Medium"),  # the ink part alone is confirmed
        ((0.8, 0.76, 0.84, 1e-6), ev.REFUTED, "Low"),  # the whole is below its bar
    ],
)
def test_decisions_on_detection(measured, outcome, confidence):
    found = decided(INK, detected=detection(*measured, "ink", "both"))
    assert (found.outcome, found.confidence) == (outcome, confidence)
    assert found.explained == (outcome == ev.CONFIRMED)
    found = decided(LABELS, detected=detection(*measured, "class", "both"))
    assert (found.outcome, found.explained) == (outcome, False)  # only ink explains
    assert found.confidence == confidence.replace("High", "Medium")


def no_effect(n_active: int, changes: float) -> dict:
    return {"claims_no_effect": True, "n_active": n_active, "changes": changes}


@pytest.mark.parametrize(
    ("measured", "outcome", "confidence"),
    [
        ({"edits": {"erasing": paired(0, 40, 0, 8)}}, ev.CONFIRMED, "High"),
        ({"edits": {"erasing": paired(0, 16, 0, 32)}}, ev.CONFIRMED, "Medium"),  # may be below 0.25
        ({"edits": {"filling": paired(0, 0, 0, 48)}}, ev.REFUTED, "Low"),
        ({"edits": {"filling": paired(10, 8, 2, 28)}}, ev.INCONCLUSIVE, "Low"),  # less than 0.25
        ({"edits": {"erasing": paired(0, 2, 0, 4)}}, ev.INCONCLUSIVE, "Low"),  # may be 0
        (no_effect(1000, 0.03), ev.CONFIRMED, "High"),  # Wilson: 2.1% to 4.2%
        (no_effect(1000, 0.045), ev.CONFIRMED, "Medium"),  # 3.4% to 6.0%
        (no_effect(1000, 0.055), ev.INCONCLUSIVE, "Medium"),  # 4.3% to 7.1%
        (no_effect(1000, 0.07), ev.REFUTED, "Low"),  # 5.6% to 8.8%
        (no_effect(34, 0.0), ev.CONFIRMED, "Medium"),  # 0% to 10%: too few images to be sure
    ],
)
def test_decisions_on_edits_and_on_little_effect(measured, outcome, confidence):
    rule = Rule(false_discovery_rate=0.3)  # significance is not asked for here
    detected = detection(0.95, 0.9, 0.97, 1e-6, "ink", "both")
    found = decided(INK, rule, detected=detected, **measured)
    assert (found.outcome, found.confidence) == (outcome, confidence)


def test_decisions_on_effects():
    effect = Effect(0, 1.0, 1, 1.0)
    follows, ignored = effect_of(effect), effect_of(effect, (0.0, 0.0, 0.0, 1.0))
    assert (ignored.raised_by, ignored.exceeding, ignored.p) == (0.0, 0, 1.0)
    for test, outcome in (
        (follows, ev.CONFIRMED),
        (follows._replace(dose_raises=(0.0, 1.0, 2.0, 1.0)), ev.INCONCLUSIVE),
        (follows._replace(ratio=0.9, ratio_error=0.02), ev.REFUTED),  # 0.9 + 1.96 x 0.02 < 1
        (follows._replace(ratio=0.9, ratio_error=0.2), ev.INCONCLUSIVE),
        (ignored, ev.REFUTED),
    ):
        found = decided({"effect": effect}, effect=test)
        assert (found.outcome, found.explained) == (outcome, False)
    found = decided({})
    assert (found.outcome, found.confidence, found.explained) == (ev.NONE, "Low", False)


@pytest.mark.parametrize(("p", "outcome"), [(0.0024, ev.CONFIRMED), (0.003, ev.INCONCLUSIVE)])
@pytest.mark.parametrize(("part", "parts"), [("ink", INK), ("class", LABELS)])
def test_p_values_are_corrected_over_all_features(part, parts, p, outcome):
    """Four of them, the least of which must be below 0.01 / 4: "both" counts for two parts only."""
    first = evidence_of(detected=detection(0.95, 0.9, 0.99, p, part, "both"))
    second = evidence_of(1, detected=detection(0.95, 0.9, 0.99, 0.9, "ink", "class", "both"))
    some = [blank(0, **parts), blank(1, **INK, **LABELS)]
    one, other = ev.decide_hypotheses(some, [first, second])
    assert one.outcome == outcome
    assert other.tests == dict.fromkeys(("ink", "class", "both"), ev.INCONCLUSIVE)


def test_replication_asks_for_values_not_for_significance():
    good = evidence_of(detected=detection(0.86, 0.4, 0.9, 0.9, "ink", "both"))
    edits = {"erasing": paired(0, 13, 0, 35)}
    assert ev.clears_bars(good) is True
    assert ev.clears_bars(good, Rule(both_auroc=0.87)) is False
    assert ev.clears_bars(good._replace(edits=edits)) is True
    assert ev.clears_bars(good._replace(edits={**edits, "painting": NEVER})) is False
    assert ev.clears_bars(evidence_of()) is None


# --- Discrimination -------------------------------------------------------------------------------


def discrimination_world():
    """14 features, two of which are too rare, the last one dead. Most scores follow a feature four
    ranks of density further up or down, and half as much their own."""
    rng = np.random.default_rng(0)
    shared, rates = rng.random(300), rng.uniform(0.05, 0.5, 14)
    active = (0.6 * rng.random((14, 300)) + 0.4 * shared) < np.quantile(shared, rates)[:, None]
    active[11], active[12], active[13] = active[10], np.arange(300) < 3, False
    ranked, scores = active[:12].sum(1).argsort(kind="stable"), {4: {}}
    for place, k in enumerate(ranked.tolist()):
        about = active[ranked[(place + (0, 4, -4)[place % 3]) % 12]]
        if k != 4:
            noise = rng.normal(size=300) / 4
            scores[k] = {"both": (active[k] + 2.0 * about + noise).round(1).astype(np.float32)}
    decoder = rng.normal(size=(14, 5)).astype(np.float32)
    decoder[13] = decoder[1] + 0.01  # the dead one is nearest to feature 1
    return active, scores, decoder


def discriminated_by_hand(k: int, active, scores, decoder) -> tuple:
    if k == 4:
        return False, False, False
    ranked = sorted(range(12), key=lambda c: (active[c].sum(), c))
    first = min(max(0, ranked.index(k) - 4), 4)
    alive = [c for c in range(14) if active[c].any()]
    auroc = {c: sklearn.metrics.roc_auc_score(active[c], scores[k]["both"]) for c in alive}
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    near = max({*range(14)} - {k}, key=lambda c: unit[c] @ unit[k])
    coactive = max({*alive} - {k}, key=lambda c: np.corrcoef(active[k], active[c])[0, 1])
    eight = all(auroc[k] > auroc[c] for c in ranked[first : first + 8] if c != k)
    return eight, *(auroc[k] > auroc[c] if c in auroc else None for c in (near, coactive))


def test_discrimination_by_brute_force():
    active, scores, decoder = discrimination_world()
    W_dec, counts = torch.from_numpy(decoder), active.sum(1).tolist()
    sae = SimpleNamespace(W_enc=W_dec.T, W_dec=W_dec)
    layer = fa.ExplainedLayer(None, sae, torch.zeros(5), torch.ones(5))
    known = [{"n_active": n, "testable": k < 12, "n_images": 300} for k, n in enumerate(counts)]
    evidence = [evidence_of(k, **some) for k, some in enumerate(known)]
    activity = activity_of(active.T.astype(np.float32).tolist())
    found = ev.discriminate(evidence, scores, layer, activity)
    expected = {k: discriminated_by_hand(k, active, scores, decoder) for k in range(12)}
    assert found == expected
    assert found[1].over_nearest is None
    for field in ev.Discrimination._fields:
        assert {True, False} <= {getattr(d, field) for d in found.values()}


# --- Summaries and words --------------------------------------------------------------------------


def five_features():
    """Evidence, decisions, discrimination and replication: one High, one Medium, two Low, of which
    one predicts nothing, and one that is too rare."""
    evidence, decisions = [], []
    rows = [  # n_active, AUROC, selected and active, of the drawing, influence, confidence, parts
        (2, 0.95, 9, 0.9, 0.5, "High", (ev.CONFIRMED, ev.CONFIRMED, ev.CONFIRMED)),
        (10, 0.85, 5, 0.7, 0.2, "Medium", (ev.CONFIRMED, ev.NONE, ev.NONE)),
        (20, 0.8, 2, 0.8, 0.1, "Low", (ev.CONFIRMED, ev.NONE, ev.REFUTED)),
        (500, None, None, None, 0.05, "Low", (ev.NONE, ev.NONE, ev.NONE)),
        (1, None, None, None, 0.15, "Low", (ev.INCONCLUSIVE, ev.NONE, ev.NONE)),
    ]
    for k, (n_active, auroc, right, drawn, influence, confidence, outcomes) in enumerate(rows):
        e = evidence_of(k, n_active=n_active, influence=influence, testable=k < 4)
        if auroc:
            found = detection(auroc, 0.5, 1.0, 0.1, "both"), ev.Selection(10, 20, right)
            drawing = Detection(drawn, 0.5, 1.0, 0.5, 0.1)
            e = e._replace(detected=found[0], selected=found[1], drawn=drawing)
        evidence.append(e)
        parts, whole = dict(zip(PARTS, outcomes, strict=True)), ev.NONE if k == 3 else ev.REFUTED
        decisions.append(ev.Decision(k, {}, parts, whole, confidence, confidence != "Low"))
    found = [(True, True, None), (True, True, False), (False, False, None), (False,) * 3]
    found = {k: ev.Discrimination(*some) for k, some in enumerate(found)}
    return evidence, decisions, found, [True, False, True, None, None]


def test_shares_by_hand(world):
    shares, aurocs = ev.comparison_of(*five_features(), Rule())
    assert (shares.features, shares.too_rare, shares.explained) == (4, 1, 0.5)
    interval = scipy.stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert shares[3:5] == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert shares[5:8] == (0.75, 0.25, 0.25)  # ink, class and effect are confirmed
    assert (shares.predicted, shares.drawn) == (0.5, 0.25)
    assert (shares.median_auroc, shares.average_precision, aurocs[3:]) == (0.85, 0.5, [0.0])
    assert (shares.median_precision, shares.median_recall) == (0.5, 0.25)
    assert (shares.among_eight, shares.over_nearest, shares.over_coactive) == (0.5, 0.5, 0.0)
    assert shares[-5:-2] == (0.7, 0.5, 0.015)  # influence explained, High; median density
    edges, counts, explained = zip(*(band.values() for band in shares.bands), strict=True)
    assert edges == (0.003, 0.01, 0.03, 1.0)
    assert (counts, explained) == ((1, 1, 1, 1), (1, 1, 0, 0))  # an edge belongs to its band
    counts = {name: tuple(counts.values()) for name, counts in shares.confidence.items()}
    assert counts == {"High": (1, 1, 1), "Medium": (1, 1, 0), "Low": (2, 1, 1), "all": (4, 3, 2)}
    even = world.evaluation._replace(evidence=[evidence_of(influence=0.1)] * 10)
    assert ev.features_of_influence(even) == {"50%": 5, "90%": 9, "99%": 10}
    nothing = ev.comparison_of([], [], {}, [], Rule()).shares
    assert (nothing.features, nothing.explained, nothing.drawn) == (0, 0, None)


def test_records_and_markdown(world):
    evaluation, other = world.evaluation, ev.comparison_of(*five_features(), Rule())
    record = ev.evaluation_record(evaluation, {"neurons": other}, "abc")
    assert [*record["shares"]] == ["SAE", "neurons"]
    words = [caption(h).count(" ") + 1 for h in evaluation.hypotheses if any(h.ink)]
    assert record["median_words"] == np.median(words)
    assert "of the best baseline (neurons) 50%" in text.headline(record)
    rows = text.shares_rows(record)
    assert {len(row) for row in rows} == {3}
    assert [row[2] for row in rows[:5]] == ["neurons", "4", "1", "50%", "15% to 85%"]
    found = text.evaluated_record(5, evaluation)
    e = evaluation.evidence[5]
    erasing = e.edits["erasing"]
    assert found["evidence"]["edits"]["erasing"] == erasing._asdict() | {"p": erasing.p}
    assert found["evidence"]["selected"]["recall"] == e.selected.both / e.selected.active
    assert found["evidence"]["edited_images"]["inactive"] == evaluation.edited[5][1]
    at, acts = world.activity.of(5)
    assert evaluation.top_images[5][0] == 2 * int(at[acts.argmax()])
    assert set(evaluation.edited[5][0]) <= set((2 * at).tolist())
    assert not set(evaluation.edited[5][1]) & set((2 * at).tolist())
    json.dumps(found, allow_nan=False)
    page = text.hypotheses_markdown(evaluation, record, "a title", {4: "reproducible"})
    how, sections = page.split("## Feature by feature, the most influential first")
    assert "`abc`" in how
    assert "{" not in how
    order = sorted(range(15), key=lambda k: -evaluation.hypotheses[k].influence)
    titles = [line for line in sections.splitlines() if line.startswith("### ")]
    assert titles == [f"### Feature {k}: {caption(evaluation.hypotheses[k])}" for k in order]
    assert sections.count("reproducible") == 1
