"""Is the network explained? Its predictions when hypotheses take the place of all features.

    stand_ins = fit_stand_ins(hypotheses, layer, discovery, activity)
    measure_agreement(layer, split, predict_acts(stand_ins, levels))  # share of predictions kept

Takes the hypotheses about all features of an SAE; gives the share of images on which the network
still predicts the same when each feature's activation is what its drawing predicts. Explaining
easy features only cannot raise it.

Key: N images, F features, P cells of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.hypotheses import Discovery, Hypothesis, scores_of

AT_ONCE = 64  # features whose scores are held at once
N_KNOTS = 65  # quantiles of scores and of activations that are kept


class StandIns(NamedTuple):
    """Activations that follow from scores by rank: of the images picked, the one with the largest
    score gets the largest activation, and so on; linear between quantiles."""

    weights: np.ndarray  # (F, h, w) drawings
    scores: np.ndarray  # (F, N_KNOTS) ascending quantiles, of the images picked
    acts: np.ndarray  # (F, N_KNOTS) ascending quantiles, of the images that activate the feature


def fit_stand_ins(
    hypotheses: Sequence[Hypothesis], discovery: Discovery, activity: Activity
) -> StandIns:
    """The stand-ins of hypotheses about all features in order, fitted to the discovery images,
    whose `activity` is given: as many images are picked as activate the feature.

    A feature without a drawing, or that is never active, gets 0.
    """
    weights = np.stack([h.weights for h in hypotheses])
    levels = discovery.levels.float()
    knots_of_scores = np.full((len(hypotheses), N_KNOTS), np.inf)
    knots_of_acts = np.zeros((len(hypotheses), N_KNOTS))
    for some in torch.arange(len(hypotheses)).split(AT_ONCE):
        scores = scores_of(weights[some.numpy()], levels)
        for k, own in zip(some.tolist(), scores, strict=True):
            _, acts = activity.of(k)
            if len(acts) and hypotheses[k].is_drawn:
                picked = own.topk(len(acts)).values.flip(0).numpy()
                at = np.linspace(0, len(acts) - 1, N_KNOTS)
                each = np.arange(len(acts))
                knots_of_scores[k] = np.interp(at, each, picked)
                knots_of_acts[k] = np.interp(at, each, acts.sort().values.numpy())
    return StandIns(weights, knots_of_scores, knots_of_acts)


def predict_acts(s: StandIns, levels: Tensor) -> Tensor:
    """(N, F) activations that the drawings predict on images with levels (N, P) of ink."""
    scores = scores_of(s.weights, levels).numpy()
    acts = np.zeros(scores.shape, dtype=np.float32)
    for own, knots, of_acts, out in zip(scores, s.scores, s.acts, acts, strict=True):
        if np.isfinite(knots[0]):
            out[:] = np.interp(own, knots, of_acts, left=0.0)
    return torch.from_numpy(acts.T.copy())


def swap_by_rate(hypotheses: Sequence[Hypothesis], activity: Activity) -> list[Hypothesis]:
    """The hypotheses about all features in order, each with the drawing of the feature that is
    active next more often: a null, of drawings as large and as often true."""
    order, swapped = activity.n_active.argsort(stable=True), list(hypotheses)
    for k, other in zip(order.tolist(), order.roll(-1).tolist(), strict=True):
        swapped[k] = replace(hypotheses[other], feature=k)
    return swapped


@torch.no_grad()
def measure_agreement(layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor) -> float:
    """Share of images on which the network predicts the same when what the SAE decodes from
    activations (N, F) takes the place of the layer's output raw (N, d_in)."""
    decoded = layer.logits_of_z(layer.sae.decode(acts.to(raw.device)))
    return (decoded.argmax(1) == layer.logits(raw).argmax(1)).double().mean().item()
