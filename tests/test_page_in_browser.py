"""What the page does, in a real browser where there is one, by pointer and by keyboard.

The numbers that it shows are compared with those of Python.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from page_world import NASTY, World, meta_of, nasty_records, small_world, write, write_bare

import feature_analysis as fa
import feature_page as fp
import feature_roles as fr

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = (
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def world():
    return small_world()


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


COMPUTE_TESTS = """() => tests().map(t => {
    const r = forward(pixelsOf(t)), without = moved(r.z, 2, -r.feature[2]);
    return [r.logits, r.feature, head(through(r.feature)), head(without)].map(x => [...x]);
})"""


def test_the_page_computes_what_python_computes(visit, written, world):
    page = visit(written, "#view=draw")
    found, number = page.evaluate(COMPUTE_TESTS), meta_of(written)["tests"]["number"]
    model, sae, mu, std = world.layer
    raw = model.preactivations(world.tests.images[number])
    acts = sae.encode((raw - mu) / std)
    rebuilt = sae.decode(acts) * std + mu
    without = raw - acts[:, 2:3] * sae.W_dec[2] * std

    logits = model.logits_from_preactivations
    expected = (logits(raw), acts, logits(rebuilt), logits(without))
    assert len(found) == len(number) > 60
    for part, values in enumerate(expected):
        computed = np.array([one[part] for one in found])
        assert computed == pytest.approx(values.numpy(), abs=1e-4)


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


def class_effects(world: World) -> np.ndarray:
    added, _ = fa.contributions(world.layer, world.shown.images, world.shown.activity)
    return fr.class_effects(world.shown.activity, added)


def go(page, address: str) -> None:
    page.evaluate("address => { location.hash = address; }", address)
    page.wait_for_timeout(30)


# --------------------------------------------------------------------------------------------------
# The story
# --------------------------------------------------------------------------------------------------


def test_the_tour_by_pointer_and_by_keyboard(visit, written, world):
    tour = fr.look_at_tests(world.layer, *world.tests).tour
    page = visit(written)
    assert page.locator("#tour").inner_text().count(f"{tour.logits[0].max():+.2f}") == 1
    page.click("#tourNext")
    page.wait_for_selector("#tour .unit")
    assert set(tour.off) <= {feature for feature, _ in rows_of(page, "#tour")}
    page.locator("#tourNext").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#tourSays")
    assert page.locator("#tourSays").inner_text() == str(int(tour.logits[0].argmax()))

    subset = 0
    for bit, k in enumerate(tour.off):
        page.locator(f"#tour{k}").focus()
        page.keyboard.press("Enter")
        subset |= 1 << bit
        logits = page.locator("#tourScores").get_attribute("data-logits")
        shown = [float(value) for value in logits.split()]
        assert shown == pytest.approx(tour.logits[subset].tolist(), abs=1e-4)
    assert page.locator("#tourSays").inner_text() == str(tour.goal)
    page.click(f"#tour{tour.off[0]}")  # and on again
    subset -= 1
    assert page.locator("#tourSays").inner_text() == str(int(tour.logits[subset].argmax()))

    page.keyboard.press("Escape")
    page.wait_for_selector("#tourAgain")
    assert page.locator("#tour").count() == 0


def test_the_story_tells_how_a_pair_is_told_apart_and_who_does_the_work(visit, written, world):
    page = visit(written)
    a, b = meta_of(written)["tests"]["pair"]
    effects = class_effects(world)
    for side, (c, d) in zip(page.locator(".halves > div").all(), ((a, b), (b, a)), strict=True):
        own, other = (effects[of, :, c] - effects[of, :, d] for of in (c, d))
        values = np.where(own > other, own, 0)
        best = [k for k in np.argsort(-values, kind="stable")[:3].tolist() if values[k] > 0]
        shown = [int(n) for n in re.findall(r"Feature (\d+)", side.inner_text())]
        assert shown == best
    accuracy = (fa.contributions(world.layer, world.tests.images, world.shown.activity)[1]).argmax(
        1
    )
    right = float((accuracy == world.tests.labels).float().mean())
    assert f"right on {100 * right:.1f}%" in page.locator("main").inner_text()
    influence = sorted((record["influence"] for record in world.records), reverse=True)
    n = int(np.argmax(np.cumsum(influence) >= 0.5)) + 1
    assert f"{n} feature{'s' * (n > 1)} of 24 make half" in page.locator("main").inner_text()
    cards = page.locator(".tile b").all_inner_texts()
    assert cards == [f"Feature {k}" for k in by(world, "influence")[:12]]


def test_diagnoses_come_with_words(visit, world, tmp_path):
    said = {"complaint": "noise", "value": 0.7, "limit": 0.5, "what": "roughness", "advice": "rest"}
    nothing = said | {"complaint": "no share", "value": None, "fine": False, "advice": "rescale"}
    overview = fp.Overview("Title", [], [said | {"fine": False}, said | {"fine": True}, nothing])
    path = write(tmp_path / "page.html", world, overview=overview)
    text = visit(path).locator("main").inner_text()
    assert "! attention noise: 0.700 (roughness; beyond 0.5 it" in text
    assert "What to do: rest" in text
    assert text.count("rest, then") == 1
    assert "✓ fine noise" in text
    assert "! attention no share: not computed (roughness; beyond 0.5 it" in text


# --------------------------------------------------------------------------------------------------
# Classes, pairs, errors
# --------------------------------------------------------------------------------------------------


def test_what_makes_a_class(visit, written, world):
    page = visit(written, "#view=class&class=7")
    own = class_effects(world)[7, :, 7]
    rows = rows_of(page, "main")
    expected = [k for k in np.argsort(-own, kind="stable").tolist()[:12] if own[k] > 0]
    against = [k for k in np.argsort(own, kind="stable").tolist()[:8] if own[k] < 0]
    assert [k for k, _ in rows] == expected + against
    for k, value in rows:
        assert value == pytest.approx(own[k], abs=0.0051)
    exact = page.evaluate("features.map((_, i) => adds(7, i, 7))")
    assert exact == pytest.approx(own.tolist(), abs=1e-6)

    share = world.records[expected[0]]["label_histogram"][7] / int((world.tests.labels == 7).sum())
    assert f"fires on {100 * share:.0f}% of all 7s" in page.locator(".unit").first.inner_text()
    page.locator(".unit a").nth(2).focus()
    assert f"places of feature {expected[2]} " in page.locator("#onMean").inner_text()
    page.locator(".unit").nth(1).hover()
    assert f"places of feature {expected[1]} " in page.locator("#onMean").inner_text()
    page.click("text='3'")
    page.wait_for_function("document.querySelector('h2').textContent === 'What makes a 3'")


def test_why_one_class_and_not_another(visit, written, world):
    look, meta = fr.look_at_tests(world.layer, *world.tests), meta_of(written)["tests"]
    image = next(t for t in range(meta["shown_errors"], 90) if meta["labels"][t] == 4)
    page = visit(written, f"#view=pair&a=4&b=9&image={image}")
    assert "Why 4 and not 9" in page.locator("h2").first.inner_text()
    lead = float(page.locator("#onImage").get_attribute("data-lead"))
    logits = look.logits[image]
    assert lead == pytest.approx(float(logits[4] - logits[9]), abs=1e-4)

    part = look.added[:, 4] - look.added[:, 9]
    own = look.activity.image == image
    expected = dict(zip(look.activity.feature[own].tolist(), part[own].tolist(), strict=True))
    rows = page.locator("#imageParts li").all_inner_texts()
    assert len(rows) == min(12, len(expected)) > 2
    for row in rows:
        k, value = row.split()[0], numbers_in(row)[-1]
        assert value == pytest.approx(expected[int(k)], abs=0.0051)
    page.locator("nav[aria-label='Not that class'] a").nth(2).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('h2').textContent.endsWith('not 2?')")
    assert page.evaluate("document.activeElement.textContent") == "2"  # focus stays


def test_errors_and_what_would_mend_them(visit, written, world):
    look = fr.look_at_tests(world.layer, *world.tests)
    page = visit(written, "#view=errors")
    links = page.locator("nav[aria-label='Errors'] a")
    assert links.count() == look.n_errors
    mended = [n for n in range(look.n_errors) if look.turns.off[n].any()]
    for error in mended[:3]:
        links.nth(error).click()
        page.wait_for_function(f"location.hash.includes('image={error}')")
        label = int(world.tests.labels[look.image[error]])
        says = int(look.logits[error].argmax())
        assert f"a {label}, read as {says}" in page.locator("#error h3").first.inner_text()
        off = page.locator("#mending").get_attribute("data-off").split()
        assert [int(k) for k in off] == look.turns.off[error].nonzero()[:, 0].tolist()
        assert f"read as {label}" in page.locator("#mending").inner_text()

        part = look.added[:, says] - look.added[:, label]
        own = look.activity.image == error
        expected = dict(zip(look.activity.feature[own].tolist(), part[own].tolist(), strict=True))
        rows = rows_of(page, "#error")
        assert max(expected.values()) == pytest.approx(rows[0][1], abs=0.0051)
        for k, value in rows:
            assert value == pytest.approx(expected[k], abs=0.0051)
        first = int(off[0])
        text = page.locator("#error").inner_text()
        assert f"would mend {look.mends[first]} error" in text
        assert f"make {look.breaks[first]} right prediction" in text
        page.click("#mending >> text=Try it")  # the drawing view agrees
        page.wait_for_selector("#changed")
        drawn = [float(value) for value in logits_text(page, "changed").split()]
        assert drawn == pytest.approx(look.turns.logits[error].tolist(), abs=1e-4)
        page.go_back()
        page.wait_for_selector("#error")

    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('image')")
    page.click("nav[aria-label='Errors on'] >> text='3s'")
    page.wait_for_function("location.hash.includes('label=3')")
    threes = (world.tests.labels[look.image[: look.n_errors]] == 3).sum()
    assert links.count() == threes


# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------


def features_in_grid(page) -> list[int]:
    links = page.locator("#grid a").all()
    return [int(link.get_attribute("href").split("=")[-1]) for link in links]


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


def test_supports_is_what_removal_takes_and_pushes_is_named_so(visit, written, world):
    page = visit(written, "#view=features")
    page.select_option("#sort", "number")
    supported = [int(np.argmin(r["ablation_delta_vector"])) for r in world.records[:23]]
    added = [r["logit_boost_class"] for r in world.records[:23]]
    assert supported != added
    page.select_option("#supports", str(supported[0]))
    expected = [k for k, c in enumerate(supported) if c == supported[0]]
    assert features_in_grid(page) == expected

    go(page, "view=feature&feature=3")
    record = world.records[3]
    shown = [numbers_in(row)[-1] for row in page.locator("#supports li").all_inner_texts()]
    lost = [-change for change in record["ablation_delta_vector"]]
    assert shown == pytest.approx(lost, abs=0.0051)
    assert f"supports {supported[3]} (+{max(lost):.2f})" in page.locator("main").inner_text()
    page.click("text=Pushes when added")
    pushed = [numbers_in(row)[-1] for row in page.locator("#pushes li").all_inner_texts()]
    assert pushed == pytest.approx(record["logit_delta_vector"], abs=0.0051)


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


def test_links_arrows_points_and_escape(visit, written, world):
    page = visit(written, "#feature=5")
    wait_for_feature(page, 5)
    order = by(world, "influence")
    page.keyboard.press("ArrowRight")
    wait_for_feature(page, order[(order.index(5) + 1) % 24])
    page.keyboard.press("ArrowLeft")
    wait_for_feature(page, 5)

    go(page, "view=features&as=charts")
    points = page.locator("#scatter .point")
    assert points.count() == 23  # all but the silent one
    points.nth(4).click()
    wait_for_feature(page, 4)
    page.keyboard.press("Escape")
    page.wait_for_selector("#scatter")

    page.click("text='list'")
    page.wait_for_selector("#grid a")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    wait_for_feature(page, order[1])


def test_the_map_and_two_side_by_side(visit, written, world):
    page = visit(written, "#view=features&as=map")
    assert page.locator("#map a").count() == 24
    cells, _, kept = fp.map_places(world.layer.sae.W_dec)
    left = page.locator("#map a").nth(7).evaluate("link => link.offsetLeft / link.offsetWidth")
    assert left == cells[7][0]
    assert f"only for {100 * kept:.0f}% of the features" in page.locator("main").inner_text()
    page.locator("#map a").nth(7).focus()
    page.keyboard.press("Enter")
    wait_for_feature(page, 7)
    page.fill("#other", "9")
    page.click("#side")
    page.wait_for_function("document.querySelector('h2').textContent === 'Features 7 and 9'")
    columns = page.locator("main section").all_inner_texts()
    assert ["Stroke number 7" in columns[0], "Stroke number 9" in columns[1]] == [True, True]
    go(page, "view=two&features=7,99")
    assert "There is no feature 99" in page.locator("main").inner_text()


def test_tests_a_statement_passed_are_marked(visit, world, tmp_path):
    lines = ["ink: AUROC 0.9: confirmed", "labels: 0.5: refuted", "edits: inconclusive", "as drawn"]
    path = write(
        tmp_path / "p.html", world._replace(records=[world.records[3] | {"measured": lines}])
    )
    text = visit(path, "#view=feature&feature=3").locator("main").inner_text()
    for words in ("✓ passed: ink: AUROC 0.9", "✗ failed: labels: 0.5", "? open: edits"):
        assert words in text
    assert "\nas drawn" in text


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


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


def logits_text(page, which: str) -> str:
    """The logits on the page: "says" those of the network, "changed" those after changes."""
    return page.locator(f"#{which}").get_attribute("data-logits")


def pixels_of(page) -> np.ndarray:
    return np.array(page.evaluate("[...live.pixels]")).reshape(28, 28)


@pytest.fixture
def drawn(visit, written):
    page = visit(written, "#view=draw", viewport={"width": 1200, "height": 900})
    assert "Draw in the square" in page.locator("#predictions").inner_text()
    draw_line(page, (60, 60), (220, 60), (120, 230))
    return page


def test_a_drawing_is_centred_like_a_digit_of_mnist(drawn):
    pixels = pixels_of(drawn)
    rows, columns = np.nonzero(pixels > 0.05)
    assert max(np.ptp(rows), np.ptp(columns)) in (19, 20)
    centre = (pixels * np.mgrid[:28, :28]).sum((1, 2)) / pixels.sum()
    assert centre == pytest.approx([13.5, 13.5], abs=0.6)


def test_tiles_say_what_features_add_and_switch_them(drawn, world):
    model, sae, mu, std = world.layer
    raw = model.preactivations(torch.tensor(pixels_of(drawn)).float()[None, None])
    acts = sae.encode((raw - mu) / std)[0]
    logits = model.logits_from_preactivations(raw)[0]
    assert [float(v) for v in logits_text(drawn, "says").split()] == pytest.approx(
        logits.tolist(), abs=1e-4
    )
    tiles = drawn.locator("#active .unit")
    assert tiles.count() == int((acts > 0).sum()) > 2
    for tile in tiles.all():
        k = int(tile.get_attribute("data-feature"))
        lost = logits - model.logits_from_preactivations(raw - acts[k] * sae.W_dec[k] * std)[0]
        adds = numbers_in(tile.locator("b").inner_text())[0]
        assert adds == pytest.approx(float(lost[logits.argmax()]), abs=0.0051)

    k = int(tiles.nth(1).get_attribute("data-feature"))
    drawn.locator(f"#flip{k}").focus()
    drawn.keyboard.press("Enter")
    without = model.logits_from_preactivations(raw - acts[k] * sae.W_dec[k] * std)[0]
    off = logits_text(drawn, "changed")
    assert [float(v) for v in off.split()] == pytest.approx(without.tolist(), abs=1e-4)
    drawn.locator(f"#set{k}").focus()
    drawn.keyboard.press("End")
    drawn.wait_for_function(f"document.querySelector('#changed').dataset.logits !== '{off}'")
    drawn.keyboard.press("Escape")
    assert logits_text(drawn, "changed") == logits_text(drawn, "says")


def test_a_slider_stays_under_the_pointer_all_the_way(drawn):
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
    assert logits_text(drawn, "changed") == logits_text(drawn, "says")


def test_a_drawing_and_its_switches_survive_a_look_at_a_feature(drawn):
    k = int(drawn.locator("#active .unit").first.get_attribute("data-feature"))
    drawn.locator("#draw").focus()  # it redraws when it loses focus, and must not call us back
    drawn.click(f"#active >> text='Feature {k}'")
    wait_for_feature(drawn, k)
    drawn.keyboard.press("Escape")
    drawn.wait_for_selector("#changed")
    drawn.click(f"#flip{k}")
    before, pixels = logits_text(drawn, "changed"), pixels_of(drawn)
    drawn.click(f"#active >> text='Feature {k}'")
    wait_for_feature(drawn, k)
    drawn.keyboard.press("Escape")
    drawn.wait_for_selector("#changed")
    assert logits_text(drawn, "changed") == before != logits_text(drawn, "says")
    assert np.array_equal(pixels, pixels_of(drawn))
    drawn.click("text='Story'")
    drawn.wait_for_selector("#tour")
    drawn.click("text='Draw'")
    assert logits_text(drawn, "changed") == before


def test_a_watched_feature_vanishes_with_its_firing_and_undo_and_escape_step_back(drawn):
    first = pixels_of(drawn)
    k = int(drawn.locator("#active .unit").first.get_attribute("data-feature"))
    drawn.click(f"#watch{k}")
    assert f"feature {k}" in drawn.locator("#drawing").inner_text()
    drawn.keyboard.press("Escape")
    assert drawn.evaluate("live.watched") is None
    drawn.click(f"#watch{k}")
    drawn.click("#clear")
    assert drawn.evaluate("live.watched") is None
    assert "What the network sees" in drawn.locator("#drawing").inner_text()
    assert drawn.locator("#active .unit").count() == 0
    drawn.click("#undo")
    assert np.array_equal(first, pixels_of(drawn))
    drawn.click(f"#watch{k}")
    stop = f"() => {{ live.result.feature[{k}] = 0; refresh(); return live.watched; }}"
    assert drawn.evaluate(stop) is None  # as when a stroke makes it stop


def test_a_test_image_lands_on_the_canvas_and_can_be_edited(visit, written, world):
    page = visit(written, "#view=draw")
    number = meta_of(written)["tests"]["number"]
    page.locator("nav[aria-label='Test images'] a").first.click()
    page.wait_for_function("location.hash.includes('image=')")
    t = int(page.evaluate("live.image"))
    image = (world.tests.images[number[t]] * 255).round() / 255
    assert pixels_of(page) == pytest.approx(image[0].numpy(), abs=1e-6)

    k = int(page.locator("#active .unit").first.get_attribute("data-feature"))
    page.click(f"#flip{k}")
    page.wait_for_function(f"location.hash.includes('set={k}:0')")
    there = logits_text(page, "changed")
    again = visit(written, "#" + page.url.split("#")[1])  # the address says it all
    assert logits_text(again, "changed") == there != logits_text(again, "says")

    draw_line(page, (20, 20), (60, 20))
    edited = pixels_of(page)
    assert edited[2, 2:5].min() > 0.9
    assert edited[8:] == pytest.approx(image[0, 8:].numpy(), abs=1e-6)  # the rest as it was
    page.click("#rub")
    draw_line(page, (20, 20), (60, 20))
    assert pixels_of(page)[2, 2:5].max() < 0.1
    page.click("#undo")
    page.click("#undo")
    assert pixels_of(page) == pytest.approx(image[0].numpy(), abs=1e-6)


def test_drawing_by_keyboard(visit, written):
    page = visit(written, "#view=draw")
    page.locator("#rub").focus()
    page.keyboard.press("Shift+Tab")
    page.locator("#draw").focus()
    page.keyboard.press("ArrowUp")
    assert not pixels_of(page).any()
    page.keyboard.press("Space")
    for _ in range(6):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")  # lifts the pen
    pixels = pixels_of(page)
    page.keyboard.press("ArrowRight")
    assert np.array_equal(pixels, pixels_of(page))
    ink = np.array(page.evaluate("[...live.ink]")).reshape(112, 112)
    rows, columns = np.nonzero(ink > 0.5)
    assert (rows.min(), rows.max()) == pytest.approx((52 - 5, 52 + 24 + 5), abs=1)
    assert (columns.min(), columns.max()) == pytest.approx((56 - 5, 56 + 5), abs=1)


# --------------------------------------------------------------------------------------------------
# Every view
# --------------------------------------------------------------------------------------------------


def test_words_are_shown_as_words(visit, world, tmp_path):
    path = write_bare(tmp_path / "page.html", world, nasty_records(world), NASTY)
    page = visit(path, "#feature=0")
    assert "</script><script>alert(1)</script>" in page.locator(".card b").first.inner_text()
    assert page.locator("main script").count() == 0


VIEWS = ("story", "class&class=7", "pair", "errors", "features", "features&as=map")
VIEWS += ("features&as=charts", "feature&feature=3", "two&features=3,4", "draw")


@pytest.mark.parametrize("d_sae", [1, 300])
def test_pages_of_other_sizes(visit, d_sae, tmp_path):
    path = write(tmp_path / "page.html", small_world(d_sae))
    page = visit(path, "#view=features")
    assert page.locator("#grid a").count() == d_sae
    for view in (*VIEWS, f"feature&feature={d_sae - 1}"):
        go(page, f"view={view}")
        assert page.locator("main").inner_text()


SAID = ("statement", "confidence", "verdict", "evidence", "measured")


def test_without_a_network_without_tests_and_without_statements(visit, world, tmp_path):
    bare = []
    for record in world.records:
        bare.append({name: value for name, value in record.items() if name not in SAID})
    page = visit(write_bare(tmp_path / "page.html", world, bare), "#feature=23")
    text = page.locator("main").inner_text()
    assert "No image fires it." in text
    assert "This run made no statements about features." in text
    for view in VIEWS:
        go(page, f"view={view}")
        text = page.locator("main").inner_text()
        assert text
        assert "NaN" not in text
        assert "undefined" not in text
    assert "without the network's weights" in text


def test_a_network_that_the_page_cannot_compute_shows_all_but_the_drawing(visit, world, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    overview = fp.Overview(without_drawing="It is convolutional.", classes=names)
    path = write(tmp_path / "page.html", world, network=None, overview=overview)
    assert "W_enc" not in meta_of(path)["arrays"]
    page = visit(path, "#view=draw")
    assert "It is convolutional." in page.locator("#without").inner_text()
    go(page, "view=class&class=7")
    assert "What makes a seven" in page.locator("h2").inner_text()
    assert len(rows_of(page, "main")) > 5
    go(page, "view=pair&a=4&b=9")
    assert "Why four and not nine?" in page.locator("h2").first.inner_text()
    assert page.locator("#imageParts li").count() > 2
    go(page, "view=errors")
    assert page.locator("#mending").count() == 1
    assert page.locator("a", has_text="drawing view").count() == 0
    go(page, "view=story&step=2")
    page.locator("button[id^=tour]").first.click()
    assert page.locator("#tourSays").inner_text() in names
    go(page, "view=feature&feature=3")
    assert "seven" in page.locator("#supports").inner_text()


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def test_a_phone_shows_everything_in_its_width(visit, written):
    page = visit(written, viewport={"width": 380, "height": 800}, has_touch=True)
    for view in VIEWS:
        go(page, f"view={view}")
        assert page.evaluate(FITS), view
    draw_line(page, (60, 60), (220, 60), (120, 230))
    page.locator("#active input[type=range]").nth(2).scroll_into_view_if_needed()
    page.mouse.wheel(0, 300)
    page.wait_for_timeout(100)
    top = page.locator("#predictions").bounding_box()
    assert top["y"] == pytest.approx(0, abs=2)  # predictions stay in view with the sliders
    assert top["height"] < 400


AXE_RUN = """() => axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"] })
    .then(found => found.violations.map(v => [v.id, v.nodes[0].html.slice(0, 200)]))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_view(visit, written, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    page = visit(written, color_scheme=scheme)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    tour = (
        "story&step=1",
        "story&step=2",
        "story&step=3",
        "draw&image=60",
        "draw&image=60&set=3:0",
    )
    for view in (*VIEWS, *tour):
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate(AXE_RUN) == [], view
