"""Does the SAE have one of the usual defects? Each is measured, with a limit and what to change.

    for d in diagnose(record, analysis, features, seconds):
        print(d.complaint, d.value, d.limit, "fine" if d.fine else d.advice)

Takes results, and gives numbers and advice; it changes nothing. To add a diagnosis, append one to
the list in `diagnose`: what is measured from the record of summary.json or the analysis, the limit
above which it deserves attention, and the advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from saexplain.analysis import Analysis
from saexplain.fidelity import DENSE_FROM

if TYPE_CHECKING:
    from saexplain.where import Maps


class Diagnosis(NamedTuple):
    """One usual defect of SAEs, measured."""

    complaint: str  # name of the defect
    value: float | None  # None: there is nothing to measure; `advice` gives the cause
    limit: float  # above which it deserves attention
    what: str  # is measured
    advice: str  # what to change

    @property
    def fine(self) -> bool:
        return self.value is not None and self.value <= self.limit

    def as_record(self) -> dict:
        """The diagnosis as JSON values, with `fine`."""
        return {**self._asdict(), "fine": self.fine}


# What changes a quantity, by what the caller has: the script's settings, arguments of explain(), or
# nothing for an SAE that was trained elsewhere.
SCRIPT_NAMES = {
    "target": "TARGET_ACTIVES",
    "latents": "SAE_LATENTS",
    "features": "FEATURES",
    "noisy": "train the network with more weight decay (WEIGHT_DECAY_FFN)",
}
TRUST_IMAGES = "trust its images, and where it is active, more than patterns"
EXPLAIN_NAMES = {
    "target": "target=",
    "latents": "sae_latents=",
    "features": "features=",
    "noisy": TRUST_IMAGES,
}
GIVEN_SAE_NAMES = {
    "target": "the SAE's L0 in its own training",
    "latents": "the SAE's number of latents in its own training",
    "features": "features=",
    "noisy": TRUST_IMAGES,
}
CALLER_NAMES = {
    "script": SCRIPT_NAMES,
    "explain": EXPLAIN_NAMES,
    "explain_sae": GIVEN_SAE_NAMES,
}


def diagnose(
    record: dict,
    analysis: Analysis,
    features: Sequence[int],
    seconds: dict[str, float],
    names: Mapping[str, str] = SCRIPT_NAMES,
) -> list[Diagnosis]:
    """The usual defects, measured.

    `record` is the SAE's record of summary.json, `features` are those reported, and `seconds` holds
    those of the stages "bank", "patterns", "effects" and "pictures"; advice uses the caller's
    `names`.
    """
    at_positions = analysis.maps is not None and analysis.maps.kind == "activation"
    found = pattern_diagnoses(analysis, features, names["noisy"])
    found += latent_diagnoses(record, analysis, names, at_positions)
    # Pictures are drawn only of the features reported, the rest is computed for every latent.
    of_all = seconds["bank"] + seconds["patterns"] + seconds["effects"]
    per_feature = of_all / record["sae_latents"] + seconds["pictures"] / len(features)
    what, advice = "milliseconds per feature, pictures included", f"set {names['features']}"
    found.append(Diagnosis("slow analysis", 1000 * per_feature, 100.0, what, advice))
    own = record["hypotheses"]["summaries"]["SAE"] if "hypotheses" in record else {}
    if own.get("agreement_hypotheses") is not None:
        lost = own["agreement"] - own["agreement_hypotheses"]
        what = "predictions lost when hypotheses take the place of the features"
        advice = "trust images more than drawings, which see dark and light only"
        found.append(Diagnosis("failing hypotheses", lost, 0.1, what, advice))
    if "reproducibility" in record:
        specific = 1 - record["reproducibility"]["variance"]["mean"]
        what = "share of the variance not reproduced across seeds"
        advice = f"lower {names['target']}"
        found.append(Diagnosis("seed-specific features", specific, 0.5, what, advice))
    return found + (position_diagnoses(analysis.maps) if at_positions else [])


def latent_diagnoses(
    record: dict, analysis: Analysis, names: Mapping[str, str], at_positions: bool
) -> list[Diagnosis]:
    """The diagnoses of how latents are used: twice, as mere switches, never, too often."""
    fewer, target = f"lower {names['latents']}", names["target"]
    redundant = (analysis.nearest.cosine > 0.9).float().mean().item()
    what = "share with a neighbor above cosine 0.9"
    found = [Diagnosis("redundant features", redundant, 0.05, what, fewer)]
    lost = record.get("delta_acc_boolean_scaled")  # not measured with positions
    if lost is not None:
        what = "accuracy lost when features are only on or off"
        advice = f"compare several targets ({target})"
        found.append(Diagnosis("graded features", lost, 0.02, what, advice))
    dead = record["dead_features"] / record["sae_latents"]
    what = "share inactive on all training images"
    if at_positions:
        what = "share inactive at all training positions that were kept"
    found.append(Diagnosis("dead latents", dead, 0.05, what, f"{fewer} or raise {target}"))
    dense, where = record["dense_share_of_l0"], "images"
    if at_positions:
        dense, where = dense_share(analysis.maps.position_density), "positions"
    what = f"share of L0 by features active on over a tenth of the {where}"
    advice = f"lower {target}"
    if dense is None:
        advice = "no feature is active on any training image: are they scaled as the others are?"
    return [*found, Diagnosis("dense features", dense, 0.6, what, advice)]


def pattern_diagnoses(analysis: Analysis, features: Sequence[int], noisy: str) -> list[Diagnosis]:
    """The diagnoses of input patterns; of their noise, with the advice `noisy`, where a pattern is
    shown."""
    faithful = analysis.faithful
    shown = [k for k in features if faithful[k]] if analysis.heats is not None else []
    correlation = analysis.pattern_correlation[features].median().item()
    found = []
    if shown and min(analysis.heats.shape[1:]) > 1:
        roughness = analysis.patterns.roughness[shown].median().item()
        what = "median roughness, 1 for white noise"
        found.append(Diagnosis("noisy patterns", roughness, 0.5, what, noisy))
    if analysis.heats is None:  # no gradient leads to the pixels
        return []
    what = "1 - correlation of a pattern's sum over an image with the pre-activation (median)"
    advice = "the network is not linear up to this layer: trust images more than patterns"
    return [*found, Diagnosis("unfaithful patterns", 1 - correlation, 0.5, what, advice)]


def dense_share(density: Tensor) -> float | None:
    """The share of L0 by features that are active on more than DENSE_FROM, by density (d_sae,);
    None where none is active."""
    total = density.sum()
    return (density[density > DENSE_FROM].sum() / total).item() if total else None


def position_diagnoses(maps: Maps) -> list[Diagnosis]:
    """The diagnoses of a layer with positions."""
    found = [
        Diagnosis(
            "features that encode only a place",
            maps.place_only.float().mean().item(),
            0.2,
            "share active in the same place of nearly all images",
            "they may be read as positions, not as content: look at their mean maps",
        )
    ]
    blank = ((maps.blank_share > 0.5) & (maps.prefix_share <= 0.5)).float().mean().item()
    what = "share whose peak is on a patch without contrast, on most of their strongest images"
    advice = "they may carry what the whole image is about: look at their effects"
    found.append(Diagnosis("features on blank background", blank, 0.2, what, advice))
    if maps.n_prefix:
        share = (maps.prefix_share > 0.5).float().mean().item()
        what = "share whose peak is on a prefix token, on most of the images that activate them"
        advice = "they have no place in the image: look at their images and effects alone"
        found.append(Diagnosis("features on prefix tokens", share, 0.2, what, advice))
    return found
