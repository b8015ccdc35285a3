"""TODO"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import feature_analysis as fa

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saexplain.analysis import Analysis


# --------------------------------------------------------------------------------------------------
# Sketches: where ink is claimed to be, and where none
# --------------------------------------------------------------------------------------------------

SKETCH_RED, SKETCH_BLUE = (178, 24, 43), (33, 102, 172)
EDGE, TINT = 2, 0.3  # screen pixels of an outline, and how much colour is inside


class Sketch(NamedTuple):
    """Places over a picture."""

    background: np.ndarray  # (H, W) ink from 0 to 1
    there: np.ndarray  # (n, H, W) bool, places with ink
    absent: np.ndarray  # (m, H, W) bool, places without


def _paint_sketch(sketch: Sketch, width: int) -> np.ndarray:
    """(height, about width, 3) uint8: ink in grey, places outlined in red, or blue where empty."""
    zoom = fa.zoom_factor(sketch.background.shape, width)
    strongest = max(float(sketch.background.max()), 1e-9)
    grey = 255 * (1 - 0.75 * fa.enlarged(sketch.background / strongest, zoom))
    page = np.repeat(grey[:, :, None], 3, 2)
    for masks, colour in ((sketch.absent, SKETCH_BLUE), (sketch.there, SKETCH_RED)):
        for mask in masks:
            inside = fa.enlarged(mask, zoom)
            core = inside.copy()
            for shift in (-EDGE, EDGE):
                for axis in (0, 1):
                    core &= np.roll(inside, shift, axis)
            page[inside] += TINT * (np.array(colour) - page[inside])
            page[inside & ~core] = colour
    return page.round().astype(np.uint8)


def visualize_sketch(
    sketch: Sketch, k: int, caption: str = "", save_path: str | Path | None = None
) -> Figure:
    """The places of a claim about feature k, red where it wants ink and blue where it wants none,
    over the mean of the images that fire it; the statement is written below, as what is said in
    words: the drawing is a search of its own.

    Raises ValueError unless the places have the background's shape.
    """
    for masks in (sketch.there, sketch.absent):
        if masks.shape[1:] != sketch.background.shape:
            shapes = f"{masks.shape[1:]}, the background {sketch.background.shape}"
            raise ValueError(f"places have shape {shapes}")
    picture = _paint_sketch(sketch, fa.PATTERN)
    lines = textwrap.wrap(f"Said in words: {caption}", SKETCH_LETTERS) if caption else []
    top = 2 * fa.TITLE + 4
    width = max(picture.shape[1], SKETCH_WIDTH) + 2 * fa.MARGIN
    height = top + len(picture) + CAPTION_LINE * len(lines) + 2 * fa.MARGIN
    page = np.full((height, width, 3), fa.WHITE, np.uint8)
    fa.paste(
        page, fa.text_pixels(f"Feature {k}: ink in red, none in blue", 14, fa.BOLD), 6, fa.MARGIN
    )
    note = "places that predict it, over the mean of its images"
    fa.paste(page, fa.text_pixels(note, 11, fa.MONO), fa.TITLE, fa.MARGIN)
    fa.paste(page, picture, top, fa.MARGIN)
    for row, line in enumerate(lines):
        below = top + len(picture) + fa.MARGIN + CAPTION_LINE * row
        fa.paste(page, fa.text_pixels(line), below, fa.MARGIN)
    return fa.figure_of(page, save_path)


SKETCH_LETTERS, SKETCH_WIDTH = 60, 400  # letters in a line below a sketch, screen pixels
PANEL_PATTERN = 150  # and across the pattern of a panel


# --------------------------------------------------------------------------------------------------
# Panels: everything about a feature in one picture
# --------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 320, 58  # screen pixels of a chart's bars
CHART_TITLE, CHART_PITCH = 24, 108  # screen pixels above a chart, and from one to the next
CLASS_NUMBERS, CLASS_NAMES = 20, 10  # a chart has room for about as many
NAME_LETTERS = 5  # of a class's name below a bar
NUMBERS = 70  # screen pixels at the left of a chart, for its numbers
CAPTION_LETTERS, CAPTION_LINE = 100, 17  # letters in a line of a panel's caption, and its height
BLUE, RED, GREY = "#2166ac", "#b2182b", "#666666"  # of bars; blue and red are RdBu_r's


def _draw_charts(histogram, logit_delta, ablation_delta, classes: Sequence[str] = ()) -> np.ndarray:
    """Three charts with one bar per class, from (C,) each: (height, width, 3) uint8."""
    charts = (
        ("images that fire it, by label", histogram, GREY, GREY),
        ("change of each logit when it is added", logit_delta, RED, BLUE),
        ("change of each logit when it is removed", ablation_delta, RED, BLUE),
    )
    width, height = NUMBERS + CHART_WIDTH + fa.MARGIN, CHART_PITCH * len(charts)
    figure = fa.new_figure(width, height)
    named = max(map(len, classes), default=0) > fa.SHORT_NAME
    for row, (title, values, above, below) in enumerate(charts):
        values = fa.as_array(values)
        bottom = height - CHART_PITCH * row - CHART_TITLE - CHART_HEIGHT
        size = CHART_WIDTH / width, CHART_HEIGHT / height
        axes = figure.add_axes((NUMBERS / width, bottom / height, *size))
        axes.tick_params(labelsize=8)
        axes.bar(range(len(values)), values, color=np.where(values > 0, above, below))
        axes.axhline(0, color="black", linewidth=0.8, clip_on=False)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_title(title, fontsize=9.5, loc="left", y=1.03)  # not to be placed, which is slow
        axes.set_xticks([])  # ticks are slow: plain text takes half the time
        below_axes = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        n_shown = CLASS_NAMES if named else CLASS_NUMBERS
        for c in range(0, len(values), math.ceil(len(values) / n_shown)):
            text = fa.shortened(fa.class_name(classes, c), NAME_LETTERS)
            axes.text(c, -0.12, text, fontsize=7 if named else 8, **below_axes)
        axes.locator_params(axis="y", nbins=3, integer=row == 0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        if not values.any():
            axes.set_yticks([0])
            axes.text(0.5, 0.6, "none", transform=axes.transAxes, ha="center", color=GREY)

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


class PanelNotes(NamedTuple):
    """What a panel shows besides the feature's own numbers."""

    caption: str = ""  # below the gallery
    inked: object = None  # (H, W) bool as in `visualize_feature_pattern`
    counterparts: tuple[tuple[str, np.ndarray], ...] = ()  # words and pattern (H, W) of each
    sketch: Sketch | None = None


COUNTERPARTS = 4  # a panel has room for so many, two in a row
COUNTERPART_WIDTH, COUNTERPART_HEIGHT = 84, 84  # screen pixels from one to the next
SMALL_LINE = 12  # screen pixels from one line of small letters to the next


def _paint_counterpart(page: np.ndarray, words: str, heat: np.ndarray, mask) -> None:
    """A pattern into the upper left corner of a page, its words, in lines, below it."""
    colours = fa.pattern_colors(heat, fa.display_scale(heat, mask), mask)
    pattern = fa.pattern_palette()[fa.enlarged(colours, fa.zoom_factor(heat.shape, fa.TILE))]
    fa.paste(page, pattern, 0, 0)
    for line, text in enumerate(words.splitlines()):
        fa.paste(page, fa.text_pixels(text, 10), len(pattern) + line * SMALL_LINE, 0)


def _paint_panel(
    gallery: fa.GalleryPainter,
    k: int,
    bank: fa.FeatureBank,
    heat: np.ndarray,
    effects: tuple,
    notes: PanelNotes,
) -> np.ndarray:
    """The panel of feature k, (height, width, 3) uint8; `effects` are logit and ablation delta."""
    mask = fa.as_mask(notes.inked, heat.shape)
    zoom = fa.zoom_factor(heat.shape, PANEL_PATTERN)
    images = gallery.paint(k, bank)
    numbers = fa.pattern_colors(heat, fa.display_scale(heat, mask), mask)
    pattern = fa.pattern_palette()[fa.enlarged(numbers, zoom)]
    charts = _draw_charts(bank.label_histogram[k], *effects, gallery.classes)
    lines = []
    for paragraph in notes.caption.splitlines():
        lines += textwrap.wrap(paragraph, CAPTION_LETTERS)

    sketch = _paint_sketch(notes.sketch, PANEL_PATTERN) if notes.sketch else pattern[:, :0]
    left, top = images.shape[1] + NUMBERS, fa.HEADER + fa.MARGIN  # of the pattern
    counterparts = notes.counterparts[:COUNTERPARTS]
    rows_of_counterparts = math.ceil(len(counterparts) / 2)
    charts_top = top + max(len(pattern), COUNTERPART_HEIGHT * rows_of_counterparts) + fa.MARGIN
    caption_end = len(images) + CAPTION_LINE * len(lines) + fa.MARGIN
    height = max(caption_end, charts_top + len(charts))
    across = NUMBERS + pattern.shape[1] + 2 * fa.MARGIN + sketch.shape[1]
    across += 2 * fa.MARGIN + 2 * COUNTERPART_WIDTH if counterparts else 0
    width = images.shape[1] + max(charts.shape[1], across + fa.MARGIN)

    page = np.full((height, width, 3), fa.WHITE, np.uint8)
    fa.paste(page, images, 0, 0)
    for row, line in enumerate(lines):
        fa.paste(page, fa.text_pixels(line), len(images) + CAPTION_LINE * row, fa.MARGIN)
    fa.paste(page, fa.text_pixels("red raises, blue lowers", 13), fa.MARGIN, left)
    fa.paste(page, pattern, top, left)
    beside = left + pattern.shape[1] + 2 * fa.MARGIN
    if notes.sketch is not None:
        fa.paste(page, fa.text_pixels("ink in red, none in blue", 13), fa.MARGIN, beside)
        fa.paste(page, sketch, top, beside)
        beside += sketch.shape[1] + 2 * fa.MARGIN
    if counterparts:
        fa.paste(page, fa.text_pixels("nearest in other SAEs", 13), fa.MARGIN, beside)
    for number, (words, other) in enumerate(counterparts):
        row, column = divmod(number, 2)
        at = top + row * COUNTERPART_HEIGHT, beside + column * COUNTERPART_WIDTH
        _paint_counterpart(page[at[0] :, at[1] :], words, other, mask)
    fa.paste(page, charts, charts_top, images.shape[1])
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

    `heat` (H, W) comes from `feature_input_pattern`, `logit_delta` and `ablation_delta` (C,) from
    `feature_logit_effect` and `feature_ablation_effect`; the rest is as in `show_feature_gallery`.
    """
    effects = logit_delta, ablation_delta
    gallery, notes = fa.GalleryPainter(images, classes), notes or PanelNotes()
    pixels = _paint_panel(gallery, k, bank, fa.as_array(heat), effects, notes)
    return fa.figure_of(pixels, save_path)


def write_feature_panels(
    folder: str | Path,
    notes: Mapping[int, PanelNotes],
    analysis: Analysis,
    images,
    classes: Sequence[str] = (),
) -> None:
    """feature_{k}_panel.png of each feature k of `notes`.

    `images` are those the bank was collected on. Raises like `feature_analysis.write_feature_pictures`.
    """
    heats = fa.as_patterns(analysis.heats)
    gallery = fa.GalleryPainter(images, classes)
    for k, note in notes.items():
        effects = analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k]
        pixels = _paint_panel(gallery, k, analysis.bank, heats[k], effects, note)
        fa.save_pixels(pixels, Path(folder) / f"feature_{k}_panel.png")
