"""The data and the text in the file that the page is, against numbers computed otherwise."""

import io
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from page_world import (
    N_CLASSES,
    NASTY,
    Colors,
    arrays_of,
    color_world,
    meta_of,
    review_of,
    script,
    small_world,
    write,
)
from PIL import Image

from saexplain import page, page_classes
from saexplain.activity import Activity, coactivation_neighbors
from saexplain.counterfactuals import class_effects


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "page.html", world)


def test_file_is_self_contained_and_deterministic(world, written, tmp_path):
    again = write(tmp_path / "again.html", world)
    assert written.read_bytes() == again.read_bytes()
    text = written.read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace: nothing is fetched
    assert "{{" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


def test_inputs_are_unchanged(world, tmp_path):
    val = world.layer.splits["val"]
    tensors = [val.images, val.raw, val.labels, world.shown.heats]
    before, records = [tensor.clone() for tensor in tensors], json.dumps(world.records)
    write(tmp_path / "page.html", world)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert json.dumps(world.records) == records


@pytest.mark.parametrize("words", [NASTY, "{{PACK}} {{META}}"])
def test_any_words_stay_words(world, tmp_path, words):
    records = [world.records[0] | {"caption": words, "measured": [words]}]
    path = write(tmp_path / "page.html", world, records, overview=page.Overview(words))
    meta = meta_of(path)
    assert meta["title"] == meta["features"][0]["caption"] == words
    assert len(arrays_of(path)["inked"]) == 784
    assert path.read_text().count("</script>") == 3  # two of data, one of code
    assert not set("<>&") & set(script(path, "meta"))


def test_names_and_pixels_must_fit(world, tmp_path):
    with pytest.raises(ValueError, match="classes"):
        write(tmp_path / "page.html", world, overview=page.Overview(classes=("cat", "dog")))
    shown = world.shown._replace(inked=np.ones((27, 28), bool))
    with pytest.raises(ValueError, match="inked"):
        write(tmp_path / "page.html", world._replace(shown=shown))
    assert not list(tmp_path.iterdir())


def test_page_without_test_images_and_network(world, tmp_path):
    val_only = replace(world.layer, splits={"val": world.layer.splits["val"]})
    path = write(tmp_path / "page.html", world._replace(layer=val_only), network=None)
    meta = meta_of(path)
    assert (meta["tests"], meta["network"], meta["testing"]["edits"]["can"]) == (None, None, False)
    assert not {"tests", "W1", "W_enc", "test_half_levels"} & set(meta["arrays"])


def test_numbers_of_a_feature_are_those_of_its_activations(world, written):
    entry, own = (
        meta_of(written)["features"][3],
        world.layer.feature_acts(world.layer.splits["val"].raw)[:, 3],
    )
    assert entry["density"] == pytest.approx(float((own > 0).float().mean()), rel=1e-4)
    assert entry["largest"] == pytest.approx(float(own.max()), rel=1e-3)
    assert entry["threshold"] == pytest.approx(0.3 + 0.7 * 3 / 23, rel=1e-3)
    strongest = own.sort(descending=True).values[: page.TOP_SHOWN].tolist()
    assert [activation for _, _, activation in entry["top"]] == pytest.approx(strongest, rel=1e-3)
    cosine = world.layer.sae.W_dec @ world.layer.sae.W_dec[3]
    cosine[3] = -2
    nearest = [int(cosine.argmax()), pytest.approx(float(cosine.max()), abs=1e-3)]
    assert entry["near"][0] == nearest
    others, correlations = coactivation_neighbors(world.shown.activity, page.NEIGHBORS)
    pairs = zip(others[3].tolist(), correlations[3].tolist(), strict=True)
    assert entry["coactive"] == [[k, pytest.approx(r, abs=6e-4)] for k, r in pairs]


def test_fields_of_a_record_reach_the_page(world, written):
    entries = meta_of(written)["features"]
    same = {name: name for name in "feature caption confidence replicated f1 mark".split()}
    same |= {"lines": "measured", "labels": "label_histogram", "mode": "label_mode_when_active"}
    for entry, record in zip(entries, world.records, strict=True):
        assert {key: entry[key] for key in same} == {key: record[same[key]] for key in same}
        assert entry["pushes"] == pytest.approx(record["logit_delta_vector"], rel=1e-3)
        numbers = [record["influence"], record["predictions_changed"]]
        assert [entry["influence"], entry["changes"]] == pytest.approx(numbers, rel=1e-3)
        lost = [-change for change in record["ablation_delta_vector"]]
        assert entry["supports"] == pytest.approx(lost, rel=1e-3)
        named = ("classes", "raises", "lowers", "threshold", "strong_from")
        assert entry["hypothesis"] == {name: record["hypothesis"].get(name) for name in named}
        found = json.loads(json.dumps(record["evidence"]))  # tuples become lists
        assert all(entry["found"][name] == found[name] for name in entry["found"])
        assert entry["found"].keys() >= {"picked", "chance_f1", "detection", "results"}
    drawings = arrays_of(written)["drawings"].reshape(24, 28, 28)
    for drawing, record in zip(drawings, world.records, strict=True):
        rows = record["hypothesis"]["drawing"]
        assert [["=-.+#"[w + 2] for w in row] for row in drawing] == [list(row) for row in rows]
    assert drawings[3].any()
    assert not drawings[23].any()  # never active


def test_examples_are_images_with_their_label_and_activation(world, written):
    entries = meta_of(written)["features"]
    pictures = torch.from_numpy(arrays_of(written)["images"].copy()).reshape(-1, 1, 28, 28)
    acts = world.layer.feature_acts(world.layer.raw(pictures.float() / 255))
    images, labels, _ = world.layer.splits["val"]
    for entry in entries:
        for slot, label, activation in itertools.chain(entry["top"], *entry["bands"]):
            assert activation == pytest.approx(float(acts[slot, entry["feature"]]), rel=1e-3)
            (same,) = ((images * 255).round() == pictures[slot]).all((1, 2, 3)).nonzero()
            assert label == labels[same]
    bands = world.shown.bank.bands(7, per_band=page.BAND_SHOWN)
    expected = [[float(f"{a:.4g}") for a in band.activation] for band in bands]
    assert [[example[2] for example in band] for band in entries[7]["bands"]] == expected
    assert (entries[23]["top"], entries[23]["bands"]) == ([], [[], [], [], []])  # never active


def test_page_of_some_features_in_another_order(world, written, tmp_path):
    chosen, entries = [9, 2, 23], meta_of(written)["features"]
    path = write(tmp_path / "page.html", world, [world.records[k] for k in chosen])
    keys = "feature near coactive largest threshold labels fixes breaks".split()
    for found, k in zip(meta_of(path)["features"], chosen, strict=True):
        assert [found[key] for key in keys] == [entries[k][key] for key in keys]
    some, every = arrays_of(path), arrays_of(written)
    for name in ("heats", "means", "histograms"):
        assert np.array_equal(some[name].reshape(3, -1), every[name].reshape(24, -1)[chosen])
    assert len(some["images"]) < len(every["images"])


def test_patterns_are_in_full_color_at_their_scale(world, tmp_path):
    heats = world.shown.heats.clone()
    heats[0] = 0
    heats[1] = 0.01
    heats[1, 5, :20] = -2.0  # 20 of 784 pixels: more than one in a hundred
    heats[1, 5, 10] = -4.0  # one pixel does not set the scale
    inked = np.zeros((28, 28), dtype=bool)
    inked[3:25, 3:25] = True
    shown = world.shown._replace(heats=heats, inked=inked)
    arrays = arrays_of(write(tmp_path / "page.html", world._replace(shown=shown)))
    found = arrays["heats"].reshape(24, 28, 28)
    assert not found[0].any()
    assert (found[1, 5, :20] == -127).all()
    assert (found[1, 20] == round(127 * 0.01 / 2)).all()
    assert np.array_equal(arrays["inked"].reshape(28, 28), inked)


def test_dose_response_reaches_the_page(world, tmp_path):
    change = {"logit": 4, "at_doses": [0.0, 0.5, 1.23456, 2.0], "linear": [0.0, 0.6, 1.5, 3.0]}
    record = world.records[3] | {"evidence": {"effects": {"raises": change}}}
    (entry,) = meta_of(write(tmp_path / "page.html", world, [record]))["features"]
    curves = [[4, [0.0, 0.5, 1.235, 2.0], [0.0, 0.6, 1.5, 3.0]]]
    assert entry["dose"] == {"at": [0.0, 0.5, 1.0, 2.0], "curves": curves}
    assert entry["found"]["picked"] is None


@pytest.mark.parametrize("most", [17, 2000])
def test_images_on_page_and_what_is_active_there(world, tmp_path, monkeypatch, most):
    monkeypatch.setattr(page, "MAX_IMAGES", most)
    some = page.images_on_page(world.layer)
    every = {"val": range(200), "test_half": range(0, 200, 2), "replication_half": range(1, 200, 2)}
    path, chosen = tmp_path / "page.html", [9, 2, 23]
    arrays = arrays_of(write(path, world, [world.records[k] for k in chosen]))
    images, labels, raw = world.layer.splits["val"]  # "test" holds the same
    acts = world.layer.feature_acts(raw)
    for split, of in every.items():
        at, n = some[split].tolist(), min(most, len(of))
        if n == len(of):
            assert at == list(of)
        assert (len(set(at)), at[0], at[-1]) == (n, of[0], of[-1])
        assert set(at) <= set(of)
        gaps = np.diff(at) / of.step
        assert gaps.max() - gaps.min() <= 1  # evenly spaced
        levels = (images[at, 0] * 255).round().flatten().numpy()
        assert np.array_equal(arrays[f"{split}_levels"], levels)
        assert arrays[f"{split}_labels"].tolist() == labels[at].tolist()
        start = arrays[f"{split}_start"]
        for k, pairs in zip(chosen, map(slice, start, start[1:]), strict=True):
            own = acts[at, k]
            assert arrays[f"{split}_image"][pairs].tolist() == own.nonzero()[:, 0].tolist()
            share = own[own > 0] / acts[:, k].max()
            assert arrays[f"{split}_activation"][pairs] / 255 == pytest.approx(share, abs=0.0021)
    testing = meta_of(path)["testing"]
    assert testing["of_split"] == {split: len(of) for split, of in every.items()}


def test_larger_images_are_fewer(world, monkeypatch):
    monkeypatch.setattr(page, "MAX_LEVELS", 3 * 784 * 40 + 100)
    assert [len(some) for some in page.images_on_page(world.layer).values()] == [40, 40, 40]


def test_means_of_features_and_classes(world, written):
    images, labels, raw = world.layer.splits["val"]
    arrays, acts = arrays_of(written), world.layer.feature_acts(raw)
    means = {("means", k): images[acts[:, k] > 0] for k in (0, 5)}
    means |= {("class_means", c): images[labels == c] for c in (0, 7)}
    for (name, row), own in means.items():
        mean = own.mean(0).flatten().numpy()
        found = arrays[name].reshape(-1, 784)[row]
        assert found == pytest.approx(255 * mean / mean.max(), abs=0.51)
    assert not arrays["means"].reshape(24, 784)[23].any()  # never active


def test_contributions_and_errors_reach_the_page(world, tmp_path):
    val, test = world.layer.splits["val"], world.layer.splits["test"]
    records = [world.records[k] for k in (9, 2)]
    path = write(tmp_path / "page.html", world, records)
    meta, arrays = meta_of(path), arrays_of(path)
    effects = class_effects(world.layer, val.raw, world.shown.activity)[:, [9, 2]]
    assert arrays["class_adds"] == pytest.approx(effects.flatten(), abs=1e-6)
    review, found = review_of(world, records), meta["tests"]
    assert found["errors"] == found["shown_errors"] == review.all_errors > 10
    assert found["number"] == review.image.tolist()
    assert found["labels"] == test.labels[review.image].tolist()
    counts = torch.stack([review.fixes, review.breaks], 1)[[9, 2]].tolist()
    assert [[f["fixes"], f["breaks"]] for f in meta["features"]] == counts
    assert found["fixing"] == [row.nonzero()[:, 0].tolist() for row in review.sets.off]
    assert found["number"][found["tour"]["image"]] == review.tour.image
    for image in (0, 40):
        pairs = slice(*arrays["pair_start"][image : image + 2])
        own = review.activity.image == image
        assert arrays["pair_feature"][pairs].tolist() == review.activity.feature[own].tolist()
        assert arrays["pair_activation"][pairs] == pytest.approx(review.activity.activation[own])
        adds = arrays["pair_adds"].reshape(-1, N_CLASSES)[pairs]
        assert adds == pytest.approx(review.added[own].numpy(), abs=1e-6)
    images = (test.images[review.image] * 255).round().flatten().numpy()
    assert np.array_equal(arrays["tests"], images)


def test_histograms_written_out():
    activation, labels = torch.tensor([0.5, 4.0, 3.0, 1.0, 0.9]), torch.zeros(5, dtype=int)
    activity = Activity(torch.tensor([0, 5, 5]), torch.arange(5), activation, labels, 0 * labels)
    counts, largest = page.activation_histograms(activity, bins=4)
    assert counts.tolist() == [[2, 1, 0, 2], [0, 0, 0, 0]]
    assert largest.tolist() == [4.0, 0.0]


def test_map_keeps_similar_directions_together():
    generator = torch.Generator().manual_seed(0)
    groups = torch.nn.functional.one_hot(torch.arange(40) % 4, 12).float()
    directions = groups + 0.1 * torch.randn(40, 12, generator=generator)
    places, side, kept = page.map_places(directions)
    assert len({tuple(place) for place in places}) == 40  # none on another
    assert side == 9  # twice as many cells as features, or a few more
    assert 0 <= min(map(min, places)) <= max(map(max, places)) < side
    distance = torch.cdist(torch.tensor(places).float(), torch.tensor(places).float())
    same = torch.arange(40)[:, None] % 4 == torch.arange(40) % 4
    assert distance[same].mean() < 0.6 * distance[~same].mean()
    assert kept >= 0.7
    assert page.map_places(directions) == (places, side, kept)
    for n in (1, 2, 3):
        assert len({tuple(place) for place in page.map_places(directions[:n])[0]}) == n


# --------------------------------------------------------------------------------------------------
# Where features are active, colors, and many classes
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colored():
    return color_world()


@pytest.fixture(scope="module")
def color_page(colored, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "page.html", colored, network=None)


def test_default_page_has_nothing_of_this(written):
    meta = meta_of(written)
    assert not {"look", "where", "tables"} & set(meta)
    assert not {"maps", "at_start", "images_0"} & set(meta["arrays"])


def test_images_travel_in_their_own_colors(colored, color_page):
    meta, arrays = meta_of(color_page), arrays_of(color_page)
    assert meta["shape"] == [48, 64]
    assert not {"images", "tests", "means", "heats", "drawings", "val_levels"} & set(arrays)
    test, number = colored.layer.splits["test"], meta["tests"]["number"]
    sheet = np.asarray(Image.open(io.BytesIO(arrays["tests_0"].tobytes()))).astype(float)
    for slot in (0, len(number) - 1):
        row, column = divmod(slot, meta["look"]["color"]["across"])
        tile = sheet[48 * row : 48 * (row + 1), 64 * column : 64 * (column + 1)]
        own = 255 * Colors().pictures(test.images[number]).permute(0, 2, 3, 1).numpy()
        error = np.abs(tile - own).mean((1, 2, 3))
        assert error.argmin() == slot
        assert error[slot] < 6  # JPEG, of noise


def test_maps_of_examples_reach_the_page(colored, color_page):
    entries, arrays = meta_of(color_page)["features"], arrays_of(color_page)
    maps, shown = arrays["maps"].reshape(-1, 6, 8), colored.shown
    raw = colored.layer.splits["val"].raw
    rows = [row for entry in entries for row in (*entry["top"], *itertools.chain(*entry["bands"]))]
    assert [row[3] for row in rows] == list(range(len(maps)))  # each has its own, in order
    for k in (0, 3):
        top = shown.bank.top.index[k, : page.TOP_SHOWN]
        bands = shown.bank.bands(k, per_band=page.BAND_SHOWN)
        index = torch.cat([top, *(band.index for band in bands)])
        own = colored.layer.acts_at(raw[index])[:, 1:, k].unflatten(1, (6, 8))
        assert entries[k]["scale"] == pytest.approx(float(own.max()), rel=1e-3)
        found = maps[entries[k]["top"][0][3] :][: len(index)] / 255
        assert found == pytest.approx((own / own.max()).numpy(), abs=0.034)  # half of a step
        mean = colored.layer.acts_at(raw)[:, 1:, k].mean(0)
        assert entries[k]["mean_peak"] == pytest.approx(float(mean.max()), rel=1e-3)
        shares = arrays["mean_maps"].reshape(-1, 48)[k] / 255
        assert shares == pytest.approx((mean / mean.max()).numpy(), abs=0.034)
    assert [entry["place_only"] for entry in entries[:4]] == [False, False, True, False]
    assert entries[3]["prefix_share"] == round(float(shown.maps.prefix_share[3]), 3)
    assert meta_of(color_page)["where"]["receptive"] == [0.5, 0.3125]  # 24 of 48, 20 of 64


def test_features_at_positions_of_test_images_reach_the_page(colored, color_page):
    meta, arrays = meta_of(color_page), arrays_of(color_page)
    some, number = meta["where"]["tests"], meta["tests"]["number"]
    assert len(some) == min(61, len(number)) == len(set(some))  # 60, and that of the tour
    assert meta["tests"]["tour"]["image"] in some
    raw = colored.layer.splits["test"].raw
    largest = colored.layer.feature_acts(colored.layer.splits["val"].raw).amax(0)
    for n, position in ((0, 0), (0, 17), (7, 48)):  # 48: the prefix token
        acts = colored.layer.acts_at(raw[[number[some[n]]]])[0, (position + 1) % 49]
        row = 49 * n + position
        pairs = slice(*arrays["at_start"][row : row + 2])
        expected = acts.argsort(descending=True)[: min(12, int((acts > 0).sum()))].tolist()
        assert arrays["at_feature"][pairs].tolist() == expected
        share = (acts / largest.clamp(min=1e-9))[expected].clamp(max=1).numpy()
        assert arrays["at_activation"][pairs] / 255 == pytest.approx(share, abs=0.004)


def test_a_pattern_that_is_not_faithful_is_not_on_the_page(world, tmp_path):
    faithful = torch.arange(24) != 5
    shown = world.shown._replace(faithful=faithful)
    records = [record | {"pattern_correlation": 0.123456} for record in world.records]
    path = write(tmp_path / "page.html", world._replace(shown=shown), records)
    heats, means = (arrays_of(path)[name].reshape(24, 784) for name in ("heats", "means"))
    assert (heats.any(1) == faithful.numpy()).all()
    assert not means[5].any()
    entries = meta_of(path)["features"]
    assert [entry.get("faithful") for entry in entries] == [None] * 5 + [False] + [None] * 18
    assert entries[5]["correlation"] == 0.1235


def test_pages_of_large_images_stay_small(colored, color_page, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE_BYTES", 460_000)  # for all features with few small images
    path = write(tmp_path / "page.html", colored, network=None)
    assert path.stat().st_size < color_page.stat().st_size
    meta = meta_of(path)
    assert (meta["shape"], meta["look"]["whole"]) == ([24, 32], [48, 64])
    assert [len(meta["features"][3][name]) for name in ("top", "bands")] == [4, 0]
    assert meta["look"]["color"]["tile"] == [32, 32]
    assert "features_known" not in meta


def test_features_of_most_influence_are_shown_where_not_all_fit(colored, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FEWEST_SHOWN", 30)
    world, budget = color_world(200), 700_000
    monkeypatch.setattr(page, "PAGE_BYTES", budget)
    path = tmp_path / "page.html"
    n = page.write_dashboard(path, world.records, world.layer, world.shown)
    meta, arrays = meta_of(path), arrays_of(path)
    own = [entry["feature"] for entry in meta["features"]]
    influence = [record["influence"] for record in world.records]
    best = sorted(range(200), key=lambda k: -influence[k])[:n]
    assert 30 < n < 190
    assert (own, meta["features_known"]) == (sorted(best), 200)
    assert path.stat().st_size <= budget
    assert len(arrays["histograms"]) == 24 * n
    effects = page.class_effects(world.layer, world.layer.splits["val"].raw, world.shown.activity)
    assert np.array_equal(arrays["class_adds"].reshape(6, n, 6), effects[:, own])
    assert arrays["at_feature"].max() < n
    assert len(arrays["mean_maps"]) == 48 * n

    monkeypatch.setattr(page, "PAGE_BYTES", 0)
    assert page.write_dashboard(path, world.records, world.layer, world.shown) == 30
    own = [entry["feature"] for entry in meta_of(path)["features"]]
    assert own == sorted(sorted(range(200), key=lambda k: -influence[k])[:30])


def test_occlusion_maps_are_those_of_the_strongest_images(colored, tmp_path):
    maps = colored.shown.maps
    maps = maps._replace(kind="occlusion", top=maps.top[:, :3], bands=None, receptive=(48, 64))
    world = colored._replace(shown=colored.shown._replace(maps=maps))
    path = write(tmp_path / "page.html", world, network=None)
    entry, arrays = meta_of(path)["features"][3], arrays_of(path)
    assert [len(row) for row in entry["top"]] == [4] * 3  # only images that have a map
    assert all(len(row) == 3 for row in itertools.chain(*entry["bands"]))
    assert "at_start" not in arrays
    found = arrays["maps"].reshape(-1, 6, 8)[entry["top"][1][3]] / 255
    expected = maps.top[3, 1].float() / maps.top[3].float().max()
    assert found == pytest.approx(expected.numpy(), abs=0.034)

    top, mean = maps.top.clone(), maps.mean.clone()
    top[3, 1], top[5], mean[5] = torch.nan, torch.nan, torch.nan  # nothing was covered there
    maps = maps._replace(top=top, mean=mean)
    world = colored._replace(shown=colored.shown._replace(maps=maps))
    entries = meta_of(write(path, world, network=None))["features"]
    assert [len(row) for row in entries[3]["top"]] == [4, 3, 4]
    assert [len(row) for row in entries[5]["top"]] == [3] * 3
    assert (entries[5]["mean_peak"], entries[5]["scale"]) == (None, 0)


def test_tables_of_many_classes_have_the_largest_effects(colored, tmp_path, monkeypatch):
    monkeypatch.setattr(page_classes, "FEW_CLASSES", 3)
    monkeypatch.setattr(page_classes, "FULL_ENTRIES", 0)
    monkeypatch.setattr(page_classes, "N_LOGITS", 2)
    val = colored.layer.splits["val"]
    path = write(tmp_path / "page.html", colored, network=None)
    meta, arrays = meta_of(path), arrays_of(path)
    assert meta["tables"] is True
    assert "class_adds" not in arrays
    effects = class_effects(colored.layer, val.raw, colored.shown.activity)  # (C, d_sae, C)
    own, values = (arrays[f"class_{name}"].reshape(6, 20) for name in ("feature", "value"))
    rivals = arrays["rivals"].reshape(6, 5)
    pairs = arrays["pair_of_feature"].reshape(6, 5, 8)
    of_pairs = arrays["pair_of_value"].reshape(6, 5, 8)
    logits = colored.layer.logits(val.raw)
    for c in range(6):
        order = effects[c, :, c].argsort()[::-1]
        above = [k for k in order[:12] if effects[c, k, c] > 0]
        below = [k for k in order[::-1][:8] if effects[c, k, c] < 0]
        assert own[c].tolist()[: len(above)] == above
        assert own[c].tolist()[12 : 12 + len(below)] == below
        listed = own[c] >= 0
        assert values[c, listed] == pytest.approx(effects[c, own[c, listed], c], abs=1e-5)
        mean = logits[val.labels == c].mean(0)
        expected = [r for r in mean.argsort(descending=True).tolist() if r != c]
        pair = meta["tests"]["pair"]
        if c in pair:  # the classes confused most are compared in any case
            other = sum(pair) - c
            expected = [other, *(r for r in expected if r != other)]
        assert rivals[c].tolist() == expected
        difference = effects[c, :, c] - effects[c, :, rivals[c, 2]]
        first = int(difference.argmax())
        assert pairs[c, 2, 0] == first
        assert of_pairs[c, 2, 0] == pytest.approx(difference[first], abs=1e-5)

    review = review_of(colored)
    known = arrays["test_classes"].reshape(len(review.image), -1)
    columns = known.shape[1] + 1
    found = arrays["test_logits"].reshape(-1, columns)
    for t in (0, 5):
        others = [c for c in range(6) if c not in known[t]]
        assert {int(review.logits[t].argmax()), meta["tests"]["labels"][t]} <= set(known[t])
        assert found[t, :-1] == pytest.approx(review.logits[t].numpy()[known[t]], abs=1e-5)
        rest = torch.logsumexp(review.logits[t, others], 0)
        assert found[t, -1] == pytest.approx(float(rest), abs=1e-5)
        first = arrays["pair_start"][t]
        adds = review.added[review.activity.image == t][0]
        after = found[t] - arrays["pair_adds"].reshape(-1, columns)[first]
        expected = review.logits[t] - adds
        assert after[:-1] == pytest.approx(expected.numpy()[known[t]], abs=1e-4)
        assert after[-1] == pytest.approx(float(torch.logsumexp(expected[others], 0)), abs=1e-4)


def test_sparse_values_are_the_largest_either_way():
    values = np.zeros(50)
    values[7], values[9], values[40] = 2.0, -1.23456, 0.5
    assert page_classes.sparse(values) == [[7, 2.0], [9, -1.235], [40, 0.5]]
    dense = np.arange(-25.0, 25)
    found = page_classes.sparse(dense)
    assert [c for c, _ in found] == [*range(10), *range(40, 50)]
