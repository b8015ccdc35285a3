"""What should an image look like for a feature to be active? Drawings, proposed and frozen.

    discovery = discover(layer)                                   # from the split "val" alone
    hypotheses = propose_hypotheses(layer, discovery)             # one for each feature
    sha256 = freeze_hypotheses(hypotheses, "hypotheses.json")     # before any test image is read
    hypotheses, rule = load_frozen("hypotheses.json", sha256)     # raises if the file was edited

A hypothesis is a picture: cells of the canvas where ink is wanted, and cells where it is not. An
image's score is its ink in the former less that in the latter; from a threshold on, the feature is
predicted to be active. Classes and logits may be named beside it; they are tested by themselves and
are no part of the score. Words are a caption and decide nothing.

This module tests nothing: `evaluation` does that, on other images, and must not be imported here.

Key: N discovery images, C classes, d_sae features, h x w = P cells of the canvas.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, Removals, collect_activity, removal_effects
from saexplain.captions import caption_of
from saexplain.ink import Canvas
from saexplain.patterns import unit_gradients
from saexplain.regions import choose_regions, local_covariance

CONFIDENCES = ("High", "Medium", "Low")
TONES = {".": 0, "+": 1, "#": 2, "-": -1, "=": -2}  # characters of a drawing in a file
MAX_CAPTION = 300  # characters
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
        if not isinstance(self.caption, str) or len(self.caption) > MAX_CAPTION:
            raise ValueError(f"caption must be text of at most {MAX_CAPTION} characters")
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

MAX_CLASSES = 2  # named
N_DIRECTIONS = 64  # random ones, the same for all features
DIRECTIONS_SEED = 20_000_003  # no run's own: baselines must draw other directions
DIRECTION_IMAGES = 16  # from which random directions are removed
EFFECT_MARGIN = 1.25  # times a random direction's effect that is needed to name a logit
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth naming


class Discovery(NamedTuple):
    """What is known of the discovery images, the same for all SAEs of a layer; all but `raw` is on
    the CPU."""

    canvas: Canvas
    levels: Tensor  # (N, P) uint8 ink of the images
    labels: Tensor  # (N,) int64
    raw: Tensor  # (N, d_in) the layer's output for them
    unit_patterns: Tensor  # (d_in, P) mean gradient of each standardized unit to each cell's ink
    metric: Tensor  # (P, P), see `local_covariance`


def discover(layer: fa.ExplainedLayer, unit_heats: Tensor | None = None) -> Discovery:
    """The discovery images of the layer, its split "val"; `unit_heats` (d_in, H, W) are the
    `unit_gradients`, channels summed, where they are at hand.

    Raises ValueError where no gradient leads from the layer to the pixels.
    """
    images, labels, raw = layer.splits["val"]
    unit_heats = unit_gradients(layer, images).sum(1) if unit_heats is None else unit_heats
    canvas = Canvas.fit(images)
    levels = canvas.levels(images)
    metric = local_covariance(levels, canvas)
    return Discovery(canvas, levels.byte(), labels.cpu(), raw, canvas.pattern(unit_heats), metric)


def patterns_on_canvas(layer: fa.ExplainedLayer, discovery: Discovery) -> Tensor:
    """(d_sae, P) gradient of each feature's pre-activation with respect to each cell's ink."""
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


@functools.cache
def random_directions(d_in: int) -> Tensor:
    """(N_DIRECTIONS, d_in) unit vectors drawn at random, the same in every run."""
    generator = torch.Generator().manual_seed(DIRECTIONS_SEED)
    noise = torch.randn(N_DIRECTIONS, d_in, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(noise, dim=1)


@torch.no_grad()
def null_effect(
    k: int, layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor, percentile: float
) -> dict[str, float]:
    """The mean change of a logit that a `percentile` of random directions does not exceed, when
    they are removed in place of feature k: for the logit that each "raises", and "lowers", most.

    raw (n, d_in) are outputs of the layer on images that activate the feature by acts (n,). Each
    direction has the feature's norm and may choose its logits, as the feature does.
    """
    some = evenly_spaced(torch.arange(len(raw)), DIRECTION_IMAGES).to(raw.device)
    raw, acts = raw[some], acts[some]
    norm = float(layer.sae.W_dec[k].norm())
    shifts = random_directions(raw.shape[1]).to(raw) * norm * layer.std
    states = raw - acts[:, None] * shifts[:, None]  # (N_DIRECTIONS, n, d_in)
    base, without = layer.logits(raw), layer.logits(states.flatten(0, 1))
    mean = (base - without.view(*states.shape[:2], -1)).mean(1).cpu().double().numpy()
    largest = {"raises": mean.max(1), "lowers": -mean.min(1)}
    return {verb: float(np.quantile(by, percentile)) for verb, by in largest.items()}


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
    some = evenly_spaced(torch.arange(len(at)), DIRECTION_IMAGES)
    null = null_effect(
        k, layer, raw[at[some].to(raw.device)], acts[some].to(raw.device), percentile
    )
    named = {v: change[v] >= max(SMALLEST_EFFECT, EFFECT_MARGIN * null[v]) for v in logit}
    return {verb: logit[verb] if named[verb] else None for verb in logit}


def propose_hypotheses(
    layer: fa.ExplainedLayer,
    discovery: Discovery,
    rule: Rule | None = None,
    activity: Activity | None = None,
    removed: Removals | None = None,
    in_full: bool = True,
) -> list[Hypothesis]:
    """A hypothesis about every feature, from the discovery images alone.

    The drawing has the regions that follow the feature's input pattern best, see `regions`; the
    threshold has the largest F1; classes are those of `enriched_classes`, logits those of
    `changed_logits`. Without `in_full` no logits are named, and there are no captions. A feature
    with fewer than MIN_ACTIVE active, or inactive, images gets an empty drawing.

    `activity` and `removed`, of the same images, are computed where they are not given.
    """
    rule = rule or Rule()
    activity = activity or collect_activity(layer, discovery.raw, discovery.labels)
    if in_full and removed is None:
        removed = removal_effects(layer, discovery.raw, activity)
    patterns = patterns_on_canvas(layer, discovery)
    levels, n_images = discovery.levels.float(), len(discovery.labels)
    drawings = choose_regions(patterns, discovery.metric, discovery.canvas)
    strength = (patterns * discovery.canvas.std).abs().unflatten(1, drawings.shape[1:]).numpy()
    histograms = label_histograms(activity, layer.n_classes)
    label_counts = torch.bincount(activity.labels, minlength=layer.n_classes).numpy()
    n_active, hypotheses = activity.n_active.tolist(), []
    for some in torch.arange(layer.d_sae).split(256):  # bounds the memory of the scores
        scores = scores_of(drawings[some.numpy()], levels).numpy()
        for k, own_scores in zip(some.tolist(), scores, strict=True):
            if not MIN_ACTIVE <= n_active[k] <= n_images - MIN_ACTIVE or not drawings[k].any():
                empty = np.zeros_like(drawings[k])
                hypotheses.append(Hypothesis(k, empty))
                continue
            logits = {}
            if in_full:
                given = (removed.mean_delta[k], layer, discovery.raw, activity, rule.percentile)
                logits = changed_logits(k, *given)
            hypotheses.append(
                Hypothesis(
                    feature=k,
                    wanted=drawings[k].clip(0, None),
                    unwanted=(-drawings[k]).clip(0, None),
                    classes=enriched_classes(histograms[k], label_counts, rule.enrichment),
                    **logits,
                    caption=caption_of(drawings[k], strength[k]) if in_full else "not captioned",
                    threshold=best_threshold(own_scores, activity.of(k)[0].numpy()),
                )
            )
    return hypotheses


def label_histograms(activity: Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the active images of each feature by label."""
    d_sae = len(activity.n_active)
    cell = activity.feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def with_thresholds(
    hypotheses: Sequence[Hypothesis], levels: Tensor, activity: Activity
) -> list[Hypothesis]:
    """The hypotheses, each with the threshold of largest F1 on images with levels (N, P) of ink,
    where it has none; on images of which none is active, with one that none reaches."""
    found = []
    for h in hypotheses:
        if h.threshold is None:
            scores = scores_of(h.weights[None], levels)[0].numpy()
            at = activity.of(h.feature)[0].numpy()
            h = replace(h, threshold=best_threshold(scores, at) if len(at) else scores.max() + 1)
        found.append(h)
    return found


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
    """The hypothesis as a JSON object."""
    return {
        "feature": h.feature,
        "caption": h.caption,
        "drawing": drawing_rows(h.weights),
        "classes": list(h.classes),
        "raises": h.raises,
        "lowers": h.lowers,
        "confidence": h.confidence,
        "threshold": h.threshold,
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
    optional = ("raises", "lowers", "caption", "confidence", "threshold")
    given = {name: record[name] for name in optional if record.get(name) is not None}
    wanted, unwanted = weights.clip(0, None), (-weights).clip(0, None)
    classes = tuple(record.get("classes") or ())
    return Hypothesis(record["feature"], wanted, unwanted, classes, **given)


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """The SHA-256 of the hypotheses and the rule by which they will be tested, which are written.

    The file's second line holds the digest of the file without this line, so that both are written
    in one step (`sed 2d FILE | sha256sum` computes it).
    """
    entries = ",\n".join(hypothesis_text(h) for h in hypotheses)
    rest = f' "rule": {json.dumps((rule or Rule())._asdict())},\n "hypotheses": [\n{entries}\n]}}\n'
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
