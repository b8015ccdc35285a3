"""explain() of layers with positions, from a network and images to the finished folder."""

import json

import pytest
import torch
from PIL import Image
from small_networks import (
    CLASSES,
    MARK,
    SIDE,
    LastChannels,
    ResNet,
    ViT,
    marked_images,
    trained,
)
from test_fields import check_explained
from torch import nn
from torch.utils.data import Dataset

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import datasets, page, store, where
from saexplain.files import InputError, read_json
from saexplain.report import explain_sae
from saexplain.targets import KEPT, Comparison, choose_target

FAST = {"target": 4, "sae_latents": 40, "epochs_sae_final": 1, "stability_seeds": 0}


def splits(sizes=(600, 200, 200)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [marked_images(n, seed)[:2] for seed, n in enumerate(sizes)]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained(ResNet, 60)


@pytest.fixture(scope="module")
def explained(resnet, tmp_path_factory) -> driver.Run:
    out = tmp_path_factory.mktemp("layer1")
    return driver.explain(resnet, "layer1", *splits(), classes=CLASSES, out=out, **FAST)


def is_near_the_mark(run: driver.Run, feature: int, strongest: int) -> torch.Tensor:
    """(strongest,) bool, whether the feature peaks within a position of the mark in test images."""
    _, _, place = marked_images(200, 2)
    acts, position = run.layer.peaks(run.layer.splits["test"].raw)
    some = acts[:, feature].topk(strongest).indices
    center = where.center_of(position[some, feature], run.layer.positions, SIDE, SIDE)
    return (center - place[some] - MARK / 2).abs().amax(1) <= MARK


@pytest.mark.parametrize("name", ["feature_report.json", "summary.json"])
def test_fields_with_positions_are_explained(explained, name):
    _, found = check_explained(explained.folder, name)
    assert found & {"position_density", "l0_position_test"}


@pytest.mark.parametrize("kind", [None, LastChannels])
def test_influential_features_peak_at_the_planted_mark(explained, kind, tmp_path):
    run = explained
    if kind:
        given = {"classes": CLASSES, "out": tmp_path, "hypotheses": False, **FAST}
        run = driver.explain(trained(kind, 60), "norm", *splits(), **given)
    near = [is_near_the_mark(run, record["feature"], 30) for record in run.report[:6]]
    assert torch.cat(near).float().mean() >= 0.95


def test_numbers_of_positions_are_those_of_a_slow_count(explained, resnet):
    (record,) = read_json(explained.folder / "summary.json")
    layer, (images, labels) = explained.layer, splits()[2]
    acts = layer.acts_at(layer.raw(images))  # (N, P, d_sae)
    active = acts > 0
    assert record["l0_position_test"] == pytest.approx(float(active.double().sum(2).mean()), 1e-6)
    assert record["l0_image_test"] == pytest.approx(float(active.any(1).double().sum(1).mean()))
    assert record["achieved_actives_val"] == pytest.approx(4, abs=0.01)
    assert record["positions"] == 64
    z = layer.standardize(layer.raw(images))
    z_hat = layer.sae.decode(acts.flatten(0, 1)).view_as(z)
    fvu = (z - z_hat).square().sum() / (z - z.mean((0, 1))).square().sum()
    assert record["fvu"] == pytest.approx(float(fvu), rel=1e-3)
    assert record["fvu"] < record["fvu_untrained"] < 1
    predicted = layer.logits(layer.from_z(z_hat, layer.raw(images))).argmax(1)
    assert record["recon_acc_jumprelu"] == pytest.approx(
        float((predicted == labels).double().mean())
    )
    assert record["agreement_jumprelu"] > 0.97


def test_files_and_records_of_a_layer_with_positions(explained):
    folder = explained.folder
    for name in ("feature_report.html", "hypotheses.md", "saelens/cfg.json", "settings.json"):
        assert (folder / name).stat().st_size > 100, name
    assert (folder / "feature_report.html").stat().st_size < 8e6
    for record in explained.report:
        for ending in ("gallery.png", "pattern.png", "pattern.npy"):
            assert (folder / f"feature_{record['feature']}_{ending}").stat().st_size > 100
        assert 0 <= record["position_density"] <= record["mean_active"] <= 1
        assert not any(row.strip(".") for row in record["hypothesis"]["drawing"])
    tested = [record["evidence"]["results"] for record in explained.report]
    assert sum("confirmed" in results.values() for results in tested) > 5


def test_a_branch_and_a_class_token_are_explained(tmp_path, monkeypatch, capsys):
    net = trained(ViT, 60)
    monkeypatch.setattr(page, "PAGE_BYTES", 0)
    monkeypatch.setattr(page, "FEWEST_SHOWN", 12)
    out = tmp_path / "branch"
    run = driver.explain(net, "blocks.1.attn", *splits(), classes=CLASSES, out=out, **FAST)
    (record,) = read_json(run.folder / "summary.json")
    assert record["positions"] == 17
    images, _ = splits()[2]
    torch.testing.assert_close(run.layer.logits(run.layer.raw(images)), net(images))
    assert max(entry["prefix_share"] for entry in run.report) > 0.5  # some are on the token
    assert (
        f"shows the 12 features of most influence of {len(run.report)}" in capsys.readouterr().out
    )
    assert len(run.report) > 12  # the page leaves some out, feature_report.json none


class Marked(Dataset):
    classes = CLASSES

    def __init__(self, n: int, seed: int):
        self.images, self.labels, _ = marked_images(n, seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.images[i], int(self.labels[i])


@pytest.mark.parametrize("name", ["layer2", "layer2.bn2", "wide"])
def test_images_and_activations_larger_than_memory(resnet, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "MEMORY_CAP", 0)
    monkeypatch.setattr(store, "MEMORY_SHARE", 0)
    three = Marked(600, 0), Marked(200, 1), Marked(200, 2)
    run = driver.explain(resnet, name, *three, out=tmp_path, **FAST)
    printed = capsys.readouterr().out
    assert "read when needed" in printed
    assert "activations in 16 bits" in printed
    (record,) = read_json(run.folder / "summary.json")
    assert record["agreement_jumprelu"] > 0.95
    assert run.data.classes == CLASSES
    driver.explain(resnet, name, *three, out=tmp_path, **FAST)
    again = capsys.readouterr().out
    assert "600 images are there" in again
    assert "reusing the SAE" in again


def test_a_folder_of_photographs_is_explained_in_one_call(resnet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(CLASSES):
        images, labels, _ = marked_images(400, 7)
        folder = tmp_path / "photos" / f"{label} {name}"
        folder.mkdir(parents=True)
        for i, image in enumerate(images[labels == label]):
            pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{i}.png")
    run = driver.explain(resnet, "layer2", "photos", target=4, sae_latents=40, stability_seeds=0)
    assert run.folder.as_posix() == "explained/ResNet_layer2"
    assert run.data.classes == tuple(f"{label} {name}" for label, name in enumerate(CLASSES))
    words = " ".join(capsys.readouterr().out.split())
    assert "a map (16, 4, 4): 4 x 4 positions; results go to explained" in words
    assert (run.folder / "feature_report.html").exists()


def test_the_target_is_the_smallest_that_keeps_the_predictions(resnet, tmp_path, capsys):
    given = {**FAST, "target": None, "hypotheses": False}
    run = driver.explain(resnet, "layer2", *splits(), out=tmp_path, **given)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("target  predictions kept"))
    rows = [line.split() for line in lines[at + 1 : at + 4]]
    assert [int(row[0]) for row in rows] == [5, 10, 20]
    chosen = [int(row[0]) for row in rows if row[-1] == "chosen"]
    enough = [int(row[0]) for row in rows if float(row[1].rstrip("%")) >= 100 * KEPT]
    assert chosen == [min(enough, default=20)] == [run.settings.target_actives[0]]


def test_without_enough_agreement_the_largest_target_is_taken():
    rows = [
        Comparison(t, kept, 0.1, 0.2, 0.3, 0.4) for t, kept in ((5, 0.9), (10, 0.97), (20, 0.975))
    ]
    assert choose_target(rows) == 20
    assert choose_target([*rows, Comparison(40, 0.98, 0, 0, 0, 0)]) == 40


def test_a_frozen_extractor_is_explained_without_patterns(resnet, tmp_path):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = resnet.layer1, nn.Linear(12, 4)

        def forward(self, x):
            with torch.no_grad():
                found = self.body(x)
            return self.head(found.mean((2, 3)))

    run = driver.explain(Frozen(), "body", *splits(), out=tmp_path, **FAST)
    assert all(record["pattern_roughness"] is None for record in run.report)
    assert (run.folder / "feature_report.html").exists()


def test_arguments_that_cannot_be_used_are_named(resnet, tmp_path):
    given = {"out": tmp_path, **FAST}
    with pytest.raises(InputError, match=r"explain\(\) has no setting 'layers'"):
        driver.explain(resnet, "layer2", *splits(), layers=3, **given)
    with pytest.raises(ValueError, match="layout must be one of"):
        driver.explain(resnet, "layer2", *splits(), layout="rows", **given)
    with pytest.raises(InputError, match="positions_per_image must be at least 1, got 0"):
        driver.explain(resnet, "layer2", *splits(), positions_per_image=0, **given)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_an_sae_that_is_trained_already_is_explained_at_positions(explained, resnet, tmp_path):
    layer = explained.layer
    given = layer.sae, layer.mu, layer.std, *splits()
    records = explain_sae(resnet, "layer1", *given, tmp_path, classes=CLASSES)
    own = {record["feature"]: record for record in explained.report}
    for record in records:
        assert record["influence"] == pytest.approx(own[record["feature"]]["influence"], abs=1e-4)
        assert record["caption"] == own[record["feature"]]["caption"]
    assert (tmp_path / "feature_report.html").exists()


def test_a_second_layer_has_a_folder_of_its_own_and_a_shared_one_is_named(
    resnet, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given, drawn, usual = {**FAST, "hypotheses": False}, [], driver.report.write_history

    def write_history(folder, classifier, sae, target, logits_from, dead):
        drawn.append(logits_from)
        usual(folder, classifier, sae, target, logits_from, dead)

    monkeypatch.setattr(driver.report, "write_history", write_history)
    normalized = [((images - 0.4) / 0.2, labels) for images, labels in splits()]
    first = driver.explain(resnet, "layer2", *normalized, mean=[0.4] * 3, std=[0.2] * 3, **given)
    pictures = first.data.display.pictures(first.data.val.images)
    torch.testing.assert_close(pictures, splits()[1][0], atol=1e-5, rtol=0)
    second = driver.explain(resnet, "wide", *splits(), **given)
    assert first.folder != second.folder
    assert drawn == [None, driver.SCHEDULE.logit_kl_from]  # of positions no logits are used
    capsys.readouterr()
    driver.explain(resnet, "wide", *splits(), out=first.folder, **given)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{first.folder} has results for layer layer2 of ResNet; they are replaced" in printed


def test_few_latents_limit_the_targets_that_are_tried(resnet, tmp_path, capsys):
    given = {"stability_seeds": 0, "hypotheses": False, "out": tmp_path}
    run = driver.explain(resnet, "layer2", *splits(), sae_latents=16, **given)
    assert run.settings.target_actives[0] in (5, 10)
    with pytest.raises(InputError, match="give target=: sae_latents=4 is below all of"):
        driver.explain(resnet, "layer2", *splits(), sae_latents=4, **given)


def test_a_model_with_positions_of_its_own_methods(resnet, tmp_path):
    class Own(nn.Module):
        positions = fa.Positions((8, 8))

        def __init__(self):
            super().__init__()
            self.body, self.head = resnet.layer1, nn.Linear(12, 4)

        def preactivations(self, images):
            return self.body(images).flatten(2).mT

        def logits_from_preactivations(self, raw):
            return self.head(raw.mean(1).flatten(1))

    run = driver.explain(Own(), None, *splits(), out=tmp_path, **FAST)
    assert run.layer.positions.n == 64
