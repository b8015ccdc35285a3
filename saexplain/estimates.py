"""What will an explanation hold in memory, and about how long may it take? Said before it starts.

    print(estimate(net, data, kept=8, settings, with_targets=True))

Takes a network and images; times a small part of the work, and multiplies. Nothing depends on what
it finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import feature_analysis as fa
from saexplain.images import Data
from saexplain.optimization import n_steps, scaled_epochs
from saexplain.store import format_bytes
from saexplain.targets import TARGETS

TIMED_IMAGES = 32  # in the timed pass through the network
PRODUCTS = (
    9  # of a batch with a matrix of weights in a step of training, the auxiliary loss included
)
REMOVALS = 130  # passes through the rest of the network for each feature, about


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that some work takes the second time."""
    work()
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_time(seconds: float) -> str:
    """About how long, in one or two digits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
    short = n_steps(sizes[0], settings.batch_sae, scaled_epochs(1, sizes[0]))
    steps += 2 * len(TARGETS) * short * with_targets

    reading, training = sum(sizes) * per_image, steps * per_step
    effects = (settings.sae_latents * REMOVALS + 7 * sizes[2]) * per_head
    return (
        f"{format_bytes(4 * numbers)} of activations; about {in_time(reading)} to read them, "
        f"{in_time(training)} to train SAEs with {settings.sae_latents:,} latents, "
        f"{in_time(effects)} to measure effects"
    )
