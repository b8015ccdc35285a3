"""How do fidelity and sparsity trade off over seeds, numbers of latents and targets?

    records = run_sweep(combinations, train_one, Path("out"), n_workers=1)

Takes combinations and a function that trains one of them; gives their records, sweep.json,
sweep.png and sweep.html, the page of a comparison. Under torchrun, rank i of n takes the
combinations i, i + n, i + 2n, ... It knows nothing of how an SAE is trained.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

import feature_analysis as fa
from saexplain.compare import MOST_PAIRS, Compared, compare_runs
from saexplain.compare_page import comparison_page
from saexplain.console import text_table
from saexplain.figures import Curve, curve_of, draw_curves, save_figure
from saexplain.files import Stage, folder_lock, prepare_folder, to_json
from saexplain.parallel import Stopwatch, Workers, open_ranks, printing_once
from saexplain.quantities import NOT_COMPUTED
from saexplain.report import sae_record
from saexplain.reproducibility import mean_and_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Combination = TypeVar("Combination")  # settings of one seed, number of latents and target
# The layer with the SAE of a combination, trained or reused, its stage, and the data in words.
TrainOne = Callable[[Combination], tuple[fa.ExplainedLayer, Stage, str]]

L0 = "achieved_actives_test"  # the panels' horizontal axis
SWEEP_TABLE = (  # what is shown of a combination: title, key of its record, format
    ("L0, test", L0, "{:.1f}"),
    ("accuracy", "baseline_acc", "{:.2%}"),
    ("FVU", "fvu", "{:.4f}"),
    ("of PCA's", "fvu_to_pca", "{:.2f}"),
    ("agreement", "agreement_jumprelu", "{:.2%}"),
    ("acc. lost", "delta_acc_jumprelu", "{:.2%}"),
    ("dead", "dead_features", "{:.0f}"),
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
    train_one: TrainOne,
    root: Path,
    n_workers: int,
    wait: bool = False,
) -> list[dict]:
    """The records of all combinations, in their order, each of what train_one(combination) gives.

    Records have seed, sae_latents, target_actives and the keys of SWEEP_TABLE. The first rank
    writes sweep.json, sweep.png and sweep.html to `root` and prints the table; the others return no
    records.
    """
    prepare_folder(root)
    clock = Stopwatch(shown=True)
    with open_ranks() as ranks, printing_once(ranks), Workers(n_workers) as workers:
        mine = combinations[ranks.rank :: ranks.world]
        with clock("sae"):
            tasks = [workers.start("sae", measure_one, train_one, c) for c in mine]
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
        page = sweep_page(combinations, records, train_one, root)
        fa.write_whole(root / "sweep.html", page)
    print(f"{sweep_table(records)}\n{root / 'sweep.html'}: the same with features side by side")
    return records


def measure_one(train_one: TrainOne, combination: Combination) -> dict:
    """The record of one combination."""
    layer, stage, source = train_one(combination)
    own = combination.chosen("sae_latents normalize_z seed")
    return {**sae_record(layer, combination.target_actives[0], stage, own), "data": source}


def sweep_page(
    combinations: Sequence[Combination],
    records: Sequence[dict],
    train_one: TrainOne,
    root: Path,
) -> bytes:
    """The comparison of all combinations. Features are matched among the first ones that share the
    first one's classifier: those of its seed."""
    same = [i for i, r in enumerate(records) if r["seed"] == records[0]["seed"]]
    same = same[: 1 + MOST_PAIRS] if len(same) > 1 else []
    compared = []
    for i, (combination, r) in enumerate(zip(combinations, records, strict=True)):
        settings = {key: r[key] for key in ("seed", "sae_latents", "target_actives")}
        title = f"seed {r['seed']}, {r['sae_latents']} latents, target {r['target_actives']}"
        layer = None
        if i in same:
            with redirect_stdout(io.StringIO()):  # without lines about what is reused
                layer = train_one(replace(combination, fresh=False))[0]
        compared.append(Compared(title, r, settings, r.get("data", ""), layer=layer))
    comparison = compare_runs(*compared, out=None)
    chart = (root / "sweep.png").read_bytes()
    return comparison_page(comparison, root, "Sweep: fidelity and sparsity", chart)


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
            shown = form.format(found["mean"]).replace("-0.00%", "0.00%")  # no lost accuracy
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
