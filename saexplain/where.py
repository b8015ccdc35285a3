"""Where in an image is a feature active, what does it see there, and does it only encode a place?

    maps = activation_maps(layer, split, bank, activity)   # a layer with positions
    maps = occlusion_maps(layer, images, bank, order)      # a vector: what covering a patch changes
    side, patterns, _ = aligned_patterns(layer, split, bank)  # what features see around their peaks

Takes an `ExplainedLayer` with its SAE and validation images; gives maps and patterns. It draws
nothing and tests nothing.

Key: B, N images, P positions, h x w of them with a place, d_sae features, H x W pixels, n images of
a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.patterns import correlations
from saexplain.progress import progress_bar

PLACE_ONLY = (
    0.8  # share of a feature's variance that its mean map explains, from which it is a place
)
BLANK = 0.05  # of the images' standard deviation: a patch that varies less is blank
COVERED = 7  # patches along each side of an image that is covered patch by patch
COVERED_IMAGES = 8  # strongest images of a feature that are covered
COVER_ENTRIES = 2**30  # pixels of all images covered, at most: bounds the time
RECEPTIVE_SHARE = 0.95  # of the squared gradient, inside of the receptive field
WHOLE = 0.9  # of an image's side, from which a receptive field is all of it
ALIGNED = 8  # strongest images over which gradients are averaged, at most
GRADIENT_PIXELS = 2**28  # of all gradients of aligned patterns, at most: bounds the time
PATTERN_SIDE = 64  # cells along a pattern, at most
COMPARED = 400  # images over which a pattern is compared with the pre-activation
FAITHFUL = 0.5  # correlation with the pre-activation from which a pattern shows a feature


class Maps(NamedTuple):
    """Where features are active in validation images."""

    kind: str  # "activation" of each position, or "occlusion": its fall where a patch is covered
    grid: tuple[int, int]  # (h, w) positions, or patches
    n_prefix: int  # tokens without a place, before the others
    top: Tensor  # (d_sae, n, h, w) float16 of the first n images of bank.top; NaN where patches
    # of an image were not covered
    bands: Tensor | None  # (d_sae, N_BANDS, PER_BAND, h, w) float16 of those of bank.bands
    mean: Tensor  # (d_sae, h, w) over the images that have a map; NaN where none has
    spread: Tensor  # (d_sae,) entropy of the mean map, 0: one position, 1: all alike
    position_density: Tensor  # (d_sae,) share of the positions at which the feature is active
    prefix_share: Tensor  # (d_sae,) share of active images with the peak on a prefix token
    blank_share: Tensor  # (d_sae,) share of bank.top whose peak is on a patch without contrast
    place_only: Tensor  # (d_sae,) bool, the feature encodes only a place
    receptive: tuple[int, int]  # height and width in pixels of what a position sees


def grid_maps(acts: Tensor, positions: fa.Positions) -> Tensor:
    """(..., h, w) of activations (..., P) by position, prefix tokens left out."""
    return acts[..., positions.n_prefix :].unflatten(-1, positions.grid)


def map_spread(mean: Tensor) -> Tensor:
    """(d_sae,) entropy of maps (d_sae, h, w) over that of an even one, 0 to 1; 0 for empty ones."""
    share = mean.flatten(1) / mean.flatten(1).sum(1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(1) / max(math.log(share.shape[1]), 1e-9)


@torch.no_grad()
def activation_maps(
    layer: fa.ExplainedLayer, split: fa.Activations, bank: fa.FeatureBank, activity: Activity
) -> Maps:
    """The maps of all features of a layer with positions; bank and activity are of `split`.

    A feature encodes only a place where its mean map explains PLACE_ONLY of its variance over
    images and positions. The receptive field is left at the size of the images.
    """
    raw, positions = split.raw, layer.positions
    total = torch.zeros(positions.n, layer.d_sae, dtype=torch.float64, device=layer.device)
    squares, active = total.new_zeros(layer.d_sae), total.new_zeros(layer.d_sae)
    for some in raw.split(max(1, fa.ENTRIES // (positions.n * layer.d_sae))):
        acts = layer.acts_at(some)  # (B, P, d_sae)
        total += acts.sum(0, dtype=torch.float64)
        squares += acts.square().sum((0, 1), dtype=torch.float64)
        active += (acts > 0).sum((0, 1))
    by_position = (total / len(raw)).T  # (d_sae, P)
    mean, square = by_position.mean(1), squares / (len(raw) * positions.n)
    explained = (by_position.square().mean(1) - mean**2) / (square - mean**2).clamp(min=1e-12)
    shown = grid_maps(by_position, positions).float().cpu()
    on_prefix = (activity.position < positions.n_prefix).double()
    share = torch.zeros(layer.d_sae, dtype=torch.float64)
    share.index_add_(0, activity.feature, on_prefix)
    top, bands = _maps_of_examples(layer, raw, bank)
    return Maps(
        "activation",
        positions.grid,
        positions.n_prefix,
        top,
        bands,
        shown,
        map_spread(shown),
        (active / (len(raw) * positions.n)).float().cpu(),
        (share / activity.n_active.clamp(min=1)).float(),
        _blank_shares(split.images, top, bank),
        (explained > PLACE_ONLY).cpu() & (activity.n_active > 0),
        tuple(split.images.shape[-2:]),
    )


def _maps_of_examples(
    layer: fa.ExplainedLayer, raw: fa.Rows, bank: fa.FeatureBank
) -> tuple[Tensor, Tensor]:
    """The maps of the strongest examples of each feature, and of those of its bands."""
    grid, topk = layer.positions.grid, bank.top.index.shape[1]
    top = torch.zeros(layer.d_sae, topk, *grid, dtype=torch.float16)
    bands = torch.zeros(layer.d_sae, fa.N_BANDS, fa.PER_BAND, *grid, dtype=torch.float16)
    for k in progress_bar(range(layer.d_sae), "features", layer.d_sae):
        of_bands = [band.index for band in bank.bands(k)]
        parts = [bank.top.of(k).index, *of_bands]
        index = torch.cat(parts).to(raw.device)
        if not len(index):
            continue
        found = grid_maps(layer.acts_of(raw[index], k), layer.positions).half().cpu()
        first, *others = found.split([len(part) for part in parts])
        top[k, : len(first)] = first
        for b, band in enumerate(others):
            bands[k, b, : len(band)] = band
    return top, bands


def _blank_shares(images, top: Tensor, bank: fa.FeatureBank) -> Tensor:
    """(d_sae,) share of the examples of bank.top whose map (d_sae, n, h, w) peaks on a patch of the
    image that varies less than BLANK of the images' standard deviation."""
    h, w = top.shape[-2:]
    index = bank.top.index[:, : top.shape[1]]
    shown = index[index >= 0].unique()
    if not len(shown):
        return torch.zeros(len(top))
    pool, parts, n, total, squares = torch.nn.functional.adaptive_avg_pool2d, [], 0, 0.0, 0.0
    for part in split_of(images, shown):
        gray = part.float().mean(1, keepdim=True).cpu()
        varies = pool(gray.square(), (h, w)) - pool(gray, (h, w)).square()
        parts.append(varies.clamp(min=0).sqrt().flatten(1))
        n += gray.numel()
        total += float(gray.sum(dtype=torch.float64))
        squares += float(gray.square().sum(dtype=torch.float64))
    std = math.sqrt(max(0.0, squares / n - (total / n) ** 2))  # of all pixels shown
    blank = torch.cat(parts) < BLANK * std  # (n_shown, h w)
    peak = top.flatten(2).argmax(2)  # (d_sae, n)
    place = torch.searchsorted(shown, index.clamp(min=int(shown[0])))
    there = (index >= 0) & (top.flatten(2).amax(2) > 0)
    found = blank[place.clamp(max=len(shown) - 1), peak] & there
    return found.float().sum(1) / there.sum(1).clamp(min=1)


def split_of(images, index: Tensor, at_once: int = 256):
    """Batches (B, C, H, W) of images at an index (n,)."""
    return (images[some.to(images.device)] for some in index.split(at_once))


# --------------------------------------------------------------------------------------------------
# Vector layers: what covering a place takes away
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def occlusion_maps(
    layer: fa.ExplainedLayer, images, bank: fa.FeatureBank, order: Sequence[int]
) -> Maps:
    """Maps of how much each feature's activation falls where a patch of an image is covered with
    the mean color, for the strongest images of features in `order`, as far as the time allows.

    Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks" (occlusion). The
    mean map is that of the images covered; the map of an image that is not is NaN.
    """
    height, width = images.shape[-2:]
    grid = (min(COVERED, height), min(COVERED, width))
    n_patches = math.prod(grid)
    most = max(1, COVER_ENTRIES // (n_patches * math.prod(images.shape[1:])))
    index = bank.top.index[:, :COVERED_IMAGES]  # (d_sae, n)
    wanted = index[torch.as_tensor(order)].flatten()
    chosen = list(dict.fromkeys(wanted[wanted >= 0].tolist()))[:most]
    slot = {image: i for i, image in enumerate(chosen)}
    falls = torch.zeros(len(chosen), n_patches, layer.d_sae)
    mean = images[: fa.ROWS].float().mean((0, 2, 3))[:, None, None]
    for i, image in enumerate(progress_bar(chosen, "images", len(chosen))):
        own = images[torch.tensor([image], device=images.device)]
        covered = own.repeat(n_patches, 1, 1, 1)
        for p in range(n_patches):
            rows, columns = (
                _patch(p // grid[1], grid[0], height),
                _patch(p % grid[1], grid[1], width),
            )
            covered[p, :, rows, columns] = mean
        acts = layer.feature_acts(layer.raw(torch.cat([own, covered]))).cpu()
        falls[i] = (acts[:1] - acts[1:]).clamp(min=0)
    top = torch.full((layer.d_sae, index.shape[1], n_patches), math.nan, dtype=torch.float16)
    for k, row in enumerate(index.tolist()):
        for n, image in enumerate(row):
            if image in slot:
                top[k, n] = falls[slot[image], :, k].half()
    top = top.unflatten(2, grid)
    mean_map = top.float().nanmean(1)
    none = torch.zeros(layer.d_sae)
    return Maps(
        "occlusion",
        grid,
        0,
        top,
        None,
        mean_map,
        map_spread(mean_map.nan_to_num()),
        bank.feature_density,
        none,
        _blank_shares(images, top, bank),
        none.bool(),
        (height, width),
    )


def _patch(place: int, n: int, side: int) -> slice:
    """The pixels of one of n patches along a side."""
    return slice(round(place * side / n), round((place + 1) * side / n))


# --------------------------------------------------------------------------------------------------
# What a feature sees around its peak
# --------------------------------------------------------------------------------------------------


def center_of(position: Tensor, positions: fa.Positions, height: int, width: int) -> Tensor:
    """(n, 2) row and column of pixels at the center of positions (n,); the middle of the image for
    a prefix token."""
    h, w = positions.grid
    at = position - positions.n_prefix
    row, column = (at // w + 0.5) * height / h, (at % w + 0.5) * width / w
    middle = torch.tensor([height / 2, width / 2])
    return torch.where(at[:, None] >= 0, torch.stack([row, column], 1), middle)


def _pre_at(layer: fa.ExplainedLayer, raw: fa.Rows, position: Tensor, k: Tensor) -> Tensor:
    """z W_enc[:, k] (n,) at one position (n,) of each row, for features k (n,)."""
    z = layer.standardize(raw)
    if layer.has_positions:
        z = z[torch.arange(len(z), device=z.device), position]
    return (z * layer.sae.W_enc.detach().T[k]).sum(1)


class Peaks(NamedTuple):
    """The strongest images of features, and where the feature peaks there, (n,) each."""

    feature: Tensor
    image: Tensor
    position: Tensor


def strongest_peaks(
    layer: fa.ExplainedLayer, raw: fa.Rows, bank: fa.FeatureBank, most: int
) -> Peaks:
    """The peaks in the `most` strongest images of each feature."""
    index = bank.top.index[:, :most]
    feature, place = (index >= 0).nonzero().unbind(1)
    image = index[feature, place]
    position = torch.zeros_like(image)
    if layer.has_positions:
        found = []
        for i, k in zip(image.split(fa.ROWS), feature.split(fa.ROWS), strict=True):
            found.append(layer.acts_of(raw[i.to(raw.device)], k.to(raw.device)).argmax(1).cpu())
        position = torch.cat(found) if found else position
    return Peaks(feature, image, position)


def peak_gradients(layer: fa.ExplainedLayer, images, peaks: Peaks):
    """Batches (places, (B, C, H, W)): gradients of the feature's pre-activation at its peak with
    respect to the pixels, of peaks at these places."""
    at_once = max(1, min(fa.GRADIENT_ROWS, fa.GRADIENT_ENTRIES // math.prod(images.shape[1:])))
    for places in torch.arange(len(peaks.image)).split(at_once):
        pixels = images[peaks.image[places].to(images.device)].float().clone().requires_grad_()
        with torch.enable_grad():
            position, k = (c[places].to(layer.device) for c in (peaks.position, peaks.feature))
            pre = _pre_at(layer, layer.raw(pixels), position, k)
            (gradient,) = torch.autograd.grad(pre.sum(), pixels)
        yield places, gradient.cpu()


class Aligned(NamedTuple):
    """What features see around their peaks."""

    side: tuple[int, int]  # height and width in pixels of the crops
    patterns: Tensor  # (d_sae, C, ch, cw) mean gradient in crops, of cells of one or more pixels
    correlation: Tensor  # (d_sae,) of a pattern's sum over a crop with the pre-activation there


def aligned_patterns(
    layer: fa.ExplainedLayer, split: fa.Activations, bank: fa.FeatureBank
) -> Aligned:
    """The mean gradient of each feature over crops around its peaks in its strongest images.

    A crop has RECEPTIVE_SHARE of the squared gradient, over all features. The correlation is over
    COMPARED images, at one position of each.
    """
    images, positions = split.images, layer.positions or fa.Positions((1, 1))
    height, width = images.shape[-2:]
    per_feature = GRADIENT_PIXELS // (layer.d_sae * math.prod(images.shape[1:]))
    peaks = strongest_peaks(layer, split.raw, bank, max(1, min(ALIGNED, per_feature)))
    center = center_of(peaks.position, positions, height, width)
    some = torch.randperm(len(center), generator=torch.Generator().manual_seed(0))[:COMPARED]
    few = Peaks(*(column[some] for column in peaks))
    side = _receptive_side(peak_gradients(layer, images, few), center[some], (height, width))
    cell = math.ceil(max(side) / PATTERN_SIDE)
    pixels = pixels_of_cells(side, cell)
    cells = pixels.shape
    patterns = torch.zeros(layer.d_sae, images.shape[1], *cells)
    inside, image_of_ones = torch.zeros(layer.d_sae, 1, *cells), torch.ones(1, height, width)
    for places, gradient in peak_gradients(layer, images, peaks):
        for at, own in zip(places.tolist(), gradient, strict=True):
            k = peaks.feature[at]
            patterns[k] += _cells(crop_around(own, center[at], side), cell) * pixels  # sums
            inside[k] += _cells(crop_around(image_of_ones, center[at], side), cell)
    patterns /= inside.clamp(min=1)  # parts of crops beyond the border of an image do not count
    return Aligned(side, patterns, _crop_correlations(layer, split, patterns, side, cell))


def _receptive_side(gradients, center: Tensor, whole: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the square around centers (n, 2) that has RECEPTIVE_SHARE of the
    squared gradient; the whole image where that is nearly all of it."""
    height, width = whole
    row, column = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    energy = torch.zeros(2 * (height + width))  # by the side of the square that just has it
    for places, gradient in gradients:
        for at, own in zip(places.tolist(), gradient.square().sum(1), strict=True):
            far = torch.maximum((row - center[at, 0]).abs(), (column - center[at, 1]).abs())
            share = own / own.sum().clamp(min=1e-30)
            energy += torch.bincount(
                (2 * far + 1).ceil().long().flatten(), share.flatten(), len(energy)
            )
    if not energy.sum():
        return whole
    side = int(torch.searchsorted(energy.cumsum(0) / energy.sum(), RECEPTIVE_SHARE))
    return whole if side >= WHOLE * min(whole) else (side, side)


def crop_around(image: Tensor, center: Tensor, side: tuple[int, int]) -> Tensor:
    """The crop (C, *side) of an image (C, H, W) around a center, 0 outside of the image."""
    if tuple(image.shape[-2:]) == tuple(side):
        return image
    top, left = (round(float(c) - s / 2) for c, s in zip(center, side, strict=True))
    padded = torch.nn.functional.pad(image, (side[1], side[1], side[0], side[0]))
    return padded[:, top + side[0] : top + 2 * side[0], left + side[1] : left + 2 * side[1]]


def pixels_of_cells(side: tuple[int, int], cell: int) -> Tensor:
    """(ch, cw) the number of pixels of each cell of a crop; at its end cells may be partial."""
    down, across = (torch.arange(0, n, cell) for n in side)
    down, across = (side[0] - down).clamp(max=cell), (side[1] - across).clamp(max=cell)
    return (down[:, None] * across).float()


def _cells(crop: Tensor, cell: int) -> Tensor:
    """Means over cells of a crop (C, H, W)."""
    if cell == 1:
        return crop
    return torch.nn.functional.avg_pool2d(
        crop[None], cell, ceil_mode=True, count_include_pad=False
    )[0]


@torch.no_grad()
def _crop_correlations(
    layer: fa.ExplainedLayer, split: fa.Activations, patterns: Tensor, side, cell: int
) -> Tensor:
    """(d_sae,) correlation, over images with one position of each, of a pattern's sum over the crop
    with the pre-activation."""
    images, n = split.images, len(split.labels)
    positions = layer.positions or fa.Positions((1, 1))
    chosen = torch.linspace(0, n - 1, min(COMPARED, n)).round().long()
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(positions.n_prefix, positions.n, (len(chosen),), generator=generator)
    center = center_of(position, positions, *images.shape[-2:])
    sums, pre = [], []
    for places in torch.arange(len(chosen)).split(fa.GRADIENT_ROWS):
        batch = images[chosen[places].to(images.device)].float().cpu()
        crops = [crop_around(x, center[at], side) for at, x in zip(places, batch, strict=True)]
        flat = torch.stack([_cells(crop, cell) for crop in crops]).flatten(1)
        sums.append(flat @ patterns.flatten(1).T)
        z = layer.standardize(split.raw[chosen[places].to(layer.device)])
        if layer.has_positions:
            z = z[torch.arange(len(z), device=z.device), position[places].to(z.device)]
        pre.append((z @ layer.sae.W_enc.detach()).cpu())
    return correlations(torch.cat(sums).T, torch.cat(pre).T).float()
