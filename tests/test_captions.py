"""Captions of drawings whose shapes and places are known by construction."""

import re

import numpy as np
import pytest
from planted_templates import NOTHING, SIDE, ring, stroke

from saexplain.captions import (
    caption_of,
    caption_without_drawing,
    images_of,
    images_of_classes,
    listed,
    logit_groups,
    percent,
    plural,
)

SHAPES = {  # about the center of the canvas
    "bar": stroke(13.5, 13.5, 10, 3, 0),
    "slash": stroke(13.5, 13.5, 10, 3, 45),
    "stem": stroke(13.5, 13.5, 10, 3, 90),
    "backslash": stroke(13.5, 13.5, 10, 3, 135),
    "patch": stroke(13.5, 13.5, 6, 6, 0),
    "spot": stroke(13.5, 13.5, 4, 4, 0),
    "ring": ring(13.5, 13.5, 3, 6),
    "open ring": ring(13.5, 13.5, 3, 6) & ~stroke(13.5, 17, 8, 3, 0),
    "hook": stroke(10, 13.5, 10, 3, 0) | stroke(14, 9.5, 10, 3, 90),
}
PLACES = {  # moves (down, right) from the center of the canvas
    "in the center": (0, 0),
    "on the left": (0, -6),
    "on the right": (0, 6),
    "above the center": (-4, 0),
    "below the center": (4, 0),
    "at the top": (-7, 0),
    "at the bottom": (7, 0),
    "in the upper left": (-4, -6),
    "in the lower right": (4, 6),
    "at the top right": (-7, 6),
    "at the bottom left": (7, -6),
}
MIRRORED = (  # words of a drawing turned left to right, and top to bottom
    {"left": "right", "slash": "backslash", "slashes": "backslashes"},
    {
        "slash": "backslash",
        "slashes": "backslashes",
        "top": "bottom",
        "upper": "lower",
        "above": "below",
    },
)
BAR, STEM = SHAPES["bar"], SHAPES["stem"]
PATCH, SPOT = SHAPES["patch"], SHAPES["spot"]


def moved(cells: np.ndarray, down: int, right: int) -> np.ndarray:
    """(28, 28) bool, `cells` moved; they must stay on the canvas."""
    at = np.argwhere(cells) + np.array([down, right])
    result = np.zeros_like(cells)
    result[tuple(at.T)] = True
    return result


def drawn(wanted: np.ndarray, unwanted: np.ndarray = NOTHING) -> np.ndarray:
    """The drawing (28, 28) of the two."""
    return wanted.astype(np.int8) - unwanted


def mirrored(text: str, words: dict[str, str]) -> str:
    """A caption with the words exchanged, in both directions."""
    pairs = words | {value: key for key, value in words.items()}
    swapped = re.sub(r"\w+", lambda word: pairs.get(word[0], word[0]), text.lower())
    swapped = swapped.replace("below and above it", "above and below it")
    return swapped[:1].upper() + swapped[1:]


@pytest.mark.parametrize("noun", SHAPES)
def test_shapes_have_their_nouns(noun):
    assert caption_of(drawn(SHAPES[noun])).lower().startswith(f"{noun} ")
    assert caption_of(-drawn(SHAPES[noun])).startswith("Blank ")


def test_less_regular_shapes():
    rows, columns = np.mgrid[:SIDE, :SIDE] - 13.5
    oval = np.hypot(rows / 9.5, columns / 4.5)
    assert caption_of(drawn((oval <= 1) & (oval > 0.7))) == "Ring in the center"
    cross = stroke(13.5, 13.5, 16, 2, 0) | stroke(13.5, 13.5, 16, 2, 90)
    assert caption_of(drawn(cross)) == "Hook in the center"  # it encloses nothing
    arc = ring(13.5, 8, 7, 10) & (abs(rows) <= 7) & (columns > -5)
    assert caption_of(drawn(arc)) == "Hook in the center"
    ess = [stroke(row, 13.5, 7, 2, 0) for row in (5.5, 13.5, 21.5)]
    ess += [stroke(9.5, 10.5, 8, 2, 90), stroke(17.5, 16.5, 8, 2, 90)]
    assert caption_of(drawn(np.any(ess, axis=0))) == "Hook in the center"


@pytest.mark.parametrize("noun", SHAPES)
def test_turned_strokes_have_turned_nouns(noun):
    turned = {"bar": "stem", "stem": "bar", "slash": "backslash", "backslash": "slash"}
    expected = turned.get(noun, noun)
    assert caption_of(np.rot90(drawn(SHAPES[noun]))).lower().startswith(f"{expected} ")


@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_angles_have_the_nearest_noun(degrees):
    nearest = ("bar", "slash", "slash", "stem", "stem", "backslash", "backslash", "bar")
    expected = nearest[int(degrees // 22.5)]
    text = caption_of(drawn(stroke(13.5, 13.5, 12, 3, degrees)))
    assert text == f"{expected.capitalize()} in the center"


@pytest.mark.parametrize("place", PLACES)
def test_places(place):
    assert caption_of(drawn(moved(SPOT, *PLACES[place]))) == f"Spot {place}"


CAPTIONS = {  # wanted, unwanted
    "Bar in the center, blank just below it": (BAR, moved(BAR, 4, 0)),
    "Bar in the center, blank just above it": (BAR, moved(BAR, -4, 0)),
    "Stem in the center, blank just right of it": (STEM, moved(STEM, 0, 4)),
    "Stem in the center, blank just left of it": (STEM, moved(STEM, 0, -4)),
    "Bar in the center, blank at the bottom": (BAR, moved(BAR, 8, 0)),  # too far for "below it"
    "Stem in the center, blank on both sides": (STEM, moved(STEM, 0, 4) | moved(STEM, 0, -4)),
    "Bar in the center, blank above and below it": (BAR, moved(BAR, 4, 0) | moved(BAR, -4, 0)),
    "Blank in the center, stems on both sides": (
        moved(stroke(13.5, 13.5, 6, 2, 90), 0, 4) | moved(stroke(13.5, 13.5, 6, 2, 90), 0, -4),
        stroke(13.5, 13.5, 12, 4, 90),
    ),
    "Blank in the center, ink on both sides": (
        moved(stroke(13.5, 13.5, 6, 2, 90), 0, 4) | moved(SPOT, 0, -5),
        stroke(13.5, 13.5, 12, 4, 90),
    ),
    "Stem on the left, patch on the right, blank between them": (
        moved(stroke(13.5, 13.5, 14, 4, 90), 0, -6) | moved(PATCH, 0, 6),
        stroke(13.5, 13.5, 6, 3, 90),
    ),
    "Patch in the center, blank just below it, blank just right of it": (
        PATCH,
        moved(stroke(13.5, 13.5, 5, 3, 0), 6, 0) | moved(SPOT, 0, 6),
    ),
    "Stem on the left, blank just right of it": (  # at its end
        moved(stroke(13.5, 13.5, 16, 3, 90), 0, -6),
        moved(SPOT, 6, -2),
    ),
    "Bar in the center, blank just below it, blank in the lower right": (
        stroke(13.5, 13.5, 18, 4, 0),
        moved(PATCH, 6, -5) | moved(SPOT, 5, 6),
    ),
    "Bar at the top, blank just below it, patch at the bottom": (
        moved(stroke(13.5, 13.5, 14, 4, 0), -8, 0) | moved(PATCH, 8, 0),
        moved(SPOT, -3, 0),
    ),
    "Spot in the center": (moved(SPOT, 0, -2) | moved(SPOT, 0, 3), NOTHING),
    "Ring in the center, blank inside it": (SHAPES["ring"], stroke(13.5, 13.5, 3, 3, 0)),
    "Spot in the center, blank around it": (SPOT, ring(13.5, 13.5, 4, 7)),
    "Patch on the left, patch on the right": (moved(PATCH, 0, -6) | moved(PATCH, 0, 6), NOTHING),
    "Bar at the top, blank just below it, spot at the bottom": (
        moved(BAR, -7, 0) | moved(SPOT, 7, 0),
        moved(BAR, -3, 0),
    ),
    "Patch in the upper left, bar at the bottom, blank just above it": (
        moved(PATCH, -5, -6) | moved(stroke(13.5, 13.5, 10, 2.5, 0), 8, 3),
        moved(stroke(13.5, 13.5, 7, 2.5, 0), 5, 3),
    ),
}


@pytest.mark.parametrize("text", CAPTIONS)
@pytest.mark.parametrize("scale", [1, 2])
def test_relations(text, scale):
    drawing = np.kron(drawn(*CAPTIONS[text]), np.ones((scale, scale), dtype=np.int8))
    assert caption_of(drawing) == text


@pytest.mark.parametrize("axis", [1, 0])
def test_mirrored_drawings_have_mirrored_captions(axis):
    words, changed = MIRRORED[1 - axis], 0
    drawings = [drawn(*pair) for pair in CAPTIONS.values()]
    drawings += [drawn(moved(SHAPES[noun], 2, -6)) for noun in SHAPES]
    for drawing in drawings:
        text = mirrored(caption_of(drawing), words)
        # Regions that matter alike may change places.
        found = caption_of(np.flip(drawing, axis))
        assert sorted(found.lower().split(", ")) == sorted(text.lower().split(", "))
        changed += found != caption_of(drawing)
    assert changed >= len(drawings) // 3


def test_strength_decides_what_leads():
    drawing = drawn(moved(PATCH, 0, -6) | moved(SPOT, 0, 6))
    right = np.where(np.arange(SIDE) < 14, 0.1, 1.0) * np.ones((SIDE, 1))
    assert caption_of(drawing) == "Patch on the left, spot on the right"
    assert caption_of(drawing, right) == "Spot on the right, patch on the left"
    assert caption_of(drawing, right**2) == "Spot on the right"  # the patch is slight
    tones = np.where(right == 1, 2, 1)  # the spot's 16 cells count twice, the patch has 36
    assert caption_of(drawing * tones) == "Patch on the left, spot on the right"
    tones = np.where(right == 1, 3, 1)
    assert caption_of(drawing * tones) == "Spot on the right, patch on the left"


def test_ink_comes_before_a_blank_that_matters_little_more():
    cells = moved(PATCH, 0, -6), moved(PATCH, 0, 6)  # 36 cells each
    assert caption_of(drawn(*cells)) == "Patch on the left, blank on the right"
    strength = np.where(cells[0], 0.8, 1.0)
    assert caption_of(drawn(*cells), strength) == "Patch on the left, blank on the right"
    strength = np.where(cells[0], 0.6, 1.0)
    assert caption_of(drawn(*cells), strength) == "Blank on the right, patch on the left"


def test_at_most_three_things_are_named():
    corners = [moved(PATCH, *by) for by in [(-6, -6), (-6, 6), (6, -6), (6, 6), (0, 0)]]
    text = caption_of(drawn(np.any(corners, axis=0)))
    assert text.count(",") == 2


def test_blank_drawings_and_single_cells():
    dots = np.zeros((SIDE, SIDE), dtype=np.int8)
    dots[1::3, 1::3] = 1
    assert caption_of(dots).startswith("Spot ")
    assert caption_of(drawn(NOTHING)) == "nothing drawn"
    one = np.zeros((SIDE, SIDE), dtype=np.int8)
    one[13, 14] = 2
    assert caption_of(one) == "Spot in the center"
    assert caption_of(np.full((3, 3), -1)) == "Blank in the center"


def test_words_for_classes_and_shares():
    assert list(map(percent, (0, 0.0005, 0.003, 0.8))) == "0% <0.1% 0.3% 80%".split()
    names = ("6", "Trousers", "Dress", "Bag", "cherry", "toy", "T-shirt/top", "CD", "box")
    expected = "6s Trousers Dresses Bags cherries toys T-shirts/tops CDs boxes".split()
    assert list(map(plural, names)) == expected
    assert [images_of(["Trousers", "T-shirt/top"], c) for c in (0, 1)] == [
        "trousers",
        "T-shirts/tops",
    ]
    assert [listed([]), listed("a"), listed("aab"), listed("abc", "or")] == [
        "",
        "a",
        "a and b",
        "a, b or c",
    ]


# --- What is named without a drawing, and groups of classes ---------------------------------------


@pytest.mark.parametrize(
    ("given", "caption"),
    [
        (("6s and 7s", "in the upper third", "6", None), "6s and 7s, in the upper third"),
        (("", "in the lower left", "6", "7"), "In the lower left"),
        (("", "", "6", "7"), "Raises the score for 6, lowers the score for 7"),
        (("", "", None, "0"), "Lowers the score for 0"),
        (("", "", None, None), "No class, place or score stands out"),
        (("cats", "in the center", None, None, True), "Strongest on cats, in the center"),
        (("", "in the center", None, None, True), "Strongest in the center"),
        (("", "", "6", None, True), "Raises the score for 6"),
    ],
)
def test_captions_without_a_drawing(given, caption):
    assert caption_without_drawing(*given) == caption


PAIRS = [f"{c:02}" for c in range(100)]


def changes(n_classes: int, **groups: list) -> list[float]:
    """Changes of logits: so many at the classes of each group, all else 0."""
    delta = [0.0] * n_classes
    for name, at in groups.items():
        for i, c in enumerate(at):
            delta[c] = (-1 if name == "fall" else 1) * (6 - i / 10)
    return delta


def test_classes_whose_logits_move_together_are_one_group():
    fives = [53, *(c for c in range(100) if "5" in PAIRS[c] and c != 53)]
    assert len(fives) == 19
    delta = changes(100, fall=fives, rise=[26])
    delta[7] = -2.9  # less than half of the largest fall
    mean = np.mean([6 - i / 10 for i in range(19)])
    assert logit_groups(delta, PAIRS) == (
        f"remove it and the scores for 19 classes with 5 in their name fall by {mean:.2f} on "
        f"average, most for 53, then 05, 15, 25, 35, ...; the score for 26 rises by 6.00"
    )
    some = logit_groups(changes(100, fall=[*fives[:9], 80]), PAIRS)
    assert "for 10 classes, 9 of them with 5 in their name, fall by" in some
    first, last = (logit_groups(changes(100, fall=at), PAIRS) for at in (range(50, 60), fives[1:6]))
    assert "for 10 classes with names that begin with 5 fall by" in first
    assert "for 5 classes with names that end in 5 fall by" in last
    few = logit_groups(changes(100, fall=[50, 51]), PAIRS)  # two classes say little
    words = "remove it and the scores for 2 classes fall by 5.95 on average, most for 50, then 51"
    assert few == words
    assert "for 3 classes fall by" in logit_groups(changes(100, fall=[12, 34, 67]), PAIRS)


def test_words_and_endings_that_names_share_are_mentioned():
    names = ["sheepdog", "bulldog", "hot dog", "guide dog", "red fox", "arctic fox", "gray fox"]
    names += [f"item {i}" for i in range(20)]
    falls = logit_groups(changes(27, fall=[4, 5, 6]), names)
    assert "3 classes with fox in their name fall" in falls
    assert "4 classes with names that end in dog fall" in logit_groups(
        changes(27, fall=[0, 1, 2, 3]), names
    )
    assert "3 classes rise" in logit_groups(changes(27, rise=[8, 9, 10]), names)  # most are items


def test_logits_that_hardly_move_are_not_mentioned():
    assert logit_groups([0.0, -0.019, 0.019]) == ""
    assert logit_groups([0.0, -0.5, 0.019]) == "remove it and the score for 1 falls by 0.50"


def test_images_of_several_classes_are_a_group():
    names = [
        "red disk",
        "red ring",
        "red box",
        "red star",
        "blue disk",
        *(f"x{i}" for i in range(9)),
    ]
    found = [images_of_classes(some, names) for some in ((), (0,), (0, 4, 1))]
    assert found == ["", "red disks", "red disks, blue disks and red rings"]
    assert images_of_classes((3, 1, 0, 2), names) == "images of 4 classes with red in their name"
    most = "images of 5 classes, 4 of them with red in their name"
    assert images_of_classes((3, 1, 0, 2, 6), names) == most
    assert (
        images_of_classes((0, 5, 6, 7), names) == "images of 4 classes (red disks, x0s, x1s, ...)"
    )
    assert images_of_classes((9, 3, 5, 7), ()) == "images of 4 classes (9s, 3s, 5s, ...)"
