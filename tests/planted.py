"""A model by hand whose features are known: strokes planted at 15 places; and small helpers.

Nothing is trained. The presence p of a stroke is the mean ink of its own pixels, those of no other
stroke. It moves one unit by z = strength (p - CUT); relu(z) is added to the logit of one class and
subtracted from another. A feature is f = p where p > THRESHOLD, else 0; f = 1 moves z by strength.

Key: N images, S strokes, C classes, d_in = S + 1 units, the last of them spare.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.edits import EditTest
from saexplain.hypotheses import Discovery, Hypothesis, discover, propose_hypotheses
from saexplain.sae import JumpReLUSAE

SIDE = 28
ROW, COL = np.mgrid[:SIDE, :SIDE]
ORIENTATIONS = ("horizontal", "vertical", "rising", "falling")
GRID = (4, 10, 17, 23)
CENTERS = [(r, c) for r in GRID for c in GRID if (r, c) != (23, 10)]  # there the stain is
N_CLASSES, N_IMAGES = 6, 2400
CUT, THRESHOLD = 0.2, 0.4  # presence below which ReLU cuts z off, above which a feature is active
NOISE = 0.03  # standard deviation of the ink
OWN_CLASS, OTHER_CLASS = 0.6, 0.15  # probability of a stroke in images of its class, of another


class Planted(NamedTuple):
    """A stroke and the feature that reads it."""

    orientation: str
    center: tuple[int, int]
    mask: np.ndarray  # (28, 28) bool
    pushes: int  # class whose logit it raises
    against: int  # class whose logit it lowers
    strength: float  # how far a full stroke moves z


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(28, 28) bool, True on rows top..bottom and columns left..right, all included."""
    return (top <= ROW) & (bottom >= ROW) & (left <= COL) & (right >= COL)


STAIN = box(21, 24, 7, 9)  # a distractor on half of the images, which no feature reads


def short_stroke(orientation: str, r: int, c: int) -> np.ndarray:
    """(28, 28) bool, two pixels thick and seven long, centered on row r and column c."""
    near = box(r - 3, r + 3, c - 3, c + 3)
    masks = {
        "horizontal": box(r, r + 1, c - 3, c + 3),
        "vertical": box(r - 3, r + 3, c, c + 1),
        "rising": near & (abs(ROW - r + COL - c - 0.5) < 1),
        "falling": near & (abs(ROW - r - COL + c - 0.5) < 1),
    }
    return masks[orientation]


def stroke_table(turn: int) -> list[Planted]:
    """One stroke at each of CENTERS; `turn` turns them all by so many orientations."""
    table = []
    for k, (r, c) in enumerate(CENTERS):
        orientation = ORIENTATIONS[(k + k // 4 + turn) % 4]
        pushes = k % N_CLASSES
        against = (k + 1 + k // N_CLASSES) % N_CLASSES  # 1 to 3 further: never the one it pushes
        mask = short_stroke(orientation, r, c)
        table.append(Planted(orientation, (r, c), mask, pushes, against, 0.8 + 0.04 * k))
    return table


def plant(table: list[Planted]) -> fa.ExplainedLayer:
    """The layer of a classifier and an SAE in which feature k is stroke k."""
    masks = np.stack([row.mask for row in table])
    own = masks & (masks.sum(0) == 1)
    own = torch.tensor(own / own.sum((1, 2), keepdims=True)).float()  # takes the mean ink
    unit = torch.arange(len(table) + 1)
    mu = 2 * (unit * 0.4142 % 1) - 1.2  # different for each unit, so that no two can be confused
    std = 0.45 + 1.5 * (unit * 0.618 % 1)
    strength = torch.tensor([*(row.strength for row in table), 0.0])
    W1 = strength[:, None] * torch.cat([own.flatten(1), torch.zeros(1, SIDE**2)])
    W2 = torch.zeros(N_CLASSES, len(unit))
    for j, row in enumerate(table):
        W2[row.pushes, j], W2[row.against, j] = 1.0, -1.0
    rest, reads = -CUT * strength, torch.eye(len(unit), len(table))
    weights = {
        "W_enc": reads * std[:, None] / strength[:-1],
        "b_enc": ((mu - rest) / strength)[:-1],
        "W_dec": reads.T * strength / std,
        "b_dec": (rest - mu) / std,
        "threshold": torch.full((len(table),), THRESHOLD),
    }
    model = SimpleNamespace(
        preactivations=lambda images: images.flatten(1) @ W1.T + rest,  # (B, d_in)
        logits_from_preactivations=lambda z: z.relu() @ W2.T,  # (B, C)
    )
    return fa.ExplainedLayer(model, JumpReLUSAE.from_weights(weights), mu, std)


def draw_labelled(table: list[Planted], seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) and labels (N,): the strokes that push a class are frequent in it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_CLASSES, (N_IMAGES,), generator=generator)
    own = labels[:, None] == torch.tensor([row.pushes for row in table])
    often = torch.where(own, OWN_CLASS, OTHER_CLASS)
    often = torch.cat([often, torch.full((N_IMAGES, 1), 0.5)], 1)  # the stain's last

    drawn, shade = torch.rand(2, *often.shape, generator=generator)
    ink = (drawn < often) * (0.45 + 0.2 * shade)  # (N, S + 1)
    noise = NOISE * torch.randn(N_IMAGES, SIDE, SIDE, generator=generator)
    noise *= torch.tensor(box(2, 25, 2, 25))  # the edge stays blank, as in MNIST
    images = torch.zeros_like(noise)
    for mask, of_stroke in zip([*(row.mask for row in table), STAIN], ink.T, strict=True):
        images = torch.maximum(images, of_stroke[:, None, None] * torch.tensor(mask))
    return (images + noise).clamp(0, 1)[:, None], labels


class World(NamedTuple):
    """A planted layer with its splits "val" and "test", and what is proposed from the former."""

    table: list[Planted]
    layer: fa.ExplainedLayer
    discovery: Discovery
    hypotheses: list[Hypothesis]

    @property
    def val(self) -> fa.Activations:
        return self.layer.splits["val"]

    @property
    def test(self) -> fa.Activations:
        return self.layer.splits["test"]


def layer_with_splits(layer: fa.ExplainedLayer, **splits) -> fa.ExplainedLayer:
    """The layer with splits, each of images and labels."""
    found = {name: layer.activations(*split) for name, split in splits.items()}
    return fa.ExplainedLayer(layer.model, layer.sae, layer.mu, layer.std, found)


@functools.cache
def planted_world(turn: int = 0) -> World:
    """The world in which strokes are turned by so many orientations."""
    table = stroke_table(turn)
    splits = {"val": draw_labelled(table, turn), "test": draw_labelled(table, 100 + turn)}
    layer = layer_with_splits(plant(table), **splits)
    discovery = discover(layer)
    return World(table, layer, discovery, propose_hypotheses(layer, discovery))


def shuffled(activity: Activity, seed: int) -> Activity:
    """The same activations of each feature, on images drawn at random."""
    generator, n = np.random.default_rng(seed), len(activity.labels)
    counts = activity.n_active.tolist()
    images = [np.sort(generator.choice(n, count, replace=False)) for count in counts]
    return activity._replace(image=torch.from_numpy(np.concatenate(images)))


def drawing(feature: int, weights, **parts) -> Hypothesis:
    """The hypothesis with these weights, (h, w) from -2 to 2."""
    weights = np.asarray(weights)
    return Hypothesis(feature, weights.clip(0), (-weights).clip(0), **parts)


def paired(both: int, only_named: int, only_elsewhere: int, neither: int) -> EditTest:
    """The test with so many images of each kind."""
    n = both + only_named + only_elsewhere + neither
    return EditTest(n, both + only_named, both + only_elsewhere, only_named, only_elsewhere)
