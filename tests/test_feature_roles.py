"""What features do together, against slow loops over images and features."""

import math

import pytest
import torch
from small_models import activity_of
from torch import Tensor

import feature_analysis as fa
import feature_roles as fr

D_IN, D_SAE, N_CLASSES = 6, 9, 4


class Model:
    """Images are their own preactivations; the head is not linear."""

    def __init__(self, head: Tensor):
        self.head = head  # (C, d_in)

    def preactivations(self, images: Tensor) -> Tensor:
        return images.clone()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        return raw.relu() @ self.head.T


class SAE:
    def __init__(self, W_enc: Tensor, W_dec: Tensor):
        self.W_enc, self.W_dec = W_enc, W_dec

    def encode(self, z: Tensor) -> Tensor:
        acts = z @ self.W_enc
        return torch.where(acts > 0.5, acts, 0.0)


def random_layer(
    seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE
) -> tuple[fa.ExplainedLayer, Tensor, Tensor]:
    """A layer, images (40, d_in), labels (40,) that it mostly gets right."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sae = SAE(normal(d_in, d_sae), normal(d_sae, d_in))
    layer = fa.ExplainedLayer(
        Model(normal(N_CLASSES, d_in)), sae, normal(d_in), 1 + normal(d_in) ** 2
    )
    images = 2 * normal(40, d_in)
    labels = layer.logits_from_raw(images + 0.5 * normal(40, d_in)).argmax(1)
    return layer, images, labels


def acts_of(layer: fa.ExplainedLayer, image: Tensor) -> Tensor:
    return layer.sae.encode(((image - layer.mu) / layer.std)[None])[0]


def logits_without(layer: fa.ExplainedLayer, image: Tensor, features: list[int]) -> Tensor:
    """The logits (C,) of an image (d_in,) after some features are taken away, one by one."""
    acts, raw = acts_of(layer, image), image.clone()
    for k in features:
        raw -= acts[k] * layer.sae.W_dec[k] * layer.std
    return layer.logits_from_raw(raw[None])[0]


def lead(logits: Tensor, goal: int) -> float:
    values = logits.tolist()
    return values[goal] - max(v for c, v in enumerate(values) if c != goal)


def measured(seed: int = 0):
    layer, images, labels = random_layer(seed)
    activity = fa.collect_activity(layer, images, labels)
    return layer, images, labels, activity, *fa.contributions(layer, images, activity)


def test_contributions_are_what_an_image_loses():
    layer, images, _, activity, added, logits = measured()
    assert torch.equal(logits, layer.logits_from_raw(images))
    assert len(added) > 60
    rounding = 1e-6 * logits.abs().max().item()  # of the logits whose difference is taken
    for k, image, row in zip(activity.feature, activity.image, added, strict=True):
        expected = logits[image] - logits_without(layer, images[image], [int(k)])
        assert row.tolist() == pytest.approx(expected.tolist(), abs=rounding)


def test_contributions_average_to_the_ablation_effect():
    layer, images, labels, activity, added, _ = measured()
    effects = fa.feature_ablation_effects(layer.model, [(images, labels)], *layer[1:])
    for k in range(D_SAE):
        mean = added[activity.feature == k].double().mean(0)
        assert mean.tolist() == pytest.approx((-effects.mean_delta[k]).tolist(), abs=1e-5)


def test_no_feature_fires():
    layer, images, labels = random_layer()
    layer = layer._replace(sae=SAE(0 * layer.sae.W_enc, layer.sae.W_dec))
    added, logits = fa.contributions(layer, images, fa.collect_activity(layer, images, labels))
    assert added.shape == (0, N_CLASSES)
    assert logits.shape == (40, N_CLASSES)


def test_class_effects_are_means_over_all_images_of_a_class():
    layer, images, labels, activity, added, _ = measured()
    effects = fr.class_effects(activity, added)
    for c in range(N_CLASSES):
        own = images[labels == c]
        for k in range(D_SAE):
            lost = torch.zeros(N_CLASSES)
            for image in own:
                lost += layer.logits_from_raw(image[None])[0] - logits_without(layer, image, [k])
            mean = lost / max(1, len(own))
            assert effects[c, k].tolist() == pytest.approx(mean.tolist(), abs=1e-5)


def test_a_class_without_images_has_no_effects():
    activity = activity_of([[1.0, 0.0], [1.0, 2.0]])  # both images are of class 0
    effects = fr.class_effects(activity, torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]]))
    assert effects.tolist() == [[[2, 3], [4, 0]], [[0, 0], [0, 0]]]


def test_mended_and_broken_images_are_counted():
    layer, images, labels, activity, added, logits = measured()
    mends, breaks = fr.turned_by(activity, added, logits)
    for k in range(D_SAE):
        found = [0, 0]
        for image, label in zip(images, labels, strict=True):
            before = layer.logits_from_raw(image[None])[0].argmax() == label
            after = logits_without(layer, image, [k]).argmax() == label
            found[0] += bool(after and not before)
            found[1] += bool(before and not after)
        assert [int(mends[k]), int(breaks[k])] == found
    assert mends.sum() > 0
    assert breaks.sum() > 0


def slow_turning(layer, image: Tensor, goal: int, most: int) -> list[int]:
    """Greedy, then pruned in the order in which they went, until all that is left is needed; []
    where nothing helps."""
    firing = [k for k in range(D_SAE) if acts_of(layer, image)[k] > 0]
    off: list[int] = []
    while lead(logits_without(layer, image, off), goal) <= 0:
        left = [k for k in firing if k not in off]
        if not left or len(off) == most:
            return []
        leads = [lead(logits_without(layer, image, [*off, k]), goal) for k in left]
        off.append(left[leads.index(max(leads))])
    before: list[int] = []
    while before != off:
        before = off
        for k in before:
            others = [j for j in off if j != k]
            if lead(logits_without(layer, image, others), goal) > 0:
                off = others
    return sorted(off)


@pytest.mark.parametrize("most", [2, D_SAE])
def test_turning_sets_are_those_of_a_slow_search(most):
    sizes = []
    for seed in range(2):
        layer, images, _ = random_layer(seed)
        before, kept = images.clone(), layer.logits_from_raw(images)
        goal = (kept.argmax(1) + 1 + torch.arange(40) % 3) % N_CLASSES
        turns = fr.turning_features(layer, images, goal, most)
        for n, image in enumerate(images):
            expected = slow_turning(layer, image, int(goal[n]), most)
            assert turns.off[n].nonzero()[:, 0].tolist() == expected
            sizes.append(len(expected))
            assert float(turns.lead[n]) == pytest.approx(lead(kept[n], int(goal[n])), abs=1e-5)
            if expected:
                after = logits_without(layer, image, expected)
                assert turns.logits[n].tolist() == pytest.approx(after.tolist(), abs=1e-4)
                assert after.argmax() == goal[n]
        assert torch.equal(images, before)
    assert {0, 1, 2} <= set(sizes)
    assert max(sizes) == 2 or most > 2


def test_none_of_the_features_of_a_set_can_be_put_back():
    """Every set, and every feature of it; one that is put back can make an earlier one needless."""
    n_sets = 0
    for seed in range(30):
        layer, images, _ = random_layer(seed, d_in=10, d_sae=30)
        goal = (layer.logits_from_raw(images).argmax(1) + 1) % N_CLASSES
        turns = fr.turning_features(layer, images, goal)
        for n, image in enumerate(images):
            off = turns.off[n].nonzero()[:, 0].tolist()
            n_sets += len(off) > 1
            for k in off if len(off) > 1 else ():
                with_it = logits_without(layer, image, [j for j in off if j != k])
                assert lead(with_it, int(goal[n])) <= 1e-5, (seed, n, k)
    assert n_sets > 150


def test_contributions_of_another_activity_are_refused():
    *_, activity, added, logits = measured()
    pairs, other = len(added), activity_of([[1.0, 0.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=rf"\({pairs}, 2\), but the activity has \(3, 2\)"):
        fr.class_effects(other, added)
    with pytest.raises(ValueError, match=rf"\({pairs}, 39\), but the activity has \({pairs}, 40\)"):
        fr.turned_by(activity, added, logits[1:])


def test_an_image_that_is_read_so_already_needs_nothing():
    layer, images, _ = random_layer()
    logits = layer.logits_from_raw(images)
    turns = fr.turning_features(layer, images, logits.argmax(1))
    clear = logits.amax(1) > logits.sort(1).values[:, -2]  # not all silent, and so equal
    assert clear.sum() > 30
    assert not turns.off[clear].any()
    assert torch.equal(turns.lead > 0, clear)


def test_no_images_need_no_features():
    layer, images, labels = random_layer()
    turns = fr.turning_features(layer, images[:0], labels[:0])
    n_classes = layer.logits_from_raw(images).shape[1]
    assert [tuple(part.shape) for part in turns] == [(0, D_SAE), (0, n_classes), (0,)]


def test_the_images_chosen():
    labels = torch.tensor([0, 0, 1, 1, 0, 2, 1])
    logits = (
        torch.eye(3)[torch.tensor([0, 1, 1, 2, 0, 2, 0])]
        * torch.tensor([9, 1, 5, 3, 5, 2, 2])[:, None]
    )
    errors, others = fr.chosen_tests(logits, labels)
    assert errors.tolist() == [3, 6, 1]  # behind by 3, 2 and 1
    assert others.tolist() == [0, 2, 5, 4]  # the first of each class, then the second


def test_a_limit_on_the_images_chosen(monkeypatch):
    monkeypatch.setattr(fr, "ERRORS_SHOWN", 2)
    monkeypatch.setattr(fr, "OTHERS_SHOWN", 1)
    labels = torch.tensor([0, 1, 1, 0])
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    errors, others = fr.chosen_tests(logits, labels)
    assert (errors.tolist(), others.tolist()) == ([1, 2], [3])


def test_the_pair_most_often_confused():
    labels = torch.tensor([0, 0, 3, 1, 1, 2])
    read_as = torch.tensor([3, 0, 0, 2, 1, 2])
    assert fr.confused_pair(torch.eye(4)[read_as], labels) == [0, 3]
    assert fr.confused_pair(torch.eye(4)[labels], labels) == [0, 1]  # no errors


def test_the_tour_turns_one_class_of_the_pair_into_the_other():
    layer, images, labels = random_layer(1)
    logits = layer.logits_from_raw(images)
    pair = [0, 1]
    tour = fr.find_tour(layer, images, labels, logits, pair)
    assert {int(labels[tour.image]), tour.goal} == set(pair)
    assert logits[tour.image].argmax() == labels[tour.image]
    for subset, row in enumerate(tour.logits):
        gone = [k for bit, k in enumerate(tour.off) if subset >> bit & 1]
        expected = logits_without(layer, images[tour.image], gone)
        assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert tour.logits[-1].argmax() == tour.goal

    best = (math.inf, 0.0)
    for image, label in zip(images, labels.tolist(), strict=True):
        before = layer.logits_from_raw(image[None])[0]
        if label not in pair or before.argmax() != label:
            continue
        off = slow_turning(layer, image, 1 - label, fr.TOUR_FEATURES)
        if off:
            after = lead(logits_without(layer, image, off), 1 - label)
            best = min(best, (len(off), -min(-lead(before, 1 - label), after)))
    assert len(tour.off) == best[0]
    surety = min(-lead(logits[tour.image], tour.goal), lead(tour.logits[-1], tour.goal))
    assert surety == pytest.approx(-best[1], abs=1e-4)


def test_no_tour_where_nothing_fires():
    layer, images, labels = random_layer()
    layer = layer._replace(sae=SAE(0 * layer.sae.W_enc, layer.sae.W_dec))
    look = fr.look_at_tests(layer, images, labels)
    assert look.tour is None
    assert not look.turns.off.any()


def test_a_look_at_the_tests():
    layer, images, labels, *_, logits = measured(1)
    look = fr.look_at_tests(layer, images, labels)
    wrong = int((logits.argmax(1) != labels).sum())
    assert wrong == look.all_errors == look.n_errors > 0
    assert (logits[look.image].argmax(1) != labels[look.image]).tolist() == [
        n < wrong for n in range(len(look.image))
    ]
    assert torch.equal(look.activity.labels, labels[look.image])
    assert look.logits.flatten().tolist() == pytest.approx(
        logits[look.image].flatten().tolist(), abs=1e-5
    )
    for k, n, row in zip(look.activity.feature, look.activity.image, look.added, strict=True):
        image = images[look.image[n]]
        expected = look.logits[n] - logits_without(layer, image, [int(k)])
        assert row.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    for n in range(wrong):
        image, label = images[look.image[n]], int(labels[look.image[n]])
        assert look.turns.off[n].nonzero()[:, 0].tolist() == slow_turning(
            layer, image, label, D_SAE
        )
