"""Edits: places and amounts against plain loops, tests of a model by hand, paired differences."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from planted import drawing, paired
from small_models import activity_of

import feature_analysis as fa
from saexplain import edits
from saexplain.activity import collect_activity
from saexplain.edits import Drawn, EditTest, Shapes, edit_tests, places_elsewhere
from saexplain.ink import Canvas

SIDE = 12


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(SIDE, SIDE) bool, True on rows top..bottom and columns left..right, all included."""
    row, column = np.mgrid[:SIDE, :SIDE]
    return (top <= row) & (row <= bottom) & (left <= column) & (column <= right)


# --- Places elsewhere -----------------------------------------------------------------------------


def places_by_hand(region: np.ndarray, free: np.ndarray, step: int) -> list[list[int]]:
    """The free cells of each place, all moves being tried one by one."""
    height, width = region.shape
    found = []
    for down, right in itertools.product(range(-height, height), range(-width, width)):
        if down % step or right % step:
            continue
        cells = [(r + down, c + right) for r, c in np.argwhere(region)]
        fits = [
            r * width + c for r, c in cells if 0 <= r < height and 0 <= c < width and free[r, c]
        ]
        if fits:
            found.append((-len(fits), abs(down) + abs(right), down, right, sorted(fits)))
    return [fits for *_, fits in sorted(found)[:8]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("step", [1, 3])
def test_places_are_the_fullest_and_nearest_of_all_moves(seed, step):
    rng = np.random.default_rng(seed)
    region, free = rng.random((9, 11)) < 0.1, rng.random((9, 11)) < (0.7, 0.05)[seed % 2]
    free &= ~region
    found = places_elsewhere(region, free, step)
    assert found.shape[1] == 99
    assert [np.flatnonzero(place).tolist() for place in found] == places_by_hand(region, free, step)
    assert set(np.unique(found)) <= {0, 1}
    assert len(places_elsewhere(region, free & False, step)) == 0


def test_moves_reach_the_edges_the_shortest_first():
    found = list(zip(*(axis.tolist() for axis in edits.moves(4, 8, 3)), strict=True))
    every = itertools.product((-3, 0, 3), (-6, -3, 0, 3, 6))
    assert found == sorted(every, key=lambda m: (abs(m[0]) + abs(m[1]), *m))


def test_regions_move_by_themselves_each_to_the_two_places_with_most():
    weights = (rectangle(2, 3, 2, 4) | rectangle(8, 9, 7, 9)).astype(int)
    regions = edits.regions_of(weights > 0)
    assert [r.nonzero()[0][0] for r in regions] == [2, 8]
    levels = torch.randint(0, 256, (5, SIDE**2), generator=torch.Generator().manual_seed(0)).float()
    free = rectangle(1, 10, 1, 10) & (weights == 0)
    shapes = Shapes.of(weights > 0, free, 1)
    for image, other in zip(levels.numpy(), shapes.other(levels).numpy(), strict=True):
        expected = np.zeros(SIDE**2)
        for region in regions:
            places = places_by_hand(region, free, 1)
            for cells in sorted(places, key=lambda cells: -image[cells].sum())[:2]:
                expected[cells] = 1
        assert np.array_equal(other, expected)


def test_drawings_move_over_cells_that_are_inked_and_not_drawn():
    canvas = Canvas.fit(
        torch.from_numpy(rectangle(1, 10, 1, 10)[None, None]).float().repeat(2, 1, 1, 1)
    )
    weights = rectangle(4, 5, 4, 7).astype(int) - 2 * rectangle(7, 8, 4, 7)
    drawn = Drawn.of(weights, canvas)
    free = rectangle(1, 10, 1, 10) & (weights == 0)
    for shapes, cells in ((drawn.wanted, weights > 0), (drawn.unwanted, weights < 0)):
        assert np.array_equal(shapes.cells.view(SIDE, SIDE) == 1, cells)
        (places,) = shapes.elsewhere
        assert np.array_equal(places, places_elsewhere(cells, free, 1))  # 3 of 28 pixels


# --- Edits ----------------------------------------------------------------------------------------

HERE, THERE = rectangle(1, 1, 1, 3), rectangle(5, 5, 1, 3)  # of three cells each
SHAPES = Shapes(
    torch.from_numpy(HERE).flatten().float(), [torch.from_numpy(THERE[None]).flatten(1).float()]
)


def levels_of(here: list[int], there: list[int]) -> torch.Tensor:
    levels = torch.full((1, SIDE**2), 7.0)
    levels[0, HERE.ravel()], levels[0, THERE.ravel()] = torch.tensor([here, there]).float()
    return levels


@pytest.mark.parametrize(
    ("edit", "here", "there", "named", "elsewhere"),
    [
        (edits.erase, (255, 100, 0), (355, 0, 0), (-255, -100, 0), (-355, 0, 0)),
        (edits.erase, (100, 100, 200), (60, 40, 0), (-100, -100, -200), (-60, -40, 0)),
        (edits.erase, (10, 20, 20), (0, 0, 100), (-10, -20, -20), (0, 0, -50)),
        (edits.erase, (10, 20, 20), (0, 0, 0), (-10, -20, -20), (0, 0, 0)),
        (64, (0, 64, 100), (0, 255, 255), (64, 0, 0), (64, 0, 0)),
        (64, (0, 0, 200), (32, 64, 90), (64, 64, 0), (32, 0, 0)),
        (255, (155, 255, 255), (5, 205, 255), (100, 0, 0), (250 / 3, 50 / 3, 0)),
    ],
)
def test_edits_by_hand(edit, here, there, named, elsewhere):
    levels = levels_of(here, there)
    before = levels.clone()
    pair = edits.erase(levels, SHAPES) if edit is edits.erase else edits.paint(levels, SHAPES, edit)
    for change, cells, expected in zip(pair, (HERE, THERE), (named, elsewhere), strict=True):
        assert change[0, cells.ravel()].tolist() == pytest.approx(expected)
        assert (change[0, ~cells.ravel()] == 0).all()
    assert torch.equal(levels, before)


def test_edits_change_at_most_as_much_elsewhere_and_keep_levels_in_range():
    canvas = Canvas.fit(torch.ones(2, 1, SIDE, SIDE))
    weights = rectangle(2, 3, 2, 6).astype(int) - rectangle(6, 9, 6, 7)
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (40, SIDE**2), generator=generator).float()
    levels[:5] = 0
    found = edits.make_edits(Drawn.of(weights, canvas), levels, levels)
    assert list(found) == list(edits.EDITS)
    for name in ("erasing", "filling"):
        named, elsewhere = found[name]
        amounts = named.abs().sum(1), elsewhere.abs().sum(1)
        assert (amounts[1] <= amounts[0] + 1e-2).all()
        assert (amounts[1] >= amounts[0] - 1e-2).float().mean() > 0.5
        assert (elsewhere[:, weights.ravel() != 0] == 0).all()
        assert (
            named[:, {"erasing": weights <= 0, "filling": weights >= 0}[name].ravel()] == 0
        ).all()
    for pair in found.values():
        for change in pair:
            assert -1e-3 < (levels + change).min()
            assert (levels + change).max() < 255 + 1e-3
    made, _ = found["painting"]  # of inactive images
    assert made[5:, weights.ravel() > 0].min() >= 0 >= made[5:, weights.ravel() < 0].max()
    alone = edits.make_edits(Drawn.of(weights.clip(0), canvas), levels, levels)
    assert list(alone) == ["erasing", "painting"]
    alone = edits.make_edits(Drawn.of(weights.clip(None, 0), canvas), levels, levels)
    assert list(alone) == ["filling", "painting"]


def test_edited_images_are_evenly_spaced():
    activity = activity_of([[1.0]] * 100 + [[0.0]] * 33 + [[1.0]])
    active, inactive = edits.edited_images(0, activity)
    steps = [*range(100), 133]
    assert active.tolist() == [steps[round(float(i))] for i in torch.linspace(0, 100, 32)]
    assert (inactive[0], inactive[-1], len(set(inactive.tolist()))) == (100, 132, 32)


# --- Edits as tests of a model by hand ------------------------------------------------------------

NAMED, OTHER = rectangle(5, 6, 2, 4), rectangle(5, 6, 7, 9)
# Nearby there is ink that can be erased, and room for more.
NEAR = 0.7 * rectangle(3, 4, 1, 10) + 0.02 * rectangle(7, 8, 1, 10)


def edits_of_model(weights: np.ndarray, reads: tuple[float, float], on: tuple, off: tuple) -> dict:
    """Edits of 40 images that activate a feature, with so much ink in NAMED and OTHER, and of 40
    that do not: the feature is active where reads · inks, of each the mean, exceeds 0.25."""
    images = torch.from_numpy(NEAR).float().repeat(80, 1, 1, 1)
    for mask, dark, light in zip((NAMED, OTHER), on, off, strict=True):
        images[:40, :, torch.from_numpy(mask)], images[40:, :, torch.from_numpy(mask)] = dark, light
    rows = torch.from_numpy(np.stack([NAMED, OTHER])).flatten(1).float()
    reader = (rows / rows.sum(1, keepdim=True)).T @ torch.tensor(reads)[:, None]
    model = SimpleNamespace(
        preactivations=lambda x: x.flatten(1) @ reader,
        logits_from_preactivations=lambda z: torch.cat([z, -z], 1),
    )
    sae = SimpleNamespace(
        W_enc=torch.eye(1), W_dec=torch.eye(1), encode=lambda z: (z - 0.25).relu()
    )
    layer = fa.ExplainedLayer(model, sae, torch.zeros(1), torch.ones(1))
    split = layer.activations(images, torch.zeros(80, dtype=torch.int64))
    activity = collect_activity(layer, split.raw, split.labels)
    assert activity.n_active.tolist() == [40]
    return edit_tests(drawing(0, weights), layer, images, activity, Canvas.fit(images))


ALWAYS, NEVER = EditTest(32, 32, 0, 32, 0), EditTest(32, 0, 0, 0, 0)


def test_edits_of_a_feature_that_reads_ink_and_blank():
    on, off = (0.6, 0.0), (0.1, 0.4)
    found = edits_of_model(1 * NAMED - OTHER, (1.0, -2.0), on, off)
    assert found == dict.fromkeys(edits.EDITS, ALWAYS)
    # The wrong way round, there is nothing to erase and the wanted ink is in the way.
    found = edits_of_model(1 * OTHER - NAMED, (1.0, -2.0), on, off)
    assert {name: test.named for name, test in found.items()} == dict.fromkeys(edits.EDITS, 0)


def test_edits_of_ink_alone():
    found = edits_of_model(2 * NAMED, (1.0, 0.0), (0.6, 0.3), (0.2, 0.3))
    assert found == {"erasing": ALWAYS, "painting": ALWAYS}
    assert edits_of_model(1 * OTHER, (1.0, 0.0), (0.6, 0.3), (0.2, 0.3))["painting"].named == 0
    assert edits_of_model(0 * NAMED, (1.0, 0.0), (0.6, 0.3), (0.2, 0.3)) == {}


# --- Differences of paired shares -----------------------------------------------------------------


def test_differences_against_published_ones_and_counts_by_hand():
    """Of 161 patients, 59 responded both before and after consolidation, 6 only before, 16 only
    after, 80 never (Cavo et al. 2012): -0.0621 (-0.1186 to -0.0046) in Fagerland, Lydersen & Laake,
    Statistical Analysis of Contingency Tables (2017), chapter 8."""
    found = paired(59, 6, 16, 80).difference()
    assert found == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)
    named, elsewhere = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=bool)
    assert EditTest.of(named, elsewhere) == EditTest(5, 3, 2, 2, 1)


def by_formula(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Newcombe (1998), method 10, written out."""
    n, cross = a + b + c + d, a * d - b * c
    if cross > 0:
        cross = max(cross - n / 2, 0)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    phi = cross / margins**0.5 if margins else 0.0
    p, q = (a + b) / n, (a + c) / n
    ci_p = scipy.stats.binomtest(a + b, n).proportion_ci(method="wilson")
    ci_q = scipy.stats.binomtest(a + c, n).proportion_ci(method="wilson")
    down, up, down_q, up_q = p - ci_p.low, ci_p.high - p, q - ci_q.low, ci_q.high - q
    low = p - q - (down**2 - 2 * phi * down * up_q + up_q**2) ** 0.5
    return low, p - q + (up**2 - 2 * phi * up * down_q + down_q**2) ** 0.5


def test_differences_by_their_formula():
    """Of all tables of 7 images, and of some others; no interval has width 0."""
    tables = [(14, 5, 0, 22), (0, 0, 0, 64), (64, 0, 0, 0), (32, 0, 0, 32), (5, 20, 3, 20)]
    tables += [cells for cells in itertools.product(range(8), repeat=4) if sum(cells) == 7]
    for cells in tables:
        value, low, high = paired(*cells).difference()
        assert value == pytest.approx((cells[1] - cells[2]) / sum(cells))
        assert (low, high) == pytest.approx(by_formula(*cells), abs=1e-6)
        assert low + 0.02 < high
