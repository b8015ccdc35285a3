"""What does the network lose when the SAE's reconstruction takes the activations' place?

    record = measure_fidelity(layer, target=20)  # accuracy, agreement, cross entropy, FVU, L0, ...

Takes an `ExplainedLayer` with its SAE and the splits "train", "val" and "test"; gives plain
numbers, measured on the test images, with those of as many principal components to compare. It
draws and writes nothing.

Dimension key: N images, d_in units of the layer, d_sae features. z are standardized activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import feature_analysis as fa

MODES = ("jumprelu", "boolean", "boolean_scaled")  # ways to count an active feature
DENSE_FROM = 0.1  # a feature that is active on a larger share of the images is dense
RARE_BELOW = 0.001  # share of images below which a feature is rare
EVAL_ROWS = 4096  # rows encoded at once: bounds the memory
EVAL_ENTRIES = 2**21  # activations at once: larger arrays are slow to allocate


def row_chunks(sae, z: Tensor) -> tuple[Tensor, ...]:
    """z (N, d_in) in pieces of EVAL_ROWS rows, or fewer for an SAE with many latents."""
    return z.split(max(1, min(EVAL_ROWS, EVAL_ENTRIES // sae.W_enc.shape[1])))


class FeatureStats(NamedTuple):
    """How often and how strongly features are active on some images, (d_sae,) each."""

    feature_density: Tensor  # share of images on which a feature is active
    mean_activation: Tensor  # where the feature is active; 0 for one that never is


@torch.no_grad()
def feature_stats(sae, z: Tensor) -> FeatureStats:
    """Density and mean activation of each feature over z (N, d_in)."""
    d_sae = sae.W_enc.shape[1]
    counts = torch.zeros(d_sae, dtype=torch.int64, device=z.device)
    sums = torch.zeros(d_sae, dtype=torch.float64, device=z.device)  # float32 loses digits
    for chunk in row_chunks(sae, z):
        feature_acts = sae.encode(chunk)
        counts += (feature_acts > 0).sum(0)
        sums += feature_acts.sum(0, dtype=torch.float64)
    return FeatureStats(counts / len(z), (sums / counts.clamp(min=1)).float())


@torch.no_grad()
def l0_per_image(sae, z: Tensor) -> Tensor:
    """(N,) float64, the number of active features on each row of z (N, d_in)."""
    return torch.cat([(sae.encode(chunk) > 0).sum(1) for chunk in row_chunks(sae, z)]).double()


def mean_l0(sae, z: Tensor) -> float:
    """Mean number of active features over z (N, d_in)."""
    return int(l0_per_image(sae, z).sum()) / len(z)


@torch.no_grad()
def reconstruct(sae, z: Tensor, mode: str, mean_activation: Tensor) -> Tensor:
    """The SAE's reconstruction (N, d_in) of z (N, d_in).

    Mode `jumprelu` decodes the activations as they are, `boolean` 1 for each active feature,
    `boolean_scaled` the feature's mean activation, of `mean_activation` (d_sae,).
    """
    parts = []
    for chunk in row_chunks(sae, z):
        feature_acts = sae.encode(chunk)
        if mode != "jumprelu":
            feature_acts = (feature_acts > 0).float()
        if mode == "boolean_scaled":
            feature_acts = feature_acts * mean_activation
        parts.append(sae.decode(feature_acts))
    return torch.cat(parts)


class Fidelity(NamedTuple):
    """The network with a reconstruction spliced in. Cross entropies are in nats."""

    accuracy: float
    agreement: float  # share of images on which the prediction stays the network's own
    cross_entropy: float
    ce_recovered: float | None  # 1: as without the SAE, 0: as mean ablation; None: those are equal
    kl: float  # mean KL(network || network with the reconstruction)
    fvu: float  # sum ||z - z_hat||^2 / sum ||z - mean(z)||^2, the mean over these same images


@torch.no_grad()
def fidelity(
    layer: fa.ExplainedLayer, z: Tensor, z_hat: Tensor, labels: Tensor, z_mean: Tensor
) -> Fidelity:
    """Fidelity of the network with z_hat (N, d_in) in place of z (N, d_in).

    ce_recovered = (CE(mean) - CE(z_hat)) / (CE(mean) - CE(z)), as in Bricken et al. 2023, where
    mean ablation puts `z_mean` (d_in,) in place of z.
    """
    logits, logits_hat = layer.logits_of_z(z), layer.logits_of_z(z_hat)
    logits_mean = layer.logits_of_z(z_mean[None]).expand_as(logits)
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


def pca_reconstruction(z_train: Tensor, z: Tensor, n: int) -> Tensor:
    """z (N, d_in) projected on the n strongest principal directions of z_train, about its mean: the
    simplest alternative to an SAE with n active features."""
    center = z_train.mean(0)
    centered = z_train - center
    _, basis = torch.linalg.eigh(centered.T @ centered)
    strongest = basis[:, -n:]  # eigenvalues ascend
    return center + (z - center) @ strongest @ strongest.T


def _ratio(value: float, other: float, meaningful: bool = True) -> float | None:
    """value / other; None where other is 0 or the ratio is not meaningful."""
    return value / other if meaningful and other else None


@torch.no_grad()
def measure_fidelity(layer: fa.ExplainedLayer, target: int | None = None) -> dict:
    """The fidelity part of a record of summary.json, measured on the split "test".

    The SAE is compared with `target` principal components, by default as many as features are
    active on average. Densities are those of the training images.
    """
    sae, splits = layer.sae, layer.splits
    z_train, z_val, z = (layer.standardize(splits[name].raw) for name in ("train", "val", "test"))
    labels = splits["test"].labels.to(z.device)
    stats, z_mean, l0 = feature_stats(sae, z_train), z_train.mean(0), l0_per_image(sae, z)
    target = target or max(1, round(l0.mean().item()))

    spliced = {}  # Fidelity by mode
    for mode in MODES:
        z_hat = reconstruct(sae, z, mode, stats.mean_activation)
        spliced[mode] = fidelity(layer, z, z_hat, labels, z_mean)
    own = fidelity(layer, z, z, labels, z_mean)
    pca = fidelity(layer, z, pca_reconstruction(z_train, z, target), labels, z_mean)
    jump, density = spliced["jumprelu"], stats.feature_density
    dense, total = density > DENSE_FROM, density.sum()
    few = target < z.shape[1]  # as many components as units leave nothing but rounding errors
    return {
        "achieved_actives_val": mean_l0(sae, z_val),
        "achieved_actives_test": l0.mean().item(),
        "l0_std_test": l0.std().item(),
        "baseline_acc": own.accuracy,
        "baseline_ce": own.cross_entropy,
        **{f"recon_acc_{mode}": spliced[mode].accuracy for mode in MODES},
        **{f"delta_acc_{mode}": own.accuracy - spliced[mode].accuracy for mode in MODES},
        **{f"agreement_{mode}": spliced[mode].agreement for mode in MODES},
        "fvu": jump.fvu,
        "ce": jump.cross_entropy,
        "ce_recovered": jump.ce_recovered,
        "kl": jump.kl,
        "dead_features": int((density == 0).sum()),
        "fvu_pca": pca.fvu,
        "agreement_pca": pca.agreement,
        "fvu_to_pca": _ratio(jump.fvu, pca.fvu, few),
        "disagreement_to_pca": _ratio(1 - jump.agreement, 1 - pca.agreement, few),
        "dense_features": int(dense.sum()),
        "dense_share_of_l0": (density[dense].sum() / total).item() if total else None,
        "rare_features": int((density < RARE_BELOW).sum()),
    }
