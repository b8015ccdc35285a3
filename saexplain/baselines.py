"""Do directions that training did not find do as well? The same tests for baselines.

    directions = default_directions(layer, seed)              # "random directions", "neurons"
    other = features_along(directions["neurons"], z, density, mean_activation)
    summary = evaluate_baseline(other, layer, discovery, test_half, replication_half)

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
from saexplain.evaluation import Summary, evaluate_halves, summarize
from saexplain.fidelity import feature_stats, rows_of
from saexplain.hypotheses import (
    Discovery,
    Faithful,
    Rule,
    evenly_spaced,
    ink_levels,
    patterns_on_canvas,
    propose_hypotheses,
    scores_of,
)
from saexplain.patterns import correlations
from saexplain.sae import JumpReLUSAE
from saexplain.substitution import agreement_of_drawings, measure_agreement

MAX_BASELINE_FEATURES = 512  # of each kind, at most
MAX_TESTED = 128  # features whose hypotheses are tested; all take part in the agreement
FITTED_ENTRIES = 2**28  # activations from which a decoder is fitted, at most
RIDGE = 1e-3  # of the mean square of an activation, so that a decoder exists for any features


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


def directions_of_variance(z: Tensor, variance: Tensor, seed: int) -> Tensor:
    """Random unit directions (n, d_in) along which z (N, d_in) has a `variance` (n,).

    A Gaussian direction's coordinates in principal components are multiplied by their standard
    deviations to a power, the same for all coordinates of a direction, found by bisection. Without
    it random directions lie along the strongest components, which are easier to describe.
    """
    centered = z - z.mean(0)
    spectrum, components = torch.linalg.eigh((centered.T @ centered).double().cpu() / len(z))
    log_std = spectrum.clamp(min=1e-9 * float(spectrum.max())).log() / 2
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(variance), z.shape[1], generator=generator, dtype=torch.float64)
    wanted = variance.double().cpu().clamp(min=1e-12).log()[:, None]

    def coordinates(power: Tensor) -> Tensor:  # (n, d_in), unit, of powers (n, 1)
        exponent = power * log_std
        scaled = noise * (exponent - exponent.amax(1, keepdim=True)).exp()
        return torch.nn.functional.normalize(scaled, dim=1)

    low, high = torch.full_like(wanted, -20.0), torch.full_like(wanted, 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        found = (coordinates(middle).square() * (2 * log_std).exp()).sum(1, keepdim=True).log()
        low = torch.where(found < wanted, middle, low)
        high = torch.where(found < wanted, high, middle)
    return (coordinates((low + high) / 2) @ components.T).to(z)


def default_directions(layer: fa.ExplainedLayer, seed: int) -> dict[str, Tensor]:
    """Directions (n, d_in) by name: random ones along which the validation activations vary as
    along the SAE's encoder, and the units, up and down, in random order."""
    z = rows_of(layer, "val")
    n, d_in = min(layer.d_sae, MAX_BASELINE_FEATURES), z.shape[1]
    density, _ = feature_stats(layer.sae, z)
    falling = torch.argsort(density, descending=True, stable=True)
    encoder = layer.sae.W_enc.detach()[:, evenly_spaced(falling, n)]
    variance = (z @ torch.nn.functional.normalize(encoder, dim=0)).var(0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * d_in, generator=generator)
    up = torch.eye(d_in, dtype=torch.float32)
    return {
        "random directions": directions_of_variance(z, variance, seed),
        "neurons": torch.cat([up, -up])[order],
    }


def match_rates(
    directions: Tensor,
    z: Tensor,
    density: Tensor,
    mean_activation: Tensor,
    most: int | None = MAX_BASELINE_FEATURES,
) -> JumpReLUSAE:
    """Features along the first of `directions` (n, d_in) that are active on z (N, d_in) as often
    and as strongly as features of the SAE, whose density and mean_activation (d_sae,) are given.

    At most so many, evenly spaced over the SAE's densities, the most active first; with `most` None
    as many as the SAE has.
    """
    # The rate decides how high an F1 is, so only equal rates compare.
    n = min(len(directions), len(density), most or len(density))
    falling = torch.argsort(density, descending=True, stable=True)
    some = evenly_spaced(falling, n)
    return matched_directions(directions[:n], z, density[some], mean_activation[some])


@torch.no_grad()
def fit_decoder(sae: JumpReLUSAE, z: Tensor) -> JumpReLUSAE:
    """The SAE with the decoder of least squared error on z (N, d_in), ridge regression: the most
    that can be reconstructed from its features."""
    acts = sae.encode(z)
    mean_acts, mean_z = acts.mean(0), z.mean(0)
    centered = acts - mean_acts
    gram = centered.T @ centered
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-6)
    W_dec = torch.linalg.solve(gram, centered.T @ (z - mean_z))
    weights = {**sae.state_dict(), "W_dec": W_dec, "b_dec": mean_z - mean_acts @ W_dec}
    return JumpReLUSAE.from_weights(weights)


def features_along(
    directions: Tensor,
    z: Tensor,
    density: Tensor,
    mean_activation: Tensor,
    most: int | None = MAX_BASELINE_FEATURES,
) -> JumpReLUSAE:
    """The features of `match_rates` with the decoder of `fit_decoder`."""
    z = z[evenly_spaced(torch.arange(len(z)), FITTED_ENTRIES // len(density)).to(z.device)]
    return fit_decoder(match_rates(directions, z, density, mean_activation, most), z)


@torch.no_grad()
def faithful_on_canvas(layer: fa.ExplainedLayer, discovery: Discovery, least: float) -> Faithful:
    """Which features have patterns that, times the ink of the discovery images, have a correlation
    of at least `least` with the pre-activation."""
    predicted = patterns_on_canvas(layer, discovery) @ discovery.levels.float().T
    pre = layer.standardize(discovery.raw) @ layer.sae.W_enc.detach()
    found = correlations(predicted, pre.T.cpu())
    return Faithful(found >= least, found)


def evaluate_baseline(
    sae: JumpReLUSAE,
    layer: fa.ExplainedLayer,
    discovery: Discovery,
    test_half: fa.Activations,
    replication_half: fa.Activations,
    faithful_from: float | None = None,
) -> Summary:
    """The summary of hypotheses about the features of another SAE of the layer, proposed and tested
    like those of its own. Only features whose patterns follow them with a correlation of at least
    `faithful_from` are drawn, if it is given, as those of its own are."""
    rule, other = Rule(), layer.with_sae(sae)
    activity = collect_activity(other, discovery.raw, discovery.labels)
    faithful = (
        None if faithful_from is None else faithful_on_canvas(other, discovery, faithful_from)
    )
    given = (other, discovery, rule, activity)
    hypotheses = propose_hypotheses(*given, in_full=False, faithful=faithful)
    falling = torch.argsort(activity.n_active, descending=True, stable=True)
    tested = [hypotheses[k] for k in evenly_spaced(falling, MAX_TESTED).tolist()]
    halves = (test_half, replication_half)
    rows = evaluate_halves(tested, other, halves, discovery.canvas, rule)

    weights, raw = np.stack([h.weights for h in hypotheses]), test_half.raw
    scores = scores_of(weights, discovery.levels)
    test_scores = scores_of(weights, ink_levels(discovery.canvas, test_half.images))
    own = measure_agreement(other, raw, other.feature_acts(raw))
    drawn = agreement_of_drawings(other, raw, scores, activity, test_scores)
    return summarize(rows, len(activity.image) / len(activity.labels), own, drawn)
