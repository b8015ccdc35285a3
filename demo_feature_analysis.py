"""Check on planted features that the functions of feature_analysis.py find what was planted.

    python demo_feature_analysis.py [--out DIR]     # 5 seconds; pictures go to demo_pictures/

Prints a table of values found, each with ok or FAIL, and the number of checks. Columns: density,
mean activation, commonest label, number of top examples, of images that the bands are taken from,
and of active images after a merge, likeness of pattern and planted mask, nearest feature, logits
changed most by adding and by removing. Writes a gallery, a pattern and a panel of each feature.
Exit status: 0; 1 when a check failed; 2 when the pictures cannot be written.

Nothing is trained and no data are read. PLANTED lists pen strokes; images of them are drawn at
random from a seed. The weights of a classifier and of a JumpReLU SAE are set by hand so that each
feature is one stroke. Its presence p is the mean ink of its own pixels, those of no other stroke,
or 1 minus that for a feature that means the absence of a stroke. It moves one unit:

    z = strength (p - CUT)       relu(z) is added to the logit of one class, subtracted from another

A feature is f = p where p > threshold, else 0; f = 1 moves z by strength. A twin reads the stroke
of another feature, so the SAE counts that stroke twice: its reconstruction has an error. The twin
also moves a spare unit, which no logit depends on. Expected values follow from the table and the
pixels, by closed forms and loops that use none of the functions they check.

Dimension key: N images, S strokes, C classes, d_sae features, d_in = S + 1 units, the spare last.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.panels import show_feature_panel
from saexplain.sae import JumpReLUSAE

SIDE = 28
ROW, COL = np.mgrid[:SIDE, :SIDE]
RADIUS = np.hypot(ROW - 13.5, COL - 13.5)
N_CLASSES, N_IMAGES, STROKES_PER_IMAGE = 6, 240, 2  # class 0: no stroke; 2 strokes on average
NOISE, CUT = 0.03, 0.2  # standard deviation of the ink; presence below which ReLU cuts z off
TOPK, BATCH = 20, 50  # top examples of a feature; images in a batch (the last one is smaller)
SAMPLE = 64  # active images of a feature that its bands are taken from, at most
FEW, ALPHA = 25, 3.0  # an n_eval that leaves images out; a step other than 1
TOLERANCE = 1e-4  # of the largest value: float32 against float64
Columns = dict[str, tuple[list, np.ndarray]]  # title: values found, (d_sae,) bool whether right


class Planted(NamedTuple):
    """One feature of the SAE and the stroke that it means."""

    name: str
    mask: np.ndarray  # (28, 28) bool, pixels of the stroke; some must belong to no other stroke
    pushes: int  # class whose logit it raises
    against: int  # class whose logit it lowers
    strength: float  # how far a full stroke moves z
    threshold: float = 0.3  # presence above which it is active; ink is 0, 0.45-0.65 or 0.8-1
    sign: int = 1  # -1: it means the absence of the stroke
    twin_of: str = ""  # name of the feature whose stroke it reads too
    tilt: float = 0.0  # what f = 1 adds to the spare unit


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(28, 28) bool, True on rows top..bottom and columns left..right, all included."""
    return (top <= ROW) & (bottom >= ROW) & (left <= COL) & (right >= COL)


RING = Planted("ring", (RADIUS > 5) & (RADIUS < 6.9), pushes=3, against=4, strength=1.5)
PLANTED = (
    Planted("vertical bar", box(3, 24, 4, 5), pushes=1, against=2, strength=1.0),
    Planted("horizontal bar", box(4, 5, 3, 24), pushes=2, against=3, strength=1.2),
    RING,
    RING._replace(name="strong ring", threshold=0.72, twin_of="ring", tilt=1.2),
    Planted("diagonal", (abs(COL - ROW - 11) < 1.5) & box(7, 24, 3, 24), 4, 5, strength=0.8),
    Planted("corner", box(23, 24, 15, 24) | box(15, 24, 23, 24), 5, 1, strength=1.1),
    Planted("dot", box(22, 24, 12, 13), pushes=1, against=5, strength=0.9),
    Planted("empty centre", RADIUS < 3.4, 0, 3, strength=1.3, threshold=0.75, sign=-1),
    Planted("dead dash", box(18, 20, 19, 21), 2, 4, strength=1.4, threshold=9.0),  # out of reach
)


class Plan:
    """The table and what follows from it before any weight is set."""

    def __init__(self, table: tuple[Planted, ...]):
        self.table, self.strokes = table, [row for row in table if not row.twin_of]
        names = [row.name for row in self.strokes]
        self.stroke = np.array([names.index(row.twin_of or row.name) for row in table])  # (d_sae,)
        if len(set(names)) < len(names):
            raise ValueError("two strokes have the same name: give each its own")
        self.masks = np.stack([row.mask for row in self.strokes])  # (S, 28, 28)
        own = self.masks & (self.masks.sum(0) == 1)
        self.own = own / own.sum((1, 2), keepdims=True)  # weights that take the mean ink of `own`
        unit = np.arange(len(names) + 1)
        self.mu = 2 * (unit * 0.4142 % 1) - 1.2  # (d_in,) different, so that a function that takes
        self.std = 0.45 + 1.5 * (unit * 0.618 % 1)  # one unit for another gives other values
        self.decoder = np.eye(len(unit))[self.stroke] * [[row.strength] for row in table]
        self.decoder[:, -1] = [row.tilt for row in table]
        self.decoder /= self.std  # (d_sae, d_in), of standardized z


def plant(plan: Plan) -> fa.ExplainedLayer:
    """The classifier, the SAE, mu and std."""
    d_in, d_sae = len(plan.mu), len(plan.table)
    W1, W2 = torch.zeros(d_in, SIDE, SIDE), torch.zeros(N_CLASSES, d_in)
    b1, rest = torch.zeros(2, d_in)  # z of a blank image; z where each p is 0
    for j, row in enumerate(plan.strokes):
        W1[j] = row.sign * row.strength * torch.tensor(plan.own[j])
        W2[row.pushes, j], W2[row.against, j] = 1.0, -1.0
        rest[j] = -CUT * row.strength
        b1[j] = rest[j] + (row.sign < 0) * row.strength

    mu, std = torch.tensor(plan.mu).float(), torch.tensor(plan.std).float()
    sae = JumpReLUSAE(d_in, d_sae).requires_grad_(False)
    for k, (row, j) in enumerate(zip(plan.table, plan.stroke, strict=True)):
        sae.W_enc[j, k] = std[j] / row.strength
        sae.b_enc[k] = (mu[j] - rest[j]) / row.strength
        sae.threshold[k] = row.threshold
    sae.W_dec.copy_(torch.tensor(plan.decoder))
    sae.b_dec.copy_((rest - mu) / std)
    classifier = SimpleNamespace(
        preactivations=lambda images: images.flatten(1) @ W1.flatten(1).T + b1,  # (B, d_in)
        logits_from_preactivations=lambda z: z.relu() @ W2.T,  # (B, C)
    )
    return fa.ExplainedLayer(classifier, sae, mu, std)


def draw_scene(plan: Plan, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28), and labels (N,): the class that the darkest stroke pushes, else 0."""
    generator, s = torch.Generator().manual_seed(seed), len(plan.strokes)
    drawn, strong, shade = torch.rand(3, N_IMAGES, s, generator=generator)
    ink = (drawn < STROKES_PER_IMAGE / s) * (torch.where(strong < 0.5, 0.45, 0.8) + 0.2 * shade)
    noise = NOISE * torch.randn(N_IMAGES, SIDE, SIDE, generator=generator)
    noise *= torch.tensor(box(2, 25, 2, 25))  # the edge stays blank, as in MNIST
    images = (ink[:, :, None, None] * torch.tensor(plan.masks)).amax(1)  # (N, 28, 28)
    darkest = (ink * torch.tensor([row.sign > 0 for row in plan.strokes])).max(1)
    labels = torch.tensor([row.pushes for row in plan.strokes])[darkest.indices]
    return (images + noise).clamp(0, 1)[:, None], labels * (darkest.values > 0)


def expected_activity(plan: Plan, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Presence and activation of each feature on each image, both (N, d_sae)."""
    ink = np.array([[(image * own).sum() for own in plan.own] for image in images[:, 0].numpy()])
    signs = np.array([row.sign for row in plan.table])
    presence = (signs < 0) + signs * ink[:, plan.stroke]
    return presence, presence * (presence > [row.threshold for row in plan.table])


def expected_effects(plan: Plan, images: Tensor, n_eval: int, alpha: float | None) -> np.ndarray:
    """(d_sae, C) mean change of the logits when alpha of a feature is added to the first n_eval
    images or, with alpha None, when it is removed from the first n_eval where it is active."""
    presence, acts = expected_activity(plan, images)
    effects = np.zeros((len(plan.table), N_CLASSES))
    for k, row in enumerate(plan.table):
        at = np.flatnonzero((acts[:, k] > 0) | (alpha is not None))[:n_eval]
        p = presence[at, k]
        p_after = 0 * p if alpha is None else p + alpha
        change = np.maximum(0, p_after - CUT) - np.maximum(0, p - CUT)
        effects[k, row.pushes] = row.strength * change.sum() / max(1, len(at))
        effects[k, row.against] = -effects[k, row.pushes]
    return effects


def equal(expected, found) -> np.ndarray:
    """(n,) bool, whether the rows of two arrays (n, ...) agree up to rounding."""
    expected, found = np.asarray(expected, float), np.asarray(found, float)
    if expected.shape != found.shape:
        return np.zeros(len(expected), bool)
    agree = abs(found - expected) <= TOLERANCE * abs(expected).max(initial=0)  # False for nan
    return agree.reshape(len(expected), -1).all(1)


def are_examples(examples, ranked: np.ndarray, acts: np.ndarray, labels: np.ndarray) -> bool:
    """Whether examples have the activations `ranked`, and the images they name have these in acts
    (N,), where no two are equal, and the labels."""
    index, activation, label = (np.asarray(column) for column in examples)
    right = equal([ranked], [activation]) & equal([ranked], [acts[index]])
    return bool(right.all()) and np.array_equal(labels[index], label)


def check_bank(plan: Plan, images: Tensor, labels: np.ndarray, bank: fa.FeatureBank) -> Columns:
    """How often, how strongly and on which images each feature is active."""
    acts = expected_activity(plan, images)[1]
    top, bands, counts, n_active = [], [], [], (acts > 0).sum(0)
    for k, own in enumerate(acts.T):
        ranked = -np.sort(-own[own > 0])
        top.append(are_examples(bank.top.of(k), ranked[:TOPK], own, labels))
        sample = -np.sort(-bank.sample.of(k).activation.numpy())  # all active images if they fit
        quarters = np.array_split(sample, 4)  # of each, up to five evenly spread
        steps = [np.linspace(0, len(q) - 1, min(5, len(q))).round() for q in quarters]
        spread = [q[at.astype(int)] for q, at in zip(quarters, steps, strict=True)]
        shown = [torch.cat(column) for column in zip(*bank.bands(k), strict=True)]
        bands.append(are_examples(shown, np.concatenate(spread), own, labels))
        bands[-1] &= len(sample) == min(len(ranked), SAMPLE)
        counts.append([np.sum(labels[own > 0] == c) for c in range(N_CLASSES)])
    density, mean = bank.feature_density.tolist(), bank.mean_activation_when_active.tolist()
    n_top, n_sample = ((some.index >= 0).sum(1).tolist() for some in (bank.top, bank.sample))
    return {
        "density": ([f"{x:.3f}" for x in density], equal(n_active / len(labels), density)),
        "mean": ([f"{x:.3f}" for x in mean], equal(acts.sum(0) / n_active.clip(1), mean)),
        "label": (bank.label_histogram.argmax(1).tolist(), equal(counts, bank.label_histogram)),
        "top": (n_top, np.array(top)),
        "bands": (n_sample, np.array(bands)),
    }


def check_weights(plan: Plan, layer: fa.ExplainedLayer) -> Columns:
    """Correlation of pattern and mask, below 1 where strokes cross; the nearest feature, cosine."""
    d_sae = len(plan.table)
    expected = [row.sign * plan.own[j] for row, j in zip(plan.table, plan.stroke, strict=True)]
    parts = layer.model, layer.sae, layer.mu, layer.std
    heats = fa.feature_input_patterns(*parts).numpy()
    each = [fa.feature_input_pattern(*parts, k).numpy() for k in range(d_sae)]
    like = [np.corrcoef(heats[k].flat, plan.table[k].mask.flat)[0, 1] for k in range(d_sae)]
    right = equal(expected, heats) & equal(expected, each)
    columns = {"pattern": ([f"{r:.2f}" for r in like], right)}

    unit = plan.decoder / np.linalg.norm(plan.decoder, axis=1, keepdims=True)
    cosines = unit @ unit.T - 3 * np.eye(d_sae)  # below -1: never itself
    named, cosine = fa.nearest_features(layer.sae.W_dec)
    right = equal(cosines.max(1), cosine) & equal(cosines.max(1), cosines[range(d_sae), named])
    pairs = zip(named, cosine, strict=True)
    near = [f"{plan.table[k].name} {c:.2f}" if c else "-" for k, c in pairs]
    return columns | {"nearest": (near, right)}


def check_effects(plan: Plan, images: Tensor, given: tuple) -> Columns:
    """The logit that adding a feature raises most, and the one that removing it lowers most."""
    columns = {}
    for title, name, alpha, few in (
        ("adding", "feature_logit_effect", 1.0, {"n_eval": FEW, "alpha": ALPHA}),
        ("removing", "feature_ablation_effect", None, {"n_eval": FEW}),
    ):
        of_one, of_all = getattr(fa, name), getattr(fa, f"{name}s")
        every, some = of_all(*given), of_all(*given, **few)
        each = [of_one(*given, k) for k in range(len(plan.table))]
        expected = expected_effects(plan, images, N_IMAGES, alpha)
        top = np.where(expected.any(1), expected.argmax(1), -1)  # -1: it changes no image
        right = equal(expected, every.mean_delta) & equal(top, every.top_class)
        right &= equal(expected, np.stack([one.mean_delta for one in each]))
        right &= equal(top, [one.top_class for one in each])
        right &= equal(expected_effects(plan, images, FEW, few.get("alpha")), some.mean_delta)
        most = every.mean_delta.max(1) if alpha else every.mean_delta.min(1)
        columns[title] = [f"{c}: {x:+.2f}" if x else "-" for x, c in zip(*most, strict=True)], right
    return columns


def run_checks(plan: Plan, out: Path) -> Columns:
    """Analyze the planted features and draw them into `out`."""
    layer, (images, labels) = plant(plan), draw_scene(plan)
    loader = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    weights = layer.sae, layer.mu, layer.std
    given = layer.model, loader, *weights
    bank = fa.collect_feature_bank(*given, topk=TOPK)
    first = fa.collect_feature_bank(layer.model, loader[:2], *weights, TOPK)
    rest = fa.collect_feature_bank(layer.model, loader[2:], *weights, TOPK, 2 * BATCH)
    merged = fa.merge_feature_banks(first, rest)
    columns = check_bank(plan, images, labels.numpy(), bank)
    right = [right for _, right in check_bank(plan, images, labels.numpy(), merged).values()]
    columns["merged"] = merged.n_active.tolist(), np.all(right, axis=0)
    columns |= check_weights(plan, layer) | check_effects(plan, images, given)

    out.mkdir(parents=True, exist_ok=True)
    added, removed = fa.feature_logit_effects(*given), fa.feature_ablation_effects(*given)
    for k, heat in enumerate(fa.feature_input_patterns(layer.model, *weights)):
        effects, path = (added.mean_delta[k], removed.mean_delta[k]), f"{out}/feature_{k}"
        fa.show_feature_gallery(k, bank, images, f"{path}_gallery.png")
        fa.visualize_feature_pattern(heat, k, f"{path}_pattern.png", images.amax((0, 1)) > 0)
        show_feature_panel(k, bank, images, heat, *effects, f"{path}_panel.png")
    return columns


def print_table(columns: Columns) -> None:
    rows = [["feature", *columns]]
    for k, planted in enumerate(PLANTED):
        cells = [f"{found[k]} {'ok' if right[k] else 'FAIL'}" for found, right in columns.values()]
        rows.append([f"{k} {planted.name}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default="demo_pictures", help="folder for the pictures")
    out = parser.parse_args(argv).out
    try:
        columns = run_checks(Plan(PLANTED), out)
    except OSError as error:
        print(f"cannot write into {out}: {error.strerror}; give another --out", file=sys.stderr)
        return 2
    print_table(columns)
    right = np.array([right for _, right in columns.values()])
    print(f"\n{right.sum()} checks passed, {(~right).sum()} failed; pictures in {out}")
    return 0 if right.all() else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    sys.exit(main())
