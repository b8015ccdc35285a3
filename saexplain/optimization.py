"""What do all trainings share? Batches, the learning-rate ramp, Adam, and checks for divergence.

Takes tensors and numbers; draws and writes nothing. The losses are in MNIST_SAE_code.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

FULL_TRAIN_IMAGES = 48_000  # of MNIST, in passes over which epochs are counted


class TrainingError(RuntimeError):
    """Training left the finite numbers; the message says where, and what to lower."""


def scaled_epochs(epochs: int, n_train: int) -> int:
    """Passes over `n_train` images that make about as many steps as `epochs` over the full set."""
    return max(1, round(epochs * FULL_TRAIN_IMAGES / n_train))


def batches(
    n: int,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Index tensors (B,) of `epochs` shuffled passes over `n` images; an incomplete last batch is
    left out. They are on `device`, by default the generator's; that costs one copy for a pass."""
    batch_size = min(batch_size, n)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator, device=generator.device)
        order = order.to(device or generator.device)
        yield from order[: n - n % batch_size].split(batch_size)


def spread_batches(
    n: int,
    batch_size: int,
    epochs: int,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Index tensors as of `batches`, with one image from each of B contiguous parts of the images:
    ranks, which have contiguous shards, then get equal shares of every batch."""
    batch_size = min(batch_size, n)
    length, at = n // batch_size, generator.device
    first = torch.arange(batch_size, device=at)[:, None] * n // batch_size
    for _ in range(epochs):
        start = torch.randint(n, (1,), generator=generator, device=at)  # parts differ each time
        within = torch.rand(batch_size, length, generator=generator, device=at).argsort(1)
        yield from ((first + within + start) % n).T.contiguous().to(device or at)


def n_steps(n: int, batch_size: int, epochs: int) -> int:
    """Number of batches that `batches` yields."""
    return epochs * (n // min(batch_size, n))


def ramp(progress: float, rise_until: float, fall_from: float) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up from 0, flat at 1, linear to 0."""
    return min(1.0, progress / rise_until, (1 - progress) / (1 - fall_from))


class Adam:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019).

    torch.optim would do, but its first optimizer imports PyTorch's compiler, which takes longer
    than training the classifier.
    """

    BETA1 = 0.9
    BETA2 = 0.99  # 0.999 would average over more steps than a short training has
    EPSILON = 1e-8

    def __init__(self, weights: Sequence[Tensor], weight_decay: float = 0.0):
        self.weights = list(weights)
        self.weight_decay = weight_decay
        self.mean = [torch.zeros_like(w) for w in self.weights]
        self.square = [torch.zeros_like(w) for w in self.weights]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Update the weights in place by their gradients, at learning rate lr."""
        self.steps += 1
        correction1 = 1 - self.BETA1**self.steps
        correction2 = math.sqrt(1 - self.BETA2**self.steps)
        moments = zip(self.weights, gradients, self.mean, self.square, strict=True)
        for weight, gradient, mean, square in moments:
            mean.lerp_(gradient, 1 - self.BETA1)
            square.mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
            if self.weight_decay:
                weight.mul_(1 - lr * self.weight_decay)
            spread = square.sqrt().add_(self.EPSILON * correction2)
            weight.addcdiv_(mean, spread, value=-lr * correction2 / correction1)


HISTORY_POINTS = 100  # about how many steps of a history are kept
CHECK_EVERY = 250  # steps between two checks of the loss: each makes a GPU wait


def logged_steps(n: int) -> range:
    """About HISTORY_POINTS of n steps, the last one included."""
    every = max(1, n // HISTORY_POINTS)
    return range((n - 1) % every, n, every)


def check_loss_finite(losses: Tensor, step: int, stage: str, flag: str, rate: float) -> None:
    """Every CHECK_EVERY steps and at the last one, raise TrainingError if a loss is not finite.

    `losses` (steps,) holds those of the steps 0 to `step`; the message names the first bad step.
    """
    if (step + 1) % CHECK_EVERY and step + 1 < len(losses):
        return
    bad = torch.nonzero(~torch.isfinite(losses[: step + 1])).flatten()
    if len(bad):
        raise TrainingError(
            f"{stage} diverged: its loss is not finite at step {int(bad[0])}; "
            f"lower {flag} (now {rate})"
        )


def check_weights_finite(module: nn.Module, stage: str, flag: str, rate: float) -> None:
    """Raise TrainingError if weights are not finite: no loss is computed after the last step."""
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise TrainingError(
            f"{stage} diverged: its weights are not finite after the last step; "
            f"lower {flag} (now {rate})"
        )
