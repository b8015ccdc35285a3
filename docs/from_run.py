"""What the README tells of the network, and its pictures, from a real run.

    python MNIST_SAE_code.py --data DIR
    python docs/from_run.py artifacts_mnist_sae

Writes five sentences between the marks in README.md, and docs/tour.png and docs/apart.png, two
places of the run's page as Chromium shows them (pip install -r tests/requirements.txt).
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
MARKS = ("<!-- story -->", "<!-- /story -->")
WIDTH = 120  # letters of a line
PICTURES = {  # name: address on the page, the part of it that is shown
    "tour": ("#view=story&step=3", "#tour"),
    "apart": ("#view=story&step=end", ".halves"),
}


def page_data(run: Path) -> dict:
    """What the run's page was written from."""
    page = (run / "feature_report.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="meta">(.*?)</script>', page)
    return json.loads(found)


def named(report: list[dict], k: int) -> str:
    """Feature k, with what is said of its strokes, where it is reported."""
    for record in report:
        if record["feature"] == k:
            first = record["statement"].split(";")[0]
            return f"{k} (it says: {first[0].lower()}{first[1:]})"
    return str(k)


def sentences(summary: dict, report: list[dict], page: dict) -> list[str]:
    """What one learned about this very network."""
    shares = summary["hypotheses"]["shares"]["SAE"]
    many = summary["hypotheses"]["features_that_make_influence"]
    n_features = summary["sae_latents"]
    strongest = report[0]
    returned = summary["returned"]
    found = [
        f"The classifier reads {summary['baseline_acc']:.1%} of {page['tests']['n']:,} digits it "
        f"had never seen; thinking through the SAE, with {summary['achieved_actives_test']:.0f} "
        f"of {n_features} features active per image, {summary['recon_acc_jumprelu']:.1%}."
    ]
    tour, names = page["tests"]["tour"], page["classes"]
    if tour:
        label, goal = names[page["tests"]["labels"][tour["image"]]], names[tour["goal"]]
        off = " and ".join(named(report, k) for k in tour["off"])
        number = page["tests"]["number"][tour["image"]]
        found.append(
            f"Test image {number} is a {label} to it; without feature {off} the same image is a "
            f"{goal}."
        )
    found += [
        f"{many['50%']} of the features make half of what single features do to its scores, "
        f"{many['90%']} make 90%; the strongest is {strongest['feature']}: "
        f"*{strongest['statement']}*.",
        f"Sentences all parts of which held on unseen images explain "
        f"{shares['influence_explained']:.0%} of that influence.",
        f"An SAE of another seed finds {returned['energy']['mean']:.0%} of the energy again, where "
        f"untrained directions that fire as often find {returned['untrained']['energy']:.0%}.",
    ]
    return found


def wrapped(text: str) -> str:
    """Lines of at most WIDTH letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def story(said: list[str]) -> str:
    """The README between its marks."""
    shown = [
        "![Switched off, a feature turns one digit into another](docs/tour.png)",
        wrapped(" ".join(said)),
        "![Which features tell two classes apart, and where they look](docs/apart.png)",
        "(Written, like both pictures, by `python docs/from_run.py artifacts_mnist_sae`.)",
    ]
    return "\n\n".join(shown)


def with_story(readme: str, text: str) -> str:
    """The README with another story. Raises ValueError where it has no marks."""
    before, mark, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"README.md has no {MARKS[0]} ... {MARKS[1]}")
    return f"{before}{mark}\n\n{text}\n\n{end}{after}"


def take_pictures(run: Path, chromium: str = "/usr/bin/chromium") -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (address, part) in PICTURES.items():
            page = browser.new_page(viewport={"width": 1000, "height": 900})
            page.goto(f"{(run / 'feature_report.html').resolve().as_uri()}{address}")
            page.wait_for_selector("body[data-ready]")
            page.locator(part).screenshot(path=DOCS / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").exists():
        sys.exit("give the folder of one finished run: python docs/from_run.py artifacts_mnist_sae")
    run = Path(sys.argv[1])
    (summary,) = json.loads((run / "summary.json").read_text())
    report = json.loads((run / "feature_report.json").read_text())
    text = story(sentences(summary, report, page_data(run)))
    README.write_text(with_story(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    take_pictures(run)


if __name__ == "__main__":
    main()
