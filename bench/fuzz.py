"""Does odd input end in an answer? Random settings, tensors, loaders and files, by hypothesis.

    python bench/fuzz.py --examples 2000                # of each kind of input, others every time
    python bench/fuzz.py --short                        # 40, the same ones every time
    python bench/fuzz.py --examples 500 --only splits

A public function must return, or raise ValueError (InputError is one) or IndexError with a message
of one line. The smallest input that fails is printed. Exit status: 1 when any failed, otherwise 0.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import struct
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import sampled_from as one_of

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import evaluation, hypotheses, images, layers, own, report, sae, saelens

TINY = """--data sample --sae-latents 12 --hidden-units 16 --target-actives 2 --epochs-sae-final 1
--epochs-ffn 1 --features 1 --stability-seeds 0 --workers 0 --out""".split()
NUMBERS = st.integers(-3, 300) | st.floats() | one_of([2**31, 2**63, 10**400, -(2**63)])
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)
SHAPES = one_of([(40, 1, 8, 8), (40, 8, 8), (40,), (6,)]) | st.lists(st.integers(0, 5), max_size=4)
TENSORS = st.builds(torch.full, SHAPES, one_of([0, 1, -1, 2.5, math.nan, math.inf, True]))
FIELDS = sorted({*driver.Settings.__dataclass_fields__} - {"target_actives"})
FLAGS = one_of([f"--{name.replace('_', '-')}" for name in FIELDS] + ["--target-actives", "--"])
PIXELS, LABELS = torch.arange(40 * 64).view(40, 1, 8, 8) % 97 / 97, torch.arange(40) % 4
torch.manual_seed(0)  # for the network's weights
PARTS = torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)
NET = layers.AtLayer(torch.nn.Sequential(*PARTS), "1", images=PIXELS)
SAE = sae.JumpReLUSAE(6, 12).requires_grad_(False)
SAE.W_enc.copy_(SAE.W_dec.copy_(torch.eye(6).repeat(2, 1)).T)
USUAL = {"loader": [(PIXELS, LABELS)], "mu": torch.zeros(6), "std": torch.ones(6), "images": PIXELS}
USUAL |= {"topk": 5, "first_index": 0, "k": 1, "alpha": 1.0, "n_eval": 20}
ARGUMENTS = {
    fa.collect_feature_bank: "loader mu std topk first_index",
    fa.feature_input_pattern: "mu std k images",
    fa.feature_logit_effect: "loader mu std k alpha n_eval",
    fa.feature_ablation_effect: "loader mu std k n_eval",
}
RUN = "settings.json classifier.json classifier.safetensors sae.json sae.safetensors"
ENTRY = {"feature": 1, "drawing": ["+.", "#-"], "classes": [1], "raises": 1, "lowers": None}
ENTRY |= {"caption": "a", "confidence": "Low", "threshold": 5}
SAELENS = "cfg.json sae_weights.safetensors"
KINDS = (
    "settings flags run saelens images splits arguments layer entries hypotheses".split()
)  # of input
IDX = {"train-images-idx3-ubyte": (120, 8, 8), "train-labels-idx1-ubyte": (120,)}
IDX |= {"t10k-images-idx3-ubyte": (40, 8, 8), "t10k-labels-idx1-ubyte": (40,)}


def read_changed(draw, read, folder: Path, names: str) -> None:
    """Read a folder in which one file is changed: some of its bytes, or a value of its JSON."""
    path = folder / draw(one_of(names.split()))
    whole = path.read_bytes()
    at, gone = draw(st.integers(0, len(whole))), draw(one_of([0, 1, 4, 100, 10**9]))
    content = whole[:at] + draw(st.binary(max_size=8)) + whole[at + gone :]
    if path.suffix == ".json" and draw(st.booleans()):
        record = json.loads(whole)
        record[draw(one_of(sorted(record)))] = draw(VALUES | st.lists(VALUES, max_size=2))
        content = json.dumps(record).encode()
    path.write_bytes(content)
    try:
        read(str(folder))
    finally:
        path.write_bytes(whole)


def try_input(kind: str, draw, folder: Path) -> None:
    """Draw an input of this kind, and give it to a public function."""
    if kind == "settings":
        targets = draw(st.just((20,)) | st.lists(NUMBERS, max_size=3).map(tuple))
        driver.Settings(targets, **draw(st.dictionaries(one_of(FIELDS), VALUES)))
    elif kind == "flags":
        driver.parse_runs(draw(st.lists(FLAGS | NUMBERS.map(str), max_size=6)))
    elif kind == "run":
        read_changed(draw, driver.load_run, folder, RUN)
    elif kind == "saelens":
        read_changed(draw, saelens.load_saelens, folder / "saelens", SAELENS)
    elif kind == "images":
        read_changed(draw, images.load_images, folder / "images", " ".join(IDX))
    elif kind == "splits":
        three = {name: (PIXELS + n, LABELS) for n, name in enumerate(("train", "val", "test"))}
        odd = st.tuples(TENSORS, TENSORS) | TENSORS | st.lists(st.tuples(TENSORS, VALUES)) | VALUES
        odd |= st.dictionaries(one_of("image label train x".split()), TENSORS | VALUES)
        three[draw(one_of(sorted(three)))] = draw(odd)
        report.load_splits(NET, draw(st.just([]) | st.lists(st.text())), **three)
    elif kind == "arguments":
        function = draw(one_of(list(ARGUMENTS)))
        usual = {name: USUAL[name] for name in ARGUMENTS[function].split()}
        odd = draw(one_of(sorted(usual)))
        new = draw(NUMBERS if isinstance(usual[odd], (int, float)) else TENSORS)
        new = [(new, draw(TENSORS))] if odd == "loader" else new
        function(model=NET, sae=SAE, **{**usual, odd: new})
    elif kind == "layer":
        usual = (USUAL["mu"], USUAL["std"], PIXELS, LABELS)
        mu, std, pixels, labels = (draw(st.just(value) | TENSORS) for value in usual)
        layer = fa.ExplainedLayer(NET, SAE, mu, std)
        split = layer.activations(pixels, labels)
        layer = dataclasses.replace(layer, splits={"val": split})
        hypotheses.propose_hypotheses(layer, hypotheses.discover(layer))
    elif kind == "entries":
        entry, odd = dict(ENTRY), draw(one_of(sorted(ENTRY)))
        entry[odd] = draw(VALUES | st.lists(VALUES | st.text(".+#-=", max_size=3), max_size=3))
        own.write_hypotheses([hypotheses.hypothesis_of(ENTRY)], folder / "mine.json")
        record = json.loads((folder / "mine.json").read_text())
        (folder / "mine.json").write_text(json.dumps({**record, "hypotheses": [entry]}))
        own.read_hypotheses(folder / "mine.json")
        read_changed(draw, lambda at: own.read_hypotheses(f"{at}/mine.json"), folder, "mine.json")
    elif kind == "hypotheses":
        weights = torch.zeros(8, 8)
        usual = {"feature": 1, "wanted": weights, "unwanted": weights, "classes": (1,), "raises": 1}
        usual |= {"lowers": 2, "caption": "", "confidence": "High", "threshold": 3}
        odd = draw(one_of(sorted(usual)))
        masks = TENSORS if odd in ("wanted", "unwanted") else st.lists(VALUES, max_size=2)
        usual[odd] = draw(VALUES | masks)
        layer = fa.ExplainedLayer(NET, SAE, USUAL["mu"], USUAL["std"])
        layer = dataclasses.replace(layer, splits={"val": layer.activations(PIXELS, LABELS)})
        given = [hypotheses.Hypothesis(**usual)]
        evaluation.evaluate_hypotheses(given, layer, draw(st.just(PIXELS) | TENSORS), LABELS)


def failure(kind: str, folder: Path, examples: int, same: bool) -> str:
    """The smallest input that fails and how, or nothing."""
    options = {"max_examples": examples, "derandomize": same, "report_multiple_bugs": False}
    options |= {"deadline": 20_000, "database": None}  # milliseconds: more is a hang
    options |= {"phases": (Phase.generate, Phase.shrink)}

    @settings(**options, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(data) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                try_input(kind, data.draw, folder)
        except (ValueError, IndexError) as error:
            if "\n" in str(error).strip():
                raise RuntimeError(f"a message of several lines: {error}") from error

    try:
        attempt()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        words = "".join(traceback.format_exception_only(error))
        return f"FAILED {where.filename}:{where.lineno}: {words:.2000}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=500, help="of each kind of input")
    parser.add_argument("--short", action="store_true", help="40 examples, always the same")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed, examples = 0, 40 if args.short else args.examples
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(io.StringIO()):
            driver.main([*TINY, place])
        Path(place, "images").mkdir()
        for name, shape in IDX.items():
            content = struct.pack(f">{1 + len(shape)}I", 2048 + len(shape), *shape)
            content += bytes(range(10)) * (math.prod(shape) // 10)
            Path(place, "images", name).write_bytes(content)
        for kind in args.only:
            found = failure(kind, Path(place), examples, args.short)
            print(f"{kind:10} up to {examples} examples: {found or 'ok'}", flush=True)
            failed += bool(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
