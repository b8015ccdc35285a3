"""Explain the features of a sparse autoencoder (SAE) of an image classifier; test the explanations.

    from saexplain import explain_sae, load_saelens

    sae, mu, std = load_saelens("folder")  # or any SAE with encode, decode, W_enc and W_dec
    explain_sae(model, "layer3", sae, mu, std, train, val, test, out="explained")

Where to look:

    how is a layer read and replaced?          layers.py; for all images: activations.py
    where do images come from?                 images.py, and idx.py for MNIST's file format
    where do images of one's own come from?    datasets.py; in which forms? sources.py
    how do images look?                        normalization.py
    what is known about every feature?         analysis.py, activity.py
    what may a feature mean?                   ink.py, regions.py, hypotheses.py, captions.py
    where is an image edited?                  edits.py
    is the network explained?                  substitution.py
    what do you think a feature means?         own.py
    what is tested on which images?            evaluation.py, statistics.py, baselines.py
    what is lost with the SAE spliced in?      fidelity.py
    does another seed find the same features?  reproducibility.py
    which features flip a prediction?          counterfactuals.py
    how do runs differ?                        compare.py, compare_page.py
    where are the usual complaints measured?   diagnoses.py
    where are files and pictures written?      report.py, panels.py, figures.py, page.py, text.py
    what does the terminal show?               progress.py, console.py; of flags: flags.py
    how is work spread, saved and reused?      parallel.py, files.py, sweep.py
    which run does a folder have?              runs.py

`feature_analysis` has the numbers and pictures of single features; MNIST_SAE_code.py trains an SAE.
"""

from __future__ import annotations

import importlib

_HOME = {  # of the names that can be imported from saexplain itself
    "AtLayer": "layers",
    "Hypothesis": "hypotheses",
    "JumpReLUSAE": "sae",
    "compare_runs": "compare",
    "evaluate_hypotheses": "evaluation",
    "explain_sae": "report",
    "load_images": "images",
    "load_own": "datasets",
    "load_saelens": "saelens",
    "read_hypotheses": "own",
    "save_saelens": "saelens",
    "write_hypotheses": "own",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """The object of that name, imported when it is first asked for: it may need all of torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'saexplain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saexplain.{_HOME[name]}"), name)
