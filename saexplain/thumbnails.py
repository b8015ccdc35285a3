"""How do images fit into pictures and into one page? Reduced, in color as sheets of JPEG tiles.

    pictures = Pictures(images, display)                         # in their own colors, or as ink
    size, needed = fit_page(count, n_tests, samples, map_cells, budget)  # and bytes
    small = reduce_images(pictures, size.side)                   # (N, C, h, w), area means
    sheets = encode_sheets(small)                                # arrays of bytes, a JPEG file each

Takes images, or pictures (N, C, H, W) in [0, 1]; gives pixels and bytes. It knows no features.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saexplain.images import as_ink, has_ground

if TYPE_CHECKING:
    from saexplain.images import Display

PAGE_BYTES = 8_000_000  # of a page whose images can be reduced
JPEG_QUALITY = 82
BLOCK = 16  # pixels: tiles start at multiples, so that JPEG blocks of two tiles do not mix
ACROSS, DOWN = 20, 20  # tiles of a sheet: browsers limit the size of a picture
SAMPLED = 48  # images from which the bytes of all, and the ground of gray ones, are estimated
MAP_BYTES = 0.5  # of a cell of a map, compressed


class Pictures:
    """The images of a split as they are shown: in their own colors, or, of gray ones, as ink.

    Images are (N, C, H, W) as the model reads them, perhaps read from files when they are needed.
    Without a `display`, colors are shown as ink as well.
    """

    def __init__(self, images: Tensor, display: Display | None = None):
        self.in_color = display is not None and images.shape[1] == 3
        is_ink = not self.in_color and isinstance(images, Tensor)
        self.ink = as_ink(images.cpu()) if is_ink else None
        self.images, self.display = (None if is_ink else images), display
        self.on_ground = None
        if not self.in_color and self.ink is None:  # once, or pictures would depend on the others
            sample = torch.linspace(0, len(images) - 1, min(SAMPLED, len(images))).round().long()
            self.on_ground = has_ground(self._read(sample))

    def __len__(self) -> int:
        return len(self.images if self.ink is None else self.ink)

    def of(self, index: Sequence[int]) -> Tensor:
        """(n, C, H, W) in [0, 1] of the images at `index`."""
        at = torch.as_tensor(index, dtype=torch.int64)  # also of none
        if self.ink is not None:
            return self.ink[at]
        found = self._read(at)
        return found if self.in_color else as_ink(found, self.on_ground)

    def _read(self, at: Tensor) -> Tensor:
        """(n, C, H, W) in [0, 1] of the images at `at`, in their own colors."""
        return self.display.pictures(self.images[at.to(self.images.device)]).cpu()


class PageSize(NamedTuple):
    """How large thumbnails are, and how many examples of each feature a page shows."""

    side: int  # pixels of the longer side, at most
    n_top: int  # strongest images
    n_band: int  # images of each quarter of the active range


SIZES = (  # the best first
    PageSize(96, 12, 3),
    PageSize(80, 12, 3),
    PageSize(64, 12, 3),
    PageSize(64, 8, 2),
    PageSize(48, 8, 2),
    PageSize(48, 6, 1),
    PageSize(48, 4, 0),
    PageSize(32, 4, 0),
)


def reduced_shape(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width of an (H, W) image whose longer side is at most `side` pixels."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def reduce_images(pictures: Tensor, side: int) -> Tensor:
    """Pictures (N, C, H, W) whose longer side is at most `side` pixels, by means over areas."""
    shape = reduced_shape(tuple(pictures.shape[2:]), side)
    if shape == tuple(pictures.shape[2:]):
        return pictures
    return torch.nn.functional.interpolate(pictures.float(), shape, mode="area")


def as_levels(pictures: Tensor) -> np.ndarray:
    """Pictures with values in [0, 1] as uint8."""
    values = pictures.detach().cpu().clamp(0, 1)
    return values.mul_(255).round_().to(torch.uint8).numpy()


def tile_shape(height: int, width: int) -> tuple[int, int]:
    """Height and width of the tile that an image gets in a sheet."""
    return math.ceil(height / BLOCK) * BLOCK, math.ceil(width / BLOCK) * BLOCK


def encode_sheets(pictures: Tensor) -> list[np.ndarray]:
    """JPEG files (n,) uint8 of pictures (N, 3, h, w), ACROSS x DOWN tiles each, row by row.

    A tile's right and lower edges repeat the image's, so that its last pixels keep their color.
    """
    height, width = tile_shape(*pictures.shape[2:])
    edges = ((0, 0), (0, height - pictures.shape[2]), (0, width - pictures.shape[3]), (0, 0))
    tiles = np.pad(as_levels(pictures).transpose(0, 2, 3, 1), edges, mode="edge")
    sheets = []
    for start in range(0, len(tiles), ACROSS * DOWN):
        some = tiles[start : start + ACROSS * DOWN]
        rows = math.ceil(len(some) / ACROSS)
        page = np.zeros((rows * ACROSS, height, width, 3), np.uint8)
        page[: len(some)] = some
        page = page.reshape(rows, ACROSS, height, width, 3).swapaxes(1, 2)
        buffer = io.BytesIO()
        image = Image.fromarray(page.reshape(rows * height, ACROSS * width, 3))
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # 0: colors as fine as gray
        sheets.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return sheets


def _bytes_of_image(pictures: Tensor) -> float:
    """Bytes that one of the pictures (N, C, h, w) takes on average."""
    if pictures.shape[1] == 3:
        return sum(map(len, encode_sheets(pictures))) / len(pictures)
    return len(zlib.compress(as_levels(pictures), 1)) / len(pictures)


def fit_page(
    count: Callable[[int, int], tuple[int, int]],
    n_more: int,
    sample: Tensor,
    map_cells: int,
    budget: float,
) -> tuple[PageSize, float]:
    """The first of SIZES with which images and maps take at most `budget` bytes, or else the last,
    and the bytes that they take.

    Args:
        count: gives the numbers of images and of examples with so many strongest images, and so
            many of each quarter.
        n_more: images that the page shows in any case.
        sample: some of the images, (n, C, H, W).
        map_cells: numbers in the map of an example; 0 without maps.
    """
    for size in SIZES:
        n_images, n_examples = count(size.n_top, size.n_band)
        each = _bytes_of_image(reduce_images(sample, size.side))
        needed = (n_images + n_more) * each + n_examples * map_cells * MAP_BYTES
        if needed <= budget:
            break
    return size, needed
