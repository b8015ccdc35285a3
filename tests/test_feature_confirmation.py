"""The trial: statistics against scipy, scikit-learn, plain loops and simulation; the rest against
hand-made models."""

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

CASES = list(itertools.product([0, 1, 2], [0.02, 0.3, 0.9], [False, True]))
REPETITIONS = 1000


def draw(
    seed: int, n: int, share: float, ties: bool, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, rounded coarsely for ties, and indices of active images, shifted upwards."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    scores = rng.normal(size=n)
    scores[at] += shift
    return (scores.round() if ties else scores).astype(np.float32), at


def active_of(scores: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.isin(np.arange(len(scores)), at)


# --- How well scores predict ----------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_average_precision_is_scikit_learns(seed, share, ties):
    scores, at = draw(seed, 300, share, ties, shift=0.7)
    expected = sklearn.metrics.average_precision_score(active_of(scores, at), scores)
    found = fc.average_precision(fh.ranks_of(scores, at))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_rank_sum_p_is_scipys(seed, share, ties):
    scores, at = draw(seed, 300, share, ties, shift=0.3)
    own, others = scores[at].astype(float), np.delete(scores, at).astype(float)
    expected = scipy.stats.mannwhitneyu(own, others, alternative="greater", method="asymptotic")
    found = fc.rank_sum_p(fh.ranks_of(scores, at))
    assert found == pytest.approx(expected.pvalue, rel=1e-6)


def test_rank_sum_p_of_equal_scores_is_one():
    assert fc.rank_sum_p(fh.ranks_of(np.zeros(9), np.arange(4))) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_fisher_p_is_scipys(seed):
    rng = np.random.default_rng(seed)
    said, active = rng.random(80) < 0.3, rng.random(80) < 0.2
    both, n_said, n_active = (said & active).sum(), said.sum(), active.sum()
    table = [[both, n_said - both], [n_active - both, 80 - n_said - n_active + both]]
    found = fc.fisher_p(int(both), int(n_said), int(n_active), 80)
    expected = scipy.stats.fisher_exact(table, "greater").pvalue
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("both", "n_said", "n_active"),
    [(2000, 3000, 4000), (2500, 3000, 4000), (2900, 3000, 4000), (0, 0, 9), (5, 5000, 5)],
)
def test_fisher_p_at_the_edges(both, n_said, n_active):
    expected = scipy.stats.hypergeom.sf(both - 1, 5000, n_said, n_active)
    found = fc.fisher_p(both, n_said, n_active, 5000)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-300)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (5, 0), (3, 3), (40, 24), (64, 0)])
def test_sign_test_p_is_scipys(wins, losses):
    expected = 1.0
    if wins + losses:
        expected = scipy.stats.binomtest(wins, wins + losses, 0.5, "greater").pvalue
    assert fc.sign_test_p(wins, losses) == pytest.approx(expected, rel=1e-9)


def delong_by_hand(scores: np.ndarray, at: np.ndarray) -> float:
    """The definition, pair by pair."""
    own, others = scores[at], np.delete(scores, at)
    wins = np.zeros((len(own), len(others)))
    for i, j in np.ndindex(wins.shape):
        wins[i, j] = (own[i] > others[j]) + 0.5 * (own[i] == others[j])
    v10, v01 = wins.mean(1), wins.mean(0)
    return v10.var(ddof=1) / len(own) + v01.var(ddof=1) / len(others)


@pytest.mark.parametrize(
    ("seed", "share", "ties"), list(itertools.product([0, 1], [0.05, 0.3, 0.9], [False, True]))
)
def test_delong_variance_by_its_definition(seed, share, ties):
    scores, at = draw(seed, 120, share, ties, shift=0.7)
    found, _ = fc.delong_variance(fh.ranks_of(scores, at))
    assert found == pytest.approx(delong_by_hand(scores, at), rel=1e-9)


def test_delong_variance_of_labels():
    """Two values only, so that all but a few pairs tie."""
    rng = np.random.default_rng(0)
    scores = (rng.random(150) < 0.3).astype(np.float32)
    at = np.arange(0, 150, 6)
    found, _ = fc.delong_variance(fh.ranks_of(scores, at))
    assert found == pytest.approx(delong_by_hand(scores, at), rel=1e-9)


def test_delong_variance_without_errors_is_exactly_zero():
    scores = np.arange(50, dtype=np.float32)
    assert fc.delong_variance(fh.ranks_of(scores, np.arange(40, 50)))[0] == 0
    assert fc.delong_variance(fh.ranks_of(scores, np.arange(10)))[0] == 0
    assert fc.delong_variance(fh.ranks_of(np.zeros(50), np.arange(10)))[0] == 0


def test_degrees_of_freedom_are_scipys():
    """Brunner and Munzel's test rests on the same variance, and on Student's t with these."""
    scores, at = draw(0, 80, 0.15, False, shift=0.7)
    own, others = scores[at], np.delete(scores, at)
    test = scipy.stats.brunnermunzel(others, own, distribution="t", alternative="less")
    variance, freedom = fc.delong_variance(fh.ranks_of(scores, at))
    auroc = fh.ranks_of(scores, at).auroc
    t = (auroc - 0.5) / math.sqrt(variance)
    assert test.statistic == pytest.approx(t, rel=1e-9)
    assert test.pvalue == pytest.approx(scipy.stats.t.sf(t, freedom), rel=1e-9)


@pytest.mark.parametrize("freedom", [5, 7, 12, 40, 1000])
def test_quantiles_of_students_t(freedom):
    found = fc.student_near(np.array([float(freedom), np.inf]))
    assert found[0] == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)
    assert found[1] == fc.NEAR


def interval_of(scores: np.ndarray, at: np.ndarray) -> tuple[float, float]:
    low, high = fc.auroc_interval([fh.ranks_of(scores, at)])
    return float(low[0]), float(high[0])


@pytest.mark.parametrize("ties", [False, True])
def test_intervals_are_as_wide_as_the_bootstraps(ties):
    scores, at = draw(0, 400, 0.15, ties, shift=1.0)
    rng, active = np.random.default_rng(1), active_of(scores, at)
    resampled = []
    for drawn in rng.integers(400, size=(800, 400)):
        resampled.append(sklearn.metrics.roc_auc_score(active[drawn], scores[drawn]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    expected = pytest.approx([low, high], abs=0.15 * (high - low))
    assert list(interval_of(scores, at)) == expected


def newcombe_outside(auroc: float, t: float, m: int, n: int) -> float:
    """How far t lies outside of the interval, in the defining equation; 0 at its ends."""
    half = (m + n) / 2 - 1
    q = 1 + half * ((1 - t) / (2 - t) + t / (1 + t))
    return (auroc - t) ** 2 - fc.NEAR**2 * t * (1 - t) * q / (m * n)


@pytest.mark.parametrize("auroc", [0.3, 0.5, 0.87, 0.99])
def test_ends_of_newcombes_interval_solve_its_equation(auroc):
    low, high = fc.newcombe_interval(np.array([auroc]), np.array([12.0]), np.array([300.0]))
    assert 0 < low[0] < auroc < high[0] < 1
    assert newcombe_outside(auroc, low[0], 12, 300) == pytest.approx(0, abs=1e-9)
    assert newcombe_outside(auroc, high[0], 12, 300) == pytest.approx(0, abs=1e-9)


def test_newcombes_interval_at_the_ends():
    one, m, n = np.array([1.0, 0.0]), np.array([8.0, 8.0]), np.array([4992.0, 4992.0])
    low, high = fc.newcombe_interval(one, m, n)
    assert newcombe_outside(1.0, low[0], 8, 4992) == pytest.approx(0, abs=1e-9)
    assert low[0] < 0.95
    assert high[0] == pytest.approx(1, abs=1e-9)
    assert low[1] == pytest.approx(0, abs=1e-9)
    assert high[1] == pytest.approx(1 - low[0], abs=1e-9)


@pytest.mark.parametrize("at", [range(40, 50), range(10)])
def test_perfect_rankings_have_wide_intervals(at):
    low, high = interval_of(np.arange(50, dtype=np.float32), np.array(at))
    assert 0.05 < high - low < 0.5


def test_equal_scores_have_wide_intervals():
    low, high = interval_of(np.zeros(50, dtype=np.float32), np.arange(10))
    assert low < 0.4
    assert high > 0.6


def test_a_nearly_perfect_ranking_claims_no_more_than_a_perfect_one():
    scores = np.arange(500, dtype=np.float32)
    perfect = interval_of(scores, np.arange(490, 500))
    nearly = interval_of(scores, np.array([*range(490, 499), 488]))
    assert nearly[0] <= perfect[0]
    assert nearly[1] <= 1


def coverage(sample, truth: float, repetitions: int = REPETITIONS) -> float:
    """Share of the intervals of drawn (scores, at) that cover the true AUROC."""
    rng = np.random.default_rng(0)
    ranks = [fh.ranks_of(*sample(rng)) for _ in range(repetitions)]
    low, high = fc.auroc_interval(ranks)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("m", [8, 30, 120])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.99])
def test_coverage_of_auroc_intervals(m, truth):
    """Normal scores; where the AUROC is large, many of the rankings are perfect or nearly so."""
    shift, n = math.sqrt(2) * scipy.stats.norm.ppf(truth), 300

    def sample(rng):
        scores = rng.normal(size=m + n)
        scores[:m] += shift
        return scores.astype(np.float32), np.arange(m)

    assert coverage(sample, truth) >= 0.92


@pytest.mark.parametrize(("said_active", "said_others"), [(0.6, 0.2), (0.95, 0.05), (1.0, 0.3)])
def test_coverage_of_intervals_of_labels(said_active, said_others):
    def sample(rng):
        share = np.where(np.arange(520) < 20, said_active, said_others)
        return (rng.random(520) < share).astype(np.float32), np.arange(20)

    truth = (said_active + 1 - said_others) / 2
    assert coverage(sample, truth) >= 0.92


def test_outliers_unseen_are_allowed_for():
    """Most active images rank on top, one in twenty ranks anywhere: few samples show one."""

    def sample(rng):
        scores = rng.random(312)
        scores[:12] += rng.random(12) > 0.05
        return scores.astype(np.float32), np.arange(12)

    assert coverage(sample, 1 - 0.05 / 2) >= 0.93


# --- Intervals of edits ---------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (81, 263), (15, 148)])
def test_wilson_is_scipys(count, n):
    expected = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
    assert fc.wilson_interval(count, n) == pytest.approx(tuple(expected), abs=1e-6)


def paired(both: int, only_named: int, only_elsewhere: int, neither: int) -> fc.EditTest:
    n = both + only_named + only_elsewhere + neither
    named, elsewhere = both + only_named, both + only_elsewhere
    return fc.EditTest(n, named, elsewhere, only_named, only_elsewhere)


def test_newcombes_method_10_by_hand():
    """Of 161 patients, 59 responded both before and after consolidation, 6 only before, 16 only
    after, 80 never (Cavo et al. 2012): -0.0621 (-0.1186 to -0.0046) in Fagerland, Lydersen & Laake,
    Statistical Analysis of Contingency Tables (2017), chapter 8."""
    found = paired(59, 6, 16, 80).contrast(1.0)
    assert found == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)


def by_formula(t: fc.EditTest, times: float) -> tuple[float, float]:
    """MOVER written out, with the correlation of method 10."""
    a = t.named - t.only_named
    b, c = t.only_named, t.only_elsewhere
    d = t.n - a - b - c
    cross = a * d - b * c
    if cross > 0:
        cross = max(cross - t.n / 2, 0)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = cross / margins**0.5 if margins else 0.0
    p, q = (a + b) / t.n, (a + c) / t.n
    ci_p = scipy.stats.binomtest(a + b, t.n).proportion_ci(method="wilson")
    ci_q = scipy.stats.binomtest(a + c, t.n).proportion_ci(method="wilson")
    down, up = p - ci_p.low, ci_p.high - p
    down_q, up_q = times * (q - ci_q.low), times * (ci_q.high - q)
    low = p - times * q - (down**2 - 2 * phi * down * up_q + up_q**2) ** 0.5
    return low, p - times * q + (up**2 - 2 * phi * up * down_q + down_q**2) ** 0.5


TABLES = [
    (14, 5, 0, 22),
    (1, 1, 7, 12),
    (0, 0, 0, 64),
    (64, 0, 0, 0),
    (32, 0, 0, 32),
    (0, 64, 0, 0),
]


@pytest.mark.parametrize("cells", TABLES)
@pytest.mark.parametrize("times", [1.0, 2.0])
def test_contrast_by_its_formula(cells, times):
    test = paired(*cells)
    value, low, high = test.contrast(times)
    assert value == pytest.approx((test.named - times * test.elsewhere) / test.n)
    assert (low, high) == pytest.approx(by_formula(test, times), abs=1e-6)
    assert high - low > 0.01


def test_no_excess_has_an_interval_of_width_0():
    for a, b, c in itertools.product(range(9), repeat=3):
        if a + b + c <= 8:
            value, low, high = paired(a, b, c, 8 - a - b - c).excess(2.0, 0.25)
            assert low <= value <= high
            assert high - low > 0.05


def test_excess_asks_for_the_harder_of_two_things():
    test = fc.EditTest(n=10, named=6, elsewhere=3, only_named=5, only_elsewhere=2)
    assert test.excess(2.0, 0.25) == test.contrast(2.0)
    assert test.excess(2.0, 0.25)[0] == pytest.approx(0.0)
    seldom = fc.EditTest(n=10, named=2, elsewhere=1, only_named=1, only_elsewhere=0)
    low, high = fc.wilson_interval(2, 10)
    expected = (0.2 - 0.25, low - 0.25, high - 0.25)
    assert seldom.excess(2.0, 0.25) == pytest.approx(expected)
    nothing = fc.EditTest(64, 0, 0, 0, 0)
    assert nothing.excess(2.0, 0.25)[0] < 0  # an edit that does nothing has not held


@pytest.mark.parametrize("times", [1.0, 2.0])
@pytest.mark.parametrize(
    "cells", [(0.1, 0.5, 0.05, 0.35), (0.3, 0.4, 0.0, 0.3), (0.02, 0.9, 0.01, 0.07)]
)
def test_coverage_of_contrasts(cells, times):
    rng = np.random.default_rng(0)
    truth = cells[0] + cells[1] - times * (cells[0] + cells[2])
    covered = []
    for counts in rng.multinomial(64, cells, size=REPETITIONS).tolist():
        _, low, high = paired(*counts).contrast(times)
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.93


def test_edit_tests_count_images():
    named = np.array([True, True, False, False, True])
    elsewhere = np.array([True, False, True, False, False])
    assert fc.EditTest.of(named, elsewhere) == fc.EditTest(5, 3, 2, 2, 1)
    assert fc.EditTest.of(named, elsewhere).p == fc.sign_test_p(2, 1)


# --- False positives ------------------------------------------------------------------------------


def nominal(p: list[float], discrete: bool) -> None:
    """Whether p-values under the null are below 0.05 and 0.01 as often as they say; less often
    where they come in steps. Three standard deviations are allowed."""
    for alpha in (0.05, 0.01):
        rate = np.mean(np.array(p) <= alpha)
        slack = 3 * math.sqrt(alpha * (1 - alpha) / REPETITIONS)
        assert rate <= alpha + slack
        assert discrete or rate >= alpha - slack


@pytest.mark.parametrize(("share", "ties"), [(0.01, False), (0.1, False), (0.1, True)])
def test_false_positives_of_detection(share, ties):
    """Activations shuffled over images."""
    seeds = range(REPETITIONS)
    p = [fc.rank_sum_p(fh.ranks_of(*draw(seed, 1000, share, ties))) for seed in seeds]
    nominal(p, discrete=False)


def test_false_positives_of_the_class_part():
    """Labels permuted."""
    rng, p = np.random.default_rng(0), []
    said, at = np.arange(1000) % 10 < 3, np.arange(100)
    for _ in range(REPETITIONS):
        p.append(fc.fisher_p(int(rng.permutation(said)[at].sum()), 300, 100, 1000))
    nominal(p, discrete=True)


def test_false_positives_of_edits():
    """Edits after which chance alone says whether the feature is active."""
    rng = np.random.default_rng(0)
    coins = rng.random((REPETITIONS, 2, 40)) < 0.4
    nominal([fc.EditTest.of(*pair).p for pair in coins], discrete=True)


class Planar(NamedTuple):
    W_dec: Tensor


class Turned(NamedTuple):
    """A linear head that first turns each image's preactivations by its own rotation."""

    turns: Tensor  # (n, d_in, d_in)

    def logits_from_preactivations(self, z):
        turns = self.turns.repeat(len(z) // len(self.turns), 1, 1)
        return torch.einsum("ni,nij->nj", z, turns)[:, :2]


def fires_on_all(acts: Tensor, n_images: int) -> fa.Activity:
    """One feature that fires on the first images."""
    n = len(acts)
    labels = torch.zeros(n_images, dtype=torch.int64)
    return fa.Activity(torch.tensor([0, n]), torch.arange(n), acts, labels)


def test_false_positives_of_effects():
    """A feature whose direction is, on every image, just another random direction."""
    d_in, n = 12, 40
    h = blank(0, effect=fh.Effect(0, 1.0, 1, 1.0), typical_activation=1.0)
    activity, sae = fires_on_all(torch.ones(n), n), Planar(W_dec=torch.eye(1, d_in))
    generator, p = torch.Generator().manual_seed(0), []
    for repetition in range(REPETITIONS):
        turns, _ = torch.linalg.qr(torch.randn(n, d_in, d_in, generator=generator))
        signs = torch.rand(n, 1, d_in, generator=generator) < 0.5
        model = Turned(turns * torch.where(signs, -1.0, 1.0))
        layer = fa.ExplainedLayer(model, sae, torch.zeros(d_in), torch.ones(d_in))
        test = fc.effect_test(h, layer, torch.zeros(n, d_in), activity, seed=repetition)
        p.append(test.p)
    nominal(p, discrete=True)


def test_false_discoveries_under_the_null():
    """Where every null is true, anything is discovered in a share q of the repetitions."""
    rng = np.random.default_rng(0)
    found = [fc.benjamini_hochberg(rng.random(200), 0.05).any() for _ in range(REPETITIONS)]
    slack = 3 * math.sqrt(0.05 * 0.95 / REPETITIONS)
    assert np.mean(found) == pytest.approx(0.05, abs=slack)


@pytest.mark.parametrize("seed", range(5))
def test_benjamini_hochberg_is_scipys(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.random(60), rng.random(40) ** 6]).round(3)  # ties included
    expected = scipy.stats.false_discovery_control(p, method="bh") <= 0.05
    assert 0 < expected.sum() < 100
    assert (fc.benjamini_hochberg(p, 0.05) == expected).all()


def test_benjamini_hochberg_of_nothing():
    assert fc.benjamini_hochberg([], 0.01).shape == (0,)


# --- A small world with planted strokes -----------------------------------------------------------


class World(NamedTuple):
    layer: fa.ExplainedLayer
    claims: list[fh.Hypothesis]
    seen: demo.Scene
    scene: demo.Scene  # on which claims are tested

    def evidence(self, claims=None, **options) -> list[fc.Evidence]:
        given = (self.layer, self.scene.images, self.scene.labels)
        return fc.test_hypotheses(claims or self.claims, *given, **options)

    def activity(self) -> fa.Activity:
        return fa.collect_activity(self.layer, self.scene.images, self.scene.labels)


@pytest.fixture(scope="module")
def world():
    plan = demo.make_plan(demo.stroke_table(0))
    layer, seen = demo.plant(plan), demo.draw_labelled(plan, 0)
    claims = fh.propose_hypotheses(layer, seen.images, seen.labels)
    return World(layer, claims, seen, demo.draw_labelled(plan, 1))


@pytest.fixture(scope="module")
def trial(world):
    evidence, aside = world.evidence(), world.evidence(seed=1)
    return fc.make_trial(world.claims, fh.Rule(), evidence, aside, world.activity())


def blank(feature: int, **parts) -> fh.Hypothesis:
    nothing = fh.Hypothesis(feature, None, None, None, 0.0, 0.0, (0,) * 10, 0, {})
    return nothing._replace(**parts)


def test_planted_strokes_are_confirmed(world):
    judgements = fc.judge_hypotheses(world.claims, world.evidence())
    assert sum(j.all_three for j in judgements) >= 14
    assert sum(j.confidence == "High" for j in judgements) >= 13


def confirmed(claims, evidence) -> float:
    judgements = fc.judge_hypotheses(claims, evidence)
    return sum(j.verdict == fc.CONFIRMED for j in judgements) / len(judgements)


def test_another_features_statement_is_not_confirmed(world):
    """Each claim is tested as if it were about the next feature, and the one after."""
    n = len(world.claims)
    for shift in (1, 2):
        moved = [h._replace(feature=(h.feature + shift) % n) for h in world.claims]
        assert confirmed(moved, world.evidence(moved)) == 0


def test_statements_about_shuffled_activations_are_not_confirmed(world):
    activity, rng = world.activity(), np.random.default_rng(0)
    counts, n = activity.n_active.tolist(), len(world.scene.labels)
    images = [np.sort(rng.choice(n, count, replace=False)) for count in counts]
    mixed = activity._replace(image=torch.from_numpy(np.concatenate(images)))
    evidence = world.evidence(activity=mixed)
    judgements = fc.judge_hypotheses(world.claims, evidence)
    verdicts = [j.tests[part] for j in judgements for part in ("class", "stroke", "both")]
    assert fc.CONFIRMED not in verdicts
    assert not any(j.verdict == fc.CONFIRMED for j in judgements)


def test_class_parts_are_not_confirmed_when_labels_are_permuted(world):
    claims = [h._replace(stroke=None, effect=None) for h in world.claims if h.labels]
    order = torch.randperm(len(world.scene.labels), generator=torch.Generator().manual_seed(0))
    images, labels = world.scene.images, world.scene.labels[order]
    assert confirmed(claims, fc.test_hypotheses(claims, world.layer, images, labels)) == 0


def test_testing_repeats_itself_and_changes_nothing(world):
    scene = world.scene
    before = [tensor.clone() for tensor in (scene.images, scene.labels)]
    state = torch.random.get_rng_state()
    assert world.evidence() == world.evidence()
    assert torch.equal(state, torch.random.get_rng_state())
    after = (scene.images, scene.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_feature_is_tested_alike_whoever_is_tested_beside_it(world):
    everything = world.evidence()
    assert world.evidence(world.claims[3:]) == everything[3:]
    assert world.evidence(world.claims[7:8]) == everything[7:8]
    assert world.evidence(world.claims[::-1]) == everything[::-1]


def test_detection_by_scikit_learn(world):
    """The numbers in the evidence are those of the scores."""
    activity = world.activity()
    evidence = {e.feature: e for e in world.evidence()}
    scored = fh.part_scores(world.claims, world.scene.images, world.scene.labels)
    for h, scores in scored:
        active = activity.is_active(h.feature)
        assert set(evidence[h.feature].detected) == set(scores)
        for part, values in scores.items():
            d = evidence[h.feature].detected[part]
            auroc = sklearn.metrics.roc_auc_score(active, values)
            precision = sklearn.metrics.average_precision_score(active, values)
            assert (d.auroc, d.average_precision) == pytest.approx((auroc, precision), abs=1e-9)
            assert d.auroc_low < d.auroc < d.auroc_high or d.auroc == 1


def test_a_claim_about_labels_alone_has_fishers_p(world):
    h = blank(0, labels=world.claims[0].labels)
    (evidence,) = world.evidence([h])
    active = world.activity().is_active(0)
    said = np.isin(world.scene.labels.numpy(), h.labels)
    table = [[(said & active).sum(), (said & ~active).sum()]]
    table += [[(~said & active).sum(), (~said & ~active).sum()]]
    expected = scipy.stats.fisher_exact(table, "greater").pvalue
    assert evidence.detected["class"].p == pytest.approx(expected, rel=1e-6)
    assert evidence.detected["both"] == evidence.detected["class"]


# --- Edits ----------------------------------------------------------------------------------------


def moved_ink(named: Tensor, elsewhere: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """What `edit` adds to blank pictures of as much paper, row by row."""
    parts = []
    for mine, other, draw in zip(named, elsewhere, where, strict=True):
        available, is_named = (mine + other)[None], (mine > 0).float()
        move = fc.Move(1, available, is_named, 1 - is_named)
        parts.append(fc.edit(torch.zeros(1, 784), [move], draw[None, None]))
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])


def test_matched_edits_move_the_same_ink_each_in_its_place():
    generator = torch.Generator().manual_seed(0)
    available = torch.rand(40, 784, generator=generator)
    share = torch.linspace(0, 1, 40)[:, None]  # from none named to all
    mask = torch.rand(40, 784, generator=generator) < share
    named, elsewhere = available * mask, available * ~mask
    a, b = moved_ink(named, elsewhere, torch.rand(40, generator=generator))
    least = torch.minimum(named.sum(1), elsewhere.sum(1))
    torch.testing.assert_close(a.sum(1), b.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.sum(1), least, rtol=1e-4, atol=1e-3)
    for edit, there in ((a, named), (b, elsewhere)):
        assert (edit >= 0).all()
        assert (edit <= there + 1e-5).all()


def patch_by_hand(elsewhere: list[float], amount: float, draw: float) -> list[float]:
    """Pixel by pixel, by their squared distance from the centre and then by their number."""
    target, so_far, centre = draw * sum(elsewhere), 0.0, 783
    for pixel, ink in enumerate(elsewhere):
        so_far += ink
        if so_far > target:
            centre = pixel
            break
    row, col = divmod(centre, 28)
    near = sorted(range(784), key=lambda p: ((p // 28 - row) ** 2 + (p % 28 - col) ** 2, p))
    patch, left = [0.0] * 784, amount
    for pixel in near:
        patch[pixel] = min(left, elsewhere[pixel])
        left -= patch[pixel]
    return patch


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_the_patch_elsewhere_by_hand(density):
    """From patches of a few pixels to some that need more than the nearest PATCH_PIXELS."""
    generator = torch.Generator().manual_seed(1)
    ink = torch.rand(12, 784, generator=generator)
    ink = ink * (torch.rand(12, 784, generator=generator) < density)
    named = torch.zeros(12, 784)
    named[:, :80] = torch.linspace(0.1, 1.0, 12)[:, None]
    ink[:, :80] = 0
    draws = torch.rand(12, generator=generator)
    _, patches = moved_ink(named, ink, draws)
    for row, patch in enumerate(patches):
        amount = min(float(named[row].sum()), float(ink[row].sum()))
        expected = patch_by_hand(ink[row].tolist(), amount, float(draws[row]))
        assert patch.numpy() == pytest.approx(np.array(expected), abs=1e-4)


def test_edits_elsewhere_leave_named_pixels_alone():
    x = torch.rand(5, 784, generator=torch.Generator().manual_seed(0))
    named = (torch.arange(784) < 300).float()
    other = 1 - named
    other[500:] = 0  # blank margins
    move = fc.Move(-1, x, named, other)
    erased, elsewhere = fc.edit(x, [move], torch.full((1, 5), 0.5))
    assert torch.equal(erased[:, 300:], x[:, 300:])
    assert torch.equal(elsewhere[:, :300], x[:, :300])
    assert torch.equal(elsewhere[:, 500:], x[:, 500:])
    assert (erased >= -1e-6).all()
    assert (elsewhere >= -1e-6).all()


def test_two_moves_are_made_of_the_picture_as_it_was():
    x = torch.full((1, 784), 0.5)
    first, second = torch.zeros(784), torch.zeros(784)
    first[:10], second[10:20] = 1, 1
    other = 1 - first - second
    moves = [fc.Move(1, 1 - x, first, other), fc.Move(-1, x, second, other)]
    named, elsewhere = fc.edit(x, moves, torch.tensor([[0.5], [0.5]]))
    assert named[0, :10].tolist() == pytest.approx([1.0] * 10)
    assert named[0, 10:20].tolist() == pytest.approx([0.0] * 10)
    torch.testing.assert_close(elsewhere, x)  # the same patch was inked and cleared


def test_erasing_and_painting_by_hand(world):
    """The stroke named is the one the feature reads: erased it is off, painted it is on; ink
    elsewhere does nothing."""
    k = demo.CENTRES.index((10, 10))
    assert demo.stroke_table(0)[k].name.startswith("rising")
    stroke = fh.Stroke((fh.Place(9, 11, "rising", 7),), (1.0,))
    (evidence,) = world.evidence([world.claims[k]._replace(stroke=stroke)])
    assert evidence.erasing.elsewhere == 0
    assert evidence.painting.named == 64
    assert evidence.painting.elsewhere <= 4  # where a patch grows over the rest of the stroke
    wrong = fh.Stroke((fh.Place(23, 23, "rising", 7),), (1.0,))
    (evidence,) = world.evidence([world.claims[k]._replace(stroke=wrong)])
    assert evidence.erasing.named == 0
    assert evidence.painting.named == 0


class Absence(NamedTuple):
    W_enc: Tensor = torch.eye(1)
    W_dec: Tensor = torch.eye(1)

    def encode(self, z):
        return z.clamp(min=0)


class EmptyDot:
    """Active where a dot in the centre has little ink."""

    mask = fh.place_masks([fh.Place(13, 13, "dot", 5)])[0].flatten().float()

    def preactivations(self, images):
        return 0.5 - (images.flatten(1) @ self.mask / self.mask.sum())[:, None]

    def logits_from_preactivations(self, z):
        return torch.cat([z, -z], 1)


def test_ink_painted_where_none_may_be_turns_a_feature_off():
    """A claim that names only empty places."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 1, 28, 28, generator=generator) * 0.2
    images[100:, :, 11:16, 11:16] = 1.0
    h = blank(0, stroke=fh.Stroke((fh.Place(13, 13, "dot", 5),), (-1.0,)))
    labels = torch.zeros(200, dtype=torch.int64)
    layer = fa.ExplainedLayer(EmptyDot(), Absence(), torch.zeros(1), torch.ones(1))
    (evidence,) = fc.test_hypotheses([h], layer, images, labels)
    assert evidence.erasing == fc.EditTest(64, 64, 0, 64, 0)
    assert evidence.painting == fc.EditTest(64, 64, 0, 64, 0)
    assert evidence.detected["stroke"].auroc == 1.0
    assert evidence.detected["stroke"].auroc_low < 1.0


# --- Effects --------------------------------------------------------------------------------------

HEAD = torch.tensor([[2.0, -1.0], [0.0, 3.0], [1.0, 1.0]])


class Linear:
    def logits_from_preactivations(self, z):
        return z @ HEAD


def linear_effect(claim: fh.Effect) -> fc.EffectTest:
    n, acts = 40, torch.linspace(1, 3, 40)
    sae, std = Planar(W_dec=torch.tensor([[1.0, 0.0, 0.0]])), torch.tensor([0.5, 0.1, 0.1])
    layer = fa.ExplainedLayer(Linear(), sae, torch.zeros(3), std)
    h = blank(0, effect=claim, typical_activation=2.0)
    raw = torch.randn(n + 5, 3, generator=torch.Generator().manual_seed(0))
    return fc.effect_test(h, layer, raw, fires_on_all(acts, n + 5))


def test_effects_by_closed_form():
    """A linear head: a change per unit is the same at every dose, the linear prediction exact."""
    test = linear_effect(fh.Effect(0, 1.0, 1, 0.25))
    assert test.n == 40
    assert test.raised_by == pytest.approx(2 * 0.5 * 2.0)  # mean activation, std, head weight
    assert test.lowered_by == pytest.approx(2 * 0.5 * 1.0)
    assert test.share == pytest.approx(2.0 / 1.0)  # 1.0 / 0.25 is more: the smaller counts
    spread = np.linspace(1, 3, 40).std(ddof=1)
    assert test.share_error == pytest.approx(spread / math.sqrt(40), rel=1e-4)
    assert test.dose_raises == pytest.approx([0, 1, 2, 4], abs=1e-5)
    assert test.dose_lowers == pytest.approx([0, -0.5, -1, -2], abs=1e-5)
    assert test.linear_raises == pytest.approx(test.dose_raises, abs=1e-4)
    assert test.linear_lowers == pytest.approx(test.dose_lowers, abs=1e-4)
    assert test.dose_follows
    assert test.only_named + test.only_random == 40
    assert test.only_named > 30  # random directions seldom do more


def test_effects_on_one_logit_alone():
    test = linear_effect(fh.Effect(None, 0.0, 1, 0.5))
    assert (test.raised_by, test.dose_raises, test.linear_raises) == (None, None, None)
    assert test.lowered_by == pytest.approx(1.0)
    assert test.share == pytest.approx(2.0)
    assert test.dose_lowers == pytest.approx([0, -0.5, -1, -2], abs=1e-5)


def test_a_curve_that_turns_back_does_not_follow():
    curve = (0.0, 1.0, 2.0, 1.5)
    test = fc.EffectTest(9, 1.0, None, 1.0, 0.1, 9, 0, fc.DOSES, curve, None, None, None)
    assert not test.dose_follows
    assert test._replace(dose_raises=(0.0, 1.0, 2.0, 2.5)).dose_follows
    falling = test._replace(dose_raises=None, dose_lowers=(0.0, -1.0, -2.0, -3.0))
    assert falling.dose_follows
    assert not falling._replace(dose_lowers=(0.0, -1.0, -2.0, -1.0)).dose_follows


# --- Judging --------------------------------------------------------------------------------------


def evidence_of(auroc: float, low: float, high: float, p: float, feature: int = 0) -> fc.Evidence:
    detected = fc.Detected(auroc, low, high, 0.5, p)
    parts = {"class": detected, "both": detected}
    return fc.Evidence(feature, 50, 1000, parts, None, None, None)


@pytest.mark.parametrize(
    ("auroc", "low", "high", "p", "verdict", "confidence"),
    [
        (0.95, 0.9, 0.97, 1e-6, fc.CONFIRMED, "High"),
        (0.95, 0.8, 0.97, 1e-6, fc.CONFIRMED, "Medium"),  # reaches below 0.85, the bar for both
        (0.95, 0.9, 0.97, 0.5, fc.INCONCLUSIVE, "Low"),  # not significant
        (0.84, 0.8, 0.9, 1e-6, fc.INCONCLUSIVE, "Medium"),  # the class part alone is confirmed
        (0.5, 0.45, 0.55, 0.5, fc.REFUTED, "Low"),
    ],
)
def test_verdicts(auroc, low, high, p, verdict, confidence):
    evidence = [evidence_of(auroc, low, high, p)]
    (judgement,) = fc.judge_hypotheses([blank(0, labels=(1,))], evidence)
    assert (judgement.verdict, judgement.confidence) == (verdict, confidence)
    assert not judgement.all_three


def test_an_effect_whose_doses_do_not_follow_is_not_confirmed():
    follows = linear_effect(fh.Effect(0, 1.0, 1, 0.25))
    turned = follows._replace(dose_raises=(0.0, 1.0, 2.0, 1.0))
    h = blank(0, effect=fh.Effect(0, 1.0, 1, 0.25))
    for test, verdict in ((follows, fc.CONFIRMED), (turned, fc.INCONCLUSIVE)):
        evidence = fc.Evidence(0, 50, 1000, {}, None, None, test)
        (judgement,) = fc.judge_hypotheses([h], [evidence])
        assert judgement.parts["effect"] == verdict


def test_p_values_are_corrected_over_all_features():
    claims = [blank(k, labels=(1,)) for k in range(100)]
    good, chance = evidence_of(0.95, 0.9, 0.99, 0.004), evidence_of(0.95, 0.9, 0.99, 0.9)
    alone = fc.judge_hypotheses(claims[:1], [good])
    among = fc.judge_hypotheses(claims, [good] + [chance] * 99)
    assert alone[0].verdict == fc.CONFIRMED
    assert among[0].verdict == fc.INCONCLUSIVE


def test_no_claim_and_too_few_images_are_legitimate():
    nothing = fc.Evidence(0, 3, 1000, {}, None, None, None)
    claims = [blank(0), blank(1, labels=(1,))]
    judgements = fc.judge_hypotheses(claims, [nothing, nothing._replace(feature=1)])
    assert [j.verdict for j in judgements] == [fc.NONE, fc.INCONCLUSIVE]
    assert [j.confidence for j in judgements] == ["Low", "Low"]
    assert fc.held(nothing) is None


def test_held_asks_for_values_not_for_significance():
    assert fc.held(evidence_of(0.86, 0.5, 0.9, 0.9)) is True
    assert fc.held(evidence_of(0.84, 0.8, 0.9, 1e-9)) is False


def test_features_that_hardly_fire_are_not_judged(world):
    """Evidence with too few images, in words, and without a NaN."""
    first = world.activity().of(0)[0][:5]  # images on which feature 0 is active
    images = torch.cat([world.scene.images[first], torch.zeros(50, 1, 28, 28)])
    labels = torch.cat([world.scene.labels[first], torch.zeros(50, dtype=torch.int64)])
    claims = world.claims[:1]
    evidence = fc.test_hypotheses(claims, world.layer, images, labels)
    (judgement,) = fc.judge_hypotheses(claims, evidence)
    found = (evidence[0].n_active, judgement.verdict, judgement.confidence)
    assert found == (5, fc.INCONCLUSIVE, "Low")
    line = fc.evidence_line(claims[0], evidence[0])
    assert "5 of 55 unseen images fire it: too few" in line
    shares = fc.shares_explained(evidence, [judgement])
    assert shares.median_auroc is None
    assert shares.median_density == pytest.approx(5 / 55)
    json.dumps(shares._asdict(), allow_nan=False)


def test_labels_missing_from_a_split(world):
    keep = world.scene.labels != world.claims[0].labels[0]
    images, labels = world.scene.images[keep], world.scene.labels[keep]
    evidence = fc.test_hypotheses(world.claims, world.layer, images, labels)
    assert evidence[0].detected["class"].auroc == 0.5  # no image has the label
    json.dumps([e._asdict() for e in evidence], allow_nan=False)
    judgements = fc.judge_hypotheses(world.claims, evidence)
    assert judgements[0].parts["class"] == fc.REFUTED


def test_images_of_another_size_keep_class_and_effect():
    layer, *given = banded_images()
    claims = fh.propose_hypotheses(layer, *given)
    for j in fc.judge_hypotheses(claims, fc.test_hypotheses(claims, layer, *given)):
        assert j.parts == {"class": fc.CONFIRMED, "stroke": fc.NONE, "effect": fc.CONFIRMED}


def test_unclear_requests_are_refused(world):
    layer, claims, _, scene = world
    with pytest.raises(ValueError, match="feature 0 has several hypotheses"):
        world.evidence([claims[0], claims[0]])
    with pytest.raises(IndexError, match="feature 99 does not exist"):
        world.evidence([blank(99)])
    some = (scene.images[:5], scene.labels[:5])
    with pytest.raises(ValueError, match="the activity is of 2400 images, but 5 were given"):
        fc.test_hypotheses(claims, layer, *some, world.activity())
    with pytest.raises(ValueError, match=r"strokes cannot be tested: pixels run from -1 to 1"):
        fc.test_hypotheses(claims, layer, 2 * scene.images - 1, scene.labels)
    odd = claims[0]._replace(stroke=fh.Stroke((fh.Place(4, 4, "dot", 5),), (1.0,)))
    with pytest.raises(ValueError, match="name places from there"):
        world.evidence([odd])


def test_confirmation_splits_take_every_other_image():
    images, labels = torch.arange(7), torch.arange(7) * 10
    judging, aside = fc.confirmation_splits(images, labels)
    assert judging[0].tolist() == [0, 2, 4, 6]
    assert judging[1].tolist() == [0, 20, 40, 60]
    assert aside[0].tolist() == [1, 3, 5]
    assert aside[1].tolist() == [10, 30, 50]


# --- Comparisons and stability --------------------------------------------------------------------


def test_matched_directions_fire_as_often_and_as_strongly():
    z = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    density, mean = torch.tensor([0.01, 0.1, 0.4]), torch.tensor([0.3, 2.0, 1.0])
    directions = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    features = fc.matched_directions(directions, z, density, mean)
    acts = features.encode(z)
    active = acts > 0
    assert active.float().mean(0).tolist() == pytest.approx(density.tolist(), abs=1 / 4000)
    assert (acts.sum(0) / active.sum(0)).tolist() == pytest.approx(mean.tolist(), rel=1e-3)
    assert features.W_dec.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_directions_fire_only_where_images_point_along_them():
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    directions, density = torch.tensor([[1.0, 0.0]]), torch.tensor([0.9])
    features = fc.matched_directions(directions, z, density, torch.tensor([3.0]))
    assert features.encode(z)[:, 0].tolist() == pytest.approx([2.0, 4.0, 0.0, 0.0])


def test_principal_directions_are_principal():
    scale = torch.tensor([1.0, 5.0, 2.0])
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * scale
    ends = fc.other_directions("principal directions", z, seed=0)
    strongest = ends.abs().argmax(1)
    assert strongest.tolist() == [1, 1, 2, 2, 0, 0]
    assert (ends[0] + ends[1]).abs().max() < 1e-6
    assert ends.gather(1, strongest[:, None])[::2].min() > 0  # the same end comes first


def test_neurons_are_taken_up_and_down():
    found = fc.other_directions("neurons", torch.zeros(5, 3), seed=4)
    rows = sorted(map(tuple, found.tolist()))
    eye = torch.eye(3)
    assert rows == sorted(map(tuple, torch.cat([eye, -eye]).tolist()))
    assert not torch.equal(found, fc.other_directions("neurons", torch.zeros(5, 3), seed=5))


def test_random_directions_point_everywhere():
    found = fc.other_directions("random directions", torch.zeros(5, 4), seed=0)
    assert found.shape == (fc.COMPARED, 4)
    assert found.mean(0).abs().max() < 0.3
    covariance = found.T @ found / fc.COMPARED
    assert covariance == pytest.approx(torch.eye(4), abs=0.35)


def test_unknown_directions_are_refused():
    with pytest.raises(ValueError, match="no directions of the kind 'apples'"):
        fc.other_directions("apples", torch.zeros(5, 4), seed=0)


@pytest.mark.parametrize("n", [40, 1000])
def test_what_is_compared_fires_at_the_saes_rates(n):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 8, generator=generator)
    density, mean = torch.rand(300, generator=generator) / 4, torch.ones(300)
    directions = torch.randn(n, 8, generator=generator)
    features = fc.at_the_same_rates(directions, z, density, mean)
    rates = (features.encode(z) > 0).float().mean(0)
    compared = min(n, fc.COMPARED)
    assert len(rates) == compared
    ranked = density.sort(descending=True).values
    expected = ranked[torch.linspace(0, 299, compared).round().long()]
    assert rates == pytest.approx(expected, abs=1 / 2000)
    unit = torch.nn.functional.normalize(directions[:compared], dim=1)
    assert features.W_dec == pytest.approx(unit, abs=1e-6)


def test_comparing_the_sae_with_itself_gives_its_own_shares(world, trial):
    """The very path of the features on trial; and what goes through a worker comes back."""
    layer, _, seen, scene = world
    given = (layer.sae, layer, (seen.images, seen.labels), (scene.images, scene.labels))
    sent = pickle.loads(pickle.dumps((*given, fh.Rule(), 0)))
    found = fc.compare_features(*sent)
    assert pickle.loads(pickle.dumps(found)) == found
    expected = fc.comparison_of(
        trial.evidence, fc.judge_hypotheses(world.claims, trial.evidence), fh.Rule()
    )
    assert found == expected
    assert found.shares.features == 15
    assert found.shares.explained >= 14 / 15


def test_shares_count_features_that_fire():
    judgement = fc.Judgement(
        0, {}, dict.fromkeys(fh.PARTS, fc.CONFIRMED), fc.CONFIRMED, "High", True
    )
    partly = judgement._replace(parts=judgement.parts | {"effect": fc.REFUTED}, all_three=False)
    evidence = [evidence_of(0.9, 0.8, 1.0, 0.1), evidence_of(0.7, 0.6, 0.8, 0.1)]
    silent = evidence[0]._replace(n_active=0)
    shares = fc.shares_explained([*evidence, silent], [judgement, partly, judgement])
    assert shares == fc.Shares(2, 0.5, 0.5, 0.8, 1.0, 1.0, 0.5, 0.05)
    assert fc.shares_explained([], []) == fc.Shares(0, 0, 0, None, 0, 0, 0, None)


# --- The trial, its records and words -------------------------------------------------------------


def test_a_trial_names_test_images(world, trial):
    activity = world.activity()
    for k, h in enumerate(world.claims):
        at, acts = activity.of(h.feature)
        strongest = at[torch.argsort(acts, descending=True, stable=True)[:10]]
        assert trial.firing[k] == (2 * strongest).tolist()
        on, off = trial.edited[k]
        assert set(on) <= set((2 * at).tolist())
        assert not set(off) & set((2 * at).tolist())
        assert len(on) == min(64, len(at))
        assert len(off) == 64
    assert trial.held_aside == [fc.held(e) for e in world.evidence(seed=1)]


def test_record_of_a_trial(trial):
    shares = fc.Shares(10, 0.4, 0.9, 0.95, 0.8, 0.7, 0.6, 0.01)
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares, [0.9])}, "abc")
    assert set(record) == {"sha256", "rule", "confidence_rule", "shares", "confidence"}
    assert record["sha256"] == "abc"
    assert list(record["shares"]) == ["SAE", "neurons"]
    assert record["shares"]["neurons"] == shares._asdict()
    for name, c in record["confidence"].items():
        pairs = zip(trial.judgements, trial.held_aside, strict=True)
        again = [h for j, h in pairs if j.confidence == name]
        assert c["statements"] == c["checked"] == len(again)
        assert c["held"] == (sum(again) / len(again) if again else None)
    json.dumps(record, allow_nan=False)


def test_record_of_a_statement(world, trial):
    record = fc.statement_record(5, trial)
    e = trial.evidence[5]
    assert record["statement"] == fh.statement(world.claims[5])
    assert record["hypothesis"] == fh.hypothesis_record(world.claims[5])
    assert record["evidence"]["erasing"] == e.erasing._asdict() | {"p": e.erasing.p}
    assert record["evidence"]["detected"]["both"] == e.detected["both"]._asdict()
    assert record["evidence"]["edited_images"]["firing"] == trial.edited[5][0]
    json.dumps(record, allow_nan=False)


def test_a_statement_that_was_not_tested_has_a_record(world):
    few = fc.Evidence(0, 2, 2400, {}, None, None, None)
    claims = [world.claims[0]]
    trial = fc.make_trial(claims, fh.Rule(), [few], [few], world.activity())
    record = fc.statement_record(0, trial)
    assert record["measured"] == []
    assert record["evidence"]["edited_images"] is None
    assert record["evidence"]["held_aside"] is None
    assert "on images set aside: too few images to see" in "\n".join(fc.feature_lines(0, trial))


def test_every_measurement_is_told(world, trial):
    h, e, j = world.claims[0], trial.evidence[0], trial.judgements[0]
    text = "\n".join(fc.feature_lines(0, trial))
    strict = fc.measured_lines(h, e, j, fh.Rule(effect_share=0.75))
    assert any("bar 0.75" in line for line in strict)
    d, erasing, painting = e.detected["stroke"], e.erasing, e.painting
    elsewhere = f"as much ink elsewhere on {erasing.elsewhere}; "
    for words in (
        f"### Feature 0: {fh.statement(h)}",
        f"AUROC {d.auroc:.3f} [{d.auroc_low:.3f}, {d.auroc_high:.3f}]",
        f"average precision {d.average_precision:.3f}",
        f"turns it off on {erasing.named} of {erasing.n} images, {elsewhere}",
        f"turns it on on {painting.named} of {painting.n}",
        f"by {e.effect.raised_by:.3f} (predicted {h.effect.raised_by:.3f})",
        f"{e.effect.dose_raises[3]:+.3f} (linear",
        "Confidence: **High**; verdict confirmed; on images set aside: held",
        f"#{trial.firing[0][0]}, #{trial.firing[0][1]}",
    ):
        assert words in text


def test_the_whole_report(world, trial):
    shares = fc.Shares(10, 0.4, 0.9, 0.95, 0.8, 0.7, 0.6, 0.01)
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares, [])}, "abc")
    text = fc.statements_markdown(trial, record, "20 of 15")
    assert text.startswith("# What the features mean: 20 of 15\n")
    assert "made from 2,400 validation images" in text
    assert f"The {len(world.scene.labels):,} with odd numbers" in text
    assert "SHA-256 of hypotheses.json: `abc`" in text
    assert "| neurons | 10 | 1.00% | 40% | 80% | 70% | 60% | 90% |" in text
    assert "{" not in text.split("## Feature by feature")[0]
    sections = [line for line in text.splitlines() if line.startswith("### Feature ")]
    order = fc.best_first(trial.judgements, trial.evidence)
    assert [int(line.split()[2].rstrip(":")) for line in sections] == order


def test_the_terminals_tables(trial):
    shares = fc.Shares(10, 0.4, 0.9, 0.95, 0.8, 0.7, 0.6, 0.01)
    record = fc.trial_record(trial, {"neurons": fc.Comparison(shares, [])}, "abc")
    record = json.loads(json.dumps(record))  # as it comes from summary.json
    record["confidence"]["Low"] = {"statements": 3, "checked": 0, "held": None}
    first, second = fc.statements_table(record).split("\n\n")
    rows = [line.split("  ") for line in first.splitlines()]
    assert rows[0][0] == "share of features that fire"
    assert first.splitlines()[0].split()[-2:] == ["SAE", "neurons"]
    assert first.splitlines()[1].split()[-1] == "40.0%"
    assert first.splitlines()[-1].startswith("predicted on unseen images")
    assert second.splitlines()[-1].split()[:2] == ["Low", "3"]
    assert second.splitlines()[-1].endswith("none seen")


def test_text_table():
    assert fc.text_table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_best_first():
    judgement = fc.Judgement(0, {}, {}, fc.CONFIRMED, "Medium", True)
    judgements = [
        judgement,
        judgement._replace(confidence="High"),
        judgement._replace(verdict=fc.REFUTED, confidence="Low"),
        judgement._replace(confidence="High"),
    ]
    evidence = [evidence_of(auroc, 0, 1, 0.1) for auroc in (0.99, 0.9, 0.99, 0.95)]
    assert fc.best_first(judgements, evidence) == [3, 1, 0, 2]


def test_the_picture_shows_every_source(trial):
    shares = fc.Shares(10, 0.4, 0.9, 0.95, 0.8, 0.7, 0.6, 0.01)
    silent = shares._replace(explained=0.0, median_density=None)
    others = {"neurons": fc.Comparison(shares, [0.9, 0.8]), "none": fc.Comparison(silent, [])}
    figure = fc.draw_explained(trial, others)
    left, right = figure.axes
    names = ["SAE", "neurons", "none"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == names
    curve = left.lines[1].get_xydata()
    assert curve.tolist() == [[0.8, 1.0], [0.9, 0.5], [1.0, 0.0]]
    own = 100 * fc.shares_explained(trial.evidence, trial.judgements).explained
    assert [bar.get_width() for bar in right.patches] == pytest.approx([0, 40, own])
    ticks = [tick.get_text() for tick in right.get_yticklabels()]
    assert ticks[:2] == ["none", "neurons\n(fire on 1.0%)"]
