"""Drawings of what a position sees: crops, scores, edits and hypotheses about known templates."""

import functools
import json
from typing import NamedTuple

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain import evaluation as ev
from saexplain import hypotheses as hy
from saexplain import text
from saexplain.activity import collect_activity
from saexplain.crops import Crops, can_draw_crops, crops_of_positions
from saexplain.edits import edited_cells, edited_images
from saexplain.hypotheses import Faithful, Hypothesis, Rule
from saexplain.ink import Canvas
from saexplain.sae import JumpReLUSAE
from saexplain.substitution import reason_not_compared
from saexplain.where import center_of, crop_around

# --- Crops ----------------------------------------------------------------------------------------


def color_images(n: int, height: int, width: int) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    ("grid", "n_prefix", "side", "image"),
    [((8, 8), 0, (5, 5), (16, 16)), ((3, 4), 1, (7, 7), (12, 20)), ((5, 5), 2, (4, 4), (15, 15))],
)
def test_crops_are_those_around_the_centers_of_positions(grid, n_prefix, side, image):
    positions, images = fa.Positions(grid, n_prefix), color_images(6, *image)
    canvas = Canvas.fit(images).of_crops(crops_of_positions(images, positions, side))
    crops = Crops.of(canvas, positions, image)
    weights = np.random.default_rng(0).integers(-2, 3, (2, *side))
    scores, cells = crops.scores(weights, images)
    for i, own in enumerate(images):
        around = []
        for cell in range(grid[0] * grid[1]):
            center = center_of(torch.tensor([cell + n_prefix]), positions, *image)[0]
            around.append(canvas.levels(crop_around(own, center, side)[None])[0])
            found = crops.levels(images[i : i + 1], torch.tensor([cell]))
            assert torch.equal(found[0], around[-1])
        for drawing, score, cell in zip(weights, scores[:, i], cells[:, i], strict=True):
            each = [int((crop * torch.from_numpy(drawing).flatten()).sum()) for crop in around]
            assert score == max(each) == each[cell]


def test_ink_changes_in_the_crop_only():
    positions, images = fa.Positions((4, 4)), 0.2 + 0.6 * color_images(2, 16, 16)
    canvas = Canvas.fit(images).of_crops(crops_of_positions(images, positions, (5, 5)))
    crops, cells = Crops.of(canvas, positions, (16, 16)), torch.tensor([0, 15])
    change = torch.full((2, 25), 20.0)
    edited = crops.add_ink(images, cells, change)
    before, after = (crops.whole.levels(some).unflatten(1, (16, 16)) for some in (images, edited))
    changed = (after - before).round()
    # The first crop is around 2, with rows and columns 0 to 4; the last one around 14, 12 to 16.
    expected = torch.zeros(2, 16, 16)
    expected[0, :5, :5], expected[1, 12:, 12:] = 20, 20
    assert (changed - expected).abs().max() <= 1


def test_random_crops_are_whole_and_of_positions():
    row = torch.arange(16.0)[:, None].expand(16, 16)
    images = torch.stack([row / 16, row.T / 16]).expand(40, 2, 16, 16)
    crops = crops_of_positions(images, fa.Positions((8, 8)), (5, 5))
    tops, lefts = (16 * crops[:, 0, 0, 0]).unique(), (16 * crops[:, 1, 0, 0]).unique()
    assert tops.tolist() == lefts.tolist() == [0, 2, 4, 6, 8, 10]
    whole = crops_of_positions(images, fa.Positions((1, 2)), (15, 15))  # none is inside
    assert whole.shape[1:] == (2, 15, 15)


@pytest.mark.parametrize(
    ("side", "drawable"), [((5, 5), True), ((32, 32), False), (None, False), ((65, 65), False)]
)
def test_crops_must_be_smaller_than_images_and_fit_a_canvas(side, drawable):
    assert can_draw_crops(side, (32, 32) if side != (65, 65) else (224, 224)) == drawable


# --- Planted templates ----------------------------------------------------------------------------

UPRIGHT, LYING, DENSE = range(3)  # features
BAR = torch.tensor([0, -0.5, -0.5, 1.0, -0.5, -0.5, 0]).repeat(7, 1)
BAR[[0, 6]] = 0
KERNELS = torch.stack([BAR, BAR.T, BAR])


class Templates(NamedTuple):
    """The sums of kernels over 7 x 7 pixels at 8 x 8 positions; logits are their means."""

    positions: fa.Positions = fa.Positions((8, 8))

    def preactivations(self, images):
        framed = torch.nn.functional.pad(images, (2, 3, 2, 3))  # crops begin at 2 i - 2
        return torch.nn.functional.conv2d(framed, KERNELS[:, None], stride=2).flatten(2).mT

    def logits_from_preactivations(self, raw):
        return raw.mean(1) if raw.dim() == 3 else raw


def draw_bars(seed: int) -> tuple[Tensor, Tensor]:
    """Images (300, 1, 16, 16) with two lying bars and some specks each, and on 40% of them an
    upright bar, and labels that say nothing."""
    rng = np.random.default_rng(seed)
    images = 0.3 * (rng.random((300, 1, 16, 16)) < 0.2).astype(np.float32)
    for image in images[:, 0]:
        bars = [False, False, True] if rng.random() < 0.4 else [False, False]
        for upright in bars:
            at, along = 2 * rng.integers(1, 7) + 1, rng.integers(0, 11)
            ink = rng.uniform(0.7, 1)
            (image if upright else image.T)[along : along + 6, at] = ink
    return torch.from_numpy(images), torch.from_numpy(rng.integers(0, 3, 300))


@functools.cache
def templates_layer() -> fa.ExplainedLayer:
    """UPRIGHT and LYING are active where most of a bar is; DENSE, the same as UPRIGHT, anywhere."""
    reads = torch.eye(3)
    weights = {"W_enc": reads, "W_dec": reads, "b_enc": torch.tensor([0.0, 0.0, 10.0])}
    weights |= {"b_dec": torch.zeros(3), "threshold": torch.tensor([2.0, 2.0, 0.1])}
    sae = JumpReLUSAE.from_weights(weights)
    layer = fa.ExplainedLayer(Templates(), sae, torch.zeros(3), torch.ones(3))
    for name, seed in (("val", 0), ("test", 1)):
        layer.splits[name] = layer.activations(*draw_bars(seed))
    return layer


@pytest.fixture(scope="module")
def layer():
    return templates_layer()


ALL = Faithful(torch.ones(3, dtype=torch.bool), torch.ones(3))


@pytest.fixture(scope="module")
def discovery(layer):
    return hy.discover(layer, None, ALL.drawable, KERNELS)


@pytest.fixture(scope="module")
def hypotheses(layer, discovery):
    return hy.propose_hypotheses(layer, discovery, faithful=ALL)


@pytest.fixture(scope="module")
def evidence(layer, discovery, hypotheses):
    return ev.collect_evidence(hypotheses, layer, layer.splits["test"], discovery.canvas)


def test_planted_templates_are_drawn(layer, hypotheses):
    upright, _, dense = hypotheses
    for h in (upright, dense):
        assert (h.undrawn, h.weights.shape) == ("", (7, 7))
        assert (h.weights[2:5, 3] > 0).all()
        assert (h.weights[2:5, [1, 2, 4, 5]] <= 0).all()
        assert h.caption.startswith("Around its peak: ")
    acts = layer.feature_acts(layer.splits["val"].raw)[:, DENSE]
    assert upright.strong_from is None
    assert (acts > 0).all()
    assert dense.strong_from in acts.tolist()
    records = [hy.hypothesis_record(h) for h in hypotheses]
    again = [hy.hypothesis_of(json.loads(json.dumps(r))) for r in records]
    assert [hy.hypothesis_record(h) for h in again] == records


def test_what_is_picked_has_a_large_score_somewhere(layer, discovery, hypotheses, evidence):
    images, _, raw = layer.splits["test"]
    levels = (255 * images[:, 0].clamp(0, 1)).round()
    framed = torch.nn.functional.pad(levels, (2, 3, 2, 3))
    for h, e in zip(hypotheses, evidence, strict=True):
        if not h.is_drawn:
            continue
        kernel = torch.from_numpy(h.weights).float()[None, None]
        score = torch.nn.functional.conv2d(framed[:, None], kernel, stride=2).amax((1, 2, 3))
        acts = layer.feature_acts(raw)[:, h.feature]
        active = acts > 0 if h.strong_from is None else acts >= h.strong_from
        expected = sklearn.metrics.f1_score(active, score >= h.threshold)
        assert e.f1 == pytest.approx(expected)
        assert e.detection.auroc == pytest.approx(sklearn.metrics.roc_auc_score(active, score))
        assert e.n_strong == (None if h.strong_from is None else int(active.sum()))


def test_evaluation_by_itself_finds_the_canvas_of_crops(layer, hypotheses, evidence):
    images, labels, _ = layer.splits["test"]
    assert ev.evaluate_hypotheses(hypotheses, layer, images, labels) == evidence
    given = [Hypothesis(UPRIGHT, hypotheses[UPRIGHT].wanted)], layer, images, labels
    with pytest.raises(ValueError, match="each hypothesis must have a threshold"):
        ev.evaluate_hypotheses(*given)


def test_edits_around_peaks_confirm_planted_templates(layer, discovery, hypotheses, evidence):
    for k in (UPRIGHT, DENSE):
        e = evidence[k]
        assert e.f1 > 0.8
        for name, least in (("erasing", 0.6), ("painting", 0.6)):
            assert e.edits[name].difference()[0] > least
        assert ev.decide(e).confidence in ("High", "Medium")
    h, split = hypotheses[UPRIGHT], layer.splits["test"]
    activity = collect_activity(layer, split.raw, split.labels)
    active, inactive = edited_images(UPRIGHT, activity)
    crops = ev.crops_on(discovery.canvas, layer, split.images)
    chosen = torch.cat([active, inactive])
    cells = edited_cells(h, layer, crops, split.images[chosen], active, activity)
    peaks = layer.acts_at(split.raw[active])[:, :, UPRIGHT].argmax(1)
    assert torch.equal(cells[: len(active)], peaks)
    best = crops.scores(h.weights[None], split.images[inactive])[1][0]
    assert torch.equal(cells[len(active) :], best)


def test_inactive_images_to_edit_are_those_below_strong_activity(layer, hypotheses):
    split = layer.splits["test"]
    activity = collect_activity(layer, split.raw, split.labels)
    acts = layer.feature_acts(split.raw)[:, DENSE]
    strong_from = hypotheses[DENSE].strong_from
    active, inactive = edited_images(DENSE, activity, strong_from)
    assert (acts[active] >= strong_from).all()
    assert (acts[inactive] < strong_from).all()
    assert len(active) == min(32, int((acts >= strong_from).sum()))
    assert len(inactive) == 32


def shuffled(layer, name: str, seed: int):
    """The activity of a split with each feature's images drawn anew."""
    _, labels, raw = layer.splits[name]
    activity, rng = collect_activity(layer, raw, labels), np.random.default_rng(seed)
    image, activation = activity.image.clone(), activity.activation.clone()
    for k, n in enumerate(activity.n_active.tolist()):
        pairs = slice(int(activity.start[k]), int(activity.start[k + 1]))
        image[pairs] = torch.from_numpy(np.sort(rng.permutation(len(labels))[:n]))
        activation[pairs] = activation[pairs][torch.from_numpy(rng.permutation(n))]
    return activity._replace(image=image, activation=activation)


def test_what_is_active_by_chance_is_not_drawn_and_a_drawing_gets_no_confidence(
    layer, discovery, hypotheses
):
    for seed in range(10):
        activity = shuffled(layer, "val", seed)
        found = hy.propose_hypotheses(layer, discovery, None, activity, in_full=False, faithful=ALL)
        assert not any(h.is_drawn for h in found)
        assert {h.undrawn for h in found} == {hy.PREDICTS_BADLY}
        given = layer, layer.splits["test"], discovery.canvas, Rule()
        drawn = [h for h in hypotheses if h.is_drawn]
        tested = ev.collect_evidence(drawn, *given, shuffled(layer, "test", 50 + seed))
        assert [ev.decide(e).confidence for e in tested] == ["Low"] * len(drawn)


def test_unfaithful_features_are_not_drawn(layer):
    some = Faithful(torch.tensor([True, False, True]), torch.tensor([0.9, 0.3, 0.9]))
    discovery = hy.discover(layer, None, some.drawable, KERNELS)
    found = hy.propose_hypotheses(layer, discovery, faithful=some, in_full=False)
    assert [h.is_drawn for h in found] == [True, False, True]
    assert found[LYING].undrawn == "its pattern follows it with a correlation of 0.30 only"
    assert hy.discover(layer, None, torch.zeros(3, dtype=torch.bool), KERNELS).canvas is None
    assert hy.discover(layer, None, ALL.drawable, torch.zeros(3, 16, 16)).canvas is None


def test_drawings_of_crops_take_the_place_of_no_features(layer, hypotheses):
    split = layer.splits["val"]
    activity = collect_activity(layer, split.raw, split.labels)
    reason = reason_not_compared(hypotheses, activity, has_positions=True)
    assert reason == "they show what a position sees, not the whole image"


def test_words_say_how_crops_are_tested(layer, discovery, hypotheses, evidence):
    e = evidence[DENSE]
    line = text.evidence_line(e)
    assert f"it is tested on the {e.n_strong} images" in line
    assert "activate the feature strongly; it finds" in line
    halves = ev.split_test_images(layer.splits["test"])
    activity = collect_activity(layer, halves[0].raw, halves[0].labels)
    rows = ev.evaluate_halves(hypotheses, layer, halves, discovery.canvas, Rule(), activity)
    none = ev.Agreements(1.0, None, None, "why not")
    evaluation = ev.make_evaluation(hypotheses, Rule(), rows, activity, none, 300)
    page = text.hypotheses_markdown(evaluation, ev.evaluation_record(evaluation, {}, "abc"), "t")
    assert "of the 7 x 7 pixels that a position of the layer sees" in page
    assert "{" not in page
    assert [row.replicated for row in rows if row.decision.confidence != "Low"].count(False) <= 1


def test_strong_activity_needs_positions(layer, discovery):
    class Flat(NamedTuple):
        def preactivations(self, images):
            return images.flatten(1)[:, :3]

        def logits_from_preactivations(self, raw):
            return raw

    flat = fa.ExplainedLayer(Flat(), layer.sae, layer.mu, layer.std)
    split = flat.activations(*draw_bars(0))
    h = Hypothesis(0, np.zeros((1, 1)), undrawn="no", strong_from=1.0)
    with pytest.raises(ValueError, match="feature 0: only for layers with positions strong_from"):
        ev.collect_evidence([h], flat, split, None)
    wrong = Hypothesis(0, np.eye(4), threshold=1)
    with pytest.raises(ValueError, match=r"feature 0 must have shape \(7, 7\), got \(4, 4\)"):
        ev.collect_evidence([wrong], layer, layer.splits["test"], discovery.canvas)
