"""A layer with positions by hand, whose features have known places and classes. Nothing is trained.

The layer's output is a grid of 6 x 6 positions after one prefix token, with a unit for each feature
and others to spare. Feature k is its unit, where that is above THRESHOLD; the logits are linear in
the mean over positions.

Key: N images, P = 37 positions, S features, C classes.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.sae import JumpReLUSAE

GRID, N_PREFIX, N_CLASSES, N_IMAGES = (6, 6), 1, 5, 600
THRESHOLD = 0.5
CORNER, BOTTOM, ANYWHERE, PREFIX, RARE, WEAK = range(6)  # features
N_FEATURES, D_IN = 6, 40


class Head(NamedTuple):
    """Logits that are linear in the mean over positions."""

    weights: Tensor  # (d_in, C)
    bias: Tensor  # (C,)
    positions: fa.Positions = fa.Positions(GRID, N_PREFIX)

    def preactivations(self, images: Tensor) -> Tensor:
        return images.flatten(2).mT  # (B, P, d_in)

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        return (raw.mean(1) if raw.dim() == 3 else raw) @ self.weights + self.bias


def draw_positions(seed: int) -> tuple[Tensor, Tensor]:
    """The layer's output (N, P, D_IN) and labels (N,): CORNER is active on class 0, in the four
    cells of the upper left corner; BOTTOM on classes 1 and 2, in the lowest two rows; ANYWHERE on
    half of the images; PREFIX on class 3, RARE on three images; WEAK on some of class 0,
    in all cells alike."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def cell(rows: int, columns: int, first: int = 0) -> Tensor:
        row = first + (uniform(N_IMAGES) * rows).long()
        return N_PREFIX + GRID[1] * row + (uniform(N_IMAGES) * columns).long()

    labels = (uniform(N_IMAGES) * N_CLASSES).long()
    raw = 0.001 * uniform(N_IMAGES, N_PREFIX + GRID[0] * GRID[1], D_IN)
    n, weak = torch.arange(N_IMAGES), (labels == 0) & (uniform(N_IMAGES) < 0.3)
    where = {
        CORNER: (labels == 0, cell(2, 2)),
        BOTTOM: ((labels == 1) | (labels == 2), cell(2, 6, 4)),
        ANYWHERE: (uniform(N_IMAGES) < 0.5, cell(6, 6)),
        PREFIX: (labels == 3, torch.zeros(N_IMAGES, dtype=torch.int64)),
        RARE: (n < 3, cell(6, 6)),
        WEAK: (weak, N_PREFIX + 7 * weak.cumsum(0) % 36),
    }
    for k, (active, at) in where.items():
        flipped = uniform(N_IMAGES) < (0.05 if k in (CORNER, BOTTOM, PREFIX) else 0.0)
        some = active ^ flipped
        raw[n[some], at[some], k] = 1 + uniform(int(some.sum()))
    return raw, labels


@functools.cache
def positions_layer() -> fa.ExplainedLayer:
    """The layer, with splits "val" and "test" whose images are the layer's output itself."""
    std, mu = torch.linspace(0.8, 1.2, D_IN), torch.linspace(-0.1, 0.1, D_IN)
    reads = torch.eye(D_IN, N_FEATURES)
    weights = {
        "W_enc": reads * std[:, None],
        "b_enc": mu[:N_FEATURES],
        "W_dec": reads.T / std,
        "b_dec": -mu / std,
        "threshold": torch.full((N_FEATURES,), THRESHOLD),
    }
    head = torch.zeros(D_IN, N_CLASSES)
    head[CORNER, 0], head[BOTTOM, 1], head[BOTTOM, 2], head[PREFIX, 3] = 9.0, 5.0, 4.0, 9.0
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05])  # where no feature is active
    layer = fa.ExplainedLayer(Head(head, bias), JumpReLUSAE.from_weights(weights), mu, std)
    for name, seed in (("val", 0), ("test", 1)):
        raw, labels = draw_positions(seed)
        layer.splits[name] = fa.Activations(raw.mT[..., None], labels, raw)
    return layer
