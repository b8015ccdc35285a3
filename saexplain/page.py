"""What do all features look like, and what do they do? One HTML file with all of it.

    write_dashboard("feature_report.html", records, layer, Shown(bank, activity, heats, inked))

Takes the records of feature_report.json, an `ExplainedLayer` with the split "val" and, for views of
errors and the guided tour, "test". Given the weights of a small network as well (`Network`), the
page computes it, so that one can draw an image and remove features. The file holds its data, styles
and scripts, fetches nothing, and is the same byte for byte for the same input. Hypotheses and what
their tests found come with the records; those that a reader draws are tested by the page, on the
images of `images_on_page`. The scripts are in templates/.

Key: N validation images, C classes, d_in units, d_sae features, F of them shown, H x W pixels,
h x w = P cells of the canvas.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import (
    Activity,
    Removals,
    coactivation_neighbors,
    collect_activity,
    top_similar_rows,
)
from saexplain.captions import images_of
from saexplain.counterfactuals import TestReview, class_effects, review_tests
from saexplain.edits import FILL_LEVEL, N_EDIT, N_PLACES, STEP
from saexplain.evaluation import DOSES, EFFECT_IMAGES, format_rule
from saexplain.hypotheses import MIN_ACTIVE, Rule, evenly_spaced, weights_of_rows
from saexplain.images import as_ink
from saexplain.ink import Canvas, ink_sign
from saexplain.own import digest_of_sae
from saexplain.page_classes import FEW_CLASSES, class_tables, needs_tables, sparse, test_tables
from saexplain.page_maps import (
    IMAGES_SHOWN,
    example_maps,
    feature_fields,
    map_fields,
    mean_map_array,
    position_arrays,
    quantize,
)
from saexplain.thumbnails import (
    ACROSS,
    PAGE_BYTES,
    SAMPLED,
    SIZES,
    PageSize,
    Pictures,
    as_levels,
    encode_sheets,
    fit_page,
    reduce_images,
    reduced_shape,
    tile_shape,
)
from saexplain.tours import find_tour

if TYPE_CHECKING:
    from saexplain.images import Display
    from saexplain.where import Maps

TEMPLATES = Path(__file__).resolve().parent / "templates"
# files of templates/, joined in this order: later ones use what earlier ones define
SCRIPTS = """core dom where parts words story class pair errors images features feature draw score
store write yours main""".split()
TOP_SHOWN, BAND_SHOWN = SIZES[0][1:]  # strongest images of a feature, and of each quarter, at most
HISTOGRAM_BINS = 24
NEIGHBORS = 4  # similar features listed with a feature, by direction and by coactivation
MAP_NEIGHBORS = 5  # features that the map tries to keep near a feature
SAE_WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")  # with which the page computes
MAX_IMAGES = 2000  # of each of SPLITS, on which a reader's hypotheses are measured
MAX_LEVELS = 5_000_000  # bytes of all their ink: of larger images there are fewer
MAX_COLOR_LEVELS = 1_500_000  # the same beside images in color, which need space themselves
WHOLE_SIDE = 96  # pixels: gray images up to this side are shown as they are
PATTERN_SIDE = 48  # pixels of a pattern, at most, where images are reduced or in color
FEATURE_BYTES = 1600  # of what is known of a feature, as text
SCRIPT_BYTES = 300_000  # of scripts and styles
FITTED = 0.95  # of PAGE_BYTES, which features take where all are too many
FEWEST_SHOWN = 100  # features that a page has in any case, if there are so many
COLOR_ERRORS = 100  # misclassified images shown where there are many classes, or colors
SPLITS = ("val", "test_half", "replication_half")
ARRAY_KINDS = {
    "uint8": "u1",
    "int8": "i1",
    "uint16": "u2",
    "int32": "i4",
    "float32": "f4",
}  # their names in core.js


class Shown(NamedTuple):
    """What is shown of the features; bank, activity and images are of the same images.

    `display` gives the images' own colors; without one, or where they are gray, they are shown as
    `saexplain.images.as_ink` makes them.
    """

    bank: fa.FeatureBank
    activity: Activity
    heats: Tensor | None  # (d_sae, H, W), input patterns, in crops for a layer with positions
    inked: np.ndarray | None = None  # (H, W) bool, pixels that images ink; None: all
    canvas: Canvas | None = None  # of drawings; None: fitted to the images of the split "val"
    maps: Maps | None = None  # where features are active
    faithful: Tensor | None = None  # (d_sae,) bool, patterns that can be shown; None: all
    display: Display | None = None
    removed: Removals | None = None  # what removing each feature does, where that is known


class Overview(NamedTuple):
    """What the first view shows beside the features."""

    title: str = "Features of an image classifier"
    results: Sequence[tuple[str, str]] = ()  # (name, value)
    diagnoses: Sequence[dict] = ()  # with complaint, value, limit, what, advice and fine
    frontier: Sequence[dict] = ()  # with l0, fvu and agreement, one for each SAE
    classes: Sequence[str] = ()  # their names; none: "0", "1", ...
    without_drawing: str = ""  # why one cannot draw, when no network is given


class Network(NamedTuple):
    """logits = W2 relu(W1 x + b1) + b2 of pixels x in [0, 1]: a network the page can compute."""

    W1: Tensor  # (d_in, n_pixels)
    b1: Tensor  # (d_in,)
    W2: Tensor  # (C, d_in)
    b2: Tensor  # (C,)


# --------------------------------------------------------------------------------------------------
# How strongly is a feature active, and where is it on a map?
# --------------------------------------------------------------------------------------------------


def activation_histograms(
    activity: Activity, bins: int = HISTOGRAM_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (d_sae, bins) of each feature's positive activations, and the largest (d_sae,).

    The bins divide 0 to the largest evenly; an inactive feature has zeros.
    """
    feature = activity.feature.numpy()
    activation = activity.activation.numpy()
    d_sae = len(activity.n_active)

    largest = np.zeros(d_sae, np.float32)
    np.maximum.at(largest, feature, activation)

    bin_of = (activation / largest[feature] * bins).astype(int)
    bin_of = np.minimum(bin_of, bins - 1)  # the largest is in the last bin
    counts = np.bincount(feature * bins + bin_of, minlength=d_sae * bins)
    return counts.reshape(d_sae, bins), largest


def map_places(directions: Tensor) -> tuple[list[list[int]], int, float]:
    """A map of directions (F, d_in): (column, row) of each, its side, the share of true neighbors.

    Laplacian eigenmaps (Belkin and Niyogi, 2003) of the graph of nearest neighbors by cosine. Only
    the order along each axis is kept, which spreads the features evenly; then each takes the free
    cell nearest to its own, so that none hides another. The share counts features whose nearest
    neighbor by cosine is among the ten nearest on the map.
    """
    n = len(directions)
    unit = torch.nn.functional.normalize(directions.detach().cpu().double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2.0)  # below any cosine: none is its own neighbor
    nearest = cosine.topk(min(MAP_NEIGHBORS, n - 1))
    graph = torch.full((n, n), 1e-3, dtype=torch.float64)  # connected, whatever the neighbors
    graph.scatter_(1, nearest.indices, nearest.values.clamp(min=1e-3))
    graph = torch.maximum(graph, graph.T)
    root = graph.sum(1).sqrt()
    _, vectors = torch.linalg.eigh(graph / torch.outer(root, root))  # the largest come last
    plane = vectors[:, [-min(2, n), -min(3, n)]] / root[:, None]
    plane *= plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()  # eigh's sign is arbitrary

    side = math.ceil(math.sqrt(2 * n))  # half of the cells stay free
    wanted = plane.argsort(0).argsort(0) * ((side - 1) / max(1, n - 1))
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    places = torch.empty(n, 2, dtype=torch.float64)
    for i, target in enumerate(wanted):
        cell = int((cells - target).square().sum(1).argmin())
        places[i] = cells[cell]
        cells[cell] = math.inf  # taken
    distance = torch.cdist(places, places).fill_diagonal_(math.inf)
    near = distance.topk(min(10, n), largest=False).indices
    kept = (near == cosine.argmax(1, keepdim=True)).any(1).double().mean()
    return places.int().tolist(), side, round(float(kept), 3)


# --------------------------------------------------------------------------------------------------
# The entry of a feature
# --------------------------------------------------------------------------------------------------


def _rounded(values: Iterable[float], digits: int = 4) -> list[float]:
    """The values with so many significant digits: more than the page shows."""
    return [float(f"{value:.{digits}g}") for value in values]


def _example_rows(examples: fa.Examples, slots: dict[int, int]) -> list[list]:
    """Examples (m,) as (slot, label, activation); `slots` gains the images it lacks."""
    places = [slots.setdefault(image, len(slots)) for image in examples.index.tolist()]
    activations = _rounded(examples.activation.tolist())
    return [list(row) for row in zip(places, examples.label.tolist(), activations, strict=True)]


def _shown_examples(
    bank: fa.FeatureBank, k: int, n_top: int, n_band: int
) -> tuple[fa.Examples, list[fa.Examples]]:
    """The strongest images of feature k, and some of each quarter of its active range."""
    top = fa.Examples(*(column[:n_top] for column in bank.top.of(k)))
    return top, bank.bands(k, per_band=n_band) if n_band else []


def _examples(bank: fa.FeatureBank, k: int, slots: dict[int, int], size: PageSize) -> dict:
    """The examples of feature k as rows."""
    top, bands = _shown_examples(bank, k, size.n_top, size.n_band)
    return {
        "top": _example_rows(top, slots),
        "bands": [_example_rows(band, slots) for band in bands],
    }


def _map_arrays(
    layer: fa.ExplainedLayer, shown: Shown, entries: Sequence[dict], images: Sequence[int]
) -> dict[str, np.ndarray]:
    """The maps of all examples, those of a feature up to its largest, and the mean maps.

    `images` are those of the slots. Entries gain their numbers, and rows the number of their map.
    """
    rows, examples = [], []
    for entry in entries:
        for rank, row in enumerate(entry["top"]):
            examples.append((entry["feature"], images[row[0]], rank))
            rows.append(row)
        for row in itertools.chain(*entry["bands"]):
            examples.append((entry["feature"], images[row[0]], -1))
            rows.append(row)
    found, has_map = example_maps(layer, layer.splits["val"].raw, shown.maps, examples)
    feature = torch.tensor([k for k, _, _ in examples], dtype=torch.int64)
    scales = torch.zeros(layer.d_sae).scatter_reduce_(0, feature, found.amax((1, 2)), "amax")
    kept = torch.tensor(has_map, dtype=torch.bool)
    for row, place, there in zip(rows, (kept.cumsum(0) - 1).tolist(), has_map, strict=True):
        if there:
            row.append(place)
    for entry in entries:
        entry |= feature_fields(shown.maps, entry["feature"])
        entry["scale"] = _rounded([float(scales[entry["feature"]])])[0]
    features = [entry["feature"] for entry in entries]
    return {
        "maps": quantize(found[kept], scales[feature[kept]][:, None, None]),
        "mean_maps": mean_map_array(shown.maps, features),
    }


def _dose_response(effects: dict) -> dict | None:
    """The change of each named logit at each dose, measured and linear."""
    curves = [
        [e["logit"], _rounded(e["at_doses"]), _rounded(e["linear"])] for e in effects.values()
    ]
    return {"at": list(DOSES), "curves": curves} if curves else None


def _hypothesis_fields(record: dict) -> dict:
    """The hypothesis about a feature and the evidence for it; None where there is none."""
    hypothesis, evidence = record.get("hypothesis") or {}, record.get("evidence") or {}
    named = ("classes", "raises", "lowers", "threshold", "strong_from")
    found = ("chance_f1", "picked", "detection", "classes", "effects", "results", "n_images")
    return {
        "caption": record.get("caption"),
        "lines": record.get("measured", []),
        "confidence": record.get("confidence"),
        "replicated": record.get("replicated"),
        "mark": record.get("mark"),
        "f1": record.get("f1"),
        "hypothesis": {name: hypothesis.get(name) for name in named},
        "found": {name: evidence.get(name) for name in found},
        "dose": _dose_response(evidence.get("effects") or {}),
    }


def _measured_fields(record: dict) -> dict:
    """What is known of a feature without any hypothesis."""
    supports = _rounded(-delta for delta in record["ablation_delta_vector"])
    pushes, labels = _rounded(record["logit_delta_vector"]), record["label_histogram"]
    if len(supports) > FEW_CLASSES:
        supports, pushes, labels = sparse(supports), sparse(pushes), sparse(labels, 12)
    return {
        "feature": record["feature"],
        "density": float(f"{record['mean_active']:.6g}"),
        "influence": _rounded([record["influence"]])[0],
        "changes": _rounded([record["predictions_changed"]])[0],
        "mode": record["label_mode_when_active"],
        "labels": labels,
        "supports": supports,
        "pushes": pushes,
    }


def _neighbor_rows(neighbors: tuple[Tensor, Tensor]) -> list[list[list]]:
    """The neighbors of each feature as [feature, similarity]."""
    rows = zip(*(column.tolist() for column in neighbors), strict=True)
    return [[[k, round(similarity, 3)] for k, similarity in zip(*row, strict=True)] for row in rows]


def _entries(
    records: Sequence[dict], sae, shown: Shown, largest: np.ndarray, size: PageSize
) -> tuple[list[dict], list[int]]:
    """What the page shows of each feature (F,), and the images that it shows.

    An example's slot is a position in the second list; `largest` (d_sae,) are activations.
    """
    own = torch.tensor([record["feature"] for record in records], dtype=torch.int64)
    unit = torch.nn.functional.normalize(sae.W_dec.detach().cpu(), dim=1)
    near = _neighbor_rows(top_similar_rows(unit, own, NEIGHBORS))
    coactive = _neighbor_rows(coactivation_neighbors(shown.activity, NEIGHBORS))
    threshold = getattr(sae, "threshold", torch.zeros(len(largest)))  # a ReLU SAE has none

    entries = []
    slots: dict[int, int] = {}  # of each image
    for record, nearest in zip(records, near, strict=True):
        k = record["feature"]
        entry = _measured_fields(record) | _hypothesis_fields(record)
        entry |= _examples(shown.bank, k, slots, size)
        entry |= {"near": nearest, "coactive": coactive[k]}
        entry["largest"], entry["threshold"] = _rounded([largest[k], threshold[k]])
        if shown.faithful is not None and not shown.faithful[k]:
            entry["faithful"] = False
            entry["correlation"] = _rounded([record.get("pattern_correlation", 0.0)])[0]
        entries.append(entry)
    return entries, list(slots)


# --------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    """How a page shows images, patterns and classes."""

    color: bool  # images in their own colors
    in_place: bool  # patterns lie over images, and some of them are faithful
    can_write: bool  # readers can draw hypotheses
    has_tables: bool  # of the effects on classes only the largest are on the page
    can_reduce: bool  # images may be smaller on the page than they are
    whole: tuple[int, int]  # height and width of the images
    shape: tuple[int, int]  # the same on the page
    size: PageSize

    @property
    def is_reduced(self) -> bool:
        return self.shape != self.whole

    @property
    def is_default(self) -> bool:
        return self.in_place and not self.color and not self.is_reduced


def _image_arrays(
    name: str, pictures: Pictures, index: Sequence[int], look: _Look
) -> dict[str, np.ndarray]:
    """The images at `index` as levels, or as sheets of tiles in color."""
    parts = [torch.empty(0, 3 if look.color else 1, *look.shape)]
    for some in torch.as_tensor(index).split(fa.ROWS):
        parts.append(reduce_images(pictures.of(some), max(look.shape)))
    images = torch.cat(parts)
    if not look.color:
        return {name: as_levels(images[:, 0])}
    return {f"{name}_{n}": sheet for n, sheet in enumerate(encode_sheets(images))}


def _pattern_arrays(shown: Shown, features: Sequence[int], look: _Look) -> dict[str, np.ndarray]:
    """Input patterns from -127 to 127, full color, and the pixels (h, w) that images ink; where
    pixels are the images' own, also the value (F,) of full color.

    A pattern that is not faithful is blank.
    """
    patterns = fa.as_array(shown.heats)[features]
    mask = None if look.color else fa.as_mask(shown.inked, patterns.shape[1:])
    if not look.is_default:
        side = max(look.shape) if look.in_place else PATTERN_SIDE
        patterns = reduce_images(torch.from_numpy(patterns)[:, None], min(side, PATTERN_SIDE))
        patterns = patterns[:, 0].numpy()
        mask = None if mask is None or mask.shape != patterns.shape[1:] else mask
    shape = patterns.shape[1:]

    scales = np.ones((len(features), 1, 1))
    for row, heat in enumerate(patterns):
        scales[row] = fa.display_scale(heat, mask) or 1.0  # 0 for a pattern of zeros
    heats = 127 * (patterns / scales).clip(-1, 1)
    if shown.faithful is not None:
        heats[~fa.as_array(shown.faithful)[features]] = 0
    inked = np.ones(shape) if mask is None else mask
    arrays = {"heats": heats.round().astype(np.int8), "inked": inked.astype(np.uint8)}
    if look.is_default:
        arrays["heat_scale"] = scales.ravel().astype(np.float32)
    return arrays


def _mean_arrays(
    shown: Shown, images: Tensor, features: Sequence[int], n_classes: int, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Means of the images (N, C, H, W) that activate each feature, and of each class, as uint8.

    They have the shape (h, w) of the patterns.
    """
    ink = as_ink(images.cpu())
    flat = reduce_images(ink, max(shape)).flatten(1) if ink.shape[2:] != shape else ink.flatten(1)
    activity = shown.activity
    by_feature = torch.nn.functional.embedding_bag(
        activity.image, flat, activity.start[:-1], mode="mean"
    )[features]
    if shown.faithful is not None:
        by_feature[~shown.faithful[features]] = 0
    by_class = flat.new_zeros(n_classes, flat.shape[1]).index_add_(0, activity.labels, flat)
    pictures = {}
    for name, means in (("means", by_feature), ("class_means", by_class)):
        strongest = means.amax(1, keepdim=True).clamp(min=1e-9)
        pictures[name] = (255 * means / strongest).round().byte().numpy()  # its strongest pixel 255
    return pictures


def _images_of_splits(layer: fa.ExplainedLayer) -> dict[str, Tensor]:
    """All images of each of SPLITS that there are, as indices into "val" or "test"."""
    of_split = {"val": torch.arange(len(layer.splits["val"].labels))}
    if "test" in layer.splits:  # its halves are those of `evaluation.split_test_images`
        every = torch.arange(len(layer.splits["test"].labels))
        of_split |= {"test_half": every[0::2], "replication_half": every[1::2]}
    return {split: of for split, of in of_split.items() if len(of)}


def images_on_page(
    layer: fa.ExplainedLayer, canvas: Canvas | None = None, in_color: bool = False
) -> dict[str, Tensor]:
    """The images on which the page measures hypotheses, evenly spaced, at most MAX_IMAGES of each
    of SPLITS: indices into "val", and, for both halves of the test images, into "test"."""
    canvas = canvas or Canvas.fit(layer.splits["val"].images)
    levels = MAX_COLOR_LEVELS if in_color else MAX_LEVELS
    most = min(MAX_IMAGES, max(1, levels // (len(SPLITS) * math.prod(canvas.shape))))
    return {split: evenly_spaced(of, most) for split, of in _images_of_splits(layer).items()}


def _split_arrays(
    layer: fa.ExplainedLayer,
    canvas: Canvas,
    features: Sequence[int],
    largest: np.ndarray,
    in_color: bool,
) -> dict[str, np.ndarray]:
    """The images of `images_on_page`, their labels, and which of them activate each feature, from 1
    to 255 by its `largest` activation (d_sae,)."""
    arrays = {}
    for split, some in images_on_page(layer, canvas, in_color).items():
        whole = layer.splits["val" if split == "val" else "test"]
        images, labels, raw = (values[some.to(values.device)] for values in whole)
        activity = collect_activity(layer, raw, labels)
        own = [activity.of(k) for k in features]
        at, acts = (torch.cat(column).numpy() for column in zip(*own, strict=True))
        counts = activity.n_active[features]
        scale = np.repeat(largest[features], counts).clip(1e-12)
        arrays |= {
            f"{split}_levels": canvas.levels(images).byte().numpy(),
            f"{split}_labels": labels.cpu().numpy().astype(np.uint16),
            f"{split}_start": np.append(0, counts.cumsum(0)).astype(np.int32),
            f"{split}_image": at.astype(np.uint16),
            f"{split}_activation": (255 * acts / scale).round().clip(1, 255).astype(np.uint8),
        }
    return arrays


def _drawing_array(records: Sequence[dict], canvas: Canvas) -> np.ndarray:
    """(F, h, w) int8 drawings of the hypotheses, blank where there is none."""
    drawings = np.zeros((len(records), *canvas.shape), np.int8)
    for drawing, record in zip(drawings, records, strict=True):
        if rows := (record.get("hypothesis") or {}).get("drawing"):
            drawing[:] = weights_of_rows(rows)
    return drawings


def _fewer_errors(review: TestReview, n: int) -> TestReview:
    """The review with at most n errors, those of the largest margin."""
    n, kept = min(n, review.n_errors), torch.ones(len(review.image), dtype=torch.bool)
    kept[n : review.n_errors] = False
    activity, place = review.activity, kept.cumsum(0) - 1
    own = kept[activity.image]
    counts = torch.bincount(activity.feature[own], minlength=len(activity.n_active))
    return review._replace(
        image=review.image[kept],
        n_errors=n,
        activity=activity._replace(
            start=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            image=place[activity.image[own]],
            activation=activity.activation[own],
            position=activity.position[own],
            labels=activity.labels[kept],
        ),
        added=review.added[own],
        logits=review.logits[kept],
        sets=type(review.sets)(*(column[:n] for column in review.sets)),
    )


def _spread_tests(review: TestReview) -> list[int]:
    """The places of the test images whose positions can be explored: errors, as many others, and
    the image of the tour."""
    errors = torch.arange(min(review.n_errors, IMAGES_SHOWN // 2))
    others = torch.arange(review.n_errors, len(review.image))
    places = [*errors.tolist(), *others[: IMAGES_SHOWN - len(errors)].tolist()]
    if review.tour is not None:
        places.append(review.image.tolist().index(review.tour.image))
    return list(dict.fromkeys(places))


def _test_arrays(review: TestReview, has_tables: bool) -> dict[str, np.ndarray]:
    """The features active on each test image shown, its pairs from `pair_start` on."""
    activity = review.activity
    order = activity.image.argsort(stable=True)  # from features in order to images in order
    counts = torch.bincount(activity.image, minlength=len(review.image))
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    arrays = {
        "test_logits": review.logits.numpy(),
        "pair_start": start.int().numpy(),
        "pair_feature": activity.feature[order].int().numpy(),
        "pair_activation": activity.activation[order].numpy(),
        "pair_adds": review.added[order].numpy(),
        "fixed_logits": review.sets.logits.numpy(),
    }
    if has_tables:
        forced = torch.tensor(review.pair).expand(len(review.image), -1)
        forced = torch.cat([activity.labels[:, None], forced], dim=1)
        given = (review.logits, review.added[order], activity.image[order], review.sets.logits)
        arrays |= test_tables(*given, forced)
    return arrays


def _test_fields(review: TestReview, test: fa.Activations) -> dict:
    """Labels, errors, flip sets and the guided tour of the test images shown."""
    number = review.image.tolist()
    tour = None
    if review.tour is not None:
        logits = [_rounded(row, 8) for row in review.tour.logits.tolist()]
        slot = number.index(review.tour.image)
        tour = review.tour._asdict() | {"logits": logits, "image": slot}
    return {
        "labels": test.labels[review.image].tolist(),
        "number": number,
        "n": len(test.labels),
        "shown_errors": review.n_errors,
        "errors": review.all_errors,
        "pair": review.pair,
        "fixing": [row.nonzero()[:, 0].tolist() for row in review.sets.off],
        "tour": tour,
    }


def _weight_arrays(layer: fa.ExplainedLayer, network: Network) -> dict[str, np.ndarray]:
    """The weights with which the page computes, float32."""
    weights = {**network._asdict(), "mu": layer.mu, "std": layer.std}
    weights |= {name: getattr(layer.sae, name) for name in SAE_WEIGHTS}
    return {name: weight.detach().cpu().float().numpy() for name, weight in weights.items()}


def _pack(arrays: dict[str, np.ndarray]) -> tuple[dict[str, dict], str]:
    """The place of each array in one block of bytes, and this block as base64 of gzip.

    Offsets are multiples of four, as the browser needs them for floats. The gzip header holds no
    time: the same arrays give the same text.
    """
    places = {}
    raw = bytearray()
    for name, array in arrays.items():
        raw += bytes(-len(raw) % 4)
        kind = ARRAY_KINDS[str(array.dtype)]
        places[name] = {"type": kind, "offset": len(raw), "length": array.size}
        raw += array.tobytes()

    # What repeats in digits is blank paper: to search for runs alone makes the file as small
    # as a full search does, in a quarter of the time.
    compressor = zlib.compressobj(wbits=16 + zlib.MAX_WBITS, strategy=zlib.Z_RLE)  # 16: gzip
    packed = compressor.compress(raw) + compressor.flush()
    return places, base64.b64encode(packed).decode("ascii")


def _testing_fields(
    layer: fa.ExplainedLayer, canvas: Canvas | None, network: Network | None
) -> dict[str, object]:
    """What the page needs to measure and test the hypotheses of its reader; little without a
    canvas, as they cannot be drawn then."""
    if canvas is None:
        return {"sae": digest_of_sae(layer.sae), "canvas": (0, 0), "cell": 1}
    plain = canvas.cell == canvas.sign == 1 and not canvas.low.any() and (canvas.span == 1).all()
    return {
        "sae": digest_of_sae(layer.sae),
        "canvas": canvas.shape,
        "cell": canvas.cell,
        "rule": Rule()._asdict(),
        "confidence_rule": format_rule(Rule()),
        "of_split": {split: len(of) for split, of in _images_of_splits(layer).items()},
        "min_active": MIN_ACTIVE,
        "effect_images": EFFECT_IMAGES,
        "edits": {
            "can": bool(network is not None and plain),  # ink is the pixels that it reads
            "n": N_EDIT,
            "fill": FILL_LEVEL,
            "places": N_PLACES,
            "step": max(1, round(STEP * canvas.scale)),
        },
    }


# --------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------


def _safe_json(value: object) -> str:
    """The value as ASCII JSON without a character that can end a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _class_names(overview: Overview, n_classes: int) -> list[str]:
    """The name of each class. Raises ValueError for another number of names."""
    names = list(overview.classes) or [str(c) for c in range(n_classes)]
    if len(names) != n_classes:
        raise ValueError(f"classes must be {n_classes} names, one for each logit, got {len(names)}")
    return names


def _template() -> str:
    """The page without its data: page.html with styles and scripts put in."""

    def read(name: str) -> str:
        return (TEMPLATES / name).read_text(encoding="utf-8")

    page = read("page.html").replace("{{STYLE}}", read("style.css"))
    return page.replace("{{SCRIPT}}", "".join(read(f"{name}.js") for name in SCRIPTS))


def _any_faithful(shown: Shown, features: Sequence[int]) -> bool:
    """Whether there is a pattern that can be shown."""
    if shown.heats is None:
        return False
    return shown.faithful is None or bool(shown.faithful[features].any())


def _look(
    records: Sequence[dict], layer: fa.ExplainedLayer, shown: Shown, network: Network | None
) -> tuple[_Look, Pictures]:
    """How the page shows things, at first with the largest thumbnails, and its pictures."""
    images, features = layer.splits["val"].images, [record["feature"] for record in records]
    pictures = Pictures(images, shown.display)
    color = pictures.in_color
    is_lazy, any_faithful = not isinstance(images, Tensor), _any_faithful(shown, features)
    in_place = any_faithful and not is_lazy and not layer.has_positions
    any_drawn = any((record.get("hypothesis") or {}).get("drawing") for record in records)
    whole = tuple(images.shape[2:])
    can_reduce = network is None and (color or max(whole) > WHOLE_SIDE)
    look = _Look(
        color,
        in_place,
        in_place and bool(any_drawn or shown.maps is None),
        needs_tables(shown.bank.label_histogram.shape[1], len(features)),
        can_reduce,
        whole,
        reduced_shape(whole, SIZES[0].side) if can_reduce else whole,
        SIZES[0],
    )
    return look, pictures


def _fitted_look(
    look: _Look,
    records: Sequence[dict],
    shown: Shown,
    pictures: Pictures,
    n_tests: int,
    used: tuple[int, int],
) -> tuple[_Look, int]:
    """The look with thumbnails, and so many of them, that the page fits into PAGE_BYTES; and how
    many features fit, about, where all are too many.

    `used` are the bytes of the other arrays of features, and of those that do not depend on their
    number.
    """

    def count(n_top: int, n_band: int) -> tuple[int, int]:
        images, n = set(), 0
        for record in records:
            top, bands = _shown_examples(shown.bank, record["feature"], n_top, n_band)
            for part in (top, *bands):
                images.update(part.index.tolist())
                n += len(part.index)
        return len(images), n

    n_images = len(pictures)
    sample = pictures.of(evenly_spaced(torch.arange(n_images), SAMPLED))
    cells = math.prod(shown.maps.grid) if shown.maps is not None else 0
    text = FEATURE_BYTES * len(records) + SCRIPT_BYTES
    budget = (PAGE_BYTES - text) * 3 / 4 - sum(used)
    size, needed = fit_page(count, n_tests, sample, cells, budget)
    n = len(records)
    if needed > budget and n > FEWEST_SHOWN:
        fixed = SCRIPT_BYTES + used[1] * 4 / 3
        by_features = text + (sum(used) + needed) * 4 / 3 - fixed
        fitting = int(n * (FITTED * PAGE_BYTES - fixed) / by_features)
        n = max(FEWEST_SHOWN, min(n - 1, fitting))
    if shown.maps is not None and shown.maps.kind == "occlusion":  # examples that have a map
        size = size._replace(n_top=min(size.n_top, shown.maps.top.shape[1]))
    shape = reduced_shape(look.whole, size.side) if look.can_reduce else look.whole
    return look._replace(size=size, shape=shape), n


def _most_influential(records: Sequence[dict], n: int) -> Sequence[dict]:
    """The n records of most influence, in their order."""
    order = sorted(range(len(records)), key=lambda i: -records[i]["influence"])
    return [records[i] for i in sorted(order[:n])]


class _Contents(NamedTuple):
    """What a page shows of the features that fit."""

    records: Sequence[dict]
    look: _Look
    pictures: Pictures
    canvas: Canvas | None  # of drawings, where readers can draw
    arrays: dict[str, np.ndarray]  # of features
    tests: dict[str, np.ndarray]  # of test images, but for their pixels


def _feature_arrays(
    layer: fa.ExplainedLayer,
    records: Sequence[dict],
    shown: Shown,
    look: _Look,
    pair: Sequence[int],
    network: Network | None,
) -> dict[str, np.ndarray]:
    """The arrays of the features of `records`, and the network's."""
    features, val = [record["feature"] for record in records], layer.splits["val"]
    counts, largest = activation_histograms(shown.activity)
    arrays = {}
    if _any_faithful(shown, features):
        arrays |= _pattern_arrays(shown, features, look)
    if look.in_place:
        n_classes = shown.bank.label_histogram.shape[1]
        arrays |= _mean_arrays(shown, val.images, features, n_classes, arrays["inked"].shape)
    if look.can_write:
        arrays |= _split_arrays(layer, shown.canvas, features, largest, look.color)
        arrays["drawings"] = _drawing_array(records, shown.canvas)
        arrays["canvas_inked"] = shown.canvas.inked.numpy().astype(np.uint8)
    arrays["histograms"] = counts[features].astype(np.float32)
    if look.has_tables:
        known = (shown.activity, features, pair, shown.removed)
        arrays |= class_tables(layer, val.raw, *known)
    else:
        effects = class_effects(layer, val.raw, shown.activity, shown.removed)
        arrays["class_adds"] = effects[:, features]
    return arrays | (_weight_arrays(layer, network) if network is not None else {})


def _fitting_contents(
    layer: fa.ExplainedLayer,
    records: Sequence[dict],
    shown: Shown,
    network: Network | None,
    review: TestReview | None,
) -> _Contents:
    """What the page shows: all features, or those of most influence that fit into PAGE_BYTES."""
    val, n_tests = layer.splits["val"], 0 if review is None else len(review.image)
    pair, (_, largest) = review.pair if review else [0, 1], activation_histograms(shown.activity)
    while True:
        look, pictures = _look(records, layer, shown, network)
        canvas = (shown.canvas or Canvas.fit(val.images)) if look.can_write else None
        given = (shown._replace(canvas=canvas), look, pair, network)
        arrays, tests = _feature_arrays(layer, records, *given), {}
        if review is not None:
            tests = _test_arrays(review, look.has_tables)
        if n_tests and shown.maps is not None and shown.maps.kind == "activation":
            test, some = layer.splits["test"], review.image[_spread_tests(review)]
            raw, own = test.raw[some.to(test.raw.device)], [r["feature"] for r in records]
            tests |= position_arrays(layer, raw, shown.maps, own, largest)
        n = len(records)
        if look.can_reduce or shown.maps is not None:
            used = tuple(len(_pack(some)[1]) * 3 // 4 for some in (arrays, tests))
            look, n = _fitted_look(look, records, shown, pictures, n_tests, used)
        if n == len(records):
            return _Contents(records, look, pictures, canvas, arrays, tests)
        records = _most_influential(records, n)


def write_dashboard(
    path: str | Path,
    records: Sequence[dict],
    layer: fa.ExplainedLayer,
    shown: Shown,
    overview: Overview | None = None,
    network: Network | None = None,
) -> int:
    """Write one HTML file that shows the features of `records`, completely or not at all; returns
    the number of features on it.

    Args:
        records: of feature_report.json, with or without hypotheses.
        layer: its split "val" holds the images of `shown`; its split "test", if there is one, gives
            the views of errors and the guided tour.
        network: the layer's model, which the page then computes: one can draw an image and remove
            features. The SAE needs all SAE_WEIGHTS.

    Images that are large or in color are reduced so that the page stays below PAGE_BYTES; where
    that is not enough, it has only the features of most influence, FEWEST_SHOWN or more. Raises
    ValueError for images of other than one or three channels, patterns or `inked` of another shape,
    and classes that are not one name for each logit.
    """
    overview = overview or Overview()
    n_classes = shown.bank.label_histogram.shape[1]
    names = _class_names(overview, n_classes)
    val, test, review = layer.splits["val"], layer.splits.get("test"), None
    if test is not None:
        whole, _ = _look(records, layer, shown, network)
        drawn_on = (shown.canvas or Canvas.fit(val.images)) if whole.can_write else None
        tour = find_tour(layer, test, records, drawn_on)
        review = review_tests(layer, test.raw, test.labels, tour)
        if whole.color or whole.has_tables:
            review = _fewer_errors(review, COLOR_ERRORS)
    n_records = len(records)
    found = _fitting_contents(layer, records, shown, network, review)
    records, look, pictures, canvas, arrays, tests = found
    features = [record["feature"] for record in records]

    _, largest = activation_histograms(shown.activity)
    entries, pictured = _entries(records, layer.sae, shown, largest, look.size)
    if shown.maps is not None:
        arrays |= _map_arrays(layer, shown, entries, pictured)
    arrays = _image_arrays("images", pictures, pictured, look) | arrays
    if review is not None:
        test_pictures = Pictures(test.images, shown.display)
        arrays |= _image_arrays("tests", test_pictures, review.image.tolist(), look) | tests
        for entry in entries if review.fixes is not None else ():
            entry["fixes"] = int(review.fixes[entry["feature"]])
            entry["breaks"] = int(review.breaks[entry["feature"]])
    places, packed = _pack(arrays)

    cells, side, kept = map_places(layer.sae.W_dec[features])
    meta = {
        **overview._asdict(),
        "shape": look.shape,
        "classes": names,
        "plurals": [images_of(names, c) for c in range(n_classes)],  # as in "6s", "trousers"
        "of_class": torch.bincount(shown.activity.labels, minlength=n_classes).tolist(),
        "testing": _testing_fields(layer, canvas, network),
        "bins": HISTOGRAM_BINS,
        "d_sae": layer.d_sae,
        "features": entries,
        "map": {"cells": cells, "side": side, "kept": kept},
        "network": {"d_in": len(layer.mu), "d_sae": layer.d_sae} if network else None,
        "tests": None if review is None else _test_fields(review, test),
        "arrays": places,
    }
    if not look.is_default:
        shape = arrays["heats"].shape[1:] if "heats" in arrays else (1, 1)
        meta["look"] = {
            "whole": look.whole,
            "in_place": look.in_place,
            "can_write": look.can_write,
            "is_light": look.in_place and ink_sign(val.images) > 0,  # what patterns call ink
            "pattern": shape,
            "color": {"tile": tile_shape(*look.shape), "across": ACROSS} if look.color else None,
        }
    if len(records) < n_records:
        meta["features_known"] = n_records
    if look.has_tables:
        meta["tables"] = True
    if shown.maps is not None:
        some = _spread_tests(review) if review is not None else []
        meta["where"] = map_fields(shown.maps, look.whole) | {"tests": some}
    page = _template().replace("{{PACK}}", packed)
    page = page.replace("{{META}}", _safe_json(meta))  # last: its text may contain the other marks
    fa.write_whole(path, page.encode("utf-8"))
    return len(records)
