"""Is a feature found again by an SAE of another seed?

    matches = match_features(layer, raw, other_sae)        # each feature's counterpart
    replicates = compare_seeds(layer, {1: sae_of_seed_1})  # how much is reproduced, and by chance

Takes an `ExplainedLayer` with an SAE, and SAEs of the same activations; gives numbers. It trains, draws
and writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.baselines import match_rates
from saexplain.fidelity import feature_stats


class Replicates(NamedTuple):
    """The same target with other seeds."""

    seeds: list[int]
    saes: list  # SAEs
    matches: list[Matches]  # the features of the run's own SAE in each of them
    record: dict  # for summary.json

    def counterparts(self, k: int) -> list[dict]:
        """What feature_report.json says about feature k in the SAEs of other seeds."""
        found = []
        for seed, m in zip(self.seeds, self.matches, strict=True):
            values = {name: float(getattr(m, name)[k]) for name in ("cosine", "correlation")}
            found.append({"seed": seed, "feature": int(m.feature[k]), **values})
        return found

    def mark(self, k: int) -> str:
        """Whether feature k is found in every other SAE, in words."""
        similar = [min(c["cosine"], c["correlation"]) for c in self.counterparts(k)]
        return "reproducible" if min(similar) >= MIN_SIMILARITY else "seed-specific"


def mean_and_std(values: np.ndarray) -> dict[str, float | None]:
    """Mean, and standard deviation (n - 1 in its denominator); None of a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread}


@torch.no_grad()
def compare_seeds(
    layer: fa.ExplainedLayer, seed: int, others: Mapping[int, object], untrained: Tensor | None
) -> Replicates | None:
    """How much of the layer's SAE, of `seed`, is found in the SAEs `others` by seed, on the
    validation images; None where there is no other.

    The two directions of a pair of SAEs are averaged, and means are over all pairs. For chance, the
    SAE's features are also looked for among `untrained` directions (n, d_in), which are made to be
    active as often and as strongly as its features.
    """
    if not others:
        return None
    raw = layer.splits["val"].raw
    z = layer.standardize(raw)
    saes = [layer.sae, *others.values()]
    stats = [feature_stats(sae, z) for sae in saes]

    def look_for(i: int, other: object) -> tuple[Matches, Reproducibility]:
        matches = match_features(layer.with_sae(saes[i]), raw, other)
        return matches, compute_reproducibility(matches, *stats[i])

    every = range(len(saes))
    found = {(i, j): look_for(i, saes[j]) for i, j in itertools.permutations(every, 2)}
    pairs = []
    for i, j in itertools.combinations(every, 2):
        pairs.append(np.mean([found[i, j][1], found[j, i][1]], axis=0))

    record = {"seeds": [seed, *others], "pairs": len(pairs)}
    if untrained is not None:
        _, null_effect = look_for(0, match_rates(untrained, z, *stats[0]))
        record["untrained"] = null_effect._asdict()
    for name, values in zip(Reproducibility._fields, np.transpose(pairs), strict=True):
        record[name] = mean_and_std(values)
    return Replicates(list(others), saes[1:], [found[0, j][0] for j in every[1:]], record)


MIN_SIMILARITY = 0.7  # cosine and correlation from which two features are the same
MATCHED = 1024  # features whose similarities to all others are held at once


class Matches(NamedTuple):
    """For every feature of one SAE its counterpart in another, (d_sae,) each: the one whose smaller
    of the two similarities is largest."""

    feature: Tensor
    cosine: Tensor  # of the decoder rows
    correlation: Tensor  # of the activations over images

    @property
    def similarity(self) -> Tensor:
        """(d_sae,) the smaller of cosine and correlation."""
        return torch.minimum(self.cosine, self.correlation)

    @property
    def reproduced(self) -> Tensor:
        """(d_sae,) bool"""
        return self.similarity >= MIN_SIMILARITY


def _correlations(layer: fa.ExplainedLayer, raw: Tensor, other, own: slice) -> Tensor:
    """Pearson correlations over images of n features, `own`, with those of `other`: (n, d_other).

    0 for a feature that does not vary. Activations are taken from about their mean, that of the
    first batch, or the products of a feature that is_active strongly everywhere would lose the digits
    that say how it varies.
    """
    n, d_other = len(range(layer.d_sae)[own]), len(other.W_dec)
    about = None
    total = square = 0.0
    product = torch.zeros(n, d_other, dtype=torch.float64, device=layer.mu.device)
    for batch in raw.split(max(fa.ROWS, min(4 * fa.ROWS, fa.ENTRIES // (n + d_other)))):
        z = layer.standardize(batch)
        acts = torch.cat([layer.sae.encode(z)[:, own], other.encode(z)], 1)
        if about is None:
            about = acts.mean(0)
        acts = acts - about
        total = total + acts.sum(0).double()
        square = square + acts.square().sum(0).double()
        product += acts[:, :n].T @ acts[:, n:]

    mean = total / len(raw)
    spread = (square / len(raw) - mean.square()).clamp(min=0).sqrt()
    product /= len(raw)
    product -= torch.outer(mean[:n], mean[n:])  # the covariance
    product /= torch.outer(spread[:n], spread[n:]).clamp_(min=1e-12)
    return product.float()


@torch.no_grad()
def match_features(layer: fa.ExplainedLayer, raw: Tensor, other) -> Matches:
    """Counterparts of the features of the layer's SAE among those of `other`, on the CPU.

    `other` is an SAE of the same preactivations, images (N, ...). MATCHED features at a time are
    compared with all others, each time over all images.
    """
    unit = torch.nn.functional.normalize(layer.sae.W_dec.detach(), dim=1)
    other_unit = torch.nn.functional.normalize(other.W_dec.detach(), dim=1)
    found = []
    for first in range(0, len(unit), MATCHED):
        own = slice(first, first + MATCHED)
        cosine = (unit[own] @ other_unit.T).cpu()
        correlation = _correlations(layer, raw, other, own).cpu()
        best = torch.minimum(cosine, correlation).argmax(1)
        each = torch.arange(len(best))
        found.append((best, cosine[each, best], correlation[each, best]))
    return Matches(*(torch.cat(column) for column in zip(*found, strict=True)))


class Reproducibility(NamedTuple):
    """How much of one SAE is reproduced in another, each in [0, 1] but for negative similarity."""

    features: float  # share of the features that are ever active
    variance: float  # share of the sum over features of density * mean activation^2
    similarity: float  # mean over features, weighted by density: without a threshold, so steadier


def compute_reproducibility(
    matches: Matches, density: Tensor, mean_activation: Tensor
) -> Reproducibility:
    """`matches` of an SAE's features, and how they are used: share of images, and mean activation where
    active, (d_sae,) each. Zeros for an SAE that is never active.

    With unit decoder rows, density * mean activation^2 is about what a feature adds to the
    reconstruction's square, so that features count by the variance that they explain.
    """
    density, mean_activation = density.cpu().double(), mean_activation.cpu().double()
    reproduced = matches.reproduced.double()
    variance = density * mean_activation.square()
    is_active = (density > 0).double()

    def weighted_mean(values: Tensor, weights: Tensor) -> float:
        return float((values * weights).sum() / weights.sum().clamp(min=1e-12))

    return Reproducibility(
        features=weighted_mean(reproduced, is_active),
        variance=weighted_mean(reproduced, variance),
        similarity=weighted_mean(matches.similarity.double(), density),
    )
