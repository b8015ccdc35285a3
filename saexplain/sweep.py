"""How do fidelity and sparsity trade off over seeds, numbers of latents and targets?

    records = run_sweep(combinations, train_one, Path("out"), n_workers=1)

Takes combinations and a function that trains and measures one of them; gives their records,
sweep.json and sweep.png. Under torchrun, rank i of n takes the combinations i, i + n, i + 2n, ...
It knows nothing of how an SAE is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

import feature_analysis as fa
from saexplain.console import NOT_COMPUTED, text_table
from saexplain.figures import Curve, draw_curves, save_figure
from saexplain.files import folder_lock, prepare_folder, to_json
from saexplain.parallel import Stopwatch, Workers, open_ranks, printing_once
from saexplain.reproducibility import mean_and_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Combination = TypeVar("Combination")  # of a seed, a number of latents and a target

L0 = "achieved_actives_test"  # the panels' horizontal axis
SWEEP_TABLE = (  # what is shown of a combination: title, key of its record, format
    ("L0, test", L0, "{:.2f}"),
    ("FVU", "fvu", "{:.4f}"),
    ("FVU to PCs", "fvu_to_pca", "{:.3f}"),
    ("agreement", "agreement_jumprelu", "{:.2%}"),
    ("accuracy lost", "delta_acc_jumprelu", "{:.2%}"),
    ("dead", "dead_features", "{:.0f}"),
    ("L0 by dense", "dense_share_of_l0", "{:.1%}"),
)
NO_COLUMN = ("fvu_to_pca",)  # of the table, whose lines are to fit a terminal
NO_PANEL = (L0, "agreement_jumprelu")  # the axis itself; close to the accuracy lost


def run_sweep(
    combinations: Sequence[Combination],
    train_one: Callable[[Combination], dict],
    root: Path,
    n_workers: int,
    wait: bool = False,
) -> list[dict]:
    """The records of all combinations, in their order, each made by train_one(combination).

    Records have seed, sae_latents, target_actives and the keys of SWEEP_TABLE. The first rank
    writes sweep.json and sweep.png to `root` and prints the table; the others return no records.
    """
    prepare_folder(root)
    clock = Stopwatch(shown=True)
    with open_ranks() as ranks, printing_once(ranks), Workers(n_workers) as workers:
        mine = combinations[ranks.rank :: ranks.world]
        with clock("sae"):
            tasks = [workers.start("sae", train_one, combination) for combination in mine]
            parts = ranks.gather(workers.results(tasks))
            clock.result = f"{len(combinations)} trained or reused, and measured"
    if not ranks.is_first:
        return []
    records: list = [None] * len(combinations)
    for i, part in enumerate(parts):
        records[i :: ranks.world] = part  # those of rank i, where the combinations were
    with folder_lock(root, wait):
        fa.write_whole(root / "sweep.json", to_json(records))
        save_figure(draw_sweep(records), root / "sweep.png")
    print(sweep_table(records))
    return records


def over_seeds(records: Sequence[dict], latents: int, target: int, key: str) -> dict:
    """Mean and standard deviation of a measurement over the seeds of one size and target; NaN where
    it could not be computed for one of them."""
    found = []
    for r in records:
        if (r["sae_latents"], r["target_actives"]) == (latents, target):
            found.append(math.nan if r[key] is None else r[key])
    return mean_and_std(np.array(found))


def sizes_and_targets(records: Sequence[dict]) -> tuple[list[int], list[int]]:
    """The numbers of latents and the targets of the records, ascending."""
    latents = sorted({r["sae_latents"] for r in records})
    return latents, sorted({r["target_actives"] for r in records})


def sweep_table(records: Sequence[dict]) -> str:
    """One row for each number of latents and target: mean ± standard deviation over seeds."""
    n_seeds = len({r["seed"] for r in records})
    shown = [column for column in SWEEP_TABLE if column[1] not in NO_COLUMN]
    rows = [["latents", "target", *(title for title, _, _ in shown)]]
    for latents, target in itertools.product(*sizes_and_targets(records)):
        row = [str(latents), str(target)]
        for _, key, form in shown:
            found = over_seeds(records, latents, target, key)
            if math.isnan(found["mean"]):
                row.append(NOT_COMPUTED)
                continue
            spread = "" if found["std"] is None else f" ± {form.format(found['std'])}"
            row.append(form.format(found["mean"]) + spread)
        rows.append(row)
    return f"Mean ± standard deviation over {n_seeds} seeds\n" + text_table(rows)


def sweep_panels(records: Sequence[dict]) -> dict[str, dict[str, Curve]]:
    """By measurement and number of latents, its curve over the targets."""
    sizes, targets = sizes_and_targets(records)
    panels: dict[str, dict[str, Curve]] = {}
    for title, key, _ in SWEEP_TABLE:
        if key in NO_PANEL:
            continue
        panels[title] = {}
        for latents in sizes:
            l0 = [over_seeds(records, latents, target, L0)["mean"] for target in targets]
            found = [over_seeds(records, latents, target, key) for target in targets]
            spread = [f["std"] or 0.0 for f in found]  # None: a single seed
            curve = Curve(l0, [f["mean"] for f in found], spread)
            panels[title][f"{latents} latents"] = curve
    return panels


def draw_sweep(records: Sequence[dict]) -> Figure:
    """The frontier of each number of latents, with the standard deviation over seeds."""
    title = "Fidelity and sparsity (bars: standard deviation over seeds)"
    _, targets = sizes_and_targets(records)
    return draw_curves(title, targets, sweep_panels(records))


def combinations(runs: Sequence) -> list:
    """One settings dataclass for each SAE of a sweep, with a folder of its own, from those of runs
    with fields seed, sae_latents, target_actives and out."""
    singles = []
    for run in runs:
        for target in run.target_actives:
            name = f"seed_{run.seed}_latents_{run.sae_latents}_target_{target}"
            single = replace(run, target_actives=(target,), out=str(Path(run.out) / name))
            singles.append(single)
    return singles
