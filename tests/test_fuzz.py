"""Odd inputs to whatever reads something: each ends in a result or in an error of our own.

A few examples of each in every run of the tests, the same ones each time; FUZZ_EXAMPLES=2000 (or
`python tests/chaos.py --fuzz`) tries that many, others each time. What once failed stands here as
an example, or in test_holding.py as a test of its own.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_models import banded_images

import feature_analysis as fa
import feature_hypotheses as fh
import mnist_data as md
import MNIST_SAE_code as driver
import whole_files as wf

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,
    database=None,
    deadline=20_000,  # milliseconds: longer is a hang
    suppress_health_check=list(HealthCheck),
)
TINY = """--data sample --sae-latents 12 --hidden-units 16 --target-actives 2 --epochs-sae-final 1
--epochs-ffn 1 --batch-sae 512 --batch-ffn 512 --features 1 --stability-seeds 0
--workers 0""".split()

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**19, -(2**63), 10**400]),
    st.floats(),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5))
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes replaced, cut out or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        gone = draw(st.sampled_from([0, 1, 4, 100, len(content)]))
        put = draw(st.binary(max_size=8))
        content = content[:at] + put + content[at + gone :]
    return content


def places_in(value: object, path: tuple = ()) -> list[tuple]:
    """The way to everything in a JSON document, the first few entries of long lists."""
    inside = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = enumerate(value[:3])
    found = [path]
    for name, part in inside:
        found += places_in(part, (*path, name))
    return found


def changed_json(draw: st.DrawFn, document: object) -> object:
    """The document with one of its parts replaced, or taken away."""
    document = json.loads(json.dumps(document))
    *path, last = draw(st.sampled_from(places_in(document)[1:]))
    part = functools.reduce(lambda inside, name: inside[name], path, document)
    if draw(st.booleans()):
        part[last] = draw(JSON)
    else:
        del part[last]
    return document


def tried(action, *errors: type[Exception]) -> None:
    """The action gives a result, or one of our own errors of one line."""
    said = ""
    try:
        action()
    except errors as error:
        said = str(error).strip()
    assert "\n" not in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    driver.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def loaded(finished):
    """load_run without reading the digits each time."""
    data = md.load_images("sample", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "load_images", lambda *_: data)
        yield lambda: driver.load_run(str(finished))


# --- Settings and command lines -------------------------------------------------------------------


@fuzzed
@given(st.dictionaries(st.sampled_from([*driver.KINDS]), PLAIN | st.lists(NUMBERS).map(tuple)))
@example({"seed": 10**19})
@example({"alpha": 1e300})
@example({"head_kl": math.inf})
@example({"target_actives": 5})
@example({"target_actives": (math.nan,)})
@example({"out": ""})
@example({"data": "\0"})
@example({"sae_latents": True})
@example({"sae_latents": "\n"})
def test_any_settings(values):
    tried(lambda: driver.Settings(**values), driver.InputError)


WORDS = st.one_of(
    st.sampled_from([driver.flag_name(name) for name in driver.KINDS]),
    st.sampled_from(["--no-fresh", "--", "-1", "inf", "nan", "1e400", "5 5", "--seed=", "٣"]),
    st.text(max_size=6).filter(lambda word: not word.startswith("-h")),
)


@fuzzed
@given(st.lists(WORDS, max_size=6))
@example(["--target-actives"])
@example(["--seed", "9" * 5000])
def test_any_command_line(words):
    if any("--help".startswith(word) and len(word) > 2 for word in words):
        return
    tried(lambda: driver.parse_runs(words), driver.InputError)


# --- What a run saved -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["settings", "classifier", "sae"])
def test_any_json_beside_a_stage(finished, loaded, name):
    path = finished / f"{name}.json"
    whole = path.read_bytes()

    @fuzzed
    @given(st.data())
    def attempt(data):
        if data.draw(st.booleans()):
            content = changed_bytes(data.draw, whole)
        else:
            content = json.dumps(changed_json(data.draw, json.loads(whole))).encode()
        path.write_bytes(content)
        tried(loaded, driver.InputError)

    try:
        attempt()
    finally:
        path.write_bytes(whole)
    loaded()


@pytest.mark.parametrize("name", ["classifier", "sae"])
def test_any_tensors_of_a_stage_whose_hash_was_mended(finished, loaded, name):
    path, record = finished / f"{name}.safetensors", finished / f"{name}.json"
    others = [record, finished / "settings.json", finished / "sae.json"]
    whole, said = path.read_bytes(), [other.read_bytes() for other in others]
    digest = hashlib.sha256(whole).hexdigest().encode()

    @fuzzed
    @given(st.data())
    def attempt(data):
        content = changed_bytes(data.draw, whole)
        if data.draw(st.booleans()):
            tensors = safetensors.torch.load(whole)
            odd = data.draw(st.sampled_from([*tensors]))
            size = data.draw(st.lists(st.integers(0, 20), max_size=3))
            kind = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64]))
            value = data.draw(st.sampled_from([0, 1, -1, math.nan, math.inf]))
            is_int = kind == torch.int64 and not math.isfinite(value)
            tensors[odd] = torch.full(size, 3 if is_int else value, dtype=kind)
            content = safetensors.torch.save(tensors)
        path.write_bytes(content)
        now = hashlib.sha256(content).hexdigest().encode()
        for other, text in zip(others, said, strict=True):
            changed = json.loads(text.replace(digest, now))
            changed = driver.sealed(changed) if driver.SEAL in changed else changed
            other.write_bytes(driver.to_json(changed))
        tried(loaded, driver.InputError)

    try:
        attempt()
    finally:
        path.write_bytes(whole)
        for other, text in zip(others, said, strict=True):
            other.write_bytes(text)
    loaded()


def test_any_frozen_claims_whose_hash_was_mended(finished, tmp_path):
    whole = json.loads((finished / "hypotheses.json").read_bytes())
    del whole["sha256"]
    path = tmp_path / "h.json"

    @fuzzed
    @given(st.data())
    def attempt(data):
        content = json.dumps(changed_json(data.draw, whole), indent=1).encode()
        digest = hashlib.sha256(content).hexdigest()
        path.write_bytes(content.replace(b"{\n", f'{{\n "sha256": "{digest}",\n'.encode(), 1))
        tried(lambda: [fh.statement(h) for h in fh.read_hypotheses(path)[0]], ValueError)

    attempt()


@fuzzed
@given(st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"-Infinity")
def test_any_json_of_a_kind(content):
    kind = fh.Frozen | list[float | None] | dict[str, tuple[int, ...]]
    tried(lambda: wf.read_json(content, kind), ValueError)


# --- Images ---------------------------------------------------------------------------------------


def idx(*shape: int) -> bytes:
    """A file in MNIST's format, of images or labels that repeat."""
    n = math.prod(shape)
    body = bytes(range(10)) * (n // 10 + 1)
    return struct.pack(f">{1 + len(shape)}I", 2048 + len(shape), *shape) + body[:n]


SMALL_SET = {
    "train-images-idx3-ubyte": idx(120, 8, 8),
    "train-labels-idx1-ubyte": idx(120),
    "t10k-images-idx3-ubyte": idx(40, 8, 8),
    "t10k-labels-idx1-ubyte": idx(40),
}


def test_any_files_of_images(tmp_path):
    @fuzzed
    @given(st.data())
    def attempt(data):
        odd = data.draw(st.sampled_from([*SMALL_SET]))
        packed = data.draw(st.booleans())
        for name, content in SMALL_SET.items():
            if name == odd and data.draw(st.booleans()):
                content = changed_bytes(data.draw, content)
            if packed:
                content = gzip.compress(content, 1)
                if name == odd:
                    content = changed_bytes(data.draw, content)
            for ending in ("", ".gz"):
                (tmp_path / f"{name}{ending}").unlink(missing_ok=True)
            (tmp_path / f"{name}{'.gz' * packed}").write_bytes(content)
        tried(lambda: md.load_images(str(tmp_path)), md.DataError)

    attempt()


def test_any_bundled_sample(tmp_path, monkeypatch):
    whole = md.SAMPLE_FILE.read_bytes()
    path = tmp_path / "sample.npz"
    monkeypatch.setattr(md, "SAMPLE_FILE", path)

    @fuzzed
    @given(st.data())
    def attempt(data):
        path.write_bytes(changed_bytes(data.draw, whole))
        tried(lambda: md.load_images("sample"), md.DataError)

    attempt()


# --- What a notebook hands over -------------------------------------------------------------------

LAYER, IMAGES, LABELS = banded_images()
IMAGES, LABELS = IMAGES[:40], LABELS[:40]
TENSORS = st.builds(
    lambda shape, kind, value: torch.full(shape, 1).to(kind) * value,
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
    st.sampled_from([0, 1, -1, 2.5, math.nan, math.inf]),
)
ANY = PLAIN | TENSORS | st.just(None)
ARGUMENTS = {
    "collect_feature_bank": ("loader", "mu", "std", "topk", "first_index"),
    "feature_input_pattern": ("mu", "std", "k", "images", "image_shape"),
    "feature_logit_effect": ("loader", "mu", "std", "k", "alpha", "n_eval"),
    "feature_ablation_effect": ("loader", "mu", "std", "k", "n_eval"),
    "show_feature_gallery": ("k", "images"),
}
USUAL = {
    **{"loader": fa.batches_of(IMAGES, LABELS), "mu": LAYER.mu, "std": LAYER.std, "k": 1},
    **{"topk": 5, "first_index": 0, "images": IMAGES, "image_shape": (3, 8, 8), "alpha": 1.0},
    "n_eval": 20,
}


@pytest.mark.parametrize("name", [*ARGUMENTS])
def test_any_argument(name):
    bank = fa.collect_feature_bank(*LAYER[:1], USUAL["loader"], *LAYER[1:], topk=5)
    fixed = {"model": LAYER.model, "sae": LAYER.sae}
    if name == "show_feature_gallery":
        fixed = {"bank": bank}

    @fuzzed
    @given(st.data())
    def attempt(data):
        given = {each: USUAL[each] for each in ARGUMENTS[name]}
        if name == "show_feature_gallery":
            given["images"] = IMAGES[:, 0]
        odd = data.draw(st.sampled_from(ARGUMENTS[name]))
        given[odd] = data.draw(ANY)
        if odd == "loader":
            given[odd] = [(given[odd], data.draw(TENSORS))]
        foreign = () if isinstance(given[odd], torch.Tensor) else (TypeError, AttributeError)
        tried(lambda: getattr(fa, name)(**fixed, **given), ValueError, IndexError, *foreign)

    attempt()
