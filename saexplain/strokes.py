"""Which pen strokes are on an image, and what are they called?

    inks = place_inks(images)       # (M, N) how much a stroke each exact place is, 0 to 1
    word_inks(inks)                 # (W, N) the same for words such as "long slash upper left"
    why_no_strokes(images)          # a reason, or None where strokes can be named

Takes grey images of 28 x 28 pixels with ink from 0 to 1; gives a fixed vocabulary and its inks. It
reads no model, and proposes and tests nothing.

Key: N images, M places, W words.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saexplain.captions import percent

# --------------------------------------------------------------------------------------------------
# Places: exact pieces of pen stroke on a 28 x 28 image
# --------------------------------------------------------------------------------------------------

SIDE = 28  # height and width in pixels of the images that the vocabulary is made for
DIRECTIONS = {  # steps (down, right)
    "horizontal": (0, 1),
    "vertical": (1, 0),
    "rising": (-1, 1),
    "falling": (1, 1),
}
LENGTHS = (7, 13)  # of a short and of a long piece of stroke, in pixels
GRID = range(3, 26, 2)  # rows and columns on which pieces are centered
HALF_WIDTH = 1.5  # of a stroke, in pixels
BESIDE = (2.0, 4.0)  # the two bands beside a stroke, in pixels from its middle line
DOT_RADIUS = 2.6  # pixels
DOT_LENGTH = 5  # pixels across


class Place(NamedTuple):
    """A piece of pen stroke at an exact position."""

    row: int  # of its center, in pixels
    col: int
    shape: str  # one of DIRECTIONS, or "dot"
    length: int  # pixels


def _place_pixels(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """(28, 28) bool each: the pixels of a place, and those beside it (none for a dot)."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    down, right = rows - place.row, cols - place.col
    if place.shape == "dot":
        return down**2 + right**2 <= DOT_RADIUS**2, np.zeros((SIDE, SIDE), dtype=bool)
    step = np.array(DIRECTIONS[place.shape]) / math.hypot(*DIRECTIONS[place.shape])
    along = abs(down * step[0] + right * step[1]) <= place.length / 2
    across = abs(right * step[0] - down * step[1])
    return along & (across <= HALF_WIDTH), along & (across > BESIDE[0]) & (across <= BESIDE[1])


def place_masks(places: Sequence[Place]) -> Tensor:
    """(n, 28, 28) bool, the pixels of each place."""
    masks = [_place_pixels(place)[0] for place in places]
    return torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE))


def _fits(row: int, col: int, shape: str, length: int) -> bool:
    """Whether both ends of a stroke lie on the image."""
    direction = DIRECTIONS[shape]
    reach = [abs(step) / math.hypot(*direction) * (length - 1) / 2 for step in direction]
    return all(r <= at <= SIDE - 1 - r for at, r in zip((row, col), reach, strict=True))


@functools.cache
def stroke_vocabulary() -> tuple[Place, ...]:
    """All M places that a drawing may contain: those whose ends lie on the image."""
    places = []
    for row, col in itertools.product(GRID, GRID):
        places.append(Place(row, col, "dot", DOT_LENGTH))
        for shape, length in itertools.product(DIRECTIONS, LENGTHS):
            if _fits(row, col, shape, length):
                places.append(Place(row, col, shape, length))
    return tuple(places)


# --------------------------------------------------------------------------------------------------
# Words: regions that a person can picture without a ruler
# --------------------------------------------------------------------------------------------------

CELLS = 5  # rows, and columns, of cells
MARGIN, MIDDLE = 4, 20  # pixels: the cells divide the middle 20 x 20, where MNIST's digits are
CELL_ROWS = ("top", "upper", "", "lower", "bottom")
CELL_COLUMNS = ("far left", "left", "", "right", "far right")
NEAR_CENTER = {  # where only the row, or only the column, is off the middle
    "upper": "above center",
    "lower": "below center",
    "left": "left of center",
    "right": "right of center",
    "": "in center",
}
NOUNS = {  # names of strokes: - | / \\ or, of any shape, ink
    "horizontal": "bar",
    "vertical": "stem",
    "rising": "slash",
    "falling": "backslash",
    "dot": "ink",
}
SIDES_COUNT = 0.5  # ink beside a stroke counts against it, by so much of the ink along it


class Word(NamedTuple):
    """A kind of stroke somewhere in a cell of the image.

    The ink of "stem far left" on an image is the largest over all short vertical strokes centered
    in that cell: mean ink of its pixels, less SIDES_COUNT of that beside it, but not below 0.
    """

    shape: str  # one of DIRECTIONS, or "dot"
    long: bool
    row: int  # of the cell, 0 to CELLS - 1
    col: int

    def words(self) -> str:
        """The name, as in "long slash upper left"."""
        cell = f"{CELL_ROWS[self.row]} {CELL_COLUMNS[self.col]}".strip()
        noun = f"{'long ' if self.long else ''}{NOUNS[self.shape]}"
        return f"{noun} {NEAR_CENTER.get(cell, cell)}"


def _cell(at: int) -> int:
    return min(CELLS - 1, max(0, (at - MARGIN) * CELLS // MIDDLE))


def word_of(place: Place) -> Word:
    """The word whose region a place belongs to."""
    return Word(place.shape, place.length == LENGTHS[1], _cell(place.row), _cell(place.col))


class _Vocabulary(NamedTuple):
    """All places in the order of their words: word w has those from start[w] to start[w + 1]."""

    places: tuple[Place, ...]
    masks: Tensor  # (M, 784) 1 on the pixels of each place, else 0
    sides: Tensor  # (M, 784) the same beside it
    weights: Tensor  # (M, 784) of the mean ink of a place, less SIDES_COUNT of that beside it
    words: tuple[Word, ...]
    start: tuple[int, ...]
    number: dict[Word | Place, int]


@functools.cache
def vocabulary() -> _Vocabulary:
    """The places and words, with the pixels of each place."""
    places = sorted(stroke_vocabulary(), key=word_of)
    along, beside = torch.from_numpy(np.array([_place_pixels(p) for p in places])).unbind(1)
    along, beside = along.flatten(1).float(), beside.flatten(1).float()
    of_sides = beside / beside.sum(1, keepdim=True).clamp(min=1)
    weights = along / along.sum(1, keepdim=True) - SIDES_COUNT * of_sides

    words = sorted(set(map(word_of, places)))
    number = {stroke: n for strokes in (words, places) for n, stroke in enumerate(strokes)}
    ends = torch.bincount(torch.tensor([number[word_of(place)] for place in places])).cumsum(0)
    start = (0, *ends.tolist())
    return _Vocabulary(tuple(places), along, beside, weights, tuple(words), start, number)


def word_vocabulary() -> tuple[Word, ...]:
    """All W words that a hypothesis may use."""
    return vocabulary().words


def number_of(stroke: Word | Place) -> int:
    """The index of a stroke among the words, or among the places, of `vocabulary`."""
    return vocabulary().number[stroke]


def places_of(stroke: Word | Place) -> slice:
    """The indices of the places that a stroke may mean."""
    n, start = number_of(stroke), vocabulary().start
    return slice(start[n], start[n + 1]) if isinstance(stroke, Word) else slice(n, n + 1)


class Strokes(NamedTuple):
    """Strokes of a hypothesis, as words, or of its drawing, as places."""

    there: tuple[Word | Place, ...] = ()
    absent: tuple[Word | Place, ...] = ()


# --------------------------------------------------------------------------------------------------
# The ink of strokes on images
# --------------------------------------------------------------------------------------------------

IMAGES_AT_ONCE = 2048  # in one matrix product: bounds the memory


@torch.no_grad()
def place_inks(images: Tensor) -> Tensor:
    """(M, N) float32, how much a stroke each place is on images (N, 28, 28) or (N, 1, 28, 28), 0 to
    1."""
    weights, pixels = vocabulary().weights, images.flatten(1).float().cpu()
    inks = torch.empty(len(weights), len(pixels), dtype=torch.float32)
    for out, some in zip(inks.split(IMAGES_AT_ONCE, 1), pixels.split(IMAGES_AT_ONCE), strict=True):
        torch.clamp(weights @ some.T, min=0, out=out)
    return inks


def word_inks(of_places: Tensor) -> Tensor:
    """(W, N) the ink of each word on images with `place_inks` of_places (M, N)."""
    pairs = itertools.pairwise(vocabulary().start)
    return torch.stack([of_places[first:last].amax(0) for first, last in pairs])


N_CHECKED = 2000  # images of which strokes are checked
BLANK_BELOW = 0.1  # ink
THICK, MAX_THICK_SHARE = 5, 0.1  # pixels; of MNIST's ink 1% is so thick, of Fashion-MNIST's 34%


def why_no_strokes(images: Tensor) -> str | None:
    """The reason why strokes cannot be measured on images (N, ...), or None."""
    shape = tuple(images.shape[1:])
    if shape not in ((1, SIDE, SIDE), (SIDE, SIDE)):
        return f"images have shape {shape}; strokes need grey images of {SIDE} x {SIDE} pixels"
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return f"pixels run from {low:g} to {high:g}; strokes need ink from 0 to 1"
    return None


def why_unlike_strokes(images: Tensor) -> str | None:
    """The reason why images (N, 28, 28) or (N, 1, 28, 28) are no pen strokes on a blank ground, or
    None."""
    some = images.reshape(-1, 1, SIDE, SIDE)[:N_CHECKED]
    blank = float((some < BLANK_BELOW).float().mean())
    if blank < 0.5:
        return f"{percent(blank)} of the pixels are blank; strokes need a blank ground"
    core = -torch.nn.functional.max_pool2d(-some, THICK, stride=1)  # ink with as much all around
    thick = float(core.sum() / some.sum().clamp(min=1e-9))
    if thick > MAX_THICK_SHARE:
        return f"{percent(thick)} of the ink is {THICK} x {THICK} pixels thick; strokes are thinner"
    return None
