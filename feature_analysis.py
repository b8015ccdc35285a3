"""What is a feature of a sparse autoencoder? Its images, its pixels, its classes, and pictures.

    bank = collect_feature_bank(model, loader, sae, mu, std)              # which images fire it?
    heat = feature_input_pattern(model, sae, mu, std, k)                  # which pixels drive it?
    delta, top = feature_logit_effect(model, loader, sae, mu, std, k)     # what does adding it do?
    delta, top = feature_ablation_effect(model, loader, sae, mu, std, k)  # ... and removing it?
    show_feature_gallery(k, bank, images)                                 # pictures, as Figures

It takes a trained model, an SAE and images, and gives numbers, lists and pictures. It makes no
claim about what a feature means, and knows nothing of how model and SAE were trained, or of which
images may be looked at: whoever calls chooses them. What is asked of the arguments, everywhere:

    model    an object with ``preactivations(images) -> (B, d_in)`` and
             ``logits_from_preactivations(raw) -> (B, C)``; nothing else is used, so a convolutional
             network serves as well. Dropout and batch norm must be in evaluation mode.
    loader   iterable more than once, in the same order, of ``(images, labels)`` batches, images
             (B, ...), labels (B,). An image's index is its position in that order.
    sae      an object with ``encode(z) -> (B, d_sae)``, ``W_enc (d_in, d_sae)`` and
             ``W_dec (d_sae, d_in)``; it reads standardised preactivations z = (raw - mu) / std.
    mu, std  (d_in,) tensors. They also say on which device the work is done.

Dimension key: N images, B images in a batch, C classes, d_in preactivations, d_sae features,
P pairs of a feature and an image that fires it, H x W pixels of an image or a pattern.
No function changes its inputs or the state of a random number generator.
"""

from __future__ import annotations

import difflib
import functools
import io
import itertools
import math
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from whole_files import write_whole

if TYPE_CHECKING:  # matplotlib takes half a second to import, and only a Figure needs it
    from matplotlib.figure import Figure

N_BANDS = 4  # quantile bands of the active range that examples are drawn from
PER_BAND = 5  # examples shown for each band
SAMPLE_PER_FEATURE = 64  # active images remembered per feature to find those bands
ROWS = 512  # images that the model is given at once: few enough to stay in the processor's cache
GRADIENT_ROWS = 32  # images whose gradients, d_in of each, are held at once, at most
GRADIENT_ENTRIES = 2**26  # numbers that these gradients may have
HEAD_ROWS = 4096  # rows that the head is given at once, or n_eval if that is more
ENTRIES = 2**21  # activations of which several copies are made: larger ones are slow to get
COUNTED = 2**18  # pairs of features that are counted at once: few enough for the cache

BATCHES_COMPARED = 8  # of two passes over a loader; more would take long where images are read
PROBED = 8  # images whose preactivations are computed twice, to see that they stay the same

EMPTY_LOADER = "the loader is empty: it must give at least one batch of (images, labels)"

# --------------------------------------------------------------------------------------------------
# The layer that is explained
# --------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on CPUs torch raises a plain RuntimeError for that."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def check_feature(k: int, d_sae: int) -> int:
    """k itself. Raises IndexError unless 0 <= k < d_sae, ValueError for what is no whole number."""
    if not 0 <= check_whole("feature", k) < d_sae:
        raise IndexError(f"feature {k} does not exist: the SAE has features 0 to {d_sae - 1}")
    return int(k)


def check_whole(name: str, value: int, least: int | None = None) -> int:
    """The value itself. Raises ValueError for what is no whole number, below the least, or beyond
    LAST_INDEX."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {_met(value)}; it must be a whole number") from None
    if least is not None and whole < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if whole > LAST_INDEX:
        raise ValueError(f"{name} is more than {LAST_INDEX:,}")
    return whole


def _met(value: object) -> str:
    """What was met, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _changes_in_training(module: torch.nn.Module) -> bool:
    """Whether it gives something else, or remembers what it is given, in training mode."""
    kinds = torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase
    return isinstance(module, (*kinds, torch.nn.RReLU))


def refuse_training_mode(model: object) -> None:
    """Raise ValueError when the model, or one that it holds, has dropout or the like at work."""
    if isinstance(model, (AtLayer, InEvaluation)):  # which see to that
        return
    for part in (model, *getattr(model, "__dict__", {}).values()):
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            if module.training and _changes_in_training(module):
                kind = type(module).__name__
                raise ValueError(f"the model is in training mode, and has {kind}: call eval()")


class ExplainedLayer(NamedTuple):
    """A layer of a model and the SAE that reads it: what is explained."""

    model: object
    sae: object
    mu: Tensor  # (d_in,)
    std: Tensor  # (d_in,)

    @classmethod
    def checked(cls, model, sae, mu: Tensor, std: Tensor) -> ExplainedLayer:
        """The layer. Raises ValueError unless mu and std are (d_in,) and of the type of the SAE's
        input, finite, std above 0, and for a model in training mode."""
        d_in, kind = sae.W_enc.shape[0], sae.W_enc.dtype
        for name, value in (("mu", mu), ("std", std)):
            if tuple(value.shape) != (d_in,):
                shape = tuple(value.shape)
                raise ValueError(f"{name} has shape {shape}, but the SAE takes d_in = {d_in}")
            if value.dtype != kind:
                raise ValueError(f"{name} is {value.dtype}, but the SAE's weights are {kind}")
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite: {_first(value, ~value.isfinite())}")
        if not (std > 0).all():
            raise ValueError(f"std must be above 0: {_first(std, ~(std > 0))}")
        refuse_training_mode(model)
        return cls(model, sae, mu, std)

    @property
    def d_sae(self) -> int:
        return self.sae.W_enc.shape[1]

    def raw(self, images: Tensor) -> Tensor:
        """images (B, ...) -> the model's own preactivations (B, d_in)

        Raises ValueError when the model cannot take the images, or gives another shape than mu's,
        or numbers that are not finite.
        """
        if not isinstance(images, Tensor) or images.dim() < 2:
            met = tuple(getattr(images, "shape", ())) or type(images).__name__
            raise ValueError(f"images are {met}; a tensor (B, ...) is needed")
        try:
            raw = self.model.preactivations(images.to(self.mu.device))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            shape = tuple(images.shape)
            raise ValueError(f"the model cannot take images of shape {shape}: {error}") from error

        shape, expected = tuple(raw.shape), tuple(self.mu.shape)
        if shape[1:] != expected:
            raise ValueError(f"preactivations have shape {shape}, but mu has shape {expected}")
        if not raw.isfinite().all():
            cause = "the model's weights" if images.isfinite().all() else "the images"
            raise ValueError(f"preactivations are not finite, because {cause} are not")
        return raw

    @torch.no_grad()
    def raw_of_all(self, images: Tensor) -> Tensor:
        """The same for many images, ROWS at a time."""
        return torch.cat([self.raw(some) for some in images.split(ROWS)])

    @torch.no_grad()
    def refuse_chance(self, images: Tensor, head: bool = True) -> None:
        """Raise ValueError when the first PROBED of images (N, ...) give something else each time,
        as with a dropout that no module of its own tells of; with `head`, logits as well."""
        raw = self.raw(images[:PROBED])
        pairs = [(raw, self.raw(images[:PROBED]))]
        if head:
            pairs.append((self.logits_from_raw(raw), self.logits_from_raw(raw)))
        if any((a - b).abs().max() > SAME * a.abs().max() for a, b in pairs if a.numel()):
            raise ValueError(
                "the model gives other numbers when it is given the same images again: something "
                "in it, like dropout in training mode, is left to chance; call eval()"
            )

    def standardised(self, images: Tensor) -> Tensor:
        """images (B, ...) -> z (B, d_in), what the SAE reads"""
        return (self.raw(images) - self.mu) / self.std

    def feature_acts(self, images: Tensor) -> Tensor:
        """images (B, ...) -> activations (B, d_sae)"""
        return self.sae.encode(self.standardised(images))

    def logits_from_raw(self, raw: Tensor) -> Tensor:
        """raw preactivations (B, d_in) -> logits (B, C)"""
        return self.model.logits_from_preactivations(raw)

    def logits_of_all(self, raw: Tensor) -> Tensor:
        """The same for many rows, HEAD_ROWS at a time."""
        return torch.cat([self.logits_from_raw(some) for some in raw.split(HEAD_ROWS)])


def _first(values: Tensor, wrong: Tensor) -> str:
    """The first of the wrong ones of values (n,), as people read it."""
    at = int(wrong.nonzero()[0])
    return f"entry {at} is {values[at]:g}"


def in_order(loader: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches.

    Raises ValueError when another pass has other images in the first batch, or first in the next
    ones, BATCHES_COMPARED in all, as one that shuffles does, or when there is no other pass: an
    image's index would mean nothing.
    """
    if iter(loader) is loader:
        raise ValueError("the loader can be read only once: give a list, or a DataLoader")
    seen = []  # first of all: the next pass may be by the same iterator, reset
    for images, _ in itertools.islice(loader, BATCHES_COMPARED):
        seen.append((images[:PROBED] if seen else images).clone())
    for number, (images, labels) in enumerate(loader):
        some = images[:PROBED] if number else images
        if number < len(seen) and not _same_images(some, seen[number]):
            raise ValueError(
                "the loader gives other images in each pass: it must not shuffle or augment"
            )
        yield images, labels


def _same_images(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def class_name(classes: Sequence[str], c: int) -> str:
    """What class c is called: by its number where `classes` is empty."""
    return classes[c] if classes else str(c)


def batches_of(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A loader of images (N, ...) with labels (N,), in batches of ROWS."""
    return list(zip(images.split(ROWS), labels.split(ROWS), strict=True))


# --------------------------------------------------------------------------------------------------
# A layer of any network
# --------------------------------------------------------------------------------------------------

POOLS = ("mean", "max", "flatten")  # what to make of a layer's output that has positions
SAME = 1e-4  # of the largest logit: the same but for rounding
SAME_IN_ANY_BATCH = 1e-2  # in batches of other sizes, for which GPUs may round to 10 bits


class _Reached(Exception):  # noqa: N818
    """The layer's output is there; the rest of the network need not run."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def gradients_of(given: Tensor) -> torch.set_grad_enabled:
    """Gradients where `given` asks for them, never because a network's weights do."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and given.requires_grad)


class AtLayer:
    """The output of one layer of any network as preactivations, and the rest of it as a head.

        net = AtLayer(model, "features.7")
        raw = net.preactivations(images)           # (B, d_in), by a forward hook
        logits = net.logits_from_preactivations(raw)  # (B, C), the layer's output replaced

    Nothing of the model is changed: it runs in evaluation mode, which is undone afterwards. What
    comes before the layer is run on one image to get to what comes after.

    Args:
        model: maps images (B, ...) to logits (B, C).
        name: of the layer, as in `model.named_modules()`.
        pool: of an output with positions (B, C, H, W), "mean" or "max" over them, which serves
            where the rest reads no more than that, or "flatten" for all of it.
        images: (N, ...), one or more that the network can take; up to PROBED are tried. Without,
            those serve that `preactivations` is given first.

    Raises ValueError for an unknown layer; with the first images, for a layer without one tensor as
    its output, or one with positions and no pool, and where the logits depend on more than this
    layer: a connection around it, positions that the pool has lost, or the other images of a batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        name: str,
        pool: str | None = None,
        images: Tensor | None = None,
    ):
        modules = dict(model.named_modules())
        if name not in modules or not name:
            near = difflib.get_close_matches(name, modules, 5, 0) if name else list(modules)[1:6]
            raise ValueError(f"the model has no layer {name!r}; it has {', '.join(near)}, ...")
        if pool is not None and pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; use one of {', '.join(POOLS)}")
        self.model, self.name, self.pool = model, name, pool
        self.layer = modules[name]
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = like.device, like.dtype
        self.shape: tuple[int, ...] | None = None  # of the layer's output for one image
        self.before: Tensor | None = None  # images that lead to the layer, where only it counts
        self.one_serves = True  # whether one such image leads many replaced outputs to the head
        if images is not None:
            self._get_to_know(images)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in) float32; gradients flow to images that ask for them"""
        if self.before is None:
            self._get_to_know(images)
        if len(images) == 0:  # which many a network cannot take
            return self._rows(self._output(self.before))[:0]
        return self._rows(self._output(images))

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C) float32; gradients flow to a raw that asks for them"""
        if self.before is None:
            raise ValueError(f"{self.name}: give `images` first, or call `preactivations`")
        return self._logits(raw)

    def _run(self, images: Tensor, hook: Callable, of: Tensor) -> Tensor:
        """The model on images, with a hook on the layer, and the gradients of `of`."""
        handle = self.layer.register_forward_hook(hook)
        try:
            with evaluating(self.model), gradients_of(of):
                return self.model(images.to(self.device, self.dtype))
        finally:
            handle.remove()

    def _output(self, images: Tensor) -> Tensor:
        """What the layer gives: (B, ...), a copy, since what follows may work in place."""
        found = []

        def keep(_module, _given, output) -> None:
            found.append(output)
            raise _Reached

        try:
            self._run(images, keep, images)
        except _Reached:
            pass
        if not found:
            raise ValueError(f"layer {self.name!r} does not run when the model is given images")
        if not isinstance(found[0], Tensor) or found[0].dim() < 2:
            what = type(found[0]).__name__
            raise ValueError(f"layer {self.name!r} gives no tensor (B, d_in) but a {what}")
        return found[0].clone()

    def _rows(self, output: Tensor) -> Tensor:
        """The layer's output (B, ...) as (B, d_in)."""
        shape = tuple(output.shape)
        if len(shape) > 2 and math.prod(shape[2:]) > 1 and self.pool is None:
            raise ValueError(
                f"layer {self.name!r} gives {shape}, outputs with positions: say pool='mean' or "
                f"'max' where the rest reads no more, or pool='flatten' for {math.prod(shape[1:])} "
                f"numbers"
            )
        if self.pool == "mean":
            output = output.flatten(2).mean(2) if len(shape) > 2 else output
        elif self.pool == "max":
            output = output.flatten(2).amax(2) if len(shape) > 2 else output
        return output.flatten(1).float()

    def _as_output(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) as the layer would give it: the same at every position where pooled."""
        shape = self.shape
        if self.pool in ("mean", "max") and len(shape) > 1:
            ones = (1,) * (len(shape) - 1)
            return raw.reshape(len(raw), shape[0], *ones).expand(-1, *shape).clone()
        return raw.reshape(len(raw), *shape).clone()

    def _logits(self, raw: Tensor) -> Tensor:
        if len(raw) == 0:
            return self._logits(raw.new_zeros(1, raw.shape[1]))[:0]
        replaced = self._as_output(raw.to(self.device, self.dtype))
        before = self.before
        if not self.one_serves:
            before = before.expand(len(raw), *before.shape[1:])
        logits = self._run(before, lambda *_: replaced, raw)
        return logits.float()

    @torch.no_grad()
    def _get_to_know(self, images: Tensor) -> None:
        """Learn the shape of the layer's output, and see that the logits depend on it alone.

        The first image leads to the layer, and the output for others, and for all with noise, is
        put in there: the logits must be those of the others. And they must not depend on the images
        beside them.
        """
        places = torch.linspace(0, len(images) - 1, min(PROBED, len(images))).round().long()
        some = images[places.to(images.device)].detach().float()
        noise = torch.rand(some.shape, generator=torch.Generator().manual_seed(0))
        noisy = some + (some.std() + 1) * noise.to(some)  # unlike the first, whatever that is
        tried, first = torch.cat([some, noisy]), some[:1]
        output = self._output(tried)
        raw = self._rows(output)
        runs = []
        expected = self._run(tried, lambda *_: runs.append(1), tried)
        if not isinstance(expected, Tensor) or expected.dim() != 2:
            what = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected)
            raise ValueError(f"the model gives {what} instead of logits (B, C)")
        if len(runs) > 1:
            raise ValueError(f"layer {self.name!r} runs {len(runs)} times; name one that runs once")

        if len(some) > 1:  # not every network takes a single one
            halves = torch.cat([self._run(half, lambda *_: None, half) for half in tried.chunk(2)])
            rounded = max(SAME_IN_ANY_BATCH, 16 * torch.finfo(expected.dtype).eps)
            if _distance(halves.float(), expected.float()) > rounded:
                raise ValueError(
                    "the model's logits for an image depend on the others of its batch"
                )

        self.shape, self.before = tuple(output.shape[1:]), first.detach().clone()
        off = self._furthest(raw, expected.float())
        if off > SAME:  # a network may ask its input how many images there are
            self.one_serves = False
            off = self._furthest(raw, expected.float())
        if off > SAME:
            self.before = None
            lost = f"or reads more of it than pool={self.pool!r} keeps" if self.pool else ""
            raise ValueError(
                f"what comes after layer {self.name!r} does not depend on it alone {lost}: with "
                f"its output for an image but the input of another the logits are off by "
                f"{off:.2g} of the largest; name a layer that everything passes through"
            )

    def _furthest(self, raw: Tensor, expected: Tensor) -> float:
        """How far the logits are from those expected, relative to the largest of these."""
        try:
            logits = self._logits(raw)
        except (RuntimeError, IndexError):
            return math.inf
        return _distance(logits, expected)


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Between logits (B, C), relative to the largest of those expected."""
    if logits.shape != expected.shape:
        return math.inf
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


class InEvaluation:
    """A module that has the two methods itself, in evaluation mode while they run, and as it was
    afterwards; images on its device and of its dtype, results float32."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = like.device, like.dtype

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in)"""
        with evaluating(self.model), gradients_of(images):
            return self.model.preactivations(images.to(self.device, self.dtype)).float()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C)"""
        with evaluating(self.model), gradients_of(raw):
            logits = self.model.logits_from_preactivations(raw.to(self.device, self.dtype))
        return logits.float()


# --------------------------------------------------------------------------------------------------
# Which images fire a feature?
# --------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Some images of each feature, each (d_sae, n); -1, 0, -1 where there is none."""

    index: Tensor
    activation: Tensor
    label: Tensor

    def at(self, places) -> Examples:
        """Those at `places`, anything that indexes a tensor."""
        return Examples(self.index[places], self.activation[places], self.label[places])

    def of(self, k: int) -> Examples:
        """Those of feature k alone, each (m,), without the empty places."""
        row = self.at(k)
        return row.at(row.index >= 0)


class FeatureBank(NamedTuple):
    """Where each feature fires, over `n_images` images. All tensors are on the CPU."""

    top: Examples  # (d_sae, topk), strongest first
    sample: Examples  # (d_sae, SAMPLE_PER_FEATURE), a uniform sample of the images that fire it
    label_histogram: Tensor  # (d_sae, C) int64, how many active images carry each label
    activation_sum: Tensor  # (d_sae,) float64, of the positive activations
    n_images: int

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) how many images fire the feature."""
        return self.label_histogram.sum(1)

    @property
    def feature_density(self) -> Tensor:
        """(d_sae,) share of images that fire the feature."""
        return self.n_active.float() / self.n_images

    @property
    def mean_activation_when_active(self) -> Tensor:
        """(d_sae,) 0 for a feature that never fires."""
        return (self.activation_sum / self.n_active.clamp(min=1)).float()

    def bands(self, k: int, n_bands: int = N_BANDS, per_band: int = PER_BAND) -> list[Examples]:
        """Examples of feature k from equal quantile bands of its active range, strongest first.

        Up to `per_band` are spread evenly over each band. The bands are those of the random sample:
        exact while at most SAMPLE_PER_FEATURE images fire the feature.
        """
        held = self.sample.of(check_feature(k, len(self.label_histogram)))
        order = torch.argsort(held.activation, descending=True, stable=True)
        bands = []
        for members in order.tensor_split(n_bands):
            n = len(members)
            spread = torch.linspace(0, max(0, n - 1), min(per_band, n)).round().long()
            bands.append(held.at(members[spread]))
        return bands


LAST_INDEX = 2**31 - 1  # image indices and the bits of a positive float32 both fit into 31 bits


def _strength(examples: Examples) -> Tensor:
    """(d_sae, n) int64, larger for a stronger activation and, among equals, for an earlier image.

    Positive floats are ordered like their bits, so both fit into one integer, and no two of a
    feature's are equal: the order of batches does not matter, nor how a library breaks ties.
    """
    bits = examples.activation.float().contiguous().view(torch.int32).long()
    return (bits << 32) | (LAST_INDEX - examples.index)


def _lottery_number(examples: Examples) -> Tensor:
    """(d_sae or 1, n) int64, a pseudo-random number that belongs to the image.

    Keeping the largest draws a uniform sample of the active images, the same however the data was
    cut. The finaliser of MurmurHash3 (Appleby 2011) is a bijection: no two images share a number.
    """
    mask = 2**32 - 1
    h = examples.index + 1
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & mask
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
    return h ^ (h >> 16)


def _largest(examples: Examples, key: Tensor, n: int) -> Examples:
    """The n active examples of each feature with the largest keys, in that order, (d_sae, n).

    The columns of `examples`, and the key, are (d_sae, m), or (1, m) if all features share them.
    """
    key = torch.where(examples.activation > 0, key, -1)
    best, place = key.topk(min(n, key.shape[1]), dim=1)
    kept = []
    for column, empty in zip(examples, (-1, 0, -1), strict=True):
        chosen = column.expand_as(key).gather(1, place).masked_fill(best < 0, empty)
        missing = n - chosen.shape[1]
        kept.append(torch.nn.functional.pad(chosen, (0, missing), value=empty).cpu())
    return Examples(*kept)


def _bank_of_batch(
    acts: Tensor, labels: Tensor, n_classes: int, first_index: int, topk: int
) -> FeatureBank:
    """The bank of images whose activations are acts (B, d_sae), with labels (B,)."""
    index = torch.arange(first_index, first_index + len(labels), device=acts.device)
    every = Examples(index[None], acts.T.contiguous(), labels[None])
    one_hot = torch.nn.functional.one_hot(labels, n_classes).float()
    counts = (acts > 0).float().T @ one_hot  # exact, being below 2^24
    return FeatureBank(
        top=_largest(every, _strength(every), topk),
        sample=_largest(every, _lottery_number(every), SAMPLE_PER_FEATURE),
        label_histogram=counts.long().cpu(),
        activation_sum=_on_grid(acts.clamp(min=0).sum(0, dtype=torch.float64)).cpu(),
        n_images=len(labels),
    )


def _on_grid(sums: Tensor) -> Tensor:
    """float64 rounded to multiples of 2^-30: sums of such below 2^23 are exact, in any order."""
    return torch.round(sums * 2**30) / 2**30


def _bank_in_blocks(
    acts: Tensor, labels: Tensor, n_classes: int, first_index: int, topk: int
) -> FeatureBank:
    """`_bank_of_batch`, some features at a time where there are many."""
    blocks = acts.split(max(1, ENTRIES // max(1, len(acts))), dim=1)
    banks = [_bank_of_batch(some, labels, n_classes, first_index, topk) for some in blocks]
    if len(banks) == 1:
        return banks[0]
    top, sample, histograms, sums, n_images = zip(*banks, strict=True)
    return FeatureBank(
        top=Examples(*(torch.cat(columns) for columns in zip(*top, strict=True))),
        sample=Examples(*(torch.cat(columns) for columns in zip(*sample, strict=True))),
        label_histogram=torch.cat(histograms),
        activation_sum=torch.cat(sums),
        n_images=n_images[0],
    )


def merge_feature_banks(a: FeatureBank, b: FeatureBank) -> FeatureBank:
    """The bank of two disjoint sets of images, as if it had been collected over both at once.

    Collect the second with `first_index` set to the number of images before it. Raises ValueError
    when the banks are of different SAEs, classes or topk, and when an image is in the samples of
    both; a few images in common can escape it where many fire each feature.
    """
    x, y = ((*bank.label_histogram.shape, bank.top.index.shape[1]) for bank in (a, b))
    if x != y:
        raise ValueError(f"banks do not fit together: (d_sae, C, topk) are {x} and {y}")
    top = Examples(*(torch.cat(columns, 1) for columns in zip(a.top, b.top, strict=True)))
    sample = Examples(*(torch.cat(columns, 1) for columns in zip(a.sample, b.sample, strict=True)))
    sample = _largest(sample, _lottery_number(sample), SAMPLE_PER_FEATURE)
    twice = (sample.index.diff() == 0) & (sample.index[:, 1:] >= 0)  # the same number: neighbours
    if twice.any():
        image = int(sample.index[:, 1:][twice][0])
        raise ValueError(f"both banks hold image {image}: collect the second with first_index")
    return FeatureBank(
        top=_largest(top, _strength(top), a.top.index.shape[1]),
        sample=sample,
        label_histogram=a.label_histogram + b.label_histogram,
        activation_sum=a.activation_sum + b.activation_sum,
        n_images=a.n_images + b.n_images,
    )


def refuse_negative(feature_acts: Tensor) -> None:
    """Raise ValueError for activations (B, d_sae) below 0: a feature that is not active is at 0."""
    if feature_acts.numel() and float(feature_acts.min()) < 0:
        least, k = feature_acts.min(0).values.min(0)
        raise ValueError(
            f"feature {k} has an activation of {least:.3g}, below 0: the SAE must give 0 or more, "
            f"as it does with thresholds of 0 or more"
        )


def _class_indices(images: Tensor, labels: Tensor, n_classes: int | None = None) -> Tensor:
    """labels (B,) as int64. Raises ValueError unless each image has a class index."""
    shape = tuple(labels.shape)
    if shape != (len(images),):
        raise ValueError(f"{len(images)} images with labels of shape {shape}: one each is needed")
    if len(labels) == 0:
        return labels.long()

    low, high = float(labels.min()), float(labels.max())
    if labels.is_floating_point() or low < 0:
        raise ValueError(f"labels are {labels.dtype} from {low:g}: whole numbers from 0 are needed")
    if n_classes is not None and high >= n_classes:
        raise ValueError(f"labels run to {high:g}, but the model has {n_classes} classes")
    return labels.long()


@torch.no_grad()
def collect_feature_bank(
    model,
    loader: Iterable,
    sae,
    mu: Tensor,
    std: Tensor,
    topk: int = 20,
    first_index: int = 0,
    whole: bool = True,
) -> FeatureBank:
    """One pass over the images: which of them fire each feature, how strongly, with which labels.

    `topk` strongest examples are kept of each feature; `first_index` is the index of the loader's
    first image, for banks that will be merged; these are not `whole`, and may be of fewer images
    than topk. Memory grows with d_sae x topk, never with the number of images.

    Raises ValueError for shapes that do not fit, an empty loader, labels that are no class indices,
    and for a topk that is not between 1 and the number of images.
    """
    layer = ExplainedLayer.checked(model, sae, mu, std)
    topk = check_whole("topk", topk, 1)
    first_index = check_whole("first_index", first_index, 0)

    bank = None
    for images, labels in in_order(loader):
        raw = layer.raw(images)
        if bank is None:
            layer.refuse_chance(images)
        n_classes = layer.logits_from_raw(raw[:1]).shape[1]
        labels = _class_indices(images, labels.to(mu.device), n_classes)
        at_once = max(ROWS, ENTRIES // layer.d_sae)
        for some, own in zip(raw.split(at_once), labels.split(at_once), strict=True):
            acts = sae.encode((some - mu) / std)
            refuse_negative(acts)
            part = _bank_in_blocks(acts, own, n_classes, first_index, topk)
            bank = part if bank is None else merge_feature_banks(bank, part)
            first_index += len(own)

    if bank is None or bank.n_images == 0:
        raise ValueError(EMPTY_LOADER)
    if whole and topk > bank.n_images:
        raise ValueError(f"topk = {topk} is more than the {bank.n_images} images there are")
    return bank


class Activity(NamedTuple):
    """Every pair of a feature and an image with a positive activation, features in order."""

    start: Tensor  # (d_sae + 1,) int64; the pairs of feature k are start[k] .. start[k + 1] - 1
    image: Tensor  # (P,) int64, ascending within a feature
    activation: Tensor  # (P,)
    labels: Tensor  # (N,) int64

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """The images (n,) that fire feature k and their activations (n,)."""
        pairs = slice(int(self.start[k]), int(self.start[k + 1]))
        return self.image[pairs], self.activation[pairs]

    def is_active(self, k: int) -> np.ndarray:
        """(N,) bool, whether each image fires feature k."""
        active = np.zeros(len(self.labels), dtype=bool)
        active[self.of(k)[0]] = True
        return active

    @property
    def n_active(self) -> Tensor:
        """(d_sae,) how many images fire each feature."""
        return self.start.diff()

    @property
    def feature(self) -> Tensor:
        """(P,) the feature of each pair."""
        return torch.repeat_interleave(torch.arange(len(self.n_active)), self.n_active)


def check_activity(
    activity: Activity, layer: ExplainedLayer, images: Tensor, labels: Tensor | None = None
) -> None:
    """Raise ValueError unless the activity is of as many features and images (N, ...), which have
    its labels (N,) where these are given."""
    n, d_sae = len(activity.labels), len(activity.n_active)
    if n != len(images):
        raise ValueError(f"the activity is of {n} images, but {len(images)} were given")
    if d_sae != layer.d_sae:
        raise ValueError(f"the activity is of {d_sae} features, but the SAE has {layer.d_sae}")
    if labels is not None and not torch.equal(activity.labels, labels.cpu().long()):
        raise ValueError("the labels are not those of the activity")


def _with(column: Tensor, new: Tensor, n: int) -> Tensor:
    """A column (capacity,) with `new` (m,) after its first n values; twice as large when full.

    Pieces kept in a list would lie between the large arrays that come and go, and memory with such
    holes grows without end.
    """
    if n + len(new) > len(column):
        column = torch.cat([column, column.new_empty(len(column) + len(new))])
    column[n : n + len(new)] = new
    return column


@torch.no_grad()
def collect_activity(layer: ExplainedLayer, images: Tensor, labels: Tensor) -> Activity:
    """The activity of every feature on images (N, ...) with labels (N,), on the CPU.

    Memory grows with the pairs. Raises ValueError for shapes that do not fit, labels that are no
    class indices, and for no images.
    """
    layer = ExplainedLayer.checked(*layer)
    if len(images) == 0:
        raise ValueError("there are no images: give at least one")
    layer.refuse_chance(images)
    n_classes = layer.logits_from_raw(layer.raw(images[:1])).shape[1]
    labels = _class_indices(images, labels, n_classes).cpu()
    columns, n_pairs, at_once = None, 0, max(1, min(ROWS, ENTRIES // layer.d_sae))
    for number, batch in enumerate(images.split(at_once)):
        acts = layer.feature_acts(batch).cpu()
        refuse_negative(acts)
        image, feature = (acts > 0).nonzero().unbind(1)
        new = (feature, number * at_once + image, acts[image, feature])
        columns = columns or [column[:0] for column in new]
        columns = [_with(*given, n_pairs) for given in zip(columns, new, strict=True)]
        n_pairs += len(feature)
    feature, image, activation = (column[:n_pairs] for column in columns)
    counts = torch.bincount(feature, minlength=layer.d_sae)
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = torch.argsort(feature, stable=True)  # images stay ascending within a feature
    return Activity(start, image[order], activation[order], labels)


# --------------------------------------------------------------------------------------------------
# Which pixels drive a feature?
# --------------------------------------------------------------------------------------------------


def is_linear(
    layer: ExplainedLayer, image_shape: tuple[int, ...], images: Tensor | None = None
) -> bool:
    """Whether the preactivations are linear in the pixels of images of that shape.

    They are when they are so on the way between any two images; three pairs of noise images, fixed
    and unlike each other, are tried, and pairs among up to 64 of `images` (N, ...), whose pixels
    may be on another scale.
    """
    generator = torch.Generator().manual_seed(0)
    tried = torch.rand(6, *image_shape, generator=generator, dtype=torch.float32)
    tried = tried.to(layer.mu.device)
    if images is not None:
        n = min(len(images), 64) // 2
        some = images[: 2 * n].to(tried)
        tried = torch.cat([tried[:3], some[:n], tried[3:], some[n:]])
    a, b = tried.chunk(2)
    with torch.no_grad():
        at_a = layer.raw(a)
        at_b = layer.raw(b)
        between = layer.raw(0.3 * a + 0.7 * b)

    bend = (0.3 * at_a + 0.7 * at_b - between).abs().amax(0)
    return not (bend > 1e-4 * torch.cat([at_a, at_b]).abs().amax(0)).any()


def refuse_no_gradients(model, images: Tensor) -> None:
    """Raise ValueError where no gradient leads from the preactivations to the pixels of images
    (N, ...), N > 0: taken as zeros, they would look like a feature that no pixel drives."""
    if torch.is_inference_mode_enabled():
        raise ValueError("input patterns need gradients: leave torch.inference_mode() for them")
    pixels = images[:1].float().clone().detach().requires_grad_()
    with torch.enable_grad():
        raw = model.preactivations(pixels).sum()
        found = (None,)
        if raw.requires_grad:  # by the pixels, or by weights alone
            found = torch.autograd.grad(raw, pixels, allow_unused=True)
    if found[0] is None:
        raise ValueError(
            "no gradient leads from the layer to the pixels, so there are no input patterns: the "
            "network switches gradients off on the way, as torch.no_grad() and detach() do; freeze "
            "its weights with requires_grad_(False) instead"
        )


def _mean_jacobian(
    layer: ExplainedLayer, directions: Tensor, images: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Mean over images (N, ...) of d(raw @ directions) / d(pixels): (n, ...), directions (d_in, n).

    Without images, a blank one of that shape serves, if any would. A single channel is dropped.
    """
    if images is None:
        if not is_linear(layer, shape):
            raise ValueError("the model is not linear in the pixels: pass images to average over")
        images = torch.zeros(1, *shape, dtype=torch.float32)
    if images.dim() < 2 or len(images) == 0:
        raise ValueError("images is empty: give at least one to average over")
    layer.refuse_chance(images, head=False)
    refuse_no_gradients(layer.model, images.to(layer.mu.device))

    def projected(pixels: Tensor) -> Tensor:
        return (layer.raw(pixels) @ directions).sum(0)  # (n,): images do not mix

    total = 0.0
    entries = directions.shape[1] * math.prod(images.shape[1:])  # of the gradients at one image
    at_once = max(1, min(GRADIENT_ROWS, GRADIENT_ENTRIES // max(1, entries)))
    for batch in images.split(at_once):
        pixels = batch.to(layer.mu.device).float().clone()  # made in inference mode, none flow
        total = total + torch.autograd.functional.jacobian(projected, pixels).sum(1)
    mean = total / len(images)
    return mean[:, 0] if mean.dim() == 4 and mean.shape[1] == 1 else mean


def feature_input_pattern(
    model,
    sae,
    mu: Tensor,
    std: Tensor,
    k: int,
    images: Tensor | None = None,
    image_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """Gradient of feature k's pre-threshold activation with respect to the pixels.

    (28, 28) for MNIST. By the chain rule through the standardisation and the model:

        d pre_k / d x  =  sum_i  W_enc[i, k] / std[i]  *  d raw_i / d x

    Exact and the same for every image when the preactivations are linear in the pixels. For any
    other model pass `images` (N, ...), over which the gradient is averaged. The result has the
    shape of one image, a single channel dropped. Raises IndexError for a k out of range; ValueError
    for shapes that do not fit, for no images, and for a non-linear model without images.
    """
    layer = ExplainedLayer.checked(model, sae, mu, std)
    k = check_feature(k, layer.d_sae)
    direction = (sae.W_enc[:, k] / std)[:, None].detach()
    return _mean_jacobian(layer, direction, images, image_shape)[0]


def feature_input_patterns(
    model,
    sae,
    mu: Tensor,
    std: Tensor,
    images: Tensor | None = None,
    image_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """`feature_input_pattern` of every feature: (d_sae, 28, 28).

    Features are linear in the preactivations, so d_in gradients serve all, however many there are.
    """
    layer = ExplainedLayer.checked(model, sae, mu, std)
    basis = torch.eye(len(mu), device=mu.device, dtype=mu.dtype)
    jacobian = _mean_jacobian(layer, basis, images, image_shape)  # (d_in, H, W)
    return torch.tensordot((sae.W_enc.detach() / std[:, None]).T, jacobian, dims=1)


# --------------------------------------------------------------------------------------------------
# Which classes does a feature push?
# --------------------------------------------------------------------------------------------------


class LogitEffect(NamedTuple):
    """Mean change of the logits, (C,), and the class it raises most; -1 when no image changed."""

    mean_delta: Tensor
    top_class: int


class LogitEffects(NamedTuple):
    """The same for every feature, and on how many images each mean was taken."""

    mean_delta: Tensor  # (d_sae, C)
    top_class: Tensor  # (d_sae,)
    n_images: Tensor  # (d_sae,)

    def of(self, k: int) -> LogitEffect:
        return LogitEffect(self.mean_delta[k], int(self.top_class[k]))


def _as_effects(delta_sum: Tensor, n_images: Tensor) -> LogitEffects:
    mean = (delta_sum / n_images.clamp(min=1)[:, None]).float()
    return LogitEffects(mean, torch.where(n_images > 0, mean.argmax(1), -1), n_images)


def _first_preactivations(layer: ExplainedLayer, loader: Iterable, n_eval: int) -> Tensor:
    """Raw preactivations (n, d_in) of the loader's first n_eval images; ValueError without any."""
    check_whole("n_eval", n_eval, 1)
    parts, missing = [], n_eval
    for images, _ in in_order(loader):
        parts.append(layer.raw(images[:missing]))
        if len(parts) == 1:
            layer.refuse_chance(images)
        missing -= len(parts[-1])
        if missing == 0:
            break
    if missing == n_eval:
        raise ValueError(EMPTY_LOADER)
    return torch.cat(parts)


def _steering_effects(layer: ExplainedLayer, raw: Tensor, shifts: Tensor) -> LogitEffects:
    """Effects of adding each row of `shifts` (n, d_in) to every row of raw (N, d_in)."""
    base = layer.logits_from_raw(raw).sum(0, dtype=torch.float64)
    sums = torch.zeros(len(shifts), len(base), dtype=torch.float64, device=raw.device)
    at_once = max(1, HEAD_ROWS // len(raw))
    for first in range(0, len(shifts), at_once):
        some = shifts[first : first + at_once, None]  # (n, 1, d_in)
        moved = raw + some
        logits = layer.logits_from_raw(moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
        sums[first : first + at_once] = logits.sum(1, dtype=torch.float64) - base
    return _as_effects(sums, torch.full((len(shifts),), len(raw), device=raw.device))


def _steps(layer: ExplainedLayer, alpha: float) -> Tensor:
    """(d_sae, d_in) what alpha of each feature adds to raw preactivations. Raises ValueError."""
    try:
        number = float(alpha)
    except (OverflowError, RuntimeError, ValueError):  # too many digits, or too many numbers
        number = math.nan
    step = number * layer.sae.W_dec.detach() * layer.std
    if not step.isfinite().all():
        raise ValueError(f"alpha is {_met(alpha)}; it must be finite, and what it adds as well")
    return step


@torch.no_grad()
def feature_logit_effects(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, alpha: float = 1.0, n_eval: int = 2000
) -> LogitEffects:
    """`feature_logit_effect` of every feature."""
    layer = ExplainedLayer.checked(model, sae, mu, std)
    raw = _first_preactivations(layer, loader, n_eval)
    return _steering_effects(layer, raw, _steps(layer, alpha))


@torch.no_grad()
def feature_logit_effect(
    model,
    loader: Iterable,
    sae,
    mu: Tensor,
    std: Tensor,
    k: int,
    alpha: float = 1.0,
    n_eval: int = 2000,
) -> LogitEffect:
    """What adding feature k does to the logits, over the loader's first `n_eval` images.

    alpha * W_dec[k], which is alpha * W_dec[k] * std in the space of the model, is added to the
    image's own preactivations, not to their reconstruction. Raises IndexError for a k out of range,
    ValueError for shapes that do not fit, an empty loader or n_eval < 1.
    """
    layer = ExplainedLayer.checked(model, sae, mu, std)
    k = check_feature(k, layer.d_sae)
    raw = _first_preactivations(layer, loader, n_eval)
    return _steering_effects(layer, raw, _steps(layer, alpha)[k : k + 1]).of(0)


def _ablation_effects(
    layer: ExplainedLayer, loader: Iterable, features: Tensor, n_eval: int
) -> LogitEffects:
    """Effects of removing each of `features` (n,) from the first n_eval images that fire it."""
    check_whole("n_eval", n_eval, 1)
    shifts = layer.sae.W_dec.detach()[features] * layer.std  # (n, d_in)
    n_classes = layer.logits_from_raw(layer.mu[None]).shape[1]
    counts = torch.zeros(len(features), dtype=torch.int64, device=layer.mu.device)
    sums = counts.new_zeros(len(features), n_classes, dtype=torch.float64)
    seen = 0
    for images, _ in in_order(loader):
        raw = layer.raw(images)
        if seen == 0:
            layer.refuse_chance(images)
        seen += len(raw)
        base = layer.logits_from_raw(raw)
        feature_acts = layer.sae.encode((raw - layer.mu) / layer.std)[:, features]  # (B, n)
        refuse_negative(feature_acts)
        fires = (feature_acts > 0).T  # (n, B)
        wanted = fires & (counts[:, None] + fires.cumsum(1) <= n_eval)
        counts += wanted.sum(1)
        which, image = wanted.nonzero().unbind(1)  # each pair is a row of the head
        for w, i in zip(which.split(HEAD_ROWS), image.split(HEAD_ROWS), strict=True):
            contribution = shifts[w].mul_(feature_acts[i, w, None])
            delta = layer.logits_from_raw(raw[i].sub_(contribution)) - base[i]
            sums.index_add_(0, w, delta.double())

    if seen == 0:
        raise ValueError(EMPTY_LOADER)
    return _as_effects(sums, counts)


@torch.no_grad()
def feature_ablation_effects(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, n_eval: int = 2000
) -> LogitEffects:
    """`feature_ablation_effect` of every feature; its cost grows with the number of pairs."""
    layer = ExplainedLayer.checked(model, sae, mu, std)
    every = torch.arange(layer.d_sae, device=mu.device)
    return _ablation_effects(layer, loader, every, n_eval)


@torch.no_grad()
def feature_ablation_effect(
    model, loader: Iterable, sae, mu: Tensor, std: Tensor, k: int, n_eval: int = 2000
) -> LogitEffect:
    """What removing feature k does to the logits, over the first `n_eval` images that fire it.

    Only its own contribution f_k * W_dec[k] is subtracted from the image's preactivations. The
    rest, the part that the SAE does not reconstruct included, stays, so the SAE's error is not
    mistaken for the feature's effect. Zeros for a feature that no image fires. Raises like
    `feature_logit_effect`.
    """
    layer = ExplainedLayer.checked(model, sae, mu, std)
    only = torch.tensor([check_feature(k, layer.d_sae)], device=mu.device)
    return _ablation_effects(layer, loader, only, n_eval).of(0)


class Removals(NamedTuple):
    """What removing each feature alone does, over all images that fire it."""

    mean_delta: Tensor  # (d_sae, C) float64, mean change of the logits, as `LogitEffects` has it
    n_images: Tensor  # (d_sae,) int64, images that fire it
    size: Tensor  # (d_sae,) float64, sum over images of the length of the change of centred logits
    n_changed: Tensor  # (d_sae,) int64, images whose prediction changes

    @property
    def influence(self) -> Tensor:
        """(d_sae,) its share of all that single removals do; they sum to 1 (0 where none fires)."""
        return self.size / self.size.sum().clamp(min=1e-300)

    @property
    def changes(self) -> Tensor:
        """(d_sae,) share of the images that fire it whose prediction changes."""
        return self.n_changed.float() / self.n_images.clamp(min=1)


@torch.no_grad()
def removal_effects(layer: ExplainedLayer, images: Tensor, activity: Activity) -> Removals:
    """What removing each feature does to the logits of images (N, ...), whose `activity` is given.

    As in `feature_ablation_effect`, only its own contribution is subtracted. Centred logits have
    their mean over classes taken away, which no prediction depends on. Raises ValueError for an
    activity of another number of images or features.
    """
    layer = ExplainedLayer.checked(*layer)
    check_activity(activity, layer, images)
    raw = layer.raw_of_all(images)
    base = torch.cat([layer.logits_from_raw(some) for some in raw.split(ROWS)])
    predicted = base.argmax(1)
    shifts = layer.sae.W_dec.detach() * layer.std
    d_sae, n_classes = len(shifts), base.shape[1]
    sums = torch.zeros(d_sae, n_classes, dtype=torch.float64, device=raw.device)
    size, changed = sums.new_zeros(d_sae), sums.new_zeros(d_sae)
    columns = (activity.feature, activity.image, activity.activation)
    pairs = [column.split(HEAD_ROWS) for column in columns]
    for part in zip(*pairs, strict=True):
        k, image, activation = (column.to(raw.device) for column in part)
        contribution = shifts[k].mul_(activation[:, None])
        logits = layer.logits_from_raw(raw[image].sub_(contribution))
        delta = logits - base[image]
        sums.index_add_(0, k, delta.double())
        centred = delta - delta.mean(1, keepdim=True)
        size.index_add_(0, k, centred.norm(dim=1).double())
        changed.index_add_(0, k, (logits.argmax(1) != predicted[image]).double())
    n = activity.n_active
    mean = sums.cpu() / n[:, None].clamp(min=1)
    return Removals(mean, n, size.cpu(), changed.cpu().long())


@torch.no_grad()
def contributions(
    layer: ExplainedLayer, images: Tensor, activity: Activity
) -> tuple[Tensor, Tensor]:
    """What each pair's feature adds to the logits of its image, (P, C), and these logits, (N, C),
    of images (N, ...) whose `activity` is given.

    It is what the image loses with the feature: its logits before minus those after, as in
    `feature_ablation_effect`. What two features add is not what both together add. Raises
    ValueError for an activity of another number of images or features.
    """
    check_activity(activity, layer, images)
    raw = layer.raw_of_all(images)
    logits = torch.cat([layer.logits_from_raw(some) for some in raw.split(ROWS)])
    shifts = layer.sae.W_dec.detach() * layer.std
    added = []
    columns = (activity.feature, activity.image, activity.activation)
    pairs = [column.split(HEAD_ROWS) for column in columns]
    for part in zip(*pairs, strict=True):
        k, image, activation = (column.to(raw.device) for column in part)
        without = raw[image].sub_(shifts[k].mul_(activation[:, None]))
        added.append((logits[image] - layer.logits_from_raw(without)).cpu())
    return torch.cat(added), logits.cpu()


# --------------------------------------------------------------------------------------------------
# How readable are features, which are alike, and do they return when the SAE is trained again?
# --------------------------------------------------------------------------------------------------


class NearestFeatures(NamedTuple):
    """For every feature the other one whose decoder direction is most alike, (d_sae,) each; -1 and
    0 when there is no other feature."""

    feature: Tensor
    cosine: Tensor


@torch.no_grad()
def nearest_features(W_dec: Tensor) -> NearestFeatures:
    """Nearest neighbours among the rows of W_dec (d_sae, d_in), by cosine, on the CPU."""
    if len(W_dec) < 2:
        return NearestFeatures(torch.full((len(W_dec),), -1), torch.zeros(len(W_dec)))
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    cosines, features = [], []
    for first in range(0, len(unit), ROWS):  # (ROWS, d_sae) at a time, never (d_sae, d_sae)
        similarity = unit[first : first + ROWS] @ unit.T
        similarity.diagonal(first).fill_(-2.0)  # never itself
        cosine, feature = similarity.max(1)
        cosines.append(cosine)
        features.append(feature)
    return NearestFeatures(torch.cat(features).cpu(), torch.cat(cosines).cpu())


class _ByImage(NamedTuple):
    """The pairs of an Activity in the order of their images."""

    start: Tensor  # (N + 1,) int64; the pairs of image i are start[i] .. start[i + 1] - 1
    feature: Tensor  # (P,) int32

    @classmethod
    def of(cls, activity: Activity) -> _ByImage:
        counts = torch.bincount(activity.image, minlength=len(activity.labels))
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order = torch.argsort(activity.image, stable=True)
        return cls(start, activity.feature.int()[order])


def _images_in_common(activity: Activity, by_image: _ByImage, first: int, last: int) -> Tensor:
    """(last - first, d_sae) int32, how many images fire both, for the features first .. last - 1.

    Sparse: each pair of such a feature and an image counts the features that the image fires.
    """
    d_sae = len(activity.n_active)
    common = torch.zeros((last - first) * d_sae, dtype=torch.int32)
    pairs = slice(int(activity.start[first]), int(activity.start[last]))
    row = torch.repeat_interleave(torch.arange(last - first), activity.n_active[first:last])
    fires = by_image.start.diff()  # (N,) features of each image
    at_once = max(1, COUNTED // max(1, int(fires.max())))
    for image, own in zip(activity.image[pairs].split(at_once), row.split(at_once), strict=True):
        n = fires[image]
        end = n.cumsum(0)
        repeated = functools.partial(torch.repeat_interleave, repeats=n, output_size=int(n.sum()))
        place = torch.arange(int(n.sum()))
        place += repeated(by_image.start[image] - end + n)
        both = repeated(own * d_sae) + by_image.feature[place]
        common.index_add_(0, both, torch.ones_like(both, dtype=torch.int32))
    return common.view(-1, d_sae)


def most_alike(similarity: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest of each row (F, d_sae) but column own (F,): columns, values (F, n)."""
    others = similarity.scatter(1, own[:, None], -2.0)
    best = others.topk(min(n, similarity.shape[1] - 1), dim=1)
    return best.indices, best.values


def most_alike_rows(unit: Tensor, own: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`most_alike` by the products of the rows `own` (F,) of unit (d_sae, d_in) with all rows."""
    found = [most_alike(unit[some] @ unit.T, some, n) for some in own.split(ROWS)]
    columns, values = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(values)


def firing_together(activity: Activity, n: int) -> tuple[Tensor, Tensor]:
    """For every feature the n others whose activity, 0 or 1, correlates most with its own.

    Where p and q of the images fire two features, and r fire both, Pearson's correlation is
    (r - p q) / sqrt(p (1 - p) q (1 - q)). It counts as 0 for a silent feature.

    Returns the others, best first, and the correlations, (d_sae, n) each.
    """
    n_images = len(activity.labels)
    share = activity.n_active.float() / n_images
    spread = (share * (1 - share)).sqrt()

    by_image, found = _ByImage.of(activity), []
    for some in torch.arange(len(share)).split(ROWS):  # (ROWS, d_sae) at a time
        common = _images_in_common(activity, by_image, int(some[0]), int(some[-1]) + 1)
        covariance = common.float() / n_images - torch.outer(share[some], share)
        correlation = covariance / torch.outer(spread[some], spread).clamp(min=1e-9)
        found.append(most_alike(correlation, some, n))
    others, correlations = zip(*found, strict=True)
    return torch.cat(others), torch.cat(correlations)


def pattern_roughness(heats: Tensor) -> Tensor:
    """How noisy each pattern (n, H, W) is, (n,).

    The mean squared difference of neighbouring pixels over twice the mean square: 0 for a constant
    picture, 1 for white noise of mean zero, up to 2 for a chessboard; 0 for an empty one. Raises
    ValueError for patterns without neighbouring pixels.
    """
    if min(heats.shape[1:]) < 2:
        raise ValueError(f"patterns of shape {tuple(heats.shape)} have no neighbouring pixels")
    down = heats.diff(dim=1).square().mean((1, 2))
    across = heats.diff(dim=2).square().mean((1, 2))
    power = heats.square().mean((1, 2))
    ratio = (down + across) / 4 / power.clamp(min=torch.finfo(heats.dtype).tiny)
    return torch.where(power > 0, ratio, 0.0)


ALIKE = 0.7  # cosine and correlation from which two features are the same
MATCHED = 1024  # features whose similarities to all others are held at once


class Matches(NamedTuple):
    """For every feature of one SAE its counterpart in another, (d_sae,) each: the one whose smaller
    of the two similarities is largest."""

    feature: Tensor
    cosine: Tensor  # of the decoder rows
    correlation: Tensor  # of the activations over images

    @property
    def similarity(self) -> Tensor:
        """(d_sae,) the smaller of cosine and correlation."""
        return torch.minimum(self.cosine, self.correlation)

    @property
    def returned(self) -> Tensor:
        """(d_sae,) bool"""
        return self.similarity >= ALIKE


def _correlations(layer: ExplainedLayer, images: Tensor, other, own: slice) -> Tensor:
    """Pearson correlations over images of n features, `own`, with those of `other`: (n, d_other).

    0 for a feature that does not vary. Activations are taken from about their mean, that of the
    first batch, or the products of a feature that fires strongly everywhere would lose the digits
    that say how it varies.
    """
    n, d_other = len(range(layer.d_sae)[own]), len(other.W_dec)
    about = None
    total = square = 0.0
    product = torch.zeros(n, d_other, dtype=torch.float64, device=layer.mu.device)
    for batch in images.split(max(ROWS, min(4 * ROWS, ENTRIES // (n + d_other)))):
        z = layer.standardised(batch)
        acts = torch.cat([layer.sae.encode(z)[:, own], other.encode(z)], 1)
        if about is None:
            about = acts.mean(0)
        acts = acts - about
        total = total + acts.sum(0).double()
        square = square + acts.square().sum(0).double()
        product += acts[:, :n].T @ acts[:, n:]

    mean = total / len(images)
    spread = (square / len(images) - mean.square()).clamp(min=0).sqrt()
    product /= len(images)
    product -= torch.outer(mean[:n], mean[n:])  # the covariance
    product /= torch.outer(spread[:n], spread[n:]).clamp_(min=1e-12)
    return product.float()


@torch.no_grad()
def match_features(layer: ExplainedLayer, images: Tensor, other) -> Matches:
    """Counterparts of the features of the layer's SAE among those of `other`, on the CPU.

    `other` is an SAE of the same preactivations, images (N, ...). MATCHED features at a time are
    compared with all others, each time over all images.
    """
    unit = torch.nn.functional.normalize(layer.sae.W_dec.detach(), dim=1)
    other_unit = torch.nn.functional.normalize(other.W_dec.detach(), dim=1)
    found = []
    for first in range(0, len(unit), MATCHED):
        own = slice(first, first + MATCHED)
        cosine = (unit[own] @ other_unit.T).cpu()
        correlation = _correlations(layer, images, other, own).cpu()
        best = torch.minimum(cosine, correlation).argmax(1)
        each = torch.arange(len(best))
        found.append((best, cosine[each, best], correlation[each, best]))
    return Matches(*(torch.cat(column) for column in zip(*found, strict=True)))


class Return(NamedTuple):
    """How much of one SAE is found again in another, each in [0, 1] but for negative similarity."""

    features: float  # share of the features that fire
    energy: float  # share of the sum over features of density * mean activation^2
    similarity: float  # mean over features, weighted by density: without a threshold, so steadier


def how_much_returns(matches: Matches, density: Tensor, mean_activation: Tensor) -> Return:
    """`matches` of an SAE's features, and how they fire: share of images, and mean activation where
    active, (d_sae,) each. Zeros for an SAE that never fires.

    With unit decoder rows, density * mean activation^2 is about what a feature adds to the
    reconstruction's square, so that features count by the work they do.
    """
    density, mean_activation = density.cpu().double(), mean_activation.cpu().double()
    returned = matches.returned.double()
    energy = density * mean_activation.square()
    fires = (density > 0).double()

    def weighted_mean(values: Tensor, weights: Tensor) -> float:
        return float((values * weights).sum() / weights.sum().clamp(min=1e-12))

    return Return(
        features=weighted_mean(returned, fires),
        energy=weighted_mean(returned, energy),
        similarity=weighted_mean(matches.similarity.double(), density),
    )


# --------------------------------------------------------------------------------------------------
# Everything about the features, and one line of a report
# --------------------------------------------------------------------------------------------------


class Analysis(NamedTuple):
    """All that is known about the features, from one set of images."""

    bank: FeatureBank
    heats: Tensor  # (d_sae, H, W)
    logit: LogitEffects
    ablation: LogitEffects
    nearest: NearestFeatures
    inked: np.ndarray  # (H, W) bool, the pixels that images ink
    activity: Activity
    removed: Removals


def feature_record(k: int, analysis: Analysis) -> dict:
    """What is known about feature k, plain values: a line of feature_report.json.

    Raises IndexError for a k out of range.
    """
    bank, logit, ablation, nearest = analysis.bank, *analysis[2:5]
    histogram = bank.label_histogram[check_feature(k, len(bank.label_histogram))]
    top = bank.top.of(k)
    n_active = int(histogram.sum())
    return {
        "feature": k,
        "mean_active": float(bank.feature_density[k]),
        "mean_activation_when_active": float(bank.mean_activation_when_active[k]),
        "n_active": n_active,
        "label_histogram": histogram.tolist(),
        "label_mode_when_active": int(histogram.argmax()) if n_active else None,
        "top_examples": top.index.tolist(),
        "top_scores": top.activation.tolist(),
        "top_labels": top.label.tolist(),
        "logit_boost_class": int(logit.top_class[k]),
        "logit_delta_vector": logit.mean_delta[k].tolist(),
        "ablation_delta_vector": ablation.mean_delta[k].tolist(),
        "ablation_images": int(ablation.n_images[k]),
        "nearest_feature": int(nearest.feature[k]),
        "nearest_cosine": float(nearest.cosine[k]),
        "pattern_roughness": float(pattern_roughness(analysis.heats[k : k + 1])[0]),
        "influence": float(analysis.removed.influence[k]),
        "predictions_changed": float(analysis.removed.changes[k]),
    }


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

GREYS = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)  # (256, 3)


def save_pixels(pixels: np.ndarray, path: str | Path, palette: np.ndarray = GREYS) -> None:
    """Save a picture as PNG, whole or not at all.

    pixels uint8: colour (height, width, 3), or numbers (height, width) of the colours of a palette
    (n, 3) uint8, greys unless another one is given. Raises ValueError for anything else.
    """
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
        raise ValueError(
            f"a picture has shape {pixels.shape} and type {pixels.dtype}; "
            f"expected uint8 (height, width) or (height, width, 3)"
        )
    image = Image.fromarray(pixels)
    if pixels.ndim == 2:  # with a palette, Pillow spares the filters, which take most of the time
        image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    write_whole(path, buffer.getvalue())


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a Figure as PNG, whole or not at all."""
    write_whole(path, figure_png(figure))


# --------------------------------------------------------------------------------------------------
# Pictures: what all share. They are painted into arrays of uint8, which is many times faster than
# drawing a figure; what all pictures of a kind have in common is painted once.
# --------------------------------------------------------------------------------------------------

DPI = 100
TILE = 56  # screen pixels across an image in a gallery, about: enlarged by whole numbers
PATTERN = 224  # and across a pattern
PANEL_PATTERN = 150  # and across the pattern of a panel
COLUMNS = 10  # tiles in a row of a gallery
GAP = 4  # screen pixels between two tiles
HEADER = 24  # screen pixels above a block of tiles, for the line that says what it shows
MARGIN, TITLE = 12, 30  # screen pixels around a picture, and above it for the title
WHITE, FRAME = 255, 217  # grey levels; ink is dark on white
MONO, BOLD = "DejaVuSansMono", "DejaVuSansMono-Bold"

STEPS = 100  # colours of a pattern on either side of white
TEXT = (2 * STEPS + 1, 254)  # numbers of the palette's black and white; greys lie between them
NO_INK = 255  # the palette's number for pixels that images do not ink


@functools.cache
def pattern_palette() -> np.ndarray:
    """The 256 colours of patterns, (256, 3) uint8.

    0 to 2 STEPS: values from -1 to 1, blue over white to red; then the greys of TEXT, black to
    white; the last one, NO_INK, is light grey.
    """
    from matplotlib import colormaps

    values = np.linspace(0, 1, 2 * STEPS + 1)
    colours = colormaps["RdBu_r"](values, bytes=True)[:, :3]
    greys = GREYS[np.linspace(0, 255, TEXT[1] - TEXT[0] + 1).round().astype(int)]
    return np.concatenate([colours, greys, GREYS[[224]]])


@functools.cache
def _shown_figure() -> type[Figure]:
    """The class of figures that a notebook shows without being told to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            return figure_png(self)

    return ShownFigure


def new_figure(width: float, height: float) -> Figure:
    """A Figure of width x height screen pixels, registered nowhere: it needs no closing. As the
    last value of a notebook's cell it is shown."""
    return _shown_figure()(figsize=(width / DPI, height / DPI), dpi=DPI)


def _figure_of(
    pixels: np.ndarray, save_path: str | Path | None, palette: np.ndarray = GREYS
) -> Figure:
    """A Figure that shows a picture pixel for pixel; it is saved as well where there is a path.

    Picture and palette are those of `save_pixels`.
    """
    if save_path is not None:
        save_pixels(pixels, save_path, palette)
    colours = palette[pixels] if pixels.ndim == 2 else pixels
    figure = new_figure(pixels.shape[1], pixels.shape[0])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(colours, interpolation="nearest", aspect="auto")
    return figure


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font, `size` pixels high, of those that come with matplotlib."""
    from matplotlib import get_data_path

    path = f"{get_data_path()}/fonts/ttf/{name}.ttf"
    basic = ImageFont.Layout.BASIC  # the other one depends on what is installed
    return ImageFont.truetype(path, size, layout_engine=basic)


@functools.lru_cache(maxsize=10_000)  # most captions of a gallery were written before
def _lettering(
    text: str, size: int = 12, name: str = "DejaVuSans", levels: tuple[int, int] = (0, WHITE)
) -> np.ndarray:
    """A line of text, (height, width) uint8, with `levels` of ink and paper."""
    if name in (MONO, BOLD) and len(text) > 1:  # letters side by side: each is drawn only once
        return np.hstack([_lettering(letter, size, name, levels) for letter in text])
    font = _font(name, size)
    ink, paper = levels
    ascent, descent = font.getmetrics()
    line = Image.new("L", (round(font.getlength(text)), ascent + descent), paper)
    ImageDraw.Draw(line).text((0, ascent), text, fill=ink, font=font, anchor="ls")
    return np.asarray(line)


def _paste(page: np.ndarray, part: np.ndarray, top: int, left: int) -> None:
    """Put a picture, perhaps a grey one into one of colours, into `page`, cut at its edges."""
    space = page[top : top + part.shape[0], left : left + part.shape[1]]
    part = part[: space.shape[0], : space.shape[1]]
    space[:] = part if part.ndim == page.ndim else part[:, :, None]


def _zoom(shape: tuple[int, ...], width: int) -> int:
    """How many screen pixels each pixel of an (H, W) is given so that it is about `width` wide."""
    if len(shape) != 2:
        raise ValueError(f"the pattern has shape {tuple(shape)}; expected (H, W)")
    return max(1, round(width / shape[1]))


def _enlarged(pictures: np.ndarray, zoom: int) -> np.ndarray:
    """(..., H, W) -> (..., zoom * H, zoom * W)"""
    return pictures.repeat(zoom, -1).repeat(zoom, -2)


def _as_array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def grey_images(images) -> np.ndarray:
    """Images as an array (N, H, W) with ink in [0, 1]. Raises ValueError when they are not grey or
    run further; `as_ink` makes such ones of others."""
    array = _as_array(images)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise ValueError(f"images have shape {array.shape}; expected (N, H, W) or (N, 1, H, W)")
    low, high = array.min(initial=0), array.max(initial=0)
    if not (low >= 0 and high <= 1):  # NaN is refused as well
        raise ValueError(
            f"pixels run from {low:.3g} to {high:.3g}; pictures show ink from 0 to 1: give "
            f"as_ink(images)"
        )
    return array


LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
BLANK_SHARE = (
    0.3  # of the pixels that have one and the same value: the paper that others are ink on
)


def as_ink(images: Tensor) -> Tensor:
    """Images (N, C, H, W), C = 1 or 3, as pictures show them: (N, 1, H, W) ink from 0 to 1.

    Values outside of [0, 1], as of normalised images, are brought there by the smallest and the
    largest of each channel; colours become their luminance. What is light is shown dark where the
    smallest value is that of a blank ground, as in MNIST, and light otherwise. Raises ValueError
    for another number of channels and for values that are not finite.
    """
    images = images[:, None] if images.dim() == 3 else images
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape)
        raise ValueError(f"images have shape {shape}; expected (N, C, H, W) with C = 1 or 3")
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    if not bool(torch.isfinite(high - low).all()):
        raise ValueError("images hold values that are not finite numbers")
    light = images.float()
    if low.min() < 0 or high.max() > 1:
        span = (high - low).clamp(min=1e-12)
        light = (light - low[:, None, None]) / span[:, None, None]
    if images.shape[1] == 3:
        weights = torch.tensor(LUMINANCE, device=images.device)
        light = (light * weights[:, None, None]).sum(1, keepdim=True).clamp(0, 1)
    is_ground = float((light <= light.min()).float().mean()) >= BLANK_SHARE
    return light if is_ground else 1 - light


def as_patterns(heats) -> np.ndarray:
    """Patterns as an array (d_sae, H, W). Raises ValueError for another shape."""
    array = _as_array(heats)
    if array.ndim != 3:
        raise ValueError(f"the patterns have shape {array.shape}; expected (d_sae, H, W)")
    return array


def as_mask(inked, shape: tuple[int, ...]) -> np.ndarray | None:
    """`inked` as a bool array. Raises ValueError when it has not the shape of the pattern."""
    if inked is None:
        return None
    mask = _as_array(inked).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"inked has shape {mask.shape}, but patterns have shape {tuple(shape)}")
    return mask


# --------------------------------------------------------------------------------------------------
# Galleries
# --------------------------------------------------------------------------------------------------

# (row of tiles above which it stands, column at which it starts, text)
GALLERY_HEADERS = (
    (0, 0, "strongest images (under each its label: activation)"),
    (2, 0, "from the strongest quarter of its active range"),
    (2, 5, "from the second quarter"),
    (3, 0, "from the third quarter"),
    (3, 5, "from the weakest quarter"),
)
HEADERS_ABOVE = (1, 1, 2, 3)  # lines of headers above each row of tiles
SHORT_NAME = 2  # letters of a class's name that leave room for an activation beside it


def _three_digits(value: float) -> str:
    """A positive number in few characters: 1.83, 12.6, 128, 4e-03."""
    if value < 0.005:
        return f"{value:.0e}"
    if value < 9.995:
        return f"{value:.2f}"
    if value < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}"


def _cut(text: str, n: int) -> str:
    """A text in at most n letters."""
    return text if len(text) <= n else f"{text[: n - 1]}…"


def _gallery_title(k: int, bank: FeatureBank) -> str:
    n_active = int(bank.label_histogram[k].sum())
    if n_active == 0:
        return f"Feature {k}: never fires on these {bank.n_images:,} images"
    percent = 100 * n_active / bank.n_images
    return f"Feature {k}: fires on {percent:.3g}% of {bank.n_images:,} images"


def _gallery_examples(k: int, bank: FeatureBank) -> tuple[list[int], Examples]:
    """The numbers of a gallery's tiles that are not empty, row by row, and what is on them."""
    blocks = [bank.top.of(k).at(slice(2 * COLUMNS)), *bank.bands(k)]
    starts = [0, *range(2 * COLUMNS, 4 * COLUMNS, PER_BAND)]
    tiles = []
    for start, block in zip(starts, blocks, strict=True):
        tiles += range(start, start + len(block.index))
    columns = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    return tiles, Examples(*columns)


class GalleryPainter:
    """Paints galleries: strongest images first, then some of each quarter of the active range."""

    def __init__(self, images, classes: Sequence[str] = ()):
        self.images, self.classes = grey_images(images), classes
        height, width = self.images.shape[1:]
        self.zoom = _zoom((height, width), TILE)
        self.tile_height, self.tile_width = self.zoom * height + 2, self.zoom * width + 2  # framed

        self.line = len(_lettering("", 10, MONO))
        self.lines = 2 if max(map(len, classes), default=0) > SHORT_NAME else 1
        pitch = self.tile_height + self.lines * self.line  # captions stand below tiles
        tops = [TITLE + HEADER * n + pitch * row for row, n in enumerate(HEADERS_ABOVE)]
        lefts = [MARGIN + (self.tile_width + GAP) * column for column in range(COLUMNS)]
        self.places = [(top, left) for top in tops for left in lefts]  # of the tiles

        self.height = tops[-1] + pitch + MARGIN
        self.width = lefts[-1] + self.tile_width + GAP + MARGIN
        self.background = np.full((self.height, self.width), WHITE, np.uint8)
        for row, column, text in GALLERY_HEADERS:
            _paste(self.background, _lettering(text), tops[row] - HEADER + 5, lefts[column])

    def paint(self, k: int, bank: FeatureBank) -> np.ndarray:
        """The gallery of feature k, grey (height, width) uint8.

        Raises IndexError for a k out of range and for images that are not the bank's.
        """
        numbers, examples = _gallery_examples(check_feature(k, len(bank.label_histogram)), bank)
        index = examples.index.numpy()
        n_images, last = len(self.images), index.max(initial=-1)
        if last >= n_images:
            raise IndexError(f"feature {k} fires on image {last}, but only {n_images} were given")
        shades = (255.5 - 255 * self.images[index].clip(0, 1)).astype(np.uint8)
        tiles = np.full((len(index), self.tile_height, self.tile_width), FRAME, np.uint8)
        tiles[:, 1:-1, 1:-1] = _enlarged(shades, self.zoom)
        page = self.background.copy()
        _paste(page, _lettering(_gallery_title(k, bank), 15, BOLD), 8, MARGIN)
        labels, activations = examples.label.tolist(), examples.activation.tolist()
        for i, number in enumerate(numbers):
            top, left = self.places[number]
            name, activation = class_name(self.classes, labels[i]), _three_digits(activations[i])
            texts = [f"{name}: {activation}"]
            if self.lines == 2:
                texts = [
                    _cut(name, self.tile_width // len(_lettering("m", 10, MONO)[0])),
                    activation,
                ]
            _paste(page, tiles[i], top, left)
            for n, text in enumerate(texts):
                caption = _lettering(text, 10, MONO)[:, : self.tile_width]
                indent = (self.tile_width - caption.shape[1]) // 2
                _paste(page, caption, top + self.tile_height + n * self.line, left + indent)
        return page


def show_feature_gallery(
    k: int,
    bank: FeatureBank,
    images,
    save_path: str | Path | None = None,
    classes: Sequence[str] = (),
) -> Figure:
    """The images that fire feature k: the strongest ones, then five from each quarter of its range.

    `images` (N, H, W) or (N, 1, H, W) are those the bank was collected on, in the same order. A
    feature that never fires gets a picture that says so. `classes` are the names of the labels.
    Raises IndexError for a k out of range or too few images, ValueError for images of another shape
    or scale.
    """
    return _figure_of(GalleryPainter(images, classes).paint(k, bank), save_path)


# --------------------------------------------------------------------------------------------------
# Patterns
# --------------------------------------------------------------------------------------------------


def display_scale(heat: np.ndarray, inked: np.ndarray | None) -> float:
    """What full colour stands for in the pattern `heat` (H, W), in units of the pattern.

    The 99th percentile of |heat| where there is ink, so one pixel cannot dim all; at least a
    quarter of the largest, so noise does not scale a pattern of few pixels. 0 for one of zeros.
    """
    visible = np.abs(heat if inked is None else heat[inked])
    if not visible.size:
        return 0.0
    return max(float(np.quantile(visible, 0.99)), float(visible.max()) / 4)


def _pattern_colours(heat: np.ndarray, scale: float, inked: np.ndarray | None) -> np.ndarray:
    """`heat` (H, W) as numbers of the palette's colours, (H, W) uint8."""
    shown = heat / scale if scale else np.zeros_like(heat)
    colours = np.rint(STEPS * (shown.clip(-1, 1) + 1)).astype(np.uint8)
    if inked is not None:
        colours[~inked] = NO_INK
    return colours


class PatternPainter:
    """Paints patterns: red pixels raise the feature, blue ones lower it, grey are not `inked`."""

    def __init__(self, shape: tuple[int, int], inked: np.ndarray | None = None):
        self.shape, self.inked = tuple(shape), as_mask(inked, shape)
        self.zoom = _zoom(shape, PATTERN)
        self.top = TITLE + len(_lettering("", 11, MONO)) + 4
        height, width = self.zoom * shape[0], self.zoom * shape[1]
        size = (self.top + height + MARGIN, width + 2 * MARGIN + 76)
        self.background = np.full(size, TEXT[1], np.uint8)

        scale = np.linspace(2 * STEPS, 0, height).round().astype(np.uint8)
        left = width + 2 * MARGIN
        _paste(self.background, scale[:, None].repeat(12, 1), self.top, left)
        for share, text in ((0.0, "raises"), (0.5, "0"), (1.0, "lowers")):
            line = _lettering(text, 11, levels=TEXT)
            top = self.top + round(share * (height - len(line)))
            _paste(self.background, line, top, left + 18)

    def paint(self, heat: np.ndarray, k: int) -> np.ndarray:
        """The pattern `heat` (H, W) of feature k, (height, width) uint8 of `pattern_palette`.

        Raises ValueError for another shape.
        """
        if heat.shape != self.shape:
            raise ValueError(f"the pattern has shape {heat.shape}, expected {self.shape}")
        scale = display_scale(heat, self.inked)
        title = f"Feature {k}: pixels that drive it"
        note = f"full colour = {scale:.2g} per unit of ink"

        page = self.background.copy()
        colours = _pattern_colours(heat, scale, self.inked)
        _paste(page, _enlarged(colours, self.zoom), self.top, MARGIN)
        _paste(page, _lettering(title, 14, BOLD, TEXT), 6, MARGIN)
        _paste(page, _lettering(note, 11, MONO, TEXT), TITLE, MARGIN)
        return page


def visualize_feature_pattern(
    heat, k: int, save_path: str | Path | None = None, inked=None
) -> Figure:
    """The input pattern `heat` (H, W) of feature k in colour, zero being white.

    `inked` (H, W) bool marks the pixels that images ink; the others are drawn grey and do not set
    the scale, since what a model does with a pixel that is all but always empty means nothing.
    Raises ValueError for other shapes.
    """
    heat = _as_array(heat)
    pixels = PatternPainter(heat.shape, inked).paint(heat, k)
    return _figure_of(pixels, save_path, pattern_palette())


def write_feature_pictures(
    folder: str | Path,
    features: Iterable[int],
    bank: FeatureBank,
    images,
    heats,
    inked=None,
    classes: Sequence[str] = (),
) -> None:
    """feature_{k}_gallery.png, feature_{k}_pattern.png and feature_{k}_pattern.npy of `features`.

    `heats` (d_sae, H, W) from `feature_input_patterns`; the .npy holds the raw gradient. Raises
    like the functions that show one picture, and OSError when a file cannot be written.
    """
    heats = as_patterns(heats)
    gallery = GalleryPainter(images, classes)
    pattern = PatternPainter(heats.shape[1:], inked)
    for k in features:
        name = f"{folder}/feature_{k}"
        save_pixels(gallery.paint(k, bank), f"{name}_gallery.png")
        save_pixels(pattern.paint(heats[k], k), f"{name}_pattern.png", pattern_palette())
        stored = io.BytesIO()
        np.save(stored, heats[k])
        write_whole(f"{name}_pattern.npy", stored.getvalue())


# --------------------------------------------------------------------------------------------------
# Sketches: where ink is claimed to be, and where none
# --------------------------------------------------------------------------------------------------

SKETCH_RED, SKETCH_BLUE = (178, 24, 43), (33, 102, 172)
EDGE, TINT = 2, 0.3  # screen pixels of an outline, and how much colour is inside


class Sketch(NamedTuple):
    """Places over a picture."""

    background: np.ndarray  # (H, W) ink from 0 to 1
    there: np.ndarray  # (n, H, W) bool, places with ink
    absent: np.ndarray  # (m, H, W) bool, places without


def _paint_sketch(sketch: Sketch, width: int) -> np.ndarray:
    """(height, about width, 3) uint8: ink in grey, places outlined in red, or blue where empty."""
    zoom = _zoom(sketch.background.shape, width)
    strongest = max(float(sketch.background.max()), 1e-9)
    grey = 255 * (1 - 0.75 * _enlarged(sketch.background / strongest, zoom))
    page = np.repeat(grey[:, :, None], 3, 2)
    for masks, colour in ((sketch.absent, SKETCH_BLUE), (sketch.there, SKETCH_RED)):
        for mask in masks:
            inside = _enlarged(mask, zoom)
            core = inside.copy()
            for shift in (-EDGE, EDGE):
                for axis in (0, 1):
                    core &= np.roll(inside, shift, axis)
            page[inside] += TINT * (np.array(colour) - page[inside])
            page[inside & ~core] = colour
    return page.round().astype(np.uint8)


def visualize_sketch(
    sketch: Sketch, k: int, statement: str = "", save_path: str | Path | None = None
) -> Figure:
    """The places of a claim about feature k, red where it wants ink and blue where it wants none,
    over the mean of the images that fire it; the statement is written below, as what is said in
    words: the drawing is a search of its own.

    Raises ValueError unless the places have the background's shape.
    """
    for masks in (sketch.there, sketch.absent):
        if masks.shape[1:] != sketch.background.shape:
            shapes = f"{masks.shape[1:]}, the background {sketch.background.shape}"
            raise ValueError(f"places have shape {shapes}")
    picture = _paint_sketch(sketch, PATTERN)
    lines = textwrap.wrap(f"Said in words: {statement}", SKETCH_LETTERS) if statement else []
    top = 2 * TITLE + 4
    width = max(picture.shape[1], SKETCH_WIDTH) + 2 * MARGIN
    height = top + len(picture) + CAPTION_LINE * len(lines) + 2 * MARGIN
    page = np.full((height, width, 3), WHITE, np.uint8)
    _paste(page, _lettering(f"Feature {k}: ink in red, none in blue", 14, BOLD), 6, MARGIN)
    note = "places that predict it, over the mean of its images"
    _paste(page, _lettering(note, 11, MONO), TITLE, MARGIN)
    _paste(page, picture, top, MARGIN)
    for row, line in enumerate(lines):
        below = top + len(picture) + MARGIN + CAPTION_LINE * row
        _paste(page, _lettering(line), below, MARGIN)
    return _figure_of(page, save_path)


# --------------------------------------------------------------------------------------------------
# Panels: everything about a feature in one picture
# --------------------------------------------------------------------------------------------------

CHART_WIDTH, CHART_HEIGHT = 320, 58  # screen pixels of a chart's bars
CHART_TITLE, CHART_PITCH = 24, 108  # screen pixels above a chart, and from one to the next
CLASS_NUMBERS, CLASS_NAMES = 20, 10  # a chart has room for about as many
NAME_LETTERS = 5  # of a class's name below a bar
NUMBERS = 70  # screen pixels at the left of a chart, for its numbers
CAPTION_LETTERS, CAPTION_LINE = 100, 17  # letters in a line of a panel's caption, and its height
BLUE, RED, GREY = "#2166ac", "#b2182b", "#666666"  # of bars; blue and red are RdBu_r's


def _draw_charts(histogram, logit_delta, ablation_delta, classes: Sequence[str] = ()) -> np.ndarray:
    """Three charts with one bar per class, from (C,) each: (height, width, 3) uint8."""
    charts = (
        ("images that fire it, by label", histogram, GREY, GREY),
        ("change of each logit when it is added", logit_delta, RED, BLUE),
        ("change of each logit when it is removed", ablation_delta, RED, BLUE),
    )
    width, height = NUMBERS + CHART_WIDTH + MARGIN, CHART_PITCH * len(charts)
    figure = new_figure(width, height)
    named = max(map(len, classes), default=0) > SHORT_NAME
    for row, (title, values, above, below) in enumerate(charts):
        values = _as_array(values)
        bottom = height - CHART_PITCH * row - CHART_TITLE - CHART_HEIGHT
        size = CHART_WIDTH / width, CHART_HEIGHT / height
        axes = figure.add_axes((NUMBERS / width, bottom / height, *size))
        axes.tick_params(labelsize=8)
        axes.bar(range(len(values)), values, color=np.where(values > 0, above, below))
        axes.axhline(0, color="black", linewidth=0.8, clip_on=False)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_title(title, fontsize=9.5, loc="left", y=1.03)  # not to be placed, which is slow
        axes.set_xticks([])  # ticks are slow: plain text takes half the time
        below_axes = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        n_shown = CLASS_NAMES if named else CLASS_NUMBERS
        for c in range(0, len(values), math.ceil(len(values) / n_shown)):
            text = _cut(class_name(classes, c), NAME_LETTERS)
            axes.text(c, -0.12, text, fontsize=7 if named else 8, **below_axes)
        axes.locator_params(axis="y", nbins=3, integer=row == 0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        if not values.any():
            axes.set_yticks([0])
            axes.text(0.5, 0.6, "none", transform=axes.transAxes, ha="center", color=GREY)

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


class PanelNotes(NamedTuple):
    """What a panel shows besides the feature's own numbers."""

    caption: str = ""  # below the gallery
    inked: object = None  # (H, W) bool as in `visualize_feature_pattern`
    counterparts: tuple[tuple[str, np.ndarray], ...] = ()  # words and pattern (H, W) of each
    sketch: Sketch | None = None


SKETCH_LETTERS, SKETCH_WIDTH = 60, 400  # letters in a line below a sketch, screen pixels
COUNTERPARTS = 4  # a panel has room for so many, two in a row
COUNTERPART_WIDTH, COUNTERPART_HEIGHT = 84, 84  # screen pixels from one to the next
SMALL_LINE = 12  # screen pixels from one line of small letters to the next


def _paint_counterpart(page: np.ndarray, words: str, heat: np.ndarray, mask) -> None:
    """A pattern into the upper left corner of a page, its words, in lines, below it."""
    colours = _pattern_colours(heat, display_scale(heat, mask), mask)
    pattern = pattern_palette()[_enlarged(colours, _zoom(heat.shape, TILE))]
    _paste(page, pattern, 0, 0)
    for line, text in enumerate(words.splitlines()):
        _paste(page, _lettering(text, 10), len(pattern) + line * SMALL_LINE, 0)


def _paint_panel(
    gallery: GalleryPainter,
    k: int,
    bank: FeatureBank,
    heat: np.ndarray,
    effects: tuple,
    notes: PanelNotes,
) -> np.ndarray:
    """The panel of feature k, (height, width, 3) uint8; `effects` are logit and ablation delta."""
    mask = as_mask(notes.inked, heat.shape)
    zoom = _zoom(heat.shape, PANEL_PATTERN)
    images = gallery.paint(k, bank)
    numbers = _pattern_colours(heat, display_scale(heat, mask), mask)
    pattern = pattern_palette()[_enlarged(numbers, zoom)]
    charts = _draw_charts(bank.label_histogram[k], *effects, gallery.classes)
    lines = []
    for paragraph in notes.caption.splitlines():
        lines += textwrap.wrap(paragraph, CAPTION_LETTERS)

    sketch = _paint_sketch(notes.sketch, PANEL_PATTERN) if notes.sketch else pattern[:, :0]
    left, top = images.shape[1] + NUMBERS, HEADER + MARGIN  # of the pattern
    counterparts = notes.counterparts[:COUNTERPARTS]
    rows_of_counterparts = math.ceil(len(counterparts) / 2)
    charts_top = top + max(len(pattern), COUNTERPART_HEIGHT * rows_of_counterparts) + MARGIN
    caption_end = len(images) + CAPTION_LINE * len(lines) + MARGIN
    height = max(caption_end, charts_top + len(charts))
    across = NUMBERS + pattern.shape[1] + 2 * MARGIN + sketch.shape[1]
    across += 2 * MARGIN + 2 * COUNTERPART_WIDTH if counterparts else 0
    width = images.shape[1] + max(charts.shape[1], across + MARGIN)

    page = np.full((height, width, 3), WHITE, np.uint8)
    _paste(page, images, 0, 0)
    for row, line in enumerate(lines):
        _paste(page, _lettering(line), len(images) + CAPTION_LINE * row, MARGIN)
    _paste(page, _lettering("red raises, blue lowers", 13), MARGIN, left)
    _paste(page, pattern, top, left)
    beside = left + pattern.shape[1] + 2 * MARGIN
    if notes.sketch is not None:
        _paste(page, _lettering("ink in red, none in blue", 13), MARGIN, beside)
        _paste(page, sketch, top, beside)
        beside += sketch.shape[1] + 2 * MARGIN
    if counterparts:
        _paste(page, _lettering("nearest in other SAEs", 13), MARGIN, beside)
    for number, (words, other) in enumerate(counterparts):
        row, column = divmod(number, 2)
        at = top + row * COUNTERPART_HEIGHT, beside + column * COUNTERPART_WIDTH
        _paint_counterpart(page[at[0] :, at[1] :], words, other, mask)
    _paste(page, charts, charts_top, images.shape[1])
    return page


def show_feature_panel(
    k: int,
    bank: FeatureBank,
    images,
    heat,
    logit_delta,
    ablation_delta,
    save_path: str | Path | None = None,
    notes: PanelNotes | None = None,
    classes: Sequence[str] = (),
) -> Figure:
    """Everything about feature k in one picture: gallery, pattern, labels and both logit effects.

    `heat` (H, W) comes from `feature_input_pattern`, `logit_delta` and `ablation_delta` (C,) from
    `feature_logit_effect` and `feature_ablation_effect`; the rest is as in `show_feature_gallery`.
    """
    effects = logit_delta, ablation_delta
    gallery, notes = GalleryPainter(images, classes), notes or PanelNotes()
    pixels = _paint_panel(gallery, k, bank, _as_array(heat), effects, notes)
    return _figure_of(pixels, save_path)


def write_feature_panels(
    folder: str | Path,
    features: Iterable[int],
    analysis: Analysis,
    images,
    notes: Mapping,
    classes: Sequence[str] = (),
) -> None:
    """feature_{k}_panel.png of `features`, with the PanelNotes notes[k] where there are some.

    What is inked is the analysis's. `images` are those the bank was collected on. Raises like
    `write_feature_pictures`.
    """
    heats = as_patterns(analysis.heats)
    gallery = GalleryPainter(images, classes)
    for k in features:
        effects = analysis.logit.mean_delta[k], analysis.ablation.mean_delta[k]
        about = notes.get(k, PanelNotes())._replace(inked=analysis.inked)
        pixels = _paint_panel(gallery, k, analysis.bank, heats[k], effects, about)
        save_pixels(pixels, Path(folder) / f"feature_{k}_panel.png")
