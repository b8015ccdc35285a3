"""Which pixels drive the layer's units, and how faithful are such patterns?

    gradients = unit_gradients(layer, images)          # (d_in, C, H, W)
    heats = feature_patterns(layer, gradients.sum(1))  # (d_sae, H, W)
    pattern_correlations(layer, gradients, split)      # (d_sae,), 1 where the layer is linear

Takes an `ExplainedLayer` and images; gives gradients and numbers about them.

Key: N images, d_in units of the layer, d_sae features, H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.sae import JumpReLUSAE

GRADIENT_IMAGES = 128  # over which gradients that differ from image to image are averaged
GRADIENT_NUMBERS = 2**27  # in the gradients of all units at these images: of large ones fewer serve


def gradient_images(layer: fa.ExplainedLayer, images: Tensor) -> dict:
    """The arguments of `feature_input_pattern` that name the images to average over.

    None if the layer is linear in the pixels, otherwise some of images (N, ...).
    """
    shape = tuple(images.shape[1:])
    linear = fa.is_linear(layer, shape, images[:GRADIENT_IMAGES])
    most = GRADIENT_NUMBERS // (len(layer.mu) * math.prod(shape))
    chosen = torch.linspace(0, len(images) - 1, max(2, min(GRADIENT_IMAGES, most, len(images))))
    some = images[chosen.round().long().to(images.device)]
    return {"images": None if linear else some, "image_shape": shape}


def unit_gradients(layer: fa.ExplainedLayer, images: Tensor) -> Tensor:
    """(d_in, C, H, W) on the CPU, mean gradient of every standardized unit of the layer with
    respect to the pixels: a feature's is their sum, weighted by its column of W_enc."""
    eye, zeros = torch.eye(len(layer.mu)).to(layer.mu), torch.zeros_like(layer.mu)
    weights = {"W_enc": eye, "W_dec": eye, "b_enc": zeros, "b_dec": zeros, "threshold": zeros}
    units = JumpReLUSAE.from_weights(weights)
    parts = (layer.model, units, layer.mu, layer.std)
    heats = fa.feature_input_patterns(*parts, **gradient_images(layer, images)).cpu()
    return heats if heats.dim() == 4 else heats[:, None]


def feature_patterns(layer: fa.ExplainedLayer, gradients: Tensor) -> Tensor:
    """Input pattern of every feature, (d_sae, ...), from the gradients of the units (d_in, ...)."""
    return torch.tensordot(layer.sae.W_enc.detach().cpu().float().T, gradients, dims=1)


@torch.no_grad()
def pattern_correlations(
    layer: fa.ExplainedLayer, gradients: Tensor, split: fa.Activations
) -> Tensor:
    """(d_sae,) correlation over images of the sum of pattern times pixel with the feature's
    pre-activation, z W_enc: 1 for a network that is linear up to the layer; gradients are those of
    `unit_gradients`."""
    pixels = split.images.detach().float().cpu().flatten(1)
    predicted = pixels @ feature_patterns(layer, gradients.flatten(1)).T
    pre = layer.standardize(split.raw) @ layer.sae.W_enc.detach()
    return correlations(predicted.T, pre.T.cpu()).float()


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """(F,) Pearson correlations of the rows of a and b, (F, N) each; 0 where one does not vary."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    length = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(length > 0, (a * b).sum(1) / length.clamp(min=1e-12), 0.0)


def pattern_roughness(heats: Tensor) -> Tensor:
    """How noisy each pattern (n, H, W) is, (n,).

    The mean squared difference of neighboring pixels over twice the mean square: 0 for a constant
    picture, 1 for white noise of mean zero, up to 2 for a chessboard; 0 for an empty one. Raises
    ValueError for patterns without neighboring pixels.
    """
    if min(heats.shape[1:]) < 2:
        raise ValueError(f"patterns need 2 x 2 pixels or more, got {tuple(heats.shape)}")
    down = heats.diff(dim=1).square().mean((1, 2))
    across = heats.diff(dim=2).square().mean((1, 2))
    power = heats.square().mean((1, 2))
    ratio = (down + across) / 4 / power.clamp(min=torch.finfo(heats.dtype).tiny)
    return torch.where(power > 0, ratio, 0.0)
