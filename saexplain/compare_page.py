"""How does a comparison of runs look on one page? HTML without scripts, its pictures inside.

    content = comparison_page(comparison, folder)  # bytes; links are relative to the folder

Takes a `Comparison`, and perhaps a chart; gives a page. It measures nothing.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from PIL import Image

import feature_analysis as fa
from saexplain.images import as_ink
from saexplain.ink import ink_sign
from saexplain.page import TEMPLATES
from saexplain.patterns import feature_patterns, unit_gradients
from saexplain.quantities import GROUPS, Quantity
from saexplain.reproducibility import MIN_SIMILARITY
from saexplain.thumbnails import Pictures, as_levels, reduce_images

if TYPE_CHECKING:
    from saexplain.compare import Compared, Comparison, Pair

OPEN, SHOWN = 12, 40  # features of a list, at first and at most
SIDE = 64  # pixels of a thumbnail, at most
INKED_SHARE = 0.01  # pixels inked in a smaller share of the images are gray in patterns
INTRO = """<p>Each number is over the images named with it, each run's own: another
seed may draw others from the same set. "By drawings" has, in place of every feature, what its
drawing predicts.</p>"""


def link(title: str, page: Path | None, folder: Path, view: str = "") -> str:
    """The title (HTML), as a link from a page in the folder to another, if there is one."""
    if page is None or not page.exists():
        return title
    try:
        place = quote(Path(os.path.relpath(page, folder)).as_posix())
    except ValueError:  # another drive of Windows
        place = page.resolve().as_uri()
    return f'<a href="{escape(place + view)}">{title}</a>'


def png_source(content: bytes) -> str:
    """A PNG as the source of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    """A table that scrolls on a narrow screen; a row of one cell is the title of a group. What
    is in brackets at the end of a row's name is smaller."""
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)]
    for first, *cells in rows:
        if not cells:
            lines.append(f'<th scope="rowgroup" colspan="{len(head)}">{escape(first)}</th>')
        else:
            values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            name, _, more = escape(first).partition(" [")
            name += f'<br><span class="soft small">{more.rstrip("]")}</span>' if more else ""
            lines.append(f'<th scope="row">{name}</th>{values}')
    body = "\n".join(
        f'<tr class="group">{line}</tr>' if "rowgroup" in line else f"<tr>{line}</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table class="numbers">\n{body}\n</table></div>'


def page_title(quantity: Quantity) -> str:
    """Its title, with the images over which it is measured in brackets."""
    images = f" [{quantity.images}]" if quantity.images else ""
    return quantity.title.replace("  ", "... ") + images


def tables(comparison: Comparison) -> str:
    """The settings that differ, and the numbers by group, a column for each SAE; of many SAEs both
    in one table, a row for each."""
    settings = comparison.settings()
    groups = {name: comparison.quantities(group) for name, group in GROUPS.items()}
    if len(comparison.compared) > comparison.most_columns:
        numbers = [row for rows in groups.values() for row in rows]
        head = ["", *(name for name, _ in settings), *(page_title(q) for q, _ in numbers)]
        columns = [comparison.letters, *(cells for _, cells in [*settings, *numbers])]
        return f"<h2>Numbers</h2>{INTRO}{html_table(zip(*columns, strict=True), head)}"
    rows: list[list[str]] = []
    for name, found in groups.items():
        rows += [[name]] if found else []
        rows += [[page_title(quantity), *cells] for quantity, cells in found]
    head = ["", *comparison.letters]
    differ = "<p>All settings are equal, or known of one only.</p>"
    if settings:
        differ = html_table(([name, *cells] for name, cells in settings), head)
    numbers_by_group = html_table(rows, head)
    return f"<h2>Settings that differ</h2>{differ}<h2>Numbers</h2>{INTRO}{numbers_by_group}"


# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------


def pattern_painter(one: Compared, images) -> Callable[[int], bytes] | None:
    """A function that gives the pattern of a feature as PNG; None for a layer that is not linear in
    the pixels, where strongest images show more."""
    shape = tuple(images.shape[1:])
    if one.layer.has_positions or not fa.is_linear(one.layer, shape, images[:64]):
        return None
    heats = feature_patterns(one.layer, unit_gradients(one.layer, images[:64])).sum(1)
    heats = (ink_sign(images[:64]) * heats).numpy()
    inked = (as_ink(images) > 0).float().mean(0)[0].cpu().numpy() >= INKED_SHARE

    def paint(k: int) -> bytes:
        colors = fa.pattern_colors(heats[k], fa.display_scale(heats[k], inked), inked)
        return fa.png_bytes(colors, fa.pattern_palette())

    return paint


def picture_png(picture) -> bytes:
    """A picture (C, H, W) with values in [0, 1] as PNG, ink dark."""
    levels = as_levels(picture)
    pixels = levels.transpose(1, 2, 0) if len(levels) == 3 else 255 - levels[0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


class Looks:
    """Draws the features of a pair."""

    def __init__(self, comparison: Comparison, pair: Pair, folder: Path):
        self.pair, self.folder = pair, folder
        self.both = [comparison.compared[i] for i in (pair.first, pair.second)]
        self.letters = [comparison.letters[i] for i in (pair.first, pair.second)]
        self.pictures = Pictures(pair.images, self.both[0].display)
        self.painters = [pattern_painter(one, pair.images) for one in self.both]

    def of(self, side: int, k: int, is_alone: bool = False) -> str:
        """Feature k of one of the two: pattern, strongest images, numbers, caption; if it is alone,
        also how similar the closest feature of the other one is."""
        one, f = self.both[side], self.pair.features[side]
        at = f.bank.top.of(k).index.tolist()
        strong = reduce_images(self.pictures.of(at), SIDE) if at else []
        tags = "".join(f'<img alt="" src="{png_source(picture_png(p))}">' for p in strong)
        face, paint = "", self.painters[side]
        if paint:
            face = f'<img class="face" alt="pattern of feature {k}" src="{png_source(paint(k))}">'
        record = one.report.get(k, {})
        name = f"{self.letters[side]} {k}"
        if record:
            name = link(name, one.page, self.folder, f"#view=feature&feature={k}")
        words = [f"active on {f.bank.feature_density[k]:.1%}", f"influence {f.influence[k]:.1%}"]
        if record.get("f1") is not None:
            words.append(f"F1 {record['f1']:.2f}")
        if is_alone:
            words.append(f"closest of the other {f.similarity[k]:.2f}")
        caption = escape(record.get("caption", ""))
        return (
            f'<div class="look{"" if face else " plain"}">{face}<div><b>{name}</b> {caption}'
            f'<br><span class="soft small">{", ".join(words)}</span></div>'
            f'<div class="strong">{tags}</div></div>'
        )

    def row(self, k: int) -> str:
        """Feature k of the first with its counterpart."""
        matches = self.pair.features[0].matches
        words = f"correlation {matches.correlation[k]:.2f}"
        if self.pair.same_layer:
            words = f"cosine {matches.cosine[k]:.2f}<br>{words}"
        cells = self.of(0, k) + self.of(1, int(matches.feature[k]))
        return f'<div class="pair">{cells}<div class="similar">{words}</div></div>'


def pair_section(comparison: Comparison, pair: Pair, folder: Path) -> str:
    """The features of a pair: those with a counterpart, then those of either SAE alone."""
    looks = Looks(comparison, pair, folder)
    a, b = looks.letters
    n, own = pair.features[0].bank.n_images, pair.features[0]
    basis = (
        f"A feature's counterpart is the one whose smaller similarity of two is largest: the "
        f"cosine of decoder directions, and the correlation of activations on the same {n:,} test "
        f"images of {a}. It counts where both are at least {MIN_SIMILARITY}."
        if pair.same_layer
        else f"Their SAEs read two networks or layers, so that the cosine of decoder directions is "
        f"not comparable: a counterpart is the feature with the largest correlation of activations "
        f"on the same {n:,} test images of {a}, of at least {MIN_SIMILARITY}."
    )
    basis += " Influence is over the validation images of each."
    matched = own.listed(matched=True)
    parts = [f"<h2>Features of {a} and {b}</h2>", f"<p>{basis}</p>"]
    parts += [f'<p class="big">{words}.</p>' for words in comparison.in_both(pair)]
    parts.append(f"<h3>In both{_of_all(matched)}</h3>")
    parts.append(_opening([looks.row(k) for k in matched[:SHOWN]], "{}"))
    for side, (letter, f) in enumerate(zip((a, b), pair.features, strict=True)):
        alone = f.listed(matched=False)
        parts.append(f"<h3>Only in {letter}{_of_all(alone)}</h3>")
        tiles = [looks.of(side, k, is_alone=True) for k in alone[:SHOWN]]
        parts.append(_opening(tiles, '<div class="ones">{}</div>'))
    return "\n".join(parts)


def _opening(items: Sequence[str], around: str) -> str:
    """The items, those after the first OPEN when they are asked for."""
    if not items:
        return "<p>None.</p>"
    shown, more = "".join(items[:OPEN]), items[OPEN:]
    found = around.format(shown)
    if more:
        rest = around.format("".join(more))
        found += f"<details><summary>{len(more)} more</summary>{rest}</details>"
    return found


def _of_all(features: Sequence[int]) -> str:
    """Which of the features are shown, in words."""
    if len(features) <= SHOWN:
        return ", the most influential first"
    return f": the {SHOWN} most influential of {len(features)}"


def run_line(letter: str, one: Compared, folder: Path) -> str:
    """A letter with the run that it is for, and a link to its own page."""
    return f"<li><b>{letter}</b> {link(escape(one.title), one.page, folder)}</li>"


def comparison_page(
    comparison: Comparison, folder: Path, title: str = "SAEs compared", chart: bytes = b""
) -> bytes:
    """The page, whose links are relative to the folder; `chart` is a PNG above the numbers."""
    named = zip(comparison.letters, comparison.compared, strict=True)
    parts = ['<ul class="runs">', *(run_line(a, c, folder) for a, c in named), "</ul>"]
    if source := comparison.compared[0].source:
        parts.append(f"<p>Images: {escape(source)}.</p>")
    if chart:
        picture = f'<img class="chart" alt="{escape(title)}" src="{png_source(chart)}">'
        parts.append(f'<div class="scroll">{picture}</div>')
    parts.append(tables(comparison))
    parts += [pair_section(comparison, pair, folder) for pair in comparison.pairs]
    if not comparison.pairs and any(one.page for one in comparison.compared):  # not of a sweep
        parts.append(
            "<p>Runs of explain() are matched feature by feature in Python: <code>saexplain."
            "compare_runs(run_a, run_b)</code>, with what explain() returned.</p>"
        )
    page = (TEMPLATES / "compare.html").read_text(encoding="utf-8")
    page = page.replace("{{STYLE}}", (TEMPLATES / "style.css").read_text(encoding="utf-8"))
    page = page.replace("{{TITLE}}", escape(title)).replace("{{CONTENT}}", "\n".join(parts))
    return page.encode()
