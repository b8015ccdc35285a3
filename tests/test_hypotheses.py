"""Proposals: against scikit-learn, models by hand, plain loops; captions, and frozen files."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from planted_strokes import blank, draw_labelled, plant, stroke_table
from saexplain.strokes import Place, Strokes, Word, place_inks, place_masks, word_inks

import feature_analysis as fa
from saexplain import hypotheses as hy
from saexplain import strokes
from saexplain.activity import collect_activity, removal_effects
from saexplain.captions import caption, percent, plural
from saexplain.hypotheses import PARTS, Effect, Rule, propose_hypotheses

STEM_AT, BAR_AT = Place(9, 7, "vertical", 7), Place(21, 19, "horizontal", 7)
STEM, BAR = Word("vertical", False, 1, 0), Word("horizontal", False, 4, 3)
SLASH = Word("rising", True, 1, 1)
NO_INK = Strokes()


def mask_of(place: Place) -> torch.Tensor:
    return place_masks([place])[0]


def reads(*weights: torch.Tensor, d_in: int = 300) -> fa.ExplainedLayer:
    """Feature k weighs pixels so, raises logit k and lowers the next by half as much."""
    n, rows = len(weights), torch.stack(weights).flatten(1)
    head = torch.eye(d_in, n) @ (torch.eye(4) - 0.5 * torch.eye(4).roll(1, 1))[:n]
    model = SimpleNamespace(logits_from_preactivations=lambda z: z @ head)
    model.preactivations = lambda images: images.flatten(1) @ rows.T @ torch.eye(n, d_in)
    sae = SimpleNamespace(W_enc=torch.eye(d_in, n), W_dec=torch.eye(n, d_in))
    sae.encode = lambda z: z[:, :n] * (z[:, :n] > 0.4)
    return fa.ExplainedLayer(model, sae, torch.zeros(d_in), torch.ones(d_in))


@pytest.fixture(scope="module")
def planted():
    table = stroke_table(0)
    layer = plant(table)
    split = layer.activations(*draw_labelled(table, 0))
    return layer, split, propose_hypotheses(layer, split)


@pytest.fixture(scope="module")
def hand():
    """Feature 0 is activated by a stem on 1s, feature 1 by a stem where there is no bar."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (600,), generator=generator)
    others = [place for place in strokes.stroke_vocabulary() if place.shape != "dot"][::9]
    masks = place_masks([STEM_AT, BAR_AT, *others]).float()
    often = torch.tensor([0.3, 0.5] + [2 / len(others)] * len(others))
    drawn = (torch.rand(600, len(masks), generator=generator) < often).float()
    images = 0.9 * torch.einsum("ns,srl->nrl", drawn, masks).clamp(max=1)[:, None]
    images[:, 0, 0, 0] = (labels == 1).float()  # a pixel that no stroke reaches
    (stem, bar), corner = masks[:2] / 21, torch.eye(784)[0].view(28, 28)
    layer = reads(0.3 * stem + 0.3 * corner, stem - bar)
    split = layer.activations(images, labels)
    return layer, split, propose_hypotheses(layer, split)


# --- Scores, labels, words ------------------------------------------------------------------------


def test_scores_of_parts():
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    of_places, labels = place_inks(images), torch.tensor([0, 1, 2, 1])
    inks, ink = word_inks(of_places), Strokes((STEM, BAR), (SLASH,))
    words = strokes.word_vocabulary()
    stem, bar, slash = (inks[words.index(w)].numpy() for w in (STEM, BAR, SLASH))
    of_label = [0.25, 1, 0.5, 1]
    labelled = blank(enriched=(1,), label_scores=(0.25, 1, 0.5))
    both = hy.part_scores(labelled._replace(ink=ink), inks, labels)
    expected = {"ink": stem + bar - slash, "class": of_label, "both": stem + bar - slash + of_label}
    assert both == {part: pytest.approx(by, abs=1e-6) for part, by in expected.items()}
    for part, h in (("class", labelled), ("ink", blank(ink=ink))):
        alone = hy.part_scores(h, inks, labels)
        assert alone["both"] is alone[part]
        assert np.array_equal(alone[part], both[part])
    places = strokes.vocabulary().places
    stem, bar = (of_places[places.index(p)].numpy() for p in (STEM_AT, BAR_AT))
    found = hy.drawing_score(
        labelled._replace(drawing=Strokes((STEM_AT,), (BAR_AT,))), of_places, labels
    )
    assert found == pytest.approx(stem - bar + of_label, abs=1e-5)


@pytest.mark.parametrize(
    ("histogram", "usual", "enriched", "depleted", "rates"),
    [
        ((40, 14, 16, 0, 30), (1, 1, 1, 1, 6), (0, 2), (), (4, 0.55, 1.6, 0.55, 0.55)),
        ((30, 30, 25, 15, 0), (1, 1, 1, 1, 6), (0, 1), (), (3, 3, 0.5, 0.5, 0.5)),  # two at most
        ((25, 25, 25, 24, 1), (1, 1, 1, 1, 1), (), (4,), (1, 1, 1, 1, 0)),
        ((25, 25, 25, 25, 0), (1, 1, 1, 1, 0), (), (), (1, 1, 1, 1, 1)),  # a label of no image
    ],
)
def test_labels_are_named_for_their_lift(histogram, usual, enriched, depleted, rates):
    named = hy._name_labels(np.array(histogram), 100 * np.array(usual))
    assert (named["enriched"], named["depleted"]) == (enriched, depleted)
    assert named["label_scores"] == pytest.approx(np.sqrt(np.array(rates) / max(rates)))


def test_the_auroc_of_labels_is_scikit_learns():
    rng, scores = np.random.default_rng(0), np.array([0.2, 1.0, 0.2, 0.2, 0.7])
    labels, active = rng.integers(5, size=400), rng.random(400) < 0.2
    h = blank(label_scores=scores, label_histogram=np.bincount(labels[active]))
    expected = sklearn.metrics.roc_auc_score(active, scores[labels])
    assert hy._class_auroc(h, np.bincount(labels)) == pytest.approx(expected, abs=1e-12)


# --- Proposals ------------------------------------------------------------------------------------


def test_effects_are_larger_than_those_of_random_directions(planted, hand):
    for layer, (_, labels, raw), proposed in (planted, hand):
        activity = collect_activity(layer, raw, labels)
        deltas = removal_effects(layer, raw, activity).mean_delta
        for h, row in zip(proposed, layer.sae.W_dec, strict=True):
            at, acts = activity.of(h.feature)
            some = np.linspace(0, len(at) - 1, 16).round()
            rows, changes = raw[at[some]], []
            for direction in row.norm() * hy.random_directions(len(row)):
                without = rows - acts[some][:, None] * direction * layer.std
                logits = layer.model.logits_from_preactivations(torch.stack([rows, without]))
                changes.append((logits[0] - logits[1]).mean(0).numpy())
            highest = np.quantile(np.max(changes, 1), 0.95), np.quantile(-np.min(changes, 1), 0.95)
            found = hy.null_effect(h.feature, layer, raw[at], acts, 0.95)
            assert (found["raises"], found["lowers"]) == pytest.approx(highest, rel=1e-4)
            moves = -float(deltas[h.feature].min()), float(deltas[h.feature].max())
            named = [verb is not None for verb in (h.effect or (None,) * 4)[::2]]
            assert named == [by > 1.25 * other for by, other in zip(moves, highest, strict=True)]
            assert ("effect" in h.skip_reasons) == (h.effect is None)
    assert [all(h.effect for h in proposed) for *_, proposed in (planted, hand)] == [False, True]


def test_proposals_are_the_same_again_and_leave_inputs_unchanged(planted):
    layer, split, proposed = planted
    before, state = [v.clone() for v in split], torch.random.get_rng_state()
    assert propose_hypotheses(layer, split) == proposed
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, split))


def test_hypotheses_about_a_model_made_by_hand(hand):
    layer, split, proposed = hand
    images, labels, raw = split
    acts, inks = layer.feature_acts(raw).numpy(), word_inks(place_inks(images))
    assert (proposed[0].enriched, proposed[0].ink.there[0][2:]) == ((1,), STEM[2:])
    assert proposed[1].ink.there == (STEM,)
    assert proposed[1].drawing == Strokes((STEM_AT,), (BAR_AT,))
    assert [(w.shape, w.row) for w in proposed[1].ink.absent] == [(BAR.shape, BAR.row)]
    for h, own in zip(proposed, acts.T, strict=True):
        mean, k = own[own > 0].mean(), h.feature  # removal takes it off logit k, half onto the next
        found = (h.typical_activation, *h.effect)
        assert found == pytest.approx((mean, k, mean, k + 1, mean / 2), rel=1e-5)
        assert list(h.label_histogram) == np.bincount(labels[own > 0], minlength=4).tolist()
        score = hy.part_scores(h, inks, labels)["both"]
        assert h.threshold == hy.best_threshold(score, np.flatnonzero(own))
    idle = proposed[1]._replace(enriched=(2,), label_scores=(0.0, 0.0, 1.0, 0.0))
    h = hy._drop_weak_parts(idle, inks, collect_activity(layer, raw, labels), Rule())
    assert (h.enriched, "class" in h.skip_reasons) == ((), True)
    plain = propose_hypotheses(layer, split, drawings=False)
    assert plain == [h._replace(drawing=NO_INK) for h in proposed]


def test_images_of_another_size_keep_labels_and_effects():
    labels = torch.arange(400) % 4
    images = torch.eye(8)[labels].view(400, 1, 8, 1).repeat(1, 3, 1, 8)
    layer = reads(*(torch.eye(8)[k].view(1, 8, 1).expand(3, 8, 8) / 24 for k in range(4)))
    split = layer.activations(images, labels)
    for k, h in enumerate(propose_hypotheses(layer, split)):
        assert (h.enriched, h.effect.raises) == ((k,), k)
        assert (h.ink, h.drawing, [*h.skip_reasons]) == (NO_INK, NO_INK, ["ink"])


def test_parts_that_cannot_be_proposed_have_a_reason(hand):
    layer, split, _ = hand
    shifted = layer.activations(2 * split.images - 0.1, split.labels)
    for given, options, reason in (
        (shifted, {}, "pixels run from -0.1 to 1.9"),
        (split, {"strokes": False}, "strokes are switched off"),
        (split, {"rule": Rule(class_auroc=1.1, ink_auroc=1.1)}, "below 1.1"),
    ):
        for h in propose_hypotheses(layer, given, **options):
            assert h.ink == NO_INK
            assert reason in h.skip_reasons["ink"]
            assert (h.threshold is None) == (not h.enriched)
    few = layer.feature_acts(split.raw)[:, 0].argsort()[-57:]  # all active, and n of them blank
    for n in (7, 50):
        some = split.images[few].index_fill(0, torch.arange(n), 0)
        h = propose_hypotheses(layer, layer.activations(some, split.labels[few]))[0]
        assert (caption(h), [*h.skip_reasons]) == ("no hypothesis", [*PARTS])
        assert f"active on {57 - n} of 57 images" in h.skip_reasons["ink"]


def test_errors_of_proposals(planted):
    layer, split, _ = planted
    with pytest.raises(ValueError, match="labels"):
        propose_hypotheses(layer, split._replace(labels=split.labels * 2))
    few = collect_activity(layer, split.raw[:100], split.labels[:100])
    with pytest.raises(ValueError, match="activity"):
        propose_hypotheses(layer, split, activity=few)
    with torch.inference_mode(), pytest.raises(ValueError, match="gradients"):
        propose_hypotheses(layer, split)


# --- Captions and frozen files --------------------------------------------------------------------


def test_captions():
    ink = Strokes((SLASH, STEM), (Word("dot", False, 2, 2),))
    counts = {"enriched": (6, 0), "label_histogram": (12, 0, 0, 0, 0, 0, 80, 8, 0, 0)}
    whole = blank(ink=ink, effect=Effect(6, 0.3, 2, 0.124), changes=0.02, **counts)
    assert caption(whole) == (
        "Long slash upper left and stem upper far left, no ink in center; 80% are 6s, 12% 0s; "
        "without it 6 loses 0.30 and 2 gains 0.12 logits, 2% of predictions change"
    )
    assert caption(blank(depleted=(3, 5))) == "Hardly any 3s or 5s; little effect"
    assert "random direction" in caption(blank(ink=Strokes((STEM,)), changes=0.01))
    assert caption(blank(changes=0.5)) == "no hypothesis"
    assert list(map(percent, (0, 0.0005, 0.003, 0.8))) == "0% <0.1% 0.3% 80%".split()
    names = ("6", "Trousers", "Dress", "Bag", "cherry", "toy", "T-shirt/top")
    expected = "6s Trousers Dresses Bags cherries toys T-shirts/tops".split()
    assert list(map(plural, names)) == expected


def digest_of(path) -> str:
    """The SHA-256 of a frozen file without its second line."""
    lines = path.read_bytes().splitlines(keepends=True)
    return hashlib.sha256(b"".join([lines[0], *lines[2:]])).hexdigest()


def test_frozen_hypotheses_come_back_as_they_were(planted, hand, tmp_path):
    path, rule = tmp_path / "h.json", Rule(both_auroc=0.9)
    some = [*planted[2], *hand[2], blank(skip_reasons={"class": "nothing"})]
    some = [h._replace(classes=tuple("abcdef")) for h in some]
    digest = hy.freeze_hypotheses(some, path, rule)
    assert hy.read_hypotheses(path, digest) == hy.read_hypotheses(path) == (some, rule)
    assert digest == digest_of(path) == json.loads(path.read_bytes())["sha256"]


@pytest.mark.parametrize("known", [True, False])
def test_edited_files_are_found_out(planted, tmp_path, known):
    path = tmp_path / "h.json"
    digest = hy.freeze_hypotheses(planted[2], path)
    path.write_text(path.read_text().replace('"raises": 0', '"raises": 1', 1))
    other = digest_of(path)
    with pytest.raises(ValueError, match=f"is {other}, recorded was {digest}"):
        hy.read_hypotheses(path, digest if known else None)
    path.write_text(path.read_text().replace(digest, other))  # the digest replaced as well
    assert hy.read_hypotheses(path)[0] != planted[2]
    with pytest.raises(ValueError, match=f"is {other}, recorded was {digest}"):
        hy.read_hypotheses(path, digest)
