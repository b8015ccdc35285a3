"""Train a small MNIST classifier, look inside it with a sparse autoencoder, explain every feature.

    python MNIST_SAE_code.py                              # everything, into artifacts_mnist_sae/
    python MNIST_SAE_code.py --target-actives 10 20 40    # one SAE per sparsity, and their frontier
    python MNIST_SAE_code.py --data sample --features 50  # the bundled sample, 50 features

The stages, each a function below, called in this order by `main`:

    data            the full MNIST set, or the bundled sample of it (mnist_data.py)
    classifier      784-128-10, ReLU; what we want to understand
    preactivations  its 128 hidden values before the ReLU, for every image
    SAE             JumpReLU sparse autoencoder on them; lambda calibrated while it trains,
                    thresholds after
    analysis        per feature: images, pixels, classes (feature_analysis.py), on the validation
                    images
    claims          per feature: what it may mean, from the validation images, frozen
                    (feature_hypotheses.py)
    trial           the claims on the test images (feature_confirmation.py)
    fidelity        what the classifier loses when it must think through the SAE, on the test images
    page            all of it in one HTML file (feature_page.py)

Small matrices are multiplied by one thread, which other processes cannot stall; further cores take
whole jobs: SAEs of other targets and seeds, comparisons, pictures. What comes out does not depend
on how many there are, except for SAEs so large (LARGE_SAE) that all cores work on one product.

Dimension key: N images, B images in a batch, C classes, d_in hidden units, d_sae latents.

References
    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs"
    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss on dying latents)
    Blumensath & Davies 2008, "Iterative thresholding for sparse approximations" (threshold =
    sqrt(lambda))
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

STARTED = time.perf_counter()  # before the heavy imports: the table of seconds includes them


def leave_at_once(number: int, _: object) -> None:
    """For Ctrl-C and SIGTERM while the heavy imports run, and for a second one after that."""
    os.write(2, b"error: stopped at once; finished stages are saved and will be reused\n")
    os._exit(128 + number)


def open_closed_streams() -> None:
    """/dev/null in place of streams that were closed by whoever started this: otherwise the next
    file that is opened takes their number, and what is printed is written into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


if __name__ == "__main__":
    open_closed_streams()
    signal.signal(signal.SIGINT, leave_at_once)
    signal.signal(signal.SIGTERM, leave_at_once)

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import feature_analysis as fa  # noqa: E402
import feature_confirmation as fc  # noqa: E402
import feature_hypotheses as fh  # noqa: E402
import feature_page as fp  # noqa: E402
from mnist_data import (  # noqa: E402
    SPLITS,
    Data,
    DataError,
    Split,
    TensorLoader,
    load_images,
    repeated_images,
    tell_repeated,
)
from whole_files import (  # noqa: E402
    BusyError,
    as_kind,
    only_writer,
    read_json,
    remove_unfinished,
)

# --------------------------------------------------------------------------------------------------
# Settings: edit a line here, or give the flag of the same name (TARGET_ACTIVES: --target-actives)
# --------------------------------------------------------------------------------------------------

TARGET_ACTIVES = [20]  # mean number of active features per image; each target gets its own SAE
SAE_LATENTS = 256  # two per hidden unit: with more, fewer features return from other seeds
EPOCHS_SAE_FINAL = 5  # passes over the training images; more lowers FVU slowly
BATCH_SAE = 128  # many small steps beat few large ones: 256 is faster, FVU a tenth worse
LR_SAE = 1.3e-2  # peak Adam rate; 1e-3 trebles FVU in so few epochs
HEAD_KL = 0.15  # weight of the classifier's logits in the SAE loss; 0 ignores what z is used for
NORMALIZE_Z = True  # standardise each hidden unit first, so that loud ones do not own the SAE
HIDDEN_UNITS = 128  # width of the classifier's hidden layer, d_in of the SAE
EPOCHS_FFN = 3  # passes over the training images for the classifier
BATCH_FFN = 256  # images per classifier step
LR_FFN = 2e-2  # peak AdamW rate of one cycle; reaches in 3 epochs what 1e-3 needs 12 for
WEIGHT_DECAY_FFN = 0.4  # pixels without evidence lose their weight; more costs accuracy
TOPK = 20  # strongest images kept per feature
N_EVAL = 2000  # images over which an effect on the logits is averaged
ALPHA = 1.0  # how much of a feature is added when its logit effect is measured
STROKES = True  # name strokes of ink, where images are pen strokes on a blank ground
HYPOTHESES = True  # propose a statement about every feature, freeze it, test it on the test images
STABILITY_SEEDS = 1  # train so many more SAEs from other seeds and see which features return
FEATURES = 0  # analyse only this many of the most influential features; 0 analyses all
SEED = 0  # same seed and device: the same artifacts
DATA = "auto"  # folder of images in MNIST's format; "sample": 5,000 digits; "auto": find MNIST
OUT = "artifacts_mnist_sae"  # where everything is written
DEVICE = "auto"  # auto takes a CUDA GPU when there is one
WORKERS = -1  # processes beside this one; -1 takes one for each further core
FRESH = False  # retrain although finished stages could be reused
WAIT = False  # wait for another run that writes to the same folder, rather than refuse


def setting(default, what: str):
    """A dataclass field with the help text of its flag."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Settings:
    """Settings of one run, checked; every field is also a flag of the command line."""

    target_actives: tuple[int, ...] = setting(
        tuple(TARGET_ACTIVES), "mean active features per image, one SAE for each"
    )
    sae_latents: int = setting(SAE_LATENTS, "number of SAE features")
    epochs_sae_final: int = setting(EPOCHS_SAE_FINAL, "SAE epochs on the full set")
    batch_sae: int = setting(BATCH_SAE, "images per SAE step")
    lr_sae: float = setting(LR_SAE, "peak SAE learning rate")
    head_kl: float = setting(HEAD_KL, "weight of the classifier's logits in the SAE loss")
    normalize_z: bool = setting(NORMALIZE_Z, "standardise the preactivations")
    hidden_units: int = setting(HIDDEN_UNITS, "width of the classifier's hidden layer")
    epochs_ffn: int = setting(EPOCHS_FFN, "classifier epochs on the full set")
    batch_ffn: int = setting(BATCH_FFN, "images per classifier step")
    lr_ffn: float = setting(LR_FFN, "peak classifier learning rate")
    weight_decay_ffn: float = setting(WEIGHT_DECAY_FFN, "decoupled weight decay of the classifier")
    topk: int = setting(TOPK, "strongest images kept per feature")
    n_eval: int = setting(N_EVAL, "images over which an effect is averaged")
    alpha: float = setting(ALPHA, "how much of a feature is added to measure its logit effect")
    strokes: bool = setting(STROKES, "name strokes of ink, where images are drawn with a pen")
    hypotheses: bool = setting(HYPOTHESES, "state what every feature means, freeze and test it")
    stability_seeds: int = setting(
        STABILITY_SEEDS, "more SAEs to train, to see which features return"
    )
    features: int = setting(
        FEATURES, "analyse only so many of the most influential features; 0: all"
    )
    seed: int = setting(SEED, "seed of every random choice")
    data: str = setting(
        DATA, "folder of images in MNIST's file format, or 'sample', or 'auto': MNIST from the web"
    )
    out: str = setting(OUT, "folder for everything that is written")
    device: str = setting(DEVICE, "auto, cpu, cuda or cuda:N")
    workers: int = setting(WORKERS, "processes beside this one; -1: one for each further core")
    fresh: bool = setting(FRESH, "retrain instead of reusing finished stages")
    wait: bool = setting(WAIT, "wait while another run writes to the same folder")

    def __post_init__(self) -> None:
        if not isinstance(self.target_actives, tuple):
            raise InputError(f"target_actives is {self.target_actives!r}; it must be a tuple")
        self._refuse_other_kinds()
        self._refuse_targets()
        positive = """epochs_sae_final batch_sae lr_sae hidden_units epochs_ffn batch_ffn lr_ffn
        topk n_eval"""
        for name in positive.split():
            if not 0 < getattr(self, name) < math.inf:
                raise self._refusal(name, "it must be a positive number")
        for name in "head_kl weight_decay_ffn stability_seeds features seed".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise self._refusal(name, "it must not be negative")
        for name, largest in LARGEST.items():
            if abs(getattr(self, name)) > largest:
                raise self._refusal(name, f"it must be at most {largest:,}")
        if self.seed >= 2**63:
            raise self._refusal("seed", "it must be below 2**63")
        if self.workers < -1:
            raise self._refusal("workers", "it must be 0 or more, or -1 for all cores")
        for name in ("data", "out"):
            folder = getattr(self, name)
            if not folder.strip() or "\0" in folder:
                raise InputError(f"{flag_name(name)} is {folder!r}; it must name a folder")

    def _refusal(self, name: str, why: str) -> InputError:
        return InputError(f"{flag_name(name)} is {getattr(self, name)}; {why}")

    def _refuse_other_kinds(self) -> None:
        """Whole numbers where they are asked for, finite ones elsewhere, and no text for them."""
        given = [(name, kind, getattr(self, name)) for name, kind in KINDS.items()]
        given += [("target_actives", int, target) for target in self.target_actives]
        for name, kind, value in given:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if kind is int and not (is_number and isinstance(value, int)):
                raise InputError(f"{flag_name(name)} is {value!r}; it must be a whole number")
            if kind is float and not (is_number and abs(value) < math.inf):
                raise InputError(f"{flag_name(name)} is {value!r}; it must be a finite number")
            if kind in (bool, str) and not isinstance(value, kind):
                raise InputError(f"{flag_name(name)} is {value!r}; it must be a {kind.__name__}")

    def _refuse_targets(self) -> None:
        targets = self.target_actives
        if not targets:
            raise InputError("--target-actives is empty; give at least one number, such as 20")
        if len(set(targets)) < len(targets):
            raise InputError(
                f"--target-actives {list(targets)} names a target twice; give each once"
            )
        for target in targets:
            if not 0 < target < self.sae_latents:
                raise InputError(
                    f"--target-actives {target} must be positive and below --sae-latents "
                    f"{self.sae_latents}"
                )


KINDS = get_type_hints(Settings)
LARGEST = {  # of a setting; beyond, numbers overflow, or steps are no longer steps
    **dict.fromkeys("sae_latents hidden_units batch_sae batch_ffn topk n_eval".split(), 10**8),
    **dict.fromkeys("epochs_sae_final epochs_ffn features".split(), 10**8),
    **dict.fromkeys("stability_seeds workers".split(), 1000),
    **dict.fromkeys("lr_sae lr_ffn".split(), 1e38),
    "head_kl": 1000,  # at 1 the logits weigh as much as the reconstruction
    "weight_decay_ffn": 10,  # a step at the usual rate takes lr * decay of every weight
    "alpha": 10**6,
}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do."""


class TrainingError(RuntimeError):
    """Training left the finite numbers; the message says where, and what to lower."""


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is reported like every other wrong input: in one line."""

    def error(self, message: str) -> None:
        raise InputError(f"{' '.join(message.split())} (--help lists the flags)")


SWEPT = ("target_actives", "sae_latents")  # flags that take several values; and --seeds


def parse_runs(argv: Sequence[str] | None = None) -> list[Settings]:
    """Flags to Settings: of one run, or of one run for each seed and number of latents asked for.

    Raises InputError for values that cannot be used.
    """
    parser = OneLineParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = KINDS  # not those of the defaults: HEAD_KL = 0 is still a float
    for f in fields(Settings):
        kind: dict = {"type": types[f.name]}
        if types[f.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.name in SWEPT:
            kind = {"type": int, "nargs": "*"}
        parser.add_argument(flag_name(f.name), default=f.default, help=f.metadata["help"], **kind)
    what = "train every combination of these seeds, --target-actives and --sae-latents"
    parser.add_argument("--seeds", type=int, nargs="*", help=what)
    given = vars(parser.parse_args(argv))
    given["target_actives"] = tuple(given["target_actives"])
    seeds = given.pop("seeds")
    if seeds is not None and given["seed"] != SEED:
        raise InputError(f"--seed {given['seed']} and --seeds {seeds} are both given; give one")
    seeds = [given["seed"]] if seeds is None else seeds
    latents = given["sae_latents"]
    latents = [latents] if isinstance(latents, int) else latents
    for name, values in (("seeds", seeds), ("sae_latents", latents)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{flag_name(name)} {values} must name at least one value, each once")
    runs = []
    for seed, n in itertools.product(seeds, latents):
        runs.append(Settings(**{**given, "seed": seed, "sae_latents": n}))
    return runs


def flags_of(settings: Settings) -> list[str]:
    """The flags that give these settings."""
    flags = []
    for f in fields(Settings):
        value = getattr(settings, f.name)
        if value == f.default or f.name in ("fresh", "wait"):
            continue
        if isinstance(value, bool):
            flags.append(flag_name(f.name) if value else f"--no-{flag_name(f.name)[2:]}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [flag_name(f.name), *map(str, values)]
    return flags


def pick_device(name: str) -> torch.device:
    """'auto' to the best device of this machine. Raises InputError for one it does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")  # without an index
    n_devices = torch.cuda.device_count()
    if not 0 <= (device.index or 0) < n_devices:
        raise InputError(
            f"--device {name}: this machine shows {n_devices} CUDA devices; use --device cpu"
        )
    return device


def make_cuda_repeatable() -> None:
    """The same bits again; one thread of a CPU gives them anyway, and asking costs a second."""
    # CUDA's matrix products repeat themselves only with this.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


# --------------------------------------------------------------------------------------------------
# Training, what both networks share
# --------------------------------------------------------------------------------------------------


FULL_TRAIN_IMAGES = 48_000  # of MNIST, in passes over which epochs are counted


def scaled_epochs(epochs: int, n_train: int) -> int:
    """Passes over `n_train` images that make about as many steps as `epochs` over the full set."""
    return max(1, round(epochs * FULL_TRAIN_IMAGES / n_train))


def batches(n: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors (B,) of `epochs` shuffled passes over `n` images; an incomplete last batch is
    left out."""
    batch_size = min(batch_size, n)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator, device=generator.device)
        yield from order[: n - n % batch_size].split(batch_size)


def n_steps(n: int, batch_size: int, epochs: int) -> int:
    """How many batches `batches` yields."""
    return epochs * (n // min(batch_size, n))


def ramp(progress: float, rise_until: float, fall_from: float) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up from 0, flat at 1, linear to 0."""
    return min(1.0, progress / rise_until, (1 - progress) / (1 - fall_from))


def progress_bar(plan: Iterable, what: str, steps: int) -> Iterable:
    """A bar where somebody watches, and only for the process that they started."""
    if multiprocessing.parent_process() is not None:
        return plan
    return tqdm(plan, what, steps, leave=False, disable=None)


class Adam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019).

    torch.optim would do, but its first optimizer imports PyTorch's compiler, which takes longer
    than training the classifier.
    """

    BETA1 = 0.9
    BETA2 = 0.99  # 0.999 would average over more steps than a short training has
    EPSILON = 1e-8

    def __init__(self, weights: Sequence[Tensor], weight_decay: float = 0.0):
        self.weights = list(weights)
        self.weight_decay = weight_decay
        self.mean = [torch.zeros_like(w) for w in self.weights]
        self.square = [torch.zeros_like(w) for w in self.weights]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        self.steps += 1
        correction1 = 1 - self.BETA1**self.steps
        correction2 = math.sqrt(1 - self.BETA2**self.steps)
        moments = zip(self.weights, gradients, self.mean, self.square, strict=True)
        for weight, gradient, mean, square in moments:
            mean.lerp_(gradient, 1 - self.BETA1)
            square.mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
            if self.weight_decay:
                weight.mul_(1 - lr * self.weight_decay)
            spread = square.sqrt().add_(self.EPSILON * correction2)
            weight.addcdiv_(mean, spread, value=-lr * correction2 / correction1)


CHECK_EVERY = 250  # steps between two looks at the loss: each makes a GPU wait


def refuse_divergence(losses: Tensor, step: int, stage: str, flag: str, rate: float) -> None:
    """Every CHECK_EVERY steps and at the last: raise TrainingError naming the first step whose
    loss is not finite. `losses` (steps,) holds those of the steps 0 to `step`."""
    if (step + 1) % CHECK_EVERY and step + 1 < len(losses):
        return
    bad = torch.nonzero(~torch.isfinite(losses[: step + 1])).flatten()
    if len(bad):
        raise TrainingError(
            f"{stage} diverged: its loss is not finite at step {int(bad[0])}; "
            f"lower {flag} (now {rate})"
        )


def refuse_bad_weights(module: nn.Module, stage: str, flag: str, rate: float) -> None:
    """Raise TrainingError when the last step, whose loss nobody sees any more, broke the
    weights."""
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise TrainingError(
            f"{stage} diverged: its weights are not finite after the last step; "
            f"lower {flag} (now {rate})"
        )


# --------------------------------------------------------------------------------------------------
# Classifier
# --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """logits = W2 relu(z) + b2 with preactivations z = W1 (x - pixel_mean) + b1.

    The mean image is subtracted because centred inputs let the first layer learn several times
    faster. The analysis uses `preactivations` and `logits_from_preactivations`, and nothing else.
    """

    def __init__(self, n_pixels: int = 784, hidden_units: int = 128, n_classes: int = 10):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(n_pixels))
        self.hidden = nn.Linear(n_pixels, hidden_units)
        self.head = nn.Linear(hidden_units, n_classes)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, 1, H, W) -> z (B, d_in)

        Once trained, it raises ValueError for ink that does not run from 0 to 1.
        """
        if not self.training and len(images):
            low, high = images.aminmax()
            if not (low > -0.01 and high < 1.01):
                raise ValueError(f"ink runs from {low:g} to {high:g}, but must from 0 to 1")
        return self.hidden(images.flatten(1) - self.pixel_mean)

    def logits_from_preactivations(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> logits (B, C)"""
        return self.head(F.relu(z))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_from_preactivations(self.preactivations(images))


def new_classifier(sizes: tuple[int, int, int], seed: int, device: torch.device) -> Classifier:
    """An untrained one of so many pixels, hidden units and classes. nn.Linear draws from torch's
    own generator, which is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return Classifier(*sizes).to(device)


def train_classifier(
    train: Split, settings: Settings, n_classes: int = 10
) -> tuple[Classifier, list[dict]]:
    """Cross entropy, AdamW, one cycle of the learning rate; the classifier, and its course as lines
    of run.log.jsonl. Raises TrainingError on divergence."""
    device, n = train.labels.device, len(train.labels)
    sizes = (train.images[0].numel(), settings.hidden_units, n_classes)
    model = new_classifier(sizes, settings.seed, device)
    model.pixel_mean.copy_(train.images.flatten(1).mean(0))
    weights = list(model.parameters())
    optimizer = Adam(weights, settings.weight_decay_ffn)

    generator = torch.Generator(device).manual_seed(settings.seed)
    epochs = scaled_epochs(settings.epochs_ffn, n)
    steps = n_steps(n, settings.batch_ffn, epochs)
    losses = torch.zeros(steps, device=device)
    plan = batches(n, settings.batch_ffn, epochs, generator)
    blame = ("classifier training", "--lr-ffn", settings.lr_ffn)
    logged, passed = logged_steps(steps), []
    started = time.perf_counter()

    for step, index in enumerate(progress_bar(plan, "classifier", steps)):
        loss = F.cross_entropy(model(train.images[index]), train.labels[index])
        gradients = torch.autograd.grad(loss, weights)
        optimizer.step(gradients, settings.lr_ffn * ramp((step + 0.5) / steps, 0.2, 0.2))
        losses[step] = loss.detach()
        if step in logged:
            passed.append(time.perf_counter() - started)
        refuse_divergence(losses, step, *blame)
    refuse_bad_weights(model, *blame)
    kept = {"step": list(logged), "loss": losses[list(logged)].tolist()}
    lines = log_lines("classifier", kept, passed)
    return model.requires_grad_(False).eval(), lines


class Preactivations(NamedTuple):
    """Raw preactivations (N, d_in) of each split, and what standardises them, (d_in,) each."""

    train: Tensor
    val: Tensor
    test: Tensor
    mu: Tensor
    std: Tensor

    def standardised(self, split: str) -> Tensor:
        """z = (raw - mu) / std of "train", "val" or "test", (N, d_in)."""
        return (getattr(self, split) - self.mu) / self.std


@torch.no_grad()
def collect_preactivations(model, data: Data, normalize: bool) -> Preactivations:
    """The network's preactivations for every image. Without `normalize`, mu = 0 and std = 1.

    A unit that never varies gets std = 1: it carries nothing, and dividing by zero would spread
    NaN. Raises InputError where none does.
    """
    raw = []
    for split in (data.train, data.val, data.test):
        parts = [model.preactivations(images) for images, _ in TensorLoader(split)]
        raw.append(torch.cat(parts))
    train = raw[0]
    low, high = train.aminmax(dim=0)
    if (high - low).max() <= 1e-6 * train.abs().max():
        raise InputError(
            f"the layer gives the same for all {len(train):,} training images, so there is "
            f"nothing to explain; are these images blank, or all alike?"
        )
    mu, std = torch.zeros_like(train[0]), torch.ones_like(train[0])
    if normalize:
        mu, std = train.mean(0), train.std(0)
        std = usable_std(std)
    return Preactivations(*raw, mu, std)


def usable_std(std: Tensor) -> Tensor:
    """std (d_in,) with 1 for units that never vary."""
    return torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))


class Mapped(NamedTuple):
    """Standardised preactivations in a file that is mapped into memory: rows are read when they are
    used, so there may be more than fit into memory."""

    z: Tensor  # (N, d_in) float32, on the CPU
    mu: Tensor  # (d_in,)
    std: Tensor  # (d_in,)


def map_rows(path: str | Path, d_in: int) -> Tensor:
    """The rows (N, d_in) of a file of float32 without a header; what is written to them is written
    to the file."""
    n = Path(path).stat().st_size // 4
    return torch.from_file(str(path), shared=True, size=n).view(-1, d_in)


@torch.no_grad()
def memory_mapped_preactivations(
    model, loader: Iterable, path: str | Path, frame: tuple[Tensor, Tensor] | None = None
) -> Mapped:
    """Standardised preactivations of the loader's images, batch by batch into the file `path`.

    `model` and `loader` are as in feature_analysis. `frame` is the mu and std of other images; by
    default they are those of these. The file is there whole or not at all. Raises ValueError for an
    empty loader.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            for images, _ in loader:
                raw = model.preactivations(images).float().cpu().contiguous()
                file.write(raw.numpy())
        if unfinished.stat().st_size == 0:
            raise ValueError(fa.EMPTY_LOADER)
        z = map_rows(unfinished, raw.shape[1])
        if frame is None:
            mean, products = mean_and_products(z)
            std = (products.diagonal() / (len(z) - 1)).sqrt()
            frame = mean.float(), usable_std(std).float()
        mu, std = (value.cpu() for value in frame)
        for chunk in z.split(EVAL_ROWS):
            chunk.sub_(mu).div_(std)
        del z, chunk  # no file that is mapped can be renamed on Windows
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Mapped(map_rows(path, len(mu)), mu, std)


# --------------------------------------------------------------------------------------------------
# SAE
# --------------------------------------------------------------------------------------------------


class JumpReLUSAE(nn.Module):
    """Sparse autoencoder of standardised preactivations z.

        pre   = z W_enc + b_enc                 (B, d_sae)
        f     = pre * 1[pre > threshold]        (B, d_sae), threshold >= 0
        z_hat = f W_dec + b_dec                 (B, d_in), rows of W_dec of unit norm

    The same three lines run in training, in evaluation and in whatever loads the saved weights.
    Parameters: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,); buffer:
    threshold (d_sae,).
    """

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))

    def pre_threshold(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> pre (B, d_sae)"""
        return torch.addmm(self.b_enc, z, self.W_enc)

    def jump(self, pre: Tensor) -> Tensor:
        """pre (B, d_sae) -> feature_acts (B, d_sae); gradients flow where a feature is active"""
        # Compared into numbers: on CPUs four times faster than into booleans.
        active = torch.gt(pre.detach(), self.threshold, out=torch.empty_like(pre))
        return pre * active

    def encode(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> feature_acts (B, d_sae)"""
        return self.jump(self.pre_threshold(z))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts (B, d_sae) -> z_hat (B, d_in)"""
        return torch.addmm(self.b_dec, feature_acts, self.W_dec)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(self.encode(z))


STREAMED = 2**25  # entries of z from which its rows are read when they are needed, never all


def is_streamed(z: Tensor) -> bool:
    return z.numel() > STREAMED


def mean_and_products(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d_in,) of the rows of z (N, d_in) and the products (d_in, d_in) of its centred columns,
    float64, a chunk at a time."""
    chunks = z.split(EVAL_ROWS)
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in chunks) / len(z)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=z.device)
    for chunk in chunks:
        centred = chunk - mean
        products.addmm_(centred.T, centred)
    return mean, products


class TrainingFrame(NamedTuple):
    """Coordinates the SAE is trained in: x = (z - center) @ basis / scale, centred, mean square 1.

    The basis holds the principal directions of z. A rotation changes neither the model nor the
    loss, but Adam scales every coordinate by itself, so in these coordinates it can give quiet
    directions the larger steps they need: FVU at L0 20 falls by about a tenth. Thresholds and
    lambda become independent of the scale of z.
    """

    center: Tensor  # (d_in,)
    basis: Tensor  # (d_in, d_in), orthonormal columns
    scale: Tensor  # ()

    @classmethod
    def of(cls, z: Tensor) -> TrainingFrame:
        if is_streamed(z):
            center, products = mean_and_products(z)
            _, basis = torch.linalg.eigh(products)
            scale = (products.trace() / z.numel()).sqrt()
            return cls(center.float(), basis.float(), scale.float())
        center = z.mean(0)
        centred = z - center
        _, basis = torch.linalg.eigh(centred.T @ centred)
        return cls(center, basis, centred.square().mean().sqrt())

    def enter(self, z: Tensor) -> Tensor:
        return (z - self.center) @ self.basis / self.scale

    def leave(self, x: Tensor) -> Tensor:
        return torch.addmm(self.center, x, self.basis.T * self.scale)

    @torch.no_grad()
    def fold(self, sae: JumpReLUSAE) -> JumpReLUSAE:
        """The SAE of x written as an SAE of z: the same features, activations times scale."""
        folded = JumpReLUSAE(*sae.W_enc.shape).to(sae.W_enc.device)
        folded.W_enc.copy_(self.basis @ sae.W_enc)
        folded.b_enc.copy_(sae.b_enc * self.scale - self.center @ folded.W_enc)
        folded.W_dec.copy_(sae.W_dec @ self.basis.T)
        folded.b_dec.copy_(self.leave(sae.b_dec[None])[0])
        folded.threshold.copy_(sae.threshold * self.scale)
        return folded.requires_grad_(False)


class Steering(NamedTuple):
    """How training is steered. This belongs to the method rather than to a run: no flags."""

    start_l0_factor: float = 4.0  # it starts so many times denser, so that every latent finds a use
    l0_settled_at: float = 0.3  # share of training after which the target itself is aimed at
    start_threshold: float = 0.5  # sqrt(lambda) at the start, in units of x
    head_from: float = 0.5  # share of training after which the logits count: earlier they slow it
    head_temperature: float = 4.0  # softened logits compare all classes on all images
    rare_below: float = 1 / 16  # a latent below this share of the mean density is dying: helped
    rare_coefficient: float = 0.2  # weight of that help; from 0.1 to 0.3 little depends on it
    rare_every: int = 4  # steps between two such helps: at all of them a fifth more work
    rare_at_once: int = 32  # at most so many rare latents explain one image
    rare_share: float = 0.25  # at most this share of the latents is helped at a time, the rarest
    fair_share: float = 1.25  # latents below this share of the mean density pay less lambda
    busy_density: float = 0.25  # latents that fire on a larger share of the images pay more lambda


STEERING = Steering()


class LambdaController:
    """Finds the lambda that gives the L0 asked for, while the SAE trains.

    The objective is  ||x - x_hat||^2 + lambda * L0  per image. With unit decoder rows, keeping a
    feature whose activation is a lowers the first term by about a^2 and costs lambda, so the best
    threshold is sqrt(lambda) (hard thresholding, Blumensath & Davies 2008). Raising lambda
    therefore lowers L0 at once, and a proportional-integral controller on log sqrt(lambda) holds
    L0 at its target: no trial runs, no coefficient to tune.

    Everything is a tensor of shape () on the device: a step costs no synchronisation.
    """

    INTEGRAL = 0.1  # gain on log(L0 / target), per step
    PROPORTIONAL = 0.3  # gain on its change
    MEMORY = 0.9  # of the L0 average, per step
    LEAST = 0.005  # threshold: from further down it would not find back before training ends

    def __init__(self, start_l0: float, device: torch.device):
        self.log_threshold = torch.tensor(math.log(STEERING.start_threshold), device=device)
        self.l0 = torch.tensor(start_l0, device=device)
        self.error = torch.zeros((), device=device)

    def threshold(self) -> Tensor:
        """sqrt(lambda), ()"""
        return self.log_threshold.exp()

    def observe(self, l0: Tensor, target: float) -> None:
        """One step: the batch had `l0` active features per image, `target` are wanted."""
        self.l0 = torch.lerp(l0, self.l0, self.MEMORY)
        error = torch.log(self.l0.clamp(min=1e-2) / target)
        change = self.INTEGRAL * error + self.PROPORTIONAL * (error - self.error)
        self.log_threshold = (self.log_threshold + change).clamp(min=math.log(self.LEAST))
        self.error = error


def l0_target_at(progress: float, target: float, d_sae: int) -> float:
    """Mean active features aimed at: from a multiple of the target geometrically down to it."""
    start = max(target, min(STEERING.start_l0_factor * target, d_sae / 2))
    return target * (start / target) ** max(0.0, 1 - progress / STEERING.l0_settled_at)


def initial_rows(x: Tensor, d_sae: int, generator: torch.Generator) -> Tensor:
    """Unit decoder rows (d_sae, d_in) to start from: towards images drawn at random, with quiet
    coordinates of x (N, d_in) amplified; beyond the N-th in random directions.

    Starting from images rather than from random directions, more features are found again when
    another seed draws other images.
    """
    spread = x.std(0)
    drawn = torch.randperm(len(x), generator=generator, device=generator.device)[:d_sae]
    towards_images = x[drawn] / spread.clamp(min=1e-3 * spread.max()).sqrt()
    further = (d_sae - len(drawn), x.shape[1])
    others = torch.randn(further, generator=generator, device=generator.device)
    return F.normalize(torch.cat([towards_images, others]), dim=1)


def starting_images(z: Tensor, frame: TrainingFrame, generator: torch.Generator) -> Tensor:
    """Images (n, d_in) in the coordinates of `frame` among which training starts: all of z
    (N, d_in), or where it is streamed as many as are held in memory, drawn at random."""
    if not is_streamed(z):
        return frame.enter(z)
    order = torch.randperm(len(z), generator=generator, device=generator.device)
    return frame.enter(z[order[: STREAMED // z.shape[1]]])


@torch.no_grad()
def initial_sae(rows: Tensor, x: Tensor, start_l0: float) -> JumpReLUSAE:
    """Decoder `rows` (d_sae, d_in), the encoder their transpose, every latent active on a share
    start_l0 / d_sae of `x` (N, d_in).

    The encoder is scaled so that the first reconstruction is as close to `x` as one number can
    make it.
    """
    d_sae, d_in = rows.shape
    sae = JumpReLUSAE(d_in, d_sae).to(x.device).requires_grad_(False)
    sae.W_dec.copy_(rows)
    projection = x @ sae.W_dec.T  # (N, d_sae)
    rank = int((1 - start_l0 / d_sae) * (len(x) - 1))
    columns = [some.T.contiguous() for some in projection.split(1024, dim=1)]
    cut = torch.cat([some.sort(dim=1).values[:, rank] for some in columns])  # (d_sae,)
    del columns
    active = (projection > cut).float()

    # Activations will be start + length * (projection - cut): least squares for the length.
    start = STEERING.start_threshold
    slope = ((projection - cut) * active) @ sae.W_dec
    rest = x - start * active @ sae.W_dec
    length = (slope * rest).sum() / slope.square().sum()
    sae.W_enc.copy_(length * sae.W_dec.T)
    sae.b_enc.copy_(start - length * cut)
    sae.threshold.fill_(start)
    return sae


# Gradients are written out rather than left to autograd, which takes a tenth longer. Tests compare
# them with autograd's.


def sae_gradients(
    sae: JumpReLUSAE, x: Tensor, feature_acts: Tensor, active: Tensor, d_x_hat: Tensor
) -> list[Tensor]:
    """Gradients of W_enc, b_enc, W_dec and b_dec, given that of the reconstruction.

    x, d_x_hat (B, d_in), feature_acts, active (B, d_sae), the latter 0 or 1. Through the jump the
    gradient flows where a feature is active; the thresholds have none: sqrt(lambda) sets them.
    """
    d_pre = (d_x_hat @ sae.W_dec.T).mul_(active)  # (B, d_sae)
    return [x.T @ d_pre, d_pre.sum(0), feature_acts.T @ d_x_hat, d_x_hat.sum(0)]


def soft_kl(teacher: Tensor, logits: Tensor) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), (B, C) each (Hinton et al. 2015)."""
    temperature = STEERING.head_temperature
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def head_gradient(
    teacher: Tensor, logits_of: Callable[[Tensor], Tensor], frame: TrainingFrame, x_hat: Tensor
) -> Tensor:
    """Gradient of the `soft_kl` between the logits (B, C) of x and of x_hat, for x_hat (B, d_in).

    Left to autograd, since the head may be any network.
    """
    with torch.enable_grad():
        leaf = x_hat.detach().requires_grad_(True)
        loss = soft_kl(teacher, logits_of(frame.leave(leaf)))
        return torch.autograd.grad(loss, leaf)[0]


def add_rare_gradients(
    gradients: list[Tensor],
    sae: JumpReLUSAE,
    x: Tensor,
    pre: Tensor,
    error: Tensor,
    density: Tensor,
    rare_below: float,
) -> None:
    """Pull latents that hardly fire towards what the others leave over (after AuxK, Gao et al.).

    The loss is rare_coefficient times the mean square of what remains of the residual -error
    (B, d_in) when, for each image, the rare latents with the largest pre (B, d_sae) explain it,
    threshold and sign of pre being ignored. Rare are those whose density (d_sae,) is below
    `rare_below`. `gradients` are those of `sae_gradients`.
    """
    n = max(1, round(STEERING.rare_share * len(density)))
    latents = density.topk(n, largest=False).indices
    rare = density[latents] < rare_below
    own = pre.index_select(1, latents)  # (B, n)
    candidates = own.masked_fill(~rare, -math.inf)
    cut = candidates.topk(min(STEERING.rare_at_once, n), dim=1).values[:, -1:]
    chosen = rare & (candidates >= cut)
    acts = torch.where(chosen, own, 0.0)

    rows = sae.W_dec.index_select(0, latents)  # (n, d_in)
    remaining = error + acts @ rows
    d_explained = remaining * (2 * STEERING.rare_coefficient / remaining.numel())
    d_pre = torch.where(chosen, d_explained @ rows.T, 0.0)
    d_W_enc, d_b_enc, d_W_dec, _ = gradients
    d_W_enc.index_add_(1, latents, x.T @ d_pre)
    d_b_enc.index_add_(0, latents, d_pre.sum(0))
    d_W_dec.index_add_(0, latents, acts.T @ d_explained)


class SAECourse(NamedTuple):
    """How training went: the first three (steps,), the others at the `logged_steps` only."""

    loss: Tensor  # of the reconstruction, share of variance
    l0: Tensor  # of the batch
    l0_coefficient: Tensor  # lambda
    dead: Tensor  # latents whose moving average of density is below DEAD_BELOW
    seconds: Tensor  # since training began; a GPU may still have work waiting that was counted

    @classmethod
    def of(cls, steps: int, device: torch.device) -> SAECourse:
        points = len(logged_steps(steps))
        return cls(*torch.zeros(3, steps, device=device), *torch.zeros(2, points, device=device))


DEAD_BELOW = 1e-5  # with 128 images in a batch: silent for the last 200 batches or more
COURSE_POINTS = 100  # about how many steps of a course are kept


def logged_steps(n: int) -> range:
    """About COURSE_POINTS of n steps, the last one included."""
    every = max(1, n // COURSE_POINTS)
    return range((n - 1) % every, n, every)


class SAETraining:
    """The state of one SAE's training; `step` takes it one batch further.

    x (N, d_in) in the coordinates of `frame`, teacher (N, C) the classifier's logits there; both
    are None where z is streamed. `logits_of` as in `train_sae`.
    """

    def __init__(
        self,
        z: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        target: float,
        settings: Settings,
        generator: torch.Generator,
    ):
        self.z = z
        self.logits_of = logits_of
        self.target = target
        self.settings = settings
        self.frame = TrainingFrame.of(z)
        self.x = self.teacher = None
        x = starting_images(z, self.frame, generator)
        if not is_streamed(z):
            self.x = x
            with torch.no_grad():  # the network may ask for gradients of its weights
                self.teacher = torch.cat([logits_of(chunk) for chunk in z.split(EVAL_ROWS)])
        d_sae = settings.sae_latents
        start_l0 = l0_target_at(0, target, d_sae)
        rows = initial_rows(x, d_sae, generator)
        self.sae = initial_sae(rows, x[: 16 * settings.batch_sae], start_l0)
        sae = self.sae
        self.optimizer = Adam([sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
        self.controller = LambdaController(start_l0, z.device)
        # Moving average of how often each latent fires.
        self.density = torch.full((d_sae,), start_l0 / d_sae, device=z.device)

    def rows(self, index: Tensor) -> Tensor:
        """x (B, d_in) of the images `index` (B,)"""
        if self.x is None:
            return self.frame.enter(self.z[index])
        return self.x.index_select(0, index)  # faster than self.x[index]

    def teacher_of(self, index: Tensor) -> Tensor:
        """The classifier's logits (B, C) of the images `index` (B,)"""
        return self.logits_of(self.z[index]) if self.teacher is None else self.teacher[index]

    def dead(self) -> Tensor:
        """() how many latents hardly fire any more"""
        return (self.density < DEAD_BELOW).sum()

    @torch.no_grad()
    def step(self, index: Tensor, number: int, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """One step on the images `index` (B,); returns loss, L0 and lambda, () each."""
        sae, settings = self.sae, self.settings
        l0_target = l0_target_at(progress, self.target, settings.sae_latents)
        l0_coefficient = (self.controller.threshold() * self.frame.scale).square()
        sae.threshold.copy_(self.thresholds(l0_target))

        x = self.rows(index)  # (B, d_in)
        pre = sae.pre_threshold(x)  # (B, d_sae)
        feature_acts = sae.jump(pre)
        active = feature_acts.sign()  # 1 or 0: activations are positive or 0
        x_hat = sae.decode(feature_acts)
        error = x_hat - x
        loss = error.square().mean()  # 1 for a constant prediction: x has mean square 1
        d_x_hat = error * (2 / error.numel())
        if settings.head_kl and progress > STEERING.head_from:
            d_head = head_gradient(self.teacher_of(index), self.logits_of, self.frame, x_hat)
            d_x_hat.add_(d_head, alpha=settings.head_kl)
        gradients = sae_gradients(sae, x, feature_acts, active, d_x_hat)
        if number % STEERING.rare_every == 0:
            below = STEERING.rare_below * self.target / settings.sae_latents
            add_rare_gradients(gradients, sae, x, pre, error, self.density, below)
        self.optimizer.step(gradients, settings.lr_sae * ramp(progress, 0.02, 0.3))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))

        fired = active.mean(0)  # (d_sae,)
        self.density.lerp_(fired, 0.01)
        l0 = fired.sum()
        self.controller.observe(l0, l0_target)
        return loss, l0, l0_coefficient

    def thresholds(self, l0_target: float) -> Tensor:
        """(d_sae,) sqrt(lambda) for a latent that has its fair share of the work.

        A latent's lambda is proportional to its density below that share, so rare ones are cheap
        to use, and above busy_density (or twice the mean asked for, if that is more), so that none
        does what several could share.
        """
        d_sae = self.settings.sae_latents
        rare = (self.density / (STEERING.fair_share * l0_target / d_sae)).clamp(max=1)
        busy = (self.density / max(STEERING.busy_density, 2 * self.target / d_sae)).clamp(min=1)
        return self.controller.threshold() * (rare * busy).sqrt()


def train_sae(
    z: Tensor, logits_of: Callable[[Tensor], Tensor], target: float, settings: Settings
) -> tuple[JumpReLUSAE, SAECourse]:
    """An SAE of `z` (N, d_in) with `target` active features per image on average, in one run.

    `logits_of` maps standardised preactivations (B, d_in) to the classifier's logits (B, C).
    Raises TrainingError on divergence. The lambda of the course is the base price in
    ||z - z_hat||^2 + sum_k price_k 1[f_k > 0]; rare latents pay less and busy ones more, see
    `SAETraining.thresholds`. Of a z that `is_streamed` rows are read when a step needs them, so
    that it may be mapped from a file, as by `memory_mapped_preactivations`.
    """
    generator = torch.Generator(z.device).manual_seed(settings.seed)
    epochs = scaled_epochs(settings.epochs_sae_final, len(z))
    steps = n_steps(len(z), settings.batch_sae, epochs)
    course, logged = SAECourse.of(steps, z.device), logged_steps(steps)
    blame = (f"SAE training for {target} actives", "--lr-sae", settings.lr_sae)

    training = SAETraining(z, logits_of, target, settings, generator)
    plan = batches(len(z), settings.batch_sae, epochs, generator)
    started = time.perf_counter()
    for number, index in enumerate(progress_bar(plan, f"SAE, {target} active", steps)):
        measured = training.step(index, number, (number + 0.5) / steps)
        for record, value in zip(course[:3], measured, strict=True):
            record[number] = value
        if number in logged:
            point = logged.index(number)
            course.dead[point] = training.dead()
            course.seconds[point] = time.perf_counter() - started
        refuse_divergence(course.loss, number, *blame)
    refuse_bad_weights(training.sae, *blame)
    return training.frame.fold(training.sae), course


# --------------------------------------------------------------------------------------------------
# Calibration of the thresholds
# --------------------------------------------------------------------------------------------------

EVAL_ROWS = 4096  # rows at once where preactivations are evaluated: bounds the memory
EVAL_ENTRIES = 2**21  # activations at once: larger pieces of memory are slow to get


def chunks_for(sae: JumpReLUSAE, z: Tensor) -> tuple[Tensor, ...]:
    """z (N, d_in) in pieces for which an SAE of so many latents is evaluated at once."""
    return z.split(max(1, min(EVAL_ROWS, EVAL_ENTRIES // len(sae.threshold))))


@torch.no_grad()
def mean_actives(sae: JumpReLUSAE, z: Tensor) -> float:
    """L0: mean number of active features over z (N, d_in)."""
    active = sum(int((sae.encode(chunk) > 0).sum()) for chunk in chunks_for(sae, z))
    return active / len(z)


HALF = 2**16  # values of the upper or the lower half of a float's 32 bits


def in_order(bits: Tensor) -> Tensor:
    """The bits of float32 values as int32 in the values' order, and back: its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def largest_at(ranks: Tensor, values: Callable[[], Iterable[Tensor]]) -> Tensor | None:
    """The values of these `ranks` (n,), 1 being the largest, or None where there are fewer.

    `values` gives all of them, float32 in pieces (m,), and is called twice. First they are counted
    by the upper half of their bits, then by the lower half those that agree with a wanted one in
    the upper: exact, at a cost proportional to their number and in memory that is not.
    """
    upper = torch.zeros(HALF, dtype=torch.int64, device=ranks.device)  # the largest first
    for some in values():
        keys = in_order(some.view(torch.int32))
        upper += torch.bincount(HALF // 2 - 1 - (keys >> 16), minlength=HALF)
    total = upper.cumsum(0)
    if total[-1] < ranks.max():
        return None
    at = torch.searchsorted(total, ranks)  # the first place with so many

    lower = upper.new_zeros(len(ranks), HALF)
    for some in values():
        keys = in_order(some.view(torch.int32))
        for counts, place in zip(lower, at, strict=True):
            agree = keys[HALF // 2 - 1 - (keys >> 16) == place]
            counts += torch.bincount(HALF - 1 - (agree & (HALF - 1)), minlength=HALF)
    rest = ranks - (total - upper)[at]
    within = torch.searchsorted(lower.cumsum(1), rest[:, None])[:, 0]
    keys = ((HALF // 2 - 1 - at) << 16) | (HALF - 1 - within)
    return in_order(keys.int()).view(torch.float32)


@torch.no_grad()
def threshold_shift(sae: JumpReLUSAE, z: Tensor, target: float) -> float:
    """What to add to every threshold so that `target` features are active per image of z (N, d_in).

    A feature is active when pre > max(threshold + shift, 0): when pre > 0 and its excess
    pre - threshold is above the shift. So the shift lies between the last of the target * N
    largest excesses and the next one: an order statistic. Where those two are equal no shift is
    exact, and theirs is returned, which leaves the tied ones out. When fewer pre are positive than
    asked for, the shift is -inf: every threshold becomes 0.
    """
    wanted = round(target * len(z))

    def excesses() -> Iterator[Tensor]:
        for chunk in chunks_for(sae, z):
            pre = sae.pre_threshold(chunk)
            yield (pre - sae.threshold)[pre > 0]

    ranks = torch.tensor([wanted, wanted + 1], device=z.device)
    found = largest_at(ranks, excesses)
    if found is None:
        return -math.inf
    last_in, first_out = found.tolist()  # float64 from here on
    return (last_in + first_out) / 2


@torch.no_grad()
def adjust_thresholds(sae: JumpReLUSAE, z: Tensor, target: float) -> tuple[JumpReLUSAE, float]:
    """A copy of the SAE with exactly `target` active features on z (N, d_in) unless excesses tie,
    and the shift."""
    shift = threshold_shift(sae, z, target)
    adjusted = copy.deepcopy(sae)
    adjusted.threshold.copy_((sae.threshold.double() + shift).clamp(min=0))
    return adjusted, shift


# --------------------------------------------------------------------------------------------------
# Fidelity: what the classifier loses when it must think through the SAE
# --------------------------------------------------------------------------------------------------

MODES = ("jumprelu", "boolean", "boolean_scaled")


class Usage(NamedTuple):
    """How the features are used on some images, (d_sae,) each: share of images, and mean
    activation when active."""

    feature_density: Tensor
    mean_activation: Tensor


@torch.no_grad()
def feature_usage(sae: JumpReLUSAE, z: Tensor) -> Usage:
    """Usage over z (N, d_in). The mean activation of a feature that never fires is 0."""
    d_sae = len(sae.threshold)
    counts = torch.zeros(d_sae, dtype=torch.int64, device=z.device)
    sums = torch.zeros(d_sae, dtype=torch.float64, device=z.device)
    for chunk in chunks_for(sae, z):
        feature_acts = sae.encode(chunk)
        counts += (feature_acts > 0).sum(0)
        sums += feature_acts.sum(0, dtype=torch.float64)
    return Usage(counts / len(z), (sums / counts.clamp(min=1)).float())


def reconstruct(sae: JumpReLUSAE, z: Tensor, mode: str, mean_activation: Tensor) -> Tensor:
    """z (B, d_in) through the SAE. `jumprelu`: as it is. `boolean`: an active feature counts 1.
    `boolean_scaled`: it counts its mean activation, (d_sae,)."""
    feature_acts = sae.encode(z)
    if mode != "jumprelu":
        feature_acts = (feature_acts > 0).float()
    if mode == "boolean_scaled":
        feature_acts = feature_acts * mean_activation
    return sae.decode(feature_acts)


class Fidelity(NamedTuple):
    """Of one way to reconstruct. Cross entropies are in nats."""

    accuracy: float
    agreement: float  # share of images on which the prediction stays the classifier's own
    cross_entropy: float
    ce_recovered: float | None  # 1: nothing of what mean ablation costs is lost; None: it is free
    kl: float  # mean KL(classifier || classifier through the SAE)
    fvu: float  # sum ||z - z_hat||^2 / sum ||z - mean(z)||^2, the mean over these same images


@torch.no_grad()
def fidelity(
    z: Tensor, z_hat: Tensor, labels: Tensor, logits_of: Callable, z_mean: Tensor
) -> Fidelity:
    """The classifier on z_hat (N, d_in) against the classifier on z; mean ablation uses `z_mean`
    (d_in,).

    ce_recovered = (CE(mean) - CE(z_hat)) / (CE(mean) - CE(z)), as in Bricken et al. 2023.
    """
    logits, logits_hat = logits_of(z), logits_of(z_hat)
    logits_mean = logits_of(z_mean[None]).expand_as(logits)
    ce = F.cross_entropy(logits, labels).item()
    ce_hat = F.cross_entropy(logits_hat, labels).item()
    ce_mean = F.cross_entropy(logits_mean, labels).item()
    log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(logits_hat, 1)
    predicted = logits_hat.argmax(1)
    return Fidelity(
        accuracy=(predicted == labels).double().mean().item(),
        agreement=(predicted == logits.argmax(1)).double().mean().item(),
        cross_entropy=ce_hat,
        ce_recovered=(ce_mean - ce_hat) / (ce_mean - ce) if ce_mean != ce else None,
        kl=F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
        fvu=((z - z_hat).square().sum() / (z - z.mean(0)).square().sum()).item(),
    )


def principal_reconstruction(z_train: Tensor, z: Tensor, n: int) -> Tensor:
    """z (N, d_in) through the n strongest principal directions of z_train about its mean: the
    plainest alternative to an SAE with n active features."""
    frame = TrainingFrame.of(z_train)
    strongest = frame.basis[:, -n:]  # eigenvalues ascend
    return frame.center + (z - frame.center) @ strongest @ strongest.T


BUSY = 0.1  # a feature that fires on a larger share of the images is dense


@torch.no_grad()
def measure(trained: TrainedSAE, subject: Subject, labels: Tensor, target: int) -> dict:
    """Everything summary.json says about one SAE's fidelity, on the test images with `labels`
    (N,), beside that of `target` principal components."""
    pre, logits_of = subject.pre, subject.logits_of
    z_train, z_val, z_test = (pre.standardised(split) for split in ("train", "val", "test"))
    usage, z_mean = feature_usage(trained.sae, z_train), z_train.mean(0)

    def through(sae: JumpReLUSAE, mode: str) -> Fidelity:
        chunks = z_test.split(EVAL_ROWS)
        z_hat = torch.cat([reconstruct(sae, z, mode, usage.mean_activation) for z in chunks])
        return fidelity(z_test, z_hat, labels, logits_of, z_mean)

    by_mode = {mode: through(trained.sae, mode) for mode in MODES}
    baseline = fidelity(z_test, z_test, labels, logits_of, z_mean)
    active = [(trained.sae.encode(z) > 0).sum(1) for z in z_test.split(EVAL_ROWS)]
    l0 = torch.cat(active).double()
    jump = by_mode["jumprelu"]
    z_pca = principal_reconstruction(z_train, z_test, target)
    pca = fidelity(z_test, z_pca, labels, logits_of, z_mean)
    few = target < z_test.shape[1]  # as many components as dimensions leave rounding errors only
    disagreement, disagreement_pca = 1 - jump.agreement, 1 - pca.agreement
    density = usage.feature_density
    dense, fired = density > BUSY, density.sum()
    return {
        "achieved_actives_before_shift": mean_actives(trained.before, z_val),
        "achieved_actives_val": mean_actives(trained.sae, z_val),
        "achieved_actives_test": l0.mean().item(),
        "l0_std_test": l0.std().item(),
        "baseline_acc": baseline.accuracy,
        "baseline_ce": baseline.cross_entropy,
        **{f"recon_acc_{mode}": by_mode[mode].accuracy for mode in MODES},
        **{f"delta_acc_{mode}": baseline.accuracy - by_mode[mode].accuracy for mode in MODES},
        **{f"agreement_{mode}": by_mode[mode].agreement for mode in MODES},
        "fvu": jump.fvu,
        "ce": jump.cross_entropy,
        "ce_recovered": jump.ce_recovered,
        "kl": jump.kl,
        "before_shift": through(trained.before, "jumprelu")._asdict(),
        "dead_features": int((density == 0).sum()),
        "fvu_pca": pca.fvu,
        "agreement_pca": pca.agreement,
        "fvu_to_pca": jump.fvu / pca.fvu if few and pca.fvu else None,
        "disagreement_to_pca": disagreement / disagreement_pca
        if few and disagreement_pca
        else None,
        "dense_features": int(dense.sum()),
        "dense_share_of_l0": (density[dense].sum() / fired).item() if fired else None,
        "rare_features": int((density < 0.001).sum()),
    }


# --------------------------------------------------------------------------------------------------
# Whole jobs on free cores
# --------------------------------------------------------------------------------------------------

MOST_WORKERS = 7  # each holds a few hundred MB, and a run has few jobs that wait for one


def available_cores() -> int:
    """Those this process may use, where the system tells; otherwise all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """torch with so many threads, and as it was afterwards.

    Two threads wait for each other at every small product: little gain on idle cores, ten times
    slower when something else uses one of them. With one, results do not depend on the machine's
    number of cores either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Where Python lets signals be set: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _become_worker() -> None:
    """What a worker does first: one thread, Ctrl-C left to the parent, no life after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def leave_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _timed(function: Callable, args: tuple) -> tuple[object, float]:
    started = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - started


def _run_pickled(job: bytes) -> bytes:
    """Pickled by hand: multiprocessing would put tensors into shared memory, of which containers
    have little."""
    try:
        return pickle.dumps(_timed(*pickle.loads(job)))
    except Exception as error:
        raise _portable(error) from error


def _portable(error: Exception) -> Exception:
    """The error, or what it says where it cannot travel: the pool would call the worker dead."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass(eq=False)
class Job:
    """A function with its arguments, and what has become of them."""

    name: str
    function: Callable
    args: tuple
    pickled: bytes = b""  # both, for a worker
    future: Future | None = None  # of the worker that runs it
    outcome: tuple[object, float] | None = None  # result and seconds


class Jobs:
    """Runs jobs in worker processes while this process goes on; a context manager.

    A job that no worker has begun when its result is needed is run here, and without workers all
    are: what comes out is the same. Functions and arguments must be picklable, and a script that
    uses this needs the usual `if __name__ == "__main__"`.
    """

    def __init__(self, workers: int):
        self.seconds: dict[str, float] = {}  # by name, wherever the jobs ran
        self.waiting: list[Job] = []  # for a worker
        self.idle = workers
        self.lock = threading.RLock()  # a job that is done at once calls back while it is held
        self.pool = None
        others = set(multiprocessing.active_children())
        if workers:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, spawn, _become_worker)
            with ctrl_c_ignored():  # inherited by workers: it is for the parent to say something
                for _ in range(workers):
                    self.pool.submit(os.getpid)  # starts one, which imports what it will need
        self.processes = set(multiprocessing.active_children()) - others

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_) -> None:
        with self.lock:
            self.waiting.clear()
        if self.pool is not None:
            for process in self.processes:  # nobody waits for them any more
                process.terminate()
            self.pool.shutdown(cancel_futures=True)

    def start(self, name: str, function: Callable, *args, here: bool = False) -> Job:
        """Let a worker run `function(*args)`; with `here`, leave it until its result is needed."""
        job = Job(name, function, args)
        if self.pool is not None and not here:
            try:
                job.pickled = pickle.dumps((function, args))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise InputError(
                    f"{name} cannot be sent to worker processes ({error}); use --workers 0"
                ) from error
            with self.lock:
                self.waiting.append(job)
                self._feed()
        return job

    def _feed(self) -> None:
        """Give waiting jobs to idle workers, never more: the pool would queue them, and what is
        queued there cannot be taken back."""
        while self.waiting and self.idle:
            job = self.waiting.pop(0)
            self.idle -= 1
            job.future = self.pool.submit(_run_pickled, job.pickled)
            job.future.add_done_callback(self._worker_is_idle)

    def _worker_is_idle(self, _: Future) -> None:
        with self.lock, suppress(BrokenProcessPool):  # `results` raises it where it can be told
            self.idle += 1
            self._feed()

    def results(self, jobs: Sequence[Job]) -> list:
        """Of all `jobs`, in their order. Those that no worker has begun are run here, the last one
        first.

        Raises what the functions raise, and BrokenProcessPool when a worker died.
        """
        for job in reversed(jobs):
            with self.lock:
                if job in self.waiting:
                    self.waiting.remove(job)
            if job.future is None:
                job.outcome = _timed(job.function, job.args)
        for job in jobs:
            if job.future is not None:
                job.outcome = pickle.loads(job.future.result())
            _, seconds = job.outcome
            self.seconds[job.name] = self.seconds.get(job.name, 0.0) + seconds
        return [result for result, _ in (job.outcome for job in jobs)]


# --------------------------------------------------------------------------------------------------
# Saving finished stages, and using them again
# --------------------------------------------------------------------------------------------------


def to_json(record: object) -> bytes:
    """Strict JSON: a NaN is an error here rather than in whoever reads the file."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def prepare_folder(folder: Path) -> None:
    """Make the folder and make sure that files can be written there. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be written to ({error.strerror}); choose another folder"
        ) from error


CLASSIFIER_SETTINGS = "hidden_units epochs_ffn batch_ffn lr_ffn weight_decay_ffn seed".split()
SAE_SETTINGS = "sae_latents epochs_sae_final batch_sae lr_sae head_kl normalize_z seed".split()


def chosen(settings: Settings, names: Sequence[str]) -> dict:
    return {name: getattr(settings, name) for name in names}


def code_below_settings() -> str:
    """This file from the end of the block of settings on: any edit may change what is trained."""
    source = Path(__file__).read_text(encoding="utf-8")
    _, below = source.split("\ndef setting(", 1)
    return below


def fingerprint(decisive: dict, **inputs: object) -> str:
    """SHA-256 over all that decides a stage's outcome: those settings, its inputs, the code."""
    everything = [decisive, inputs, code_below_settings(), torch.__version__]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class Stage(NamedTuple):
    """A stage as it was saved: its tensors, the record beside them, the tensors' SHA-256."""

    tensors: dict[str, Tensor]
    record: dict
    digest: str


SEAL = "record_sha256"


def sealed(record: dict) -> dict:
    """The record with the SHA-256 of all that it says, so that an edit of any of it is seen."""
    said = {name: value for name, value in record.items() if name != SEAL}
    return {SEAL: hashlib.sha256(to_json(said)).hexdigest(), **said}


def save_stage(folder: Path, name: str, tensors: dict[str, Tensor], record: dict) -> Stage:
    """Write name.safetensors and name.json, tensors first.

    The JSON holds the SHA-256 of the tensors: an interruption between the two leaves a pair that
    does not match.
    """
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    stored = safetensors.torch.save(on_cpu)
    digest = hashlib.sha256(stored).hexdigest()
    described = to_json(sealed({"sha256": digest, **record}))
    fa.write_whole(folder / f"{name}.safetensors", stored, durable=True)
    fa.write_whole(folder / f"{name}.json", described, durable=True)
    return Stage(on_cpu, record, digest)


# What a stage must hold: kinds of its record, shapes of its tensors, equal letters for equal sizes.
NAMED = {"sha256": str, SEAL: str, "fingerprint": str}
CHAIN = {"seed": int, "data_digest": str}  # what a stage was made from
CHAIN |= {"log_sha256": str}  # and the course of its training
RECORDS = {
    "classifier": {**NAMED, **CHAIN, "settings": dict[str, Any]},
    "sae": {
        **{**NAMED, **CHAIN, "classifier_sha256": str, "target_actives": int},
        **{"lambda": float, "threshold_shift": float | None},
    },
}
SHAPES = {
    "classifier": {
        **{"pixel_mean": "p", "hidden.weight": "ip", "hidden.bias": "i"},
        **{"head.weight": "ci", "head.bias": "c"},
    },
    "sae": {
        **{"W_enc": "is", "b_enc": "s", "W_dec": "si", "b_dec": "i", "mu": "i", "std": "i"},
        **{"threshold": "s", "threshold_before_shift": "s"},
    },
}


def refuse_odd_tensors(tensors: dict[str, Tensor], shapes: dict[str, str], **sizes: int) -> None:
    """Raise ValueError unless they are finite float32 of those shapes; `sizes` of letters that are
    known."""
    if shapes and set(tensors) != set(shapes):
        raise ValueError(f"it holds {sorted(tensors)}, not {sorted(shapes)}")
    for name, letters in shapes.items():
        tensor, shape = tensors[name], tuple(tensors[name].shape)
        expected = tuple(sizes.setdefault(*at) for at in zip(letters, shape, strict=False))
        if shape != expected or len(shape) != len(letters) or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} of shape {shape}, expected {expected}")
        if 0 in shape or not tensor.isfinite().all():
            raise ValueError(f"{name} is empty or not finite")
    for name in {"std", "threshold", "threshold_before_shift"} & set(tensors):
        if tensors[name].min() < 0 or (name == "std" and tensors[name].min() == 0):
            raise ValueError(f"{name} is too small: {tensors[name].min():g}")


def read_stage(folder: Path, name: str, **sizes: int) -> Stage:
    """Raises InputError when a file is missing, cannot be read, does not belong to the other, or
    holds something else than such a stage, of those sizes (letters of SHAPES)."""
    kind = name.split(".")[0]  # sae.kept-1 is an sae
    try:
        record = read_json((folder / f"{name}.json").read_bytes(), RECORDS.get(kind, NAMED))
        if record != sealed(record):
            raise ValueError(f"{name}.json was edited")
        stored = (folder / f"{name}.safetensors").read_bytes()
        digest = hashlib.sha256(stored).hexdigest()
        if record["sha256"] != digest:
            raise ValueError("the two files do not belong together")
        tensors = safetensors.torch.load(stored)
        refuse_odd_tensors(tensors, SHAPES.get(kind, {}), **sizes)
        return Stage(tensors, record, digest)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{name}.safetensors with {name}.json in {folder} is damaged or incomplete ({error})"
        ) from error


STAGE_FILES = ("safetensors", "json")


def has_stage(folder: Path, name: str) -> bool:
    """Whether there is any of its files."""
    return any((folder / f"{name}.{ending}").exists() for ending in STAGE_FILES)


def free_name(folder: Path, name: str) -> str:
    """The first name.kept-N that is free."""
    numbered = (f"{name}.kept-{n}" for n in itertools.count(1))
    return next(kept for kept in numbered if not has_stage(folder, kept))


def keep_aside(folder: Path, name: str) -> None:
    """Rename name.safetensors and name.json to their `free_name`."""
    kept = free_name(folder, name)
    for ending in STAGE_FILES:
        path = folder / f"{name}.{ending}"
        if path.exists():
            os.replace(path, folder / f"{kept}.{ending}")


def reusable_stage(
    folder: Path, name: str, expected: dict, fresh: bool, **sizes: int
) -> tuple[Stage | None, str]:
    """The saved stage if its record says what is `expected`, else None. And what to tell the user,
    if anything; where None comes with a word, the old one is to be kept aside."""
    if not has_stage(folder, name):
        return None, ""
    stage, reason = None, ""
    try:
        stage = read_stage(folder, name, **sizes)
        if {key: stage.record.get(key) for key in expected} != expected:
            reason = "it belongs to other settings, data or code"
    except InputError as error:
        reason = str(error)
    if reason:
        kept = free_name(folder, name)
        return None, f"{name}: retrained, because {reason}; the old one is kept as {kept}"
    if fresh:
        return None, ""
    return stage, f"{name}: reused, its settings and data did not change (--fresh retrains)"


LOG = "run.log.jsonl"  # the course of training, a JSON object a line


def log_lines(stage: str, columns: dict[str, list], seconds: list[float]) -> list[dict]:
    """Lines of run.log.jsonl: the step, the stage, the other columns, the seconds since it began,
    read without waiting for the device."""
    lines = []
    for place, passed in enumerate(seconds):
        measured = {name: values[place] for name, values in columns.items()}
        line = {"step": measured.pop("step"), "stage": stage, **measured}
        lines.append({**line, "seconds": round(passed, 3)})
    return lines


def read_log(folder: Path, stage: str) -> list[dict]:
    """The lines of a stage; none where there is no log. Raises InputError when it is damaged."""
    path = folder / LOG
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["stage"] == stage]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); move it away") from error


def digest_of_log(lines: Sequence[dict]) -> str:
    """SHA-256 of a stage's lines, but for the seconds, which are others each time."""
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return hashlib.sha256(json.dumps(timeless).encode()).hexdigest()


def log_of_stage(folder: Path, stage: str) -> list[dict]:
    """The lines of the stage that is saved there; none where the log holds those of another one.
    Raises InputError when the log is damaged."""
    lines = read_log(folder, stage)
    try:
        record = read_json((folder / f"{stage}.json").read_bytes(), CHAIN)
    except (OSError, ValueError):  # no such stage, so no lines of it
        return []
    return lines if digest_of_log(lines) == record["log_sha256"] else []


def write_log(folder: Path, stage: str, lines: Sequence[dict]) -> None:
    """Put the lines of a stage into the folder's log, in place of older ones; of the other stage
    stay those that belong to it."""
    by_stage = {name: log_of_stage(folder, name) for name in ("classifier", "sae")}
    by_stage[stage] = list(lines)
    rows = [json.dumps(line, allow_nan=False) for line in itertools.chain(*by_stage.values())]
    fa.write_whole(folder / LOG, "".join(f"{row}\n" for row in rows).encode())


# --------------------------------------------------------------------------------------------------
# The layout of SAELens 6 (decoderesearch/SAELens), in which the tools of the field exchange SAEs
# --------------------------------------------------------------------------------------------------

SAELENS_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SAELENS_DONE = ("normalize_activations", "reshape_activations")
SAELENS_LOADED = ("jumprelu", "standard", "topk")  # architectures that the analysis can take


class Coder(NamedTuple):
    """An SAE and the standardisation that it reads: what the functions of feature_analysis take
    between the loader and the number of a feature."""

    sae: JumpReLUSAE
    mu: Tensor  # (d_in,)
    std: Tensor  # (d_in,)


class TopKSAE(JumpReLUSAE):
    """An SAE whose k largest pre are active, where they are positive (Gao et al. 2024)."""

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__(d_in, d_sae)
        self.k = k

    def jump(self, pre: Tensor) -> Tensor:
        largest, place = pre.topk(self.k, dim=1)
        return torch.zeros_like(pre).scatter(1, place, largest.relu())


@torch.no_grad()
def on_raw(sae: JumpReLUSAE, mu: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The weights of an SAE that reads raw preactivations, and gives the same activations.

    With z = (raw - mu) / std:  W_enc / std,  b_enc - (mu / std) W_enc,  W_dec * std,
    b_dec * std + mu; in float64, rounded once.
    """
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, name).detach().cpu().double() for name in SAELENS_WEIGHTS[:4]
    )
    mu, std = mu.cpu().double(), std.cpu().double()
    weights = {
        "W_enc": W_enc / std[:, None],
        "b_enc": b_enc - (mu / std) @ W_enc,
        "W_dec": W_dec * std,
        "b_dec": b_dec * std + mu,
        "threshold": sae.threshold.cpu(),
    }
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def save_saelens(run: Run | fa.ExplainedLayer | Coder, folder: str | Path) -> None:
    """Write cfg.json and sae_weights.safetensors, which `SAE.load_from_disk` of SAELens 6 reads.

    `run` is anything with sae, mu and std. What is written reads raw preactivations. Raises
    InputError for an SAE without thresholds, or with some below 0: then activations may be
    negative, which those of SAELens never are.
    """
    if isinstance(run.sae, TopKSAE):
        raise InputError("an SAE with a fixed number of active features has no thresholds to save")
    if (run.sae.threshold < 0).any():
        lowest = run.sae.threshold.min().item()
        raise InputError(f"thresholds go down to {lowest:g}; SAELens has none below 0: raise them")
    folder = Path(folder)
    prepare_folder(folder)
    d_in, d_sae = run.sae.W_enc.shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0"},  # of the layout
    }
    weights = safetensors.torch.save(on_raw(run.sae, run.mu, run.std))
    fa.write_whole(folder / "sae_weights.safetensors", weights)
    fa.write_whole(folder / "cfg.json", to_json(config))


def load_saelens(folder: str | Path) -> Coder:
    """An SAE that SAELens 6 saved, JumpReLU, standard (ReLU) or TopK, for the analysis.

        fa.collect_feature_bank(model, loader, *load_saelens(folder))

    It reads raw preactivations: mu is 0 and std is 1. Raises InputError for a folder without such
    an SAE, and for one that does more to its input than subtracting b_dec, has an activation
    function of another kind, or tensors that its architecture does not know.
    """
    folder = Path(folder)
    try:
        kinds = {"architecture": str, "d_in": int, "d_sae": int}
        config = read_json((folder / "cfg.json").read_bytes(), kinds)
        weights = safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes())
        kind, d_in, d_sae = (config[name] for name in ("architecture", "d_in", "d_sae"))
        done = {config.get(name, "none") for name in SAELENS_DONE}  # to its input
        if kind not in SAELENS_LOADED or done != {"none"}:
            taken = ", ".join(SAELENS_LOADED)
            raise ValueError(f"it is {kind} with input {done}; {taken} on plain input are taken")
        refuse_other_tensors(weights, kind)
        if tuple(weights["W_enc"].shape) != (d_in, d_sae):
            raise ValueError(f"size mismatch: W_enc is {tuple(weights['W_enc'].shape)}")
        k = topk_of(config, kind)
        if k is not None and not 0 < k <= d_sae:
            raise ValueError(f"k is {k}; it must be from 1 to {d_sae}")
        sae = JumpReLUSAE(d_in, d_sae) if k is None else TopKSAE(d_in, d_sae, k)
        weights = {"threshold": torch.zeros(d_sae), **weights}
        sae.load_state_dict({name: weights[name].float() for name in SAELENS_WEIGHTS})
        if not all(bool(weights[name].isfinite().all()) for name in SAELENS_WEIGHTS):
            raise ValueError("its weights are not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} holds no SAE of SAELens that can be used ({reason})") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder}/sae_weights.safetensors is damaged ({error})") from error
    sae = as_plain(sae.requires_grad_(False), config)
    return Coder(sae, torch.zeros(d_in), torch.ones(d_in))


def topk_of(config: dict, kind: str) -> int | None:
    """How many features an SAE keeps; None where that is not fixed. In the layouts before 6 the
    activation function has a name of its own, and k is among its arguments.

    Raises ValueError for what is neither a ReLU nor TopK, and for activations that are scaled.
    """
    if config.get("finetuning_scaling_factor"):
        raise ValueError("it scales its activations (finetuning_scaling_factor)")
    usual = "topk" if kind == "topk" else "relu"
    function = config.get("activation_fn_str", config.get("activation_fn", usual))
    known = {"topk": ("topk",), "jumprelu": ("relu",), "standard": ("relu", "topk")}[kind]
    if function not in known:
        raise ValueError(f"its activation function is {function!r}, not {' or '.join(known)}")
    if function == "relu":
        if config.get("rescale_acts_by_decoder_norm"):
            raise ValueError("it rescales its activations (rescale_acts_by_decoder_norm)")
        return None
    k = config["k"] if "k" in config else config["activation_fn_kwargs"]["k"]
    return as_kind(k, int, "k")


def refuse_other_tensors(weights: dict[str, Tensor], kind: str) -> None:
    """Raise ValueError unless these are just the tensors of an SAE of this kind, in floats."""
    needed = set(SAELENS_WEIGHTS[: 5 if kind == "jumprelu" else 4])
    if set(weights) != needed:
        met, expected = ", ".join(sorted(weights)), ", ".join(sorted(needed))
        raise ValueError(f"its tensors are {met}; {kind} has {expected}")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{name} has numbers of {weight.dtype}, not floats")


@torch.no_grad()
def as_plain(sae: JumpReLUSAE, config: dict) -> JumpReLUSAE:
    """What SAELens does besides, written into the weights: the input less b_dec, activations in
    units of their decoder rows; a threshold below 0 is 0, since f is a ReLU as well."""
    if config.get("apply_b_dec_to_input", True):
        sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
    if config.get("rescale_acts_by_decoder_norm", False):
        length = sae.W_dec.norm(dim=1)
        sae.W_enc.mul_(length)
        sae.b_enc.mul_(length)
        sae.W_dec.div_(length[:, None])
    sae.threshold.clamp_(min=0)
    return sae


# --------------------------------------------------------------------------------------------------
# Stages: train, or take what an earlier run saved
# --------------------------------------------------------------------------------------------------


OWN_NETWORK = "the classifier of this project"
LOGIT_ROWS = 16_384  # rows at once that a head of any kind is given


class Subject(NamedTuple):
    """What an SAE is trained on: the network, and what it makes of every image."""

    model: object  # with preactivations(images) and logits_from_preactivations(raw)
    digest: str  # SHA-256 of its weights
    pre: Preactivations
    source: str  # of the images, in words
    data_digest: str
    network: str = OWN_NETWORK
    repeated: dict[tuple[str, str], int] | None = None  # images of two splits, where looked for

    @property
    def device(self) -> torch.device:
        return self.pre.mu.device

    def logits_of(self, z: Tensor) -> Tensor:
        """The network's logits (B, C) of standardised preactivations (B, d_in)."""
        raw = torch.addcmul(self.pre.mu, z, self.pre.std)
        head = self.model.logits_from_preactivations
        if len(raw) <= LOGIT_ROWS:
            return head(raw)
        return torch.cat([head(some) for some in raw.split(LOGIT_ROWS)])

    def layer(self, sae: object) -> fa.ExplainedLayer:
        return fa.ExplainedLayer(self.model, sae, self.pre.mu, self.pre.std)


def restored_classifier(tensors: dict[str, Tensor]) -> Classifier:
    hidden_units, n_pixels = tensors["hidden.weight"].shape
    model = Classifier(n_pixels, hidden_units, len(tensors["head.bias"]))
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


def restored_sae(tensors: dict[str, Tensor]) -> JumpReLUSAE:
    sae = JumpReLUSAE(*tensors["W_enc"].shape)
    sae.load_state_dict({name: tensors[name] for name in sae.state_dict()})
    return sae.requires_grad_(False)


def make_room(settings: Settings, folder: Path, name: str, keep: bool) -> None:
    """Before a trained stage takes the place of another in `folder`: the results of the run that
    has the old one go, as they would look finished beside the new one, and the old one is kept
    aside if `keep`."""
    if has_stage(folder, name):
        remove_results_of(settings)
    if keep:
        keep_aside(folder, name)


def save_trained(
    folder: Path, name: str, tensors: dict[str, Tensor], record: dict, log: Sequence[dict]
) -> Stage:
    """`save_stage`, the course of its training first."""
    write_log(folder, name, log)
    return save_stage(folder, name, tensors, {**record, "log_sha256": digest_of_log(log)})


def classifier_stage(settings: Settings, data: Data, folder: Path) -> tuple[Classifier, str]:
    """The classifier, and the SHA-256 of its weights."""
    device = data.train.labels.device
    decisive = chosen(settings, CLASSIFIER_SETTINGS)
    print_of = fingerprint(decisive, data=data.digest, device=device.type)
    expected = {"fingerprint": print_of, "data_digest": data.digest, "seed": settings.seed}
    sizes = {"i": settings.hidden_units, "p": data.train.images[0].numel()}
    sizes["c"] = len(data.classes)
    stage, news = reusable_stage(folder, "classifier", expected, settings.fresh, **sizes)
    if news:
        print(news)
    if stage is None:
        read_log(folder, "classifier")  # a damaged one is told before the training, not after
        model, log = train_classifier(data.train, settings, len(data.classes))
        record = {**expected, "data": data.source, "settings": decisive}
        make_room(settings, folder, "classifier", bool(news))
        stage = save_trained(folder, "classifier", model.state_dict(), record, log)
    return restored_classifier(stage.tensors).to(device), stage.digest


def stage_made(folder: Path, name: str, digest: str, **sizes: int) -> Stage:
    """The stage of that digest, which another process of this run made: it is never made here.
    Raises InputError where the folder holds no such stage."""
    stage = read_stage(folder, name, **sizes)
    if stage.digest != digest:
        raise InputError(
            f"{name}.safetensors in {folder} is not the one that this run made (its SHA-256 is "
            f"{stage.digest[:12]}, not {digest[:12]}); all ranks must see the same folder"
        )
    return stage


LARGE_SAE = 2**18  # entries of W_enc from which all cores work on one product


def threads_for(d_in: int, d_sae: int) -> int:
    """One, unless the SAE is so large that more help."""
    return available_cores() if d_in * d_sae >= LARGE_SAE else 1


def training_threads(settings: Settings, subject: Subject) -> int:
    return threads_for(len(subject.pre.mu), settings.sae_latents)


class TrainedSAE(NamedTuple):
    """An SAE before and after the adjustment of its thresholds, what sae.json says about it, and
    what to tell the user, if anything."""

    before: JumpReLUSAE
    sae: JumpReLUSAE
    record: dict
    news: str
    digest: str = ""  # SHA-256 of what was saved


def thinned(course: SAECourse) -> dict[str, list]:
    """Loss, L0 and lambda at the `logged_steps`: what sae.json keeps."""
    steps = list(logged_steps(len(course.l0)))
    names = SAECourse._fields[:3]
    return {"step": steps, **{name: getattr(course, name)[steps].tolist() for name in names}}


def sae_stage(settings: Settings, target: int, subject: Subject, folder: Path) -> TrainedSAE:
    """The SAE for one target, calibrated: what was saved, or a new one."""
    prepare_folder(folder)
    decisive = {"target_actives": target, **chosen(settings, SAE_SETTINGS)}
    print_of = fingerprint(
        decisive,
        model=subject.digest,
        data=subject.data_digest,
        device=subject.device.type,
        threads=training_threads(settings, subject),
    )
    expected = {"fingerprint": print_of, "data_digest": subject.data_digest}
    expected |= {"classifier_sha256": subject.digest, "target_actives": target}
    expected |= {"seed": settings.seed}
    sizes = {"i": len(subject.pre.mu), "s": settings.sae_latents}
    stage, news = reusable_stage(folder, "sae", expected, settings.fresh, **sizes)
    if stage is None:
        read_log(folder, "sae")  # as above
        tensors, record, log = calibrated_sae(settings, target, subject)
        record = {**expected, "settings": decisive, **record}
        make_room(settings, folder, "sae", bool(news))
        stage = save_trained(folder, "sae", tensors, record, log)
    sae = restored_sae(stage.tensors).to(subject.device)
    before = copy.deepcopy(sae)
    before.threshold.copy_(stage.tensors["threshold_before_shift"])
    return TrainedSAE(before, sae, stage.record, news, stage.digest)


def sae_stage_alone(settings: Settings, target: int, subject: Subject, folder: Path) -> TrainedSAE:
    """`sae_stage` in a folder to which nobody else writes meanwhile."""
    with alone_in(folder, settings.wait):
        return sae_stage(settings, target, subject, folder)


def calibrated_sae(
    settings: Settings, target: int, subject: Subject
) -> tuple[dict[str, Tensor], dict, list[dict]]:
    """What sae.safetensors, sae.json and run.log.jsonl hold: an SAE trained and calibrated."""
    pre = subject.pre
    with torch_threads(training_threads(settings, subject)):
        before, course = train_sae(pre.standardised("train"), subject.logits_of, target, settings)
    sae, shift = adjust_thresholds(before, pre.standardised("val"), target)
    if shift == -math.inf and not mean_actives(sae, pre.standardised("train")):
        raise TrainingError(
            f"SAE training for {target} actives failed: no feature fires on any training image, "
            f"whatever its threshold; lower --lr-sae (now {settings.lr_sae})"
        )
    tensors = {
        **sae.state_dict(),
        "threshold_before_shift": before.threshold,
        "mu": pre.mu,
        "std": pre.std,
    }
    record = {
        "data": subject.source,
        "threshold_shift": shift if math.isfinite(shift) else None,
        "lambda": course.l0_coefficient[-1].item(),
        "course": thinned(course),
    }
    kept = thinned(course)
    kept["lambda"] = kept.pop("l0_coefficient")
    kept["dead"] = course.dead.int().tolist()
    return tensors, record, log_lines("sae", kept, course.seconds.tolist())


def train_saes(settings: Settings, subject: Subject, jobs: Jobs) -> dict[int, list[TrainedSAE]]:
    """By target, its SAE and those of the other seeds, each trained or taken from where it is."""
    # An SAE that a GPU or all cores train takes the whole machine.
    one_at_a_time = subject.device.type != "cpu" or training_threads(settings, subject) > 1
    seeds = range(settings.seed, settings.seed + settings.stability_seeds + 1)
    started = []
    for target in settings.target_actives:
        folder = target_folder(Path(settings.out), settings, target)
        for seed in seeds:
            is_own = seed == settings.seed
            place = folder if is_own else folder / f"stability_seed_{seed}"
            here = one_at_a_time or not started  # the first one is for this process
            given = (replace(settings, seed=seed), target, subject, place)
            stage = sae_stage if is_own else sae_stage_alone
            started.append(jobs.start("sae", stage, *given, here=here))

    trained = jobs.results(started)
    for news in [one.news for one in trained if one.news]:
        print(news)
    n = len(seeds)
    of_target = [trained[first : first + n] for first in range(0, len(trained), n)]
    return dict(zip(settings.target_actives, of_target, strict=True))


# --------------------------------------------------------------------------------------------------
# A finished run, for notebooks
# --------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished run of one target, ready for a notebook."""

    model: object  # with preactivations(images) and logits_from_preactivations(raw)
    sae: JumpReLUSAE
    mu: Tensor
    std: Tensor
    loaders: dict[str, TensorLoader]  # train, val, test
    settings: Settings
    data: Data
    folder: Path  # of the target's files
    report_sha256: str  # of feature_report.json there

    @property
    def report(self) -> list[dict]:
        """The records of feature_report.json, the most influential feature first. Raises InputError
        when it is not the file that this run finished with."""
        path = self.folder / "feature_report.json"
        try:
            content = path.read_bytes()
            if (found := hashlib.sha256(content).hexdigest()) != self.report_sha256:
                raise ValueError(f"its SHA-256 is {found}, recorded was {self.report_sha256}")
            return read_json(content, list[dict[str, Any]])
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not the report of this run ({error}); run it again, load it again"
            ) from error

    @property
    def layer(self) -> fa.ExplainedLayer:
        """What the functions of feature_hypotheses and feature_confirmation take."""
        return fa.ExplainedLayer(self.model, self.sae, self.mu, self.std)


class Finished(NamedTuple):
    """What settings.json says of a finished run: what it was made with, and of which stages."""

    settings: Settings
    data: str  # in words
    data_digest: str
    network: str  # OWN_NETWORK, or what explain() was given
    classifier_sha256: str
    sae_sha256: dict[str, str]  # by target
    classes: tuple[str, ...]
    report_sha256: dict[str, str]  # by target, of feature_report.json
    hypotheses_sha256: dict[str, str]  # by target, of the claims, where there are any


def read_settings(root: Path) -> Finished:
    """Raises InputError when there is no finished run, and for one of somebody's own network."""
    passing = {name: False for name in PASSING} | {"workers": 0}
    try:
        stored = read_json((root / "settings.json").read_bytes(), {"settings": dict[str, Any]})
        found = as_kind({**stored, "settings": {**stored["settings"], **passing}}, Finished)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{root} holds no finished run ({error}); run MNIST_SAE_code.py --out {root} first"
        ) from error
    if found.network != OWN_NETWORK:
        raise InputError(
            f"{root} explains {found.network}, which is not stored there: call explain() "
            f"again with the same network, images and settings; it reuses the SAE"
        )
    return found


def load_run(
    folder: str, target: int | None = None, data_dir: str | None = None, device: str = "auto"
) -> Run:
    """What a run saved in `folder`: model, SAE, mu, std, loaders and settings.

    `target` chooses among several SAEs; `data_dir` says where the digits are now, if not where
    they were. The classes are called as they were in the run. Raises InputError when there is no
    such run, it is damaged, its claims were edited, or the digits are others than those it was
    trained on.
    """
    root = Path(folder)
    finished = read_settings(root)
    settings = finished.settings
    targets = settings.target_actives
    if target is None and len(targets) == 1:
        target = targets[0]
    if target not in targets:
        raise InputError(
            f"{root} has SAEs for the targets {list(targets)}, not {target}; choose one of them"
        )

    where = pick_device(device)
    data = load_images(data_dir or settings.data, settings.seed, where)
    if data.digest != finished.data_digest:
        raise InputError(
            f"{root} was made with: {finished.data}; found now: {data.source}. Give data_dir"
        )
    classifier, sae = read_networks(root, finished, target)
    data, folder = data._replace(classes=finished.classes), target_folder(root, settings, target)
    if claims := finished.hypotheses_sha256.get(str(target)):
        try:
            fh.read_hypotheses(folder / "hypotheses.json", claims)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the claims are not as this run froze them ({error}); run it again"
            ) from error
    return Run(
        model=restored_classifier(classifier.tensors).to(where),
        sae=restored_sae(sae.tensors).to(where),
        mu=sae.tensors["mu"].to(where),
        std=sae.tensors["std"].to(where),
        loaders={name: TensorLoader(getattr(data, name)) for name in ("train", "val", "test")},
        settings=settings,
        data=data,
        folder=folder,
        report_sha256=finished.report_sha256.get(str(target), "nowhere"),
    )


def read_networks(root: Path, finished: Finished, target: int) -> tuple[Stage, Stage]:
    """Classifier and SAE of a finished run. Raises InputError unless each was made from the one
    before, and both are those that the run finished with."""
    settings = finished.settings
    hidden, latents = settings.hidden_units, settings.sae_latents
    classifier = read_stage(root, "classifier", i=hidden, c=len(finished.classes))
    sae = read_stage(target_folder(root, settings, target), "sae", i=hidden, s=latents)

    made_from = {"seed": settings.seed, "data_digest": finished.data_digest}
    of_sae = {**made_from, "classifier_sha256": classifier.digest, "target_actives": target}
    finished_with = finished.classifier_sha256, finished.sae_sha256.get(str(target))
    if (
        chosen_of(classifier.record, made_from) != made_from
        or chosen_of(sae.record, of_sae) != of_sae
        or (classifier.digest, sae.digest) != finished_with
    ):
        raise InputError(
            f"{root} holds networks of another run than its settings.json: a later one stopped "
            f"half way; run it again"
        )
    return classifier, sae


def chosen_of(record: dict, names: Iterable[str]) -> dict:
    return {name: record[name] for name in names}


def target_folder(root: Path, settings: Settings, target: int) -> Path:
    """Where the files of one target are: the run's folder, or a subfolder of several."""
    return root if len(settings.target_actives) == 1 else root / f"target_{target}"


# --------------------------------------------------------------------------------------------------
# Analysis: every feature, by the functions of feature_analysis.py
# --------------------------------------------------------------------------------------------------

PATTERN_IMAGES = 128  # over which gradients are averaged that differ from image to image
INKED_SHARE = 0.01  # pixels inked in fewer training images are drawn grey: no evidence about them


class Clock:
    """Seconds per stage. Where the device works asynchronously, a stage ends when its work does."""

    def __init__(self, started: float | None = None) -> None:
        self.started = started  # the whole run, where this is its clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        passed = time.perf_counter() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + passed


def gradient_at(layer: fa.ExplainedLayer, images: Tensor) -> dict:
    """Where input patterns are taken, as arguments of their functions: anywhere if preactivations
    are linear in the pixels, otherwise at some of the images."""
    shape = tuple(images.shape[1:])
    linear = fa.is_linear(layer, shape, images)
    return {"images": None if linear else images[:PATTERN_IMAGES], "image_shape": shape}


def analyse(layer: fa.ExplainedLayer, data: Data, settings: Settings, clock: Clock) -> fa.Analysis:
    """Images, pixels and classes of all features, from the validation images alone."""
    loader = TensorLoader(data.val)
    n_eval = settings.n_eval
    model, sae, mu, std = layer
    with clock("bank"):
        bank = shared_bank(layer, data, settings)
    with clock("patterns"):
        heats = fa.feature_input_patterns(*layer, **gradient_at(layer, data.val.images)).cpu()
        heats = heats.sum(1) if heats.dim() == 4 else heats  # of a colour image, all channels
        inked = (fa.as_ink(data.train.images) > 0).float().mean(0)[0] >= INKED_SHARE
    with clock("effects"):
        logit = fa.feature_logit_effects(
            model, loader, sae, mu, std, alpha=settings.alpha, n_eval=n_eval
        )
        ablation = fa.feature_ablation_effects(model, loader, sae, mu, std, n_eval=n_eval)
        nearest = fa.nearest_features(sae.W_dec)
        activity = fa.collect_activity(layer, *data.val)
        removed = fa.removal_effects(layer, data.val.images, activity)
    logit = fa.LogitEffects(*(tensor.cpu() for tensor in logit))
    ablation = fa.LogitEffects(*(tensor.cpu() for tensor in ablation))
    found = (bank, heats, logit, ablation, nearest, inked.cpu().numpy())
    return fa.Analysis(*found, activity, removed)


def analysed_features(analysis: fa.Analysis, limit: int) -> list[int]:
    """Features by falling influence, ties by number; the first `limit`, or all when it is 0."""
    order = torch.argsort(analysis.removed.influence, descending=True, stable=True).tolist()
    return order[: limit or None]


TELLING = 5  # features to look at first


def remove_pictures(folder: Path) -> None:
    """Those of an earlier run, which may have had other features."""
    for old in folder.iterdir():
        if re.fullmatch(r"feature_\d+_(gallery|pattern|panel|hypothesis)\.(png|npy)", old.name):
            old.unlink(missing_ok=True)  # by another process that has trained an SAE


PICTURE_JOBS = 2  # each is sent all images, so not more than keeps two cores busy


def start_pictures(
    folder: Path,
    analysis: fa.Analysis,
    features: Sequence[int],
    images: Tensor,
    classes: tuple[str, ...],
    jobs: Jobs,
) -> list[Job]:
    """Gallery and pattern of each of `features`."""
    shown = (analysis.bank, images, analysis.heats, analysis.inked, classes)
    started = []
    for part in range(PICTURE_JOBS):
        given = (folder, features[part::PICTURE_JOBS], *shown)
        started.append(jobs.start("pictures", fa.write_feature_pictures, *given))
    return started


def starting_rows(z: Tensor, d_sae: int, seed: int) -> Tensor:
    """Decoder rows (d_sae, d_in) from which training on z (N, d_in) would start, as z has them."""
    generator = torch.Generator(z.device).manual_seed(seed)
    frame = TrainingFrame.of(z)
    x = starting_images(z, frame, generator)
    return initial_rows(x, d_sae, generator) @ frame.basis.T


class Replicates(NamedTuple):
    """What other seeds made of the same target."""

    seeds: list[int]
    saes: list[JumpReLUSAE]
    matches: list[fa.Matches]  # the features of the run's own SAE in each of them
    record: dict  # for summary.json: how much returns

    def counterparts(self, k: int) -> list[dict]:
        """What feature_report.json says about feature k in the SAEs of other seeds."""
        found = []
        for seed, m in zip(self.seeds, self.matches, strict=True):
            values = {name: float(getattr(m, name)[k]) for name in ("cosine", "correlation")}
            found.append({"seed": seed, "feature": int(m.feature[k]), **values})
        return found

    def mark(self, k: int) -> str:
        """Whether feature k is there in every other SAE, too."""
        similar = [min(c["cosine"], c["correlation"]) for c in self.counterparts(k)]
        return "returns" if min(similar) >= fa.ALIKE else "one way among many"


def mean_and_spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean, and standard deviation (n - 1 in its denominator); None of a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread}


@torch.no_grad()
def compare_seeds(
    target: int, trained: Sequence[TrainedSAE], settings: Settings, subject: Subject, images: Tensor
) -> Replicates | None:
    """How much of an SAE returns: each of `trained`, the run's own first, looked for in each other
    on `images` (N, ...); None where there is no other.

    The two directions of a pair of SAEs are averaged. As a measure of chance, the run's own is also
    looked for among directions from which another seed's training would start, made to fire as
    often and as strongly as its features do.
    """
    if len(trained) == 1:
        return None
    seeds = [settings.seed + n for n in range(len(trained))]
    saes = [one.sae for one in trained]
    z = subject.pre.standardised("val")
    usage = [feature_usage(sae, z) for sae in saes]

    def look_for(i: int, other: object) -> tuple[fa.Matches, fa.Return]:
        matches = fa.match_features(subject.layer(saes[i]), images, other)
        return matches, fa.how_much_returns(matches, *usage[i])

    every = range(len(saes))
    found = {(i, j): look_for(i, saes[j]) for i, j in itertools.permutations(every, 2)}
    pairs = []
    for i, j in itertools.combinations(every, 2):
        both = [found[i, j][1], found[j, i][1]]
        pairs.append(np.mean(both, axis=0))

    rows = starting_rows(z, settings.sae_latents, seeds[1])
    _, by_chance = look_for(0, fc.at_the_same_rates(rows, z, *usage[0]))
    record = {"seeds": seeds, "pairs": len(pairs), "untrained": by_chance._asdict()}
    for name, values in zip(fa.Return._fields, np.transpose(pairs), strict=True):
        record[name] = mean_and_spread(values)
    matches = [found[0, j][0] for j in every[1:]]
    return Replicates(seeds[1:], saes[1:], matches, record)


class Diagnosis(NamedTuple):
    """One usual complaint about SAEs, measured."""

    complaint: str
    value: float | None  # None: there is nothing to measure; `advice` says why
    limit: float  # from which it deserves attention
    what: str  # is measured
    advice: str  # what to change

    @property
    def fine(self) -> bool:
        return self.value is not None and self.value <= self.limit

    @property
    def measured(self) -> str:
        return NOT_COMPUTED if self.value is None else f"{self.value:.3g}"


def diagnose(
    record: dict, analysis: fa.Analysis, features: Sequence[int], seconds: dict[str, float]
) -> list[Diagnosis]:
    """Usual complaints, each with its number."""
    found = []

    def look(complaint: str, value: float | None, limit: float, what: str, advice: str) -> None:
        found.append(Diagnosis(complaint, value, limit, what, advice))

    roughness = fa.pattern_roughness(analysis.heats[features]).median().item()
    what = "median roughness, 1 for white noise"
    look(
        "noisy patterns",
        roughness,
        0.5,
        what,
        "train the network with more weight decay (WEIGHT_DECAY_FFN)",
    )

    redundant = (analysis.nearest.cosine > 0.9).float().mean().item()
    what = "share with a neighbour above cosine 0.9"
    look("redundant features", redundant, 0.05, what, "lower SAE_LATENTS")

    what = "accuracy lost when features are on or off"
    lost = record["delta_acc_boolean_scaled"]
    look("low boolean fidelity", lost, 0.02, what, "compare several targets (TARGET_ACTIVES)")

    dead = record["dead_features"] / record["sae_latents"]
    what = "share silent on all training images"
    look("dead latents", dead, 0.05, what, "lower SAE_LATENTS or raise TARGET_ACTIVES")

    if "returned" in record:
        lost = 1 - record["returned"]["energy"]["mean"]
        what = "share of the energy that another seed does not find"
        look("features that do not return", lost, 0.5, what, "lower TARGET_ACTIVES")

    what = "share of L0 by those on over a tenth of the images"
    share, advice = record["dense_share_of_l0"], "lower TARGET_ACTIVES"
    if share is None:
        advice = "no feature fires on any training image: are they scaled as the others are?"
    look("few features do the work", share, 0.6, what, advice)

    of_all = seconds["bank"] + seconds["patterns"] + seconds["effects"]
    of_each = of_all / record["sae_latents"] + seconds["pictures"] / len(features)
    what = "milliseconds per feature, pictures included"
    look("slow analysis", 1000 * of_each, 100.0, what, "set FEATURES")
    return found


# --------------------------------------------------------------------------------------------------
# Claims and their trial, by feature_hypotheses.py and feature_confirmation.py
# --------------------------------------------------------------------------------------------------


def recorded_claims(root: Path, folder: Path) -> str | None:
    """The SHA-256 of the claims in `folder`, as summary.json in `root` has it; None where it names
    none of them. Raises InputError when that file is damaged."""
    path = root / "summary.json"
    if not path.exists():
        return None
    kinds = {"target_actives": int}
    try:
        records = read_json(path.read_bytes(), list[kinds])
        for r in records:
            if folder == (root if len(records) == 1 else root / f"target_{r['target_actives']}"):
                return as_kind(r.get("hypotheses_sha256"), str | None, "hypotheses_sha256")
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); move it away or give --fresh") from error


def refuse_changed_hypotheses(folder: Path, sha256: str | None = None) -> None:
    """Raise InputError when the hypotheses an earlier run froze there are not as it wrote them, or
    as `sha256` says.

    Whoever edited them should not lose the edit, nor mistake it for something that was tested.
    """
    path = folder / "hypotheses.json"
    if path.exists():
        try:
            fh.read_hypotheses(path, sha256)
        except ValueError as error:
            raise InputError(
                f"{error}; to start over, move the file away or give --fresh"
            ) from error


def tell_unnamed_strokes(hypotheses: Sequence[fh.Hypothesis]) -> None:
    """Say once why no sentence names strokes, where none can."""
    reasons = {h.why_not.get("ink") for h in hypotheses if h.cut is not None}
    if len(reasons) == 1 and None not in reasons and not any(any(h.ink) for h in hypotheses):
        print(
            f"no strokes are named: {reasons.pop()}; what is said are labels and effects, and no "
            f"feature counts as explained"
        )


RESULTS_OF_RUN = """settings.json summary.json frontier.png feature_report.json feature_report.html
hypotheses.json hypotheses.md explained.png influence.png training.png saelens/cfg.json
saelens/sae_weights.safetensors combination.json""".split()


def remove_results(folder: Path) -> None:
    """Those of an earlier run: if this one stops half way, nothing looks as if it were finished.
    settings.json goes first, without which it is no run."""
    for name in RESULTS_OF_RUN:
        (folder / name).unlink(missing_ok=True)
    remove_pictures(folder)


def remove_results_of(settings: Settings) -> None:
    """`remove_results` in the run's folder and in those of its targets."""
    for folder in folders_of(settings):
        if folder.exists():
            remove_results(folder)


COMPARED = ("untrained SAE", "random directions", "neurons")


def compare_with(
    kind: str,
    settings: Settings,
    layer: fa.ExplainedLayer,
    seen: fc.Images,
    judging: fc.Images,
    aside: fc.Images,
) -> fc.Comparison:
    """The same trial for features that training did not find; `kind` is one of COMPARED."""
    z = layer.standardised(seen[0])
    if kind == "untrained SAE":
        directions = starting_rows(z, settings.sae_latents, settings.seed)
    else:
        directions = fc.other_directions(kind, z, settings.seed)
    features = fc.at_the_same_rates(directions, z, *feature_usage(layer.sae, z))
    given = (layer, seen, judging, aside, fh.Rule(), settings.seed, settings.strokes)
    return fc.compare_features(features, *given)


def hold_trial(
    p: Prepared, settings: Settings, subject: Subject, data: Data, jobs: Jobs
) -> tuple[fc.Trial, dict[str, fc.Comparison]]:
    """Test what was frozen on the test images, judge it, and compare it.

    Raises InputError when hypotheses.json is not the file that was frozen.
    """
    try:
        hypotheses, rule = fh.read_hypotheses(p.folder / "hypotheses.json", p.frozen)
    except ValueError as error:
        raise InputError(str(error)) from error
    layer, seed = subject.layer(p.trained.sae), settings.seed
    judging, aside = fc.confirmation_splits(*data.test)
    here = subject.device.type != "cpu"
    started = []
    for kind in COMPARED:
        given = (kind, settings, layer, tuple(data.val), judging, aside)
        started.append(jobs.start("comparisons", compare_with, *given, here=here))
    given = (hypotheses, layer, *aside, None, seed + 1, rule)
    started.append(jobs.start("images set aside", fc.test_hypotheses, *given, here=here))

    with p.clock("test and judge"):
        activity = fa.collect_activity(layer, *judging)
        scored = fc.score_claims(hypotheses, *judging)
        evidence = fc.test_hypotheses(hypotheses, layer, *judging, activity, seed, rule, scored)
        picked = fc.pick_features(evidence, scored, layer, activity)
    with p.clock("comparisons, waited for"):
        *comparisons, again = jobs.results(started)
    trial = fc.make_trial(hypotheses, rule, evidence, again, activity, picked)
    return trial, dict(zip(COMPARED, comparisons, strict=True))


def write_statements(
    folder: Path,
    trial: fc.Trial,
    comparisons: dict[str, fc.Comparison],
    record: dict,
    title: str,
    marks: dict[int, str],
) -> None:
    """hypotheses.md and its two pictures; `record` is that of `fc.trial_record`."""
    text = fc.statements_markdown(trial, record, title, marks)
    fa.write_whole(folder / "hypotheses.md", text.encode())
    fa.save_figure(fc.draw_explained(trial, comparisons), folder / "explained.png")
    fa.save_figure(fc.draw_influence(trial), folder / "influence.png")


# --------------------------------------------------------------------------------------------------
# What the terminal shows
# --------------------------------------------------------------------------------------------------


def feature_block(record: dict, n_images: int, classes: Sequence[str] = ()) -> str:
    """The lines a reader expects for one feature."""
    histogram, active = record["label_histogram"], record["n_active"]
    common = sorted(range(len(histogram)), key=lambda c: (-histogram[c], c))[:4]
    names = [fa.class_name(classes, c) for c in range(len(histogram))]
    shares = [f"{names[c]}: {100 * histogram[c] / active:.0f}%" for c in common if histogram[c]]
    boost = record["logit_boost_class"]
    top = zip(record["top_examples"][:5], record["top_scores"][:5], strict=True)
    examples = [f"#{i} ({score:.2f})" for i, score in top]
    added = record["logit_delta_vector"][boost]
    removed = record["ablation_delta_vector"][boost]
    lines = [
        f"Feature {record['feature']}",
        f"  influence        {record['influence']:.1%}; removing it changes "
        f"{record['predictions_changed']:.1%} of the predictions on images that fire it",
        f"  mean active      {record['mean_active']:.4f} ({active:,} of {n_images:,} validation "
        f"images)",
        f"  label histogram  {', '.join(shares)}",
        f"  boosts class     {names[boost]} by {added:+.3f} when added",
        f"  when removed     class {names[boost]} changes by {removed:+.3f}",
        f"  top examples     {', '.join(examples)}",
    ]
    return "\n".join(lines + statement_block(record))


def panel_notes(
    record: dict,
    replicates: Replicates | None,
    subject: Subject,
    sketch: fa.Sketch | None,
    images: Tensor,
) -> fa.PanelNotes:
    """What a panel says about a feature: its hypothesis, in words and drawn, and its counterparts
    in other SAEs, with their patterns at images (N, ...)."""
    caption = "\n".join(line.strip() for line in statement_block(record))
    counterparts = []
    for found in record.get("counterparts", []):
        sae = replicates.saes[replicates.seeds.index(found["seed"])]
        layer = subject.layer(sae)
        at = gradient_at(layer, images)
        heat = fa.feature_input_pattern(*layer, found["feature"], **at)
        heat = heat.sum(0) if heat.dim() == 3 else heat
        similarity = min(found["cosine"], found["correlation"])
        words = f"seed {found['seed']}, no. {found['feature']}\nsimilarity {similarity:.2f}"
        counterparts.append((words, heat.cpu().numpy()))
    return fa.PanelNotes(caption, counterparts=tuple(counterparts), sketch=sketch)


def sketch_of(h: fh.Hypothesis, analysis: fa.Analysis, images: Tensor) -> fa.Sketch | None:
    """What a claim draws, over the mean of the images (N, 1, H, W) that fire the feature; None
    where it draws nothing."""
    if not any(h.drawing):
        return None
    at, _ = analysis.activity.of(h.feature)
    mean = images[at, 0].mean(0).numpy()
    masks = [fh.place_masks(places).numpy() for places in h.drawing]
    return fa.Sketch(mean, *masks)


def statement_block(record: dict) -> list[str]:
    """The hypothesis of a feature, if there is one."""
    if "statement" not in record:
        return []
    marked = f"; {record['mark']}" if "mark" in record else ""
    return [
        f'  hypothesis       "{record["statement"]}"',
        f"  evidence         {record['evidence']['text']}",
        f"  confidence       {record['confidence']} ({record['verdict']}{marked})",
    ]


def diagnoses_text(diagnoses: Sequence[Diagnosis]) -> str:
    """A table of all, and below it what to change where one deserves attention."""
    rows = [("complaint", "measured", "limit", "verdict", "what is measured")]
    advice = []
    for d in diagnoses:
        verdict = "fine" if d.fine else "attention"
        rows.append((d.complaint, d.measured, f"{d.limit:g}", verdict, d.what))
        if not d.fine:
            advice.append(f"{d.complaint}: {d.advice}")
    return "\n".join([fc.text_table(rows), *advice])


def seconds_table(records: Sequence[dict]) -> str:
    """One column per target; what they share stands in each."""
    rows = [["seconds, at target", *(str(r["target_actives"]) for r in records)]]
    for stage in records[0]["seconds"]:
        rows.append([stage, *(f"{r['seconds'][stage]:.2f}" for r in records)])
    return fc.text_table(rows)


class Result(NamedTuple):
    """A number of summary.json as people see it."""

    title: str
    key: str
    form: str
    on_page: str = ""  # its words on the page, if it stands there


RESULTS = (
    Result("active before shift", "achieved_actives_before_shift", "{:.2f}"),
    Result("active, validation", "achieved_actives_val", "{:.4f}"),
    Result("active, test", "achieved_actives_test", "{:.2f}", "features active per image (L0)"),
    Result("lambda", "lambda", "{:.4f}"),
    Result("threshold shift", "threshold_shift", "{:+.5f}"),
    Result("accuracy, classifier", "baseline_acc", "{:.2%}", "accuracy of the network"),
    Result("accuracy through SAE", "recon_acc_jumprelu", "{:.2%}", "accuracy through the SAE"),
    Result("  boolean", "recon_acc_boolean", "{:.2%}"),
    Result("  boolean, scaled", "recon_acc_boolean_scaled", "{:.2%}"),
    Result("agreement", "agreement_jumprelu", "{:.2%}", "predictions kept through the SAE"),
    Result(
        "  of as many PCs", "agreement_pca", "{:.2%}", "... through as many principal components"
    ),
    Result("FVU", "fvu", "{:.4f}", "share of variance it leaves out (FVU)"),
    Result("  of as many PCs", "fvu_pca", "{:.4f}", "... that as many principal components leave"),
    Result("FVU relative to PCs", "fvu_to_pca", "{:.3f}"),
    Result("disagreement, relative", "disagreement_to_pca", "{:.3f}"),
    Result("cross entropy recovered", "ce_recovered", "{:.4f}"),
    Result("KL", "kl", "{:.5f}"),
    Result("dead features", "dead_features", "{}", "features that never fire"),
    Result("dense features (> 10%)", "dense_features", "{}"),
    Result("  their share of L0", "dense_share_of_l0", "{:.1%}"),
)


NOT_COMPUTED = "not computed"  # a ratio whose denominator is 0


def shown_result(result: Result, record: dict) -> str:
    value = record[result.key]
    return NOT_COMPUTED if value is None else result.form.format(value)


def results_table(records: Sequence[dict]) -> str:
    """One column per target."""
    rows = [["target", *(str(r["target_actives"]) for r in records)]]
    for result in RESULTS:
        rows.append([result.title, *(shown_result(result, r) for r in records)])
    if all("returned" in r for r in records):
        rows += returned_rows(records)
    return fc.text_table(rows)


def returned_rows(records: Sequence[dict]) -> list[list[str]]:
    """How much of an SAE another seed finds again, with the spread over pairs of SAEs where there
    are several; and what directions that were not trained give at the same firing rates."""
    rows = []
    titles = {"features": "features that return", "energy": "energy that returns"}
    titles["similarity"] = "similarity of nearest"
    for name, title in titles.items():
        cells, untrained = [], []
        for r in records:
            mean, std = r["returned"][name]["mean"], r["returned"][name]["std"]
            cells.append(f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}")
            untrained.append(f"{r['returned']['untrained'][name]:.3f}")
        rows += [[title, *cells], ["  among untrained", *untrained]]
    return rows


def frontier_curves(records: Sequence[dict]) -> dict[str, tuple[list[float], list[float]]]:
    """What the frontier shows, by title: values and their spread, one of each record."""
    nothing = [0.0] * len(records)
    relative = [math.nan if r["fvu_to_pca"] is None else r["fvu_to_pca"] for r in records]
    changed = [100 * (1 - r["agreement_jumprelu"]) for r in records]
    dense = [math.nan if s is None else s for s in (r["dense_share_of_l0"] for r in records)]
    curves = {
        "FVU, relative to as many PCs": (relative, nothing),
        "% of predictions that change": (changed, nothing),
        "share of L0 by dense features": (dense, nothing),
    }
    if all("returned" in r for r in records):
        titles = {"energy": "share of the energy that returns"}
        titles["similarity"] = "similarity of nearest features"
        for name, title in titles.items():
            found = [r["returned"][name] for r in records]
            curves[title] = [f["mean"] for f in found], [f["std"] or 0.0 for f in found]
    return curves


class Curve(NamedTuple):
    """Values over the numbers of active features, with their spread."""

    l0: Sequence[float]
    values: Sequence[float]
    spread: Sequence[float]


COLOURS = ("#2166ac", "#b2182b", "#4d9221", "#7b3294", "#666666")


def draw_curves(
    path: Path, title: str, targets: Sequence[int], panels: dict[str, dict[str, Curve]]
) -> None:
    """A picture with one panel for each title, in it one curve for each name; `targets` stand at
    the places of the first curve."""
    figure = fa.new_figure(250 * len(panels), 310)
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (what, curves) in zip(axes_of, panels.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
            axes.errorbar(*curve, fmt="o-", color=colour, capsize=3, label=name)
        first = next(iter(curves.values()))
        axes.set_xscale("log")
        axes.set_xticks(first.l0, [str(target) for target in targets])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("active features per image", fontsize=9)
        axes.set_title(what, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.3)
    if len(panels) and len(curves) > 1:
        axes_of[0].legend(fontsize=8)
    fa.save_figure(figure, path)


def draw_frontier(records: Sequence[dict], path: Path) -> None:
    """Sparsity against fidelity, and against what returns where other seeds were trained."""
    records = sorted(records, key=lambda r: r["achieved_actives_test"])
    l0 = [r["achieved_actives_test"] for r in records]
    panels = {}
    for title, (values, spread) in frontier_curves(records).items():
        panels[title] = {"": Curve(l0, values, spread)}
    title = "What the number of active features changes (bars: spread over pairs of SAEs)"
    draw_curves(path, title, [r["target_actives"] for r in records], panels)


class TrainingCurve(NamedTuple):
    """One panel of training.png."""

    title: str
    steps: list[int]
    values: list[float]
    logarithmic: bool = False
    aim: float | None = None  # what is asked for
    turn: float | None = None  # the step from which the classifier's logits count


def training_curves(
    classifier: Sequence[dict], sae: Sequence[dict], target: int, head_kl: float
) -> list[TrainingCurve]:
    """What training.png shows of the lines of run.log.jsonl; nothing of a stage without lines."""
    curves = []

    def add(lines: Sequence[dict], name: str, title: str, *given) -> None:
        if lines:
            steps, values = [line["step"] for line in lines], [line[name] for line in lines]
            curves.append(TrainingCurve(title, steps, values, *given))

    turn = STEERING.head_from * (sae[-1]["step"] + 1) if sae and head_kl else None
    add(classifier, "loss", "Classifier: cross entropy\nin nats", True)
    add(sae, "loss", "SAE: share of the variance\nnot reconstructed", True, None, turn)
    what = f"SAE: active features per image\n(dashed: the {target} asked for)"
    add(sae, "l0", what, False, target, turn)
    add(sae, "lambda", "SAE: lambda, the price\nof an active feature", False, None, turn)
    what = f"SAE: dead latents, firing on\nfewer than 1 in {1 / DEAD_BELOW:,.0f} images"
    add(sae, "dead", what, False, None, turn)
    return curves


def draw_training(curves: Sequence[TrainingCurve], path: Path) -> None:
    """A panel for each curve, over the steps of its training."""
    figure = fa.new_figure(250 * len(curves), 290)
    figure.set_layout_engine("constrained")
    words = "How training went; every point is one batch"
    if any(curve.turn is not None for curve in curves):
        words += ". Dotted: from here on the classifier's logits count"
    figure.suptitle(words, fontsize=11)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        axes.plot(curve.steps, curve.values, color="#2166ac", linewidth=1.2)
        if curve.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(0, 1.05 * max(curve.values) or 1)
            if all(isinstance(value, int) for value in curve.values):
                axes.yaxis.get_major_locator().set_params(integer=True)
        if curve.aim is not None:
            axes.axhline(curve.aim, color="#b2182b", linestyle="--", linewidth=1)
        if curve.turn is not None:
            axes.axvline(curve.turn, color="#666666", linestyle=":", linewidth=1)
        axes.set_title(curve.title, fontsize=9.5)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8.5)
        axes.grid(alpha=0.3)
    fa.save_figure(figure, path)


def write_training(root: Path, folder: Path, target: int, head_kl: float) -> None:
    """training.png in the folder of one target, from the logs there and in the run's folder, as far
    as they are of the stages that are saved there."""
    logs = []
    for place, stage in ((root, "classifier"), (folder, "sae")):
        logs.append(log_of_stage(place, stage))
        if not logs[-1] and read_log(place, stage):
            where = f"{place / LOG}: the lines of the {stage} there"
            print(f"{where} are of another training; they are not drawn")
    curves = training_curves(*logs, target, head_kl)
    if curves:  # there is nothing to draw where someone removed the logs of stages that are reused
        draw_training(curves, folder / "training.png")


def places_to_look(root: Path, settings: Settings, records: Sequence[dict]) -> str:
    """The last lines of a run."""
    lines = ["\nWhere to look next"]

    def tell(path: Path, what: str) -> None:
        lines.append(f"  {path}   {what}")

    for record in records:
        folder = target_folder(root, settings, record["target_actives"])
        panels = [folder / f"feature_{k}_panel.png" for k in record["telling_features"]]
        first = panels[0] if panels else folder
        tell(
            folder / "feature_report.html", "a page to open: the network, its features, its errors"
        )
        tell(first, f"one feature on one page ({len(panels)} such pages)")
        if settings.hypotheses:
            tell(folder / "hypotheses.md", "what each feature means, tested, what matters first")
            tell(folder / "influence.png", "who does the work, and how far it is explained")
        tell(folder / "training.png", "how training went; the log beside it holds the numbers")
        tell(folder / "feature_report.json", "every feature as a table (pandas.read_json)")
    if len(records) > 1:
        tell(root / "frontier.png", "sparsity against fidelity and what returns")
    tell(root / "summary.json", "all the numbers above, with the diagnoses")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The whole run
# --------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    modules = (torch, np, safetensors)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


class Prepared(NamedTuple):
    """One target after everything that needs no test image."""

    target: int
    folder: Path
    trained: TrainedSAE
    replicates: Replicates | None
    analysis: fa.Analysis
    features: list[int]  # those that are reported
    frozen: str | None  # the SHA-256 of hypotheses.json, if there are hypotheses
    pictures: list[Job]
    clock: Clock
    shown: Tensor  # (N, 1, H, W) the validation images as pictures show them


def prepare_target(
    target: int,
    saes: list[TrainedSAE],
    settings: Settings,
    subject: Subject,
    data: Data,
    jobs: Jobs,
) -> Prepared:
    """Analyse the features of one target's SAE, state and freeze what they mean."""
    clock, frozen = Clock(), None
    folder = target_folder(Path(settings.out), settings, target)
    trained = saes[0]
    layer = subject.layer(trained.sae)
    analysis = analyse(layer, data, settings, clock)
    features = analysed_features(analysis, settings.features)
    shown = fa.as_ink(data.val.images.cpu())
    pictures = start_pictures(folder, analysis, features, shown, data.classes, jobs)
    if settings.hypotheses:
        with clock("propose and freeze"):
            known = (analysis.activity, analysis.removed, settings.strokes, data.classes)
            hypotheses = fh.propose_hypotheses(layer, *data.val, None, True, *known)
            frozen = fh.freeze_hypotheses(hypotheses, folder / "hypotheses.json")
        tell_unnamed_strokes(hypotheses)
    with clock("matching"):
        replicates = compare_seeds(target, saes, settings, subject, data.val.images)
    return Prepared(
        target, folder, trained, replicates, analysis, features, frozen, pictures, clock, shown
    )


def finish_target(
    p: Prepared, settings: Settings, subject: Subject, data: Data, jobs: Jobs
) -> tuple[dict, list[dict]]:
    """Test and measure on the test images, write the files of the target; returns its record of
    summary.json and the records of feature_report.json."""
    trial, comparisons = None, {}
    if p.frozen:
        trial, comparisons = hold_trial(p, settings, subject, data, jobs)
    report = feature_report(p, trial)
    by_feature = {entry["feature"]: entry for entry in report}
    telling = p.features[:TELLING]
    notes = {}
    for k in telling:
        sketch = sketch_of(trial.hypotheses[k], p.analysis, p.shown) if trial else None
        notes[k] = panel_notes(by_feature[k], p.replicates, subject, sketch, data.val.images)
    given = (p.folder, telling, p.analysis, p.shown, notes, data.classes)
    drawing = [*p.pictures, jobs.start("panels", fa.write_feature_panels, *given)]
    given = (Path(settings.out), p.folder, p.target, settings.head_kl)
    drawing.append(jobs.start("training picture", write_training, *given))
    for k in telling:
        if notes[k].sketch is not None:
            path = p.folder / f"feature_{k}_hypothesis.png"
            fa.visualize_sketch(notes[k].sketch, k, by_feature[k]["statement"], path)
    record = target_record(p, settings, subject, data)
    record["telling_features"] = telling
    if trial:
        record["hypotheses_sha256"] = p.frozen
        record["hypotheses"] = fc.trial_record(trial, comparisons, p.frozen)
        title = f"{len(trial.hypotheses)} features at target {p.target} ({data.source})"
        marks = {k: p.replicates.mark(k) for k in range(len(trial.hypotheses)) if p.replicates}
        given = (p.folder, trial, comparisons, record["hypotheses"], title, marks)
        drawing.append(jobs.start("statements", write_statements, *given))
    fa.write_whole(p.folder / "feature_report.json", to_json(report))
    save_saelens(subject.layer(p.trained.sae), p.folder / "saelens")
    with p.clock("pictures, waited for"):
        jobs.results(drawing)

    drawn = {"pictures": sum(job.outcome[1] for job in p.pictures)}
    diagnoses = diagnose(record, p.analysis, p.features, {**p.clock.seconds, **drawn})
    record["diagnoses"] = [{**d._asdict(), "fine": d.fine} for d in diagnoses]
    tell_target(record, by_feature, diagnoses, data)
    return record, report


def feature_report(p: Prepared, trial: fc.Trial | None) -> list[dict]:
    """The records of feature_report.json."""
    report = []
    for k in p.features:
        entry = fa.feature_record(k, p.analysis)
        if p.replicates:
            entry["counterparts"] = p.replicates.counterparts(k)
            entry["mark"] = p.replicates.mark(k)
        if trial:
            entry |= fc.statement_record(k, trial)
        report.append(entry)
    return report


def target_record(p: Prepared, settings: Settings, subject: Subject, data: Data) -> dict:
    """What summary.json says about one target, but for its statements."""
    with p.clock("fidelity"):
        measured = measure(p.trained, subject, data.test.labels, p.target)
    record = {
        "target_actives": p.target,
        "lambda": p.trained.record["lambda"],
        "threshold_shift": p.trained.record["threshold_shift"],
        **measured,
        "sae_latents": settings.sae_latents,
        "normalize_z": settings.normalize_z,
        "seed": settings.seed,
        "data": data.source,
        "device": str(subject.device),
        "versions": versions(),
    }
    if p.replicates:
        record["returned"] = p.replicates.record
    if subject.repeated:
        pairs = subject.repeated.items()
        record["repeated_images"] = {f"{name} in {earlier}": n for (name, earlier), n in pairs}
    return record


def tell_target(
    record: dict, by_feature: dict[int, dict], diagnoses: Sequence[Diagnosis], data: Data
) -> None:
    """What the terminal shows of one target as soon as it is finished."""
    words = "the features whose removal changes the logits most (influence)"
    print(f"\nTarget {record['target_actives']}: {words}\n")
    if record.get("hypotheses", {}).get("median_words") is not None:  # where strokes are named
        print(f"{fh.LEGEND}\n")
    for k in record["telling_features"]:
        print(feature_block(by_feature[k], len(data.val.labels), data.classes), end="\n\n")
    if "hypotheses" in record:
        print(fc.statements_table(record["hypotheses"]), end="\n\n")
    print(diagnoses_text(diagnoses))


NO_DRAWING = "This page cannot compute the network, so one cannot draw for it; all else works."


def page_network(model: object) -> fp.Network | None:
    """The weights with which the page computes; None for a network that it cannot compute."""
    if not isinstance(model, Classifier):
        return None
    first_bias = model.hidden.bias - model.hidden.weight @ model.pixel_mean  # no mean image there
    return fp.Network(model.hidden.weight, first_bias, model.head.weight, model.head.bias)


def write_page(
    p: Prepared,
    record: dict,
    report: list[dict],
    frontier: list[dict],
    subject: Subject,
    data: Data,
) -> None:
    """feature_report.html of one target; `frontier` has a record of each target."""
    layer = subject.layer(p.trained.sae)
    network = page_network(subject.model)
    results = [(r.on_page, shown_result(r, record)) for r in RESULTS if r.on_page]
    if record.get("hypotheses", {}).get("median_words") is not None:  # where strokes are named
        own = record["hypotheses"]["shares"]["SAE"]
        results.append(("influence of explained features", f"{own['influence_explained']:.0%}"))
        results.append(("features explained", f"{own['explained']:.0%}"))
    n_features = len(p.analysis.heats)
    of = "a network" if subject.network == OWN_NETWORK else subject.network
    title = f"{n_features} features of {of}, target {p.target} ({data.source})"
    a = p.analysis
    fp.write_dashboard(
        p.folder / "feature_report.html",
        report,
        layer,
        fp.Shown(a.bank, a.activity, data.val.images, a.heats, a.inked),
        fp.Overview(
            title,
            results,
            record["diagnoses"],
            frontier,
            data.classes,
            "" if network else NO_DRAWING,
        ),
        network=network,
        tests=fp.Tests(*data.test),
    )


WORKER_BYTES = 2e8  # what a worker process takes before it does anything


def memory_bytes() -> float:
    """Of this machine, or of the container it is; infinite where the system does not tell."""
    sizes: list[float] = [math.inf]
    with suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)


def needed_bytes(settings: Settings, data: Data, d_in: int | None = None) -> dict[str, float]:
    """What a run holds at once at the very least, by what it is; float32 unless said otherwise.

    `d_in` is that of a network that is not trained here.
    """
    n_train, n_val, n_test = (len(split.labels) for split in data[:3])
    pixels = data.train.images[0].numel()
    what = f"the layer's {d_in} outputs, by pool" if d_in else "--hidden-units"
    trained = 0 if d_in else pixels  # of each hidden unit
    d_in, d_sae = d_in or settings.hidden_units, settings.sae_latents
    steps = 0
    for epochs, batch in (
        (settings.epochs_ffn, settings.batch_ffn),
        (settings.epochs_sae_final, settings.batch_sae),
    ):
        steps = max(steps, n_steps(n_train, batch, scaled_epochs(epochs, n_train)))
    adam = 4  # weights, their gradients and two moments
    examples = min(settings.topk, n_val) + fa.SAMPLE_PER_FEATURE
    return {
        what: 4 * d_in * (adam * trained + n_train + n_val + n_test + 2 * d_in),
        "the number of images": 4 * pixels * (n_train + n_val + n_test),
        "--sae-latents": 4 * d_sae * (adam * 2 * d_in + n_val + pixels + 5 * examples),
        "--epochs-ffn or --epochs-sae-final": 3 * 4 * steps,
        "--workers": WORKER_BYTES * max(0, settings.workers),
    }


def refuse_too_large(settings: Settings, data: Data, d_in: int | None = None) -> None:
    """Raise InputError, before memory is taken, when a run cannot fit into it."""
    needed, there = needed_bytes(settings, data, d_in), memory_bytes()
    device = data.train.labels.device
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    if sum(needed.values()) > there:
        most = max(needed, key=needed.get)
        raise InputError(
            f"at least {sum(needed.values()) / 1e9:,.0f} GB of memory are needed, but there are "
            f"{there / 1e9:,.1f} GB; lower {most}"
        )


def prepare_subject(settings: Settings, clock: Clock, made: str = "") -> tuple[Data, Subject]:
    """The images, and the classifier with what it makes of them. `made` is the digest of the
    classifier that another process of this run has made; then this one is read, and nothing
    told."""
    device = pick_device(settings.device)
    if device.type == "cuda":
        make_cuda_repeatable()
    with clock("data"):
        data = load_images(settings.data, settings.seed, device)
    sizes = " / ".join(f"{len(split.labels):,}" for split in data[:3])
    repeated = None
    if not made:
        print(
            f"data: {data.source}; {sizes} train, validation, test; device {device}, "
            f"seed {settings.seed}"
        )
        repeated = repeated_images(data)
        tell_repeated(data, repeated)
    refuse_too_large(settings, data)
    with clock("classifier"):
        if made:
            model, digest = made_classifier(settings, data, made), made
        else:
            model, digest = classifier_stage(settings, data, Path(settings.out))
    with clock("preactivations"):
        pre = collect_preactivations(model, data, settings.normalize_z)
    return data, Subject(model, digest, pre, data.source, data.digest, repeated=repeated)


def made_classifier(settings: Settings, data: Data, digest: str) -> Classifier:
    """See `stage_made`. Raises InputError where it was trained on other images, too."""
    stage = stage_made(Path(settings.out), "classifier", digest, i=settings.hidden_units)
    if stage.record["data_digest"] != data.digest:
        raise InputError(
            f"the classifier in {settings.out} was trained on {stage.record.get('data')}; found "
            f"here: {data.source}. All ranks must see the same images"
        )
    return restored_classifier(stage.tensors).to(data.train.labels.device)


def prepare_targets(
    settings: Settings, subject: Subject, data: Data, clock: Clock, jobs: Jobs
) -> list[Prepared]:
    """Train all SAEs, then analyse each target's and freeze what its features may mean.

    Everything is on record before anything is measured on a test image.
    """
    root = Path(settings.out)
    with clock("sae"):
        trained = train_saes(settings, subject, jobs)
    remove_results_of(settings)
    remove_results_of_others(settings, subject)
    if subject.network != OWN_NETWORK:
        drop_classifier(root)
    digests = {target: saes[0].digest for target, saes in trained.items()}
    this_rank().share((subject.digest, digests))  # the others may read what is saved
    prepared = []
    for target, saes in trained.items():
        prepared.append(prepare_target(target, saes, settings, subject, data, jobs))
        if settings.hypotheses:
            frozen = [{"target_actives": p.target, "hypotheses_sha256": p.frozen} for p in prepared]
            fa.write_whole(root / "summary.json", to_json(frozen))
    return prepared


def drop_classifier(root: Path) -> None:
    """Keep aside a classifier that a run of the script trained in this folder: it is not what is
    explained, and its course of training is not that of the network which is."""
    if has_stage(root, "classifier"):
        kept = free_name(root, "classifier")
        print(f"classifier: the one in {root} is not what is explained; it is kept as {kept}")
        keep_aside(root, "classifier")
        write_log(root, "classifier", [])


def other_targets(settings: Settings) -> list[Path]:
    """Folders of targets that an earlier run had and this one has not; one with a classifier beside
    its SAE is a run of its own."""
    ours, found = folders_of(settings), []
    for folder in sorted(Path(settings.out).glob("target_*")):
        is_target = re.fullmatch(r"target_\d+", folder.name) and (folder / "sae.json").exists()
        if is_target and folder not in ours and not (folder / "classifier.json").exists():
            found.append(folder)
    return found


def remove_results_of_others(settings: Settings, subject: Subject) -> None:
    """Those of `other_targets` that are of another classifier, with a word about it."""
    for folder in other_targets(settings):
        try:
            with alone_in(folder, settings.wait):
                with suppress(InputError):  # damaged: nobody knows of what it is
                    if read_stage(folder, "sae").record["classifier_sha256"] == subject.digest:
                        continue
                had_results = (folder / "feature_report.json").exists()
                remove_results(folder)
        except BusyError as busy:  # what is trained is not lost for that
            print(f"{busy}; its results stay")
            continue
        if had_results:
            print(f"{folder}: removed its results, which are of another classifier; its SAE stays")


PASSING = ("fresh", "wait", "workers")  # settings that decide nothing about what comes out


def write_settings(
    settings: Settings,
    subject: Subject,
    data: Data,
    prepared: Sequence[Prepared],
    reports: Sequence[list[dict]],
) -> None:
    """settings.json: what makes a folder a finished run, so it is written last; `reports` are those
    of the `prepared`."""
    kept = asdict(settings)
    for name in PASSING:
        del kept[name]
    of_reports = {}
    for p, report in zip(prepared, reports, strict=True):
        of_reports[str(p.target)] = hashlib.sha256(to_json(report)).hexdigest()
    described = {
        "settings": kept,
        "data": subject.source,
        "data_digest": subject.data_digest,
        "network": subject.network,
        "classifier_sha256": subject.digest,
        "sae_sha256": {str(p.target): p.trained.digest for p in prepared},
        "classes": data.classes,
        "report_sha256": of_reports,
        "hypotheses_sha256": {str(p.target): p.frozen for p in prepared if p.frozen},
    }
    fa.write_whole(Path(settings.out) / "settings.json", to_json(described), durable=True)


def explain_subject(
    settings: Settings, data: Data, subject: Subject, clock: Clock, jobs: Jobs
) -> list[dict]:
    """Everything from the SAE on; returns the records of summary.json."""
    root = Path(settings.out)
    prepared = prepare_targets(settings, subject, data, clock, jobs)
    finished = [finish_target(p, settings, subject, data, jobs) for p in prepared]
    records = [record for record, _ in finished]

    keys = {"l0": "achieved_actives_test", "fvu": "fvu", "agreement": "agreement_jumprelu"}
    frontier = [{name: r[key] for name, key in keys.items()} for r in records]
    for p, (record, report) in zip(prepared, finished, strict=True):
        with p.clock("page"):
            write_page(p, record, report, frontier, subject, data)
    if len(records) > 1:
        draw_frontier(records, root / "frontier.png")

    total = time.perf_counter() - clock.started
    for p, record in zip(prepared, records, strict=True):
        in_jobs = {f"{name}, in jobs": s for name, s in jobs.seconds.items()}
        record["seconds"] = {**clock.seconds, **p.clock.seconds, **in_jobs, "whole run": total}
    fa.write_whole(root / "summary.json", to_json(records), durable=True)
    write_settings(settings, subject, data, prepared, [report for _, report in finished])
    print("\n" + results_table(records))
    print("\n" + seconds_table(records))
    print(places_to_look(root, settings, records))
    return records


@contextmanager
def alone_in(folder: Path, wait: bool) -> Iterator[None]:
    """A folder to which nobody else writes meanwhile, without what killed runs left there.

    Whoever holds one may ask for those inside it, never for those around it: so no two wait for
    each other.
    """
    prepare_folder(folder)
    with only_writer(folder, wait):
        for inside in ("", "saelens/"):
            remove_unfinished(folder, inside)
        yield


def folders_of(settings: Settings) -> list[Path]:
    """The run's own, and those of its targets inside it."""
    root = Path(settings.out)
    inside = (target_folder(root, settings, target) for target in settings.target_actives)
    return list(dict.fromkeys([root, *inside]))


def refuse_edited_claims(settings: Settings) -> None:
    """Raise InputError where frozen hypotheses were edited, in any folder whose results may go."""
    for folder in [*folders_of(settings), *other_targets(settings)]:
        if not settings.fresh and (folder / "hypotheses.json").exists():
            refuse_changed_hypotheses(folder, recorded_claims(Path(settings.out), folder))


def n_workers(settings: Settings) -> int:
    """Processes beside this one; ranks on one machine share its cores."""
    if settings.workers >= 0:
        return settings.workers
    ranks_here = max(told_number("LOCAL_WORLD_SIZE", 1), 1)
    return min(max(available_cores() // ranks_here - 1, 0), MOST_WORKERS)


@contextmanager
def working(settings: Settings) -> Iterator[Jobs]:
    """The run's folders, to which nobody else writes meanwhile, and its workers."""
    with ExitStack() as held:
        for folder in folders_of(settings):
            held.enter_context(alone_in(folder, settings.wait))
        refuse_edited_claims(settings)
        with torch_threads(1), Jobs(n_workers(settings)) as jobs:
            yield jobs


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """The whole run, or a sweep; returns the records of summary.json or sweep.json. Raises
    InputError, DataError or TrainingError."""
    clock = Clock(STARTED)
    clock.seconds["imports"] = time.perf_counter() - STARTED
    runs = parse_runs(argv)
    with ranks(runs[0].device) as rank:
        refuse_unlike_ranks(runs, rank)
        if len(runs) > 1:
            return sweep_alone(runs, rank)
        (settings,) = runs
        if rank.number:
            return help_first_rank(settings, clock)
        with working(settings) as jobs:
            data, subject = prepare_subject(settings, clock)
            return explain_subject(settings, data, subject, clock, jobs)


# --------------------------------------------------------------------------------------------------
# Sweeps: every combination of seeds, numbers of latents and targets, trained once and measured
# --------------------------------------------------------------------------------------------------

SWEEP_TABLE = (  # what is told of a combination, with its form
    ("active, test", "achieved_actives_test", "{:.2f}"),
    ("FVU", "fvu", "{:.4f}"),
    ("FVU to PCs", "fvu_to_pca", "{:.3f}"),
    ("agreement", "agreement_jumprelu", "{:.2%}"),
    ("accuracy lost", "delta_acc_jumprelu", "{:.2%}"),
    ("dead", "dead_features", "{:.1f}"),
    ("L0 by dense", "dense_share_of_l0", "{:.1%}"),
)


def combinations(runs: Sequence[Settings]) -> list[Settings]:
    """One Settings for each SAE, with a folder of its own: that of a run of these settings."""
    singles = []
    for run in runs:
        for target in run.target_actives:
            name = f"seed_{run.seed}_latents_{run.sae_latents}_target_{target}"
            out = str(Path(run.out) / name)
            singles.append(replace(run, target_actives=(target,), out=out))
    return singles


def train_combination(settings: Settings, classifiers: str, made: str) -> tuple[dict, str]:
    """Train the SAE of one combination and measure it; what an earlier call finished is reused.

    The classifier of its seed is in the folder `classifiers`, its digest is `made`. Returns its
    record, and what to tell the user.
    """
    (target,) = settings.target_actives
    folder = Path(settings.out)
    data, subject = prepare_subject(replace(settings, out=classifiers), Clock(), made)
    with alone_in(folder, settings.wait):
        if not settings.fresh:
            refuse_changed_hypotheses(folder, recorded_claims(folder, folder))
        trained = sae_stage(settings, target, subject, folder)
        if explained_there(folder) != {str(target): trained.digest}:
            remove_results(folder)
        record = {**chosen(settings, ["seed", "sae_latents"]), "target_actives": target}
        record |= {"data_digest": data.digest, "lambda": trained.record["lambda"]}
        record |= measure(trained, subject, data.test.labels, target)
        fa.write_whole(folder / "combination.json", to_json(record))
    return record, trained.news


def explained_there(folder: Path) -> dict[str, str]:
    """By target, the digest of the SAE that a finished run in the folder explains."""
    try:
        return read_settings(folder).sae_sha256
    except InputError:  # no finished run
        return {}


def sweep_alone(runs: Sequence[Settings], rank: Rank) -> list[dict]:
    """`sweep`, while no other run writes to its folder; the first rank holds it for all."""
    if rank.number:
        rank.wait()  # until the first one has it
        return sweep(runs, rank)
    with alone_in(Path(runs[0].out), runs[0].wait):
        rank.wait()
        return sweep(runs, rank)


def sweep(runs: Sequence[Settings], rank: Rank) -> list[dict]:
    """Every combination, shared among ranks and among the worker processes of each; the first rank
    returns their records and writes sweep.json and sweep.png."""
    root = Path(runs[0].out)
    singles = combinations(runs)
    mine = singles[rank.number :: rank.count]
    places = {}
    for single in singles:
        places[single.seed] = str(root / f"seed_{single.seed}_classifier")
    one_at_a_time = pick_device(runs[0].device).type != "cpu"

    with torch_threads(1), Jobs(0 if one_at_a_time else n_workers(runs[0])) as jobs:
        first_of = {single.seed: single for single in reversed(singles)}
        seeds, started = sorted(first_of)[rank.number :: rank.count], []
        for seed in seeds:
            given = (replace(first_of[seed], out=places[seed]), places[seed])
            started.append(jobs.start("classifier", train_only_classifier, *given))
        made: dict[int, str] = {}  # digests of classifiers, by seed
        for part in rank.share(dict(zip(seeds, jobs.results(started), strict=True))):
            made |= part
        started = []
        for single in mine:
            given = (single, places[single.seed], made[single.seed])
            started.append(jobs.start("sae", train_combination, *given))
        parts = rank.gather(jobs.results(started))
    if parts is None:
        return []
    found: list = [None] * len(singles)
    for number, part in enumerate(parts):
        found[number :: rank.count] = part
    for single, (_, news) in zip(singles, found, strict=True):
        if news:
            print(f"{single.out}: {news}")
    records = [record for record, _ in found]
    fa.write_whole(root / "sweep.json", to_json(records))
    draw_sweep(records, root / "sweep.png")
    print(sweep_table(records))
    command = shlex.join(["python", "MNIST_SAE_code.py", *flags_of(singles[0])])
    print(f"\n{root / 'sweep.png'} shows this. One of them explained, its SAE reused: {command}")
    return records


def train_only_classifier(settings: Settings, folder: str) -> str:
    """The classifier of a seed, into its folder; its digest."""
    data = load_images(settings.data, settings.seed, pick_device(settings.device))
    with alone_in(Path(folder), settings.wait):
        return classifier_stage(settings, data, Path(folder))[1]


def over_seeds(records: Sequence[dict], latents: int, target: int, key: str) -> dict:
    """Mean and spread of a measurement over the seeds of one combination."""
    found = []
    for r in records:
        if (r["sae_latents"], r["target_actives"]) == (latents, target):
            found.append(math.nan if r[key] is None else r[key])
    return mean_and_spread(np.array(found))


def sizes_and_targets(records: Sequence[dict]) -> tuple[list[int], list[int]]:
    latents = sorted({r["sae_latents"] for r in records})
    return latents, sorted({r["target_actives"] for r in records})


def sweep_table(records: Sequence[dict]) -> str:
    """One row for each number of latents and target: means over seeds ± their spread."""
    n_seeds = len({r["seed"] for r in records})
    rows = [["latents", "target", *(title for title, _, _ in SWEEP_TABLE)]]
    for latents, target in itertools.product(*sizes_and_targets(records)):
        row = [str(latents), str(target)]
        for _, key, form in SWEEP_TABLE:
            found = over_seeds(records, latents, target, key)
            if math.isnan(found["mean"]):
                row.append(NOT_COMPUTED)
                continue
            words = form.format(found["mean"])
            if found["std"] is not None:
                words += f" ± {form.format(found['std'])}"
            row.append(words)
        rows.append(row)
    return f"Mean ± standard deviation over {n_seeds} seeds\n" + fc.text_table(rows)


def draw_sweep(records: Sequence[dict], path: Path) -> None:
    """The frontier of each number of latents, with the spread over seeds."""
    sizes, targets = sizes_and_targets(records)
    panels: dict[str, dict[str, Curve]] = {}
    for title, key, _ in SWEEP_TABLE:
        if key in (
            "achieved_actives_test",
            "agreement_jumprelu",
        ):  # the axis; seen as accuracy lost
            continue
        panels[title] = {}
        for latents in sizes:
            found = [over_seeds(records, latents, target, key) for target in targets]
            l0 = [over_seeds(records, latents, t, "achieved_actives_test")["mean"] for t in targets]
            values = [f["mean"] for f in found]
            spread = [f["std"] or 0.0 for f in found]
            panels[title][f"{latents} latents"] = Curve(l0, values, spread)
    title = "What the number of active features changes (bars: spread over seeds)"
    draw_curves(path, title, targets, panels)


# --------------------------------------------------------------------------------------------------
# Several machines: ranks that torchrun starts, and a folder that all can write to
# --------------------------------------------------------------------------------------------------

PATIENCE = timedelta(days=7)  # a rank may train for so long while others wait


@contextmanager
def meeting() -> Iterator[None]:
    """What ranks do together. Raises InputError where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"another rank has ended, and says why itself ({reason})") from error


class Rank(NamedTuple):
    """Which of how many processes this is."""

    number: int = 0
    count: int = 1

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.count > 1:
            with meeting():
                torch.distributed.barrier()

    def gather(self, value: object) -> list | None:
        """The values of all ranks in their order, for the first one; None for the others."""
        if self.count == 1:
            return [value]
        found = [None] * self.count if self.number == 0 else None
        with meeting():
            torch.distributed.gather_object(value, found)
        return found

    def share(self, value: object) -> list:
        """The values of all ranks in their order, for every one."""
        found = [value] * self.count
        if self.count > 1:
            with meeting():
                torch.distributed.all_gather_object(found, value)
        return found


def told_number(name: str, usual: int, below: int = sys.maxsize) -> int:
    """A number from 0 that torchrun puts into the environment. Raises InputError."""
    said = os.environ.get(name, str(usual))
    if not (said.isascii() and said.isdecimal() and int(said) < below):
        raise InputError(
            f"{name} is {said!r} in the environment, not a number from 0 to {below - 1}; start "
            f"ranks with torchrun, and unset WORLD_SIZE for a run on its own"
        )
    return int(said)


def place_among_ranks() -> Rank:
    """What the environment says. Raises InputError where it is not what torchrun says."""
    count = told_number("WORLD_SIZE", 1)
    if count <= 1:
        return Rank()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"WORLD_SIZE is {count} in the environment, but there is no {name}; start ranks "
                f"with torchrun, and unset WORLD_SIZE for a run on its own"
            )
    told_number("MASTER_PORT", 0, 2**16)
    return Rank(told_number("RANK", 0, count), count)


@contextmanager
def ranks(device: str) -> Iterator[Rank]:
    """The rank of this process, as torchrun's environment says; without it, the only one."""
    rank = place_among_ranks()
    if rank.count == 1:
        yield rank
        return
    if pick_device(device).type == "cuda":
        torch.cuda.set_device(told_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    # On a GPU, too: what travels are objects of the CPU, and ranks without one must be told.
    try:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise InputError(f"the ranks cannot meet at {where} ({reason})") from error
    before = THIS_RANK.set(rank)
    try:
        yield rank
    finally:
        THIS_RANK.reset(before)
        torch.distributed.destroy_process_group()


THIS_RANK: ContextVar[Rank] = ContextVar("rank")  # inside of `ranks`


def this_rank() -> Rank:
    """The rank of this process in a run of `main`; somebody else's process group is not ours."""
    return THIS_RANK.get(Rank())


DECISIVE = [f.name for f in fields(Settings) if f.name not in (*PASSING, "data", "device")]


def decisive_facts(runs: Sequence[Settings]) -> dict[str, object]:
    """All that decides what this rank makes, by what it is called."""
    device = pick_device(runs[0].device)
    facts: dict[str, object] = {}
    for name in DECISIVE:
        values = list(dict.fromkeys(getattr(run, name) for run in runs))
        facts[flag_name(name)] = values if len(values) > 1 else values[0]
    data = load_images(runs[0].data, runs[0].seed, device)
    code = code_below_settings() + Path(fa.__file__).read_text(encoding="utf-8")
    facts |= {"data": f"{data.source}, digest {data.digest[:12]}", "device": device.type}
    facts |= {"code": f"digest {hashlib.sha256(code.encode()).hexdigest()[:12]}"}
    facts |= {"torch": torch.__version__}
    if len(runs) > 1:  # in a single run only the first rank trains
        threads = [threads_for(run.hidden_units, run.sae_latents) for run in runs]
        facts["cores of a training"] = max(threads)
    return facts


def refuse_unlike_ranks(runs: Sequence[Settings], rank: Rank) -> None:
    """Raise InputError, the same on every rank, unless all would make the same: each one makes a
    part of the whole."""
    if rank.count == 1:
        return
    if rank.number:
        rank.wait()  # for the first one, which may have to download the images
    facts, failed = {}, ""
    try:
        facts = decisive_facts(runs)
    except (InputError, DataError) as error:
        failed = str(error)
    if not rank.number:
        rank.wait()
    found = rank.share((facts, failed))
    for number, (_, failed) in enumerate(found):
        if failed:
            raise InputError(failed + f" (rank {number})" * bool(number))
    expected = found[0][0]
    for number, (facts, _) in enumerate(found):
        if facts != expected:
            names = [n for n in expected if n in facts and facts[n] != expected[n]]
            unlike = [f"{n} is {facts[n]}, not {expected[n]}" for n in names]
            raise InputError(
                f"rank {number} differs from rank 0: {'; '.join(unlike)}. Ranks make parts of one "
                f"whole: give all of them the same command, images, code and versions"
            )


def help_first_rank(settings: Settings, clock: Clock) -> list[dict]:
    """What the other ranks do in a single run: their share of the images, for each target.

    The first rank trains; what they need of it they read from the folder that all can write to.
    """
    rank = this_rank()
    classifier, saes = rank.share(None)[0]  # once they are saved, their digests
    with torch_threads(1):
        data, subject = prepare_subject(settings, clock, classifier)
        for target in settings.target_actives:
            folder = target_folder(Path(settings.out), settings, target)
            sizes = {"i": settings.hidden_units, "s": settings.sae_latents}
            sae = stage_made(folder, "sae", saes[target], **sizes)
            layer = subject.layer(restored_sae(sae.tensors).to(subject.device))
            rank.gather(share_of_bank(layer, data, settings, rank))
    return []


def share_of_bank(
    layer: fa.ExplainedLayer, data: Data, settings: Settings, rank: Rank
) -> fa.FeatureBank | None:
    """The bank of this rank's batches of validation images; None where it has none.

    Batches are whole, and merging is exact: the bank of all does not depend on how many ranks there
    are.
    """
    batches_of_all = list(TensorLoader(data.val))
    cut = np.linspace(0, len(batches_of_all), rank.count + 1).round().astype(int)
    first, last = int(cut[rank.number]), int(cut[rank.number + 1])
    if first == last:
        return None
    before = sum(len(labels) for _, labels in batches_of_all[:first])
    model, sae, mu, std = layer
    topk = min(settings.topk, len(data.val.labels))
    return fa.collect_feature_bank(
        model, batches_of_all[first:last], sae, mu, std, topk, before, whole=False
    )


def shared_bank(layer: fa.ExplainedLayer, data: Data, settings: Settings) -> fa.FeatureBank:
    """The bank of all validation images, each rank having looked at its share of them."""
    rank = this_rank()
    parts = rank.gather(share_of_bank(layer, data, settings, rank))
    return functools.reduce(fa.merge_feature_banks, [part for part in parts if part is not None])


# --------------------------------------------------------------------------------------------------
# Any network
# --------------------------------------------------------------------------------------------------


def _images_and_labels(given: object) -> tuple[Tensor, Tensor]:
    """Images and labels of a pair of arrays, a DataLoader or a Dataset; what these cannot give
    raises."""
    if isinstance(given, torch.utils.data.DataLoader):
        images, labels = (torch.cat(part) for part in zip(*fa.in_order(given), strict=True))
        if given.drop_last and len(images) < len(given.dataset):
            raise ValueError(f"it drops {len(given.dataset) - len(images)} images at its end")
        return images, labels
    if isinstance(given, (tuple, list)):
        images, labels = (torch.as_tensor(part) for part in given)
        return images, labels
    pairs = [given[i] for i in range(len(given))]
    images = torch.stack([torch.as_tensor(image) for image, _ in pairs])
    return images, torch.as_tensor([label for _, label in pairs])


def whole_split(given: object, name: str, device: torch.device) -> Split:
    """Images and labels as tensors on `device`, from a pair of tensors, a Dataset of (image, label)
    pairs, or a DataLoader, read once. Raises InputError where they are none of these."""
    try:
        images, labels = _images_and_labels(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}, a {type(given).__name__}, gives no images and labels ({error}); give a pair "
            f"of tensors, a Dataset of such pairs, or a DataLoader that does not shuffle"
        ) from error
    images = images.clone() if images.is_inference() else images  # or no gradient flows to them
    images = images[:, None] if images.dim() == 3 else images
    fits = images.dim() == 4 and images.shape[1] in (1, 3) and labels.shape == images.shape[:1]
    if not fits or len(images) < 2 or labels.is_floating_point():
        raise InputError(
            f"{name} has images of shape {tuple(images.shape)} and {labels.dtype} labels of shape "
            f"{tuple(labels.shape)}; (N, C, H, W), C being 1 or 3, and whole numbers (N,) are "
            f"needed, of two images at least"
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError(f"{name} has pixels that are not finite numbers")
    return Split(images.to(device).float(), labels.to(device).long())


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def data_of(splits: Sequence[Split], classes: Sequence[str], n_classes: int) -> Data:
    """The splits that explain() was given. Raises InputError for names or labels that do not
    fit."""
    names = tuple(map(str, classes)) or tuple(map(str, range(n_classes)))
    if len(names) != n_classes or len(set(names)) < n_classes:
        raise InputError(
            f"classes has {len(set(names))} different names; the network has {n_classes} logits"
        )
    for name, split in zip(("train", "val", "test"), splits, strict=True):
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= n_classes:
            raise InputError(
                f"labels of {name} run from {low} to {high}; the network has {n_classes} logits, "
                f"so 0 to {n_classes - 1} are needed"
            )
    n = sum(len(split.labels) for split in splits)
    tensors = [tensor for split in splits for tensor in split]
    return Data(*splits, names, f"{n:,} images of one's own", digest_of(tensors))


FAR = 1.0  # standard deviations that units may lie off on average: one class alone stays below
WIDE = 3.0  # times that they may spread further, or less far


def tell_other_scale(pre: Preactivations) -> None:
    """Print a line for validation and test images that the layer takes for something else than
    training images: some are normalised, others not, or so it seems."""
    mean, std = pre.train.mean(0), usable_std(pre.train.std(0))
    for name in ("val", "test"):
        z = (getattr(pre, name) - mean) / std
        off, spread = z.mean(0).abs().mean().item(), z.std(0).median().item()
        if off > FAR or not 1 / WIDE < spread < WIDE:
            print(
                f"the layer's outputs on {SPLITS[name]} images lie {off:.1f} standard deviations "
                f"off those on training images and spread {spread:.2g} times as far; are all "
                f"images scaled alike?"
            )


def refuse_wholly_seen(data: Data, repeated: dict[tuple[str, str], int]) -> None:
    """Raise InputError where all images of a split, which should be unseen, are in an earlier."""
    for (name, earlier), n in repeated.items():
        if n == len(getattr(data, name).labels):
            raise InputError(
                f"all {n:,} images of {name} are in {earlier}, too, so none is unseen; give three "
                f"splits without common images"
            )


@contextmanager
def usual_torch() -> Iterator[None]:
    """float32, full precision and gradients, whatever the caller has switched on or off."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


@usual_torch()
def explain(
    model: nn.Module,
    layer: str | None,
    train: object,
    val: object,
    test: object,
    *,
    classes: Sequence[str] = (),
    target: int = TARGET_ACTIVES[0],
    pool: str | None = None,
    **settings: object,
) -> Run:
    """Train an SAE on a layer of any network, and explain its features: all that the script does.

        run = explain(model, "features.7", train, val, test, classes=names, out="explained")

    Args:
        model: maps images (B, C, H, W) to logits (B, n_classes). It runs in evaluation mode where
            it is, and is left as it was.
        layer: its name, as in `model.named_modules()`; None for a model that itself has the methods
            `preactivations` and `logits_from_preactivations`.
        train, val, test: pairs of tensors (images, labels), Datasets or DataLoaders. The SAE is
            trained on the first, hypotheses are made from the second, and tested on the third.
        classes: names of the logits.
        target: mean number of active features per image.
        pool: for a layer with positions, as in `feature_analysis.AtLayer`.
        settings: any other of `Settings`, by name: out, sae_latents, hypotheses, fresh, ... There
            are twice as many latents as d_in, or as the target if that is more, unless it is said,
            and no worker processes.

    Returns the run as `load_run` does; its files lie in `out`. A second call with the same network
    and images reuses the SAE. Raises InputError for what cannot be used, ValueError for a layer
    that the logits do not depend on alone, or from which no gradient leads to the pixels.
    """
    clock = Clock(time.perf_counter())
    net = network_of(model, layer, pool)
    given = {"train": train, "val": val, "test": test}
    splits = [whole_split(split, name, net.device) for name, split in given.items()]
    d_in, n_classes = sizes_of(net, splits[0].images)
    data = data_of(splits, classes, n_classes)
    repeated = repeated_images(data)
    refuse_wholly_seen(data, repeated)
    tell_repeated(data, repeated)
    own = own_settings(target, d_in, net.device, settings)
    if net.device.type == "cuda":
        make_cuda_repeatable()
    refuse_too_large(own, data, d_in)
    root = Path(own.out)
    with working(own) as jobs:
        subject = subject_of(net, data, own, clock)._replace(repeated=repeated)
        tell_other_scale(subject.pre)
        explain_subject(own, data, subject, clock, jobs)
        trained = sae_stage(replace(own, fresh=False), target, subject, root)
        report = hashlib.sha256((root / "feature_report.json").read_bytes()).hexdigest()
    loaders = {name: TensorLoader(getattr(data, name)) for name in given}
    pre = subject.pre
    return Run(net, trained.sae, pre.mu, pre.std, loaders, own, data, root, report)


def sizes_of(net: fa.AtLayer | fa.InEvaluation, images: Tensor) -> tuple[int, int]:
    """How many outputs the layer has, and how many classes the network; before anything is trained,
    so that gradients that do not reach the pixels are an error here, too."""
    with torch.no_grad():
        raw = net.preactivations(images[: fa.PROBED])
        n_classes = net.logits_from_preactivations(raw).shape[1]
    fa.refuse_no_gradients(net, images)
    return raw.shape[1], n_classes


def network_of(
    model: nn.Module | fa.AtLayer, layer: str | None, pool: str | None
) -> fa.AtLayer | fa.InEvaluation:
    """What explain() was given, with the two methods. Raises ValueError for an unknown layer,
    InputError for what is no module, or has no such methods where no layer is named."""
    methods = ("preactivations", "logits_from_preactivations")
    named = layer is not None
    if not isinstance(model, nn.Module if named else (nn.Module, fa.AtLayer)):
        raise InputError(
            f"the model is a {type(model).__name__}; explain() takes a torch.nn.Module"
            f"{'' if named else ' that has the methods ' + ' and '.join(methods)}"
        )
    if not named and not all(callable(getattr(model, name, None)) for name in methods):
        raise InputError(
            f"{type(model).__name__} has no methods {' and '.join(methods)}; name one of its layers"
        )
    module = model.model if isinstance(model, fa.AtLayer) else model
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise InputError(
            "the model was made in torch.inference_mode(), so no gradients flow through it; make "
            "it outside"
        )
    if named:
        return fa.AtLayer(model, layer, pool)
    return model if isinstance(model, fa.AtLayer) else fa.InEvaluation(model)


DECIDED = ("target_actives", "data", "device", "hidden_units")  # by what explain() is given


def own_settings(target: int, d_in: int, device: torch.device, given: dict) -> Settings:
    """Settings of a call of explain(). Raises InputError for a name that is none."""
    known = [f.name for f in fields(Settings) if f.name not in DECIDED]
    for name in given:
        if name not in known:
            raise InputError(f"explain() has no setting {name!r}; it has {', '.join(known)}")
    usual = {"sae_latents": 2 * max(d_in, target), "workers": 0}
    script = getattr(sys.modules["__main__"], "__file__", None)
    if given.get("workers") and script and not Path(script).exists():
        raise InputError(f"worker processes cannot start from {script}; use workers=0, or a file")
    return Settings(target_actives=(target,), device=str(device), **{**usual, **given})


def subject_of(
    net: fa.AtLayer | fa.InEvaluation, data: Data, settings: Settings, clock: Clock
) -> Subject:
    """A network that explain() was given, and what it makes of every image."""
    with clock("preactivations"):
        pre = collect_preactivations(net, data, settings.normalize_z)
    layer = f"layer {net.name}" if isinstance(net, fa.AtLayer) else "a layer"
    name = f"{layer} of {type(net.model).__name__}"
    subject = Subject(net, "", pre, data.source, data.digest, name)
    with torch.no_grad():  # of what the SAE learns from, not of code that nobody can hash
        logits = subject.logits_of(pre.standardised("val"))
    return subject._replace(digest=digest_of([*pre, logits, *net.model.state_dict().values()]))


class Terminated(BaseException):
    """SIGTERM: like KeyboardInterrupt, nothing but the end of the run may catch it."""


def stop(number: int, _: object) -> None:
    """For the first Ctrl-C or SIGTERM; a second one is not waited for."""
    signal.signal(number, leave_at_once)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def run_script() -> int:
    """main, with the errors a user can cause as one line on stderr and exit status 2."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    status = 2
    try:
        main()
        return 0
    except (InputError, DataError, TrainingError) as error:
        words = str(error)
    except BusyError as error:
        words = f"{error}; give --wait to wait for it, or another --out"
    except BrokenProcessPool:
        words = "a worker process was ended from outside (out of memory?); try --workers 0"
    except BrokenPipeError:  # whoever read our output has had enough
        return 2
    except OSError as error:
        words = f"{error.filename or 'a file'} could not be written or read ({error.strerror})"
    except KeyboardInterrupt:
        words, status = "interrupted; finished stages are saved and will be reused", 130
    except Terminated:
        words, status = "terminated; finished stages are saved and will be reused", 143
    except (MemoryError, RuntimeError) as error:
        if not fa.is_out_of_memory(error):
            raise
        words = "out of memory; lower --sae-latents, --hidden-units or --batch-sae"
    print("error:", words.replace("\n", " "), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run_script())
