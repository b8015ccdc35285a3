"""How do runs differ? Their numbers side by side, their features matched.

    comparison = compare_runs(load_run("a"), load_run("b"), out="compare.html")
    compare_runs(run, saes={"theirs": load_saelens("folder")})  # SAEs that read the layer of `run`
    compare_runs("a", "b")                                      # folders: numbers alone
    print(comparison.table())

Takes finished runs of the script, `explain` or `explain_sae`, or a layer with SAEs; gives numbers,
a table for the terminal and one page. It trains nothing and changes no run.

Dimension key: N images, n and m features of two SAEs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import feature_analysis as fa
from saexplain import runs
from saexplain.activity import collect_activity, removal_effects
from saexplain.compare_page import comparison_page
from saexplain.console import COLUMNS, lines_table, print_words, text_table
from saexplain.fidelity import measure_fidelity, raw_rows
from saexplain.files import InputError, prepare_folder, read_json
from saexplain.images import Display, images_per_batch
from saexplain.quantities import GROUPS, Quantity, quantity_rows
from saexplain.reproducibility import MIN_SIMILARITY, Matches, match_features
from saexplain.saelens import CONFIG_FILE, load_saelens

PAGE = "compare.html"
FOUND = f"Found: cosine and correlation of {MIN_SIMILARITY} or more; the latter if layers differ."
NO_PAIRS = "Features of explain() are matched by compare_runs(run_a, run_b), with what it returned."
MOST_PAIRS = 3  # of the first run with others, whose features are matched
MOST_ENTRIES = 2**28  # numbers of the layer's output on the images on which features are matched
TOP_IMAGES = 4  # strongest images of a feature that are shown
MOST_DENSE = 0.9  # of the features of an SAE that was trained on the layer it reads
WIDTH, LABEL, CELL, MOST_SETTINGS = 100, 48, 11, 2  # of the terminal: characters, and lines


class Compared(NamedTuple):
    """One of the SAEs that are compared."""

    title: str
    record: dict  # of summary.json, or its fidelity part
    settings: dict  # of settings.json; empty for an SAE that is not of a run
    source: str = ""  # of its data, in words
    digest: str = ""  # of its data
    report: Mapping[int, dict] = {}  # records of feature_report.json, by feature
    page: Path | None = None  # its own page
    layer: fa.ExplainedLayer | None = None  # None: numbers alone
    display: Display = Display()
    caller: str = ""  # of settings.json


# --------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------


def find_run(path: Path) -> tuple[Path, int | None]:
    """The folder of a run, and the target where `path` is its subfolder target_N."""
    name = re.fullmatch(r"target_(\d+)", path.name)
    if name and (path.parent / runs.MANIFEST).exists():
        return path.parent, int(name[1])
    return path, None


def read_run(path: Path) -> list[Compared]:
    """The SAEs of the finished run in a folder, or in its subfolder target_N; numbers alone.

    Raises InputError for a folder without such a run.
    """
    root, wanted = find_run(path)
    manifest = runs.load_manifest(root)
    if runs.MANIFEST_KEYS - manifest.keys():
        raise InputError(f"{root} has a run of an earlier version of the program; run it again")
    found, records = [], read_json(root / "summary.json")
    for record in records:
        target = record["target_actives"]
        folder = root if len(records) == 1 else root / f"target_{target}"
        if wanted in (None, target):
            settings = {"network": manifest["network"], **manifest["settings"]}
            settings["target_actives"] = target
            report = {r["feature"]: r for r in read_json(folder / "feature_report.json")}
            known = (record, settings, manifest["data"], manifest["data_digest"], report)
            page, caller = folder / "feature_report.html", manifest.get("caller", "script")
            found.append(Compared(str(folder), *known, page, caller=caller))
    if not found:
        raise InputError(f"{root} has no SAE of target {wanted}")
    return found


def of_run(run) -> Compared:
    """A run as `load_run` and `explain` give it; its files give the numbers."""
    numbers = read_run(Path(run.folder))
    return numbers[0]._replace(layer=run.layer, display=run.data.display)


def of_layer(layer: fa.ExplainedLayer, title: str, base: Compared | None = None) -> Compared:
    """The SAE of a layer with its three splits, measured here, with the images of `base`."""
    base = base or Compared("", {}, {})
    record = {"sae_latents": layer.d_sae, "target_actives": None, **measure_fidelity(layer)}
    return base._replace(title=title, record=record, settings={}, report={}, page=None, layer=layer)


def with_sae(base: Compared, name: str, sae: object, mu: Tensor, std: Tensor) -> Compared:
    """An SAE that reads (raw - mu) / std of the layer of `base`. Raises InputError for one of
    another width."""
    if base.layer is None:
        raise InputError(
            f"{name} needs the layer of {base.title}, whose network is not stored there: call "
            f"compare_runs() with what explain() returns"
        )
    width, expected = sae.W_enc.shape[0], len(base.layer.mu)
    if width != expected:
        raise InputError(
            f"{name} reads {width} numbers, but the layer of {base.title} gives {expected}"
        )
    device = base.layer.device
    sae = sae.to(device) if isinstance(sae, torch.nn.Module) else sae
    sae = sae_as_read(base.layer, sae, mu.to(device), std.to(device))  # FVUs in the same units
    found = of_layer(base.layer.with_sae(sae), name, base)
    fvu, dense = found.record["fvu"], found.record["dense_features"] / found.layer.d_sae
    if fvu > 1 or dense > MOST_DENSE:
        print_words(
            f"{name} may be of another network or layer: FVU {fvu:.3g}, {dense:.0%} of its "
            f"features active on over a tenth of the images"
        )
    return found


def check_images(first: Compared, other: Compared) -> None:
    """Raise InputError unless both are of equal images; another seed splits the script's anew."""
    seeds = [one.settings.get("seed") for one in (first, other)]
    is_resplit = seeds[0] != seeds[1] and first.source == other.source
    is_resplit &= first.caller == other.caller == "script"  # whose words name a set of images
    if first.digest != other.digest and not is_resplit:
        raise InputError(
            f"runs must be of equal images: {first.title} is of {first.source}, {other.title} of "
            f"{other.source}" + (" with other pixels" if first.source == other.source else "")
        )


# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------


class Restandardized:
    """An SAE for rows (raw - mu) / std, of one that reads (raw - own_mu) / own_std."""

    def __init__(self, sae: object, mu: Tensor, std: Tensor, own_mu: Tensor, own_std: Tensor):
        self.sae, self.scale, self.shift = sae, std / own_std, (mu - own_mu) / own_std
        self.W_enc = sae.W_enc.detach() * self.scale[:, None]
        self.W_dec = sae.W_dec.detach() / self.scale

    def encode(self, z: Tensor) -> Tensor:
        return self.sae.encode(z * self.scale + self.shift)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return (self.sae.decode(feature_acts) - self.shift) / self.scale


def sae_as_read(layer: fa.ExplainedLayer, sae: object, mu: Tensor, std: Tensor) -> object:
    """An SAE that reads (raw - mu) / std, for rows standardized as `layer` does."""
    if torch.equal(layer.mu, mu) and torch.equal(layer.std, std):
        return sae
    return Restandardized(sae, layer.mu, layer.std, mu, std)


def match_activations(acts: Tensor, other: Tensor) -> Matches:
    """Counterparts by activations alone, (N, n) and (N, m), for SAEs of different layers; cosines
    are NaN."""

    def unit(values: Tensor) -> Tensor:
        centered = values - values.mean(0)
        return centered / centered.norm(dim=0).clamp(min=1e-12)

    correlation, feature = (unit(acts).T @ unit(other)).cpu().max(1)
    return Matches(feature, torch.full_like(correlation, torch.nan), correlation)


class Features(NamedTuple):
    """The features of one SAE of a pair."""

    bank: fa.FeatureBank  # on the images on which they are matched
    influence: Tensor  # (n,) on the SAE's own validation images
    matches: Matches  # among those of the other one

    @property
    def similarity(self) -> Tensor:
        """(n,) the smaller of cosine and correlation, or the latter alone."""
        return torch.fmin(self.matches.cosine, self.matches.correlation)

    @property
    def is_active(self) -> Tensor:
        """(n,) bool, active on one of the images at least."""
        return self.bank.n_active > 0

    def listed(self, matched: bool) -> list[int]:
        """Active features with a counterpart, or without, the most influential first."""
        order = torch.argsort(self.influence, descending=True, stable=True)
        chosen = ((self.similarity >= MIN_SIMILARITY) == matched) & self.is_active
        return order[chosen[order]].tolist()

    def share(self) -> float:
        """The share of the influence of features with a counterpart."""
        return float(self.influence[self.listed(matched=True)].sum())


class Pair(NamedTuple):
    """Two SAEs with their features matched, on test images of the first."""

    first: int  # their numbers in the comparison
    second: int
    same_layer: bool  # whether both read the same numbers, so that directions are comparable
    images: object  # (N, C, H, W)
    features: tuple[Features, Features]


def influence_of(one: Compared) -> Tensor:
    """(n,) the influence of each feature on the validation images, as in feature_report.json."""
    if len(one.report) == one.layer.d_sae:
        return torch.tensor([one.report[k]["influence"] for k in range(one.layer.d_sae)])
    val = one.layer.splits["val"]
    activity = collect_activity(one.layer, val.raw, val.labels)
    return removal_effects(one.layer, val.raw, activity).influence.float()


def outputs_of(layer: fa.ExplainedLayer, images) -> fa.Rows:
    """The layer's output for all images."""
    n = images_per_batch(images.shape[1:])
    found = [layer.raw(images[i : i + n]) for i in range(0, len(images), n)]
    return layer.rows(torch.cat([fa.values_of(raw) for raw in found]), images)


@torch.no_grad()
def match_pair(first: int, second: int, compared: Sequence[Compared]) -> Pair:
    """The pair of these numbers, with their features matched."""
    one, other = compared[first], compared[second]
    test = one.layer.splits["test"]
    positions = one.layer.positions.n if one.layer.has_positions else 1
    most = max(1, MOST_ENTRIES // (positions * len(one.layer.mu)))
    at = torch.linspace(0, len(test.labels) - 1, min(most, len(test.labels))).round().long()
    images, labels, raw = (values[at.to(values.device)] for values in test)
    some = fa.values_of(raw[: fa.PROBED])
    theirs = fa.values_of(other.layer.raw(images[: fa.PROBED]))
    same = some.shape == theirs.shape and torch.allclose(some, theirs, rtol=1e-4, atol=1e-5)
    if same:
        layer = replace(one.layer, splits={"test": fa.Activations(images, labels, raw)})
        rows, raws = raw_rows(layer, "test"), (raw, raw)
        a, b = one.layer, other.layer
        matches = match_features(a, rows, sae_as_read(a, b.sae, b.mu, b.std))
        back = match_features(b, rows, sae_as_read(b, a.sae, a.mu, a.std))
    else:
        raws = raw, outputs_of(other.layer, images)
        acts = [c.layer.feature_acts(r).float() for c, r in zip((one, other), raws, strict=True)]
        matches, back = match_activations(*acts), match_activations(*acts[::-1])
    found = []
    for c, r, m in zip((one, other), raws, (matches, back), strict=True):
        bank = fa.feature_bank(c.layer, r, labels, TOP_IMAGES)
        found.append(Features(bank, influence_of(c), m))
    return Pair(first, second, same, images, tuple(found))


# --------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """SAEs side by side."""

    compared: list[Compared]
    pairs: list[Pair]  # of the first with others whose layers are known

    most_columns = COLUMNS

    @property
    def letters(self) -> list[str]:
        """A short name of each: A, B, ...; numbers where they are many."""
        n = len(self.compared)
        return [chr(ord("A") + i) if n <= 26 else str(i + 1) for i in range(n)]

    def settings(self) -> list[tuple[str, list[str]]]:
        """Settings that differ, with the value of each SAE, "-" where it has none."""
        known = [one.settings for one in self.compared if one.settings]
        names = dict.fromkeys(name for settings in known for name in settings)
        rows = []
        for name in names:
            values = [str(settings.get(name, "-")).strip("[]") for settings in known]
            if name not in runs.NOT_COMPARED and len(set(values)) > 1:
                shown = [str(c.settings.get(name, "-")).strip("[]") for c in self.compared]
                rows.append((name, shown))
        return rows

    def quantities(self, group: Sequence[Quantity]) -> list[tuple[Quantity, list[str]]]:
        """Quantities of a group that some of the SAEs have, with the text of each SAE."""
        return quantity_rows([one.record for one in self.compared], 2, group)

    def table(self) -> str:
        """The comparison for the terminal, at most 100 characters wide."""
        if len(self.compared) > COLUMNS:
            titles = [_tail(one.title, 24) for one in self.compared]
            return lines_table(titles, [one.record for one in self.compared])
        lines = [
            f"{a}  {_tail(c.title, WIDTH - 3)}"
            for a, c in zip(self.letters, self.compared, strict=True)
        ]
        rows, differ = [["", *self.letters]], self.settings()
        rows += [[name, *cells] for name, cells in differ[:MOST_SETTINGS]]
        for group in GROUPS.values():
            rows += [[quantity.title, *cells] for quantity, cells in self.quantities(group)]
        rows = [
            [fa.shortened(row[0], LABEL), *(fa.shortened(c, CELL) for c in row[1:])] for row in rows
        ]
        lines += ["", text_table(rows)]
        if len(differ) > MOST_SETTINGS:
            lines.append(f"and {len(differ) - MOST_SETTINGS} more settings that differ")
        for pair in self.pairs:
            lines += _pair_lines(self, pair)
        lines.append(FOUND if self.pairs else NO_PAIRS)
        return "\n".join(lines)

    def in_both(self, pair: Pair) -> list[str]:
        """How many features of each of a pair are in the other, in words."""
        letters = [self.letters[i] for i in (pair.first, pair.second)]
        words = []
        for own, other, f in zip(letters, letters[::-1], pair.features, strict=True):
            n, of = len(f.listed(matched=True)), int(f.is_active.sum())
            share = f"{f.share():.0%} of the influence"
            words.append(f"{n} of {of} active features of {own} are in {other}, {share}")
        return words


def _tail(text: str, n: int) -> str:
    """The end of a text in at most n characters."""
    return text if len(text) <= n else f"…{text[1 - n :]}"


def _pair_lines(comparison: Comparison, pair: Pair) -> list[str]:
    """What the terminal shows of a pair: how much is in both, and the first feature of each that
    is not."""
    lines = comparison.in_both(pair)
    for i, f in zip((pair.first, pair.second), pair.features, strict=True):
        for k in f.listed(matched=False)[:1]:
            caption = comparison.compared[i].report.get(k, {}).get("caption", "")
            text = (
                f"  only in {comparison.letters[i]}: {k}, influence {f.influence[k]:.1%}  {caption}"
            )
            lines.append(fa.shortened(text.rstrip(), WIDTH))
    return lines


def compare_runs(
    *given: object,
    saes: Mapping[str, tuple[object, Tensor, Tensor]] | None = None,
    out: str | Path | None = PAGE,
) -> Comparison:
    """The comparison of runs, and of SAEs that read the layer of the first; its page is in `out`.

    Args:
        given: runs as `load_run` and `explain` give them; folders of finished runs, of which
            only numbers are compared; or an `ExplainedLayer` with its splits "train", "val" and
            "test", with an SAE or without.
        saes: (sae, mu, std) by name, as `load_saelens` gives them.
        out: the page; None writes none.

    Features of the first are matched with those of up to three others, on its test images. Raises
    InputError for what cannot be compared.
    """
    if out is not None:
        prepare_folder(Path(out).parent)
        if Path(out).is_dir():
            raise InputError(f"the page must be a file, but {out} is a folder: add /{PAGE}")
    compared: list[Compared] = []
    base = None  # a layer without an SAE of its own
    for one in given:
        if isinstance(one, Compared):
            compared.append(one)
        elif isinstance(one, fa.ExplainedLayer) and one.sae is None:
            base = Compared("the layer", {}, {}, layer=one)
        elif isinstance(one, fa.ExplainedLayer):
            compared.append(of_layer(one, f"SAE {len(compared) + 1}"))
        elif isinstance(one, str | Path):
            compared += read_run(Path(one))
        else:
            compared.append(of_run(one))
    if saes and not (base or compared):
        raise InputError("saes need a run, or a layer, that they read: give it first")
    for name, parts in (saes or {}).items():
        compared.append(with_sae(base or compared[0], name, *parts))
    if len(compared) < 2:
        raise InputError(f"give two runs or more to compare, got {len(compared)}")
    for other in compared[1:]:
        check_images(compared[0], other)
    known = [i for i, one in enumerate(compared) if one.layer is not None]
    pairs = [match_pair(known[0], i, compared) for i in known[1 : 1 + MOST_PAIRS]]
    comparison = Comparison(compared, pairs)
    if out is not None:
        fa.write_whole(Path(out), comparison_page(comparison, Path(out).parent))
    return comparison


def compare_command(argv: Sequence[str], load_run: Callable) -> Comparison:
    """`saexplain compare`: the comparison of the folders named, after printing its table.

    `load_run(folder, target, data_dir, device)` loads a run of the script. Raises InputError.
    """
    parser = argparse.ArgumentParser(
        prog="saexplain compare",
        description="Compare finished runs, and SAEs of SAELens that read the layer of the first.",
        epilog="example: saexplain compare artifacts_mnist_sae other_run their_saelens_folder",
    )
    parser.add_argument("runs", nargs="+", help="folders of runs (or RUN/target_N), or of SAELens")
    parser.add_argument("--out", default=PAGE, help="the page (default: %(default)s)")
    parser.add_argument("--data", help="folder of the images, if they were moved")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    def fail(message: str) -> None:
        raise InputError(f"{message} (saexplain compare --help)")

    parser.error = fail
    args = parser.parse_args(argv)
    found: list[object] = []
    saes = {}
    for path in map(Path, args.runs):
        if (path / CONFIG_FILE).exists() and not (path / runs.MANIFEST).exists():
            saes[str(path)] = load_saelens(path)
            continue
        root, _ = find_run(path)
        for one in read_run(path):
            if runs.load_manifest(root).get("caller", "script") == "script":
                target = one.settings["target_actives"]
                one = of_run(load_run(root, target, args.data, args.device))
            found.append(one)
    if not found:
        raise InputError(
            "SAEs of SAELens need a run whose layer they read: give its folder as well"
        )
    comparison = compare_runs(*found, saes=saes, out=args.out)
    print(f"{comparison.table()}\npage: {args.out}")
    return comparison
