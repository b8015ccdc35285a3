"""What do the positions of a layer see of an image? Crops around them, as ink on a canvas.

    found = crops_of_positions(images, positions, (7, 7))     # (n, C, 7, 7)
    crops = Crops.of(canvas.of_crops(found), positions, (32, 32))
    scores, cells = crops.scores(weights, images)             # the best position of each image
    edited = crops.add_ink(images, cells, change)             # ink changed around these positions

Takes images and the positions of a layer; gives ink and scores. It knows no features. Outside of an
image pixels are 0, as in `where.crop_around` and for a convolution.

Key: N images, F drawings, h x w positions with a place (cells of the grid), a x b pixels of a crop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.ink import FULL_INK, MAX_SIDE, Canvas
from saexplain.where import center_of

N_CROPS = 6000  # at random, that show which pixels of a crop are inked
CROP_ENTRIES = 2**24  # numbers in the crops of all positions in memory at once


def can_draw_crops(side: tuple[int, int] | None, image: tuple[int, int]) -> bool:
    """Whether crops (a, b) are smaller than an image (H, W), and no larger than a canvas."""
    return side is not None and tuple(side) != tuple(image) and max(side) <= MAX_SIDE


def corners(
    positions: fa.Positions, side: tuple[int, int], image: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """The first pixel row (h,), and column (w,), of the crops around positions of an image (H, W),
    as `where.crop_around` has them."""
    h, w = positions.grid
    down = positions.n_prefix + w * torch.arange(h)
    right = positions.n_prefix + torch.arange(w)
    row, column = (
        center_of(down, positions, *image)[:, 0],
        center_of(right, positions, *image)[:, 1],
    )
    return (
        [round(float(c) - side[0] / 2) for c in row],
        [round(float(c) - side[1] / 2) for c in column],
    )


def crops_of_positions(images, positions: fa.Positions, side: tuple[int, int]) -> Tensor:
    """(n, C, a, b) crops around positions of images drawn at random, up to N_CROPS; only crops that
    are whole, if there are any."""
    whole = tuple(images.shape[-2:])
    pairs = [
        (top, left)
        for top in corners(positions, side, whole)[0]
        for left in corners(positions, side, whole)[1]
        if 0 <= top <= whole[0] - side[0] and 0 <= left <= whole[1] - side[1]
    ] or [((whole[0] - side[0]) // 2, (whole[1] - side[1]) // 2)]
    rng = np.random.default_rng(0)
    image = np.sort(rng.integers(len(images), size=N_CROPS))
    place = rng.integers(len(pairs), size=N_CROPS)
    found = []
    for some in np.array_split(np.arange(N_CROPS), N_CROPS // 100):
        own, at = np.unique(image[some], return_inverse=True)
        loaded = images[torch.from_numpy(own).to(images.device)].float().cpu()
        for n, p in zip(at, place[some], strict=True):
            top, left = pairs[p]
            found.append(loaded[n, :, top : top + side[0], left : left + side[1]])
    return torch.stack(found)


class Crops(NamedTuple):
    """The crops around all positions of images of one size."""

    whole: Canvas  # of whole images, whose cells are pixels
    side: tuple[int, int]
    top: list[int]  # (h,) first pixel row of the crops
    left: list[int]  # (w,)

    @classmethod
    def of(cls, canvas: Canvas, positions: fa.Positions, image: tuple[int, int]) -> Crops:
        """From the canvas of crops, for images (H, W)."""
        n_channels, *side = canvas.image_shape
        whole = canvas._replace(image_shape=(n_channels, *image))
        return cls(whole, tuple(side), *corners(positions, side, image))

    def _framed(self, images: Tensor) -> Tensor:
        """(N, H + 2 a, W + 2 b) levels of ink, with a frame of pixels that are 0."""
        a, b = self.side
        framed = torch.nn.functional.pad(images, (b, b, a, a))
        canvas = self.whole._replace(image_shape=tuple(framed.shape[1:]))
        return canvas.levels(framed).unflatten(1, tuple(framed.shape[2:]))

    def _corner(self, cell: int) -> tuple[slice, slice]:
        """The rows and columns of a framed image around the position of a cell."""
        top = self.top[cell // len(self.left)] + self.side[0]
        left = self.left[cell % len(self.left)] + self.side[1]
        return slice(top, top + self.side[0]), slice(left, left + self.side[1])

    def levels(self, images: Tensor, cells: Tensor) -> Tensor:
        """(N, a b) levels of ink around the positions of cells (N,)."""
        framed = self._framed(images)
        own = [image[self._corner(c)] for image, c in zip(framed, cells.tolist(), strict=True)]
        return torch.stack(own).flatten(1)

    def scores(self, weights: np.ndarray, images) -> tuple[Tensor, Tensor]:
        """(F, N) int32 largest score of drawings (F, a, b) over the positions of each image, and
        the cell (F, N) of the position that has it; images need not be in memory."""
        flat = torch.as_tensor(np.asarray(weights)).flatten(1).float().T
        rows, columns = (
            torch.tensor(self.top) + self.side[0],
            torch.tensor(self.left) + self.side[1],
        )
        at_once = max(
            1, CROP_ENTRIES // (len(rows) * len(columns) * (flat.shape[0] + len(weights)))
        )
        found = []
        for some in images.split(at_once):
            crops = self._framed(some).unfold(1, self.side[0], 1)[:, rows]
            crops = crops.unfold(2, self.side[1], 1)[:, :, columns]  # (n, h, w, a, b)
            found.append((crops.flatten(3).flatten(1, 2) @ flat).max(1))
        scores = torch.cat([part.values for part in found]).round().int()
        return scores.T, torch.cat([part.indices for part in found]).T

    def add_ink(self, images: Tensor, cells: Tensor, change: Tensor) -> Tensor:
        """Images (N, C, H, W) with levels of ink changed by (N, a b) around the positions of cells
        (N,)."""
        framed = torch.zeros_like(self._framed(images))
        for image, c, own in zip(framed, cells.tolist(), change, strict=True):
            image[self._corner(c)] = own.view(self.side)
        (a, b), (_, height, width) = self.side, self.whole.image_shape
        inside = framed[:, a : a + height, b : b + width]
        return self.whole.add_ink(images, inside.flatten(1) / FULL_INK)
