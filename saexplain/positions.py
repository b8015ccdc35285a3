"""Which numbers of a layer's output are at which place? Maps, tokens, channels last, vectors.

    layout = find_layout(output, images.shape, module)   # recognized; raises where it is ambiguous
    rows = layout.to_rows(output)                        # (B, P, d_in), or (B, d_in) of a vector
    output = layout.to_output(rows)                      # as the layer gave it

Takes outputs of a layer; gives their rows, one for each position, positions row by row after prefix
tokens. It runs no network.

Key: B images in a batch, P positions, d_in channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import feature_analysis as fa

LAYOUTS = ("vector", "map", "tokens", "channels_last")
POOLS = ("mean", "max", "flatten")  # ways to make (B, d_in) of an output with positions
MOST_FLAT = 1024  # numbers of a flattened output: an SAE of more takes minutes, and mixes places
USUAL_PREFIX = (0, 1, 2, 5)  # tokens before the grid: none, a class token, also one to distill
# to, also four registers
CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
CHANNELS_LAST = (nn.LayerNorm, nn.Linear)


@dataclass(frozen=True)
class Layout:
    """How a layer's output (B, ...) becomes rows, and back."""

    kind: str  # one of LAYOUTS
    shape: tuple[int, ...]  # of the output of one image
    dtype: torch.dtype
    device: torch.device
    positions: fa.Positions | None = None  # None: pooled, or a vector
    pool: str | None = None

    @property
    def channels(self) -> int:
        """The dimension of channels in (B, ...)."""
        return len(self.shape) if self.kind in ("tokens", "channels_last") else 1

    def to_rows(self, output: Tensor) -> Tensor:
        """(B, P, d_in) float32 of the output (B, ...), or (B, d_in) of a vector or a pooled one."""
        if self.kind == "vector" or self.pool == "flatten":
            return output.flatten(1).float()
        rows = output.movedim(self.channels, -1).flatten(1, -2).float()  # (B, P, d_in)
        if self.pool:
            return rows.mean(1) if self.pool == "mean" else rows.amax(1)
        return rows

    def to_output(self, rows: Tensor) -> Tensor:
        """The output (B, ...) of rows; the same at every position where they are pooled."""
        rows = rows.to(self.device, self.dtype)
        if self.kind == "vector" or self.pool == "flatten":
            return rows.reshape(len(rows), *self.shape).clone()
        places = [n for d, n in enumerate(self.shape, 1) if d != self.channels]
        if self.pool:
            rows = rows[:, None].expand(-1, math.prod(places), -1)
        return rows.unflatten(1, places).movedim(-1, self.channels).contiguous()

    def in_words(self) -> str:
        """What was recognized."""
        if self.positions is None:
            pooled = f" of {self.shape}, pool={self.pool!r}" if self.pool else ""
            return f"a vector{pooled}"
        (height, width), n = self.positions.grid, self.positions.n_prefix
        names = {"map": "a map", "tokens": "tokens", "channels_last": "a map, channels last"}
        prefix = f" after {n} prefix token{'s' * (n > 1)}" if n else ""
        return f"{names[self.kind]} {self.shape}: {height} x {width} positions{prefix}"


def find_layout(
    output: Tensor,
    images_shape: Sequence[int],
    module: nn.Module,
    pool: str | None = None,
    layout: str | None = None,
    grid: Sequence[int] | None = None,
    prefix_tokens: int | None = None,
) -> Layout:
    """The layout of a layer's output (B, ...) for images of shape (N, C, H, W).

    What is given is taken as it is. Otherwise (B, D) is a vector, (B, T, D) are tokens; (B, a, b,
    c) is a map, or has its channels last where only this has the proportions of the images, or
    where the module ends in a layer norm. The fewest prefix tokens are taken that leave a grid of
    the images' proportions. Raises ValueError for what does not fit.
    """
    shape = tuple(output.shape[1:])
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    image = tuple(images_shape[2:]) if len(images_shape) == 4 else (1, 1)  # height and width
    kind = layout or _kind_of(shape, image, module)
    needed = {"tokens": 2, "map": 3, "channels_last": 3}.get(kind, len(shape))
    if needed != len(shape) and not (kind == "map" and len(shape) > 1):
        raise ValueError(f"layout={kind!r} needs (B, ...) of {needed + 1} dimensions, got {shape}")
    found = Layout(kind, shape, output.dtype, output.device, pool=pool)
    if kind != "tokens" and (grid is not None or prefix_tokens is not None):
        raise ValueError(
            f"grid= and prefix_tokens= are for tokens (B, T, D), but the layer gives {shape}, "
            f"taken as a {kind}; leave them out, or give layout='tokens'"
        )
    if kind == "vector":
        return Layout(kind, shape, output.dtype, output.device)
    if pool == "flatten" and math.prod(shape) > MOST_FLAT:
        raise ValueError(
            f"pool='flatten' makes {math.prod(shape):,} numbers of {shape}, at most "
            f"{MOST_FLAT:,} can be used; leave out pool, so that an SAE reads each position"
        )
    if pool:
        return found
    if kind == "tokens":
        positions = _grid_of_tokens(shape[0], image, grid, prefix_tokens)
    else:
        sides = shape[1:] if kind == "map" else shape[:-1]
        positions = fa.Positions((1, *sides)[-2:] if len(sides) == 1 else tuple(sides))
    return Layout(kind, shape, output.dtype, output.device, positions)


def _kind_of(shape: tuple[int, ...], image: tuple[int, int], module: nn.Module) -> str:
    """The layout that an output of that shape for images (H, W) most likely has."""
    last_module = last_of(module)
    if len(shape) == 2 and isinstance(last_module, (nn.Conv1d, nn.BatchNorm1d)):
        return "map"
    if len(shape) == 1 or len(shape) > 3:
        return "vector"
    if len(shape) == 2:
        return "tokens"
    if shape[1:] == (1, 1):
        return "vector"
    a, b, c = shape
    first, last = a * image[1] == b * image[0], b * image[1] == c * image[0]
    if first != last:
        return "channels_last" if first else "map"
    ends_last = isinstance(last_module, CHANNELS_LAST)
    if first and not ends_last and not isinstance(last_module, CHANNELS_FIRST):
        raise ValueError(
            f"{shape} may have its channels first or last; give layout='map' or 'channels_last'"
        )
    return "channels_last" if ends_last and first else "map"


def last_of(module: nn.Module) -> nn.Module:
    """The last module without parts inside of a module, or itself."""
    leaves = [part for part in module.modules() if not list(part.children())]
    return leaves[-1]


def decides_layout(module: nn.Module) -> bool:
    """Whether the layout of a module's output is known, or it has weights."""
    known = isinstance(module, (*CHANNELS_FIRST, *CHANNELS_LAST))
    return known or any(True for _ in module.parameters())


def _grid_of_tokens(
    n: int, image: Sequence[int], grid: Sequence[int] | None, n_prefix: int | None
) -> fa.Positions:
    """The positions of n tokens for images (H, W). Raises ValueError where there is no grid."""
    if grid is not None:
        height, width = (int(side) for side in grid)
        prefix = n - height * width if n_prefix is None else n_prefix
        if prefix < 0 or prefix + height * width != n:
            raise ValueError(f"{n} tokens cannot be {prefix} prefix tokens and a grid {grid}")
        return fa.Positions((height, width), prefix)
    for prefix in USUAL_PREFIX if n_prefix is None else (n_prefix,):
        if prefix >= n:
            continue
        width = round(math.sqrt((n - prefix) * image[1] / image[0]))
        height = (n - prefix) // width if width else 0
        if width and height * width == n - prefix and height * image[1] == width * image[0]:
            return fa.Positions((height, width), prefix)
    if n_prefix is not None and not 0 <= n_prefix < n:
        raise ValueError(
            f"prefix_tokens must be at least 0 and leave tokens for a grid, got {n_prefix} of {n}"
        )
    raise ValueError(
        f"{n} tokens for images of {image[0]} x {image[1]} pixels have no grid of their "
        f"proportions; give grid=(rows, columns) and prefix_tokens="
    )


def sampled_positions(
    first: int, n: int, n_positions: int, wanted: int, n_prefix: int = 0
) -> Tensor:
    """(n, wanted) int64, random positions of images first .. first + n - 1, different ones of each.

    Prefix tokens are always among them, where there are fewer than wanted: in late layers of a
    transformer the logits may depend on nothing else. All, in order, where there are no more. Which
    they are depends on the image's number alone, not on how the images were cut into batches.
    """
    if wanted >= n_positions:
        return torch.arange(n_positions).expand(n, -1)
    image = torch.arange(first, first + n)[:, None]
    key = image * n_positions + torch.arange(n_positions)
    # Shifts and odd multipliers mix the bits, as the last steps of MurmurHash3 do.
    for multiplier in (0x9E3779B1, 0x85EBCA6B):
        key = ((key ^ (key >> 16)) * multiplier) & 0xFFFFFFFF
    key = key ^ (key >> 13)
    if n_prefix < wanted:
        key[:, :n_prefix] = -1  # before all others
    order = key.argsort(dim=1, stable=True)
    return order[:, :wanted].sort(1).values
