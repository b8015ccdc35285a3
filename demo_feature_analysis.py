"""Show on planted features that the analysis finds what is there: no training, no data.

    python demo_feature_analysis.py               # pictures go to demo_pictures/, a few seconds
    python demo_feature_analysis.py --out DIR     # or elsewhere

The table PLANTED lists pen strokes. `plant` sets the weights of a classifier and of a JumpReLU SAE
by hand so that each row is one feature; `draw_scene` draws images of those strokes. What the
analysis must answer then follows from the table, by closed forms and plain loops that use nothing
of the functions they check; each check is one line of output. Exit status: 0, 1 when a check
failed, 2 when the pictures cannot be written.

How it is wired. The presence p of a stroke is the mean ink of its own pixels, those of no other
stroke, or 1 minus that for a feature that stands for its absence. It moves two hidden units, `on`
up and `off` down:

    on  = REST_ON + strength p
    off = FALL strength (REST_OFF - p - LEAK stain)
    stain = mean ink of a stain on the paper

relu(on) raises the logit of the class that the stroke `pushes`, relu(off) that of the class it is
`against`, until ReLU cuts it off. The stain is a unit that no feature of the SAE writes to: part of
the SAE's error.

Feature k is f = scale[k] p where p > fires_above, else 0; its decoder row moves `on` and `off` and
has length 1. A twin reads another feature's stroke; so far as its row differs from the other's, it
moves a `spare` unit, which rests at 1.

Dimension key: N images, S strokes, C classes, d_sae features, d_in = 2 S + 2 units in the order
on, off, stain, spare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
import feature_confirmation as fc
import feature_hypotheses as fh

# --------------------------------------------------------------------------------------------------
# What is planted: add a row to plant another feature
# --------------------------------------------------------------------------------------------------

SIDE = 28
ROW, COL = np.mgrid[:SIDE, :SIDE]
RADIUS = np.hypot(ROW - 13.5, COL - 13.5)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(28, 28) bool, True on rows top..bottom and columns left..right, all included."""
    return (top <= ROW) & (bottom >= ROW) & (left <= COL) & (right >= COL)


class Planted(NamedTuple):
    """One feature of the SAE and the stroke it stands for.

    Drawn ink is 0, 0.45 to 0.65 or 0.8 to 1: let `fires_above` stay clear of these. Make a twin
    with _replace, as RING's is made.
    """

    name: str
    mask: np.ndarray  # (28, 28) bool, pixels of the stroke; some must belong to no other stroke
    pushes: int  # class whose logit it raises
    against: int  # class whose logit it lowers
    strength: float  # how far a full stroke moves its `on` unit
    fires_above: float = 0.3  # presence
    sign: int = 1  # -1: it stands for the absence of the stroke
    twin_of: str = ""  # name of the feature whose stroke it reads too
    cosine: float = 1.0  # of a twin's decoder row with the other's


DIAGONAL = (abs(COL - ROW - 11) < 1.5) & box(7, 24, 3, 24)
CORNER = box(23, 24, 15, 24) | box(15, 24, 23, 24)
CENTRE = RADIUS < 3.4
RING = Planted("ring", (RADIUS > 5) & (RADIUS < 6.9), pushes=3, against=4, strength=1.5)
PLANTED = (
    Planted("vertical bar", box(3, 24, 4, 5), pushes=1, against=2, strength=1.0),
    Planted("horizontal bar", box(4, 5, 3, 24), pushes=2, against=3, strength=1.2),
    RING,
    RING._replace(name="strong ring", fires_above=0.72, twin_of="ring", cosine=0.95),
    Planted("diagonal", DIAGONAL, pushes=4, against=5, strength=0.8),
    Planted("corner", CORNER, pushes=5, against=1, strength=1.1),
    Planted("dot", box(22, 24, 12, 13), pushes=1, against=5, strength=0.9),
    Planted("empty centre", CENTRE, pushes=0, against=3, strength=1.3, fires_above=0.75, sign=-1),
    Planted("dead dash", box(18, 20, 19, 21), 2, 4, strength=1.4, fires_above=9.0),  # out of reach
)
N_CLASSES = 6  # class 0 is an image without strokes
STAIN = box(21, 24, 7, 9)
STAIN_CLASS, STAIN_WEIGHT = 5, 0.7  # what the stain does to the logits
SPARE_CLASS, SPARE_WEIGHT = 0, 0.5  # what the spare unit does to them
REST_ON, REST_OFF, LEAK, FALL = 0.5, 0.8, 0.9, 0.8  # constants of the equations above
IMAGES_PER_STROKE = 30  # N = 30 S
STROKES_PER_IMAGE = 2  # on average
NOISE = 0.03  # standard deviation of the ink
TOPK, BATCH = 20, 50  # strongest images kept; images in a batch
FEW = 25  # n_eval where it is to cut something off
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

    @property
    def strokes(self) -> list[Planted]:
        """(S,) the rows that bring a stroke of their own."""
        return [row for row in self.table if not row.twin_of]

    @property
    def signs(self) -> np.ndarray:
        """(d_sae,) -1 for a feature that stands for an absence"""
        return np.array([row.sign for row in self.table])


def make_plan(table: Sequence[Planted]) -> Plan:
    """Raises ValueError when a stroke has no pixel of its own."""
    strokes = [row for row in table if not row.twin_of]
    masks = np.stack([row.mask for row in strokes] + [STAIN])
    own = masks & (masks.sum(0) == 1)
    for row, pixels in zip(strokes, own[:-1], strict=True):
        if not pixels.any():
            raise ValueError(
                f"every pixel of {row.name!r} belongs to another stroke too: move one of them"
            )

    unit = np.arange(2 * len(strokes) + 2)
    mu = 2 * (unit * 0.4142 % 1) - 1.2  # all different, so that a slip shows
    std = 0.45 + 1.5 * (unit * 0.618 % 1)

    names = [row.name for row in strokes]
    stroke = [names.index(row.twin_of or row.name) for row in table]
    on, off = std[stroke], std[len(strokes) + np.array(stroke)]
    length = np.hypot(1 / on, FALL / off)  # of a decoder row before it is scaled
    strength = np.array([row.strength for row in table])
    return Plan(table, masks, own, stroke, strength * length, mu, std)


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


def as_floats(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32) for array in arrays]


def mean_over(pixels: np.ndarray) -> np.ndarray:
    """Weights that take the mean ink of `pixels` (28, 28) bool."""
    return pixels / pixels.sum()


def moves_of(row: Planted) -> np.ndarray:
    """(2,) how far a full stroke moves its `on` and its `off` unit."""
    return row.strength * np.array([1, -FALL])


def plant_classifier(plan: Plan) -> tuple[PlantedClassifier, np.ndarray]:
    """The classifier, and where z rests (d_in,) without stain and where every presence is 0."""
    d_in, s = len(plan.mu), len(plan.strokes)
    stain, spare = d_in - 2, d_in - 1
    W1 = np.zeros((d_in, SIDE, SIDE))
    W2 = np.zeros((N_CLASSES, d_in))
    rest = np.zeros(d_in)  # z where p is 0 ...
    blank = np.zeros(d_in)  # ... and what a page without ink adds: there an absence is complete

    W1[stain] = mean_over(plan.own[-1])
    W2[STAIN_CLASS, stain] = STAIN_WEIGHT
    rest[spare] = 1.0
    W2[SPARE_CLASS, spare] = SPARE_WEIGHT

    for j, row in enumerate(plan.strokes):
        units = [j, s + j]  # on and off
        moves = moves_of(row)
        W1[units] = moves[:, None, None] * row.sign * mean_over(plan.own[j])
        W1[s + j] += moves[1] * LEAK * W1[stain]
        W2[[row.pushes, row.against], units] = 1.0
        rest[units] = REST_ON, -moves[1] * REST_OFF
        if row.sign < 0:
            blank[units] = moves

    b2 = np.linspace(-0.3, 0.3, N_CLASSES)
    weights = as_floats(W1.reshape(d_in, -1), rest + blank, W2, b2)
    return PlantedClassifier(*weights), rest


def plant_sae(plan: Plan, rest: np.ndarray) -> PlantedSAE:
    """The SAE of a classifier whose preactivations rest at `rest` (d_in,)."""
    d_in, d_sae, s = len(plan.mu), len(plan.table), len(plan.strokes)
    stain, spare = d_in - 2, d_in - 1
    read = np.zeros((d_in, d_sae))  # encoder and decoder of z before it is standardised
    write = np.zeros((d_sae, d_in))

    for k, row in enumerate(plan.table):
        j, scale = plan.stroke[k], plan.scale[k]
        units = [j, s + j]  # on and off: each says half of what p is
        moves = moves_of(row)
        read[units, k] = scale / 2 / moves
        read[stain, k] = -scale / 2 * LEAK  # takes the stain out of `off`
        write[k, units] = row.cosine / scale * moves
        write[k, spare] = (1 - row.cosine**2) ** 0.5 * plan.std[spare]

    W_enc, b_enc = read * plan.std[:, None], (plan.mu - rest) @ read
    W_dec, b_dec = write / plan.std, (rest - plan.mu) / plan.std
    threshold = plan.scale * [row.fires_above for row in plan.table]
    return PlantedSAE(*as_floats(W_enc, b_enc, W_dec, b_dec, threshold))


def plant(plan: Plan) -> fa.ExplainedLayer:
    """The classifier, the SAE, mu (d_in,) and std (d_in,), all float32."""
    model, rest = plant_classifier(plan)
    return fa.ExplainedLayer(model, plant_sae(plan, rest), *as_floats(plan.mu, plan.std))


class Scene(NamedTuple):
    """Images and the recipe they were drawn by."""

    images: Tensor  # (N, 1, 28, 28) in [0, 1]
    labels: Tensor  # (N,) classes
    ink: Tensor  # (N, S), 0 where the stroke was not drawn

    def batches(self, first: int = 0, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Images first to last - 1 as a loader."""
        images, labels = self.images[first:last], self.labels[first:last]
        return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def random_ink(often: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Strokes at random in weak or strong ink, and noise.

    `often` (N, S + 1) is how often each stroke and, last, the stain is drawn. Returns ink
    (N, S + 1), 0 where there is none, and what to add to the pixels, (N, 28, 28).
    """
    n = len(often)
    drawn, strong, shade = torch.rand(3, *often.shape, generator=generator)
    noise = NOISE * torch.randn(n, SIDE, SIDE, generator=generator)
    noise *= torch.tensor(box(2, 25, 2, 25))  # the edge stays blank, as in MNIST

    ink = torch.where(strong < 0.5, 0.45, 0.8) + 0.2 * shade
    ink[drawn > often] = 0
    return ink, noise


def paint(plan: Plan, ink: Tensor, noise: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) of strokes in `ink` (N, S + 1); where two cross, the darker is seen."""
    images = torch.zeros(len(ink), SIDE, SIDE)
    for j, mask in enumerate(plan.masks):
        stroke = ink[:, j, None, None] * torch.tensor(mask)
        images = torch.maximum(images, stroke)
    return (images + noise).clamp(0, 1)[:, None]


def draw_scene(plan: Plan, seed: int = 0) -> Scene:
    """Strokes at random, half of the images stained, a little noise; every twentieth is blank.

    The label is the class that the darkest stroke pushes, not counting those that stand for an
    absence; 0 without any.
    """
    s = len(plan.strokes)
    generator = torch.Generator().manual_seed(seed)
    often = torch.tensor([STROKES_PER_IMAGE / s] * s + [0.5])
    ink, noise = random_ink(often.expand(IMAGES_PER_STROKE * s, s + 1), generator)
    ink[19::20] = 0
    noise[19::20] = 0

    present = torch.tensor([row.sign > 0 for row in plan.strokes])
    darkest = (ink[:, :s] * present).max(1)
    labels = torch.tensor([row.pushes for row in plan.strokes])[darkest.indices]
    labels[darkest.values == 0] = 0
    return Scene(paint(plan, ink, noise), labels, ink[:, :s])


# --------------------------------------------------------------------------------------------------
# What must come out, by closed forms and plain loops
# --------------------------------------------------------------------------------------------------


class ByHand(NamedTuple):
    """What the plan says about the images and the features."""

    fires: np.ndarray  # (N, d_sae) bool, from the recipe
    presence: np.ndarray  # (N, d_sae), from the pixels, because noise moves it a little
    acts: np.ndarray  # (N, d_sae) activations
    stain: np.ndarray  # (N,)
    patterns: np.ndarray  # (d_sae, 28, 28): a feature's scale, spread over the stroke's own pixels
    cosines: np.ndarray  # (d_sae, d_sae) between decoder rows; -2 of a row with itself


def ink_by_hand(images: Tensor, pixels: np.ndarray) -> list[float]:
    """(N,) mean ink of `pixels` (28, 28) bool, one pixel after the other."""
    places = [(int(row), int(col)) for row, col in np.argwhere(pixels)]
    means = []
    for picture in images[:, 0].tolist():
        ink = [picture[row][col] for row, col in places]
        means.append(sum(ink) / len(places))
    return means


def presence_of(plan: Plan, ink: np.ndarray) -> np.ndarray:
    """(N, d_sae) what each feature stands for, by the ink (N, S or more) of each stroke."""
    absent = plan.signs < 0
    return absent + plan.signs * ink[:, plan.stroke]


def cosines_by_hand(plan: Plan) -> np.ndarray:
    """(d_sae, d_sae): a row is its cosine times the stroke's direction, and the rest is spare."""
    cosines = np.full((len(plan.table), len(plan.table)), -2.0)
    for a, b in np.ndindex(cosines.shape):
        x, y = plan.table[a].cosine, plan.table[b].cosine
        same_stroke = plan.stroke[a] == plan.stroke[b]
        if a != b:
            cosines[a, b] = same_stroke * x * y + ((1 - x**2) * (1 - y**2)) ** 0.5
    return cosines


def work_out(plan: Plan, scene: Scene) -> ByHand:
    """All that is known by hand about the plan's features on the scene."""
    measured = np.transpose([ink_by_hand(scene.images, own) for own in plan.own])  # (N, S + 1)
    presence = presence_of(plan, measured)
    fires = presence_of(plan, scene.ink.numpy()) > [row.fires_above for row in plan.table]

    patterns = []
    for k, row in enumerate(plan.table):
        patterns.append(row.sign * plan.scale[k] * mean_over(plan.own[plan.stroke[k]]))
    return ByHand(
        fires=fires,
        presence=presence,
        acts=fires * presence * plan.scale,
        stain=measured[:, -1],
        patterns=np.stack(patterns),
        cosines=cosines_by_hand(plan),
    )


def relu_step(before: np.ndarray | float, step: np.ndarray | float) -> float:
    """Mean of relu(before + step) - relu(before)."""
    return float(np.mean(np.maximum(0, before + step) - np.maximum(0, before)))


def effects_by_hand(
    plan: Plan, hand: ByHand, kind: str, n_eval: int, alpha: float = 1.0
) -> np.ndarray:
    """(d_sae, C) mean change of the logits.

    "ablation": each feature removed from the first n_eval images that fire it; "logit": alpha of it
    added to the first n_eval images.
    """
    effects = np.zeros((len(plan.table), N_CLASSES))
    for k, row in enumerate(plan.table):
        changed = hand.fires[:, k] | (kind == "logit")
        at = np.flatnonzero(changed)[:n_eval]
        if len(at) == 0:
            continue

        step = -hand.acts[at, k] if kind == "ablation" else alpha  # in units of activation
        moved = row.strength * row.cosine * step / plan.scale[k]  # of `on`
        spared = (1 - row.cosine**2) ** 0.5 * plan.std[-1] * step  # of `spare`
        presence = hand.presence[at, k]
        on = REST_ON + row.strength * presence
        off = FALL * row.strength * (REST_OFF - presence - LEAK * hand.stain[at])

        effects[k, row.pushes] += relu_step(on, moved)
        effects[k, row.against] += relu_step(off, -FALL * moved)
        effects[k, SPARE_CLASS] += SPARE_WEIGHT * relu_step(1.0, spared)
    return effects


def roughness_by_hand(picture: np.ndarray) -> float:
    """Mean squared step to the next pixel, down and right, over twice the mean square (H, W)."""
    height, width = picture.shape
    down, right, power = [], [], []
    for r, c in np.ndindex(height, width):
        power.append(picture[r, c] ** 2)
        if r + 1 < height:
            down.append((picture[r + 1, c] - picture[r, c]) ** 2)
        if c + 1 < width:
            right.append((picture[r, c + 1] - picture[r, c]) ** 2)
    return float(np.mean(down) + np.mean(right)) / (4 * float(np.mean(power)))


def bands_by_hand(activations: Sequence[float]) -> list[float]:
    """Five values spread over each quarter of the sorted activations; 0 where it has fewer."""
    ranked = sorted(activations, reverse=True)
    shown = []
    start = 0
    for band in range(4):
        size = len(ranked) // 4 + (band < len(ranked) % 4)
        n = min(5, size)
        for i in range(n):
            place = round(i * (size - 1) / max(1, n - 1))
            shown.append(ranked[start + place])
        shown += [0.0] * (5 - n)
        start += size
    return shown


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One line of the table. It shows the worst value, or the largest one when all agree."""

    what: str
    where: str
    expected: str
    found: str
    ok: bool


def compare(what: str, names: Sequence[str], expected, found) -> Check:
    """`found` against `expected`, two arrays of one shape whose first axis `names` names."""
    expected = np.asarray(expected, dtype=np.float64)
    found = np.asarray(found, dtype=np.float64)
    if expected.shape != found.shape:
        return Check(what, "shape", str(expected.shape), str(found.shape), False)

    off = np.nan_to_num(abs(found - expected), nan=np.inf)
    ok = bool(off.max() <= TOLERANCE * abs(expected).max())
    told = abs(expected) if ok else off
    worst = np.unravel_index(np.argmax(told), off.shape)
    where = names[worst[0]]
    if len(worst) > 1:
        where += f" {[int(i) for i in worst[1:]]}"
    return Check(what, where, f"{expected[worst]:.5g}", f"{found[worst]:.5g}", ok)


def count_labels(fires: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(d_sae, C) how many of the images that fire a feature (N, d_sae) carry each label (N,)."""
    counts = np.zeros((fires.shape[1], N_CLASSES))
    for k, label in np.ndindex(counts.shape):
        counts[k, label] = np.sum(fires[:, k] & (labels == label))
    return counts


def bank_checks(
    source: str, plan: Plan, scene: Scene, hand: ByHand, bank: fa.FeatureBank
) -> Iterator[Check]:
    """Everything in a bank that was collected over the whole scene by `source`."""
    labels, acts = scene.labels.numpy(), hand.acts.T
    n_active = hand.fires.sum(0)
    named = bank.top.index.numpy()
    held = named >= 0

    def check(what: str, expected, found) -> Check:
        return compare(f"{source}: {what}", plan.names, expected, found)

    yield check("share of images that fire it", n_active / len(labels), bank.feature_density)
    histogram = count_labels(hand.fires, labels)
    yield check("images that fire it, by label", histogram, bank.label_histogram)
    mean = acts.sum(1) / n_active.clip(1)
    yield check("mean activation", mean, bank.mean_activation_when_active)

    strongest = -np.sort(-acts, axis=1)[:, :TOPK]  # (d_sae, TOPK), 0 where there are no more
    yield check("strongest activations", strongest, bank.top.activation)
    of_those_named = np.take_along_axis(acts, named.clip(0), 1) * held
    yield check("activation of the images named", strongest, of_those_named)
    distinct = [len(set(bank.top.of(k).index.tolist())) for k in range(len(plan.table))]
    yield check("how many images, all different", n_active.clip(max=TOPK), distinct)
    yield check("their labels", np.where(held, labels[named], -1), bank.top.label)


def band_checks(plan: Plan, hand: ByHand, bank: fa.FeatureBank) -> Iterator[Check]:
    """Bands are exact for features that fire on few images; all examples are what they claim."""
    shown = np.zeros((len(plan.table), 20))  # 4 bands of 5
    true = np.zeros((len(plan.table), 20))
    for k in range(len(plan.table)):
        for number, band in enumerate(bank.bands(k)):
            places = slice(5 * number, 5 * number + len(band.index))
            shown[k, places] = band.activation
            true[k, places] = hand.acts[band.index, k]

    few = np.flatnonzero(hand.fires.sum(0) <= fa.SAMPLE_PER_FEATURE)
    quarters = []
    for k in few:
        active = hand.acts[hand.fires[:, k], k]
        quarters.append(bands_by_hand(active.tolist()))
    names = [plan.names[k] for k in few]
    yield compare("bands: quarters of the active range", names, quarters, shown[few])
    yield compare("bands: activation of the images named", plan.names, true, shown)


def pattern_checks(
    plan: Plan, scene: Scene, hand: ByHand, layer: fa.ExplainedLayer
) -> Iterator[Check]:
    """Input patterns one by one, all at once and averaged over images."""
    names, expected = plan.names, hand.patterns
    single = torch.stack([fa.feature_input_pattern(*layer, k) for k in range(len(names))])
    averaged = fa.feature_input_patterns(*layer, images=scene.images[:FEW])
    yield compare("feature_input_pattern", names, expected, single)
    yield compare("feature_input_patterns", names, expected, fa.feature_input_patterns(*layer))
    yield compare("feature_input_patterns: over images", names, expected, averaged)


def roughness_check(plan: Plan, hand: ByHand) -> Check:
    """Of the patterns, and of three pictures whose roughness is known."""
    chessboard = (-1.0) ** (ROW + COL)
    pictures = np.stack([*hand.patterns, chessboard, chessboard**2, 0 * chessboard])
    names = [*plan.names, "chessboard", "constant", "nothing"]
    expected = [roughness_by_hand(pattern) for pattern in hand.patterns] + [2, 0, 0]
    found = fa.pattern_roughness(torch.tensor(pictures))
    return compare("pattern_roughness", names, expected, found)


class Kind(NamedTuple):
    """One kind of effect: the functions that measure it, and what must come out."""

    name: str  # "logit" or "ablation"
    of_one: Callable
    of_all: Callable
    raised: np.ndarray  # (d_sae,) the class it raises most, -1 for a feature that never fires
    few: dict  # arguments under which few images count


def effect_checks(
    plan: Plan, scene: Scene, hand: ByHand, layer: fa.ExplainedLayer, kind: Kind
) -> Iterator[Check]:
    """Effects of each feature: one by one, all at once, over few images."""
    names, given = plan.names, (layer.model, scene.batches(), *layer[1:])
    of_one, of_all = f"feature_{kind.name}_effect", f"feature_{kind.name}_effects"
    expected = effects_by_hand(plan, hand, kind.name, len(hand.fires))

    one_by_one = [kind.of_one(*given, k) for k in range(len(names))]
    deltas = torch.stack([effect.mean_delta for effect in one_by_one])
    tops = [effect.top_class for effect in one_by_one]
    yield compare(of_one, names, expected, deltas)
    yield compare(f"{of_one}: class raised most", names, kind.raised, tops)

    every = kind.of_all(*given)
    yield compare(of_all, names, expected, every.mean_delta)
    yield compare(f"{of_all}: class raised most", names, kind.raised, every.top_class)

    expected = effects_by_hand(plan, hand, kind.name, **kind.few)
    few = kind.of_all(*given, **kind.few).mean_delta
    words = ", ".join(f"{name}={value:g}" for name, value in kind.few.items())
    yield compare(f"{of_all}: {words}", names, expected, few)
    if kind.name == "ablation":
        yield compare(f"{of_all}: images", names, hand.fires.sum(0), every.n_images)


def both_effect_checks(
    plan: Plan, scene: Scene, hand: ByHand, layer: fa.ExplainedLayer
) -> Iterator[Check]:
    """Effects of adding each feature, and of removing it."""
    pushes = np.array([row.pushes for row in plan.table])
    against = np.array([row.against for row in plan.table])
    removed = np.where(hand.fires.any(0), against, -1)
    adding = (fa.feature_logit_effect, fa.feature_logit_effects)
    removing = (fa.feature_ablation_effect, fa.feature_ablation_effects)
    for kind in (
        Kind("logit", *adding, pushes, {"n_eval": FEW, "alpha": 3.0}),
        Kind("ablation", *removing, removed, {"n_eval": FEW}),
    ):
        yield from effect_checks(plan, scene, hand, layer, kind)


def neighbour_checks(plan: Plan, hand: ByHand, sae: PlantedSAE) -> Iterator[Check]:
    """The nearest feature; where several are equally near, any of them."""
    nearest = fa.nearest_features(sae.W_dec)
    expected = hand.cosines.max(1)
    chosen = hand.cosines[np.arange(len(expected)), nearest.feature]
    yield compare("nearest_features: cosine", plan.names, expected, nearest.cosine)
    yield compare("nearest_features: cosine of the one named", plan.names, expected, chosen)


# --------------------------------------------------------------------------------------------------
# Statements about strokes: 15 places, each in four orientations, in four models
# --------------------------------------------------------------------------------------------------

ORIENTATIONS = ("horizontal", "vertical", "rising", "falling")
GRID = (4, 10, 17, 23)  # so far from the margin that pieces of the vocabulary fit around them
CENTRES = [(r, c) for r in GRID for c in GRID if (r, c) != (23, 10)]  # there the stain is
N_LABELLED = 2400  # images to propose from, and as many others to test on
OWN_CLASS, OTHER_CLASS = 0.35, 0.05  # how often a stroke is drawn where its class is, and elsewhere
SWAPS = (1, 2, 4)  # a claim is tried on the feature so many further on
SHUFFLES = 2


def short_stroke(orientation: str, r: int, c: int) -> np.ndarray:
    """(28, 28) bool, two pixels thick and seven long, centred on row r and column c."""
    near = box(r - 3, r + 3, c - 3, c + 3)
    masks = {
        "horizontal": box(r, r + 1, c - 3, c + 3),
        "vertical": box(r - 3, r + 3, c, c + 1),
        "rising": near & (abs(ROW - r + COL - c - 0.5) < 1),
        "falling": near & (abs(ROW - r - COL + c - 0.5) < 1),
    }
    return masks[orientation]


def stroke_table(turn: int) -> list[Planted]:
    """One stroke at each of CENTRES; `turn` turns them all by so many orientations."""
    table = []
    for k, (r, c) in enumerate(CENTRES):
        orientation = ORIENTATIONS[(k + k // 4 + turn) % 4]
        pushes = k % N_CLASSES
        against = (k + 1 + k // N_CLASSES) % N_CLASSES  # 1 to 3 further: never the one it pushes
        mask = short_stroke(orientation, r, c)
        strength = 0.8 + 0.04 * k
        table.append(Planted(f"{orientation} {k}", mask, pushes, against, strength))
    return table


def draw_labelled(plan: Plan, seed: int) -> Scene:
    """Images of a class each, on which the strokes that push it are frequent.

    Half of them are stained, with a little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (N_LABELLED,), generator=generator)
    own = labels[:, None] == torch.tensor([row.pushes for row in plan.table])
    strokes_often = torch.where(own, OWN_CLASS, OTHER_CLASS)
    stain_often = torch.full((N_LABELLED, 1), 0.5)

    ink, noise = random_ink(torch.cat([strokes_often, stain_often], 1), generator)
    return Scene(paint(plan, ink, noise), labels, ink[:, :-1])


def is_right(claim: fh.Hypothesis, row: Planted, centre: tuple[int, int]) -> dict[str, bool]:
    """Whether a claim says what was planted, a stroke around `centre`: by its first word, whose
    cell may also touch the stroke's; and by what it says of labels and logits, if anything."""
    word_right = False
    if claim.ink.there:
        word = claim.ink.there[0]
        planted = fh.word_of(fh.Place(*centre, row.name.split()[0], fh.LENGTHS[0]))
        near = max(abs(word.row - planted.row), abs(word.col - planted.col)) <= 1
        word_right = near and word.shape == planted.shape
    effect_right = True
    if claim.effect is not None:
        raises, lowers = claim.effect.raises, claim.effect.lowers
        effect_right = raises in (None, row.pushes) and lowers in (None, row.against)
    return {
        "word": word_right,
        "labels, if named": claim.often in ((), (row.pushes,)) and not claim.hardly,
        "effect, if named": effect_right,
    }


def shuffled(activity: fa.Activity, seed: int) -> fa.Activity:
    """The same activations of each feature, on images drawn at random."""
    generator = np.random.default_rng(seed)
    n_images = len(activity.labels)
    images = []
    for count in activity.n_active.tolist():
        images.append(np.sort(generator.choice(n_images, count, replace=False)))
    return activity._replace(image=torch.from_numpy(np.concatenate(images)))


class Statements(NamedTuple):
    """What came of the planted strokes of one model, and of null features."""

    right: list[dict[str, bool]]  # of each of the 15 features, by what may be right about it
    null_confirmed: dict[str, list[bool]]


def try_statements(turn: int) -> Statements:
    """Propose on one scene, test on another; then where chance alone can confirm."""
    plan = make_plan(stroke_table(turn))
    layer = plant(plan)
    seen, unseen = draw_labelled(plan, turn), draw_labelled(plan, 100 + turn)
    claims = fh.propose_hypotheses(layer, seen.images, seen.labels, drawings=False)
    activity = fa.collect_activity(layer, unseen.images, unseen.labels)

    def judged(some: list[fh.Hypothesis], activity: fa.Activity) -> list[fc.Judgement]:
        found = fc.test_hypotheses(some, layer, unseen.images, unseen.labels, activity)
        return fc.judge_hypotheses(some, found)

    right = []
    judgements = judged(claims, activity)
    for claim, judgement, row, centre in zip(claims, judgements, plan.table, CENTRES, strict=True):
        right.append(is_right(claim, row, centre) | {"confirmed": judgement.explained})

    swapped, random = [], []
    for shift in SWAPS:
        moved = [h._replace(feature=(h.feature + shift) % len(claims)) for h in claims]
        swapped += judged(moved, activity)
    for seed in range(SHUFFLES):
        random += judged(claims, shuffled(activity, seed))

    nulls = {"explanations swapped": swapped, "activations shuffled": random}
    confirmed = {}
    for name, judgements in nulls.items():
        confirmed[name] = [judgement.verdict == fc.CONFIRMED for judgement in judgements]
    return Statements(right, confirmed)


def at_least(what: str, outcomes: Sequence[bool], share: float) -> Check:
    found = float(np.mean(outcomes))
    where = f"{len(outcomes)} features"
    return Check(what, where, f">= {share:.0%}", f"{found:.1%}", found >= share)


def at_most(what: str, outcomes: Sequence[bool], share: float) -> Check:
    found = float(np.mean(outcomes))
    where = f"{len(outcomes)} features"
    return Check(what, where, f"<= {share:.0%}", f"{found:.1%}", found <= share)


def statement_checks() -> Iterator[Check]:
    """Whether statements about planted strokes are right and confirmed, and null ones are not."""
    tried = [try_statements(turn) for turn in range(len(ORIENTATIONS))]
    right = [feature for one in tried for feature in one.right]
    for name in right[0]:
        yield at_least(f"statements: {name}", [feature[name] for feature in right], 0.95)
    yield at_least("statements: all of these", [all(one.values()) for one in right], 0.95)

    for name in tried[0].null_confirmed:
        confirmed = [verdict for one in tried for verdict in one.null_confirmed[name]]
        yield at_most(f"null statements confirmed: {name}", confirmed, 0.02)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def draw_pictures(
    plan: Plan, scene: Scene, layer: fa.ExplainedLayer, bank: fa.FeatureBank, out: Path
) -> None:
    """Gallery, pattern and panel of every feature. Raises OSError when `out` is not writable."""
    given = (layer.model, scene.batches(), *layer[1:])
    images = scene.images
    inked = images.amax((0, 1)) > 0
    heats = fa.feature_input_patterns(*layer)
    added = fa.feature_logit_effects(*given).mean_delta
    removed = fa.feature_ablation_effects(*given).mean_delta

    fa.write_feature_pictures(out, range(len(plan.table)), bank, images, heats, inked)
    for k in range(len(plan.table)):
        effects = (added[k], removed[k])
        path = out / f"feature_{k}_panel.png"
        fa.show_feature_panel(k, bank, images, heats[k], *effects, path, fa.PanelNotes(inked=inked))
    fa.show_feature_gallery(0, bank, images, out / "single_gallery.png")
    fa.visualize_feature_pattern(heats[0], 0, inked=inked).savefig(out / "single_pattern.png")


def read_grey(path: Path) -> np.ndarray:
    """A grey picture (height, width) in [0, 1], whether its file stores colours or not."""
    picture = matplotlib.image.imread(path)
    if picture.ndim == 3:
        return picture[:, :, 0]
    return picture


def shows_first(picture: np.ndarray, image: np.ndarray) -> bool:
    """Whether the first framed tile of the grey picture (height, width) is `image` (28, 28).

    Both are in [0, 1]; a tile's upper frame is a row of pixels of its own grey.
    """
    size, zoom = fa.TILE, fa.TILE // SIDE
    is_frame = abs(picture - fa.FRAME / 255) < 0.01
    runs = np.lib.stride_tricks.sliding_window_view(is_frame, size + 2, axis=1)
    corners = np.argwhere(runs.all(-1))
    if len(corners) == 0:
        return False
    top, left = corners[0] + 1
    tile = picture[top : top + size : zoom, left : left + size : zoom]
    return bool(abs(tile - (1 - image)).max() < 0.01)


def red_less_blue(picture: np.ndarray) -> float:
    """Image pixels in full red minus those in full blue, in a pattern (height, width, 3 or 4)."""
    without_scale = picture[:, : fa.MARGIN + fa.PATTERN]
    redness = without_scale[:, :, 0] - without_scale[:, :, 2]
    zoom = fa.PATTERN // SIDE
    return (np.sum(redness > 0.2) - np.sum(redness < -0.2)) / zoom**2


def gallery_checks(plan: Plan, scene: Scene, hand: ByHand, out: Path) -> Iterator[Check]:
    """Whether pictures show the strongest image first, and none of a feature without any."""
    numbers = range(len(plan.table))
    pictures = {
        "write_feature_pictures": [f"feature_{k}_gallery.png" for k in numbers],
        "show_feature_panel": [f"feature_{k}_panel.png" for k in numbers],
        "show_feature_gallery": ["single_gallery.png"],
    }
    strongest = scene.images[:, 0].numpy()[hand.acts.argmax(0)]
    fires = hand.fires.any(0)
    for function, files in pictures.items():
        found = []
        for file, image in zip(files, strongest, strict=False):
            found.append(shows_first(read_grey(out / file), image))
        what = f"{function}: strongest image comes first"
        yield compare(what, plan.names, fires[: len(files)], found)


def colour_checks(plan: Plan, out: Path) -> Iterator[Check]:
    """Whether the pixels of each pattern have the colour of their sign."""
    pictures = {
        "write_feature_pictures": [f"feature_{k}_pattern.png" for k in range(len(plan.table))],
        "visualize_feature_pattern": ["single_pattern.png"],
    }
    expected = plan.signs * plan.own[plan.stroke].sum((1, 2))
    for function, files in pictures.items():
        found = [red_less_blue(matplotlib.image.imread(out / file)) for file in files]
        what = f"{function}: red less blue pixels"
        yield compare(what, plan.names, expected[: len(files)], found)


def picture_checks(plan: Plan, scene: Scene, hand: ByHand, out: Path) -> Iterator[Check]:
    """What the files in `out` show."""
    yield from gallery_checks(plan, scene, hand, out)
    yield from colour_checks(plan, out)
    stored = [np.load(out / f"feature_{k}_pattern.npy") for k in range(len(plan.table))]
    what = "write_feature_pictures: stored gradient"
    yield compare(what, plan.names, hand.patterns, np.stack(stored))


# --------------------------------------------------------------------------------------------------
# The demo
# --------------------------------------------------------------------------------------------------


def run_checks(plan: Plan, out: Path) -> Iterator[Check]:
    """Analyse the planted features, draw them into `out`, compare.

    Raises OSError when `out` cannot be written.
    """
    scene, layer = draw_scene(plan), plant(plan)
    hand = work_out(plan, scene)
    out.mkdir(parents=True, exist_ok=True)

    def collected(first: int, last: int | None) -> fa.FeatureBank:
        batches = scene.batches(first, last)
        return fa.collect_feature_bank(
            layer.model, batches, *layer[1:], topk=TOPK, first_index=first
        )

    bank = collected(0, None)
    cut = len(scene.labels) // 3
    merged = fa.merge_feature_banks(collected(0, cut), collected(cut, None))
    draw_pictures(plan, scene, layer, bank, out)

    yield from bank_checks("collect_feature_bank", plan, scene, hand, bank)
    yield from bank_checks("merge_feature_banks", plan, scene, hand, merged)
    yield from band_checks(plan, hand, bank)
    yield from pattern_checks(plan, scene, hand, layer)
    yield roughness_check(plan, hand)
    yield from both_effect_checks(plan, scene, hand, layer)
    yield from neighbour_checks(plan, hand, layer.sae)
    yield from statement_checks()
    yield from picture_checks(plan, scene, hand, out)


def print_checks(checks: Sequence[Check], names: Sequence[str]) -> None:
    planted = [f"{k} {name}" for k, name in enumerate(names)]
    print("planted: " + ", ".join(planted) + "\n")
    rows = [("check", "value shown", "expected", "found", "")]
    for check in checks:
        rows.append((*check[:4], "ok" if check.ok else "FAILED"))
    for what, where, expected, found, verdict in rows:
        line = f"{what:<52}  {where:<24}  {expected:>10}  {found:>10}  {verdict}"
        print(line.rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = Path("demo_pictures")
    parser.add_argument("--out", type=Path, default=folder, help="folder for the pictures")
    out = parser.parse_args(argv).out
    plan = make_plan(PLANTED)
    try:
        checks = list(run_checks(plan, out))
    except OSError as error:
        problem = f"cannot write pictures into {out} ({error.strerror})"
        print(f"{problem}: give another folder with --out", file=sys.stderr)
        return 2

    print_checks(checks, plan.names)
    failed = sum(not check.ok for check in checks)
    passed = f"{len(checks) - failed} checks passed, {failed} failed"
    print(f"\n{passed}; pictures in {out}, see feature_0_panel.png first")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other
    sys.exit(main())
