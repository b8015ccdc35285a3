"""Maps over images, in galleries and alone."""

import numpy as np
import pytest
import torch
from page_world import Colors, color_world
from small_models import read

import feature_analysis as fa
from saexplain import overlays
from saexplain.overlays import (
    make_gallery,
    paint_map,
    paint_overlay,
    smooth_maps,
    write_pictures,
)
from saexplain.thumbnails import Pictures


@pytest.fixture(scope="module")
def world():
    return color_world()


def test_overlay_is_dark_where_a_map_is_zero_and_leaves_colors_where_it_is_large():
    colors = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3)).astype(np.uint8)
    shares = np.zeros((1, 20, 20))
    shares[0, :10] = 1
    hot, cold = paint_overlay(colors, shares, True)[0].astype(float).reshape(2, 200, 3)
    assert np.array_equal(hot, colors[0, :10].reshape(-1, 3))
    assert cold.max() < 115
    order = np.argsort(colors[0, 10:].reshape(-1, 3), axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(cold, order, 1), axis=1) >= 0).all()  # hues stay
    half = paint_overlay(colors, shares / 4, True)[0, :10].reshape(-1, 3)
    dim = paint_overlay(colors, 0 * shares, True)[0, :10].reshape(-1, 3).astype(float)
    assert np.abs(half - (hot + dim) / 2).max() <= 1


def test_overlay_of_gray_images_is_warm_where_a_map_is_large():
    gray = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 1)).astype(np.uint8).repeat(3, 3)
    shares = np.zeros((1, 20, 20))
    shares[0, :10] = 1
    hot, cold = paint_overlay(gray, shares, False)[0].astype(float).reshape(2, 200, 3)
    assert np.ptp(cold, axis=1).max() == 0
    assert cold.max() < 140  # dim
    same = 0.7 * gray[0, :10].reshape(-1, 3) + 0.3 * np.array([255, 165, 0])
    assert np.abs(hot - same).max() <= 0.51


def test_maps_are_linear_between_positions():
    maps = np.arange(8.0).reshape(1, 2, 4)
    found = smooth_maps(maps, (6, 12))[0]  # a position is 3 x 3 pixels
    assert found[1::3, 1::3] == pytest.approx(maps[0], abs=1e-6)  # its value is at its middle
    assert np.diff(found[1, 1:11]) == pytest.approx(np.full(9, 1 / 3), abs=1e-5)
    alone = paint_map(maps[0], (6, 12)).astype(int)
    assert alone[4, 10].tolist() == list(overlays.GLOW[1])  # the largest
    assert (np.diff(alone[4, :11, 0]) >= 0).all()


def tile(page: np.ndarray, gallery: fa.GalleryPainter, number: int) -> np.ndarray:
    top, left = gallery.places[number]
    height, width = gallery.tile
    return page[top + 1 : top + height - 1, left + 1 : left + width - 1]


def test_gallery_shows_images_in_color_with_maps_over_them(world):
    bank, maps = world.shown.bank, world.shown.maps
    images, _, raw = world.layer.splits["val"]
    pictures, k = Pictures(images, Colors()), 3
    gallery = make_gallery(pictures, (), maps)
    page, plain = gallery.paint(k, bank), make_gallery(pictures).paint(k, bank)
    acts = world.layer.acts_of(raw, k)[:, 1:].unflatten(1, (6, 8)).numpy()
    bands = bank.bands(k)
    shown = [image for part in (bank.top.of(k), *bands) for image in part.index.tolist()]
    scale = max(acts[image].max() for image in shown)
    for number, image in ((0, bank.top.index[k, 0]), (13, bank.top.index[k, 13])):
        colors = (255 * (images[image] + 2) / 4 + 0.5).byte().permute(1, 2, 0).numpy()
        assert np.array_equal(tile(plain, gallery, number), colors)
        share = smooth_maps(acts[image][None] / scale, (48, 64))
        expected = paint_overlay(colors[None], share, True)[0].astype(int)
        assert np.abs(tile(page, gallery, number) - expected).max() <= 1  # maps are float16
    image = int(bands[2].index[1])  # row 3 starts with the third quarter
    colors = (255 * (images[image] + 2) / 4 + 0.5).byte().permute(1, 2, 0).numpy()
    share = smooth_maps(acts[image][None] / scale, (48, 64))
    expected = paint_overlay(colors[None], share, True)[0]
    assert np.abs(tile(page, gallery, 31).astype(int) - expected).max() <= 1


def test_images_without_a_map_and_features_without_a_place_stay_plain(world):
    bank, maps = world.shown.bank, world.shown.maps
    pictures = Pictures(world.layer.splits["val"].images, Colors())
    few = maps._replace(kind="occlusion", top=maps.top[:, :2], bands=None)
    gallery, plain = make_gallery(pictures, (), few), make_gallery(pictures).paint(3, bank)
    page = gallery.paint(3, bank)
    same = [np.array_equal(tile(page, gallery, n), tile(plain, gallery, n)) for n in range(40)]
    assert same == [False] * 2 + [True] * 38
    top = few.top.clone()
    top[3, 0], top[5] = torch.nan, torch.nan  # nothing was covered in these images
    mean = few.mean.index_fill(0, torch.tensor(5), torch.nan)
    some = make_gallery(pictures, (), few._replace(top=top, mean=mean))
    page = some.paint(3, bank)
    same = [np.array_equal(tile(page, gallery, n), tile(plain, gallery, n)) for n in range(40)]
    assert same == [True, False] + [True] * 38
    assert np.array_equal(some.paint(5, bank), make_gallery(pictures).paint(5, bank))
    on_prefix = maps._replace(prefix_share=torch.ones(24))
    assert np.array_equal(make_gallery(pictures, (), on_prefix).paint(3, bank), plain)
    never = make_gallery(pictures, (), maps).paint(23, bank)
    assert np.array_equal(never, make_gallery(pictures).paint(23, bank))


def test_the_legend_lies_below_the_gallery(world):
    bank, maps = world.shown.bank, world.shown.maps
    few = maps._replace(kind="occlusion", top=maps.top[:, :2], bands=None)
    square = torch.rand(160, 3, 28, 28, generator=torch.Generator().manual_seed(0))  # narrow tiles
    pictures = Pictures(4 * square - 2, Colors())
    page, plain = (make_gallery(pictures, (), m).paint(3, bank) for m in (few, None))
    first = make_gallery(pictures).places[0][0]
    assert np.array_equal(page[:first], plain[:first])  # the headers
    below = page[len(plain) :]
    scale = float(few.top[3].float().max())
    line = f"in dim images, bright: how much covering this place lowers it, up to {scale:.2f}"
    words = fa.text_pixels(line, 11)
    left = fa.MARGIN + overlays.BAR[0] + fa.GAP
    assert np.array_equal(below[: len(words), left : left + words.shape[1], 0], words)
    bar = below[3 + overlays.BAR[1] // 2, fa.MARGIN :][: overlays.BAR[0], 0].astype(int)
    assert (np.diff(bar) >= 0).all()  # from dark to bright
    assert bar[-1] - bar[0] > 90


def test_unfaithful_patterns_are_marked_in_their_pictures(world, tmp_path):
    images = Pictures(world.layer.splits["val"].images, Colors())
    heats = torch.rand(24, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    faithful = torch.arange(24) != 3
    given = (tmp_path, [2, 3], world.shown.bank, images, heats)
    correlation = torch.full((24,), 0.21)
    write_pictures(*given, maps=world.shown.maps, faithful=faithful, correlation=correlation)
    assert len(list(tmp_path.iterdir())) == 6
    words = "not faithful: correlation 0.21 with the pre-activation"
    for k, note in ((2, ""), (3, words)):
        expected = fa.pattern_palette()[fa.paint_pattern(heats[k], k, words=note)]
        assert np.array_equal(read(tmp_path / f"feature_{k}_pattern.png"), expected)
    line = fa.text_pixels(words, 11, levels=fa.TEXT)
    page = fa.paint_pattern(heats[3], 3, words=words)
    assert np.array_equal(
        page[fa.TITLE : fa.TITLE + len(line), fa.MARGIN :][:, : line.shape[1]], line
    )


def test_without_patterns_there_are_only_galleries(world, tmp_path):
    images = Pictures(world.layer.splits["val"].images, Colors())
    write_pictures(tmp_path, [2], world.shown.bank, images, None, maps=world.shown.maps)
    assert [path.name for path in tmp_path.iterdir()] == ["feature_2_gallery.png"]
