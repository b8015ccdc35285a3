"""Features found again by SAEs of other seeds: saexplain.reproducibility."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import feature_analysis as fa
from saexplain import reproducibility as rep
from saexplain.fidelity import feature_stats

N, D_IN, D_SAE = 90, 6, 12
DEAD = D_SAE - 1  # a feature that is never active


class Plain:
    """A model whose activations are its inputs."""

    def logits_from_preactivations(self, raw):
        return raw


class SAE(NamedTuple):
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor

    def encode(self, z):
        pre = z @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


RAW = noise(N, D_IN, seed=9)


def random_sae(seed: int = 0, d_sae: int = D_SAE) -> SAE:
    rows = noise(d_sae, D_IN, seed=seed)
    threshold = torch.full((d_sae,), 0.5)
    threshold[-1] = torch.inf
    return SAE(rows.T.clone(), torch.zeros(d_sae), threshold, rows)


def layer_of(sae, raw: Tensor = RAW) -> fa.ExplainedLayer:
    d_in = raw.shape[1]
    splits = {"val": fa.Activations(raw, torch.zeros(len(raw)).long(), raw)}
    return fa.ExplainedLayer(Plain(), sae, torch.zeros(d_in), torch.ones(d_in), splits)


def permuted(sae: SAE) -> tuple[SAE, Tensor]:
    """The same features in another order and at another scale, and the order."""
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    W_enc, b_enc, threshold, W_dec = sae
    W_enc, b_enc, threshold, W_dec = W_enc * 8, b_enc * 8, threshold * 8, W_dec / 8
    return SAE(W_enc[:, order], b_enc[order], threshold[order], W_dec[order]), order


# A batch has at least fa.ROWS rows; MATCHED features are compared at once.
CHUNKS = pytest.mark.parametrize(("rows", "matched"), [(fa.ROWS, rep.MATCHED), (5, 2)])


@CHUNKS
def test_a_permuted_sae_is_matched_feature_by_feature(rows, matched, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    monkeypatch.setattr(rep, "MATCHED", matched)
    sae = random_sae()
    other, order = permuted(sae)
    matches = rep.match_features(layer_of(sae), RAW, other)
    alive = torch.arange(D_SAE) != DEAD
    assert matches.feature[alive].tolist() == torch.argsort(order)[alive].tolist()
    assert matches.similarity[alive].tolist() == pytest.approx((D_SAE - 1) * [1], abs=1e-5)
    assert matches.reproduced.tolist() == alive.tolist()  # a dead feature cannot be reproduced
    assert reproduced(sae, other) == pytest.approx((1, 1, 1), abs=1e-5)


@CHUNKS
def test_matches_agree_with_a_slow_loop(rows, matched, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    monkeypatch.setattr(rep, "MATCHED", matched)
    sae, other = random_sae(), random_sae(seed=1, d_sae=7)
    found = rep.match_features(layer_of(sae), RAW, other)
    ours, theirs = (one.encode(RAW).double().numpy() for one in (sae, other))
    for k in range(D_SAE):
        similar = []
        for j in range(7):
            cosine = F.cosine_similarity(sae.W_dec[k], other.W_dec[j], dim=0).item()
            varies = ours[:, k].std() > 0 and theirs[:, j].std() > 0
            correlation = np.corrcoef(ours[:, k], theirs[:, j])[0, 1] if varies else 0.0
            similar.append((min(cosine, correlation), cosine, correlation))
        smaller, cosine, correlation = similar[found.feature[k]]
        assert smaller == pytest.approx(max(similar)[0], abs=1e-5)
        assert float(found.cosine[k]) == pytest.approx(cosine, abs=1e-5)
        assert float(found.correlation[k]) == pytest.approx(correlation, abs=1e-5)


def reproduced(sae: SAE, other: SAE, raw: Tensor = RAW) -> rep.Reproducibility:
    matches = rep.match_features(layer_of(sae, raw), raw, other)
    return rep.compute_reproducibility(matches, *feature_stats(sae, raw))


def test_nothing_of_an_unrelated_opposite_or_inactive_sae_is_reproduced():
    raw = noise(300, 64, seed=1)
    rows = noise(2, 20, 64, seed=2)
    one, other = (SAE(w.T, torch.zeros(20), torch.full((20,), 4.0), w) for w in rows)
    opposite = one._replace(W_enc=-one.W_enc)
    inactive = one._replace(threshold=torch.full((20,), torch.inf))
    assert (one.encode(raw) > 0).any(0).all()
    for another in (other, opposite, inactive):
        found = reproduced(one, another, raw)
        assert found[:2] == (0, 0)
        assert found.similarity < 0.3


def test_features_count_by_what_they_explain():
    matches = rep.Matches(
        feature=torch.arange(4),
        cosine=torch.tensor([0.9, 1.0, 0.0, 1.0]),
        correlation=torch.tensor([0.8, 0.6, 0.9, 1.0]),
    )
    assert matches.reproduced.tolist() == [True, False, False, True]  # both similarities count
    density = torch.tensor([0.5, 0.25, 0.25, 0.0])
    found = rep.compute_reproducibility(matches, density, torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert found.features == pytest.approx(1 / 3)
    assert found.variance == pytest.approx(0.5 / (0.5 + 1.0 + 4.0))
    assert found.similarity == pytest.approx(0.5 * 0.8 + 0.25 * 0.6 + 0.25 * 0.0)
    assert rep.compute_reproducibility(matches, torch.zeros(4), torch.zeros(4)) == (0, 0, 0)


def best_matching(cosine: Tensor) -> float:
    """The largest mean of entries (n, m), m >= n, over all one-to-one matchings."""
    n, m = cosine.shape
    each = torch.arange(n)
    return max(cosine[each, list(p)].mean().item() for p in itertools.permutations(range(m), n))


@pytest.mark.parametrize("seed", range(3))
def test_pw_mcc_is_that_of_the_best_matching(seed):
    rows, other = noise(4, 5, seed=seed), noise(6, 5, seed=10 + seed)
    expected = best_matching(F.cosine_similarity(rows[:, None], other[None], dim=2))
    assert rep.compute_pw_mcc(rows, other) == pytest.approx(expected)
    assert rep.compute_pw_mcc(8 * other, rows / 8) == pytest.approx(expected)


def test_pw_mcc_keeps_the_sign_and_counts_rows_of_norm_0():
    rows = torch.eye(5)
    assert rep.compute_pw_mcc(rows, -rows) == 0  # every row has a partner at a right angle
    rows[3] = 0
    assert rep.compute_pw_mcc(rows, torch.eye(5).flip(0)) == pytest.approx(4 / 5)


BASELINES = {f"baseline {seed}": random_sae(seed) for seed in (7, 8)}


def compare(*saes: SAE) -> rep.Replicates | None:
    """Of seed 4 and the seeds that follow."""
    others = {5 + i: sae for i, sae in enumerate(saes[1:])}
    return rep.compare_seeds(layer_of(saes[0]), 4, others, BASELINES)


def test_baselines_are_compared_with_the_first_sae():
    sae = random_sae()
    found = compare(sae, random_sae(seed=1)).record["baselines"]
    assert found.keys() == BASELINES.keys()
    for name, other in BASELINES.items():
        pw_mcc = rep.compute_pw_mcc(sae.W_dec, other.W_dec)
        assert found[name] == pytest.approx({**reproduced(sae, other)._asdict(), "pw_mcc": pw_mcc})
        assert max(found[name].values()) < 0.9


def test_an_sae_is_reproduced_in_itself():
    sae = random_sae()
    found = compare(sae, sae)
    assert (found.record["seeds"], found.record["pairs"]) == ([4, 5], 1)
    for name in ("features", "variance", "similarity", "pw_mcc"):
        assert found.record[name] == {"mean": pytest.approx(1, abs=1e-5), "std": None}
    (counterpart,) = found.counterparts(3)
    assert (counterpart["seed"], counterpart["feature"]) == (5, 3)
    assert counterpart["cosine"] == pytest.approx(1)
    assert (found.mark(3), found.mark(DEAD)) == ("reproducible", "seed-specific")


def test_pairs_of_saes_are_averaged():
    """Of three SAEs two are the same, so that one pair of three is fully reproduced."""
    one, other = random_sae(), random_sae(seed=1)
    found = compare(one, one, other)
    across, record = compare(one, other).record, found.record
    assert record["pairs"] == 3
    for name in ("similarity", "pw_mcc"):
        pairs = [1, across[name]["mean"], across[name]["mean"]]
        assert record[name]["mean"] == pytest.approx(np.mean(pairs), abs=1e-5)
        assert record[name]["std"] == pytest.approx(np.std(pairs, ddof=1), abs=1e-5)
    assert compare(one) is None
