"""Which regions of the canvas should be inked, and which blank, for a feature to be active?

    patterns = canvas.pattern(heats)                    # (F, P)
    metric = local_covariance(levels, canvas)           # (P, P)
    weights = choose_regions(patterns, metric, canvas)  # (F, h, w) whole numbers, -2 to 2

Takes the input patterns of features and the ink of discovery images; gives a drawing for each
feature: ink wanted where a weight is positive, blank where it is negative, twice as much where it
is 2. It reads no labels, no activations and no test images.

Key: F features, R candidate regions of several features, M of one feature, P cells.
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
AT_ONCE = 64  # features whose candidates are in memory at once


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

    With the plain covariance a region could replace another one far away that merely tends to be
    inked on the same images.
    """
    covariance = torch.cov(levels.T / FULL_INK)
    height, width = canvas.shape
    row, column = np.divmod(np.arange(height * width), width)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    fading = np.exp(-squared / (2 * (REACH * canvas.scale) ** 2))
    return covariance * torch.from_numpy(fading).float()


def choose_candidates(sign: Tensor, masks: Tensor, pattern: Tensor, metric: Tensor) -> list[int]:
    """The rows of the candidates of one feature, sign (M,) and masks (M, P), that together follow
    its pattern (P,) best, chosen greedily.

    A candidate is added while it raises the squared cosine of the drawing and the pattern by
    MIN_GAIN; after each addition every earlier one is exchanged where another is better. None
    overlaps another, and there are at most MAX_REGIONS of either sign.
    """
    row, cell = masks.nonzero().unbind(1)
    sizes = torch.bincount(row)
    # masks @ metric, of which most is zero
    bags = torch.nn.functional.embedding_bag(cell, metric, sizes.cumsum(0) - sizes, mode="sum")
    spread = bags * sign[:, None]  # (M, P)
    along, each = (spread @ pattern).numpy(), (spread @ (masks * sign[:, None]).T).numpy()
    overlaps, sign = (masks @ masks.T > 0).numpy(), sign.numpy()
    limits = dict(zip((1, -1), MAX_REGIONS, strict=True))

    def squared_cosine(rows: list[int]) -> float:  # times the pattern's length; signed
        total = along[rows].sum()
        return total * abs(total) / max(each[np.ix_(rows, rows)].sum(), 1e-12)

    def best_addition(rows: list[int]) -> tuple[float, int]:
        excluded = overlaps[rows].any(0)
        for of_sign, limit in limits.items():
            if (sign[rows] == of_sign).sum() >= limit:
                excluded = excluded | (sign == of_sign)
        total = along[rows].sum() + along
        length = each[np.ix_(rows, rows)].sum() + 2 * each[rows].sum(0) + each.diagonal()
        value = np.where(excluded, -1, total * abs(total) / np.maximum(length, 1e-12))
        return float(value.max()), int(value.argmax())

    chosen: list[int] = []
    while len(chosen) < sum(MAX_REGIONS):
        value, row = best_addition(chosen)
        if value <= max(0.0, MIN_GAIN * squared_cosine(chosen)):
            break
        chosen.append(row)
        for n in range(len(chosen) - 1):
            value, row = best_addition(chosen[:n] + chosen[n + 1 :])
            if value > (1 + 1e-6) * squared_cosine(chosen):  # never for rounding alone
                chosen[n] = row
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
    weights, u = torch.zeros_like(patterns), smooth_templates(patterns, canvas)
    for first in range(0, len(u), AT_ONCE):
        c = find_candidates(u[first : first + AT_ONCE], MIN_CELLS * canvas.scale**2)
        of_feature = torch.bincount(c.feature, minlength=len(u[first : first + AT_ONCE])).tolist()
        pairs = zip(c.sign.split(of_feature), c.masks.split(of_feature), strict=True)
        for k, (sign, masks) in enumerate(pairs, first):
            rows = choose_candidates(sign, masks, patterns[k], metric) if len(sign) else []
            weights[k] = (sign[rows, None] * masks[rows]).sum(0)
    return two_tones(weights, patterns).to(torch.int8).unflatten(1, canvas.shape).numpy()
