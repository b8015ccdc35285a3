"""Baselines: matched to the SAE's features, and tested like them."""

import pickle

import pytest
import torch
from planted_strokes import draw_labelled, plant, stroke_table

from saexplain import baselines
from saexplain.baselines import default_directions, match_rates, matched_directions


def test_features_are_active_where_activations_point_along_them():
    z, density = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]), torch.tensor([0.9])
    features = matched_directions(z[:1], z, density, torch.tensor([3.0]))
    assert features.encode(z)[:, 0].tolist() == pytest.approx([2.0, 4.0, 0.0])


def test_default_directions_are_drawn_from_the_seed():
    z, eye = torch.zeros(5, 4), torch.eye(4)
    found, again, other = (default_directions(z, seed) for seed in (4, 4, 5))
    assert sorted(found["neurons"].tolist()) == sorted(torch.cat([eye, -eye]).tolist())
    random = found["random directions"]
    assert random.T @ random / len(random) == pytest.approx(eye, abs=0.35)  # they point everywhere
    for name, directions in found.items():
        assert torch.equal(directions, again[name])
        assert not torch.equal(directions, other[name])


@pytest.mark.parametrize(("n", "compared"), [(40, 40), (1000, 300)])
def test_baselines_are_active_as_often_and_as_strongly_as_the_sae(n, compared):
    generator = torch.Generator().manual_seed(0)
    z, directions = (torch.randn(rows, 8, generator=generator) for rows in (4000, n))
    density, mean = 0.001 + torch.rand(300, generator=generator) / 4, torch.rand(300)
    features = match_rates(directions, z, density, mean)
    acts = features.encode(z)
    counts = (acts > 0).sum(0)
    some = density.argsort(descending=True)[torch.linspace(0, 299, compared).round().long()]
    assert counts / 4000 == pytest.approx(density[some], abs=1 / 2000)
    assert acts.sum(0) / counts == pytest.approx(mean[some], rel=1e-3)
    unit = directions[:compared] / directions[:compared].norm(dim=1, keepdim=True)
    assert features.W_dec == pytest.approx(unit, abs=1e-6)


@pytest.fixture(scope="module")
def planted():
    """A layer and three splits, as a worker process gets them."""
    table = stroke_table(0)
    layer = plant(table)
    return layer, [layer.activations(*draw_labelled(table, seed)) for seed in range(3)]


@pytest.mark.parametrize("strokes", [True, False])
def test_baselines_take_the_same_path_as_the_sae(planted, strokes):
    """Along the SAE's own directions most is explained; without strokes, nothing is."""
    layer, splits = planted
    given = (layer.sae.W_dec, layer, *splits, 0, strokes)
    found = baselines.evaluate_directions(*given)
    assert pickle.loads(pickle.dumps(found)) == found
    shares = found.shares
    assert (shares.features + shares.too_rare, shares.drawn) == (15, None)
    assert (shares.explained > 0.5, shares.ink_confirmed > 0) == (strokes, strokes)
