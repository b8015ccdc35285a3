"""How long everything takes, how much of that is arithmetic, and how it grows.

    python tests/benchmark.py --data DIR         # DIR holds MNIST/raw; some five minutes on two idle cores
    python tests/benchmark.py --data sample      # the bundled 5,000 digits
    python tests/benchmark.py --repeats 3        # median of three trainings instead of one

Prints a table per section and writes them all as JSON. Exit status: 1 when feature_analysis and the plain reference
disagree, 2 when an argument or the data cannot be used, otherwise 0.

machine     `product rate` is that of a large float32 matrix product, best of several.
stages      What MNIST_SAE_code.py does, with its default settings. `seconds`: median over `runs`, three of them for
            what takes less than a second. `GFLOP`: the operations in matrix products, counted from their shapes by the
            methods of Shapes; a dash where there are none. `GFLOP/s`: the second by the first. `of product rate`: its
            share of the machine's; the rest of the time is memory traffic, sorting, the optimizer and Python.
command     `python MNIST_SAE_code.py` in a process of its own and a fresh folder: seconds from outside, peak memory of
            that process (a dash on Windows); results and seconds by stage as its summary.json reports them.
statements  A hypothesis for every feature: proposed from the validation images, frozen, tested on half of the test
            images with bootstrap intervals, judged; `sum` is of these four. Then the same tests on the other half
            without intervals. `seconds`: best of three; `ms/feature` of all the SAE's features.
reference   Feature by feature as a plain script does it: a pass over the images for each, autograd, loops over batches,
            a new matplotlib figure with one subplot per image. `ours`: all features at once, divided by their number.
            Both in milliseconds per feature, medians of rounds that alternate between the two. `ratio`: reference by
            ours. `difference`: the largest between their results; 1e-4 is allowed.
scaling     Untrained SAEs with 20 active features per image, whatever their size. `seconds`: the best of three rounds
            over all rows, so that a busy spell spoils none of them. `us/latent`, `us/image`: microseconds. `to linear`:
            seconds by what the first row of its kind predicts if cost is proportional to what grows; up to 1 is no
            worse than linear. Effects are averaged over 2,000 images while latents grow and over all while images grow.
            `SAE step`: a training step, from the difference between a training of seven epochs and one of one epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import feature_analysis as fa  # noqa: E402
import MNIST_SAE_code as driver  # noqa: E402

try:
    import resource
except ImportError:  # Windows
    resource = None

TARGET = 20  # mean active features per image, everywhere
TOLERANCE = 1e-4  # by how much feature_analysis and the reference may differ
LATENTS = (512, 2048, 8192)
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product gives the machine's rate


class Row(NamedTuple):
    """One line of a table: what it is about, and its columns by title; None is shown as a dash."""

    what: str
    columns: dict[str, str | int | float | None]


def cell(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def show(title: str, rows: Sequence[Row]) -> None:
    lines = [(row.what, *(cell(value) for value in row.columns.values())) for row in rows]
    print("\n" + driver.table([(title, *rows[0].columns), *lines]), flush=True)


def clocked(work: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds until the device has finished `work`, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - started, result


def timed(work: Callable, device: torch.device, repeats: int = 1) -> tuple[list[float], object]:
    """Seconds of each of `repeats` runs, of at least three when the first takes less than one second; last result."""
    first, result = clocked(work, device)
    seconds = [first]
    while len(seconds) < max(repeats, 3 if first < 1 else 1):
        again, result = clocked(work, device)
        seconds.append(again)
    return seconds, result


def mebibytes(ru_maxrss: int | None) -> float | None:
    """getrusage counts in kilobytes on Linux, in bytes on macOS."""
    return None if ru_maxrss is None else ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


# ---------------------------------------------------------------------------------------------------------------------
# Operations of each stage
# ---------------------------------------------------------------------------------------------------------------------


def product(m: int, k: int, n: int) -> int:
    """(m, k) @ (k, n): a multiplication and an addition each."""
    return 2 * m * k * n


class Shapes(NamedTuple):
    """What is multiplied; its methods count the operations in matrix products.

    Going back through a product costs as much as going forward for each of its factors that needs a gradient. Left out:
    everything elementwise, and whatever looks at a handful of images only to check them.
    """

    train: int  # images
    val: int
    test: int
    pixels: int
    d_in: int
    d_sae: int
    classes: int

    def hidden(self, rows: int) -> int:
        """images -> preactivations"""
        return product(rows, self.pixels, self.d_in)

    def head(self, rows: int) -> int:
        """preactivations -> logits"""
        return product(rows, self.d_in, self.classes)

    def code(self, rows: int) -> int:
        """preactivations -> latents, or back"""
        return product(rows, self.d_in, self.d_sae)

    def classifier(self, settings: driver.Settings) -> int:
        """Forward, the gradients of both weights, and of the hidden units; images need none."""
        batch = settings.batch_ffn
        rows = batch * driver.n_steps(self.train, batch, driver.scaled_epochs(settings.epochs_ffn, self.train))
        return 2 * self.hidden(rows) + 3 * self.head(rows)

    def training(self, settings: driver.Settings) -> int:
        """Frame, teacher and start; encoder and decoder, rare latents, logits; folding and calibration."""
        batch = settings.batch_sae
        steps = driver.n_steps(self.train, batch, driver.scaled_epochs(settings.epochs_sae_final, self.train))
        prepare = 2 * product(self.train, self.d_in, self.d_in) + self.head(self.train) + 3 * self.code(16 * batch)
        both = (2 + 3) * self.code(steps * batch)  # what is encoded needs no gradient
        rare = 3 * self.code(batch * math.ceil(steps / driver.RARE_EVERY))
        head_rows = batch * sum((step + 0.5) / steps > driver.HEAD_FROM for step in range(steps))
        logits = 2 * (product(head_rows, self.d_in, self.d_in) + self.head(head_rows))  # nor does the classifier
        return prepare + both + rare + logits + 2 * self.code(self.d_in) + self.code(self.val)

    def fidelity(self) -> int:
        """Densities on train, L0 twice on val and once on test; four reconstructions, five comparisons of logits."""
        four_and_l0 = (4 * 2 + 1) * self.code(self.test)
        return self.code(self.train) + 2 * self.code(self.val) + four_and_l0 + 5 * 2 * self.head(self.test)

    def bank(self) -> int:
        """Activations, and the label histogram, a product with the one-hot labels."""
        return self.hidden(self.val) + self.code(self.val) + product(self.d_sae, self.val, self.classes)

    def patterns(self) -> int:
        """One gradient for each hidden unit, on one image, and their combination for each latent."""
        gradient = product(1, self.d_in, self.d_in) + self.hidden(1)
        return self.d_in * gradient + product(self.d_sae, self.d_in, self.pixels)

    def logit_effects(self, n_eval: int) -> int:
        """The head on every image for every latent."""
        n = min(n_eval, self.val)
        return self.hidden(n) + self.head(n) + self.head(n * self.d_sae)

    def ablation_effects(self, pairs: int) -> int:
        """Activations, and the head once for each active (feature, image) pair."""
        return self.hidden(self.val) + self.code(self.val) + self.head(self.val) + self.head(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Machine, stages, command
# ---------------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> tuple[list[Row], float]:
    """The rows, and the product rate in GFLOP/s."""
    side = PRODUCT_SIDE[device.type]
    a = torch.rand(side, side, device=device)
    rate = max(product(side, side, side) / clocked(lambda: a @ a, device)[0] for _ in range(20)) / 1e9
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "CPUs": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        **driver.versions(),
        f"product rate at {side}^3, GFLOP/s": rate,
    }
    return [Row(what, {"value": value}) for what, value in facts.items()], rate


class Explained(NamedTuple):
    """What the stages computed; the later sections start from it."""

    settings: driver.Settings
    data: driver.Data
    model: driver.Classifier
    pre: driver.Preactivations
    sae: driver.JumpReLUSAE
    analysis: driver.Analysis

    def given(self, sae: driver.JumpReLUSAE, images: int | None = None) -> tuple:
        """Model, loader of the first validation images, SAE, mu, std: what the functions of feature_analysis take."""
        split = driver.Split(*(tensor[:images] for tensor in self.data.val))
        return self.model, driver.TensorLoader(split), sae, self.pre.mu, self.pre.std


def stages(settings: driver.Settings, device: torch.device, rate: float, repeats: int) -> tuple[list[Row], Explained]:
    rows: list[Row] = []

    def stage(name: str, flops: int | None, work: Callable, *given):
        runs, result = timed(partial(work, *given), device, repeats)
        seconds = statistics.median(runs)
        speed = None if flops is None else flops / 1e9 / seconds
        columns = {"seconds": seconds, "GFLOP": speed and flops / 1e9, "GFLOP/s": speed}
        columns |= {"of product rate": speed and f"{speed / rate:.1%}", "runs": len(runs)}
        rows.append(Row(name, columns))
        return result

    data = stage("data", None, driver.load_mnist, settings.data, settings.seed, device)
    s = Shapes(*(len(split.labels) for split in data[:3]), 28 * 28, settings.hidden_units, settings.sae_latents, 10)
    model = stage("classifier", s.classifier(settings), driver.train_classifier, data.train, settings)
    every_image = s.hidden(s.train + s.val + s.test)
    pre = stage("preactivations", every_image, driver.collect_preactivations, model, data, settings.normalize_z)
    head = driver.standardised_head(model, pre)

    def train() -> tuple[driver.JumpReLUSAE, driver.JumpReLUSAE]:
        z_train, z_val = ((raw - pre.mu) / pre.std for raw in (pre.train, pre.val))
        before, _ = driver.train_sae(z_train, head, TARGET, settings)
        return before, driver.adjust_thresholds(before, z_val, TARGET)[0]

    before, sae = stage("SAE and calibration", s.training(settings), train)
    stage("fidelity", s.fidelity(), driver.measure, before, sae, pre, data, head)

    given, n_eval = (model, driver.TensorLoader(data.val), sae, pre.mu, pre.std), settings.n_eval
    bank = stage("bank", s.bank(), fa.collect_feature_bank, *given, settings.topk)
    heats = stage("patterns", s.patterns(), fa.feature_input_patterns, model, *given[2:])
    logit = stage("logit effects", s.logit_effects(n_eval), fa.feature_logit_effects, *given, settings.alpha, n_eval)
    pairs = int(bank.n_active.clamp(max=n_eval).sum())
    ablation = stage("ablation effects", s.ablation_effects(pairs), fa.feature_ablation_effects, *given, n_eval)
    nearest = stage("nearest features", s.code(s.d_sae), fa.nearest_features, sae.W_dec)

    logit, ablation = (fa.LogitEffects(*(tensor.cpu() for tensor in effects)) for effects in (logit, ablation))
    inked = (data.train.images > 0).float().mean(0)[0] >= driver.INKED_SHARE
    analysis = driver.Analysis(bank, heats.cpu(), logit, ablation, nearest, inked.cpu().numpy())
    with tempfile.TemporaryDirectory() as folder:
        shown = (range(s.d_sae), bank, data.val.images, analysis.heats, analysis.inked)
        stage("pictures", None, fa.write_feature_pictures, folder, *shown)
    total = sum(row.columns["seconds"] for row in rows)
    rows.append(Row("sum", {**dict.fromkeys(rows[0].columns), "seconds": total}))
    return rows, Explained(settings, data, model, pre, sae, analysis)


def statements(e: Explained, device: torch.device) -> list[Row]:
    (judging, aside), given = driver.confirmation_splits(e.data.test), (e.sae, e.pre.mu, e.pre.std)
    rows: list[Row] = []

    def row(what: str, seconds: float) -> None:
        rows.append(Row(what, {"seconds": seconds, "ms/feature": 1000 * seconds / e.settings.sae_latents}))

    def step(what: str, work: Callable):
        runs, result = timed(work, device, 3)
        row(what, min(runs))
        return result

    hypotheses = step("propose", lambda: fa.propose_hypotheses(e.model, *e.data.val, *given))
    with tempfile.TemporaryDirectory() as folder:
        step("freeze", lambda: fa.freeze_hypotheses(hypotheses, Path(folder) / "hypotheses.json"))
    evidence = step("test", lambda: fa.test_hypotheses(hypotheses, e.model, *judging, *given))
    step("judge", lambda: fa.judge_hypotheses(hypotheses, evidence))
    row("sum", sum(r.columns["seconds"] for r in rows))
    step("images set aside", lambda: fa.test_hypotheses(hypotheses, e.model, *aside, *given, n_bootstrap=0))
    return rows


# Linux charges a process the memory of the one that starts it, so a small process stands between.
LAUNCHER = """
import json, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds = time.perf_counter() - started
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
except ImportError:
    peak = None
print(json.dumps([status, seconds, peak]))
"""


def command(settings: driver.Settings) -> list[Row]:
    """Raises SystemExit when the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--data", settings.data, "--seed", str(settings.seed), "--device", settings.device, "--out", folder)
        line = (sys.executable, str(ROOT / "MNIST_SAE_code.py"), *flags)
        told = subprocess.run([sys.executable, "-c", LAUNCHER, *line], stdout=subprocess.PIPE, text=True, check=True)
        status, seconds, peak = json.loads(told.stdout)
        if status:
            raise SystemExit(f"error: {' '.join(line)} ended with status {status}")
        record = json.loads((Path(folder) / "summary.json").read_bytes())[0]
    names = "baseline_acc recon_acc_jumprelu agreement_jumprelu fvu achieved_actives_test dead_features".split()
    facts = {"wall seconds": seconds, "peak memory, MiB": mebibytes(peak), **{name: record[name] for name in names}}
    facts |= {f"reported seconds, {stage}": value for stage, value in record["seconds"].items()}
    return [Row(what, {"value": value}) for what, value in facts.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The reference: one feature after the other, nothing shared, nothing clever
# ---------------------------------------------------------------------------------------------------------------------


class Plain:
    """Each method explains one feature; the tensors it returns are on the CPU."""

    def __init__(self, e: Explained):
        self.model, self.loader, self.sae, self.mu, self.std = e.given(e.sae)
        self.settings, self.images, self.inked = e.settings, e.data.val.images, e.analysis.inked
        self.activations: dict[int, Tensor] = {}  # kept for the pictures, as are the patterns
        self.heats: dict[int, Tensor] = {}

    def batches(self, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Standardised preactivations (B, d_in), activations of feature k (B,) and labels (B,)."""
        for images, labels in self.loader:
            z = (self.model.preactivations(images) - self.mu) / self.std
            yield z, self.sae.encode(z)[:, k], labels

    def logits(self, z: Tensor) -> Tensor:
        return self.model.logits_from_preactivations(z * self.std + self.mu)

    def bank(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and activations of the strongest images, at most topk, and the label histogram (C,)."""
        _, activations, labels = (torch.cat(parts).cpu() for parts in zip(*self.batches(k), strict=True))
        self.activations[k] = activations
        order = torch.sort(activations, descending=True, stable=True).indices[: self.settings.topk]
        top = order[activations[order] > 0]
        return top, activations[top], torch.bincount(labels[activations > 0], minlength=10)

    def pattern(self, k: int) -> tuple[Tensor]:
        image = self.images[:1].clone().requires_grad_(True)
        z = (self.model.preactivations(image) - self.mu) / self.std
        self.sae.pre_threshold(z)[0, k].backward()
        self.heats[k] = image.grad[0, 0].cpu()
        return (self.heats[k],)

    def logit_effect(self, k: int) -> tuple[Tensor]:
        deltas, left = [], self.settings.n_eval
        for z, _, _ in self.batches(k):
            moved = z[:left] + self.settings.alpha * self.sae.W_dec[k]
            deltas.append(self.logits(moved) - self.logits(z[:left]))
            left -= len(moved)
            if left == 0:
                break
        return (torch.cat(deltas).mean(0).cpu(),)

    def ablation_effect(self, k: int) -> tuple[Tensor]:
        deltas, left = [], self.settings.n_eval
        for z, activations, _ in self.batches(k):
            fires = torch.nonzero(activations > 0)[:left, 0]
            removed = activations[fires, None] * self.sae.W_dec[k]
            deltas.append(self.logits(z[fires] - removed) - self.logits(z[fires]))
            left -= len(fires)
        return (torch.cat(deltas).sum(0).cpu() / max(1, self.settings.n_eval - left),)

    def pictures(self, k: int, folder: Path) -> None:
        """What ours show: the 20 strongest images, 5 from each quarter of the active range, the pattern."""
        activations, heat = self.activations[k], self.heats[k]
        falling = torch.argsort(activations, descending=True)[: int((activations > 0).sum())]
        bands = [band[torch.linspace(0, len(band) - 1, min(5, len(band))).long()] for band in falling.tensor_split(4)]
        figure, axes = plt.subplots(4, 10, figsize=(10, 5))
        for place in axes.flat:
            place.axis("off")
        for place, i in zip(axes.flat, torch.cat([falling[:20], *bands]).tolist(), strict=False):
            place.imshow(self.images[i, 0].cpu(), cmap="gray_r")
            place.set_title(f"{activations[i]:.2g}", fontsize=7)
        figure.suptitle(f"Feature {k}")
        figure.savefig(folder / f"plain_{k}_gallery.png")
        plt.close(figure)
        figure, place = plt.subplots(figsize=(4, 4))
        limit = float(heat.abs().max())
        figure.colorbar(place.imshow(np.ma.array(heat, mask=~self.inked), cmap="RdBu_r", vmin=-limit, vmax=limit))
        place.set_title(f"Feature {k}")
        figure.savefig(folder / f"plain_{k}_pattern.png")
        plt.close(figure)
        np.save(folder / f"plain_{k}_pattern.npy", heat)


def compared(what: str, ours_ms: float, plain_ms: float, difference: float | None) -> Row:
    columns = {"ours, ms": ours_ms, "reference, ms": plain_ms, "ratio": plain_ms / ours_ms, "difference": difference}
    return Row(what, columns)


def largest_difference(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Infinite where shapes differ or something is not a number."""
    worst = 0.0
    for a, b in zip(ours, plain, strict=True):
        if a.shape != b.shape:
            return math.inf
        worst = max(worst, float((a.cpu() - b).abs().nan_to_num(math.inf).max()) if len(b) else 0.0)
    return worst


def side_by_side(
    what: str, ours: Callable, of_feature: Callable | None, plain: Callable, features: Sequence[int], e: Explained
) -> Row:
    """`ours()` explains all, `of_feature` (result, k) picks one to compare with `plain` (k); they take turns."""
    ours_ms, plain_ms, device, rounds = [], [], e.pre.mu.device, min(3, len(features))
    worst = 0.0 if of_feature else None
    for some in (features[first::rounds] for first in range(rounds)):
        seconds, everything = clocked(ours, device)
        ours_ms.append(1000 * seconds / e.settings.sae_latents)
        seconds, results = clocked(lambda some=some: [plain(k) for k in some], device)
        plain_ms.append(1000 * seconds / len(some))
        if of_feature:
            pairs = zip((of_feature(everything, k) for k in some), results, strict=True)
            worst = max(worst, *(largest_difference(*pair) for pair in pairs))
    return compared(what, statistics.median(ours_ms), statistics.median(plain_ms), worst)


def against_reference(e: Explained, how_many: int) -> tuple[list[Row], float]:
    """The rows, and the largest difference."""
    by_rate = driver.analysed_features(e.analysis.bank, 0)  # from the busiest to the rarest: some of all are compared
    features = [by_rate[i] for i in torch.linspace(0, len(by_rate) - 1, how_many).long().tolist()]
    plain, given, settings = Plain(e), e.given(e.sae), e.settings

    def of_bank(bank: fa.FeatureBank, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return bank.top.of(k).index, bank.top.of(k).activation, bank.label_histogram[k]

    def of_effects(effects: fa.LogitEffects, k: int) -> tuple[Tensor]:
        return (effects.mean_delta[k],)

    bank = partial(fa.collect_feature_bank, *given, settings.topk)
    patterns = partial(fa.feature_input_patterns, e.model, *given[2:])
    logit = partial(fa.feature_logit_effects, *given, settings.alpha, settings.n_eval)
    ablation = partial(fa.feature_ablation_effects, *given, settings.n_eval)
    with tempfile.TemporaryDirectory() as name:
        shown = (name, by_rate, e.analysis.bank, plain.images, e.analysis.heats, plain.inked)
        draw_ours = partial(fa.write_feature_pictures, *shown)
        draw_plain = partial(plain.pictures, folder=Path(name))
        rows = [
            side_by_side("bank", bank, of_bank, plain.bank, features, e),
            side_by_side("patterns", patterns, lambda heats, k: (heats[k],), plain.pattern, features, e),
            side_by_side("logit effects", logit, of_effects, plain.logit_effect, features, e),
            side_by_side("ablation effects", ablation, of_effects, plain.ablation_effect, features, e),
            side_by_side("pictures", draw_ours, None, draw_plain, features, e),
        ]
    worst = max(row.columns["difference"] for row in rows[:-1])
    sums = [sum(row.columns[version] for row in rows) for version in ("ours, ms", "reference, ms")]
    return [*rows, compared("sum", *sums, worst)], worst


# ---------------------------------------------------------------------------------------------------------------------
# Scaling
# ---------------------------------------------------------------------------------------------------------------------


def untrained_sae(z: Tensor, d_sae: int, seed: int) -> driver.JumpReLUSAE:
    """Random unit rows, the encoder their transpose, and the one threshold that leaves TARGET active per row of z."""
    sae = driver.JumpReLUSAE(z.shape[1], d_sae).to(z.device).requires_grad_(False)
    rows = torch.randn(d_sae, z.shape[1], generator=torch.Generator().manual_seed(seed))
    sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    return driver.adjust_thresholds(sae, z, TARGET)[0]


def train_briefly(e: Explained, z: Tensor, d_sae: int, epochs: int) -> None:
    settings = replace(e.settings, sae_latents=d_sae, epochs_sae_final=epochs)
    with mock.patch.object(driver, "FULL_TRAIN_IMAGES", len(z)):  # epochs are counted on that many images
        driver.train_sae(z, driver.standardised_head(e.model, e.pre), TARGET, settings)


class Job(NamedTuple):
    """What a row of the scaling table times."""

    grows: str  # latents or images
    what: str
    latents: int
    images: int | None


def scaling(e: Explained, device: torch.device) -> list[Row]:
    z_train, z_val = ((raw - e.pre.mu) / e.pre.std for raw in (e.pre.train, e.pre.val))
    n_val, batch = len(z_val), e.settings.batch_sae
    z_some = z_train[: 16 * batch]
    jobs: dict[Job, Callable] = {}
    active: dict[tuple[int, int | None], float] = {}  # per image, by latents and images

    def add(grows: str, d_sae: int, images: int, n_eval: int) -> tuple:
        sae = untrained_sae(z_val, d_sae, e.settings.seed)
        given = e.given(sae, images)

        def effects() -> None:
            fa.feature_logit_effects(*given, n_eval=n_eval)
            fa.feature_ablation_effects(*given, n_eval=n_eval)

        active[d_sae, images] = driver.mean_actives(sae, z_val[:images])
        jobs[Job(grows, "bank", d_sae, images)] = partial(fa.collect_feature_bank, *given)
        jobs[Job(grows, "both effects", d_sae, images)] = effects
        return given

    for d_sae in LATENTS:
        _, _, *coder = add("latents", d_sae, n_val, e.settings.n_eval)
        jobs[Job("latents", "patterns", d_sae, None)] = partial(fa.feature_input_patterns, e.model, *coder)
        for epochs in (1, 7):
            jobs[Job("latents", f"{epochs} epochs", d_sae, batch)] = partial(train_briefly, e, z_some, d_sae, epochs)
    for images in (n_val // 4, n_val // 2, n_val):
        add("images", LATENTS[0], images, images)

    rounds = [{job: clocked(work, device)[0] for job, work in jobs.items()} for _ in range(3)]
    best = {job: min(seconds[job] for seconds in rounds) for job in jobs}
    more_steps = driver.n_steps(len(z_some), batch, 7) - driver.n_steps(len(z_some), batch, 1)
    for d_sae in LATENTS:  # what precedes the first step takes as long for one epoch as for seven
        long, short = (best.pop(Job("latents", f"{epochs} epochs", d_sae, batch)) for epochs in (7, 1))
        best[Job("latents", "SAE step", d_sae, batch)] = (long - short) / more_steps

    rows: list[Row] = []
    first: dict[tuple[str, str], float] = {}  # seconds per unit of what grows, in the first row of each kind
    for job in sorted(best, key=lambda job: (job.grows == "images", job.what)):  # stable: sizes keep their order
        size, seconds = getattr(job, job.grows), best[job]
        linear = first.setdefault(job[:2], seconds / size) * size
        columns = {"grows": job.grows, "latents": job.latents, "images": job.images}
        columns |= {"active": active.get(job[2:]), "seconds": seconds, "us/latent": 1e6 * seconds / job.latents}
        columns |= {"us/image": job.images and 1e6 * seconds / job.images, "to linear": seconds / linear}
        rows.append(Row(job.what, columns))
    return rows


def peak_memory(device: torch.device) -> list[Row]:
    peak = mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) if resource else None
    rows = [Row("this process", {"MiB": peak})]
    if device.type == "cuda":
        rows.append(Row("its tensors on the GPU", {"MiB": torch.cuda.max_memory_allocated(device) / 2**20}))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = driver.OneLineParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", default=driver.DATA, help="folder that holds MNIST/raw, or 'sample'")
    parser.add_argument("--json", default="benchmark.json", help="where the tables are written as JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each stage")
    parser.add_argument("--reference-features", type=int, default=8, help="features explained by the plain reference")
    given = parser.parse_args(argv)
    if given.repeats < 1 or not 1 <= given.reference_features <= driver.SAE_LATENTS:
        parser.error(f"--repeats must be at least 1, --reference-features between 1 and {driver.SAE_LATENTS}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    device = driver.pick_device(given.device)
    settings = driver.Settings(target_actives=(TARGET,), data=given.data, device=given.device, seed=given.seed)
    tables: dict[str, list[Row]] = {}

    def report(section: str, rows: list[Row]) -> None:
        tables[section] = rows
        show(section, rows)

    rows, rate = machine(device)
    report("machine", rows)
    rows, explained = stages(settings, device, rate, given.repeats)
    report("stages", rows)
    report("statements", statements(explained, device))
    report("command", command(settings))
    rows, worst = against_reference(explained, given.reference_features)
    report("reference", rows)
    report("scaling", scaling(explained, device))
    report("peak memory", peak_memory(device))

    record = {section: [{"what": row.what, **row.columns} for row in rows] for section, rows in tables.items()}
    fine = worst <= TOLERANCE
    record |= {"arguments": vars(given), "data": explained.data.source, "agrees_with_reference": fine}
    Path(given.json).write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{given.json} holds these tables. Largest difference from the reference: {worst:.2g}", end=", ")
    print("fine" if fine else f"more than the {TOLERANCE:g} allowed")
    return 0 if fine else 1


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # both as MNIST_SAE_code.py does
    torch.use_deterministic_algorithms(True)
    try:
        sys.exit(main())
    except (driver.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
