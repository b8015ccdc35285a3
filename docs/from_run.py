"""What the README tells of the network, and its pictures, from a real run.

    python MNIST_SAE_code.py --data DIR
    python docs/from_run.py artifacts_mnist_sae

Writes a few sentences between the marks in README.md, and docs/tour.png and docs/apart.png, two
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


def why_unsuitable(summary: list[dict]) -> str:
    """What this run has not got that the story needs; nothing where it has all."""
    if len(summary) != 1:
        targets = ", ".join(str(record["target_actives"]) for record in summary)
        return f"the run has the targets {targets}; give one of a single target"
    (record,) = summary
    if "baseline_acc" not in record:
        return "the run did not finish; start it again"
    if "hypotheses" not in record:
        return "the run has no statements; run it without --no-hypotheses"
    if "returned" not in record:
        return "the run has no SAE of another seed; run it with --stability-seeds 1"
    if not record["hypotheses"]["features_that_make_influence"]:
        return "no feature of the run changes the scores; there is nothing to tell"
    return ""


def of_digits(summary: dict) -> bool:
    """Whether a run is of MNIST, or of the sample of it."""
    return summary["data"].startswith(("MNIST,", "bundled sample"))


def returning(returned: dict) -> str:
    """How much another seed finds, and how far that can be relied on."""
    energy, chance = returned["energy"], returned["untrained"]["energy"]
    if energy["std"] is None:
        found = f"An SAE of another seed finds {energy['mean']:.0%} of the energy again"
        spread = "this is one pair of SAEs, and others differ"
    else:
        found = f"SAEs of other seeds find {energy['mean']:.0%} of the energy again"
        spread = f"this is the mean over {returned['pairs']} pairs, ± {energy['std']:.0%}"
    return (
        f"{found}, where untrained directions that fire as often find {chance:.0%}; {spread} (over "
        f"three seeds on MNIST [25% to 57%](docs/measurements.md#fidelity))."
    )


def sentences(summary: dict, report: list[dict], page: dict) -> list[str]:
    """What one learned about this very network."""
    digits = of_digits(summary)
    shares = summary["hypotheses"]["shares"]["SAE"]
    many = summary["hypotheses"]["features_that_make_influence"]
    n_features = summary["sae_latents"]
    strongest = report[0]
    found = [
        f"The classifier reads {summary['baseline_acc']:.1%} of {page['tests']['n']:,} "
        f"{'digits' if digits else 'images'} it had never seen; thinking through the SAE, with "
        f"{summary['achieved_actives_test']:.0f} of {n_features} features active per image, "
        f"{summary['recon_acc_jumprelu']:.1%}."
    ]
    tour, names = page["tests"]["tour"], page["classes"]
    if tour:
        label, goal = names[page["tests"]["labels"][tour["image"]]], names[tour["goal"]]
        label, goal = (f"a {name}" if digits else f"“{name}”" for name in (label, goal))
        off = " and ".join(named(report, k) for k in tour["off"])
        number = page["tests"]["number"][tour["image"]]
        found.append(
            f"Test image {number} is {label} to it; without feature {off} the same image is {goal}."
        )
    found += [
        f"{many['50%']} of the features make half of what single features do to its scores, "
        f"{many['90%']} make 90%; the strongest is {strongest['feature']}: "
        f"*{strongest['statement']}*.",
    ]
    if summary["hypotheses"]["median_words"] is not None:  # where strokes are named
        found.append(
            f"Sentences all parts of which held on unseen images explain "
            f"{shares['influence_explained']:.0%} of that influence."
        )
    return [*found, returning(summary["returned"])]


def wrapped(text: str) -> str:
    """Lines of at most WIDTH letters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def story(said: list[str], thing: str = "digit") -> str:
    """The README between its marks."""
    shown = [
        f"![Switched off, a feature turns one {thing} into another](docs/tour.png)",
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
    records = json.loads((run / "summary.json").read_text())
    if why := why_unsuitable(records):
        sys.exit(f"{run}: {why}")
    for name in ("feature_report.json", "feature_report.html"):
        if not (run / name).exists():
            sys.exit(f"{run}: its {name} is gone; run it again")
    (summary,) = records
    report = json.loads((run / "feature_report.json").read_text())
    page = page_data(run)
    if not page["tests"] or not page["tests"]["tour"]:
        sys.exit(f"{run}: no test image turns into another without a feature; no tour can be shown")
    said = sentences(summary, report, page)
    text = story(said, "digit" if of_digits(summary) else "image")
    README.write_text(with_story(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    take_pictures(run)


if __name__ == "__main__":
    main()
