"""The trial of claims: do they hold on images that nobody looked at when they were made?

    judging, aside = confirmation_splits(images, labels)
    evidence = test_hypotheses(hypotheses, layer, *judging)      # measurements and p-values
    judgements = judge_hypotheses(hypotheses, evidence)          # verdicts, by the frozen rule
    trial = make_trial(hypotheses, rule, evidence, evidence_aside, activity)

Takes frozen claims, a `fa.ExplainedLayer` and test images, and gives evidence, judgements, and the
tables, words and pictures about them. This room never makes a claim about the features on trial.
Only `compare_features`, which sends other features down the same path, has claims about those made.

Dimension key: N images, C classes, d_in preactivations, d_sae features, B edited images, 784 = 28 x
28 pixels; of one feature m active images and n others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
import feature_hypotheses as fh

if TYPE_CHECKING:  # half a second to import, and only drawing needs it
    from matplotlib.figure import Figure

NEAR = 1.959964  # standard errors to either end of a 95% interval

# --------------------------------------------------------------------------------------------------
# How well do scores predict activity?
# --------------------------------------------------------------------------------------------------


def average_precision(r: fh.Ranks) -> float:
    """Mean over active images of the share of active ones among all with at least its score."""
    hits, misses = r.m - r.own_less, r.n - r.less
    return float((hits / (hits + misses)).mean())


def rank_sum_p(r: fh.Ranks) -> float:
    """One-sided p-value that active images have larger scores, when activity is shuffled.

    Wilcoxon, Mann and Whitney's test in its normal approximation, variance corrected for ties,
    continuity by one half (Lehmann 1975, section 1.4). 1 when all scores are equal.
    """
    ends = np.flatnonzero(r.ranked[1:] != r.ranked[:-1]) + 1
    tied = np.diff(ends, prepend=0, append=len(r.ranked)).astype(np.float64)
    total, pairs = r.m + r.n, r.m * r.n
    variance = pairs / 12 * (total + 1 - (tied * (tied * tied - 1)).sum() / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc(((r.auroc - 0.5) * pairs - 0.5) / math.sqrt(2 * variance))


def fisher_p(both: int, n_said: int, n_active: int, n: int) -> float:
    """One-sided p-value that so many active images, `both`, are among the n_said of n images that
    carry a named label, when labels are permuted.

    Fisher's exact test: the upper tail of the hypergeometric distribution, term by term from the
    ratio of each to the one before.
    """

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    first = log_choose(n_said, both) + log_choose(n - n_said, n_active - both)
    first -= log_choose(n, n_active)
    k = np.arange(both, min(n_said, n_active))
    ratio = (n_said - k) * (n_active - k) / ((k + 1) * (n - n_said - n_active + k + 1))
    log_p = first + np.append(0.0, np.cumsum(np.log(ratio)))
    return min(1.0, float(np.exp(log_p).sum()))


def delong_variance(r: fh.Ranks) -> tuple[float, float]:
    """Variance of the AUROC (DeLong, DeLong & Clarke-Pearson 1988) from ranks (as Sun & Xu 2014),
    and its degrees of freedom (Brunner & Munzel 2000), which few active images make few.

    It is S10 / m + S01 / n, the sample variances of V10, the share of others below an active image,
    and of V01, the share of active images above another, ties one half. V10 is read off the ranks.
    The squares of V01 are summed over pairs of active images, without a look at the others: how
    many others lie below both is decided by the lower one of the pair.
    """
    below = (r.less + r.up_to) / (2 * r.n)
    s10 = float(((below - r.auroc) ** 2).sum()) / max(1, r.m - 1) / r.m
    higher, equal = r.m - r.own_up_to, r.own_up_to - r.own_less
    fourfold = 4 * higher * (r.less + r.up_to) + equal * (3 * r.less + r.up_to)
    squares = int(fourfold.sum()) / 4 / r.m**2
    s01 = max(0.0, squares - r.n * r.auroc**2) / max(1, r.n - 1) / r.n
    terms = s10**2 / max(1, r.m - 1) + s01**2 / max(1, r.n - 1)
    return s10 + s01, (s10 + s01) ** 2 / terms if terms else math.inf


def student_near(freedom: np.ndarray) -> np.ndarray:
    """97.5% quantile of Student's t, (K,): the expansion of Fisher & Cornish (1960), right to 0.2%
    from 5 degrees of freedom on."""
    z, v = NEAR, np.maximum(freedom, 1.0)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def newcombe_interval(
    auroc: np.ndarray, m: np.ndarray, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Wilson-type 95% intervals (low, high) of AUROCs found on m active images and n others, (K,)
    each: method 5 of Newcombe (2006, Statistics in Medicine 25:559-573).

    They hold all t with |auroc - t| <= NEAR sqrt(V(t)), where V is Hanley & McNeil's variance with
    the mean number of images on both sides. Their width is never 0.
    """

    def end(outside: float) -> np.ndarray:  # bisection between a value outside and the AUROC
        inside, out = auroc.copy(), np.full_like(auroc, outside)
        for _ in range(50):
            t = (out + inside) / 2
            spread = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
            variance = t * (1 - t) * (1 + spread) / (m * n)
            far = (auroc - t) ** 2 > NEAR**2 * variance
            out, inside = np.where(far, t, out), np.where(far, inside, t)
        return (out + inside) / 2

    return end(0.0), end(1.0)


def auroc_interval(ranks: Sequence[fh.Ranks]) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals (low, high) of AUROCs, (K,) each: from DeLong's variance on the logit scale, as
    Perme & Manevski (2018, Statistical Methods in Medical Research) recommend.

    DeLong's variance is 0 where no image is out of order, and far too small where a single one is:
    there Newcombe's interval stands, and no ranking may claim more than a perfect one can.
    """
    auroc = np.array([r.auroc for r in ranks])
    m, n = np.array([[r.m, r.n] for r in ranks], dtype=np.float64).reshape(-1, 2).T
    variance, freedom = np.array([delong_variance(r) for r in ranks]).reshape(-1, 2).T
    found = (variance > 0) & (auroc > 0) & (auroc < 1)
    safe = np.where(found, auroc, 0.5)
    logit = np.log(safe / (1 - safe))
    reach = student_near(freedom) * np.sqrt(variance) / (safe * (1 - safe))
    perfect, _ = newcombe_interval(np.ones_like(auroc), m, n)
    low = np.minimum(1 / (1 + np.exp(reach - logit)), perfect)
    high = np.maximum(1 / (1 + np.exp(-reach - logit)), 1 - perfect)
    wilson_low, wilson_high = newcombe_interval(auroc, m, n)
    return np.where(found, low, wilson_low), np.where(found, high, wilson_high)


class Detected(NamedTuple):
    """How well a part predicts activity."""

    auroc: float
    auroc_low: float  # 95% interval
    auroc_high: float
    average_precision: float
    p: float  # against chance: activity shuffled over images, or labels permuted


def detect(
    hypotheses: Sequence[fh.Hypothesis], images: Tensor, labels: Tensor, activity: fa.Activity
) -> dict[int, dict[str, Detected]]:
    """By feature, how well "class", "stroke" and "both" predict where it is active."""
    keys, ranks, p = [], [], []
    for h, scores in fh.part_scores(hypotheses, images, labels):
        at = activity.of(h.feature)[0].numpy()
        for part, values in scores.items():
            r = fh.ranks_of(values, at)
            keys.append((h.feature, part))
            ranks.append(r._replace(ranked=r.ranked[:0]))  # what is kept does not grow with N
            if values is scores.get("class"):
                p.append(fisher_p(int(values[at].sum()), int(values.sum()), r.m, r.m + r.n))
            else:
                p.append(rank_sum_p(r))
    found: dict[int, dict[str, Detected]] = {h.feature: {} for h in hypotheses}
    ends = zip(*(end.tolist() for end in auroc_interval(ranks)), strict=True)
    for (k, part), r, interval, chance in zip(keys, ranks, ends, p, strict=True):
        found[k][part] = Detected(r.auroc, *interval, average_precision(r), chance)
    return found


# --------------------------------------------------------------------------------------------------
# Do edits of the ink that is named turn the feature off and on?
# --------------------------------------------------------------------------------------------------

N_EDIT = 64  # active images, and as many silent ones, that are edited for a feature
PATCH_PIXELS = 256  # nearest pixels tried first for a patch; most need no more
EVER_INKED = 0.01  # a pixel inked on fewer images is left alone: blank margins would be too easy


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """95% interval of a share, count of n (Wilson 1927). Its width is never 0."""
    share, z2 = count / n, NEAR**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NEAR / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def sign_test_p(wins: int, losses: int) -> float:
    """One-sided exact p-value of so many wins or more when a win and a loss are equally likely."""
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


class EditTest(NamedTuple):
    """Edits of n images as the claim names them, and of as much ink elsewhere: on how many of them
    the feature's activity changed."""

    n: int
    named: int
    elsewhere: int
    only_named: int
    only_elsewhere: int

    @classmethod
    def of(cls, named: np.ndarray, elsewhere: np.ndarray) -> EditTest:
        """From whether activity changed on each image, (n,) bool each."""
        cells = np.bincount(2 * named + elsewhere, minlength=4).tolist()
        _, only_elsewhere, only_named, both = cells
        n_named, n_elsewhere = only_named + both, only_elsewhere + both
        return cls(len(named), n_named, n_elsewhere, only_named, only_elsewhere)

    @property
    def p(self) -> float:
        """Sign test: chance of this when naming makes no difference."""
        return sign_test_p(self.only_named, self.only_elsewhere)

    @property
    def phi(self) -> float:
        """Correlation of the two edits over images; a positive one is moved towards 0, by n / 2 in
        its numerator, as Newcombe's method 10 has it."""
        both, neither = self.named - self.only_named, self.n - self.named - self.only_elsewhere
        cross = both * neither - self.only_named * self.only_elsewhere
        if cross > 0:
            cross = max(0, cross - self.n / 2)
        unchanged = (self.n - self.named) * (self.n - self.elsewhere)
        return cross / math.sqrt(self.named * self.elsewhere * unchanged or 1)

    def contrast(self, times: float) -> tuple[float, float, float]:
        """Share changed as named minus `times` that elsewhere, and its 95% interval.

        Wilson's intervals of the two shares, squared and added: for times = 1 it is method 10 of
        Newcombe (1998, Statistics in Medicine 17:2635-2650), for others its generalisation MOVER,
        the method of variance estimates recovery (Zou & Donner 2008).
        """
        named, elsewhere = self.named / self.n, self.elsewhere / self.n
        low, high = wilson_interval(self.named, self.n)
        other_low, other_high = wilson_interval(self.elsewhere, self.n)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * self.phi * a * b + b * b))

        down = reach(named - low, times * (other_high - elsewhere))
        up = reach(high - named, times * (elsewhere - other_low))
        value = named - times * elsewhere
        return value, value - down, value + up

    def excess(self, times: float, least: float) -> tuple[float, float, float]:
        """By how much the share of images that changed as named exceeds `times` that elsewhere, or
        the share `least` if that is harder; and its 95% interval."""
        if times * self.elsewhere >= least * self.n:
            return self.contrast(times)
        low, high = wilson_interval(self.named, self.n)
        return self.named / self.n - least, low - least, high - least


@functools.cache
def _nearest_first() -> tuple[Tensor, Tensor]:
    """Numbers of all 784 pixels in the order of their distance from each, int64: the PATCH_PIXELS
    nearest (784, PATCH_PIXELS), and the rest (784, 784 - PATCH_PIXELS)."""
    row, col = np.divmod(np.arange(fh.SIDE**2), fh.SIDE)
    squared = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    order = torch.from_numpy(squared.astype(np.int16).argsort(axis=1, kind="stable"))
    return order[:, :PATCH_PIXELS].contiguous(), order[:, PATCH_PIXELS:].contiguous()


class Move(NamedTuple):
    """Ink to be moved on B images: where a claim names it, and as much elsewhere."""

    sign: int  # 1 adds ink, -1 removes it
    available: Tensor  # (B, 784) ink that can be moved at each pixel
    named: Tensor  # (784,) 1 at the pixels named, else 0
    other: Tensor  # (784,) 1 where elsewhere may be, else 0


def edit(x: Tensor, moves: Sequence[Move], where: Tensor) -> tuple[Tensor, Tensor]:
    """Images x (B, 784) edited as named, and edited elsewhere by as much ink.

    The edit elsewhere is a patch that grows around a pixel drawn with the probability of its share
    of the ink available there, by `where` (moves, B) in [0, 1). Where one of the two edits has less
    ink to move, both move that much.
    """
    named, elsewhere = x, x.clone()
    for move, draw in zip(moves, where, strict=True):
        ink, there = move.available * move.named, move.available * move.other
        total = there.cumsum(1)
        of_named, everything = ink.sum(1), total[:, -1]
        amount = torch.minimum(of_named, everything)
        share = move.sign * amount / of_named.clamp(min=1e-9)
        named = named + share[:, None] * ink

        target = (draw * everything)[:, None]
        centre = torch.searchsorted(total, target, right=True)[:, 0].clamp(max=fh.SIDE**2 - 1)
        _grow_patch(elsewhere, move.sign, there, amount, centre)
    return named, elsewhere


def _grow_patch(x: Tensor, sign: int, available: Tensor, amount: Tensor, centre: Tensor) -> None:
    """Move ink on x (B, 784) in place: what is available (B, 784), pixel by pixel by their distance
    from `centre` (B,), until it is `amount` (B,)."""
    near, far = _nearest_first()
    missing = _move_in_order(x, sign, available, amount, near.index_select(0, centre))
    rows = (missing > 0).nonzero()[:, 0]
    if len(rows):
        some = x[rows]
        _move_in_order(
            some, sign, available[rows], missing[rows], far.index_select(0, centre[rows])
        )
        x[rows] = some


def _move_in_order(
    x: Tensor, sign: int, available: Tensor, amount: Tensor, order: Tensor
) -> Tensor:
    """The same at the pixels in `order` (B, pixels); returns what is still missing, (B,)."""
    there = available.gather(1, order)
    missing = amount[:, None] - there.cumsum(1)
    taken = torch.minimum(there, (missing + there).clamp_(min=0))
    x.scatter_(1, order, x.gather(1, order).add_(taken, alpha=sign))
    return missing[:, -1]


def edited_images(activity: fa.Activity, k: int) -> tuple[Tensor, Tensor]:
    """The images that the tests of feature k edit: up to N_EDIT that fire it and N_EDIT that do
    not, spread evenly."""
    silent = torch.from_numpy(np.flatnonzero(~activity.is_active(k)))
    return fh.spread(activity.of(k)[0], N_EDIT), fh.spread(silent, N_EDIT)


def _generator(seed: int, feature: int) -> torch.Generator:
    """Random numbers that belong to a feature."""
    return torch.Generator().manual_seed((seed * 1_000_003 + feature) % 2**63)


@torch.no_grad()
def edit_tests(
    hypotheses: Sequence[fh.Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    activity: fa.Activity,
    seed: int,
) -> dict[int, tuple[EditTest, EditTest]]:
    """By feature, erasing and painting, of claims that name strokes.

    One feature at a time: what is found for it cannot depend on the others, and its pictures stay
    in the processor's cache. Ink is moved on the CPU, where sums are the same in every run. Where
    only empty places are named, ink painted into them is what must turn a feature off.
    """
    pixels = images.flatten(1).float().cpu()
    ever_inked = (pixels > 0).float().mean(0) > EVER_INKED
    tests = {}
    for h in hypotheses:
        wanted, empty = fh.stroke_pixels(h.stroke)
        other = (ever_inked & ~wanted & ~empty).float()
        on, off = edited_images(activity, h.feature)
        where = torch.rand(N_EDIT, 2, generator=_generator(seed, h.feature)).T

        x = pixels.index_select(0, on)
        moves = [Move(-1, x, wanted, other), Move(1, 1 - x, empty, other)]
        first = 0 if wanted.any() else 1
        erased = edit(x, moves[first : first + 1], where[:1, : len(on)])

        x = pixels.index_select(0, off)
        moves = [Move(1, 1 - x, wanted, other), Move(-1, x, empty, other)]
        painted = edit(x, moves, where[:, : len(off)])

        edited = torch.cat([*erased, *painted]).unflatten(1, images.shape[1:])
        active = (layer.feature_acts(edited)[:, h.feature] > 0).cpu().numpy()
        n, twice = len(on), 2 * len(on)
        erasing = EditTest.of(~active[:n], ~active[n:twice])
        painting = EditTest.of(active[twice : twice + len(off)], active[twice + len(off) :])
        tests[h.feature] = erasing, painting
    return tests


# --------------------------------------------------------------------------------------------------
# Does the feature move the logits as claimed?
# --------------------------------------------------------------------------------------------------

DOSES = (0.0, 0.5, 1.0, 2.0)  # times the typical activation
TINY_DOSE = 1 / 64  # of the typical activation, for the slope of the linear prediction
Curve = tuple[float, ...] | None


class EffectTest(NamedTuple):
    """Removing a feature from n images that fire it, and adding it again in doses.

    `share` is the change found in units of the change predicted, of the named logit where that is
    smaller.
    """

    n: int
    raised_by: float | None  # what it adds to the named logits, as in fh.Effect
    lowered_by: float | None
    share: float
    share_error: float  # standard error
    only_named: int  # images whose named logits move further than by as much of a random direction
    only_random: int  # ... and less far
    doses: tuple[float, ...]  # times the typical activation
    dose_raises: Curve  # mean change of the logits at each dose
    dose_lowers: Curve
    linear_raises: Curve  # the same, extrapolated from TINY_DOSE
    linear_lowers: Curve

    @property
    def p(self) -> float:
        """Sign test: chance of this when the feature's direction is as good as any other."""
        return sign_test_p(self.only_named, self.only_random)

    @property
    def dose_follows(self) -> bool:
        """Whether each larger dose moves the named logits further."""
        up = np.diff(self.dose_raises or (0.0, 1.0))
        down = np.diff(self.dose_lowers or (1.0, 0.0))
        return bool((up > 0).all() and (down < 0).all())


@torch.no_grad()
def _logits_in_states(
    h: fh.Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, activity: fa.Activity, seed: int
) -> np.ndarray:
    """(4 + doses, n, C) float64 logits of n images that fire the feature: as they are, without it,
    without as much of a random direction, at each dose but 0, and at TINY_DOSE.

    One call of the model's head, always for one feature: no other can change its rounding.
    """
    at, acts = activity.of(h.feature)
    chosen = fh.spread(torch.arange(len(at)), N_EDIT)
    direction = layer.sae.W_dec[h.feature].detach()
    noise = torch.randn(len(chosen), len(direction), generator=_generator(seed, h.feature))
    random = torch.nn.functional.normalize(noise, dim=1).to(raw.device) * direction.norm()

    rows, f = raw[at[chosen].to(raw.device)], acts[chosen, None].to(raw.device)
    without = rows - f * (direction * layer.std)
    step = h.typical_activation * (direction * layer.std)
    added = [without + dose * step for dose in (*DOSES[1:], TINY_DOSE)]
    states = [rows, without, rows - f * (random * layer.std), *added]
    logits = layer.logits_from_raw(torch.cat(states))
    return logits.cpu().double().numpy().reshape(len(states), len(rows), -1)


def effect_test(
    h: fh.Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, activity: fa.Activity, seed: int = 0
) -> EffectTest:
    """The effect part of one claim on raw preactivations (N, d_in)."""
    claim = h.effect
    claims = {"raises": (claim.raises, claim.raised_by), "lowers": (claim.lowers, claim.lowered_by)}
    claims = {verb: (c, by) for verb, (c, by) in claims.items() if c is not None}
    classes = [c for c, _ in claims.values()]
    sign = np.array([1.0 if verb == "raises" else -1.0 for verb in claims])
    predicted = sign * [by for _, by in claims.values()]

    logits = _logits_in_states(h, layer, raw, activity, seed)[:, :, classes]
    base, without, other, *at_doses, tiny = logits  # (n, claims) each
    moved = (base - without).mean(0)
    found, found_other = (base - without) / predicted, (base - other) / predicted
    own, others = found.mean(1), found_other.mean(1)
    weaker = found[:, found.mean(0).argmin()]
    curve = np.stack([without, *at_doses]).mean(1) - without.mean(0)  # (doses, claims)
    line = np.outer(DOSES, (tiny - without).mean(0) / TINY_DOSE)

    by_claim = dict(zip(claims, (sign * moved).tolist(), strict=True))
    curves = dict(zip(claims, map(tuple, curve.T.tolist()), strict=True))
    lines = dict(zip(claims, map(tuple, line.T.tolist()), strict=True))
    return EffectTest(
        n=len(base),
        raised_by=by_claim.get("raises"),
        lowered_by=by_claim.get("lowers"),
        share=float(weaker.mean()),
        share_error=float(weaker.std() / math.sqrt(max(1, len(weaker) - 1))),
        only_named=int((own > others).sum()),
        only_random=int((own < others).sum()),
        doses=DOSES,
        dose_raises=curves.get("raises"),
        dose_lowers=curves.get("lowers"),
        linear_raises=lines.get("raises"),
        linear_lowers=lines.get("lowers"),
    )


# --------------------------------------------------------------------------------------------------
# Test
# --------------------------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """All that was measured about one claim; None where that part was not claimed or has too few
    images."""

    feature: int
    n_active: int
    n_images: int
    detected: dict[str, Detected]  # "class", "stroke", "both"
    erasing: EditTest | None
    painting: EditTest | None
    effect: EffectTest | None

    @property
    def fires(self) -> bool:
        """Whether the feature fires on at least one in a thousand of these images."""
        return self.n_active >= 0.001 * self.n_images

    @property
    def auroc(self) -> float | None:
        """Of the statement as a whole."""
        return self.detected["both"].auroc if "both" in self.detected else None


Images = tuple[Tensor, Tensor]  # images and their labels


def confirmation_splits(images: Tensor, labels: Tensor) -> tuple[Images, Images]:
    """The test images with even numbers, which judge, and those with odd numbers, set aside to
    check the judgement.

    Every other one, because the first and the second half of MNIST's test images were written by
    different people.
    """
    return (images[0::2], labels[0::2]), (images[1::2], labels[1::2])


def _check_testable(
    hypotheses: Sequence[fh.Hypothesis], layer: fa.ExplainedLayer, images: Tensor
) -> None:
    seen = set()
    for h in hypotheses:
        k = fa.check_feature(h.feature, layer.d_sae)
        if k in seen:
            raise ValueError(f"feature {k} has several hypotheses: test them in calls of their own")
        seen.add(k)
    no_strokes = fh.why_no_strokes(images)
    if no_strokes and any(h.stroke for h in hypotheses):
        raise ValueError(f"strokes cannot be tested: {no_strokes}")


def test_hypotheses(
    hypotheses: Sequence[fh.Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    labels: Tensor,
    activity: fa.Activity | None = None,
    seed: int = 0,
    rule: fh.Rule | None = None,
) -> list[Evidence]:
    """What images (N, ...) with labels (N,) say about the claims.

    detection  AUROC and average precision with which class part, stroke part and both predict where
               the feature is active
    erasing    on up to N_EDIT images that fire it, the ink named is removed, and as much elsewhere
    painting   on as many that do not, the wanted places are inked and the empty ones cleared, and
               as much elsewhere
    effect     on images that fire it, the feature is removed, and as much of a random direction;
               then it is added in DOSES

    Claims about features that fewer than the rule's `min_active` images fire, or leave silent, are
    not tested. `activity` takes the place of the SAE's own, to see what chance gives. Raises
    ValueError for shapes that do not fit, two claims about one feature, and strokes on images that
    cannot have them; IndexError for a feature that does not exist.
    """
    n, least = len(images), (rule or fh.Rule()).min_active
    activity = activity or fa.collect_activity(layer, images, labels)
    if len(activity.labels) != n:
        raise ValueError(f"the activity is of {len(activity.labels)} images, but {n} were given")
    _check_testable(hypotheses, layer, images)
    n_active = activity.n_active.tolist()
    testable = [h for h in hypotheses if least <= n_active[h.feature] <= n - least]
    detected = detect(testable, images, labels, activity)
    with_stroke = [h for h in testable if h.stroke]
    edits = edit_tests(with_stroke, layer, images, activity, seed) if with_stroke else {}
    with torch.no_grad():
        raw = torch.cat([layer.raw(some) for some in images.split(fa.ROWS)])
    effects = {h.feature: effect_test(h, layer, raw, activity, seed) for h in testable if h.effect}
    evidence = []
    for k in (h.feature for h in hypotheses):
        both_edits = edits.get(k, (None, None))
        found = detected.get(k, {})
        evidence.append(Evidence(k, n_active[k], n, found, *both_edits, effects.get(k)))
    return evidence


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED, NONE = "confirmed", "inconclusive", "refuted", "no hypothesis"
CONFIDENCES = ("High", "Medium", "Low")
CONFIDENCE_RULE = """High: every part that is claimed is confirmed, and each of its measurements
clears its bar even at the pessimistic end of its 95% interval. Medium: not High, but at least one
part is confirmed and nothing is refuted. Low: the rest. A statement held on images set aside when
each measurement clears its bar there, too."""


class Measurement(NamedTuple):
    """One measured value with its 95% interval, the bar it must reach and its p-value."""

    value: float
    low: float
    high: float
    bar: float
    p: float

    def verdict(self, significant: bool) -> str:
        if self.value >= self.bar and significant:
            return CONFIRMED
        return REFUTED if self.high < self.bar else INCONCLUSIVE


class Judgement(NamedTuple):
    """Verdicts about one claim: on each test, on each part, and overall; and how much confidence it
    deserves."""

    feature: int
    tests: dict[str, str]
    parts: dict[str, str]
    verdict: str
    confidence: str
    all_three: bool  # class, stroke and effect are all claimed and confirmed


TESTS_OF = {
    "class": ("class",),
    "stroke": ("stroke", "erasing", "painting"),
    "both": ("both",),
    "effect": ("effect",),
}


def benjamini_hochberg(p: Sequence[float], q: float) -> np.ndarray:
    """(m,) bool: which p-values are significant at a false discovery rate of q (Benjamini &
    Hochberg 1995)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    passed = np.flatnonzero(p[order] <= q * np.arange(1, len(p) + 1) / max(1, len(p)))
    significant = np.zeros(len(p), dtype=bool)
    if len(passed):
        significant[order[: passed[-1] + 1]] = True
    return significant


def measurements(evidence: Evidence, rule: fh.Rule) -> dict[str, Measurement]:
    """What was measured, test by test, and the rule's bars; of erasing and painting
    `EditTest.excess`, against 0."""
    found = {}
    bars = {"class": rule.class_auroc, "stroke": rule.stroke_auroc, "both": rule.both_auroc}
    for part, d in evidence.detected.items():
        found[part] = Measurement(d.auroc, d.auroc_low, d.auroc_high, bars[part], d.p)
    for name, test in (("erasing", evidence.erasing), ("painting", evidence.painting)):
        if test is not None:
            excess = test.excess(rule.times_elsewhere, rule.edit_share)
            found[name] = Measurement(*excess, 0.0, test.p)
    e = evidence.effect
    if e is not None:
        wide = NEAR * e.share_error
        ends = e.share - wide, e.share + wide
        found["effect"] = Measurement(e.share, *ends, rule.effect_share, e.p)
    return found


def _joint(verdicts: Sequence[str]) -> str:
    """One refuted refutes; all confirmed confirm."""
    if REFUTED in verdicts:
        return REFUTED
    if verdicts and all(v == CONFIRMED for v in verdicts):
        return CONFIRMED
    return INCONCLUSIVE


def _judge(
    h: fh.Hypothesis, e: Evidence, tests: dict[str, Measurement], passed: dict[str, bool]
) -> Judgement:
    """One claim; `passed` says which of its tests are significant."""
    verdicts = {name: m.verdict(passed[name]) for name, m in tests.items()}
    if e.effect and verdicts["effect"] == CONFIRMED and not e.effect.dose_follows:
        verdicts["effect"] = INCONCLUSIVE
    claimed = [part for part in fh.PARTS if h.proposes(part)]
    parts = dict.fromkeys(fh.PARTS, NONE)
    if not claimed:
        return Judgement(h.feature, {}, parts, NONE, "Low", False)

    for part in claimed:
        parts[part] = _joint([verdicts[t] for t in TESTS_OF[part] if t in verdicts])
    together = [verdicts[t] for t in TESTS_OF["both"] if t in verdicts]
    whole = _joint([parts[part] for part in claimed] + together)
    some = any(parts[part] == CONFIRMED for part in claimed)
    confidence = "Low"
    if whole == CONFIRMED and all(m.low >= m.bar for m in tests.values()):
        confidence = "High"
    elif some and whole != REFUTED:
        confidence = "Medium"
    all_three = whole == CONFIRMED and len(claimed) == len(fh.PARTS)
    return Judgement(h.feature, verdicts, parts, whole, confidence, all_three)


def judge_hypotheses(
    hypotheses: Sequence[fh.Hypothesis], evidence: Sequence[Evidence], rule: fh.Rule | None = None
) -> list[Judgement]:
    """Verdicts and confidence, by CONFIDENCE_RULE; p-values corrected over all features and tests.

    A test is confirmed when its value reaches the bar and is significant, refuted when its 95%
    interval stays below the bar, and otherwise inconclusive. A part is refuted by one of its tests
    and confirmed by all; so is the whole.
    """
    rule = rule or fh.Rule()
    found = [measurements(e, rule) for e in evidence]
    p = [m.p for tests in found for m in tests.values()]
    significant = iter(benjamini_hochberg(p, rule.false_discovery_rate).tolist())
    judgements = []
    for h, e, tests in zip(hypotheses, evidence, found, strict=True):
        passed = {name: next(significant) for name in tests}
        judgements.append(_judge(h, e, tests, passed))
    return judgements


def held(evidence: Evidence, rule: fh.Rule | None = None) -> bool | None:
    """Whether every measurement clears its bar, significant or not; None when there is none."""
    tests = measurements(evidence, rule or fh.Rule())
    return all(m.value >= m.bar for m in tests.values()) if tests else None


class Shares(NamedTuple):
    """Shares of the features that fire on at least one in a thousand of the tested images."""

    features: int
    explained: float  # class, stroke and effect are all confirmed
    predicted: float  # class and stroke together reach the AUROC asked for
    median_auroc: float | None
    class_confirmed: float
    stroke_confirmed: float
    effect_confirmed: float
    median_density: float | None  # share of the images that fire the median of these features


def shares_explained(
    evidence: Sequence[Evidence], judgements: Sequence[Judgement], rule: fh.Rule | None = None
) -> Shares:
    """The shares of one set of features; zeros where none fires."""
    rule = rule or fh.Rule()
    firing = [(e, j) for e, j in zip(evidence, judgements, strict=True) if e.fires]
    aurocs = [e.auroc for e, _ in firing if e.auroc is not None]
    n = max(1, len(firing))
    confirmed = {part: sum(j.parts[part] == CONFIRMED for _, j in firing) / n for part in fh.PARTS}
    density = [e.n_active / e.n_images for e, _ in firing]
    return Shares(
        features=len(firing),
        explained=sum(j.all_three for _, j in firing) / n,
        predicted=sum(auroc >= rule.both_auroc for auroc in aurocs) / n,
        median_auroc=float(np.median(aurocs)) if aurocs else None,
        class_confirmed=confirmed["class"],
        stroke_confirmed=confirmed["stroke"],
        effect_confirmed=confirmed["effect"],
        median_density=float(np.median(density)) if density else None,
    )


# --------------------------------------------------------------------------------------------------
# What did training add? The same path for other features
# --------------------------------------------------------------------------------------------------

COMPARED = 256  # at most so many features of each other kind


class LinearFeatures(NamedTuple):
    """Features to compare an SAE's with: f = pre 1[pre > threshold], pre = z W_enc + b_enc."""

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in)
    threshold: Tensor  # (d_sae,)

    def encode(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> feature_acts (B, d_sae)"""
        pre = torch.addmm(self.b_enc, z, self.W_enc)
        return pre * torch.gt(pre, self.threshold, out=torch.empty_like(pre))


def _cut_at(values: np.ndarray, n_above: int) -> float:
    """A cut between the n_above largest of `values` (N,) and the others, but never below 0."""
    rank = int(np.clip(len(values) - n_above, 1, len(values) - 1))
    last_below, first_above = np.partition(values, (rank - 1, rank))[rank - 1 : rank + 1]
    # Not at a value itself, where rounding would decide.
    return max(0.0, float(0.9 * last_below + 0.1 * first_above))


def matched_directions(
    directions: Tensor, z: Tensor, density: Tensor, mean_activation: Tensor
) -> LinearFeatures:
    """Features along `directions` (n, d_in) that fire on a share `density` (n,) of z (N, d_in), or
    wherever z points along them if that is less, with `mean_activation` (n,) where they do."""
    unit = torch.nn.functional.normalize(directions.to(z), dim=1)
    projected = (z @ unit.T).T.cpu().numpy()  # (n, N)
    n_above = (density * len(z)).round().long().tolist()
    cuts = [_cut_at(values, n) for values, n in zip(projected, n_above, strict=True)]
    means = []
    for values, cut in zip(projected, cuts, strict=True):
        above = values[values > cut]
        means.append(float(above.mean()) if len(above) else 1.0)
    scale = mean_activation.to(z) / torch.tensor(means).to(z)
    threshold = torch.tensor(cuts).to(z) * scale
    return LinearFeatures(unit.T * scale, torch.zeros_like(threshold), unit, threshold)


def principal_ends(z: Tensor) -> Tensor:
    """Both ends of the principal directions of z (N, d_in), strongest first: (2 d_in, d_in)."""
    centred = z - z.mean(0)
    _, basis = torch.linalg.eigh(centred.T @ centred)
    strongest = basis.T.flip(0)
    largest = strongest.gather(1, strongest.abs().argmax(1, keepdim=True))
    strongest = strongest * largest.sign()  # which end comes first must not be left to chance
    return torch.stack([strongest, -strongest], 1).flatten(0, 1)


def other_directions(kind: str, z: Tensor, seed: int) -> Tensor:
    """What an SAE's features are compared with, (n, d_in): COMPARED "random directions", "neurons",
    up and down in random order, or "principal directions" of z (N, d_in), strongest first.

    Raises ValueError for another kind.
    """
    d_in = z.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if kind == "random directions":
        return torch.randn(COMPARED, d_in, generator=generator)
    if kind == "neurons":
        up = torch.eye(d_in)
        return torch.cat([up, -up])[torch.randperm(2 * d_in, generator=generator)]
    if kind == "principal directions":
        return principal_ends(z)
    raise ValueError(f"there are no directions of the kind {kind!r} to compare with")


def at_the_same_rates(
    directions: Tensor, z: Tensor, density: Tensor, mean_activation: Tensor
) -> LinearFeatures:
    """Features along the first of `directions` (n, d_in), COMPARED at most, that fire on z
    (N, d_in) as often and as strongly as features of the SAE, of which density and
    mean_activation (d_sae,) are: as many of all firing rates, the most active first.

    How often a feature fires decides how easily a statement about it is confirmed, so that only
    features of the same rates can be compared.
    """
    n = min(len(directions), len(density), COMPARED)
    falling = torch.argsort(density, descending=True, stable=True)
    some = fh.spread(falling, n)
    return matched_directions(directions[:n], z, density[some], mean_activation[some])


class Comparison(NamedTuple):
    """How one set of features did."""

    shares: Shares
    aurocs: list[float]  # of the statements on features that fire; 0 without one to predict by


def comparison_of(
    evidence: Sequence[Evidence], judgements: Sequence[Judgement], rule: fh.Rule
) -> Comparison:
    """From evidence and judgements about one set of features."""
    aurocs = [e.auroc or 0.0 for e in evidence if e.fires]
    return Comparison(shares_explained(evidence, judgements, rule), aurocs)


def compare_features(
    features,
    layer: fa.ExplainedLayer,
    seen: tuple[Tensor, Tensor],
    judging: tuple[Tensor, Tensor],
    rule: fh.Rule,
    seed: int,
) -> Comparison:
    """The SAE's path, from proposals to shares explained, for other features of the same layer.

    `features` has encode, W_enc and W_dec like an SAE; `seen` and `judging` are (images, labels).
    This is the one place in this room where claims are made: about these features, from `seen`.
    """
    other = layer._replace(sae=features)
    claims = fh.propose_hypotheses(other, *seen, rule)
    evidence = test_hypotheses(claims, other, *judging, seed=seed, rule=rule)
    return comparison_of(evidence, judge_hypotheses(claims, evidence, rule), rule)


# --------------------------------------------------------------------------------------------------
# The trial as a whole
# --------------------------------------------------------------------------------------------------

STRONGEST = 10  # images named for a feature


class Trial(NamedTuple):
    """Claims with all that is known about them, in the order of the features."""

    hypotheses: list[fh.Hypothesis]
    rule: fh.Rule
    evidence: list[Evidence]
    judgements: list[Judgement]
    held_aside: list[bool | None]  # whether they held on the images set aside; None: too few
    n_aside: int  # how many images those were
    firing: list[list[int]]  # numbers of the test images that fire each feature most
    edited: list[tuple[list[int], list[int]]]  # ... and of those edited: some fire it, some do not


def make_trial(
    hypotheses: list[fh.Hypothesis],
    rule: fh.Rule,
    evidence: list[Evidence],
    evidence_aside: Sequence[Evidence],
    activity: fa.Activity,
) -> Trial:
    """Judge the claims by the evidence, and say on which images it rests: `activity` is that of the
    judging images, number i of which is number 2 i of the test images."""
    judgements = judge_hypotheses(hypotheses, evidence, rule)
    firing, edited = [], []
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:STRONGEST]
        firing.append((2 * at[strongest]).tolist())
        on, off = edited_images(activity, h.feature)
        edited.append(((2 * on).tolist(), (2 * off).tolist()))
    held_aside = [held(e, rule) for e in evidence_aside]
    n_aside = evidence_aside[0].n_images
    return Trial(hypotheses, rule, evidence, judgements, held_aside, n_aside, firing, edited)


def _confidence_check(trial: Trial) -> dict[str, dict]:
    """Of the statements of each confidence, the share that held on the images set aside."""
    check = {}
    for confidence in CONFIDENCES:
        pairs = zip(trial.judgements, trial.held_aside, strict=True)
        again = [h for j, h in pairs if j.confidence == confidence and j.verdict != NONE]
        seen = [h for h in again if h is not None]
        share = sum(seen) / len(seen) if seen else None
        check[confidence] = {"statements": len(again), "checked": len(seen), "held": share}
    return check


def all_shares(trial: Trial, comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with the SAE's own features in front."""
    return {"SAE": comparison_of(trial.evidence, trial.judgements, trial.rule), **comparisons}


def trial_record(trial: Trial, comparisons: dict[str, Comparison], sha256: str) -> dict:
    """What summary.json says about the trial; `sha256` is that of the frozen claims."""
    everything = all_shares(trial, comparisons)
    return {
        "sha256": sha256,
        "rule": trial.rule._asdict(),
        "confidence_rule": " ".join(CONFIDENCE_RULE.split()),
        "shares": {name: c.shares._asdict() for name, c in everything.items()},
        "confidence": _confidence_check(trial),
    }


def _test_record(test: EditTest | EffectTest | None) -> dict | None:
    return None if test is None else {**test._asdict(), "p": test.p}


def statement_record(k: int, trial: Trial) -> dict:
    """What feature_report.json says about the statement on feature k."""
    h, e, j = trial.hypotheses[k], trial.evidence[k], trial.judgements[k]
    edited = None
    if e.erasing is not None:
        edited = dict(zip(("firing", "silent"), trial.edited[k], strict=True))
    return {
        "statement": fh.statement(h),
        "confidence": j.confidence,
        "verdict": j.verdict,
        "measured": measured_lines(h, e, j, trial.rule),
        "hypothesis": fh.hypothesis_record(h),
        "evidence": {
            "text": evidence_line(h, e),
            "n_active": e.n_active,
            "n_images": e.n_images,
            "detected": {part: d._asdict() for part, d in e.detected.items()},
            "erasing": _test_record(e.erasing),
            "painting": _test_record(e.painting),
            "effect": _test_record(e.effect),
            "verdicts": {"tests": j.tests, "parts": j.parts},
            "held_aside": trial.held_aside[k],
            "test_images": trial.firing[k],
            "edited_images": edited,
        },
    }


# --------------------------------------------------------------------------------------------------
# Telling it to people
# --------------------------------------------------------------------------------------------------


def _p_words(p: float) -> str:
    return "p < 1e-99" if p < 1e-99 else f"p = {p:.1g}"


def _detection_lines(h: fh.Hypothesis, e: Evidence, j: Judgement) -> list[str]:
    whole = "the statement as a whole"
    if h.labels and h.stroke:
        whole = "labels and strokes together"
    names = {"class": "labels", "stroke": "strokes", "both": whole}
    lines = []
    for part, d in e.detected.items():
        found = f"AUROC {d.auroc:.3f} [{d.auroc_low:.3f}, {d.auroc_high:.3f}]"
        also = f"average precision {d.average_precision:.3f}, {_p_words(d.p)}: {j.tests[part]}"
        lines.append(f"{names[part]}, predicting where it fires: {found}, {also}")
    return lines


def _edit_line(name: str, verb: str, t: EditTest, m: Measurement, verdict: str) -> str:
    counts = f"{t.named} of {t.n} images, as much ink elsewhere on {t.elsewhere}"
    above = f"{m.value:+.2f} [{m.low:+.2f}, {m.high:+.2f}] above the bar, {_p_words(m.p)}"
    return f"{name} what is named turns it {verb} on {counts}; {above}: {verdict}"


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values[1:])


def _effect_lines(claim: fh.Effect, t: EffectTest, m: Measurement, verdict: str) -> list[str]:
    moves, doses = [], []
    if claim.raises is not None:
        logit = f"logit of {claim.raises}"
        moves.append(f"lowers the {logit} by {t.raised_by:.3f} (predicted {claim.raised_by:.3f})")
        doses.append(f"{logit} {_signed(t.dose_raises)} (linear {_signed(t.linear_raises)})")
    if claim.lowers is not None:
        logit = f"logit of {claim.lowers}"
        moves.append(f"raises the {logit} by {t.lowered_by:.3f} (predicted {claim.lowered_by:.3f})")
        doses.append(f"{logit} {_signed(t.dose_lowers)} (linear {_signed(t.linear_lowers)})")
    share = f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}] of the prediction, bar {m.bar:g}"
    further = f"further than as much of a random direction on {t.only_named} of {t.n} images"
    added = ", ".join(f"{dose:g}" for dose in t.doses[1:])
    return [
        f"removing it {' and '.join(moves)}; {share}; {further}, {_p_words(m.p)}: {verdict}",
        f"adding {added} times its typical activation: {'; '.join(doses)}",
    ]


def measured_lines(
    h: fh.Hypothesis, e: Evidence, j: Judgement, rule: fh.Rule | None = None
) -> list[str]:
    """One line for each test: what was measured with its 95% interval, the bar, and the verdict."""
    measured = measurements(e, rule or fh.Rule())
    lines = _detection_lines(h, e, j)
    for name, verb, test in (("erasing", "off", e.erasing), ("painting", "on", e.painting)):
        if test is not None:
            lines.append(_edit_line(name, verb, test, measured[name], j.tests[name]))
    if e.effect is not None:
        lines += _effect_lines(h.effect, e.effect, measured["effect"], j.tests["effect"])
    return lines


def evidence_line(h: fh.Hypothesis, e: Evidence) -> str:
    """The evidence in one line."""
    if not h.n_active:
        return f"fires on none of {h.n_images:,} discovery images"
    ranked = sorted(range(len(h.label_histogram)), key=lambda c: (-h.label_histogram[c], c))
    shares = []
    for c in ranked[:2]:
        if h.label_histogram[c]:
            shares.append(f"{100 * h.label_histogram[c] / h.n_active:.0f}% of them {c}s")
    rate = 100 * h.n_active / h.n_images
    pieces = [f"fires on {rate:.3g}% of images, {' and '.join(shares)}"]
    if e.auroc is not None:
        pieces.append(f"predicted with AUROC {e.auroc:.2f} on {e.n_images:,} unseen images")
    elif any(map(h.proposes, fh.PARTS)) and e.effect is None:
        few = f"{e.n_active:,} of {e.n_images:,} unseen images fire it"
        pieces.append(f"{few}: too few that do, or do not, to judge")
    for name, verb, t in (("erasing", "off", e.erasing), ("painting", "on", e.painting)):
        if t is not None:
            pieces.append(f"{name} turns it {verb} on {t.named} of {t.n}, elsewhere {t.elsewhere}")
    return "; ".join(pieces)


def feature_lines(i: int, trial: Trial) -> list[str]:
    """The Markdown section of the claim at position i."""
    h, e, j = trial.hypotheses[i], trial.evidence[i], trial.judgements[i]
    words = {True: "held", False: "did not hold", None: "too few images to see"}
    aside = f"on images set aside: {words[trial.held_aside[i]]}"
    lines = [
        f"### Feature {h.feature}: {fh.statement(h)}",
        "",
        f"- Evidence: {evidence_line(h, e)}",
        f"- Confidence: **{j.confidence}**; verdict {j.verdict}; {aside}",
    ]
    lines += [f"- {line}" for line in measured_lines(h, e, j, trial.rule)]
    lines += [f"- no {part} part: {why}" for part, why in h.why_not.items()]
    if trial.firing[i]:
        numbers = ", ".join(f"#{image}" for image in trial.firing[i])
        lines.append(f"- strongest of the {e.n_active:,} test images that fire it: {numbers}")
    return [*lines, ""]


def best_first(judgements: Sequence[Judgement], evidence: Sequence[Evidence]) -> list[int]:
    """Positions by falling confidence, then verdict, then AUROC."""
    verdicts = (CONFIRMED, INCONCLUSIVE, REFUTED, NONE)

    def key(i: int) -> tuple:
        j = judgements[i]
        auroc = evidence[i].auroc or 0.0
        return CONFIDENCES.index(j.confidence), verdicts.index(j.verdict), -auroc, j.feature

    return sorted(range(len(judgements)), key=key)


HOW_TESTED = """Each statement was made from {discovery:,} validation images and frozen before it
was tested, once, on the {judging:,} test images with even numbers. The {aside:,} with odd numbers
were set aside to see whether confidence is deserved. SHA-256 of hypotheses.json: `{sha256}`.

- Labels and strokes predict where the feature fires: AUROC {class_auroc} is asked of the labels,
{stroke_auroc} of the strokes, {both_auroc} of the statement as a whole.
- Erasing: on images that fire it, the ink in the places named is removed, and as much ink
elsewhere. Painting: on images that do not, the places named are inked and those named empty are
cleared, and as much elsewhere. What is named must turn the feature off or on {times_elsewhere:g}
times as often as what is not, and on {edit_share:.0%} of the images at least. (That a place must be
empty is tested by prediction and by clearing it.)
- The images edited are in feature_report.json (`edited_images`); `#316` is
`run.data.test.images[316]`.
- Effect: removing the feature must move each logit named by {effect_share:.0%} of what was
predicted, further than as much of a random direction does, and each larger dose must move it
further.

A test is confirmed when its value reaches the bar and it is significant among all tests of all
features at a false discovery rate of {false_discovery_rate}; refuted when its 95% interval stays
below the bar; otherwise inconclusive. One refuted test refutes the statement, and all must be
confirmed to confirm it. Fewer than {min_active} images that fire a feature, or do not, are too few
to judge it. Intervals: of an AUROC, DeLong's on the logit scale; of edits, Wilson's, and Newcombe's
for pairs.

{confidence}
"""
TRAINING_ADDED = """Of the features that fire on at least one in a thousand test images. The others
fire as often and as strongly as the SAE's features do: the more images fire a feature, the easier
its tests are. A statement can be true of a random direction, too: that it predicts does not say
that training found anything."""


def _confidence_rows(record: dict) -> list[list[str]]:
    rows = []
    for name, c in record["confidence"].items():
        share = "none seen" if c["held"] is None else f"{c['held']:.0%}"
        rows.append([name, str(c["statements"]), str(c["checked"]), share])
    return rows


def _shares_rows(record: dict) -> list[list[str]]:
    keys = ("explained", "class_confirmed", "stroke_confirmed", "effect_confirmed", "predicted")
    rows = []
    for name, s in record["shares"].items():
        rate = "none" if s["median_density"] is None else f"{s['median_density']:.2%}"
        rows.append([name, str(s["features"]), rate, *(f"{s[key]:.0%}" for key in keys)])
    return rows


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def statements_markdown(trial: Trial, record: dict, title: str) -> str:
    """hypotheses.md: how the statements were tested, how they did as a whole, and every feature,
    best first. `record` is the `trial_record`."""
    how = HOW_TESTED.format(
        discovery=trial.hypotheses[0].n_images,
        judging=trial.evidence[0].n_images,
        aside=trial.n_aside,
        sha256=record["sha256"],
        confidence=CONFIDENCE_RULE,
        **trial.rule._asdict(),
    )
    confidence = ["confidence", "statements", "seen again", "held"]
    sets = ["features", "how many", "fire on (median)", "all three confirmed"]
    sets += ["class", "stroke", "effect", "predicted"]
    lines = [f"# What the features mean: {title}", "", how]
    lines += ["## Do they hold?", "", *_markdown_table(confidence, _confidence_rows(record)), ""]
    lines += ["## What did training add?", "", TRAINING_ADDED, ""]
    lines += [*_markdown_table(sets, _shares_rows(record)), ""]
    lines += ["## Feature by feature, best first", ""]
    for i in best_first(trial.judgements, trial.evidence):
        lines += feature_lines(i, trial)
    return "\n".join(lines)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def statements_table(record: dict) -> str:
    """How the statements did, beside those about untrained features; and what their confidence is
    worth. `record` is the `trial_record`."""
    titles = {
        "explained": "all three parts confirmed",
        "class_confirmed": "  class",
        "stroke_confirmed": "  stroke",
        "effect_confirmed": "  effect",
        "predicted": "predicted on unseen images",
    }
    shares = record["shares"]
    rows = [["share of features that fire", *shares]]
    for key, title in titles.items():
        rows.append([title, *(f"{s[key]:.1%}" for s in shares.values())])
    again = [["confidence", "statements", "held on images set aside"]]
    for name, c in record["confidence"].items():
        share = "none seen" if c["held"] is None else f"{c['held']:.1%} of {c['checked']}"
        again.append([name, str(c["statements"]), share])
    return text_table(rows) + "\n\n" + text_table(again)


COLOURS = ("#b2182b", "#2166ac", "#4d9221", "#e08214", "#7b3294", "0.4")


def _draw_aurocs(axes, everything: dict[str, Comparison], bar: float) -> None:
    for colour, (name, c) in zip(COLOURS, everything.items(), strict=False):
        ranked = np.sort(c.aurocs)
        at_least = 1 - np.arange(len(ranked)) / max(1, len(ranked))
        axes.step([*ranked, 1.0], [*at_least, 0.0], color=colour, label=name)
    axes.axvline(bar, color="0.6", linestyle=":")
    axes.text(bar - 0.01, 0.03, f"bar {bar:g}", ha="right", fontsize=8.5, color="0.4")
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("AUROC on unseen images (0 without a statement)")
    axes.set_title("share of features predicted at least so well", fontsize=10, loc="left")
    axes.legend(fontsize=8.5, loc="lower left")


def _draw_explained_shares(axes, everything: dict[str, Comparison]) -> None:
    ticks, values = [], []
    for name, c in everything.items():
        rate = c.shares.median_density
        ticks.append(name if rate is None else f"{name}\n(fire on {rate:.1%})")
        values.append(100 * c.shares.explained)
    axes.barh(ticks[::-1], values[::-1], color=COLOURS[: len(ticks)][::-1])
    for row, value in enumerate(values[::-1]):
        axes.text(value + 1, row, f"{value:.0f}%", va="center", fontsize=9)
    axes.set_xlim(0, 105)
    title = "class, stroke and effect all confirmed, % of features"
    axes.set_title(title, fontsize=10, loc="right")


def draw_explained(trial: Trial, comparisons: dict[str, Comparison]) -> Figure:
    """How well the statements about several sets of features predict, and what share is confirmed
    in all parts."""
    everything = all_shares(trial, comparisons)
    figure = fa.new_figure(1000, 380)
    left = figure.add_axes((0.07, 0.15, 0.4, 0.68))
    right = figure.add_axes((0.66, 0.15, 0.31, 0.68))
    _draw_aurocs(left, everything, trial.rule.both_auroc)
    _draw_explained_shares(right, everything)
    for axes in (left, right):
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Statements about features, tested on images that were not used to make them"
    figure.suptitle(title, fontsize=11.5)
    return figure
