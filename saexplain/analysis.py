"""What is known about every feature from the validation images? One table, before any hypothesis.

    analysis = analyze(layer, topk=20, n_eval=2000, alpha=1.0, clock=Stopwatch())
    record = feature_record(k, analysis)     # a record of feature_report.json

Takes an `ExplainedLayer` with an SAE and the splits "train" and "val"; gives numbers. It reads no
test image, and draws and writes nothing.

Key: N images, C classes, d_sae features, H x W pixels of an image or a pattern.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, Removals, collect_activity, removal_effects
from saexplain.hypotheses import evenly_spaced
from saexplain.images import as_ink
from saexplain.ink import SEEN, ink_sign
from saexplain.parallel import Stopwatch
from saexplain.patterns import (
    feature_patterns,
    pattern_correlations,
    pattern_roughness,
    unit_gradients,
)
from saexplain.where import FAITHFUL, Maps, activation_maps, aligned_patterns, occlusion_maps

SMOOTH = 0.5  # roughness up to which a pattern is no noise
N_CORRELATED = 2000  # images over which patterns are compared with pre-activations
INKED_SHARE = 0.01  # pixels inked in a smaller share of the training images count as never inked
SEEN_PIXELS = 2**24  # of the images that show whether ink is dark, at most
ADDED_TO = 16  # images to which a feature of a layer with positions is added


class Patterns(NamedTuple):
    """What pixels drive the features, as far as gradients show it."""

    heats: Tensor | None  # (d_sae, H, W) gradients, of color images summed over channels, in crops
    # for a layer with positions; None: no gradient leads to the pixels
    correlation: Tensor  # (d_sae,) of a pattern's sum over an image with the pre-activation
    units: Tensor | None = None  # (d_in, C, H, W) the same of the layer's units, without positions
    receptive: tuple[int, int] | None = None  # pixels of the crops; None: the whole image
    linear: bool = False  # whether the layer is linear in the pixels, so that patterns are exact
    roughness: Tensor | None = None  # (d_sae,) how noisy each pattern is; 0 for one of a single
    # row or column; None without patterns


class Analysis(NamedTuple):
    """All results about the features, from the validation images."""

    bank: fa.FeatureBank
    patterns: Patterns
    maps: Maps | None  # None for a layer that is linear in the pixels
    ink_sign: int  # 1 where ink raises a pixel's value, -1 where it lowers it
    logit: fa.LogitEffects
    ablation: fa.LogitEffects
    nearest: fa.NearestFeatures
    inked: np.ndarray | None  # (H, W) bool, the pixels that images ink; None with positions
    activity: Activity
    removed: Removals

    @property
    def faithful(self) -> Tensor:
        """(d_sae,) bool, the features that their pattern shows: it follows them, without noise."""
        if self.heats is None:
            return torch.zeros(len(self.patterns.correlation), dtype=torch.bool)
        follows = self.patterns.correlation >= FAITHFUL
        return self.patterns.linear | (follows & (self.patterns.roughness <= SMOOTH))

    @property
    def heats(self) -> Tensor | None:
        """(d_sae, H, W) input patterns; of color images, summed over channels."""
        return self.patterns.heats

    @property
    def unit_heats(self) -> Tensor | None:
        """(d_in, H, W) the same of the layer's standardized units."""
        return None if self.patterns.units is None else self.patterns.units.sum(1)

    @property
    def pattern_correlation(self) -> Tensor:
        """(d_sae,) of a pattern's sum over an image with the pre-activation, z W_enc."""
        return self.patterns.correlation

    @property
    def shown_heats(self) -> Tensor | None:
        """(d_sae, H, W) the patterns as pictures show them: red where ink raises the feature."""
        return None if self.heats is None else self.ink_sign * self.heats


def analyze(
    layer: fa.ExplainedLayer, topk: int, n_eval: int, alpha: float, clock: Stopwatch
) -> Analysis:
    """The analysis of all features of the layer's SAE, on its split "val".

    `topk` strongest images are kept of each feature; `n_eval` images and `alpha` are those of
    `feature_logit_effect`. `clock` counts the seconds of "bank", "patterns", "effects" and "maps".
    """
    split = layer.splits["val"]
    images, labels, raw = split
    with clock("bank"):
        bank = fa.feature_bank(layer, raw, labels, topk)
        activity = collect_activity(layer, raw, labels)
        clock.result = f"of {int((bank.feature_density > 0).sum()):,} features"
    with clock("patterns"):
        patterns = input_patterns(layer, split, bank)
        inked = None
        if not layer.has_positions and isinstance(layer.splits["train"].images, Tensor):
            inked = (as_ink(layer.splits["train"].images) > 0).float().mean(0)[0] >= INKED_SHARE
        kind = "exact: the layer is linear in them" if patterns.linear else "from gradients"
        clock.result = kind if patterns.heats is not None else "no gradient leads to the pixels"
    with clock("effects"):
        removed = removal_effects(layer, raw, activity)
        logit, ablation = logit_effects(layer, raw, removed, n_eval, alpha)
        clock.result = f"{features_of_half(removed.influence)} features make half of all influence"
    maps = None
    if not patterns.linear:
        with clock("maps"):
            order = torch.argsort(removed.influence, descending=True, stable=True).tolist()
            maps = feature_maps(layer, split, bank, activity, order)
            maps = maps._replace(receptive=patterns.receptive or maps.receptive)
    return Analysis(
        bank,
        patterns,
        maps,
        ink_sign(images[: min(SEEN, SEEN_PIXELS // images[:1].numel())]),
        fa.LogitEffects(*(tensor.cpu() for tensor in logit)),
        fa.LogitEffects(*(tensor.cpu() for tensor in ablation)),
        fa.nearest_features(layer.sae.W_dec),
        None if inked is None else inked.cpu().numpy(),
        activity,
        removed,
    )


def features_of_half(influence: Tensor) -> int:
    """How many features, the most influential first, make half of all influence (d_sae,)."""
    made = influence.sort(descending=True).values.double().cumsum(0)
    return int((made < made[-1] / 2).sum()) + 1


def input_patterns(
    layer: fa.ExplainedLayer, split: fa.Activations, bank: fa.FeatureBank
) -> Patterns:
    """The patterns of all features; without gradients where none leads to the pixels."""
    if not has_gradients(layer, split.images):
        return Patterns(None, torch.zeros(layer.d_sae))
    if layer.has_positions:
        side, gradients, correlation = aligned_patterns(layer, split, bank)
        heats = gradients.sum(1)
        return Patterns(heats, correlation, receptive=side, roughness=roughness_of_each(heats))
    units = unit_gradients(layer, split.images)
    chosen = evenly_spaced(torch.arange(len(split.labels)), N_CORRELATED)
    some = fa.Activations(*(values[chosen.to(values.device)] for values in split))
    correlation = pattern_correlations(layer, units, some)
    linear = fa.is_linear(layer, tuple(split.images.shape[1:]), split.images[:64])
    heats = feature_patterns(layer, units).sum(1)
    rough = roughness_of_each(heats)
    return Patterns(heats, correlation, units, linear=linear, roughness=rough)


def roughness_of_each(heats: Tensor) -> Tensor:
    """(d_sae,) roughness of patterns (d_sae, H, W); 0 where they are a single row or column."""
    if min(heats.shape[1:]) < 2:
        return torch.zeros(len(heats))
    # One by one, so that no copies of all patterns are made.
    return torch.cat([pattern_roughness(heat) for heat in heats.split(1)])


def has_gradients(layer: fa.ExplainedLayer, images) -> bool:
    """Whether gradients lead from the layer to the pixels; a frozen extractor may have none."""
    try:
        fa.check_gradients(layer.model, images[:1].to(layer.device))
    except ValueError:
        return False
    return True


def logit_effects(
    layer: fa.ExplainedLayer, raw: fa.Rows, removed: Removals, n_eval: int, alpha: float
) -> tuple[fa.LogitEffects, fa.LogitEffects]:
    """What adding each feature to n_eval images does to the logits, fewer with positions, and what
    removing it does, on all images of `removed`."""
    most = min(ADDED_TO, n_eval) if layer.has_positions else n_eval
    # Evenly spaced: a set of one's own may be sorted by class.
    some = evenly_spaced(torch.arange(len(raw)), most).to(raw.device)
    mean = removed.mean_delta.float()
    top = torch.where(removed.n_images > 0, mean.argmax(1), -1)
    ablation = fa.LogitEffects(mean, top, removed.n_images)
    return fa.logit_effects(layer, raw[some], alpha), ablation


def feature_maps(
    layer: fa.ExplainedLayer,
    split: fa.Activations,
    bank: fa.FeatureBank,
    activity: Activity,
    order: list[int],
) -> Maps:
    """Where features are active, by position, or by covering patches of the images."""
    if layer.has_positions:
        return activation_maps(layer, split, bank, activity)
    return occlusion_maps(layer, split.images, bank, order)


def by_influence(analysis: Analysis, limit: int = 0) -> list[int]:
    """The `limit` features of most influence, ties by number; all of them when it is 0."""
    order = torch.argsort(analysis.removed.influence, descending=True, stable=True).tolist()
    return order[: limit or None]


def feature_record(k: int, analysis: Analysis) -> dict:
    """The results about feature k, as JSON values. Raises IndexError for a k out of range."""
    bank, logit, ablation = analysis.bank, analysis.logit, analysis.ablation
    histogram = bank.label_histogram[fa.check_feature(k, len(bank.label_histogram))]
    top = bank.top.of(k)
    n_active = int(histogram.sum())
    record = {
        "feature": k,
        "mean_active": float(bank.feature_density[k]),
        "mean_activation_when_active": float(bank.mean_activation_when_active[k]),
        "n_active": n_active,
        "label_histogram": histogram.tolist(),
        "label_mode_when_active": int(histogram.argmax()) if n_active else None,
        "top_examples": top.index.tolist(),
        "top_scores": top.activation.tolist(),
        "top_labels": top.label.tolist(),
        "logit_boost_class": int(logit.top_class[k]),
        "logit_delta_vector": logit.mean_delta[k].tolist(),
        "ablation_delta_vector": ablation.mean_delta[k].tolist(),
        "ablation_images": int(ablation.n_images[k]),
        "nearest_feature": int(analysis.nearest.feature[k]),
        "nearest_cosine": float(analysis.nearest.cosine[k]),
        "pattern_correlation": float(analysis.pattern_correlation[k]),
        "pattern_roughness": _roughness(k, analysis),
        "influence": float(analysis.removed.influence[k]),
        "predictions_changed": float(analysis.removed.changes[k]),
    }
    if analysis.maps is not None and analysis.maps.kind == "activation":
        maps = analysis.maps
        record |= {
            "position_density": float(maps.position_density[k]),
            "map_spread": float(maps.spread[k]),
            "prefix_share": float(maps.prefix_share[k]),
            "blank_share": float(maps.blank_share[k]),
            "place_only": bool(maps.place_only[k]),
        }
    return record


def _roughness(k: int, analysis: Analysis) -> float | None:
    """Roughness of the pattern of feature k; None where there is none, or it is a single row."""
    heats = analysis.heats
    if heats is None or min(heats.shape[1:]) < 2:
        return None
    return float(analysis.patterns.roughness[k])
