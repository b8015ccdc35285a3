"""What will an explanation hold in memory, and about how long may it take? Said before it starts.

    print(estimate(net, data, kept=8, settings, with_targets=True))

Takes a network and images; times a small part of the work, and multiplies. Nothing depends on what
it finds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

import feature_analysis as fa
from saexplain.activity import REMOVED_FROM
from saexplain.analysis import ADDED_TO
from saexplain.baselines import MAX_TESTED
from saexplain.counterfactuals import (
    ERRORS_AT_POSITIONS,
    ERRORS_SHOWN,
    OTHERS_AT_POSITIONS,
    OTHERS_SHOWN,
)
from saexplain.evaluation import DOSED_IMAGES_SLOW, DOSES, EFFECT_IMAGES, EFFECT_IMAGES_SLOW
from saexplain.hypotheses import NULL_SIZE, NULL_SIZE_SLOW, is_slow
from saexplain.images import Data
from saexplain.optimization import FULL_TRAIN_IMAGES, n_steps, scaled_epochs
from saexplain.store import format_bytes
from saexplain.targets import TARGETS

TIMED_IMAGES = 32  # in the timed pass through the network
PRODUCTS = 9  # of a batch with weights in a step of training, the auxiliary loss included
NAMED_SHARE = 1 / 2  # of the features change a logit enough for it to be named
ACTIVE_SHARE = 1 / 4  # of target times positions: features active anywhere in an image
FLIP_STEPS = 3  # features that are removed one by one until an error is corrected
FIDELITY_PASSES = 8  # of the test images: their own logits, and those of reconstructions


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that some work takes the second time."""
    work()
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def count_head_rows(layer: fa.ExplainedLayer, data: Data, n_positions: int, settings) -> int:
    """About how many rows go through the rest of the network, to measure the effects of features
    of an SAE with these settings on validation and test images, and to show them."""
    (target,), latents = settings.target_actives, settings.sae_latents
    n_val, n_test = (len(split.labels) for split in data[1:3])
    if layer.has_positions:
        active = min(latents, target * n_positions * ACTIVE_SHARE)
        moved = latents * (min(REMOVED_FROM, n_val) + min(REMOVED_FROM, n_test) + ADDED_TO)
        errors, others = ERRORS_AT_POSITIONS, OTHERS_AT_POSITIONS
    else:  # on validation images the removals of a feature are counted one by one as well
        active, moved = target, target * (2 * n_val + n_test)
        moved += latents * min(settings.n_eval, n_val)
        errors, others = ERRORS_SHOWN, OTHERS_SHOWN
    shown = active * (FLIP_STEPS * min(errors, n_test) + min(others, n_test))
    slow = is_slow(layer)
    most, dosed = (EFFECT_IMAGES_SLOW, DOSED_IMAGES_SLOW) if slow else 2 * (EFFECT_IMAGES,)
    random_directions = math.prod(NULL_SIZE_SLOW if slow else NULL_SIZE)
    tested = 2 * random_directions + 2 * most + len(DOSES) * dosed  # of a feature
    others_tested = 0 if layer.has_positions else min(latents, MAX_TESTED)  # baselines
    tested *= (latents + others_tested) * NAMED_SHARE * settings.hypotheses
    return round(moved + shown + tested + n_val + FIDELITY_PASSES * n_test)


def in_time(seconds: float) -> str:
    """About how long, in one or two digits."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


@torch.no_grad()
def estimate(net, data: Data, kept: int, settings, with_targets: bool) -> str:
    """Sizes and times of `explain` in a line; `kept` positions of each training image are stored,
    and `with_targets` several targets are tried first."""
    images = data.train.images[:TIMED_IMAGES]
    values = fa.values_of(net.preactivations(images))
    n_positions = values.shape[1] if values.dim() == 3 else 1
    kept, d_in = min(kept, n_positions), values.shape[-1]
    sizes = [len(split.labels) for split in data[:3]]
    numbers = d_in * (sizes[0] * kept + (sizes[1] + sizes[2]) * n_positions)

    per_image = seconds_of(lambda: net.preactivations(images)) / len(images)
    raw = net.preactivations(images)
    per_head = seconds_of(lambda: net.logits_from_preactivations(raw)) / len(images)
    batch = torch.randn(settings.batch_sae * kept, d_in, device=values.device)
    weights = torch.randn(d_in, settings.sae_latents, device=values.device)
    per_step = PRODUCTS * seconds_of(lambda: batch @ weights)
    epochs = scaled_epochs(settings.epochs_sae_final, sizes[0])
    steps = n_steps(sizes[0], settings.batch_sae, epochs) * (1 + settings.stability_seeds)
    n_short = min(sizes[0], FULL_TRAIN_IMAGES)
    short = n_steps(n_short, settings.batch_sae, scaled_epochs(1, n_short))
    steps += 2 * len(TARGETS) * short * with_targets

    reading, training = sum(sizes) * per_image, steps * per_step
    layer = fa.ExplainedLayer(net, None, values.new_zeros(d_in), values.new_ones(d_in))
    effects = count_head_rows(layer, data, n_positions, settings) * per_head
    return (
        f"{format_bytes(4 * numbers)} of activations; {in_time(reading)} to read them, "
        f"{in_time(training)} to train SAEs with {settings.sae_latents:,} latents, "
        f"{in_time(effects)} to measure effects"
    )
