"""feature_analysis.py against hand-set weights, algebraic identities and slow loops."""

import functools
import itertools
import os
import random
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import small_models as sm
import torch
import torch.nn.functional as F
from small_models import SAE, Model, Scene, bank_of, cells, drawn, exactly, make_scene, read
from torch.testing import assert_close

import feature_analysis as fa
from saexplain.analysis import pattern_roughness
from saexplain.figures import new_figure, save_figure

ALWAYS, RARE, DEAD, TOPK = sm.ALWAYS, sm.RARE, sm.DEAD, 7
N, SIDE, D_IN, D_SAE, C = sm.N, sm.SIDE, sm.D_IN, sm.D_SAE, sm.C
OVER_IMAGES = [fa.collect_feature_bank, fa.feature_logit_effects, fa.feature_ablation_effects]


@pytest.fixture(params=["linear", "relu", "conv"])
def scene(request) -> Scene:
    return make_scene(request.param)


@pytest.mark.parametrize("rows", [fa.ROWS, 7])
def test_layer_chains_model_standardization_and_sae(scene, rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    layer, raw = scene.layer, scene.raw
    z = (raw - scene.mu) / scene.std
    assert (layer.d_sae, layer.n_classes, layer.device) == (D_SAE, C, scene.mu.device)
    exactly(layer.activations(scene.images, scene.labels.int()), (scene.images, scene.labels, raw))
    exactly(layer.standardize(raw), z)
    exactly(layer.feature_acts(raw), scene.feature_acts())
    exactly(layer.logits(raw), scene.model.logits_from_preactivations(raw))
    exactly(layer.logits_of_z(z), layer.logits(raw))
    other = scene.sae._replace(threshold=scene.sae.threshold + 1)
    assert layer.with_sae(other).sae is other
    assert layer.sae is scene.sae


@pytest.mark.parametrize("one_feature", [True, False])
@pytest.mark.parametrize("one_alpha", [True, False])
def test_adding_and_without_agree_with_loops_by_hand(scene, one_feature, one_alpha):
    rng = torch.Generator().manual_seed(0)
    k = ALWAYS if one_feature else torch.randint(D_SAE, (N,), generator=rng)
    alpha = -1.5 if one_alpha else torch.randint(-3, 4, (N,), generator=rng).float()
    features, alphas = torch.as_tensor(k).expand(N), torch.as_tensor(alpha).expand(N)
    acts, raw, layer = scene.feature_acts(), scene.raw, scene.layer
    more, less, own = raw.clone(), raw.clone(), torch.zeros(N)
    for row, f in enumerate(features.tolist()):
        own[row] = acts[row, f]
        for i in range(D_IN):
            step = scene.sae.W_dec[f, i] * scene.std[i]
            more[row, i] += alphas[row] * step
            less[row, i] -= own[row] * step
    assert (own > 0).sum() > 10
    exactly(layer.adding(raw, k, alpha), more)
    exactly(layer.without(raw, k), less)
    exactly(layer.without(raw, k, own), less)
    exactly(layer.adding(layer.without(raw, k), k, own), raw)  # they are inverse


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mu": torch.zeros(1)}, "mu must be"),
        ({"mu": torch.zeros(D_IN).double()}, "mu must be"),
        ({"mu": torch.full((D_IN,), torch.nan)}, "mu must be finite"),
        ({"std": torch.ones(D_IN, 1)}, "std must be"),
        ({"std": torch.ones(D_IN).index_fill(0, torch.tensor(4), 0)}, "std.* positive.* unit 4"),
        ({"std": torch.full((D_IN,), torch.inf)}, "std must be finite"),
    ],
)
def test_layer_checks_mu_and_std(wrong, message):
    scene = make_scene("relu")._replace(**wrong)
    calls = [partial(function, *scene.args()) for function in OVER_IMAGES]
    patterns = partial(fa.feature_input_patterns, *scene.no_loader(), scene.images)
    for call in (lambda: scene.layer, patterns, *calls):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("module", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3)])
def test_layer_checks_that_the_model_is_in_evaluation_mode(module):
    scene = make_scene("relu")
    model = SimpleNamespace(**scene.model._asdict(), net=torch.nn.Sequential(module))
    with pytest.raises(ValueError, match="training mode"):
        _ = scene._replace(model=model).layer
    model.net.eval()
    assert scene._replace(model=model).layer.model is model


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 144)), "images must be a tensor"),
        (torch.zeros(3), "images must be a tensor"),
        (torch.zeros(3, 1, 5, 5), r"images of shape \(3, 1, 5, 5\)"),
        (torch.full((3, 1, SIDE, SIDE), torch.nan), "got nan at column 0 of image 0"),
    ],
)
def test_layer_checks_images(images, message):
    with pytest.raises(ValueError, match=message):
        make_scene("relu").layer.raw(images)
    wider = Model(lambda x: x.flatten(1), None)
    with pytest.raises(ValueError, match="mu has shape"):
        make_scene("relu")._replace(model=wider).layer.raw(torch.zeros(1, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match="images is empty"):
        make_scene("relu").layer.activations(torch.zeros(0, 1, SIDE, SIDE), torch.zeros(0))


@pytest.mark.parametrize("in_head", [False, True])
def test_dropout_that_is_no_module_is_found(in_head):
    class Dropping(Model):
        def preactivations(self, images):
            return F.dropout(super().preactivations(images), 0.5, not in_head)

        def logits_from_preactivations(self, z):
            return F.dropout(super().logits_from_preactivations(z), 0.5, in_head)

    scene = make_scene("relu")
    scene = scene._replace(model=Dropping(*scene.model))
    calls = [partial(function, *scene.args()) for function in OVER_IMAGES]
    calls.append(partial(scene.layer.activations, scene.images, scene.labels))
    if not in_head:
        calls.append(partial(fa.feature_input_patterns, *scene.no_loader(), scene.images))
    for call in calls:
        with pytest.raises(ValueError, match="the model must be deterministic"):
            call()


def test_whole_numbers_and_features_are_checked():
    assert fa.check_whole("n", np.int64(2**31 - 1)) == 2**31 - 1
    for value, message in ((2**31, "at most"), (0.5, "whole"), ("3", "whole"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=f"^n must be .*{message}"):
            fa.check_whole("n", value, 0)
    assert fa.check_feature(np.int64(3), 4) == 3
    for k in (-1, 4):
        with pytest.raises(IndexError, match=f"feature {k} does not exist"):
            fa.check_feature(k, 4)


class Passes:
    """A loader whose pass n gives order(n, batches), like a DataLoader from one iterator."""

    def __init__(self, batches, order):
        self.batches, self.order, self.n = batches, order, 0

    def __iter__(self):
        self.n += 1
        self.left = iter(self.order(self.n, self.batches))
        return iter(lambda: next(self.left, None), None)


@pytest.mark.parametrize("function", OVER_IMAGES)
def test_loaders_must_repeat_their_batches(function):
    model, loader, *frame = make_scene("relu").args()
    same = Passes(loader, lambda n, b: b)
    exactly(function(model, same, *frame), function(model, loader, *frame))
    shuffling = Passes(loader, lambda n, b: [b[0], *b[1 + n % 2 :], *b[1 : 1 + n % 2]])
    with pytest.raises(ValueError, match="loader must not shuffle"):
        function(model, shuffling, *frame)
    with pytest.raises(ValueError, match="loader can be read only once"):
        function(model, iter(loader), *frame)
    for empty in ([], [(torch.ones(0, 1, SIDE, SIDE), torch.zeros(0).long())]):
        with pytest.raises(ValueError, match="loader is empty"):
            function(model, empty, *frame)


@pytest.mark.parametrize("labels", [[0, 1, 3], [0, -1, 2], [0, 1], [[0], [1], [2]], [0.0, 1, 2]])
def test_labels_must_be_one_class_index_per_image(labels):
    with pytest.raises(ValueError, match="labels"):
        bank_of(torch.ones(3, 1), labels)


def test_bank_agrees_with_a_slow_loop(scene):
    bank = fa.collect_feature_bank(*scene.args(), topk=TOPK)
    acts, labels = scene.feature_acts().tolist(), scene.labels.tolist()
    assert bank.n_images == N
    for k in range(D_SAE):
        active = [i for i in range(N) if acts[i][k] > 0]
        strongest = sorted(active, key=lambda i: (-acts[i][k], i))[:TOPK]
        drawn = bank.sample.of(k).index.tolist()
        for found, expected in ((bank.top.of(k), strongest), (bank.sample.of(k), drawn)):
            assert found.index.tolist() == expected
            assert found.activation.tolist() == [acts[i][k] for i in expected]
            assert found.label.tolist() == [labels[i] for i in expected]
        assert len(drawn) == len(set(drawn)) == min(len(active), fa.SAMPLE_PER_FEATURE)
        assert set(drawn) <= set(active)
        counts = [sum(labels[i] == c for i in active) for c in range(C)]
        assert bank.label_histogram[k].tolist() == counts
        assert bank.n_active[k] == len(active)
        assert bank.feature_density[k].item() == pytest.approx(len(active) / N)
        mean = sum(acts[i][k] for i in active) / max(1, len(active))
        assert bank.mean_activation_when_active[k].item() == pytest.approx(mean)
    n = bank.n_active  # the cases that this loop is for
    assert n[DEAD] == 0 < n[RARE] < TOPK < n[2:DEAD].min()
    assert n[ALWAYS] == N > fa.SAMPLE_PER_FEATURE


@pytest.mark.parametrize("batch_size", [1, N])
def test_bank_is_independent_of_batches_and_blocks(scene, batch_size, monkeypatch):
    bank = fa.collect_feature_bank(*scene.args(16))
    exactly(fa.collect_feature_bank(*scene.args(batch_size)), bank)
    monkeypatch.setattr(fa, "ENTRIES", 21)  # a batch is taken in blocks, of rows and of features
    monkeypatch.setattr(fa, "ROWS", 7)
    exactly(fa.collect_feature_bank(*scene.args(batch_size)), bank)
    exactly(fa.feature_bank(scene.layer, scene.raw, scene.labels), bank)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_merged_banks_are_the_bank_of_the_whole(order):
    scene = make_scene("relu")
    parts = [
        fa.collect_feature_bank(*scene.args(keep=slice(a, b)), topk=TOPK, first_index=a)
        for a, b in ((0, 40), (40, 65), (65, N))
    ]
    merged = functools.reduce(fa.merge_feature_banks, [parts[i] for i in order])
    exactly(merged, fa.collect_feature_bank(*scene.args(), topk=TOPK))


@pytest.mark.parametrize(("first", "first_index"), [(44, 44), (45, 0)])
def test_banks_with_images_in_common_are_not_merged(first, first_index):
    scene = make_scene("relu")
    one = fa.collect_feature_bank(*scene.args(keep=slice(0, 45)))
    args = scene.args(keep=slice(first, 90))
    other = fa.collect_feature_bank(*args, first_index=first_index)
    with pytest.raises(ValueError, match=r"both banks hold image \d+.* first_index"):
        fa.merge_feature_banks(one, other)


@pytest.mark.parametrize("other", [{"n_classes": 4}, {"topk": 1}, {"acts": torch.ones(2, 3)}])
def test_banks_of_other_shapes_are_not_merged(other):
    usual = {"acts": torch.ones(2, 1), "topk": 2}
    with pytest.raises(ValueError, match="banks must have the same"):
        fa.merge_feature_banks(bank_of(**usual), bank_of(**usual | other, first_index=2))


def test_ties_and_only_ties_go_to_the_earlier_image():
    assert bank_of([[2], [5], [5], [1], [5], [0]], topk=2).top.index.tolist() == [[1, 2]]
    assert bank_of([[1], [1 + 2**-23]], topk=1).top.index.tolist() == [[1]]  # float32's least step


def test_bands_have_evenly_spread_examples_of_each_quarter_strongest_first():
    strengths = np.random.default_rng(0).permutation(np.arange(1, 37))  # nine to a band
    labels = [int(strength) % 3 for strength in strengths]
    bands = bank_of(strengths[:, None], labels).bands(0)
    quarters = [[36, 34, 32, 30, 28], [27, 25, 23, 21, 19], [18, 16, 14, 12, 10], [9, 7, 5, 3, 1]]
    assert [band.activation.tolist() for band in bands] == quarters
    for band in bands:
        assert strengths[band.index].tolist() == band.activation.tolist()
        assert [labels[i] for i in band.index] == band.label.tolist()
    few = bank_of([[1, 0], [3, 0], [2, 0]], topk=1)
    assert [band.activation.tolist() for band in few.bands(0)] == [[3], [2], [1], []]
    assert [band.activation.tolist() for band in few.bands(0, 1, 2)] == [[3, 1]]
    assert [band.activation.tolist() for band in few.bands(1)] == [[]] * 4  # never active


def test_sample_is_uniform():
    """Feature b is active on block b of the images; each eighth of a block is drawn as often."""
    blocks, size, bins = 50, 400, 8
    acts = torch.block_diag(*[1 + torch.arange(size)[:, None]] * blocks)
    place = bank_of(acts).sample.index - size * torch.arange(blocks)[:, None]
    drawn = (place * bins // size).flatten().bincount()
    expected = blocks * fa.SAMPLE_PER_FEATURE / bins
    assert drawn.sum() == bins * expected
    assert (drawn - expected).abs().max() < 4 * expected**0.5  # four standard deviations


@pytest.mark.parametrize("settings", [{"topk": 0}, {"topk": 1.5}, {"first_index": -1}])
def test_bank_checks_its_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        bank_of(torch.ones(3, 1), **settings)


def test_negative_activations_are_an_error():
    model, loader, sae, *frame = sm.identity_args(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))
    signed = sae._replace(threshold=torch.full((2,), -9.0))
    single = partial(fa.feature_ablation_effect, k=0)  # another feature than the negative one
    for function in (fa.collect_feature_bank, fa.feature_ablation_effects, single):
        with pytest.raises(ValueError, match="activations must be 0 or more, got -4 of feature 1"):
            function(model, loader, signed, *frame)


def test_input_pattern_of_a_linear_layer_in_closed_form():
    W1 = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])  # z_0 = x_0 + 3 x_2, z_1 = 2 x_1 + 4 x_3
    std, W_enc = torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 0, 2], [0, 4, -4]])
    model = Model(lambda images: images.flatten(1) @ W1, torch.zeros(2, 2))
    sae = SAE(W_enc, torch.zeros(3), torch.ones(3), W_enc.T)
    heats = fa.feature_input_patterns(model, sae, torch.ones(2), std, image_shape=(1, 2, 2))
    assert heats.tolist() == [[[1, 0], [3, 0]], [[0, 2], [0, 4]], [[1, -2], [3, -4]]]


def test_input_pattern_agrees_with_finite_differences():
    """Central differences are exact, for the preactivations are quadratic in the pixels."""
    scene, k = make_scene("conv"), 3
    images = scene.images[:5]

    def pre(images):
        return (scene.model.preactivations(images) - scene.mu) / scene.std @ scene.sae.W_enc[:, k]

    steps = torch.eye(SIDE**2).reshape(-1, 1, SIDE, SIDE) / 2
    slow = torch.stack([pre(images + step).mean() - pre(images - step).mean() for step in steps])
    assert slow.abs().max() > 1
    found = fa.feature_input_pattern(*scene.no_loader(), k, images)
    assert_close(found, slow.reshape(SIDE, SIDE))


def test_input_patterns_of_all_features_are_those_of_each(scene, monkeypatch):
    heats = fa.feature_input_patterns(*scene.no_loader(), scene.images)
    assert heats.shape == (D_SAE, SIDE, SIDE)
    for k, heat in enumerate(heats):
        assert_close(fa.feature_input_pattern(*scene.no_loader(), k, scene.images), heat)
    monkeypatch.setattr(fa, "GRADIENT_ENTRIES", 1)  # one image at a time
    assert_close(fa.feature_input_patterns(*scene.no_loader(), scene.images), heats)


@pytest.mark.parametrize("weights_ask", [False, True])  # later weights, for gradients of their own
@pytest.mark.parametrize("switched_off", ["no_grad", "detach"])
def test_gradients_that_do_not_exist_are_not_zeros(weights_ask, switched_off):
    scene, behind = make_scene("conv"), torch.eye(D_IN, requires_grad=weights_ask)

    def frozen(images):
        with torch.set_grad_enabled(switched_off != "no_grad"):
            raw = scene.model.preactivations(images)
        return (raw.detach() if switched_off == "detach" else raw) @ behind

    stopped = scene._replace(model=scene.model._replace(first_layers=frozen))
    with pytest.raises(ValueError, match="no gradient leads from the layer to the pixels"):
        fa.feature_input_patterns(*stopped.no_loader(), scene.images)


def test_patterns_do_not_depend_on_gradient_modes_and_default_dtypes():
    conv, linear = make_scene("conv"), make_scene("relu")
    expected = fa.feature_input_patterns(*conv.no_loader(), conv.images)
    with torch.inference_mode():
        images = conv.images.clone()
        with pytest.raises(ValueError, match="inference_mode"):
            fa.feature_input_patterns(*conv.no_loader(), conv.images)
    exactly(fa.feature_input_patterns(*conv.no_loader(), images), expected)
    with torch.no_grad():
        exactly(fa.feature_input_patterns(*conv.no_loader(), conv.images), expected)
    with sm.double_by_default():
        blank = fa.feature_input_patterns(*linear.no_loader(), image_shape=(1, SIDE, SIDE))
    exactly(blank, fa.feature_input_patterns(*linear.no_loader(), linear.images))


@pytest.mark.parametrize(
    ("image_shape", "heat_shape"),
    [((1, 28, 28), (28, 28)), ((3, 5, 4), (3, 5, 4)), ((5, 4), (5, 4)), ((20,), (20,))],
)
def test_input_pattern_has_the_shape_of_an_image(image_shape, heat_shape):
    one = torch.ones(1, 1)
    model = Model(lambda images: images.flatten(1).sum(1, keepdim=True), one)
    frame = (model, SAE(one, one[0], one[0], one), one[0], one[0])
    exactly(fa.feature_input_pattern(*frame, 0, image_shape=image_shape), torch.ones(heat_shape))
    exactly(fa.feature_input_patterns(*frame, image_shape=image_shape), torch.ones(1, *heat_shape))


@pytest.mark.parametrize(
    "odd_one_out",
    [
        lambda x: (x - 0.5).pow(3).sum(1),  # the same gradient at 0 and at 1
        lambda x: 1e-7 * x.square().sum(1),  # a small unit
        lambda x: torch.relu(x[:, 0] - x[:, 1] + 0.1),  # linear on constant images
    ],
)
def test_one_non_linear_unit_needs_images(odd_one_out):
    units = [lambda x: x[:, 0], lambda x: x.sum(1) + 1, lambda x: -x[:, 2]]
    model = Model(lambda x: torch.stack([unit(x.flatten(1)) for unit in units], 1), None)
    sae = SimpleNamespace(W_enc=torch.eye(3))
    patterns = partial(fa.feature_input_patterns, model, sae, torch.zeros(3), torch.ones(3))
    assert patterns(image_shape=(1, 1, 3)).shape == (3, 1, 3)
    units[1] = odd_one_out
    with pytest.raises(ValueError, match="pass images"):
        patterns(image_shape=(1, 1, 3))
    assert patterns(images=torch.rand(2, 1, 1, 3)).shape == (3, 1, 3)
    with pytest.raises(ValueError, match="images is empty"):
        patterns(images=torch.rand(0, 1, 1, 3))


@pytest.mark.parametrize("n_eval", [1, 20, 2000])  # batches hold 16 images
def test_effects_of_a_feature_agree_with_slow_loops(scene, n_eval):
    acts, steps = scene.feature_acts(), scene.sae.W_dec * scene.std
    for k in range(DEAD):
        added = sm.slow_effect(scene, range(N)[:n_eval], lambda _, k=k: 1.5 * steps[k])
        active = [i for i in range(N) if acts[i, k] > 0]
        less = sm.slow_effect(scene, active[:n_eval], lambda i, k=k: -acts[i, k] * steps[k])
        logit = fa.feature_logit_effect(*scene.args(), k, 1.5, n_eval)
        ablation = fa.feature_ablation_effect(*scene.args(), k, n_eval)
        for found, slow in ((logit, added), (ablation, less)):
            assert_close(found.mean_delta, slow)
            assert slow[found.top_class] == slow.max()
    dead = fa.feature_ablation_effect(*scene.args(), DEAD)
    assert (dead.mean_delta.tolist(), dead.top_class) == ([0] * C, -1)


@pytest.mark.parametrize("head_rows", [fa.HEAD_ROWS, 200, 7])
def test_effects_of_all_features_are_those_of_each(scene, head_rows, monkeypatch):
    rows = []

    class Recording(Model):
        def logits_from_preactivations(self, z):
            rows.append(len(z))
            return super().logits_from_preactivations(z)

    args = scene._replace(model=Recording(*scene.model)).args()
    monkeypatch.setattr(fa, "HEAD_ROWS", head_rows)  # how many rows at once must not matter
    added = fa.feature_logit_effects(*args, n_eval=50)
    removed = fa.feature_ablation_effects(*args, n_eval=20)
    assert max(rows) <= head_rows
    monkeypatch.undo()
    for k in range(D_SAE):
        one = fa.feature_logit_effect(*args, k, n_eval=50)
        assert_close((added.of(k).mean_delta, added.of(k).top_class), (one.mean_delta, one[1]))
        one = fa.feature_ablation_effect(*args, k, n_eval=20)
        assert_close((removed.of(k).mean_delta, removed.of(k).top_class), (one.mean_delta, one[1]))
    assert added.n_images.tolist() == [50] * D_SAE
    exactly(removed.n_images, fa.collect_feature_bank(*args).n_active.clamp(max=20))


def test_effects_check_their_settings():
    args = make_scene("relu").args()
    for effects in (fa.feature_logit_effects, fa.feature_ablation_effects):
        with pytest.raises(ValueError, match="n_eval must be at least 1"):
            effects(*args, n_eval=0)
    with pytest.raises(ValueError, match="alpha must be finite"):
        fa.feature_logit_effects(*args, alpha=float("nan"))


@pytest.mark.parametrize("rows", [4, 512])
def test_nearest_features_agree_with_a_slow_loop(rows, monkeypatch):
    monkeypatch.setattr(fa, "ROWS", rows)
    W_dec = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    nearest = fa.nearest_features(W_dec)
    for k in range(10):
        others = [F.cosine_similarity(W_dec[k], W_dec[j], dim=0).item() for j in range(10)]
        others[k] = -2
        assert nearest.feature[k] == np.argmax(others)
        assert nearest.cosine[k].item() == pytest.approx(max(others), abs=1e-6)
    alone = fa.nearest_features(torch.ones(1, 4))
    assert (alone.feature.tolist(), alone.cosine.tolist()) == ([-1], [0])


def test_roughness():
    chessboard = 1.0 - 2 * (torch.arange(8)[:, None] + torch.arange(8)).remainder(2)
    stripes = chessboard[:1].expand(8, 8)  # neighbors differ to the side, not above and below
    pictures = torch.stack([torch.full((8, 8), 0.3), torch.zeros(8, 8), 5 * chessboard, stripes])
    assert_close(pattern_roughness(pictures), torch.tensor([0.0, 0.0, 2.0, 1.0]))
    noise = torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0))
    assert pattern_roughness(noise).item() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="patterns need 2 x 2 pixels"):
        pattern_roughness(torch.ones(2, 1, 5))


@pytest.mark.parametrize("kind", ["bytes", "pixels", "figure"])
def test_files_are_replaced_completely_or_not_at_all(tmp_path, monkeypatch, kind):
    path = tmp_path / "file"
    write = {
        "bytes": lambda: fa.write_whole(path, b"new"),
        "pixels": lambda: fa.save_pixels(np.eye(5, dtype=np.uint8), path),
        "figure": lambda: save_figure(new_figure(9, 9), path),
    }[kind]
    fa.write_whole(path, b"old")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write()
    assert path.read_bytes() != b"old"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_saved_and_shown_pictures_hold_the_pixels(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "picture.png"
    gray = rng.integers(0, 256, (30, 41), dtype=np.uint8)
    color = rng.integers(0, 256, (30, 41, 3), dtype=np.uint8)
    for pixels, palette in ((gray, fa.GRAYS), (color, fa.GRAYS), (gray % 7, color[0, :7])):
        expected = pixels if pixels is color else palette[pixels]
        figure = fa.figure_of(pixels, path, palette)
        assert np.array_equal(read(path), expected)
        path.write_bytes(figure._repr_png_())  # what a notebook shows
        assert np.array_equal(read(path), expected)
    assert plt.get_fignums() == []  # no figure waits to be closed


def tile(pixels: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """One tile of a gallery, and what is below it; headers are above rows 0, 2 and 3 of four."""
    row_height = (len(pixels) - fa.TITLE - fa.MARGIN - 3 * fa.HEADER) // 4
    top = fa.TITLE + (1, 1, 2, 3)[row] * fa.HEADER + row * row_height
    side = round(fa.TILE / SIDE) * SIDE
    left = fa.MARGIN + column * (side + 6)
    inner = pixels[top + 1 : top + 1 + side, left + 1 : left + 1 + side]
    return inner, pixels[top + side + 2 : top + row_height, left : left + side + 2]


def test_gallery_shows_every_example_at_its_place():
    bank, images = sm.shown_bank()
    pixels = drawn(fa.show_feature_gallery(0, bank, images))
    top, bands = bank.top.of(0).index, [band.index for band in bank.bands(0)]
    rows = [top[:10], top[10:], torch.cat(bands[:2]), torch.cat(bands[2:])]
    assert [len(row) for row in rows] == [10, 10, 10, 10]
    for row, column in itertools.product(range(4), range(10)):
        gray = 255 - 255 * images[rows[row][column]].repeat(5, 0).repeat(5, 1)
        assert np.array_equal(tile(pixels, row, column)[0], np.stack([gray] * 3, 2))
    again = fa.show_feature_gallery(0, bank, torch.from_numpy(images)[:, None])
    assert np.array_equal(drawn(again), pixels)


@pytest.mark.parametrize("column", ["label", "activation"])
@pytest.mark.parametrize("classes", [(), ("shirt", "trousers", "bag", "coat")])
def test_label_and_activation_are_written_below_tiles(column, classes):
    bank, images = sm.shown_bank()
    values = getattr(bank.top, column).clone()
    values[0, 0] += 1
    changed = bank._replace(top=bank.top._replace(**{column: values}))
    show = partial(fa.show_feature_gallery, images=images, classes=classes)
    before, after = (drawn(show(0, given)) for given in (bank, changed))
    words = tile(before, 0, 0)[1]
    assert words.min() < 100
    assert not np.array_equal(words, tile(after, 0, 0)[1])
    words[:] = tile(after, 0, 0)[1]
    assert np.array_equal(before, after)  # nothing else differs


def test_gallery_of_a_feature_that_is_never_active_has_no_tiles():
    active, never = (drawn(fa.show_feature_gallery(k, *sm.shown_bank())) for k in (0, 1))
    assert never.shape == active.shape
    tiles = [tile(never, row, column) for row in range(4) for column in range(10)]
    assert all((part == 255).all() for parts in tiles for part in parts)
    assert fa._gallery_title(0, sm.shown_bank()[0]) == "Feature 0: active on 90% of 40 images"
    assert "never active" in fa._gallery_title(1, sm.shown_bank()[0])


@pytest.mark.parametrize("shape", [(40, 2, SIDE, SIDE), (SIDE, SIDE), (5, SIDE, SIDE)])
@pytest.mark.parametrize("value", [1.0, 1.01, np.nan])
def test_gallery_checks_its_images(shape, value):
    with pytest.raises((ValueError, IndexError), match="images"):
        fa.show_feature_gallery(0, sm.shown_bank()[0], np.full(shape, value))


def test_pattern_is_red_above_zero_blue_below_white_at_zero_gray_without_ink():
    heat, inked = np.array([[1.0, -1.0, 0.0, 1.0]] * 4), np.array([[1, 1, 1, 0]] * 4)
    for row in cells(heat, inked):
        red, blue, white, gray = row.tolist()
        assert (red, blue, gray) == ([103, 0, 31], [5, 48, 97], [224, 224, 224])
        assert min(white) > 240
    pixels = drawn(fa.visualize_feature_pattern(torch.from_numpy(heat), 0))
    bar = pixels[-fa.MARGIN - fa.PATTERN : -fa.MARGIN, fa.PATTERN + 2 * fa.MARGIN + 3]
    assert (bar[0].tolist(), bar[-1].tolist()) == (red, blue)


def test_scale_of_a_pattern_comes_from_the_ink_and_not_from_an_outlier_or_noise():
    signs = np.where(np.random.default_rng(0).random((SIDE, SIDE)) < 0.5, 1.0, -1.0)
    inked = np.eye(SIDE) == 0
    show = partial(fa.visualize_feature_pattern, k=0, inked=inked)
    larger_outside = np.where(inked, signs, 1e6)
    assert np.array_equal(drawn(show(signs)), drawn(show(larger_outside)))  # the note as well
    assert np.array_equal(cells(signs), cells(8 * signs))
    one_larger, one_in_noise = signs.copy(), 1e-3 * signs
    one_larger[0, 0] *= 4
    assert np.array_equal(cells(one_larger), cells(signs))  # a single pixel does not dim the others
    one_in_noise[0, 0] = 1
    assert cells(one_in_noise)[0, 0].tolist() == cells(np.ones((1, 1)))[0, 0].tolist()
    assert (cells(one_in_noise)[1:] > 240).all()  # noise does not set the scale
    assert (cells(np.zeros((SIDE, SIDE))) > 240).all()
    assert (cells(np.zeros((2, 2)), np.zeros((2, 2), bool)) == 224).all()


def test_patterns_check_their_shapes():
    with pytest.raises(ValueError, match="pattern must have shape"):
        fa.visualize_feature_pattern(torch.zeros(1, 4, 4), 0)
    with pytest.raises(ValueError, match="inked must have the pattern's shape"):
        fa.visualize_feature_pattern(torch.zeros(4, 4), 0, inked=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="patterns must have shape"):
        fa.write_feature_pictures(".", [], None, np.zeros((1, 5, 5)), np.zeros((5, 5)))


def test_folder_of_pictures_equals_the_single_ones(tmp_path):
    scene, inked, shown = make_scene("conv"), ~torch.eye(SIDE, dtype=torch.bool), (ALWAYS, DEAD)
    bank = fa.collect_feature_bank(*scene.args())
    heats = fa.feature_input_patterns(*scene.no_loader(), scene.images)
    fa.write_feature_pictures(tmp_path, shown, bank, scene.images, heats, inked)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for k in shown:
        fa.show_feature_gallery(k, bank, scene.images, tmp_path / f"feature_{k}_gallery.png")
        fa.visualize_feature_pattern(heats[k], k, tmp_path / f"feature_{k}_pattern.png", inked)
        np.save(tmp_path / f"feature_{k}_pattern.npy", heats[k].numpy())
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def calls_of(scene: Scene, bank: fa.FeatureBank, heats: torch.Tensor, k: int, path) -> list:
    """Every function about feature k, and then those about all features."""
    images, args, frame = scene.images, scene.args(), scene.no_loader()
    return [
        partial(bank.bands, k),
        partial(fa.feature_input_pattern, *frame, k, images),
        partial(fa.feature_logit_effect, *args, k),
        partial(fa.feature_ablation_effect, *args, k),
        partial(fa.show_feature_gallery, k, bank, images),
        partial(fa.write_feature_pictures, path, [k], bank, images, heats),
        partial(fa.collect_feature_bank, *args),
        partial(fa.merge_feature_banks, bank, fa.collect_feature_bank(*args, first_index=N)),
        partial(scene.layer.activations, images, scene.labels),
        partial(fa.feature_input_patterns, *frame, images),
        partial(fa.feature_logit_effects, *args),
        partial(fa.feature_ablation_effects, *args),
        partial(fa.nearest_features, scene.sae.W_dec),
        partial(pattern_roughness, heats),
        partial(fa.visualize_feature_pattern, heats[0], k),
    ]


def test_functions_leave_inputs_and_random_states_as_they_were(tmp_path):
    def state():
        numpy_state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return random.getstate(), numpy_state, torch_state, dict(plt.rcParams)

    scene = make_scene("conv")
    scene.sae.W_enc.requires_grad_()  # like a module's
    scene.sae.W_dec.requires_grad_()
    bank, heats = fa.collect_feature_bank(*scene.args()), torch.rand(D_SAE, SIDE, SIDE)
    inputs = sm.tensors((scene, bank, heats))
    before, state_before = tuple(tensor.detach().clone() for tensor in inputs), state()
    for call in calls_of(scene, bank, heats, 2, tmp_path):
        assert not any(tensor.requires_grad for tensor in sm.tensors(call()))
        exactly(tuple(inputs), before)
        assert state() == state_before
    assert scene.sae.W_enc.grad is scene.sae.W_dec.grad is None


@pytest.mark.parametrize("k", [-1, D_SAE])
def test_features_must_exist(tmp_path, k):
    scene = make_scene("linear")
    bank, heats = fa.collect_feature_bank(*scene.args()), torch.rand(D_SAE, SIDE, SIDE)
    for call in calls_of(scene, bank, heats, k, tmp_path)[:6]:
        with pytest.raises(IndexError, match=str(k)):
            call()
