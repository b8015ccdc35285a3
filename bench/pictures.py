"""The pictures of the README: views of a finished run's page, as a browser shows them.

    python bench/pictures.py RUN     # docs/tour.png, docs/draw.png and docs/feature_panel.png

RUN is a folder of results with seed 0, made from the full set with `--data DIR`. It needs Chromium.
docs/where.png is a picture of a feature that bench/networks.py explains.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parent.parent / "docs"
DRAWN = [[(0.3, 0.2), (0.32, 0.5), (0.72, 0.5)], [(0.7, 0.15), (0.62, 0.85)]]  # strokes of a 4


def take_tour(page: Page, address: str) -> None:
    """The last step of the tour, with the feature switched off."""
    page.set_viewport_size({"width": 1000, "height": 720})
    page.goto(f"{address}#view=story&step=3")
    page.locator("#tour").screenshot(path=DOCS / "tour.png")


def take_drawing(page: Page, address: str, pinned: int) -> None:
    """A 4 drawn on a phone, with a feature that is pinned."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{address}#view=draw&pin={pinned}")
    box = page.locator("#draw").bounding_box()
    for first, *others in DRAWN:
        page.mouse.move(box["x"] + first[0] * box["width"], box["y"] + first[1] * box["height"])
        page.mouse.down()
        for x, y in others:
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=20)
        page.mouse.up()
    page.mouse.move(0, 0)
    page.screenshot(path=DOCS / "draw.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run.resolve()
    top = json.loads((run / "summary.json").read_text())[0]["top_features"]
    shutil.copyfile(run / f"feature_{top[0]}_panel.png", DOCS / "feature_panel.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page()
        address = f"file://{run}/feature_report.html"
        take_tour(page, address)
        take_drawing(page, address, top[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
