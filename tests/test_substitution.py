"""Hypotheses in place of features: saexplain.substitution, by hand and on a planted model."""

import numpy as np
import pytest
import torch
from planted import planted_world
from small_models import activity_of

from saexplain.activity import collect_activity
from saexplain.hypotheses import scores_of
from saexplain.substitution import fit_quantiles, measure_agreement, predict_acts, swap_by_rate


def test_acts_follow_scores_by_rank_and_linearly_between():
    scores = torch.tensor([[0, 10, 20, 30, 50], [0, 10, 20, 30, 50], [0, 0, 0, 0, 0]])
    acts = [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    fitted = fit_quantiles(scores, activity_of(acts))
    # Two images activate feature 0: scores of 30 and 50 are picked, and get 1 and 4.
    found = predict_acts(fitted, torch.tensor([[29, 30, 40, 50, 90]] * 3))
    assert found[:, 0].tolist() == pytest.approx([0, 1, 2.5, 4, 4])
    assert (found[:, 1:] == 0).all()  # never active, and without a drawing


def test_acts_of_a_drawing_that_determines_the_feature_are_exact():
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 200, (60, 6), generator=generator)
    weights = np.array([[[1, -1, 0, 2, 0, 0]], [[0, 1, 1, 0, 0, 0]], [[0, 0, 0, 0, -2, 1]]])
    scores = torch.from_numpy(weights).flatten(1) @ levels.T
    acts = (scores - scores.float().quantile(0.6, 1, keepdim=True).round()).clamp(min=0) / 64
    fitted = fit_quantiles(scores, activity_of(acts.T.tolist()))
    assert predict_acts(fitted, scores).T == pytest.approx(acts, abs=1e-6)


def test_acts_are_linear_between_quantiles():
    rng = np.random.default_rng(0)
    levels, acts = rng.permutation(250), rng.random(250) ** 4 * (np.arange(250) < 170)
    scores = torch.from_numpy(levels)[None]
    fitted = fit_quantiles(scores, activity_of(acts[:, None].astype(np.float32).tolist()))
    shares = np.linspace(0, 1, 65)
    picked = np.quantile(np.sort(levels)[-170:], shares)
    expected = np.interp(levels, picked, np.quantile(acts[:170], shares), left=0)
    found = predict_acts(fitted, scores)
    assert found[:, 0].numpy() == pytest.approx(expected, abs=1e-6)


def test_agreement_by_hand():
    world = planted_world()
    layer, raw = world.layer, world.test.raw[:500]
    acts = layer.feature_acts(raw)
    for given in (acts, acts.flip(0), torch.zeros_like(acts)):
        z_hat = given @ layer.sae.W_dec + layer.sae.b_dec
        before = layer.model.logits_from_preactivations(raw).argmax(1)
        after = layer.model.logits_from_preactivations(z_hat * layer.std + layer.mu).argmax(1)
        expected = (before == after).double().mean().item()
        assert measure_agreement(layer, raw, given) == pytest.approx(expected)
    assert measure_agreement(layer, raw, acts) > 0.95  # feature k is all that unit k does


def test_hypotheses_about_planted_strokes_keep_the_predictions():
    world = planted_world()
    activity = collect_activity(world.layer, world.val.raw, world.val.labels)
    weights = np.stack([h.weights for h in world.hypotheses])
    fitted = fit_quantiles(scores_of(weights, world.discovery.levels), activity)
    levels = world.discovery.canvas.levels(world.test.images)
    found = predict_acts(fitted, scores_of(weights, levels))
    acts = world.layer.feature_acts(world.test.raw)
    correlation = np.corrcoef(found.flatten(), acts.flatten())[0, 1]
    assert correlation > 0.95
    kept = measure_agreement(world.layer, world.test.raw, found)
    assert kept > measure_agreement(world.layer, world.test.raw, found.flip(0)) + 0.5


def test_drawings_are_exchanged_for_those_of_the_next_in_rate():
    acts = torch.zeros(9, 4)
    for k, n in enumerate((3, 9, 0, 4)):  # the order is 2, 0, 3, 1
        acts[:n, k] = 1.0
    assert swap_by_rate(activity_of(acts.tolist())).tolist() == [3, 2, 0, 1]
