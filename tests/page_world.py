"""A small network, a random SAE of it, and pages written of them, shared by tests of the page."""

import base64
import functools
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain import page
from saexplain.activity import collect_activity, removal_effects
from saexplain.counterfactuals import TestReview, review_tests
from saexplain.evaluation import collect_evidence, decide, split_test_images
from saexplain.hypotheses import Rule, discover, hypothesis_record, propose_hypotheses
from saexplain.images import SAMPLE_FILE
from saexplain.ink import Canvas
from saexplain.sae import JumpReLUSAE
from saexplain.text import evidence_record
from saexplain.tours import find_tour
from saexplain.where import activation_maps

NASTY = "</script><script>alert(1)</script> \"'& <b> line\u2028separator \ud800 lone"
D_IN, N_CLASSES = 16, 10


class TwoLayers(page.Network):
    """logits = W2 relu(W1 x + b1) + b2 of pixels x."""

    def preactivations(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.W1.T + self.b1

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        return raw.relu() @ self.W2.T + self.b2


class World(NamedTuple):
    layer: fa.ExplainedLayer
    records: list[dict]
    shown: page.Shown


def small_layer(d_sae: int, zoom: int = 1) -> fa.ExplainedLayer:
    """A layer with 200 of the bundled digits as val and as test, each pixel `zoom` x `zoom` pixels;
    about 60% are read correctly."""
    with np.load(SAMPLE_FILE) as stored:
        images = torch.from_numpy(stored["images"][::25])[:, None].float() / 255
        labels = torch.from_numpy(stored["labels"][::25].astype(np.int64))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    flat = images.flatten(1)
    W1 = normal(D_IN, flat.shape[1]) / flat.shape[1] ** 0.5
    b1, b2 = -W1 @ flat.mean(0), 0.1 * normal(N_CLASSES)
    raw = flat @ W1.T + b1
    hot = torch.eye(N_CLASSES).double()[labels]
    W2 = 6 * torch.linalg.lstsq(raw.relu().double(), hot).solution.T.float()
    W_dec = torch.nn.functional.normalize(normal(d_sae, D_IN), dim=1)
    weights = {"W_enc": W_dec.T, "b_enc": 0.1 * normal(d_sae), "W_dec": W_dec}
    weights |= {"b_dec": 0.1 * normal(D_IN), "threshold": torch.linspace(0.3, 1.0, d_sae)}
    if d_sae > 1:
        weights["threshold"][-1] = 1e6  # never active
    model, sae = TwoLayers(W1, b1, W2, b2), JumpReLUSAE.from_weights(weights)
    layer = fa.ExplainedLayer(model, sae, raw.mean(0), raw.std(0))
    return replace(layer, splits=dict.fromkeys(("val", "test"), layer.activations(images, labels)))


def planted_fields(k: int) -> dict:
    """What tests of sorting and searching look for."""
    return {
        "caption": f"Stroke number {k}, active on {k % 10}s",
        "replicated": (True, False, None)[k % 3],
        "mark": "reproducible" if k % 2 else "seed-specific",
        "confidence": ("High", "Medium", "Low")[k % 3],
        "f1": 0.3 + k / 1000,
        "measured": ["a line"],
    }


def propose(layer: fa.ExplainedLayer, unit_heats: Tensor) -> list[dict]:
    """Hypotheses of every feature, with their evidence from the even test images."""
    discovery = discover(layer, unit_heats)
    hypotheses, rule = propose_hypotheses(layer, discovery), Rule()
    half, _ = split_test_images(layer.splits["test"])
    found = collect_evidence(hypotheses, layer, half, discovery.canvas, rule)
    return [
        {"hypothesis": hypothesis_record(h), "evidence": evidence_record(e, decide(e).results)}
        for h, e in zip(hypotheses, found, strict=True)
    ]


def small_world(d_sae: int = 24, zoom: int = 1) -> World:
    """All that a page needs; the last feature is inactive where there are several."""
    layer = small_layer(d_sae, zoom)
    images, labels, raw = layer.splits["val"]
    bank, activity = fa.feature_bank(layer, raw, labels, 20), collect_activity(layer, raw, labels)
    removed, pushes = removal_effects(layer, raw, activity), fa.logit_effects(layer, raw, 1.0)
    unit_heats = layer.model.W1.unflatten(1, images.shape[2:]) / layer.std[:, None, None]
    proposed = propose(layer, unit_heats)
    records = [planted_fields(k) | own for k, own in enumerate(proposed)]
    for k, histogram in enumerate(bank.label_histogram):
        records[k] |= {
            "feature": k,
            "mean_active": float(bank.feature_density[k]),
            "influence": float(removed.influence[k]),
            "predictions_changed": float(removed.changes[k]),
            "label_mode_when_active": int(histogram.argmax()) if histogram.any() else None,
            "label_histogram": histogram.tolist(),
            "ablation_delta_vector": removed.mean_delta[k].tolist(),
            "logit_delta_vector": pushes.mean_delta[k].tolist(),
        }
        if not records[k]["evidence"]["picked"]:
            records[k]["f1"] = None  # too rare to be tested
    heats = torch.tensordot(layer.sae.W_enc.T, unit_heats, dims=1)
    return World(layer, records, page.Shown(bank, activity, heats))


def write(path: Path, world: World, records: list[dict] | None = None, **options) -> Path:
    """A page of the world, with its network unless `network` is given."""
    options.setdefault("network", world.layer.model)
    page.write_dashboard(path, records or world.records, world.layer, world.shown, **options)
    return path


def review_of(world: World, records: list[dict] | None = None) -> TestReview:
    """The review of the test images that the page of a world shows."""
    layer, test = world.layer, world.layer.splits["test"]
    canvas = None if layer.has_positions else Canvas.fit(layer.splits["val"].images)
    tour = find_tour(layer, test, records or world.records, canvas)
    return review_tests(layer, test.raw, test.labels, tour)


def script(path: Path, name: str) -> str:
    (text,) = re.findall(f'id="{name}">(.*?)</script>', path.read_text(), re.DOTALL)
    return text


def meta_of(path: Path) -> dict:
    return json.loads(script(path, "meta"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a page, flat, unpacked as the browser does it."""
    raw, places = gzip.decompress(base64.b64decode(script(path, "pack"))), meta_of(path)["arrays"]
    assert not any(p["offset"] % 4 for p in places.values())  # or a browser cannot read floats
    return {n: np.frombuffer(raw, p["type"], p["length"], p["offset"]) for n, p in places.items()}


# --------------------------------------------------------------------------------------------------
# A layer with positions, of images in color
# --------------------------------------------------------------------------------------------------

GRID, SIDE = (6, 8), (48, 64)  # positions, and pixels of an image


class Colors:
    """The display of images whose pixels are 4 x - 2 of colors x."""

    def pictures(self, images: Tensor) -> Tensor:
        return (images + 2) / 4


class Patches(NamedTuple):
    """Positions read the mean colors of patches and of what is around them, in a random basis."""

    turn: Tensor  # (9, D)
    head: Tensor  # (D, C)
    positions: fa.Positions

    @property
    def n_classes(self) -> int:
        return self.head.shape[1]

    def preactivations(self, images: Tensor) -> Tensor:
        images = ((images + 2) / 4).expand(-1, 3, -1, -1)  # of gray ones as well
        colors = torch.nn.functional.adaptive_avg_pool2d(images, GRID)
        around = torch.nn.functional.avg_pool2d(colors, 3, 1, 1)
        z = torch.cat([colors - 0.5, colors - around, around - 0.5], 1).flatten(2).mT @ self.turn
        prefix = z.mean(1, keepdim=True).expand(-1, self.positions.n_prefix, -1)
        return 3 * torch.cat([prefix, z], dim=1)

    def logits_from_preactivations(self, raw: Tensor) -> Tensor:
        return raw.relu().mean(1) @ self.head


def scenes(n: int, n_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (n, 3, *SIDE) in [0, 1] of one disc on a sloping ground, whose hue is the label."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIDE[0], : SIDE[1]]
    labels = rng.integers(0, n_classes, n)
    images = np.empty((n, 3, *SIDE), np.float32)
    for image, label in zip(images, labels, strict=True):
        slope = rng.normal(size=2)
        shade = 0.5 + 0.2 * (slope[0] * rows / SIDE[0] + slope[1] * columns / SIDE[1])
        image[:] = (rng.uniform(0.5, 1, (3, 1, 1)) * shade).clip(0, 1)
        y, x, r = rng.uniform(10, 38), rng.uniform(10, 54), rng.uniform(6, 12)
        turn = 2 * np.pi * label / n_classes
        hue = 0.5 + 0.5 * np.cos(turn + np.array([0, 2, 4]) * np.pi / 3)
        image[:, np.hypot(rows - y, columns - x) < r] = hue[:, None]
    images += rng.normal(0, 0.02, images.shape).astype(np.float32)
    return torch.from_numpy(images.clip(0, 1)), torch.from_numpy(labels)


def patch_layer(
    d_sae: int, n_classes: int, n: int = 160, n_prefix: int = 1, channels: int = 3
) -> fa.ExplainedLayer:
    """A layer with positions that read patches; the images' pixels are 4 x - 2 of colors x, of
    which `channels` are kept."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    positions, turn = fa.Positions(GRID, n_prefix), normal(9, D_IN)
    model = Patches(turn, torch.zeros(D_IN, n_classes), positions)
    (images, labels), tests = (scenes(n, n_classes, seed) for seed in (0, 1))
    images, tests = images[:, :channels], (tests[0][:, :channels], tests[1])
    hot = torch.nn.functional.one_hot(labels, n_classes).float()
    read = model.preactivations(4 * images - 2).relu().mean(1)
    model = model._replace(head=6 * torch.linalg.lstsq(read, hot).solution)
    W_dec = torch.nn.functional.normalize(normal(d_sae, D_IN), dim=1)
    weights = {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec}
    weights |= {"b_dec": torch.zeros(D_IN), "threshold": torch.linspace(1.0, 4.0, d_sae)}
    weights["threshold"][-1] = 1e6
    sae = JumpReLUSAE.from_weights(weights)
    layer = fa.ExplainedLayer(model, sae, torch.zeros(D_IN), torch.ones(D_IN))
    splits = {"val": (images, labels), "test": tests}
    splits = {name: layer.activations(4 * x - 2, y) for name, (x, y) in splits.items()}
    return replace(layer, splits=splits)


def color_world(
    d_sae: int = 24,
    n_classes: int = 6,
    kind: str = "activation",
    receptive: tuple[int, int] = (24, 20),
    channels: int = 3,
) -> World:
    """A page's input of images in color, or in gray, with maps; no pattern is faithful."""
    layer = patch_layer(d_sae, n_classes, channels=channels)
    _, labels, raw = layer.splits["val"]
    bank, activity = fa.feature_bank(layer, raw, labels, 20), collect_activity(layer, raw, labels)
    removed = removal_effects(layer, raw, activity)
    maps = activation_maps(layer, layer.splits["val"], bank, activity)
    maps = maps._replace(kind=kind, receptive=receptive, place_only=torch.arange(d_sae) == 2)
    records = [planted_fields(k) for k in range(d_sae)]
    for k, histogram in enumerate(bank.label_histogram):
        records[k] |= {
            "feature": k,
            "hypothesis": {"classes": [k % n_classes], "place": "upper third"},
            "mean_active": float(bank.feature_density[k]),
            "influence": float(removed.influence[k]),
            "predictions_changed": float(removed.changes[k]),
            "label_mode_when_active": int(histogram.argmax()) if histogram.any() else None,
            "label_histogram": histogram.tolist(),
            "ablation_delta_vector": removed.mean_delta[k].tolist(),
            "logit_delta_vector": removed.mean_delta[k].tolist(),
            "pattern_correlation": 0.21,
            "measured": ["60% [50%, 70%] of them are red: confirmed", "active in 3% of places"],
        }
    shown = page.Shown(
        bank,
        activity,
        torch.zeros(d_sae, *SIDE),
        maps=maps,
        faithful=torch.zeros(d_sae, dtype=torch.bool),
        display=Colors(),
    )
    return World(layer, records, shown)
