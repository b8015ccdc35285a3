"""How long everything takes, how much of that is arithmetic, and how it grows.

    python tests/benchmark.py --data DIR             # DIR holds MNIST/raw; a few minutes on two cores
    python tests/benchmark.py --data sample          # the bundled 5,000 digits
    python tests/benchmark.py --repeats 3            # median of three trainings instead of one

Prints five tables and writes them as JSON (--json, default benchmark.json here). Exit status: 0; 1 when feature_analysis
and the plain reference of the fourth table disagree; 2 when an argument or the data cannot be used.

Machine    `product rate` is that of a large float32 matrix product on the device, best of several: the rate that the next
           table compares with.
Stages     What MNIST_SAE_code.py does, with its default settings. `seconds`: median over `runs`; whatever takes less than
           a second is run three times. `GFLOP`: operations in matrix products, counted from their shapes by the
           functions below, 2 m k n each; a dash where there are none. `GFLOP/s`: the two divided. `of product rate`:
           what share of the machine's rate that is. The rest of the time goes into everything that is no matrix
           product: memory traffic, sorting, the optimizer, Python.
Command    `python MNIST_SAE_code.py` in a process of its own and a fresh folder: `wall seconds` from outside, peak memory
           of that process (a dash on Windows), and, from its summary.json, the results and the seconds it reports.
Reference  Feature by feature, as a plain research script does it: for each one a pass over the images, autograd, loops
           over batches, a new matplotlib figure. `ours` is all features at once, divided by their number; both in
           milliseconds per feature, the median of rounds that alternate between the two. `ratio`: reference / ours.
           `difference`: the largest between the two results, and at most 1e-4 is allowed.
Scaling    Untrained SAEs that all have about 20 active features per image. `to linear`: seconds over what the first row
           of its kind predicts when the cost is proportional to what grows; at most 1 is no worse than linear.
           `us/latent`, `us/image`: microseconds. Effects are averaged over 2,000 images where the latents grow, over
           all of them where the images grow. `SAE step`: what 96 more steps add to a training, per step.

Dimension key: B images in a batch, C classes, d_in hidden units of the classifier, d_sae latents.
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
    import resource  # not on Windows
except ImportError:
    resource = None

TARGET = 20  # mean active features per image, in every section
TOLERANCE = 1e-4  # by how much feature_analysis and the reference may differ
LATENTS = (512, 2048, 8192)
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product gives the machine's rate


class Row(NamedTuple):
    """One line of a table: what it is about, and its columns by title; None is shown as a dash."""

    what: str
    columns: dict[str, str | int | float | None]


def text_of(value: str | int | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value if isinstance(value, str) else f"{value:,}"


def show(title: str, rows: Sequence[Row]) -> None:
    head = (title, *rows[0].columns)
    lines = [(row.what, *(text_of(value) for value in row.columns.values())) for row in rows]
    print("\n" + driver.table([head, *lines]), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def once(work: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds until the device has finished `work`, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - started, result


class Timing(NamedTuple):
    seconds: float  # median over runs
    runs: int
    result: object  # of the last run


def timed(work: Callable, device: torch.device, repeats: int = 1) -> Timing:
    """`repeats` runs, but at least three when the first takes less than a second."""
    first, result = once(work, device)
    seconds = [first]
    while len(seconds) < (repeats if first >= 1 else max(repeats, 3)):
        again, result = once(work, device)
        seconds.append(again)
    return Timing(statistics.median(seconds), len(seconds), result)


def mebibytes(ru_maxrss: int | None) -> float | None:
    """What getrusage counts in kilobytes on Linux and in bytes on macOS."""
    if ru_maxrss is None:
        return None
    return ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def product_rate(device: torch.device, runs: int = 8) -> float:
    """GFLOP/s of a large float32 matrix product, best of `runs`."""
    side = PRODUCT_SIDE[device.type]
    a = torch.rand(side, side, device=device)
    return max(product(side, side, side) / once(lambda: a @ a, device)[0] for _ in range(runs)) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Operations of each stage, counted from shapes. A gradient costs one product of the forward size for each of the two
# factors that needs it. Left out: everything elementwise, and products with fewer rows than ten images.
# ---------------------------------------------------------------------------------------------------------------------


def product(m: int, k: int, n: int) -> int:
    """(m, k) @ (k, n): a multiplication and an addition each."""
    return 2 * m * k * n


class Shapes(NamedTuple):
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


def classifier_flops(s: Shapes, settings: driver.Settings) -> int:
    """Forward, gradients of both weights, and of the hidden units; images need none."""
    epochs = driver.scaled_epochs(settings.epochs_ffn, s.train)
    rows = driver.n_steps(s.train, settings.batch_ffn, epochs) * settings.batch_ffn
    return 2 * s.hidden(rows) + 3 * s.head(rows)


def sae_flops(s: Shapes, settings: driver.Settings) -> int:
    """Encoder and decoder forward, encoder's weight gradient, decoder's two; the auxiliary and the logits' loss."""
    epochs, batch = driver.scaled_epochs(settings.epochs_sae_final, s.train), settings.batch_sae
    steps = driver.n_steps(s.train, batch, epochs)
    head_rows = batch * sum((step + 0.5) / steps > driver.HEAD_FROM for step in range(steps))
    rare_rows = steps * (batch // driver.RARE_BATCH_SHARE)
    prepare = 2 * product(s.train, s.d_in, s.d_in) + s.head(s.train) + 3 * s.code(16 * batch)
    through_head = 2 * (product(head_rows, s.d_in, s.d_in) + s.head(head_rows))  # its weights need no gradient
    fold, calibrate = 2 * s.code(s.d_in), s.code(s.val)
    return prepare + 5 * s.code(steps * batch) + 3 * s.code(rare_rows) + through_head + fold + calibrate


def fidelity_flops(s: Shapes) -> int:
    """Density on train, L0 twice on val and once on test; four reconstructions and five comparisons of logits."""
    return s.code(s.train) + 2 * s.code(s.val) + s.code(s.test) + 4 * 2 * s.code(s.test) + 5 * 2 * s.head(s.test)


def bank_flops(s: Shapes) -> int:
    """Encode, and the label histogram as a product with the one-hot labels."""
    return s.hidden(s.val) + s.code(s.val) + product(s.d_sae, s.val, s.classes)


def pattern_flops(s: Shapes) -> int:
    """One gradient for each hidden unit, on one image, and their combination for each latent."""
    return s.d_in * (product(1, s.d_in, s.d_in) + s.hidden(1)) + product(s.d_sae, s.d_in, s.pixels)


def logit_flops(s: Shapes, n_eval: int) -> int:
    """The head on every image for every latent."""
    n = min(n_eval, s.val)
    return s.hidden(n) + s.head(n) + s.head(n * s.d_sae)


def ablation_flops(s: Shapes, pairs: int) -> int:
    """Encode, and the head once for each of the active (feature, image) pairs."""
    return s.hidden(s.val) + s.code(s.val) + s.head(s.val) + s.head(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Machine, stages, command
# ---------------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> tuple[list[Row], float]:
    """The rows, and the rate of a large matrix product in GFLOP/s."""
    rate = product_rate(device)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "CPUs": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        **driver.versions(),
        f"product rate at {PRODUCT_SIDE[device.type]}^3, GFLOP/s": rate,
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
        """What the functions of feature_analysis take: model, loader of the first validation images, SAE, mu, std."""
        split = driver.Split(*(tensor[:images] for tensor in self.data.val))
        return self.model, driver.TensorLoader(split), sae, self.pre.mu, self.pre.std


def stages(settings: driver.Settings, device: torch.device, rate: float, repeats: int) -> tuple[list[Row], Explained]:
    """`rate` is the machine's, in GFLOP/s."""
    rows: list[Row] = []

    def stage(name: str, flops: int | None, work: Callable, *given):
        seconds, runs, result = timed(partial(work, *given), device, repeats)
        gflop = None if flops is None else flops / 1e9
        speed = None if flops is None else gflop / seconds
        share = None if flops is None else f"{speed / rate:.1%}"
        columns = {"seconds": seconds, "GFLOP": gflop, "GFLOP/s": speed, "of product rate": share, "runs": runs}
        rows.append(Row(name, columns))
        return result

    data = stage("data", None, driver.load_mnist, settings.data, settings.seed, device)
    s = Shapes(*(len(split.labels) for split in data[:3]), 28 * 28, settings.hidden_units, settings.sae_latents, 10)
    model = stage("classifier", classifier_flops(s, settings), driver.train_classifier, data.train, settings)
    everything = s.hidden(s.train + s.val + s.test)
    pre = stage("preactivations", everything, driver.collect_preactivations, model, data, settings.normalize_z)
    head = driver.standardised_head(model, pre)

    def train() -> tuple[driver.JumpReLUSAE, driver.JumpReLUSAE]:
        z_train, z_val = ((raw - pre.mu) / pre.std for raw in (pre.train, pre.val))
        before, _ = driver.train_sae(z_train, head, TARGET, settings)
        return before, driver.adjust_thresholds(before, z_val, TARGET)[0]

    before, sae = stage("SAE and calibration", sae_flops(s, settings), train)
    stage("fidelity", fidelity_flops(s), driver.measure, before, sae, pre, data, head)

    given, n_eval = (model, driver.TensorLoader(data.val), sae, pre.mu, pre.std), settings.n_eval
    bank = stage("bank", bank_flops(s), fa.collect_feature_bank, *given, settings.topk)
    heats = stage("patterns", pattern_flops(s), fa.feature_input_patterns, model, *given[2:])
    logit = stage("logit effects", logit_flops(s, n_eval), fa.feature_logit_effects, *given, settings.alpha, n_eval)
    pairs = int(bank.n_active.clamp(max=n_eval).sum())
    ablation = stage("ablation effects", ablation_flops(s, pairs), fa.feature_ablation_effects, *given, n_eval)
    nearest = stage("nearest features", s.code(s.d_sae), fa.nearest_features, sae.W_dec)

    logit, ablation = (fa.LogitEffects(*(tensor.cpu() for tensor in effects)) for effects in (logit, ablation))
    inked = (data.train.images > 0).float().mean(0)[0] >= driver.INKED_SHARE
    analysis = driver.Analysis(bank, heats.cpu(), logit, ablation, nearest, inked.cpu().numpy())
    features = driver.analysed_features(bank, 0)
    telling = driver.telling_features(analysis, features)
    with tempfile.TemporaryDirectory() as folder:
        stage("pictures", None, driver.write_pictures, Path(folder), analysis, features, telling, data)
    total = sum(row.columns["seconds"] for row in rows)
    rows.append(Row("sum", {**dict.fromkeys(rows[0].columns), "seconds": total}))
    return rows, Explained(settings, data, model, pre, sae, analysis)


# A process is charged the memory of the one that starts it (Linux), so a small one stands between.
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
# The reference: one feature at a time, nothing shared, nothing clever
# ---------------------------------------------------------------------------------------------------------------------


class PlainBank(NamedTuple):
    """Of one feature, all on the CPU."""

    activations: Tensor  # (N,)
    top: Tensor  # (at most topk,) indices of the strongest active images
    label_histogram: Tensor  # (C,)


class Plain:
    """Explains one feature after the other."""

    def __init__(self, e: Explained):
        self.model, self.loader, self.sae, self.mu, self.std = e.given(e.sae)
        self.settings, self.images, self.inked = e.settings, e.data.val.images, e.analysis.inked

    def batches(self, k: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Standardised preactivations (B, d_in), activations of feature k (B,) and labels (B,)."""
        for images, labels in self.loader:
            z = (self.model.preactivations(images) - self.mu) / self.std
            yield z, self.sae.encode(z)[:, k], labels

    def logits(self, z: Tensor) -> Tensor:
        return self.model.logits_from_preactivations(z * self.std + self.mu)

    def bank(self, k: int) -> PlainBank:
        _, activations, labels = (torch.cat(parts) for parts in zip(*self.batches(k), strict=True))
        order = torch.sort(activations, descending=True, stable=True).indices[: self.settings.topk]
        histogram = torch.bincount(labels[activations > 0], minlength=10)
        return PlainBank(activations.cpu(), order[activations[order] > 0].cpu(), histogram.cpu())

    def pattern(self, k: int) -> Tensor:
        image = self.images[:1].clone().requires_grad_(True)
        z = (self.model.preactivations(image) - self.mu) / self.std
        self.sae.pre_threshold(z)[0, k].backward()
        return image.grad[0, 0].cpu()

    def logit_effect(self, k: int) -> Tensor:
        deltas, left = [], self.settings.n_eval
        for z, _, _ in self.batches(k):
            moved = z[:left] + self.settings.alpha * self.sae.W_dec[k]
            deltas.append(self.logits(moved) - self.logits(z[:left]))
            left -= len(moved)
            if left == 0:
                break
        return torch.cat(deltas).mean(0).cpu()

    def ablation_effect(self, k: int) -> Tensor:
        deltas, left = [], self.settings.n_eval
        for z, activations, _ in self.batches(k):
            fires = torch.nonzero(activations > 0)[:left, 0]
            removed = activations[fires, None] * self.sae.W_dec[k]
            deltas.append(self.logits(z[fires] - removed) - self.logits(z[fires]))
            left -= len(fires)
        return torch.cat(deltas).sum(0).cpu() / max(1, self.settings.n_eval - left)

    def pictures(self, k: int, bank: PlainBank, heat: Tensor, folder: Path) -> None:
        """What our two pictures show: 20 strongest images, 5 from each quarter of the active range, the pattern."""
        falling = torch.argsort(bank.activations, descending=True)[: int((bank.activations > 0).sum())]
        bands = [band[torch.linspace(0, len(band) - 1, min(5, len(band))).long()] for band in falling.tensor_split(4)]
        figure, axes = plt.subplots(4, 10, figsize=(10, 5))
        for place in axes.flat:
            place.axis("off")
        for place, i in zip(axes.flat, torch.cat([falling[:20], *bands]).tolist(), strict=False):
            place.imshow(self.images[i, 0].cpu(), cmap="gray_r")
            place.set_title(f"{bank.activations[i]:.2g}", fontsize=7)
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


def largest(ours: Tensor, plain: Tensor) -> float:
    """Largest absolute difference; infinite for another number of entries or for NaN."""
    if ours.shape != plain.shape:
        return math.inf
    difference = float((ours.cpu() - plain).abs().max()) if plain.numel() else 0.0
    return math.inf if math.isnan(difference) else difference


def bank_difference(bank: fa.FeatureBank, k: int, plain: PlainBank) -> float:
    """Of the strongest activations; of those of our images, whose order may differ by rounding; of the counts."""
    top = bank.top.of(k)
    strongest = largest(top.activation, plain.activations[plain.top])
    of_our_images = largest(top.activation, plain.activations[top.index])
    return max(strongest, of_our_images, largest(bank.label_histogram[k], plain.label_histogram))


def pattern_difference(heats: Tensor, k: int, plain: Tensor) -> float:
    return largest(heats[k], plain)


def effect_difference(effects: fa.LogitEffects, k: int, plain: Tensor) -> float:
    return largest(effects.mean_delta[k], plain)


class Part(NamedTuple):
    """A part of the explanation in both versions."""

    name: str
    ours: Callable[[], object]  # all features at once
    plain: Callable[[int], object]  # feature k
    difference: Callable[[object, int, object], float] | None  # of our result, for feature k, from the plain one


def against_reference(e: Explained, how_many: int, device: torch.device) -> tuple[list[Row], float]:
    """The rows, and the largest difference."""
    by_rate = driver.analysed_features(e.analysis.bank, 0)  # the busiest first; some of all kinds are compared
    features = [by_rate[i] for i in torch.linspace(0, len(by_rate) - 1, how_many).long().tolist()]
    plain, given, n_eval = Plain(e), e.given(e.sae), e.settings.n_eval
    results: dict[str, dict] = {}  # part: feature: the plain result

    with tempfile.TemporaryDirectory() as folder:
        pictures = (folder, by_rate, e.analysis.bank, plain.images, e.analysis.heats, plain.inked)
        ours = (
            partial(fa.collect_feature_bank, *given, e.settings.topk),
            partial(fa.feature_input_patterns, e.model, *given[2:]),
            partial(fa.feature_logit_effects, *given, e.settings.alpha, n_eval),
            partial(fa.feature_ablation_effects, *given, n_eval),
            partial(fa.write_feature_pictures, *pictures),
        )

        def draw(k: int) -> None:
            plain.pictures(k, results["bank"][k], results["patterns"][k], Path(folder))

        parts = (
            Part("bank", ours[0], plain.bank, bank_difference),
            Part("patterns", ours[1], plain.pattern, pattern_difference),
            Part("logit effects", ours[2], plain.logit_effect, effect_difference),
            Part("ablation effects", ours[3], plain.ablation_effect, effect_difference),
            Part("pictures", ours[4], draw, None),
        )
        rows = []
        for part in parts:
            row, results[part.name] = side_by_side(part, features, len(by_rate), device)
            rows.append(row)
    worst = max(row.columns["difference"] for row in rows if row.columns["difference"] is not None)
    sums = [sum(row.columns[version] for row in rows) for version in ("ours, ms", "reference, ms")]
    rows.append(compared("sum", *sums, worst))
    return rows, worst


def compared(what: str, ours_ms: float, plain_ms: float, difference: float | None) -> Row:
    columns = {"ours, ms": ours_ms, "reference, ms": plain_ms, "ratio": plain_ms / ours_ms, "difference": difference}
    return Row(what, columns)


def side_by_side(part: Part, features: Sequence[int], d_sae: int, device: torch.device) -> tuple[Row, dict]:
    """Both versions in turn, so that a busy machine slows both; the row, and the plain results by feature."""
    ours_ms, plain_ms, results = [], [], {}
    rounds = min(3, len(features))
    for some in (features[first::rounds] for first in range(rounds)):
        seconds, ours = once(part.ours, device)
        ours_ms.append(1000 * seconds / d_sae)
        started = time.perf_counter()
        results |= {k: part.plain(k) for k in some}  # every result arrives on the CPU, so there is nothing to wait for
        plain_ms.append(1000 * (time.perf_counter() - started) / len(some))
    difference = max(part.difference(ours, k, results[k]) for k in features) if part.difference else None
    return compared(part.name, statistics.median(ours_ms), statistics.median(plain_ms), difference), results


# ---------------------------------------------------------------------------------------------------------------------
# Scaling
# ---------------------------------------------------------------------------------------------------------------------


def untrained_sae(z: Tensor, d_sae: int, seed: int) -> driver.JumpReLUSAE:
    """Every latent active on TARGET / d_sae of z (N, d_in)."""
    generator = torch.Generator(z.device).manual_seed(seed)
    return driver.initial_sae(z, d_sae, TARGET, generator).requires_grad_(False)


def step_seconds(e: Explained, z: Tensor, d_sae: int, device: torch.device) -> float:
    """Of one training step: what separates a training of seven epochs from one of one epoch, on the same z (N, d_in)."""
    head, epochs = driver.standardised_head(e.model, e.pre), (1, 7)
    settings = [replace(e.settings, sae_latents=d_sae, epochs_sae_final=n) for n in epochs]
    with mock.patch.object(driver, "FULL_TRAIN_IMAGES", len(z)):  # epochs are counted on that many images
        short, long = (timed(partial(driver.train_sae, z, head, TARGET, some), device).seconds for some in settings)
    short_steps, long_steps = (driver.n_steps(len(z), e.settings.batch_sae, n) for n in epochs)
    return (long - short) / (long_steps - short_steps)


def scaling(e: Explained, device: torch.device) -> list[Row]:
    n_val, z = len(e.data.val.labels), ((e.pre.train - e.pre.mu) / e.pre.std)[: 16 * e.settings.batch_sae]
    rows: list[Row] = []
    first: dict[str, float] = {}  # seconds per unit of what grows, of the first row of its kind

    def add(what: str, grows: str, latents: int, images: int | None, seconds: float, l0: float | None = None) -> None:
        units = {"latents": latents, "images": images}[grows]
        linear = first.setdefault(f"{what} by {grows}", seconds / units) * units
        columns = {"grows": grows, "latents": latents, "images": images, "active": l0, "seconds": seconds}
        columns |= {"us/latent": 1e6 * seconds / latents, "us/image": images and 1e6 * seconds / images}
        rows.append(Row(what, {**columns, "to linear": seconds / linear}))

    def measure(grows: str, sae: driver.JumpReLUSAE, images: int, n_eval: int) -> None:
        given, d_sae = e.given(sae, images), len(sae.threshold)
        l0 = driver.mean_actives(sae, ((e.pre.val - e.pre.mu) / e.pre.std)[:images])
        add("bank", grows, d_sae, images, timed(partial(fa.collect_feature_bank, *given), device).seconds, l0)
        if grows == "latents":
            patterns = timed(partial(fa.feature_input_patterns, e.model, *given[2:]), device)
            add("patterns", grows, d_sae, None, patterns.seconds)

        def effects() -> None:
            fa.feature_logit_effects(*given, n_eval=n_eval)
            fa.feature_ablation_effects(*given, n_eval=n_eval)

        add("both effects", grows, d_sae, images, timed(effects, device).seconds, l0)

    for d_sae in LATENTS:
        measure("latents", untrained_sae(z, d_sae, e.settings.seed), n_val, e.settings.n_eval)
        add("SAE step", "latents", d_sae, e.settings.batch_sae, step_seconds(e, z, d_sae, device))
    for images in (n_val // 4, n_val // 2, n_val):
        measure("images", untrained_sae(z, LATENTS[0], e.settings.seed), images, images)
    return sorted(rows, key=lambda row: (row.columns["grows"] == "images", row.what))  # stable: sizes stay ascending


def peak_memory(device: torch.device) -> list[Row]:
    rss = mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) if resource else None
    rows = [Row("this process", {"MiB": rss})]
    if device.type == "cuda":
        rows.append(Row("its part of the GPU", {"MiB": torch.cuda.max_memory_allocated(device) / 2**20}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = driver.OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=driver.DATA, help="folder that holds MNIST/raw, or 'sample'")
    parser.add_argument("--json", default="benchmark.json", help="where the tables are written as JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each stage, of which the median is shown")
    parser.add_argument("--reference-features", type=int, default=8, help="features the plain reference explains")
    given = parser.parse_args(argv)
    if given.repeats < 1 or not 1 <= given.reference_features <= driver.SAE_LATENTS:
        parser.error(f"--repeats must be at least 1, --reference-features between 1 and {driver.SAE_LATENTS}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    device = driver.pick_device(given.device)
    settings = driver.Settings(target_actives=(TARGET,), data=given.data, device=given.device, seed=given.seed)
    tables: dict[str, list[Row]] = {}

    def report(title: str, rows: list[Row]) -> None:
        tables[title] = rows
        show(title, rows)

    facts, rate = machine(device)
    report("machine", facts)
    rows, explained = stages(settings, device, rate, given.repeats)
    report("stages", rows)
    report("command", command(settings))
    rows, worst = against_reference(explained, given.reference_features, device)
    report("reference", rows)
    report("scaling", scaling(explained, device))
    report("peak memory", peak_memory(device))

    record = {title: [{"what": row.what, **row.columns} for row in rows] for title, rows in tables.items()}
    Path(given.json).write_bytes(driver.to_json({"arguments": vars(given), "data": explained.data.source, **record}))
    print(f"\nlargest difference from the reference {worst:.2g}, allowed {TOLERANCE:g}; tables in {given.json}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as MNIST_SAE_code.py runs
    torch.use_deterministic_algorithms(True)
    try:
        sys.exit(main())
    except driver.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
