"""Explain the features of a sparse autoencoder (SAE) of an image classifier; test the explanations.

    from saexplain import explain_sae, load_saelens

    sae, mu, std = load_saelens("folder")  # or any SAE with encode, decode, W_enc and W_dec
    explain_sae(model, "layer3", sae, mu, std, train, val, test, out="explained")

Each module begins with the question that it answers; docs/method.md has them in a table.
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
