"""How large is a page, how soon is it ready, and how long does the drawing view take to follow?

    python tests/page_speed.py artifacts_mnist_sae/feature_report.html

Prints, for Chromium and for Firefox where they are installed, the milliseconds until the page is
ready (the least of three), and the median and 95th percentile of an update over 200 strokes of the
pen and 200 moves of sliders. An update is everything from the event to the finished layout.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FIREFOX = ("firefox", "firefox-esr")
FLAGS = ("--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-background-networking")
SAMPLES = 200
READY = """new Promise(done => {
    const look = () => document.body?.dataset.ready
        ? done(JSON.stringify(Number(document.body.dataset.ready))) : setTimeout(look, 5);
    look();
})"""
UPDATES = """(async () => {
    await READY;
    location.hash = "view=draw";
    const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)));
    await frame();
    await frame();
    const strokes = [], sliders = [];
    const timed = (into, act) => {
        const start = performance.now();
        act();
        refresh();
        document.body.offsetHeight;
        into.push(performance.now() - start);
    };
    live.down = true;
    for (let n = 0; n < SAMPLES; n++) {
        const at = m => [56 + 30 * Math.cos(m / 16), 50 + 12 * Math.sin(m / 8) + m / 8];
        timed(strokes, () => mark(at(n), at(n + 1)));
        if (n % 10 === 0) await frame();
    }
    live.down = false;
    refresh();
    for (let n = 0; n < SAMPLES; n++) {
        const all = document.querySelectorAll("#active input[type=range]");
        const slider = all[n % all.length];
        timed(sliders, () => {
            slider.value = slider.max * (n % 7) / 7;
            slider.dispatchEvent(new Event("input"));
        });
        if (n % 10 === 0) await frame();
    }
    return JSON.stringify({ strokes, sliders });
})()""".replace("SAMPLES", str(SAMPLES)).replace("READY", READY)


def installed(names: tuple[str, ...]) -> str | None:
    """The path of the first of these programs, None without any."""
    paths = [path for path in map(shutil.which, names) if path]
    return paths[0] if paths else None


@contextmanager
def chromium(program: str) -> Iterator[Callable[[str, str], object]]:
    """A function that opens an address and returns what an expression is there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)

        def evaluate(address: str, expression: str) -> object:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(address)
            found = json.loads(page.evaluate(expression))
            page.close()
            return found

        yield evaluate
        browser.close()


@contextmanager
def firefox(program: str) -> Iterator[Callable[[str, str], object]]:
    """The same. An ordinary Firefox is spoken to in WebDriver BiDi: JSON over a websocket."""
    import websocket

    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--remote-debugging-port", "0", "--profile", profile]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **pipes)
        try:
            listening = next(line for line in process.stderr if "BiDi listening on" in line)
            address = re.search(r"ws://\S+", listening)[0]
            socket = websocket.create_connection(f"{address}/session", suppress_origin=True)

            def ask(method: str, **params: object) -> dict:
                socket.send(json.dumps({"id": 1, "method": method, "params": params}))
                while True:
                    answer = json.loads(socket.recv())
                    if answer["type"] == "error":
                        raise RuntimeError(f"Firefox: {answer['message']}")
                    if answer.get("id") == 1:
                        return answer["result"]

            ask("session.new", capabilities={})

            def evaluate(address: str, expression: str) -> object:
                context = ask("browsingContext.create", type="tab")["context"]
                ask("browsingContext.navigate", context=context, url=address, wait="complete")
                target = {"context": context}
                answer = ask(
                    "script.evaluate", expression=expression, target=target, awaitPromise=True
                )
                ask("browsingContext.close", context=context)
                if "result" not in answer:
                    raise RuntimeError(f"Firefox: {answer['exceptionDetails']['text']}")
                return json.loads(answer["result"]["value"])

            yield evaluate
        finally:
            process.terminate()
            process.wait()


def report(name: str, page: Path, evaluate: Callable[[str, str], object]) -> None:
    address = page.resolve().as_uri()
    ready = min(evaluate(address, READY) for _ in range(3))
    print(f"{name}: ready after {ready:.0f} ms")
    for what, times in evaluate(address, UPDATES).items():
        median, most = np.quantile(times, (0.5, 0.95))
        print(f"  {what}: median {median:.1f} ms, 95th percentile {most:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="a feature_report.html, with a network")
    page = parser.parse_args().page
    if not page.is_file():
        parser.error(f"{page} is not there; run MNIST_SAE_code.py first")
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    for name, programs, opened in (("Chromium", CHROMIUM, chromium), ("Firefox", FIREFOX, firefox)):
        program = installed(programs)
        if program is None:
            print(f"{name}: not installed")
            continue
        with opened(program) as evaluate:
            report(name, page, evaluate)


if __name__ == "__main__":
    main()
