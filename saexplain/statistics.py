"""How well does a score predict which images are active? Numbers with their 95% intervals.

    r = ranks_of(scores, at)                 # scores (N,), indices (m,) of the active images
    r.auroc, average_precision(r)
    low, high = auroc_interval([r])          # one value for each Ranks
    score_detections([scores], [at])         # all of these at once: a list of Detection
    wilson_interval(count, n)                # of a share

Takes numpy arrays and counts; gives numbers. It knows nothing of features, images or hypotheses,
and imports nothing of this package.

Key: N images, m of them active, n = N - m inactive; K scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959964  # standard errors to either end of a 95% interval
BISECTIONS = 50  # halvings of [0, 1]: to 1e-15

# --------------------------------------------------------------------------------------------------
# How well do scores predict activity?
# --------------------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Positions of the scores of m active images, ascending, among all scores: (m,) each."""

    own_less: np.ndarray  # active images with a smaller score
    own_up_to: np.ndarray  # ... with one at most as large
    less: np.ndarray  # inactive images with a smaller score
    up_to: np.ndarray  # ... with one at most as large
    m: int
    n: int

    @property
    def auroc(self) -> float:
        """Share of (active, inactive) pairs with the larger score on the active image; a tie counts
        one half."""
        return int((self.less + self.up_to).sum()) / (2 * self.m * self.n)


def ranks_of(scores: np.ndarray, at: np.ndarray) -> Ranks:
    """The ranks of scores (N,) of which those at the indices `at` (m,) are of active images.

    Raises ValueError unless at least one image is active and one is not.
    """
    m, n = len(at), len(scores) - len(at)
    if m == 0 or n == 0:
        raise ValueError(
            f"at least one image must be active and one inactive, but {m} of {len(scores)} are "
            f"active"
        )
    own, ranked = np.sort(scores[at]), np.sort(scores)
    own_less, own_up_to = (np.searchsorted(own, own, side) for side in ("left", "right"))
    all_less, all_up_to = (np.searchsorted(ranked, own, side) for side in ("left", "right"))
    return Ranks(own_less, own_up_to, all_less - own_less, all_up_to - own_up_to, m, n)


def average_precision(r: Ranks) -> float:
    """Mean over active images of the share of active ones among all with at least their score."""
    hits, misses = r.m - r.own_less, r.n - r.less
    return float((hits / (hits + misses)).mean())


def delong_variance(r: Ranks) -> tuple[float, float]:
    """Variance of the AUROC (DeLong, DeLong & Clarke-Pearson 1988) and its degrees of freedom
    (Brunner & Munzel 2000).

    The variance is S10 / m + S01 / n, the sample variances of V10, the share of inactive images
    below an active one, and of V01, the share of active images above an inactive one; ties count
    one half. V10 follows from the ranks (Sun & Xu 2014).
    """
    below = (r.less + r.up_to) / (2 * r.n)
    s10 = float(((below - r.auroc) ** 2).sum()) / max(1, r.m - 1) / r.m
    # The squares of V01 are summed over pairs of active images instead of over the many inactive
    # ones: how many inactive images lie below both is decided by the lower image of the pair.
    higher, equal = r.m - r.own_up_to, r.own_up_to - r.own_less
    fourfold = 4 * higher * (r.less + r.up_to) + equal * (3 * r.less + r.up_to)
    squares = int(fourfold.sum()) / 4 / r.m**2
    s01 = max(0.0, squares - r.n * r.auroc**2) / max(1, r.n - 1) / r.n
    terms = s10**2 / max(1, r.m - 1) + s01**2 / max(1, r.n - 1)
    return s10 + s01, (s10 + s01) ** 2 / terms if terms else math.inf


def newcombe_interval(
    auroc: np.ndarray, m: np.ndarray, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Wilson-type 95% intervals (low, high) of AUROCs found on m active and n inactive images, (K,)
    each: method 5 of Newcombe (2006, Statistics in Medicine 25:559-573).

    They contain all t with |auroc - t| <= Z_95 sqrt(V(t)), where V is Hanley & McNeil's variance
    with the mean number of images on both sides. Their width is never 0.
    """

    def end(outside: float) -> np.ndarray:  # bisection between a value outside and the AUROC
        inside, out = auroc.copy(), np.full_like(auroc, outside)
        for _ in range(BISECTIONS):
            t = (out + inside) / 2
            inflation = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
            variance = t * (1 - t) * (1 + inflation) / (m * n)
            far = (auroc - t) ** 2 > Z_95**2 * variance
            out, inside = np.where(far, t, out), np.where(far, inside, t)
        return (out + inside) / 2

    return end(0.0), end(1.0)


def auroc_interval(ranks: Sequence[Ranks]) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals (low, high) of AUROCs, (K,) each: from DeLong's variance on the logit scale, as
    Perme & Manevski (2018, Statistical Methods in Medical Research) recommend.

    DeLong's variance is 0 where no pair is out of order, and far too small where a single one is:
    there Newcombe's interval is used, and no ranking gets a better bound than a perfect one.
    """
    from scipy.special import stdtrit  # takes 0.25 s to import, and only tests need it

    auroc = np.array([r.auroc for r in ranks])
    m, n = np.array([[r.m, r.n] for r in ranks], dtype=np.float64).reshape(-1, 2).T
    variance, freedom = np.array([delong_variance(r) for r in ranks]).reshape(-1, 2).T
    found = (variance > 0) & (auroc > 0) & (auroc < 1)
    safe = np.where(found, auroc, 0.5)
    logit = np.log(safe / (1 - safe))
    quantile = stdtrit(np.where(found, freedom, 1.0), 0.975)  # of Student's t
    reach = quantile * np.sqrt(variance) / (safe * (1 - safe))
    perfect, _ = newcombe_interval(np.ones_like(auroc), m, n)
    low = np.minimum(1 / (1 + np.exp(reach - logit)), perfect)
    high = np.maximum(1 / (1 + np.exp(-reach - logit)), 1 - perfect)
    wilson_low, wilson_high = newcombe_interval(auroc, m, n)
    return np.where(found, low, wilson_low), np.where(found, high, wilson_high)


class Detection(NamedTuple):
    """How well a score predicts activity."""

    auroc: float
    auroc_low: float  # 95% interval
    auroc_high: float
    average_precision: float


def score_detections(scores: Sequence[np.ndarray], active: Sequence[np.ndarray]) -> list[Detection]:
    """How well each of the scores (N,) predicts the active images, whose indices are `active` (m,).

    Raises ValueError like `ranks_of`.
    """
    ranks = [ranks_of(values, at) for values, at in zip(scores, active, strict=True)]
    low, high = auroc_interval(ranks)
    ends = zip(ranks, low.tolist(), high.tolist(), strict=True)
    return [Detection(r.auroc, a, b, average_precision(r)) for r, a, b in ends]


# --------------------------------------------------------------------------------------------------
# Counts
# --------------------------------------------------------------------------------------------------


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """95% interval of a share, count of n (Wilson 1927). Its width is never 0."""
    share, z2 = count / n, Z_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, center - reach), min(1.0, center + reach)
