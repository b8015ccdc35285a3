"""How is an image edited at a named stroke, and equally elsewhere for comparison?

    images = EditableImages.of(pixels, seed=0)
    on, off = edited_images(hypothesis, activity)          # active and inactive images to edit
    editor = Editor(hypothesis.ink, images, feature)
    named, elsewhere = editor.erase(images.pixels[on], hypothesis.ink.there)

Takes images of 28 x 28 pixels and strokes; gives pairs of edited images that differ from the
original by the same amount of ink. It does not decide what an edit shows.

Key: B images in a batch, N images in all.
"""

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

if TYPE_CHECKING:  # hypotheses.py imports this module
    from saexplain.hypotheses import Hypothesis

N_EDIT = 48  # active images, and as many inactive ones, that are edited for a feature
EVER_INKED = 0.01  # a pixel inked on fewer images is left alone: blank margins would be too easy
PATCH_PIXELS = 256  # nearest pixels tried first for a patch; most need no more
DRAWS = 8  # random numbers that the edits of an image may use

Pair = tuple[Tensor, Tensor]  # images (B, 784) edited as named, and elsewhere


def evenly_spaced(indices: Tensor, n: int) -> Tensor:
    """At most n of the indices, evenly spaced, the first and the last among them."""
    places = torch.linspace(0, len(indices) - 1, min(n, len(indices)), dtype=torch.float32)
    return indices[places.round().long()]


def edited_images(h: Hypothesis, activity: Activity) -> tuple[Tensor, Tensor]:
    """The active and the inactive images that tests of a hypothesis edit, at most N_EDIT each; the
    inactive ones are of the labels that it names, where there are such."""
    labels, inactive = activity.labels.numpy(), ~activity.is_active(h.feature)
    fitting = inactive & ~np.isin(labels, h.depleted)
    if h.enriched:
        fitting &= np.isin(labels, h.enriched)
    if not fitting.any():
        fitting = inactive
    return (
        evenly_spaced(activity.of(h.feature)[0], N_EDIT),
        evenly_spaced(torch.from_numpy(np.flatnonzero(fitting)), N_EDIT),
    )


def stroke_pixels(strokes: Sequence[Word | Place], x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 784) 0 or 1 each: the pixels of strokes on each of x (B, 784), and those beside them; a
    word is where its ink on the image is largest."""
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


class EditableImages(NamedTuple):
    """Images that may be edited."""

    pixels: Tensor  # (N, 784) on the CPU, where sums are the same in every run
    shape: tuple[int, ...]  # of an image, as the model takes it
    allowed: Tensor  # (784,) 1 where edits may go, else 0
    seed: int  # of the positions elsewhere

    @classmethod
    def of(cls, images: Tensor, seed: int) -> EditableImages:
        """From images (N, 28, 28) or (N, 1, 28, 28)."""
        pixels = images.flatten(1).float().cpu()
        allowed = ((pixels > 0).float().mean(0) > EVER_INKED).float()
        return cls(pixels, tuple(images.shape[1:]), allowed, seed)

    def feature_acts(self, layer: fa.ExplainedLayer, x: Tensor, k: int) -> Tensor:
        """(B,) activations of feature k on edited images x (B, 784)."""
        return layer.feature_acts(layer.raw(x.unflatten(1, self.shape)))[:, k].cpu()


class Editor:
    """Edits some of the strokes that a hypothesis names.

    Each edit is made once as named and once elsewhere, away from all named strokes, with the same
    amount of ink: where one of the two has less ink to change, both change by that much.
    """

    def __init__(self, named: Strokes, images: EditableImages, feature: int):
        regions = [_region(stroke) for stroke in (*named.there, *named.absent)]
        self.elsewhere = images.allowed * (1 - torch.stack(regions).amax(0))
        # A seed of its own for each feature: its edits must not depend on which others are tested.
        generator = torch.Generator().manual_seed((images.seed * 1_000_003 + feature) % 2**63)
        self.draws = torch.rand(DRAWS, N_EDIT, generator=generator, dtype=torch.float32)

    def erase(
        self,
        x: Tensor,
        strokes: Sequence[Word | Place],
        pair: Pair | None = None,
        spared: Sequence[Word | Place] = (),
    ) -> Pair:
        """x (B, 784) without the ink of `strokes`, but for that of those `spared`; `pair` are its
        edits so far."""
        along, _ = stroke_pixels(strokes, x)
        if spared:
            along = along * (1 - stroke_pixels(spared, x)[0])
        return self._take(along, x, pair or (x, x))

    def paint(self, x: Tensor, strokes: Sequence[Word | Place], pair: Pair | None = None) -> Pair:
        """x (B, 784) with `strokes` inked and their sides blank; elsewhere, strokes of the same
        shapes are inked; `pair` are its edits so far."""
        along, beside = stroke_pixels(strokes, x)
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
        """The pair without what is left of the ink of x (B, 784) on a mask (B, 784); elsewhere as
        much is taken from a patch that grows around a pixel drawn in proportion to its ink."""
        named, elsewhere = pair
        ink, other = torch.minimum(x, named) * mask, torch.minimum(x, elsewhere) * self.elsewhere
        total = other.cumsum(1)
        of_named, everything = ink.sum(1), total[:, -1]
        amount = torch.minimum(of_named, everything)
        named = named - (amount / of_named.clamp(min=1e-9))[:, None] * ink

        target = (self.draws[0, : len(x)] * everything)[:, None]
        center = torch.searchsorted(total, target, right=True)[:, 0].clamp(max=SIDE**2 - 1)
        elsewhere = elsewhere.clone()
        _remove_patch(elsewhere, other, amount, center)
        return named, elsewhere

    def _same_elsewhere(self, stroke: Word | Place, draw: Tensor) -> Tensor:
        """(B, 784) 0 or 1, a place of the same shape and length for each of draw (B,) in [0, 1),
        with the fewest pixels where edits must not go."""
        word = stroke if isinstance(stroke, Word) else word_of(stroke)
        like = _places_like(word.shape, word.long)
        unfit = like @ (1 - self.elsewhere)
        fit = like[unfit == unfit.min()]
        return fit[(draw * len(fit)).long()]


@functools.cache
def _nearest_first() -> tuple[Tensor, Tensor]:
    """Indices of all 784 pixels by their distance from each: the PATCH_PIXELS nearest
    (784, PATCH_PIXELS), and the rest (784, 784 - PATCH_PIXELS)."""
    row, col = np.divmod(np.arange(SIDE**2), SIDE)
    squared = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    order = torch.from_numpy(squared.astype(np.int16).argsort(axis=1, kind="stable"))
    return order[:, :PATCH_PIXELS].contiguous(), order[:, PATCH_PIXELS:].contiguous()


def _remove_patch(x: Tensor, available: Tensor, amount: Tensor, center: Tensor) -> None:
    """Take `amount` (B,) of the `available` ink (B, 784) off x (B, 784) in place, pixel by pixel by
    their distance from `center` (B,)."""
    near, far = _nearest_first()
    missing = _remove_in_order(x, available, amount, near.index_select(0, center))
    # Indexing copies, so what the near pixels lack is taken from a copy and written back.
    rows = (missing > 0).nonzero()[:, 0]
    if len(rows):
        some = x[rows]
        _remove_in_order(some, available[rows], missing[rows], far.index_select(0, center[rows]))
        x[rows] = some


def _remove_in_order(x: Tensor, available: Tensor, amount: Tensor, order: Tensor) -> Tensor:
    """What is still missing of `amount` (B,) after ink is taken off x at the pixels in `order`
    (B, pixels), in place; (B,)."""
    there = available.gather(1, order)
    missing = amount[:, None] - there.cumsum(1)
    taken = torch.minimum(there, (missing + there).clamp_(min=0))
    x.scatter_(1, order, x.gather(1, order).sub_(taken))
    return missing[:, -1]
