"""Do the tests notice a wrong module? One small change at a time, then the module's test file runs.

    python bench/mutate.py statistics --n 20 --seed 0    # a sample for saexplain/statistics.py
    python bench/mutate.py statistics --numbers 12 40    # these mutants alone

A mutant has one comparison, operator, `and`/`or`, `not`, sign, number, True/False, min/max or
returned value changed. Each is tested in a copy of the project, in a forked process, by the file
tests/test_<module>.py (or --tests); one that hangs counts as caught.
"""

import argparse
import ast
import os
import random
import shutil
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import scipy.stats  # noqa: F401  large imports are made once, and forked
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
TESTS = {"MNIST_SAE_code": "training"}  # modules whose test file is named after something else
PAIRS = "Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, Add Sub, Mult Div"
OPERATORS = [[getattr(ast, name) for name in pair.split()] for pair in PAIRS.split(", ")]
SWAPS = {a: b for pair in OPERATORS for a, b in (pair, pair[::-1])}
SWAPS |= dict.fromkeys((ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult), ast.Mult)
NOT_IN = (ast.JoinedStr, ast.Raise, ast.arg)  # messages and annotations
HANGS_AFTER = 180  # seconds; the tests of all modules together take less


def changes(node: ast.AST) -> list[tuple[ast.AST, str, object]]:
    """Every change of a syntax tree: the node, its attribute, and the attribute's new value."""
    if isinstance(node, NOT_IN):
        return []
    kind, found = type(node), []
    if kind is ast.Compare:
        for n, op in enumerate(node.ops):
            found.append((node, "ops", [*node.ops[:n], SWAPS[type(op)](), *node.ops[n + 1 :]]))
    elif kind in (ast.BinOp, ast.BoolOp) and type(node.op) in SWAPS:
        found.append((node, "op", SWAPS[type(node.op)]()))
    elif kind is ast.UnaryOp:  # twice is as good as not at all
        found.append((node, "operand", ast.UnaryOp(node.op, node.operand)))
    elif kind is ast.Constant and isinstance(node.value, (int, float)):
        found.append((node, "value", node.value - 1 if node.value else 1))  # True becomes 0
    elif kind is ast.Name and node.id in ("min", "max"):
        found.append((node, "id", "max" if node.id == "min" else "min"))
    elif kind is ast.Return and node.value is not None:
        found.append((node, "value", ast.Constant(None)))
    return found + [change for child in ast.iter_child_nodes(node) for change in changes(child)]


def run_tests(place: Path, tests: list[str]) -> None:
    """The body of a forked process, whose exit status is pytest's: 0 when all tests pass."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(place)
    sys.path[0] = str(place)
    sys.dont_write_bytecode = True  # it would serve the next mutant of the same second and size
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def passes(place: Path, tests: list[str]) -> bool:
    process = get_context("fork").Process(target=run_tests, args=(place, tests))
    process.start()
    process.join(HANGS_AFTER)
    process.kill()
    process.join()
    return process.exitcode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("module", help="its name, such as statistics")
    parser.add_argument("--n", type=int, default=20, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--numbers", type=int, nargs="+", help="these mutants, and no sample")
    parser.add_argument("--tests", nargs="+", help="test files instead of the module's own")
    args = parser.parse_args()
    tests = args.tests or [f"tests/test_{TESTS.get(args.module, args.module)}.py"]
    top = f"{args.module}.py"
    source = top if (ROOT / top).is_file() else f"saexplain/{top}"
    if missing := [path for path in (source, *tests) if not (ROOT / path).is_file()]:
        parser.error(f"{missing} must be files; give a module's name, and --tests if need be")
    text, caught = (ROOT / source).read_text(), 0
    every = range(len(changes(ast.parse(text))))
    sample = args.numbers or random.Random(args.seed).sample(every, min(args.n, len(every)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "project")
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "artifacts*", "shared"))
        if not passes(place, tests):
            parser.error(f"{' '.join(tests)} must pass with the unchanged {source}, but fails")
        for number in sample:
            tree = ast.parse(text)
            node, name, new = changes(tree)[number]
            old = ast.unparse(node)
            setattr(node, name, new)
            (place / source).write_text(ast.unparse(tree))
            survived = passes(place, tests)
            caught += not survived
            change = f"number {number}, line {node.lineno}: {old:.70} -> {ast.unparse(node):.70}"
            print("SURVIVED" if survived else "caught  ", change, flush=True)
    print(f"{caught} of {len(sample)} caught, seed {args.seed}, of {len(every)} possible mutants")


if __name__ == "__main__":
    main()
