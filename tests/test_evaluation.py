"""Evidence, decisions and summaries: against scikit-learn, closed forms and models by hand."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from planted import SIDE, drawing, paired, planted_world

import feature_analysis as fa
from saexplain import evaluation as ev
from saexplain import text
from saexplain.activity import Activity, collect_activity
from saexplain.edits import EditTest, edit_tests
from saexplain.evaluation import CONFIRMED, INCONCLUSIVE, REFUTED
from saexplain.hypotheses import Rule
from saexplain.statistics import Detection, wilson_interval


@pytest.fixture(scope="module")
def world():
    return planted_world()


@pytest.fixture(scope="module")
def activity(world):
    return collect_activity(world.layer, world.test.raw, world.test.labels)


@pytest.fixture(scope="module")
def evidence(world):
    return ev.collect_evidence(world.hypotheses, world.layer, world.test, world.discovery.canvas)


# --- Evidence -------------------------------------------------------------------------------------


def test_the_two_halves_of_the_test_images_do_not_overlap():
    test = fa.Activations(torch.arange(5), torch.arange(5) * 10, torch.arange(5) * 100)
    found = [[v.tolist() for v in half] for half in ev.split_test_images(test)]
    assert found == [[[0, 2, 4], [0, 20, 40], [0, 200, 400]], [[1, 3], [10, 30], [100, 300]]]


def test_evidence_is_scikit_learns(world, evidence):
    levels = (255 * world.test.images).round().flatten(1).long()
    z = world.layer.standardize(world.test.raw)
    acts = world.layer.sae.encode(z).numpy()
    labels = world.test.labels.numpy()
    for h, e in zip(world.hypotheses, evidence, strict=True):
        active = acts[:, h.feature] > 0
        scores = (levels @ torch.from_numpy(h.weights).flatten().long()).numpy()
        predicted = scores >= h.threshold
        assert e.picked == (predicted.sum(), active.sum(), (predicted & active).sum())
        assert e.picked.precision == sklearn.metrics.precision_score(active, predicted)
        assert e.picked.recall == sklearn.metrics.recall_score(active, predicted)
        assert e.f1 == e.picked.f1 == sklearn.metrics.f1_score(active, predicted)
        assert e.chance_f1 == pytest.approx(sklearn.metrics.f1_score(active, active | True))
        d = e.detection
        assert d.auroc == pytest.approx(sklearn.metrics.roc_auc_score(active, scores), abs=1e-12)
        precision = sklearn.metrics.average_precision_score(active, scores)
        assert d.average_precision == pytest.approx(precision, abs=1e-12)
        pre = (z @ world.layer.sae.W_enc)[:, h.feature]
        assert e.correlation == pytest.approx(np.corrcoef(scores, pre)[0, 1], abs=1e-5)
        (c,) = h.classes
        count = int((labels[active] == c).sum())
        expected = count / active.sum(), *wilson_interval(count, active.sum()), (labels == c).mean()
        assert e.classes == pytest.approx(expected)
        assert e.label_histogram == tuple(np.bincount(labels[active], minlength=6))
    assert sum(e.influence for e in evidence) == pytest.approx(1)


def test_a_feature_is_tested_alike_whichever_others_are_tested(world, evidence, activity):
    canvas, rng = world.discovery.canvas, torch.random.get_rng_state()
    before, some, found = [v.clone() for v in world.test], world.hypotheses, []
    for part in (some[7:], some[:7][::-1]):
        found += ev.collect_evidence(part, world.layer, world.test, canvas)
    assert found == [*evidence[7:], *evidence[:7][::-1]]
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(map(torch.equal, before, world.test))
    drawn = ev.prepare_drawings(some, canvas)
    given = (some, world.layer, world.test, canvas)
    short = ev.collect_evidence(*given, activity=activity, drawn=drawn, in_full=False)
    removed = dict.fromkeys(("detection", "correlation", "classes", "influence", "changes"))
    removed["effects"] = {}
    assert short == [e._replace(**removed) for e in evidence]
    h = some[3]
    images = world.test.images
    assert evidence[3].edits == edit_tests(h, world.layer, images, activity, canvas)


def test_an_image_whose_score_equals_the_threshold_is_picked(world):
    weights = np.zeros((SIDE, SIDE), int)
    weights[0, 0] = 1  # a pixel that is always blank: all scores are 0
    for threshold, n in ((0, len(world.test.labels)), (1, 0)):
        given = ([drawing(0, weights, threshold=threshold)], world.layer, world.test)
        (e,) = ev.collect_evidence(*given, world.discovery.canvas)
        assert (e.picked.n, e.picked.precision) == (n, pytest.approx(e.n_active / 2400 * (n > 0)))
        assert (e.detection.auroc, e.correlation) == (0.5, 0)


@pytest.mark.parametrize(("n", "is_testable"), [(7, False), (8, True)])
def test_features_that_are_hardly_active_are_not_tested(world, activity, n, is_testable):
    some = activity.of(0)[0][:n]  # images that activate feature 0
    images = torch.cat([world.test.images[some], torch.zeros(50, 1, SIDE, SIDE)])
    labels = torch.cat([world.test.labels[some], torch.zeros(50, dtype=torch.int64)])
    split = world.layer.activations(images, labels)
    (e,) = ev.collect_evidence(world.hypotheses[:1], world.layer, split, world.discovery.canvas)
    assert (e.n_active, e.is_testable, e.f1 is not None) == (n, is_testable, is_testable)
    assert bool(e.picked and e.detection and e.edits and e.classes) == is_testable
    row = ev.Row.of(e, e, Rule())
    if not is_testable:
        assert (row.decision.confidence, row.decision.results, row.replicated) == ("Low", {}, None)
        summary = ev.summarize([row], 4.5, 0.5, 0.25)
        assert (summary.features, summary.too_rare, summary.f1_mean) == (0, 1, None)
        assert (summary.edits["erasing"], summary.median_rate) == (None, None)
        json.dumps(summary._asdict(), allow_nan=False)


def test_hypotheses_without_a_drawing_are_tested_by_what_else_they_say(world, evidence):
    h = drawing(1, np.zeros((SIDE, SIDE)), classes=(1,), raises=1)
    (e,) = ev.collect_evidence([h], world.layer, world.test, world.discovery.canvas)
    assert (e.picked, e.edits, e.f1) == (None, {}, 0.0)
    assert e.classes == evidence[1].classes
    assert e.effects == {"raises": evidence[1].effects["raises"]}
    assert ev.decide(e).confidence == "Low"


# --- The public function --------------------------------------------------------------------------


def test_several_hypotheses_about_one_feature_get_their_evidence(world, evidence):
    own, shifted = world.hypotheses[4], np.roll(world.hypotheses[4].weights, 3, 1)
    some = [own, drawing(4, own.weights, classes=own.classes), drawing(4, shifted, threshold=1)]
    found = ev.evaluate_hypotheses([*some, world.hypotheses[9]], world.layer, *world.test[:2])
    assert [e.feature for e in found] == [4, 4, 4, 9]
    # The missing threshold is the best one on validation images, the machine's.
    assert found[1] == evidence[4]._replace(effects={})
    assert (found[0], found[3]) == (evidence[4], evidence[9])
    assert found[2].f1 < 0.5 < evidence[4].f1


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, r"feature 2 must have shape \(28, 28\), got \(4, 4\)", (2, np.eye(4))),
        (IndexError, "feature 15 does not exist", (15, np.eye(SIDE))),
        (ValueError, "feature 1: classes and logits are 0 to 5, got 6", (1, np.eye(SIDE), (6,))),
    ],
)
def test_hypotheses_that_do_not_fit_are_errors(world, error, message, given):
    h = drawing(*given[:2], classes=given[2] if len(given) > 2 else ())
    with pytest.raises(error, match=message):
        ev.evaluate_hypotheses([h], world.layer, *world.test[:2])


def test_errors_of_evidence(world, activity):
    canvas, h = world.discovery.canvas, world.hypotheses[0]
    with pytest.raises(ValueError, match="must have a threshold"):
        ev.collect_evidence([drawing(0, h.weights)], world.layer, world.test, canvas)
    few = fa.Activations(*(v[:5] for v in world.test))
    with pytest.raises(ValueError, match="activity"):
        ev.collect_evidence([h], world.layer, few, canvas, activity=activity)
    small = world.test._replace(images=world.test.images[:, :, :20])
    with pytest.raises(ValueError, match="canvas's shape"):
        ev.collect_evidence([h], world.layer, small, canvas)


# --- Effects --------------------------------------------------------------------------------------

HEAD = torch.tensor([[2.0, -1.9, 0.1], [0.0, 3.0, 0.2], [1.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
STD, ACTS = torch.tensor([0.5, 0.1, 0.1, 0.2]), torch.linspace(1, 3, 40)
RAW = torch.randn(45, 4, generator=torch.Generator().manual_seed(0))


def effects_of(head=lambda z: z @ HEAD, raw=RAW, **named) -> dict[str, ev.LogitChange]:
    """Of a feature that moves the first unit, active on the first 40 images, 2 on average."""
    sae = SimpleNamespace(W_enc=torch.zeros(4, 1), W_dec=torch.eye(4)[:1])
    layer = fa.ExplainedLayer(SimpleNamespace(logits_from_preactivations=head), sae, STD * 0, STD)
    labels = torch.zeros(len(RAW), dtype=torch.int64)
    activity = Activity(
        torch.tensor([0, 40]), torch.arange(40), ACTS, labels, torch.zeros(40, dtype=int)
    )
    return ev.measure_effects(drawing(0, [[1]], **named), layer, raw, activity, 0.95)


def test_effects_by_closed_form():
    """A linear head: a change per unit is the same at every dose, the linear prediction exact."""
    found = effects_of(raises=0, lowers=1)
    for verb, weight in (("raises", 2.0), ("lowers", -1.9)):
        c = found[verb]
        lost = ACTS.double() * 0.5 * abs(weight)  # activation, std, weight of the head
        reach = 1.959964 * float(lost.std()) / math.sqrt(40)
        expected = [float(lost.mean()), float(lost.mean()) - reach, float(lost.mean()) + reach]
        assert [c.by, c.low, c.high] == pytest.approx(expected, rel=1e-4)
        assert c.at_doses == pytest.approx([0, weight / 2, weight, 2 * weight], abs=1e-4)
        assert c.linear == pytest.approx(c.at_doses, abs=1e-3)
    assert (found["raises"].logit, found["lowers"].logit) == (0, 1)
    alone = effects_of(lowers=1)
    assert alone == {"lowers": found["lowers"]}
    assert effects_of() == {}


def test_the_linear_prediction_is_the_slope_without_the_feature():
    raw = torch.zeros(45, 4)
    raw[:40, 0] = 0.5 * ACTS  # without it the first unit is 0
    c = effects_of(lambda z: (z + z**2)[:, :2], raw, raises=0)["raises"]
    doses = 0.5 * 2.0 * np.array(ev.DOSES)  # in units of the raw output
    assert c.at_doses == pytest.approx(doses + doses**2, abs=1e-4)
    assert c.linear == pytest.approx(doses * (1 + 1 / 64), abs=1e-3)


# --- Decisions ------------------------------------------------------------------------------------

ALL, NONE, SOME = EditTest(32, 32, 0, 32, 0), EditTest(32, 0, 0, 0, 0), EditTest(32, 8, 2, 6, 0)


def evidence_of(f1: float = 0.8, n_active: int = 50, **parts) -> ev.Evidence:
    """Of 1,000 images, n_active of them active; as many are picked, with this F1."""
    picked = ev.Picked(n_active, n_active, round(f1 * n_active))
    given = {"picked": picked, "edits": {"erasing": ALL, "painting": ALL}, **parts}
    return ev.Evidence(0, n_active, 1000, (0, 40, 10), 0.25, 0.1)._replace(**given)


@pytest.mark.parametrize(
    ("parts", "confidence"),
    [
        ({"f1": 0.6}, "High"),
        ({"f1": 0.58}, "Medium"),
        ({"f1": 0.3}, "Medium"),
        ({"f1": 0.28}, "Low"),
        ({"f1": 0.8, "n_active": 400}, "Medium"),  # every image: 0.57
        ({"f1": 0.825, "n_active": 400}, "High"),
        ({"f1": 0.7, "n_active": 400}, "Low"),
        ({"edits": {"erasing": ALL, "filling": SOME, "painting": ALL}}, "Medium"),
        ({"edits": {"erasing": NONE, "painting": ALL}}, "Medium"),
        ({"edits": {"erasing": SOME, "painting": NONE}}, "Low"),
        ({"edits": {"painting": ALL}}, "High"),
        ({"edits": {}}, "Low"),
        ({"picked": None}, "Low"),
        ({"classes": ev.ClassTest(0.1, 0.05, 0.15, 0.1)}, "High"),  # decides nothing
    ],
)
def test_confidence(parts, confidence):
    assert ev.decide(evidence_of(**parts)).confidence == confidence


@pytest.mark.parametrize(
    ("edit", "result"),
    [
        (paired(0, 32, 0, 0), CONFIRMED),
        (paired(0, 8, 0, 24), CONFIRMED),  # 0.25, the bar; from 0.10 on
        (paired(20, 8, 0, 4), CONFIRMED),  # on 20 images the edit elsewhere does the same
        (paired(0, 7, 0, 25), INCONCLUSIVE),
        (paired(0, 2, 0, 4), INCONCLUSIVE),  # 0.33; too few images
        (paired(0, 0, 0, 32), REFUTED),
        (paired(0, 0, 20, 12), REFUTED),
    ],
)
def test_results_of_edits(edit, result):
    assert ev.decide(evidence_of(edits={"erasing": edit})).results == {"erasing": result}


def test_results_of_classes_and_logits():
    for share, low, high, usual, result in (
        (0.31, 0.25, 0.35, 0.2, CONFIRMED),
        (0.31, 0.19, 0.4, 0.2, INCONCLUSIVE),
        (0.25, 0.22, 0.31, 0.2, INCONCLUSIVE),
        (0.25, 0.22, 0.29, 0.2, REFUTED),
    ):
        found = ev.decide(evidence_of(classes=ev.ClassTest(share, low, high, usual)))
        assert found.results["classes"] == result
    for by, low, high, result in (
        (0.3, 0.21, 0.4, CONFIRMED),
        (0.3, 0.19, 0.4, INCONCLUSIVE),
        (0.1, 0.0, 0.19, REFUTED),
    ):
        change = ev.LogitChange(4, by, low, high, 0.2, (), ())
        found = ev.decide(evidence_of(effects={"raises": change, "lowers": change}))
        assert found.results["raises"] == found.results["lowers"] == result


def test_the_rule_can_be_another_and_is_given_in_numbers():
    strict = Rule(high_f1=0.9, medium_lift=0.73, edit_difference=0.5)
    assert ev.decide(evidence_of(f1=0.8), strict).confidence == "Low"
    assert ev.decide(evidence_of(f1=0.86), strict).confidence == "Medium"
    for rule in (Rule(), strict):
        words = ev.format_rule(rule)
        for number in (rule.high_f1, rule.high_lift, rule.medium_f1, rule.medium_lift):
            assert f" {number:g} " in words
        assert f"{rule.edit_difference:.0%}" in words
        assert "\n" not in words


def test_a_hypothesis_is_replicated_by_at_least_the_same_confidence():
    high, medium, low = (evidence_of(f1=f1) for f1 in (0.8, 0.4, 0.1))
    for name, expected in (
        ("High", [True, False, False]),
        ("Medium", [True, True, False]),
        ("Low", [None, None, None]),  # nothing is below it
    ):
        assert [ev.is_replicated(name, again) for again in (high, medium, low)] == expected
    for n_active in (7, 993):
        assert ev.is_replicated("High", evidence_of(n_active=n_active)) is None


# --- Summaries, records, words --------------------------------------------------------------------


def five_rows() -> list[ev.Row]:
    """One High, one Medium, two Low of which one has no drawing, and one that is too rare."""
    ranked = [Detection(auroc, 0.5, 1.0, auroc / 2) for auroc in (0.95, 0.85, 0.8)]
    some = {"erasing": NONE, "painting": ALL}
    first = [
        evidence_of(0.9, 10, influence=0.5, detection=ranked[0], correlation=0.9),
        evidence_of(0.5, 100, influence=0.2, detection=ranked[1], correlation=0.5, edits=some),
        evidence_of(0.2, 20, influence=0.1, detection=ranked[2], correlation=0.1),
        evidence_of(n_active=500, influence=0.05, picked=None, edits={}),
        evidence_of(n_active=7, influence=0.15, picked=None, edits={}),
    ]
    again = [evidence_of(0.5, 10), evidence_of(0.6, 100), evidence_of(0.1, 20)]
    again += [evidence_of(n_active=995), evidence_of(n_active=9)]
    return [ev.Row.of(*both, Rule()) for both in zip(first, again, strict=True)]


def test_summaries_by_hand():
    rows = five_rows()
    assert [row.decision.confidence for row in rows] == ["High", "Medium", "Low", "Low", "Low"]
    s = ev.summarize(rows, 4.5, 0.9, 0.7)
    assert (s.features, s.too_rare, s.agreement, s.agreement_hypotheses) == (4, 1, 0.9, 0.7)
    assert s.f1_mean == pytest.approx((0.9 + 0.5 + 0.2 + 0) / 4)
    assert s.f1_by_influence == pytest.approx((0.45 + 0.1 + 0.02) / 0.85)
    chance = [2 * r / (1 + r) for r in (0.01, 0.1, 0.02, 0.5)]
    assert s.chance_mean == pytest.approx(np.mean(chance))
    assert s.average_precision == pytest.approx((0.475 + 0.425 + 0.4) / 3)
    assert (s.auroc_above, s.correlation) == (pytest.approx(2 / 3), pytest.approx(0.5))
    assert s.edits == {"erasing": pytest.approx(2 / 3), "filling": None, "painting": 1.0}
    assert (s.influence_high, s.influence_medium) == (pytest.approx(0.5), pytest.approx(0.2))
    assert s.median_rate == pytest.approx(0.06)
    bands = [(b["upto"], b["features"], b["f1"]) for b in s.bands]  # an edge belongs to its band
    assert bands == [(0.01, 1, 0.9), (0.03, 1, 0.2), (0.1, 1, 0.5), (1.0, 1, 0.0)]
    counts = {name: tuple(c.values())[:3] for name, c in s.confidence.items()}
    assert counts == {"High": (1, 1, 0), "Medium": (1, 1, 1), "Low": (2, 0, 0), "all": (4, 2, 1)}
    assert s.confidence["Medium"]["f1_again"] == 0.6
    even = [rows[0]._replace(evidence=evidence_of(influence=0.1))] * 10
    made = ev.features_of_influence(SimpleNamespace(rows=even))
    assert made == {"50%": 5, "90%": 9, "99%": 10}
    empty = ev.summarize([], 4.5, 1.0, 1.0)
    assert (empty.features, empty.f1_by_influence) == (0, None)
    assert empty.influence_high == empty.influence_medium == 0
    none = [rows[0]._replace(evidence=evidence_of(influence=0.0))]
    assert ev.features_of_influence(SimpleNamespace(rows=none)) == {}


def test_records_and_markdown(world, evidence, activity):
    halves = ev.split_test_images(world.test)
    given = world.layer, halves[0], world.discovery.canvas
    found = ev.collect_evidence(world.hypotheses, *given)
    own = collect_activity(world.layer, halves[0].raw, halves[0].labels)
    rows = [ev.Row.of(*both, Rule()) for both in zip(found, evidence, strict=True)]
    given = (rows, own, ev.Agreements(0.97, 0.94, 0.305), 2400)
    evaluation = ev.make_evaluation(world.hypotheses, Rule(), *given)
    other = ev.summarize(five_rows(), 4.5, 0.9, 0.7)
    record = ev.evaluation_record(evaluation, {"neurons": other}, "abc")
    assert [*record["summaries"]] == ["SAE", "neurons"]
    assert record["confidence_rule"] == ev.format_rule(Rule())
    json.dumps(record, allow_nan=False)
    assert "94.0% of the predictions are kept" in text.headline(record)
    assert "(neurons: 70.0%)" in text.headline(record)
    rows = text.summary_rows(record)
    assert {len(row) for row in rows} == {3}
    assert [row[2] for row in rows[:6]] == ["neurons", "4", "1", "4.5", "90.0%", "70.0%"]
    entry = text.evaluated_record(5, evaluation)
    json.dumps(entry, allow_nan=False)
    test = found[5].edits["erasing"]
    ends = dict(zip(("difference", "low", "high"), test.difference(), strict=True))
    assert entry["evidence"]["edits"]["erasing"] == test._asdict() | ends
    assert entry["evidence"]["picked"]["recall"] == found[5].picked.both / found[5].picked.active
    at, acts = activity.of(5)  # of all test images
    strongest = [i for i in at[acts.argsort(descending=True)].tolist() if i % 2 == 0][:10]
    assert sorted(entry["evidence"]["test_images"]) == sorted(strongest)
    edited = entry["evidence"]["edited_images"]
    assert set(edited["active"]) <= set(at.tolist())
    assert not set(edited["inactive"]) & set(at.tolist())
    page = text.hypotheses_markdown(evaluation, record, "a title", {4: "reproducible"})
    how, sections = page.split("## Feature by feature, the most influential first")
    assert "`abc`" in how
    assert "30.5% of the predictions are kept" in how
    assert "{" not in how
    order = sorted(range(15), key=lambda k: -found[k].influence)
    titles = [line for line in sections.splitlines() if line.startswith("### ")]
    assert titles == [f"### Feature {k}: {world.hypotheses[k].caption}" for k in order]
    assert sections.count("reproducible") == 1
