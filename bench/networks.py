"""What does explain() find in small networks of the usual kinds? Trained, explained, one table.

    python bench/networks.py --data /usr/share/datasets/fashion-mnist    # Debian's Fashion-MNIST
    python bench/networks.py --data sample --images 3000 --layers cnn:layer2

A residual network and a vision transformer are trained on a set in MNIST's format, for about two
minutes each, and every layer of LAYERS is explained into a folder of its own below --out. Trained
networks there are reused. Columns: accuracy, and with the SAE's reconstruction in place of the
activations; cross entropy recovered against mean ablation; predictions kept; fraction of variance
unexplained, of as many principal components, of the untrained SAE; active features per position and
per image; influence of features with a High or Medium confidence; seconds of explain().
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from MNIST_SAE_code import explain
from saexplain.console import text_table
from saexplain.files import read_json
from saexplain.images import Split, load_images
from saexplain.parallel import torch_threads

LAYERS = """cnn:layer1 cnn:layer2 cnn:layer2.bn2 cnn:pool vit:blocks.1 vit:blocks.3
vit:blocks.3.mlp""".split()
BATCH, RATE = 128, 2e-3  # of training


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.down(x)).relu()


class ResNet(nn.Module):
    """Two residual blocks of 7 x 7 positions, for images of 28 x 28 pixels."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU())
        self.layer1, self.layer2 = Block(16, 32, 2), Block(32, 64, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer2(self.layer1(self.stem(x)))).flatten(1))


class Attention(nn.Module):
    """Four heads over all tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            self.qkv(x).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        )  # (3, B, 4, T, width / 4)
        found = nn.functional.scaled_dot_product_attention(*heads)
        return self.proj(found.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A block of a transformer."""

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
    """A class token and 7 x 7 patches of 4 x 4 pixels, 64 wide, four blocks."""

    def __init__(self, n_classes: int, width: int = 64):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 50, width))
        self.blocks = nn.Sequential(*(Layer(width) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


KINDS = {"cnn": ResNet, "vit": ViT}
EPOCHS = {"cnn": 2, "vit": 4}  # over the full set


def trained_network(kind: str, train: Split, n_classes: int, folder: Path) -> nn.Module:
    """The network of that kind, trained, or read from the folder."""
    torch.manual_seed(0)
    net, path = KINDS[kind](n_classes), folder / f"{kind}_{len(train.labels)}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.requires_grad_(False).eval()
    steps = EPOCHS[kind] * len(train.labels) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(train.labels), (BATCH,))
        loss = nn.functional.cross_entropy(net(train.images[some]), train.labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.save(net.state_dict(), path)
    return net.requires_grad_(False).eval()


def explained_row(name: str, net: nn.Module, data, args: argparse.Namespace) -> list[str]:
    """A row of the table about one layer, "cnn:layer2"."""
    _, layer = name.split(":")
    out, started = args.out / name.replace(":", "_"), time.perf_counter()
    given = {"target": args.target, "sae_latents": args.latents, "classes": data.classes}
    explain(net, layer, data.train, data.val, data.test, out=out, fresh=True, **given)
    seconds = time.perf_counter() - started
    (r,) = read_json(out / "summary.json")
    undrawn = r["hypotheses"]["summaries"]["SAE"]
    l0 = f"{r['achieved_actives_test']:.1f}"
    if "l0_image_test" in r:
        l0 += f" / {r['l0_image_test']:.0f}"
    return [
        name,
        f"{r['baseline_acc']:.3f} -> {r['recon_acc_jumprelu']:.3f}",
        f"{r['ce_recovered']:.3f}",
        f"{r['agreement_jumprelu']:.1%}",
        f"{r['fvu']:.3f} ({r['fvu_pca']:.3f}; {r['fvu_untrained']:.3f})",
        l0,
        f"{undrawn['influence_high']:.0%}, {undrawn['influence_medium']:.0%}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="auto", help="as of MNIST_SAE_code.py")
    parser.add_argument("--images", type=int, default=20_000, help="training images of the SAEs")
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--target", type=int, default=5, help="active features per position")
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("networks"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        ["layer", "accuracy", "CE recovered", "kept", "FVU (PCs; untrained)", "L0", "High, Medium"]
    ]
    rows[0].append("seconds")
    with torch_threads(1):
        data = load_images(args.data)
        nets = {}
        for name in args.layers:
            kind = name.split(":")[0]
            if kind not in nets:
                nets[kind] = trained_network(kind, data.train, len(data.classes), args.out)
            few = Split(*(values[: args.images] for values in data.train))
            rows.append(explained_row(name, nets[kind], data._replace(train=few), args))
    print(f"\n{data.source}, {args.latents} latents\n{text_table(rows)}")


if __name__ == "__main__":
    main()
