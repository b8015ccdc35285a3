"""What does a feature do when an image is edited as its hypothesis says, and equally elsewhere?

    tests = edit_tests(hypothesis, layer, images, activity, canvas)  # {"erasing": EditTest(...)}
    value, low, high = tests["erasing"].difference()

Takes a drawing and images; edits the ink in the drawn cells, and for comparison as much ink, or all
there is, in cells of the same shapes elsewhere. It proposes nothing, and does not decide what a
test shows.

Key: B images in a batch, h x w = P cells of the canvas, R regions, S places of a shape.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.crops import Crops
from saexplain.hypotheses import MIN_ACTIVE, Hypothesis, evenly_spaced, strong_pairs
from saexplain.ink import FULL_INK, Canvas
from saexplain.statistics import wilson_interval

EDITS = ("erasing", "filling", "painting")
N_EDIT = 32  # active images, and as many inactive ones, that are edited for a feature
FILL_LEVEL = 64  # a quarter of full ink: at full ink nearly anything deactivates a feature
N_PLACES = 8  # to which a region is moved; each image takes two, those with most ink to change
STEP = 3  # pixels of MNIST between two such places


class EditTest(NamedTuple):
    """On how many of n images the feature's activity changed: by the edit as named, and by the same
    edit elsewhere."""

    n: int
    named: int
    elsewhere: int
    only_named: int
    only_elsewhere: int

    @classmethod
    def of(cls, named: np.ndarray, elsewhere: np.ndarray) -> EditTest:
        """From whether activity changed on each image, (n,) bool each."""
        cells = np.bincount(2 * named + elsewhere, minlength=4).tolist()
        _, only_elsewhere, only_named, both = cells
        n_named, n_elsewhere = only_named + both, only_elsewhere + both
        return cls(len(named), n_named, n_elsewhere, only_named, only_elsewhere)

    @property
    def phi(self) -> float:
        """Correlation of the two edits over images; in a positive one the numerator is reduced by
        n / 2, as in Newcombe's method 10."""
        both, neither = self.named - self.only_named, self.n - self.named - self.only_elsewhere
        cross = both * neither - self.only_named * self.only_elsewhere
        if cross > 0:
            cross = max(0, cross - self.n / 2)
        unchanged = (self.n - self.named) * (self.n - self.elsewhere)
        return cross / math.sqrt(self.named * self.elsewhere * unchanged or 1)

    def difference(self) -> tuple[float, float, float]:
        """Share changed by the named edit less that changed elsewhere, and its 95% interval: method
        10 of Newcombe (1998, Statistics in Medicine 17:2635-2650), for pairs."""
        named, elsewhere = self.named / self.n, self.elsewhere / self.n
        low, high = wilson_interval(self.named, self.n)
        other_low, other_high = wilson_interval(self.elsewhere, self.n)

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(0.0, a * a - 2 * self.phi * a * b + b * b))

        value = named - elsewhere
        down = reach(named - low, other_high - elsewhere)
        up = reach(high - named, elsewhere - other_low)
        return value, value - down, value + up


# --------------------------------------------------------------------------------------------------
# Where else could a shape be?
# --------------------------------------------------------------------------------------------------


def regions_of(cells: np.ndarray) -> np.ndarray:
    """(R, h, w) bool, the 4-connected regions of cells (h, w) bool, in reading order."""
    label, n = ndimage.label(cells)
    return label == np.arange(1, n + 1)[:, None, None]


def places_elsewhere(region: np.ndarray, free: np.ndarray, step: int) -> np.ndarray:
    """(S, P) float32 0 or 1, at most N_PLACES, the region (h, w) moved by multiples of `step` to
    where most of its cells are `free` (h, w), without those that are not; the nearest first where
    equally many are.

    Empty where no move leaves any.
    """
    height, width = region.shape
    row, column = region.nonzero()
    down, right = moves(height, width, step)
    # A frame of cells that are not free, as wide as the farthest move, around the canvas.
    framed = np.pad(free, ((height, height), (width, width)))
    at = (row + height) * 3 * width + column + width  # in the framed canvas
    fits = framed.ravel()[at + (down * 3 * width + right)[:, None]]  # (moves, cells)
    # Sorted by distance already, and the sort is stable.
    order = np.argsort(-fits.sum(1), kind="stable")[:N_PLACES]
    order = order[fits[order].any(1)]
    places = np.zeros((len(order), height * width), dtype=np.float32)
    for place, move in zip(places, order, strict=True):
        fitting = fits[move]
        place[(row + down[move])[fitting] * width + (column + right[move])[fitting]] = 1.0
    return places


@functools.cache
def moves(height: int, width: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps (down, right) by multiples of `step` within a canvas, the shortest first, then by down
    and right."""
    down, right = np.meshgrid(
        np.arange(-((height - 1) // step), (height - 1) // step + 1) * step,
        np.arange(-((width - 1) // step), (width - 1) // step + 1) * step,
        indexing="ij",
    )
    down, right = down.ravel(), right.ravel()
    order = np.lexsort((right, down, abs(down) + abs(right)))
    return down[order], right[order]


class Shapes(NamedTuple):
    """The cells of one sign of a drawing, and where their regions could be instead."""

    cells: Tensor  # (P,) 0 or 1
    elsewhere: list[Tensor]  # (S, P) 0 or 1 for each region

    @classmethod
    def of(cls, cells: np.ndarray, free: np.ndarray, step: int) -> Shapes:
        """From cells (h, w) bool and the cells that are free (h, w) bool."""
        moved = [torch.from_numpy(places_elsewhere(r, free, step)) for r in regions_of(cells)]
        return cls(torch.from_numpy(cells.reshape(-1)).float(), moved)

    def other(self, available: Tensor) -> Tensor:
        """(B, P) 0 or 1, each region at the two places that have most of what is `available` (B,
        P): a single one often has less than the region itself."""
        if not self.elsewhere:
            return torch.zeros_like(available)
        places = torch.cat(self.elsewhere)  # of all regions
        amounts = available @ places.T
        chosen = torch.zeros_like(amounts)
        sizes = [len(of_region) for of_region in self.elsewhere]
        for own, part in zip(amounts.split(sizes, 1), chosen.split(sizes, 1), strict=True):
            order = torch.sort(own, dim=1, descending=True, stable=True).indices
            part.scatter_(1, order[:, :2], 1.0)
        return (chosen @ places).clamp(max=1)


class Drawn(NamedTuple):
    """A drawing, prepared for edits."""

    wanted: Shapes
    unwanted: Shapes

    @classmethod
    def of(cls, weights: np.ndarray, canvas: Canvas) -> Drawn:
        """From a drawing (h, w)."""
        free = canvas.inked.numpy().reshape(weights.shape) & (weights == 0)
        step = max(1, round(STEP * canvas.scale))
        return cls(Shapes.of(weights > 0, free, step), Shapes.of(weights < 0, free, step))


# --------------------------------------------------------------------------------------------------
# Edits
# --------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]  # changes of levels (B, P), as named and elsewhere


def _as_much_elsewhere(named: Tensor, elsewhere: Tensor) -> Pair:
    """Both changes (B, P), of one sign each, that elsewhere scaled down where it is larger."""
    of_named, of_other = named.abs().sum(1, keepdim=True), elsewhere.abs().sum(1, keepdim=True)
    return named, elsewhere * (of_named / of_other.clamp(min=1)).clamp(max=1)


def erase(levels: Tensor, shapes: Shapes) -> Pair:
    """The changes that take away the ink of levels (B, P) in the shapes."""
    return _as_much_elsewhere(-levels * shapes.cells, -levels * shapes.other(levels))


def paint(levels: Tensor, shapes: Shapes, up_to: int) -> Pair:
    """The changes that bring the shapes to the level `up_to`, where they have less."""
    missing = (up_to - levels).clamp(min=0)
    return _as_much_elsewhere(missing * shapes.cells, missing * shapes.other(missing))


def edited_images(
    k: int, activity: Activity, strong_from: float | None = None
) -> tuple[Tensor, Tensor]:
    """The active and the inactive images that tests of feature k edit, at most N_EDIT each; from
    `strong_from` on an image counts as active."""
    active = activity.of(k)[0][strong_pairs(k, activity, strong_from)]
    is_inactive = torch.ones(len(activity.labels), dtype=torch.bool)
    is_inactive[active] = False
    return evenly_spaced(active, N_EDIT), evenly_spaced(is_inactive.nonzero()[:, 0], N_EDIT)


def make_edits(drawn: Drawn, active: Tensor, inactive: Tensor) -> dict[str, Pair]:
    """The changes of each of EDITS that the drawing allows, of levels (B, P).

    erasing   ink is taken from the wanted cells of active images: does the feature turn inactive?
    filling   the unwanted cells of active images are painted: does it turn inactive?
    painting  inactive images are made as drawn: does it turn active?
    """
    edits = {}
    wanted, unwanted = bool(drawn.wanted.elsewhere), bool(drawn.unwanted.elsewhere)
    if wanted:
        edits["erasing"] = erase(active, drawn.wanted)
    if unwanted:
        edits["filling"] = paint(active, drawn.unwanted, FILL_LEVEL)
    if wanted or unwanted:
        removed, removed_elsewhere = erase(inactive, drawn.unwanted)
        added, added_elsewhere = paint(inactive, drawn.wanted, FULL_INK)
        elsewhere = (removed_elsewhere + added_elsewhere).clamp(-inactive, FULL_INK - inactive)
        edits["painting"] = (removed + added, elsewhere)
    return edits


def acts_of_feature(layer: fa.ExplainedLayer, k: int, images: Tensor) -> Tensor:
    """(B,) activations of feature k on images (B, C, H, W), the largest over positions."""
    acts = layer.acts_of(layer.raw(images), k)
    return acts.amax(1) if layer.has_positions else acts


def edited_cells(
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    crops: Crops,
    chosen: Tensor,
    active: Tensor,
    activity: Activity,
) -> Tensor:
    """(n,) cells around which images `chosen` (n, C, H, W) are edited: in the `active` ones (m,),
    which come first, those of peaks, unless these are prefix tokens; elsewhere those of the largest
    score."""
    cells = crops.scores(h.weights[None], chosen)[1][0]
    at = torch.searchsorted(activity.of(h.feature)[0], active)
    peaks = activity.peaks_of(h.feature)[at] - layer.positions.n_prefix
    cells[: len(active)] = torch.where(peaks >= 0, peaks, cells[: len(active)])
    return cells


@torch.no_grad()
def edit_tests(
    h: Hypothesis,
    layer: fa.ExplainedLayer,
    images: Tensor,
    activity: Activity,
    canvas: Canvas,
    drawn: Drawn | None = None,
    crops: Crops | None = None,
) -> dict[str, EditTest]:
    """The tests of a hypothesis by those of EDITS that its drawing allows, on images (N, C, H, W)
    of which at least one is active and one is not; `activity` is theirs, and `drawn` the prepared
    drawing, where it is at hand. Images that can be edited as named, but not elsewhere, are left
    out, and tests of fewer than MIN_ACTIVE images.

    With `crops` active images are edited around the feature's peak, and inactive ones around the
    position where the drawing has the largest score."""
    if not h.is_drawn:
        return {}
    on, off = edited_images(h.feature, activity, h.strong_from)
    chosen = images[torch.cat([on, off]).to(images.device)]
    if crops is None:
        levels = canvas.levels(chosen)
    else:
        cells = edited_cells(h, layer, crops, chosen, on, activity)
        levels = crops.levels(chosen, cells)
    drawn = drawn or Drawn.of(h.weights, canvas)
    edits = make_edits(drawn, levels[: len(on)], levels[len(on) :])
    rows, changes = [], []
    for name, pair in edits.items():
        own = torch.arange(len(chosen))
        own = own[len(on) :] if name == "painting" else own[: len(on)]
        rows += [own, own]
        changes += pair
    rows, changes = torch.cat(rows), torch.cat(changes)
    given = chosen[rows.to(chosen.device)]
    if crops is None:
        edited = canvas.add_ink(given, changes / FULL_INK)
    else:
        edited = crops.add_ink(given, cells[rows], changes)
    acts = acts_of_feature(layer, h.feature, edited)
    active = (acts > 0 if h.strong_from is None else acts >= h.strong_from).cpu().numpy()
    tests, start = {}, 0
    for name, (named, _) in edits.items():
        n = len(named)
        turned = active[start : start + 2 * n] == (name == "painting")
        # An edit that changes ink only where it is named shows nothing about the place.
        there = ((edits[name][1] != 0).any(1) | ~(named != 0).any(1)).numpy()
        if there.sum() >= MIN_ACTIVE:
            tests[name] = EditTest.of(turned[:n][there], turned[n:][there])
        start += 2 * n
    return tests
