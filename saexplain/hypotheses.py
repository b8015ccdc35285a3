"""What should an image look like for a feature to be active? Drawings, proposed and frozen.

    discovery = discover(layer)                                   # from the split "val" alone
    hypotheses = propose_hypotheses(layer, discovery)             # one for each feature
    sha256 = freeze_hypotheses(hypotheses, "hypotheses.json")     # before any test image is read
    hypotheses, rule = load_frozen("hypotheses.json", sha256)     # raises if the file was edited

A hypothesis is a picture: cells of the canvas where ink is wanted, and cells where it is not. An
image's score is its ink in the former less that in the latter; from a threshold on, the feature is
predicted to be active. Classes, logits and a place may be named beside it; they are tested by
themselves and are no part of the score. Words are a caption and decide nothing.

Where a feature's pattern does not follow it, nothing is drawn: then the classes named predict the
feature to be active, on all their images. Where a layer has positions a drawing is of what a
position sees, and an image's score is the largest over positions. There a feature may be active
somewhere on nearly all images; then a hypothesis is about those on which it is strongly active,
from a number on that is fixed with it.

This module tests nothing: `evaluation` does that, on other images, and must not be imported here.

Key: N discovery images, C classes, d_sae features, h x w = P cells of the canvas, or of the grid of
a layer's positions where a place is meant.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, Removals, collect_activity, removal_effects
from saexplain.captions import caption_of, caption_without_drawing, images_of_classes
from saexplain.crops import Crops, can_draw_crops, crops_of_positions
from saexplain.ink import Canvas
from saexplain.patterns import unit_gradients
from saexplain.progress import progress_bar
from saexplain.regions import choose_regions, local_covariance
from saexplain.where import FAITHFUL

CONFIDENCES = ("High", "Medium", "Low")
TONES = {".": 0, "+": 1, "#": 2, "-": -1, "=": -2}  # characters of a drawing in a file
MAX_CAPTION = 300  # characters, also of the reason for having no drawing
PLACES = (  # those of thirds before those of ninths
    *("upper third", "middle third", "lower third", "left third", "center third", "right third"),
    *("upper left", "upper center", "upper right", "middle left", "center", "middle right"),
    *("lower left", "lower center", "lower right"),
)
MIN_ACTIVE = 8  # active, and inactive, images below which nothing is proposed or tested


class Rule(NamedTuple):
    """The bars of the tests, frozen together with the hypotheses."""

    high_f1: float = 0.6  # F1 from which confidence may be High ...
    high_lift: float = 0.25  # ... and by how much it must exceed that of picking every image
    medium_f1: float = 0.3
    medium_lift: float = 0.15
    edit_difference: float = 0.25  # share of images changed by the named edit, less that elsewhere
    enrichment: float = 1.5  # times their share of all images that named classes must reach
    percentile: float = 0.95  # of random directions of the same norm, which an effect must exceed


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """What a feature may mean.

        Hypothesis(feature=116, wanted=mask, classes=(1, 7), raises=1, caption="vertical line")

    Args:
        feature: its number in the SAE.
        wanted, unwanted: (h, w) cells with ink, and without: bool, or 0, 1 and 2, where 2 counts
            twice. h x w are the pixels of the images, or the cells of `Canvas` for large ones.
        classes: labels that are more frequent among the active images than among all.
        raises, lowers: logits that the feature raises and lowers.
        caption: words; by default from the geometry of the drawing.
        confidence: how sure its author is, "High", "Medium", "Low" or "" for no opinion.
        threshold: score from which on an image is predicted to be active, in 255ths of a cell full
            of ink; None: to be found on validation images.
        place: where in an image the feature is most active, one of PLACES.
        undrawn: why it has no drawing; then its classes predict the feature to be active.
        strong_from: activation from which an image counts as active, where a layer has positions;
            None: all active images count.

    Raises ValueError for values that cannot be used, with the value met.
    """

    feature: int
    wanted: np.ndarray
    unwanted: np.ndarray | None = None
    classes: tuple[int, ...] = ()
    raises: int | None = None
    lowers: int | None = None
    caption: str = ""
    confidence: str = ""
    threshold: int | None = None
    place: str = ""
    undrawn: str = ""
    strong_from: float | None = None

    def __post_init__(self) -> None:
        wanted = _as_tones("wanted", self.wanted)
        blank = np.zeros_like(wanted)
        unwanted = blank if self.unwanted is None else _as_tones("unwanted", self.unwanted)
        if wanted.shape != unwanted.shape:
            raise ValueError(
                f"wanted and unwanted must have one shape, got {wanted.shape} and {unwanted.shape}"
            )
        if (both := int(((wanted > 0) & (unwanted > 0)).sum())) > 0:
            raise ValueError(f"a cell cannot be wanted and unwanted, but {both} are")
        if not isinstance(self.classes, Iterable):
            raise ValueError(f"classes must be labels, as in (1, 7), got {self.classes!r:.60}")
        if self.confidence not in ("", *CONFIDENCES):
            raise ValueError(f"confidence must be one of {CONFIDENCES}, got {self.confidence!r}")
        for name in ("caption", "undrawn"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > MAX_CAPTION:
                raise ValueError(f"{name} must be text of at most {MAX_CAPTION} characters")
        if self.place not in ("", *PLACES):
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {self.place!r:.60}")
        if self.undrawn and (wanted.any() or unwanted.any()):
            raise ValueError("undrawn must be empty where a cell is wanted or unwanted")
        if self.strong_from is not None and not (
            _is_number(self.strong_from) and 0 < self.strong_from < math.inf
        ):
            raise ValueError(f"strong_from must be a positive number, got {self.strong_from!r:.60}")
        checked = {"wanted": wanted, "unwanted": unwanted}
        checked["feature"] = _index("feature", self.feature)
        checked["classes"] = tuple(_index("a class", c) for c in self.classes)
        if len(set(checked["classes"])) < len(checked["classes"]):
            raise ValueError(f"classes must be different, got {checked['classes']}")
        for name in ("raises", "lowers", "threshold"):
            if (value := getattr(self, name)) is not None:
                least = -fa.LAST_INDEX if name == "threshold" else 0
                checked[name] = _index(name, value, least)
        if self.raises is not None and self.raises == self.lowers:
            raise ValueError(f"a feature cannot raise and lower the same logit, {self.raises}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.caption:
            object.__setattr__(self, "caption", caption_of(self.weights))

    @property
    def weights(self) -> np.ndarray:
        """(h, w) int8, from -2, strongly unwanted, to 2, strongly wanted."""
        return self.wanted - self.unwanted

    @property
    def is_drawn(self) -> bool:
        """Whether any cell is wanted or unwanted."""
        return bool(self.weights.any())


def _is_number(value: object) -> bool:
    """Whether the value is a number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _index(name: str, value: object, least: int = 0) -> int:
    """The value as an int, also of numpy's. Raises ValueError unless it is a whole number."""
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be a whole number, got {value}")
    return int(fa.check_whole(name, value, least))


def _as_tones(name: str, cells: object) -> np.ndarray:
    """`cells` as (h, w) int8. Raises ValueError unless they are 0, 1 or 2."""
    array = np.asarray(fa.as_array(cells))
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have shape (h, w), got {array.shape}")
    if not np.isin(array, (0, 1, 2)).all():
        met = array[~np.isin(array, (0, 1, 2))][0]
        raise ValueError(f"{name} must hold 0, 1 and 2 only, got {met!r:.40}")
    return array.astype(np.int8)


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def scores_of(weights: np.ndarray | Tensor, levels: Tensor) -> Tensor:
    """(F, N) int32 scores of drawings (F, h, w) on images with levels (N, P) of ink: the sum of
    weight times level, in 255ths of a cell full of ink."""
    flat = torch.as_tensor(np.asarray(weights)).flatten(1).float()
    # Sums of whole numbers below 2^24 are exact in float32, in whatever order they are added.
    return (flat @ levels.float().T).round().int()


def best_threshold(scores: np.ndarray, at: np.ndarray) -> int:
    """The threshold on whole scores (N,) with the largest F1, the harmonic mean of precision and
    recall, when the images `at` (m,) are the active ones.

    It lies half way between the last score picked and the next lower one, rounded up.
    """
    marked = 2 * scores.astype(np.int64)  # the last bit: whether the image is active
    marked[at] += 1
    marked = np.sort(marked)[::-1]  # several times faster than sorting indices
    ranked, hits = marked >> 1, (marked & 1).cumsum()
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + len(at))
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    best = int(np.where(last_of_ties, f1, -1).argmax())
    lower = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return int(-((-ranked[best] - lower) // 2))


# --------------------------------------------------------------------------------------------------
# Propose
# --------------------------------------------------------------------------------------------------

MAX_CLASSES = 2  # named beside a drawing
MAX_CLASSES_UNDRAWN = 20  # named where they predict activity themselves
FALSE_CLASSES = 0.01  # of these, the share that may be named by chance (Benjamini & Hochberg 1995)
STRONG_SHARES = (0.4, 0.2, 0.1, 0.05, 0.02)  # of all images, that may count as strongly active
STRONG_SHARE = 0.05  # the same where no class is named
LEAST_GAIN = 0.05  # in `share_gained`, for which fewer images count
MIN_STRONG = 32  # strongly active images: enough, also of a smaller half of the test images
N_DIRECTIONS = 64  # random ones, the same for all features
NULL_SIZE = (N_DIRECTIONS, 16)  # random directions, and images from which they are removed
NULL_SIZE_SLOW = (16, 4)  # the same where the rest of the network takes long
DIRECTIONS_SEED = 20_000_003  # no run's own: baselines must draw other directions
EFFECT_MARGIN = 1.25  # times a random direction's effect that is needed to name a logit
CANVAS_IMAGES = 2000  # to which a canvas is fitted where images are read from a disk
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth naming


class Discovery(NamedTuple):
    """What is known of the discovery images, the same for all SAEs of a layer; all but `raw` is on
    the CPU. Where nothing is drawn there is no canvas, and what belongs to it is empty."""

    canvas: Canvas | None
    levels: Tensor  # (N, P) uint8 ink of the images
    labels: Tensor  # (N,) int64
    raw: Tensor  # (N, d_in) the layer's output for them, or (N, positions, d_in)
    unit_patterns: Tensor  # (d_in, P) mean gradient of each standardized unit to each cell's ink
    metric: Tensor  # (P, P), see `local_covariance`
    patterns: Tensor | None = None  # (d_sae, P) of features of a layer with positions, whose canvas
    # and levels are those of crops


def discover(
    layer: fa.ExplainedLayer,
    unit_heats: Tensor | None = None,
    drawable: Tensor | None = None,
    crop_heats: Tensor | None = None,
) -> Discovery:
    """The discovery images of the layer, its split "val"; `unit_heats` (d_in, H, W) are the
    `unit_gradients`, channels summed, where they are at hand.

    There is a canvas unless no feature is `drawable` (d_sae,). Where the layer has positions it is
    one of crops, if features have patterns `crop_heats` (d_sae, a, b) that are smaller than an
    image. Raises ValueError where no gradient leads from the layer to the pixels.
    """
    images, labels, raw = layer.splits["val"]
    side = None if crop_heats is None else tuple(crop_heats.shape[1:])
    nothing = drawable is not None and not drawable.any()
    if layer.has_positions and not nothing and can_draw_crops(side, tuple(images.shape[-2:])):
        canvas, crops = fit_canvas_of_crops(images, layer.positions, side)
        levels, patterns = canvas.levels(crops), canvas.pattern(crop_heats)
        metric = local_covariance(levels, canvas)
        return Discovery(canvas, levels.byte(), labels.cpu(), raw, torch.empty(0), metric, patterns)
    if layer.has_positions or nothing:
        none = torch.empty(0)
        return Discovery(None, none, labels.cpu(), raw, none, none)
    unit_heats = unit_gradients(layer, images).sum(1) if unit_heats is None else unit_heats
    canvas = fit_canvas(images)
    levels = ink_levels(canvas, images)
    metric = local_covariance(levels, canvas)
    return Discovery(canvas, levels.byte(), labels.cpu(), raw, canvas.pattern(unit_heats), metric)


def fit_canvas(images: Tensor | object) -> Canvas:
    """The canvas of images (N, C, H, W), by CANVAS_IMAGES of them where they are not in memory."""
    some = evenly_spaced(torch.arange(len(images)), CANVAS_IMAGES)
    return Canvas.fit(images if isinstance(images, Tensor) else images[some])


def fit_canvas_of_crops(
    images: Tensor | object, positions: fa.Positions, side: tuple[int, int]
) -> tuple[Canvas, Tensor]:
    """The canvas of crops (a, b) around positions of images, with ink as in whole images, and the
    crops (n, C, a, b) at random from which it is."""
    crops = crops_of_positions(images, positions, side)
    return fit_canvas(images).of_crops(crops), crops


def ink_levels(canvas: Canvas, images: Tensor | object) -> Tensor:
    """`Canvas.levels` of images that need not be in memory."""
    if isinstance(images, Tensor):
        return canvas.levels(images)
    return torch.cat([canvas.levels(some) for some in images.split(fa.ROWS)])


def patterns_on_canvas(layer: fa.ExplainedLayer, discovery: Discovery) -> Tensor:
    """(d_sae, P) gradient of each feature's pre-activation with respect to each cell's ink."""
    if discovery.patterns is not None:
        return discovery.patterns
    return layer.sae.W_enc.detach().float().cpu().T @ discovery.unit_patterns


def enriched_classes(
    histogram: np.ndarray, label_counts: np.ndarray, enrichment: float
) -> tuple[int, ...]:
    """At most MAX_CLASSES labels, by their share of the active images, that is `enrichment` times
    their share of all; both (C,) are counts of images."""
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    most = np.argsort(-share, kind="stable").tolist()
    named = [c for c in most if share[c] > 0 and share[c] >= enrichment * usual[c]]
    return tuple(named[:MAX_CLASSES])


def predictive_classes(
    histogram: np.ndarray, label_counts: np.ndarray, enrichment: float
) -> tuple[int, ...]:
    """The labels whose images predict activity with the largest F1, of those whose share of the
    active images is `enrichment` times their share of all, and more than by chance, at most
    MAX_CLASSES_UNDRAWN; both (C,) are counts of images. Those with the largest share of active
    images come first."""
    if not histogram.any():
        return ()
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    rate = histogram / np.maximum(label_counts, 1)  # of the images of a class that are active
    ranked = [c for c in np.argsort(-rate, kind="stable") if share[c] > 0]
    n_all, n_active = label_counts.sum(), histogram.sum()
    by_chance = stats.hypergeom.sf(histogram - 1, n_all, label_counts, n_active)
    seldom = stats.false_discovery_control(by_chance.clip(0, 1)) <= FALSE_CLASSES
    ranked = [c for c in ranked if seldom[c] and share[c] >= enrichment * usual[c]]
    ranked = ranked[:MAX_CLASSES_UNDRAWN]
    both, picked = histogram[ranked].cumsum(), label_counts[ranked].cumsum()
    f1 = 2 * both / (picked + histogram.sum())
    return tuple(int(c) for c in ranked[: int(f1.argmax()) + 1]) if ranked else ()


def strong_levels(acts: Tensor, n_images: int) -> dict[float, float]:
    """By the share of n_images that then counts, activations from which an image is strongly
    active, where fewer count than are active by acts (n,)."""
    ranked = acts.sort(descending=True).values.tolist()
    counts = {share: max(MIN_STRONG, round(share * n_images)) for share in STRONG_SHARES}
    return {share: ranked[n - 1] for share, n in counts.items() if n < len(ranked)}


def strong_pairs(k: int, activity: Activity, strong_from: float | None) -> Tensor:
    """(n,) bool, of the images that activate feature k, those that count from `strong_from` on."""
    _, acts = activity.of(k)
    return acts >= (0 if strong_from is None else strong_from)


def strong_histogram(
    k: int, activity: Activity, strong_from: float | None, n_classes: int
) -> np.ndarray:
    """(C,) int64, the images of `strong_pairs` by label."""
    at = activity.of(k)[0][strong_pairs(k, activity, strong_from)]
    return torch.bincount(activity.labels[at], minlength=n_classes).numpy()


def chance_f1(rate: float) -> float:
    """F1 of picking every image, the best without looking at them, at a rate of active images."""
    return 2 * rate / (1 + rate)


def share_gained(f1: float, rate: float) -> float:
    """How far an F1 is from that of picking every image, at a rate of active images, towards 1: it
    shows how well activity is predicted at different rates."""
    chance = chance_f1(rate)
    return (f1 - chance) / max(1 - chance, 1e-9)


def strong_classes(
    k: int, activity: Activity, label_counts: np.ndarray, enrichment: float
) -> tuple[float | None, tuple[int, ...]]:
    """From which activation on an image counts, None where all active ones do, and the
    `predictive_classes` of feature k then.

    Of all active images and STRONG_SHARES, it is where these classes predict best by
    `share_gained`, by at least LEAST_GAIN better than with more images; without any class it is
    STRONG_SHARE. `label_counts` (C,) are of all images.
    """
    n_images, n_classes = len(activity.labels), len(label_counts)
    levels = strong_levels(activity.of(k)[1], n_images)
    best, found = -LEAST_GAIN, (levels.get(STRONG_SHARE), ())
    for level in dict.fromkeys((None, *levels.values())):
        histogram = strong_histogram(k, activity, level, n_classes)
        classes = list(predictive_classes(histogram, label_counts, enrichment))
        n_strong, n_picked = histogram.sum(), label_counts[classes].sum()
        f1 = 2 * histogram[classes].sum() / max(1, n_picked + n_strong)
        if classes and (gain := share_gained(f1, n_strong / n_images)) > best + LEAST_GAIN:
            best, found = gain, (level, tuple(classes))
    return found


@functools.cache
def random_directions(d_in: int) -> Tensor:
    """(N_DIRECTIONS, d_in) unit vectors drawn at random, the same in every run."""
    generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
    noise = torch.randn(N_DIRECTIONS, d_in, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(noise, dim=1)


def is_slow(layer: fa.ExplainedLayer) -> bool:
    """Whether the rest of the network reads more than a vector, and so takes long."""
    return layer.has_positions or getattr(layer.model, "head_entries", 0) > len(layer.mu)


@torch.no_grad()
def null_effect(
    k: int, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor, percentile: float
) -> dict[str, float]:
    """The mean change of a logit that a `percentile` of random directions does not exceed, when
    they are removed in place of feature k: for the logit that each "raises", and "lowers", most.

    raw (n, ...) are outputs of the layer on images that activate the feature by acts (n,), or (n,
    positions). Each direction has the feature's norm, and may choose its logits, as the feature
    does.
    """
    n_directions, n_images = NULL_SIZE_SLOW if is_slow(layer) else NULL_SIZE
    some = evenly_spaced(torch.arange(len(acts)), n_images).to(acts.device)
    raw, acts = raw[some], acts[some]
    norm = float(layer.sae.W_dec[k].norm())
    steps = random_directions(len(layer.mu))[:n_directions].to(layer.mu) * norm * layer.std
    base, changes = layer.logits(raw), []
    for step in steps:
        changes.append(base - layer.logits(layer.moved(raw, step, -acts)))
    mean = torch.stack(changes).mean(1).cpu().double().numpy()  # (n_directions, C)
    largest = {"raises": mean.max(1), "lowers": -mean.min(1)}
    return {verb: float(np.quantile(by, percentile)) for verb, by in largest.items()}


def acts_on(layer: fa.ExplainedLayer, raw: Tensor, k: int, acts: Tensor) -> Tensor:
    """The activations of feature k on raw (n, ...): acts (n,), which are known, or (n, positions)
    of a layer with positions."""
    return layer.acts_of(raw, k) if layer.has_positions else acts.to(raw.device)


def evenly_spaced(indices: Tensor, n: int) -> Tensor:
    """At most n of the indices, evenly spaced, the first and the last among them."""
    places = torch.linspace(0, len(indices) - 1, min(n, len(indices)), dtype=torch.float32)
    return indices[places.round().long()]


def changed_logits(
    k: int,
    delta: Tensor,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: Activity,
    percentile: float,
) -> dict[str, int | None]:
    """The logits that feature k "raises" and "lowers": those that fall and rise most without it, by
    delta (C,), where they change by more than random directions change a logit; raw is (N, d_in).
    """
    logit = {"raises": int(delta.argmin()), "lowers": int(delta.argmax())}
    change = {"raises": -float(delta.min()), "lowers": float(delta.max())}
    if max(change.values()) < SMALLEST_EFFECT:
        return dict.fromkeys(logit)
    at, acts = activity.of(k)
    _, n_images = NULL_SIZE_SLOW if is_slow(layer) else NULL_SIZE
    some = evenly_spaced(torch.arange(len(at)), n_images)
    rows = raw[at[some].to(raw.device)]
    null = null_effect(k, layer, rows, acts_on(layer, rows, k, acts[some]), percentile)
    named = {v: change[v] >= max(SMALLEST_EFFECT, EFFECT_MARGIN * null[v]) for v in logit}
    return {verb: logit[verb] if named[verb] else None for verb in logit}


POSITIONS_UNDRAWN = "the layer has positions, and a drawing is of the whole image"
UNFAITHFUL = "its pattern follows it with a correlation of {correlation:.2f} only"
ROUGH = "its pattern is as rough as noise"
UNCAPTIONED = "not captioned"
PREDICTS_BADLY = "its drawing picks validation images hardly better than picking every image does"


class Faithful(NamedTuple):
    """How well the pattern of each feature follows it, (d_sae,) each."""

    drawable: Tensor  # bool, whether well enough for a drawing
    correlation: Tensor  # of the pattern's sum over an image with the pre-activation
    reason: str = ""  # why none may be drawn, where it is not their correlation


class Drawings(NamedTuple):
    """What is drawn of the features that may be drawn."""

    weights: np.ndarray  # (d_sae, h, w) int8, blank where nothing is drawn; (d_sae, 1, 1): nowhere
    strength: np.ndarray  # of the same shape, how much each cell matters
    thresholds: dict[int, int]  # by feature
    strong_from: dict[int, float | None] = {}  # noqa: RUF012 - by feature, with positions


def draw_features(
    layer: fa.ExplainedLayer, discovery: Discovery, activity: Activity, features: Tensor
) -> Drawings:
    """The drawings of `features` (F,), with thresholds for those that are drawn."""
    shape = (layer.d_sae, *(discovery.canvas.shape if discovery.canvas else (1, 1)))
    weights = np.zeros(shape, np.int8)
    if not len(features):
        return Drawings(weights, weights, {})
    patterns = patterns_on_canvas(layer, discovery)
    weights[features] = choose_regions(patterns[features], discovery.metric, discovery.canvas)
    strength = (patterns * discovery.canvas.std).abs().view(shape).numpy()
    if discovery.patterns is not None:
        found = fit_crop_drawings(layer, discovery.canvas, weights, activity, features.tolist())
        poor = [k for k in features.tolist() if k not in found]
        weights[poor] = 0
        thresholds = {k: threshold for k, (threshold, _) in found.items()}
        return Drawings(weights, strength, thresholds, {k: v for k, (_, v) in found.items()})
    levels, thresholds = discovery.levels.float(), {}
    for some in features.split(256):  # bounds the memory of the scores
        scores = scores_of(weights[some.numpy()], levels).numpy()
        for k, own in zip(some.tolist(), scores, strict=True):
            if weights[k].any() and len(at := activity.of(k)[0]):
                thresholds[k] = best_threshold(own, at.numpy())
    return Drawings(weights, strength, thresholds)


def fit_crop_drawings(
    layer: fa.ExplainedLayer,
    canvas: Canvas,
    weights: np.ndarray,
    activity: Activity,
    features: list[int],
    least: float = Rule().medium_lift,
) -> dict[int, tuple[int, float | None]]:
    """By feature the threshold of its drawing, weights (d_sae, a, b) of crops, and from which
    activation on an image counts: where it predicts best, as in `strong_classes`.

    Without those of the `features` whose F1 never exceeds that of picking every image by `least`:
    color, for one, cannot be drawn.
    """
    images = layer.splits["val"].images
    crops, found = Crops.of(canvas, layer.positions, tuple(images.shape[-2:])), {}
    scores = crops.scores(weights[features], images)[0].numpy()
    for k, own in zip(features, scores, strict=True):
        (at, acts), best = activity.of(k), -LEAST_GAIN
        for level in (None, *dict.fromkeys(strong_levels(acts, len(own)).values())):
            strong = at[strong_pairs(k, activity, level)].numpy()
            if not weights[k].any() or not MIN_ACTIVE <= len(strong) <= len(own) - MIN_ACTIVE:
                continue
            threshold = best_threshold(own, strong)
            n_both, n_picked = (own[strong] >= threshold).sum(), (own >= threshold).sum()
            f1, rate = float(2 * n_both / (n_picked + len(strong))), len(strong) / len(own)
            gain = share_gained(f1, rate)
            if f1 - chance_f1(rate) >= least and gain > best + LEAST_GAIN:
                best, found[k] = gain, (threshold, level)
    return found


def reasons_undrawn(
    layer: fa.ExplainedLayer, discovery: Discovery, faithful: Faithful | None
) -> dict[int, str]:
    """By feature, why it may not be drawn; without those that may."""
    every = range(layer.d_sae)
    if layer.has_positions and discovery.canvas is None:
        return dict.fromkeys(every, POSITIONS_UNDRAWN)
    if faithful is None and discovery.canvas is None:
        return dict.fromkeys(every, "there is no canvas to draw on")
    if faithful is None:
        return {}
    correlation = faithful.correlation.tolist()
    reasons = [
        faithful.reason or (UNFAITHFUL.format(correlation=c) if c < FAITHFUL else ROUGH)
        for c in correlation
    ]
    return {k: reasons[k] for k in every if not faithful.drawable[k]}


def propose_hypotheses(
    layer: fa.ExplainedLayer,
    discovery: Discovery,
    rule: Rule | None = None,
    activity: Activity | None = None,
    removed: Removals | None = None,
    in_full: bool = True,
    faithful: Faithful | None = None,
    classes: Sequence[str] = (),
) -> list[Hypothesis]:
    """A hypothesis about every feature, from the discovery images alone.

    The drawing has the regions that follow the feature's input pattern best, see `regions`; the
    threshold has the largest F1; labels are those of `enriched_classes`, or `predictive_classes`
    where nothing is drawn, with positions of `strong_classes`; logits are those of
    `changed_logits`, the place that of `place_of`. Without `in_full` no logits are named, and there
    are no captions. A feature with fewer than MIN_ACTIVE active, or inactive, images gets an empty
    drawing; so does one that is not `faithful`, or whose drawing of crops predicts badly, with the
    reason, and, if enough images are active, classes and a place.

    `activity` and `removed`, of the same images, are computed where they are not given; `classes`
    are the names that captions use where nothing is drawn.
    """
    rule = rule or Rule()
    activity = activity or collect_activity(layer, discovery.raw, discovery.labels)
    if in_full and removed is None:
        removed = removal_effects(layer, discovery.raw, activity)
    undrawn = reasons_undrawn(layer, discovery, faithful)
    features = torch.tensor([k for k in range(layer.d_sae) if k not in undrawn], dtype=torch.int64)
    drawings = draw_features(layer, discovery, activity, features)
    label_counts = torch.bincount(activity.labels, minlength=layer.n_classes).numpy()
    places = Places.of(layer, activity) if layer.has_positions else None
    findings = Findings(drawings, activity, label_counts, places, rule.enrichment, classes)
    hypotheses = []
    for k in progress_bar(range(layer.d_sae), "features", layer.d_sae):
        h = propose(k, undrawn.get(k, ""), findings)
        if in_full and h.caption == UNCAPTIONED:  # not an empty one
            given = (removed.mean_delta[k], layer, discovery.raw, activity, rule.percentile)
            h = captioned(replace(h, **changed_logits(k, *given)), findings)
        hypotheses.append(h)
    return hypotheses


class Findings(NamedTuple):
    """What hypotheses are proposed from."""

    drawings: Drawings
    activity: Activity
    label_counts: np.ndarray  # (C,) of all images
    places: Places | None  # of a layer with positions
    enrichment: float  # of `Rule`
    classes: Sequence[str]  # names, for captions


def propose(k: int, undrawn: str, findings: Findings) -> Hypothesis:
    """The hypothesis about feature k, without effects and with a caption to be replaced; `undrawn`
    is why it has no drawing. It is empty where too few images are active, or inactive."""
    drawings, activity, label_counts, places, enrichment, _ = findings
    drawn, n_active = drawings.weights[k], int(activity.n_active[k])
    enough = n_active >= MIN_ACTIVE
    if places and enough and not undrawn and not drawn.any():
        undrawn = PREDICTS_BADLY
    if not undrawn:
        # With positions the drawing has been fitted to enough images of either kind.
        inactive = len(activity.labels) - n_active
        enough = enough and drawn.any() and (places or inactive >= MIN_ACTIVE)
    if not enough:
        return Hypothesis(k, np.zeros_like(drawn), undrawn=undrawn)
    if undrawn and places:
        strong_from, named = strong_classes(k, activity, label_counts, enrichment)
    else:
        choose = predictive_classes if undrawn else enriched_classes
        strong_from = drawings.strong_from.get(k)
        counted = strong_histogram(k, activity, strong_from, len(label_counts))
        named = choose(counted, label_counts, enrichment)
    return Hypothesis(
        feature=k,
        wanted=drawn.clip(0, None),
        unwanted=(-drawn).clip(0, None),
        classes=named,
        caption=UNCAPTIONED,
        threshold=drawings.thresholds.get(k),
        undrawn=undrawn,
        strong_from=strong_from,
        place=places.place(k, enrichment, strong_from) if places else "",
    )


def captioned(h: Hypothesis, findings: Findings) -> Hypothesis:
    """The hypothesis with the caption of its drawing, or of what else it names."""
    places, classes = findings.places, findings.classes
    if not h.undrawn:
        words = caption_of(h.weights, findings.drawings.strength[h.feature])
        words = f"Around its peak: {words[:1].lower()}{words[1:]}" if places else words
        return replace(h, caption=words)
    raised = None if h.raises is None else fa.class_name(classes, h.raises)
    lowered = None if h.lowers is None else fa.class_name(classes, h.lowers)
    on_prefix = bool(places) and places.is_on_prefix(h.feature, h.strong_from)
    images = images_of_classes(h.classes, classes)
    where = "on a prefix token" if on_prefix else f"in the {h.place}" if h.place else ""
    caption = caption_without_drawing(images, where, raised, lowered, h.strong_from is not None)
    return replace(h, caption=caption[:MAX_CAPTION])


def label_histograms(activity: Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the active images of each feature by label."""
    d_sae = len(activity.n_active)
    cell = activity.feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def with_thresholds(
    hypotheses: Sequence[Hypothesis], levels: Tensor, activity: Activity
) -> list[Hypothesis]:
    """The hypotheses, each with the threshold of largest F1 on images with levels (N, P) of ink,
    where it has none; on images of which none is active, with one that none reaches. Where nothing
    can be drawn there is none."""
    found = []
    for h in hypotheses:
        if h.threshold is None and not h.undrawn:
            scores = scores_of(h.weights[None], levels)[0].numpy()
            at = activity.of(h.feature)[0].numpy()
            h = replace(h, threshold=best_threshold(scores, at) if len(at) else scores.max() + 1)
        found.append(h)
    return found


# --------------------------------------------------------------------------------------------------
# Places
# --------------------------------------------------------------------------------------------------

LEAST_PLACE_SHARE = 0.5  # of a feature's peaks that must be in the place named
HIGH_PLACE_SHARE = 0.75  # the same for confidence High
VERTICAL, HORIZONTAL = ("upper", "middle", "lower"), ("left", "center", "right")


@functools.cache
def place_cells(place: str, grid: tuple[int, int]) -> np.ndarray:
    """(h, w) bool, the cells of a grid whose centers are in one of PLACES."""
    thirds = [((np.arange(n) + 0.5) * 3 / n).astype(int) for n in grid]
    first, *rest = place.split()
    rows = [VERTICAL.index(first)] if first in VERTICAL else range(3)
    columns = [HORIZONTAL.index(word) for word in (first, *rest) if word in HORIZONTAL] or range(3)
    if place == "center":  # both ways, unlike "center third"
        rows = [1]
    return np.isin(thirds[0], rows)[:, None] & np.isin(thirds[1], columns)


def place_of(peaks: np.ndarray, grid: tuple[int, int], usual: np.ndarray, enrichment: float) -> str:
    """The smallest of PLACES that has at least half of a feature's peaks (n,), cells of the `grid`,
    and `enrichment` times the share that it has of all features' peaks, by `usual` (h, w); "" where
    none does. Negative peaks are in no place."""
    counts = np.bincount(peaks[peaks >= 0], minlength=math.prod(grid)).reshape(grid)
    found = []
    for number, place in enumerate(PLACES):
        cells = place_cells(place, grid)
        share = counts[cells].sum() / max(1, len(peaks))
        if share >= LEAST_PLACE_SHARE and share >= enrichment * usual[cells].sum():
            found.append((int(cells.sum()), -share, number, place))
    return min(found)[-1] if found else ""


def strongest_pairs(activity: Activity) -> Tensor:
    """(P,) bool, the pairs of each feature's strongest STRONG_SHARE of all images."""
    order = torch.argsort(activity.activation, descending=True, stable=True)
    order = order[torch.argsort(activity.feature[order], stable=True)]
    rank = torch.empty_like(order)
    first = activity.start[:-1].repeat_interleave(activity.n_active)
    rank[order] = torch.arange(len(order)) - first
    return rank < max(MIN_STRONG, round(STRONG_SHARE * len(activity.labels)))


class Places(NamedTuple):
    """Where features are most active on the images that activate them."""

    grid: tuple[int, int]
    activity: Activity
    n_prefix: int
    usual: np.ndarray  # (h, w) share of the pairs of all features
    usual_strong: np.ndarray  # (h, w) the same, of each feature's strongest STRONG_SHARE of images

    @classmethod
    def of(cls, layer: fa.ExplainedLayer, activity: Activity) -> Places:
        """From the activity of a layer with positions."""
        positions = layer.positions
        grid, cells = tuple(positions.grid), activity.position.numpy() - positions.n_prefix
        usual = []
        for own in (cells, cells[strongest_pairs(activity).numpy()]):
            counts = np.bincount(own[own >= 0], minlength=math.prod(grid))
            usual.append(counts.reshape(grid) / max(1, len(own)))
        return cls(grid, activity, positions.n_prefix, *usual)

    def peaks(self, k: int, strong_from: float | None = None) -> np.ndarray:
        """(n,) the grid cells of feature k's peaks, on the images that count from `strong_from` on,
        negative on prefix tokens."""
        own = strong_pairs(k, self.activity, strong_from)
        return self.activity.peaks_of(k)[own].numpy() - self.n_prefix

    def usual_peaks(self, strong_from: float | None) -> np.ndarray:
        """(h, w) share of the peaks of all features, of strong ones unless all count."""
        return self.usual if strong_from is None else self.usual_strong

    def is_on_prefix(self, k: int, strong_from: float | None = None) -> bool:
        """Whether feature k is most active on a prefix token, on most of its images."""
        return bool((self.peaks(k, strong_from) < 0).mean() > 0.5)

    def place(self, k: int, enrichment: float, strong_from: float | None = None) -> str:
        """The place of feature k, "" for one that is mostly on prefix tokens."""
        if self.is_on_prefix(k, strong_from):
            return ""
        peaks, usual = self.peaks(k, strong_from), self.usual_peaks(strong_from)
        return place_of(peaks, self.grid, usual, enrichment)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

DIGEST = re.compile(rb'\A{\n "sha256": "(\w{64})",\n')  # the first two lines of a frozen file


def drawing_rows(weights: np.ndarray) -> list[str]:
    """The rows of a drawing (h, w) as text, a character of TONES for each cell."""
    characters = np.zeros(5, dtype="S1")
    for character, tone in TONES.items():
        characters[tone + 2] = character
    return [row.tobytes().decode() for row in characters[weights + 2]]


def weights_of_rows(rows: Sequence[str]) -> np.ndarray:
    """(h, w) int8 of a drawing's rows. Raises ValueError for other characters or uneven rows."""
    if len({len(row) for row in rows}) != 1:
        raise ValueError("a drawing must have rows of one length")
    if unknown := set("".join(rows)) - TONES.keys():
        raise ValueError(f"a drawing has only the characters {''.join(TONES)}, got {unknown}")
    return np.array([[TONES[c] for c in row] for row in rows], dtype=np.int8)


def hypothesis_record(h: Hypothesis) -> dict:
    """The hypothesis as a JSON object; `place`, `undrawn` and `strong_from` are left out where they
    are empty."""
    names = ("place", "undrawn", "strong_from")
    optional = {name: value for name in names if (value := getattr(h, name))}
    return {
        "feature": h.feature,
        "caption": h.caption,
        "drawing": drawing_rows(h.weights),
        "classes": list(h.classes),
        "raises": h.raises,
        "lowers": h.lowers,
        "confidence": h.confidence,
        "threshold": h.threshold,
        **optional,
    }


def hypothesis_text(h: Hypothesis) -> str:
    """The hypothesis as JSON text in which the rows of the drawing are below each other."""
    record = hypothesis_record(h)
    rows = ",\n  ".join(f'"{row}"' for row in record.pop("drawing"))
    return f'{json.dumps(record, allow_nan=False)[:-1]}, "drawing": [\n  {rows}]}}'


def hypothesis_of(record: Mapping) -> Hypothesis:
    """The hypothesis of a `hypothesis_record`. Raises KeyError, TypeError or ValueError for a
    record that is none."""
    weights = weights_of_rows(record["drawing"])
    optional = ("raises", "lowers", "caption", "confidence", "threshold", "place", "undrawn")
    optional += ("strong_from",)
    given = {name: record[name] for name in optional if record.get(name) is not None}
    wanted, unwanted = weights.clip(0, None), (-weights).clip(0, None)
    classes = record.get("classes") or ()
    return Hypothesis(record["feature"], wanted, unwanted, classes, **given)


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """The SHA-256 of the hypotheses and the rule by which they will be tested, which are written.

    The file's second line holds the digest of the file without this line, so that both are written
    in one step (`sed 2d FILE | sha256sum` computes it).
    """
    entries = ",\n".join(hypothesis_text(h) for h in hypotheses)
    bars = ""
    if any(h.undrawn for h in hypotheses):
        of_places = {"least_place_share": LEAST_PLACE_SHARE, "high_place_share": HIGH_PLACE_SHARE}
        bars = f' "places": {json.dumps(of_places)},\n'
    rest = f' "rule": {json.dumps((rule or Rule())._asdict())},\n{bars}'
    rest += f' "hypotheses": [\n{entries}\n]}}\n'
    digest = hashlib.sha256(f"{{\n{rest}".encode()).hexdigest()
    fa.write_whole(path, f'{{\n "sha256": "{digest}",\n{rest}'.encode())
    return digest


def load_frozen(path: str | Path, sha256: str | None = None) -> tuple[list[Hypothesis], Rule]:
    """The hypotheses and the rule that `freeze_hypotheses` wrote.

    Raises ValueError with both hashes when the content differs from the hash in the file, or from
    `sha256`.
    """
    content = Path(path).read_bytes()
    named = DIGEST.match(content)
    frozen = b"{\n" + content[named.end() :] if named else content
    found = hashlib.sha256(frozen).hexdigest()
    inside = named[1].decode() if named else "nowhere"
    for recorded in (inside, sha256 or inside):
        if recorded != found:
            raise ValueError(
                f"{path} was changed after it was frozen: its SHA-256 is {found}, recorded was "
                f"{recorded}"
            )
    record = json.loads(frozen)
    return [hypothesis_of(r) for r in record["hypotheses"]], Rule(**record["rule"])
