"""TODO"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, coactivation_neighbors, contributions, top_similar_rows
from saexplain.captions import images_of
from saexplain.counterfactuals import TestReview, class_effects, review_tests
from saexplain.images import as_ink

TEMPLATES = Path(__file__).resolve().parent / "templates"
SCRIPTS = ("core", "dom", "parts", "story", "class", "pair", "errors", "features", "feature")
SCRIPTS += ("draw", "main")  # files of templates/, in the order in which they are joined
TOP_SHOWN = 12  # strongest images of a feature
BAND_SHOWN = 3  # images from each quarter of its active range
HISTOGRAM_BINS = 24
NEIGHBOURS = 4  # other features named next to a feature, of either kind
MAP_NEIGHBOURS = 5  # features that the map tries to keep next to a feature
SAE_WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")  # what the page computes with
ARRAY_KINDS = {
    "uint8": "u1",
    "int8": "i1",
    "int32": "i4",
    "float32": "f4",
}  # what the template calls them


class Shown(NamedTuple):
    """What is shown of the features; bank, activity and images belong to the same images."""

    bank: fa.FeatureBank
    activity: Activity
    heats: Tensor  # (d_sae, H, W), input patterns
    inked: np.ndarray | None = None  # (H, W) bool, pixels that images ink; None: all


class Overview(NamedTuple):
    """What the page says before any feature."""

    title: str = "Features of an image classifier"
    results: Sequence[tuple[str, str]] = ()  # (name, value)
    diagnoses: Sequence[dict] = ()  # with complaint, value, limit, advice and fine
    frontier: Sequence[dict] = ()  # with l0, fvu and agreement, one for each SAE
    classes: Sequence[str] = ()  # their names; none: "0", "1", ...
    without_drawing: str = ""  # why there is no network to draw for


class Network(NamedTuple):
    """logits = W2 relu(W1 x + b1) + b2 of pixels x in [0, 1]: a network the page can compute."""

    W1: Tensor  # (d_in, n_pixels)
    b1: Tensor  # (d_in,)
    W2: Tensor  # (C, d_in)
    b2: Tensor  # (C,)


# --------------------------------------------------------------------------------------------------
# How strongly does a feature fire, and which others are like it?
# --------------------------------------------------------------------------------------------------


def activation_histograms(
    activity: Activity, bins: int = HISTOGRAM_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """How each feature's activations are spread between 0 and the largest of them.

    Returns counts (d_sae, bins) and the largest (d_sae,); 0 for a silent feature.
    """
    feature = activity.feature.numpy()
    activation = activity.activation.numpy()
    d_sae = len(activity.n_active)

    largest = np.zeros(d_sae, np.float32)
    np.maximum.at(largest, feature, activation)

    place = (activation / largest[feature] * bins).astype(int)
    place = np.minimum(place, bins - 1)  # the largest is in the last bin
    counts = np.bincount(feature * bins + place, minlength=d_sae * bins)
    return counts.reshape(d_sae, bins), largest


def map_places(directions: Tensor) -> tuple[list[list[int]], int, float]:
    """A map of directions (F, d_in): (column, row) of each, the map's side, how true it is.

    Laplacian eigenmaps (Belkin and Niyogi, 2003) of the graph of nearest neighbours by cosine.
    Only the order along each axis is kept, which spreads them evenly; then each takes the free
    place nearest to its own, so that none hides another. How true: the share of them whose
    nearest neighbour is among the ten nearest on the map.
    """
    n = len(directions)
    unit = torch.nn.functional.normalize(directions.detach().cpu().double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2.0)
    nearest = cosine.topk(min(MAP_NEIGHBOURS, n - 1))
    graph = torch.full((n, n), 1e-3, dtype=torch.float64)  # connected, whatever the neighbours
    graph.scatter_(1, nearest.indices, nearest.values.clamp(min=1e-3))
    graph = torch.maximum(graph, graph.T)
    root = graph.sum(1).sqrt()
    _, vectors = torch.linalg.eigh(graph / torch.outer(root, root))  # the largest come last
    plane = vectors[:, [-min(2, n), -min(3, n)]] / root[:, None]
    plane *= plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()

    side = math.ceil(math.sqrt(2 * n))
    wanted = plane.argsort(0).argsort(0) * ((side - 1) / max(1, n - 1))
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    places = torch.empty(n, 2, dtype=torch.float64)
    for i, here in enumerate(wanted):
        cell = int((cells - here).square().sum(1).argmin())
        places[i] = cells[cell]
        cells[cell] = math.inf  # taken
    apart = torch.cdist(places, places).fill_diagonal_(math.inf)
    near = apart.topk(min(10, n), largest=False).indices
    kept = (near == cosine.argmax(1, keepdim=True)).any(1).double().mean()
    return places.int().tolist(), side, round(float(kept), 3)


# --------------------------------------------------------------------------------------------------
# What the page says about a feature
# --------------------------------------------------------------------------------------------------


def _rounded(values: Iterable[float], digits: int = 4) -> list[float]:
    """Significant digits: more than the page shows."""
    return [float(f"{value:.{digits}g}") for value in values]


def _listed(examples: fa.Examples, slots: dict[int, int]) -> list[tuple]:
    """Examples (m,) as (slot, label, activation); `slots` gains the images it lacks."""
    places = [slots.setdefault(image, len(slots)) for image in examples.index.tolist()]
    labels = examples.label.tolist()
    activations = _rounded(examples.activation.tolist())
    return list(zip(places, labels, activations, strict=True))


def _examples(bank: fa.FeatureBank, k: int, slots: dict[int, int]) -> dict:
    """The strongest images of feature k, and some of each quarter of its range."""
    top = fa.Examples(*(column[:TOP_SHOWN] for column in bank.top.of(k)))
    bands = bank.bands(k, per_band=BAND_SHOWN)
    return {"top": _listed(top, slots), "bands": [_listed(band, slots) for band in bands]}


def _dose_response(claimed: dict, effect: dict) -> dict:
    """The logit of each class that is claimed, at each dose, measured and linear."""
    curves = []
    for name in ("raises", "lowers"):
        if claimed.get(name) is not None:
            measured = _rounded(effect[f"dose_{name}"])
            linear = _rounded(effect[f"linear_{name}"])
            curves.append([claimed[name], measured, linear])
    return {"at": list(effect["doses"]), "curves": curves}


def _drawing(strokes: dict | None) -> dict | None:
    """The places of a drawing as [row, column, shape, length]; None where nothing is drawn."""
    if not strokes or not any(strokes.values()):
        return None
    fields = ("row", "col", "shape", "length")
    return {name: [[p[f] for f in fields] for p in places] for name, places in strokes.items()}


def _said(record: dict) -> dict:
    """The statement about a feature and what came of it; empty where there is none."""
    evidence = record.get("evidence") or {}
    claimed = (record.get("hypothesis") or {}).get("effect") or {}
    detected = evidence.get("detected") or {}
    effect = evidence.get("effect")
    return {
        "caption": record.get("caption"),
        "evidence": evidence.get("text"),
        "lines": record.get("measured", []),
        "confidence": record.get("confidence"),
        "outcome": record.get("outcome"),
        "explained": record.get("explained", False),
        "mark": record.get("mark"),
        "drawing": _drawing((record.get("hypothesis") or {}).get("drawing")),
        "auroc": _rounded([detected["both"]["auroc"]])[0] if "both" in detected else None,
        "dose": _dose_response(claimed, effect) if effect else None,
    }


def _measured(record: dict) -> dict:
    """What is known of a feature without any statement."""
    return {
        "feature": record["feature"],
        "density": float(f"{record['mean_active']:.6g}"),
        "influence": _rounded([record["influence"]])[0],
        "changes": _rounded([record["predictions_changed"]])[0],
        "mode": record["label_mode_when_active"],
        "labels": record["label_histogram"],
        "supports": _rounded(-loss for loss in record["ablation_delta_vector"]),
        "pushes": _rounded(record["logit_delta_vector"]),
    }


def _named(neighbours: tuple[Tensor, Tensor]) -> list[list[list]]:
    """For each feature its neighbours as [feature, similarity]."""
    others, similarities = (column.tolist() for column in neighbours)
    named = []
    for row, values in zip(others, similarities, strict=True):
        named.append([[k, round(value, 3)] for k, value in zip(row, values, strict=True)])
    return named


def _entries(
    records: Sequence[dict], sae, shown: Shown, largest: np.ndarray
) -> tuple[list[dict], list[int]]:
    """What the page says about each feature (F,), and the images that it shows.

    An example's slot is a place in the second list; `largest` (d_sae,) are activations.
    """
    own = torch.tensor([record["feature"] for record in records], dtype=torch.int64)
    unit = torch.nn.functional.normalize(sae.W_dec.detach().cpu(), dim=1)
    near = _named(top_similar_rows(unit, own, NEIGHBOURS))
    together = _named(coactivation_neighbors(shown.activity, NEIGHBOURS))
    threshold = getattr(sae, "threshold", torch.zeros(len(largest)))

    entries = []
    slots: dict[int, int] = {}  # of each image
    for record, nearest in zip(records, near, strict=True):
        k = record["feature"]
        entry = _measured(record) | _said(record) | _examples(shown.bank, k, slots)
        entry |= {"near": nearest, "together": together[k]}
        entry["largest"], entry["threshold"] = _rounded([largest[k], threshold[k]])
        entries.append(entry)
    return entries, list(slots)


# --------------------------------------------------------------------------------------------------
# Arrays, and the file
# --------------------------------------------------------------------------------------------------


def _as_bytes(images: Tensor) -> np.ndarray:
    """Images with ink in [0, 1] as uint8."""
    ink = images.detach().cpu().clamp(0, 1)
    return ink.mul_(255).round_().to(torch.uint8).numpy()


def _pattern_arrays(shown: Shown, features: Sequence[int]) -> dict[str, np.ndarray]:
    """Input patterns from -127 to 127, full colour, and the pixels (H, W) that images ink."""
    patterns = fa.as_patterns(shown.heats)[features]
    shape = patterns.shape[1:]
    mask = fa.as_mask(shown.inked, shape)

    scales = np.ones((len(features), 1, 1))
    for row, heat in enumerate(patterns):
        scales[row] = fa.display_scale(heat, mask) or 1.0  # 0 for a pattern of zeros
    heats = 127 * (patterns / scales).clip(-1, 1)
    inked = np.ones(shape) if mask is None else mask
    return {"heats": heats.round().astype(np.int8), "inked": inked.astype(np.uint8)}


def _as_picture(means: Tensor) -> np.ndarray:
    """Means of images (m, H * W) as uint8, the strongest pixel of each 255."""
    strongest = means.amax(1, keepdim=True).clamp(min=1e-9)
    return (255 * means / strongest).round().byte().numpy()


def _mean_arrays(
    shown: Shown, images: Tensor, features: Sequence[int], n_classes: int
) -> dict[str, np.ndarray]:
    """The mean of the images (N, H, W) that fire each feature, and of each class."""
    flat, activity = images.flatten(1), shown.activity
    strongest = torch.nn.functional.embedding_bag(
        activity.image, flat, activity.start[:-1], mode="mean"
    )[features]
    sums = flat.new_zeros(n_classes, flat.shape[1]).index_add_(0, activity.labels, flat)
    return {"means": _as_picture(strongest), "class_means": _as_picture(sums)}


def _test_arrays(look: TestReview, tests: fa.Activations) -> dict[str, np.ndarray]:
    """The test images shown, and what fires on each: `pair_start` says where its pairs are."""
    activity = look.activity
    order = activity.image.argsort(stable=True)
    counts = torch.bincount(activity.image, minlength=len(look.image))
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return {
        "tests": _as_bytes(as_ink(tests.images.cpu())[look.image]),
        "test_logits": look.logits.numpy(),
        "pair_start": start.int().numpy(),
        "pair_feature": activity.feature[order].int().numpy(),
        "pair_activation": activity.activation[order].numpy(),
        "pair_adds": look.added[order].numpy(),
        "fixed_logits": look.turns.logits.numpy(),
    }


def _test_words(look: TestReview, tests: fa.Activations) -> dict:
    """What the page says about the test images, and the guided tour."""
    fixing = [row.nonzero()[:, 0].tolist() for row in look.turns.off]
    said = {
        "labels": tests.labels[look.image].tolist(),
        "number": look.image.tolist(),
        "n": len(tests.labels),
        "shown_errors": look.n_errors,
        "errors": look.all_errors,
        "pair": look.pair,
        "fixing": fixing,
        "tour": None,
    }
    if look.tour is not None:
        logits = [_rounded(row, 8) for row in look.tour.logits.tolist()]
        said["tour"] = look.tour._asdict() | {"logits": logits}
        said["tour"]["image"] = said["number"].index(look.tour.image)
    return said


def _weight_arrays(layer: fa.ExplainedLayer, network: Network) -> dict[str, np.ndarray]:
    """The weights with which the page computes."""
    weights = {**network._asdict(), "mu": layer.mu, "std": layer.std}
    for name in SAE_WEIGHTS:
        weights[name] = getattr(layer.sae, name)
    return {name: weight.detach().cpu().float().numpy() for name, weight in weights.items()}


def _pack(arrays: dict[str, np.ndarray]) -> tuple[dict[str, dict], str]:
    """Where each array is among all, one after the other; and these as base64 of gzip.

    Offsets are multiples of four, as the browser needs them for floats. The gzip header
    holds no time: the same arrays give the same text.
    """
    places = {}
    raw = bytearray()
    for name, array in arrays.items():
        raw += bytes(-len(raw) % 4)
        kind = ARRAY_KINDS[str(array.dtype)]
        places[name] = {"type": kind, "offset": len(raw), "length": array.size}
        raw += array.tobytes()

    # What repeats in digits is blank paper: to look for runs alone makes the file as small
    # as a full search does, in a quarter of the time.
    compressor = zlib.compressobj(wbits=16 + zlib.MAX_WBITS, strategy=zlib.Z_RLE)  # 16: gzip
    packed = compressor.compress(raw) + compressor.flush()
    return places, base64.b64encode(packed).decode("ascii")


def _safe_json(value: object) -> str:
    """JSON no character of which can end a script element; beyond ASCII all is escaped."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _class_names(overview: Overview, n_classes: int) -> list[str]:
    """What each class is called. Raises ValueError for another number of names."""
    names = list(overview.classes) or [str(c) for c in range(n_classes)]
    if len(names) != n_classes:
        raise ValueError(f"{len(names)} class names, but the network has {n_classes} classes")
    return names


def _joined() -> str:
    """The page without its data: the skeleton with styles and scripts put in."""
    page = (TEMPLATES / "page.html").read_text(encoding="utf-8")
    scripts = [(TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    page = page.replace("{{STYLE}}", (TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return page.replace("{{SCRIPT}}", "".join(scripts))


def write_dashboard(
    path: str | Path,
    records: Sequence[dict],
    layer: fa.ExplainedLayer,
    shown: Shown,
    overview: Overview | None = None,
    network: Network | None = None,
) -> None:
    """Write one HTML file that shows the features of `records`, whole or not at all.

    Args:
        records: of feature_report.json, with or without statements.
        network: the layer's model, with which the page computes: one can draw an image and
            switch features off. The SAE then needs all SAE_WEIGHTS.

    Images are shown as `feature_analysis.as_ink` makes them, in grey. Raises ValueError for images
    of other than one or three channels, patterns or `inked` of another shape, and
    names that are not one for each class.
    """
    overview = overview or Overview()
    features = [record["feature"] for record in records]
    n_classes = shown.bank.label_histogram.shape[1]
    names = _class_names(overview, n_classes)
    val, tests = layer.splits["val"], layer.splits.get("test")
    images = as_ink(val.images.cpu())[:, 0]
    counts, largest = activation_histograms(shown.activity)
    entries, pictured = _entries(records, layer.sae, shown, largest)
    added, _ = contributions(layer, val.raw, shown.activity)

    arrays = {"images": _as_bytes(images[pictured])}
    arrays |= _pattern_arrays(shown, features)
    arrays |= _mean_arrays(shown, images, features, n_classes)
    arrays["histograms"] = counts[features].astype(np.float32)
    arrays["class_adds"] = class_effects(shown.activity, added)[:, features]
    if network is not None:
        arrays |= _weight_arrays(layer, network)
    look = None
    if tests is not None:
        look = review_tests(layer, tests.raw, tests.labels)
        arrays |= _test_arrays(look, tests)
        for entry in entries:
            entry["fixes"] = int(look.fixes[entry["feature"]])
            entry["breaks"] = int(look.breaks[entry["feature"]])
    places, packed = _pack(arrays)

    cells, side, kept = map_places(layer.sae.W_dec[features])
    meta = {
        **overview._asdict(),
        "shape": arrays["inked"].shape,
        "classes": names,
        "many": [images_of(names, c) for c in range(n_classes)],  # as in "6s", "trousers"
        "of_class": torch.bincount(shown.activity.labels, minlength=n_classes).tolist(),
        "bins": HISTOGRAM_BINS,
        "d_sae": layer.d_sae,
        "features": entries,
        "map": {"cells": cells, "side": side, "kept": kept},
        "network": {"d_in": len(layer.mu), "d_sae": layer.d_sae} if network else None,
        "tests": _test_words(look, tests) if look else None,
        "arrays": places,
    }
    page = _joined().replace("{{PACK}}", packed)
    page = page.replace("{{META}}", _safe_json(meta))  # last: its words may be any
    fa.write_whole(path, page.encode("utf-8"))
