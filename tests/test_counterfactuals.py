"""Contributions by class, flips and flip sets against slow loops over images and features."""

import functools

import numpy as np
import pytest
import torch
from page_world import TwoLayers
from small_models import SAE, Model
from torch import Tensor

import feature_analysis as fa
from saexplain import counterfactuals as cf
from saexplain.activity import collect_activity
from saexplain.sae import JumpReLUSAE
from saexplain.tours import find_tour

D_IN, D_SAE, N_CLASSES, N = 6, 9, 4, 40


def random_layer(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE):
    """A layer, raw (N, d_in), and labels (N,) that it mostly predicts."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    weights = {"W_enc": normal(d_in, d_sae), "W_dec": normal(d_sae, d_in)}
    weights |= {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
    sae = JumpReLUSAE.from_weights(weights | {"threshold": torch.full((d_sae,), 0.5)})
    head = normal(N_CLASSES, d_in)
    model = TwoLayers(torch.eye(d_in), torch.zeros(d_in), head, torch.zeros(N_CLASSES))
    layer = fa.ExplainedLayer(model, sae, normal(d_in), 1 + normal(d_in) ** 2)
    raw = 2 * normal(N, d_in)
    return layer, raw, layer.logits(raw + 0.5 * normal(N, d_in)).argmax(1)


def logits_without(layer: fa.ExplainedLayer, row: Tensor, features: list[int]) -> Tensor:
    """The logits (C,) of row (d_in,) after some features are removed, one by one."""
    acts, row = layer.sae.encode(((row - layer.mu) / layer.std)[None])[0], row.clone()
    for k in features:
        row -= acts[k] * layer.sae.W_dec[k] * layer.std
    return layer.logits(row[None])[0]


def margin(logits: Tensor, goal: int) -> float:
    values = logits.tolist()
    return values[goal] - max(v for c, v in enumerate(values) if c != goal)


def slow_flip_set(layer, row: Tensor, goal: int, most: int) -> list[int]:
    """Greedy, then put back in order of removal until each is needed; [] where nothing helps."""
    acts, off = layer.feature_acts(row[None])[0], []
    while margin(logits_without(layer, row, off), goal) <= 0:
        left = [k for k in range(D_SAE) if acts[k] > 0 and k not in off]
        if not left or len(off) == most:
            return []
        margins = [margin(logits_without(layer, row, [*off, k]), goal) for k in left]
        off.append(left[margins.index(max(margins))])
    before: list[int] = []
    while before != off:
        before = off
        for k in before:
            others = [j for j in off if j != k]
            if margin(logits_without(layer, row, others), goal) > 0:
                off = others
    return sorted(off)


def test_effects_by_class_from_some_images_are_close_to_those_of_all(monkeypatch):
    """100 classes, each with features of its own: a feature is removed from a few images only."""
    generator = torch.Generator().manual_seed(0)
    n, n_classes, d_sae = 5000, 100, 60
    labels = torch.arange(n) % n_classes
    rate = 0.02 + 0.9 * (torch.rand(n_classes, d_sae, generator=generator) < 0.05)
    acts = torch.rand(n, d_sae, generator=generator) + 0.5
    acts *= torch.rand(n, d_sae, generator=generator) < rate[labels]
    head = torch.randn(d_sae, n_classes, generator=generator)
    eye, zero = torch.eye(d_sae), torch.zeros(d_sae)
    layer = fa.ExplainedLayer(Model(lambda x: x, head), SAE(eye, zero, zero, eye), zero, zero + 1)
    activity = collect_activity(layer, acts, labels)
    exact = cf.class_effects(layer, acts, activity)
    by_hand = torch.stack([acts[labels == c].mean(0) for c in range(n_classes)])
    torch.testing.assert_close(
        torch.from_numpy(exact), by_hand[:, :, None] * head, atol=1e-4, rtol=1e-3
    )
    monkeypatch.setattr("saexplain.activity.KEPT_ENTRIES", n_classes * d_sae * 20)
    some = cf.class_effects(layer, acts, activity)
    assert np.corrcoef(some.flatten(), exact.flatten())[0, 1] > 0.98
    own = np.arange(n_classes)
    top, expected = (effects[own, :, own].argmax(1) for effects in (some, exact))
    assert (top == expected).mean() > 0.8


def test_class_effects_are_means_over_all_images_of_a_class():
    layer, raw, labels = random_layer()
    activity = collect_activity(layer, raw, labels)
    effects = cf.class_effects(layer, raw, activity)
    counts = labels.bincount(minlength=N_CLASSES).tolist()
    assert 0 in counts  # a class without images
    for k in range(D_SAE):
        expected = torch.zeros(N_CLASSES, N_CLASSES)
        for row, c in zip(raw, labels.tolist(), strict=True):
            lost = layer.logits(row[None])[0] - logits_without(layer, row, [k])
            expected[c] += lost / counts[c]
        assert effects[:, k] == pytest.approx(expected.numpy(), abs=1e-5)


def test_fixed_and_broken_predictions_are_counted():
    layer, raw, labels = random_layer()
    activity = collect_activity(layer, raw, labels)
    fixes, breaks = cf.flips_by_removal(layer, raw, activity)
    before = layer.logits(raw).argmax(1) == labels
    for k in range(D_SAE):
        after = torch.stack([logits_without(layer, row, [k]) for row in raw]).argmax(1) == labels
        assert int(fixes[k]) == int((after & ~before).sum())
        assert int(breaks[k]) == int((before & ~after).sum())
    assert min(fixes.sum(), breaks.sum()) > 0


@pytest.mark.parametrize("most", [2, D_SAE])
def test_flip_sets_are_those_of_a_slow_search(most):
    sizes = []
    for seed in range(2):
        layer, raw, _ = random_layer(seed)
        before, logits = raw.clone(), layer.logits(raw)
        goal = (logits.argmax(1) + 1 + torch.arange(N) % 3) % N_CLASSES
        sets = cf.minimal_flip_sets(layer, raw, goal, most)
        assert torch.equal(raw, before)
        for n, row in enumerate(raw):
            expected = slow_flip_set(layer, row, int(goal[n]), most)
            assert sets.off[n].nonzero()[:, 0].tolist() == expected
            assert float(sets.margin[n]) == pytest.approx(margin(logits[n], goal[n]), abs=1e-5)
            sizes.append(len(expected))
            if expected:
                after = logits_without(layer, row, expected)
                assert sets.logits[n].tolist() == pytest.approx(after.tolist(), abs=1e-4)
    assert {0, 1, 2} <= set(sizes)
    assert max(sizes) == 2 or most > 2


def test_every_feature_of_a_flip_set_is_needed():
    """A feature that is put back can make an earlier one needless."""
    n_sets = 0
    for seed in range(30):
        layer, raw, _ = random_layer(seed, d_in=10, d_sae=30)
        goal = (layer.logits(raw).argmax(1) + 1) % N_CLASSES
        sets = cf.minimal_flip_sets(layer, raw, goal)
        for n, row in enumerate(raw):
            off = sets.off[n].nonzero()[:, 0].tolist()
            n_sets += len(off) > 1
            for k in off if len(off) > 1 else ():
                with_it = logits_without(layer, row, [j for j in off if j != k])
                assert margin(with_it, int(goal[n])) <= 1e-5, (seed, n, k)
    assert n_sets > 150


def test_flip_sets_of_no_images_and_of_the_prediction():
    layer, raw, _ = random_layer()
    goal = layer.logits(raw).argmax(1)
    sets = cf.minimal_flip_sets(layer, raw[:0], goal[:0])
    assert [tuple(part.shape) for part in sets] == [(0, D_SAE), (0, N_CLASSES), (0,)]
    sets = cf.minimal_flip_sets(layer, raw, goal)  # what is predicted needs no feature
    assert not sets.off[sets.margin > 0].any()


def test_images_chosen():
    labels = torch.tensor([0, 0, 1, 1, 0, 2, 1])
    sizes = torch.tensor([9, 1, 5, 3, 5, 2, 2])[:, None]
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 2, 0, 2, 0])] * sizes
    errors, others = cf.chosen_tests(logits, labels)
    assert errors.tolist() == [3, 6, 1]  # behind by 3, 2 and 1
    assert others.tolist() == [0, 2, 5, 4]  # the first of each class, then the second


def test_most_confused_pair():
    labels, predicted = torch.tensor([0, 0, 3, 1, 1, 2]), torch.tensor([3, 0, 0, 2, 1, 2])
    assert cf.confused_pair(torch.eye(4)[predicted], labels) == [0, 3]
    assert cf.confused_pair(torch.eye(4)[labels], labels) == [0, 1]  # no errors


def test_inactive_features_flip_nothing():
    layer, raw, labels = random_layer()
    layer.sae.threshold.fill_(1e6)
    review = cf.review_tests(layer, raw, labels)
    test = fa.Activations(torch.zeros(N, 1, 1, 1), labels, raw)
    assert find_tour(layer, test) is None
    assert not review.sets.off.any()
    assert review.added.shape == (0, N_CLASSES)


def test_review_of_test_images():
    layer, raw, labels = random_layer(1)
    review, logits = cf.review_tests(layer, raw, labels), layer.logits(raw)
    wrong = int((logits.argmax(1) != labels).sum())
    assert wrong == review.all_errors == review.n_errors > 0
    is_wrong = logits[review.image].argmax(1) != labels[review.image]
    assert is_wrong.tolist() == [n < wrong for n in range(len(review.image))]
    assert torch.equal(review.activity.labels, labels[review.image])
    assert torch.allclose(review.logits, logits[review.image], atol=1e-5)
    for n in range(wrong):
        row, label = raw[review.image[n]], int(labels[review.image[n]])
        off = review.sets.off[n].nonzero()[:, 0].tolist()
        assert off == slow_flip_set(layer, row, label, D_SAE)
