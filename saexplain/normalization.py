"""How do images look? The normalization that a model's images have is found, to be undone.

    display, words = find_display(source, (low, high), given, model)
    display.pictures(images)  # float32 (N, C, H, W) from 0 to 1

Takes transforms, the config of a model, or the range of the values; gives a `Display`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from saexplain.files import InputError
from saexplain.images import Display

TOLERANCE = 0.05  # that pictures may leave [0, 1], by the resampling of a resized picture
NO_NUMBERS = (TypeError, ValueError, RuntimeError)  # of what cannot be made a tensor


class Normalization(NamedTuple):
    """What the model reads is (picture - mean) / std, with one number or one for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def as_normalization(mean: object, std: object) -> Normalization | None:
    """Mean and std as numbers; None where they are none."""
    with suppress(*NO_NUMBERS):
        mean, std = (
            tuple(torch.as_tensor(v, dtype=torch.float64).flatten().tolist()) for v in (mean, std)
        )
        size = max(len(mean), len(std))
        usable = min(std) > 0 and all(map(math.isfinite, (*mean, *std)))
        if {len(mean), len(std)} <= {1, size} and size in (1, 3) and usable:
            return Normalization(*(v if len(v) == size else v * size for v in (mean, std)))
    return None


def given_normalization(mean: object, std: object) -> Normalization | None:
    """That of the arguments. Raises InputError for one that cannot be used."""
    if mean is None and std is None:
        return None
    found = as_normalization(mean, std)
    if found is None:
        raise InputError(
            f"mean and std must both be a finite number or one for each channel, std positive, got "
            f"{mean!r} and {std!r}; give those that the model's images are normalized with"
        )
    return found


def model_normalization(model: object) -> Normalization | None:
    """That of a model's config, as timm and transformers store it."""
    for _ in range(4):
        for name in ("pretrained_cfg", "default_cfg"):
            config = getattr(model, name, None)
            if isinstance(config, Mapping) and {"mean", "std"} <= config.keys():
                return as_normalization(config["mean"], config["std"])
        config = getattr(model, "config", None)
        if hasattr(config, "image_mean") and hasattr(config, "image_std"):
            return as_normalization(config.image_mean, config.image_std)
        inner = (getattr(model, name, None) for name in ("module", "_orig_mod", "model"))
        model = next((m for m in inner if m is not None), None)
    return None


def transform_normalization(given: Iterable[object]) -> Normalization | None:
    """That of all normalizations in transforms, one after the other; None where there is none."""
    found, seen = [], set()

    def walk(step: object) -> None:
        if step is None or id(step) in seen or isinstance(step, (Tensor, str)):
            return
        seen.add(id(step))
        for mean, std in (("mean", "std"), ("image_mean", "image_std")):
            if own := as_normalization(getattr(step, mean, None), getattr(step, std, None)):
                found.append(own)
                return
        if isinstance(step, (list, tuple, torch.nn.Sequential, torch.nn.ModuleList)):
            for inner in step:
                walk(inner)
        for name in ("transform", "transforms"):
            walk(getattr(step, name, None))

    for thing in given:
        walk(thing)
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for own in found:  # (picture - mean) / std, of the result the next
        mean = mean + std * torch.tensor(own.mean, dtype=torch.float64)
        std = std * torch.tensor(own.std, dtype=torch.float64)
    return Normalization(tuple(mean.tolist()), tuple(std.tolist())) if found else None


def find_display(
    source, ends: tuple[Tensor, Tensor], given: Normalization | None, model: object
) -> tuple[Display, str]:
    """How the images of a `Source` are shown, and where that is known from, in words.

    `ends` are the smallest and the largest value of each channel, (C,).
    """
    low, high = ends

    def fits(found: Normalization | None) -> bool:
        if found is None or len(found.mean) not in (1, len(low)):
            return False
        mean, std = torch.tensor(found.mean), torch.tensor(found.std)
        shown = torch.stack([low * std + mean, high * std + mean])
        return bool(shown.min() >= -TOLERANCE and shown.max() <= 1 + TOLERANCE)

    if source.reader.makes_pictures:
        own = source.reader.normalization
        words = "pictures read as 0 to 1"
        if own:
            words += f", then normalized by mean and std ({'given' if given else 'of the model'})"
        return Display(*own) if own else Display(), words
    in_range = bool(low.min() >= 0 and high.max() <= 1)
    of_transform = transform_normalization(source.transforms())
    of_model = None if in_range else model_normalization(model)
    places = {"given": given, "of the transform": of_transform, "of the model": of_model}
    for where, found in places.items():
        if fits(found):
            return Display(*found), f"shown with mean and std undone ({where})"
    note = ", as the given mean and std would bring them out of 0 to 1" if given else ""
    if in_range:
        return Display(), f"values from 0 to 1 shown as they are{note}"
    lowest, highest = float(low.min()), float(high.max())
    span = max(highest - lowest, 1e-12)
    words = f"values from {lowest:.3g} to {highest:.3g} scaled to 0 to 1 to be shown{note}"
    return Display((-lowest / span,), (1 / span,)), f"{words}; give mean= and std= for true colors"
