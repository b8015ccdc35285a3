"""How is a layer of a network read and replaced? Activations in, logits out, computed once per split.

    net = AtLayer(model, "features.7")               # any torch.nn.Module, by a forward hook
    layer = collect_activations(net, data)           # one pass over each split; mu, std
    layer.splits["val"].raw, layer.with_sae(sae)     # what all analysis reads

Takes a network and images; gives a `feature_analysis.ExplainedLayer`. It knows nothing of SAEs, and
draws and writes nothing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import feature_analysis as fa
from saexplain.files import InputError
from saexplain.images import SPLIT_NAMES, Data, TensorLoader

SCALE_SHIFT = (
    1.0  # standard deviations that units may lie off on average: one class alone stays below
)
SCALE_RATIO = 3.0  # times that they may spread further, or less far


@torch.no_grad()
def collect_activations(model, data: Data, normalize: bool = True) -> fa.ExplainedLayer:
    """The layer's output for every image of the three splits, from one pass over each.

    mu and std (d_in,) are those of the training images; 0 and 1 without `normalize`. A unit that
    never varies gets std 1: it carries nothing, and dividing by zero would spread NaN. Raises
    InputError where no unit varies.
    """
    splits = {}
    for name in SPLIT_NAMES:
        split = getattr(data, name)
        parts = [model.preactivations(images) for images, _ in TensorLoader(split)]
        splits[name] = fa.Activations(*split, torch.cat(parts))
    train = splits["train"].raw
    low, high = train.aminmax(dim=0)
    if (high - low).max() <= 1e-6 * train.abs().max():
        raise InputError(
            f"the layer must give different outputs for different images, but it gives the same "
            f"for all {len(train):,} training images; are they blank, or all alike?"
        )
    mu, std = torch.zeros_like(train[0]), torch.ones_like(train[0])
    if normalize:
        mu, std = train.mean(0), usable_std(train.std(0))
    return fa.ExplainedLayer(model, None, mu, std, splits)


def usable_std(std: Tensor) -> Tensor:
    """std (d_in,) with 1 for units that never vary."""
    return torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))


def warn_scale_shift(layer: fa.ExplainedLayer) -> None:
    """Print a line for validation or test images on which the layer's output looks otherwise scaled
    than on training images: some are normalized and others not, or so it seems."""
    train = layer.splits["train"].raw
    mean, std = train.mean(0), usable_std(train.std(0))
    for name in ("val", "test"):
        z = (layer.splits[name].raw - mean) / std
        off, spread = z.mean(0).abs().mean().item(), z.std(0).median().item()
        if off > SCALE_SHIFT or not 1 / SCALE_RATIO < spread < SCALE_RATIO:
            print(
                f"warning: the layer's outputs on {SPLIT_NAMES[name]} images lie {off:.1f} standard "
                f"deviations off those on training images and spread {spread:.2g} times as far; "
                f"are all images scaled alike?"
            )


@contextmanager
def default_torch_state() -> Iterator[None]:
    """float32, full precision and gradients, whatever the caller has switched on or off."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)


def open_layer(model: object, layer: str | None, pool: str | None = None) -> AtLayer | EvalMode:
    """The network with the two methods `preactivations` and `logits_from_preactivations`.

    Raises ValueError for an unknown layer, InputError for what is no module, or has no such methods
    where no layer is named.
    """
    methods = ("preactivations", "logits_from_preactivations")
    if isinstance(model, (AtLayer, EvalMode)) and layer is None:
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "the model was made in torch.inference_mode(), so no gradients flow through it; make "
            "it outside"
        )
    if layer is not None:
        return AtLayer(model, layer, pool)
    if not all(callable(getattr(model, name, None)) for name in methods):
        raise InputError(
            f"{type(model).__name__} has no methods {' and '.join(methods)}; name one of its layers"
        )
    return EvalMode(model)


def layer_sizes(net: AtLayer | EvalMode, images: Tensor) -> tuple[int, int]:
    """Number of outputs of the layer, and of classes of the network.

    Raises ValueError where no gradient leads from the layer to the pixels, before anything is
    trained.
    """
    with torch.no_grad():
        raw = net.preactivations(images[: fa.PROBED])
        n_classes = net.logits_from_preactivations(raw).shape[1]
    fa.check_gradients(net, images)
    return raw.shape[1], n_classes


# --------------------------------------------------------------------------------------------------
# A layer of any network
# --------------------------------------------------------------------------------------------------

POOLS = ("mean", "max", "flatten")  # what to make of a layer's output that has positions
SAME_IN_ANY_BATCH = 1e-2  # in batches of other sizes, for which GPUs may round to 10 bits


class StopForward(Exception):  # noqa: N818
    """The layer's output is there; the rest of the network need not run."""


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def gradients_if_asked(given: Tensor) -> torch.set_grad_enabled:
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

    runs_in_eval_mode = True  # by itself

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
        self.title = f"layer {name} of {type(model).__name__}"
        self.layer = modules[name]
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = like.device, like.dtype
        self.shape: tuple[int, ...] | None = None  # of the layer's output for one image
        self.before: Tensor | None = None  # images that lead to the layer, where only it counts
        self.one_serves = True  # whether one such image leads many replaced outputs to the head
        if images is not None:
            self._probe(images)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in) float32; gradients flow to images that ask for them"""
        if self.before is None:
            self._probe(images)
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
            with eval_mode(self.model), gradients_if_asked(of):
                return self.model(images.to(self.device, self.dtype))
        finally:
            handle.remove()

    def _output(self, images: Tensor) -> Tensor:
        """What the layer gives: (B, ...), a copy, since what follows may work in place."""
        found = []

        def keep(_module, _given, output) -> None:
            found.append(output)
            raise StopForward

        try:
            self._run(images, keep, images)
        except StopForward:
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
    def _probe(self, images: Tensor) -> None:
        """Learn the shape of the layer's output, and see that the logits depend on it alone.

        The first image leads to the layer, and the output for others, and for all with noise, is
        put in there: the logits must be those of the others. And they must not depend on the images
        beside them.
        """
        places = torch.linspace(0, len(images) - 1, min(fa.PROBED, len(images))).round().long()
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
        if off > fa.ROUNDING:  # a network may ask its input how many images there are
            self.one_serves = False
            off = self._furthest(raw, expected.float())
        if off > fa.ROUNDING:
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


class EvalMode:
    """A module that has the two methods itself, in evaluation mode while they run, and as it was
    afterwards; images on its device and of its dtype, results float32."""

    runs_in_eval_mode = True  # by itself

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.title = f"a layer of {type(model).__name__}"
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = like.device, like.dtype

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in)"""
        with eval_mode(self.model), gradients_if_asked(images):
            return self.model.preactivations(images.to(self.device, self.dtype)).float()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C)"""
        with eval_mode(self.model), gradients_if_asked(raw):
            logits = self.model.logits_from_preactivations(raw.to(self.device, self.dtype))
        return logits.float()
