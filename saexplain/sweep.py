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
from saexplain.figures import Curve, curve_of, draw_curves, save_figure
from saexplain.files import folder_lock, prepare_folder, to_json
from saexplain.parallel import Workers, open_ranks
from saexplain.reproducibility import mean_and_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Combination = TypeVar("Combination")  # of a seed, a number of latents and a target

L0 = "achieved_actives_test"  # the panels' horizontal axis
SWEEP_TABLE = (  # what is shown of a combination: title, key of its record, format
    ("L0, test", L0, "{:.1f}"),
    ("accuracy", "baseline_acc", "{:.2%}"),
    ("FVU", "fvu", "{:.4f}"),
    ("of PCA's", "fvu_to_pca", "{:.2f}"),
    ("agreement", "agreement_jumprelu", "{:.2%}"),
    ("acc. lost", "delta_acc_jumprelu", "{:.2%}"),
    ("dead", "dead_features", "{:.0f}"),
    ("L0 dense", "dense_share_of_l0", "{:.0%}"),
)
PANELS = {  # of sweep.png, by key
    "fvu": "FVU",
    "fvu_to_pca": "FVU, relative to as many PCs",
    "delta_acc_jumprelu": "accuracy lost",
    "dead_features": "dead features",
    "dense_share_of_l0": "share of L0 by dense features",
}


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
    with open_ranks() as ranks, Workers(n_workers) as workers:
        mine = combinations[ranks.rank :: ranks.world]
        tasks = [workers.start("sae", train_one, combination) for combination in mine]
        parts = ranks.gather(workers.results(tasks))
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
    """One row for each number of latents and target: mean ± standard deviation over seeds, which
    one seed has none of."""
    n_seeds = len({r["seed"] for r in records})
    rows = [["latents", "target", *(title for title, _, _ in SWEEP_TABLE)]]
    for latents, target in itertools.product(*sizes_and_targets(records)):
        row = [str(latents), str(target)]
        for _, key, form in SWEEP_TABLE:
            found = over_seeds(records, latents, target, key)
            if math.isnan(found["mean"]):
                row.append(NOT_COMPUTED)
                continue
            shown = form.format(found["mean"])
            if found["std"] is not None:
                shown = f"{shown.rstrip('%')}±{form.format(found['std'])}"
            row.append(shown)
        rows.append(row)
    title = f"Mean ± standard deviation over {n_seeds} seeds" if n_seeds > 1 else "One seed"
    return f"{title}; accuracy is the network's\n" + text_table(rows)


def sweep_panels(records: Sequence[dict]) -> dict[str, dict[str, Curve]]:
    """By measurement and number of latents, its curve over the targets."""
    sizes, targets = sizes_and_targets(records)
    panels: dict[str, dict[str, Curve]] = {}
    for key, title in PANELS.items():
        panels[title] = {}
        for latents in sizes:
            l0 = [over_seeds(records, latents, target, L0)["mean"] for target in targets]
            found = [over_seeds(records, latents, target, key) for target in targets]
            panels[title][f"{latents} latents"] = curve_of(l0, found)
    return panels


def draw_sweep(records: Sequence[dict]) -> Figure:
    """The frontier of each number of latents, with the standard deviation over seeds."""
    _, targets = sizes_and_targets(records)
    return draw_curves("Fidelity and sparsity", targets, sweep_panels(records), "seeds")


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
