"""How are images seen as ink on a canvas, and how are they edited there?

    canvas = Canvas.fit(val_images)
    levels = canvas.levels(images)                # (N, P) whole numbers, 0 to 255
    edited = canvas.add_ink(images, change)       # images for the model, ink changed by (N, P)

Takes images (N, C, H, W) as a model reads them. Ink is what pictures show dark: where most of an
image is a blank ground, as in MNIST, what differs from the ground; otherwise darkness. Colors count
by their luminance. It knows no features.

Key: N images, C channels, P = h w cells of the canvas. A cell is one pixel of images of up to
MAX_SIDE pixels, and a square of several pixels of larger ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saexplain.images import LUMINANCE, as_ink

MAX_SIDE = 64  # cells in the height and width of a canvas, at most
FULL_INK = 255  # levels of a cell full of ink: whole numbers, whose sums float32 holds exactly
EVER_INKED = 0.01  # a cell inked on a smaller share of the images counts as never inked
SEEN = 2000  # images from which it is decided whether ink is dark or light
REFERENCE_SIDE = 28  # pixels of MNIST's images, for which lengths in cells are given


def ink_sign(images: Tensor) -> int:
    """1 where ink raises a pixel's value, -1 where it lowers it, by images (N, C, H, W).

    Raises ValueError unless they are gray or RGB.
    """
    some = images[:SEEN]
    shown, light = as_ink(some)[:, 0], some.float().sum(1)
    shown, light = shown - shown.mean(), light - light.mean()
    return 1 if float((shown * light).sum()) >= 0 else -1


class Canvas(NamedTuple):
    """How images become ink, fitted once, so that all images are seen alike."""

    image_shape: tuple[int, int, int]  # (C, H, W)
    cell: int  # pixels in the height and width of a cell
    low: Tensor  # (C,) value of a pixel at the lower end of each channel
    span: Tensor  # (C,) from the lower to the upper end
    sign: int  # 1 where ink raises a pixel's value, -1 where it lowers it
    std: Tensor  # (P,) standard deviation of ink over the images, on the CPU
    inked: Tensor  # (P,) bool, cells inked on a share EVER_INKED of the images, on the CPU

    @classmethod
    def fit(cls, images: Tensor) -> Canvas:
        """The canvas of images (N, C, H, W), or (N, H, W).

        Raises ValueError unless they are gray or RGB.
        """
        images = images[:, None] if images.dim() == 3 else images
        sign = ink_sign(images)  # raises for other shapes
        normalized = bool(images.min() < 0 or images.max() > 1)
        channels = images.shape[1]
        low, span = torch.zeros(channels), torch.ones(channels)
        if normalized:
            low, high = (f((0, 2, 3)).float().cpu() for f in (images.amin, images.amax))
            span = (high - low).clamp(min=1e-12)
        cell = math.ceil(max(images.shape[2:]) / MAX_SIDE)
        canvas = cls(tuple(images.shape[1:]), cell, low, span, sign, torch.empty(0), torch.empty(0))
        return canvas._of_levels(canvas.levels(images))

    def _of_levels(self, levels: Tensor) -> Canvas:
        """The canvas on which images have levels (N, P) of ink."""
        inked = (levels > 0).float().mean(0) >= EVER_INKED
        return self._replace(std=levels.std(0) / FULL_INK, inked=inked)

    def of_crops(self, crops: Tensor) -> Canvas:
        """The canvas of crops (N, C, a, b) of the images, pixel by pixel, whose ink is the same."""
        canvas = self._replace(image_shape=tuple(crops.shape[1:]), cell=1)
        return canvas._of_levels(canvas.levels(crops))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in cells."""
        _, height, width = self.image_shape
        return math.ceil(height / self.cell), math.ceil(width / self.cell)

    @property
    def scale(self) -> float:
        """Cells for each pixel of MNIST's images: lengths in cells are multiples of it."""
        return max(self.shape) / REFERENCE_SIDE

    def ink(self, images: Tensor) -> Tensor:
        """(N, h, w) ink from 0 to 1 of images (N, C, H, W), on the CPU.

        Raises ValueError for images of another shape.
        """
        images = images[:, None] if images.dim() == 3 else images
        if tuple(images.shape[1:]) != self.image_shape:
            met = tuple(images.shape[1:])
            raise ValueError(f"images must have the canvas's shape {self.image_shape}, got {met}")
        light = images.detach().float().cpu()
        light = (light - self.low[:, None, None]) / self.span[:, None, None]
        if len(self.low) == 3:
            light = (light * torch.tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        ink = (light if self.sign > 0 else 1 - light)[:, 0].clamp(0, 1)
        if self.cell == 1:
            return ink
        pool = torch.nn.functional.avg_pool2d
        return pool(ink[:, None], self.cell, ceil_mode=True)[:, 0]

    def levels(self, images: Tensor) -> Tensor:
        """(N, P) float32 whole numbers from 0 to FULL_INK, the ink of images (N, C, H, W)."""
        return (FULL_INK * self.ink(images)).round().flatten(1)

    def pattern(self, heats: Tensor) -> Tensor:
        """(n, P) on the CPU, input patterns (n, H, W) per unit of ink, not of a pixel's value."""
        heats = heats.detach().float().cpu() * (self.sign * float(self.span.mean()))
        if self.cell > 1:
            pool = torch.nn.functional.avg_pool2d
            heats = pool(heats[:, None], self.cell, ceil_mode=True, divisor_override=1)[:, 0]
        return heats.flatten(1)

    def add_ink(self, images: Tensor, change: Tensor) -> Tensor:
        """Images (N, C, H, W), or (N, H, W), with ink changed by (N, P), and kept from 0 to 1.

        All pixels and channels of a cell move by the same share of their way to no ink, or to full
        ink.
        """
        pixels = images[:, None] if images.dim() == 3 else images
        low, span = (v.to(pixels)[:, None, None] for v in (self.low, self.span))
        if self.cell == len(self.low) == 1:  # a cell is one gray pixel
            edited = pixels + self.sign * span * change.to(pixels).view_as(pixels)
            return torch.minimum(torch.maximum(edited, low), low + span).view_as(images)
        ink = self.ink(images).flatten(1)
        space = torch.where(change > 0, 1 - ink, ink)
        share = change / space.clamp(min=1e-9)
        cells = share.clamp(-1, 1).to(images.device).unflatten(1, self.shape)[:, None]
        if self.cell > 1:
            _, height, width = self.image_shape
            cells = cells.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)
            cells = cells[:, :, :height, :width]
        full, ground = (low + span, low) if self.sign > 0 else (low, low + span)
        edited = pixels + cells.abs() * (torch.where(cells > 0, full, ground) - pixels)
        return edited.view_as(images)
