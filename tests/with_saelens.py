"""Does the real SAELens read what this project writes, and the other way round?

    python tests/with_saelens.py            # minutes: it drags much along
    python tests/with_saelens.py --env DIR  # keeps the environment there, or uses the one it finds

Installs sae-lens into an environment of its own, trains a small SAE on the bundled sample, saves it
with `save_saelens`, and has `SAE.load_from_disk` compute activations and reconstructions on 1,000
rows; then has SAELens save a JumpReLU, a standard and a TopK SAE, and reads them with
`load_saelens`. Differences must be below 1e-5 of the largest value. Exits with 1 where one is not.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import MNIST_SAE_code as driver  # noqa: E402

PACKAGES = ("torch==2.13.0", "numpy==2.4.6", "sae-lens==6.54.12")
TOLERANCE = 1e-5
KINDS = ("jumprelu", "standard", "topk")

THEIRS = """
import sys
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
folder = sys.argv[1]
rows = torch.load(folder + "/rows.pt")
ours = SAE.load_from_disk(folder + "/ours")
with torch.no_grad():
    torch.save((ours.encode(rows), ours(rows)), folder + "/ours.pt")
    for kind in sys.argv[2:]:
        more = {"k": 5} if kind == "topk" else {}
        sae_class, config_class = get_sae_class(kind)
        config = config_class(
            d_in=rows.shape[1], d_sae=40, apply_b_dec_to_input=kind != "jumprelu", **more)
        sae = sae_class(config)
        generator = torch.Generator().manual_seed(0)
        for name, weight in sorted(sae.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
        if kind == "jumprelu":
            sae.threshold.abs_()
        sae.save_model(folder + "/" + kind)
        torch.save((sae.encode(rows), sae(rows)), folder + "/" + kind + ".pt")
"""


def environment(folder: Path) -> Path:
    """The Python of an environment with SAELens, made where it is not there yet."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def trained_run(folder: Path) -> driver.Run:
    flags = "--data sample --epochs-sae-final 1 --no-hypotheses --stability-seeds 0 --features 1"
    driver.main([*flags.split(), "--workers", "0", "--out", str(folder)])
    return driver.load_run(str(folder))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, relative to the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def compare(python: Path, folder: Path) -> list[tuple[str, float]]:
    run = trained_run(folder / "run")
    driver.save_saelens(run, folder / "ours")
    rows = run.model.preactivations(run.data.train.images[:1000])
    torch.save(rows, folder / "rows.pt")
    subprocess.run([python, "-c", THEIRS, folder, *KINDS], check=True)

    z = (rows - run.mu) / run.std
    acts, rebuilt = torch.load(folder / "ours.pt")
    found = [("ours in SAELens, activations", difference(acts, run.sae.encode(z)))]
    expected = run.sae(z) * run.std + run.mu
    found.append(("ours in SAELens, reconstruction", difference(rebuilt, expected)))
    for kind in KINDS:
        sae, _, _ = driver.load_saelens(folder / kind)
        acts, rebuilt = torch.load(folder / f"{kind}.pt")
        found.append((f"{kind} of SAELens here, activations", difference(sae.encode(rows), acts)))
        found.append((f"{kind} of SAELens here, reconstruction", difference(sae(rows), rebuilt)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", help="folder of the environment; a temporary one without it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(Path(given.env or f"{scratch}/env").resolve())
        found = compare(python, Path(scratch))
    print()
    for name, off in found:
        verdict = "fine" if off < TOLERANCE else "TOO FAR"
        print(f"{name:45} {off:.1e}  {verdict}")
    return int(any(off >= TOLERANCE for _, off in found))


if __name__ == "__main__":
    sys.exit(main())
