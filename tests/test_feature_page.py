"""The page: what is in the file, and, in a real browser where there is one, what it does with it.

The network and the SAE are small and untrained: the page must show what is there, not what is good.
"""

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_models import activity_of
from torch import Tensor

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_page as fp

DIGITS = Path(__file__).resolve().parent.parent / "data" / "mnist_5k.npz"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NASTY = (
    "</script><script>alert(1)</script> \"quotes\" 'single' & <b> line\u2028separator \ud800 lone"
)
D_IN = 16
N_CLASSES = 10


class World(NamedTuple):
    """All that a page needs; the last feature is silent where there are several."""

    layer: fa.ExplainedLayer
    records: list[dict]
    shown: fp.Shown
    network: fp.Network
    tests: tuple[Tensor, Tensor]

    @property
    def acts(self) -> Tensor:
        """(N, d_sae)"""
        return self.layer.feature_acts(self.shown.images)


def read_digits() -> tuple[Tensor, Tensor]:
    """Every 25th of the bundled digits: images (200, 1, 28, 28) in [0, 1], labels (200,)."""
    with np.load(DIGITS) as stored:
        images = torch.from_numpy(stored["images"][::25])
        labels = torch.from_numpy(stored["labels"][::25].astype(np.int64))
    return images[:, None].float() / 255, labels


def small_layer(d_sae: int, images: Tensor) -> fa.ExplainedLayer:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W1, W2 = normal(D_IN, 784) / 28, normal(N_CLASSES, D_IN) / 4
    model = demo.PlantedClassifier(W1, -W1 @ images.flatten(1).mean(0), W2, 0.1 * normal(N_CLASSES))
    raw = model.preactivations(images)

    W_dec = torch.nn.functional.normalize(normal(d_sae, D_IN), dim=1)
    threshold = torch.linspace(0.3, 1.0, d_sae)
    if d_sae > 1:
        threshold[-1] = 1e6
    sae = demo.PlantedSAE(W_dec.T, 0.1 * normal(d_sae), W_dec, 0.1 * normal(D_IN), threshold)
    return fa.ExplainedLayer(model, sae, raw.mean(0), raw.std(0))


def with_statement(k: int, record: dict) -> dict:
    shapes = (("dot", 5), ("vertical", 7), ("rising", 13))
    places = [{"row": 5 + k % 9, "col": 8, "shape": s, "length": n} for s, n in shapes]
    evidence = {"text": "evidence", "detected": {"both": {"auroc": 0.6 + k / 100}}, "effect": None}
    return record | {
        "statement": f"Stroke number {k}; fires on {k % 10}s",
        "explained": k % 3 == 0,
        "mark": "returns" if k % 2 else "one way among many",
        "hypothesis": {"drawing": {"there": places[: k % 3], "absent": places[2:] * (k % 2)}},
        "confidence": ("High", "Medium", "Low")[k % 3],
        "verdict": ("confirmed", "inconclusive", "refuted")[k % 3],
        "measured": ["a line"],
        "evidence": evidence,
    }


def small_world(d_sae: int = 24) -> World:
    images, labels = read_digits()
    layer = small_layer(d_sae, images)
    model, sae, mu, std = layer
    loader = [(images, labels)]

    bank = fa.collect_feature_bank(model, loader, sae, mu, std)
    activity = fa.collect_activity(layer, images, labels)
    analysis = fa.Analysis(
        bank,
        fa.feature_input_patterns(model, sae, mu, std),
        fa.feature_logit_effects(model, loader, sae, mu, std),
        fa.feature_ablation_effects(model, loader, sae, mu, std),
        fa.nearest_features(sae.W_dec),
        np.ones((28, 28), dtype=bool),
        activity,
        fa.removal_effects(layer, images, activity),
    )
    records = [with_statement(k, fa.feature_record(k, analysis)) for k in range(d_sae)]
    shown = fp.Shown(bank, activity, images, analysis.heats)
    return World(layer, records, shown, fp.Network(*model), (images[:50], labels[:50]))


def write(path: Path, world: World, **options) -> Path:
    options = {"network": world.network, "tests": world.tests, **options}
    fp.write_dashboard(path, world.records, world.layer, world.shown, **options)
    return path


def write_bare(path: Path, world: World, records: list[dict], title: str = "Title") -> Path:
    """A page without a network."""
    fp.write_dashboard(path, records, world.layer, world.shown, fp.Overview(title))
    return path


@pytest.fixture(scope="module")
def world():
    return small_world()


def script(path: Path, name: str) -> str:
    opening = rf'<script type="application/[a-z-]+" id="{name}">'
    (text,) = re.findall(f"{opening}(.*?)</script>", path.read_text(), re.DOTALL)
    return text


def meta_of(path: Path) -> dict:
    return json.loads(script(path, "meta"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a page, flat, unpacked as the browser does it."""
    raw = gzip.decompress(base64.b64decode(script(path, "pack")))
    kinds = {"u1": np.uint8, "i1": np.int8, "f4": np.float32}
    arrays = {}
    for name, place in meta_of(path)["arrays"].items():
        assert place["offset"] % 4 == 0
        kind = kinds[place["type"]]
        arrays[name] = np.frombuffer(raw, kind, place["length"], place["offset"]).copy()
    return arrays


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


def nasty_records(world: World) -> list[dict]:
    first, *rest = world.records
    return [{**first, "statement": NASTY, "measured": [NASTY]}, *rest]


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
        assert feature["raises"] == record["logit_boost_class"]
        assert feature["logit"] == pytest.approx(record["logit_delta_vector"], rel=1e-3)
        assert feature["ablation"] == pytest.approx(record["ablation_delta_vector"], rel=1e-3)
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


# --------------------------------------------------------------------------------------------------
# The browser
# --------------------------------------------------------------------------------------------------


def installed_browser() -> str | None:
    """The path of a browser, None without one."""
    for name in BROWSERS:
        if shutil.which(name):
            return shutil.which(name)
    return None


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = installed_browser()
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file; whatever the console complains about fails the test."""
    contexts, complaints = [], []

    def note_error(message) -> None:
        if message.type == "error":
            complaints.append(message.text)

    def open_page(path: Path, address: str = "", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", note_error)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"file://{path}{address}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "feature_report.html", world)


COMPUTE_TESTS = """() => meta.tests.map((_, n) => {
    const pixels = arrays.tests.subarray(n * 784, (n + 1) * 784);
    const r = forward(Float32Array.from(pixels, v => v / 255));
    const without = moved(r.z, 2, -r.feature[2]);
    return [r.logits, r.feature, head(through(r.feature)), head(without)].map(x => [...x]);
})"""


def test_the_page_computes_what_python_computes(visit, written, world):
    found = visit(written, "#view=live").evaluate(COMPUTE_TESTS)
    model, sae, mu, std = world.layer
    raw = model.preactivations(world.tests[0])
    acts = sae.encode((raw - mu) / std)
    rebuilt = sae.decode(acts) * std + mu
    without = raw - acts[:, 2:3] * sae.W_dec[2] * std

    logits = model.logits_from_preactivations
    expected = (logits(raw), acts, logits(rebuilt), logits(without))
    assert len(found) == 50
    for part, values in enumerate(expected):
        computed = np.array([one[part] for one in found])
        assert computed == pytest.approx(values.numpy(), abs=1e-4)


def features_in_grid(page) -> list[int]:
    links = page.locator("#grid a").all()
    return [int(link.get_attribute("href").split("=")[1]) for link in links]


def by(world: World, name: str) -> list[int]:
    """The features, those first of which most is on record."""
    values = [float(f"{record[name]:.4g}") for record in world.records]
    return sorted(range(len(values)), key=lambda k: (-values[k], k))


def test_sorting_and_filtering(visit, written, world):
    page = visit(written, "#view=features")
    assert features_in_grid(page) == by(world, "influence")
    page.select_option("#sort", "firing rate")
    assert features_in_grid(page) == by(world, "mean_active")
    page.select_option("#sort", "number")
    assert features_in_grid(page) == list(range(24))

    page.select_option("#confidence", "High")
    assert features_in_grid(page) == list(range(0, 24, 3))
    page.select_option("#verdict", "refuted")
    assert features_in_grid(page) == []
    page.select_option("#verdict", "")
    page.select_option("#confidence", "")

    often = [k for k in range(24) if world.records[k]["mean_active"] >= 0.1]
    page.select_option("#rate", "at least 10%")
    assert features_in_grid(page) == often != list(range(24))
    page.select_option("#rate", "never")
    assert features_in_grid(page) == [23]
    page.select_option("#rate", "")

    label = world.records[0]["label_mode_when_active"]
    same = [k for k in range(24) if world.records[k]["label_mode_when_active"] == label]
    page.select_option("#label", str(label))
    assert features_in_grid(page) == same


def test_searching(visit, written):
    page = visit(written, "#view=features")
    page.fill("#search", "7")
    assert features_in_grid(page) == [7]
    page.fill("#search", "fires on 3s")
    assert sorted(features_in_grid(page)) == [3, 13, 23]
    assert page.locator("#count").inner_text() == "3 of 24 features"
    page.fill("#search", "")
    assert len(features_in_grid(page)) == 24


def wait_for_feature(page, k: int) -> None:
    page.wait_for_function(f"document.querySelector('h2').textContent === 'Feature {k}'")


def test_links_arrows_and_points(visit, written, world):
    page = visit(written, "#feature=5")
    assert page.locator("h2").inner_text() == "Feature 5"
    order = by(world, "influence")
    page.keyboard.press("ArrowRight")
    wait_for_feature(page, order[(order.index(5) + 1) % 24])
    page.keyboard.press("ArrowLeft")
    wait_for_feature(page, 5)
    assert page.url.endswith("#feature=5")

    page.click("text=Overview")
    page.wait_for_selector("#scatter a")
    points = page.locator("#scatter a")
    assert points.count() == 23  # all but the silent one
    points.nth(4).dispatch_event("click")
    page.wait_for_function("location.hash.startsWith('#feature=')")

    page.click("text=All features")
    page.wait_for_selector("#grid a")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function(f"location.hash === '#feature={order[1]}'")


def draw_seven(page) -> None:
    """Draw two straight strokes with the mouse."""
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 220, box["y"] + 60, steps=8)
    page.mouse.move(box["x"] + 120, box["y"] + 230, steps=8)
    page.mouse.up()
    page.wait_for_selector("#active .unit")


def logits_text(page, which: str) -> str:
    """The logits on the page: "says" those of the network, "changed" those after changes."""
    return page.locator(f"#{which}").get_attribute("data-logits")


@pytest.fixture
def drawn(visit, written):
    page = visit(written, "#view=live", viewport={"width": 1200, "height": 900})
    draw_seven(page)
    return page


def test_a_drawing_is_centred_like_a_digit_of_mnist(drawn):
    pixels = np.array(drawn.evaluate("[...live.pixels]")).reshape(28, 28)
    rows, columns = np.nonzero(pixels > 0.05)
    assert max(np.ptp(rows), np.ptp(columns)) in (19, 20)
    centre = (pixels * np.mgrid[:28, :28]).sum((1, 2)) / pixels.sum()
    assert centre == pytest.approx([13.5, 13.5], abs=0.6)


def test_switching_a_feature_off_and_on_again(drawn):
    before = logits_text(drawn, "changed")
    assert before == logits_text(drawn, "says")
    drawn.locator("#active .unit button").first.click()
    off = logits_text(drawn, "changed")
    assert off != before
    assert logits_text(drawn, "says") == before

    drawn.locator("#active input[type=range]").first.evaluate(
        "slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }"
    )
    drawn.wait_for_function(f"document.querySelector('#changed').dataset.logits !== '{off}'")
    drawn.click("#reset")
    assert logits_text(drawn, "changed") == before


def test_a_slider_stays_under_the_pointer_all_the_way(drawn):
    before = logits_text(drawn, "changed")
    slider = drawn.locator("#active input[type=range]").nth(1)
    slider.scroll_into_view_if_needed()
    bar = slider.bounding_box()
    middle = bar["y"] + bar["height"] / 2
    drawn.mouse.move(bar["x"] + bar["width"] / 2, middle)
    drawn.mouse.down()
    seen = []
    for share in (0.6, 0.7, 0.8, 0.9):
        drawn.mouse.move(bar["x"] + share * bar["width"], middle)
        drawn.wait_for_timeout(60)
        seen.append(logits_text(drawn, "changed"))
    drawn.mouse.up()
    assert len(set(seen)) == 4
    drawn.click("#reset")
    assert logits_text(drawn, "changed") == before


def test_watching_pixels_and_clearing(drawn):
    drawn.locator("text=pixels").first.click()
    assert drawn.locator("#why canvas").count() == 1
    drawn.click("#clear")
    assert "Draw a digit" in drawn.locator("#predictions").inner_text()


def test_words_are_shown_as_words(visit, world, tmp_path):
    path = write_bare(tmp_path / "page.html", world, nasty_records(world), NASTY)
    page = visit(path, "#feature=0")
    assert "</script><script>alert(1)</script>" in page.locator(".card b").first.inner_text()
    assert page.locator("main script").count() == 0


@pytest.mark.parametrize("d_sae", [1, 300])
def test_pages_of_other_sizes(visit, d_sae, tmp_path):
    path = write(tmp_path / "page.html", small_world(d_sae))
    page = visit(path, "#view=features")
    assert page.locator("#grid a").count() == d_sae
    for view in ("#view=overview", "#view=live", f"#feature={d_sae - 1}"):
        page.goto(f"file://{path}{view}")
        assert page.locator("main").inner_text()


SAID = ("statement", "confidence", "verdict", "evidence", "measured")


def test_a_silent_feature_and_runs_without_statements(visit, world, tmp_path):
    bare = []
    for record in world.records:
        bare.append({name: value for name, value in record.items() if name not in SAID})
    path = write_bare(tmp_path / "page.html", world, bare)
    page = visit(path, "#feature=23")
    text = page.locator("main").inner_text()
    assert "No image fires it." in text
    assert "This run made no statements about features." in text
    assert "NaN" not in text
    page.goto(f"file://{path}#view=live")
    page.wait_for_function(
        "document.querySelector('main').textContent.includes('without the network')"
    )


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_in_its_width(visit, written, scheme):
    phone = {"width": 380, "height": 800}
    page = visit(written, viewport=phone, color_scheme=scheme, has_touch=True)
    for view in ("#view=overview", "#view=features", "#feature=3", "#view=live"):
        page.goto(f"file://{written}{view}")
        page.wait_for_timeout(50)
        assert page.evaluate(FITS), view
    assert page.locator("canvas:not([aria-label])").count() == 0
