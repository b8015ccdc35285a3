"""TODO"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.strokes import SIDE, Place, Strokes, Word, places_of, vocabulary, word_of

if TYPE_CHECKING:
    from saexplain.hypotheses import Hypothesis


# --------------------------------------------------------------------------------------------------
# Edits: the ink that is named, and as much elsewhere
# --------------------------------------------------------------------------------------------------

N_EDIT = 48  # active images, and as many silent ones, that are edited for a feature
EVER_INKED = 0.01  # a pixel inked on fewer images is left alone: blank margins would be too easy
PATCH_PIXELS = 256  # nearest pixels tried first for a patch; most need no more
DRAWS = 8  # random numbers that the edits of an image may use

Pair = tuple[Tensor, Tensor]  # images (B, 784) edited as named, and elsewhere


def spread(indices: Tensor, n: int) -> Tensor:
    """At most n of the indices, spread evenly."""
    places = torch.linspace(0, len(indices) - 1, min(n, len(indices)), dtype=torch.float32)
    return indices[places.round().long()]


def edited_images(h: Hypothesis, activity: Activity) -> tuple[Tensor, Tensor]:
    """The images that tests of a claim edit, at most N_EDIT each, spread evenly: of those that fire
    the feature, and of those that do not though what is said about labels is true of them."""
    silent = ~activity.is_active(h.feature)
    said = np.ones(int(activity.labels.max()) + 1, dtype=bool)
    if h.enriched:
        said[:] = False
        said[[c for c in h.enriched if c < len(said)]] = True
    said[[c for c in h.depleted if c < len(said)]] = False
    fitting = silent & said[activity.labels.numpy()]
    if not fitting.any():
        fitting = silent
    return (
        spread(activity.of(h.feature)[0], N_EDIT),
        spread(torch.from_numpy(np.flatnonzero(fitting)), N_EDIT),
    )


def random_numbers(seed: int, feature: int) -> torch.Generator:
    """Random numbers that belong to a feature."""
    return torch.Generator().manual_seed((seed * 1_000_003 + feature) % 2**63)


def pieces(strokes: Sequence[Word | Place], x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 784) 0 or 1 each: the pixels of strokes on each of x (B, 784), and those beside them; of
    a word, the piece by which it is most true of the image."""
    v = vocabulary()
    along, beside = torch.zeros_like(x), torch.zeros_like(x)
    for stroke in strokes:
        some = places_of(stroke)
        chosen = (x @ v.weights[some].T).argmax(1) + some.start
        torch.maximum(along, v.masks.index_select(0, chosen), out=along)
        torch.maximum(beside, v.sides.index_select(0, chosen), out=beside)
    return along, beside * (1 - along)


@functools.cache
def _region(stroke: Word | Place) -> Tensor:
    """(784,) 1 on all pixels that a stroke may mean, else 0."""
    return vocabulary().masks[places_of(stroke)].amax(0)


@functools.cache
def _places_like(shape: str, long: bool) -> Tensor:
    """(n, 784) 0 or 1, all places of a shape and length."""
    v = vocabulary()
    like = [(word_of(p).shape, word_of(p).long) == (shape, long) for p in v.places]
    return v.masks[torch.tensor(like)]


class Editable(NamedTuple):
    """Images that may be edited."""

    pixels: Tensor  # (N, 784) on the CPU, where sums are the same in every run
    shape: tuple[int, ...]  # of an image, as the model takes it
    allowed: Tensor  # (784,) 1 where edits may go, else 0
    seed: int  # of the places elsewhere

    @classmethod
    def of(cls, images: Tensor, seed: int) -> Editable:
        """From images (N, 28, 28) or (N, 1, 28, 28)."""
        pixels = images.flatten(1).float().cpu()
        allowed = ((pixels > 0).float().mean(0) > EVER_INKED).float()
        return cls(pixels, tuple(images.shape[1:]), allowed, seed)

    def feature_acts(self, layer: fa.ExplainedLayer, x: Tensor, k: int) -> Tensor:
        """(B,) activations of feature k on edited images x (B, 784)."""
        return layer.feature_acts(layer.raw(x.unflatten(1, self.shape)))[:, k].cpu()


class Editor:
    """Edits the strokes that a claim names, or some of them. Each edit is made once as named and
    once elsewhere, off all that is named, with as much ink: where one of the two has less ink to
    move, both move that much."""

    def __init__(self, named: Strokes, editable: Editable, feature: int):
        regions = [_region(stroke) for stroke in (*named.there, *named.absent)]
        self.elsewhere = editable.allowed * (1 - torch.stack(regions).amax(0))
        generator = random_numbers(editable.seed, feature)
        # of at most N_EDIT images
        self.draws = torch.rand(DRAWS, N_EDIT, generator=generator, dtype=torch.float32)

    def erase(
        self,
        x: Tensor,
        strokes: Sequence[Word | Place],
        pair: Pair | None = None,
        spared: Sequence[Word | Place] = (),
    ) -> Pair:
        """Take away the ink of strokes, but for that of those spared. x (B, 784), and `pair` what
        became of it so far."""
        along, _ = pieces(strokes, x)
        if spared:
            along = along * (1 - pieces(spared, x)[0])
        return self._take(along, x, pair or (x, x))

    def paint(self, x: Tensor, strokes: Sequence[Word | Place], pair: Pair | None = None) -> Pair:
        """Ink strokes and blank their sides; elsewhere, ink strokes of the same shapes."""
        along, beside = pieces(strokes, x)
        named, elsewhere = self._take(beside, x, pair or (x, x))
        other = torch.zeros_like(x)
        for stroke, draw in zip(strokes, self.draws[1:, : len(x)], strict=False):
            other = torch.maximum(other, self._same_elsewhere(stroke, draw))
        ink, ink_there = (1 - named) * along, (1 - elsewhere) * other
        of_named, of_other = ink.sum(1, keepdim=True), ink_there.sum(1, keepdim=True)
        amount = torch.minimum(of_named, of_other)
        named = named + amount / of_named.clamp(min=1e-9) * ink
        return named, elsewhere + amount / of_other.clamp(min=1e-9) * ink_there

    def _take(self, mask: Tensor, x: Tensor, pair: Pair) -> Pair:
        """Take away what is left of the ink of x (B, 784) on a mask (B, 784); elsewhere as much
        goes from a patch that grows around a pixel drawn with the probability of its ink."""
        named, elsewhere = pair
        ink, other = torch.minimum(x, named) * mask, torch.minimum(x, elsewhere) * self.elsewhere
        total = other.cumsum(1)
        of_named, everything = ink.sum(1), total[:, -1]
        amount = torch.minimum(of_named, everything)
        named = named - (amount / of_named.clamp(min=1e-9))[:, None] * ink

        target = (self.draws[0, : len(x)] * everything)[:, None]
        centre = torch.searchsorted(total, target, right=True)[:, 0].clamp(max=SIDE**2 - 1)
        elsewhere = elsewhere.clone()
        _remove_patch(elsewhere, other, amount, centre)
        return named, elsewhere

    def _same_elsewhere(self, stroke: Word | Place, draw: Tensor) -> Tensor:
        """(B, 784) 0 or 1, a place of the same shape and length for each of draw (B,): off what is
        named and where edits may go, or as nearly as there is one."""
        word = stroke if isinstance(stroke, Word) else word_of(stroke)
        like = _places_like(word.shape, word.long)
        unfit = like @ (1 - self.elsewhere)
        fit = like[unfit == unfit.min()]
        return fit[(draw * len(fit)).long()]


@functools.cache
def _nearest_first() -> tuple[Tensor, Tensor]:
    """Numbers of all 784 pixels in the order of their distance from each, int64: the PATCH_PIXELS
    nearest (784, PATCH_PIXELS), and the rest (784, 784 - PATCH_PIXELS)."""
    row, col = np.divmod(np.arange(SIDE**2), SIDE)
    squared = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    order = torch.from_numpy(squared.astype(np.int16).argsort(axis=1, kind="stable"))
    return order[:, :PATCH_PIXELS].contiguous(), order[:, PATCH_PIXELS:].contiguous()


def _remove_patch(x: Tensor, available: Tensor, amount: Tensor, centre: Tensor) -> None:
    """Take ink off x (B, 784) in place: what is available (B, 784), pixel by pixel by their
    distance from `centre` (B,), until it is `amount` (B,)."""
    near, far = _nearest_first()
    missing = _remove_in_order(x, available, amount, near.index_select(0, centre))
    rows = (missing > 0).nonzero()[:, 0]
    if len(rows):
        some = x[rows]
        _remove_in_order(some, available[rows], missing[rows], far.index_select(0, centre[rows]))
        x[rows] = some


def _remove_in_order(x: Tensor, available: Tensor, amount: Tensor, order: Tensor) -> Tensor:
    """The same at the pixels in `order` (B, pixels); returns what is still missing, (B,)."""
    there = available.gather(1, order)
    missing = amount[:, None] - there.cumsum(1)
    taken = torch.minimum(there, (missing + there).clamp_(min=0))
    x.scatter_(1, order, x.gather(1, order).sub_(taken))
    return missing[:, -1]
