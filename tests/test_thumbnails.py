"""Images reduced, in sheets of JPEG tiles, and as many as fit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from saexplain import thumbnails
from saexplain.images import Display, as_ink
from saexplain.thumbnails import (
    Pictures,
    encode_sheets,
    fit_page,
    reduce_images,
    reduced_shape,
    tile_shape,
)


def test_images_are_reduced_by_means_over_areas():
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    found = reduce_images(images, 6)
    assert found.shape == (2, 3, 4, 6)
    for y, x in ((0, 0), (3, 5)):
        block = images[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert torch.allclose(found[:, :, y, x], block.mean((2, 3)))
    assert reduce_images(images, 12) is images  # small ones stay
    assert reduced_shape((300, 7), 48) == (48, 1)


def test_tiles_of_a_sheet_keep_their_colors_beside_others(monkeypatch):
    monkeypatch.setattr(thumbnails, "DOWN", 2)  # so that there are two sheets
    n, colors = 45, torch.rand(45, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    sheets = encode_sheets(colors.expand(n, 3, 24, 20))
    assert len(sheets) == 2
    assert tile_shape(24, 20) == (32, 32)
    for i in range(n):
        page = np.asarray(Image.open(io.BytesIO(sheets[i // 40].tobytes())))
        row, column = divmod(i % 40, 20)
        tile = page[32 * row : 32 * row + 24, 32 * column : 32 * column + 20]
        assert np.abs(tile - 255.0 * colors[i, :, 0, 0].numpy()).max() < 4  # to the last pixel


def test_thumbnails_are_as_large_and_as_many_as_fit():
    noise = torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    asked = []

    def count(n_top: int, n_band: int) -> tuple[int, int]:
        asked.append((n_top, n_band))
        return 10 * n_top, 10 * n_top

    def fitted(budget: float, cells: int = 0) -> thumbnails.PageSize:
        size, needed = fit_page(count, 5, noise, cells, budget)
        assert (needed <= budget) == (budget > 0)
        return size

    each = sum(map(len, encode_sheets(noise))) / 8
    assert fitted(125 * each) == thumbnails.SIZES[0] == (96, 12, 3)
    assert fitted(125 * each - 1).side < 96
    assert fitted(125 * each, cells=10).side < 96  # maps need space, too
    assert fitted(0) == thumbnails.SIZES[-1]
    assert set(asked) == {(size.n_top, size.n_band) for size in thumbnails.SIZES}


def test_pictures_are_in_color_only_with_a_display():
    images = torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    normalized = (images - 0.4) / 0.2
    shown = Pictures(normalized, Display((0.4,), (0.2,)))
    assert (len(shown), shown.in_color) == (6, True)
    assert torch.allclose(shown.of([4, 1]), images[[4, 1]], atol=1e-6)
    gray = Pictures(images[:, :1], Display())
    assert not gray.in_color
    assert torch.equal(gray.of([2, 3]), as_ink(images[:, :1])[[2, 3]])
    assert Pictures(images).of([0]).shape == (1, 1, 4, 5)


class Lazy:
    def __init__(self, images: torch.Tensor):
        self.images, self.shape, self.device = images, images.shape, images.device
        self.seen = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: torch.Tensor) -> torch.Tensor:
        self.seen.append(at.tolist())
        return self.images[at]


def test_images_that_are_read_when_needed():
    lazy = Lazy(torch.arange(4.0)[:, None, None, None].expand(-1, 3, 2, 2) / 4)
    found = Pictures(lazy, Display()).of([3, 1])
    assert lazy.seen == [[3, 1]]
    assert found[:, 0, 0, 0].tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("n_blank", [10, 90])  # images on a black ground, of 100
def test_gray_images_look_alike_whichever_are_read(n_blank):
    images = 0.05 + 0.9 * torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:n_blank] = 0.0
    images[:n_blank, :, 4:8, 4:8] = 0.8
    whole, lazy = Pictures(images, Display()), Pictures(Lazy(images), Display())
    assert len(lazy) == 100
    for index in ([0], [0, 95], [95]):
        assert torch.equal(lazy.of(index), whole.of(index))
