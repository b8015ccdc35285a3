"""How do settings become flags? One for each field of a dataclass, in groups with an example each.

    latents: int = setting(512, "number of SAE features", least=2)      # a field
    parser = build_parser(Settings, GROUPS, __doc__, several=("latents",))

It knows no setting.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import Field, field, fields
from shutil import get_terminal_size
from typing import get_type_hints

from saexplain.files import InputError

HELP_WIDTH = 100  # characters of a line, at most
FLAGS_WIDTH = 30  # of the column of flags
METAVARS = {int: "N", float: "X", str: "TEXT"}


def setting(default, what: str, least: float | None = None):
    """A dataclass field with the help text of its flag, and its smallest value."""
    return field(default=default, metadata={"help": what, "least": least})


def flag_name(name: str) -> str:
    """The flag of a field: batch_sae is set by --batch-sae."""
    return "--" + name.replace("_", "-")


def check_fields(settings: object) -> None:
    """Raise InputError for a field with a value of another type than its own, or below its least;
    tuples are left to the caller."""
    kinds = get_type_hints(type(settings))
    for f in fields(settings):
        value, kind, least = getattr(settings, f.name), kinds[f.name], f.metadata["least"]
        if kind not in (bool, *METAVARS):
            continue
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise InputError(f"{flag_name(f.name)} must be {kind.__name__}, got {value!r}")
        if kind in (int, float) and not abs(value) < 1e300:  # nan is not, either
            raise InputError(f"{flag_name(f.name)} must be finite, got {str(value)[:40]}")
        if kind is int and value >= 2**31:
            raise InputError(f"{flag_name(f.name)} must be below 2**31, got {str(value)[:40]}")
        if least is not None and value < least:
            raise InputError(f"{flag_name(f.name)} must be at least {least:g}, got {value}")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        width = min(HELP_WIDTH, get_terminal_size((HELP_WIDTH, 24)).columns)
        super().__init__(prog, max_help_position=FLAGS_WIDTH, width=width)


class _Parser(argparse.ArgumentParser):
    """Wrong flags are one line, as every other wrong input."""

    def error(self, message: str) -> None:
        raise InputError(f"{' '.join(message.split())} (--help lists the flags)")


def build_parser(
    settings: type,
    groups: Mapping[str, tuple[str, str]],
    doc: str | None,
    several: Collection[str] = (),
) -> argparse.ArgumentParser:
    """A parser with a flag for each field of the dataclass `settings`.

    `groups` have, by title, an example and the names of their fields, separated by spaces; every
    field is in one. Those named in `several` take one or more numbers. `doc` begins with a line
    about the script; with python -OO it is None. Wrong flags raise InputError.
    """
    given = {"formatter_class": _Formatter, "usage": "%(prog)s [flags]"}
    parser = _Parser(description=(doc or "").partition("\n")[0], **given)
    kinds, left = get_type_hints(settings), {f.name: f for f in fields(settings)}
    for title, (example, names) in groups.items():
        section = parser.add_argument_group(title, f"example: %(prog)s {example}")
        for name in names.split():
            _add_flag(section, left.pop(name), kinds[name], name in several)
    if left:
        raise ValueError(f"every setting must be in a group of flags; add {', '.join(left)}")
    return parser


def _add_flag(section: argparse._ArgumentGroup, f: Field, kind: type, several: bool) -> None:
    default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
    shown = {"True": "yes", "False": "no"}.get(default, default) or "none"
    words = f"{f.metadata['help']} (default: {shown})"
    given: dict = {"default": f.default, "help": words.replace("%", "%%")}
    if kind is bool:
        given["action"] = argparse.BooleanOptionalAction
    elif several:
        given |= {"type": int, "nargs": "+", "metavar": "N"}
    else:
        given |= {"type": kind, "metavar": METAVARS[kind]}
    section.add_argument(flag_name(f.name), **given)
