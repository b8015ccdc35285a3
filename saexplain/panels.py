"""What does one feature look like? A panel with all about it, and a sketch of its hypothesis.

    show_feature_panel(k, bank, images, heat, logit_delta, ablation_delta)    # a matplotlib Figure
    write_feature_panels(folder, {k: PanelNotes(caption)}, analysis, images)  # PNG files
    visualize_sketch(Sketch(mean_image, weights, "bar"), k)                   # a matplotlib Figure

Takes results of feature_analysis and saexplain.analysis; gives pictures. It computes no results.

Key: H x W pixels of an image or a pattern, C classes. Numbers in capitals are screen pixels, unless
their comment names another unit.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import feature_analysis as fa
from saexplain.figures import new_figure
from saexplain.overlays import make_gallery, paint_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saexplain.analysis import Analysis

# --------------------------------------------------------------------------------------------------
# Sketches: where a hypothesis wants ink, and where none
# --------------------------------------------------------------------------------------------------

SKETCH_RED, SKETCH_BLUE = (178, 24, 43), (33, 102, 172)  # RGB, as the bars of charts
TINTS = {1: 0.4, 2: 0.75}  # share of its color in a cell, by tone
SKETCH_LETTERS, SKETCH_WIDTH = 60, 400  # letters in a line below a sketch, and its least width
CAPTION_LINE = 17  # from one line of a caption to the next


class Sketch(NamedTuple):
    """A drawing over a picture."""

    background: np.ndarray  # (h, w) ink from 0 to 1
    weights: np.ndarray  # (h, w) from -2, strongly unwanted, to 2, strongly wanted
    caption: str = ""


def _paint_sketch(sketch: Sketch, width: int) -> np.ndarray:
    """(height, about width, 3) uint8: ink in gray, wanted cells in red, unwanted ones in blue."""
    zoom = fa.zoom_factor(sketch.background.shape, width)
    strongest = max(float(sketch.background.max()), 1e-9)
    gray = 255 * (1 - 0.75 * fa.enlarged(sketch.background / strongest, zoom))  # never black
    page = np.repeat(gray[:, :, None], 3, 2)
    for sign, color in ((-1, SKETCH_BLUE), (1, SKETCH_RED)):
        for tone, tint in TINTS.items():
            cells = fa.enlarged(sketch.weights == sign * tone, zoom)
            page[cells] += tint * (np.array(color) - page[cells])
    return page.round().astype(np.uint8)


def paint_hypothesis(sketch: Sketch, k: int) -> np.ndarray:
    """The drawing of a hypothesis about feature k, over the mean of the images that activate it,
    with its caption below: (height, width, 3) uint8.

    Ink is wanted in red cells, and unwanted in blue ones. Raises ValueError unless the drawing has
    the background's shape.
    """
    shape = sketch.background.shape
    if sketch.weights.shape != shape:
        raise ValueError(
            f"a drawing must have the background's {shape}, got {sketch.weights.shape}"
        )
    picture = _paint_sketch(sketch, fa.PATTERN)
    lines = textwrap.wrap(f"Caption: {sketch.caption}", SKETCH_LETTERS) if sketch.caption else []
    top = 2 * fa.TITLE + 4
    width = max(picture.shape[1], SKETCH_WIDTH) + 2 * fa.MARGIN
    height = top + len(picture) + CAPTION_LINE * len(lines) + 2 * fa.MARGIN
    page = np.full((height, width, 3), fa.WHITE, np.uint8)
    title = f"Feature {k}: its hypothesis"
    fa.paste(page, fa.text_pixels(title, 14, fa.BOLD), 6, fa.MARGIN)
    note = "ink wanted: red, unwanted: blue; over its mean image"
    fa.paste(page, fa.text_pixels(note, 11, fa.MONO), fa.TITLE, fa.MARGIN)
    fa.paste(page, picture, top, fa.MARGIN)
    _paste_lines(page, lines, top + len(picture) + fa.MARGIN)
    return page


def visualize_sketch(sketch: Sketch, k: int, save_path: str | Path | None = None) -> Figure:
    """The picture of `paint_hypothesis`."""
    return fa.figure_of(paint_hypothesis(sketch, k), save_path)


def _paste_lines(page: np.ndarray, lines: Sequence[str], top: int) -> None:
    """Write lines of a caption below each other, at the left margin."""
    for row, line in enumerate(lines):
        fa.paste(page, fa.text_pixels(line), top + CAPTION_LINE * row, fa.MARGIN)


# --------------------------------------------------------------------------------------------------
# Charts: one bar per class
# --------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 320, 58  # of a chart's bars
CHART_TITLE, CHART_PITCH = 24, 108  # above a chart, and from one to the next
CLASS_NUMBERS, CLASS_NAMES = 20, 32  # labels that fit below a chart, if numbers or names
NAME_LETTERS, NAME_HEIGHT = 11, 50  # letters of a name below a bar, upright, and space for them
NUMBERS = 70  # left of a chart, for the numbers of its axis
BLUE, RED, GRAY = "#2166ac", "#b2182b", "#666666"  # of bars; blue and red are RdBu_r's


def _draw_chart(axes, title: str, values: np.ndarray, colors: tuple, classes: Sequence) -> None:
    """Bars of values (C,) into matplotlib axes, in the first color above 0, the other below."""
    axes.tick_params(labelsize=8)
    axes.bar(range(len(values)), values, color=np.where(values > 0, *colors))
    axes.axhline(0, color="black", linewidth=0.8, clip_on=False)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_title(title, fontsize=9.5, loc="left", y=1.03)  # to place it is slow without a y
    axes.set_xticks([])  # ticks are slow: plain text takes half the time
    below_axes = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
    named = max(map(len, classes), default=0) > fa.SHORT_NAME
    n_shown = CLASS_NAMES if named else CLASS_NUMBERS
    for c in range(0, len(values), math.ceil(len(values) / n_shown)):
        text = fa.shortened(fa.class_name(classes, c), NAME_LETTERS)
        axes.text(c, -0.12, text, fontsize=7 if named else 8, rotation=90 * named, **below_axes)
    counts = not np.issubdtype(values.dtype, np.floating)  # images, not logits
    axes.locator_params(axis="y", nbins=3, integer=counts)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if not values.any():
        axes.set_yticks([0])
        axes.text(0.5, 0.6, "none", transform=axes.transAxes, ha="center", color=GRAY)


def _draw_charts(histogram, logit_delta, ablation_delta, classes: Sequence[str] = ()) -> np.ndarray:
    """Three charts with one bar per class, from (C,) each: (height, width, 3) uint8."""
    charts = (
        ("images on which it is active, by class", histogram, (GRAY, GRAY)),
        ("change of each class's score when it is added", logit_delta, (RED, BLUE)),
        ("the same when removed (not why it is active)", ablation_delta, (RED, BLUE)),
    )
    named = max(map(len, classes), default=0) > fa.SHORT_NAME
    pitch = CHART_PITCH + NAME_HEIGHT * named
    width, height = NUMBERS + CHART_WIDTH + fa.MARGIN, pitch * len(charts)
    figure = new_figure(width, height)
    for row, (title, values, colors) in enumerate(charts):
        bottom = height - pitch * row - CHART_TITLE - CHART_HEIGHT
        box = NUMBERS / width, bottom / height, CHART_WIDTH / width, CHART_HEIGHT / height
        _draw_chart(figure.add_axes(box), title, fa.as_array(values), colors, classes)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


# --------------------------------------------------------------------------------------------------
# Panels: everything about a feature in one picture
# --------------------------------------------------------------------------------------------------

PANEL_PATTERN = 150  # across the pattern of a panel
CAPTION_LETTERS = 100  # letters in a line of a panel's caption
COUNTERPARTS = 4  # patterns of other SAEs that fit into a panel, two in a row
COUNTERPART_PITCH = 84  # from one to the next, across and down
SMALL_LINE = 12  # from one line of small letters to the next


class PanelNotes(NamedTuple):
    """What a panel shows besides the feature's own numbers."""

    caption: str = ""  # below the gallery
    inked: object = None  # (H, W) bool as in `visualize_feature_pattern`
    counterparts: tuple[tuple[str, np.ndarray], ...] = ()  # words and pattern (H, W) of each
    sketch: Sketch | None = None
    mean_map: np.ndarray | None = None  # (h, w) where the feature is active on average


def _paint_pattern(heat: np.ndarray, mask: np.ndarray | None, width: int) -> np.ndarray:
    """A pattern (H, W) in color, (height, about width, 3) uint8."""
    colors = fa.pattern_colors(heat, fa.display_scale(heat, mask), mask)
    return fa.pattern_palette()[fa.enlarged(colors, fa.zoom_factor(heat.shape, width))]


def _with_note(picture: np.ndarray, words: str) -> np.ndarray:
    """The picture (H, W, 3) with a line of small letters below it."""
    page = np.full((len(picture) + SMALL_LINE + 2, *picture.shape[1:]), fa.WHITE, np.uint8)
    fa.paste(page, picture, 0, 0)
    fa.paste(page, fa.text_pixels(words, 10)[:, : picture.shape[1]], len(picture) + 2, 0)
    return page


def _paint_counterparts(notes: PanelNotes, mask: np.ndarray | None) -> np.ndarray:
    """The patterns most like the feature's in other SAEs, with words below, two in a row."""
    shown = notes.counterparts[:COUNTERPARTS]
    rows = math.ceil(len(shown) / 2)
    size = COUNTERPART_PITCH * rows, 2 * COUNTERPART_PITCH + fa.MARGIN, 3  # long words may overhang
    page = np.full(size, fa.WHITE, np.uint8)
    for number, (words, heat) in enumerate(shown):
        row, column = divmod(number, 2)
        cell = page[row * COUNTERPART_PITCH :, column * COUNTERPART_PITCH :]
        pattern = _paint_pattern(heat, mask, fa.TILE)
        fa.paste(cell, pattern, 0, 0)
        for line, text in enumerate(words.splitlines()):
            fa.paste(cell, fa.text_pixels(text, 10), len(pattern) + line * SMALL_LINE, 0)
    return page


def _paint_panel(
    gallery: fa.GalleryPainter,
    k: int,
    bank: fa.FeatureBank,
    heat: np.ndarray | None,
    effects: tuple,
    notes: PanelNotes,
) -> np.ndarray:
    """The panel of feature k, (height, width, 3) uint8; `effects` are logit and ablation delta.

    Without a pattern `heat` none is shown.
    """
    mask = None if heat is None else fa.as_mask(notes.inked, heat.shape)
    images = gallery.paint(k, bank)
    charts = _draw_charts(bank.label_histogram[k], *effects, gallery.classes)
    lines = []
    for paragraph in notes.caption.splitlines():
        lines += textwrap.wrap(paragraph, CAPTION_LETTERS)

    beside = []
    if heat is not None:
        scale = f"full color: {fa.display_scale(heat, mask):.2g} per pixel"
        pattern = _with_note(_paint_pattern(heat, mask, PANEL_PATTERN), scale)
        beside.append(("red raises, blue lowers", pattern))
    if notes.mean_map is not None:
        tall = round(PANEL_PATTERN * gallery.tile[0] / gallery.tile[1])
        picture = paint_map(notes.mean_map, (tall, PANEL_PATTERN))
        bright = f"brightest: {float(notes.mean_map.max()):.2g}, darkest: 0"
        beside.append(("where, on average", _with_note(picture, bright)))
    if notes.sketch is not None:
        beside.append(("its hypothesis", _paint_sketch(notes.sketch, PANEL_PATTERN)))
    if notes.counterparts:
        beside.append(("nearest in other SAEs", _paint_counterparts(notes, mask)))

    left, top = images.shape[1] + NUMBERS, fa.HEADER + fa.MARGIN  # of the pattern
    across = NUMBERS + sum(picture.shape[1] + 2 * fa.MARGIN for _, picture in beside)
    across -= 2 * fa.MARGIN if notes.counterparts else fa.MARGIN  # these bring their own margin
    charts_top = top + max((len(picture) for _, picture in beside), default=0) + fa.MARGIN
    caption_end = len(images) + CAPTION_LINE * len(lines) + fa.MARGIN
    height = max(caption_end, charts_top + len(charts))
    width = images.shape[1] + max(charts.shape[1], across)

    page = np.full((height, width, 3), fa.WHITE, np.uint8)
    fa.paste(page, images, 0, 0)
    fa.paste(page, charts, charts_top, images.shape[1])
    _paste_lines(page, lines, len(images))
    for words, picture in beside:
        fa.paste(page, fa.text_pixels(words, 13), fa.MARGIN, left)
        fa.paste(page, picture, top, left)
        left += picture.shape[1] + 2 * fa.MARGIN
    return page


def show_feature_panel(
    k: int,
    bank: fa.FeatureBank,
    images,
    heat,
    logit_delta,
    ablation_delta,
    save_path: str | Path | None = None,
    notes: PanelNotes | None = None,
    classes: Sequence[str] = (),
) -> Figure:
    """Everything about feature k in one picture: gallery, pattern, labels and both logit effects.

    `heat` (H, W), or None, comes from `feature_input_pattern`, `logit_delta` and `ablation_delta`
    (C,) from `feature_logit_effect` and `feature_ablation_effect`; the rest is as in
    `show_feature_gallery`. Images may be `Pictures`.
    """
    gallery, effects = make_gallery(images, classes), (logit_delta, ablation_delta)
    heat = None if heat is None else fa.as_array(heat)
    pixels = _paint_panel(gallery, k, bank, heat, effects, notes or PanelNotes())
    return fa.figure_of(pixels, save_path)


def write_feature_panels(
    folder: str | Path,
    notes: Mapping[int, PanelNotes],
    analysis: Analysis,
    images,
    classes: Sequence[str] = (),
) -> None:
    """Write feature_{k}_panel.png of each feature k of `notes`, and feature_{k}_hypothesis.png of
    those with a sketch.

    `images` are those the bank was collected on, ink or `Pictures`. A pattern that is not faithful
    is left out. Raises like `fa.write_feature_pictures`.
    """
    heats, maps, faithful = analysis.shown_heats, analysis.maps, analysis.faithful
    heats = None if heats is None else fa.as_array(heats)
    gallery = make_gallery(images, classes, maps)
    for k, note in notes.items():
        effects = analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k]
        heat = heats[k] if heats is not None and faithful[k] else None
        if maps is not None and not maps.mean[k].isnan().any():
            note = note._replace(mean_map=maps.mean[k].numpy())
        pixels = _paint_panel(gallery, k, analysis.bank, heat, effects, note)
        fa.save_pixels(pixels, Path(folder) / f"feature_{k}_panel.png")
        if note.sketch is not None:
            picture = paint_hypothesis(note.sketch, k)
            fa.save_pixels(picture, Path(folder) / f"feature_{k}_hypothesis.png")
