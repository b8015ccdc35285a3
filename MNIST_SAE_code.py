"""Train a small MNIST classifier, look inside it with a sparse autoencoder, explain every feature.

    python MNIST_SAE_code.py                              # everything, from nothing to artifacts_mnist_sae/
    python MNIST_SAE_code.py --target-actives 10 20 40    # one SAE per sparsity, and their frontier
    python MNIST_SAE_code.py --data sample --features 50  # the bundled sample, the 50 busiest features

The stages, each a function below, called in this order by ``main``:

    data            the full MNIST set, or the bundled sample of it
    classifier      784-128-10, ReLU; what we want to understand
    preactivations  its 128 hidden values before the ReLU, for every image
    SAE             JumpReLU sparse autoencoder on them; lambda calibrated while it trains, thresholds after
    analysis        per feature: images, pixels, classes (feature_analysis.py), on the validation images
    hypotheses      per feature: a statement from the validation images, frozen, then tested on the test images
    fidelity        what the classifier loses when it must think through the SAE, on the test images

Dimension key: N images, B images in a batch, C classes, d_in hidden units of the classifier, d_sae latents.

References
    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU SAEs"
    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (auxiliary loss on dying latents)
    Blumensath & Davies 2008, "Iterative thresholding for sparse approximations" (threshold = sqrt(lambda))
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import inspect
import json
import math
import os
import platform
import re
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, get_type_hints

STARTED = time.perf_counter()  # before the heavy imports, so that the table of seconds can include them

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import feature_analysis as fa  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Settings: edit a line here, or give the flag of the same name (TARGET_ACTIVES is --target-actives).
# ---------------------------------------------------------------------------------------------------------------------

TARGET_ACTIVES = [20]  # mean number of active features per image; each target gets an SAE of its own
SAE_LATENTS = 512  # four per hidden unit: enough for rare strokes, few enough to look at all of them
EPOCHS_SAE_FINAL = 5  # passes over the training images; more lowers FVU slowly (and keeps L0 on target)
BATCH_SAE = 128  # many small steps beat few large ones at a fixed number of epochs: 256 is faster, FVU a tenth worse
LR_SAE = 1e-2  # peak Adam rate; 1e-3 trebles FVU in so few epochs
HEAD_KL = 0.1  # weight of the classifier's logits in the SAE loss; 0 ignores what the network does with z
NORMALIZE_Z = True  # standardise each hidden unit first, so that loud units do not own the dictionary
HIDDEN_UNITS = 128  # width of the classifier's hidden layer, d_in of the SAE
EPOCHS_FFN = 3  # passes over the training images for the classifier
BATCH_FFN = 256  # images per classifier step
LR_FFN = 2e-2  # peak AdamW rate of the one-cycle schedule; reaches in 3 epochs what 1e-3 needs 12 for
WEIGHT_DECAY_FFN = 1.2  # strong on purpose: pixels without evidence lose their weight, so patterns are legible
TOPK = 20  # strongest images kept per feature
N_EVAL = 2000  # images over which an effect on the logits is averaged
ALPHA = 1.0  # how much of a feature is added when its logit effect is measured
HYPOTHESES = True  # propose a statement about every feature, freeze it, test it on the test images
STABILITY_SEEDS = 0  # train so many more SAEs from other seeds and see which features return
FEATURES = 0  # analyse only this many of the most active features; 0 analyses all
SEED = 0  # same seed, device and thread count: the same artifacts
DATA = "data"  # folder that holds MNIST/raw, or "sample" for the bundled 5,000 digits
OUT = "artifacts_mnist_sae"  # where everything is written
DEVICE = "auto"  # auto takes a CUDA GPU when there is one
FRESH = False  # retrain although finished stages could be reused


def setting(default, what):
    """A dataclass field with the help text of its flag."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Settings:
    """Settings of one run, checked; every field is also a flag of the command line."""

    target_actives: tuple[int, ...] = setting(tuple(TARGET_ACTIVES), "mean active features per image, one SAE for each")
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
    hypotheses: bool = setting(HYPOTHESES, "propose, freeze and test a statement about every feature")
    stability_seeds: int = setting(STABILITY_SEEDS, "more SAEs to train, to see which features return")
    features: int = setting(FEATURES, "analyse only this many of the most active features; 0 means all")
    seed: int = setting(SEED, "seed of every random choice")
    data: str = setting(DATA, "folder that holds MNIST/raw, or 'sample'")
    out: str = setting(OUT, "folder for everything that is written")
    device: str = setting(DEVICE, "auto, cpu, cuda or cuda:N")
    fresh: bool = setting(FRESH, "retrain instead of reusing finished stages")

    def __post_init__(self) -> None:
        whole = [name for name, kind in get_type_hints(Settings).items() if kind is int]
        for name, value in [
            *((n, getattr(self, n)) for n in whole),
            *(("target_actives", t) for t in self.target_actives),
        ]:
            if not isinstance(value, int):
                raise InputError(f"{flag_name(name)} is {value}; it must be a whole number")
        targets = self.target_actives
        if not targets:
            raise InputError("--target-actives is empty; give at least one number, such as 20")
        if len(set(targets)) < len(targets):
            raise InputError(f"--target-actives {list(targets)} names a target twice; give each once")
        for target in targets:
            if not 0 < target < self.sae_latents:
                raise InputError(
                    f"--target-actives {target} must be positive and below --sae-latents {self.sae_latents}"
                )
        positive = "epochs_sae_final batch_sae lr_sae hidden_units epochs_ffn batch_ffn lr_ffn topk n_eval".split()
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{flag_name(name)} is {getattr(self, name)}; it must be a positive number")
        for name in "head_kl weight_decay_ffn stability_seeds features seed".split():
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{flag_name(name)} is {getattr(self, name)}; it must not be negative")
        if self.seed >= 2**63:
            raise InputError(f"--seed is {self.seed}; it must be below 2**63")
        if not math.isfinite(self.alpha):
            raise InputError(f"--alpha is {self.alpha}; it must be a finite number")


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do."""


class TrainingError(RuntimeError):
    """Training left the finite numbers; the message says where, and what to lower."""


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is reported like every other wrong input: in one line."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the flags)")


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Flags to Settings. Raises InputError for values that cannot be used."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types = get_type_hints(Settings)  # not the types of the defaults: an edited HEAD_KL = 0 is still a float
    for f in fields(Settings):
        kind: dict = {"type": types[f.name]}
        if types[f.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.name == "target_actives":
            kind = {"type": int, "nargs": "*"}
        parser.add_argument(flag_name(f.name), default=f.default, help=f.metadata["help"], **kind)
    given = vars(parser.parse_args(argv))
    given["target_actives"] = tuple(given["target_actives"])
    return Settings(**given)


def pick_device(name: str) -> torch.device:
    """'auto' to the best device of this machine. Raises InputError when the device is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

SAMPLE_FILE = Path(__file__).resolve().parent / "data" / "mnist_5k.npz"
IDX_FILES = {  # name without .gz: (magic number, shape, MD5 of the decompressed file)
    "train-images-idx3-ubyte": (2051, (60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (2049, (60_000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (2051, (10_000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (2049, (10_000,), "27ae3e4e09519cfbb04c329615203637"),
}
FULL_TRAIN_IMAGES = 48_000  # epochs are counted on this many images; a smaller set is passed over more often
DOWNLOAD_TIMEOUT = 10.0  # seconds a mirror may stay silent


class Split(NamedTuple):
    """Images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) int64."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """The three disjoint splits, where they came from in words, and a digest of the digits and of the split."""

    train: Split
    val: Split
    test: Split
    source: str
    digest: str


def parse_idx(raw: bytes, name: str) -> np.ndarray:
    """One decompressed IDX file as a uint8 array of the shape MNIST has. Raises InputError naming the file."""
    magic, shape, md5 = IDX_FILES[name.removesuffix(".gz")]
    header = 4 * (1 + len(shape))
    if len(raw) < header:
        raise InputError(f"{name} is damaged: {len(raw)} bytes are too few for a header; fetch the file again")
    found_magic, *found_shape = struct.unpack(f">{1 + len(shape)}I", raw[:header])
    if found_magic != magic:
        raise InputError(f"{name} is not what its name says: magic number {found_magic}, expected {magic}")
    if tuple(found_shape) != shape:
        raise InputError(f"{name} announces the shape {tuple(found_shape)}, expected {shape}; fetch the file again")
    if len(raw) != header + math.prod(shape):
        raise InputError(
            f"{name} is damaged: {len(raw):,} bytes, expected {header + math.prod(shape):,}; fetch it again"
        )
    found_md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found_md5 != md5:  # also what catches labels that belong to other images
        raise InputError(f"{name} differs from MNIST's own file: MD5 {found_md5}, expected {md5}; fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The IDX file `name` of `folder`, plain or gzipped. Raises InputError when it is missing or damaged."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.exists():
        return parse_idx(plain.read_bytes(), plain.name)
    if not packed.exists():
        raise InputError(f"{folder} holds some of MNIST's files but neither {name} nor {name}.gz; add it")
    try:
        raw = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed.name} is damaged ({error}); fetch the file again") from error
    return parse_idx(raw, packed.name)


def download_mnist(data_dir: Path) -> None:
    """Fetch MNIST into `data_dir`/MNIST/raw with torchvision; half a download never stays there.

    Raises whatever torchvision's import or the network raises; the caller turns it into words.
    """
    from torchvision.datasets import MNIST  # only here: a torchvision without its C++ operators fails on import

    data_dir.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with tempfile.TemporaryDirectory(dir=data_dir) as unfinished:
            MNIST(unfinished, download=True)
            target = data_dir / "MNIST" / "raw"
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmdir()  # empty, or there would be nothing to download
            os.replace(Path(unfinished) / "MNIST" / "raw", target)
    finally:
        socket.setdefaulttimeout(patience)


def read_full_set(raw_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 images and labels, training images first."""
    arrays = [read_idx(raw_dir, name) for name in IDX_FILES]
    return np.concatenate(arrays[0::2]), np.concatenate(arrays[1::2])


def read_sample() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 bundled digits. Raises InputError when the file is missing or damaged."""
    try:
        with np.load(SAMPLE_FILE) as stored:
            images, labels = stored["images"], stored["labels"]
    except (OSError, KeyError, ValueError, EOFError, zlib.error) as error:
        raise InputError(
            f"the bundled sample {SAMPLE_FILE.name} is damaged or missing ({error}); restore it"
        ) from error
    if images.shape != (5000, 28, 28) or labels.shape != (5000,) or np.bincount(labels).tolist() != [500] * 10:
        raise InputError(
            f"the bundled sample {SAMPLE_FILE.name} holds {images.shape} images, not 500 a class; restore it"
        )
    return images, labels


def sample_split(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of 70 / 10 / 20 per cent of every class (3,500 / 500 / 1,000), each part in random order."""
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = [len(members) * 7 // 10, len(members) * 8 // 10]
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return tuple(rng.permutation(np.concatenate(part)) for part in parts)


def load_mnist(data_dir: str, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """The digits, split into training, validation and test images, on `device`.

    Takes the first of: the four IDX files under `data_dir`/MNIST/raw; a download into it; the bundled sample (outright
    when `data_dir` is 'sample'). The full set is split 48,000 / 12,000 / 10,000, the last being MNIST's own test set.

    Raises InputError when a file that is there is damaged, incomplete or not MNIST's.
    """
    raw_dir = Path(data_dir) / "MNIST" / "raw"
    found = any((raw_dir / name).exists() or (raw_dir / f"{name}.gz").exists() for name in IDX_FILES)
    if data_dir != "sample" and not found:
        try:
            download_mnist(Path(data_dir))
            found = True
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            print(
                f"No MNIST under {raw_dir} and no download ({reason}): using the bundled 5,000 digits, so accuracy is "
                f"lower and features are coarser. For the full set put the four IDX files there, or give --data DIR."
            )
    rng = np.random.default_rng(seed)
    if data_dir != "sample" and found:
        images, labels = read_full_set(raw_dir)
        shuffled = rng.permutation(60_000)
        parts = (shuffled[:FULL_TRAIN_IMAGES], shuffled[FULL_TRAIN_IMAGES:], np.arange(60_000, 70_000))
        source = "MNIST, full set of 70,000 digits"
    else:
        images, labels = read_sample()
        parts = sample_split(labels, rng)
        source = "bundled sample of 5,000 MNIST training digits"
    digest = hashlib.sha256(
        images.tobytes() + labels.tobytes() + b"".join(part.tobytes() for part in parts)
    ).hexdigest()
    splits = []
    for part in parts:
        pixels = torch.from_numpy(images[part]).to(device).float().div_(255).unsqueeze(1)
        splits.append(Split(pixels, torch.from_numpy(labels[part].astype(np.int64)).to(device)))
    return Data(*splits, source=source, digest=digest)


class TensorLoader:
    """Batches of a Split in its own order, without copying; what the analysis functions take as `loader`."""

    def __init__(self, split: Split, batch_size: int = 2000):
        self.split, self.batch_size = split, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.split.images.split(self.batch_size), self.split.labels.split(self.batch_size), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training, what both networks share
# ---------------------------------------------------------------------------------------------------------------------


def scaled_epochs(epochs: int, n_train: int) -> int:
    """Passes over `n_train` images that make about as many steps as `epochs` passes over the full training set."""
    return max(1, round(epochs * FULL_TRAIN_IMAGES / n_train))


def batches(n: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors (B,) of `epochs` shuffled passes over `n` images; an incomplete last batch is left out."""
    batch_size = min(batch_size, n)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator, device=generator.device)
        yield from order[: n - n % batch_size].split(batch_size)


def n_steps(n: int, batch_size: int, epochs: int) -> int:
    """How many batches `batches` yields."""
    return epochs * (n // min(batch_size, n))


def ramp(progress: float, rise_until: float, fall_from: float) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up from 0, flat at 1, linear down to 0."""
    return min(1.0, progress / rise_until, (1 - progress) / (1 - fall_from))


CHECK_EVERY = 250  # steps between two looks at the loss: each makes a GPU wait, so not at every step


def refuse_divergence(losses: Tensor, step: int, stage: str, flag: str, rate: float) -> None:
    """Every CHECK_EVERY steps and at the last: raise TrainingError naming the first step whose loss is not finite.

    `losses` (steps,) holds those of the steps 0 to `step`.
    """
    if (step + 1) % CHECK_EVERY and step + 1 < len(losses):
        return
    bad = torch.nonzero(~torch.isfinite(losses[: step + 1])).flatten()
    if len(bad):
        raise TrainingError(
            f"{stage} diverged: its loss is not finite at step {int(bad[0])}; lower {flag} (now {rate})"
        )


def refuse_bad_weights(module: nn.Module, stage: str, flag: str, rate: float) -> None:
    """Raise TrainingError when the last step, whose loss nobody sees any more, broke the weights."""
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise TrainingError(
            f"{stage} diverged: its weights are not finite after the last step; lower {flag} (now {rate})"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Classifier
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """logits = W2 relu(z) + b2 with preactivations z = W1 (x - pixel_mean) + b1.

    The mean image is subtracted because centred inputs let the first layer learn several times faster.
    The analysis uses `preactivations` and `logits_from_preactivations`, and nothing else of a model.
    """

    def __init__(self, n_pixels: int = 784, hidden_units: int = 128, n_classes: int = 10):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(n_pixels))
        self.hidden = nn.Linear(n_pixels, hidden_units)
        self.head = nn.Linear(hidden_units, n_classes)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, 1, 28, 28) -> z (B, d_in)"""
        return self.hidden(images.flatten(1) - self.pixel_mean)

    def logits_from_preactivations(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> logits (B, C)"""
        return self.head(F.relu(z))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_from_preactivations(self.preactivations(images))


def train_classifier(train: Split, settings: Settings) -> Classifier:
    """Cross entropy, AdamW, one cycle of the learning rate. Raises TrainingError on divergence."""
    device = train.labels.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    with torch.random.fork_rng(
        devices=[device] if device.type == "cuda" else []
    ):  # nn.Linear draws from the global generator: leave it as it was
        torch.manual_seed(settings.seed)
        model = Classifier(hidden_units=settings.hidden_units).to(device)
    model.pixel_mean.copy_(train.images.flatten(1).mean(0))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr_ffn,
        betas=(0.9, 0.99),  # 0.999 would average over more steps than the cycle has
        weight_decay=settings.weight_decay_ffn,
        fused=True,
    )
    n, epochs = len(train.labels), scaled_epochs(settings.epochs_ffn, len(train.labels))
    steps = n_steps(n, settings.batch_ffn, epochs)
    losses = torch.zeros(steps, device=device)
    plan = batches(n, settings.batch_ffn, epochs, generator)
    for step, index in enumerate(tqdm(plan, "classifier", steps, leave=False, disable=None)):
        optimizer.param_groups[0]["lr"] = settings.lr_ffn * ramp((step + 0.5) / steps, 0.2, 0.2)
        loss = F.cross_entropy(model(train.images[index]), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        refuse_divergence(losses, step, "classifier training", "--lr-ffn", settings.lr_ffn)
    refuse_bad_weights(model, "classifier training", "--lr-ffn", settings.lr_ffn)
    return model.requires_grad_(False).eval()


class Preactivations(NamedTuple):
    """Raw preactivations (N, d_in) of each split, and what standardises them: z = (raw - mu) / std, (d_in,) each."""

    train: Tensor
    val: Tensor
    test: Tensor
    mu: Tensor
    std: Tensor


@torch.no_grad()
def collect_preactivations(model: Classifier, data: Data, normalize: bool) -> Preactivations:
    """The classifier's preactivations for every image. Without `normalize`, mu = 0 and std = 1.

    A unit that never varies gets std = 1: it carries nothing, and dividing by zero would spread NaN.
    """
    train, val, test = (
        torch.cat([model.preactivations(images) for images, _ in TensorLoader(split)])
        for split in (data.train, data.val, data.test)
    )
    mu, std = torch.zeros_like(train[0]), torch.ones_like(train[0])
    if normalize:
        mu, std = train.mean(0), train.std(0)
        std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
    return Preactivations(train, val, test, mu, std)


# ---------------------------------------------------------------------------------------------------------------------
# SAE
# ---------------------------------------------------------------------------------------------------------------------


class JumpReLUSAE(nn.Module):
    """Sparse autoencoder of standardised preactivations z.

        pre   = z W_enc + b_enc                 (B, d_sae)
        f     = pre * 1[pre > threshold]        (B, d_sae), threshold >= 0
        z_hat = f W_dec + b_dec                 (B, d_in), rows of W_dec of unit norm

    The same three lines run in training, in evaluation and in whatever loads the saved weights. Parameters: W_enc
    (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,); buffer: threshold (d_sae,).
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
        """pre (B, d_sae) -> feature_acts (B, d_sae); the gradient flows through active features only"""
        return torch.where(pre > self.threshold, pre, 0.0)

    def encode(self, z: Tensor) -> Tensor:
        """z (B, d_in) -> feature_acts (B, d_sae)"""
        return self.jump(self.pre_threshold(z))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts (B, d_sae) -> z_hat (B, d_in)"""
        return torch.addmm(self.b_dec, feature_acts, self.W_dec)

    def forward(self, z: Tensor) -> Tensor:
        return self.decode(self.encode(z))


class TrainingFrame(NamedTuple):
    """Coordinates the SAE is trained in: x = (z - center) @ basis / scale, with x centred and of mean square 1.

    The basis holds the principal directions of z. A rotation changes neither the model nor the loss, but Adam scales
    every coordinate by itself, so in these coordinates it can give quiet directions the larger steps they need: FVU at
    L0 20 falls by about a tenth. Thresholds and lambda become independent of the scale of z.
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

    def fold(self, sae: JumpReLUSAE) -> JumpReLUSAE:
        """The SAE of x written as an SAE of z: the same features, activations multiplied by scale."""
        folded = JumpReLUSAE(*sae.W_enc.shape).to(sae.W_enc.device)
        with torch.no_grad():
            folded.W_enc.copy_(self.basis @ sae.W_enc)
            folded.b_enc.copy_(sae.b_enc * self.scale - self.center @ folded.W_enc)
            folded.W_dec.copy_(sae.W_dec @ self.basis.T)
            folded.b_dec.copy_(self.leave(sae.b_dec[None])[0])
            folded.threshold.copy_(sae.threshold * self.scale)
        return folded


# How training is steered. These belong to the method rather than to a run, so they are not flags.
START_L0_FACTOR = 4.0  # training starts this many times denser than asked, so that every latent first finds a use
L0_SETTLED_AT = 0.3  # share of training after which the target itself is aimed at
START_THRESHOLD = 0.5  # sqrt(lambda) at the start, in units of the preactivations' standard deviation
HEAD_FROM = 0.5  # share of training after which the classifier's logits count too: earlier they only slow it down
HEAD_TEMPERATURE = 4.0  # softened logits compare all classes on all images; at 1 a few unsure images drown the rest
RARE_DENSITY = 0.002  # a latent that fires on fewer images than this is dying, and the auxiliary loss trains it
RARE_COEFFICIENT = 0.1  # its weight there: from 0.03 to 3 little but the number of dead latents depends on it
RARE_EVERY = 4  # that loss joins in at every so many steps: it is a nudge, and at all of them a third more work
RARE_AT_ONCE = 32  # at most so many rare latents explain one image
FAIR_SHARE = 1.25  # latents below this share of the mean density pay less lambda, down to none: spreads the work


class LambdaController:
    """Finds the lambda that gives the L0 asked for, while the SAE trains.

    The objective is  ||x - x_hat||^2 + lambda * L0  per image. With unit decoder rows, keeping a feature whose
    activation is a lowers the first term by about a^2 and costs lambda, so the best threshold is sqrt(lambda) (hard
    thresholding, Blumensath & Davies 2008). Raising lambda therefore lowers L0 at once, and a proportional-integral
    controller on log sqrt(lambda) holds L0 at its target: no trial runs, no coefficient to tune.

    Everything is a tensor of shape () on the device: a step costs no synchronisation.
    """

    INTEGRAL, PROPORTIONAL, MEMORY = 0.1, 0.3, 0.9  # gains on log(L0 / target); memory of the L0 average, per step

    def __init__(self, start_l0: float, device: torch.device):
        self.log_threshold = torch.tensor(math.log(START_THRESHOLD), device=device)
        self.l0 = torch.tensor(start_l0, device=device)
        self.error = torch.zeros((), device=device)

    def threshold(self) -> Tensor:
        """sqrt(lambda), ()"""
        return self.log_threshold.exp()

    def observe(self, l0: Tensor, target: float) -> None:
        """One step: the batch had `l0` active features per image, `target` are wanted."""
        self.l0 = torch.lerp(l0, self.l0, self.MEMORY)
        error = torch.log(self.l0.clamp(min=1e-2) / target)
        self.log_threshold = self.log_threshold + self.INTEGRAL * error + self.PROPORTIONAL * (error - self.error)
        self.error = error


def l0_target_at(progress: float, target: float, d_sae: int) -> float:
    """Mean active features aimed at: from START_L0_FACTOR times the target geometrically down to it."""
    start = max(target, min(START_L0_FACTOR * target, d_sae / 2))
    return target * (start / target) ** max(0.0, 1 - progress / L0_SETTLED_AT)


@torch.no_grad()
def initial_sae(x: Tensor, d_sae: int, start_l0: float, generator: torch.Generator) -> JumpReLUSAE:
    """Random unit decoder rows, the encoder their transpose, every latent active on start_l0 / d_sae of `x` (N, d_in).

    The encoder is scaled so that the first reconstruction is as close to `x` as one number can make it.
    """
    sae = JumpReLUSAE(x.shape[1], d_sae).to(x.device).requires_grad_(False)
    rows = torch.randn(sae.W_dec.shape, generator=generator, device=generator.device)
    sae.W_dec.copy_(F.normalize(rows, dim=1))
    projection = x @ sae.W_dec.T  # (N, d_sae)
    cut = projection.sort(dim=0).values[int((1 - start_l0 / d_sae) * (len(x) - 1))]  # (d_sae,)
    active = (projection > cut).float()
    # Activations will be START_THRESHOLD + length * (projection - cut): least squares for the length.
    slope, rest = ((projection - cut) * active) @ sae.W_dec, x - START_THRESHOLD * active @ sae.W_dec
    length = (slope * rest).sum() / slope.square().sum()
    sae.W_enc.copy_(length * sae.W_dec.T)
    sae.b_enc.copy_(START_THRESHOLD - length * cut)
    sae.threshold.fill_(START_THRESHOLD)
    return sae.requires_grad_(True)


def soft_kl(teacher: Tensor, logits: Tensor) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), (B, C) each, T = HEAD_TEMPERATURE (Hinton et al. 2015)."""
    p, log_q = (F.log_softmax(a / HEAD_TEMPERATURE, dim=1) for a in (teacher, logits))
    return HEAD_TEMPERATURE**2 * F.kl_div(log_q, p, log_target=True, reduction="batchmean")


def rare_latents_loss(sae: JumpReLUSAE, pre: Tensor, residual: Tensor, rare: Tensor) -> Tensor:
    """What is left of the residual (B, d_in) when the rare latents, (d_sae,) bool, with the largest pre explain it.

    Threshold and sign of pre are ignored, which gives latents that no longer fire a gradient towards
    what the others leave over (after the AuxK loss of Gao et al. 2024).
    """
    candidates = pre.detach().masked_fill(~rare, -math.inf)
    cut = candidates.topk(min(RARE_AT_ONCE, len(rare)), dim=1).values[:, -1:]
    explained = torch.where(rare & (candidates >= cut), pre, 0.0) @ sae.W_dec
    return F.mse_loss(explained, residual)


class SAECourse(NamedTuple):
    """How training went, each (steps,): reconstruction loss (share of variance), L0 of the batch, lambda."""

    loss: Tensor
    l0: Tensor
    l0_coefficient: Tensor


def train_sae(
    z: Tensor, logits_of: Callable[[Tensor], Tensor], target: float, settings: Settings
) -> tuple[JumpReLUSAE, SAECourse]:
    """An SAE of `z` (N, d_in) with `target` active features per image on average, found in one run.

    `logits_of` maps standardised preactivations (B, d_in) to the classifier's logits (B, C). Raises TrainingError on
    divergence. The lambda of the course is that of ||z - z_hat||^2 + lambda * L0.
    """
    generator = torch.Generator(z.device).manual_seed(settings.seed)
    frame = TrainingFrame.of(z)
    x = frame.enter(z)
    teacher = torch.cat([logits_of(chunk) for chunk in z.split(EVAL_ROWS)])
    d_sae, start_l0 = settings.sae_latents, l0_target_at(0, target, settings.sae_latents)
    sae = initial_sae(x[: 16 * settings.batch_sae], d_sae, start_l0, generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.lr_sae, betas=(0.9, 0.99), fused=True)
    controller = LambdaController(start_l0, z.device)
    density = torch.full((d_sae,), start_l0 / d_sae, device=z.device)  # moving average of how often each latent fires
    epochs = scaled_epochs(settings.epochs_sae_final, len(z))
    steps = n_steps(len(z), settings.batch_sae, epochs)
    course = SAECourse(*(torch.zeros(steps, device=z.device) for _ in range(3)))

    plan = batches(len(z), settings.batch_sae, epochs, generator)
    for step, index in enumerate(tqdm(plan, f"SAE, {target} active", steps, leave=False, disable=None)):
        progress = (step + 0.5) / steps
        l0_target = l0_target_at(progress, target, d_sae)
        optimizer.param_groups[0]["lr"] = settings.lr_sae * ramp(progress, 0.02, 0.3)
        # A latent's lambda is proportional to its density until it has its fair share: rare ones are cheap to use.
        discount = (density / (FAIR_SHARE * l0_target / d_sae)).clamp(max=1)
        sae.threshold.copy_(controller.threshold() * discount.sqrt())

        batch = x[index]  # (B, d_in)
        pre = sae.pre_threshold(batch)  # (B, d_sae)
        feature_acts = sae.jump(pre)
        x_hat = sae.decode(feature_acts)
        reconstruction = F.mse_loss(x_hat, batch)  # 1 for a constant prediction: x has mean square 1
        loss = reconstruction
        if step % RARE_EVERY == 0:
            rare = density < RARE_DENSITY
            loss = loss + RARE_COEFFICIENT * rare_latents_loss(sae, pre, (batch - x_hat).detach(), rare)
        if settings.head_kl and progress > HEAD_FROM:
            loss = loss + settings.head_kl * soft_kl(teacher[index], logits_of(frame.leave(x_hat)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        with torch.no_grad():
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            fired = (feature_acts > 0).float().mean(0)  # (d_sae,)
            density.lerp_(fired, 0.01)
            l0, l0_coefficient = fired.sum(), (controller.threshold() * frame.scale).square()
            for record, value in zip(course, (reconstruction, l0, l0_coefficient), strict=True):
                record[step] = value
            controller.observe(l0, l0_target)
        refuse_divergence(course.loss, step, f"SAE training for {target} actives", "--lr-sae", settings.lr_sae)
    refuse_bad_weights(sae, f"SAE training for {target} actives", "--lr-sae", settings.lr_sae)
    return frame.fold(sae).requires_grad_(False), course


# ---------------------------------------------------------------------------------------------------------------------
# Calibration of the thresholds
# ---------------------------------------------------------------------------------------------------------------------

EVAL_ROWS = 4096  # rows per step where preactivations are evaluated: bounds the memory


@torch.no_grad()
def mean_actives(sae: JumpReLUSAE, z: Tensor) -> float:
    """L0: mean number of active features over z (N, d_in)."""
    return sum(int((sae.encode(chunk) > 0).sum()) for chunk in z.split(EVAL_ROWS)) / len(z)


@torch.no_grad()
def threshold_shift(sae: JumpReLUSAE, z: Tensor, target: float) -> float:
    """The number to add to every threshold so that `target` features are active per image of z (N, d_in) on average.

    A feature is active when pre > max(threshold + shift, 0): when pre > 0 and its excess pre - threshold is above the
    shift. So the shift lies between the last of the target * N largest excesses and the next one: an order statistic.
    Where those two are equal no shift is exact, and theirs is returned, which leaves the tied ones out. When fewer pre
    are positive than asked for, the shift is -inf: every threshold becomes 0.
    """
    wanted = round(target * len(z))
    largest = torch.empty(0, device=z.device)  # the wanted + 1 largest excesses so far, descending
    for chunk in z.split(EVAL_ROWS):
        pre = sae.pre_threshold(chunk)
        candidates = torch.cat([largest, (pre - sae.threshold)[pre > 0]])
        largest = candidates.topk(min(wanted + 1, len(candidates))).values
    if len(largest) <= wanted:
        return -math.inf
    last_in, first_out = largest[wanted - 1].item(), largest[wanted].item()  # float64 from here on
    return (last_in + first_out) / 2


@torch.no_grad()
def adjust_thresholds(sae: JumpReLUSAE, z: Tensor, target: float) -> tuple[JumpReLUSAE, float]:
    """A copy of the SAE with exactly `target` active features on z (N, d_in) unless excesses tie, and the shift."""
    shift = threshold_shift(sae, z, target)
    adjusted = copy.deepcopy(sae)
    adjusted.threshold.copy_((sae.threshold.double() + shift).clamp(min=0))
    return adjusted, shift


# ---------------------------------------------------------------------------------------------------------------------
# Fidelity: what the classifier loses when it must think through the SAE
# ---------------------------------------------------------------------------------------------------------------------

MODES = ("jumprelu", "boolean", "boolean_scaled")


class Usage(NamedTuple):
    """How the features are used on some images, each (d_sae,): share of images, and mean activation when active."""

    feature_density: Tensor
    mean_activation: Tensor


@torch.no_grad()
def feature_usage(sae: JumpReLUSAE, z: Tensor) -> Usage:
    """Usage over z (N, d_in). The mean activation of a feature that never fires is 0."""
    counts = torch.zeros(len(sae.threshold), dtype=torch.int64, device=z.device)
    sums = torch.zeros(len(sae.threshold), dtype=torch.float64, device=z.device)
    for chunk in z.split(EVAL_ROWS):
        feature_acts = sae.encode(chunk)
        counts += (feature_acts > 0).sum(0)
        sums += feature_acts.sum(0, dtype=torch.float64)
    return Usage(counts / len(z), (sums / counts.clamp(min=1)).float())


def reconstruct(sae: JumpReLUSAE, z: Tensor, mode: str, mean_activation: Tensor) -> Tensor:
    """z (B, d_in) through the SAE. `jumprelu`: as it is. `boolean`: an active feature counts 1. `boolean_scaled`: it
    counts its mean activation, (d_sae,)."""
    feature_acts = sae.encode(z)
    if mode != "jumprelu":
        feature_acts = (feature_acts > 0).float()
    return sae.decode(feature_acts * mean_activation if mode == "boolean_scaled" else feature_acts)


class Fidelity(NamedTuple):
    """Of one way to reconstruct. Cross entropies are in nats."""

    accuracy: float
    agreement: float  # share of images on which the prediction stays the classifier's own
    cross_entropy: float
    ce_recovered: float | None  # 1: none of what mean ablation costs is lost, 0: all; None when it costs nothing
    kl: float  # mean KL(classifier || classifier through the SAE)
    fvu: float  # sum ||z - z_hat||^2 / sum ||z - mean(z)||^2, the mean over these same images


@torch.no_grad()
def fidelity(z: Tensor, z_hat: Tensor, labels: Tensor, logits_of: Callable, z_mean: Tensor) -> Fidelity:
    """Compare the classifier on z_hat (N, d_in) with the classifier on z; `z_mean` (d_in,) is what mean ablation uses.

    ce_recovered = (CE(mean) - CE(z_hat)) / (CE(mean) - CE(z)), as in Bricken et al. 2023.
    """
    logits, logits_hat = logits_of(z), logits_of(z_hat)
    logits_mean = logits_of(z_mean[None]).expand_as(logits)
    ce, ce_hat, ce_mean = (F.cross_entropy(a, labels).item() for a in (logits, logits_hat, logits_mean))
    log_p, log_q = F.log_softmax(logits, 1), F.log_softmax(logits_hat, 1)
    return Fidelity(
        accuracy=(logits_hat.argmax(1) == labels).double().mean().item(),
        agreement=(logits_hat.argmax(1) == logits.argmax(1)).double().mean().item(),
        cross_entropy=ce_hat,
        ce_recovered=(ce_mean - ce_hat) / (ce_mean - ce) if ce_mean != ce else None,
        kl=F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
        fvu=((z - z_hat).square().sum() / (z - z.mean(0)).square().sum()).item(),
    )


@torch.no_grad()
def measure(before: JumpReLUSAE, after: JumpReLUSAE, pre: Preactivations, data: Data, logits_of: Callable) -> dict:
    """Everything summary.json says about one SAE's fidelity; `before` and `after` the adjustment of the thresholds."""
    z_train, z_val, z_test = ((raw - pre.mu) / pre.std for raw in (pre.train, pre.val, pre.test))
    usage, z_mean, labels = feature_usage(after, z_train), z_train.mean(0), data.test.labels

    def of(sae: JumpReLUSAE, mode: str) -> Fidelity:
        z_hat = torch.cat([reconstruct(sae, chunk, mode, usage.mean_activation) for chunk in z_test.split(EVAL_ROWS)])
        return fidelity(z_test, z_hat, labels, logits_of, z_mean)

    by_mode = {mode: of(after, mode) for mode in MODES}
    baseline = fidelity(z_test, z_test, labels, logits_of, z_mean)
    l0 = torch.cat([(after.encode(chunk) > 0).sum(1) for chunk in z_test.split(EVAL_ROWS)]).double()
    jump = by_mode["jumprelu"]
    return {
        "achieved_actives_before_shift": mean_actives(before, z_val),
        "achieved_actives_val": mean_actives(after, z_val),
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
        "before_shift": of(before, "jumprelu")._asdict(),
        "dead_features": int((usage.feature_density == 0).sum()),
        "dense_features": int((usage.feature_density > 0.5).sum()),
        "rare_features": int((usage.feature_density < 0.001).sum()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Saving finished stages, and using them again
# ---------------------------------------------------------------------------------------------------------------------


def to_json(record: object) -> bytes:
    """Strict JSON: a NaN is an error here rather than in whoever reads the file."""
    return (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()


def prepare_folder(folder: Path) -> None:
    """Make the folder and make sure that files can be written there. Raises InputError when they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to ({error.strerror}); choose another folder") from error


def fingerprint(settings: Settings, names: Sequence[str], functions: Sequence[Callable], **inputs: object) -> str:
    """SHA-256 over all that decides a stage's outcome: those settings, its code and its inputs."""
    decisive = {name: getattr(settings, name) for name in names}
    code = [inspect.getsource(function) for function in functions]
    surroundings = [FULL_TRAIN_IMAGES, EVAL_ROWS, torch.__version__, torch.get_num_threads()]
    text = json.dumps([decisive, code, inputs, surroundings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def save_stage(folder: Path, name: str, print_of: str, tensors: dict[str, Tensor], record: dict) -> str:
    """Write name.safetensors and name.json, tensors first; returns the SHA-256 of the tensors.

    The JSON holds the fingerprint and that SHA-256: an interruption between the two leaves a pair that does not match.
    """
    stored = safetensors.torch.save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(stored).hexdigest()
    fa.write_whole(folder / f"{name}.safetensors", stored)
    fa.write_whole(folder / f"{name}.json", to_json({"fingerprint": print_of, "sha256": digest, **record}))
    return digest


class Stage(NamedTuple):
    """A stage as it was saved: its tensors, the record beside them and the SHA-256 of the tensors."""

    tensors: dict[str, Tensor]
    record: dict
    digest: str


def read_stage(folder: Path, name: str) -> Stage:
    """Raises InputError when a file is missing, cannot be read, or does not belong to the other."""
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        stored = (folder / f"{name}.safetensors").read_bytes()
        digest = hashlib.sha256(stored).hexdigest()
        if record["sha256"] != digest:
            raise ValueError("the two files do not belong together")
        return Stage(safetensors.torch.load(stored), record, digest)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{name}.safetensors with {name}.json in {folder} is damaged or incomplete ({error})"
        ) from error


def keep_aside(folder: Path, name: str) -> str:
    """Rename name.safetensors and name.json to the first free name.kept-N; returns that name."""
    n = 1
    while any((folder / f"{name}.kept-{n}.{ending}").exists() for ending in ("safetensors", "json")):
        n += 1
    for ending in ("safetensors", "json"):
        path = folder / f"{name}.{ending}"
        if path.exists():
            os.replace(path, folder / f"{name}.kept-{n}.{ending}")
    return f"{name}.kept-{n}"


def reusable_stage(folder: Path, name: str, print_of: str, fresh: bool) -> Stage | None:
    """The saved stage if it is the one asked for; otherwise None, what was there kept aside, and a line saying so."""
    if not any((folder / f"{name}.{ending}").exists() for ending in ("safetensors", "json")):
        return None
    try:
        stage = read_stage(folder, name)
        reason = None if stage.record.get("fingerprint") == print_of else "it belongs to other settings, data or code"
    except InputError as error:
        stage, reason = None, str(error)
    if reason is None:
        if not fresh:
            print(f"{name}: reused, its settings and data did not change (--fresh retrains)")
            return stage
        return None
    print(f"{name}: retrained, because {reason}; the old one is kept as {keep_aside(folder, name)}")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Stages: train, or take what an earlier run saved
# ---------------------------------------------------------------------------------------------------------------------


def classifier_stage(settings: Settings, data: Data, folder: Path) -> tuple[Classifier, str]:
    """The classifier, and the SHA-256 of its weights."""
    names = ("hidden_units", "epochs_ffn", "batch_ffn", "lr_ffn", "weight_decay_ffn", "seed")
    code = (Classifier, train_classifier, batches, n_steps, scaled_epochs, ramp)
    device = data.train.labels.device
    print_of = fingerprint(settings, names, code, data=data.digest, device=device.type)
    stage = reusable_stage(folder, "classifier", print_of, settings.fresh)
    if stage is not None:
        return restored_classifier(stage.tensors).to(device), stage.digest
    model = train_classifier(data.train, settings)
    record = {"data": data.source, "settings": {name: getattr(settings, name) for name in names}}
    return model, save_stage(folder, "classifier", print_of, model.state_dict(), record)


def restored_classifier(tensors: dict[str, Tensor]) -> Classifier:
    hidden_units, n_pixels = tensors["hidden.weight"].shape
    model = Classifier(n_pixels, hidden_units, len(tensors["head.bias"]))
    model.load_state_dict(tensors)
    return model.requires_grad_(False).eval()


class TrainedSAE(NamedTuple):
    """An SAE before and after the adjustment of its thresholds, and what sae.json says about it."""

    before: JumpReLUSAE
    sae: JumpReLUSAE
    record: dict


COURSE_POINTS = 100  # how many points of the course are kept in sae.json


def sae_stage(
    settings: Settings, target: int, model: Classifier, model_digest: str, pre: Preactivations, data: Data, folder: Path
) -> TrainedSAE:
    """The SAE for one target, calibrated."""
    names = ("sae_latents", "epochs_sae_final", "batch_sae", "lr_sae", "head_kl", "normalize_z", "seed")
    code = (JumpReLUSAE, TrainingFrame, LambdaController, l0_target_at, initial_sae, soft_kl, rare_latents_loss)
    code += (train_sae, threshold_shift, adjust_thresholds, batches, n_steps, scaled_epochs, ramp)
    code += (collect_preactivations, standardised_head)
    method = [START_L0_FACTOR, L0_SETTLED_AT, START_THRESHOLD, HEAD_FROM, HEAD_TEMPERATURE]
    method += [RARE_DENSITY, RARE_COEFFICIENT, RARE_EVERY, RARE_AT_ONCE, FAIR_SHARE]
    device = pre.mu.device
    print_of = fingerprint(
        settings, names, code, target=target, method=method, model=model_digest, data=data.digest, device=device.type
    )
    stage = reusable_stage(folder, "sae", print_of, settings.fresh)
    if stage is None:
        z_train, z_val = ((raw - pre.mu) / pre.std for raw in (pre.train, pre.val))
        before, course = train_sae(z_train, standardised_head(model, pre), target, settings)
        sae, shift = adjust_thresholds(before, z_val, target)
        every = max(1, len(course.l0) // COURSE_POINTS)
        steps = list(range(every - 1, len(course.l0), every))
        kept = {name: values[steps].tolist() for name, values in course._asdict().items()}
        record = {
            "data": data.source,
            "target_actives": target,
            "classifier_sha256": model_digest,
            "settings": {name: getattr(settings, name) for name in names},
            "threshold_shift": shift if math.isfinite(shift) else None,
            "lambda": course.l0_coefficient[-1].item(),
            "course": {"step": steps, **kept},
        }
        tensors = {**sae.state_dict(), "threshold_before_shift": before.threshold, "mu": pre.mu, "std": pre.std}
        digest = save_stage(folder, "sae", print_of, tensors, record)
        stage = Stage(tensors, record, digest)
    sae = restored_sae(stage.tensors).to(device)
    before = copy.deepcopy(sae)
    before.threshold.copy_(stage.tensors["threshold_before_shift"])
    return TrainedSAE(before, sae, stage.record)


def restored_sae(tensors: dict[str, Tensor]) -> JumpReLUSAE:
    sae = JumpReLUSAE(*tensors["W_enc"].shape)
    sae.load_state_dict({name: tensors[name] for name in sae.state_dict()})
    return sae.requires_grad_(False)


def standardised_head(model: Classifier, pre: Preactivations) -> Callable[[Tensor], Tensor]:
    """The classifier's logits (B, C) as a function of standardised preactivations (B, d_in)."""
    return lambda z: model.logits_from_preactivations(torch.addcmul(pre.mu, z, pre.std))


class Run(NamedTuple):
    """A finished run, ready for a notebook."""

    model: Classifier
    sae: JumpReLUSAE
    mu: Tensor
    std: Tensor
    loaders: dict[str, TensorLoader]  # train, val, test
    settings: Settings
    data: Data


def load_run(folder: str, target: int | None = None, data_dir: str | None = None, device: str = "auto") -> Run:
    """What a run saved in `folder`: model, SAE, mu, std, loaders and settings.

    `target` chooses among several SAEs; `data_dir` says where the digits are now, if not where they were. Raises
    InputError when there is no such run, it is damaged, or the digits are others than those it was trained on.
    """
    root = Path(folder)
    try:
        stored = json.loads((root / "settings.json").read_bytes())
        settings = Settings(**{**stored["settings"], "target_actives": tuple(stored["settings"]["target_actives"])})
        source, digest = stored["data"], stored["data_digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{root} holds no finished run ({error}); run MNIST_SAE_code.py --out {root} first") from error
    targets = settings.target_actives
    if target is None and len(targets) == 1:
        target = targets[0]
    if target not in targets:
        raise InputError(f"{root} has SAEs for the targets {list(targets)}, not {target}; choose one of them")
    where = pick_device(device)
    data = load_mnist(data_dir or settings.data, settings.seed, where)
    if data.digest != digest:
        raise InputError(f"{root} was made with: {source}; found now: {data.source}. Give data_dir")
    classifier, sae = read_stage(root, "classifier"), read_stage(target_folder(root, settings, target), "sae")
    if (sae.record.get("classifier_sha256"), sae.record.get("target_actives")) != (classifier.digest, target):
        raise InputError(
            f"{root} holds an SAE of another classifier or target: a later run stopped half way; run it again"
        )
    tensors = sae.tensors
    return Run(
        restored_classifier(classifier.tensors).to(where),
        restored_sae(tensors).to(where),
        tensors["mu"].to(where),
        tensors["std"].to(where),
        {name: TensorLoader(getattr(data, name)) for name in ("train", "val", "test")},
        settings,
        data,
    )


def target_folder(root: Path, settings: Settings, target: int) -> Path:
    """Where the files of one target are: the run's folder, or a subfolder when there are several targets."""
    return root if len(settings.target_actives) == 1 else root / f"target_{target}"


# ---------------------------------------------------------------------------------------------------------------------
# Analysis: every feature, by the functions of feature_analysis.py
# ---------------------------------------------------------------------------------------------------------------------

INKED_SHARE = 0.01  # pixels inked in fewer of the training images are drawn grey: hardly any evidence about them


class Analysis(NamedTuple):
    """All that is known about the features; computed on the validation images, so that the test images stay unseen."""

    bank: fa.FeatureBank
    heats: Tensor  # (d_sae, 28, 28)
    logit: fa.LogitEffects
    ablation: fa.LogitEffects
    nearest: fa.NearestFeatures
    inked: np.ndarray  # (28, 28) bool


class Clock:
    """Seconds per stage. Where the device works asynchronously, a stage ends when its work does."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def analyse(
    model: Classifier, sae: JumpReLUSAE, pre: Preactivations, data: Data, settings: Settings, clock: Clock
) -> Analysis:
    """The five questions of feature_analysis.py, for all features at once."""
    loader, common = TensorLoader(data.val), (sae, pre.mu, pre.std)
    with clock("bank"):
        bank = fa.collect_feature_bank(model, loader, *common, topk=min(settings.topk, len(data.val.labels)))
    with clock("patterns"):
        heats = fa.feature_input_patterns(model, *common).cpu()
        inked = (data.train.images > 0).float().mean(0)[0] >= INKED_SHARE
    with clock("effects"):
        logit = fa.feature_logit_effects(model, loader, *common, alpha=settings.alpha, n_eval=settings.n_eval)
        ablation = fa.feature_ablation_effects(model, loader, *common, n_eval=settings.n_eval)
        nearest = fa.nearest_features(sae.W_dec)
    on_cpu = (fa.LogitEffects(*(tensor.cpu() for tensor in effects)) for effects in (logit, ablation))
    return Analysis(bank, heats, *on_cpu, nearest, inked.cpu().numpy())


def analysed_features(bank: fa.FeatureBank, limit: int) -> list[int]:
    """Features by falling activation rate, ties by number; the first `limit` of them, or all when it is 0."""
    order = torch.argsort(bank.n_active, descending=True, stable=True).tolist()
    return order[: limit or None]


TELLING = """features to look at first, at most one per digit. Those come first where one
label makes up more than half of the images; among them, whose removal costs that label's logit most."""


def telling_features(analysis: Analysis, features: Sequence[int], how_many: int = 5) -> list[int]:
    """Features that matter: the choice and its order are those that TELLING describes.

    A feature counts as pure only when at least 20 images fire it; one that never fires is not chosen.
    """
    histogram, active = analysis.bank.label_histogram, analysis.bank.n_active
    digit = histogram.argmax(1)
    pure = (histogram.amax(1) > active / 2) & (active >= 20)
    lost = -analysis.ablation.mean_delta.gather(1, digit[:, None])[:, 0]
    chosen: dict[int, int] = {}
    for k in sorted(features, key=lambda k: (not pure[k], -float(lost[k]), k)):
        if active[k]:
            chosen.setdefault(int(digit[k]), k)
    return list(chosen.values())[:how_many]


def feature_record(k: int, a: Analysis) -> dict:
    """One line of feature_report.json."""
    histogram, top = a.bank.label_histogram[k], a.bank.top.of(k)
    active = int(histogram.sum())
    return {
        "feature": k,
        "mean_active": float(a.bank.feature_density[k]),
        "mean_activation_when_active": float(a.bank.mean_activation_when_active[k]),
        "n_active": active,
        "label_histogram": histogram.tolist(),
        "label_mode_when_active": int(histogram.argmax()) if active else None,
        "top_examples": top.index.tolist(),
        "top_scores": top.activation.tolist(),
        "top_labels": top.label.tolist(),
        "logit_boost_class": int(a.logit.top_class[k]),
        "logit_delta_vector": a.logit.mean_delta[k].tolist(),
        "ablation_delta_vector": a.ablation.mean_delta[k].tolist(),
        "ablation_images": int(a.ablation.n_images[k]),
        "nearest_feature": int(a.nearest.feature[k]),
        "nearest_cosine": float(a.nearest.cosine[k]),
        "pattern_roughness": float(fa.pattern_roughness(a.heats[k : k + 1])[0]),
    }


def write_pictures(folder: Path, analysis: Analysis, features: Sequence[int], data: Data) -> None:
    """Gallery and pattern of each of `features`; the pictures of an earlier run go first."""
    for old in folder.iterdir():
        if re.fullmatch(r"feature_\d+_(gallery|pattern|panel)\.(png|npy)", old.name):
            old.unlink()
    bar = tqdm(features, "pictures", leave=False, disable=None)
    fa.write_feature_pictures(folder, bar, analysis.bank, data.val.images, analysis.heats, analysis.inked)


def write_panels(
    folder: Path, analysis: Analysis, features: Sequence[int], data: Data, captions: dict[int, str]
) -> None:
    """All about each of `features` on one page."""
    for k in features:
        effects = (analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k])
        path = folder / f"feature_{k}_panel.png"
        shown = (k, analysis.bank, data.val.images, analysis.heats[k], *effects)
        fa.show_feature_panel(*shown, path, analysis.inked, captions.get(k, ""))


class Diagnosis(NamedTuple):
    """One usual complaint about SAEs, measured."""

    complaint: str
    value: float
    limit: float
    what: str
    advice: str

    @property
    def fine(self) -> bool:
        return self.value <= self.limit


def diagnose(record: dict, analysis: Analysis, features: Sequence[int], seconds: dict[str, float]) -> list[Diagnosis]:
    """Five complaints, each with its number, the limit from which it deserves attention, and what to change."""
    roughness = fa.pattern_roughness(analysis.heats[features]).median().item()
    redundant = (analysis.nearest.cosine > 0.9).float().mean().item()
    of_all = seconds["bank"] + seconds["patterns"] + seconds["effects"]  # these always take in every feature
    slow = 1000 * (of_all / record["sae_latents"] + seconds["pictures"] / len(features))
    boolean_loss, dead = record["delta_acc_boolean_scaled"], record["dead_features"] / record["sae_latents"]
    rows = (
        ("noisy patterns", roughness, 0.5, "median roughness, 1 for white noise", "raise WEIGHT_DECAY_FFN"),
        ("redundant features", redundant, 0.05, "share with a neighbour above cosine 0.9", "lower SAE_LATENTS"),
        (
            "low boolean fidelity",
            boolean_loss,
            0.02,
            "accuracy lost when features are on or off",
            "compare several TARGET_ACTIVES",
        ),
        (
            "dead latents",
            dead,
            0.05,
            "share silent on all training images",
            "lower SAE_LATENTS or raise TARGET_ACTIVES",
        ),
        ("slow analysis", slow, 100.0, "milliseconds per feature, pictures included", "set FEATURES"),
    )
    return [Diagnosis(*row) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Hypotheses: proposed and frozen on the validation images, tested on the test images
# ---------------------------------------------------------------------------------------------------------------------

COMPARED = 256  # at most so many untrained features and random directions are put through the same tests
CHANCE = 128  # so many hypotheses are tested again in ways in which only chance can confirm them


def confirmation_splits(test: Split) -> tuple[Split, Split]:
    """The test images with even numbers, which judge, and those with odd numbers, set aside to check the judgement.

    Every other one, because the first and the second half of MNIST's test images were written by different people.
    """
    return Split(*(values[0::2] for values in test)), Split(*(values[1::2] for values in test))


class Tested(NamedTuple):
    """Hypotheses with all that is known about them, in the order of the features."""

    hypotheses: list[fa.Hypothesis]
    rule: fa.Rule
    evidence: list[fa.Evidence]
    judgements: list[fa.Judgement]
    held_aside: list[bool | None]  # whether they held on the images set aside; None: too few
    firing: list[list[int]]  # numbers of the test images that fire each feature most
    edited: list[tuple[list[int], list[int]]]  # numbers of the test images edited: some that fire it, some that do not
    returned: Tensor | None  # (d_sae,) in how many of the stability runs it returned
    record: dict  # for summary.json
    shares: dict[str, fa.Shares]  # of the SAE's features and of those it is compared with
    aurocs: dict[str, list[float]]


def freeze(model: Classifier, sae: JumpReLUSAE, pre: Preactivations, data: Data, folder: Path) -> str:
    """Propose from the validation images, write hypotheses.json; returns its SHA-256."""
    hypotheses = fa.propose_hypotheses(model, data.val.images, data.val.labels, sae, pre.mu, pre.std)
    return fa.freeze_hypotheses(hypotheses, folder / "hypotheses.json")


def refuse_changed_hypotheses(root: Path, settings: Settings, target: int) -> None:
    """Raise InputError when the hypotheses an earlier run froze are not those its summary.json recorded.

    Whoever edited them should not lose the edit, nor mistake it for something that was tested.
    """
    path = target_folder(root, settings, target) / "hypotheses.json"
    if settings.fresh or not path.exists() or not (root / "summary.json").exists():
        return
    try:
        records = json.loads((root / "summary.json").read_bytes())
        recorded = {r["target_actives"]: r.get("hypotheses_sha256") for r in records}.get(target)
    except (ValueError, KeyError, TypeError):
        return  # not a summary of ours: nothing was recorded
    if recorded is not None:
        try:
            fa.read_hypotheses(path, recorded)
        except ValueError as error:
            raise InputError(f"{error}; to start over, move the file away or give --fresh") from error


def compared_features(sae: JumpReLUSAE, pre: Preactivations, settings: Settings, target: int) -> dict[str, object]:
    """What the SAE's features are compared with. Firing rates are those of the SAE's features, or its L0."""
    z = (pre.val - pre.mu) / pre.std
    usage = feature_usage(sae, z)
    order = torch.argsort(usage.feature_density, stable=True)
    some = order[torch.linspace(0, len(order) - 1, min(COMPARED, len(order))).round().long()]  # of all firing rates
    density, mean_activation = usage.feature_density[some], usage.mean_activation[some]
    generator = torch.Generator(z.device).manual_seed(settings.seed)
    untrained = initial_sae(
        z[: 16 * settings.batch_sae], settings.sae_latents, l0_target_at(0, target, settings.sae_latents), generator
    )
    untrained, _ = adjust_thresholds(untrained.requires_grad_(False), z, target)
    n, ends = min(COMPARED, settings.sae_latents), slice(None, None, 2)  # both ends of half as many directions
    return {
        "untrained SAE": fa.LinearFeatures(
            untrained.W_enc[:, :n], untrained.b_enc[:n], untrained.W_dec[:n], untrained.threshold[:n]
        ),
        "random directions": fa.random_directions(z, density, mean_activation, settings.seed),
        "neurons": fa.neurons(pre.mu, pre.std),
        "principal directions": fa.principal_directions(z, density[ends], mean_activation[ends]),
    }


def compare(
    others: dict[str, object],
    model: Classifier,
    seen: Split,
    judging: Split,
    pre: Preactivations,
    rule: fa.Rule,
    seed: int,
) -> tuple[dict[str, fa.Shares], dict[str, list[float]]]:
    """The SAE's path, from proposals to shares explained, for other features: by name, the shares and the AUROCs."""
    shares, aurocs = {}, {}
    for name, features in others.items():
        given = (features, pre.mu, pre.std)
        claims = fa.propose_hypotheses(model, *seen, *given, rule)
        found = fa.test_hypotheses(claims, model, *judging, *given, n_bootstrap=0, seed=seed, rule=rule)
        shares[name] = fa.shares_explained(found, fa.judge_hypotheses(claims, found, rule), rule)
        aurocs[name] = both_aurocs(found)
    return shares, aurocs


def both_aurocs(evidence: Sequence[fa.Evidence]) -> list[float]:
    """AUROC of the statements on features that fire; 0 for one without a statement to predict by."""
    return [e.detected["both"].auroc if "both" in e.detected else 0.0 for e in evidence if e.fires]


def measure_chance(
    hypotheses: list[fa.Hypothesis],
    evidence: list[fa.Evidence],
    model: Classifier,
    sae: JumpReLUSAE,
    split: Split,
    activity: fa.Activity,
    pre: Preactivations,
    rule: fa.Rule,
    seed: int,
) -> dict[str, dict]:
    """Of statements that should not hold, the share that was confirmed, test by test and as a whole.

    They are judged among the real ones, so that the same p-values count as significant. Tests that do not depend on
    what was mixed up are left out.
    """
    claiming = [h for h, e in zip(hypotheses, evidence, strict=True) if e.detected]
    picked = torch.linspace(0, len(claiming) - 1, min(CHANCE, len(claiming))).round().int().tolist()
    some = [claiming[i] for i in picked]
    class_only = [h._replace(stroke=None, effect=None) for h in some if h.labels]
    mixed = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed)).to(split.labels.device)
    every_test = [test for tests in fa.TESTS_OF.values() for test in tests]
    by_chance = {
        "another feature's statement": (fa.swapped(some, activity.n_active), split.labels, activity, every_test),
        "activations shuffled": (some, split.labels, fa.shuffled(activity, seed), ["class", "stroke", "both"]),
        "labels permuted": (class_only, split.labels[mixed], activity, ["class"]),
    }
    chance = {}
    for name, (claims, labels, active, tests) in by_chance.items():
        common = (sae, pre.mu, pre.std, active)
        found = fa.test_hypotheses(claims, model, split.images, labels, *common, n_bootstrap=0, seed=seed, rule=rule)
        judged = fa.judge_hypotheses([*hypotheses, *claims], [*evidence, *found], rule)[len(hypotheses) :]
        verdicts = {test: [j.tests[test] for j in judged if test in j.tests] for test in tests}
        confirmed = {test: v.count(fa.CONFIRMED) / len(v) for test, v in verdicts.items() if v}
        whole = sum(j.verdict == fa.CONFIRMED for j in judged) / max(1, len(judged))
        chance[name] = {"statements": len(judged), "confirmed": whole, "by_test": confirmed}
    return chance


def confidence_check(judgements: Sequence[fa.Judgement], held_aside: Sequence[bool | None]) -> dict[str, dict]:
    """Of the statements of each confidence, the share that held on the images set aside."""
    check = {}
    for confidence in ("High", "Medium", "Low"):
        pairs = zip(judgements, held_aside, strict=True)
        held = [h for j, h in pairs if j.confidence == confidence and j.verdict != fa.NONE]
        seen = [h for h in held if h is not None]
        check[confidence] = {
            "statements": len(held),
            "checked": len(seen),
            "held": sum(seen) / len(seen) if seen else None,
        }
    return check


def test_statements(
    settings: Settings,
    target: int,
    model: Classifier,
    sae: JumpReLUSAE,
    pre: Preactivations,
    data: Data,
    folder: Path,
    sha256: str,
    others: Sequence[JumpReLUSAE],
) -> Tested:
    """Test what was frozen, judge it, measure chance and the comparisons. `others` are the SAEs of the stability runs.

    Raises InputError when hypotheses.json is not the file that was frozen.
    """
    try:
        hypotheses, rule = fa.read_hypotheses(folder / "hypotheses.json", sha256)
    except ValueError as error:
        raise InputError(str(error)) from error
    judging, aside = confirmation_splits(data.test)
    common, seed = (pre.mu, pre.std), settings.seed
    activity = fa.collect_activity(model, *judging, sae, *common)
    evidence = fa.test_hypotheses(hypotheses, model, *judging, sae, *common, activity, seed=seed, rule=rule)
    judgements = fa.judge_hypotheses(hypotheses, evidence, rule)
    returned = None
    if others:
        returned = sum(
            fa.match_features(model, data.val.images, sae, other, *common).returned.long() for other in others
        )
        judgements = fa.with_stability(judgements, returned, len(others))
    again = fa.test_hypotheses(hypotheses, model, *aside, sae, *common, n_bootstrap=0, seed=seed + 1, rule=rule)
    held_aside = [fa.held(e, rule) for e in again]
    shares, aurocs = compare(compared_features(sae, pre, settings, target), model, data.val, judging, pre, rule, seed)
    shares = {"SAE": fa.shares_explained(evidence, judgements, rule), **shares}
    aurocs = {"SAE": both_aurocs(evidence), **aurocs}
    firing, edited = [], []  # by their numbers among all test images
    for h in hypotheses:
        at, acts = activity.of(h.feature)
        strongest = torch.argsort(acts, descending=True, stable=True)[:10]
        firing.append((2 * at[strongest]).tolist())
        edited.append(tuple((2 * images).tolist() for images in fa.edited_images(activity, h.feature)))
    record = {
        "sha256": sha256,
        "rule": rule._asdict(),
        "confidence_rule": " ".join(fa.CONFIDENCE_RULE.split()),
        "shares": {name: s._asdict() for name, s in shares.items()},
        "confidence": confidence_check(judgements, held_aside),
        "chance": measure_chance(hypotheses, evidence, model, sae, judging, activity, pre, rule, seed),
    }
    if returned is not None:
        fires = activity.n_active > 0
        share = float((2 * returned >= len(others))[fires].float().mean()) if fires.any() else None
        record["stability"] = {"runs": len(others), "returned_in_half_of_them": share}
    return Tested(hypotheses, rule, evidence, judgements, held_aside, firing, edited, returned, record, shares, aurocs)


def statement_record(k: int, t: Tested) -> dict:
    """What feature_report.json says about the statement on feature k."""
    h, e, j = t.hypotheses[k], t.evidence[k], t.judgements[k]
    detected = {part: d._asdict() for part, d in e.detected.items()}
    tests = {name: getattr(e, name) for name in ("erasing", "painting", "effect")}
    return {
        "statement": fa.statement(h),
        "confidence": j.confidence,
        "verdict": j.verdict,
        "measured": fa.measured_lines(h, e, j, t.rule),
        "hypothesis": fa.hypothesis_record(h),
        "evidence": {
            "text": fa.evidence_line(h, e),
            "n_active": e.n_active,
            "n_images": e.n_images,
            "detected": detected,
            **{name: None if test is None else {**test._asdict(), "p": test.p} for name, test in tests.items()},
            "verdicts": {"tests": j.tests, "parts": j.parts},
            "held_aside": t.held_aside[k],
            "test_images": t.firing[k],
            "edited_images": {"firing": t.edited[k][0], "silent": t.edited[k][1]} if e.erasing else None,
        },
        **({} if t.returned is None else {"returned_in_runs": int(t.returned[k])}),
    }


HOW_TESTED = """Each statement was made from {discovery:,} validation images and frozen before it was tested, once, on
the {judging:,} test images with even numbers. The {aside:,} with odd numbers were set aside to see whether
confidence is deserved. SHA-256 of hypotheses.json: `{sha256}`.

- Labels and strokes predict where the feature fires: AUROC {class_auroc} is asked of the labels, {stroke_auroc} of
the strokes, {both_auroc} of the statement as a whole.
- Erasing: on images that fire it, the ink in the places named is removed, and as much ink elsewhere. Painting: on
images that do not, the places named are inked and those named empty are cleared, and as much elsewhere. What is named
must turn the feature off or on {times_elsewhere:g} times as often as what is not, and on {edit_share:.0%} of the
images at least. (That a place must be empty is tested by prediction and by clearing it.)
- The images edited are in feature_report.json (`edited_images`); `#316` is `run.data.test.images[316]`.
- Effect: removing the feature must move each logit named by {effect_share:.0%} of what was predicted, further than as
much of a random direction does, and each larger dose must move it further.

A test is confirmed when its value reaches the bar and it is significant among all tests of all features at a false
discovery rate of {false_discovery_rate}; refuted when its 95% interval stays below the bar; otherwise inconclusive.
One refuted test refutes the statement, and all must be confirmed to confirm it. Fewer than {min_active} images that
fire a feature, or do not, are too few to judge it.

{confidence}
"""
TRAINING_ADDED = """Of the features that fire on at least one in a thousand test images. A statement can be true of a
random direction, too: that it predicts does not say that training found anything. The more images fire a feature, the
easier its tests are: random and principal directions fire as often as the SAE's features do, an untrained SAE fires
evenly, and neurons fire often."""
CHANCE_WORDS = """Statements that should not hold, judged among the real ones: those of another feature of like firing
rate (which may share a label or an effect with this one, so that single tests can be right), those about activations
shuffled over images, and the class parts with labels permuted."""


def summary_lines(t: Tested, n_aside: int) -> list[str]:
    """How the statements were tested, and how they did as a whole."""
    told = {"discovery": t.hypotheses[0].n_images, "judging": t.evidence[0].n_images, "aside": n_aside}
    words = HOW_TESTED.format(**told, sha256=t.record["sha256"], confidence=fa.CONFIDENCE_RULE, **t.rule._asdict())
    lines = [words, "## Do they hold?", "", "| confidence | statements | seen again | held |", "|---|---|---|---|"]
    for name, c in t.record["confidence"].items():
        held = "none seen" if c["held"] is None else f"{c['held']:.0%}"
        lines.append(f"| {name} | {c['statements']} | {c['checked']} | {held} |")
    lines += ["", "## What did training add?", "", TRAINING_ADDED, "", *fa.shares_lines(t.shares), ""]
    lines += ["## What does chance give?", "", CHANCE_WORDS, ""]
    for name, c in t.record["chance"].items():
        tests = ", ".join(f"{test} {share:.1%}" for test, share in c["by_test"].items())
        lines.append(f"- {name}: {c['confirmed']:.1%} of {c['statements']} statements as a whole; {tests}")
    return lines


def statements_markdown(t: Tested, n_aside: int, title: str) -> str:
    """hypotheses.md: the summary, then every feature, best first."""
    lines = [f"# What the features mean: {title}", "", *summary_lines(t, n_aside), ""]
    lines += ["## Feature by feature, best first", ""]
    for i in fa.best_first(t.judgements, t.evidence):
        h, back = t.hypotheses[i], ""
        if t.returned is not None:
            back = f"; returned in {int(t.returned[h.feature])} of {t.record['stability']['runs']} runs"
        lines += fa.feature_lines(h, t.evidence[i], t.judgements[i], t.held_aside[i], t.firing[i], t.rule, back)
    return "\n".join(lines)


def stability_saes(
    settings: Settings, target: int, model: Classifier, model_digest: str, pre: Preactivations, data: Data, folder: Path
) -> list[JumpReLUSAE]:
    """SAEs of the same classifier from other seeds, saved in subfolders so that they are not trained twice."""
    saes = []
    for seed in range(settings.seed + 1, settings.seed + 1 + settings.stability_seeds):
        where = folder / f"stability_seed_{seed}"
        prepare_folder(where)
        saes.append(sae_stage(replace(settings, seed=seed), target, model, model_digest, pre, data, where).sae)
    return saes


# ---------------------------------------------------------------------------------------------------------------------
# What the terminal shows
# ---------------------------------------------------------------------------------------------------------------------


def feature_block(record: dict, n_images: int) -> str:
    """The lines a reader expects for one feature."""
    histogram, active = record["label_histogram"], record["n_active"]
    common = sorted(range(len(histogram)), key=lambda c: (-histogram[c], c))[:4]
    shares = ", ".join(f"{c}: {100 * histogram[c] / active:.0f}%" for c in common if histogram[c])
    boost = record["logit_boost_class"]
    examples = ", ".join(
        f"#{i} ({score:.2f})" for i, score in zip(record["top_examples"][:5], record["top_scores"][:5], strict=True)
    )
    return "\n".join(
        [
            f"Feature {record['feature']}",
            f"  mean active      {record['mean_active']:.4f} ({active:,} of {n_images:,} validation images)",
            f"  label histogram  {shares}",
            f"  boosts class     {boost} by {record['logit_delta_vector'][boost]:+.3f} when added",
            f"  when removed     class {boost} changes by {record['ablation_delta_vector'][boost]:+.3f}",
            f"  top examples     {examples}",
            *statement_block(record),
        ]
    )


def statement_block(record: dict) -> list[str]:
    """The hypothesis of a feature, if there is one."""
    if "statement" not in record:
        return []
    return [
        f'  hypothesis       "{record["statement"]}"',
        f"  evidence         {record['evidence']['text']}",
        f"  confidence       {record['confidence']} ({record['verdict']})",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def statements_table(tested: Tested) -> str:
    """How the statements did, beside those about untrained features; and what their confidence is worth."""
    rows = [["share of features that fire", *tested.shares]]
    for title, key in (
        ("all three parts confirmed", "explained"),
        ("  class", "class_confirmed"),
        ("  stroke", "stroke_confirmed"),
        ("  effect", "effect_confirmed"),
        ("predicted on unseen images", "predicted"),
    ):
        rows.append([title, *(f"{getattr(s, key):.1%}" for s in tested.shares.values())])
    held = [["confidence", "statements", "held on images set aside"]]
    for name, c in tested.record["confidence"].items():
        share = "none seen" if c["held"] is None else f"{c['held']:.1%} of {c['checked']}"
        held.append([name, str(c["statements"]), share])
    return table(rows) + "\n\n" + table(held)


def diagnoses_table(diagnoses: Sequence[Diagnosis]) -> str:
    rows = [("complaint", "measured", "limit", "verdict")]
    for d in diagnoses:
        rows.append((d.complaint, f"{d.value:.3g}", f"{d.limit:g}", "fine" if d.fine else f"attention: {d.advice}"))
    return table(rows)


def seconds_table(records: Sequence[dict]) -> str:
    """One column per target; what they share stands in each."""
    rows = [["seconds", *(str(r["target_actives"]) for r in records)]]
    for stage in records[0]["seconds"]:
        rows.append([stage, *(f"{r['seconds'][stage]:.2f}" for r in records)])
    return table(rows)


def results_table(records: Sequence[dict]) -> str:
    """One column per target."""
    rows = [["target", *(str(r["target_actives"]) for r in records)]]
    for title, key, form in (
        ("active before shift", "achieved_actives_before_shift", "{:.2f}"),
        ("active, validation", "achieved_actives_val", "{:.4f}"),
        ("active, test", "achieved_actives_test", "{:.2f}"),
        ("lambda", "lambda", "{:.4f}"),
        ("threshold shift", "threshold_shift", "{:+.5f}"),
        ("accuracy, classifier", "baseline_acc", "{:.2%}"),
        ("accuracy through SAE", "recon_acc_jumprelu", "{:.2%}"),
        ("  boolean", "recon_acc_boolean", "{:.2%}"),
        ("  boolean, scaled", "recon_acc_boolean_scaled", "{:.2%}"),
        ("agreement", "agreement_jumprelu", "{:.2%}"),
        ("FVU", "fvu", "{:.4f}"),
        ("cross entropy recovered", "ce_recovered", "{:.4f}"),
        ("KL", "kl", "{:.5f}"),
        ("dead features", "dead_features", "{}"),
        ("dense features", "dense_features", "{}"),
    ):
        rows.append([title, *(form.format(math.nan if r[key] is None else r[key]) for r in records)])
    return table(rows)


def draw_frontier(records: Sequence[dict], path: Path) -> None:
    """Sparsity against fidelity, one point per target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    records = sorted(records, key=lambda r: r["achieved_actives_test"])
    l0 = [r["achieved_actives_test"] for r in records]
    figure.suptitle("What the classifier loses when it must think through fewer features")
    charts = (("fvu", "share of variance unexplained (FVU)"), ("agreement_jumprelu", "share of predictions kept"))
    for axes, (key, title) in zip(figure.subplots(1, 2), charts, strict=True):
        axes.plot(l0, [r[key] for r in records], "o-", color="#2166ac")
        axes.set_xscale("log")
        axes.set_xticks(l0, [f"{r['target_actives']}" for r in records])
        axes.minorticks_off()
        axes.set_xlabel("active features per image")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    fa.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, np, matplotlib, safetensors)},
    }


class Prepared(NamedTuple):
    """One target after everything that needs no test image."""

    target: int
    folder: Path
    trained: TrainedSAE
    analysis: Analysis
    frozen: dict[str, str]  # the SHA-256 of hypotheses.json, if there are hypotheses
    clock: Clock


def prepare_target(
    settings: Settings, target: int, model: Classifier, model_digest: str, pre: Preactivations, data: Data, folder: Path
) -> Prepared:
    """Train the SAE of one target, analyse its features, state and freeze what they mean."""
    clock, frozen = Clock(), {}
    with clock("sae"):
        trained = sae_stage(settings, target, model, model_digest, pre, data, folder)
    analysis = analyse(model, trained.sae, pre, data, settings, clock)
    for name in ("hypotheses.json", "hypotheses.md", "explained.png"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    if settings.hypotheses:
        with clock("propose and freeze"):
            frozen = {"hypotheses_sha256": freeze(model, trained.sae, pre, data, folder)}
    return Prepared(target, folder, trained, analysis, frozen, clock)


def finish_target(
    settings: Settings, p: Prepared, model: Classifier, model_digest: str, pre: Preactivations, data: Data
) -> tuple[dict, list[dict]]:
    """Test and measure on the test images, write the files of the target; returns its record of summary.json and the
    records of feature_report.json."""
    clock, folder, sae, tested = p.clock, p.folder, p.trained.sae, None
    if p.frozen:
        with clock("stability"):
            others = stability_saes(settings, p.target, model, model_digest, pre, data, folder)
        with clock("test and judge"):
            digest = p.frozen["hypotheses_sha256"]
            tested = test_statements(settings, p.target, model, sae, pre, data, folder, digest, others)
    with clock("fidelity"):
        measured = measure(p.trained.before, sae, pre, data, standardised_head(model, pre))
    record = {
        "target_actives": p.target,
        "lambda": p.trained.record["lambda"],
        "threshold_shift": p.trained.record["threshold_shift"],
        **measured,
        "sae_latents": settings.sae_latents,
        "normalize_z": settings.normalize_z,
        "seed": settings.seed,
        "data": data.source,
        "device": str(pre.mu.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **p.frozen,
    }
    features = analysed_features(p.analysis.bank, settings.features)
    telling = telling_features(p.analysis, features)
    report = [{**feature_record(k, p.analysis), **(statement_record(k, tested) if tested else {})} for k in features]
    fa.write_whole(folder / "feature_report.json", to_json(report))
    if tested:
        record["hypotheses"] = tested.record
        write_statements(tested, data, p.target, folder)
    with clock("pictures"):
        write_pictures(folder, p.analysis, features, data)
    by_feature = {entry["feature"]: entry for entry in report}
    captions = {k: "\n".join(line.strip() for line in statement_block(by_feature[k])) for k in telling}
    with clock("panels"):
        write_panels(folder, p.analysis, telling, data, captions)
    diagnoses = diagnose(record, p.analysis, features, clock.seconds)
    print(f"\nTarget {p.target}: {TELLING}\n")
    for k in telling:
        print(feature_block(by_feature[k], len(data.val.labels)), end="\n\n")
    if tested:
        print(statements_table(tested), end="\n\n")
    print(diagnoses_table(diagnoses))
    record["diagnoses"] = [{**d._asdict(), "fine": d.fine} for d in diagnoses]
    record["telling_features"] = telling
    record["seconds"] = clock.seconds
    return record, report


def write_page(
    p: Prepared,
    record: dict,
    report: list[dict],
    records: Sequence[dict],
    model: Classifier,
    pre: Preactivations,
    data: Data,
) -> None:
    """feature_report.html of one target; `records` are those of all targets, for the frontier."""
    sae, given = p.trained.sae, (p.trained.sae, pre.mu, pre.std)
    first_layer = model.hidden.bias - model.hidden.weight @ model.pixel_mean  # the page knows no mean image
    network = fa.Network(model.hidden.weight, first_layer, model.head.weight, model.head.bias)
    results = [
        ("accuracy of the network", f"{record['baseline_acc']:.2%}"),
        ("accuracy through the SAE", f"{record['recon_acc_jumprelu']:.2%}"),
        ("predictions kept through the SAE", f"{record['agreement_jumprelu']:.2%}"),
        ("share of variance it leaves out (FVU)", f"{record['fvu']:.4f}"),
        ("features active per image (L0)", f"{record['achieved_actives_test']:.2f}"),
        ("features that never fire", str(record["dead_features"])),
        ("seconds to train the SAE", f"{record['seconds']['sae']:.1f}"),
    ]
    if "hypotheses" in record:
        explained = record["hypotheses"]["shares"]["SAE"]["explained"]
        results.insert(4, ("features explained in all parts", f"{explained:.0%}"))
    keys = {"l0": "achieved_actives_test", "fvu": "fvu", "agreement": "agreement_jumprelu"}
    fa.write_dashboard(
        p.folder / "feature_report.html",
        report,
        p.analysis.bank,
        fa.collect_activity(model, *data.val, *given),
        data.val.images,
        p.analysis.heats,
        *given,
        inked=p.analysis.inked,
        title=f"{len(sae.threshold)} features of a digit classifier, target {p.target} ({data.source})",
        results=results,
        diagnoses=record["diagnoses"],
        frontier=[{name: r[key] for name, key in keys.items()} for r in records],
        network=network,
        tests=(data.test.images[:PAGE_TESTS], data.test.labels[:PAGE_TESTS]),
    )


PAGE_TESTS = 60  # test images that the page offers


def write_statements(tested: Tested, data: Data, target: int, folder: Path) -> None:
    """hypotheses.md and explained.png."""
    title = f"{len(tested.hypotheses)} features at target {target} ({data.source})"
    text = statements_markdown(tested, len(confirmation_splits(data.test)[1].labels), title)
    fa.write_whole(folder / "hypotheses.md", text.encode())
    fa.save_figure(fa.draw_explained(tested.aurocs, tested.shares, tested.rule.both_auroc), folder / "explained.png")


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """The whole run; returns the records of summary.json. Raises InputError or TrainingError."""
    clock = Clock()
    clock.seconds["imports"] = time.perf_counter() - STARTED
    settings = parse_settings(argv)
    device = pick_device(settings.device)
    root = Path(settings.out)
    for target in settings.target_actives:
        prepare_folder(target_folder(root, settings, target))
        refuse_changed_hypotheses(root, settings, target)
    with clock("data"):
        data = load_mnist(settings.data, settings.seed, device)
    sizes = " / ".join(f"{len(split.labels):,}" for split in data[:3])
    print(f"data: {data.source}; {sizes} train, validation, test; device {device}, seed {settings.seed}")
    with clock("classifier"):
        model, model_digest = classifier_stage(settings, data, root)
    with clock("preactivations"):
        pre = collect_preactivations(model, data, settings.normalize_z)
    prepared = []
    for target in settings.target_actives:
        folder = target_folder(root, settings, target)
        prepared.append(prepare_target(settings, target, model, model_digest, pre, data, folder))
        if settings.hypotheses:  # on record before anything is measured on a test image
            fa.write_whole(root / "summary.json", to_json([{"target_actives": p.target, **p.frozen} for p in prepared]))
    records, reports = [], []
    for p in prepared:
        record, report = finish_target(settings, p, model, model_digest, pre, data)
        record["seconds"] = {**clock.seconds, **record["seconds"]}
        records.append(record)
        reports.append(report)
    for p, record, report in zip(prepared, records, reports, strict=True):
        with p.clock("page"):
            write_page(p, record, report, records, model, pre, data)
        record["seconds"]["page"] = p.clock.seconds["page"]
    kept = {name: value for name, value in asdict(settings).items() if name != "fresh"}
    described = {"settings": kept, "data": data.source, "data_digest": data.digest}
    fa.write_whole(root / "settings.json", to_json(described))
    if len(records) > 1:
        draw_frontier(records, root / "frontier.png")
    total = time.perf_counter() - STARTED
    for record in records:
        record["seconds"]["whole run"] = total
    fa.write_whole(root / "summary.json", to_json(records))
    print("\n" + results_table(records))
    print("\n" + seconds_table(records))
    print(places_to_look(root, settings, records))
    return records


def places_to_look(root: Path, settings: Settings, records: Sequence[dict]) -> str:
    """The last lines of a run."""
    lines = ["\nWhere to look next"]
    for record in records:
        folder = target_folder(root, settings, record["target_actives"])
        panels = [folder / f"feature_{k}_panel.png" for k in record["telling_features"]]
        lines.append(f"  {panels[0] if panels else folder}   one feature on one page ({len(panels)} such pages)")
        lines.append(f"  {folder / 'feature_report.html'}   a page to open: meet the features, draw your own digit")
        if settings.hypotheses:
            lines.append(f"  {folder / 'hypotheses.md'}   what each feature means, tested, best first")
        lines.append(f"  {folder / 'feature_report.json'}   every feature as a table (pandas.read_json)")
    if len(records) > 1:
        lines.append(f"  {root / 'frontier.png'}   sparsity against fidelity")
    lines.append(f"  {root / 'summary.json'}   all the numbers above, with the diagnoses")
    return "\n".join(lines)


def run_script() -> int:
    """main, with the errors a user can cause as one line on stderr and exit status 2."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's matrix products repeat themselves only then
    torch.use_deterministic_algorithms(True)
    try:
        main()
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, torch.OutOfMemoryError):
        print("error: out of memory; lower --sae-latents, --hidden-units or --batch-sae", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has had enough
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'a file'} could not be written or read ({error.strerror})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; finished stages are saved and will be reused", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_script())
