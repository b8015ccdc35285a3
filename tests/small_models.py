"""A model and an SAE that no digit is needed for, shared by tests of two rooms."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import feature_analysis as fa


class Bands:
    """Preactivations are the mean inks of bands; logits their positive parts."""

    def preactivations(self, images):
        return images.mean((1, 3))[:, :4]

    def logits_from_preactivations(self, z):
        return z.relu()


class Identity(NamedTuple):
    W_enc: Tensor = torch.eye(4)
    W_dec: Tensor = torch.eye(4)

    def encode(self, z):
        return torch.where(z > 0.5, z, 0.0)


def banded_images() -> tuple[fa.ExplainedLayer, Tensor, Tensor]:
    """A layer, colour images (400, 3, 8, 8) with one band of four inked, and which one it is."""
    labels = torch.arange(400) % 4
    noise = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    bands = torch.nn.functional.one_hot(labels, 4)[:, None, :, None].repeat(1, 3, 2, 8)
    layer = fa.ExplainedLayer(Bands(), Identity(), torch.zeros(4), torch.ones(4))
    return layer, 0.1 * noise + bands, labels


def activity_of(acts: list[list[float]]) -> fa.Activity:
    """The activity behind activations (N, d_sae)."""
    columns = torch.tensor(acts).T
    feature, image = (columns > 0).nonzero(as_tuple=True)
    counts = torch.bincount(feature, minlength=len(columns))
    start = torch.tensor([0, *counts.cumsum(0).tolist()])
    return fa.Activity(start, image, columns[feature, image], torch.zeros(len(acts), dtype=int))


@contextmanager
def double_by_default() -> Iterator[None]:
    """As somebody may have switched it on for numbers of their own."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
