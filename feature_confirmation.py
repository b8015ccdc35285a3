"""The trial of claims: do they hold on images that nobody looked at when they were made?

    judging, aside = confirmation_splits(images, labels)
    evidence = test_hypotheses(hypotheses, layer, *judging)      # measurements and p-values
    judgements = judge_hypotheses(hypotheses, evidence)          # verdicts, by the frozen rule
    picked = pick_features(evidence, scored, layer, activity)    # is a sentence its feature's own?
    trial = make_trial(hypotheses, rule, evidence, evidence_aside, activity, picked)

Takes frozen claims, a `fa.ExplainedLayer` and test images, and gives evidence, judgements, and the
tables, words and pictures about them. This room never makes a claim about the features on trial.
Only `compare_features`, which sends other features down the same path, has claims about those made.

Dimension key: N images, C classes, d_in preactivations, d_sae features, B edited images, 784 = 28 x
28 pixels; of one feature m active images and n others.
"""

from __future__ import annotations

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
    p: float  # against chance: activity shuffled over images


def detected(scores: Sequence[np.ndarray], active: Sequence[np.ndarray]) -> list[Detected]:
    """How well each of the scores (N,) predicts which images, at the indices `active` (m,), are
    active."""
    ranks, p = [], []
    for values, at in zip(scores, active, strict=True):
        r = fh.ranks_of(values, at)
        p.append(rank_sum_p(r))
        ranks.append(r._replace(ranked=r.ranked[:0]))  # what is kept does not grow with N
    ends = zip(*(end.tolist() for end in auroc_interval(ranks)), strict=True)
    found = []
    for r, (low, high), chance in zip(ranks, ends, p, strict=True):
        found.append(Detected(r.auroc, low, high, average_precision(r), chance))
    return found


class Described(NamedTuple):
    """Images that a claim describes, those scored at least its cut, and images that are active."""

    n: int  # described
    active: int
    both: int

    @property
    def precision(self) -> float:
        return self.both / max(1, self.n)

    @property
    def recall(self) -> float:
        return self.both / max(1, self.active)


def midranks(scores: np.ndarray) -> np.ndarray:
    """(N,) 1 for the smallest of scores (N,); equal ones share their mean rank."""
    ranked = np.sort(scores)
    left, right = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    return (left + right + 1) / 2


def auroc_of_ranks(ranks: np.ndarray, at: np.ndarray) -> float:
    """AUROC of scores with these midranks (N,), when the images `at` (m,) are the active ones."""
    m = len(at)
    return (ranks[at].sum() - m * (m + 1) / 2) / (m * (len(ranks) - m))


# --------------------------------------------------------------------------------------------------
# Do edits of the ink that is named turn the feature off and on?
# --------------------------------------------------------------------------------------------------


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

    def difference(self) -> tuple[float, float, float]:
        """Share changed as named less that changed elsewhere, and its 95% interval: method 10 of
        Newcombe (1998, Statistics in Medicine 17:2635-2650), for pairs."""
        named, elsewhere = self.named / self.n, self.elsewhere / self.n
        low, high = wilson_interval(self.named, self.n)
        other_low, other_high = wilson_interval(self.elsewhere, self.n)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * self.phi * a * b + b * b))

        value = named - elsewhere
        down, up = (
            reach(named - low, other_high - elsewhere),
            reach(high - named, elsewhere - other_low),
        )
        return value, value - down, value + up


class Edits(NamedTuple):
    """What became of the strokes of a claim; None where there is none of that kind."""

    erasing: EditTest | None  # strokes said to be there are erased: does the feature turn off?
    filling: EditTest | None  # strokes said to be absent are painted: does it turn off?
    painting: EditTest | None  # both are made as said: does it turn on?


@torch.no_grad()
def edit_tests(
    strokes: fh.Strokes,
    h: fh.Hypothesis,
    layer: fa.ExplainedLayer,
    editable: fh.Editable,
    activity: fa.Activity,
) -> Edits | None:
    """Edits of the strokes, words or places, by which a claim says or draws when a feature fires.

    One feature at a time: what is found for it cannot depend on the others, and its pictures stay
    in the processor's cache. None where no stroke is named.
    """
    if not any(strokes):
        return None
    editor = fh.Editor(strokes, editable, h.feature)
    on, off = fh.edited_images(h, activity)
    x, silent = editable.pixels.index_select(0, on), editable.pixels.index_select(0, off)
    pairs = {}
    if strokes.there:
        pairs["erasing"] = editor.erase(x, strokes.there)
    if strokes.absent:
        pairs["filling"] = editor.paint(x, strokes.absent)
        pairs["painting"] = editor.erase(silent, strokes.absent)
    if strokes.there:  # last, so that nothing of it is erased again
        pairs["painting"] = editor.paint(silent, strokes.there, pairs.get("painting"))
    edited = torch.cat([side for pair in pairs.values() for side in pair])
    active = (editable.feature_acts(layer, edited, h.feature) > 0).numpy()
    found = dict.fromkeys(Edits._fields)
    for name, (named, _) in pairs.items():
        n = len(named)
        changed = active[: 2 * n] if name == "painting" else ~active[: 2 * n]
        found[name] = EditTest.of(changed[:n], changed[n:])
        active = active[2 * n :]
    return Edits(**found)


# --------------------------------------------------------------------------------------------------
# Does the feature move the logits as claimed?
# --------------------------------------------------------------------------------------------------

DOSES = (0.0, 0.5, 1.0, 2.0)  # times the typical activation
TINY_DOSE = 1 / 64  # of the typical activation, for the slope of the linear prediction
Curve = tuple[float, ...] | None


class EffectTest(NamedTuple):
    """Removing a feature from n images that fire it, and adding it again in doses."""

    n: int
    raised_by: float | None  # by how much it moves the named logits, as in fh.Effect
    lowered_by: float | None
    chance_raised: float  # how far other directions of its length move some logit: the rule's
    chance_lowered: float  # percentile of them
    reach: float  # found, in units of what is asked for; of the logit where that is smaller
    reach_error: float  # standard error
    further: int  # images whose named logits move further than by that percentile of directions
    less_far: int
    doses: tuple[float, ...]  # times the typical activation
    dose_raises: Curve  # mean change of the logits at each dose
    dose_lowers: Curve
    linear_raises: Curve  # the same, extrapolated from TINY_DOSE
    linear_lowers: Curve

    @property
    def p(self) -> float:
        """Sign test: chance of this when it moves them further on half of the images."""
        return sign_test_p(self.further, self.less_far)

    @property
    def dose_follows(self) -> bool:
        """Whether each larger dose moves the named logits further."""
        up = np.diff(self.dose_raises or (0.0, 1.0))
        down = np.diff(self.dose_lowers or (1.0, 0.0))
        return bool((up > 0).all() and (down < 0).all())


@torch.no_grad()
def _logits_in_states(
    h: fh.Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor
) -> np.ndarray:
    """(3 + doses, n, C) float64 logits of n images that fire the feature, with preactivations raw
    (n, d_in): as they are, without it, at each dose but 0, and at TINY_DOSE.

    One call of the model's head, always for one feature: no other can change its rounding.
    """
    direction = layer.sae.W_dec[h.feature].detach() * layer.std
    without = raw - acts[:, None] * direction
    step = h.typical_activation * direction
    added = [without + dose * step for dose in (*DOSES[1:], TINY_DOSE)]
    states = [raw, without, *added]
    logits = layer.logits_from_raw(torch.cat(states))
    return logits.cpu().double().numpy().reshape(len(states), len(raw), -1)


def effect_test(
    h: fh.Hypothesis,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: fa.Activity,
    rule: fh.Rule | None = None,
) -> EffectTest:
    """The effect part of one claim on raw preactivations (N, d_in)."""
    rule, claim = rule or fh.Rule(), h.effect
    claims = {"raises": (claim.raises, claim.raised_by), "lowers": (claim.lowers, claim.lowered_by)}
    claims = {verb: (c, by) for verb, (c, by) in claims.items() if c is not None}
    classes = [c for c, _ in claims.values()]
    sign = np.array([1.0 if verb == "raises" else -1.0 for verb in claims])

    at, acts = activity.of(h.feature)
    chosen = fh.spread(torch.arange(len(at)), fh.N_EDIT)
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    base, without, *at_doses, tiny = _logits_in_states(h, layer, rows, acts)[:, :, classes]
    found = sign * (base - without)  # (n, claims)

    few = fh.spread(torch.arange(len(rows)), fh.DIRECTION_IMAGES)
    norm = float(layer.sae.W_dec[h.feature].norm())
    others = fh.largest_moves(fh.removed_by_others(layer, rows[few], acts[few], norm))
    chance = {v: float(np.quantile(by.mean(1), rule.percentile)) for v, by in others.items()}
    strength = (acts / acts.mean()).cpu().double().numpy()[:, None]  # what is removed of each
    further = (found > strength * [chance[verb] for verb in claims]).all(1)

    asked = [max(chance[verb], rule.effect_size * by) for verb, (_, by) in claims.items()]
    weaker = (found / asked)[:, (found.mean(0) / asked).argmin()]
    curve = np.stack([without, *at_doses]).mean(1) - without.mean(0)  # (doses, claims)
    line = np.outer(DOSES, (tiny - without).mean(0) / TINY_DOSE)
    by_claim = dict(zip(claims, found.mean(0).tolist(), strict=True))
    curves = dict(zip(claims, map(tuple, curve.T.tolist()), strict=True))
    lines = dict(zip(claims, map(tuple, line.T.tolist()), strict=True))
    return EffectTest(
        n=len(base),
        raised_by=by_claim.get("raises"),
        lowered_by=by_claim.get("lowers"),
        chance_raised=chance["raises"],
        chance_lowered=chance["lowers"],
        reach=float(weaker.mean()),
        reach_error=float(weaker.std() / math.sqrt(max(1, len(weaker) - 1))),
        further=int(further.sum()),
        less_far=int((~further).sum()),
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
    """All that was measured about one claim; None or empty where that part was not claimed, or
    where the feature cannot be judged."""

    feature: int
    n_active: int
    n_images: int
    judgeable: bool  # whether as many images as the rule asks for fire it, and leave it silent
    label_histogram: tuple[int, ...]  # of the images that fire it
    influence: float  # its share of all that removing single features does to the logits
    changes: float  # share of the images that fire it whose prediction changes without it
    detected: dict[str, Detected]  # "ink", "class", "both"
    described: Described | None = None
    edits: Edits | None = None
    effect: EffectTest | None = None
    drawn: Detected | None = None  # with the drawing in place of the words
    drawn_edits: Edits | None = None
    says_little: bool = False  # whether it is claimed that removing it changes few predictions

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
    if no_strokes and any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        raise ValueError(f"strokes cannot be tested: {no_strokes}")


class Scored(NamedTuple):
    """By how much claims predict where features are active, on images set out once."""

    parts: dict[int, dict[str, np.ndarray]]  # by feature and part, (N,)
    drawn: dict[int, np.ndarray]  # by feature, of the drawings


def score_claims(hypotheses: Sequence[fh.Hypothesis], images: Tensor, labels: Tensor) -> Scored:
    """Of claims about different features, on images (N, ...) with labels (N,)."""
    of_places = of_words = torch.empty(0, len(images), dtype=torch.float32)
    if any(h.proposes("ink") or any(h.drawing) for h in hypotheses):
        of_places = fh.place_inks(images)
        of_words = fh.word_inks(of_places)
    labels = labels.cpu()
    parts = {h.feature: fh.part_scores(h, of_words, labels) for h in hypotheses}
    with_drawing = [h for h in hypotheses if any(h.drawing)]
    drawn = {h.feature: fh.drawing_score(h, of_places, labels) for h in with_drawing}
    return Scored(parts, drawn)


def _check_scored(scored: Scored, n: int) -> None:
    """Raise ValueError unless the scores are of n images."""
    of_parts = (values for parts in scored.parts.values() for values in parts.values())
    found = {len(values) for values in (*of_parts, *scored.drawn.values())} - {n}
    if found:
        raise ValueError(f"the scores are of {min(found)} images, but {n} were given")


def _detect(
    scored: Scored, features: Sequence[int], activity: fa.Activity
) -> dict[int, dict[str, Detected]]:
    """By feature, how well its parts predict where it is active; "drawn" is a part here."""
    keys, scores = [], []
    for k in features:
        for part, values in scored.parts[k].items():
            keys.append((k, part))
            scores.append(values)
        if k in scored.drawn:
            keys.append((k, "drawn"))
            scores.append(scored.drawn[k])
    active = [activity.of(k)[0].numpy() for k, _ in keys]
    found: dict[int, dict[str, Detected]] = {k: {} for k in features}
    for (k, part), one in zip(keys, detected(scores, active), strict=True):
        found[k][part] = one
    return found


def _described(
    h: fh.Hypothesis, scores: dict[str, np.ndarray], activity: fa.Activity
) -> Described | None:
    """The images that a claim describes; None for one without a score."""
    if h.cut is None:
        return None
    at, _ = activity.of(h.feature)
    said = scores["both"] >= np.float32(h.cut)
    return Described(int(said.sum()), len(at), int(said[at.numpy()].sum()))


def test_hypotheses(
    hypotheses: Sequence[fh.Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    labels: Tensor,
    activity: fa.Activity | None = None,
    seed: int = 0,
    rule: fh.Rule | None = None,
    scored: Scored | None = None,
) -> list[Evidence]:
    """What images (N, ...) with labels (N,) say about the claims.

    detection  AUROC and average precision with which labels, ink and both predict where the feature
               is active, as worded, and as drawn
    erasing    on up to fh.N_EDIT images that fire it, the ink named is erased, and as much
               elsewhere
    filling    on the same, strokes named absent are painted, and as much elsewhere
    painting   on as many that do not, it is made as said, and as much elsewhere
    effect     on images that fire it, the feature is removed, and other directions of its length;
               then it is added in DOSES

    Claims about features that fewer than the rule's `min_active` images fire, or leave silent, are
    not tested. `activity` takes the place of the SAE's own, to see what chance gives; `scored` is
    that of `score_claims`, where it is at hand. Raises ValueError for shapes that do not fit, two
    claims about one feature, and strokes on images that cannot have them; IndexError for a feature
    that does not exist.
    """
    n, rule = len(images), rule or fh.Rule()
    activity = activity or fa.collect_activity(layer, images, labels)
    fa.check_activity(activity, layer, images, labels)
    _check_testable(hypotheses, layer, images)
    n_active = activity.n_active.tolist()
    judgeable = {k for k, m in enumerate(n_active) if rule.min_active <= m <= n - rule.min_active}
    some = [h for h in hypotheses if h.feature in judgeable]
    scored = scored or score_claims(some, images, labels)
    _check_scored(scored, n)
    found = _detect(scored, [h.feature for h in some], activity)
    removed = fa.removal_effects(layer, images, activity)
    n_classes = removed.mean_delta.shape[1]
    fh.check_labels(activity.labels, n_classes)
    histograms = fh.label_histograms(activity, n_classes)
    raw, editable = layer.raw_of_all(images), fh.Editable.of(images, seed)

    def on_claim(h: fh.Hypothesis) -> Evidence:
        k = h.feature
        known = Evidence(
            feature=k,
            n_active=n_active[k],
            n_images=n,
            judgeable=k in judgeable,
            label_histogram=tuple(histograms[k].tolist()),
            influence=float(removed.influence[k]),
            changes=float(removed.changes[k]),
            detected={},
        )
        if not known.judgeable:
            return known
        detected = dict(found[k])
        return known._replace(
            drawn=detected.pop("drawn", None),
            detected=detected,
            described=_described(h, scored.parts[k], activity),
            edits=edit_tests(h.ink, h, layer, editable, activity),
            effect=effect_test(h, layer, raw, activity, rule) if h.effect else None,
            drawn_edits=edit_tests(h.drawing, h, layer, editable, activity),
            says_little=h.says_little,
        )

    return [on_claim(h) for h in hypotheses]


# --------------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------------

CONFIRMED, INCONCLUSIVE, REFUTED, NONE = "confirmed", "inconclusive", "refuted", "no hypothesis"
CONFIDENCES = ("High", "Medium", "Low")
CONFIDENCE_RULE = """High: everything the sentence claims is confirmed, ink among it, and each
measurement clears its bar even at the pessimistic end of its 95% interval. Medium: not High, but at
least one part is confirmed and nothing is refuted. Low: the rest. A statement held on images set
aside when each measurement clears its bar there, too."""


class Measurement(NamedTuple):
    """One measured value with its 95% interval, the bar it must reach, its p-value, and the value
    that means no relation at all, which the interval must leave out."""

    value: float
    low: float
    high: float
    bar: float
    p: float | None  # None: it has none, or copies a measurement whose p-value counts
    null: float

    def verdict(self, significant: bool) -> str:
        if self.value >= self.bar and self.low > self.null and significant:
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
    explained: bool  # everything that is claimed is confirmed, and ink is claimed


TESTS_OF = {
    "ink": ("ink", *Edits._fields),
    "class": ("class",),
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
    """What was measured, test by test, and the rule's bars."""
    found = {}
    bars = {"class": rule.class_auroc, "ink": rule.ink_auroc, "both": rule.both_auroc}
    for part, d in evidence.detected.items():
        p = None if part == "both" and len(evidence.detected) == 2 else d.p
        found[part] = Measurement(d.auroc, d.auroc_low, d.auroc_high, bars[part], p, 0.5)
    for name, test in (evidence.edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            found[name] = Measurement(*test.difference(), rule.edit_difference, test.p, 0.0)
    e = evidence.effect
    if e is not None:
        wide = NEAR * e.reach_error
        found["effect"] = Measurement(e.reach, e.reach - wide, e.reach + wide, 1.0, e.p, 0.0)
    if evidence.says_little:
        count = round(evidence.changes * evidence.n_active)
        low, high = wilson_interval(count, evidence.n_active)
        found["little"] = Measurement(
            1 - evidence.changes, 1 - high, 1 - low, 1 - fh.LITTLE, None, 0.0
        )
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
    together = [verdicts[t] for t in (*TESTS_OF["both"], "little") if t in verdicts]
    whole = _joint([parts[part] for part in claimed] + together)
    explained = whole == CONFIRMED and h.proposes("ink")
    some = any(parts[part] == CONFIRMED for part in claimed)
    confidence = "Low"
    if explained and all(m.low >= m.bar for m in tests.values()):
        confidence = "High"
    elif some and whole != REFUTED:
        confidence = "Medium"
    return Judgement(h.feature, verdicts, parts, whole, confidence, explained)


def _check_pairs(claims: Sequence, found: Sequence, what: str) -> None:
    """Raise ValueError unless both are about the same features, in the same order."""
    ours, theirs = ([one.feature for one in some] for some in (claims, found))
    if ours != theirs:
        apart = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
        where = "feature {} meets feature {}" if apart else "they are {} and {}"
        where = where.format(*(apart or [(len(ours), len(theirs))])[0])
        raise ValueError(f"{what} are not about the same features in the same order: {where}")


def judge_hypotheses(
    hypotheses: Sequence[fh.Hypothesis], evidence: Sequence[Evidence], rule: fh.Rule | None = None
) -> list[Judgement]:
    """Verdicts and confidence, by CONFIDENCE_RULE; p-values corrected over all features and tests.

    A test is confirmed when its value reaches the bar, its interval leaves out that there is no
    relation, and it is significant; refuted when its 95% interval stays below the bar; and
    otherwise inconclusive. A part is refuted by one of its tests and confirmed by all; so is the
    whole. Raises ValueError unless the evidence is about the features of the hypotheses, in their
    order.
    """
    _check_pairs(hypotheses, evidence, "hypotheses and evidence")
    rule = rule or fh.Rule()
    found = [measurements(e, rule) for e in evidence]
    p = [m.p for tests in found for m in tests.values() if m.p is not None]
    significant = iter(benjamini_hochberg(p, rule.false_discovery_rate).tolist())
    judgements = []
    for h, e, tests in zip(hypotheses, evidence, found, strict=True):
        passed = {name: m.p is None or next(significant) for name, m in tests.items()}
        judgements.append(_judge(h, e, tests, passed))
    return judgements


def held(evidence: Evidence, rule: fh.Rule | None = None) -> bool | None:
    """Whether every measurement clears its bar, significant or not; None when there is none."""
    tests = measurements(evidence, rule or fh.Rule())
    return all(m.value >= m.bar for m in tests.values()) if tests else None


# --------------------------------------------------------------------------------------------------
# Does a sentence single its feature out?
# --------------------------------------------------------------------------------------------------

CANDIDATES = 8  # features of like rate among which a sentence must find its own


class Picked(NamedTuple):
    """Whether the score of a sentence predicts its own feature better than others."""

    among_eight: bool  # of like firing rate
    over_like: bool | None  # than the nearest other in decoder cosine
    over_company: bool | None  # than the other that fires most on the same images


def _check_images(evidence: Sequence[Evidence], activity: fa.Activity) -> None:
    """Raise ValueError unless the evidence is from as many images as the activity."""
    counts = {e.n_images for e in evidence} - {len(activity.labels)}
    if counts:
        n = len(activity.labels)
        raise ValueError(f"the activity is of {n} images, but the evidence of {min(counts)}")


def pick_features(
    evidence: Sequence[Evidence],
    scored: Scored,
    layer: fa.ExplainedLayer,
    activity: fa.Activity,
) -> dict[int, Picked]:
    """By feature that can be judged. A sentence without a score picks nothing. Raises ValueError
    for what is of another number of images than the activity."""
    _check_images(evidence, activity)
    _check_scored(scored, len(activity.labels))
    judgeable = [e for e in evidence if e.judgeable]
    order = [e.feature for e in sorted(judgeable, key=lambda e: (e.n_active, e.feature))]
    nearest = fa.nearest_features(layer.sae.W_dec)
    like = [[k] if c > 0 else [] for k, c in zip(*map(Tensor.tolist, nearest), strict=True)]
    company, _ = fa.firing_together(activity, 1)
    n = len(activity.labels)
    active = {}  # of features that tell images apart
    for k in range(layer.d_sae):
        at = activity.of(k)[0].numpy()
        if 0 < len(at) < n:
            active[k] = at

    def beats(k: int, others: Sequence[int]) -> bool | None:
        """Whether the sentence of k predicts it better than each of the others."""
        some = [c for c in others if c in active and c != k]
        if not some:
            return None
        if "both" not in scored.parts[k]:
            return False
        best = max(auroc_of_ranks(ranks, active[c]) for c in some)
        return bool(auroc_of_ranks(ranks, active[k]) > best)

    picked = {}
    for place, k in enumerate(order):
        ranks = midranks(scored.parts[k]["both"]) if "both" in scored.parts[k] else None
        first = max(0, min(place - CANDIDATES // 2, len(order) - CANDIDATES))
        eight = beats(k, order[first : first + CANDIDATES])
        near = beats(k, like[k]), beats(k, company[k].tolist())
        picked[k] = Picked(eight is not False and "both" in scored.parts[k], *near)
    return picked


# --------------------------------------------------------------------------------------------------
# How one set of features did
# --------------------------------------------------------------------------------------------------

BANDS = (0.003, 0.01, 0.03)  # firing rates at which bands of features end


class Band(NamedTuple):
    """Features whose firing rate is in a band."""

    upto: float  # 1.0: the last band
    features: int
    explained: int


class Held(NamedTuple):
    """Statements of one confidence, and those of them that could be checked and held on images set
    aside."""

    statements: int
    checked: int
    held: int


class Shares(NamedTuple):
    """Shares of the features that can be judged; of influence, where it says so."""

    features: int
    too_rare: int  # features that cannot be judged; they count in no share
    explained: float
    explained_low: float  # 95% interval, over features
    explained_high: float
    ink_confirmed: float
    class_confirmed: float
    effect_confirmed: float
    predicted: float  # the sentence reaches the AUROC asked for
    drawn: float | None  # the drawing does
    median_auroc: float | None
    median_precision: float | None
    median_recall: float | None
    average_precision: float | None  # its median
    among_eight: float
    over_like: float | None
    over_company: float | None
    influence_explained: float  # share of the influence of all features
    influence_high: float
    median_density: float | None  # share of the images that fire the median of these features
    bands: list[dict]
    confidence: dict[str, dict]


def _mean(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _bands(pairs: Sequence[tuple[Evidence, Judgement]]) -> list[dict]:
    bands = []
    for low, high in zip((0.0, *BANDS), (*BANDS, 1.0), strict=True):
        some = [j for e, j in pairs if low < e.n_active / e.n_images <= high]
        bands.append(Band(high, len(some), sum(j.explained for j in some))._asdict())
    return bands


def confidence_check(
    judgements: Sequence[Judgement], held_aside: Sequence[bool | None]
) -> dict[str, dict]:
    """Of the statements of each confidence, and of all, how many held on the images set aside."""
    check = {}
    for name in (*CONFIDENCES, "all"):
        pairs = [(j, h) for j, h in zip(judgements, held_aside, strict=True) if j.verdict != NONE]
        again = [h for j, h in pairs if name in (j.confidence, "all")]
        seen = [h for h in again if h is not None]
        check[name] = Held(len(again), len(seen), sum(seen))._asdict()
    return check


def shares_explained(
    evidence: Sequence[Evidence],
    judgements: Sequence[Judgement],
    picked: dict[int, Picked],
    held_aside: Sequence[bool | None],
    rule: fh.Rule,
) -> Shares:
    """How one set of features did; zeros where none can be judged. Raises ValueError unless
    evidence and judgements are about the same features."""
    _check_pairs(evidence, judgements, "evidence and judgements")
    pairs = [(e, j) for e, j in zip(evidence, judgements, strict=True) if e.judgeable]
    n = max(1, len(pairs))
    explained = sum(j.explained for _, j in pairs)
    low, high = wilson_interval(explained, n)
    confirmed = {part: sum(j.parts[part] == CONFIRMED for _, j in pairs) / n for part in fh.PARTS}
    aurocs = [e.auroc for e, _ in pairs if e.auroc is not None]
    described = [e.described for e, _ in pairs if e.described]
    drawn = [e.drawn.auroc >= rule.both_auroc for e, _ in pairs if e.drawn]
    picks = [picked[e.feature] for e, _ in pairs]
    return Shares(
        features=len(pairs),
        too_rare=len(evidence) - len(pairs),
        explained=explained / n,
        explained_low=low,
        explained_high=high,
        ink_confirmed=confirmed["ink"],
        class_confirmed=confirmed["class"],
        effect_confirmed=confirmed["effect"],
        predicted=sum(auroc >= rule.both_auroc for auroc in aurocs) / n,
        drawn=sum(drawn) / n if drawn else None,
        median_auroc=_median(aurocs),
        median_precision=_median([d.precision for d in described]),
        median_recall=_median([d.recall for d in described]),
        average_precision=_median(
            [e.detected["both"].average_precision for e, _ in pairs if e.detected]
        ),
        among_eight=sum(p.among_eight for p in picks) / n,
        over_like=_mean([p.over_like for p in picks]),
        over_company=_mean([p.over_company for p in picks]),
        influence_explained=sum(e.influence for e, j in pairs if j.explained),
        influence_high=sum(e.influence for e, j in pairs if j.confidence == "High"),
        median_density=_median([e.n_active / e.n_images for e, _ in pairs]),
        bands=_bands(pairs),
        confidence=confidence_check(judgements, held_aside),
    )


# --------------------------------------------------------------------------------------------------
# What did training add? The same path for other features
# --------------------------------------------------------------------------------------------------

COMPARED = 512  # at most so many features of each other kind


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


def other_directions(kind: str, z: Tensor, seed: int) -> Tensor:
    """What an SAE's features are compared with, (n, d_in): COMPARED "random directions", or the
    "neurons" of z (N, d_in), up and down, in random order.

    Raises ValueError for another kind.
    """
    d_in = z.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if kind == "random directions":
        return torch.randn(COMPARED, d_in, generator=generator, dtype=torch.float32)
    if kind == "neurons":
        up = torch.eye(d_in, dtype=torch.float32)
        return torch.cat([up, -up])[torch.randperm(2 * d_in, generator=generator)]
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
    aurocs: list[float]  # of the sentences on features that can be judged; 0 without one


def comparison_of(
    evidence: Sequence[Evidence],
    judgements: Sequence[Judgement],
    picked: dict[int, Picked],
    held_aside: Sequence[bool | None],
    rule: fh.Rule,
) -> Comparison:
    """From what came of one set of features."""
    aurocs = [e.auroc or 0.0 for e in evidence if e.judgeable]
    return Comparison(shares_explained(evidence, judgements, picked, held_aside, rule), aurocs)


def compare_features(
    features,
    layer: fa.ExplainedLayer,
    seen: Images,
    judging: Images,
    aside: Images,
    rule: fh.Rule,
    seed: int,
    strokes: bool = True,
) -> Comparison:
    """The SAE's path, from proposals to what holds on images set aside, for other features of the
    same layer, which have encode, W_enc and W_dec like an SAE. `strokes` as in
    `fh.propose_hypotheses`: only what may say the same can be compared.

    This is the one place in this room where claims are made: about these features, from `seen`.
    """
    other = layer._replace(sae=features)
    claims = fh.propose_hypotheses(other, *seen, rule, drawings=False, strokes=strokes)
    activity = fa.collect_activity(other, *judging)
    scored = score_claims(claims, *judging)
    evidence = test_hypotheses(claims, other, *judging, activity, seed, rule, scored)
    judgements = judge_hypotheses(claims, evidence, rule)
    again = [held(e, rule) for e in test_hypotheses(claims, other, *aside, None, seed + 1, rule)]
    picked = pick_features(evidence, scored, other, activity)
    return comparison_of(evidence, judgements, picked, again, rule)


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
    result: Comparison


def make_trial(
    hypotheses: list[fh.Hypothesis],
    rule: fh.Rule,
    evidence: list[Evidence],
    evidence_aside: Sequence[Evidence],
    activity: fa.Activity,
    picked: dict[int, Picked],
) -> Trial:
    """Judge the claims by the evidence, and say on which images it rests: `activity` is that of the
    judging images, number i of which is number 2 i of the test images. Raises ValueError for what
    does not belong together."""
    judgements = judge_hypotheses(hypotheses, evidence, rule)
    _check_pairs(hypotheses, evidence_aside, "hypotheses and the evidence of images set aside")
    _check_images(evidence, activity)
    firing, edited = [], []
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:STRONGEST]
        firing.append((2 * at[strongest]).tolist())
        on, off = fh.edited_images(h, activity)
        edited.append(((2 * on).tolist(), (2 * off).tolist()))
    held_aside = [held(e, rule) for e in evidence_aside]
    n_aside = evidence_aside[0].n_images
    result = comparison_of(evidence, judgements, picked, held_aside, rule)
    return Trial(
        hypotheses, rule, evidence, judgements, held_aside, n_aside, firing, edited, result
    )


def all_shares(trial: Trial, comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons with the SAE's own features in front."""
    return {"SAE": trial.result, **comparisons}


def influence_course(trial: Trial) -> dict[str, int]:
    """How many features, the most influential first, make 50, 90 and 99% of the influence."""
    falling = np.sort([e.influence for e in trial.evidence])[::-1].cumsum()
    if not falling[-1]:
        return {}
    return {f"{q:.0%}": int(np.searchsorted(falling, q - 1e-9)) + 1 for q in (0.5, 0.9, 0.99)}


def trial_record(trial: Trial, comparisons: dict[str, Comparison], sha256: str) -> dict:
    """What summary.json says about the trial; `sha256` is that of the frozen claims."""
    words = [len(fh.statement(h).split()) for h in trial.hypotheses if h.proposes("ink")]
    return {
        "sha256": sha256,
        "rule": trial.rule._asdict(),
        "confidence_rule": " ".join(CONFIDENCE_RULE.split()),
        "shares": {n: c.shares._asdict() for n, c in all_shares(trial, comparisons).items()},
        "features_that_make_influence": influence_course(trial),
        "median_words": _median(words),
    }


def _test_record(test: NamedTuple | None, *names: str) -> dict | None:
    """Its fields, and those of its properties that are named."""
    if test is None:
        return None
    return {**test._asdict(), **{name: getattr(test, name) for name in names}}


def _edits_record(edits: Edits | None) -> dict | None:
    if edits is None:
        return None
    return {name: _test_record(test, "p") for name, test in edits._asdict().items()}


def statement_record(k: int, trial: Trial) -> dict:
    """What feature_report.json says about the statement on feature k."""
    h, e, j = trial.hypotheses[k], trial.evidence[k], trial.judgements[k]
    edited = None
    if e.edits is not None or e.drawn_edits is not None:
        edited = dict(zip(("firing", "silent"), trial.edited[k], strict=True))
    return {
        "statement": fh.statement(h),
        "influence": h.influence,
        "changes": e.changes,
        "confidence": j.confidence,
        "verdict": j.verdict,
        "explained": j.explained,
        "measured": measured_lines(h, e, j, trial.rule),
        "hypothesis": fh.hypothesis_record(h),
        "evidence": {
            "text": evidence_line(h, e),
            "n_active": e.n_active,
            "n_images": e.n_images,
            "influence": e.influence,
            "label_histogram": list(e.label_histogram),
            "detected": {part: d._asdict() for part, d in e.detected.items()},
            "described": _test_record(e.described, "precision", "recall"),
            "edits": _edits_record(e.edits),
            "effect": _test_record(e.effect, "p"),
            "drawn": _test_record(e.drawn),
            "drawn_edits": _edits_record(e.drawn_edits),
            "verdicts": {"tests": j.tests, "parts": j.parts},
            "held_aside": trial.held_aside[k],
            "test_images": trial.firing[k],
            "edited_images": edited,
        },
    }


# --------------------------------------------------------------------------------------------------
# Telling it to people
# --------------------------------------------------------------------------------------------------


def _p_words(p: float | None) -> str:
    if p is None:
        return "no test of its own"
    return "p < 1e-99" if p < 1e-99 else f"p = {p:.1g}"


def auroc_words(auroc: float) -> str:
    """Three digits, rounded down: only a perfect one is 1.000."""
    return f"{math.floor(auroc * 1000) / 1000:.3f}"


def _detection_line(name: str, d: Detected) -> str:
    ends = f"[{auroc_words(d.auroc_low)}, {auroc_words(d.auroc_high)}]"
    also = f"average precision {d.average_precision:.3f}"
    return f"{name} where it fires: AUROC {auroc_words(d.auroc)} {ends}, {also}"


EDIT_WORDS = {
    "erasing": ("erasing what is said to be there", "off"),
    "filling": ("painting what is said to be absent", "off"),
    "painting": ("making it as said", "on"),
}


def _edit_counts(name: str, t: EditTest) -> str:
    what, way = EDIT_WORDS[name]
    return f"{what} turns it {way} on {t.named} of {t.n} images, elsewhere on {t.elsewhere}"


def _edit_line(name: str, t: EditTest) -> str:
    value, low, high = t.difference()
    return f"{_edit_counts(name, t)}: difference {value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values[1:])


def _effect_lines(h: fh.Hypothesis, t: EffectTest, m: Measurement, verdict: str) -> list[str]:
    claim = h.effect
    moves, doses = [], []
    if claim.raises is not None:
        logit, other = f"logit of {fa.class_name(h.classes, claim.raises)}", t.chance_raised
        said = f"said {claim.raised_by:.3f}, other directions {other:.3f}"
        moves.append(f"lowers the {logit} by {t.raised_by:.3f} ({said})")
        doses.append(f"{logit} {_signed(t.dose_raises)} (linear {_signed(t.linear_raises)})")
    if claim.lowers is not None:
        logit, other = f"logit of {fa.class_name(h.classes, claim.lowers)}", t.chance_lowered
        said = f"said {claim.lowered_by:.3f}, other directions {other:.3f}"
        moves.append(f"raises the {logit} by {t.lowered_by:.3f} ({said})")
        doses.append(f"{logit} {_signed(t.dose_lowers)} (linear {_signed(t.linear_lowers)})")
    reach = f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}] of what is asked for"
    further = f"further than those on {t.further} of {t.further + t.less_far} images"
    added = ", ".join(f"{dose:g}" for dose in t.doses[1:])
    return [
        f"removing it {' and '.join(moves)}: {reach}; {further}, {_p_words(m.p)}: {verdict}",
        f"adding {added} times its typical activation: {'; '.join(doses)}",
    ]


def measured_lines(
    h: fh.Hypothesis, e: Evidence, j: Judgement, rule: fh.Rule | None = None
) -> list[str]:
    """One line for each test: what was measured with its 95% interval, the bar, and the verdict."""
    measured = measurements(e, rule or fh.Rule())
    names = {
        "ink": "the ink named predicts",
        "class": "labels predict",
        "both": "the sentence predicts",
    }
    lines = []
    for part, d in e.detected.items():
        m = measured[part]
        said = f"bar {m.bar:g}, {_p_words(m.p)}: {j.tests[part]}"
        lines.append(f"{_detection_line(names[part], d)}, {said}")
    if e.described:
        lines.append(_described_words(e.described))
    for name, test in (e.edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            m = measured[name]
            said = f"bar {m.bar:g}, {_p_words(m.p)}: {j.tests[name]}"
            lines.append(f"{_edit_line(name, test)}, {said}")
    if e.effect is not None:
        lines += _effect_lines(h, e.effect, measured["effect"], j.tests["effect"])
    if "little" in measured:
        share, bar = fh.percent(e.changes), fh.percent(fh.LITTLE)
        said = f"on {share} of {e.n_active} images, at most {bar}: {j.tests['little']}"
        lines.append(f"removing it changes the prediction {said}")
    if e.drawn:
        lines.append(_detection_line("as drawn, it is predicted", e.drawn))
    for name, test in (e.drawn_edits or Edits(None, None, None))._asdict().items():
        if test is not None:
            lines.append(f"as drawn, {_edit_line(name, test)}")
    return lines


def _described_words(d: Described) -> str:
    """How often the sentence is right."""
    fire = f"of the {d.n:,} images it describes {fh.percent(d.precision)} fire it"
    return f"{fire}; of those that fire it, it describes {fh.percent(d.recall)}"


def evidence_line(h: fh.Hypothesis, e: Evidence) -> str:
    """The evidence in one line, all of it from images on which no claim was made."""
    pieces = [f"fires on {fh.percent(e.n_active / e.n_images)} of {e.n_images:,} unseen images"]
    ranked = sorted(range(len(e.label_histogram)), key=lambda c: (-e.label_histogram[c], c))
    shares = []
    for c in ranked[:2]:
        if e.label_histogram[c]:
            share = fh.percent(e.label_histogram[c] / e.n_active)
            shares.append(f"{share} of them {fh.images_of(h.classes, c)}")
    pieces[0] += ", " + fh.listed(shares) if shares else ""
    if not e.judgeable:
        pieces.append("too few that do, or do not, to judge")
    if e.described:
        pieces.append(_described_words(e.described))
    if e.auroc is not None:
        pieces.append(f"AUROC {auroc_words(e.auroc)}")
    if e.drawn:
        pieces.append(f"as drawn {auroc_words(e.drawn.auroc)}")
    for name, t in (e.edits or Edits(None, None, None))._asdict().items():
        if t is not None:
            pieces.append(_edit_counts(name, t))
    if e.n_active:
        pieces.append(f"without it {fh.percent(e.changes)} of their predictions change")
    return "; ".join(pieces)


def feature_lines(i: int, trial: Trial, mark: str | None) -> list[str]:
    """The Markdown section of the claim at position i; `mark` says whether other SAEs have the
    feature, too."""
    h, e, j = trial.hypotheses[i], trial.evidence[i], trial.judgements[i]
    words = {True: "held", False: "did not hold", None: "too few images to see"}
    aside = f"on images set aside: {words[trial.held_aside[i]]}"
    marked = f"; {mark}" if mark else ""
    lines = [
        f"### Feature {h.feature}: {fh.statement(h)}",
        "",
        f"- Influence: {fh.percent(h.influence)}",
        f"- Evidence: {evidence_line(h, e)}",
        f"- Confidence: **{j.confidence}**; verdict {j.verdict}; {aside}{marked}",
    ]
    lines += [f"- no {part} part: {why}" for part, why in h.why_not.items()]
    if trial.firing[i]:
        numbers = ", ".join(f"#{image}" for image in trial.firing[i])
        lines.append(f"- strongest of the {e.n_active:,} test images that fire it: {numbers}")
    return [*lines, ""]


def most_influential(hypotheses: Sequence[fh.Hypothesis]) -> list[int]:
    """Positions by falling influence on the discovery images, ties by number."""
    return sorted(range(len(hypotheses)), key=lambda i: (-hypotheses[i].influence, i))


HOW_TESTED = """Each statement was made from {discovery:,} validation images and frozen before it
was tested, once, on the {judging:,} test images with even numbers. The {aside:,} with odd numbers
were set aside to see whether confidence is deserved. SHA-256 of hypotheses.json: `{sha256}`.

A word is a region: the middle of the image has 5 x 5 cells (top, upper, middle, lower, bottom; far
left, left, middle, right, far right), and "stem upper left" is as true of an image as the best
vertical piece of stroke centred in that cell is inked, with blank sides. A bar is horizontal, a
stem vertical, a slash rises (/), a backslash falls (\\), ink is any. The sentence is scored by its
words alone, each counting alike. Percentages are of the validation images that fire the feature:
the share of a class among them, and of predictions that change. They are not tested as numbers; the
evidence has them for unseen images.

- The ink named predicts where the feature fires with AUROC {ink_auroc}, labels with {class_auroc},
the sentence as a whole with {both_auroc}. An image is described when it scores as high as separates
best (F1) on the validation images.
- Erasing: on images that fire it, the ink named is removed, and as much ink elsewhere. Filling:
strokes said to be absent are painted. Painting: on images that do not fire it, of the classes
named, what is said is made true. Elsewhere the same shapes are painted, with as much ink. Edits as
named must change the feature on a share of the images that is larger by {edit_difference}.
- Effect: removing the feature moves the logit named by {effect_size:.0%} of what is said, and
further than {percentile:.0%} of random directions of its length, each on the logit it moves most;
each larger dose moves it further. "Little effect": at most {little:.0%} of predictions change.
"Effect like any direction's": more do, but no logit moves further than by such a direction.
- As drawn: the same tests for the exact places of the drawing. They are no part of the verdict.

A test is confirmed when its value reaches the bar and it is significant among all tests of all
features at a false discovery rate of {false_discovery_rate}; refuted when its 95% interval stays
below the bar; otherwise inconclusive. One refuted test refutes the statement, and all must be
confirmed to confirm it. Fewer than {min_active} images that fire a feature, or do not, are too few
to judge it. Intervals: of an AUROC, DeLong's on the logit scale; of edits, Newcombe's for pairs.

{confidence}

A feature's influence is its share of all that removing single features does to the logits.
"""
TRAINING_ADDED = """Of the features that can be judged. The others fire as often and as strongly as
the SAE's features do, one for one: the more images fire a feature, the easier its tests are. A
statement can be true of a random direction, too: that it predicts does not say that training found
anything. "Picked of 8": the sentence predicts its own feature better than seven others of like rate
(by chance 12.5%); "over like" and "over company": than the nearest other in decoder direction, and
than the one that fires most on the same images (by chance 50%). Neurons have no other in the same
direction."""

TOLD = 100  # features, the most influential, that hypotheses.md tells
WHERE_ALL = """{told} of {all} features. All of them, and each test with its interval and verdict,
are in feature_report.html, to look at, and in feature_report.json (`evidence`, `measured`)."""


def _percent_or_none(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _held_words(row: dict) -> str:
    if not row["checked"]:
        return f"{row['statements']}, none seen again"
    return f"{row['statements']}, {row['held'] / row['checked']:.0%} held"


def shares_rows(record: dict) -> list[list[str]]:
    """The table of all sets of features, a column each. `record` is the `trial_record`."""
    shares = record["shares"]
    titles = {
        "explained": "explained: all that is said is confirmed",
        "ink_confirmed": "  ink is said and confirmed",
        "class_confirmed": "  labels are",
        "effect_confirmed": "  an effect is",
        "predicted": f"predicted, AUROC {record['rule']['both_auroc']:g}, as worded",
        "drawn": "  as drawn",
        "among_eight": "picked of 8 of like rate",
        "over_like": "picked over like",
        "over_company": "picked over company",
        "median_precision": "fire, of images described (median)",
        "median_recall": "described, of images that fire (median)",
        "influence_explained": "influence explained",
        "influence_high": "influence with confidence High",
    }
    rows = [["", *shares]]
    rows.append(["features that can be judged", *(str(s["features"]) for s in shares.values())])
    rows.append(["  too rare", *(str(s["too_rare"]) for s in shares.values())])
    for key, title in titles.items():
        rows.append([title, *(_percent_or_none(s[key]) for s in shares.values())])
    ends = [f"{s['explained_low']:.0%} to {s['explained_high']:.0%}" for s in shares.values()]
    rows.insert(4, ["  95% interval over features", *ends])
    firsts = next(iter(shares.values()))["bands"]
    names = [f"fire on up to {band['upto']:.1%}" for band in firsts[:-1]] + ["fire on more"]
    for i, name in enumerate(names):
        cells = [
            f"{s['bands'][i]['explained']} of {s['bands'][i]['features']}" for s in shares.values()
        ]
        rows.append([f"explained, {name}", *cells])
    for name in (*CONFIDENCES, "all"):
        cells = [_held_words(s["confidence"][name]) for s in shares.values()]
        rows.append([f"statements: {name}", *cells])
    return rows


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = rows
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *others)]


def headline(record: dict) -> str:
    """The one sentence about the trial."""
    shares = dict(record["shares"])
    own = shares.pop("SAE")
    text = (
        f"{own['influence_explained']:.0%} of the influence is explained, "
        f"{own['influence_high']:.0%} with confidence High; "
        f"{own['explained']:.0%} of the features are"
    )
    none = not any(found["explained"] for found in record["shares"].values())
    if none and record["median_words"] is None:
        text = "The SAE's sentences name no strokes, so no feature counts as explained"
    elif shares:
        best = max(shares, key=lambda name: shares[name]["explained"])
        other = shares[best]["explained"]
        times = f" ({own['explained'] / other:.1f} times)" if other else ""
        text += f", of the best control ({best}) {other:.0%}{times}"
    course = record["features_that_make_influence"]
    made = ", ".join(f"{n} make {share}" for share, n in course.items())
    return f"{text}. Features by influence on the test images: {made}."


def statements_markdown(
    trial: Trial, record: dict, title: str, marks: dict[int, str] | None = None
) -> str:
    """hypotheses.md: how the statements were tested, how they did as a whole, and the TOLD most
    influential features. `record` is the `trial_record`; `marks` by feature say whether other SAEs
    have it, too."""
    how = HOW_TESTED.format(
        discovery=trial.hypotheses[0].n_images,
        judging=trial.evidence[0].n_images,
        aside=trial.n_aside,
        sha256=record["sha256"],
        confidence=CONFIDENCE_RULE,
        little=fh.LITTLE,
        **trial.rule._asdict(),
    )
    lines = [f"# What the features mean: {title}", "", headline(record), "", how]
    lines += ["## What did training add, and does it hold?", "", TRAINING_ADDED, ""]
    lines += [*_markdown_table(shares_rows(record)), ""]
    lines += ["## Feature by feature, the most influential first", ""]
    told = most_influential(trial.hypotheses)[:TOLD]
    lines += [WHERE_ALL.format(told=len(told), all=len(trial.hypotheses)), ""]
    for i in told:
        lines += feature_lines(i, trial, (marks or {}).get(trial.hypotheses[i].feature))
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
    """How the statements did, beside those about features that training did not find. `record` is
    the `trial_record`."""
    return f"{headline(record)}\n\n{text_table(shares_rows(record))}"


COLOURS = ("#b2182b", "#2166ac", "#4d9221", "#e08214", "0.4")
CONFIDENCE_COLOURS = {"High": "#1b7837", "Medium": "#a6dba0", "Low": "0.75"}


def _draw_aurocs(axes, everything: dict[str, Comparison], bar: float) -> None:
    for colour, (name, c) in zip(COLOURS, everything.items(), strict=False):
        ranked = np.sort(c.aurocs)
        at_least = 1 - np.arange(len(ranked)) / max(1, len(ranked))
        axes.step([*ranked, 1.0], [*at_least, 0.0], color=colour, label=name)
    axes.axvline(bar, color="0.6", linestyle=":")
    axes.text(bar - 0.01, 0.03, f"bar {bar:g}", ha="right", fontsize=8.5, color="0.4")
    axes.set_xlim(0.5, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("AUROC on unseen images (0 without a statement)", fontsize=9)
    axes.set_title("share of features predicted at least so well", fontsize=10, loc="left")
    axes.legend(fontsize=8.5, loc="lower left")


def _draw_bands(axes, everything: dict[str, Comparison]) -> None:
    """Explained shares by firing rate, with 95% intervals over features."""
    width = 0.8 / len(everything)
    for i, (colour, (name, c)) in enumerate(zip(COLOURS, everything.items(), strict=False)):
        for x, band in enumerate(c.shares.bands):
            n = max(1, band["features"])
            share, (low, high) = band["explained"] / n, wilson_interval(band["explained"], n)
            at, label = x - 0.4 + (i + 0.5) * width, name if x == 0 else None
            axes.bar(at, share, width, color=colour, label=label)
            if band["features"]:
                ends = [[max(0.0, share - low)], [max(0.0, high - share)]]
                axes.errorbar(at, share, ends, color="0.2", linewidth=1, capsize=2)
    edges = [f"up to {edge:.1%}" for edge in BANDS] + ["more"]
    counts = [band["features"] for band in everything["SAE"].shares.bands]
    names = [f"{edge}\n({n} of the SAE)" for edge, n in zip(edges, counts, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("share of images that fire the feature", fontsize=9)
    if not any(c.shares.explained for c in everything.values()):
        axes.text(0.5, 0.5, "none is", ha="center", color="0.4", transform=axes.transAxes)
    axes.set_title(
        "share of features explained: all that is said is confirmed", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8.5)


def draw_explained(trial: Trial, comparisons: dict[str, Comparison]) -> Figure:
    """How well the statements about several sets of features predict, and what share is explained
    in each band of firing rates."""
    everything = all_shares(trial, comparisons)
    figure = fa.new_figure(1050, 400)
    left = figure.add_axes((0.06, 0.17, 0.4, 0.65))
    right = figure.add_axes((0.53, 0.17, 0.45, 0.65))
    _draw_aurocs(left, everything, trial.rule.both_auroc)
    _draw_bands(right, everything)
    for axes in (left, right):
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    title = "Statements about features, tested on images that were not used to make them"
    figure.suptitle(title, fontsize=11.5)
    return figure


def draw_influence(trial: Trial) -> Figure:
    """How many features do how much of the work, and with what confidence each is explained."""
    order = sorted(range(len(trial.evidence)), key=lambda i: -trial.evidence[i].influence)
    influence = np.array([trial.evidence[i].influence for i in order])
    figure = fa.new_figure(1050, 400)
    axes = figure.add_axes((0.07, 0.14, 0.86, 0.72))
    ranks = np.arange(1, len(order) + 1)
    confidences = [trial.judgements[i].confidence for i in order]
    for name, colour in CONFIDENCE_COLOURS.items():
        some = np.array([confidence == name for confidence in confidences])
        label = f"{name}: {influence[some].sum():.0%} of the influence"
        axes.bar(ranks[some], 100 * influence[some], 1.0, color=colour, label=label)
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.set_xlabel("features, the most influential first", fontsize=9)
    axes.set_ylabel("influence of each, %", fontsize=9)
    axes.legend(fontsize=9, loc="center right", title="confidence in its statement")
    total = axes.twinx()
    total.plot(ranks, 100 * influence.cumsum(), color="0.2", linewidth=1.5)
    for share, n in influence_course(trial).items():
        total.plot([n], [float(share.rstrip("%"))], "o", color="0.2", markersize=4)
        total.annotate(
            f"{n} make {share}",
            (n, float(share.rstrip("%"))),
            (6, -12),
            fontsize=9,
            textcoords="offset points",
        )
    total.set_ylim(0, 105)
    total.set_ylabel("all so far, %", fontsize=9)
    for one in (axes, total):
        one.tick_params(labelsize=8.5)
        one.spines["top"].set_visible(False)
    title = "Who does the work: what removing single features does to the logits"
    figure.suptitle(title, fontsize=11.5)
    return figure
