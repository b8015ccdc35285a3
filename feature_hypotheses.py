"""Claims: what may a feature mean, in words and in a form that a program can check?

    hypotheses = propose_hypotheses(layer, images, labels)     # one for every feature
    statement(hypotheses[k])                                   # "Ink top, no slash in centre ..."
    sha256 = freeze_hypotheses(hypotheses, "hypotheses.json")  # no change stays unseen from here on
    hypotheses, rule = read_hypotheses("hypotheses.json", sha256)

Takes a `fa.ExplainedLayer` and discovery images (N, ...) with labels (N,), and gives `Hypothesis`
objects. What is said is a `Word` for each stroke: a region, scored and edited as such. What is
drawn beside it is a `Drawing`, exact places. This room never sees an image on which a claim will
be tested: the trial is another room.

Dimension key: N images, C classes, d_sae features, M places, W words, K claims, B images at once,
784 = 28 x 28 pixels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from whole_files import as_kind, read_json

# --------------------------------------------------------------------------------------------------
# Places: exact pieces of pen stroke on a 28 x 28 image
# --------------------------------------------------------------------------------------------------

SIDE = 28  # the vocabulary is made for images of this height and width
DIRECTIONS = {  # steps (down, right)
    "horizontal": (0, 1),
    "vertical": (1, 0),
    "rising": (-1, 1),
    "falling": (1, 1),
}
LENGTHS = (7, 13)  # of a short and of a long piece of stroke, in pixels
GRID = range(3, 26, 2)  # rows and columns on which pieces are centred
HALF_WIDTH = 1.5  # of a stroke, in pixels
BESIDE = (2.0, 4.0)  # the two bands beside a stroke, in pixels from its middle line
DOT_RADIUS = 2.6
DOT_LENGTH = 5  # pixels across


class Place(NamedTuple):
    """A piece of pen stroke."""

    row: int  # of its centre, in pixels
    col: int
    shape: str  # one of DIRECTIONS, or "dot"
    length: int  # pixels


def _pixels_of(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """(28, 28) bool each: the pixels of a place, and those beside it (of a dot: none)."""
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
    masks = [_pixels_of(place)[0] for place in places]
    return torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, SIDE, SIDE))


def _fits(row: int, col: int, shape: str, length: int) -> bool:
    """Whether both ends of a stroke lie on the image."""
    direction = DIRECTIONS[shape]
    for at, step in zip((row, col), direction, strict=True):
        reach = abs(step) / math.hypot(*direction) * (length - 1) / 2
        if at < reach or at + reach > SIDE - 1:
            return False
    return True


@functools.cache
def stroke_vocabulary() -> tuple[Place, ...]:
    """All M places that a drawing may show: those whose ends lie on the image."""
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

CELLS = 5  # the middle 20 rows and columns, where the digits stand, are cut into so many each
ROWS = ("top", "upper", "", "lower", "bottom")
COLUMNS = ("far left", "left", "", "right", "far right")
MIDDLE = {  # where only the row, or only the column, is off the middle
    "upper": "above centre",
    "lower": "below centre",
    "left": "left of centre",
    "right": "right of centre",
    "": "in centre",
}
NOUNS = {  # what a stroke is called: - | / \\ or, of any shape, ink
    "horizontal": "bar",
    "vertical": "stem",
    "rising": "slash",
    "falling": "backslash",
    "dot": "ink",
}
SIDES_COUNT = 0.5  # ink beside a stroke counts against it, by so much of the ink along it


class Word(NamedTuple):
    """A kind of stroke somewhere in a cell of the image.

    "Stem far left" is as true of an image as any short vertical stroke centred in that cell is
    inked with its sides blank: the largest of their mean inks, less SIDES_COUNT of that beside
    them, but not below 0.
    """

    shape: str  # one of DIRECTIONS, or "dot"
    long: bool
    row: int  # of the cell, 0 to CELLS - 1
    col: int

    def words(self) -> str:
        """As in "long slash upper left"."""
        return f"{'long ' if self.long else ''}{NOUNS[self.shape]} {_where(self.row, self.col)}"


def _where(row: int, col: int) -> str:
    """As in "upper far left", of a cell."""
    where = f"{ROWS[row]} {COLUMNS[col]}".strip()
    return MIDDLE.get(where, where)


def _cell(at: int) -> int:
    return min(CELLS - 1, max(0, (at - 4) * CELLS // 20))


def word_of(place: Place) -> Word:
    """The word whose region a place belongs to."""
    return Word(place.shape, place.length == LENGTHS[1], _cell(place.row), _cell(place.col))


class _Vocabulary(NamedTuple):
    """Places, those of a word side by side: it has those from start[w] to start[w + 1]."""

    places: tuple[Place, ...]
    masks: Tensor  # (M, 784) 1 on the pixels of each place, else 0
    sides: Tensor  # (M, 784) the same beside it
    weights: Tensor  # (M, 784) of the mean ink of a place, less SIDES_COUNT of that beside it
    words: tuple[Word, ...]
    start: tuple[int, ...]
    number: dict[Word | Place, int]


@functools.cache
def _vocabulary() -> _Vocabulary:
    places = sorted(stroke_vocabulary(), key=word_of)
    along, beside = torch.from_numpy(np.array([_pixels_of(place) for place in places])).unbind(1)
    along, beside = along.flatten(1).float(), beside.flatten(1).float()
    of_sides = beside / beside.sum(1, keepdim=True).clamp(min=1)
    weights = along / along.sum(1, keepdim=True) - SIDES_COUNT * of_sides

    words = sorted(set(map(word_of, places)))
    number = {stroke: n for strokes in (words, places) for n, stroke in enumerate(strokes)}
    ends = torch.bincount(torch.tensor([number[word_of(place)] for place in places])).cumsum(0)
    start = (0, *ends.tolist())
    return _Vocabulary(tuple(places), along, beside, weights, tuple(words), start, number)


def word_vocabulary() -> tuple[Word, ...]:
    """All W words that a claim may use."""
    return _vocabulary().words


def _number_of(stroke: Word | Place) -> int:
    try:
        return _vocabulary().number[stroke]
    except KeyError:
        raise ValueError(f"{stroke} is not in word_vocabulary() or stroke_vocabulary()") from None


def _places_of(stroke: Word | Place) -> slice:
    """The numbers of the places that a stroke may mean."""
    n, start = _number_of(stroke), _vocabulary().start
    return slice(start[n], start[n + 1]) if isinstance(stroke, Word) else slice(n, n + 1)


IMAGES_AT_ONCE = 2048  # whose products are made at a time


@torch.no_grad()
def place_inks(images: Tensor) -> Tensor:
    """(M, N) float32, how much a stroke each place is on images (N, 28, 28) or (N, 1, 28, 28): 0 to
    1."""
    weights, pixels = _vocabulary().weights, images.flatten(1).float().cpu()
    inks = torch.empty(len(weights), len(pixels), dtype=torch.float32)
    for out, some in zip(inks.split(IMAGES_AT_ONCE, 1), pixels.split(IMAGES_AT_ONCE), strict=True):
        torch.clamp(weights @ some.T, min=0, out=out)
    return inks


def word_inks(of_places: Tensor) -> Tensor:
    """(W, N), how true each word is of images of which `place_inks` (M, N) are given."""
    pairs = itertools.pairwise(_vocabulary().start)
    return torch.stack([of_places[first:last].amax(0) for first, last in pairs])


# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------

PARTS = ("ink", "class", "effect")


class Rule(NamedTuple):
    """The thresholds by which claims are judged; they are frozen together with them."""

    class_auroc: float = 0.65  # smallest AUROC with which the labels must predict activity ...
    ink_auroc: float = 0.75  # ... and the ink ...
    both_auroc: float = 0.85  # ... and the sentence as a whole
    edit_difference: float = 0.25  # share of images changed as named, less that changed elsewhere
    effect_size: float = 0.5  # smallest share of a predicted change of a logit that must be found
    percentile: float = 0.95  # of directions of the same norm, which an effect must exceed
    min_active: int = 8  # active images, and silent ones, below which nothing is claimed or judged
    false_discovery_rate: float = 0.01  # of all tests of all features together


class Strokes(NamedTuple):
    """What is said, as words, or drawn, as places."""

    there: tuple[Word | Place, ...] = ()
    absent: tuple[Word | Place, ...] = ()


class Effect(NamedTuple):
    """The logits that fall and rise most when the feature is removed from the images that fire it,
    and by how much; what it raises falls without it. None: no claim."""

    raises: int | None
    raised_by: float
    lowers: int | None
    lowered_by: float


class Hypothesis(NamedTuple):
    """What a feature is claimed to mean. A part that claims nothing is empty; `why_not` says
    why."""

    feature: int
    ink: Strokes  # words
    often: tuple[int, ...]  # labels that make up more of what fires it than of all images
    hardly: tuple[int, ...]  # labels that hardly do
    label_scores: tuple[float, ...]  # (C,) what each label adds to the score
    effect: Effect | None
    cut: float | None  # an image scored so high is said to fire it
    drawing: Strokes  # places; not a part of the sentence
    typical_activation: float  # mean where it is active
    label_histogram: tuple[int, ...]  # active discovery images by label
    n_images: int  # discovery images
    influence: float  # its share of all that removing single features does to the logits
    changes: float  # share of the images that fire it whose prediction changes without it
    why_not: dict[str, str]
    classes: tuple[str, ...] = ()  # what labels and logits are called; empty: by their numbers

    @property
    def n_active(self) -> int:
        return sum(self.label_histogram)

    def proposes(self, part: str) -> bool:
        if part == "ink":
            return any(self.ink)
        return bool(self.often or self.hardly) if part == "class" else self.effect is not None

    @property
    def says_little(self) -> bool:
        """Whether the sentence says that removing the feature changes little."""
        return self.effect is None and self.changes < LITTLE_SAID and any(map(self.proposes, PARTS))

    def drops(self, part: str, why: str) -> Hypothesis:
        """Without a part."""
        empty = {
            "ink": {"ink": Strokes()},
            "class": {"often": (), "hardly": (), "label_scores": ()},
            "effect": {"effect": None},
        }
        return self._replace(**empty[part], why_not={**self.why_not, part: why})


# --------------------------------------------------------------------------------------------------
# How a claim predicts where its feature is active
# --------------------------------------------------------------------------------------------------


def strokes_score(strokes: Strokes, inks: Tensor) -> Tensor:
    """(N,) the inks that are said to be there, less those that are said not to be; every one counts
    alike. inks (W or M, N) are those of `word_inks` or `place_inks`."""
    score = torch.zeros(inks.shape[1], dtype=inks.dtype)
    for stroke in strokes.there:
        score += inks[_number_of(stroke)]
    for stroke in strokes.absent:
        score -= inks[_number_of(stroke)]
    return score


def part_scores(h: Hypothesis, inks: Tensor | None, labels: Tensor) -> dict[str, np.ndarray]:
    """By how much each part of a claim predicts activity: "ink", "class", "both" -> (N,).

    `inks` (W, N) are those of `word_inks`, labels (N,). A claim of one part predicts by that part
    alone, and "both", otherwise their sum, is the very same array. One without an ink or class part
    has no scores.
    """
    scores = {}
    if h.proposes("ink"):
        scores["ink"] = strokes_score(h.ink, inks).numpy()
    if h.proposes("class"):
        scores["class"] = torch.tensor(h.label_scores, dtype=torch.float32)[labels].numpy()
    if len(scores) == 2:
        scores["both"] = scores["ink"] + scores["class"]
    elif scores:
        scores["both"] = next(iter(scores.values()))
    return scores


def drawing_score(h: Hypothesis, inks: Tensor, labels: Tensor) -> np.ndarray:
    """(N,) the same for the drawing in place of the words; inks (M, N) are those of
    `place_inks`."""
    score = strokes_score(h.drawing, inks)
    if h.proposes("class"):
        score += torch.tensor(h.label_scores, dtype=torch.float32)[labels]
    return score.numpy()


class Ranks(NamedTuple):
    """Where the scores of m active images, ascending, stand among those of n others: (m,) each."""

    own_less: np.ndarray  # active images with a smaller score
    own_up_to: np.ndarray  # ... with one at most as large
    less: np.ndarray  # others with a smaller score
    up_to: np.ndarray  # ... with one at most as large
    ranked: np.ndarray  # (m + n,) all scores, ascending
    m: int
    n: int

    @property
    def auroc(self) -> float:
        """Share of (active, other) pairs in which the active image has the larger score, a tie
        counting one half."""
        return int((self.less + self.up_to).sum()) / (2 * self.m * self.n)


def ranks_of(scores: np.ndarray, at: np.ndarray) -> Ranks:
    """Of scores (N,), of which those at the indices `at` (m,) are of active images.

    Raises ValueError unless some images are active and some are not.
    """
    m, n = len(at), len(scores) - len(at)
    if m == 0 or n == 0:
        counts = f"{m} of {len(scores)} images are active"
        raise ValueError(f"{counts}: at least one must be, and one must not")
    own, ranked = np.sort(scores[at]), np.sort(scores)
    own_less, own_up_to = (np.searchsorted(own, own, side) for side in ("left", "right"))
    all_less, all_up_to = (np.searchsorted(ranked, own, side) for side in ("left", "right"))
    return Ranks(own_less, own_up_to, all_less - own_less, all_up_to - own_up_to, ranked, m, n)


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


def edited_images(h: Hypothesis, activity: fa.Activity) -> tuple[Tensor, Tensor]:
    """The images that tests of a claim edit, at most N_EDIT each, spread evenly: of those that fire
    the feature, and of those that do not though what is said about labels is true of them."""
    silent = ~activity.is_active(h.feature)
    said = np.ones(int(activity.labels.max()) + 1, dtype=bool)
    if h.often:
        said[:] = False
        said[[c for c in h.often if c < len(said)]] = True
    said[[c for c in h.hardly if c < len(said)]] = False
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
    v = _vocabulary()
    along, beside = torch.zeros_like(x), torch.zeros_like(x)
    for stroke in strokes:
        some = _places_of(stroke)
        chosen = (x @ v.weights[some].T).argmax(1) + some.start
        torch.maximum(along, v.masks.index_select(0, chosen), out=along)
        torch.maximum(beside, v.sides.index_select(0, chosen), out=beside)
    return along, beside * (1 - along)


@functools.cache
def _region(stroke: Word | Place) -> Tensor:
    """(784,) 1 on all pixels that a stroke may mean, else 0."""
    return _vocabulary().masks[_places_of(stroke)].amax(0)


@functools.cache
def _places_like(shape: str, long: bool) -> Tensor:
    """(n, 784) 0 or 1, all places of a shape and length."""
    v = _vocabulary()
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
        return layer.feature_acts(x.unflatten(1, self.shape))[:, k].cpu()


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


# --------------------------------------------------------------------------------------------------
# Propose ink: strokes, one by one, while each adds to the prediction
# --------------------------------------------------------------------------------------------------

SAID, DRAWN = (3, 1), (3, 3)  # at most so many strokes with ink, and without
MOST_LABELS = 2  # said to be frequent, and as many said to be rare
OFTEN, HARDLY = 1.5, 0.25  # times a label's share of all images, at least, and at most
WORTH_A_CLAUSE = 1.03  # a further clause must raise the squared correlation by this factor
PATTERN_IMAGES = 32  # over which input patterns are averaged; any, for a model linear in the pixels
N_CLAUSE = 24  # images on which a clause is edited
CHOICES = 3  # of words, each without those whose edit moved nothing
CLAUSE_MOVES = 0.2  # what its edit must cost beyond an edit elsewhere, see `clause_moves`


def _name_labels(histogram: np.ndarray, label_counts: np.ndarray) -> dict[str, tuple]:
    """What is said about labels, and what each label adds to the score.

    Said are the labels that make up most of what fires the feature, MOST_LABELS of those whose
    share is OFTEN times their share of all images; where there is none, those whose share is
    HARDLY. The score of a label is the square root of how often its images fire the feature
    according to what is said, in units of the highest: the labels named by their share, the
    others alike by what is left.
    """
    share, usual = histogram / histogram.sum(), label_counts / label_counts.sum()
    lift = share / np.maximum(usual, 1e-9)
    most = np.argsort(-share, kind="stable").tolist()
    often = [c for c in most if share[c] > 0 and lift[c] >= OFTEN][:MOST_LABELS]
    least = np.argsort(lift, kind="stable").tolist()
    hardly = [c for c in least if usual[c] > 0 and lift[c] <= HARDLY][:MOST_LABELS]
    rate = np.ones(len(share))
    if often:
        hardly = []
        rate[:] = (1 - share[often].sum()) / max(1 - usual[often].sum(), 1e-9)
        rate[often] = lift[often]
    rate[hardly] = 0
    scores = np.sqrt(rate / rate.max()).astype(np.float32).tolist()
    return {"often": tuple(often), "hardly": tuple(hardly), "label_scores": tuple(scores)}


def _class_auroc(h: Hypothesis, label_counts: np.ndarray) -> float:
    """AUROC of the labels' scores on the discovery images, from their counts."""
    active, scores = np.array(h.label_histogram), np.array(h.label_scores)
    higher = np.sign(scores[:, None] - scores) / 2 + 0.5  # (C, C), one half where equal
    others = label_counts - active
    return float(active @ higher @ others / (active.sum() * others.sum()))


class _Moments(NamedTuple):
    """Second moments over images of inks, of activity (0 or 1) and of the labels' scores."""

    words: Tensor  # (W, W)
    activity: Tensor  # (K, W) with the words
    labels: Tensor  # (K, W) with the words
    label_activity: Tensor  # (K,)
    label_variance: Tensor  # (K,)

    def of(self, features: Tensor) -> _Moments:
        return _Moments(self.words, *(of_all[features] for of_all in self[1:]))


def _moments(inks: Tensor, activity: fa.Activity, label_score: Tensor) -> _Moments:
    """Of inks (W, N), and of the scores of each label for each feature, (d_sae, C)."""
    n, n_classes = inks.shape[1], label_score.shape[1]
    mean = inks.mean(1, dtype=torch.float64)
    words = torch.zeros(len(inks), len(inks), dtype=torch.float64)
    for some in inks.split(IMAGES_AT_ONCE, dim=1):
        words += some @ some.T
    words = words / n - torch.outer(mean, mean)

    share = activity.n_active.double() / n
    sums = torch.nn.functional.embedding_bag(
        activity.image, inks.T.contiguous(), activity.start[:-1], mode="sum"
    )
    with_activity = sums.double() / n - share[:, None] * mean

    one_hot = torch.nn.functional.one_hot(activity.labels, n_classes).float()
    frequency = one_hot.mean(0, dtype=torch.float64)
    of_label = (inks @ one_hot).double().T / n - frequency[:, None] * mean  # (C, W)
    score = label_score.double()
    active = label_histograms(activity, n_classes) / n
    centred = torch.from_numpy(active) - share[:, None] * frequency
    variance = (score**2 @ frequency) - (score @ frequency) ** 2
    return _Moments(words, with_activity, score @ of_label, (score * centred).sum(1), variance)


def _moments_of_score(chosen: Tensor, m: _Moments) -> tuple[Tensor, Tensor]:
    """(K,) each: the covariance with activity, and the variance, of the score: labels and the words
    chosen (K, W) in -1, 0, 1."""
    with_activity = m.label_activity + (chosen * m.activity).sum(1)
    variance = m.label_variance + (chosen * (2 * m.labels + chosen @ m.words)).sum(1)
    return with_activity, variance


def _squared_correlation(covariance: Tensor, variance: Tensor) -> Tensor:
    """In units of the variance of activity; negative where the correlation is."""
    return covariance * covariance.abs() / variance.clamp(min=1e-12)


def _same_cell(strokes: Sequence[Word | Place]) -> Tensor | None:
    """(W, W) float64, 1 where two words have the same cell, which a sentence need not name twice;
    None for places."""
    if isinstance(strokes[0], Place):
        return None
    cell = torch.tensor([word.row * CELLS + word.col for word in strokes])
    return (cell[:, None] == cell).double()


def _best_addition(
    chosen: Tensor, m: _Moments, allowed: Tensor, most: tuple[int, int], alike: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The squared correlation with the best further stroke, and its number, (K,) each. allowed
    (K, W) is 1 where a stroke may be there, -1 where it may be absent; alike (W, W) is 1 for two of
    the same sign of which one is enough."""
    with_activity, variance = _moments_of_score(chosen, m)
    with_words = m.labels + chosen @ m.words
    full_up = (chosen > 0).sum(1, keepdim=True) >= most[0]
    full_down = (chosen < 0).sum(1, keepdim=True) >= most[1]
    if alike is None:
        refused = chosen != 0
    else:
        refused = ((chosen > 0).double() @ alike > 0) & (allowed > 0)
        refused |= ((chosen < 0).double() @ alike > 0) & (allowed < 0)
    refused |= allowed * m.activity <= 0
    refused |= full_up & (allowed > 0) | full_down & (allowed < 0)
    covariance = with_activity[:, None] + allowed * m.activity
    variance = variance[:, None] + 2 * allowed * with_words + m.words.diagonal()
    gain = _squared_correlation(covariance, variance)
    return gain.masked_fill(refused, -1.0).max(1)


def _choose(
    m: _Moments, allowed: Tensor, most: tuple[int, int], strokes: Sequence[Word | Place]
) -> list[Strokes]:
    """The strokes that together with the labels predict each feature best, greedily: while a
    further one raises the squared correlation by WORTH_A_CLAUSE, and after each every earlier one
    may give way to a better one. No cell is named twice. allowed (K, W): see `_best_addition`."""
    n_features, n_strokes = allowed.shape
    chosen = torch.zeros_like(allowed)
    order = torch.full((n_features, sum(most)), n_strokes)
    growing = torch.ones(n_features, dtype=torch.bool)
    alike = _same_cell(strokes)

    def put(rows: Tensor, at: int, stroke: Tensor) -> None:
        order[rows, at] = stroke[rows]
        chosen[rows, stroke[rows]] = allowed[rows, stroke[rows]]

    def now() -> Tensor:
        return _squared_correlation(*_moments_of_score(chosen, m))

    for n in range(sum(most)):
        found, stroke = _best_addition(chosen, m, allowed, most, alike)
        growing &= (found > 0) & (found > WORTH_A_CLAUSE * now())
        put(growing.nonzero()[:, 0], n, stroke)
        for earlier in range(n):
            rows = growing.nonzero()[:, 0]
            without = chosen.clone()
            without[rows, order[rows, earlier]] = 0
            found, stroke = _best_addition(without, m, allowed, most, alike)
            better = growing & (found > (1 + 1e-9) * now())
            chosen[better] = without[better]
            put(better.nonzero()[:, 0], earlier, stroke)
    said = []
    for row, signs in zip(order.tolist(), chosen, strict=True):
        used = [n for n in row if n < n_strokes]
        there = tuple(strokes[n] for n in used if signs[n] > 0)
        said.append(Strokes(there, tuple(strokes[n] for n in used if signs[n] < 0)))
    return said


def _causal_signs(heats: Tensor) -> tuple[Tensor, Tensor]:
    """(d_sae, M) and (d_sae, W) float64, 1 where ink in a place, or in those of a word, raises the
    feature on average, -1 where it lowers it; heats (d_sae, 784) are input patterns. So what is
    named is a cause and not mere company."""
    v = _vocabulary()
    of_places = heats @ (v.masks / v.masks.sum(1, keepdim=True)).T
    pairs = itertools.pairwise(v.start)
    of_words = torch.stack([of_places[:, first:last].mean(1) for first, last in pairs], 1)
    return torch.sign(of_places).double(), torch.sign(of_words).double()


@torch.no_grad()
def clause_moves(
    ink: Strokes,
    new: Strokes,
    k: int,
    layer: fa.ExplainedLayer,
    editable: Editable,
    activity: fa.Activity,
) -> dict[Word, float]:
    """What the edit of each of the `new` words costs on images that fire feature k, less what an
    edit elsewhere costs: of ink that is there, which is erased but for what earlier words of `ink`
    name too, the share of the activation; of ink that is absent, which is painted, the share of the
    images on which the feature turns off."""
    at, acts = activity.of(k)
    editor = Editor(ink, editable, k)
    chosen = spread(torch.arange(len(at)), N_CLAUSE)
    x, before = editable.pixels.index_select(0, at[chosen]), acts[chosen]
    pairs = []
    for word in new.there:
        pairs.append(editor.erase(x, [word], spared=ink.there[: ink.there.index(word)]))
    pairs += [editor.paint(x, [word]) for word in new.absent]
    edited = torch.cat([side for pair in pairs for side in pair])
    after = editable.feature_acts(layer, edited, k).view(len(pairs), 2, -1)
    kept = (after / before).clamp(max=2).mean(2)  # one image that fires more must not decide
    fires = (after > 0).float().mean(2)
    n = len(new.there)
    left = torch.cat([kept[:n], fires[n:]])
    return dict(zip((*new.there, *new.absent), (left[:, 1] - left[:, 0]).tolist(), strict=True))


def _say_ink(
    hypotheses: list[Hypothesis],
    moments: _Moments,
    allowed: Tensor,
    layer: fa.ExplainedLayer,
    editable: Editable,
    activity: fa.Activity,
) -> list[Hypothesis]:
    """The claims with words for ink, each of which holds by itself: it adds to the prediction, and
    its edit moves the feature. One that does not move it is given up and the choice made again,
    CHOICES times at most. allowed (d_sae, W), see `_best_addition`, is changed."""
    found, words = list(hypotheses), word_vocabulary()
    holds: list[set[Word]] = [set() for _ in found]  # words that are known to move the feature
    choosing = [k for k, h in enumerate(found) if "ink" not in h.why_not]
    for _ in range(CHOICES):
        some = torch.tensor(choosing, dtype=torch.int64)
        chosen = _choose(moments.of(some), allowed[some], SAID, words)
        again = []
        for k, ink in zip(choosing, chosen, strict=True):
            new = Strokes(*(tuple(w for w in part if w not in holds[k]) for part in ink))
            idle = set()
            if any(new):
                moves = clause_moves(ink, new, k, layer, editable, activity)
                idle = {word for word, by in moves.items() if by < CLAUSE_MOVES}
                holds[k] |= moves.keys() - idle
            kept = Strokes(*(tuple(w for w in part if w not in idle) for part in ink))
            found[k] = found[k]._replace(ink=kept)
            if idle:
                allowed[k, [_number_of(word) for word in idle]] = 0
                again.append(k)
        choosing = again
    return found


# --------------------------------------------------------------------------------------------------
# Propose an effect: further than other directions of the same length
# --------------------------------------------------------------------------------------------------

N_DIRECTIONS = 128  # the same ones for all features
OTHERS_SEED = 20_000_003  # no run's own: the directions compared with an SAE's are others
DIRECTION_IMAGES = 16  # on which they are removed
LITTLE = 0.05  # an effect is little where at most this share of predictions changes ...
LITTLE_SAID = 0.01  # ... and it is said to be where less than this does
EFFECT_MARGIN = 1.25  # by which it must exceed theirs to be claimed
SMALLEST_EFFECT = 0.02  # smallest mean change of a logit that is worth a statement


@functools.cache
def other_directions_of(d_in: int) -> Tensor:
    """(N_DIRECTIONS, d_in) unit vectors drawn at random, always the same."""
    generator = torch.Generator().manual_seed(OTHERS_SEED)
    noise = torch.randn(N_DIRECTIONS, d_in, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(noise, dim=1)


@torch.no_grad()
def removed_by_others(
    layer: fa.ExplainedLayer, raw: Tensor, acts: Tensor, norm: float
) -> np.ndarray:
    """(N_DIRECTIONS, n, C) float64, by how much each logit falls on images with preactivations
    raw (n, d_in) when `acts` (n,) times another direction of length `norm` is removed."""
    shifts = other_directions_of(raw.shape[1]).to(raw) * norm * layer.std
    states = raw - acts[:, None] * shifts[:, None]  # (N_DIRECTIONS, n, d_in)
    base, without = layer.logits_from_raw(raw), layer.logits_from_raw(states.flatten(0, 1))
    return (base - without.view(*states.shape[:2], -1)).cpu().double().numpy()


def largest_moves(falls: np.ndarray) -> dict[str, np.ndarray]:
    """(N_DIRECTIONS, n) each: by how much the logit that a direction "raises" most falls without
    it, and the one it "lowers" most rises; `falls` are those of `removed_by_others`.

    Each direction may choose its logits, as the feature does.
    """
    mean, rows = falls.mean(1), np.arange(len(falls))
    return {"raises": falls[rows, :, mean.argmax(1)], "lowers": -falls[rows, :, mean.argmin(1)]}


def by_chance(
    h: Hypothesis, layer: fa.ExplainedLayer, raw: Tensor, activity: fa.Activity, share: float
) -> dict[str, float]:
    """How far a direction of the feature's length moves a logit on average that goes further than a
    `share` of all; raw (N, d_in) are preactivations of all images."""
    at, acts = activity.of(h.feature)
    chosen = spread(torch.arange(len(at)), DIRECTION_IMAGES)
    norm = float(layer.sae.W_dec[h.feature].norm())
    rows, acts = raw[at[chosen].to(raw.device)], acts[chosen].to(raw.device)
    moves = largest_moves(removed_by_others(layer, rows, acts, norm))
    return {verb: float(np.quantile(by.mean(1), share)) for verb, by in moves.items()}


def _name_effect(delta: Tensor) -> Effect | None:
    """The logits that fall and rise most when removing the feature changes them by delta (C,)."""
    raises, lowers = int(delta.argmin()), int(delta.argmax())
    raised_by, lowered_by = -float(delta[raises]), float(delta[lowers])
    return _if_any(
        raises if raised_by >= SMALLEST_EFFECT else None,
        raised_by,
        lowers if lowered_by >= SMALLEST_EFFECT else None,
        lowered_by,
    )


def _if_any(
    raises: int | None, raised_by: float, lowers: int | None, lowered_by: float
) -> Effect | None:
    if raises is None and lowers is None:
        return None
    raised_by = 0.0 if raises is None else raised_by
    return Effect(raises, raised_by, lowers, 0.0 if lowers is None else lowered_by)


def _claim_effect(
    h: Hypothesis,
    delta: Tensor,
    layer: fa.ExplainedLayer,
    raw: Tensor,
    activity: fa.Activity,
    rule: Rule,
) -> Hypothesis:
    effect = _name_effect(delta)
    if effect is None:
        return h.drops("effect", f"removing it changes no logit by {SMALLEST_EFFECT} on average")
    chance = by_chance(h, layer, raw, activity, rule.percentile)
    raises, lowers = effect.raises, effect.lowers
    if effect.raised_by <= EFFECT_MARGIN * chance["raises"]:
        raises = None
    if effect.lowered_by <= EFFECT_MARGIN * chance["lowers"]:
        lowers = None
    effect = _if_any(raises, effect.raised_by, lowers, effect.lowered_by)
    if effect is None:
        share = f"{rule.percentile:.0%}"
        return h.drops("effect", f"no logit moves further than {share} of other directions move it")
    return h._replace(effect=effect)


# --------------------------------------------------------------------------------------------------
# Propose: a claim for every feature
# --------------------------------------------------------------------------------------------------


def label_histograms(activity: fa.Activity, n_classes: int) -> np.ndarray:
    """(d_sae, C) int64, the images that fire each feature by label."""
    d_sae = len(activity.n_active)
    cell = activity.feature * n_classes + activity.labels[activity.image]
    return torch.bincount(cell, minlength=d_sae * n_classes).view(d_sae, n_classes).numpy()


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ValueError unless the model knows the labels (N,)."""
    last = int(labels.max())
    if last >= n_classes:
        raise ValueError(f"labels run to {last}, but the model has {n_classes} classes")


def _weak(auroc: float, bar: float) -> str:
    return f"AUROC {auroc:.3f} on the discovery images, {bar} is asked for"


LOOKED_AT = 2000  # images
BLANK_BELOW = 0.1
THICK, MOST_THICK = 5, 0.1  # of MNIST's ink 1% is so thick, of Fashion-MNIST's 34%


def why_no_strokes(images: Tensor) -> str | None:
    """Why strokes cannot be named on such images; None when they can."""
    shape = tuple(images.shape[1:])
    if shape not in ((1, SIDE, SIDE), (SIDE, SIDE)):
        return (
            f"images have shape {shape}; strokes are described on grey {SIDE} x {SIDE} images only"
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return (
            f"pixels run from {low:g} to {high:g}; strokes are described where ink runs from 0 to 1"
        )
    return None


def why_unlike_strokes(images: Tensor) -> str | None:
    """Why images (N, 28, 28) or (N, 1, 28, 28) are no pen strokes on a blank ground; None: they
    are."""
    some = images.reshape(-1, 1, SIDE, SIDE)[:LOOKED_AT]
    blank = float((some < BLANK_BELOW).float().mean())
    if blank < 0.5:
        return f"{percent(blank)} of the pixels are blank; strokes are described on a blank ground"
    core = -torch.nn.functional.max_pool2d(-some, THICK, stride=1)  # ink with as much all around
    thick = float(core.sum() / some.sum().clamp(min=1e-9))
    if thick > MOST_THICK:
        return (
            f"{percent(thick)} of the ink lies {THICK} x {THICK} pixels thick; strokes are thinner"
        )
    return None


def _claim_labels(h: Hypothesis, label_counts: np.ndarray, rule: Rule) -> Hypothesis:
    said = _name_labels(np.array(h.label_histogram), label_counts)
    if not said["often"] and not said["hardly"]:
        why = f"no label is {OFTEN} times as frequent as among all images, none {HARDLY} times"
        return h._replace(why_not={**h.why_not, "class": why})
    h = h._replace(**said)
    auroc = _class_auroc(h, label_counts)
    return h if auroc >= rule.class_auroc else h.drops("class", _weak(auroc, rule.class_auroc))


def best_cut(score: np.ndarray, at: np.ndarray) -> float:
    """The score (N,) from which on images should be said to be active, if `at` (m,) are: the
    largest F1, the harmonic mean of precision and recall."""
    order = np.argsort(-score, kind="stable")
    active = np.zeros(len(score), dtype=bool)
    active[at] = True
    hits = active[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(score) + 1) + len(at))
    ranked = score[order]
    last_of_ties = np.append(ranked[1:] < ranked[:-1], True)
    return float(ranked[np.where(last_of_ties, f1, -1).argmax()])


def _weigh(h: Hypothesis, inks: Tensor, activity: fa.Activity, rule: Rule) -> Hypothesis:
    """A claim without ink that is weak, without labels that add nothing to it, and with its cut."""
    if all(part in h.why_not for part in PARTS):
        return h
    at = activity.of(h.feature)[0].numpy()
    scores = part_scores(h, inks, activity.labels)
    auroc = {part: ranks_of(score, at).auroc for part, score in scores.items() if part != "class"}
    if "ink" not in scores:
        h = h if "ink" in h.why_not else h.drops("ink", "no ink predicts and moves it")
    elif auroc["ink"] < rule.ink_auroc:
        h = h.drops("ink", _weak(auroc["ink"], rule.ink_auroc))
        scores = part_scores(h, inks, activity.labels)
    elif "class" in scores and auroc["both"] <= auroc["ink"]:
        h = h.drops("class", "labels add nothing to what the ink predicts")
        scores = part_scores(h, inks, activity.labels)
    return h._replace(cut=best_cut(scores["both"], at)) if scores else h


def _claim_ink(
    hypotheses: list[Hypothesis],
    layer: fa.ExplainedLayer,
    images: Tensor,
    inks: Tensor,
    of_places: Tensor | None,
    activity: fa.Activity,
) -> list[Hypothesis]:
    """The claims with words, by inks (W, N), and with drawings where of_places (M, N) is given."""
    shown = spread(torch.arange(len(images)), PATTERN_IMAGES).to(images.device)
    heats = fa.feature_input_patterns(*layer, images[shown]).cpu().flatten(1)
    place_signs, word_signs = _causal_signs(heats)
    n_classes = len(hypotheses[0].label_histogram)
    scores = [h.label_scores or (0.0,) * n_classes for h in hypotheses]
    scores = torch.tensor(scores, dtype=torch.float32)
    moments = _moments(inks, activity, scores)
    editable = Editable.of(images, seed=OTHERS_SEED)
    hypotheses = _say_ink(hypotheses, moments, word_signs, layer, editable, activity)
    if of_places is None:
        return hypotheses
    moments = _moments(of_places, activity, scores)
    drawn = _choose(moments, place_signs, DRAWN, _vocabulary().places)
    pairs = zip(hypotheses, drawn, strict=True)
    return [h._replace(drawing=drawing) for h, drawing in pairs]


def propose_hypotheses(
    layer: fa.ExplainedLayer,
    images: Tensor,
    labels: Tensor,
    rule: Rule | None = None,
    drawings: bool = True,
    activity: fa.Activity | None = None,
    removed: fa.Removals | None = None,
    strokes: bool = True,
    classes: Sequence[str] = (),
) -> list[Hypothesis]:
    """A claim about every feature, from the discovery images (N, ...) with labels (N,) alone.

    class   the labels that make up most of what fires it, with their shares, or that hardly do
    ink     up to three words for ink that is there and one for none (SAID), those that together
            with the labels predict best where it is active, each of which moves the feature
    effect  the logits that its removal lowers and raises most, where it does so further than other
            directions would

    Ink is named with `strokes`, and where images are pen strokes on a blank ground of 28 x 28
    pixels. Beside the words stands a drawing of exact places. `classes` are the names of the
    labels, which otherwise are called by their numbers. `activity` and `removed`, by
    `fa.removal_effects`, are those of the same images, where they are at hand. A part that does not
    reach the rule's bar on these very images is not claimed. Raises ValueError for shapes that do
    not fit, labels that the model does not know, no images, an activity or removals of others, and
    where ink is to be named but no gradient leads from the layer to the pixels.
    """
    rule = rule or Rule()
    activity = activity or fa.collect_activity(layer, images, labels)
    fa.check_activity(activity, layer, images, labels)
    removed = removed or fa.removal_effects(layer, images, activity)
    if not torch.equal(removed.n_images, activity.n_active):
        raise ValueError("the removals are of other images than the activity")
    n_classes = removed.mean_delta.shape[1]
    check_labels(activity.labels, n_classes)
    histograms = label_histograms(activity, n_classes)
    label_counts = torch.bincount(activity.labels, minlength=n_classes).numpy()
    raw = layer.raw_of_all(images)
    hypotheses = []
    for k in range(layer.d_sae):
        h = _unclaimed(k, activity, histograms[k], removed)._replace(classes=tuple(classes))
        if rule.min_active <= h.n_active <= len(images) - rule.min_active:
            h = _claim_labels(h, label_counts, rule)
            h = _claim_effect(h, removed.mean_delta[k], layer, raw, activity, rule)
        else:
            found = f"active on {h.n_active} of {len(images)} images"
            why = f"{found}; {rule.min_active} active and as many silent ones needed"
            h = h._replace(why_not=dict.fromkeys(PARTS, why))
        hypotheses.append(h)

    no_strokes = "strokes are switched off"
    if strokes:
        no_strokes = why_no_strokes(images) or why_unlike_strokes(images)
    inks = torch.empty(0, len(images), dtype=torch.float32)
    if no_strokes:
        hypotheses = [h.drops("ink", h.why_not.get("ink", no_strokes)) for h in hypotheses]
    else:
        of_places = place_inks(images)
        inks = word_inks(of_places)
        drawn = of_places if drawings else None
        hypotheses = _claim_ink(hypotheses, layer, images, inks, drawn, activity)
    return [_weigh(h, inks, activity, rule) for h in hypotheses]


def _unclaimed(
    k: int, activity: fa.Activity, histogram: np.ndarray, removed: fa.Removals
) -> Hypothesis:
    """What is known of feature k before anything is claimed."""
    _, activations = activity.of(k)
    return Hypothesis(
        feature=k,
        ink=Strokes(),
        often=(),
        hardly=(),
        label_scores=(),
        effect=None,
        cut=None,
        drawing=Strokes(),
        typical_activation=float(activations.mean()) if len(activations) else 0.0,
        label_histogram=tuple(histogram.tolist()),
        n_images=len(activity.labels),
        influence=float(removed.influence[k]),
        changes=float(removed.changes[k]),
        why_not={},
    )


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def listed(words: Sequence[str], last: str = "and") -> str:
    """As in "a, b and c", each once; "" for nothing."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def percent(share: float) -> str:
    """As in "80%", "0.3%", "<0.1%" or "0%"."""
    if share < 0.001:
        return "<0.1%" if share else "0%"
    return f"{100 * share:.1f}%" if share < 0.01 else f"{100 * share:.0f}%"


LEGEND = """A bar is horizontal, a stem vertical, a slash rises, a backslash falls, ink is any;
percentages are of the images that fire the feature."""


def plural(name: str) -> str:
    """As in "6s", "bags", "dresses", "T-shirts/tops", "cherries"."""
    if name[-1:].isalpha() and name[-1].isupper():
        return f"{name}s"
    if name.endswith("s") and not name.endswith("ss"):
        return name  # already, as "trousers"
    if name.endswith(("ss", "x", "sh", "ch")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return "/".join(f"{part}s" for part in name.split("/"))


def images_of(classes: Sequence[str], c: int) -> str:
    """What the images of class c are called, as in "6s" or "trousers"."""
    name = fa.class_name(classes, c)
    is_word = name[:1].isupper() and name.split()[0][1:].isalpha() and name[1:].islower()
    return plural(name[0].lower() + name[1:] if is_word else name)


def _label_words(h: Hypothesis) -> str:
    """As in "80% are 6s, 12% 0s", of the images that fire it."""
    words = []
    for c in h.often:
        share = percent(h.label_histogram[c] / h.n_active)
        words.append(f"{share} {images_of(h.classes, c)}")
    first = " ".join(words[:1]).replace(" ", " are ", 1)
    return ", ".join([first, *words[1:]])


def _effect_words(h: Hypothesis) -> str:
    """As in "without it 6 loses 0.30 logits, 2% of predictions change"."""
    if h.effect is None:
        return "little effect" if h.says_little else "effect like any direction's"
    moves = []
    for c, verb, by in zip(h.effect[::2], ("loses", "gains"), h.effect[1::2], strict=True):
        if c is not None:
            moves.append(f"{fa.class_name(h.classes, c)} {verb} {by:.2f}")
    return f"without it {listed(moves)} logits, {percent(h.changes)} of predictions change"


def statement(h: Hypothesis) -> str:
    """The claim in plain English."""
    if not any(map(h.proposes, PARTS)):
        return "no hypothesis"
    there = listed([word.words() for word in h.ink.there])
    empty = listed([f"no {word.words()}" for word in h.ink.absent])
    pieces = [", ".join(piece for piece in (there, empty) if piece)]
    pieces.append(_label_words(h))
    rare = listed([images_of(h.classes, c) for c in h.hardly], "or")
    pieces.append(f"hardly any {rare}" if rare else "")
    pieces.append(_effect_words(h))
    text = "; ".join(piece for piece in pieces if piece)
    return text[:1].upper() + text[1:]


# --------------------------------------------------------------------------------------------------
# Freeze
# --------------------------------------------------------------------------------------------------


def _strokes_record(strokes: Strokes) -> dict:
    record = {}
    for name, some in strokes._asdict().items():
        record[name] = [s._asdict() for s in some]
        for entry, stroke in zip(record[name], some, strict=True):
            if isinstance(stroke, Word):
                entry["words"] = stroke.words()
    return record


def hypothesis_record(h: Hypothesis) -> dict:
    """A claim as JSON has it."""
    strokes = {"ink": _strokes_record(h.ink), "drawing": _strokes_record(h.drawing)}
    effect = {"effect": h.effect._asdict() if h.effect else None}
    record = {"statement": statement(h), **h._asdict(), **strokes, **effect}
    del record["classes"]  # the same for all
    return record


DIGEST = re.compile(rb'\A{\n "sha256": "(\w{64})",\n')  # the first two lines of a frozen file


class Frozen(NamedTuple):
    """What a frozen file holds besides its digest."""

    rule: Rule
    classes: tuple[str, ...]
    hypotheses: tuple[dict[str, Any], ...]


def freeze_hypotheses(
    hypotheses: Sequence[Hypothesis], path: str | Path, rule: Rule | None = None
) -> str:
    """Write claims and the rule that will judge them; returns the SHA-256 of all that is said.

    The file's second line holds it, and it is that of the file without this line, so that claims
    and digest are written in one step (`sed 2d FILE | sha256sum` shows it).
    """
    frozen = {
        "rule": (rule or Rule())._asdict(),
        "classes": list(hypotheses[0].classes) if hypotheses else [],
        "hypotheses": [hypothesis_record(h) for h in hypotheses],
    }
    content = (json.dumps(frozen, indent=1, allow_nan=False) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    signed = content.replace(b"{\n", f'{{\n "sha256": "{digest}",\n'.encode(), 1)
    fa.write_whole(path, signed, durable=True)
    return digest


def read_hypotheses(path: str | Path, sha256: str | None = None) -> tuple[list[Hypothesis], Rule]:
    """What `freeze_hypotheses` wrote.

    Raises ValueError with both hashes when it is not what the file itself, or `sha256`, says was
    frozen, and for a file that holds no claims.
    """
    content = Path(path).read_bytes()
    named = DIGEST.match(content)
    said = b"{\n" + content[named.end() :] if named else content
    found = hashlib.sha256(said).hexdigest()
    inside = named[1].decode() if named else "nowhere"
    for recorded in (inside, sha256 or inside):
        if recorded != found:
            raise ValueError(
                f"{path} was changed after it was frozen: its SHA-256 is {found}, recorded was "
                f"{recorded}"
            )
    try:
        frozen = read_json(content, Frozen)
        hypotheses = []
        for record in frozen.hypotheses:
            whole, at = (
                {**record, "classes": list(frozen.classes)},
                f"hypotheses[{len(hypotheses)}]",
            )
            hypotheses.append(as_kind(whole, Hypothesis, at))
            _refuse_unsayable(hypotheses[-1])
    except ValueError as error:
        raise ValueError(f"{path} holds no claims: {error}") from error
    return hypotheses, frozen.rule


def _refuse_unsayable(h: Hypothesis) -> None:
    """Raise ValueError unless what is claimed can be tested."""
    for stroke in (*h.ink.there, *h.ink.absent, *h.drawing.there, *h.drawing.absent):
        _number_of(stroke)
    n_classes = len(h.label_histogram)
    named = [*h.often, *h.hardly]
    if h.effect:
        named += [c for c in (h.effect.raises, h.effect.lowers) if c is not None]
    lengths = {len(h.label_scores), len(h.classes)}
    if not lengths <= {0, n_classes} or not set(named) <= set(range(n_classes)):
        raise ValueError(f"feature {h.feature} counts {n_classes} classes, but names others")
