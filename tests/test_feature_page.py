"""What is in the file that the page is.

The network is small, its SAE random: the page must show what is there, not what is good.
"""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from page_world import (
    N_CLASSES,
    NASTY,
    arrays_of,
    meta_of,
    nasty_records,
    script,
    small_world,
    write,
    write_bare,
)
from small_models import activity_of

import feature_analysis as fa
import feature_page as fp
import feature_roles as fr


@pytest.fixture(scope="module")
def world():
    return small_world()


# --------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------


def test_one_file_without_addresses_and_twice_the_same(world, tmp_path):
    page = write(tmp_path / "a.html", world)
    assert page.read_bytes() == write(tmp_path / "b.html", world).read_bytes()
    text = page.read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not something to fetch
    assert "{{" not in text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.html", "b.html"]


def test_writing_leaves_its_arguments_alone(world, tmp_path):
    images, heats = world.shown.images.clone(), world.shown.heats.clone()
    records = json.dumps(world.records)
    write(tmp_path / "page.html", world)
    assert torch.equal(images, world.shown.images)
    assert torch.equal(heats, world.shown.heats)
    assert records == json.dumps(world.records)


def test_arrays_of_any_size_start_where_a_browser_can_read_them():
    arrays = {
        "a": np.array([1, 2, 3], np.uint8),
        "b": np.array([0.5, -2.0], np.float32),
        "c": np.array([[-1, 7]], np.int8),
    }
    places, packed = fp._pack(arrays)
    assert places == {
        "a": {"type": "u1", "offset": 0, "length": 3},
        "b": {"type": "f4", "offset": 4, "length": 2},
        "c": {"type": "i1", "offset": 12, "length": 2},
    }
    assert gzip.decompress(base64.b64decode(packed)) == (
        b"\x01\x02\x03\x00" + arrays["b"].tobytes() + b"\xff\x07"
    )


def test_nasty_words_cannot_end_the_script(world, tmp_path):
    path = write_bare(tmp_path / "page.html", world, nasty_records(world), NASTY)
    assert meta_of(path)["features"][0]["statement"] == NASTY
    assert path.read_text().count("</script>") == 3  # data, data, code
    assert not set("<>&") & set(script(path, "meta"))


def test_words_that_look_like_a_mark_stay_words(world, tmp_path):
    path = write_bare(tmp_path / "page.html", world, world.records, "{{PACK}} {{META}}")
    assert meta_of(path)["title"] == "{{PACK}} {{META}}"
    assert len(arrays_of(path)["inked"]) == 784


def test_what_the_page_knows_of_a_feature(world, tmp_path):
    feature = meta_of(write(tmp_path / "page.html", world))["features"][3]
    acts = world.acts[:, 3]
    assert feature["density"] == pytest.approx(float((acts > 0).float().mean()), rel=1e-4)
    assert feature["largest"] == pytest.approx(float(acts.max()), rel=1e-3)
    assert feature["threshold"] == pytest.approx(0.3 + 0.7 * 3 / 23, rel=1e-3)

    strongest = acts.sort(descending=True).values[: fp.TOP_SHOWN].tolist()
    assert [activation for _, _, activation in feature["top"]] == pytest.approx(strongest, rel=1e-3)

    W_dec = world.layer.sae.W_dec
    cosine = W_dec @ W_dec[3]
    cosine[3] = -2
    closest = [int(cosine.argmax()), pytest.approx(float(cosine.max()), abs=1e-3)]
    assert feature["near"][0] == closest


def test_what_the_page_takes_from_a_record(world, tmp_path):
    path = write(tmp_path / "page.html", world)
    for feature, record in zip(meta_of(path)["features"], world.records, strict=True):
        assert feature["feature"] == record["feature"]
        assert feature["labels"] == record["label_histogram"]
        assert feature["mode"] == record["label_mode_when_active"]
        lost = [-change for change in record["ablation_delta_vector"]]
        assert feature["supports"] == pytest.approx(lost, rel=1e-3)
        assert feature["pushes"] == pytest.approx(record["logit_delta_vector"], rel=1e-3)
        assert feature["statement"] == record["statement"]
        assert feature["evidence"] == "evidence"
        assert feature["lines"] == ["a line"]
        assert feature["confidence"] == record["confidence"]
        assert feature["verdict"] == record["verdict"]
        assert feature["auroc"] == pytest.approx(0.6 + record["feature"] / 100)
        assert feature["dose"] is None
        assert feature["explained"] == record["explained"]
        assert feature["mark"] == record["mark"]
        assert feature["influence"] == pytest.approx(record["influence"], rel=1e-3)
        assert feature["changes"] == pytest.approx(record["predictions_changed"], rel=1e-3)


def test_the_page_names_the_features_that_fire_together(world, tmp_path):
    features = meta_of(write(tmp_path / "page.html", world))["features"]
    partner, correlation = fa.firing_together(world.shown.activity, fp.NEIGHBOURS)
    for k, feature in enumerate(features):
        assert [other for other, _ in feature["together"]] == partner[k].tolist()
        values = [value for _, value in feature["together"]]
        assert values == pytest.approx(correlation[k].tolist(), abs=6e-4)


def test_an_example_is_the_image_that_fires_so_strongly(world, tmp_path):
    path = write(tmp_path / "page.html", world)
    pictures = torch.from_numpy(arrays_of(path)["images"]).reshape(-1, 1, 28, 28)
    acts = world.layer.feature_acts(pictures.float() / 255)
    images = (world.shown.images * 255).round()

    for feature in meta_of(path)["features"]:
        shown = feature["top"] + [example for band in feature["bands"] for example in band]
        for slot, label, activation in shown:
            assert activation == pytest.approx(float(acts[slot, feature["feature"]]), rel=1e-3)
            (same,) = (images == pictures[slot]).all((1, 2, 3)).nonzero()
            assert label == world.shown.activity.labels[same]


def test_examples_come_from_each_quarter_of_the_range(world, tmp_path):
    features = meta_of(write(tmp_path / "page.html", world))["features"]
    for k in (0, 7):
        expected = [
            [float(f"{a:.4g}") for a in band.activation]
            for band in world.shown.bank.bands(k, per_band=fp.BAND_SHOWN)
        ]
        found = [[activation for _, _, activation in band] for band in features[k]["bands"]]
        assert found == expected
        assert len(found) == 4
    assert features[23]["top"] == []
    assert features[23]["bands"] == [[], [], [], []]


def test_a_page_of_some_features_in_another_order(world, tmp_path):
    records = [world.records[k] for k in (9, 2, 23)]
    path = write_bare(tmp_path / "page.html", world, records)
    every = write_bare(tmp_path / "every.html", world, world.records)

    named = ("feature", "near", "together", "largest", "threshold", "labels")
    for found, k in zip(meta_of(path)["features"], (9, 2, 23), strict=True):
        expected = meta_of(every)["features"][k]
        assert [found[name] for name in named] == [expected[name] for name in named]

    some, all_of_them = arrays_of(path), arrays_of(every)
    for name, size in (("heats", 784), ("histograms", fp.HISTOGRAM_BINS)):
        rows = all_of_them[name].reshape(24, size)[[9, 2, 23]]
        assert np.array_equal(some[name].reshape(3, size), rows)
    assert len(some["images"]) < len(all_of_them["images"])


def test_patterns_are_in_full_colour_at_their_scale_and_grey_where_nothing_is_inked(
    world, tmp_path
):
    heats = world.shown.heats.clone()
    heats[0] = 0
    heats[1] = 0.01
    heats[1, 5, :20] = -2.0  # 20 of 784 pixels: more than one in a hundred
    heats[1, 5, 10] = -4.0  # one pixel does not set the scale
    inked = np.zeros((28, 28), dtype=bool)
    inked[3:25, 3:25] = True
    shown = world.shown._replace(heats=heats, inked=inked)
    path = write(tmp_path / "page.html", world._replace(shown=shown))

    arrays = arrays_of(path)
    found = arrays["heats"].reshape(24, 28, 28)
    assert not found[0].any()
    assert (found[1, 5, :20] == -127).all()
    assert (found[1, 20] == round(127 * 0.01 / 2)).all()
    assert np.array_equal(arrays["inked"].reshape(28, 28), inked)


def test_doses_of_an_effect_reach_the_page(world, tmp_path):
    effect = {"doses": (0.0, 1.0), "dose_raises": [0.0, 1.23456], "linear_raises": [0.0, 1.5]}
    record = world.records[3] | {
        "hypothesis": {"effect": {"raises": 4, "lowers": None}},
        "evidence": {"text": "", "effect": effect, "detected": None},
    }
    (feature,) = meta_of(write_bare(tmp_path / "page.html", world, [record]))["features"]
    assert feature["auroc"] is None
    assert feature["drawing"] is None
    assert feature["dose"] == {"at": [0.0, 1.0], "curves": [[4, [0.0, 1.235], [0.0, 1.5]]]}


def test_places_and_the_mean_of_the_images_reach_the_page(world, tmp_path):
    path = write(tmp_path / "page.html", world)
    features, means = meta_of(path)["features"], arrays_of(path)["means"].reshape(24, 784)
    assert features[0]["drawing"] is None
    dot, stem, slash = [5, 8, "dot", 5], [5, 8, "vertical", 7], [5, 8, "rising", 13]
    for k, there, absent in ((1, [dot], [slash]), (2, [dot, stem], [])):
        moved = [[[row + k, *others] for row, *others in places] for places in (there, absent)]
        assert features[k]["drawing"] == {"there": moved[0], "absent": moved[1]}
    for k in (0, 5):
        mean = world.shown.images[world.acts[:, k] > 0].mean(0).flatten().numpy()
        assert means[k] == pytest.approx(255 * mean / mean.max(), abs=0.51)
    assert not means[23].any()  # no image fires it


def test_the_page_ships_what_features_add_to_classes_and_images(world, tmp_path):
    records = [world.records[k] for k in (9, 2)]
    path = write(tmp_path / "page.html", world._replace(records=records))
    meta, arrays = meta_of(path), arrays_of(path)
    added, _ = fa.contributions(world.layer, world.shown.images, world.shown.activity)
    effects = fr.class_effects(world.shown.activity, added)[:, [9, 2]]
    assert arrays["class_adds"] == pytest.approx(effects.flatten(), abs=1e-6)

    look, said = fr.look_at_tests(world.layer, *world.tests), meta["tests"]
    assert said["errors"] == said["shown_errors"] == look.all_errors
    assert said["number"] == look.image.tolist()
    assert said["labels"] == world.tests.labels[look.image].tolist()
    assert [f["mends"] for f in meta["features"]] == look.mends[[9, 2]].tolist()
    assert [f["breaks"] for f in meta["features"]] == look.breaks[[9, 2]].tolist()
    assert said["mending"] == [row.nonzero()[:, 0].tolist() for row in look.turns.off]
    assert sum(map(len, said["mending"])) > said["errors"] / 2
    for image in (0, 40):
        pairs = slice(*arrays["pair_start"][image : image + 2])
        own = look.activity.image == image
        assert arrays["pair_feature"][pairs].tolist() == look.activity.feature[own].tolist()
        assert arrays["pair_activation"][pairs] == pytest.approx(look.activity.activation[own])
        shipped = arrays["pair_adds"].reshape(-1, N_CLASSES)[pairs]
        assert shipped == pytest.approx(look.added[own].numpy(), abs=1e-6)
    tests = (world.tests.images[look.image] * 255).round().flatten().numpy()
    assert np.array_equal(arrays["tests"], tests)


def test_means_of_classes_reach_the_page(world, tmp_path):
    means = arrays_of(write(tmp_path / "page.html", world))["class_means"].reshape(10, 784)
    for c in (0, 7):
        mean = world.shown.images[world.tests.labels == c].mean(0).flatten().numpy()
        assert means[c] == pytest.approx(255 * mean / mean.max(), abs=0.51)


def test_names_must_be_one_for_each_class(world, tmp_path):
    overview = fp.Overview(classes=("cat", "dog"))
    with pytest.raises(ValueError, match="2 class names, but the network has 10 classes"):
        write(tmp_path / "page.html", world, overview=overview)


def test_the_map_puts_alike_directions_together_and_none_on_another():
    generator = torch.Generator().manual_seed(0)
    middles = torch.nn.functional.one_hot(torch.arange(40) % 4, 12).float()
    directions = middles + 0.1 * torch.randn(40, 12, generator=generator)
    places, side, kept = fp.map_places(directions)
    assert len({tuple(place) for place in places}) == 40
    assert side == 9  # twice as many cells as features, or a few more
    assert 0 <= min(map(min, places)) <= max(map(max, places)) < side
    apart = torch.cdist(torch.tensor(places).float(), torch.tensor(places).float())
    same = torch.arange(40)[:, None] % 4 == torch.arange(40) % 4
    assert apart[same].mean() < 0.6 * apart[~same].mean()
    assert kept >= 0.7
    assert fp.map_places(directions) == (places, side, kept)
    for n in (1, 2, 3):
        assert len(fp.map_places(directions[:n])[0]) == n


# --------------------------------------------------------------------------------------------------
# How strongly a feature fires, and which others are like it
# --------------------------------------------------------------------------------------------------


def test_histograms_written_out():
    activity = activity_of([[0.5, 0.0], [4.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.9, 0.0]])
    counts, largest = fp.activation_histograms(activity, bins=4)
    assert counts.tolist() == [[2, 1, 0, 2], [0, 0, 0, 0]]
    assert largest.tolist() == [4.0, 0.0]


def test_histograms_of_the_digits_are_those_of_numpy(world):
    acts = world.acts.numpy()
    counts, largest = fp.activation_histograms(world.shown.activity, bins=10)
    for k in (0, 5):
        positive = acts[:, k][acts[:, k] > 0]
        expected, _ = np.histogram(positive, bins=10, range=(0, positive.max()))
        assert abs(counts[k] - expected).sum() <= 2  # values on an edge
        assert counts[k].sum() == len(positive)
        assert largest[k] == pytest.approx(positive.max())
    assert counts[-1].sum() == largest[-1] == 0
