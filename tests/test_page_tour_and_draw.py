"""The first screen, the guided tour and the drawing view in a real browser, at the sizes of a
projector and a phone."""

import re

import pytest
import test_page_in_browser as shared
from page_world import color_world, meta_of, review_of, write

from saexplain import page as html
from saexplain.counterfactuals import confused_pair

pytestmark = pytest.mark.slow
browser, visit, world, written = shared.browser, shared.visit, shared.world, shared.written
review = shared.review
PROJECTOR, PHONE = {"width": 1280, "height": 720}, {"width": 390, "height": 844}
SIZES = pytest.mark.parametrize("size", [PROJECTOR, PHONE], ids=["projector", "phone"])


def check_in_view(page, *selectors: str) -> None:
    """All elements of each selector lie inside the window, without any scrolling."""
    assert page.evaluate("scrollY") == 0
    for selector in selectors:
        boxes = [node.bounding_box() for node in page.locator(selector).all()]
        assert boxes, selector
        for box in boxes:
            right, bottom = box["x"] + box["width"], box["y"] + box["height"]
            assert min(box["x"], box["y"]) >= 0, selector
            assert right <= page.viewport_size["width"], (selector, right)
            assert bottom <= page.viewport_size["height"], (selector, bottom)


@SIZES
def test_first_screen_has_two_sentences_and_doors(visit, written, world, size):
    page = visit(written, viewport=size)
    check_in_view(page, "#lead", "#doors a")
    lead = page.locator("#lead").inner_text()
    assert len(re.findall(r"[.!?](?: |$)", lead)) == 2
    test = world.layer.splits["test"]
    a, b = confused_pair(world.layer.logits(test.raw), test.labels)
    doors = page.locator("#doors a")
    article = {c: "an" if c == 8 else "a" for c in range(10)}
    assert doors.locator("b").all_inner_texts() == [
        f"How does it tell {article[a]} {a} from {article[b]} {b}?",
        "Where is it wrong?",
        "Draw your own",
        "Take the tour",
    ]
    links = [door.get_attribute("href") for door in doors.all()]
    assert links[:3] == [f"#view=pair&a={a}&b={b}", "#view=errors", "#view=draw"]
    assert page.evaluate(shared.FITS)


@SIZES
def test_doors_of_a_network_that_the_page_cannot_compute(visit, tmp_path, size):
    colored = color_world()
    path = write(tmp_path / "page.html", colored, network=None)
    tour = review_of(colored).tour
    page = visit(path, viewport=size)
    check_in_view(page, "#lead", "#doors a")
    page.click("text=Where in an image?")
    page.wait_for_selector("#looking")
    meta = meta_of(path)
    assert meta["tests"]["number"][page.evaluate("looking.t")] == tour.image
    page.keyboard.press("Escape")
    shared.go(page, "view=story&step=2")
    check_in_view(page, "#tour canvas", "#tour .units button", "#tourLogits", "#tourNext")
    page.click("#tourNext")
    page.wait_for_selector("#tourOn")
    assert page.locator("#tourPrediction").inner_text() == str(tour.goal)
    assert not page.locator("#tourOn >> text=Change").count()
    assert not re.search("NaN|undefined|logit", page.locator("main").inner_text())


@SIZES
def test_every_step_of_the_tour_is_in_view(visit, written, review, size):
    page, tour = visit(written, viewport=size), review.tour
    page.click("#tourStart")
    switches = [f"#tour{k}" for k in tour.off]
    seen = [["canvas", ".bars"], [".unit"], [*switches, "#tourPrediction", "#tourLogits"]]
    for selectors in seen:
        page.wait_for_selector("#tourNext")
        check_in_view(page, "#tourNext", *(f"#tour {selector}" for selector in selectors))
        assert page.evaluate(shared.FITS)
        page.click("#tourNext")
    page.wait_for_selector("#tourOn")
    check_in_view(page, "#tourSteps a", "#tourOn a", "#tourLogits", "#tourPrediction", *switches)


@SIZES
def test_the_end_of_the_tour_is_in_view_with_long_class_names(visit, world, tmp_path, size):
    names = [f"{c} with the words of a long class name, number {c}" for c in range(10)]
    path = write(tmp_path / "page.html", world, overview=html.Overview(classes=names))
    page = visit(path, "#view=story&step=3", viewport=size)
    check_in_view(page, "#tourSteps a", "#tourOn a", "#tourLogits", "#tourPictures figure")


def test_tour_ends_with_the_features_off_and_can_be_taken_again(visit, written, review):
    page, tour = visit(written, "#view=story&step=3"), review.tour
    label = meta_of(written)["tests"]["labels"][meta_of(written)["tests"]["tour"]["image"]]
    assert shared.logits_of(page, "tourLogits") == pytest.approx(tour.logits[-1].tolist(), abs=1e-4)
    assert page.locator("#tourPrediction").inner_text() == str(tour.goal)
    words = page.locator("#tourOutcome p").first.inner_text()
    fall, rise = (tour.logits[-1] - tour.logits[0])[[label, tour.goal]].tolist()
    for change, c in ((fall, label), (rise, tour.goal)):
        way = "falls" if change < 0 else "rises"
        assert re.search(rf"for {c} {way} by {abs(change):.2f}", words), words
    for k in tour.off:  # on again
        page.click(f"#tour{k}")
    assert shared.logits_of(page, "tourLogits") == pytest.approx(tour.logits[0].tolist(), abs=1e-4)
    links = page.locator("#tourOn a").all()
    off = ",".join(f"{k}:0" for k in tour.off)
    assert links[0].get_attribute("href").endswith(f"set={off}")
    assert links[1].get_attribute("href") == f"#view=pair&a={label}&b={tour.goal}"
    page.click("text=again")
    page.wait_for_selector("#tourNext")
    page.keyboard.press("Escape")
    page.wait_for_selector("#doors")


def test_tour_shows_no_words_that_contradict(visit, world, tmp_path):
    records = [r | {"hypothesis": r["hypothesis"] | {"classes": []}} for r in world.records]
    for record in records:  # no image has so much ink
        record["hypothesis"]["threshold"] = 10**7
    tour = review_of(world, records).tour
    assert not any(tour.agrees)
    page = visit(write(tmp_path / "page.html", world, records), "#view=story&step=3")
    shown = page.locator("#tour").inner_text()
    assert all(f"Feature {k}" in shown for k in tour.off)
    assert "Stroke number" not in shown
    assert not page.locator("#tourPictures").count()


# --------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------


def test_drawing_on_a_phone_is_in_view_with_what_it_changes(visit, written):
    page = visit(written, "#view=draw", viewport=PHONE, has_touch=True)
    assert page.locator("#empty").inner_text() == "Draw something"
    assert not page.locator("#prediction").is_visible()
    shared.draw_line(page, (30, 30), (150, 40), (60, 150))
    assert page.locator("#prediction").is_visible()
    assert not page.locator("#empty").is_visible()
    first = page.locator("#active .unit").first.get_attribute("data-feature")
    tools = ["#draw", "#undo", "#clear", "#eraser", "#prediction", "#predictions .bars"]
    check_in_view(page, *tools, f"#flip{first}", f"#set{first}")
    assert 180 <= page.locator("#draw").bounding_box()["width"] <= 204  # with its border
    heights = [b.bounding_box()["height"] for b in page.locator("#drawing button").all()]
    assert min(heights) >= 34
    page.locator(f"#flip{first}").tap()
    check_in_view(page, "#changed")
    assert shared.logits_of(page, "changed") != shared.logits_of(page, "prediction")
    assert page.evaluate(shared.FITS)
    page.locator("#clear").tap()
    assert page.locator("#empty").is_visible()


def test_pinned_features_stay_with_their_distance_to_the_threshold(visit, written, world, review):
    layer, image = world.layer, 60
    raw = layer.splits["test"].raw[review.image[[image]]]
    before = (raw - layer.mu) / layer.std @ layer.sae.W_enc + layer.sae.b_enc  # (1, d_sae)
    distance = (layer.sae.threshold - before)[0]
    inactive, active = (distance > 0).nonzero()[:, 0].tolist(), int(distance.argmin())
    k = min(inactive, key=lambda k: float(distance[k]))
    page = visit(written, f"#view=draw&image={image}")
    assert not page.locator(f"#flip{k}").count()
    page.fill("#pinNumber", str(k))
    page.press("#pinNumber", "Enter")
    page.click(f"#pin{active}")
    page.wait_for_function(f"location.hash.includes('pin={k},{active}')")
    again = visit(written, "#" + page.url.split("#")[1])
    for shown in (page, again):
        rows = shown.locator("#active .unit").all()
        assert [int(row.get_attribute("data-feature")) for row in rows[:2]] == [k, active]
        words = rows[0].locator(".below").inner_text()
        assert f"inactive, {float(distance[k]):.2f} below its threshold" in words
        found = float(rows[0].locator(".below").get_attribute("data-distance"))
        assert found == pytest.approx(float(distance[k]), abs=1e-4)
        assert not rows[1].locator(".below").is_visible()
        assert shown.locator(f"#pin{k}").get_attribute("aria-pressed") == "true"
    again.click("#clear")  # blank: what is pinned stays
    assert again.locator("#active .unit").count() == 2
    again.click(f"#pin{k}")
    again.wait_for_function(f"location.hash.includes('pin={active}')")
    assert not again.locator(f"#pin{k}").count()


def test_pins_that_are_no_features_are_left_out(visit, written):
    page = visit(written, "#view=draw&pin=3,24,-1,x,,5")
    assert page.evaluate("[...live.pins]") == [3, 5]


def test_on_a_phone_a_hypothesis_is_tested_beside_its_drawing(visit, written):
    page = visit(written, "#view=write&feature=3", viewport=PHONE, has_touch=True)
    page.locator("#fromMachine").tap()
    check_in_view(page, "#paint", "#writing [aria-label=Brush] button", "#test")
    page.locator("#test").tap()
    page.wait_for_selector("#results")
    check_in_view(page, "#paint")
    table = page.locator("#results").bounding_box()
    assert table["x"] + table["width"] <= PHONE["width"]
