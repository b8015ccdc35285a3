"""Do directions that training did not find do as well? The same tests for baselines.

    directions = default_directions(z, seed)                  # "random directions", "neurons"
    features = match_rates(directions["neurons"], z, density, mean_activation)
    comparison = evaluate_directions(directions["neurons"], layer, ...)

Takes directions in the space of standardized activations; gives features that are active as often
and as strongly as the SAE's, and the results of the same path from proposal to test. It trains
nothing.

Key: N images, n directions, d_in units, d_sae features of the SAE.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import collect_activity
from saexplain.edits import evenly_spaced
from saexplain.evaluation import (
    Comparison,
    clears_bars,
    comparison_of,
    decide_hypotheses,
    discriminate,
    evaluate_hypotheses,
    score_hypotheses,
)
from saexplain.fidelity import feature_stats
from saexplain.hypotheses import Rule, propose_hypotheses
from saexplain.sae import JumpReLUSAE

MAX_BASELINE_FEATURES = 512  # of each kind, at most


def _threshold_for(values: np.ndarray, n_above: int) -> float:
    """The threshold between the n_above largest of `values` (N,) and the others, but at least 0."""
    rank = int(np.clip(len(values) - n_above, 1, len(values) - 1))
    last_below, first_above = np.partition(values, (rank - 1, rank))[rank - 1 : rank + 1]
    # Not at a value itself, where rounding would decide.
    return max(0.0, float(0.9 * last_below + 0.1 * first_above))


def matched_directions(
    directions: Tensor, z: Tensor, density: Tensor, mean_activation: Tensor
) -> JumpReLUSAE:
    """Features along `directions` (n, d_in) that are active on a share `density` (n,) of z (N,
    d_in), with `mean_activation` (n,) there; on fewer where z seldom points along them."""
    unit = torch.nn.functional.normalize(directions.to(z), dim=1)
    projected = (z @ unit.T).T.cpu().numpy()  # (n, N)
    thresholds, means = [], []
    for values, n_above in zip(projected, (density * len(z)).round().long().tolist(), strict=True):
        thresholds.append(_threshold_for(values, n_above))
        above = values[values > thresholds[-1]]
        means.append(float(above.mean()) if len(above) else 1.0)
    scale = mean_activation.to(z) / torch.tensor(means).to(z)
    threshold = torch.tensor(thresholds).to(z) * scale
    return JumpReLUSAE.from_weights(
        {
            "W_enc": unit.T * scale,
            "b_enc": torch.zeros_like(threshold),
            "W_dec": unit,
            "b_dec": z.new_zeros(z.shape[1]),
            "threshold": threshold,
        }
    )


def default_directions(z: Tensor, seed: int) -> dict[str, Tensor]:
    """Directions (n, d_in) by name: MAX_BASELINE_FEATURES at random, and the units of z (N, d_in),
    up and down, in random order."""
    d_in = z.shape[1]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(MAX_BASELINE_FEATURES, d_in, generator=generator, dtype=torch.float32)
    up = torch.eye(d_in, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * d_in, generator=generator)
    return {"random directions": random, "neurons": torch.cat([up, -up])[order]}


def match_rates(
    directions: Tensor, z: Tensor, density: Tensor, mean_activation: Tensor
) -> JumpReLUSAE:
    """Features along the first of `directions` (n, d_in) that are active on z (N, d_in) as often
    and as strongly as features of the SAE, whose density and mean_activation (d_sae,) are given.

    At most MAX_BASELINE_FEATURES, evenly spaced over the SAE's densities, the most active first.
    """
    # Density decides how easily a hypothesis is confirmed, so only equal densities compare.
    n = min(len(directions), len(density), MAX_BASELINE_FEATURES)
    falling = torch.argsort(density, descending=True, stable=True)
    some = evenly_spaced(falling, n)
    return matched_directions(directions[:n], z, density[some], mean_activation[some])


def evaluate_directions(
    directions: Tensor,
    layer: fa.ExplainedLayer,
    val: fa.Activations,
    test_half: fa.Activations,
    replication_half: fa.Activations,
    seed: int,
    strokes: bool = True,
) -> Comparison:
    """The summary of hypotheses about features along directions (n, d_in) that are active as often
    and as strongly as those of the layer's SAE, proposed and tested like the SAE's.

    `strokes` as in `propose_hypotheses`, the same as for the SAE. There are no drawings.
    """
    z, rule = layer.standardize(val.raw), Rule()
    other = layer.with_sae(match_rates(directions, z, *feature_stats(layer.sae, z)))
    hypotheses = propose_hypotheses(other, val, rule, drawings=False, strokes=strokes)
    activity = collect_activity(other, test_half.raw, test_half.labels)
    scores = score_hypotheses(hypotheses, test_half.images, test_half.labels)
    evidence = evaluate_hypotheses(hypotheses, other, test_half, activity, seed, rule, scores)
    decisions = decide_hypotheses(hypotheses, evidence, rule)
    repeated = evaluate_hypotheses(hypotheses, other, replication_half, None, seed + 1, rule)
    again = [clears_bars(e, rule) for e in repeated]
    discriminated = discriminate(evidence, scores, other, activity)
    return comparison_of(evidence, decisions, discriminated, again, rule)
