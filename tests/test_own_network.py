"""Any network, its layers, and SAEs in the layout of SAELens."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import double_by_default
from test_end_to_end import ROOT, block_of
from torch import nn

import feature_analysis as fa
import feature_hypotheses as fh
import MNIST_SAE_code as driver
from MNIST_SAE_code import InputError, Settings

NAMES = ("sky", "sea", "sand")


class Branched(nn.Module):
    """A network with all that may stand in the way: dropout, batch norm, work in place, a question
    about the batch, and, if asked for, a connection around the layer."""

    def __init__(self, around: bool = False, counts: bool = False):
        super().__init__()
        self.around, self.counts = around, counts
        layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.wide = nn.Linear(4 * 16, 12)
        self.rest = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(12, 3))
        self.shortcut = nn.Linear(3 * 64, 3)

    def forward(self, images):
        n = images.shape[0]
        found = self.wide(self.features(images).flatten(1))
        logits = self.rest(found.view(n, -1) if self.counts else found)
        return logits + self.shortcut(images.flatten(1)) if self.around else logits


def network(**kinds: bool) -> Branched:
    """In training mode, with statistics that are not those of one batch."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Branched(**kinds)
        net(torch.randn(50, 3, 8, 8))
    return net


def some_images(n: int = 30) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(net: Branched, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of `wide` and the logits, in evaluation mode, written out."""
    conv, norm, _ = net.features
    spread = (norm.running_var + norm.eps).sqrt()[:, None, None]
    x = (conv(images) - norm.running_mean[:, None, None]) / spread
    x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    wide = x.flatten(1) @ net.wide.weight.T + net.wide.bias
    head = net.rest[2]
    return wide, wide.clamp(min=0) @ head.weight.T + head.bias


@pytest.mark.parametrize("counts", [False, True])
def test_a_layer_and_the_rest_of_a_network(counts):
    net, images = network(counts=counts), some_images()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    wide, logits = by_hand(net, images)
    at = fa.AtLayer(net, "wide")
    raw = at.preactivations(images)
    assert raw.numpy(force=True) == pytest.approx(wide.numpy(force=True), abs=1e-5)
    before = raw.clone()
    found = at.logits_from_preactivations(raw)
    assert found.numpy(force=True) == pytest.approx(logits.numpy(force=True), abs=1e-5)
    assert torch.equal(raw, before)  # the ReLU in place worked on a copy
    moved = at.logits_from_preactivations(raw + 1.5)
    expected = (wide + 1.5).clamp(min=0) @ net.rest[2].weight.T + net.rest[2].bias
    assert moved.numpy(force=True) == pytest.approx(expected.numpy(force=True), abs=1e-5)

    assert all(module.training for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not raw.requires_grad
    assert not found.requires_grad
    assert not any(module._forward_hooks for module in net.modules())


def test_modes_that_differ_are_restored_one_by_one():
    net = network()
    net.features.eval()
    fa.AtLayer(net, "wide", images=some_images())
    assert net.training
    assert net.rest[1].training
    assert not any(module.training for module in net.features.modules())


def test_gradients_flow_where_they_are_asked_for():
    net, images = network(), some_images(2)
    at = fa.AtLayer(net, "wide", images=images)
    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(at.preactivations(pixels)[:, 3].sum(), pixels)
    wide, _ = by_hand(net, pixels)
    (expected,) = torch.autograd.grad(wide[:, 3].sum(), pixels)
    assert gradient.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    raw = at.preactivations(images).requires_grad_(True)
    (slope,) = torch.autograd.grad(at.logits_from_preactivations(raw)[:, 1].sum(), raw)
    weights = net.rest[2].weight[1].detach()
    assert torch.equal(slope, torch.where(raw > 0, weights, 0.0))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_connection_around_the_layer_is_found():
    with pytest.raises(ValueError, match="after layer 'wide' does not depend on it alone"):
        fa.AtLayer(network(around=True), "wide", images=some_images())


class Pooled(nn.Module):
    """Channels that are read by their mean, or one position of which is read."""

    def __init__(self, by_mean: bool):
        super().__init__()
        self.by_mean = by_mean
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        found = self.conv(images)
        return self.head(found.mean((2, 3)) if self.by_mean else found[:, :, 2, 2])


@pytest.mark.parametrize("first", [some_images(1), torch.zeros(5, 3, 8, 8)])
def test_one_image_or_equal_ones_are_enough_to_find_it(first):
    with pytest.raises(ValueError, match="does not depend on it alone"):
        fa.AtLayer(network(around=True), "wide").preactivations(first)


class OpenedRarely(nn.Module):
    """With a connection around the layer that only one of a few images opens, or, if asked for,
    with a head that reads the mean of its batch."""

    def __init__(self, by_batch: bool = False):
        super().__init__()
        self.by_batch = by_batch
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, images):
        found = self.first(images)
        if self.by_batch:
            return self.head((found - found.mean(0)).relu())
        return self.head(found.relu()) + 5 * (images[:, :1] < -7)


def test_a_connection_that_few_images_open_is_found():
    images = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    fa.AtLayer(OpenedRarely(), "first", images=images)  # which none of these opens
    images[14, 0] = -9
    with pytest.raises(ValueError, match="after layer 'first' does not depend on it alone"):
        fa.AtLayer(OpenedRarely(), "first", images=images)


def test_logits_that_depend_on_the_other_images_are_refused():
    images = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="logits for an image depend on the others of its batch"):
        fa.AtLayer(OpenedRarely(by_batch=True), "first").preactivations(images)


def test_no_image_is_no_reason_to_fail():
    at = fa.AtLayer(network(counts=True), "wide", images=some_images())
    assert at.preactivations(some_images()[:0]).shape == (0, 12)
    assert at.logits_from_preactivations(torch.zeros(0, 12)).shape == (0, 3)


class Bent(nn.Module):
    """Linear between any two images with pixels from 0 to 1, but not beyond."""

    def preactivations(self, images):
        return (images.flatten(1)[:, :3] - 100).relu() + images.flatten(1)[:, :3]

    def logits_from_preactivations(self, raw):
        return raw


def test_linear_is_what_is_linear_on_the_images_at_hand():
    layer = fa.ExplainedLayer(Bent(), None, torch.zeros(3), torch.ones(3))
    images = 255 * torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fa.is_linear(layer, (1, 4, 4))
    assert not fa.is_linear(layer, (1, 4, 4), images)


def test_positions_are_pooled_where_the_rest_reads_no_more():
    images, net = some_images(), Pooled(by_mean=True)
    with pytest.raises(
        ValueError, match=r"gives \(16, 5, 6, 6\), outputs with positions: say pool"
    ):
        fa.AtLayer(net, "conv", images=images)
    at = fa.AtLayer(net, "conv", "mean", images)
    raw = at.preactivations(images)
    assert raw.shape == (30, 5)
    assert torch.allclose(raw, net.conv(images).mean((2, 3)), atol=1e-6)
    assert torch.allclose(at.logits_from_preactivations(raw), net(images), atol=1e-5)

    reader = Pooled(by_mean=False)
    with pytest.raises(ValueError, match="reads more of it than pool='mean' keeps"):
        fa.AtLayer(reader, "conv", "mean", images)
    flat = fa.AtLayer(reader, "conv", "flatten", images)
    assert flat.preactivations(images).shape == (30, 180)
    logits = flat.logits_from_preactivations(flat.preactivations(images))
    assert torch.allclose(logits, reader(images), atol=1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn, self.unused = nn.Linear(6, 6), nn.Linear(1, 1)

    def forward(self, x):
        return self.turn(self.turn(x).relu())


@pytest.mark.parametrize(
    ("name", "pool", "message"),
    [
        ("trun", None, r"no layer 'trun'; it has .*turn"),
        ("", None, "no layer ''"),
        ("turn", "sum", "pool is 'sum'; use one of mean, max, flatten"),
        ("turn", None, "layer 'turn' runs 2 times"),
        ("unused", None, "layer 'unused' does not run"),
    ],
)
def test_layers_that_cannot_be_taken(name, pool, message):
    with pytest.raises(ValueError, match=message):
        fa.AtLayer(Twice(), name, pool, torch.randn(4, 6))


def test_a_layer_without_a_tensor_and_a_model_without_logits_are_named():
    pair, images = nn.LSTM(6, 6), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"layer '0' gives no tensor \(B, d_in\) but a tuple"):
        fa.AtLayer(nn.Sequential(pair), "0", images=images)
    split = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)))
    with pytest.raises(ValueError, match=r"the model gives \(8, 2, 3\) instead of logits"):
        fa.AtLayer(split, "0", images=images)
    with pytest.raises(ValueError, match=r"the model gives .*tuple.* instead of logits"):
        fa.AtLayer(nn.Sequential(nn.Linear(6, 6), pair), "0", images=images)


def test_the_rest_cannot_be_run_before_any_image_was_seen():
    with pytest.raises(ValueError, match="give `images` first"):
        fa.AtLayer(network(), "wide").logits_from_preactivations(torch.zeros(2, 12))


# --- Pictures of images of any kind -------------------------------------------------------------


def test_ink_of_any_images():
    digits = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).reshape(1, 1, 2, 2)
    assert torch.equal(fa.as_ink(digits), digits)
    assert torch.equal(fa.as_ink(digits[:, 0]), digits)
    normalised = (digits - 0.13) / 0.31
    assert fa.as_ink(normalised).numpy() == pytest.approx(digits.numpy(), abs=1e-6)
    photo = torch.tensor([0.2, 0.9, 0.5, 0.7]).reshape(1, 1, 2, 2)  # no blank ground
    assert torch.equal(fa.as_ink(photo), 1 - photo)  # so that light stays light
    colour = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    grey = 0.299 * colour[:, :1] + 0.587 * colour[:, 1:2] + 0.114 * colour[:, 2:]
    assert fa.as_ink(colour).numpy() == pytest.approx(1 - grey.numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="C = 1 or 3"):
        fa.as_ink(torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="not finite"):
        fa.as_ink(torch.full((2, 1, 4, 4), float("nan")))


def test_pictures_refuse_other_scales_in_a_line():
    with pytest.raises(ValueError, match=r"run from -0.5 to 2; .* give as_ink\(images\)"):
        fa.GalleryPainter(torch.tensor([-0.5, 2.0]).reshape(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"run from 0 to 1.01; .* give as_ink\(images\)"):
        fa.GalleryPainter(torch.tensor([0.5, 1.01]).reshape(1, 1, 1, 2))


def test_only_inputs_ask_for_gradients():
    net = nn.Linear(4, 3)
    net.preactivations = net.logits_from_preactivations = net.forward
    for model in (net, fa.InEvaluation(net)):
        assert all(w.requires_grad for w in net.parameters())
        x = torch.rand(2, 4)
        asked = x.clone().requires_grad_()
        for run in (model.preactivations, model.logits_from_preactivations):
            assert run(asked).requires_grad
            assert run(x).requires_grad == (model is net)
            with torch.no_grad():
                assert not run(asked).requires_grad


# --- explain() ----------------------------------------------------------------------------------


def picture_set(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour images (n, 3, 8, 8), the third of their labels lit up, on any scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = 0.3 * torch.randn(n, 3, 8, 8, generator=generator)
    images[torch.arange(n), labels] += 1.0
    return images, labels


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A network trained on such pictures, and the run that explains it."""
    net, (images, labels) = network(), picture_set(600, 0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("own") / "explained"
    settings = {"target": 4, "sae_latents": 24, "epochs_sae_final": 1, "out": str(out)}
    data = [(images, labels), picture_set(150, 1), picture_set(150, 2)]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    run = driver.explain(net, "wide", *data, classes=NAMES, **settings)
    return net, data, settings, run, state


def test_everything_of_a_run_comes_out(explained):
    net, data, _, run, state = explained
    assert run.sae.W_enc.shape == (12, 24)
    raw = by_hand(net.eval(), data[1][0])[0]
    net.train()
    acts = run.sae.encode((raw - run.mu) / run.std)
    assert (acts > 0).sum(1).double().mean() == pytest.approx(4, abs=2 / 150)
    for record in run.report:
        density = (acts[:, record["feature"]] > 0).double().mean()
        assert record["mean_active"] == pytest.approx(float(density), abs=1.1 / 150)
    frame = pd.read_json(run.folder / "feature_report.json")
    assert len(frame) == 24
    assert frame.influence.is_monotonic_decreasing
    for name in (
        "summary.json",
        "hypotheses.json",
        "hypotheses.md",
        "feature_report.html",
        "sae.safetensors",
        "saelens/cfg.json",
        f"feature_{run.report[0]['feature']}_panel.png",
    ):
        assert (run.folder / name).stat().st_size > 100, name
    (summary,) = json.loads((run.folder / "summary.json").read_text())
    assert summary["recon_acc_jumprelu"] > 0.9
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert net.training


def test_classes_have_their_names_and_no_stroke_is_named(explained):
    run = explained[3]
    text = (run.folder / "hypotheses.md").read_text()
    assert re.search(r"\d% are (skies|seas|sands)", text)
    assert not re.search(
        r"\b(0|1|2)s\b|bar|stem|slash", " ".join(h["statement"] for h in run.report)
    )
    assert "images have shape (3, 8, 8)" in text
    claims = json.loads((run.folder / "hypotheses.json").read_text())
    assert claims["classes"] == list(NAMES)


def test_the_same_network_again_reuses_and_another_does_not(explained, capsys):
    net, data, settings, run, _ = explained
    again = driver.explain(net, "wide", *data, classes=NAMES, **settings)
    assert "sae: reused" in capsys.readouterr().out
    assert torch.equal(again.sae.W_enc, run.sae.W_enc)
    with torch.no_grad():
        net.rest[2].weight[0, 0] += 0.5  # what comes after the layer counts as well
    driver.explain(net, "wide", *data, classes=NAMES, hypotheses=False, **settings)
    assert "sae: retrained" in capsys.readouterr().out
    with pytest.raises(InputError, match="explains layer wide of Branched, which is not"):
        driver.load_run(settings["out"])


def test_of_a_run_of_the_script_in_the_same_folder_nothing_is_left(explained, tmp_path, capsys):
    """Neither its classifier nor the course of its training, which is not that of the network."""
    net, data, settings, _, _ = explained
    flags = "--data sample --epochs-ffn 1 --epochs-sae-final 1 --sae-latents 24 --workers 0".split()
    flags += ["--target-actives", "4", "--no-hypotheses", "--stability-seeds", "0"]
    driver.main([*flags, "--out", str(tmp_path)])
    before = (tmp_path / "classifier.safetensors").read_bytes()
    own = {**settings, "out": str(tmp_path), "hypotheses": False, "stability_seeds": 0}
    with pytest.raises(driver.TrainingError):
        driver.explain(net, "wide", *data, classes=NAMES, **{**own, "lr_sae": 1e38})
    driver.load_run(str(tmp_path))  # is there as long as nothing has taken its place
    capsys.readouterr()
    run = driver.explain(net, "wide", *data, classes=NAMES, **own)
    assert (
        f"classifier: the one in {tmp_path} is not what is explained; it is kept as "
        f"classifier.kept-1"
    ) in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "classifier.safetensors").exists()
    assert (tmp_path / "classifier.kept-1.safetensors").read_bytes() == before
    log = (tmp_path / "run.log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in log} == {"sae"}
    assert Image.open(tmp_path / "training.png").size == (1000, 290)  # four panels, all of the SAE
    assert len(run.report) == 24
    (tmp_path / "feature_report.json").write_text("[]")
    with pytest.raises(InputError, match="is not the report of this run"):
        run.report  # noqa: B018


def test_a_network_that_makes_no_error_and_has_the_methods_itself(tmp_path):
    """In training mode, with dropout; nothing of it changes."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(192, 6), nn.Dropout(0.5), nn.Linear(6, 3)

        def preactivations(self, images):
            return self.first(self.drop(images.view(images.size(0), -1)))

        def logits_from_preactivations(self, raw):
            return self.last(raw)

    net = Whole().double()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.zero_()
        for c in range(3):
            net.first.weight[c, 64 * c : 64 * c + 64] = 1.0
        net.last.weight.copy_(torch.eye(3, 6))
        net.last.bias.zero_()
    data = [picture_set(n, seed) for seed, n in enumerate((300, 100, 60))]
    settings = {"target": 2, "sae_latents": 8, "epochs_sae_final": 1, "stability_seeds": 0}
    run = driver.explain(net, None, *data, out=str(tmp_path), **settings)
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert summary["baseline_acc"] == 1
    assert (tmp_path / "feature_report.html").exists()
    assert net.training
    expected = data[1][0].flatten(1) @ net.first.weight.float().T
    found = run.model.preactivations(data[1][0])
    assert found.numpy(force=True) == pytest.approx(expected.numpy(force=True), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_layer_that_always_gives_the_same_is_refused_before_training(tmp_path, value):
    splits = [picture_set(n, seed) for seed, n in enumerate((40, 20, 30))]
    images, labels = splits[0]
    noise = 1e-4 * torch.rand(images.shape, generator=torch.Generator().manual_seed(9))
    splits[0] = torch.full_like(images, value), labels
    why = r"^the layer gives the same for all 40 training images, so there is nothing to explain; "
    with pytest.raises(InputError, match=why):
        driver.explain(network(), "wide", *splits, out=str(tmp_path))
    assert not (tmp_path / "sae.json").exists()
    splits[0] = splits[0][0] + noise, labels  # hardly varies, but does
    net, settings = network(), Settings(target_actives=(2,), sae_latents=8)
    data = driver.data_of([driver.whole_split(s, "", torch.device("cpu")) for s in splits], (), 3)
    at = driver.network_of(net, "wide", None)
    assert driver.collect_preactivations(at, data, settings.normalize_z).train.shape == (40, 12)


def scale_told(capsys, **images) -> str:
    train = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2
    raw = {"val": train[:100], "test": train[100:200], **images}
    driver.tell_other_scale(
        driver.Preactivations(train, **raw, mu=torch.zeros(6), std=torch.ones(6))
    )
    return capsys.readouterr().out


def test_splits_on_different_scales_are_told(capsys):
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    assert scale_told(capsys) == ""
    assert scale_told(capsys, val=2 * z + 4, test=6 * z + 2) == ""
    words = (
        "the layer's outputs on {} images lie {} standard deviations off those on training images "
        "and spread {} times as far; are all images scaled alike?\n"
    )
    assert scale_told(capsys, val=z * 3 + 8) == words.format("validation", "2.0", "1")
    found = scale_told(capsys, val=z / 3 + 2, test=z * 30 + 2)
    first, second = found.splitlines(keepends=True)
    assert first.startswith("the layer's outputs on validation images lie 0.")
    assert "and spread 0.11 times as far" in first
    assert "and spread 10 times as far" in second


def test_unscaled_validation_images_are_told_by_explain(explained, tmp_path, capsys):
    net, (train, val, test), settings, _, _ = explained
    quick = {"stability_seeds": 0, "hypotheses": False, "out": str(tmp_path)}
    loud = (255 * val[0], val[1])
    driver.explain(net, "wide", train, loud, test, **{**settings, **quick})
    told = capsys.readouterr().out
    assert "the layer's outputs on validation images lie" in told
    assert "the layer's outputs on test images lie" not in told


def test_a_split_that_lies_in_an_earlier_one_is_refused(tmp_path):
    train, val = picture_set(40, 0), picture_set(20, 1)
    some = tuple(part[5:12] for part in train)
    for splits, words in (
        ((train, some, val), "all 7 images of val are in train, too"),
        ((train, val, some), "all 7 images of test are in train, too"),
        ((train, val, val), "all 20 images of test are in val, too"),
    ):
        with pytest.raises(InputError, match=f"^{words}, so none is unseen; give three"):
            driver.explain(network(), "wide", *splits, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_of_two_splits_are_told_and_recorded(explained, tmp_path, capsys):
    net, (train, val, test), settings, run, _ = explained
    (clean,) = json.loads((run.folder / "summary.json").read_text())
    assert "repeated_images" not in clean
    more = tuple(torch.cat([a, b[:3]]) for a, b in zip(test, train, strict=True))
    quick = {"stability_seeds": 0, "hypotheses": False, "out": str(tmp_path)}
    driver.explain(net, "wide", train, val, more, **{**settings, **quick})
    told = "3 of 153 test images are also training images: what is found on them is not found on"
    assert told in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "summary.json").read_text())
    assert record["repeated_images"] == {"test in train": 3}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


def test_images_come_as_tensors_datasets_or_loaders():
    images, labels = picture_set(7, 0)
    for given in (
        (images, labels),
        Pairs(images, labels),
        torch.utils.data.DataLoader(Pairs(images, labels), batch_size=3),
    ):
        split = driver.whole_split(given, "train", torch.device("cpu"))
        assert torch.equal(split.images, images)
        assert torch.equal(split.labels, labels)
    arrays = (images.numpy(), labels.numpy())
    assert torch.equal(driver.whole_split(arrays, "val", torch.device("cpu")).images, images)


def test_two_images_are_enough_for_a_split_and_one_is_not():
    images, labels = picture_set(2, 0)
    assert len(driver.whole_split((images, labels), "test", torch.device("cpu")).labels) == 2
    with pytest.raises(InputError, match="test"):
        driver.whole_split((images[:1], labels[:1]), "test", torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shuffle": True, "generator": torch.Generator().manual_seed(1)}, "must not shuffle"),
        ({"batch_size": 4, "drop_last": True}, "it drops 3 images at its end"),
    ],
)
def test_loaders_that_shuffle_or_lose_images_are_refused(given, message):
    loader = torch.utils.data.DataLoader(Pairs(*picture_set(7, 0)), **given)
    with pytest.raises(InputError, match=f"train, a DataLoader, .*{message}"):
        driver.whole_split(loader, "train", torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a", "b")}, "classes has 2 different names; the network has 3 logits"),
        (
            {"layers": 3},
            "explain\\(\\) has no setting 'layers'; it has sae_latents",
        ),
        ({"val": 5}, "val, a int, gives no images and labels"),
        ({"val": (torch.zeros(4, 2, 8, 8), torch.arange(4))}, "C being 1 or 3"),
        ({"val": (torch.full((4, 3, 8, 8), torch.nan), torch.arange(4))}, "not finite"),
        ({"classes": ("a", "b", "b")}, "classes has 2 different names"),
        ({"val": (torch.zeros(4, 3, 8, 8), torch.zeros(3))}, "labels of shape"),
        (
            {"val": (torch.zeros(4, 3, 8, 8), torch.full((4,), 3))},
            "labels of val run from 3 to 3; .* 0 to 2 are needed",
        ),
    ],
)
def test_what_explain_cannot_use_is_named(tmp_path, change, message):
    given = {"train": picture_set(20, 0), "val": picture_set(20, 1), "test": picture_set(20, 2)}
    with pytest.raises(InputError, match=message):
        driver.explain(network(), "wide", out=str(tmp_path), **{**given, **change})


class Frozen(nn.Module):
    """A body that nobody trains, as in transfer learning, and what has been put behind it."""

    def __init__(self, net: Branched, no_grad: bool):
        super().__init__()
        self.net, self.no_grad = net, no_grad

    def forward(self, images):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            found = self.net.wide(self.net.features(images).flatten(1))
        return self.net.rest(found)


def test_a_body_without_gradients_is_refused_before_any_training(tmp_path):
    given = [picture_set(60, seed) for seed in range(3)]
    with pytest.raises(ValueError, match=r"no gradient leads from the layer to the pixels.*freeze"):
        driver.explain(Frozen(network(), True), "net.wide", *given, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    quick = {"target": 3, "hypotheses": False, "epochs_sae_final": 1, "stability_seeds": 0}
    net = Frozen(network().requires_grad_(False), False)
    run = driver.explain(net, "net.wide", *given, out=str(tmp_path / "out"), **quick)
    assert max(record["pattern_roughness"] for record in run.report) > 0


class Methods:
    """The two methods, on no module."""

    def preactivations(self, images):
        return images.flatten(1)

    def logits_from_preactivations(self, raw):
        return raw[:, :3]


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (Methods(), None, "the model is a Methods; explain() takes a torch.nn.Module that has the"),
        (Methods(), "wide", "the model is a Methods; explain() takes a torch.nn.Module$"),
        (network(), None, "Branched has no methods preactivations and logits_from_preactivations"),
    ],
)
def test_models_that_explain_cannot_take_are_named(tmp_path, model, layer, message):
    given = [picture_set(20, seed) for seed in range(3)]
    with pytest.raises(InputError, match=message.replace("()", r"\(\)")):
        driver.explain(model, layer, *given, out=str(tmp_path))


def test_what_the_caller_has_switched_on_makes_no_difference(tmp_path):
    """Inference mode, even for the images; autocast; doubles by default."""
    net, plain = network(), [picture_set(60, seed) for seed in range(3)]
    quick = {"target": 3, "epochs_sae_final": 1, "stability_seeds": 0}

    def results(name: str, given: list) -> dict[str, bytes]:
        run = driver.explain(net, "wide", *given, out=str(tmp_path / name), **quick)
        names = ("sae.safetensors", "feature_report.json", "hypotheses.json")
        return {name: (run.folder / name).read_bytes() for name in names}

    expected = results("plain", plain)
    with torch.inference_mode():
        assert results("inference", [picture_set(60, seed) for seed in range(3)]) == expected
        assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu"):
        assert results("autocast", plain) == expected
        assert torch.is_autocast_enabled("cpu")
    with double_by_default():
        assert results("double", plain) == expected
        assert torch.get_default_dtype() == torch.float64
    with torch.no_grad():
        assert results("no gradients", plain) == expected


def test_a_network_made_in_inference_mode_is_refused(tmp_path):
    given = [picture_set(20, seed) for seed in range(3)]
    with torch.inference_mode():
        net = copy.deepcopy(network())
    with pytest.raises(InputError, match=r"made in torch.inference_mode\(\).*; make it outside"):
        driver.explain(net, "wide", *given, out=str(tmp_path))


def test_workers_of_a_program_that_is_in_no_file_are_refused(tmp_path):
    """They would begin by reading it again."""
    program = """
import torch, MNIST_SAE_code
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
splits = [(torch.rand(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]
MNIST_SAE_code.explain(net, "1", *splits, workers=1)
"""
    ended = subprocess.run(
        [sys.executable, "-"], input=program, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stderr.splitlines()[-1].endswith(
        "InputError: worker processes cannot start from <stdin>; use workers=0, or a file"
    )


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    """As it stands there, on fewer steps."""
    block = block_of("README.md", "explain(net")
    assert len(block.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    quick = {"hypotheses": False, "epochs_sae_final": 1, "stability_seeds": 0}
    full = driver.explain
    monkeypatch.setattr(driver, "explain", lambda *a, **k: full(*a, **{**k, **quick}))
    scope: dict = {}
    exec(block, scope)
    assert scope["run"].sae.W_enc.shape == (32, 64)
    assert (tmp_path / "explained" / "feature_report.html").exists()


def test_the_notebook_runs_and_shows_its_pictures(tmp_path):
    """A copy of it, in a real kernel, on the bundled sample."""
    stored = nbformat.read(ROOT / "examples" / "own_network.ipynb", 4)
    fresh = copy.deepcopy(stored)
    (tmp_path / "examples").mkdir()
    for cell in fresh.cells:
        cell.source = cell.source.replace(
            'sys.path.insert(0, "..")', f"sys.path.insert(0, {str(ROOT)!r})"
        )
        cell.source = cell.source.replace("target=6", "target=6, stability_seeds=0")
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    NotebookClient(fresh, timeout=600, kernel_name="python3", resources=where).execute()
    for notebook in (stored, fresh):  # what is stored was run, too
        shown = [kind for cell in notebook.cells for kind in pictures_of(cell)]
        assert shown.count("image/png") == 2
    said = "".join(output.get("text", "") for output in fresh.cells[-1].outputs)
    assert re.search(r"confidence (High|Medium|Low)", said)


def pictures_of(cell) -> list[str]:
    return [kind for output in cell.get("outputs", []) for kind in output.get("data", {})]


# --- Strokes are named where there are strokes ---------------------------------------------------


def test_filled_shapes_are_no_strokes():
    digits = driver.load_images("sample").val.images
    assert fh.why_unlike_strokes(digits) is None
    filled = torch.zeros(20, 1, 28, 28)
    filled[:, :, 6:20, 8:22] = 1
    assert "of the ink lies 5 x 5 pixels thick" in fh.why_unlike_strokes(filled)
    photo = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert "blank ground" in fh.why_unlike_strokes(photo)


@pytest.mark.parametrize(
    ("name", "many"),
    [
        ("6", "6s"),
        ("Trouser", "trousers"),
        ("Dress", "dresses"),
        ("T-shirt/top", "T-shirts/tops"),
        ("Ankle boot", "ankle boots"),
        ("cherry", "cherries"),
        ("toy", "toys"),
        ("B", "Bs"),
        ("Trousers", "trousers"),
        ("McLaren", "McLarens"),
        ("TVset", "TVsets"),
        ("X-ray", "X-rays"),
        ("USB stick", "USB sticks"),
    ],
)
def test_what_images_of_a_class_are_called(name, many):
    assert fh.images_of([name], 0) == many


# --- The layout of SAELens -----------------------------------------------------------------------


def small_sae(seed: int = 0) -> driver.Coder:
    generator = torch.Generator().manual_seed(seed)
    sae = driver.JumpReLUSAE(5, 9).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.threshold.copy_(torch.rand(9, generator=generator))
    return driver.Coder(sae, torch.randn(5, generator=generator), torch.tensor([1, 2, 3, 0.5, 4.0]))


def test_an_sae_saved_for_saelens_works_on_raw_preactivations(tmp_path):
    coder = small_sae()
    driver.save_saelens(coder, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (5, 9, "float32")
    assert config["apply_b_dec_to_input"] is False
    assert {config["normalize_activations"], config["reshape_activations"]} == {"none"}
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    weights = {k: v.numpy() for k, v in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert set(weights) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}

    raw = 3 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(5))
    pre = raw.numpy() @ weights["W_enc"] + weights["b_enc"]
    acts = np.maximum(pre, 0) * (pre > weights["threshold"])
    z = (raw - coder.mu) / coder.std
    expected = coder.sae.encode(z)
    assert acts == pytest.approx(expected.numpy(), abs=1e-5)
    rebuilt = acts @ weights["W_dec"] + weights["b_dec"]
    assert rebuilt == pytest.approx((coder.sae(z) * coder.std + coder.mu).numpy(), abs=1e-4)
    again = driver.load_saelens(tmp_path)
    assert again.sae.encode(raw).numpy() == pytest.approx(acts, abs=1e-5)
    assert torch.equal(again.mu, torch.zeros(5))
    assert torch.equal(again.std, torch.ones(5))


def write_saelens(folder: Path, config: dict, **weights: torch.Tensor) -> Path:
    (folder / "cfg.json").write_text(json.dumps({"d_in": 5, "d_sae": 9, **config}))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def weights_of(sae: driver.JumpReLUSAE, *but: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in sae.state_dict().items() if k not in but}


def test_other_saes_of_saelens_load(tmp_path):
    sae = small_sae(2).sae
    raw = torch.randn(50, 5, generator=torch.Generator().manual_seed(6))
    expected = ((raw - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    for said in ({"apply_b_dec_to_input": True}, {}):  # True where nothing is said
        config = {"architecture": "standard", **said}
        written = write_saelens(tmp_path, config, **weights_of(sae, "threshold"))
        loaded = driver.load_saelens(written)
        assert loaded.sae.encode(raw).numpy() == pytest.approx(expected.numpy(), abs=1e-5)

    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True}
    config["apply_b_dec_to_input"] = False
    loaded = driver.load_saelens(write_saelens(tmp_path, config, **weights_of(sae, "threshold")))
    length = sae.W_dec.norm(dim=1)
    pre = (raw @ sae.W_enc + sae.b_enc) * length
    cut = pre.sort(dim=1, descending=True).values[:, 2:3]
    acts = torch.where(pre >= cut, pre.relu(), 0.0)
    assert loaded.sae.encode(raw).numpy() == pytest.approx(acts.numpy(), abs=1e-5)
    rebuilt = acts @ (sae.W_dec / length[:, None]) + sae.b_dec
    assert loaded.sae(raw).numpy() == pytest.approx(rebuilt.numpy(), abs=1e-5)
    with pytest.raises(InputError, match="fixed number of active features"):
        driver.save_saelens(loaded, tmp_path / "again")


def test_topk_of_the_layouts_before_6(tmp_path):
    sae = small_sae(2).sae
    raw = torch.randn(50, 5, generator=torch.Generator().manual_seed(6))
    pre = (raw - sae.b_dec) @ sae.W_enc + sae.b_enc
    cut = pre.sort(dim=1, descending=True).values[:, 2:3]
    acts = torch.where(pre >= cut, pre.relu(), 0.0)
    for kind in ("standard", "topk"):
        config = {"architecture": kind, "activation_fn_str": "topk"}
        config |= {"activation_fn_kwargs": {"k": 3}, "finetuning_scaling_factor": False}
        folder = write_saelens(tmp_path, config, **weights_of(sae, "threshold"))
        loaded = driver.load_saelens(folder)
        assert loaded.sae.encode(raw).numpy() == pytest.approx(acts.numpy(), abs=1e-5)


def test_thresholds_below_0_cannot_be_saved(tmp_path):
    """Theirs is a ReLU besides: nothing they could hold gives such an SAE's activations."""
    coder = small_sae()
    coder.sae.threshold[3] = -0.5
    raw = torch.randn(1000, 5, generator=torch.Generator().manual_seed(5))
    assert coder.sae.encode(raw).min() < 0
    with pytest.raises(InputError, match=r"^thresholds go down to -0\.5; SAELens has none"):
        driver.save_saelens(coder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


FOUR = "W_dec, W_enc, b_dec, b_enc"


@pytest.mark.parametrize(
    ("kind", "config", "but", "more", "message"),
    [
        ("jumprelu", {}, "threshold", "", f"its tensors are {FOUR}; jumprelu has {FOUR}, thresh"),
        ("jumprelu", {}, "threshold", "log_threshold", f"{FOUR}, log_threshold; jumprelu has"),
        ("standard", {}, "", "", f"its tensors are {FOUR}, threshold; standard has {FOUR}"),
        ("standard", {}, "threshold", "scaling_factor", "scaling_factor; standard has"),
        ("topk", {"k": 3}, "threshold", "W_skip", "W_skip, b_dec, b_enc; topk has"),
        ("standard", {}, "b_enc", "", "its tensors are W_dec, W_enc, b_dec, threshold; standard"),
        (
            "standard",
            {"activation_fn_str": "tanh-relu"},
            "threshold",
            "",
            "its activation function is 'tanh-relu', not relu or topk",
        ),
        (
            "jumprelu",
            {"activation_fn": "topk"},
            "",
            "",
            "its activation function is 'topk', not relu",
        ),
        ("standard", {"activation_fn_str": "topk"}, "threshold", "", "activation_fn_kwargs"),
        ("standard", {"finetuning_scaling_factor": True}, "threshold", "", "it scales its act"),
        ("jumprelu", {"rescale_acts_by_decoder_norm": True}, "", "", "it rescales its act"),
    ],
)
def test_nothing_of_an_sae_of_saelens_is_filled_in_or_ignored(
    tmp_path, kind, config, but, more, message
):
    weights = weights_of(small_sae().sae, but) | ({more: torch.ones(9)} if more else {})
    folder = write_saelens(tmp_path, {"architecture": kind, **config}, **weights)
    with pytest.raises(InputError, match=f"holds no SAE of SAELens .*{re.escape(message)}"):
        driver.load_saelens(folder)


def test_weights_of_saelens_are_floats(tmp_path):
    weights = weights_of(small_sae().sae) | {"W_enc": torch.ones(5, 9, dtype=torch.int8)}
    folder = write_saelens(tmp_path, {"architecture": "jumprelu"}, **weights)
    with pytest.raises(InputError, match=r"W_enc has numbers of torch.int8, not floats"):
        driver.load_saelens(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "it is gated"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "layer_norm"),
        ({"architecture": "jumprelu", "d_sae": 8}, "size mismatch"),
        ({}, "architecture"),
    ],
)
def test_saes_that_cannot_be_loaded_are_named(tmp_path, config, message):
    folder = write_saelens(tmp_path, config, **weights_of(small_sae().sae))
    with pytest.raises(InputError, match=f"holds no SAE of SAELens that can be used.*{message}"):
        driver.load_saelens(folder)
    with pytest.raises(InputError, match="No such file"):
        driver.load_saelens(tmp_path / "nowhere")
