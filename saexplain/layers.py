"""How is a layer of a network read and replaced? Activations in, logits out, once per split.

    net = AtLayer(model, "features.7")               # any torch.nn.Module, by a forward hook
    layer = collect_activations(net, data)           # one pass over each split; mu, std
    layer.splits["val"].raw, layer.with_sae(sae)     # all that the analysis reads

Takes a network and images; gives a `feature_analysis.ExplainedLayer`. It knows nothing of SAEs, and
draws and writes nothing.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import feature_analysis as fa
from saexplain.files import InputError
from saexplain.images import SPLIT_NAMES, Data, TensorLoader

METHODS = ("preactivations", "logits_from_preactivations")  # of a model that needs no hook
POOLS = ("mean", "max", "flatten")  # ways to make (B, d_in) of an output with positions
LOW_PRECISION = 1e-2  # relative difference of equal results on GPUs, which may round to 10 bits
SCALE_SHIFT = 1.0  # standard deviations that units may lie off on average; one class stays below
SCALE_RATIO = 3.0  # times that they may spread further, or less far


@torch.no_grad()
def collect_activations(model, data: Data, normalize: bool = True) -> fa.ExplainedLayer:
    """The layer's output for every image of the three splits, from one pass over each.

    mu and std (d_in,) are those of the training images; 0 and 1 without `normalize`. A unit that
    never varies gets std 1: it carries nothing, and dividing by zero would spread NaN. Raises
    InputError where no unit varies, and for a network that returns probabilities.
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
    check_logits(model, train)
    mu, std = torch.zeros_like(train[0]), torch.ones_like(train[0])
    if normalize:
        mu, std = train.mean(0), usable_std(train.std(0))
    return fa.ExplainedLayer(model, None, mu, std, splits)


def check_logits(model, raw: Tensor) -> None:
    """Raise InputError where the outputs for raw (N, d_in) are probabilities: softmax of them, for
    cross entropy and KL, would be another distribution than the network's."""
    some = raw[: fa.PROBED]
    found = model.logits_from_preactivations(torch.cat([some, 2 * some + 1]))  # also far off
    if (found >= 0).all() and ((found.sum(1) - 1).abs() < LOW_PRECISION).all():
        raise InputError(
            "the network must return logits, but it returns probabilities, which are positive and "
            "sum to 1; leave out the softmax at its end, or return the logarithm of its result"
        )


def usable_std(std: Tensor) -> Tensor:
    """std (d_in,) with 1 for units that never vary."""
    return torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))


def pick_device(name: str) -> torch.device:
    """The device of that name; for 'auto' the best of this machine. Raises InputError."""
    try:
        device = torch.device(name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
            make_deterministic(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used ({reason}); try --device cpu") from error


def make_deterministic(device: torch.device) -> None:
    """On a GPU, have torch use only algorithms that repeat their results."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products need it
        torch.use_deterministic_algorithms(True)


def warn_scale_shift(layer: fa.ExplainedLayer) -> None:
    """Print a line for validation or test images on which the layer's output is scaled otherwise
    than on training images, as where some are normalized and others not."""
    train = layer.splits["train"].raw
    mean, std = train.mean(0), usable_std(train.std(0))
    for name in ("val", "test"):
        z = (layer.splits[name].raw - mean) / std
        off, spread = z.mean(0).abs().mean().item(), z.std(0).median().item()
        if off > SCALE_SHIFT or not 1 / SCALE_RATIO < spread < SCALE_RATIO:
            print(
                f"warning: the layer's outputs on {SPLIT_NAMES[name]} images lie {off:.1f} "
                f"standard deviations off those on training images and spread {spread:.2g} times "
                f"as far; are all images scaled alike?"
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
    """The network with the two METHODS; layer None for a model that has them itself.

    Raises ValueError for an unknown layer, InputError for a model that cannot be used.
    """
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
    if not all(callable(getattr(model, name, None)) for name in METHODS):
        raise InputError(
            f"{type(model).__name__} has no methods {' and '.join(METHODS)}; name one of its layers"
        )
    return EvalMode(model)


# --------------------------------------------------------------------------------------------------
# A layer of any network
# --------------------------------------------------------------------------------------------------


class StopForward(Exception):  # noqa: N818
    """Ends a forward pass once the layer's output is there."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
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


def parameter_like(model: nn.Module) -> Tensor:
    """A parameter with the device and dtype that the model's images must have."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


class AtLayer:
    """The output of one layer of any network as activations, and the rest of the network as a head.

        net = AtLayer(model, "features.7")
        raw = net.preactivations(images)           # (B, d_in), by a forward hook
        logits = net.logits_from_preactivations(raw)  # (B, C), the layer's output replaced

    Nothing of the model is changed: it runs in evaluation mode, which is undone afterwards. For the
    head, the model runs on one image, and a hook replaces the layer's output.

    Args:
        model: maps images (B, ...) to logits (B, C).
        name: of the layer, as in `model.named_modules()`.
        pool: of an output with positions, "mean" or "max" over them, which serves where the head
            reads no more than that, or "flatten" for all of it. Positions may come after the
            channels, (B, C, H, W), or before, (B, tokens, C): whichever gives the logits.
        images: (N, ...), one or more that the network can take; up to PROBED are used. Without,
            the first that `preactivations` is given.

    Raises ValueError for an unknown layer; with the first images, for a layer whose output is not
    one tensor, or has positions and no pool, and where the logits depend on more than this layer: a
    connection around it, positions that the pool has lost, or the other images of a batch.
    """

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(
        self, model: nn.Module, name: str, pool: str | None = None, images: Tensor | None = None
    ):
        modules = dict(model.named_modules())
        if name not in modules or not name:
            near = difflib.get_close_matches(name, modules, 5, 0) if name else list(modules)[1:6]
            raise ValueError(f"the model has no layer {name!r}; it has {', '.join(near)}, ...")
        if pool is not None and pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.model, self.name, self.pool = model, name, pool
        self.title = f"layer {name} of {type(model).__name__}"
        self.layer = modules[name]
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        self.output: Tensor | None = None  # (0, ...) with the shape, dtype and device of outputs
        self.before: Tensor | None = None  # (1, ...) an image that leads to the layer
        self.one_image = True  # whether one image is enough to run the head on many outputs
        self.channels = 1  # the dimension of pooled outputs that is no position
        if images is not None:
            self._probe(images)

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in) float32; gradients flow to images that ask for them"""
        if self.before is None:
            self._probe(images)
        if len(images) == 0:  # many networks cannot take an empty batch
            return self._rows(self._output(self.before))[:0]
        return self._rows(self._output(images))

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C) float32; gradients flow to a raw that asks for them"""
        if self.before is None:
            raise ValueError(f"{self.name}: give `images` first, or call `preactivations`")
        if len(raw) == 0:
            return self.logits_from_preactivations(raw.new_zeros(1, raw.shape[1]))[:0]
        replaced, before = self._as_output(raw), self.before
        if not self.one_image:
            before = before.expand(len(raw), *before.shape[1:])
        return self._run(before, lambda *_: replaced, raw).float()

    def _run(self, images: Tensor, hook: Callable, of: Tensor) -> Tensor:
        """The model's result for images, with a hook on the layer, and gradients if `of` asks."""
        handle = self.layer.register_forward_hook(hook)
        try:
            with eval_mode(self.model), gradients_if_asked(of):
                return self.model(images.to(self.device, self.dtype))
        finally:
            handle.remove()

    def _output(self, images: Tensor) -> Tensor:
        """The layer's output (B, ...), a copy, since it may be a view of the images."""
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
            met = type(found[0]).__name__
            raise ValueError(f"layer {self.name!r} must give a tensor (B, d_in), but gives a {met}")
        return found[0].clone()

    def _rows(self, output: Tensor) -> Tensor:
        """The layer's output (B, ...) as (B, d_in)."""
        shape = tuple(output.shape)
        if math.prod(shape[2:]) > 1 and self.pool is None:
            raise ValueError(
                f"layer {self.name!r} gives {shape}, outputs with positions: use pool='mean' or "
                f"'max' where the rest reads no more, or pool='flatten' for {math.prod(shape[1:])} "
                f"numbers"
            )
        if self.pool in ("mean", "max") and len(shape) > 2:
            positions = output.movedim(self.channels, 1).flatten(2)  # (B, d_in, positions)
            output = positions.mean(2) if self.pool == "mean" else positions.amax(2)
        return output.flatten(1).float()

    def _as_output(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) as the layer would give it: the same at every position where pooled."""
        shape = (len(raw), *self.output.shape[1:])
        raw = raw.to(self.output.device, self.output.dtype)
        if self.pool in ("mean", "max"):
            one_position = [1] * len(shape)
            one_position[0], one_position[self.channels] = raw.shape
            return raw.reshape(one_position).expand(shape).clone()
        return raw.reshape(shape).clone()

    @torch.no_grad()
    def _probe(self, images: Tensor) -> None:
        """Learn the shape of the layer's output, and check that the logits depend on it alone.

        The first image leads to the layer, and the output for others, and for all with noise, is
        put in there: the logits must be those of the others. And they must not depend on the images
        beside them.
        """
        places = torch.linspace(0, len(images) - 1, min(fa.PROBED, len(images))).round().long()
        some = images[places.to(images.device)].detach().float()
        noise = torch.rand(some.shape, generator=torch.Generator().manual_seed(0))
        noisy = some + (some.std() + 1) * noise.to(some)  # unlike the first, whatever that is
        tried = torch.cat([some, noisy])
        output = self._output(tried)
        self._rows(output)  # raises where it has positions and no pool
        logits = self._probe_logits(tried)
        if len(some) > 1:  # not every network takes a single image
            halves = torch.cat([self._run(half, lambda *_: None, half) for half in tried.chunk(2)])
            rounding = max(LOW_PRECISION, 16 * torch.finfo(logits.dtype).eps)
            if _distance(halves, logits) > rounding:
                raise ValueError(
                    "the model's logits for an image depend on the others of its batch"
                )
        self.output, self.before = output[:0].clone(), some[:1].clone()
        try:
            self._find_layout(output, logits)
        except ValueError:
            self.before = None
            raise

    def _probe_logits(self, tried: Tensor) -> Tensor:
        """The model's logits. Raises ValueError unless they are (B, C), and the layer ran once."""
        runs = []
        logits = self._run(tried, lambda *_: runs.append(1), tried)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            met = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must give logits (B, C), but gives {met}")
        if len(runs) > 1:
            raise ValueError(f"layer {self.name!r} runs {len(runs)} times; name one that runs once")
        return logits

    def _find_layout(self, output: Tensor, expected: Tensor) -> None:
        """Set `channels` and `one_image` so that the output (B, ...), put in again, gives the
        logits expected (B, C). Raises ValueError where nothing does."""
        pooled = self.pool in ("mean", "max") and output.dim() > 2
        least, failure = math.inf, None
        for self.channels in (1, output.dim() - 1) if pooled else (1,):
            for self.one_image in (True, False):  # a network may ask how many images there are
                try:
                    logits = self.logits_from_preactivations(self._rows(output))
                except (RuntimeError, IndexError) as error:
                    if fa.is_out_of_memory(error):
                        raise
                    failure = failure if self.one_image else error
                    continue
                off = _distance(logits, expected)
                if not off > fa.ROUNDING:
                    return
                least = min(least, off)
        if failure is not None and least == math.inf:
            raise ValueError(
                f"the model does not run with the output of layer {self.name!r} put in again "
                f"({failure}); name another layer"
            ) from failure
        lost = f", or reads more of it than pool={self.pool!r} keeps" if self.pool else ""
        raise ValueError(
            f"the logits must depend on layer {self.name!r} alone, but a connection goes around it"
            f"{lost}: with its output for an image but the input of another they are off by "
            f"{least:.2g} of the largest; name a layer that everything passes through"
        )


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Between logits (B, C), relative to the largest of those expected; inf for other shapes."""
    if logits.shape != expected.shape:
        return math.inf
    logits, expected = logits.float(), expected.float()
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


class EvalMode:
    """A module that has the two METHODS itself, in evaluation mode while they run, and as it was
    afterwards; images on its device and of its dtype, results float32."""

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(self, model: nn.Module):
        self.model = model
        self.title = f"a layer of {type(model).__name__}"
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        self.output = like  # has the device and dtype of the layer's output, once that is known

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in)"""
        with eval_mode(self.model), gradients_if_asked(images):
            raw = self.model.preactivations(images.to(self.device, self.dtype))
        self.output = raw.detach()[:0].clone()
        return raw.float()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C)"""
        given = raw.to(self.output.device, self.output.dtype)
        with eval_mode(self.model), gradients_if_asked(raw):
            return self.model.logits_from_preactivations(given).float()
