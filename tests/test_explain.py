"""explain() and explain_sae(), from a network and images to the finished folder."""

import json
import shutil

import pytest
import torch
from conftest import contents_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import MNIST_SAE_code as driver
from saexplain.files import InputError
from saexplain.report import explain_sae
from saexplain.sae import TopKSAE
from saexplain.saelens import load_saelens

NAMES = ("sky", "sea", "sand")
SIZES = (300, 80, 90)  # of the three splits
FAST = {"target": 3, "sae_latents": 32, "epochs_sae_final": 1, "stability_seeds": 0}
FAST |= {"hypotheses": False, "features": 2}


def pictures(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Color images (n, 3, 8, 8); the channel of their label is brighter."""
    labels = torch.arange(n) % 3
    images = 0.3 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(n), labels] += 1.0
    return images, labels


def splits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [pictures(n, seed) for seed, n in enumerate(SIZES)]


def network() -> nn.Sequential:
    """Linear up to the layer "1", whose first three units measure the channels' brightness."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = nn.Linear(192, 6)
    net = nn.Sequential(nn.Flatten(), body, nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(6, 3))
    with torch.no_grad():
        body.weight[:3] = 0.02 * torch.eye(3).repeat_interleave(64, 1)
        net[4].weight.copy_(4 * torch.eye(3, 6))
        net[4].bias.zero_()
    return net


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A network, the run that explains it, and how many images its layer was given in each call."""
    net, seen, out = network(), [], tmp_path_factory.mktemp("own")
    hook = net[1].register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))
    run = driver.explain(net, "1", *splits(), classes=NAMES, out=str(out), **FAST)
    hook.remove()
    return net, run, seen


def test_a_run_describes_the_layer_and_leaves_the_network_alone(explained):
    net, run, _ = explained
    raw = splits()[1][0].flatten(1) @ net[1].weight.T + net[1].bias
    acts = run.layer.feature_acts(raw.detach())
    assert acts.shape == (SIZES[1], 32)
    assert (acts > 0).sum(1).double().mean() == pytest.approx(3, abs=2 / SIZES[1])
    assert len(run.report) == 2
    for record in run.report:
        density = (acts[:, record["feature"]] > 0).double().mean()
        assert record["mean_active"] == pytest.approx(float(density), abs=1.1 / SIZES[1])
    for name in ("settings.json", "feature_report.html", "sae.safetensors", "saelens/cfg.json"):
        assert (run.folder / name).stat().st_size > 100, name
    (summary,) = json.loads((run.folder / "summary.json").read_text())
    assert summary["baseline_acc"] > 0.95
    assert net.training
    for found, kept in zip(net.parameters(), network().parameters(), strict=True):
        assert torch.equal(found, kept)


def test_each_split_goes_through_the_network_once(explained):
    _, _, seen = explained
    assert [seen.count(n) for n in SIZES] == [1, 1, 1]
    # A single image leads each batch of replaced outputs past the layer.
    probes = [n for n in seen if n > 1 and n not in SIZES]
    assert max(probes) < 40
    assert sum(probes) < 500


def test_equal_inputs_reuse_the_sae_and_others_do_not(explained, tmp_path, capsys):
    net, run, _ = explained
    own = {"classes": NAMES, "out": str(shutil.copytree(run.folder, tmp_path / "copy")), **FAST}
    again = driver.explain(net, "1", *splits(), **own)
    assert "reusing the SAE" in capsys.readouterr().out
    assert torch.equal(again.layer.sae.W_enc, run.layer.sae.W_enc)
    other = network()
    with torch.no_grad():
        other[4].weight[0, 0] += 0.5  # what comes after the layer counts as well
    driver.explain(other, "1", *splits(), **own)
    assert "another network or layer: retraining the SAE" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"explains layer 1 of Sequential, which .*: call explain\(\)"
    ):
        driver.load_run(own["out"])


def test_a_saelens_folder_is_explained(explained, tmp_path, capsys):
    net, run, _ = explained
    given = load_saelens(run.folder / "saelens")
    records = explain_sae(net, "1", *given, *splits(), tmp_path, classes=NAMES)
    shown = capsys.readouterr().out
    assert "\nResult after " in shown
    assert str(tmp_path / "feature_report.html") in shown
    assert max(map(len, shown.replace(str(tmp_path), "").splitlines())) <= 100
    influence = [record["influence"] for record in records]
    assert influence == sorted(influence, reverse=True)
    assert influence[0] == pytest.approx(run.report[0]["influence"], abs=1e-4)
    assert records[0]["feature"] == run.report[0]["feature"]
    shown = [record for record in records if record["evidence"]["effects"]]
    assert any(name in line for record in shown for line in record["measured"] for name in NAMES)
    for name in ("feature_report.html", "hypotheses.md", "summary.json"):
        assert (tmp_path / name).stat().st_size > 100, name


def test_explain_sae_names_what_it_replaces_and_replaces_it_when_complete(
    explained, tmp_path, monkeypatch, capsys
):
    net, run, _ = explained
    folder, other = shutil.copytree(run.folder, tmp_path / "run"), top_k_of(run.layer.sae)
    other.W_enc.mul_(2)

    def explain(sae) -> str:
        capsys.readouterr()
        given = (sae, run.layer.mu, run.layer.std, *splits(), folder)
        explain_sae(net, "1", *given, hypotheses=False, features=2)
        return " ".join(capsys.readouterr().out.split())

    before = contents_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr("saexplain.report.write_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explain(run.layer.sae)
    assert before.items() <= contents_of(folder).items()
    line = f"{folder} has results of {{}}; they are replaced when this run has finished"
    assert line.format("explain() for layer 1 of Sequential") in explain(run.layer.sae)
    assert not (folder / "sae.json").exists()
    assert "replaced" not in explain(run.layer.sae)
    assert line.format("another SAE") in explain(other)
    with pytest.raises(InputError, match="which is not stored there"):
        driver.load_run(folder)


def test_the_callers_torch_state_makes_no_difference(explained, tmp_path):
    net, run, _ = explained
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            data = [(images.float().clone(), labels.clone()) for images, labels in DATA]
            own = driver.explain(net, "1", *data, classes=NAMES, out=str(tmp_path), **FAST)
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("sae.safetensors", "feature_report.json"):
        assert (own.folder / name).read_bytes() == (run.folder / name).read_bytes()


DATA = TRAIN, VAL, TEST = splits()
PART = tuple(part[5:12] for part in TRAIN)
POSITIONS = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "11"}, "no layer '11'; it has 1, "),
        ({"model": POSITIONS, "layer": "0", "pool": "mean"}, "reads more of layer '0' than pool"),
        ({"model": network(), "layer": None}, "has no methods preactivations"),
        ({"model": nn.Sequential(*network(), nn.Softmax(1))}, "must return logits"),
        ({"classes": ("a", "b")}, "classes has 2 different names; the network has 3 logits"),
        ({"classes": ("a", "b", "b")}, "classes has 2 different names"),
        ({"layers": 3}, r"explain\(\) has no setting 'layers'"),
        ({"val": (VAL[0], VAL[1] + 1)}, "labels of val run from 1 to 3"),
        ({"val": DataLoader(TensorDataset(*VAL), 8, shuffle=True)}, "val, .*must not shuffle"),
        ({"val": PART}, "all 7 images of val are in train, too"),
        ({"test": PART}, "all 7 images of test are in train, too"),
        ({"test": VAL}, "all 80 images of test are in val, too"),
    ],
)
def test_what_cannot_be_explained_is_named_before_training(tmp_path, change, message):
    given = {"model": network(), "layer": "1", "train": TRAIN, "val": VAL, "test": TEST}
    with pytest.raises(ValueError, match=message):
        driver.explain(out=str(tmp_path), **{**given, **change})
    assert not (tmp_path / "sae.json").exists()


def test_images_in_two_splits_and_other_scales_are_reported(tmp_path, capsys):
    more = tuple(torch.cat([a, b[:3]]) for a, b in zip(TEST, TRAIN, strict=True))
    driver.explain(network(), "1", TRAIN, (255 * VAL[0], VAL[1]), more, out=str(tmp_path), **FAST)
    printed = capsys.readouterr().out
    assert "3 of 93 test images are also training images" in printed
    assert "the layer's outputs on validation images lie" in printed
    assert "the layer's outputs on test images lie" not in printed


class PlainReLU:
    """An SAE with no more than `explain_sae` asks for."""

    def __init__(self, sae):
        self.W_enc, self.W_dec, self.sae = sae.W_enc, sae.W_dec, sae

    def encode(self, z):
        return (z @ self.sae.W_enc + self.sae.b_enc).relu()

    def decode(self, feature_acts):
        return feature_acts @ self.sae.W_dec + self.sae.b_dec


def top_k_of(sae) -> TopKSAE:
    top_k = TopKSAE(*sae.W_enc.shape, k=3)
    top_k.load_state_dict(sae.state_dict())
    return top_k.requires_grad_(False)


@pytest.mark.parametrize("kind", [PlainReLU, top_k_of])
def test_saes_without_thresholds_are_explained_as_well(explained, tmp_path, kind):
    net, run, _ = explained
    given = kind(run.layer.sae), run.layer.mu, run.layer.std
    records = explain_sae(net, "1", *given, *splits(), tmp_path, hypotheses=False, features=2)
    assert len(records) == 2
    assert (tmp_path / "feature_report.html").exists()


def test_what_does_not_fit_is_an_error_before_anything_is_deleted(explained, tmp_path):
    net, run, _ = explained
    (tmp_path / "summary.json").write_text("[]")
    sae, long = run.layer.sae, torch.ones(7)
    for mu, std, options in (
        (long, long, {}),
        (run.layer.mu, run.layer.std, {"n_eval": 0}),
        (run.layer.mu, run.layer.std, {"no_such_option": 1}),
    ):
        with pytest.raises(ValueError, match=r"mu|n_eval|no_such_option"):
            explain_sae(net, "1", sae, mu, std, *splits(), tmp_path, **options)
    assert (tmp_path / "summary.json").read_text() == "[]"
