"""Do the tests notice? One small change at a time, and the tests of its room are run.

    python tests/mutate.py --n 200 --seed 0 --jobs 2    # a random sample, over an hour
    python tests/mutate.py --rooms feature_confirmation

Comparisons, signs, operators, numbers, `and`, `or`, `not`, min and max are changed, wherever they
decide about a number: what only draws, prints or words is left out. Each survivor is printed as its
line, before and after; at the end stands the share that was caught.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # of each room, the quickest first
    "whole_files": "whole_files",
    "mnist_data": "mnist_data",
    "feature_analysis": "feature_analysis arguments",
    "feature_hypotheses": "feature_hypotheses",
    "feature_confirmation": "truths feature_confirmation",
    "MNIST_SAE_code": "truths mnist_sae_code",
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
LIMIT = 600  # seconds until a mutant counts as caught: it hangs


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


def is_caught(mutant: Mutant, places: list[Path]) -> bool:
    """Whether a test fails; in one of the copies of the project, which no one else uses."""
    place = places.pop()
    path = place / f"{mutant.room}.py"
    text = path.read_text()
    path.write_text(text[: mutant.start] + mutant.new + text[mutant.end :])
    tests = [f"tests/test_{name}.py" for name in TESTS[mutant.room].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, timeout=LIMIT)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)
        places.append(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--rooms", nargs="*", default=list(TESTS))
    args = parser.parse_args()
    everything = [mutant for room in args.rooms for mutant in mutants_of(room)]
    sample = random.Random(args.seed).sample(everything, min(args.n, len(everything)))
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(n) for n in range(args.jobs)]
        for place in places:
            shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", "artifacts*/*"))
        caught = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            results = zip(sample, pool.map(lambda m: is_caught(m, places), sample), strict=True)
            for n, (mutant, was_caught) in enumerate(results, 1):
                caught += was_caught
                if not was_caught:
                    text = (ROOT / f"{mutant.room}.py").read_text()
                    line = text.splitlines()[mutant.line - 1].strip()
                    old = text[mutant.start : mutant.end]
                    print(f"{mutant.room}:{mutant.line}: {line}   [{old} -> {mutant.new}]")
                print(f"{caught} of {n} caught", file=sys.stderr, flush=True)
    print(f"{caught} of {len(sample)} mutants of {len(everything)} possible were caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
