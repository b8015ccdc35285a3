"""Which images decide the target: saexplain.targets."""

from pathlib import Path

import pytest
import torch

import feature_analysis as fa
import MNIST_SAE_code as driver
from saexplain import targets
from saexplain.images import Split
from saexplain.sae import JumpReLUSAE


class Net:
    """A layer whose output is its input, and three logits."""

    def logits_from_preactivations(self, raw):
        return raw[:, :3]


def layer_of(n: int) -> fa.ExplainedLayer:
    """Vectors (n, 6), sorted by the class that the logits give, of three equally frequent ones."""
    labels = torch.arange(n) * 3 // n
    raw = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    raw[torch.arange(n), labels] += 8
    splits = dict.fromkeys(("train", "val"), fa.Activations(raw, labels, raw))
    return fa.ExplainedLayer(Net(), None, torch.zeros(6), torch.ones(6), splits)


def reader_of(*units: int) -> JumpReLUSAE:
    """An SAE that has only these units, and reconstructs them where they are positive."""
    rows = torch.eye(6)[list(units)]
    sae = JumpReLUSAE(6, len(units))
    sae.load_state_dict(
        {
            "W_enc": rows.T,
            "b_enc": torch.zeros(len(units)),
            "W_dec": rows,
            "b_dec": torch.zeros(6),
            "threshold": torch.zeros(len(units)),
        }
    )
    return sae


def test_images_of_all_classes_decide(monkeypatch):
    """An SAE without the unit of the last class keeps two thirds of the predictions."""
    monkeypatch.setattr(targets, "COMPARED_IMAGES", 100)
    sae = reader_of(0, 1)
    (found,) = targets.compare_targets(layer_of(900), [2], [sae, sae])
    assert found.agreement == pytest.approx(2 / 3, abs=0.05)


class StoppedError(Exception):
    """Ends the function once its first part is done."""


@pytest.mark.parametrize(("n", "trained_on"), [(900, 300), (200, 200)])
def test_short_trainings_have_no_more_steps_on_more_images(n, trained_on, monkeypatch):
    monkeypatch.setattr(targets, "FULL_TRAIN_IMAGES", 300)
    layer, given = layer_of(n), []

    def train(rows, wanted):
        given.extend([rows, wanted])
        raise StoppedError

    settings = driver.Settings(target_actives=(20,), sae_latents=30, out=str(Path("unused")))
    split = Split(*layer.splits["train"][:2])
    with pytest.raises(StoppedError):
        targets.pick_target(layer, settings, split, train)
    rows, wanted = given
    assert (rows.n_images, len(wanted)) == (trained_on, 6)
    assert {one.settings.epochs_sae_final for one in wanted} == {1}
    (classes,) = rows.raw[:, :3].argmax(1).bincount()[None]
    assert (classes - trained_on / 3).abs().max() <= 2
