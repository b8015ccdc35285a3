"""Is a feature found again by an SAE of another seed?

    matches = match_features(layer, raw, other_sae)  # each feature's counterpart
    replicates = compare_seeds(layer, 0, {1: sae_of_seed_1}, baselines={})

Takes an `ExplainedLayer` with an SAE, and SAEs of the same activations; gives numbers. It trains,
draws and writes nothing.

Dimension key: N images, d_in units of the layer, d_sae features of the layer's SAE, d_other of the
other SAE.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import feature_analysis as fa
from saexplain.fidelity import FeatureStats, feature_stats, raw_rows

MIN_SIMILARITY = 0.7  # cosine and correlation from which two features are the same
MATCHED = 1024  # features whose similarities to all others are held at once: bounds the memory


# --------------------------------------------------------------------------------------------------
# Two SAEs
# --------------------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """Every feature's counterpart in another SAE, (d_sae,) each: the one whose smaller similarity
    of two is largest."""

    feature: Tensor  # its number in the other SAE
    cosine: Tensor  # of the decoder rows
    correlation: Tensor  # of the activations over images

    @property
    def similarity(self) -> Tensor:
        """(d_sae,) the smaller of cosine and correlation."""
        return torch.minimum(self.cosine, self.correlation)

    @property
    def reproduced(self) -> Tensor:
        """(d_sae,) bool, whether both similarities reach MIN_SIMILARITY."""
        return self.similarity >= MIN_SIMILARITY


def _correlations(layer: fa.ExplainedLayer, raw: Tensor, other, own: slice) -> Tensor:
    """Pearson correlations (n, d_other) over images of n features, `own`, with those of `other`;
    0 for a feature that does not vary."""
    n, d_other = len(range(layer.d_sae)[own]), len(other.W_dec)
    shift = None
    total = square = 0.0
    product = torch.zeros(n, d_other, dtype=torch.float64, device=layer.mu.device)
    for batch in raw.split(max(fa.ROWS, min(4 * fa.ROWS, fa.ENTRIES // (n + d_other)))):
        z = layer.standardize(batch)
        acts = torch.cat([layer.sae.encode(z)[:, own], other.encode(z)], 1)
        if shift is None:
            # About the mean: products of a feature that is strongly active on every image would
            # otherwise lose the digits that describe how it varies.
            shift = acts.mean(0)
        acts = acts - shift
        total = total + acts.sum(0).double()
        square = square + acts.square().sum(0).double()
        product += acts[:, :n].T @ acts[:, n:]

    mean = total / len(raw)
    std = (square / len(raw) - mean.square()).clamp(min=0).sqrt()  # rounding may go below 0
    product /= len(raw)
    product -= torch.outer(mean[:n], mean[n:])  # the covariance
    product /= torch.outer(std[:n], std[n:]).clamp_(min=1e-12)
    return product.float()


@torch.no_grad()
def match_features(layer: fa.ExplainedLayer, raw: Tensor, other) -> Matches:
    """Counterparts of the features of the layer's SAE among those of `other`, on the CPU.

    `other` is an SAE that reads the same raw activations (N, d_in), standardized alike.
    """
    unit = torch.nn.functional.normalize(layer.sae.W_dec.detach(), dim=1)
    other_unit = torch.nn.functional.normalize(other.W_dec.detach(), dim=1)
    found = []
    for first in range(0, len(unit), MATCHED):
        own = slice(first, first + MATCHED)
        cosine = (unit[own] @ other_unit.T).cpu()  # (n, d_other)
        correlation = _correlations(layer, raw, other, own).cpu()  # (n, d_other)
        best = torch.minimum(cosine, correlation).argmax(1)
        each = torch.arange(len(best))
        found.append((best, cosine[each, best], correlation[each, best]))
    return Matches(*(torch.cat(column) for column in zip(*found, strict=True)))


class Reproducibility(NamedTuple):
    """How much of one SAE is reproduced in another: shares from 0 to 1, and a mean similarity."""

    features: float  # share of the features that are ever active
    variance: float  # share of the sum over features of density * mean activation^2
    similarity: float  # mean over features, weighted by density; it varies less, without threshold


def compute_reproducibility(
    matches: Matches, density: Tensor, mean_activation: Tensor
) -> Reproducibility:
    """How much of an SAE its `matches` reproduce; zeros for an SAE that is never active.

    density and mean_activation (d_sae,) are those of `feature_stats`. With unit decoder rows,
    density * mean activation^2 is about what a feature adds to the reconstruction's square, so that
    features count by the variance that they explain.
    """
    density, mean_activation = density.cpu().double(), mean_activation.cpu().double()
    reproduced = matches.reproduced.double()

    def weighted_mean(values: Tensor, weights: Tensor) -> float:
        return float((values * weights).sum() / weights.sum().clamp(min=1e-12))

    return Reproducibility(
        features=weighted_mean(reproduced, (density > 0).double()),
        variance=weighted_mean(reproduced, density * mean_activation.square()),
        similarity=weighted_mean(matches.similarity.double(), density),
    )


def compute_pw_mcc(rows: Tensor, other_rows: Tensor) -> float:
    """The pairwise dictionary mean correlation coefficient (PW-MCC) of two dictionaries (d_sae,
    d_in) and (d_other, d_in): the mean cosine of rows matched one to one, so that it is largest.

    After Song et al. 2025, arXiv 2505.20254. Cosines keep their sign, as in the authors' code:
    activations are not negative, so opposite rows are different features. Each row of the smaller
    dictionary has a partner; one of norm 0 adds 0.
    """
    unit, other_unit = (
        torch.nn.functional.normalize(w.detach().cpu().double(), dim=1) for w in (rows, other_rows)
    )
    cosine = (unit @ other_unit.T).numpy()
    return float(cosine[linear_sum_assignment(cosine, maximize=True)].mean())


# --------------------------------------------------------------------------------------------------
# SAEs of several seeds
# --------------------------------------------------------------------------------------------------


MEASURES = (*Reproducibility._fields, "pw_mcc")  # of a pair of SAEs, in a record


class Replicates(NamedTuple):
    """SAEs of the same target and other seeds, and how much they reproduce."""

    seeds: list[int]
    saes: list  # of those seeds
    matches: list[Matches]  # the features of the run's own SAE in each of them
    record: dict  # for summary.json

    def counterparts(self, k: int) -> list[dict]:
        """The records of feature k's counterparts for feature_report.json."""
        found = []
        for seed, m in zip(self.seeds, self.matches, strict=True):
            similar = {"cosine": float(m.cosine[k]), "correlation": float(m.correlation[k])}
            found.append({"seed": seed, "feature": int(m.feature[k]), **similar})
        return found

    def mark(self, k: int) -> str:
        """Whether feature k is found in every other SAE: "reproducible" or "seed-specific"."""
        similar = [min(c["cosine"], c["correlation"]) for c in self.counterparts(k)]
        return "reproducible" if min(similar) >= MIN_SIMILARITY else "seed-specific"


def mean_and_std(values: np.ndarray) -> dict[str, float | None]:
    """Mean, and standard deviation with n - 1 in its denominator; None for a single value."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def _look_for(
    layer: fa.ExplainedLayer, raw: Tensor, stats: FeatureStats, other: object
) -> tuple[Matches, Reproducibility]:
    """Counterparts of the layer's features in the SAE `other`, and how much that reproduces."""
    matches = match_features(layer, raw, other)
    return matches, compute_reproducibility(matches, *stats)


@torch.no_grad()
def compare_seeds(
    layer: fa.ExplainedLayer,
    seed: int,
    others: Mapping[int, object],
    baselines: Mapping[str, object],
) -> Replicates | None:
    """How much of the layer's SAE, of `seed`, is found in the SAEs `others` by seed, on the split
    "val"; None where there are no others.

    The two directions of a pair of SAEs are averaged; means and deviations are over all pairs. As
    null effects, the layer's features are also looked for in the `baselines`, SAEs by name, such as
    those that `match_rates` makes of untrained directions.
    """
    if not others:
        return None
    raw = raw_rows(layer, "val")
    z = layer.standardize(raw)
    saes = [layer.sae, *others.values()]
    stats = [feature_stats(sae, z) for sae in saes]

    found = {}  # by (from, to)
    for i, j in itertools.permutations(range(len(saes)), 2):
        found[i, j] = _look_for(layer.with_sae(saes[i]), raw, stats[i], saes[j])
    pairs = []
    for i, j in itertools.combinations(range(len(saes)), 2):
        both_ways = np.mean([found[i, j][1], found[j, i][1]], axis=0)
        pairs.append([*both_ways, compute_pw_mcc(saes[i].W_dec, saes[j].W_dec)])

    record = {"seeds": [seed, *others], "pairs": len(pairs), "baselines": {}}
    for name, other in baselines.items():
        _, null_effect = _look_for(layer, raw, stats[0], other)
        pw_mcc = compute_pw_mcc(layer.sae.W_dec, other.W_dec)
        record["baselines"][name] = {**null_effect._asdict(), "pw_mcc": pw_mcc}
    for name, values in zip(MEASURES, np.transpose(pairs), strict=True):
        record[name] = mean_and_std(values)
    matches = [found[0, j][0] for j in range(1, len(saes))]
    return Replicates(list(others), saes[1:], matches, record)
