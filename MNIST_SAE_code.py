"""Train a small MNIST classifier and a sparse autoencoder (SAE) on it; explain every feature.

    python MNIST_SAE_code.py                              # everything, into artifacts_mnist_sae/
    python MNIST_SAE_code.py --target-actives 10 20 40    # one SAE per sparsity, and their frontier
    python MNIST_SAE_code.py --seeds 0 1 2                # a sweep: mean and spread over seeds
    python MNIST_SAE_code.py --data sample --features 50  # the bundled sample, 50 features
    python MNIST_SAE_code.py --my-hypotheses FILE         # test your own on the finished run
    python MNIST_SAE_code.py compare RUN_A RUN_B          # two finished runs side by side

This file makes and measures one SAE, from top to bottom: settings, classifier, SAE training with
its losses, lambda, thresholds, `explain` for any network, `main`. What a feature means, and whether
that holds on unseen images, is in the package saexplain; numbers and pictures of features are in
feature_analysis.py.

Per image, SAE training minimizes (squares divided by d_in)

    ||x - x_hat||^2 + sum_k lambda_k 1[f_k > 0]                 reconstruction and sparsity
      + head_kl * KL(logits of x || logits of x_hat)            what the classifier reads
      + auxiliary_weight * ||(x - x_hat) - x_hat of dying||^2   so that no latent dies

The sparsity term has no gradient of its own: threshold_k = sqrt(lambda_k) minimizes it (see
`LambdaController`); autograd differentiates the sum of the other three.

Dimension key: N images, B images in a batch, C classes, d_in hidden units, d_sae latents. z are
standardized preactivations (raw - mu) / std, x the coordinates that the SAE is trained in.

References
    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs"
    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss on dying latents)
    Blumensath & Davies 2008, "Iterative thresholding for sparse approximations" (threshold =
    sqrt(lambda))
"""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # PyTorch takes over a second
    from saexplain.progress import show_loading

    show_loading()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feature_analysis as fa
from saexplain import console, page, report, runs
from saexplain.activations import (
    Storing,
    collect_activations,
    digest_of_outputs,
    layer_inputs,
    warn_chance,
    warn_scale_shift,
)
from saexplain.baselines import features_along
from saexplain.compare import compare_command
from saexplain.datasets import check_split_leakage
from saexplain.estimates import estimate
from saexplain.fidelity import feature_stats, rows_of
from saexplain.files import (
    BusyError,
    InputError,
    Stage,
    check_chain,
    file_name,
    folder_lock,
    load_cached,
    load_stage,
    read_json,
    save_stage,
)
from saexplain.flags import build_parser, check_fields, setting
from saexplain.hypotheses import load_frozen
from saexplain.images import Data, Split, TensorLoader, load_images
from saexplain.layers import AtLayer, open_layer
from saexplain.optimization import (
    Adam,
    TrainingError,
    batches,
    check_loss_finite,
    check_weights_finite,
    logged_steps,
    n_steps,
    ramp,
    scaled_epochs,
)
from saexplain.own import read_hypotheses, report_own
from saexplain.parallel import (
    ONE_PROCESS,
    Ranks,
    Stopwatch,
    Task,
    WorkerError,
    Workers,
    default_torch_state,
    make_deterministic,
    one_writer,
    open_ranks,
    pick_device,
    printing_once,
    torch_threads,
)
from saexplain.progress import live_line, progress_bar, script_output
from saexplain.reproducibility import compare_seeds
from saexplain.rows import Batch, TrainingRows
from saexplain.runs import OWN_NETWORK
from saexplain.sae import JumpReLUSAE
from saexplain.saelens import save_saelens
from saexplain.stages import (
    Trained,
    WantedSAE,
    gather_training,
    sae_stages,
    train_saes,
    training_rows,
)
from saexplain.sweep import combinations, run_sweep
from saexplain.targets import TARGETS, pick_target

# --------------------------------------------------------------------------------------------------
# Settings: edit a line here, or give the flag of the same name (TARGET_ACTIVES: --target-actives)
# --------------------------------------------------------------------------------------------------

TARGET_ACTIVES = [20]  # mean number of active features per image; each target gets its own SAE
SAE_LATENTS = 512  # four per hidden unit
EPOCHS_SAE_FINAL = 5  # passes over the full set, or as many steps on a smaller one
BATCH_SAE = 128  # many small steps beat few large ones: 256 is faster, FVU a tenth worse
LR_SAE = 1.3e-2  # peak Adam rate; 1e-3 trebles FVU in so few epochs
HEAD_KL = 0.25  # weight of the classifier's logits in the SAE loss; 0 ignores what z is used for
NORMALIZE_Z = True  # standardize each hidden unit first, so that loud ones do not own the SAE
HIDDEN_UNITS = 128  # width of the classifier's hidden layer, d_in of the SAE
EPOCHS_FFN = 3  # the same for the classifier
BATCH_FFN = 256  # images per classifier step
LR_FFN = 2e-2  # peak AdamW rate of one cycle; reaches in 3 epochs what 1e-3 needs 12 for
WEIGHT_DECAY_FFN = 0.4  # pixels without evidence lose their weight; more costs accuracy
TOPK = 20  # strongest images kept per feature
N_EVAL = 2000  # images over which an effect on the logits is averaged
ALPHA = 1.0  # how much of a feature is added when its logit effect is measured
HYPOTHESES = True  # propose a hypothesis about every feature, freeze it, test it on the test images
STABILITY_SEEDS = 1  # further SAEs from other seeds, to see which features are reproduced
FEATURES = 0  # report only this many of the most influential features; 0 reports all
SEED = 0  # same seed and device: the same artifacts
DATA = "auto"  # folder of images in MNIST's format; "sample": 5,000 digits; "auto": find MNIST
OUT = "artifacts_mnist_sae"  # where everything is written
DEVICE = "auto"  # auto takes a CUDA GPU when there is one
WORKERS = -1  # processes beside this one; -1 takes one for each further core
VERBOSE = False  # print all numbers, not only those that matter most
FRESH = False  # train again although finished stages could be reused
WAIT = False  # wait for another run that writes to the same folder
MY_HYPOTHESES = ""  # a file of your own hypotheses, to be tested on the finished run in OUT


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
    weight_decay_ffn: float = setting(WEIGHT_DECAY_FFN, "weight decay of the classifier", 0)
    topk: int = setting(TOPK, "strongest images kept per feature", 1)
    n_eval: int = setting(N_EVAL, "images over which an effect is averaged", 1)
    alpha: float = setting(ALPHA, "how much of a feature is added to measure its logit effect")
    hypotheses: bool = setting(HYPOTHESES, "propose, freeze and test a hypothesis per feature")
    stability_seeds: int = setting(STABILITY_SEEDS, "further SAEs, to see what is reproduced", 0)
    features: int = setting(FEATURES, "report so many of the most influential features; 0: all", 0)
    seed: int = setting(SEED, "seed of every random choice", 0)
    data: str = setting(DATA, "folder with files like MNIST's; 'sample'; 'auto': from the web")
    out: str = setting(OUT, "folder for everything that is written")
    device: str = setting(DEVICE, "auto, cpu, cuda or cuda:N")
    workers: int = setting(WORKERS, "processes beside this one; -1: one for each further core", -1)
    verbose: bool = setting(VERBOSE, "print all numbers, not only those that matter most")
    fresh: bool = setting(FRESH, "train again instead of reusing finished stages")
    wait: bool = setting(WAIT, "wait while another run writes to the same folder")
    my_hypotheses: str = setting(MY_HYPOTHESES, "file of hypotheses to test on the run in --out")

    def __post_init__(self) -> None:
        check_fields(self)
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

    def named(self, name: str) -> str:
        """The setting as it is written above."""
        return name.upper()

    def chosen(self, names: str) -> dict:
        """The settings of those names, separated by spaces."""
        return {name: getattr(self, name) for name in names.split()}


CLASSIFIER_SETTINGS = "hidden_units epochs_ffn batch_ffn lr_ffn weight_decay_ffn seed"
GROUPS = {  # of --help: title, an example, names of settings
    "what most people set": (
        "--target-actives 10 20 --features 50 --out DIR",
        "data out target_actives sae_latents features seed verbose",
    ),
    "the SAE": (
        "--sae-latents 256 --epochs-sae-final 10",
        "epochs_sae_final batch_sae lr_sae head_kl normalize_z stability_seeds",
    ),
    "the classifier": ("--epochs-ffn 6", CLASSIFIER_SETTINGS.removesuffix(" seed")),
    "the analysis": ("--topk 40 --no-hypotheses", "hypotheses topk n_eval alpha"),
    "machine and files": ("--workers 0 --fresh", "device workers fresh wait"),
    "hypotheses of your own": ("--my-hypotheses my_hypotheses.json", "my_hypotheses"),
}


def parse_runs(argv: Sequence[str] | None = None) -> list[Settings]:
    """Settings from flags: of one run, or of one for each of --seeds and --sae-latents.

    Raises InputError for values that cannot be used.
    """
    parser = build_parser(Settings, GROUPS, __doc__, ("target_actives", "sae_latents"))
    parser.add_argument_group("finished runs, compared", "example: %(prog)s compare RUN_A RUN_B")
    sweep = parser.add_argument_group("a sweep", "example: %(prog)s --seeds 0 1 2")
    sweep.add_argument("--seeds", type=int, nargs="+", metavar="N", help="train SAEs with each")
    given = vars(parser.parse_args(argv))
    given["target_actives"] = tuple(given["target_actives"])
    seeds = given.pop("seeds") or [given.pop("seed")]
    latents = given.pop("sae_latents")
    sizes = latents if isinstance(latents, list) else [latents]
    for name, values in (("--seeds", seeds), ("--sae-latents", sizes)):
        if len(set(values)) < len(values):
            raise InputError(f"{name} must be different numbers, got {values}")
    pairs = itertools.product(seeds, sizes)
    return [Settings(**{**given, "seed": seed, "sae_latents": n}) for seed, n in pairs]


# --------------------------------------------------------------------------------------------------
# Classifier
# --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """logits = W2 relu(z) + b2 with preactivations z = W1 (x - pixel_mean) + b1.

    The mean image is subtracted because centered inputs let the first layer learn several times
    faster. The analysis uses `preactivations` and `logits_from_preactivations`, and nothing else.
    """

    def __init__(self, n_pixels: int = 784, hidden_units: int = 128, n_classes: int = 10):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(n_pixels))
        self.hidden = nn.Linear(n_pixels, hidden_units)
        self.head = nn.Linear(hidden_units, n_classes)

    def preactivations(self, images: Tensor) -> Tensor:
        """Preactivations (B, d_in) of images (B, 1, H, W).

        Once trained, it raises ValueError for pixels outside of 0 to 1, as of bytes.
        """
        if not self.training and len(images):
            low, high = images.aminmax()
            if not (low > -0.01 and high < 1.01):
                raise ValueError(f"pixels must be from 0 to 1, got {low:g} to {high:g}")
        return self.hidden(images.flatten(1) - self.pixel_mean)

    def logits_from_preactivations(self, z: Tensor) -> Tensor:
        """Logits (B, C) of preactivations z (B, d_in)."""
        return self.head(F.relu(z))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_from_preactivations(self.preactivations(images))


def new_classifier(sizes: tuple[int, int, int], seed: int, device: torch.device) -> Classifier:
    """An untrained classifier; `sizes` are its numbers of pixels, hidden units and classes."""
    devices = [device] if device.type == "cuda" else []
    # nn.Linear draws from torch's own generator, which is left as it was.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return Classifier(*sizes).to(device)


def train_classifier(
    train: Split, settings: Settings, n_classes: int = 10
) -> tuple[Classifier, list[dict]]:
    """The classifier, and its history: rows of step and loss.

    Cross entropy, AdamW, one cycle of the learning rate. Raises TrainingError on divergence.
    """
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
    flag = ("classifier training", "--lr-ffn", settings.lr_ffn)
    for step, index in enumerate(progress_bar(plan, "classifier steps", steps)):
        loss = F.cross_entropy(model(train.images[index]), train.labels[index])
        gradients = torch.autograd.grad(loss, weights)
        optimizer.step(gradients, settings.lr_ffn * ramp((step + 0.5) / steps, 0.2, 0.2))
        losses[step] = loss.detach()
        check_loss_finite(losses, step, *flag)
    check_weights_finite(model, *flag)
    history = [{"step": step, "loss": losses[step].item()} for step in logged_steps(steps)]
    return model.requires_grad_(False).eval(), history


# --------------------------------------------------------------------------------------------------
# SAE: schedule, the method's own constants, therefore no flags
# --------------------------------------------------------------------------------------------------


class SAESchedule(NamedTuple):
    """Constants of SAE training. A "share of training" runs from 0 to 1."""

    start_l0_factor: float = 2.0  # L0 at the start, over the target; from 1 or 4 FVU is 3% worse
    l0_settled_at: float = 0.3  # share of training after which L0 is held at the target
    warmup: float = 0.02  # share of training in which the learning rate rises
    decay_from: float = 0.3  # share of training after which it falls linearly to 0
    density_decay: float = 0.99  # per step, of the moving average of densities: about 100 batches
    logit_kl_from: float = 0.5  # share of training after which the logits count: 0 costs 2% FVU
    dying_below: float = 1 / 16  # share of the mean density below which a latent counts as dying
    auxiliary_per_image: int = 16  # dying latents per image: with all of them a tenth stay dead
    auxiliary_weight: float = 0.2  # of the auxiliary loss; half as much gives the same
    auxiliary_every: int = 8  # steps; every 4th step is slower and gives the same FVU


SCHEDULE = SAESchedule()

# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error (), over images and coordinates (B, d_in).

    1 for the best constant prediction, because x has mean 0 and mean square 1.
    """
    return F.mse_loss(x_hat, x)


def logit_kl(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(teacher_logits) || softmax(logits)) in nats, (), the mean over images (B, C)."""
    log_p = F.log_softmax(teacher_logits, dim=1)
    log_q = F.log_softmax(logits, dim=1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def auxiliary_loss(pre: Tensor, W_dec: Tensor, dying: Tensor, residual: Tensor) -> Tensor:
    """Mean square () of what remains of the residual after the dying latents explain part of it.

    After AuxK (Gao et al. 2024): a latent that is never active gets no gradient from the other
    losses. Here, on each image, the dying latents with the largest pre (B, d_sae) reconstruct the
    residual x - x_hat (B, d_in), whether or not they exceed their thresholds. `dying` are the
    indices (n,) of the dying latents, or a mask (d_sae,), whose True a GPU need not count; without
    any, the loss has no gradient.
    """
    is_mask = dying.dtype == torch.bool
    n_used = min(SCHEDULE.auxiliary_per_image, len(dying))
    dying_pre = pre if is_mask else pre.index_select(1, dying)  # (B, n)
    rows = W_dec if is_mask else W_dec.index_select(0, dying)  # (n, d_in)
    candidates = dying_pre.detach()
    if is_mask:
        candidates = candidates.masked_fill(~dying, -math.inf)
    smallest_used = candidates.topk(n_used, dim=1).values[:, -1:]
    is_used = candidates >= smallest_used
    acts = dying_pre * (is_used & dying if is_mask else is_used)
    # The residual is a constant here: active latents do not learn from what dying ones explain.
    return (residual.detach() - acts @ rows).square().mean()


class Losses(NamedTuple):
    """Of one batch."""

    total: Tensor  # (), what is minimized
    reconstruction: Tensor  # (), share of the variance that is left
    active: Tensor  # (B, d_sae), 1 where a feature is active, else 0


def compute_losses(
    sae: JumpReLUSAE,
    x: Tensor,
    teacher_logits: Tensor,
    logits_of_x: Callable[[Tensor], Tensor],
    head_kl: float,
    dying: Tensor | None,
) -> Losses:
    """The losses of x (B, d_in), whose logits are teacher_logits (B, C).

    `head_kl` weights the logit KL, 0 leaves it out. `dying` is that of `auxiliary_loss`, None on
    steps without it.
    """
    pre = sae.pre_activations(x)  # (B, d_sae)
    feature_acts = sae.jump(pre)  # (B, d_sae)
    x_hat = sae.decode(feature_acts)  # (B, d_in)

    reconstruction = reconstruction_loss(x_hat, x)
    total = reconstruction
    if head_kl:
        total = total + head_kl * logit_kl(teacher_logits, logits_of_x(x_hat))
    if dying is not None:
        auxiliary = auxiliary_loss(pre, sae.W_dec, dying, x - x_hat)
        total = total + SCHEDULE.auxiliary_weight * auxiliary
    return Losses(total, reconstruction.detach(), feature_acts.detach().sign())


# --------------------------------------------------------------------------------------------------
# Sparsity
# --------------------------------------------------------------------------------------------------


def l0_target_at(progress: float, target: float, d_sae: int) -> float:
    """L0 to aim at: falls geometrically to `target`, and stays there from `l0_settled_at` on."""
    start = max(target, min(SCHEDULE.start_l0_factor * target, d_sae / 2))
    return target * (start / target) ** max(0.0, 1 - progress / SCHEDULE.l0_settled_at)


class LambdaController:
    """Adjusts sqrt(lambda) during training until L0 is at its target.

    The objective is ||x - x_hat||^2 + lambda * L0 per image. With unit decoder rows, keeping a
    feature of activation a lowers the first term by about a^2 and costs lambda, so the best
    threshold is sqrt(lambda) (hard thresholding, Blumensath & Davies 2008). A larger lambda
    therefore lowers L0 at once, and a proportional-integral controller on log sqrt(lambda) needs
    neither a sweep over lambda nor a coefficient to tune.

    Everything is a tensor of shape () on the device, so that a step makes no GPU wait.
    """

    INTEGRAL = 0.1  # gain on log(L0 / target), per step
    PROPORTIONAL = 0.3  # gain on the change of log(L0 / target)
    L0_DECAY = 0.9  # per step, of the moving average of L0: about 10 batches
    LEAST = 0.005  # sqrt(lambda); from further down it would not recover before training ends

    def __init__(self, start_l0: float, start_threshold: Tensor):
        self.log_threshold = start_threshold.log()  # ()
        self.l0 = torch.full_like(start_threshold, start_l0)
        self.error = torch.zeros_like(start_threshold)

    def threshold(self) -> Tensor:
        """sqrt(lambda), ()."""
        return self.log_threshold.exp()

    def update(self, l0: Tensor, target: float) -> None:
        """Take one step: the batch had `l0` active features per image, `target` are wanted."""
        self.l0 = torch.lerp(l0, self.l0, self.L0_DECAY)
        error = torch.log(self.l0.clamp(min=1e-2) / target)  # clamped: L0 may be 0
        change = self.INTEGRAL * error + self.PROPORTIONAL * (error - self.error)
        self.log_threshold = (self.log_threshold + change).clamp(min=math.log(self.LEAST))
        self.error = error


def latent_thresholds(threshold: Tensor, density: Tensor, l0_target: float) -> Tensor:
    """sqrt(lambda_k) (d_sae,), from sqrt(lambda) () and each latent's density (d_sae,).

    lambda_k falls in proportion to the density below the mean density aimed at: a latent that is
    rarely active costs less, so it does not die.
    """
    mean_density = l0_target / len(density)
    return threshold * (density / mean_density).clamp(max=1).sqrt()


# --------------------------------------------------------------------------------------------------
# Initial SAE
# --------------------------------------------------------------------------------------------------


def initial_rows(rows: TrainingRows, d_sae: int, generator: torch.Generator) -> Tensor:
    """Unit decoder rows (d_sae, d_in) towards x of rows drawn at random.

    Directions of little variance are amplified: without it FVU is a twentieth worse. Where d_sae
    exceeds the number of rows, the further ones have random directions.
    """
    std = rows.x_std
    std = std.clamp(min=1e-3 * std.max())  # a unit that never varies has none
    n = rows.n_images * rows.positions
    drawn = torch.randperm(n, generator=generator, device=generator.device)[:d_sae]
    missing = (d_sae - len(drawn), rows.d_in)
    random_rows = torch.randn(missing, generator=generator, device=generator.device)
    return F.normalize(torch.cat([rows.x_of(drawn) / std.sqrt(), random_rows]), dim=1)


def starting_rows(z: Tensor | TrainingRows, d_sae: int, seed: int) -> Tensor:
    """Decoder rows (d_sae, d_in) of the untrained SAE of z (N, d_in): a baseline."""
    rows = TrainingRows.of(z)
    generator = torch.Generator(rows.device).manual_seed(seed)
    return initial_rows(rows, d_sae, generator) @ rows.coordinates.components.T


@torch.no_grad()
def initial_sae(rows: Tensor, x: Tensor, start_l0: float) -> JumpReLUSAE:
    """An SAE with decoder `rows` (d_sae, d_in) and the encoder gain * rows^T.

    Every latent is active on a share start_l0 / d_sae of x (N, d_in), and all have the same
    threshold. The gain is the one whose reconstruction of x has the least squared error.
    """
    d_sae, d_in = rows.shape
    projection = x @ rows.T  # (N, d_sae)
    rank = int((1 - start_l0 / d_sae) * (len(x) - 1))
    quantile = projection.T.contiguous().sort(dim=1).values[:, rank]  # (d_sae,)
    bias = quantile.mean() - quantile  # one threshold, the mean quantile, then fits all latents
    unscaled = (projection + bias) * (projection > quantile)  # (N, d_sae), feature_acts / gain
    x_hat = unscaled @ rows
    gain = (x_hat * x).sum() / x_hat.square().sum()  # least squares

    sae = JumpReLUSAE(d_in, d_sae).to(x.device)
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(gain * rows.T)
    sae.b_enc.copy_(gain * bias)
    sae.threshold.fill_(gain * quantile.mean()).clamp_(min=LambdaController.LEAST)
    return sae


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

DEAD_BELOW = 1e-5  # density; with 128 images in a batch: inactive for the last 200 batches or more


class SAETrainer:
    """An SAE in training: `step` takes a batch, `finish` gives the SAE of z and its history.

    With `freeze_decoder` W_dec keeps its initial rows, a baseline after Korznikov et al. 2026
    (arXiv 2602.14111). On several ranks each has the same SAE, and its own rows of a batch.
    """

    def __init__(
        self, rows: TrainingRows, target: float, settings: Settings, freeze_decoder: bool = False
    ):
        self.rows, self.target, self.settings = rows, target, settings
        self.freeze_decoder, d_sae = freeze_decoder, settings.sae_latents
        self.generator = torch.Generator(rows.device).manual_seed(settings.seed)
        self.epochs = scaled_epochs(settings.epochs_sae_final, rows.n_images)
        self.steps = n_steps(rows.n_images, settings.batch_sae, self.epochs)
        self.flag = (f"SAE training for {target} actives", "--lr-sae", settings.lr_sae)

        start_l0 = l0_target_at(0, target, d_sae)
        drawn = initial_rows(rows, d_sae, self.generator)
        sae = self.sae = initial_sae(drawn, rows.sample(16 * settings.batch_sae), start_l0)
        for value in sae.state_dict().values() if rows.ranks.world > 1 else ():
            rows.ranks.broadcast_(value)  # other machines may round otherwise
        self.weights = [sae.W_enc, sae.b_enc, sae.b_dec] + ([] if freeze_decoder else [sae.W_dec])
        self.optimizer = Adam(self.weights)
        self.controller = LambdaController(start_l0, sae.threshold.mean())
        self.density = torch.full_like(sae.threshold, start_l0 / d_sae)  # moving average
        self.reconstruction = torch.zeros(self.steps, device=rows.device)
        self.history, self.logged = [], logged_steps(self.steps)

    def batches(self) -> Iterator[Tensor]:
        """The images of each step, to be asked for once."""
        return self.rows.batches(self.settings.batch_sae, self.epochs, self.generator)

    def step(self, step: int, batch: Batch) -> None:
        """Take a step of Adam on the losses, and one of lambda; no GPU wait unless it is logged."""
        sae, settings, progress = self.sae, self.settings, (step + 0.5) / self.steps
        l0_target = l0_target_at(progress, self.target, settings.sae_latents)
        threshold = self.controller.threshold()  # sqrt(lambda)
        sae.threshold.copy_(latent_thresholds(threshold, self.density, l0_target))

        # Terms that count on some steps only
        teacher, dying = batch.teacher_logits, None
        head_kl = 0.0 if teacher is None else settings.head_kl
        if step % SCHEDULE.auxiliary_every == 0:
            dying = self.density < SCHEDULE.dying_below * self.target / settings.sae_latents
            if dying.device.type == "cpu":  # faster than a mask, but their number must be known
                dying = torch.nonzero(dying).flatten()

        # One step of Adam; decoder rows keep unit norm, so that activations have a scale
        losses = compute_losses(sae, batch.x, teacher, self.rows.logits_of_x, head_kl, dying)
        found = [*torch.autograd.grad(losses.total, self.weights)]
        found += [losses.active.mean(0), losses.reconstruction]
        *gradients, density, reconstruction = self.rows.ranks.mean(found, batch.share)
        rate = ramp(progress, SCHEDULE.warmup, SCHEDULE.decay_from)
        self.optimizer.step(gradients, settings.lr_sae * rate)
        if not self.freeze_decoder:
            with torch.no_grad():
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))

        # Sparsity
        self.density.lerp_(density, 1 - SCHEDULE.density_decay)
        l0 = density.sum()
        self.controller.update(l0, l0_target)

        self.reconstruction[step] = reconstruction
        if step in self.logged:
            row = {"step": step, "loss": reconstruction.item(), "l0": l0.item()}
            row["lambda"] = (threshold * self.rows.coordinates.scale).square().item()
            row["dead"] = int((self.density < DEAD_BELOW).sum())
            self.history.append(row)
        check_loss_finite(self.reconstruction, step, *self.flag)

    def finish(self) -> tuple[JumpReLUSAE, list[dict]]:
        """The SAE of z, and a row for each of the `logged_steps`: loss (share of the variance), l0
        of the batch, lambda (in units of z squared), dead latents."""
        check_weights_finite(self.sae, *self.flag)
        return self.rows.coordinates.sae_of_z(self.sae), self.history


def train_together(trainers: Sequence[SAETrainer]) -> list[tuple[JumpReLUSAE, list[dict]]]:
    """What each trainer finishes with, after all have taken the batches of the first: one read of
    the rows serves all. With equal seeds each SAE is what it would be alone.

    The trainers have the same rows, batch size and epochs. Raises TrainingError on divergence.
    """
    first = trainers[0]
    if any((t.rows, t.steps) != (first.rows, first.steps) for t in trainers):
        raise ValueError("SAEs trained together must have the same rows, batch_sae and epochs")
    use_logits = first.rows.logits_of is not None and any(t.settings.head_kl for t in trainers)
    for step, index in enumerate(progress_bar(first.batches(), "SAE steps", first.steps)):
        with_logits = use_logits and (step + 0.5) / first.steps > SCHEDULE.logit_kl_from
        batch = first.rows.batch(index, with_logits)
        for trainer in trainers:
            trainer.step(step, batch)
    return [trainer.finish() for trainer in trainers]


def train_sae(
    z: Tensor | TrainingRows,
    logits_of: Callable[[Tensor], Tensor] | None,
    target: float,
    settings: Settings,
    freeze_decoder: bool = False,
) -> tuple[JumpReLUSAE, list[dict]]:
    """An SAE of z (N, d_in) with `target` active features per row on average, and its history.

    `logits_of` maps standardized preactivations (B, d_in) to the classifier's logits (B, C); None
    leaves the logits out. Raises TrainingError on divergence.
    """
    rows = TrainingRows.of(z, logits_of)
    return train_together([SAETrainer(rows, target, settings, freeze_decoder)])[0]


# --------------------------------------------------------------------------------------------------
# Stages: trained, or taken from the folder when they were made from equal inputs
# --------------------------------------------------------------------------------------------------


def classifier_stage(settings: Settings, data: Data, folder: Path) -> tuple[Classifier, Stage]:
    """The classifier, trained or reused; its stage is saved in `folder`."""
    device = data.train.labels.device
    inputs = {**settings.chosen(CLASSIFIER_SETTINGS), "data_digest": data.digest}
    inputs |= {"device": device.type, "torch": torch.__version__}
    given = ("classifier", inputs, "the classifier", settings.named, settings.fresh)
    stage = load_cached(folder, *given)
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


def train_wanted(
    rows: TrainingRows, wanted: Sequence[WantedSAE]
) -> list[tuple[JumpReLUSAE, list[dict]]]:
    """What `sae_stages` asks for: the SAEs wanted, trained together, with their histories."""
    return train_together(
        [SAETrainer(rows, one.target, one.settings, one.freeze_decoder) for one in wanted]
    )


# --------------------------------------------------------------------------------------------------
# From activations to the finished folder
# --------------------------------------------------------------------------------------------------


def explain_activations(
    layer: fa.ExplainedLayer,
    data: Data,
    network: runs.Network,
    settings: Settings,
    clock: Stopwatch,
    workers: Workers,
    ranks: Ranks = ONE_PROCESS,
) -> list[dict]:
    """Train the SAEs on the layer's activations and explain them; the records of summary.json.

    The hypotheses of all targets are frozen before the first of them is tested. Of several ranks
    all train, and the first explains; the others have no records.
    """
    made_from = {"data_digest": data.digest, "network_sha256": network.digest}
    root, final = Path(settings.out), settings
    settings = replace(settings, out=str(root / runs.STAGING))  # until all is complete
    with clock("sae"):
        trained = train_saes(layer, settings, made_from, train_wanted, workers, ranks)
        own = [saes.stages[settings.seed] for saes in trained.values()]
        clock.result = report.sae_words(layer, own) if ranks.is_first else ""
    layer = gather_training(layer, data.train, ranks)
    if not ranks.is_first:
        ranks.barrier()  # until the first has explained them
        return []
    options = report.Options(
        classes=data.classes,
        network=network.title,
        source=data.source,
        caller=network.caller,
        display=data.display,
        **settings.chosen("topk n_eval alpha hypotheses features seed"),
    )
    drafts, records, reports, writing = {}, {}, {}, []
    use_logits = settings.head_kl and training_rows(layer).train.logits_of is not None
    logits_from = SCHEDULE.logit_kl_from if use_logits else None
    for target, saes in trained.items():
        own, folder = saes.stages[settings.seed], settings.folder_of(target)
        given = (network.history, own.record["history"], target, logits_from, DEAD_BELOW)
        writing.append(workers.start("training.png", report.write_history, folder, *given))
        explained = layer.with_sae(JumpReLUSAE.from_weights(own.tensors, layer.device))
        label = f"target {target}" if len(trained) > 1 else ""
        drafts[target] = report.prepare_report(
            explained, folder, options, Stopwatch(clock.shown, label), workers
        )
    for target, draft in drafts.items():
        given = (target, trained[target], data, settings, workers)
        records[target], reports[target], tasks = finish_target(draft, *given)
        writing += tasks
    for target, draft in drafts.items():
        frontier, weights = report.frontier_of(list(records.values())), page_weights(layer.model)
        with draft.clock("page"):
            given = (records[target], reports[target], frontier, weights)
            draft.clock.result = report.write_page(draft, *given)
    with clock("files"):
        workers.results(writing)
        clock.result = f"{sum(1 for _ in Path(settings.out).rglob('*')):,} written"
    for target, draft in drafts.items():
        in_tasks = {f"{name}, in tasks": s for name, s in workers.seconds.items()}
        seconds = {**clock.seconds, **draft.clock.seconds, **in_tasks}
        records[target]["seconds"] = {**seconds, "whole run": clock.total()}
    digests = {str(t): saes.stages[settings.seed].digest for t, saes in trained.items()}
    given = (list(records.values()), network.manifest(asdict(final), data), digests)
    report.write_summary(Path(settings.out), *given)
    runs.finish_run(root)
    folders = {final.folder_of(target): record for target, record in records.items()}
    console.print_results(root, folders, list(reports.values()), final.verbose)
    ranks.barrier()
    return list(records.values())


def finish_target(
    draft: report.Draft,
    target: int,
    trained: Trained,
    data: Data,
    settings: Settings,
    workers: Workers,
) -> tuple[dict, list[dict], list[Task]]:
    """`finish_report` with what only the trainer knows: the SAEs of other seeds, and as baselines
    the directions that training starts from, untrained and with a trained encoder."""
    layer, (stages, frozen) = draft.layer, trained
    z = rows_of(layer, "val")
    others = {seed: stage for seed, stage in stages.items() if seed != settings.seed}
    # Those of another seed: the SAE's own started from the rows of its seed.
    rows = starting_rows(z, settings.sae_latents, settings.seed + 1)
    stats = feature_stats(layer.sae, z)
    untrained = features_along(rows, z, *stats, most=None)  # as many active per row
    baselines = {}
    if others or frozen:
        baselines["untrained SAE"] = features_along(rows, z, *stats)
        baselines |= report.default_baselines(layer, settings.seed)
    if frozen:
        try:
            with draft.clock("frozen decoder, waited for"):
                ((stage,),) = workers.results([frozen])
            baselines["frozen decoder"] = JumpReLUSAE.from_weights(stage.tensors, layer.device)
        except TrainingError as error:  # a baseline must not end the run
            print(f"no baseline with a frozen decoder: {error}")
    tasks = report.start_baselines(draft, baselines, workers)
    with draft.clock("fidelity"):
        own = settings.chosen("sae_latents normalize_z seed")
        record = report.sae_record(layer, target, stages[settings.seed], own, untrained)
        record["data"] = data.source
        draft.clock.result = console.kept_words(record)
    with draft.clock("reproducibility"):
        device = layer.device
        saes = {s: JumpReLUSAE.from_weights(stage.tensors, device) for s, stage in others.items()}
        replicates = compare_seeds(layer, settings.seed, saes, baselines)
        if replicates:
            draft.clock.result = console.reproduced_words(replicates.record)
    save_saelens(layer, draft.folder / "saelens", record, draft.options.network)
    return report.finish_report(draft, record, replicates, tasks, workers)


def page_weights(model: object) -> page.Network | None:
    """The weights with which the page computes; None for a network that it cannot compute."""
    if not isinstance(model, Classifier):
        return None
    first_bias = model.hidden.bias - model.hidden.weight @ model.pixel_mean  # no mean image there
    return page.Network(model.hidden.weight, first_bias, model.head.weight, model.head.bias)


# --------------------------------------------------------------------------------------------------
# Any network, and finished runs
# --------------------------------------------------------------------------------------------------


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
    try:
        return open_run(root, runs.load_manifest(root), target, data_dir, device)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{root} has a damaged run ({error!r}); run it again") from error


def open_run(
    root: Path, manifest: dict, target: int | None, data_dir: str | None, device: str
) -> Run:
    """`load_run` of the run whose settings.json holds the manifest."""
    if manifest.get("network", OWN_NETWORK) != OWN_NETWORK:
        raise InputError(
            f"{root} explains {manifest['network']}, which is not stored there: call explain() or "
            f"explain_sae() again with the same arguments; explain() reuses the SAE"
        )
    stored = manifest["settings"]
    runs.check_version(root, manifest, [f.name for f in fields(Settings)])
    targets = tuple(stored["target_actives"])  # JSON has no tuples
    settings = Settings(**{**stored, "target_actives": targets, "out": str(root)})  # it may move
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
    if frozen := manifest["hypotheses_sha256"][str(target)]:
        try:
            load_frozen(place / "hypotheses.json", frozen)
        except (OSError, ValueError) as error:
            raise InputError(f"{error}; run it again") from error
    model = restore_classifier(classifier.tensors).to(data.train.labels.device)
    layer = collect_activations(model, data, settings.normalize_z)
    explained = layer.with_sae(JumpReLUSAE.from_weights(sae.tensors, layer.device))
    return Run(explained, settings, data._replace(classes=tuple(manifest["classes"])), place)


class Arguments(Settings):
    """Settings that are arguments of explain()."""

    def named(self, name: str) -> str:
        """The argument for a setting."""
        return "target" if name == "target_actives" else name


EXPLAINED = "explained"  # folder of the results of explain(), by network and layer
LATENTS_OF_VECTOR, LATENTS_AT_POSITIONS = 2, 4  # per number of a row, where none are asked for
IMAGE_OPTIONS = ("mean", "std", "columns", "transform")  # of load_own


def explain_settings(net: AtLayer, raw: fa.Rows, target: int | None, given: dict) -> Settings:
    """Settings of a call of explain() for a layer with outputs like raw (n, ...); without a target
    the largest of TARGETS, until one is picked.

    Raises InputError for a name that is none.
    """
    decided = ["target_actives", "data", "device", "hidden_units", "my_hypotheses"]  # elsewhere
    decided += [f.name for f in fields(Settings) if f.name.endswith("_ffn")]  # of the classifier
    known = [f.name for f in fields(Settings) if f.name not in decided]
    for name in given:
        if name not in known:
            raise InputError(f"explain() has no setting {name!r}; it has {', '.join(known)}")
    if target is not None:
        target = fa.check_whole("target", target, 1)
    width = LATENTS_AT_POSITIONS if len(raw.shape) == 3 else LATENTS_OF_VECTOR
    usual = {"sae_latents": max(width * raw.shape[-1], 2 * (target or max(TARGETS))), "workers": 0}
    usual["out"] = str(Path(EXPLAINED) / file_name(net.short_name))
    given = {**given, "out": str(Path(given.get("out") or usual["out"]).expanduser())}
    if target is None:
        latents = given.get("sae_latents", usual["sae_latents"])
        possible = [t for t in TARGETS if t < latents]
        if not possible:
            raise InputError(f"give target=: sae_latents={latents} is below all of {TARGETS}")
        target = max(possible)
    try:
        return Arguments(target_actives=(target,), device=str(net.device), **{**usual, **given})
    except InputError as error:  # in the words of explain()
        words = str(error).replace("--target-actives", "target")
        raise InputError(re.sub("--([a-z-]+)", lambda m: m[1].replace("-", "_"), words)) from error


@default_torch_state()
def explain(
    model: nn.Module,
    layer: str | None,
    train: object,
    val: object = None,
    test: object = None,
    *,
    classes: Sequence[str] = (),
    target: int | None = None,
    pool: str | None = None,
    layout: str | None = None,
    grid: Sequence[int] | None = None,
    prefix_tokens: int | None = None,
    positions_per_image: int = 8,
    **settings: object,
) -> Run:
    """Train an SAE on a layer of any network, and explain its features: all that the script does.

        run = explain(model, "layer3", "photos")  # a folder with a folder of images for each class
        run = explain(model, "layer3", train, val, test, classes=names, out="explained")

    Args:
        model: maps images (B, C, H, W) to logits (B, n_classes), alone, as `.logits`, or in a dict
            or tuple. It runs in evaluation mode where it is, and is left as it was.
        layer: its name, as in `model.named_modules()`; None for a model that itself has the methods
            `preactivations` and `logits_from_preactivations`.
        train, val, test: pairs of tensors (images, labels), Datasets, DataLoaders, folders, ..., as
            `saexplain.datasets.load_own` takes them. The SAE is trained on the first, hypotheses
            are made from the second, and tested on the third; missing ones are taken from train.
        classes: names of the logits; by default those that the images have.
        target: mean number of active features of an image, or of a position; by default the
            smallest of TARGETS that keeps the predictions in a short training.
        pool, layout, grid, prefix_tokens: for a layer with positions, as in
            `saexplain.layers.AtLayer`; by default they are recognized, and printed.
        positions_per_image: random ones of each training image, on which the SAE is trained.
        settings: mean, std, columns and transform of `load_own`; any other of `Settings`, by name:
            out, sae_latents, hypotheses, fresh, ... By default out names network and layer, there
            are twice as many latents as the layer has outputs, four times as many as a position
            has, and no worker processes.

    Returns the run as `load_run` does; its files are in `out`. A second call with the same network
    and images reuses the SAE. Under torchrun all ranks train, and the first explains. Raises
    InputError for what cannot be used, ValueError for a layer whose output cannot be read or
    replaced.
    """
    clock = Stopwatch(shown=True)
    if positions_per_image < 1:
        raise InputError(f"positions_per_image must be at least 1, got {positions_per_image}")
    net = open_layer(model, layer, pool, layout, grid, prefix_tokens)
    images = {name: settings.pop(name) for name in IMAGE_OPTIONS if name in settings}
    with open_ranks() as ranks, printing_once(ranks):
        with live_line("data"):  # load_own prints a line about them
            data = report.load_splits(net, classes, train, val, test, **images)
        with torch.no_grad():
            some = net.preactivations(data.train.images[: fa.PROBED])
        own = explain_settings(net, some, target, settings)
        make_deterministic(net.device)
        root = Path(own.out)
        with one_writer(root, own.wait, ranks), torch_threads(1), Workers(own.workers) as workers:
            console.print_words(f"{net.title}: {net.in_words()}; results go to {root}")
            with live_line("estimate"):
                console.print_words(estimate(net, data, positions_per_image, own, target is None))
            made_from = layer_inputs(net, data)
            storing = Storing(positions_per_image, root, made_from)
            with clock("activations"):
                found = collect_activations(net, data, own.normalize_z, storing, ranks)
                clock.result = console.layer_words(found)
            warn_scale_shift(found)
            ranks.on_first(warn_chance, found)
            digest = ranks.on_first(digest_of_outputs, found, made_from)
            network = runs.Network("explain", net.title, digest)
            known = {**asdict(own), "target_actives": target and [target]}  # None: not known yet
            ranks.on_first(runs.begin_run, root, network.manifest(known, data), own.named)
            if target is None:
                with clock("target"):
                    picked = pick_target(found, own, data.train, train_wanted, ranks)
                    clock.result = f"{picked} active features keep most predictions"
                    own = replace(own, target_actives=(picked,))
            explain_activations(found, data, network, own, clock, workers, ranks)
            stage = load_stage(root, "sae")
    sae = JumpReLUSAE.from_weights(stage.tensors, found.device)
    return Run(found.with_sae(sae), own, data, root)


# --------------------------------------------------------------------------------------------------
# The script
# --------------------------------------------------------------------------------------------------


def run_once(settings: Settings) -> list[dict]:
    """Data, classifier, SAEs, reports; the records of summary.json."""
    clock, root = Stopwatch(shown=True), Path(settings.out)
    with (
        open_ranks() as ranks,
        printing_once(ranks),
        one_writer(root, settings.wait, ranks),
        torch_threads(1),
        Workers(settings.workers) as workers,
    ):
        with clock("data"):
            data = load_images(settings.data, settings.seed, pick_device(settings.device))
            clock.result = data.source
        check_split_leakage(data)
        manifest = runs.Network("script", OWN_NETWORK).manifest(asdict(settings), data)
        staging = ranks.on_first(runs.begin_run, root, manifest, settings.named)
        with clock("classifier"):
            model, stage = ranks.on_first(classifier_stage, settings, data, staging)
            clock.result = report.accuracy_words(model, data.val)
        with clock("activations"):
            layer = collect_activations(model, data, settings.normalize_z, ranks=ranks)
            clock.result = console.layer_words(layer)
        network = runs.Network("script", OWN_NETWORK, stage.digest, stage.record["history"])
        return explain_activations(layer, data, network, settings, clock, workers, ranks)


def train_combination(settings: Settings) -> tuple[fa.ExplainedLayer, Stage, str]:
    """The layer with the SAE of one combination of a sweep, its stage, and the data in words; the
    classifier of its seed is in a folder beside the combination's own."""
    (target,) = settings.target_actives
    folder = Path(settings.out)
    shared = folder.parent / f"seed_{settings.seed}_classifier"
    with torch_threads(1):
        data = load_images(settings.data, settings.seed, pick_device(settings.device))
        # The first combination trains it, the others reuse it without a line; so does --fresh.
        with folder_lock(shared, wait=True), redirect_stdout(io.StringIO()):
            model, classifier = classifier_stage(replace(settings, fresh=False), data, shared)
        layer = collect_activations(model, data, settings.normalize_z)
        made_from = {"data_digest": data.digest, "network_sha256": classifier.digest}
        with folder_lock(folder, settings.wait):
            wanted = [WantedSAE(target, settings, folder, made_from)]
            given = (layer, training_rows(layer), wanted, train_wanted)
            (stage,) = sae_stages(*given, f"the SAE in {folder}")
    sae = JumpReLUSAE.from_weights(stage.tensors, layer.device)
    return layer.with_sae(sae), stage, data.source


def report_my_hypotheses(settings: Settings) -> list[dict]:
    """The records of hypotheses of one's own, tested on the finished run in the folder `out`."""
    moved = None if settings.data == DATA else settings.data  # by default where they were
    root, wanted = Path(settings.out), settings.target_actives
    if not root.is_dir():  # which the lock would make
        runs.load_manifest(root)
    with folder_lock(root, settings.wait), torch_threads(1), live_line("tests"):
        runs.finish_run(root)
        found = runs.load_manifest(root)["settings"].get("target_actives", [])
        target = found[0] if len(found) == 1 and wanted == Settings.target_actives else wanted[0]
        run = load_run(root, target, moved, settings.device)
        if len(found) > 1:
            print(f"target {target} of {', '.join(map(str, found))}")
        given = read_hypotheses(settings.my_hypotheses, run.layer.sae)
        return report_own(given, run.layer, run.folder, run.report, run.data.classes)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """One run, a sweep or a comparison; the records of summary.json or sweep.json.

    Raises InputError, BusyError or TrainingError.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["compare"]:
        return [one.record for one in compare_command(given[1:], load_run).compared]
    first, *others = parse_runs(given)
    if first.my_hypotheses and others:
        raise InputError("--my-hypotheses tests on one finished run: give no --seeds")
    if first.my_hypotheses:
        return report_my_hypotheses(first)
    if not others:
        return run_once(first)
    workers = first.workers if pick_device(first.device).type == "cpu" else 0
    given = (combinations([first, *others]), train_combination, Path(first.out))
    return run_sweep(*given, workers, first.wait)


def run_script() -> int:
    """main, with the errors a user can cause as one line on stderr; the exit status."""
    try:
        with script_output():
            main()
        return 0
    except (InputError, BusyError, TrainingError, WorkerError) as error:
        words = str(error)
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
