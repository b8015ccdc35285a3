"""How many features should be active? Short trainings at several targets, measured on the layer.

    target = pick_target(layer, settings, data.train, train)  # the smallest that keeps predictions

Takes an `ExplainedLayer` with activations, and a function that trains; gives a number, and prints
what decided. It knows nothing of how an SAE is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import feature_analysis as fa
from saexplain.calibration import adjust_thresholds
from saexplain.fidelity import (
    DENSE_FROM,
    Components,
    feature_stats,
    raw_rows,
    rows_of,
    splice,
)
from saexplain.images import Split
from saexplain.optimization import FULL_TRAIN_IMAGES
from saexplain.parallel import ONE_PROCESS, Ranks, torch_threads
from saexplain.reproducibility import compute_reproducibility, match_features
from saexplain.rows import TrainingRows, spread_over
from saexplain.sae import JumpReLUSAE
from saexplain.stages import Train, WantedSAE, gather_training, training_rows

TARGETS = (5, 10, 20)  # active features per row that are compared
KEPT = 0.98  # share of the predictions that the SAE must keep
COMPARED_IMAGES = 1000  # validation images on which the targets are compared


class Comparison(NamedTuple):
    """A short training at one target, measured on validation images."""

    target: int
    agreement: float  # share of predictions kept with the SAE spliced in
    fvu: float
    fvu_pca: float  # of as many principal components
    dense_share: float  # share of L0 by features active on over a tenth of the rows
    reproduced: float  # share of features that an SAE of another seed has, too


@torch.no_grad()
def compare_targets(
    layer: fa.ExplainedLayer, targets: Sequence[int], saes: Sequence[JumpReLUSAE]
) -> list[Comparison]:
    """The targets compared by SAEs that were trained for each with one seed, then with another."""
    pairs = list(zip(saes, [*targets, *targets], strict=True))
    few = spread_images(layer.splits["val"], COMPARED_IMAGES)
    layer = fa.ExplainedLayer(layer.model, None, layer.mu, layer.std, {**layer.splits, "val": few})
    z, z_train = rows_of(layer, "val"), rows_of(layer, "train")
    own = layer.logits(few.raw).argmax(1)
    total = (z - z.mean(0)).square().sum().item()
    rows, found = TrainingRows(few.raw, layer.mu, layer.std), []
    adjusted = [adjust_thresholds(sae, rows, target)[0] for sae, target in pairs]
    for target, sae, other in zip(targets, adjusted, adjusted[len(targets) :], strict=False):
        spliced = splice(layer, few.raw, sae)
        pca = Components.fit(z_train, target)
        stats = feature_stats(sae, z)
        density = stats.feature_density
        dense = density[density > DENSE_FROM].sum() / density.sum().clamp(min=1e-9)
        matches = match_features(layer.with_sae(sae), raw_rows(layer, "val"), other)
        found.append(
            Comparison(
                target,
                (spliced.logits.argmax(1) == own).double().mean().item(),
                spliced.squared_error / total,
                splice(layer, few.raw, pca.reconstruct).squared_error / total,
                dense.item(),
                compute_reproducibility(matches, *stats).features,
            )
        )
    return found


def spread_images(split: fa.Activations, n: int) -> fa.Activations:
    """The split, with labels and outputs of at most n images, evenly spaced: it may be sorted by
    class. The images, which nothing here reads, stay those of the whole split."""
    some = spread_over(len(split.raw), n)
    return split._replace(labels=split.labels[some], raw=split.raw[some.to(split.raw.device)])


def choose_target(compared: Sequence[Comparison]) -> int:
    """The smallest target that keeps KEPT of the predictions; the largest where none does."""
    enough = [c.target for c in compared if c.agreement >= KEPT]
    return min(enough, default=compared[-1].target)


def targets_table(compared: Sequence[Comparison], chosen: int) -> str:
    """The comparison in lines of text."""
    lines = ["Short trainings with several targets; the one chosen is then trained in full:"]
    lines.append("target  predictions kept     FVU  of as many PCs  dense share of L0  reproduced")
    for c in compared:
        lines.append(
            f"{c.target:>6}{c.agreement:>18.1%}{c.fvu:>8.3f}{c.fvu_pca:>16.3f}"
            f"{c.dense_share:>19.0%}{c.reproduced:>12.0%}{'  chosen' * (c.target == chosen)}"
        )
    if all(c.agreement < KEPT for c in compared):
        lines.append(f"none keeps {KEPT:.0%} of the predictions, so the largest target is taken")
    return "\n".join(lines)


def pick_target(
    layer: fa.ExplainedLayer,
    settings: Any,
    split: Split,
    train: Train,
    ranks: Ranks = ONE_PROCESS,
) -> int:
    """The target for the layer, after short trainings with several, which are printed.

    `split` are all training images, of which the layer has this rank's activations. However many
    they are, a short training takes a fifth of the steps of a full one over FULL_TRAIN_IMAGES.
    """
    targets = [target for target in TARGETS if target < settings.sae_latents]
    wanted = []
    for seed in (settings.seed, settings.seed + 1):
        short = replace(settings, epochs_sae_final=1, seed=seed)
        wanted += [WantedSAE(target, short, Path(settings.out), {}) for target in targets]
    few = spread_images(layer.splits["train"], FULL_TRAIN_IMAGES // ranks.world)
    shorter = replace(layer, splits={**layer.splits, "train": few})
    with torch_threads(1):
        saes = [sae for sae, _ in train(training_rows(shorter, ranks).train, wanted)]
    layer = gather_training(layer, split, ranks)

    def choose() -> int:
        compared = compare_targets(layer, targets, saes)
        chosen = choose_target(compared)
        print(targets_table(compared, chosen))
        return chosen

    return ranks.on_first(choose)
