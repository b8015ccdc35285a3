"""Which regions of the canvas should be inked, and which blank, for a feature to be active?

    patterns = canvas.pattern(heats)                    # (F, P)
    metric = local_covariance(levels, canvas)           # (P, P)
    weights = choose_regions(patterns, metric, canvas)  # (F, h, w) whole numbers, -2 to 2

Takes the input patterns of features and the ink of discovery images; gives a drawing for each
feature: ink wanted where a weight is positive, blank where it is negative, twice as much where it
is 2. It reads no labels, no activations and no test images.

Key: F features, R candidate regions of all features, M of the feature with most, P cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from saexplain.ink import FULL_INK, Canvas

SMOOTHING = 1.0  # standard deviation of the Gaussian, in pixels of MNIST
LEVELS = (0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.36, 0.44, 0.55)  # shares of the largest |u|
MIN_CELLS = 6  # of a region, in pixels of MNIST
REACH = 3.0  # pixels of MNIST over which the covariance of two cells counts; see `local_covariance`
MIN_GAIN = 1.03  # factor by which a further region must raise the squared cosine
MAX_REGIONS = (3, 2)  # wanted and unwanted


class Candidates(NamedTuple):
    """Candidate regions, those of the first feature first."""

    feature: Tensor  # (R,) int64
    sign: Tensor  # (R,) 1: wanted, -1: unwanted
    masks: Tensor  # (R, P) float32, 0 or 1


def smooth_templates(patterns: Tensor, canvas: Canvas) -> np.ndarray:
    """(F, h, w) u: how much a typical change of each cell's ink changes each feature, smoothed, and
    0 where images are never inked."""
    u = (patterns * canvas.std).unflatten(1, canvas.shape).numpy()
    sigma = SMOOTHING * canvas.scale
    return ndimage.gaussian_filter(u, (0, sigma, sigma)) * canvas.inked.view(canvas.shape).numpy()


def find_candidates(u: np.ndarray, min_cells: float) -> Candidates:
    """The 4-connected regions of templates u (F, h, w) where u, or -u, exceeds LEVELS of max |u|.

    Regions of fewer than `min_cells` cells are left out, and equal ones of several levels but one.
    """
    n_cells = u[0].size
    signs = np.array([1, -1])
    largest = np.abs(u).max((1, 2))[:, None, None, None, None]
    levels = np.array(LEVELS, dtype=u.dtype)[:, None, None]
    signed = u[:, None, None] * signs[None, :, None, None, None]
    above = (signed >= largest * levels) & (largest > 0)  # (F, 2, levels, h, w)
    # One call for all planes: no cell is connected to another plane.
    plane_only = np.zeros((3, 3, 3), dtype=bool)
    plane_only[1] = ndimage.generate_binary_structure(2, 1)
    planes = above.reshape(-1, *u.shape[1:])
    label, n_regions = ndimage.label(planes, structure=plane_only)
    at = np.flatnonzero(label)
    region = label.reshape(-1)[at] - 1
    size = np.bincount(region, minlength=n_regions)
    plane, cell = np.divmod(at, n_cells)
    first_cell = np.full(n_regions, n_cells)
    np.minimum.at(first_cell, region, cell)
    feature_sign = np.zeros(n_regions, dtype=np.int64)
    feature_sign[region] = plane // len(LEVELS)
    # Regions of two levels are nested or apart, so size and first cell together identify one.
    key = np.stack([feature_sign, first_cell, size], 1)
    _, kept = np.unique(key, axis=0, return_index=True)
    kept = kept[size[kept] >= min_cells]
    row = np.full(n_regions, -1)
    row[kept] = np.arange(len(kept))
    masks = torch.zeros(len(kept), n_cells)
    inside = row[region] >= 0
    masks[row[region][inside], cell[inside]] = 1.0
    feature, sign = np.divmod(feature_sign[kept], 2)
    return Candidates(torch.from_numpy(feature), torch.from_numpy(signs[sign]), masks)


def local_covariance(levels: Tensor, canvas: Canvas) -> Tensor:
    """(P, P) covariance of the ink of cells over images with levels (N, P), which fades with their
    distance d: times exp(-d^2 / (2 REACH^2)).

    With the plain covariance a region could stand for another one far away that merely tends to be
    inked on the same images.
    """
    covariance = torch.cov(levels.T / FULL_INK)
    height, width = canvas.shape
    row, column = np.divmod(np.arange(height * width), width)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    fading = np.exp(-squared / (2 * (REACH * canvas.scale) ** 2))
    return covariance * torch.from_numpy(fading).float()


class _Products(NamedTuple):
    """Inner products in the metric of `local_covariance`, by feature and candidate; a feature with
    fewer than M candidates has zeros."""

    sign: Tensor  # (F, M); 0: no candidate
    template: Tensor  # (F, M) signed candidate with the pattern
    each: Tensor  # (F, M, M) of signed candidates
    overlaps: Tensor  # (F, M, M) bool, whether two candidates share a cell
    start: Tensor  # (F,) row in `Candidates` of a feature's first one


def _inner_products(c: Candidates, patterns: Tensor, metric: Tensor) -> _Products:
    counts = torch.bincount(c.feature, minlength=len(patterns))
    start = (counts.cumsum(0) - counts).tolist()
    row, cell = c.masks.nonzero().unbind(1)
    sizes = torch.bincount(row)  # every region has cells
    # masks @ metric, of which most is zero
    bags = torch.nn.functional.embedding_bag(cell, metric, sizes.cumsum(0) - sizes, mode="sum")
    spread = bags * c.sign[:, None]  # (R, P)
    along = (spread * patterns[c.feature]).sum(1)

    shape = len(patterns), max(1, int(counts.max()))
    sign, template = torch.zeros(shape), torch.zeros(shape)
    each, overlaps = torch.zeros(*shape, shape[1]), torch.zeros(*shape, shape[1])
    for feature, (first, n) in enumerate(zip(start, counts.tolist(), strict=True)):
        own = slice(first, first + n)
        sign[feature, :n], template[feature, :n] = c.sign[own], along[own]
        each[feature, :n, :n] = spread[own] @ (c.masks[own] * c.sign[own, None]).T
        overlaps[feature, :n, :n] = c.masks[own] @ c.masks[own].T
    return _Products(sign, template, each, overlaps > 0, torch.tensor(start))


def _squared_cosine(chosen: Tensor, p: _Products) -> Tensor:
    """(F,) of the chosen candidates (F, M), 0 or 1, with the pattern, times the pattern's length;
    negative where they point away from it."""
    along = (chosen * p.template).sum(1)
    length = torch.einsum("fi,fij,fj->f", chosen, p.each, chosen)
    return along * along.abs() / length.clamp(min=1e-12)


def _best_addition(chosen: Tensor, p: _Products) -> tuple[Tensor, Tensor]:
    """The squared cosine with the best further candidate, or -1, and its number, (F,) each."""
    excluded = (p.sign == 0) | (torch.einsum("fi,fij->fj", chosen, p.overlaps.float()) > 0)
    for sign, limit in zip((1, -1), MAX_REGIONS, strict=True):
        full = (chosen * (p.sign == sign)).sum(1, keepdim=True) >= limit
        excluded |= full & (p.sign == sign)
    along = (chosen * p.template).sum(1, keepdim=True) + p.template
    with_chosen = torch.einsum("fi,fij->fj", chosen, p.each)
    length = (chosen * with_chosen).sum(1, keepdim=True) + 2 * with_chosen
    length = length + p.each.diagonal(dim1=1, dim2=2)
    value = along * along.abs() / length.clamp(min=1e-12)
    return value.masked_fill(excluded, -1.0).max(1)


def _choose(p: _Products) -> Tensor:
    """(F, M) 1 for the candidates chosen greedily: one is added while it raises the squared cosine
    by MIN_GAIN, and after each addition every earlier one is exchanged where another is better."""
    n_features, n_candidates = p.sign.shape
    chosen = torch.zeros(n_features, n_candidates)
    order = torch.full((n_features, sum(MAX_REGIONS)), -1)
    growing = torch.ones(n_features, dtype=torch.bool)
    for n in range(sum(MAX_REGIONS)):
        value, best = _best_addition(chosen, p)
        growing &= (value > 0) & (value > MIN_GAIN * _squared_cosine(chosen, p))
        rows = growing.nonzero()[:, 0]
        order[rows, n] = best[rows]
        chosen[rows, best[rows]] = 1.0
        for earlier in range(n):
            without = chosen.clone()
            without[rows, order[rows, earlier]] = 0.0
            value, best = _best_addition(without, p)
            better = growing & (value > (1 + 1e-6) * _squared_cosine(chosen, p))
            some = better.nonzero()[:, 0]
            without[some, best[some]] = 1.0
            chosen[some] = without[some]
            order[some, earlier] = best[some]
    return chosen


def two_tones(weights: Tensor, patterns: Tensor) -> Tensor:
    """weights (F, P) in -1, 0, 1, doubled where |pattern| exceeds its median over the cells of the
    same sign."""
    doubled = weights.clone()
    strength = patterns.abs()
    for sign in (1, -1):
        of_sign = weights == sign
        median = strength.masked_fill(~of_sign, float("nan")).nanmedian(1, keepdim=True).values
        doubled[of_sign & (strength > median)] *= 2
    return doubled


def choose_regions(patterns: Tensor, metric: Tensor, canvas: Canvas) -> np.ndarray:
    """(F, h, w) int8, the drawing for each of the patterns (F, P); empty where a pattern has no
    region. `metric` (P, P) is the `local_covariance` of discovery images.

    Regions are chosen so that the score, ink where it is wanted less ink where it is not, goes with
    the pattern's own sum over the image: by the squared cosine of the two in this metric.
    """
    weights = torch.zeros_like(patterns)
    candidates = find_candidates(smooth_templates(patterns, canvas), MIN_CELLS * canvas.scale**2)
    if len(candidates.feature):
        p = _inner_products(candidates, patterns, metric)
        for feature, number in _choose(p).nonzero().tolist():
            row = p.start[feature] + number
            weights[feature] += p.sign[feature, number] * candidates.masks[row]
    return two_tones(weights, patterns).to(torch.int8).unflatten(1, canvas.shape).numpy()
