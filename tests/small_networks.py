"""Small networks of the kinds that people have, and color images with a mark at a known place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE, MARK = 16, 4  # pixels of an image, and of the mark in it
CLASSES = ("red left", "red right", "blue left", "blue right")
COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9]])


def marked_images(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (n, 3, SIDE, SIDE) on a gray ground, their labels, and the places (n, 2) of their
    marks: row and column of the upper left pixel, multiples of MARK.

    A mark is a diagonal stripe in one of two colors, in the left or the right half.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    color, right, row, column = draw(2), draw(2), draw(SIDE // MARK), draw(SIDE // MARK // 2)
    images = 0.5 + 0.05 * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    place = torch.stack([row, column + right * (SIDE // MARK // 2)], 1) * MARK
    stripe = torch.eye(MARK) + torch.eye(MARK).roll(1, 1)
    for image, (top, left), c in zip(images, place.tolist(), color.tolist(), strict=True):
        patch = image[:, top : top + MARK, left : left + MARK]
        patch += stripe * (COLORS[c][:, None, None] - patch)
    return images.clamp(0, 1), 2 * color + right, place


class Block(nn.Module):
    """A residual block of a convolutional network."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.down(x)).relu()


class ResNet(nn.Module):
    """Two blocks, the second of 4 x 4 positions."""

    def __init__(self, n_classes: int = len(CLASSES)):
        super().__init__()
        self.layer1, self.layer2 = Block(3, 12, 2), Block(12, 16, 2)
        self.halves = nn.AdaptiveAvgPool2d((1, 2))
        self.wide, self.fc = nn.Linear(32, 16), nn.Linear(16, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.wide(self.halves(self.layer2(self.layer1(x))).flatten(1)).relu())


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Layer(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer of 4 x 4 patches, with a class token or the mean over tokens."""

    def __init__(self, width: int = 16, class_token: bool = True):
        super().__init__()
        self.patch = nn.Conv2d(3, width, MARK, MARK)
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        n = (SIDE // MARK) ** 2 + class_token
        self.places = nn.Parameter(0.1 * torch.randn(1, n, width))
        self.blocks = nn.Sequential(Layer(width), Layer(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.places))
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class LastChannels(nn.Module):
    """Layers whose channels come last, as in ConvNeXt and Swin."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, MARK, MARK), nn.LayerNorm(16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(32, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.conv(x).permute(0, 2, 3, 1))).relu()
        return self.head(x.unflatten(2, (2, 2)).mean((1, 3)).flatten(1))


class MLP(nn.Sequential):
    def __init__(self):
        layers = nn.Linear(3 * SIDE**2, 24), nn.ReLU(), nn.Linear(24, len(CLASSES))
        super().__init__(nn.Flatten(), *layers)


def trained(make, steps: int = 120) -> nn.Module:
    """A network of that kind, trained for a second or two, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
        images, labels, _ = marked_images(1500, 0)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(steps):
            some = torch.randint(len(labels), (128,))
            loss = nn.functional.cross_entropy(net(images[some]), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.requires_grad_(False).eval()
