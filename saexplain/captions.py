"""What does a hypothesis say in plain English?

    caption(hypothesis)     # "Stem upper left, no ink in center; 80% are 6s; little effect"
    images_of(classes, 6)   # "6s", "trousers"

Takes a `Hypothesis` and the names of the classes; gives text. It computes no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import feature_analysis as fa

if TYPE_CHECKING:  # hypotheses.py imports this module
    from saexplain.hypotheses import Hypothesis


def listed(words: Sequence[str], last: str = "and") -> str:
    """The words as in "a, b and c", each once; "" for none."""
    words = list(dict.fromkeys(words))
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def percent(share: float) -> str:
    """A share as in "80%", "0.3%", "<0.1%" or "0%"."""
    if share < 0.001:
        return "<0.1%" if share else "0%"
    return f"{100 * share:.1f}%" if share < 0.01 else f"{100 * share:.0f}%"


def plural(name: str) -> str:
    """The plural of a class name, as in "6s", "bags", "dresses", "T-shirts/tops", "cherries"."""
    if name[-1:].isalpha() and name[-1].isupper():
        return f"{name}s"
    if name.endswith("s") and not name.endswith("ss"):
        return name  # a plural already, as "trousers"
    if name.endswith(("ss", "x", "sh", "ch")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return "/".join(f"{part}s" for part in name.split("/"))


def images_of(classes: Sequence[str], c: int) -> str:
    """The images of class c in words, as in "6s" or "trousers"."""
    name = fa.class_name(classes, c)
    is_word = name[:1].isupper() and name.split()[0][1:].isalpha() and name[1:].islower()
    return plural(name[0].lower() + name[1:] if is_word else name)


def _label_words(h: Hypothesis) -> str:
    """As in "80% are 6s, 12% 0s", of the images that activate the feature."""
    words = []
    for c in h.enriched:
        share, verb = percent(h.label_histogram[c] / h.n_active), "" if words else "are "
        words.append(f"{share} {verb}{images_of(h.classes, c)}")
    return ", ".join(words)


def _effect_words(h: Hypothesis) -> str:
    """As in "without it 6 loses 0.30 logits, 2% of predictions change"."""
    if h.effect is None:
        random = "effect no larger than a random direction's"
        return "little effect" if h.claims_no_effect else random
    changes = []
    for c, verb, by in zip(h.effect[::2], ("loses", "gains"), h.effect[1::2], strict=True):
        if c is not None:
            changes.append(f"{fa.class_name(h.classes, c)} {verb} {by:.2f}")
    return f"without it {listed(changes)} logits, {percent(h.changes)} of predictions change"


def caption(h: Hypothesis) -> str:
    """The hypothesis in plain English: ink, labels, effect."""
    if not h.parts:
        return "no hypothesis"
    there = listed([word.words() for word in h.ink.there])
    absent = listed([f"no {word.words()}" for word in h.ink.absent])
    rare = listed([images_of(h.classes, c) for c in h.depleted], "or")
    ink = ", ".join(filter(None, (there, absent)))
    clauses = (ink, _label_words(h), f"hardly any {rare}" if rare else "", _effect_words(h))
    text = "; ".join(filter(None, clauses))
    return text[:1].upper() + text[1:]
