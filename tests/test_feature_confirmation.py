"""The trial: statistics against scipy, scikit-learn, plain loops and simulation; the rest against
hand-made models and numbers."""

import itertools
import json
import math
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from small_models import banded_images
from torch import Tensor

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_confirmation as fc
import feature_hypotheses as fh

CASES = list(itertools.product([0, 1, 2], [0.05, 0.3, 0.9], [False, True]))


def draw(seed: int, n: int, share: float, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores, rounded coarsely for ties, and indices of active images, shifted upwards."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    scores = rng.normal(size=n)
    scores[at] += 0.6
    return (scores.round() if ties else scores).astype(np.float32), at


# --- How well scores predict ----------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_statistics_of_ranks_are_scikit_learns_and_scipys(seed, share, ties):
    scores, at = draw(seed, 300, share, ties)
    r, active = fh.ranks_of(scores, at), np.isin(np.arange(300), at)
    expected = sklearn.metrics.average_precision_score(active, scores)
    assert fc.average_precision(r) == pytest.approx(expected, abs=1e-12)
    own, others = scores[at].astype(float), np.delete(scores, at).astype(float)
    expected = scipy.stats.mannwhitneyu(own, others, alternative="greater", method="asymptotic")
    assert fc.rank_sum_p(r) == pytest.approx(expected.pvalue, rel=1e-6)
    ranks = fc.midranks(scores)
    assert (ranks == scipy.stats.rankdata(scores)).all()
    expected = sklearn.metrics.roc_auc_score(active, scores)
    assert fc.auroc_of_ranks(ranks, at) == pytest.approx(expected, abs=1e-12)


def delong_by_hand(scores: np.ndarray, at: np.ndarray) -> float:
    """The definition, pair by pair."""
    own, others = scores[at], np.delete(scores, at)
    wins = np.zeros((len(own), len(others)))
    for i, j in np.ndindex(wins.shape):
        wins[i, j] = (own[i] > others[j]) + 0.5 * (own[i] == others[j])
    v10, v01 = wins.mean(1), wins.mean(0)
    return v10.var(ddof=1) / len(own) + v01.var(ddof=1) / len(others)


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_delong_variance_by_its_definition(seed, share, ties):
    scores, at = draw(seed, 100, share, ties)
    for values in (scores, (scores > 0.5).astype(np.float32)):  # of two values, most pairs tie
        found, _ = fc.delong_variance(fh.ranks_of(values, at))
        assert found == pytest.approx(delong_by_hand(values, at), rel=1e-9)


def test_degrees_of_freedom_are_scipys():
    """Brunner and Munzel's test rests on the same variance, and on Student's t with these."""
    scores, at = draw(0, 80, 0.15, False)
    own, others = scores[at], np.delete(scores, at)
    test = scipy.stats.brunnermunzel(others, own, distribution="t", alternative="less")
    variance, freedom = fc.delong_variance(fh.ranks_of(scores, at))
    t = (fh.ranks_of(scores, at).auroc - 0.5) / math.sqrt(variance)
    assert test.statistic == pytest.approx(t, rel=1e-9)
    assert test.pvalue == pytest.approx(scipy.stats.t.sf(t, freedom), rel=1e-9)


def test_students_quantile_is_scipys():
    freedom = np.array([5.0, 7.0, 12.0, 20.0, 40.0, 100.0])
    expected = scipy.stats.t.ppf(0.975, freedom)
    found = fc.student_near(freedom)
    assert found == pytest.approx(expected, rel=2e-3)
    assert (abs(found - expected) < 2 / freedom**4)[2:].all()  # the first term that is left out
    assert fc.student_near(np.array([np.inf])) == pytest.approx(scipy.stats.norm.ppf(0.975))


@pytest.mark.parametrize(("auroc", "m", "n"), [(0.3, 12, 300), (0.99, 12, 300), (1.0, 8, 4992)])
def test_ends_of_newcombes_interval_solve_its_equation(auroc, m, n):
    low, high = fc.newcombe_interval(*np.array([[auroc], [m], [n]], dtype=float))
    for t in (low[0], high[0]) if auroc < 1 else low:
        q = 1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        squared = fc.NEAR**2 * t * (1 - t) * q / (m * n)
        assert (auroc - t) ** 2 == pytest.approx(squared, abs=1e-9)
    assert 0 < low[0] < auroc <= high[0] + 1e-9 <= 1 + 2e-9
    mirrored = fc.newcombe_interval(*np.array([[1 - auroc], [m], [n]], dtype=float))
    assert [mirrored[0][0], mirrored[1][0]] == pytest.approx([1 - high[0], 1 - low[0]], abs=1e-9)


def test_perfect_rankings_and_equal_scores_have_wide_intervals():
    ramp, ends, equal = np.arange(500.0), (np.arange(490, 500), np.arange(10)), np.zeros(500)
    nearly = np.array([*range(490, 499), 488])
    ranks = [*(fh.ranks_of(ramp, at) for at in (*ends, nearly)), fh.ranks_of(equal, ends[1])]
    assert [fc.delong_variance(r)[0] > 0 for r in ranks] == [False, False, True, False]
    assert fc.rank_sum_p(ranks[3]) == 1.0
    low, high = fc.auroc_interval(ranks)
    assert ((0.05 < high - low)[:2] & (high - low < 0.5)[:2]).all()
    assert low[2] <= low[0]  # a nearly perfect one claims no more than a perfect one
    assert (low[3] < 0.4) & (high[3] > 0.6)


@pytest.mark.parametrize("m", [8, 30, 120])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.99])
def test_coverage_of_auroc_intervals(m, truth):
    """Normal scores; where the AUROC is large, many of the rankings are perfect or nearly so."""
    rng, ranks = np.random.default_rng(0), []
    for _ in range(1000):
        scores = rng.normal(size=m + 300)
        scores[:m] += math.sqrt(2) * scipy.stats.norm.ppf(truth)
        ranks.append(fh.ranks_of(scores.astype(np.float32), np.arange(m)))
    low, high = fc.auroc_interval(ranks)
    assert np.mean((low <= truth) & (truth <= high)) >= 0.92


@pytest.mark.parametrize(("wins", "n"), [(0, 5), (5, 5), (3, 6), (40, 64), (64, 64), (15, 148)])
def test_sign_tests_and_wilsons_intervals_are_scipys(wins, n):
    test = scipy.stats.binomtest(wins, n, 0.5, "greater")
    assert fc.sign_test_p(wins, n - wins) == pytest.approx(test.pvalue, rel=1e-9)
    expected = scipy.stats.binomtest(wins, n).proportion_ci(method="wilson")
    assert fc.wilson_interval(wins, n) == pytest.approx(tuple(expected), abs=1e-6)
    assert fc.sign_test_p(0, 0) == 1.0


def paired(both: int, only_named: int, only_elsewhere: int, neither: int) -> fc.EditTest:
    n = both + only_named + only_elsewhere + neither
    named, elsewhere = both + only_named, both + only_elsewhere
    return fc.EditTest(n, named, elsewhere, only_named, only_elsewhere)


def test_edit_tests_by_hand():
    """Of 161 patients, 59 responded both before and after consolidation, 6 only before, 16 only
    after, 80 never (Cavo et al. 2012): -0.0621 (-0.1186 to -0.0046) in Fagerland, Lydersen & Laake,
    Statistical Analysis of Contingency Tables (2017), chapter 8."""
    found = paired(59, 6, 16, 80).difference()
    assert found == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)
    named, elsewhere = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=bool)
    found = fc.EditTest.of(named, elsewhere)
    assert found == fc.EditTest(5, 3, 2, 2, 1)
    assert found.p == pytest.approx(0.5)  # 2 or 3 heads of 3 coins


def by_formula(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Newcombe (1998), method 10, written out."""
    n, cross = a + b + c + d, a * d - b * c
    if cross > 0:
        cross = max(cross - n / 2, 0)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = cross / margins**0.5 if margins else 0.0
    p, q = (a + b) / n, (a + c) / n
    ci_p = scipy.stats.binomtest(a + b, n).proportion_ci(method="wilson")
    ci_q = scipy.stats.binomtest(a + c, n).proportion_ci(method="wilson")
    down, up, down_q, up_q = p - ci_p.low, ci_p.high - p, q - ci_q.low, ci_q.high - q
    low = p - q - (down**2 - 2 * phi * down * up_q + up_q**2) ** 0.5
    return low, p - q + (up**2 - 2 * phi * up * down_q + down_q**2) ** 0.5


def test_differences_by_their_formula():
    """Of all tables of 7 images, and of some others; no interval has width 0."""
    tables = [(14, 5, 0, 22), (0, 0, 0, 64), (64, 0, 0, 0), (32, 0, 0, 32), (5, 20, 3, 20)]
    tables += [cells for cells in itertools.product(range(8), repeat=4) if sum(cells) == 7]
    for cells in tables:
        value, low, high = paired(*cells).difference()
        assert value == pytest.approx((cells[1] - cells[2]) / sum(cells))
        assert (low, high) == pytest.approx(by_formula(*cells), abs=1e-6)
        assert low + 0.02 < high


@pytest.mark.parametrize("seed", range(5))
def test_benjamini_hochberg_is_scipys(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.random(60), rng.random(40) ** 6]).round(3)  # ties included
    expected = scipy.stats.false_discovery_control(p, method="bh") <= 0.05
    assert 0 < expected.sum() < 100
    assert (fc.benjamini_hochberg(p, 0.05) == expected).all()
    assert fc.benjamini_hochberg([], 0.01).shape == (0,)


# --- A small world with planted strokes -----------------------------------------------------------


class World(NamedTuple):
    layer: fa.ExplainedLayer
    claims: list[fh.Hypothesis]
    scenes: list[fc.Images]  # of which the claims are made, on which they are tested, and aside

    def evidence(self, claims=None, **options) -> list[fc.Evidence]:
        return fc.test_hypotheses(claims or self.claims, self.layer, *self.scenes[1], **options)

    def activity(self) -> fa.Activity:
        return fa.collect_activity(self.layer, *self.scenes[1])

    def judged(self, claims=None, **options) -> list[fc.Judgement]:
        claims = claims or self.claims
        return fc.judge_hypotheses(claims, self.evidence(claims, **options))


@pytest.fixture(scope="module")
def world():
    plan = demo.make_plan(demo.stroke_table(0))
    layer, scenes = demo.plant(plan), [demo.draw_labelled(plan, seed)[:2] for seed in range(3)]
    return World(layer, fh.propose_hypotheses(layer, *scenes[0]), scenes)


@pytest.fixture(scope="module")
def trial(world):
    evidence, activity = world.evidence(), world.activity()
    aside = fc.test_hypotheses(world.claims, world.layer, *world.scenes[2], seed=1)
    scored = fc.score_claims(world.claims, *world.scenes[1])
    picked = fc.pick_features(evidence, scored, world.layer, activity)
    return fc.make_trial(world.claims, fh.Rule(), evidence, aside, activity, picked)


def blank(feature: int, **parts) -> fh.Hypothesis:
    none = fh.Strokes()
    numbers = (0.0, (0,) * 10, 1000, 0.0, 0.0)
    nothing = fh.Hypothesis(feature, none, (), (), (), None, None, none, *numbers, {})
    return nothing._replace(**parts)


def test_planted_strokes_are_confirmed_and_null_statements_hardly_ever(world, trial):
    assert sum(j.explained for j in trial.judgements) >= 14
    assert sum(j.confidence == "High" for j in trial.judgements) >= 12
    assert sum(trial.held_aside) >= 14
    n, swapped = len(world.claims), []
    for shift in (1, 2, 4):  # each claim is tested as if it were about another feature
        moved = [h._replace(feature=(h.feature + shift) % n) for h in world.claims]
        swapped += [j.verdict for j in world.judged(moved)]
    assert swapped.count(fc.CONFIRMED) <= 1  # of 45
    shuffled = world.judged(activity=demo.shuffled(world.activity(), seed=0))
    verdicts = [j.tests.get(test) for j in shuffled for test in ("ink", "class", "both")]
    assert fc.REFUTED in verdicts
    assert fc.CONFIRMED not in verdicts


def test_a_label_that_no_image_has(world):
    most, (images, labels) = int(np.argmax(world.claims[0].label_histogram)), world.scenes[1]
    scores = tuple(1.0 if c == most else 0.25 for c in range(6))
    claim = blank(0, often=(most,), label_scores=scores)
    for keep, verdict in ((labels >= 0, fc.CONFIRMED), (labels != most, fc.REFUTED)):
        (e,) = fc.test_hypotheses([claim], world.layer, images[keep], labels[keep])
        assert fc.judge_hypotheses([claim], [e])[0].parts["class"] == verdict
    assert e.detected["class"].auroc == 0.5


def test_a_feature_is_tested_alike_whoever_is_tested_beside_it(world):
    """Influence, too: it is a share of what all features do, not of those on trial."""
    before, state = [tensor.clone() for tensor in world.scenes[1]], torch.random.get_rng_state()
    everything = world.evidence()
    assert world.evidence(world.claims[:7]) + world.evidence(world.claims[7:]) == everything
    assert world.evidence(world.claims[::-1]) == everything[::-1]
    assert sum(e.influence for e in everything) == pytest.approx(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, world.scenes[1], strict=True))


def test_detection_and_description_by_scikit_learn(world):
    activity, (images, labels) = world.activity(), world.scenes[1]
    places = fh.place_inks(images)
    for h, e in zip(world.claims, world.evidence(), strict=True):
        active = activity.is_active(h.feature)
        scores = fh.part_scores(h, fh.word_inks(places), labels)
        assert set(e.detected) == set(scores)
        pairs = [(e.detected[part], values) for part, values in scores.items()]
        for d, values in [*pairs, (e.drawn, fh.drawing_score(h, places, labels))]:
            auroc = sklearn.metrics.roc_auc_score(active, values)
            precision = sklearn.metrics.average_precision_score(active, values)
            assert (d.auroc, d.average_precision) == pytest.approx((auroc, precision), abs=1e-9)
            assert d.auroc_low < d.auroc < d.auroc_high or d.auroc == 1
        said = scores["both"] >= h.cut
        assert e.described == (said.sum(), active.sum(), (said & active).sum())
        assert e.described.precision == sklearn.metrics.precision_score(active, said)
        assert e.described.recall == sklearn.metrics.recall_score(active, said)


def test_what_does_not_belong_together_is_refused(world):
    judging, layer = world.scenes[1], world.layer
    evidence = fc.test_hypotheses(world.claims, layer, *judging)
    swapped = [evidence[1], evidence[0], *evidence[2:]]
    activity = fa.collect_activity(layer, *judging)
    fewer = judging[0][:100], judging[1][:100]
    few, scored = fa.collect_activity(layer, *fewer), fc.score_claims(world.claims, *fewer)
    rule = fh.Rule()
    judgements = fc.judge_hypotheses(world.claims, evidence)
    a, b = (h.feature for h in world.claims[:2])
    apart = rf"same order: feature ({a} meets feature {b}|{b} meets feature {a})$"
    for call in (
        lambda: fc.judge_hypotheses(world.claims, swapped),
        lambda: fc.make_trial(world.claims, rule, evidence, swapped, activity, {}),
        lambda: fc.shares_explained(swapped, judgements, {}, [], rule),
    ):
        with pytest.raises(ValueError, match=apart):
            call()
    n = len(evidence)
    with pytest.raises(ValueError, match=f"same order: they are {n} and {n - 1}"):
        fc.judge_hypotheses(world.claims, evidence[:-1])
    for call in (
        lambda: fc.make_trial(world.claims, rule, evidence, evidence, few, {}),
        lambda: fc.pick_features(evidence, scored, layer, few),
    ):
        with pytest.raises(ValueError, match="activity is of 100 images, but the evidence of 2400"):
            call()
    with pytest.raises(ValueError, match="the activity is of 100 images, but 2400 were given"):
        fc.test_hypotheses(world.claims, layer, *judging, few)
    for call in (
        lambda: fc.test_hypotheses(world.claims, layer, *judging, scored=scored),
        lambda: fc.pick_features(evidence, scored, layer, activity),
    ):
        with pytest.raises(ValueError, match="the scores are of 100 images, but 2400 were given"):
            call()
    with pytest.raises(ValueError, match="the labels are not those of the activity"):
        fc.test_hypotheses(world.claims, layer, judging[0], judging[1].flip(0), activity)


def test_features_that_hardly_fire_are_not_judged(world):
    """Evidence with too few images, in words, and without a NaN."""
    some = world.activity().of(0)[0][:5]  # images that fire feature 0
    images = torch.cat([world.scenes[1][0][some], torch.zeros(50, 1, 28, 28)])
    given = (world.layer, images, torch.zeros(55, dtype=torch.int64))
    claims = world.claims[:1]
    (e,) = fc.test_hypotheses(claims, *given)
    assert (e.n_active, e.judgeable, e.detected, e.edits, e.described) == (5, False, {}, None, None)
    trial = fc.make_trial(claims, fh.Rule(), [e], [e], fa.collect_activity(*given), {})
    (judgement,), shares = trial.judgements, trial.result.shares
    assert (judgement.verdict, judgement.confidence) == (fc.INCONCLUSIVE, "Low")
    assert (shares.features, shares.too_rare, shares.explained) == (0, 1, 0.0)
    assert (shares.median_auroc, shares.drawn, shares.over_like) == (None, None, None)
    record = fc.statement_record(0, trial)
    assert (record["measured"], record["evidence"]["edited_images"]) == ([], None)
    line = "fires on 9% of 55 unseen images, 100% of them 0s; too few that do, or do not, to judge"
    assert record["evidence"]["text"].startswith(line)
    json.dumps([record, shares._asdict()], allow_nan=False)
    aside = "on images set aside: too few images to see"
    assert aside in "\n".join(fc.feature_lines(0, trial, None))
    assert fc.test_hypotheses(claims, *given, rule=fh.Rule(min_active=5))[0].judgeable


def test_images_of_another_size_keep_labels_and_effects():
    layer, *given = banded_images()
    claims = fh.propose_hypotheses(layer, *given)
    judgements = fc.judge_hypotheses(claims, fc.test_hypotheses(claims, layer, *given))
    assert fc.CONFIRMED in {j.parts["effect"] for j in judgements}
    for j in judgements:
        assert (j.parts["class"], j.parts["ink"]) == (fc.CONFIRMED, fc.NONE)
        assert (j.verdict, j.confidence, j.explained) == (fc.CONFIRMED, "Medium", False)


def test_unclear_requests_are_refused(world):
    claims, (images, labels) = world.claims, world.scenes[1]
    with pytest.raises(ValueError, match="feature 0 has several hypotheses"):
        world.evidence([claims[0], claims[0]])
    with pytest.raises(IndexError, match="feature 99 does not exist"):
        world.evidence([blank(99)])
    with pytest.raises(ValueError, match="the activity is of 2400 images, but 5 were given"):
        fc.test_hypotheses(claims, world.layer, images[:5], labels[:5], world.activity())
    for claim in (claims[0], blank(0, drawing=claims[0].drawing)):
        with pytest.raises(ValueError, match="strokes cannot be tested: pixels run from -1 to 1"):
            fc.test_hypotheses([claim], world.layer, 2 * images - 1, labels)
    odd = blank(0, ink=fh.Strokes((fh.Word("dot", False, 9, 9),)))
    with pytest.raises(ValueError, match=r"is not in word_vocabulary\(\)"):
        world.evidence([odd])


# --- Edits ----------------------------------------------------------------------------------------

HERE, THERE = fh.Place(13, 13, "dot", 5), fh.Place(5, 5, "dot", 5)
ALL, NEVER = fc.EditTest(48, 48, 0, 48, 0), fc.EditTest(48, 0, 0, 0, 0)


class Reads(NamedTuple):
    """The mean ink of HERE and of THERE, so often, and a constant."""

    here: float
    there: float
    constant: float

    def preactivations(self, images):
        masks = fh.place_masks([HERE, THERE]).flatten(1).float()
        inks = images.flatten(1) @ (masks / masks.sum(1, keepdim=True)).T
        return inks @ torch.tensor([[self.here], [self.there]]) + self.constant

    def logits_from_preactivations(self, z):
        return torch.cat([z, -z], 1)


def edited(reads: Reads, strokes: fh.Strokes, firing: tuple, silent: tuple) -> fc.Edits:
    """On 100 grey images that fire the feature, with so much ink HERE and THERE, and on 100 that do
    not."""
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.2
    for mask, on, off in zip(fh.place_masks([HERE, THERE]), firing, silent, strict=True):
        images[:100, :, mask], images[100:, :, mask] = on, off
    sae = fc.LinearFeatures(torch.eye(1), torch.zeros(1), torch.eye(1), torch.zeros(1))
    layer = fa.ExplainedLayer(reads, sae, torch.zeros(1), torch.ones(1))
    h, labels = blank(0, ink=strokes), torch.zeros(200, dtype=torch.int64)
    (evidence,) = fc.test_hypotheses([h], layer, images, labels)
    assert evidence.n_active == 100
    return evidence.edits


@pytest.mark.parametrize("stroke", [HERE, fh.word_of(HERE)])
def test_edits_of_one_stroke(stroke):
    """Ink HERE fires the feature or silences it; a place, or the word for it, is named."""
    dark, light = (0.6, 0.3), (0.3, 0.6)
    found = edited(Reads(1.0, 0.0, -0.45), fh.Strokes((stroke,)), dark, light)
    assert found == fc.Edits(erasing=ALL, filling=None, painting=ALL)
    found = edited(Reads(-1.0, 0.0, 0.45), fh.Strokes((), (stroke,)), light, dark)
    assert found == fc.Edits(erasing=None, filling=ALL, painting=ALL)
    found = edited(Reads(0.0, 1.0, -0.45), fh.Strokes((stroke,)), light, dark)
    assert found.erasing.named == found.painting.named == 0  # it is not read


def test_both_are_made_when_the_feature_shall_turn_on():
    """It needs ink HERE and none THERE; silent images are the other way round."""
    given = ((0.6, 0.0), (0.0, 0.6))
    reads = Reads(here=1.0, there=-1.0, constant=-0.5)
    assert edited(reads, fh.Strokes((HERE,), (THERE,)), *given) == fc.Edits(ALL, ALL, ALL)
    assert edited(reads, fh.Strokes((THERE,), (HERE,)), *given) == fc.Edits(NEVER, NEVER, NEVER)
    alone = edited(reads, fh.Strokes((HERE,)), *given)
    assert (alone.erasing.named, alone.filling, alone.painting.named) == (48, None, 0)
    alone = edited(reads, fh.Strokes((), (THERE,)), *given)
    assert (alone.erasing, alone.filling.named, alone.painting.named) == (None, 48, 0)


# --- Effects --------------------------------------------------------------------------------------

HEAD = torch.tensor([[2.0, -1.9, 0.1], [0.0, 3.0, 0.2], [1.0, 1.0, 0.3], [0.0, 0.0, 0.0]])
STD, ACTS = torch.tensor([0.5, 0.1, 0.1, 0.2]), torch.linspace(1, 3, 40)
RAW = torch.randn(45, 4, generator=torch.Generator().manual_seed(0))


class Head(NamedTuple):
    bent: bool

    def logits_from_preactivations(self, z):
        return (z.relu() if self.bent else z) @ HEAD


def effect_of(claim, direction=(1.0, 0.0, 0.0, 0.0), bent=False, rule=None) -> fc.EffectTest:
    """Of a feature that fires on the first 40 images, 2 on average."""
    sae, n = fc.LinearFeatures(None, None, torch.tensor([direction]), None), len(ACTS)
    layer = fa.ExplainedLayer(Head(bent), sae, torch.zeros(4), STD)
    labels = torch.zeros(len(RAW), dtype=torch.int64)
    activity = fa.Activity(torch.tensor([0, n]), torch.arange(n), ACTS, labels)
    h = blank(0, effect=claim, typical_activation=2.0)
    return fc.effect_test(h, layer, RAW, activity, rule)


def test_effects_by_closed_form():
    """A linear head: a change per unit is the same at every dose, the linear prediction exact."""
    test = effect_of(fh.Effect(0, 4.0, 1, 6.0))
    assert test.raised_by == pytest.approx(2 * 0.5 * 2.0)  # mean activation, std, head weight
    assert test.lowered_by == pytest.approx(2 * 0.5 * 1.9)
    assert test.reach == pytest.approx(1.9 / 3.0)  # 2.0 / 2.0 is more: the smaller counts
    spread = np.linspace(1, 3, 40).std(ddof=1) / 2 * test.reach
    assert test.reach_error == pytest.approx(spread / math.sqrt(40), rel=1e-4)
    assert test.dose_raises == pytest.approx([0, 1, 2, 4], abs=1e-5)
    assert test.dose_lowers == pytest.approx([0, -0.95, -1.9, -3.8], abs=1e-5)
    assert test.linear_raises == pytest.approx(test.dose_raises, abs=1e-3)
    assert test.linear_lowers == pytest.approx(test.dose_lowers, abs=1e-3)
    assert test.dose_follows
    assert (test.n, test.further, test.less_far) == (40, 40, 0)
    assert test.p == pytest.approx(2.0**-40)
    alone = effect_of(fh.Effect(None, 0.0, 1, 3.0), rule=fh.Rule(effect_size=0.8))
    assert (alone.raised_by, alone.dose_raises, alone.linear_raises) == (None, None, None)
    assert alone.reach == pytest.approx(1.9 / 2.4)
    assert alone.dose_lowers == test.dose_lowers


@pytest.mark.parametrize("percentile", [0.5, 0.95])
def test_chance_is_a_percentile_of_other_directions(percentile):
    own = torch.tensor([2.0, 0.5, 0.0, 1.0])
    rule = fh.Rule(percentile=percentile, effect_size=1e-6)
    test = effect_of(fh.Effect(0, 1.0, 1, 1.0), own.tolist(), bent=True, rule=rule)

    def falls(direction: Tensor) -> np.ndarray:
        """(40, 3), image by image."""
        steps = [act * direction * STD for act in ACTS]
        changes = [r.relu() - (r - step).relu() for r, step in zip(RAW, steps, strict=False)]
        return (torch.stack(changes) @ HEAD).double().numpy()

    some = [round(39 / 15 * i) for i in range(16)]  # spread over the 40 images
    means = [falls(own.norm() * d)[some].mean(0) for d in fh.other_directions_of(4)]
    at, chance = percentile * 127, []
    for sign in (1, -1):
        moves = sorted(max(sign * mean) for mean in means)
        chance.append(np.interp(at, range(128), moves))
    assert (test.chance_raised, test.chance_lowered) == pytest.approx(chance, rel=1e-4)
    moved = falls(own)[:, :2] * [1, -1]
    further = (moved > np.outer(ACTS / 2, chance)).all(1).sum()
    assert 0 < further < 40
    assert (test.further, test.less_far) == (further, 40 - further)
    assert test.reach == pytest.approx(min(moved.mean(0) / chance), rel=1e-4)  # of chance, not 1e-6


def test_random_directions_exceed_the_percentile_as_often_as_it_says():
    """Each on the logit that it moves most."""
    shifts, found = torch.randn(400, 4, generator=torch.Generator().manual_seed(1)), []
    for direction in shifts:
        c = int((direction * STD @ HEAD).argmax())
        test = effect_of(fh.Effect(c, 0.02, None, 0.0), direction.tolist())
        found.append(test.further > test.less_far)
    assert 0.01 < np.mean(found) < 0.13  # 128 others leave the percentile itself uncertain


def test_curves_that_turn_back_do_not_follow():
    test = effect_of(fh.Effect(0, 1.0, None, 0.0))
    for curve, follows in (((0, 1, 2, 2.5), True), ((0, 1, 2, 1.5), False), ((0, 1, 1, 2), False)):
        assert test._replace(dose_raises=curve).dose_follows == follows
        falling = tuple(-value for value in curve)
        assert test._replace(dose_raises=None, dose_lowers=falling).dose_follows == follows
        assert test._replace(dose_lowers=falling).dose_follows == follows


# --- Judging --------------------------------------------------------------------------------------

INK = {"ink": fh.Strokes((fh.Word("dot", False, 2, 2),))}
LABELS = {"often": (1,), "label_scores": (0.0, 1.0)}


def evidence_of(feature: int = 0, **parts) -> fc.Evidence:
    nothing = (50, 1000, True, (0, 40, 10), 0.25, 0.1, {}, None, None, None, None, None)
    return fc.Evidence(feature, *nothing)._replace(**parts)


def detection(auroc: float, low: float, high: float, p: float, *parts: str) -> dict:
    return {part: fc.Detected(auroc, low, high, 0.5, p) for part in parts}


def judged(claim: dict, rule: fh.Rule | None = None, **parts) -> fc.Judgement:
    return fc.judge_hypotheses([blank(0, **claim)], [evidence_of(**parts)], rule)[0]


@pytest.mark.parametrize(
    ("auroc", "low", "high", "p", "verdict", "confidence"),
    [
        (0.95, 0.9, 0.97, 1e-6, fc.CONFIRMED, "High"),
        (0.95, 0.8, 0.97, 1e-6, fc.CONFIRMED, "Medium"),  # reaches below 0.85, the bar for both
        (0.95, 0.49, 0.99, 1e-6, fc.INCONCLUSIVE, "Low"),  # the interval does not leave out 0.5
        (0.95, 0.9, 0.97, 0.5, fc.INCONCLUSIVE, "Low"),  # not significant
        (0.84, 0.8, 0.9, 1e-6, fc.INCONCLUSIVE, "Medium"),  # the ink part alone is confirmed
        (0.8, 0.76, 0.84, 1e-6, fc.REFUTED, "Low"),  # the whole is below its bar
    ],
)
def test_verdicts(auroc, low, high, p, verdict, confidence):
    found = judged(INK, detected=detection(auroc, low, high, p, "ink", "both"))
    assert (found.verdict, found.confidence) == (verdict, confidence)
    assert found.explained == (verdict == fc.CONFIRMED)
    found = judged(LABELS, detected=detection(auroc, low, high, p, "class", "both"))
    assert found.verdict == verdict
    assert found.confidence == confidence.replace("High", "Medium")  # only ink explains
    assert not found.explained


def test_verdicts_on_edits():
    detected = detection(0.95, 0.9, 0.97, 1e-6, "ink", "both")
    rule = fh.Rule(false_discovery_rate=0.3)  # significance is not asked for here
    for erasing, filling, verdict, confidence in (
        (paired(0, 40, 0, 8), paired(0, 48, 0, 0), fc.CONFIRMED, "High"),
        (paired(0, 16, 0, 32), None, fc.CONFIRMED, "Medium"),  # may be less than 0.25
        (paired(0, 40, 0, 8), paired(0, 0, 0, 48), fc.REFUTED, "Low"),
        (paired(10, 8, 2, 28), paired(0, 48, 0, 0), fc.INCONCLUSIVE, "Low"),  # less than 0.25
        (paired(0, 2, 0, 4), None, fc.INCONCLUSIVE, "Low"),  # its interval reaches 0
    ):
        found = judged(INK, rule, detected=detected, edits=fc.Edits(erasing, filling, None))
        assert (found.verdict, found.confidence) == (verdict, confidence)


def test_verdicts_on_little_effect():
    detected = detection(0.95, 0.9, 0.97, 1e-6, "ink", "both")
    for n, changes, verdict, confidence in (
        (1000, 0.03, fc.CONFIRMED, "High"),  # Wilson: 2.1% to 4.2%
        (1000, 0.045, fc.CONFIRMED, "Medium"),  # 3.4% to 6.0%
        (1000, 0.055, fc.INCONCLUSIVE, "Medium"),  # 4.3% to 7.1%
        (1000, 0.07, fc.REFUTED, "Low"),  # 5.6% to 8.8%
        (34, 0.0, fc.CONFIRMED, "Medium"),  # 0% to 10%: too few images to be sure
    ):
        little = {"says_little": True, "n_active": n, "changes": changes}
        found = judged(INK, detected=detected, **little)
        assert (found.verdict, found.confidence) == (verdict, confidence)


def test_verdicts_on_effects():
    claim = fh.Effect(0, 1.0, 1, 1.0)
    follows, ignored = effect_of(claim), effect_of(claim, (0.0, 0.0, 0.0, 1.0))
    assert (ignored.raised_by, ignored.further, ignored.p) == (0.0, 0, 1.0)  # the head ignores it
    for test, verdict in (
        (follows, fc.CONFIRMED),
        (follows._replace(dose_raises=(0.0, 1.0, 2.0, 1.0)), fc.INCONCLUSIVE),
        (follows._replace(reach=0.9, reach_error=0.02), fc.REFUTED),  # 0.9 + 1.96 x 0.02 < 1
        (follows._replace(reach=0.9, reach_error=0.2), fc.INCONCLUSIVE),
        (ignored, fc.REFUTED),
    ):
        found = judged({"effect": claim}, effect=test)
        assert (found.verdict, found.explained) == (verdict, False)
    found = judged({})
    assert (found.verdict, found.confidence, found.explained) == (fc.NONE, "Low", False)


def test_measurements_have_their_bars_and_p_values():
    three = detection(0.9, 0.8, 0.95, 1e-3, "ink", "class", "both")
    effect = effect_of(fh.Effect(0, 1.0, None, 0.0))._replace(reach=1.5, reach_error=0.1)
    edits = fc.Edits(paired(59, 6, 16, 80), None, None)
    found = fc.measurements(evidence_of(detected=three, edits=edits, effect=effect), fh.Rule())
    assert set(found) == {*three, "erasing", "effect"}
    for part, bar in (("ink", 0.75), ("class", 0.65), ("both", 0.85)):
        assert found[part] == (0.9, 0.8, 0.95, bar, 1e-3, 0.5)
    expected = (-0.0621, -0.1186, -0.0046, 0.25, 0.9915, 0.0)  # 6 or more heads of 22 coins
    assert found["erasing"] == pytest.approx(expected, abs=5e-5)
    expected = (1.5, 1.5 - 0.196, 1.5 + 0.196, 1.0, 2.0**-40, 0.0)
    assert found["effect"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("p", "verdict"), [(0.0024, fc.CONFIRMED), (0.003, fc.INCONCLUSIVE)])
@pytest.mark.parametrize(("part", "claim"), [("ink", INK), ("class", LABELS)])
def test_p_values_are_corrected_over_all_features(part, claim, p, verdict):
    """Four of them, the least of which must be below 0.01 / 4: the whole of a claim of one part is
    not counted, that of a claim of two is. 0.003 is below 0.01 / 3, and below 0.02 / 5."""
    first = evidence_of(detected=detection(0.95, 0.9, 0.99, p, part, "both"))
    second = evidence_of(1, detected=detection(0.95, 0.9, 0.99, 0.9, "ink", "class", "both"))
    assert fc.measurements(first, fh.Rule())["both"].p is None
    claims = [blank(0, **claim), blank(1, **INK, **LABELS)]
    one, other = fc.judge_hypotheses(claims, [first, second])
    assert one.verdict == verdict
    assert other.tests == dict.fromkeys(("ink", "class", "both"), fc.INCONCLUSIVE)


def test_held_asks_for_values_not_for_significance():
    good = evidence_of(detected=detection(0.86, 0.4, 0.9, 0.9, "ink", "both"))
    assert fc.held(good) is True
    assert fc.held(good, fh.Rule(both_auroc=0.87)) is False
    edits = fc.Edits(paired(0, 13, 0, 35), None, None)
    assert fc.held(good._replace(edits=edits)) is True
    assert fc.held(good._replace(edits=edits._replace(painting=NEVER))) is False


def picking_world():
    """14 features, two of which fire too rarely, the last one never. Most scores follow a feature
    four ranks of firing rate further up or down, and half as much their own."""
    rng = np.random.default_rng(0)
    shared, rates = rng.random(300), rng.uniform(0.05, 0.5, 14)
    active = (0.6 * rng.random((14, 300)) + 0.4 * shared) < np.quantile(shared, rates)[:, None]
    active[11], active[12], active[13] = active[10], np.arange(300) < 3, False
    ranked, parts = active[:12].sum(1).argsort(kind="stable"), {4: {}}
    for place, k in enumerate(ranked.tolist()):
        about = active[ranked[(place + (0, 4, -4)[place % 3]) % 12]]
        if k != 4:
            noise = rng.normal(size=300) / 4
            parts[k] = {"both": (active[k] + 2.0 * about + noise).round(1).astype(np.float32)}
    decoder = rng.normal(size=(14, 5)).astype(np.float32)
    decoder[13] = decoder[1] + 0.01  # the silent one is nearest to feature 1
    return active, parts, decoder


def picks_by_hand(k: int, active, parts, decoder) -> tuple:
    if k == 4:
        return False, False, False
    ranked = sorted(range(12), key=lambda c: (active[c].sum(), c))
    first = min(max(0, ranked.index(k) - 4), 4)
    firing = [c for c in range(14) if active[c].any()]
    auroc = {c: sklearn.metrics.roc_auc_score(active[c], parts[k]["both"]) for c in firing}
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    like = max({*range(14)} - {k}, key=lambda c: unit[c] @ unit[k])
    company = max({*firing} - {k}, key=lambda c: np.corrcoef(active[k], active[c])[0, 1])
    eight = all(auroc[k] > auroc[c] for c in ranked[first : first + 8] if c != k)
    return eight, *(auroc[k] > auroc[c] if c in auroc else None for c in (like, company))


def test_pick_features_by_brute_force():
    active, parts, decoder = picking_world()
    image, counts = torch.from_numpy(active).nonzero()[:, 1], active.sum(1).tolist()
    start = torch.tensor([0, *np.cumsum(counts)])
    activity = fa.Activity(start, image, torch.ones(len(image)), torch.zeros(300))
    W_dec = torch.from_numpy(decoder)
    layer = fa.ExplainedLayer(None, fc.LinearFeatures(W_dec.T, None, W_dec, None), None, None)
    known = {"n_images": 300}
    evidence = [evidence_of(k, n_active=n, judgeable=k < 12, **known) for k, n in enumerate(counts)]
    found = fc.pick_features(evidence, fc.Scored(parts, {}), layer, activity)
    assert found == {k: picks_by_hand(k, active, parts, decoder) for k in range(12)}
    assert found[1].over_like is None
    for field in fc.Picked._fields:
        assert {True, False} <= {getattr(p, field) for p in found.values()}


def five_features():
    """Evidence, judgements, picks and what held, of one High, one Medium, two Low, of which one
    claims nothing, and one that is too rare."""
    evidence, judgements = [], []
    rows = [  # n_active, AUROC, described rightly, as drawn, influence, confidence, verdicts
        (2, 0.95, 9, 0.9, 0.5, "High", (fc.CONFIRMED, fc.CONFIRMED, fc.CONFIRMED)),
        (10, 0.85, 5, 0.7, 0.2, "Medium", (fc.CONFIRMED, fc.NONE, fc.NONE)),
        (20, 0.8, 2, 0.8, 0.1, "Low", (fc.CONFIRMED, fc.NONE, fc.REFUTED)),
        (500, None, None, None, 0.05, "Low", (fc.NONE, fc.NONE, fc.NONE)),
        (1, None, None, None, 0.15, "Low", (fc.INCONCLUSIVE, fc.NONE, fc.NONE)),
    ]
    for k, (n_active, auroc, right, drawn, influence, confidence, verdicts) in enumerate(rows):
        e = evidence_of(k, n_active=n_active, influence=influence, judgeable=k < 4)
        if auroc:
            found = detection(auroc, 0.5, 1.0, 0.1, "both"), fc.Described(10, 20, right)
            as_drawn = fc.Detected(drawn, 0.5, 1.0, 0.5, 0.1)
            e = e._replace(detected=found[0], described=found[1], drawn=as_drawn)
        evidence.append(e)
        parts, whole = dict(zip(fh.PARTS, verdicts, strict=True)), fc.NONE if k == 3 else fc.REFUTED
        judgements.append(fc.Judgement(k, {}, parts, whole, confidence, confidence != "Low"))
    picked = [(True, True, None), (True, True, False), (False, False, None), (False,) * 3]
    picked = {k: fc.Picked(*some) for k, some in enumerate(picked)}
    return evidence, judgements, picked, [True, False, True, None, None]


def test_shares_by_hand():
    shares, aurocs = fc.comparison_of(*five_features(), fh.Rule())
    assert (shares.features, shares.too_rare, shares.explained) == (4, 1, 0.5)
    interval = scipy.stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert shares[3:5] == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert shares[5:8] == (0.75, 0.25, 0.25)  # ink, class and effect are confirmed
    assert (shares.predicted, shares.drawn) == (0.5, 0.25)
    assert (shares.median_auroc, shares.average_precision, aurocs[3:]) == (0.85, 0.5, [0.0])
    assert (shares.median_precision, shares.median_recall) == (0.5, 0.25)
    assert (shares.among_eight, shares.over_like, shares.over_company) == (0.5, 0.5, 0.0)
    assert shares[-5:-2] == (0.7, 0.5, 0.015)  # influence explained, High; median density
    edges, counts, explained = zip(*(band.values() for band in shares.bands), strict=True)
    assert edges == (0.003, 0.01, 0.03, 1.0)
    assert (counts, explained) == ((1, 1, 1, 1), (1, 1, 0, 0))  # an edge belongs to its band
    held = {name: tuple(counts.values()) for name, counts in shares.confidence.items()}
    assert held == {"High": (1, 1, 1), "Medium": (1, 1, 0), "Low": (2, 1, 1), "all": (4, 3, 2)}
    assert list(shares.confidence["all"]) == ["statements", "checked", "held"]
    evidence, judgements, picked, held, *_ = five_features()
    one = fc.shares_explained(evidence[:1], judgements[:1], picked, held[:1], fh.Rule())
    assert (one.features, one.explained, one.ink_confirmed) == (1, 1.0, 1.0)
    nothing = fc.shares_explained([], [], {}, [], fh.Rule())
    assert (nothing.features, nothing.explained, nothing.drawn) == (0, 0, None)


def test_other_directions():
    z, density = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.9])
    features = fc.matched_directions(z[:1], z, density, torch.tensor([3.0]))
    assert features.encode(z)[:, 0].tolist() == pytest.approx([2.0, 4.0, 0.0])  # only along it
    z, eye = torch.zeros(5, 4), torch.eye(4)
    found = fc.other_directions("neurons", z, seed=4)
    assert sorted(found.tolist()) == sorted(torch.cat([eye, -eye]).tolist())
    assert not torch.equal(found, fc.other_directions("neurons", z, seed=5))
    found = fc.other_directions("random directions", z, seed=0)
    assert found.T @ found / fc.COMPARED == pytest.approx(eye, abs=0.35)  # they point everywhere
    with pytest.raises(ValueError, match="no directions of the kind 'apples'"):
        fc.other_directions("apples", z, seed=0)


@pytest.mark.parametrize(("n", "compared"), [(40, 40), (1000, 300)])
def test_what_is_compared_fires_as_often_and_as_strongly(n, compared):
    generator = torch.Generator().manual_seed(0)
    z, directions = (torch.randn(rows, 8, generator=generator) for rows in (4000, n))
    density, mean = 0.001 + torch.rand(300, generator=generator) / 4, torch.rand(300)
    features = fc.at_the_same_rates(directions, z, density, mean)
    acts = features.encode(z)
    counts = (acts > 0).sum(0)
    some = density.argsort(descending=True)[torch.linspace(0, 299, compared).round().long()]
    assert counts / 4000 == pytest.approx(density[some], abs=1 / 2000)
    assert acts.sum(0) / counts == pytest.approx(mean[some], rel=1e-3)
    unit = directions[:compared] / directions[:compared].norm(dim=1, keepdim=True)
    assert features.W_dec == pytest.approx(unit, abs=1e-6)


def test_comparing_the_sae_with_itself_gives_its_own_shares(world, trial):
    """The very path of the features on trial, but for drawings; and what goes through a worker
    comes back."""
    given = (world.layer.sae, world.layer, *world.scenes, fh.Rule(), 0)
    found = fc.compare_features(*pickle.loads(pickle.dumps(given)))
    assert pickle.loads(pickle.dumps(found)) == found
    assert found == trial.result._replace(shares=trial.result.shares._replace(drawn=None))


def test_no_stroke_of_a_control_is_named_where_the_sae_may_name_none(world):
    given = (world.layer.sae, world.layer, *world.scenes, fh.Rule(), 0)
    found = fc.compare_features(*given, strokes=False).shares
    assert (found.explained, found.ink_confirmed, found.drawn) == (0, 0, None)
    assert found.class_confirmed > 0


# --- The trial, its records and words -------------------------------------------------------------


def test_a_trial_names_test_images(world, trial):
    images, labels = torch.arange(5), torch.arange(5) * 10
    found = [x.tolist() for split in fc.confirmation_splits(images, labels) for x in split]
    assert found == [[0, 2, 4], [0, 20, 40], [1, 3], [10, 30]]
    activity = world.activity()
    for k in range(15):
        at, acts = activity.of(k)
        strongest = at[torch.argsort(acts, descending=True, stable=True)[:10]]
        assert trial.firing[k] == (2 * strongest).tolist()
        on, off = trial.edited[k]
        assert set(on) <= set((2 * at).tolist())
        assert not set(off) & set((2 * at).tolist())
        assert (len(on), len(off)) == (48, 48)
    assert trial.n_aside == 2400
    assert trial.result.aurocs == [e.detected["both"].auroc for e in trial.evidence]


def shares_of(**changed) -> fc.Shares:
    bands = [fc.Band(upto, 10, 4)._asdict() for upto in (*fc.BANDS, 1.0)]
    held = {"High": (10, 8, 6), "Medium": (7, 5, 1), "Low": (3, 0, 0), "all": (20, 13, 7)}
    confidence = {name: fc.Held(*counts)._asdict() for name, counts in held.items()}
    numbers = (0.4, 0.26, 0.55, 0.5, 0.3, 0.2, 0.6, 0.7, 0.9, 0.45, 0.65, 0.5, 0.75, 0.85, None)
    return fc.Shares(40, 5, *numbers, 0.35, 0.15, 0.02, bands, confidence)._replace(**changed)


def record_of(**controls: fc.Shares) -> dict:
    """As it comes from summary.json."""
    sets = {"SAE": shares_of(), **controls}
    record = {
        "rule": fh.Rule()._asdict(),
        "shares": {name: shares._asdict() for name, shares in sets.items()},
        "features_that_make_influence": {"50%": 12, "90%": 80, "99%": 140},
        "median_words": 20,
    }
    return json.loads(json.dumps(record))


def test_the_headline():
    own = "35% of the influence is explained, 15% with confidence High; 40% of the features are"
    made = ". Features by influence on the test images: 12 make 50%, 80 make 90%, 140 make 99%."
    assert fc.headline(record_of()) == own + made
    few, none = shares_of(explained=0.16), shares_of(explained=0.0)
    best = ", of the best control (neurons) 16% (2.5 times)"
    assert fc.headline(record_of(other=none, neurons=few)) == own + best + made
    assert fc.headline(record_of(other=none)) == f"{own}, of the best control (other) 0%{made}"
    silent = record_of(SAE=none._replace(influence_explained=0.0), other=none)
    silent["median_words"] = None
    words = "The SAE's sentences name no strokes, so no feature counts as explained"
    assert fc.headline(silent) == words + made
    silent["shares"]["neurons"] = few._asdict()  # theirs do: that is a comparison
    assert ", of the best control (neurons) 16% (0.0 times)" in fc.headline(silent)


def test_the_table_of_shares():
    record = record_of(neurons=shares_of(explained=0.1, drawn=None, features=7))
    rows = fc.shares_rows(record)
    assert [row[-1] for row in rows[:3]] == ["neurons", "7", "5"]
    assert (rows[3][0][:9], rows[4][0]) == ("explained", "  95% interval over features")
    shares = "40% 10%; 26% to 55% 26% to 55%; 50% 50%; 30% 30%; 20% 20%; 60% 60%; 70% none; "
    shares += "75% 75%; 85% 85%; none none; 45% 45%; 65% 65%; 35% 35%; 15% 15%"
    assert "; ".join(" ".join(row[1:]) for row in rows[3:17]) == shares
    assert rows[8][0] == "predicted, AUROC 0.85, as worded"
    names = ("up to 0.3%", "up to 1.0%", "up to 3.0%", "more")
    assert rows[17:21] == [[f"explained, fire on {n}", "4 of 10", "4 of 10"] for n in names]
    held = ("10, 75% held", "7, 20% held", "3, none seen again", "20, 54% held")
    assert [row[1] for row in rows[21:]] == [*held]
    assert [row[0] for row in rows[21:]] == [f"statements: {n}" for n in (*fc.CONFIDENCES, "all")]
    lines = fc.statements_table(record).splitlines()
    assert lines[0] == fc.headline(record)
    assert lines[3].split() == "features that can be judged 40 7".split()
    assert fc.text_table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_all_that_was_measured_is_told():
    claim = fh.Effect(0, 4.0, None, 0.0)
    effect = effect_of(claim)._replace(chance_raised=0.5, reach=1.0, reach_error=0.1)
    h, erasing = blank(0, **INK, effect=claim), paired(0, 40, 0, 8)
    e = evidence_of(
        described=fc.Described(200, 50, 40),
        detected=detection(0.9996, 0.9111, 1.0, 1e-120, "ink", "both"),
        edits=fc.Edits(erasing, None, paired(2, 10, 0, 36)),
        effect=effect,
        drawn=fc.Detected(0.8, 0.7, 0.9, 0.4, 0.1),
        drawn_edits=fc.Edits(erasing, None, None),
    )
    assert fc.evidence_line(h, e).split("; ") == [
        "fires on 5% of 1,000 unseen images, 80% of them 1s and 20% of them 2s",
        "of the 200 images it describes 20% fire it",
        "of those that fire it, it describes 80%",
        "AUROC 0.999",
        "as drawn 0.800",
        "erasing what is said to be there turns it off on 40 of 48 images, elsewhere on 0",
        "making it as said turns it on on 12 of 48 images, elsewhere on 2",
        "without it 10% of their predictions change",
    ]
    (j,) = fc.judge_hypotheses([h], [e])
    text = "\n".join(fc.measured_lines(h, e, j))
    low, high = by_formula(0, 40, 0, 8)
    erased = f"on 40 of 48 images, elsewhere on 0: difference +0.83 [{low:+.2f}, {high:+.2f}]"
    for words in (
        "the ink named predicts where it fires: AUROC 0.999 [0.911, 1.000], average precision "
        "0.500, bar 0.75, p < 1e-99: confirmed\n",
        f"erasing what is said to be there turns it off {erased}, bar 0.25, p = 9e-13: confirmed\n",
        "removing it lowers the logit of 0 by 2.000 (said 4.000, other directions 0.500): 1.00 "
        "[0.80, 1.20] of what is asked for; further than those on 40 of 40 images, p = 9e-13: "
        "confirmed\n",
        "adding 0.5, 1, 2 times its typical activation: logit of 0 +1.000, +2.000, +4.000 (linear ",
        "as drawn, it is predicted where it fires: AUROC 0.800 [0.700, 0.900], ",
        f"as drawn, erasing what is said to be there turns it off {erased}",
    ):
        assert words in text
    assert [*map(fc.auroc_words, (1.0, 1 - 1e-9, 0.8509))] == ["1.000", "0.999", "0.850"]
    assert "bar 0.3," in "\n".join(fc.measured_lines(h, e, j, fh.Rule(edit_difference=0.3)))


def test_records(world, trial):
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares_of(), [0.9])}, "abc")
    assert (record["sha256"], record["rule"]) == ("abc", fh.Rule()._asdict())
    assert list(record["shares"]) == ["SAE", "neurons"]
    assert record["shares"]["neurons"] == shares_of()._asdict()
    words = [fh.statement(h).count(" ") + 1 for h in trial.hypotheses if any(h.ink)]
    assert record["median_words"] == np.median(words)
    record, h, e = fc.statement_record(5, trial), world.claims[5], trial.evidence[5]
    assert record["statement"] == fh.statement(h)
    assert (record["influence"], record["changes"]) == (h.influence, e.changes)
    found = record["evidence"]
    assert found["edits"]["erasing"] == e.edits.erasing._asdict() | {"p": e.edits.erasing.p}
    assert found["described"]["recall"] == e.described.both / e.described.active
    assert found["edited_images"]["silent"] == trial.edited[5][1]
    json.dumps(record, allow_nan=False)


def test_the_whole_report(world, trial):
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares_of(), [])}, "abc")
    text = fc.statements_markdown(trial, record, "20 of 15", {4: "3 of 3 other SAEs have it"})
    assert text.startswith(f"# What the features mean: 20 of 15\n\n{fc.headline(record)}\n")
    for words in (
        "made from 2,400 validation images",
        "on the 2,400 test images with even numbers",
        "SHA-256 of hypotheses.json: `abc`",
        "moves the logit named by 50% of what is said",
        "|   95% interval over features | ",
    ):
        assert words in text
    first, sections = text.split("## Feature by feature, the most influential first")
    assert "{" not in first
    order = sorted(range(15), key=lambda k: -world.claims[k].influence)
    titles = [line for line in sections.splitlines() if line.startswith("### ")]
    assert titles == [f"### Feature {k}: {fh.statement(world.claims[k])}" for k in order]
    j, held = trial.judgements[4], {True: "held", False: "did not hold"}[trial.held_aside[4]]
    aside = f"verdict {j.verdict}; on images set aside: {held}; 3 of 3 other SAEs have it"
    assert f"- Confidence: **{j.confidence}**; {aside}\n" in sections
    assert sections.count("other SAEs") == 1
    assert f" fire it: #{trial.firing[4][0]}, #{trial.firing[4][1]}, " in sections
    assert "15 of 15 features. All of them" in sections


def test_the_report_tells_the_most_influential(world, trial, monkeypatch):
    monkeypatch.setattr(fc, "TOLD", 4)
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares_of(), [])}, "abc")
    text = fc.statements_markdown(trial, record, "20 of 15")
    order = sorted(range(15), key=lambda k: -world.claims[k].influence)
    titles = [line.split(":")[0] for line in text.splitlines() if line.startswith("### ")]
    assert titles == [f"### Feature {k}" for k in order[:4]]
    assert "4 of 15 features. All of them" in text
    assert "feature_report.html" in text
    assert "feature_report.json" in text


def test_the_picture_shows_every_set(trial):
    empty = [band | {"features": 0, "explained": 0} for band in shares_of().bands]
    others = {"neurons": fc.Comparison(shares_of(), [0.9, 0.8])}
    others["none"] = fc.Comparison(shares_of(bands=empty), [])
    left, right = fc.draw_explained(trial, others).axes
    for axes in (left, right):
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["SAE", "neurons", "none"]
    assert left.lines[1].get_xydata().tolist() == [[0.8, 1.0], [0.9, 0.5], [1.0, 0.0]]
    own = [b["explained"] / max(1, b["features"]) for b in trial.result.shares.bands]
    assert [bar.get_height() for bar in right.patches] == [*own, *[0.4] * 4, *[0.0] * 4]
    assert len({round(bar.get_x(), 6) for bar in right.patches}) == 12  # side by side
    ticks = [tick.get_text() for tick in right.get_xticklabels()]
    edges = ("up to 0.3%", "up to 1.0%", "up to 3.0%", "more")
    counts = [band["features"] for band in trial.result.shares.bands]
    assert ticks == [f"{e}\n({n} of the SAE)" for e, n in zip(edges, counts, strict=True)]
    assert [text.get_text() for text in right.texts] == []
    result = fc.Comparison(shares_of(explained=0.0, bands=empty), [])
    _, right = fc.draw_explained(trial._replace(result=result), {"none": result}).axes
    assert [text.get_text() for text in right.texts] == ["none is"]


def test_the_picture_of_influence(trial):
    evidence, judgements, *_ = five_features()
    some = trial._replace(evidence=evidence, judgements=judgements)
    bars, total = fc.draw_influence(some).axes
    found = {bar.get_x() + 0.5: bar.get_height() for bar in bars.patches}
    assert found == pytest.approx({1: 50, 2: 20, 3: 15, 4: 10, 5: 5})
    labels = [text.get_text().split(" of")[0] for text in bars.get_legend().get_texts()]
    assert labels == ["High: 50%", "Medium: 20%", "Low: 30%"]
    assert total.lines[0].get_ydata() == pytest.approx([50, 70, 85, 95, 100])
    told = [text.get_text() for text in total.texts]
    assert told == ["1 make 50%", "4 make 90%", "5 make 99%"]
    even = trial._replace(evidence=[evidence_of(influence=0.1)] * 10)
    assert fc.influence_course(even) == {"50%": 5, "90%": 9, "99%": 10}
