"""How fast is a page? Milliseconds until it is ready, and from an input to the finished layout.

    python bench/page_speed.py artifacts_mnist_sae/feature_report.html

Takes a page with a network to draw for. Needs Playwright and a Chromium, which runs headless.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median, quantiles

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LOADS, UPDATES = 5, 200  # runs behind each number
READY = "() => document.body?.dataset.ready"  # milliseconds since the page was asked for
TIMED = """
    const queue = []; /* what the page would do in its next frame: done in the measured time */
    window.requestAnimationFrame = f => queue.push(f);
    const timed = event => {
        const start = performance.now();
        event();
        while (queue.length) queue.shift()(start);
        document.body.offsetHeight; /* waits for the layout */
        return performance.now() - start;
    };
    const moves = (id, n) => {
        const canvas = document.getElementById(id), box = canvas.getBoundingClientRect();
        canvas.setPointerCapture = () => {}; /* there is no such pointer */
        const pen = (kind, m) => canvas.dispatchEvent(new PointerEvent(kind, { buttons: 1,
            pointerId: 1, clientX: box.left + box.width * (0.5 + 0.25 * Math.cos(m / 16)),
            clientY: box.top + box.height * (0.5 + 0.3 * Math.sin(m / 16)) }));
        pen("pointerdown", 0);
        const times = Array.from({ length: n }, (_, m) => timed(() => pen("pointermove", m + 1)));
        timed(() => pen("pointerup", n));
        return times;
    };
"""
DRAW = (
    "n => {"
    + TIMED
    + """
    const strokes = moves("draw", n), sliders = Array.from({ length: n }, (_, m) => {
        const all = document.querySelectorAll("main input[type=range]");
        const slider = all[m % all.length];
        slider.value = slider.max * (m % 7) / 7;
        return timed(() => slider.dispatchEvent(new Event("input")));
    });
    return { "move of the pen": strokes, "move of a slider": sliders };
}"""
)
WRITE = (
    "n => {"
    + TIMED
    + """
    byId("fromMachine").click();
    byId("size").value = 6;
    byId("size").dispatchEvent(new Event("change"));
    const brush = moves("paint", n);
    return { "move of the brush": brush, "a test": [timed(() => byId("test").click())] };
}"""
)


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, help="a feature_report.html, with a network")
    path = parser.parse_args().page
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not path.is_file() or program is None:
        sys.exit(f"{path} must be a file, and one of {', '.join(CHROMIUM)} be installed")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {program}, headless")
    with sync_playwright() as playwright:  # which closes the browser, too
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        ready = []
        for tab in (browser.new_page() for _ in range(LOADS)):
            tab.goto(f"{path.resolve().as_uri()}#view=draw")
            ready.append(float(tab.wait_for_function(READY).json_value()))
        if tab.query_selector("#draw") is None:
            sys.exit(f"{path} must have a network to draw for, as MNIST_SAE_code.py writes it")
        print(f"ready: median {median(ready):.0f} ms of {LOADS} loads")
        updates = tab.evaluate(DRAW, UPDATES)
        most = tab.evaluate("features[largest(1, i => features[i].influence)[0]].feature")
        tab = browser.new_page()
        tab.goto(f"{path.resolve().as_uri()}#view=write&feature={most}")
        tab.wait_for_function(READY)
        updates |= tab.evaluate(WRITE, UPDATES)
        for what, ms in updates.items():
            late = quantiles([*ms, ms[-1]], n=20)[-1]
            print(f"{what}: median {median(ms):.1f} ms, 95th percentile {late:.1f}, of {len(ms)}")


if __name__ == "__main__":
    main()
