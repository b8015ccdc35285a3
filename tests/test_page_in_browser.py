"""The page in a real browser, by pointer and keyboard; its numbers against those of Python."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page_world import NASTY, color_world, meta_of, review_of, small_world, write

import feature_analysis as fa
from saexplain import page as html
from saexplain import page_classes
from saexplain.activity import collect_activity
from saexplain.counterfactuals import class_effects
from saexplain.evaluation import collect_evidence, decide
from saexplain.hypotheses import (
    Hypothesis,
    best_threshold,
    hypothesis_of,
    hypothesis_record,
    scores_of,
    with_thresholds,
)
from saexplain.ink import Canvas
from saexplain.overlays import paint_overlay, smooth_maps
from saexplain.own import read_hypotheses
from saexplain.statistics import average_precision, ranks_of

pytestmark = pytest.mark.slow

FLAGS = ("--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-background-networking")
VIEWS = ("story", "class&class=7", "pair", "errors", "features", "features&as=map")
VIEWS += ("features&as=charts", "feature&feature=3", "two&features=3,4", "draw")
VIEWS += ("write&feature=3", "write&feature=23", "yours", "words")


@pytest.fixture(scope="module")
def world():
    return small_world()


@pytest.fixture(scope="module")
def review(world):
    return review_of(world)


@pytest.fixture(scope="module")
def effects(world):
    """Mean contributions (C, d_sae, C) by class."""
    val = world.layer.splits["val"]
    return class_effects(world.layer, val.raw, world.shown.activity)


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
    page.click("#tourStart")
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
    page.wait_for_selector("#tourStart")


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
    rows = page.locator("#imageParts li:not(.scale)").all_inner_texts()
    assert len(rows) == min(12, len(expected)) > 2
    for row in rows:
        assert numbers_in(row)[-1] == pytest.approx(expected[int(row.split()[0])], abs=0.0051)


def test_errors_and_their_flip_sets(visit, written, world, review):
    page, labels = visit(written, "#view=errors"), meta_of(written)["tests"]["labels"]
    links = page.locator("nav[aria-label='Errors'] a")
    assert links.count() == review.n_errors
    for error in [n for n in range(review.n_errors) if review.sets.off[n].any()][:2]:
        links.nth(error).click()
        page.wait_for_selector(f"nav[aria-label='Errors'] a:nth-child({error + 1})[aria-current]")
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
    page.select_option("#sort", "F1")
    assert features_in_grid(page) == [*range(22, -1, -1), 23]  # as planted; one has none
    page.select_option("#sort", "number")
    supported = [int(np.argmin(r["ablation_delta_vector"])) for r in world.records[:23]]
    mode = [r["label_mode_when_active"] for r in world.records]
    dense = [k for k, r in enumerate(world.records) if r["mean_active"] >= 0.1]
    expected = {
        ("confidence", "High"): list(range(0, 24, 3)),
        ("density", "at least 10%"): dense,
        ("density", "never"): [23],
        ("label", str(mode[0])): [k for k in range(24) if mode[k] == mode[0]],
        ("supports", str(supported[0])): [k for k in range(23) if supported[k] == supported[0]],
        ("mark", "reproducible"): list(range(1, 24, 2)),
        ("confidence", "Low"): list(range(2, 23, 3)),  # the last feature is too rare to be tested
        ("confidence", "not tested"): [23],
    }
    for (field, value), features in expected.items():
        page.select_option(f"#{field}", value)
        assert features_in_grid(page) == features, (field, value)
        page.select_option(f"#{field}", "")
    page.fill("#search", "active on 3s")
    assert features_in_grid(page) == [3, 13, 23]


def test_the_list_is_remembered_counted_and_followed(visit, written):
    page = visit(written, "#view=features")
    assert page.locator("#resetList").is_disabled()
    page.select_option("#sort", "number")
    page.select_option("#confidence", "High")
    page.select_option("#mark", "seed-specific")
    own = list(range(0, 24, 6))  # as planted: every third is High, every other one seed-specific
    assert page.locator("#count").inner_text() == "4 of 24 features"
    shared = page.url
    page.locator("#grid a").nth(1).click()
    wait_for_heading(page, f"Feature {own[1]}")
    assert "2 of 4 in the filtered list, sorted by number" in page.locator("main").inner_text()
    page.click("text=next →")
    wait_for_heading(page, f"Feature {own[2]}")
    for k in (own[3], own[0], own[1]):  # from the last to the first
        page.keyboard.press("ArrowRight")
        wait_for_heading(page, f"Feature {k}")
    go(page, "view=feature&feature=5")
    assert "Not in your filtered list of 4." in page.locator("main").inner_text()

    page.goto("about:blank")  # the next visit
    page.goto(f"file://{written}#view=features")
    page.wait_for_selector("#grid a")
    assert features_in_grid(page) == own
    assert page.locator("#mark").input_value() == "seed-specific"
    page.click("#resetList")
    assert page.locator("#count").inner_text() == "24 of 24 features"
    assert "confidence" not in page.url
    other = visit(written, "#" + shared.split("#")[1])  # of somebody else
    assert features_in_grid(other) == own
    other.fill("#search", "nothing like it")
    assert other.locator("#count").inner_text().startswith("0 of 24 features")
    assert features_in_grid(other) == []


ADDRESSES = {  # the heading shown, and what is named as not understood
    "view=__proto__": ("Overview", "view “__proto__”"),
    "view=constructor": ("Overview", "view “constructor”"),
    "%%%": ("Overview", "view “%%%”"),
    "step=-1": (None, "step “-1”"),  # the overview, or the first step of the tour
    "view=two&features=1": ("Feature 1", "features “1”"),
    "view=two&features=1,99999": ("Feature 1", "features “1,99999”"),
    "view=two": ("All features", "features “”"),
    "view=feature&feature=abc": ("All features", "feature “abc”"),
    "view=feature&feature=-1": ("All features", "feature “-1”"),
    "view=write&feature=1e1": ("All features", "feature “1e1”"),
    "view=class&class=99": ("Features of class 0", "class “99”"),
    "view=errors&image=99999": ("Errors", "image “99999”"),
    "view=pair&a=4&b=9&image=x": ("Why 4 and not 9?", "image “x”"),
    "set=3:Infinity": ("Draw an image", "set “3:Infinity”"),
    "view=draw&set=3:1e300": ("Draw an image", "set “3:1e300”"),
    "view=features&as=toString": ("All features", "as “toString”"),
    "view=features&sort=__proto__": ("All features", "sort “__proto__”"),
    "view=features&confidence=Maybe": ("All features", "confidence “Maybe”"),
    "view=words&of=constructor": ("Words", "of “constructor”"),
    "view=features&result=foo": ("All features", "result “foo”"),
    "view=pair&a=4&b=4": (None, "b “4”"),
    "view=story&step=9": ("An image tour, 1 of 4", "step “9”"),
}


def test_what_an_address_cannot_mean_is_named(visit, written):
    page = visit(written)
    for address, (heading, words) in ADDRESSES.items():
        page.goto("about:blank")
        page.goto(f"file://{written}#{address}")
        page.wait_for_selector("body[data-ready]")
        assert heading in (None, page.locator("h2").first.inner_text()), address
        assert page.locator("#misread").inner_text().split(": ", 1)[1].startswith(f"{words}. ")
        page.evaluate("document.getElementById('misread').remove()")
        shown = page.locator("main").inner_text()
        page.reload()  # the address is that of what was shown
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#misread").count() == 0, address
        assert page.locator("main").inner_text() == shown, address
        assert not re.search("NaN|Infinity|undefined", page.locator("main").inner_text()), address
    go(page, "view=features&sort=density")
    assert page.locator("#misread").count() == 0
    go(page, "view=story&step=end")
    assert page.locator("#misread").count() == 0


def test_terms_lead_to_their_meaning_and_scores_have_one_name(visit, written):
    page = visit(written, "#view=words")
    known = page.locator("dt").all_inner_texts()
    assert len(known) == len(set(known)) == page.locator("dd").count() > 20
    for view in VIEWS:
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        links = page.evaluate("[...document.querySelectorAll('a.term')].map(a => a.hash)")
        terms = {link.split("of=")[1].replace("+", " ") for link in links}
        assert terms <= set(known), view
        if view not in ("story", "draw", "words"):  # where it is explained
            assert "logit" not in page.locator("main").inner_text().lower(), view
    go(page, "view=feature&feature=3")
    page.click("a.term >> text=influence")
    assert page.locator("dt.here").inner_text() == "influence"
    in_view = "document.querySelector('dt.here').getBoundingClientRect().bottom < innerHeight"
    page.wait_for_function(in_view)  # it is scrolled to after it is drawn


COLUMNS = """svg => {
    const of = (kind, name) => [...svg.querySelectorAll(kind)].map(e => +e.getAttribute(name));
    const marks = [...svg.querySelectorAll('text')].filter(e => e.getAttribute('text-anchor') ===
        'end').slice(0, of('line', 'y1').length).map(e => +e.textContent.replace(',', ''));
    return [marks, of('line', 'y1'), of('rect', 'y'), of('rect', 'height')];
}"""


def test_columns_have_the_heights_that_their_axis_says(visit, written, world):
    page = visit(written, "#view=feature&feature=3")
    chart = page.locator("svg[aria-label^='Images on which it is active']")
    marks, lines, tops, heights = chart.evaluate(COLUMNS)
    assert len(marks) == len(lines) > 2
    assert marks[0] == 0
    for mark, line in zip(marks[1:], lines[1:], strict=True):
        per_image = (lines[0] - line) / mark
        counts = world.records[3]["label_histogram"]
        assert np.subtract(lines[0], tops) == pytest.approx(per_image * np.array(counts), abs=0.6)
    assert np.add(tops, heights) == pytest.approx(lines[0], abs=0.6)
    words = chart.locator("text").all_text_contents()
    assert {"class", "validation images"} <= set(words)


LONG = [
    "n" * 200,
    "words in a name, " * 12,
    "\u05de\u05d7\u05dc\u05e7\u05d4 " * 34,
    "\U0001f469\u200d\U0001f467" * 60,
]


@pytest.mark.parametrize("width", [390, 1280])
def test_long_class_names_widen_no_view(visit, world, tmp_path, width):
    names = [*LONG, *(f"{LONG[0]}{c}" for c in range(4, 10))]
    path = write(tmp_path / "page.html", world, overview=html.Overview(classes=names))
    page = visit(path, viewport={"width": width, "height": 800})
    for view in (*VIEWS, "story&step=1", "story&step=2", "story&step=3", "draw&image=60"):
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate(FITS), view
    go(page, "view=class&class=4")
    chosen = page.locator("nav[aria-label='Class'] a[aria-current=true]")
    assert chosen.get_attribute("title") == names[4]
    assert chosen.inner_text() == "n" * 20 + "…" + "n" * 10 + "4"  # they differ at the end


def test_feature_view_links_arrows_and_escape(visit, written, world):
    page, order = visit(written, "#feature=5"), by(world, "influence")
    wait_for_heading(page, "Feature 5")
    page.keyboard.press("ArrowRight")
    wait_for_heading(page, f"Feature {order[(order.index(5) + 1) % 24]}")
    go(page, "view=feature&feature=3")
    shown = [
        numbers_in(row)[-1] for row in page.locator("#supports li:not(.scale)").all_inner_texts()
    ]
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


# --------------------------------------------------------------------------------------------------
# The reader's own hypotheses
# --------------------------------------------------------------------------------------------------

NAMES = ("precision", "recall", "f1")


def images_of(world, split: str) -> fa.Activations:
    """The images on which the page measures hypotheses."""
    some = html.images_on_page(world.layer)[split]
    whole = world.layer.splits["val" if split == "val" else "test"]
    return fa.Activations(*(values[some] for values in whole))


def measured(world, h: Hypothesis, split: str) -> dict:
    """What Python measures of a hypothesis, at the best threshold where it has none."""
    images, labels, raw = images_of(world, split)
    activity = collect_activity(world.layer, raw, labels)
    levels = Canvas.fit(world.layer.splits["val"].images).levels(images)
    (h,) = with_thresholds([h], levels, activity)
    scores, at = scores_of(h.weights[None], levels)[0].numpy(), activity.of(h.feature)[0].numpy()
    picked = np.flatnonzero(scores >= h.threshold)
    both, ranks = len(np.intersect1d(picked, at)), ranks_of(scores, at)
    return {
        "threshold": h.threshold,
        "precision": both / len(picked),
        "recall": both / len(at),
        "f1": 2 * both / (len(picked) + len(at)),
        "average_precision": average_precision(ranks),
        "auroc": ranks.auroc,
    }


def check_test(found: dict, world, h: Hypothesis) -> None:
    """Compare the page's test of a hypothesis with Python's on the same images."""
    layer = world.layer
    canvas = Canvas.fit(layer.splits["val"].images)
    (e,) = collect_evidence([h], layer, images_of(world, "test_half"), canvas)
    picked = [e.picked.precision, e.picked.recall, e.picked.f1, e.detection.auroc]
    picked += [e.detection.average_precision, e.chance_f1]
    names = (*NAMES, "auroc", "average_precision", "chance_f1")
    assert [found[name] for name in names] == pytest.approx(picked, abs=1e-4)
    again = measured(world, h, "replication_half")
    assert {name: found["other_half"][name] for name in again} == pytest.approx(again, abs=1e-4)
    decision = decide(e)
    assert found["edits"].keys() == e.edits.keys()
    for name, test in e.edits.items():
        edit = found["edits"][name]
        assert {key: edit[key] for key in test._fields} == test._asdict()
        ends = [edit[key] for key in ("difference", "low", "high")]
        assert ends == pytest.approx(test.difference(), abs=1e-4)
        assert edit["result"] == decision.results[name]
    if h.classes:
        expected = e.classes._asdict()
        assert {key: found["classes"][key] for key in expected} == pytest.approx(expected, abs=1e-4)
        assert found["classes"]["result"] == decision.results["classes"]
    assert found["effects"].keys() == e.effects.keys()
    for verb, change in e.effects.items():
        own = found["effects"][verb]
        numbers = [own[key] for key in ("logit", "by", "low", "high")]
        assert numbers == pytest.approx(
            [change.logit, change.by, change.low, change.high], abs=1e-4
        )
    assert found["confidence"] == decision.confidence


@pytest.mark.parametrize("most", [60, 2000])
def test_page_measures_and_tests_as_python_does(visit, world, tmp_path, monkeypatch, most):
    monkeypatch.setattr(html, "MAX_IMAGES", most)
    page = visit(write(tmp_path / "page.html", world), "#view=yours")
    for k in (0, 3, 8, 15, 17):
        record = world.records[k]["hypothesis"]
        h = replace(hypothesis_of(record), classes=(1, k % 10), raises=k % 10, lowers=4)
        check_test(page.evaluate("testResults", hypothesis_record(h)), world, h)
        ours = page.evaluate("h => measureOn('val', h.feature, { ...h, threshold: null })", record)
        expected = measured(world, replace(h, threshold=None), "val")
        assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def paint(page, *cells: tuple[int, int]) -> None:
    """Paint a line through cells (row, column) with the mouse."""
    page.locator("#paint").scroll_into_view_if_needed()
    box = page.locator("#paint").bounding_box()
    for n, (row, column) in enumerate(cells):
        side = (box["width"] - 4) / page.evaluate("CW")
        page.mouse.move(box["x"] + 2 + (column + 0.5) * side, box["y"] + 2 + (row + 0.5) * side)
        if n == 0:
            page.mouse.down()
    page.mouse.up()


def numbers_of(page, table: str, column: int) -> list[float]:
    cells = page.locator(f"#{table} td:nth-child({column + 2})").all_inner_texts()
    return [float(cell) for cell in cells]


def paint_example(page) -> np.ndarray:
    """Paint a drawing by pointer; its weights."""
    page.select_option("#size", "1")
    paint(page, (5, 10), (5, 17))
    page.click("text=strong")
    paint(page, (12, 14), (20, 14))
    page.click("text=strong")
    page.click("text=blank wanted")
    page.select_option("#size", "3")
    paint(page, (15, 5))
    page.select_option("#size", "1")
    page.click("text=eraser")
    paint(page, (14, 5))
    expected = np.zeros((28, 28), np.int8)
    expected[5, 10:18], expected[12:21, 14], expected[14:17, 4:7] = 1, 2, -1
    expected[14, 5] = 0
    return expected


def test_measures_of_scores_with_ties(visit, written):
    page, rng = visit(written, "#view=yours"), np.random.default_rng(0)
    scores = rng.integers(-3, 4, (60, 14))
    active = [np.sort(rng.choice(14, 1 + n % 12, replace=False)) for n in range(60)]
    pairs = [[row.tolist(), at.tolist()] for row, at in zip(scores, active, strict=True)]
    found = page.evaluate("pairs => pairs.map(([s, at]) => measure(Int32Array.from(s), at))", pairs)
    for own, row, at in zip(found, scores, active, strict=True):
        assert own["threshold"] == best_threshold(row, at)
        ranks = ranks_of(row, at)
        assert own["auroc"] == pytest.approx(ranks.auroc)
        assert own["average_precision"] == pytest.approx(average_precision(ranks))


def test_cells_of_larger_images(visit, tmp_path):
    world = small_world(6, zoom=3)  # 84 x 84 pixels, 42 x 42 cells
    page = visit(write(tmp_path / "page.html", world), "#view=write&feature=1")
    record = world.records[1]["hypothesis"]
    found = page.evaluate("testResults", record)
    h = hypothesis_of(record)
    assert h.weights.shape == (42, 42)
    for split, values in (("test_half", found), ("replication_half", found["other_half"])):
        expected = measured(world, h, split)
        assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert (found["edits"], found["confidence"]) == ({}, None)  # pixels are not cells
    page.select_option("#size", "1")
    paint(page, (3, 39), (3, 41))
    weights = np.zeros((42, 42), np.int8)
    weights[3, 39:] = 1
    assert np.array_equal(hypothesis_of(page.evaluate("writing.h")).weights, weights)
    page.click("#test")
    assert "cannot test edits" in page.locator("#result").inner_text()


def test_hypothesis_drawn_by_pointer(visit, written, world, tmp_path):
    page = visit(written, "#view=write&feature=3")
    assert page.locator("#test").is_disabled()  # nothing is drawn
    expected = paint_example(page)
    entry = page.evaluate("writing.h")
    assert np.array_equal(hypothesis_of(entry).weights, expected)
    own = measured(world, replace(hypothesis_of(entry), threshold=None), "val")
    assert entry["threshold"] == own["threshold"]
    names = (*NAMES, "average_precision")
    assert numbers_of(page, "numbers", 0) == pytest.approx([own[n] for n in names], abs=6e-4)
    machine = measured(world, hypothesis_of(world.records[3]["hypothesis"]), "val")
    assert numbers_of(page, "numbers", 1) == pytest.approx([machine[n] for n in names], abs=6e-4)

    # The strongest image it misses, and that of the highest score which it wrongly picks.
    images, _, raw = images_of(world, "val")
    acts = world.layer.feature_acts(raw)[:, 3].numpy()
    scores = (images[:, 0] * 255).round().numpy().reshape(-1, 784) @ expected.reshape(-1)
    picked, at = scores >= own["threshold"], page.locator("#examples figure").all()
    shown = [int(figure.get_attribute("data-image")) for figure in at]
    assert acts[shown[0]] == pytest.approx(acts[~picked].max(), rel=1 / 254)
    assert scores[shown[1]] == scores[picked & (acts == 0)].max()

    page.fill("#caption", NASTY.replace("\ud800", ""))
    page.check("input[name=class][value='7']")
    page.check("input[name=class][value='1']")
    page.select_option("#raises", "1")
    page.select_option("#sure", "Medium")
    page.click("#test")
    entry = page.evaluate("writing.h")
    h = hypothesis_of(entry)
    assert (h.classes, h.raises, h.lowers, h.confidence) == ((1, 7), 1, None, "Medium")
    check_test(page.evaluate("testResults(writing.h)"), world, h)
    record = {name: entry[name] for name in hypothesis_record(h)}
    frozen = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(frozen.encode()).hexdigest()
    assert page.locator("#sha256").text_content() == entry["tested"]["sha256"] == digest
    assert entry["tries"] == 1
    assert page.locator("#test").is_disabled()

    # A change makes another hypothesis; the second look is counted.
    paint(page, (2, 2))  # still with the eraser: nothing changes
    assert page.locator("#sha256").count()
    page.click("text=ink wanted")
    paint(page, (2, 2))
    assert not page.locator("#sha256").count()
    page.click("#test")
    assert "2nd test of this feature on them" in page.locator("#result").inner_text()
    entries = page.evaluate("mine.list")
    assert entries[0] == entry
    assert entries[1]["drawing"] != entry["drawing"]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("mine.list") == entries
    go(page, "view=yours")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / download.value.suggested_filename)
    exported = json.loads((tmp_path / "my_hypotheses.json").read_text())
    assert exported["format"] == "saexplain hypotheses 1"
    first, second = exported["hypotheses"]
    read = [hypothesis_record(h) for h in read_hypotheses(tmp_path / "my_hypotheses.json")]
    assert read == [record, {name: second[name] for name in record}]
    assert first["tested"]["f1"] == pytest.approx(measured(world, h, "test_half")["f1"])
    assert second["tries"] == 2


def test_painting_by_keyboard_undo_and_the_machines(visit, written, world):
    page = visit(written, "#view=write&feature=3")
    page.select_option("#size", "1")
    page.focus("#paint")
    for key in ["ArrowUp"] * 4 + [" ", "ArrowRight", "s", "Enter", "ArrowRight", "b", " "]:
        page.keyboard.press(key)
    weights = page.evaluate("[...writing.weights]")
    assert {p: w for p, w in enumerate(weights) if w} == {294: 1, 295: 2, 296: -2}
    assert page.locator("#status").inner_text() == "row 11, column 17: blank wanted strongly"
    page.keyboard.press("Control+z")
    page.click("#undoPaint")
    weights = page.evaluate("[...writing.weights]")
    assert {p: w for p, w in enumerate(weights) if w} == {294: 1}
    page.click("#fromMachine")
    assert page.evaluate("rowsOf(writing.weights)") == world.records[3]["hypothesis"]["drawing"]
    scores = page.evaluate("[[...writing.scores], [...scoresOf(writing.weights, 'val')]]")
    assert scores[0] == scores[1]  # each change was added
    page.click("#clearPaint")
    assert page.evaluate("[...writing.scores, ...writing.weights].every(v => v === 0)")


def example_file(world, **changes) -> dict:
    entry = world.records[3]["hypothesis"] | {"caption": "mine"} | changes
    return {"format": "saexplain hypotheses 1", "source": "", "hypotheses": [entry]}


def import_text(page, text: str) -> str:
    """The page's message about an imported file."""
    given = {"name": "mine.json", "mimeType": "application/json", "buffer": text.encode()}
    page.set_input_files("#import", given)
    page.wait_for_function("document.getElementById('imported').textContent")
    return page.locator("#imported").inner_text()


ROWS = ["." * 28] * 28
BAD = {
    "28 rows": {"drawing": ROWS[:27]},
    "of .+#-=": {"drawing": [*ROWS[:27], "." * 27 + "x"]},
    "row of drawing": {"drawing": [*ROWS[:27], "." * 29]},
    "must have 28": {"drawing": "." * 784},
    "got 24": {"feature": 24},
    'got "3"': {"feature": "3"},
    "300 characters": {"caption": "x" * 301},
    "different": {"classes": [1, 1]},
    "below 10": {"classes": [10]},
    "raises": {"raises": 1.5},
    "lowers": {"lowers": -1},
    "confidence": {"confidence": "Certain"},
    "threshold": {"threshold": 1e99},
    "tries": {"tries": -1},
}


def test_import_of_files_that_cannot_be_used(visit, written, world):
    page = visit(written, "#view=yours")
    for words, changes in BAD.items():
        message = import_text(page, json.dumps(example_file(world, **changes)))
        start = "mine.json cannot be read: hypothesis 1: "
        assert message.startswith(start), words
        assert words in message
        assert len(message) < 200
    broken = {
        "{": "JSON",
        "null": "format",
        json.dumps(example_file(world) | {"format": "other"}): "format",
        json.dumps(example_file(world) | {"hypotheses": {}}): "list",
        json.dumps(example_file(world) | {"hypotheses": [None]}): "object",
        json.dumps(example_file(world) | {"hypotheses": [{}] * 501}): "500",
        json.dumps(example_file(world) | {"sae": "0" * 16}): "SAE",
        " " * 5_000_001: "5 MB",
    }
    for text, words in broken.items():
        assert words in import_text(page, text)
    assert page.evaluate("mine.list") == []


def test_import_keeps_words_as_words_and_tests_again(visit, written, world, tmp_path):
    page = visit(written, "#view=yours")
    words = "<img src=x onerror=alert(1)><b>bold</b>"
    file = example_file(world, caption=words, confidence="High", tries=3)
    entry = file["hypotheses"][0]
    keys = "feature caption drawing classes raises lowers confidence threshold".split()
    frozen = json.dumps({key: entry[key] for key in keys}, separators=(",", ":"))
    digest = hashlib.sha256(frozen.encode()).hexdigest()
    entry["tested"] = {"sha256": digest, "f1": 1.0, "confidence": "High"}
    changed = entry | {"threshold": entry["threshold"] + 1}  # after it was frozen
    file["hypotheses"] = [entry, changed]
    assert import_text(page, json.dumps(file)) == "mine.json: 2 new, 0 known already."
    rows = page.locator("#entries li").all_inner_texts()
    assert all(words in row for row in rows)
    assert not page.locator("#entries img, #entries b b").count()
    half = images_of(world, "test_half")
    canvas = Canvas.fit(world.layer.splits["val"].images)
    (e,) = collect_evidence([hypothesis_of(entry)], world.layer, half, canvas)
    assert f"F1 {e.picked.f1:.2f}" in rows[0]  # not the 1.0 of the file
    assert "3rd test of this feature on these images" in rows[0]
    assert "Not tested yet" in rows[1]
    found = [
        [int(cell) for cell in row.locator("td").all_inner_texts()[1:]]
        for row in page.locator("#calibration tr").all()[1:]
    ]
    expected = np.zeros((3, 3), int)
    expected[0, ("High", "Medium", "Low").index(decide(e).confidence)] = 1
    assert found == expected.tolist()
    for record in file["hypotheses"]:
        record["tries"] = 1  # an older copy
    assert import_text(page, json.dumps(file)) == "mine.json: 0 new, 2 known already."
    page.locator("text=open").first.click()
    wait_for_heading(page, "Your hypothesis about feature 3")
    assert page.locator("#sha256").text_content() == digest
    assert page.input_value("#caption") == words
    go(page, "view=yours")
    for _ in range(2):
        page.locator("text=delete").first.click()
    assert "You have none yet" in page.locator("main").inner_text()
    page.locator("main a").first.click()
    most = by(world, "influence")[0]
    wait_for_heading(page, f"Your hypothesis about feature {most}")
    assert page.evaluate("mine.looks.get(3)") == 3  # looks stay counted


def test_without_storage_it_says_to_export(visit, written):
    page = visit(written, "#view=write&feature=3")
    block = "Storage.prototype.setItem = () => { throw new Error('full'); }"
    page.evaluate(f"() => {{ {block} }}")
    paint(page, (5, 5), (9, 9))
    assert "export before you leave" in page.locator("#writing").inner_text()
    go(page, "view=yours")
    assert page.locator("#entries li").count() == 1
    assert "export before you leave" in page.locator("main").inner_text()


def test_too_rare_for_a_test(visit, written, world):
    page = visit(written, "#view=write&feature=23")  # never active
    paint(page, (5, 5), (9, 9))
    assert page.locator("#test").is_disabled()
    assert "0 of them activate this feature" in page.locator("#writing").inner_text()


def test_painting_by_touch(visit, written):
    page = visit(
        written, "#view=write&feature=3", viewport={"width": 390, "height": 844}, has_touch=True
    )
    box = page.locator("#paint").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.evaluate("writing.weights[14 * CW + 14]") == 1
    assert page.evaluate("getComputedStyle(byId('paint')).touchAction") == "none"


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
BARE = ("caption", "confidence", "f1", "replicated", "evidence", "measured", "hypothesis")


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
        if view == "draw":
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


# --------------------------------------------------------------------------------------------------
# Where features are active, colors, and many classes
# --------------------------------------------------------------------------------------------------

SEEN_VIEWS = ("story", "class&class=1", "pair", "errors", "images", "features", "words")
SEEN_VIEWS += ("features&as=map", "feature&feature=2", "feature&feature=23", "two&features=3,4")
INK = r"(?i)NaN|undefined|\bink\b|\binked\b|pixel|^$"


@pytest.fixture(scope="module")
def colored():
    return color_world()


@pytest.fixture(scope="module")
def color_page(colored, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "page.html", colored, network=None)


@pytest.mark.parametrize("kind", ["color", "gray", "occlusion", "classes"])
@pytest.mark.parametrize("width", [390, 1280])
def test_views_of_photographs(visit, tmp_path, monkeypatch, kind, width):
    if kind == "classes":
        monkeypatch.setattr(page_classes, "FULL_ENTRIES", 0)
    options = {"gray": {"channels": 1}, "occlusion": {"kind": kind}, "classes": {"n_classes": 40}}
    world = color_world(**options.get(kind, {}))
    page = visit(
        write(tmp_path / "page.html", world, network=None),
        viewport={"width": width, "height": 800},
    )
    menu = page.locator("#views a").all_inner_texts()
    assert menu == ["Overview", "Classes", "Two classes", "Errors", "Images", "Features", "Words"]
    for view in (*SEEN_VIEWS, "story&step=3"):
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert not re.search(INK, page.locator("main").inner_text()), view
        assert page.evaluate(FITS), view
        links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.hash)")
        assert not [link for link in links if re.search("view=(draw|write|yours)", link)]
    for view in ("draw", "write&feature=3", "yours"):  # are not there
        go(page, f"view={view}")
        wait_for_heading(page, "Overview")


def test_a_run_is_advised_only_where_a_setting_changes(visit, tmp_path):
    trust = "the network is not linear up to this layer: trust images more than patterns"
    common = {"value": 0.9, "limit": 0.5, "what": "a share", "fine": False}
    given = [{"complaint": words, "advice": words, **common} for words in ("lower target=", trust)]
    path = write(tmp_path / "page.html", small_world(6), overview=html.Overview(diagnoses=given))
    found = visit(path).locator("main").inner_text()
    assert "What to do: lower target=, then run again." in found
    assert f"What to do: {trust}." in found


def test_features_that_are_not_on_the_page_are_named_without_links(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "PAGE_BYTES", 0)
    monkeypatch.setattr(html, "FEWEST_SHOWN", 11)
    world = color_world()
    path = write(tmp_path / "page.html", world, network=None)
    meta = meta_of(path)
    own = {entry["feature"] for entry in meta["features"]}
    assert len(own) == 11
    near = [k for entry in meta["features"] for k, _ in entry["near"]]
    off = [k for row in meta["tests"]["fixing"] for k in row]
    assert set(near) - own
    assert set(off) - own
    page = visit(path)
    words = f"it has the {len(own)} features of most influence of 24"
    assert words in page.locator("#fewer").inner_text()
    t = next(t for t, row in enumerate(meta["tests"]["fixing"]) if set(row) - own)
    views = [f"feature&feature={k}" for k in sorted(own)[:3]]
    for view in (*views, f"errors&image={t}", "story&step=1", "story&step=3", "images", "pair"):
        go(page, f"view={view}")
        links = page.evaluate("[...document.querySelectorAll('main a')].map(a => a.hash)")
        shown = {int(k) for link in links for k in re.findall("feature=([0-9]+)", link)}
        assert shown <= own, view
    go(page, f"view=errors&image={t}")
    rows = page.locator(".units li").all_inner_texts()
    absent = [row for row in rows if "which is not on this page" in row]
    assert absent
    assert all(re.search(r"[+\u2212][0-9]", row) for row in absent)  # its contribution
    number = next(k for k in range(24) if k not in own)
    go(page, f"view=feature&feature={number}")
    assert f"not on this page: feature “{number}”" in page.locator("#misread").inner_text()


SHOWN = """row => { const c = example(row, "", 0); return [...c.getContext("2d").getImageData(0, 0,
    c.width, c.height).data]; }"""


def test_map_over_an_image_is_that_of_python(visit, color_page):
    page = visit(color_page, "#view=feature&feature=3")
    row = meta_of(color_page)["features"][3]["top"][1]
    overlay = np.array(page.evaluate(SHOWN, row)).reshape(48, 64, 4)[..., :3]
    page.click("#heatMaps")
    plain = np.array(page.evaluate(SHOWN, row)).reshape(48, 64, 4)[..., :3]
    values = np.array(page.evaluate("n => [...mapAt(n)]", row[3])).reshape(1, 6, 8)
    share = smooth_maps(values / 255, (48, 64))
    expected = paint_overlay(plain[None].astype(np.uint8), share, True)[0]
    assert np.abs(overlay - expected.astype(int)).max() <= 1
    again = visit(color_page, "#view=features")
    assert again.locator("#heatMaps").inner_text() == "heat maps: on"  # another reader


def test_switch_of_maps_is_kept(visit, color_page):
    page = visit(color_page, "#view=feature&feature=3")
    page.click("#heatMaps")
    assert page.locator("#heatMaps").get_attribute("aria-pressed") == "false"
    assert not page.locator(".colorBar").count() > 1  # that of the mean map stays
    page.wait_for_timeout(1000)  # the browser hands it to its storage a moment later
    page.reload()
    page.wait_for_selector("#heatMaps")
    assert page.locator("#heatMaps").inner_text() == "heat maps: off"


def test_face_is_cropped_to_what_the_hottest_position_sees(visit, color_page, colored):
    page = visit(color_page, "#view=features")
    assert page.locator("#grid canvas").first.evaluate("c => [c.width, c.height]") == [20, 24]
    acts = colored.layer.acts_at(colored.layer.splits["val"].raw)[:, 1:, 3]
    row, column = divmod(int(acts[int(colored.shown.bank.top.index[3, 0])].argmax()), 8)
    left, top = 8 * column + 4 - 10, 8 * row + 4 - 12  # the center of a position of 8 pixels
    box = page.evaluate("seenBox(mapAt(features[3].top[0][3]))")
    assert box == [min(max(left, 0), 44), min(max(top, 0), 24), 20, 24]


def test_pointing_at_a_position_lists_its_features(visit, color_page, colored):
    meta, image = meta_of(color_page), 2
    page = visit(color_page, f"#view=images&image={image}", viewport={"width": 1280, "height": 900})
    raw = colored.layer.splits["test"].raw[[meta["tests"]["number"][image]]]

    def listed() -> list[int]:
        return [int(row.get_attribute("data-feature")) for row in page.locator(".unit").all()]

    def active_at(position: int) -> list[int]:
        acts = colored.layer.acts_at(raw)[0, position + 1]
        return acts.argsort(descending=True)[: min(12, int((acts > 0).sum()))].tolist()

    box = page.locator("#looking").bounding_box()
    page.mouse.move(box["x"] + 3.5 * box["width"] / 8, box["y"] + 2.5 * box["height"] / 6)
    assert set(listed()) == set(active_at(2 * 8 + 3)) != set()
    page.mouse.move(box["x"] + 900, box["y"])
    assert len(listed()) > 0
    assert "anywhere" in page.locator("#activeHere").locator("xpath=..").inner_text()
    page.locator("#looking").focus()
    page.keyboard.press("ArrowDown")  # the first key: the middle
    page.keyboard.press("ArrowRight")
    assert set(listed()) == set(active_at(3 * 8 + 5))
    assert "row 4, column 6" in page.locator("main").inner_text()
    page.click("text=prefix token 1")
    assert set(listed()) == set(active_at(-1))


def test_logits_without_a_feature_are_those_of_python(visit, color_page, colored):
    meta, image = meta_of(color_page), 1
    page = visit(color_page, f"#view=images&image={image}")
    raw = colored.layer.splits["test"].raw[[meta["tests"]["number"][image]]]
    k = int(page.locator("#activeHere .unit").first.get_attribute("data-feature"))
    before = [float(v) for v in page.locator("[data-logits]").get_attribute("data-logits").split()]
    assert before == pytest.approx(colored.layer.logits(raw)[0].tolist(), abs=1e-4)
    page.locator(f"#remove{k}").focus()
    page.keyboard.press("Enter")
    after = [float(v) for v in page.locator("[data-logits]").get_attribute("data-logits").split()]
    without = colored.layer.logits(colored.layer.without(raw, k))[0].tolist()
    assert after == pytest.approx(without, abs=1e-3) != before
    assert page.evaluate("document.activeElement.id") == f"remove{k}"
    page.keyboard.press("Enter")
    assert page.locator(f"#remove{k}").inner_text() == "remove"


def test_tapping_a_position(visit, color_page):
    page = visit(color_page, "#view=images", viewport={"width": 390, "height": 844}, has_touch=True)
    page.locator("#looking").tap(position={"x": 100, "y": 100})
    assert "Active at row" in page.locator("main").inner_text()
    page.locator("#looking").tap(position={"x": 100, "y": 100})  # again: everything
    assert "Active anywhere" in page.locator("main").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_views_of_photographs_are_accessible(visit, color_page, scheme):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    page = visit(color_page, color_scheme=scheme)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    for view in SEEN_VIEWS:
        go(page, f"view={view}")
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate(AXE) == [], view
