"""Baselines: matched to the SAE's features, and tested like them."""

import pickle

import numpy as np
import pytest
import torch
from planted import planted_world

from saexplain import baselines
from saexplain.baselines import (
    default_directions,
    directions_of_variance,
    features_along,
    fit_decoder,
    match_rates,
    matched_directions,
)
from saexplain.evaluation import collect_evidence, decide, split_test_images
from saexplain.fidelity import feature_stats


def noise(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_features_are_active_where_activations_point_along_them():
    z, density = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.9])
    features = matched_directions(z[:1], z, density, torch.tensor([3.0]))
    assert features.encode(z)[:, 0].tolist() == pytest.approx([2.0, 4.0, 0.0])


def test_random_directions_have_the_variance_asked_for():
    rotation = torch.linalg.qr(noise(12, 12, 1)).Q
    z = noise(3000, 12, 0) @ torch.diag(torch.logspace(-1, 1, 12)) @ rotation
    spectrum = np.linalg.eigvalsh(np.cov(z.T.double().numpy(), bias=True))
    variance = torch.from_numpy(np.geomspace(1.5 * spectrum[0], 0.8 * spectrum[-1], 40)).float()
    found = directions_of_variance(z, variance, 4)
    assert found.norm(dim=1) == pytest.approx(torch.ones(40), abs=1e-5)
    assert (z @ found.T).var(0, unbiased=False) == pytest.approx(variance, rel=1e-3)
    assert torch.equal(found, directions_of_variance(z, variance, 4))
    assert not torch.equal(found, directions_of_variance(z, variance, 5))
    alike = directions_of_variance(z, variance[:1].repeat(2000), 0)
    assert alike.mean(0).abs().max() < 0.05  # they point to both sides alike


def test_default_directions_are_like_the_sae_and_drawn_from_the_seed():
    layer = planted_world().layer
    z, d_in = layer.standardize(layer.splits["val"].raw), len(layer.mu)
    found, again, other = (default_directions(layer, seed) for seed in (4, 4, 5))
    eye = torch.eye(d_in)
    assert sorted(found["neurons"].tolist()) == sorted(torch.cat([eye, -eye]).tolist())
    falling = feature_stats(layer.sae, z).feature_density.argsort(descending=True, stable=True)
    readouts = torch.nn.functional.normalize(layer.sae.W_enc[:, falling], dim=0)
    expected = (z @ readouts).var(0)
    assert (z @ found["random directions"].T).var(0) == pytest.approx(expected, rel=2e-3)
    for name, directions in found.items():
        assert torch.equal(directions, again[name])
        assert not torch.equal(directions, other[name])


@pytest.mark.parametrize(("n", "compared"), [(40, 40), (1000, 300)])
def test_baselines_are_active_as_often_and_as_strongly_as_the_sae(n, compared):
    z, directions = noise(4000, 8, 0), noise(n, 8, 1)
    generator = torch.Generator().manual_seed(0)
    density = 0.001 + torch.rand(300, generator=generator) / 4
    mean = torch.rand(300, generator=generator)
    features = match_rates(directions, z, density, mean)
    acts = features.encode(z)
    counts = (acts > 0).sum(0)
    some = density.argsort(descending=True)[torch.linspace(0, 299, compared).round().long()]
    assert counts / 4000 == pytest.approx(density[some], abs=1 / 2000)
    assert acts.sum(0) / counts == pytest.approx(mean[some], rel=1e-3)
    unit = directions[:compared] / directions[:compared].norm(dim=1, keepdim=True)
    assert features.W_dec == pytest.approx(unit, abs=1e-6)


def test_the_fitted_decoder_has_the_least_squared_error(monkeypatch):
    z = noise(500, 6, 0)
    given = z, torch.full((4,), 0.3), torch.ones(4)
    sae = features_along(noise(4, 6, 1), *given)
    acts = sae.encode(z).double().numpy()
    ridge = baselines.RIDGE * acts.var(0).mean() * 500 + 1e-6
    design = np.concatenate([acts - acts.mean(0), np.sqrt(ridge) * np.eye(4)])
    target = np.concatenate([(z - z.mean(0)).double().numpy(), np.zeros((4, 6))])
    expected, *_ = np.linalg.lstsq(design, target, rcond=None)
    assert sae.W_dec.numpy() == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(baselines, "RIDGE", 0.0)
    plain, error = fit_decoder(sae, z), []
    expected, *_ = np.linalg.lstsq(np.c_[acts, np.ones(500)], z.double().numpy(), rcond=None)
    assert torch.cat([plain.W_dec, plain.b_dec[None]]).numpy() == pytest.approx(expected, abs=1e-4)
    for other in (plain, sae):
        error.append((other.decode(sae.encode(z)) - z).square().sum().item())
        assert torch.equal(other.encode(z), sae.encode(z))
    assert error[0] <= error[1] < z.square().sum()


def test_baselines_take_the_same_path_as_the_sae(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_TESTED", 8)
    world = planted_world()
    test_half, other_half = split_test_images(world.test)
    given = world.layer, world.discovery, test_half, other_half
    found = baselines.evaluate_baseline(world.layer.sae, *given)
    assert pickle.loads(pickle.dumps(found)) == found
    z = world.layer.standardize(world.val.raw)
    density = feature_stats(world.layer.sae, z).feature_density
    some = density.argsort(descending=True, stable=True)[::2].tolist()  # of 15
    own = [world.hypotheses[k] for k in some]
    evidence = collect_evidence(own, world.layer, test_half, world.discovery.canvas)
    assert (found.features, found.too_rare) == (len(some), 0)
    assert found.f1_mean == pytest.approx(np.mean([e.f1 for e in evidence]))
    assert found.correlation == pytest.approx(np.mean([e.correlation for e in evidence]))
    high = [e.influence for e in evidence if decide(e).confidence == "High"]
    assert found.influence_high == pytest.approx(sum(high) / sum(e.influence for e in evidence))
    assert found.agreement == 1 >= found.agreement_hypotheses > 0.95
    units = features_along(torch.eye(len(world.layer.mu)), z, *feature_stats(world.layer.sae, z))
    other = baselines.evaluate_baseline(units, *given)
    assert other.f1_mean > 0.9  # each reads one stroke
    assert other.agreement < 1  # some are never active


def test_an_untrained_sae_of_many_latents_is_as_active_as_the_trained_one():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 12, generator=generator)
    rows = torch.randn(700, 12, generator=generator)
    density, strength = torch.full((700,), 0.02), torch.ones(700)
    for most, n in ((None, 700), (baselines.MAX_BASELINE_FEATURES, 512)):
        sae = baselines.features_along(rows, z, density, strength, most)
        l0 = (sae.encode(z) > 0).sum(1).double().mean()
        assert float(l0) == pytest.approx(0.02 * n, rel=0.02)
