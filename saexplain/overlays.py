"""Pictures of features that show where in an image they are active.

    write_pictures(folder, features, analysis_bank, Pictures(images, display), heats, maps=maps)
    gallery = make_gallery(pictures, classes, maps)  # a painter as feature_analysis has them

Takes pictures, and maps of features; gives files and arrays of uint8. It computes no maps.

Key: n images of H x W pixels, maps of h x w positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import feature_analysis as fa
from saexplain.progress import progress_bar
from saexplain.thumbnails import Pictures, reduce_images

if TYPE_CHECKING:
    from saexplain.where import Maps

SIDE = 96  # pixels of an image in a gallery, at most
BAR = 40, 10  # screen pixels across and down a color bar
LEGEND = 24  # the same down the line below a gallery
WARM = 255, 165, 0  # the tint of places where the map of a gray image is large
TINT, LIGHT, DARK = 0.3, 0.42, 22  # its share there; what is left of light elsewhere, and added
SHADE = 0.35  # what is left of colors where a map is 0
MAP_WORDS = {  # what brightness, or the tint of gray images, means, by kind of maps
    "activation": "{look}: where the feature is active",
    "occlusion": "in dim images, {look}: how much covering this place lowers it",
}
PREFIX_SHARE = 0.5  # of a feature's peaks on prefix tokens, from which its maps are not shown
GLOW = (40, 42, 48), (255, 185, 60)  # colors of a map alone, where it is 0 and where it is largest


def smooth_maps(maps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Maps (n, h, w) at each pixel, (n, H, W), linear between positions."""
    given = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))[:, None]
    found = torch.nn.functional.interpolate(given, shape, mode="bilinear", align_corners=False)
    return found[:, 0].numpy()


def paint_overlay(colors: np.ndarray, shares: np.ndarray, in_color: bool) -> np.ndarray:
    """Images (n, H, W, 3) uint8, dark where shares (n, H, W) are 0, unchanged where they are 1.

    Their hues stay, or an object would look as if it had another color; gray images, with
    `in_color` False, get a warm tint instead, on which dark and light can be seen.
    """
    if in_color:
        dim, bright = DARK + SHADE * colors, colors
    else:
        dim = (DARK + LIGHT * (colors @ np.array([0.299, 0.587, 0.114])))[..., None]
        bright = (1 - TINT) * colors + TINT * np.array(WARM)
    strength = np.sqrt(shares.clip(0, 1))[..., None]
    return (dim + strength * (bright - dim)).round().clip(0, 255).astype(np.uint8)


def paint_map(mean: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map (h, w) alone, (H, W, 3) uint8, up to its largest value."""
    share = smooth_maps(mean[None] / max(float(mean.max()), 1e-12), shape)[0][..., None]
    low, high = (np.array(color, float) for color in GLOW)
    return (low + share.clip(0, 1) * (high - low)).round().astype(np.uint8)


class ColorGallery(fa.GalleryPainter):
    """Painter of galleries of images in their own colors, with maps over them if there are any."""

    def __init__(self, pictures: Pictures, classes: Sequence[str] = (), maps: Maps | None = None):
        self.pictures, self.maps = pictures, maps
        sample = self._reduced([0])
        super().__init__(np.zeros_like(sample), classes)
        self.images = pictures  # only their number is used

    def _reduced(self, index: Sequence[int]) -> np.ndarray:
        """Colors (n, 3, h, w) in [0, 1]; ink is dark on white."""
        found = reduce_images(self.pictures.of(index), SIDE).numpy()
        return found if self.pictures.in_color else (1 - found).repeat(3, 1)

    def _has_maps(self, k: int) -> bool:
        """Whether maps show where feature k is active."""
        if self.maps is None or float(self.maps.prefix_share[k]) >= PREFIX_SHARE:
            return False
        return not bool(self.maps.mean[k].isnan().any())

    def _maps_of(self, k: int, numbers: Sequence[int]) -> np.ndarray:
        """Maps (n, h, w) of the images in tiles of feature k, NaN where there is none."""
        found = np.full((len(numbers), *self.maps.grid), np.nan, np.float32)
        first = 2 * fa.COLUMNS  # tile after those of the strongest images
        for row, number in zip(found, numbers, strict=True):
            if number < min(first, self.maps.top.shape[1]):
                row[:] = self.maps.top[k, number]
            elif number >= first and self.maps.bands is not None:
                row[:] = self.maps.bands[k][divmod(number - first, fa.PER_BAND)]
        return found

    def paint_images(self, k: int, numbers: Sequence[int], index: np.ndarray) -> np.ndarray:
        """As `GalleryPainter` does it; a feature has one scale, the largest of its maps."""
        if not len(index):
            return np.zeros((0, *(side // self.zoom for side in self.inner), 3), np.uint8)
        colors = (255 * self._reduced(index.tolist()) + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
        if not self._has_maps(k):
            return colors
        found = self._maps_of(k, numbers)
        has_map = ~np.isnan(found).any((1, 2))
        scale = float(found[has_map].max(initial=0))
        shares = smooth_maps(found[has_map] / max(scale, 1e-12), colors.shape[1:3])
        colors[has_map] = paint_overlay(colors[has_map], shares, self.pictures.in_color)
        return colors

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of a tile without its frame."""
        return self.tile[0] - 2, self.tile[1] - 2

    def paint(self, k: int, bank: fa.FeatureBank) -> np.ndarray:
        """The gallery of feature k, with a line below it on what its colors mean."""
        page = super().paint(k, bank)
        if not self._has_maps(k) or not bank.n_active[k]:
            return page
        scale = float(self.maps.top[k].nan_to_num().max())
        if self.maps.bands is not None:
            scale = max(scale, float(self.maps.bands[k].max()))
        bar = paint_overlay(
            np.full((1, BAR[1], BAR[0], 3), 190, np.uint8),
            np.linspace(0, 1, BAR[0])[None, None].repeat(BAR[1], 1),
            self.pictures.in_color,
        )[0]
        look = "bright" if self.pictures.in_color else "color"
        words = MAP_WORDS[self.maps.kind].format(look=look)
        words = fa.text_pixels(f"{words}, up to {scale:.2f}", 11)
        top = len(page)
        page = np.concatenate([page, np.full((LEGEND, *page.shape[1:]), fa.WHITE, np.uint8)])
        fa.paste(page, words, top, fa.MARGIN + BAR[0] + fa.GAP)
        fa.paste(page, bar, top + 3, fa.MARGIN)
        return page


def make_gallery(
    images: object, classes: Sequence[str] = (), maps: Maps | None = None
) -> fa.GalleryPainter:
    """The painter of galleries of images: ink (N, 1, H, W), or `Pictures`."""
    if not isinstance(images, Pictures):
        return fa.GalleryPainter(images, classes)
    if images.in_color or images.ink is None or maps is not None:
        return ColorGallery(images, classes, maps)
    return fa.GalleryPainter(images.ink, classes)


def write_pictures(
    folder: str | Path,
    features: Iterable,
    bank: fa.FeatureBank,
    images: object,
    heats,
    inked=None,
    classes: Sequence[str] = (),
    ink_sign: int = 1,
    maps: Maps | None = None,
    faithful=None,
    correlation=None,
) -> None:
    """The files of `fa.write_feature_pictures`, with maps over the images of galleries, and words
    over patterns that are not `faithful` (d_sae,), with their `correlation` (d_sae,)."""
    features, words = list(features), {}
    for k in features if faithful is not None else ():
        if not faithful[k]:
            value = float(correlation[k])
            words[k] = f"not faithful: correlation {value:.2f} with the pre-activation"
    gallery = make_gallery(images, classes, maps)
    shown = progress_bar(features, "features", len(features))
    fa.write_feature_pictures(
        folder, shown, bank, gallery, heats, inked, ink_sign=ink_sign, words=words
    )
