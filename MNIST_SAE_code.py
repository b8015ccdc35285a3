"""Train a small MNIST classifier, look inside it with a sparse autoencoder (SAE), explain every feature.

    python MNIST_SAE_code.py                              # everything, into artifacts_mnist_sae/
    python MNIST_SAE_code.py --target-actives 10 20 40    # one SAE per sparsity, and their frontier
    python MNIST_SAE_code.py --seeds 0 1 2                # a sweep: mean and spread over seeds
    python MNIST_SAE_code.py --data sample --features 50  # the bundled sample, 50 features

This file makes and measures one SAE, from top to bottom: settings, classifier, SAE training with its
losses, lambda, thresholds, `explain` for any network, `main`. What a feature means, and whether that holds
on unseen images, is the package saexplain; its numbers and pictures are feature_analysis.py.

Dimension key: N images, B images in a batch, C classes, d_in hidden units, d_sae latents. z are
standardized preactivations (raw - mu) / std, x the coordinates that the SAE is trained in.

References
    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs"
    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss on dying latents)
    Blumensath & Davies 2008, "Iterative thresholding for sparse approximations" (threshold =
    sqrt(lambda))
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import feature_analysis as fa
from saexplain import console, figures, page
from saexplain.baselines import default_directions
from saexplain.fidelity import EVAL_ROWS, mean_l0, measure_fidelity, row_chunks
from saexplain.files import (
    BusyError,
    InputError,
    Stage,
    folder_lock,
    load_cached,
    load_stage,
    prepare_folder,
    read_json,
    save_stage,
    to_json,
)
from saexplain.hypotheses import read_hypotheses
from saexplain.images import Data, Split, TensorLoader, check_split_leakage, digest_of, load_images
from saexplain.layers import collect_activations, default_torch_state, open_layer, warn_scale_shift
from saexplain.parallel import Stopwatch, Workers, torch_threads, worker_count
from saexplain.report import (
    Options,
    finish_report,
    frontier_of,
    load_splits,
    prepare_report,
    remove_results,
    write_page,
)
from saexplain.reproducibility import compare_seeds
from saexplain.sae import JumpReLUSAE
from saexplain.sweep import run_sweep

# --------------------------------------------------------------------------------------------------
# Settings: edit a line here, or give the flag of the same name (TARGET_ACTIVES: --target-actives)
# --------------------------------------------------------------------------------------------------

TARGET_ACTIVES = [20]  # mean number of active features per image; each target gets its own SAE
SAE_LATENTS = 512  # four per hidden unit
EPOCHS_SAE_FINAL = 5  # passes over the training images; more lowers FVU slowly
BATCH_SAE = 128  # many small steps beat few large ones: 256 is faster, FVU a tenth worse
LR_SAE = 1.3e-2  # peak Adam rate; 1e-3 trebles FVU in so few epochs
HEAD_KL = 0.15  # weight of the classifier's logits in the SAE loss; 0 ignores what z is used for
NORMALIZE_Z = True  # standardize each hidden unit first, so that loud ones do not own the SAE
HIDDEN_UNITS = 128  # width of the classifier's hidden layer, d_in of the SAE
EPOCHS_FFN = 3  # passes over the training images for the classifier
BATCH_FFN = 256  # images per classifier step
LR_FFN = 2e-2  # peak AdamW rate of one cycle; reaches in 3 epochs what 1e-3 needs 12 for
WEIGHT_DECAY_FFN = 0.4  # pixels without evidence lose their weight; more costs accuracy
TOPK = 20  # strongest images kept per feature
N_EVAL = 2000  # images over which an effect on the logits is averaged
ALPHA = 1.0  # how much of a feature is added when its logit effect is measured
STROKES = True  # name strokes of ink, where images are pen strokes on a blank ground
HYPOTHESES = True  # propose a hypothesis about every feature, freeze it, test it on the test images
STABILITY_SEEDS = (
    1  # train so many more SAEs from other seeds, to see which features are reproduced
)
FEATURES = 0  # report only this many of the most influential features; 0 reports all
SEED = 0  # same seed and device: the same artifacts
DATA = "auto"  # folder of images in MNIST's format; "sample": 5,000 digits; "auto": find MNIST
OUT = "artifacts_mnist_sae"  # where everything is written
DEVICE = "auto"  # auto takes a CUDA GPU when there is one
WORKERS = -1  # processes beside this one; -1 takes one for each further core
FRESH = False  # train again although finished stages could be reused
WAIT = False  # wait for another run that writes to the same folder


def setting(default, what: str, least: float | None = None):
    """A dataclass field with the help text of its flag, and its smallest value."""
    return field(default=default, metadata={"help": what, "least": least})


@dataclass(frozen=True)
class Settings:
    """Settings of one run, checked; every field is also a flag of the command line."""

    target_actives: tuple[int, ...] = setting(
        tuple(TARGET_ACTIVES), "mean active features per image, one SAE for each"
    )
    sae_latents: int = setting(SAE_LATENTS, "number of SAE features", 2)
    epochs_sae_final: int = setting(EPOCHS_SAE_FINAL, "SAE epochs on the full set", 1)
    batch_sae: int = setting(BATCH_SAE, "images per SAE step", 1)
    lr_sae: float = setting(LR_SAE, "peak SAE learning rate", 1e-9)
    head_kl: float = setting(HEAD_KL, "weight of the classifier's logits in the SAE loss", 0)
    normalize_z: bool = setting(NORMALIZE_Z, "standardize the preactivations")
    hidden_units: int = setting(HIDDEN_UNITS, "width of the classifier's hidden layer", 1)
    epochs_ffn: int = setting(EPOCHS_FFN, "classifier epochs on the full set", 1)
    batch_ffn: int = setting(BATCH_FFN, "images per classifier step", 1)
    lr_ffn: float = setting(LR_FFN, "peak classifier learning rate", 1e-9)
    weight_decay_ffn: float = setting(
        WEIGHT_DECAY_FFN, "decoupled weight decay of the classifier", 0
    )
    topk: int = setting(TOPK, "strongest images kept per feature", 1)
    n_eval: int = setting(N_EVAL, "images over which an effect is averaged", 1)
    alpha: float = setting(ALPHA, "how much of a feature is added to measure its logit effect")
    strokes: bool = setting(STROKES, "name strokes of ink, where images are drawn with a pen")
    hypotheses: bool = setting(HYPOTHESES, "propose, freeze and test a hypothesis per feature")
    stability_seeds: int = setting(STABILITY_SEEDS, "further SAEs, to see what is reproduced", 0)
    features: int = setting(FEATURES, "report so many of the most influential features; 0: all", 0)
    seed: int = setting(SEED, "seed of every random choice", 0)
    data: str = setting(
        DATA, "folder of images in MNIST's file format, or 'sample', or 'auto': MNIST from the web"
    )
    out: str = setting(OUT, "folder for everything that is written")
    device: str = setting(DEVICE, "auto, cpu, cuda or cuda:N")
    workers: int = setting(WORKERS, "processes beside this one; -1: one for each further core", -1)
    fresh: bool = setting(FRESH, "train again instead of reusing finished stages")
    wait: bool = setting(WAIT, "wait while another run writes to the same folder")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, kind, least = getattr(self, f.name), KINDS[f.name], f.metadata["least"]
            accepted = {float: (int, float), int: int}.get(kind)
            if accepted and (isinstance(value, bool) or not isinstance(value, accepted)):
                raise InputError(f"{flag_name(f.name)} must be {kind.__name__}, got {value!r}")
            if accepted and not math.isfinite(value):
                raise InputError(f"{flag_name(f.name)} must be finite, got {value}")
            if least is not None and value < least:
                raise InputError(f"{flag_name(f.name)} must be at least {least:g}, got {value}")
        targets = self.target_actives
        if not targets or len(set(targets)) < len(targets):
            raise InputError(f"--target-actives must be different numbers, got {list(targets)}")
        for target in targets:
            if not isinstance(target, int) or not 0 < target < self.sae_latents:
                raise InputError(
                    f"--target-actives must be whole numbers between 0 and --sae-latents "
                    f"{self.sae_latents}, got {target}"
                )

    def folder_of(self, target: int) -> Path:
        """Where the files of one target are: the run's folder, or a subfolder of several."""
        root = Path(self.out)
        return root if len(self.target_actives) == 1 else root / f"target_{target}"

    def chosen(self, names: str) -> dict:
        """The settings of those names, separated by spaces."""
        return {name: getattr(self, name) for name in names.split()}


KINDS = get_type_hints(Settings)
CLASSIFIER_SETTINGS = "hidden_units epochs_ffn batch_ffn lr_ffn weight_decay_ffn seed"
SAE_SETTINGS = "sae_latents epochs_sae_final batch_sae lr_sae head_kl normalize_z seed"


class TrainingError(RuntimeError):
    """Training left the finite numbers; the message says where, and what to lower."""


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_runs(argv: Sequence[str] | None = None) -> list[Settings]:
    """Settings from flags: of one run, or of one for each of --seeds and --sae-latents.

    Raises InputError for values that cannot be used.
    """

    def fail(message: str) -> None:
        raise InputError(f"{' '.join(message.split())} (--help lists the flags)")

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.error = fail  # one line, as for every other wrong input
    for f in fields(Settings):
        kind: dict = {"type": KINDS[f.name]}
        if KINDS[f.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.name in ("target_actives", "sae_latents"):
            kind = {"type": int, "nargs": "+"}
        parser.add_argument(flag_name(f.name), default=f.default, help=f.metadata["help"], **kind)
    parser.add_argument("--seeds", type=int, nargs="+", help="train every combination of these")
    given = vars(parser.parse_args(argv))
    given["target_actives"] = tuple(given["target_actives"])
    seeds = given.pop("seeds") or [given.pop("seed")]
    latents = given.pop("sae_latents")
    sizes = latents if isinstance(latents, list) else [latents]
    runs = [dict(seed=seed, sae_latents=n) for seed, n in itertools.product(seeds, sizes)]
    return [Settings(**{**given, **run}) for run in runs]


def pick_device(name: str) -> torch.device:
    """The device of that name; for 'auto' the best of this machine. Raises InputError."""
    try:
        device = torch.device(name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
            # CUDA's results repeat themselves only with these two.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({reason}); try --device cpu") from error


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
    if False:
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

    for step, index in enumerate(progress_bar(plan, "classifier", steps)):
        loss = F.cross_entropy(model(train.images[index]), train.labels[index])
        gradients = torch.autograd.grad(loss, weights)
        optimizer.step(gradients, settings.lr_ffn * ramp((step + 0.5) / steps, 0.2, 0.2))
        losses[step] = loss.detach()
        refuse_divergence(losses, step, *blame)
    refuse_bad_weights(model, *blame)
    history = [{"step": step, "loss": losses[step].item()} for step in logged_steps(steps)]
    return model.requires_grad_(False).eval(), history


# --------------------------------------------------------------------------------------------------
# SAE training
# --------------------------------------------------------------------------------------------------


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


class SAESchedule(NamedTuple):
    """How training is steered. This belongs to the method rather than to a run: no flags."""

    start_l0_factor: float = 4.0  # it starts so many times denser, so that every latent finds a use
    l0_settled_at: float = 0.3  # share of training after which the target itself is aimed at
    start_threshold: float = 0.5  # sqrt(lambda) at the start, in units of x
    logits_from: float = 0.5  # share of training after which the logits count: earlier they slow it
    head_temperature: float = 4.0  # softened logits compare all classes on all images
    rare_below: float = 1 / 16  # a latent below this share of the mean density is dying: helped
    rare_coefficient: float = 0.2  # weight of that help; from 0.1 to 0.3 little depends on it
    rare_every: int = 4  # steps between two such helps: at all of them a fifth more work
    rare_at_once: int = 32  # at most so many rare latents explain one image
    rare_share: float = 0.25  # at most this share of the latents is helped at a time, the rarest
    fair_share: float = 1.25  # latents below this share of the mean density pay less lambda
    busy_density: float = 0.25  # latents that fire on a larger share of the images pay more lambda


SCHEDULE = SAESchedule()


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
        self.log_threshold = torch.tensor(math.log(SCHEDULE.start_threshold), device=device)
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
    start = max(target, min(SCHEDULE.start_l0_factor * target, d_sae / 2))
    return target * (start / target) ** max(0.0, 1 - progress / SCHEDULE.l0_settled_at)


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
    start = SCHEDULE.start_threshold
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
    temperature = SCHEDULE.head_temperature
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
    n = max(1, round(SCHEDULE.rare_share * len(density)))
    latents = density.topk(n, largest=False).indices
    rare = density[latents] < rare_below
    own = pre.index_select(1, latents)  # (B, n)
    candidates = own.masked_fill(~rare, -math.inf)
    cut = candidates.topk(min(SCHEDULE.rare_at_once, n), dim=1).values[:, -1:]
    chosen = rare & (candidates >= cut)
    acts = torch.where(chosen, own, 0.0)

    rows = sae.W_dec.index_select(0, latents)  # (n, d_in)
    remaining = error + acts @ rows
    d_explained = remaining * (2 * SCHEDULE.rare_coefficient / remaining.numel())
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

    def subsample(self) -> dict[str, list]:
        """Columns of run.log.jsonl at the `logged_steps`."""
        steps = list(logged_steps(len(self.l0)))
        return {
            "step": steps,
            "loss": self.loss[steps].tolist(),
            "l0": self.l0[steps].tolist(),
            "lambda": self.l0_coefficient[steps].tolist(),
            "dead": self.dead.int().tolist(),
        }

    @classmethod
    def of(cls, steps: int, device: torch.device) -> SAECourse:
        points = len(logged_steps(steps))
        return cls(*torch.zeros(3, steps, device=device), torch.zeros(points, device=device))


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
        self.x = x = self.frame.enter(z)
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
        pre = sae.pre_activations(x)  # (B, d_sae)
        feature_acts = sae.jump(pre)
        active = feature_acts.sign()  # 1 or 0: activations are positive or 0
        x_hat = sae.decode(feature_acts)
        error = x_hat - x
        loss = error.square().mean()  # 1 for a constant prediction: x has mean square 1
        d_x_hat = error * (2 / error.numel())
        if settings.head_kl and progress > SCHEDULE.logits_from:
            d_head = head_gradient(self.teacher_of(index), self.logits_of, self.frame, x_hat)
            d_x_hat.add_(d_head, alpha=settings.head_kl)
        gradients = sae_gradients(sae, x, feature_acts, active, d_x_hat)
        if number % SCHEDULE.rare_every == 0:
            below = SCHEDULE.rare_below * self.target / settings.sae_latents
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
        rare = (self.density / (SCHEDULE.fair_share * l0_target / d_sae)).clamp(max=1)
        busy = (self.density / max(SCHEDULE.busy_density, 2 * self.target / d_sae)).clamp(min=1)
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
    for number, index in enumerate(progress_bar(plan, f"SAE, {target} active", steps)):
        measured = training.step(index, number, (number + 0.5) / steps)
        for record, value in zip(course[:3], measured, strict=True):
            record[number] = value
        if number in logged:
            point = logged.index(number)
            course.dead[point] = training.dead()
        refuse_divergence(course.loss, number, *blame)
    refuse_bad_weights(training.sae, *blame)
    return training.frame.fold(training.sae), course


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
        for chunk in row_chunks(sae, z):
            pre = sae.pre_activations(chunk)
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


def starting_rows(z: Tensor, d_sae: int, seed: int) -> Tensor:
    """Decoder rows (d_sae, d_in) from which training on z (N, d_in) would start, as z has them."""
    generator = torch.Generator(z.device).manual_seed(seed)
    frame = TrainingFrame.of(z)
    x = frame.enter(z)
    return initial_rows(x, d_sae, generator) @ frame.basis.T


# --------------------------------------------------------------------------------------------------
# Stages: trained, or taken from the folder when they were made from equal inputs
# --------------------------------------------------------------------------------------------------


def classifier_stage(settings: Settings, data: Data, folder: Path) -> tuple[Classifier, Stage]:
    """The classifier, trained or reused; its stage is saved in `folder`."""
    device = data.train.labels.device
    inputs = {**settings.chosen(CLASSIFIER_SETTINGS), "data_digest": data.digest}
    inputs |= {"device": device.type, "torch": torch.__version__}
    stage = load_cached(folder, "classifier", inputs, settings.fresh)
    if stage is None:
        model, history = train_classifier(data.train, settings, len(data.classes))
        info = {"data": data.source, "history": history}
        stage = save_stage(folder, "classifier", model.state_dict(), inputs, info)
    return restore_classifier(stage.tensors).to(device), stage


def restore_classifier(tensors: dict[str, Tensor]) -> Classifier:
    hidden_units, n_pixels = tensors["hidden.weight"].shape
    model = Classifier(n_pixels, hidden_units, len(tensors["head.bias"]))
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


def sae_stage(
    layer: fa.ExplainedLayer,
    z: tuple[Tensor, Tensor],
    target: int,
    settings: Settings,
    made_from: dict[str, str],
    folder: Path,
) -> Stage:
    """The SAE of one target, trained on z[0] and calibrated on z[1], or reused.

    z are the standardized training and validation activations (N, d_in); `made_from` holds the
    digests of the data and of the stage before.
    """
    prepare_folder(folder)
    inputs = {"target_actives": target, **settings.chosen(SAE_SETTINGS), **made_from}
    inputs |= {"device": layer.device.type, "torch": torch.__version__}
    stage = load_cached(folder, "sae", inputs, settings.fresh)
    if stage is not None:
        return stage
    with torch_threads(1):
        before, history = train_sae(z[0], layer.logits_of_z, target, settings)
    sae, shift = adjust_thresholds(before, z[1], target)
    if shift == -math.inf and not mean_l0(sae, z[0]):
        raise TrainingError(
            f"SAE training for {target} actives failed: no feature is active on any training "
            f"image, whatever its threshold; lower --lr-sae (now {settings.lr_sae})"
        )
    tensors = {**sae.state_dict(), "threshold_before_shift": before.threshold}
    tensors |= {"mu": layer.mu, "std": layer.std}
    columns = history.subsample()
    info = {
        "threshold_shift": shift if math.isfinite(shift) else None,
        "lambda": history.l0_coefficient[-1].item(),
        "l0_before_shift": mean_l0(before, z[1]),
        "history": [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ],
    }
    return save_stage(folder, "sae", tensors, inputs, info)


def train_saes(
    layer: fa.ExplainedLayer, settings: Settings, made_from: dict[str, str], workers: Workers
) -> dict[int, dict[int, Stage]]:
    """By target and seed, the SAE of the run and those of further seeds, trained or reused."""
    z = tuple(layer.standardize(layer.splits[name].raw) for name in ("train", "val"))
    head = replace(layer, splits={})  # what workers are sent besides z
    seeds = range(settings.seed, settings.seed + settings.stability_seeds + 1)
    tasks = []
    for target in settings.target_actives:
        folder = settings.folder_of(target)
        for seed in seeds:
            place = folder if seed == settings.seed else folder / f"stability_seed_{seed}"
            given = (head, z, target, replace(settings, seed=seed), made_from, place)
            here = not tasks or layer.device.type != "cpu"  # a GPU takes one at a time
            tasks.append(workers.start("sae", sae_stage, *given, here=here))
    stages = iter(workers.results(tasks))
    return {target: {seed: next(stages) for seed in seeds} for target in settings.target_actives}


def restore_sae(stage: Stage, device: torch.device) -> JumpReLUSAE:
    weights = {name: tensor.to(device) for name, tensor in stage.tensors.items()}
    return JumpReLUSAE.from_weights(weights)


# --------------------------------------------------------------------------------------------------
# From activations to the finished folder
# --------------------------------------------------------------------------------------------------


def explain_activations(
    layer: fa.ExplainedLayer,
    data: Data,
    settings: Settings,
    network: str,
    network_digest: str,
    clock: Stopwatch,
    workers: Workers,
    classifier_history: Sequence[dict] = (),
) -> list[dict]:
    """Everything after the activations: SAEs, their analysis and files; the records of
    summary.json. Hypotheses of all targets are frozen before a test image is used."""
    root = Path(settings.out)
    made_from = {"data_digest": data.digest, "network_sha256": network_digest}
    with clock("sae"):
        trained = train_saes(layer, settings, made_from, workers)
    folders = {target: settings.folder_of(target) for target in trained}
    for folder in {root, *folders.values()}:
        if remove_results(folder):
            print(f"{folder}: the results of an earlier run are replaced")
    options = Options(
        classes=data.classes,
        network=network,
        source=data.source,
        **settings.chosen("topk n_eval alpha strokes hypotheses features seed"),
    )
    drafts, records, reports = {}, {}, {}
    for target, stages in trained.items():
        explained = layer.with_sae(restore_sae(stages[settings.seed], layer.device))
        own_clock = Stopwatch()
        drafts[target] = prepare_report(explained, folders[target], options, own_clock, workers)
    for target, draft in drafts.items():
        record = sae_record(draft.layer, target, trained[target][settings.seed], data, settings)
        records[target], reports[target] = finish_target(
            draft, record, trained[target], settings, workers
        )
        write_history(folders[target], target, classifier_history, trained[target][settings.seed])
    for target, draft in drafts.items():
        frontier, weights = frontier_of(list(records.values())), page_weights(layer.model)
        with draft.clock("page"):
            write_page(draft, records[target], reports[target], frontier, weights)
        own = {**clock.seconds, **draft.clock.seconds}
        in_workers = {f"{name}, in tasks": s for name, s in workers.seconds.items()}
        records[target]["seconds"] = {**own, **in_workers, "whole run": clock.total()}
    write_summary(root, settings, data, network, network_digest, trained, records)
    for target, record in records.items():
        print(f"\n{console.features_text(record, reports[target])}")
        print(console.diagnoses_text(record))
    print(f"\n{console.results_table(list(records.values()))}")
    places = {folders[target]: record for target, record in records.items()}
    print(f"\n{console.places_to_look(root, places)}")
    return list(records.values())


def finish_target(draft, record: dict, stages: dict[int, Stage], settings: Settings, workers):
    """`finish_report` with what only the trainer knows: the SAEs of other seeds, and the untrained
    directions that training starts from as a baseline."""
    layer = draft.layer
    z = layer.standardize(layer.splits["val"].raw)
    others = {
        seed: restore_sae(s, layer.device) for seed, s in stages.items() if seed != settings.seed
    }
    with draft.clock("reproducibility"):
        untrained = starting_rows(z, settings.sae_latents, settings.seed + 1)
        replicates = compare_seeds(layer, settings.seed, others, untrained)
    directions = {"untrained SAE": starting_rows(z, settings.sae_latents, settings.seed)}
    directions |= default_directions(z, settings.seed)
    return finish_report(draft, record, replicates, directions, workers)


def sae_record(
    layer: fa.ExplainedLayer, target: int, stage: Stage, data: Data, settings: Settings
) -> dict:
    """What summary.json says about one SAE before its features are explained."""
    return {
        "target_actives": target,
        "lambda": stage.record["lambda"],
        "threshold_shift": stage.record["threshold_shift"],
        "achieved_actives_before_shift": stage.record["l0_before_shift"],
        **measure_fidelity(layer, target),
        **settings.chosen("sae_latents normalize_z seed"),
        "data": data.source,
        "device": str(layer.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def write_history(
    folder: Path, target: int, classifier_history: Sequence[dict], stage: Stage
) -> None:
    """run.log.jsonl, a line for about every hundredth of each training, and its picture."""
    sae_history = stage.record["history"]
    rows = [{"stage": "classifier", **row} for row in classifier_history]
    rows += [{"stage": "sae", **row} for row in sae_history]
    fa.write_whole(
        folder / "run.log.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    )
    logits_from = SCHEDULE.logits_from * (sae_history[-1]["step"] + 1)
    logits_from = logits_from if stage.inputs["head_kl"] else None
    given = (classifier_history, sae_history, target, logits_from, DEAD_BELOW)
    figures.draw_training(figures.training_curves(*given), folder / "training.png")


def write_summary(
    root: Path,
    settings: Settings,
    data: Data,
    network: str,
    network_digest: str,
    trained: dict[int, dict[int, Stage]],
    records: dict[int, dict],
) -> None:
    """frontier.png, summary.json, and settings.json, which makes the folder a finished run."""
    if len(records) > 1:
        figures.draw_frontier(list(records.values()), root / "frontier.png")
    fa.write_whole(root / "summary.json", to_json(list(records.values())))
    kept = {k: v for k, v in asdict(settings).items() if k not in ("fresh", "wait", "workers")}
    manifest = {
        "settings": kept,
        "data": data.source,
        "data_digest": data.digest,
        "network": network,
        "network_sha256": network_digest,
        "sae_sha256": {str(t): stages[settings.seed].digest for t, stages in trained.items()},
        "hypotheses_sha256": {str(t): r.get("hypotheses_sha256") for t, r in records.items()},
        "classes": data.classes,
    }
    fa.write_whole(root / "settings.json", to_json(manifest))


def page_weights(model: object) -> page.Network | None:
    """The weights with which the page computes; None for a network that it cannot compute."""
    if not isinstance(model, Classifier):
        return None
    first_bias = model.hidden.bias - model.hidden.weight @ model.pixel_mean  # no mean image there
    return page.Network(model.hidden.weight, first_bias, model.head.weight, model.head.bias)


# --------------------------------------------------------------------------------------------------
# Any network, and finished runs
# --------------------------------------------------------------------------------------------------

OWN_NETWORK = "the classifier of this project"


class Run(NamedTuple):
    """A finished run of one target, ready for a notebook."""

    layer: fa.ExplainedLayer  # model, SAE, mu, std and the activations of each split
    settings: Settings
    data: Data
    folder: Path  # of the target's files

    @property
    def report(self) -> list[dict]:
        """The records of feature_report.json, the most influential feature first."""
        return read_json(self.folder / "feature_report.json")

    @property
    def loaders(self) -> dict[str, TensorLoader]:
        """Batches of the splits "train", "val" and "test"."""
        return {name: TensorLoader(getattr(self.data, name)) for name in self.layer.splits}


def load_run(
    folder: str | Path,
    target: int | None = None,
    data_dir: str | None = None,
    device: str = "auto",
) -> Run:
    """What a run of `main` saved in `folder`.

    `target` chooses among several SAEs; `data_dir` says where the images are now, if not where they
    were. Raises InputError when there is no such run, it is damaged, its hypotheses were edited, or
    the images are others than those it was trained on.
    """
    root = Path(folder)
    manifest = read_json(root / "settings.json")
    if manifest["network"] != OWN_NETWORK:
        raise InputError(
            f"{root} explains {manifest['network']}, which is not stored there: call explain() "
            f"again with the same network, images and settings; it reuses the SAE"
        )
    stored = manifest["settings"]
    settings = Settings(**{**stored, "target_actives": tuple(stored["target_actives"])})
    if target is None and len(settings.target_actives) == 1:
        (target,) = settings.target_actives
    if target not in settings.target_actives:
        raise InputError(
            f"target must be one of {list(settings.target_actives)}, which {root} has, got {target}"
        )
    data = load_images(data_dir or settings.data, settings.seed, pick_device(device))
    if data.digest != manifest["data_digest"]:
        raise InputError(
            f"{root} was made with: {manifest['data']}; found now: {data.source}. Give data_dir"
        )
    place = settings.folder_of(target)
    classifier, sae = load_stage(root, "classifier"), load_stage(place, "sae")
    check_chain(root, manifest, target, classifier, sae)
    if manifest["hypotheses_sha256"][str(target)]:
        read_frozen(place / "hypotheses.json", manifest["hypotheses_sha256"][str(target)])
    model = restore_classifier(classifier.tensors).to(data.train.labels.device)
    layer = collect_activations(model, data, settings.normalize_z)
    explained = layer.with_sae(restore_sae(sae, layer.device))
    return Run(explained, settings, data._replace(classes=tuple(manifest["classes"])), place)


def check_chain(root: Path, manifest: dict, target: int, classifier: Stage, sae: Stage) -> None:
    """Raise InputError unless each stage was made from the one before, and the run ended with
    both."""
    expected = (manifest["data_digest"], classifier.digest, manifest["data_digest"])
    found = (
        classifier.inputs["data_digest"],
        sae.inputs["network_sha256"],
        sae.inputs["data_digest"],
    )
    finished = (manifest["network_sha256"], manifest["sae_sha256"][str(target)])
    if found != expected or finished != (classifier.digest, sae.digest):
        raise InputError(
            f"{root} holds networks of another run than its settings.json: a later one stopped "
            f"half way; run it again"
        )


def read_frozen(path: Path, sha256: str) -> None:
    """Raise InputError unless the file holds the hypotheses that were frozen with that SHA-256."""
    try:
        read_hypotheses(path, sha256)
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; run it again") from error


def explain_settings(target: int, d_in: int, device: torch.device, given: dict) -> Settings:
    """Settings of a call of explain(). Raises InputError for a name that is none."""
    decided = ("target_actives", "data", "device", "hidden_units")  # by explain's own arguments
    known = [f.name for f in fields(Settings) if f.name not in decided]
    for name in given:
        if name not in known:
            raise InputError(f"explain() has no setting {name!r}; it has {', '.join(known)}")
    usual = {"sae_latents": 2 * max(d_in, target), "workers": 0}
    return Settings(target_actives=(target,), device=str(device), **{**usual, **given})


@default_torch_state()
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
        pool: for a layer with positions, as in `saexplain.layers.AtLayer`.
        settings: any other of `Settings`, by name: out, sae_latents, hypotheses, fresh, ... Without,
            there are twice as many latents as the layer has outputs, or as the target if that is
            more, and no worker processes.

    Returns the run as `load_run` does; its files are in `out`. A second call with the same network
    and images reuses the SAE. Raises InputError for what cannot be used, ValueError for a layer
    that the logits do not depend on alone, or from which no gradient leads to the pixels.
    """
    clock, net = Stopwatch(), open_layer(model, layer, pool)
    data = load_splits(net, classes, train, val, test)
    with torch.no_grad():
        d_in = net.preactivations(data.train.images[: fa.PROBED]).shape[1]
    own = explain_settings(target, d_in, net.device, settings)
    pick_device(own.device)  # CUDA made deterministic
    with folder_lock(Path(own.out), own.wait), torch_threads(1), Workers(own.workers) as workers:
        with clock("activations"):
            activations = collect_activations(net, data, own.normalize_z)
        warn_scale_shift(activations)
        raw = [split.raw for split in activations.splits.values()]
        with torch.no_grad():  # of what the SAE learns from, not of code that cannot be hashed
            logits = activations.logits(activations.splits["val"].raw)
        digest = digest_of([*raw, logits, *net.model.state_dict().values()])
        explain_activations(activations, data, own, net.title, digest, clock, workers)
        sae = restore_sae(load_stage(Path(own.out), "sae"), activations.device)
    return Run(activations.with_sae(sae), own, data, Path(own.out))


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


def run_once(settings: Settings) -> list[dict]:
    """Data, classifier, SAEs, reports; the records of summary.json."""
    clock, root = Stopwatch(), Path(settings.out)
    workers = Workers(worker_count(settings.workers))
    with folder_lock(root, settings.wait), torch_threads(1), workers:
        with clock("data"):
            data = load_images(settings.data, settings.seed, pick_device(settings.device))
        print(f"data: {data.in_words()}; device {settings.device}, seed {settings.seed}")
        check_split_leakage(data)
        with clock("classifier"):
            model, stage = classifier_stage(settings, data, root)
        with clock("activations"):
            layer = collect_activations(model, data, settings.normalize_z)
        history = stage.record["history"]
        given = (data, settings, OWN_NETWORK, stage.digest, clock, workers, history)
        return explain_activations(layer, *given)


def train_combination(settings: Settings) -> dict:
    """Train and measure the SAE of one combination of a sweep; its record for sweep.json.

    The classifier of its seed is in a folder beside the combination's own.
    """
    (target,) = settings.target_actives
    folder = Path(settings.out)
    shared = folder.parent / f"seed_{settings.seed}_classifier"
    with torch_threads(1):
        data = load_images(settings.data, settings.seed, pick_device(settings.device))
        with folder_lock(shared, wait=True):  # the first one trains it, the others reuse it
            model, classifier = classifier_stage(settings, data, shared)
        layer = collect_activations(model, data, settings.normalize_z)
        z = tuple(layer.standardize(layer.splits[name].raw) for name in ("train", "val"))
        made_from = {"data_digest": data.digest, "network_sha256": classifier.digest}
        with folder_lock(folder, settings.wait):
            stage = sae_stage(layer, z, target, settings, made_from, folder)
    sae = restore_sae(stage, layer.device)
    return sae_record(layer.with_sae(sae), target, stage, data, settings)


def combinations(runs: Sequence[Settings]) -> list[Settings]:
    """One Settings for each SAE of a sweep, with a folder of its own."""
    singles = []
    for run, target in ((run, target) for run in runs for target in run.target_actives):
        name = f"seed_{run.seed}_latents_{run.sae_latents}_target_{target}"
        singles.append(replace(run, target_actives=(target,), out=str(Path(run.out) / name)))
    return singles


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """One run, or a sweep; the records of summary.json or sweep.json.

    Raises InputError, BusyError or TrainingError.
    """
    runs = parse_runs(argv)
    if len(runs) == 1:
        return run_once(runs[0])
    first = runs[0]
    workers = worker_count(first.workers) if pick_device(first.device).type == "cpu" else 0
    return run_sweep(combinations(runs), train_combination, Path(first.out), workers, first.wait)


def run_script() -> int:
    """main, with the errors a user can cause as one line on stderr; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files and locks are tidied
    try:
        main()
        return 0
    except (InputError, TrainingError) as error:
        words = str(error)
    except BusyError as error:
        words = f"{error}; give --wait to wait for it, or another --out"
    except OSError as error:
        words = f"{error.filename or 'a file'} could not be written or read ({error.strerror})"
    except KeyboardInterrupt:
        print("error: interrupted; finished stages are saved and will be reused", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not fa.is_out_of_memory(error):
            raise
        words = "out of memory; lower --sae-latents, --hidden-units or --batch-sae"
    print("error:", " ".join(words.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run_script())
