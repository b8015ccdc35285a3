"""Does the SAE have one of the usual defects? Each is measured, with a limit and what to change.

    for d in diagnose(record, analysis, features, seconds):
        print(d.complaint, d.value, d.limit, "fine" if d.fine else d.advice)

Takes results, and gives numbers and advice; it changes nothing. To add a diagnosis, append one to
the list in `diagnose`: what is measured from the record of summary.json or the analysis, the limit
above which it deserves attention, and the advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saexplain.analysis import Analysis
from saexplain.patterns import pattern_roughness


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


def diagnose(
    record: dict, analysis: Analysis, features: Sequence[int], seconds: dict[str, float]
) -> list[Diagnosis]:
    """The usual defects, measured.

    `record` is the SAE's record of summary.json, `features` are those reported, and `seconds` holds
    those of the stages "bank", "patterns", "effects" and "pictures".
    """
    roughness = pattern_roughness(analysis.heats[features]).median().item()
    correlation = analysis.pattern_correlation[features].median().item()
    redundant = (analysis.nearest.cosine > 0.9).float().mean().item()
    of_all = seconds["bank"] + seconds["patterns"] + seconds["effects"]
    # Pictures are drawn only of the features reported, the rest is computed for every latent.
    per_feature = of_all / record["sae_latents"] + seconds["pictures"] / len(features)
    dense = record["dense_share_of_l0"]
    found = [
        Diagnosis(
            "noisy patterns",
            roughness,
            0.5,
            "median roughness, 1 for white noise",
            "train the network with more weight decay (WEIGHT_DECAY_FFN)",
        ),
        Diagnosis(
            "unfaithful patterns",
            1 - correlation,
            0.5,
            "1 - correlation of a pattern's sum over an image with the pre-activation (median)",
            "the network is not linear up to this layer: trust images more than patterns",
        ),
        Diagnosis(
            "redundant features",
            redundant,
            0.05,
            "share with a neighbor above cosine 0.9",
            "lower SAE_LATENTS",
        ),
        Diagnosis(
            "low boolean fidelity",
            record["delta_acc_boolean_scaled"],
            0.02,
            "accuracy lost when features are on or off",
            "compare several targets (TARGET_ACTIVES)",
        ),
        Diagnosis(
            "dead latents",
            record["dead_features"] / record["sae_latents"],
            0.05,
            "share inactive on all training images",
            "lower SAE_LATENTS or raise TARGET_ACTIVES",
        ),
        Diagnosis(
            "dense features",
            dense,
            0.6,
            "share of L0 by features active on over a tenth of the images",
            "lower TARGET_ACTIVES"
            if dense is not None
            else "no feature is active on any training image: are they scaled as the others are?",
        ),
        Diagnosis(
            "slow analysis",
            1000 * per_feature,  # milliseconds
            100.0,
            "milliseconds per feature, pictures included",
            "set FEATURES",
        ),
    ]
    if "hypotheses" in record:
        own = record["hypotheses"]["summaries"]["SAE"]
        found.append(
            Diagnosis(
                "failing hypotheses",
                own["agreement"] - own["agreement_hypotheses"],
                0.1,
                "predictions lost when hypotheses take the place of the features",
                "drawings see dark and light only, no color: trust images more than drawings",
            )
        )
    if "reproducibility" in record:
        found.append(
            Diagnosis(
                "seed-specific features",
                1 - record["reproducibility"]["variance"]["mean"],
                0.5,
                "share of the variance not reproduced across seeds",
                "lower TARGET_ACTIVES",
            )
        )
    return found
