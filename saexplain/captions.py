"""What does a drawing show, in plain English? And how are classes and shares written?

    caption_of(weights)         # "Bar at the top right, blank just below it"
    images_of(classes, 6)       # "6s", "trousers"
    logit_groups(delta)         # "remove it and the scores for 19 classes fall by 5.90 on average"

Takes a drawing (h, w), positive where ink is wanted and negative where it is not; gives words from
its geometry alone. It computes no statistics, and a caption decides nothing.

Key: h x w cells of the canvas, n cells of a region. Places and directions (2,) are down and right.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

import feature_analysis as fa

# --------------------------------------------------------------------------------------------------
# Regions, their shapes and places. Cells are those of a canvas whose longer side has 28.
# --------------------------------------------------------------------------------------------------

SLIGHT = 0.12  # share of the strongest region's strength below which one is not named
ELONGATED = 1.9  # length over width from which a region is a piece of stroke
BENT = 1.5  # length along a region over its extent, from which it is bent
CURVED = 0.4  # squared correlation from which a piece of stroke is an arc, and so a hook
LONG = 3.4  # length along a region over its width, from which it may be a hook or a ring
OPENING = 90  # degrees, the widest opening of an open ring
HOLE = 4  # empty cells inside a region that make it a ring
SMALL = 20  # cells below which a compact region is a spot
STROKES = ("bar", "slash", "stem", "backslash")  # by angle: 0, 45, 90, 135 degrees
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("in the upper left", "above the center", "in the upper right"),
    ("on the left", "in the center", "on the right"),
    ("in the lower left", "below the center", "in the lower right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


class Region(NamedTuple):
    """A connected region of a drawing, in words and numbers."""

    wanted: bool
    strength: float  # how much it matters, against other regions of the drawing
    shape: str  # see `shape_of`
    place: str  # one of PLACES
    center: np.ndarray  # (2,)
    edge: np.ndarray  # (n, 2) cells at its edge

    @property
    def noun(self) -> str:
        """What a caption calls it."""
        return self.shape if self.wanted else "blank"

    def __str__(self) -> str:
        return f"{self.noun} {self.place}"


def opening_of(cells: np.ndarray, center: np.ndarray) -> float:
    """The widest angle in degrees without any of the cells (n, 2), seen from the center (2,)."""
    angle = np.sort(np.degrees(np.arctan2(*(cells - center).T)))
    return float(np.diff(angle, append=angle[0] + 360).max())


def shape_of(cells: np.ndarray, depth: np.ndarray, scale: float) -> str:
    """The shape of a region (h, w) bool: "bar", "stem", "slash", "backslash", "hook", "ring", "open
    ring", "patch" or "spot". `depth` (h, w) is each cell's distance to the outside, `scale` the
    canvas's longer side over 28."""
    points = np.argwhere(cells)
    offset = points - points.mean(0)
    values, vectors = np.linalg.eigh(offset.T @ offset / len(points))
    width, length = np.sqrt(12 * values.clip(1 / 12))  # sides of a rectangle of this spread
    # The mean distance to the outside is a quarter of a stroke's width, and half a cell.
    thickness = max(1.0, 4 * depth.sum() / len(points) - 2)
    along = len(points) / thickness
    is_long = along > LONG * thickness
    if is_long and ndimage.binary_fill_holes(cells).sum() - len(points) >= HOLE * scale**2:
        return "ring"
    # In an arc the places across the region go with the squares of those along it.
    across, squared = offset @ vectors[:, 0], (offset @ vectors[:, 1]) ** 2
    squared -= squared.mean()
    is_arc = (across @ squared) ** 2 > CURVED * (across @ across) * (squared @ squared)
    if length >= ELONGATED * width and along <= BENT * length and not is_arc:
        down, right = vectors[:, 1]
        return STROKES[round(math.degrees(math.atan2(-down, right)) / 45) % 4]
    if not is_long:
        return "spot" if len(points) < SMALL * scale**2 else "patch"
    middle = (np.array(cells.shape) - 1) / 2
    is_empty = np.hypot(*(points - middle).T).min() >= 1
    return "open ring" if is_empty and opening_of(points, middle) <= OPENING else "hook"


def place_of(center: np.ndarray, canvas_shape: tuple[int, int]) -> str:
    """The place of a point (2,) of a canvas (h, w), one of PLACES. The middle two thirds are
    divided evenly, as ink mostly is there."""
    inside = ((center + 0.5) / canvas_shape - 1 / 6) * 1.5
    down, across = (inside * (5, 3)).clip(0, (4, 2)).astype(int)
    return PLACES[down][across]


def regions_of_drawing(weights: np.ndarray, strength: np.ndarray | float = 1.0) -> list[Region]:
    """The 4-connected regions of a drawing (h, w), the one that matters most first, by the sum over
    its cells of |weight| times `strength` (h, w); without SLIGHT ones."""
    matter, parts, found = np.abs(weights) * strength, [], []
    for wanted, of_sign in ((True, weights > 0), (False, weights < 0)):
        label, _ = ndimage.label(of_sign)
        for number, box in enumerate(ndimage.find_objects(label), 1):
            cells = label[box] == number  # cropped, to be fast
            parts.append((float(matter[box][cells].sum()), wanted, box, cells))
    parts.sort(key=lambda part: -part[0])
    for own, wanted, box, cells in parts:
        if own < SLIGHT * parts[0][0]:
            break
        corner = (box[0].start, box[1].start)
        center = np.argwhere(cells).mean(0) + corner
        depth = ndimage.distance_transform_edt(np.pad(cells, 1))[1:-1, 1:-1]
        edge = np.argwhere(depth == 1) + corner
        shape = shape_of(cells, depth, max(weights.shape) / 28)
        found.append(Region(wanted, own, shape, place_of(center, weights.shape), center, edge))
    return found


# --------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------

MOST_THINGS = 3  # regions that a caption names
INK_LEADS = 0.7  # share of the strongest region's strength from which ink is named before it
NEAR = 3.0  # cells within which two regions are beside each other
OPPOSITE = -0.5  # cosine up to which two directions are opposite


def way_to(region: Region, other: Region, near: float) -> np.ndarray | None:
    """The direction (2,), of length 1, from a region to one of the other sign, where they face each
    other most; None where they are of one sign, or more than `near` cells apart."""
    if region.wanted == other.wanted:
        return None
    way = other.edge - region.edge[:, None]
    distance = np.hypot(way[..., 0], way[..., 1])
    if distance.min() > near:
        return None
    mean = way[distance <= distance.min() + near / 2].mean(0)
    return mean / max(math.hypot(*mean), 1e-9)


def is_inside(region: Region, other: Region) -> bool:
    """Whether the other region is a ring, open or not, around the center of this one."""
    return "ring" in other.shape and opening_of(other.edge, region.center) <= OPENING


def words_beside(region: Region, other: Region, way: np.ndarray) -> str:
    """Where a region is, seen from another one, from which it lies that `way`."""
    if is_inside(region, other):
        return "inside it"
    if is_inside(other, region):
        return "around it"
    down, right = way
    if abs(down) >= abs(right):
        return "just below it" if down > 0 else "just above it"
    return "just right of it" if right > 0 else "just left of it"


def clauses_of_row(regions: list[Region], near: float) -> list[str]:
    """The clauses for three regions where two lie on opposite sides of one; else none."""
    for middle in regions if len(regions) == 3 else []:
        a, b = (region for region in regions if region is not middle)
        way, other_way = way_to(middle, a, near), way_to(middle, b, near)
        if way is None or other_way is None or way @ other_way > OPPOSITE:
            continue
        if a.wanted and middle is not regions[0]:
            return [str(a), str(b), "blank between them"]
        noun = "ink" if a.noun != b.noun else plural(a.noun) if a.wanted else "blank"
        down, right = np.abs(way - other_way)
        return [str(middle), f"{noun} {'above and below it' if down >= right else 'on both sides'}"]
    return []


def caption_of(weights: np.ndarray, strength: np.ndarray | float = 1.0) -> str:
    """The drawing (h, w) in words: at most MOST_THINGS regions, the one that matters most first.

    Ink nearly as strong as the strongest blank, or inside it, comes before it. A region of the
    other sign beside one just named is put into relation with it. `strength` (h, w) is how much
    each cell matters; by default all matter alike.
    """
    regions = regions_of_drawing(weights, strength)
    if not regions:
        return "nothing drawn"
    first, near = regions[0], NEAR * max(weights.shape) / 28
    ink = next((region for region in regions if region.wanted), first)
    it = ink if ink.strength >= INK_LEADS * first.strength or is_inside(ink, first) else first
    others = [region for region in regions if region is not it][: MOST_THINGS - 1]
    others.sort(key=lambda region: way_to(it, region, near) is None)  # those beside it first
    clauses = clauses_of_row([it, *others], near)
    if not clauses:
        clauses, used = [str(it)], set()
        for other in others:
            way = way_to(it, other, near)
            where = "" if way is None else words_beside(other, it, way)
            if way is None or where in used:
                clauses.append(str(other))
                it = other
            else:
                clauses.append(f"{other.noun} {where}")
                used.add(where)
    text = ", ".join(dict.fromkeys(clauses))
    return text[:1].upper() + text[1:]


MOST_LETTERS = 60  # of a class in a caption without a drawing


def caption_without_drawing(
    images: str, where: str, raised: str | None, lowered: str | None, is_strong: bool = False
) -> str:
    """What a hypothesis names that has no drawing, in words: the `images` of classes and `where` in
    them, as in "in the center", or else the classes whose scores the feature raises and lowers;
    `is_strong` where it is about strongly active images only."""
    clauses = [words for words in (images, where) if words]
    if clauses and is_strong:
        clauses[0] = f"strongest {'on ' if images else ''}{clauses[0]}"
    if not clauses:
        moved = (("raises", raised), ("lowers", lowered))
        names = [(verb, fa.shortened(name, MOST_LETTERS)) for verb, name in moved if name]
        clauses = [f"{verb} the score for {name}" for verb, name in names]
    text = ", ".join(clauses) or "no class, place or score stands out"
    return text[:1].upper() + text[1:]


# --------------------------------------------------------------------------------------------------
# Words for classes and shares
# --------------------------------------------------------------------------------------------------


def listed(words: Sequence[str], last: str = "and") -> str:
    """The words as in "a, b and c", each once; "" for none."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def percent(share: float) -> str:
    """A share as in "80%", "0.3%", "<0.1%" or "0%"."""
    if share < 0.001:
        return "<0.1%" if share else "0%"
    return f"{100 * share:.1f}%" if share < 0.01 else f"{100 * share:.0f}%"


MOST_NAMED = 4  # classes of a group that are named
IN_GROUP = 0.5  # of the largest change of a logit, that those of a group have
MOST_OF_GROUP = 0.8  # share of a group whose names share a part that is mentioned
SHARED_BY_FEW = 0.5  # share of all classes below which a shared part is worth naming


def parts_of_name(name: str) -> set[str]:
    """What a class name may share with others: its words, and the ends of three letters or more of
    its last word, as "-dog"; of a number its digits, the first as "5-", the last as "-5"."""
    words = re.findall(r"[^\W_]+", name.lower())
    if len(words) == 1 and words[0].isdigit():
        return {*words[0], f"{words[0][0]}-", f"-{words[0][-1]}"}
    last = words[-1] if words else ""
    ends = {f"-{last[i:]}" for i in range(len(last) - 2) if last.isalpha()}
    return {*words, *ends}


def shared_part(group: Sequence[int], names: Sequence[str]) -> tuple[str, int]:
    """What the names of at least MOST_OF_GROUP of the classes of a group have in common, and few
    others, as in "5 in their name", with the number of those that have it; "" where there is
    nothing, or there are only two classes."""
    parts = [parts_of_name(name) for name in names]
    in_group = Counter(part for c in group for part in parts[c])
    in_all = Counter(part for of_name in parts for part in of_name)
    most = max(3, MOST_OF_GROUP * len(group))
    found = [
        (n / in_all[part], len(part.strip("-")), part)  # of equal ones, a word before an end
        for part, n in in_group.items()
        if n >= most and in_all[part] < SHARED_BY_FEW * len(names)
    ]
    part = max(found)[-1] if found else ""
    words = f"{part} in their name" if part else ""
    if part[:1] == "-":
        words = f"names that end in {part[1:]}"
    elif part[-1:] == "-":
        words = f"names that begin with {part[:-1]}"
    return words, in_group[part]


def classes_in_words(group: Sequence[int], names: Sequence[str]) -> str:
    """A group of several classes by what their names share, as in "4 classes with red in their
    name", or as their number."""
    shared, n = shared_part(group, names)
    if not shared:
        return f"{len(group)} classes"
    if n == len(group):
        return f"{n} classes with {shared}"
    return f"{len(group)} classes, {n} of them with {shared},"


def images_of_classes(group: Sequence[int], classes: Sequence[str]) -> str:
    """The images of a group of classes in words, as in "6s and 7s", or "images of 4 classes with
    red in their name"; "" for none."""
    plurals = [fa.shortened(images_of(classes, c), MOST_LETTERS) for c in group]
    if len(group) < MOST_NAMED:
        return listed(plurals)
    names = list(classes) or [str(c) for c in range(max(group) + 1)]
    words = f"images of {classes_in_words(group, names)}".removesuffix(",")
    return words if "with" in words else f"{words} ({', '.join(plurals[: MOST_NAMED - 1])}, ...)"


def group_words(change: Sequence[float], classes: Sequence[str], verb: str) -> str:
    """The classes whose logit changes by at least half of the largest of `change` (C,), in words,
    as in "the scores for 19 classes fall by 5.90 on average, most for 53, then 50, ..."."""
    largest = max(change)
    order = sorted(range(len(change)), key=lambda c: (-change[c], c))
    group = [c for c in order if change[c] >= IN_GROUP * largest]
    names = [fa.class_name(classes, c) for c in range(len(change))]
    if len(group) == 1:
        name = fa.shortened(names[group[0]], MOST_LETTERS)
        return f"the score for {name} {verb}s by {largest:.2f}"
    mean = sum(change[c] for c in group) / len(group)
    first, *others = [fa.shortened(names[c], MOST_LETTERS) for c in group[: MOST_NAMED + 1]]
    others += ["..."] if len(group) > MOST_NAMED + 1 else []
    named = f"most for {first}, then {', '.join(others)}"
    which = classes_in_words(group, names)
    return f"the scores for {which} {verb} by {mean:.2f} on average, {named}"


def logit_groups(delta: Sequence[float], classes: Sequence[str] = (), least: float = 0.02) -> str:
    """What removing a feature does to the logits, by their mean change (C,), in words: the classes
    whose logits fall most, and those whose rise most, as groups; "" where none moves by `least`."""
    delta = [float(change) for change in delta]
    clauses = []
    for verb, change in (("fall", [-d for d in delta]), ("rise", delta)):
        if max(change) >= least:
            clauses.append(group_words(change, classes, verb))
    return f"remove it and {'; '.join(clauses)}" if clauses else ""


def plural(name: str) -> str:
    """The plural of a class name, as in "6s", "bags", "dresses", "T-shirts/tops", "cherries"."""
    if name[-1:].isalpha() and name[-1].isupper():
        return f"{name}s"
    if name.endswith("s") and not name.endswith("ss"):
        return name  # a plural already, as "trousers"
    if name.endswith(("ss", "x", "sh", "ch")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return "/".join(f"{part}s" for part in name.split("/"))


def images_of(classes: Sequence[str], c: int) -> str:
    """The images of class c in words, as in "6s" or "trousers"."""
    name = fa.class_name(classes, c)
    is_word = name[:1].isupper() and name.split()[0][1:].isalpha() and name[1:].islower()
    return plural(name[0].lower() + name[1:] if is_word else name)
