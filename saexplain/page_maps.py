"""Where are features active? The maps that a page shows, small enough to be sent with it.

    fields = map_fields(maps, image_shape) | feature_fields(maps, k)
    found = mean_map_array(maps, features)                     # (F, h, w) uint8
    found, has_map = example_maps(layer, raw, maps, examples)  # (n, h, w) of examples
    arrays |= position_arrays(layer, raw, maps, features, largest)

Takes a layer, its output raw on images, and the `Maps` of its features; gives arrays and JSON
values. It computes no image.

Key: F features on the page, h x w positions of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.overlays import PREFIX_SHARE

if TYPE_CHECKING:
    from saexplain.where import Maps

STRENGTHS = 15  # values of a map above 0, about as many as the eye distinguishes: few compress well
PER_POSITION = 12  # features listed at a position of a test image, the strongest
IMAGES_SHOWN = 60  # test images of which they are listed


def quantize(values: Tensor, scale: Tensor) -> np.ndarray:
    """uint8 of values from 0 to `scale`, which becomes 255, in STRENGTHS steps."""
    share = (values.float() / scale.clamp(min=1e-12)).clamp(0, 1)
    return ((STRENGTHS * share).round() * (255 // STRENGTHS)).byte().cpu().numpy()


def map_fields(maps: Maps, image_shape: Sequence[int]) -> dict:
    """What the page must know of all maps."""
    shares = (side / of for side, of in zip(maps.receptive, image_shape, strict=True))
    return {
        "grid": list(maps.grid),
        "n_prefix": maps.n_prefix,
        "kind": maps.kind,
        "receptive": [round(min(1.0, share), 4) for share in shares],  # of the image's sides
        "per_position": PER_POSITION,
        "prefix_share": PREFIX_SHARE,
    }


def feature_fields(maps: Maps, k: int) -> dict:
    """Where feature k is active, in numbers; the peak is None where it has no map."""
    peak = float(maps.mean[k].max())
    return {
        "mean_peak": None if math.isnan(peak) else float(f"{peak:.4g}"),
        "spread": round(float(maps.spread[k]), 3),
        "position_density": float(f"{float(maps.position_density[k]):.4g}"),
        "prefix_share": round(float(maps.prefix_share[k]), 3),
        "blank_share": round(float(maps.blank_share[k]), 3),
        "place_only": bool(maps.place_only[k]),
    }


def mean_map_array(maps: Maps, features: Sequence[int]) -> np.ndarray:
    """(F, h, w) uint8 mean maps, each up to its largest; 0 where there is none."""
    mean = maps.mean[features].float().nan_to_num()
    return quantize(mean, mean.amax((1, 2), keepdim=True))


@torch.no_grad()
def example_maps(
    layer: fa.ExplainedLayer, raw: fa.Rows, maps: Maps, examples: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, list[bool]]:
    """Maps (n, h, w) of examples (feature, image, rank), and which of them there are.

    The rank is the place among the feature's strongest images, -1 for other images. Of a layer with
    positions all maps are computed; otherwise there are those of `maps.top`.
    """
    height, width = maps.grid
    if maps.kind != "activation":
        found, has_map = torch.zeros(len(examples), height, width), []
        for place, (k, _, rank) in enumerate(examples):
            is_stored = 0 <= rank < maps.top.shape[1]
            has_map.append(is_stored and not bool(maps.top[k, rank].isnan().any()))
            if has_map[-1]:
                found[place] = maps.top[k, rank].float()
        return found, has_map
    feature, image, _ = torch.tensor(examples).view(-1, 3).unbind(1)
    parts = [
        layer.acts_of(raw[i.to(raw.device)], k.to(raw.device)).float().cpu()[:, maps.n_prefix :]
        for k, i in zip(feature.split(fa.ROWS), image.split(fa.ROWS), strict=True)
    ]
    return torch.cat(parts).view(-1, height, width), [True] * len(examples)


@torch.no_grad()
def position_arrays(
    layer: fa.ExplainedLayer,
    raw: fa.Rows,
    maps: Maps,
    features: Sequence[int],
    largest: np.ndarray,
) -> dict[str, np.ndarray]:
    """The strongest features at each position of images, those of the grid and then the prefix.

    `largest` (d_sae,) are the activations that become 255.
    """
    own = torch.tensor(features)
    scale = torch.from_numpy(largest)[own].clamp(min=1e-12)
    starts, which, strengths = [], [], []
    for i in range(len(raw)):
        acts = layer.acts_at(raw[i : i + 1])[0].float().cpu()[:, own]  # (P, F)
        acts = torch.cat([acts[maps.n_prefix :], acts[: maps.n_prefix]])
        values, places = acts.topk(min(PER_POSITION, len(own)), dim=1)
        active = values > 0
        starts.append(active.sum(1))
        which.append(places[active])
        strengths.append(255 * values[active] / scale[places[active]])
    start = torch.nn.functional.pad(torch.cat(starts).cumsum(0), (1, 0))
    return {
        "at_start": start.int().numpy(),
        "at_feature": torch.cat(which).numpy().astype(np.uint16),
        "at_activation": torch.cat(strengths).round().clamp(1, 255).byte().numpy(),
    }
