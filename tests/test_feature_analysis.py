"""feature_analysis.py against hand-set weights, algebraic identities and slow loops.

The weights of `make_scene` are small integers and its standard deviations powers of two, so float
arithmetic is exact: ties are ties, and nothing may depend, not by one bit, on how the images are
cut into batches.
"""

import functools
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from small_models import activity_of, double_by_default
from torch import Tensor
from torch.testing import assert_close

import feature_analysis as fa

exactly = functools.partial(assert_close, rtol=0, atol=0)

# --------------------------------------------------------------------------------------------------
# Small models
# --------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """The two methods that an analysed model must have, and nothing else."""

    first_layers: Callable[[Tensor], Tensor]
    head: Tensor  # (d_in, C)
    relu: bool

    def preactivations(self, images):
        return self.first_layers(images)

    def logits_from_preactivations(self, z):
        return (z.relu() if self.relu else z) @ self.head


class SAE(NamedTuple):
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor

    def encode(self, z):
        pre = z @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)


class Scene(NamedTuple):
    model: Model
    sae: SAE
    mu: Tensor
    std: Tensor
    images: Tensor
    labels: Tensor

    def given(self, batch_size: int = 16, keep: slice = slice(None)) -> tuple:
        """The first five arguments of most functions; the loader gives the images `keep`."""
        images, labels = self.images[keep].split(batch_size), self.labels[keep].split(batch_size)
        return self.model, list(zip(images, labels, strict=True)), self.sae, self.mu, self.std

    def for_pattern(self) -> tuple:
        """The first four arguments of the input patterns."""
        return self.model, self.sae, self.mu, self.std

    def feature_acts(self) -> Tensor:
        return self.sae.encode((self.model.preactivations(self.images) - self.mu) / self.std)


N, SIDE, D_IN, D_SAE, C, TOPK = 90, 12, 6, 12, 5, 7
ALWAYS, RARE, DEAD = 0, 1, D_SAE - 1  # features that fire on every image, on two or three, on none


def make_scene(kind: str) -> Scene:
    """A 'linear' model, one with a ReLU in the head ('relu'), or a convolutional one with both.

    The convolutional one squares. A third of the images come twice, so activations tie; no image
    has the last label.
    """
    rng = np.random.default_rng(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape)).float()

    images = integers(0, 1, N, 1, SIDE, SIDE)
    images[60:] = images[:30]
    W1, kernel, mix = (
        integers(-1, 1, SIDE**2, D_IN),
        integers(-1, 1, 2, 1, 3, 3),
        integers(-1, 1, 32, D_IN),
    )
    first_layers = {
        "conv": lambda images: F.conv2d(images, kernel, stride=3).square().flatten(1) @ mix,
    }.get(kind, lambda images: images.flatten(1) @ W1)
    model = Model(first_layers, integers(-3, 3, D_IN, C), relu=kind != "linear")
    raw = model.preactivations(images)
    mu, std = raw.mean(0).round(), torch.tensor([1.0, 2.0, 4.0] * 2)

    W_enc, b_enc, threshold = integers(-2, 2, D_IN, D_SAE), torch.zeros(D_SAE), torch.zeros(D_SAE)
    b_enc[ALWAYS], threshold[DEAD] = 1000, torch.inf
    threshold[RARE] = ((raw - mu) / std @ W_enc)[:, RARE].sort().values[-4]
    sae = SAE(W_enc, b_enc, threshold, integers(-2, 2, D_SAE, D_IN))
    return Scene(model, sae, mu, std, images, torch.from_numpy(rng.integers(0, C - 1, N)))


@pytest.fixture(params=["linear", "relu", "conv"])
def scene(request) -> Scene:
    return make_scene(request.param)


def bank_of(feature_acts, labels=None, n_classes: int = 3, **settings) -> fa.FeatureBank:
    """The bank of images whose activations are `feature_acts` (N, d_sae)."""
    feature_acts = torch.as_tensor(feature_acts, dtype=torch.float32)
    n, d_sae = feature_acts.shape
    eye, zero = torch.eye(d_sae), torch.zeros(d_sae)
    model, sae = (
        Model(lambda images: images, torch.zeros(d_sae, n_classes), relu=False),
        SAE(eye, zero, zero, eye),
    )
    loader = [(feature_acts, torch.zeros(n).long() if labels is None else torch.tensor(labels))]
    return fa.collect_feature_bank(model, loader, sae, zero, zero + 1, **settings)


def tensors(result) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(result, Tensor):
        return [result]
    return (
        [tensor for part in result for tensor in tensors(part)] if isinstance(result, tuple) else []
    )


# --------------------------------------------------------------------------------------------------
# The bank
# --------------------------------------------------------------------------------------------------


def test_bank_agrees_with_a_slow_loop(scene):
    bank = fa.collect_feature_bank(*scene.given(), topk=TOPK)
    acts, labels = scene.feature_acts().tolist(), scene.labels.tolist()
    assert bank.n_images == N
    for k in range(D_SAE):
        active = [i for i in range(N) if acts[i][k] > 0]
        strongest = sorted(active, key=lambda i: (-acts[i][k], i))[:TOPK]
        assert bank.top.of(k).index.tolist() == strongest
        assert bank.top.of(k).activation.tolist() == [acts[i][k] for i in strongest]
        assert bank.top.of(k).label.tolist() == [labels[i] for i in strongest]
        assert bank.label_histogram[k].tolist() == [
            sum(labels[i] == c for i in active) for c in range(C)
        ]
        assert bank.n_active[k] == len(active)
        assert bank.feature_density[k].item() == pytest.approx(len(active) / N)
        mean = sum(acts[i][k] for i in active) / max(1, len(active))
        assert bank.mean_activation_when_active[k].item() == pytest.approx(mean)

        sample = bank.sample.of(k)
        drawn = sample.index.tolist()
        assert len(drawn) == len(set(drawn)) == min(len(active), fa.SAMPLE_PER_FEATURE)
        assert set(drawn) <= set(active)
        assert sample.activation.tolist() == [acts[i][k] for i in drawn]
        assert sample.label.tolist() == [labels[i] for i in drawn]


def test_scene_has_the_cases_the_slow_loop_should_meet(scene):
    n_active = fa.collect_feature_bank(*scene.given()).n_active
    assert n_active[ALWAYS] == N > fa.SAMPLE_PER_FEATURE
    assert 0 < n_active[RARE] < TOPK
    assert n_active[DEAD] == 0
    assert (n_active[2:DEAD] > TOPK).all()
    assert scene.labels.max() < C - 1


@pytest.mark.parametrize("batch_size", [1, N])
def test_bank_is_independent_of_batch_size(scene, batch_size, monkeypatch):
    bank = fa.collect_feature_bank(*scene.given(16))
    exactly(fa.collect_feature_bank(*scene.given(batch_size)), bank)
    monkeypatch.setattr(fa, "ENTRIES", 21)  # a batch is taken in pieces, of rows and of features
    monkeypatch.setattr(fa, "ROWS", 7)
    exactly(fa.collect_feature_bank(*scene.given(batch_size)), bank)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_merged_banks_are_the_bank_of_the_whole(scene, order):
    cuts = [slice(0, 40), slice(40, 65), slice(65, N)]
    parts = [
        fa.collect_feature_bank(*scene.given(keep=cut), topk=TOPK, first_index=cut.start)
        for cut in cuts
    ]
    merged = functools.reduce(fa.merge_feature_banks, [parts[i] for i in order])
    exactly(merged, fa.collect_feature_bank(*scene.given(), topk=TOPK))


def test_banks_with_images_in_common_are_not_merged(scene):
    def bank(first: int, last: int, first_index: int) -> fa.FeatureBank:
        return fa.collect_feature_bank(
            *scene.given(keep=slice(first, last)), first_index=first_index
        )

    whole = bank(0, 90, 0)
    with pytest.raises(ValueError, match=r"both banks hold image \d+: collect the second with"):
        fa.merge_feature_banks(whole, whole)
    with pytest.raises(ValueError, match="both banks hold image 44"):
        fa.merge_feature_banks(bank(0, 45, 0), bank(44, 90, 44))
    with pytest.raises(ValueError, match="both banks hold image"):  # others, of the same numbers
        fa.merge_feature_banks(bank(0, 45, 0), bank(45, 90, 0))
    exactly(fa.merge_feature_banks(bank(0, 45, 0), bank(45, 90, 45)), whole)


@pytest.mark.parametrize(
    ("other", "shape"), [({"n_classes": 4}, r"\(1, 4, 2\)"), ({"topk": 1}, r"\(1, 3, 1\)")]
)
def test_banks_that_do_not_fit_are_not_merged(other, shape):
    with pytest.raises(ValueError, match=rf"not fit together: .* \(1, 3, 2\) and {shape}"):
        fa.merge_feature_banks(
            bank_of([[1], [2]], topk=2), bank_of([[1], [2]], **{"topk": 2} | other)
        )


def test_ties_and_only_ties_go_to_the_earlier_image():
    assert bank_of([[2], [5], [5], [1], [5], [0]], topk=2).top.index.tolist() == [[1, 2]]
    assert bank_of([[1], [1 + 2**-23]], topk=1).top.index.tolist() == [
        [1]
    ]  # float32's smallest step


def test_feature_that_never_fires_has_empty_well_formed_results():
    bank = bank_of([[1, 0], [2, 0], [3, 0]], topk=2)
    assert (bank.top.index[1] == -1).all()
    assert len(bank.top.of(1).index) == len(bank.sample.of(1).index) == 0
    assert bank.label_histogram[1].tolist() == [0, 0, 0]
    assert bank.feature_density[1] == bank.mean_activation_when_active[1] == 0
    assert [len(band.index) for band in bank.bands(1)] == [0, 0, 0, 0]


def test_bands_hold_evenly_spread_examples_of_each_quarter_strongest_first():
    strengths = np.random.default_rng(0).permutation(
        np.arange(1, 37)
    )  # 36 active images, nine to a band
    labels = [int(strength) % 3 for strength in strengths]
    bands = bank_of(strengths[:, None], labels).bands(0)
    assert [band.activation.tolist() for band in bands] == [
        [36, 34, 32, 30, 28],
        [27, 25, 23, 21, 19],
        [18, 16, 14, 12, 10],
        [9, 7, 5, 3, 1],
    ]
    for band in bands:
        assert strengths[band.index].tolist() == band.activation.tolist()
        assert [labels[i] for i in band.index] == band.label.tolist()


def test_bands_of_more_images_than_are_remembered_are_near_the_true_quarters():
    n = 2000
    bank = bank_of(1 + torch.arange(n)[:, None])
    for b, band in enumerate(bank.bands(0)):
        share_stronger = 1 - band.activation / n
        assert (share_stronger.diff() > 0).all()
        assert share_stronger.mean().item() == pytest.approx((b + 0.5) / 4, abs=0.1)


def test_bands_of_few_images():
    bank = bank_of([[1], [3], [2]], topk=1)
    assert [band.activation.tolist() for band in bank.bands(0)] == [[3], [2], [1], []]
    assert [band.activation.tolist() for band in bank.bands(0, n_bands=1, per_band=2)] == [[3, 1]]


def test_sample_is_uniform():
    """Feature b fires on block b of the images, the more strongly the later.

    Every eighth of a block is drawn alike.
    """
    blocks, size, bins = 50, 400, 8
    feature_acts = torch.block_diag(*[1 + torch.arange(size)[:, None]] * blocks)
    place = bank_of(feature_acts).sample.index - size * torch.arange(blocks)[:, None]
    drawn = (place * bins // size).flatten().bincount()
    expected = blocks * fa.SAMPLE_PER_FEATURE / bins
    assert drawn.sum() == bins * expected
    assert (drawn - expected).abs().max() < 4 * expected**0.5


def test_size_of_the_bank_does_not_depend_on_the_number_of_images():
    few, many = (bank_of(torch.ones(n, 2)) for n in (70, 700))
    assert [t.shape for t in tensors(few)] == [t.shape for t in tensors(many)]


# --------------------------------------------------------------------------------------------------
# Input patterns
# --------------------------------------------------------------------------------------------------


def test_input_pattern_of_a_linear_layer_in_closed_form():
    W1 = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])  # z_0 = x_0 + 3 x_2, z_1 = 2 x_1 + 4 x_3
    std = torch.tensor([2.0, 4.0])
    W_enc = torch.tensor([[2.0, 0, 2], [0, 4, -4]])
    model = Model(lambda images: images.flatten(1) @ W1, torch.zeros(2, 2), relu=False)
    sae = SAE(W_enc, torch.zeros(3), torch.ones(3), W_enc.T)
    heats = fa.feature_input_patterns(model, sae, torch.ones(2), std, image_shape=(1, 2, 2))
    assert heats.tolist() == [[[1, 0], [3, 0]], [[0, 2], [0, 4]], [[1, -2], [3, -4]]]


def test_input_pattern_agrees_with_finite_differences():
    """Central differences are exact, for the preactivations are quadratic in the pixels."""
    scene = make_scene("conv")
    images, k = scene.images[:5], 3

    def pre(images):
        return (scene.model.preactivations(images) - scene.mu) / scene.std @ scene.sae.W_enc[:, k]

    steps = torch.eye(SIDE**2).reshape(-1, 1, SIDE, SIDE) / 2
    slow = torch.stack([pre(images + step).mean() - pre(images - step).mean() for step in steps])
    slow = slow.reshape(SIDE, SIDE)
    assert slow.abs().max() > 1
    assert_close(fa.feature_input_pattern(*scene.for_pattern(), k, images), slow)


def test_input_patterns_of_all_features_are_those_of_each(scene):
    heats = fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    assert heats.shape == (D_SAE, SIDE, SIDE)
    for k, heat in enumerate(heats):
        assert_close(fa.feature_input_pattern(*scene.for_pattern(), k, scene.images), heat)


NO_GRADIENT = r"no gradient leads from the layer to the pixels.*requires_grad_\(False\) instead"


@pytest.mark.parametrize("weights_ask", [False, True])
@pytest.mark.parametrize("switched_off", ["no_grad", "detach"])
def test_gradients_that_do_not_exist_are_not_zeros(weights_ask, switched_off):
    """Whether or not weights behind the place where they end ask for gradients of their own."""
    scene = make_scene("conv")
    behind = torch.eye(D_IN, requires_grad=weights_ask)

    def frozen(images):
        with torch.set_grad_enabled(switched_off != "no_grad"):
            raw = scene.model.preactivations(images)
        return (raw.detach() if switched_off == "detach" else raw) @ behind

    model, *frame = scene.for_pattern()
    stopped = model._replace(first_layers=frozen)
    with pytest.raises(ValueError, match=NO_GRADIENT):
        fa.feature_input_patterns(stopped, *frame, scene.images)
    with pytest.raises(ValueError, match=NO_GRADIENT):
        fa.feature_input_pattern(stopped, *frame, 3, scene.images)


def test_gradients_that_are_zero_are_zeros():
    """A layer that reads the pixels, but at which they make no difference."""
    model = Model(lambda images: (images.flatten(1)[:, :2] - 9).relu(), torch.zeros(2, 2), False)
    sae = SAE(torch.eye(2), torch.zeros(2), torch.ones(2), torch.eye(2))
    heats = fa.feature_input_patterns(
        model, sae, torch.zeros(2), torch.ones(2), torch.rand(3, 1, 2, 2)
    )
    assert heats.tolist() == torch.zeros(2, 2, 2).tolist()


def test_patterns_in_inference_mode_are_refused_and_its_images_are_not():
    scene = make_scene("conv")
    expected = fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    with torch.inference_mode():
        images = scene.images.clone()
        with pytest.raises(ValueError, match=r"need gradients: leave torch\.inference_mode"):
            fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    exactly(fa.feature_input_patterns(*scene.for_pattern(), images), expected)
    with torch.no_grad():  # which they do not depend on
        exactly(fa.feature_input_patterns(*scene.for_pattern(), scene.images), expected)


def test_patterns_do_not_depend_on_the_default_dtype():
    scene = make_scene("relu")
    expected = fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    with double_by_default():
        heats = fa.feature_input_patterns(*scene.for_pattern(), image_shape=(1, SIDE, SIDE))
    exactly(heats, expected)


def test_input_pattern_of_a_linear_model_needs_no_images():
    scene = make_scene("relu")
    with torch.no_grad():
        blank = fa.feature_input_patterns(*scene.for_pattern(), image_shape=(1, SIDE, SIDE))
    assert_close(blank, fa.feature_input_patterns(*scene.for_pattern(), scene.images))
    W1 = torch.rand(784, 2)
    model = Model(lambda images: images.flatten(1) @ W1, torch.zeros(2, 2), relu=False)
    sae = SAE(torch.eye(2), torch.zeros(2), torch.ones(2), torch.eye(2))
    given = model, sae, torch.zeros(2), torch.ones(2)
    assert_close(fa.feature_input_patterns(*given), W1.T.reshape(2, 28, 28))
    assert_close(fa.feature_input_pattern(*given, 1), W1[:, 1].reshape(28, 28))


@pytest.mark.parametrize(
    ("image_shape", "heat_shape"),
    [((1, 28, 28), (28, 28)), ((3, 5, 4), (3, 5, 4)), ((5, 4), (5, 4)), ((20,), (20,))],
)
def test_input_pattern_has_the_shape_of_an_image(image_shape, heat_shape):
    one = torch.ones(1, 1)
    model = Model(lambda images: images.flatten(1).sum(1, keepdim=True), one, relu=False)
    given = (model, SAE(one, one[0], one[0], one), one[0], one[0])
    exactly(fa.feature_input_pattern(*given, 0, image_shape=image_shape), torch.ones(heat_shape))
    exactly(fa.feature_input_patterns(*given, image_shape=image_shape), torch.ones(1, *heat_shape))


@pytest.mark.parametrize("pattern", [fa.feature_input_pattern, fa.feature_input_patterns])
def test_input_pattern_refuses_what_it_cannot_average_over(pattern):
    conv = make_scene("conv")
    k = (2,) if pattern is fa.feature_input_pattern else ()
    with pytest.raises(ValueError, match="not linear in the pixels: pass images"):
        pattern(*conv.for_pattern(), *k, image_shape=(1, SIDE, SIDE))
    with pytest.raises(ValueError, match="images is empty"):
        pattern(*conv.for_pattern(), *k, images=conv.images[:0])


# --------------------------------------------------------------------------------------------------
# Effects on the logits
# --------------------------------------------------------------------------------------------------


def slow_effect(scene: Scene, chosen: list[int], change: Callable[[int], Tensor]) -> Tensor:
    """Mean change of the logits, (C,), when change(i), (d_in,), is added to image i's z."""
    logits, total = scene.model.logits_from_preactivations, torch.zeros(C)
    for i in chosen:
        z = scene.model.preactivations(scene.images[i : i + 1])[0]
        total += logits(z + change(i)) - logits(z)
    return total / max(1, len(chosen))


def assert_effect(effect: fa.LogitEffect, mean_delta: Tensor) -> None:
    assert_close(effect.mean_delta, mean_delta)
    assert mean_delta[effect.top_class] == mean_delta.max()


@pytest.mark.parametrize("alpha", [1.0, -2.0, 0.5])
def test_adding_a_feature_to_a_linear_head(alpha):
    scene = make_scene("linear")
    effects = fa.feature_logit_effects(*scene.given(), alpha=alpha)
    exactly(effects.mean_delta, alpha * (scene.sae.W_dec * scene.std) @ scene.model.head)


@pytest.mark.parametrize("n_eval", [1, 20, N, 2000])  # batches hold 16 images
def test_adding_a_feature_agrees_with_a_slow_loop(scene, n_eval):
    k, alpha = 4, 1.5
    step = alpha * scene.sae.W_dec[k] * scene.std
    slow = slow_effect(scene, range(N)[:n_eval], lambda _: step)
    assert_effect(fa.feature_logit_effect(*scene.given(), k, alpha=alpha, n_eval=n_eval), slow)


@pytest.mark.parametrize("n_eval", [1, 20, 2000])
def test_removing_a_feature_agrees_with_a_slow_loop(scene, n_eval):
    acts = scene.feature_acts()
    for k in range(DEAD):
        active = [i for i in range(N) if acts[i, k] > 0]
        slow = slow_effect(
            scene, active[:n_eval], lambda i, k=k: -acts[i, k] * scene.sae.W_dec[k] * scene.std
        )
        assert_effect(fa.feature_ablation_effect(*scene.given(), k, n_eval=n_eval), slow)


def test_removing_a_feature_from_a_linear_head():
    scene = make_scene("linear")
    mean_activation = fa.collect_feature_bank(*scene.given()).mean_activation_when_active
    expected = -mean_activation[:, None] * (scene.sae.W_dec * scene.std) @ scene.model.head
    assert_close(  # differences of logits up to 20,000: 0 comes out within one rounding of those
        fa.feature_ablation_effects(*scene.given()).mean_delta, expected, rtol=1e-6, atol=2e-3
    )


def test_removing_a_feature_keeps_the_error_of_the_sae():
    """z = 3 is reconstructed as f W_dec = 2 * 2 = 4. Removing f leaves 3 - 4 = -1, the ReLU 0.

    So the logit falls by 3; from the reconstruction instead of z it would fall by 4.
    """
    one, zero = torch.ones(1, 1), torch.zeros(1)
    model = Model(lambda images: images, one, relu=True)
    sae = SAE(one, zero - 1, zero, 2 * one)
    effect = fa.feature_ablation_effect(model, [(3 * one, zero.long())], sae, zero, zero + 1, 0)
    assert effect.mean_delta.tolist() == [-3]


def test_removing_a_feature_that_never_fires(scene):
    effect = fa.feature_ablation_effect(*scene.given(), DEAD)
    assert effect.mean_delta.tolist() == [0] * C
    assert effect.top_class == -1


@pytest.mark.parametrize("head_rows", [fa.HEAD_ROWS, 200, 7])
@pytest.mark.parametrize(
    ("batched", "single"),
    [
        (fa.feature_logit_effects, fa.feature_logit_effect),
        (fa.feature_ablation_effects, fa.feature_ablation_effect),
    ],
)
def test_effects_of_all_features_are_those_of_each(scene, batched, single, head_rows, monkeypatch):
    each = [single(*scene.given(), k, n_eval=50) for k in range(D_SAE)]
    monkeypatch.setattr(fa, "HEAD_ROWS", head_rows)  # how many rows at once must not matter
    effects = batched(*scene.given(), n_eval=50)
    assert_close(effects.mean_delta, torch.stack([effect.mean_delta for effect in each]))
    assert effects.top_class.tolist() == [effect.top_class for effect in each]


@pytest.mark.parametrize("effects", [fa.feature_logit_effects, fa.feature_ablation_effects])
def test_head_is_given_a_bounded_number_of_rows(effects, monkeypatch):
    rows = []

    class Recording(Model):
        def logits_from_preactivations(self, z):
            rows.append(len(z))
            return super().logits_from_preactivations(z)

    scene = make_scene("relu")
    monkeypatch.setattr(fa, "HEAD_ROWS", 200)
    effects(*scene._replace(model=Recording(*scene.model)).given(N))
    assert sum(rows) > 400
    assert max(rows) <= 200


def test_effects_say_on_how_many_images_they_were_taken(scene):
    n_active = fa.collect_feature_bank(*scene.given()).n_active
    exactly(fa.feature_ablation_effects(*scene.given(), n_eval=20).n_images, n_active.clamp(max=20))
    assert fa.feature_logit_effects(*scene.given(), n_eval=20).n_images.tolist() == [20] * D_SAE
    assert fa.feature_logit_effects(*scene.given()).n_images.tolist() == [N] * D_SAE


# --------------------------------------------------------------------------------------------------
# Errors that concern several functions
# --------------------------------------------------------------------------------------------------

OVER_IMAGES = [
    fa.collect_feature_bank,
    fa.feature_logit_effects,
    fa.feature_ablation_effects,
    functools.partial(fa.feature_logit_effect, k=0),
    functools.partial(fa.feature_ablation_effect, k=0),
]
PATTERNS = [fa.feature_input_patterns, functools.partial(fa.feature_input_pattern, k=0)]


@pytest.mark.parametrize("analyse", OVER_IMAGES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"mu": torch.zeros(1)},
            r"mu has shape \(1,\), but the SAE takes d_in = 6",
        ),
        ({"std": torch.ones(6, 1)}, r"std has shape \(6, 1\), but the SAE takes d_in = 6"),
        (
            {"model": Model(lambda x: x.flatten(1), torch.zeros(6, 5), False)},
            r"preactivations have shape \(16, 144\)",
        ),
        (
            {"images": torch.zeros(N, 1, 5, 5)},
            r"the model cannot take images of shape \(16, 1, 5, 5\)",
        ),
        (
            {"images": torch.zeros(0, 1, SIDE, SIDE), "labels": torch.zeros(0).long()},
            "loader is empty",
        ),
    ],
)
def test_what_does_not_fit_is_refused(analyse, wrong, message):
    scene = make_scene("relu")._replace(**wrong)
    model, loader, *rest = scene.given()
    with pytest.raises(ValueError, match=message):
        analyse(model, loader if len(scene.images) else [], *rest)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["mu", "std"])
def test_input_pattern_refuses_a_wrong_standardisation(pattern, name):
    scene = make_scene("relu")._replace(**{name: torch.ones(1)})
    model, sae, mu, std = scene.for_pattern()
    with pytest.raises(ValueError, match=f"{name} has shape"):
        pattern(model, sae, mu, std, images=scene.images)


@pytest.mark.parametrize("analyse", OVER_IMAGES[1:])
def test_effects_need_an_image(analyse):
    with pytest.raises(ValueError, match="n_eval is 0; it must be at least 1"):
        analyse(*make_scene("relu").given(), n_eval=0)


@pytest.mark.parametrize(
    ("topk", "message"), [(0, "topk is 0; it must be at least 1"), (4, "4 is more than the 3")]
)
def test_bank_refuses_a_wrong_topk(topk, message):
    with pytest.raises(ValueError, match=message):
        bank_of(torch.ones(3, 1), topk=topk)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "labels run to 3, but the model has 3 classes"),
        ([0, -1, 2], "labels are torch.int64 from -1: whole numbers from 0 are needed"),
        ([0, 1], r"3 images with labels of shape \(2,\)"),
    ],
)
def test_bank_refuses_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        bank_of(torch.ones(3, 1), labels, topk=1)


# --------------------------------------------------------------------------------------------------
# Neighbours and roughness
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 5, 512])
def test_nearest_features_agree_with_a_slow_loop(rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    W_dec = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    nearest = fa.nearest_features(W_dec)
    for k in range(10):
        cosines = [
            -2 if j == k else F.cosine_similarity(W_dec[k], W_dec[j], dim=0).item()
            for j in range(10)
        ]
        assert nearest.feature[k] == np.argmax(cosines)
        assert nearest.cosine[k].item() == pytest.approx(max(cosines), abs=1e-6)


def test_nearest_features_by_hand():
    nearest = fa.nearest_features(torch.tensor([[3.0, 0], [0, 2], [4, 4], [-1, 0]]))
    assert nearest.feature.tolist() == [2, 2, 0, 1]
    assert_close(nearest.cosine, torch.tensor([0.5**0.5, 0.5**0.5, 0.5**0.5, 0.0]))


def test_a_single_feature_has_no_neighbour():
    nearest = fa.nearest_features(torch.ones(1, 4))
    assert nearest.feature.tolist() == [-1]
    assert nearest.cosine.tolist() == [0]


def test_roughness():
    chessboard = 1.0 - 2 * (torch.arange(8)[:, None] + torch.arange(8)).remainder(2)
    stripes = chessboard[:1].expand(
        8, 8
    )  # the neighbours to the side differ, those above and below do not
    pictures = torch.stack([torch.full((8, 8), 0.3), torch.zeros(8, 8), 5 * chessboard, stripes])
    assert_close(fa.pattern_roughness(pictures), torch.tensor([0.0, 0.0, 2.0, 1.0]))
    noise = torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0))
    assert fa.pattern_roughness(noise).item() == pytest.approx(1, abs=0.05)


def test_firing_together_written_out():
    # The first two fire on the same images, the third on the others, the fourth on half of each.
    activity = activity_of(
        [[1.0, 2.0, 0.0, 1.0], [1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0], [0.0, 0.0, 3.0, 0.0]]
    )
    partner, correlation = fa.firing_together(activity, 3)
    assert partner[0].tolist() == [1, 3, 2]
    assert correlation[0].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)
    assert partner[1].tolist() == [0, 3, 2]
    assert partner[2, 0] == 3
    assert correlation[3].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("d_sae", [24, 300])  # fewer and more features than are counted at once
def test_firing_together_is_the_correlation_of_numpy(d_sae):
    acts = torch.randn(200, d_sae, generator=torch.Generator().manual_seed(0)).relu()
    acts[:, -1] = 0
    partner, correlation = fa.firing_together(activity_of(acts.tolist()), 3)
    assert partner.shape == correlation.shape == (d_sae, 3)

    expected = np.corrcoef((acts[:, :-1] > 0).T.numpy())
    np.fill_diagonal(expected, -2)
    best = -np.sort(-expected, axis=1)[:, :3]
    assert correlation[:-1].numpy() == pytest.approx(best, abs=1e-4)
    named = np.take_along_axis(expected, partner[:-1].numpy(), axis=1)
    assert named == pytest.approx(best, abs=1e-4)
    assert (correlation[-1] == 0).all()  # silent


def test_neighbours_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    acts = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)).relu()
    acts[:50] = 0  # images that fire nothing
    activity, W_dec = activity_of(acts.tolist()), torch.randn(24, 6)
    unit, own = torch.nn.functional.normalize(W_dec, dim=1), torch.tensor([20, 3, 4, 5, 6, 7])
    together, alike = fa.firing_together(activity, 3), fa.most_alike_rows(unit, own, 4)
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, -2)
    assert alike[0].tolist() == np.argsort(-cosine[own], axis=1)[:, :4].tolist()
    monkeypatch.setattr(fa, "ROWS", 5)
    monkeypatch.setattr(fa, "COUNTED", 30)
    for some, whole in zip(fa.firing_together(activity, 3), together, strict=True):
        exactly(some, whole)
    assert fa.most_alike_rows(unit, own, 4)[0].tolist() == alike[0].tolist()
    assert_close(fa.most_alike_rows(unit, own, 4)[1], alike[1])


def test_images_in_common_are_counted():
    acts = torch.randn(90, 11, generator=torch.Generator().manual_seed(0)).relu()
    activity, fires = activity_of(acts.tolist()), (acts > 0).int()
    common = fa._images_in_common(activity, fa._ByImage.of(activity), 4, 9)
    exactly(common, (fires.T @ fires)[4:9])


def test_a_single_feature_has_no_neighbours():
    partner, correlation = fa.firing_together(activity_of([[1.0], [0.0]]), 3)
    assert partner.shape == correlation.shape == (1, 0)


def test_removals_are_those_of_a_slow_loop(scene):
    layer = fa.ExplainedLayer(*scene.for_pattern())
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    removed = fa.removal_effects(layer, scene.images, activity)
    acts, logits_of = scene.feature_acts(), scene.model.logits_from_preactivations
    sizes = []
    for k in range(D_SAE):
        active = [i for i in range(N) if acts[i, k] > 0]
        step = scene.sae.W_dec[k] * scene.std
        mean = slow_effect(scene, active, lambda i, k=k, step=step: -acts[i, k] * step)
        assert_close(removed.mean_delta[k].float(), mean, atol=1e-4, rtol=1e-4)
        size, changed = 0.0, 0
        for i in active:
            z = scene.model.preactivations(scene.images[i : i + 1])[0]
            before, after = logits_of(z), logits_of(z - acts[i, k] * step)
            moved = (after - before).numpy().astype(float)
            size += np.sqrt(np.sum((moved - moved.mean()) ** 2))
            changed += int(before.argmax() != after.argmax())
        sizes.append(size)
        assert removed.n_changed[k] == changed
        assert removed.changes[k] == pytest.approx(changed / max(1, len(active)))
    assert removed.influence.tolist() == pytest.approx(np.divide(sizes, sum(sizes)), rel=1e-4)
    assert float(removed.influence.sum()) == pytest.approx(1)
    small = removed._replace(size=1e-9 * removed.size)  # logits of another scale
    assert small.influence.tolist() == pytest.approx(removed.influence.tolist())


def test_nothing_has_influence_where_nothing_fires():
    scene = make_scene("relu")
    silent = scene.sae._replace(threshold=torch.full((D_SAE,), 1e6))
    layer = fa.ExplainedLayer(scene.model, silent, scene.mu, scene.std)
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    removed = fa.removal_effects(layer, scene.images, activity)
    assert removed.influence.tolist() == removed.changes.tolist() == [0.0] * D_SAE


# --------------------------------------------------------------------------------------------------
# Analysis and record
# --------------------------------------------------------------------------------------------------


def analysis_of(scene: Scene) -> fa.Analysis:
    args = scene.given()
    layer = fa.ExplainedLayer(args[0], *args[2:])
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    return fa.Analysis(
        bank=fa.collect_feature_bank(*args, topk=TOPK),
        heats=fa.feature_input_patterns(*scene.for_pattern(), scene.images),
        logit=fa.feature_logit_effects(*args),
        ablation=fa.feature_ablation_effects(*args, n_eval=20),
        nearest=fa.nearest_features(scene.sae.W_dec),
        inked=np.eye(SIDE) == 0,
        activity=activity,
        removed=fa.removal_effects(layer, scene.images, activity),
    )


def test_record_of_a_feature_is_what_plain_computations_say(scene):
    acts, labels = scene.feature_acts(), scene.labels
    analysis = analysis_of(scene)
    for k in (ALWAYS, RARE, 5):
        record = fa.feature_record(k, analysis)
        active = [i for i in range(N) if acts[i, k] > 0]
        strongest = sorted(active, key=lambda i, k=k: (-acts[i, k].item(), i))[:TOPK]
        counts = [sum(int(labels[i]) == c for i in active) for c in range(C)]
        assert record["feature"] == k
        assert record["n_active"] == len(active)
        assert record["mean_active"] == pytest.approx(len(active) / N)
        mean = float(acts[active, k].mean())
        assert record["mean_activation_when_active"] == pytest.approx(mean)
        assert record["label_histogram"] == counts
        assert counts[record["label_mode_when_active"]] == max(counts)
        assert record["top_examples"] == strongest
        assert record["top_scores"] == acts[strongest, k].tolist()
        assert record["top_labels"] == labels[strongest].tolist()

        step = scene.sae.W_dec[k] * scene.std
        added = slow_effect(scene, range(N), lambda _, step=step: step)
        removed = slow_effect(scene, active[:20], lambda i, k=k, step=step: -acts[i, k] * step)
        assert record["logit_delta_vector"] == pytest.approx(added.tolist(), abs=1e-4)
        assert added[record["logit_boost_class"]] == added.max()
        assert record["ablation_delta_vector"] == pytest.approx(removed.tolist(), abs=1e-3)
        assert record["ablation_images"] == min(20, len(active))

        cosines = F.cosine_similarity(scene.sae.W_dec, scene.sae.W_dec[k : k + 1])
        cosines[k] = -2
        assert record["nearest_cosine"] == pytest.approx(float(cosines.max()), abs=1e-6)
        assert cosines[record["nearest_feature"]] == pytest.approx(float(cosines.max()), abs=1e-6)

        heat = analysis.heats[k].double().numpy()
        steps = [np.mean(np.diff(heat, axis=axis) ** 2) for axis in (0, 1)]
        rough = sum(steps) / 4 / np.mean(heat**2)
        assert record["pattern_roughness"] == pytest.approx(rough, rel=1e-4)
        assert record["influence"] == pytest.approx(float(analysis.removed.influence[k]))
        assert record["predictions_changed"] == pytest.approx(float(analysis.removed.changes[k]))


def test_record_is_plain_values_also_of_a_feature_that_never_fires():
    record = fa.feature_record(DEAD, analysis_of(make_scene("relu")))
    assert json.loads(json.dumps(record)) == record
    assert record["label_mode_when_active"] is None
    assert record["n_active"] == record["mean_active"] == record["ablation_images"] == 0
    assert record["top_examples"] == record["top_scores"] == record["top_labels"] == []
    assert record["ablation_delta_vector"] == [0.0] * C


@pytest.mark.parametrize("k", [-1, D_SAE])
def test_record_of_no_feature_is_refused(k):
    with pytest.raises(IndexError, match=f"feature {k} does not exist"):
        fa.feature_record(k, analysis_of(make_scene("linear")))


# --------------------------------------------------------------------------------------------------
# The layer, its activity, and features that return
# --------------------------------------------------------------------------------------------------


def layer_of(scene: Scene) -> fa.ExplainedLayer:
    return fa.ExplainedLayer(*scene.for_pattern())


def test_layer_chains_model_standardisation_and_sae(scene):
    layer, images = layer_of(scene), scene.images
    raw = scene.model.preactivations(images)
    assert layer.d_sae == D_SAE
    exactly(layer.raw(images), raw)
    exactly(layer.standardised(images), (raw - scene.mu) / scene.std)
    exactly(layer.feature_acts(images), scene.feature_acts())
    exactly(layer.logits_from_raw(raw), scene.model.logits_from_preactivations(raw))
    assert fa.ExplainedLayer.checked(*scene.for_pattern()) == layer


def test_layer_says_what_does_not_fit():
    scene = make_scene("relu")
    with pytest.raises(ValueError, match=r"mu has shape \(2,\), but the SAE takes d_in = 6"):
        fa.ExplainedLayer.checked(scene.model, scene.sae, torch.zeros(2), scene.std)
    with pytest.raises(ValueError, match=r"the model cannot take images of shape \(3, 1, 5, 5\)"):
        layer_of(scene).raw(torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match=r"preactivations have shape \(90, 6\), but mu has shape"):
        layer_of(scene._replace(mu=torch.zeros(5))).raw(scene.images)


def test_batches_hold_every_image_once_in_order():
    images, labels = torch.arange(1100.0)[:, None], torch.arange(1100)
    batches = fa.batches_of(images, labels)
    assert [len(some) for some, _ in batches] == [fa.ROWS, fa.ROWS, 1100 - 2 * fa.ROWS]
    exactly(torch.cat([some for some, _ in batches]), images)
    exactly(torch.cat([some for _, some in batches]), labels)


@pytest.mark.parametrize("rows", [fa.ROWS, 16, 1])
def test_activity_is_what_encode_says(scene, rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    activity = fa.collect_activity(layer_of(scene), scene.images, scene.labels)
    acts = scene.feature_acts()
    dense = torch.zeros_like(acts)
    for k in range(D_SAE):
        image, activation = activity.of(k)
        dense[image, k] = activation
        assert image.tolist() == sorted(image.tolist())
        assert (activity.is_active(k) == (acts[:, k] > 0).numpy()).all()
    exactly(dense, acts)
    assert activity.n_active.tolist() == (acts > 0).sum(0).tolist()
    exactly(activity.labels, scene.labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (0, torch.zeros(0).long(), "there are no images"),
        (5, torch.zeros(4).long(), r"5 images with labels of shape \(4,\)"),
        (2, torch.zeros(2), "labels are torch.float32 from 0: whole numbers from 0 are needed"),
        (2, torch.tensor([0, -1]), "labels are torch.int64 from -1"),
    ],
)
def test_activity_needs_images_and_labels(images, labels, message):
    scene = make_scene("relu")
    with pytest.raises(ValueError, match=message):
        fa.collect_activity(layer_of(scene), scene.images[:images], labels)


class Signed(SAE):
    def encode(self, z):
        return z @ self.W_enc


def test_negative_activations_are_refused():
    """Such an SAE rebuilds with them, but no image would be said to fire the feature."""
    scene = make_scene("relu")
    signed = scene._replace(sae=Signed(*scene.sae))
    acts = signed.feature_acts()
    least, k = acts.min(0).values.min(0)
    words = f"feature {k} has an activation of {least:.3g}, below 0: the SAE must give 0 or more"
    for call in (
        lambda: fa.collect_activity(layer_of(signed), scene.images, scene.labels),
        lambda: fa.collect_feature_bank(*signed.given(batch_size=N)),
        lambda: fa.feature_ablation_effects(*signed.given(batch_size=N)),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_an_activity_of_others_is_refused():
    scene = make_scene("relu")
    layer = layer_of(scene)
    activity = fa.collect_activity(layer, scene.images, scene.labels)
    W_enc, b_enc, threshold, W_dec = scene.sae
    fewer = SAE(W_enc[:, 1:], b_enc[1:], threshold[1:], W_dec[1:])
    for function in (fa.removal_effects, fa.contributions):
        with pytest.raises(ValueError, match="the activity is of 90 images, but 60 were given"):
            function(layer, scene.images[:60], activity)
        with pytest.raises(ValueError, match="the activity is of 90 images, but 180 were given"):
            function(layer, scene.images.repeat(2, 1, 1, 1), activity)
        with pytest.raises(ValueError, match="is of 12 features, but the SAE has 11"):
            function(layer._replace(sae=fewer), scene.images, activity)
    fa.check_activity(activity, layer, scene.images, scene.labels)
    with pytest.raises(ValueError, match="the labels are not those of the activity"):
        fa.check_activity(activity, layer, scene.images, scene.labels.flip(0))


@pytest.mark.parametrize("in_head", [False, True])
def test_a_dropout_that_no_module_tells_of_is_found(in_head):
    """A function, not a module; on a network, or on an object that only holds its weights."""
    scene = make_scene("relu")

    class Dropping(NamedTuple):
        plain: Model
        training: bool

        def preactivations(self, images):
            return self.dropped(self.plain.preactivations(images), not in_head)

        def logits_from_preactivations(self, z):
            return self.dropped(self.plain.logits_from_preactivations(z), in_head)

        def dropped(self, x, here):
            return F.dropout(x, 0.5, self.training and here)

    _, loader, *frame = scene.given()
    expected = fa.collect_feature_bank(scene.model, loader, *frame)
    quiet, training = Dropping(scene.model, False), Dropping(scene.model, True)
    exactly(fa.collect_feature_bank(quiet, loader, *frame), expected)
    layer = layer_of(scene)._replace(model=training)
    calls = [
        lambda: fa.collect_feature_bank(training, loader, *frame),
        lambda: fa.feature_logit_effects(training, loader, *frame),
        lambda: fa.feature_ablation_effects(training, loader, *frame),
        lambda: fa.collect_activity(layer, scene.images, scene.labels),
    ]
    if not in_head:
        calls.append(lambda: fa.feature_input_patterns(training, *frame, scene.images))
    for call in calls:
        with pytest.raises(ValueError, match=r"the same images again.*left to chance; call eval"):
            call()


def test_a_loader_that_shuffles_after_its_first_batch_is_refused():
    scene = make_scene("relu")
    model, loader, *frame = scene.given()

    class Shuffling:
        passes = 0

        def __iter__(self):
            self.passes += 1
            first, *rest = loader
            return iter([first, *rest[self.passes % 2 :], *rest[: self.passes % 2]])

    with pytest.raises(ValueError, match="other images in each pass: it must not shuffle"):
        fa.collect_feature_bank(model, Shuffling(), *frame)


def test_a_loader_may_have_one_iterator_that_begins_again():
    """As a DataLoader with persistent workers."""
    scene = make_scene("relu")
    model, loader, *frame = scene.given()

    class Again:
        def __iter__(self):
            self.left = iter(loader)
            return iter(lambda: next(self.left, None), None)

    expected = fa.collect_feature_bank(model, loader, *frame)
    exactly(fa.collect_feature_bank(model, Again(), *frame), expected)


@pytest.mark.parametrize(("rows", "matched"), [(fa.ROWS, fa.MATCHED), (5, 2)])
def test_the_same_sae_in_another_order_returns(scene, rows, matched, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    monkeypatch.setattr(fa, "MATCHED", matched)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    W_enc, b_enc, threshold, W_dec = scene.sae
    mixed = SAE(W_enc[:, order], b_enc[order], threshold[order], W_dec[order])
    matches = fa.match_features(layer_of(scene), scene.images, mixed)
    alive = torch.arange(D_SAE) != DEAD
    assert matches.feature[alive].tolist() == torch.argsort(order)[alive].tolist()
    assert_close(matches.cosine[alive], torch.ones(D_SAE - 1))
    assert_close(matches.correlation[alive], torch.ones(D_SAE - 1), rtol=0, atol=1e-5)
    assert matches.returned.tolist() == alive.tolist()  # one that never fires cannot return


def returned(scene: Scene, other: SAE) -> fa.Return:
    """How much of the scene's SAE returns in another one."""
    acts = scene.feature_acts()
    n_active = (acts > 0).sum(0)
    mean = acts.sum(0) / n_active.clamp(min=1)
    matches = fa.match_features(layer_of(scene), scene.images, other)
    return fa.how_much_returns(matches, n_active / N, mean)


def test_all_of_an_identical_permuted_or_scaled_sae_returns(scene):
    W_enc, b_enc, threshold, W_dec = scene.sae
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    permuted = SAE(W_enc[:, order], b_enc[order], threshold[order], W_dec[order])
    scaled = SAE(8 * W_enc, 8 * b_enc, 8 * threshold, W_dec / 8)
    for other in (scene.sae, permuted, scaled):
        assert returned(scene, other) == pytest.approx((1, 1, 1), abs=1e-5)


def test_nothing_of_an_unrelated_or_a_silent_sae_returns():
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(300, 64, generator=rng)
    model = Model(lambda x: x, torch.eye(64), relu=False)
    rows = torch.randn(2, 20, 64, generator=rng)
    one, other = (SAE(w.T, torch.zeros(20), torch.full((20,), 4.0), w) for w in rows)
    silent = one._replace(threshold=torch.full((20,), torch.inf))
    layer = fa.ExplainedLayer(model, one, torch.zeros(64), torch.ones(64))
    fires = (one.encode(images) > 0).float().mean(0)
    assert fires.min() > 0
    for another in (other, silent):
        matches = fa.match_features(layer, images, another)
        found = fa.how_much_returns(matches, fires, torch.ones(20))
        assert found[:2] == (0, 0)
        assert found.similarity < 0.3


def test_features_that_return_count_by_what_they_do():
    """Three features that fire: one returns, one is split into halves, one turns to the right."""
    matches = fa.Matches(
        feature=torch.tensor([0, 1, 2, 3]),
        cosine=torch.tensor([0.9, 1.0, 0.0, 1.0]),
        correlation=torch.tensor([0.8, 0.6, 0.9, 1.0]),
    )
    density = torch.tensor([0.5, 0.25, 0.25, 0.0])
    found = fa.how_much_returns(matches, density, torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert found.features == pytest.approx(1 / 3)
    assert found.energy == pytest.approx(0.5 / (0.5 + 1.0 + 4.0))
    assert found.similarity == pytest.approx(0.5 * 0.8 + 0.25 * 0.6 + 0.25 * 0.0)
    assert fa.how_much_returns(matches, torch.zeros(4), torch.zeros(4)) == (0, 0, 0)


def test_a_feature_that_was_split_does_not_return():
    """One direction, two features: one half of the images each."""
    side = torch.tensor([1.0, -1.0]).repeat(20)
    images = torch.stack([torch.linspace(1, 2, 40), side], 1)
    whole = SAE(torch.eye(2)[:, :1], torch.zeros(1), torch.zeros(1), torch.eye(2)[:1])
    turned = torch.tensor([[1.0, 1.0], [10.0, -10.0]])  # pre is above 10 on one side each
    halves = SAE(turned, torch.zeros(2), torch.full((2,), 5.0), torch.eye(2)[[0, 0]])
    model = Model(lambda x: x, torch.eye(2), relu=False)
    layer = fa.ExplainedLayer(model, whole, torch.zeros(2), torch.ones(2))
    matches = fa.match_features(layer, images, halves)
    assert matches.cosine.item() == 1
    assert matches.correlation.item() < 0.5
    assert not matches.returned.any()


@pytest.mark.parametrize("rows", [fa.ROWS, 5])
def test_matches_agree_with_a_slow_loop(scene, rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    rng = torch.Generator().manual_seed(1)
    d_other = 7
    other = SAE(
        scene.sae.W_enc[:, :d_other] + torch.randn(D_IN, d_other, generator=rng),
        torch.zeros(d_other),
        torch.zeros(d_other),
        torch.randn(d_other, D_IN, generator=rng),
    )
    layer = layer_of(scene)
    found = fa.match_features(layer, scene.images, other)
    acts = scene.feature_acts().double().numpy()
    theirs = other.encode(layer.standardised(scene.images)).double().numpy()
    for k in range(D_SAE):
        alike = []
        for j in range(d_other):
            cosine = F.cosine_similarity(scene.sae.W_dec[k], other.W_dec[j], dim=0).item()
            varies = acts[:, k].std() > 0 and theirs[:, j].std() > 0
            correlation = np.corrcoef(acts[:, k], theirs[:, j])[0, 1] if varies else 0.0
            alike.append((min(cosine, correlation), cosine, correlation))
        smaller, cosine, correlation = alike[found.feature[k]]
        assert smaller == pytest.approx(max(alike)[0], abs=1e-5)
        assert float(found.cosine[k]) == pytest.approx(cosine, abs=1e-5)
        assert float(found.correlation[k]) == pytest.approx(correlation, abs=1e-5)


def test_an_sae_of_the_opposite_directions_does_not_return():
    scene = make_scene("relu")
    opposite = scene.sae._replace(W_enc=-scene.sae.W_enc, b_enc=-scene.sae.b_enc)
    assert not fa.match_features(layer_of(scene), scene.images, opposite).returned.any()


def test_returning_takes_both_similarities():
    one, half = 1.0, 0.5
    matches = fa.Matches(
        torch.arange(4), torch.tensor([one, one, half, 0.7]), torch.tensor([one, half, one, 0.7])
    )
    assert matches.returned.tolist() == [True, False, False, True]


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def read(path) -> np.ndarray:
    """The colours of a picture, (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(figure: Figure) -> np.ndarray:
    """The colours that a Figure shows, (height, width, 3)."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[:, :, :3]


def test_write_whole_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        fa.write_whole(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["bytes", "pixels", "figure"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind):
    write = {
        "bytes": lambda: fa.write_whole(path, b"new"),
        "pixels": lambda: fa.save_pixels(np.eye(5, dtype=np.uint8), path),
        "figure": lambda: fa.save_figure(fa.new_figure(9, 9), path),
    }[kind]
    path = tmp_path / "file"
    fa.write_whole(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saved_pictures_hold_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "picture.png"
    grey = rng.integers(0, 256, (30, 41), dtype=np.uint8)
    fa.save_pixels(grey, path)
    assert np.array_equal(read(path), np.stack([grey] * 3, 2))

    colour = rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)
    fa.save_pixels(colour, path)
    assert Image.open(path).mode == "RGB"
    assert np.array_equal(read(path), colour)

    palette, numbers = colour[0, :7], grey % 7
    fa.save_pixels(numbers, path, palette)
    assert Image.open(path).mode == "P"
    assert np.array_equal(read(path), palette[numbers])


@pytest.mark.parametrize(
    "pixels", [np.zeros((3, 4)), np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)]
)
def test_what_is_no_picture_is_not_saved(pixels, tmp_path):
    with pytest.raises(ValueError, match=r"a picture has shape \(3.*; expected uint8"):
        fa.save_pixels(pixels, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_saved_figure_is_what_it_shows(tmp_path):
    figure, _ = plt.subplots()
    fa.save_figure(figure, tmp_path / "figure.png")
    assert np.array_equal(read(tmp_path / "figure.png"), drawn(figure))
    plt.close(figure)


def test_importing_does_without_matplotlib():
    script = "import sys, feature_analysis; sys.exit('matplotlib' in sys.modules)"
    root = Path(fa.__file__).parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


# --------------------------------------------------------------------------------------------------
# Galleries
# --------------------------------------------------------------------------------------------------

N_SHOWN = 40
TILE_ZOOM = round(fa.TILE / SIDE)


@pytest.fixture(scope="module")
def shown() -> tuple[fa.FeatureBank, np.ndarray]:
    """The bank of 40 images, (40, SIDE, SIDE); feature 0 fires on 36 of them, feature 1 never."""
    rng = np.random.default_rng(1)
    strengths = rng.permutation(np.concatenate([np.zeros(4), np.arange(1, 37)]))
    bank = bank_of(np.stack([strengths, 0 * strengths], 1), rng.integers(0, 3, N_SHOWN).tolist())
    return bank, rng.integers(0, 2, (N_SHOWN, SIDE, SIDE)).astype(np.float32)


def tile(pixels: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """One tile of a gallery and its caption; a header stands above rows 0, 2 and 3 of four."""
    row_height = (len(pixels) - fa.TITLE - fa.MARGIN - 3 * fa.HEADER) // 4
    top = fa.TITLE + (1, 1, 2, 3)[row] * fa.HEADER + row * row_height
    side = TILE_ZOOM * SIDE
    left = fa.MARGIN + column * (side + 6)
    inner = pixels[top + 1 : top + 1 + side, left + 1 : left + 1 + side]
    return inner, pixels[top + side + 2 : top + row_height, left : left + side + 2]


def test_gallery_shows_every_example_at_its_place(shown):
    bank, images = shown
    pixels = drawn(fa.show_feature_gallery(0, bank, images))
    top, bands = bank.top.of(0).index, [band.index for band in bank.bands(0)]
    expected = [top[:10], top[10:], torch.cat(bands[:2]), torch.cat(bands[2:])]
    assert [len(row) for row in expected] == [10, 10, 10, 10]
    for row, indices in enumerate(expected):
        for column, index in enumerate(indices):
            ink = np.kron(images[index], np.ones((TILE_ZOOM, TILE_ZOOM)))
            assert np.array_equal(tile(pixels, row, column)[0], np.stack([255 - 255 * ink] * 3, 2))


def test_gallery_is_the_saved_picture_and_takes_images_of_either_shape(shown, tmp_path):
    bank, images = shown
    figure = fa.show_feature_gallery(0, bank, images, tmp_path / "gallery.png")
    assert isinstance(figure, Figure)
    assert np.array_equal(read(tmp_path / "gallery.png"), drawn(figure))
    again = fa.show_feature_gallery(0, bank, torch.from_numpy(images)[:, None])
    assert np.array_equal(drawn(again), drawn(figure))


@pytest.mark.parametrize("column", ["label", "activation"])
def test_captions_tell_label_and_activation(shown, column):
    bank, images = shown
    values = getattr(bank.top, column).clone()
    values[0, 0] += 1
    changed = bank._replace(top=bank.top._replace(**{column: values}))
    before, after = (drawn(fa.show_feature_gallery(0, b, images)) for b in (bank, changed))
    caption = tile(before, 0, 0)[1]
    assert caption.min() < 100  # something is written
    assert not np.array_equal(caption, tile(after, 0, 0)[1])
    tile(before, 0, 0)[1][:] = tile(after, 0, 0)[1]
    assert np.array_equal(before, after)  # nothing else differs


def test_captions_have_three_digits():
    values = [0.051, 1.834, 9.994, 9.996, 12.64, 99.94, 99.96, 128.4, 1234]
    written = ["0.05", "1.83", "9.99", "10.0", "12.6", "99.9", "100", "128", "1234"]
    assert [fa._three_digits(value) for value in values] == written


def test_gallery_of_a_feature_that_never_fires_has_no_tiles(shown):
    bank, images = shown
    fires, never = (drawn(fa.show_feature_gallery(k, bank, images)) for k in (0, 1))
    assert never.shape == fires.shape
    assert all(
        (part == 255).all()
        for row in range(4)
        for column in range(10)
        for part in tile(never, row, column)
    )
    assert (never[: fa.TITLE] < 100).any()  # the title
    assert not np.array_equal(never[: fa.TITLE], fires[: fa.TITLE])


@pytest.mark.parametrize("shape", [(N_SHOWN, 3, SIDE, SIDE), (SIDE, SIDE), (N_SHOWN, SIDE * SIDE)])
def test_gallery_refuses_images_that_are_not_grey(shown, shape):
    with pytest.raises(
        ValueError, match=r"images have shape .*; expected \(N, H, W\) or \(N, 1, H, W\)"
    ):
        fa.show_feature_gallery(0, shown[0], np.zeros(shape))


def test_gallery_refuses_too_few_images(shown):
    with pytest.raises(IndexError, match=r"feature 0 fires on image \d+, but only 5 were given"):
        fa.show_feature_gallery(0, shown[0], shown[1][:5])


# --------------------------------------------------------------------------------------------------
# Pictures of patterns
# --------------------------------------------------------------------------------------------------

GREY = [224, 224, 224]


def cells(heat, inked=None) -> np.ndarray:
    """The colours (H, W, 3) that a pattern is painted in."""
    pixels = drawn(fa.visualize_feature_pattern(heat, 0, inked=inked))
    zoom = round(fa.PATTERN / heat.shape[1])
    height, width = (zoom * side for side in heat.shape)
    bottom = len(pixels) - fa.MARGIN
    painted = pixels[bottom - height : bottom, fa.MARGIN : fa.MARGIN + width]
    colours = painted[::zoom, ::zoom]
    assert np.array_equal(painted, colours.repeat(zoom, 0).repeat(zoom, 1))
    return colours


def is_white(colours: np.ndarray) -> np.bool_:
    return (colours > 240).all()


def test_pattern_is_red_above_zero_blue_below_white_at_zero_grey_without_ink():
    heat = np.array([[1.0, -1.0, 0.0, 1.0]] * 4)
    inked = np.array([[True, True, True, False]] * 4)
    for row in cells(heat, inked):
        red, blue, white, grey = row.astype(int)
        assert red[0] > 2 * max(red[1], red[2])
        assert blue[2] > 1.5 * max(blue[0], blue[1])
        assert is_white(white)
        assert grey.tolist() == GREY


def test_scale_of_a_pattern_comes_from_the_ink():
    rng = np.random.default_rng(0)
    heat, inked = rng.uniform(-1, 1, (SIDE, SIDE)), np.ones((SIDE, SIDE), bool)
    inked[:3] = False
    without_ink = np.where(inked, heat, 1e6 * heat)
    plain, outside = (
        drawn(fa.visualize_feature_pattern(h, 0, inked=inked)) for h in (heat, without_ink)
    )
    assert np.array_equal(plain, outside)  # the scale that is written out included


def test_scale_of_a_pattern_between_an_outlier_and_noise():
    signs = np.where(np.random.default_rng(0).random((SIDE, SIDE)) < 0.5, 1.0, -1.0)
    one_larger = signs.copy()
    one_larger[0, 0] *= 4
    assert np.array_equal(cells(one_larger), cells(signs))  # a single pixel does not dim the others
    one_in_noise = 1e-3 * signs
    one_in_noise[0, 0] = 1
    colours = cells(one_in_noise)
    assert colours[0, 0].tolist() == cells(np.ones((1, 1)))[0, 0].tolist()
    assert is_white(colours[1:])  # and is not drowned by them


def test_picture_of_a_pattern_is_the_same_at_any_scale_but_for_the_note():
    heat = np.random.default_rng(0).normal(size=(SIDE, SIDE))
    assert np.array_equal(cells(heat), cells(8 * heat))
    small, large = (drawn(fa.visualize_feature_pattern(h, 0)) for h in (heat, 8 * heat))
    assert not np.array_equal(small, large)


def test_pattern_of_zeros_is_white():
    assert is_white(cells(np.zeros((SIDE, SIDE))))
    assert (cells(np.zeros((2, 2)), np.zeros((2, 2), bool)) == GREY).all()


def test_palette_is_matplotlibs_red_and_blue():
    """Values from -1 to 1 have those of RdBu_r; text is black to white."""
    palette = fa.pattern_palette()
    values = np.linspace(0, 1, 2 * fa.STEPS + 1)
    expected = matplotlib.colormaps["RdBu_r"](values, bytes=True)[:, :3]
    assert palette.shape == (256, 3)
    assert np.array_equal(palette[: len(values)], expected)
    greys = palette[len(values) : fa.NO_INK].astype(int)
    assert greys[0].tolist() == [0, 0, 0]
    assert greys[-1].tolist() == [255, 255, 255]
    assert (np.diff(greys, axis=0) > 0).all()
    assert palette[fa.NO_INK].tolist() == GREY


def test_file_of_a_pattern_has_the_colours_that_its_values_call_for(tmp_path):
    path = tmp_path / "pattern.png"
    heat = np.array([[1.0, 0.5], [-0.5, -1.0], [0.0, 0.1]])
    fa.visualize_feature_pattern(heat, 0, path, np.array([[1, 1], [1, 1], [1, 0]]))
    zoom = fa.PATTERN // 2
    corner = read(path)[-fa.MARGIN - 3 * zoom :, fa.MARGIN :].astype(int)
    (red, pink), (light_blue, blue), (white, grey) = corner[: 3 * zoom : zoom, : 2 * zoom : zoom]
    assert red.tolist() == [103, 0, 31]
    assert pink[0] > pink[2] + 40
    assert light_blue[2] > light_blue[0] + 40
    assert blue.tolist() == [5, 48, 97]
    assert white.tolist() == pytest.approx([247, 247, 247], abs=1)
    assert grey.tolist() == GREY
    scale = corner[: 3 * zoom, 2 * zoom + fa.MARGIN + 3]  # red at the top, blue at the bottom
    assert scale[0].tolist() == red.tolist()
    assert scale[-1].tolist() == blue.tolist()
    assert (read(path)[: fa.TITLE] < 100).any()  # the title is written
    assert (read(path)[0, 0] == 255).all()  # on white


def test_pattern_is_the_saved_picture_for_tensor_and_array(tmp_path):
    heat = torch.linspace(-1, 1, SIDE**2).reshape(SIDE, SIDE)
    figure = fa.visualize_feature_pattern(heat, 3, tmp_path / "pattern.png")
    assert isinstance(figure, Figure)
    assert np.array_equal(read(tmp_path / "pattern.png"), drawn(figure))
    assert np.array_equal(drawn(fa.visualize_feature_pattern(heat.numpy(), 3)), drawn(figure))


def test_pattern_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"the pattern has shape \(1, 4, 4\); expected \(H, W\)"):
        fa.visualize_feature_pattern(torch.zeros(1, 4, 4), 0)
    with pytest.raises(
        ValueError, match=r"inked has shape \(4,\), but patterns have shape \(4, 4\)"
    ):
        fa.visualize_feature_pattern(torch.zeros(4, 4), 0, inked=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the pattern has shape \(4, 5\), expected \(4, 4\)"):
        fa.PatternPainter((4, 4)).paint(np.zeros((4, 5)), 0)


# --------------------------------------------------------------------------------------------------
# Panels and folders of pictures
# --------------------------------------------------------------------------------------------------


def colour_of(name: str) -> list[int]:
    return [round(255 * channel) for channel in matplotlib.colors.to_rgb(name)]


def chart_of(pixels: np.ndarray, number: int) -> np.ndarray:
    """The bars of one of the three charts of a panel, (CHART_HEIGHT, CHART_WIDTH, 3)."""
    pattern_end = fa.HEADER + fa.MARGIN + round(fa.PANEL_PATTERN / SIDE) * SIDE
    top = pattern_end + fa.MARGIN + fa.CHART_PITCH * number + fa.CHART_TITLE
    right = pixels.shape[1] - fa.MARGIN
    return pixels[top : top + fa.CHART_HEIGHT, right - fa.CHART_WIDTH : right].astype(int)


def bars_of(chart: np.ndarray, n: int, colour: str) -> np.ndarray:
    """How many screen pixels of `colour` there are in the middle column of each of n slots."""
    middles = [round((c + 0.5) * fa.CHART_WIDTH / n) for c in range(n)]
    return (chart[:, middles] == colour_of(colour)).all(2).sum(0)


def panel_of(shown, k: int = 0, heat=None, added=(1, 1, 1), removed=(1, 1, 1), **notes):
    """The colours of the panel of feature k, of a pattern of zeros unless another one is given."""
    heat = np.zeros((SIDE, SIDE)) if heat is None else heat
    given = (heat, np.array(added), removed)
    return drawn(fa.show_feature_panel(k, *shown, *given, notes=fa.PanelNotes(**notes)))


def test_panel_holds_every_part(shown, tmp_path):
    bank, images = shown
    heat = np.random.default_rng(0).normal(size=(SIDE, SIDE))
    inked = np.eye(SIDE) == 0
    added, removed = torch.tensor([0.5, -1.0, 2.0]), np.array([-0.25, 0.0, 1.0])
    path = tmp_path / "panel.png"
    notes = fa.PanelNotes(inked=inked)
    figure = fa.show_feature_panel(0, bank, images, heat, added, removed, path, notes)
    pixels = drawn(figure)
    assert isinstance(figure, Figure)
    assert np.array_equal(read(path), pixels)

    gallery = drawn(fa.show_feature_gallery(0, bank, images))
    assert np.array_equal(pixels[: len(gallery), : gallery.shape[1]], gallery)

    zoom, top = round(fa.PANEL_PATTERN / SIDE), fa.HEADER + fa.MARGIN
    left = gallery.shape[1] + fa.NUMBERS
    pattern = pixels[top : top + zoom * SIDE, left : left + zoom * SIDE]
    assert np.array_equal(pattern, cells(heat, inked).repeat(zoom, 0).repeat(zoom, 1))

    def heights(number: int, colour: str) -> np.ndarray:
        return bars_of(chart_of(pixels, number), 3, colour)

    counts = bank.label_histogram[0].numpy()
    unit = heights(0, fa.GREY).max() / counts.max()
    assert unit * counts.max() > 0.8 * fa.CHART_HEIGHT
    assert heights(0, fa.GREY) == pytest.approx(unit * counts, abs=1.5)
    for number, values in ((1, added.numpy()), (2, removed)):
        unit = heights(number, fa.RED).max() / values.max()
        assert unit * np.ptp(values) > 0.8 * fa.CHART_HEIGHT
        assert heights(number, fa.RED) == pytest.approx(unit * values.clip(0), abs=2.5)
        assert heights(number, fa.BLUE) == pytest.approx(unit * (-values).clip(0), abs=2.5)


def test_bars_stand_on_the_side_of_zero_that_their_sign_says(shown):
    chart = chart_of(panel_of(shown, added=[1, -1, 0]), 1)
    up, down = (
        np.flatnonzero((chart == colour_of(colour)).all(2).any(1)) for colour in (fa.RED, fa.BLUE)
    )
    zero = fa.CHART_HEIGHT / 2
    assert up.min() < 0.1 * fa.CHART_HEIGHT
    assert up.max() < zero < down.min()
    assert down.max() > 0.9 * fa.CHART_HEIGHT
    line = chart[round(zero) - 1 : round(zero) + 1, 5 * fa.CHART_WIDTH // 6]
    assert line.min() < 100  # the line of zero, where there is no bar


@pytest.mark.parametrize("n", [1, 2, 10, 37, 100])
def test_charts_have_room_for_any_number_of_classes(n):
    bank = bank_of([[2.0], [1.0]], n_classes=n, topk=1)
    effect = np.linspace(1, 2, n)
    charts = fa._draw_charts(bank.label_histogram[0], effect, -effect)
    for row, colour in ((1, fa.RED), (2, fa.BLUE)):
        top = fa.CHART_PITCH * row + fa.CHART_TITLE
        chart = charts[top : top + fa.CHART_HEIGHT, fa.NUMBERS : fa.NUMBERS + fa.CHART_WIDTH]
        bars = (chart == colour_of(colour)).all(2)
        assert bars.any(0).sum() > 0.5 * fa.CHART_WIDTH
        assert bars[:, -fa.CHART_WIDTH // n :].any(1).sum() > 0.9 * fa.CHART_HEIGHT


def test_panel_says_when_a_feature_never_fires(shown):
    fires, never = (
        panel_of(shown, k, added=np.ones(3) - k, removed=np.ones(3) - k) for k in (0, 1)
    )
    for number, colour in enumerate((fa.GREY, fa.RED, fa.RED)):
        bars = bars_of(chart_of(fires, number), 3, colour)
        assert bars.max() > 0.8 * fa.CHART_HEIGHT
        assert number == 0 or len(set(bars)) == 1  # nothing is written over the middle one
        empty = chart_of(never, number)
        assert bars_of(empty, 3, colour)[::2].tolist() == [0, 0]
        middle = empty[5 : fa.CHART_HEIGHT // 2, fa.CHART_WIDTH // 3 : -fa.CHART_WIDTH // 3]
        assert (middle < 150).any()  # "none"
    assert fa._gallery_title(0, shown[0]) == "Feature 0: fires on 90% of 40 images"
    assert fa._gallery_title(1, shown[0]) == "Feature 1: never fires on these 40 images"


def test_caption_is_written_below_the_gallery_and_may_be_long(shown):
    plain, captioned = (panel_of(shown, caption=caption) for caption in ("", "é ≥ 0.7"))
    below, left = drawn(fa.show_feature_gallery(0, *shown)).shape[:2]
    assert np.array_equal(plain[:below], captioned[:below])
    assert (captioned[below:, :left] < 100).any()
    assert not (plain[below:, :left] < 100).any()
    long = panel_of(shown, caption="many words " * 300)
    assert len(long) > len(plain)
    assert (long[-3 * fa.CAPTION_LINE :, :left] < 100).any()


def test_panel_refuses_a_pattern_of_another_shape(shown):
    with pytest.raises(ValueError, match=r"the pattern has shape \(1, 4, 5\); expected \(H, W\)"):
        panel_of(shown, heat=np.zeros((1, 4, 5)))
    with pytest.raises(ValueError, match=r"inked has shape \(2, 2\)"):
        panel_of(shown, inked=np.ones((2, 2)))


def test_folder_of_panels_equals_the_single_ones(tmp_path):
    scene = make_scene("conv")
    analysis = analysis_of(scene)
    together, single = tmp_path / "together", tmp_path / "single.png"
    together.mkdir()
    captions = {RARE: "A caption of one feature."}
    notes = {k: fa.PanelNotes(caption) for k, caption in captions.items()}
    chosen = (ALWAYS, RARE, DEAD)
    fa.write_feature_panels(together, chosen, analysis, scene.images, notes)
    names = {f"feature_{k}_panel.png" for k in chosen}
    assert {path.name for path in together.iterdir()} == names
    for k in chosen:
        effects = analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k]
        given = (k, analysis.bank, scene.images, analysis.heats[k], *effects)
        fa.show_feature_panel(*given, single, fa.PanelNotes(captions.get(k, ""), analysis.inked))
        assert single.read_bytes() == (together / f"feature_{k}_panel.png").read_bytes()


def places_of(part: np.ndarray, page: np.ndarray) -> list[tuple[int, int]]:
    """Where `part` (h, w, 3) stands in `page`."""
    height, width = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(page, (1, width, 3))[:, :, 0, 0]
    tops, lefts = (windows == part[0]).all((2, 3)).nonzero()
    pairs = zip(tops.tolist(), lefts.tolist(), strict=True)
    return [(t, e) for t, e in pairs if np.array_equal(page[t : t + height, e : e + width], part)]


def test_a_panel_shows_the_counterparts_of_its_feature(tmp_path):
    scene = make_scene("conv")
    analysis = analysis_of(scene)._replace(inked=np.ones((SIDE, SIDE), bool))
    rng = np.random.default_rng(0)
    heats = [rng.normal(size=(SIDE, SIDE)) for _ in range(5)]
    shown = tuple((f"seed {n}: 0.9", heat) for n, heat in enumerate(heats))
    notes = {RARE: fa.PanelNotes(counterparts=shown)}
    fa.write_feature_panels(tmp_path, [RARE], analysis, scene.images, notes)
    page = np.asarray(Image.open(tmp_path / f"feature_{RARE}_panel.png").convert("RGB"))
    found = []
    for heat in heats:
        scale = fa.display_scale(heat, None)
        colours = np.rint(fa.STEPS * ((heat / scale).clip(-1, 1) + 1)).astype(int)
        zoom = round(fa.TILE / SIDE)
        tile = fa.pattern_palette()[colours].repeat(zoom, 0).repeat(zoom, 1)
        found.append(places_of(tile, page))
    assert [len(places) for places in found] == [1, 1, 1, 1, 0]  # there is room for four
    tops = [places[0][0] for places in found[:4]]
    assert tops[0] == tops[1] < tops[2] == tops[3]


def test_a_sketch_outlines_its_places_over_the_mean(tmp_path):
    ink = np.zeros((SIDE, SIDE))
    ink[2:6, 2:6] = 0.5
    there, absent = np.zeros((2, 1, SIDE, SIDE), bool)
    there[0, 2:6, 2:6], absent[0, 7:11, 7:11] = True, True
    path = tmp_path / "sketch.png"
    fa.visualize_sketch(fa.Sketch(ink, there, absent), 3, "Ink here, none there", path)
    page = np.asarray(Image.open(path).convert("RGB")).astype(int)

    zoom = round(fa.PATTERN / SIDE)
    for place, colour in ((there, fa.SKETCH_RED), (absent, fa.SKETCH_BLUE)):
        size = place[0].any(0).sum() * zoom
        outline = np.full((size, size), True)
        outline[fa.EDGE : -fa.EDGE, fa.EDGE : -fa.EDGE] = False
        is_colour = (page == colour).all(2)
        rows, columns = is_colour.nonzero()
        found = is_colour[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert np.array_equal(found, outline)
    inside = 255 * (1 - 0.75)  # the strongest ink, under the tint
    expected = [round(inside + fa.TINT * (c - inside)) for c in fa.SKETCH_RED]
    assert (page == expected).all(2).sum() == (4 * zoom - 2 * fa.EDGE) ** 2


def test_a_sketch_of_another_shape_is_refused():
    places = np.zeros((1, SIDE + 1, SIDE), bool)
    with pytest.raises(ValueError, match="places have shape"):
        fa.visualize_sketch(fa.Sketch(np.zeros((SIDE, SIDE)), places, places[:0]), 0)


def test_a_panel_shows_the_sketch_of_its_feature(tmp_path):
    scene = make_scene("conv")
    analysis = analysis_of(scene)
    place = np.zeros((1, SIDE, SIDE), bool)
    place[0, 3:9, 4:8] = True
    sketch = fa.Sketch(np.zeros((SIDE, SIDE)), place, place[:0])
    fa.write_feature_panels(
        tmp_path, [RARE], analysis, scene.images, {RARE: fa.PanelNotes(sketch=sketch)}
    )
    page = np.asarray(Image.open(tmp_path / f"feature_{RARE}_panel.png").convert("RGB"))
    above_charts = page[: fa.HEADER + fa.MARGIN + fa.PANEL_PATTERN]
    rows, columns = (above_charts == fa.SKETCH_RED).all(2).nonzero()
    tall, wide = rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min()
    assert tall / wide == 6 / 4


def test_folder_of_pictures_equals_the_single_ones(tmp_path):
    scene = make_scene("conv")
    bank = fa.collect_feature_bank(*scene.given())
    heats = fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    inked = ~torch.eye(SIDE, dtype=torch.bool)
    together, one_by_one = tmp_path / "together", tmp_path / "one_by_one"
    together.mkdir()
    one_by_one.mkdir()
    fa.write_feature_pictures(together, range(D_SAE), bank, scene.images, heats, inked)
    names = {
        f"feature_{k}_{what}"
        for k in range(D_SAE)
        for what in ("gallery.png", "pattern.png", "pattern.npy")
    }
    assert {path.name for path in together.iterdir()} == names
    for k in (ALWAYS, RARE, DEAD):
        fa.show_feature_gallery(k, bank, scene.images, one_by_one / f"feature_{k}_gallery.png")
        fa.visualize_feature_pattern(heats[k], k, one_by_one / f"feature_{k}_pattern.png", inked)
    for path in one_by_one.iterdir():
        assert path.read_bytes() == (together / path.name).read_bytes()
    for k in range(D_SAE):
        assert np.array_equal(np.load(together / f"feature_{k}_pattern.npy"), heats[k].numpy())


@pytest.mark.parametrize("n", [1, 100])
def test_failed_write_is_reported_at_once(shown, tmp_path, n):
    features = iter([0] * n)
    with pytest.raises(FileNotFoundError, match="missing"):
        fa.write_feature_pictures(tmp_path / "missing", features, *shown, np.zeros((2, SIDE, SIDE)))
    assert len(list(features)) == n - 1  # the others were not painted any more


# --------------------------------------------------------------------------------------------------
# Every function
# --------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A scene and what was found out about it."""

    scene: Scene
    bank: fa.FeatureBank
    heats: Tensor
    deltas: Tensor
    halves: tuple[fa.FeatureBank, fa.FeatureBank]


OF_A_FEATURE = {
    "bands": lambda h, k, _: h.bank.bands(k),
    "input_pattern": lambda h, k, _: fa.feature_input_pattern(
        *h.scene.for_pattern(), k, h.scene.images
    ),
    "logit_effect": lambda h, k, _: fa.feature_logit_effect(*h.scene.given(), k),
    "ablation_effect": lambda h, k, _: fa.feature_ablation_effect(*h.scene.given(), k),
    "gallery": lambda h, k, folder: fa.show_feature_gallery(
        k, h.bank, h.scene.images, folder / "gallery.png"
    ),
    "panel": lambda h, k, folder: fa.show_feature_panel(
        k, h.bank, h.scene.images, h.heats[0], h.deltas[0], h.deltas[1], folder / "panel.png"
    ),
    "pictures": lambda h, k, folder: fa.write_feature_pictures(
        folder, [k], h.bank, h.scene.images, h.heats
    ),
}
OF_ALL = {
    "bank": lambda h, *_: fa.collect_feature_bank(*h.scene.given()),
    "merge": lambda h, *_: fa.merge_feature_banks(*h.halves),
    "input_patterns": lambda h, *_: fa.feature_input_patterns(
        *h.scene.for_pattern(), h.scene.images
    ),
    "logit_effects": lambda h, *_: fa.feature_logit_effects(*h.scene.given()),
    "ablation_effects": lambda h, *_: fa.feature_ablation_effects(*h.scene.given()),
    "nearest": lambda h, *_: fa.nearest_features(h.scene.sae.W_dec),
    "roughness": lambda h, *_: fa.pattern_roughness(h.heats),
    "pattern": lambda h, k, folder: fa.visualize_feature_pattern(
        h.heats[k], k, folder / "pattern.png"
    ),
}


@pytest.fixture(scope="module")
def held() -> Held:
    """Of the convolutional model, with an SAE whose weights want gradients like a module's."""
    scene = make_scene("conv")
    scene.sae.W_enc.requires_grad_()
    scene.sae.W_dec.requires_grad_()
    heats = fa.feature_input_patterns(*scene.for_pattern(), scene.images)
    return Held(
        scene,
        fa.collect_feature_bank(*scene.given()),
        heats,
        fa.feature_logit_effects(*scene.given())[0],
        tuple(
            fa.collect_feature_bank(*scene.given(keep=slice(first, first + 45)), first_index=first)
            for first in (0, 45)
        ),
    )


@pytest.mark.parametrize("name", OF_A_FEATURE | OF_ALL)
def test_function_leaves_everything_as_it_was(held, tmp_path, name):
    def state():
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            dict(plt.rcParams),
        )

    inputs = tensors(held)
    before, state_before = [tensor.detach().clone() for tensor in inputs], state()
    result = (OF_A_FEATURE | OF_ALL)[name](held, 2, tmp_path)
    exactly([tensor.detach() for tensor in inputs], before)
    assert state() == state_before
    assert plt.get_fignums() == []  # no figure waits to be closed
    assert not any(tensor.requires_grad for tensor in [held.scene.images, *tensors(result)])
    assert held.scene.sae.W_enc.grad is None
    assert held.scene.sae.W_dec.grad is None


@pytest.mark.parametrize("name", OF_A_FEATURE)
@pytest.mark.parametrize("k", [-1, D_SAE])
def test_feature_that_does_not_exist_is_refused(held, tmp_path, name, k):
    with pytest.raises(IndexError, match=str(k)):
        OF_A_FEATURE[name](held, k, tmp_path)


# --------------------------------------------------------------------------------------------------
# What is not quite linear, and what is not quite a label
# --------------------------------------------------------------------------------------------------


class Elementwise:
    """z = w * function(x) on images of three pixels; only one unit need be non-linear."""

    def __init__(self, *functions):
        self.functions = functions

    def preactivations(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1)
        return torch.stack([function(pixels) for function in self.functions], 1)


@pytest.mark.parametrize(
    "odd_one_out",
    [
        lambda x: (x - 0.5).pow(3).sum(1),  # the same gradient at 0 and at 1
        lambda x: 1e-7 * x.square().sum(1),  # a small unit
        lambda x: torch.relu(x[:, 0] - x[:, 1] + 0.1),  # linear on constant images
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_non_linear_unit_is_enough_to_ask_for_images(odd_one_out, place):
    units = [lambda x: x[:, 0], lambda x: x.sum(1) + 1, lambda x: -x[:, 2]]
    sae = SimpleNamespace(W_enc=torch.eye(3))
    plain = torch.zeros(3), torch.ones(3)
    fa.feature_input_pattern(Elementwise(*units), sae, *plain, 0, image_shape=(1, 1, 3))
    units[place] = odd_one_out
    for call in (fa.feature_input_patterns, lambda *a, **kw: fa.feature_input_pattern(*a, 0, **kw)):
        with pytest.raises(ValueError, match="not linear in the pixels: pass images"):
            call(Elementwise(*units), sae, *plain, image_shape=(1, 1, 3))


def test_patterns_name_the_shapes_that_do_not_fit():
    linear = SimpleNamespace(preactivations=lambda x: x.flatten(1) @ torch.ones(4, 2))
    sae = SimpleNamespace(W_enc=torch.eye(3))
    with pytest.raises(ValueError, match=r"cannot take images of shape \(3, 1, 28, 28\)"):
        fa.feature_input_patterns(linear, sae, torch.zeros(3), torch.ones(3))
    with pytest.raises(
        ValueError, match=r"preactivations have shape \(3, 2\), but mu has shape \(3,\)"
    ):
        fa.feature_input_patterns(linear, sae, torch.zeros(3), torch.ones(3), image_shape=(1, 2, 2))


@pytest.mark.parametrize(
    "labels", [torch.zeros(4, 1).long(), torch.zeros(4), torch.zeros(3).long()]
)
def test_labels_are_one_whole_number_per_image(labels):
    model = SimpleNamespace(preactivations=lambda x: x, logits_from_preactivations=lambda z: z)
    sae = SimpleNamespace(W_enc=torch.eye(2), encode=torch.relu)
    with pytest.raises(
        ValueError, match=r"4 images with labels of shape|labels are torch.float32 from 0"
    ):
        fa.collect_feature_bank(
            model, [(torch.ones(4, 2), labels)], sae, torch.zeros(2), torch.ones(2), topk=1
        )


def test_ablation_needs_at_least_one_image():
    model = SimpleNamespace(preactivations=lambda x: x, logits_from_preactivations=lambda z: z)
    sae = SimpleNamespace(W_enc=torch.eye(2), W_dec=torch.eye(2), encode=torch.relu)
    loader = [(torch.ones(0, 2), torch.zeros(0).long())]
    with pytest.raises(ValueError, match="the loader is empty"):
        fa.feature_ablation_effects(model, loader, sae, torch.zeros(2), torch.ones(2))


def test_small_and_misshapen_pictures():
    values = [1e-6, 0.004, 0.125, 1.834, 12.56, 99.96, 274]
    written = ["1e-06", "4e-03", "0.12", "1.83", "12.6", "100", "274"]
    assert [fa._three_digits(value) for value in values] == written
    with pytest.raises(ValueError, match="no neighbouring pixels"):
        fa.pattern_roughness(torch.ones(2, 1, 5))
    with pytest.raises(ValueError, match=r"patterns have shape \(5, 5\)"):
        fa.write_feature_pictures(".", [], None, np.zeros((1, 5, 5)), np.zeros((5, 5)))
    heat = np.eye(4)
    mask = np.eye(4, dtype=np.uint8)
    as_numbers, as_bool = (
        fa.visualize_feature_pattern(heat, 0, inked=m) for m in (mask, mask.astype(bool))
    )
    assert np.array_equal(drawn(as_numbers), drawn(as_bool))
    with pytest.raises(ValueError, match=r"inked has shape \(5, 5\)"):
        fa.visualize_feature_pattern(heat, 0, inked=np.ones((5, 5), bool))


def test_whole_numbers_up_to_the_last_index():
    assert fa.check_whole("n", 2**31 - 1) == 2**31 - 1
    with pytest.raises(ValueError, match="n is more than 2,147,483,647"):
        fa.check_whole("n", 2**31)


def test_what_counts_as_memory_that_ran_out():
    by_torch = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    for error in (by_torch, MemoryError(), torch.OutOfMemoryError()):
        assert fa.is_out_of_memory(error)
    assert not fa.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
