"""Features whose input patterns are planted in a linear layer, on the bundled digits.

Unit k of the layer is z = images @ pattern: 1 where template k wants ink, -1 where it wants none,
with noise everywhere. The SAE reads each unit by itself; unit k raises the logit of class k and
lowers that of class k + 1.

Key: S templates, C classes.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import feature_analysis as fa
from saexplain.images import load_images
from saexplain.sae import JumpReLUSAE

SIDE = 28
ROW, COLUMN = np.mgrid[:SIDE, :SIDE]
N_CLASSES = 10
ACTIVE_SHARE = 0.15  # of the validation images, on which a feature is active
NOISE = 0.25  # standard deviation of the patterns' noise; planted cells are 1 and -1
NOTHING = np.zeros((SIDE, SIDE), dtype=bool)


class Template(NamedTuple):
    """Cells that are planted in a pattern, and the clauses that its caption must have."""

    wanted: np.ndarray  # (28, 28) bool
    unwanted: np.ndarray  # (28, 28) bool
    clauses: frozenset[str]


def stroke(row: float, column: float, length: float, width: float, degrees: float) -> np.ndarray:
    """(28, 28) bool, a straight piece of stroke about a point, turned from the horizontal."""
    right, up = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    along = (COLUMN - column) * right - (ROW - row) * up
    across = (COLUMN - column) * up + (ROW - row) * right
    return (abs(along) <= length / 2) & (abs(across) <= width / 2)


def ring(row: float, column: float, inner: float, outer: float) -> np.ndarray:
    """(28, 28) bool, where the distance from a point is between two radii."""
    distance = np.hypot(ROW - row, COLUMN - column)
    return (distance > inner) & (distance <= outer)


UPRIGHT = (  # wanted, unwanted
    (stroke(7, 13.5, 10, 3, 0), stroke(11, 13.5, 10, 3, 0)),
    (ring(14, 13.5, 3.2, 6.6), NOTHING),
    (stroke(9.5, 18, 5, 6, 0) | stroke(17.5, 9, 5, 6, 0), NOTHING),
    (stroke(13.5, 13.5, 12, 3, 30), stroke(17.5, 15.5, 12, 3, 30)),
)
CLAUSES = (  # of the captions of UPRIGHT, turned counterclockwise by none to three quarters
    (
        "bar at the top, blank just below it",
        "ring in the center",
        "patch in the upper right, patch in the lower left",
        "slash in the center, blank just below it",
    ),
    (
        "stem on the left, blank just right of it",
        "ring in the center",
        "patch in the upper left, patch in the lower right",
        "backslash in the center, blank just right of it",
    ),
    (
        "bar at the bottom, blank just above it",
        "ring in the center",
        "patch in the upper right, patch in the lower left",
        "slash in the center, blank just above it",
    ),
    (
        "stem on the right, blank just left of it",
        "ring in the center",
        "patch in the upper left, patch in the lower right",
        "backslash in the center, blank just left of it",
    ),
)


def templates_of(turn: int) -> list[Template]:
    """The templates UPRIGHT, turned counterclockwise by so many quarters."""
    turned = (tuple(np.rot90(cells, turn) for cells in pair) for pair in UPRIGHT)
    clauses = (frozenset(text.split(", ")) for text in CLAUSES[turn])
    return [Template(*pair, text) for pair, text in zip(turned, clauses, strict=True)]


def plant(templates: list[Template], seed: int = 0) -> fa.ExplainedLayer:
    """The layer in which feature k is template k, with the digits' splits "val" and "test"."""
    data = load_images("sample")
    signed = torch.tensor(np.stack([t.wanted * 1.0 - t.unwanted for t in templates])).float()
    generator = torch.Generator().manual_seed(seed)
    patterns = (signed + NOISE * torch.randn(signed.shape, generator=generator)).flatten(1)
    k = torch.arange(len(templates))
    W2 = torch.zeros(len(templates), N_CLASSES)
    W2[k, k % N_CLASSES], W2[k, (k + 1) % N_CLASSES] = 0.1, -0.1
    model = SimpleNamespace(
        preactivations=lambda images: images.flatten(1) @ patterns.T,  # (B, S)
        logits_from_preactivations=lambda z: z.relu() @ W2,  # (B, C)
    )
    raw = model.preactivations(data.val.images)
    mu, std, eye, zeros = raw.mean(0), raw.std(0), torch.eye(len(k)), torch.zeros(len(k))
    threshold = ((raw - mu) / std).quantile(1 - ACTIVE_SHARE, dim=0)
    weights = {"W_enc": eye, "W_dec": eye, "b_enc": zeros, "b_dec": zeros, "threshold": threshold}
    layer = fa.ExplainedLayer(model, JumpReLUSAE.from_weights(weights), mu, std)
    for name in ("val", "test"):
        layer.splits[name] = layer.activations(*getattr(data, name))
    return layer
