"""Images as ink, and the regions chosen for a pattern, against plain references."""

import numpy as np
import pytest
import torch
from planted_templates import CLAUSES, plant, templates_of
from scipy import ndimage
from torch import Tensor

from saexplain.captions import caption_of
from saexplain.hypotheses import discover, patterns_on_canvas
from saexplain.ink import FULL_INK, MAX_SIDE, Canvas
from saexplain.regions import (
    LEVELS,
    MAX_REGIONS,
    MIN_CELLS,
    MIN_GAIN,
    REACH,
    SMOOTHING,
    choose_regions,
    find_candidates,
    local_covariance,
    smooth_templates,
    two_tones,
)

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def random_images(n: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images (n, C, H, W) from 0.2 to 0.8, but for one pixel of 1, in a frame of blank ground."""
    images = torch.zeros(n, channels, height, width)
    rand = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))
    top, left = height // 4, width // 4
    images[:, :, top:-top, left:-left] = 0.2 + 0.6 * rand[:, :, top:-top, left:-left]
    images[:, :, top, left] = 1
    return images


# --------------------------------------------------------------------------------------------------
# Ink
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("white_ground", [False, True])
def test_levels_of_bytes_are_exact(white_ground):
    levels = torch.zeros(256, 1, 4, 4)  # mostly ground
    levels[:, 0, 1, 2] = torch.arange(256)
    images = 1 - levels / 255 if white_ground else levels / 255
    canvas = Canvas.fit(images)
    assert canvas.sign == (-1 if white_ground else 1)
    assert torch.equal(canvas.levels(images), levels.flatten(1))
    assert canvas.inked.nonzero().tolist() == [[6]]
    assert np.allclose(canvas.std, levels.flatten(1).numpy().std(0, ddof=1) / 255)


CHANNEL_STD = torch.tensor([0.2, 0.3, 0.25])[:, None, None]
KINDS = {  # images, their ink by hand
    "gray": lambda x: (x, x[:, 0]),
    "normalized": lambda x: ((x - 0.13) / 0.31, x[:, 0]),
    "white ground": lambda x: (1 - x, x[:, 0]),
    "white ground, normalized": lambda x: ((0.5 - x) / 0.5, x[:, 0]),
    "no channel": lambda x: (x[:, 0], x[:, 0]),
    "color": lambda x: (x, torch.einsum("nchw,c->nhw", x, torch.tensor(LUMINANCE))),
    "color, normalized": lambda x: ((x - 0.4) / CHANNEL_STD, KINDS["color"](x)[1]),
}


def images_of_kind(kind: str, n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Random images of a kind, and their ink (n, H, W) by hand."""
    return KINDS[kind](random_images(n, 3 if kind.startswith("color") else 1, height, width))


@pytest.mark.parametrize("kind", KINDS)
def test_ink_is_what_differs_from_the_ground(kind):
    images, expected = images_of_kind(kind, 20, 12, 16)
    canvas = Canvas.fit(images)
    assert canvas.shape == (12, 16)
    assert torch.allclose(canvas.ink(images), expected, atol=1e-5)


def test_cells_of_large_images_are_means_of_squares():
    images = random_images(4, 1, 150, 100)  # 50 x 34 cells; the last column has one pixel's width
    canvas = Canvas.fit(images)
    assert canvas.cell == 3
    assert canvas.shape == (50, 34)
    ink = canvas.ink(images)
    for row, column in [(0, 0), (20, 15), (30, 12), (49, 33)]:
        square = images[:, 0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert torch.allclose(ink[:, row, column], square.mean((1, 2)))
    assert Canvas.fit(random_images(4, 1, MAX_SIDE, MAX_SIDE)).cell == 1
    assert Canvas.fit(random_images(4, 1, MAX_SIDE + 1, 8)).shape == (33, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [12, 130])
def test_added_ink_is_found_again(kind, side):
    images, _ = images_of_kind(kind, 3, side, side + 2)
    images = images[:, None] if images.dim() == 3 else images
    canvas = Canvas.fit(images)
    before = canvas.ink(images)
    change = torch.zeros_like(before)
    middle = slice(before.shape[1] // 3, before.shape[1] // 2)  # inked cells: nothing is clipped
    change[:, middle, middle] = torch.tensor([0.1, -0.1, 0.05])[:, None, None]
    after = canvas.ink(canvas.add_ink(images, change.flatten(1)))
    assert torch.allclose(after - before, change, atol=1e-5)
    full = canvas.add_ink(images, torch.full_like(change, 2.0).flatten(1))
    assert torch.allclose(canvas.ink(full), torch.ones_like(change), atol=1e-5)
    assert full.min() >= images.min()
    assert full.max() <= images.max() + 1e-5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "color, normalized"])
@pytest.mark.parametrize("side", [12, 130])
def test_patterns_are_slopes_along_ink(kind, side):
    """A linear unit's change by added ink is the change's product with its pattern."""
    images, _ = images_of_kind(kind, 3, side, side + 2)
    images = images[:, None] if images.dim() == 3 else images
    canvas = Canvas.fit(images)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(images.shape[1:], generator=generator)
    pattern = canvas.pattern(weights.sum(0)[None])[0]
    change = torch.zeros(3, *canvas.shape)
    middle = slice(canvas.shape[0] // 3, canvas.shape[0] // 2)
    inner = change[:, middle, middle]
    inner += 0.1 * torch.rand(inner.shape, generator=generator)
    # The same change of all pixels and channels of a cell
    pixels = torch.from_numpy(np.kron(change.numpy(), np.ones((1, canvas.cell, canvas.cell))))
    pixels = pixels[:, None, : images.shape[2], : images.shape[3]].float()
    moved = canvas.sign * canvas.span.mean() * pixels
    by_weights = (moved * weights).sum((1, 2, 3))
    assert torch.allclose(change.flatten(1) @ pattern, by_weights, rtol=1e-3, atol=1e-4)


def test_ink_of_other_images_stays_between_0_and_1():
    canvas = Canvas.fit(random_images(20, 1, 12, 12))
    ink = canvas.ink(3 * torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(2)))
    assert ink.min() == 0
    assert ink.max() == 1


def test_cells_count_as_inked_from_a_hundredth_of_the_images():
    images = torch.zeros(200, 1, 4, 4)
    images[0, 0, 1, 1:3], images[1, 0, 1, 2] = 1.0, 0.5
    assert Canvas.fit(images).inked.nonzero().tolist() == [[6]]


def test_other_shapes_are_rejected():
    with pytest.raises(ValueError, match="C = 1 or 3"):
        Canvas.fit(torch.rand(4, 2, 8, 8))
    canvas = Canvas.fit(random_images(4, 1, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), got \(1, 8, 9\)"):
        canvas.ink(torch.zeros(2, 1, 8, 9))


# --------------------------------------------------------------------------------------------------
# Candidates and the metric
# --------------------------------------------------------------------------------------------------


def random_templates(n: int, side: int, seed: int) -> np.ndarray:
    """(n, side, side) smooth random numbers, the first of them zeros."""
    noise = np.random.default_rng(seed).normal(size=(n, side, side)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, 1, 1))
    smooth[0] = 0
    return smooth


def test_candidates_are_the_regions_of_every_plane():
    u = random_templates(6, 14, seed=0)
    expected = set()
    for feature, template in enumerate(u):
        for sign in (1, -1):
            for level in LEVELS:
                cut = np.float32(level) * abs(template).max()
                label, n = ndimage.label((sign * template >= cut) & (cut > 0))
                regions = (label == i for i in range(1, n + 1))
                expected |= {(feature, sign, r.tobytes()) for r in regions if r.sum() >= 4}
    found = find_candidates(u, 4)
    masks = (found.masks > 0).numpy()
    rows = zip(found.feature.tolist(), found.sign.tolist(), masks, strict=True)
    listed = [(feature, sign, mask.tobytes()) for feature, sign, mask in rows]
    assert len(listed) == len(set(listed)) == len(expected) > 50
    assert set(listed) == expected
    assert found.feature.tolist() == sorted(found.feature.tolist())


def test_templates_are_blurred_and_end_where_ink_ends():
    canvas = Canvas.fit(random_images(50, 1, 14, 14))
    patterns = torch.from_numpy(random_templates(3, 14, seed=1)).flatten(1)
    u = smooth_templates(patterns, canvas)
    for template, pattern in zip(u, patterns.numpy(), strict=True):
        raw = (pattern * canvas.std.numpy()).reshape(14, 14)
        blurred = ndimage.gaussian_filter(raw, SMOOTHING * 14 / 28)
        assert np.allclose(template[3:-3, 3:-3], blurred[3:-3, 3:-3], atol=1e-6)
        template[3:-3, 3:-3] = 0
        assert not template.any()  # the frame is never inked


def test_local_covariance_fades_with_distance():
    canvas = Canvas.fit(random_images(50, 1, 10, 14))
    levels = canvas.levels(random_images(50, 1, 10, 14, seed=1))
    found = local_covariance(levels, canvas)
    covariance = np.cov(levels.numpy().T / FULL_INK)
    for a, b in [(60, 60), (60, 61), (60, 74), (60, 79), (46, 90)]:
        squared = (a // 14 - b // 14) ** 2 + (a % 14 - b % 14) ** 2
        expected = covariance[a, b] * np.exp(-squared / (2 * (REACH * 14 / 28) ** 2))
        assert found[a, b].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


# --------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------


def squared_cosine(signed: np.ndarray, pattern: np.ndarray, metric: np.ndarray) -> float:
    """Of a drawing (P,) with a pattern (P,), times the pattern's length; signed."""
    along = signed @ metric @ pattern
    return along * abs(along) / (signed @ metric @ signed) if signed.any() else 0.0


def choose_by_hand(
    masks: np.ndarray, pattern: np.ndarray, metric: np.ndarray
) -> tuple[list[int], list[float]]:
    """Numbers of the signed candidates (M, P) chosen, and the squared cosine after each step."""
    steps = [0.0]

    def best_with(chosen: list[int]) -> tuple[float, int | None]:
        best = (-1.0, None)
        for m in range(len(masks)):
            together = masks[[*chosen, m]]
            of_sign = (together.max(1) > 0).sum(), (together.min(1) < 0).sum()
            is_allowed = (abs(together).sum(0) <= 1).all() and (
                of_sign[0] <= MAX_REGIONS[0] and of_sign[1] <= MAX_REGIONS[1]
            )
            if is_allowed:
                value = squared_cosine(together.sum(0), pattern, metric)
                best = max(best, (value, m), key=lambda pair: pair[0])
        return best

    chosen: list[int] = []
    while len(chosen) < sum(MAX_REGIONS):
        value, m = best_with(chosen)
        if m is None or value <= 0 or value <= MIN_GAIN * steps[-1]:
            break
        chosen.append(m)
        steps.append(value)
        for place in range(len(chosen) - 1):
            others = chosen[:place] + chosen[place + 1 :]
            value, m = best_with(others)
            if value > (1 + 1e-6) * steps[-1]:
                chosen[place] = m
                steps.append(value)
    return chosen, steps


@pytest.fixture(scope="module")
def small():
    """A canvas of 14 x 14, patterns (24, P), and the metric of random images of blurred spots."""
    rng = np.random.default_rng(3)
    spots = rng.random((300, 14, 14)) * (rng.random((300, 14, 14)) < 0.2)
    spots[:, [0, 1, -2, -1]] = 0
    images = torch.from_numpy(ndimage.gaussian_filter(spots, (0, 0.5, 0.5))).float()[:, None]
    images = torch.where(images > 0.12, images, 0.0)  # most of it blank
    canvas = Canvas.fit(images)
    patterns = torch.from_numpy(random_templates(24, 14, seed=4)).flatten(1)
    return canvas, patterns, local_covariance(canvas.levels(images), canvas)


def test_the_choice_is_that_of_a_plain_search(small):
    canvas, patterns, metric = small
    drawings = choose_regions(patterns, metric, canvas)
    candidates = find_candidates(smooth_templates(patterns, canvas), MIN_CELLS * canvas.scale**2)
    signed = (candidates.masks * candidates.sign[:, None]).double().numpy()
    n_steps, n_exchanged = 0, 0
    for feature, (drawing, pattern) in enumerate(zip(drawings, patterns, strict=True)):
        own = signed[candidates.feature.numpy() == feature]
        chosen, steps = choose_by_hand(own, pattern.double().numpy(), metric.double().numpy())
        assert np.array_equal(np.sign(drawing).ravel(), own[chosen].sum(0)), feature
        assert steps == sorted(steps)
        n_steps += len(steps) - 1
        n_exchanged += len(steps) - 1 - len(chosen)
    assert not drawings[0].any()  # the pattern of zeros
    assert n_steps > 50
    assert n_exchanged > 0  # the cases do exchange


def test_regions_have_two_tones(small):
    canvas, patterns, metric = small
    drawings = choose_regions(patterns, metric, canvas)
    assert drawings.dtype == np.int8
    for drawing, pattern in zip(drawings.reshape(len(drawings), -1), patterns.numpy(), strict=True):
        for sign in (1, -1):
            cells = sign * drawing > 0
            strength = abs(pattern[cells])
            if cells.any():
                median = np.sort(strength)[(len(strength) - 1) // 2]
                assert np.array_equal(abs(drawing[cells]) == 2, strength > median)


def test_two_tones_by_hand():
    weights = torch.tensor([[1.0, 1, 1, 0, -1, -1], [0, 0, 0, 0, 0, 1]])
    patterns = torch.tensor([[3.0, 1, 2, 9, -5, -4], [1, 1, 1, 1, 1, 1]])
    expected = [[2.0, 1, 1, 0, -2, -1], [0, 0, 0, 0, 0, 1]]
    assert two_tones(weights, patterns).tolist() == expected


# --------------------------------------------------------------------------------------------------
# Planted templates
# --------------------------------------------------------------------------------------------------


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Cells in both over cells in either; 1 where there are none."""
    return (a & b).sum() / max(1, (a | b).sum()) if (a | b).any() else 1.0


@pytest.mark.parametrize("turn", range(len(CLAUSES)))
def test_planted_templates_are_found_and_captioned(turn):
    templates = templates_of(turn)
    layer = plant(templates)
    discovery = discover(layer)
    patterns = patterns_on_canvas(layer, discovery)
    drawings = choose_regions(patterns, discovery.metric, discovery.canvas)
    strength = (patterns.abs() * discovery.canvas.std).view(-1, 28, 28).numpy()
    for template, drawing, matter in zip(templates, drawings, strength, strict=True):
        assert overlap(template.wanted, drawing > 0) >= 0.7, template.clauses
        assert overlap(template.unwanted, drawing < 0) >= 0.7, template.clauses
        assert frozenset(caption_of(drawing, matter).lower().split(", ")) == template.clauses
