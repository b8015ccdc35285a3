"""How does one SAE become one folder? Pictures, tested hypotheses, the page and its tables.

    draft = prepare_report(layer, folder, options, clock, workers)  # from validation images alone
    record, report, tasks = finish_report(draft, record, ...)       # test images; files
    write_page(draft, record, report, frontier)                     # feature_report.html

    explain_sae(model, "layer3", sae, mu, std, train, val, test, out="explained")  # all of it

Takes an `ExplainedLayer` with an SAE and its three splits, the fidelity record and a few options.
It does not know how the SAE was trained.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain import console, figures, page, runs, text
from saexplain.activations import (
    Storing,
    collect_activations,
    layer_inputs,
    warn_chance,
    warn_scale_shift,
)
from saexplain.activity import collect_activity
from saexplain.analysis import Analysis, analyze, by_influence, feature_record
from saexplain.baselines import default_directions, evaluate_baseline, features_along
from saexplain.datasets import fit_data, load_own
from saexplain.diagnoses import CALLER_NAMES, diagnose
from saexplain.edits import edited_cells, edited_images
from saexplain.evaluation import (
    Evaluation,
    Summary,
    crops_on,
    evaluate_halves,
    evaluation_record,
    make_evaluation,
    split_test_images,
)
from saexplain.fidelity import feature_stats, mean_l0, measure_fidelity, rows_of
from saexplain.files import InputError, Stage, folder_lock, to_json, to_json_lines
from saexplain.hypotheses import (
    Discovery,
    Faithful,
    Hypothesis,
    discover,
    freeze_hypotheses,
    load_frozen,
    propose_hypotheses,
)
from saexplain.images import Data, Display, Split, digest_of
from saexplain.ink import FULL_INK
from saexplain.layers import open_layer
from saexplain.overlays import write_pictures
from saexplain.panels import PanelNotes, Sketch, write_feature_panels
from saexplain.parallel import (
    Stopwatch,
    Task,
    Workers,
    default_torch_state,
    make_deterministic,
    torch_threads,
)
from saexplain.patterns import gradient_images
from saexplain.progress import safe_output
from saexplain.reproducibility import Replicates
from saexplain.sae import JumpReLUSAE
from saexplain.saelens import check_finite
from saexplain.substitution import measure_agreements, reason_not_compared
from saexplain.thumbnails import Pictures
from saexplain.where import FAITHFUL

SAE_PARTS = ("encode", "decode", "W_enc", "W_dec")  # that are used of an SAE
N_PANELS = 5  # features, the most influential, that get a panel and a line on the terminal
SAMPLED_ROWS = 12_000  # on which the terminal's L0 and FVU are measured
PICTURE_TASKS = 2  # each is sent all images, so not more than keep two cores busy
OPTIONS_OF_RESULTS = "topk n_eval alpha hypotheses features seed"
FILES = "FILES.md"  # what each file of a run is, for those who are handed the folder
NO_GRADIENT = "no gradient leads from the layer to the pixels, so that it has no pattern"
NO_DRAWING = "This page cannot compute the network, so you cannot draw for it; all else works."


@dataclass(frozen=True)
class Options:
    """What a report contains, and what things are called in it.

    Raises ValueError for numbers that cannot be used.
    """

    classes: tuple[str, ...] = ()  # names of the logits; empty: their numbers
    network: str = "a network"  # in words
    source: str = "images"  # of the data, in words
    topk: int = 20  # strongest images kept per feature
    n_eval: int = 2000  # images over which an effect is averaged
    alpha: float = 1.0  # how much of a feature is added when its logit effect is measured
    hypotheses: bool = True  # propose, freeze and test a hypothesis about each feature
    features: int = 0  # report so many of the most influential features; 0: all
    seed: int = 0
    caller: str = "explain_sae"  # whose arguments advice names, a key of CALLER_NAMES
    display: Display = field(default_factory=Display)  # of the images' own colors

    def __post_init__(self) -> None:
        for name, least in (("topk", 1), ("n_eval", 1), ("features", 0), ("seed", 0)):
            fa.check_whole(name, getattr(self, name), least)


class Draft(NamedTuple):
    """A report after everything that needs no test image."""

    layer: fa.ExplainedLayer
    folder: Path
    options: Options
    analysis: Analysis
    features: list[int]  # those that are reported, the most influential first
    discovery: Discovery | None  # the validation images, if there are hypotheses
    frozen: str | None  # the SHA-256 of hypotheses.json, if there are hypotheses
    not_compared: str  # why drawings take the place of no features, "" where they do
    pictures: list[Task]
    clock: Stopwatch
    shown: Pictures  # the validation images


def prepare_report(
    layer: fa.ExplainedLayer, folder: Path, options: Options, clock: Stopwatch, workers: Workers
) -> Draft:
    """Analyze the features, start their pictures, propose and freeze hypotheses: from the
    validation images alone."""
    analysis = analyze(layer, options.topk, options.n_eval, options.alpha, clock)
    features = by_influence(analysis, options.features)
    shown = Pictures(layer.splits["val"].images, options.display)
    pictures, a = [], analysis
    for part in range(PICTURE_TASKS):
        own = features[part::PICTURE_TASKS]
        given = (folder, own, a.bank, shown, a.heats, a.inked, options.classes, a.ink_sign)
        given += (a.maps, a.faithful, a.pattern_correlation)
        pictures.append(workers.start("pictures", write_pictures, *given))
    discovery = frozen = None
    not_compared = ""
    if options.hypotheses:
        with clock("propose and freeze"):
            no_gradient = "" if analysis.heats is not None else NO_GRADIENT
            faithful = Faithful(analysis.faithful, analysis.pattern_correlation, no_gradient)
            heats = analysis.heats if layer.has_positions else None
            discovery = discover(layer, analysis.unit_heats, analysis.faithful, heats)
            given = (discovery, None, analysis.activity, analysis.removed)
            named = {"faithful": faithful, "classes": options.classes}
            hypotheses = propose_hypotheses(layer, *given, **named)
            frozen = freeze_hypotheses(hypotheses, folder / "hypotheses.json")
            not_compared = reason_not_compared(hypotheses, analysis.activity, layer.has_positions)
            drawn = sum(h.is_drawn for h in hypotheses)
            clock.result = f"{len(hypotheses):,} proposed, {drawn:,} with a drawing"
    known = (analysis, features, discovery, frozen, not_compared)
    return Draft(layer, folder, options, *known, pictures, clock, shown)


def start_baselines(
    draft: Draft, baselines: Mapping[str, JumpReLUSAE], workers: Workers
) -> dict[str, Task]:
    """By name, the tasks that propose and test hypotheses about the features of `baselines`; none
    where drawings are not compared."""
    alone = replace(draft.layer, splits={})  # workers are sent only the images they need
    halves = split_test_images(draft.layer.splits["test"])
    on_gpu = draft.layer.device.type != "cpu"
    tasks = {}
    least = None if draft.analysis.faithful.all() else FAITHFUL
    for name, sae in baselines.items() if draft.frozen and not draft.not_compared else ():
        given = (sae, alone, draft.discovery, *halves, least)
        tasks[name] = workers.start("baselines", evaluate_baseline, *given, here=on_gpu)
    return tasks


def evaluate_draft(draft: Draft) -> Evaluation:
    """The frozen hypotheses tested on one half of the test images, the other half being kept for
    replication.

    Raises ValueError when hypotheses.json is not the file that was frozen.
    """
    layer, discovery = draft.layer, draft.discovery
    hypotheses, rule = load_frozen(draft.folder / "hypotheses.json", draft.frozen)
    halves = split_test_images(layer.splits["test"])
    activity = collect_activity(layer, halves[0].raw, halves[0].labels)
    rows = evaluate_halves(hypotheses, layer, halves, discovery.canvas, rule, activity)
    given = (layer, discovery, draft.analysis.activity, hypotheses, halves[0])
    agreements = measure_agreements(*given)
    n_discovery = len(discovery.labels)
    return make_evaluation(hypotheses, rule, rows, activity, agreements, n_discovery)


def default_baselines(layer: fa.ExplainedLayer, seed: int) -> dict[str, JumpReLUSAE]:
    """The baselines that need no training: "random directions" and "neurons", with features that
    are active as often and as strongly as the SAE's."""
    z = rows_of(layer, "val")
    stats = feature_stats(layer.sae, z)
    directions = default_directions(layer, seed)
    return {name: features_along(rows, z, *stats) for name, rows in directions.items()}


def finish_report(
    draft: Draft,
    record: dict,
    replicates: Replicates | None,
    baselines: Mapping[str, Task],
    workers: Workers,
) -> tuple[dict, list[dict], list[Task]]:
    """Test on the test images and write the files of one SAE but for the page.

    `record` holds the fidelity and what else is known of the SAE; `baselines` are the tasks of
    `start_baselines`. Returns the record, completed, for summary.json, the records of
    feature_report.json, and tasks that still write files.
    """
    options, folder = draft.options, draft.folder
    evaluation, summaries = None, {}
    if draft.frozen:
        with draft.clock("test"):
            evaluation = evaluate_draft(draft)
            draft.clock.result = console.explained_words(evaluation.summary)
        with draft.clock("baselines, waited for"):
            results = workers.results(list(baselines.values()))
            summaries = dict(zip(baselines, results, strict=True))
            if summaries:
                draft.clock.result = (
                    f"{len(summaries)} other sets of directions, tested the same way"
                )
    report = []
    for k in draft.features:
        entry = feature_record(k, draft.analysis)
        if replicates:
            entry |= {"counterparts": replicates.counterparts(k), "mark": replicates.mark(k)}
        if evaluation:
            entry |= text.evaluated_record(k, evaluation, options.classes)
        report.append(entry)

    top = report[:N_PANELS]
    notes = {entry["feature"]: panel_notes(draft, entry, replicates, evaluation) for entry in top}
    given = (folder, notes, draft.analysis, draft.shown, options.classes)
    tasks = [workers.start("panels", write_feature_panels, *given)]
    record = {**record, "top_features": [entry["feature"] for entry in top]}
    if replicates:
        record["reproducibility"] = replicates.record
    if evaluation:
        record["hypotheses_sha256"] = draft.frozen
        own = evaluation.summary
        record["agreement_hypotheses"] = own.agreement_hypotheses
        record["f1_by_influence"], record["f1_mean"] = own.f1_by_influence, own.f1_mean
        record["hypotheses"] = evaluation_record(evaluation, summaries, draft.frozen)
        title = f"{len(evaluation.hypotheses)} features of {options.network} ({options.source})"
        marks = {k: replicates.mark(k) for k in range(draft.layer.d_sae)} if replicates else {}
        given = (folder, evaluation, summaries, record["hypotheses"], title, marks)
        given += (options.classes,)
        tasks.append(workers.start("hypotheses", write_hypotheses, *given))
    fa.write_whole(folder / "feature_report.json", to_json_lines(report))
    with draft.clock("pictures, waited for"):
        workers.results(draft.pictures)
        draft.clock.result = f"of {len(draft.features):,} features"
    drawn = sum(task.seconds for task in draft.pictures)
    seconds = {**draft.clock.seconds, "pictures": drawn}
    given = (record, draft.analysis, draft.features, seconds, CALLER_NAMES[options.caller])
    diagnoses = diagnose(*given)
    record["diagnoses"] = [d.as_record() for d in diagnoses]
    return record, report, tasks


def write_hypotheses(
    folder: Path,
    evaluation: Evaluation,
    summaries: dict[str, Summary],
    record: dict,
    title: str,
    marks: dict[int, str],
    classes: Sequence[str],
) -> None:
    """hypotheses.md and its two pictures; `record` is that of `evaluation_record`."""
    content = text.hypotheses_markdown(evaluation, record, title, marks, classes)
    fa.write_whole(folder / "hypotheses.md", content.encode())
    summaries = {"SAE": evaluation.summary, **summaries}
    if evaluation.summary.agreement_hypotheses is not None:
        figures.save_figure(figures.draw_explained(summaries), folder / "explained.png")
    figures.save_figure(figures.draw_influence(evaluation), folder / "influence.png")


def mean_ink(draft: Draft, h: Hypothesis) -> Tensor:
    """(P,) mean level of ink of the validation images that activate the feature of a hypothesis; of
    a layer with positions, around the peaks of those edited in tests."""
    layer, activity = draft.layer, draft.analysis.activity
    if draft.discovery.patterns is None:
        return draft.discovery.levels[activity.of(h.feature)[0]].float().mean(0)
    images = layer.splits["val"].images
    crops = crops_on(draft.discovery.canvas, layer, images)
    active, _ = edited_images(h.feature, activity, h.strong_from)
    own = images[active.to(images.device)]
    cells = edited_cells(h, layer, crops, own, active, activity)
    return crops.levels(own, cells).mean(0)


def panel_notes(
    draft: Draft, entry: dict, replicates: Replicates | None, evaluation: Evaluation | None
) -> PanelNotes:
    """What a panel shows besides numbers: the hypothesis, in words and drawn, and the patterns of
    the feature's counterparts in other SAEs. `entry` is the feature's record."""
    counterparts = []
    # A pattern that is no face of the feature is none of its counterpart's, either.
    for found in entry.get("counterparts", []) if draft.analysis.maps is None else []:
        sae = replicates.saes[replicates.seeds.index(found["seed"])]
        at = gradient_images(draft.layer, draft.layer.splits["val"].images)
        given = (draft.layer.model, sae, draft.layer.mu, draft.layer.std, found["feature"])
        # One direction, not d_in of them
        heat = draft.analysis.ink_sign * fa.feature_input_pattern(*given, **at).cpu()
        similarity = min(found["cosine"], found["correlation"])
        words = f"seed {found['seed']}, no. {found['feature']}\nsimilarity {similarity:.2f}"
        counterparts.append((words, (heat.sum(0) if heat.dim() == 3 else heat).numpy()))
    sketch = None
    if evaluation and evaluation.hypotheses[entry["feature"]].is_drawn:
        h = evaluation.hypotheses[entry["feature"]]
        mean = mean_ink(draft, h).view(h.weights.shape)
        sketch = Sketch(mean.numpy() / FULL_INK, h.weights, h.caption)
    caption = "\n".join(line.strip() for line in console.hypothesis_lines(entry))
    return PanelNotes(caption, draft.analysis.inked, tuple(counterparts), sketch)


def write_page(
    draft: Draft,
    record: dict,
    report: Sequence[dict],
    frontier: Sequence[dict],
    network: page.Network | None = None,
) -> str:
    """Write feature_report.html; its size in words.

    `frontier` has l0, fvu and agreement of each SAE of the run; `network` the weights of a network
    that the page can compute.
    """
    layer, options, a = draft.layer, draft.options, draft.analysis
    # Crops are not drawn on the page, whose canvas has whole images.
    whole = draft.discovery is not None and not layer.has_positions
    canvas = draft.discovery.canvas if whole else None
    results = console.page_results(record)
    title = f"{layer.d_sae} features of {options.network} ({options.source})"
    path = draft.folder / "feature_report.html"
    n_shown = page.write_dashboard(
        path,
        report,
        layer,
        page.Shown(
            a.bank,
            a.activity,
            a.shown_heats,
            a.inked,
            canvas,
            a.maps,
            a.faithful,
            options.display,
            a.removed,
        ),
        page.Overview(
            title,
            results,
            # Seconds would make the pages of equal runs differ.
            [d for d in record["diagnoses"] if d["complaint"] != "slow analysis"],
            frontier,
            options.classes,
            "" if network else NO_DRAWING,
        ),
        network,
    )
    if n_shown < len(report):
        print(
            f"{path.name}: shows the {n_shown} features of most influence of {len(report)}, as a "
            f"page of all would exceed {page.PAGE_BYTES / 1e6:g} MB; feature_report.json has all"
        )
    return f"{path.stat().st_size / 1e6:.1f} MB"


def write_history(
    folder: Path,
    classifier_history: Sequence[dict],
    sae_history: Sequence[dict],
    target: int,
    logits_from: float | None,
    dead_below: float,
) -> None:
    """run.log.jsonl, a line for about every hundredth of each training, and training.png.

    `logits_from` is the share of training after which the logits count, `dead_below` the density
    below which a latent counts as dead.
    """
    rows = [{"stage": "classifier", **row} for row in classifier_history]
    rows += [{"stage": "sae", **row} for row in sae_history]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    fa.write_whole(folder / "run.log.jsonl", content.encode())
    last = sae_history[-1]["step"] + 1
    from_step = None if logits_from is None else logits_from * last
    given = (classifier_history, sae_history, target, from_step, dead_below)
    figure = figures.draw_training(figures.training_curves(*given))
    figures.save_figure(figure, folder / "training.png")


def frontier_of(records: Sequence[dict]) -> list[dict]:
    """What the page's frontier shows of each record of summary.json."""
    keys = {"l0": "achieved_actives_test", "fvu": "fvu", "agreement": "agreement_jumprelu"}
    return [{name: record[key] for name, key in keys.items()} for record in records]


@torch.no_grad()
def accuracy_words(model: torch.nn.Module, val: Split) -> str:
    """How many validation images the network classifies right, in words."""
    right = (model(val.images).argmax(1) == val.labels).double().mean().item()
    return f"{right:.2%} of the validation images right"


@torch.no_grad()
def sae_words(layer: fa.ExplainedLayer, stages: Iterable[Stage]) -> str:
    """L0 and FVU of SAEs of the layer in words, on a sample of the validation images."""
    saes = [JumpReLUSAE.from_weights(stage.tensors, layer.device) for stage in stages]
    z = rows_of(layer, "val")
    z = z[:: -(-len(z) // SAMPLED_ROWS)]
    total = (z - z.mean(0)).square().sum()
    l0 = [f"{mean_l0(sae, z):.1f}" for sae in saes]
    lost = [(sae.decode(sae.encode(z)) - z).square().sum() / total for sae in saes]
    return f"L0 {', '.join(l0)}; FVU {', '.join(f'{share:.4f}' for share in lost)}"


def sae_record(
    layer: fa.ExplainedLayer, target: int, stage: Stage, settings: dict, untrained: object = None
) -> dict:
    """What summary.json says about a trained SAE before its features are explained.

    `settings` are those that it names, `untrained` an SAE to compare it with.
    """
    return {
        "target_actives": target,
        "lambda": stage.record["lambda"],
        "threshold_shift": stage.record["threshold_shift"],
        "achieved_actives_before_shift": stage.record["l0_before_shift"],
        **measure_fidelity(layer, target, untrained),
        **settings,
        "device": str(layer.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def write_summary(
    root: Path, records: list[dict], manifest: dict, sae_digests: dict[str, str]
) -> None:
    """frontier.png, FILES.md, summary.json, and settings.json with all that the results were made
    from, which makes the folder a finished run. `sae_digests` are by target."""
    if len(records) > 1:
        figures.save_figure(figures.draw_frontier(records), root / "frontier.png")
    fa.write_whole(root / FILES, (page.TEMPLATES / FILES).read_bytes())
    fa.write_whole(root / "summary.json", to_json(records))
    frozen = {str(r["target_actives"]): r.get("hypotheses_sha256") for r in records}
    manifest = {**manifest, "sae_sha256": sae_digests, "hypotheses_sha256": frozen}
    fa.write_whole(root / runs.MANIFEST, to_json(manifest))


# --------------------------------------------------------------------------------------------------
# Any trained SAE
# --------------------------------------------------------------------------------------------------


def load_splits(net, classes: Sequence[str], train, val=None, test=None, **given) -> Data:
    """Data from splits of one's own, in any form that `load_own` takes, with its arguments `given`,
    or of what it gives as `train`, on the network's device.

    Raises InputError for what cannot be used.
    """

    def count_logits(images: Tensor) -> int:
        raw = net.preactivations(images[: fa.PROBED])
        return net.logits_from_preactivations(raw).shape[1]

    if isinstance(train, Data):
        with torch.no_grad():
            n_classes = count_logits(train.train.images[: fa.PROBED].to(net.device))
        return fit_data(train, classes, n_classes, net.device)
    known = {"classes": classes, "n_classes": count_logits, "device": net.device}
    return load_own(train, val, test, **known, model=net.model, **given)


@default_torch_state()
def explain_sae(
    model: object,
    layer: str | None,
    sae: object,
    mu: Tensor,
    std: Tensor,
    train: object,
    val: object,
    test: object,
    out: str | Path,
    *,
    pool: str | None = None,
    layout: str | None = None,
    grid: Sequence[int] | None = None,
    prefix_tokens: int | None = None,
    images: Mapping[str, object] | None = None,
    workers: int = 0,
    wait: bool = False,
    **options: object,
) -> list[dict]:
    """Explain the features of any trained SAE; everything goes into the folder `out`.

        sae, mu, std = load_saelens(folder)
        records = explain_sae(model, "features.7", sae, mu, std, train, val, test, "explained")

    Args:
        model, layer, pool, layout, grid, prefix_tokens: as in `AtLayer`; layer None for a model
            that has the two methods itself.
        sae: has encode, decode, W_enc (d_in, d_sae) and W_dec; it reads (raw - mu) / std.
        mu, std: (d_in,); zeros and ones for an SAE that reads the layer's own output.
        train, val, test: pairs of tensors (images, labels), Datasets, DataLoaders or folders; None
            for a split to be drawn from another; or `train` alone, what `load_own` gives. Densities
            are those of the first; hypotheses are made from the second and tested on the third.
        images: further arguments of `load_own`, such as {"mean": ..., "std": ...}.
        options: fields of `Options`, by name.

    Returns the records of feature_report.json, the most influential feature first. Raises
    InputError for what cannot be used, ValueError for a layer whose output cannot be read or
    replaced, or an SAE that does not fit.
    """
    clock, folder = Stopwatch(shown=True), Path(out).expanduser()
    if lacking := [name for name in SAE_PARTS if not hasattr(sae, name)]:
        raise InputError(f"the SAE must have {', '.join(SAE_PARTS)}, but has no {lacking[0]}")
    if isinstance(sae, torch.nn.Module):
        check_finite(dict(sae.named_parameters()))
    mu, std = (torch.as_tensor(value) for value in (mu, std))
    net = open_layer(model, layer, pool, layout, grid, prefix_tokens)
    known = {f.name for f in fields(Options)} - {"network", "source", "caller", "display"}
    if unknown := sorted(options.keys() - known):
        raise InputError(f"explain_sae() has no option {unknown[0]!r}; it has {sorted(known)}")
    data = load_splits(net, options.pop("classes", ()), train, val, test, **(images or {}))
    options |= {"classes": data.classes, "source": data.source, "network": net.title}
    given = Options(display=data.display, **options)
    sae = sae.to(net.device) if isinstance(sae, torch.nn.Module) else sae
    explained = fa.ExplainedLayer(net, sae, mu.to(net.device), std.to(net.device))
    with torch.no_grad():  # an SAE that does not fit is an error before anything is deleted
        some = explained.feature_acts(explained.raw(data.val.images[: fa.PROBED]))
    make_deterministic(net.device)
    with (
        safe_output(),
        folder_lock(folder, wait),
        torch_threads(1),
        Workers(workers) as pool_of_workers,
    ):
        made_from = layer_inputs(net, data)
        network = runs.Network(given.caller, net.title, made_from["weights"])
        settings = {name: getattr(given, name) for name in OPTIONS_OF_RESULTS.split()}
        manifest = network.manifest(settings, data)
        digests = {"None": digest_of([sae.W_enc, sae.W_dec, mu, std, some])}  # it has no target
        staged = runs.begin_run(folder, {**manifest, "sae_sha256": digests}, str)
        with clock("activations"):
            storing = Storing(folder=folder, made_from=made_from)
            plain = collect_activations(net, data, normalize=False, storing=storing)
            clock.result = console.layer_words(plain)
        warn_scale_shift(plain)
        warn_chance(plain)
        explained = replace(explained, splits=plain.splits)
        draft = prepare_report(explained, staged, given, clock, pool_of_workers)
        record = {
            "target_actives": None,
            "sae_latents": explained.d_sae,
            "seed": given.seed,
            "data": data.source,
            **measure_fidelity(explained),
        }
        compared = draft.frozen and not draft.not_compared
        baselines = default_baselines(explained, given.seed) if compared else {}
        tasks = start_baselines(draft, baselines, pool_of_workers)
        given = (draft, record, None, tasks, pool_of_workers)
        record, report, pending = finish_report(*given)
        with clock("page"):
            clock.result = write_page(draft, record, report, frontier_of([record]))
        pool_of_workers.results(pending)
        seconds = {**clock.seconds, **pool_of_workers.seconds}
        record["seconds"] = {**seconds, "whole run": clock.total()}
        write_summary(staged, [record], manifest, digests)
        runs.finish_run(folder)
        console.print_results(folder, {folder: record}, [report])
    return report
