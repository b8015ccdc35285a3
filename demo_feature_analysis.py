"""Show on planted features that feature_analysis finds what is there: no training, no data, a few seconds.

    python demo_feature_analysis.py               # pictures go to demo_pictures/
    python demo_feature_analysis.py --out DIR     # or elsewhere

The table PLANTED lists pen strokes. `plant` sets the weights of a classifier and of a JumpReLU SAE by hand so that each
row is one feature; `draw_scene` draws images of those strokes. What feature_analysis must answer then follows from the
table, by closed forms and plain loops that use nothing of the functions they check; each check is one line of output.
Exit status: 0, 1 when a check failed, 2 when the pictures cannot be written.

How it is wired. The presence p of a stroke is the mean ink of its own pixels, those of no other stroke, or 1 minus that
for a feature that stands for its absence. It moves two hidden units, `on` up and `off` down:

    on  = REST_ON + strength p                      relu(on) raises the logit of the class it `pushes`
    off = FALL strength (REST_OFF - p - LEAK stain) relu(off), that of the class it is `against`, until ReLU cuts it off
    stain = mean ink of a stain on the paper        a unit that no feature of the SAE writes to: part of the SAE's error

Feature k is f = scale[k] p where p > fires_above, else 0; its decoder row moves `on` and `off` and has length 1. A twin
reads another feature's stroke; so far as its row differs from the other's, it moves a `spare` unit, which rests at 1.

Dimension key: N images, S strokes, C classes, d_sae features, d_in = 2 S + 2 units in the order on, off, stain, spare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa

# ---------------------------------------------------------------------------------------------------------------------
# What is planted: add a row to plant another feature
# ---------------------------------------------------------------------------------------------------------------------

SIDE = 28
ROW, COL = np.mgrid[:SIDE, :SIDE]
RADIUS = np.hypot(ROW - 13.5, COL - 13.5)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(28, 28) bool, True on rows top..bottom and columns left..right, all included."""
    return (top <= ROW) & (bottom >= ROW) & (left <= COL) & (right >= COL)


class Planted(NamedTuple):
    """One feature of the SAE and the stroke it stands for."""

    name: str
    mask: np.ndarray  # pixels of the stroke, (28, 28) bool; some must belong to no other stroke
    pushes: int  # class whose logit it raises
    against: int  # class whose logit it lowers
    strength: float  # how far a full stroke moves its `on` unit
    fires_above: float = 0.3  # presence; drawn ink is 0, 0.45 to 0.65 or 0.8 to 1, so stay clear of these
    sign: int = 1  # -1: it stands for the absence of the stroke
    twin_of: str = ""  # name of the feature whose stroke it reads too; make a twin with _replace, like RING's
    cosine: float = 1.0  # of a twin's decoder row with the other's


RING = Planted("ring", (RADIUS > 5) & (RADIUS < 6.9), pushes=3, against=4, strength=1.5)
PLANTED = (
    Planted("vertical bar", box(3, 24, 4, 5), pushes=1, against=2, strength=1.0),
    Planted("horizontal bar", box(4, 5, 3, 24), pushes=2, against=3, strength=1.2),
    RING,
    RING._replace(name="strong ring", fires_above=0.72, twin_of="ring", cosine=0.95),
    Planted("diagonal", (abs(COL - ROW - 11) < 1.5) & box(7, 24, 3, 24), pushes=4, against=5, strength=0.8),
    Planted("corner", box(23, 24, 15, 24) | box(15, 24, 23, 24), pushes=5, against=1, strength=1.1),
    Planted("dot", box(22, 24, 12, 13), pushes=1, against=5, strength=0.9),
    Planted("empty centre", RADIUS < 3.4, pushes=0, against=3, strength=1.3, fires_above=0.75, sign=-1),
    Planted("dead dash", box(18, 20, 19, 21), pushes=2, against=4, strength=1.4, fires_above=9.0),  # out of reach
)
N_CLASSES = 6  # class 0 is an image without strokes
STAIN, STAIN_CLASS, STAIN_WEIGHT = box(21, 24, 7, 9), 5, 0.7  # what the stain does to the logits
SPARE_CLASS, SPARE_WEIGHT = 0, 0.5  # what the spare unit does to them
REST_ON, REST_OFF, LEAK, FALL = 0.5, 0.8, 0.9, 0.8  # constants of the equations above
IMAGES_PER_STROKE, STROKES_PER_IMAGE = 30, 2  # N = 30 S; strokes on an image, on average
TOPK, BATCH, FEW = 20, 50, 25  # strongest images kept; images in a batch; n_eval where it is to cut something off
TOLERANCE = 1e-4  # of the largest value: float32 against float64


class Plan(NamedTuple):
    """All that follows from a table before any weight is set."""

    table: Sequence[Planted]
    masks: np.ndarray  # (S + 1, 28, 28) bool, the stain last
    own: np.ndarray  # (S + 1, 28, 28) bool, pixels of one stroke alone
    stroke: list[int]  # (d_sae,) the stroke each feature reads
    scale: np.ndarray  # (d_sae,) activation of a full stroke
    mu: np.ndarray  # (d_in,)
    std: np.ndarray  # (d_in,)

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.table]


def make_plan(table: Sequence[Planted]) -> Plan:
    """Raises ValueError when a stroke has no pixel of its own."""
    strokes = [row for row in table if not row.twin_of]
    masks = np.stack([row.mask for row in strokes] + [STAIN])
    own = masks & (masks.sum(0) == 1)
    for row, pixels in zip(strokes, own, strict=False):
        if not pixels.any():
            raise ValueError(f"every pixel of {row.name!r} belongs to another stroke too: move one of them")
    unit = np.arange(2 * len(strokes) + 2)
    mu, std = 2 * (unit * 0.4142 % 1) - 1.2, 0.45 + 1.5 * (unit * 0.618 % 1)  # all different, so that a slip shows
    stroke = [[other.name for other in strokes].index(row.twin_of or row.name) for row in table]
    length = [np.hypot(1 / std[j], FALL / std[len(strokes) + j]) for j in stroke]
    return Plan(table, masks, own, stroke, np.array([row.strength for row in table]) * length, mu, std)


class PlantedClassifier(NamedTuple):
    """logits = W2 relu(z) + b2 with z = W1 x + b1."""

    W1: Tensor  # (d_in, 784)
    b1: Tensor  # (d_in,)
    W2: Tensor  # (C, d_in)
    b2: Tensor  # (C,)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, 1, 28, 28) -> z (B, d_in)"""
        return images.flatten(1) @ self.W1.T + self.b1

    def logits_from_preactivations(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> logits (B, C)"""
        return z.relu() @ self.W2.T + self.b2


class PlantedSAE(NamedTuple):
    """f = pre 1[pre > threshold] with pre = z W_enc + b_enc; z_hat = f W_dec + b_dec."""

    W_enc: Tensor  # (d_in, d_sae)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in)
    b_dec: Tensor  # (d_in,)
    threshold: Tensor  # (d_sae,)

    def encode(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> feature_acts (B, d_sae)"""
        pre = z @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts (B, d_sae) -> z_hat (B, d_in)"""
        return feature_acts @ self.W_dec + self.b_dec


def plant(plan: Plan) -> tuple[PlantedClassifier, PlantedSAE, Tensor, Tensor]:
    """The classifier, the SAE, mu (d_in,) and std (d_in,), all float32."""
    d_in, d_sae = len(plan.mu), len(plan.table)
    stain, spare = d_in - 2, d_in - 1
    W1, rest, W2 = np.zeros((d_in, SIDE, SIDE)), np.zeros(d_in), np.zeros((N_CLASSES, d_in))
    read, write = np.zeros((d_in, d_sae)), np.zeros((d_sae, d_in))  # encoder and decoder of z before standardising
    W1[stain], W2[STAIN_CLASS, stain] = plan.own[-1] / plan.own[-1].sum(), STAIN_WEIGHT
    rest[spare], W2[SPARE_CLASS, spare] = 1.0, SPARE_WEIGHT
    b1 = rest.copy()
    for k, (row, j, scale) in enumerate(zip(plan.table, plan.stroke, plan.scale, strict=True)):
        pair = [j, len(plan.own) - 1 + j]  # the units on and off
        moves = row.strength * np.array([1, -FALL])
        W1[pair] = moves[:, None, None] * row.sign * plan.own[j] / plan.own[j].sum()
        W1[pair[1]] += moves[1] * LEAK * W1[stain]
        rest[pair] = REST_ON, -moves[1] * REST_OFF  # z where p = 0 ...
        b1[pair] = rest[pair] + (row.sign < 0) * moves  # ... and where there is no ink
        W2[[row.pushes, row.against], pair] = 1.0
        read[pair, k], read[stain, k] = scale / 2 / moves, -scale / 2 * LEAK  # the latter takes the stain out of `off`
        write[k, pair], write[k, spare] = row.cosine / scale * moves, (1 - row.cosine**2) ** 0.5 * plan.std[spare]
    model = (W1.reshape(d_in, -1), b1, W2, np.linspace(-0.3, 0.3, N_CLASSES))
    sae = (read * plan.std[:, None], (plan.mu - rest) @ read, write / plan.std, (rest - plan.mu) / plan.std)
    threshold = plan.scale * [row.fires_above for row in plan.table]
    weights = [torch.tensor(array, dtype=torch.float32) for array in (*model, *sae, threshold, plan.mu, plan.std)]
    return PlantedClassifier(*weights[:4]), PlantedSAE(*weights[4:9]), weights[9], weights[10]


class Scene(NamedTuple):
    """Images and the recipe they were drawn by."""

    images: Tensor  # (N, 1, 28, 28) in [0, 1]
    labels: Tensor  # (N,) class pushed by the darkest stroke, not counting those that stand for absence; 0 without any
    ink: Tensor  # (N, S), 0 where the stroke was not drawn

    def batches(self, first: int = 0, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Images first to last - 1 as a loader."""
        chosen = slice(first, last)
        return list(zip(self.images[chosen].split(BATCH), self.labels[chosen].split(BATCH), strict=True))


def draw_scene(plan: Plan, seed: int = 0) -> Scene:
    """Strokes at random in weak or strong ink, half of the images stained, a little noise; every twentieth is blank."""
    strokes = [row for row in plan.table if not row.twin_of]
    s, n = len(strokes), IMAGES_PER_STROKE * len(strokes)
    generator = torch.Generator().manual_seed(seed)
    drawn, strong, shade = torch.rand(3, n, s + 1, generator=generator)  # the last column is the stain
    noise = 0.03 * torch.randn(n, SIDE, SIDE, generator=generator) * torch.tensor(box(2, 25, 2, 25))
    ink = torch.where(strong < 0.5, 0.45, 0.8) + 0.2 * shade
    ink[drawn > torch.tensor([STROKES_PER_IMAGE / s] * s + [0.5])] = 0
    ink[19::20], noise[19::20] = 0, 0
    images = torch.stack([(one[:, None, None] * torch.tensor(plan.masks)).amax(0) for one in ink])
    darkest = (ink[:, :s] * torch.tensor([row.sign > 0 for row in strokes])).max(1)
    labels = torch.tensor([row.pushes for row in strokes])[darkest.indices]
    labels[darkest.values == 0] = 0
    return Scene((images + noise).clamp(0, 1)[:, None], labels, ink[:, :s])


# ---------------------------------------------------------------------------------------------------------------------
# What must come out, by closed forms and plain loops
# ---------------------------------------------------------------------------------------------------------------------


class ByHand(NamedTuple):
    """What the plan says about the images and the features."""

    fires: np.ndarray  # (N, d_sae) bool, from the recipe
    presence: np.ndarray  # (N, d_sae), from the pixels, because noise moves it a little
    acts: np.ndarray  # (N, d_sae) activations
    stain: np.ndarray  # (N,)
    patterns: np.ndarray  # (d_sae, 28, 28): a feature's scale, spread evenly over the stroke's own pixels
    cosines: np.ndarray  # (d_sae, d_sae) between decoder rows; -2 of a row with itself


def work_out(plan: Plan, scene: Scene) -> ByHand:
    pictures, signs = scene.images[:, 0].tolist(), np.array([row.sign for row in plan.table])
    measured = []  # mean ink of each stroke's own pixels, (S + 1, N)
    for own in plan.own:
        pixels = [(int(r), int(c)) for r, c in np.argwhere(own)]
        measured.append([sum(picture[r][c] for r, c in pixels) / len(pixels) for picture in pictures])
    planned, presence = (
        (signs < 0) + signs * ink[:, plan.stroke] for ink in (scene.ink.numpy(), np.transpose(measured))
    )
    fires = planned > [row.fires_above for row in plan.table]
    patterns = [s * a * plan.own[j] / plan.own[j].sum() for s, a, j in zip(signs, plan.scale, plan.stroke, strict=True)]
    cosines = -2 * np.eye(len(plan.table))
    for a, b in np.argwhere(cosines == 0):
        x, y = plan.table[a].cosine, plan.table[b].cosine
        cosines[a, b] = (plan.stroke[a] == plan.stroke[b]) * x * y + ((1 - x**2) * (1 - y**2)) ** 0.5
    return ByHand(fires, presence, fires * presence * plan.scale, np.array(measured[-1]), np.stack(patterns), cosines)


def relu_step(before: np.ndarray | float, step: np.ndarray | float) -> float:
    """Mean of relu(before + step) - relu(before)."""
    return float(np.mean(np.maximum(0, before + step) - np.maximum(0, before)))


def effects_by_hand(plan: Plan, hand: ByHand, kind: str, n_eval: int, alpha: float = 1.0) -> np.ndarray:
    """(d_sae, C) mean change of the logits. "ablation": each feature removed from the first n_eval images that fire it;
    "logit": alpha of it added to the first n_eval images."""
    effects = np.zeros((len(plan.table), N_CLASSES))
    for k, row in enumerate(plan.table):
        at = np.flatnonzero(hand.fires[:, k] | (kind == "logit"))[:n_eval]
        if len(at) == 0:
            continue
        step = -hand.acts[at, k] if kind == "ablation" else alpha  # in units of activation
        moved = row.strength * row.cosine * step / plan.scale[k]  # of `on`
        off = FALL * row.strength * (REST_OFF - hand.presence[at, k] - LEAK * hand.stain[at])
        effects[k, row.pushes] += relu_step(REST_ON + row.strength * hand.presence[at, k], moved)
        effects[k, row.against] += relu_step(off, -FALL * moved)
        effects[k, SPARE_CLASS] += SPARE_WEIGHT * relu_step(1.0, (1 - row.cosine**2) ** 0.5 * plan.std[-1] * step)
    return effects


def roughness_by_hand(picture: np.ndarray) -> float:
    """Mean squared step to the next pixel, down and right, over twice the mean square of `picture` (H, W)."""
    height, width = picture.shape
    down = [(picture[r + 1, c] - picture[r, c]) ** 2 for r in range(height - 1) for c in range(width)]
    right = [(picture[r, c + 1] - picture[r, c]) ** 2 for r in range(height) for c in range(width - 1)]
    power = sum(value**2 for value in picture.flat) / picture.size
    return float(np.mean(down) + np.mean(right)) / (4 * power)


def bands_by_hand(activations: Sequence[float]) -> list[float]:
    """Five values spread over each quarter of the sorted `activations`; 0 where a quarter has fewer."""
    ranked, shown, start = sorted(activations, reverse=True), [], 0
    for band in range(4):
        size = len(ranked) // 4 + (band < len(ranked) % 4)
        places = [round(i * (size - 1) / max(1, min(5, size) - 1)) for i in range(min(5, size))]
        shown += [ranked[start + place] for place in places] + [0.0] * (5 - len(places))
        start += size
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One line of the table. It shows the worst value, or the largest one when all agree."""

    what: str
    where: str
    expected: str
    found: str
    ok: bool


def compare(what: str, names: Sequence[str], expected, found) -> Check:
    """`found` against `expected`, two arrays of one shape whose first axis is named by `names`."""
    expected, found = (np.asarray(values, dtype=np.float64) for values in (expected, found))
    if expected.shape != found.shape:
        return Check(what, "shape", str(expected.shape), str(found.shape), False)
    off = np.nan_to_num(abs(found - expected), nan=np.inf)
    ok = bool(off.max() <= TOLERANCE * abs(expected).max())
    worst = np.unravel_index(np.argmax(abs(expected) if ok else off), off.shape)
    where = names[worst[0]] + (f" {[int(i) for i in worst[1:]]}" if len(worst) > 1 else "")
    return Check(what, where, f"{expected[worst]:.5g}", f"{found[worst]:.5g}", ok)


def bank_checks(source: str, plan: Plan, scene: Scene, hand: ByHand, bank: fa.FeatureBank) -> Iterator[Check]:
    """Everything in a bank that was collected over the whole scene."""
    names, labels, acts = plan.names, scene.labels.numpy(), hand.acts.T
    n_active, held = hand.fires.sum(0), bank.top.index.numpy() >= 0
    histogram = [[np.sum(fires & (labels == label)) for label in range(N_CLASSES)] for fires in hand.fires.T]
    mean = acts.sum(1) / n_active.clip(1)
    strongest = -np.sort(-acts, axis=1)[:, :TOPK]  # (d_sae, TOPK), 0 where there are no more
    at_top = np.take_along_axis(acts, bank.top.index.numpy().clip(0), 1) * held
    distinct = [len(set(bank.top.of(k).index.tolist())) for k in range(len(names))]
    yield compare(f"{source}: share of images that fire it", names, n_active / len(labels), bank.feature_density)
    yield compare(f"{source}: images that fire it, by label", names, histogram, bank.label_histogram)
    yield compare(f"{source}: mean activation", names, mean, bank.mean_activation_when_active)
    yield compare(f"{source}: strongest activations", names, strongest, bank.top.activation)
    yield compare(f"{source}: activation of the images named", names, strongest, at_top)
    yield compare(f"{source}: how many images, all different", names, n_active.clip(max=TOPK), distinct)
    yield compare(f"{source}: their labels", names, np.where(held, labels[bank.top.index], -1), bank.top.label)


def band_checks(plan: Plan, hand: ByHand, bank: fa.FeatureBank) -> Iterator[Check]:
    """Bands are exact for features that fire on few images; of all, the examples must be what they claim to be."""
    shown, true = np.zeros((2, len(plan.table), 20))  # 4 bands of 5
    for k, place in np.ndindex(shown.shape):
        band = bank.bands(k)[place // 5]
        if place % 5 < len(band.index):
            shown[k, place] = band.activation[place % 5]
            true[k, place] = hand.acts[band.index[place % 5], k]
    few = np.flatnonzero(hand.fires.sum(0) <= fa.SAMPLE_PER_FEATURE)
    quarters = [bands_by_hand(hand.acts[hand.fires[:, k], k].tolist()) for k in few]
    yield compare("bands: quarters of the active range", [plan.names[k] for k in few], quarters, shown[few])
    yield compare("bands: activation of the images named", plan.names, true, shown)


def pattern_checks(plan: Plan, scene: Scene, hand: ByHand, planted: tuple) -> Iterator[Check]:
    """Input patterns one by one, all at once and averaged over images, and how rough they are."""
    names, expected = plan.names, hand.patterns
    single = torch.stack([fa.feature_input_pattern(*planted, k) for k in range(len(names))])
    averaged = fa.feature_input_patterns(*planted, images=scene.images[:FEW])
    yield compare("feature_input_pattern", names, expected, single)
    yield compare("feature_input_patterns", names, expected, fa.feature_input_patterns(*planted))
    yield compare("feature_input_patterns: over images", names, expected, averaged)
    chessboard = (-1.0) ** (ROW + COL)
    found = fa.pattern_roughness(torch.tensor(np.stack([*expected, chessboard, chessboard**2, 0 * chessboard])))
    roughness = [*map(roughness_by_hand, expected), 2, 0, 0]
    yield compare("pattern_roughness", [*names, "chessboard", "constant", "nothing"], roughness, found)


def effect_checks(plan: Plan, scene: Scene, hand: ByHand, planted: tuple) -> Iterator[Check]:
    """Effects of adding and of removing each feature: one by one, all at once, over few images."""
    model, *rest = planted
    args, names, n_active = (model, scene.batches(), *rest), plan.names, hand.fires.sum(0)
    raised = {
        "logit": [row.pushes for row in plan.table],
        "ablation": np.where(n_active > 0, [row.against for row in plan.table], -1),
    }
    for kind, few in (("logit", {"n_eval": FEW, "alpha": 3.0}), ("ablation", {"n_eval": FEW})):
        one, every = getattr(fa, f"feature_{kind}_effect"), getattr(fa, f"feature_{kind}_effects")
        expected, expected_few = (effects_by_hand(plan, hand, kind, **n) for n in ({"n_eval": len(hand.fires)}, few))
        found, found_few = every(*args), every(*args, **few)
        words = ", ".join(f"{name}={value:g}" for name, value in few.items())
        deltas, tops = zip(*(one(*args, k) for k in range(len(names))), strict=True)
        yield compare(f"feature_{kind}_effect", names, expected, torch.stack(deltas))
        yield compare(f"feature_{kind}_effect: class raised most", names, raised[kind], tops)
        yield compare(f"feature_{kind}_effects", names, expected, found.mean_delta)
        yield compare(f"feature_{kind}_effects: class raised most", names, raised[kind], found.top_class)
        yield compare(f"feature_{kind}_effects: {words}", names, expected_few, found_few.mean_delta)
    yield compare("feature_ablation_effects: images", names, n_active, found.n_images)


def neighbour_checks(plan: Plan, hand: ByHand, sae: PlantedSAE) -> Iterator[Check]:
    """The nearest feature; where several are equally near, any of them."""
    nearest, expected = fa.nearest_features(sae.W_dec), hand.cosines.max(1)
    chosen = hand.cosines[np.arange(len(expected)), nearest.feature]
    yield compare("nearest_features: cosine", plan.names, expected, nearest.cosine)
    yield compare("nearest_features: cosine of the one named", plan.names, expected, chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Statements about strokes: 15 places, each in four orientations, in four models
# ---------------------------------------------------------------------------------------------------------------------

ORIENTATIONS = ("horizontal", "vertical", "rising", "falling")
CENTRES = [(r, c) for r in (3, 10, 17, 24) for c in (3, 10, 17, 24) if (r, c) != (24, 10)]  # there the stain is
N_LABELLED = 2400  # images to propose from, and as many others to test on
OWN_CLASS, OTHER_CLASS = 0.35, 0.05  # how often a stroke is drawn on images of the class it pushes, and on others
NEAR = 4.0  # pixels by which a place may be off its stroke's centre


def stroke_table(turn: int) -> list[Planted]:
    """One stroke at each of CENTRES; `turn` turns them all by so many orientations."""
    table = []
    for k, (r, c) in enumerate(CENTRES):
        orientation, near = ORIENTATIONS[(k + k // 4 + turn) % 4], box(r - 3, r + 3, c - 3, c + 3)
        mask = {
            "horizontal": box(r, r + 1, c - 3, c + 3),
            "vertical": box(r - 3, r + 3, c, c + 1),
            "rising": near & (abs(ROW - r + COL - c - 0.5) < 1),
            "falling": near & (abs(ROW - r - COL + c - 0.5) < 1),
        }[orientation]
        against = (k + 1 + k // N_CLASSES) % N_CLASSES  # k // N_CLASSES is at most 2: never the class it pushes
        table.append(
            Planted(f"{orientation} {k}", mask, pushes=k % N_CLASSES, against=against, strength=0.8 + 0.04 * k)
        )
    return table


def draw_labelled(plan: Plan, seed: int) -> Scene:
    """Images of a class each, on which the strokes that push it are frequent; half of them stained, a little noise."""
    generator, s = torch.Generator().manual_seed(seed), len(plan.table)
    labels = torch.randint(N_CLASSES, (N_LABELLED,), generator=generator)
    own = labels[:, None] == torch.tensor([row.pushes for row in plan.table])
    drawn, strong, shade = torch.rand(3, N_LABELLED, s + 1, generator=generator)  # the last column is the stain
    noise = 0.03 * torch.randn(N_LABELLED, SIDE, SIDE, generator=generator) * torch.tensor(box(2, 25, 2, 25))
    ink = torch.where(strong < 0.5, 0.45, 0.8) + 0.2 * shade
    often = torch.where(own, OWN_CLASS, OTHER_CLASS)
    ink[drawn > torch.cat([often, torch.full((N_LABELLED, 1), 0.5)], 1)] = 0
    images = torch.stack([(one[:, None, None] * torch.tensor(plan.masks)).amax(0) for one in ink])
    return Scene((images + noise).clamp(0, 1)[:, None], labels, ink[:, :s])


class Statements(NamedTuple):
    """What came of the planted strokes of one model, (15,) bool each, and of null features, (n,) bool each."""

    right: dict[str, list[bool]]
    null_confirmed: dict[str, list[bool]]


def try_statements(turn: int) -> Statements:
    """Propose on one scene, test on another; then the same statements where chance alone can confirm them."""
    plan = make_plan(stroke_table(turn))
    (model, *rest), seen, unseen = plant(plan), draw_labelled(plan, turn), draw_labelled(plan, 100 + turn)
    hypotheses = fa.propose_hypotheses(model, seen.images, seen.labels, *rest)

    def judged(claims: list, activity: fa.Activity | None = None) -> list[fa.Judgement]:
        found = fa.test_hypotheses(claims, model, unseen.images, unseen.labels, *rest, activity, n_bootstrap=0)
        return fa.judge_hypotheses(claims, found)

    right: dict[str, list[bool]] = {"class": [], "place": [], "orientation": [], "effect": [], "confirmed": []}
    for h, j, row, (r, c) in zip(hypotheses, judged(hypotheses), plan.table, CENTRES, strict=True):
        place = h.stroke.places[0] if h.stroke else fa.Place(-SIDE, -SIDE, "none", 0)
        right["class"].append(h.labels == (row.pushes,))
        right["place"].append(bool(np.hypot(place.row - r, place.col - c) <= NEAR))
        right["orientation"].append(place.shape == row.name.split()[0])
        right["effect"].append(h.effect is not None and h.effect[::2] == (row.pushes, row.against))
        right["confirmed"].append(j.all_three)
    n, activity = len(hypotheses), fa.collect_activity(model, unseen.images, unseen.labels, *rest)
    swapped = [[h._replace(feature=(h.feature + shift) % n) for h in hypotheses] for shift in (1, 2, 4)]
    nulls = {
        "explanations swapped": [j for claims in swapped for j in judged(claims)],
        "activations shuffled": [j for s in range(2) for j in judged(hypotheses, fa.shuffled(activity, s))],
    }
    return Statements(right, {name: [j.verdict == fa.CONFIRMED for j in found] for name, found in nulls.items()})


def share_check(what: str, outcomes: Sequence[bool], least: float = 0.0, most: float = 1.0) -> Check:
    share = float(np.mean(outcomes))
    expected = f">= {least:.0%}" if least else f"<= {most:.0%}"
    return Check(what, f"{len(outcomes)} features", expected, f"{share:.1%}", least <= share <= most)


def statement_checks() -> Iterator[Check]:
    """Whether statements about planted strokes are right and confirmed, and those about null features are not."""
    tried = [try_statements(turn) for turn in range(len(ORIENTATIONS))]
    for name in tried[0].right:
        yield share_check(f"statements: {name}", [right for t in tried for right in t.right[name]], least=0.95)
    together = [all(one) for t in tried for one in zip(*t.right.values(), strict=True)]
    yield share_check("statements: all of these", together, least=0.95)
    for name in tried[0].null_confirmed:
        nulls = [confirmed for t in tried for confirmed in t.null_confirmed[name]]
        yield share_check(f"null statements confirmed: {name}", nulls, most=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_pictures(plan: Plan, scene: Scene, planted: tuple, bank: fa.FeatureBank, out: Path) -> None:
    """Gallery, pattern and panel of every feature. Raises OSError when `out` cannot be written."""
    model, *rest = planted
    args, inked = (model, scene.batches(), *rest), scene.images.amax((0, 1)) > 0
    heats = fa.feature_input_patterns(*planted)
    added, removed = fa.feature_logit_effects(*args).mean_delta, fa.feature_ablation_effects(*args).mean_delta
    fa.write_feature_pictures(out, range(len(plan.table)), bank, scene.images, heats, inked)
    for k, (heat, *effects) in enumerate(zip(heats, added, removed, strict=True)):
        fa.show_feature_panel(k, bank, scene.images, heat, *effects, out / f"feature_{k}_panel.png", inked)
    fa.show_feature_gallery(0, bank, scene.images, out / "single_gallery.png")
    fa.visualize_feature_pattern(heats[0], 0, inked=inked).savefig(out / "single_pattern.png")


def shows_first(picture: np.ndarray, image: np.ndarray) -> bool:
    """Whether the first framed tile of the grey `picture` (height, width) is `image` (28, 28), both in [0, 1]."""
    size, zoom, frame = fa.TILE, fa.TILE // SIDE, abs(picture - fa.FRAME / 255) < 0.01
    corners = np.argwhere(np.lib.stride_tricks.sliding_window_view(frame, size + 2, axis=1).all(-1))
    if len(corners) == 0:
        return False
    top, left = corners[0] + 1
    tile = picture[top : top + size : zoom, left : left + size : zoom]
    return bool(abs(tile - (1 - image)).max() < 0.01)


def red_less_blue(picture: np.ndarray) -> float:
    """Image pixels in full red minus those in full blue, in the picture (height, width, 4) of a pattern."""
    without_scale = picture[:, : fa.MARGIN + fa.PATTERN]
    redness = without_scale[:, :, 0] - without_scale[:, :, 2]
    return (np.sum(redness > 0.2) - np.sum(redness < -0.2)) / (fa.PATTERN // SIDE) ** 2


def picture_checks(plan: Plan, scene: Scene, hand: ByHand, out: Path) -> Iterator[Check]:
    """What the files in `out` show: the strongest image, and the pattern's pixels in the colour of their sign."""
    stems = [f"feature_{k}" for k in range(len(plan.table))]
    strongest, fires = scene.images[:, 0].numpy()[hand.acts.argmax(0)], hand.fires.any(0)
    for function, files in (
        ("write_feature_pictures", [f"{stem}_gallery.png" for stem in stems]),
        ("show_feature_panel", [f"{stem}_panel.png" for stem in stems]),
        ("show_feature_gallery", ["single_gallery.png"]),
    ):
        pictures = [matplotlib.image.imread(out / file)[:, :, 0] for file in files]
        found = [shows_first(picture, image) for picture, image in zip(pictures, strongest, strict=False)]
        yield compare(f"{function}: strongest image comes first", plan.names, fires[: len(files)], found)
    pixels = [row.sign * plan.own[j].sum() for row, j in zip(plan.table, plan.stroke, strict=True)]
    for function, files in (
        ("write_feature_pictures", [f"{stem}_pattern.png" for stem in stems]),
        ("visualize_feature_pattern", ["single_pattern.png"]),
    ):
        found = [red_less_blue(matplotlib.image.imread(out / file)) for file in files]
        yield compare(f"{function}: red less blue pixels", plan.names, pixels[: len(files)], found)
    stored = np.stack([np.load(out / f"{stem}_pattern.npy") for stem in stems])
    yield compare("write_feature_pictures: stored gradient", plan.names, hand.patterns, stored)


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def run_checks(plan: Plan, out: Path) -> Iterator[Check]:
    """Analyse the planted features, draw them into `out`, compare. Raises OSError when `out` cannot be written."""
    scene, planted = draw_scene(plan), plant(plan)
    (model, *rest), hand, cut = planted, work_out(plan, scene), len(scene.labels) // 3
    bank = fa.collect_feature_bank(model, scene.batches(), *rest, topk=TOPK)
    first = fa.collect_feature_bank(model, scene.batches(0, cut), *rest, topk=TOPK)
    second = fa.collect_feature_bank(model, scene.batches(cut), *rest, topk=TOPK, first_index=cut)
    out.mkdir(parents=True, exist_ok=True)
    draw_pictures(plan, scene, planted, bank, out)
    yield from bank_checks("collect_feature_bank", plan, scene, hand, bank)
    yield from bank_checks("merge_feature_banks", plan, scene, hand, fa.merge_feature_banks(first, second))
    yield from band_checks(plan, hand, bank)
    yield from pattern_checks(plan, scene, hand, planted)
    yield from effect_checks(plan, scene, hand, planted)
    yield from neighbour_checks(plan, hand, planted[1])
    yield from statement_checks()
    yield from picture_checks(plan, scene, hand, out)


def print_checks(checks: Sequence[Check], names: Sequence[str]) -> None:
    print("planted: " + ", ".join(f"{k} {name}" for k, name in enumerate(names)) + "\n")
    rows = [("check", "value shown", "expected", "found", "")]
    rows += [(*check[:4], "ok" if check.ok else "FAILED") for check in checks]
    for what, where, expected, found, verdict in rows:
        print(f"{what:<52}  {where:<24}  {expected:>10}  {found:>10}  {verdict}".rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_pictures"), help="folder for the pictures")
    out, plan = parser.parse_args(argv).out, make_plan(PLANTED)
    try:
        checks = list(run_checks(plan, out))
    except OSError as error:
        print(f"cannot write pictures into {out} ({error.strerror}): give another folder with --out", file=sys.stderr)
        return 2
    print_checks(checks, plan.names)
    failed = sum(not check.ok for check in checks)
    print(f"\n{len(checks) - failed} checks passed, {failed} failed; pictures in {out}, see feature_0_panel.png first")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    sys.exit(main())
