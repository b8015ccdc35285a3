"""The page in a real browser, by pointer and keyboard; its numbers against those of Python."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page_world import NASTY, meta_of, small_world, write

from saexplain import page as html
from saexplain.activity import contributions
from saexplain.counterfactuals import class_effects, review_tests

pytestmark = pytest.mark.slow

FLAGS = ("--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-background-networking")
VIEWS = ("story", "class&class=7", "pair", "errors", "features", "features&as=map")
VIEWS += ("features&as=charts", "feature&feature=3", "two&features=3,4", "draw")


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def review(world):
    test = world.layer.splits["test"]
    return review_tests(world.layer, test.raw, test.labels)


@pytest.fixture(scope="module")
def effects(world):
    """Mean contributions (C, d_sae, C) by class."""
    added, _ = contributions(world.layer, world.layer.splits["val"].raw, world.shown.activity)
    return class_effects(world.shown.activity, added)


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file; an error in the console fails the test."""
    contexts, errors = [], []

    def open_page(path: Path, address: str = "", **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{path}{address}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "feature_report.html", world)


def numbers_in(text: str) -> list[float]:
    """The signed numbers of a text, as the page writes them."""
    return [float(n) for n in re.findall(r"[+-]?\d+\.\d+", text.replace("\u2212", "-"))]


def rows_of(page, where: str) -> list[tuple[int, float]]:
    """(feature, value) of the rows of features in a part of the page."""
    rows = []
    for row in page.locator(f"{where} .unit").all():
        feature = int(re.search(r"Feature (\d+)", row.inner_text())[1])
        rows.append((feature, numbers_in(row.locator("> b").inner_text())[0]))
    return rows


def differences(review, image: int, a: int, b: int) -> dict[int, float]:
    """The contribution of each active feature to the logit difference a - b on an image."""
    own = review.activity.image == image
    values = review.added[own, a] - review.added[own, b]
    return dict(zip(review.activity.feature[own].tolist(), values.tolist(), strict=True))


def go(page, address: str) -> None:
    page.evaluate("address => { location.hash = address; }", address)
    page.wait_for_timeout(30)


def wait_for_heading(page, words: str) -> None:
    page.wait_for_function("words => document.querySelector('h2').textContent === words", arg=words)


def logits_of(page, element: str) -> list[float]:
    return [float(v) for v in page.locator(f"#{element}").get_attribute("data-logits").split()]


COMPUTE = """() => tests().map(t => {
    const r = forward(pixelsOf(t)), without = withAdded(r.z, 2, -r.feature[2]);
    return [r.logits, r.feature, head(reconstruct(r.feature)), head(without)].map(x => [...x]);
})"""


def test_page_computes_what_python_computes(visit, written, world, review):
    found = visit(written, "#view=draw").evaluate(COMPUTE)
    layer = world.layer
    raw = layer.splits["test"].raw[review.image]
    acts = layer.feature_acts(raw)
    rebuilt = layer.logits_of_z(layer.sae.decode(acts))
    expected = (layer.logits(raw), acts, rebuilt, layer.logits(layer.without(raw, 2)))
    for part, values in enumerate(expected):
        computed = np.array([one[part] for one in found])
        assert computed == pytest.approx(values.numpy(), abs=1e-4)


def test_tour_by_pointer_and_by_keyboard(visit, written, review):
    tour, page = review.tour, visit(written)
    page.click("#tourNext")
    assert set(tour.off) <= {feature for feature, _ in rows_of(page, "#tour")}
    page.click("#tourNext")
    page.wait_for_selector("#tourPrediction")
    subset = 0
    for bit, k in enumerate(tour.off):
        page.locator(f"#tour{k}").focus()
        page.keyboard.press("Enter")
        subset |= 1 << bit
        shown = logits_of(page, "tourLogits")
        assert shown == pytest.approx(tour.logits[subset].tolist(), abs=1e-4)
    assert page.locator("#tourPrediction").inner_text() == str(tour.goal)
    page.keyboard.press("Escape")
    page.wait_for_selector("#tourAgain")


def test_features_of_a_class(visit, written, effects):
    page, own = visit(written, "#view=class&class=7"), effects[7, :, 7]
    rows = rows_of(page, "main")
    supporting = [k for k in np.argsort(-own, kind="stable").tolist()[:12] if own[k] > 0]
    opposing = [k for k in np.argsort(own, kind="stable").tolist()[:8] if own[k] < 0]
    assert rows == [(k, pytest.approx(own[k], abs=0.0051)) for k in supporting + opposing]


def test_contributions_to_a_pair_on_an_image(visit, written, review):
    labels = meta_of(written)["tests"]["labels"]
    image = labels.index(4, review.n_errors)
    page = visit(written, f"#view=pair&a=4&b=9&image={image}")
    expected = differences(review, image, 4, 9)
    rows = page.locator("#imageParts li").all_inner_texts()
    assert len(rows) == min(12, len(expected)) > 2
    for row in rows:
        assert numbers_in(row)[-1] == pytest.approx(expected[int(row.split()[0])], abs=0.0051)


def test_errors_and_their_flip_sets(visit, written, world, review):
    page, labels = visit(written, "#view=errors"), meta_of(written)["tests"]["labels"]
    links = page.locator("nav[aria-label='Errors'] a")
    assert links.count() == review.n_errors
    for error in [n for n in range(review.n_errors) if review.sets.off[n].any()][:2]:
        links.nth(error).click()
        page.wait_for_function(f"location.hash.includes('image={error}')")
        label, prediction = labels[error], int(review.logits[error].argmax())
        title = page.locator("#error h3").first.inner_text()
        assert f"a {label}, classified as {prediction}" in title
        off = [int(k) for k in page.locator("#flipSet").get_attribute("data-off").split()]
        assert off == review.sets.off[error].nonzero()[:, 0].tolist()
        cells = page.locator("#error table tr").nth(1).locator("td").all_inner_texts()
        counts = [off[0], int(review.fixes[off[0]]), int(review.breaks[off[0]])]
        assert [int(cells[0]), *map(int, cells[3:])] == counts
        expected = differences(review, error, prediction, label)
        for k, value in rows_of(page, "#error"):
            assert value == pytest.approx(expected[k], abs=0.0051)
        page.click("#flipSet >> text=Try it")
        page.wait_for_selector("#changed")
        after = review.sets.logits[error].tolist()
        assert logits_of(page, "changed") == pytest.approx(after, abs=1e-4)  # the view agrees
        page.go_back()


def features_in_grid(page) -> list[int]:
    links = page.locator("#grid a").all()
    return [int(link.get_attribute("href").split("=")[-1]) for link in links]


def by(world, name: str) -> list[int]:
    """The features by falling value of their record, as the page rounds it."""
    values = [float(f"{record[name]:.4g}") for record in world.records]
    return sorted(range(len(values)), key=lambda k: (-values[k], k))


def test_sorting_filtering_and_searching(visit, written, world):
    page = visit(written, "#view=features")
    assert features_in_grid(page) == by(world, "influence")
    page.select_option("#sort", "density")
    assert features_in_grid(page) == by(world, "mean_active")
    page.select_option("#sort", "number")
    supported = [int(np.argmin(r["ablation_delta_vector"])) for r in world.records[:23]]
    mode = [r["label_mode_when_active"] for r in world.records]
    dense = [k for k, r in enumerate(world.records) if r["mean_active"] >= 0.1]
    expected = {
        ("confidence", "High"): list(range(0, 24, 3)),
        ("outcome", "refuted"): list(range(2, 24, 3)),
        ("density", "at least 10%"): dense,
        ("density", "never"): [23],
        ("label", str(mode[0])): [k for k in range(24) if mode[k] == mode[0]],
        ("supports", str(supported[0])): [k for k in range(23) if supported[k] == supported[0]],
    }
    for (field, value), features in expected.items():
        page.select_option(f"#{field}", value)
        assert features_in_grid(page) == features, (field, value)
        page.select_option(f"#{field}", "")
    page.fill("#search", "active on 3s")
    assert features_in_grid(page) == [3, 13, 23]


def test_feature_view_links_arrows_and_escape(visit, written, world):
    page, order = visit(written, "#feature=5"), by(world, "influence")
    wait_for_heading(page, "Feature 5")
    page.keyboard.press("ArrowRight")
    wait_for_heading(page, f"Feature {order[(order.index(5) + 1) % 24]}")
    go(page, "view=feature&feature=3")
    shown = [numbers_in(row)[-1] for row in page.locator("#supports li").all_inner_texts()]
    lost = [-change for change in world.records[3]["ablation_delta_vector"]]
    assert shown == pytest.approx(lost, abs=0.0051)
    go(page, "view=features&as=charts")
    assert page.locator("#scatter .point").count() == 23  # all but the inactive one
    page.locator("#scatter .point").nth(4).click()
    wait_for_heading(page, "Feature 4")
    page.keyboard.press("Escape")
    page.wait_for_selector("#scatter")


def draw_line(page, *points: tuple[int, int]) -> None:
    """Draw with the mouse, in pixels of the canvas as it is on the screen."""
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + points[0][0], box["y"] + points[0][1])
    page.mouse.down()
    for x, y in points[1:]:
        page.mouse.move(box["x"] + x, box["y"] + y, steps=8)
    page.mouse.up()
    page.wait_for_selector("#active .unit")
    page.wait_for_timeout(40)


def pixels_of(page) -> np.ndarray:
    return np.array(page.evaluate("[...live.pixels]")).reshape(28, 28)


def test_drawing_is_centered_and_its_features_are_switched(visit, written, world):
    page, layer = visit(written, "#view=draw"), world.layer
    draw_line(page, (60, 60), (220, 60), (120, 230))
    pixels = pixels_of(page)
    center = (pixels * np.mgrid[:28, :28]).sum((1, 2)) / pixels.sum()
    assert center == pytest.approx([13.5, 13.5], abs=0.6)

    raw = layer.raw(torch.tensor(pixels).float()[None, None])
    acts, logits = layer.feature_acts(raw)[0], layer.logits(raw)[0]
    assert logits_of(page, "prediction") == pytest.approx(logits.tolist(), abs=1e-4)
    tiles = page.locator("#active .unit")
    assert tiles.count() == int((acts > 0).sum()) > 2
    for tile in tiles.all():
        k = int(tile.get_attribute("data-feature"))
        without = layer.logits(layer.without(raw, k))[0]
        lost = float((logits - without)[logits.argmax()])
        assert numbers_in(tile.locator("b").inner_text())[0] == pytest.approx(lost, abs=0.0051)
    page.locator(f"#flip{k}").focus()
    page.keyboard.press("Enter")
    go(page, "view=story")
    go(page, "view=draw")  # a drawing survives another view
    assert logits_of(page, "changed") == pytest.approx(without.tolist(), abs=1e-4)
    page.keyboard.press("Escape")
    assert logits_of(page, "changed") == logits_of(page, "prediction")


def test_test_image_is_edited_and_kept_in_the_address(visit, written, world, review):
    page = visit(written, "#view=draw")
    page.locator("nav[aria-label='Test images'] a").first.click()
    page.wait_for_function("location.hash.includes('image=')")
    images = world.layer.splits["test"].images[review.image]
    image = (images[int(page.evaluate("live.image"))][0] * 255).round() / 255
    assert pixels_of(page) == pytest.approx(image.numpy(), abs=1e-6)
    k = int(page.locator("#active .unit").first.get_attribute("data-feature"))
    page.click(f"#flip{k}")
    page.wait_for_function(f"location.hash.includes('set={k}:0')")
    again = visit(written, "#" + page.url.split("#")[1])
    changed = logits_of(page, "changed")
    assert logits_of(again, "changed") == changed != logits_of(again, "prediction")

    draw_line(page, (20, 20), (60, 20))
    assert pixels_of(page)[2, 2:5].min() > 0.9
    assert pixels_of(page)[8:] == pytest.approx(image[8:].numpy(), abs=1e-6)  # the rest unchanged
    page.click("#undo")
    assert pixels_of(page) == pytest.approx(image.numpy(), abs=1e-6)


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
BARE = ("caption", "confidence", "outcome", "evidence", "measured", "hypothesis")


@pytest.mark.parametrize("d_sae", [1, 24, 300])
def test_every_view_fits_a_phone(visit, d_sae, tmp_path):
    path = write(tmp_path / "page.html", small_world(d_sae))
    page = visit(path, "#view=features", viewport={"width": 380, "height": 800}, has_touch=True)
    assert page.locator("#grid a").count() == d_sae
    for view in (*VIEWS, f"feature&feature={d_sae - 1}"):
        go(page, f"view={view}")
        assert page.locator("main").inner_text()
        assert page.evaluate(FITS), view


def test_without_network_tests_and_hypotheses(visit, world, tmp_path):
    layer = replace(world.layer, splits={"val": world.layer.splits["val"]})
    bare = [{n: v for n, v in record.items() if n not in BARE} for record in world.records]
    overview = html.Overview(NASTY, without_drawing="It is convolutional.")
    world = world._replace(layer=layer)
    page = visit(write(tmp_path / "a.html", world, bare, network=None, overview=overview))
    for view in VIEWS:
        go(page, f"view={view}")
        text = page.locator("main").inner_text()
        assert not re.search("NaN|undefined|^$", text)
    assert "It is convolutional." in text
    assert "</script><script>alert(1)</script>" in page.locator("#title").inner_text()


AXE = """() => axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"] })
    .then(found => found.violations.map(v => [v.id, v.nodes[0].html.slice(0, 200)]))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible(visit, written, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    page = visit(written, color_scheme=scheme)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    for view in (*VIEWS, "story&step=1", "story&step=2", "story&step=3", "draw&image=60&set=3:0"):
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate(AXE) == [], view
