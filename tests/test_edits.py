"""Strokes and their edits: against masks drawn by turning the page, and models by hand."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted_strokes import activity_of, blank
from saexplain.strokes import Place, Strokes, Word, place_inks, place_masks, word_of

import feature_analysis as fa
from saexplain import edits, strokes
from saexplain.edits import EditableImages, Editor, edited_images, evenly_spaced
from saexplain.evaluation import EditTest, evaluate_hypotheses

TURNS = {"horizontal": 0, "vertical": 1 / 2, "rising": 1 / 4, "falling": -1 / 4}  # of pi
STEM_AT = Place(9, 7, "vertical", 7)
STEM, SLASH = Word("vertical", False, 1, 0), Word("rising", True, 1, 1)
NAMED = Strokes((STEM,), (SLASH,))
IMAGES = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
EDITOR = Editor(NAMED, EditableImages.of(IMAGES, seed=4), 7)


def by_hand(place: Place) -> torch.Tensor:
    """(2, 28, 28) bool, the pixels along a place and those beside it, by turning the page."""
    row, col = np.mgrid[:28, :28]
    at = (col - place.col) + 1j * (place.row - row)
    if place.shape == "dot":
        return torch.tensor(np.stack([abs(at) <= 2.6, at != at]))
    at *= np.exp(-1j * np.pi * TURNS[place.shape])
    along, across = abs(at.real) <= place.length / 2, abs(at.imag) - 1e-9
    return torch.tensor(np.stack([along & (across <= 1.5), along & (across > 2) & (across <= 4)]))


def expected_word(p: Place) -> Word:
    return Word(p.shape, p.length == 13, *np.digitize(p[:2], [8, 12, 16, 20]).tolist())


def places_of(word: Word) -> list[Place]:
    return [place for place in strokes.stroke_vocabulary() if expected_word(place) == word]


def region(*words: Word) -> torch.Tensor:
    return torch.stack([by_hand(place)[0] for w in words for place in places_of(w)]).any(0)


def less_beside(place: Place, image: torch.Tensor) -> float:
    """How much a stroke a place is on an image (28, 28), before it is cut off at 0."""
    along, beside = by_hand(place)
    return float(image[along].mean() - 0.5 * image[beside].sum() / max(1, int(beside.sum())))


# --- The vocabulary and its inks ------------------------------------------------------------------


def test_each_place_belongs_to_the_word_of_its_cell():
    places, words = strokes.stroke_vocabulary(), strokes.word_vocabulary()
    assert {p[:3] for p in places} >= set(itertools.product((9, 17), (11, 19), ("dot", *TURNS)))
    assert torch.equal(place_masks(places), torch.stack([by_hand(p)[0] for p in places]))
    assert by_hand(STEM_AT)[0, 6:13, 6:9].sum() == by_hand(STEM_AT)[0].sum() == 21
    assert [word_of(place) for place in places] == [expected_word(place) for place in places]
    assert sorted(set(map(expected_word, places))) == sorted(words)
    assert len({word.words() for word in words}) == len(words)


def test_a_word_has_the_ink_of_its_best_place(monkeypatch):
    image = torch.zeros(28, 28)
    image[6:13, 6:9], image[6:13, 3:5] = 0.8, 0.6  # one of the two bands beside it
    assert less_beside(STEM_AT, image) == pytest.approx(0.8 - 0.5 * 0.3)
    monkeypatch.setattr(strokes, "IMAGES_AT_ONCE", 3)
    found = strokes.word_inks(place_inks(IMAGES[:4]))
    for word, inks in zip(strokes.word_vocabulary(), found.numpy(), strict=True):
        of_places = [[less_beside(p, x) for x in IMAGES[:4, 0]] for p in places_of(word)]
        expected = np.maximum(0, np.max(of_places, axis=0))
        assert inks == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(3, 3, 8, 8), r"shape \(3, 8, 8\)"),
        (2 * IMAGES - 1, "pixels run from"),
        (IMAGES, "of the pixels are blank"),
        (torch.nn.functional.pad(torch.ones(3, 1, 14, 14), (7, 7, 7, 7)), "thick"),
        (by_hand(STEM_AT)[:1, None].float(), None),
    ],
)
def test_why_strokes_cannot_be_named(images, reason):
    found = strokes.why_no_strokes(images) or strokes.why_unlike_strokes(images)
    assert re.search(reason, found) if reason else found is None


# --- Edits of images ------------------------------------------------------------------------------


def test_erased_ink_is_gone_and_as_much_of_one_patch_elsewhere():
    x, off = IMAGES[:6][:, 0], ~region(STEM, SLASH)
    named, elsewhere = EDITOR.erase(x.flatten(1), [STEM])
    pixels = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0))
    distance = torch.cdist(pixels, pixels).unflatten(1, (28, 28))
    for image, gone, other in zip(x, named.view(x.shape), elsewhere.view(x.shape), strict=True):
        along = by_hand(max(places_of(STEM), key=lambda p: less_beside(p, image)))[0]
        assert torch.equal(gone, image * ~along)
        taken = image - other
        assert float(taken.sum()) == pytest.approx(float(image[along].sum()), abs=1e-4)
        assert (taken[~off] == 0).all()
        reach = distance[:, taken > 1e-6].amax(1)
        assert (reach <= distance[:, off & (other > 1e-6)].amin(1)).any()


def test_paint_completes_a_stroke_and_blanks_its_sides():
    along, beside = by_hand(STEM_AT)
    x = 0.4 * along
    x[6:13, 10:12] = 0.5  # one of its two sides
    x[18:, :2] = 1  # what may be taken elsewhere
    named, elsewhere = EDITOR.paint(x.view(1, -1).repeat(8, 1), [STEM])
    assert torch.allclose(named.view(8, 28, 28), torch.where(along, 1.0, x) * ~beside)
    off = ~region(STEM, SLASH)
    like = [by_hand(p)[0] for p in strokes.stroke_vocabulary() if p[2:] == STEM_AT[2:]]
    fit = [0.6 * mask for mask in like if off[mask].all()]
    for change in elsewhere.view(8, 28, 28) - x:
        assert float(change[18:, :2].sum()) == pytest.approx(-7, abs=1e-4)
        change[18:, :2] = 0
        assert any(torch.allclose(change, mask, atol=1e-6) for mask in fit)


def test_edits_change_as_much_elsewhere_and_pixels_stay_from_0_to_1():
    x, off = IMAGES.flatten(1), ~region(STEM, SLASH).flatten()
    before = x.clone()
    pairs = [edit(x, words) for edit in (EDITOR.erase, EDITOR.paint) for words in NAMED]
    pairs.append(EDITOR.erase(x, NAMED.absent, EDITOR.paint(x, NAMED.there)))
    for named, elsewhere in pairs:
        assert torch.allclose(named.sum(1), elsewhere.sum(1), atol=1e-3)
        assert torch.equal(elsewhere[:, ~off], x[:, ~off])
        assert ((elsewhere != x).any(1) & (named != x).any(1)).all()
        assert all(0 <= side.min() and side.max() <= 1 for side in (named, elsewhere))
    assert torch.equal(x, before)
    x = by_hand(STEM_AT)[0].float()
    x[27, :5] = 1  # elsewhere there is less ink, so no more is taken
    named, elsewhere = (side.view(28, 28) for side in EDITOR.erase(x.view(1, -1), [STEM]))
    assert named[by_hand(STEM_AT)[0]].numpy() == pytest.approx(16 / 21)
    assert (elsewhere[27] == 0).all()


@pytest.mark.parametrize(
    ("parts", "inactive"),
    [
        ({"enriched": (1,)}, [5, 8, 9]),
        ({"depleted": (2,)}, [4, 7, 11]),  # of 4, 5, 7, 8, 9 and 11
        ({"enriched": (9,)}, [4, 8, 11]),  # no image has this label
    ],
)
def test_edited_images_have_the_labels_named(parts, inactive, monkeypatch):
    monkeypatch.setattr(edits, "N_EDIT", 3)
    activity = activity_of([[1.0]] * 4 + [[0.0]] * 8)
    activity = activity._replace(labels=torch.tensor([1, 1, 0, 0, 0, 1, 2, 3, 1, 1, 2, 0]))
    found = edited_images(blank(**parts), activity)
    assert [at.tolist() for at in found] == [[0, 2, 3], inactive]
    assert [evenly_spaced(torch.arange(n), 3).tolist() for n in (10, 2)] == [[0, 4, 9], [0, 1]]


# --- Edits as tests of a model by hand ------------------------------------------------------------

HERE, THERE = Place(13, 13, "dot", 5), Place(5, 5, "dot", 5)
ALWAYS, NEVER = EditTest(48, 48, 0, 48, 0), EditTest(48, 0, 0, 0, 0)


def edit_model(
    weights: tuple[float, float], constant: float, named: Strokes, on: tuple, off: tuple
) -> dict[str, EditTest]:
    """Edits of 100 grey images that activate a feature, with so much ink HERE and THERE, and of 100
    that do not; the feature weighs these inks and adds a constant."""
    masks = place_masks([HERE, THERE])
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.2
    for mask, dark, light in zip(masks, on, off, strict=True):
        images[:100, :, mask], images[100:, :, mask] = dark, light
    rows = masks.flatten(1).float()
    reader = (rows / rows.sum(1, keepdim=True)).T @ torch.tensor(weights)[:, None]
    model = SimpleNamespace(
        preactivations=lambda x: x.flatten(1) @ reader + constant,
        logits_from_preactivations=lambda z: torch.cat([z, -z], 1),
    )
    sae = SimpleNamespace(W_enc=torch.eye(1), W_dec=torch.eye(1), encode=torch.relu)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(1), torch.ones(1))
    split = layer.activations(images, torch.zeros(200, dtype=torch.int64))
    (evidence,) = evaluate_hypotheses([blank(ink=named)], layer, split)
    assert evidence.n_active == 100
    return evidence.edits


@pytest.mark.parametrize("stroke", [HERE, word_of(HERE)])
def test_edits_of_one_stroke(stroke):
    """Ink HERE activates the feature or deactivates it; a place, or the word for it, is named."""
    dark, light = (0.6, 0.3), (0.3, 0.6)
    found = edit_model((1.0, 0.0), -0.45, Strokes((stroke,)), dark, light)
    assert found == {"erasing": ALWAYS, "painting": ALWAYS}
    found = edit_model((-1.0, 0.0), 0.45, Strokes((), (stroke,)), light, dark)
    assert found == {"filling": ALWAYS, "painting": ALWAYS}
    found = edit_model((0.0, 1.0), -0.45, Strokes((stroke,)), light, dark)
    assert found["erasing"].named == found["painting"].named == 0  # it is not read


def test_both_kinds_are_edited_to_activate_the_feature():
    """It needs ink HERE and none THERE; inactive images are the other way round."""
    on, off = (0.6, 0.0), (0.0, 0.6)

    def outcome(named: Strokes) -> dict[str, EditTest]:
        return edit_model((1.0, -1.0), -0.5, named, on, off)

    kinds = ("erasing", "filling", "painting")
    assert outcome(Strokes((HERE,), (THERE,))) == dict.fromkeys(kinds, ALWAYS)
    assert outcome(Strokes((THERE,), (HERE,))) == dict.fromkeys(kinds, NEVER)
    found = {name: test.named for name, test in outcome(Strokes((HERE,))).items()}
    assert found == {"erasing": 48, "painting": 0}
    found = {name: test.named for name, test in outcome(Strokes((), (THERE,))).items()}
    assert found == {"filling": 48, "painting": 0}
