"""Inputs as they come in practice: each gives the right value, or one line that names the cause."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import feature_analysis as fa
from saexplain import activations
from saexplain.datasets import load_own
from saexplain.hypotheses import Hypothesis
from saexplain.layers import AtLayer, open_layer
from saexplain.own import read_hypotheses, write_hypotheses
from saexplain.report import explain_sae, load_splits
from saexplain.sae import JumpReLUSAE

SIZES = (60, 20, 24)


def some(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 8, 8) from 0 to 1 whose two bright rows show the class, and labels."""
    labels = torch.arange(n) % 4
    images = 0.3 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.6
    return images, labels


SPLITS = [some(n) for n in SIZES]
X, Y = SPLITS[0]


class Net(nn.Module):
    """A network whose forward pass a test may replace."""

    def __init__(self, forward=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.mid, self.b = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.run = forward or Net.usual

    def usual(self, x):
        return self.b(self.mid(self.a(x.flatten(1)).relu()).relu())

    def forward(self, *given, **named):
        return self.run(self, *given, **named)


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor
    hidden: object = None


class GivesScores(nn.Linear):
    def forward(self, x):
        return Scores(super().forward(x))


def net_with_scores() -> nn.Module:
    net = Net(lambda net, x: net.b(net.mid(net.a(x.flatten(1)).relu()).scores.relu()))
    weights = net.mid.state_dict()
    net.mid = GivesScores(12, 12)
    net.mid.load_state_dict(weights)
    return net


def net_of_dtypes(first: torch.dtype) -> nn.Module:
    net = Net()
    net.register_parameter("first", nn.Parameter(torch.ones(1, dtype=first)))
    return net


def checkpointed(net, x):
    return net.b(checkpoint(net.mid, net.a(x.flatten(1)).relu(), use_reentrant=False).relu())


USABLE = {
    "changes its input": lambda: Net(lambda net, x: net.usual(x.mul_(1))),
    "checkpointing": lambda: Net(checkpointed),
    "returns a dataclass": lambda: Net(lambda net, x: Scores(net.usual(x))),
    "layer gives a dataclass": net_with_scores,
    "a parameter of float64": lambda: net_of_dtypes(torch.float64),
    "a parameter of float16": lambda: net_of_dtypes(torch.float16),
    "no gradients": lambda: Net(torch.no_grad()(Net.usual)),
    "logits have a name": lambda: Net(
        lambda net, x: {"h": net.a(x.flatten(1)), "logits": net.usual(x)}
    ),
}


@pytest.mark.parametrize("kind", USABLE)
def test_models_as_they_come_give_their_own_logits(kind):
    net = AtLayer(USABLE[kind](), "mid")
    with torch.no_grad():
        logits = net.logits_from_preactivations(net.preactivations(X))
        torch.testing.assert_close(logits, Net()(X))


def raising(error):
    def forward(net, x):
        raise error

    return Net(forward)


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (raising(KeyError("mask")), "mid", r"\(1, 8, 8\), 16 of float32 on cpu: KeyError: 'mask'"),
        (raising(AssertionError("224 pixels")), "mid", "AssertionError: 224 pixels"),
        (Net(lambda net, x, mask: x), "mid", "missing 1 required positional argument: 'mask'"),
        (torch.jit.trace(Net().eval(), X[:2]), "mid", "'mid' is traced or scripted"),
        (torch.jit.script(nn.Sequential(nn.Flatten())), "0", "'0' is traced or scripted"),
        (torch.export.export(Net().eval(), (X[:2],)).module(), "mid", "eval"),
        (Net(lambda net, x: net.b(net.a(x.flatten(1)))), "mid", "'mid' does not run"),
        (Net(lambda net, x: net.b(net.mid(net.mid(net.a(x.flatten(1)))))), "mid", "runs 2 times"),
        (Net(), "mdi", "no layer 'mdi'; it has mid,"),
        (Net(), 1, "must be a name, such as '1', got one of type int"),
        (Net(lambda net, x: (net.a(x.flatten(1)), net.usual(x))), "mid", r"\(B, 12\), \(B, 4\)"),
    ],
)
def test_a_model_that_fails_is_an_error_with_its_own_cause(model, layer, message):
    with pytest.raises(ValueError, match=message):
        AtLayer(model, layer).preactivations(X)
    assert AtLayer(Net(), "mid").preactivations(X).shape == (60, 12)


def test_a_layer_taken_as_a_module_is_named():
    net = Net()
    with pytest.raises(ValueError, match="such as 'mid', got one of type Linear"):
        AtLayer(net, net.mid)


@pytest.mark.parametrize("model", [Net().to("meta"), nn.Sequential(nn.LazyLinear(3))])
def test_weights_without_values_are_named(model):
    with pytest.raises(ValueError, match="weight has no values"):
        open_layer(model, "0")


def test_a_layer_without_weights_has_the_layout_of_its_input():
    x = torch.rand(20, 1, 14, 14)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
    )
    rows = AtLayer(net, "1").preactivations(x)
    torch.testing.assert_close(rows, net[:2](x).flatten(2).mT)  # (B, 36, 6): channels first


def read_layer(model, splits=SPLITS, layer="mid"):
    net = open_layer(model, layer)
    return activations.collect_activations(net, load_splits(net, (), *splits))


@pytest.mark.parametrize(
    ("end", "message"),
    [(nn.Softmax(1), "leave out the softmax"), (nn.Sigmoid(), "leave out the sigmoid")],
)
def test_numbers_from_0_to_1_are_no_logits(end, message):
    net = Net()
    net.run = lambda net, x: end(net.usual(x))
    with pytest.raises(ValueError, match=message):
        read_layer(net)


def test_values_that_are_not_finite_are_placed():
    images = X.clone()
    images[3, 0, 1, 2] = images[3, 0, 1, 3] = torch.inf
    with pytest.raises(ValueError, match="train must have finite pixels, but 2 of image 3 are not"):
        load_own((images, Y), *SPLITS[1:])
    net = AtLayer(Net(), "mid", images=X)
    layer = fa.ExplainedLayer(net, None, torch.zeros(12), torch.ones(12))
    with pytest.raises(ValueError, match="images must be finite, got inf at column 2 of image 3"):
        layer.raw(images)
    net.model.b.weight.data[2] = torch.nan
    with pytest.raises(ValueError, match="logits must be finite, got nan at class 2 of image 0"):
        layer.logits(layer.raw(X))
    net.model.mid.weight.data[5] = torch.inf
    with pytest.raises(ValueError, match=r"training images must be finite, got .* at unit 5 of"):
        read_layer(net.model)


@pytest.mark.parametrize(
    ("made_for", "given", "words"),
    [(1, 1, ""), (1, 255, "divided by 255"), (255, 1, "times 255"), (255, 255, "")],
)
def test_images_on_another_usual_scale_are_reported(made_for, given, words, capsys):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(4).repeat_interleave(16, 1) / 16)  # means of the bright rows
        net[1].bias.zero_()
        net[2].weight.copy_(20 / made_for * torch.eye(4))
        net[2].bias.copy_(torch.tensor([5.0, 0, 0, 0]))  # outweighs images on a smaller scale
    splits = [(given * x, y.clone()) for x, y in SPLITS]
    splits[1][1][2] = 1  # one wrong label, so that a larger scale costs
    layer = read_layer(net, splits, "1")
    capsys.readouterr()
    activations.warn_scale(layer)
    printed = capsys.readouterr().out
    assert words in printed
    assert bool(printed) == bool(words)

    def check(module, given_images):
        if not torch.equal(given_images[0].max(), splits[1][0].max()):
            raise ValueError("pixels must be as given")

    net[0].register_forward_pre_hook(check)
    activations.warn_scale(layer)
    assert capsys.readouterr().out == ""


def in_lists(x, y):
    return list(x), y.tolist()


FORMS = {
    "pair of lists": in_lists,
    "dict of lists": lambda x, y: {"label": y.tolist(), "image": list(x)},
    "batches as dicts": lambda x, y: [{"label": y[i::2], "image": x[i::2]} for i in range(2)],
    "object labels": lambda x, y: (x, y.numpy().astype(object)),
    "big endian": lambda x, y: (x.numpy().astype(">f4"), y),
    "long double": lambda x, y: (x.numpy().astype("g"), y),
    "expanded": lambda x, y: (x.expand(1, *x.shape)[0], y),
    "channels last": lambda x, y: (x.contiguous(memory_format=torch.channels_last), y),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_in_usual_forms(form):
    data = load_own(*(FORMS[form](x, y) for x, y in SPLITS))
    order = (
        torch.cat([torch.arange(i, 60, 2) for i in range(2)]) if "dicts" in form else slice(None)
    )
    torch.testing.assert_close(data.train.images, X[order])
    assert data.train.labels.equal(Y[order])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((X, Y, Y), {}, "got a tuple of 3"),
        ([X, Y, Y], {}, "got a list of 3"),
        (SPLITS, {}, "give splits as train, val and test"),
        ((X, None), {}, r"labels of shape \(\)"),
        ((X, [*"abcd"] * 15), {}, "whole numbers from 0, got <U1 such as 'a'"),
        ((X.to_sparse(), Y), {}, "without dense values"),
        ((X.to("meta"), Y), {}, "without dense values"),
        ((X, Y), {"classes": {"a", "b", "c", "d"}}, "in the order of the logits"),
        ((X, Y), {"classes": 4}, "in the order of the logits, got 4"),
        ({"pic": X, "cls": Y}, {"columns": "pic"}, "columns must name image and label"),
        ({"pic": X, "cls": Y}, {"columns": ("pic", "zz")}, "no column 'zz'.* it has pic, cls"),
        ([(x, 0) for x in X], {"transform": lambda x: 1 / 0}, "image 0 .*ZeroDivisionError"),
        ((X, Y), {"mean": float("inf"), "std": 1.0}, "finite number"),
    ],
)
def test_forms_that_cannot_be_used_are_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        load_own(given, **options)


@pytest.mark.parametrize(
    "classes", [{"a": 0, "c": 2, "b": 1, "d": 3}, {3: "d", 0: "a", 1: "b", 2: "c"}]
)
def test_names_of_classes_may_be_a_dict(classes):
    assert load_own((X, Y), classes=classes).classes == ("a", "b", "c", "d")


def broken_sae() -> JumpReLUSAE:
    sae = JumpReLUSAE(12, 24)
    sae.W_dec.data[17, 3] = torch.nan
    return sae


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"W_enc": 1}, "must have encode, decode, W_enc, W_dec, but has no encode"),
        (broken_sae(), r"1 of W_dec are not, first at \(17, 3\)"),
    ],
)
def test_an_sae_that_cannot_be_used_is_named(tmp_path, sae, message):
    given = (sae, torch.zeros(12), torch.ones(12), *SPLITS, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        explain_sae(Net(), "mid", *given)
    assert not (tmp_path / "out").exists()


def test_paths_may_start_at_home_and_folders_are_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    write_hypotheses([Hypothesis(3, np.eye(8, dtype=int))], "~/mine.json")
    assert (tmp_path / "mine.json").is_file()
    assert [h.feature for h in read_hypotheses("~/mine.json")] == [3]
    with pytest.raises(ValueError, match="cannot be written"):
        write_hypotheses([Hypothesis(3, np.eye(8, dtype=int))], tmp_path)
    with pytest.raises(ValueError, match=r"'~/mine\.json' is a file; give"):
        load_own("~/mine.json")
