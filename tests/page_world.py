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
from saexplain.evaluation import collect_evidence, decide, split_test_images
from saexplain.hypotheses import Rule, discover, hypothesis_record, propose_hypotheses
from saexplain.images import SAMPLE_FILE
from saexplain.sae import JumpReLUSAE
from saexplain.text import evidence_record

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
    heats = torch.tensordot(layer.sae.W_enc.T, unit_heats, dims=1)
    return World(layer, records, page.Shown(bank, activity, heats))


def write(path: Path, world: World, records: list[dict] | None = None, **options) -> Path:
    """A page of the world, with its network unless `network` is given."""
    options.setdefault("network", world.layer.model)
    page.write_dashboard(path, records or world.records, world.layer, world.shown, **options)
    return path


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
