"""How are SAEs exchanged with SAELens 6 (decoderesearch/SAELens)? A folder with its two files.

    save_saelens(layer, "saelens", record)        # SAE.load_from_disk("saelens") reads it
    sae, mu, std = load_saelens(folder)           # JumpReLU, standard (ReLU) or TopK
    fa.collect_feature_bank(model, loader, sae, mu, std)

Takes an `ExplainedLayer` with its SAE, or a folder with cfg.json and sae_weights.safetensors. Both
SAEs read raw activations, so standardization is folded into the weights. What an SAE does besides
its two linear maps is folded in as well, or raises InputError: nothing is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.files import InputError, prepare_folder, read_json, to_json
from saexplain.runs import OWN_NETWORK
from saexplain.sae import JumpReLUSAE, TopKSAE

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
ARCHITECTURES = ("jumprelu", "standard", "topk")  # that can be loaded
FLAGS = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
INPUT_OPTIONS = ("normalize_activations", "reshape_activations")  # only "none" can be loaded
PLAIN = {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
PLAIN |= dict.fromkeys(INPUT_OPTIONS, "none")
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "cfg.json", "sae_weights.safetensors", "README.md"
MNIST_SOURCE = re.compile(r"MNIST, full set of [\d,]+ digits|.* MNIST training digits")
CARD = """---
library_name: saelens
tags:
- sparse-autoencoder
---

# SAE of {network}

| | |
|---|---|
| data | {data} |
| trained on | {n_train:,} training images |
| network | {network} |
| layer | {layer} |
| reads | {reads} |
| latents | {sae_latents} |
| target, active features per row | {target_actives} |
| L0{per_position}, test images | {achieved_actives_test:.2f} |
| FVU, test images | {fvu:.4f} |
| agreement, test images | {agreement_jumprelu:.2%} |
| license of the data | {license} |

FVU is the fraction of variance unexplained, of standardized rows. Agreement is the share of
predictions that stay the same with the reconstruction in place of the layer's output.

```python
from sae_lens import SAE  # version 6
sae = SAE.load_from_disk("{folder}")
feature_acts = sae.encode(raw)  # raw (n, {d_in}) float32, the layer's output as it is
```

Mean and standard deviation (mu, std) are folded into the weights: do not standardize the input.
`feature_report.json` of the run explains every feature, by the same numbers.
"""


@torch.no_grad()
def on_raw(sae: JumpReLUSAE, mu: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The weights of an SAE that reads raw activations, and has the same feature activations.

    With z = (raw - mu) / std:  W_enc / std,  b_enc - (mu / std) W_enc,  W_dec * std,
    b_dec * std + mu.
    """
    # In float64, so that each weight is rounded once.
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, name).detach().cpu().double() for name in WEIGHTS[:4]
    )
    mu, std = mu.cpu().double(), std.cpu().double()
    weights = {
        "W_enc": W_enc / std[:, None],
        "b_enc": b_enc - (mu / std) @ W_enc,
        "W_dec": W_dec * std,
        "b_dec": b_dec * std + mu,
        "threshold": sae.threshold.cpu(),
    }
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def save_saelens(
    layer: fa.ExplainedLayer,
    folder: str | Path,
    record: Mapping | None = None,
    network: str = "a network",
) -> None:
    """Write cfg.json and sae_weights.safetensors, which `SAE.load_from_disk` of SAELens 6 reads,
    and README.md about the SAE, where its `record` of summary.json is given.

    Raises InputError for an SAE without thresholds, or with some below 0: its activations may be
    negative, which those of SAELens never are.
    """
    if isinstance(layer.sae, TopKSAE):
        raise InputError("an SAE with a fixed number of active features has no thresholds to save")
    if (layer.sae.threshold < 0).any():
        lowest = layer.sae.threshold.min().item()
        raise InputError(f"thresholds go down to {lowest:g}; SAELens has none below 0: raise them")
    weights = on_raw(layer.sae, layer.mu, layer.std)
    check_finite(weights)
    prepare_folder(Path(folder))
    d_in, d_sae = layer.sae.W_enc.shape
    config = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, **PLAIN}
    config["metadata"] = {"sae_lens_version": "6.0.0"}  # of the layout
    fa.write_whole(Path(folder) / WEIGHTS_FILE, safetensors.torch.save(weights))
    fa.write_whole(Path(folder) / CONFIG_FILE, to_json(config))
    if record is not None:
        card = model_card(layer, record, network, Path(folder).name)
        fa.write_whole(Path(folder) / CARD_FILE, card.encode())


def model_card(layer: fa.ExplainedLayer, record: Mapping, network: str, folder: str) -> str:
    """README.md of an SAE that is saved in `folder`, with the numbers of its record."""
    reads = f"rows of {len(layer.mu)} numbers, one per image"
    if layer.has_positions:
        reads = f"rows of {len(layer.mu)} numbers, one for each of {layer.positions.n} positions"
    is_mnist, train = MNIST_SOURCE.fullmatch(record["data"]), layer.splits["train"]
    if network == OWN_NETWORK:
        weights = [list(w.shape) for w in layer.model.parameters() if w.dim() == 2]
        sizes = [weights[0][1], *(n for n, _ in weights)]
        kind = "MNIST" if is_mnist else "image"
        network = f"a {'-'.join(map(str, sizes))} {kind} classifier"
    return CARD.format(
        **record,
        n_train=len(train.labels),
        per_position=" per position" if layer.has_positions else "",
        network=network,
        layer=getattr(layer.model, "title", "the output of its method `preactivations`"),
        reads=reads,
        d_in=len(layer.mu),
        license="CC BY-SA 3.0" if is_mnist else "see the data's own",
        folder=folder,
    )


def load_saelens(folder: str | Path) -> tuple[JumpReLUSAE, Tensor, Tensor]:
    """(sae, mu, std) of an SAE that SAELens 6 saved; it reads raw activations: mu is 0, std is 1.

    Raises InputError for a folder without an SAE, and for one that does more to its input than
    subtracting b_dec, has another activation function, or tensors that its architecture lacks.
    """
    folder = Path(folder).expanduser()
    try:
        config = read_json(folder / CONFIG_FILE)
        weights = safetensors.torch.load((folder / WEIGHTS_FILE).read_bytes())
        sae = build_sae(config, weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # in one line
        raise InputError(f"{folder} holds no SAE of SAELens that can be used ({reason})") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS_FILE} is damaged ({error})") from error
    d_in = sae.W_enc.shape[0]
    return sae, torch.zeros(d_in), torch.ones(d_in)


def build_sae(config: dict, weights: dict[str, Tensor]) -> JumpReLUSAE:
    """The SAE of the contents of the two files. Raises ValueError for what cannot be used."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} must be a JSON object")
    if missing := [name for name in ("architecture", "d_in", "d_sae") if name not in config]:
        raise ValueError(f"{CONFIG_FILE} has no {missing[0]}")
    kind = config["architecture"]
    if kind not in ARCHITECTURES:
        taken = ", ".join(ARCHITECTURES)
        raise ValueError(f"its architecture is {kind}; {taken} can be loaded")
    for name in INPUT_OPTIONS:
        if (config.get(name) or "none") != "none":
            raise ValueError(f"its {name} is {config[name]}; only none can be loaded")
    for name in FLAGS:
        if not isinstance(config.get(name), (bool, NoneType)):
            raise ValueError(f"its {name} must be true or false, got {config[name]!r}")
    d_in, d_sae = (fa.check_whole(name, config[name], 1) for name in ("d_in", "d_sae"))
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"threshold": (d_sae,)} if kind == "jumprelu" else {}
    if set(weights) != set(shapes):
        met, expected = ", ".join(sorted(weights)), ", ".join(sorted(shapes))
        raise ValueError(f"its tensors are {met}; {kind} has {expected}")
    for name, shape in shapes.items():
        if not weights[name].is_floating_point():
            raise ValueError(f"{name} must be floats, not whole numbers")
        if weights[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(weights[name].shape)}")
    k = topk_of(config, kind)
    if k is not None and not 0 < fa.check_whole("k", k) <= d_sae:
        raise ValueError(f"k is {k}; it must be from 1 to {d_sae}")
    sae = JumpReLUSAE(d_in, d_sae) if k is None else TopKSAE(d_in, d_sae, k)
    check_finite(weights)
    weights = {"threshold": torch.zeros(d_sae), **weights}
    sae.load_state_dict({name: weights[name].float() for name in WEIGHTS})
    fold_in(sae.requires_grad_(False), config)
    check_finite(sae.state_dict())
    return sae


def topk_of(config: dict, kind: str) -> int | None:
    """The number of features that an SAE keeps; None where it is not fixed.

    Before layout 6, the activation function has a name of its own, and k is among its arguments.
    Raises ValueError for what is neither a ReLU nor TopK, and for activations that are scaled.
    """
    if config.get("finetuning_scaling_factor"):
        raise ValueError("it scales its activations (finetuning_scaling_factor)")
    usual = "topk" if kind == "topk" else "relu"
    function = config.get("activation_fn_str", config.get("activation_fn", usual))
    known = {"topk": ("topk",), "jumprelu": ("relu",), "standard": ("relu", "topk")}[kind]
    if function not in known:
        raise ValueError(f"its activation function is {function!r}, not {' or '.join(known)}")
    if function == "topk":
        found = {**(config.get("activation_fn_kwargs") or {}), **config}
        if "k" not in found:
            raise ValueError("it has no k, the number of features that are active")
        return found["k"]
    if config.get("rescale_acts_by_decoder_norm"):
        raise ValueError("it rescales its activations (rescale_acts_by_decoder_norm)")
    return None


@torch.no_grad()
def fold_in(sae: JumpReLUSAE, config: dict) -> None:
    """Fold into the weights what SAELens does besides: it subtracts b_dec from the input, and gives
    activations in units of their decoder rows."""
    if config.get("apply_b_dec_to_input", True):  # None is no
        sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
    if config.get("rescale_acts_by_decoder_norm", False):
        length = sae.W_dec.norm(dim=1)
        sae.W_enc.mul_(length)
        sae.b_enc.mul_(length)
        sae.W_dec.div_(torch.where(length > 0, length, 1.0)[:, None])  # dead rows stay 0
    sae.threshold.clamp_(min=0)  # below 0 it changes nothing, since SAELens applies a ReLU as well


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise InputError unless all weights are finite."""
    for name, weight in weights.items():
        wrong = weight.isfinite().logical_not().nonzero()
        if len(wrong):
            n_wrong, at = len(wrong), tuple(wrong[0].tolist())
            raise InputError(
                f"weights must be finite float32, but {n_wrong:,} of {name} are not, first at {at}"
            )
