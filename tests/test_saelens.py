"""saexplain.saelens: SAEs written for SAELens, and SAEs that it wrote, against its formulas."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import feature_analysis as fa
from saexplain.files import InputError
from saexplain.sae import JumpReLUSAE
from saexplain.saelens import load_saelens, model_card, save_saelens

D_IN, D_SAE = 5, 9
RAW = 3 * torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(5))


def small_layer() -> fa.ExplainedLayer:
    generator = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(D_IN, D_SAE).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.threshold.copy_(torch.rand(D_SAE, generator=generator))
    mu, std = torch.randn(D_IN, generator=generator), torch.tensor([1, 2, 3, 0.5, 4.0])
    return fa.ExplainedLayer(None, sae, mu, std)


def write_saelens(folder: Path, config: dict, **changes: torch.Tensor | None) -> Path:
    """A folder with the weights of small_layer, some of them changed or left out (None)."""
    weights = {k: v.clone() for k, v in small_layer().sae.state_dict().items()} | changes
    weights = {k: v for k, v in weights.items() if v is not None}
    (folder / "cfg.json").write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, **config}))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def largest(pre: torch.Tensor, k: int) -> torch.Tensor:
    """pre (N, d_sae) where it is among the k largest of its row and positive; 0 elsewhere."""
    return torch.where(pre >= pre.sort(1, descending=True).values[:, k - 1 : k], pre.relu(), 0.0)


def close(a, b) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_what_is_saved_reads_raw_activations(tmp_path):
    layer = small_layer()
    save_saelens(layer, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", D_IN, D_SAE)
    assert config["apply_b_dec_to_input"] is False
    assert {config["normalize_activations"], config["reshape_activations"]} == {"none"}
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    w = load_file(tmp_path / "sae_weights.safetensors")
    assert set(w) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    pre = RAW @ w["W_enc"] + w["b_enc"]
    acts = pre.relu() * (pre > w["threshold"])
    close(acts, layer.feature_acts(RAW))
    close(acts @ w["W_dec"] + w["b_dec"], layer.sae(layer.standardize(RAW)) * layer.std + layer.mu)
    sae, mu, std = load_saelens(tmp_path)
    close(sae.encode(RAW), acts)
    assert torch.equal(mu, torch.zeros(D_IN))
    assert torch.equal(std, torch.ones(D_IN))


def test_the_card_has_the_numbers_of_the_run_and_its_lines_load_it(finished, loaded):
    (record,) = json.loads((finished / "summary.json").read_text())
    card = (finished / "saelens" / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert front.splitlines()[0] == "library_name: saelens"
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    assert rows["data"] == "bundled sample of 5,000 MNIST training digits"
    assert rows["license of the data"] == "CC BY-SA 3.0"
    assert rows["reads"] == "rows of 128 numbers, one per image"
    assert (rows["latents"], rows["target, active features per row"]) == ("32", "4")
    assert rows["FVU, test images"] == f"{record['fvu']:.4f}"
    assert rows["L0, test images"] == f"{record['achieved_actives_test']:.2f}"
    assert rows["agreement, test images"] == f"{record['agreement_jumprelu']:.2%}"
    code = body.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")
    # As the card says, the SAE reads the layer's own output.
    raw = loaded.layer.splits["test"].raw
    close(load_saelens(finished / "saelens")[0].encode(raw), loaded.layer.feature_acts(raw))


def test_only_mnist_has_a_license_that_is_known(finished, loaded):
    (record,) = json.loads((finished / "summary.json").read_text())
    for source, known in (
        ("MNIST, full set of 70,000 digits", True),
        ("FashionMNIST, full set of 70,000 images", False),
        ("MNIST, full set of 500 images", False),  # a folder of that name
    ):
        card = model_card(loaded.layer, {**record, "data": source}, "a network", "saelens")
        assert ("CC BY-SA 3.0" in card) == known
        assert ("see the data's own" in card) != known


def test_the_card_names_network_images_and_what_l0_counts(finished, loaded):
    card = " ".join((finished / "saelens" / "README.md").read_text().split())
    assert "# SAE of a 784-128-10 MNIST classifier |" in card
    (n_train,) = loaded.data.train.labels.shape
    assert f"| trained on | {n_train:,} training images |" in card
    assert "| L0, test images |" in card


@pytest.mark.parametrize("dead", [False, True])
def test_a_topk_sae_loads_with_activations_in_units_of_decoder_rows(tmp_path, dead):
    """Also with a row of W_dec that is 0, which has no unit."""
    W_dec = small_layer().sae.W_dec.detach().clone()
    W_dec[4 if dead else []] = 0
    config = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": False}
    config["rescale_acts_by_decoder_norm"] = True
    loaded, *_ = load_saelens(write_saelens(tmp_path, config, threshold=None, W_dec=W_dec))
    sae, length = small_layer().sae, W_dec.norm(dim=1)
    acts = largest((RAW @ sae.W_enc + sae.b_enc) * length, 3)
    close(loaded.encode(RAW), acts)
    close(loaded(RAW), acts @ (W_dec / length.clamp(min=1e-12)[:, None]) + sae.b_dec)
    with pytest.raises(InputError, match="fixed number of active features"):
        save_saelens(fa.ExplainedLayer(None, loaded, RAW[0], RAW[0].abs()), tmp_path / "again")


STANDARD, JUMP = {"architecture": "standard"}, {"architecture": "jumprelu"}
TOPK = {"architecture": "topk", "k": 3}
OLD = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}  # before layout 6
OLD["finetuning_scaling_factor"] = False


@pytest.mark.parametrize(
    ("config", "k"),
    [
        (STANDARD, D_SAE),  # apply_b_dec_to_input is True by default
        (STANDARD | {"apply_b_dec_to_input": True}, D_SAE),
        (STANDARD | OLD, 3),
        ({"architecture": "topk", **OLD}, 3),
    ],
)
def test_other_saes_load(tmp_path, config, k):
    sae = small_layer().sae
    loaded, _, _ = load_saelens(write_saelens(tmp_path, config, threshold=None))
    close(loaded.encode(RAW), largest((RAW - sae.b_dec) @ sae.W_enc + sae.b_enc, k))


@pytest.mark.parametrize(("std", "lowest"), [(1.0, -0.5), (1e-42, 0.5)])
def test_what_saelens_cannot_hold_is_not_saved(tmp_path, std, lowest):
    layer = small_layer()
    layer.sae.threshold[3] = lowest
    layer = fa.ExplainedLayer(None, layer.sae, layer.mu, torch.full((D_IN,), std))
    with pytest.raises(InputError, match=r"down to -0\.5" if lowest < 0 else "of W_enc are not"):
        save_saelens(layer, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


ONES = torch.ones(D_SAE)
RESCALED = {"rescale_acts_by_decoder_norm": True}
HUGE = {"W_enc": torch.full((D_IN, D_SAE), 1e38), "W_dec": torch.full((D_SAE, D_IN), 1e38)}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {}, "architecture"),
        ({"architecture": "gated"}, {}, "its architecture is gated"),
        (STANDARD | {"normalize_activations": "layer_norm"}, {}, "layer_norm"),
        (JUMP | {"d_sae": 8}, {}, "W_enc must have shape (5, 8), got (5, 9)"),
        (JUMP, {"threshold": None}, "its tensors are W_dec, W_enc, b_dec, b_enc; jumprelu has"),
        (JUMP, {"threshold": None, "log_threshold": ONES}, "log_threshold; jumprelu has"),
        (STANDARD, {}, "threshold; standard has"),
        (TOPK, {"threshold": None, "W_skip": ONES}, "W_skip, b_dec, b_enc; topk has"),
        (STANDARD | {"activation_fn_str": "tanh-relu"}, {"threshold": None}, "'tanh-relu', not"),
        (JUMP | {"activation_fn": "topk"}, {}, "'topk', not relu"),
        (STANDARD | {"activation_fn": "topk"}, {"threshold": None}, "it has no k"),
        (TOPK | {"k": 10}, {"threshold": None}, "k is 10; it must be from 1 to 9"),
        (STANDARD | {"finetuning_scaling_factor": True}, {"threshold": None}, "it scales"),
        (JUMP | RESCALED, {}, "it rescales its activations"),
        (JUMP, {"W_enc": torch.ones(D_IN, D_SAE).byte()}, "W_enc must be floats"),
        (JUMP, {"b_dec": torch.full((D_IN,), torch.inf)}, "are not, first at (0,)"),
        (TOPK | RESCALED, {"threshold": None, **HUGE}, "of W_enc are not"),
    ],
)
def test_nothing_of_an_sae_is_filled_in_or_ignored(tmp_path, config, changes, message):
    write_saelens(tmp_path, config, **changes)
    with pytest.raises(InputError, match=f"holds no SAE of SAELens .*{re.escape(message)}"):
        load_saelens(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cfg\.json cannot be read"):
        load_saelens(tmp_path)
    write_saelens(tmp_path, JUMP)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"sae_weights\.safetensors is damaged"):
        load_saelens(tmp_path)


@pytest.mark.slow
def test_sae_lens_itself_reads_what_is_saved_and_is_read(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    layer = small_layer()
    save_saelens(layer, tmp_path / "ours")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "ours"))
    with torch.no_grad():
        close(theirs.encode(RAW), layer.feature_acts(RAW))
        for kind in ("jumprelu", "standard", "topk"):
            sae_class, config_class = get_sae_class(kind)
            config = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": kind != "jumprelu"}
            sae = sae_class(config_class(**config, **({"k": 3} if kind == "topk" else {})))
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape).abs())
            sae.save_model(str(tmp_path / kind))
            loaded, _, _ = load_saelens(tmp_path / kind)
            close(loaded.encode(RAW), sae.encode(RAW))
            close(loaded(RAW), sae(RAW))
