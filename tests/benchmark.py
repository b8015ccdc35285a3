"""How long everything takes, how much of that is arithmetic, and how it grows.

    python tests/benchmark.py --data DIR     # DIR holds MNIST/raw; some three minutes on two cores
    python tests/benchmark.py --data sample  # the bundled 5,000 digits
    python tests/benchmark.py --repeats 3    # median of three trainings instead of one

Prints a table per section and writes them all as JSON. Exit status: 1 when feature_analysis and
the plain reference disagree, 2 when an argument or the data cannot be used or the command fails,
otherwise 0. Like the driver, everything runs in one thread unless its section says otherwise.

machine     `product rate` is that of a large float32 matrix product, best of several, with one
            core and with all of them.
stages      What MNIST_SAE_code.py does, with its default settings. `seconds`: median over `runs`,
            three of them for what takes less than a second. `GFLOP`: the operations in matrix
            products, counted from their shapes by the methods of Shapes; a dash where there are
            none. `GFLOP/s`: the second by the first. `of one core`: its share of the machine's
            rate; the rest of the time is memory traffic, sorting, the optimizer and Python.
SAE step    What a step of the SAE's training is spent on, averaged over a training: each part
            alone, on one batch, times how often it runs (`per step`). `whole step` is measured on
            steps as training makes them, `unaccounted` what the parts do not sum to: Python, and
            data that is no longer in the cache. What was tried instead, at the default size:
            - gradients by autograd: a step takes 1.1 times as long;
            - a jump that compares into booleans: the jump takes four times as long;
            - all latents in the rare part, not the quarter that fires least: three times as long;
            - torch.optim: its first optimizer imports PyTorch's compiler, which takes a second;
            - sparse products: 4% of the activations are not zero, and a product takes a quarter of
              its time, but finding the non-zero ones costs what that saves.
threads     That step with one thread and with all cores, each of its kind at the best of three
            rounds. `driver takes`: what the driver chooses at this size.
statements  A claim for every feature: proposed from the validation images, frozen, tested on half
            of the test images, judged; the same tests on the other half, set aside; the same path
            for each other kind of features. `ms/feature`: of as many features as it has.
page        Writing feature_report.html, and how large it is.
command     `python MNIST_SAE_code.py` in a process of its own and a fresh folder: seconds from
            outside, peak memory of the largest of its processes (a dash on Windows); results and
            seconds by stage as its summary.json reports them.
busy        The seconds of that command, and of the same beside a process that keeps one core busy.
            `to idle`: the second by the first.
reference   Feature by feature as a plain script does it: a pass over the images for each, autograd,
            loops over batches, a new matplotlib figure with one subplot per image. `ours`: all
            features at once, divided by their number. Both in milliseconds per feature, medians of
            rounds that alternate between the two. `ratio`: reference by ours. `difference`: the
            largest between their results; 1e-4 is allowed.
scaling     Untrained SAEs with 20 active features per image, whatever their size. `seconds`: the
            best of three rounds over all rows, so that a busy spell spoils none of them.
            `us/latent`, `us/image`: microseconds. `to linear`: seconds by what the first row of
            its kind predicts if cost is proportional to what grows; up to 1 is no worse than
            linear. Effects are averaged over 2,000 images while latents grow and over all while
            images grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import feature_analysis as fa  # noqa: E402
import feature_confirmation as fc  # noqa: E402
import feature_hypotheses as fh  # noqa: E402
import MNIST_SAE_code as driver  # noqa: E402
from mnist_data import Data, DataError, Split, TensorLoader, load_images  # noqa: E402

try:
    import resource
except ImportError:  # Windows
    resource = None

SCRIPT = ROOT / "MNIST_SAE_code.py"
TARGET = 20  # mean active features per image, everywhere
TOLERANCE = 1e-4  # by how much feature_analysis and the reference may differ
LATENTS = (512, 2048, 8192)
ROUNDS = 3  # where the best of several is taken
PRODUCT_SIDE = {"cpu": 768, "cuda": 8192}  # of the matrices whose product gives the machine's rate
STEPS = 40  # of the trainings whose steps are timed


# --------------------------------------------------------------------------------------------------
# Tables and clocks
# --------------------------------------------------------------------------------------------------

Cell = str | int | float | None


class Row(NamedTuple):
    """One line of a table: what it is about, and its columns by title; None is shown as a dash."""

    what: str
    columns: dict[str, Cell]


def cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show(title: str, rows: Sequence[Row]) -> None:
    lines = [[title, *rows[0].columns]]
    for row in rows:
        cells = [cell(value) for value in row.columns.values()]
        lines.append([row.what, *cells])
    print("\n" + fc.text_table(lines), flush=True)


def total(rows: Sequence[Row], column: str) -> float:
    return sum(row.columns[column] for row in rows)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clocked(work: Callable, device: torch.device) -> tuple[float, object]:
    """Seconds until the device has finished `work`, and its result."""
    wait_for(device)
    started = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - started, result


def timed(work: Callable, device: torch.device, repeats: int = 1) -> tuple[list[float], object]:
    """Seconds of each of `repeats` runs, of at least three when the first takes less than one
    second; last result."""
    first, result = clocked(work, device)
    seconds = [first]
    if first < 1:
        repeats = max(repeats, 3)
    while len(seconds) < repeats:
        again, result = clocked(work, device)
        seconds.append(again)
    return seconds, result


def shortest(work: Callable, device: torch.device, calls: int = 20, rounds: int = 9) -> float:
    """Seconds of one call of something short: the best mean over `calls`."""

    def several() -> None:
        for _ in range(calls):
            work()

    return min(clocked(several, device)[0] for _ in range(rounds)) / calls


def mebibytes(ru_maxrss: int | None) -> float | None:
    """getrusage counts in kilobytes on Linux, in bytes on macOS."""
    if ru_maxrss is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return ru_maxrss / unit


# --------------------------------------------------------------------------------------------------
# Operations of each stage
# --------------------------------------------------------------------------------------------------


def product(m: int, k: int, n: int) -> int:
    """(m, k) @ (k, n): a multiplication and an addition each."""
    return 2 * m * k * n


class Shapes(NamedTuple):
    """What is multiplied; its methods count the operations in matrix products.

    Going back through a product costs as much as going forward for each of its factors that needs a
    gradient. Left out: everything elementwise, single rows, and whatever looks at a handful of
    images only to check them.
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

    def turned(self, rows: int) -> int:
        """preactivations -> preactivations, in other coordinates"""
        return product(rows, self.d_in, self.d_in)

    def classifier(self, settings: driver.Settings) -> int:
        """Forward, the gradients of both weights, and of the hidden units; images need none."""
        batch = min(settings.batch_ffn, self.train)
        epochs = driver.scaled_epochs(settings.epochs_ffn, self.train)
        rows = batch * driver.n_steps(self.train, batch, epochs)
        return 2 * self.hidden(rows) + 3 * self.head(rows)

    def start_of_training(self, settings: driver.Settings) -> int:
        """The frame and what enters it, the teacher's logits, the initial SAE."""
        some = min(16 * settings.batch_sae, self.train)
        return 2 * self.turned(self.train) + self.head(self.train) + 3 * self.code(some)

    def step_products(self, batch: int) -> int:
        """Encoder and decoder, both their gradients, and that of the activations."""
        return 5 * self.code(batch)

    def rare_latents(self, batch: int) -> int:
        """Their reconstruction, and three gradients, for a share of the latents."""
        n = max(1, round(driver.STEERING.rare_share * self.d_sae))
        return 4 * product(batch, self.d_in, n)

    def head_gradient(self, batch: int) -> int:
        """Out of the frame and through the head, and back; their weights need no gradient."""
        return 2 * (self.turned(batch) + self.head(batch))

    def training(self, settings: driver.Settings) -> int:
        """All steps, what precedes them, folding the frame into the SAE, and calibration."""
        batch = min(settings.batch_sae, self.train)
        epochs = driver.scaled_epochs(settings.epochs_sae_final, self.train)
        steps = driver.n_steps(self.train, batch, epochs)
        with_rare = math.ceil(steps / driver.STEERING.rare_every)
        progress = [(step + 0.5) / steps for step in range(steps)]
        with_head = sum(p > driver.STEERING.head_from for p in progress)
        if not settings.head_kl:
            with_head = 0
        return (
            self.start_of_training(settings)
            + steps * self.step_products(batch)
            + with_rare * self.rare_latents(batch)
            + with_head * self.head_gradient(batch)
            + 2 * self.code(self.d_in)
            + self.code(self.val)
        )

    def fidelity(self) -> int:
        """Usage on train, L0 twice on val and once on test; four reconstructions; principal
        components; the logits of six comparisons."""
        codes = self.code(self.train) + 2 * self.code(self.val) + (1 + 4 * 2) * self.code(self.test)
        components = min(TARGET, self.d_in)
        principal = product(self.d_in, self.train, self.d_in)
        principal += 2 * product(self.test, self.d_in, components)
        return codes + principal + 6 * 2 * self.head(self.test)

    def bank(self) -> int:
        """Activations; the rest is sorting and counting."""
        return self.hidden(self.val) + self.code(self.val)

    def patterns(self) -> int:
        """One gradient for each hidden unit, on one image, and their combination for each
        latent."""
        gradients = self.turned(self.d_in) + self.hidden(self.d_in)
        return gradients + product(self.d_sae, self.d_in, self.pixels)

    def logit_effects(self, n_eval: int) -> int:
        """The head on every image for every latent."""
        n = min(n_eval, self.val)
        return self.hidden(n) + self.head(n) + self.head(n * self.d_sae)

    def ablation_effects(self, pairs: int) -> int:
        """Activations, and the head once for each active (feature, image) pair."""
        return self.hidden(self.val) + self.code(self.val) + self.head(self.val) + self.head(pairs)


# --------------------------------------------------------------------------------------------------
# Machine
# --------------------------------------------------------------------------------------------------


def product_rate(device: torch.device, threads: int) -> float:
    """GFLOP/s of a large matrix product."""
    side = PRODUCT_SIDE[device.type]
    a = torch.rand(side, side, device=device)
    with driver.torch_threads(threads):
        seconds = min(clocked(lambda: a @ a, device)[0] for _ in range(60))
    return product(side, side, side) / 1e9 / seconds


def machine(device: torch.device) -> tuple[list[Row], float]:
    """The rows, and the product rate of one core in GFLOP/s."""
    name = "cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    cores = driver.available_cores()
    one = product_rate(device, 1)
    side = PRODUCT_SIDE[device.type]
    facts = {
        "device": name,
        "cores": cores,
        **driver.versions(),
        f"product rate at {side}^3, one core, GFLOP/s": one,
        f"product rate at {side}^3, all cores, GFLOP/s": product_rate(device, cores),
    }
    return [Row(what, {"value": value}) for what, value in facts.items()], one


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


class Explained(NamedTuple):
    """What the stages computed; the later sections start from it."""

    settings: driver.Settings
    data: Data
    subject: driver.Subject
    trained: driver.TrainedSAE
    analysis: fa.Analysis

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @property
    def sae(self) -> driver.JumpReLUSAE:
        return self.trained.sae

    @property
    def layer(self) -> fa.ExplainedLayer:
        return self.subject.layer(self.sae)

    def given(self, sae: driver.JumpReLUSAE, images: int | None = None) -> tuple:
        """Model, loader of the first validation images, SAE, mu, std: what the functions of
        feature_analysis take."""
        split = Split(*(tensor[:images] for tensor in self.data.val))
        pre = self.subject.pre
        return self.subject.model, TensorLoader(split), sae, pre.mu, pre.std

    def prepared(self, folder: Path) -> driver.Prepared:
        """What the driver's last stages take; nothing is frozen, no picture is under way."""
        features = driver.analysed_features(self.analysis, 0)
        return driver.Prepared(
            TARGET,
            folder,
            self.trained,
            None,
            self.analysis,
            features,
            None,
            [],
            driver.Clock(),
            self.data.val.images,
        )


class StageClock:
    """Runs stages and keeps a row about each."""

    def __init__(self, device: torch.device, rate: float, repeats: int):
        self.device = device
        self.rate = rate  # of one core, GFLOP/s
        self.repeats = repeats
        self.rows: list[Row] = []

    def run(self, name: str, flops: int | None, work: Callable, *given):
        """The result of work(*given)."""
        runs, result = timed(partial(work, *given), self.device, self.repeats)
        seconds = statistics.median(runs)
        columns = {"seconds": seconds, **speed_columns(flops, seconds, self.rate)}
        self.rows.append(Row(name, {**columns, "runs": len(runs)}))
        return result


def speed_columns(flops: int | None, seconds: float, rate: float) -> dict[str, Cell]:
    """GFLOP, GFLOP/s and share of `rate`, all None where no operations are counted."""
    if flops is None:
        return {"GFLOP": None, "GFLOP/s": None, "of one core": None}
    speed = flops / 1e9 / seconds
    return {"GFLOP": flops / 1e9, "GFLOP/s": speed, "of one core": f"{speed / rate:.1%}"}


def trained_sae(subject: driver.Subject, settings: driver.Settings) -> driver.TrainedSAE:
    """Training and calibration as the driver's stage has them, but nothing is saved."""
    z_train, z_val = subject.pre.standardised("train"), subject.pre.standardised("val")
    before, _ = driver.train_sae(z_train, subject.logits_of, TARGET, settings)
    sae, _ = driver.adjust_thresholds(before, z_val, TARGET)
    return driver.TrainedSAE(before, sae, {}, "")


def shapes_of(data: Data, settings: driver.Settings) -> Shapes:
    sizes = [len(split.labels) for split in (data.train, data.val, data.test)]
    pixels = data.train.images[0].numel()
    classes = int(data.train.labels.max()) + 1
    return Shapes(*sizes, pixels, settings.hidden_units, settings.sae_latents, classes)


def training_stages(
    clock: StageClock, settings: driver.Settings
) -> tuple[Data, driver.Subject, driver.TrainedSAE]:
    """From the files to an SAE, and what the classifier loses through it."""
    data = clock.run("data", None, load_images, settings.data, settings.seed, clock.device)
    s = shapes_of(data, settings)
    model = clock.run(
        "classifier", s.classifier(settings), driver.train_classifier, data.train, settings
    )
    pre = clock.run(
        "preactivations",
        s.hidden(s.train + s.val + s.test),
        driver.collect_preactivations,
        *(model, data, settings.normalize_z),
    )
    subject = driver.Subject(model, "", pre, data.source, data.digest)
    trained = clock.run("SAE and calibration", s.training(settings), trained_sae, subject, settings)
    given = (trained, subject, data.test.labels, TARGET)
    clock.run("fidelity", s.fidelity(), driver.measure, *given)
    return data, subject, trained


def effect_stages(
    clock: StageClock, s: Shapes, settings: driver.Settings, given: tuple, bank: fa.FeatureBank
) -> list[fa.LogitEffects]:
    """What adding and what removing each feature does to the logits, on the CPU."""
    n_eval = settings.n_eval
    added = clock.run(
        "logit effects",
        s.logit_effects(n_eval),
        fa.feature_logit_effects,
        *(*given, settings.alpha, n_eval),
    )
    pairs = int(bank.n_active.clamp(max=n_eval).sum())
    removed = clock.run(
        "ablation effects",
        s.ablation_effects(pairs),
        fa.feature_ablation_effects,
        *(*given, n_eval),
    )
    return [fa.LogitEffects(*(tensor.cpu() for tensor in effects)) for effects in (added, removed)]


def analysis_stages(
    clock: StageClock,
    settings: driver.Settings,
    data: Data,
    subject: driver.Subject,
    sae: driver.JumpReLUSAE,
) -> fa.Analysis:
    """Images, pixels and classes of all features, and their pictures."""
    s, coder = shapes_of(data, settings), (sae, subject.pre.mu, subject.pre.std)
    given = (subject.model, TensorLoader(data.val), *coder)
    topk = min(settings.topk, s.val)

    bank = clock.run("bank", s.bank(), fa.collect_feature_bank, *given, topk)
    patterns = (fa.feature_input_patterns, subject.model, *coder)
    heats = clock.run("patterns", s.patterns(), *patterns).cpu()
    logit, ablation = effect_stages(clock, s, settings, given, bank)
    nearest = clock.run("nearest features", s.code(s.d_sae), fa.nearest_features, sae.W_dec)

    layer, images = fa.ExplainedLayer(subject.model, *coder), data.val.images
    activity = clock.run("activity", s.code(s.val), fa.collect_activity, layer, *data.val)
    removed = clock.run("removals", None, fa.removal_effects, layer, images, activity)

    share = (data.train.images > 0).float().mean(0)[0]
    inked = (share >= driver.INKED_SHARE).cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        shown = (range(s.d_sae), bank, data.val.images.cpu(), heats, inked)
        clock.run("pictures", None, fa.write_feature_pictures, folder, *shown)
    return fa.Analysis(bank, heats, logit, ablation, nearest, inked, activity, removed)


def stages(
    settings: driver.Settings, device: torch.device, rate: float, repeats: int
) -> tuple[list[Row], Explained]:
    clock = StageClock(device, rate, repeats)
    data, subject, trained = training_stages(clock, settings)
    analysis = analysis_stages(clock, settings, data, subject, trained.sae)
    columns = dict.fromkeys(clock.rows[0].columns)
    columns["seconds"] = total(clock.rows, "seconds")
    rows = [*clock.rows, Row("sum", columns)]
    return rows, Explained(settings, data, subject, trained, analysis)


# --------------------------------------------------------------------------------------------------
# One step of the SAE's training
# --------------------------------------------------------------------------------------------------


class Course(NamedTuple):
    """A short training from start to end: its steps are spent as those of a long one."""

    training: driver.SAETraining
    plan: list[Tensor]  # the images of each step

    @classmethod
    def begin(cls, e: Explained, d_sae: int) -> Course:
        settings = replace(e.settings, sae_latents=d_sae)
        generator = torch.Generator(e.device).manual_seed(settings.seed)
        z = e.subject.pre.standardised("train")
        training = driver.SAETraining(z, e.subject.logits_of, TARGET, settings, generator)
        batches = driver.batches(len(z), settings.batch_sae, STEPS, generator)
        return cls(training, list(itertools.islice(batches, STEPS)))

    def seconds(self, device: torch.device) -> list[float]:
        """Of each step."""
        seconds = []
        for number, index in enumerate(self.plan):
            step = partial(self.training.step, index, number, (number + 0.5) / STEPS)
            seconds.append(clocked(step, device)[0])
        return seconds


def best_mean(rounds: Sequence[Sequence[float]]) -> float:
    """The mean over what was timed in each round, each at its best: a busy spell spoils little."""
    best = [min(runs) for runs in zip(*rounds, strict=True)]
    return statistics.mean(best)


class Batch(NamedTuple):
    """What the parts of a step work on: one batch in the middle of a step."""

    training: driver.SAETraining
    index: Tensor  # (B,)
    x: Tensor  # (B, d_in)
    pre: Tensor  # (B, d_sae)
    feature_acts: Tensor  # (B, d_sae)
    active: Tensor  # (B, d_sae)
    x_hat: Tensor  # (B, d_in)
    error: Tensor  # (B, d_in)
    d_x_hat: Tensor  # (B, d_in)
    d_pre: Tensor  # (B, d_sae)
    gradients: list[Tensor]

    @classmethod
    def of(cls, course: Course) -> Batch:
        training, index = course.training, course.plan[-1]
        sae, x = training.sae, training.x[index]
        pre = sae.pre_threshold(x)
        feature_acts = sae.jump(pre)
        active = feature_acts.sign()
        x_hat = sae.decode(feature_acts)
        error = x_hat - x
        d_x_hat = error * (2 / error.numel())
        d_pre = (d_x_hat @ sae.W_dec.T) * active
        gradients = driver.sae_gradients(sae, x, feature_acts, active, d_x_hat)
        return cls(
            *(training, index, x, pre, feature_acts, active),
            *(x_hat, error, d_x_hat, d_pre, gradients),
        )

    def elementwise(self) -> None:
        """The jump, the error and its gradient, the mask of the activations' gradient, and both
        biases' gradients."""
        feature_acts = self.training.sae.jump(self.pre)
        feature_acts.sign()
        error = self.x_hat - self.x
        error.square().mean()
        d_x_hat = error * (2 / error.numel())
        d_x_hat.sum(0)
        self.d_pre.mul_(self.active)  # for the second time: nothing changes
        self.d_pre.sum(0)

    def head(self) -> None:
        t = self.training
        driver.head_gradient(t.teacher[self.index], t.logits_of, t.frame, self.x_hat)

    def rare(self) -> None:
        t = self.training
        below = driver.STEERING.rare_below * TARGET / t.settings.sae_latents
        given = (self.gradients, t.sae, self.x, self.pre, self.error, t.density, below)
        driver.add_rare_gradients(*given)

    def adam(self) -> None:
        self.training.optimizer.step(self.gradients, 0.0)  # a rate at which weights stay

    def bookkeeping(self) -> None:
        """Thresholds and images of the next step, the decoder's norms, densities, lambda."""
        t = self.training
        t.sae.threshold.copy_(t.thresholds(TARGET))
        t.x.index_select(0, self.index)
        t.sae.W_dec.div_(t.sae.W_dec.norm(dim=1, keepdim=True))
        fired = self.active.mean(0)
        t.density.lerp_(fired, 0.01)
        t.controller.observe(fired.sum(), TARGET)

    def products(self) -> dict[str, Callable]:
        sae = self.training.sae
        return {
            "x W_enc": lambda: sae.pre_threshold(self.x),
            "f W_dec": lambda: sae.decode(self.feature_acts),
            "d_x_hat W_dec^T": lambda: self.d_x_hat @ sae.W_dec.T,
            "x^T d_pre": lambda: self.x.T @ self.d_pre,
            "f^T d_x_hat": lambda: self.feature_acts.T @ self.d_x_hat,
        }


class Part(NamedTuple):
    """Something a step does."""

    what: str
    work: Callable
    per_step: float  # how often
    flops: int | None = None  # of one call, where the products are all there is


def step_parts(batch: Batch, s: Shapes, settings: driver.Settings) -> tuple[list[Part], list[Part]]:
    """The five products, and everything else."""
    flops = s.code(len(batch.x))
    products = [Part(name, work, 1.0, flops) for name, work in batch.products().items()]
    with_head = 0.0
    if settings.head_kl:
        with_head = 1 - driver.STEERING.head_from
    others = [
        Part("jump and elementwise", batch.elementwise, 1.0),
        Part("head gradient", batch.head, with_head),
        Part("rare latents", batch.rare, 1 / driver.STEERING.rare_every),
        Part("Adam", batch.adam, 1.0),
        Part("normalising, bookkeeping", batch.bookkeeping, 1.0),
    ]
    return products, others


def step_row(
    what: str, seconds: float, whole: float, rate: float, per_step: float | None, flops: int | None
) -> Row:
    """`seconds` of a mean step of `whole` seconds; flops likewise."""
    speed = speed_columns(flops, seconds, rate)
    columns = {"ms": 1000 * seconds, "of step": f"{seconds / whole:.1%}", "per step": per_step}
    columns |= {name: speed[name] for name in ("GFLOP/s", "of one core")}
    return Row(what, columns)


@torch.no_grad()
def sae_step(e: Explained, rate: float) -> list[Row]:
    settings, device = e.settings, e.device
    course = Course.begin(e, settings.sae_latents)
    whole = best_mean([course.seconds(device) for _ in range(3 * ROUNDS)])
    s = shapes_of(e.data, settings)
    products, others = step_parts(Batch.of(course), s, settings)

    def measured(part: Part) -> Row:
        seconds = part.per_step * shortest(part.work, device)
        return step_row(part.what, seconds, whole, rate, part.per_step, part.flops)

    rows = [measured(part) for part in products]
    in_products = total(rows, "ms") / 1000
    rest = [measured(part) for part in others]
    in_parts = in_products + total(rest, "ms") / 1000
    flops = sum(part.flops for part in products)
    return [
        *rows,
        step_row("these five products", in_products, whole, rate, None, flops),
        *rest,
        step_row("whole step", whole, whole, rate, None, None),
        step_row("unaccounted", whole - in_parts, whole, rate, None, None),
    ]


def threads(e: Explained) -> list[Row]:
    cores = driver.available_cores()
    rows = []
    for d_sae in LATENTS:
        course = Course.begin(e, d_sae)
        with_one, with_all = [], []
        for _ in range(ROUNDS):
            with_one.append(course.seconds(e.device))
            with driver.torch_threads(cores):
                with_all.append(course.seconds(e.device))
        one, all_cores = 1000 * best_mean(with_one), 1000 * best_mean(with_all)
        large = driver.training_threads(replace(e.settings, sae_latents=d_sae), e.subject) > 1
        columns = {"latents": d_sae, "one thread, ms": one, f"all {cores} cores, ms": all_cores}
        columns |= {"ratio": one / all_cores, "driver takes": "all" if large else "one"}
        rows.append(Row("SAE step", columns))
    return rows


# --------------------------------------------------------------------------------------------------
# Statements and the page
# --------------------------------------------------------------------------------------------------


class Claims(NamedTuple):
    """What the statements section found; the page shows it."""

    hypotheses: list[fh.Hypothesis]
    evidence: list[fc.Evidence]
    aside: list[fc.Evidence]
    activity: fa.Activity  # on the judging images
    picked: dict[int, fc.Picked]


class StatementClock:
    """Runs the steps of making statements and keeps a row about each."""

    def __init__(self, e: Explained, repeats: int):
        self.device = e.device
        self.repeats = repeats
        self.rows: list[Row] = []

    def add(self, what: str, seconds: float, features: int | None) -> None:
        each = None
        if features is not None:
            each = 1000 * seconds / features
        columns = {"features": features, "seconds": seconds, "ms/feature": each}
        self.rows.append(Row(what, columns))

    def run(self, what: str, features: int, work: Callable, *given):
        """The result of work(*given)."""
        runs, result = timed(partial(work, *given), self.device, self.repeats)
        self.add(what, min(runs), features)
        return result


def sae_statements(clock: StatementClock, e: Explained) -> Claims:
    """The SAE's own."""
    layer, n = e.layer, e.settings.sae_latents
    judging, aside = fc.confirmation_splits(*e.data.test)
    hypotheses = clock.run("propose", n, fh.propose_hypotheses, layer, *e.data.val)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hypotheses.json"
        clock.run("freeze", n, fh.freeze_hypotheses, hypotheses, path)
    activity = fa.collect_activity(layer, *judging)
    scored = fc.score_claims(hypotheses, *judging)
    evidence = clock.run("test", n, fc.test_hypotheses, hypotheses, layer, *judging)
    picked = clock.run("pick", n, fc.pick_features, evidence, scored, layer, activity)
    clock.run("judge", n, fc.judge_hypotheses, hypotheses, evidence)
    clock.add("sum of these five", total(clock.rows, "seconds"), n)
    again = clock.run("images set aside", n, fc.test_hypotheses, hypotheses, layer, *aside)
    return Claims(hypotheses, evidence, again, activity, picked)


def other_statements(clock: StatementClock, e: Explained) -> None:
    """Those about other features of the same layer."""
    first = len(clock.rows)
    judging, aside = fc.confirmation_splits(*e.data.test)
    n_hidden, n_latents = e.layer.sae.W_enc.shape
    for kind in driver.COMPARED:
        features = min(fc.COMPARED, n_latents)
        if kind == "neurons":
            features = min(features, 2 * n_hidden)  # both ends of each
        given = (kind, e.settings, e.layer, tuple(e.data.val), judging, aside)
        clock.run(kind, features, driver.compare_with, *given)
    compared = clock.rows[first:]
    n = int(total(compared, "features"))
    clock.add("sum of comparisons", total(compared, "seconds"), n)


def statements(e: Explained, repeats: int) -> tuple[list[Row], Claims]:
    clock = StatementClock(e, repeats)
    claims = sae_statements(clock, e)
    other_statements(clock, e)
    sums = ("sum of these five", "images set aside", "sum of comparisons")
    everything = [row for row in clock.rows if row.what in sums]
    clock.add("sum", total(everything, "seconds"), None)
    return clock.rows, claims


def report_of(e: Explained, claims: Claims) -> list[dict]:
    """The records of feature_report.json."""
    tested = claims.evidence, claims.aside, claims.activity, claims.picked
    trial = fc.make_trial(claims.hypotheses, fh.Rule(), *tested)
    report = []
    for k in driver.analysed_features(e.analysis, 0):
        record = fa.feature_record(k, e.analysis)
        report.append({**record, **fc.statement_record(k, trial)})
    return report


def page(e: Explained, claims: Claims, repeats: int) -> list[Row]:
    report = report_of(e, claims)
    record = driver.measure(e.trained, e.subject, e.data.test.labels, TARGET)
    record["diagnoses"] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = partial(driver.write_page, e.prepared(folder), record, report, [])
        runs, _ = timed(partial(write, e.subject, e.data), e.device, repeats)
        size = (folder / "feature_report.html").stat().st_size
    return [Row("feature_report.html", {"seconds": min(runs), "MiB": size / 2**20})]


# --------------------------------------------------------------------------------------------------
# The whole command
# --------------------------------------------------------------------------------------------------

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

# Ends with the process that started it, however that one ends.
BUSY = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    pass
"""


class CommandError(RuntimeError):
    """The command ended with an error; the message holds its line."""


class Ran(NamedTuple):
    """How the whole command went."""

    seconds: float
    peak: float | None  # MiB
    record: dict  # of its summary.json


def run_command(settings: driver.Settings) -> Ran:
    """Raises CommandError."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", settings.data, "--seed", str(settings.seed)]
        flags += ["--device", settings.device, "--out", folder]
        line = [sys.executable, str(SCRIPT), *flags]
        told = subprocess.run(
            [sys.executable, "-c", LAUNCHER, *line], stdout=subprocess.PIPE, text=True, check=True
        )
        status, seconds, peak = json.loads(told.stdout)
        if status:
            raise CommandError(f"{' '.join(line)} ended with status {status}")
        record = json.loads((Path(folder) / "summary.json").read_bytes())[0]
    return Ran(seconds, mebibytes(peak), record)


def command(ran: Ran) -> list[Row]:
    results = """baseline_acc recon_acc_jumprelu agreement_jumprelu fvu achieved_actives_test
    dead_features"""
    facts = {"wall seconds": ran.seconds, "peak memory, MiB": ran.peak}
    for name in results.split():
        facts[name] = ran.record[name]
    for stage, seconds in ran.record["seconds"].items():
        facts[f"reported seconds, {stage}"] = seconds
    return [Row(what, {"value": value}) for what, value in facts.items()]


@contextmanager
def busy_core() -> Iterator[subprocess.Popen]:
    """Beside what is done inside, a process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())])
    try:
        yield process
        if process.poll() is not None:
            raise RuntimeError("the process that should keep a core busy ended too early")
    finally:
        process.kill()
        process.wait()


def busy(settings: driver.Settings, idle: Ran) -> list[Row]:
    with busy_core():
        beside = run_command(settings)
    rows = []
    for what, ran in (("idle", idle), ("one core busy", beside)):
        columns = {"cores": driver.available_cores(), "seconds": ran.seconds}
        columns["to idle"] = ran.seconds / idle.seconds
        rows.append(Row(what, columns))
    return rows


# --------------------------------------------------------------------------------------------------
# The reference: one feature after the other, nothing shared, nothing clever
# --------------------------------------------------------------------------------------------------


class Plain:
    """Each method explains one feature; the tensors it returns are on the CPU."""

    def __init__(self, e: Explained):
        self.model, self.loader, self.sae, self.mu, self.std = e.given(e.sae)
        self.settings = e.settings
        self.images = e.data.val.images
        self.inked = e.analysis.inked
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
        """Indices and activations of the strongest images, at most topk, and the label histogram
        (C,)."""
        parts = list(self.batches(k))
        activations = torch.cat([part for _, part, _ in parts]).cpu()
        labels = torch.cat([part for _, _, part in parts]).cpu()
        self.activations[k] = activations
        falling = torch.sort(activations, descending=True, stable=True).indices
        order = falling[: self.settings.topk]
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
        n = max(1, self.settings.n_eval - left)
        return (torch.cat(deltas).sum(0).cpu() / n,)

    def pictures(self, k: int, folder: Path) -> None:
        """What ours show: the 20 strongest images, 5 from each quarter of the active range, the
        pattern."""
        self.gallery(k, folder)
        heat = self.heats[k].numpy()
        figure, place = plt.subplots(figsize=(4, 4))
        limit = float(np.abs(heat).max())
        inked = np.ma.array(heat, mask=~self.inked)
        drawn = place.imshow(inked, cmap="RdBu_r", vmin=-limit, vmax=limit)
        figure.colorbar(drawn)
        place.set_title(f"Feature {k}")
        figure.savefig(folder / f"plain_{k}_pattern.png")
        plt.close(figure)
        np.save(folder / f"plain_{k}_pattern.npy", heat)

    def gallery(self, k: int, folder: Path) -> None:
        activations = self.activations[k]
        falling = torch.argsort(activations, descending=True)
        falling = falling[: int((activations > 0).sum())]
        shown = [falling[:20]]
        for band in falling.tensor_split(4):
            places = torch.linspace(0, len(band) - 1, min(5, len(band)))
            shown.append(band[places.long()])

        figure, axes = plt.subplots(4, 10, figsize=(10, 5))
        for place in axes.flat:
            place.axis("off")
        for place, i in zip(axes.flat, torch.cat(shown).tolist(), strict=False):
            place.imshow(self.images[i, 0].cpu().numpy(), cmap="gray_r")
            place.set_title(f"{activations[i]:.2g}", fontsize=7)
        figure.suptitle(f"Feature {k}")
        figure.savefig(folder / f"plain_{k}_gallery.png")
        plt.close(figure)


class Contest(NamedTuple):
    """The same question answered by both."""

    what: str
    ours: Callable  # () -> the results of all features
    of_feature: Callable | None  # (results, k) -> what to compare; None: nothing is
    plain: Callable  # (k) -> the result of one


def compared(what: str, ours_ms: float, plain_ms: float, difference: float | None) -> Row:
    columns = {"ours, ms": ours_ms, "reference, ms": plain_ms}
    columns |= {"ratio": plain_ms / ours_ms, "difference": difference}
    return Row(what, columns)


def largest_difference(ours: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Infinite where shapes differ or something is not a number."""
    worst = 0.0
    for a, b in zip(ours, plain, strict=True):
        if a.shape != b.shape:
            return math.inf
        if len(b):
            apart = (a.cpu() - b).abs().nan_to_num(math.inf)
            worst = max(worst, float(apart.max()))
    return worst


def side_by_side(contest: Contest, features: Sequence[int], e: Explained) -> Row:
    """They take turns: ours explains all features, the reference some of them."""
    ours_ms, plain_ms, worst = [], [], 0.0
    rounds = min(3, len(features))
    for first in range(rounds):
        some = features[first::rounds]
        seconds, everything = clocked(contest.ours, e.device)
        ours_ms.append(1000 * seconds / e.settings.sae_latents)

        def one_by_one(some: Sequence[int] = some) -> list:
            return [contest.plain(k) for k in some]

        seconds, results = clocked(one_by_one, e.device)
        plain_ms.append(1000 * seconds / len(some))
        if contest.of_feature:
            for k, result in zip(some, results, strict=True):
                worst = max(worst, largest_difference(contest.of_feature(everything, k), result))
    difference = worst if contest.of_feature else None
    return compared(
        contest.what, statistics.median(ours_ms), statistics.median(plain_ms), difference
    )


def contests(e: Explained, plain: Plain, folder: Path) -> list[Contest]:
    """In the order in which the reference needs them: the pictures show the others' results."""
    settings, given, analysis = e.settings, e.given(e.sae), e.analysis
    model, _, *coder = given
    images = e.data.val.images.cpu()

    def of_bank(bank: fa.FeatureBank, k: int) -> tuple[Tensor, Tensor, Tensor]:
        top = bank.top.of(k)
        return top.index, top.activation, bank.label_histogram[k]

    def of_patterns(heats: Tensor, k: int) -> tuple[Tensor]:
        return (heats[k],)

    def of_effects(effects: fa.LogitEffects, k: int) -> tuple[Tensor]:
        return (effects.mean_delta[k],)

    bank = partial(fa.collect_feature_bank, *given, min(settings.topk, len(images)))
    patterns = partial(fa.feature_input_patterns, model, *coder)
    logit = partial(fa.feature_logit_effects, *given, settings.alpha, settings.n_eval)
    ablation = partial(fa.feature_ablation_effects, *given, settings.n_eval)
    every = range(settings.sae_latents)
    shown = (every, analysis.bank, images, analysis.heats, analysis.inked)
    draw = partial(fa.write_feature_pictures, folder, *shown)
    return [
        Contest("bank", bank, of_bank, plain.bank),
        Contest("patterns", patterns, of_patterns, plain.pattern),
        Contest("logit effects", logit, of_effects, plain.logit_effect),
        Contest("ablation effects", ablation, of_effects, plain.ablation_effect),
        Contest("pictures", draw, None, partial(plain.pictures, folder=folder)),
    ]


def against_reference(e: Explained, how_many: int) -> tuple[list[Row], float]:
    """The rows, and the largest difference. The features compared go from the most influential to
    the least."""
    ranked = driver.analysed_features(e.analysis, 0)
    places = torch.linspace(0, len(ranked) - 1, how_many).long().tolist()
    features = [ranked[i] for i in places]
    with tempfile.TemporaryDirectory() as folder:
        both = contests(e, Plain(e), Path(folder))
        rows = [side_by_side(contest, features, e) for contest in both]

    differences = [row.columns["difference"] for row in rows]
    worst = max(difference for difference in differences if difference is not None)
    sums = total(rows, "ours, ms"), total(rows, "reference, ms")
    return [*rows, compared("sum", *sums, worst)], worst


# --------------------------------------------------------------------------------------------------
# Scaling
# --------------------------------------------------------------------------------------------------


def random_sae(z: Tensor, d_sae: int, seed: int) -> driver.JumpReLUSAE:
    """Random unit rows, the encoder their transpose, and the one threshold that leaves TARGET
    active per row of z."""
    sae = driver.JumpReLUSAE(z.shape[1], d_sae).to(z.device).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, z.shape[1], generator=generator)
    sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    return driver.adjust_thresholds(sae, z, TARGET)[0]


class Job(NamedTuple):
    """What a row of the scaling table times."""

    grows: str  # latents or images
    what: str
    latents: int
    images: int | None
    active: float | None  # features per image


Works = dict[Job, Callable[[torch.device], list[float]]]  # each gives the seconds it took


def seconds_of(work: Callable) -> Callable[[torch.device], list[float]]:
    return lambda device: [clocked(work, device)[0]]


def analysis_works(e: Explained, grows: str, d_sae: int, images: int, n_eval: int) -> Works:
    """The analysis of an SAE of `d_sae` latents on so many validation images."""
    z = e.subject.pre.standardised("val")
    sae = random_sae(z, d_sae, e.settings.seed)
    given = e.given(sae, images)
    active = driver.mean_actives(sae, z[:images])
    topk = min(e.settings.topk, images)

    def effects() -> None:
        fa.feature_logit_effects(*given, n_eval=n_eval)
        fa.feature_ablation_effects(*given, n_eval=n_eval)

    bank = partial(fa.collect_feature_bank, *given, topk)
    works = {
        Job(grows, "bank", d_sae, images, active): seconds_of(bank),
        Job(grows, "both effects", d_sae, images, active): seconds_of(effects),
    }
    if grows == "latents":
        model, _, *coder = given
        patterns = partial(fa.feature_input_patterns, model, *coder)
        works[Job(grows, "patterns", d_sae, None, None)] = seconds_of(patterns)
    return works


def scaling_works(e: Explained) -> Works:
    n_val, batch = len(e.data.val.labels), e.settings.batch_sae
    works: Works = {}
    for d_sae in LATENTS:
        works |= analysis_works(e, "latents", d_sae, n_val, e.settings.n_eval)
        course = Course.begin(e, d_sae)
        works[Job("latents", "SAE step", d_sae, batch, None)] = course.seconds
    for images in (n_val // 4, n_val // 2, n_val):
        works |= analysis_works(e, "images", LATENTS[0], images, images)
    return works


def scaling(e: Explained) -> list[Row]:
    works = scaling_works(e)
    rounds: dict[Job, list[list[float]]] = {job: [] for job in works}
    for _ in range(ROUNDS):
        for job, work in works.items():
            rounds[job].append(work(e.device))
    best = {job: best_mean(runs) for job, runs in rounds.items()}

    rows: list[Row] = []
    first: dict[tuple[str, str], float] = {}  # seconds per unit of what grows, by grows and what
    for job in sorted(best, key=lambda job: (job.grows == "images", job.what)):  # sizes stay put
        size, seconds = getattr(job, job.grows), best[job]
        linear = size * first.setdefault((job.grows, job.what), seconds / size)
        columns = {"grows": job.grows, "latents": job.latents, "images": job.images}
        columns |= {"active": job.active, "seconds": seconds}
        columns |= {"us/latent": 1e6 * seconds / job.latents, "us/image": None}
        if job.images is not None:
            columns["us/image"] = 1e6 * seconds / job.images
        columns["to linear"] = seconds / linear
        rows.append(Row(job.what, columns))
    return rows


def peak_memory(device: torch.device) -> list[Row]:
    peak = None
    if resource is not None:
        peak = mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    rows = [Row("this process", {"MiB": peak})]
    if device.type == "cuda":
        on_gpu = torch.cuda.max_memory_allocated(device) / 2**20
        rows.append(Row("its tensors on the GPU", {"MiB": on_gpu}))
    return rows


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises InputError for values that cannot be used."""
    parser = driver.OneLineParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default=driver.DATA, help="folder that holds MNIST/raw, or 'sample'")
    add("--json", default="benchmark.json", help="where the tables are written as JSON")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", type=int, default=0, help="seed of every random choice")
    add("--repeats", type=int, default=1, help="runs of each stage")
    add("--reference-features", type=int, default=8, help="how many the reference explains")
    given = parser.parse_args(argv)
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; it must be at least 1")
    if not 1 <= given.reference_features <= driver.SAE_LATENTS:
        parser.error(
            f"--reference-features is {given.reference_features}; it must be between 1 and "
            f"{driver.SAE_LATENTS}"
        )
    return given


class Result(NamedTuple):
    """All tables by section, where the images came from, and the largest difference from the
    reference."""

    tables: dict[str, list[Row]]
    source: str
    worst: float


def measure_all(settings: driver.Settings, repeats: int, reference_features: int) -> Result:
    """Every section, each shown as soon as it is measured."""
    device = driver.pick_device(settings.device)
    if device.type == "cuda":
        driver.make_cuda_repeatable()
    tables: dict[str, list[Row]] = {}

    def report(section: str, rows: list[Row]) -> None:
        tables[section] = rows
        show(section, rows)

    rows, rate = machine(device)
    report("machine", rows)
    rows, e = stages(settings, device, rate, repeats)
    report("stages", rows)
    report("SAE step", sae_step(e, rate))
    report("threads", threads(e))
    rows, claims = statements(e, repeats)
    report("statements", rows)
    report("page", page(e, claims, repeats))
    ran = run_command(settings)
    report("command", command(ran))
    report("busy", busy(settings, ran))
    rows, worst = against_reference(e, reference_features)
    report("reference", rows)
    report("scaling", scaling(e))
    report("peak memory", peak_memory(device))
    return Result(tables, e.data.source, worst)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    given = parse(argv)
    settings = driver.Settings(
        target_actives=(TARGET,), data=given.data, device=given.device, seed=given.seed
    )
    with driver.torch_threads(1):
        result = measure_all(settings, given.repeats, given.reference_features)

    record: dict[str, object] = {}
    for section, rows in result.tables.items():
        record[section] = [{"what": row.what, **row.columns} for row in rows]
    fine = result.worst <= TOLERANCE
    record |= {"arguments": vars(given), "data": result.source, "agrees_with_reference": fine}
    Path(given.json).write_text(json.dumps(record, indent=2) + "\n")

    verdict = "fine" if fine else f"more than the {TOLERANCE:g} allowed"
    print(
        f"\n{given.json} holds these tables. Largest difference from the reference: "
        f"{result.worst:.2g}, {verdict}"
    )
    return 0 if fine else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (driver.InputError, DataError, CommandError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
