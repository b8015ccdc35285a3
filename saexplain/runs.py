"""Which run does a folder have? The next one is written beside it, and replaces it when complete.

    folder = begin_run(root, manifest, settings.named)  # write everything there, settings.json last
    finish_run(root)  # the folder root has these files then, and no others of a run

Takes a folder that a lock protects; gives the same folder with one run, the old one until the new
one is complete. Interrupted while one replaces the other, the folder has none, until it is called
again. It knows the names of a run's files, and nothing of what is in them but for settings.json,
the manifest; other files stay, but for those of a name that the run writes itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from saexplain.console import print_words
from saexplain.files import (
    INTERRUPTED,
    STAGING,
    InputError,
    change_in_words,
    in_short,
    read_json,
    to_json,
)
from saexplain.images import Data

OWN_NETWORK = "the classifier of this project"  # in a manifest: the one that the script trains
MANIFEST = "settings.json"  # makes a folder a finished run
# A run that is complete, while its files are moved; the manifest of one, while it is removed.
MOVING, REMOVED = ".finished_run", ".removed_run.json"
OWN_FOLDERS = re.compile(r"target_\d+|(target_\d+/)?(saelens|stability_seed_\d+|frozen_decoder)")
OWN_FILES = re.compile(  # of the folder and of target_N
    r"(target_\d+/)?("
    r"(settings|summary|feature_report|hypotheses|classifier)\.json|classifier\.safetensors"
    r"|((stability_seed_\d+|frozen_decoder)/)?sae\.(json|safetensors)"
    r"|feature_report\.html|(FILES|hypotheses|my_hypotheses)\.md|run\.log\.jsonl"
    r"|(frontier|explained|influence|training)\.png"
    r"|saelens/(cfg\.json|sae_weights\.safetensors|README\.md)"
    r"|feature_\d+_(gallery|pattern|panel|hypothesis)\.(png|npy)"
    r"|my_hypothesis_\d+_feature_\d+\.png)"
)
SUBFOLDERS = ("", "saelens/", "stability_seed_*/", "frozen_decoder/")  # that have such files
# settings that change no result
NO_RESULTS = {"fresh", "wait", "workers", "my_hypotheses", "verbose"}
NOT_COMPARED = ("out", "data", "device")  # settings: equal images give equal results
CALLERS = {"script": "MNIST_SAE_code.py", "explain": "explain()", "explain_sae": "explain_sae()"}
IN_WORDS = {
    "data_digest": "of other images",
    "network_sha256": "of a network with other weights",
    "sae_sha256": "of another SAE",
}
MANIFEST_KEYS = {"settings", "data", "network", "classes", "hypotheses_sha256", *IN_WORDS}


class Network(NamedTuple):
    """The network that is explained, as the files of a run name it."""

    caller: str  # a key of CALLERS
    title: str  # in words
    digest: str = ""  # SHA-256 of its weights, and of its outputs where it was not trained here
    history: Sequence[dict] = ()  # of its training, where it was trained here

    def manifest(self, settings: dict, data: Data) -> dict:
        """What settings.json says about a run before it has SAEs."""
        return {
            "caller": self.caller,
            "settings": {name: settings[name] for name in settings if name not in NO_RESULTS},
            "data": data.source,
            "data_digest": data.digest,
            "network": self.title,
            "network_sha256": self.digest,
            "classes": data.classes,
        }


def own_names(root: Path) -> Iterator[Path]:
    """What the folder has under the names of a run's files."""
    for target in ("", "target_*/"):
        for sub in SUBFOLDERS:
            for path in root.glob(f"{target}{sub}*"):
                if OWN_FILES.fullmatch(path.relative_to(root).as_posix()):
                    yield path


def check_names(root: Path) -> None:
    """Raise InputError where a file of a run has the name of a folder, or a folder that of a file:
    the run could not be moved there."""
    paths = [path for path in own_names(root) if path.is_dir()]
    for path in [*root.glob("*"), *root.glob("target_*/*")]:
        if OWN_FOLDERS.fullmatch(path.relative_to(root).as_posix()) and not path.is_dir():
            paths.append(path)
    if paths:
        met, needed = ("folder", "file") if paths[0].is_dir() else ("file", "folder")
        raise InputError(
            f"{paths[0]} is a {met}, but a run writes a {needed} of this name: move it away, or "
            f"choose another folder"
        )


def remove_run(root: Path, successor: Path) -> None:
    """Remove the files of the folder's run, if it has one, and the folders that are empty then.

    Tests of a person's own hypotheses stay where the run in the folder `successor` has equal SAEs.
    """
    removed = root / REMOVED  # a later call goes on from it
    if (root / MANIFEST).exists():
        (root / MANIFEST).replace(removed)
    if not removed.exists():
        return
    same = sae_digests(removed) == sae_digests(successor / MANIFEST)
    for path in list(own_names(root)):
        if same and path.name.startswith("my_"):
            continue
        path.unlink()
        for folder in (path.parent, path.parent.parent):
            if root in folder.parents and not any(folder.iterdir()):
                folder.rmdir()
    removed.unlink()


def sae_digests(manifest: Path) -> object:
    """By target, the digests of the SAEs of a finished run; None where they are not known."""
    try:
        return read_json(manifest).get("sae_sha256")
    except (InputError, AttributeError):
        return None


def begin_run(root: Path, manifest: dict, named: Callable[[str], str]) -> Path:
    """The empty folder in which a new run is written, after a line about what it will replace.

    A run that was complete is finished first; of one that was interrupted, the stages are kept.
    The manifest may lack what is not known yet; `named` gives the name of a setting.
    """
    check_names(root)
    finish_run(root)
    if found := results_in_words(root, json.loads(to_json(manifest)), named):
        print_words(
            f"{root} has {found}; they are replaced when this run has finished: give "
            f"{'--out' if manifest['caller'] == 'script' else 'out='} another folder to keep them"
        )
    staging, kept = root / STAGING, root / INTERRUPTED
    records = [
        path for path in staging.rglob("*.json") if path.with_suffix(".safetensors").exists()
    ]
    for record in records:
        target = kept / record.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it is written last, as in `save_stage`
        record.with_suffix(".safetensors").replace(target.with_suffix(".safetensors"))
        record.replace(target)
    if kept.exists():
        print_words(f"{root} has an unfinished run: what is trained with equal settings is reused")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def finish_run(root: Path) -> None:
    """Replace the folder's run by the complete one in STAGING, if there is one.

    Killed at any moment, it goes on from there when it is called again.
    """
    staging, moving = root / STAGING, root / MOVING
    if (staging / MANIFEST).exists():
        remove_run(root, staging)
        staging.rename(moving)
    if moving.exists():
        paths = [path for path in moving.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path == moving / MANIFEST):  # it goes last
            target = root / path.relative_to(moving)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        for folder in (root / INTERRUPTED, moving):
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# What a folder has, in words
# --------------------------------------------------------------------------------------------------


def results_in_words(root: Path, new: dict, named: Callable[[str], str]) -> str:
    """The results in the folder, where they differ from those of the manifest; "" if not."""
    if not (root / MANIFEST).exists():
        found = sorted(path.relative_to(root).as_posix() for path in own_names(root))
        return f"files with names of results ({in_short(found)})" if found else ""
    try:
        old = load_manifest(root)
    except InputError:
        return "results with a settings.json that cannot be read"
    if MANIFEST_KEYS - old.keys():
        return "results of another version of the program"
    caller = old.get("caller", new["caller"])
    if caller != new["caller"]:
        return f"results of {CALLERS.get(caller)} for {old['network']}"
    if old["settings"].keys() != new["settings"].keys():
        return "results of another version of the program"
    words = [] if old["network"] == new["network"] else [f"for {old['network']}"]
    others = [key for key in IN_WORDS if new.get(key) and new[key] != old[key]]
    other_seed = old["settings"]["seed"] != new["settings"]["seed"]  # which draws other images
    words += [IN_WORDS[others[0]]] if others and not words and not other_seed else []
    settings = [
        f"{named(key)} {change_in_words(value)}"
        for key, value in old["settings"].items()
        if key not in NOT_COMPARED and new["settings"][key] not in (value, None)
    ]
    words += [f"with {in_short(settings)}"] if settings else []
    return " ".join(["results", *words]) if words else ""


def load_manifest(root: Path) -> dict:
    """The content of settings.json. Raises InputError, which says what the folder has instead."""
    if not (root / MANIFEST).exists():
        raise InputError(f"{root} has {unfinished_in_words(root)}")
    manifest = read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise InputError(f"{root / MANIFEST} is damaged; run it again")
    return manifest


def unfinished_in_words(root: Path) -> str:
    """What a folder without a manifest has, and what to do."""
    if any((root / name).exists() for name in (STAGING, INTERRUPTED, MOVING)):
        return "an unfinished run; the same command again finishes it"
    if (root / "sweep.json").exists():
        return "a sweep, no finished run; run MNIST_SAE_code.py with the settings of one SAE"
    if any(own_names(root)):
        return "an unfinished run, or one SAE of a sweep, no finished run; run it again"
    return f"no finished run; run MNIST_SAE_code.py --out {root} first"


def check_version(root: Path, manifest: dict, settings: Sequence[str]) -> None:
    """Raise InputError unless the manifest has the keys of this version, and of the settings."""
    if MANIFEST_KEYS - manifest.keys() or manifest["settings"].keys() != set(settings) - NO_RESULTS:
        raise InputError(f"{root} has a run of another version of the program; run it again")
