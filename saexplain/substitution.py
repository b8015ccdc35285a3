"""Is the network explained? Its predictions when hypotheses take the place of all features.

    scores, test_scores = scores_of(weights, levels), scores_of(weights, test_levels)
    agreement_of_drawings(layer, raw, scores, activity, test_scores)  # predictions kept
    measure_agreement(layer, raw, layer.feature_acts(raw))            # with the features themselves

Takes the scores of drawings of all features of an SAE; gives the share of images on which the
network still predicts the same when each feature's activation is what its drawing predicts.
Explaining easy features only cannot raise it.

Key: N images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.hypotheses import Discovery, Hypothesis, ink_levels, scores_of

LEAST_DRAWN_SHARE = 0.5  # of L0 that features with drawings must have for drawings to replace all
N_KNOTS = 65  # quantiles of scores and of activations that are kept


class Agreements(NamedTuple):
    """Shares of images on which the network predicts the same, with something in place of the
    layer's output; None where drawings are not compared."""

    features: float  # the SAE's own activations, decoded
    hypotheses: float | None  # what the drawings predict
    swapped: float | None  # the same with each feature's drawing exchanged for another feature's
    not_compared: str = ""  # why not


class Quantiles(NamedTuple):
    """Activations that follow from scores by rank: of the images picked, the one with the largest
    score gets the largest activation, and so on; linear between quantiles."""

    scores: np.ndarray  # (F, N_KNOTS) ascending quantiles, of the images picked
    acts: np.ndarray  # (F, N_KNOTS) ascending quantiles, of the images that activate the feature


def fit_quantiles(scores: Tensor, activity: Activity) -> Quantiles:
    """The quantiles of all features in order, from the scores (F, N) of their drawings on images
    whose `activity` is given: as many images are picked as activate the feature.

    A feature that is never active, or whose scores are all 0, gets 0.
    """
    knots_of_scores = np.full((len(scores), N_KNOTS), np.inf)
    knots_of_acts = np.zeros((len(scores), N_KNOTS))
    for k, own in enumerate(scores):
        _, acts = activity.of(k)
        if len(acts) and own.any():
            picked = own.topk(len(acts)).values.flip(0).numpy()
            at, each = np.linspace(0, len(acts) - 1, N_KNOTS), np.arange(len(acts))
            knots_of_scores[k] = np.interp(at, each, picked)
            knots_of_acts[k] = np.interp(at, each, acts.sort().values.numpy())
    return Quantiles(knots_of_scores, knots_of_acts)


def predict_acts(q: Quantiles, scores: Tensor) -> Tensor:
    """(N, F) activations that follow from scores (F, N)."""
    acts = np.zeros(scores.shape, dtype=np.float32)
    for own, knots, of_acts, out in zip(scores.numpy(), q.scores, q.acts, acts, strict=True):
        if np.isfinite(knots[0]):
            out[:] = np.interp(own, knots, of_acts, left=0.0)
    return torch.from_numpy(acts.T.copy())


def swap_by_rate(activity: Activity) -> Tensor:
    """(F,) for each feature the one that is active next more often: a null, of drawings as large
    and as often true."""
    order = activity.n_active.argsort(stable=True)
    return torch.empty_like(order).scatter(0, order, order.roll(-1))


@torch.no_grad()
def measure_agreement(layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor) -> float:
    """Share of images on which the network predicts the same when what the SAE decodes from
    activations (N, F) takes the place of the layer's output raw (N, d_in)."""
    decoded = layer.logits(layer.from_z(layer.sae.decode(acts.to(raw.device)), raw))
    return (decoded.argmax(1) == layer.logits(raw).argmax(1)).double().mean().item()


def agreement_of_drawings(
    layer: fa.ExplainedLayer, raw: Tensor, scores: Tensor, activity: Activity, test_scores: Tensor
) -> float:
    """`measure_agreement` on raw (N, d_in) with what drawings predict by their `test_scores` (F, N)
    there; scores (F, M), and the `activity`, are those of discovery images."""
    return measure_agreement(layer, raw, predict_acts(fit_quantiles(scores, activity), test_scores))


@torch.no_grad()
def agreement_of_features(layer: fa.ExplainedLayer, raw: Tensor) -> float:
    """Share of images with the layer's output raw (N, ...) on which the network predicts the same
    with the SAE's reconstruction in its place, at all positions."""
    if not layer.has_positions:
        return measure_agreement(layer, raw, layer.feature_acts(raw))
    kept, at_once = 0, max(1, fa.ENTRIES // (raw.shape[1] * layer.d_sae))
    for some in raw.split(at_once):
        acts = layer.acts_at(some)
        z_hat = layer.sae.decode(acts.flatten(0, 1)).unflatten(0, acts.shape[:2])
        spliced = layer.logits(layer.from_z(z_hat, some))
        kept += int((spliced.argmax(1) == layer.logits(some).argmax(1)).sum())
    return kept / len(raw)


def reason_not_compared(
    hypotheses: Sequence[Hypothesis], activity: Activity, has_positions: bool = False
) -> str:
    """Why drawings cannot take the place of all features, whose `activity` is given; "" where they
    can: features that may be drawn have at least half of L0. With positions they never can."""
    undrawn = torch.tensor([bool(h.undrawn) for h in hypotheses])
    if undrawn.all():
        return f"no feature is drawn: {hypotheses[0].undrawn}"
    if has_positions:
        return "they show what a position sees, not the whole image"
    share = 1 - float(activity.n_active[undrawn].sum() / activity.n_active.sum().clamp(min=1))
    if share >= LEAST_DRAWN_SHARE:
        return ""
    return f"only features that make up {share:.0%} of L0 may be drawn, as patterns follow them"


def measure_agreements(
    layer: fa.ExplainedLayer,
    discovery: Discovery,
    activity: Activity,
    hypotheses: Sequence[Hypothesis],
    half: fa.Activations,
) -> Agreements:
    """The agreements on a half of the test images with the features, with their drawings, and with
    those of `swap_by_rate`; `activity` is that of the discovery images."""
    features = agreement_of_features(layer, half.raw)
    if reason := reason_not_compared(hypotheses, activity, layer.has_positions):
        return Agreements(features, None, None, reason)
    weights = np.stack([h.weights for h in hypotheses])
    scores = scores_of(weights, discovery.levels)
    test_scores = scores_of(weights, ink_levels(discovery.canvas, half.images))
    other = swap_by_rate(activity)
    return Agreements(
        features,
        agreement_of_drawings(layer, half.raw, scores, activity, test_scores),
        agreement_of_drawings(layer, half.raw, scores[other], activity, test_scores[other]),
    )
