"""Claims: against scikit-learn, hand-made models and numbers, and plain loops."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from small_models import activity_of, banded_images, double_by_default

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_hypotheses as fh

CASES = list(itertools.product([0, 1, 2], [0.02, 0.3, 0.9], [False, True]))
TURNS = {"horizontal": 0, "vertical": 1 / 2, "rising": 1 / 4, "falling": -1 / 4}  # of pi
STEM_AT, BAR_AT = fh.Place(9, 7, "vertical", 7), fh.Place(21, 19, "horizontal", 7)
STEM, BAR = fh.Word("vertical", False, 1, 0), fh.Word("horizontal", False, 4, 3)
SLASH = fh.Word("rising", True, 1, 1)
NAMED, NO_INK = fh.Strokes((STEM,), (SLASH,)), fh.Strokes()
BLANK = fh.Hypothesis(0, NO_INK, (), (), (), None, None, NO_INK, 0.0, (), 0, 0.0, 0.0, {})
IMAGES = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
EDITOR = fh.Editor(NAMED, fh.Editable.of(IMAGES, seed=4), 7)


def by_hand(place: fh.Place) -> torch.Tensor:
    """(2, 28, 28) bool, the pixels along a place and those beside it, by turning the page."""
    row, col = np.mgrid[:28, :28]
    at = (col - place.col) + 1j * (place.row - row)
    if place.shape == "dot":
        return torch.tensor(np.stack([abs(at) <= 2.6, at != at]))
    at *= np.exp(-1j * np.pi * TURNS[place.shape])
    along, across = abs(at.real) <= place.length / 2, abs(at.imag) - 1e-9
    return torch.tensor(np.stack([along & (across <= 1.5), along & (across > 2) & (across <= 4)]))


def said_of(p: fh.Place) -> fh.Word:
    return fh.Word(p.shape, p.length == 13, *np.digitize(p[:2], [8, 12, 16, 20]).tolist())


def places_of(word: fh.Word) -> list[fh.Place]:
    return [place for place in fh.stroke_vocabulary() if said_of(place) == word]


def region(*words: fh.Word) -> torch.Tensor:
    return torch.stack([by_hand(place)[0] for w in words for place in places_of(w)]).any(0)


def less_beside(place: fh.Place, image: torch.Tensor) -> float:
    """How much a stroke a place is on an image (28, 28), before it is cut off at 0."""
    along, beside = by_hand(place)
    return float(image[along].mean() - 0.5 * image[beside].sum() / max(1, int(beside.sum())))


def reads(*weights: torch.Tensor, d_in: int = 300) -> fa.ExplainedLayer:
    """Feature k weighs pixels so, raises logit k and lowers the next half as much."""
    n, rows = len(weights), torch.stack(weights).flatten(1)
    head = torch.eye(d_in, n) @ (torch.eye(4) - 0.5 * torch.eye(4).roll(1, 1))[:n]
    model = SimpleNamespace(logits_from_preactivations=lambda z: z @ head)
    model.preactivations = lambda images: images.flatten(1) @ rows.T @ torch.eye(n, d_in)
    sae = SimpleNamespace(W_enc=torch.eye(d_in, n), W_dec=torch.eye(n, d_in))
    sae.encode = lambda z: z[:, :n] * (z[:, :n] > 0.4)
    return fa.ExplainedLayer(model, sae, torch.zeros(d_in), torch.ones(d_in))


@pytest.fixture(scope="module")
def world():
    plan = demo.make_plan(demo.stroke_table(0))
    given = demo.plant(plan), *demo.draw_labelled(plan, 0)[:2]
    return *given, fh.propose_hypotheses(*given)


@pytest.fixture(scope="module")
def hand():
    """Feature 0 is fired by a stem on 1s, feature 1 by a stem where there is no bar."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (600,), generator=generator)
    others = [place for place in fh.stroke_vocabulary() if place.shape != "dot"][::9]
    masks = torch.stack([by_hand(place)[0] for place in (STEM_AT, BAR_AT, *others)]).float()
    often = torch.tensor([0.3, 0.5] + [2 / len(others)] * len(others))
    drawn = (torch.rand(600, len(masks), generator=generator) < often).float()
    images = 0.9 * torch.einsum("ns,srl->nrl", drawn, masks).clamp(max=1)[:, None]
    images[:, 0, 0, 0] = (labels == 1).float()  # a pixel that no stroke reaches
    (stem, bar), corner = masks[:2] / 21, torch.eye(784)[0].view(28, 28)
    given = reads(0.3 * stem + 0.3 * corner, stem - bar), images, labels
    return *given, fh.propose_hypotheses(*given)


# --- Scores and edits -----------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "share", "ties"), CASES)
def test_ranks_and_cut_by_counting(seed, share, ties):
    rng = np.random.default_rng(seed)
    active = rng.permutation(80) < 80 * share
    scores = (rng.normal(size=80) + 0.7 * active).round(0 if ties else 6).astype(np.float32)
    r = fh.ranks_of(scores, np.flatnonzero(active))
    own, others = np.sort(scores[active])[:, None], scores[~active]
    counted = [own.T < own, own.T <= own, others < own, others <= own]
    assert [found.tolist() for found in r[:4]] == [c.sum(1).tolist() for c in counted]
    assert r.auroc == pytest.approx(sklearn.metrics.roc_auc_score(active, scores), abs=1e-12)
    f1 = {cut: sklearn.metrics.f1_score(active, scores >= cut) for cut in scores.tolist()}
    assert f1[fh.best_cut(scores, np.flatnonzero(active))] == pytest.approx(max(f1.values()))


def test_each_place_belongs_to_the_word_of_its_cell():
    places, words = fh.stroke_vocabulary(), fh.word_vocabulary()
    assert {p[:3] for p in places} >= set(itertools.product((9, 17), (11, 19), ("dot", *TURNS)))
    assert torch.equal(fh.place_masks(places), torch.stack([by_hand(p)[0] for p in places]))
    assert by_hand(STEM_AT)[0, 6:13, 6:9].sum() == by_hand(STEM_AT)[0].sum() == 21
    assert [fh.word_of(place) for place in places] == [said_of(place) for place in places]
    assert sorted(set(map(said_of, places))) == sorted(words)
    assert len({word.words() for word in words}) == len(words)


def test_words():
    expected = """
        top far left, top left, top, top right, top far right
        upper far left, upper left, above centre, upper right, upper far right
        far left, left of centre, in centre, right of centre, far right
        lower far left, lower left, below centre, lower right, lower far right
        bottom far left, bottom left, bottom, bottom right, bottom far right"""
    for row, line in enumerate(expected.split("\n")[1:]):
        found = [fh.Word("dot", False, row, col).words() for col in range(5)]
        assert found == [f"ink {where}" for where in line.strip().split(", ")]
    nouns = [fh.Word(shape, True, 0, 2).words().split()[1] for shape in TURNS]
    assert nouns == ["bar", "stem", "slash", "backslash"]


def test_a_word_is_as_true_as_its_truest_place(monkeypatch):
    image = torch.zeros(28, 28)
    image[6:13, 6:9], image[6:13, 3:5] = 0.8, 0.6  # one of the two bands beside it
    assert less_beside(STEM_AT, image) == pytest.approx(0.8 - 0.5 * 0.3)
    monkeypatch.setattr(fh, "IMAGES_AT_ONCE", 3)
    found = fh.word_inks(fh.place_inks(IMAGES[:4]))
    for word, inks in zip(fh.word_vocabulary(), found.numpy(), strict=True):
        of_places = [[less_beside(p, x) for x in IMAGES[:4, 0]] for p in places_of(word)]
        expected = np.maximum(0, np.max(of_places, axis=0))
        assert inks == pytest.approx(expected, abs=1e-5)


def test_scores_of_parts():
    of_places, labels = fh.place_inks(IMAGES[:4]), torch.tensor([0, 1, 2, 1])
    inks, ink = fh.word_inks(of_places), fh.Strokes((STEM, BAR), (SLASH,))
    stem, bar, slash = (inks[fh.word_vocabulary().index(w)].numpy() for w in (STEM, BAR, SLASH))
    said, labelled = BLANK._replace(often=(1,), label_scores=(0.25, 1, 0.5)), [0.25, 1, 0.5, 1]
    both = fh.part_scores(said._replace(ink=ink), inks, labels)
    expected = {"ink": stem + bar - slash, "class": labelled, "both": stem + bar - slash + labelled}
    assert both == {part: pytest.approx(by, abs=1e-6) for part, by in expected.items()}
    for part, h in (("class", said), ("ink", BLANK._replace(ink=ink))):
        alone = fh.part_scores(h, inks, labels)
        assert alone["both"] is alone[part]
        assert np.array_equal(alone[part], both[part])
    drawn = [[max(0, less_beside(p, x)) for x in IMAGES[:4, 0]] for p in (STEM_AT, BAR_AT)]
    h = said._replace(drawing=fh.Strokes((STEM_AT,), (BAR_AT,)))
    found = fh.drawing_score(h, of_places, labels)
    assert found == pytest.approx(np.subtract(*drawn) + labelled, abs=1e-5)


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


def test_as_much_is_taken_where_the_near_pixels_do_not_suffice():
    x, centre = IMAGES[:8].flatten(1).clone(), torch.arange(8) * 100
    given, amount = x.clone(), torch.linspace(0.3, 0.9, 8) * x.sum(1)  # 256 of 784 hold a third
    fh._remove_patch(x, given, amount, centre)
    assert (given - x).sum(1).numpy() == pytest.approx(amount.numpy(), abs=1e-3)
    row, col = np.divmod(np.arange(784), 28)
    for image, before, at in zip(x, given, centre.tolist(), strict=True):
        distance = np.hypot(row - row[at], col - col[at])
        assert distance[(image == 0).numpy()].max() <= distance[(image == before).numpy()].min()


def test_paint_completes_a_stroke_and_blanks_its_sides():
    along, beside = by_hand(STEM_AT)
    x = 0.4 * along
    x[6:13, 10:12] = 0.5  # one of its two sides
    x[18:, :2] = 1  # what may be taken elsewhere
    named, elsewhere = EDITOR.paint(x.view(1, -1).repeat(8, 1), [STEM])
    assert torch.allclose(named.view(8, 28, 28), torch.where(along, 1.0, x) * ~beside)
    off = ~region(STEM, SLASH)
    like = [by_hand(p)[0] for p in fh.stroke_vocabulary() if p[2:] == STEM_AT[2:]]
    fit = [0.6 * mask for mask in like if off[mask].all()]
    for change in elsewhere.view(8, 28, 28) - x:
        assert float(change[18:, :2].sum()) == pytest.approx(-7, abs=1e-4)
        change[18:, :2] = 0
        assert any(torch.allclose(change, mask, atol=1e-6) for mask in fit)


def test_edits_move_as_much_elsewhere_and_pixels_stay_from_0_to_1():
    x, off = IMAGES.flatten(1), ~region(STEM, SLASH).flatten()
    pairs = [edit(x, words) for edit in (EDITOR.erase, EDITOR.paint) for words in NAMED]
    pairs.append(EDITOR.erase(x, NAMED.absent, EDITOR.paint(x, NAMED.there)))
    for named, elsewhere in pairs:
        assert torch.allclose(named.sum(1), elsewhere.sum(1), atol=1e-3)
        assert torch.equal(elsewhere[:, ~off], x[:, ~off])
        assert ((elsewhere != x).any(1) & (named != x).any(1)).all()
        assert all(0 <= side.min() and side.max() <= 1 for side in (named, elsewhere))
    x = by_hand(STEM_AT)[0].float()
    x[27, :5] = 1  # elsewhere there is less ink, so no more is moved
    named, elsewhere = (side.view(28, 28) for side in EDITOR.erase(x.view(1, -1), [STEM]))
    assert named[by_hand(STEM_AT)[0]].numpy() == pytest.approx(16 / 21)
    assert (elsewhere[27] == 0).all()


def test_edited_images_carry_the_labels_named(monkeypatch):
    monkeypatch.setattr(fh, "N_EDIT", 3)
    activity = activity_of([[1.0]] * 4 + [[0.0]] * 8)
    activity = activity._replace(labels=torch.tensor([1, 1, 0, 0, 0, 1, 2, 3, 1, 1, 2, 0]))
    for said, silent in (
        ({"often": (1,)}, [5, 8, 9]),
        ({"hardly": (2,)}, [4, 7, 11]),  # of 4, 5, 7, 8, 9 and 11
        ({"often": (9,)}, [4, 8, 11]),  # no image carries it
    ):
        found = fh.edited_images(BLANK._replace(**said), activity)
        assert [at.tolist() for at in found] == [[0, 2, 3], silent]
    assert [fh.spread(torch.arange(n), 3).tolist() for n in (10, 2)] == [[0, 4, 9], [0, 1]]


# --- Proposing ------------------------------------------------------------------------------------


def test_labels_are_named_for_their_lift():
    for histogram, usual, often, hardly, rates in (
        ((40, 14, 16, 0, 30), (1, 1, 1, 1, 6), (0, 2), (), (4, 0.55, 1.6, 0.55, 0.55)),
        ((30, 30, 25, 15, 0), (1, 1, 1, 1, 6), (0, 1), (), (3, 3, 0.5, 0.5, 0.5)),  # two at most
        ((25, 25, 25, 24, 1), (1, 1, 1, 1, 1), (), (4,), (1, 1, 1, 1, 0)),
        ((25, 25, 25, 25, 0), (1, 1, 1, 1, 0), (), (), (1, 1, 1, 1, 1)),  # a label of no image
    ):
        said = fh._name_labels(np.array(histogram), 100 * np.array(usual))
        assert (said["often"], said["hardly"]) == (often, hardly)
        assert said["label_scores"] == pytest.approx(np.sqrt(np.array(rates) / max(rates)))
    rng, scores = np.random.default_rng(0), np.array([0.2, 1.0, 0.2, 0.2, 0.7])
    labels, active = rng.integers(5, size=400), rng.random(400) < 0.2
    h = BLANK._replace(label_scores=scores, label_histogram=np.bincount(labels[active]))
    expected = sklearn.metrics.roc_auc_score(active, scores[labels])
    assert fh._class_auroc(h, np.bincount(labels)) == pytest.approx(expected, abs=1e-12)


def greedy(inks, of_labels, active, allowed) -> tuple[dict[int, float], float]:
    """Words and their signs, chosen by trying them all, and what they are worth."""

    def worth(chosen):
        score = of_labels + sum(sign * inks[word] for word, sign in chosen.items())
        (variance, both), _ = np.cov(score, active, bias=True)
        return both * abs(both) / max(variance, 1e-12)

    fit = {w for w, ink in enumerate(inks) if allowed[w] * np.cov(ink, active)[0, 1] > 0}

    def with_best(chosen):
        signs = list(chosen.values())
        may = [w for w in fit - chosen.keys() if signs.count(allowed[w]) < 2 + allowed[w]]
        return max(({**chosen, w: allowed[w]} for w in may), key=worth, default=chosen)

    chosen, order = {}, []
    while worth(with_best(chosen)) > max(0, 1.03 * worth(chosen)):
        order = [*order, *(chosen := with_best(chosen)).keys() - order]
        for n, word in enumerate(order[:-1]):
            other = with_best({w: s for w, s in chosen.items() if w != word})
            if worth(other) > (1 + 1e-9) * worth(chosen):
                chosen, order[n] = other, list(other)[-1]
    return {word: chosen[word] for word in order}, worth(chosen)


def test_words_are_chosen_as_by_trying_them_all(monkeypatch):
    monkeypatch.setattr(fh, "IMAGES_AT_ONCE", 64)
    rng, n, words = np.random.default_rng(0), 20, fh.word_vocabulary()[:12]
    inks = rng.random((12, 300)) * (rng.random((12, 300)) < 0.5)
    inks[6:] += 0.7 * inks[:6]  # words that say much the same
    labels, scores = rng.integers(3, size=300), rng.random((n, 3)) * (np.arange(n) % 2)[:, None]
    drive = (weights := rng.normal(size=(n, 12))) @ inks + scores[:, labels]
    active = (drive > np.quantile(drive, 0.7, axis=1, keepdims=True)).astype(float)
    allowed = np.sign(weights) * rng.choice([-1, 0, 1, 1], size=(n, 12))
    activity = activity_of(active.T.tolist())._replace(labels=torch.tensor(labels))
    moments = fh._moments(torch.tensor(inks).float(), activity, torch.tensor(scores).float())
    found = fh._choose(moments, torch.tensor(allowed), fh.SAID, words)
    signs, worth = np.zeros((n, 12)), []
    for k, strokes in enumerate(found):
        chosen, value = greedy(inks, scores[k][labels], active[k], allowed[k])
        signs[k, list(chosen)] = list(chosen.values())
        worth.append(value)
        for sign, named in zip((1, -1), strokes, strict=True):
            assert named == tuple(words[w] for w, s in chosen.items() if s == sign)
    assert [max(map(len, part)) for part in zip(*found, strict=True)] == [3, 1]
    squared = fh._squared_correlation(*fh._moments_of_score(torch.tensor(signs), moments))
    assert squared.numpy() == pytest.approx(worth, rel=1e-4)


def test_a_clause_costs_what_the_feature_loses_by_its_edit():
    image = by_hand(STEM_AT)[0] | by_hand(BAR_AT)[0]
    image[6:16, 20:24] = True
    images = torch.cat([image.float().expand(20, 1, 28, 28), torch.full((20, 1, 28, 28), 0.01)])
    empty, other = fh.Word("falling", False, 3, 1), fh.Word("rising", False, 4, 0)
    reader = by_hand(STEM_AT)[0] / 21 - 1.0 * region(empty) - 0.01 * region(other)
    reader[6:16, 20:24] = 1 / 80  # half of what the stem does
    layer = reads(reader)
    activity = fa.collect_activity(layer, images, torch.zeros(40, dtype=torch.int64))
    dot, given = fh.Word("dot", False, 1, 0), (0, layer, fh.Editable.of(images, seed=0), activity)
    ink = fh.Strokes((dot, STEM, BAR), (empty, other))  # a dot has 15 of the stem's 21 pixels
    costs = (np.array([15, 6, 0]) / 21 - np.array([15, 6, 21]) / 80) / 1.5
    expected = dict(zip((*ink.there, *ink.absent), (*costs, 1, 0), strict=True))
    assert fh.clause_moves(ink, ink, *given) == pytest.approx(expected, abs=1e-6)


def test_effects_go_further_than_other_directions_do(world, hand):
    why = "no logit moves further than 95% of other directions move it"
    for layer, images, labels, claims in (world, hand):
        activity, raw = fa.collect_activity(layer, images, labels), layer.raw_of_all(images)
        deltas = fa.removal_effects(layer, images, activity).mean_delta
        for h, row in zip(claims, layer.sae.W_dec, strict=True):
            at, acts = activity.of(h.feature)
            some = np.linspace(0, len(at) - 1, 16).round()
            chance = []
            for direction in row.norm() * fh.other_directions_of(len(row)):
                without = raw[at[some]] - acts[some][:, None] * direction * layer.std
                logits = layer.logits_from_raw(torch.stack([raw[at[some]], without]))
                chance.append((logits[0] - logits[1]).mean(0).numpy())
            highest = np.quantile(np.max(chance, 1), 0.95), np.quantile(-np.min(chance, 1), 0.95)
            found = fh.by_chance(h, layer, raw, activity, 0.95)
            assert (found["raises"], found["lowers"]) == pytest.approx(highest, rel=1e-4)
            moves = -float(deltas[h.feature].min()), float(deltas[h.feature].max())
            named = [verb is not None for verb in (h.effect or (None,) * 4)[::2]]
            assert named == [by > 1.25 * other for by, other in zip(moves, highest, strict=True)]
            assert h.why_not.get("effect") == (None if h.effect else why)
    assert [all(h.effect for h in claims) for *_, claims in (world, hand)] == [False, True]
    assert fh._name_effect(torch.tensor([0.01, -0.5, 0])) == fh.Effect(1, 0.5, None, 0)


def test_an_activity_or_removals_of_others_are_refused(world):
    layer, images, labels, _ = world
    activity = fa.collect_activity(layer, images, labels)
    few, n = fa.collect_activity(layer, images[:100], labels[:100]), len(images)
    removed = fa.removal_effects(layer, images[:100], few)
    for others, message in (
        ({"activity": few}, f"the activity is of 100 images, but {n} were given"),
        ({"labels": labels.flip(0), "activity": activity}, "labels are not those of the activity"),
        ({"removed": removed}, "the removals are of other images than the activity"),
    ):
        with pytest.raises(ValueError, match=message):
            fh.propose_hypotheses(layer, **{"images": images, "labels": labels, **others})


def test_claims_do_not_depend_on_the_default_dtype(world):
    layer, images, labels, claims = world
    cached = fh._vocabulary, fh._region, fh._places_like, fh.other_directions_of
    with double_by_default():
        for function in cached:
            function.cache_clear()
        again = fh.propose_hypotheses(layer, images, labels)
    for function in cached:
        function.cache_clear()
    assert [fh.statement(h) for h in again] == [fh.statement(h) for h in claims]
    assert again == claims


def test_no_ink_is_named_without_gradients(world):
    layer, images, labels, _ = world
    with torch.inference_mode():
        with pytest.raises(ValueError, match="input patterns need gradients"):
            fh.propose_hypotheses(layer, images, labels)
        claims = fh.propose_hypotheses(layer, images, labels, strokes=False)
    assert {h.why_not["ink"] for h in claims} == {"strokes are switched off"}


def test_planted_strokes_are_proposed_again_and_again(world):
    """Shape, cell and no wrong label, for nearly all of the 15 strokes."""
    right = []
    for h, row, (r, c) in zip(world[3], demo.stroke_table(0), demo.CENTRES, strict=True):
        word = said_of(fh.Place(r, c, row.name.split()[0], 7))
        right.append(h.ink.there[:1] == (word,) and h.often in ((), (row.pushes,)))
    assert sum(right) >= 14
    state = torch.random.get_rng_state()
    assert fh.propose_hypotheses(*world[:3]) == world[3]
    assert torch.equal(state, torch.random.get_rng_state())


def test_claims_about_a_model_made_by_hand(hand):
    layer, images, labels, claims = hand
    acts, inks = layer.feature_acts(images).numpy(), fh.word_inks(fh.place_inks(images))
    assert (claims[0].often, claims[0].ink.there[0][2:]) == ((1,), STEM[2:])
    assert (claims[1].ink.there, claims[1].drawing) == ((STEM,), fh.Strokes((STEM_AT,), (BAR_AT,)))
    assert [(w.shape, w.row) for w in claims[1].ink.absent] == [(BAR.shape, BAR.row)]
    for h, own in zip(claims, acts.T, strict=True):
        mean, k = own[own > 0].mean(), h.feature  # removal takes it off logit k, half onto the next
        found = (h.typical_activation, *h.effect)
        assert found == pytest.approx((mean, k, mean, k + 1, mean / 2), rel=1e-5)
        assert list(h.label_histogram) == np.bincount(labels[own > 0], minlength=4).tolist()
        score = fh.part_scores(h, inks, labels)["both"]
        assert h.cut == fh.best_cut(score, np.flatnonzero(own))
    idle = claims[1]._replace(often=(2,), label_scores=(0.0, 0.0, 1.0, 0.0))
    h = fh._weigh(idle, inks, fa.collect_activity(layer, images, labels), fh.Rule())
    assert (h.often, h.why_not["class"]) == ((), "labels add nothing to what the ink predicts")
    plain = fh.propose_hypotheses(layer, images, labels, drawings=False)
    assert plain == [h._replace(drawing=NO_INK) for h in claims]


def test_a_word_whose_edit_does_not_move_the_feature_is_not_said(hand, monkeypatch):
    layer, images, labels, claims = hand
    (stem,) = claims[1].ink.there
    moves_of = fh.clause_moves

    def all_but_the_stem(*given):
        return {w: 0.0 if w == stem else by for w, by in moves_of(*given).items()}

    monkeypatch.setattr(fh, "clause_moves", all_but_the_stem)
    found = fh.propose_hypotheses(layer, images, labels, drawings=False)
    assert all(stem not in h.ink.there for h in found)
    assert claims[1].ink.there == (stem,)


def test_a_single_feature_is_described(hand):
    layer, images, labels, claims = hand
    sae = SimpleNamespace(W_enc=layer.sae.W_enc[:, :1], W_dec=layer.sae.W_dec[:1])
    sae.encode = lambda z: layer.sae.encode(z)[:, :1]
    (alone,) = fh.propose_hypotheses(layer._replace(sae=sae), images, labels)
    assert (alone.ink, alone.often) == (claims[0].ink, claims[0].often)


def test_images_of_another_size_keep_class_and_effect():
    _, images, labels = banded_images()
    layer = reads(*(torch.eye(8)[k].view(1, 8, 1).expand(3, 8, 8) / 24 for k in range(4)))
    why = "images have shape (3, 8, 8); strokes are described on grey 28 x 28 images only"
    for k, h in enumerate(fh.propose_hypotheses(layer, images, labels)):
        assert (h.often, h.effect.raises) == ((k,), k)
        assert (h.ink, h.drawing, h.why_not) == (NO_INK, NO_INK, {"ink": why})
    random = torch.from_numpy(np.random.default_rng(0).permutation(labels))
    for h in fh.propose_hypotheses(layer, images, random):
        assert (h.often, h.hardly, h.why_not["class"][:19]) == ((), (), "no label is 1.5 tim")


def test_parts_that_cannot_be_claimed_say_why(hand):
    layer, images, labels, _ = hand
    for h in fh.propose_hypotheses(layer, 2 * images - 0.1, labels):
        why = "pixels run from -0.1 to 1.9; strokes are described where ink runs from 0 to 1"
        assert (h.ink, h.why_not["ink"]) == (NO_INK, why)
    strict = fh.Rule(class_auroc=1.1, ink_auroc=1.1)
    for h in fh.propose_hypotheses(layer, images, labels, strict):
        assert (h.ink, h.often, h.label_scores, h.cut) == (NO_INK, (), (), None)
        assert h.why_not["ink"].endswith("on the discovery images, 1.1 is asked for")
    few = layer.feature_acts(images)[:, 0].argsort()[-57:]  # all active, and n of them made blank
    for n in (7, 50):
        some = images[few].index_fill(0, torch.arange(n), 0)
        h = fh.propose_hypotheses(layer, some, labels[few])[0]
        why = f"active on {57 - n} of 57 images; 8 active and as many silent ones needed"
        assert (fh.statement(h), h.why_not) == ("no hypothesis", dict.fromkeys(fh.PARTS, why))


def test_unclear_requests_are_refused(world):
    layer, images, labels, _ = world
    with pytest.raises(ValueError, match="whole numbers from 0 are needed"):
        fh.propose_hypotheses(layer, images, labels.float())
    with pytest.raises(ValueError, match="labels run to 10, but the model has 6 classes"):
        fh.propose_hypotheses(layer, images, labels * 2)
    for at in ([], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match=f"{len(at)} of 5 images are active"):
            fh.ranks_of(np.arange(5), np.array(at, dtype=int))
    for odd in (fh.Place(4, 4, "dot", 5), fh.Word("dot", True, 0, 0)):
        with pytest.raises(ValueError, match=r"(row=4|long=True).*is not in word_vocabulary"):
            fh.strokes_score(fh.Strokes((odd,)), torch.zeros(1, 3))


def test_statements_in_words():
    ink = fh.Strokes((SLASH, STEM), (fh.Word("dot", False, 2, 2),))
    fires = {"often": (6, 0), "label_histogram": (12, 0, 0, 0, 0, 0, 80, 8, 0, 0)}
    whole = BLANK._replace(ink=ink, effect=fh.Effect(6, 0.3, 2, 0.124), changes=0.02, **fires)
    assert fh.statement(whole) == (
        "Long slash upper left and stem upper far left, no ink in centre; 80% are 6s, 12% 0s; "
        "without it 6 loses 0.30 and 2 gains 0.12 logits, 2% of predictions change"
    )
    assert fh.statement(BLANK._replace(hardly=(3, 5))) == "Hardly any 3s or 5s; little effect"
    of_any = BLANK._replace(ink=fh.Strokes((STEM,)), changes=0.01)
    assert fh.statement(of_any) == "Stem upper far left; effect like any direction's"
    assert fh.statement(BLANK._replace(changes=0.5)) == "no hypothesis"
    assert list(map(fh.percent, (0, 0.0005, 0.003, 0.8))) == "0% <0.1% 0.3% 80%".split()


def test_frozen_claims_come_back_as_they_were(world, hand, tmp_path):
    path, rule = tmp_path / "h.json", fh.Rule(both_auroc=0.9)
    claims = [*world[3], *hand[3], BLANK._replace(why_not={"class": "nothing"})]
    digest = fh.freeze_hypotheses(claims, path, rule)
    assert fh.read_hypotheses(path, digest) == (claims, rule)
    assert fh.read_hypotheses(path) == (claims, rule)
    lines = path.read_bytes().splitlines(keepends=True)
    assert hashlib.sha256(b"".join([lines[0], *lines[2:]])).hexdigest() == digest
    assert json.loads(lines[1].decode().join("{}").replace(",\n", "")) == {"sha256": digest}

    path.write_text(path.read_text().replace('"raises": 0', '"raises": 1', 1))
    edited = path.read_bytes()
    changed = edited.splitlines(keepends=True)
    other = hashlib.sha256(b"".join([changed[0], *changed[2:]])).hexdigest()
    told = f"changed after it was frozen: its SHA-256 is {other}, recorded was {digest}"
    for known in (digest, None):
        with pytest.raises(ValueError, match=told):
            fh.read_hypotheses(path, known)

    path.write_bytes(edited.replace(digest.encode(), other.encode()))  # a skilful hand
    assert fh.read_hypotheses(path)[0] != claims
    with pytest.raises(ValueError, match=told):
        fh.read_hypotheses(path, digest)


def frozen_with(content: bytes) -> bytes:
    """A frozen file of that content, whatever it is, with its right digest."""
    digest = hashlib.sha256(content).hexdigest()
    return content.replace(b"{\n", f'{{\n "sha256": "{digest}",\n'.encode(), 1)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda f: f.pop("rule"), "it has no 'rule'"),
        (lambda f: f["rule"].update(min_active=None), "rule.min_active is None, not int"),
        (lambda f: f["hypotheses"][0].pop("ink"), r"hypotheses\[0\] has no 'ink'"),
        (lambda f: f["hypotheses"][0].update(often=3), r"\.often is 3, not a list"),
        (lambda f: f["hypotheses"][0].update(often=[77]), "feature 0 counts 6 classes, but names"),
        (
            lambda f: f["hypotheses"][0]["ink"]["absent"].append(
                {"shape": "dot", "long": True, "row": 0, "col": 0}
            ),
            "long=True.* is not in word_vocabulary",
        ),
        (lambda f: f.update(classes=["one"]), "feature 0 counts 6 classes, but names"),
        (lambda f: f.update(hypotheses={}), "hypotheses is {}, not a list"),
    ],
)
def test_what_is_no_claim_is_not_read(world, tmp_path, edit, told):
    path = tmp_path / "h.json"
    fh.freeze_hypotheses(world[3], path)
    frozen = json.loads(path.read_bytes())
    del frozen["sha256"]
    edit(frozen)
    path.write_bytes(frozen_with(json.dumps(frozen, indent=1).encode()))
    with pytest.raises(ValueError, match=f"holds no claims: .*{told}"):
        fh.read_hypotheses(path)
