"""Which numbers are shown of an SAE? Their titles, and over which images they are.

    rows = quantity_rows([record, other], most=1)  # (quantity, text for each record)

Takes records of summary.json; gives text for the terminal, the page and comparisons, which so use
the same words. It computes nothing but the largest of the baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

NOT_COMPUTED = "not computed"  # a ratio whose denominator is 0
RATIOS = ("ce_recovered", "fvu_to_pca", "dense_share_of_l0")  # may have 0 as their denominator
TEST, HALF = "test images", "test half"
TRAIN, VAL = "training images", "validation images"


class Quantity(NamedTuple):
    """A number of summary.json. A title with two spaces before it continues the one above."""

    title: str
    key: str  # of `values_of`
    form: str  # a format
    images: str  # over which it is measured; "": none
    detail: int = 1  # 1: always shown, 2: in comparisons, 3: with --verbose


FIDELITY = (
    Quantity("images classified right by the network", "baseline_acc", "{:.2%}", TEST),
    Quantity("  with the SAE in place of the layer", "spliced_acc", "{:.2%}", TEST),
    Quantity("  the difference", "delta_acc_jumprelu", "{:.2%}", TEST, 3),
    Quantity("  with features on or off", "recon_acc_boolean", "{:.2%}", TEST, 3),
    Quantity("  with features on or off, scaled", "recon_acc_boolean_scaled", "{:.2%}", TEST, 3),
    Quantity("predictions kept with the SAE (agreement)", "agreement_jumprelu", "{:.2%}", TEST),
    Quantity("  with as many principal components (PCA)", "agreement_pca", "{:.2%}", TEST),
    Quantity("  with the untrained SAE", "agreement_untrained", "{:.2%}", TEST),
    Quantity("variance that the SAE loses (FVU)", "fvu", "{:.4f}", TEST),
    Quantity("  that as many principal components lose", "fvu_pca", "{:.4f}", TEST),
    Quantity("  the former relative to the latter", "fvu_to_pca", "{:.3f}", TEST, 3),
    Quantity("  that the untrained SAE loses", "fvu_untrained", "{:.4f}", TEST),
    Quantity("cross entropy recovered", "ce_recovered", "{:.4f}", TEST, 2),
    Quantity("KL divergence of the predictions", "kl", "{:.5f}", TEST, 3),
)
SPARSITY = (
    Quantity("features active per image (L0)", "l0_of_vector", "{:.1f}", TEST),
    Quantity("features active per position (L0)", "l0_position_test", "{:.2f}", TEST),
    Quantity("  as calibrated", "achieved_actives_val", "{:.4f}", VAL, 3),
    Quantity("  on an image, at any position", "l0_image_test", "{:.1f}", TEST),
    Quantity("lambda at the end of training", "lambda", "{:.4f}", TRAIN, 3),
    Quantity("features in all (latents)", "sae_latents", "{}", "", 2),
    Quantity("features that are never active (dead)", "dead_features", "{}", TRAIN),
    Quantity("features active on over 10% (dense)", "dense_features", "{}", TRAIN, 2),
    Quantity("  their share of L0", "dense_share_of_l0", "{:.1%}", TRAIN, 3),
)
EXPLAINED = (
    Quantity(
        "predictions kept by drawings of all features", "agreement_hypotheses", "{:.2%}", HALF
    ),
    Quantity("  by those of the best baseline", "best_drawn", "{:.2%}", HALF),
    Quantity("F1 of hypotheses, weighted by influence", "f1_by_influence", "{:.3f}", HALF, 2),
    Quantity("  mean", "f1_mean", "{:.3f}", HALF, 3),
    Quantity("influence with confidence High", "influence_high", "{:.0%}", HALF),
)
REPRODUCED = (
    Quantity("features found again with another seed", "features", "{:.1%}", VAL),
    Quantity("  in the best baseline", "best_features", "{:.1%}", VAL),
    Quantity("their share of the variance", "variance", "{:.1%}", VAL, 2),
    Quantity("  in the best baseline", "best_variance", "{:.1%}", VAL, 2),
    Quantity("PW-MCC with another seed", "pw_mcc", "{:.3f}", VAL, 3),
    Quantity("  in the best baseline", "best_pw_mcc", "{:.3f}", VAL, 3),
)
GROUPS = {
    "Fidelity": FIDELITY,
    "Sparsity": SPARSITY,
    "Explained": EXPLAINED,
    "Reproduced": REPRODUCED,
}


def values_of(record: Mapping) -> dict:
    """The values of a record of summary.json by the keys of quantities."""
    summaries = dict(record.get("hypotheses", {}).get("summaries", {}))
    own = summaries.pop("SAE", {})
    drawn = [s["agreement_hypotheses"] for s in summaries.values()]
    again = record.get("reproducibility", {})
    found = {
        **record,
        "spliced_acc": record.get("recon_acc_jumprelu"),
        "l0_of_vector": None if "l0_position_test" in record else record["achieved_actives_test"],
        "best_drawn": max((kept for kept in drawn if kept is not None), default=None),
        "influence_high": own.get("influence_high"),
    }
    for name in ("features", "variance", "pw_mcc"):
        found[name] = again.get(name, {}).get("mean")
        nulls = [null[name] for null in again.get("baselines", {}).values()]
        found[f"best_{name}"] = max(nulls, default=None)
    if record.get("agreement_hypotheses") is not None:  # the untrained SAE is one of its baselines
        found["agreement_untrained"] = found["fvu_untrained"] = None
    return found


def in_words(quantity: Quantity, values: Mapping, record: Mapping) -> str:
    """The value in its format, with the standard deviation over pairs of SAEs; "" without any."""
    value = values.get(quantity.key)
    if value is None:
        return NOT_COMPUTED if quantity.key in RATIOS and quantity.key in record else ""
    std = None
    if quantity in REPRODUCED:
        std = record["reproducibility"].get(quantity.key, {}).get("std")
    words = quantity.form.format(value)
    return words if std is None else f"{words.rstrip('%')} ± {quantity.form.format(std)}"


def quantity_rows(
    records: Sequence[Mapping], most: int, group: Sequence[Quantity] = sum(GROUPS.values(), ())
) -> list[tuple[Quantity, list[str]]]:
    """Quantities of at most this `detail` that some records have, each with its text for every
    record, "-" where one lacks it."""
    values, rows = [values_of(record) for record in records], []
    for quantity in group:
        if quantity.detail <= most:
            cells = [in_words(quantity, *both) for both in zip(values, records, strict=True)]
            if any(cells):
                rows.append((quantity, [cell or "-" for cell in cells]))
    return rows
