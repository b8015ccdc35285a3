"""What a notebook may hand over by mistake: each is refused, and told what was met."""

import math

import numpy as np
import pytest
import torch
from small_models import Bands, Identity, banded_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import feature_analysis as fa
import feature_hypotheses as fh
import MNIST_SAE_code as driver

LAYER, IMAGES, LABELS = banded_images()
LOADER = fa.batches_of(IMAGES, LABELS)
OF_ONE = [
    lambda *given, **more: fa.feature_logit_effect(given[0], given[1], *given[2:], **more),
    lambda *given, **more: fa.feature_ablation_effect(given[0], given[1], *given[2:], **more),
    lambda model, _, *rest, **more: fa.feature_input_pattern(model, *rest, images=IMAGES, **more),
]
OF_ALL = [
    lambda model, loader, *rest: fa.collect_feature_bank(model, loader, *rest, topk=1),
    fa.feature_logit_effects,
    fa.feature_ablation_effects,
]
EVERY = [
    *OF_ALL,
    lambda model, _, *rest: fa.feature_input_patterns(model, *rest, images=IMAGES),
    lambda model, _, *rest: fa.collect_activity(fa.ExplainedLayer(model, *rest), IMAGES, LABELS),
    lambda model, _, *rest: fh.propose_hypotheses(fa.ExplainedLayer(model, *rest), IMAGES, LABELS),
]


def given(loader=LOADER, **other) -> tuple:
    layer = LAYER._replace(**other)
    return layer.model, loader, *layer[1:]


@pytest.mark.parametrize("analyse", OF_ONE)
@pytest.mark.parametrize("k", [1.5, 1.0, "1", None, torch.tensor(1.0)])
def test_a_feature_has_a_whole_number(analyse, k):
    with pytest.raises(ValueError, match=r"feature is .*; it must be a whole number"):
        analyse(*given(), k=k)


@pytest.mark.parametrize("analyse", OF_ONE)
def test_whole_numbers_of_any_kind_serve(analyse):
    expected = analyse(*given(), k=2)
    for k in (np.int64(2), torch.tensor(2)):
        torch.testing.assert_close(analyse(*given(), k=k), expected)


@pytest.mark.parametrize("analyse", EVERY)
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"std": torch.tensor([1.0, 0, 1, 1])}, "std must be above 0: entry 1 is 0"),
        ({"std": torch.tensor([1.0, 1, -1, 1])}, "std must be above 0: entry 2 is -1"),
        ({"std": torch.tensor([1.0, 1, math.nan, 1])}, "std is not finite: entry 2 is nan"),
        ({"mu": torch.tensor([0, 0, 0, math.inf])}, "mu is not finite: entry 3 is inf"),
        ({"mu": torch.zeros(4).double()}, "mu is torch.float64, but the SAE's weights are"),
        ({"std": torch.ones(4).double()}, "std is torch.float64"),
        ({"std": torch.ones(4).int()}, "std is torch.int32"),
    ],
)
def test_a_standardisation_that_cannot_be_is_refused(analyse, other, told):
    with pytest.raises(ValueError, match=told):
        analyse(*given(**other))


@pytest.mark.parametrize("analyse", OF_ALL)
def test_images_that_are_not_numbers_are_refused(analyse):
    images = IMAGES.clone()
    images[7, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite, because the images are not"):
        analyse(*given(fa.batches_of(images, LABELS)))
    with pytest.raises(ValueError, match="not finite, because the images are not"):
        fa.collect_activity(LAYER, images, LABELS)


class Broken(Bands):
    def preactivations(self, images):
        return super().preactivations(images) * torch.inf


def test_weights_that_are_not_numbers_are_told_from_images():
    with pytest.raises(ValueError, match="not finite, because the model's weights are not"):
        fa.collect_feature_bank(*given(model=Broken()))


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e39])
def test_an_alpha_without_an_effect_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha is {str(alpha).replace('+', '.')}"):
        fa.feature_logit_effects(*given(), alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha is .*; it must be finite"):
        fa.feature_logit_effect(*given(), k=0, alpha=alpha)


@pytest.mark.parametrize("value", [1.5, "3", None])
def test_numbers_of_images_are_whole(value):
    for name, analyse in (("topk", fa.collect_feature_bank), ("n_eval", fa.feature_logit_effects)):
        with pytest.raises(ValueError, match=rf"{name} is {value!r}; it must be a whole number"):
            analyse(*given(), **{name: value})
    with pytest.raises(ValueError, match="first_index is -1; it must be at least 0"):
        fa.collect_feature_bank(*given(), first_index=-1)


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("feature_ablation_effect", {"k": 1, "n_eval": 10**400}, "n_eval is more than"),
        ("feature_logit_effect", {"k": 1, "alpha": 10**400}, "alpha is 1000"),
        ("feature_logit_effect", {"k": 1, "alpha": torch.ones(2)}, r"alpha is tensor\(\[1"),
        ("feature_logit_effect", {"k": torch.zeros(2, 1)}, r"feature is tensor\(\[\[0.\], \[0"),
        ("collect_feature_bank", {"loader": [(torch.ones(()), LABELS)]}, "images are Tensor"),
        ("collect_feature_bank", {"loader": [(torch.ones(3), LABELS)]}, r"images are \(3,\)"),
    ],
)
def test_what_once_ended_within_a_library_is_refused_in_one_line(name, other, told):
    model, loader, *rest = given()
    with pytest.raises(ValueError, match=told) as error:
        getattr(fa, name)(model, other.pop("loader", loader), *rest, **other)
    assert "\n" not in str(error.value)


def test_images_without_pixels_are_no_pictures():
    bank = fa.collect_feature_bank(*given(), topk=1)
    with pytest.raises(ValueError, match=r"images have shape \(0, 0, 0\)"):
        fa.show_feature_gallery(0, bank, torch.zeros(0, 0, 0))


def test_labels_are_classes_of_the_model():
    labels = LABELS.clone()
    labels[3] = 4
    for analyse in (fa.collect_activity, fh.propose_hypotheses):
        with pytest.raises(ValueError, match="labels run to 4, but the model has 4 classes"):
            analyse(LAYER, IMAGES, labels)


class Net(nn.Module):
    """The bands, behind a layer that may behave in another way while training."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def preactivations(self, images):
        return self.layer(images).mean((1, 3))[:, :4]

    def logits_from_preactivations(self, z):
        return z.relu()


class Around:
    """No module itself, but it holds one."""

    def __init__(self, net: Net):
        self.net = net
        self.preactivations = net.preactivations
        self.logits_from_preactivations = net.logits_from_preactivations


@pytest.mark.parametrize("analyse", EVERY)
@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm2d(3), nn.RReLU()])
def test_a_model_that_is_still_training_is_refused(analyse, layer):
    net = Net(nn.Sequential(layer, nn.Identity()))
    for model in (net, Around(net)):
        net.train()
        with pytest.raises(ValueError, match=rf"in training mode, and has {type(layer).__name__}"):
            analyse(*given(model=model))
        net.eval()
        analyse(*given(model=model))


def test_training_mode_without_a_difference_is_no_reason():
    fa.collect_feature_bank(*given(model=Net(nn.Identity()).train()))


@pytest.mark.parametrize("analyse", OF_ALL)
def test_a_loader_that_shuffles_is_noticed(analyse):
    dataset = TensorDataset(IMAGES, LABELS)
    analyse(*given(DataLoader(dataset, batch_size=50)))
    with pytest.raises(ValueError, match=r"other images in each pass: it must not shuffle"):
        analyse(*given(DataLoader(dataset, batch_size=50, shuffle=True)))


@pytest.mark.parametrize("analyse", OF_ALL)
def test_a_loader_without_a_second_pass_is_noticed(analyse):
    with pytest.raises(ValueError, match="can be read only once"):
        analyse(*given(iter(LOADER)))


def test_a_trained_classifier_takes_ink_from_0_to_1_and_others_what_they_like():
    classifier = driver.Classifier(hidden_units=4).requires_grad_(False).eval()
    images = torch.rand(20, 1, 28, 28)
    layer = fa.ExplainedLayer(classifier, Identity(), torch.zeros(4), torch.ones(4))
    fa.collect_activity(layer, images, torch.zeros(20).long())
    for wrong, told in ((255 * images, "to 25"), (images - 0.5, "-0.")):
        with pytest.raises(ValueError, match=rf"ink runs from .*{told}.* but must from 0 to 1"):
            fa.collect_activity(layer, wrong, torch.zeros(20).long())
    fa.collect_activity(LAYER, 255 * IMAGES, LABELS)  # a model that takes them


def test_what_odd_inputs_once_broke():
    """A number that is a tensor, and images without a pixel."""
    bank = fa.collect_feature_bank(*given(), topk=1, first_index=torch.tensor([5]))
    assert torch.equal(bank.top.index, fa.collect_feature_bank(*given(), 1, 5).top.index)
    model, _, *coder = given()
    with pytest.raises(ValueError, match="shape"):
        fa.feature_input_pattern(model, *coder, 0, images=torch.zeros(1, 3, 0, 8))
