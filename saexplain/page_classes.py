"""What do features do to many classes? Tables of the largest effects, for a page of small size.

    if needs_tables(n_classes, n_features):
        arrays |= class_tables(layer, raw, activity, features, pair)
        arrays |= test_tables(logits, added, image, fixed, forced)  # of test images
    few = sparse(effects)  # [class, value] of the largest

With few classes a page has the effect of every feature on every logit, by class of image, which
are C F C numbers. With many it has these tables. Takes a layer, activity and effects; gives arrays.

Key: C classes, F features on the page, P pairs of a feature and an image, m test images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import feature_analysis as fa
from saexplain.activity import Activity, ClassEffects, Removals

FEW_CLASSES = 20  # of no more classes a page always has all effects
FULL_ENTRIES = 2**18  # effects C F C of which it has all in any case
N_SUPPORTING, N_OPPOSING = 12, 8  # features listed of a class
N_RIVALS, N_SEPARATING = 8, 8  # classes that a class is compared with, features that separate two
N_LOGITS = 10  # logits of a test image, the largest
N_EFFECTS = 10  # logits that a feature raises most, and as many that it lowers most


def needs_tables(n_classes: int, n_features: int) -> bool:
    """Whether the effects by class are too many for a page."""
    return n_classes > FEW_CLASSES and n_classes * n_classes * n_features > FULL_ENTRIES


def sparse(values: Sequence[float], digits: int = 4) -> list[list[float]]:
    """[class, value] of the N_EFFECTS largest and smallest values that are not 0."""
    array = np.asarray(values, dtype=float)
    order = np.argsort(-array, kind="stable")
    some = sorted({*order[:N_EFFECTS].tolist(), *order[-N_EFFECTS:].tolist()})
    return [[c, float(f"{array[c]:.{digits}g}")] for c in some if array[c]]


def class_tables(
    layer: fa.ExplainedLayer,
    raw: fa.Rows,
    activity: Activity,
    features: Sequence[int],
    pair: Sequence[int],
    removed: Removals | None = None,
) -> dict[str, np.ndarray]:
    """Of each class the features that change its logit most, and those that separate it from the
    classes whose logits are largest on its images; the classes of `pair` are compared in any case.

    Effects are means over all images of the class. Features are places among `features`, -1 where
    there is none.
    """
    n_classes = layer.n_classes
    effects = ClassEffects.of(layer, raw, activity, removed)
    logits, labels = effects.found.logits, activity.labels

    listed = N_SUPPORTING + N_OPPOSING
    rivals = np.zeros((n_classes, min(N_RIVALS, n_classes - 1)), np.int32)
    top = np.full((n_classes, listed), -1, np.int32)
    top_value = np.zeros((n_classes, listed), np.float32)
    split = np.full((*rivals.shape, N_SEPARATING), -1, np.int32)
    split_value = np.zeros(split.shape, np.float32)
    for c in range(n_classes):
        sums = effects.on(c)[torch.tensor(features)]  # (F, C) mean effects on images of class c
        _fill_largest(top[c, :N_SUPPORTING], top_value[c, :N_SUPPORTING], sums[:, c])
        _fill_largest(top[c, N_SUPPORTING:], top_value[c, N_SUPPORTING:], -sums[:, c])
        top_value[c, N_SUPPORTING:] *= -1
        mean = logits[labels == c].double().sum(0) / max(1, int((labels == c).sum()))
        mean[c] = -math.inf
        if c in pair:
            mean[sum(pair) - c] = math.inf
        rivals[c] = mean.topk(rivals.shape[1]).indices.numpy()
        for r, rival in enumerate(rivals[c].tolist()):
            _fill_largest(split[c, r], split_value[c, r], sums[:, c] - sums[:, rival])
    return {
        "rivals": rivals,
        "class_feature": top,
        "class_value": top_value,
        "pair_of_feature": split,
        "pair_of_value": split_value,
    }


def _fill_largest(places: np.ndarray, values: np.ndarray, effects: Tensor) -> None:
    """Write the features of the largest effects (F,) above 0, and these effects, into rows."""
    best = effects.topk(min(len(places), len(effects)))
    n = int((best.values > 0).sum())
    places[:n], values[:n] = best.indices[:n].numpy(), best.values[:n].numpy()


def test_tables(
    logits: Tensor, added: Tensor, image: Tensor, fixed: Tensor, forced: Tensor
) -> dict[str, np.ndarray]:
    """Logits (m, C) of test images, and effects (P, C) on those of `image` (P,), on the N_LOGITS
    largest logits of each image and on those of its classes `forced` (m, n).

    The last column is the log of the sum of the exponentials of all other logits, so that
    probabilities are exact. `fixed` (n_errors, C) are logits of the first images, changed.
    """
    wanted = logits.scatter(1, forced, math.inf)
    chosen = wanted.topk(min(logits.shape[1] - 1, N_LOGITS + forced.shape[1]), dim=1).indices

    def columns(values: Tensor, at: Tensor) -> Tensor:
        rest = values.scatter(1, at, -math.inf).logsumexp(1, keepdim=True)
        return torch.cat([values.gather(1, at), rest], dim=1)

    own, parts = columns(logits, chosen), []
    for some, i in zip(added.split(fa.ROWS), image.split(fa.ROWS), strict=True):
        parts.append(own[i] - columns(logits[i] - some, chosen[i]))
    return {
        "test_classes": chosen.int().numpy(),
        "test_logits": own.numpy(),
        "pair_adds": torch.cat(parts).numpy(),
        "fixed_logits": columns(fixed, chosen[: len(fixed)]).numpy(),
    }
