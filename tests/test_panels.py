"""saexplain.panels: every part of a panel and a sketch, pixel by pixel."""

import matplotlib
import numpy as np
import pytest
import torch
from small_models import SIDE, analysis_of, bank_of, cells, drawn, make_scene, read, shown_bank

import feature_analysis as fa
from saexplain import panels
from saexplain.panels import PanelNotes, Sketch, show_feature_panel, visualize_sketch

WEIGHTS = np.zeros((SIDE, SIDE), int)
WEIGHTS[3:9, 4:8] = 2
SKETCH = Sketch(np.zeros((SIDE, SIDE)), WEIGHTS)


def rgb(name: str) -> list[int]:
    return [round(255 * channel) for channel in matplotlib.colors.to_rgb(name)]


def chart_of(pixels: np.ndarray, number: int) -> np.ndarray:
    """The bars of one of the three charts of a panel, (CHART_HEIGHT, CHART_WIDTH, 3)."""
    pattern_end = fa.HEADER + fa.MARGIN + round(panels.PANEL_PATTERN / SIDE) * SIDE
    pattern_end += panels.SMALL_LINE + 2  # what full color is
    top = pattern_end + fa.MARGIN + panels.CHART_PITCH * number + panels.CHART_TITLE
    right = pixels.shape[1] - fa.MARGIN
    return pixels[top : top + panels.CHART_HEIGHT, right - panels.CHART_WIDTH : right].astype(int)


def bars_of(chart: np.ndarray, n: int, color: str) -> np.ndarray:
    """How many screen pixels of `color` there are in the middle column of each of n slots."""
    middles = [round((c + 0.5) * panels.CHART_WIDTH / n) for c in range(n)]
    return (chart[:, middles] == rgb(color)).all(2).sum(0)


def panel_of(k: int = 0, heat=None, added=(1, 1, 1), removed=(1, 1, 1), **notes):
    """The colors of the panel of feature k, of a pattern of zeros unless another one is given."""
    heat = np.zeros((SIDE, SIDE)) if heat is None else heat
    effects = np.array(added), removed
    return drawn(show_feature_panel(k, *shown_bank(), heat, *effects, notes=PanelNotes(**notes)))


def places_of(part: np.ndarray, page: np.ndarray) -> list[tuple[int, int]]:
    """Where `part` (h, w, 3) is in `page`: (top, left)."""
    height, width = part.shape[:2]
    corners = np.argwhere((page == part[0, 0]).all(2)).tolist()
    return [(t, e) for t, e in corners if np.array_equal(page[t : t + height, e : e + width], part)]


def test_panel_holds_every_part(tmp_path):
    bank, images = shown_bank()
    heat, inked = np.random.default_rng(0).normal(size=(SIDE, SIDE)), np.eye(SIDE) == 0
    added, removed = torch.tensor([0.5, -1.0, 2.0]), np.array([-0.25, 0.0, 1.0])
    path, notes = tmp_path / "panel.png", PanelNotes(inked=inked)
    pixels = drawn(show_feature_panel(0, bank, images, heat, added, removed, path, notes))
    assert np.array_equal(read(path), pixels)
    gallery = drawn(fa.show_feature_gallery(0, bank, images))
    assert np.array_equal(pixels[: len(gallery), : gallery.shape[1]], gallery)
    zoom, top = round(panels.PANEL_PATTERN / SIDE), fa.HEADER + fa.MARGIN
    pattern = cells(heat, inked).repeat(zoom, 0).repeat(zoom, 1)
    assert places_of(pattern, pixels) == [(top, gallery.shape[1] + panels.NUMBERS)]

    def heights(number: int, color: str) -> np.ndarray:
        return bars_of(chart_of(pixels, number), 3, color)

    counts = bank.label_histogram[0].numpy()
    unit = heights(0, panels.GRAY).max() / counts.max()
    assert unit * counts.max() > 0.8 * panels.CHART_HEIGHT
    assert heights(0, panels.GRAY) == pytest.approx(unit * counts, abs=1.5)
    for number, values in ((1, added.numpy()), (2, removed)):
        unit = heights(number, panels.RED).max() / values.max()
        assert unit * np.ptp(values) > 0.8 * panels.CHART_HEIGHT
        assert heights(number, panels.RED) == pytest.approx(unit * values.clip(0), abs=2.5)
        assert heights(number, panels.BLUE) == pytest.approx(unit * (-values).clip(0), abs=2.5)


@pytest.mark.parametrize("n", [1, 2, 37, 100])
def test_charts_hold_any_number_of_classes(n):
    bank, effect = bank_of([[2.0], [1.0]], n_classes=n, topk=1), np.linspace(1, 2, n)
    charts = panels._draw_charts(bank.label_histogram[0], effect, -effect)
    for row, color in ((1, panels.RED), (2, panels.BLUE)):
        top = panels.CHART_PITCH * row + panels.CHART_TITLE
        chart = charts[top : top + panels.CHART_HEIGHT, panels.NUMBERS :][:, : panels.CHART_WIDTH]
        bars = (chart == rgb(color)).all(2)
        assert bars.any(0).sum() > 0.5 * panels.CHART_WIDTH
        assert bars[:, -panels.CHART_WIDTH // n :].any(1).sum() > 0.9 * panels.CHART_HEIGHT


def test_caption_is_written_below_the_gallery_and_may_be_long():
    plain, captioned = (panel_of(caption=caption) for caption in ("", "é ≥ 0.7"))
    below, left = drawn(fa.show_feature_gallery(0, *shown_bank())).shape[:2]
    assert np.array_equal(plain[:below], captioned[:below])
    assert (captioned[below:, :left] < 100).any()
    assert not (plain[below:, :left] < 100).any()
    long = panel_of(caption="many words " * 300)
    assert len(long) > len(plain)
    assert (long[-3 * panels.CAPTION_LINE :, :left] < 100).any()


def test_panels_and_sketches_check_shapes():
    with pytest.raises(ValueError, match="pattern must have shape"):
        panel_of(heat=np.zeros((1, 4, 5)))
    with pytest.raises(ValueError, match="inked must have the pattern's shape"):
        panel_of(inked=np.ones((2, 2)))
    with pytest.raises(ValueError, match="a drawing must have the background's"):
        visualize_sketch(Sketch(np.zeros((SIDE, SIDE + 1)), WEIGHTS), 0)
    with pytest.raises(IndexError, match="feature 2"):
        panel_of(2)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_folder_of_panels_equals_the_single_ones(tmp_path, kind):
    scene = make_scene(kind)
    analysis = analysis_of(scene)
    notes = {k: PanelNotes(f"A caption of {k}.", analysis.inked) for k in (0, 1, 11)}
    panels.write_feature_panels(tmp_path, notes, analysis, scene.images)
    assert {p.name for p in tmp_path.iterdir()} == {f"feature_{k}_panel.png" for k in notes}
    for k, note in notes.items():
        effects = analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k]
        heat = analysis.heats[k] if kind == "linear" or analysis.faithful[k] else None
        if kind == "conv" and analysis.activity.n_active[k]:  # it has maps
            note = note._replace(mean_map=analysis.maps.mean[k].numpy())
        single = show_feature_panel(k, analysis.bank, scene.images, heat, *effects, notes=note)
        assert np.array_equal(drawn(single), read(tmp_path / f"feature_{k}_panel.png"))


def test_panel_shows_up_to_four_counterparts_and_the_sketch():
    heats = np.random.default_rng(0).normal(size=(5, SIDE, SIDE))
    counterparts = tuple((f"seed {n}: 0.9", heat) for n, heat in enumerate(heats))
    page = panel_of(counterparts=counterparts, sketch=SKETCH)
    zoom = round(fa.TILE / SIDE)
    tiles = [cells(heat).repeat(zoom, 0).repeat(zoom, 1) for heat in heats]
    found = [places_of(tile, page) for tile in tiles]
    assert [len(places) for places in found] == [1, 1, 1, 1, 0]
    tops = [places[0][0] for places in found[:4]]
    assert tops[0] == tops[1] < tops[2] == tops[3]
    above_charts = page[: fa.HEADER + fa.MARGIN + panels.PANEL_PATTERN]
    rows, columns = (above_charts == tinted(255, panels.SKETCH_RED, 2)).all(2).nonzero()
    assert np.ptp(rows) + 1 == 6 * round(panels.PANEL_PATTERN / SIDE)
    assert np.ptp(columns) + 1 == 4 * round(panels.PANEL_PATTERN / SIDE)


def tinted(gray: float, color: tuple, tone: int) -> list[int]:
    """A cell of this gray under so strong a tint."""
    return [round(gray + {1: 0.4, 2: 0.75}[tone] * (channel - gray)) for channel in color]


def test_sketch_tints_its_cells_over_the_mean(tmp_path):
    ink, weights = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE), int)
    ink[2:6, 2:6] = 0.5  # the strongest: a gray of 255 / 4
    weights[2:4, 2:6], weights[4:6, 2:6] = 2, 1
    weights[7:9, 7:11], weights[9:11, 7:11] = -1, -2
    path = tmp_path / "sketch.png"
    visualize_sketch(Sketch(ink, weights, "Ink here, none there"), 3, path)
    page, zoom = read(path).astype(int), round(fa.PATTERN / SIDE)
    for tone in (2, 1, -1, -2):
        color = panels.SKETCH_RED if tone > 0 else panels.SKETCH_BLUE
        expected = tinted(255 / 4 if tone > 0 else 255, color, abs(tone))
        rows, columns = (page == expected).all(2).nonzero()
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (2 * zoom, 4 * zoom)
        assert len(rows) == 8 * zoom**2
    plain = visualize_sketch(Sketch(ink, weights), 3)
    assert len(drawn(plain)) < len(page)  # without the caption below
