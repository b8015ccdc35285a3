"""Small models and SAEs that need no data set, shared by the tests."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity
from saexplain.analysis import Analysis, analyze
from saexplain.parallel import Stopwatch

# --------------------------------------------------------------------------------------------------
# Images of bands, and a layer that reads them
# --------------------------------------------------------------------------------------------------


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
    """A layer, color images (400, 3, 8, 8) with one band of four inked, and which one it is."""
    labels = torch.arange(400) % 4
    noise = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    bands = torch.nn.functional.one_hot(labels, 4)[:, None, :, None].repeat(1, 3, 2, 8)
    layer = fa.ExplainedLayer(Bands(), Identity(), torch.zeros(4), torch.ones(4))
    return layer, 0.1 * noise + bands, labels


# --------------------------------------------------------------------------------------------------
# Scenes of exact arithmetic: weights are small integers, standard deviations powers of two. So no
# result may depend, not by one bit, on how the images are cut into batches.
# --------------------------------------------------------------------------------------------------

N, SIDE, D_IN, D_SAE, C = 90, 12, 6, 12, 5
ALWAYS, RARE, DEAD = 0, 1, D_SAE - 1  # features active on all images, on two or three, on none


class Model(NamedTuple):
    """The two methods that an explained model must have, and nothing else."""

    first_layers: Callable[[Tensor], Tensor]
    head: Tensor  # (d_in, C)
    relu: bool = False

    def preactivations(self, images):
        return self.first_layers(images)

    def logits_from_preactivations(self, z):
        return (z.relu() if self.relu else z) @ self.head


class SAE(NamedTuple):
    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor

    def encode(self, z):
        pre = z @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)


class Scene(NamedTuple):
    model: Model
    sae: SAE
    mu: Tensor
    std: Tensor
    images: Tensor
    labels: Tensor

    def args(self, batch_size: int = 16, keep: slice = slice(None)) -> tuple:
        """model, loader, sae, mu, std; the loader gives the images `keep`."""
        batches = self.images[keep].split(batch_size), self.labels[keep].split(batch_size)
        return self.model, list(zip(*batches, strict=True)), self.sae, self.mu, self.std

    def no_loader(self) -> tuple:
        """model, sae, mu, std"""
        return self.model, self.sae, self.mu, self.std

    @property
    def layer(self) -> fa.ExplainedLayer:
        return fa.ExplainedLayer(*self.no_loader())

    @property
    def raw(self) -> Tensor:
        return self.model.preactivations(self.images)

    def feature_acts(self) -> Tensor:
        return self.sae.encode((self.raw - self.mu) / self.std)


def make_scene(kind: str) -> Scene:
    """A "linear" model, one with a ReLU in its head ("relu"), or one that squares as well ("conv").

    A third of the images come twice, so activations tie; no image has the last label.
    """
    rng = np.random.default_rng(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape)).float()

    images = integers(0, 1, N, 1, SIDE, SIDE)
    images[60:] = images[:30]
    W1, kernel = integers(-1, 1, SIDE**2, D_IN), integers(-1, 1, 2, 1, 3, 3)
    mix = integers(-1, 1, 32, D_IN)

    def first_layers(images: Tensor) -> Tensor:
        if kind == "conv":
            convolved = torch.nn.functional.conv2d(images, kernel, stride=3)
            return convolved.square().flatten(1) @ mix
        return images.flatten(1) @ W1

    model = Model(first_layers, integers(-3, 3, D_IN, C), relu=kind != "linear")
    raw = model.preactivations(images)
    mu, std = raw.mean(0).round(), torch.tensor([1.0, 2.0, 4.0] * 2)

    W_enc, b_enc, threshold = integers(-2, 2, D_IN, D_SAE), torch.zeros(D_SAE), torch.zeros(D_SAE)
    b_enc[ALWAYS], threshold[DEAD] = 1000, torch.inf
    threshold[RARE] = ((raw - mu) / std @ W_enc)[:, RARE].sort().values[-4]
    sae = SAE(W_enc, b_enc, threshold, integers(-2, 2, D_SAE, D_IN))
    return Scene(model, sae, mu, std, images, torch.from_numpy(rng.integers(0, C - 1, N)))


def identity_args(acts: Tensor, labels: Tensor | None = None, n_classes: int = 3) -> tuple:
    """model, loader, sae, mu, std with the feature activations acts (N, d_sae), 0 or more."""
    acts = torch.as_tensor(acts, dtype=torch.float32)
    n, d_sae = acts.shape
    eye, zero = torch.eye(d_sae), torch.zeros(d_sae)
    labels = torch.zeros(n).long() if labels is None else torch.as_tensor(labels)
    model = Model(lambda images: images, torch.zeros(d_sae, n_classes))
    return model, [(acts, labels)], SAE(eye, zero, zero, eye), zero, zero + 1


def bank_of(acts, labels=None, n_classes: int = 3, **settings) -> fa.FeatureBank:
    """The bank of images whose activations are acts (N, d_sae)."""
    return fa.collect_feature_bank(*identity_args(acts, labels, n_classes), **settings)


def activity_of(acts: list[list[float]]) -> Activity:
    """The activity behind activations (N, d_sae)."""
    columns = torch.tensor(acts).T
    feature, image = (columns > 0).nonzero(as_tuple=True)
    counts = torch.bincount(feature, minlength=len(columns))
    start = torch.tensor([0, *counts.cumsum(0).tolist()])
    return Activity(
        start, image, columns[feature, image], torch.zeros(len(acts), dtype=int), 0 * image
    )


def slow_effect(scene: Scene, images, change: Callable[[int], Tensor]) -> Tensor:
    """Mean change of the logits, (C,), when change(i), (d_in,), is added to image i's raw."""
    logits, total = scene.model.logits_from_preactivations, torch.zeros(C)
    for i in images:
        raw = scene.model.preactivations(scene.images[i : i + 1])[0]
        total += logits(raw + change(i)) - logits(raw)
    return total / max(1, len(images))


def analysis_of(scene: Scene) -> Analysis:
    """The analysis of the scene's images, which are training and validation images at once."""
    split = scene.layer.activations(scene.images, scene.labels)
    layer = fa.ExplainedLayer(*scene.no_loader(), {"train": split, "val": split})
    return analyze(layer, topk=7, n_eval=20, alpha=1.0, clock=Stopwatch())


def tensors(result) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def exactly(found, expected) -> None:
    """Assert that all tensors in two nested tuples are equal."""
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@functools.cache
def shown_bank() -> tuple[fa.FeatureBank, np.ndarray]:
    """The bank of 40 images, (40, SIDE, SIDE); feature 0 is active on 36 of them, 1 on none."""
    rng = np.random.default_rng(1)
    strengths = rng.permutation(np.concatenate([np.zeros(4), np.arange(1, 37)]))
    bank = bank_of(np.stack([strengths, 0 * strengths], 1), rng.integers(0, 3, 40).tolist())
    return bank, rng.integers(0, 2, (40, SIDE, SIDE)).astype(np.float32)


def read(path) -> np.ndarray:
    """The colors of a picture, (height, width, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(figure) -> np.ndarray:
    """The colors that a Figure shows, (height, width, 3)."""
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[:, :, :3]


def cells(heat, inked=None) -> np.ndarray:
    """The colors (H, W, 3) that a pattern is painted in."""
    pixels = drawn(fa.visualize_feature_pattern(heat, 0, inked=inked))
    zoom = round(fa.PATTERN / heat.shape[1])
    height, width = (zoom * side for side in heat.shape)
    bottom = len(pixels) - fa.MARGIN
    painted = pixels[bottom - height : bottom, fa.MARGIN : fa.MARGIN + width]
    colors = painted[::zoom, ::zoom]
    assert np.array_equal(painted, colors.repeat(zoom, 0).repeat(zoom, 1))
    return colors


@contextmanager
def double_by_default() -> Iterator[None]:
    """torch.float64 as the default dtype, as users may have set it."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
