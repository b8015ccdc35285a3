"""The page: what is in the file, and, in a real browser where there is one, what it computes and how it is used."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import feature_analysis as fa
import MNIST_SAE_code as driver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><script>alert(1)</script> \"quotes\" 'single' & <b> line\u2028separator \ud800 lone"


def small_world(d_sae: int = 24, n_tests: int = 50) -> SimpleNamespace:
    """An untrained classifier and SAE on some of the bundled digits, with the last feature silent."""
    images, labels = driver.read_sample()
    chosen = np.arange(0, len(images), 25)
    images = torch.from_numpy(images[chosen])[:, None].float() / 255
    labels = torch.from_numpy(labels[chosen].astype(np.int64))
    torch.manual_seed(0)
    model = driver.Classifier(hidden_units=16).requires_grad_(False)
    model.pixel_mean.copy_(images.flatten(1).mean(0))
    raw = model.preactivations(images)
    mu, std = raw.mean(0), raw.std(0)
    sae = driver.JumpReLUSAE(16, d_sae).requires_grad_(False)
    sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, 16), dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.copy_(0.1 * torch.randn(d_sae))
    sae.b_dec.copy_(0.1 * torch.randn(16))
    sae.threshold.copy_(torch.linspace(0.3, 1.0, d_sae))
    if d_sae > 1:
        sae.threshold[-1] = 1e6
    given, loader = (sae, mu, std), [(images, labels)]
    bank = fa.collect_feature_bank(model, loader, *given)
    analysis = driver.Analysis(
        bank,
        fa.feature_input_patterns(model, *given),
        fa.feature_logit_effects(model, loader, *given),
        fa.feature_ablation_effects(model, loader, *given),
        fa.nearest_features(sae.W_dec),
        np.ones((28, 28), dtype=bool),
    )
    network = fa.Network(
        model.hidden.weight,
        model.hidden.bias - model.hidden.weight @ model.pixel_mean,
        model.head.weight,
        model.head.bias,
    )
    records = [driver.feature_record(k, analysis) for k in range(d_sae)]
    for k, record in enumerate(records):
        record |= {
            "statement": f"Stroke number {k}; fires on {k % 10}s",
            "confidence": ("High", "Medium", "Low")[k % 3],
        }
        record |= {"verdict": ("confirmed", "inconclusive", "refuted")[k % 3], "measured": ["a line"]}
        record["evidence"] = {"text": "evidence", "detected": {"both": {"auroc": 0.6 + k / 100}}, "effect": None}
    activity = fa.collect_activity(model, images, labels, *given)
    tests = (images[:n_tests], labels[:n_tests])
    arguments = (records, bank, activity, images, analysis.heats, *given)
    return SimpleNamespace(**locals())


def write(path: Path, world: SimpleNamespace, **options) -> Path:
    options = {"network": world.network, "tests": world.tests, **options}
    fa.write_dashboard(path, *world.arguments, **options)
    return path


@pytest.fixture(scope="module")
def world():
    return small_world()


def meta_of(path: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="meta">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


# --- The file ---------------------------------------------------------------------------------------------------------


def test_one_file_without_addresses_and_twice_the_same(world, tmp_path):
    page = write(tmp_path / "a.html", world)
    assert page.read_bytes() == write(tmp_path / "b.html", world).read_bytes()
    text = page.read_text()
    addresses = set(re.findall(r"https?://[^\"'\s]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not something to fetch
    assert "{{" not in text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.html", "b.html"]


def test_nasty_words_cannot_end_the_script(world, tmp_path):
    records = [{**world.records[0], "statement": NASTY, "measured": [NASTY]}, *world.records[1:]]
    path = tmp_path / "page.html"
    fa.write_dashboard(path, records, *world.arguments[1:], title=NASTY)
    assert meta_of(path)["features"][0]["statement"] == NASTY
    assert path.read_text().count("</script>") == 3  # data, data, code


def test_what_the_page_knows_of_a_feature(world, tmp_path):
    feature = meta_of(write(tmp_path / "page.html", world))["features"][3]
    acts = world.sae.encode((world.raw - world.mu) / world.std)[:, 3]
    assert feature["density"] == pytest.approx(float((acts > 0).float().mean()), rel=1e-4)
    assert feature["largest"] == pytest.approx(float(acts.max()), rel=1e-3)
    assert [round(a, 2) for _, _, a in feature["top"]] == pytest.approx(
        acts.sort(descending=True).values[: fa.PAGE_TOP].tolist(), abs=0.01
    )
    cosine = world.sae.W_dec @ world.sae.W_dec[3]
    cosine[3] = -2
    assert feature["near"][0] == [int(cosine.argmax()), pytest.approx(float(cosine.max()), abs=1e-3)]


def test_histograms_and_partners_by_hand(world):
    acts = world.sae.encode((world.raw - world.mu) / world.std).numpy()
    counts, largest = fa.activation_histograms(world.activity, bins=10)
    for k in (0, 5):
        positive = acts[:, k][acts[:, k] > 0]
        expected, _ = np.histogram(positive, bins=10, range=(0, positive.max()))
        assert abs(counts[k] - expected).sum() <= 2  # values on an edge
        assert largest[k] == pytest.approx(positive.max())
    assert counts[-1].sum() == largest[-1] == 0
    partner, correlation = fa.firing_together(world.activity, 3)
    expected = np.corrcoef((acts[:, :-1] > 0).T)
    np.fill_diagonal(expected, -2)
    assert correlation[:-1, 0].numpy() == pytest.approx(expected.max(1), abs=1e-4)
    assert expected[np.arange(23), partner[:-1, 0]] == pytest.approx(expected.max(1), abs=1e-4)


# --- The browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    flags = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags.split(), "--no-first-run"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file; whatever the console complains about fails the test."""
    contexts, complaints = [], []

    def open_page(path: Path, address: str = "", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
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
    return write(tmp_path_factory.mktemp("page") / "feature_report.html", world, diagnoses=[])


def test_the_page_computes_what_python_computes(visit, written, world):
    page = visit(written, "#view=live")
    found = page.evaluate(
        """() => meta.tests.map((_, n) => {
            const r = forward(Float32Array.from(arrays.tests.subarray(n * 784, (n + 1) * 784), v => v / 255));
            const without = moved(r.z, 2, -r.feature[2]);
            return [[...r.logits], [...r.feature], [...head(through(r.feature))], [...head(without)]];
        })"""
    )
    raw = world.model.preactivations(world.tests[0])
    acts = world.sae.encode((raw - world.mu) / world.std)
    logits = world.model.logits_from_preactivations
    rebuilt = logits(world.sae.decode(acts) * world.std + world.mu)
    without = logits(raw - acts[:, 2:3] * world.sae.W_dec[2] * world.std)
    assert len(found) == 50
    for part, expected in enumerate((logits(raw), acts, rebuilt, without)):
        assert np.array([one[part] for one in found]) == pytest.approx(expected.numpy(), abs=1e-4)


def test_sorting_filtering_and_searching(visit, written, world):
    page = visit(written, "#view=features")

    def shown() -> list[int]:
        return [int(a.get_attribute("href").split("=")[1]) for a in page.locator("#grid a").all()]

    density = {r["feature"]: r["mean_active"] for r in world.records}
    assert shown() == sorted(density, key=lambda k: (-density[k], k))
    page.select_option("#sort", "number")
    assert shown() == list(range(24))
    page.select_option("#confidence", "High")
    assert shown() == list(range(0, 24, 3))
    page.select_option("#verdict", "refuted")
    assert shown() == []
    page.select_option("#verdict", "")
    page.select_option("#confidence", "")
    page.fill("#search", "7")
    assert shown() == [7]
    page.fill("#search", "fires on 3s")
    assert shown() == [3, 13, 23]
    assert page.locator("#count").inner_text() == "3 of 24 features"
    page.fill("#search", "")
    page.select_option("#rate", "at least 10%")
    assert shown() == [k for k in range(24) if density[k] >= 0.1] != list(range(24))
    page.select_option("#rate", "never")
    assert shown() == [23]
    page.select_option("#rate", "")
    page.select_option("#label", str(world.records[0]["label_mode_when_active"]))
    assert 0 in shown()


def test_links_arrows_and_points(visit, written, world):
    page = visit(written, "#feature=5")
    assert page.locator("h2").inner_text() == "Feature 5"
    order = sorted(range(24), key=lambda k: (-world.records[k]["mean_active"], k))
    page.keyboard.press("ArrowRight")
    following = order[(order.index(5) + 1) % 24]
    page.wait_for_function(f"document.querySelector('h2').textContent === 'Feature {following}'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('h2').textContent === 'Feature 5'")
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


def test_drawing_switching_off_and_sliding(visit, written):
    page = visit(written, "#view=live", viewport={"width": 1200, "height": 900})
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 220, box["y"] + 60, steps=8)
    page.mouse.move(box["x"] + 120, box["y"] + 230, steps=8)
    page.mouse.up()
    page.wait_for_selector("#active .unit")
    pixels = np.array(page.evaluate("[...live.pixels]")).reshape(28, 28)
    rows, columns = np.nonzero(pixels > 0.05)
    assert max(np.ptp(rows), np.ptp(columns)) in (19, 20)
    centre = (pixels * np.mgrid[:28, :28]).sum((1, 2)) / pixels.sum()
    assert centre == pytest.approx([13.5, 13.5], abs=0.6)

    def logits(which: str) -> list[float]:
        return [float(v) for v in page.locator(f"#{which}").get_attribute("data-logits").split()]

    before = logits("changed")
    assert before == logits("says")
    page.locator("#active .unit button").first.click()
    off = logits("changed")
    assert off != before
    assert logits("says") == before
    page.locator("#active input[type=range]").first.evaluate(
        "slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }"
    )
    page.wait_for_function(f"document.querySelector('#changed').dataset.logits !== '{' '.join(map(str, off))}'")
    page.click("#reset")
    assert logits("changed") == before
    slider = page.locator("#active input[type=range]").nth(1)
    slider.scroll_into_view_if_needed()
    bar, seen = slider.bounding_box(), []
    page.mouse.move(bar["x"] + bar["width"] / 2, bar["y"] + bar["height"] / 2)
    page.mouse.down()
    for share in (0.6, 0.7, 0.8, 0.9):  # one drag: the slider must stay under the pointer all the way
        page.mouse.move(bar["x"] + share * bar["width"], bar["y"] + bar["height"] / 2)
        page.wait_for_timeout(60)
        seen.append(logits("changed"))
    page.mouse.up()
    assert len({tuple(values) for values in seen}) == 4
    page.click("#reset")
    assert logits("changed") == before
    page.locator("text=pixels").first.click()
    assert page.locator("#why canvas").count() == 1
    page.click("#clear")
    assert "Draw a digit" in page.locator("#predictions").inner_text()


def test_words_are_shown_as_words(visit, world, tmp_path):
    records = [{**world.records[0], "statement": NASTY, "measured": [NASTY]}, *world.records[1:]]
    fa.write_dashboard(tmp_path / "page.html", records, *world.arguments[1:], title=NASTY)
    page = visit(tmp_path / "page.html", "#feature=0")
    assert "</script><script>alert(1)</script>" in page.locator(".card b").first.inner_text()
    assert page.locator("main script").count() == 0


@pytest.mark.parametrize("d_sae", [1, 300])
def test_pages_of_other_sizes(visit, d_sae, tmp_path):
    world = small_world(d_sae)
    page = visit(write(tmp_path / "page.html", world), "#view=features")
    assert page.locator("#grid a").count() == d_sae
    for view in ("#view=overview", "#view=live", f"#feature={d_sae - 1}"):
        page.goto(f"file://{tmp_path / 'page.html'}{view}")
        assert page.locator("main").inner_text()


def test_a_silent_feature_and_runs_without_statements(visit, world, tmp_path):
    bare = [
        {k: v for k, v in r.items() if k not in ("statement", "confidence", "verdict", "evidence", "measured")}
        for r in world.records
    ]
    fa.write_dashboard(tmp_path / "page.html", bare, *world.arguments[1:])
    page = visit(tmp_path / "page.html", "#feature=23")
    text = page.locator("main").inner_text()
    assert "No image fires it." in text
    assert "This run made no statements about features." in text
    assert "NaN" not in text
    page.goto(f"file://{tmp_path / 'page.html'}#view=live")
    page.wait_for_function("document.querySelector('main').textContent.includes('without the network')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_in_its_width(visit, written, scheme):
    page = visit(written, viewport={"width": 380, "height": 800}, color_scheme=scheme, has_touch=True)
    for view in ("#view=overview", "#view=features", "#feature=3", "#view=live"):
        page.goto(f"file://{written}{view}")
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), view
    assert page.locator("canvas:not([aria-label])").count() == 0
