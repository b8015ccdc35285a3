"""TODO"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.files import InputError, prepare_folder, read_json, to_json
from saexplain.sae import JumpReLUSAE, TopKSAE

# --------------------------------------------------------------------------------------------------
# The layout of SAELens 6 (decoderesearch/SAELens), in which the tools of the field exchange SAEs
# --------------------------------------------------------------------------------------------------

SAELENS_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SAELENS_DONE = ("normalize_activations", "reshape_activations")
SAELENS_LOADED = ("jumprelu", "standard", "topk")  # architectures that the analysis can take


@torch.no_grad()
def on_raw(sae: JumpReLUSAE, mu: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The weights of an SAE that reads raw preactivations, and gives the same activations.

    With z = (raw - mu) / std:  W_enc / std,  b_enc - (mu / std) W_enc,  W_dec * std,
    b_dec * std + mu; in float64, rounded once.
    """
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, name).detach().cpu().double() for name in SAELENS_WEIGHTS[:4]
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


def save_saelens(layer: fa.ExplainedLayer, folder: str | Path) -> None:
    """Write cfg.json and sae_weights.safetensors, which `SAE.load_from_disk` of SAELens 6 reads.

    `layer` is anything with sae, mu and std. What is written reads raw preactivations. Raises
    InputError for an SAE without thresholds, or with some below 0: then activations may be
    negative, which those of SAELens never are.
    """
    if isinstance(layer.sae, TopKSAE):
        raise InputError("an SAE with a fixed number of active features has no thresholds to save")
    if (layer.sae.threshold < 0).any():
        lowest = layer.sae.threshold.min().item()
        raise InputError(f"thresholds go down to {lowest:g}; SAELens has none below 0: raise them")
    folder = Path(folder)
    prepare_folder(folder)
    d_in, d_sae = layer.sae.W_enc.shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0"},  # of the layout
    }
    weights = safetensors.torch.save(on_raw(layer.sae, layer.mu, layer.std))
    fa.write_whole(folder / "sae_weights.safetensors", weights)
    fa.write_whole(folder / "cfg.json", to_json(config))


def load_saelens(folder: str | Path) -> tuple[JumpReLUSAE, Tensor, Tensor]:
    """An SAE that SAELens 6 saved, JumpReLU, standard (ReLU) or TopK, for the analysis.

        fa.collect_feature_bank(model, loader, *load_saelens(folder))

    It reads raw preactivations: mu is 0 and std is 1. Raises InputError for a folder without such
    an SAE, and for one that does more to its input than subtracting b_dec, has an activation
    function of another kind, or tensors that its architecture does not know.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / "cfg.json")
        weights = safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes())
        kind, d_in, d_sae = (config[name] for name in ("architecture", "d_in", "d_sae"))
        done = {config.get(name, "none") for name in SAELENS_DONE}  # to its input
        if kind not in SAELENS_LOADED or done != {"none"}:
            taken = ", ".join(SAELENS_LOADED)
            raise ValueError(f"it is {kind} with input {done}; {taken} on plain input are taken")
        refuse_other_tensors(weights, kind)
        if tuple(weights["W_enc"].shape) != (d_in, d_sae):
            raise ValueError(f"size mismatch: W_enc is {tuple(weights['W_enc'].shape)}")
        k = topk_of(config, kind)
        if k is not None and not 0 < k <= d_sae:
            raise ValueError(f"k is {k}; it must be from 1 to {d_sae}")
        sae = JumpReLUSAE(d_in, d_sae) if k is None else TopKSAE(d_in, d_sae, k)
        weights = {"threshold": torch.zeros(d_sae), **weights}
        sae.load_state_dict({name: weights[name].float() for name in SAELENS_WEIGHTS})
        if not all(bool(weights[name].isfinite().all()) for name in SAELENS_WEIGHTS):
            raise ValueError("its weights are not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} holds no SAE of SAELens that can be used ({reason})") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder}/sae_weights.safetensors is damaged ({error})") from error
    sae = as_plain(sae.requires_grad_(False), config)
    return sae, torch.zeros(d_in), torch.ones(d_in)


def topk_of(config: dict, kind: str) -> int | None:
    """How many features an SAE keeps; None where that is not fixed. In the layouts before 6 the
    activation function has a name of its own, and k is among its arguments.

    Raises ValueError for what is neither a ReLU nor TopK, and for activations that are scaled.
    """
    if config.get("finetuning_scaling_factor"):
        raise ValueError("it scales its activations (finetuning_scaling_factor)")
    usual = "topk" if kind == "topk" else "relu"
    function = config.get("activation_fn_str", config.get("activation_fn", usual))
    known = {"topk": ("topk",), "jumprelu": ("relu",), "standard": ("relu", "topk")}[kind]
    if function not in known:
        raise ValueError(f"its activation function is {function!r}, not {' or '.join(known)}")
    if function == "relu":
        if config.get("rescale_acts_by_decoder_norm"):
            raise ValueError("it rescales its activations (rescale_acts_by_decoder_norm)")
        return None
    k = config["k"] if "k" in config else config["activation_fn_kwargs"]["k"]
    return int(k)


def refuse_other_tensors(weights: dict[str, Tensor], kind: str) -> None:
    """Raise ValueError unless these are just the tensors of an SAE of this kind, in floats."""
    needed = set(SAELENS_WEIGHTS[: 5 if kind == "jumprelu" else 4])
    if set(weights) != needed:
        met, expected = ", ".join(sorted(weights)), ", ".join(sorted(needed))
        raise ValueError(f"its tensors are {met}; {kind} has {expected}")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{name} has numbers of {weight.dtype}, not floats")


@torch.no_grad()
def as_plain(sae: JumpReLUSAE, config: dict) -> JumpReLUSAE:
    """What SAELens does besides, written into the weights: the input less b_dec, activations in
    units of their decoder rows; a threshold below 0 is 0, since f is a ReLU as well."""
    if config.get("apply_b_dec_to_input", True):
        sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
    if config.get("rescale_acts_by_decoder_norm", False):
        length = sae.W_dec.norm(dim=1)
        sae.W_enc.mul_(length)
        sae.b_enc.mul_(length)
        sae.W_dec.div_(length[:, None])
    sae.threshold.clamp_(min=0)
    return sae
