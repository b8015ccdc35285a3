"""Which thresholds make features active exactly as often as asked for?

    sae, shift = adjust_thresholds(sae, z, target=20)  # L0 over z is 20

Takes an SAE and standardized activations; gives a copy of it whose thresholds are shifted by one
number. It trains nothing.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from saexplain.fidelity import row_chunks
from saexplain.rows import TrainingRows
from saexplain.sae import JumpReLUSAE

KEPT_AT_LEAST = 2**22  # excesses collected beyond twice those wanted, before the rest are dropped
CALIBRATED_ROWS = 2**19  # rows over which L0 is exact; 20 active in each take about 1 GB


def row_step(rows: TrainingRows) -> int:
    """Every how many rows one is taken, so that there are at most CALIBRATED_ROWS; it has no
    divisor in common with the number of positions, so that all places are taken equally often."""
    step = max(1, math.ceil(len(rows) / CALIBRATED_ROWS))
    while math.gcd(step, rows.positions) > 1:
        step += 1
    return step


@torch.no_grad()
def threshold_shift(sae: JumpReLUSAE, z: Tensor | TrainingRows, target: float) -> float:
    """What to add to every threshold so that L0 over z (N, d_in) is `target`: exactly over up to
    CALIBRATED_ROWS rows, else over an even sample of them, which bounds the memory.

    A feature is active when pre > max(threshold + shift, 0), that is, when pre > 0 and the excess
    pre - threshold is above the shift. So the shift lies half way between two order statistics of
    the excesses, the (target * N)-th largest and the next. Where these two are equal no shift is
    exact; theirs is returned, which leaves the tied ones inactive. Where fewer pre are positive
    than target * N, the shift is -inf: every threshold becomes 0.
    """
    step, first = row_step(TrainingRows.of(z)), 0
    wanted = round(target * len(range(0, len(z), step)))  # active features over all rows
    kept, floor = [], -math.inf
    for chunk in row_chunks(sae, z):
        pre = sae.pre_activations(chunk[-first % step :: step])
        first += len(chunk)
        excess = (pre - sae.threshold)[pre > 0]
        kept.append(excess[excess >= floor])
        if sum(map(len, kept)) > 2 * wanted + KEPT_AT_LEAST:  # the others cannot be among them
            kept = [torch.cat(kept).topk(wanted + 1, sorted=False).values]
            floor = kept[0].min()
    excess = torch.cat(kept)  # (n,)
    if len(excess) <= wanted:
        return -math.inf
    last_active, first_inactive = excess.topk(wanted + 1).values[-2:].tolist()
    return (last_active + first_inactive) / 2  # in float64: it must not round onto one of them


@torch.no_grad()
def adjust_thresholds(
    sae: JumpReLUSAE, z: Tensor | TrainingRows, target: float
) -> tuple[JumpReLUSAE, float]:
    """A copy of the SAE whose L0 over z (N, d_in) is `target`, as in `threshold_shift`, unless
    excesses tie; the shift."""
    shift = threshold_shift(sae, z, target)
    adjusted = copy.deepcopy(sae)
    adjusted.threshold.copy_((sae.threshold.double() + shift).clamp(min=0))
    return adjusted, shift
