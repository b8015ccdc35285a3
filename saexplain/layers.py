"""How is a layer of a network read and replaced? Activations in, logits out, once per split.

    net = AtLayer(model, "features.7")               # any torch.nn.Module, by a forward hook
    layer = collect_activations(net, data)           # one pass over each split; mu, std
    layer.splits["val"].raw, layer.with_sae(sae)     # all that the analysis reads

Takes a network and images; gives a `feature_analysis.ExplainedLayer`. It knows nothing of SAEs, and
draws and writes nothing. What shapes of output there are is in positions.py.

Key: N images, B in a batch, C classes, d_in units of the layer, P positions.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import feature_analysis as fa
from saexplain.files import InputError, sha256_of, to_json
from saexplain.images import SPLIT_NAMES, Data, Split, TensorLoader, digest_of
from saexplain.parallel import ONE_PROCESS, Ranks, shard_of
from saexplain.positions import (
    POOLS,
    Layout,
    decides_layout,
    find_layout,
    last_of,
    sampled_positions,
)
from saexplain.progress import progress_bar
from saexplain.rows import mean_and_std, spread_over
from saexplain.sources import describe_error
from saexplain.store import FileStore, MemoryStore, open_store

METHODS = ("preactivations", "logits_from_preactivations")  # of a model that needs no hook
LOW_PRECISION = 1e-2  # relative difference of equal results on GPUs, which may round to 10 bits
IMAGES_SENT = 256  # whose outputs go to the first rank at once
SCALE_SHIFT = 1.0  # standard deviations that units may lie off on average; one class stays below
SCALE_RATIO = 3.0  # times that they may spread further, or less far
BYTE = 255.0  # the largest value of a pixel in a file
SCALED_IMAGES = 256  # that are classified on another scale


class Storing(NamedTuple):
    """Which training positions are kept of each image, and where all outputs are kept."""

    positions_per_image: int = 8
    folder: Path | None = None  # for outputs that do not fit into memory; None: always memory
    made_from: Mapping[str, str] = MappingProxyType({})  # all that decides the outputs


@torch.no_grad()
def collect_activations(
    model,
    data: Data,
    normalize: bool = True,
    storing: Storing | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> fa.ExplainedLayer:
    """The layer's output for every image of the three splits, from one pass over each.

    Of training images some random positions are kept of a layer with positions, all of the others.
    mu and std (d_in,) are those of the training images, over positions; 0 and 1 without
    `normalize`. A unit that never varies gets std 1: it carries nothing, and dividing by zero would
    spread NaN. Each of several ranks reads its part of the images, and keeps those for training;
    the first gets all others. Raises InputError where no unit varies, and for a network that
    returns probabilities; ValueError for outputs that are not finite.
    """
    storing, outputs = storing or Storing(), {}
    for name in SPLIT_NAMES:
        raw = store_outputs(model, getattr(data, name), name, storing, ranks)
        outputs[name] = raw if name == "train" else gather_outputs(raw, name, storing, ranks)
    train = outputs["train"]
    low, high = range_of(train.flatten(0, -2), ranks)
    if (high - low).max() <= 1e-6 * torch.maximum(high, -low).max():
        raise InputError(
            f"the layer must give different outputs for different images, but it gives the same "
            f"for all {len(data.train.labels):,} training images; are they blank, or all alike?"
        )
    mu, std = torch.zeros_like(low), torch.ones_like(low)
    if normalize:
        mu, std = mean_and_std(train, ranks)
    device = getattr(model, "device", train.device)  # outputs that are many may be elsewhere
    mu, std = mu.to(device), usable_std(std).to(device)
    layer, splits = fa.ExplainedLayer(model, None, mu, std), {}
    for name, raw in outputs.items():
        images, labels = getattr(data, name)
        if ranks.world > 1 and (name == "train" or not ranks.is_first):  # this rank's part
            own = shard_of(len(labels), ranks)
            images, labels = part_of(images, own), labels[own]
        splits[name] = fa.Activations(images, labels, layer.rows(raw, images))
    ranks.on_first(check_logits, layer, splits["val"].raw[: fa.PROBED])  # others may have none
    return replace(layer, splits=splits)


def range_of(rows: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value (d_in,) of each unit over the rows (n, d_in) of all ranks,
    of which some may have none; float32 on the CPU."""
    own = torch.stack(rows.aminmax(dim=0)).float().cpu() if len(rows) else None
    found = torch.stack([both for both in ranks.gather(own) if both is not None])
    return found[:, 0].amin(0), found[:, 1].amax(0)


@torch.no_grad()
def layer_inputs(net, data: Data) -> dict[str, str]:
    """What a layer's outputs are made from: images, weights, what was recognized of the layer, and,
    since code cannot be hashed, its outputs for a few training images."""
    images = data.train.images
    some = images[spread_over(len(images), fa.PROBED).to(images.device)]
    found = digest_of([fa.values_of(net.preactivations(some))])
    weights = digest_of(net.model.state_dict().values())
    inputs = {"data": data.digest, "layer": net.title, "layout": net.in_words(), "weights": weights}
    return inputs | {"dtype": str(net.dtype), "torch": torch.__version__, "some outputs": found}


@torch.no_grad()
def digest_of_outputs(layer: fa.ExplainedLayer, made_from: Mapping[str, str]) -> str:
    """SHA-256 of all that decides an SAE of the layer: also of outputs on validation images, since
    code that makes them cannot be hashed."""
    raw = layer.splits["val"].raw
    outputs = digest_of([fa.values_of(raw), layer.logits(raw)])
    return sha256_of(to_json({**made_from, "outputs": outputs}))


def store_outputs(model, split: Split, name: str, storing: Storing, ranks: Ranks) -> Tensor:
    """The layer's output (n, ...) for this rank's part of a split, in memory or in a file."""
    own = shard_of(len(split.labels), ranks)
    images = part_of(split.images, own)
    first = fa.values_of(model.preactivations(images[:1]))
    p = 1 if first.dim() == 2 else first.shape[1]
    kept = min(p, storing.positions_per_image) if name == "train" else p
    shape, device = (len(images), kept, first.shape[-1]), first.device
    if storing.folder is None:
        store = MemoryStore(shape, device)
    else:
        folder = storing.folder / f"activations_{name}_{ranks.rank}"
        made_from = {**storing.made_from, "part": [own.start, own.stop]}
        store = open_store(shape, folder, made_from, device)
    rest = Split(part_of(images, slice(store.done, None)), split.labels[own][store.done :])
    loader = TensorLoader(rest) if len(rest.labels) else ()
    for batch, _ in progress_bar(loader, f"{SPLIT_NAMES[name]} images", len(loader)):
        raw = fa.values_of(model.preactivations(batch))
        what = f"the layer's output for {SPLIT_NAMES[name]} images"
        fa.check_finite(raw, what, first=own.start + store.done)
        if kept < p:
            given = (own.start + store.done, len(raw), p, kept, model.positions.n_prefix)
            places = sampled_positions(*given).to(raw.device)
            raw = raw.gather(1, places[:, :, None].expand(-1, -1, raw.shape[2]))
        store[store.done : store.done + len(raw)] = raw if raw.dim() == 3 else raw[:, None]
    return store.raw if first.dim() == 3 else store.raw[:, 0]


def gather_outputs(raw: Tensor, name: str, storing: Storing, ranks: Ranks) -> Tensor:
    """On the first rank, the outputs (n, ...) of all ranks, in a file if those of any rank are in
    one; on the others their own."""
    if ranks.world == 1 or not any(ranks.gather(raw.dtype != torch.float32)):
        return ranks.gather_rows(raw)
    rows, stores, at = raw.to("cpu", torch.float16), [], 0
    rows = rows if raw.dim() == 3 else rows[:, None]
    n = sum(ranks.gather(len(rows)))
    made_from = {**storing.made_from, "ranks": ranks.world}

    def open_file() -> bool:
        folder = storing.folder / f"activations_{name}"
        stores.append(FileStore((n, *rows.shape[1:]), folder, made_from))
        return stores[0].done == n

    if not ranks.on_first(open_file):
        for piece in ranks.gather_pieces(rows, IMAGES_SENT):
            if at >= stores[0].done:  # others were there before a kill
                stores[0][at : at + len(piece)] = piece
            at += len(piece)
    rows = stores[0].raw if ranks.is_first else rows
    return rows if raw.dim() == 3 else rows[:, 0]


def part_of(images, part: slice):
    """Some of the images; lazy ones are not read."""
    return images.subset(part) if hasattr(images, "subset") else images[part]


def check_logits(layer: fa.ExplainedLayer, raw: fa.Rows) -> None:
    """Raise InputError where the outputs for raw are probabilities: softmax of them, for cross
    entropy and KL, would be another distribution than the network's."""
    values = fa.values_of(raw)  # far off, numbers from 0 to 1 that are logits leave this range
    tried = [layer.moved(raw, step * values + step, 1.0) for step in (1.0, 99.0, -99.0)]
    far = [layer.model.logits_from_preactivations(some) for some in tried]  # may be infinite
    found = torch.cat([layer.logits(raw), *far])
    if not 0 <= found.min() < found.max() <= 1 + fa.ROUNDING:  # a single logit is beside a 0
        return
    if ((found.sum(1) - 1).abs() < LOW_PRECISION).all():
        raise InputError(
            "the network must return logits, but it returns probabilities, which are positive and "
            "sum to 1; leave out the softmax at its end, or return the logarithm of its result"
        )
    raise InputError(
        "the network must return logits, but it returns numbers from 0 to 1; leave out the sigmoid "
        "at its end"
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


def warn_chance(layer: fa.ExplainedLayer) -> None:
    """Print a line where the network classifies validation images no better than by always naming
    the most frequent class."""
    _, labels, raw = layer.splits["val"]
    right = (layer.logits(raw).argmax(1).cpu() == labels.cpu()).double().mean().item()
    most = (labels.bincount().max() / len(labels)).item()
    if right <= most:
        print(
            f"warning: the network classifies {right:.1%} of the validation images correctly, no "
            f"more than naming the most frequent class for all would, {most:.1%}; are labels in "
            f"the order of its logits, and images scaled as it expects them?"
        )
    warn_scale(layer)


def warn_scale(layer: fa.ExplainedLayer) -> None:
    """Print a line where the network classifies validation images much better on the other usual
    scale, of values from 0 to 255 or from 0 to 1."""
    images, labels, raw = layer.splits["val"]
    some = spread_over(len(labels), SCALED_IMAGES)
    given = images[some.to(images.device)]
    low, high = float(given.min()), float(given.max())
    if low < 0 or high > BYTE:
        return
    factor, words = (1 / BYTE, "divided by 255") if high > 1 else (BYTE, "times 255")
    found = []
    for logits in (layer.logits(raw[some.to(raw.device)]), layer.logits(layer.raw(given * factor))):
        own = labels[some.to(labels.device)].to(logits.device)
        accuracy = (logits.argmax(1) == own).double().mean().item()
        found.append((nn.functional.cross_entropy(logits, own).item(), accuracy))
    (loss, accuracy), (other, other_accuracy) = found
    # Larger logits alone lower the loss of a network that makes no errors.
    is_better = other < min(loss, math.log(logits.shape[1])) / 2
    if is_better and (factor < 1 or other_accuracy > accuracy + 0.1):
        print(
            f"warning: images have values from {low:.3g} to {high:.3g}, but the network classifies "
            f"them better {words}: cross entropy {other:.2f} instead of {loss:.2f}, accuracy "
            f"{other_accuracy:.1%} instead of {accuracy:.1%}; give images on the scale it expects"
        )


def warn_scale_shift(layer: fa.ExplainedLayer) -> None:
    """Print a line for validation or test images on which the layer's output is scaled otherwise
    than on training images, as where some are normalized and others not."""
    found = {name: mean_and_std(fa.values_of(split.raw)) for name, split in layer.splits.items()}
    train_mean, train_std = found.pop("train")
    train_std = usable_std(train_std)
    for name, (mean, std) in found.items():
        off = ((mean - train_mean) / train_std).abs().mean().item()
        spread = (std / train_std).median().item()
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


def open_layer(
    model: object,
    layer: str | None,
    pool: str | None = None,
    layout: str | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> AtLayer | EvalMode:
    """The network with the two METHODS; layer None for a model that has them itself.

    The other arguments are those of `AtLayer`. Raises ValueError for an unknown layer, InputError
    for a model that cannot be used.
    """
    if isinstance(model, (AtLayer, EvalMode)) and layer is None:
        return model
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise InputError(f"the model's {name} has no values; run it once, or load its weights")
        if parameter.is_inference():
            raise InputError(
                "the model was made in torch.inference_mode(), so no gradients flow through it; "
                "make it outside"
            )
    if layer is not None:
        return AtLayer(model, layer, pool, None, layout, grid, prefix_tokens)
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


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DataParallel and torch.compile, whose names of layers are its own."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model


def parts_of(output: object) -> Mapping:
    """The parts of a dict, tuple, list or dataclass, by key; none of anything else."""
    if isinstance(output, Mapping):  # also the dataclasses of transformers
        return output
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    names = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
    return {field.name: getattr(output, field.name) for field in names}


def path_to_tensor(output: object) -> tuple | None:
    """The keys that lead to the first tensor (B, ...) in a layer's output; None without any."""
    if isinstance(output, Tensor):
        return () if output.dim() > 1 else None
    for key, value in parts_of(output).items():
        path = path_to_tensor(value)
        if path is not None:
            return (key, *path)
    return None


def with_tensor_at(output: object, path: tuple, new: Tensor) -> object:
    """The output with another tensor at the end of the path."""
    if not path:
        return new
    parts = parts_of(output)
    parts = {**parts, path[0]: with_tensor_at(parts[path[0]], path[1:], new)}
    if isinstance(output, Mapping):  # also those of transformers, which take names only
        return type(output)(**parts)
    if isinstance(output, (tuple, list)):
        named = hasattr(output, "_fields")
        return type(output)(*parts.values()) if named else type(output)(parts.values())
    return dataclasses.replace(output, **{path[0]: parts[path[0]]})


def logits_in(result: object) -> Tensor | None:
    """Logits (B, C) in what a model returns: a tensor, `.logits`, or the first of a dict, tuple or
    dataclass that has this shape. A single logit x becomes those of two classes, 0 and x. None
    without any. Raises ValueError where there are several of different numbers of classes."""
    if isinstance(result, Tensor):
        if result.dim() == 1 and result.is_floating_point():
            result = result[:, None]
        if result.dim() != 2:
            return None
        return result if result.shape[1] > 1 else torch.cat([torch.zeros_like(result), result], 1)
    named = getattr(result, "logits", None)
    named = result.get("logits") if isinstance(result, Mapping) else named
    if isinstance(named, Tensor):
        return logits_in(named)
    found = [logits_in(value) for value in parts_of(result).values()]
    found = [logits for logits in found if logits is not None]
    if len({logits.shape[1] for logits in found}) > 1:
        shapes = ", ".join(f"(B, {logits.shape[1]})" for logits in found)
        raise ValueError(
            f"the model returns several tensors that may be the logits, {shapes}; have it return "
            f"the logits alone, or name them: {{'logits': ...}}"
        )
    return found[0] if found else None


class AtLayer:
    """The output of one layer of any network as activations, and the rest of the network as a head.

        net = AtLayer(model, "features.7")
        raw = net.preactivations(images)           # (B, d_in), by a forward hook
        logits = net.logits_from_preactivations(raw)  # (B, C), the layer's output replaced

    Nothing of the model is changed: it runs in evaluation mode, which is undone afterwards. For the
    head, the model runs on one image, and a hook replaces the layer's output. Where something goes
    around the layer, as around a residual branch, raw is a `fa.BranchRows` with the images, and the
    model runs on them.

    Args:
        model: maps images (B, ...) to logits (B, C), alone or in a dict, a tuple or as `.logits`.
        name: of the layer, as in `model.named_modules()`; of one that is neither traced nor
            scripted, which run no hooks.
        pool: of an output with positions: "mean" or "max" over them, which serves where the head
            reads no more than that, or "flatten" for all of it. By default positions stay, and raw
            is (B, P, d_in).
        images: (N, ...), one or more that the network can take; up to PROBED are used. Without,
            the first that `preactivations` is given.
        layout, grid, prefix_tokens: of the output, where `find_layout` would take it otherwise.

    Raises ValueError for an unknown layer; with the first images, for a layer whose output has no
    tensor, and where the logits depend on the other images of a batch, or the pool loses something.
    """

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pool: str | None = None,
        images: Tensor | None = None,
        layout: str | None = None,
        grid: Sequence[int] | None = None,
        prefix_tokens: int | None = None,
    ):
        model = unwrapped(model)
        modules = dict(model.named_modules())
        if not isinstance(name, str):
            own = next((own for own, part in modules.items() if part is name), str(name))
            met = type(name).__name__
            raise ValueError(f"layer must be a name, such as {own!r:.40}, got one of type {met}")
        for prefix in ("_orig_mod.", "module."):  # names of a compiled or parallel model
            name = name.removeprefix(prefix) if name and name not in modules else name
        if any(isinstance(part, torch.jit.ScriptModule) for part in (model, modules.get(name))):
            raise ValueError(
                f"layer {name!r} is traced or scripted, so that its output cannot be read or "
                f"replaced; give the torch.nn.Module that it was made from"
            )
        if name not in modules or not name:
            names = [own for own in modules if own]
            near = difflib.get_close_matches(name, names, 5, 0) if name else names[:5]
            listed = ", ".join(near) + (", ..." if len(near) < len(names) else "")
            raise ValueError(f"the model has no layer {name!r}; it has {listed or 'none'}")
        if pool is not None and pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.model, self.name, self.pool = model, name, pool
        self.title = f"layer {name} of {type(model).__name__}"
        self.short_name = f"{type(model).__name__}_{name}"
        self.layer = modules[name]
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtypes = list(dict.fromkeys(dtypes)) or [like.dtype]  # that images may have
        self.asked = (layout, grid, prefix_tokens)
        self.layout: Layout | None = None  # of the output, once images are known
        self.before: Tensor | None = None  # (1, ...) an image that leads to the layer
        self.is_branch = False  # whether something goes around the layer
        self.one_image = True  # whether one image is enough to run the head on many outputs
        self.n_classes = 0
        if images is not None:
            self._probe(images)

    @property
    def positions(self) -> fa.Positions | None:
        """The positions of the output, None for a vector."""
        return self.layout.positions if self.layout else None

    def in_words(self) -> str:
        """What was recognized of the layer, once images are known."""
        around = "; something goes around it, so each image runs again" if self.is_branch else ""
        return self.layout.in_words() + around

    @property
    def head_entries(self) -> int:
        """Numbers in the input of one row's pass through the rest of the model."""
        if self.is_branch:
            return self.before.numel()
        return math.prod(self.layout.shape) if self.layout else 0

    def preactivations(self, images: Tensor) -> fa.Rows:
        """images (B, ...) -> (B, d_in) or (B, P, d_in) float32; gradients flow to images that ask
        for them."""
        if self.before is None:
            self._probe(images)
        if len(images) == 0:  # many networks cannot take an empty batch
            return self.layout.to_rows(self._output(self.before))[:0]
        raw = self.layout.to_rows(self._output(images))
        return fa.BranchRows(raw, images) if self.is_branch else raw

    def logits_from_preactivations(self, raw: fa.Rows) -> Tensor:
        """raw (B, d_in) or (B, P, d_in) -> logits (B, C) float32; gradients flow to a raw that asks
        for them."""
        if self.before is None:
            raise ValueError(f"{self.name}: give `images` first, or call `preactivations`")
        if self.is_branch and not isinstance(raw, fa.BranchRows):
            raise ValueError(
                f"the logits depend on more than layer {self.name!r}: give the `fa.BranchRows` of "
                f"`preactivations`, which have the images"
            )
        values = fa.values_of(raw)
        if len(values) == 0:
            return values.new_zeros(0, self.n_classes)
        replaced, before = self.layout.to_output(values), self.before
        if self.is_branch:
            before = raw.images
        elif not self.one_image:
            before = before.expand(len(raw), *before.shape[1:])

        def replace(_module, _given, output) -> object:
            return with_tensor_at(output, path_to_tensor(output), replaced)

        return self._logits(self._run(before, replace, values)).float()

    def _logits(self, result: object) -> Tensor:
        """Logits (B, C) of what the model returns. Raises ValueError where there are none."""
        logits = logits_in(result)
        if logits is None:
            met = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"the model must give logits (B, C), alone, as `.logits`, or in a dict or tuple, "
                f"but gives {met}"
            )
        return logits

    def _run(self, images: Tensor, hook: Callable, of: Tensor) -> object:
        """The model's result for images, with a hook on the layer, and gradients if `of` asks."""
        handle = self.layer.register_forward_hook(hook)
        try:
            with eval_mode(self.model), gradients_if_asked(of):
                # A copy: some models change their input.
                return self.model(images.to(self.device, self.dtype, copy=True))
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
            raise ValueError(self._not_run())
        path, output = path_to_tensor(found[0]), found[0]
        if path is None:
            met = type(output).__name__
            raise ValueError(f"layer {self.name!r} must give a tensor (B, ...), but gives a {met}")
        for key in path:
            output = parts_of(output)[key]
        return output.clone()

    def _not_run(self) -> str:
        return (
            f"layer {self.name!r} does not run when the model is given images; name one that does "
            f"(those of an exported network are names only)"
        )

    @torch.no_grad()
    def _probe(self, images: Tensor) -> None:
        """Learn the layout of the layer's output, and check that its rows can be put in again.

        The first image leads to the layer, and the output for others, and for all with noise, is
        put in there: the logits must be those of the others. Where they are not, each must lead to
        its own. And they must not depend on the images beside them.
        """
        places = torch.linspace(0, len(images) - 1, min(fa.PROBED, len(images))).round().long()
        some = images[places.to(images.device)].detach().float()
        noise = torch.rand(some.shape, generator=torch.Generator().manual_seed(0))
        noisy = some + (some.std() + 1) * noise.to(some)  # unlike the first, whatever that is
        tried = torch.cat([some, noisy])
        result = self._first_result(tried)
        output, logits = self._output(tried), self._logits(result)
        if len(output) != len(tried):
            raise ValueError(
                f"layer {self.name!r} gives {tuple(output.shape)} for {len(tried)} images: images "
                f"must come first, as with batch_first=True"
            )
        module = self._decides_layout(some[:2])
        self.layout = find_layout(output, some.shape, module, self.pool, *self.asked)
        rounding = max(LOW_PRECISION, 16 * torch.finfo(logits.dtype).eps)
        again = self._logits(self._result(tried))
        if _distance(again, logits) > rounding:
            raise ValueError(
                "the model must be deterministic, but gives other logits for the same images the "
                "second time, as a dropout does that is no module, or ignores self.training"
            )
        if len(some) > 1:  # not every network takes a single image
            halves = [self._logits(self._result(half)) for half in tried.chunk(2)]
            if _distance(torch.cat(halves), logits) > rounding:
                raise ValueError(
                    "the model's logits for an image depend on the others of its batch"
                )
        self.before, self.n_classes = some[:1].clone(), logits.shape[1]
        try:
            self._find_head(tried, output, logits)
        except ValueError:
            self.before = None
            raise

    def _result(self, images: Tensor, hook: Callable = lambda *_: None) -> object:
        """What the model returns. Raises ValueError with the model's own error where it fails."""
        try:
            return self._run(images, hook, images)
        except Exception as error:  # whatever its code raises
            if fa.is_out_of_memory(error):
                raise
            shape, dtype = tuple(images.shape[1:]), str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"the model cannot take images of shape {shape}, {len(images)} of {dtype} on "
                f"{self.device}: {describe_error(error)}"
            ) from error

    def _first_result(self, tried: Tensor) -> object:
        """What the model returns for images of the first dtype that it can take. Raises ValueError
        unless the layer ran once."""
        failures = []
        for dtype in self.dtypes:
            self.dtype, runs = dtype, []
            try:
                result = self._result(tried, lambda *_, runs=runs: runs.append(1))
                break
            except ValueError as error:
                failures.append(error)
        else:
            self.dtype = self.dtypes[0]
            raise failures[0]
        if not runs:
            raise ValueError(self._not_run())
        if len(runs) > 1:
            raise ValueError(f"layer {self.name!r} runs {len(runs)} times; name one that runs once")
        return result

    def _decides_layout(self, images: Tensor) -> nn.Module:
        """The module that decides the layout of the layer's output: its last, or, where that has
        no weights, the one whose output it is given."""
        made: dict[nn.Module, tuple] = {}
        leaves = [part for part in self.model.modules() if not list(part.children())]
        handles = [
            leaf.register_forward_hook(
                lambda leaf, given, output: made.update({leaf: (given, output)})
            )
            for leaf in leaves
            if not isinstance(leaf, torch.jit.ScriptModule)
        ]
        try:
            self._result(images)
        finally:
            for handle in handles:
                handle.remove()
        module = last_of(self.layer)
        while module in made and not decides_layout(module):
            given, _ = made.pop(module)
            before = [m for m, (_, output) in made.items() if given and output is given[0]]
            if not before:
                break
            module = before[-1]
        return module

    def _find_head(self, tried: Tensor, output: Tensor, expected: Tensor) -> None:
        """Set `one_image`, or `is_branch`, so that the output (B, ...) for images tried (B, ...),
        put in again, gives the logits expected (B, C). Raises ValueError where nothing does."""
        off, failure = [], None
        rows = self.layout.to_rows(output)
        # A network may ask how many images there are.
        for self.one_image, self.is_branch in ((True, False), (False, False), (False, True)):
            given = fa.BranchRows(rows, tried) if self.is_branch else rows
            try:
                logits = self.logits_from_preactivations(given)
            except Exception as error:  # whatever the model's code raises
                if fa.is_out_of_memory(error):
                    raise
                failure = error
                continue
            off.append(_distance(logits, expected))
            if not off[-1] > fa.ROUNDING:
                return
        if not off:
            raise ValueError(
                f"the model does not run with the output of layer {self.name!r} put in again "
                f"({describe_error(failure)}); name another layer"
            ) from failure
        raise ValueError(
            f"the model reads more of layer {self.name!r} than pool={self.pool!r} keeps: with it "
            f"the logits are off by {min(off):.2g} of the largest; leave out pool, so that "
            f"positions stay"
        )


def _distance(logits: Tensor, expected: Tensor) -> float:
    """Between logits (B, C), relative to the largest of those expected; inf for other shapes."""
    if logits.shape != expected.shape:
        return float("inf")
    logits, expected = logits.float(), expected.float()
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


class EvalMode:
    """A module that has the two METHODS itself, in evaluation mode while they run, and as it was
    afterwards; images on its device and of its dtype, results float32."""

    runs_in_eval_mode = True  # by itself, so callers need not check

    def __init__(self, model: nn.Module):
        self.model = model
        self.title = f"a layer of {type(model).__name__}"
        self.short_name = type(model).__name__
        like = parameter_like(model)
        self.device, self.dtype = like.device, like.dtype
        self.output = like  # has the device and dtype of the layer's output, once that is known
        self.positions, self.is_branch = getattr(model, "positions", None), False

    def in_words(self) -> str:
        """What is known of the layer."""
        return "its own preactivations"

    def preactivations(self, images: Tensor) -> Tensor:
        """images (B, ...) -> (B, d_in)"""
        with eval_mode(self.model), gradients_if_asked(images):
            raw = self.model.preactivations(images.to(self.device, self.dtype, copy=True))
        self.output = raw.detach()[:0].clone()
        return raw.float()

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        """raw (B, d_in) -> logits (B, C)"""
        given = raw.to(self.output.device, self.output.dtype)
        with eval_mode(self.model), gradients_if_asked(raw):
            return self.model.logits_from_preactivations(given).float()
