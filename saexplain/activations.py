"""What does a layer give for every image? Its output for each split, from one pass, and warnings.

    layer = collect_activations(net, data)           # one pass over each split; mu, std
    layer.splits["val"].raw, layer.with_sae(sae)     # all that the analysis reads

Takes a network with the two methods of `layers.AtLayer` and images; gives a
`feature_analysis.ExplainedLayer`. It knows nothing of hooks or SAEs.

Key: N images, B in a batch, C classes, d_in units of the layer, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import feature_analysis as fa
from saexplain.files import InputError, sha256_of, to_json
from saexplain.images import SPLIT_NAMES, Data, Split, TensorLoader, digest_of
from saexplain.layers import LOW_PRECISION
from saexplain.parallel import ONE_PROCESS, Ranks, shard_of
from saexplain.positions import sampled_positions
from saexplain.progress import progress_bar
from saexplain.rows import mean_and_std, spread_over
from saexplain.store import FileStore, MemoryStore, open_store

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
    try:
        rescaled = layer.logits(layer.raw(given * factor))
    except Exception:  # a network that checks its images
        return
    found = []
    for logits in (layer.logits(raw[some.to(raw.device)]), rescaled):
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
