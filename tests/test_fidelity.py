"""The network with reconstructions spliced in: saexplain.fidelity."""

import numpy as np
import pytest
import torch

import feature_analysis as fa
from saexplain import fidelity as fid
from saexplain.files import read_json, to_json
from saexplain.sae import JumpReLUSAE


class Logits:
    """A model whose activations are its inputs, and its logits."""

    def preactivations(self, images):
        return images

    def logits_from_preactivations(self, raw):
        return raw


def noise(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def layer_of(d_in: int, sae=None, **splits: torch.Tensor) -> fa.ExplainedLayer:
    """A layer of `Logits` with splits (N, d_in); the labels are the largest logits."""
    found = {name: fa.Activations(z, z.argmax(1), z) for name, z in splits.items()}
    return fa.ExplainedLayer(Logits(), sae, torch.zeros(d_in), torch.ones(d_in), found)


@pytest.fixture(scope="module")
def case():
    """Activations (400, 3), of which noisy ones give the labels, and a layer."""
    z = noise(400, 3, 4) * 2 + 1
    return layer_of(3), z, (z + noise(400, 3, 5)).argmax(1)


def measured(case, z_hat, scale: float = 1) -> fid.Fidelity:
    """The fidelity of z_hat (400, 3) in place of z, both `scale` times as large."""
    layer, z, labels = case
    own, mean = scale * z, (scale * z).mean(0).expand_as(z)
    rows = iter((scale * z_hat).split(max(1, fid.EVAL_ENTRIES // 3)))
    spliced = fid.splice(layer, own, lambda _z: next(rows))
    total = fid._l0_and_sums(layer.with_sae(JumpReLUSAE(3, 2)), own)[2].about_mean()
    return fid.fidelity(own, spliced, mean, labels, total)


@pytest.mark.parametrize("entries", [fid.EVAL_ENTRIES, 90])
@pytest.mark.parametrize(("of_mean", "fvu"), [(False, 0), (True, 1)])
def test_a_perfect_reconstruction_loses_nothing_and_the_mean_everything(
    case, of_mean, fvu, entries, monkeypatch
):
    monkeypatch.setattr(fid, "EVAL_ENTRIES", entries)
    _, z, labels = case
    z_hat = z.mean(0).expand_as(z) if of_mean else z
    found = measured(case, z_hat)
    assert (found.fvu, found.ce_recovered) == pytest.approx((fvu, 1 - fvu), abs=1e-6)
    assert found.accuracy == pytest.approx((z_hat.argmax(1) == labels).double().mean().item())


def test_fidelity_against_its_definitions_and_at_another_scale(case):
    _, z, labels = case
    z_hat = z + 0.7 * noise(400, 3, 6)
    found = measured(case, z_hat)
    p, q, mean = (torch.softmax(a.double(), -1) for a in (z, z_hat, z.mean(0)))
    ce, ce_hat = (-a[range(400), labels].log().mean().item() for a in (p, q))
    ce_mean = -mean[labels].log().mean().item()
    assert found.cross_entropy == pytest.approx(ce_hat, rel=1e-5)
    assert found.ce_recovered == pytest.approx((ce_mean - ce_hat) / (ce_mean - ce), rel=1e-4)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert found.agreement == pytest.approx((z.argmax(1) == z_hat.argmax(1)).double().mean().item())
    error, spread = (z - z_hat).double().square().sum(), (z - z.mean(0)).double().square().sum()
    assert found.fvu == pytest.approx((error / spread).item(), rel=1e-5)
    assert measured(case, z_hat, 9).fvu == pytest.approx(found.fvu, rel=1e-5)


@pytest.fixture
def sae():
    """Two features with hand-set weights."""
    weights = {
        "W_enc": torch.eye(2),
        "b_enc": torch.zeros(2),
        "W_dec": torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        "b_dec": torch.tensor([0.0, 1.0]),
        "threshold": torch.tensor([0.5, 0.5]),
    }
    return JumpReLUSAE.from_weights(weights)


Z = torch.tensor([[2.0, 0.0], [4.0, 5.0], [0.4, 1.0]])


@pytest.mark.parametrize("entries", [fid.EVAL_ENTRIES, 2])
def test_statistics_by_hand_do_not_depend_on_the_chunks(sae, entries, monkeypatch):
    monkeypatch.setattr(fid, "EVAL_ENTRIES", entries)
    stats = fid.feature_stats(sae, Z)
    assert stats.feature_density.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert stats.mean_activation.tolist() == [3, 3]
    assert fid.l0_per_row(sae, Z).tolist() == [1, 2, 1]
    assert fid.mean_l0(sae, Z) == 4 / 3


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("jumprelu", [[2.0, 1.0], [7.0, 5.0], [0.6, 1.8]]),
        ("boolean", [[1.0, 1.0], [1.6, 1.8], [0.6, 1.8]]),
        ("boolean_scaled", [[3.0, 1.0], [4.8, 3.4], [1.8, 3.4]]),
    ],
)
def test_the_modes_of_reconstruction_by_hand(sae, mode, expected):
    z_hat = fid.reconstruct(sae, Z, mode, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(z_hat, torch.tensor(expected))


def test_ratios_without_a_denominator_are_none_not_nan(sae):
    """An SAE that is never active, and as many components as units."""
    sae.threshold.fill_(1e6)
    splits = {name: noise(n, 2, n) for name, n in (("train", 30), ("val", 20), ("test", 25))}
    record = fid.measure_fidelity(layer_of(2, sae, **splits), target=2)
    assert (record["dense_share_of_l0"], record["dead_features"]) == (None, 2)
    assert record["fvu_to_pca"] is record["disagreement_to_pca"] is None
    to_json(record)  # no number that JSON does not have


def test_the_record_of_a_run_from_its_weights_in_float64(loaded):
    """Against a singular value decomposition of the training activations."""
    layer, (record,) = loaded.layer, read_json(loaded.folder / "summary.json")
    z_train, z = (layer.standardize(layer.splits[n].raw).double() for n in ("train", "test"))
    mean = z_train.mean(0)
    _, _, axes = np.linalg.svd((z_train - mean).numpy(), full_matrices=False)
    strongest = torch.from_numpy(axes[:4])
    z_pca = mean + (z - mean) @ strongest.T @ strongest
    spread = (z - z.mean(0)).square().sum()
    assert record["fvu_pca"] == pytest.approx(
        ((z - z_pca).square().sum() / spread).item(), rel=1e-4
    )
    assert record["fvu_to_pca"] == pytest.approx(record["fvu"] / record["fvu_pca"])

    z_hat = layer.sae.decode(layer.sae.encode(z.float())).double()
    assert record["fvu"] == pytest.approx(((z - z_hat).square().sum() / spread).item(), rel=1e-4)
    kept = layer.logits_of_z(z_pca.float()).argmax(1) == layer.logits_of_z(z.float()).argmax(1)
    assert record["agreement_pca"] == pytest.approx(kept.double().mean().item(), abs=0.002)
