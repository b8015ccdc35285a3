"""Which SAEs are trained, and which are reused? All that are wanted of one layer's rows.

    trained = train_saes(layer, settings, made_from, train, workers)  # by target

Takes a layer, what is wanted, and a function that trains; gives a `Stage` for each SAE, on every
rank, calibrated and saved in its folder. It knows nothing of how an SAE is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import feature_analysis as fa
from saexplain.calibration import adjust_thresholds
from saexplain.fidelity import evenly_spaced, mean_l0
from saexplain.files import Stage, load_cached, prepare_folder, save_stage
from saexplain.images import Split
from saexplain.optimization import TrainingError
from saexplain.parallel import ONE_PROCESS, Ranks, Task, Workers, torch_threads
from saexplain.rows import TrainingRows, are_grouped
from saexplain.sae import JumpReLUSAE

SAE_SETTINGS = "sae_latents epochs_sae_final batch_sae lr_sae head_kl normalize_z seed"
FROZEN_EPOCHS = 2  # of the frozen decoder; 5 take 2.4 times as long, and lower FVU by 6%


class WantedSAE(NamedTuple):
    """An SAE to be trained, or reused from its folder."""

    target: int
    settings: Any  # `Settings` of the run, with the SAE's own seed
    folder: Path
    made_from: dict[str, str]  # digests of the data and of the stage before
    freeze_decoder: bool = False

    def inputs(self, rows: TrainingRows) -> dict:
        """Everything that decides the SAE trained on the rows."""
        inputs = {"target_actives": self.target, **self.settings.chosen(SAE_SETTINGS)}
        inputs |= self.made_from
        inputs |= {"device": rows.device.type, "torch": torch.__version__}
        inputs |= {"positions": rows.positions} if rows.raw.dim() == 3 else {}
        return inputs | ({"freeze_decoder": True} if self.freeze_decoder else {})


class Rows(NamedTuple):
    """Of the layer that the SAEs read."""

    train: TrainingRows  # shared by the ranks
    val: TrainingRows  # of which the first rank has all


Train = Callable[[TrainingRows, Sequence[WantedSAE]], list[tuple[JumpReLUSAE, list[dict]]]]


def training_rows(layer: fa.ExplainedLayer, ranks: Ranks = ONE_PROCESS) -> Rows:
    """The layer's rows to train on and to calibrate on.

    For layers with positions the logits are left out: a batch has only some positions of an image.
    """
    train, val = (layer.splits[name].raw for name in ("train", "val"))
    labels = layer.splits["train"].labels
    is_vector = len(train.shape) == 2 and torch.is_tensor(train)  # and nothing goes around it
    logits_of = replace(layer, splits={}).logits_of_z if is_vector else None
    return Rows(
        TrainingRows(train, layer.mu, layer.std, logits_of, ranks, are_grouped(labels)),
        TrainingRows(val, layer.mu, layer.std),
    )


def gather_training(layer: fa.ExplainedLayer, split: Split, ranks: Ranks) -> fa.ExplainedLayer:
    """On the first rank, the layer with the training rows of all ranks that `raw_rows` would take
    in one process, and all training images; on the others, and in one process, the layer itself."""
    if ranks.world == 1:
        return layer
    rows = TrainingRows(layer.splits["train"].raw, ranks=ranks)
    own, p = rows.raw, rows.positions
    if own.dim() == 3:
        own = own.flatten(0, 1)
        taken = evenly_spaced(rows.n_images * p) - rows.first_image * p
        own = own[taken[(taken >= 0) & (taken < len(own))].to(own.device)][:, None]
    raw = ranks.gather_rows(own.float())
    train = fa.Activations(split.images, split.labels, raw)
    return replace(layer, splits={**layer.splits, "train": train}) if ranks.is_first else layer


def sae_stages(
    layer: fa.ExplainedLayer, rows: Rows, wanted: Sequence[WantedSAE], train: Train, what: str = ""
) -> list[Stage]:
    """The SAEs wanted, on every rank: reused, or trained together and calibrated. `what` is that of
    `load_sae`."""
    ranks = rows.train.ranks
    stages = ranks.on_first(lambda: [load_sae(one, rows.train, what) for one in wanted])
    missing = [i for i, stage in enumerate(stages) if stage is None]
    if missing:
        with torch_threads(1):
            trained = train(rows.train, [wanted[i] for i in missing])
        found = zip(missing, trained, strict=True)
        made = ranks.on_first(lambda: [save_sae(layer, rows, wanted[i], *sae) for i, sae in found])
        for i, stage in zip(missing, made, strict=True):
            stages[i] = stage
    return stages


def load_sae(wanted: WantedSAE, rows: TrainingRows, what: str = "") -> Stage | None:
    """The SAE in its folder, if it was made from the same; else None. With `what`, the SAE in
    words, a line is printed."""
    prepare_folder(wanted.folder)
    given = ("sae", wanted.inputs(rows), what, wanted.settings.named, wanted.settings.fresh)
    return load_cached(wanted.folder, *given)


def save_sae(
    layer: fa.ExplainedLayer,
    rows: Rows,
    wanted: WantedSAE,
    before: JumpReLUSAE,
    history: list[dict],
) -> Stage:
    """The SAE `before`, as it was trained, calibrated and saved."""
    sae, shift = adjust_thresholds(before, rows.val, wanted.target)
    if shift == -math.inf and not mean_l0(sae, rows.train):
        raise TrainingError(
            f"SAE training for {wanted.target} actives failed: no feature is active on any "
            f"training image, whatever its threshold; lower --lr-sae (now "
            f"{wanted.settings.lr_sae})"
        )
    tensors = {**sae.state_dict(), "threshold_before_shift": before.threshold}
    tensors |= {"mu": layer.mu, "std": layer.std}
    info = {
        "threshold_shift": shift if math.isfinite(shift) else None,
        "lambda": history[-1]["lambda"],
        "l0_before_shift": mean_l0(before, rows.val),
        "history": history,
    }
    return save_stage(wanted.folder, "sae", tensors, wanted.inputs(rows.train), info)


class Trained(NamedTuple):
    """The SAEs of one target."""

    stages: dict[int, Stage]  # by seed, the run's own and further ones
    frozen: Task | None  # that trains one whose decoder stays as it starts, beside the analysis


def train_saes(
    layer: fa.ExplainedLayer,
    settings: Any,
    made_from: dict[str, str],
    train: Train,
    workers: Workers,
    ranks: Ranks = ONE_PROCESS,
) -> dict[int, Trained]:
    """By target, the SAE of the run, those of further seeds, and where there are hypotheses a
    baseline; trained or reused."""
    wanted, frozen = [], {}
    for seed in range(settings.seed, settings.seed + settings.stability_seeds + 1):
        own = replace(settings, seed=seed)
        for target in settings.target_actives:
            folder = settings.folder_of(target)
            folder = folder if seed == settings.seed else folder / f"stability_seed_{seed}"
            wanted.append(WantedSAE(target, own, folder, made_from))
    rows, several = training_rows(layer, ranks), len(settings.target_actives) > 1

    def print_reuse() -> None:
        for one in wanted[: len(settings.target_actives)]:  # those of the run's own seed
            load_sae(one, rows.train, f"the SAE for {one.target} actives" if several else "the SAE")

    ranks.on_first(print_reuse)  # before any training
    given = (layer, rows, train, workers)
    tasks = start_saes("sae", wanted, *given)
    fewer = replace(settings, epochs_sae_final=min(FROZEN_EPOCHS, settings.epochs_sae_final))
    drawn = settings.hypotheses and not layer.has_positions  # it is a baseline of drawings
    for target in settings.target_actives if drawn else ():
        folder = settings.folder_of(target) / "frozen_decoder"
        one = WantedSAE(target, fewer, folder, made_from, freeze_decoder=True)
        (frozen[target],) = start_saes("frozen decoder", [one], *given)

    trained = {target: Trained({}, frozen.get(target)) for target in settings.target_actives}
    stages = itertools.chain.from_iterable(workers.results(tasks))
    for one, stage in zip(wanted, stages, strict=True):
        trained[one.target].stages[one.settings.seed] = stage
    return trained


def start_saes(
    name: str,
    wanted: Sequence[WantedSAE],
    layer: fa.ExplainedLayer,
    rows: Rows,
    train: Train,
    workers: Workers,
) -> list[Task]:
    """Tasks whose results, one after the other, are the stages of the SAEs wanted.

    Each is a task of its own, which a worker may take. SAEs whose rows are in a file are one task,
    for one read; and what several ranks share is done at once, since all take part.
    """
    head, shared = replace(layer, splits={}), rows.train.ranks.world > 1
    on_gpu = layer.device.type != "cpu"  # which takes one at a time
    if rows.train.is_mapped:
        groups = [wanted]
    elif shared:  # SAEs of one seed have the same batches, together or alone
        seeds = dict.fromkeys(one.settings.seed for one in wanted)
        groups = [[one for one in wanted if one.settings.seed == seed] for seed in seeds]
    else:
        groups = [[one] for one in wanted]
    tasks = []
    for group in groups:
        given = (name, sae_stages, head, rows, group, train)
        # The first is left for this process, unless it is a baseline, trained beside the analysis.
        here = on_gpu or rows.train.is_mapped or not (tasks or group[0].freeze_decoder)
        tasks.append(workers.run(*given) if shared else workers.start(*given, here=here))
    return tasks
