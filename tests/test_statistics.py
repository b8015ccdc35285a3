"""Statistics against scipy, scikit-learn, published numbers, plain loops and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from saexplain import statistics as stats

CASES = list(itertools.product([0, 1, 2], [0.05, 0.3, 0.9], [False, True]))


def draw(seed: int, n: int, share: float, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores, rounded coarsely for ties, and indices of active images, shifted upwards."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.choice(n, max(1, round(share * n)), replace=False))
    scores = rng.normal(size=n)
    scores[at] += 0.6
    return (scores.round() if ties else scores).astype(np.float32), at


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_statistics_of_ranks_are_scikit_learns(seed, share, ties):
    scores, at = draw(seed, 300, share, ties)
    r, active = stats.ranks_of(scores, at), np.isin(np.arange(300), at)
    auroc = sklearn.metrics.roc_auc_score(active, scores)
    precision = sklearn.metrics.average_precision_score(active, scores)
    assert (r.auroc, stats.average_precision(r)) == pytest.approx((auroc, precision), abs=1e-12)
    (found,) = stats.score_detections([scores], [at])
    low, high = (end.item() for end in stats.auroc_interval([r]))
    assert found == (r.auroc, low, high, stats.average_precision(r))


@pytest.mark.parametrize("at", [[], [0, 1, 2, 3, 4]])
def test_ranks_need_active_and_inactive_images(at):
    with pytest.raises(ValueError, match=f"{len(at)} of 5 are active"):
        stats.ranks_of(np.arange(5), np.array(at, dtype=int))


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
        found, _ = stats.delong_variance(stats.ranks_of(values, at))
        assert found == pytest.approx(delong_by_hand(values, at), rel=1e-9)


def test_intervals_are_students_on_the_logit_scale():
    """Brunner and Munzel's test in scipy uses the same variance and degrees of freedom."""
    scores, at = draw(0, 80, 0.15, False)
    r = stats.ranks_of(scores, at)
    variance, freedom = stats.delong_variance(r)
    given = np.delete(scores, at), scores[at]
    test = scipy.stats.brunnermunzel(*given, distribution="t", alternative="less")
    t = (r.auroc - 0.5) / math.sqrt(variance)
    assert test.pvalue == pytest.approx(scipy.stats.t.sf(t, freedom), rel=1e-9)
    logit, slope = math.log(r.auroc / (1 - r.auroc)), 1 / (r.auroc * (1 - r.auroc))
    reach = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(variance) * slope
    expected = [1 / (1 + math.exp(-end)) for end in (logit - reach, logit + reach)]
    assert np.ravel(stats.auroc_interval([r])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("auroc", "m", "n"), [(0.3, 12, 300), (0.99, 12, 300), (1.0, 8, 4992)])
def test_ends_of_newcombes_interval_solve_its_equation(auroc, m, n):
    low, high = stats.newcombe_interval(*np.array([[auroc], [m], [n]], dtype=float))
    for t in (low[0], high[0]) if auroc < 1 else low:
        q = 1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        squared = stats.Z_95**2 * t * (1 - t) * q / (m * n)
        assert (auroc - t) ** 2 == pytest.approx(squared, abs=1e-9)
    assert 0 < low[0] < auroc <= high[0] + 1e-9 <= 1 + 2e-9
    mirrored = stats.newcombe_interval(*np.array([[1 - auroc], [m], [n]], dtype=float))
    assert [mirrored[0][0], mirrored[1][0]] == pytest.approx([1 - high[0], 1 - low[0]], abs=1e-9)


def test_perfect_rankings_and_equal_scores_have_wide_intervals():
    ramp, ends, equal = np.arange(500.0), (np.arange(490, 500), np.arange(10)), np.zeros(500)
    nearly = np.array([*range(490, 499), 488])
    ranks = [*(stats.ranks_of(ramp, at) for at in (*ends, nearly)), stats.ranks_of(equal, ends[1])]
    assert [stats.delong_variance(r)[0] > 0 for r in ranks] == [False, False, True, False]
    low, high = stats.auroc_interval(ranks)
    assert ((0.05 < high - low)[:2] & (high - low < 0.5)[:2]).all()
    assert low[2] <= low[0]  # a nearly perfect one gets no better bound than a perfect one
    assert (low[3] < 0.4) & (high[3] > 0.6)


@pytest.mark.parametrize("m", [8, 30, 120])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.99])
def test_coverage_of_auroc_intervals(m, truth):
    """Normal scores; where the AUROC is large, many of the rankings are perfect or nearly so."""
    rng, ranks = np.random.default_rng(0), []
    for _ in range(1000):
        scores = rng.normal(size=m + 300)
        scores[:m] += math.sqrt(2) * scipy.stats.norm.ppf(truth)
        ranks.append(stats.ranks_of(scores.astype(np.float32), np.arange(m)))
    low, high = stats.auroc_interval(ranks)
    assert np.mean((low <= truth) & (truth <= high)) >= 0.92


@pytest.mark.parametrize(("count", "n"), [(0, 5), (5, 5), (3, 6), (40, 64), (64, 64), (15, 148)])
def test_wilsons_intervals_are_scipys(count, n):
    expected = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
    assert stats.wilson_interval(count, n) == pytest.approx(tuple(expected), abs=1e-6)
