"""What does the network lose when the SAE's reconstruction takes the activations' place?

    record = measure_fidelity(layer, target=20)  # accuracy, agreement, cross entropy, FVU, L0, ...

Takes an `ExplainedLayer` with its SAE and the splits "train", "val" and "test"; gives plain
numbers, measured on the test images, with those of as many principal components to compare. It
draws and writes nothing.

Dimension key: N images or rows, d_in units of the layer, d_sae features. z are standardized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
STATS_ROWS = 2**18  # rows over which densities are counted, of layers with positions


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
def l0_per_row(sae, z: Tensor) -> Tensor:
    """(N,) float64, the number of active features on each row of z (N, d_in)."""
    return torch.cat([(sae.encode(chunk) > 0).sum(1) for chunk in row_chunks(sae, z)]).double()


def mean_l0(sae, z: Tensor) -> float:
    """Mean number of active features over z (N, d_in)."""
    return int(l0_per_row(sae, z).sum()) / len(z)


def raw_rows(layer: fa.ExplainedLayer, name: str) -> Tensor:
    """The layer's output (n, d_in) of a split, one row for each position kept of each image; of a
    layer with positions at most STATS_ROWS, evenly spaced."""
    rows = fa.values_of(layer.splits[name].raw).flatten(0, -2)
    if layer.has_positions and len(rows) > STATS_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, STATS_ROWS).round().long()]
    return rows


def rows_of(layer: fa.ExplainedLayer, name: str) -> Tensor:
    """`raw_rows`, standardized."""
    return layer.standardize(raw_rows(layer, name))


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
    fvu: float  # sum ||z - z_hat||^2 / sum ||z - mean(z)||^2, the mean over these same rows


class Spliced(NamedTuple):
    """The network with something in place of a layer's output."""

    logits: Tensor  # (N, C)
    squared_error: float  # sum ||z - z_hat||^2 over all rows


@torch.no_grad()
def splice(
    layer: fa.ExplainedLayer, raw: fa.Rows, reconstruct: Callable[[Tensor], Tensor]
) -> Spliced:
    """The network with reconstruct(z), z (n, d_in), in place of z at all positions of raw."""
    logits, squared_error = [], 0.0
    for some in raw.split(max(1, EVAL_ENTRIES // (len(layer.mu) * some_positions(layer)))):
        z = layer.standardize(some)
        z_hat = reconstruct(z.flatten(0, -2)).view_as(z)
        squared_error += (z - z_hat).square().sum(dtype=torch.float64).item()
        logits.append(layer.logits(layer.from_z(z_hat, some)))
    return Spliced(torch.cat(logits), squared_error)


def some_positions(layer: fa.ExplainedLayer) -> int:
    """Positions of an image; 1 for a vector layer."""
    return layer.positions.n if layer.has_positions else 1


def fidelity(
    own: Tensor, spliced: Spliced, mean_ablated: Tensor, labels: Tensor, total: float
) -> Fidelity:
    """Fidelity of the network with a reconstruction spliced in.

    ce_recovered = (CE(mean) - CE(z_hat)) / (CE(mean) - CE(z)), as in Bricken et al. 2023. `own` and
    `mean_ablated` (N, C) are the logits without it, and with the mean in place of all; `total` is
    sum ||z - mean(z)||^2.
    """
    logits_hat = spliced.logits
    ce, ce_hat, ce_mean = (
        F.cross_entropy(x, labels).item() for x in (own, logits_hat, mean_ablated)
    )
    log_p, log_q = F.log_softmax(own, 1), F.log_softmax(logits_hat, 1)
    predicted = logits_hat.argmax(1)
    return Fidelity(
        accuracy=(predicted == labels).double().mean().item(),
        agreement=(predicted == own.argmax(1)).double().mean().item(),
        cross_entropy=ce_hat,
        ce_recovered=(ce_mean - ce_hat) / (ce_mean - ce) if ce_mean != ce else None,
        kl=F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
        fvu=spliced.squared_error / total if total else math.nan,
    )


class Components(NamedTuple):
    """Principal components: the simplest alternative to an SAE."""

    center: Tensor  # (d_in,)
    strongest: Tensor  # (d_in, n)

    @classmethod
    def fit(cls, z: Tensor, n: int) -> Components:
        """The n strongest of z (N, d_in), about its mean."""
        center = z.mean(0)
        centered = z - center
        _, basis = torch.linalg.eigh(centered.T @ centered)
        return cls(center, basis[:, -n:])  # eigenvalues ascend

    def reconstruct(self, z: Tensor) -> Tensor:
        """z (N, d_in) projected on them."""
        return self.center + (z - self.center) @ self.strongest @ self.strongest.T


def _ratio(value: float, other: float, meaningful: bool = True) -> float | None:
    """value / other; None where other is 0 or the ratio is not meaningful."""
    return value / other if meaningful and other else None


@torch.no_grad()
def measure_fidelity(
    layer: fa.ExplainedLayer, target: int | None = None, untrained: object = None
) -> dict:
    """The fidelity part of a record of summary.json, measured on the split "test".

    The SAE is compared with `target` principal components, by default as many as features are
    active on average, and with an `untrained` SAE where one is given. Densities are those of the
    training images, over positions.
    """
    sae, test = layer.sae, layer.splits["test"]
    z_train = rows_of(layer, "train")
    stats, z_mean = feature_stats(sae, z_train), z_train.mean(0)
    labels = test.labels.to(layer.device)
    l0, l0_image, sums = _l0_and_sums(layer, test.raw)
    target = target or max(1, round(l0.mean().item()))

    own, total = layer.logits(test.raw), sums.about_mean()
    mean_ablated = splice(layer, test.raw, lambda z: z_mean.expand_as(z)).logits

    def measure(reconstruction: Callable[[Tensor], Tensor]) -> Fidelity:
        spliced = splice(layer, test.raw, reconstruction)
        return fidelity(own, spliced, mean_ablated, labels, total)

    spliced = {}  # Fidelity by mode
    modes = MODES[:1] if layer.has_positions else MODES  # each runs the rest of the network
    for mode in modes:
        spliced[mode] = measure(lambda z: reconstruct(sae, z, mode, stats.mean_activation))  # noqa: B023
    plain = fidelity(own, Spliced(own, 0.0), mean_ablated, labels, total)
    pca = measure(Components.fit(z_train, target).reconstruct)
    jump, density = spliced["jumprelu"], stats.feature_density
    dense, all_density = density > DENSE_FROM, density.sum()
    few = target < len(layer.mu)  # as many components as units leave nothing but rounding errors
    record = {
        "achieved_actives_val": _l0_and_sums(layer, layer.splits["val"].raw)[0].mean().item(),
        "achieved_actives_test": l0.mean().item(),
        "l0_std_test": l0.std().item(),
        "baseline_acc": plain.accuracy,
        "baseline_ce": plain.cross_entropy,
        **{f"recon_acc_{mode}": spliced[mode].accuracy for mode in modes},
        **{f"delta_acc_{mode}": plain.accuracy - spliced[mode].accuracy for mode in modes},
        **{f"agreement_{mode}": spliced[mode].agreement for mode in modes},
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
        "dense_share_of_l0": (density[dense].sum() / all_density).item() if all_density else None,
        "rare_features": int((density < RARE_BELOW).sum()),
    }
    if layer.has_positions:
        record |= {"l0_position_test": l0.mean().item(), "l0_image_test": l0_image.mean().item()}
        record["positions"] = layer.positions.n
    if untrained is not None:
        start = measure(untrained)
        record |= {"fvu_untrained": start.fvu, "agreement_untrained": start.agreement}
    return record


class _Sums(NamedTuple):
    """Sums over rows z (n, d_in), in float64."""

    n: int
    values: Tensor  # (d_in,)
    squares: float

    def about_mean(self) -> float:
        """sum ||z - mean(z)||^2"""
        return self.squares - float(self.values.square().sum()) / self.n


def _l0_and_sums(layer: fa.ExplainedLayer, raw: fa.Rows) -> tuple[Tensor, Tensor, _Sums]:
    """Active features of each row, and of each image at any position, (n,) float64; sums of z."""
    by_row, by_image = [], []
    values, squares, n = torch.zeros_like(layer.mu, dtype=torch.float64), 0.0, 0
    positions = some_positions(layer)
    for some in raw.split(max(1, EVAL_ENTRIES // (positions * layer.d_sae))):
        active = layer.acts_at(some) > 0  # (B, P, d_sae)
        by_row.append(active.sum(2).flatten())
        by_image.append(active.any(1).sum(1))
        z = layer.standardize(some).flatten(0, -2).double()
        values, squares, n = values + z.sum(0), squares + z.square().sum().item(), n + len(z)
    return torch.cat(by_row).double(), torch.cat(by_image).double(), _Sums(n, values, squares)
