"""Runs side by side, and their features matched: saexplain.compare and its page."""

import html
import json
import re
import shutil
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
import torch
from conftest import BARE
from test_reproducibility import Plain, noise, permuted, random_sae

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import compare as cmp
from saexplain import compare_page
from saexplain.compare_page import comparison_page
from saexplain.files import InputError
from saexplain.saelens import load_saelens

D_SAE, DEAD = 12, 11
IMAGES = noise(90, 1, 2, 3, seed=9)  # whose six pixels are what the layer gives


class Pixels(Plain):
    """A model whose activations are the pixels, in an order of its own."""

    def __init__(self, order=range(6)):
        self.order = list(order)

    def preactivations(self, images):
        return images.flatten(1)[:, self.order]


def layer_with(sae, order=range(6)) -> fa.ExplainedLayer:
    model = Pixels(order)
    raw = model.preactivations(IMAGES)
    split = fa.Activations(IMAGES, torch.arange(90) % 6, raw)
    splits = dict.fromkeys(("train", "val", "test"), split)
    sae = Decoding(sae, torch.zeros(6))
    return fa.ExplainedLayer(model, sae, torch.zeros(6), torch.ones(6), splits)


class Decoding:
    """An SAE with the decoder that `measure_fidelity` needs."""

    def __init__(self, sae, b_dec: torch.Tensor):
        self.encode, self.W_enc, self.W_dec, self.b_dec = sae.encode, sae.W_enc, sae.W_dec, b_dec

    def decode(self, feature_acts):
        return feature_acts @ self.W_dec + self.b_dec


def alive(values: torch.Tensor) -> list:
    return values[torch.arange(D_SAE) != DEAD].tolist()


def test_the_features_of_a_permuted_sae_are_matched_by_direction_and_activation():
    sae = random_sae()
    other, order = permuted(sae)
    comparison = cmp.compare_runs(layer_with(sae), layer_with(other), out=None)
    (pair,) = comparison.pairs
    assert pair.same_layer
    ours, theirs = pair.features
    assert alive(ours.matches.feature) == alive(torch.argsort(order))
    for similar in (ours.matches.cosine, ours.matches.correlation):
        assert alive(similar) == pytest.approx(11 * [1], abs=1e-5)
    assert sorted(ours.listed(matched=True)) == [k for k in range(D_SAE) if k != DEAD]
    assert ours.listed(matched=False) == []  # a dead feature is in neither
    assert theirs.share() == pytest.approx(1)
    assert comparison.in_both(pair)[0] == (
        "11 of 11 active features of A are in B, 100% of the influence"
    )


def test_of_another_network_only_activations_are_compared():
    """The other network gives the same numbers in another order, its SAE reads them so."""
    sae, order = random_sae(), [3, 1, 5, 0, 2, 4]
    moved = sae._replace(W_enc=sae.W_enc[order], W_dec=sae.W_dec[:, order])
    moved, features = permuted(moved)
    comparison = cmp.compare_runs(layer_with(sae), layer_with(moved, order), out=None)
    (pair,) = comparison.pairs
    assert not pair.same_layer
    matches = pair.features[0].matches
    assert alive(matches.feature) == alive(torch.argsort(features))
    assert alive(matches.correlation) == pytest.approx(11 * [1], abs=1e-5)
    assert matches.cosine.isnan().all()
    page = comparison_page(comparison, None).decode()
    assert "not comparable" in page
    assert "on the same 90 test images of A" in " ".join(page.split())
    assert "cosine 1.00" not in page
    assert page.count("correlation 1.00") == 11


def test_features_of_one_sae_alone_are_listed_by_influence():
    """Of twelve features the other SAE has the last six; a logit is an activation of the layer, so
    that what a feature adds to the logits is its activation times its decoder row."""
    sae = random_sae()
    fewer = type(sae)(sae.W_enc[:, 6:], sae.b_enc[6:], sae.threshold[6:], sae.W_dec[6:])
    (pair,) = cmp.compare_runs(layer_with(sae), layer_with(fewer), out=None).pairs
    raw = IMAGES.flatten(1)
    centered = sae.W_dec - sae.W_dec.mean(1, keepdim=True)
    size = sae.encode(raw).sum(0) * centered.norm(dim=1)
    size = size / size.sum()
    assert pair.features[0].influence.tolist() == pytest.approx(size.tolist(), abs=1e-5)
    acts, rows = sae.encode(raw).numpy(), sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    alike = np.minimum(np.corrcoef(acts[:, :DEAD].T), (rows[:DEAD] @ rows[:DEAD].T).numpy())
    alone = [k for k in range(6) if alike[k, 6:].max() < 0.7]
    assert len(alone) > 3
    assert pair.features[0].listed(matched=False) == sorted(alone, key=lambda k: -size[k])
    assert pair.features[1].listed(matched=False) == []


def test_a_layer_without_an_sae_is_the_layer_of_those_given():
    layer = layer_with(random_sae())
    parts = (layer.sae, layer.mu, layer.std)
    saes = {"one": parts, "two": parts}
    comparison = cmp.compare_runs(layer.with_sae(None), saes=saes, out=None)
    assert [one.title for one in comparison.compared] == ["one", "two"]
    assert comparison.in_both(comparison.pairs[0])[1].startswith(
        "11 of 11 active features of B are in A"
    )


def test_an_sae_that_standardizes_otherwise_is_matched_and_measured_in_the_same_units():
    sae = random_sae()
    layer = layer_with(sae)
    mu, std = noise(6, seed=3), noise(6, seed=4).abs() + 0.5
    W_enc = sae.W_enc * std[:, None]
    b_enc = sae.b_enc + mu @ sae.W_enc
    theirs = sae._replace(W_enc=W_enc, b_enc=b_enc, W_dec=sae.W_dec / std)
    with_decode = Decoding(theirs, -mu / std)
    comparison = cmp.compare_runs(layer, saes={"theirs": (with_decode, mu, std)}, out=None)
    ours, other = (one.record for one in comparison.compared)
    for key in ("fvu", "agreement_jumprelu", "ce_recovered", "achieved_actives_test"):
        assert other[key] == pytest.approx(ours[key], rel=1e-4)
    (pair,) = comparison.pairs
    assert alive(pair.features[0].matches.feature) == alive(torch.arange(D_SAE))
    assert alive(pair.features[0].matches.cosine) == pytest.approx(11 * [1], abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Finished runs
# --------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_files(finished, loaded, tmp_path, capsys):
    out = tmp_path / "compare.html"
    argv = ["compare", str(finished), str(finished / "saelens"), "--out", str(out)]
    records = driver.main(argv)
    (record,) = json.loads((finished / "summary.json").read_text())
    assert records[0] == record
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    rows = {name: cells for name, *cells in (re.split("  +", line.strip()) for line in lines)}
    assert rows["variance that the SAE loses (FVU)"] == 2 * [
        f"{record['fvu']:.4f}"
    ]  # the same SAE, folded into raw units
    l0 = f"{record['achieved_actives_test']:.1f}"
    assert rows["features active per image (L0)"] == [l0, l0]
    assert rows["F1 of hypotheses, weighted by influence"] == [
        f"{record['f1_by_influence']:.3f}",
        "-",
    ]
    kept = [s["agreement_hypotheses"] for s in record["hypotheses"]["summaries"].values()]
    assert rows["predictions kept by drawings of all features"] == [f"{kept[0]:.2%}", "-"]
    assert rows["by those of the best baseline"] == [f"{max(kept[1:]):.2%}", "-"]
    mean = record["reproducibility"]["variance"]["mean"]
    assert rows["their share of the variance"] == [f"{mean:.1%}", "-"]
    active = (loaded.layer.feature_acts(loaded.layer.splits["test"].raw) > 0).any(0).sum()
    assert f"{active} of {active} active features of A are in B, 100% of the influence" in shown

    page = out.read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    for number in (f"{record['fvu']:.4f}", f"{record['f1_by_influence']:.3f}"):
        assert f"<td>{number}</td>" in page
    first = json.loads((finished / "feature_report.json").read_text())[0]
    assert first["caption"] in page
    assert re.search(rf"feature_report\.html#view=feature&amp;feature={first['feature']}\"", page)


def test_counterparts_are_those_of_the_report_on_the_validation_images(loaded):
    """`match_features` made those of feature_report.json, on these images."""
    seeds = driver.load_stage(loaded.folder / "stability_seed_1", "sae")
    other = driver.JumpReLUSAE.from_weights(seeds.tensors, loaded.layer.device)
    splits = {**loaded.layer.splits, "test": loaded.layer.splits["val"]}
    layer = fa.replace(loaded.layer, splits=splits)
    parts = (other, layer.mu, layer.std)
    (pair,) = cmp.compare_runs(layer, saes={"seed 1": parts}, out=None).pairs
    for record in loaded.report:
        (found,) = record["counterparts"]
        k, matches = record["feature"], pair.features[0].matches
        assert int(matches.feature[k]) == found["feature"]
        assert float(matches.correlation[k]) == pytest.approx(found["correlation"], abs=1e-5)


def test_runs_of_other_settings_and_seeds_compare(finished, run_copy, capsys):
    """A copy whose files name another seed and target, so that its numbers are known."""
    settings = json.loads((run_copy / "settings.json").read_text())
    settings["settings"] |= {"lr_sae": 0.5, "seed": 7}
    settings["data_digest"] = "0" * 64
    (run_copy / "settings.json").write_text(json.dumps(settings))
    comparison = cmp.compare_runs(str(finished), str(run_copy), out=None)
    assert dict(comparison.settings()) == {"lr_sae": ["0.013", "0.5"], "seed": ["0", "7"]}
    assert comparison.pairs == []
    five = cmp.compare_runs(*5 * [str(finished)], out=None)
    lines = five.table().splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 100
    settings["settings"]["seed"] = 0
    for other in (settings, {**settings, "caller": "explain"}):  # whose words say nothing of a set
        (run_copy / "settings.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"must be of equal images: .* with other pixels"):
            cmp.compare_runs(str(finished), str(run_copy), out=None)
        settings["settings"]["seed"] = 7


@pytest.mark.slow
def test_the_targets_of_one_run_are_compared_and_one_of_them_is_named(tmp_path, capsys):
    flags = [*BARE, "--target-actives", "3", "5", "--out", str(tmp_path / "two")]
    made = driver.main(flags)
    out = ["--out", str(tmp_path / "page.html")]
    records = driver.main(["compare", str(tmp_path / "two"), *out])
    assert records == json.loads((tmp_path / "two" / "summary.json").read_text())
    assert [r["fvu"] for r in records] == [r["fvu"] for r in made]
    five = str(tmp_path / "two" / "target_5")
    capsys.readouterr()
    records = driver.main(["compare", five, str(tmp_path / "two"), *out])
    assert [r["target_actives"] for r in records] == [5, 3, 5]
    shown = capsys.readouterr().out
    assert re.search(r"^target_actives +5 +3 +5$", shown, re.MULTILINE)
    assert "A are in C, 100% of the influence" in shown


def test_four_runs_take_forty_lines(loaded):
    comparison = cmp.compare_runs(loaded, loaded, loaded, loaded, out=None)
    assert len(comparison.pairs) == 3
    changed = [
        one._replace(settings={f"setting_{i}": i * j for i in range(9)}, title="x/" * 90)
        for j, one in enumerate(comparison.compared)
    ]
    lines = comparison._replace(compared=changed).table().splitlines()
    assert len(lines) <= 38  # a line about the page follows
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen_and_shows_its_pictures(loaded, tmp_path, width):
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    theirs = {"a name without a space" * 9: load_saelens(loaded.folder / "saelens")}
    cmp.compare_runs(*5 * [loaded], saes=theirs, out=tmp_path / "page.html")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto(f"file://{tmp_path / 'page.html'}")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        loads = "[...document.images].every(image => image.naturalWidth > 0)"
        assert page.evaluate(loads)
        assert page.evaluate("document.images.length") > 100
        browser.close()


@pytest.mark.parametrize("name", ["run#1 100%?", "<i>&\"x'"])
def test_links_lead_to_a_page_whatever_its_name(name, tmp_path):
    page = tmp_path / name / "page.html"
    page.parent.mkdir()
    found = compare_page.link("a <b>title</b>", page, tmp_path / "beside")
    assert found == "a <b>title</b>"
    page.write_text("")
    found = compare_page.link("a", page, tmp_path / "beside", "#view=feature&feature=3")
    place = re.fullmatch(r'<a href="([^"<>]*)">a</a>', found)[1]
    url = urlsplit(urljoin(f"{tmp_path.as_uri()}/beside/compare.html", html.unescape(place)))
    assert unquote(url.path) == str(page)
    assert (url.query, url.fragment) == ("", "view=feature&feature=3")


def test_a_page_on_another_drive_is_named_in_full(tmp_path, monkeypatch):
    def fail(path, start):
        raise ValueError("path is on mount 'D:'")

    (tmp_path / "page#.html").write_text("")
    monkeypatch.setattr(compare_page.os.path, "relpath", fail)
    found = compare_page.link("a", tmp_path / "page#.html", tmp_path)
    assert f'href="{tmp_path.as_uri()}/page%23.html"' in found


def test_a_page_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"must be a file, but .* is a folder"):
        cmp.compare_runs(None, None, out=tmp_path)
    with pytest.raises(InputError, match="give two runs or more"):
        cmp.compare_runs(out=tmp_path / "new" / "page.html")
    assert (tmp_path / "new").is_dir()


def test_an_sae_of_another_layer_is_reported(loaded, capsys):
    sae, mu, std = load_saelens(loaded.folder / "saelens")
    cmp.compare_runs(loaded, saes={"fits": (sae, mu, std)}, out=None)
    assert capsys.readouterr().out == ""
    comparison = cmp.compare_runs(loaded, saes={"theirs": (sae, mu - 100, std)}, out=None)
    shown = capsys.readouterr().out
    assert comparison.compared[1].record["fvu"] > 1
    assert re.match(r"theirs may be of another network or layer: FVU [\d.e+]+, \d+% of its", shown)


def test_what_cannot_be_compared_is_one_line(finished, loaded, tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        driver.main(["compare", str(finished), str(tmp_path)])
    with pytest.raises(InputError, match="two runs or more"):
        driver.main(["compare", str(finished)])
    with pytest.raises(InputError, match="need a run whose layer they read"):
        driver.main(["compare", str(finished / "saelens")])
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(InputError, match="no SAE of target 5"):
        driver.main(["compare", str(finished), str(tmp_path / "run" / "target_5")])
    sae, mu, std = load_saelens(finished / "saelens")
    with pytest.raises(InputError, match="whose network is not stored there"):
        cmp.compare_runs(str(finished), saes={"theirs": (sae, mu, std)}, out=None)
    with pytest.raises(InputError, match="need a run, or a layer"):
        cmp.compare_runs(saes={"theirs": (sae, mu, std)}, out=None)
    sae.W_enc = torch.nn.Parameter(sae.W_enc[:-1].detach())
    message = f"theirs reads 127 numbers, but the layer of {finished} gives 128"
    with pytest.raises(InputError, match=re.escape(message)):
        cmp.compare_runs(loaded, saes={"theirs": (sae, mu, std)}, out=None)
