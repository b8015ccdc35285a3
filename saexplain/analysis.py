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
from saexplain.images import as_ink
from saexplain.ink import ink_sign
from saexplain.parallel import Stopwatch
from saexplain.patterns import (
    feature_patterns,
    pattern_correlations,
    pattern_roughness,
    unit_gradients,
)

N_CORRELATED = 2000  # images over which patterns are compared with pre-activations
INKED_SHARE = 0.01  # pixels inked in a smaller share of the training images count as never inked


class Analysis(NamedTuple):
    """All results about the features, from the validation images."""

    bank: fa.FeatureBank
    heats: Tensor  # (d_sae, H, W) input patterns; of a color image, summed over channels
    unit_heats: Tensor  # (d_in, H, W) the same of the layer's standardized units
    ink_sign: int  # 1 where ink raises a pixel's value, -1 where it lowers it
    pattern_correlation: Tensor  # (d_sae,) of a pattern's sum over an image with the pre-activation
    logit: fa.LogitEffects
    ablation: fa.LogitEffects
    nearest: fa.NearestFeatures
    inked: np.ndarray  # (H, W) bool, the pixels that images ink
    activity: Activity
    removed: Removals

    @property
    def shown_heats(self) -> Tensor:
        """(d_sae, H, W) the patterns as pictures show them: red where ink raises the feature."""
        return self.ink_sign * self.heats


def analyze(
    layer: fa.ExplainedLayer, topk: int, n_eval: int, alpha: float, clock: Stopwatch
) -> Analysis:
    """The analysis of all features of the layer's SAE, on its split "val".

    `topk` strongest images are kept of each feature; `n_eval` images and `alpha` are those of
    `feature_logit_effect`. `clock` counts the seconds of "bank", "patterns" and "effects".
    """
    images, labels, raw = layer.splits["val"]
    every = torch.arange(layer.d_sae)
    with clock("bank"):
        bank = fa.feature_bank(layer, raw, labels, topk)
        activity = collect_activity(layer, raw, labels)
    with clock("patterns"):
        gradients = unit_gradients(layer, images)
        unit_heats = gradients.sum(1)
        heats = feature_patterns(layer, unit_heats)
        some = fa.Activations(images[:N_CORRELATED], labels[:N_CORRELATED], raw[:N_CORRELATED])
        correlation = pattern_correlations(layer, gradients, some)
        inked = (as_ink(layer.splits["train"].images) > 0).float().mean(0)[0] >= INKED_SHARE
    with clock("effects"):
        logit = fa.logit_effects(layer, raw[:n_eval], alpha)
        ablation = fa.ablation_effects(layer, raw.split(fa.HEAD_ROWS), every, n_eval)
        removed = removal_effects(layer, raw, activity)
    return Analysis(
        bank,
        heats,
        unit_heats,
        ink_sign(images),
        correlation,
        fa.LogitEffects(*(tensor.cpu() for tensor in logit)),
        fa.LogitEffects(*(tensor.cpu() for tensor in ablation)),
        fa.nearest_features(layer.sae.W_dec),
        inked.cpu().numpy(),
        activity,
        removed,
    )


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
    return {
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
        "pattern_roughness": float(pattern_roughness(analysis.heats[k : k + 1])[0]),
        "influence": float(analysis.removed.influence[k]),
        "predictions_changed": float(analysis.removed.changes[k]),
    }
