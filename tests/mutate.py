"""Do the tests notice? One small change at a time, and the tests of its room are run.

    python tests/mutate.py --n 200 --seed 0 --jobs 2    # a random sample, over an hour
    python tests/mutate.py --rooms feature_confirmation
    python tests/mutate.py --lines feature_hypotheses:521 MNIST_SAE_code:2991

Comparisons, signs, operators, numbers, `and`, `or`, `not`, min and max are changed, wherever they
decide about a number: what only draws, prints or words is left out. Each survivor is printed as its
line, before and after; at the end stands the share that was caught.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib  # noqa: F401  what all tests import is imported once, and forked
import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # of each room, the quickest first
    "whole_files": "whole_files",
    "mnist_data": "mnist_data",
    "feature_roles": "feature_roles",
    "feature_analysis": "feature_analysis arguments own_network",
    "feature_hypotheses": "feature_hypotheses own_network",
    "feature_confirmation": "truths feature_confirmation",
    "MNIST_SAE_code": "truths own_network end_to_end sweeps_and_ranks mnist_sae_code holding",
}
LEFT_OUT = """draw paint visuali figure letter panel picture caption table words _line tell progress
gallery title legend markdown headline report diagnos places versions page zoom colour enlarged
statement percent plural _rows download message parse shown frontier""".split()
SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
SWAPS |= {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "@": "*"}
SWAPS |= {"and": "or", "or": "and", "is": "is not", "is not": "is", "in": "not in", "not in": "in"}
SPLITS = {"train": "val", "val": "test", "test": "val", "judging": "aside", "aside": "judging"}
SPLITS |= {"min": "max", "max": "min"}
NOT_IN = (ast.JoinedStr, ast.Raise, ast.arg, ast.AnnAssign)  # messages and annotations
LIMIT = 1800  # seconds until a mutant counts as caught: it hangs


class Mutant(NamedTuple):
    room: str
    line: int
    start: int  # where in the file's text
    end: int
    new: str


def changes(node: ast.AST, text: str, at) -> Iterator[tuple[int, int, str]]:
    """Start, end and new text of each change of one node; `at` gives a place in the text."""
    pairs = []
    if isinstance(node, ast.Compare):
        pairs = list(zip([node.left, *node.comparators], node.comparators, strict=False))
    elif isinstance(node, ast.BinOp):
        pairs = [(node.left, node.right)]
    elif isinstance(node, ast.BoolOp):
        pairs = list(zip(node.values, node.values[1:], strict=False))
    for a, b in pairs:
        start, end = at(a.end_lineno, a.end_col_offset), at(b.lineno, b.col_offset)
        operator = text[start:end].strip(" ()\n")
        if operator in SWAPS:
            yield start, end, text[start:end].replace(operator, SWAPS[operator])
    if not isinstance(node, ast.expr):
        return
    start, end = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield start, end, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield start, end, str(node.value + 1)
    elif isinstance(node, ast.UnaryOp):
        yield start, at(node.operand.lineno, node.operand.col_offset), ""
    elif isinstance(node, ast.Constant) and node.value in SPLITS:
        yield start, end, repr(SPLITS[node.value])
    elif isinstance(node, ast.Attribute) and node.attr in SPLITS:
        yield end - len(node.attr), end, SPLITS[node.attr]
    elif isinstance(node, ast.Name) and node.id in ("min", "max"):
        yield start, end, "max" if node.id == "min" else "min"


def mutants_of(room: str) -> list[Mutant]:
    text = (ROOT / f"{room}.py").read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        return starts[line - 1] + len(text[starts[line - 1] :].encode()[:column].decode())

    def walk(node: ast.AST) -> Iterator[Mutant]:
        name = str(getattr(node, "name", "")).lower()
        if any(word in name for word in LEFT_OUT) or isinstance(node, NOT_IN):
            return
        for change in changes(node, text, at):
            yield Mutant(room, node.lineno, *change)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    tops = ast.parse(text).body
    return [m for top in tops if hasattr(top, "name") for m in walk(top)]


def begin(mutant: Mutant, place: Path, limit: int) -> int:
    """Start the tests of a mutant in a copy of the project; returns the process that runs them."""
    text = (ROOT / f"{mutant.room}.py").read_text()
    changed = text[: mutant.start] + mutant.new + text[mutant.end :]
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.chdir(place)
        (place / f"{mutant.room}.py").write_text(changed)
        sys.path[0] = str(place)  # not the tests of the original
        signal.alarm(limit)
        tests = [f"tests/test_{name}.py" for name in TESTS[mutant.room].split()]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    return pid


def survivors(sample: list[Mutant], places: list[Path], until: float) -> Iterator[bool]:
    """Of each mutant, in the order in which they end, whether it survived; none is begun later."""
    running: dict[int, tuple[Mutant, Path]] = {}
    sample = sample[::-1]
    while running or sample:
        while sample and places and time.time() < until:
            mutant, place = sample.pop(), places.pop()
            running[begin(mutant, place, LIMIT)] = mutant, place
        if not running:
            return
        pid, status = os.wait()
        mutant, place = running.pop(pid)
        path = f"{mutant.room}.py"
        text = (ROOT / path).read_text()
        (place / path).write_text(text)
        places.append(place)
        if status == 0:
            line = text.splitlines()[mutant.line - 1].strip()
            old = text[mutant.start : mutant.end]
            print(f"{mutant.room}:{mutant.line}: {line}   [{old} -> {mutant.new}]", flush=True)
        yield status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="begin no mutant after so many")
    parser.add_argument("--rooms", nargs="*", default=list(TESTS))
    parser.add_argument("--lines", nargs="*", help="room:line; only the mutants there")
    args = parser.parse_args()
    everything = [mutant for room in args.rooms for mutant in mutants_of(room)]
    if args.lines is not None:
        everything = [m for m in everything if f"{m.room}:{m.line}" in args.lines]
    sample = random.Random(args.seed).sample(everything, min(args.n, len(everything)))
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(n) for n in range(args.jobs)]
        for place in places:
            shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", "artifacts*"))
        found = list(survivors(sample, places, time.time() + 60 * args.minutes))
    caught = len(found) - sum(found)
    print(f"{caught} of {len(found)} mutants were caught, of {len(everything)} possible ones")


if __name__ == "__main__":
    main()
