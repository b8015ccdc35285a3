"""Lines that decide whether a number is true, though nothing breaks when they are wrong."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import activity_of

import feature_confirmation as fc
import feature_hypotheses as fh
import MNIST_SAE_code as driver

TINY = """--data sample --sae-latents 12 --hidden-units 16 --target-actives 2 --epochs-sae-final 1
--epochs-ffn 1 --batch-sae 512 --batch-ffn 512 --features 1 --stability-seeds 0
--workers 0""".split()


class Calls(list):
    """What a function was called with, and what it gave."""

    def of(self, function):
        def noted(*args, **kwargs):
            result = function(*args, **kwargs)
            self.append((args, result))
            return result

        return noted


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A finished run with statements, and how it called those who judge."""
    folder, calls = tmp_path_factory.mktemp("run"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("test_hypotheses", "compare_features", "make_trial"):
            calls[name] = Calls()
            patch.setattr(fc, name, calls[name].of(getattr(fc, name)))
        driver.main([*TINY, "--out", str(folder)])
    return driver.load_run(str(folder)), json.loads((folder / "summary.json").read_text())[0], calls


def test_what_judges_and_what_is_set_aside_are_the_two_halves_of_the_test_images(noted):
    run, _, calls = noted
    images, labels = run.data.test
    halves = {"judging": (images[0::2], labels[0::2]), "aside": (images[1::2], labels[1::2])}

    def half(some) -> str:
        (name,) = [n for n, whole in halves.items() if all(map(torch.equal, some, whole))]
        return name

    results = {}
    for args, result in calls["test_hypotheses"]:
        if torch.equal(args[1].sae.W_enc, run.sae.W_enc):
            results[half(args[2:4])] = result
    assert set(results) == {"judging", "aside"}
    for args, _ in calls["compare_features"]:
        assert [half(args[3]), half(args[4])] == ["judging", "aside"]
        assert all(map(torch.equal, args[2], run.data.val))
    ((args, trial),) = [c for c in calls["make_trial"] if c[0][2] is results["judging"]]
    assert args[3] is results["aside"]
    assert trial.evidence is results["judging"]


def test_what_is_set_aside_for_comparisons_differs_too(noted):
    """compare_features itself tests on the images it is told to, and on the others again."""
    for args, comparison in noted[2]["compare_features"]:
        judging, aside = args[3], args[4]
        tested = [call for call in noted[2]["test_hypotheses"] if call[0][1].sae is args[0]]
        images = [call[0][2] for call in tested]
        assert len(tested) == 2
        assert images[0] is judging[0]
        assert images[1] is aside[0]
        assert isinstance(comparison, fc.Comparison)


def cross_entropy_recovered(run, mean: torch.Tensor) -> float:
    """With a mean ablation by `mean`, in float64."""
    model, sae = run.model.double(), run.sae.double()
    images, labels = run.data.test
    mu, std = run.mu.double(), run.std.double()
    z = (model.preactivations(images.double()) - mu) / std

    def loss(z) -> float:
        return float(F.cross_entropy(model.logits_from_preactivations(z * std + mu), labels))

    at_mean, through = loss(mean.expand_as(z)), loss(sae.decode(sae.encode(z)))
    return (at_mean - through) / (at_mean - loss(z))


def test_mean_ablation_takes_the_mean_of_the_training_images(noted):
    run, record, _ = noted
    means = {}
    for name in ("train", "val", "test"):
        means[name] = run.layer.standardised(getattr(run.data, name).images).mean(0).double()
    expected = {name: cross_entropy_recovered(run, mean) for name, mean in means.items()}
    run.model.float(), run.sae.float()
    assert record["ce_recovered"] == pytest.approx(expected["train"], rel=2e-5)
    for other in ("val", "test"):
        assert record["ce_recovered"] != pytest.approx(expected[other], rel=4e-5)


@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_the_false_discovery_rate_counts_every_test_and_no_other(m):
    """The r smallest of m p-values pass together just below r q / m, and fail just above."""
    q = 0.01
    for r in range(1, m + 1):
        edge = r * q / m
        for p, passes in ((edge * (1 - 1e-9), True), (edge * (1 + 1e-9), False)):
            values = np.array([p] * r + [0.9] * (m - r))
            assert fc.benjamini_hochberg(values, q).sum() == (r if passes else 0)


def test_an_image_that_scores_just_the_cut_is_described():
    """Cuts are scores of discovery images, which claims about labels give again and again."""
    scores = np.array([0.2, 0.5, 0.5, 0.7], np.float32)
    claim = fh.Hypothesis(**dict.fromkeys(fh.Hypothesis._fields))._replace(feature=0, cut=0.5)
    activity = activity_of([[1.0], [1.0], [0.0], [1.0]])
    assert fc._described(claim, {"both": scores}, activity) == fc.Described(n=3, active=3, both=2)
