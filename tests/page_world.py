"""A small network, its random SAE, and pages written of them, shared by tests of the page."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import demo_feature_analysis as demo
import feature_analysis as fa
import feature_page as fp

DIGITS = Path(__file__).resolve().parent.parent / "data" / "mnist_5k.npz"
NASTY = (
    "</script><script>alert(1)</script> \"quotes\" 'single' & <b> line\u2028separator \ud800 lone"
)
D_IN = 16
N_CLASSES = 10


class World(NamedTuple):
    """All that a page needs; the last feature is silent where there are several."""

    layer: fa.ExplainedLayer
    records: list[dict]
    shown: fp.Shown
    network: fp.Network
    tests: fp.Tests

    @property
    def acts(self) -> Tensor:
        """(N, d_sae)"""
        return self.layer.feature_acts(self.shown.images)


def read_digits() -> tuple[Tensor, Tensor]:
    """Every 25th of the bundled digits: images (200, 1, 28, 28) in [0, 1], labels (200,)."""
    with np.load(DIGITS) as stored:
        images = torch.from_numpy(stored["images"][::25])
        labels = torch.from_numpy(stored["labels"][::25].astype(np.int64))
    return images[:, None].float() / 255, labels


def small_layer(d_sae: int, images: Tensor, labels: Tensor) -> fa.ExplainedLayer:
    """It gets about two thirds of the images right."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W1 = normal(D_IN, 784) / 28
    b1, b2 = -W1 @ images.flatten(1).mean(0), 0.1 * normal(N_CLASSES)
    raw = images.flatten(1) @ W1.T + b1
    hot = torch.nn.functional.one_hot(labels, N_CLASSES).float()
    W2 = 6 * torch.linalg.lstsq(raw.relu().double(), hot.double()).solution.T.float()
    model = demo.PlantedClassifier(W1, b1, W2, b2)

    W_dec = torch.nn.functional.normalize(normal(d_sae, D_IN), dim=1)
    threshold = torch.linspace(0.3, 1.0, d_sae)
    if d_sae > 1:
        threshold[-1] = 1e6
    sae = demo.PlantedSAE(W_dec.T, 0.1 * normal(d_sae), W_dec, 0.1 * normal(D_IN), threshold)
    return fa.ExplainedLayer(model, sae, raw.mean(0), raw.std(0))


def with_statement(k: int, record: dict) -> dict:
    shapes = (("dot", 5), ("vertical", 7), ("rising", 13))
    places = [{"row": 5 + k % 9, "col": 8, "shape": s, "length": n} for s, n in shapes]
    evidence = {"text": "evidence", "detected": {"both": {"auroc": 0.6 + k / 100}}, "effect": None}
    return record | {
        "statement": f"Stroke number {k}; fires on {k % 10}s",
        "explained": k % 3 == 0,
        "mark": "returns" if k % 2 else "one way among many",
        "hypothesis": {"drawing": {"there": places[: k % 3], "absent": places[2:] * (k % 2)}},
        "confidence": ("High", "Medium", "Low")[k % 3],
        "verdict": ("confirmed", "inconclusive", "refuted")[k % 3],
        "measured": ["a line"],
        "evidence": evidence,
    }


def small_world(d_sae: int = 24) -> World:
    images, labels = read_digits()
    layer = small_layer(d_sae, images, labels)
    model, sae, mu, std = layer
    loader = [(images, labels)]

    bank = fa.collect_feature_bank(model, loader, sae, mu, std)
    activity = fa.collect_activity(layer, images, labels)
    analysis = fa.Analysis(
        bank,
        fa.feature_input_patterns(model, sae, mu, std),
        fa.feature_logit_effects(model, loader, sae, mu, std),
        fa.feature_ablation_effects(model, loader, sae, mu, std),
        fa.nearest_features(sae.W_dec),
        np.ones((28, 28), dtype=bool),
        activity,
        fa.removal_effects(layer, images, activity),
    )
    records = [with_statement(k, fa.feature_record(k, analysis)) for k in range(d_sae)]
    shown = fp.Shown(bank, activity, images, analysis.heats)
    return World(layer, records, shown, fp.Network(*model), fp.Tests(images, labels))


def write(path: Path, world: World, **options) -> Path:
    options = {"network": world.network, "tests": world.tests, **options}
    fp.write_dashboard(path, world.records, world.layer, world.shown, **options)
    return path


def write_bare(path: Path, world: World, records: list[dict], title: str = "Title") -> Path:
    """A page without a network."""
    fp.write_dashboard(path, records, world.layer, world.shown, fp.Overview(title))
    return path


def nasty_records(world: World) -> list[dict]:
    first, *rest = world.records
    return [{**first, "statement": NASTY, "measured": [NASTY]}, *rest]


def script(path: Path, name: str) -> str:
    opening = rf'<script type="application/[a-z-]+" id="{name}">'
    (text,) = re.findall(f"{opening}(.*?)</script>", path.read_text(), re.DOTALL)
    return text


def meta_of(path: Path) -> dict:
    return json.loads(script(path, "meta"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a page, flat, unpacked as the browser does it."""
    raw = gzip.decompress(base64.b64decode(script(path, "pack")))
    kinds = {"u1": np.uint8, "i1": np.int8, "i4": np.int32, "f4": np.float32}
    arrays = {}
    for name, place in meta_of(path)["arrays"].items():
        assert place["offset"] % 4 == 0
        kind = kinds[place["type"]]
        arrays[name] = np.frombuffer(raw, kind, place["length"], place["offset"]).copy()
    return arrays
