"""TODO"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import feature_analysis as fa

if TYPE_CHECKING:
    from saexplain.hypotheses import Hypothesis


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def listed(words: Sequence[str], last: str = "and") -> str:
    """As in "a, b and c", each once; "" for nothing."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def percent(share: float) -> str:
    """As in "80%", "0.3%", "<0.1%" or "0%"."""
    if share < 0.001:
        return "<0.1%" if share else "0%"
    return f"{100 * share:.1f}%" if share < 0.01 else f"{100 * share:.0f}%"


LEGEND = """A bar is horizontal, a stem vertical, a slash rises, a backslash falls, ink is any;
percentages are of the images that fire the feature."""


def plural(name: str) -> str:
    """As in "6s", "bags", "dresses", "T-shirts/tops", "cherries"."""
    if name[-1:].isalpha() and name[-1].isupper():
        return f"{name}s"
    if name.endswith("s") and not name.endswith("ss"):
        return name  # already, as "trousers"
    if name.endswith(("ss", "x", "sh", "ch")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return "/".join(f"{part}s" for part in name.split("/"))


def images_of(classes: Sequence[str], c: int) -> str:
    """What the images of class c are called, as in "6s" or "trousers"."""
    name = fa.class_name(classes, c)
    is_word = name[:1].isupper() and name.split()[0][1:].isalpha() and name[1:].islower()
    return plural(name[0].lower() + name[1:] if is_word else name)


def _label_words(h: Hypothesis) -> str:
    """As in "80% are 6s, 12% 0s", of the images that fire it."""
    words = []
    for c in h.enriched:
        share = percent(h.label_histogram[c] / h.n_active)
        words.append(f"{share} {images_of(h.classes, c)}")
    first = " ".join(words[:1]).replace(" ", " are ", 1)
    return ", ".join([first, *words[1:]])


def _effect_words(h: Hypothesis) -> str:
    """As in "without it 6 loses 0.30 logits, 2% of predictions change"."""
    if h.effect is None:
        return "little effect" if h.claims_no_effect else "effect like any direction's"
    moves = []
    for c, verb, by in zip(h.effect[::2], ("loses", "gains"), h.effect[1::2], strict=True):
        if c is not None:
            moves.append(f"{fa.class_name(h.classes, c)} {verb} {by:.2f}")
    return f"without it {listed(moves)} logits, {percent(h.changes)} of predictions change"


def caption(h: Hypothesis) -> str:
    """The claim in plain English."""
    if not h.parts:
        return "no hypothesis"
    there = listed([word.words() for word in h.ink.there])
    empty = listed([f"no {word.words()}" for word in h.ink.absent])
    pieces = [", ".join(piece for piece in (there, empty) if piece)]
    pieces.append(_label_words(h))
    rare = listed([images_of(h.classes, c) for c in h.depleted], "or")
    pieces.append(f"hardly any {rare}" if rare else "")
    pieces.append(_effect_words(h))
    text = "; ".join(piece for piece in pieces if piece)
    return text[:1].upper() + text[1:]
